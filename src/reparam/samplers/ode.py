r"""Solvers of the probability-flow ODE, and EDM's stochastic one.

The ODE is :math:`dx/dt = \alpha'\,\hat x_0 + \sigma'\,\hat\varepsilon`. Divided by α or by σ it
becomes simpler still:

.. math:: \frac{d(x/\alpha)}{d(\sigma/\alpha)} = \hat\varepsilon, \qquad
          \frac{d(x/\sigma)}{d(\alpha/\sigma)} = \hat x_0 ;

the second is regular where α = 0.

References:
    Karras et al., arXiv 2206.00364, eq. 4, algorithms 1 and 2. Song et al., arXiv 2011.13456.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..denoiser import Coefficient, Estimate, weighted
from ..errors import ReparamError, SingularTime, TimeOutOfRange, Unsupported, unknown
from ..schedules import DDPM, Schedule
from .steps import Level, Linear, Row, Sampler, Step, levels, sqrt


@dataclass(frozen=True)
class Euler(Linear):
    """Euler steps in t of the probability-flow ODE."""

    name: ClassVar[str] = "euler"
    order: ClassVar[int] = 1
    needs_smooth: ClassVar[bool] = True

    def row(self, at: Step) -> Row:
        k, c = in_t(at.here)
        dt = at.to.t - at.here.t
        return Row(1 + dt * k, dt * c)


def in_t(here: Level) -> tuple[Coefficient, Coefficient]:
    """(k, c) of dx/dt = k x + c x̂0 = α' x̂0 + σ' ε̂, with ε̂ = (x − α x̂0)/σ."""
    k = here.sigma_dot / here.sigma
    return k, here.alpha_dot - here.alpha * k


def in_noise(here: Level) -> tuple[Coefficient, Coefficient]:
    """(k, c) of d(x/α)/d(σ/α) = ε̂ = k x + c x̂0."""
    return 1 / here.sigma, -here.alpha / here.sigma


def in_signal(here: Level) -> tuple[Coefficient, Coefficient]:
    """(k, c) of d(x/σ)/d(α/σ) = x̂0 = k x + c x̂0."""
    return 0.0, 1.0


_Slope = Callable[[Level], tuple[Coefficient, Coefficient]]
#: For every variable u: its value at a level, the scale that makes x the state (x/1, x/α, x/σ), and the slope.
VARIABLES: dict[str, tuple[Callable[[Level], Coefficient], Callable[[Level], Coefficient], _Slope]] = {
    "t": (lambda at: at.t, lambda at: 1.0, in_t),
    "sigma/alpha": (lambda at: at.ratio, lambda at: at.alpha, in_noise),
    "alpha/sigma": (lambda at: at.alpha / at.sigma, lambda at: at.sigma, in_signal),
}


@dataclass(frozen=True)
class Heun(Sampler):
    """Heun's second-order steps; the last step, to t = 0, is Euler's (two evaluations a step).

    Args:
        variable: what the steps are taken in. "t", for smooth schedules; "sigma/alpha", Karras's,
            for all that starts with α > 0; "alpha/sigma", everywhere.
    """

    name: ClassVar[str] = "heun"
    order: ClassVar[int] = 2
    needs_smooth: ClassVar[bool] = True
    variable: str = "t"

    def __post_init__(self) -> None:
        if self.variable not in VARIABLES:
            raise unknown("variable of Heun", self.variable, VARIABLES)
        object.__setattr__(self, "needs_smooth", self.variable == "t")

    def check(self, path: Sequence[Level], schedule: Schedule) -> None:
        """Refuses α = 0 in σ/α as well."""
        super().check(path, schedule)
        if self.variable == "sigma/alpha":
            refuse_pure_noise(self.name, path, schedule)

    def step(self, x: Tensor, at: Step) -> tuple[Tensor, Estimate]:
        found = at.denoise(x, at.here.t)
        if at.to.t == 0:
            return found.mean, found
        value, scale, slope = VARIABLES[self.variable]
        du, scale_s = value(at.to) - value(at.here), scale(at.to)
        back = scale_s / scale(at.here)
        # The state is x/scale, so a slope of it counts scale_s in x_s.
        k, c = slope(at.here)
        guess = found.blend(back + scale_s * du * k, scale_s * du * c)
        half = scale_s * du / 2
        start = found.blend(back + half * k, half * c)
        k, c = slope(at.to)
        return start.add_(at.denoise(guess, at.to.t).blend(half * k, half * c)), found


@dataclass(frozen=True)
class EDM(Sampler):
    """Heun in σ/α with churn (Karras et al., algorithm 2).

    Before a step, noise is added until σ/α has grown by the factor 1 + γ, with
    γ = min(churn/steps, √2 − 1) where σ/α lies in [s_min, s_max], and 0 elsewhere. The time of
    the raised level must be one the model knows: keep ``s_max`` below the grid's first σ/α. For a network
    with time="step" it is that of the nearest step of the table, and as much noise is added as leads there: none
    where the step itself is the nearest, as between the first, coarse steps from the data.

    Args:
        churn: S_churn ≥ 0; 0, as in the paper, is the deterministic sampler.
        s_min, s_max: where there is churn, in σ/α.
        s_noise: S_noise, the standard deviation of the added noise relative to what is needed.
    """

    name: ClassVar[str] = "edm"
    order: ClassVar[int] = 2
    churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if not (self.churn >= 0 and self.s_noise >= 0 and 0 <= self.s_min <= self.s_max):
            raise ReparamError(f"EDM needs churn >= 0, s_noise >= 0 and 0 <= s_min <= s_max, found {self}.")

    @property
    def stochastic(self) -> bool:
        """It does where it churns."""
        return self.churn > 0

    def check(self, path: Sequence[Level], schedule: Schedule) -> None:
        """Refuses α = 0, and churn where σ/α is not one number."""
        super().check(path, schedule)
        refuse_pure_noise(self.name, path, schedule)
        if self.churn and isinstance(path[0].sigma, Tensor):
            raise Unsupported(f"edm's churn needs one sigma/alpha a time, and {schedule} is elementwise; use churn=0.")

    def asked(self, path: Sequence[Level], schedule: Schedule, on_steps: bool) -> list[float]:
        """Those of the path, and of the levels to which it raises them.

        Raises:
            TimeOutOfRange: if one lies beyond all noise of the schedule.
        """
        raised = [self._raised(here, schedule, len(path) - 1, on_steps).t for here in path[:-1]]
        return list(dict.fromkeys([*super().asked(path, schedule, on_steps), *raised]))

    def step(self, x: Tensor, at: Step) -> tuple[Tensor, Estimate]:
        here, raised = at.here, self._raised(at.here, at.schedule, at.steps, at.on_steps)
        if raised is not here:
            # x̂/α̂ = x/α + sqrt(σ̂² − σ²) S_noise z, in σ/α.
            growth = raised.ratio / here.ratio
            added = self.s_noise * here.ratio * sqrt((growth - 1) * (growth + 1))
            x = weighted(raised.alpha / here.alpha, x, raised.alpha * added, at.noise())
        return Heun("sigma/alpha").step(x, Step(raised, at.to, at.schedule, at.denoise, at.noise))

    def _raised(self, here: Level, schedule: Schedule, steps: int, on_steps: bool) -> Level:
        """The level of more noise from which the step is taken; ``here`` itself where there is no churn."""
        if not (self.churn and self.s_min <= here.ratio <= self.s_max):
            return here
        gamma = min(self.churn / steps, math.sqrt(2) - 1)
        try:
            t = float(schedule.time_at(2 * (here.lam - math.log1p(gamma))))
        except TimeOutOfRange as e:
            raise TimeOutOfRange(
                f"edm's churn raises sigma/alpha = {here.ratio:g} by the factor {1 + gamma:g}, beyond all noise of "
                f"{schedule}; give EDM an s_max below {here.ratio:g}."
            ) from e
        if on_steps:
            assert isinstance(schedule, DDPM)
            t = round(t * schedule.T) / schedule.T
        return levels(schedule, [t])[0] if t > here.t else here


def refuse_pure_noise(name: str, path: Sequence[Level], schedule: Schedule) -> None:
    """σ/α is infinite where α = 0."""
    for at in path:
        if bool(torch.as_tensor(at.alpha == 0).any()):
            raise SingularTime(
                f"{name} steps in sigma/alpha, which is infinite at t = {at.t:g} under {schedule}; begin the grid "
                "below that time (times=, or start= of a grid), or use Heun(variable='alpha/sigma') or 'ddim'."
            )
