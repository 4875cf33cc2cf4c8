"""What is kept of the features of a set: moments, of blocks and of classes too, and some of the features themselves."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError
from ..files import read_tensors, write_tensors
from .extractors import Extractor
from .frechet import Moments
from .sets import SampleSet, spread

#: Pictures that an extractor is given at a time.
BATCH = 256
#: Blocks that samples are dealt to, for intervals.
BLOCKS = 10


@dataclass(frozen=True)
class Statistics:
    """Of the features of a set.

    Attributes:
        moments: of all of them.
        class_means, class_counts: float64 [classes, dim] and int64 [classes]; without labels no classes.
        kept: some of the features, float32 [m, dim]. rows: which, int64 [m], ascending.
        blocks: the moments of each block (:data:`BLOCKS`), where they were asked for.
    """

    moments: Moments
    class_means: Tensor
    class_counts: Tensor
    kept: Tensor
    rows: Tensor
    blocks: tuple[Moments, ...] = ()

    def without(self, part: Statistics, rows: Tensor) -> Statistics:
        """Those of what is left when the rows that ``part`` is of are taken away."""
        counts = self.class_counts - part.class_counts
        sums = self.class_means * self.class_counts[:, None] - part.class_means * part.class_counts[:, None]
        left = ~torch.isin(self.rows, rows)
        return Statistics(
            self.moments.without(part.moments),
            sums / counts.clamp(min=1)[:, None],
            counts,
            self.kept[left],
            self.rows[left],
        )

    def save(self, path: Path, made_of: str) -> None:
        """Write them, and what they were computed of, to a file; blocks are left out."""
        m = self.moments
        tensors = {"mean": m.mean, "scatter": m.scatter, "class_means": self.class_means, "counts": self.class_counts}
        write_tensors(
            path,
            {**tensors, "kept": self.kept, "rows": self.rows},
            {"count": str(m.count), "made_of": made_of},
        )

    @classmethod
    def load(cls, path: Path) -> tuple[Statistics, str]:
        """Those in a file, and what they were computed of.

        Raises:
            SpecError: if it cannot be read.
            KeyError: if it holds something else.
        """
        t, metadata = read_tensors(path)
        moments = Moments.of(int(metadata["count"]), t["mean"], t["scatter"])
        return cls(moments, t["class_means"], t["counts"], t["kept"], t["rows"]), metadata["made_of"]


def statistics_of(
    samples: SampleSet,
    by: Extractor,
    *,
    classes: int = 0,
    keep: int = 0,
    blocks: int = 0,
    ask: Callable[[int], None] = lambda done: None,
) -> Statistics:
    """One pass over a set; where several processes were started to share it, each does its part.

    Args:
        classes: how many there are; 0 without labels.
        keep: at most so many features are kept, evenly spread.
        blocks: how many blocks the samples are dealt to, always in the same way; 0 for none.
        ask: told after each batch how many samples are done.

    Raises:
        DataError: if a feature is NaN or infinite, or there are none.
    """
    if samples.count < 1:
        raise DataError(f"{samples.name} is empty; a score needs samples.")
    rank, world = processes() if samples.count >= processes()[1] else (0, 1)
    low, high = samples.count * rank // world, samples.count * (rank + 1) // world
    wanted = spread(samples.count, keep) if keep else torch.arange(0)
    dealt = _blocks(samples.count, blocks)
    pass_ = _Pass(classes, max(1, blocks))
    for start in range(low, high, BATCH):
        index = torch.arange(start, min(start + BATCH, high))
        x = samples.rows(index)
        labels = samples.labels[index] if classes and samples.labels is not None else None
        pass_.count(by(x), labels, torch.isin(index, wanted), dealt[index])
        ask((start + len(index) - low) * world)
    found = pass_.result(wanted[(wanted >= low) & (wanted < high)], blocks > 0)
    return found if world == 1 else _merged(found, rank, world)


def _blocks(count: int, blocks: int) -> Tensor:
    """The block of each sample: dealt at random, so that classes in turn or sorted do no harm."""
    found = torch.zeros(count, dtype=torch.int64)
    if blocks:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        found[order] = torch.arange(count) % blocks
    return found


class _Pass:
    """What a pass has counted so far."""

    def __init__(self, classes: int, blocks: int) -> None:
        self._classes, self._blocks = classes, blocks
        self._moments: list[Moments] = []
        self._kept: list[Tensor] = []

    def count(self, features: Tensor, labels: Tensor | None, keep: Tensor, block: Tensor) -> None:
        if not self._moments:
            dim = features.shape[1]
            self._moments = [Moments(dim) for _ in range(self._blocks)]
            self._sums = torch.zeros(self._classes, dim, dtype=torch.float64)
            self._counts = torch.zeros(self._classes, dtype=torch.int64)
        for b, moments in enumerate(self._moments):
            if len(part := features[block == b]):
                moments.update(part)
        if labels is not None:
            self._sums.index_add_(0, labels, features.double())
            self._counts += torch.bincount(labels, minlength=self._classes)
        if bool(keep.any()):
            self._kept.append(features[keep].float())

    def result(self, rows: Tensor, in_blocks: bool) -> Statistics:
        first, *others = self._moments
        whole = Moments.of(first.count, first.mean.clone(), first.scatter.clone())
        for moments in others:
            whole.merge(moments)
        means = self._sums / self._counts.clamp(min=1)[:, None]
        kept = torch.cat(self._kept) if self._kept else torch.zeros(0, whole.dim)
        return Statistics(whole, means, self._counts, kept, rows, tuple(self._moments) if in_blocks else ())


def processes() -> tuple[int, int]:
    """The number of this process and how many there are, where torchrun started several."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), world) if world > 1 and _joined() else (0, 1)


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _merged(own: Statistics, rank: int, world: int) -> Statistics:
    """Those of all processes' parts together, merged in the order of the processes by each of them."""
    parts = [_passed_on(own if source == rank else None, source, own) for source in range(world)]
    whole = parts[0]
    for part in parts[1:]:
        counts = whole.class_counts + part.class_counts
        sums = whole.class_means * whole.class_counts[:, None] + part.class_means * part.class_counts[:, None]
        blocks = [_sum(a, b) for a, b in zip(whole.blocks, part.blocks, strict=True)]
        whole = replace(
            whole,
            moments=_sum(whole.moments, part.moments),
            class_means=sums / counts.clamp(min=1)[:, None],
            class_counts=counts,
            kept=torch.cat([whole.kept, part.kept]),
            rows=torch.cat([whole.rows, part.rows]),
            blocks=tuple(blocks),
        )
    return whole


