"""Many samples: drawn batch by batch, by one process or several, and written while the next ones are drawn."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.base import as_bytes
from ..denoiser import Denoiser
from ..errors import ReparamError
from ..samplers import Sampler, sample
from ..training.draws import step_noise, unit_noise
from .estimate import in_words
from .run import begun
from .sample_files import Place

#: Numbers that a batch has by default, on a processor and on an accelerator; samples that it has at most.
_NUMBERS, _NUMBERS_ACCELERATED, _MOST = 2**21, 2**24, 1024
#: Samples that a batch had better be a multiple of: their noise is drawn together.
_TOGETHER = 32
#: Seconds between two lines in a log.
_QUIET = 60.0


def usual_batch(shape: tuple[int, ...], device: torch.device) -> int:
    """How many samples of a shape are drawn at a time."""
    numbers = _NUMBERS if device.type == "cpu" else _NUMBERS_ACCELERATED
    most = max(1, min(_MOST, numbers // math.prod(shape)))
    return most // _TOGETHER * _TOGETHER or most


@dataclass(frozen=True)
class Drawing:
    """How every sample of a seed is drawn.

    Attributes:
        denoiser: the model, under guidance and thresholding. method, times: the sampler and its grid.
        y: the label of every sample. clean: the data that each starts from, once they are noised; of noise alone None.
        data: what the model knows of its data.
    """

    denoiser: Denoiser
    method: Sampler
    times: list[float]
    seed: int
    y: Tensor | None
    clean: Tensor | None
    data: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data["shape"])

    def __call__(self, start: int, stop: int) -> Tensor:
        """The samples start … stop − 1 in the units of the data, on the CPU; pictures as bytes.

        What each is does not depend on the batch but for rounding: all its noise is a function of seed and number.

        Raises:
            ReparamError: if one is not finite.
        """
        device = next(self.denoiser.parameters()).device
        noise = unit_noise(self.seed, start, stop, self.shape)
        clean = None if self.clean is None else self.clean[start:stop]
        with _plain_convolutions():
            x = sample(
                self.denoiser,
                **begun(noise, clean, self.denoiser, self.times[0]),
                sampler=self.method,
                times=self.times,
                cond={} if self.y is None else {"y": self.y[start:stop].to(device)},
                noises=self._noises(start, stop, device),
            )
        assert isinstance(x, Tensor)
        finite = x.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            bad = start + int(finite.logical_not().nonzero()[0])
            raise ReparamError(
                f"sample {bad} holds NaN or infinity, after {len(self.times) - 1} steps of {self.method}; expected a "
                "model that has not diverged. reparam show tells what it was trained as."
            )
        return self._in_original_units(x.cpu())

    def _noises(self, start: int, stop: int, device: torch.device) -> Iterator[Tensor]:
        return (step_noise(self.seed, step, start, stop, self.shape, device) for step in itertools.count())

    def _in_original_units(self, x: Tensor) -> Tensor:
        scale = self.data.get("normalised_by", {"mean": 0.0, "std": 1.0})
        found = x * scale["std"] + scale["mean"]
        return as_bytes(found) if self.data.get("pictures") else found


@contextlib.contextmanager
def _plain_convolutions() -> Iterator[None]:
    """Convolutions in float32, without TF32: its rounding differs with the batch, a hundred times as much."""
    now = torch.backends.cudnn
    with now.flags(now.enabled, now.benchmark, now.benchmark_limit, now.deterministic, allow_tf32=False):
        yield


def batches(missing: list[tuple[int, int]], batch: int, rank: int, world: int) -> list[tuple[int, int]]:
    """The batches, from … to, that one of several processes draws of what is missing; all of them in turn."""
    left = sum(stop - start for start, stop in missing)
    size = max(1, min(batch, -(-left // world)))
    found = []
    for start, stop in missing:
        # Cut where a batch of the whole would be: there the noise of a group begins.
        cuts = [start, *range((start // size + 1) * size, stop, size), stop]
        found += list(itertools.pairwise(cuts))
    return found[rank::world]


def draw_all(
    drawn: Callable[[int, int], Tensor], place: Place, mine: list[tuple[int, int]], progress: Callable[[int], None]
) -> None:
    """Draw these batches. Each is encoded and written while the next is drawn, so that two are in memory at most."""
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer:  # which waits for the last one, even when stopped
        for start, stop in mine:
            x = drawn(start, stop)
            if writing is not None:
                writing.result()
            writing = writer.submit(place.write, start, x)
            progress(stop - start)
        if writing is not None:
            writing.result()


class Progress:
    """A bar over all processes' samples, from what this one does; in a log, a line now and then.

    Args:
        total: samples; done: of them, before this began. mine: those that this process draws; 0 shows nothing.
    """

    def __init__(self, total: int, done: int, mine: int, say: Callable[[str], None]) -> None:
        self._total, self._done, self._mine, self._say = total, done, mine, say
        self._count, self._began = 0, time.perf_counter()
        self._said = self._began
        self._bar: Any = tqdm(
            total=total,
            initial=done,
            unit="sample",
            file=sys.stderr,
            mininterval=0.5,
            dynamic_ncols=True,
            disable=not (mine and sys.stderr.isatty()),
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, count: int) -> None:
        self._count += count
        if not self._mine:
            return
        share = self._count / self._mine
        now, there = time.perf_counter(), self._done + round(share * (self._total - self._done))
        self._bar.update(there - self._bar.n)
        if not sys.stderr.isatty() and now - self._said >= _QUIET and share < 1:
            self._said, gone = now, now - self._began
            rate = (there - self._done) / gone
            left = in_words(gone / share * (1 - share))
            self._say(f"  {there} of {self._total} samples, {rate:.3g} a second, about {left} left")
