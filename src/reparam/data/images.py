"""Pictures from folders, zip archives, Parquet files and numpy arrays, read into memory.

Every source is first turned into a :class:`_Source`: how many pictures there are, in which order,
with which labels. All of them are then decoded by the same code, in threads, into one tensor.
Nothing is written to disk, and names found inside archives are only ever shown.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import itertools
import json
import os
import re
import threading
import warnings
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, unknown

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Pillow reads many more formats, some of which start other programs (EPS); these are enough.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
_LABELS = ("label", "labels", "fine_label", "coarse_label", "class", "target", "y")
_ARRAY_LABELS = ("y", "label", "labels", "arr_1")
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
_READS = (
    "a folder of pictures, a folder of .parquet shards, a .zip of pictures, a .parquet file, "
    "or a .npz or .npy file of uint8 pictures"
)
_CLUTTER = {"thumbs.db", "desktop.ini", "__macosx"}

_GIB = 2**30
_BOMB_RATIO = 50  # no archive of real pictures unpacks to so many times its own size …
_BOMB_BYTES = 10**9  # … but a small one of drawings might
_BATCH_BYTES = 64 * 2**20  # encoded bytes of a Parquet file held at once
_MOST_IDS = 1000  # labels that skip numbers are fine up to here; beyond, they may be anything


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
) -> Pictures:
    """The pictures at ``path``, upright, 8 bits a channel, all of one size.

    A folder or a .zip gives its pictures sorted by name; the first-level sub-folders are the
    classes if all pictures lie in some. A .parquet file (or a folder of shards) has the layout of
    the Hugging Face hub. A .npz or .npy file holds uint8 of shape [N, H, W], [N, H, W, C] or
    [N, C, H, W]; C is the last or the second axis, whichever has length 1 or 3 (failing that, 4),
    and an array in which both have is refused.

    Transparent pixels are laid over white; 16-bit grey is divided by 257; colour profiles are ignored.

    Args:
        path: the folder or the file; ``~`` is the home directory.
        size: the side in pixels, or [height, width].
        resize: how to bring pictures to ``size``: "crop" scales until the picture covers it and
            cuts out the centre, "squash" ignores the aspect ratio. None does not scale.
        colour: "rgb", "grey", or None: grey only if every picture is stored as grey.
        labels: None finds them, "none" ignores them; else the column or array that holds them.
        column: the column or array that holds the pictures.
        classes: how many classes to expect; names are padded with numbers up to it.
        skip_bad: leave out the files that cannot be used, and say so in a remark.
        limit: take at most so many pictures, evenly spread over their order.

    Raises:
        UnknownName: if ``resize`` or ``colour`` is none of these.
        DataError: if there are no pictures at ``path`` or they cannot be used as they are; if an
            archive or a picture would unpack to something enormous; if memory does not suffice;
            or if Pillow or pyarrow is needed and not installed.
    """
    ask = _Ask(_checked_size(size), resize, colour, labels, column, classes, skip_bad, limit)
    _refuse_options(ask)
    _pillow()
    with contextlib.ExitStack() as stack:
        source = _source(_found(path), ask, stack)
        names = _declared(source, classes)
        reading = _Reading(source, ask)
        reading.read()
    if len(reading.kept) < 2:
        raise DataError(f"{source.what}: {_count(len(reading.kept), 'picture')} to use; at least 2 are needed.")
    assert reading.pixels is not None
    kept = None if source.labels is None else torch.from_numpy(source.labels[reading.kept])
    remarks = (*source.remarks, *reading.remarks())
    if classes is not None and kept is None:
        remarks += (f"no labels, though data.classes={classes}",)
    return Pictures(reading.pixels[: len(reading.kept)], kept, names, remarks)


# What is asked for ---------------------------------------------------------------------------------


class _Ask(NamedTuple):
    """The options of :func:`load_images`; ``size`` is (height, width)."""

    size: tuple[int, int] | None
    resize: str | None
    colour: str | None
    labels: str | None
    column: str | None
    classes: int | None
    skip_bad: bool
    limit: int | None


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


def _refuse_options(ask: _Ask) -> None:
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


def _found(path: str) -> Path:
    if not path:
        raise DataError(f"no path is given; expected {_READS}: --set data.path=PATH.")
    try:
        file = Path(path).expanduser()
        if file.exists():
            return file
    except (OSError, RuntimeError, ValueError) as e:
        raise DataError(f"cannot look at {_shown(str(path))} (data.path): {e}.") from e
    raise DataError(f"no file or folder {_shown(str(file))} (data.path); expected {_READS}.")


def _pillow() -> None:
    try:
        from PIL import Image
    except ImportError as e:
        raise DataError("pictures are read by Pillow, which is not installed: pip install 'reparam[images]'.") from e
    Image.init()  # registers every format now: doing it in the threads would be a race


def _pyarrow() -> tuple[Any, Any, Any]:
    try:
        names = ("pyarrow", "pyarrow.compute", "pyarrow.parquet")
        arrow, compute, parquet = (importlib.import_module(name) for name in names)
    except ImportError as e:
        raise DataError(
            "Parquet files are read by pyarrow, which is not installed: pip install 'reparam[images]'."
        ) from e
    return arrow, compute, parquet


# Sources -------------------------------------------------------------------------------------------


class _Item(NamedTuple):
    """A picture to decode: what to call it, and what opens it (a file, or an array [H, W(, C)])."""

    name: str
    open: Callable[[], Any]


@dataclass
class _Source:
    """Pictures that are still to be decoded.

    Attributes:
        what: the path, for messages.
        count: how many ``items`` yields.
        labels: shape [count], int64, or None.
        bad: names and reasons of what is known to be unusable already.
        unit: what a picture is called in messages.
    """

    what: str
    count: int
    items: Iterable[_Item]
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    remarks: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    unit: str = "file"


def _source(path: Path, ask: _Ask, stack: contextlib.ExitStack) -> _Source:
    suffix = path.suffix.lower()
    what = _shown(str(path), 400)
    if path.is_dir():
        entries = sorted(_walk(path), key=lambda entry: entry.parts)
        shards = [path.joinpath(*entry.parts) for entry in entries if entry.suffix == ".parquet"]
        if shards and not any(entry.suffix in _suffixes() for entry in entries):
            return _parquet(shards, what, ask)
        return _entries(entries, what, ask)
    if path.is_file() and suffix == ".zip":
        return _entries(_without_common_top(_unzipped(path, what, stack)), what, ask, archive=True)
    if path.is_file() and suffix == ".parquet":
        return _parquet([path], what, ask)
    if path.is_file() and suffix in (".npz", ".npy"):
        return _arrays(path, what, ask)
    if suffix in _suffixes():
        raise DataError(f"{what} is one picture; expected {_READS}. Give its folder: --set data.path=FOLDER.")
    raise DataError(f"{what} (data.path) is not something pictures are read from; expected {_READS}.")


def _spread(count: int, ask: _Ask, remarks: list[str]) -> np.ndarray:
    """The indices to take of ``count`` pictures, evenly spread where there is a limit."""
    if ask.limit is None or ask.limit >= count:
        return np.arange(count)
    remarks.append(f"{ask.limit} of {count} pictures taken, evenly spread (data.limit)")
    return np.arange(ask.limit) * count // ask.limit


# Folders and zip archives --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A file in a folder or an archive; ``parts`` is its path inside, ``top`` one taken off it."""

    parts: tuple[str, ...]
    open: Callable[[], BinaryIO]
    top: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.parts[-1]).suffix.lower()

    @property
    def name(self) -> str:
        return _shown("/".join(self.top + self.parts))


