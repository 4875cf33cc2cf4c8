r"""What the network predicts.

Every linear target is a row :math:`(p, q)`: the network is asked for

.. math:: y = p(t)\, x_0 + q(t)\, \varepsilon .

Together with :math:`x_t = \alpha x_0 + \sigma \varepsilon` that is a 2×2 system with the
determinant :math:`\Delta = \alpha q - \sigma p`, and solving it once gives everything:

.. math::
    x_0 = \frac{q\, x_t - \sigma\, y}{\Delta}, \qquad
    \varepsilon = \frac{\alpha\, y - p\, x_t}{\Delta}, \qquad
    y' = \frac{(p' q - q' p)\, x_t + \Delta'\, y}{\Delta} ,

the last being any other target :math:`y' = p' x_0 + q' \varepsilon`. An error in y is
amplified by σ/|Δ| in x0 and by α/|Δ| in ε, so a target is singular where Δ = 0.

A new target is one class with one method, :meth:`Target.rows`.

References:
    ε: Ho et al., arXiv 2006.11239. v: Salimans & Ho, arXiv 2202.00512, appendix D.
    Velocity: Lipman et al., arXiv 2210.02747. x0 on pixels: Li & He, arXiv 2511.13720.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import ReparamError, SingularTime, Unsupported, unknown
from ..schedules import DDPM, Schedule, Time, as_time, build, config_of, like


class Amplification(NamedTuple):
    """By how much an error in the prediction grows in x0 and in ε; float64, ∞ where singular."""

    x0: Tensor
    eps: Tensor


class Target(ABC):
    """A linear target. A subclass gives :meth:`rows`; everything else is derived from it."""

    name: ClassVar[str]
    #: What it is, for a reader.
    words: ClassVar[str] = "a linear target p*x0 + q*eps"

    @property
    def on_steps(self) -> bool:
        """Whether it is defined on the steps of a table alone, and not between them."""
        return any(part.on_steps for part in vars(self).values() if isinstance(part, Target))

    @abstractmethod
    def rows(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """The row (p, q) at times ``t`` (float64, any shape), in float64.

        The shape is that of ``t``. A row that differs by element, or by direction, has the shape
        [B or 1, …] of data that it can be multiplied with, whatever the shape of ``t``.
        """

    def apply(self, c: Tensor, y: Tensor) -> Tensor:
        """A float64 coefficient times data y [B, …]: elementwise, unless overridden."""
        return like(c, y) * y

    def delta(self, t: Time, schedule: Schedule) -> Tensor:
        """Δ = α q − σ p in float64: the target determines x0 and ε where it is not zero."""
        t = as_time(t)
        p, q, alpha, sigma = aligned(t, *self.rows(t, schedule), schedule.alpha(t), schedule.sigma(t))
        return alpha * q - sigma * p

    def encode(self, x0: Tensor, eps: Tensor, t: Time, schedule: Schedule) -> Tensor:
        """y = p x0 + q ε, for x0 and ε of shape [B, …] and t a scalar or of shape [B].

        Raises:
            SingularTime: where the target itself is infinite.
        """
        t = as_time(t)
        p, q = aligned(t, *self.rows(t, schedule))
        _refuse_infinite(p + q, t, f"{self} has no finite value", schedule)
        return combined(self, p, x0, q, eps)

    def to_x0(self, y: Tensor, x_t: Tensor, t: Time, schedule: Schedule) -> Tensor:
        """x0 from a prediction ``y`` of this target; where σ = 0 that is x_t/α, whatever y says.

        Raises:
            SingularTime: where Δ = 0.
        """
        return convert(y, x_t, t, schedule, source=self, to=X0())

    def to_eps(self, y: Tensor, x_t: Tensor, t: Time, schedule: Schedule) -> Tensor:
        """ε from a prediction ``y`` of this target.

        Raises:
            SingularTime: where Δ = 0.
        """
        return convert(y, x_t, t, schedule, source=self, to=Eps())

    def amplification(self, t: Time, schedule: Schedule) -> Amplification:
        """σ/|Δ| in x0 and α/|Δ| in ε, for an error of size one in the prediction."""
        t = as_time(t)
        p, q, alpha, sigma = aligned(t, *self.rows(t, schedule), schedule.alpha(t), schedule.sigma(t))
        delta = (alpha * q - sigma * p).abs()
        # A row without ε has Δ = −σp, and one without x0 has Δ = αq: the quotients without 0/0.
        x0 = torch.where(q == 0, 1 / p.abs(), sigma / delta)
        eps = torch.where(p == 0, 1 / q.abs(), alpha / delta)
        return Amplification(x0, eps)

    def condition(self, t: Time, schedule: Schedule, to: Target | str = "x0") -> Tensor:
        """How much relative rounding error grows when this target is converted to ``to``.

        With y' = a x_t + b y it is (|a|(α + σ) + |b|(|p| + |q|)) / (|p'| + |q'|): the sizes of
        the two terms against that of their sum, for x0 and ε of size one. ∞ where singular.
        """
        t, to = as_time(t), target(to)
        p, q, p2, q2, alpha, sigma = _all_rows(self, to, t, schedule)
        a, b = _solve(self, to, t, schedule)
        size_in = a.abs() * (alpha + sigma) + b.abs() * (p.abs() + q.abs())
        kappa = size_in / (p2.abs() + q2.abs())
        return torch.where(kappa.isfinite(), kappa, torch.inf)

    def singular_times(
        self, schedule: Schedule, t_range: tuple[float, float] = (0.0, 1.0), points: int = 2049
    ) -> list[float]:
        """The times in ``t_range`` at which x0 does not follow from the prediction.

        Both ends and a grid are evaluated; a change of sign of Δ between two points of the
        grid is traced to its zero by bisection. Of a target on steps alone, those are evaluated.
        """
        if self.on_steps and isinstance(schedule, DDPM):
            t = schedule.time(torch.arange(schedule.T))
            t = t[(t >= t_range[0] - 1e-9) & (t <= t_range[1] + 1e-9)]
        else:
            t = torch.linspace(*t_range, points, dtype=torch.float64)
            t[-1] = t_range[1]
        lost = ~self.amplification(t, schedule).x0.isfinite()
        found: list[float] = t[lost.reshape(len(t), -1).any(1)].tolist()
        if self.on_steps:
            return found
        delta = self.delta(t, schedule).reshape(len(t), -1)
        for i in ((delta[:-1] * delta[1:]) < 0).any(1).nonzero().flatten().tolist():
            column = int(((delta[i] * delta[i + 1]) < 0).nonzero()[0])
            found.append(self._zero_between(float(t[i]), float(t[i + 1]), schedule, column))
        return sorted(found)

    def _zero_between(self, low: float, high: float, schedule: Schedule, column: int) -> float:
        def value(t: float) -> float:
            return float(self.delta(t, schedule).flatten()[column])

        sign = value(low)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if value(middle) * sign > 0 else (low, middle)
        return (low + high) / 2

    def config(self) -> dict[str, Any]:
        """The target as plain data, from which :func:`target` builds it again."""
        return config_of(self)


@dataclass(frozen=True)
class X0(Target):
    """The clean data: p = 1, q = 0. Regular everywhere."""

    name: ClassVar[str] = "x0"
    words: ClassVar[str] = "the clean data x0"

    def rows(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.zeros_like(t)


@dataclass(frozen=True)
class Eps(Target):
    """The noise: p = 0, q = 1. Singular where α = 0, at the end of rectified flow and of the cosine."""

    name: ClassVar[str] = "eps"
    words: ClassVar[str] = "the noise eps"

    def rows(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)


#: Targets by name; what a recipe writes beside the name are the class's arguments.
TARGETS: dict[str, type[Target]] = {"x0": X0, "eps": Eps}
#: The names that diffusers' schedulers use.
ALIASES = {"sample": "x0", "epsilon": "eps", "v_prediction": "v", "flow_prediction": "velocity"}


def target(which: str | dict[str, Any] | Target) -> Target:
    """A target by name (ours or diffusers'), or by a mapping of name and arguments, or itself.

    Raises:
        UnknownName: if no target has that name.
    """
    if isinstance(which, Target):
        return which
    if not isinstance(which, str | dict):
        raise ReparamError(
            f"a target is a name or a mapping such as {{name: edm, sigma_data: 0.5}}, found {which!r}. To compare "
            "several, list whole targets."
        )
    arguments: dict[str, Any] = {"name": which} if isinstance(which, str) else dict(which)
    name = arguments.get("name")
    arguments["name"] = ALIASES.get(str(name), name)
    if not isinstance(name, str) or arguments["name"] not in TARGETS:
        raise unknown("target", name, [*TARGETS, *ALIASES])
    built: Target = build("target", TARGETS, arguments)
    return built


def convert(y: Tensor, x_t: Tensor, t: Time, schedule: Schedule, *, source: str | Target, to: str | Target) -> Tensor:
    """The same prediction, expressed as another target.

    Args:
        y: the prediction, shape [B, …], in the ``source`` target.
        x_t: the noisy data that it was made from, same shape.
        t: a scalar or shape [B], in [0, 1].
        source: the target that ``y`` is in.
        to: the target wanted.

    Returns:
        The prediction in ``to``; shape, device and dtype of ``y`` and ``x_t`` by torch's promotion.

    Raises:
        SingularTime: where the answer does not follow from ``y`` and ``x_t``.
        Unsupported: between targets in two different bases, whose directions do not belong together.
    """
    source, to = target(source), target(to)
    bases = [getattr(kind, "basis", None) for kind in (source, to)]
    if None not in bases and bases[0] != bases[1]:
        raise Unsupported(
            f"{source.name} and {to.name} have two different bases, and no coefficients a direction lead from one to "
            "the other; convert to a target without a basis first, such as v."
        )
    t = as_time(t)
    a, b = coefficients(source, to, t, schedule)
    # A target in a basis overrides apply; at most one of the two does, and it applies both terms.
    kind = source if type(source).apply is not Target.apply else to
    return combined(kind, a, x_t, b, y)


def combined(kind: Target, a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a x + b y in the sense of ``kind``, without the passes over data that a coefficient of zero saves."""
    if not bool(b.any()):
        return kind.apply(a, x)
    if not bool(a.any()):
        return kind.apply(b, y)
    return kind.apply(a, x) + kind.apply(b, y)


def aligned(t: Tensor, *values: Tensor) -> list[Tensor]:
    """Coefficients at times ``t`` that broadcast against each other: plain ones, of t's shape, get the axes
    that those by element or by direction have."""
    axes = max(v.ndim for v in values)
    if axes == t.ndim:
        return list(values)
    return [v if v.ndim == axes else v.reshape(v.shape or (1,)).reshape(-1, *[1] * (axes - 1)) for v in values]


def _all_rows(source: Target, to: Target, t: Tensor, schedule: Schedule) -> list[Tensor]:
    """p, q, p', q', α, σ."""
    rows = (*source.rows(t, schedule), *to.rows(t, schedule))
    return aligned(t, *rows, schedule.alpha(t), schedule.sigma(t))


def coefficients(source: Target, to: Target, t: Time, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """(a, b) in float64 such that y' = a x_t + b y.

    Raises:
        SingularTime: where they do not exist.
    """
    t = as_time(t)
    a, b = _solve(source, to, t, schedule)
    _refuse_infinite(a + b, t, f"{source.name} cannot be converted to {to.name}", schedule)
    return a, b


def _solve(source: Target, to: Target, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    p, q, p2, q2, alpha, sigma = _all_rows(source, to, t, schedule)
    if source == to:  # also where Δ = 0
        a, b = torch.zeros_like(p), torch.ones_like(p)
    else:
        delta = alpha * q - sigma * p
        a = (p2 * q - q2 * p) / delta
        b = (alpha * q2 - sigma * p2) / delta
    # At the ends x_t alone is one of the two unknowns: the data where σ = 0, the noise where α = 0.
    only_x0, only_eps = (sigma == 0) & (q2 == 0), (alpha == 0) & (p2 == 0)
    a = torch.where(only_x0, p2 / alpha, torch.where(only_eps, q2 / sigma, a))
    b = torch.where(only_x0 | only_eps, torch.zeros_like(b), b)
    return a, b


def _refuse_infinite(values: Tensor, t: Tensor, what: str, schedule: Schedule) -> None:
    bad = ~values.isfinite()
    if not bool(bad.any()):
        return
    where = bad.reshape(*t.shape, -1).any(-1) if bad.ndim > t.ndim else bad
    at = t.expand(where.shape)[where].flatten()[0].item() if where.ndim else t.item()
    raise SingularTime(
        f"{what} at t = {at:g} under {schedule}: there alpha = {schedule.alpha(at).item():g} and "
        f"sigma = {schedule.sigma(at).item():g}, and the two equations for x0 and eps are not independent. "
        "Keep t away from there (t_range), or use a target that is regular there (x0 or v)."
    )
