r"""How likely data are under a denoiser: the exact density by the probability-flow ODE, and a variational bound.

Both speak of :math:`y = x_t/\alpha = x_0 + (\sigma/\alpha)\,\varepsilon` at a small time ``t_min``, data with a little
noise and in the data's units: the density of clean data need not exist. Both step in the variable

.. math:: u = -\operatorname{arsinh}(c\,\alpha/\sigma), \qquad z = x/R, \qquad R^2 = \alpha^2 c^2 + \sigma^2,

with c the data's standard deviation. At much signal u is −λ/2 and a constant (λ the log-SNR), at much noise it is
linear in α/σ and ends at 0 where α = 0, so that nothing is singular at either end. In it the ODE and the rate of the
log density along it are

.. math:: \frac{dz}{du} = \frac{\alpha c}{R} z - \frac{\hat x_0}{c}, \qquad
          \frac{d \log p(z)}{du} = \frac{R}{c} \operatorname{tr}\frac{\partial \hat x_0}{\partial x}
          - D\frac{\alpha c}{R},

without a derivative of the schedule: tables will do.

References:
    The ODE's density: Song et al., arXiv 2011.13456, appendix D.2. Hutchinson's trace: Grathwohl et al., arXiv
    1810.01367. The bound: Kingma et al., arXiv 2107.00630. Its exactness: Kong et al., arXiv 2302.03792.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .denoiser import Denoiser, evaluating, prepared
from .errors import Conflict, ReparamError, TimeOutOfRange, Unsupported, unknown
from .schedules import DDPM, Schedule
from .targets import InBasis, KTarget, Target

#: Where the data begin to be noised, for a model whose t_range begins at 0.
NEAR = 1e-3


def log_likelihood(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    steps: int = 100,
    times: Sequence[float] | Tensor | None = None,
    t_min: float | None = None,
    solver: str | None = None,
    trace: str = "exact",
    probes: int = 1,
    noises: Tensor | None = None,
    generator: torch.Generator | None = None,
    cond: Mapping[str, Any] | None = None,
    data_mean: float | Tensor = 0.0,
    data_std: float = 1.0,
    prior: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""log p(y) at y = x0 by the probability-flow ODE, where y = x_t/α at t = ``t_min``: slightly noised data.

    .. math:: \log p(y) = \log p_1(x_1) + D \log\frac{\alpha R_1}{R} + \int_{u(t_{\min})}^{u(1)} \operatorname{tr}
              \frac{\partial}{\partial z}\frac{dz}{du}\, du .

    The density of x_t itself at x is ``log_likelihood(denoiser, x / alpha) - D * log(alpha)`` at that time.

    References:
        Song et al., arXiv 2011.13456, eq. 39 and 40; Hutchinson's trace with fixed Rademacher probes: Grathwohl
        et al., arXiv 1810.01367, section 3.1.

    Args:
        denoiser: the model. Its network must be differentiable in x, and treat the samples of a batch apart.
        x0: where the density is asked for, in the units the model was trained on, shape [B, …].
        steps: even steps in u (see the module), of four evaluations each with "rk4", of two with "heun".
        times: rising times from t_min > 0 to the end, in the place of ``steps`` and ``t_min``.
        t_min: the time of the density, by default the lower end of t_range, or 0.001 where that is 0.
        solver: "rk4" (order 4) or "heun" (order 2); by default "rk4", but "heun" for a network with time="step",
            of which the grid is rounded to the table's steps and which cannot be asked between them.
        trace: "exact", by D backward passes an evaluation, for small D; or "hutchinson", by ``probes`` of them, an
            unbiased estimate of log p.
        probes: the number of Hutchinson's probes.
        noises: the probes themselves, shape [probes, B or 1, …], with E[v vᵀ] = 1.
        generator: for the probes.
        cond: passed on to the network, which then gives log p(x0 | cond).
        data_mean, data_std: of the data, a number or of a sample's shape, and a positive number c. The prior of x at
            the last time is N(α·mean, σ² + α² c²): exact where α = 0, an approximation elsewhere.
        prior: that log density itself, from x [B, …] to [B], where it is known better.

    Returns:
        log p in nats, float64, shape [B].

    Raises:
        Unsupported: if the noise is elementwise, the target is learned, the network gives no gradient, or it takes
            integer steps and the solver is "rk4".
        UnknownName: if there is no such solver or trace.
        TimeOutOfRange: if a time lies outside the model's t_range, or is 0.
        Conflict: if both times and t_min are given, or noises and an exact trace.
    """
    line = _Line(_plain(denoiser), _positive(data_std))
    solve = SOLVERS[_solver(denoiser, solver)]
    edges = _grid(denoiser, line, steps, times, t_min)
    with torch.inference_mode(False):
        x = x0.detach().to(torch.promote_types(x0.dtype, torch.float32), copy=True)
        vectors, share = _vectors(x, trace, probes, noises, generator)
        path = line.path(edges, solve is _rk4)
        flow = _Flow(denoiser, _ordinary(cond), line.scale, vectors, share)
        first, last = path[0][0], path[-1][-1]
        z, change = _integrated(flow, solve, path, x * (first.alpha / first.radius))
        x_end = (z * last.radius).to(_exact_device(x))
        scale = x[0].numel() * math.log(first.alpha * last.radius / first.radius)
        end = _prior(x_end.double(), last, data_mean, data_std) if prior is None else prior(x_end).double()
        return end + scale + change


