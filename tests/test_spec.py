"""The record that travels with the weights."""

import copy
import dataclasses
import json
import math
import pickle
import resource
import struct
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import reparam as rp
from reparam.cli import main
from reparam.errors import NetworkError, OutputError, ReparamError, SpecError, Unsupported
from reparam.files import read_header, read_tensors
from reparam.spec import SCHEMA, beside, read_spec


def denoiser(**options):
    torch.manual_seed(0)
    objective = rp.Objective("rectified_flow", "eps", loss_space="velocity", t_range=(0.0, 0.98), **options)
    return objective.denoiser(rp.networks.MLP(3, 8, 2), data={"shape": [3], "sigma_data": 0.5})


def test_saving_and_loading_keep_every_convention(tmp_path):
    before = denoiser(times=rp.LogitNormal(0.3, 0.7), time="1-t", input="unit_variance")
    rp.save(before, tmp_path / "m.safetensors")
    after = rp.load(tmp_path / "m.safetensors")
    assert after.conventions == before.conventions
    assert after.data == before.data
    assert after.training_record == before.training_record
    assert after.training_record["times"] == {"name": "logit_normal", "mean": 0.3, "std": 0.7}
    x = torch.randn(5, 3)
    assert torch.equal(after(x, 0.4).mean, before(x, 0.4).mean)
    assert rp.Spec.from_dict(json.loads(json.dumps(rp.Spec.of(before).to_dict()))) == rp.Spec.of(before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "m.spec.json"]


def test_the_callers_spec_wins_and_bare_weights_need_one(tmp_path):
    before = denoiser()
    save_file(before.net.state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(SpecError, match=r"nothing is guessed.*spec=\.\.\."):
        rp.load(tmp_path / "bare.safetensors")
    after = rp.load(tmp_path / "bare.safetensors", spec=rp.Spec.of(before))
    assert after.target == rp.target("eps")
    with pytest.raises(NetworkError, match="do not fit"):
        rp.load(tmp_path / "bare.safetensors", net=rp.networks.MLP(4), spec=rp.Spec.of(before))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("target", 5, "target is 5, expected a dict"),
        ("target", {"name": "vee"}, "unknown target 'vee'"),
        ("schedule", {"name": "ddpm", "T": "x"}, "T must be an integer"),
        ("t_range", None, "t_range is None"),
        ("t_range", [0, 1], "eps cannot be turned into x0|a network that predicts eps"),
        ("time", "hours", "unknown time convention"),
        ("schema", 99, "Upgrade reparam"),
        ("schema", None, "schema None"),
        ("network", "mlp", "network is 'mlp'"),
        ("extra", 1, "unknown fields: extra"),
    ],
)
def test_a_spec_that_was_tampered_with_is_refused(tmp_path, field, value, message):
    record = rp.Spec.of(denoiser()).to_dict() | {field: value}
    save_file(denoiser().net.state_dict(), tmp_path / "m.safetensors", {"reparam": json.dumps(record)})
    with pytest.raises(SpecError, match=message):
        rp.load(tmp_path / "m.safetensors")


def test_a_missing_field_is_named(tmp_path):
    record = rp.Spec.of(denoiser()).to_dict()
    del record["target"]
    with pytest.raises(SpecError, match="does not say target"):
        rp.Spec.from_dict(record)


