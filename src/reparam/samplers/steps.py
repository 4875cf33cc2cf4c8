r"""What a sampler sees of a step, and what it is.

With λ = log(α/σ), half the log-SNR, and h = λ_s − λ_t, every step from t to s that asks the
network once is a row: :math:`x_s = k\,x_t + c\,\hat x_0 + c'\,\hat x_0^{\text{before}} + g\,z`.
Its coefficients are Python floats, computed in float64; of an elementwise schedule they are float64
tensors of the data's shape, on the state's device where that has float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..denoiser import Coefficient, Estimate, resident, weighted
from ..errors import Unsupported
from ..schedules import Schedule


class Level(NamedTuple):
    """The forward process at one time, as numbers."""

    t: float
    alpha: Coefficient
    sigma: Coefficient
    #: Not a number on the way of a sampler that does not step in t.
    alpha_dot: Coefficient
    sigma_dot: Coefficient
    #: log(α/σ), half the log-SNR, the noise level's name even where σ differs by element: ±∞ where σ or α is 0.
    lam: float

    @property
    def ratio(self) -> Coefficient:
        """σ/α: the noise level of Karras et al."""
        return self.sigma / self.alpha


def levels(schedule: Schedule, times: Sequence[float], slopes: bool = True) -> list[Level]:
    """The forward process at all of ``times``, computed at once in float64; the derivatives only if ``slopes``."""
    t = torch.tensor(times, dtype=torch.float64)
    unused = torch.full_like(t, math.nan)
    dots = [schedule.alpha_dot(t), schedule.sigma_dot(t)] if slopes else [unused, unused]
    columns = [schedule.alpha(t), schedule.sigma(t), *dots, schedule.log_snr(t) / 2]
    rows = (c.tolist() if c.shape == t.shape else c.unbind() for c in columns)
    return [Level(*row) for row in zip(times, *rows, strict=True)]


def moved(path: Sequence[Level], device: torch.device) -> list[Level]:
    """The path with elementwise coefficients on the device where the steps are taken."""
    if not any(isinstance(c, Tensor) for c in path[0]):
        return list(path)
    return [Level(*(resident(c, device, len(path)) for c in at)) for at in path]  # type: ignore[arg-type]


def sqrt(value: Coefficient) -> Coefficient:
    """Its square root."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


class Before(NamedTuple):
    """The memory of a multistep sampler: the step before this one."""

    level: Level
    estimate: Estimate


class Step(NamedTuple):
    """One step of the grid, from ``here`` (time t) to ``to`` (time s, lower when sampling)."""

    here: Level
    to: Level
    schedule: Schedule
    #: The estimate of x0 at a state and a time.
    denoise: Callable[[Tensor, float], Estimate]
    #: Fresh standard normal noise of the state's shape.
    noise: Callable[[], Tensor]
    #: The number of steps of the grid.
    steps: int = 1
    #: What was asked at the start of the step before; None in the first step.
    before: Before | None = None
    #: The network knows the integer steps of the schedule's table alone.
    on_steps: bool = False


class Sampler(ABC):
    """A way from x_t to x_s. A new one is a subclass with an ``order`` and a :meth:`step`."""

    name: ClassVar[str]
    #: The global error falls with the step size to this power (the deterministic part).
    order: ClassVar[int]
    #: Steps in t itself, so α and σ must be differentiable.
    needs_smooth: ClassVar[bool] = False

    @property
    def stochastic(self) -> bool:
        """It draws noise on the way."""
        return False

    @abstractmethod
    def step(self, x: Tensor, at: Step) -> tuple[Tensor, Estimate]:
        """(x_s, the x0 estimate at t) from x_t, shape [B, …]; at s = 0, x_s is the estimate's mean."""

    def asked(self, path: Sequence[Level], schedule: Schedule, on_steps: bool) -> list[float]:
        """The times at which the network is asked, for which all is prepared before the first step."""
        return [at.t for at in path if at.t > 0]

    def check(self, path: Sequence[Level], schedule: Schedule) -> None:
        """Refuses a grid that the sampler cannot walk.

        Raises:
            Unsupported: if the sampler steps in t and the schedule is a table.
        """
        if self.needs_smooth and not schedule.smooth:
            raise Unsupported(
                f"{self.name} steps in t, where {schedule} has kinks; use sampler='ddim', sampler='dpmpp_2m' or "
                "Heun(variable='alpha/sigma')."
            )


class Row(NamedTuple):
    """x_s = x·x_t + mean·x̂0 + before·x̂0(before) + noise·z."""

    x: Coefficient
    mean: Coefficient
    before: Coefficient | None = None
    noise: Coefficient | None = None


class Linear(Sampler):
    """A sampler whose step is a :class:`Row`: it asks the network once, and may remember the last answer."""

    @abstractmethod
    def row(self, at: Step) -> Row:
        """The step's coefficients, for s > 0."""

    def step(self, x: Tensor, at: Step) -> tuple[Tensor, Estimate]:
        found = at.denoise(x, at.here.t)
        if at.to.t == 0:
            return found.mean, found
        row = self.row(at)
        x_s = found.blend(row.x, row.mean)
        if row.before is not None and at.before is not None:
            x_s = weighted(1.0, x_s, row.before, at.before.estimate.mean)
        if row.noise is not None:
            x_s = weighted(1.0, x_s, row.noise, at.noise())
        return x_s, found


def correlation(at: Step) -> Coefficient:
    """e^{−h} = α_t σ_s/(α_s σ_t), the square root of SNR_t/SNR_s: at most 1 when sampling."""
    return (at.here.alpha * at.to.sigma) / (at.to.alpha * at.here.sigma)


def lost(at: Step) -> float:
    """1 − e^{−2h}, without cancellation for short steps: 1 less the correlation squared."""
    exponent = 2 * (at.here.lam - at.to.lam)
    return -math.expm1(exponent)
