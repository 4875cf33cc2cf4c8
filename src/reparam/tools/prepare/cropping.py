"""Decodes pictures and cuts them to squares: what the workers do."""

from __future__ import annotations

import io
import warnings
from typing import Any, NamedTuple

import numpy as np

from ...errors import DataError

_MOST_PIXELS = 2**27  # of a scaled picture before it is cut: only of one that is all but a line


def centre_crop(picture: Any, size: int) -> Any:
    """The central square of a Pillow picture, scaled so that it just fits the shorter side; size × size.

    While the shorter side is at least twice ``size``, both sides are halved, ⌊n/2⌋, by averaging
    (Pillow's BOX). What remains is scaled by s = size/shorter with Pillow's antialiased BICUBIC, to
    sides round(s·n); pictures that are too small are enlarged by it. The square begins at
    ⌊(height − size)/2⌋ and ⌊(width − size)/2⌋. These are the steps of the ImageNet preparation
    of guided diffusion (Dhariwal & Nichol, arXiv 2105.05233), DiT and JiT.

    Raises:
        DataError: if the picture is so narrow that scaling it would take enormous memory.
    """
    from PIL import Image

    width, height = picture.size
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    wide, high = (round(side * scale) for side in picture.size)
    if wide * high > _MOST_PIXELS:
        raise DataError(f"{width}×{height} pixels: too narrow to be scaled to a side of {size}")
    picture = picture.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - size) // 2, (high - size) // 2
    return picture.crop((left, top, left + size, top + size))


class Task(NamedTuple):
    """What a worker does with every picture: (height, width), whether to cut, the mode or None, whether to a PNG."""

    side: tuple[int, int]
    cut: bool
    mode: str | None
    png: bool


class Made(NamedTuple):
    """A PNG, or uint8 of shape [H, W] or [H, W, 3]; and what there is to say of how it was made."""

    made: Any
    notes: tuple[str, ...]


class Bad(NamedTuple):
    """Why a picture cannot be used."""

    reason: str


def work(task: Task, payloads: list[Any]) -> list[Made | Bad]:
    """What comes of some pictures, each the bytes of a file, an array, or what opens one; run by a worker."""
    return [payload if isinstance(payload, Bad) else _made(task, payload) for payload in payloads]


def decoded(payload: Any) -> Any:
    """The picture as :class:`reparam.data.images.decoding.Decoded`, upright, grey or RGB; or why there is none."""
    from PIL import Image

    from ...data.images import asked
    from ...data.images.decoding import decode
    from ...data.images.source import Item

    Image.init()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        return decode(Item("", payload if callable(payload) else lambda: payload), asked())


def _made(task: Task, payload: Any) -> Made | Bad:
    from PIL import Image

    found = decoded(payload)
    if isinstance(found, str):
        return Bad(found)
    picture, notes = Image.fromarray(found.pixels), found.notes - {"grey", "colour"}
    if not task.cut and found.size != task.side:
        high, wide = found.size
        return Bad(f"{high}×{wide}, where the first is {task.side[0]}×{task.side[1]}; --size cuts them")
    if task.cut:
        if min(picture.size) < task.side[0]:
            notes.add("enlarged")
        try:
            picture = centre_crop(picture, task.side[0])
        except DataError as e:
            return Bad(str(e))
    if task.mode is not None:
        picture = picture.convert(task.mode)
    return Made(_png(picture) if task.png else np.asarray(picture), tuple(sorted(notes)))


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=3)
    return file.getvalue()
