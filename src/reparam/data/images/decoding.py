"""Decodes a source's pictures, in threads, into one array."""

from __future__ import annotations

import io
import itertools
import os
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from ...errors import DataError
from . import memory
from .messages import amount, by, plural, some
from .modes import CONVERTED, OTHER_MODES, Unusable, plain, reason, scaled, upright_size
from .source import Item, Options, Source

# Pillow reads many more formats, some of which start other programs (EPS); these are enough.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")


class Decoded(NamedTuple):
    """One picture as it came out: ``size`` (height, width) as stored but upright, before scaling.

    ``pixels`` has shape [H, W] or [H, W, 3]; None where only the size was looked at.
    """

    size: tuple[int, int]
    pixels: np.ndarray | None
    notes: set[str]


def prepare() -> int:
    """Make ready to decode in threads; how many of them to use."""
    Image.init()  # registers every format now: doing it in the threads would be a race
    return min(8, os.cpu_count() or 1)


def at_once(size: tuple[int, int]) -> int:
    """How many pictures of this size a thread takes at a time: more when they are small."""
    return max(1, min(16, 2**19 // (size[0] * size[1])))


def decode(item: Item, ask: Options, expected: tuple[int, int] | None = None, only_size: bool = False) -> Decoded | str:
    """The picture, or the reason why it cannot be used.

    Of a picture that is not to be scaled, and that has another size than the (height, width) that is
    expected, only the size is found out; so of all of them if ``only_size``.
    """
    try:
        found = item.open()
        if found is None:
            raise Unusable("no bytes")
        if isinstance(found, np.ndarray):
            return _finished(Image.fromarray(found), ask)
        with io.BytesIO(found) if isinstance(found, bytes) else found as file:
            return _of_file(file, ask, expected, only_size)
    except Exception as e:  # decoders raise whatever they like, and any of it is this one file's fault
        return reason(e)


def _of_file(file: BinaryIO, ask: Options, expected: tuple[int, int] | None, only_size: bool) -> Decoded:
    if not file.read(1):
        raise Unusable("empty file")
    file.seek(0)
    with Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN]) as im:
        # A camera's MPO file is a JPEG with previews behind the picture, not an animation.
        if getattr(im, "is_animated", False) and im.format != "MPO":
            raise Unusable(f"{getattr(im, 'n_frames', 'several')} frames, a picture has one")
        expected = expected or im.size
        if ask.resize is None and (only_size or expected not in (im.size, im.size[::-1])):
            return Decoded(upright_size(im), None, set())  # an error is certain; it tells no more than sizes
        im.load()
        return _finished(im, ask)


def _finished(im: Image.Image, ask: Options) -> Decoded:
    notes: set[str] = set()
    im = plain(im, notes)
    size = (im.height, im.width)
    notes.add("grey" if im.mode == "L" else "colour")
    if ask.colour == "grey" and im.mode != "L":
        im = im.convert("L")
    if ask.resize is not None and ask.size is not None:
        im = scaled(im, ask.size, ask.resize)
    return Decoded(size, np.asarray(im), notes)


def conversions(ask: Options, notes: Counter[str], sizes: Counter[tuple[int, int]], channels: int) -> list[str]:
    """What was done to the pictures that were read, by what was noted of them, a sentence each."""
    total = sum(sizes.values())
    said = [f"{notes[key]} of {total} {text}" for key, text in CONVERTED.items() if notes[key]]
    said += [f"{plural(notes[mode], f'{mode} picture')} converted to RGB" for mode in OTHER_MODES if notes[mode]]
    if ask.colour == "grey" and notes["colour"]:
        said.append(f"{notes['colour']} of {total} were in colour, made grey")
    elif notes["grey"] and channels == 3:
        said.append(f"{notes['grey']} of {total} were grey, repeated into three channels")
    if ask.resize is None or ask.size is None or set(sizes) == {ask.size}:
        return said
    many = len(sizes) > 1
    said.append(f"resized from {f'{len(sizes)} different sizes' if many else by(next(iter(sizes)))}")
    if small := sum(n for size, n in sizes.items() if size[0] < ask.size[0] or size[1] < ask.size[1]):
        said.append(f"{small} of {total} were smaller than {by(ask.size)} and enlarged")
    return said


def spread(total: int, count: int | None) -> np.ndarray:
    """So many of the numbers 0 … total − 1, or all, evenly spread, ascending."""
    count = total if count is None else min(count, total)
    return np.arange(count) * total // max(count, 1)


