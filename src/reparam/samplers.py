r"""From noise to data.

A sampler is a class with an ``order`` and a ``step``; :func:`sample` walks it along a grid of
falling times. Every step works from the x0 estimate, in float32 or better, and a step to
t = 0 returns that estimate, so that nothing is ever divided by σ = 0.

References:
    DDIM: Song et al., arXiv 2010.02502, eq. 12. Heun: Karras et al., arXiv 2206.00364, algorithm 1.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .denoiser import Denoiser, Posterior, evaluating
from .errors import ReparamError, TimeOutOfRange, Unsupported, unknown
from .schedules import DDPM, Schedule


@dataclass(frozen=True)
class Step:
    """One step of the grid, as a sampler sees it: from time ``t`` down to ``s``."""

    t: float
    s: float
    schedule: Schedule
    #: The posterior of x0 at a state and a time.
    denoise: Callable[[Tensor, float], Posterior]
    #: Fresh standard normal noise of the state's shape.
    noise: Callable[[], Tensor]


class Sampler(ABC):
    """A way from x_t to x_s."""

    name: ClassVar[str]
    #: The global error falls with the step size to this power (the deterministic part).
    order: ClassVar[int]
    #: Steps in t itself, so α and σ must be differentiable.
    needs_smooth: ClassVar[bool] = False

    @abstractmethod
    def step(self, x: Tensor, at: Step) -> tuple[Tensor, Tensor]:
        """(x_s, the x0 estimate at t) from x_t, shape [B, …]."""


def _slope(x: Tensor, mean: Tensor, t: float, schedule: Schedule) -> Tensor:
    """dx/dt = α' x0 + σ' ε, with ε = (x − α x0)/σ."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    ratio = schedule.sigma_dot(t) / sigma
    return ratio * x + (schedule.alpha_dot(t) - alpha * ratio) * mean


@dataclass(frozen=True)
class Euler(Sampler):
    """Euler steps in t of the probability-flow ODE."""

    name: ClassVar[str] = "euler"
    order: ClassVar[int] = 1
    needs_smooth: ClassVar[bool] = True

    def step(self, x: Tensor, at: Step) -> tuple[Tensor, Tensor]:
        mean = at.denoise(x, at.t).mean
        if at.s == 0:
            return mean, mean
        return x + (at.s - at.t) * _slope(x, mean, at.t, at.schedule), mean


@dataclass(frozen=True)
class Heun(Sampler):
    """Heun's second-order steps in t; the last step, to t = 0, is Euler's (two evaluations a step)."""

    name: ClassVar[str] = "heun"
    order: ClassVar[int] = 2
    needs_smooth: ClassVar[bool] = True

    def step(self, x: Tensor, at: Step) -> tuple[Tensor, Tensor]:
        mean = at.denoise(x, at.t).mean
        if at.s == 0:
            return mean, mean
        slope = _slope(x, mean, at.t, at.schedule)
        guess = x + (at.s - at.t) * slope
        slope_s = _slope(guess, at.denoise(guess, at.s).mean, at.s, at.schedule)
        return x + (at.s - at.t) / 2 * (slope + slope_s), mean


@dataclass(frozen=True)
class DDIM(Sampler):
    r"""x_s = α_s x̂0 + sqrt(σ_s² − η²σ̃²) ε̂ + η σ̃ z, with
    σ̃² = σ_s² (1 − α_t²σ_s²/(α_s²σ_t²)) the variance of x_s given x_t and x0.

    Args:
        eta: 0 for the deterministic sampler, 1 for DDPM's ancestral noise; in [0, 1].
    """

    name: ClassVar[str] = "ddim"
    order: ClassVar[int] = 1
    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise Unsupported(f"DDIM's eta lies in [0, 1], found {self.eta!r}.")

    def step(self, x: Tensor, at: Step) -> tuple[Tensor, Tensor]:
        mean = at.denoise(x, at.t).mean
        if at.s == 0:
            return mean, mean
        alpha, sigma = at.schedule.alpha(at.t), at.schedule.sigma(at.t)
        alpha_s, sigma_s = at.schedule.alpha(at.s), at.schedule.sigma(at.s)
        ratio = (alpha * sigma_s) / (alpha_s * sigma)  # (SNR_t / SNR_s)^½, at most 1
        spread = self.eta * sigma_s * (1 - ratio**2).clamp(min=0).sqrt()
        kept = (sigma_s**2 - spread**2).clamp(min=0).sqrt() / sigma
        x_s = (alpha_s - kept * alpha) * mean + kept * x
        return (x_s + spread * at.noise() if self.eta else x_s), mean


SAMPLERS: dict[str, type[Sampler]] = {c.name: c for c in (Euler, Heun, DDIM)}


