r"""Where a sampler stops on its way: falling times, from t_range's end (or ``start``) to 0.

Each of these is a function ``(denoiser, steps, …) -> list of steps + 1 times``, for ``times=`` of
:func:`reparam.sample`, and can be had by name with ``grid=``. They keep to t_range, but for the
leap to 0, and for a network with time="step" they lie on the table's steps.

References:
    Karras et al., arXiv 2206.00364, eq. 5. Spacings of tables: Lin et al., arXiv 2305.08891, table 2.
    Shift: Esser et al., arXiv 2403.03206, eq. 23.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import ReparamError, TimeOutOfRange, Unsupported
from ..schedules import DDPM
from .profile import NEAR, ErrorProfile, best_times


def linear(denoiser: Denoiser, steps: int, start: float | None = None) -> list[float]:
    """``steps`` even steps in t.

    The network is not asked below t_range: where the even grid would, the grid is spread over
    t_range instead and its last step leaps to 0.

    Args:
        denoiser: the model, of which t_range, schedule and time convention are used.
        steps: how many, at least 1.
        start: the first time, by default the end of t_range; lower for image-to-image.

    Raises:
        Unsupported: if there are fewer than one step, or more than a table has.
    """
    low, high = _ends(denoiser, steps, start)
    times = torch.linspace(high, 0, steps + 1, dtype=torch.float64)
    if times[-2] < low:
        times[:-1] = torch.linspace(high, low, steps, dtype=torch.float64)
    return _finished(times, denoiser, high)


def log_snr(denoiser: Denoiser, steps: int, start: float | None = None, last: float | None = None) -> list[float]:
    """Even steps in log-SNR down to the time ``last``, then the leap to 0.

    ``last`` is by default the lower end of t_range, or 0.001 where that is 0. A start at which
    the log-SNR is infinite is kept as it is; the even steps then begin 0.001 below it.
    """
    times = _between(denoiser, steps, start, last, lambda lam: -lam / 2, lambda u: -2 * u)
    return _finished(times, denoiser, float(times[0]))


def karras(
    denoiser: Denoiser, steps: int, start: float | None = None, last: float | None = None, *, rho: float = 7.0
) -> list[float]:
    """Even steps in (σ/α)^(1/ρ) down to the time ``last``, then the leap to 0; ends as in :func:`log_snr`.

    For EDM's own grid, σ/α from 80 to 0.002, give the times of those:
    ``start=float(schedule.time_at(-2 * math.log(80)))`` and ``last=`` likewise.
    """
    if not rho > 0:
        raise ReparamError(f"rho of the Karras grid must be positive, found {rho!r}.")
    times = _between(denoiser, steps, start, last, lambda lam: (-lam / (2 * rho)).exp(), lambda u: -2 * rho * u.log())
    return _finished(times, denoiser, float(times[0]))


def shifted(denoiser: Denoiser, steps: int, start: float | None = None, *, shift: float = 3.0) -> list[float]:
    """The even grid, u of ``start``, moved to shift·u/(1 + (shift − 1)u) of it: Stable Diffusion 3's shift.

    On rectified flow from t = 1 that multiplies σ/α by ``shift``; 1 is the even grid.
    """
    if not shift > 0:
        raise ReparamError(f"the shift must be positive, found {shift!r}.")
    low, high = _ends(denoiser, steps, start)
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if u[-2] * high < low:
        u[:-1] = torch.linspace(1, low / high, steps, dtype=torch.float64)
    times = high * (shift * u / (1 + (shift - 1) * u))
    times[:-1] = times[:-1].clamp(min=low)  # a shift below 1 moves times down
    return _finished(times, denoiser, high)


def learned(denoiser: Denoiser, steps: int, start: float | None = None, last: float | None = None) -> list[float]:
    """The best times for what the model says of its own error (:mod:`reparam.samplers.profile`), then the leap to 0.

    They are those of the least divergence of the ancestral sampler, down to the time ``last``; the error profile is
    that of ``denoiser.data["error_profile"]``, matched by log-SNR. The first time may have α = 0: nothing is infinite.
    The steps of deterministic samplers err in other ways: this is no grid for them.

    ``last`` is by default where the RMS error of the mean, with which the leap returns, has fallen to 1/steps
    of what it is at the start: what else a first-order sampler does wrong is of that order too. It is the lower
    end of t_range, or of the profile, where the error does not fall so far.

    Raises:
        Unsupported: if the model has no error profile.
        TimeOutOfRange: if the profile does not reach from ``start`` to ``last``.
    """
    profile = ErrorProfile.of(denoiser)
    low, high = _ends(denoiser, steps, start)
    schedule = denoiser.schedule
    table = denoiser.conventions.time == "step" and isinstance(schedule, DDPM)
    if last is None:
        remaining = float(profile.at(schedule.log_snr(high))) / steps**2
        last = max(low, float(schedule.time_at(profile.level(remaining))))
    elif not low <= last < high or last == 0:
        raise TimeOutOfRange(f"last = {last:g} must lie above 0 and in [{low:g}, {high:g}).")
    among = None
    if table:
        assert isinstance(schedule, DDPM)
        high, last = schedule.on_steps(torch.tensor([high, last], dtype=torch.float64), high).tolist()
        among = schedule.time(torch.arange(schedule.T))
    times = best_times(profile, schedule, steps, high, last, among=among)
    return _finished(torch.tensor(times, dtype=torch.float64), denoiser, high)


def leading(denoiser: Denoiser, steps: int, offset: int = 0) -> list[float]:
    """diffusers' "leading" steps of a table: multiples of T // steps, plus ``offset`` (its steps_offset); then 0."""
    T = _table(denoiser, steps).T
    return _at_steps(torch.arange(steps - 1, -1, -1) * (T // steps) + offset, denoiser)


def trailing(denoiser: Denoiser, steps: int) -> list[float]:
    """diffusers' "trailing" steps of a table: round(T − i T/steps) − 1; then 0. They begin at its very end."""
    T = _table(denoiser, steps).T
    count = torch.arange(steps, dtype=torch.float64)
    return _at_steps((T - count * (T / steps)).round().long() - 1, denoiser)


def linspace(denoiser: Denoiser, steps: int) -> list[float]:
    """diffusers' "linspace" steps of a table: even from T − 1 to 0, both asked, rounded; then 0."""
    T = _table(denoiser, steps).T
    even = torch.linspace(0, T - 1, steps, dtype=torch.float64).round().long() if steps > 1 else torch.tensor([0])
    return _at_steps(even.flip(0), denoiser)


GRIDS: dict[str, Callable[..., list[float]]] = {
    f.__name__: f for f in (linear, log_snr, karras, shifted, learned, leading, trailing, linspace)
}


def _ends(denoiser: Denoiser, steps: int, start: float | None) -> tuple[float, float]:
    _check_steps(steps)
    low, high = denoiser.t_range
    if start is not None and not (low < start <= high):
        raise TimeOutOfRange(
            f"start = {start:g} lies outside this model's t_range, [{low:g}, {high:g}]; start inside it, at noise."
        )
    return low, high if start is None else float(start)


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise Unsupported(f"steps must be a positive integer, found {steps!r}.")


def _between(
    denoiser: Denoiser,
    steps: int,
    start: float | None,
    last: float | None,
    to_u: Callable[[Tensor], Tensor],
    to_log_snr: Callable[[Tensor], Tensor],
) -> Tensor:
    """Even steps in u, a function of the log-SNR, and a leap to 0."""
    low, high = _ends(denoiser, steps, start)
    schedule = denoiser.schedule
    if schedule.log_snr(high).ndim:
        raise Unsupported(f"grids in log-SNR need one a time, and {schedule} is elementwise; use grid='linear'.")
    last = max(low, 0.0 if low else NEAR) if last is None else float(last)
    if not low <= last <= high or last == 0:
        raise TimeOutOfRange(f"last = {last:g} must lie above 0 and in [{low:g}, {high:g}].")
    first = high if bool(schedule.log_snr(high).isfinite()) else high - NEAR
    asked = steps if first == high else steps - 1
    ends = to_u(schedule.log_snr(torch.tensor([first, last], dtype=torch.float64)))
    u = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, max(asked, 1), dtype=torch.float64))
    inner = schedule.time_at(to_log_snr(u)).clamp(last, first)
    inner[0] = first
    if asked > 1:
        inner[-1] = last
    times = torch.cat([torch.tensor([high], dtype=torch.float64), inner]) if first != high else inner
    return torch.cat([times[:steps], torch.zeros(1, dtype=torch.float64)])


def _table(denoiser: Denoiser, steps: int) -> DDPM:
    _check_steps(steps)
    if not isinstance(denoiser.schedule, DDPM):
        raise Unsupported(
            f"leading, trailing and linspace are steps of a table (ddpm), found {denoiser.schedule}; use grid='linear'."
        )
    if steps > denoiser.schedule.T:
        raise Unsupported(f"{steps} steps are more than this table of {denoiser.schedule.T} has.")
    return denoiser.schedule


def _at_steps(k: Tensor, denoiser: Denoiser) -> list[float]:
    assert isinstance(denoiser.schedule, DDPM)
    return [*denoiser.schedule.time(k).tolist(), 0.0]


def _finished(times: Tensor, denoiser: Denoiser, high: float) -> list[float]:
    schedule = denoiser.schedule
    if denoiser.conventions.time == "step" and isinstance(schedule, DDPM):
        times[:-1] = schedule.on_steps(times[:-1], high)
        if len(times.unique()) < len(times):
            raise Unsupported(
                f"{len(times) - 1} steps are more than this table of {schedule.T} has in t_range, so spaced; use "
                "fewer steps or grid='linear'."
            )
    return [float(t) for t in times]