def _integrated(
    flow: _Flow, solve: Callable[..., tuple[Tensor, Tensor]], path: Sequence[Sequence[_Point]], z: Tensor
) -> tuple[Tensor, Tensor]:
    """z at the end of the path, and the integral of the divergence along it: float64, shape [B]."""
    denoiser = flow.denoiser
    change = torch.zeros(len(z), dtype=torch.float64, device=_exact_device(z))
    asked = sorted({p.t for points in path for p in points})
    with evaluating(denoiser), prepared(denoiser, asked, z), _traceable(denoiser.net):
        for points in path:
            z, more = solve(flow, z, points)
            change += more
    return z, change


@dataclass(frozen=True)
class Bound:
    """A variational bound by noise level; all in nats and float64.

    Attributes:
        times: the bins' edges, rising, shape [levels + 1].
        log_snr: their log-SNR, falling; the last is −∞ where α = 0. Shape [levels + 1].
        terms: what every bin adds, shape [levels, B].
        prior: KL(q(x_1 | x0) ‖ prior), shape [B]; 0 where α(1) = 0.
        reconstruction: the entropy of x0 + (σ/α) ε given x0, (D/2) log(2πe σ²/α²) at t_min: a number, the same for all
            data, and also −E log N(x0; y, σ²/α²), the cost of decoding y.
    """

    times: Tensor
    log_snr: Tensor
    terms: Tensor
    prior: Tensor
    reconstruction: float

    @property
    def total(self) -> Tensor:
        """The sum, in nats, shape [B]."""
        return self.terms.sum(0) + self.prior + self.reconstruction


