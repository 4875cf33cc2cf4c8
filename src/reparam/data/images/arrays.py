"""Pictures in .npz and .npy files."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import DataError
from . import memory
from .labels import numbered
from .messages import amount, shown
from .source import Item, Options, Source, refuse_names

_LABELS = ("y", "label", "labels", "arr_1")
_WANTED = "Expected uint8, 0…255, of shape [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1, 3 or 4."


def of_arrays(path: Path, what: str, ask: Options) -> Source:
    """The pictures in an array, and the labels in another."""
    try:
        x, values = (_npz if path.suffix.lower() == ".npz" else _npy)(path, what, ask)
    except DataError:
        raise
    except Exception as e:  # numpy, zipfile, zlib and Python's own parser each raise their own
        raise DataError(f"cannot read {what}: {e}. Expected arrays saved by numpy, not pickled.") from e
    x = _channels_last(x, what)
    source = Source(what, len(x), lambda chosen: (Item(f"picture {i}", x[i].copy) for i in chosen), unit="picture")
    if values is not None:
        source.labels, source.classes = numbered(values, (), f"the labels of {what}", ask)
    return source


class _Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def _npy(path: Path, what: str, ask: Options) -> tuple[np.ndarray, None]:
    refuse_names(ask, what)
    found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    _refuse_not_pictures("the array", _Header(found.shape, found.dtype), what)
    return found, None


def _npz(path: Path, what: str, ask: Options) -> tuple[np.ndarray, np.ndarray | None]:
    """The array of pictures and the labels. Of the others only the headers are read."""
    headers = _headers(path)
    key = _picture_key(headers, ask, what)
    _refuse_not_pictures(shown(key), headers[key], what)
    labels = _label_key(headers, headers[key].shape[0], ask, what)
    need = math.prod(headers[key].shape)
    if (free := memory.too_little(need)) is not None:
        raise DataError(
            f"array {key!r} of {what} takes {amount(need)} unpacked, and {amount(free)} of memory is available. Save "
            "it as a .npy file, which is read in pieces, and take fewer pictures: --set data.limit=10000."
        )
    with np.load(path, allow_pickle=False) as loaded:
        return loaded[key], None if labels is None else loaded[labels]


def _headers(path: Path) -> dict[str, _Header]:
    """Shape and dtype of every array in a .npz file, by name."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as stream:
                if name.endswith(".npy") and (reader := readers.get(np.lib.format.read_magic(stream))):
                    shape, _, dtype = reader(stream)
                    headers[name.removesuffix(".npy")] = _Header(shape, dtype)
    return headers


def _picture_key(headers: dict[str, _Header], ask: Options, what: str) -> str:
    if ask.column is not None:
        return _asked_key(headers, ask.column, "data.column", what)
    # Without any of bytes, another array of such a shape is what the error had better be about.
    like = [key for key, header in headers.items() if len(header.shape) in (3, 4)]
    found = [key for key in like if headers[key].dtype == np.uint8] or like[:1]
    if not found:
        raise DataError(f"{what} holds no pictures: {_listed(headers, headers) or 'nothing'}. {_WANTED}")
    if len(found) > 1:
        listed = _listed(headers, found)
        raise DataError(f"{what} holds the pictures {listed}; say which: --set data.column={found[0]}.")
    return found[0]


def _label_key(headers: dict[str, _Header], count: int, ask: Options, what: str) -> str | None:
    if ask.labels == "none":
        return None
    if ask.labels is not None:
        header = headers[_asked_key(headers, ask.labels, "data.labels", what)]
        if header.dtype.kind not in "biuU" or header.shape != (count,):
            raise DataError(
                f"{what}: {shown(ask.labels)} (data.labels) is {header}; expected whole numbers or text, one for each "
                f"of {count} pictures: shape [{count}]."
            )
        return ask.labels
    fitting = [key for key, header in headers.items() if header.shape == (count,) and header.dtype.kind in "iu"]
    found = [key for key in _LABELS if key in fitting]
    if len(found) > 1:
        raise DataError(
            f"{what} holds the labels {_listed(headers, found)}; say which: --set data.labels={found[0]}, "
            "or --set data.labels=none."
        )
    return found[0] if found else None


def _asked_key(headers: dict[str, _Header], key: str, option: str, what: str) -> str:
    if key not in headers:
        raise DataError(f"{what} has no array {key!r} ({option}); it holds {_listed(headers, headers)}.")
    return key


def _listed(headers: dict[str, _Header], keys: Iterable[str]) -> str:
    return ", ".join(f"{shown(key)} ({headers[key]})" for key in keys)


def _refuse_not_pictures(name: str, header: _Header, what: str) -> None:
    if header.dtype == np.uint8 and len(header.shape) in (3, 4) and 0 not in header.shape:
        return
    remedy = ""
    if header.dtype.kind == "f":
        remedy = " For numbers of any other range, data.name: array takes floats: --set data.name=array."
    elif header.dtype != np.uint8:
        remedy = " If they are pictures, save x.astype(np.uint8)."
    raise DataError(f"{what}: {name} is {header}. {_WANTED}{remedy}")


def _channels_last(x: np.ndarray, what: str) -> np.ndarray:
    """The array as [N, H, W] or, in colour, [N, H, W, C], by the rule that ``load_images`` states."""
    if x.ndim == 3:
        if x.shape[2] == 3:
            raise DataError(
                f"{what} has shape {list(x.shape)}: one colour picture, or {len(x)} grey ones 3 pixels wide. Save "
                "pictures as [N, H, W, 3]."
            )
        return x
    for channels in ((1, 3), (4,)):
        second, last = x.shape[1] in channels, x.shape[3] in channels
        if second and last:
            raise DataError(
                f"{what} has shape {list(x.shape)}: the channels may be the second axis or the last. Save grey "
                "pictures as [N, H, W], or pictures with more than 4 pixels a side."
            )
        if second or last:
            x = x if last else np.moveaxis(x, 1, 3)
            return x[..., 0] if x.shape[3] == 1 else x
    raise DataError(f"{what} has shape {list(x.shape)}, without an axis of 1, 3 or 4 channels. {_WANTED}")
