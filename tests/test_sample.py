"""reparam sample at scale: whatever the batch, the processes, the place and the interruption, the same samples."""

import argparse
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import reparam as rp
from reparam.cli import main
from reparam.data import Data
from reparam.data.images import load_images
from reparam.errors import Conflict, NetworkError, ReparamError, SpecError, UnknownName, Unsupported
from reparam.networks.jit import JiT
from reparam.samplers import DDIM, EDM, SDEDPMpp2M
from reparam.studies import drawing as drawing_module
from reparam.studies.drawing import Drawing, InPrecision, Progress, batches, in_precision, usual_batch
from reparam.studies.official import Official, weights_of
from reparam.studies.pool import resources
from reparam.studies.recipe import SampleConfig
from reparam.studies.run import draw_samples
from reparam.studies.sample_files import Folder
from reparam.studies.sampling import sample_run
from reparam.training.draws import step_noise

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")

#: A tiny JiT by the official names, and by ours.
TINY = {
    "patch_size": 8,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 4,
    "bottleneck_dim": 6,
    "in_context_len": 2,
    "in_context_start": 1,
}
OURS = {"width": 24, "depth": 2, "heads": 2, "bottleneck": 6, "classes": 4, "in_context": 2, "in_context_start": 1}


def jit(seed=0, **changes):
    """A network whose output is not zero, as a fresh one's is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = JiT(**{"image": 16, "patch": 8, **OURS, **changes})
        for p in net.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.05)
    return net


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model of small pictures of four classes."""
    file = tmp_path_factory.mktemp("weights") / "m.safetensors"
    record = {
        "shape": [3, 16, 16],
        "pictures": True,
        "normalised_by": {"mean": 127.5, "std": 127.5},
        "classes": ["ant", "bee", "cat", "dog"],
    }
    rp.save(rp.Denoiser(jit(), "rectified_flow", "x0", data=record), file)
    return file


@pytest.fixture(scope="module")
def whole(weights):
    """150 samples in one array: bytes [150, 3, 16, 16], and labels."""
    place, shape = sample_run(weights, 150, out=weights.parent / "whole.npz", steps=2, device="cpu")
    assert shape == (150, 3, 16, 16)
    with np.load(place) as file:
        return file["x"], file["y"]


def command(weights, out, *more):
    return ["sample", str(weights), "--n", "150", "--steps", "2", "--device", "cpu", "--out", str(out), *more]


def fails(capsys, *args):
    capsys.readouterr()
    assert main([str(a) for a in args]) == 2
    return capsys.readouterr().err


def near(found, expected):
    """The same bytes, but for numbers within rounding of the border of two."""
    off = np.abs(found.astype(int) - expected.astype(int))
    assert off.max() <= 1
    assert (off > 0).mean() < 1e-3


def beside(folder):
    return sorted(p.name for p in folder.iterdir())


# ------------------------------------------------------------------------------------------------ noise


@pytest.mark.parametrize("shape", [(5,), (3, 64, 64)])
def test_the_noise_of_a_step_is_a_function_of_seed_step_and_number(shape):
    whole = step_noise(3, 7, 0, 100, shape)
    for a, b in ((0, 7), (7, 64), (63, 65), (31, 33), (99, 100)):
        assert torch.equal(step_noise(3, 7, a, b, shape), whole[a:b])
    for other in (step_noise(4, 7, 0, 100, shape), step_noise(3, 8, 0, 100, shape)):
        assert not bool((other == whole).any(dim=1).all())
        assert abs(float((other * whole).mean())) < 4 / whole.numel() ** 0.5
    x = whole.flatten().double()
    assert abs(float(x.mean())) < 4 / x.numel() ** 0.5
    assert abs(float(x.var()) - 1) < 4 * (2 / x.numel()) ** 0.5
    assert len(whole.flatten(1)[:, 0].unique()) == 100