def variational_bound(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    levels: int = 32,
    times: Sequence[float] | Tensor | None = None,
    t_min: float | None = None,
    nodes: int = 2,
    draws: int = 1,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    cond: Mapping[str, Any] | None = None,
    data_mean: float | Tensor = 0.0,
    data_std: float = 1.0,
) -> Bound:
    r"""A bound on the negative log-likelihood, one term a bin of log-SNR.

    .. math:: L(x_0) = \tfrac{D}{2}\log\frac{2\pi e\,\sigma^2}{\alpha^2} + \mathrm{KL}_{\text{prior}}
              + \tfrac12 \int_{\mathrm{SNR}(1)}^{\mathrm{SNR}(t_{\min})}
              \mathbb E_\varepsilon \lVert x_0 - \hat x_0 \rVert^2 \, d\mathrm{SNR} .

    Of the model that the reverse process defines, L bounds −E log p(y) over y = x0 + (σ/α) ε at ``t_min`` from above,
    and −log p(x0) where y is decoded by N(x0; y, σ²/α²). For the exact posterior mean and the exact prior it is no
    bound but equal, for every single x0: L(x0) = −E_ε log p(y). Any other denoiser adds, on average over the data,
    half the integral of E‖x̂0 − E[x0 | x_t]‖².

    References:
        Kingma et al., arXiv 2107.00630, section 5 (and section 4 for the discrete-time bound); Kong et al., arXiv
        2302.03792, section 2 (equality, by the pointwise I-MMSE relation).

    Args:
        denoiser: the model.
        x0: clean data in the units the model was trained on, shape [B, …].
        levels: the number of bins, even in u (see the module).
        times: their rising edges, t_min > 0 first, in the place of ``levels`` and ``t_min``.
        t_min: the first edge, by default the lower end of t_range, or 0.001 where that is 0.
        nodes: Gauss–Legendre nodes in u in every bin. A network with time="step" is asked at the noisier edge of every
            bin instead: the discrete-time bound, which is larger.
        draws: the number of noises at every node, each its own.
        eps: unit noise for every node alike instead, shape [draws, B or 1, …].
        generator: for the noise.
        cond: passed on to the network.
        data_mean, data_std: of the data; the prior is as in :func:`log_likelihood`.

    Returns:
        The terms, their bins and their sum.

    Raises:
        Unsupported: if the noise is elementwise or the target is learned.
        TimeOutOfRange: if a time lies outside the model's t_range, or is 0.
        Conflict: if both times and t_min are given.
    """
    line = _Line(_plain(denoiser), _positive(data_std))
    edges = _grid(denoiser, line, levels, times, t_min)
    rule = _ends(line, edges) if denoiser.conventions.time == "step" else _gauss(line, edges, _count("nodes", nodes))
    x = x0.detach().to(torch.promote_types(x0.dtype, torch.float32))
    draws = _count("draws", draws) if eps is None else len(_shaped("eps", eps, x))
    noises = (lambda k: _randn(x, generator)) if eps is None else (lambda k: eps[k].to(x).expand_as(x))
    terms = _terms(denoiser, x, rule, draws, noises, dict(cond or {}))
    first, last = (line.point(float(t)) for t in (edges[0], edges[-1]))
    log_ratio = math.log(first.sigma / first.alpha)
    reconstruction = x[0].numel() * (math.log(2 * math.pi * math.e) / 2 + log_ratio)
    kl = _prior_kl(x.to(terms.device).double(), last, data_mean, data_std)
    return Bound(edges, denoiser.schedule.log_snr(edges), terms, kl, reconstruction)


def _terms(
    denoiser: Denoiser,
    x: Tensor,
    rule: Sequence[Sequence[tuple[float, float]]],
    draws: int,
    noises: Callable[[int], Tensor],
    cond: dict[str, Any],
) -> Tensor:
    """What every bin adds, by a rule of times and weights each: float64, shape [bins, B]."""
    terms = torch.zeros(len(rule), len(x), dtype=torch.float64, device=_exact_device(x))
    with evaluating(denoiser), prepared(denoiser, sorted({t for row in rule for t, _ in row}), x):
        for i, row in enumerate(rule):
            for (t, weight), k in itertools.product(row, range(draws)):
                x_t = denoiser.schedule.add_noise(x, noises(k), t)
                error = (x - denoiser(x_t, t, **cond).mean).to(terms.device).double()
                terms[i] += weight / (2 * draws) * error.square().flatten(1).sum(1)
    return terms


class _Point(NamedTuple):
    """The forward process at one time, as numbers."""

    t: float
    alpha: float
    sigma: float
    #: u, and R.
    u: float
    radius: float


