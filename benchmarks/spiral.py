"""The `spiral` study against the loop that anyone would write, side by side in one run.

    python benchmarks/spiral.py [--dims 2 8 16 512] [--seeds 1] [--steps 2000]

Plain: one float32 loop a target with torch.optim.Adam, all cores for one run at a time.
Ours: `reparam study spiral` with the same network, steps, batch, learning rate, loss and
sampler, as one whole process: start, estimate, validation, metrics and report included; the
time of plain PyTorch leaves its metrics out. With several seeds the two take turns, and the
table shows how much the metrics vary by chance.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from reparam.data import load_data
from reparam.metrics import METRICS
from reparam.studies.recipe import load_recipe

TARGETS = ("x0", "velocity", "eps")
NAMES = ("off_manifold", "manifold_distance", "sliced_wasserstein")
Scores = dict[tuple[str, str], list[float]]


def plain(target: str, x: Tensor, steps: int, batch: int, lr: float, seed: int, n: int) -> Tensor:
    """Train on rectified flow with the velocity loss, and draw n samples by Heun in 50 steps."""
    torch.manual_seed(seed)
    dim, h, last = x.shape[1], 256, 0.98 if target == "eps" else 1.0
    widths = [dim + 1, h, h, h, h, dim]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    net = nn.Sequential(*layers[:-1])
    optimiser = torch.optim.Adam(net.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        y = net(torch.cat([x_t, t], 1))
        if target == "x0":
            return (x_t - y) / t
        return (y - x_t) / (1 - t) if target == "eps" else y

    for _ in range(steps):
        x0 = x[torch.randint(len(x), (batch,))]
        t = torch.sigmoid(torch.randn(batch, 1)).clamp(1e-4, last)
        eps = torch.randn_like(x0)
        loss = (velocity((1 - t) * x0 + t * eps, t) - (eps - x0)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        scheduler.step()
    with torch.no_grad():
        x_t, grid = last * torch.randn(n, dim), torch.linspace(last, 0, 51)
        for i in range(50):
            t, s = grid[i].expand(n, 1), grid[i + 1].expand(n, 1)
            u = velocity(x_t, t)
            guess = x_t + (s - t) * u
            x_t = guess if i == 49 else x_t + (s - t) / 2 * (u + velocity(guess, s))
    return x_t


def ours(dims: list[int], seed: int, steps: int) -> tuple[float, Scores]:
    """Seconds of the whole command, and the metrics by data and target."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"data.dim={dims}", f"seed={seed}", f"train.steps={steps}"]
        words = [w for s in settings for w in ("--set", s)]
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "reparam.cli", "study", "spiral", "--out", f"{folder}/s", *words],
            check=True,
            capture_output=True,
        )
        seconds = time.perf_counter() - start
        rows = json.loads(Path(folder, "s", "leaderboard.json").read_text())
    return seconds, {(r["data"], str(r["target"])): [m["value"] for m in r["metrics"].values()] for r in rows}


def theirs(dims: list[int], seed: int, steps: int) -> tuple[float, Scores]:
    """The same by plain PyTorch, in this process."""
    train = next(iter(load_recipe("spiral").runs.values())).train
    seconds, scores = 0.0, {}
    for dim in dims:
        data = load_data({"name": "spiral", "dim": dim})
        for target in TARGETS:
            start = time.perf_counter()
            x = plain(target, data.train, steps, train.batch, train.lr, seed, 2048)
            seconds += time.perf_counter() - start
            scores[data.name, target] = [METRICS[name].compute(x, data) for name in NAMES]
    return seconds, scores


def main() -> None:
    """Run both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 8, 16, 512])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    batch = next(iter(load_recipe("spiral").runs.values())).train.batch
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {args.steps} steps of {batch}")
    found: dict[str, list[tuple[float, Scores]]] = {"plain": [], "reparam": []}
    for seed in range(args.seeds):
        for who, run in (("plain", theirs), ("reparam", ours)):
            found[who].append(run(args.dims, seed, args.steps))
            print(f"seed {seed}, {who}: {found[who][-1][0]:.1f} s", flush=True)
    print(f"\n{'data':14}{'target':10}{'':9}" + "".join(f"{name:>22}" for name in NAMES))
    for data, target in found["plain"][0][1]:
        for who, runs in found.items():
            values = zip(*(scores[data, target] for _, scores in runs), strict=True)
            shown = (" … ".join(dict.fromkeys(f"{v:.3g}" for v in (min(vs), max(vs)))) for vs in values)
            print(f"{data:14}{target:10}{who:9}" + "".join(f"{v:>22}" for v in shown))
    total = {who: sum(seconds for seconds, _ in runs) for who, runs in found.items()}
    ratio = total["plain"] / total["reparam"]
    print(f"\ntotal: plain {total['plain']:.1f} s, reparam {total['reparam']:.1f} s: {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
