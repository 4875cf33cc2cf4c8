r"""JiT, the plain transformer on patches of pixels (Li & He, "Back to Basics", arXiv 2511.13720).

Patches go through a linear bottleneck into a transformer with RMSNorm, SwiGLU, normalised
queries and keys, two-dimensional rotary positions, adaLN-Zero conditioning and class tokens in
context. Parameters carry the names of the published weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import NetworkError, unknown


class Size(NamedTuple):
    """The hyperparameters that a letter stands for (table 9 of the paper)."""

    depth: int
    width: int
    heads: int
    bottleneck: int
    in_context_start: int
    dropout: float


SIZES = {
    "B": Size(12, 768, 12, 128, 4, 0.0),
    "L": Size(24, 1024, 16, 128, 8, 0.0),
    "H": Size(32, 1280, 16, 256, 10, 0.2),
    "G": Size(40, 1664, 16, 256, 10, 0.2),
}
_EPS = 1e-6
#: Class tokens in context, where there are classes and nothing else is said.
_IN_CONTEXT = 32
_TIME_FEATURES = 256
#: Tables that official files may carry and this network computes.
_OFFICIAL_TABLES = ("feat_rope.", "feat_rope_incontext.")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + 10⁻⁶) · weight over the last axis, in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, _EPS)

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """norm(x)·(1 + scale) + shift, with shift and scale of shape [B, 1, dim]."""
        plain = F.rms_norm(x.float(), self.weight.shape, None, _EPS)
        return torch.addcmul(shift, plain, self.weight * (1 + scale))


class _PatchEmbed(nn.Module):
    """Patches to vectors, through a bottleneck where there is one: convolutions that are matrices here."""

    def __init__(self, patch: int, channels: int, bottleneck: int, width: int) -> None:
        super().__init__()
        self.proj1 = nn.Conv2d(channels, bottleneck, patch, stride=patch, bias=False) if bottleneck else None
        self.proj2 = nn.Conv2d(bottleneck, width, 1) if bottleneck else nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, N, width] for patches [B, N, C·p·p], channel first."""
        narrow = patches if self.proj1 is None else F.linear(patches, self.proj1.weight.flatten(1))
        return F.linear(narrow, self.proj2.weight.flatten(1), self.proj2.bias)


class _TimeEmbed(nn.Module):
    """Sinusoids of the time as it is given, then two layers."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        half = _TIME_FEATURES // 2
        powers = torch.arange(half, dtype=torch.float64) / half
        self.register_buffer("frequencies", torch.exp(-math.log(10000) * powers).float(), persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        angles = time.float()[:, None] * self.frequencies
        features: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        return features


class _LabelEmbed(nn.Module):
    """A row for each class, and a last one for "no label"."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        rows: Tensor = self.embedding_table(y)
        return rows


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: Tensor | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)  # [B, heads, 3, N, head_dim]
        q, k, v = qkv.unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = _rotated(q, rope), _rotated(k, rope)
        mixed = _attended(q, k, v)
        out: Tensor = self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))
        return out


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√d) v; in float32 on a CPU, whose bfloat16 kernel is slower, for short sequences by far."""
    if v.device.type != "cpu":
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float())


def _rotated(x: Tensor, rope: Tensor) -> Tensor:
    """Interleaved pairs (a, b) of the last axis turned by each token's angles; ``rope`` [2, N, head_dim]."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # the sign of (−b, a) is in the table of sines
    return torch.addcmul(x * rope[0], swapped, rope[1])


class _SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)
        self.ffn_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(self.ffn_dropout(F.silu(a) * b))
        return out


