"""Sets of samples: in memory, or read from disk as they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..data import Data
    from ..data.streams import Stream


@dataclass(frozen=True)
class SampleSet:
    """Samples as data are stored: pictures as bytes, anything else in the units that a network sees.

    Attributes:
        name: what to call it.
        count: how many there are. shape: of one.
        rows: the samples of some indices, int64 [n], shape [n, …].
        labels: their classes, int64 [count], or None.
        remarks: what a reader must know of how they were read.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    rows: Callable[[Tensor], Tensor]
    labels: Tensor | None = None
    remarks: tuple[str, ...] = ()

    @classmethod
    def held(cls, x: Tensor, labels: Tensor | None = None, name: str = "samples") -> SampleSet:
        """Samples in memory, shape [count, …]."""
        return cls(name, len(x), tuple(x.shape[1:]), lambda index: x[index], labels)

    @classmethod
    def read(cls, stream: Stream, name: str) -> SampleSet:
        """Pictures that are read from disk."""
        return cls(name, stream.count, tuple(stream.shape), stream.read, stream.labels)

    @classmethod
    def training(cls, data: Data, count: int) -> SampleSet:
        """At most ``count`` of what a data set's training draws from."""
        if data.stream is not None and count > len(data.train):
            return cls.read(data.stream, data.name).spread(count)
        labels = None if data.labels is None else data.labels[:count]
        return cls.held(data.train[:count], labels, data.name)

    def only(self, index: Tensor) -> SampleSet:
        """Those of these indices, int64 [n], in that order."""
        labels = None if self.labels is None else self.labels[index]
        return SampleSet(self.name, len(index), self.shape, lambda rows: self.rows(index[rows]), labels)

    def spread(self, most: int) -> SampleSet:
        """All of them, or ``most`` evenly spread over their order."""
        return self if self.count <= most else self.only(spread(self.count, most))

    def all(self) -> Tensor:
        """All of them in memory, shape [count, …]."""
        return self.rows(torch.arange(self.count))


def spread(count: int, most: int) -> Tensor:
    """At most ``most`` of the numbers 0 … count − 1, evenly spread; int64."""
    n = min(count, most)
    return torch.arange(n) * count // n


def hashes(x: Tensor) -> list[bytes]:
    """A hash of each row of ``x`` [n, …]."""
    return [hashlib.blake2b(row.contiguous().numpy().data, digest_size=16).digest() for row in x]
