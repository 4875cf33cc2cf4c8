"""Runs, spread over worker processes, or one after another in this one."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from ..data import Data
from ..errors import Conflict, ReparamError, Unsupported, unknown
from .recipe import RunConfig
from .run import execute

_T = TypeVar("_T")


@dataclass(frozen=True)
class Resources:
    """What a study runs on: ``jobs`` runs at a time, each with ``threads`` threads on a device."""

    jobs: int
    threads: int
    devices: list[str]

    def describe(self) -> str:
        """For the line printed before a study."""
        where = ", ".join(sorted(set(self.devices)))
        return f"{self.jobs} at a time, {self.threads} thread{'s' * (self.threads > 1)} each, on {where}"


def resources(runs: int, jobs: int | None = None, device: str | None = None) -> Resources:
    """A sensible spread: small networks train fastest one a core, accelerators one each.

    A run has its share of the cores as threads, and no more of them than OMP_NUM_THREADS says.

    Raises:
        Unsupported: if the device is not there, or jobs is not positive.
    """
    if jobs is not None and jobs < 1:
        raise Unsupported(f"--jobs must be at least 1, found {jobs}.")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise Unsupported(f"device {kind!r} cannot be used; expected cpu, cuda or mps.")
    try:
        torch.empty(0, device=kind)
    except (RuntimeError, AssertionError) as e:
        reason = re.split(r"(?<=[.!?])\s", str(e).strip())[0].splitlines()[0]  # lists of all backends may follow
        raise Unsupported(f"device {kind!r} cannot be used here: {reason}") from e
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = torch.cuda.device_count() if kind == "cuda" else 1
    natural = cores if kind == "cpu" else count
    chosen = max(1, min(runs, jobs or natural))
    devices = [f"cuda:{i % count}" if kind == "cuda" else kind for i in range(chosen)]
    said = os.environ.get("OMP_NUM_THREADS", "")
    most = int(said) if said.isdecimal() and int(said) else cores
    return Resources(chosen, max(1, min(cores // chosen, most)), devices)


class Interrupted(KeyboardInterrupt):
    """A study was stopped before its end. Its state is kept; the message says how to go on."""


class Watch:
    """Told of everything that happens; a study prints from it."""

    def progress(self, run: str, step: int) -> None:
        """``run`` has done ``step`` steps."""

    def finished(self, row: dict[str, Any]) -> None:
        """A run has its row of the leaderboard."""

    def failed(self, run: str, message: str) -> None:
        """A run ended in an error."""


@contextlib.contextmanager
def gentle_interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, instead of raising; a second Ctrl-C raises."""
    event = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def run_here(
    runs: dict[str, RunConfig],
    out: Path,
    on: Resources,
    watch: Watch,
    stop: Callable[[], bool],
    *,
    data: Data | None,
    factory: Callable[..., nn.Module] | None,
) -> None:
    """Do the runs one after another in this process, where the caller's own objects live."""
    threads = torch.get_num_threads()
    torch.set_num_threads(on.threads)
    try:
        for run, config in runs.items():
            if stop():
                return
            try:
                row = execute(
                    run,
                    config,
                    out / run,
                    device=on.devices[0],
                    data=data,
                    factory=factory,
                    progress=lambda step, run=run: watch.progress(run, step),  # type: ignore[misc]
                    stop=stop,
                )
            except ReparamError as e:
                watch.failed(run, str(e))
                continue
            except Exception as e:
                traceback.print_exc()
                watch.failed(run, f"{type(e).__name__}: {e}")
                continue
            if row is not None:
                watch.finished(row)
    finally:
        torch.set_num_threads(threads)


#: What a worker tells, with who tells it; None at its end.
Events = queue.SimpleQueue[tuple["Worker", dict[str, Any] | None]]


class Worker(Protocol):
    """Does one run at a time, and puts what happens into a queue of events; None is the last of them.

    Attributes:
        run: what it is at, where it is at anything. device: what it computes on.
    """

    run: str | None
    device: str

    def start(self, command: dict[str, Any]) -> None:
        """Give it a run."""

    def end(self) -> None:
        """Ask it to save its state and end."""

    def wait(self, seconds: float) -> None:
        """Wait, at most so long, for its end."""

    def fate(self) -> str:
        """How one that has ended did."""


class Pool:
    """Where a study's runs are done: by default in worker processes on this machine."""

    #: How often a run may lose its worker and go on in another, before it counts as failed.
    losses = 0

    def __init__(self, on: Resources) -> None:
        self.on = on

    def check(self, folder: Path) -> None:
        """Make sure that workers can write to a folder, which this process has locked."""

    def call(self, work: Callable[..., _T], *arguments: Any, **named: Any) -> _T:
        """What ``work`` returns where a run would be done."""
        return work(*arguments, **named)

    def worker(self, events: Events, device: str) -> Worker:
        """A new worker."""
        return _Process(events, device, self.on.threads)


@contextlib.contextmanager
def pool_on(
    where: str, runs: int, jobs: int | None, device: str | None, per_run: Mapping[str, float] | None
) -> Iterator[Pool]:
    """The pool of a study, for as long as it needs it.

    Args:
        where: "local", or "ray" for a cluster.
        per_run: what a run asks of the cluster: num_cpus, num_gpus.

    Raises:
        UnknownName, Unsupported, Conflict: if it cannot be had.
    """
    if where == "local":
        if per_run:
            raise Conflict("per_run (--per-run) is what a run asks of a cluster; it goes with --on ray.")
        yield Pool(resources(runs, jobs, device))
        return
    if where != "ray":
        raise unknown("place for a study (--on)", where, ["local", "ray"])
    try:
        from .ray_pool import connected
    except ModuleNotFoundError as e:
        if e.name != "ray":
            raise
        raise Unsupported("a study on a cluster needs Ray, which is not installed: pip install 'reparam[ray]'.") from e
    with connected(runs, jobs, device, per_run) as pool:
        yield pool


