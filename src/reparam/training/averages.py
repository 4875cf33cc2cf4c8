r"""Averages of the weights over training.

Two families, both updated after every optimiser step n = 1, 2, … as θ̂ ← β θ̂ + (1 − β) θ:

- **exponential**, by decay d: β = min(d, (1 + m)/(10 + m)) with m = n − 1 the updates done before. The warm-up makes
  the average forget the initial weights whatever d is;
- **power-function** (Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
  arXiv 2312.02696, section 3.1), by relative width: the profile is p(τ) = (γ + 1) τ^γ / t^(γ+1) on [0, t], so that it
  scales with the length of training and gives the initial weights nothing. Its mean is t (γ + 1)/(γ + 2), its standard
  deviation over t is σ_rel = sqrt((γ + 1)/(γ + 3))/(γ + 2).

With β(n) = (1 − 1/n)^(γ+1) the weight that step i has at step t is the telescoping product
(1 − β(i)) Π_{j>i} β(j) = (i^(γ+1) − (i − 1)^(γ+1))/t^(γ+1): exactly the profile's integral over [i − 1, i]. Hence two
or more such averages, stored now and then, span what any other width would have been (:mod:`.posthoc`); the algebra
of profiles that this needs stands at the end of this file.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ReparamError, SpecError, Unsupported, unknown

#: A scalar or an array of float64.
Float = TypeVar("Float", float, np.ndarray)

#: The widest profile: γ = 0, every step counts alike.
WIDEST = 1 / math.sqrt(12)
#: What torch.compile and DistributedDataParallel put into the names of parameters.
_WRAPPERS = ("module", "_orig_mod")
#: Elements looked at in each parameter to see whether it moved, and how many must have for "unmoved" to be no accident.
_LOOKED_AT, _ENOUGH = 8, 4


class AverageStuck(ReparamError):
    """The network's parameters have moved and an average of them has not."""


