r"""Sampling times chosen from what the model says of its own error.

Let v(λ) = E[Var[x0 | x_t]] be the mean variance of an element of x0 that is left when x_t of log-SNR
λ is known: the *error profile* of a model. It falls with λ, and it says where steps pay.

**Derivation.** With u = SNR = e^λ, the process y(u) = (α/σ²) x_t is y(u) = u x0 + W(u), W a Brownian
motion: given x0 it has drift x0 and independent increments, so the exact bridge from t to s, known
x0, is

.. math:: y(u_s) = y(u_t) + (u_s - u_t)\,x_0 + N(0, u_s - u_t) .

The ancestral step with the small variance puts the posterior mean μ_t in the place of x0: its drift is
frozen at μ_t from u_t to u_s. Without x0, and seen in its own filtration, the exact process has the drift
μ(u) = E[x0 | y(u)] and the same unit diffusion (the innovation theorem). By Girsanov the divergence of the
exact process from the frozen one over the step is half the mean squared difference of the drifts. μ is a
martingale in u, so E|μ_s − μ_t|² = v(t) − v(s), and an element of the data contributes

.. math:: \mathrm{KL}_{t \to s} = \tfrac12 \int_{u_t}^{u_s} \big(v(u_t) - v(u)\big)\, du
          \qquad\text{nats.}

The divergence of whole paths is the sum over the steps, and bounds that of what they end in. The
best grid of N steps minimises the sum; on a table of levels that is a shortest path, found exactly by
dynamic programming. For short steps a step of Δλ costs ¼ e^λ (−v'(λ)) Δλ², so that the best grid has the
density sqrt(e^λ (−v'(λ))), and costs (∫ sqrt(−e^λ v') dλ)²/(4N).

**Ends.** At u = 0 (α = 0) all of this is finite, so the grid may begin there. The leap from the last time
to 0 returns the mean: samples are then off by v of that time, in mean square, whatever the steps before it.
It is no bridge (its divergence is infinite), so where it begins is not the programme's to choose.

References:
    Girsanov for samplers: Chen et al., arXiv 2209.11215. The filtering of y(u), and dv/du: Guo, Shamai & Verdú,
    IEEE Trans. Inf. Theory 51 (2005) 1261. Pool adjacent violators: Ayer et al., Ann. Math. Stat. 26 (1955) 641.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser, evaluating
from ..errors import NetworkError, ReparamError, TimeOutOfRange, Unsupported
from ..schedules import DDPM, Elementwise, Schedule

#: How near to an end at which the log-SNR is infinite the grids in log-SNR and σ/α go by themselves.
NEAR = 1e-3
#: Variances below this share of the largest count as that much: what is left there costs no steps.
_LEAST = 1e-12
#: Levels that the programme chooses from; with more steps than a quarter of them it is left to the density.
_LEVELS = 512
#: This share of the levels is even in log-SNR, wherever the profile is flat as well.
_EVEN = 0.02
#: Where SNR times variance lies below this, x_t says nothing of x0: a profile need not reach further.
_NOTHING = 1e-4


@dataclass(frozen=True)
class ErrorProfile:
    """v(λ), the mean posterior variance of an element of x0, at some log-SNRs; log v is linear between them.

    v cannot rise with λ. Where the numbers given do, as an average over few data or an imperfect model may, they
    are replaced by the nearest ones that do not (isotonic regression: neighbours are averaged).

    Args:
        log_snr: two or more different levels, in any order; kept rising.
        var: v there, in squared units of the data as the network sees them; not negative.

    Raises:
        ReparamError: if they are not that.
    """

    log_snr: list[float]
    var: list[float]

    def __post_init__(self) -> None:
        pairs = sorted(zip(map(float, self.log_snr), map(float, self.var), strict=False))
        levels, var = [p[0] for p in pairs], [p[1] for p in pairs]
        if len(self.log_snr) != len(self.var) or len(set(levels)) < max(2, len(levels)):
            raise ReparamError(
                f"an error profile has a variance at each of two or more different log-SNRs, found "
                f"{len(self.log_snr)} log-SNRs ({len(set(levels))} different) and {len(self.var)} variances."
            )
        wrong = [p for p in pairs if not (math.isfinite(p[0]) and math.isfinite(p[1]) and p[1] >= 0)]
        if wrong or not max(var) > 0:
            level, found = wrong[0] if wrong else pairs[0]
            raise ReparamError(
                f"an error profile has finite log-SNRs and finite variances that are not negative (and not all 0), "
                f"found {found:g} at log-SNR {level:g}."
            )
        object.__setattr__(self, "log_snr", levels)
        object.__setattr__(self, "var", falling(var))

    @classmethod
    def of(cls, denoiser: Denoiser) -> ErrorProfile:
        """The one in the record of a model's data.

        Raises:
            Unsupported: if there is none.
            ReparamError: if it is none.
        """
        found = (denoiser.data or {}).get("error_profile")
        if found is None:
            raise Unsupported(
                'this model\'s record has no error profile; train it with rp.Gaussian(of="x0"), or measure one with '
                "rp.samplers.profile.measure and give times=rp.samplers.profile.best_times(…), or set "
                'denoiser.data["error_profile"] to its to_dict().'
            )
        if not isinstance(found, Mapping) or set(found) != {"log_snr", "var"}:
            raise ReparamError(f'an error profile is {{"log_snr": […], "var": […]}}, found {found!r:.80}.')
        return cls(**found)

    def to_dict(self) -> dict[str, list[float]]:
        """As plain data, for ``denoiser.data["error_profile"]``."""
        return dataclasses.asdict(self)

    def at(self, log_snr: Tensor) -> Tensor:
        """v at levels of any shape, float64; beyond either end what it is there."""
        levels, log_var = self._knots()
        lam = log_snr.double().clamp(levels[0], levels[-1])
        right = torch.searchsorted(levels, lam).clamp(1, len(levels) - 1)
        share = (lam - levels[right - 1]) / (levels[right] - levels[right - 1])
        return torch.lerp(log_var[right - 1], log_var[right], share).exp()

    def level(self, var: float) -> float:
        """The lowest log-SNR at which v has fallen to ``var``, or the highest of the profile if it never does."""
        levels, log_var = self._knots()
        if var <= 0 or log_var[-1] > math.log(var):
            return float(levels[-1])
        right = int((log_var <= math.log(var)).nonzero()[0])
        if right == 0:
            return float(levels[0])
        share = (log_var[right - 1] - math.log(var)) / (log_var[right - 1] - log_var[right])
        return float(torch.lerp(levels[right - 1], levels[right], share))

    def step_kl(self, log_snr: Tensor) -> Tensor:
        """What each step of a path costs: nats for an element of the data, shape [n − 1], for n rising levels.

        The path may begin at −∞. The formula is the module's, exact for the profile as it is interpolated.
        """
        u, v, gained = log_snr.double().exp(), self.at(log_snr), self._accumulated(log_snr.double())
        return (v[:-1] * u.diff() - gained.diff()) / 2

    def _knots(self) -> tuple[Tensor, Tensor]:
        var = torch.tensor(self.var, dtype=torch.float64)
        return torch.tensor(self.log_snr, dtype=torch.float64), var.clamp(min=_LEAST * float(var.max())).log()

    def _accumulated(self, lam: Tensor) -> Tensor:
        """∫ v du from u = 0 to levels of shape [n]: closed forms, as v u is an exponential of λ between knots."""
        knots, _ = self._knots()
        points = torch.cat([knots, lam[lam > knots[0]]]).unique()
        density = self.at(points).log() + points
        growth = density.diff()
        mean = torch.where(growth.abs() < 1e-9, torch.ones_like(growth), torch.expm1(growth) / growth)
        cells = points.diff() * density[:-1].exp() * mean
        first = float(density[0].exp())
        total = first + torch.cat([cells.new_zeros(1), cells.cumsum(0)])
        inside = total[torch.searchsorted(points, lam.clamp(min=float(knots[0])))]
        return torch.where(lam > knots[0], inside, first * (lam - knots[0]).exp())


def falling(values: Sequence[float]) -> list[float]:
    """The sequence nearest to ``values`` in squares that does not rise: pool adjacent violators."""
    blocks: list[tuple[float, int]] = []  # mean and length
    for value in values:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] < mean:
            before, length = blocks.pop()
            mean, count = (before * length + mean * count) / (length + count), length + count
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]


def measure(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    levels: int = 64,
    t_range: tuple[float, float] | None = None,
    cond: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
) -> ErrorProfile:
    """The error profile of a model that states variances: their mean over noised data, level by level.

    The same noise is used at all levels, and all of ``x0`` at once: some hundreds of data are plenty.

    Args:
        denoiser: one whose posterior has a variance, such as a model trained with ``rp.Gaussian(of="x0")``.
        x0: data as the network sees them, shape [B, …].
        levels: at how many log-SNRs, evenly spaced; a network with time="step" is asked at the steps next to them.
        t_range: from where to where, by default the model's; 0.001 inside an end at which the log-SNR is infinite.
        cond: passed on to the network, beside all of ``x0``.
        generator: for the noise.

    Raises:
        Unsupported: if the model has no variances, or its noise differs by element.
        NetworkError: if they are not finite.
        TimeOutOfRange: if t_range reaches beyond the model's.
    """
    _check_uniform(denoiser.schedule)
    times = _levels(denoiser, levels, denoiser.t_range if t_range is None else t_range)
    drawn_on = generator.device if generator is not None else x0.device
    eps = torch.randn(x0.shape, generator=generator, device=drawn_on, dtype=x0.dtype).to(x0.device)
    var = []
    with evaluating(denoiser):
        for t in times.tolist():
            found = denoiser(denoiser.schedule.add_noise(x0, eps, t), t, **(cond or {})).var
            if found is None:
                raise Unsupported(
                    "an error profile is the mean of posterior variances, and this model states none; train it with "
                    'rp.Gaussian(of="x0"), or measure a model that has them.'
                )
            var.append(float(found.double().mean()))
            if not 0 <= var[-1] < math.inf:
                raise NetworkError(f"the model's mean posterior variance at t = {t:g} is {var[-1]:g}, which is none.")
    return ErrorProfile(denoiser.schedule.log_snr(times).tolist(), var)


def _levels(denoiser: Denoiser, levels: int, t_range: tuple[float, float]) -> Tensor:
    """The times to measure at, even in log-SNR."""
    schedule, (low, high), (least, most) = denoiser.schedule, t_range, denoiser.t_range
    if not least <= low < high <= most:
        raise TimeOutOfRange(f"t_range = [{low:g}, {high:g}] must lie in the model's, [{least:g}, {most:g}].")
    if levels < 2:
        raise ReparamError(f"an error profile needs at least two levels, found {levels!r}.")
    ends = torch.tensor([low, high], dtype=torch.float64)
    ends += torch.tensor([NEAR, -NEAR], dtype=torch.float64) * schedule.log_snr(ends).isinf()
    cleanest, noisiest = schedule.log_snr(ends).tolist()
    lam = torch.linspace(cleanest, noisiest, levels, dtype=torch.float64)
    times = schedule.time_at(lam).clamp(float(ends[0]), float(ends[1]))
    if denoiser.conventions.time == "step" and isinstance(schedule, DDPM):
        times = schedule.on_steps(times, high).unique()
        times = times[schedule.log_snr(times).isfinite()]
    return times


def _check_uniform(schedule: Schedule) -> None:
    if isinstance(schedule, Elementwise):
        raise Unsupported(
            f"an error profile belongs to one SNR a time, and {schedule} has noise that differs by element; use "
            "grid='linear'."
        )


def best_times(
    profile: ErrorProfile,
    schedule: Schedule,
    steps: int,
    high: float,
    last: float,
    *,
    among: Sequence[float] | Tensor | None = None,
) -> list[float]:
    """The best ``steps`` + 1 falling times for a profile: from ``high`` to ``last``, then the leap to 0.

    Of all grids on a table of 512 levels it is the one of the least total divergence, and so for the ancestral
    sampler with the small variance. Above 128 steps the times follow the density of the limit of many steps.

    Args:
        profile: the error profile.
        schedule: the process that is walked; the profile may come from another.
        steps: how many, at least 1; with the leap.
        high: the first time; α may be 0 there.
        last: the last time before 0, below ``high``; with a single step it is not visited.
        among: the times to choose from, beside high and last, such as the steps of a table.

    Raises:
        TimeOutOfRange: if the profile does not reach from ``high`` to ``last``.
        Unsupported: if there are fewer times to choose from than steps, or the noise differs by element.
    """
    _check_uniform(schedule)
    if steps == 1:
        return [high, 0.0]
    start, end = schedule.log_snr(torch.tensor([high, last], dtype=torch.float64)).tolist()
    _check_reach(profile, start, end)
    if among is None and steps > _LEVELS // 4:
        lam = _by_density(profile, start, end, steps)
    else:
        table = _by_density(profile, start, end, _LEVELS) if among is None else _given(schedule, among, start, end)
        if len(table) < steps:
            raise Unsupported(f"{steps} steps are more than the {len(table)} times from {high:g} to {last:g}.")
        lam = table[_shortest(_costs(profile, table), steps - 1)]
    return [high, *schedule.time_at(lam[1:-1]).tolist(), last, 0.0]


def _check_reach(profile: ErrorProfile, start: float, end: float) -> None:
    lowest, highest = profile.log_snr[0], profile.log_snr[-1]
    begun = start > lowest - 1e-6 or math.exp(lowest) * profile.var[0] < _NOTHING
    if not (begun and max(start, lowest) < end < highest + 1e-6):
        raise TimeOutOfRange(
            f"the grid goes from log-SNR {start:g} up to {end:g}, and the error profile from {lowest:g} to "
            f"{highest:g}; keep to that (start=, last=), or measure one that reaches further."
        )


def _by_density(profile: ErrorProfile, start: float, end: float, n: int) -> Tensor:
    """n rising levels from start to end, of density sqrt(e^λ (−v')), and of some density everywhere."""
    first = max(start, profile.log_snr[0])
    fine = torch.linspace(first, end, 4096, dtype=torch.float64)
    mass = ((fine[:-1] + fine[1:]) / 2).exp() * -profile.at(fine).diff() * fine.diff()
    cells = mass.clamp(min=0).sqrt()
    cells = cells + (_EVEN * cells.mean()).clamp(min=1e-300)
    reached = torch.cat([cells.new_zeros(1), cells.cumsum(0)]) / cells.sum()
    asked = torch.linspace(0, 1, n, dtype=torch.float64)
    right = torch.searchsorted(reached, asked).clamp(1, len(fine) - 1)
    share = (asked - reached[right - 1]) / (reached[right] - reached[right - 1])
    levels = torch.lerp(fine[right - 1], fine[right], share)
    levels[0], levels[-1] = start, end
    return levels


def _given(schedule: Schedule, times: Sequence[float] | Tensor, start: float, end: float) -> Tensor:
    """The levels of ``times`` that lie between start and end, and those two, rising."""
    lam = schedule.log_snr(torch.as_tensor(times, dtype=torch.float64)).unique()
    ends = torch.tensor([start, end], dtype=torch.float64)
    return torch.cat([ends[:1], lam[(lam > start + 1e-9) & (lam < end - 1e-9)], ends[1:]])


def _costs(profile: ErrorProfile, lam: Tensor) -> Tensor:
    """The divergence of a step from level i to level j > i, [M, M]; infinite where j ≤ i."""
    u, v, gained = lam.exp(), profile.at(lam), profile._accumulated(lam)
    cost = (v[:, None] * (u - u[:, None]) - (gained - gained[:, None])) / 2
    return cost.masked_fill(torch.ones_like(cost, dtype=torch.bool).tril(), math.inf)


def _shortest(cost: Tensor, steps: int) -> list[int]:
    """The path of exactly ``steps`` steps from the first level to the last that costs least."""
    best, came = cost[0], []
    for _ in range(steps - 1):
        best, before = (best[:, None] + cost).min(0)
        came.append(before)
    path = [len(cost) - 1]
    for before in reversed(came):
        path.append(int(before[path[-1]]))
    return [0, *reversed(path)]
