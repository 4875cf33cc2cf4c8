"""What a network might predict: every convention that is tried, and how well each turns its output into x0.

One output y of the network serves all targets: with x_t = α x0 + σ ε and x0 = a x_t + b y the squared error is a
quadratic form in (x0, ε, y), whose six products are taken once.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import INPUT_CONVENTIONS, TIME_CONVENTIONS
from ..errors import NetworkError, ReparamError, SingularTime, TimeOutOfRange
from ..schedules import DDPM, VE, Cosine, RectifiedFlow, Schedule
from ..targets import EDM, X0, Eps, Score, Target, V, Velocity, coefficients

#: log(α²s²/σ²) of the data's own standard deviation s, at which networks are asked: middle noise.
LEVELS = (3.0, 2.0, 1.0, 0.0)


@dataclass(frozen=True)
class Call:
    """How a network is asked: under which schedule, with which time and input. ``target`` matters to input "edm"."""

    schedule: Schedule
    time: str
    input: str
    target: Target | None

    def network_time(self, t: Tensor) -> Tensor:
        """The time it gives the network at t; between two steps of a table, that of the nearer."""
        if self.time == "step" and isinstance(self.schedule, DDPM):
            return (t * self.schedule.T - 1).round().clamp(0, self.schedule.T - 1).to(torch.int64)
        return TIME_CONVENTIONS[self.time](t, self.schedule)

    def factor(self, t: Tensor) -> float:
        """What it multiplies x_t with before the network sees it."""
        scale = INPUT_CONVENTIONS[self.input]
        return 1.0 if scale is None else float(scale(t, self.schedule, self.target))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Hypothesis:
    """One way of reading a network: y = sign · (p x0 + q ε), when it is asked like this."""

    target: Target
    sign: int
    call: Call

    @property
    def label(self) -> str:
        """What it predicts, with its sign: "v", "-velocity", "edm(sigma_data=0.5)"."""
        of = f"(sigma_data={self.target.sigma_data:.3g})" if isinstance(self.target, EDM) else ""
        return ("-" if self.sign < 0 else "") + self.target.name + of


def schedules_tried() -> list[Schedule]:
    """The forward processes in use: straight, cosine, tables with and without zero terminal SNR, exploding."""
    tables = [DDPM(betas, zero_terminal_snr=zero) for betas in ("linear", "scaled_linear") for zero in (False, True)]
    return [RectifiedFlow(), Cosine(), *tables, DDPM("squared_cosine"), VE()]


def targets_tried(sigma_data: float) -> list[Target]:
    """The published targets; EDM's for σ_d of 1, of 0.5 and of the data."""
    spreads: list[float] = []
    for s in (1.0, 0.5, sigma_data):
        if all(abs(math.log(s / other)) > 0.05 for other in spreads):
            spreads.append(s)
    return [X0(), Eps(), V(), Velocity(), Score(), *(EDM(s) for s in spreads)]


def hypotheses(schedules: Sequence[Schedule], targets: Sequence[Target]) -> list[Hypothesis]:
    """All combinations that make sense, the plainest first."""
    found = []
    for kind, sign, process, time, scaling in itertools.product(
        targets, (1, -1), schedules, TIME_CONVENTIONS, INPUT_CONVENTIONS
    ):
        if time == "step" and not isinstance(process, DDPM):
            continue
        if scaling == "edm" and not hasattr(kind, "sigma_data"):
            continue
        if scaling == "unit_variance" and isinstance(process, Cosine | DDPM):
            continue  # of unit variance already
        if isinstance(process, VE) and isinstance(kind, V | Velocity):
            continue  # nobody's: v is made for α² + σ² = 1, and the velocity would hang on how t counts σ
        call = Call(process, time, scaling, kind if scaling == "edm" else None)
        found.append(Hypothesis(kind, sign, call))
    return sorted(found, key=lambda h: h.sign < 0)


#: Of a first look at every reading: the least number of samples, and of numbers in them; and the levels.
SCREEN, SCREEN_NUMBERS, SCREENED = 64, 512, (2.0, 0.0)
#: The error of a reading at first look, over that of the best of all and over that of the best of its label, up to
#: which it is looked at again.
NEAR, NEAR_IN_LABEL = 1.3, 1.15
#: The error over that of guessing, and over the least of all, above which of a label the best reading alone is looked
#: at again: it will be no verdict, and thins no margin.
HOPELESS, FAR = 1.3, 4.0


class Work:
    """How many samples the network has seen, of how many it is expected to.

    Args:
        told: of both numbers, whenever it has seen more.
    """

    def __init__(self, told: Callable[[int, int], None] = lambda done, expected: None) -> None:
        self.told, self.done, self.expected = told, 0, 0

    def expect(self, n: int) -> None:
        """So many from now on."""
        self.expected = self.done + n

    def did(self, n: int) -> None:
        """So many more."""
        self.done += n
        self.told(self.done, max(self.done, self.expected))


#: Numbers that the network's answers may take while they are kept.
_KEPT = 2**26
#: The least error of x0 reported, over the data's variance.
_LEAST = 1e-12


