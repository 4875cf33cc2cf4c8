r"""Which noise levels training draws.

A distribution of times on (0, 1) is given by its quantile function, so that one uniform
number a sample decides the time: draws can be shared between runs, stratified, and
restricted to a range exactly, without rejection. Times run from 0 (data) to 1 (noise).

A distribution of noise levels proper, such as EDM's of σ/α, becomes one of times only under a
schedule: :meth:`Times.on` binds it; for all others it changes nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import TimeOutOfRange, Unsupported
from .schedules import Schedule, build, config_of


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

    def on(self, schedule: Schedule) -> Times:
        """The distribution of times under ``schedule``: itself, unless it is one of noise levels."""
        return self

    @property
    def bound(self) -> bool:
        """Whether it is one of times already, and not one of noise levels that waits for its schedule."""
        base = getattr(self, "base", None)
        return not isinstance(base, Times) or base.bound

    @property
    def stratified(self) -> bool:
        """Whether a batch is to be spread evenly over the distribution (:func:`stratify`)."""
        base = getattr(self, "base", None)
        return isinstance(base, Times) and base.stratified

    def draw(self, u: Tensor) -> Tensor:
        """The times that a batch's uniform numbers ``u``, shape [B], stand for; float64."""
        return self.quantile(stratify(u) if self.stratified else u)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """A batch of ``n`` times, float64 on the generator's device (CPU without one)."""
        return self.draw(open_uniform(n, generator))

    def within(self, low: float, high: float) -> Times:
        """The same distribution, given that the time lies in [low, high]."""
        return self if (low, high) == (0.0, 1.0) else Within(self, low, high)

    def config(self) -> Any:
        """The distribution as plain data, from which :func:`times` builds it again."""
        return {k: v.config() if hasattr(v, "config") else v for k, v in config_of(self).items()}


def open_uniform(n: int, generator: torch.Generator | None = None) -> Tensor:
    """``n`` uniform numbers strictly inside (0, 1), float64: no draw ever falls on an end."""
    device = generator.device if generator is not None else "cpu"
    steps = torch.randint(0, 2**52, (n,), generator=generator, device=device)
    return (steps.to(torch.float64) + 0.5) * 2.0**-52


def stratify(u: Tensor) -> Tensor:
    """One uniform number in each of B equal strata, from B independent ones: u_i ↦ (k_i + u_i)/B.

    A pure function of ``u``, and each number by itself remains exactly uniform: the strata are
    k_i = (s·i + ⌊B u_0⌋) mod B, so u_0 stays as it is and turns the others, whose own strata it does
    not depend on. The stride s, prime to B and near B/1.618, spreads neighbours: every part of the
    batch that a process or a micro-batch takes covers the whole range as well. The variance of the
    batch's mean loss falls (low-discrepancy times: Kingma et al., arXiv 2107.00630).

    Args:
        u: independent uniform numbers in (0, 1), float64, shape [B].
    """
    n = len(u)
    if n < 2:
        return u
    stride = next(s for s in range(round(n * 0.618), 0, -1) if math.gcd(s, n) == 1)
    turn = (u[0] * n).long().clamp(max=n - 1)
    stratum = (torch.arange(n, device=u.device) * stride + turn) % n
    spread = torch.cat([u[:1], (stratum[1:] + u[1:]) / n])
    return spread.clamp(max=1 - 2.0**-53)  # the sum may round up to the end


