"""The walk along a grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser, Estimate, Posterior, estimate, evaluating, prepared, weighted
from ..errors import Conflict, ReparamError, TimeOutOfRange, Unsupported, unknown
from .ddim import DDIM, Ancestral
from .dpm import DPMpp2M, SDEDPMpp2M
from .grids import GRIDS
from .ode import EDM, Euler, Heun
from .steps import Before, Level, Sampler, Step, levels, moved

SAMPLERS: dict[str, type[Sampler]] = {c.name: c for c in (Euler, Heun, DDIM, Ancestral, EDM, DPMpp2M, SDEDPMpp2M)}


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
        times: the grid, length steps + 1.
        states: x at every time of the grid, shape [steps + 1, B, …].
        x0: what the model believed x0 to be at the start of every step, shape [steps, B, …].
        var: and how sure of it: its variance by element, of that shape; None where the model has none.
        root: a root of the covariance, [steps, B, D, D], where that is full.
    """

    x: Tensor
    times: list[float]
    states: Tensor
    x0: Tensor
    var: Tensor | None = None
    root: Tensor | None = None


def sample(
    denoiser: Denoiser,
    shape_or_noise: Sequence[int] | Tensor | None = None,
    *,
    sampler: str | Sampler = "heun",
    steps: int = 50,
    grid: str | Callable[[Denoiser, int], Sequence[float]] = "linear",
    times: Sequence[float] | Tensor | None = None,
    start: Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    noises: Iterable[Tensor] | None = None,
    trajectory: bool = False,
) -> Tensor | Trajectory:
    """Samples, from noise; or onward from any x_t; or, on rising times, noise from data.

    Args:
        denoiser: the model.
        shape_or_noise: the shape [B, …] to draw unit noise in, or unit noise (it is multiplied
            by σ at the first time; its dtype, at least float32, is the state's).
        sampler: a name in ``SAMPLERS``, or an object such as ``DDIM(eta=1.0)``.
        steps: the number of steps of ``grid``.
        grid: a name in ``GRIDS``, or a function (denoiser, steps) → times.
        times: the times themselves instead. A grid that ends above 0 returns x at that time. Rising
            times invert (from ``start``, with a deterministic sampler): a step away from t = 0
            itself is x_s = α_s x0, as the mean noise in clean data is 0.
        start: x at the first time, in place of noise. Image-to-image:
            ``start=schedule.add_noise(x0, eps, 0.6)`` with
            ``times=samplers.grids.linear(denoiser, 30, start=0.6)``.
        cond: passed on to the network.
        generator: for the initial noise and for whatever the sampler draws.
        noises: unit noise for the steps, in turn, instead of drawing it; shape [B, …] each.
        trajectory: return a :class:`Trajectory`, with the x0 estimate at every step.

    Returns:
        x of shape [B, …], or the trajectory.

    Raises:
        Unsupported: if the sampler steps in t and the schedule is a table.
        SingularTime: if the sampler steps in σ/α and the grid begins where α = 0.
        TimeOutOfRange: if a time lies outside the model's t_range, one to which churn raises included.
        Conflict: if both a start and noise are given, or neither.
    """
    method = named(sampler)
    times = _grid(grid)(denoiser, steps) if times is None else times
    path = levels(denoiser.schedule, _checked(times, denoiser, method, start is not None), method.needs_smooth)
    method.check(path, denoiser.schedule)
    x = _start(denoiser, shape_or_noise, start, path[0], generator)
    noise = _noise(x, generator, noises)
    kept = dict(cond or {})
    on_steps = denoiser.conventions.time == "step"
    asked = _known(method.asked(path, denoiser.schedule, on_steps), denoiser, method)

    def denoise(x: Tensor, t: float) -> Estimate:
        return estimate(denoiser, x, t, kept)

    step = partial(Step, schedule=denoiser.schedule, denoise=denoise, noise=noise, on_steps=on_steps)
    with evaluating(denoiser), prepared(denoiser, asked, x):
        return _walked(method, moved(path, x.device), x, step, trajectory)


