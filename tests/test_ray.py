"""Studies on a Ray cluster of one machine: the same numbers, and what happens where workers are lost."""

import collections
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

import reparam as rp
from reparam.cli import main
from reparam.errors import Conflict, OutputError, UnknownName, Unsupported
from reparam.files import read_header
from reparam.studies.pool import Watch, pool_on, resources, run_in_workers
from reparam.studies.recipe import load_recipe
from reparam.studies.run import data_of

#: A network that notes each of its training steps with who did it, takes its time, and fails if asked to.
NETWORK = """
import os, time
from torch import nn

class Noted(nn.Module):
    def __init__(self, log, pause, fail):
        super().__init__()
        self.net, self.log, self.pause, self.fail, self.calls = nn.Linear(2, 2), log, pause, fail, 0

    def forward(self, x, t):
        if self.training:
            self.calls += 1
            if self.fail and self.calls > 20:
                raise RuntimeError("the network of the user fails")
            if self.log:
                with open(self.log, "a") as log:
                    log.write(f"{os.getpid()} {os.getppid()}\\n")
            time.sleep(self.pause)
        return self.net(x)

def make(log="", pause=0.0, fail=False):
    return Noted(log, pause, fail)
"""

RECIPE = {
    "name": "small",
    "data": {"name": "spiral", "dim": 2, "size": 300},
    "network": {"name": "noted_network:make"},
    "target": "x0",
    "schedule": "rectified_flow",
    "train": {"steps": 60, "batch": 16},
    "sample": {"n": 50, "steps": 3},
}


@pytest.fixture(scope="module")
def cluster():
    ray_pool = pytest.importorskip("reparam.studies.ray_pool")
    with ray_pool.started(2):
        yield ray_pool


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to be in, with a module of the user's."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "noted_network.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield tmp_path
    sys.modules.pop("noted_network", None)


def comparable(done):
    return [{k: v for k, v in row.items() if k != "wall_s"} for row in done.rows]


@pytest.mark.usefixtures("cluster")
def test_the_leaderboard_of_a_cluster_is_the_local_one(here):
    """To the bit, with code found by sys.path, data by a relative path, and an error of the user's told alike."""
    import numpy as np

    np.save(here / "points.npy", np.random.default_rng(0).normal(size=(300, 2)))
    settings = ["network.fail=[false, true]", "data=points.npy"]
    said = []
    told = {"settings": settings, "jobs": 2, "device": "cpu"}
    on_ray = rp.study(RECIPE, out="on-ray", on="ray", per_run={"num_cpus": 1}, say=said.append, **told)
    local = rp.study(RECIPE, out="local", **told)
    assert any("2 at a time, 1 thread each, on 1 node by Ray" in line for line in said)
    threads = resources(2, 2, "cpu").threads
    if threads == 1:  # of another number the last bits may differ
        assert comparable(on_ray) == comparable(local)
        a, b = (next(Path(out).glob("*/model.safetensors")).read_bytes() for out in ("on-ray", "local"))
        assert a == b
    assert on_ray.failed == local.failed
    assert list(on_ray.failed.values()) == ["RuntimeError: the network of the user fails"]


class Seen(Watch):
    """Notes the steps, and the rows."""

    def __init__(self):
        self.steps, self.rows, self.failures = [], {}, {}

    def progress(self, run, step):
        self.steps.append(step)

    def finished(self, row):
        self.rows[row["run"]] = row

    def failed(self, run, message):
        self.failures[run] = message


def saved_step(folder):
    return int(json.loads(read_header(folder / "resume.safetensors").metadata["resume"])["step"])


def test_a_run_that_is_stopped_or_loses_its_worker_goes_on_from_its_checkpoint(cluster, here, capsys):
    """Stopped; then its process killed, then Ray's: no step is trained anew but those after the last checkpoint."""
    steps, log = 240, here / "log"
    settings = [f"train.steps={steps}", f"network.log={log}", "network.pause=0.02"]
    runs = load_recipe(RECIPE, settings).runs
    (run,) = runs
    digests, folder = {run: data_of(runs[run]).digest}, here / "out" / run
    folder.parent.mkdir()

    def who():
        return [tuple(map(int, line.split())) for line in log.read_text().splitlines()] if log.exists() else []

    with pool_on("ray", 1, None, "cpu", {"num_cpus": 1}) as pool:
        pool.check(folder.parent)
        first = Seen()
        run_in_workers(runs, folder.parent, pool, first, lambda: any(s > 20 for s in first.steps), digests, 0.2)
        assert not first.rows
        at = [saved_step(folder)]
        assert 20 < at[0] < steps

        watch, victims = Seen(), []

        def kill_twice():
            """After a checkpoint or two of each worker: first the process that trains, then Ray's that keeps it."""
            mine = who()[-1]
            if len(victims) < 2 and mine not in victims and mine != began and saved_step(folder) > at[-1] + 10:
                victims.append(mine)
                at.append(saved_step(folder))
                os.kill(mine[len(victims) - 1], signal.SIGKILL)
            return False

        began = who()[-1]
        run_in_workers(runs, folder.parent, pool, watch, kill_twice, digests, 0.2)
    assert len(victims) == 2
    assert not watch.failures
    assert watch.rows[run]["status"] == "finished"
    done = collections.Counter(who())
    assert len({process for process, _ in done}) == 4  # one whose parent was killed may end under another
    last = who()[-1]
    assert at[0] < at[1] < at[2]
    assert done[last] <= steps - at[2]  # it did not begin again
    assert done[began] == at[0]
    told = capsys.readouterr().err
    assert "killed by signal 9" in told
    assert "it goes on from its last checkpoint (2 of 5 losses)" in told


