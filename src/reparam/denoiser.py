"""Any network, seen as what it knows of x0 given x_t.

A network is any ``nn.Module`` called as ``net(x, time, **cond)``. How it wants its time and
its input, what it predicts and where it was trained are stated once, in
:class:`Conventions`; :class:`Denoiser` turns the network into the posterior of x0.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .confidence import Gaussian, prediction
from .errors import NetworkError, ReparamError, SingularTime, TimeOutOfRange, Unsupported, unknown
from .schedules import DDPM, Schedule, Time, as_time, like, schedule
from .targets import X0, Target, coefficients
from .targets.core import aligned


class Posterior(NamedTuple):
    """What is known of x0 given x_t.

    Attributes:
        mean: E[x0 | x_t], shape [B, …].
        var: Var[x0 | x_t] by element, where the model has one.
        root: a square root A of the covariance A Aᵀ, shape [B, D, D], where that is full.
    """

    mean: Tensor
    var: Tensor | None = None
    root: Tensor | None = None


#: Numbers below which a pass over the data costs less than setting up a better one.
_SMALL = 4096

#: A number, or of an elementwise schedule a float64 tensor of the data's shape.
Coefficient = float | Tensor

#: Numbers that an elementwise coefficient may have over a whole grid, to be kept on the device.
_MOST = 2**24


class Estimate:
    """E[x0 | x_t] = a x_t + b y, with the sum left undone until it is asked for.

    A sampler that goes on to k x_t + c E[x0 | x_t] needs two passes over the data instead of
    four, and loses nothing to the cancellation between a x_t and b y.
    """

    __slots__ = ("_mean", "a", "b", "root", "var", "x", "y")

    def __init__(self, x: Tensor, a: Coefficient, b: Coefficient, y: Tensor) -> None:
        self.x, self.a, self.b, self.y = x, a, b, y
        self._mean: Tensor | None = None
        #: As of the posterior.
        self.var: Tensor | None = None
        self.root: Tensor | None = None

    @classmethod
    def of(cls, posterior: Posterior, x: Tensor) -> Estimate:
        """The estimate that a posterior at ``x`` states."""
        found = cls(x, 0.0, 1.0, posterior.mean)
        found._mean, found.var, found.root = posterior
        return found

    @property
    def mean(self) -> Tensor:
        """E[x0 | x_t], shape [B, …]."""
        if self._mean is None:
            self._mean = weighted(self.a, self.x, self.b, self.y)
        return self._mean

    def blend(self, k: Coefficient, c: Coefficient) -> Tensor:
        """k x_t + c E[x0 | x_t], a new tensor."""
        return weighted(k + c * self.a, self.x, c * self.b, self.y)


def weighted(a: Coefficient, x: Tensor, b: Coefficient, y: Tensor) -> Tensor:
    """a x + b y, a new tensor, without the passes that a coefficient of 0 or 1 saves."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return matched(a, x) * x + matched(b, x) * y
    if b == 0:
        return x * a
    if a == 0:
        return y * b
    if a == 1:
        return torch.add(x, y, alpha=b)
    if x.numel() < _SMALL or x.shape != y.shape or not (x.is_contiguous() and y.is_contiguous()):
        return torch.mul(x, a).add_(y, alpha=b)
    if torch.is_autocast_enabled(x.device.type):  # which casts what addr is given
        return torch.mul(x, a).add_(y, alpha=b)
    # The one element-wise kernel with a factor on either side: a pass over the data less.
    return torch.addr(x.view(-1, 1), y.view(-1), x.new_ones(1), beta=a, alpha=b).view(x.shape)


def matched(c: Coefficient, x: Tensor) -> Coefficient:
    """A coefficient of x's device and dtype, if it is a tensor."""
    return c.to(device=x.device, dtype=x.dtype, non_blocking=True) if isinstance(c, Tensor) else c


def resident(c: Coefficient, device: torch.device, times: int) -> Coefficient:
    """A coefficient, one of so many on a grid, on the device, so that no step has to move it.

    They stay on the host where there is no float64 (MPS), and where they would take much of the device's memory.
    """
    if not isinstance(c, Tensor) or device.type == "mps" or c.numel() * times > _MOST:
        return c
    return c.to(device)


