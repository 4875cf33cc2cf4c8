"""JiT as anyone would write it: eager, step by step, with the names of the published weights.

Written from a description of the network, not from ``reparam.networks.jit``, which it is held
against in tests/test_jit.py and in benchmarks/jit.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainRMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class PlainPatchEmbed(nn.Module):
    def __init__(self, patch: int, channels: int, bottleneck: int, width: int) -> None:
        super().__init__()
        self.proj1 = nn.Conv2d(channels, bottleneck, kernel_size=patch, stride=patch, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, width, kernel_size=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2)


class PlainTimeEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        k = torch.arange(128, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(10000) * k / 128)[None]
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))


class PlainLabelEmbed(nn.Module):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class PlainAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = PlainRMSNorm(self.head_dim)
        self.k_norm = PlainRMSNorm(self.head_dim)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = torch.split(self.qkv(x), width, dim=-1)
        q = q.reshape(b, n, self.heads, self.head_dim).transpose(1, 2)
        k = k.reshape(b, n, self.heads, self.head_dim).transpose(1, 2)
        v = v.reshape(b, n, self.heads, self.head_dim).transpose(1, 2)
        q, k = turned(self.q_norm(q), cos, sin), turned(self.k_norm(k), cos, sin)
        with torch.autocast(x.device.type, enabled=False):
            weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(self.head_dim), dim=-1)
        mixed = (weights.to(v.dtype) @ v).transpose(1, 2).reshape(b, n, width)
        return self.proj_drop(self.proj(mixed))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs of the last N tokens of x [B, heads, n, head_dim] turned; cos and sin [N, head_dim/2]."""
    first = x.shape[2] - len(cos)
    still, moving = x[:, :, :first], x[:, :, first:]
    x1, x2 = moving[..., 0::2], moving[..., 1::2]
    pairs = torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
    return torch.cat([still, pairs.flatten(-2)], dim=2)


class PlainMLP(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)
        self.ffn_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.ffn_dropout(F.silu(x1) * x2))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = PlainRMSNorm(width)
        self.attn = PlainAttention(width, heads, dropout)
        self.norm2 = PlainRMSNorm(width)
        self.mlp = PlainMLP(width, dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1), cos, sin)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class PlainFinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = PlainRMSNorm(width)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PlainJiT(nn.Module):
    """The peer; its arguments are the published configuration's, and ``input_size`` may be (height, width)."""

    def __init__(
        self,
        input_size: int | tuple[int, int],
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        bottleneck_dim: int,
        in_context_len: int = 0,
        in_context_start: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.rows, self.columns = height // patch_size, width // patch_size
        self.patch_size, self.in_channels = patch_size, in_channels
        self.num_classes, self.in_context_len, self.in_context_start = num_classes, in_context_len, in_context_start
        self.x_embedder = PlainPatchEmbed(patch_size, in_channels, bottleneck_dim, hidden_size)
        self.t_embedder = PlainTimeEmbed(hidden_size)
        if num_classes:
            self.y_embedder = PlainLabelEmbed(num_classes, hidden_size)
        if in_context_len:
            self.in_context_posemb = nn.Parameter(torch.randn(1, in_context_len, hidden_size))
        self.blocks = nn.ModuleList()
        for i in range(depth):
            middle = depth // 4 <= i < 3 * (depth // 4)
            self.blocks.append(PlainBlock(hidden_size, num_heads, dropout if middle else 0.0))
        self.final_layer = PlainFinalLayer(hidden_size, patch_size * patch_size * in_channels)
        row = torch.arange(self.rows).repeat_interleave(self.columns)
        column = torch.arange(self.columns).repeat(self.rows)
        position = torch.cat([sin_cos(column, hidden_size // 2), sin_cos(row, hidden_size // 2)], dim=1)
        self.register_buffer("pos_embed", position[None].float())
        d = hidden_size // num_heads // 2
        frequency = 10000.0 ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
        angles = torch.cat([torch.outer(row.double(), frequency), torch.outer(column.double(), frequency)], dim=1)
        self.register_buffer("cos", torch.cos(angles).float(), persistent=False)
        self.register_buffer("sin", torch.sin(angles).float(), persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        c = self.t_embedder(t)
        if self.num_classes:
            y = torch.full((len(x),), self.num_classes, device=x.device) if y is None else y
            label = self.y_embedder(y)
            c = c + label
        h = self.x_embedder(x) + self.pos_embed
        for i, block in enumerate(self.blocks):
            if self.in_context_len and i == self.in_context_start:
                tokens = label.unsqueeze(1).repeat(1, self.in_context_len, 1) + self.in_context_posemb
                h = torch.cat([tokens, h], dim=1)
            h = block(h, c, self.cos, self.sin)
        return self.unpatchify(self.final_layer(h[:, self.in_context_len :], c))

    def unpatchify(self, h: Tensor) -> Tensor:
        p = self.patch_size
        h = h.reshape(len(h), self.rows, self.columns, p, p, self.in_channels)
        return torch.einsum("bhwpqc->bchpwq", h).reshape(len(h), self.in_channels, self.rows * p, self.columns * p)


def sin_cos(place: Tensor, dim: int) -> Tensor:
    frequency = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = torch.outer(place.double(), frequency)
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)


def randomise(net: nn.Module, seed: int = 0) -> None:
    """Every parameter random and of the size at which each counts; biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.2 * values
        elif parameter.ndim > 1 and "posemb" not in name and "embedding_table" not in name:
            values = values / parameter[0].numel() ** 0.5
        else:
            values = 0.2 * values
        parameter.data.copy_(values)
