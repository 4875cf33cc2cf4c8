"""Random draws that are a pure function of (seed, step, index in the batch).

Runs that differ only in their target therefore see the same x0, t and ε, and a resumed run
needs no saved generator state. Numbers are drawn in groups of samples, each group from generators of its
own seed, so that any number of processes may each draw its part of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.order import Order, mix
from ..times import open_uniform

#: Samples whose noise is drawn from one generator, at most; and numbers that the noise of a group has, at most.
_GROUP, _NUMBERS = 256, 2**20
#: Samples whose unit noise is drawn from one generator, for sampling.
_SAMPLES = 32


@dataclass(frozen=True)
class Batch:
    """What one step of training draws, for one part of the batch.

    Attributes:
        index: which samples of the data, int64, shape [b].
        u: a uniform number in (0, 1) for every sample of the *whole* batch, from which the objective takes
            its times; float64, shape [B].
        eps: standard normal noise, shape [b, …].
        coins: two more uniform numbers a sample, whether to mirror a picture and whether to
            drop its label; float32, shape [2, b].
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
        order: which sample is drawn at which position of training; or the number of samples, of which every
            epoch then goes through all in an order of its own.
        shape: of one sample.
        device: where noise is drawn. Each kind of device has its own numbers.
        part: the samples of the batch that are drawn, from … to; all by default.
    """

    def __init__(
        self,
        seed: int,
        batch: int,
        order: Order | int,
        shape: tuple[int, ...],
        device: torch.device | str = "cpu",
        part: tuple[int, int] | None = None,
    ) -> None:
        self.seed, self.batch = seed, batch
        self.order = Order(seed, order) if isinstance(order, int) else order
        self.start, self.stop = part or (0, batch)
        self.group = group_size(shape)
        first, last = self.start // self.group, -(-self.stop // self.group)
        self._mine = range(first, last)
        self._eps = torch.empty((len(self._mine) * self.group, *shape), device=device)
        self._noise = torch.Generator(device)
        self._numbers = self._noise if self._noise.device.type == "cpu" else torch.Generator()

    def __call__(self, step: int) -> Batch:
        """The draws of one step; the noise is overwritten by the next call."""
        u, coins, noise = [], [], iter(self._eps.split(self.group))
        for group in range(-(-self.batch // self.group)):
            seed = mix(self.seed, step, group)
            self._numbers.manual_seed(seed)
            u.append(open_uniform(self.group, self._numbers))
            if group in self._mine:
                if self._noise is not self._numbers:
                    self._noise.manual_seed(seed)
                next(noise)[: self._needed(group)].normal_(generator=self._noise)
            self._numbers.manual_seed(mix(seed, 0xC0))
            coins.append(torch.rand(2, self.group, generator=self._numbers))
        mine, begun = slice(self.start, self.stop), self._mine.start * self.group
        eps = self._eps[self.start - begun : self.stop - begun]
        return Batch(self.index(step), torch.cat(u)[: self.batch], eps, torch.cat(coins, dim=1)[:, mine])

    def _needed(self, group: int) -> int:
        """How many samples' noise is drawn of a group: whatever the part, those of the batch, and up to a multiple of
        the 16 numbers that torch draws at a time, so that a larger batch begins with the same ones."""
        left = self.batch - group * self.group
        return min(self.group, -(-left // 16) * 16)

    def index(self, step: int) -> Tensor:
        """Which samples the part of a step's batch is made of; int64, shape [b]."""
        return self.order(step * self.batch + torch.arange(self.start, self.stop))


def group_size(shape: tuple[int, ...]) -> int:
    """How many samples' draws come from one generator: a power of two, the smaller the larger they are."""
    most = max(8, min(_GROUP, _NUMBERS // max(1, math.prod(shape))))
    return 1 << (most.bit_length() - 1)


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


def step_noise(
    seed: int, step: int, start: int, stop: int, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Tensor:
    """Unit noise that a sampler draws at one of its steps for the samples start … stop − 1 of a seed.

    A pure function of (seed, step, number of the sample), drawn in fixed groups of samples as training's noise is, so
    that neither the batch nor the number of processes changes a bit of it. Each kind of device has its own numbers.

    Args:
        step: the how-manieth noise of the walk this is, from 0.
        shape: of one sample.
        device: where it is drawn.

    Returns:
        Noise of shape [stop − start, …], on the device.
    """
    group, generator = min(_SAMPLES, group_size(shape)), torch.Generator(device)
    first, last = start // group, -(-stop // group)
    noise = torch.empty((last - first) * group, *shape, device=device)
    for number, part in enumerate(noise.split(group), first):
        generator.manual_seed(mix(seed, step, number, 0x5A6))
        part.normal_(generator=generator)
    return noise[start - first * group : stop - first * group]
