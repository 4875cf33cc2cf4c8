r"""The forward process: how data turn into noise.

.. math:: x_t = \alpha(t)\, x_0 + \sigma(t)\, \varepsilon, \qquad t \in [0, 1],

with **t = 0 the data and t = 1 the noise**. Coefficients are computed in float64 on the
CPU, with closed forms that stay exact at both ends, and only then cast. The log
signal-to-noise ratio is λ = log(α²/σ²).

References:
    Flow matching: Liu et al., arXiv 2209.03003; Lipman et al., arXiv 2210.02747.
    DDPM: Ho et al., arXiv 2006.11239. Cosine: Salimans & Ho, arXiv 2202.00512.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import ReparamError, TimeOutOfRange, Unsupported, unknown
from .expressions import parsed

Time = float | Tensor


def as_time(t: Time) -> Tensor:
    """``t`` as a float64 tensor on the CPU, checked to lie in [0, 1].

    Raises:
        TimeOutOfRange: if any time is outside [0, 1] or not a number.
    """
    t64 = _float64(t)
    low, high = torch.aminmax(t64) if t64.numel() else (torch.zeros(()), torch.zeros(()))
    if not (low >= 0 and high <= 1):  # NaN is neither
        bad = t64[~((t64 >= 0) & (t64 <= 1))].flatten()[0].item()
        raise TimeOutOfRange(
            f"found t = {bad:g}; times run from 0 (data) to 1 (noise). For an integer step k of a table "
            "use schedule.time(k)."
        )
    return t64


def _float64(value: Time) -> Tensor:
    # Not as_tensor(value).to(float64): that would round a Python float to float32 on the way.
    if isinstance(value, Tensor):
        return value.detach().to("cpu", torch.float64)
    return torch.tensor(value, dtype=torch.float64)


def like(c: Tensor, x: Tensor) -> Tensor:
    """Coefficients ``c``, one a sample or elementwise, made to broadcast against data ``x``.

    A ``c`` of shape [B] meets an ``x`` of shape [B, …] as [B, 1, …]. A scalar stays a
    zero-dimensional float64 tensor on the CPU: torch treats it as a number, at no transfer.
    """
    if c.ndim == 0:
        return c
    c = c.reshape(c.shape + (1,) * (x.ndim - c.ndim))
    return c.to(device=x.device, dtype=x.dtype, non_blocking=True)


class Schedule(ABC):
    """A forward process. A subclass gives its formulas on float64 tensors (the underscored
    methods); the public ones accept a float or a tensor of any shape and return a tensor of
    that shape on the same device, in float64 for a float and in at least float32 otherwise.
    """

    name: ClassVar[str]
    #: α and σ are differentiable, so that a sampler may step in t.
    smooth: ClassVar[bool] = True

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _alpha_dot(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _sigma_dot(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _time_at(self, log_snr: Tensor) -> Tensor: ...

    def _log_snr(self, t: Tensor) -> Tensor:
        return 2 * (self._alpha(t).log() - self._sigma(t).log())

    def alpha(self, t: Time) -> Tensor:
        """α(t), the factor on the data."""
        return _cast(self._alpha(as_time(t)), t)

    def sigma(self, t: Time) -> Tensor:
        """σ(t), the factor on the noise."""
        return _cast(self._sigma(as_time(t)), t)

    def alpha_dot(self, t: Time) -> Tensor:
        """dα/dt."""
        return _cast(self._alpha_dot(as_time(t)), t)

    def sigma_dot(self, t: Time) -> Tensor:
        """dσ/dt."""
        return _cast(self._sigma_dot(as_time(t)), t)

    def log_snr(self, t: Time) -> Tensor:
        """λ = log(α²/σ²), +∞ where σ = 0 and −∞ where α = 0."""
        return _cast(self._log_snr(as_time(t)), t)

    def time_at(self, log_snr: Time) -> Tensor:
        """The time whose log-SNR is ``log_snr`` (±∞ allowed): the inverse of :meth:`log_snr`.

        Raises:
            TimeOutOfRange: if the schedule never reaches that log-SNR.
        """
        return _cast(self._time_at(_float64(log_snr)), log_snr)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """x_t = α(t) x0 + σ(t) ε, for x0 and ε of shape [B, …] and t a scalar or of shape [B]."""
        t64 = as_time(t)
        signal, sigma = like(self._alpha(t64), x0) * x0, like(self._sigma(t64), eps)
        # One pass over the data less; a scalar stays on the CPU, where it is a number to any device.
        return signal + sigma * eps if sigma.ndim == 0 else torch.addcmul(signal, sigma, eps)

    def config(self) -> dict[str, Any]:
        """The schedule as plain data, from which :func:`schedule` builds it again."""
        return config_of(self)


def _cast(value: Tensor, t: Time) -> Tensor:
    if not isinstance(t, Tensor):
        return value
    dtype = torch.promote_types(t.dtype, torch.float32) if t.dtype.is_floating_point else torch.float64
    if t.device.type == "mps":
        dtype = torch.float32
    return value.to(device=t.device, dtype=dtype)


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """α = 1 − t, σ = s·t, with s the noise scale: the straight path of flow matching.

    Args:
        noise_scale: s > 0, the standard deviation of the noise at t = 1. JiT uses
            image size / 256 (arXiv 2511.13720).
    """

    name: ClassVar[str] = "rectified_flow"
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_scale) and self.noise_scale > 0):
            raise Unsupported(f"noise_scale must be a positive number, found {self.noise_scale!r}.")

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def _sigma(self, t: Tensor) -> Tensor:
        return self.noise_scale * t

    def _alpha_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def _sigma_dot(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.noise_scale)

    def _log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-t) - t.log() - math.log(self.noise_scale))

    def _time_at(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-(log_snr / 2 + math.log(self.noise_scale)))


@dataclass(frozen=True)
class Cosine(Schedule):
    """α = cos(πt/2), σ = sin(πt/2): variance preserving, with α(1) = 0 exactly."""

    name: ClassVar[str] = "cosine"

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.sin((1 - t) * (math.pi / 2))  # sin of the complement: exactly 0 at t = 1

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))

    def _alpha_dot(self, t: Tensor) -> Tensor:
        return -(math.pi / 2) * self._sigma(t)

    def _sigma_dot(self, t: Tensor) -> Tensor:
        return (math.pi / 2) * self._alpha(t)

    def _time_at(self, log_snr: Tensor) -> Tensor:
        # Each end from its own side, so that neither loses digits.
        near_data = torch.atan(torch.exp(-log_snr / 2)) * (2 / math.pi)
        near_noise = 1 - torch.atan(torch.exp(log_snr / 2)) * (2 / math.pi)
        return torch.where(log_snr > 0, near_data, near_noise)


def _linear(T: int, start: float, end: float) -> Tensor:
    return torch.linspace(start, end, T, dtype=torch.float64)


def _scaled_linear(T: int, start: float, end: float) -> Tensor:
    return torch.linspace(math.sqrt(start), math.sqrt(end), T, dtype=torch.float64) ** 2


def _squared_cosine(T: int, start: float, end: float) -> Tensor:
    t = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    signal = torch.cos((t + 0.008) / 1.008 * (math.pi / 2)) ** 2
    return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)


#: So that a record with a slip in it asks for no table of gigabytes.
_MOST_STEPS = 1_000_000
#: Beta tables: how they are made, and from where to where they go (0, 0: that is fixed).
BETAS: dict[str, tuple[Callable[[int, float, float], Tensor], tuple[float, float]]] = {
    "linear": (_linear, (1e-4, 0.02)),
    "scaled_linear": (_scaled_linear, (0.00085, 0.012)),
    "squared_cosine": (_squared_cosine, (0.0, 0.0)),
}


@dataclass(frozen=True)
class DDPM(Schedule):
    """The discrete process of DDPM, made continuous.

    The integer step k (0 … T − 1) of the table stands at t = (k + 1)/T; t = 0 is the exact
    data, one step before the table. Between steps the angle atan2(σ, α) is linear in t, so
    α² + σ² = 1 everywhere. Derivatives are those of the interval that ends at t.

    Args:
        betas: "linear", from 1e-4 to 0.02 (Ho et al., arXiv 2006.11239, section 4);
            "scaled_linear", linear in sqrt(β), from 0.00085 to 0.012 (Stable Diffusion);
            "squared_cosine" (Nichol & Dhariwal, arXiv 2102.09672, eq. 17, β at most 0.999);
            or the T numbers themselves, in (0, 1), of which the last may be 1: pure noise.
        T: the number of steps.
        zero_terminal_snr: shift and scale sqrt(ᾱ) so that the last step is pure noise
            (Lin et al., arXiv 2305.08891, algorithm 1). A fact of its own, whatever the target.
        beta_start, beta_end: others than the table's own ends.
    """

    name: ClassVar[str] = "ddpm"
    smooth: ClassVar[bool] = False
    betas: str | Sequence[float] = "linear"
    T: int = 1000
    zero_terminal_snr: bool = False
    beta_start: float | None = None
    beta_end: float | None = None
    # Angle from the data, and from the noise, at t = 0, 1/T, …, 1: both are kept because
    # each is exact at its own end.
    _angles: tuple[Tensor, Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.betas, str) and self.betas not in BETAS:
            raise unknown("beta table", self.betas, BETAS)
        if isinstance(self.T, bool) or not isinstance(self.T, int) or not 2 <= self.T <= _MOST_STEPS:
            raise Unsupported(f"T must be an integer of 2 … {_MOST_STEPS:,}, found {self.T!r}.")
        if not isinstance(self.betas, str):
            object.__setattr__(self, "betas", _numbers(self.betas, self.T))
        alpha, sigma = self._table()
        if self.zero_terminal_snr:
            alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
            sigma = ((1 - alpha) * (1 + alpha)).sqrt()
        alpha = torch.cat([torch.ones(1, dtype=torch.float64), alpha])
        sigma = torch.cat([torch.zeros(1, dtype=torch.float64), sigma])
        object.__setattr__(self, "_angles", (torch.atan2(sigma, alpha), torch.atan2(alpha, sigma)))

    def _table(self) -> tuple[Tensor, Tensor]:
        """sqrt(ᾱ) and sqrt(1 − ᾱ) at the steps."""
        log_signal = torch.log1p(-self._betas()).cumsum(0)  # log of the product of 1 − β
        return (log_signal / 2).exp(), (-torch.expm1(log_signal)).sqrt()

    def _betas(self) -> Tensor:
        if not isinstance(self.betas, str):
            if (self.beta_start, self.beta_end) != (None, None):
                raise Unsupported("a beta table of your own numbers has no beta_start and beta_end.")
            return torch.tensor(self.betas, dtype=torch.float64)
        make, ends = BETAS[self.betas]
        start, end = (
            own if own is not None else e for own, e in zip((self.beta_start, self.beta_end), ends, strict=True)
        )
        if ends == (0.0, 0.0) and (start, end) != ends:
            raise Unsupported(f"the beta table {self.betas} has no beta_start and beta_end.")
        if ends != (0.0, 0.0) and not 0 < start <= end < 1:
            raise Unsupported(f"beta_start and beta_end must satisfy 0 < start <= end < 1, found {start!r}, {end!r}.")
        return make(self.T, start, end)

    def config(self) -> dict[str, Any]:
        """Plain data; numbers of your own as a list."""
        return super().config() | {"betas": self.betas if isinstance(self.betas, str) else list(self.betas)}

    def __repr__(self) -> str:
        shown = {f.name: repr(getattr(self, f.name)) for f in dataclasses.fields(self) if f.init}
        if not isinstance(self.betas, str):
            shown["betas"] = f"<{self.T} numbers>"
        return f"DDPM({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def time(self, step: int | Tensor) -> Tensor:
        """The time t = (k + 1)/T of the integer step k, in float64.

        Raises:
            TimeOutOfRange: if k is outside 0 … T − 1.
        """
        k = torch.as_tensor(step)
        if bool(((k < 0) | (k >= self.T)).any()):
            raise TimeOutOfRange(f"steps run from 0 to {self.T - 1}, found {k.flatten().tolist()[:4]}.")
        return (k.to(torch.float64) + 1) / self.T

    def step(self, t: Time) -> Tensor:
        """The integer step k = tT − 1 (int64) of a time that lies on a step.

        Raises:
            TimeOutOfRange: if a time lies between two steps, or is t = 0.
        """
        position = as_time(t) * self.T - 1
        k = position.round()
        off = (position - k).abs() > 1e-4  # float32 times are exact to 1e-7·T
        if bool((off | (k < 0)).any()):
            bad = as_time(t)[off | (k < 0)].flatten()[0].item()
            raise TimeOutOfRange(
                f"t = {bad:g} is not a step of this table of {self.T}; steps stand at t = 1/{self.T}, "
                f"2/{self.T}, …, 1. Use times on the steps, or time='t'."
            )
        k = k.to(torch.int64)
        return k.to(t.device) if isinstance(t, Tensor) else k

    def on_steps(self, t: Tensor, high: float = 1.0) -> Tensor:
        """Times rounded up to the next step, but not beyond ``high``; uniform times become uniform steps."""
        last = max(1, math.floor(high * self.T + 1e-4))
        return (as_time(t) * self.T - 1e-4).ceil().clamp(1, last) / self.T

    def _at(self, t: Tensor, which: int) -> Tensor:
        table = self._angles[which]
        low, weight = self._interval(t)
        return torch.lerp(table[low], table[low + 1], weight)

    def _interval(self, t: Tensor) -> tuple[Tensor, Tensor]:
        position = t * self.T
        # A time meant to be on a step but a rounding above it belongs to the interval that ends there.
        low = ((position - 1e-4).ceil() - 1).clamp(0, self.T - 1)
        return low.to(torch.int64), position - low

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.sin(self._at(t, 1))

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sin(self._at(t, 0))

    def _speed(self, t: Tensor) -> Tensor:
        low, _ = self._interval(t)
        return (self._angles[0][low + 1] - self._angles[0][low]) * self.T

    def _alpha_dot(self, t: Tensor) -> Tensor:
        return -self._sigma(t) * self._speed(t)

    def _sigma_dot(self, t: Tensor) -> Tensor:
        return self._alpha(t) * self._speed(t)

    def _time_at(self, log_snr: Tensor) -> Tensor:
        angle = torch.atan(torch.exp(-log_snr / 2))
        last = self._angles[0][-1]
        if bool((angle > last * (1 + 1e-12)).any()):
            lowest = self._log_snr(torch.ones((), dtype=torch.float64)).item()
            raise TimeOutOfRange(
                f"log-SNR {log_snr.min().item():g} lies below {lowest:.4f}, the lowest this DDPM table "
                "reaches (at t = 1): it never becomes pure noise."
            )
        angle = angle.clamp(max=last)
        low = (torch.searchsorted(self._angles[0], angle) - 1).clamp(0, self.T - 1)
        start, end = self._angles[0][low], self._angles[0][low + 1]
        return (low + (angle - start) / (end - start)) / self.T


def _numbers(betas: Any, T: int) -> tuple[float, ...]:
    """A table of the user's own, checked; a tuple, so that the schedule can be hashed."""
    try:
        table = torch.as_tensor(betas, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as e:
        raise Unsupported(f"betas is the name of a table or a list of numbers, found {betas!r}.") from e
    if table.shape != (T,):
        raise Unsupported(f"betas has shape {list(table.shape)}, and T = {T}; give T numbers, and T beside them.")
    if not bool((table > 0).all() and (table[:-1] < 1).all() and table[-1] <= 1):
        raise Unsupported("betas must lie in (0, 1), of which the last may be 1.")
    return tuple(table.tolist())


@dataclass(frozen=True)
class VE(Schedule):
    """α = 1 and σ = σ_min sqrt(r^(2t) − 1), r = σ_max/σ_min: noise is added, data are kept.

    The marginal of the variance-exploding SDE (Song et al., arXiv 2011.13456, eq. 31): from
    exact data at t = 0 to nearly σ_max at t = 1, geometrically once above σ_min.

    Args:
        sigma_min, sigma_max: 0 < sigma_min < sigma_max, in units of the data.
    """

    name: ClassVar[str] = "ve"
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise Unsupported(f"ve needs 0 < sigma_min < sigma_max, found {self.sigma_min!r} and {self.sigma_max!r}.")

    @property
    def _rate(self) -> float:
        return 2 * math.log(self.sigma_max / self.sigma_min)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.expm1(self._rate * t).sqrt()

    def _alpha_dot(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _sigma_dot(self, t: Tensor) -> Tensor:
        return self.sigma_min**2 * self._rate / 2 * torch.exp(self._rate * t) / self._sigma(t)

    def _time_at(self, log_snr: Tensor) -> Tensor:
        t = torch.log1p(torch.exp(-log_snr) / self.sigma_min**2) / self._rate
        return _within_reach(t, log_snr, self)


@dataclass(frozen=True)
class Path(Schedule):
    """A schedule from two functions of t, α and σ.

    Args:
        alpha, sigma: formulas in t such as "cos(pi*t/2)" (:mod:`reparam.expressions`), or
            functions from float64 tensors to float64 tensors, which cannot be written to a spec.
            α must fall and σ rise from σ(0) = 0.
        alpha_dot, sigma_dot: their derivatives; by automatic differentiation if not given.

    Raises:
        Unsupported: if they are not finite on [0, 1], σ(0) is not 0, or the log-SNR does not fall.
    """

    name: ClassVar[str] = "path"
    alpha_of: str | Callable[[Tensor], Tensor]
    sigma_of: str | Callable[[Tensor], Tensor]
    alpha_dot_of: str | Callable[[Tensor], Tensor] | None = None
    sigma_dot_of: str | Callable[[Tensor], Tensor] | None = None
    _read: dict[str, Callable[[Tensor], Tensor]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        entries = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        object.__setattr__(self, "_read", {k: _of_time(e) for k, e in entries.items() if e is not None})
        t = torch.linspace(0, 1, 1025, dtype=torch.float64)
        alpha, sigma = self._alpha(t), self._sigma(t)
        if not bool((alpha.isfinite() & sigma.isfinite()).all()):
            raise Unsupported(f"{self}: alpha and sigma must be finite on [0, 1].")
        if sigma[0] != 0 or not alpha[0] > 0:
            raise Unsupported(
                f"{self}: at t = 0, the data, sigma must be 0 and alpha positive; found {sigma[0]:g} and {alpha[0]:g}."
            )
        if not bool((self._log_snr(t).diff() < 0).all()):
            raise Unsupported(f"{self}: alpha/sigma must fall all the way from t = 0 to t = 1.")

    def config(self) -> dict[str, Any]:
        found = {k: v for k, v in super().config().items() if v is not None}
        if any(callable(v) for v in found.values()):
            raise Unsupported(
                "a schedule made of functions cannot be written down; give formulas, for example "
                "Path('cos(pi*t/2)', 'sin(pi*t/2)')."
            )
        return found

    def _alpha(self, t: Tensor) -> Tensor:
        return self._read["alpha_of"](t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self._read["sigma_of"](t)

    def _alpha_dot(self, t: Tensor) -> Tensor:
        return self._derivative("alpha", t)

    def _sigma_dot(self, t: Tensor) -> Tensor:
        return self._derivative("sigma", t)

    def _derivative(self, which: str, t: Tensor) -> Tensor:
        given = self._read.get(f"{which}_dot_of")
        if given is not None:
            return given(t)
        with torch.enable_grad():
            at = t.detach().requires_grad_()
            value = self._read[f"{which}_of"](at)
            return torch.autograd.grad(value.sum(), at)[0] if value.requires_grad else torch.zeros_like(t)

    def _time_at(self, log_snr: Tensor) -> Tensor:
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(80):
            middle = (low + high) / 2
            later = self._log_snr(middle) > log_snr
            low, high = torch.where(later, middle, low), torch.where(later, high, middle)
        end = self._log_snr(torch.ones((), dtype=torch.float64))
        return _within_reach(torch.where(log_snr < end, torch.inf, high), log_snr, self)


def _of_time(entry: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if isinstance(entry, str):
        formula = parsed(entry, ["t"])
        return lambda t: formula({"t": t})
    if not callable(entry):
        raise ReparamError(f"path: expected a formula in t or a function of t, found {entry!r}.")
    return lambda t: entry(t) + torch.zeros_like(t)


def _within_reach(t: Tensor, log_snr: Tensor, s: Schedule) -> Tensor:
    """Times found for log-SNRs, checked to lie on the schedule; a rounding beyond its end is its end."""
    if bool((t > 1 + 1e-12).any()):
        lowest = s._log_snr(torch.ones((), dtype=torch.float64)).item()
        raise TimeOutOfRange(f"log-SNR {log_snr.min().item():g} lies below {lowest:.4f}, the lowest that {s} reaches.")
    return t.clamp(max=1)


@dataclass(frozen=True)
class Elementwise(Schedule):
    """Noise that differs by element: σ(t) = scale · σ of another schedule.

    Coefficients with σ in them have the shape [B or 1, …] of data; α and ``log_snr`` are the
    other schedule's, the noise level's name. In units of the scale it is that schedule exactly.

    Args:
        base: the other schedule.
        scale: positive, of the shape of one sample (or one that broadcasts against it): a tensor,
            or nested lists of numbers.
    """

    name: ClassVar[str] = "elementwise"
    base: Schedule
    scale: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", schedule(self.base))
        scale = _float64_tensor(self.scale)
        if scale.ndim == 0 or not bool(((scale > 0) & scale.isfinite()).all()):
            raise Unsupported("elementwise: scale must be an array of positive numbers, of the shape of one sample.")
        object.__setattr__(self, "scale", scale)

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Elementwise) and self.base == other.base
        return same and torch.equal(self.scale, other.scale)  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((self.base, tuple(self.scale.shape)))

    @property
    def smooth(self) -> bool:  # type: ignore[override]
        """As the other schedule."""
        return self.base.smooth

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "base": self.base.config(), "scale": self.scale.tolist()}

    def _spread(self, c: Tensor) -> Tensor:
        return c.reshape(c.shape or (1,)).reshape(-1, *[1] * self.scale.ndim) * self.scale

    def _alpha(self, t: Tensor) -> Tensor:
        return self.base._alpha(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self._spread(self.base._sigma(t))

    def _alpha_dot(self, t: Tensor) -> Tensor:
        return self.base._alpha_dot(t)

    def _sigma_dot(self, t: Tensor) -> Tensor:
        return self._spread(self.base._sigma_dot(t))

    def _log_snr(self, t: Tensor) -> Tensor:
        return self.base._log_snr(t)

    def _time_at(self, log_snr: Tensor) -> Tensor:
        return self.base._time_at(log_snr)


def _float64_tensor(value: Any) -> Tensor:
    try:
        return torch.as_tensor(value).detach().to("cpu", torch.float64)
    except (TypeError, ValueError) as e:
        raise Unsupported(f"elementwise: scale must be an array of numbers, found {value!r}.") from e


SCHEDULES: dict[str, type[Schedule]] = {s.name: s for s in (RectifiedFlow, Cosine, DDPM, VE, Path, Elementwise)}


def schedule(which: str | dict[str, Any] | Schedule) -> Schedule:
    """A schedule by name, or by a mapping of its name and arguments, or itself.

    Raises:
        UnknownName: if no schedule has that name, or it has no such argument.
    """
    if isinstance(which, Schedule):
        return which
    return build("schedule", SCHEDULES, which)


def config_of(thing: Any) -> dict[str, Any]:
    """The name and the arguments of a schedule, target or the like, as plain data."""
    arguments: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
    return {"name": thing.name, **{f.name: getattr(thing, f.name) for f in arguments if f.init}}


def build(kind: str, classes: dict[str, Any], which: str | dict[str, Any]) -> Any:
    """The object that a name, or a mapping ``{name: …, argument: …}``, stands for."""
    arguments = {"name": which} if isinstance(which, str) else dict(which)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in classes:
        raise unknown(kind, name, classes)
    known = {f.name: f for f in dataclasses.fields(classes[name]) if f.init}
    for key in arguments:
        if key not in known:
            raise unknown(f"argument of {kind} {name!r}", key, known)
    absent = (dataclasses.MISSING, dataclasses.MISSING)
    needed = [key for key, f in known.items() if (f.default, f.default_factory) == absent and key not in arguments]
    if needed:
        raise ReparamError(
            f"{kind} {name!r} needs {' and '.join(needed)}, for example {{name: {name}, {needed[0]}: …}}."
        )
    return classes[name](**arguments)
