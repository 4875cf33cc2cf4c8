"""A target given by a Python file with the two functions of a task.

The file defines ``compute_training_target(x_0, noise, timesteps, schedule)``, what the network should
predict, and ``predict_x0(model_output, x_t, timesteps, schedule)``, x0 from what it predicted. ``timesteps`` are
integers [B], and ``schedule`` is a dict of tensors over the T steps: ``alphas_cumprod``, ``sqrt_alpha`` (its
root) and ``sqrt_one_minus_alpha``. They are used exactly as that task uses them: nothing is derived from them
but what is reported.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import NetworkError, Unsupported
from ..schedules import DDPM, Schedule, Time, as_time
from .core import Target

FUNCTIONS = ("compute_training_target", "predict_x0")


@dataclass(frozen=True)
class File(Target):
    """What ``compute_training_target`` of a Python file asks for, on a table of integer steps.

    Its rows are read off the function (its values for x0 = 1, ε = 0 and the other way round), as those of a
    linear target; ``encode`` and ``to_x0`` call the functions themselves.

    Args:
        path: the file. It is the user's code, and is run.

    Raises:
        NetworkError: if the file cannot be run, or lacks one of the two functions.
    """

    name: ClassVar[str] = "file"
    path: str
    _module: ModuleType = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        object.__setattr__(self, "_module", _run(Path(self.path).expanduser()))

    def __deepcopy__(self, memo: dict[int, Any]) -> File:
        return self  # a module cannot be copied, and nothing in here changes

    @property
    def on_steps(self) -> bool:
        """Always: the functions are of integer steps."""
        return True

    @property
    def words(self) -> str:  # type: ignore[override]
        """What it is, for a reader."""
        return f"what compute_training_target in {Path(self.path).name} asks for"

    @property
    def digest(self) -> str:
        """A hash of the file."""
        return hashlib.sha256(Path(self.path).expanduser().read_bytes()).hexdigest()[:16]

    def rows(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        flat = t.reshape(-1)
        one, nought = torch.ones(len(flat), 1, 1, 1), torch.zeros(len(flat), 1, 1, 1)
        one, nought = one.double(), nought.double()
        p = self.encode(one, nought, flat, schedule).reshape(t.shape)
        q = self.encode(nought, one, flat, schedule).reshape(t.shape)
        return p.double(), q.double()

    def encode(self, x0: Tensor, eps: Tensor, t: Time, schedule: Schedule) -> Tensor:
        steps, table = self._given(t, schedule, x0)
        return self._call("compute_training_target", x0, (x0, eps, steps, table))

    def to_x0(self, y: Tensor, x_t: Tensor, t: Time, schedule: Schedule) -> Tensor:
        t = as_time(t)
        inverted = self._inverted(y, x_t, t, schedule)
        if bool((t > 0).all()):
            return inverted
        noisy = (t > 0).reshape(-1, *[1] * (x_t.ndim - 1)).to(x_t.device)
        return torch.where(noisy, inverted, x_t)  # before the table there is no noise

    def _inverted(self, y: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        steps, table = self._given(t.clamp(min=1 / _table(schedule).T), schedule, x_t)
        return self._call("predict_x0", x_t, (y, x_t, steps, table))

    def _given(self, t: Time, schedule: Schedule, like_x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The steps [B] and the table, on the data's device."""
        ddpm = _table(schedule)
        steps = ddpm.step(as_time(t)).expand(len(like_x)).to(like_x.device)
        times = ddpm.time(torch.arange(ddpm.T))
        alpha, sigma = (c.to(device=like_x.device, dtype=like_x.dtype) for c in (ddpm.alpha(times), ddpm.sigma(times)))
        return steps, {"alphas_cumprod": alpha**2, "sqrt_alpha": alpha, "sqrt_one_minus_alpha": sigma}

    def _call(self, name: str, shaped: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        try:
            found = getattr(self._module, name)(*arguments)
        except Exception as e:
            raise NetworkError(f"{name} in {self.path} failed on samples of shape {list(shaped.shape)}: {e!r}.") from e
        if not isinstance(found, Tensor) or found.shape != shaped.shape:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise NetworkError(
                f"{name} in {self.path} returned {shape}, expected a tensor of shape {list(shaped.shape)}."
            )
        return found

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "path": self.path}


def _table(schedule: Schedule) -> DDPM:
    if not isinstance(schedule, DDPM):
        raise Unsupported(f"a target from a file is defined on a table of integer steps (ddpm), found {schedule}.")
    return schedule


def _run(path: Path) -> ModuleType:
    if not path.is_file() or path.suffix != ".py":
        raise NetworkError(f"no Python file {path}; expected one that defines {' and '.join(FUNCTIONS)}.")
    spec = importlib.util.spec_from_file_location(f"reparam_target_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise NetworkError(f"{path} cannot be run: {e!r}.") from e
    missing = [name for name in FUNCTIONS if not callable(getattr(module, name, None))]
    if missing:
        raise NetworkError(f"{path} does not define {' and '.join(missing)}.")
    return module
