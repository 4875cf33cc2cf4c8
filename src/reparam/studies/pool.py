"""Runs, spread over worker processes on this machine, or one after another in this one."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..data import Data
from ..errors import ReparamError, Unsupported
from .recipe import RunConfig
from .run import execute


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
        raise Unsupported(f"device {kind!r} cannot be used here: {str(e).splitlines()[0]}") from e
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = torch.cuda.device_count() if kind == "cuda" else 1
    natural = cores if kind == "cpu" else count
    chosen = max(1, min(runs, jobs or natural))
    devices = [f"cuda:{i % count}" if kind == "cuda" else kind for i in range(chosen)]
    return Resources(chosen, max(1, cores // chosen), devices)


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


class _Worker:
    """A worker process, and the thread that reads its events."""

    def __init__(self, events: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]], device: str, threads: int):
        self.device, self.threads = device, threads
        self.run: str | None = None
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),  # modules found here are found there
            # Keep freed memory: activations of the same size are asked for again at every step.
            "MALLOC_MMAP_THRESHOLD_": str(2**30),
            "MALLOC_TRIM_THRESHOLD_": str(2**32),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "reparam.studies.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            close_fds=False,  # the folder's lock stays held until the last worker has written its state
            start_new_session=True,  # Ctrl-C at the terminal reaches the study, which tells its workers
        )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            events.put((self, json.loads(line)))
        events.put((self, None))

    def start(self, run: str, config: RunConfig, folder: Path, digest: str, save_every: float) -> None:
        assert self.process.stdin is not None
        self.run = run
        command = {
            "run": run,
            "config": config.to_dict(),
            "folder": str(folder),
            "digest": digest,
            "device": self.device,
            "threads": self.threads,
            "save_every": save_every,
        }
        with contextlib.suppress(BrokenPipeError):  # a dead worker is noticed by its listener
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.process.terminate()


def run_in_workers(
    runs: dict[str, RunConfig],
    out: Path,
    on: Resources,
    watch: Watch,
    stop: Callable[[], bool],
    digests: dict[str, str],
    save_every: float = 10.0,
) -> None:
    """Do the runs in ``on.jobs`` processes. A process that dies loses its run, not the study.

    Args:
        digests: of each run's data, by run name: what a process finds must be these.
    """
    events: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = queue.SimpleQueue()
    waiting = list(runs)
    workers: set[_Worker] = set()

    def give(worker: _Worker) -> None:
        if waiting and not stop():
            run = waiting.pop(0)
            worker.start(run, runs[run], out / run, digests[run], save_every)
        else:
            worker.run = None
            worker.end()

    try:
        for device in on.devices:
            worker = _Worker(events, device, on.threads)
            workers.add(worker)
            give(worker)
        told = False
        while workers:
            if stop() and not told:
                told = True
                for worker in workers:
                    worker.end()
            try:
                worker, event = events.get(timeout=0.2)
            except queue.Empty:
                continue
            if event is None:
                workers.discard(worker)
                _bury(worker, watch, stop)
                if waiting and not stop():
                    replacement = _Worker(events, worker.device, on.threads)
                    workers.add(replacement)
                    give(replacement)
            elif event["event"] == "progress":
                watch.progress(event["run"], event["step"])
            elif event["event"] == "stopped" and not stop():
                waiting.insert(0, event["run"])  # somebody ended the worker alone; another goes on from its state
                worker.run = None
            else:
                _report(event, watch)
                give(worker)
    finally:
        _end_all(workers)


def _end_all(workers: set[_Worker]) -> None:
    for worker in workers:
        worker.end()
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(10)


def _report(event: dict[str, Any], watch: Watch) -> None:
    if event["event"] == "done":
        watch.finished(event["row"])
    elif event["event"] == "failed":
        if event.get("traceback"):
            print(event["traceback"], file=sys.stderr)
        watch.failed(event["run"], event["message"])


def _bury(worker: _Worker, watch: Watch, stop: Callable[[], bool]) -> None:
    code = worker.process.wait()
    if worker.run and not stop():
        how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        watch.failed(worker.run, f"its process was {how}{hint}; run the same command again to continue it.")