def _sum(a: Moments, b: Moments) -> Moments:
    found = Moments.of(a.count, a.mean.clone(), a.scatter.clone())
    found.merge(b)
    return found


def _passed_on(own: Statistics | None, source: int, like: Statistics) -> Statistics:
    """One process's statistics, as every process gets them."""
    numbers = torch.zeros(2 + len(like.blocks), dtype=torch.int64)
    if own is not None:
        numbers = torch.tensor([own.moments.count, len(own.kept), *(m.count for m in own.blocks)])
    torch.distributed.broadcast(numbers, source)
    count, kept, *counts = numbers.tolist()
    dim, classes = like.moments.dim, len(like.class_counts)

    def tensor(value: Callable[[Statistics], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        found = torch.empty(shape, dtype=dtype) if own is None else value(own).contiguous()
        torch.distributed.broadcast(found, source)
        return found

    def moments(n: int, value: Callable[[Statistics], Moments]) -> Moments:
        mean = tensor(lambda s: value(s).mean, (dim,), torch.float64)
        return Moments.of(n, mean, tensor(lambda s: value(s).scatter, (dim, dim), torch.float64))

    return Statistics(
        moments(count, lambda s: s.moments),
        tensor(lambda s: s.class_means, (classes, dim), torch.float64),
        tensor(lambda s: s.class_counts, (classes,), torch.int64),
        tensor(lambda s: s.kept, (kept, dim), torch.float32),
        tensor(lambda s: s.rows, (kept,), torch.int64),
        tuple(moments(n, lambda s, b=b: s.blocks[b]) for b, n in enumerate(counts)),  # type: ignore[misc]
    )
