r"""A network whose output is stated as another target: the same function of x_t, and nothing is trained.

What a network predicts and x_t determine any other linear target (:mod:`reparam.targets.core`),

.. math:: y' = a(t)\, x_t + b(t)\, y ,

so that an affine map around the network is a network for that target. The time it is called with is turned back
into t, and the scaling of its input undone, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import schedules
from ..denoiser import INPUT_CONVENTIONS, TIME_CONVENTIONS, Conventions
from ..errors import NetworkError, ReparamError, SpecError, Unsupported, unknown
from ..files import read_tensors
from ..schedules import DDPM, Schedule, like
from ..targets import Target, aligned, coefficients, combined, target
from .confident import _made


def _of_step(k: Tensor, s: Schedule) -> Tensor:
    assert isinstance(s, DDPM)
    return s.time(k)


def _of_log_snr(log_snr: Tensor, s: Schedule) -> Tensor:
    """The time of a log-SNR; one that float32 rounded beyond an end is that end."""
    last, first = s.log_snr(torch.tensor(1.0, dtype=torch.float64)), s.log_snr(torch.tensor(0.0, dtype=torch.float64))
    below = (log_snr < last) & (log_snr >= last - 1e-6 * (1 + last.abs()))
    above = (log_snr > first) & (log_snr <= first + 1e-6 * (1 + first.abs()))
    return s.time_at(torch.where(below, last, torch.where(above, first, log_snr)))


#: t from the time as a network wants it: the inverses of :data:`reparam.denoiser.TIME_CONVENTIONS`, float64.
INVERSES: dict[str, Callable[[Tensor, Schedule], Tensor]] = {
    "t": lambda time, s: time,
    "1-t": lambda time, s: 1 - time,
    "1000t": lambda time, s: time / 1000,
    "step": _of_step,
    "log_snr": _of_log_snr,
    "log_sigma/4": lambda time, s: _of_log_snr(-8 * time, s),
}


class Reexpressed(nn.Module):
    """A network that predicts ``source``, as one that predicts ``to``.

    Outputs beyond the first ones, of x's size, are those of a likelihood. They are about x0 and pass through.
    Weights stand under ``of.``. Gradients flow through the affine map, to the network and to x.

    Args:
        of: the network's config, such as ``{name: mlp, dim: 2}``, or the network, which is taken as it is.
        schedule: the forward process.
        source: what ``of`` predicts. to: what this network predicts. Both linear.
        time, input: how ``of`` wants its time and its input (:class:`reparam.Conventions`); this network wants
            its time likewise.
        scales: whether x comes as x_t and is scaled here; else it comes scaled as ``of`` wants it.
        weights: a .safetensors file with the weights of ``of``, or of a network such as this one around it. Not part
            of ``config``: once saved, they travel with it.

    Raises:
        UnknownName: if a name is not known.
        NetworkError: if ``of`` is no network, or the weights do not fit it.
        SpecError: if a target names code to run.
        Unsupported: if a target is not linear, or the two have two different bases.
    """

    def __init__(
        self,
        of: Any,
        schedule: Any,
        source: Any,
        to: Any,
        time: str = "t",
        input: str = "none",
        scales: bool = False,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.of = _made(of, "of", "reexpressed")
        self.schedule: Schedule = _read("schedule", schedules.schedule, schedule)
        self.source: Target = _read("source", linear_target, source)
        self.wanted: Target = _read("to", linear_target, to)
        self.time, self.input, self.scales = time, input, scales
        for what, name, known in (("time", time, TIME_CONVENTIONS), ("input", input, INPUT_CONVENTIONS)):
            if not isinstance(name, str) or name not in known:
                raise unknown(f"{what} convention", name, known)
        if not isinstance(scales, bool):
            raise NetworkError(f"reexpressed: scales is true or false, found {scales!r}.")
        _refuse_two_bases(self.source, self.wanted)
        if weights is not None:
            _fill(self.of, weights)

    @property
    def config(self) -> dict[str, Any]:
        """The network as plain data; ``of`` is None where that is not built in.

        Raises:
            Unsupported: if a target is made of functions.
        """
        from . import config_of

        return {
            "name": "reexpressed",
            "of": config_of(self.of),
            "schedule": self.schedule.config(),
            "source": self.source.config(),
            "to": self.wanted.config(),
            "time": self.time,
            "input": self.input,
            "scales": self.scales,
        }

    def stands_under(self, c: Conventions) -> bool:
        """Whether these conventions are the ones that this network answers to."""
        given = "none" if self.scales else self.input
        return (c.schedule, c.target, c.time, c.input) == (self.schedule, self.wanted, self.time, given)

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """The prediction of ``to``, and the rest of the network's outputs, shape [B, …].

        Args:
            x: shape [B, …]. time: shape [B]. cond: what the network is given besides.

        Raises:
            SingularTime: where ``to`` does not follow from ``source``.
            NetworkError: if the network returns something of another shape.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        t = self._t(time)
        scale = INPUT_CONVENTIONS[self.input]
        factor = None if scale is None else scale(t, self.schedule, self.source)
        out = self.of(like(factor, x) * x if self.scales and factor is not None else x, time, **cond)
        self._check(out, x)
        out = out.to(x.dtype)
        a, b = coefficients(self.source, self.wanted, t, self.schedule)
        if factor is not None and not self.scales:  # a x_t = (a / factor) x
            a, factor = aligned(t, a, factor) if a.ndim >= factor.ndim else (a, factor)
            a = a / factor
        y, rest = out[:, : x.shape[1]], out[:, x.shape[1] :]
        kind = self.source if type(self.source).apply is not Target.apply else self.wanted
        with torch.autocast(x.device.type, enabled=False):
            found = combined(kind, a, x, b, y)
        return torch.cat([found, rest], dim=1) if rest.shape[1] else found

    def _t(self, time: Tensor) -> Tensor:
        """t in float64 on the CPU, shape [B]; a scalar where all are one."""
        given = time.detach().cpu()
        t = INVERSES[self.time](given if self.time == "step" else given.double(), self.schedule)
        return t.flatten()[0] if t.numel() and bool((t == t.flatten()[0]).all()) else t

    def _check(self, out: Any, x: Tensor) -> None:
        if not isinstance(out, Tensor) or out.ndim != x.ndim or out.shape[1] < x.shape[1]:
            found = f"shape {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise NetworkError(
                f"{type(self.of).__name__} returned {found} for an input of shape {list(x.shape)}; a network that "
                f"predicts {self.source.name} returns at least as many numbers."
            )

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile the network inside; the map around it is two operations, and its coefficients are not torch's."""
        self.of.compile(*arguments, **options)

    def checkpoint_activations(self, on: bool = True) -> None:
        """Compute the network's activations again in the backward pass.

        Raises:
            NetworkError: if it cannot do that.
        """
        ask = getattr(self.of, "checkpoint_activations", None)
        if ask is None:
            raise NetworkError(
                f"train.checkpoint_activations: {type(self.of).__name__} has no method checkpoint_activations(True); "
                "jit and unet have. Leave the setting out."
            )
        ask(on)


