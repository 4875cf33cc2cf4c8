r"""Guidance: denoisers that wrap denoisers.

The posterior mean is affine in the output of any linear target, with the same coefficients for
every output at one (x_t, t). Extrapolating between two means is therefore the same as
extrapolating between two noise estimates, velocities or scores, and is done here once, on x0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import Denoiser, Posterior
from .errors import Conflict, ReparamError
from .schedules import Time, as_time


class Guided(Denoiser):
    """A denoiser that asks another one; all conventions are that one's."""

    def __init__(self, denoiser: Denoiser) -> None:
        nn.Module.__init__(self)
        self.inner = denoiser
        self.conventions = denoiser.conventions
        self.data = denoiser.data
        self.training_record = denoiser.training_record

    @property
    def net(self) -> nn.Module:  # type: ignore[override]
        """The wrapped denoiser's network."""
        return self.inner.net


class ClassifierFree(Guided):
    r"""Classifier-free guidance with an interval.

    .. math:: \hat x_0 = u + w\,(c - u) \quad \text{for } t \in [\text{low}, \text{high}],
              \qquad \hat x_0 = c \quad \text{elsewhere,}

    where c is the mean given the label and u the mean without it. w = 1 is no guidance, and other
    libraries' "scale" s with (1 + s) c − s u is w = 1 + s.

    References:
        Ho & Salimans, arXiv 2207.12598. The interval: Kynkäänniemi et al., arXiv 2404.07724.

    Args:
        denoiser: a conditional one, called with ``y``, class numbers of shape [B].
        weight: w.
        interval: where it is applied, in t (0 = data, 1 = noise). JiT's [0.1, 1] is [0, 0.9] here.
        null_label: the class number that means "no label"; by default the number of classes in the
            denoiser's data record.

    Raises:
        ReparamError: if the weight or the interval is no number or no interval in [0, 1].
        Conflict: if nothing says what "no label" is.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weight: float,
        interval: tuple[float, float] = (0.0, 1.0),
        null_label: int | None = None,
    ) -> None:
        super().__init__(denoiser)
        low, high = interval
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ReparamError(f"the weight of guidance must be a finite number, found {weight!r}.")
        if not 0 <= low <= high <= 1:
            raise ReparamError(f"the interval of guidance is two increasing numbers in [0, 1], found {interval!r}.")
        if null_label is None:
            classes = (denoiser.data or {}).get("classes")
            if not classes:
                raise Conflict(
                    "guidance needs a conditional model, and this one does not say how many classes it has; give "
                    "null_label=, the class number that means 'no label'."
                )
            null_label = len(classes)
        self.weight, self.interval, self.null_label = float(weight), (float(low), float(high)), null_label

    def forward(self, x_t: Tensor, t: Time, *, y: Tensor, **cond: Any) -> Posterior:  # type: ignore[override]
        """The guided posterior mean for ``x_t`` [B, …] at ``t`` (scalar or [B]) given labels ``y`` [B]."""
        t64 = as_time(t)
        low, high = self.interval
        inside = (low <= t64) & (t64 <= high)
        if self.weight == 1 or not bool(inside.any()):
            plain: Posterior = self.inner(x_t, t64, y=y, **cond)
            return plain
        twice = {k: torch.cat([v, v]) if isinstance(v, Tensor) else v for k, v in cond.items()}
        both = torch.cat([y, torch.full_like(y, self.null_label)])
        times = torch.cat([t64, t64]) if t64.ndim else t64
        posterior: Posterior = self.inner(torch.cat([x_t, x_t]), times, y=both, **twice)
        c, u = posterior.mean.chunk(2)
        w = torch.where(inside, torch.tensor(self.weight, dtype=torch.float64), 1.0).to(device=c.device, dtype=c.dtype)
        w = w.reshape(-1, *[1] * (c.ndim - 1)) if w.ndim else w
        return Posterior(u + w * (c - u), None if posterior.var is None else posterior.var.chunk(2)[0])