@functools.cache
def _suffixes() -> tuple[str, ...]:
    from PIL import features

    return (*_SUFFIXES, ".avif") if features.check("avif") else _SUFFIXES


def _ignored(part: str) -> bool:
    return part.startswith(".") or part.lower() in _CLUTTER


def _walk(folder: Path, parts: tuple[str, ...] = (), above: frozenset[tuple[int, int]] = frozenset()) -> list[_Entry]:
    """Every file below ``folder``; links are followed, except in circles."""
    entries: list[_Entry] = []
    try:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            return []
        with os.scandir(folder) as found:
            for item in found:
                if _ignored(item.name):
                    continue
                below = (*parts, item.name)
                if _is_folder(item):
                    entries += _walk(Path(item.path), below, above | {here})
                else:
                    entries.append(_Entry(below, functools.partial(_opened, item.path)))
    except OSError as e:
        raise DataError(f"cannot list the folder {_shown(str(folder), 400)}: {e.strerror or e}.") from e
    return entries


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link to itself
        return False


def _opened(path: str) -> BinaryIO:
    # A named pipe would be waited for for ever.
    if os.path.exists(path) and not os.path.isfile(path):
        raise _Bad("not a regular file")
    return open(path, "rb")


def _unzipped(path: Path, what: str, stack: contextlib.ExitStack) -> list[_Entry]:
    """The files in an archive, in order; they are unpacked one at a time, in memory, when opened."""
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
        raise DataError(f"cannot read {what}: {e}. Expected a .zip archive of pictures.") from e
    infos = [info for info in archive.infolist() if not info.is_dir()]
    _refuse_bomb(infos, path.stat().st_size, what)
    locked = sum(info.flag_bits & 1 for info in infos)
    if locked:
        raise DataError(
            f"{what} is encrypted ({locked} of its {_count(len(infos), 'file')}); expected an archive without a "
            "password. Unpack it and give the folder: --set data.path=FOLDER."
        )
    lock = threading.Lock()  # the archive's own bookkeeping of open entries is not safe in threads
    entries = []
    for info in infos:
        parts = tuple(part for part in info.filename.replace("\\", "/").split("/") if part not in ("", ".", ".."))
        if parts and not any(map(_ignored, parts)):
            entries.append(_Entry(parts, functools.partial(_inflated, archive, info, lock)))
    return sorted(entries, key=lambda entry: entry.parts)


def _inflated(archive: zipfile.ZipFile, info: zipfile.ZipInfo, lock: threading.Lock) -> BinaryIO:
    # Never more than declared, whatever the stream holds; a stream that holds more fails its checksum.
    with lock, archive.open(info) as stream:
        return io.BytesIO(stream.read(info.file_size))


def _refuse_bomb(infos: list[zipfile.ZipInfo], size: int, what: str) -> None:
    total = sum(info.file_size for info in infos)
    if total > max(_BOMB_BYTES, _BOMB_RATIO * size):
        raise DataError(
            f"{what} is {_amount(size)} and would unpack to {_amount(total)}: a zip bomb, it seems. Pictures do not "
            "shrink like that; if it is not one, unpack it yourself and give the folder: --set data.path=FOLDER."
        )
    free = _available()
    largest = max(infos, key=lambda info: info.file_size, default=None)
    if largest is not None and free is not None and largest.file_size > free:
        raise DataError(
            f"{what}: {_shown(largest.filename)} alone would unpack to {_amount(largest.file_size)}, and "
            f"{_amount(free)} of memory is available. Take it out of the archive."
        )


