"""The training loop: one network, one objective, one process or several.

Everything random is a function of (seed, step), everything else is in :meth:`Trainer.state`,
so that a run stopped at any step and continued gives the same numbers, on as many processes as there are then.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..confidence import VarianceLost
from ..data import Data
from ..data.order import mix
from ..denoiser import Denoiser
from ..errors import NetworkError, SpecError
from ..files import read_tensors, write_tensors
from ..objective import Objective
from .averages import Averages
from .batches import Batches, Samples
from .config import TrainConfig, fast_bf16
from .engine import Engine
from .validation import Validation

#: Steps between two looks at whether the numbers are finite, on a device that works ahead of the host.
_LOOK = 10


class Diverged(RuntimeError):
    """The loss stopped being a finite number. Not a user's error: a result."""

    def __init__(self, what: str, step: int | None = None) -> None:
        super().__init__(what if step is None else f"{what} at step {step}")


#: E[x0 | x_t] where it is known, of x_t [B, …] and float64 times [B].
Exact = Callable[[Tensor, Tensor], Tensor]


class Trainee(nn.Module):
    """The network and whatever the objective learns, as one module that returns the losses."""

    def __init__(self, net: nn.Module, objective: Objective, exact: Exact | None = None) -> None:
        super().__init__()
        self.net = net
        self.objective = objective
        self.exact = exact
        #: How a learned variance was lost, if it was.
        self.lost: VarianceLost | None = None

    def forward(
        self,
        x0: Tensor,
        t: Tensor,
        eps: Tensor,
        cond: Mapping[str, Tensor] | None = None,
        x0_std: Tensor | None = None,
    ) -> Tensor:
        """One loss a sample, shape [B]; arguments as of :class:`reparam.Objective`.

        Where a learned variance is lost all are NaN: other processes wait for the gradient, and are to see it too.
        """
        try:
            losses: Tensor = self.objective(self.net, x0, t, eps, cond, x0_std=x0_std, exact=self.exact)
        except VarianceLost as e:
            self.lost = e
            return math.nan * torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum().expand(len(x0))
        return losses