@pytest.mark.parametrize(
    "method", ["ancestral", DDIM(eta=0.7), SDEDPMpp2M(), EDM(churn=8, s_max=30.0), "heun"], ids=lambda m: str(m)[:12]
)
def test_a_sample_does_not_depend_on_the_batch(method):
    torch.manual_seed(0)
    denoiser = rp.Denoiser(rp.networks.MLP(dim=6, hidden=32), "rectified_flow", "x0", t_range=(0.02, 0.98))
    times = [0.98, 0.8, 0.6, 0.3, 0.1, 0.0]
    drawn = Drawing(denoiser, rp.samplers.named(method), times, 5, None, None, {"shape": [6]})
    whole = drawn(0, 70)
    parts = torch.cat([drawn(a, b) for a, b in ((0, 11), (11, 12), (12, 50), (50, 70))])
    assert float((whole - parts).abs().max()) < 1e-4
    assert float(whole.std()) > 0.01
    other = Drawing(denoiser, rp.samplers.named(method), times, 6, None, None, {"shape": [6]})(0, 70)
    assert float((whole - other).abs().mean()) > 1e-3


@pytest.mark.parametrize("sampler", ["ancestral", {"name": "ddim", "eta": 0.7}, "heun"], ids=str)
def test_a_study_draws_the_same_samples(sampler):
    """Whatever it shows of their way, and with the same precision around the network."""
    torch.manual_seed(0)
    net, data = Telling(), Data("points", torch.randn(90, 6), torch.randn(70, 6))
    denoiser = rp.Denoiser(net, "cosine", "x0", t_range=(0.02, 0.98), data={"shape": [6]})
    chosen = SampleConfig(sampler=sampler, steps=5, seed=7)
    expected = Drawing(denoiser, chosen.method(), chosen.times(denoiser), 7, None, None, {"shape": [6]})(0, 70)
    for shown in (1, 33, 70):
        x, way = draw_samples(denoiser, chosen, data, 70, shown=shown)
        torch.testing.assert_close(x, expected)
        torch.testing.assert_close(way.x, expected[:shown])
    assert {asked[2:] for asked in net.asked} == {(False, False)}


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="it has such a device")
def test_a_device_that_is_not_here_is_told_in_a_sentence():
    with pytest.raises(Unsupported, match="device 'mps' cannot be used here: ") as refused:
        resources(1, 1, "mps")
    assert len(str(refused.value)) < 200
    assert "backends:" not in str(refused.value)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("missing", [[(0, 1000)], [(5, 17), (64, 700), (999, 1000)], []])
def test_batches_share_out_what_is_missing(missing, world):
    found = [part for rank in range(world) for part in batches(missing, 64, rank, world)]
    assert all(0 < stop - start <= 64 for start, stop in found)
    numbers = sorted(i for start, stop in found for i in range(start, stop))
    assert numbers == [i for start, stop in missing for i in range(start, stop)]


def test_the_usual_batch_holds_whole_groups():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert usual_batch((2,), cpu) == 1024
    assert usual_batch((3, 32, 32), cpu) == 672
    assert usual_batch((3, 256, 256), cpu) == 10
    assert usual_batch((3, 256, 256), gpu) == 64


# -------------------------------------------------------------------------------------------- precision


class Telling(torch.nn.Module):
    """A network that says how it was asked."""

    def __init__(self):
        super().__init__()
        self.layer, self.asked, self.fails = torch.nn.Linear(6, 6), [], False

    def forward(self, x, time):
        now = (x.dtype, torch.is_autocast_enabled("cpu"), *tf32_now())
        self.asked.append(now)
        if self.fails:
            raise ValueError("it fails")
        return self.layer(x)


def tf32_now():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


class Listening(DDIM):
    """DDIM that looks at what is around its own arithmetic."""

    def row(self, at):
        assert not torch.is_autocast_enabled("cpu")
        assert tf32_now() == (False, False)
        return super().row(at)