def _step(t: Tensor, s: Schedule) -> Tensor:
    if not isinstance(s, DDPM):
        raise Unsupported(f"time='step' needs a schedule with integer steps (ddpm), found {s}.")
    return s.step(t)


#: How a network wants its time, from t in [0, 1].
TIME_CONVENTIONS: dict[str, Callable[[Tensor, Schedule], Tensor]] = {
    "t": lambda t, s: t,
    "1-t": lambda t, s: 1 - t,
    "1000t": lambda t, s: 1000 * t,
    "step": _step,
    "log_snr": lambda t, s: s.log_snr(t),
    "log_sigma/4": lambda t, s: -s.log_snr(t) / 8,  # log of σ/α, as EDM counts noise
}


def _to_unit_variance(t: Tensor, s: Schedule, sigma_data: float) -> Tensor:
    alpha, sigma = aligned(t, s.alpha(t), s.sigma(t))
    return 1 / torch.hypot(alpha * sigma_data, sigma)


#: The factor on x_t before the network sees it.
INPUT_CONVENTIONS: dict[str, Callable[[Tensor, Schedule, Target], Tensor] | None] = {
    "none": None,
    "unit_variance": lambda t, s, kind: _to_unit_variance(t, s, 1.0),
    "edm": lambda t, s, kind: _to_unit_variance(t, s, kind.sigma_data),  # type: ignore[attr-defined]
}