def _walked(
    method: Sampler, path: Sequence[Level], x: Tensor, step: Callable[..., Step], trajectory: bool
) -> Tensor | Trajectory:
    """From x at the first time of the path to its last. ``step``: what every step is told besides its two ends."""
    states, found, before = [x], [], None
    for here, to in itertools.pairwise(path):
        if here.t == 0:  # only where a rising grid begins
            x, belief = weighted(to.alpha / here.alpha, x, 0.0, x), Estimate(x, 1 / here.alpha, 0.0, x)
        else:
            x, belief = method.step(x, step(here, to, steps=len(path) - 1, before=before))
        before = Before(here, belief)
        if trajectory:
            states.append(x)
            found.append(Posterior(belief.mean, belief.var, belief.root))
    if not trajectory:
        return x
    x0, var, root = (_stacked(parts) for parts in zip(*found, strict=True))
    assert x0 is not None
    return Trajectory(x, [at.t for at in path], torch.stack(states), x0, var, root)


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """One tensor of what every step has, None where some have none."""
    present = [p for p in parts if p is not None]
    return torch.stack(present) if len(present) == len(parts) else None


def _grid(which: str | Callable[[Denoiser, int], Sequence[float]]) -> Callable[[Denoiser, int], Sequence[float]]:
    if callable(which):
        return which
    if which not in GRIDS:
        raise unknown("grid", which, GRIDS)
    return GRIDS[which]


def _checked(times: Sequence[float] | Tensor, denoiser: Denoiser, method: Sampler, started: bool) -> list[float]:
    path = [float(t) for t in (times.tolist() if isinstance(times, Tensor) else times)]
    pairs = list(itertools.pairwise(path))
    rising = started and bool(pairs) and all(a < b for a, b in pairs)
    if not pairs or not (rising or all(a > b for a, b in pairs)):
        raise ReparamError(
            f"times must be at least two falling numbers (rising ones, from data to noise, go with start=), "
            f"found {path[:6]}."
        )
    if rising and method.stochastic:
        raise Unsupported(f"rising times, from data to noise, need a deterministic sampler, found {method}.")
    low, high = denoiser.t_range
    outside = [t for t in path if not (t == 0 or low <= t <= high)]
    if outside:
        raise TimeOutOfRange(
            f"times has {outside[0]:g}, but this model was trained on t in [{low:g}, {high:g}]; start at "
            f"{high:g} or below (the last time may be 0)."
        )
    return path


def _known(asked: list[float], denoiser: Denoiser, method: Sampler) -> list[float]:
    """The times, of which the path's own are checked already."""
    low, high = denoiser.t_range
    if asked and max(asked) > high:
        raise TimeOutOfRange(
            f"{method} raises the noise to that of t = {max(asked):g}, and this model was trained on t in [{low:g}, "
            f"{high:g}]; give edm an s_max, below the sigma/alpha of the grid's first time."
        )
    return asked


def _start(
    denoiser: Denoiser,
    shape_or_noise: Sequence[int] | Tensor | None,
    start: Tensor | None,
    first: Level,
    generator: torch.Generator | None,
) -> Tensor:
    if (shape_or_noise is None) == (start is None):
        given = "neither" if start is None else "both"
        raise Conflict(f"sampling begins from noise (a shape, or unit noise) or from start=, found {given}.")
    if start is not None:
        return start.to(torch.promote_types(start.dtype, torch.float32))
    assert shape_or_noise is not None
    noise = _unit_noise(denoiser, shape_or_noise, generator)
    return weighted(first.sigma, noise, 0.0, noise)


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


def _noise(x: Tensor, generator: torch.Generator | None, noises: Iterable[Tensor] | None) -> Callable[[], Tensor]:
    """Where the steps' noise comes from."""
    if noises is None:
        drawn_on = generator.device if generator is not None else x.device
        pinned = x.is_cuda and drawn_on.type == "cpu"  # then the host draws the next while this one is copied
        kind: dict[str, Any] = {"device": drawn_on, "dtype": x.dtype, "pin_memory": pinned}
        return lambda: torch.randn(x.shape, generator=generator, **kind).to(x.device, non_blocking=pinned)
    given = iter(noises)

    def following() -> Tensor:
        z = next(given, None)
        if z is None or z.shape != x.shape:
            found = "no more" if z is None else f"shape {list(z.shape)}"
            raise ReparamError(f"noises holds unit noise of shape {list(x.shape)} for every step, found {found}.")
        return _brought(z, x)

    return following


def _brought(z: Tensor, x: Tensor) -> Tensor:
    """Noise as x is; from the host to a GPU without waiting, out of pinned memory that nobody else writes to."""
    if x.is_cuda and z.device.type == "cpu":
        return torch.empty(z.shape, dtype=x.dtype, pin_memory=True).copy_(z).to(x.device, non_blocking=True)
    return z.to(x)
