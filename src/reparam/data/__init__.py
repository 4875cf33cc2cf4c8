"""Data sets: plain tensors and what is known of them. They know nothing of targets."""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, unknown
from .arrays import checked, load_array, load_digits
from .manifolds import CURVES, Curve

__all__ = ["DATA", "Curve", "Data", "from_array", "load_data"]


@dataclass(frozen=True)
class Data:
    """A data set in memory, normalised.

    Attributes:
        name: what it is called in tables.
        train: what training draws from, shape [N, …], float32.
        heldout: real data that training never sees, shape [M, …]. For a curve that is a
            fresh draw, and more can be drawn.
        mean, std: the data were (original − mean)/std.
        curve: the plane and the curve that they lie on, where there is one.
        image: [height, width] where a vector is really a picture, to draw it as one.
    """

    name: str
    train: Tensor
    heldout: Tensor
    mean: float = 0.0
    std: float = 1.0
    curve: Curve | None = None
    image: tuple[int, int] | None = None
    seed: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.train.shape[1:])

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the samples: the same exactly where the data are the same."""
        found = hashlib.sha256(repr((self.shape, self.mean, self.std)).encode())
        for part in (self.train, self.heldout):
            found.update(part.contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    @functools.cached_property
    def sigma_data(self) -> float:
        """The standard deviation over all elements after normalisation: EDM's σ_data."""
        return float(self.train.double().std(correction=0))

    def original(self, x: Tensor) -> Tensor:
        """Samples in the units of the user's data."""
        return x * self.std + self.mean

    def flat(self, x: Tensor) -> Tensor:
        """Vectors to compare distributions in: of the plane, where there is one; shape [n, d]."""
        return self.curve.plane(x) if self.curve is not None else x.flatten(1)

    def reference(self, n: int) -> Tensor:
        """The real data that samples are compared with: n fresh ones, or the training set."""
        return self.curve.draw(n, [self.seed, 2]) if self.curve is not None else self.train

    def fresh(self, n: int) -> Tensor:
        """Up to ``n`` real data outside the training set and the reference: what floors are made of."""
        if self.curve is not None:
            return self.curve.draw(n, [self.seed, 3])
        return self.heldout[:n]

    def record(self) -> dict[str, Any]:
        """What travels with the weights: shape, normalisation and statistics; plain data."""
        return {
            "name": self.name,
            "count": len(self.train),
            "shape": list(self.shape),
            "digest": self.digest,
            "normalised_by": {"mean": self.mean, "std": self.std},
            "min": float(self.train.min()),
            "max": float(self.train.max()),
            "mean": float(self.train.double().mean()),
            "sigma_data": self.sigma_data,
        }

    def preflight(self) -> str:
        """One line that says what the data are."""
        r = self.record()
        scaled = "" if (self.mean, self.std) == (0.0, 1.0) else f", from (x - {self.mean:.4g})/{self.std:.4g}"
        return (
            f"{self.name}: {r['count']} training + {len(self.heldout)} held-out samples of shape "
            f"{r['shape']}, range [{r['min']:.3g}, {r['max']:.3g}], mean {r['mean']:.3g}, "
            f"sigma_data {r['sigma_data']:.3g}{scaled}"
        )


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


def _digits(holdout: float = 0.25, seed: int = 0) -> Data:
    train, heldout = _split(load_digits(), holdout, seed)
    return Data(name="digits", train=train, heldout=heldout, image=(8, 8))


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

    Raises:
        DataError: under the conditions of :func:`reparam.data.arrays.load_array`.
    """
    held = array.detach().cpu().double().numpy() if isinstance(array, Tensor) else array
    return _prepared(checked(held, name), name, "scale", holdout, seed)


def _prepared(x: Tensor, name: str, normalise: str, holdout: float, seed: int) -> Data:
    mean, std = (float(x.mean()), float(x.std(correction=0))) if normalise == "scale" else (0.0, 1.0)
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise DataError(f"{name} has mean {mean:g} and standard deviation {std:g}; its numbers are too large to scale.")
    train, heldout = _split(((x - mean) / std).float(), holdout, seed)
    return Data(name=name, train=train, heldout=heldout, mean=mean, std=std)


def _split(x: Tensor, holdout: float, seed: int) -> tuple[Tensor, Tensor]:
    if not 0 < holdout < 1:
        raise DataError(f"holdout is the share kept from training, between 0 and 1, found {holdout!r}.")
    count = round(len(x) * holdout)
    if count < 2 or len(x) - count < 2:
        raise DataError(
            f"found {len(x)} samples; with holdout={holdout:g} that leaves {len(x) - count} to train on and "
            f"{count} held out, and each needs at least 2."
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order[count:]].contiguous(), x[order[:count]].contiguous()


#: Data by name; what a recipe writes beside the name are the function's arguments.
DATA: dict[str, Callable[..., Data]] = {
    **{name: _curve_data(name) for name in CURVES},
    "digits": _digits,
    "array": _array,
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
