"""What a network might predict: every convention that is tried, and how well each turns its output into x0.

One output y of the network serves all targets: with x_t = α x0 + σ ε and x0 = a x_t + b y the squared error is a
quadratic form in (x0, ε, y), whose six products are taken once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
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


#: Numbers that the network's answers may take while they are kept.
_KEPT = 2**26


class Probe:
    """A network, asked at noisy real data.

    Args:
        net: called as ``net(x, time, **cond)``.
        x0: real data, shape [n, …], float32. eps: noise of that shape.
        cond: passed on to the network, one entry a sample.
        batch: samples the network sees at a time.
    """

    def __init__(
        self, net: nn.Module, x0: Tensor, eps: Tensor, cond: Mapping[str, Tensor] | None = None, batch: int = 256
    ) -> None:
        self.net, self.x0, self.eps, self.cond, self.batch = net, x0, eps, cond or {}, batch
        self.variance = float((x0.double() - x0.double().mean(0)).square().mean())
        if not self.variance > 0:
            raise ReparamError("all data given are the same; expected different samples.")
        #: Why the network could not be asked in some way: by time convention.
        self.refused: dict[str, str] = {}
        #: Channels the network returned beyond those of the data.
        self.extra = 0
        self._answers: dict[Any, Tensor | None] = {}
        self._times: dict[tuple[float, Schedule], Tensor] = {}
        self._rows: dict[tuple[float, Target, Schedule], tuple[float, float, float]] = {}
        self._coefficients: dict[tuple[float, Schedule], tuple[float, float]] = {}

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

    def answer(self, call: Call, t: Tensor) -> Tensor | None:
        """What the network says, [n, …]; None where it cannot be asked so, or says what is not finite."""
        factor, time = call.factor(t), call.network_time(t)
        alpha, sigma = (factor * part for part in self._levels(t, call.schedule))
        key = (f"{alpha:.9g}", f"{sigma:.9g}", f"{float(time):.9g}", time.dtype)
        if key not in self._answers:
            if len(self._answers) * self.x0.numel() > _KEPT:
                self._answers.clear()
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
            cond = {name: value[start : start + self.batch] for name, value in self.cond.items()}
            try:
                y = self.net(part, time.expand(len(part)), **cond)
            except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as e:
                self.refused.setdefault(convention, f"{type(e).__name__}: {e}")
                return None
            parts.append(self._prediction(y, part))
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
        products: dict[Call, list[list[float]] | None] = {}
        found = torch.full((len(tried),), math.inf, dtype=torch.float64)
        for i, h in enumerate(tried):
            if h.call not in products:
                products[h.call] = self._products(h.call, level)
            if (gram := products[h.call]) is None:
                continue
            row = self._row(h, level)
            error = sum(p * q * g for p, line in zip(row, gram, strict=True) for q, g in zip(row, line, strict=True))
            if math.isfinite(error):
                found[i] = max(error, 1e-12 * self.variance)
        return found / self.guess(level)

    def _products(self, call: Call, level: float) -> list[list[float]] | None:
        """The means of the products of x0, ε and y, 3 × 3."""
        y = self.answer(call, self.time_of(level, call.schedule))
        if y is None:
            return None
        rows = torch.stack([part.flatten() for part in (self.x0, self.eps, y)]).double()
        found: list[list[float]] = (rows @ rows.T / rows.shape[1]).tolist()
        return found

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
        y = self.answer(h.call, self.time_of(level, h.call.schedule))
        if y is None:
            return None
        a, b, c = self._row(h, level)
        return a * self.x0.double() + b * self.eps.double() + c * y.double()
