"""The Fréchet distance of reparam against the usual way, SciPy's matrix square root, and its memory.

    python benchmarks/frechet.py [--dim 2048] [--repeats 3]

Time: the covariances of 5,000 correlated random vectors each, whose eigenvalues fall as i^−1.3, much
as those of a network's features do: the 1,280 of EfficientNet-Lite0, over 2,000 pictures of CIFAR-10
at 64 pixels, fall from 1 to 5·10⁻⁵. The usual way is the formula of the FID with
scipy.linalg.sqrtm(C1 C2). The two take turns; the figures are medians. Both use all cores;
OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 before the command keeps both to one. Memory: how far
streaming vectors through Moments raises a process's peak.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from reparam.metrics import frechet_distance
from reparam.metrics.frechet import Moments

try:
    from scipy import __version__ as scipy_version
    from scipy.linalg import sqrtm
except ImportError:
    raise SystemExit("this benchmark needs SciPy: pip install scipy, or pip install -e '.[dev]'") from None

BATCH = 1000


def batches(dim: int, n: int, seed: int) -> Iterator[Tensor]:
    """n correlated vectors, a batch at a time; the seed turns, stretches and moves their distribution slightly."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=g))[0]
    g.manual_seed(seed)
    mix = basis + seed * 0.1 / dim**0.5 * torch.randn(dim, dim, generator=g)
    mix *= torch.arange(1, dim + 1)[:, None] ** -0.65
    for start in range(0, n, BATCH):
        yield torch.randn(min(BATCH, n - start), dim, generator=g) @ mix + 0.1 * seed * basis[0]


def gathered(dim: int, n: int, seed: int) -> Moments:
    """The moments of those vectors."""
    moments = Moments(dim)
    for batch in batches(dim, n, seed):
        moments.update(batch)
    return moments


def usual(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """As programs for the FID compute it."""
    root = sqrtm((cov1 @ cov2).numpy()).real
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root.trace())


def seconds(f: Callable[[], float]) -> tuple[float, float]:
    """How long a call takes, and its result."""
    start = time.perf_counter()
    result = f()
    return time.perf_counter() - start, result


def speed(dim: int, repeats: int) -> None:
    """Print the seconds of both, their ratio and how far the results differ."""
    a, b = (gathered(dim, 5000, seed) for seed in (1, 2))
    given = (a.mean, a.cov, b.mean, b.cov)
    frechet_distance(*given)
    times: dict[str, list[float]] = {"usual": [], "reparam": []}
    for _ in range(repeats):
        for who, f in (("usual", usual), ("reparam", frechet_distance)):
            taken, result = seconds(lambda f=f: f(*given))
            times[who].append(taken)
            if who == "usual":
                theirs = result
    theirs_s, ours_s = (statistics.median(t) for t in times.values())
    values = torch.linalg.eigvalsh(a.cov)
    print(f"distance of two Gaussians in {dim:,} dimensions (eigenvalues from 1 to {values[0] / values[-1]:.0e})")
    print(f"  usual {theirs_s:.2f} s, reparam {ours_s:.2f} s: {theirs_s / ours_s:.1f} times as fast")
    print(f"  distance {theirs:.6f}, apart by {abs(result / theirs - 1):.0e} of it")


def peak() -> float:
    """The most memory that this process has held, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held before exec
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


def growth(dim: int, n: int) -> None:
    """Print by how many MiB n vectors in Moments raise the peak; run in a process of its own."""
    stream = batches(dim, n, 1)
    moments = Moments(dim)
    next(stream)
    before = peak()
    for batch in stream:
        moments.update(batch)
    print(peak() - before)


def memory(dim: int) -> None:
    """Print the growth for two numbers of vectors."""
    print(f"memory of Moments over vectors of {dim:,} features, batches of {BATCH:,}")
    for n in (5000, 50_000):
        command = [sys.executable, __file__, "--dim", str(dim), "--growth", str(n)]
        found = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"  {n:,} vectors: {found:.0f} MiB more at the peak (all of them in float64: {n * dim / 2**17:.0f} MiB)")


def main() -> None:
    """Print both sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--growth", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.growth:
        growth(args.dim, args.growth)
        return
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    print(f"{platform.machine()}, {threads}, torch {torch.__version__}, SciPy {scipy_version}")
    speed(args.dim, args.repeats)
    memory(args.dim)


if __name__ == "__main__":
    main()