def test_tied_weights_and_foreign_configs_are_saved(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.config = {"act": nn.ReLU}

        def forward(self, x, time):
            return self.b(self.a(x))

    net = Tied()
    rp.save(rp.Denoiser(net, "cosine", "v"), tmp_path / "t.safetensors")
    again = rp.load(tmp_path / "t.safetensors", net=Tied())
    assert torch.equal(again.net.b.weight, net.a.weight)


def test_an_unwritable_place_is_named(tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        rp.save(denoiser(), tmp_path / "gone" / "m.safetensors")


CODE = {"name": "os:system", "command": "touch ran"}


@pytest.mark.parametrize("network", [CODE, {"name": "confident", "base": CODE, "head": {}}])
def test_a_file_of_weights_runs_no_code(tmp_path, monkeypatch, network):
    monkeypatch.chdir(tmp_path)
    record = rp.Spec.of(denoiser()).to_dict() | {"network": network}
    save_file(denoiser().net.state_dict(), "m.safetensors", {"reparam": json.dumps(record)})
    with pytest.raises(SpecError, match="names code to run.*net="):
        rp.load("m.safetensors")
    assert not (tmp_path / "ran").exists()
    assert isinstance(rp.load("m.safetensors", net=rp.networks.MLP(3, 8, 2)).net, rp.networks.MLP)


# What is said of the data, and how it was trained, besides the conventions.
DATA = {"name": "mine", "shape": [3], "normalised_by": {"mean": 0.0, "std": 2.0}, "min": -1.0, "max": 1.0}

#: Of every field another value that is well formed.
OTHERS = {
    "target": {"name": "v"},
    "schedule": {"name": "rectified_flow", "noise_scale": 2.0},
    "time": "1000t",
    "input": "unit_variance",
    "t_range": [0.0, 0.9],
    "network": {"name": "mlp", "dim": 3, "hidden": 8, "layers": 2, "activation": "silu"},
    "data": {**DATA, "min": 0.0},
    "training": {"loss_space": {"name": "x0"}, "weighting": None, "times": {"name": "uniform"}},
    "overrides": {"time": {"file": "step", "given": "t"}},
    "version": "0.0.1",
    "schema": 1,
}


def rewritten(path, record):
    """The same weights with another record in their metadata."""
    save_file(load_file(path), path, {"reparam": json.dumps(record)})


def saved(folder, name="m.safetensors", **options):
    made = denoiser(**options)
    made.data = dict(DATA)
    rp.save(made, folder / name)
    return folder / name


def test_there_is_another_value_for_every_field():
    assert OTHERS.keys() == {f.name for f in dataclasses.fields(rp.Spec)}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("where", ["inside", "beside"])
def test_any_field_that_was_tampered_with_is_refused(tmp_path, name, where):
    path = saved(tmp_path)
    record = rp.Spec.of(rp.load(path)).to_dict()
    assert record[name] != OTHERS[name]
    record[name] = OTHERS[name]
    if where == "inside":
        rewritten(path, record)
    else:
        beside(path).write_text(json.dumps(record))
    with pytest.raises(
        SpecError, match=f"contradict each other: {name} is|contradicts itself|unknown fields: overrides"
    ):
        rp.load(path)


@pytest.mark.parametrize("name", ["target", "schedule", "time", "input", "t_range", "network", "data", "training"])
def test_a_users_word_wins_and_is_recorded(tmp_path, name):
    path = saved(tmp_path)
    was = read_spec(path).to_dict()
    loaded = rp.load(path, spec={name: OTHERS[name]})
    now = rp.Spec.of(loaded).to_dict()
    # A network is made again with all of its arguments, a schedule written with them.
    assert OTHERS[name].items() <= now[name].items() if isinstance(now[name], dict) else now[name] == OTHERS[name]
    assert now["overrides"] == {name: {"file": was[name], "given": now[name]}}
    assert loaded.overrides is not None
    assert loaded.overrides[name]["file"] == was[name]
    same = [f for f in was if f not in (name, "overrides")]
    assert [now[f] for f in same] == [was[f] for f in same]
    rp.save(loaded, tmp_path / "n.safetensors")
    again = rp.load(tmp_path / "n.safetensors")
    assert again.overrides == now["overrides"]
    assert again.conventions == loaded.conventions
    told = dict(read_spec(tmp_path / "n.safetensors").in_words())
    assert told["said otherwise"].startswith(f"{name}: ")
    # Saying what the file said at first takes it back.
    assert rp.load(tmp_path / "n.safetensors", spec={name: was[name]}).overrides is None
    # Saying what is there changes nothing.
    assert rp.load(path, spec={name: was[name]}).overrides is None


def test_an_override_remembers_what_the_file_said_at_first(tmp_path):
    path = saved(tmp_path)
    rp.save(rp.load(path, spec={"target": "v"}), path)
    loaded = rp.load(path, spec={"target": "velocity", "time": "1-t"})
    assert loaded.overrides == {
        "target": {"file": {"name": "eps"}, "given": {"name": "velocity"}},
        "time": {"file": "t", "given": "1-t"},
    }


def test_a_spec_is_given_as_objects_names_a_mapping_or_a_file(tmp_path):
    path = saved(tmp_path)
    (tmp_path / "s.json").write_text(json.dumps({"target": "v_prediction"}))
    (tmp_path / "s.yaml").write_text("target: {name: v}\n")
    whole = dataclasses.replace(read_spec(path), target={"name": "v"})
    given = [
        {"target": rp.targets.V()},
        {"target": "v"},
        {"target": {"name": "v"}},
        tmp_path / "s.json",
        str(tmp_path / "s.yaml"),
        whole,
        whole.to_dict(),
    ]
    found = [rp.load(path, spec=one) for one in given]
    assert [one.target for one in found] == [rp.target("v")] * len(given)
    assert [one.overrides for one in found] == [{"target": {"file": {"name": "eps"}, "given": {"name": "v"}}}] * len(
        given
    )
    assert rp.load(path, spec={"schedule": rp.RectifiedFlow()}).overrides is None
    assert rp.load(path, spec={"schedule": rp.Cosine()}).schedule == rp.Cosine()
    assert rp.load(path, spec={"target": "epsilon", "t_range": (0, 0.98)}).overrides is None


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ({"targt": "v"}, "unknown fields: targt"),
        ({"target": None}, "target is None, expected a dict"),
        ({"target": "vee"}, "unknown target 'vee'"),
        ({"schema": 99, "target": "v"}, "Upgrade reparam"),
        ({"t_range": [0]}, "expected two numbers"),
        ({"t_range": [False, True]}, "expected two numbers"),
        ({"data": {"x": {1, 2}}}, "no plain data"),
        (5, "expected a mapping"),
        ("nowhere.json", "cannot read nowhere.json"),
    ],
)
def test_a_spec_that_is_none_is_refused(tmp_path, word, message):
    with pytest.raises(SpecError, match=message):
        rp.load(saved(tmp_path), spec=word)


