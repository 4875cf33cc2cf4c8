"""What becomes of the pictures: shards of PNGs or of latents, written whole."""

from __future__ import annotations

import importlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ...data import latents
from ...errors import DataError, Unsupported, unknown
from ...files import write_tensors, written_whole

#: Of a folder of pictures; latents have their own.
RECORD = "prepared.json"
_KEY = "reparam"  # under which a shard says what it is
_SHARD_BYTES = 2**28  # of pictures before compression
_SHARD_LATENTS = 4096
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

_Names = tuple[str, ...] | None


class Row(NamedTuple):
    """A picture that could be used; ``made`` is a PNG, or uint8 of shape [H, W] or [H, W, 3]."""

    name: str
    label: int
    made: Any


@dataclass
class Note:
    """What a shard says of itself, in its own metadata."""

    id: str
    index: int
    rows: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    digest: str | None = None

    @classmethod
    def read(cls, text: str | bytes | None) -> Note | None:
        """The note in a shard's metadata; None if there is none."""
        try:
            return cls(**json.loads(text or ""))
        except (ValueError, TypeError):
            return None

    def text(self) -> str:
        return json.dumps(asdict(self))


class Kind(Protocol):
    """What becomes of the pictures, and how a shard of that is written and recognised."""

    name: str
    record: str
    format: int
    suffix: str
    mode: str | None
    png: bool

    def rows(self, side: tuple[int, int]) -> int:
        """How many pictures go into a shard."""

    def refuse_side(self, side: tuple[int, int]) -> None:
        """An error if pictures of this (height, width) cannot be used."""

    def shape(self, side: tuple[int, int]) -> list[int]:
        """The shape of one sample."""

    def settings(self) -> dict[str, Any]:
        """What a shard depends on, besides the pictures and how they are cut."""

    def told(self) -> dict[str, Any]:
        """What the record says besides."""

    def write(self, path: Path, rows: Iterator[Row], note: Note, side: tuple[int, int], classes: _Names) -> None:
        """A shard of pictures of this (height, width); ``note`` is complete once ``rows`` are exhausted.

        ``classes`` are their names, or None without labels.
        """

    def note(self, path: Path) -> Note | None:
        """What the shard at ``path`` says of itself; None if it cannot be read."""


