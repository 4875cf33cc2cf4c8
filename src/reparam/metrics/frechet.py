"""Fréchet distance between Gaussians, and the moments it needs, in float64 and without SciPy."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError


class Moments:
    """Mean and covariance of features, streamed and merged exactly in any order.

    Args:
        dim: the number of features.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)  # Σ (x − mean)(x − mean)ᵀ

    @classmethod
    def of(cls, count: int, mean: Tensor, scatter: Tensor) -> Moments:
        """Moments known already: of ``count`` samples, with mean [dim] and Σ (x − mean)(x − mean)ᵀ [dim, dim]."""
        found = cls(len(mean))
        found.count, found.mean, found.scatter = count, mean.double(), scatter.double()
        return found

    def update(self, features: Tensor) -> None:
        """Count ``features`` of shape [n, dim] in.

        Raises:
            DataError: if the shape is another, or a feature is not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise DataError(f"expected features of shape [n, {self.dim}], found {list(features.shape)}.")
        x = features.detach().to("cpu", torch.float64)
        if not bool(x.isfinite().all()):
            raise DataError("features hold NaN or infinity; moments of them would mean nothing.")
        if len(x) == 0:
            return
        mean = x.mean(0)
        centred = x - mean
        self._absorb(len(x), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Count in what another one has seen.

        Raises:
            DataError: if it has another number of features.
        """
        if other.dim != self.dim:
            raise DataError(f"cannot merge moments of {other.dim} features into moments of {self.dim}.")
        if other.count:
            self._absorb(other.count, other.mean, other.scatter)

    def _absorb(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    @property
    def cov(self) -> Tensor:
        """The covariance with divisor n − 1, shape [dim, dim].

        Raises:
            DataError: if fewer than two samples were counted.
        """
        if self.count < 2:
            raise DataError(f"a covariance needs at least two samples, found {self.count}.")
        return self.scatter / (self.count - 1)


def moments(features: Tensor) -> Moments:
    """The moments of features of shape [n, dim]."""
    m = Moments(features.shape[1])
    m.update(features)
    return m


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """‖μ1 − μ2‖² + tr(C1 + C2 − 2 (C1 C2)^½) (Dowson & Landau 1982).

    With C = A Aᵀ the trace of (C1 C2)^½ is the sum of the singular values of A1ᵀA2, so
    symmetric eigen-decompositions suffice, and a rank-deficient covariance keeps only the
    columns of A that it has.

    Args:
        mean1, mean2: shape [d]. cov1, cov2: shape [d, d]. Anything torch can read; float64 inside.

    Raises:
        DataError: if shapes disagree or a value is not finite.
    """
    m1, c1, m2, c2 = (torch.as_tensor(v).detach().to("cpu", torch.float64) for v in (mean1, cov1, mean2, cov2))
    d = m1.numel()
    if m1.shape != (d,) or m2.shape != (d,) or c1.shape != (d, d) or c2.shape != (d, d):
        shapes = ", ".join(str(list(v.shape)) for v in (m1, c1, m2, c2))
        raise DataError(f"expected means [d] and covariances [d, d], found {shapes}.")
    if not all(bool(v.isfinite().all()) for v in (m1, c1, m2, c2)):
        raise DataError("a mean or a covariance holds NaN or infinity.")
    cross = torch.linalg.svdvals(_factor(c1).T @ _factor(c2)).sum()
    distance = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross
    return max(float(distance), 0.0)


def _factor(cov: Tensor) -> Tensor:
    """A of shape [d, rank] with A Aᵀ = cov."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    kept = values > values[-1].clamp(min=0) * len(cov) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * values[kept].sqrt()
