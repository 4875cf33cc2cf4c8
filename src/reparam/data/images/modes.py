"""Pictures of any mode as grey or RGB, upright and scaled; and why some cannot be used."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .messages import shown

#: What may be noted of a picture, and what is then said of all of them; other modes are noted by their name.
CONVERTED = {
    "alpha": "had an alpha channel, laid over white",
    "16-bit": "had 16 bits a pixel, divided by 257 to 8",
    "turned": "turned upright as their EXIF orientation says",
}
OTHER_MODES = ("CMYK", "YCbCr")

#: What brings a picture upright, by its EXIF orientation from 2 on; 1 is upright.
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")


class Unusable(Exception):
    """A picture cannot be used; the message is the reason, a few words."""


def upright_size(im: Image.Image) -> tuple[int, int]:
    """(height, width) as it will be after turning, without decoding."""
    # Pillow gives the turned size of a TIFF from the start, and decodes a PNG to look for EXIF at its end.
    told = im.format != "TIFF" and (im.format != "PNG" or "exif" in im.info)
    lying = told and _orientation(im) in (5, 6, 7, 8)
    return (im.width, im.height) if lying else (im.height, im.width)


def _orientation(im: Image.Image) -> Any:
    try:
        return im.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # EXIF that cannot be read says nothing of the pixels, which may be good
        return 1


def plain(im: Image.Image, notes: set[str]) -> Image.Image:
    """The picture upright, in mode L or RGB; what was done is added to ``notes``."""
    orientation = _orientation(im)
    im = _grey_or_rgb(im, notes)
    if orientation not in range(2, 9):
        return im
    notes.add("turned")
    return im.transpose(Image.Transpose[_TURNS[orientation - 2]])


def _grey_or_rgb(im: Image.Image, notes: set[str]) -> Image.Image:
    if im.mode == "F":
        raise Unusable("floating point numbers, a picture holds 8 or 16 bits")
    if im.mode == "I" or im.mode.startswith("I;16"):
        return _from_16_bits(im, notes)
    notes.update({im.mode}.intersection(OTHER_MODES))
    mode = "L" if im.mode in ("1", "L", "LA") else "RGB"
    if im.mode in ("LA", "PA", "RGBA") or "transparency" in im.info:
        found = _over_white(im, mode, notes)
    else:
        found = im if im.mode == mode else im.convert(mode)
    # A palette of greys only is how some programs store a grey picture.
    grey = im.mode in ("P", "PA") and len({band.tobytes() for band in found.split()}) == 1
    return found.convert("L") if grey else found


def _from_16_bits(im: Image.Image, notes: set[str]) -> Image.Image:
    x = np.asarray(im).astype(np.int64)
    low, high = int(x.min()), int(x.max())
    if low < 0 or high > 65535:
        raise Unusable(f"32-bit numbers from {low} to {high}, a picture holds 8 or 16 bits")
    # Mode I is how Pillow holds 16-bit PGM files (and PNG, in old versions), dark ones as well.
    if im.mode != "I" or im.format in ("PNG", "PPM") or high > 255:
        notes.add("16-bit")
        x = (x + 128) // 257
    return Image.fromarray(x.astype(np.uint8))


def _over_white(im: Image.Image, mode: str, notes: set[str]) -> Image.Image:
    im = im.convert("LA" if mode == "L" else "RGBA")
    alpha, colour = im.getchannel("A"), im.convert(mode)
    if alpha.getextrema()[0] == 255:
        return colour
    notes.add("alpha")
    white = Image.new(mode, im.size, "white")
    white.paste(colour, mask=alpha)
    return white


def scaled(im: Image.Image, size: tuple[int, int], how: str) -> Image.Image:
    """The picture brought to (height, width): its whole, or the largest central part of that shape."""
    height, width = size
    from_w, from_h = im.size
    if how == "crop":
        factor = min(from_h / height, from_w / width)
        # Whole pixels, so that cutting alone does not blur.
        from_h, from_w = max(1, round(height * factor)), max(1, round(width * factor))
    left, top = (im.width - from_w) // 2, (im.height - from_h) // 2
    method = Image.Resampling.LANCZOS if from_h > height or from_w > width else Image.Resampling.BICUBIC
    if from_h % height == 0 and from_w % width == 0:
        method = Image.Resampling.BOX
    return im.resize((width, height), method, box=(left, top, left + from_w, top + from_h))


def reason(e: Exception) -> str:
    """Why a picture cannot be used, in a few words, from what was raised."""
    if isinstance(e, Unusable):
        return str(e)
    if isinstance(e, UnidentifiedImageError):
        return "not a picture that Pillow can read"
    if isinstance(e, Image.DecompressionBombError):
        pixels = int(re.findall(r"\d+", str(e))[0])
        return f"a decompression bomb, it seems: {pixels:,} pixels, more than Pillow allows"
    if "truncated" in str(e).lower():
        return "truncated"
    text = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
    return f"broken: {shown(text) or type(e).__name__}"
