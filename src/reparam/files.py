"""Files that are whole or not there at all, whenever the process dies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import OutputError, SpecError


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, of the same suffix, that takes its place at the end.

    Raises:
        OutputError: if the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
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


def read_tensors(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        SpecError: if the file is missing, or is not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise SpecError(f"no file {path}; expected weights as .safetensors.")
    try:
        with safe_open(path, framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise SpecError(f"{path} is not a readable safetensors file: {e}.") from e
