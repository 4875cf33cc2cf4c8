r"""How much each noise level counts in the loss.

A weighting is defined once, on the x0-error: the loss is
:math:`m_x(t)\,\lVert \hat x_0 - x_0 \rVert^2`. Since ε̂ − ε = −(α/σ)(x̂0 − x0), the same
weighting on the ε-error is :math:`m_\varepsilon = m_x/\mathrm{SNR}`, and on the error of any
target y it is :math:`m_x\,(\sigma/\Delta)^2 = m_\varepsilon\,(\alpha/\Delta)^2`.

Measuring the loss in the space of another target s is such a weighting,
:math:`m_x = \Delta_s^2/\sigma^2`: "predict x0, take the loss in velocity" is a weight, not a
second code path.

**Ends.** Everything is computed as a logarithm, and from the two forms above that one is
taken which is not 0·∞: the one with m_x on the noisy side (λ ≤ 0) and the one with m_ε on the
other, unless the target does not determine that error there. The weight on ε is therefore 1
for an ε-prediction even at α = 0, and the weight on x0 is 1 for an x0-prediction at σ = 0.
What remains infinite truly is: an error in ε or v measured by one in x0 at σ = 0, and an error
in x0 measured by one in ε at α = 0.

A new weighting is one class with one method, :meth:`Weighting.log_weight`.

References:
    One table of weightings: Kingma & Gao, arXiv 2303.00848. SNR and truncated SNR: Salimans & Ho,
    arXiv 2202.00512, section 4.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .errors import Unsupported, unknown
from .schedules import Schedule, Time, as_time, build, config_of
from .targets import ALIASES, TARGETS, Target, aligned, target
from .times import Times, Within, log_speed, log_turn, number, times

if TYPE_CHECKING:
    from .objective import Objective

#: The error that a weight multiplies.
Error = Literal["x0", "eps"]


class Weighting(ABC):
    """A weight on the x0-error, a function of (t, schedule)."""

    name: ClassVar[str]

    @abstractmethod
    def log_weight(self, t: Tensor, schedule: Schedule, error: Error) -> Tensor:
        """log m_x for ``error`` "x0", log m_ε = log m_x − λ for "eps", at float64 times; ±∞ allowed.

        Both are asked for, so that each is exact at its own end: where one is ∞ − ∞, the other is not.
        """

    def __call__(self, t: Time, schedule: Schedule) -> Tensor:
        """m_x, the weight on ‖x̂0 − x0‖² at times ``t``; float64, shape of t."""
        return self.log_weight(as_time(t), schedule, "x0").exp()

    def on_eps(self, t: Time, schedule: Schedule) -> Tensor:
        """m_ε, the same weighting on ‖ε̂ − ε‖²; float64, shape of t."""
        return self.log_weight(as_time(t), schedule, "eps").exp()

    def on_prediction(self, t: Time, schedule: Schedule, of: Target) -> Tensor:
        """The same weighting, on ‖ŷ − y‖² for a prediction of the target ``of``; ∞ only where it truly is."""
        t = as_time(t)
        in_x0, in_eps = of.amplification(t, schedule)
        log_snr, in_x0, in_eps, m_x, m_eps = aligned(
            t, _log_snr(t, schedule), in_x0, in_eps, *(self.log_weight(t, schedule, e) for e in ("x0", "eps"))
        )
        by_eps = torch.where(log_snr > 0, in_eps.isfinite(), ~in_x0.isfinite())
        return (torch.where(by_eps, m_eps, m_x) + 2 * torch.where(by_eps, in_eps, in_x0).log()).exp()

    def drawn_from(self, drawn: Times) -> Weighting:
        """The weighting for times from ``drawn``, bound to a schedule: itself, unless it divides by their density."""
        return self

    def learned(self) -> LearnedScale | None:
        """What is learned of it: a new module that turns (loss, log-SNR), both [B], into the loss; or None."""
        return None

    def config(self) -> Any:
        """The weighting as plain data, from which :func:`weighting` builds it again."""
        return {k: v.config() if hasattr(v, "config") else v for k, v in config_of(self).items()}


def _scaled(k: float, log: Tensor) -> Tensor:
    """k times a logarithm, where 0 times ±∞ is 0."""
    return torch.zeros_like(log) if k == 0 else k * log


def _log_snr(t: Tensor, schedule: Schedule) -> Tensor:
    """λ, by element where the noise differs by element (there the schedule's own is only a name of the level)."""
    alpha, sigma = aligned(t, schedule.alpha(t), schedule.sigma(t))
    return 2 * (alpha.log() - sigma.log())


def _one_on(t: Tensor, schedule: Schedule, error: Error) -> tuple[Tensor, Tensor]:
    """The logarithms of the weightings "1 on the ε-error" and "1 on the x0-error": (λ, 0) on x0, (0, −λ) on ε."""
    log_snr = _log_snr(t, schedule)
    zero = torch.zeros_like(log_snr)
    return (log_snr, zero) if error == "x0" else (zero, -log_snr)


def _positive(weighting: Weighting, argument: str) -> None:
    number(f"{argument} of weighting {weighting.name!r}", getattr(weighting, argument), lambda v: v > 0, "positive")


@dataclass(frozen=True)
class Space(Weighting):
    """The squared error in the space of a target: m_x = Δ_s²/σ², m_ε = Δ_s²/α²."""

    name: ClassVar[str] = "space"
    target: Target

    def log_weight(self, t: Tensor, schedule: Schedule, error: Error) -> Tensor:
        amplification = self.target.amplification(t, schedule)
        return -2 * (amplification.x0 if error == "x0" else amplification.eps).log()

    def __call__(self, t: Time, schedule: Schedule) -> Tensor:
        return self.target.amplification(t, schedule).x0 ** -2

    def on_prediction(self, t: Time, schedule: Schedule, of: Target) -> Tensor:
        """(Δ_s/Δ_p)²; exactly 1 in its own space."""
        t = as_time(t)
        if of == self.target:
            return torch.ones_like(t)
        own, other = aligned(t, self.target.delta(t, schedule), of.delta(t, schedule))
        direct = other.isfinite() & (other != 0)
        if bool(direct.all()):
            return (own / other) ** 2
        return torch.where(direct, (own / other) ** 2, super().on_prediction(t, schedule, of))

    def config(self) -> Any:
        own = self.target.config()
        return own["name"] if len(own) == 1 else own


@dataclass(frozen=True)
class TruncatedSNR(Weighting):
    """m_x = max(SNR, 1): the larger of the errors in x0 and in ε (Salimans & Ho, arXiv 2202.00512, section 4)."""

    name: ClassVar[str] = "snr_trunc"

    def log_weight(self, t: Tensor, schedule: Schedule, error: Error) -> Tensor:
        return torch.maximum(*_one_on(t, schedule, error))


@dataclass(frozen=True)
class MinSNR(Weighting):
    """m_x = min(SNR, γ) (Hang et al., arXiv 2303.09556); on v of a VP process min(SNR, γ)/(SNR + 1).

    At zero terminal SNR it is 1 on ε and 0 on v and x0: the terminal step is then never trained, unless
    floored (:class:`Floored`).

    Args:
        gamma: γ, positive.
    """

    name: ClassVar[str] = "min_snr"
    gamma: float = 5.0

    def __post_init__(self) -> None:
        _positive(self, "gamma")

    def log_weight(self, t: Tensor, schedule: Schedule, error: Error) -> Tensor:
        eps, x0 = _one_on(t, schedule, error)
        return torch.minimum(eps, x0 + math.log(self.gamma))


@dataclass(frozen=True)
class SoftMinSNR(Weighting):
    """m_x = SNR·γ/(SNR + γ): Min-SNR without its corner (Crowson et al., arXiv 2401.11605).

    Args:
        gamma: γ, positive.
    """

    name: ClassVar[str] = "soft_min_snr"
    gamma: float = 4.0

    def __post_init__(self) -> None:
        _positive(self, "gamma")

    def log_weight(self, t: Tensor, schedule: Schedule, error: Error) -> Tensor:
        eps, x0 = _one_on(t, schedule, error)
        return -torch.logaddexp(-eps, -x0 - math.log(self.gamma))


@dataclass(frozen=True)
class P2(Weighting):
    """m_x = SNR/(k + SNR)^γ: less weight on what is hardly noisy (Choi et al., arXiv 2204.00227).

    Args:
        k: positive. gamma: γ, not negative; 0 is the ε-error, and 1 with k = 1 is m_x = α² where α² + σ² = 1.
    """

    name: ClassVar[str] = "p2"
    k: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "k")
        number("gamma of weighting 'p2'", self.gamma, lambda g: g >= 0, "0 or more")

    def log_weight(self, t: Tensor, schedule: Schedule, error: Error) -> Tensor:
        eps, x0 = _one_on(t, schedule, error)
        excess = _log_snr(t, schedule) - math.log(self.k)  # log SNR/k
        # log (k + SNR)^γ from its larger term: SNR^γ, which leaves a power of SNR, or k^γ.
        clean = _scaled(1 - self.gamma, eps) + _scaled(self.gamma, x0) - self.gamma * _softplus(-excess)
        noisy = eps - self.gamma * (math.log(self.k) + _softplus(excess))
        return torch.where(excess > 0, clean, noisy)


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


