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
#: Samples whose noise is drawn from one generator.
_SAMPLES = 32
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
        coins: two more uniform numbers a sample, whether to mirror a picture and whether to
            drop its label; float32, shape [2, B].
    """

    index: Tensor
    u: Tensor
    eps: Tensor
    coins: Tensor


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
        u, coins = [], []
        for group, eps in enumerate(self._eps.split(GROUP)):
            self._generator.manual_seed(mix(self.seed, step, group))
            u.append(open_uniform(GROUP, self._generator).cpu())
            eps.normal_(generator=self._generator)
            coins.append(torch.rand(2, GROUP, generator=self._generator, device=self._generator.device).cpu())
        b = self.batch
        return Batch(self._index(step), torch.cat(u)[:b], self._eps[:b], torch.cat(coins, dim=1)[:, :b])

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


def unit_noise(seed: int, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
    """Unit noise of the samples start … stop − 1 of a seed, shape [stop − start, …], on the CPU.

    What a sample starts from does not depend on how many others are drawn, or how many at a time.
    """
    generator, parts = torch.Generator(), []
    for group in range(start // _SAMPLES, -(-stop // _SAMPLES)):
        generator.manual_seed(mix(seed, group, 0x5A3))
        parts.append(torch.randn(_SAMPLES, *shape, generator=generator))
    first = start // _SAMPLES * _SAMPLES
    return torch.cat(parts)[start - first : stop - first]
