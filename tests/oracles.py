"""Exact answers, in float64, that the code is held against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reparam.schedules import Schedule
from reparam.targets import Target


class GaussianOracle(nn.Module):
    """The ideal network for Gaussian data: whatever the target asks for, exactly.

    Args:
        mean: shape [D]. cov: shape [D, D].
    """

    def __init__(self, mean: Tensor, cov: Tensor, schedule: Schedule, target: Target) -> None:
        super().__init__()
        self.mean, self.cov, self.schedule, self.target = mean, cov, schedule, target

    def posterior_mean(self, x: Tensor, t: float) -> Tensor:
        """E[x0 | x_t]: mean + αC(α²C + σ²)⁻¹(x − α mean)."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        marginal = alpha**2 * self.cov + sigma**2 * torch.eye(len(self.mean), dtype=torch.float64)
        gain = alpha * self.cov @ torch.linalg.inv(marginal)
        return self.mean + (x - alpha * self.mean) @ gain.T

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """p E[x0 | x_t] + q E[ε | x_t] at one common time."""
        t = time.flatten()[0].double()
        x0 = self.posterior_mean(x, float(t))
        eps = (x - self.schedule.alpha(t) * x0) / self.schedule.sigma(t)
        p, q = self.target.rows(t, self.schedule)
        return p * x0 + q * eps

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