@dataclass(frozen=True)
class EDM(Weighting):
    """m_x = (σ² + σ_d²)/(σ σ_d)² = SNR + 1/σ_d², with EDM's σ = σ_t/α_t (Karras et al., arXiv 2206.00364, table 1).

    It is the squared error in EDM's F, on any schedule.

    Args:
        sigma_data: σ_d, the standard deviation of the data, positive.
    """

    name: ClassVar[str] = "edm"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _positive(self, "sigma_data")

    def log_weight(self, t: Tensor, schedule: Schedule, error: Error) -> Tensor:
        eps, x0 = _one_on(t, schedule, error)
        return torch.logaddexp(eps, x0 - 2 * math.log(self.sigma_data))


@dataclass(frozen=True)
class EDM2(EDM):
    """EDM's weighting with a learned scale: the loss is L/e^{u(σ)} + u(σ) (Karras et al., arXiv 2312.02696, eq. 21).

    At the best u, e^u is the mean loss at σ, so that every noise level contributes gradients of one size.
    As a function of (t, schedule) it is EDM's; u is :meth:`learned`.
    """

    name: ClassVar[str] = "edm2"

    def learned(self) -> LearnedScale | None:
        return LearnedScale()


class LearnedScale(nn.Module):
    """u(λ), a linear layer on Fourier features of EDM's c_noise = ¼ ln(σ/α) = −λ/8, which starts at 0.

    u takes no further notice of λ beyond ±40 (σ/α below 2e-9 or above 5e8), and so is finite at both ends.
    The frequencies are drawn once and for all, from a generator of their own, and are part of the state.

    Args:
        channels: features, as many as EDM2's.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels, generator=generator))
        self.weight = nn.Parameter(torch.zeros(channels))

    def u(self, log_snr: Tensor) -> Tensor:
        """u at log-SNRs of shape [B], in the dtype and on the device of the parameters."""
        noise = (-log_snr / 8).clamp(-5, 5).to(self.weight)
        features = math.sqrt(2) * torch.cos(noise[..., None] * self.frequencies + self.phases)
        return features @ self.weight / math.sqrt(len(self.weight))

    def forward(self, loss: Tensor, log_snr: Tensor) -> Tensor:
        """L/e^u + u, for losses and log-SNRs of shape [B] (or a scalar log-SNR)."""
        u = self.u(log_snr).to(loss.dtype)
        return loss * torch.exp(-u) + u


@dataclass(frozen=True)
class JiT(Weighting):
    """m_x = 1/max(t, floor)²: JiT's velocity loss (arXiv 2511.13720), in our time.

    On rectified flow of any noise scale it is ``Capped("velocity", 1/floor²)``, the squared error in
    velocity (1/t²) with a cap. Elsewhere t means something else, and a cap on a space is the better choice.

    Args:
        floor: positive; JiT's is 0.05.
    """

    name: ClassVar[str] = "jit"
    floor: float = 0.05

    def __post_init__(self) -> None:
        _positive(self, "floor")

    def log_weight(self, t: Tensor, schedule: Schedule, error: Error) -> Tensor:
        _, x0 = _one_on(t, schedule, error)
        x0, time = aligned(t, x0, t.clamp(min=self.floor))
        return x0 - 2 * time.log()


@dataclass(frozen=True)
class _OfDensity(Weighting):
    """A weighting that divides by the density of the times drawn, which :meth:`drawn_from` tells it."""

    _drawn: Times | None = field(default=None, init=False, repr=False)

    def drawn_from(self, drawn: Times) -> Weighting:
        bound = copy.copy(self)
        object.__setattr__(bound, "_drawn", drawn)
        return bound

    def _from(self) -> Times:
        if self._drawn is None:
            raise Unsupported(
                f"weighting {self.name!r} divides by the density of the times drawn, which are not known here; use "
                "weighting.drawn_from(times)."
            )
        return self._drawn


@dataclass(frozen=True)
class Sigmoid(_OfDensity):
    """w(λ) = sigmoid(b − λ) on the ε-error, whatever times are drawn (Kingma & Gao, arXiv 2303.00848).

    It is a weighting of the *density* in λ, so for times drawn with a density p(λ) it is
    m_ε = sigmoid(b − λ)/p(λ), p(λ) = p(t)/|dλ/dt|; for uniform times m_ε = |dλ/dt| sigmoid(b − λ), as in
    simpler diffusion (Hoogeboom et al., arXiv 2410.19324). On the ε-error it is infinite at α = 0 where |dλ/dt|
    is, and on the x0-error at σ = 0. Under a ``t_range`` p is the density given that range.

    Args:
        bias: b; noise levels with λ below it count.
    """

    name: ClassVar[str] = "sigmoid"
    bias: float = 0.0

    def __post_init__(self) -> None:
        number("bias of weighting 'sigmoid'", self.bias, lambda b: True, "a finite number")

    def log_weight(self, t: Tensor, schedule: Schedule, error: Error) -> Tensor:
        # sigmoid(b − λ) = e^b σ²/(α² + e^b σ²) and |dλ/dt| = turn/(α σ), multiplied out: no ∞ − ∞ at an end.
        alpha, sigma = schedule.alpha(t).log(), schedule.sigma(t).log()
        regular = self.bias - torch.logaddexp(2 * alpha, self.bias + 2 * sigma) + log_turn(t, schedule)
        towards = alpha - sigma if error == "x0" else sigma - alpha
        return regular + towards - self._from().log_prob(t)


@dataclass(frozen=True)
class Corrected(_OfDensity):
    """Another weighting as if times were drawn from ``reference``: m_x·p_reference(t)/p(t).

    So the objective does not depend on the times drawn, only its variance does (importance sampling,
    :class:`reparam.times.Importance`). Under a ``t_range`` both densities are those given that range.

    Args:
        base: the weighting, an object, a name or a mapping.
        reference: the times it was meant for, likewise.
    """

    name: ClassVar[str] = "corrected"
    base: Any
    reference: Any = "uniform"

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", weighting(self.base))
        object.__setattr__(self, "reference", times(self.reference))
        _refuse_learned(self)

    def log_weight(self, t: Tensor, schedule: Schedule, error: Error) -> Tensor:
        drawn, reference = self._from(), self.reference.on(schedule)
        if isinstance(drawn, Within):
            reference = reference.within(drawn.low, drawn.high)
        base = self.base.drawn_from(reference).log_weight(t, schedule, error)
        base, change = aligned(t, base, reference.log_prob(t) - drawn.log_prob(t))
        return base + change


@dataclass(frozen=True)
class _Bounded(Weighting):
    """Another weighting and a bound on m_x."""

    base: Any

    def drawn_from(self, drawn: Times) -> Weighting:
        bound = copy.copy(self)
        object.__setattr__(bound, "base", self.base.drawn_from(drawn))
        return bound

    def _logs(self, t: Tensor, schedule: Schedule, error: Error, bound: float) -> list[Tensor]:
        _, x0 = _one_on(t, schedule, error)
        return aligned(t, self.base.log_weight(t, schedule, error), x0 + math.log(bound))


@dataclass(frozen=True)
class Capped(_Bounded):
    """Another weighting, at most ``cap`` on the x0-error, alike for every target.

    ``Capped("velocity", 400)`` is JiT's floor of 0.05 under its time in the loss
    (arXiv 2511.13720): 1/max(t, 0.05)².
    """

    name: ClassVar[str] = "capped"
    cap: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", weighting(self.base))
        object.__setattr__(self, "cap", number("the cap on a weighting", self.cap, lambda c: c > 0, "positive"))
        _refuse_learned(self)

    def log_weight(self, t: Tensor, schedule: Schedule, error: Error) -> Tensor:
        return torch.minimum(*self._logs(t, schedule, error, self.cap))


@dataclass(frozen=True)
class Floored(_Bounded):
    """Another weighting, at least ``floor`` on the x0-error, alike for every target.

    With zero terminal SNR, ``Floored("min_snr", 1)`` trains the terminal step, which Min-SNR on x0 or v
    gives no weight.
    """

    name: ClassVar[str] = "floored"
    floor: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", weighting(self.base))
        object.__setattr__(self, "floor", number("the floor of a weighting", self.floor, lambda f: f > 0, "positive"))
        _refuse_learned(self)

    def log_weight(self, t: Tensor, schedule: Schedule, error: Error) -> Tensor:
        return torch.maximum(*self._logs(t, schedule, error, self.floor))


@dataclass(frozen=True)
class Sum(Weighting):
    """A sum of weightings: ``Sum({"x0": 1, "eps": 0.1})`` is the x0-error plus a tenth of the ε-error.

    Args:
        terms: a mapping of names to positive factors, or pairs of a weighting (an object, a name or a
            mapping) and a factor.
    """

    name: ClassVar[str] = "sum"
    terms: Any

    def __post_init__(self) -> None:
        pairs = list(self.terms.items() if isinstance(self.terms, Mapping) else self.terms)
        if not pairs or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise Unsupported(f"a sum of weightings is a mapping of names to factors, found {self.terms!r}.")
        built = [(weighting(w), number(f"the factor of {w}", c, lambda f: f > 0, "positive")) for w, c in pairs]
        object.__setattr__(self, "terms", tuple(built))
        _refuse_learned(self)

    def drawn_from(self, drawn: Times) -> Weighting:
        return Sum([(w.drawn_from(drawn), factor) for w, factor in self.terms])

    def log_weight(self, t: Tensor, schedule: Schedule, error: Error) -> Tensor:
        logs = [w.log_weight(t, schedule, error) + math.log(factor) for w, factor in self.terms]
        return torch.logsumexp(torch.stack(torch.broadcast_tensors(*aligned(t, *logs))), 0)

    def on_prediction(self, t: Time, schedule: Schedule, of: Target) -> Tensor:
        t = as_time(t)
        parts = [factor * w.on_prediction(t, schedule, of) for w, factor in self.terms]
        total = torch.zeros((), dtype=torch.float64)
        for part in aligned(t, *parts):
            total = total + part
        return total

    def config(self) -> Any:
        configs = [(w.config(), factor) for w, factor in self.terms]
        if all(isinstance(c, str) for c, _ in configs) and len(dict(configs)) == len(configs):
            return dict(configs)
        return {"name": self.name, "terms": [list(pair) for pair in configs]}


def _refuse_learned(outer: Weighting) -> None:
    inner = [w for w, _ in outer.terms] if isinstance(outer, Sum) else [getattr(outer, "base", outer)]
    for w in inner:
        if w.learned() is not None:
            raise Unsupported(
                f"weighting {w.name!r} learns its own scale, which weighting {outer.name!r} around it would undo; "
                "use 'edm' inside it."
            )


#: Weightings by name, besides the targets' names (the spaces); what a recipe writes beside the name are arguments.
WEIGHTINGS: dict[str, type[Weighting]] = {
    c.name: c
    for c in (
        TruncatedSNR,
        MinSNR,
        SoftMinSNR,
        P2,
        Sigmoid,
        EDM,
        EDM2,
        JiT,
        Capped,
        Floored,
        Sum,
        Corrected,
    )
}


def weighting(which: str | Mapping[str, Any] | Weighting) -> Weighting:
    """A weighting by name (one of :data:`WEIGHTINGS`, or a target whose space the error is squared in), by a
    mapping of name and arguments (``{name: min_snr, gamma: 5}``), by a mapping of names to the factors of
    their sum (``{x0: 1, eps: 0.1}``), or itself.

    Raises:
        UnknownName: if there is none of that name, or it has no such argument.
        ReparamError: if an argument is missing or not what it should be.
    """
    if isinstance(which, Weighting):
        return which
    if not isinstance(which, str | Mapping) or not which:
        raise unknown("weighting", which, [*TARGETS, *WEIGHTINGS])
    if isinstance(which, Mapping) and "name" not in which:
        return Sum(which)
    arguments = {"name": which} if isinstance(which, str) else dict(which)
    name = str(arguments["name"])
    if name in WEIGHTINGS:
        built: Weighting = build("weighting", WEIGHTINGS, arguments)
        return built
    if name not in TARGETS and name not in ALIASES:
        raise unknown("weighting", name, [*TARGETS, *WEIGHTINGS])
    return Space(target(arguments))


def space(which: Target | str | Mapping[str, Any]) -> Weighting:
    """The squared error in the space of a target, or in a sum of spaces (``{x0: 1, eps: 0.1}``, the hybrid loss).

    Raises:
        UnknownName: if a target of that name does not exist.
    """
    if isinstance(which, Mapping) and "name" not in which:
        return Sum([(Space(target(name)), factor) for name, factor in which.items()])
    return Space(target(which if isinstance(which, str | Target) else dict(which)))


def effective(objective: Objective, log_snr: Time) -> Tensor:
    r"""w(λ) = p(λ) m_ε(λ): what an objective comes to, by which two settings can be seen to be the same one.

    The expected loss of an objective is :math:`\tfrac1D \int w(\lambda)\,\mathbb E\lVert \hat\varepsilon -
    \varepsilon\rVert^2 d\lambda` over D elements, with p(λ) = p(t)/|dλ/dt| the density of the times drawn:
    2/D times Kingma & Gao's ½ ∫ w … dλ (arXiv 2303.00848) for the same w. Nothing is normalised; two objectives
    whose w differ by a factor have the same minimum and gradients of different size. A learned scale is left
    out, and times that are rounded to a table's steps count where they were before.

    Args:
        objective: the objective; its weight is per noise level, not per element.
        log_snr: λ, finite, any shape, where the schedule has it.

    Returns:
        w(λ), float64, shape of ``log_snr``; 0 where no times are drawn.

    Raises:
        TimeOutOfRange: where the schedule never reaches a log-SNR.
    """
    schedule, drawn = objective.schedule, objective.times.on(objective.schedule)
    t = schedule.time_at(torch.as_tensor(log_snr, dtype=torch.float64))
    density = drawn.log_prob(t) - log_speed(t, schedule)
    weight = objective.weighting.drawn_from(drawn).log_weight(t, schedule, "eps").detach()
    return torch.where(density.isneginf(), 0.0, (weight + density).exp())
