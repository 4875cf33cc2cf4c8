r"""Denoisers that wrap denoisers: guidance, and the same network under another forward process.

The posterior mean is affine in the output of any linear target, with the same coefficients for
every output at one (x_t, t). Extrapolating between two means is therefore the same as
extrapolating between two noise estimates, velocities or scores, and is done here once, on x0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import Conventions, Denoiser, Posterior
from .errors import Conflict, ReparamError, TimeOutOfRange, Unsupported
from .schedules import Elementwise, Schedule, Time, as_time, like, schedule
from .targets import X0


class Guided(Denoiser):
    """A denoiser that asks another one; all conventions are that one's."""

    def __init__(self, denoiser: Denoiser) -> None:
        nn.Module.__init__(self)
        self.inner = denoiser
        self.conventions = denoiser.conventions
        self.data = denoiser.data
        self.training_record = denoiser.training_record
        self.overrides = denoiser.overrides

    @property
    def net(self) -> nn.Module:  # type: ignore[override]
        """The wrapped denoiser's network."""
        return self.inner.net


class Rescheduled(Guided):
    r"""The same network under another forward process: ``denoiser.on(schedule)``.

    What is known of x0 depends on the signal-to-noise ratio alone. At time t of the new process the
    network is asked at its own time of the same log-SNR, about :math:`x_t\,\alpha_{\text{own}}/\alpha` (where
    α = 0, :math:`x_t\,\sigma_{\text{own}}/\sigma`): exact, nothing is trained.

    Args:
        denoiser: the one asked.
        to: the new process. Its ``t_range`` is where the network was trained, as far as it reaches.

    Raises:
        Unsupported: if the noise of either differs by element.
    """

    def __init__(self, denoiser: Denoiser, to: Schedule | str | dict[str, Any]) -> None:
        super().__init__(denoiser)
        self.own, new = denoiser.schedule, schedule(to)
        if isinstance(self.own, Elementwise) or isinstance(new, Elementwise):
            raise Unsupported("a denoiser is matched by log-SNR, and noise that differs by element has many at a time.")
        low, high = (self._reached(new, t) for t in denoiser.t_range)
        # It answers with x0, whatever the network predicts, and takes the time as it is.
        self.conventions = Conventions(new, X0(), "t", "none", (low, high))

    def _reached(self, new: Schedule, t: float) -> float:
        try:
            return float(new.time_at(self.own.log_snr(t)))
        except TimeOutOfRange:  # it never becomes as noisy
            return 1.0

    def forward(self, x_t: Tensor, t: Time, **cond: Any) -> Posterior:
        """The posterior of x0 given ``x_t`` [B, …] at ``t`` (scalar or [B]) of the new process."""
        t64, new = as_time(t), self.schedule
        low, high = self.inner.t_range
        # What lies a rounding beyond where the network was trained is its end.
        cleanest, noisiest = float(self.own.log_snr(low)), float(self.own.log_snr(high))
        own_t = self.own.time_at(new.log_snr(t64).clamp(noisiest, cleanest)).clamp(low, high)
        alpha, sigma = new.alpha(t64), new.sigma(t64)
        by_noise = self.own.sigma(own_t) / sigma
        scale = torch.where(alpha > sigma, self.own.alpha(own_t) / alpha, by_noise)
        x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        posterior: Posterior = self.inner(like(scale, x_t) * x_t, own_t, **cond)
        return posterior


class Autoguidance(Guided):
    r"""A worse version of the model guides it: :math:`\hat x_0 = g + w\,(d - g)` inside the interval, d elsewhere.

    References:
        Karras et al., arXiv 2406.02507.

    Args:
        denoiser: the good one, d. guide: the worse one, g: less trained, or smaller; under another
            schedule it is matched by log-SNR.
        weight: w; 1 is no guidance.
        interval: where it is applied, in t.

    Raises:
        ReparamError: if the weight or the interval is no number or no interval in [0, 1].
    """

    def __init__(
        self, denoiser: Denoiser, guide: Denoiser, weight: float, interval: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        super().__init__(denoiser)
        self.weight, self.interval = _checked(weight, interval)
        self.guide = guide if guide.schedule == denoiser.schedule else guide.on(denoiser.schedule)

    def forward(self, x_t: Tensor, t: Time, **cond: Any) -> Posterior:
        """The guided posterior mean for ``x_t`` [B, …] at ``t`` (scalar or [B])."""
        t64 = as_time(t)
        good: Posterior = self.inner(x_t, t, **cond)
        w = _weights(self.weight, self.interval, t64)
        if not bool((w != 1).any()):
            return good
        worse: Posterior = self.guide(x_t, t, **cond)
        return good._replace(mean=worse.mean + like(w, good.mean) * (good.mean - worse.mean))


def _checked(weight: float, interval: tuple[float, float]) -> tuple[float, tuple[float, float]]:
    low, high = interval
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ReparamError(f"the weight of guidance must be a finite number, found {weight!r}.")
    if not 0 <= low <= high <= 1:
        raise ReparamError(f"the interval of guidance is two increasing numbers in [0, 1], found {interval!r}.")
    return float(weight), (float(low), float(high))


def _weights(weight: float, interval: tuple[float, float], t: Tensor) -> Tensor:
    """The weight at times t; float64, 1 outside of the interval."""
    low, high = interval
    return torch.where((low <= t) & (t <= high), torch.tensor(weight, dtype=torch.float64), 1.0)


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
        self.weight, self.interval = _checked(weight, interval)
        if null_label is None:
            classes = (denoiser.data or {}).get("classes")
            if not classes:
                raise Conflict(
                    "guidance needs a conditional model, and this one does not say how many classes it has; give "
                    "null_label=, the class number that means 'no label'."
                )
            null_label = len(classes)
        self.null_label = null_label

    def forward(self, x_t: Tensor, t: Time, *, y: Tensor, **cond: Any) -> Posterior:  # type: ignore[override]
        """The guided posterior mean for ``x_t`` [B, …] at ``t`` (scalar or [B]) given labels ``y`` [B]."""
        t64 = as_time(t)
        w = _weights(self.weight, self.interval, t64)
        if not bool((w != 1).any()):
            plain: Posterior = self.inner(x_t, t64, y=y, **cond)
            return plain
        twice = {k: torch.cat([v, v]) if isinstance(v, Tensor) else v for k, v in cond.items()}
        both = torch.cat([y, torch.full_like(y, self.null_label)])
        times = torch.cat([t64, t64]) if t64.ndim else t64
        posterior: Posterior = self.inner(torch.cat([x_t, x_t]), times, y=both, **twice)
        c, u = posterior.mean.chunk(2)
        var, root = (None if p is None else p.chunk(2)[0] for p in posterior[1:])
        return Posterior(u + like(w, c) * (c - u), var, root)