@pytest.mark.parametrize("precision", ["float32", "bf16", "tf32"])
def test_the_network_alone_computes_in_another_precision(precision):
    net = Telling()
    model = rp.Denoiser(net, "cosine", "x0", data={"shape": [6]})
    asked = model if precision == "float32" else rp.Denoiser(InPrecision(net, precision), "cosine", "x0")
    before = tf32_now()
    x = Drawing(asked, Listening(), [0.9, 0.5, 0.2, 0.0], 0, None, None, {"shape": [6]})(0, 40)
    told = {
        "float32": (torch.float32, False, False, False),
        "bf16": (torch.float32, True, False, False),
        "tf32": (torch.float32, False, True, True),
    }
    assert net.asked == [told[precision]] * 3
    assert x.dtype == torch.float32
    net.fails = True
    with pytest.raises(ValueError, match="it fails"):
        asked(x, 0.5)
    assert tf32_now() == before
    assert not torch.is_autocast_enabled("cpu")


def test_bf16_samples_are_those_of_a_rounded_network():
    """As far from float32's as bfloat16 rounds, and no further; in float32 to the last of its digits."""
    torch.manual_seed(0)
    model = rp.Denoiser(rp.networks.MLP(dim=6, hidden=64), "cosine", "v", data={"shape": [6]})
    model.overrides = {"target": "v"}

    def drawn(precision):
        asked = in_precision(model, precision)
        assert asked.conventions == model.conventions
        assert (asked.data, asked.overrides) == (model.data, model.overrides)
        return Drawing(asked, DDIM(), [0.98, 0.6, 0.3, 0.0], 0, None, None, model.data)(0, 64)

    off = (drawn("bf16") - drawn("float32")).abs().max()
    assert 1e-4 < float(off) < 0.1
    assert drawn("bf16").dtype == torch.float32
    assert in_precision(model, "float32") is model
    unsure = rp.Denoiser(model.net, "ddpm", rp.Gaussian("eps"), time="step", t_range=(0.1, 0.9))
    assert in_precision(unsure, "bf16").conventions == unsure.conventions


def test_the_precision_is_recorded(weights, tmp_path, capsys):
    out = tmp_path / "a.npz"
    assert main(command(weights, out, "--precision", "bf16")) == 0
    with np.load(out) as file:
        assert json.loads(str(file["about"]))["sampling"]["precision"] == "bf16"
    assert "precision was bf16 there, is float32 now" in fails(capsys, *command(weights, out)).replace("'", "")
    place, _ = sample_run(weights, 2, steps=1, device="cpu", precision="bf16", seed=9)
    assert place.name == "m-samples-2-seed9-steps1-precisionbf16"
    told = fails(capsys, *command(weights, tmp_path / "b.npz", "--precision", "fp16"))
    assert "precision (--precision)" in told
    assert "bf16" in told
    told = fails(capsys, *command(weights, tmp_path / "b.npz", "--precision", "tf32"))
    assert "--precision tf32 is of NVIDIA GPUs since Ampere, found cpu; use float32 or bf16" in told
    assert beside(tmp_path) == ["a.npz"]


def test_a_compiled_network_is_asked(monkeypatch):
    """That it is compiled; that its answers stay the same is torch.compile's business."""
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: asked.append(type(self).__name__))
    model = rp.Denoiser(rp.networks.MLP(dim=6, hidden=8), "cosine", "v", data={"shape": [6]})
    assert in_precision(model, "float32", compiled=True) is model
    in_precision(model, "bf16", compiled=True)
    assert asked == ["MLP", "MLP"]


# ----------------------------------------------------------------------------------------------- places


def test_every_place_holds_the_same_pictures_and_the_loader_reads_them(weights, whole, tmp_path, capsys):
    x, y = whole
    assert y.tolist() == [0, 1, 2, 3] * 37 + [0, 1]
    for name, batch in (("a", 64), ("a.zip", 150), ("a.parquet", 7), ("a.npz", 1)):
        assert main(command(weights, tmp_path / name, "--batch", str(batch))) == 0
        found = load_images(str(tmp_path / name))
        near(found.pixels.numpy(), x)
        if name in ("a.parquet", "a.npz"):
            assert found.labels.tolist() == y.tolist()
        if name == "a.parquet":
            assert found.classes == ("ant", "bee", "cat", "dog")
        if name == "a.npz":
            continue
        assert json.loads((tmp_path / f"{name}.json").read_text())["labels"] == y.tolist()
        assert min(Image.open(tmp_path / f"{name}-grid.png").size) >= 200
    told = capsys.readouterr()
    assert "150 samples of shape [3, 16, 16]" in told.out
    assert "drawing 150 samples, 64 at a time at most, one process on cpu" in told.err
    assert not list(tmp_path.glob("*.unfinished"))
    assert beside(tmp_path / "a")[::149] == ["0000.png", "0149.png"]


