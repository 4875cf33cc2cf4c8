"""How to train."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from ..errors import Conflict, ReparamError
from .averages import WIDEST


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: optimiser steps. batch: samples a step.
        lr: the peak learning rate of AdamW. beta1, beta2, weight_decay: AdamW's own.
        warmup: steps of linear warm-up. decay: the shape of the learning rate after it; "inverse_sqrt" is
            lr/sqrt(max(step/decay_after, 1)), whatever the number of steps.
        decay_after: the steps at the full rate, for "inverse_sqrt".
        clip: the gradient norm is at most this; 0 leaves it alone.
        ema: decay of the averaged network that is evaluated and saved; its warm-up is
            min(ema, (1 + step)/(10 + step)).
        precision: "bf16" runs matrix products in bfloat16 (weights, losses and optimiser stay
            in float32), "auto" does so where the device computes them fast.
        accumulate: parts that a process computes its share of a batch in, one after the other, for less memory; the
            numbers are the same but for rounding, and for what a network draws itself (dropout).
        compile: run the network through torch.compile.
        channels_last: the memory layout that convolutions are fast in; "auto" on a GPU with a network of them.
        checkpoint_activations: compute activations again in the backward pass instead of keeping them.
        also_ema: decays of further averages to keep in checkpoints.
        ema_widths: relative widths of power-function averages, such as [0.05, 0.1], of which snapshots are
            kept, so that the average of any width can be made after training.
        snapshots: how many of them over the training.
        keep_at: steps after which the averaged network is kept with its spec, in snapshots/ of the run's folder.
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
    decay: Literal["cosine", "linear", "constant", "inverse_sqrt"] = "cosine"
    decay_after: int | None = None
    clip: float = 1.0
    ema: float = 0.995
    precision: Literal["auto", "bf16", "float32"] = "auto"
    accumulate: int = 1
    compile: bool = False
    channels_last: bool | Literal["auto"] = "auto"
    checkpoint_activations: bool = False
    also_ema: list[float] = field(default_factory=list)
    ema_widths: list[float] = field(default_factory=list)
    snapshots: int = 32
    keep_at: list[int] = field(default_factory=list)
    label_drop: float = 0.1
    validations: int = 8

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch", 1),
            ("validations", 1),
            ("accumulate", 1),
            ("snapshots", 1),
            ("warmup", 0),
        ):
            if getattr(self, name) < least:
                raise ReparamError(f"train.{name} must be at least {least}, found {getattr(self, name)}.")
        self._check_steps()
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ReparamError(f"train.lr must be a positive number, found {self.lr}.")
        for name, decays in (("ema", [self.ema]), ("also_ema", self.also_ema)):
            for decay in decays:
                if not 0 <= decay < 1:
                    raise ReparamError(f"train.{name} must lie in [0, 1), found {decay}.")
        if len({self.ema, *self.also_ema}) <= len(self.also_ema):
            raise ReparamError(f"train.also_ema repeats a decay: found {self.also_ema} beside train.ema {self.ema:g}.")
        for width in self.ema_widths:
            if not 0 < width <= WIDEST:
                raise ReparamError(f"train.ema_widths must lie in (0, {WIDEST:.4g}], found {width}.")
        if len(set(self.ema_widths)) != len(self.ema_widths) or len(self.ema_widths) == 1:
            raise ReparamError(
                f"train.ema_widths needs two different widths at least, such as [0.05, 0.1], found {self.ema_widths}."
            )
        if not 0 <= self.clip < math.inf:
            raise ReparamError(f"train.clip must be 0 (no clipping) or positive, found {self.clip}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ReparamError(f"train.weight_decay must be 0 or positive, found {self.weight_decay}.")
        if not 0 <= self.label_drop <= 1:
            raise ReparamError(f"train.label_drop must lie in [0, 1], found {self.label_drop}.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ReparamError(f"train.{name} must lie in [0, 1), found {getattr(self, name)}.")

    def _check_steps(self) -> None:
        """Refuse steps that training does not have, and a decay that does not say when it begins."""
        for step in self.keep_at:
            if not 1 <= step <= self.steps:
                raise ReparamError(f"train.keep_at holds steps from 1 to train.steps, {self.steps}, found {step}.")
        if len(set(self.keep_at)) < len(self.keep_at):
            raise ReparamError(f"train.keep_at repeats a step: found {self.keep_at}.")
        if (self.decay == "inverse_sqrt") != (self.decay_after is not None):
            raise Conflict(
                "train.decay inverse_sqrt and train.decay_after, the steps at the full rate, go together; found "
                f"decay {self.decay} and decay_after {self.decay_after}. For example decay: inverse_sqrt, decay_after: "
                "512."
            )
        if self.decay_after is not None and self.decay_after < 1:
            raise ReparamError(f"train.decay_after must be at least 1, found {self.decay_after}.")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.decay_after is not None:
            return self.lr / math.sqrt(max(step / self.decay_after, 1))
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