def _modulation(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, dropout: float, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = _Attention(width, heads, dropout, qk_norm)
        self.norm2 = RMSNorm(width)
        self.mlp = _SwiGLU(width, hidden, dropout)
        self.adaLN_modulation = _modulation(width, 6)

    def forward(self, x: Tensor, c: Tensor, rope: Tensor | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).float()[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1.modulated(x, shift1, scale1), rope)
        return x + gate2 * self.mlp(self.norm2.modulated(x, shift2, scale2))


class _FinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = _modulation(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).float()[:, None].chunk(2, dim=-1)
        out: Tensor = self.linear(self.norm_final.modulated(x, shift, scale))
        return out


class JiT(nn.Module):
    """A transformer on patches of pixels, called as ``net(x, time, y)``.

    Args:
        image: the pictures' side, or [height, width]; divisible by the patch.
        patch: side of a patch, in pixels.
        channels: of the pictures.
        size: "B", "L", "H" or "G": what the next ones are where they are not given.
        width, depth, heads: of the transformer.
        bottleneck: of the patch embedding; 0 for a single linear layer.
        classes: how many; 0 for a network without labels. Label ``classes`` means "no label".
        in_context: class tokens in context; 32 with classes, unless given.
        in_context_start: the block before which they join; the size's, or a third of the depth.
        dropout: in the middle half of the blocks; the size's, or 0 where a depth is given.
        outputs: channels of the output; those of the pictures by default.
        rope: rotary positions on queries and keys, besides the fixed positions that are added to the patches.
        qk_norm: queries and keys normalised, head by head.

    Raises:
        UnknownName: if there is no such size.
        NetworkError: if the numbers do not fit together.
    """

    pos_embed: Tensor
    rope: Tensor | None

    def __init__(
        self,
        image: int | list[int],
        patch: int = 16,
        channels: int = 3,
        size: str = "B",
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        bottleneck: int | None = None,
        classes: int = 0,
        in_context: int | None = None,
        in_context_start: int | None = None,
        dropout: float | None = None,
        outputs: int | None = None,
        rope: bool = True,
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(size, str) or size not in SIZES:
            raise unknown("size of JiT", size, SIZES)
        preset, own_depth = SIZES[size], depth is not None
        self.config: dict[str, Any] = {
            "name": "jit",
            "image": list(image) if isinstance(image, list | tuple) else [image, image],
            "patch": patch,
            "channels": channels,
            "width": preset.width if width is None else width,
            "depth": preset.depth if depth is None else depth,
            "heads": preset.heads if heads is None else heads,
            "bottleneck": preset.bottleneck if bottleneck is None else bottleneck,
            "classes": classes,
            "in_context": (_IN_CONTEXT if classes else 0) if in_context is None else in_context,
            "dropout": (0.0 if own_depth else preset.dropout) if dropout is None else dropout,
            "outputs": channels if outputs is None else outputs,
            "rope": rope,
            "qk_norm": qk_norm,
        }
        start = self.config["depth"] // 3 if own_depth else preset.in_context_start
        self.config["in_context_start"] = start if in_context_start is None else in_context_start
        _check(self.config)
        self._again = False
        self._build(**{k: v for k, v in self.config.items() if k != "name"})
        self._initialise()

    def _build(
        self,
        image: list[int],
        patch: int,
        channels: int,
        width: int,
        depth: int,
        heads: int,
        bottleneck: int,
        classes: int,
        in_context: int,
        in_context_start: int,
        dropout: float,
        outputs: int,
        rope: bool,
        qk_norm: bool,
    ) -> None:
        self.grid = (image[0] // patch, image[1] // patch)
        self.patch, self.channels = patch, channels
        self.in_context, self.in_context_start, self.null_label = in_context, in_context_start, classes
        self.x_embedder = _PatchEmbed(patch, channels, bottleneck, width)
        self.t_embedder = _TimeEmbed(width)
        self.y_embedder = _LabelEmbed(classes, width) if classes else None
        self.in_context_posemb = nn.Parameter(torch.zeros(1, in_context, width)) if in_context else None
        hidden = int(2 / 3 * 4 * width)
        middle = range(depth // 4, 3 * (depth // 4))
        rates = [dropout if i in middle else 0.0 for i in range(depth)]
        self.blocks = nn.ModuleList(_Block(width, heads, hidden, rate, qk_norm) for rate in rates)
        self.final_layer = _FinalLayer(width, patch * patch * outputs)
        self.register_buffer("pos_embed", position_table(self.grid, width)[None])
        table = rotary_table(self.grid, width // heads, in_context) if rope else None
        self.register_buffer("rope", table, persistent=False)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.data.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, _Block | _FinalLayer):
                nn.init.zeros_(module.adaLN_modulation[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.final_layer.linear.weight)
        small = [self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight, self.in_context_posemb]
        if self.y_embedder is not None:
            small.append(self.y_embedder.embedding_table.weight)
        for weight in small:
            if weight is not None:
                nn.init.normal_(weight, std=0.02)  # type: ignore[arg-type]

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        """The output, shape [B, outputs, height, width].

        Args:
            x: pictures, shape [B, channels, height, width].
            time: shape [B]; embedded as it is (published weights expect 1 at the data, 0 at the noise).
            y: class numbers, int64, shape [B]; ``classes`` means "no label", and so does None.

        Raises:
            NetworkError: if x is of another shape, or labels are given to a network without classes.
        """
        high, wide = self.grid
        expected = (self.channels, high * self.patch, wide * self.patch)
        if x.shape[1:] != expected:
            raise NetworkError(
                f"this JiT takes pictures of shape [B, {', '.join(map(str, expected))}], found {list(x.shape)}."
            )
        if self.y_embedder is None and y is not None:
            raise NetworkError("labels were given to a JiT without classes; make it with classes=….")
        c = self.t_embedder(time)
        if self.y_embedder is not None:
            label = self.y_embedder(torch.full_like(time, self.null_label, dtype=torch.int64) if y is None else y)
            c = c + label
        h = (self.x_embedder(self._patches(x)) + self.pos_embed).float()
        for i, block in enumerate(self.blocks):
            if self.in_context_posemb is not None and i == self.in_context_start:
                h = torch.cat([label[:, None] + self.in_context_posemb, h], dim=1)
            joined = i >= self.in_context_start
            rope = self.rope if joined or self.rope is None else self.rope[:, self.in_context :]
            again = self._again and torch.is_grad_enabled()
            h = checkpoint(block, h, c, rope, use_reentrant=False) if again else block(h, c, rope)
        return self._picture(self.final_layer(h[:, self.in_context :], c))

    def checkpoint_activations(self, on: bool = True) -> None:
        """Compute each block again in the backward pass instead of keeping what it computed.

        The numbers stay the same, dropout's too; memory falls, and a step takes about a third longer.
        """
        self._again = on

    def _patches(self, x: Tensor) -> Tensor:
        """[B, N, C·p·p] from pictures, row by row, channel first within a patch."""
        high, wide = self.grid
        p = self.patch
        return x.reshape(len(x), -1, high, p, wide, p).permute(0, 2, 4, 1, 3, 5).reshape(len(x), high * wide, -1)

    def _picture(self, patches: Tensor) -> Tensor:
        """Pictures from [B, N, p·p·C], the patch's row, column, then channel."""
        high, wide = self.grid
        p = self.patch
        cut = patches.reshape(len(patches), high, wide, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        return cut.reshape(len(patches), -1, high * p, wide * p)

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        input_size: int,
        patch_size: int,
        in_channels: int = 3,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        bottleneck_dim: int,
        in_context_len: int,
        in_context_start: int,
        proj_drop: float = 0.0,
    ) -> JiT:
        """The network of published weights; it predicts x0 and wants its time as "1-t".

        Args:
            state_dict: as published; a common prefix such as ``net.`` is taken off.
            The others: the published configuration, under its own names.

        Raises:
            NetworkError: if the weights do not fit the configuration.
        """
        net = cls(
            input_size,
            patch_size,
            in_channels,
            width=hidden_size,
            depth=depth,
            heads=num_heads,
            bottleneck=bottleneck_dim,
            classes=num_classes,
            in_context=in_context_len,
            in_context_start=in_context_start,
            dropout=proj_drop,
        )
        weights = {k: v for k, v in _unprefixed(state_dict).items() if not k.startswith(_OFFICIAL_TABLES)}
        try:
            net.load_state_dict(weights)
        except RuntimeError as e:
            raise NetworkError(f"these weights are not those of a JiT of this configuration: {e}") from e
        return net


def _unprefixed(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without what wrappers have put before all names."""
    weights = dict(state_dict)
    for prefix in ("module.", "_orig_mod.", "net.", "_orig_mod."):
        if weights and all(k.startswith(prefix) for k in weights):
            weights = {k[len(prefix) :]: v for k, v in weights.items()}
    return weights


def _check(config: dict[str, Any]) -> None:
    for name, least in _LEAST.items():
        values = config[name] if name == "image" else [config[name]]
        if any(isinstance(v, bool) or not isinstance(v, int) or v < least for v in values):
            raise NetworkError(f"jit: {name} must be an integer of at least {least}, found {config[name]!r}.")
    if len(config["image"]) != 2:
        raise NetworkError(f"jit: image is a side, or [height, width], found {config['image']}.")
    patch, width, heads = config["patch"], config["width"], config["heads"]
    high, wide = config["image"]
    if high % patch or wide % patch:
        raise NetworkError(
            f"jit: pictures of {high}×{wide} cannot be cut into patches of {patch} pixels; choose a patch that divides "
            f"both sides{_divisors(config['image'])}, or resize the pictures (data.size and data.resize)."
        )
    for name in ("rope", "qk_norm"):
        if not isinstance(config[name], bool):
            raise NetworkError(f"jit: {name} is true or false, found {config[name]!r}.")
    if width % heads or (config["rope"] and (width // heads) % 4):
        raise NetworkError(
            f"jit: width {width} over {heads} heads gives {width / heads:g} features a head; "
            + ("rotary positions need a multiple of 4." if config["rope"] else "choose a number that divides it.")
        )
    if width % 4:
        raise NetworkError(f"jit: the fixed positions need a width that is a multiple of 4, found {width}.")
    if config["in_context"] and not config["classes"]:
        raise NetworkError(f"jit: {config['in_context']} class tokens in context need classes, found classes=0.")
    if config["in_context"] and config["in_context_start"] >= config["depth"]:
        raise NetworkError(
            f"jit: in_context_start must be below the depth ({config['depth']}), found {config['in_context_start']}."
        )
    if not isinstance(config["dropout"], int | float) or not 0 <= config["dropout"] < 1:
        raise NetworkError(f"jit: dropout must be a number in [0, 1), found {config['dropout']!r}.")


_LEAST = {
    "image": 1,
    "patch": 1,
    "channels": 1,
    "width": 4,
    "depth": 1,
    "heads": 1,
    "bottleneck": 0,
    "classes": 0,
    "in_context": 0,
    "in_context_start": 0,
    "outputs": 1,
}


def _divisors(image: Sequence[int]) -> str:
    common = math.gcd(*image)
    found = [d for d in range(2, common + 1) if common % d == 0]
    return f" ({', '.join(map(str, found[-6:]))})" if found else ""


def position_table(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed sine-cosine positions, [N, width]: the column in the first half, the row in the second."""
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    halves = []
    for place in (columns, rows):
        angles = place.flatten()[:, None] * frequencies
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float()


def rotary_table(grid: tuple[int, int], head_dim: int, still: int = 0) -> Tensor:
    """Cosines and signed sines of axial rotary positions, [2, still + N, head_dim].

    The first half of the features turns with the row, the second with the column; the first
    ``still`` tokens are not turned (Su et al., arXiv 2104.09864, in two dimensions).
    """
    d = head_dim // 2
    frequencies = 10000.0 ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = torch.cat([place.flatten()[:, None] * frequencies for place in (rows, columns)], dim=1)
    angles = torch.cat([torch.zeros(still, d, dtype=torch.float64), angles]).repeat_interleave(2, dim=1)
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(d)
    return torch.stack([angles.cos(), angles.sin() * signs]).float()
