"""Data sets of the Hugging Face hub, from a local copy or through its cache."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from ...errors import DataError
from .labels import SPLITS
from .messages import shown

PREFIX = "hub:"
#: The folder of local copies, laid out as OWNER/NAME/**/*.parquet, where data.hub does not say.
ROOT = "REPARAM_HUB"
_FORM = re.compile(
    r"hub:(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?P<folder>(?:/[\w-][\w.-]*)*)(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w-]+))?"
)
_ENDINGS = (".parquet", ".tar")


class _Name(NamedTuple):
    repo: str
    folder: str
    revision: str | None
    split: str


def shards(path: str, root: str | None) -> tuple[list[Path], list[str]]:
    """The files of ``hub:OWNER/NAME[/FOLDER][@REVISION][:SPLIT]``, and remarks on them; the split is train by default.

    Args:
        path: the name.
        root: a folder of local copies; None takes that of the environment's REPARAM_HUB, if there is one.

    Raises:
        DataError: if the name cannot be understood, or there are no such files here, in the cache or on the hub.
    """
    name = _parsed(path)
    root = root or os.environ.get(ROOT)
    remarks: list[str] = []
    local = None if root is None else Path(root).expanduser() / name.repo
    if local is not None and local.is_dir():
        if name.revision is not None:
            remarks.append(f"the local copy {shown(str(local), 400)} is used, whatever its revision")
        return _of_split(local, name, path), remarks
    return _of_split(_downloaded(name, local), name, path), remarks


def _parsed(path: str) -> _Name:
    found = _FORM.fullmatch(path)
    if not found:
        raise DataError(
            f"{shown(path)} (data.path) is no name on the hub; expected hub:OWNER/NAME, and if need be a folder in it, "
            "a revision and a split: hub:uoft-cs/cifar10, hub:uoft-cs/cifar10/plain_text@main:test."
        )
    return _Name(found["repo"], found["folder"].strip("/"), found["revision"], found["split"] or "train")


def _downloaded(name: _Name, local: Path | None) -> Path:
    """The folder of the hub's cache that holds the split's files."""
    remedy = (
        "Give a folder with a copy of its files (--set data.path=DIR), or a folder of such copies, DIR/"
        f"{name.repo}/**/*.parquet (--set data.hub=DIR, or {ROOT}=DIR in the environment)"
    )
    if local is not None:
        remedy += f"; there is none at {shown(str(local), 400)}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise DataError(
            f"data sets of the hub are read through huggingface_hub, which is not installed: pip install "
            f"huggingface_hub. Without it: {remedy}."
        ) from e
    of = f", revision {name.revision}" if name.revision else ""
    print(f"fetching the data set {name.repo}{of} from the Hugging Face hub, if it is not cached", file=sys.stderr)
    inside = f"{name.folder}/" if name.folder else ""
    # Only the split's files, where their names tell; one split may be as large as all others.
    for pattern in (f"{inside}*{name.split}*", f"{inside}*"):
        try:
            folder = Path(
                snapshot_download(
                    name.repo,
                    repo_type="dataset",
                    revision=name.revision,
                    allow_patterns=[pattern + ending for ending in _ENDINGS],
                )
            )
        except Exception as e:  # of the network, the server, the cache and the file system, each its own
            said = shown(str(e).strip().split("\n")[0], 300) or type(e).__name__
            raise DataError(f"cannot get the data set {name.repo} from the Hugging Face hub: {said} {remedy}.") from e
        if _files(folder, name):
            break
    return folder


def _files(folder: Path, name: _Name) -> list[Path]:
    inside = folder / name.folder
    return sorted(file for ending in _ENDINGS for file in inside.rglob(f"*{ending}") if file.is_file())


def _of_split(folder: Path, name: _Name, path: str) -> list[Path]:
    """The split's files; all of them if no name tells a split and none is asked for."""
    files = _files(folder, name)
    of = {file: _split(file.relative_to(folder), name.split) for file in files}
    chosen = [file for file in files if of[file] == name.split]
    if not chosen and not any(of.values()) and name.split == "train":
        chosen = files
    if not chosen:
        there = ", ".join(sorted(filter(None, set(of.values())))) or "none"
        raise DataError(
            f"{shown(path)} (data.path): no .parquet or .tar files of the split {name.split!r} in "
            f"{shown(str(folder / name.folder), 400)}; the splits there: {there}. Choose one: --set data.path="
            f"hub:{name.repo}:SPLIT."
        )
    folders = sorted({file.relative_to(folder).parts[0] for file in chosen if len(file.relative_to(folder).parts) > 1})
    if not name.folder and len(folders) > 1:
        raise DataError(
            f"{shown(path)} (data.path) has its split {name.split!r} in the folders {', '.join(map(shown, folders))}; "
            f"say which: --set data.path=hub:{name.repo}/{shown(folders[0])}:{name.split}."
        )
    if len({file.suffix for file in chosen}) > 1:
        raise DataError(f"{shown(path)} (data.path) has both .parquet and .tar files; give a folder of one kind.")
    return chosen


def _split(file: Path, asked: str) -> str | None:
    """The split that a file's name tells, or the name of a folder it lies in."""
    for part in reversed(file.parts):
        for word in re.split(r"[-_.]", part.lower()):
            if word in SPLITS or word == asked:
                return word
    return None
