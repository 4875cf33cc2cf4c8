"""Parquet files in the layout of the Hugging Face hub: a column of encoded pictures, one of labels."""

from __future__ import annotations

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
from .labels import SPLITS, numbered
from .messages import shown
from .source import Item, Options, Source

_LABELS = ("label", "labels", "fine_label", "coarse_label", "class", "target", "y")
_BATCH_BYTES = 64 * 2**20  # encoded bytes held at once


class _Shard(NamedTuple):
    file: Path
    schema: Any
    rows: int


def of_shards(files: list[Path], what: str, ask: Options) -> Source:
    """The pictures in all rows of these files."""
    remarks = _missing_shards(files, what)
    shards = [_shard(file) for file in files]
    schema = shards[0].schema
    column = _picture_column(schema, ask, what)
    labels = _label_column(schema, ask, what)
    for name in filter(None, (column, labels)):
        for shard in shards[1:]:
            _refuse_other_layout(shard, shards[0], name)
    count = sum(shard.rows for shard in shards)
    source = Source(what, count, lambda chosen: _rows(shards, column, chosen), remarks=remarks, unit="row")
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


def _shard(file: Path) -> _Shard:
    with _opened(file) as opened:
        return _Shard(file, opened.schema_arrow, opened.metadata.num_rows)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        # With a buffer, column chunks are read piece by piece instead of whole.
        with pq.ParquetFile(file, buffer_size=2**20) as opened:
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
    found = [name for name in integers if name.lower() in _LABELS or _class_names(schema, name)]
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


def _rows(shards: list[_Shard], column: str, chosen: np.ndarray) -> Iterator[Item]:
    """The encoded pictures of the ``chosen`` rows, batch by batch."""
    first = 0
    for shard in shards:
        of = f" of {shown(shard.file.name)}" if len(shards) > 1 else ""
        with _opened(shard.file) as opened:
            groups = map(opened.metadata.row_group, range(opened.num_row_groups))
            stored = sum(group.total_byte_size for group in groups)
            size = max(1, min(1024, _BATCH_BYTES * shard.rows // max(1, stored)))
            for batch in opened.iter_batches(size, columns=[column]):
                low, high = np.searchsorted(chosen, [first, first + len(batch)])
                what = f"column {column!r} of {shown(str(shard.file), 400)}"
                yield from _pictures(batch.column(0), chosen[low:high], first, of, what)
                first += len(batch)


def _pictures(encoded: Any, rows: np.ndarray, first: int, of: str, what: str) -> Iterator[Item]:
    """These rows, of a batch that begins at row ``first``."""
    paths = None
    if pa.types.is_struct(encoded.type):
        if encoded.type.get_field_index("path") >= 0:
            paths = pc.struct_field(encoded, "path")
        encoded = pc.struct_field(encoded, "bytes")
    if paths is not None and encoded.null_count == len(encoded) > paths.null_count:
        raise DataError(
            f"{what} holds only the paths of pictures, not the pictures (bytes). Give the folder that they lie in "
            "(--set data.path=FOLDER), or write the file again with the pictures embedded."
        )
    for row in rows.tolist():
        path = paths[row - first].as_py() if paths is not None else None
        name = f"row {row}{of}" + (f" ({shown(path)})" if isinstance(path, str) else "")
        yield Item(name, encoded[row - first].as_py)
