"""Studies from end to end, as a user runs them: a process, a folder, an exit code."""

import html
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import reparam as rp
from reparam.cli import main
from reparam.errors import Conflict, DataError, NetworkError
from reparam.studies.pool import resources
from reparam.studies.sampling import sample_run

SMALL = [
    "data.dim=[2, 5]",
    "data.size=600",
    "network.hidden=16",
    "train.steps=40",
    "train.batch=64",
    "sample.n=100",
    "sample.steps=5",
]


def command(recipe, out, settings=SMALL, *more):
    sets = [word for s in settings for word in ("--set", s)]
    return [sys.executable, "-m", "reparam.cli", "study", recipe, "--out", str(out), *sets, *more]


def run(*args, **options):
    return subprocess.run(*args, capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "small"
    return out, run(command("spiral", out, SMALL, "--json"))


def test_a_study_leaves_what_it_promises(finished):
    out, done = finished
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # one JSON object, all else on standard error
    assert "the whole takes about" in done.stderr
    assert "GB of memory" in done.stderr
    rows = json.loads((out / "leaderboard.json").read_text())
    assert result["leaderboard"] == rows
    assert len(rows) == 6
    keys = {
        "run",
        "data",
        "network",
        "target",
        "loss_space",
        "weighting",
        "seed",
        "steps",
        "params",
        "wall_s",
        "status",
    }
    for row in rows:
        assert keys | {"metrics"} <= row.keys()
        assert row["status"] == "finished"
        assert set(row["metrics"]) == {"off_manifold", "manifold_distance", "sliced_wasserstein"}
        assert all(m["value"] >= 0 and m["floor"] >= 0 for m in row["metrics"].values())
        folder = out / row["run"]
        for name in ("recipe.yaml", "model.safetensors", "spec.json", "metrics.jsonl", "samples.npz", "trajectory.npz"):
            assert (folder / name).is_file(), name
        assert not (folder / "resume.safetensors").exists()
        assert np.load(folder / "samples.npz")["x"].shape == (100, 2 if "D=2" in row["data"] else 5)
        history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert history[-1]["x0_error"] == row["x0_error"]
    assert (out / "report.html").stat().st_size > 10_000
    # Within each data set the best comes first.
    for data in ("spiral D=2", "spiral D=5"):
        values = [r["metrics"]["sliced_wasserstein"]["value"] for r in rows if r["data"] == data]
        assert values == sorted(values)


def test_the_model_of_a_run_samples_again(finished, capsys):
    out, _ = finished
    before = np.load(out / "dim5-x0" / "samples.npz")["x"]
    denoiser = rp.load(out / "dim5-x0" / "model.safetensors")
    assert denoiser.target == rp.target("x0")
    assert denoiser.data["sigma_data"] > 0
    assert main(["sample", str(out / "dim5-x0"), "--n", "100", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    again = np.load(told["out"])["x"]
    assert told["shape"] == [100, 5]
    np.testing.assert_allclose(again, before, atol=1e-5)  # the same seed, the same noise
    assert main(["show", str(out / "dim5-eps")]) == 0
    words = capsys.readouterr().out
    assert "eps: the noise eps" in words
    assert "[0, 0.98]" in words


def test_paired_runs_share_weights_and_draws(finished):
    """Runs that differ in their target alone start from the same network."""
    from reparam.studies.recipe import load_recipe
    from reparam.studies.run import data_of, make_network, trainer_of

    runs = load_recipe("spiral", SMALL).runs
    a, b = (
        trainer_of(runs[r], data_of(runs[r]), make_network(runs[r], data_of(runs[r])))
        for r in ("dim5-x0", "dim5-velocity")
    )
    for p, q in zip(a.trainee.parameters(), b.trainee.parameters(), strict=True):
        assert torch.equal(p, q)
    for step in (0, 9):
        assert torch.equal(a.batches.draws(step).u, b.batches.draws(step).u)
        assert torch.equal(a.batches.draws(step).eps, b.batches.draws(step).eps)


def test_running_again_repeats_nothing(finished):
    out, _ = finished
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/model.safetensors")}
    done = run(command("spiral", out))
    assert done.returncode == 0, done.stderr
    assert "6 of 6 runs are done already" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/model.safetensors")} == before


def test_another_recipe_is_refused_and_nothing_lost(finished):
    out, _ = finished
    before = (out / "leaderboard.json").read_bytes()
    done = run(command("spiral", out, [*SMALL, "train.steps=41"]))
    assert done.returncode == 2
    assert "holds another study" in done.stderr
    assert "train.steps was 40 there, is 41 now" in done.stderr
    assert "--out" in done.stderr
    assert "Traceback" not in done.stderr
    assert (out / "leaderboard.json").read_bytes() == before


def comparable(out):
    rows = json.loads((out / "leaderboard.json").read_text())
    return [{k: v for k, v in row.items() if k != "wall_s"} for row in rows]


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"never happened; exit code {process.poll()}")


def test_interrupted_and_killed_studies_continue_to_the_same_leaderboard(tmp_path):
    settings = [*SMALL, "train.steps=1200", "target=[x0, velocity]"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(command("spiral", whole, settings)).returncode == 0

    def started():
        return any(broken.glob("*/recipe.yaml"))

    first = subprocess.Popen(
        command("spiral", broken, settings), stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL
    )
    wait_for(started, first)
    time.sleep(0.7)  # somewhere in the first runs
    first.send_signal(signal.SIGINT)
    _, told = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "To continue: reparam study spiral --out" in told
    assert "Traceback" not in told
    assert any(broken.glob("*/resume.safetensors"))  # in the middle of a run, not between runs

    second = subprocess.Popen(
        command("spiral", broken, settings),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    wait_for(lambda: any(broken.glob("*/result.json")), second)
    second.kill()  # the study dies at once; its workers notice and keep their state
    second.wait()
    wait_until_unlocked(broken)

    third = run(command("spiral", broken, settings))
    assert third.returncode == 0, third.stderr
    assert "continuing in" in third.stdout
    assert comparable(broken) == comparable(whole)


def wait_until_unlocked(out, seconds=20):
    """Until no worker is writing there any more."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.2)
        before = {p: p.stat().st_mtime_ns for p in out.glob("*/*")}
        time.sleep(0.8)
        if before == {p: p.stat().st_mtime_ns for p in out.glob("*/*") if p.exists()}:
            return


def test_two_studies_in_one_folder_are_refused(tmp_path):
    import fcntl

    out = tmp_path / "busy"
    out.mkdir()
    with (out / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run(command("spiral", out))
    assert done.returncode == 2
    assert "another study is running" in done.stderr


class Plain(nn.Module):
    """A user's own network, for vectors."""

    def __init__(self, dim=3, width=8):
        super().__init__()
        self.inner, self.outer = nn.Linear(dim + 1, width), nn.Linear(width, dim)

    def forward(self, x, time):
        return self.outer(torch.relu(self.inner(torch.cat([x, time[:, None]], 1))))


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape)


OWN = {
    "data": "digits",
    "network": "mlp",
    "target": ["x0", "velocity"],
    "train": {"steps": 20, "batch": 32},
    "sample": {"n": 50, "steps": 4},
}


def test_own_array_and_own_network_from_python(tmp_path):
    x = np.random.default_rng(0).normal(20, 3, (500, 3))
    lines = []
    done = rp.study(OWN, data=x, network=Plain, out=tmp_path / "own", say=lines.append)
    assert [r["status"] for r in done.rows] == ["finished"] * 2
    assert {r["data"] for r in done.rows} == {"given array"}
    assert "given array" in done.table()
    assert any("from (x - 20" in line or "from (x - 19" in line for line in lines)  # the preflight says how it scaled
    # Samples are in the units of the array.
    assert np.load(done.out / "x0" / "samples.npz")["x"].mean() == pytest.approx(20, abs=4)
    # Its weights come back into a network of the same kind.
    denoiser = rp.load(done.out / "x0" / "model.safetensors", net=Plain())
    assert rp.sample(denoiser, (4, 3), steps=2).shape == (4, 3)
    with pytest.raises(NetworkError, match="give it as net="):
        rp.load(done.out / "x0" / "model.safetensors")
    # The same call continues; other data are refused.
    again = rp.study(OWN, data=x, network=Plain, out=tmp_path / "own", say=lines.append)
    assert again.rows == done.rows
    with pytest.raises(DataError, match="the data have changed"):
        rp.study(OWN, data=x + 1e-3 * x**2, network=Plain, out=tmp_path / "own", say=lines.append)


def test_own_network_by_name_and_own_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, width):\n"
        "        super().__init__()\n"
        "        self.l = nn.Linear(3, width); self.o = nn.Linear(width, 2)\n"
        "    def forward(self, x, time):\n"
        "        print('noise on standard output')\n"
        "        return self.o(torch.relu(self.l(torch.cat([x, time[:, None]], 1))))\n"
        "def make(width=8):\n    return Net(width)\n"
        "def wrong():\n    return 3\n"
        "def wide():\n    return nn.Sequential(Net(4), nn.Linear(2, 5))\n"
    )
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(200, 2)))
    settings = [
        "data=x.npy",
        "network={name: 'mine:make', width: 6}",
        "train.steps=10",
        "train.batch=16",
        "target=[x0, v]",
    ]
    settings += ["sample.n=20", "sample.steps=3", "rank_by=sliced_wasserstein"]
    done = run(command("digits", "out", settings, "--json"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["leaderboard"]) == 2
    assert "running your code: network mine:make" in done.stderr
    sampled = run([sys.executable, "-m", "reparam.cli", "sample", "out/x0", "--n", "5"], cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    for network, message in (
        ("mine:wrong", "returned int, expected a torch.nn.Module"),
        ("mine:gone", "cannot import network 'mine:gone'"),
        ("nowhere:make", "cannot import network 'nowhere:make'"),
        ("{name: 'mine:make', height: 6}", "could not be made with"),
    ):
        bad = run(command("digits", "bad", [*settings, f"network={network}"], "--jobs", "1"), cwd=tmp_path)
        assert bad.returncode == 2
        assert message in bad.stderr
        assert "Traceback" not in bad.stderr


class TooWide(Plain):
    def forward(self, x, time):
        return torch.cat([x, x], 1)


def test_a_wrong_output_shape_is_found_before_anything_starts(tmp_path):
    with pytest.raises(NetworkError, match=r"TooWide returned shape \[\d+, 6\] for an input of shape \[\d+, 3\]"):
        rp.study(OWN, data=normal(100, 3), network=TooWide, out=tmp_path / "wide", say=lambda _: None)
    assert not (tmp_path / "wide" / "x0").exists()


def test_mlp_on_pictures_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"samples of shape \[4, 4\], and the network mlp takes vectors.*reshape"):
        rp.study(OWN, data=normal(100, 4, 4), out=tmp_path / "p", say=lambda _: None)


def test_a_diverged_run_is_listed_and_the_study_goes_on(tmp_path):
    calls = {"n": 0}

    class Breaks(Plain):
        def forward(self, x, time):
            out = super().forward(x, time)
            if self.training:
                calls["n"] += 1
            # The probe takes 6 steps; the first run breaks in its fourth.
            return out * float("nan") if calls["n"] == 10 else out

    data = normal(100, 3)
    done = rp.study(OWN, data=data, network=Breaks, out=tmp_path / "d", say=lambda _: None)
    status = {r["run"]: r["status"] for r in done.rows}
    assert sorted(status.values()) == ["diverged", "finished"]
    worst = done.rows[-1]
    assert worst["status"] == "diverged"
    assert "the loss became nan at step 4" in worst["reason"]
    assert all(m["value"] is None and m["floor"] is not None for m in worst["metrics"].values())
    assert "diverged" in done.table()
    # It is a result: running again does not repeat it.
    again = rp.study(OWN, data=data, network=Breaks, out=tmp_path / "d", say=lambda _: None)
    assert again.rows == done.rows


def test_the_best_learning_rate_stands_for_a_target(tmp_path):
    done = rp.study(
        {**OWN, "train": {"steps": 20, "batch": 32, "lr": [1e-6, 3e-3]}}, out=tmp_path / "lr", say=lambda _: None
    )
    assert len(done.rows) == 4
    for target in ("x0", "velocity"):
        rivals = [r for r in done.rows if r["target"] == target]
        best = min(rivals, key=lambda r: r["metrics"]["sliced_wasserstein"]["value"])
        assert [r["best_lr"] for r in rivals] == [r is best for r in rivals]
        assert all(r["lr_tried"] == [1e-6, 3e-3] for r in rivals)
    assert done.table().count("the best of 2") == 2


def test_a_dead_worker_loses_its_run_not_the_study(tmp_path):
    (tmp_path / "deadly.py").write_text(
        "import os\nfrom reparam.networks import MLP\n"
        "class Net(MLP):\n"
        "    calls = 0\n"
        "    def forward(self, x, time):\n"
        "        Net.calls += 1\n"
        "        if Net.calls == 9 and self.training and os.environ.get('OMP_NUM_THREADS'): os._exit(3)\n"
        "        return super().forward(x, time)\n"
        "def make():\n    return Net(64, 8)\n"
    )
    settings = [
        "network=deadly:make",
        "target=[x0, velocity]",
        "train.steps=10",
        "train.batch=16",
        "sample.n=20",
        "sample.steps=3",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = run(command("digits", "out", settings, "--jobs", "2"), cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert "ended with code 3" in done.stdout
    rows = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert {r["status"] for r in rows} == {"failed"}
    assert (tmp_path / "out" / "report.html").exists()


def test_a_run_has_its_share_of_the_cores_and_no_more_than_was_said(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for said, threads in (("", 4), ("64", 4), ("3", 3), ("1", 1), ("0", 4), ("many", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert resources(2, 2, "cpu").threads == threads


def test_estimate_and_lists(capsys):
    assert main(["study", "digits", "--estimate"]) == 0
    assert "it would take about" in capsys.readouterr().out
    assert main(["study"]) == 0
    assert "spiral" in capsys.readouterr().out


def likelihood(kind, **others):
    return {"name": "gaussian", "target": kind, **others}


@pytest.fixture(scope="module")
def likelihoods(tmp_path_factory):
    """A small study of several likelihoods, and what it said."""
    recipe = {
        "name": "likelihoods",
        "data": "digits",
        "network": {"name": "mlp", "hidden": 16},
        "target": [
            likelihood("v", covariance="full"),
            likelihood("v", covariance="full", of="noisy"),
            likelihood("edm", sigma_data=0.5),
            likelihood("edm", sigma_data=1.5),
            "v",
        ],
        "train": {"steps": 20, "batch": 64},
        "sample": {"n": 50, "steps": 4},
        "metrics": ["frechet_distance"],
    }
    lines = []
    out = tmp_path_factory.mktemp("study") / "l"
    return rp.study(recipe, data=normal(400, 2), out=out, device="cpu", say=lines.append), lines


def test_likelihoods_are_told_apart_in_folders_lines_and_table(likelihoods):
    done, lines = likelihoods
    runs = {
        "v-gaussian-full": "v ± full",
        "v-gaussian-full-of_noisy": "v ± full, of noisy",
        "edm-gaussian-diagonal-sigma_data_0.5": "edm ± diagonal, sigma_data 0.5",
        "edm-gaussian-diagonal-sigma_data_1.5": "edm ± diagonal, sigma_data 1.5",
        "v": "v",
    }
    assert {path.name for path in done.out.iterdir() if path.is_dir()} == set(runs)
    told = {re.match(r" *\[.*?\] (\S+): ", line)[1] for line in lines if re.match(r" *\[\d/5", line)}
    assert told == set(runs)
    names = [re.split(r"  +", line)[1] for line in done.table().splitlines()[3:]]
    assert sorted(names) == sorted(runs.values())
    page = html.unescape(done.report.read_text())
    assert all(name in page for name in names)


def test_a_line_on_a_run_says_how_honest_its_variance_is(likelihoods):
    done, lines = likelihoods
    for row in done.rows:
        (line,) = (line for line in lines if f"] {row['run']}: " in line)
        if row["run"] in ("v", "v-gaussian-full-of_noisy"):
            assert row["calibration"] is None
            assert "z²" not in line
            continue
        total = row["calibration"]["total"]
        z2, error, wrong, chance, nll = map(
            float,
            re.search(
                r"z² (\S+) ± (\S+), calibration error (\S+) \(by chance (\S+)\), −log q (\S+) nats an element", line
            ).groups(),
        )
        found = [total["z2"]["value"], total["z2"]["error"], total["calibration_error"], total["calibration_floor"]]
        assert [z2, error, wrong, chance, nll] == pytest.approx([*found, total["nll"]["value"]], rel=5.1e-3)


def test_several_runs_of_one_target_are_told_apart_as_on_the_page(tmp_path):
    targets = ["v", {"name": "v", "t_range": [0.1, 0.9]}, "x0"]
    recipe = {**OWN, "target": targets, "metrics": ["frechet_distance"]}
    done = rp.study(recipe, data=normal(100, 3), out=tmp_path / "v", device="cpu", say=lambda _: None)
    names = [re.split(r"  +", line)[1] for line in done.table().splitlines()[3:]]
    assert sorted(names) == ["v, t_range [0, 1]", "v, t_range [0.1, 0.9]", "x0"]
    assert {path.name for path in done.out.iterdir() if path.is_dir()} == {"v", "v-2", "x0"}


def test_a_likelihood_that_diverges_at_once_is_listed(tmp_path):
    recipe = {
        **OWN,
        "target": [likelihood("v", covariance="full"), "v"],
        "train": {"steps": 60, "batch": 512, "lr": 3.0},
    }
    done = rp.study(recipe, data=normal(400, 2), out=tmp_path / "d", device="cpu", say=lambda _: None)
    rows = {row["run"]: row for row in done.rows}
    row = rows["v-gaussian-full"]
    assert row["status"] == "diverged"
    assert int(re.search(r"variance \w+ to e.* at step (\d+)", row["reason"])[1]) <= 6  # the probe's steps
    assert "diverged" in done.table()
    assert not done.failed


def test_a_training_that_diverges_in_its_first_step_has_an_estimate(tmp_path):
    class Lost(Plain):
        def forward(self, x, time):
            return super().forward(x, time) * float("nan")

    lines = []
    done = rp.study(OWN, data=normal(100, 3), network=Lost, out=tmp_path / "n", device="cpu", say=lines.append)
    assert any("the whole takes about" in line for line in lines)
    assert [row["status"] for row in done.rows] == ["diverged"] * 2
    assert all("the loss became nan at step 1" in row["reason"] for row in done.rows)


def test_files_of_samples_are_named_after_what_was_asked_for(likelihoods):
    folder = likelihoods[0].out / "v"

    def name(**asked):
        return sample_run(folder, 4, device="cpu", **asked)[0].name

    sampler, grid = {"name": "ddim", "eta": 0.5}, {"name": "shifted", "shift": 3}
    assert name(sampler=sampler, steps=3, grid=grid) == "samples-4-seed0-ddim_eta=0.5-steps3-gridshifted_shift=3.npz"
    assert name(sampler="heun", steps=3, grid="linear", seed=2) == "samples-4-seed2-heun-steps3-gridlinear.npz"
    assert name() == "samples-4-seed0.npz"


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(Conflict, match=r"is not empty \(found thesis.tex\)"):
        rp.study(OWN, out=tmp_path, say=lambda _: None)
    assert sorted(p.name for p in tmp_path.iterdir()) in (["thesis.tex"], [".lock", "thesis.tex"])


def test_another_network_of_the_same_name_is_refused(tmp_path):
    rp.study(OWN, data=normal(100, 3), network=Plain(3, 8), out=tmp_path / "n", say=lambda _: None)
    with pytest.raises(DataError, match="the network has changed"):
        rp.study(OWN, data=normal(100, 3), network=Plain(3, 16), out=tmp_path / "n", say=lambda _: None)


def test_a_factory_that_returns_one_module_trains_copies_of_it(tmp_path):
    net = Plain()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    done = rp.study(OWN, data=normal(100, 3), network=lambda: net, out=tmp_path / "f", say=lambda _: None)
    assert len(done.rows) == 2
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("junk", ["{}", "[]", "not json"])
def test_a_corrupt_result_counts_as_not_done(tmp_path, junk):
    call = {"data": normal(100, 3), "network": Plain, "out": tmp_path / "c", "say": lambda _: None}
    first = rp.study(OWN, **call)
    (tmp_path / "c" / "x0" / "result.json").write_text(junk)
    again = rp.study(OWN, **call)
    assert comparable_rows(again.rows) == comparable_rows(first.rows)
    assert main(["report", str(tmp_path / "c")]) == 0
    (tmp_path / "c" / "leaderboard.json").write_text(junk)
    assert main(["report", str(tmp_path / "c")]) == 2
    (tmp_path / "c" / "study.json").write_text(junk)
    with pytest.raises(Conflict, match="cannot be read"):
        rp.study(OWN, **call)


def comparable_rows(rows):
    return [{k: v for k, v in row.items() if k != "wall_s"} for row in rows]


def test_rank_by_must_be_measured(tmp_path):
    with pytest.raises(DataError, match="rank_by: off_manifold is not measured on"):
        rp.study({**OWN, "rank_by": "off_manifold"}, out=tmp_path / "r", say=lambda _: None)


class Fussy(Plain):
    def forward(self, x):
        return x


def test_a_network_that_fails_is_told_how_it_is_called(tmp_path):
    with pytest.raises(NetworkError, match=r"failed in its first training step.*net\(x, time\)"):
        rp.study(OWN, data=normal(100, 3), network=Fussy, out=tmp_path / "q", say=lambda _: None)
