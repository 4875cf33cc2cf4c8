"""Runs, spread over a Ray cluster.

An actor a worker keeps, on its node, the very process that a study on one machine has
(:mod:`.worker`), and passes on what it says; so what a run does, and every number in it, is
the same. Where an actor or its node is lost, the process notices that its standard input
has ended, saves its state and ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

if "RAY_ADDRESS" not in os.environ and "ray" not in sys.modules:
    # Of a cluster started here nothing is told to anyone, and whoever else can reach its port must not be able to run
    # code by it. Ray reads this once, where it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import Conflict, OutputError, Unsupported, unknown
from .pool import Events, Pool, Resources, how_it_ended, launch, tell

_T = TypeVar("_T")
#: How long a node may take to answer, and to see a file that was just written, in seconds.
_ANSWER, _PATIENCE = 120.0, 3.0
#: The file of a study's folder by which nodes know it.
_MARK = ".lock"


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: its name, cores and GPUs."""

    id: str
    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Share(Resources):
    """What a study gets of a cluster: each of ``jobs`` runs has ``threads`` cores and ``gpus`` GPUs of a node."""

    gpus: float
    nodes: list[Node]

    def describe(self) -> str:
        """For the line printed before a study."""
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        count = f"{len(self.nodes)} node{'s' * (len(self.nodes) > 1)}"
        return f"{self.jobs} at a time, {self.threads} thread{'s' * (self.threads > 1)}{gpus} each, on {count} by Ray"


