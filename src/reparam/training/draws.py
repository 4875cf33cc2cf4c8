"""Random draws that are a pure function of (seed, step, index in the batch).

Runs that differ only in their target therefore see the same x0, t and ε, and a resumed run
needs no saved generator state. Numbers are drawn in groups of :data:`GROUP` samples, each
group from a generator of its own seed, so that a process may draw any part of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..times import open_uniform

GROUP = 256
_MASK = 2**64 - 1


def mix(*parts: int) -> int:
    """A well-spread 32-bit seed from integers (SplitMix64's finaliser over each in turn).

    32 bits, because that is all torch's CPU generator takes of a seed.
    """
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 32


@dataclass(frozen=True)
class Batch:
    """What one step of training draws.

    Attributes:
        index: which samples of the data, int64, shape [B].
        u: a uniform number in (0, 1) a sample, from which the objective takes its time; float64.
        eps: standard normal noise, shape [B, …].
    """

    index: Tensor
    u: Tensor
    eps: Tensor


class Draws:
    """The draws of a training run.

    Args:
        seed: of the run.
        batch: samples a step.
        count: samples in the data; every epoch goes through them once, in an order of its own.
        shape: of one sample.
        device: where noise is drawn. Each kind of device has its own numbers.
    """

    def __init__(
        self, seed: int, batch: int, count: int, shape: tuple[int, ...], device: torch.device | str = "cpu"
    ) -> None:
        self.seed, self.batch, self.count = seed, batch, count
        groups = -(-batch // GROUP)
        self._eps = torch.empty((groups * GROUP, *shape), device=device)
        self._generator = torch.Generator(device)
        self._orders: dict[int, Tensor] = {}

    def __call__(self, step: int) -> Batch:
        """The draws of one step; the noise is overwritten by the next call."""
        u = []
        for group, eps in enumerate(self._eps.split(GROUP)):
            self._generator.manual_seed(mix(self.seed, step, group))
            u.append(open_uniform(GROUP, self._generator).cpu())
            eps.normal_(generator=self._generator)
        return Batch(self._index(step), torch.cat(u)[: self.batch], self._eps[: self.batch])

    def _index(self, step: int) -> Tensor:
        position = step * self.batch + torch.arange(self.batch)
        epochs = position // self.count
        first, last = int(epochs[0]), int(epochs[-1])
        self._orders = {e: self._order(e) for e in range(first, last + 1)}
        return torch.cat([self._orders[e][position[epochs == e] % self.count] for e in range(first, last + 1)])

    def _order(self, epoch: int) -> Tensor:
        if epoch in self._orders:
            return self._orders[epoch]
        generator = torch.Generator().manual_seed(mix(self.seed, epoch, 0x5EED))
        return torch.randperm(self.count, generator=generator)