class Probe:
    """A network, asked at noisy real data.

    Args:
        net: called as ``net(x, time, **cond)``.
        x0: real data, shape [n, …], float32. eps: noise of that shape.
        cond: passed on to the network, one entry a sample.
        batch: samples the network sees at a time.
        work: where what the network sees is counted.
    """

    def __init__(
        self,
        net: nn.Module,
        x0: Tensor,
        eps: Tensor,
        cond: Mapping[str, Tensor] | None = None,
        batch: int = 256,
        work: Work | None = None,
    ) -> None:
        self.net, self.x0, self.eps, self.cond, self.batch, self.work = net, x0, eps, cond or {}, batch, work or Work()
        self.variance = float((x0.double() - x0.double().mean(0)).square().mean())
        if not self.variance > 0:
            raise ReparamError("all data given are the same; expected different samples.")
        #: Why the network could not be asked in some way: by time convention.
        self.refused: dict[str, str] = {}
        #: Channels the network returned beyond those of the data.
        self.extra = 0
        self._answers: dict[Any, Tensor | None] = {}
        self._products: dict[Any, Tensor | None] = {}
        self._keys: dict[tuple[Call, float], tuple[str, str, str, torch.dtype]] = {}
        self._times: dict[tuple[float, Schedule], Tensor] = {}
        self._rows: dict[tuple[float, Target, Schedule], tuple[float, float, float]] = {}
        self._coefficients: dict[tuple[float, Schedule], tuple[float, float]] = {}

    def first(self, n: int) -> Probe:
        """The same with the first n of the samples alone."""
        few = copy.copy(self)
        few.x0, few.eps, few._answers, few._products = self.x0[:n], self.eps[:n], {}, {}
        return few

    def in_units(self, change: Callable[[Tensor], Tensor]) -> Probe:
        """The same with the data in other units."""
        other = Probe(self.net, change(self.x0), self.eps, self.cond, self.batch, self.work)
        other.refused = self.refused
        return other

    def time_of(self, level: float, schedule: Schedule) -> Tensor:
        """The time at which data of this variance have that log-SNR."""
        key = (level, schedule)
        if key not in self._times:
            self._times[key] = schedule.time_at(torch.tensor(level - math.log(self.variance), dtype=torch.float64))
        return self._times[key]

    def _levels(self, t: Tensor, schedule: Schedule) -> tuple[float, float]:
        """α and σ at t."""
        key = (float(t), schedule)
        if key not in self._coefficients:
            self._coefficients[key] = float(schedule.alpha(t)), float(schedule.sigma(t))
        return self._coefficients[key]

    def reached_by(self, schedule: Schedule) -> bool:
        """Whether a schedule has all of :data:`LEVELS`."""
        try:
            return all(0 < float(self.time_of(level, schedule)) <= 1 for level in LEVELS)
        except TimeOutOfRange:
            return False

    def guess(self, level: float) -> float:
        """The error of the best multiple of x_t about the mean, what an untrained network can come to."""
        return self.variance / (1 + math.exp(level))

    def _key(self, call: Call, level: float) -> tuple[str, str, str, torch.dtype]:
        """What the network is given; calls that give it the same have the same answer."""
        if (call, level) not in self._keys:
            t = self.time_of(level, call.schedule)
            factor, time = call.factor(t), call.network_time(t)
            alpha, sigma = self._levels(t, call.schedule)
            key = f"{factor * alpha:.9g}", f"{factor * sigma:.9g}", f"{float(time):.9g}", time.dtype
            self._keys[call, level] = key
        return self._keys[call, level]

    def planned(self, tried: Sequence[Hypothesis], levels: Sequence[float]) -> int:
        """How many samples the network is to see for the errors of these."""
        calls = {h.call for h in tried}
        different = {self._key(call, level) for call in calls for level in levels}
        return len(different) * len(self.x0)

    def answer(self, call: Call, level: float) -> Tensor | None:
        """What the network says, [n, …]; None where it cannot be asked so, or says what is not finite."""
        key = self._key(call, level)
        if key not in self._answers:
            if len(self._answers) * self.x0.numel() > _KEPT:
                self._answers.clear()
            t = self.time_of(level, call.schedule)
            factor, time = call.factor(t), call.network_time(t)
            alpha, sigma = (factor * part for part in self._levels(t, call.schedule))
            x = alpha * self.x0 + sigma * self.eps
            at = time.to(x.device, torch.int64 if time.dtype == torch.int64 else x.dtype)
            self._answers[key] = self.asked(x, at, call.time)
        return self._answers[key]

    @torch.no_grad()
    def asked(self, x: Tensor, time: Tensor, convention: str) -> Tensor | None:
        """What the network says of inputs [n, …] at one time, given as it wants it."""
        parts = []
        for start in range(0, len(x), self.batch):
            part = x[start : start + self.batch]
            cond = {name: value[start : start + len(part)] for name, value in self.cond.items()}
            try:
                y = self.net(part, time.expand(len(part)), **cond)
            except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as e:
                self.refused.setdefault(convention, f"{type(e).__name__}: {e}")
                return None
            parts.append(self._prediction(y, part))
            self.work.did(len(part))
        y = torch.cat(parts)
        return y if bool(y.isfinite().all()) else None

    def _prediction(self, y: Any, x: Tensor) -> Tensor:
        """The part of an output that stands for the data, if need be without the channels of a variance."""
        if isinstance(y, Tensor) and y.ndim == x.ndim and y.shape[2:] == x.shape[2:] and y.shape[0] == x.shape[0]:
            self.extra = max(self.extra, y.shape[1] - x.shape[1])
            if y.shape[1] >= x.shape[1]:
                return y[:, : x.shape[1]].to(x.dtype)
        found = f"shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise NetworkError(
            f"{type(self.net).__name__} returned {found} for an input of shape {list(x.shape)}; expected a tensor of "
            "the input's shape, or with further channels for a variance."
        )

    def errors(self, tried: Sequence[Hypothesis], levels: Sequence[float] = LEVELS) -> Tensor:
        """The mean squared x0-error of each hypothesis at each level, over that of guessing; float64 [H, L]."""
        found = [self._errors_at(tried, level) for level in levels]
        return torch.stack(found, dim=1)

    def _errors_at(self, tried: Sequence[Hypothesis], level: float) -> Tensor:
        found = torch.full((len(tried),), math.inf, dtype=torch.float64)
        of_call: dict[Call, list[int]] = {}
        for i, h in enumerate(tried):
            of_call.setdefault(h.call, []).append(i)
        for call, members in of_call.items():
            gram = self._gram(call, level)
            if gram is not None:
                rows = torch.tensor([self._row(tried[i], level) for i in members], dtype=torch.float64)
                error = (rows @ gram * rows).sum(1).clamp(min=_LEAST * self.variance)
                found[members] = error.where(error.isfinite(), math.inf)
        return found / self.guess(level)

    def _gram(self, call: Call, level: float) -> Tensor | None:
        """The means of the products of x0, ε and y, 3 × 3."""
        key = self._key(call, level)
        if key not in self._products:
            y = self.answer(call, level)
            if y is not None:
                rows = torch.stack([part.flatten() for part in (self.x0, self.eps, y)]).double()
                y = (rows @ rows.T / rows.shape[1]).cpu()
            self._products[key] = y
        return self._products[key]

    def _row(self, h: Hypothesis, level: float) -> tuple[float, float, float]:
        """The x0-error as a combination of x0, ε and y; infinite where the target says nothing of x0."""
        key = (level, h.target, h.call.schedule)
        if key not in self._rows:
            t = self.time_of(level, h.call.schedule)
            alpha, sigma = self._levels(t, h.call.schedule)
            try:
                a, b = (float(c) for c in coefficients(h.target, X0(), t, h.call.schedule))
            except SingularTime:
                a = b = math.inf
            self._rows[key] = a * alpha - 1, a * sigma, b
        of_x0, of_eps, of_y = self._rows[key]
        return of_x0, of_eps, h.sign * of_y

    def apart(self, best: Hypothesis, others: Sequence[Hypothesis], levels: Sequence[float] = LEVELS) -> Tensor:
        """How far the x0 estimates of others lie from those of the best, over its error: mean over levels, [H]."""
        total = torch.zeros(len(others), dtype=torch.float64)
        for level in levels:
            first = self.error_of(best, level)
            assert first is not None
            for i, h in enumerate(others):
                off = self.error_of(h, level)
                total[i] += math.inf if off is None else (off - first).square().mean() / first.square().mean()
        return total / len(levels)

    def error_of(self, h: Hypothesis, level: float) -> Tensor | None:
        """The x0 estimate less x0 itself, float64 [n, …]."""
        y = self.answer(h.call, level)
        if y is None:
            return None
        a, b, c = self._row(h, level)
        return a * self.x0.double() + b * self.eps.double() + c * y.double()


