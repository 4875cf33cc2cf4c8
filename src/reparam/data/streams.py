"""Pictures read from disk when they are asked for, for data sets that do not fit in memory."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import threading
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .images import Options, Source, memory, opened
from .images.messages import by, plural, some

if TYPE_CHECKING:
    from .images.decoding import Decoded
    from .images.source import Block, Item

#: Bytes of encoded pictures that are kept for a while. The order of training depends on it, by ``window``.
CACHE = 2**30
#: Samples that an order permutes at once, unless so many do not fit in three quarters of the cache.
WINDOW = 65_536
#: Pictures looked at to find out the shape of all, and blocks that they may lie in.
_LOOKED_AT, _BLOCKS_LOOKED_AT = 512, 16


class Cache:
    """The blocks used last, as many as fit into ``limit`` bytes; of larger ones, one."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.reads = 0
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int, read: Callable[[int], Block]) -> Block:
        """The block of that number, read if it is not here."""
        with self._lock:  # while reading too, so that two threads do not read the same
            if number in self._blocks:
                self._blocks.move_to_end(number)
                return self._blocks[number]
            found = read(number)
            self.reads += 1
            while self._blocks and self.held + found.size > self.limit:
                self.held -= self._blocks.popitem(last=False)[1].size
            self._blocks[number] = found
            self.held += found.size
            return found


class _Reader:
    """Decodes any of a source's pictures, in threads, and knows which could not be used."""

    def __init__(self, source: Source, ask: Options, shape: tuple[int, int, int], cache: int) -> None:
        from .images import decoding

        self.source, self.ask, self.shape = source, ask, shape
        self.cache = Cache(cache)
        self._decode = functools.partial(decoding.decode, ask=ask, expected=shape[1:] if ask.resize is None else None)
        self._workers = decoding.prepare()
        self._pool = ThreadPoolExecutor(self._workers, "reparam-decode")
        self._chunk = decoding.at_once(shape[1:])
        self._ends = None if source.blocks is None else np.cumsum(source.blocks)
        self._lock = threading.Lock()
        self.notes: Counter[str] = Counter()
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.bad: dict[int, tuple[str, str]] = {}

    def fetch(self, wanted: np.ndarray, out: np.ndarray) -> list[int]:
        """Put the pictures of these indices into ``out``; the places of those that cannot be used."""
        failed = []
        for place, item, found in self._decoded(wanted):
            if isinstance(found, str):
                self._note_bad(int(wanted[place]), item.name, found)
                failed.append(place)
            else:
                out[place] = self._checked(item, found)
        return failed

    def _decoded(self, wanted: np.ndarray) -> Iterator[tuple[int, Item, Decoded | str]]:
        """Place, picture and what came of it. Only so many are held encoded as keep the threads busy."""
        items = self._items(wanted)
        waiting: deque[tuple[list[tuple[int, Item]], Future[list[Decoded | str]]]] = deque()
        while chunk := list(itertools.islice(items, self._chunk)):
            waiting.append((chunk, self._pool.submit(self._decode_chunk, chunk)))
            if len(waiting) >= 2 * self._workers:
                yield from self._done(*waiting.popleft())
        for one in waiting:
            yield from self._done(*one)

    def _decode_chunk(self, chunk: list[tuple[int, Item]]) -> list[Decoded | str]:
        return [self._decode(item) for _, item in chunk]

    @staticmethod
    def _done(
        chunk: list[tuple[int, Item]], results: Future[list[Decoded | str]]
    ) -> Iterator[tuple[int, Item, Decoded | str]]:
        return ((place, item, found) for (place, item), found in zip(chunk, results.result(), strict=True))

    def _items(self, wanted: np.ndarray) -> Iterator[tuple[int, Item]]:
        """The pictures to decode, each with its place in ``wanted``; block after block."""
        places = np.argsort(wanted, kind="stable")
        if self._ends is None or self.source.block is None:
            yield from zip(places.tolist(), self.source.items(wanted[places]), strict=True)
            return
        blocks = np.searchsorted(self._ends, wanted[places], side="right")
        for place, number in zip(places.tolist(), blocks.tolist(), strict=True):
            yield place, self.cache.get(number, self.source.block).item(int(wanted[place]))

    def _checked(self, item: Item, found: Decoded) -> np.ndarray:
        """The pixels, shape [H, W] or [3, H, W]; an error if they are not of the shape of all others."""
        channels, height, width = self.shape
        if found.pixels is None or (self.ask.resize is None and found.size != (height, width)):
            raise DataError(
                f"{item.name} of {self.source.what} is {by(found.size)}, the pictures looked at first are "
                f"{by((height, width))} (height × width). They have to be of one size: --set data.size={height} "
                "--set data.resize=crop scales them and cuts out the centre."
            )
        if found.pixels.ndim == 3 and channels == 1:
            raise DataError(
                f"{item.name} of {self.source.what} is in colour, the pictures looked at first are grey. Say what all "
                "shall be: --set data.colour=rgb or --set data.colour=grey."
            )
        with self._lock:
            self.notes.update(found.notes)
            self.sizes[found.size] += 1
        return found.pixels if found.pixels.ndim == 2 else found.pixels.transpose(2, 0, 1)

    def _note_bad(self, index: int, name: str, reason: str) -> None:
        if not self.ask.skip_bad:
            raise DataError(
                f"{self.source.what}: {name} cannot be used: {reason}. Repair or remove it, or skip and count such "
                f"{self.source.unit}s with --skip-bad (data.skip_bad: true)."
            )
        with self._lock:
            self.bad[index] = name, reason