def _without_common_top(entries: list[_Entry]) -> list[_Entry]:
    """The entries with a folder taken off in which all pictures lie, where there is one."""
    pictures = [entry for entry in entries if entry.suffix in _suffixes()]
    tops = {entry.parts[0] for entry in pictures}
    if len(tops) != 1 or any(len(entry.parts) == 1 for entry in pictures):
        return entries
    inside = [entry for entry in entries if entry.parts[0] in tops and len(entry.parts) > 1]
    rest = [entry for entry in entries if entry.parts[0] not in tops or len(entry.parts) == 1]
    return [_Entry(entry.parts[1:], entry.open, entry.parts[:1]) for entry in inside] + rest


def _entries(entries: list[_Entry], what: str, ask: _Ask, archive: bool = False) -> _Source:
    pictures = [entry for entry in entries if entry.suffix in _suffixes()]
    others = [entry for entry in entries if entry.suffix not in _suffixes()]
    if not pictures:
        there = f" It holds {_count(len(others), 'other file')}, such as {others[0].name}." if others else ""
        raise DataError(f"{what} holds no pictures; looked for {', '.join(_suffixes())}, in sub-folders too.{there}")
    if ask.column is not None or ask.labels not in (None, "none"):
        option = f"data.column={ask.column}" if ask.column is not None else f"data.labels={ask.labels}"
        raise DataError(
            f"{option} names a column, and {what} has none: its labels are the names of its sub-folders. Leave the "
            "option out, or ignore the labels with --set data.labels=none."
        )
    source = _Source(what, 0, (), bad=[(entry.name, "not a picture") for entry in others])
    labels = None if ask.labels == "none" else _folder_labels(pictures, source, archive)
    chosen = _spread(len(pictures), ask, source.remarks)
    source.count = len(chosen)
    source.items = [_Item(pictures[i].name, pictures[i].open) for i in chosen]
    source.labels = None if labels is None else labels[chosen]
    return source


def _folder_labels(pictures: list[_Entry], source: _Source, archive: bool) -> np.ndarray | None:
    top = sum(len(entry.parts) == 1 for entry in pictures)
    if top:
        if top < len(pictures):
            source.remarks.append(
                f"no labels: {top} of {len(pictures)} pictures lie beside the sub-folders, not in one of them"
            )
        return None
    names = sorted({entry.parts[0] for entry in pictures})
    if {name.lower() for name in names} <= _SPLITS:
        remedy = "Unpack it and give one of them" if archive else "Give one of them"
        raise DataError(
            f"the sub-folders of {source.what} are {', '.join(names)}: splits of a data set, not classes. {remedy}: "
            f"--set data.path=FOLDER/{names[-1]} (or take all without labels: --set data.labels=none)."
        )
    if len(names) == 1:
        source.remarks.append(f"all pictures lie in one sub-folder, {_shown(names[0])}: one class")
    source.classes = tuple(_shown(name, 400) for name in names)
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[entry.parts[0]] for entry in pictures], dtype=np.int64)


# Parquet -------------------------------------------------------------------------------------------


class _Shard(NamedTuple):
    file: Path
    schema: Any
    rows: int


def _parquet(files: list[Path], what: str, ask: _Ask) -> _Source:
    source = _Source(what, 0, (), unit="row")
    _look_at_shard_names(files, source)
    shards = [_shard(file) for file in files]
    schema = shards[0].schema
    column = _picture_column(schema, ask, what)
    labels = _label_column(schema, ask, what)
    for shard in shards[1:]:
        _refuse_other_layout(shard, shards[0], [name for name in (column, labels) if name is not None])
    chosen = _spread(sum(shard.rows for shard in shards), ask, source.remarks)
    if labels is not None:
        values = np.concatenate([_label_values(shard, labels) for shard in shards])
        numbers, source.classes = _numbered(values, _class_names(schema, labels), f"column {labels!r} of {what}", ask)
        source.labels = numbers[chosen]
    source.count = len(chosen)
    source.items = _rows(shards, column, chosen)
    return source


def _look_at_shard_names(files: list[Path], source: _Source) -> None:
    """Refuse a folder that holds several splits; remark on shards that are not there."""
    splits = sorted({split for file in files if (split := re.split(r"[-_.]", file.name.lower())[0]) in _SPLITS})
    if len(splits) > 1:
        raise DataError(
            f"{source.what} holds the splits {', '.join(splits)}; training on all would leave nothing to test with. "
            f"Give one file or a folder of one split's shards: --set data.path={_shown(str(files[-1]), 400)}."
        )
    of = [int(found[1]) for file in files if (found := re.search(r"-of-(\d+)", file.stem))]
    if of and max(of) > len(files):
        source.remarks.append(f"{len(files)} of {max(of)} shards are there")


def _shard(file: Path) -> _Shard:
    with _parquet_file(file) as opened:
        return _Shard(file, opened.schema_arrow, opened.metadata.num_rows)


@contextlib.contextmanager
def _parquet_file(file: Path) -> Iterator[Any]:
    arrow, _, parquet = _pyarrow()
    try:
        # With a buffer, column chunks are read piece by piece instead of whole.
        with parquet.ParquetFile(file, buffer_size=2**20) as opened:
            yield opened
    except (arrow.ArrowException, OSError) as e:
        raise DataError(f"cannot read {_shown(str(file), 400)}: {e}. Expected a Parquet file of pictures.") from e