def launch(threads: int, path: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """A worker process (:mod:`.worker`): commands go into its standard input, events come out of its output.

    Args:
        threads: it computes with. path: where it looks for modules.
        options: further ones of Popen.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(p for p in path if p),
        # Keep freed memory: activations of the same size are asked for again at every step.
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**32),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "reparam.studies.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,  # Ctrl-C at the terminal reaches the study, which tells its workers
        **options,
    )


def tell(process: subprocess.Popen[str], command: dict[str, Any]) -> None:
    """Give a worker process a run."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # a dead worker is noticed by its listener
        process.stdin.write(json.dumps(command) + "\n")
        process.stdin.flush()


def how_it_ended(code: int) -> str:
    """An exit code of a worker process in words."""
    how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"its process was {how}{' (out of memory?)' if code == -signal.SIGKILL else ''}"


class _Process:
    """A worker process on this machine, and the thread that reads its events."""

    def __init__(self, events: Events, device: str, threads: int):
        self.device = device
        self.run: str | None = None
        # Modules found here are found there; the folder's lock stays held until the last has written its state.
        self._process = launch(threads, sys.path, close_fds=False)
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: Events) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            events.put((self, json.loads(line)))
        events.put((self, None))

    def start(self, command: dict[str, Any]) -> None:
        tell(self._process, command)

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._process.terminate()

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def fate(self) -> str:
        return how_it_ended(self._process.wait())


def run_in_workers(
    runs: dict[str, RunConfig],
    out: Path,
    pool: Pool,
    watch: Watch,
    stop: Callable[[], bool],
    digests: dict[str, str],
    save_every: float = 10.0,
) -> None:
    """Do the runs in a pool's workers. A worker that dies loses its run, not the study.

    Args:
        digests: of each run's data, by run name: what a worker finds must be these.
        save_every: seconds between checkpoints.
    """
    _Shift(runs, out, pool, watch, stop, digests, save_every).work()


@dataclass
class _Shift:
    """The runs that wait, the workers that do the others, and what these tell."""

    runs: dict[str, RunConfig]
    out: Path
    pool: Pool
    watch: Watch
    stop: Callable[[], bool]
    digests: dict[str, str]
    save_every: float
    events: Events = field(default_factory=queue.SimpleQueue)
    workers: set[Worker] = field(default_factory=set)
    lost: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.waiting = list(self.runs)

    def work(self) -> None:
        try:
            for device in self.pool.on.devices:
                self.add(device)
            ending = False
            while self.workers:
                if self.stop() and not ending:
                    ending = True
                    for worker in self.workers:
                        worker.end()
                found = _next(self.events)
                if found is not None:
                    self.hear(*found)
        finally:
            _end_all(self.workers)

    def add(self, device: str) -> None:
        worker = self.pool.worker(self.events, device)
        self.workers.add(worker)
        self.give(worker)

    def give(self, worker: Worker) -> None:
        """The next run, or the end."""
        if not self.waiting or self.stop():
            worker.run = None
            worker.end()
            return
        worker.run = run = self.waiting.pop(0)
        told = {"device": worker.device, "threads": self.pool.on.threads, "save_every": self.save_every}
        folder, digest = str((self.out / run).absolute()), self.digests[run]
        worker.start({"run": run, "config": self.runs[run].to_dict(), "folder": folder, "digest": digest, **told})

    def hear(self, worker: Worker, event: dict[str, Any] | None) -> None:
        """What a worker tells; None is its end."""
        if event is None:
            self.end(worker)
        elif event["event"] == "progress":
            self.watch.progress(event["run"], event["step"])
        elif event["event"] == "stopped" and not self.stop():
            self.waiting.insert(0, event["run"])  # somebody ended the worker alone; another goes on from its state
            worker.run = None
        else:
            _report(event, self.watch)
            self.give(worker)

    def end(self, worker: Worker) -> None:
        """Another in its place, as long as there are runs."""
        self.workers.discard(worker)
        if worker.run and not self.stop():
            self.lost[worker.run] += 1
            losses = self.lost[worker.run]
            _bury(worker.run, worker.fate(), losses, self.pool.losses, self.waiting, self.watch)
        if self.waiting and not self.stop():
            self.add(worker.device)


def _next(events: Events) -> tuple[Worker, dict[str, Any] | None] | None:
    """What a worker tells, or None where none does for a while."""
    try:
        return events.get(timeout=0.2)
    except queue.Empty:
        return None


def _end_all(workers: set[Worker]) -> None:
    for worker in workers:
        worker.end()
    for worker in workers:
        worker.wait(10)


def _report(event: dict[str, Any], watch: Watch) -> None:
    if event["event"] == "done":
        watch.finished(event["row"])
    elif event["event"] == "failed":
        if event.get("traceback"):
            print(event["traceback"], file=sys.stderr)
        watch.failed(event["run"], event["message"])


def _bury(run: str, fate: str, times: int, allowed: int, waiting: list[str], watch: Watch) -> None:
    """A worker died at a run, which goes on in another as long as that is allowed."""
    if times <= allowed:
        print(f"{run}: {fate}; it goes on from its last checkpoint ({times} of {allowed} losses)", file=sys.stderr)
        waiting.insert(0, run)
        return
    often = f", the last of {times} losses" if allowed else ""
    watch.failed(run, f"{fate}{often}; run the same command again to continue it.")
