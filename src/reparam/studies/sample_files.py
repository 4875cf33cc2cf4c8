"""Where many samples go: a folder of PNG files, a .zip, a .parquet or a .npz file, written as they come.

While samples are drawn, everything lies in NAME.unfinished beside the place they are for: a part for every batch, each
written whole or not at all, under the numbers of its samples. Once all are there they are put together, a part at a
time, and take their place in one step: a folder or file of samples is complete or does not exist.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..errors import Conflict, DataError, OutputError, ReparamError
from ..files import remove_unfinished, write_text, written_whole
from ..report.plots import picture_sheet
from .folders import differences

#: At most so many pictures in a grid.
_GRID = 400
#: Bytes of encoded pictures in a row group of a Parquet file, at least, and rows at most.
_ROW_GROUP, _ROWS = 32 * 2**20, 10_000
#: What zlib does to filtered rows: its usual effort, 6, saves 3 % of a picture with noise and takes a sixth longer.
_EFFORT = 3
#: Under this key the record of finished samples says what command drew them.
_DRAWN = "drawn"


def told_beside(place: Path) -> Path:
    """The file that says of which model the pictures in a folder or file are, and how they were drawn."""
    return place.with_name(f"{place.name}.json")


def names(n: int) -> list[str]:
    """The files of n pictures."""
    digits = max(4, len(str(n - 1)))
    return [f"{i:0{digits}d}.png" for i in range(n)]


class Place:
    """Samples of one command on their way to the place they are for; a subclass says how they lie there.

    Args:
        target: the place. n: how many samples belong there. shape: of one of them.
        y: their labels, int64 [n]. classes: the names of these.
        threads: how many encode pictures.
    """

    #: How the file of a part ends.
    suffix: ClassVar[str] = ".done"
    #: Whether a grid of the first pictures, and a record, lie beside it.
    beside: ClassVar[bool] = True

    def __init__(
        self,
        target: Path,
        n: int,
        shape: tuple[int, ...],
        y: Tensor | None = None,
        classes: Iterable[str] = (),
        threads: int = 1,
    ) -> None:
        self.target, self.n, self.shape = target, n, shape
        self.y, self.classes = y, list(classes)
        self.work = target.with_name(f"{target.name}.unfinished")
        self._threads = ThreadPoolExecutor(threads)

    # ------------------------------------------------------------------------------------ what is there

    def finished(self, drawn: dict[str, Any]) -> bool:
        """Whether the samples that the command ``drawn`` asks for are there already.

        Raises:
            Conflict, OutputError: if something else is there.
        """
        if not self._taken():
            return False
        before = self._record().get(_DRAWN)
        if not isinstance(before, dict):
            raise Conflict(
                f"{self.target} is there already, and nothing says that this command wrote it; nothing was touched. "
                "Choose another --out, or remove it."
            )
        self._refuse_another(before, drawn, self.target)
        return True

    def claim(self, drawn: dict[str, Any]) -> None:
        """Make the folder of what is unfinished that of this command, or find that it is.

        Raises:
            Conflict: if it is another's.
        """
        file = self.work / "command.json"
        if self.parts():
            try:
                before = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as e:
                raise Conflict(f"{file} cannot be read ({e}); remove {self.work} or choose another --out.") from e
            self._refuse_another(before, drawn, self.work)
        for folder in (self.work, *(self.work / name for name in ("parts", "first", "pictures"))):
            with _writing(folder):
                folder.mkdir(exist_ok=True)
            remove_unfinished(folder)
        write_text(file, json.dumps(drawn, indent=1) + "\n")

    def parts(self) -> list[tuple[int, int]]:
        """The samples that are drawn, from … to, in order."""
        files = (self.work / "parts").glob(f"*{self.suffix}")
        found = [tuple(map(int, file.stem.split("-"))) for file in files if not file.name.startswith(".")]
        return sorted((start, stop) for start, stop in found)

    def missing(self) -> list[tuple[int, int]]:
        """The samples that are still to be drawn, from … to, in order."""
        gaps, at = [], 0
        for start, stop in [*self.parts(), (self.n, self.n)]:
            if at < start:
                gaps.append((at, start))
            at = stop
        return gaps

    def _taken(self) -> bool:
        """Whether there is something in the place, and nothing that is in the way."""
        if self.target.is_dir():
            raise OutputError(f"--out {self.target} is a folder; expected a file for {self.target.suffix}.")
        return self.target.exists()

    def _record(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._told())
            return found if isinstance(found, dict) else {}
        return {}

    def _told(self) -> str:
        return told_beside(self.target).read_text(encoding="utf-8")

    def _refuse_another(self, before: dict[str, Any], drawn: dict[str, Any], where: Path) -> None:
        if changes := list(differences(before, json.loads(json.dumps(drawn)))):
            raise Conflict(
                f"{where} holds samples of another command: {'; '.join(changes[:6])}. Nothing was touched. Choose "
                "another --out, or remove it."
            )

    # ------------------------------------------------------------------------------------------ writing

    def write(self, start: int, x: Tensor) -> None:
        """Samples from number ``start`` on, [b, …]: bytes of pictures [b, C, H, W], or numbers; all or none of them.

        Raises:
            OutputError: if they cannot be written.
        """
        stem = f"{start:09d}-{start + len(x):09d}"
        if self.beside and start < _GRID:
            with written_whole(self.work / "first" / f"{stem}.npy") as temporary:
                np.save(temporary, x[: _GRID - start].numpy())
        with written_whole(self.work / "parts" / f"{stem}{self.suffix}") as temporary:
            self._write_part(temporary, start, x)

    def _write_part(self, path: Path, start: int, x: Tensor) -> None:
        raise NotImplementedError

    def encoded(self, x: Tensor) -> Iterator[bytes]:
        """Pictures [b, C, H, W] as PNG files."""
        return self._threads.map(_compressed(x.shape[1:]), _filtered(x.movedim(1, -1).numpy()))

    def finish(self, about: dict[str, Any], drawn: dict[str, Any]) -> None:
        """Put all samples together in their place, and what is known of them.

        Raises:
            OutputError: if that cannot be written.
        """
        text = json.dumps({**about, _DRAWN: drawn})
        if self.beside:
            firsts = [self.work / "first" / f"{a:09d}-{b:09d}.npy" for a, b in self.parts() if a < _GRID]
            rows = np.concatenate([np.load(file) for file in firsts]).transpose(0, 2, 3, 1)
            with written_whole(self.target.with_name(f"{self.target.name}-grid.png")) as temporary:
                temporary.write_bytes(picture_sheet(np.ascontiguousarray(rows[..., 0] if rows.shape[3] == 1 else rows)))
            write_text(told_beside(self.target), text + "\n")
        self._put_together(text)
        self.clear()

    def _put_together(self, about: str) -> None:
        raise NotImplementedError

    def clear(self) -> None:
        """Remove what was unfinished."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _part_files(self) -> list[Path]:
        return [self.work / "parts" / f"{a:09d}-{b:09d}{self.suffix}" for a, b in self.parts()]


