"""Samples to be scored, wherever they are: of a run, in files, in memory."""

from __future__ import annotations

import contextlib
import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Data
from ..data.base import as_bytes
from ..errors import Conflict, DataError
from ..metrics import SampleSet
from .recipe import RunConfig, from_dict, parse_yaml
from .run import to_uint8
from .sampling import told_beside

_BYTES = "bytes as they are"


def run_in(samples: Any) -> tuple[RunConfig, Path] | None:
    """The recipe of a run and its folder, if that is what samples are."""
    if not isinstance(samples, str | Path):
        return None
    folder = Path(samples).expanduser()
    if not (folder / "recipe.yaml").is_file() or not (folder / "model.safetensors").is_file():
        return None
    if not (folder / "samples.npz").is_file():
        raise DataError(f"{folder} is a run without samples.npz. Draw samples (reparam sample) and evaluate those.")
    return from_dict(parse_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"), str(folder))), folder


def samples_to_score(
    samples: Any, data: Data, value_range: tuple[float, float] | None, labels: np.ndarray | Tensor | None
) -> tuple[SampleSet, str | None]:
    """What is scored, and the rule by which it became bytes; the arguments are those of ``evaluate``.

    Raises:
        DataError: if it cannot be read, holds NaN, or numbers that are not what is said of them.
        Conflict: if something is said of samples that does not concern them.
    """
    if isinstance(samples, str | Path):
        path = Path(samples).expanduser()
        if labels is not None:
            raise Conflict(f"labels are for samples in an array; those of {path} are read with them.")
        run = run_in(path)
        if run and value_range is not None:
            raise Conflict(
                f"--range is for floats, and {path} is a run, whose samples are stored as they are compared."
            )
        if run:
            return _of_array_file(path / "samples.npz", data, None, to_uint8(data), str(path))
        rule = drawn_as(path).get("to_uint8")
        if path.suffix in (".npz", ".npy") and (not data.pictures or value_range is not None or holds_floats(path)):
            return _of_array_file(path, data, value_range, None, str(path))
        if not data.pictures:
            raise DataError(f"{path}: the reference holds vectors; expected samples in a .npz or .npy file.")
        if value_range is not None:
            raise Conflict(f"--range is for arrays of floats, and {path} holds pictures.")
        return _pictures(str(samples), data), rule or _BYTES
    held = torch.as_tensor(np.asarray(samples) if not isinstance(samples, Tensor) else samples.detach().cpu())
    return _of_array(held, None if labels is None else _labels(labels, held, data), data, value_range, None, "samples")


def _labels(labels: np.ndarray | Tensor, samples: Tensor, data: Data) -> Tensor:
    y = torch.as_tensor(labels).cpu()
    if y.shape != samples.shape[:1]:
        raise DataError(f"labels have shape {list(y.shape)}, expected one for each of {len(samples)} samples.")
    if y.is_floating_point() or y.dtype == torch.bool:
        raise DataError(f"labels are {str(y.dtype).removeprefix('torch.')}; expected the numbers of classes, int64.")
    if data.classes and len(y) and not 0 <= int(y.min()) <= int(y.max()) < len(data.classes):
        raise DataError(
            f"labels go from {int(y.min())} to {int(y.max())}; the reference {data.name} has classes 0 to "
            f"{len(data.classes) - 1}."
        )
    return y.long()


def drawn_as(samples: Any) -> dict[str, Any]:
    """What ``reparam sample`` wrote of the model, of how it was drawn from, and of labels; {} for other samples."""
    if not isinstance(samples, str | Path):
        return {}
    path = Path(samples).expanduser()
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as loaded:
                text = str(loaded["about"])
        else:
            text = told_beside(path).read_text(encoding="utf-8")
        found = json.loads(text)
        return found if isinstance(found, dict) else {}
    return {}


def _pictures(path: str, data: Data) -> SampleSet:
    """Pictures at a path, with the colour of the reference; their labels where their classes are the reference's."""
    from ..data.images import asked, opened, read
    from ..data.streams import keep_open, stream_of, too_large

    ask = asked(colour="grey" if data.shape[0] == 1 else "rgb")
    with contextlib.ExitStack() as stack:
        source = opened(path, ask, stack)
        if too_large(source, ask):
            stream = stream_of(source, ask)
            keep_open(stream, stack)
            found, classes, remarks = SampleSet.read(stream, path), stream.classes, tuple(source.remarks)
        else:
            pictures = read(source, ask)
            found, classes = SampleSet.held(pictures.pixels, pictures.labels, path), pictures.classes
            remarks = pictures.remarks
    if found.shape == data.shape:
        refuse_dark(found)
    asked_for = drawn_as(path).get("labels")
    if asked_for and len(asked_for) == found.count and max(asked_for) < len(data.classes):
        labels: Tensor | None = torch.tensor(asked_for)
    else:
        labels = found.labels if classes == data.classes else None
    return replace(found, labels=labels, remarks=remarks)


def refuse_dark(found: SampleSet) -> None:
    """Bytes that are 0 and 1 only are floats in [0, 1] that were cast."""
    some = found.spread(256).all()
    if some.numel() and int(some.max()) <= 1:
        raise DataError(
            f"{found.name} holds bytes from {int(some.min())} to {int(some.max())}: floats in [0, 1] that were cast, "
            "by the look of it. Expected 0 … 255: save round(255 x)."
        )


def holds_floats(path: Path) -> bool:
    """Whether an array file holds no bytes that could be pictures."""
    try:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r")
        if isinstance(loaded, np.ndarray):
            return loaded.dtype != np.uint8
        with loaded:
            return not any(loaded[key].dtype == np.uint8 and loaded[key].ndim > 2 for key in loaded.files)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise DataError(f"cannot read {path}: {e}. Expected arrays saved by numpy, not pickled.") from e


def _of_array_file(
    path: Path, data: Data, value_range: tuple[float, float] | None, rule: str | None, name: str
) -> tuple[SampleSet, str | None]:
    x, y = _arrays(path)
    if x.dtype.kind not in "fiub":
        raise DataError(f"{name} holds {x.dtype}; expected real numbers.")
    labels = torch.from_numpy(y).long() if y is not None and y.shape == x.shape[:1] and y.dtype.kind in "iu" else None
    return _of_array(torch.from_numpy(x), labels, data, value_range, rule, name)


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The samples in an array file, and what may be their labels."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded, None
        with loaded:
            keys = list(loaded.files)
            key = "x" if "x" in keys else keys[0] if len(keys) == 1 else None
            key = next((k for k in ("arr_0", "samples") if key is None and k in keys), key)
            if key is not None:
                return loaded[key], loaded["y"] if "y" in keys else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise DataError(f"cannot read {path}: {e}. Expected arrays saved by numpy, not pickled.") from e
    raise DataError(f"{path} holds the arrays {', '.join(keys)}; call the samples x.")


def _of_array(
    x: Tensor,
    y: Tensor | None,
    data: Data,
    value_range: tuple[float, float] | None,
    rule: str | None,
    name: str,
) -> tuple[SampleSet, str | None]:
    if x.ndim < 2:
        raise DataError(f"{name} has shape {list(x.shape)}; expected one sample a row, [N, …].")
    if x.is_floating_point() and not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).flatten(1).any(1).sum())
        raise DataError(f"{name}: {bad} of {len(x)} samples hold NaN or infinity.")
    if 0 in x.shape:
        raise DataError(f"{name} is empty: shape {list(x.shape)}; a score needs samples.")
    if not data.pictures:
        if value_range is not None:
            raise Conflict("--range says what black and white are, and these are no pictures.")
        if x.dtype == torch.uint8 and x.ndim in (3, 4):
            raise DataError(
                f"{name} holds bytes of shape {list(x.shape)}, pictures by the look of it, and the reference "
                f"{data.name} numbers of shape {list(data.shape)}. Give both as bytes, or both as floats in the same "
                "units."
            )
        return SampleSet.held(((x.double() - data.mean) / data.std).float(), y, name), None
    x = _channels_second(x, data.shape, name)
    if x.dtype == torch.uint8:
        if value_range is not None:
            raise Conflict(f"--range is for floats, and {name} holds bytes.")
        found = SampleSet.held(x, y, name)
        if rule is None:  # else they are a run's, whose model may well draw black
            refuse_dark(found)
        return found, rule or _BYTES
    return SampleSet.held(_to_bytes(x, value_range, name), y, name), _rule(value_range)


