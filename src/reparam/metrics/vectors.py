"""Distances between sets of vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def nearest_distance(x: Tensor, others: Tensor, chunk: int = 1024) -> Tensor:
    """The Euclidean distance from every row of ``x`` [n, d] to the nearest of ``others`` [m, d]."""
    others = others.double()
    # The exact formula: the one with |x|² − 2xy + |y|² loses the small distances that matter here.
    exact = "donot_use_mm_for_euclid_dist"
    parts = [torch.cdist(part, others, compute_mode=exact).amin(1) for part in x.double().split(chunk)]
    return torch.cat(parts)
