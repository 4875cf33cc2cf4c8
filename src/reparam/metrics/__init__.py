"""Scores of samples against real data.

A metric is one entry of :data:`METRICS`: when it applies, and how it is computed. Each is
reported beside its floor, the value that as many fresh real data would get.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Data
from .blocks import block_interval
from .extrapolation import frechet_infinity
from .features import EXTRACTORS, Extractor, extractor
from .frechet import Moments, frechet_distance, moments
from .kernel import Discrepancy, kernel_distance, mmd2
from .neighbours import precision_recall
from .reference import Reference, Statistics
from .vectors import nearest, nearest_training, sliced_wasserstein

__all__ = [
    "EXTRACTORS",
    "METRICS",
    "Discrepancy",
    "Extractor",
    "Metric",
    "Moments",
    "Reference",
    "Statistics",
    "block_interval",
    "extractor",
    "frechet_distance",
    "frechet_infinity",
    "kernel_distance",
    "mmd2",
    "moments",
    "nearest",
    "nearest_training",
    "precision_recall",
    "sliced_wasserstein",
]


@dataclass(frozen=True)
class Metric:
    """A score of samples, smaller is better.

    Attributes:
        words: what it measures, for a reader.
        compute: from samples [n, …] as the data are stored (pictures as bytes), the real data, and
            the labels asked for [n] where there are any, to a number.
        applies: whether it means anything for these data, and for samples with labels or without.
    """

    words: str
    compute: Callable[[Tensor, Reference, Tensor | None], float]
    applies: Callable[[Data, bool], bool]


def _on_curve(data: Data, conditional: bool) -> bool:
    return data.curve is not None


def _vectors(data: Data, conditional: bool) -> bool:
    return not data.pictures


def _pictures(data: Data, conditional: bool) -> bool:
    return data.pictures


def _no_curve(data: Data, conditional: bool) -> bool:
    return data.curve is None


def _labelled_pictures(data: Data, conditional: bool) -> bool:
    return data.pictures and conditional


def _off_manifold(x: Tensor, real: Reference, y: Tensor | None) -> float:
    assert real.data.curve is not None
    return float(real.data.curve.off_plane(x).square().mean().sqrt())


def _manifold_distance(x: Tensor, real: Reference, y: Tensor | None) -> float:
    assert real.data.curve is not None
    return float(real.data.curve.off_curve(x).mean())


def _sliced_wasserstein(x: Tensor, real: Reference, y: Tensor | None) -> float:
    return sliced_wasserstein(real.data.flat(x), real.data.flat(real.data.reference(len(x))))


def _between(ours: Moments, theirs: Moments) -> float:
    return frechet_distance(ours.mean, ours.cov, theirs.mean, theirs.cov)


def _frechet_distance(x: Tensor, real: Reference, y: Tensor | None) -> float:
    if real.data.pictures:
        return _between(moments(real.features(x, real.extractor)), real.statistics.moments)
    return _between(moments(x.flatten(1)), moments(real.data.reference(len(x)).flatten(1)))


def _pixel_frechet_distance(x: Tensor, real: Reference, y: Tensor | None) -> float:
    return _between(moments(real.features(x, real.pixels)), real.pixel_statistics.moments)


def _nearest_neighbour(x: Tensor, real: Reference, y: Tensor | None) -> float:
    return float(nearest_training(real.data.normalised(x), real.data)[0].mean())


def _class_error(x: Tensor, real: Reference, y: Tensor | None) -> float:
    assert y is not None
    return float((classified(real.features(x, real.extractor), real.statistics) != y).double().mean())


def classified(features: Tensor, real: Statistics) -> Tensor:
    """The class of each of ``features`` [n, dim] by linear discriminant analysis of real ones; int64 [n].

    The classes' common covariance is shrunk towards a multiple of the identity by
    dim/(dim + count), so that few real data suffice. Classes without data are never chosen.
    """
    m, means, counts = real.moments, real.class_means, real.class_counts
    d = m.dim
    away = (means - m.mean) * counts[:, None].double().sqrt()
    within = (m.scatter - away.T @ away) / m.count
    shrink = d / (d + m.count)
    within = (1 - shrink) * within + shrink * (within.trace() / d + 1e-12) * torch.eye(d, dtype=torch.float64)
    weights = torch.linalg.solve(within, means.T)  # [dim, classes]
    offsets = (counts / m.count).log() - 0.5 * (means.T * weights).sum(0)
    return (features.double() @ weights + offsets).argmax(1)


METRICS: dict[str, Metric] = {
    "off_manifold": Metric("RMS distance off the plane that holds the data", _off_manifold, _on_curve),
    "manifold_distance": Metric("mean distance to the curve, in the plane", _manifold_distance, _on_curve),
    "sliced_wasserstein": Metric(
        "Wasserstein-1 distance to real data, averaged over directions (of the plane, where there is one)",
        _sliced_wasserstein,
        _vectors,
    ),
    "frechet_distance": Metric(
        "Fréchet distance to real data: on an extractor's features of pictures, on the raw numbers of vectors",
        _frechet_distance,
        _no_curve,
    ),
    "pixel_frechet_distance": Metric(
        "Fréchet distance to real pictures on their pixels", _pixel_frechet_distance, _pictures
    ),
    "class_error": Metric(
        "share of samples not recognised as the class asked for, by linear discriminant analysis of real pictures' "
        "features",
        _class_error,
        _labelled_pictures,
    ),
    "nearest_neighbour": Metric(
        "mean distance to the nearest training sample (or its mirror image, where training mirrors); far below its "
        "floor means memorising",
        _nearest_neighbour,
        _no_curve,
    ),
}
