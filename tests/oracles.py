"""Exact answers, in float64, that the code is held against.

All data here are mixtures of Gaussians: one Gaussian is a mixture of one, and a finite data set
one of points. Given x_t, every component keeps a Gaussian posterior, and their weights follow
from its likelihood; everything is summed by logsumexp.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from reparam.schedules import Schedule
from reparam.targets import Target


class MixtureOracle(nn.Module):
    """The ideal network for a mixture of Gaussians: whatever the target asks for, exactly.

    Args:
        weights: shape [K], positive. means: [K, D]. covs: [K, D, D], singular ones allowed.
    """

    def __init__(self, weights: Tensor, means: Tensor, covs: Tensor, schedule: Schedule, target: Target) -> None:
        super().__init__()
        self.log_weights = (weights / weights.sum()).double().log()
        self.means, self.covs = means.double(), covs.double()
        self.schedule, self.target = schedule, target

    def _components(self, x: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """Log joint density [B, K], whitened deviation M⁻¹(x − αm) [B, K, D], and M⁻¹ [K, D, D]."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        eye = torch.eye(self.means.shape[1], dtype=torch.float64)
        marginal = alpha**2 * self.covs + sigma**2 * eye
        inverse = torch.linalg.inv(marginal)
        deviation = x[:, None] - alpha * self.means
        solved = torch.einsum("kij,bkj->bki", inverse, deviation)
        log_density = -(deviation * solved).sum(-1) / 2 - torch.logdet(2 * math.pi * marginal) / 2
        return self.log_weights + log_density, solved, inverse

    def log_density(self, x: Tensor, t: float) -> Tensor:
        """log p(x_t), shape [B]."""
        return self._components(x, t)[0].logsumexp(1)

    def score(self, x: Tensor, t: float) -> Tensor:
        """∇ log p(x_t), shape [B, D]."""
        joint, solved, _ = self._components(x, t)
        return -(joint.softmax(1)[..., None] * solved).sum(1)

    def posterior(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """E[x0 | x_t] of shape [B, D] and Cov[x0 | x_t] of shape [B, D, D]."""
        joint, solved, inverse = self._components(x, t)
        share = joint.softmax(1)
        alpha = self.schedule.alpha(t)
        means = self._means(solved, t)
        covs = self.covs - alpha**2 * self.covs @ inverse @ self.covs
        mean = (share[..., None] * means).sum(1)
        apart = means - mean[:, None]
        cov = torch.einsum("bk,kij->bij", share, covs) + torch.einsum("bk,bki,bkj->bij", share, apart, apart)
        return mean, cov

    def posterior_mean(self, x: Tensor, t: float) -> Tensor:
        """E[x0 | x_t], shape [B, D]."""
        joint, solved, _ = self._components(x, t)
        return (joint.softmax(1)[..., None] * self._means(solved, t)).sum(1)

    def _means(self, solved: Tensor, t: float) -> Tensor:
        """Every component's own E[x0 | x_t], shape [B, K, D]."""
        return self.means + self.schedule.alpha(t) * torch.einsum("kij,bkj->bki", self.covs, solved)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """p E[x0 | x_t] + q E[ε | x_t]; the times [B] may differ."""
        time = time.double()
        if not bool((time == time[0]).all()):
            return torch.cat([self(x[i : i + 1], time[i : i + 1]) for i in range(len(x))])
        t = time[0]
        x0 = self.posterior_mean(x, float(t))
        eps = (x - self.schedule.alpha(t) * x0) / self.schedule.sigma(t)
        p, q = self.target.rows(t, self.schedule)
        return p * x0 + q * eps


class GaussianOracle(MixtureOracle):
    """The ideal network for Gaussian data.

    Args:
        mean: shape [D]. cov: shape [D, D].
    """

    def __init__(self, mean: Tensor, cov: Tensor, schedule: Schedule, target: Target) -> None:
        super().__init__(torch.ones(1), mean[None], cov[None], schedule, target)
        self.mean, self.cov = mean, cov

    def flow(self, x: Tensor, t: float, s: float) -> Tensor:
        """The exact solution of the probability-flow ODE from time t to s.

        Along an eigenvector of C with eigenvalue c the deviation from the mean scales with the
        marginal standard deviation sqrt(α²c + σ²).
        """
        values, vectors = torch.linalg.eigh(self.cov)

        def spread(at: float) -> Tensor:
            return (self.schedule.alpha(at) ** 2 * values + self.schedule.sigma(at) ** 2).sqrt()

        deviation = (x - self.schedule.alpha(t) * self.mean) @ vectors
        return self.schedule.alpha(s) * self.mean + (deviation * spread(s) / spread(t)) @ vectors.T

    def marginal(self, t: float) -> tuple[Tensor, Tensor]:
        """Mean and covariance of x_t."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return alpha * self.mean, alpha**2 * self.cov + sigma**2 * torch.eye(len(self.mean), dtype=torch.float64)


class EmpiricalOracle(MixtureOracle):
    """The ideal network for a finite data set, all points alike.

    Args:
        points: shape [N, D].
    """

    def __init__(self, points: Tensor, schedule: Schedule, target: Target) -> None:
        n, d = points.shape
        super().__init__(torch.ones(n), points, torch.zeros(n, d, d), schedule, target)