class PictureShards:
    """Parquet shards of PNGs."""

    name, record, format, suffix, png = "pictures", RECORD, 1, ".parquet", True
    mode: str | None = None

    def __init__(self) -> None:
        require("pyarrow", "images", "Parquet files are written by pyarrow")

    def rows(self, side: tuple[int, int]) -> int:
        return max(1, min(10_000, _SHARD_BYTES // (3 * side[0] * side[1])))

    def refuse_side(self, side: tuple[int, int]) -> None:
        pass

    def shape(self, side: tuple[int, int]) -> list[int]:
        return list(side)

    def settings(self) -> dict[str, Any]:
        return {}

    def told(self) -> dict[str, Any]:
        return {}

    def write(self, path: Path, rows: Iterator[Row], note: Note, side: tuple[int, int], classes: _Names) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        found = list(rows)
        columns = {"image": pa.array([{"bytes": r.made, "path": r.name} for r in found], _image_type(pa))}
        features: dict[str, Any] = {"image": {"_type": "Image"}}
        if classes is not None:
            columns["label"] = pa.array([r.label for r in found], pa.int64())
            features["label"] = {"names": list(classes), "_type": "ClassLabel"}
        hub = json.dumps({"info": {"features": features}})
        table = pa.table(columns).replace_schema_metadata({"huggingface": hub, _KEY: note.text()})
        with written_whole(path) as temporary:
            pq.write_table(table, temporary, row_group_size=256, compression="none", use_dictionary=False)

    def note(self, path: Path) -> Note | None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return Note.read((pq.read_schema(path).metadata or {}).get(_KEY.encode()))
        except (pa.ArrowException, OSError):
            return None


def _image_type(pa: Any) -> Any:
    return pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class LatentShards:
    """Safetensors shards of what a VAE's encoder says."""

    name, record, format, suffix, png = "latents", latents.RECORD, latents.FORMAT, ".safetensors", False

    def __init__(self, vae: str | Path, dtype: str, batch: int, device: str | None) -> None:
        if dtype not in _DTYPES:
            raise unknown("dtype of latents", dtype, _DTYPES)
        self._dtype, self._dtype_name, self._batch = _DTYPES[dtype], dtype, batch
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._vae, self._folder = _loaded(Path(os.path.expanduser(vae)), self._device)
        config = self._vae.config
        self.mode: str | None = {1: "L", 3: "RGB"}.get(config.in_channels)
        if self.mode is None:
            raise Unsupported(f"the VAE in {self._folder} takes {config.in_channels} channels; pictures have 1 or 3.")
        if getattr(config, "latents_mean", None) is not None or getattr(config, "latents_std", None) is not None:
            raise Unsupported(
                f"the VAE in {self._folder} shifts and scales each channel by its own number (latents_mean, "
                "latents_std); only shift_factor and scaling_factor are read."
            )
        self._hash = latents.digest(self._vae.state_dict())
        self._factor = 2 ** (len(config.block_out_channels) - 1)

    def rows(self, side: tuple[int, int]) -> int:
        return _SHARD_LATENTS

    def refuse_side(self, side: tuple[int, int]) -> None:
        if any(n % self._factor for n in side):
            nearest = max(1, round(min(side) / self._factor)) * self._factor
            raise DataError(
                f"the VAE in {self._folder} reduces pictures by {self._factor}, and {side[0]}×{side[1]} is not "
                f"divisible by it; cut them: --size {nearest}."
            )

    def shape(self, side: tuple[int, int]) -> list[int]:
        return [self._vae.config.latent_channels, *(n // self._factor for n in side)]

    def settings(self) -> dict[str, Any]:
        return {"vae": self._hash, "dtype": self._dtype_name, **self._shift_and_scale()}

    def _shift_and_scale(self) -> dict[str, float]:
        config = self._vae.config
        return {"shift": float(getattr(config, "shift_factor", None) or 0.0), "scale": float(config.scaling_factor)}

    def told(self) -> dict[str, Any]:
        # Without diffusers' own entries, one of which is the folder's place on this machine.
        config = {k: v for k, v in self._vae.config.items() if not k.startswith("_")}
        vae = {"name": self._folder.resolve().name, "hash": self._hash, "config": config}
        return {"dtype": self._dtype_name, **self._shift_and_scale(), "vae": vae}

    def write(self, path: Path, rows: Iterator[Row], note: Note, side: tuple[int, int], classes: _Names) -> None:
        labels: list[int] = []
        parts: list[tuple[Tensor, Tensor]] = []
        while batch := list(itertools.islice(rows, self._batch)):
            parts.append(self._encoded(batch))
            labels += [row.label for row in batch]
        if parts:
            mean, std = (torch.cat(both) for both in zip(*parts, strict=True))
        else:  # every picture of this shard was skipped
            mean = std = torch.empty(0, *self.shape(side), dtype=self._dtype)
        tensors = {"mean": mean, "std": std}
        if classes is not None:
            tensors["label"] = torch.tensor(labels, dtype=torch.int64)
        note.digest = latents.digest(tensors)
        write_tensors(path, tensors, {_KEY: note.text()})

    @torch.inference_mode()
    def _encoded(self, batch: list[Row]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, shape [B, C, h, w] each, as they are stored."""
        pixels = torch.from_numpy(np.stack([row.made for row in batch]))
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        x = (pixels.to(self._device).float() - 127.5) / 127.5
        gaussian = self._vae.encode(x.contiguous()).latent_dist
        mean, std = (part.to(self._dtype).cpu() for part in (gaussian.mean, gaussian.std))
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise DataError(
                f"the VAE in {self._folder} gives numbers that {self._dtype_name} cannot hold, in one of "
                f"{batch[0].name} … {batch[-1].name}: --dtype float32."
            )
        return mean, std

    def note(self, path: Path) -> Note | None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as f:
                return Note.read((f.metadata() or {}).get(_KEY))
        except (SafetensorError, OSError):
            return None


def _loaded(folder: Path, device: str) -> tuple[Any, Path]:
    """diffusers' AutoencoderKL in a folder, or in the ``vae`` of a pipeline's folder; and where it was."""
    require("diffusers", "diffusers", "VAEs are read by diffusers")
    from diffusers import AutoencoderKL

    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    expected = "expected a local folder with config.json and .safetensors of diffusers' AutoencoderKL (--vae)"
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError) as e:
        raise DataError(f"no VAE in {folder}: {e}; {expected}.") from e
    if kind != "AutoencoderKL":
        raise DataError(f"{folder} holds {kind}; {expected}.")
    try:
        found = AutoencoderKL.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, torch_dtype=torch.float32
        )
        return found.to(device).eval(), folder
    except Exception as e:  # diffusers, safetensors and torch each raise their own
        raise DataError(f"cannot load the VAE in {folder}: {e}; {expected}.") from e


def require(module: str, extra: str, what: str) -> None:
    """See that an optional package is there.

    Raises:
        DataError: if it is not, with what to install.
    """

    try:
        importlib.import_module(module)
    except ImportError as e:
        raise DataError(f"{what}, which is not installed: pip install 'reparam[{extra}]'.") from e
