"""What every step trains on, on the device, ready when it is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import Data
from ..data.order import Order
from ..data.prefetch import Prefetcher
from ..errors import DataError
from .draws import Draws

#: The share of a GPU's free memory that a data set may take.
_SHARE = 0.25


class Samples(NamedTuple):
    """A part of a batch: clean samples, noise, uniform numbers for the times, labels, standard deviations.

    Attributes:
        x0, eps: shape [b, …]. u: of the whole batch, float64, shape [B]. y: int64, shape [b], or None.
        spread: of data that are Gaussian around x0, shape [b, …], or None.
    """

    x0: Tensor
    eps: Tensor
    u: Tensor
    y: Tensor | None
    spread: Tensor | None


@dataclass
class _Stored:
    """Samples as they are stored, their labels and standard deviations, before they are normalised."""

    x: Tensor
    y: Tensor | None
    spread: Tensor | None

    def to(self, device: torch.device) -> _Stored:
        return _Stored(_moved(self.x, device), *(v if v is None else _moved(v, device) for v in (self.y, self.spread)))


class Batches:
    """The samples of every step of a training: a pure function of (seed, step).

    Data that fit are kept on the device; others are read a few steps ahead, in the background.

    Args:
        data: what to train on.
        batch: samples a step. part: those of them that are this process's, from … to.
        seed: of the draws. steps: how many there are.
        conditional: whether labels are wanted, ``label_drop`` of them replaced by "no label".
        device: where.

    Raises:
        DataError: if labels are wanted and there are none.
    """

    def __init__(
        self,
        data: Data,
        batch: int,
        part: tuple[int, int],
        *,
        seed: int,
        steps: int,
        conditional: bool,
        label_drop: float,
        device: torch.device,
    ) -> None:
        if conditional and data.labels is None:
            raise DataError(f"{data.name} has no labels; a conditional run needs them.")
        self.data, self.conditional, self.label_drop, self.device = data, conditional, label_drop, device
        order = Order(seed, data.count, data.blocks, data.window)
        self.draws = Draws(seed, batch, order, data.shape, device, part)
        self.cached = data.stream is None and _fits(data, device)
        if self.cached:
            self._samples = data.train.to(device)
            self._spread = None if data.spread is None else data.spread.to(device)
            self._labels = data.labels.to(device) if conditional and data.labels is not None else None
        else:
            self._ahead = Prefetcher(self._load, stop=steps)

    def __call__(self, step: int) -> Samples:
        """This process's part of a step's batch; the noise is overwritten by the next call.

        Raises:
            DataError: if a picture that is read now cannot be used.
        """
        drawn = self.draws(step)
        if self.cached:
            at = drawn.index.to(self.device)
            stored = _Stored(self._samples[at], _at(self._labels, at), _at(self._spread, at))
        else:
            stored = self._ahead(step).to(self.device)
        mirrored, dropped = drawn.coins
        x = stored.x
        if self.data.flip:
            x = torch.where((mirrored.to(self.device) < 0.5)[:, None, None, None], x.flip(-1), x)
        y = None
        if self.conditional and stored.y is not None:
            y = stored.y.masked_fill(dropped.to(self.device) < self.label_drop, len(self.data.classes))
        return Samples(self.data.normalised(x), drawn.eps, drawn.u, y, stored.spread)

    def _load(self, step: int) -> _Stored:
        index = self.draws.index(step)
        return _Stored(*self.data.batch(index), _at(self.data.spread, index))

    def close(self) -> None:
        """Stop reading ahead."""
        if not self.cached:
            self._ahead.close()


def _at(values: Tensor | None, index: Tensor) -> Tensor | None:
    return None if values is None else values[index]


def _moved(value: Tensor, device: torch.device) -> Tensor:
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def _fits(data: Data, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    size = data.train.nbytes + (0 if data.spread is None else data.spread.nbytes)
    return size <= _SHARE * torch.cuda.mem_get_info(device)[0]