def test_samples_are_scored_from_where_they_lie(weights, whole, tmp_path):
    sample_run(weights, 200, out=tmp_path / "real.npz", steps=2, seed=1, device="cpu")
    reference, cards = {"name": "images", "path": str(tmp_path / "real.npz")}, []
    for name in ("a.parquet", "a.zip"):
        assert main(command(weights, tmp_path / name)) == 0
        cards.append(rp.evaluate(tmp_path / name, reference, extractor="pixels", device="cpu").card)
    values = [{name: metric["value"] for name, metric in card["metrics"].items()} for card in cards]
    assert values[0] == values[1]
    assert values[0]["frechet_distance"] > 0
    assert all(card["samples"]["to_uint8"].startswith("round(127.5 x + 127.5)") for card in cards)


@pytest.mark.parametrize("name", ["a.ZIP", "a.Parquet", "a.NPZ"])
def test_endings_count_in_capitals_too(weights, whole, tmp_path, name):
    assert main(command(weights, tmp_path / name)) == 0
    assert (tmp_path / name).is_file()
    near(load_images(str(tmp_path / name)).pixels.numpy(), whole[0])


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.npy", "x.PNG", "x.pq", "x.jpeg", "x.safetensors"])
def test_other_files_than_the_known_ones_are_refused(weights, tmp_path, capsys, name):
    told = fails(capsys, *command(weights, tmp_path / name))
    assert f"not written to {Path(name).suffix.lower()} files; expected a folder for pictures" in told
    assert ".zip, .parquet or .npz" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["dim8-x0.5", "v1.2", "jit.final", "ema.bf16", ".hidden", "a.zip.d"])
def test_a_folder_may_have_a_dot_in_its_name(weights, tmp_path, name):
    place, _ = sample_run(weights, 2, out=tmp_path / "runs.of.1" / name, steps=1, device="cpu")
    assert beside(place) == ["0000.png", "0001.png"]


def test_parquet_row_groups_are_few_however_small_the_batches(weights, tmp_path):
    import pyarrow.parquet as pq

    assert main(command(weights, tmp_path / "a.parquet", "--batch", "9", "--label", "cat")) == 0
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        assert file.num_row_groups == 1
        assert file.read(["label"])["label"].to_pylist() == [2] * 150


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 9, 4), (3, 1, 1)])
def test_pictures_are_whole_png_files(tmp_path, shape):
    x = torch.randint(256, (20, *shape), generator=torch.Generator().manual_seed(1)).byte()
    place = Folder(tmp_path / "a", 20, shape, threads=3)
    for picture, content in zip(x, place.encoded(x), strict=True):
        with Image.open(io.BytesIO(content)) as read:
            read.load()
            found = np.asarray(read).reshape(*shape[1:], shape[0])
        assert np.array_equal(found, picture.movedim(0, -1).numpy())


def test_other_data_become_an_array(tmp_path, capsys):
    denoiser = rp.Denoiser(rp.networks.MLP(dim=2, hidden=8), "cosine", "v", data={"shape": [2]})
    rp.save(denoiser, tmp_path / "m.safetensors")
    run = ["sample", tmp_path / "m.safetensors", "--n", "9", "--steps", "2", "--sampler", "ddim", "--device", "cpu"]
    assert main([*map(str, run), "--out", str(tmp_path / "a.npz"), "--batch", "2"]) == 0
    assert np.load(tmp_path / "a.npz")["x"].shape == (9, 2)
    assert "expected a file that ends in .npz" in fails(capsys, *run, "--out", tmp_path / "a.zip")
    assert beside(tmp_path) == ["a.npz", "m.safetensors", "m.spec.json"]


# ----------------------------------------------------------------------------------- stopped, continued