class Reading:
    """Reads a source's pictures, or so many of them as are asked for, and knows what came of them.

    Attributes:
        chosen: the indices of those to read, ascending.
        kept: the indices, of the source, of those that could be read.
        pixels: shape [len(chosen), C, H, W]; the first ``len(kept)`` are filled.
        sizes: how many pictures there are of each size, as (height, width).
    """

    def __init__(self, source: Source, ask: Options, chosen: np.ndarray | None = None):
        self.source = source
        self.ask = ask
        self.chosen = spread(source.count, ask.limit) if chosen is None else chosen
        self.kept: list[int] = []
        self.pixels: np.ndarray | None = None
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.notes: Counter[str] = Counter()
        self.bad = list(source.bad)
        self.expected = ask.size  # what the others are compared with, where nothing is scaled
        self.differ = False
        self.chunk = 1  # pictures a thread takes at a time: more when they are small

    def read(self) -> np.ndarray:
        """The pictures, shape [N, C, H, W], at least two; or an error that says what is wrong with them."""
        if self.ask.size is not None:
            self._refuse_too_large(1, *self.ask.size)
        workers = prepare()
        with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
            warnings.filterwarnings("ignore", module=r"PIL\.")
            results = self._decoded(pool, ahead=2 * workers)
            for index, (name, found) in zip(self.chosen.tolist(), results, strict=True):
                if isinstance(found, str):
                    self.bad.append((name, found))
                else:
                    self._add(index, found)
        self._refuse()
        assert self.pixels is not None
        return self.pixels[: len(self.kept)]

    def _decoded(self, pool: ThreadPoolExecutor, ahead: int) -> Iterator[tuple[str, Decoded | str]]:
        """What came of each, in order; no more than ``ahead`` chunks are taken from the source in advance."""
        items = iter(self.source.items(self.chosen))
        waiting: deque[Future[list[tuple[str, Decoded | str]]]] = deque()
        while chunk := list(itertools.islice(items, self.chunk)):
            waiting.append(pool.submit(self._decode_chunk, chunk))
            if len(waiting) >= ahead:
                yield from waiting.popleft().result()
        for rest in waiting:
            yield from rest.result()

    def _decode_chunk(self, chunk: list[Item]) -> list[tuple[str, Decoded | str]]:
        return [(item.name, decode(item, self.ask, self.expected, self.differ)) for item in chunk]

    def _add(self, index: int, found: Decoded) -> None:
        self.sizes[found.size] += 1
        self.notes.update(found.notes)
        self.chunk = at_once(found.size)
        if self.ask.resize is None:
            self.expected = self.expected or found.size
            self.differ = self.differ or found.size != self.expected
        if found.pixels is None or self.differ:
            return
        # A grey picture among RGB ones is repeated by numpy's broadcasting.
        one = found.pixels if found.pixels.ndim == 2 else found.pixels.transpose(2, 0, 1)
        self._room(one)[len(self.kept)] = one
        self.kept.append(index)

    def _room(self, one: np.ndarray) -> np.ndarray:
        """Where to put a picture: allocated at the first, from one channel to three at the first in colour."""
        channels = 3 if one.ndim == 3 or self.ask.colour == "rgb" else 1
        old = self.pixels
        if old is not None and old.shape[1] >= channels:
            return old
        height, width = one.shape[-2:]
        self._refuse_too_large(channels, height, width)
        self.pixels = np.empty((len(self.chosen), channels, height, width), dtype=np.uint8)
        if old is not None:
            self.pixels[: len(self.kept)] = old[: len(self.kept)]
        return self.pixels

    def _refuse_too_large(self, channels: int, height: int, width: int) -> None:
        count, one = len(self.chosen), channels * height * width
        if (free := memory.too_little(count * one)) is not None:
            raise DataError(
                f"{self.source.what}: {count} pictures of {by((height, width))} with {plural(channels, 'channel')} "
                f"take {amount(count * one)}, and {amount(free)} of memory is available. Make them smaller (--set "
                f"data.size=64 --set data.resize=crop), take fewer (--set data.limit={max(2, free // (2 * one))}) "
                "or read them while training (--set data.stream=true)."
            )

    def _refuse(self) -> None:
        if self.differ:
            raise DataError(self._different_sizes())
        what = self.source.what
        total = plural(len(self.chosen) + len(self.source.bad), self.source.unit)
        if self.bad and not self.ask.skip_bad:
            raise DataError(
                f"{what}: {len(self.bad)} of {total} cannot be used: {some(self.bad)}. Repair or remove "
                "them, or skip and count them with --skip-bad (data.skip_bad: true)."
            )
        if self.bad and not self.kept:
            raise DataError(f"{what}: none of {total} can be used: {some(self.bad)}.")
        if len(self.kept) < 2:
            raise DataError(f"{what}: {plural(len(self.kept), 'picture')} to use; at least 2 are needed.")

    def _different_sizes(self) -> str:
        area = sorted(self.sizes, key=lambda size: (size[0] * size[1], size))
        often, times = self.sizes.most_common(1)[0]
        found = f"are {by(often)}"
        if len(area) > 1:
            found = f"have {len(area)} different sizes: smallest {by(area[0])}, largest {by(area[-1])}, "
            found += f"most frequent {by(often)} ({times} of {sum(self.sizes.values())})"
        option, asked = "64", self.ask.size
        if asked is not None:
            option = str(asked[0]) if asked[0] == asked[1] else f"[{asked[0]},{asked[1]}]"
            found += f"; data.size asks for {by(asked)}"
        besides = f" Besides, {some(self.bad)} cannot be used (--skip-bad skips them)." if self.bad else ""
        return (
            f"the pictures of {self.source.what} {found} (height × width). They have to be of one size: "
            f"--set data.size={option} --set data.resize=crop scales them and cuts out the centre, "
            f"--set data.size={option} --set data.resize=squash ignores the aspect ratio.{besides}"
        )

    def remarks(self) -> list[str]:
        """What was left out and converted, a sentence each."""
        count = self.source.count
        said = []
        if len(self.chosen) < count:
            said.append(f"{len(self.chosen)} of {count} pictures taken, evenly spread (data.limit)")
        if self.bad:
            said.append(f"{plural(len(self.bad), self.source.unit)} skipped: {some(self.bad)}")
        channels = 0 if self.pixels is None else self.pixels.shape[1]
        return said + conversions(self.ask, self.notes, self.sizes, channels)
