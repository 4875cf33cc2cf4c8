"""How honest a model's variance is: whether its errors are as large as it says, at every noise level.

With m and C the mean and covariance that a model states of x0 given x_t, and R a root of it, C = R Rᵀ,
the whitened errors z = R⁻¹ (x0 − m), element by element (x0 − m)/√C_ii where C is diagonal, have a mean square
of 1 where the model is honest, more where it is too sure of itself and less where it is too careful. That holds
whatever the distribution of x0; coverage and likelihood judge the Gaussian form too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..denoiser import Denoiser, evaluating
from ..errors import DataError, NetworkError, Unsupported
from ..schedules import Schedule
from .blocks import student_quantile

if TYPE_CHECKING:
    from ..data import Data
    from ..data.mixtures import Mixture
    from ..training.validation import Validation

#: The central intervals whose coverage is told, and those over which the calibration error is a mean.
COVERAGES = (0.5, 0.9, 0.99)
LEVELS = tuple(k / 20 for k in range(1, 20))
_ALL = tuple(sorted({*COVERAGES, *LEVELS}))
#: Samples of a noise bin, and the numbers that they have together where there are neither fewer nor more.
_LEAST, _MOST, _NUMBERS = 256, 2048, 2**17
#: What is measured of every sample, before the shares of its elements that each interval of _ALL covers.
_FIRST = ("z2", "nll", "var", "mse")
_EXACT = ("exact_nll", "gaussian_nll")
#: Up to so many times its median a z² counts in full for the lower end of an interval.
_TAIL = 100.0
#: Why a likelihood of another noisy sample tells no variance of x0.
LOST = "the variance of x0 would be that less the noise's own, which is lost to rounding at high noise"


class Measured(NamedTuple):
    """A mean over samples and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Reliability:
    """What was found at one noise level, or over all of them.

    Attributes:
        n: of how many samples.
        z2: the mean of z²; 1 where the variance is honest.
        z2_interval: of 95 % for all noise bins together (Bonferroni), and of that mean's own for the total. Rare large
            z², as of a posterior with several modes, make an interval reach further up than down. Its lower end holds
            however heavy the tail is; its upper end knows of none but the z² that were seen.
        z2_median: half of the samples have a mean z² below this. Far below ``z2`` where few samples make up the mean.
        coverage: the share of whitened elements inside each central interval of the unit normal, by its nominal share.
        calibration_error: the mean of |share − nominal share| over the nominal shares 5 %, 10 %, … 95 %.
        calibration_floor: what an honest model would get of as many samples, by chance alone.
        nll: −log N(x0; m, C), nats an element, in units of the normalised data.
        var, mse: the mean variance stated, and the mean squared error.
        exact_nll: −log p(x0 | x_t), nats an element; None where the truth is not known.
        gaussian_nll: that of the best Gaussian, of the exact mean and covariance; None likewise.
    """

    n: int
    z2: Measured
    z2_interval: tuple[float, float]
    z2_median: float
    coverage: dict[float, Measured]
    calibration_error: float
    calibration_floor: float
    nll: Measured
    var: Measured
    mse: Measured
    exact_nll: Measured | None = None
    gaussian_nll: Measured | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the nominal shares are texts, such as "0.9"."""
        found: dict[str, Any] = {"n": self.n}
        for name in ("z2", "nll", "var", "mse", *_EXACT):
            measured = getattr(self, name)
            found[name] = None if measured is None else measured._asdict()
        found["coverage"] = {f"{p:g}": measured._asdict() for p, measured in self.coverage.items()}
        return {
            **found,
            "z2_interval": list(self.z2_interval),
            "z2_median": self.z2_median,
            "calibration_error": self.calibration_error,
            "calibration_floor": self.calibration_floor,
        }


@dataclass(frozen=True)
class Calibration:
    """How honest a model's variance is, by noise level.

    Standard errors are those of means of samples, not of elements, which are not independent. They take samples
    of a noise bin for independent: where held-out data are so few that some occur in it more than once, with other
    noise, the errors are those of these data.

    Attributes:
        edges: of the noise bins, in t, length K + 1.
        elements: numbers in a sample.
        bins: one for each noise bin.
        total: over all samples; its calibration error is the mean of the bins', so that a model which is too sure
            at one noise level and too careful at another does not pass for honest.
    """

    edges: list[float]
    elements: int
    bins: list[Reliability]
    total: Reliability

    @classmethod
    def of(cls, denoiser: Denoiser, validation: Validation, exact: Mixture | None = None) -> Calibration:
        """Of a model on a fixed draw of held-out data: see :func:`calibration`."""
        v = validation
        return calibration(denoiser, v.x0, v.t, v.eps, v.edges, v.y, exact=exact)

    @classmethod
    def on(
        cls, denoiser: Denoiser, data: Data, t_range: tuple[float, float], *, conditional: bool = False
    ) -> Calibration:
        """Of a model on the held-out data, in ten noise bins in ``t_range``; beside the truth where data know theirs.

        Of small samples there are more than a validation of training has: where the posterior has rare modes, the
        mean of few z² is nearly always too small.
        """
        from ..training import Validation

        each = max(_LEAST, min(_MOST, _NUMBERS // math.prod(data.shape)))
        return cls.of(denoiser, Validation.draw(data, t_range, conditional=conditional, each=each), data.mixture)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a row of the leaderboard and a metric card."""
        return {
            "edges_t": list(self.edges),
            "elements": self.elements,
            "bins": [found.to_dict() for found in self.bins],
            "total": self.total.to_dict(),
        }