class Stream:
    """Pictures that are read when they are asked for; nothing is remembered but recent blocks, still encoded.

    They are the pictures that :func:`reparam.data.images.load_images` reads from the same path with the
    same options, to the bit. Safe to use from several threads.

    Attributes:
        count: how many there are.
        shape: of each, (C, H, W); uint8.
        labels: the numbers of all their classes, int64, shape [count]; None where there are none.
        classes: the names of the classes; () without labels.
        blocks: how many there are in each block that is read together, in order; None where each is read alone.
        window: how many samples an order may permute at once so that their blocks fit in the cache.
        remarks: what was found out so far, a short sentence each.
    """

    def __init__(self, reader: _Reader, at: np.ndarray) -> None:
        self._reader, self._at = reader, at
        source = reader.source
        self.count = len(at)
        self.shape = reader.shape
        self.labels = None if source.labels is None else torch.from_numpy(source.labels[at])
        self.classes = source.classes
        self.blocks = _blocks(source, at)
        self.window = max(1, min(WINDOW, reader.cache.limit * 3 // 4 * source.count // max(1, source.encoded)))

    @property
    def cache(self) -> Cache:
        """The blocks that are kept."""
        return self._reader.cache

    @property
    def skipped(self) -> str:
        """What could not be used so far, a sentence; "" if nothing."""
        reader = self._reader
        bad = [*reader.source.bad, *reader.bad.values()]
        return f"{plural(len(bad), reader.source.unit)} skipped so far: {some(bad)}" if bad else ""

    @property
    def remarks(self) -> list[str]:
        from .images.decoding import conversions

        reader = self._reader
        said = list(reader.source.remarks)
        if reader.ask.limit is not None and reader.ask.limit < reader.source.count:
            said.append(f"{reader.ask.limit} of {reader.source.count} pictures taken, evenly spread (data.limit)")
        said += [self.skipped] if self.skipped else []
        return said + conversions(reader.ask, reader.notes, reader.sizes, self.shape[0])

    @functools.cached_property
    def digest(self) -> str:
        """A hash of what is read, not of the pixels: names, sizes, counts, options, and which of them are taken."""
        reader = self._reader
        found = hashlib.sha256(repr((self.shape, self.classes, reader.ask.resize, reader.ask.colour)).encode())
        for one in reader.source.listing():
            found.update(repr(one).encode())
        found.update(self._at.astype("<i8").tobytes())
        if self.labels is not None:
            found.update(self.labels.numpy().astype("<i8").tobytes())
        return found.hexdigest()[:16]

    def only(self, index: Tensor) -> Stream:
        """Those of these indices, in that order; the cache is shared."""
        return Stream(self._reader, self._at[index.numpy()])

    def read(self, index: Tensor) -> Tensor:
        """The pictures of these indices, uint8, shape [n, C, H, W]; see :meth:`batch`."""
        return self.batch(index)[0]

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The pictures of these indices (on the CPU), uint8, shape [n, C, H, W], and their labels, int64, shape [n].

        Where ``skip_bad`` was asked for, a picture that cannot be used is replaced by the next one that can,
        with its label: the same one every time.

        Raises:
            DataError: if a picture cannot be used (of those asked to skip, none), or is of another size or colour than
            those looked at first.
        """
        used = index.numpy().copy()
        pixels = np.empty((len(used), *self.shape), dtype=np.uint8)
        left = np.arange(len(used))
        while len(left):
            part = pixels if len(left) == len(used) else np.empty((len(left), *self.shape), dtype=np.uint8)
            failed = self._reader.fetch(self._at[used[left]], part)
            if part is not pixels:
                pixels[left] = part
            left = np.sort(left[failed])
            used[left] = [self._after(i) for i in used[left].tolist()]
        return torch.from_numpy(pixels), None if self.labels is None else self.labels[torch.from_numpy(used)]

    def _after(self, index: int) -> int:
        """The next picture that is not known to be unusable."""
        for i in itertools.chain(range(index + 1, self.count), range(index)):
            if int(self._at[i]) not in self._reader.bad:
                return i
        raise DataError(f"{self._reader.source.what}: none of {self.count} pictures can be used: {self.skipped}.")


def open_stream(path: str, ask: Options, hub: str | None = None, cache: int = CACHE) -> Stream:
    """The pictures at ``path``, to be read when asked for; the arguments are those of ``load_images``.

    A few hundred of them are looked at, evenly spread, to find out the shape of all.

    Raises:
        UnknownName, DataError: as :func:`reparam.data.images.load_images`.
    """
    with contextlib.ExitStack() as stack:
        stream = stream_of(opened(path, ask, stack, hub), ask, cache)
        keep_open(stream, stack)
    return stream


def stream_of(source: Source, ask: Options, cache: int = CACHE) -> Stream:
    """A stream of a source's pictures, or of so many as are asked for; errors as of :func:`open_stream`."""
    from .images.decoding import Reading, spread

    if source.bad and not ask.skip_bad:
        raise DataError(
            f"{source.what}: {plural(len(source.bad), source.unit)} cannot be used: {some(source.bad)}. Remove them, "
            "or skip and count them with --skip-bad (data.skip_bad: true)."
        )
    at = spread(source.count, ask.limit)
    look = Reading(source, ask, at[_looked_at(_blocks(source, at), len(at), _LOOKED_AT)])
    channels, height, width = look.read().shape[1:]
    return Stream(_Reader(source, ask, (channels, height, width), cache), at)


def keep_open(stream: Stream, stack: contextlib.ExitStack) -> None:
    """Close what is on the stack when nobody reads from the stream, or from parts of it, any more."""
    weakref.finalize(stream._reader, stack.pop_all().close)


def too_large(source: Source, ask: Options) -> bool:
    """Whether the decoded pictures would take more than a quarter of the machine's memory; looks at a few of them.

    Of all its memory, not of what is available: every process and every resumed run has to find the same.
    """
    from .images.decoding import decode, prepare

    most = memory.total()
    count = source.count if ask.limit is None else min(ask.limit, source.count)
    if most is None or not count:
        return False
    one = 3 * math.prod(ask.size) if ask.size is not None else 0
    if not one:
        prepare()
        looked_at = source.items(_looked_at(source.blocks, source.count, 16))
        found = [decode(item, ask) for item in looked_at]
        one = max((x.pixels.size for x in found if not isinstance(x, str) and x.pixels is not None), default=0)
    return count * one > most / 4


def _blocks(source: Source, at: np.ndarray) -> tuple[int, ...] | None:
    """How many pictures ``at`` takes from each of the source's blocks, one after the other; None if they do not."""
    if source.blocks is None or (np.diff(at) < 0).any():
        return None
    counts = np.diff(np.searchsorted(at, np.cumsum((0, *source.blocks))))
    return tuple(counts[counts > 0].tolist())


def _looked_at(blocks: tuple[int, ...] | None, count: int, most: int) -> np.ndarray:
    """Some of the numbers 0 … count − 1, evenly spread: over a few blocks, where there are blocks."""
    from .images.decoding import spread

    if blocks is None:
        return spread(count, most)
    chosen = spread(len(blocks), _BLOCKS_LOOKED_AT)
    first = np.cumsum((0, *blocks))
    each = -(-most // max(1, len(chosen)))
    return np.concatenate([first[k] + spread(blocks[k], each) for k in chosen.tolist()] or [np.arange(0)])
