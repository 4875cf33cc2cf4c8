"""Where a training runs: this process alone, or as one of several.

The trainer asks an engine for its device, its part of a batch and the few operations that involve other
processes. :class:`Engine` itself is one process; :class:`Accelerated` leaves all of it to Accelerate, so that a
training may be started plainly, by ``torchrun`` or by ``accelerate launch``, without change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ReparamError, Unsupported, unknown

#: How long processes wait for each other: one of them may be measuring or writing meanwhile.
_PATIENCE = timedelta(hours=2)


class Engine:
    """One process on one device.

    Attributes:
        device: where it trains. rank, world: which of how many processes this is.
    """

    rank = 0
    world = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def part(self, batch: int, accumulate: int = 1) -> tuple[int, int]:
        """Which samples of a batch are this process's, from … to.

        Raises:
            ReparamError: if they cannot be shared out evenly.
        """
        parts = self.world * accumulate
        if batch % parts:
            nearest = max(parts, round(batch / parts) * parts)
            raise ReparamError(
                f"train.batch is {batch} samples a step, which {self.world} processes × {accumulate} accumulated "
                f"parts do not divide evenly. Use --set train.batch={nearest}, or another number of processes or "
                "train.accumulate."
            )
        share = batch // self.world
        return self.rank * share, (self.rank + 1) * share

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module to call for losses: its gradients become those of the whole batch."""
        return module

    def unsynchronised(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Inside, gradients of a wrapped module are only added up."""
        return contextlib.nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes."""
        return value

    def most(self, value: float) -> float:
        """The greatest over processes."""
        return value

    def wait(self) -> None:
        """Until all processes are here."""

    def end(self) -> None:
        """Leave the other processes; each goes on alone."""


class Accelerated(Engine):
    """One of the processes that Accelerate, ``torchrun`` or ``accelerate launch`` started; or the only one.

    Args:
        device: "cpu", "cuda", "mps", or None for the best there is.

    Raises:
        ReparamError: if Accelerate is not installed.
    """

    def __init__(self, device: str | None = None) -> None:
        try:
            from accelerate import Accelerator
            from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
        except ImportError as e:
            raise ReparamError(
                "training here is done by Accelerate, which is not installed: pip install 'reparam[train]'."
            ) from e
        told = [InitProcessGroupKwargs(timeout=_PATIENCE), DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
        on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
        # Precision is the trainer's business: what accelerate config says of it would come on top.
        self.accelerator = Accelerator(mixed_precision="no", cpu=on_cpu and device != "mps", kwargs_handlers=told)
        kind = self.accelerator.distributed_type.value
        if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
            raise Unsupported(
                f"Accelerate was configured for {kind}; expected one process, or several with a copy each."
            )
        super().__init__(self.accelerator.device)
        _refuse_another(device, self.device)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self._tracked = False
        self._say: Callable[[str], None] = print

    def track(
        self, tracker: str | None, folder: Path, name: str, config: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        """Have curves and pictures written by a tracker of Accelerate's, in the folder where it writes to one.

        Raises:
            ReparamError: if it is not installed; the default one is then left out, and ``say`` told.
        """
        self._say = say
        if tracker is None:
            return
        from accelerate.tracking import filter_trackers

        self.accelerator.project_configuration.set_directories(str(folder / "curves"))
        self.accelerator.log_with = filter_trackers([tracker], str(folder / "curves"))
        if not self.accelerator.log_with:
            missing = f"the tracker {tracker} is not installed: pip install {tracker}, or --tracker none."
            if tracker != "tensorboard":
                raise ReparamError(missing)
            say(f"  no curves but metrics.jsonl: {missing}")
            return
        plain = {key: value for key, value in _flat(config) if isinstance(value, bool | int | float | str)}
        self.accelerator.init_trackers(name, config=plain)
        self._tracked = True

    def log(self, values: dict[str, float], step: int) -> None:
        """Numbers by name, for the tracker."""
        if self._tracked:
            self._passed_on(lambda: self.accelerator.log(values, step=step))

    def log_images(self, name: str, pictures: np.ndarray, step: int) -> None:
        """Pictures [n, H, W, C] of bytes, for the tracker, if it takes any."""
        for one in self.accelerator.trackers if self._tracked else []:
            if hasattr(one, "log_images"):
                layout = {"dataformats": "NHWC"} if one.name == "tensorboard" else {}
                self._passed_on(partial(one.log_images, {name: pictures}, step, **layout))

    def _passed_on(self, call: Callable[[], object]) -> None:
        """A tracker that fails, as when its server is gone, ends no training; it is left out from then on."""
        try:
            call()
        except Exception as e:  # trackers raise whatever they like
            self._tracked = False
            self._say(f"  warning: the tracker failed and is left out from here on: {e!r}")

    def describe(self) -> str:
        """How many processes, on what."""
        return f"{self.world} process{'es' * (self.world > 1)} on {self.device.type}"

    def wrap(self, module: nn.Module) -> nn.Module:
        wrapped: nn.Module = self.accelerator.prepare_model(module)
        return wrapped

    def unsynchronised(self, module: nn.Module) -> AbstractContextManager[Any]:
        inside: AbstractContextManager[Any] = self.accelerator.no_sync(module)
        return inside

    def mean(self, value: Tensor) -> Tensor:
        found: Tensor = self.accelerator.reduce(value.detach().to(self.device), "mean")
        return found

    def most(self, value: float) -> float:
        if self.world == 1:
            return value
        return float(self.accelerator.gather(torch.tensor([value], device=self.device)).max())

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        self.accelerator.end_training()


def check_tracker(tracker: str | None) -> str | None:
    """A tracker's name, with "none" as None.

    Raises:
        UnknownName: if Accelerate knows no such tracker.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    known = {str(getattr(kind, "value", kind)) for kind in LOGGER_TYPE_TO_CLASS}
    if tracker is None or tracker == "none":
        return None
    if tracker not in known:
        raise unknown("tracker", tracker, [*known, "none"])
    return tracker


def _refuse_another(asked: str | None, found: torch.device) -> None:
    """An error if the device asked for is not the one there is."""
    if asked is None:
        return
    try:
        wanted = torch.device(asked)
    except RuntimeError as e:
        raise Unsupported(f"device {asked!r} cannot be used; expected cpu, cuda or mps.") from e
    if wanted.type != found.type or wanted.index not in (None, found.index):
        raise Unsupported(
            f"device {asked!r} cannot be used here: this process gets {found}. GPUs are chosen by CUDA_VISIBLE_DEVICES."
        )


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
