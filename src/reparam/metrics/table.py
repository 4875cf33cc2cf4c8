"""The metrics: when each applies, and how it is computed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data import Data
from ..errors import DataError
from .blocks import student_quantile
from .extractors import Extractor
from .extrapolation import frechet_infinity
from .frechet import Moments, frechet_distance
from .kernel import kernel_distance, mmd2
from .reference import Reference
from .scoring import Score, Scoring, error_score, jackknife, mean_score
from .statistics import BLOCKS, Statistics
from .vectors import nearest_training, sliced_wasserstein

#: Samples whose nearest neighbours are looked for, and vectors compared pair by pair, at most.
_NEAREST, _PAIRS = 2048, 4096
_KID_SUBSETS, _KID_SIZE = 100, 1000


@dataclass(frozen=True)
class Metric:
    """A score of samples.

    Attributes:
        words: what it measures, for a reader.
        compute: the score of samples beside real data.
        applies: whether it means anything for these data, and for samples with labels or without.
        better: "lower" or "higher".
        usual: whether studies measure it without being asked.
        keeps: whether it needs features themselves, not only their moments.
        uses: the extractor, of pictures.
    """

    words: str
    compute: Callable[[Scoring], Score]
    applies: Callable[[Data, bool], bool]
    better: str = "lower"
    usual: bool = True
    keeps: bool = False
    uses: Callable[[Reference], Extractor] | None = None


def _on_curve(data: Data, conditional: bool) -> bool:
    return data.curve is not None


def _vectors(data: Data, conditional: bool) -> bool:
    return not data.pictures


def _pictures(data: Data, conditional: bool) -> bool:
    return data.pictures


def _no_curve(data: Data, conditional: bool) -> bool:
    return data.curve is None


def _finite(data: Data, conditional: bool) -> bool:
    return not data.endless


def _labelled_pictures(data: Data, conditional: bool) -> bool:
    return data.pictures and conditional


def _off_manifold(s: Scoring) -> Score:
    assert s.real.data.curve is not None
    found = mean_score(s.real.data.curve.off_plane(s.samples.all()).square())
    low, high = found.interval or (found.value, found.value)
    return replace(found, value=found.value**0.5, interval=(max(low, 0.0) ** 0.5, high**0.5))


def _manifold_distance(s: Scoring) -> Score:
    assert s.real.data.curve is not None
    return mean_score(s.real.data.curve.off_curve(s.samples.all()))


def _compared(s: Scoring) -> tuple[Tensor, Tensor]:
    """Samples and real data as vectors: of the plane, where there is one."""
    data = s.real.data
    return data.flat(s.samples.all()), data.flat(data.reference(s.samples.count))


def _sliced_wasserstein(s: Scoring) -> Score:
    x, real = _compared(s)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    dealt = torch.empty_like(order)
    dealt[order] = torch.arange(len(x)) % BLOCKS
    without = [sliced_wasserstein(x[dealt != b], real) for b in range(BLOCKS)] if len(x) >= 2 * BLOCKS else []
    return jackknife(sliced_wasserstein(x, real), without, {"directions": 128, "reference": len(real)})


def _mmd(s: Scoring) -> Score:
    x, real = (v[:_PAIRS] for v in _compared(s))
    bandwidth = float(torch.pdist(real[:1000].double()).median())
    found = mmd2(x, real, "gaussian", bandwidth)
    settings = {"kernel": "gaussian", "bandwidth": bandwidth, "reference": len(real)}
    return error_score(found.value, found.standard_error, "its standard error", settings)


def _between(ours: Moments, theirs: Moments) -> float:
    return frechet_distance(ours.mean, ours.cov, theirs.mean, theirs.cov)


def _frechet(ours: Statistics, theirs: Statistics) -> Score:
    blocks = [b for b in ours.blocks if b.count]
    enough = len(blocks) > 1 and ours.moments.count - max(b.count for b in blocks) > 1
    without = [_between(ours.moments.without(b), theirs.moments) for b in blocks] if enough else []
    return jackknife(_between(ours.moments, theirs.moments), without, {"features": ours.moments.dim})


def _frechet_distance(s: Scoring) -> Score:
    by = s.real.extractor
    return _frechet(s.of(by), s.real.statistics(by))


def _pixel_frechet_distance(s: Scoring) -> Score:
    return _frechet(s.of(s.real.pixels), s.real.statistics(s.real.pixels))


def _frechet_infinity(s: Scoring) -> Score:
    x = s.features
    value, error, points = frechet_infinity(x, s.real.statistics(s.real.extractor).moments)
    half = student_quantile(0.95, 5) * error
    settings = {"n": len(x), "sizes": [n for n, _ in points], "repeats": 3}
    return Score(value, (value - half, value + half), "residuals about the line", settings)


def _kernel_distance(s: Scoring) -> Score:
    x, real = s.features, s.real_features
    size = min(_KID_SIZE, len(x), len(real))
    if size < 4:
        raise DataError(f"KID needs at least 4 samples and 4 real data, found {len(x)} and {len(real)}.")
    value, error = kernel_distance(x, real, subsets=_KID_SUBSETS, size=size)
    settings = {"subsets": _KID_SUBSETS, "size": size, "seed": 0, "reference": len(real)}
    return error_score(value, error, "its standard error", settings)


def _neighbours(name: str, s: Scoring) -> Score:
    values, settings = s.neighbours
    return Score(values[name], settings=settings)


def _nearest_neighbour(s: Scoring) -> Score:
    x = s.some(_NEAREST)
    distances = nearest_training(s.real.data.normalised(x), s.real.data)[0][:, 0]
    return mean_score(distances, {"n": len(x), "among": len(s.real.data.train)})


def _class_error(s: Scoring) -> Score:
    found = s.of(s.real.extractor)
    if s.samples.labels is None:
        raise DataError("class_error needs the class that each sample was asked to be.")
    asked = s.samples.labels[found.rows]
    return mean_score((classified(found.kept, s.real.statistics(s.real.extractor)) != asked).double())


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


def _extractor(real: Reference) -> Extractor:
    return real.extractor


def _pixels(real: Reference) -> Extractor:
    return real.pixels


def _of_neighbours(name: str, words: str) -> Metric:
    return Metric(words, functools.partial(_neighbours, name), _no_curve, "higher", False, True, _extractor)


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
        uses=_extractor,
    ),
    "pixel_frechet_distance": Metric(
        "Fréchet distance to real pictures on their pixels", _pixel_frechet_distance, _pictures, uses=_pixels
    ),
    "class_error": Metric(
        "share of samples not recognised as the class asked for, by linear discriminant analysis of real pictures' "
        "features",
        _class_error,
        _labelled_pictures,
        keeps=True,
        uses=_extractor,
    ),
    "nearest_neighbour": Metric(
        "mean distance to the nearest training sample (or its mirror image, where training mirrors); far below its "
        "floor means memorising",
        _nearest_neighbour,
        _finite,
    ),
    "frechet_infinity": Metric(
        "Fréchet distance extrapolated to infinitely many samples; what is left of its bias is the reference's",
        _frechet_infinity,
        _no_curve,
        usual=False,
        keeps=True,
        uses=_extractor,
    ),
    "kernel_distance": Metric(
        "kernel distance (KID): unbiased at any number of samples, 0 on average for equal distributions, so sometimes "
        "negative",
        _kernel_distance,
        _no_curve,
        usual=False,
        keeps=True,
        uses=_extractor,
    ),
    "mmd": Metric(
        "squared maximum mean discrepancy with a Gaussian kernel, the median distance of real data wide; unbiased, so "
        "sometimes negative",
        _mmd,
        _vectors,
        usual=False,
    ),
    "precision": _of_neighbours("precision", "share of samples that lie among real data: fidelity"),
    "recall": _of_neighbours("recall", "share of real data that lie among samples: diversity"),
    "density": _of_neighbours("density", "how densely real data lie around samples: fidelity, about 1 for real data"),
    "coverage": _of_neighbours("coverage", "share of real data with a sample beside them: diversity"),
}


def scored(scoring: Scoring, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The scores of these names, as plain data."""
    return {name: {**METRICS[name].compute(scoring).to_dict(), "better": METRICS[name].better} for name in names}


def keeps(names: Sequence[str]) -> bool:
    """Whether any of these metrics needs features themselves."""
    return any(METRICS[name].keeps for name in names)


def floors(real: Reference, names: Sequence[str], n: int) -> dict[str, float | None]:
    """What ``n`` fresh real data get, by metric: the values no model can be expected to beat; None where unknown."""
    used = {by.name: by for name in names if (uses := METRICS[name].uses) for by in [uses(real)]}
    key = json.dumps([list(names), n, real.key(list(used.values()))])
    return real.kept(key, lambda: _floors(real, names, n))


def _floors(real: Reference, names: Sequence[str], n: int) -> dict[str, float | None]:
    found = real.fresh(n)
    if found is None:
        return dict.fromkeys(names)
    scoring = Scoring(found[0], found[1], keep=keeps(names), intervals=False)
    return {name: METRICS[name].compute(scoring).value for name in names}