def number(what: str, value: object, fits: Callable[[float], bool], wanted: str) -> float:
    """``value``, checked to be a finite number that ``fits``.

    Raises:
        Unsupported: if it is not, with what was wanted.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and fits(value)):
        raise Unsupported(f"{what} must be {wanted}, found {value!r}.")
    return float(value)


def log_turn(t: Tensor, schedule: Schedule) -> Tensor:
    """log 2(α σ' − σ α') at float64 times, finite at both ends: |dλ/dt| is this over α σ."""
    turn = schedule.alpha(t) * schedule.sigma_dot(t) - schedule.sigma(t) * schedule.alpha_dot(t)
    return (2 * turn.abs()).log()


def log_speed(t: Tensor, schedule: Schedule) -> Tensor:
    """log |dλ/dt| at float64 times, +∞ where α or σ is 0: a density in t, less this, is one in λ (in logs)."""
    return log_turn(t, schedule) - schedule.alpha(t).log() - schedule.sigma(t).log()


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
        return torch.special.ndtr((torch.logit(t.clamp(0, 1)) - self.mean) / self.std)

    def log_prob(self, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.mean) / self.std
        density = -(z**2) / 2 - math.log(self.std * math.sqrt(2 * math.pi)) - t.log() - torch.log1p(-t)
        return torch.where((t > 0) & (t < 1), density, -torch.inf)


@dataclass(frozen=True)
class LogNormalSigma(Times):
    """ln(σ/α) ~ N(mean, std²): EDM's noise levels (Karras et al., arXiv 2206.00364, table 1), σ/α being its σ.

    EDM draws (−1.2, 1.2), the default; EDM2 (arXiv 2312.02696) (−0.4, 1.0). It is one of times only
    on a schedule (:meth:`on`), and there given that the schedule reaches the noise level. On rectified
    flow of noise scale s it is logit-normal with mean − ln s.

    Raises:
        Unsupported: if asked for times before :meth:`on`.
    """

    name: ClassVar[str] = "log_normal_sigma"
    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        number(f"mean of {self.name}", self.mean, lambda m: True, "a finite number")
        number(f"std of {self.name}", self.std, lambda s: s > 0, "positive")

    @property
    def bound(self) -> bool:
        return False

    def on(self, schedule: Schedule) -> Times:
        return _LogNormalSigmaOn(self, schedule)

    def quantile(self, u: Tensor) -> Tensor:
        raise self._unbound()

    def cdf(self, t: Tensor) -> Tensor:
        raise self._unbound()

    def log_prob(self, t: Tensor) -> Tensor:
        raise self._unbound()

    def _unbound(self) -> Unsupported:
        return Unsupported(
            f"{self} is a distribution of noise levels sigma/alpha, which become times under a schedule; use "
            "times.on(schedule)."
        )


@dataclass(frozen=True)
class _LogNormalSigmaOn(Times):
    """The same, under a schedule: all in ℓ = ln(σ/α) = −λ/2, which grows with t."""

    name: ClassVar[str] = LogNormalSigma.name
    levels: LogNormalSigma
    schedule: Schedule
    _ends: tuple[float, float] = field(init=False, repr=False, compare=False)
    _shares: tuple[float, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ends = self._level(torch.tensor([0.0, 1.0], dtype=torch.float64))
        below, upto = torch.special.ndtr((ends - self.levels.mean) / self.levels.std).tolist()
        if not upto - below > 1e-12:
            raise Unsupported(
                f"{self.levels} has no noise levels in common with {self.schedule}, where ln(sigma/alpha) runs from "
                f"{ends[0]:g} to {ends[1]:g}; change one of the two."
            )
        object.__setattr__(self, "_ends", tuple(ends.tolist()))
        object.__setattr__(self, "_shares", (below, upto))

    def _level(self, t: Tensor) -> Tensor:
        return -self.schedule.log_snr(t) / 2

    def on(self, schedule: Schedule) -> Times:
        return self.levels.on(schedule)

    def quantile(self, u: Tensor) -> Tensor:
        below, upto = self._shares
        level = self.levels.mean + self.levels.std * torch.special.ndtri(below + u * (upto - below))
        return self.schedule.time_at(-2 * level.clamp(*self._ends))

    def cdf(self, t: Tensor) -> Tensor:
        below, upto = self._shares
        share = torch.special.ndtr((self._level(t.clamp(0, 1)) - self.levels.mean) / self.levels.std)
        return ((share - below) / (upto - below)).clamp(0, 1)

    def log_prob(self, t: Tensor) -> Tensor:
        below, upto = self._shares
        inside = t.clamp(0, 1)
        level = self._level(inside)
        z = (level - self.levels.mean) / self.levels.std
        of_level = -(z**2) / 2 - math.log(self.levels.std * math.sqrt(2 * math.pi) * (upto - below))
        density = of_level + log_speed(inside, self.schedule) - math.log(2)  # dℓ/dt is half of |dλ/dt|
        return torch.where((t == inside) & level.isfinite(), density, -torch.inf)

    def config(self) -> Any:
        return self.levels.config()


@dataclass(frozen=True)
class Mode(Times):
    """SD3's mode sampling with heavy tails (Esser et al., arXiv 2403.03206, section 3.1).

    t = 1 − u − s (cos²(πu/2) − 1 + u), u uniform: more in the middle for s > 0, at the ends for s < 0,
    and uniform at 0. Here with 1 − u for u, so that it increases.

    Args:
        scale: s, from −1 to 2/(π − 2) = 1.75; 1.29 is one that SD3 reports. At the upper end the density is
            infinite at t = ½, at the lower one at the ends.
    """

    name: ClassVar[str] = "mode"
    scale: float = 1.29

    def __post_init__(self) -> None:
        largest = 2 / (math.pi - 2)
        number("scale of mode", self.scale, lambda s: -1 <= s <= largest, f"from -1 to 2/(pi - 2) = {largest:.4f}")

    def quantile(self, u: Tensor) -> Tensor:
        return (1 + self.scale) * u - self.scale * torch.sin(u * (math.pi / 2)) ** 2

    def cdf(self, t: Tensor) -> Tensor:
        """By bisection, to 2^-60: the quantile has no inverse in closed form."""
        t = t.clamp(0, 1)
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.quantile(middle) < t
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.where((t > 0) & (t < 1), high, t)

    def log_prob(self, t: Tensor) -> Tensor:
        slope = 1 + self.scale - self.scale * (math.pi / 2) * torch.sin(math.pi * self.cdf(t))
        return torch.where((t >= 0) & (t <= 1), -slope.clamp(min=0).log(), -torch.inf)


@dataclass(frozen=True)
class CosMap(Times):
    """Uniform times of the cosine schedule, carried to rectified flow by log-SNR (arXiv 2403.03206, section 3.1).

    t = 1 − 1/(tan(πu/2) + 1), with the density 2/(π − 2πt + 2πt²).
    """

    name: ClassVar[str] = "cosmap"

    def quantile(self, u: Tensor) -> Tensor:
        sin, cos = torch.sin(u * (math.pi / 2)), torch.sin((1 - u) * (math.pi / 2))
        return sin / (sin + cos)

    def cdf(self, t: Tensor) -> Tensor:
        t = t.clamp(0, 1)
        return torch.atan2(t, 1 - t) * (2 / math.pi)

    def log_prob(self, t: Tensor) -> Tensor:
        density = math.log(2 / math.pi) - torch.log1p(-2 * t * (1 - t))
        return torch.where((t >= 0) & (t <= 1), density, -torch.inf)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s t/(1 + (s − 1) t): σ/α of rectified flow times s, λ less 2 ln s (arXiv 2403.03206, section 5.3.2).

    s > 1 goes towards noise; 1/s undoes s.
    """
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(pixels: float, base_pixels: float) -> float:
    """The shift sqrt(m/n) for pictures of m pixels, from a setting that suits n (arXiv 2403.03206, section 5.3.2).

    The mean of m noisy pixels of a constant picture is uncertain by (σ/α)/sqrt(m); times sqrt(m/n) on σ/α keeps that.

    Raises:
        Unsupported: if a number of pixels is not positive.
    """
    m = number("the number of pixels", pixels, lambda v: v > 0, "positive")
    return math.sqrt(m / number("the number of pixels", base_pixels, lambda v: v > 0, "positive"))


