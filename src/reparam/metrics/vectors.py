"""Distances between sets of vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..data import Data


def wasserstein_1d(a: Tensor, b: Tensor) -> Tensor:
    """The exact Wasserstein-1 distance along one axis, column by column, float64.

    Args:
        a: shape [n, k]. b: shape [m, k]; n and m may differ.

    Returns:
        Shape [k]: the area between the two distribution functions.
    """
    a, b = a.double().sort(0).values, b.double().sort(0).values
    if len(a) == len(b):
        return (a - b).abs().mean(0)
    both, _ = torch.cat([a, b]).sort(0)
    gaps = both.diff(dim=0)
    at = both[:-1].T.contiguous()
    below_a = torch.searchsorted(a.T.contiguous(), at, right=True).T.double() / len(a)
    below_b = torch.searchsorted(b.T.contiguous(), at, right=True).T.double() / len(b)
    return ((below_a - below_b).abs() * gaps).sum(0)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 128) -> float:
    """The Wasserstein-1 distance averaged over directions (Bonneel et al. 2015).

    In the plane the directions are evenly spaced; beyond it they are fixed random ones, the
    same for every call with the same dimension.

    Args:
        a: shape [n, d]. b: shape [m, d]. directions: how many.
    """
    d = a.shape[1]
    if d == 2:
        angles = torch.arange(directions, dtype=torch.float64) * (math.pi / directions)
        rays = torch.stack([angles.cos(), angles.sin()])
    else:
        generator = torch.Generator().manual_seed(d)
        rays = torch.randn(d, directions, dtype=torch.float64, generator=generator)
        rays = rays / rays.norm(dim=0)
    return float(wasserstein_1d(a.double() @ rays, b.double() @ rays).mean())


def nearest(
    x: Tensor,
    others: Tensor,
    k: int = 1,
    *,
    as_numbers: Callable[[Tensor], Tensor] = lambda stored: stored,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The Euclidean distances from every row of ``x`` [n, …] to the k nearest of ``others`` [m, …].

    Candidates come from |x|² − 2 xy + |y|² in float32, which is fast but loses small distances;
    the distances to them are then computed exactly.

    Args:
        as_numbers: what turns rows of ``others`` into the units of x, a chunk at a time.

    Returns:
        Distances, float64, and indices, int64, both of shape [n, k], the nearest first.
    """
    k = min(k, len(others))
    size = math.prod(others.shape[1:])
    chunk = chunk or max(1, min(4096, 2**24 // size))
    flat = x.flatten(1).float()
    spare = min(k + 4, len(others))
    best = torch.full((len(x), spare), math.inf)
    index = torch.zeros(len(x), spare, dtype=torch.int64)
    for start in range(0, len(others), chunk):
        part = as_numbers(others[start : start + chunk]).flatten(1).float()
        near = part.square().sum(1) - 2 * (flat @ part.T)  # |x|² is the same for all
        place = torch.arange(start, start + len(part)).expand(len(x), -1)
        near, place = torch.cat([best, near], 1), torch.cat([index, place], 1)
        best, at = near.topk(spare, dim=1, largest=False)
        index = place.gather(1, at)
    exact = torch.cat([_exact(a, as_numbers(others[i])) for a, i in _few(x, index, 2**22 // size)])
    distance, order = exact.sort(dim=1)
    return distance[:, :k], index.gather(1, order)[:, :k]


def _few(x: Tensor, index: Tensor, numbers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of x and of the candidates' indices, a few at a time."""
    rows = max(1, min(64, numbers // index.shape[1]))
    return zip(x.split(rows), index.split(rows), strict=True)


def _exact(x: Tensor, candidates: Tensor) -> Tensor:
    """Distances from x [n, …] to candidates [n, c, …], float64 [n, c]."""
    return (x[:, None].double() - candidates.double()).flatten(2).norm(dim=2)


def nearest_training(x: Tensor, data: Data, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k nearest training samples to ``x`` [n, …], in the units the network sees.

    Where training mirrors pictures, a picture and its mirror image are both compared.

    Returns:
        Distances, float64 [n, k], and the samples as they are stored, [n, k, …], the nearest first.
    """
    distance, index = nearest(x, data.train, k, as_numbers=data.normalised)
    found = data.train[index]
    if data.flip:
        other, index = nearest(x.flip(-1), data.train, k, as_numbers=data.normalised)
        distance, order = torch.cat([distance, other], 1).topk(distance.shape[1], dim=1, largest=False)
        both = torch.cat([found, data.train[index].flip(-1)], 1)
        found = both[torch.arange(len(x))[:, None], order]
    return distance, found
