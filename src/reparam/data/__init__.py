"""Data sets: plain tensors and what is known of them. They know nothing of targets."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, unknown
from .arrays import checked, load_array, load_digits
from .base import PICTURE_MEAN, PICTURE_STD, Data
from .latents import RECORD, load_latents
from .manifolds import CURVES, Curve
from .mixtures import Mixture
from .order import split
from .pictures import load_pictures
from .tree import tree

#: The file by which a folder of latents is known.
LATENTS = RECORD

__all__ = ["DATA", "LATENTS", "Curve", "Data", "Mixture", "from_array", "load_data"]


def _refuse_drawing(size: int, seed: int) -> None:
    if not (isinstance(size, int) and isinstance(seed, int)) or size < 2 or seed < 0:
        raise DataError(f"size must be at least 2 and seed at least 0, whole numbers, found {size!r} and {seed!r}.")


def _curve_data(name: str) -> Callable[..., Data]:
    def make(dim: int = 2, size: int = 20_000, seed: int = 0) -> Data:
        _refuse_drawing(size, seed)
        curve = Curve.make(name, dim, seed)
        return Data(
            name=f"{name} D={dim}" + (f" N={size}" if size != 20_000 else "") + (f" seed {seed}" if seed else ""),
            train=curve.draw(size, [seed, 0]),
            heldout=curve.draw(min(size, 4096), [seed, 1]),
            curve=curve,
            seed=seed,
        )

    return make


def _tree(which: Literal["a", "b", "both"] = "a", size: int = 1_000_000, seed: int = 0) -> Data:
    _refuse_drawing(size, seed)
    mixture = tree(which)
    return Data(
        name=f"tree {which}" + (f" N={size}" if size != 1_000_000 else "") + (f" seed {seed}" if seed else ""),
        train=mixture.draw(size, [seed, 0]),
        heldout=mixture.draw(min(size, 4096), [seed, 1]),
        mixture=mixture,
        seed=seed,
    )


def _digits(holdout: float = 0.25, seed: int = 0, pictures: bool = False) -> Data:
    pixels, labels = load_digits()  # 0 … 16
    train, heldout = split(len(pixels), holdout, seed)
    x, mean, std = pixels / 8 - 1, 0.0, 1.0
    if pictures:
        x = (pixels * (255 / 16)).round().to(torch.uint8).reshape(-1, 1, 8, 8)
        mean, std = PICTURE_MEAN, PICTURE_STD
    return Data(
        name="digits",
        train=x[train],
        heldout=x[heldout],
        mean=mean,
        std=std,
        image=None if pictures else (8, 8),
        labels=labels[train],
        heldout_labels=labels[heldout],
        classes=tuple(map(str, range(10))),
    )


def _array(
    path: str,
    key: str | None = None,
    normalise: str = "scale",
    holdout: float = 0.1,
    allow_constant: bool = False,
    seed: int = 0,
) -> Data:
    if normalise not in ("scale", "none"):
        raise unknown("normalisation", normalise, ["scale", "none"])
    x, name = load_array(path, key, allow_constant)
    return _prepared(x, name, normalise, holdout, seed)


def from_array(array: np.ndarray | Tensor, name: str = "given array", holdout: float = 0.1, seed: int = 0) -> Data:
    """Data from samples in memory, shape [N, …], scaled to mean 0 and standard deviation 1.

    Bytes of shape [N, C, H, W], C = 1 or 3, are pictures and stay what they are.

    Raises:
        DataError: under the conditions of :func:`reparam.data.arrays.load_array`.
    """
    bytes_ = torch.as_tensor(array) if str(array.dtype).removeprefix("torch.") == "uint8" else None
    if bytes_ is not None and bytes_.ndim == 4 and bytes_.shape[1] in (1, 3):
        train, rest = split(len(bytes_), holdout, seed)
        pixels = bytes_.detach().cpu()
        return Data(name=name, train=pixels[train], heldout=pixels[rest], mean=PICTURE_MEAN, std=PICTURE_STD)
    held = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    return _prepared(checked(held, name), name, "scale", holdout, seed)


def _prepared(x: Tensor, name: str, normalise: str, holdout: float, seed: int) -> Data:
    mean, std = (float(x.mean()), float(x.std(correction=0))) if normalise == "scale" else (0.0, 1.0)
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise DataError(f"{name} has mean {mean:g} and standard deviation {std:g}; its numbers are too large to scale.")
    x = ((x - mean) / std).float()
    train, heldout = split(len(x), holdout, seed)
    return Data(name=name, train=x[train], heldout=x[heldout], mean=mean, std=std)


def _latents(
    path: str | None = None,
    sampled: bool = True,
    holdout: float = 0.1,
    seed: int = 0,
) -> Data:
    if path is None:
        raise DataError("data 'latents' needs data.path: a folder that reparam prepare --vae wrote.")
    found = load_latents(path, std=sampled)
    train, heldout = split(len(found.mean), holdout, seed)
    x0, spread = found.x0, found.x0_std
    return Data(
        name=Path(path).expanduser().absolute().name,
        train=x0[train],
        heldout=x0[heldout],
        mean=found.shift,
        std=1 / found.scale,
        labels=None if found.labels is None else found.labels[train],
        heldout_labels=None if found.labels is None else found.labels[heldout],
        classes=found.classes,
        spread=None if spread is None else spread[train],
        origin={"vae": found.record["vae"]},
    )


#: Data by name; what a recipe writes beside the name are the function's arguments.
DATA: dict[str, Callable[..., Data]] = {
    **{name: _curve_data(name) for name in CURVES},
    "tree": _tree,
    "digits": _digits,
    "array": _array,
    "latents": _latents,
    "images": load_pictures,
}


def load_data(config: dict[str, Any]) -> Data:
    """The data that ``{name: …, argument: …}`` stands for.

    Raises:
        UnknownName: if there are no data of that name, or they take no such argument.
        DataError: if the file is missing or cannot be used.
    """
    arguments = dict(config)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in DATA:
        raise unknown("data", name, DATA)
    known = list(inspect.signature(DATA[name]).parameters)
    for key in arguments:
        if key not in known:
            raise unknown(f"argument of data {name!r}", f"data.{key}", [f"data.{k}" for k in known])
    if name == "array" and not arguments.get("path"):
        raise DataError("data 'array' needs data.path, a .npy or .npz file: --set data.path=FILE.")
    return DATA[name](**arguments)
