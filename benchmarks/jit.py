"""Training steps of JiT against a plain eager implementation of it, side by side in one process.

    python benchmarks/jit.py [--steps 20] [--threads 2] [--device cpu] [--bf16]

Plain: tests/plain_jit.py, step by step in PyTorch: separate q, k and v, softmax(q kᵀ) v written
out, norms and modulation by their formulas. Ours: reparam.networks.jit. A step is forward, mean
squared error, backward and AdamW; weights, data and optimiser are equal, and so are the losses
after all steps. The two take turns, step by step; the figures are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from reparam.networks.jit import JiT

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from plain_jit import PlainJiT, randomise

#: Name, picture side, patch and batch. The first is the network of the CIFAR-10 recipe.
CASES = (("4 tokens", 32, 16, 128), ("256 tokens", 64, 4, 8))
Batch = tuple[Tensor, Tensor, Tensor]


def networks(image: int, patch: int, device: str) -> dict[str, nn.Module]:
    """Both, with the same random weights."""
    plain = PlainJiT(image, patch, 3, 192, 6, 6, 0, 96)
    ours = JiT(image, patch, 3, width=192, depth=6, heads=6, bottleneck=96)
    randomise(plain)
    ours.load_state_dict(plain.state_dict())
    return {"plain": plain.to(device), "reparam": ours.to(device)}


def step_of(net: nn.Module, device: str, bf16: bool) -> Callable[[Batch], tuple[float, float]]:
    """A function from a batch to the loss and the seconds of one training step."""
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    synchronise = torch.cuda.synchronize if device.startswith("cuda") else contextlib.nullcontext

    def step(batch: Batch) -> tuple[float, float]:
        x, time_, target = batch
        synchronise()
        start = time.perf_counter()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            out = net(x, time_)
        loss = (out.float() - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        synchronise()
        return loss.item(), time.perf_counter() - start

    return step


def measure(image: int, patch: int, size: int, steps: int, device: str, bf16: bool) -> dict[str, float]:
    """Median seconds a step of both.

    Raises:
        SystemExit: if the losses of the two part.
    """
    step = {who: step_of(net, device, bf16) for who, net in networks(image, patch, device).items()}
    seconds: dict[str, list[float]] = {who: [] for who in step}
    generator = torch.Generator().manual_seed(1)
    for i in range(-3, steps):  # the first three are not counted
        x, target = torch.randn(2, size, 3, image, image, generator=generator).to(device)
        batch = (x, torch.rand(size, generator=generator).to(device), target)
        losses = {}
        for who in reversed(step) if i % 2 else step:
            losses[who], taken = step[who](batch)
            if i >= 0:
                seconds[who].append(taken)
        part = abs(losses["reparam"] / losses["plain"] - 1)
        if not part < (1e-2 if bf16 else 1e-4):
            raise SystemExit(f"the losses part at step {i + 3}: {losses}")
    print(f"  after {steps + 3} steps the losses differ by a factor of 1 ± {part:.0e} (both {losses['plain']:.5f})")
    return {who: statistics.median(taken) for who, taken in seconds.items()}


def main() -> None:
    """Measure both cases and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, help="of the CPU; all cores unless given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="both sides under bfloat16 autocast")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    precision = "bf16 autocast" if args.bf16 else "float32"
    where = f"{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    if args.device.startswith("cuda"):
        where = torch.cuda.get_device_name(args.device)
    print(f"{where}, torch {torch.__version__}, {precision}, {args.steps} steps")
    for name, image, patch, size in CASES:
        print(f"{name}: pictures {image}×{image}, patch {patch}, batch {size}, width 192, depth 6, heads 6")
        taken = measure(image, patch, size, args.steps, args.device, args.bf16)
        ratio = taken["plain"] / taken["reparam"]
        shown = ", ".join(f"{who} {1e3 * s:.1f} ms" for who, s in taken.items())
        print(f"  a step: {shown}: {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
