"""The record that travels with the weights."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import reparam as rp
from reparam.errors import NetworkError, OutputError, SpecError


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
    assert not [p for p in tmp_path.iterdir() if p.name != "m.safetensors"]


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
