"""Tar shards of pictures: members of one key (``0001.jpg``, ``0001.cls``, ``0001.json``) belong together."""

from __future__ import annotations

import functools
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ...errors import DataError
from .folders import SUFFIXES, ignored, label_by_folder
from .labels import LABELS, numbered
from .messages import plural, shown, some
from .source import Item, Options, Source

#: How the names of packed archives end, which cannot be read from the middle.
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
_TOLD = ("cls", "json")  # members that may tell a picture's class
_LONGEST_TOLD = 2**20
_AT_ONCE = 8  # shards looked through at once


class _Member(NamedTuple):
    """Where the bytes of a member lie."""

    shard: int
    offset: int
    size: int


class _Sample(NamedTuple):
    """A picture: its path inside the shard, where it lies, and the members that may tell its class."""

    path: str
    picture: _Member
    told: tuple[tuple[str, _Member], ...]


def of_tars(files: list[Path], what: str, ask: Options) -> Source:
    """The pictures in these shards, in the order in which they were put there."""
    samples: list[_Sample] = []
    bad: list[tuple[str, str]] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # for shards that lie far away: most of it is waiting
        for found, broken in pool.map(functools.partial(_index, ask=ask), range(len(files)), files):
            samples += found
            bad += broken
    if not samples:
        raise DataError(
            f"{what} holds no pictures; looked for {', '.join(SUFFIXES)} in {plural(len(files), 'shard')}. "
            + (f"Not read: {some(bad)}." if bad else "")
        )
    names = [file.name for file in files]
    source = Source(what, len(samples), lambda chosen: (_item(samples[i], files) for i in chosen), bad=bad)
    source.listing = lambda: [(names[s.picture.shard], s.path, s.picture.size) for s in samples]
    if ask.labels != "none":
        _label(source, samples, files, ask)
    return source


def _refuse_packed(file: Path) -> None:
    try:
        with open(file, "rb") as opened:
            packed = opened.read(6).startswith(_MAGIC)
    except OSError as e:
        raise DataError(f"cannot read {shown(str(file), 400)}: {e.strerror or e}.") from e
    if packed or file.name.lower().endswith(PACKED):
        raise DataError(packed_archive(file))


def packed_archive(file: Path) -> str:
    """What is said of a compressed archive."""
    return (
        f"{shown(str(file), 400)} is a compressed archive, of which no picture can be read without unpacking all "
        "before it. Pictures are compressed themselves: unpack it to a plain .tar (gunzip, zstd -d …) and give that: "
        "--set data.path=SHARD.tar."
    )


def _index(shard: int, file: Path, ask: Options) -> tuple[list[_Sample], list[tuple[str, str]]]:
    """A shard's pictures, and what in it cannot be used; one that is broken is an error, or left out from there on."""
    _refuse_packed(file)
    samples: list[_Sample] = []
    bad: list[tuple[str, str]] = []
    key, held = "", dict[str, tuple[str, _Member]]()
    try:
        for path, offset, size in _members(file):
            folder, _, name = path.rpartition("/")
            stem, _, suffix = name.partition(".")
            if f"{folder}/{stem}" != key:
                _gather(file, held, ask, samples, bad)
                key, held = f"{folder}/{stem}", {}
            held[suffix] = path, _Member(shard, offset, size)
    except _Broken as e:
        if not ask.skip_bad:
            raise DataError(
                f"{shown(str(file), 400)} {e}: an unfinished download, perhaps. Get it again, or skip what is "
                "missing and count it with --skip-bad (data.skip_bad: true)."
            ) from e
        bad.append((shown(file.name), str(e)))
    _gather(file, held, ask, samples, bad)
    return samples, bad


class _Broken(Exception):
    """A shard cannot be read to its end; the message says why."""


def _members(file: Path) -> Iterator[tuple[str, int, int]]:
    """Path, offset and size of the files in an archive, in order."""
    end = file.stat().st_size
    try:
        with tarfile.open(file, "r:") as archive:
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # or it would remember every one
                if info.isreg() and info.offset_data + info.size > end:
                    raise _Broken(f"is cut short within {shown(info.name)}")
                parts = [part for part in info.name.split("/") if part not in ("", ".", "..")]
                if info.isreg() and not info.issparse() and parts and not any(map(ignored, parts)):
                    yield "/".join(parts), info.offset_data, info.size
            here = archive.offset
    except (tarfile.TarError, OSError, EOFError) as e:
        raise _Broken(f"is broken ({shown(str(e))})") from e
    # A header that cannot be understood ends an archive just as its end does.
    with open(file, "rb") as opened:
        opened.seek(here)
        rest = opened.read(tarfile.BLOCKSIZE)
    if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
        raise _Broken("is cut short" if len(rest) < tarfile.BLOCKSIZE else f"is broken from byte {here:,} on")


