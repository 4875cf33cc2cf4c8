"""Denoisers that keep the estimate of x0 in the range of the data.

They act on x0 alone: every sampler derives all else (the noise, the slope) from x_t and the x0
it is given, so that the pair stays consistent. Nothing thresholds unless one of these is asked for,
and data that are known to reach further (latents, say) are refused: clipping would cut them.

Reference:
    Dynamic thresholding: Saharia et al., arXiv 2205.11487, section 2.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..denoiser import Denoiser, Posterior
from ..errors import Conflict, ReparamError
from ..guidance import Guided
from ..schedules import Time

#: By this share the data may reach beyond the limit.
_ROOM = 1e-3


def refuse_cut(low: float | None, high: float | None, limit: float = 1.0) -> None:
    """Refuses to clip data from ``low`` to ``high`` (None where that is not known) to [−limit, limit].

    Raises:
        Conflict: if it would cut them.
    """
    reach = max(abs(v) for v in (low, high, 0.0) if v is not None)
    if reach > limit * (1 + _ROOM):
        raise Conflict(
            f"thresholding clips x0 to [{-limit:g}, {limit:g}], and the data reach from {low:.3g} to {high:.3g} as the "
            "network sees them (latents and standardised data do): that would cut them. Sample without thresholding, "
            f"or clip at the data's own range: Clipped(denoiser, limit={reach:.3g})."
        )


class Clipped(Guided):
    """x0 clipped to [−limit, limit].

    Args:
        denoiser: the one to clip; put it around guidance, not inside.
        limit: half the width of the data's range.

    Raises:
        Conflict: if the model's record of its data says that they reach further than that.
    """

    def __init__(self, denoiser: Denoiser, limit: float = 1.0) -> None:
        super().__init__(denoiser)
        if not limit > 0:
            raise ReparamError(f"the limit of thresholding must be positive, found {limit!r}.")
        self.limit = float(limit)
        if denoiser.data is not None:
            refuse_cut(denoiser.data.get("min"), denoiser.data.get("max"), self.limit)

    def forward(self, x_t: Tensor, t: Time, **cond: Any) -> Posterior:
        """The posterior at ``x_t`` [B, …] and ``t`` (scalar or [B]), its mean clipped."""
        found: Posterior = self.inner(x_t, t, **cond)
        return found._replace(mean=self.threshold(found.mean))

    def threshold(self, x0: Tensor) -> Tensor:
        """What is done to x0, shape [B, …]."""
        return x0.clamp(-self.limit, self.limit)


class DynamicallyClipped(Clipped):
    """x0 clipped, sample by sample, to a percentile s of its absolute values, and scaled by limit/s; where s is
    below ``limit`` that is plain clipping.

    Args:
        quantile: of the absolute values of a sample, in (0, 1].
    """

    def __init__(self, denoiser: Denoiser, limit: float = 1.0, quantile: float = 0.995) -> None:
        super().__init__(denoiser, limit)
        if not 0 < quantile <= 1:
            raise ReparamError(f"the quantile of thresholding lies in (0, 1], found {quantile!r}.")
        self.quantile = float(quantile)

    def threshold(self, x0: Tensor) -> Tensor:
        """What is done to x0, shape [B, …]."""
        s = x0.abs().flatten(1).quantile(self.quantile, dim=1).clamp(min=self.limit)
        s = s.reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-s, s) * (self.limit / s)


#: How sampling may threshold, by name.
THRESHOLDS: dict[str, Callable[[Denoiser], Denoiser]] = {
    "none": lambda denoiser: denoiser,
    "static": Clipped,
    "dynamic": DynamicallyClipped,
}
