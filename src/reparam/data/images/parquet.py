"""Parquet files in the layout of the Hugging Face hub: a column of encoded pictures, one of labels."""

from __future__ import annotations

import bisect
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...errors import DataError
from .labels import LABELS, SPLITS, numbered
from .messages import shown
from .modes import Unusable
from .source import Block, Item, Options, Source

_BATCH_BYTES = 64 * 2**20  # encoded bytes held at once


class _NoPictures(DataError):
    """A column of pictures holds none: not the fault of single rows."""


class _Shard(NamedTuple):
    file: Path
    schema: Any
    metadata: Any

    @property
    def rows(self) -> int:
        return int(self.metadata.num_rows)

    @property
    def groups(self) -> list[int]:
        """How many rows there are in each of its row groups."""
        return [self.metadata.row_group(i).num_rows for i in range(self.metadata.num_row_groups)]


class _Group(NamedTuple):
    """A row group: its number in the shard, and the index of its first picture among all shards'."""

    shard: _Shard
    number: int
    first: int
    rows: int


class _Column(NamedTuple):
    """The column of pictures, how to name its rows, and whether groups that cannot be read are skipped."""

    name: str
    several: bool
    skip_bad: bool


def of_shards(files: list[Path], what: str, ask: Options) -> Source:
    """The pictures in all rows of these files."""
    remarks = _missing_shards(files, what)
    shards, bad = _readable(files, ask)
    schema = shards[0].schema
    column = _picture_column(schema, ask, what)
    labels = _label_column(schema, ask, what)
    for name in filter(None, (column, labels)):
        for shard in shards[1:]:
            _refuse_other_layout(shard, shards[0], name)
    groups = _groups(shards)
    pictures = _Column(column, len(shards) > 1, ask.skip_bad)
    source = Source(
        what,
        sum(group.rows for group in groups),
        lambda chosen: _rows(groups, pictures, chosen),
        remarks=remarks,
        bad=bad,
        unit="row",
        blocks=tuple(group.rows for group in groups),
        block=lambda k: _block(groups[k], pictures),
        encoded=sum(_encoded(group, column) for group in groups),
        listing=lambda: [(s.file.name, s.groups, s.metadata.serialized_size) for s in shards],
    )
    if labels is not None:
        values = np.concatenate([_label_values(shard, labels) for shard in shards])
        names = _class_names(schema, labels)
        source.labels, source.classes = numbered(values, names, f"column {labels!r} of {what}", ask)
    return source


def _missing_shards(files: list[Path], what: str) -> list[str]:
    """A remark on shards that are not there. A folder that holds several splits is refused."""
    splits = sorted({split for file in files if (split := re.split(r"[-_.]", file.name.lower())[0]) in SPLITS})
    if len(splits) > 1:
        raise DataError(
            f"{what} holds the splits {', '.join(splits)}; training on all would leave nothing to test with. "
            f"Give one file or a folder of one split's shards: --set data.path={shown(str(files[-1]), 400)}."
        )
    of = max((int(n) for file in files for n in re.findall(r"-of-(\d+)", file.stem)), default=0)
    return [f"{len(files)} of {of} shards are there"] if of > len(files) else []


def _readable(files: list[Path], ask: Options) -> tuple[list[_Shard], list[tuple[str, str]]]:
    """The shards; and which cannot be read, where those are skipped and some are left."""
    shards, bad = [], []
    for file in files:
        try:
            with _opened(file) as opened:
                shards.append(_Shard(file, opened.schema_arrow, opened.metadata))
        except DataError as e:
            if not ask.skip_bad or (file == files[-1] and not shards):
                raise
            bad.append((shown(file.name), f"broken: {e.__cause__}"))
    return shards, bad


@contextlib.contextmanager
def _opened(file: Path, metadata: Any = None) -> Iterator[Any]:
    try:
        # With a buffer, column chunks are read piece by piece instead of whole.
        with pq.ParquetFile(file, metadata=metadata, buffer_size=2**20) as opened:
            yield opened
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"cannot read {shown(str(file), 400)}: {e}. Expected a Parquet file of pictures.") from e


def _picture_column(schema: Any, ask: Options, what: str) -> str:
    found: list[str] = [f.name for f in schema if _holds_pictures(f.type)]
    if ask.column is not None:
        if ask.column in found:
            return ask.column
        wrong = "holds no pictures" if ask.column in schema.names else "does not exist"
        raise DataError(
            f"column {ask.column!r} (data.column) of {what} {wrong}. Expected struct<bytes, path> or binary; "
            f"{_columns(schema)}."
        )
    if not found:
        raise DataError(f"{what} has no column of pictures (struct<bytes, path> or binary); {_columns(schema)}.")
    features = _features(schema)
    marked = [name for name in found if features.get(name, {}).get("_type") == "Image"]
    for only in (marked, found):
        if len(only) == 1:
            return only[0]
    raise DataError(f"{what} has the picture columns {', '.join(found)}; say which: --set data.column={found[0]}.")


