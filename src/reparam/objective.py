r"""The training objective: schedule × target × loss space × weighting × times.

.. math:: L = w(t)\,\lVert \hat y - y \rVert^2 / D, \qquad y = p\,x_0 + q\,\varepsilon,

one loss per sample, with the weight expressed on the prediction's own error
(:mod:`reparam.weightings`). Under a likelihood
(:class:`reparam.Gaussian`) the loss is its negative logarithm instead, in nats an element. Conventions are
stated here once and travel from here to the sampler (:meth:`Objective.denoiser`) and to the weights
(:mod:`reparam.spec`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import times as noise_levels
from . import weightings
from .confidence import Gaussian
from .denoiser import Conventions, Denoiser, suggested
from .errors import Conflict, ReparamError, SingularTime
from .schedules import DDPM, Schedule, Time, as_time, like
from .targets import KTarget, Target
from .times import Times, Uniform, open_uniform
from .weightings import Space, Weighting


class Objective(nn.Module):
    """What a network is trained for.

    Args:
        schedule: the forward process.
        target: what the network predicts; or a likelihood over that, :class:`reparam.Gaussian`, which is itself the
            loss.
        loss_space: the target in whose space the squared error is taken (a name or an
            object); its own by default. It *is* the weighting Δ_s²/σ². A mapping such as
            ``{"x0": 1, "eps": 0.1}`` sums several (the hybrid loss).
        weighting: or a weighting on the x0-error.
        times: which noise levels are drawn, restricted to ``t_range``. With time="step" a
            drawn time is rounded up to the next step, so uniform times are uniform steps.
        time, input, t_range: see :class:`reparam.denoiser.Conventions`.

    Raises:
        Conflict: if both loss_space and weighting are given, or either beside a likelihood.
        SingularTime: if the target is singular inside t_range.
        Conflict: if a table's last step would never be trained.
        UnknownName: if a name is not known.
    """

    def __init__(
        self,
        schedule: Schedule | str | dict[str, Any],
        target: Target | Gaussian | str | dict[str, Any],
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
        if self.likelihood is not None and (loss_space is not None or weighting is not None):
            given = f"loss_space ({loss_space})" if weighting is None else f"weighting ({weighting})"
            raise Conflict(
                f"found {given} beside a Gaussian likelihood, which is the loss itself: the predicted variance weighs "
                "the errors. Remove it (of a recipe's own: --set loss_space=null --set weighting=null), or predict the "
                "target alone."
            )
        self.loss_space = None if loss_space is None else weightings.space(loss_space)
        chosen = None if weighting is None else weightings.weighting(weighting)
        self._refuse_boundless()
        self._learn(alone=self.loss_space is None and chosen is None and self.likelihood is None)
        self._drawn = noise_levels.times(times)
        self.times = self._drawn.on(self.schedule).within(*self.conventions.t_range)
        own = self.loss_space or (Space(self.target) if self.likelihood is None else self.likelihood.space)
        self.weighting = (own if chosen is None else chosen).drawn_from(self.times)
        #: What is learned of the weighting (EDM2's u), or None.
        self.learned = self.weighting.learned()
        self._refuse_untrained_end()

    def _refuse_untrained_end(self) -> None:
        """On a table, a weight of 0 at the last step means that sampling starts where nothing was learned."""
        high = self.conventions.t_range[1]
        if isinstance(self.schedule, DDPM) and bool((self.weight(high) == 0).any()):
            raise Conflict(
                f"weighting {self.weighting.config()} is 0 on an error in {self.target.name} at the last step, t = "
                f"{high:g}, so that step is never trained, and sampling starts there. Floor it, for example weighting: "
                "{name: floored, base: …, floor: 0.01}, or end t_range before it."
            )

    def _refuse_boundless(self) -> None:
        """Under a likelihood the target must be able to say x0 as exactly as the noise lets it be known."""
        c = self.conventions
        singular = [] if c.likelihood is None else c.likelihood.singular_times(c.schedule, c.t_range, c.target)
        if singular:
            low, high = c.t_range
            raise SingularTime(
                f"the likelihood of a prediction of {c.target.name} counts its error without bound at "
                f"t = {', '.join(f'{t:g}' for t in singular[:4])} under {c.schedule}, inside t_range = [{low:g}, "
                f"{high:g}]. Leave that time out, for example t_range: {suggested(low, high, singular)}, or "
                "predict v, velocity or edm instead, whose errors in x0 vanish with the noise."
            )

    def _learn(self, alone: bool) -> None:
        """Where the target itself is learned, give it a parameter that is part of this module.

        ``alone``: whether neither a loss space nor a weighting was given.
        """
        kind = self.conventions.target
        if not (isinstance(kind, KTarget) and kind.learned):
            return
        if alone:
            raise Conflict(
                "a learned k needs a loss that does not change with it: give loss_space (for example 'velocity') or "
                "a weighting."
            )
        learned = kind.to_learn()
        self.k_logit = learned.parameter
        object.__setattr__(self.conventions, "target", learned)

    @property
    def schedule(self) -> Schedule:
        """The forward process."""
        return self.conventions.schedule

    @property
    def target(self) -> Target:
        """What the network predicts."""
        return self.conventions.target

    @property
    def likelihood(self) -> Gaussian | None:
        """The likelihood that is the loss, if there is one."""
        return self.conventions.likelihood

    def times_at(self, u: Tensor) -> Tensor:
        """The times that uniform numbers ``u`` in (0, 1) stand for; float64."""
        t = self.times.draw(u.to("cpu", torch.float64))
        if self.conventions.time == "step" and isinstance(self.schedule, DDPM):
            t = self.schedule.on_steps(t, self.conventions.t_range[1])
        return t

    def weight(self, t: Time) -> Tensor:
        """The weight on the squared error of the prediction; float64, shape of t.

        Under a likelihood it is twice what that weighs with where the variance is that of Gaussian data.
        """
        return self.weighting.on_prediction(as_time(t), self.schedule, self.target)

    def forward(
        self,
        net: nn.Module,
        x0: Tensor,
        t: Time | None = None,
        eps: Tensor | None = None,
        cond: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        x0_std: Tensor | float | None = None,
        exact: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """One loss per sample.

        Args:
            net: called as ``net(x, time, **cond)``.
            x0: clean data, shape [B, …].
            t: times, scalar or shape [B], in [0, 1]; drawn from ``times`` if not given.
            eps: standard normal noise of x0's shape; drawn if not given.
            cond: passed on to the network.
            generator: for whatever is drawn, on x0's device; times are drawn before noise.
            x0_std: where the data are Gaussian around x0, their standard deviation, broadcast against
                x0: the network then learns the posterior mean of such data (see :func:`blurred`).
            exact: where the posterior mean of the data is known, E[x0 | x_t] as a function of x_t [B, …] and
                float64 times: the network then learns from that instead of from x0 (exact score matching).

        Returns:
            Shape [B], float32 or better: the weighted squared error, or the negative log-likelihood in
            nats, averaged over elements.

        Raises:
            SingularTime: if a loss is not finite at a time.
            Conflict: for ``exact`` beside x0_std or a likelihood.
            VarianceLost: on the CPU, if a likelihood's variance collapses or explodes (:mod:`reparam.confidence`).
        """
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        if t is None:
            t = self.times_at(open_uniform(len(x0), generator))
        t64 = as_time(t)
        if eps is None:
            eps = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        if eps.shape != x0.shape:
            raise ReparamError(f"eps has shape {list(eps.shape)}, x0 {list(x0.shape)}; they must be the same.")
        x_t, x0, eps = self._noised(x0, eps, t64, x0_std, exact)
        y = self.target.encode(x0, eps, t64, self.schedule)
        predicted, rest = self.conventions.call(net, x_t, t64, cond or {})
        with torch.autocast(x_t.device.type, enabled=False):  # which would round sums to bfloat16
            if self.likelihood is None or rest is None:
                return self._squared(predicted - y, t64)
            spread = 0.0 if x0_std is None else self.likelihood.spread(x0_std, x0, t64, self.schedule)
            return self.likelihood.loss(rest, predicted - y, t64, self.schedule, self.target, spread)

    def _noised(
        self,
        x0: Tensor,
        eps: Tensor,
        t: Tensor,
        x0_std: Tensor | float | None,
        exact: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, and the x0 and ε that the prediction is to be made of."""
        if exact is None:
            if x0_std is None:
                return self.schedule.add_noise(x0, eps, t), x0, eps
            return blurred(x0, eps, x0_std, t, self.schedule)
        if x0_std is not None or self.likelihood is not None:
            beside = "x0_std" if x0_std is not None else "a Gaussian likelihood"
            raise Conflict(f"exact posterior means leave nothing to be unsure of: they do not go with {beside}.")
        x_t = self.schedule.add_noise(x0, eps, t)
        x0 = exact(x_t, t).to(x0)
        alpha, sigma = like(self.schedule.alpha(t), x0), like(self.schedule.sigma(t), x0)
        return x_t, x0, torch.where(sigma > 0, (x_t - alpha * x0) / sigma, eps)

    def _squared(self, error: Tensor, t: Tensor) -> Tensor:
        """The weighted squared error of each sample."""
        weight = self.weight(t)
        if not bool(weight.isfinite().all()):
            lost = ~weight.isfinite().reshape(*t.shape, -1).all(-1) if weight.ndim > t.ndim else ~weight.isfinite()
            bad = t.expand(lost.shape)[lost].flatten()[0].item()
            raise SingularTime(
                f"the weight of this loss ({self.weighting}) on an error in {self.target.name} is not finite at "
                f"t = {bad:g}; keep t away from there, or cap it: weighting=Capped(...)."
            )
        apart = weight.ndim > t.ndim  # by element, or by direction
        flat = (self.target.apply(weight.sqrt(), error) if apart else error).flatten(1)
        squared = torch.linalg.vecdot(flat, flat) / flat.shape[1]
        loss = squared if apart else like(weight, squared) * squared
        return loss if self.learned is None else self.learned(loss, self.schedule.log_snr(t))

    def denoiser(self, net: nn.Module, data: dict[str, Any] | None = None) -> Denoiser:
        """The network as a denoiser under the conventions it was trained with."""
        c = self.conventions
        predicted = c.predicted()
        if isinstance(c.target, KTarget):
            fixed = c.target.frozen()
            predicted = replace(predicted, target=fixed) if isinstance(predicted, Gaussian) else fixed
        denoiser = Denoiser(net, c.schedule, predicted, time=c.time, input=c.input, t_range=c.t_range, data=data)
        denoiser.training_record = self.record()
        return denoiser

    def record(self) -> dict[str, Any]:
        """What training knows beyond the conventions: loss space, weighting and times."""
        return {
            "loss_space": None if self.loss_space is None else self.loss_space.config(),
            "weighting": self.weighting.config() if self.likelihood is None else "likelihood",
            "times": self._drawn.config(),  # t_range is recorded by itself
        }


def blurred(
    x0: Tensor, eps: Tensor, std: Tensor | float, t: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor, Tensor]:
    r"""(x_t, E[z | x_t, x0], E[ε | x_t, x0]) for data z ~ N(x0, s²) under x_t = α z + σ ε.

    With r² = α² s² + σ² one draw of noise serves both: x_t = α x0 + r n, and the two means, which a
    linear target's expected value is made of, are x0 + (α s²/r) n and (σ/r) n.

    Args:
        x0, eps: shape [B, …]; eps is the draw n. std: s, broadcast against x0.
    """
    alpha, sigma = like(schedule.alpha(t), x0), like(schedule.sigma(t), x0)
    s = torch.as_tensor(std, dtype=x0.dtype, device=x0.device)
    sigma = sigma * torch.ones_like(s)
    r = torch.hypot(alpha * s, sigma)
    # Where there is no noise at all x_t is x0, and ε is what was drawn, as without a standard deviation.
    share = torch.where(r > 0, sigma / r, 1)
    return alpha * x0 + r * eps, x0 + torch.where(r > 0, alpha * s**2 / r, 0) * eps, share * eps
