"""Sheets of pictures: which picture stands where, how large, and as which file."""

from __future__ import annotations

import base64
import importlib.util
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .plots import contact_sheet, png, sheet_columns

#: More classes than these are not laid out line by line.
CLASSES = 12
_WIDEST = 6


@dataclass(frozen=True)
class Cells:
    """Where pictures stand on a sheet, line by line.

    Attributes:
        columns: how many stand side by side.
        places: which picture each cell holds; -1 where it holds none.
        classes: names of the lines' classes, each as many lines high as the others; may be empty.
    """

    columns: int
    places: tuple[int, ...]
    classes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return math.ceil(len(self.places) / self.columns)

    @classmethod
    def plain(cls, count: int) -> Cells:
        """The first so many, as near to a square as may be."""
        return cls(sheet_columns(count), tuple(range(count)))

    @classmethod
    def by_class(cls, labels: Sequence[str], classes: Sequence[str], most: int) -> Cells:
        """About so many, a line (or several) for each class, with a cell left empty where it has too few."""
        longest = max(Counter(label for label in labels if label in classes).values())
        columns = max(1, min(_WIDEST, round(most / len(classes)), longest))
        each = columns * max(1, min(most // (columns * len(classes)), math.ceil(longest / columns)))
        places: list[int] = []
        for name in classes:
            found = [i for i, label in enumerate(labels) if label == name][:each]
            places += found + [-1] * (each - len(found))
        return cls(columns, tuple(places), tuple(classes))

    @classmethod
    def of(cls, labels: Sequence[str], count: int, most: int) -> Cells:
        """By class where there are labels and not too many of them; the lines in the labels' order."""
        classes = list(dict.fromkeys(labels))
        if 1 <= len(classes) <= CLASSES:
            return cls.by_class(labels, classes, most)
        return cls.plain(min(count, most))

    def sheet(self, pictures: np.ndarray, side: int) -> np.ndarray:
        """Pictures [n, H, W, C] on a sheet, each no larger than ``side``; what is missing is grey."""
        return contact_sheet(self.arranged(pictures, side), columns=self.columns)

    def arranged(self, pictures: np.ndarray, side: int, missing: int = 128) -> np.ndarray:
        """The picture of each cell, [cells, H, W, C]; one of the value ``missing`` where there is none."""
        places = np.asarray(self.places, int)
        known = (places >= 0) & (places < len(pictures))
        small = shrunk(pictures[places[known]], side)
        cells = np.full((len(places), *small.shape[1:]), missing, np.uint8)
        cells[known] = small
        return cells


@dataclass(frozen=True)
class Sheet:
    """A panel's pictures as the page carries them.

    Attributes:
        cells: where they stand, at all steps.
        links: the sheet at each kept step, and last the final one, as the ends of data URIs.
        kept: which steps these are.
        final: the final pictures, [cells, H, W, C]. size: height and width before they were shrunk.
        lossy: whether the final sheet, and those before it, are compressed with loss.
        maps: the maps of standard deviations at the steps ``mapped``, as the ends of data URIs; may be empty.
    """

    cells: Cells
    links: tuple[str, ...]
    kept: np.ndarray
    final: np.ndarray
    size: tuple[int, int]
    lossy: tuple[bool, bool] = (False, False)
    maps: tuple[str, ...] = ()
    mapped: np.ndarray = field(default_factory=lambda: np.arange(0))


def link(sheet: np.ndarray, quality: int | None = None) -> str:
    """A picture as a data URI but for its beginning: as PNG, or as JPEG of a quality from 1 to 95."""
    kind, raw = ("png", png(sheet)) if quality is None else ("jpeg", _jpeg(sheet, quality))
    return f"image/{kind};base64,{base64.b64encode(raw).decode()}"


def can_be_lossy() -> bool:
    """Whether Pillow, which writes JPEG, is installed."""
    return importlib.util.find_spec("PIL") is not None


def _jpeg(sheet: np.ndarray, quality: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    # Colour at the full resolution, since noise in single pixels is what some targets are judged by.
    Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet).save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def shrunk(pictures: np.ndarray, side: int) -> np.ndarray:
    """Pictures [..., H, W, C] with neither side above ``side``: each pixel averages the area it covers."""
    height, width = pictures.shape[-3:-1]
    if max(height, width) <= side:
        return pictures
    scale = side / max(height, width)
    small = _averaged(pictures.astype(np.float32), max(1, round(height * scale)), axis=-3)
    return np.rint(_averaged(small, max(1, round(width * scale)), axis=-2)).astype(np.uint8)


def _averaged(values: np.ndarray, parts: int, axis: int) -> np.ndarray:
    """The means of so many equal stretches of an axis, by differences of its running sum."""
    count = values.shape[axis]
    edges = np.linspace(0, count, parts + 1, dtype=np.float32)
    whole = np.minimum(edges.astype(int), count - 1)
    ahead = (edges - whole).reshape(-1, *[1] * (-axis - 1))
    before = np.cumsum(values, axis=axis) - values
    sums = before.take(whole, axis) + ahead * values.take(whole, axis)
    return np.diff(sums, axis=axis) * np.float32(parts / count)