def calibration(
    denoiser: Denoiser,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    edges: Sequence[float],
    y: Tensor | None = None,
    *,
    exact: Mixture | None = None,
) -> Calibration:
    """How honest the variance that a model states of x0 given x_t is, by noise level.

    Args:
        denoiser: any whose posterior has a variance, or a root of its covariance.
        x0: data the model was not trained on, normalised, shape [N, …]. t: shape [N]. eps: unit noise, as x0.
        edges: of the noise bins, in t, increasing, length K + 1; every bin needs at least 2 samples.
        y: class numbers, shape [N], for a conditional model.
        exact: the data's distribution, where it is known: for the exact likelihoods to compare with.

    Returns:
        What was found in each bin and in all.

    Raises:
        Unsupported: if the model states no variance of x0.
        NetworkError: if a variance is not positive and finite, or a mean not finite.
        DataError: if a bin has fewer than 2 samples, or a time lies in no bin.
    """
    bounds = torch.tensor(list(edges), dtype=torch.float64)
    t = t.double().cpu()
    which = _bins(t, bounds)
    chunk = max(1, min(1024, 2**21 // math.prod(x0.shape[1:])))
    device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
    rows = []
    with evaluating(denoiser):
        for at in torch.arange(len(t)).split(chunk):
            when, clean = t[at], x0[at].to(device)
            if denoiser.conventions.time == "step":
                when = denoiser.schedule.on_steps(when)  # type: ignore[attr-defined]
            x_t = denoiser.schedule.add_noise(clean, eps[at].to(device), when)
            cond = {} if y is None else {"y": y[at].to(device)}
            row = _judged(denoiser, clean, x_t, when, cond)
            if exact is not None:
                row = torch.cat([row, _likelihoods(exact, clean, x_t, when, denoiser.schedule)], 1)
            rows.append(row)
    each = torch.cat(rows)
    names = [*_FIRST, *_ALL, *(_EXACT if exact is not None else ())]
    count = len(bounds) - 1
    bins = [_reliability(names, each[which == k], 1 - 0.05 / count) for k in range(count)]
    total = _total(bins, [each[which == k, 0] for k in range(count)])
    return Calibration([float(e) for e in edges], math.prod(x0.shape[1:]), bins, total)


def _bins(t: Tensor, edges: Tensor) -> Tensor:
    """The bin of each time."""
    if len(edges) < 2 or not bool((edges.diff() > 0).all()):
        raise DataError(f"the edges of noise bins are at least two increasing times, found {edges.tolist()}.")
    if not bool(((t >= edges[0]) & (t <= edges[-1])).all()):
        raise DataError(
            f"times run from {float(t.min()):g} to {float(t.max()):g}, beyond the noise bins, which cover "
            f"[{float(edges[0]):g}, {float(edges[-1]):g}]; widen their edges."
        )
    which = torch.bucketize(t, edges[1:-1], right=True)
    counts = torch.bincount(which, minlength=len(edges) - 1)
    if int(counts.min()) < 2:
        k = int(counts.argmin())
        raise DataError(
            f"the noise bin from t = {float(edges[k]):g} to {float(edges[k + 1]):g} has {int(counts[k])} samples; at "
            "least 2 are needed for a standard error. Take fewer bins or more samples."
        )
    return which


def _judged(denoiser: Denoiser, x0: Tensor, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """What a model's posteriors at x_t are worth: _FIRST and the coverage of _ALL, float64 [B, …]."""
    mean, var, root = denoiser(x_t, t, **cond)
    error = _exactly(x0 - mean)
    if root is not None:
        root = root.detach().cpu().double()
        z, half_log_det = _whitened(error, root)
        var = root.square().sum(2)
    elif var is not None:
        var = _exactly(var.expand_as(x0))
        z, half_log_det = error / var.sqrt(), var.log().mean(1) / 2
    else:
        raise Unsupported(_no_variance(denoiser))
    _refuse_unusable(error, var, half_log_det, t)
    z2 = z.square().mean(1)
    nll = (z2 + math.log(2 * math.pi)) / 2 + half_log_det
    size = z.abs()
    covered = [(size <= NormalDist().inv_cdf((1 + p) / 2)).double().mean(1) for p in _ALL]
    return torch.stack([z2, nll, var.mean(1), error.square().mean(1), *covered], 1)


def _exactly(x: Tensor) -> Tensor:
    """Flat, and in float64, which not every device has."""
    return x.detach().cpu().double().flatten(1)


def _whitened(error: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """R⁻¹ error of shape [B, D], and log |det R| an element, shape [B]; of a root without inverse infinite ones."""
    log_det = torch.linalg.slogdet(root).logabsdet
    usable = log_det.isfinite()
    z = torch.full_like(error, math.inf)
    z[usable] = torch.linalg.solve(root[usable], error[usable, :, None]).squeeze(-1)
    return z, log_det / error.shape[1]


def _refuse_unusable(error: Tensor, var: Tensor, half_log_det: Tensor, t: Tensor) -> None:
    usable = (error.isfinite() & var.isfinite() & (var > 0)).all(1) & half_log_det.isfinite()
    if not bool(usable.all()):
        k = int((~usable).nonzero()[0])
        raise NetworkError(
            f"at t = {float(t[k]):g} the model states a mean or a variance of x0 that is not finite, or a variance "
            f"that is not positive (the least is {float(var[k].min()):g}), for {int((~usable).sum())} of {len(t)} "
            "samples; its calibration cannot be told. Has its training diverged?"
        )


def _no_variance(denoiser: Denoiser) -> str:
    """Why there is nothing to judge, and what to do."""
    kind = denoiser.target.name
    likelihood = denoiser.conventions.likelihood
    if likelihood is None:
        found = f"this model predicts {kind} and states no variance, so there is nothing to calibrate."
    else:
        found = f"the likelihood of this model is of another noisy sample (of={likelihood.of!r}); {LOST}."
    return f"{found} Train it with target: {{name: gaussian, target: {kind}, of: x0}}."


def _likelihoods(exact: Mixture, x0: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """_EXACT at x_t, float64 [B, 2].

    The noise levels of a batch differ, and where no data are left in x_t its posterior is the data's distribution.
    """
    alpha, sigma = schedule.alpha(t).double(), schedule.sigma(t).double()
    if alpha.shape != t.shape or sigma.shape != t.shape:
        raise Unsupported("exact likelihoods need noise of one strength in all elements; leave exact out.")
    x0, x_t = _exactly(x0), _exactly(x_t)
    mean, cov = exact.mean.expand_as(x0).clone(), exact.cov.expand(*x0.shape, x0.shape[1]).clone()
    log_p, told = torch.empty_like(alpha), alpha > 0
    if not bool(told.all()):
        log_p[~told] = exact.log_prob(x0[~told])
    if bool(told.any()):
        x, noise = x_t[told] / alpha[told, None], (sigma / alpha)[told]
        log_p[told] = exact.posterior_log_prob(x0[told], x, noise)
        mean[told], cov[told] = exact.posterior(x, noise)
    z, half_log_det = _whitened(x0 - mean, torch.linalg.cholesky(cov))
    gaussian = (z.square().mean(1) + math.log(2 * math.pi)) / 2 + half_log_det
    return torch.stack([-log_p / x0.shape[1], gaussian], 1)


def _reliability(names: Sequence[Any], each: Tensor, level: float) -> Reliability:
    """The means of samples alike in noise: ``each`` of shape [n, len(names)]; ``level`` that of the interval."""
    n, z2 = len(each), each[:, names.index("z2")]
    values, errors = each.mean(0).tolist(), (each.std(0) / math.sqrt(n)).tolist()
    found: dict[Any, Any] = {name: Measured(*pair) for name, *pair in zip(names, values, errors, strict=True)}
    rest: dict[str, Any] = {name: found.get(name) for name in (*_FIRST, *_EXACT)}
    return Reliability(
        n=n,
        z2_interval=_interval(z2, level),
        z2_median=float(z2.median()),
        coverage={p: found[p] for p in COVERAGES},
        calibration_error=math.fsum(abs(found[p].value - p) for p in LEVELS) / len(LEVELS),
        # |N(0, s²)| is s √(2/π) in the mean.
        calibration_floor=math.sqrt(2 / math.pi) * math.fsum(found[p].error for p in LEVELS) / len(LEVELS),
        **rest,
    )


def _interval(z2: Tensor, level: float) -> tuple[float, float]:
    """An interval for the mean of z², which is not negative and may be made of a few samples.

    min(z², c) has no heavy tail, and no mean above that of z²: its lower end is one of z², if not the narrowest.
    """
    return max(0.0, skewed_interval(_without_tail(z2), level)[0]), skewed_interval(z2, level)[1]


def _without_tail(z2: Tensor) -> Tensor:
    return z2.clamp(max=_TAIL * float(z2.median()))


def skewed_interval(values: Tensor, level: float) -> tuple[float, float]:
    """An interval for the mean that skewed values were drawn around.

    With mean m, standard deviation s and skewness γ of n values, Student's t = (m − μ)/(s/√n) leans to one side;
    g(x) = x + γx²/3 + γ²x³/27 + γ/(6n), of x = t/√n, does not, and the interval is where |√n g(x)| is no more than
    Student's quantile. It takes fewer values than the plain one to hold the mean as often as it says.

    Args:
        values: shape [n], independent, n at least 2. level: how often the interval is to hold the mean, in (0, 1).

    Returns:
        The lower and the upper end.

    References:
        P. Hall, "On the removal of skewness by transformation", J. R. Statist. Soc. B 54 (1992).
    """
    n, mean, std = len(values), float(values.mean()), float(values.std())
    if std == 0:
        return mean, mean
    skew = float(((values - mean) / values.std(correction=0)).pow(3).mean())
    far = student_quantile(level, n - 1) / math.sqrt(n)

    def inverse(y: float) -> float:
        if abs(skew) < 1e-6:
            return y
        cube = 1 + skew * (y - skew / (6 * n))
        return 3 / skew * (math.copysign(abs(cube) ** (1 / 3), cube) - 1)

    return mean - std * inverse(far), mean - std * inverse(-far)


def _total(bins: Sequence[Reliability], z2s: Sequence[Tensor]) -> Reliability:
    """Over all bins, with the z² of their samples.

    Bins are fixed in number, so what sets them apart adds nothing to a standard error.
    """
    n = sum(found.n for found in bins)

    def pooled(parts: Sequence[Measured | None]) -> Any:
        known = [(found.n / n, part) for found, part in zip(bins, parts, strict=True) if part is not None]
        if not known:
            return None
        return Measured(math.fsum(w * m.value for w, m in known), math.hypot(*(w * m.error for w, m in known)))

    z2, far = pooled([found.z2 for found in bins]), NormalDist().inv_cdf(0.975)
    least = pooled([Measured(float(v.mean()), float(v.std()) / math.sqrt(len(v))) for v in map(_without_tail, z2s)])
    return Reliability(
        n=n,
        z2_interval=(max(0.0, least.value - far * least.error), z2.value + far * z2.error),
        z2_median=float(torch.cat(list(z2s)).median()),
        coverage={p: pooled([found.coverage[p] for found in bins]) for p in COVERAGES},
        calibration_error=math.fsum(found.n / n * found.calibration_error for found in bins),
        calibration_floor=math.fsum(found.n / n * found.calibration_floor for found in bins),
        **{name: pooled([getattr(found, name) for found in bins]) for name in (*_FIRST, *_EXACT)},
    )