@dataclass(frozen=True)
class Conventions:
    """What a network predicts, under which forward process, and how it is called.

    Args:
        schedule: the forward process, an object, a name or a mapping.
        target: what the network predicts, likewise; or a likelihood over that (:class:`reparam.Gaussian`).
        time: how it wants its time: "t", "1-t", "1000t", "step" (int64), "log_snr" or
            "log_sigma/4" (EDM's c_noise, of σ/α).
        input: how x_t is scaled: "none"; "unit_variance", divided by sqrt(α² + σ²), of unit variance for
            such data; or "edm", divided by sqrt(α² σ_d² + σ²) with σ_d that of the target EDM: its c_in.
        t_range: where it is trained, and where sampling starts.

    Raises:
        UnknownName: if a name is not known.
        TimeOutOfRange: if t_range is not two increasing numbers in [0, 1].
        SingularTime: if x0 does not follow from the prediction somewhere in t_range.
    """

    schedule: Schedule
    target: Target
    time: str = "t"
    input: str = "none"
    t_range: tuple[float, float] = (0.0, 1.0)
    #: How sure the network says it is, or None: what was given as ``target`` where that is a likelihood.
    likelihood: Gaussian | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", schedule(self.schedule))
        predicted = prediction(self.target)
        if isinstance(predicted, Gaussian):
            predicted.check(self.schedule)
            object.__setattr__(self, "likelihood", predicted)
            predicted = predicted.target
        object.__setattr__(self, "target", predicted)
        if self.time not in TIME_CONVENTIONS:
            raise unknown("time convention", self.time, TIME_CONVENTIONS)
        if self.input not in INPUT_CONVENTIONS:
            raise unknown("input convention", self.input, INPUT_CONVENTIONS)
        if self.input == "edm" and not hasattr(self.target, "sigma_data"):
            raise Unsupported(
                f"input='edm' takes sigma_data from the target edm, and the target is {self.target.name}; give "
                "target {name: edm, sigma_data: …}, or input='unit_variance'."
            )
        if self.time == "step" and not isinstance(self.schedule, DDPM):
            raise Unsupported(f"time='step' needs a schedule with integer steps (ddpm), found {self.schedule}.")
        try:
            low, high = (float(v) for v in self.t_range)
        except (TypeError, ValueError) as e:
            raise TimeOutOfRange(f"t_range is two increasing numbers in [0, 1], found {self.t_range!r}.") from e
        object.__setattr__(self, "t_range", (low, high))
        if not 0 <= low < high <= 1:
            raise TimeOutOfRange(f"t_range is two increasing numbers in [0, 1], found [{low:g}, {high:g}].")
        if self.target.on_steps and self.time != "step":
            raise Unsupported(
                f"the target {self.target.name} is defined on integer steps alone, and time={self.time!r} draws times "
                "between them; give time='step' (in a recipe time: step, with schedule: ddpm)."
            )
        if singular := self.target.singular_times(self.schedule, self.t_range):
            raise SingularTime(
                f"a network that predicts {self.target.name} cannot be turned into x0 at "
                f"t = {', '.join(f'{t:g}' for t in singular[:4])} under {self.schedule}, inside "
                f"t_range = [{low:g}, {high:g}]. Leave that time out, for example t_range: "
                f"{suggested(low, high, singular)}, or predict x0, v or velocity instead."
            )

        if self.time != "step" and not bool(self.network_time(as_time(high)).isfinite()):
            raise SingularTime(
                f"time={self.time!r} is infinite at t = {high:g} under {self.schedule}; end t_range before it, for "
                f"example {suggested(low, high, [high])}, or give the network its time as 't'."
            )

    def network_time(self, t: Tensor) -> Tensor:
        """The time as the network wants it; float64 (int64 for "step"), shape of t."""
        return TIME_CONVENTIONS[self.time](t, self.schedule)

    def predicted(self) -> Target | Gaussian:
        """The target, or the likelihood over it: what :class:`Conventions` takes as ``target``."""
        return self.target if self.likelihood is None else replace(self.likelihood, target=self.target)

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The network's prediction at x_t [B, …] and float64 times t (scalar or [B]), checked and cast up.

        Returns:
            The prediction, of x_t's shape; and what the network says of its covariance, under a likelihood.

        Raises:
            NetworkError: if the output has not the shape of x_t, or that which a likelihood needs.
        """
        scale = INPUT_CONVENTIONS[self.input]
        x = x_t if scale is None else like(scale(t, self.schedule, self.target), x_t) * x_t
        time = self.network_time(t)
        dtype = time.dtype if time.dtype == torch.int64 else x_t.dtype
        return self._answer(net, x, time.to(device=x_t.device, dtype=dtype, non_blocking=True), x_t, cond)

    def _answer(
        self, net: nn.Module, x: Tensor, time: Tensor, x_t: Tensor, cond: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        y = net(x, time.expand(x_t.shape[0]), **cond)
        if self.likelihood is not None:
            return self.likelihood.split(y, x_t, type(net).__name__)
        if not isinstance(y, Tensor) or y.shape != x_t.shape:
            found = f"shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise NetworkError(
                f"{type(net).__name__} returned {found} for an input of shape {list(x_t.shape)}; a network "
                f"that predicts {self.target.name} returns a tensor of its input's shape."
            )
        return y.to(x_t.dtype) if y.dtype != x_t.dtype else y, None

    def table(self, times: Sequence[float], x: Tensor) -> dict[float, _Entry]:
        """What a network is called with, and what is made of its answer, at every one of ``times`` for such x [B, …].

        Empty for a target that has its own way to x0, for variances, for elementwise coefficients that cannot be
        kept on the device, and where a time is singular: such are left to the general way, which also has the
        error to raise.
        """
        kind = type(self.target)
        if kind.to_x0 is not Target.to_x0 or kind.apply is not Target.apply or self.likelihood is not None:
            return {}
        t = as_time(torch.tensor(times, dtype=torch.float64))
        if self.schedule.sigma(t[:1]).numel() * len(times) > _MOST:
            return {}
        try:
            a, b = coefficients(self.target, X0(), t, self.schedule)
            time = self.network_time(t)
        except ReparamError:
            return {}
        scale = INPUT_CONVENTIONS[self.input]
        scales = None if scale is None else scale(t, self.schedule, self.target)
        columns = [_by_time(c, len(times), x) for c in (scales, a, b)]
        if not all(columns):
            return {}
        at = time.to(device=x.device, dtype=time.dtype if time.dtype == torch.int64 else x.dtype).unbind()
        return dict(zip(times, map(_Entry, at, *columns), strict=True))

    def look_up(self, entry: _Entry, net: nn.Module, x_t: Tensor, cond: Mapping[str, Any]) -> Estimate:
        """The estimate at a time of the table."""
        x = x_t if entry.scale is None else x_t * matched(entry.scale, x_t)
        y, _ = self._answer(net, x, entry.time, x_t, cond)
        return Estimate(x_t, entry.a, entry.b, y)


class _Entry(NamedTuple):
    """One time of a table: as the network wants it, the factor on its input, and x0 = a x_t + b y."""

    time: Tensor
    scale: Coefficient | None
    a: Coefficient
    b: Coefficient


def _by_time(c: Tensor | None, count: int, x: Tensor) -> list[Any]:
    """A coefficient [count], or elementwise [count or 1, …], an entry a time; empty where it stays on the host."""
    if c is None:
        return [None] * count
    if c.shape == (count,):
        return c.tolist()
    if x.device.type == "mps" or c.ndim < 2 or c.shape[0] not in (1, count):
        return []
    whole = c.reshape(c.shape + (1,) * (x.ndim - c.ndim)).to(x.device)
    return list(whole.expand(count, *whole.shape[1:]).split(1))


def suggested(low: float, high: float, singular: list[float]) -> str:
    """The range without its singular times, for a message."""
    if singular == [high]:
        return f"[{low:g}, {high - 0.02 * (high - low):g}]"
    if singular == [low]:
        return f"[{low + 0.02 * (high - low):g}, {high:g}]"
    return "a range without it"


class Denoiser(nn.Module):
    """A network as the posterior of x0 given x_t.

    Args:
        net: called as ``net(x, time, **cond)``.
        schedule, target, time, input, t_range: see :class:`Conventions`.
        data: what is known of the data it was trained on (shape, normalisation, σ_data),
            plain data that travels with the weights.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule | str | dict[str, Any],
        target: Target | Gaussian | str | dict[str, Any],
        *,
        time: str = "t",
        input: str = "none",
        t_range: tuple[float, float] = (0.0, 1.0),
        data: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.conventions = Conventions(schedule, target, time, input, t_range)  # type: ignore[arg-type]
        self.data = data
        #: How it was trained, where that is known: part of the spec, not of the mathematics.
        self.training_record: dict[str, Any] | None = None
        #: What a user said otherwise than the file that it was loaded from; likewise.
        self.overrides: dict[str, Any] | None = None

    @property
    def plain(self) -> bool:
        """Whether this is a network under its conventions, and not one that asks another denoiser."""
        return type(self).forward is Denoiser.forward

    @property
    def schedule(self) -> Schedule:
        """The forward process the network was trained under."""
        return self.conventions.schedule

    @property
    def target(self) -> Target:
        """What the network predicts."""
        return self.conventions.target

    @property
    def t_range(self) -> tuple[float, float]:
        """Where the network was trained, and where sampling starts."""
        return self.conventions.t_range

    def forward(self, x_t: Tensor, t: Time, **cond: Any) -> Posterior:
        """The posterior of x0 given ``x_t`` of shape [B, …] at ``t``, a scalar or of shape [B].

        Raises:
            SingularTime: where x0 does not follow from the prediction.
            NetworkError: if the network returns something of another shape.
        """
        x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        if (entry := self._entry(x_t, t)) is not None:
            return Posterior(self.conventions.look_up(entry, self.net, x_t, cond).mean)
        t64 = as_time(t)
        y, rest = self.conventions.call(self.net, x_t, t64, cond)
        mean = self.target.to_x0(y, x_t, t64, self.schedule)
        likelihood = self.conventions.likelihood
        if rest is None or likelihood is None or likelihood.of != "x0":
            return Posterior(mean)
        return Posterior(mean, *likelihood.covariance_of(rest, x_t, t64, self.schedule))

    def log_prob(self, x: Tensor, x_t: Tensor, t: Time, **cond: Any) -> Tensor:
        """The log-likelihood of ``x`` given ``x_t``, both [B, …], at ``t``, a scalar or of shape [B]; nats, shape [B].

        Of a likelihood of "x0", x is clean data; of one of "noisy" it is another noisy sample of the same data,
        in the units of x_t.

        Raises:
            Unsupported: if the model has no likelihood.
        """
        likelihood = self.conventions.likelihood
        if likelihood is None:
            raise Unsupported(
                f"this model predicts {self.target.name} alone, without a variance; train it with "
                f"rp.Gaussian({self.target.name!r}), or attach one (reparam train --add-confidence)."
            )
        x_t, t64 = x_t.to(torch.promote_types(x_t.dtype, torch.float32)), as_time(t)
        y, rest = self.conventions.call(self.net, x_t, t64, cond)
        mean = self.target.to_x0(y, x_t, t64, self.schedule)
        if likelihood.of == "noisy":
            mean = like(self.schedule.alpha(t64), mean) * mean
        assert rest is not None
        return normal_log_prob(x - mean, *likelihood.covariance_of(rest, x_t, t64, self.schedule))

    def on(self, schedule: Schedule | str | dict[str, Any]) -> Denoiser:
        """The same network under another forward process, matched by log-SNR and exact: nothing is trained.

        Raises:
            Unsupported: if the noise of either process differs by element.
        """
        from .guidance import Rescheduled  # which wraps denoisers

        return Rescheduled(self, schedule)

    #: Coefficients at the times of a grid, inside :func:`prepared`; with the device and dtype of its time.
    _table: tuple[dict[float, _Entry], torch.device, torch.dtype] | None = None

    def _entry(self, x_t: Tensor, t: Time) -> _Entry | None:
        if self._table is None:
            return None
        entries, device, dtype = self._table
        if isinstance(t, Tensor):
            if t.ndim or t.device.type != "cpu":
                return None
            t = t.item()
        return entries.get(t) if x_t.dtype == dtype and x_t.device == device else None


