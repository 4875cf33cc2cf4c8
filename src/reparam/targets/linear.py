"""The targets that are two numbers at every time: the published ones, and any other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ReparamError, Unsupported
from ..expressions import parsed
from ..schedules import Schedule
from .core import Target, aligned, target


@dataclass(frozen=True)
class V(Target):
    """v = α ε − σ x0 (Salimans & Ho): p = −σ, q = α, Δ = α² + σ². Not the flow velocity."""

    name: ClassVar[str] = "v"
    words: ClassVar[str] = "v = alpha*eps - sigma*x0 (Salimans & Ho), not the flow velocity"

    def rows(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        return -schedule.sigma(t), schedule.alpha(t)


@dataclass(frozen=True)
class Velocity(Target):
    """dx_t/dt = α' x0 + σ' ε: p = α', q = σ'. On rectified flow, noise_scale·ε − x0."""

    name: ClassVar[str] = "velocity"
    words: ClassVar[str] = "the velocity dx_t/dt = alpha'*x0 + sigma'*eps, not v"

    def rows(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        return schedule.alpha_dot(t), schedule.sigma_dot(t)


@dataclass(frozen=True)
class Score(Target):
    """The score of x_t given x0, −ε/σ: p = 0, q = −1/σ (Song et al., arXiv 2011.13456).

    Infinite at σ = 0, and does not determine x0 at α = 0. Trained without a weighting it is dominated
    by the least noise.
    """

    name: ClassVar[str] = "score"
    words: ClassVar[str] = "the score of x_t, -eps/sigma"

    def rows(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        sigma = schedule.sigma(t)
        return torch.zeros_like(sigma), -1 / sigma


@dataclass(frozen=True)
class EDM(Target):
    """EDM's F (Karras et al., arXiv 2206.00364, eq. 7 and table 1), for any schedule.

    x0 = c_skip x_t + c_out F with c_skip = α σ_d²/R², c_out = σ σ_d/R and R² = α² σ_d² + σ², so that
    p = σ/(σ_d R), q = −α σ_d/R and Δ = −R/σ_d: never singular. F has unit variance for data of standard
    deviation σ_d; the network's input wants the scaling "edm", 1/R.

    Args:
        sigma_data: σ_d, the standard deviation of the data, positive.
    """

    name: ClassVar[str] = "edm"
    words: ClassVar[str] = "EDM's F, from x0 = c_skip*x_t + c_out*F"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < math.inf:
            raise Unsupported(f"edm: sigma_data must be positive, found {self.sigma_data!r}.")

    def rows(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        s = self.sigma_data
        alpha, sigma = aligned(t, schedule.alpha(t), schedule.sigma(t))
        r = torch.hypot(alpha * s, sigma)
        return sigma / (s * r), -alpha * s / r


#: What a formula of p or q may name, float64.
NAMES: dict[str, Callable[[Tensor, Schedule], Tensor]] = {
    "t": lambda t, s: t,
    "alpha": lambda t, s: s.alpha(t),
    "sigma": lambda t, s: s.sigma(t),
    "alpha_dot": lambda t, s: s.alpha_dot(t),
    "sigma_dot": lambda t, s: s.sigma_dot(t),
    "log_snr": lambda t, s: s.log_snr(t),
    "snr": lambda t, s: s.log_snr(t).exp(),
}
#: A row's half: a number, a formula, or a function of (α, σ).
Entry = float | str | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Linear(Target):
    """Any target y = p x0 + q ε.

    Args:
        p, q: each a number, a formula such as "-sigma" or "alpha / sqrt(1 + snr)"
            (:mod:`reparam.expressions`), or a function of (α, σ). Functions cannot be written to a spec.

    Raises:
        ReparamError: if a formula cannot be read.
    """

    name: ClassVar[str] = "linear"
    p: Entry
    q: Entry
    _read: tuple[Any, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_read", (_function(self.p), _function(self.q)))

    @property
    def words(self) -> str:  # type: ignore[override]
        """What it is, for a reader."""
        return f"({self.p})*x0 + ({self.q})*eps"

    def rows(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        p, q = (read(t, schedule) for read in self._read)
        return p, q

    def config(self) -> dict[str, Any]:
        for entry in (self.p, self.q):
            if callable(entry):
                raise Unsupported(
                    f"a target made of the function {getattr(entry, '__name__', entry)!r} cannot be written down; "
                    "give p and q as formulas, for example Linear(p='-sigma', q='alpha')."
                )
        return super().config()


def _function(entry: Entry) -> Callable[[Tensor, Schedule], Tensor]:
    if isinstance(entry, str):
        formula = parsed(entry, list(NAMES))

        def read(t: Tensor, s: Schedule) -> Tensor:
            values = aligned(t, *(value(t, s) for value in NAMES.values()))
            return formula(dict(zip(NAMES, values, strict=True)))

        return read
    if callable(entry):
        return lambda t, s: entry(*aligned(t, s.alpha(t), s.sigma(t))) + aligned(t, torch.zeros_like(t), s.sigma(t))[0]
    if isinstance(entry, bool) or not isinstance(entry, int | float) or not math.isfinite(entry):
        raise ReparamError(f"linear: p and q are numbers, formulas or functions of (alpha, sigma), found {entry!r}.")
    return lambda t, s: torch.full_like(t, float(entry))


@dataclass(frozen=True)
class KTarget(Target):
    """u = k x0 − (1 − k) ε (arXiv 2601.21419): from −ε at k = 0 over the straight path's −velocity/2 to x0 at 1.

    Args:
        k: in [0, 1].
        learned: k = sigmoid(w) is trained with the network, from this k on. The loss must then be
            measured in a space that does not change with k (``loss_space``, or a weighting).
    """

    name: ClassVar[str] = "k"
    k: float = 0.5
    learned: bool = False
    _logit: nn.Parameter | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int | float) or not 0 <= self.k <= 1:
            raise Unsupported(f"k must lie in [0, 1], found {self.k!r}.")
        if self.learned and not 0 < self.k < 1:
            raise Unsupported(f"a learned k starts strictly between 0 and 1, found {self.k!r}.")

    @property
    def words(self) -> str:  # type: ignore[override]
        """What it is, for a reader."""
        return f"k*x0 - (1 - k)*eps with k = {self.value:.4g}{' (learned)' if self.learned else ''}"

    @property
    def value(self) -> float:
        """k as it is now."""
        return float(self.k) if self._logit is None else float(torch.sigmoid(self._logit.detach()))

    def to_learn(self) -> KTarget:
        """The same target with a parameter of its own."""
        made = KTarget(self.k, True)
        start = torch.tensor(float(self.k), dtype=torch.float64).logit().float()
        object.__setattr__(made, "_logit", nn.Parameter(start))
        return made

    @property
    def parameter(self) -> nn.Parameter | None:
        """What is learned: the logit of k."""
        return self._logit

    def frozen(self) -> KTarget:
        """The target with k as it is now."""
        return KTarget(self.value) if self.learned else self

    def rows(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        if self._logit is None:
            k = torch.full_like(t, float(self.k))
        else:
            k = torch.sigmoid(self._logit.to("cpu", torch.float64)).expand_as(t)
        return k, k - 1


@dataclass(frozen=True)
class Negated(Target):
    """−y of another target y: for networks trained with the other sign, such as x0 − ε for the straight path.

    Args:
        of: a target that is two numbers at every time, with nothing to learn: an object, a name or a mapping. For
            one that differs by direction, negate its parts.

    Raises:
        UnknownName: if there is no such target.
        Unsupported: if it is no such target.
    """

    name: ClassVar[str] = "negated"
    of: Any

    def __post_init__(self) -> None:
        of = target(self.of)
        own = type(of).apply is not Target.apply or type(of).to_x0 is not Target.to_x0
        if own or isinstance(of, Negated) or (isinstance(of, KTarget) and of.learned):
            raise Unsupported(
                f"negated: found {of.name}{' with a k to learn' if isinstance(of, KTarget) else ''}; expected a plain "
                "target, such as {name: negated, of: velocity}."
            )
        object.__setattr__(self, "of", of)

    @property
    def words(self) -> str:  # type: ignore[override]
        """What it is, for a reader."""
        return f"minus {self.of.name}: -1 times {self.of.words}"

    @property
    def sigma_data(self) -> float:
        """σ_d, where the other target has one."""
        found: float = self.of.sigma_data
        return found

    def rows(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        p, q = self.of.rows(t, schedule)
        return -p, -q

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "of": self.of.config()}
