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
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import TimeOutOfRange, Unsupported, unknown

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
        return like(self._alpha(t64), x0) * x0 + like(self._sigma(t64), eps) * eps

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


@dataclass(frozen=True)
class DDPM(Schedule):
    """The discrete process of DDPM, made continuous.

    The integer step k (0 … T − 1) of the table stands at t = (k + 1)/T; t = 0 is the exact
    data, one step before the table. Between steps the angle atan2(σ, α) is linear in t, so
    α² + σ² = 1 everywhere. Derivatives are those of the interval that ends at t.

    Args:
        betas: "linear", from 1e-4 to 0.02 (Ho et al., arXiv 2006.11239, section 4).
        T: the number of steps.
    """

    name: ClassVar[str] = "ddpm"
    smooth: ClassVar[bool] = False
    betas: str = "linear"
    T: int = 1000
    # Angle from the data, and from the noise, at t = 0, 1/T, …, 1: both are kept because
    # each is exact at its own end.
    _angles: tuple[Tensor, Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.betas != "linear":
            raise unknown("beta table", self.betas, ["linear"])
        if not (isinstance(self.T, int) and self.T >= 2):
            raise Unsupported(f"T must be an integer of at least 2, found {self.T!r}.")
        betas = torch.linspace(1e-4, 0.02, self.T, dtype=torch.float64)
        log_signal = torch.log1p(-betas).cumsum(0)  # log of the product of 1 − β
        alpha = torch.cat([torch.ones(1, dtype=torch.float64), (log_signal / 2).exp()])
        sigma = torch.cat([torch.zeros(1, dtype=torch.float64), (-torch.expm1(log_signal)).sqrt()])
        object.__setattr__(self, "_angles", (torch.atan2(sigma, alpha), torch.atan2(alpha, sigma)))

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


SCHEDULES: dict[str, type[Schedule]] = {s.name: s for s in (RectifiedFlow, Cosine, DDPM)}


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
    known = {f.name for f in dataclasses.fields(classes[name]) if f.init}
    for key in arguments:
        if key not in known:
            raise unknown(f"argument of {kind} {name!r}", key, known)
    return classes[name](**arguments)
