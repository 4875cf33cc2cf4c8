"""Latents that ``reparam prepare --vae`` computed: a Gaussian for every picture, in safetensors shards.

The folder holds ``latents.json``, the record of where they come from, and shards named
``part-00000-of-00012.safetensors`` with the tensors ``mean`` and ``std``, [n, C, h, w], and
``label``, int64 [n], where there are classes. The numbers are the encoder's own: nothing is
shifted or scaled yet.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, SpecError
from ..files import read_tensors

__all__ = ["FORMAT", "RECORD", "Latents", "digest", "load_latents"]

RECORD = "latents.json"
#: Raised whenever a field of the record is added or changes its meaning; a newer one is refused.
FORMAT = 1
_AGAIN = "reparam prepare DATA --out {folder} --vae VAE"


@dataclass(frozen=True)
class Latents:
    """What an encoder knows of each picture: z ~ N(mean, std²), element by element.

    A diffusion model is trained on x = (z − shift)·scale, of mean :attr:`x0` and standard
    deviation :attr:`x0_std` (Rombach et al., arXiv 2112.10752, section G).

    Attributes:
        mean, std: shape [N, C, h, w], float32; std is None if it was not asked for.
        labels: class numbers, int64, shape [N]; None where there are none.
        classes: their names; () without labels.
        shift, scale: of the VAE's configuration (``shift_factor``, ``scaling_factor``).
        record: ``latents.json``, with the VAE's name, hash and configuration under "vae".
    """

    mean: Tensor
    std: Tensor | None
    labels: Tensor | None
    classes: tuple[str, ...]
    shift: float
    scale: float
    record: dict[str, Any]

    @property
    def x0(self) -> Tensor:
        """The means in the units of a diffusion model, (mean − shift)·scale, shape [N, C, h, w]."""
        return (self.mean - self.shift) * self.scale

    @property
    def x0_std(self) -> Tensor | None:
        """The standard deviations in the same units, std·|scale|, shape [N, C, h, w], or None."""
        return None if self.std is None else self.std * abs(self.scale)


def load_latents(folder: str | Path, *, std: bool = True, verify: bool = True) -> Latents:
    """The latents in a folder that ``reparam prepare --vae`` wrote, all of them in memory.

    Args:
        folder: where ``latents.json`` lies.
        std: whether to read the standard deviations too, which double the memory.
        verify: whether to hold the numbers against the hashes in the record.

    Raises:
        DataError: if the folder holds no latents, or unfinished ones; if a shard is missing, of
            another shape or preparation than the record says, or damaged.
    """
    folder = Path(os.path.expanduser(folder))
    record = _record(folder)
    shape = [record["count"], *record["shape"]]
    mean = torch.empty(shape)
    spread = torch.empty(shape) if std else None
    labels = torch.empty(shape[0], dtype=torch.int64) if record["classes"] else None
    first = 0
    for entry in record["shards"]:
        found = _shard(folder, record, entry, verify)
        rows = slice(first, first + entry["rows"])
        mean[rows] = found["mean"]
        if spread is not None:
            spread[rows] = found["std"]
        if labels is not None:
            labels[rows] = found["label"]
        first += entry["rows"]
    return Latents(mean, spread, labels, tuple(record["classes"]), record["shift"], record["scale"], record)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and numbers, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        raise DataError(f"{folder} holds no {RECORD}; expected latents made by {_AGAIN.format(folder='DIR')}.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"cannot read {path}: {e}.") from e
    version = record.get("format") if isinstance(record, dict) else None
    if not isinstance(version, int) or not 1 <= version <= FORMAT:
        raise DataError(
            f"{path} has format {version!r}; this reparam reads up to {FORMAT}. Upgrade reparam to read it."
        )
    if record.get("complete") is not True:
        raise DataError(f"the latents in {folder} are unfinished; go on with {_AGAIN.format(folder=folder)}.")
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(record.get(name), kind)]
    if wrong or sum(entry["rows"] for entry in record["shards"]) != record["count"]:
        what = f"does not say {', '.join(wrong)}" if wrong else "does not add up to its count"
        raise DataError(f"{path} {what}; make it again with {_AGAIN.format(folder=folder)}, in a new folder.")
    return dict(record)


_FIELDS: dict[str, Any] = {
    "id": str,
    "count": int,
    "shape": list,
    "classes": list,
    "shards": list,
    "shift": int | float,
    "scale": int | float,
    "vae": dict,
}


def _shard(folder: Path, record: dict[str, Any], entry: dict[str, Any], verify: bool) -> dict[str, Tensor]:
    """The tensors of a shard, checked."""
    path = folder / entry["file"]
    again = f"Remove it if it is there, and go on with {_AGAIN.format(folder=folder)}"
    if not path.is_file():
        raise DataError(f"{path} is missing, one of {len(record['shards'])} shards. {again}.")
    try:
        tensors, _ = read_tensors(path)
    except SpecError as e:
        raise DataError(f"{path} cannot be read as latents: {e} {again}.") from e
    shape = [entry["rows"], *record["shape"]]
    expected = {"mean": shape, "std": shape, **({"label": shape[:1]} if record["classes"] else {})}
    found = {name: list(value.shape) for name, value in tensors.items()}
    if found != expected:
        raise DataError(f"{path} holds {found}, and {RECORD} says {expected}. {again}.")
    if verify and digest(tensors) != entry["digest"]:
        raise DataError(
            f"{path} is damaged, or of another preparation: its numbers are not those in {RECORD}. {again}."
        )
    return tensors
