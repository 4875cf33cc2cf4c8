r"""DPM-Solver++ with two steps of memory.

In λ = log(α/σ) the ODE for data prediction has an exact solution with one integral, over the
estimate of x0. Replacing it by the line through its last two values, with h = λ_s − λ_t and
h' = λ_t − λ_before, gives

.. math:: x_s = \tfrac{\sigma_s}{\sigma_t}\,x_t + \alpha_s(1 - e^{-h})\,D, \qquad
          D = \hat x_0 + \tfrac{h}{2h'}\,(\hat x_0 - \hat x_0^{\text{before}}) .

Three kinds of steps are of first order, D = x̂0: the first, which has no memory; the last, if it
leads to t = 0, where h is infinite (the x0 estimate is returned; that is what diffusers calls
final_sigmas_type="zero"); and any next to α = 0 or σ = 0, where h or h' is infinite. The order
of the whole is 2 nevertheless.

References:
    Lu et al., arXiv 2211.01095, algorithm 2 and appendix on SDE-DPM-Solver++(2M).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .steps import Linear, Row, Step, correlation, lost, sqrt


def extrapolation(at: Step) -> float:
    """h/(2h'): the share of the difference of the two estimates; 0 makes the step first-order."""
    if at.before is None:
        return 0.0
    h, h_before = at.to.lam - at.here.lam, at.here.lam - at.before.level.lam
    return h / (2 * h_before) if math.isfinite(h) and math.isfinite(h_before) else 0.0


@dataclass(frozen=True)
class DPMpp2M(Linear):
    """DPM-Solver++(2M): second order at one evaluation a step. On rising times it inverts."""

    name: ClassVar[str] = "dpmpp_2m"
    order: ClassVar[int] = 2

    def row(self, at: Step) -> Row:
        kept = at.to.sigma / at.here.sigma
        c = at.to.alpha - kept * at.here.alpha  # α_s (1 − e^{−h}), also where α = 0
        share = extrapolation(at)
        return Row(kept, c * (1 + share), -c * share)


@dataclass(frozen=True)
class SDEDPMpp2M(Linear):
    """SDE-DPM-Solver++(2M): without memory, the ancestral step of small variance."""

    name: ClassVar[str] = "sde_dpmpp_2m"
    order: ClassVar[int] = 2

    @property
    def stochastic(self) -> bool:
        """It draws noise at every step but the last."""
        return True

    def row(self, at: Step) -> Row:
        new, share = lost(at), extrapolation(at)
        c = at.to.alpha * new  # α_s (1 − e^{−2h})
        kept = correlation(at) * at.to.sigma / at.here.sigma
        return Row(kept, c * (1 + share), -c * share, at.to.sigma * sqrt(new))
