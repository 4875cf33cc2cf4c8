r"""The training objective: schedule × target × loss space × weighting × times.

.. math:: L = w(t)\,\lVert \hat y - y \rVert^2 / D, \qquad y = p\,x_0 + q\,\varepsilon,

one loss per sample, with the weight expressed on the prediction's own error
(:mod:`reparam.weightings`). Conventions are stated here once and travel from here to the
sampler (:meth:`Objective.denoiser`) and to the weights (:mod:`reparam.spec`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import targets, weightings
from . import times as noise_levels
from .denoiser import Conventions, Denoiser
from .errors import Conflict, ReparamError, SingularTime
from .schedules import DDPM, Schedule, Time, as_time, like
from .targets import Target
from .times import Times, Uniform, open_uniform
from .weightings import Space, Weighting


class Objective(nn.Module):
    """What a network is trained for.

    Args:
        schedule: the forward process.
        target: what the network predicts.
        loss_space: the target in whose space the squared error is taken (a name or an
            object); its own by default. It *is* the weighting Δ_s²/σ².
        weighting: or a weighting on the x0-error.
        times: which noise levels are drawn, restricted to ``t_range``. With time="step" a
            drawn time is rounded up to the next step, so uniform times are uniform steps.
        time, input, t_range: see :class:`reparam.denoiser.Conventions`.

    Raises:
        Conflict: if both loss_space and weighting are given.
        SingularTime: if the target is singular inside t_range.
        UnknownName: if a name is not known.
    """

    def __init__(
        self,
        schedule: Schedule | str | dict[str, Any],
        target: Target | str | dict[str, Any],
        *,
        loss_space: Target | str | dict[str, Any] | None = None,
        weighting: Weighting | str | dict[str, Any] | None = None,
        times: Times | str | dict[str, Any] = Uniform(),  # noqa: B008 (frozen)
        time: str = "t",
        input: str = "none",
        t_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        self.conventions = Conventions(schedule, target, time, input, t_range)  # type: ignore[arg-type]
        if loss_space is not None and weighting is not None:
            raise Conflict(
                f"found both loss_space ({loss_space}) and weighting ({weighting}); a loss space is itself a "
                "weighting. Give one of the two."
            )
        self.loss_space = None if loss_space is None else targets.target(loss_space)
        own_space = Space(self.loss_space or self.conventions.target)
        self.weighting = own_space if weighting is None else weightings.weighting(weighting)
        self._drawn = noise_levels.times(times)
        self.times = self._drawn.within(*self.conventions.t_range)

    @property
    def schedule(self) -> Schedule:
        """The forward process."""
        return self.conventions.schedule

    @property
    def target(self) -> Target:
        """What the network predicts."""
        return self.conventions.target

    def times_at(self, u: Tensor) -> Tensor:
        """The times that uniform numbers ``u`` in (0, 1) stand for; float64."""
        t = self.times.quantile(u.to("cpu", torch.float64))
        if self.conventions.time == "step" and isinstance(self.schedule, DDPM):
            t = self.schedule.on_steps(t, self.conventions.t_range[1])
        return t

    def weight(self, t: Time) -> Tensor:
        """The weight on the squared error of the prediction; float64, shape of t."""
        return self.weighting.on_prediction(as_time(t), self.schedule, self.target)

    def forward(
        self,
        net: nn.Module,
        x0: Tensor,
        t: Time | None = None,
        eps: Tensor | None = None,
        cond: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """One loss per sample.

        Args:
            net: called as ``net(x, time, **cond)``.
            x0: clean data, shape [B, …].
            t: times, scalar or shape [B], in [0, 1]; drawn from ``times`` if not given.
            eps: standard normal noise of x0's shape; drawn if not given.
            cond: passed on to the network.
            generator: for whatever is drawn, on x0's device; times are drawn before noise.

        Returns:
            Shape [B], float32 or better: the weighted squared error, averaged over elements.
        """
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        if t is None:
            t = self.times_at(open_uniform(len(x0), generator))
        t64 = as_time(t)
        if eps is None:
            eps = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        if eps.shape != x0.shape:
            raise ReparamError(f"eps has shape {list(eps.shape)}, x0 {list(x0.shape)}; they must be the same.")
        x_t = self.schedule.add_noise(x0, eps, t64)
        y = self.target.encode(x0, eps, t64, self.schedule)
        error = (self.conventions.call(net, x_t, t64, cond or {}) - y).flatten(1)
        weight = self.weight(t64)
        if not bool(weight.isfinite().all()):
            bad = t64.expand(weight.shape)[~weight.isfinite()].flatten()[0].item()
            raise SingularTime(
                f"the weight of this loss ({self.weighting}) on an error in {self.target.name} is not finite at "
                f"t = {bad:g}; keep t away from there, or cap it: weighting=Capped(...)."
            )
        with torch.autocast(error.device.type, enabled=False):  # which would round the sum to bfloat16
            squared = torch.linalg.vecdot(error, error)
        return like(weight, squared) * squared / error.shape[1]

    def denoiser(self, net: nn.Module, data: dict[str, Any] | None = None) -> Denoiser:
        """The network as a denoiser under the conventions it was trained with."""
        c = self.conventions
        denoiser = Denoiser(net, c.schedule, c.target, time=c.time, input=c.input, t_range=c.t_range, data=data)
        denoiser.training_record = self.record()
        return denoiser

    def record(self) -> dict[str, Any]:
        """What training knows beyond the conventions: loss space, weighting and times."""
        return {
            "loss_space": None if self.loss_space is None else Space(self.loss_space).config(),
            "weighting": self.weighting.config(),
            "times": self._drawn.config(),  # t_range is recorded by itself
        }
