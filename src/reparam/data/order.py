"""Which samples train, and in which order: pure functions of a seed."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DataError

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


def permutation(count: int, seed: int) -> Tensor:
    """The numbers 0 … count − 1 in an order of the seed's, int64, shape [count]."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def split(total: int, holdout: float, seed: int) -> tuple[Tensor, Tensor]:
    """The indices to train on and those held out, in an order of the seed's.

    Raises:
        DataError: if ``holdout`` is no share between 0 and 1, or leaves fewer than two of either. A share of 0 holds
            nothing out and keeps the order.
    """
    if holdout == 0:
        return torch.arange(total), torch.arange(0)
    count = held_out(total, holdout)
    order = permutation(total, seed)
    return order[count:], order[:count]


def held_out(total: int, holdout: float) -> int:
    """How many of ``total`` samples are held out, or the errors of :func:`split`."""
    if not 0 < holdout < 1:
        raise DataError(f"holdout is the share kept from training, between 0 and 1, found {holdout!r}.")
    count = round(total * holdout)
    if count < 2 or total - count < 2:
        raise DataError(
            f"found {total} samples; with holdout={holdout:g} that leaves {total - count} to train on and "
            f"{count} held out, and each needs at least 2. Choose another share: --set data.holdout=0.3."
        )
    return count


def samples_of(blocks: Tensor, sizes: Tensor) -> Tensor:
    """The samples in some of the consecutive blocks of these sizes, block after block; int64."""
    many = sizes[blocks]
    samples = torch.arange(int(many.sum())) - torch.repeat_interleave(many.cumsum(0) - many, many)
    return samples + torch.repeat_interleave((sizes.cumsum(0) - sizes)[blocks], many)


class Order:
    """Which sample is drawn at which position of training: every epoch goes once through all, in an order of its own.

    A pure function of (seed, position), so that a resumed run needs no saved state and any process can
    find out its part of a batch. Samples that are read together (a row group of a Parquet file) should
    be drawn near each other: with ``blocks``, every epoch puts the blocks in an order of its own, cuts it
    into windows of about ``window`` samples, and permutes the samples of each window. Then what is being
    drawn lies in the blocks of one window, or of two where a batch crosses their border.

    Args:
        seed: of the run.
        count: how many samples there are.
        blocks: the sizes of consecutive blocks; they add up to ``count``. None permutes all samples.
        window: about how many samples are permuted at once: at most these and the largest block's. Not
            more samples than that are permuted as if there were no blocks.

    Raises:
        ValueError: if the sizes do not add up.
    """

    def __init__(self, seed: int, count: int, blocks: Sequence[int] | None = None, window: int = 65_536) -> None:
        if blocks is not None and sum(blocks) != count:
            raise ValueError(f"the blocks hold {sum(blocks)} samples, expected {count}.")
        self.seed, self.count, self.window = seed, count, window
        self._sizes = None if blocks is None or count <= window else torch.tensor(blocks)
        # This epoch and the next, this window and the next.
        self._epoch = functools.lru_cache(2)(self._ordered_epoch)
        self._plan = functools.lru_cache(2)(self._planned_epoch)
        self._window = functools.lru_cache(2)(self._ordered_window)

    def __call__(self, position: Tensor) -> Tensor:
        """The samples at these positions of training, counted from its start: int64, the same shape."""
        epoch, within = position // self.count, position % self.count
        index = torch.empty_like(position)
        for e in epoch.unique().tolist():
            now = epoch == e
            index[now] = self._epoch(e)[within[now]] if self._sizes is None else self._windowed(e, within[now])
        return index

    def _windowed(self, epoch: int, within: Tensor) -> Tensor:
        ends = self._plan(epoch)[1]
        window = torch.searchsorted(ends, within, right=True)
        index = torch.empty_like(within)
        for w in window.unique().tolist():
            now = window == w
            index[now] = self._window(epoch, w)[within[now] - (int(ends[w - 1]) if w else 0)]
        return index

    def _ordered_epoch(self, epoch: int) -> Tensor:
        return permutation(self.count, mix(self.seed, epoch, 0x5EED))

    def _planned_epoch(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """The blocks in the epoch's order; and where each window ends, in samples and in blocks."""
        assert self._sizes is not None
        blocks = permutation(len(self._sizes), mix(self.seed, epoch, 0x5EED))
        ends = self._sizes[blocks].cumsum(0)
        window = (ends - self._sizes[blocks]) // self.window
        last = torch.unique_consecutive(window, return_counts=True)[1].cumsum(0)
        return blocks, ends[last - 1], last

    def _ordered_window(self, epoch: int, window: int) -> Tensor:
        assert self._sizes is not None
        blocks, _, last = self._plan(epoch)
        mine = blocks[int(last[window - 1]) if window else 0 : int(last[window])]
        samples = samples_of(mine, self._sizes)
        return samples[permutation(len(samples), mix(self.seed, epoch, window, 0xB10C))]