@dataclass(frozen=True)
class Shifted(Times):
    """Another distribution, its times shifted by :func:`shift_time`.

    A logit-normal one shifted by s is logit-normal with mean + ln s.

    Args:
        base: the distribution, an object, a name or a mapping.
        shift: s, positive; more than 1 draws noisier times.
    """

    name: ClassVar[str] = "shifted"
    base: Any
    shift: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", times(self.base))
        number("shift of the times", self.shift, lambda s: s > 0, "positive")

    def on(self, schedule: Schedule) -> Times:
        return Shifted(self.base.on(schedule), self.shift)

    def quantile(self, u: Tensor) -> Tensor:
        return shift_time(self.base.quantile(u), self.shift)

    def cdf(self, t: Tensor) -> Tensor:
        return self.base.cdf(shift_time(t.clamp(0, 1), 1 / self.shift))

    def log_prob(self, t: Tensor) -> Tensor:
        inside = t.clamp(0, 1)
        slope = -math.log(self.shift) - 2 * torch.log1p((1 / self.shift - 1) * inside)
        density = self.base.log_prob(shift_time(inside, 1 / self.shift)) + slope
        return torch.where((t >= 0) & (t <= 1), density, -torch.inf)


@dataclass(frozen=True)
class Stratified(Times):
    """Another distribution, over which each batch is spread evenly (:func:`stratify`).

    One time by itself is distributed as before, so quantile, cdf and density are the other's.
    """

    name: ClassVar[str] = "stratified"
    base: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", times(self.base))

    @property
    def stratified(self) -> bool:
        return True

    def on(self, schedule: Schedule) -> Times:
        return Stratified(self.base.on(schedule))

    def quantile(self, u: Tensor) -> Tensor:
        return self.base.quantile(u)

    def cdf(self, t: Tensor) -> Tensor:
        return self.base.cdf(t)

    def log_prob(self, t: Tensor) -> Tensor:
        return self.base.log_prob(t)