class Averages:
    """Averages over training of a module's floating-point parameters.

    The state is kept in float32, or in the parameter's own type where that is finer. Everything else that the module
    holds (buffers, integer parameters) is taken from it as it is when asked for.

    Args:
        module: what is trained, itself (never a copy of it); the wrappers of torch.compile and DistributedDataParallel
            are looked through, and their prefixes taken off every name.
        decays: in [0, 1), of the exponential averages, with warm-up.
        widths: σ_rel in (0, 0.2887], of the power-function averages.

    Raises:
        ReparamError: if there is no average to keep, one is out of range or stated twice, or the module has nothing to
            average.
        Unsupported: if a parameter is complex.
    """

    def __init__(self, module: nn.Module, decays: Sequence[float] = (0.9999,), widths: Sequence[float] = ()) -> None:
        self.decays = tuple(float(d) for d in decays)
        self.widths = tuple(float(w) for w in widths)
        _check_settings(self.decays, self.widths)
        #: What is trained, out of its wrappers.
        self.network = unwrapped(module)
        #: By what each average is called: the decays, then the widths. The first is the one to evaluate.
        self.names = (*(f"{d!r}" for d in self.decays), *(f"width-{w!r}" for w in self.widths))
        self._gammas = [gamma_of(w) for w in self.widths]
        self._updates = 0
        self._sources: list[Tensor] = []
        self._slots: dict[str, int] = {}  # tied parameters have two names and one slot
        self._gather()
        self._states = [[_copied(p) for p in self._sources] for _ in self.names]
        # What lerp reads: parameters narrower than the state go through a copy in the state's type.
        self._read = [
            p if p.dtype == s.dtype else s.clone() for p, s in zip(self._sources, self._states[0], strict=True)
        ]
        differs = [k for k, (p, r) in enumerate(zip(self._sources, self._read, strict=True)) if p is not r]
        self._narrow, self._widened = [self._sources[k] for k in differs], [self._read[k] for k in differs]
        self._begin()

    def _gather(self) -> None:
        """Find the parameters to average."""
        at: dict[int, int] = {}
        for name, parameter in _named_parameters(self.network).items():
            if parameter.is_complex():
                raise Unsupported(f"parameter {name!r} is complex; averages are of real parameters. Keep it as two.")
            if not parameter.is_floating_point():
                continue
            if id(parameter) not in at:
                at[id(parameter)] = len(self._sources)
                self._sources.append(parameter)
            self._slots[name] = at[id(parameter)]
        if not self._sources:
            raise ReparamError("the module has no floating-point parameters; there is nothing to average.")

    @property
    def updates(self) -> int:
        """The optimiser steps averaged so far."""
        return self._updates

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after an optimiser step.

        Args:
            step: optimiser steps done, this one included: 1 at the first call, then 2, …

        Raises:
            ReparamError: if ``step`` does not follow the last one.
        """
        if step != self._updates + 1:
            raise ReparamError(
                f"the averages were given step {step} after step {self._updates}; expected {self._updates + 1}. Call "
                "update(step) exactly once after each optimiser step: not per micro-batch, and not before load()."
            )
        if self._narrow:
            torch._foreach_copy_(self._widened, self._narrow)
        for weight, state in zip(self._weights(step), self._states, strict=True):
            torch._foreach_lerp_(state, self._read, weight)
        self._updates = step

    def _weights(self, step: int) -> list[float]:
        """1 − β of each average at update ``step`` = 1, 2, …"""
        decays = [1 - min(d, step / (9 + step)) for d in self.decays]  # (1 + m)/(10 + m) with m = step − 1
        if step == 1:
            return decays + [1.0] * len(self._gammas)
        shrink = math.log1p(-1 / step)
        return decays + [-math.expm1((g + 1) * shrink) for g in self._gammas]

    def _begin(self) -> None:
        """Remember where the averages stand, for :meth:`check_moved`."""
        self._began = self._updates
        self._places = [
            torch.linspace(0, p.numel() - 1, _LOOKED_AT, dtype=torch.float64).long().to(p.device) if p.numel() else None
            for p in self._sources
        ]
        self._start = [self._look(state) for state in self._states]

    def _look(self, tensors: Sequence[Tensor]) -> Tensor:
        """A few elements of each tensor, shape [tensors, elements], in float64 on the CPU."""
        rows = []
        for tensor, places in zip(tensors, self._places, strict=True):
            row = torch.zeros(_LOOKED_AT) if places is None else tensor.detach().reshape(-1)[places].cpu()
            rows.append(row.double())
        return torch.stack(rows)

    def check_moved(self, network: nn.Module | None = None) -> None:
        """Make sure that the averages follow what is trained; for after the first step and at every checkpoint.

        Averages of a copy, or of parameters that something has replaced since, are silently of weights that nobody
        trains. To be called between :meth:`update` and the next optimiser step. A few elements of each parameter are
        looked at; one that has moved by too little to show in the average is no fault.

        Args:
            network: what the optimiser steps, wrapped or not; by default the module that the averages were made of.

        Raises:
            AverageStuck: if parameters have moved that an average has not followed, or are not in it at all.
        """
        network = self.network if network is None else network
        trained = {name: p for name, p in _named_parameters(network).items() if p.is_floating_point()}
        if trained.keys() != self._slots.keys():
            raise AverageStuck(
                f"the averages are not of the network that is trained: {_difference(trained, self._slots)}. "
                "Make them of the module whose parameters the optimiser holds."
            )
        if self._updates == self._began:
            return
        names = [name for name, _ in self._own_names()]
        now = self._look([trained[name] for name in names])
        other = ~torch.isclose(now, self._look(self._sources), rtol=0, atol=0, equal_nan=True).all(1)
        if other.any():
            raise AverageStuck(
                f"the averages do not follow the network: {_some(other, names)} have other values than the averages "
                "read. Make Averages of the very module that is trained (not of a copy), and anew after anything that "
                "replaces parameters, as load_state_dict(assign=True) does."
            )
        for name, weight, start, state in zip(
            self.names, self._weights(self._updates), self._start, self._states, strict=True
        ):
            stuck = self._stuck(weight, start, now, self._look(state))
            if stuck.any():
                raise AverageStuck(
                    f"the average {name} has not moved since step {self._began}, while {_some(stuck, names)} have. "
                    "Something holds its tensors back, or puts old ones in their place; expected update() alone to "
                    "write to them."
                )

    def _stuck(self, weight: float, start: Tensor, now: Tensor, average: Tensor) -> Tensor:
        """Which parameters an average has been kept from following, bool [tensors]; arguments [tensors, elements].

        The last update, by ``weight``, would have moved an element that still stood at ``start``. Right after the first
        one that is certain. Later an average may be back where it began by chance: a scalar's often enough to matter
        over a long training, several elements at once never.
        """
        float32 = torch.finfo(torch.float32)
        moving = weight * (now - start).abs() > 4 * float32.eps * start.abs() + float32.tiny
        held = moving.any(1) & (~moving | (average == start)).all(1)
        if self._updates == self._began + 1:
            return held
        large = torch.tensor([p.numel() >= _LOOKED_AT for p in self._sources])
        return held & large & (moving.sum(1) >= _ENOUGH)

    def index(self, which: int | str = 0) -> int:
        """Where in ``names`` an average is, given its place or its name.

        Raises:
            UnknownName: if there is none.
        """
        if isinstance(which, str) and which in self.names:
            return self.names.index(which)
        if isinstance(which, int) and 0 <= which < len(self.names):
            return which
        raise unknown("average", which, self.names)

    def state_dict(self, which: int | str = 0) -> dict[str, Tensor]:
        """All that the module's own ``state_dict`` holds, with the averaged weights; not copies.

        Tensors are float32 or finer where they are averaged, and the network's own elsewhere.
        """
        averaged = self.averaged(which)
        stored = {clean_name(name) for name in self.network.state_dict()}
        others = {**_named_parameters(self.network), **_named_buffers(self.network)}
        return averaged | {k: v.detach() for k, v in others.items() if k in stored and k not in averaged}

    def averaged(self, which: int | str = 0) -> dict[str, Tensor]:
        """The averaged weights by name, tied ones under each of theirs; not copies."""
        state = self._states[self.index(which)]
        return {name: state[slot] for name, slot in self._slots.items()}

    def copy_to(self, module: nn.Module, which: int | str = 0) -> None:
        """Give another module of the same kind the averaged weights, and the network's present buffers.

        Raises:
            SpecError: if its parameters or buffers have other names or shapes.
        """
        others = {**_named_parameters(self.network), **_named_buffers(self.network)}
        load_into(module, {**others, **self.averaged(which)})

    def module(self, which: int | str = 0) -> nn.Module:
        """A copy of the network with the averaged weights as they are now: frozen, in evaluation mode."""
        module = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.copy_to(module, which)
        return module

    def tensors(self) -> dict[str, Tensor]:
        """What continuing needs: ``{average}/{parameter}``, the settings and the count of updates; not copies."""
        found = {
            "updates": torch.tensor(self._updates),
            "decays": torch.tensor(self.decays, dtype=torch.float64),
            "widths": torch.tensor(self.widths, dtype=torch.float64),
        }
        for name, state in zip(self.names, self._states, strict=True):
            found |= {f"{name}/{parameter}": state[slot] for parameter, slot in self._own_names()}
        return found

    def _own_names(self) -> list[tuple[str, int]]:
        """One name for each slot."""
        first = {slot: name for name, slot in reversed(self._slots.items())}
        return [(name, slot) for slot, name in sorted(first.items())]

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`tensors` gave.

        Raises:
            SpecError: if it is of other averages, or of a network with other parameters. Nothing is changed then.
        """
        lacking = [k for k in ("updates", "decays", "widths") if k not in tensors]
        if lacking:
            raise SpecError(f"no averages to load: {', '.join(map(repr, lacking))} missing. Load what tensors() gave.")
        for kind in ("decays", "widths"):
            found, expected = tuple(tensors[kind].tolist()), getattr(self, kind)
            if found != expected:
                raise SpecError(
                    f"the stored averages have {kind} {_listed(found)}; this run asks for {_listed(expected)}"
                    f"{_changes(found, expected)}. Ask for the stored ones, or start afresh."
                )
        updates = int(tensors["updates"])
        if updates < 0:
            raise SpecError(f"the stored averages count {updates} updates; expected 0 or more. The file is damaged.")
        targets = self.tensors()
        _check_same(tensors, targets, "the stored averages do not fit this network")
        for name, target in targets.items():
            if "/" in name:
                target.copy_(tensors[name])
        self._updates = updates
        self._begin()


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside those of torch.compile and of data parallelism."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while "_orig_mod" in module._modules or isinstance(module, parallel):
        module = module.get_submodule("module" if isinstance(module, parallel) else "_orig_mod")
    return module


