"""Many samples: drawn batch by batch, by one process or several, and written while the next ones are drawn."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data.base import as_bytes
from ..denoiser import Denoiser
from ..errors import ReparamError, Unsupported, unknown
from ..samplers import Sampler
from .estimate import in_words
from .sample_files import Place
from .walk import tf32, walked

#: Numbers that a batch has by default, on a processor and on an accelerator; samples that it has at most.
_NUMBERS, _NUMBERS_ACCELERATED, _MOST = 2**21, 2**24, 1024
#: Samples that a batch had better be a multiple of: their noise is drawn together.
_TOGETHER = 32
#: What the network of a model computes in; all else is float32.
PRECISIONS = ("float32", "tf32", "bf16")
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

        Raises:
            ReparamError: if one is not finite.
        """
        numbers = (start, stop)
        x = walked(self.denoiser, self.method, self.times, self.seed, numbers, self.shape, y=self.y, clean=self.clean)
        assert isinstance(x, Tensor)
        finite = x.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            bad = start + int(finite.logical_not().nonzero()[0])
            raise ReparamError(
                f"sample {bad} holds NaN or infinity, after {len(self.times) - 1} steps of {self.method}; expected a "
                "model that has not diverged. reparam show tells what it was trained as."
            )
        return self._in_original_units(x.cpu())

    def _in_original_units(self, x: Tensor) -> Tensor:
        scale = self.data.get("normalised_by", {"mean": 0.0, "std": 1.0})
        found = x * scale["std"] + scale["mean"]
        return as_bytes(found) if self.data.get("pictures") else found


def in_precision(denoiser: Denoiser, precision: str, compiled: bool = False) -> Denoiser:
    """The same model with a network that computes in a precision of :data:`PRECISIONS`, and nothing else does.

    Args:
        denoiser: a plain one, on the device where it is to be asked.
        compiled: run the network through torch.compile.

    Raises:
        UnknownName: if there is no such precision.
        Unsupported: if the device has no TF32.
    """
    if precision not in PRECISIONS:
        raise unknown("precision (--precision)", precision, PRECISIONS)
    net = denoiser.net
    device = next(net.parameters()).device
    if precision == "tf32" and not (device.type == "cuda" and torch.cuda.is_tf32_supported()):
        raise Unsupported(f"--precision tf32 is of NVIDIA GPUs since Ampere, found {device}; use float32 or bf16.")
    if precision != "float32" and device.type == "cuda" and any(isinstance(m, nn.Conv2d) for m in net.modules()):
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compiled:
        net.compile()
    if precision == "float32":
        return denoiser
    c = denoiser.conventions
    found = Denoiser(
        InPrecision(net, precision),
        c.schedule,
        c.predicted(),
        time=c.time,
        input=c.input,
        t_range=c.t_range,
        data=denoiser.data,
    )
    found.training_record, found.overrides = denoiser.training_record, denoiser.overrides
    return found


class InPrecision(nn.Module):
    """A network that computes in TF32 or, by autocast, in bfloat16, whatever goes on around it."""

    def __init__(self, net: nn.Module, precision: str) -> None:
        super().__init__()
        self.net, self.precision = net, precision

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Any:
        """What the network answers."""
        if self.precision == "tf32":
            with tf32(True):
                return self.net(x, time, **cond)
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.net(x, time, **cond)


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