def _channels_second(x: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """Pictures [N, C, H, W]; the last axis is that of channels where only this fits the reference."""
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4:
        raise DataError(f"{name} has shape {list(x.shape)}; expected pictures [N, {', '.join(map(str, shape))}].")
    last = tuple(x.shape[i] for i in (3, 1, 2))
    return x.movedim(3, 1) if tuple(x.shape[1:]) != shape and last == shape else x


def _rule(value_range: tuple[float, float] | None) -> str:
    low, high = value_range or (0.0, 0.0)
    return f"round((x {'+' if low < 0 else '-'} {abs(low):g})/{high - low:g}·255), cut off at 0 and 255"


def _to_bytes(x: Tensor, value_range: tuple[float, float] | None, name: str) -> Tensor:
    """Float pictures as bytes, where it is said what black and white are, and the numbers bear it out."""
    least, most = (float(v) for v in (x.min(), x.max()))
    seen = f"{str(x.dtype).removeprefix('torch.')} from {least:.3g} to {most:.3g}"
    if not x.is_floating_point() or value_range is None:
        raise DataError(
            f"{name} holds {seen}, and pictures are bytes, uint8 from 0 to 255. Of floats say what black and white "
            "are: --range -1 1 or --range 0 1 (value_range=(-1, 1))."
        )
    low, high = value_range
    if not low < high or not math.isfinite(high - low):
        raise DataError(f"--range {low:g} {high:g}: expected two increasing numbers, black and white.")
    width = high - low
    if most > high + width / 2 or least < low - width / 2:
        raise DataError(f"{name} holds {seen}, far outside --range {low:g} {high:g}. Say the right one, or clip first.")
    if least >= low + 0.4 * width or most <= high - 0.4 * width:
        raise DataError(
            f"{name} holds {seen}, which leaves much of --range {low:g} {high:g} unused: floats in another range, "
            "by the look of it."
        )
    parts = [as_bytes((part.double() - low) / width * 255) for part in x.split(1024)]
    return torch.cat(parts)
