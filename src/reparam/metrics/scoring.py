"""Samples beside real data, and what several metrics need of them computed once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .blocks import jackknife_interval, student_quantile
from .extractors import Extractor
from .neighbours import precision_recall
from .reference import KEPT, Reference
from .sets import SampleSet, spread
from .statistics import BLOCKS, Statistics, statistics_of

#: At most so many features of samples are kept.
MOST = 100_000
_LEVEL = 0.95
_K = 5


@dataclass(frozen=True)
class Score:
    """What a metric says of samples.

    Attributes:
        value: the score.
        interval: in which it lies for other samples of the same model, with 95 % confidence; None if unknown.
        interval_from: what the interval was told from.
        settings: whatever else decides the value; plain data.
    """

    value: float
    interval: tuple[float, float] | None = None
    interval_from: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        interval = None if self.interval is None else list(self.interval)
        told = {"interval_from": self.interval_from} if self.interval_from else {}
        return {"value": self.value, "interval": interval, **told, "settings": self.settings}


class Scoring:
    """Samples beside real data.

    Args:
        samples: what is scored. real: what with.
        keep: whether metrics will need features themselves, and not only their moments.
        intervals: whether scores get intervals; they cost some ten times as much.
        ask: told after each batch how many samples are done.

    Raises:
        DataError: if there are fewer than two samples, or their shape is not that of the real data.
    """

    def __init__(
        self,
        samples: SampleSet,
        real: Reference,
        *,
        keep: bool = True,
        intervals: bool = True,
        ask: Callable[[int], None] | None = None,
    ) -> None:
        if samples.count < 2:
            raise DataError(f"{samples.name}: a score needs at least 2 samples, found {samples.count}.")
        if samples.shape != real.data.shape:
            raise DataError(
                f"{samples.name} has samples of shape {list(samples.shape)}, the reference {real.data.name} of shape "
                f"{list(real.data.shape)}. Bring both to one: {_remedy(samples.shape, real.data.shape)}."
            )
        self.samples, self.real, self.keep = samples, real, keep
        self._blocks = min(BLOCKS, samples.count // 2) if intervals else 0
        self._ask = ask or real.ask
        self._found: dict[str, Statistics] = {}

    def of(self, by: Extractor) -> Statistics:
        """Of the samples' features."""
        if by.name not in self._found:
            self._found[by.name] = statistics_of(
                self.samples,
                by,
                keep=MOST if self.keep else 0,
                blocks=self._blocks if self._blocks > 1 else 0,
                ask=self._ask,
            )
        return self._found[by.name]

    @property
    def features(self) -> Tensor:
        """Features of the samples by the reference's extractor, float32 [n, dim]."""
        return self.of(self.real.extractor).kept

    @property
    def real_features(self) -> Tensor:
        """Features of real data, float32 [m, dim]."""
        return self.real.statistics(self.real.extractor, keep=True).kept

    @functools.cached_property
    def neighbours(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Precision, recall, density and coverage, at equal numbers of both; and their settings."""
        n = min(len(self.features), len(self.real_features), KEPT)
        k = min(_K, n - 1)
        ours, theirs = (x[spread(len(x), n)] for x in (self.features, self.real_features))
        return precision_recall(theirs, ours, k), {"k": k, "n": n, "reference": n}

    def some(self, most: int) -> Tensor:
        """At most so many of the samples, evenly spread, as they are stored."""
        return self.samples.spread(most).all()


def _remedy(ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    if len(ours) == len(theirs) == 3 and ours[0] != theirs[0]:
        return f"colour: {'rgb' if ours[0] == 3 else 'grey'} in the reference's data says what pictures are read as"
    if len(ours) == len(theirs) == 3:
        return f"the reference as '{{name: images, path: …, size: [{ours[1]}, {ours[2]}], resize: crop}}'"
    return "the same data with the same normalisation"


def mean_score(values: Tensor, settings: dict[str, Any] | None = None) -> Score:
    """The mean of independent values [n], with its interval."""
    x = values.double()
    if len(x) < 2:
        return Score(float(x.mean()), settings=settings or {})
    half = student_quantile(_LEVEL, len(x) - 1) * float(x.std()) / math.sqrt(len(x))
    mean = float(x.mean())
    return Score(mean, (mean - half, mean + half), f"the spread of {len(x)} samples", settings or {})


def error_score(value: float, error: float, how: str, settings: dict[str, Any]) -> Score:
    """A value with a standard error."""
    half = 1.959964 * error
    return Score(value, (value - half, value + half), how, settings)


def jackknife(value: float, without: Sequence[float], settings: dict[str, Any]) -> Score:
    """A value, with the interval that its values without one block each tell; see :func:`.blocks.block_interval`."""
    left_out = torch.tensor(without, dtype=torch.float64)
    blocks = len(left_out)
    if blocks < 2 or not bool(left_out.isfinite().all()):
        return Score(value, settings=settings)
    return Score(value, jackknife_interval(value, left_out, _LEVEL), f"{blocks} blocks of samples", settings)
