"""reparam: the toolkit for what a diffusion model predicts.

Names are imported when they are first used, so ``import reparam`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import (
        errors,
        guidance,
        interop,
        likelihood,
        metrics,
        networks,
        samplers,
        schedules,
        targets,
        times,
        weightings,
    )
    from .confidence import Gaussian
    from .denoiser import Conventions, Denoiser, Posterior
    from .interop import from_diffusers, to_diffusers
    from .objective import Objective
    from .samplers import DDIM, Euler, Heun, Trajectory, sample
    from .schedules import DDPM, VE, Cosine, Elementwise, Path, RectifiedFlow, Schedule, schedule
    from .spec import Spec, load, save
    from .studies import study
    from .studies.evaluate import evaluate
    from .studies.train import train
    from .targets import Target, convert, target
    from .times import LogitNormal, Uniform
    from .tools.check import check
    from .tools.convert import reexpress
    from .tools.identify import identify

_FROM = {
    "confidence": ["Gaussian"],
    "denoiser": ["Conventions", "Denoiser", "Posterior"],
    "interop": ["from_diffusers", "to_diffusers"],
    "objective": ["Objective"],
    "samplers": ["DDIM", "Euler", "Heun", "Trajectory", "sample"],
    "schedules": ["DDPM", "VE", "Cosine", "Elementwise", "Path", "RectifiedFlow", "Schedule", "schedule"],
    "spec": ["Spec", "load", "save"],
    "studies": ["study"],
    "studies.evaluate": ["evaluate"],
    "studies.train": ["train"],
    "targets": ["Target", "convert", "target"],
    "times": ["LogitNormal", "Uniform"],
    "tools": ["check", "identify"],
    "tools.convert": ["reexpress"],
}
_HOME = {name: module for module, names in _FROM.items() for name in names}
_MODULES = [
    "errors",
    "guidance",
    "interop",
    "likelihood",
    "metrics",
    "networks",
    "samplers",
    "schedules",
    "targets",
    "times",
    "weightings",
]

__all__ = [
    "DDIM",
    "DDPM",
    "VE",
    "Conventions",
    "Cosine",
    "Denoiser",
    "Elementwise",
    "Euler",
    "Gaussian",
    "Heun",
    "LogitNormal",
    "Objective",
    "Path",
    "Posterior",
    "RectifiedFlow",
    "Schedule",
    "Spec",
    "Target",
    "Trajectory",
    "Uniform",
    "__version__",
    "check",
    "convert",
    "errors",
    "evaluate",
    "from_diffusers",
    "guidance",
    "identify",
    "interop",
    "likelihood",
    "load",
    "metrics",
    "networks",
    "reexpress",
    "sample",
    "samplers",
    "save",
    "schedule",
    "schedules",
    "study",
    "target",
    "targets",
    "times",
    "to_diffusers",
    "train",
    "weightings",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