class Folder(Place):
    """A PNG file for every picture."""

    def _taken(self) -> bool:
        if self.target.exists() and not self.target.is_dir():
            raise OutputError(
                f"--out {self.target} is a file; expected a folder for pictures, or a name that ends in .zip, .parquet "
                "or .npz."
            )
        found = {p.name for p in self.target.iterdir()} if self.target.exists() else set()
        if others := sorted(found - set(names(self.n))):
            raise OutputError(
                f"--out {self.target} is not empty (found {', '.join(others[:3])}), and the new pictures would lie "
                "among the old; nothing was touched. Choose a new folder."
            )
        if found and len(found) < self.n:
            raise Conflict(
                f"--out {self.target} holds {len(found)} of {self.n} pictures, some of which were removed since; "
                "nothing was touched. Choose a new folder."
            )
        return bool(found)

    def _write_part(self, path: Path, start: int, x: Tensor) -> None:
        files = names(self.n)[start : start + len(x)]
        for name, content in zip(files, self.encoded(x), strict=True):
            (self.work / "pictures" / name).write_bytes(content)
        path.touch()  # which says that they are all there

    def _put_together(self, about: str) -> None:
        with _writing(self.target):
            if self.target.exists():
                self.target.rmdir()  # empty, as was found before
            os.replace(self.work / "pictures", self.target)


class Zip(Place):
    """The same files in an archive, which does not compress them again."""

    suffix = ".zip"

    def _write_part(self, path: Path, start: int, x: Tensor) -> None:
        files = names(self.n)[start : start + len(x)]
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in zip(files, self.encoded(x), strict=True):
                archive.writestr(zipfile.ZipInfo(name), content)

    def _put_together(self, about: str) -> None:
        with written_whole(self.target) as temporary, zipfile.ZipFile(temporary, "w") as whole:
            for file in self._part_files():
                with zipfile.ZipFile(file) as part:
                    for entry in part.infolist():
                        whole.writestr(entry, part.read(entry))


