"""Data sets: plain tensors and what is known of them. They know nothing of targets."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, unknown
from .arrays import checked, load_array, load_digits
from .base import PICTURE_MEAN, PICTURE_STD, Data
from .manifolds import CURVES, Curve

__all__ = ["DATA", "Curve", "Data", "from_array", "load_data"]


def _curve_data(name: str) -> Callable[..., Data]:
    def make(dim: int = 2, size: int = 20_000, seed: int = 0) -> Data:
        if size < 2 or seed < 0:
            raise DataError(f"size must be at least 2 and seed at least 0, found {size} and {seed}.")
        curve = Curve.make(name, dim, seed)
        return Data(
            name=f"{name} D={dim}" + (f" N={size}" if size != 20_000 else "") + (f" seed {seed}" if seed else ""),
            train=curve.draw(size, [seed, 0]),
            heldout=curve.draw(min(size, 4096), [seed, 1]),
            curve=curve,
            seed=seed,
        )

    return make


def _digits(holdout: float = 0.25, seed: int = 0, pictures: bool = False) -> Data:
    pixels, labels = load_digits()  # 0 … 16
    train, heldout = _split(len(pixels), holdout, seed)
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


def _images(
    path: str | None = None,
    size: int | list[int] | None = None,
    resize: str | None = None,
    colour: str | None = None,
    labels: str | None = None,
    column: str | None = None,
    classes: int | None = None,
    flip: bool = False,
    holdout: float = 0.1,
    skip_bad: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> Data:
    if path is None:
        raise DataError(
            "data 'images' needs data.path: a folder or .zip of pictures, a .parquet file, or a .npz of bytes; for "
            "example --set data.path=photos/."
        )
    from .images import load_images

    found = load_images(path, size, resize, colour, labels, column, classes, skip_bad, limit)
    train, heldout = _split(len(found.pixels), holdout, seed)
    chosen = {"size": size, "resize": resize, "colour": colour, "column": column, "limit": limit}
    told = [f"{key} {value}" for key, value in chosen.items() if value is not None]
    told += ["mirrored"] if flip else []
    told += [f"holdout {holdout:g}"] if holdout != 0.1 else []
    told += [f"seed {seed}"] if seed else []
    return Data(
        name=_name(Path(path).expanduser()) + (f" ({', '.join(told)})" if told else ""),
        train=found.pixels[train],
        heldout=found.pixels[heldout],
        mean=PICTURE_MEAN,
        std=PICTURE_STD,
        labels=None if found.labels is None else found.labels[train],
        heldout_labels=None if found.labels is None else found.labels[heldout],
        classes=found.classes,
        flip=flip,
        remarks=found.remarks,
    )


def _name(path: Path) -> str:
    """A path's last part; of a file that may be called train.parquet everywhere, its folder too."""
    return "/".join(path.absolute().parts[-2:]) if path.suffix == ".parquet" else path.absolute().name


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
        train, rest = _split(len(bytes_), holdout, seed)
        pixels = bytes_.detach().cpu()
        return Data(name=name, train=pixels[train], heldout=pixels[rest], mean=PICTURE_MEAN, std=PICTURE_STD)
    held = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    return _prepared(checked(held, name), name, "scale", holdout, seed)


def _prepared(x: Tensor, name: str, normalise: str, holdout: float, seed: int) -> Data:
    mean, std = (float(x.mean()), float(x.std(correction=0))) if normalise == "scale" else (0.0, 1.0)
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise DataError(f"{name} has mean {mean:g} and standard deviation {std:g}; its numbers are too large to scale.")
    x = ((x - mean) / std).float()
    train, heldout = _split(len(x), holdout, seed)
    return Data(name=name, train=x[train], heldout=x[heldout], mean=mean, std=std)


def _split(total: int, holdout: float, seed: int) -> tuple[Tensor, Tensor]:
    """The indices to train on and those held out, in an order of the seed's."""
    if not 0 < holdout < 1:
        raise DataError(f"holdout is the share kept from training, between 0 and 1, found {holdout!r}.")
    count = round(total * holdout)
    if count < 2 or total - count < 2:
        raise DataError(
            f"found {total} samples; with holdout={holdout:g} that leaves {total - count} to train on and "
            f"{count} held out, and each needs at least 2. Choose another share: --set data.holdout=0.3."
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[count:], order[:count]


#: Data by name; what a recipe writes beside the name are the function's arguments.
DATA: dict[str, Callable[..., Data]] = {
    **{name: _curve_data(name) for name in CURVES},
    "digits": _digits,
    "array": _array,
    "images": _images,
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