def stop_after(monkeypatch, count):
    """Ctrl-C while the batch after so many is drawn; the batches that are drawn are listed."""
    drawn, plain = [], Drawing.__call__

    def call(self, start, stop):
        if len(drawn) == count:
            raise KeyboardInterrupt
        drawn.append((start, stop))
        return plain(self, start, stop)

    monkeypatch.setattr(Drawing, "__call__", call)
    return drawn


@pytest.mark.parametrize("name", ["a", "a.zip", "a.parquet", "a.npz"])
def test_the_same_command_continues(weights, whole, tmp_path, monkeypatch, capsys, name):
    out, work = tmp_path / name, tmp_path / f"{name}.unfinished"
    with monkeypatch.context() as patch:
        drawn = stop_after(patch, 2)
        assert main(command(weights, out, "--batch", "32")) == 130
    assert drawn == [(0, 32), (32, 64)]
    told = capsys.readouterr().err
    assert f"64 of 150 samples are kept in {work}; the same command continues" in told
    assert beside(tmp_path) == [work.name]
    # What a killed process leaves half-written is never taken for whole.
    (work / "parts" / f".000000064-000000096.77.tmp{Path(name).suffix or '.done'}").write_bytes(b"half")
    (work / "pictures" / "0064.png").write_bytes(b"half")
    with monkeypatch.context() as patch:
        drawn = stop_after(patch, 99)
        assert main(command(weights, out, "--batch", "50")) == 0
    assert drawn == [(64, 100), (100, 150)]
    assert "64 are there already" in capsys.readouterr().err
    near(load_images(str(out)).pixels.numpy(), whole[0])
    assert not work.exists()
    # All is there: the same command does nothing.
    with monkeypatch.context() as patch:
        assert not stop_after(patch, 0)
        assert main(command(weights, out)) == 0
    assert "drawn already" in capsys.readouterr().err


def test_killed_in_the_middle_and_continued(weights, whole, tmp_path):
    out = tmp_path / "a"
    slow = [sys.executable, "-m", "reparam.cli", *command(weights, out, "--batch", "1")]
    with subprocess.Popen(slow, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("a.unfinished/parts/*.done"))) < 3:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    kept = len(list(tmp_path.glob("a.unfinished/parts/*.done")))
    assert 3 <= kept < 150
    assert main(command(weights, out)) == 0
    near(load_images(str(out)).pixels.numpy(), whole[0])
    assert beside(tmp_path) == ["a", "a-grid.png", "a.json"]


def test_two_processes_draw_what_one_does(weights, whole, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    args = command(weights, tmp_path / "a.parquet", "--batch", "16", "--json")
    args[args.index("--n")] = "--count"  # torchrun takes --n for one of its own
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, "reparam.cli", *args], capture_output=True, text=True, timeout=240, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["shape"] == [150, 3, 16, 16]
    assert done.stderr.count("2 processes on cpu") == 1
    found = load_images(str(tmp_path / "a.parquet"))
    near(found.pixels.numpy(), whole[0])
    assert found.labels.tolist() == whole[1].tolist()