def share(
    nodes: Sequence[Node], runs: int, jobs: int | None, device: str | None, per_run: Mapping[str, float] | None
) -> Share:
    """A sensible spread over nodes: that of one machine, node by node.

    A run never spans nodes. Of one node a study takes just what it takes of the machine without Ray.

    Args:
        per_run: num_cpus and num_gpus of a run; by default one GPU where there are any, and as many cores as
            leave room for all the runs that are done at a time.

    Raises:
        Unsupported: if no node has room for a run.
    """
    if jobs is not None and jobs < 1:
        raise Unsupported(f"--jobs must be at least 1, found {jobs}.")
    asked = _asked(per_run or {})
    kind = device or ("cuda" if asked.get("num_gpus", any(node.gpus for node in nodes)) else "cpu")
    if kind not in ("cpu", "cuda"):
        raise Unsupported(f"device {kind!r} cannot be used on a cluster; expected cpu or cuda (Ray chooses the GPU).")
    gpus = asked.get("num_gpus", 1.0) if kind == "cuda" else 0.0
    if bool(gpus) != (kind == "cuda") or (kind == "cpu" and asked.get("num_gpus")):
        raise Conflict(f"device {kind} and num_gpus: {asked['num_gpus']:g} a run contradict each other.")

    def fits(node: Node, threads: int) -> int:
        return int(min(node.cpus // threads, node.gpus / gpus + 1e-9 if gpus else node.cpus))

    def room(threads: int) -> int:
        return sum(fits(node, threads) for node in nodes)

    least = int(asked.get("num_cpus", 1))
    if not room(least):
        had = "; ".join(f"{node.name} has {node.cpus:g} and {node.gpus:g}" for node in nodes) or "there is no node"
        raise Unsupported(f"no node has room for a run of num_cpus: {least} and num_gpus: {gpus:g} ({had}).")
    if "num_cpus" in asked:
        threads, chosen = least, min(runs, jobs or room(least))  # more than there is room for wait for it
    else:
        chosen = min(runs, jobs or room(1), room(1))
        most = int(max(node.cpus for node in nodes))
        threads = next(n for n in range(most, 0, -1) if room(n) >= chosen)
    return Share(chosen, threads, [kind] * chosen, gpus, [node for node in nodes if fits(node, threads)])


def _asked(per_run: Mapping[str, float]) -> dict[str, float]:
    """What a run asks for, found sensible."""
    for key, value in per_run.items():
        if key not in ("num_cpus", "num_gpus"):
            raise unknown("key of per_run (--per-run)", key, ["num_cpus", "num_gpus"])
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise Unsupported(f"per_run: {key} must be a number, found {value!r}.")
    cpus, gpus = per_run.get("num_cpus", 1), per_run.get("num_gpus", 1)
    if cpus < 1 or cpus != int(cpus):
        raise Unsupported(f"per_run: num_cpus must be a whole number of at least 1, found {cpus:g}.")
    if gpus > 1:
        raise Unsupported(
            f"per_run: num_gpus is at most 1, found {gpus:g}: a run of a study trains on one GPU, or on a part of one "
            "(0.25 has four runs share it). For one training on many there is reparam train."
        )
    return dict(per_run)


@contextlib.contextmanager
def connected(
    runs: int, jobs: int | None, device: str | None, per_run: Mapping[str, float] | None
) -> Iterator[RayPool]:
    """A pool on the cluster at RAY_ADDRESS, on the one this process is connected to, or on one started for it.

    Raises:
        Unsupported: if there is none at that address, or it has no room.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if "://" in address:
        raise Unsupported(
            f"RAY_ADDRESS={address}: a study is started on a node of its cluster, with RAY_ADDRESS=auto or HOST:PORT."
        )
    if ray.is_initialized():
        yield RayPool(share(_nodes(), runs, jobs, device, per_run))
        return
    with _existing(address) if address else started(_cores()):
        yield RayPool(share(_nodes(), runs, jobs, device, per_run))


@contextlib.contextmanager
def _existing(address: str) -> Iterator[None]:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, RayError) as e:
        raise Unsupported(
            f"there is no Ray cluster to be reached at RAY_ADDRESS={address} ({str(e).splitlines()[0]}). Start one "
            "(ray start --head), or unset RAY_ADDRESS to have one started on this machine for the study alone."
        ) from e
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def started(cores: int) -> Iterator[None]:
    """A cluster of this machine alone, gone with all its files at the end.

    Raises:
        Unsupported: if Ray does not start.
    """
    # A short path: those of the sockets in it may have about a hundred characters.
    place = tempfile.mkdtemp(prefix="reparam-ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp"))
    try:
        try:
            ray.init(
                address="local",
                num_cpus=cores,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=100 * 2**20,
                _temp_dir=place,
            )
        except (ConnectionError, RuntimeError, RayError) as e:
            raise Unsupported(f"Ray could not be started on this machine: {str(e).splitlines()[0]}") from e
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(place, ignore_errors=True)


def _cores() -> int:
    """Those that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _nodes() -> list[Node]:
    return [
        Node(node["NodeID"], node["NodeManagerHostname"], has.get("CPU", 0.0), has.get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
        for has in [node["Resources"]]
    ]


def _refusal(folder: str, mark: str, here: str) -> str | None:
    """What keeps a node from doing runs, found out on it."""
    deadline = time.monotonic() + _PATIENCE
    while not _seen(Path(folder), mark):
        if time.monotonic() > deadline:
            return f"does not see {folder}, where the study writes (--out)"
        time.sleep(0.2)
    if not os.access(folder, os.W_OK):
        return f"may not write to {folder} (--out)"
    return None if os.path.isdir(here) else f"does not see {here}, where the study was started"


def _seen(folder: Path, mark: str) -> bool:
    with contextlib.suppress(OSError):
        return (folder / _MARK).read_text() == mark
    return False


def _error(node: str, refusal: str) -> OutputError:
    return OutputError(
        f"node {node} {refusal}. All nodes must see the same files under the same paths: use storage that they share."
    )


class Relay:
    """The actor: a worker process on a node, and what it says."""

    def __init__(self, threads: int, path: list[str], folder: str, mark: str, here: str) -> None:
        self._refusal = _refusal(folder, mark, here)
        self._process = None if self._refusal else launch(threads, path, cwd=here, stderr=subprocess.PIPE)

    def events(self) -> Iterator[dict[str, Any]]:
        """All that the process tells, until it has ended."""
        node = os.uname().nodename
        if self._process is None:
            raise _error(node, self._refusal or "")
        yield {"event": "up", "node": node}
        said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        readers = [
            (self._process.stdout, json.loads),
            (self._process.stderr, lambda line: {"event": "said", "text": line}),
        ]
        for stream, read in readers:
            threading.Thread(target=_forward, args=(stream, read, said), daemon=True).start()
        for _ in readers:
            while (event := said.get()) is not None:
                yield event
        yield {"event": "ended", "code": self._process.wait()}

    def start(self, command: dict[str, Any]) -> None:
        if self._process is not None:
            tell(self._process, command)

    def end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.terminate()


def _forward(
    stream: Any, read: Callable[[str], dict[str, Any]], into: queue.SimpleQueue[dict[str, Any] | None]
) -> None:
    for line in stream:
        into.put(read(line))
    into.put(None)


class _Remote:
    """A worker on a node, and the thread that listens to it."""

    def __init__(self, events: Events, device: str, relay: Any) -> None:
        self.device = device
        self.run: str | None = None
        self._relay = relay
        self._node: str | None = None
        self._fate = "its worker was lost"
        self._over = threading.Event()
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: Events) -> None:
        try:
            for reference in self._relay.events.options(num_returns="streaming").remote():
                self._hear(ray.get(reference), events)
        except RayTaskError as e:
            self._fate = str(e.cause)
        except RayError as e:
            where = "" if self._node is None else f" on node {self._node}"
            self._fate = f"its worker{where} was lost ({type(e).__name__})"
        finally:
            self._over.set()
            events.put((self, None))
            with contextlib.suppress(Exception):  # the cluster may be gone
                ray.kill(self._relay)

    def _hear(self, event: dict[str, Any], events: Events) -> None:
        if event["event"] == "up":
            self._node = event["node"]
        elif event["event"] == "said":
            print(event["text"], end="", file=sys.stderr)
        elif event["event"] == "ended":
            self._fate = f"{how_it_ended(event['code'])} on node {self._node}"
        else:
            events.put((self, event))

    def start(self, command: dict[str, Any]) -> None:
        self._relay.start.remote(command)

    def end(self) -> None:
        if self._node is None:  # still waiting for a place
            ray.kill(self._relay)
        else:
            self._relay.end.remote()

    def wait(self, seconds: float) -> None:
        self._over.wait(seconds)

    def fate(self) -> str:
        return self._fate


class RayPool(Pool):
    """Worker processes on the nodes of a Ray cluster."""

    losses = 5  # a node that goes may cost two: its successor may be sent there once more
    on: Share

    def __init__(self, on: Share) -> None:
        super().__init__(on)
        self._folder, self._mark = "", secrets.token_hex(16)

    def _options(self) -> dict[str, Any]:
        """What a run asks of Ray; its Python finds the modules that are found here."""
        path = os.pathsep.join(p for p in sys.path if p)
        return {
            "num_cpus": self.on.threads,
            "num_gpus": self.on.gpus,
            "runtime_env": {"env_vars": {"PYTHONPATH": path}},
        }

    def check(self, folder: Path) -> None:
        """Make sure that every node sees the folder and the one that the study was started in.

        Raises:
            OutputError: names a node that does not.
        """
        self._folder = str(folder.absolute())
        (folder / _MARK).write_text(self._mark)
        options = {**self._options(), "num_cpus": 0, "num_gpus": 0}
        asked = {
            node.name: ray.remote(_refusal)
            .options(**options, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
            .remote(self._folder, self._mark, os.getcwd())
            for node in self.on.nodes
        }
        for node, answer in asked.items():
            try:
                refusal = ray.get(answer, timeout=_ANSWER)
            except GetTimeoutError:
                refusal = f"did not answer within {_ANSWER:.0f} s"
            except RayError as e:
                refusal = f"cannot do runs: {str(e).strip().splitlines()[-1]}"
            if refusal:
                raise _error(node, refusal)

    def call(self, work: Callable[..., _T], *arguments: Any, **named: Any) -> _T:
        """What ``work`` returns on a node, with what a run gets."""
        try:
            found = ray.remote(_in_folder).options(**self._options()).remote(os.getcwd(), work, arguments, named)
            return ray.get(found)
        except RayTaskError as e:
            raise e.cause from e

    def worker(self, events: Events, device: str) -> _Remote:
        relay = ray.remote(Relay).options(**self._options(), max_concurrency=4)
        path = [p for p in sys.path if p]
        return _Remote(events, device, relay.remote(self.on.threads, path, self._folder, self._mark, os.getcwd()))


def _in_folder(folder: str, work: Callable[..., Any], arguments: Any, named: Any) -> Any:
    os.chdir(folder)
    return work(*arguments, **named)