def _gather(
    file: Path,
    held: dict[str, tuple[str, _Member]],
    ask: Options,
    samples: list[_Sample],
    bad: list[tuple[str, str]],
) -> None:
    """Make a picture of the members of one key, by what follows the first dot in their names."""
    pictures = [suffix for suffix in held if f".{suffix}".lower().endswith(SUFFIXES)]
    if ask.column is not None:
        pictures = [suffix for suffix in pictures if suffix == ask.column]
    if len(pictures) > 1:
        raise DataError(
            f"{shown(held[pictures[0]][0])} of {shown(str(file), 400)} has beside it "
            f"{', '.join(map(shown, pictures[1:]))}: several pictures of one key. Say which: "
            f"--set data.column={shown(pictures[0])}."
        )
    if pictures:
        told = tuple((suffix, held[suffix][1]) for suffix in (*_TOLD, ask.labels) if suffix in held)
        samples.append(_Sample(*held[pictures[0]], told))
    elif held and ask.column is not None:
        bad.append((f"{shown(file.name)}/{shown(next(iter(held.values()))[0])}", f"no member .{ask.column}"))


def _item(sample: _Sample, files: list[Path]) -> Item:
    file = files[sample.picture.shard]
    return Item(f"{shown(file.name)}/{shown(sample.path)}", functools.partial(_alone, file, sample.picture))


def _alone(file: Path, member: _Member) -> bytes:
    with open(file, "rb") as opened:
        return _bytes(opened, member)


def _bytes(opened: BinaryIO, member: _Member) -> bytes:
    opened.seek(member.offset)
    return opened.read(member.size)


def _label(source: Source, samples: list[_Sample], files: list[Path], ask: Options) -> None:
    """The classes: of a member that tells them, else of the folders that the pictures lie in."""
    if ask.labels is None and not any(sample.told for sample in samples):
        label_by_folder(source, [tuple(sample.path.split("/")) for sample in samples], archive=True)
        return
    values: list[int | str | None] = []
    for shard, group in itertools.groupby(samples, lambda sample: sample.picture.shard):
        with open(files[shard], "rb") as opened:
            values += [_told(sample, opened, ask.labels) for sample in group]
    missing = [_item(sample, files).name for sample, value in zip(samples, values, strict=True) if value is None]
    where = "a member .cls or .json" if ask.labels is None else f"{shown(ask.labels)!r} (data.labels)"
    if len(missing) == len(samples) and ask.labels is None:
        source.remarks.append(f"no labels: no .cls, and none of {', '.join(LABELS)} in .json")
        return
    if missing:
        raise DataError(
            f"{source.what}: {len(missing)} of {plural(len(samples), 'picture')} have no label in {where}, such as "
            f"{missing[0]}; expected one for each. Ignore the labels with --set data.labels=none."
        )
    kinds = Counter(type(value) for value in values)
    of = np.array(values, dtype=np.int64 if set(kinds) == {int} else str)
    source.labels, source.classes = numbered(of, (), f"the labels of {source.what}", ask)


def _told(sample: _Sample, opened: BinaryIO, name: str | None) -> int | str | None:
    """The class that a picture's members tell; None where they tell none."""
    for suffix, member in sample.told:
        if member.size > _LONGEST_TOLD:
            continue
        text = _bytes(opened, member).decode("utf-8", "replace").strip()
        if suffix == "json" and name != "json":
            found = _in_json(text, LABELS if name is None else (name,))
        else:
            found = _number_or_text(text) if name in (None, suffix) else None
        if found is not None:
            return found
    return None


def _in_json(text: str, names: tuple[str, ...]) -> int | str | None:
    try:
        record = json.loads(text)
    except ValueError:
        return None
    for name in names if isinstance(record, dict) else ():
        value = record.get(name)
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            return value
    return None


def _number_or_text(text: str) -> int | str | None:
    try:
        return int(text)
    except ValueError:
        return text or None