def clean_name(name: str) -> str:
    """A parameter's name without ``module`` and ``_orig_mod`` wherever wrappers have put them."""
    *path, last = name.split(".")
    return ".".join([*(part for part in path if part not in _WRAPPERS), last])


@torch.no_grad()
def load_into(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module, wrapped or not, the tensors of these (clean) names, in the types that its own have.

    Raises:
        SpecError: if a parameter or stored buffer is missing, foreign or of another shape. Nothing is changed then.
    """
    targets = {**_named_parameters(module), **_named_buffers(module)}
    needed = {clean_name(name) for name in module.state_dict()}
    wanted = {k: v for k, v in targets.items() if k in needed or k in tensors}
    _check_same(tensors, wanted, "the weights do not fit the module")
    for name, target in wanted.items():
        target.copy_(tensors[name])


def _named_parameters(module: nn.Module) -> dict[str, Tensor]:
    return _cleaned(module.named_parameters(remove_duplicate=False))


def _named_buffers(module: nn.Module) -> dict[str, Tensor]:
    return _cleaned(module.named_buffers(remove_duplicate=False))


def _cleaned(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in named:
        clean = clean_name(name)
        if found.setdefault(clean, tensor) is not tensor:
            raise ReparamError(f"two tensors are called {clean!r} once wrappers' prefixes are off. Rename a submodule.")
    return found


def _copied(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)


def _check_settings(decays: tuple[float, ...], widths: tuple[float, ...]) -> None:
    if not decays and not widths:
        raise ReparamError("no average to keep; give at least one decay, as decays=(0.9999,).")
    for decay in decays:
        if not 0 <= decay < 1:
            raise ReparamError(f"a decay must lie in [0, 1), found {decay}.")
    for kind, values in (("decays", decays), ("widths", widths)):
        if len(set(values)) < len(values):
            raise ReparamError(f"{kind} {_listed(values)} has a value twice. Leave one of them out.")


def _check_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    if found.keys() != expected.keys():
        raise SpecError(f"{what}: {_difference(found, expected)}.")
    shapes = [k for k in expected if found[k].shape != expected[k].shape]
    if shapes:
        each = [f"{k!r} has shape {list(found[k].shape)}, expected {list(expected[k].shape)}" for k in shapes]
        raise SpecError(f"{what}: {_few(each, '; ')}.")


def _difference(found: Mapping[str, object], expected: Mapping[str, object]) -> str:
    missing = [repr(k) for k in expected if k not in found]
    foreign = [repr(k) for k in found if k not in expected]
    return "; ".join(f"{kind} {_few(names)}" for kind, names in (("missing", missing), ("foreign", foreign)) if names)


def _some(which: Tensor, names: Sequence[str]) -> str:
    return f"{int(which.sum())} of its {len(names)} parameters ({names[int(which.nonzero()[0])]!r} for one)"


def _few(parts: Sequence[str], between: str = ", ", most: int = 6) -> str:
    more = f" and {len(parts) - most} more" if len(parts) > most else ""
    return between.join(parts[:most]) + more


def _listed(values: Sequence[float]) -> str:
    return f"({', '.join(f'{v:.15g}' for v in values)})"


def _changes(found: Sequence[float], expected: Sequence[float]) -> str:
    only = [(w, [v for v in a if v not in b]) for w, a, b in (("stored", found, expected), ("asked", expected, found))]
    parts = [f"only {where}: {_listed(values)}" for where, values in only if values]
    return f" ({'; '.join(parts)})" if parts else " (in another order)"


def sigma_rel_of(gamma: Float) -> Float:
    """The standard deviation of the profile τ^γ on [0, t], over t: sqrt((γ + 1)/(γ + 3))/(γ + 2).

    arXiv 2312.02696, section 3.1.

    Args:
        gamma: at least 0; a number or an array.
    """
    g = np.asarray(gamma, dtype=np.float64)
    found = np.sqrt((g + 1) / (g + 3)) / (g + 2)
    return found if isinstance(gamma, np.ndarray) else float(found)


def gamma_of(sigma_rel: Float) -> Float:
    """The exponent γ ≥ 0 of the profile of a relative width.

    Squaring σ_rel's formula gives γ³ + 7γ² + (16 − u)γ + (12 − u) = 0 with u = 1/σ_rel². It has three real roots; the
    largest is the one with γ ≥ 0, by the trigonometric formula at γ = z − 7/3.

    Args:
        sigma_rel: in (0, 1/√12]; a number or an array.

    Raises:
        ReparamError: if a width is out of range.
    """
    s = np.asarray(sigma_rel, dtype=np.float64)
    if not np.all((s > 0) & (s <= WIDEST * (1 + 1e-12))):
        raise ReparamError(
            f"a width (relative standard deviation) must lie in (0, {WIDEST:.4f}], found {sigma_rel}; "
            f"{WIDEST:.4f} is the plain mean over all of training, 0.1 a common choice."
        )
    u = s**-2
    p, q = u + 1 / 3, (2 + 36 * u) / 27  # z³ − p z + q = 0
    cosine = np.clip(-1.5 * q / p * np.sqrt(3 / p), -1.0, 1.0)
    found = np.maximum(2 * np.sqrt(p / 3) * np.cos(np.arccos(cosine) / 3) - 7 / 3, 0.0)
    return found if isinstance(sigma_rel, np.ndarray) else float(found)


def inner_product(step_a: Float, gamma_a: Float, step_b: Float, gamma_b: Float) -> Float:
    """∫ p_a(τ) p_b(τ) dτ of two profiles that end at ``step_a`` and ``step_b``, in 1/steps.

    With s the earlier end, t and γ the later one's: (γ_a + 1)(γ_b + 1)/(γ_a + γ_b + 1) · (s/t)^γ / t. Arguments
    broadcast. The power is taken in log space: at large γ it underflows to 0 and nothing overflows.
    """
    a, ga, b, gb = (np.asarray(v, dtype=np.float64) for v in (step_a, gamma_a, step_b, gamma_b))
    early, late, gamma = np.minimum(a, b), np.maximum(a, b), np.where(a <= b, gb, ga)
    logarithm = np.log1p(ga) + np.log1p(gb) - np.log(ga + gb + 1) + gamma * np.log(early / late) - np.log(late)
    return np.exp(logarithm)[()]


def coefficients(snapshots: Sequence[tuple[float, float]], target_step: float, target_gamma: float) -> np.ndarray:
    """By what to multiply stored averages so that their sum is nearest to another one.

    Args:
        snapshots: (step, γ) of each stored average. target_step, target_gamma: of the wanted one.

    Returns:
        float64 of shape [snapshots], adding up to 1; see :func:`fit`.
    """
    return fit(snapshots, np.array([target_step]), np.array([target_gamma]))[0][:, 0]


def fit(
    snapshots: Sequence[tuple[float, float]], target_steps: np.ndarray, target_gammas: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients c of stored averages for M wanted ones, and how near they come.

    Least squares of the profiles, ‖Σ c_i p_i − p‖² (arXiv 2312.02696, section 3.2), subject to Σ c_i = 1, which makes
    constant weights come out as they are. With A_ij = ⟨p_i, p_j⟩ and b_i = ⟨p_i, p⟩ the normal equations are
    A c = b + λ1, solved for profiles scaled to norm 1.

    Args:
        snapshots: (step, γ) of each stored average. target_steps, target_gammas: of the wanted ones, shape [M].

    Returns:
        The coefficients, float64 [snapshots, M], and the residuals ‖Σ c_i p_i − p‖/‖p‖, float64 [M].

    Raises:
        ReparamError: if there are no snapshots, or a step is not positive.
    """
    if not len(snapshots):
        raise ReparamError("no snapshots to combine; give the (step, γ) of at least one.")
    steps, gammas = np.asarray(snapshots, dtype=np.float64).T
    if min(steps.min(), np.min(target_steps)) <= 0:
        raise ReparamError("averages exist from step 1 on; a snapshot or target has a step of 0 or less.")
    norm = np.sqrt(inner_product(steps, gammas, steps, gammas))
    wanted = np.sqrt(inner_product(target_steps, target_gammas, target_steps, target_gammas))
    a = inner_product(steps[:, None], gammas[:, None], steps, gammas) / (norm[:, None] * norm)
    b = inner_product(steps[:, None], gammas[:, None], target_steps, target_gammas) / (norm[:, None] * wanted)
    free, ones = np.split(np.linalg.lstsq(a, np.column_stack([b, 1 / norm]), rcond=None)[0], [b.shape[1]], axis=1)
    y = free + ones * ((1 / wanted - (1 / norm) @ free) / ((1 / norm) @ ones))
    squared = 1 - 2 * np.sum(y * b, 0) + np.sum(y * (a @ y), 0)
    return y * wanted / norm[:, None], np.sqrt(np.maximum(squared, 0.0))