@dataclass(frozen=True)
class _Line:
    """The variable u = −arsinh(c α/σ)."""

    schedule: Schedule
    scale: float

    def u(self, t: Tensor) -> Tensor:
        return -torch.asinh((self.schedule.log_snr(t) / 2).exp() * self.scale)

    def times(self, u: Tensor, low: float, high: float) -> Tensor:
        """The times of ``u``; a rounding beyond an end is that end."""
        log_snr = 2 * (torch.sinh(-u).log() - math.log(self.scale))
        # The schedule itself refuses a log-SNR that is a rounding below its last.
        return self.schedule.time_at(log_snr.clamp(min=float(self.schedule.log_snr(high)))).clamp(low, high)

    def snr_slope(self, u: Tensor) -> Tensor:
        """−dSNR/du, of SNR = (sinh(u)/c)²."""
        return torch.sinh(-2 * u) / self.scale**2

    def point(self, t: float) -> _Point:
        alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        u = float(self.u(torch.tensor(t, dtype=torch.float64)))
        return _Point(t, alpha, sigma, u, math.hypot(alpha * self.scale, sigma))

    def path(self, edges: Tensor, middles: bool) -> list[list[_Point]]:
        """What every step visits: its ends, and its middle in u between them."""
        ends = [self.point(t) for t in edges.tolist()]
        steps = [list(pair) for pair in itertools.pairwise(ends)]
        if not middles:
            return steps
        u = torch.tensor([(a.u + b.u) / 2 for a, b in steps], dtype=torch.float64)
        times = self.times(u, ends[0].t, ends[-1].t).tolist()
        return [[a, self.point(t), b] for (a, b), t in zip(steps, times, strict=True)]


@dataclass(frozen=True)
class _Flow:
    """(dz/du, its divergence) at a state z [B, …] and a time; the divergence float64, [B]."""

    denoiser: Denoiser
    cond: dict[str, Any]
    scale: float
    vectors: Tensor
    share: float

    def __call__(self, z: Tensor, at: _Point) -> tuple[Tensor, Tensor]:
        cosine = at.alpha * self.scale / at.radius
        with torch.enable_grad():  # evaluating has switched it off
            x = (z * at.radius).requires_grad_()
            mean = self.denoiser(x, at.t, **self.cond).mean
            trace = self._trace(mean, x)
        size = z[0].numel()
        return cosine * z - mean.detach() / self.scale, size * cosine - at.radius / self.scale * trace

    def _trace(self, mean: Tensor, x: Tensor) -> Tensor:
        """The weighted sum of vᵀ J v over all vectors, with J = ∂x̂0/∂x."""
        if not mean.requires_grad:
            raise _no_gradient(self.denoiser.net)
        total = torch.zeros(len(x), dtype=torch.float64, device=_exact_device(x))
        last = len(self.vectors) - 1
        for i, v in enumerate(self.vectors):
            (back,) = torch.autograd.grad(mean, x, v.expand_as(x), retain_graph=i < last, allow_unused=True)
            if back is None:
                raise _no_gradient(self.denoiser.net)
            total += (back * v).to(total.device).double().flatten(1).sum(1)
        return total * self.share


_Slope = Callable[[Tensor, _Point], tuple[Tensor, Tensor]]


def _rk4(f: _Slope, z: Tensor, points: list[_Point]) -> tuple[Tensor, Tensor]:
    start, middle, end = points
    h = end.u - start.u
    k1, d1 = f(z, start)
    k2, d2 = f(z + h / 2 * k1, middle)
    k3, d3 = f(z + h / 2 * k2, middle)
    k4, d4 = f(z + h * k3, end)
    return z + h / 6 * (k1 + 2 * (k2 + k3) + k4), h / 6 * (d1 + 2 * (d2 + d3) + d4)


def _heun(f: _Slope, z: Tensor, points: list[_Point]) -> tuple[Tensor, Tensor]:
    start, end = points
    h = end.u - start.u
    k1, d1 = f(z, start)
    k2, d2 = f(z + h * k1, end)
    return z + h / 2 * (k1 + k2), h / 2 * (d1 + d2)


#: Solvers by name: a step's new z, and what it adds to the integral of the divergence.
SOLVERS: dict[str, Callable[[_Slope, Tensor, list[_Point]], tuple[Tensor, Tensor]]] = {"rk4": _rk4, "heun": _heun}


