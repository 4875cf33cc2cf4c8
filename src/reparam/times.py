"""Which noise levels training draws.

A distribution of times on (0, 1) is given by its quantile function, so that one uniform
number a sample decides the time: draws can be shared between runs, stratified, and
restricted to a range exactly, without rejection.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import TimeOutOfRange, Unsupported
from .schedules import build, config_of


class Times(ABC):
    """A distribution over t in (0, 1)."""

    name: ClassVar[str]

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """The time below which a share ``u`` of the draws lies; float64 in, float64 out."""

    @abstractmethod
    def cdf(self, t: Tensor) -> Tensor:
        """The share of draws below ``t``; the inverse of :meth:`quantile`."""

    @abstractmethod
    def log_prob(self, t: Tensor) -> Tensor:
        """The log density at ``t``; −∞ outside."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` independent times, float64 on the generator's device (CPU without one)."""
        return self.quantile(open_uniform(n, generator))

    def within(self, low: float, high: float) -> Times:
        """The same distribution, given that the time lies in [low, high]."""
        return self if (low, high) == (0.0, 1.0) else Within(self, low, high)

    def config(self) -> Any:
        """The distribution as plain data, from which :func:`times` builds it again."""
        return config_of(self)


def open_uniform(n: int, generator: torch.Generator | None = None) -> Tensor:
    """``n`` uniform numbers strictly inside (0, 1), float64: no draw ever falls on an end."""
    device = generator.device if generator is not None else "cpu"
    steps = torch.randint(0, 2**52, (n,), generator=generator, device=device)
    return (steps.to(torch.float64) + 0.5) * 2.0**-52


@dataclass(frozen=True)
class Uniform(Times):
    """All times alike."""

    name: ClassVar[str] = "uniform"

    def quantile(self, u: Tensor) -> Tensor:
        return u

    def cdf(self, t: Tensor) -> Tensor:
        return t.clamp(0, 1)

    def log_prob(self, t: Tensor) -> Tensor:
        return torch.where((t >= 0) & (t <= 1), 0.0, -torch.inf).to(t.dtype)


@dataclass(frozen=True)
class LogitNormal(Times):
    """log(t/(1 − t)) ~ N(mean, std²) (Esser et al., arXiv 2403.03206, section 3.1).

    JiT's (arXiv 2511.13720) is mean +0.8, std 0.8 in our time: mostly noisy.
    """

    name: ClassVar[str] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.std < math.inf and math.isfinite(self.mean)):
            raise Unsupported(
                f"logit_normal needs a finite mean and a positive std, found {self.mean!r}, {self.std!r}."
            )

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def cdf(self, t: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(t) - self.mean) / self.std)

    def log_prob(self, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.mean) / self.std
        density = -(z**2) / 2 - math.log(self.std * math.sqrt(2 * math.pi)) - t.log() - torch.log1p(-t)
        return torch.where((t > 0) & (t < 1), density, -torch.inf)


@dataclass(frozen=True)
class Within(Times):
    """A distribution, given that the time lies in [low, high]."""

    base: Times
    low: float
    high: float
    name: ClassVar[str] = "within"

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise TimeOutOfRange(
                f"a range of times is two increasing numbers in [0, 1], found [{self.low!r}, {self.high!r}]."
            )
        below, upto = self._shares().tolist()
        if not upto - below > 1e-12:
            raise Unsupported(
                f"{self.base} draws no times in [{self.low:g}, {self.high:g}]; change the distribution or t_range."
            )

    def _shares(self) -> Tensor:
        return self.base.cdf(torch.tensor([self.low, self.high], dtype=torch.float64))

    def quantile(self, u: Tensor) -> Tensor:
        below, upto = self._shares().tolist()
        return self.base.quantile(below + u * (upto - below)).clamp(self.low, self.high)

    def cdf(self, t: Tensor) -> Tensor:
        below, upto = self._shares().tolist()
        return ((self.base.cdf(t) - below) / (upto - below)).clamp(0, 1)

    def log_prob(self, t: Tensor) -> Tensor:
        below, upto = self._shares().tolist()
        inside = (t >= self.low) & (t <= self.high)
        return torch.where(inside, self.base.log_prob(t) - math.log(upto - below), -torch.inf)


TIMES: dict[str, type[Times]] = {c.name: c for c in (Uniform, LogitNormal)}


def times(which: str | dict[str, Any] | Times) -> Times:
    """A distribution of times by name, or by a mapping of name and arguments, or itself.

    Raises:
        UnknownName: if there is none of that name, or it has no such argument.
    """
    if isinstance(which, Times):
        return which
    built: Times = build("distribution of times", TIMES, which)
    return built
