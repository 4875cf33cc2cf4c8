"""Loads the next batches in the background."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
#: Seconds that the end of the program waits for a load that is under way.
_PATIENCE = 10.0


@dataclass(frozen=True)
class _Loaded(Generic[T]):
    """What came of one step: a batch, or an error."""

    batch: T | None
    error: BaseException | None


class _Line(Generic[T]):
    """The steps loaded ahead, from ``first`` on, and the thread that loads them."""

    def __init__(self, load: Callable[[int], T], first: int, ahead: int, stop: int | None) -> None:
        self.next = first
        self.failed = False
        self._ready: deque[_Loaded[T]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # A daemon, so that a load that never returns cannot keep the program from ending.
        self._thread = threading.Thread(
            target=self._work, args=(load, first, ahead, stop), name="reparam-prefetch", daemon=True
        )
        self._thread.start()

    def _work(self, load: Callable[[int], T], step: int, ahead: int, stop: int | None) -> None:
        while stop is None or step < stop:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < ahead)
                if self._closed:
                    return
            try:
                found = _Loaded(load(step), None)
            except BaseException as e:  # whatever it is belongs to who asks for the step
                found = _Loaded(None, e)
            with self._changed:
                self._ready.append(found)
                self._changed.notify_all()
            if found.error is not None:
                return
            step += 1

    def take(self) -> _Loaded[T]:
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            found = self._ready.popleft()
            self._changed.notify_all()
        self.next += 1
        self.failed = found.error is not None
        return found

    def close(self, patience: float | None = None) -> None:
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(patience)


class Prefetcher(Generic[T]):
    """The batches of a training run, loaded a few steps ahead by a thread in the background.

    ``prefetcher(step)`` waits for that step's batch. Steps are expected one after another; any other
    step (a run that is resumed) starts afresh from there. Use it as a context manager, or close it.

    Args:
        load: gives the batch of a step; a pure function of it, called in order, in one thread.
        ahead: how many batches are kept ready at most.
        stop: the step that is no longer loaded; None never ends.
    """

    def __init__(self, load: Callable[[int], T], ahead: int = 3, stop: int | None = None) -> None:
        if ahead < 1:
            raise ValueError(f"ahead must be at least 1, found {ahead}.")
        self._load, self._ahead, self._stop = load, ahead, stop
        self._line: _Line[T] | None = None
        self._at_exit: weakref.finalize[..., Prefetcher[T]] | None = None

    def __call__(self, step: int) -> T:
        """The batch of a step.

        Raises:
            Exception: what loading it raised.
        """
        if self._stop is not None and step >= self._stop:
            return self._load(step)
        if self._line is None or self._line.next != step or self._line.failed:
            self.close()
            self._line = _Line(self._load, step, self._ahead, self._stop)
            # Python tears threads down in the middle of what they do unless they have ended by then.
            self._at_exit = weakref.finalize(self, self._line.close, _PATIENCE)
        found = self._line.take()
        if found.error is not None:
            raise found.error
        return found.batch  # type: ignore[return-value]

    def close(self) -> None:
        """Forget what is loaded, and wait for the load that is under way."""
        line, self._line = self._line, None
        if line is not None:
            line.close()
        if self._at_exit is not None:
            self._at_exit.detach()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
