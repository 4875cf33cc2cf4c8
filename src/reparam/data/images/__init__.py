"""Pictures from folders, archives, Parquet and tar shards, numpy arrays and the hub.

Every kind of file is first turned into a :class:`.source.Source`: how many pictures there are, in
which order, with which labels. All of them are then decoded by the same code, in threads: into one
tensor in memory here, or as they are asked for by :class:`reparam.data.streams.Stream`. Nothing is
written to disk, and names found inside archives are only ever shown.
"""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import DataError, unknown
from . import hub as hubs
from .arrays import of_arrays
from .folders import SUFFIXES, in_archive, in_folder, of_entries
from .labels import declared
from .messages import shown
from .paths import READS, found
from .source import Options, Source
from .tars import PACKED, of_tars, packed_archive

__all__ = ["Options", "Pictures", "Source", "asked", "load_images", "opened", "read"]


@dataclass(frozen=True)
class Pictures:
    """Pictures in memory, as they were found.

    Attributes:
        pixels: shape [N, C, H, W], uint8, C = 1 (grey) or 3 (RGB).
        labels: the number of each picture's class, shape [N], int64; None where there are none.
        classes: the names of the classes; () without labels.
        remarks: what was skipped or converted, a short sentence each, for the preflight.
    """

    pixels: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    remarks: tuple[str, ...]


def load_images(
    path: str,
    size: int | list[int] | None = None,
    resize: str | None = None,
    colour: str | None = None,
    labels: str | None = None,
    column: str | None = None,
    classes: int | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
    hub: str | None = None,
) -> Pictures:
    """The pictures at ``path``, upright, 8 bits a channel, all of one size.

    A folder or a .zip gives its pictures sorted by name; the first-level sub-folders are the
    classes if all pictures lie in some. A .parquet file (or a folder of shards) has the layout of
    the Hugging Face hub. A .tar file (or a folder of shards) holds a picture a key (``0001.jpg``), and
    its class in ``0001.cls`` or under "label" in ``0001.json``, if anywhere; without either the
    sub-folders are the classes. A .npz or .npy file holds uint8 of shape [N, H, W], [N, H, W, C] or
    [N, C, H, W]; C is the last or the second axis, whichever has length 1 or 3 (failing that, 4),
    and an array in which both have is refused.

    Transparent pixels are laid over white; 16-bit grey is divided by 257; colour profiles are ignored.

    Args:
        path: the folder or the file; ``~`` is the home directory. Or a pattern of shards
            (``train-{0000..0009}.tar``, ``*.parquet``), or a data set on the hub,
            ``hub:OWNER/NAME[/FOLDER][@REVISION][:SPLIT]``; the split is train by default.
        size: the side in pixels, or [height, width].
        resize: how to bring pictures to ``size``: "crop" scales until the picture covers it and
            cuts out the centre, "squash" ignores the aspect ratio. None does not scale.
        colour: "rgb", "grey", or None: grey only if every picture is stored as grey.
        labels: None finds them, "none" ignores them; else the column or array that holds them.
        column: the column or array that holds the pictures; in tar shards, what follows the key (``jpg``).
        classes: how many classes to expect; names are padded with numbers up to it.
        skip_bad: leave out the files that cannot be used, and say so in a remark.
        limit: take at most so many pictures, evenly spread over their order.
        hub: a folder of local copies of data sets of the hub, laid out as OWNER/NAME/**/*.parquet; None takes
            that of the environment's REPARAM_HUB, if there is one.

    Raises:
        UnknownName: if ``resize`` or ``colour`` is none of these.
        DataError: if there are no pictures at ``path`` or they cannot be used as they are; if an
            archive or a picture would unpack to something enormous; if memory does not suffice;
            or if Pillow or pyarrow is needed and not installed.
    """
    ask = asked(size, resize, colour, labels, column, classes, skip_bad, limit)
    with contextlib.ExitStack() as stack:
        return read(opened(path, ask, stack, hub), ask)


def asked(
    size: int | list[int] | None = None,
    resize: str | None = None,
    colour: str | None = None,
    labels: str | None = None,
    column: str | None = None,
    classes: int | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
) -> Options:
    """The options of :func:`load_images`, or its errors."""
    ask = Options(_checked_size(size), resize, colour, labels, column, classes, skip_bad, limit)
    _refuse_options(ask)
    return ask