def _holds_pictures(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        where = kind.get_field_index("bytes")
        if where < 0:
            return False
        kind = kind.field(where).type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _columns(schema: Any) -> str:
    return "its columns are " + ", ".join(f"{shown(f.name)} ({f.type})" for f in schema)


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


def _label_column(schema: Any, ask: Options, what: str) -> str | None:
    if ask.labels == "none":
        return None
    if ask.labels is not None:
        if ask.labels not in schema.names:
            raise DataError(f"{what} has no column {ask.labels!r} (data.labels); {_columns(schema)}.")
        return ask.labels
    integers: list[str] = [f.name for f in schema if pa.types.is_integer(f.type)]
    found = [name for name in integers if name.lower() in LABELS or _class_names(schema, name)]
    if len(found) > 1:
        raise DataError(
            f"{what} has the label columns {', '.join(found)}; say which: --set data.labels={found[0]}, "
            "or --set data.labels=none."
        )
    return found[0] if found else None


def _refuse_other_layout(shard: _Shard, first: _Shard, name: str) -> None:
    found, expected = (
        s.schema.field(name).type if name in s.schema.names else "no such column" for s in (shard, first)
    )
    if found != expected or _class_names(shard.schema, name) != _class_names(first.schema, name):
        raise DataError(
            f"column {name!r} is not the same in all shards: {found} in {shown(shard.file.name)}, {expected} in "
            f"{shown(first.file.name)}, or with other class names. Give one of them: --set data.path=FILE."
        )


def _label_values(shard: _Shard, column: str) -> np.ndarray:
    """A column of labels as int64 or text, shape [rows]."""
    what = f"column {column!r} of {shown(str(shard.file), 400)} (data.labels)"
    with _opened(shard.file) as opened:
        values = opened.read(columns=[column]).column(column)
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if values.null_count:
            raise DataError(
                f"{what} is empty in {values.null_count} of {shard.rows} rows; expected a label for every picture. "
                "Ignore the labels with --set data.labels=none."
            )
        if pa.types.is_integer(values.type) or pa.types.is_boolean(values.type):
            return np.asarray(values.cast(pa.int64()).to_numpy())
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            return np.array(values.to_pylist(), dtype=str)
    raise DataError(f"{what} holds {values.type}; expected whole numbers or text. {_columns(shard.schema)}.")


def _groups(shards: list[_Shard]) -> list[_Group]:
    """The row groups of all shards that have rows, in order."""
    groups, first = [], 0
    for shard in shards:
        for number, rows in enumerate(shard.groups):
            if rows:
                groups.append(_Group(shard, number, first, rows))
            first += rows
    return groups


def _encoded(group: _Group, column: str) -> int:
    """The bytes that the column of pictures takes in a row group, unpacked."""
    stored = group.shard.metadata.row_group(group.number)
    chunks = (stored.column(i) for i in range(stored.num_columns))
    return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)


def _rows(groups: list[_Group], column: _Column, chosen: np.ndarray) -> Iterator[Item]:
    """The encoded pictures of the ``chosen`` rows, batch by batch; groups without any are not read."""
    for group in groups:
        low, high = np.searchsorted(chosen, [group.first, group.first + group.rows])
        rows = chosen[low:high]
        try:
            for first, encoded in _batches(group, column) if len(rows) else ():
                done = int(np.searchsorted(rows, first + len(encoded)))
                yield from (_item(group, column, encoded, row, row - first) for row in rows[:done].tolist())
                rows = rows[done:]
                if not len(rows):
                    break
        except DataError as e:
            yield from (_unreadable(group, column, row, e) for row in rows.tolist())


def _block(group: _Group, column: _Column) -> Block:
    """A whole row group."""
    try:
        firsts, batches = zip(*_batches(group, column), strict=True)
    except DataError as e:
        error = e
        return Block(lambda row: _unreadable(group, column, row, error), 0)

    def item(row: int) -> Item:
        k = bisect.bisect_right(firsts, row) - 1
        return _item(group, column, batches[k], row, row - firsts[k])

    return Block(item, sum(batch.nbytes for batch in batches))


def _batches(group: _Group, column: _Column) -> Iterator[tuple[int, Any]]:
    """The index of the first picture of each batch of a row group, and the column's part.

    Raises:
        DataError: if it cannot be read.
        _NoPictures: if it holds nothing but paths.
    """
    first = group.first
    size = max(1, min(1024, _BATCH_BYTES * group.rows // max(1, _encoded(group, column.name))))
    with _opened(group.shard.file, group.shard.metadata) as opened:
        for batch in opened.iter_batches(size, row_groups=[group.number], columns=[column.name]):
            part = batch.column(0)
            _refuse_paths_only(part, f"column {column.name!r} of {shown(str(group.shard.file), 400)}")
            yield first, part
            first += len(part)


def _refuse_paths_only(encoded: Any, what: str) -> None:
    if not pa.types.is_struct(encoded.type) or encoded.type.get_field_index("path") < 0:
        return
    inside, paths = pc.struct_field(encoded, "bytes"), pc.struct_field(encoded, "path")
    if inside.null_count == len(encoded) > paths.null_count:
        raise _NoPictures(
            f"{what} holds only the paths of pictures, not the pictures (bytes). Give the folder that they lie in "
            "(--set data.path=FOLDER), or write the file again with the pictures embedded."
        )


def _item(group: _Group, column: _Column, encoded: Any, row: int, at: int) -> Item:
    """The picture at ``at`` of a batch, a copy."""
    found = encoded[at].as_py()
    if not pa.types.is_struct(encoded.type):
        return Item(_name(group, column, row), lambda: found)
    inside = found or {}
    return Item(_name(group, column, row, inside.get("path")), lambda: inside.get("bytes"))


def _unreadable(group: _Group, column: _Column, row: int, error: DataError) -> Item:
    """Stands for a picture in a row group that cannot be read; an error unless those are skipped."""
    if isinstance(error, _NoPictures) or not column.skip_bad:
        raise error

    def fail() -> None:
        raise Unusable(f"cannot read row group {group.number}: {shown(str(error.__cause__))}")

    return Item(_name(group, column, row), fail)


def _name(group: _Group, column: _Column, row: int, path: object = None) -> str:
    of = f" of {shown(group.shard.file.name)}" if column.several else ""
    return f"row {row}{of}" + (f" ({shown(path)})" if isinstance(path, str) else "")
