"""Scores of samples against real data.

A metric is one entry of :data:`METRICS`: when it applies, and how it is computed. Each is
reported beside its floor, the value that as many fresh real data would get.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .frechet import Moments, frechet_distance, moments
from .vectors import nearest_distance, sliced_wasserstein

if TYPE_CHECKING:
    from ..data import Data

__all__ = [
    "METRICS",
    "Metric",
    "Moments",
    "frechet_distance",
    "moments",
    "nearest_distance",
    "sliced_wasserstein",
]


@dataclass(frozen=True)
class Metric:
    """A score of samples, smaller is better.

    Attributes:
        words: what it measures, for a reader.
        compute: from samples [n, …] in the data's normalised units to a number.
        applies: whether it means anything for these data.
    """

    words: str
    compute: Callable[[Tensor, Data], float]
    applies: Callable[[Data], bool]


def _on_curve(data: Data) -> bool:
    return data.curve is not None


def _off_manifold(x: Tensor, data: Data) -> float:
    assert data.curve is not None
    return float(data.curve.off_plane(x).square().mean().sqrt())


def _manifold_distance(x: Tensor, data: Data) -> float:
    assert data.curve is not None
    return float(data.curve.off_curve(x).mean())


def _sliced_wasserstein(x: Tensor, data: Data) -> float:
    return sliced_wasserstein(data.flat(x), data.flat(data.reference(len(x))))


def _frechet_distance(x: Tensor, data: Data) -> float:
    ours = moments(x.flatten(1))
    real = moments(data.reference(len(x)).flatten(1))
    return frechet_distance(ours.mean, ours.cov, real.mean, real.cov)


def _nearest_neighbour(x: Tensor, data: Data) -> float:
    return float(nearest_distance(x.flatten(1), data.train.flatten(1)).mean())


METRICS: dict[str, Metric] = {
    "off_manifold": Metric("RMS distance off the plane that holds the data", _off_manifold, _on_curve),
    "manifold_distance": Metric("mean distance to the curve, in the plane", _manifold_distance, _on_curve),
    "sliced_wasserstein": Metric(
        "Wasserstein-1 distance to real data, averaged over directions (of the plane, where there is one)",
        _sliced_wasserstein,
        lambda data: True,
    ),
    "frechet_distance": Metric(
        "Fréchet distance to real data, on the raw vectors",
        _frechet_distance,
        lambda data: data.curve is None,
    ),
    "nearest_neighbour": Metric(
        "mean distance to the nearest training vector; far below its floor means memorising",
        _nearest_neighbour,
        lambda data: data.curve is None,
    ),
}
