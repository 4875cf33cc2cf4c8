"""Fréchet distance between Gaussians, and the moments it needs, in float64 and without SciPy."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError

_EPS = torch.finfo(torch.float64).eps
#: Up to this error, in proportion to the distance, squared singular values will do.
_TOLERANCE = 1e-7


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

    With C = A Aᵀ the trace of (C1 C2)^½ is the sum of the singular values of A1ᵀA2. Their
    squares are the eigenvalues of A2ᵀ C1 A2, which are several times faster to get; where
    squaring might have cost accuracy, the singular values themselves are taken.

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
    if not all(bool(v.sum().isfinite()) for v in (m1, c1, m2, c2)):
        raise DataError("a mean or a covariance holds NaN or infinity.")
    rest = (m1 - m2).square().sum() + c1.trace() + c2.trace()
    factor, triangular = _factor(c2)
    cross, error = _by_squares(c1, factor, triangular)
    if not 2 * error <= _TOLERANCE * (rest - 2 * cross):
        cross = torch.linalg.svdvals(_factor(c1)[0].T @ factor).sum()
    return max(float(rest - 2 * cross), 0.0)


def _factor(cov: Tensor) -> tuple[Tensor, bool]:
    """A of shape [d, rank] with A Aᵀ = cov, and whether it is lower triangular; else it has a column a direction."""
    lower, failed = torch.linalg.cholesky_ex(cov)
    if not failed and lower.diagonal().min() ** 2 > cov.diagonal().max() * len(cov) * _EPS:
        return lower, True
    values, vectors = torch.linalg.eigh(cov)
    kept = values > values[-1].clamp(min=0) * len(cov) * _EPS
    return vectors[:, kept] * values[kept].sqrt(), False


def _by_squares(cov: Tensor, factor: Tensor, triangular: bool) -> tuple[Tensor, Tensor]:
    """The sum of the roots of factorᵀ cov factor's eigenvalues, and an estimate of how far off it is.

    An eigenvalue is good to about ε times the largest one, so a root to the smaller of ε/(2 root) and √ε times that.
    """
    product = _congruent(cov, factor) if triangular else factor.T @ (cov @ factor)
    values = torch.linalg.eigvalsh(product)
    roots = values.clamp(min=0).sqrt()
    slack = _EPS * values.norm()
    return roots.sum(), (slack / (2 * roots).clamp(min=slack.sqrt())).sum()


def _congruent(cov: Tensor, factor: Tensor, block: int = 256) -> Tensor:
    """The lower triangle of factorᵀ cov factor for a lower triangular factor, at a third of the plain cost."""
    out = torch.zeros_like(cov)
    for i in range(0, len(cov), block):
        columns = slice(i, i + block)
        out[i:, columns] = factor[i:, i:].T @ (cov[i:, i:] @ factor[i:, columns])
    return out
