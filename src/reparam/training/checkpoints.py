"""The states of a training on disk, of which the last few are kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ..errors import ReparamError, SpecError
from .loop import Trainer

_NAME = re.compile(r"step-(\d+)\.safetensors")


class Checkpoints:
    """Files named by step, each whole or not there at all.

    Args:
        folder: where they lie; made when the first is written.
        keep: how many, at least 1.

    Raises:
        ReparamError: if none would be kept.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ReparamError(f"--keep is how many checkpoints are kept, at least 1, found {keep}.")
        self.folder, self.keep = folder, keep

    def list(self) -> list[Path]:
        """Those that are there, the newest first."""
        found = [(int(match[1]), path) for path in self.folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found, reverse=True)]

    def save(self, trainer: Trainer) -> Path:
        """Write the trainer's state, then drop what is older than the last few.

        Raises:
            OutputError: if it cannot be written; those before it are still there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{trainer.step:09d}.safetensors"
        trainer.save(path)
        for old in self.list()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def restore(self, trainer: Trainer, say: Callable[[str], None]) -> bool:
        """Continue from the newest that can be read; whether there was one.

        Raises:
            SpecError: if there are some, and none can be read or belongs to this training.
        """
        errors = []
        for path in self.list():
            try:
                trainer.restore(path)
                return True
            except SpecError as e:
                say(f"  warning: {e}")
                errors.append(str(e))
        if errors:
            raise SpecError(f"none of the checkpoints in {self.folder} can be continued from: {errors[0]}")
        return False
