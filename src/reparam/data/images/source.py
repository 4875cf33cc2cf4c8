"""What is asked for, and what the pictures are before they are decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ...errors import DataError


class Options(NamedTuple):
    """The options of :func:`reparam.data.images.load_images`; ``size`` is (height, width)."""

    size: tuple[int, int] | None
    resize: str | None
    colour: str | None
    labels: str | None
    column: str | None
    classes: int | None
    skip_bad: bool
    limit: int | None


class Item(NamedTuple):
    """A picture to decode: what to call it, and what gets its file, the bytes of that, or an array [H, W(, C)]."""

    name: str
    open: Callable[[], Any]


class Block(NamedTuple):
    """Pictures that are read together, still encoded: what gives each of them, and the bytes they take."""

    item: Callable[[int], Item]
    size: int


@dataclass
class Source:
    """Pictures that are still to be decoded.

    Attributes:
        what: the path, for messages.
        count: how many there are.
        items: yields those of the given indices, which ascend; in any order if there are no blocks.
        labels: the numbers of all their classes, shape [count], int64, or None.
        classes: the names of the classes.
        remarks: what a reader must know of how they were found.
        bad: names and reasons of what is known to be unusable already.
        unit: what a picture is called in messages.
        blocks: how many pictures there are in each block, in order; None where any picture can be read alone.
        block: reads the block of that number.
        encoded: about how many bytes all the blocks take in memory.
        listing: tells the pictures, or the files they lie in, from others: names, sizes and counts.
    """

    what: str
    count: int
    items: Callable[[np.ndarray], Iterable[Item]]
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    remarks: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    unit: str = "file"
    blocks: tuple[int, ...] | None = None
    block: Callable[[int], Block] | None = None
    encoded: int = 0
    listing: Callable[[], Iterable[object]] = tuple


def refuse_names(ask: Options, what: str) -> None:
    """An error if a column or an array is asked for of pictures that lie in none."""
    if ask.column is None and ask.labels in (None, "none"):
        return
    option = f"data.column={ask.column}" if ask.column is not None else f"data.labels={ask.labels}"
    raise DataError(
        f"{option} names a column or an array, and {what} holds pictures without a name. Leave it out; the classes "
        "in a folder or archive are its sub-folders, unless --set data.labels=none ignores them."
    )