def first_look(probe: Probe, tried: Sequence[Hypothesis]) -> list[float]:
    """The errors over that of guessing, roughly: of few samples at few levels."""
    few = probe.first(max(SCREEN, SCREEN_NUMBERS // probe.x0[0].numel()))
    labels = {h.label for h in tried}
    # What comes after is not known yet; a reading of every label at least.
    probe.work.expect(few.planned(tried, SCREENED) + len(labels) * len(LEVELS) * len(probe.x0))
    return few.errors(tried, SCREENED).mean(1).tolist()


def in_the_running(tried: Sequence[Hypothesis], error: Sequence[float]) -> list[Hypothesis]:
    """Those worth a second look: of every label the best, and what comes close to it or to the best of all."""
    least: dict[str, float] = {}
    for h, found in zip(tried, error, strict=True):
        least[h.label] = min(found, least.get(h.label, math.inf))
    overall = min(least.values(), default=math.inf)
    # A network that does worse than guessing knows nothing, however it is read.
    near, enough = (0.0, 0.0) if overall > 1 else (NEAR * overall, min(HOPELESS, FAR * overall))
    kept = []
    for h, found in zip(tried, error, strict=True):
        of_label = least[h.label]
        most = max(near, of_label * (NEAR_IN_LABEL if of_label <= enough else 1))
        if math.isfinite(found) and found <= most:
            kept.append(h)
    return kept