@dataclass(frozen=True)
class Table(Times):
    """A density that is constant on each of n equal parts of [0, 1].

    Args:
        density: n numbers proportional to the density, not negative and not all zero. Where one is zero
            no times are drawn.
    """

    name: ClassVar[str] = "table"
    density: Any
    _cdf: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.density, list | tuple) or not self.density:
            raise Unsupported(f"a table of times is a list of numbers, found {self.density!r}.")
        entries = [number("a table's density", d, lambda v: v >= 0, "not negative") for d in self.density]
        mass = torch.tensor(entries, dtype=torch.float64)
        if not mass.sum() > 0:
            raise Unsupported("a table of times must have a density above zero somewhere, found only zeros.")
        cdf = torch.cat([torch.zeros(1, dtype=torch.float64), (mass / mass.sum()).cumsum(0)])
        object.__setattr__(self, "density", tuple(entries))
        object.__setattr__(self, "_cdf", cdf / cdf[-1])

    def quantile(self, u: Tensor) -> Tensor:
        n, cdf = len(self.density), self._cdf
        part = (torch.searchsorted(cdf, u.contiguous(), right=True) - 1).clamp(0, n - 1)
        return (part + (u - cdf[part]) / (cdf[part + 1] - cdf[part])) / n

    def _part(self, t: Tensor) -> Tensor:
        return (t * len(self.density)).long().clamp(0, len(self.density) - 1)

    def cdf(self, t: Tensor) -> Tensor:
        t = t.clamp(0, 1)
        part = self._part(t)
        return torch.lerp(self._cdf[part], self._cdf[part + 1], t * len(self.density) - part)

    def log_prob(self, t: Tensor) -> Tensor:
        part = self._part(t.clamp(0, 1))
        density = (self._cdf[part + 1] - self._cdf[part]) * len(self.density)
        return torch.where((t >= 0) & (t <= 1), density.log(), -torch.inf)

    def config(self) -> Any:
        return {"name": self.name, "density": list(self.density)}