@pytest.mark.slow
def test_a_run_that_always_loses_its_worker_fails_in_the_end(cluster, here, monkeypatch):
    monkeypatch.setattr(cluster.RayPool, "losses", 1)
    (here / "code" / "deadly.py").write_text(
        "import os, signal\ndef make():\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    runs = load_recipe(RECIPE, ["network={name: deadly:make}"]).runs
    (run,) = runs
    watch = Seen()
    with pool_on("ray", 1, None, "cpu", {"num_cpus": 1}) as pool:
        pool.check(here)
        run_in_workers(runs, here, pool, watch, lambda: False, {run: data_of(runs[run]).digest})
    assert "killed by signal 9 (out of memory?) on node" in watch.failures[run]
    assert "the last of 2 losses; run the same command again" in watch.failures[run]


def test_a_node_that_does_not_see_the_folder_is_named(cluster, here, monkeypatch):
    with pool_on("ray", 1, None, "cpu", None) as pool:
        pool.check(here)  # all is well
        (here / ".lock").unlink()
        monkeypatch.setattr(cluster, "_MARK", "unseen")  # the driver writes where no node looks
        with pytest.raises(
            OutputError, match=f"node {os.uname().nodename} does not see {here}, where the study writes"
        ):
            pool.check(here)


def test_a_node_without_the_folder_of_the_caller_is_refused(tmp_path):
    ray_pool = pytest.importorskip("reparam.studies.ray_pool")
    (tmp_path / ".lock").write_text("word")
    assert ray_pool._refusal(str(tmp_path), "word", str(tmp_path)) is None
    assert "where the study was started" in ray_pool._refusal(str(tmp_path), "word", str(tmp_path / "elsewhere"))


def test_without_ray_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "reparam.studies.ray_pool", raising=False)
    monkeypatch.delattr("reparam.studies.ray_pool", raising=False)
    assert main(["study", "spiral", "--on", "ray", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'reparam[ray]'" in capsys.readouterr().err


def test_places_are_checked(tmp_path, capsys):
    with pytest.raises(UnknownName, match="Known: local, ray"), pool_on("rey", 1, None, None, None):
        pass
    with pytest.raises(Conflict, match="goes with --on ray"), pool_on("local", 1, None, None, {"num_cpus": 1}):
        pass
    with pytest.raises(Conflict, match="name them"):
        rp.study("spiral", network=torch.nn.Identity(), on="ray", out=tmp_path / "out")
    assert main(["study", "spiral", "--on", "ray", "--per-run", "8"]) == 2
    assert "expected a mapping" in capsys.readouterr().err


def nodes(*sizes):
    from reparam.studies.ray_pool import Node

    return [Node(str(i), f"n{i}", cpus, gpus) for i, (cpus, gpus) in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "runs", "jobs", "per_run", "expected"),
    [
        ([(8, 0)], 3, None, None, (3, 2, 0)),  # as on one machine: 8 // 3
        ([(8, 0), (8, 0)], 4, None, None, (4, 4, 0)),  # no run spans nodes
        ([(8, 0), (4, 0)], 3, None, None, (3, 4, 0)),
        ([(2, 0), (2, 0)], 9, None, None, (4, 1, 0)),
        ([(8, 0)], 9, 2, None, (2, 4, 0)),
        ([(32, 4), (32, 4)], 9, None, None, (8, 8, 1)),  # one a GPU
        ([(32, 4), (64, 0)], 9, None, None, (4, 8, 1)),  # nodes without GPUs are left out
        ([(32, 1)], 9, None, {"num_gpus": 0.25}, (4, 8, 0.25)),
        ([(32, 1)], 9, None, {"num_cpus": 2, "num_gpus": 0.1}, (9, 2, 0.1)),
        ([(32, 1)], 20, None, {"num_cpus": 2, "num_gpus": 0}, (16, 2, 0)),
        ([(8, 0)], 9, 6, {"num_cpus": 4}, (6, 4, 0)),  # four wait until a cluster has grown
    ],
)
def test_how_a_study_is_spread(sizes, runs, jobs, per_run, expected):
    ray_pool = pytest.importorskip("reparam.studies.ray_pool")
    found = ray_pool.share(nodes(*sizes), runs, jobs, None, per_run)
    assert (found.jobs, found.threads, found.gpus) == expected
    assert found.devices == ["cuda" if found.gpus else "cpu"] * found.jobs


@pytest.mark.parametrize(
    ("device", "per_run", "error", "said"),
    [
        (None, {"num_gpus": 1}, Unsupported, "no node has room .*n0 has 8 and 0"),
        ("cuda", None, Unsupported, "no node has room"),
        ("mps", None, Unsupported, "expected cpu or cuda"),
        ("cpu", {"num_gpus": 1}, Conflict, "contradict"),
        ("cuda", {"num_gpus": 0}, Conflict, "contradict"),
        (None, {"num_cpus": 0.5}, Unsupported, "whole number"),
        (None, {"num_gpus": 2}, Unsupported, "reparam train"),
        (None, {"num_cpu": 2}, UnknownName, "num_cpus"),
        (None, {"num_cpus": "2"}, Unsupported, "must be a number"),
        (None, {"num_cpus": 16}, Unsupported, "no node has room"),
    ],
)
def test_what_a_cluster_cannot_give_is_refused(device, per_run, error, said):
    ray_pool = pytest.importorskip("reparam.studies.ray_pool")
    with pytest.raises(error, match=said):
        ray_pool.share(nodes((8, 0)), 4, None, device, per_run)


def test_an_address_of_no_cluster_is_refused(monkeypatch):
    pytest.importorskip("reparam.studies.ray_pool")
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(Unsupported, match="RAY_ADDRESS=auto or HOST:PORT"), pool_on("ray", 1, None, None, None):
        pass