def _solver(denoiser: Denoiser, which: str | None) -> str:
    on_steps = denoiser.conventions.time == "step"
    which = ("heun" if on_steps else "rk4") if which is None else which
    if which not in SOLVERS:
        raise unknown("solver", which, SOLVERS)
    if on_steps and which == "rk4":
        raise Unsupported("rk4 asks the network between the times of the grid, and time='step' has none; use 'heun'.")
    return which


def _plain(denoiser: Denoiser) -> Schedule:
    """The schedule, if its noise is one number a time and the target is not learned."""
    schedule = denoiser.schedule
    if schedule.sigma(denoiser.t_range[1]).ndim:
        raise Unsupported(f"likelihoods need one noise level a time, and {schedule} is elementwise.")
    if _learned(denoiser.target):
        raise Unsupported(f"likelihoods need a fixed target, and {denoiser.target} is learned; use its frozen() form.")
    return schedule


def _learned(kind: Target) -> bool:
    if isinstance(kind, InBasis):
        return _learned(kind.inside) or _learned(kind.outside)
    return isinstance(kind, KTarget) and kind.learned


def _positive(std: float) -> float:
    if isinstance(std, bool) or not isinstance(std, int | float) or not 0 < std < math.inf:
        raise ReparamError(f"data_std, the standard deviation of the data, must be a positive number, found {std!r}.")
    return float(std)


def _count(what: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ReparamError(f"{what} must be a positive integer, found {value!r}.")
    return value


def _grid(
    denoiser: Denoiser, line: _Line, steps: int, times: Sequence[float] | Tensor | None, t_min: float | None
) -> Tensor:
    """Rising times, float64: those given, or ``steps`` even steps in u from t_min to the end of t_range."""
    low, high = denoiser.t_range
    if times is not None:
        if t_min is not None:
            raise Conflict("found both times and t_min; the first of the times is t_min. Give one of the two.")
        values = times.tolist() if isinstance(times, Tensor) else times
        edges = torch.tensor([float(t) for t in values], dtype=torch.float64)
        if len(edges) < 2 or not bool((edges.diff() > 0).all()):
            raise ReparamError(f"times must be at least two rising numbers, from data to noise, found {values[:6]}.")
        return _inside(edges, low, high)
    first = (low or NEAR) if t_min is None else float(t_min)
    ends = _inside(torch.tensor([first, high], dtype=torch.float64), low, high)
    if not first < high:
        raise TimeOutOfRange(f"t_min = {first:g} must lie below the end of t_range, {high:g}.")
    u = line.u(ends)
    edges = line.times(
        torch.lerp(u[0], u[1], torch.linspace(0, 1, _count("steps", steps) + 1, dtype=torch.float64)), first, high
    )
    edges[0], edges[-1] = first, high
    if denoiser.conventions.time == "step" and isinstance(denoiser.schedule, DDPM):
        return denoiser.schedule.on_steps(edges, high).unique()
    return edges


def _inside(times: Tensor, low: float, high: float) -> Tensor:
    outside = times[~((times >= low) & (times <= high) & (times > 0))]
    if len(outside):
        raise TimeOutOfRange(
            f"found t = {outside[0].item():g}; this model was trained on t in [{low:g}, {high:g}], and a density needs "
            "some noise: begin above t = 0."
        )
    return times


def _gauss(line: _Line, edges: Tensor, nodes: int) -> list[list[tuple[float, float]]]:
    """For every bin, the (times, weights) with which ∫ f dSNR = Σ w f(t): Gauss–Legendre in u."""
    where, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(nodes))
    u = line.u(edges)
    middle, half = (u[1:] + u[:-1]) / 2, (u[1:] - u[:-1]) / 2
    at = middle[:, None] + half[:, None] * where
    times = line.times(at, float(edges[0]), float(edges[-1]))
    weight = half[:, None] * weights * line.snr_slope(at)
    return [list(zip(*row, strict=True)) for row in zip(times.tolist(), weight.tolist(), strict=True)]


