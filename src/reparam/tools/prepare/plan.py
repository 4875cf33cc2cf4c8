"""Which pictures go into which shard, what is there already, and the record of it all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..._version import __version__
from ...errors import DataError, OutputError
from ...files import write_text
from .cropping import Bad, decoded
from .shards import Kind, Note

if TYPE_CHECKING:
    from ...data.images import Options


@dataclass(frozen=True)
class Prepared:
    """What a preparation left behind.

    Attributes:
        out: the folder. count: how many pictures are in it. shards: in how many files.
        shape: of one sample: [height, width] of pictures, [C, h, w] of latents.
        classes: their names; () without labels.
        bad: names and reasons of the pictures that were skipped.
        remarks: what was converted, a short sentence each.
    """

    out: Path
    count: int
    shards: int
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {**asdict(self), "out": str(self.out)}

    def text(self) -> str:
        """The same for a reader."""
        kind = "latents of shape" if len(self.shape) == 3 else "pictures of"
        size = list(self.shape) if len(self.shape) == 3 else "×".join(map(str, self.shape))
        classes = f", {len(self.classes)} classes" if self.classes else ""
        skipped = [f"    skipped {name}: {reason}" for name, reason in self.bad[:5]]
        more = [f"    … and {len(self.bad) - 5} more, listed in the folder's record"] if len(self.bad) > 5 else []
        remarks = [f"    {remark}" for remark in self.remarks]
        line = f"{self.count} {kind} {size}{classes}, in {self.shards} shards: {self.out}"
        return "\n".join([*remarks, *skipped, *more, line])


class Found(NamedTuple):
    """Pictures still to be decoded: a :class:`reparam.data.images.Source`."""

    source: Any
    digest: str  # of what they are called
    alone: bool  # whether a worker can be sent what opens a picture, in place of its bytes


def found_at(data: str, ask: Options, stack: contextlib.ExitStack, hub: str | None) -> Found:
    """The pictures that a path stands for; what has to be closed after them goes on the stack.

    Raises:
        DataError: if there are none, or files among them are no pictures, unless ``ask.skip_bad``.
    """
    from ...data.images import opened
    from ...data.images.messages import plural, some

    source = opened(data, ask, stack, hub)
    if source.bad and not ask.skip_bad:
        raise DataError(
            f"{source.what}: {plural(len(source.bad), source.unit)} cannot be used: {some(source.bad)}. Remove them, "
            "or skip and list them with --skip-bad."
        )
    labels = None if source.labels is None else source.labels.tolist()
    identity = repr((ask.column, ask.labels, list(source.listing()), labels, source.classes))
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return Found(source, digest, source.blocks is None and _travels(source))


def _travels(source: Any) -> bool:
    """Whether what opens a picture can be sent to another process: of a file, not of an open archive."""
    try:
        pickle.dumps(next(iter(source.items(np.arange(1)))).open)
    except (pickle.PicklingError, TypeError, AttributeError):
        return False
    return True


def payload_of(item: Any, alone: bool) -> Any:
    """What a worker is sent: what opens the picture, or its bytes."""
    if alone:
        return item.open
    try:
        found = item.open()
        if hasattr(found, "read"):
            with found as file:
                return file.read()
        return found if found is not None else Bad("no bytes")
    except Exception as e:  # a damaged archive raises whatever it likes, and any of it is this one picture's fault
        return Bad(str(e) or type(e).__name__)


def first_side(found: Found) -> tuple[int, int]:
    """(height, width) of the first picture that can be decoded, which all others must have.

    Raises:
        DataError: if none can.
    """
    reason = "no pictures"
    for item in found.source.items(np.arange(found.source.count)):
        payload = payload_of(item, False)
        picture = payload.reason if isinstance(payload, Bad) else decoded(payload)
        if not isinstance(picture, str):
            high, wide = picture.size
            return high, wide
        reason = picture
    raise DataError(f"{found.source.what}: none of {found.source.count} pictures can be used; the last: {reason}.")


@dataclass
class Plan:
    """A preparation: what goes into which shard, and what is there already."""

    found: Found
    kind: Kind
    folder: Path
    side: tuple[int, int]
    cut: bool
    rows: int
    missing: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.count = int(self.found.source.count)
        self.shards = -(-self.count // self.rows)
        self.settings = {
            "kind": self.kind.name,
            "data": self.found.digest,
            "count": self.count,
            "side": list(self.side),
            "cut": self.cut,
            "shard": self.rows,
            **self.kind.settings(),
        }
        self.id = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    def path(self, index: int) -> Path:
        return self.folder / f"part-{index:05d}-of-{self.shards:05d}{self.kind.suffix}"

    def range(self, index: int) -> range:
        """The pictures of a shard."""
        return range(index * self.rows, min((index + 1) * self.rows, self.count))

    def begin(self) -> None:
        """See what is there, and leave a record of what is to come.

        Raises:
            OutputError: if the folder holds something else.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            there = [file.name for file in self.folder.iterdir()]
        except OSError as e:
            raise OutputError(f"cannot write to {self.folder}: {e.strerror or e}. Choose another place (--out).") from e
        if self.kind.record in there:
            self._refuse_other()
        elif there:
            raise OutputError(
                f"{self.folder} holds something else ({sorted(there)[0]}); expected a new or empty folder, or the "
                "beginning of the same preparation. Choose another place (--out)."
            )
        for name in there:  # of a process that was killed
            if name.startswith(".part-") and ".tmp" in name:
                (self.folder / name).unlink(missing_ok=True)
        self.missing = [i for i in range(self.shards) if self._note(i) is None]
        if self.missing:
            self._write({"complete": False})

    def _refuse_other(self) -> None:
        path = self.folder / self.kind.record
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            there = dict(record["settings"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise OutputError(f"{path} cannot be read: {e}. Choose another place (--out).") from e
        differ = [key for key, value in self.settings.items() if there.get(key) != value]
        if differ:
            plain = [key for key in differ if key not in ("data", "vae")]
            told = [f"{key} {there.get(key)}, asked for is {self.settings[key]}" for key in plain]
            told += [f"another {'VAE' if key == 'vae' else 'list of pictures'}" for key in differ if key not in plain]
            raise OutputError(
                f"{self.folder} holds another preparation: {'; '.join(told)}. Go on with the settings and pictures "
                "it was begun with, or choose another place (--out)."
            )

    def _note(self, index: int) -> Note | None:
        """What a shard of this preparation says of itself; None if it is not there."""
        path = self.path(index)
        note = self.kind.note(path) if path.is_file() else None
        return note if note is not None and (note.id, note.index) == (self.id, index) else None

    def _write(self, told: dict[str, Any]) -> None:
        record = {"format": self.kind.format, "version": __version__, "id": self.id, "settings": self.settings, **told}
        write_text(self.folder / self.kind.record, json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def finish(self) -> Prepared:
        """Complete the record.

        Raises:
            DataError: if no picture could be used.
            OutputError: if a shard is not there any longer.
        """
        from PIL import __version__ as pillow

        notes = [note for index in range(self.shards) if (note := self._note(index)) is not None]
        if len(notes) < self.shards:
            raise OutputError(f"shards have vanished from {self.folder}; run the same command again to go on.")
        source, count = self.found.source, sum(note.rows for note in notes)
        bad = [*source.bad, *(pair for note in notes for pair in note.bad)]
        if not count:
            raise DataError(f"{source.what}: none of {self.count} pictures can be used: {bad[0][0]} ({bad[0][1]}).")
        noted: Counter[str] = sum((Counter(note.notes) for note in notes), Counter())
        shape = self.kind.shape(self.side)
        self._write(
            {
                "complete": True,
                "name": Path(source.what).name,
                "pillow": pillow,
                "count": count,
                "shape": shape,
                "classes": list(source.classes) if source.labels is not None else [],
                "shards": [
                    {"file": self.path(n.index).name, "rows": n.rows, **({"digest": n.digest} if n.digest else {})}
                    for n in notes
                ],
                "notes": dict(noted),
                "bad": bad,
                **self.kind.told(),
            }
        )
        remarks = [*source.remarks, *(_remark(key, n, count) for key, n in sorted(noted.items()))]
        pairs = tuple((str(name), str(reason)) for name, reason in bad)
        return Prepared(self.folder, count, self.shards, tuple(shape), tuple(source.classes), pairs, tuple(remarks))


def _remark(key: str, n: int, count: int) -> str:
    from ...data.images.modes import CONVERTED

    texts = {**CONVERTED, "enlarged": "were smaller than the size and enlarged"}
    return f"{n} of {count} {texts.get(key, f'were {key}, converted to RGB')}"
