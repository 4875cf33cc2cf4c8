"""Folders that belong to one study or training at a time."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import Conflict, OutputError


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Inside, the folder exists and is this process's (and its children's).

    Args:
        what: what may already be running in it, for the message.

    Raises:
        OutputError: if the folder cannot be made.
        Conflict: if another process is at work in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as e:
        raise OutputError(f"cannot write to {folder}: {e.strerror}. Choose another folder with --out.") from e
    with lock:
        _lock(lock, folder, what)
        os.set_inheritable(lock.fileno(), True)
        yield


def _lock(lock: Any, folder: Path, what: str) -> None:
    try:
        import fcntl
    except ImportError:  # no advisory locks on this system
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        raise Conflict(f"another {what} is running in {folder}; wait for it, or choose another --out.") from e


def refuse_foreign(folder: Path, what: str) -> None:
    """An error if the folder holds anything but its lock.

    Raises:
        Conflict: if so.
    """
    if others := sorted(p.name for p in folder.iterdir() if p.name != ".lock"):
        raise Conflict(
            f"{folder} is not empty (found {', '.join(others[:3])}) and holds no {what}; nothing was touched. "
            "Choose a new folder with --out."
        )


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """What differs between two records of plain data, key by key, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path.removeprefix('runs.')} was {_brief(before)} there, is {_brief(now)} now"


def _brief(value: Any) -> str:
    return "absent" if value is None else "present" if isinstance(value, dict) else repr(value)


def folder_name(name: str) -> str:
    """A name that a folder may have."""
    return re.sub(r"[^\w.+=-]+", "_", name).strip("._") or "study"