def test_of_two_records_that_contradict_each_other_the_caller_says_which(tmp_path):
    path = saved(tmp_path)
    record = json.loads(beside(path).read_text())
    beside(path).write_text(json.dumps(record | {"target": {"name": "v"}, "time": "1-t"}))
    with pytest.raises(SpecError, match="time"):
        rp.load(path, spec={"target": "v"})
    loaded = rp.load(path, spec={"target": "v", "time": "t"})
    assert loaded.overrides == {"target": {"file": {"name": "eps"}, "given": {"name": "v"}}}
    rp.save(loaded, path)  # and then there is one record again
    assert rp.load(path).target == rp.target("v")


def test_a_number_is_the_same_written_with_and_without_a_point(tmp_path):
    path = saved(tmp_path)
    record = json.loads(beside(path).read_text())
    assert record["t_range"] == [0.0, 0.98]
    beside(path).write_text(json.dumps(record | {"t_range": [0, 0.98]}))
    assert rp.load(path).t_range == (0.0, 0.98)
    beside(path).write_text(json.dumps(record | {"version": "0.0.1"}))
    with pytest.raises(SpecError, match=r"version is .*Remove what is wrong\.$"):  # nobody can say which it was
        rp.load(path)
    beside(path).unlink()
    beside(path).mkdir()
    with pytest.raises(SpecError, match="cannot read"):
        rp.load(path)


@pytest.mark.parametrize("wrap", [rp.samplers.Clipped, lambda d: d.on("cosine")], ids=["clipped", "rescheduled"])
def test_what_asks_another_model_keeps_its_record_and_is_not_saved_for_it(tmp_path, wrap):
    path = saved(tmp_path)
    around = wrap(rp.load(path, spec={"time": "1-t"}))
    assert around.overrides == {"time": {"file": "t", "given": "1-t"}}
    for refused in (lambda: rp.save(around, tmp_path / "n.safetensors"), lambda: rp.reexpress(around, "v")):
        with pytest.raises(Unsupported, match="a model around another one; take that one"):
            refused()


