"""The maximum mean discrepancy of two sets of features, and KID, which is one of its kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError, ReparamError, unknown
from .blocks import checked, positive

Kernel = Callable[[Tensor, Tensor], Tensor]
_LEAST = 4  # samples, for the variance
_SUBSAMPLE = 500  # samples from each side, for the median of distances


@dataclass(frozen=True)
class Discrepancy:
    """An estimate of MMD² between two distributions.

    Attributes:
        value: the estimate, unbiased, hence sometimes negative; 0 on average for equal distributions.
        standard_error: its standard error, from a new draw of both sets.
        kernel: "polynomial" or "gaussian".
        bandwidth: the Gaussian kernel's, given or found, in units of the features; None for the other.
    """

    value: float
    standard_error: float
    kernel: str
    bandwidth: float | None


def mmd2(
    x: Tensor, y: Tensor, kernel: str = "polynomial", bandwidth: float | None = None, *, chunk: int = 1024
) -> Discrepancy:
    """The squared maximum mean discrepancy, as an unbiased U-statistic (Gretton et al. 2012, Lemma 6).

    mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) − 2 mean_{ij} k(x_i, y_j), with
    k(a, b) = (a·b/d + 1)³ ("polynomial", the kernel of KID) or exp(−|a − b|²/(2 bandwidth²)) ("gaussian").

    The standard error squared is the two-sample jackknife's variance, less the share that the
    jackknife counts twice (of pairs, beyond the samples' own effects), which analysis of variance of
    the kernel estimates without bias. The share that is left for the samples' own effects is not let
    fall below 0; so where the distributions are equal, when it should be 0, the standard error is some
    20 to 40 per cent too large. There the estimate is not normal either, but skewed to the right. The
    two sets must be independent; for the same set twice the value is below 0 and means nothing.

    In float64, a chunk at a time: time O((n + m)² d), memory O(chunk² + chunk · d). Neither the order of the
    samples nor the chunk matters beyond rounding, but for the bandwidth found below.

    Args:
        x: shape [n, d], any float dtype, n at least 4. y: shape [m, d].
        bandwidth: None takes the median distance between distinct samples of at most 500 from
            either side, evenly spaced in their order. The error takes it as given. Values with other
            bandwidths cannot be compared: state it.

    Raises:
        UnknownName: if there is no such kernel.
        ReparamError: if the bandwidth or chunk is not positive, or the polynomial kernel is given one.
        DataError: if shapes or values are unusable, or the median distance is 0.
    """
    positive("chunk", chunk)
    x = checked(x, "x", _LEAST)
    y = checked(y, "y", _LEAST, x.shape[1])
    if kernel == "polynomial":
        if bandwidth is not None:
            raise ReparamError(f"the polynomial kernel has no bandwidth, found {bandwidth}: leave it out.")
        total = _tally(_polynomial, x, y, chunk)
    elif kernel == "gaussian":
        origin = x[:_SUBSAMPLE].double().mean(0)  # far from the origin distances would be rounded
        bandwidth = _median_distance(x, y, origin) if bandwidth is None else float(bandwidth)
        if not 0 < bandwidth < math.inf:
            raise ReparamError(f"bandwidth must be positive and finite, found {bandwidth}.")
        total = _tally(_gaussian(bandwidth, origin), x, y, chunk)
    else:
        raise unknown("kernel", kernel, ["polynomial", "gaussian"])
    value, first, second = total
    return Discrepancy(value, math.sqrt(max(first, 0.0) + second), kernel, bandwidth)


def kernel_distance(
    x: Tensor, y: Tensor, *, subsets: int = 100, size: int = 1000, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """KID: the unbiased MMD² with the kernel (a·b/d + 1)³, averaged over random subsets (Bińkowski et al. 2018).

    Each subset is ``size`` rows of x and as many of y, drawn without replacement and anew. The mean is
    unbiased at any ``size``, may be negative, and is 0 on average for equal distributions. :func:`mmd2`
    is the limit of many subsets; it is less noisy, and slower where sets are large.

    The standard error is that of the mean over new draws of x and y *and* of the subsets. Subsets
    share samples, so their standard deviation, which other programs print as ±, is not it, nor is
    that divided by √subsets. Within a subset the variance is estimated as in :func:`mmd2`, in a part
    that falls as 1/size and one that falls as 1/size²; those are averaged over subsets and carried over
    to the smaller of n and m (too large if these differ, or if the distributions are equal). In float64.

    Args:
        x: shape [n, d], any float dtype. y: shape [m, d].
        subsets: how many, at least 1. size: from 4 to the smaller of n and m.
        generator: of the subsets; None seeds one with 0, so that the value is reproducible.

    Returns:
        The mean and its standard error. Papers often print both times 1,000.

    Raises:
        ReparamError: if ``subsets`` or ``size`` is too small.
        DataError: if shapes or values are unusable, or there are fewer samples than ``size``.
    """
    positive("subsets", subsets)
    if size < _LEAST:
        raise ReparamError(f"size must be at least {_LEAST}, found {size}.")
    x = checked(x, "x", _LEAST)
    y = checked(y, "y", _LEAST, x.shape[1])
    least = min(len(x), len(y))
    if size > least:
        raise DataError(
            f"KID on subsets of {size} needs as many samples on both sides, found {len(x)} and {len(y)}. Give more "
            f"samples, or size={least} or less: the expected value is the same, the noise is larger."
        )
    generator = generator or torch.Generator().manual_seed(0)
    found = []
    for _ in range(subsets):
        a, b = (v[torch.randperm(len(v), generator=generator)[:size]] for v in (x, y))
        found.append(_tally(_polynomial, a, b, 1024))
    value, first, second = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    first, part = max(first, 0.0), size / least
    full = part * first + part**2 * second
    return value, math.sqrt(full + (first + second - full) / subsets)


def _polynomial(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    near = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * (a @ b.T)
    return near.clamp_(min=0)


def _gaussian(bandwidth: float, origin: Tensor) -> Kernel:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return _squared_distances(a - origin, b - origin).mul_(-0.5 / bandwidth**2).exp_()

    return kernel


def _median_distance(x: Tensor, y: Tensor, origin: Tensor) -> float:
    few = [v[torch.linspace(0, len(v) - 1, min(len(v), _SUBSAMPLE)).round().long()] for v in (x, y)]
    both = torch.cat([v.double() for v in few]) - origin
    median = float(torch.pdist(both).median())
    if median == 0:
        raise DataError("more than half of the distances between samples are 0; give bandwidth=… yourself.")
    return median


def _tally(kernel: Kernel, x: Tensor, y: Tensor, chunk: int) -> tuple[float, float, float]:
    """MMD², and the two parts of its variance: of order 1/n (may come out negative) and of order 1/n²."""
    n, m = len(x), len(y)
    rows_x, squares_x = _within(kernel, x, chunk)
    rows_y, squares_y = _within(kernel, y, chunk)
    cross_x, cross_y, squares = _between(kernel, x, y, chunk)
    own_x, own_y, across = rows_x.mean(), rows_y.mean(), cross_x.mean()
    away_x, away_y = cross_x - across, cross_y - across
    # What U changes by when a sample is left out.
    left_x = 2 * away_x / (n - 1) - 2 * (rows_x - own_x) / (n - 2)
    left_y = 2 * away_y / (m - 1) - 2 * (rows_y - own_y) / (m - 2)
    jackknife = (n - 1) / n * left_x.square().sum() + (m - 1) / m * left_y.square().sum()
    rest = squares - n * m * across**2 - m * away_x.square().sum() - n * away_y.square().sum()
    pairs = 4 * rest.clamp(min=0) / ((n - 1) * (m - 1) * n * m)
    pairs_x, pairs_y = _pair_variance(rows_x, squares_x), _pair_variance(rows_y, squares_y)
    counted = 2 * pairs + 2 * (n - 1) / (n - 2) * pairs_x + 2 * (m - 1) / (m - 2) * pairs_y
    return float(own_x + own_y - 2 * across), float(jackknife - counted), float(pairs + pairs_x + pairs_y)


def _pair_variance(rows: Tensor, squares: Tensor) -> Tensor:
    """The variance of mean_{i≠j} k_ij that the samples' own effects do not explain."""
    n = len(rows)
    mean = rows.mean()
    explained = 2 * (n - 1) ** 2 / (n - 2) * (rows - mean).square().sum()
    rest = squares - n * (n - 1) * mean**2 - explained
    return 2 * rest.clamp(min=0) / (n * (n - 3)) / (n * (n - 1))


def _within(kernel: Kernel, x: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Of k(x_i, x_j) with i ≠ j: the means of rows [n], and the sum of squares."""
    n = len(x)
    rows = torch.zeros(n, dtype=torch.float64)
    squares = torch.zeros((), dtype=torch.float64)
    for i in range(0, n, chunk):
        a = x[i : i + chunk].double()
        for j in range(i, n, chunk):
            k = kernel(a, a if i == j else x[j : j + chunk].double())
            if i == j:
                k.fill_diagonal_(0)
            else:
                rows[j : j + chunk] += k.sum(0)
            rows[i : i + chunk] += k.sum(1)
            squares += (1 if i == j else 2) * k.square_().sum()
    return rows / (n - 1), squares


def _between(kernel: Kernel, x: Tensor, y: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of k(x_i, y_j): the means of rows [n] and of columns [m], and the sum of squares."""
    rows, columns = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(y), dtype=torch.float64)
    squares = torch.zeros((), dtype=torch.float64)
    for i in range(0, len(x), chunk):
        a = x[i : i + chunk].double()
        for j in range(0, len(y), chunk):
            k = kernel(a, y[j : j + chunk].double())
            rows[i : i + chunk] += k.sum(1)
            columns[j : j + chunk] += k.sum(0)
            squares += k.square_().sum()
    return rows / len(y), columns / len(x), squares