def normal_log_prob(deviation: Tensor, var: Tensor, root: Tensor | None = None) -> Tensor:
    """log N(deviation; 0, covariance), [B], of deviations [B, …] under variances by element, or a full
    covariance's triangular root [B, D, D]."""
    half_log_2pi = math.log(2 * math.pi) / 2
    if root is None:
        each = -deviation.square() / (2 * var) - var.log() / 2 - half_log_2pi
        return each.flatten(1).sum(1)
    z = torch.linalg.solve_triangular(root, deviation[..., None], upper=True)[..., 0]
    log_volume = root.diagonal(dim1=1, dim2=2).log().sum(1)
    return -z.square().sum(1) / 2 - log_volume - half_log_2pi * deviation.shape[1]


def estimate(denoiser: Denoiser, x_t: Tensor, t: float, cond: Mapping[str, Any]) -> Estimate:
    """The posterior mean at ``x_t`` [B, …] and ``t``, left unsummed where the denoiser is a plain one with a table."""
    if type(denoiser).forward is Denoiser.forward and not _watched(denoiser):
        entry = denoiser._entry(x_t, t)
        if entry is not None:
            return denoiser.conventions.look_up(entry, denoiser.net, x_t, cond)
    return Estimate.of(denoiser(x_t, t, **cond), x_t)


def _watched(module: nn.Module) -> bool:
    """Somebody relies on forward being called: by a hook, or by having replaced it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


@contextlib.contextmanager
def prepared(module: nn.Module, times: Sequence[float], x: Tensor) -> Iterator[None]:
    """Inside, every plain denoiser in ``module`` has its coefficients at ``times`` in a table.

    They are computed once, in float64 on the CPU; a step then transfers nothing and waits for
    nothing. Denoisers answer alike at all other times, and with all other kinds of ``x``.
    """
    plain = [m for m in module.modules() if isinstance(m, Denoiser) and type(m).forward is Denoiser.forward]
    before = [m._table for m in plain]
    try:
        for m in plain:
            m._table = (m.conventions.table(times, x), x.device, x.dtype)
        yield
    finally:
        for m, table in zip(plain, before, strict=True):
            m._table = table


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Any:
    """Evaluation mode and no gradients inside; every submodule's own mode afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield module
    finally:
        for m, mode in modes:
            m.training = mode
