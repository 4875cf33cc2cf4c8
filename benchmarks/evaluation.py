"""What evaluating costs: the Fréchet distance, the moments it needs, and features of pictures.

    python benchmarks/evaluation.py [distance] [moments] [extract] [--dim 2048] [--repeats 3] [--data FILE] [--limit N]

distance: of the covariances of 5,000 correlated random vectors each, whose eigenvalues fall as i^−1.3, much
as those of a network's features do: the 1,280 of EfficientNet-Lite0, over 2,000 pictures of CIFAR-10 at 64
pixels, fall from 1 to 5·10⁻⁵. Against the formula of the FID with scipy.linalg.sqrtm(C1 C2).

moments: mean and covariance of 50,000 float32 vectors through Moments, in batches of 256 and of 1,000, against
numpy.cov of the same in float64. Each runs in a process of its own; the vectors lie in a file that is mapped
into memory, and read once before. Memory is how far the process's peak rises from there.

extract: the offline extractor's features of pictures of CIFAR-10, in batches of 256.

Rivals take turns; the figures are medians. All use all cores; OMP_NUM_THREADS=1 before the command keeps
them to one. Sections that are not named are run too if none is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reparam.data import load_data
from reparam.metrics import Moments, extractor, frechet_distance

VECTORS = 50_000
BATCH = 1000
WAYS = {"numpy.cov": 0, "Moments, batches of 256": 256, "Moments, batches of 1,000": 1000}
CIFAR10 = Path(__file__).parents[2] / "shared/data/cifar10/train.parquet"


def batches(dim: int, n: int, seed: int) -> list[Tensor]:
    """n correlated vectors in batches; the seed turns, stretches and moves their distribution slightly."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=g))[0]
    g.manual_seed(seed)
    mix = basis + seed * 0.1 / dim**0.5 * torch.randn(dim, dim, generator=g)
    mix *= torch.arange(1, dim + 1)[:, None] ** -0.65
    return [
        torch.randn(min(BATCH, n - start), dim, generator=g) @ mix + 0.1 * seed * basis[0]
        for start in range(0, n, BATCH)
    ]


def gathered(dim: int, n: int, seed: int) -> Moments:
    """The moments of those vectors."""
    moments = Moments(dim)
    for batch in batches(dim, n, seed):
        moments.update(batch)
    return moments


def usual(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """As programs for the FID compute it."""
    from scipy.linalg import sqrtm

    root = sqrtm((cov1 @ cov2).numpy()).real
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root.trace())


def seconds(f: Callable[[], float]) -> tuple[float, float]:
    """How long a call takes, and its result."""
    start = time.perf_counter()
    result = f()
    return time.perf_counter() - start, result


def distance(args: argparse.Namespace) -> None:
    """Print the seconds of both, their ratio and how far the results differ."""
    a, b = (gathered(args.dim, 5000, seed) for seed in (1, 2))
    given = (a.mean, a.cov, b.mean, b.cov)
    frechet_distance(*given)
    times: dict[str, list[float]] = {"usual": [], "reparam": []}
    for _ in range(args.repeats):
        for who, f in (("usual", usual), ("reparam", frechet_distance)):
            taken, result = seconds(lambda f=f: f(*given))
            times[who].append(taken)
            if who == "usual":
                theirs = result
    theirs_s, ours_s = (statistics.median(t) for t in times.values())
    values = torch.linalg.eigvalsh(a.cov)
    print(f"distance of two Gaussians in {args.dim:,} dimensions (eigenvalues from 1 to {values[0] / values[-1]:.0e})")
    print(f"  usual {theirs_s:.2f} s, reparam {ours_s:.2f} s: {theirs_s / ours_s:.1f} times as fast")
    print(f"  distance {theirs:.6f}, apart by {abs(result / theirs - 1):.0e} of it")


def moments(args: argparse.Namespace) -> None:
    """Print seconds and MiB of each way, and what they are of numpy.cov's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.npy"
        file = np.lib.format.open_memmap(path, "w+", np.float32, (VECTORS, args.dim))
        rows = np.random.default_rng(0)
        for start in range(0, VECTORS, BATCH):
            file[start : start + BATCH] = 5 + rows.standard_normal((BATCH, args.dim), dtype=np.float32)
        del file
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
        for _ in range(args.repeats):
            for name in WAYS:
                command = [sys.executable, __file__, "--one", name, "--vectors", str(path)]
                found[name].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
        covs = {name: np.load(path.with_name(f"{name}.npy")) for name in WAYS}
    print(f"moments of {VECTORS:,} vectors of {args.dim:,} features")
    theirs = [statistics.median(v) for v in zip(*found["numpy.cov"], strict=True)]
    for name, each in found.items():
        took, memory = (statistics.median(v) for v in zip(*each, strict=True))
        apart = np.linalg.norm(covs[name] - covs["numpy.cov"]) / np.linalg.norm(covs["numpy.cov"])
        print(
            f"  {name}: {took:.2f} s ({took / theirs[0]:.2f} of it), {memory:.0f} MiB more at the peak "
            f"({memory / theirs[1]:.2f} of it), covariance apart by {apart:.0e} of its norm"
        )


def one(name: str, path: Path) -> None:
    """Print seconds and MiB of one way, and leave the covariance beside the vectors; run in a process of its own."""
    vectors = np.load(path, mmap_mode="c")
    vectors.max()  # from here on all of them count as held
    before = peak()
    start = time.perf_counter()
    if size := WAYS[name]:
        ours = Moments(vectors.shape[1])
        for batch in torch.from_numpy(vectors).split(size):
            ours.update(batch)
        cov = ours.cov.numpy()
    else:
        cov = np.cov(vectors, rowvar=False, dtype=np.float64)
    took = time.perf_counter() - start
    print(json.dumps([took, peak() - before]))
    np.save(path.with_name(f"{name}.npy"), cov)


def peak() -> float:
    """The most memory that this process has held, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held before exec
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


def extract(args: argparse.Namespace) -> None:
    """Print the seconds that features of pictures take."""
    path = args.data or CIFAR10
    if not path.exists():
        print(f"extract: no pictures at {path}; give a parquet of CIFAR-10 with --data.")
        return
    pictures = load_data({"name": "images", "path": str(path), "limit": args.limit}).train[: args.limit]
    network = extractor(args.extractor)
    network(pictures[:8])
    start = time.perf_counter()
    for batch in pictures.split(256):
        dim = network(batch).shape[1]
    took = time.perf_counter() - start
    per = took / len(pictures) * 1000
    print(f"{dim:,} features of {len(pictures):,} pictures by {network.name}")
    print(f"  {took:.1f} s, {per:.1f} ms a picture: 10,000 in {10 * per:.0f} s")


SECTIONS = {"distance": distance, "moments": moments, "extract": extract}


def main() -> None:
    """Print the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, help="a parquet of pictures")
    parser.add_argument("--limit", type=int, default=10_000, help="how many pictures")
    parser.add_argument("--extractor", default="efficientnet_lite0")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--vectors", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one, args.vectors)
        return
    if unknown := [name for name in args.sections if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}; known: {', '.join(SECTIONS)}")
    import scipy

    versions = f"torch {torch.__version__}, numpy {np.__version__}, SciPy {scipy.__version__}"
    print(f"{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {versions}")
    for name in args.sections or SECTIONS:
        print(f"load average {os.getloadavg()[0]:.2f} over the last minute")
        SECTIONS[name](args)


if __name__ == "__main__":
    main()
