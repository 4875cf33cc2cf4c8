r"""How much each noise level counts in the loss.

A weighting is defined once, on the x0-error: the loss is
:math:`w(t)\,\lVert \hat x_0 - x_0 \rVert^2`. A prediction's own error is the x0-error
divided by the target's amplification σ/|Δ|, so on the error of a prediction the same
weighting is :math:`w\,\sigma^2/\Delta^2`, whatever the target.

Measuring the loss in the space of another target s is such a weighting,
:math:`w = \Delta_s^2/\sigma^2`: "predict x0, take the loss in velocity" is a weight, not a
second code path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import ReparamError, unknown
from .schedules import Schedule, Time, as_time
from .targets import ALIASES, TARGETS, Target, target


class Weighting(ABC):
    """A weight on the x0-error, a function of (t, schedule)."""

    @abstractmethod
    def __call__(self, t: Time, schedule: Schedule) -> Tensor:
        """The weight on ‖x̂0 − x0‖² at times ``t``; float64, shape of t."""

    def on_prediction(self, t: Time, schedule: Schedule, of: Target) -> Tensor:
        """The same weighting, on ‖ŷ − y‖² for a prediction of the target ``of``."""
        return self(t, schedule) * of.amplification(t, schedule).x0 ** 2

    @abstractmethod
    def config(self) -> Any:
        """The weighting as plain data, from which :func:`weighting` builds it again."""


@dataclass(frozen=True)
class Space(Weighting):
    """The squared error in the space of a target: Δ_s²/σ² on the x0-error."""

    target: Target

    def __call__(self, t: Time, schedule: Schedule) -> Tensor:
        return self.target.amplification(t, schedule).x0 ** -2

    def on_prediction(self, t: Time, schedule: Schedule, of: Target) -> Tensor:
        """(Δ_s/Δ_p)², without the detour over x0 and its cancellation; 1 in its own space."""
        t = as_time(t)
        if of == self.target:
            return torch.ones_like(t)
        return (self.target.delta(t, schedule) / of.delta(t, schedule)) ** 2

    def config(self) -> Any:
        own = self.target.config()
        return own["name"] if len(own) == 1 else own


@dataclass(frozen=True)
class Capped(Weighting):
    """Another weighting, at most ``cap`` on the x0-error, alike for every target.

    ``Capped("velocity", 400)`` is JiT's floor of 0.05 under its time in the loss
    (arXiv 2511.13720): 1/max(t, 0.05)².
    """

    base: Weighting
    cap: float
    name: ClassVar[str] = "capped"

    def __init__(self, base: str | dict[str, Any] | Weighting, cap: float) -> None:
        if isinstance(cap, bool) or not isinstance(cap, int | float) or not cap > 0:
            raise ReparamError(f"the cap on a weighting must be positive, found {cap!r}.")
        object.__setattr__(self, "base", weighting(base))
        object.__setattr__(self, "cap", float(cap))

    def __call__(self, t: Time, schedule: Schedule) -> Tensor:
        return self.base(t, schedule).clamp(max=self.cap)

    def config(self) -> Any:
        return {"name": "capped", "base": self.base.config(), "cap": self.cap}


def weighting(which: str | dict[str, Any] | Weighting) -> Weighting:
    """A weighting by the name of the space it is the squared error in, by a mapping
    (``{name: capped, base: velocity, cap: 400}``), or itself.

    Raises:
        UnknownName: if there is none of that name.
    """
    if isinstance(which, Weighting):
        return which
    if not isinstance(which, str | dict):
        raise unknown("weighting", which, [*TARGETS, Capped.name])
    arguments: dict[str, Any] = {"name": which} if isinstance(which, str) else dict(which)
    name = str(arguments.get("name"))
    if name == Capped.name:
        for key in arguments.keys() - {"name", "base", "cap"}:
            raise unknown("argument of weighting 'capped'", key, ["base", "cap"])
        if missing := {"base", "cap"} - arguments.keys():
            raise ReparamError(f"weighting 'capped' needs {' and '.join(sorted(missing))} as well.")
        return Capped(arguments["base"], arguments["cap"])
    if name not in TARGETS and name not in ALIASES:
        raise unknown("weighting", name, [*TARGETS, Capped.name])
    return Space(target(arguments))