def test_another_command_is_refused(weights, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.zip"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert main(command(weights, out, "--batch", "32")) == 130
    told = fails(capsys, *command(weights, out, "--seed", "3"))
    assert "holds samples of another command: seed was 0 there, is 3 now" in told
    assert main(command(weights, out)) == 0
    before = out.read_bytes()
    told = fails(capsys, *command(weights, out, "--label", "bee", "--guidance", "2"))
    assert "guidance was 1.0 there, is 2.0 now; label was absent there, is 'bee' now. Nothing was touched" in told
    (tmp_path / "other.zip").write_bytes(b"mine")
    assert "nothing says that this command wrote it" in fails(capsys, *command(weights, tmp_path / "other.zip"))
    (tmp_path / "folder.zip").mkdir()
    assert "is a folder; expected a file for .zip" in fails(capsys, *command(weights, tmp_path / "folder.zip"))
    assert out.read_bytes() == before
    assert (tmp_path / "other.zip").read_bytes() == b"mine"


def test_a_folder_that_lost_pictures_is_not_taken_for_whole(weights, tmp_path, capsys):
    assert main(command(weights, tmp_path / "a")) == 0
    (tmp_path / "a" / "0077.png").unlink()
    assert "holds 149 of 150 pictures" in fails(capsys, *command(weights, tmp_path / "a"))


def test_nothing_is_left_where_nothing_was_drawn(tmp_path, weights, capsys):
    net = jit()
    with torch.no_grad():
        net.final_layer.linear.bias.fill_(float("nan"))
    denoiser = rp.load(weights)
    rp.save(rp.Denoiser(net, denoiser.schedule, "x0", data=denoiser.data), tmp_path / "nan.safetensors")
    told = fails(capsys, *command(tmp_path / "nan.safetensors", tmp_path / "a"))
    assert "sample 0 holds NaN or infinity" in told
    assert beside(tmp_path) == ["nan.safetensors", "nan.spec.json"]
    assert "--batch must be at least 1" in fails(capsys, *command(weights, tmp_path / "a", "--batch", "0"))
    for seed in (-1, 2**63, 2**64 - 1):
        told = fails(capsys, *command(weights, tmp_path / "a", "--seed", str(seed)))
        assert f"--seed must be an integer in 0 … 2**63 − 1, found {seed}" in told
    sample_run(weights, 1, out=tmp_path / "a", steps=1, seed=2**63 - 1, device="cpu")


def test_a_log_is_told_how_long_it_takes(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(drawing_module.time, "perf_counter", lambda: now[0])
    said = []
    with Progress(1000, 200, 400, said.append) as progress:
        for _ in range(4):
            now[0] += 50
            progress(100)
    assert said == ["  600 of 1000 samples, 4 a second, about 2 min left"]


# --------------------------------------------------------------------------------------------- official


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A training's checkpoint as the official code writes one, of three networks."""
    file = tmp_path_factory.mktemp("official") / "checkpoint-last.pth"
    nets = {"model": jit(1), "model_ema1": jit(2), "model_ema2": jit(3)}
    states = {key: {f"net.{name}": value for name, value in net.state_dict().items()} for key, net in nets.items()}
    options = argparse.Namespace(model="JiT-B/16", lr=2e-4)
    torch.save({**states, "optimizer": {"state": {}}, "epoch": 5, "args": options}, file)
    return file, nets


def test_official_weights_are_found_in_every_kind_of_file(official, tmp_path):
    file, nets = official
    for ema, name in ((None, "model_ema1"), ("1", "model_ema1"), ("2", "model_ema2"), ("none", "model")):
        found, expected = weights_of(file, ema), nets[name].state_dict()
        assert found.keys() == {f"net.{key}" for key in expected}
        assert all(torch.equal(found[f"net.{key}"], value) for key, value in expected.items())
    plain = {k: v.clone() for k, v in nets["model_ema2"].state_dict().items()}
    save_file(plain, tmp_path / "one.safetensors")
    torch.save(plain, tmp_path / "one.pt")
    save_file({f"model_ema1.{k}": v for k, v in plain.items()}, tmp_path / "named.safetensors")
    for name in ("one.safetensors", "one.pt", "named.safetensors"):
        found = weights_of(tmp_path / name)
        assert all(torch.equal(found[key], value) for key, value in plain.items())
    with pytest.raises(Conflict, match="holds one set of weights"):
        weights_of(tmp_path / "one.pt", "1")
    with pytest.raises(SpecError, match="and no model_ema2"):
        weights_of(tmp_path / "named.safetensors", "2")
    with pytest.raises(UnknownName, match="--ema"):
        weights_of(file, "3")


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_official_files_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, "evil.pth")
    with pytest.raises(SpecError, match="cannot be read as weights alone"):
        weights_of(Path("evil.pth"))
    assert not Path("evil").exists()
    torch.save([1, 2], "list.pth")
    torch.save({"epoch": 3}, "none.pth")
    torch.save({}, "bare.pth")
    Path("empty.pth").touch()
    Path("text.pth").write_text("hello")
    Path("cut.pth").write_bytes(Path("evil.pth").read_bytes()[:200])
    torch.save(jit(), "whole.pth")
    torch.save({"mean": np.zeros(3)}, "array.pth", _use_new_zipfile_serialization=False)
    for name, message in (
        ("list", "holds list; expected weights by name"),
        ("none", r"holds epoch \(int\); expected JiT's weights by name, and tensors alone"),
        ("bare", "holds nothing; expected JiT's weights"),
        ("empty", "holds nothing: it is empty"),
        ("x", "no file"),
        ("text", "cut short, damaged, or nothing that torch.save wrote"),
        ("cut", "cut short, damaged, or nothing that torch.save wrote"),
        ("evil", rf"it holds {os.mkdir.__module__}\.mkdir, which is no tensor"),
        ("whole", r"it holds reparam\.networks\.jit\.JiT, which is no tensor"),
        ("array", r"it holds numpy\S+, which is no tensor"),
    ):
        with pytest.raises(SpecError, match=message) as refused:
            weights_of(Path(f"{name}.pth"))
        told = str(refused.value)
        assert told.isprintable(), "an escape code or a line break"
        assert "weights_only" not in told
        assert "trust" not in told


def heun_as_published(net, z, y, weight, scale, steps):
    """The published sampler in its own time, 1 = data, without its clamp: in float64 but for the network."""
    z = scale * z.double()
    null = torch.full_like(y, TINY["num_classes"])

    def velocity(z, t):
        def x0(label):
            return net(z.float(), torch.full((len(z),), t), label).double()

        found = x0(y)
        if t >= 0.1 - 1e-9:
            found = x0(null) + weight * (found - x0(null))
        return (found - z) / (1 - t)

    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()
    for t, s in itertools.pairwise(times[:-1]):
        v = velocity(z, t)
        z = z + (s - t) * (v + velocity(z + (s - t) * v, s)) / 2
    return z + (1 - times[-2]) * velocity(z, times[-2])


@torch.no_grad()
def test_official_weights_are_sampled_as_published(official, tmp_path, capsys):
    from reparam.training.draws import unit_noise

    file, nets = official
    model = f"{{{', '.join(f'{k}: {v}' for k, v in TINY.items())}}}"
    args = ["sample", "--official", str(file), "--model", model, "--image-size", "16", "--n", "6", "--steps", "15"]
    assert main([*args, "--guidance", "2.5", "--device", "cpu", "--out", str(tmp_path / "a.npz")]) == 0
    with np.load(tmp_path / "a.npz") as found:
        x, y, about = found["x"], torch.from_numpy(found["y"]), json.loads(str(found["about"]))
    noise = unit_noise(0, 0, 6, (3, 16, 16))
    z = heun_as_published(nets["model_ema1"], noise, y, 2.5, 16 / 256, 15)
    expected = ((z + 1) * 127.5).clamp(0, 255)
    assert y.tolist() == [0, 1, 2, 3, 0, 1]
    assert np.abs(x - expected.numpy()).max() < 0.51
    assert expected.std() > 1
    assert about["model"]["ema"] == "1"
    assert about["model"]["image_size"] == 16
    assert about["sampling"]["guidance_interval"] == [0.0, 0.9]
    told = fails(capsys, *args, "--out", tmp_path / "b.npz")
    assert "which guidance?" in told
    assert "2.9 for JiT-B/16" in told


def test_official_models_by_name():
    config = Official("x.pth", "JiT-H/32").config()
    assert config["input_size"] == 512
    assert {**config, "input_size": 0} == {
        "input_size": 0,
        "patch_size": 32,
        "hidden_size": 1280,
        "depth": 32,
        "num_heads": 16,
        "num_classes": 1000,
        "bottleneck_dim": 256,
        "in_context_len": 32,
        "in_context_start": 10,
        "proj_drop": 0.2,
    }
    chosen = Official("x.pth", "JiT-B/16").sampling(None)
    assert (chosen.sampler, chosen.steps, chosen.grid, chosen.guidance) == ("heun", 50, "linear", 2.9)
    assert chosen.guidance_interval == [0.0, 0.9]
    assert Official("x.pth", "JiT-B/16").sampling(1.0).guidance == 1
    with pytest.raises(UnknownName, match="JiT-B/16"):
        Official("x.pth", "JiT-B16").config()
    with pytest.raises(ReparamError, match="multiple of the patch of 16"):
        Official("x.pth", "JiT-B/16", 100).config()


def test_wrong_ways_to_name_a_model(official, weights, capsys):
    file, _ = official
    shown = ["sample", weights, "--official", file, "--model", "JiT-B/16"]
    assert "leave one of them out" in fails(capsys, *shown)
    assert "name their file: --official" in fails(capsys, "sample", weights, "--ema", "1")
    assert "it is known" in fails(capsys, "sample", *shown[2:], "--spec", "{target: v}")
    with pytest.raises(SystemExit) as left:
        main(["sample", "--official", str(file)])
    assert left.value.code == 2
    assert "--model JiT-B/16" in capsys.readouterr().err
    mapping = "{patch_size: 8, hidden: 24}"
    told = fails(capsys, "sample", "--official", file, "--model", mapping, "--guidance", "1", "--image-size", "16")
    assert "JiT's official names 'hidden'. Did you mean 'hidden_size'" in told


@pytest.mark.parametrize(
    ("given", "side", "message"),
    [
        ("{patch_size: 0, hidden_size: 24}", None, "patch_size must be an integer of at least 1, found 0"),
        ("{patch_size: foo}", 16, "patch_size must be an integer of at least 1, found 'foo'"),
        ("{patch_size: 8, input_size: foo}", None, "input_size must be an integer of at least 1, found 'foo'"),
        ("{patch_size: 8.0}", 16, "patch_size must be an integer of at least 1, found 8.0"),
        ("{patch_size: true}", 16, "patch_size must be an integer of at least 1, found True"),
        ("{patch_size: 8, num_classes: -1}", 16, "num_classes must be an integer of at least 0, found -1"),
        ("{patch_size: 8, hidden_size: 24}", 16, "--model lacks depth, num_heads, bottleneck_dim, in_context_start"),
        ({**TINY, "input_size": 20}, None, "input_size 20: expected a multiple of the patch of 8"),
        ({**TINY, "input_size": 16}, 0, "--image-size 0: expected a multiple of the patch of 8"),
        ({**TINY, "proj_drop": "x"}, 16, "dropout must be a number"),
    ],
)
def test_an_impossible_configuration_is_an_error(official, capsys, given, side, message):
    given = given if isinstance(given, str) else json.dumps(given)
    more = [] if side is None else ["--image-size", side]
    args = ["sample", "--official", official[0], "--model", given, "--guidance", "1", "--device", "cpu", *more]
    assert message in fails(capsys, *args)


def test_weights_of_another_size_are_told_in_a_line(official, tmp_path, capsys):
    file, nets = official
    told = fails(capsys, "sample", "--official", file, "--model", "JiT-B/16", "--device", "cpu")
    assert (
        "another size: hidden_size 24, depth 2, patch_size 8, input_size 16; JiT-B/16 has hidden_size 768, depth 12, "
        "patch_size 16, input_size 256. Name the model" in told
    )
    assert told.count("\n") == 1
    for name, asked, side in (
        ("depth", 3, 16),
        ("num_heads", 1, 16),
        ("num_classes", 5, 16),
        ("bottleneck_dim", 7, 16),
        ("in_context_len", 3, 16),
        ("input_size", 24, 24),
    ):
        held = {**TINY, "input_size": 16}[name]
        with pytest.raises(NetworkError, match=f"size: {name} {held}; the configuration has {name} {asked}. Name"):
            Official(file, TINY if name == "input_size" else {**TINY, name: asked}, side).denoiser()
    with pytest.raises(NetworkError, match="not those of a JiT of this configuration"):
        Official(_without(nets["model"], "final_layer.linear.bias", tmp_path), TINY, 16).denoiser()
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(NetworkError, match="holds a, b … and no pos_embed; expected the weights of a JiT"):
        Official(tmp_path / "other.safetensors", TINY, 16).denoiser()


def _without(net, name, folder):
    save_file({key: value for key, value in net.state_dict().items() if key != name}, folder / "less.safetensors")
    return folder / "less.safetensors"
