"""Files that are whole or not there at all, whenever the process dies."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .errors import OutputError, SpecError

#: The longest header that safetensors itself reads.
_LONGEST_HEADER = 100_000_000
#: What torch.save writes, by name and by its first bytes: a zip file, or a bare pickle.
_PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_OF_PICKLES = (
    "a pickle can run code when it is read. Expected .safetensors; where you trust the file, convert it: "
    "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'weights.safetensors')."
)


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, of the same suffix, that takes its place at the end.

    Raises:
        OutputError: if the file cannot be written.
    """
    path = Path(path)
    # Machines that share a folder have processes of the same number.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        raise OutputError(f"cannot write {path}: {e.strerror or e}. Choose another place (--out).") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote there: our temporary files and safetensors'."""
    for pattern in (".*.tmp.*", ".*.tmp", ".tmp??????"):
        for stale in folder.glob(pattern):
            with contextlib.suppress(OSError):
                stale.unlink()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, read a part at a time."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**24):
            found.update(part)
    return found.hexdigest()


def write_text(path: str | Path, text: str) -> None:
    """A text file in UTF-8.

    Raises:
        OutputError: if it cannot be written.
    """
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: str | Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """A safetensors file.

    Raises:
        OutputError: if it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    kept: dict[str, Any] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        kept[name] = value.clone() if place in seen else value  # tied weights are written out each
        seen.add(place)
    with written_whole(path) as temporary:
        try:
            save_file(kept, temporary, metadata)
        except SafetensorError as e:  # it wraps the system's own error
            raise OSError(str(e)) from e
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # on the disk before it takes the place of what is there
        # safetensors makes its files private; ours are as readable as any other file here.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)


class Header(NamedTuple):
    """What a safetensors file says before its numbers.

    Attributes:
        shapes: of the tensors, by name.
        metadata: what was written beside them.
    """

    shapes: dict[str, list[int]]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """The names, shapes and metadata in a safetensors file; its numbers are left unread.

    What is no such file (a pickle by another name, a part of a file, a header longer than the file) is refused
    by its first eight bytes and its size.

    Raises:
        SpecError: if the file is missing, or is not safetensors.
    """
    if not isinstance(path, str | Path):
        raise SpecError(f"found {type(path).__name__}, expected the path of a .safetensors file.")
    path = Path(path)
    if not path.is_file():
        raise SpecError(f"no file {path}; expected weights as .safetensors.")
    if path.suffix.lower() in _PICKLED:
        raise SpecError(f"{path} was not opened: {_OF_PICKLES}")
    try:
        with path.open("rb") as f:
            length, size = _header_length(f, path)
            raw = f.read(length)
    except OSError as e:
        raise SpecError(f"{path} is not a readable safetensors file: {e.strerror or e}.") from e
    try:
        return _header(json_in(raw.decode("utf-8")), size - 8 - length)
    except (ValueError, RecursionError) as e:
        raise SpecError(f"{path} is not a readable safetensors file: {str(e) or type(e).__name__}.") from e


def _header_length(f: BinaryIO, path: Path) -> tuple[int, int]:
    """How long the header is, found possible; and the file."""
    size = os.fstat(f.fileno()).st_size
    start = f.read(8)
    length, rest = int.from_bytes(start, "little"), size - 8
    if len(start) == 8 and 2 <= length <= min(rest, _LONGEST_HEADER):
        return length, size
    if start.startswith(_PICKLES):
        raise SpecError(f"{path} is not a readable safetensors file but was written by torch.save: {_OF_PICKLES}")
    if size < 8:
        raise SpecError(f"{path} is not a readable safetensors file: it has {size} bytes; fetch it again.")
    raise SpecError(
        f"{path} is not a readable safetensors file: it has {size:,} bytes, and the first eight say that a header of "
        f"{length:,} follows. Either it is something else, or only a part of it is here; fetch it again."
    )


def _header(record: Any, held: int) -> Header:
    """A header, checked in what is used of it, and against the number of bytes that the file holds besides.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(record, dict):
        raise ValueError(f"its header is {type(record).__name__}, expected a mapping")
    metadata = record.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are no mapping of texts")
    shapes: dict[str, list[int]] = {}
    for name, entry in record.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"tensor {name!r} has the shape {shape!r}")
        shapes[name] = shape
        place = entry.get("data_offsets")
        if not isinstance(place, list) or len(place) != 2 or not all(type(n) is int and 0 <= n <= held for n in place):
            raise ValueError(
                f"tensor {name!r} stands at {place!r} of {held:,} bytes; a part of the file may be missing"
            )
    if sum(map(math.prod, shapes.values())) > 2 * held:  # the smallest numbers have four bits
        raise ValueError(f"its tensors are larger than the {held:,} bytes that are here")
    return Header(shapes, metadata)


def json_in(text: str) -> Any:
    """JSON as plain data, in which no key may be given twice.

    Raises:
        ValueError, RecursionError: if it is none.
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def read_tensors(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        SpecError: if the file is missing, or is not safetensors.
    """
    from safetensors import safe_open

    read_header(path)
    try:
        with safe_open(path, framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except Exception as e:  # whatever a library does with a damaged file
        raise SpecError(f"{path} is not a readable safetensors file: {e}.") from e