class Parquet(Place):
    """A table in the layout of the Hugging Face hub: ``image`` {bytes, path} and ``label``."""

    suffix = ".parquet"

    def _write_part(self, path: Path, start: int, x: Tensor) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        files = names(self.n)[start : start + len(x)]
        pictures = [{"bytes": b, "path": p} for b, p in zip(self.encoded(x), files, strict=True)]
        columns: dict[str, Any] = {"image": pictures}
        if self.y is not None:
            columns["label"] = self.y[start : start + len(x)].tolist()
        # PNG files do not get smaller.
        pq.write_table(pa.table(columns, self._schema()), path, compression="none", use_dictionary=False)

    def _schema(self) -> Any:
        import pyarrow as pa

        fields = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
        features: dict[str, Any] = {"image": {"_type": "Image"}}
        if self.y is not None:
            fields.append(("label", pa.int64()))
            features["label"] = {"names": self.classes, "_type": "ClassLabel"}
        return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})

    def _put_together(self, about: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with (
            written_whole(self.target) as temporary,
            pq.ParquetWriter(temporary, self._schema(), compression="none", use_dictionary=False) as writer,
        ):
            held: list[Any] = []
            files = self._part_files()
            for file in files:
                held.append(pq.read_table(file))
                size, rows = sum(t.nbytes for t in held), sum(t.num_rows for t in held)
                if size >= _ROW_GROUP or rows >= _ROWS or file == files[-1]:
                    writer.write_table(pa.concat_tables(held), row_group_size=_ROWS)
                    held = []


class Npz(Place):
    """One array ``x`` of all, its labels ``y``, and the record in ``about``; anything that is no picture goes there."""

    suffix = ".npy"
    beside = False

    def _told(self) -> str:
        try:
            with np.load(self.target, allow_pickle=False) as loaded:
                return str(loaded["about"])
        except (KeyError, zipfile.BadZipFile, EOFError) as e:
            raise ValueError(f"no record: {e}") from e

    def _write_part(self, path: Path, start: int, x: Tensor) -> None:
        np.save(path, x.numpy())

    def _put_together(self, about: str) -> None:
        files = self._part_files()
        header = {"descr": np.load(files[0], mmap_mode="r").dtype.str, "fortran_order": False}
        with written_whole(self.target) as temporary, zipfile.ZipFile(temporary, "w") as whole:
            with whole.open("x.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_1_0(stream, {**header, "shape": (self.n, *self.shape)})
                for file in files:
                    stream.write(np.load(file).tobytes())
            others = {"about": np.asarray(about)} | ({} if self.y is None else {"y": self.y.numpy()})
            for key, array in others.items():
                with whole.open(f"{key}.npy", "w") as stream:
                    np.lib.format.write_array(stream, array, allow_pickle=False)


PLACES: dict[str, type[Place]] = {".zip": Zip, ".parquet": Parquet, ".npz": Npz}
#: Endings of files that are none of these. A folder's name may end otherwise in a dot and more, as in dim8-x0.5.
_OTHER_FILES = re.compile(
    r"\.(npy|pq|parq|arrow|feather|csv|tsv|json|jsonl|txt|md|html|pdf|ya?ml|tar|tgz|gz|bz2|xz|zst|7z|rar|png|jpe?g|webp|"
    r"gif|bmp|tiff?|avif|svg|mp4|mat|h5|hdf5|pkl|pickle|pt|pth|ckpt|safetensors|bin|tfrecords?|lmdb|db|sqlite|zarr)"
)


def kind_of_place(target: Path, pictures: bool) -> type[Place]:
    """How samples lie at a place of this name.

    Raises:
        ReparamError: if they cannot lie there.
        DataError: if what writes them is not installed.
    """
    ending = target.suffix.lower()
    if not pictures and ending != ".npz":
        raise ReparamError(f"--out {target}: expected a file that ends in .npz.")
    if _OTHER_FILES.fullmatch(ending):
        raise ReparamError(
            f"--out {target}: samples are not written to {ending} files; expected a folder for pictures, or a name "
            "that ends in .zip, .parquet or .npz."
        )
    if ending == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as e:
            raise DataError(
                "Parquet files are written by pyarrow, which is not installed: pip install 'reparam[images]'."
            ) from e
    return PLACES.get(ending, Folder)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise OutputError(f"cannot write to {path}: {e.strerror or e}. Choose another place (--out).") from e


# --------------------------------------------------------------------------------------------------- PNG


def _filtered(pictures: np.ndarray) -> np.ndarray:
    """Pictures [b, H, W, C] as rows of bytes less the mean of left and above, behind that filter's number; [b, H, …].

    All at once, which is what makes small pictures cheap. Choosing the filter of every row (:func:`.plots.png`)
    saves 5 % of a picture with noise and takes twice as long.
    """
    count, height, width, channels = pictures.shape
    rows = pictures.reshape(count, height, width * channels)
    near = np.zeros(rows.shape, np.uint16)
    near[:, 1:] = rows[:, :-1]
    near[:, :, channels:] += rows[:, :, :-channels]
    found = np.full((count, height, 1 + width * channels), 3, np.uint8)
    np.subtract(rows, (near >> 1).astype(np.uint8), out=found[:, :, 1:])
    return found


def _compressed(shape: Iterable[int]) -> Callable[[np.ndarray], bytes]:
    """Filtered rows of a picture of the shape [C, H, W] → a PNG file."""
    channels, height, width = shape

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    start, end = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header), chunk(b"IEND", b"")
    return lambda rows: start + chunk(b"IDAT", zlib.compress(rows.data, _EFFORT)) + end
