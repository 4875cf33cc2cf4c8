"""reparam train: many processes, killed and continued, refused where it cannot work."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import reparam as rp
from reparam import files
from reparam.cli import main
from reparam.files import read_tensors
from reparam.spec import read_spec

pytest.importorskip("accelerate", reason="accelerate is not installed")

RECIPE = {
    "name": "small",
    "data": {"name": "spiral", "dim": 6, "size": 500},
    "network": {"name": "mlp", "hidden": 32, "layers": 3},
    "target": {"name": "k", "learned": True},
    "weighting": {"name": "edm2"},
    "train": {
        "steps": 20,
        "batch": 64,
        "warmup": 2,
        "precision": "float32",
        "also_ema": [0.9],
        "ema_widths": [0.05, 0.1],
        "snapshots": 10,
        "validations": 2,
    },
    "sample": {"n": 64, "steps": 4},
}


def written(folder, **changes):
    """A recipe file; ``train__steps=5`` changes a key below."""
    recipe = json.loads(json.dumps(RECIPE))
    for key, value in changes.items():
        *parents, last = key.split("__")
        at = recipe
        for parent in parents:
            at = at[parent]
        at[last] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def command(recipe, out, *more, processes=1):
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"] if processes > 1 else []
    return [
        sys.executable,
        *start,
        "-m",
        "reparam.cli",
        "train",
        str(recipe),
        "--out",
        str(out),
        "--tracker",
        "none",
        *more,
    ]


def run(recipe, out, *more, processes=1):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(recipe, out, *more, processes=processes),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return done


def last(out):
    """The tensors of the last checkpoint, without what tells the time."""
    return read_tensors(sorted((Path(out) / "checkpoints").iterdir())[-1])[0]


def fails(capsys, *args, code=2):
    assert main([str(a) for a in args]) == code
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    return told.err if code == 2 else told.out


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def near(a, b, most=1e-6):
    assert a.keys() == b.keys()
    assert max(float((a[k].double() - b[k].double()).abs().max()) for k in a) < most


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Twenty steps in one process, never stopped."""
    folder = tmp_path_factory.mktemp("alone")
    recipe = written(folder)
    return recipe, folder / "out", run(recipe, folder / "out", "--json")


def test_a_training_leaves_what_a_run_leaves(alone):
    _, out, done = alone
    row = json.loads(done.stdout)
    assert row["status"] == "finished"
    assert set(row["metrics"]) == {"off_manifold", "manifold_distance", "sliced_wasserstein"}
    found = {p.name for p in out.iterdir()}
    files_ = "recipe.yaml model.safetensors best.safetensors spec.json metrics.jsonl samples.npz result.json"
    assert {*files_.split(), "checkpoints", "averages"} <= found
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries] == list(range(1, 21))
    assert [e["step"] for e in entries if "x0_error" in e] == [10, 20]
    assert all(e["grad_norm"] > 0 and e["lr"] > 0 for e in entries)
    spec = read_spec(out / "model.safetensors")
    assert spec.to_dict()["target"]["name"] == "k"
    assert spec.to_dict()["target"]["k"] != 0.5  # it was learned
    assert rp.sample(rp.load(out / "model.safetensors"), (3, 6), steps=2).shape == (3, 6)


def test_two_processes_train_the_same_network_as_one(alone, tmp_path):
    """With a learned k and a learned u(σ): all of the state, averages and moments included, over 20 steps."""
    recipe, out, _ = alone
    run(recipe, tmp_path / "two", "--set", "train.accumulate=2", processes=2)
    near(last(out), last(tmp_path / "two"))
    rows = [json.loads((folder / "result.json").read_text()) for folder in (out, tmp_path / "two")]
    assert rows[0]["x0_error"] == pytest.approx(rows[1]["x0_error"], rel=1e-4)