class Trainer:
    """A training run.

    Args:
        net: the network; trained in place.
        objective: what it is trained for.
        data: what to train on.
        config: how.
        seed: of the draws.
        conditional: whether the network is given labels, as ``y``; the number of classes means "no label".
        validation: the fixed draw to measure on.
        exact: E[x0 | x_t] of the data, which the network then learns from instead of from samples.
        engine: what runs it; this process alone, on the CPU, by default.
        entries: about how many entries the history gets.

    Raises:
        DataError: if labels are needed and there are none.
        ReparamError: if the processes do not divide the batch.
        NetworkError: if the network cannot do what the configuration asks of it.
    """

    def __init__(
        self,
        net: nn.Module,
        objective: Objective,
        data: Data,
        config: TrainConfig,
        *,
        seed: int = 0,
        conditional: bool = False,
        validation: Validation,
        exact: Exact | None = None,
        engine: Engine | None = None,
        entries: int = 100,
    ) -> None:
        self.engine = engine or Engine()
        self.device = self.engine.device
        self.config, self.data, self.validation, self.seed = config, data, validation, seed
        self.part = self.engine.part(config.batch, config.accumulate)
        self.batches = Batches(
            data,
            config.batch,
            self.part,
            seed=seed,
            steps=config.steps,
            conditional=conditional,
            label_drop=config.label_drop,
            device=self.device,
        )
        self.trainee = Trainee(_laid_out(net, config, self.device), objective, exact).to(self.device)
        #: What is averaged over training; the first is what is evaluated and saved.
        self.averages = Averages(self.trainee, (config.ema, *config.also_ema), config.ema_widths)
        if config.compile:
            net.compile()
        self._wrapped = self.engine.wrap(self.trainee)
        self._parameters = list(self.trainee.parameters())
        self.optimiser = torch.optim.AdamW(
            self._parameters,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and fast_bf16(self.device))
        self.step = 0
        self.seconds = 0.0
        #: Of these, those of steps alone, since this process began.
        self.stepping = 0.0
        #: One entry a logged step; what goes to metrics.jsonl.
        self.history: list[dict[str, Any]] = []
        #: Whether all steps so far are known to have been finite: only then is the state worth keeping.
        self.checked = True
        self._logged = max(1, config.steps // entries)
        self._unseen: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self._every = _LOOK if self.device.type == "cuda" else 1
        self._new = True

    @property
    def denoiser(self) -> Denoiser:
        """The averaged network as it is now, a copy, as a denoiser."""
        average = self.averages.module()
        assert isinstance(average, Trainee)
        return average.objective.denoiser(average.net)

    def run(self, stop: Callable[[], bool] = lambda: False, looks: Collection[int] = ()) -> Iterator[int]:
        """Train to the end, yielding the number of steps done after each.

        Args:
            stop: asked after every step; training ends early where it says so, in all processes alike.
            looks: steps after which all numbers are to be known as finite, besides those at which they are anyway.

        Raises:
            Diverged: if the loss, the gradient or the validation error is not finite.
        """
        c = self.config
        validated = {round(c.steps * (k + 1) / c.validations) for k in range(c.validations)}
        self.trainee.train()
        try:
            while self.step < c.steps and not self._told(stop):
                start = time.perf_counter()
                loss, norm = self.update()
                noted = self.step % self._logged == 0 or self.step == c.steps
                self._look(noted or self.step in validated or self.step in looks)
                if noted:
                    self._note(self.step, loss=_number(self.engine.mean(loss)), grad_norm=_number(norm))
                self.stepping += time.perf_counter() - start
                if self.step in validated:
                    self._validate()
                self.seconds += time.perf_counter() - start
                yield self.step
        finally:
            self.batches.close()

    def _told(self, stop: Callable[[], bool]) -> bool:
        """Whether any process was told to stop; asked of the others at the steps at which all look up."""
        if self.engine.world == 1:
            return stop()
        return self.step % self._every == 0 and self.engine.most(float(stop())) > 0

    def update(self) -> tuple[Tensor, Tensor]:
        """One step of the optimiser and of the averages: this process's loss, and the gradient's norm, both scalars."""
        c = self.config
        batch = self.batches(self.step)
        t = self.trainee.objective.times_at(batch.u)[self.part[0] : self.part[1]]
        for group in self.optimiser.param_groups:
            group["lr"] = c.lr_at(self.step)
        losses = self._gradient(batch, t)
        if self._new and self.engine.world > 1:
            self._refuse_unused()
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        self._unseen.append((self.step + 1, t, losses, norm))
        if self._every == 1:
            self._look(True)  # before a bad step is taken
        # Where looking at the norm makes nobody wait, gradients that are short enough are not passed over again.
        if c.clip and (self._every > 1 or float(norm) > c.clip):
            nn.utils.clip_grads_with_norm_(self._parameters, c.clip, norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.averages.update(self.step)
        if self._new:  # the first step after a start: an average that does not follow would go unnoticed for days
            self.averages.check_moved(self.trainee)
            self._new = False
        return losses.mean(), norm

    def _refuse_unused(self) -> None:
        """Processes wait for every parameter's gradient, and would wait for ever for one that has none."""
        unused = [name for name, p in self.trainee.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            raise NetworkError(
                f"{type(self.trainee.net).__name__} has parameters that its output does not depend on "
                f"({', '.join(unused[:4])}); several processes cannot train such a network. Remove them, or "
                "freeze them: requires_grad_(False)."
            )

    def _gradient(self, batch: Samples, t: Tensor) -> Tensor:
        """Leaves the gradient of the whole batch's mean loss in the parameters; the losses of this part, shape [b]."""
        parts, size = self.config.accumulate, len(t) // self.config.accumulate
        losses, cuda = [], [self.device] if self.device.type == "cuda" else []
        for k in range(parts):
            at = slice(k * size, (k + 1) * size)
            cond = {} if batch.y is None else {"y": batch.y[at]}
            alone = self.engine.unsynchronised(self._wrapped) if k < parts - 1 else contextlib.nullcontext()
            with alone, torch.random.fork_rng(devices=cuda):
                # What the network itself draws, as for dropout.
                _seed(mix(self.seed, self.step, 0xD0, self.part[0] + at.start), self.device)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    spread = None if batch.spread is None else batch.spread[at]
                    each = self._wrapped(batch.x0[at], t[at], batch.eps[at], cond, spread)
                (each.mean() / parts).backward()
            losses.append(each.detach())
        return torch.cat(losses)

    def _look(self, now: bool) -> None:
        """Whether the steps not yet looked at were finite; asked every few steps, as it waits for the device.

        The norm of the gradient is the same in all processes, so that all stop at the same step.
        """
        self.checked = now or self.step % self._every == 0
        if not self.checked or not self._unseen:
            return
        unseen, self._unseen = self._unseen, []
        finite = torch.stack(
            [norm + losses.sum() * (self.engine.world == 1) for _, _, losses, norm in unseen]
        ).isfinite()
        if not bool(finite.all()):
            self._diverged(*unseen[int(finite.long().argmin())])

    def _diverged(self, step: int, t: Tensor, losses: Tensor, norm: Tensor) -> None:
        self.checked, self.step = False, step
        loss = float(self.engine.mean(losses.mean()))
        bad, lost = ~losses.isfinite().cpu(), self.trainee.lost
        mine = lost.t if lost is not None else float(t[bad].max()) if bool(bad.any()) else -1.0
        where = self.engine.most(mine)
        self._note(step, loss=_json(loss), grad_norm=_number(norm))
        what = f"the gradient became {float(norm)}" if math.isfinite(loss) else f"the loss became {loss}"
        what, advice = (what, "") if lost is None else (lost.what, f". {lost.advice}")
        seen = "" if where < 0 else f", for a sample at t = {where:.3g} ({self._bin(where)})"
        raise Diverged(f"{what} at step {step}{seen}{advice}")

    def _bin(self, t: float) -> str:
        for low, high in zip(self.validation.edges[:-1], self.validation.edges[1:], strict=True):
            if low <= t <= high:
                return f"noise bin {low:.2g} to {high:.2g}"
        return "outside of the noise bins that are measured"

    def _note(self, step: int, **values: Any) -> None:
        """Into the history, beside what else is known of that step."""
        if not (self.history and self.history[-1]["step"] == step):
            self.history.append({"step": step})
        if "loss" in values:
            values["lr"] = self.config.lr_at(step - 1)
        self.history[-1] |= values

    def _validate(self) -> None:
        """Measured by the first process; the others wait at their next step."""
        errors = self.validation.errors(self.denoiser) if self.engine.first else []
        finite = self.engine.most(float(not all(math.isfinite(e) for e in errors))) == 0
        if self.engine.first:
            self._note(self.step, x0_error=[_json(e) for e in errors])
        if not finite:
            raise Diverged("the validation error stopped being finite", self.step)

    def save(self, path: Path) -> None:
        """Write all that continuing needs, atomically.

        Raises:
            Diverged: if a step was not finite.
            AverageStuck: if an average has not followed the network.
        """
        if self.engine.world == 1:
            self._look(True)
        if self.step:
            self.averages.check_moved(self.trainee)
        tensors = {f"net.{k}": v for k, v in self.trainee.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.averages.tensors().items()}
        scalars: dict[str, Any] = {}
        for i, entries in self.optimiser.state_dict()["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimiser.{i}.{key}"] = value
                else:
                    scalars[f"optimiser.{i}.{key}"] = value
        record = {"step": self.step, "seconds": self.seconds, "history": self.history, "scalars": scalars}
        write_tensors(path, tensors, {"resume": json.dumps(record)})

    def restore(self, path: Path) -> None:
        """Continue from what :meth:`save` wrote.

        Raises:
            SpecError: if the file cannot be read, or does not belong to this run.
        """
        tensors, metadata = read_tensors(path)
        try:
            record = json.loads(metadata["resume"])
            self.trainee.load_state_dict(_under("net.", tensors))
            self.averages.load(_under("average.", tensors))
            state: dict[int, dict[str, Any]] = {}
            for name, value in {
                **_under("optimiser.", tensors),
                **_under("optimiser.", record["scalars"]),
            }.items():
                i, _, key = name.partition(".")
                state.setdefault(int(i), {})[key] = value
            self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
            _lay_out(self.optimiser.state)
            self.step, self.seconds, self.history = record["step"], record["seconds"], record["history"]
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            raise SpecError(
                f"{path} does not belong to this run: {e}. Remove that file to start the run afresh."
            ) from e
        self._new = True


def _laid_out(net: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """The network in the memory layout, and with the handling of activations, that are asked for."""
    convolves = any(isinstance(m, nn.Conv2d) and m.kernel_size != m.stride for m in net.modules())
    if config.channels_last is True or (config.channels_last == "auto" and device.type == "cuda" and convolves):
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.checkpoint_activations:
        ask = getattr(net, "checkpoint_activations", None)
        if ask is None:
            raise NetworkError(
                f"train.checkpoint_activations: {type(net).__name__} has no method checkpoint_activations(True); jit "
                "and unet have. Leave the setting out, or give the network one."
            )
        ask(True)
    return net


def _lay_out(state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Give what the optimiser keeps of each parameter that one's memory layout, on which fused kernels rely."""
    for parameter, entries in state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                entries[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _seed(seed: int, device: torch.device) -> None:
    """Seeds the CPU's generator and the device's; torch.manual_seed looks for every kind of device there is."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _json(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _number(value: Tensor) -> float | None:
    return _json(value.item())


def _under(prefix: str, entries: dict[str, Any]) -> dict[str, Any]:
    return {k[len(prefix) :]: v for k, v in entries.items() if k.startswith(prefix)}
