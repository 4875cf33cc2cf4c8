"""Folders and zip archives of pictures, whose first-level sub-folders are the classes."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import DataError
from .labels import SPLITS
from .messages import amount, plural, shown
from .source import Item, Options, Source, refuse_names

#: How the names of pictures end.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
_CLUTTER = {"thumbs.db", "desktop.ini", "__macosx"}
_DEEPEST = 32  # folders inside one another; links in a circle go deeper
_BOMB_RATIO = 50  # no archive of real pictures unpacks to so many times its own size …
_BOMB_BYTES = 10**9  # … but a small one of drawings might


class Entry(NamedTuple):
    """A file in a folder or an archive: its path inside, what gets it, and its size where the archive tells it."""

    parts: tuple[str, ...]
    open: Callable[[], Any]
    size: int | None = None

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return shown("/".join(self.parts))

    def ends(self, suffixes: str | tuple[str, ...]) -> bool:
        """Whether the file's name ends so, in capitals or not."""
        return self.parts[-1].lower().endswith(suffixes)


def ignored(part: str) -> bool:
    """Whether a file or folder of this name is no part of the data."""
    return part.startswith(".") or part.lower() in _CLUTTER


def in_folder(folder: Path) -> list[Entry]:
    """Every file below ``folder``, in order; links are followed."""
    entries = []
    for here, folders, files in os.walk(folder, onerror=_refuse_unlisted, followlinks=True):
        above = Path(here).relative_to(folder).parts
        if len(above) > _DEEPEST:
            raise DataError(f"{shown(str(folder), 400)} goes on without end: a link in it leads back, it seems.")
        folders[:] = [name for name in folders if not ignored(name)]
        for name in files:
            if not ignored(name):
                entries.append(Entry((*above, name), functools.partial(open, os.path.join(here, name), "rb")))
    return sorted(entries, key=lambda entry: entry.parts)


def _refuse_unlisted(e: OSError) -> None:
    raise DataError(f"cannot list the folder {shown(str(e.filename), 400)}: {e.strerror or e}.") from e


def in_archive(path: Path, what: str, stack: contextlib.ExitStack) -> list[Entry]:
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
            f"{what} is encrypted ({locked} of its {plural(len(infos), 'file')}); expected an archive without a "
            "password. Unpack it and give the folder: --set data.path=FOLDER."
        )
    lock = threading.Lock()  # the archive's own bookkeeping of open entries is not safe in threads
    entries = []
    for info in infos:
        parts = tuple(part for part in info.filename.replace("\\", "/").split("/") if part not in ("", ".", ".."))
        if parts and not any(map(ignored, parts)):
            entries.append(Entry(parts, functools.partial(_unpacked, archive, info, lock), info.file_size))
    return sorted(entries, key=lambda entry: entry.parts)


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo, lock: threading.Lock) -> bytes:
    # Never more than declared, whatever the stream holds; a stream that holds more fails its checksum.
    with lock, archive.open(info) as stream:
        return stream.read(info.file_size)


def _refuse_bomb(infos: list[zipfile.ZipInfo], size: int, what: str) -> None:
    total = sum(info.file_size for info in infos)
    if total > max(_BOMB_BYTES, _BOMB_RATIO * size):
        raise DataError(
            f"{what} is {amount(size)} and would unpack to {amount(total)}: a zip bomb, it seems. Pictures do not "
            "shrink like that; if it is not one, unpack it yourself and give the folder: --set data.path=FOLDER."
        )


def of_entries(entries: list[Entry], what: str, ask: Options, archive: bool = False) -> Source:
    """The pictures among these files; the others are unusable."""
    pictures = [entry for entry in entries if entry.ends(SUFFIXES)]
    others = [entry for entry in entries if not entry.ends(SUFFIXES)]
    if not pictures:
        there = f" It holds {plural(len(others), 'other file')}, such as {others[0].name}." if others else ""
        raise DataError(f"{what} holds no pictures; looked for {', '.join(SUFFIXES)}, in sub-folders too.{there}")
    refuse_names(ask, what)
    source = Source(what, len(pictures), lambda chosen: (Item(pictures[i].name, pictures[i].open) for i in chosen))
    source.bad = [(entry.name, "not a picture") for entry in others]
    source.listing = lambda: [("/".join(entry.parts), entry.size) for entry in pictures]
    if ask.labels != "none":
        label_by_folder(source, [entry.parts for entry in pictures], archive)
    return source


def label_by_folder(source: Source, paths: list[tuple[str, ...]], archive: bool = False) -> None:
    """Take the first part of each picture's path as its class, if all have one."""
    if archive and len({path[0] for path in paths}) == 1:  # the folder that was packed is no class
        paths = [path[1:] for path in paths]
    top = sum(len(path) < 2 for path in paths)
    if top:
        if top < len(paths):
            source.remarks.append(
                f"no labels: {top} of {len(paths)} pictures lie beside the sub-folders, not in one of them"
            )
        return
    names = sorted({path[0] for path in paths})
    if {name.lower() for name in names} <= SPLITS:
        raise DataError(
            f"the sub-folders of {source.what} are {', '.join(names)}: splits of a data set, not classes. Give one of "
            f"them (of an archive, unpack it first): --set data.path=FOLDER/{names[-1]}. Or take all without labels: "
            "--set data.labels=none."
        )
    if len(names) == 1:
        source.remarks.append(f"all pictures lie in one sub-folder, {shown(names[0])}: one class")
    source.classes = tuple(shown(name, 400) for name in names)
    number = {name: i for i, name in enumerate(names)}
    source.labels = np.array([number[path[0]] for path in paths], dtype=np.int64)
