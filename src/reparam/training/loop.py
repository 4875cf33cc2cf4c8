"""The training loop: one network, one objective, one device.

Everything random is a function of (seed, step), everything else is in :meth:`Trainer.state`,
so that a run stopped at any step and continued gives the same numbers.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..data import Data
from ..denoiser import Denoiser, evaluating
from ..errors import DataError, ReparamError, SpecError
from ..files import read_tensors, write_tensors
from ..objective import Objective
from .draws import Batch, Draws, mix

#: Numbers that the validation's pictures may have in all; of large pictures there are fewer.
_NUMBERS = 2**25


class Diverged(RuntimeError):
    """The loss stopped being a finite number. Not a user's error: a result."""

    def __init__(self, what: str, step: int | None = None) -> None:
        super().__init__(what if step is None else f"{what} at step {step}")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: optimiser steps. batch: samples a step.
        lr: the peak learning rate of AdamW. beta1, beta2, weight_decay: AdamW's own.
        warmup: steps of linear warm-up. decay: the shape of the learning rate after it.
        clip: the gradient norm is at most this; 0 leaves it alone.
        ema: decay of the averaged network that is evaluated and saved; its warm-up is
            min(ema, (1 + step)/(10 + step)).
        precision: "bf16" runs matrix products in bfloat16 (weights, losses and optimiser stay
            in float32), "auto" does so where the device computes them fast.
        label_drop: how often a conditional run trains without the label, for guidance.
        validations: how often the x0-error by noise level is measured, the end included.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True}

    steps: int = 2000
    batch: int = 512
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    warmup: int = 100
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    clip: float = 1.0
    ema: float = 0.995
    precision: Literal["auto", "bf16", "float32"] = "auto"
    label_drop: float = 0.1
    validations: int = 8

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("validations", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ReparamError(f"train.{name} must be at least {least}, found {getattr(self, name)}.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ReparamError(f"train.lr must be a positive number, found {self.lr}.")
        if not 0 <= self.ema < 1:
            raise ReparamError(f"train.ema must lie in [0, 1), found {self.ema}.")
        if not 0 <= self.clip < math.inf:
            raise ReparamError(f"train.clip must be 0 (no clipping) or positive, found {self.clip}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ReparamError(f"train.weight_decay must be 0 or positive, found {self.weight_decay}.")
        if not 0 <= self.label_drop <= 1:
            raise ReparamError(f"train.label_drop must lie in [0, 1], found {self.label_drop}.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ReparamError(f"train.{name} must lie in [0, 1), found {getattr(self, name)}.")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        left = 1 - (step - self.warmup) / max(1, self.steps - self.warmup)
        shape = {"cosine": 0.5 - 0.5 * math.cos(math.pi * left), "linear": left, "constant": 1.0}
        return self.lr * shape[self.decay]


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in tests)


class Trainee(nn.Module):
    """The network and whatever the objective learns, as one module that returns the losses."""

    def __init__(self, net: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.net = net
        self.objective = objective

    def forward(self, x0: Tensor, t: Tensor, eps: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        """One loss a sample, shape [B]."""
        losses: Tensor = self.objective(self.net, x0, t, eps, cond)
        return losses


@dataclass(frozen=True)
class Validation:
    """The same x0, t and ε for every run of a study: the only loss that compares targets.

    Attributes:
        edges: of the noise bins, in t, length K + 1.
        x0, eps: shape [K·n, …], n samples a bin. t: shape [K·n], stratified within each bin.
        variance: of the data, by which the error is divided.
        y: class numbers, for a conditional run.
    """

    edges: list[float]
    x0: Tensor
    t: Tensor
    eps: Tensor
    variance: float
    y: Tensor | None = None

    @classmethod
    def draw(
        cls,
        data: Data,
        t_range: tuple[float, float],
        *,
        conditional: bool = False,
        bins: int = 10,
        each: int = 256,
    ) -> Validation:
        """A fixed draw over the held-out data and times in ``t_range``."""
        low, high = t_range
        n = bins * max(8, min(each, _NUMBERS // (bins * math.prod(data.shape))))
        generator = torch.Generator().manual_seed(mix(0, 0xE44))
        t = low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
        order = torch.randperm(n, generator=generator) % len(data.heldout)
        eps = torch.randn(n, *data.shape, generator=generator)
        edges = [low + (high - low) * k / bins for k in range(bins + 1)]
        y = data.heldout_labels[order] if conditional and data.heldout_labels is not None else None
        return cls(edges, data.normalised(data.heldout[order]), t, eps, data.sigma_data**2, y)

    def errors(self, denoiser: Denoiser) -> list[float]:
        """The mean squared error of x0 in each bin over the data's variance: 1 is guessing the mean."""
        device = next(denoiser.parameters()).device
        chunk = max(1, min(1024, 2**21 // math.prod(self.x0.shape[1:])))
        found = []
        with evaluating(denoiser):
            for at in torch.arange(len(self.t)).split(chunk):
                x0, eps, t = self.x0[at].to(device), self.eps[at].to(device), self.t[at]
                if denoiser.conventions.time == "step":
                    t = denoiser.schedule.on_steps(t)  # type: ignore[attr-defined]
                cond = {} if self.y is None else {"y": self.y[at].to(device)}
                mean = denoiser(denoiser.schedule.add_noise(x0, eps, t), t, **cond).mean
                found.append((mean - x0).square().flatten(1).mean(1).double().cpu())
        each = torch.cat(found).reshape(len(self.edges) - 1, -1).mean(1)
        return [float(v) for v in each / self.variance]


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
        device: where to train.

    Raises:
        DataError: if labels are needed and there are none.
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
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.config = config
        self.trainee = Trainee(net, objective).to(self.device)
        #: The average over training, which is what is evaluated and saved.
        self.average = copy.deepcopy(self.trainee).requires_grad_(False)
        if conditional and data.labels is None:
            raise DataError(f"{data.name} has no labels; a conditional run needs them.")
        self.data = data
        self.samples = data.train.to(self.device)
        self.labels = data.labels.to(self.device) if conditional and data.labels is not None else None
        self.validation = validation
        self.draws = Draws(seed, config.batch, len(data.train), data.shape, self.device)
        self._parameters = list(self.trainee.parameters())
        fused = self.device.type in ("cpu", "cuda")
        self.optimiser = torch.optim.AdamW(
            self._parameters,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=fused,
        )
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and fast_bf16(self.device))
        self.step = 0
        self.seconds = 0.0
        #: One entry a logged step; what goes to metrics.jsonl.
        self.history: list[dict[str, Any]] = []

    @property
    def denoiser(self) -> Denoiser:
        """The averaged network as a denoiser."""
        return self.average.objective.denoiser(self.average.net)

    def run(self, stop: Callable[[], bool] = lambda: False) -> Iterator[int]:
        """Train to the end, yielding the number of steps done after each.

        Args:
            stop: asked after every step; training ends early where it says so.

        Raises:
            Diverged: if the loss or the validation error is not finite.
        """
        c = self.config
        logged = max(1, c.steps // 100)
        validated = {round(c.steps * (k + 1) / c.validations) for k in range(c.validations)}
        self.trainee.train()
        while self.step < c.steps and not stop():
            start = time.perf_counter()
            loss, norm = self._update()
            self.step += 1
            if self.step % logged == 0 or self.step == c.steps or not math.isfinite(loss):
                entry = {"loss": _json(loss), "grad_norm": _json(norm), "lr": c.lr_at(self.step - 1)}
                self.history.append({"step": self.step, **entry})
            if not math.isfinite(loss):
                raise Diverged(f"the loss became {loss}", self.step)
            if self.step in validated:
                self._validate()
            self.seconds += time.perf_counter() - start
            yield self.step

    def _update(self) -> tuple[float, float]:
        c = self.config
        batch = self.draws(self.step)
        x0, cond = self._real(batch)
        t = self.trainee.objective.times_at(batch.u)
        for group in self.optimiser.param_groups:
            group["lr"] = c.lr_at(self.step)
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(mix(self.draws.seed, self.step, 0xD0))  # what the network itself draws, as for dropout
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.trainee(x0, t, batch.eps, cond).mean()
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, c.clip or math.inf)
        value = loss.item()
        if math.isfinite(value):
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._update_average()
        return value, norm.item()

    def _real(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The step's clean samples, and what the network is told of them."""
        at = batch.index.to(self.device)
        mirrored, dropped = batch.coins.to(self.device)
        stored = self.samples[at]
        if self.data.flip:
            stored = torch.where((mirrored < 0.5)[:, None, None, None], stored.flip(-1), stored)
        x0 = self.data.normalised(stored)
        if self.labels is None:
            return x0, {}
        y = self.labels[at]
        return x0, {"y": y.masked_fill(dropped < self.config.label_drop, len(self.data.classes))}

    @torch.no_grad()
    def _update_average(self) -> None:
        net, average = self.trainee, self.average
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
        for mine, theirs in zip(average.buffers(), net.buffers(), strict=True):
            mine.copy_(theirs)

    def _validate(self) -> None:
        errors = self.validation.errors(self.denoiser)
        entry = {"step": self.step, "x0_error": [_json(e) for e in errors]}
        if self.history and self.history[-1]["step"] == self.step:
            self.history[-1].update(entry)
        else:
            self.history.append(entry)
        if not all(math.isfinite(e) for e in errors):
            raise Diverged("the validation error stopped being finite", self.step)

    def save(self, path: Path) -> None:
        """Write all that continuing needs, atomically."""
        tensors = {f"net.{k}": v for k, v in self.trainee.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
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
            SpecError: if the file does not belong to this run.
        """
        try:
            tensors, metadata = read_tensors(path)
            record = json.loads(metadata["resume"])
            self.trainee.load_state_dict(_under("net.", tensors))
            self.average.load_state_dict(_under("average.", tensors))
            state: dict[int, dict[str, Any]] = {}
            for name, value in {
                **_under("optimiser.", tensors),
                **_under("optimiser.", record["scalars"]),
            }.items():
                i, _, key = name.partition(".")
                state.setdefault(int(i), {})[key] = value
            self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
            self.step, self.seconds, self.history = record["step"], record["seconds"], record["history"]
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            raise SpecError(
                f"{path} does not belong to this run: {e}. Remove that file to start the run afresh."
            ) from e


def _json(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _under(prefix: str, entries: dict[str, Any]) -> dict[str, Any]:
    return {k[len(prefix) :]: v for k, v in entries.items() if k.startswith(prefix)}
