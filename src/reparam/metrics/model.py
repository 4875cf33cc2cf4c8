r"""Metrics of a model itself rather than of its samples, for data whose density is known at every noise level.

Both speak of :math:`y = x_t/\alpha = x_0 + \tilde\sigma\varepsilon`, with :math:`\tilde\sigma = \sigma/\alpha`, in the
units of the data, and of fresh data that neither training nor the reference has seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..data import Data
from ..data.order import mix
from ..denoiser import Denoiser, evaluating
from ..likelihood import log_likelihood
from ..schedules import DDPM, Schedule, like
from .scoring import Score, mean_score

if TYPE_CHECKING:
    from ..data.mixtures import Mixture

#: Data that are looked at, and steps of the ODE (of four evaluations each).
_SCORED, _LIKELY, _STEPS = 8192, 2048, 32
#: Data whose density is followed at once: such that what is kept for its gradient stays in the cache.
_AT_ONCE = 1024
#: Where a density is asked for when the model's t_range begins at 0.
NEAR = 1e-3


class Asked(NamedTuple):
    """What a metric of a model is told.

    Attributes:
        data: with a mixture. times: the noise levels of training, of uniform numbers in (0, 1).
        ends: the times between which the model's ODE is followed, 0 < low < high.
    """

    data: Data
    times: Callable[[Tensor], Tensor]
    ends: tuple[float, float]

    @property
    def mixture(self) -> Mixture:
        """The density of the data."""
        assert self.data.mixture is not None
        return self.data.mixture

    def fresh(self, n: int, key: int) -> Tensor:
        """Fresh data, [n, D]; of another key, others."""
        return self.mixture.draw(n, [self.data.seed, key])


@dataclass(frozen=True)
class ModelMetric:
    """A score of a model.

    Attributes:
        words: what it measures, for a reader.
        compute: the score. floor: what the exact density gets.
        applies: whether it means anything for these data.
        better: "lower" or "higher". usual: whether studies measure it without being asked.
    """

    words: str
    compute: Callable[[Denoiser, Asked], Score]
    floor: Callable[[Schedule, Asked], float]
    applies: Callable[[Data], bool] = field(default=lambda data: data.mixture is not None)
    better: str = "lower"
    usual: bool = True


def _score_error(denoiser: Denoiser, asked: Asked) -> Score:
    """σ̃² E‖∇log p − its estimate‖²/D, which is the mean of (x̂0 − E[x0 | x_t])²/σ̃², over training's noise levels."""
    x0 = asked.fresh(_SCORED, 0x5C0)
    t = asked.times((torch.arange(_SCORED, dtype=torch.float64) + 0.5) / _SCORED)
    eps = _noise(x0, 0x5C1)
    device = next(denoiser.parameters()).device
    values = []
    with evaluating(denoiser):
        for at in torch.arange(_SCORED).split(1024):
            x_t = denoiser.schedule.add_noise(x0[at], eps[at], t[at])
            mean = denoiser(x_t.to(device), t[at]).mean.cpu().double()
            ratio = (denoiser.schedule.sigma(t[at]) / denoiser.schedule.alpha(t[at])).double()
            exact = asked.mixture.posterior_mean(_as_data(x_t, t[at], denoiser.schedule), ratio)
            values.append((mean - exact).square().mean(1) / ratio.square())
    return mean_score(torch.cat(values), {"n": _SCORED})


def _nll(denoiser: Denoiser, asked: Asked) -> Score:
    """−log p of the model's probability-flow ODE; the interval is that of its excess over the exact density's."""
    low, high = asked.ends
    y, schedule = _slightly_noisy(denoiser.schedule, asked), denoiser.schedule
    device = next(denoiser.parameters()).device
    found = -log_density(denoiser, y.to(device), low, high, asked, _STEPS).cpu()
    exact = -_exact(schedule, y, low, asked)
    excess, mean = mean_score(found - exact), float(exact.mean())
    interval = excess.interval and (mean + excess.interval[0], mean + excess.interval[1])
    settings = {"n": _LIKELY, "sigma": _ratio(schedule, low), "from_sigma": _ratio(schedule, high), "steps": _STEPS}
    return Score(mean + excess.value, interval, f"the excess over the exact density on {_LIKELY} data", settings)


def _nll_floor(schedule: Schedule, asked: Asked) -> float:
    return float(-_exact(schedule, _slightly_noisy(schedule, asked), asked.ends[0], asked).mean())


def log_density(denoiser: Denoiser, y: Tensor, low: float, high: float, asked: Asked, steps: int) -> Tensor:
    """log p(y) of the model at the noise of time ``low``, the density at ``high`` being that of the data; [B]."""
    schedule = denoiser.schedule
    alpha, sigma = float(schedule.alpha(high)), float(schedule.sigma(high))

    def prior(x: Tensor) -> Tensor:
        density = asked.mixture.log_prob(x.cpu().double() / alpha, sigma / alpha)
        return (density - x[0].numel() * math.log(alpha)).to(x.device)

    at = times_between(schedule, low, high, steps, asked.data.sigma_data)
    if denoiser.conventions.time == "step" and isinstance(schedule, DDPM):
        at = schedule.on_steps(at, high).unique()
    parts = [
        log_likelihood(denoiser, part, times=at, data_std=asked.data.sigma_data, prior=prior if alpha > 0 else None)
        for part in y.split(_AT_ONCE)
    ]
    return torch.cat(parts)


def times_between(schedule: Schedule, low: float, high: float, steps: int, scale: float) -> Tensor:
    """Rising times from ``low`` to ``high``, even in arsinh(scale·α/σ), as :mod:`reparam.likelihood` steps."""
    ends = torch.tensor([low, high], dtype=torch.float64)
    u = torch.asinh((schedule.log_snr(ends) / 2).exp() * scale)
    between = torch.lerp(u[0], u[1], torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:-1])
    inner = schedule.time_at(2 * (torch.sinh(between) / scale).log())
    return torch.cat([ends[:1], inner, ends[1:]])


def _exact(schedule: Schedule, y: Tensor, t: float, asked: Asked) -> Tensor:
    return asked.mixture.log_prob(y.double(), _ratio(schedule, t))


def _ratio(schedule: Schedule, t: float) -> float:
    return float(schedule.sigma(t) / schedule.alpha(t))


def _slightly_noisy(schedule: Schedule, asked: Asked) -> Tensor:
    x0 = asked.fresh(_LIKELY, 0x711)
    return x0 + _ratio(schedule, asked.ends[0]) * _noise(x0, 0x712)


def _noise(x: Tensor, key: int) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(mix(0, key)))


def _as_data(x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """x_t/α, float64."""
    return x_t.double() / like(schedule.alpha(t), x_t.double())


def _no_floor(schedule: Schedule, asked: Asked) -> float:
    return 0.0


MODEL_METRICS: dict[str, ModelMetric] = {
    "score_error": ModelMetric(
        "squared error of the score times σ², a coordinate: of the model's mean against the exact one over σ, at the "
        "noise levels of training",
        _score_error,
        _no_floor,
    ),
    "nll": ModelMetric(
        "minus the model's log density (nats) of fresh data with the least noise, by the probability-flow ODE; the "
        "floor is that of the exact density",
        _nll,
        _nll_floor,
    ),
}