@dataclass(frozen=True)
class Importance(Times):
    """Times in proportion to a weighting: drawn often, where a loss weights much, instead of weighted much.

    The density is that of ``base`` times the weight on the prediction of ``of``, on a grid of ``bins``
    equal parts (weights at their middles; :class:`Table`). By itself this changes the objective, as
    another distribution of times does; ``{name: corrected, base: the weighting, reference: the base}``
    (:class:`reparam.weightings.Corrected`) divides it out, and only the variance changes.

    Args:
        weighting: an object, a name or a mapping, as for :func:`reparam.weightings.weighting`.
        of: the target on whose prediction the weight stands.
        base: the distribution that the weighting was meant for.
        bins: how many parts.

    Raises:
        Unsupported: if the weight is not finite and positive somewhere, or if asked for times before :meth:`on`.
    """

    name: ClassVar[str] = "importance"
    weighting: Any
    of: Any = "x0"
    base: Any = "uniform"
    bins: int = 1000

    @property
    def bound(self) -> bool:
        return False

    def __post_init__(self) -> None:
        from .targets import target
        from .weightings import weighting  # which imports this module

        if isinstance(self.bins, bool) or not isinstance(self.bins, int) or self.bins < 1:
            raise Unsupported(f"bins of importance must be a positive integer, found {self.bins!r}.")
        object.__setattr__(self, "weighting", weighting(self.weighting))
        object.__setattr__(self, "of", target(self.of))
        object.__setattr__(self, "base", times(self.base))

    def on(self, schedule: Schedule) -> Times:
        base = self.base.on(schedule)
        edges = torch.arange(self.bins + 1, dtype=torch.float64) / self.bins
        middles = (edges[1:] + edges[:-1]) / 2
        weight = self.weighting.drawn_from(base).on_prediction(middles, schedule, self.of)
        if weight.shape != middles.shape or not bool(weight.isfinite().all()):
            raise Unsupported(
                f"times in proportion to {self.weighting} on a prediction of {self.of.name} need one finite weight at "
                f"every time under {schedule}; choose another weighting, or cap it: {{name: capped, …}}."
            )
        table = Table(tuple((weight * base.cdf(edges).diff()).tolist()))
        return Stratified(table) if base.stratified else table

    def quantile(self, u: Tensor) -> Tensor:
        raise self._unbound()

    def cdf(self, t: Tensor) -> Tensor:
        raise self._unbound()

    def log_prob(self, t: Tensor) -> Tensor:
        raise self._unbound()

    def _unbound(self) -> Unsupported:
        return Unsupported("times in proportion to a weighting are known under a schedule; use times.on(schedule).")


@dataclass(frozen=True)
class Within(Times):
    """A distribution, given that the time lies in [low, high]."""

    name: ClassVar[str] = "within"
    base: Any
    low: float
    high: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", times(self.base))
        if not 0 <= self.low < self.high <= 1:
            raise TimeOutOfRange(
                f"a range of times is two increasing numbers in [0, 1], found [{self.low!r}, {self.high!r}]."
            )
        if self.bound:
            self._shares()  # which refuses a range without any draws

    def _shares(self) -> tuple[float, float]:
        below, upto = self.base.cdf(torch.tensor([self.low, self.high], dtype=torch.float64)).tolist()
        if not upto - below > 1e-12:
            raise Unsupported(
                f"{self.base} draws no times in [{self.low:g}, {self.high:g}]; change the distribution or t_range."
            )
        return below, upto

    def on(self, schedule: Schedule) -> Times:
        return Within(self.base.on(schedule), self.low, self.high)

    def quantile(self, u: Tensor) -> Tensor:
        below, upto = self._shares()
        return self.base.quantile(below + u * (upto - below)).clamp(self.low, self.high)

    def cdf(self, t: Tensor) -> Tensor:
        below, upto = self._shares()
        return ((self.base.cdf(t) - below) / (upto - below)).clamp(0, 1)

    def log_prob(self, t: Tensor) -> Tensor:
        below, upto = self._shares()
        inside = (t >= self.low) & (t <= self.high)
        return torch.where(inside, self.base.log_prob(t) - math.log(upto - below), -torch.inf)


#: Distributions by name; what a recipe writes beside the name are the class's arguments.
TIMES: dict[str, type[Times]] = {
    c.name: c
    for c in (
        Uniform,
        LogitNormal,
        LogNormalSigma,
        Mode,
        CosMap,
        Shifted,
        Stratified,
        Table,
        Importance,
        Within,
    )
}


def times(which: str | dict[str, Any] | Times) -> Times:
    """A distribution of times by name, or by a mapping of name and arguments, or itself.

    Raises:
        UnknownName: if there is none of that name, or it has no such argument.
    """
    if isinstance(which, Times):
        return which
    if not isinstance(which, str | dict):
        raise Unsupported(f"a distribution of times is a name, a mapping or a Times, found {which!r}.")
    built: Times = build("distribution of times", TIMES, which)
    return built
