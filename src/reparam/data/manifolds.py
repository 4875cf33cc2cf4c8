"""Curves in a plane, embedded in D dimensions by a random column-orthogonal map.

The manifold experiment of Li & He (arXiv 2511.13720, section 4): x = P x̂ with x̂ on a curve
in the plane and P of shape [D, 2], PᵀP = I.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, unknown

_FINE = 8192  # straight pieces a curve is drawn with


def _spiral() -> np.ndarray:
    """Archimedes' spiral r = 2θ/(4.5π) over two turns, θ from π/2 to 9π/2."""
    angle = np.linspace(0.5 * math.pi, 4.5 * math.pi, 16 * _FINE)
    radius = 2 * angle / (4.5 * math.pi)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _swissroll() -> np.ndarray:
    """The rolled edge of the Swiss roll, (θ cos θ, θ sin θ)/6.5 with θ from 3π/2 to 9π/2."""
    angle = np.linspace(1.5 * math.pi, 4.5 * math.pi, 16 * _FINE)
    return np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1) / 6.5


CURVES = {"spiral": _spiral, "swissroll": _swissroll}


@dataclass(frozen=True)
class Curve:
    """A curve in a plane in D dimensions.

    Attributes:
        basis: P, shape [D, 2], float64, orthonormal columns.
        points: the curve in the plane, evenly spaced in arc length, shape [n, 2], float64.
    """

    basis: Tensor
    points: Tensor

    @classmethod
    def make(cls, name: str, dim: int, seed: int = 0) -> Curve:
        """A named curve under the embedding that ``seed`` draws.

        Raises:
            UnknownName: if there is no such curve.
            DataError: if the dimension is below 2.
        """
        if name not in CURVES:
            raise unknown("curve", name, CURVES)
        if dim < 2:
            raise DataError(f"{name} lies in a plane: dim must be at least 2, found {dim}.")
        raw = CURVES[name]()
        length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(raw, axis=0), axis=1))])
        even = np.linspace(0, length[-1], _FINE)
        points = np.stack([np.interp(even, length, raw[:, i]) for i in (0, 1)], axis=1)
        gaussian = np.random.default_rng([seed, dim]).standard_normal((dim, 2))
        q, r = np.linalg.qr(gaussian)
        basis = q * np.sign(np.diag(r))  # the sign makes P uniformly distributed
        return cls(torch.from_numpy(basis), torch.from_numpy(points))

    def draw(self, n: int, seed: list[int]) -> Tensor:
        """``n`` points, uniform in arc length, in D dimensions; float32, shape [n, D]."""
        at = np.random.default_rng(seed).random(n) * (len(self.points) - 1)
        low = torch.from_numpy(np.floor(at).astype(np.int64)).clamp(max=len(self.points) - 2)
        weight = torch.from_numpy(at)[:, None] - low[:, None]
        plane = torch.lerp(self.points[low], self.points[low + 1], weight)
        return self.embed(plane).float()

    def embed(self, plane: Tensor) -> Tensor:
        """P x̂: from the plane [n, 2] to [n, D], float64."""
        return plane.double() @ self.basis.T

    def plane(self, x: Tensor) -> Tensor:
        """Pᵀ x: from [n, D] to the plane [n, 2], float64."""
        return x.double() @ self.basis

    def off_plane(self, x: Tensor) -> Tensor:
        """The distance of every x to the plane, shape [n], float64."""
        return (x.double() - self.embed(self.plane(x))).norm(dim=1)

    def off_curve(self, x: Tensor) -> Tensor:
        """The distance of every x to the curve, within the plane, shape [n], float64."""
        return torch.cat([self._to_segments(part) for part in self.plane(x).split(1024)])

    def _to_segments(self, plane: Tensor) -> Tensor:
        # The nearest of the points is an end of the nearest segment, so two segments are looked at.
        nearest = torch.cdist(plane, self.points).argmin(1)
        found = []
        for first in (nearest - 1, nearest):
            start = self.points[first.clamp(0, len(self.points) - 2)]
            along = self.points[first.clamp(0, len(self.points) - 2) + 1] - start
            share = ((plane - start) * along).sum(1) / along.square().sum(1)
            found.append((plane - start - share.clamp(0, 1)[:, None] * along).norm(dim=1))
        return torch.minimum(*found)