def _picture_column(schema: Any, ask: _Ask, what: str) -> str:
    found = [f.name for f in schema if _holds_pictures(f.type)]
    if ask.column is not None:
        if ask.column in found:
            return ask.column
        raise DataError(
            f"column {ask.column!r} (data.column) of {what} "
            + ("holds no pictures." if ask.column in schema.names else "does not exist.")
            + f" Expected struct<bytes, path> or binary; {_columns(schema)}."
        )
    features = _features(schema)
    marked = [name for name in found if features.get(name, {}).get("_type") == "Image"]
    if len(found) == 1 or len(marked) == 1:
        return marked[0] if len(marked) == 1 else str(found[0])
    if not found:
        raise DataError(f"{what} has no column of pictures (struct<bytes, path> or binary); {_columns(schema)}.")
    raise DataError(f"{what} has the picture columns {', '.join(found)}; say which: --set data.column={found[0]}.")


def _holds_pictures(kind: Any) -> bool:
    types = _pyarrow()[0].types
    if types.is_struct(kind):
        where = kind.get_field_index("bytes")
        return where >= 0 and _holds_pictures(kind.field(where).type) and not types.is_struct(kind.field(where).type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _columns(schema: Any) -> str:
    return "its columns are " + ", ".join(f"{_shown(f.name)} ({f.type})" for f in schema)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What the Hugging Face hub wrote of the columns into the file; {} where it did not."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _class_names(schema: Any, column: str) -> tuple[str, ...]:
    names = _features(schema).get(column, {}).get("names")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _label_column(schema: Any, ask: _Ask, what: str) -> str | None:
    types = _pyarrow()[0].types
    if ask.labels == "none":
        return None
    if ask.labels is not None:
        if ask.labels not in schema.names:
            raise DataError(f"{what} has no column {ask.labels!r} (data.labels); {_columns(schema)}.")
        return ask.labels
    integers = [f.name for f in schema if types.is_integer(f.type)]
    found = [name for name in integers if name.lower() in _LABELS or _class_names(schema, name)]
    if len(found) > 1:
        raise DataError(
            f"{what} has the label columns {', '.join(found)}; say which: --set data.labels={found[0]}, "
            "or --set data.labels=none."
        )
    return found[0] if found else None


def _refuse_other_layout(shard: _Shard, first: _Shard, columns: list[str]) -> None:
    for name in columns:
        found, expected = (
            s.schema.field(name).type if name in s.schema.names else "no such column" for s in (shard, first)
        )
        if found != expected or _class_names(shard.schema, name) != _class_names(first.schema, name):
            raise DataError(
                f"column {name!r} is not the same in all shards: {found} in {_shown(shard.file.name)}, {expected} in "
                f"{_shown(first.file.name)}, or with other class names. Give one of them: --set data.path=FILE."
            )


def _label_values(shard: _Shard, column: str) -> np.ndarray:
    """A column of labels as int64 or text, shape [rows]."""
    arrow = _pyarrow()[0]
    what = f"column {column!r} of {_shown(str(shard.file), 400)} (data.labels)"
    with _parquet_file(shard.file) as opened:
        values = opened.read(columns=[column]).column(column)
        if arrow.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if values.null_count:
            raise DataError(
                f"{what} is empty in {values.null_count} of {shard.rows} rows; expected a label for every picture. "
                "Ignore the labels with --set data.labels=none."
            )
        if arrow.types.is_integer(values.type) or arrow.types.is_boolean(values.type):
            return np.asarray(values.cast(arrow.int64()).to_numpy())
        if arrow.types.is_string(values.type) or arrow.types.is_large_string(values.type):
            return np.array(values.to_pylist(), dtype=object)
    raise DataError(f"{what} holds {values.type}; expected whole numbers or text. {_columns(shard.schema)}.")


def _rows(shards: list[_Shard], column: str, chosen: np.ndarray) -> Iterator[_Item]:
    """The encoded pictures of the ``chosen`` rows, batch by batch."""
    start = 0
    for shard in shards:
        with _parquet_file(shard.file) as opened:
            of = f" of {_shown(shard.file.name)}" if len(shards) > 1 else ""
            for group in range(opened.num_row_groups):
                meta = opened.metadata.row_group(group)
                wanted = _between(chosen, start, start + meta.num_rows)
                if len(wanted):
                    size = max(1, min(1024, _BATCH_BYTES * meta.num_rows // max(1, meta.total_byte_size)))
                    batches = opened.iter_batches(size, row_groups=[group], columns=[column])
                    yield from _batched_rows(batches, wanted, start, of, column, shard.file)
                start += meta.num_rows


def _between(chosen: np.ndarray, first: int, end: int) -> np.ndarray:
    low, high = np.searchsorted(chosen, [first, end])
    return chosen[low:high]


def _batched_rows(
    batches: Iterable[Any], wanted: np.ndarray, start: int, of: str, column: str, file: Path
) -> Iterator[_Item]:
    arrow, compute, _ = _pyarrow()
    for batch in batches:
        encoded = batch.column(0)
        paths = None
        if arrow.types.is_struct(encoded.type):
            if encoded.type.get_field_index("path") >= 0:
                paths = compute.struct_field(encoded, "path")
            encoded = compute.struct_field(encoded, "bytes")
        if paths is not None and encoded.null_count == len(encoded) > paths.null_count:
            raise DataError(
                f"column {column!r} of {_shown(str(file), 400)} holds only the paths of pictures, not the pictures "
                "(bytes). Give the folder that they lie in (--set data.path=FOLDER), or write the file again with "
                "the pictures embedded."
            )
        for row in _between(wanted, start, start + len(batch)):
            path = paths[row - start].as_py() if paths is not None else None
            name = f"row {row}{of}" + (f" ({_shown(path)})" if isinstance(path, str) else "")
            yield _Item(name, functools.partial(_in_memory, encoded[row - start].as_py()))
        start += len(batch)


def _in_memory(encoded: bytes | None) -> BinaryIO:
    if encoded is None:
        raise _Bad("no bytes")
    return io.BytesIO(encoded)


# Arrays --------------------------------------------------------------------------------------------


def _arrays(path: Path, what: str, ask: _Ask) -> _Source:
    try:
        if path.suffix.lower() == ".npz":
            pictures, values = _npz(path, what, ask)
        else:
            pictures, values = _npy(path, what, ask), None
    except DataError:
        raise
    except Exception as e:  # numpy, zipfile, zlib and Python's own parser each raise their own
        raise DataError(f"cannot read {what}: {e}. Expected arrays saved by numpy, not pickled.") from e
    pictures = _channels_last(pictures, what)
    source = _Source(what, 0, (), unit="picture")
    chosen = _spread(len(pictures), ask, source.remarks)
    if values is not None:
        numbers, source.classes = _numbered(values, (), f"the labels of {what}", ask)
        source.labels = numbers[chosen]
    source.count = len(chosen)
    source.items = (_Item(f"picture {i}", functools.partial(pictures.__getitem__, i)) for i in chosen)
    return source


def _npy(path: Path, what: str, ask: _Ask) -> np.ndarray:
    if ask.column is not None or ask.labels not in (None, "none"):
        raise DataError(
            f"{what} holds one array without a name; data.column and data.labels are for .npz files, "
            "which hold several."
        )
    found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    _refuse_not_pictures({"the array": _Header(found.shape, found.dtype)}, "the array", what)
    return found


class _Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def _npz(path: Path, what: str, ask: _Ask) -> tuple[np.ndarray, np.ndarray | None]:
    """The array of pictures and the labels. Of the others only the headers are read."""
    headers = _headers(path)
    key = ask.column if ask.column is not None else _picture_key(headers, what)
    _refuse_not_pictures(headers, key, what)
    labels = _label_key(headers, headers[key].shape[0], ask, what)
    need, free = int(np.prod(headers[key].shape, dtype=object)), _available()
    if free is not None and need > free:
        raise DataError(
            f"array {key!r} of {what} takes {_amount(need)} unpacked, and {_amount(free)} of memory is available. Save "
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


def _picture_key(headers: dict[str, _Header], what: str) -> str:
    found = [key for key, header in headers.items() if header.dtype == np.uint8 and len(header.shape) in (3, 4)]
    if len(found) > 1:
        listed = _listed(headers, found)
        raise DataError(f"{what} holds the pictures {listed}; say which: --set data.column={found[0]}.")
    if found:
        return found[0]
    like = [key for key, header in headers.items() if len(header.shape) in (3, 4)]
    if like:
        return like[0]
    raise DataError(f"{what} holds no pictures: {_listed(headers, headers) or 'nothing'}. {_WANTED}")


def _listed(headers: dict[str, _Header], keys: Iterable[str]) -> str:
    return ", ".join(f"{_shown(key)} ({headers[key]})" for key in keys)


_WANTED = "Expected uint8, 0…255, of shape [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1, 3 or 4."


def _refuse_not_pictures(headers: dict[str, _Header], key: str, what: str) -> None:
    if key not in headers:
        raise DataError(f"{what} has no array {key!r} (data.column); it holds {_listed(headers, headers)}.")
    header = headers[key]
    if header.dtype != np.uint8:
        remedy = (
            "For numbers of any other range, data.name: array takes floats: --set data.name=array."
            if header.dtype.kind == "f"
            else "If they are pictures, save x.astype(np.uint8)."
        )
        raise DataError(f"{what}: {_shown(key)} is {header}. {_WANTED} {remedy}")
    if len(header.shape) not in (3, 4) or 0 in header.shape:
        raise DataError(f"{what}: {_shown(key)} is {header}. {_WANTED}")


def _label_key(headers: dict[str, _Header], count: int, ask: _Ask, what: str) -> str | None:
    if ask.labels == "none":
        return None
    if ask.labels is not None:
        header = headers.get(ask.labels)
        if header is None:
            raise DataError(f"{what} has no array {ask.labels!r} (data.labels); it holds {_listed(headers, headers)}.")
        if header.dtype.kind not in "biuU" or header.shape != (count,):
            raise DataError(
                f"{what}: {_shown(ask.labels)} (data.labels) is {header}; expected whole numbers or text, one for each "
                f"of {count} pictures: shape [{count}]."
            )
        return ask.labels
    found = [
        key
        for key in _ARRAY_LABELS
        if key in headers and headers[key].shape == (count,) and headers[key].dtype.kind in "iu"
    ]
    if len(found) > 1:
        raise DataError(
            f"{what} holds the labels {_listed(headers, found)}; say which: --set data.labels={found[0]}, "
            "or --set data.labels=none."
        )
    return found[0] if found else None


def _channels_last(x: np.ndarray, what: str) -> np.ndarray:
    """The array as [N, H, W] or [N, H, W, C], by the rule that :func:`load_images` states."""
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
            return x if last else np.moveaxis(x, 1, 3)
    raise DataError(f"{what} has shape {list(x.shape)}, without an axis of 1, 3 or 4 channels. {_WANTED}")


# Labels --------------------------------------------------------------------------------------------


def _numbered(values: np.ndarray, names: tuple[str, ...], what: str, ask: _Ask) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as numbers 0, 1, …, int64, and the names of the classes."""
    if values.dtype.kind in "OU":
        found, numbers = np.unique(values.astype(str), return_inverse=True)
        return numbers.astype(np.int64), tuple(_shown(name, 400) for name in found.tolist())
    if not len(values):
        return values.astype(np.int64), names
    low, high = int(values.min()), int(values.max())
    if low < 0:
        raise DataError(
            f"{what} run from {low} to {high}: {int((values < 0).sum())} of {len(values)} pictures are unlabelled "
            "(below 0). Expected 0, 1, …; ignore the labels with --set data.labels=none."
        )
    if names and high >= len(names):
        raise DataError(
            f"{what} run up to {high}, but the file names only {len(names)} classes. "
            "Ignore the labels with --set data.labels=none."
        )
    if high >= max(_MOST_IDS, 2 * len(np.unique(values)), ask.classes or 0):
        raise DataError(
            f"{what} run from {low} to {high} with only {len(np.unique(values))} different ones; expected classes "
            "numbered 0, 1, … Number them so, or ignore the labels with --set data.labels=none."
        )
    return values.astype(np.int64), names or tuple(map(str, range(high + 1)))


def _declared(source: _Source, classes: int | None) -> tuple[str, ...]:
    """The names of the classes, padded up to as many as were declared."""
    names = source.classes
    if classes is None or source.labels is None:
        return names
    if len(names) > classes:
        some = ", ".join(_shown(name) for name in names[:5]) + (", …" if len(names) > 5 else "")
        raise DataError(
            f"{source.what} has {len(names)} classes ({some}), and data.classes={classes} expects at most {classes}. "
            f"Correct it with --set data.classes={len(names)}, or ignore the labels with --set data.labels=none."
        )
    return names + tuple(map(str, range(len(names), classes)))


# Decoding ------------------------------------------------------------------------------------------


class _Bad(Exception):
    """A picture cannot be used; the message is the reason, a few words."""


@dataclass
class _Decoded:
    """One picture as it came out: ``size`` (height, width) as stored but upright, before scaling.

    ``pixels`` has shape [H, W] or [H, W, 3]; None where only the size was looked at, or the picture is ``bad``.
    """

    size: tuple[int, int] = (0, 0)
    pixels: np.ndarray | None = None
    notes: set[str] = field(default_factory=set)
    bad: str = ""


class _Reading:
    """Decodes a source's pictures in threads and puts them, in order, into one array.

    Attributes:
        pixels: shape [count, C, H, W]; the first ``len(kept)`` are filled.
        kept: the indices of the source's items that became pictures.
        sizes: how many pictures there are of each size, as (height, width).
    """

    def __init__(self, source: _Source, ask: _Ask):
        self.source = source
        self.ask = ask
        self.pixels: Tensor | None = None
        self.kept: list[int] = []
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.notes: Counter[str] = Counter()
        self.bad = list(source.bad)
        self.expected = ask.size  # what the others are compared with, where nothing is scaled
        self.differ = False
        self.chunk = 1  # pictures a thread takes at a time: more when they are small

    def read(self) -> None:
        if self.ask.size is not None:
            _refuse_too_large((self.source.count, 1, *self.ask.size), self.source.what)
        workers = min(8, os.cpu_count() or 1)
        with _strict_pillow(), ThreadPoolExecutor(workers) as pool:
            index = 0
            for decoded in _in_order(pool, self._decode_chunk, self._chunks(), ahead=2 * workers):
                for name, result in decoded:
                    self._add(index, name, result)
                    index += 1
        self._refuse()

    def _chunks(self) -> Iterator[list[_Item]]:
        items = iter(self.source.items)
        while chunk := list(itertools.islice(items, self.chunk)):
            yield chunk

    def _decode_chunk(self, chunk: list[_Item]) -> list[tuple[str, _Decoded]]:
        return [(item.name, self._decode(item)) for item in chunk]

    def _decode(self, item: _Item) -> _Decoded:
        try:
            found = item.open()
            if isinstance(found, np.ndarray):
                return self._finished(_from_array(found), None, set())
            with found:
                return self._decode_file(found)
        except Exception as e:  # decoders raise whatever they like, and any of it is this one file's fault
            return _Decoded(bad=_reason(e))

    def _decode_file(self, file: BinaryIO) -> _Decoded:
        from PIL import Image

        if not file.read(1):
            raise _Bad("empty file")
        file.seek(0)
        formats = [name for name in _FORMATS if name in Image.OPEN]
        with Image.open(file, formats=formats) as im:
            # A camera's MPO file is a JPEG with previews behind the picture, not an animation.
            if getattr(im, "is_animated", False) and im.format != "MPO":
                raise _Bad(f"{getattr(im, 'n_frames', 'several')} frames, a picture has one")
            expected = self.expected or im.size
            if self.ask.resize is None and (self.differ or expected not in (im.size, im.size[::-1])):
                return _Decoded(_upright_size(im))  # an error is certain; the sizes are all that it tells
            im.load()
            notes: set[str] = set()
            return self._finished(_upright(im, notes), im.format, notes)

    def _finished(self, im: Picture, stored_as: str | None, notes: set[str]) -> _Decoded:
        size = (im.height, im.width)
        plain = _plain(im, stored_as, notes)
        notes.add("grey" if plain.mode == "L" else "colour")
        if self.ask.colour == "grey" and plain.mode != "L":
            plain = plain.convert("L")
        if self.ask.resize is not None and self.ask.size is not None:
            plain = _scaled(plain, self.ask.size, self.ask.resize)
        return _Decoded(size, np.asarray(plain), notes)

    def _add(self, index: int, name: str, found: _Decoded) -> None:
        if found.bad:
            self.bad.append((name, found.bad))
            return
        self.sizes[found.size] += 1
        self.notes.update(found.notes)
        self.chunk = max(1, min(16, 2**19 // (found.size[0] * found.size[1])))
        if self.ask.resize is None:
            self.expected = self.expected or found.size
            self.differ = self.differ or found.size != self.expected
        if found.pixels is None or self.differ:
            return
        self._make_room(found.pixels)
        assert self.pixels is not None
        # A grey picture among RGB ones is repeated by numpy's broadcasting.
        one = found.pixels if found.pixels.ndim == 2 else found.pixels.transpose(2, 0, 1)
        self.pixels[len(self.kept)].numpy()[...] = one
        self.kept.append(index)

    def _make_room(self, one: np.ndarray) -> None:
        """Allocate at the first picture; from one channel to three at the first in colour."""
        channels = 3 if one.ndim == 3 or self.ask.colour == "rgb" else 1
        old = self.pixels
        if old is not None and old.shape[1] >= channels:
            return
        shape = (self.source.count, channels, *one.shape[:2])
        _refuse_too_large(shape, self.source.what)
        self.pixels = torch.empty(shape, dtype=torch.uint8)
        if old is not None:
            self.pixels[: len(self.kept)] = old[: len(self.kept)]

    def _refuse(self) -> None:
        if self.differ:
            raise DataError(self._different_sizes())
        if not self.bad:
            return
        what, unit = self.source.what, self.source.unit
        total = self.source.count + len(self.source.bad)
        if not self.ask.skip_bad:
            raise DataError(
                f"{what}: {len(self.bad)} of {_count(total, unit)} cannot be used: {_some(self.bad)}. Repair or remove "
                "them, or skip and count them with --skip-bad (data.skip_bad: true)."
            )
        if not self.kept:
            raise DataError(f"{what}: none of {_count(total, unit)} can be used: {_some(self.bad)}.")

    def _different_sizes(self) -> str:
        area = sorted(self.sizes, key=lambda size: (size[0] * size[1], size))
        often, times = self.sizes.most_common(1)[0]
        found = (
            f"are {_size(often)}"
            if len(area) == 1
            else f"have {len(area)} different sizes: smallest {_size(area[0])}, largest {_size(area[-1])}, most "
            f"frequent {_size(often)} ({times} of {sum(self.sizes.values())})"
        )
        asked = self.ask.size
        if asked is None:
            option = "64"
        else:
            option = str(asked[0]) if asked[0] == asked[1] else f"[{asked[0]},{asked[1]}]"
            found += f"; data.size asks for {_size(asked)}"
        besides = f" Besides, {_some(self.bad)} cannot be used (--skip-bad skips them)." if self.bad else ""
        return (
            f"the pictures of {self.source.what} {found} (height × width). They have to be of one size: "
            f"--set data.size={option} --set data.resize=crop scales them and cuts out the centre, "
            f"--set data.size={option} --set data.resize=squash ignores the aspect ratio.{besides}"
        )

    def remarks(self) -> list[str]:
        """What was skipped and converted, a sentence each."""
        total, notes = len(self.kept), self.notes
        said = [f"{_count(len(self.bad), self.source.unit)} skipped: {_some(self.bad)}"] if self.bad else []
        said += [f"{notes[key]} of {total} {text}" for key, text in _CONVERTED.items() if notes[key]]
        said += [
            f"{_count(notes[mode], f'{mode} picture')} converted to RGB" for mode in sorted(_OTHER_MODES & notes.keys())
        ]
        if self.ask.colour == "grey" and notes["colour"]:
            said.append(f"{notes['colour']} of {total} were in colour, made grey")
        elif notes["grey"] and self.pixels is not None and self.pixels.shape[1] == 3:
            said.append(f"{notes['grey']} of {total} were grey, repeated into three channels")
        return said + self._size_remarks()

    def _size_remarks(self) -> list[str]:
        asked = self.ask.size
        if self.ask.resize is None or asked is None or set(self.sizes) == {asked}:
            return []
        many = len(self.sizes) > 1
        said = [f"resized from {f'{len(self.sizes)} different sizes' if many else _size(next(iter(self.sizes)))}"]
        small = sum(n for size, n in self.sizes.items() if size[0] < asked[0] or size[1] < asked[1])
        return said + ([f"{small} of {len(self.kept)} were smaller than {_size(asked)} and enlarged"] if small else [])


_CONVERTED = {
    "alpha": "had an alpha channel, laid over white",
    "16-bit": "had 16 bits a pixel, divided by 257 to 8",
    "turned": "turned upright as their EXIF orientation says",
}
_OTHER_MODES = {"CMYK", "YCbCr", "LAB", "HSV"}


def _in_order(pool: ThreadPoolExecutor, work: Callable[[Any], Any], jobs: Iterable[Any], ahead: int) -> Iterator[Any]:
    """Like ``pool.map``, but with no more than ``ahead`` jobs taken from the iterator in advance."""
    waiting: deque[Future[Any]] = deque()
    for job in jobs:
        waiting.append(pool.submit(work, job))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextlib.contextmanager
def _strict_pillow() -> Iterator[None]:
    """Pillow refuses truncated files even if someone else told it not to, and is quiet about the rest."""
    from PIL import ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _from_array(x: np.ndarray) -> Picture:
    from PIL import Image

    return Image.fromarray(x[..., 0] if x.ndim == 3 and x.shape[2] == 1 else x)


def _upright_size(im: Picture) -> tuple[int, int]:
    """(height, width) as it will be after turning, without decoding."""
    # Pillow gives the turned size of a TIFF from the start, and decodes a PNG to look for EXIF at its end.
    told = im.format != "TIFF" and (im.format != "PNG" or "exif" in im.info)
    lying = told and _orientation(im) in (5, 6, 7, 8)
    return (im.width, im.height) if lying else (im.height, im.width)


def _orientation(im: Picture) -> Any:
    try:
        return im.getexif().get(0x0112, 1)
    except Exception:  # EXIF that cannot be read says nothing of the pixels, which may be good
        return 1


#: What brings a picture upright, by its EXIF orientation; 1 is upright.
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def _upright(im: Picture, notes: set[str]) -> Picture:
    from PIL import Image

    turn = _TURNS.get(_orientation(im))
    if turn is None:
        return im
    notes.add("turned")
    return im.transpose(Image.Transpose[turn])


def _plain(im: Picture, stored_as: str | None, notes: set[str]) -> Picture:
    """The picture in mode L or RGB."""
    if im.mode == "F":
        raise _Bad("floating point numbers, a picture holds 8 or 16 bits")
    if im.mode == "I" or im.mode.startswith("I;16"):
        return _from_16_bits(im, stored_as, notes)
    if im.mode in ("LA", "PA", "RGBA") or "transparency" in im.info:
        plain = _over_white(im, notes)
    elif im.mode in ("1", "L"):
        return im if im.mode == "L" else im.convert("L")
    else:
        notes.update(_OTHER_MODES & {im.mode})
        plain = _from_lab(im) if im.mode == "LAB" else im if im.mode == "RGB" else im.convert("RGB")
    if im.mode in ("P", "PA"):  # a palette of greys only is how some programs store a grey picture
        x = np.asarray(plain)
        if (x == x[..., :1]).all():
            return plain.convert("L")
    return plain


def _from_16_bits(im: Picture, stored_as: str | None, notes: set[str]) -> Picture:
    from PIL import Image

    x = np.asarray(im).astype(np.int64)
    low, high = int(x.min()), int(x.max())
    if low < 0 or high > 65535:
        raise _Bad(f"32-bit numbers from {low} to {high}, a picture holds 8 or 16 bits")
    # Mode I is how Pillow holds 16-bit PGM files (and PNG, in old versions), dark ones as well.
    if im.mode != "I" or stored_as in ("PNG", "PPM") or high > 255:
        notes.add("16-bit")
        x = (x + 128) // 257
    return Image.fromarray(x.astype(np.uint8))


def _over_white(im: Picture, notes: set[str]) -> Picture:
    from PIL import Image

    grey = im.mode in ("1", "L", "LA")
    x = np.asarray(im.convert("LA" if grey else "RGBA")).astype(np.uint16)
    colour, alpha = x[..., :-1], x[..., -1:]
    if int(alpha.min()) < 255:
        notes.add("alpha")
        colour = (colour * alpha + 255 * (255 - alpha) + 127) // 255  # at most 65152: fits
    return Image.fromarray((colour[..., 0] if grey else colour).astype(np.uint8))


def _from_lab(im: Picture) -> Picture:
    from PIL import ImageCms

    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(im, lab, rgb, outputMode="RGB")
    assert converted is not None
    return converted


def _scaled(im: Picture, size: tuple[int, int], how: str) -> Picture:
    """The picture brought to (height, width): its whole, or the largest central part of that shape."""
    from PIL import Image

    height, width = size
    from_w, from_h = im.size
    if how == "crop":
        factor = min(from_h / height, from_w / width)
        # Whole pixels, so that cutting alone does not blur.
        from_h, from_w = max(1, round(height * factor)), max(1, round(width * factor))
    left, top = (im.width - from_w) // 2, (im.height - from_h) // 2
    box = (left, top, left + from_w, top + from_h)
    if (from_h, from_w) == size:
        return im.crop(box)
    if from_h % height == 0 and from_w % width == 0:
        method = Image.Resampling.BOX
    elif from_h > height or from_w > width:
        method = Image.Resampling.LANCZOS
    else:
        method = Image.Resampling.BICUBIC
    return im.resize((width, height), method, box=box)


def _reason(e: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(e, _Bad):
        return str(e)
    if isinstance(e, UnidentifiedImageError):
        return "not a picture that Pillow can read"
    if isinstance(e, Image.DecompressionBombError):
        pixels = re.search(r"\d+", str(e))
        count = f"{int(pixels[0]):,}" if pixels else "too many"
        return f"a decompression bomb, it seems: {count} pixels, more than Pillow allows"
    if "truncated" in str(e).lower():
        return "truncated"
    text = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
    return f"broken: {_shown(text)}" if text else f"broken: {type(e).__name__}"


# Memory and words ----------------------------------------------------------------------------------


def _available() -> int | None:
    """Bytes of memory that can still be had; None where the system does not say."""
    try:
        # Not sysconf's SC_AVPHYS_PAGES, which leaves out what the file cache would give back.
        with open("/proc/meminfo", encoding="ascii") as file:
            found = re.search(r"^MemAvailable:\s+(\d+) kB", file.read(), flags=re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _refuse_too_large(shape: Sequence[int], what: str) -> None:
    count, channels, height, width = shape
    need, free = count * channels * height * width, _available()
    if free is not None and need > free:
        fewer = max(2, free // (2 * channels * height * width))
        raise DataError(
            f"{what}: {count} pictures of {_size((height, width))} with {_count(channels, 'channel')} take "
            f"{_amount(need)}, and {_amount(free)} of memory is available. Make them smaller (--set data.size=64 "
            f"--set data.resize=crop) or take fewer (--set data.limit={fewer})."
        )


def _shown(text: str, most: int = 80) -> str:
    """A name that someone else chose, as one printable line of limited length."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return plain if len(plain) <= most else f"{plain[: most // 2]}…{plain[-most // 2 :]}"


def _some(bad: list[tuple[str, str]]) -> str:
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return ", ".join(f"{name} ({reason})" for name, reason in bad[:5]) + more


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _amount(count: int) -> str:
    return f"{count / _GIB:.3g} GiB" if count >= _GIB / 10 else f"{count / 2**20:.3g} MiB"
