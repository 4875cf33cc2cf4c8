"""The Fréchet distance that infinitely many samples would have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DataError, ReparamError
from .blocks import checked, positive
from .frechet import Moments, frechet_distance

_ROWS = 4096


def frechet_infinity(
    features: Tensor,
    reference_moments: Moments,
    *,
    sizes: Sequence[int] | None = None,
    repeats: int = 3,
    generator: torch.Generator | None = None,
) -> tuple[float, float, list[tuple[int, float]]]:
    """FD∞: the Fréchet distance at several numbers of samples n, fitted by a line in 1/n and read off at 1/n = 0.

    The distance of n samples is too large by about a constant over n (Chong & Forsyth 2020), which
    differs between models, so that scores at one n may rank them wrongly. Here the features are
    shuffled ``repeats`` times and the distance is taken of the first n rows of each order, for each n:
    draws without replacement, nested within a repeat (the paper shuffles anew for each n, and once).
    All points weigh the same. The order of the rows given does not matter on average.

    The line is right when n is many times the number of features d. At small multiples the distance bends and the
    value is too small: on Gaussians in 30 dimensions at a distance of 0.60, with the sizes of None, N = 5d gives
    0.47 on average (the distance at N is 2.62), 10d gives 0.57 and 25d 0.58. Where n ≤ d covariances lack rank
    and the line means nothing; that is refused. The bias from the reference's own number of samples stays
    in. Near 0 the value may be negative.

    The standard error is of a new draw of the features, the reference given. It takes the points' noise to
    be of averages over their rows (true to first order when the distance is not near 0), which gives the
    points' covariance up to a factor, overlaps included; that factor comes from the residuals about
    the line. It rests on few degrees of freedom, about 5 as it stands.

    Args:
        features: shape [N, d], any float dtype; float64 inside.
        reference_moments: of the real data's features, d of them.
        sizes: the n, at least two different ones, above d and up to N; None takes ten evenly spaced ones up to N,
            from N/10 or, where that is larger, from the smaller of 5d and N/2.
        repeats: how many orders, at least 1.
        generator: of the orders; None seeds one with 0, so that the value is reproducible.

    Returns:
        The value, its standard error, and the points (n, distance at n averaged over repeats), n rising.

    Raises:
        ReparamError: if ``repeats`` or ``sizes`` are unusable.
        DataError: if shapes or values are, or there are too few samples.
    """
    positive("repeats", repeats)
    x = checked(features, "features", 4, reference_moments.dim)
    at = _sizes(len(x), x.shape[1], sizes)
    if len(at) * repeats < 3:
        raise ReparamError("two points leave nothing to tell the error of a line from; give a third size or repeats=2.")
    generator = generator or torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(x), generator=generator) for _ in range(repeats)]
    distances = torch.empty(repeats, len(at), dtype=torch.float64)
    for repeat, order in enumerate(orders):
        known = float(distances[0, -1]) if repeat and at[-1] == len(x) else None
        distances[repeat] = torch.tensor(_along(x, order, at, reference_moments, known), dtype=torch.float64)
    value, error = _intercept(distances.flatten(), at, orders)
    return value, error, list(zip(at, distances.mean(0).tolist(), strict=True))


def _sizes(count: int, dim: int, sizes: Sequence[int] | None) -> list[int]:
    if sizes is None:
        least = max(count / 10, min(5 * dim, count / 2), 2)
        at = sorted({round(least + (count - least) * i / 9) for i in range(10)})
    else:
        at = sorted(set(sizes))
    if len(at) < 2 or at[0] < 2:
        raise ReparamError(f"sizes: expected at least two different numbers from 2 on, found {list(sizes or at)}.")
    if at[-1] > count:
        raise DataError(f"sizes: {at[-1]} samples asked for, found {count}; give more samples or smaller sizes.")
    if at[0] <= dim:
        raise DataError(
            f"FD∞ of {dim} features needs every size above {dim}, found {at[0]} of {count} samples: the distance is no "
            f"line in 1/n there. Give more samples, best {10 * dim} or more, and sizes=… from {5 * dim} on."
        )
    return at


def _along(x: Tensor, order: Tensor, at: list[int], reference: Moments, known: float | None) -> list[float]:
    """The distances of the first n rows in an order, for each n of ``at``; of all of them it may be known already."""
    moments = Moments(x.shape[1])
    found: list[float] = []
    for start, end in zip([0, *at], at, strict=False):
        if end == at[-1] and known is not None:
            return [*found, known]
        for rows in order[start:end].split(_ROWS):
            moments.update(x[rows])
        found.append(frechet_distance(moments.mean, moments.cov, reference.mean, reference.cov))
    return found


def _intercept(distances: Tensor, at: list[int], orders: list[Tensor]) -> tuple[float, float]:
    """The least-squares line's value at 1/n = 0, and its standard error; points come repeat by repeat."""
    n = torch.tensor(at * len(orders), dtype=torch.float64)
    design = torch.stack([torch.ones_like(n), at[0] / n], 1)
    fit = torch.linalg.pinv(design)
    rest = distances - design @ (fit @ distances)
    covariance = _overlaps(at, orders)
    spread = covariance.trace() - (fit @ covariance @ design).trace()  # of the residuals, E rest² over the factor
    factor = rest.square().sum() / spread
    return float(fit[0] @ distances), float((factor * (fit[0] @ covariance @ fit[0])).sqrt())


def _overlaps(at: list[int], orders: list[Tensor]) -> Tensor:
    """The covariance of the means over the points' rows, for numbers of variance 1: shared rows over n·n'."""
    weights = []
    for order in orders:
        place = torch.empty(len(order), dtype=torch.int64)
        place[order] = torch.arange(len(order))
        weights += [(place < n).double() / n for n in at]
    rows = torch.stack(weights)
    return rows @ rows.T
