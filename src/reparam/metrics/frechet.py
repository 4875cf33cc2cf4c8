"""Fréchet distance between Gaussians, and the moments it needs, in float64 and without SciPy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError

_EPS = torch.finfo(torch.float64).eps
#: Up to this error, in proportion to the distance, squared singular values will do.
_TOLERANCE = 1e-7


class Moments:
    """Mean and covariance of features, streamed and merged exactly in any order.

    Rows are gathered in a buffer and counted in many at a time, so that small batches cost no more than large
    ones; the batch size does not change a bit of the result. In float64; each block of rows is centred on its
    own mean before it is squared, so that a large common offset costs no accuracy.

    Args:
        dim: the number of features.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._count = 0  # of the rows in mean and scatter; others wait in the buffer
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)
        self._buffer: Tensor | None = None
        self._waiting = 0

    @classmethod
    def of(cls, count: int, mean: Tensor, scatter: Tensor) -> Moments:
        """Moments known already: of ``count`` samples, with mean [dim] and Σ (x − mean)(x − mean)ᵀ [dim, dim]."""
        found = cls(0)
        found.dim, found._count = len(mean), count
        found._mean, found._scatter = mean.double(), scatter.double()
        return found

    def update(self, features: Tensor) -> None:
        """Count ``features`` of shape [n, dim] in; they are copied.

        Raises:
            DataError: if the shape is another, or a feature is not finite; nothing is counted in then.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise DataError(f"expected features of shape [n, {self.dim}], found {list(features.shape)}.")
        if len(features) == 0:
            return
        x = features.detach().cpu()
        if not all(bool(v.isfinite()) for v in x.aminmax()):
            raise DataError("features hold NaN or infinity; moments of them would mean nothing.")
        if self._buffer is None:  # one row more than are gathered: see _fold
            self._buffer = torch.empty(self._room + 1, self.dim, dtype=torch.float64)
        while len(x):
            part, x = x.tensor_split([self._room - self._waiting])
            self._buffer[self._waiting : self._waiting + len(part)] = part
            self._waiting += len(part)
            if self._waiting == self._room:
                self._fold()

    def merge(self, other: Moments) -> None:
        """Count in what another one has seen.

        Raises:
            DataError: if it has another number of features.
        """
        self._same(other)
        self._fold()
        if other.count:
            total = self._count + other.count
            shift = other.mean - self._mean
            joint = torch.outer(shift * (self._count * other.count / total), shift)
            self._scatter = joint.add_(self._scatter).add_(other.scatter)
            self._mean = self._mean + shift * (other.count / total)
            self._count = total

    def without(self, other: Moments) -> Moments:
        """The moments of what remains when samples that were counted in here, and in ``other``, are taken away.

        The inverse of :meth:`merge`: with n of N samples remaining and m = N − n taken, of mean μ' where all have μ,
        the mean is μ + (μ − μ') m/n and the scatter S − S' − (μ' − μ)(μ' − μ)ᵀ N m/n. Rounding is that of the whole,
        so that little is left of the accuracy where hardly a sample remains.

        Raises:
            DataError: if it has another number of features, or has seen more samples than these are.
        """
        self._same(other)
        left = self.count - other.count
        if left < 0:
            raise DataError(f"cannot take {other.count} samples from {self.count}: these were not all counted in here.")
        if left == 0:
            return Moments(self.dim)
        shift = other.mean - self.mean
        joint = torch.outer(shift * (-self.count * other.count / left), shift)
        scatter = joint.add_(self.scatter).sub_(other.scatter)
        return Moments.of(left, self.mean - shift * (other.count / left), scatter)

    def _same(self, other: Moments) -> None:
        if other.dim != self.dim:
            raise DataError(f"expected moments of {self.dim} features, found moments of {other.dim}.")

    @property
    def _room(self) -> int:
        """So many rows are counted in at a time: enough that adding a [dim, dim] matrix up is little beside them."""
        return min(max(self.dim, 1024), 4096)

    def _fold(self) -> None:
        """Count in what waits in the buffer."""
        n, self._waiting = self._waiting, 0
        if self._buffer is None or n == 0:
            return
        rows = self._buffer[: n + 1]
        mean = rows[:n].mean(0)
        shift = mean - self._mean
        total = self._count + n
        rows[:n] -= mean
        # What the two means add to the scatter is the outer product of one more row.
        rows[n] = shift * (self._count * n / total) ** 0.5
        with_numpy = rows.numpy()  # whose product of a matrix with itself takes half the time of torch's
        self._scatter = torch.from_numpy(with_numpy.T @ with_numpy).add_(self._scatter)
        self._mean = self._mean + shift * (n / total)
        self._count = total

    def _settle(self) -> None:
        """Count in what waits and give the buffer back."""
        self._fold()
        self._buffer = None

    @property
    def count(self) -> int:
        """How many samples were counted in."""
        return self._count + self._waiting

    @property
    def mean(self) -> Tensor:
        """Their mean, float64, shape [dim]."""
        self._settle()
        return self._mean

    @property
    def scatter(self) -> Tensor:
        """Σ (x − mean)(x − mean)ᵀ over them, float64, shape [dim, dim]."""
        self._settle()
        return self._scatter

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
    values = torch.from_numpy(np.linalg.eigvalsh(product.numpy()))  # reads the lower triangle; faster than torch's
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