def _ends(line: _Line, edges: Tensor) -> list[list[tuple[float, float]]]:
    """The same, of the noisier edge alone, where the error is largest (Kingma et al., section 4)."""
    fall = -line.schedule.log_snr(edges).exp().diff()
    return [[pair] for pair in zip(edges[1:].tolist(), fall.tolist(), strict=True)]


def _vectors(
    x: Tensor, trace: str, probes: int, noises: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, float]:
    """The vectors v [n, B or 1, …] and the weight w with which the trace is w Σ vᵀ J v."""
    if trace not in TRACES:
        raise unknown("trace", trace, TRACES)
    if trace == "exact":
        if noises is not None:
            raise Conflict("noises are probes of Hutchinson's trace; give trace='hutchinson' with them.")
        size = x[0].numel()
        return torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *x.shape[1:]), 1.0
    if noises is not None:
        return _shaped("noises", noises, x).to(x), 1 / len(noises)
    shape = (_count("probes", probes), *x.shape)
    drawn_on = generator.device if generator is not None else x.device
    signs = torch.randint(0, 2, shape, generator=generator, device=drawn_on).to(x)
    return 2 * signs - 1, 1 / probes


TRACES = ("exact", "hutchinson")


def _shaped(name: str, given: Tensor, x: Tensor) -> Tensor:
    if (
        given.ndim != x.ndim + 1
        or not len(given)
        or given.shape[1] not in (1, len(x))
        or given.shape[2:] != x.shape[1:]
    ):
        raise ReparamError(f"{name} has the shape [count, {len(x)} or 1, …] of x0, found {list(given.shape)}.")
    return given


def _ordinary(cond: Mapping[str, Any] | None) -> dict[str, Any]:
    """``cond`` with copies of what was made in inference mode, which no gradient may keep."""
    return {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in (cond or {}).items()}


def _randn(x: Tensor, generator: torch.Generator | None) -> Tensor:
    drawn_on = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=drawn_on, dtype=x.dtype).to(x.device)


def _exact_device(x: Tensor) -> torch.device:
    """Where float64 is summed: beside x, but on the CPU where x's device has none."""
    return torch.device("cpu") if x.device.type == "mps" else x.device


def _prior(x: Tensor, at: _Point, mean: float | Tensor, std: float) -> Tensor:
    """log N(x; α·mean, σ² + α² std²), shape [B], for x in float64."""
    var = at.sigma**2 + (at.alpha * std) ** 2
    squares = (x - at.alpha * _as_data(mean, x)).square().flatten(1)
    return -squares.sum(1) / (2 * var) - squares.shape[1] * math.log(2 * math.pi * var) / 2


def _prior_kl(x0: Tensor, at: _Point, mean: float | Tensor, std: float) -> Tensor:
    """KL(N(α x0, σ²) ‖ N(α·mean, σ² + α² std²)), shape [B]."""
    snr = (at.alpha / at.sigma) ** 2
    excess = snr * ((x0 - _as_data(mean, x0)).square() - std**2) / (1 + snr * std**2)
    return (excess + math.log1p(snr * std**2)).flatten(1).sum(1) / 2


def _as_data(mean: float | Tensor, x: Tensor) -> float | Tensor:
    return mean.to(x) if isinstance(mean, Tensor) else mean


@contextlib.contextmanager
def _traceable(net: nn.Module) -> Iterator[None]:
    """Inside, a network that answers without a gradient is an error: its trace would silently be 0."""

    def check(module: nn.Module, given: tuple[Any, ...], answer: Any) -> None:
        if torch.is_grad_enabled() and isinstance(answer, Tensor) and not answer.requires_grad:
            raise _no_gradient(module)

    handle = net.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _no_gradient(net: nn.Module) -> Unsupported:
    return Unsupported(
        f"{type(net).__name__} answers without a gradient in x, which the density needs; take no_grad and detach out "
        "of its forward."
    )
