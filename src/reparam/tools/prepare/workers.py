"""Makes the missing shards of a plan, with processes that decode."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from ...errors import DataError, ReparamError
from .cropping import Bad, Made, Task, work
from .plan import Plan, payload_of
from .shards import Note, Row

_CHUNK = 8  # pictures a worker takes at a time


class _Result(NamedTuple):
    number: int
    name: str
    found: Made | Bad


def fill(plan: Plan, skip_bad: bool, workers: int, progress: bool) -> None:
    """Make the missing shards, in their order.

    Raises:
        DataError: if a picture cannot be used, unless ``skip_bad``.
        ReparamError: if a worker dies.
        KeyboardInterrupt: with what to do next.
    """
    from tqdm import tqdm

    todo = [i for shard in plan.missing for i in plan.range(shard)]
    classes = plan.found.source.classes if plan.found.source.labels is not None else None
    hidden = not (progress and sys.stderr.isatty())
    with (
        pool_of(min(workers, -(-len(todo) // _CHUNK))) as pool,
        tqdm(
            total=plan.count, initial=plan.count - len(todo), unit=" pictures", file=sys.stderr, disable=hidden
        ) as bar,
    ):
        results = _results(plan, todo, pool, 2 * workers, bar.update)
        try:
            for shard, group in itertools.groupby(results, lambda result: result.number // plan.rows):
                note = Note(plan.id, shard)
                plan.kind.write(plan.path(shard), _good(group, note, plan, skip_bad), note, plan.side, classes)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; what is done is kept: run the same command again to go on") from None
        except BrokenProcessPool as e:
            raise ReparamError(
                "a worker ended unexpectedly, perhaps for lack of memory. What is done is kept: run the same command "
                f"again to go on, with fewer of them (--workers {max(1, workers // 2)})."
            ) from e


def _good(results: Iterator[_Result], note: Note, plan: Plan, skip_bad: bool) -> Iterator[Row]:
    """The pictures of a shard that can be used; what is said of them and the others goes into its note."""
    labels = plan.found.source.labels
    notes: Counter[str] = Counter()
    for number, name, found in results:
        if isinstance(found, Bad):
            note.bad.append((name, found.reason))
            continue
        notes.update(found.notes)
        note.rows += 1
        yield Row(name, int(labels[number]) if labels is not None else 0, found.made)
    note.notes = dict(sorted(notes.items()))
    if note.bad and not skip_bad:
        from ...data.images.messages import some

        raise DataError(
            f"{plan.found.source.what}: {some(note.bad)} cannot be used. Repair or replace them, or skip and list "
            "them with --skip-bad; the shards before are kept, and the same command goes on behind them."
        )


def _results(
    plan: Plan, todo: list[int], pool: Executor, ahead: int, advance: Callable[[int], Any]
) -> Iterator[_Result]:
    """What came of each picture, in order; no more than ``ahead`` chunks are read in advance."""
    task = Task(plan.side, plan.cut, plan.kind.mode, plan.kind.png)
    items = zip(todo, plan.found.source.items(np.array(todo, dtype=np.int64)), strict=True)
    waiting: deque[tuple[list[tuple[int, Any]], Future[list[Made | Bad]]]] = deque()
    while True:
        chunk = list(itertools.islice(items, _CHUNK))
        if chunk:
            payloads = [payload_of(item, plan.found.alone) for _, item in chunk]
            waiting.append((chunk, pool.submit(work, task, payloads)))
        if not waiting:
            return
        if not chunk or len(waiting) > ahead:
            done, future = waiting.popleft()
            for (number, item), found in zip(done, future.result(), strict=True):
                yield _Result(number, item.name, found)
            advance(len(done))


class _Inline(Executor):
    """Does the work where it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def pool_of(workers: int) -> Executor:
    """What runs the work: other processes, or with one worker this one."""
    if workers <= 1:
        return _Inline()
    # Not fork: torch's threads would not survive it. A server that has imported everything once forks quickly.
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, context, initializer=_follow_parent)


def _follow_parent() -> None:
    """Leave interrupts to the parent, which ends its workers without their tracebacks, and end where it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # nothing is open but the queue, on which the main thread would wait for ever


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