def _read(what: str, make: Callable[[Any], Any], value: Any) -> Any:
    """What plain data stand for, which may come from a file of anybody's."""
    try:
        return make(value)
    except ReparamError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as e:
        raise NetworkError(f"reexpressed: {what} is {value!r}, which cannot be read: {e!r}.") from e


def linear_target(which: Any) -> Target:
    """A target whose two coefficients are all there is to it; a learned one as it is now.

    Raises:
        SpecError: if its config names code to run.
        Unsupported: for a target that is code.
    """
    if isinstance(which, dict) and _names_code(which):
        raise SpecError(
            "a re-expressed network names a target from a Python file, and weights run no code. Write that target as "
            "a row: {name: linear, p: …, q: …}."
        )
    found = target(which)
    if type(found).to_x0 is not Target.to_x0:
        raise Unsupported(
            f"{found.name} has a way of its own to x0, and only linear targets are re-expressed exactly. Write it as a "
            "row: {name: linear, p: …, q: …}."
        )
    frozen: Callable[[], Target] | None = getattr(found, "frozen", None)
    return found if frozen is None else frozen()


def _names_code(config: dict[str, Any]) -> bool:
    return config.get("name") == "file" or any(_names_code(v) for v in config.values() if isinstance(v, dict))


def _refuse_two_bases(source: Target, to: Target) -> None:
    bases = [getattr(kind, "basis", None) for kind in (source, to)]
    if None not in bases and bases[0] != bases[1]:
        raise Unsupported(
            f"{source.name} and {to.name} have two different bases ({bases[0]!r}, {bases[1]!r}), and one map is in "
            "one; convert to a target without a basis, such as v."
        )


def _fill(net: nn.Module, weights: str | Path) -> None:
    tensors, _ = read_tensors(weights)
    inside = all(name.startswith("of.") for name in tensors)
    if inside and not all(name.startswith("of.") for name in net.state_dict()):
        tensors = {name.removeprefix("of."): value for name, value in tensors.items()}
    try:
        net.load_state_dict(tensors)
    except RuntimeError as e:
        raise NetworkError(f"the weights in {weights} do not fit {type(net).__name__}: {e}") from e