def test_a_training_continues_on_another_number_of_processes(alone, tmp_path):
    recipe, out, _ = alone
    started = tmp_path / "moved"
    first = subprocess.Popen(
        command(recipe, started, "--save-every", "0", "--set", "train.validations=20", processes=2),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    wait_for(lambda: list((started / "checkpoints").glob("step-*")), first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    at = min(20, int(sorted((started / "checkpoints").glob("step-*"))[-1].stem[5:]))
    assert at < 20
    run(recipe, started, "--set", "train.validations=20")
    near(last(out), last(started))


def wait_for(ready, process, seconds=60):
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, "the training ended by itself"
        assert time.monotonic() < end, "the training did not come so far"
        time.sleep(0.005)


def killed_at_random(tmp_path, times, seed):
    """Trained in one piece, and killed and continued; slow enough steps that kills fall between and into them."""
    more = {"train__steps": 400, "train__batch": 512, "train__validations": 20, "network__hidden": 256}
    recipe = written(tmp_path, **more)
    run(recipe, tmp_path / "whole")
    draw, out, steps = np.random.default_rng(seed), tmp_path / "killed", []
    for _ in range(times):
        going = subprocess.Popen(
            command(recipe, out, "--save-every", "0.0005"),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        before = set((out / "checkpoints").glob("step-*"))
        wait_for(lambda before=before: set((out / "checkpoints").glob("step-*")) - before, going)
        time.sleep(float(draw.uniform(0, 0.15)))
        going.kill()
        going.wait()
        kept = sorted((out / "checkpoints").glob("step-*"))
        for path in kept:
            read_tensors(path)  # whole, whenever it died
        steps.append(int(kept[-1].stem[5:]))
    assert steps == sorted(set(steps)), "each went on from where the one before it was"
    assert steps[-1] < 400
    run(recipe, out)
    assert same(last(tmp_path / "whole"), last(out))
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()
    assert not list((out / "checkpoints").glob(".*"))  # nor anything half written left behind


def test_killed_at_any_instant_it_continues_to_the_bit(tmp_path):
    killed_at_random(tmp_path, 5, seed=0)


@pytest.mark.slow
def test_killed_twenty_times_it_continues_to_the_bit(tmp_path):
    killed_at_random(tmp_path, 20, seed=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_saves_first(alone, tmp_path, number):
    recipe = written(tmp_path, train__steps=100_000)
    out = tmp_path / "out"
    going = subprocess.Popen(command(recipe, out, "--save-every", "60"), stderr=subprocess.PIPE, text=True)
    wait_for((out / "recipe.yaml").exists, going)
    time.sleep(0.5)
    going.send_signal(number)
    _, told = going.communicate(timeout=60)
    assert going.returncode == 130
    (kept,) = (out / "checkpoints").iterdir()
    step = int(kept.stem[5:])
    assert f"stopped at step {step} of 100000" in told
    assert f"reparam train {recipe} --out {out}" in told
    assert read_tensors(kept)[1]
    assert (out / "model.safetensors").exists()


def test_an_average_of_any_width_is_made_afterwards(alone, tmp_path, capsys):
    """Of a width that was tracked it is that average; of another, a network of its own that samples."""
    _, out, _ = alone
    assert main(["average", str(out), "--width", "0.1", "--out", str(tmp_path / "a.safetensors")]) == 0
    made, tracked = rp.load(tmp_path / "a.safetensors"), last(out)
    for name, value in made.net.state_dict().items():
        torch.testing.assert_close(value, tracked[f"average.width-0.1/net.{name}"])
    assert made.target.k == pytest.approx(float(tracked["average.width-0.1/objective.k_logit"].sigmoid()), rel=1e-5)
    told = fails(capsys, "average", out, "--width", "0.0001")
    assert "width" in told
    other = tmp_path / "plain"
    assert main(["train", str(written(tmp_path, train__ema_widths=[])), "--out", str(other), "--tracker", "none"]) == 0
    assert "train.ema_widths=[0.05,0.1]" in fails(capsys, "average", other, "--width", "0.1")


def test_curves_go_to_tensorboard(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = written(tmp_path)
    assert main(["train", str(recipe), "--out", str(tmp_path / "out")]) == 0
    (place,) = (tmp_path / "out" / "curves").iterdir()
    found = events.EventAccumulator(str(place))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert {"loss", "grad_norm", "lr", "x0_error", "samples_per_second", "x0_error/t_0.00_to_0.10"} <= tags
    assert [e.step for e in found.Scalars("x0_error")] == [10, 20]
    assert all(e.value > 100 for e in found.Scalars("samples_per_second"))
    logged = {e.step: e.value for e in found.Scalars("loss")}
    written_down = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert logged == pytest.approx({e["step"]: e["loss"] for e in written_down}, rel=1e-6)


def test_in_a_log_a_line_now_and_then_says_how_far_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("reparam.studies.train._QUIET", 0.0)
    assert main(["train", str(written(tmp_path)), "--out", str(tmp_path / "out"), "--tracker", "none"]) == 0
    lines = re.findall(r"step (\d+) of 20: loss ([\d.e+]+), ([\d.e+]+) steps/s, about .* left", capsys.readouterr().out)
    assert [int(step) for step, _, _ in lines] == list(range(1, 21))
    assert all(float(rate) > 1 for _, _, rate in lines)


def test_a_confidence_that_is_added_ends_with_how_honest_it_is(tmp_path, capsys):
    recipe = written(tmp_path, target="v", weighting=None)
    asked = ["--tracker", "none", "--device", "cpu"]
    assert main(["train", str(recipe), "--out", str(tmp_path / "base"), *asked]) == 0
    assert "z²" not in capsys.readouterr().out
    assert main(["train", "--add-confidence", str(tmp_path / "base"), "--out", str(tmp_path / "sure"), *asked]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("v-gaussian-diagonal: "))
    total = json.loads((tmp_path / "sure" / "result.json").read_text())["calibration"]["total"]
    told = re.search(r"finished: .*, z² (\S+) ± \S+, calibration error (\S+) \(.*\), −log q (\S+) nats", line).groups()
    found = [total["z2"]["value"], total["calibration_error"], total["nll"]["value"]]
    assert [float(x) for x in told] == pytest.approx(found, rel=5.1e-3)


def test_the_estimate_counts_operations_and_does_nothing(tmp_path, capsys):
    recipe = written(tmp_path, network={"name": "mlp", "hidden": 64, "layers": 3}, target="x0", weighting=None)
    assert main(["train", str(recipe), "--out", str(tmp_path / "out"), "--estimate"]) == 0
    told = capsys.readouterr().out
    widths = [p for p in rp.networks.MLP(6, 64, 3).parameters() if p.ndim == 2]
    # Two operations a weight and sample; three products a layer, but no gradient of the input.
    exact = 2 * 64 * (3 * sum(w.numel() for w in widths) - widths[0].numel())
    said = float(told.split(" s a step of ")[1].split(" MFLOP")[0]) * 1e6
    assert said == pytest.approx(exact, rel=0.25)
    assert main(["train", str(recipe), "--out", str(tmp_path / "out"), "--estimate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["flops"] == pytest.approx(exact, rel=0.25)
    assert found["bytes"] > 1e8
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ bad input


def test_a_recipe_without_a_target(tmp_path, capsys):
    recipe = written(tmp_path, target=None)
    assert "target: missing" in fails(capsys, "train", recipe, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_compares_several_runs(tmp_path, capsys):
    told = fails(capsys, "train", "spiral", "--out", tmp_path / "out")
    assert "compares 12 runs (dim2-x0" in told
    assert "--run dim2-x0" in told
    assert "Did you mean 'dim8-x0'" in fails(capsys, "train", "spiral", "--run", "dim8-x", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_batch_that_the_processes_do_not_divide(alone, tmp_path):
    recipe, _, _ = alone
    out = tmp_path / "out"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = command(recipe, out, "--set", "train.batch=33", processes=2)
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode != 0
    assert "train.batch is 33 samples a step, which 2 processes × 1 accumulated parts do not divide" in done.stderr
    assert "--set train.batch=32" in done.stderr
    assert not out.exists()


def test_a_batch_that_its_parts_do_not_divide(tmp_path, capsys):
    told = fails(capsys, "train", written(tmp_path), "--out", tmp_path / "out", "--set", "train.accumulate=3")
    assert "1 processes × 3 accumulated parts do not divide evenly. Use --set train.batch=63" in told
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_recipe(alone, tmp_path, capsys):
    recipe, out, _ = alone
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    more = ["--set", "train.lr=0.01", "--set", "target=velocity", "--set", "weighting=null"]
    told = fails(capsys, "train", recipe, "--out", out, *more)
    assert "train.lr was 0.001 there, is 0.01 now" in told
    assert "target.name was 'k' there, is 'velocity' now" in told
    assert "Nothing was touched" in told
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    # What leaves the numbers alone may change: here, how the finished network is sampled for its scores.
    assert (
        main(["train", str(recipe), "--out", str(out), "--set", "train.accumulate=4", "--set", "sample.steps=5"]) == 0
    )
    assert main(["train", str(recipe), "--out", str(out)]) == 0
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    assert "found thesis.tex" in fails(capsys, "train", recipe, "--out", foreign)


def test_checkpoints_that_are_damaged(alone, tmp_path, capsys):
    """A damaged one is named and passed over for the one before; only damaged ones are an error."""
    recipe = written(tmp_path)
    out = tmp_path / "out"
    assert main(["train", str(recipe), "--out", str(out), "--save-every", "0", "--tracker", "none"]) == 0
    first, second = sorted((out / "checkpoints").iterdir())
    (out / "result.json").unlink()
    second.write_bytes(second.read_bytes()[:1000])
    assert main(["train", str(recipe), "--out", str(out), "--tracker", "none"]) == 0
    told = capsys.readouterr().out
    assert f"warning: {second} is not a readable safetensors file" in told
    assert "at step 19" in told
    near(last(alone[1]), last(out))  # which another number of threads computed
    (out / "result.json").unlink()
    for path in (out / "checkpoints").iterdir():
        path.write_bytes(b"")
    assert "none of the checkpoints in" in fails(capsys, "train", recipe, "--out", out, "--tracker", "none")
    assert first.exists()


def test_a_number_that_is_not_finite_ends_it_and_keeps_the_last_good_state(tmp_path, capsys, monkeypatch):
    (tmp_path / "failing.py").write_text(
        "import torch\n"
        "import reparam as rp\n"
        "class Net(rp.networks.MLP):\n"
        "    calls = 0\n"
        "    def forward(self, x, time):\n"
        "        y = super().forward(x, time)\n"
        "        if self.training:\n"
        "            self.calls += 1\n"
        "        bad = torch.where((time > 0.9) & (torch.tensor(self.calls == 13)), torch.nan, 1.0)\n"
        "        return y * bad[:, None] if self.training else y\n"
        "def make():\n"
        "    return Net(6, 32, 3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = written(tmp_path, network="failing:make", target="x0", weighting=None)
    out = tmp_path / "out"
    told = fails(capsys, "train", recipe, "--out", out, "--save-every", "0", "--tracker", "none", code=1)
    assert "the loss became nan at step 13, for a sample at t = 0.9" in told
    assert "(noise bin 0.9 to 1)" in told
    assert "The last good checkpoint is" in told
    kept = sorted((out / "checkpoints").iterdir())
    assert kept[-1].name == "step-000000012.safetensors"
    assert all(bool(v.isfinite().all()) for v in last(out).values() if v.is_floating_point())
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert entries[-1]["step"] == 13
    assert entries[-1]["loss"] is None


def test_a_full_disk_ends_it_and_keeps_the_last_state(tmp_path, capsys, monkeypatch):
    recipe, out = written(tmp_path), tmp_path / "out"
    replace, calls = os.replace, []

    def full(source, target):
        if Path(target).name == "step-000000008.safetensors":
            calls.append(target)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    told = fails(capsys, "train", recipe, "--out", out, "--save-every", "0", "--tracker", "none")
    assert "No space left on device" in told
    assert "step-000000007.safetensors" in told
    assert f"reparam train {recipe} --out {out}" in told
    monkeypatch.setattr(files.os, "replace", replace)
    assert main(["train", str(recipe), "--out", str(out), "--tracker", "none"]) == 0
    assert calls


def test_two_trainings_into_one_folder(tmp_path, capsys):
    recipe, out = written(tmp_path, train__steps=100_000), tmp_path / "out"
    going = subprocess.Popen(command(recipe, out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for((out / "recipe.yaml").exists, going)
    try:
        assert "another training is running in" in fails(capsys, "train", recipe, "--out", out)
    finally:
        going.kill()
        going.wait()


def pictures(folder, count=40, damaged=()):
    """Tar shards of PNGs; the members numbered in ``damaged`` are not pictures."""
    from io import BytesIO

    Image = pytest.importorskip("PIL.Image")
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"part-{shard}.tar", "w") as tar:
            for i in range(shard * count // 2, (shard + 1) * count // 2):
                buffer = BytesIO()
                Image.new("RGB", (16, 16), (i * 6, 255 - i * 6, 90)).save(buffer, "PNG")
                content = b"not a picture" if i in damaged else buffer.getvalue()
                for name, data in ((f"{i:04d}.png", content), (f"{i:04d}.cls", str(i % 3).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, BytesIO(data))
    return folder


JIT = {"name": "jit", "patch": 8, "width": 16, "depth": 1, "heads": 2, "bottleneck": 8}


def of_pictures(tmp_path, shards, **more):
    data = {"name": "images", "path": str(shards), "holdout": 0.2, **more}
    changes = {"network": JIT, "data": data, "target": "x0", "weighting": None, "train__batch": 16, "train__steps": 6}
    return written(tmp_path, **changes, sample={"n": 8, "steps": 2}, metrics=["nearest_neighbour"])


def test_streamed_shards_train_the_same_network_as_the_same_in_memory(tmp_path, capsys):
    shards = pictures(tmp_path / "shards")
    for stream in ("true", "false"):
        recipe = of_pictures(tmp_path, shards, stream=stream == "true", flip=True)
        assert main(["train", str(recipe), "--out", str(tmp_path / stream), "--tracker", "none"]) == 0
    assert same(last(tmp_path / "true"), last(tmp_path / "false"))
    previews = sorted((tmp_path / "true" / "previews").iterdir())
    assert [p.name for p in previews] == ["step-000000003.png", "step-000000006.png"]


def test_previews_go_to_the_tracker_and_its_failure_ends_nothing(tmp_path, capsys, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = of_pictures(tmp_path, pictures(tmp_path / "shards"))
    assert main(["train", str(recipe), "--out", str(tmp_path / "out"), "--previews", "5"]) == 0
    (place,) = (tmp_path / "out" / "curves").iterdir()
    found = events.EventAccumulator(str(place))
    found.Reload()
    shown = found.Images("samples")
    assert [(e.step, e.height, e.width) for e in shown] == [(3, 16, 80), (6, 16, 80)]
    capsys.readouterr()

    def gone(*_, **__):
        raise ConnectionError("the server is gone")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", gone)
    assert main(["train", str(recipe), "--out", str(tmp_path / "again"), "--previews", "0"]) == 0
    assert capsys.readouterr().out.count("the tracker failed and is left out from here on: ConnectionError") == 1


def test_a_corrupted_shard(tmp_path, capsys):
    """Named; fatal unless it is to be skipped, and then counted."""
    shards = pictures(tmp_path / "shards", damaged=(7, 30))
    recipe = of_pictures(tmp_path, shards, stream=True)
    told = fails(capsys, "train", recipe, "--out", tmp_path / "out", "--tracker", "none")
    assert "0007.png" in told or "0030.png" in told
    assert "part-0.tar" in told or "part-1.tar" in told
    assert "--skip-bad" in told
    assert main(["train", str(recipe), "--out", str(tmp_path / "skipping"), "--tracker", "none", "--skip-bad"]) == 0
    told = capsys.readouterr().out
    assert "0007.png" in told or "0030.png" in told


def test_a_hub_name_without_a_network(tmp_path, capsys, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    recipe = of_pictures(tmp_path, "hub:nobody/nothing")
    told = fails(capsys, "train", recipe, "--out", tmp_path / "out")
    assert "nobody/nothing" in told
    assert "--set data.path=" in told


def test_an_unknown_tracker(tmp_path, capsys):
    told = fails(capsys, "train", written(tmp_path), "--out", tmp_path / "out", "--tracker", "tensorbord")
    assert "unknown tracker 'tensorbord'. Did you mean 'tensorboard'" in told


# ------------------------------------------------------------- what is left over from something else


def test_what_a_training_left_before_its_first_checkpoint_is_not_taken_for_another_one(tmp_path, capsys):
    recipe, out = (
        written(tmp_path, train__steps=100_000, train__snapshots=20_000, train__validations=20_000),
        tmp_path / "out",
    )
    going = subprocess.Popen(command(recipe, out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for(lambda: len(list((out / "averages").glob("step-*"))) > 20, going)
    going.kill()
    going.wait()
    assert not (out / "checkpoints").exists()
    recipe = written(tmp_path, target="velocity", weighting=None)
    assert main(["train", str(recipe), "--out", str(out), "--tracker", "none"]) == 0
    assert {int(p.name[5:15]) for p in (out / "averages").iterdir()} == set(range(2, 21, 2))
    assert main(["average", str(out), "--width", "0.1"]) == 0
    assert "at step 20" in capsys.readouterr().out


def test_a_training_continued_for_longer_is_not_taken_for_finished(tmp_path, capsys):
    recipe, out = written(tmp_path, train__decay="constant"), tmp_path / "out"
    assert main(["train", str(recipe), "--out", str(out), "--tracker", "none"]) == 0
    longer = ["--set", "train.steps=100000"]
    going = subprocess.Popen(command(recipe, out, *longer), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: not (out / "result.json").exists(), going)
    time.sleep(0.3)
    going.send_signal(signal.SIGINT)
    told = going.communicate(timeout=60)[1]
    assert going.returncode == 130
    step = int(told.split("stopped at step ")[1].split()[0])
    assert step > 20
    assert not (out / "result.json").exists()
    shorter = ["--set", f"train.steps={step + 3}"]
    assert main(["train", str(recipe), "--out", str(out), "--tracker", "none", *shorter]) == 0
    assert f"continuing in {out} at step {step}" in capsys.readouterr().out
    assert json.loads((out / "result.json").read_text())["steps"] == step + 3
    assert main(["train", str(recipe), "--out", str(out), "--tracker", "none", *shorter]) == 0
    assert "finished already" in capsys.readouterr().out


def test_a_parameter_that_nothing_depends_on_is_named_where_processes_would_wait_for_it(tmp_path):
    (tmp_path / "idle.py").write_text(
        "import torch\n"
        "import reparam as rp\n"
        "def make():\n"
        "    net = rp.networks.MLP(6, 8, 2)\n"
        "    net.idle = torch.nn.Linear(2, 2)\n"
        "    return net\n"
    )
    recipe = written(tmp_path, network="idle:make", target="x0", weighting=None)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    line = command(recipe, tmp_path / "out", processes=2)
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode != 0
    assert "has parameters that its output does not depend on (net.idle.weight, net.idle.bias)" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "nonsense"], "device 'nonsense' cannot be used; expected cpu, cuda or mps"),
        (["--device", "cuda:7"], "device 'cuda:7' cannot be used here"),
        (["--save-every=-1"], "--save-every must be at least 0"),
        (["--keep", "0"], "--keep must be at least 1, found 0"),
        (["--previews=-3"], "--previews must be at least 0"),
    ],
)
def test_options_that_cannot_be(tmp_path, capsys, options, words):
    assert words in fails(capsys, "train", written(tmp_path), "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_precision_is_the_recipes_whatever_accelerate_is_configured_for(alone, tmp_path):
    recipe, out, _ = alone
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "bf16"}
    line = command(recipe, tmp_path / "out")
    assert subprocess.run(line, capture_output=True, timeout=120, check=False, env=env).returncode == 0
    assert same(last(out), last(tmp_path / "out"))