def opened(path: str, ask: Options, stack: contextlib.ExitStack, hub: str | None = None) -> Source:
    """The pictures at ``path``, none of them read yet; what has to be closed after them goes on the stack.

    Raises:
        DataError: as :func:`load_images`, of what is wrong already.
    """
    _require("PIL", "pictures are read by Pillow")
    what = shown(path, 400)
    if path.startswith(hubs.PREFIX):
        files, remarks = hubs.shards(path, hub)
        source = _shards(files, what, ask)
        source.remarks += remarks
    else:
        files = found(path)
        if len(files) == 1:
            what = shown(str(files[0]), 400)
        source = _of_path(files[0], what, ask, stack) if len(files) == 1 else _shards(files, what, ask)
    source.classes = declared(source, ask.classes)
    if ask.classes is not None and source.labels is None:
        source.remarks.append(f"no labels, though data.classes={ask.classes}")
    return source


def read(source: Source, ask: Options) -> Pictures:
    """All of a source's pictures, or so many as are asked for; errors as of :func:`load_images`."""
    from .decoding import Reading

    reading = Reading(source, ask)
    pixels = torch.from_numpy(reading.read())
    kept = None if source.labels is None else torch.from_numpy(source.labels[reading.kept])
    return Pictures(pixels, kept, source.classes, (*source.remarks, *reading.remarks()))


def _checked_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = [size, size] if _is_count(size) else size
    if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(_is_count(side) for side in sides):
        raise DataError(
            f"data.size is {size!r}; expected a side in pixels or [height, width]: --set data.size=64 "
            "or --set data.size=[48,64]."
        )
    return sides[0], sides[1]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _refuse_options(ask: Options) -> None:
    if ask.resize not in (None, "crop", "squash"):
        raise unknown("way to resize", ask.resize, ["crop", "squash"])
    if ask.colour not in (None, "rgb", "grey"):
        raise unknown("colour", ask.colour, ["rgb", "grey"])
    if ask.resize is not None and ask.size is None:
        raise DataError(f"data.resize={ask.resize} needs a size to bring pictures to: --set data.size=64.")
    if ask.limit is not None and not (_is_count(ask.limit) and ask.limit >= 2):
        raise DataError(f"data.limit is how many pictures to take, at least 2, found {ask.limit!r}.")
    if ask.classes is not None and not _is_count(ask.classes):
        raise DataError(f"data.classes is a number of classes, at least 1, found {ask.classes!r}.")


def _require(module: str, what: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as e:
        raise DataError(f"{what}, which is not installed: pip install 'reparam[images]'.") from e


def _of_path(path: Path, what: str, ask: Options, stack: contextlib.ExitStack) -> Source:
    suffix = path.suffix.lower()
    if path.is_dir():
        return _in_folder(path, what, ask)
    if suffix == ".zip":
        return of_entries(in_archive(path, what, stack), what, ask, archive=True)
    if suffix in (".parquet", ".tar"):
        return _shards([path], what, ask)
    if suffix in (".npz", ".npy"):
        return of_arrays(path, what, ask)
    if path.name.lower().endswith(PACKED):
        raise DataError(packed_archive(path))
    kind = "one picture" if suffix in SUFFIXES else "not something pictures are read from"
    raise DataError(f"{what} (data.path) is {kind}; expected {READS}.")


def _in_folder(path: Path, what: str, ask: Options) -> Source:
    """The pictures in a folder, or in the shards there."""
    entries = in_folder(path)
    if any(entry.ends(SUFFIXES) for entry in entries):
        return of_entries(entries, what, ask)

    def inside(endings: str | tuple[str, ...]) -> list[Path]:
        return [path.joinpath(*entry.parts) for entry in entries if entry.ends(endings)]

    parquet, tar = inside(".parquet"), inside(".tar")
    if parquet and tar:
        raise DataError(
            f"{what} holds both .parquet and .tar shards; expected one kind. Give a pattern of it: "
            f"--set data.path='{what}/*.tar'."
        )
    if parquet or tar:
        return _shards(parquet or tar, what, ask)
    if packed := inside(PACKED):
        raise DataError(packed_archive(packed[0]))
    return of_entries(entries, what, ask)


def _shards(files: list[Path], what: str, ask: Options) -> Source:
    if files[0].suffix.lower() == ".tar":
        return of_tars(files, what, ask)
    _require("pyarrow", "Parquet files are read by pyarrow")
    from .parquet import of_shards

    return of_shards(files, what, ask)