@pytest.mark.parametrize("what", [None, nn.Linear(2, 2), "m.safetensors"])
def test_what_is_no_denoiser_is_neither_saved_nor_converted(tmp_path, what):
    for refused in (lambda: rp.save(what, tmp_path / "n.safetensors"), lambda: rp.reexpress(what, "v")):
        with pytest.raises(Unsupported, match=f"found {type(what).__name__}, expected a Denoiser"):
            refused()


def test_arguments_of_another_kind_are_named(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(NetworkError, match="net= is str"):
        rp.load(path, net="mlp")
    with pytest.raises(SpecError, match="found NoneType, expected the path"):
        rp.load(None)
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(SpecError, match="it has 0 bytes"):
        rp.load(tmp_path / "empty.safetensors")
    for name in ("n.pt", "n"):
        with pytest.raises(OutputError, match="change the ending"):
            rp.save(denoiser(), tmp_path / name)
        assert not (tmp_path / name).exists()


def test_a_pipeline_of_diffusers_is_told_from_a_run(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text("{}")
    assert main(["show", str(tmp_path)]) == 2
    assert "is a pipeline of diffusers" in capsys.readouterr().err


def test_the_record_beside_the_weights_stands_in_for_a_lost_one(tmp_path):
    path = saved(tmp_path)
    save_file(load_file(path), path)  # as other tools do
    assert rp.load(path).conventions == denoiser().conventions
    beside(path).unlink()
    with pytest.raises(SpecError, match="nothing is guessed"):
        rp.load(path)
    beside(path).write_text("{")
    with pytest.raises(SpecError, match="neither JSON nor YAML"):
        rp.load(path)
    whole = rp.Spec.of(denoiser())
    assert rp.load(path, spec=whole).conventions == denoiser().conventions  # whose record is then not needed


def test_a_run_has_one_record(tmp_path):
    saved(tmp_path, "model.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "spec.json"]
    record = json.loads((tmp_path / "spec.json").read_text())
    assert record == read_spec(tmp_path / "model.safetensors").to_dict()
    assert record["schema"] == SCHEMA == 2


def test_a_save_that_is_killed_leaves_no_record_of_other_weights(tmp_path, monkeypatch):
    path = saved(tmp_path)
    monkeypatch.setattr("reparam.spec.write_text", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rp.save(rp.load(path, spec={"target": "v"}), path)
    assert rp.load(path).target == rp.target("v")


def test_a_record_of_the_first_schema_is_read(tmp_path):
    path = saved(tmp_path)
    record = read_spec(path).to_dict() | {"schema": 1}
    del record["overrides"]
    rewritten(path, record)
    beside(path).unlink()
    assert rp.load(path).conventions == denoiser().conventions
    assert read_spec(path).schema == 1
    assert read_spec(path, {"target": "v"}).schema == 2  # it has a field that the first one had not


def test_a_key_that_is_given_twice_is_refused(tmp_path):
    path = saved(tmp_path)
    text = json.dumps(read_spec(path).to_dict())
    twice = text[:-1] + ', "target": {"name": "v"}}'
    assert json.loads(twice)["target"] == {"name": "v"}  # which a plain reader would take
    beside(path).unlink()
    save_file(load_file(path), path, {"reparam": twice})
    with pytest.raises(SpecError, match="'target' is given twice"):
        rp.load(path)


def test_overrides_that_contradict_the_record_are_refused():
    record = rp.Spec.of(denoiser()).to_dict()
    for bad in ({"target": {"file": {"name": "v"}, "given": {"name": "x0"}}}, {"target": 5}, {"nothing": {}}):
        with pytest.raises(SpecError, match="overrides"):
            rp.Spec.from_dict(record | {"overrides": bad})


@pytest.mark.parametrize("zero", [True, False])
def test_the_record_answers_what_users_ask(tmp_path, zero):
    schedule = rp.DDPM(zero_terminal_snr=zero)
    made = rp.Denoiser(rp.networks.MLP(3, 8, 2), schedule, "v", time="1-t", data=DATA)
    rp.save(made, tmp_path / "m.safetensors")
    told = dict(read_spec(tmp_path / "m.safetensors").in_words())
    assert told["zero terminal SNR"].startswith("yes" if zero else "no")
    assert "v = alpha*eps - sigma*x0" in told["predicts"]
    assert "t = 0 data, t = 1 noise" in told["forward process"]
    assert told["time given as"] == "1-t"
    assert "min -1, max 1" in told["data"]
    assert "normalised_by" in told["data"]
    flow = dict(rp.Spec.of(rp.Denoiser(made.net, rp.RectifiedFlow(2.5), "v")).in_words())
    assert "sigma up to 2.5" in flow["zero terminal SNR"]


# Files that are not what they are called.


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def _file(path, kind):
    good = path.with_name("good.safetensors")
    save_file({"w": torch.zeros(100)}, good)
    header = json.dumps({"w": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}}).encode()
    content = {
        "pickle": pickle.dumps(Bomb()),
        "old pickle": pickle.dumps(Bomb(), protocol=0),
        "10 GB header": struct.pack("<Q", 10 * 2**30) + header,
        "longest header": struct.pack("<Q", 2**64 - 1) + header,
        "empty header": struct.pack("<Q", 0) + header,
        "truncated": good.read_bytes()[:-200],
        "cut in its header": good.read_bytes()[:20],
        "empty": b"",
        "seven bytes": b"1234567",
        "10 GB tensor": _with(b'{"w": {"dtype": "F32", "shape": [2684354560], "data_offsets": [0, 10737418240]}}'),
        "huge shape": _with(b'{"w": {"dtype": "F32", "shape": [9223372036854775807, 9], "data_offsets": [0, 4]}}'),
        "no JSON": _with(b"{nonsense"),
        "deep JSON": _with(b"[" * 90_000),
        "list": _with(b"[]"),
        "no UTF-8": _with(b'"\xff\xfe"'),
    }
    if kind == "torch.save":
        torch.save({"w": torch.zeros(3), "b": Bomb()}, path)
    else:
        path.write_bytes(content[kind])


def _with(header):
    return struct.pack("<Q", len(header)) + header + b"0000"


KINDS = ["pickle", "old pickle", "torch.save", "10 GB header", "longest header", "empty header", "truncated"]
KINDS += ["cut in its header", "empty", "seven bytes", "10 GB tensor", "huge shape", "no JSON", "deep JSON", "list"]
KINDS += ["no UTF-8"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [read_tensors, rp.load, lambda path: rp.load(path, spec=rp.Spec.of(denoiser()))])
def test_what_is_no_safetensors_is_refused_without_being_run_or_allocated(tmp_path, monkeypatch, kind, read):
    monkeypatch.chdir(tmp_path)
    _file(tmp_path / "m.safetensors", kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        with pytest.raises(SpecError, match="readable safetensors file|does not say"):
            read(tmp_path / "m.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB; a header says 10 GiB
    assert not (tmp_path / "ran").exists()
    if kind in ("pickle", "torch.save"):
        with pytest.raises(SpecError, match=r"torch\.save: a pickle can run code.*weights_only=True"):
            read(tmp_path / "m.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".pth", ".bin", ".pkl", ".PT"])
def test_pickles_by_name_are_not_even_opened(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"m{suffix}"
    torch.save({"b": Bomb()}, path)
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(SpecError, match=r"was not opened.*Expected \.safetensors"):
        rp.load(path, spec=rp.Spec.of(denoiser()))


def test_a_record_is_read_without_the_weights(tmp_path):
    path = tmp_path / "big.safetensors"
    made = rp.Denoiser(nn.Linear(2000, 2000), "cosine", "v")
    rp.save(made, path)
    tracemalloc.start()
    assert read_spec(path).target == {"name": "v"}
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert read_header(path).shapes == {"weight": [2000, 2000], "bias": [2000]}


@pytest.mark.parametrize(
    "network",
    [
        {"name": "mlp", "dim": 3, "hidden": 10**12},
        {"name": "mlp", "dim": 3, "hidden": 90_000, "layers": 4},  # 65 GB
        {"name": "mlp", "dim": 3, "hidden": 8, "layers": 10**9},
        {"name": "jit", "image": 256, "patch": 16, "width": 90_000, "depth": 1, "heads": 1},
        {
            "name": "confident",
            "base": {"name": "mlp", "dim": 90_000, "hidden": 90_000},
            "head": {"name": "mlp", "dim": 1},
        },
    ],
)
def test_a_network_larger_than_its_weights_is_refused_before_it_is_made(tmp_path, network):
    path = saved(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(NetworkError, match="larger than all of its|do not fit"):
        rp.load(path, spec={"network": network})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_built_in_networks_are_loaded_as_they_were(tmp_path):
    unet = rp.networks.UNet(8, channels=1, widths=[32, 32])
    jit = rp.networks.JiT(8, patch=4, channels=1, width=16, depth=1, heads=2, bottleneck=4)
    both = rp.networks.Confident({"name": "mlp", "dim": 2}, {"name": "mlp", "dim": 2, "outputs": 1})
    for net in (unet, jit, both):
        target = rp.Gaussian("v", "isotropic") if net is both else "v"
        rp.save(rp.Denoiser(net, "cosine", target), tmp_path / "m.safetensors")
        again = rp.load(tmp_path / "m.safetensors").net
        assert {k: v.device.type for k, v in again.named_buffers()} == {k: "cpu" for k, v in net.named_buffers()}
        for name, value in net.state_dict().items():
            assert torch.equal(again.state_dict()[name], value)


# Code.

TASK = """
from pathlib import Path
Path("ran").touch()
def compute_training_target(x_0, noise, timesteps, schedule): return noise
def predict_x0(model_output, x_t, timesteps, schedule):
    s = [-1] + [1] * (x_t.ndim - 1)
    a, b = (schedule[k][timesteps].reshape(s) for k in ("sqrt_alpha", "sqrt_one_minus_alpha"))
    return (x_t - b * model_output) / a
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Weights whose record names a Python file; which has not been run since."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(TASK)
    kind = rp.targets.File("mine.py")
    made = rp.Denoiser(rp.networks.MLP(3, 8, 2), "ddpm", kind, time="step", data=DATA)
    rp.save(made, "m.safetensors")
    Path("ran").unlink()
    return made


NESTED = [
    {"name": "file", "path": "mine.py"},
    {"name": "negated", "of": {"name": "file", "path": "mine.py"}},
    {"name": "gaussian", "target": {"name": "file", "path": "mine.py"}},
    {"name": "in_basis", "basis": {}, "inside": {"name": "file", "path": "mine.py"}},
]


@pytest.mark.parametrize("target", NESTED)
def test_a_target_that_is_code_is_not_run_by_a_record(task, target):
    Path("given.json").write_text(json.dumps({"target": target}))
    record = read_spec("m.safetensors").to_dict() | {"target": target}
    save_file(task.net.state_dict(), "n.safetensors", {"reparam": json.dumps(record)})
    for call in (
        lambda: rp.load("m.safetensors"),
        lambda: rp.load("n.safetensors"),
        lambda: rp.load("m.safetensors", spec={"target": target}),
        lambda: rp.load("m.safetensors", spec="given.json"),
        lambda: rp.Spec.from_dict(record).denoiser(task.net),
    ):
        with pytest.raises(SpecError, match=r"names code to run \(mine\.py\).*rp\.targets\.File"):
            call()
    assert "(not run)" in dict(read_spec("n.safetensors").in_words())["predicts"]
    assert not Path("ran").exists()


def test_a_target_that_is_code_is_used_where_the_caller_gives_it(task):
    loaded = rp.load("m.safetensors", spec={"target": rp.targets.File("mine.py")})
    assert Path("ran").exists()
    assert loaded.overrides is None
    x = torch.randn(2, 3)
    t = torch.tensor([1.0, 0.5])
    assert torch.equal(loaded(x, t).mean, task(x, t).mean)


def test_the_command_line_runs_a_target_only_where_it_is_named_there(task, capsys):
    draw = ["sample", "m.safetensors", "--n", "2", "--steps", "2", "--sampler", "ddim", "--out", "x.npz"]
    assert main(draw) == 2
    assert "names code to run" in capsys.readouterr().err
    assert main(["show", "m.safetensors"]) == 0
    assert "(not run)" in capsys.readouterr().out
    assert not Path("ran").exists()
    assert main([*draw, "--spec", "{target: {name: file, path: mine.py}}"]) == 0
    assert "running your code: target mine.py" in capsys.readouterr().err
    assert np.load("x.npz")["x"].shape == (2, 3)


# The command line.


def test_sample_and_show_take_a_spec(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path)
    draw = ["sample", "m.safetensors", "--n", "4", "--steps", "3"]
    assert main([*draw, "--out", "a.npz"]) == 0
    assert main([*draw, "--out", "b.npz", "--spec", "{target: v}"]) == 0
    a, b = np.load("a.npz"), np.load("b.npz")
    assert not np.array_equal(a["x"], b["x"])
    assert json.loads(str(b["about"]))["model"]["overrides"]["target"]["given"] == {"name": "v"}
    Path("v.yaml").write_text("target: v\n")
    assert main([*draw, "--out", "c.npz", "--spec", "v.yaml"]) == 0
    assert np.array_equal(np.load("c.npz")["x"], b["x"])
    capsys.readouterr()
    assert main(["show", "m.safetensors", "--spec", "{target: v}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overrides"]["target"]["file"] == {"name": "eps"}
    assert main(["show", "m.safetensors", "--spec", "{target: vee}"]) == 2
    assert "unknown target 'vee'" in capsys.readouterr().err


def test_bare_weights_are_sampled_from_under_a_spec(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = denoiser()
    made.data = dict(DATA)
    save_file(made.net.state_dict(), "bare.safetensors")
    draw = ["sample", "bare.safetensors", "--n", "4", "--steps", "3", "--out", "a.npz"]
    assert main(draw) == 2
    assert "--spec, with target, schedule, time, input and t_range" in capsys.readouterr().err
    assert main([*draw, "--spec", "{target: eps}"]) == 2
    assert "does not say input, schedule, t_range, time" in capsys.readouterr().err
    Path("s.yaml").write_text(yaml.safe_dump(rp.Spec.of(made).to_dict()))
    assert main([*draw, "--spec", "s.yaml"]) == 0
    rp.save(made, "whole.safetensors")
    assert main(["sample", "whole.safetensors", *draw[2:-1], "b.npz"]) == 0
    assert np.array_equal(np.load("a.npz")["x"], np.load("b.npz")["x"])


def test_eval_refuses_a_spec_that_would_change_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.zeros((8, 3), np.float32))
    assert main(["eval", "x.npy", "--reference", "x.npy", "--spec", "{target: v}"]) == 2
    assert "--spec is of a model" in capsys.readouterr().err
    assert main(["eval", "--compare", "a.json", "b.json", "--spec", "{target: v}"]) == 2
    assert "found spec beside it" in capsys.readouterr().err


# Whatever is in a file, the end is an error of ours, or a model.

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["v", "eps", "ddpm"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
PROPER = rp.Spec.of(denoiser()).to_dict() | {"data": DATA}
TARGETS = ["x0", "eps", "v", "velocity", "score", "edm", "linear", "k", "in_basis", "file", "negated", "gaussian"]
SCHEDULES = ["rectified_flow", "cosine", "ddpm", "ve", "path", "elementwise"]
ARGUMENTS = ["p", "q", "k", "learned", "sigma_data", "of", "target", "basis", "inside", "outside", "path", "covariance"]
ARGUMENTS += [
    "T",
    "betas",
    "noise_scale",
    "sigma_min",
    "sigma_max",
    "alpha_of",
    "sigma_of",
    "base",
    "scale",
    "beta_end",
]
ARGUMENTS += ["zero_terminal_snr", "dim", "hidden", "layers", "outputs", "head", "image", "patch", "width", "weights"]
NAMED = st.deferred(
    lambda: st.builds(
        lambda name, rest: {"name": name, **rest},
        st.sampled_from([*TARGETS, *SCHEDULES, "mlp", "jit", "unet", "confident", "reexpressed", "os:getcwd"]),
        st.dictionaries(
            st.sampled_from(ARGUMENTS), NAMED | PLAIN | st.sampled_from(["sigma", "-alpha", "t"]), max_size=3
        ),
    )
)
ANYTHING = PLAIN | NAMED
OFTEN = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def _ends_well(call):
    """A model, or an error of ours: then None."""
    try:
        return call()
    except ReparamError as e:
        assert str(e)  # noqa: PT017
        return None


def _loaded(record):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        save_file(
            denoiser().net.state_dict(), path, {"reparam": record if isinstance(record, str) else json.dumps(record)}
        )
        found = _ends_well(lambda: rp.load(path))
        _ends_well(lambda: read_spec(path).in_words())
        if found is not None:
            assert math.isfinite(found.t_range[1])
        return found


@OFTEN
@given(st.text() | PLAIN.map(json.dumps))
def test_any_metadata_end_well(record):
    assert _loaded(record) is None


@OFTEN
@given(st.sampled_from(list(PROPER)), ANYTHING)
def test_any_value_of_any_field_ends_well(name, value):
    _loaded(PROPER | {name: value})


@OFTEN
@given(st.data())
def test_any_part_of_a_record_ends_well(data):
    """Something else at any depth of a proper record, or nothing."""
    record = copy.deepcopy(PROPER)
    place, name = record, data.draw(st.sampled_from(list(record)))
    while isinstance(place[name], dict) and place[name] and data.draw(st.booleans()):
        place = place[name]
        name = data.draw(st.sampled_from(list(place)))
    if data.draw(st.booleans()):
        del place[name]
    else:
        place[name] = data.draw(ANYTHING)
    _loaded(record)


@OFTEN
@given(
    st.text() | PLAIN.map(json.dumps) | NAMED.map(lambda v: yaml.safe_dump({"target": v})),
    st.sampled_from([".json", ".yaml"]),
)
def test_any_given_spec_ends_well(text, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = saved(Path(folder))
        given = Path(folder) / f"given{suffix}"
        given.write_bytes(text.encode("utf-8", "surrogatepass"))
        _ends_well(lambda: rp.load(path, spec=given))
        beside(path).write_bytes(given.read_bytes())
        _ends_well(lambda: rp.load(path))


@OFTEN
@given(st.data())
def test_any_damage_to_a_file_ends_well(data):
    with tempfile.TemporaryDirectory() as folder:
        path = saved(Path(folder))
        beside(path).unlink()
        raw = bytearray(path.read_bytes())
        reach = st.integers(0, data.draw(st.sampled_from([16, 400, len(raw)])) - 1)
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(reach)] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            raw = raw[: data.draw(st.integers(0, len(raw)))]
        path.write_bytes(raw)
        _ends_well(lambda: rp.load(path))


@OFTEN
@given(
    st.dictionaries(
        st.text(max_size=5) | st.just("__metadata__"),
        ANYTHING
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F8_E8M0", "C64", "U64", "F4", "x"]),
                "shape": st.lists(st.integers(-1, 2**70), max_size=3) | st.just([1]),
                "data_offsets": st.lists(st.integers(-1, 2**70), max_size=3) | st.just([0, 4]),
            }
        ),
        max_size=3,
    )
)
def test_any_header_ends_well(header):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        path.write_bytes(_with(json.dumps(header).encode()))
        _ends_well(lambda: read_tensors(path))
        _ends_well(lambda: rp.load(path, spec=rp.Spec.of(denoiser())))