def named(which: str | Sampler) -> Sampler:
    """A sampler by name, or itself.

    Raises:
        UnknownName: if there is none of that name.
    """
    if isinstance(which, Sampler):
        return which
    if which not in SAMPLERS:
        raise unknown("sampler", which, SAMPLERS)
    return SAMPLERS[which]()


@dataclass(frozen=True)
class Trajectory:
    """What happened on the way.

    Attributes:
        x: the result, shape [B, …].
        times: the grid, length steps + 1, falling.
        states: x at every time of the grid, shape [steps + 1, B, …].
        x0: what the model believed x0 to be at the start of every step, shape [steps, B, …].
    """

    x: Tensor
    times: list[float]
    states: Tensor
    x0: Tensor


def grid(denoiser: Denoiser, steps: int) -> list[float]:
    """``steps`` even steps in t from the end of t_range down to 0.

    The network is not asked below t_range: where the even grid would, the grid is spread over
    t_range instead and its last step leaps to 0. For time="step" it lies on the table's steps.

    Raises:
        Unsupported: if there are fewer than one step, or more than a table has.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise Unsupported(f"steps must be a positive integer, found {steps!r}.")
    low, high = denoiser.t_range
    times = torch.linspace(high, 0, steps + 1, dtype=torch.float64)
    if times[-2] < low:
        times[:-1] = torch.linspace(high, low, steps, dtype=torch.float64)
    schedule = denoiser.schedule
    if denoiser.conventions.time == "step" and isinstance(schedule, DDPM):
        times[:-1] = schedule.on_steps(times[:-1], high)
        if len(times.unique()) <= steps:
            raise Unsupported(f"{steps} steps are more than this table of {schedule.T} has in t_range.")
    return [float(t) for t in times]


def _checked(times: Sequence[float] | Tensor, denoiser: Denoiser) -> list[float]:
    falling = [float(t) for t in times]
    if len(falling) < 2 or any(not a > b for a, b in itertools.pairwise(falling)):
        raise ReparamError(f"times must be at least two falling numbers, found {falling[:6]}.")
    low, high = denoiser.t_range
    outside = [t for t in falling if not (t == 0 or low <= t <= high)]
    if outside:
        raise TimeOutOfRange(
            f"times has {outside[0]:g}, but this model was trained on t in [{low:g}, {high:g}]; start at "
            f"{high:g} or below (the last time may be 0)."
        )
    return falling


def sample(
    denoiser: Denoiser,
    shape_or_noise: Sequence[int] | Tensor,
    *,
    sampler: str | Sampler = "heun",
    steps: int = 50,
    times: Sequence[float] | Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    trajectory: bool = False,
) -> Tensor | Trajectory:
    """Samples, from noise.

    Args:
        denoiser: the model.
        shape_or_noise: the shape [B, …] to draw unit noise in, or unit noise (it is multiplied
            by σ at the first time; its dtype, at least float32, is the state's).
        sampler: "euler", "heun" or "ddim", or an object such as ``DDIM(eta=1.0)``.
        steps: the number of even steps in t, where ``times`` is not given.
        times: a falling grid instead. One that ends above 0 returns x at that time.
        cond: passed on to the network.
        generator: for the initial noise and for whatever the sampler draws.
        trajectory: return a :class:`Trajectory`, with the x0 estimate at every step.

    Returns:
        x of shape [B, …], or the trajectory.

    Raises:
        Unsupported: if the sampler steps in t and the schedule is a table.
        TimeOutOfRange: if a time lies outside the model's t_range.
    """
    method = named(sampler)
    if method.needs_smooth and not denoiser.schedule.smooth:
        raise Unsupported(f"{method.name} steps in t, where {denoiser.schedule} has kinks; use sampler='ddim'.")
    path = grid(denoiser, steps) if times is None else _checked(times, denoiser)
    x = _unit_noise(denoiser, shape_or_noise, generator) * denoiser.schedule.sigma(path[0])
    kept = dict(cond or {})
    states, beliefs = [x], []

    def noise() -> Tensor:
        return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)

    with evaluating(denoiser):
        for t, s in itertools.pairwise(path):
            at = Step(t, s, denoiser.schedule, lambda x, t: denoiser(x, t, **kept), noise)
            x, mean = method.step(x, at)
            if trajectory:
                states.append(x)
                beliefs.append(mean)
    return Trajectory(x, path, torch.stack(states), torch.stack(beliefs)) if trajectory else x


def _unit_noise(model: nn.Module, shape_or_noise: Sequence[int] | Tensor, generator: torch.Generator | None) -> Tensor:
    if isinstance(shape_or_noise, Tensor):
        return shape_or_noise.to(torch.promote_types(shape_or_noise.dtype, torch.float32))
    shape = tuple(shape_or_noise)
    if not shape or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ReparamError(f"the shape to sample is a batch and the data's own shape, found {list(shape)}.")
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    drawn_on = generator.device if generator is not None else device
    return torch.randn(math.prod(shape), generator=generator, device=drawn_on).reshape(shape).to(device)
