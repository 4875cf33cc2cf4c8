"""Networks with more outputs than inputs, two side by side, and a confidence added to a finished run."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import reparam as rp
from reparam.cli import main
from reparam.data import load_data
from reparam.errors import Conflict, DataError, NetworkError, RecipeError, UnknownName
from reparam.files import read_tensors
from reparam.networks import MLP, Confident, UNet, config_of, network, own_code, own_network
from reparam.spec import read_spec
from reparam.studies.averaging import average_run
from reparam.studies.confidence import check_base, with_confidence
from reparam.studies.recipe import load_recipe
from reparam.studies.run import make_network

X, TIME = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 5)
PICTURES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
JIT = {"name": "jit", "image": 8, "patch": 4, "channels": 1, "width": 16, "depth": 1, "heads": 2, "bottleneck": 8}


def seeded(make, **arguments):
    torch.manual_seed(3)
    return make(**arguments)


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def drifted(net, std=0.1):
    """The network with all its parameters moved, so that none stands at a zero of its initialisation."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in net.parameters():
            p += std * torch.randn(p.shape, generator=generator)
    return net


# ---- more outputs than inputs


def test_an_mlp_is_what_it_was_unless_something_else_is_asked_for():
    net = seeded(MLP, dim=2, hidden=8, layers=3)
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert list(net.state_dict()) == [f"stack.{name}" for name in plain.state_dict()]
    assert torch.equal(net(X, TIME), plain(torch.cat([X, TIME[:, None]], 1)))
    old = {"name": "mlp", "dim": 2, "hidden": 8, "layers": 3}  # as in files that were written before
    network(old).load_state_dict(net.state_dict())


def test_the_toy_network_of_autoguidance():
    """Linear(D + 1 -> 64), four times [SiLU, Linear], SiLU, Linear, times a gain that starts at 0 (2406.02507)."""
    net = seeded(MLP, dim=2, hidden=64, layers=6, outputs=5, activation="silu", gain=True)
    torch.manual_seed(3)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise([3, *[64] * 5, 5])]
    h = torch.cat([X, TIME[:, None]], 1)
    for layer in layers[:-1]:
        h = layer(h)
        h = h * torch.sigmoid(h)
    assert torch.equal(net(X, TIME), torch.zeros(5, 5))
    net.gain.data.fill_(0.7)
    torch.testing.assert_close(net(X, TIME), 0.7 * layers[-1](h))
    assert parameters(net) == (3 * 64 + 64) + 4 * (64 * 64 + 64) + (64 * 5 + 5) + 1
    assert parameters(network(net.config)) == parameters(net)


def test_a_gain_that_starts_at_zero_learns():
    net = MLP(2, hidden=16, layers=3, gain=True)
    optimiser = torch.optim.SGD(net.parameters(), 0.5)
    losses = []
    for _ in range(30):
        loss = (net(X, TIME) - X.flip(1)).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"outputs": 0}, NetworkError, "outputs must be an integer of at least 1"),
        ({"activation": "gelu"}, UnknownName, "relu, silu"),
        ({"gain": 1}, NetworkError, "gain is true or false, found 1"),
    ],
)
def test_an_mlp_refuses(arguments, error, says):
    with pytest.raises(error, match=says):
        MLP(2, **arguments)


def test_the_first_channels_of_a_jit_are_those_of_a_narrower_one():
    """The output's channels are rows of the last layer: within a patch, the channel goes fastest."""
    wide, narrow = drifted(network({**JIT, "outputs": 3})), network(JIT)
    weights = wide.state_dict()
    first = [k * 3 for k in range(4 * 4)]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        weights[name] = weights[name][first]
    narrow.load_state_dict(weights)
    out = wide(PICTURES, torch.rand(3))
    assert out.shape == (3, 3, 8, 8)
    time = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(wide(PICTURES, time)[:, :1], narrow(PICTURES, time))
    assert wide.config["outputs"] == 3
    assert narrow.config["outputs"] == 1
    assert torch.equal(network({**JIT, "outputs": 2})(PICTURES, time), torch.zeros(3, 2, 8, 8))  # it starts at 0
    with pytest.raises(NetworkError, match="outputs must be"):
        network({**JIT, "outputs": 0})


def test_a_unet_with_more_channels_out_than_in():
    pytest.importorskip("diffusers")
    asked = {"image": 8, "channels": 1, "widths": [32, 32]}
    net = UNet(**asked, outputs=2)
    assert net(PICTURES, torch.rand(3)).shape == (3, 2, 8, 8)
    assert network(net.config).conv_out.weight.shape == net.conv_out.weight.shape == (2, 32, 3, 3)
    default, stated = (seeded(UNet, **asked, **more).state_dict() for more in ({}, {"outputs": 1}))
    assert all(torch.equal(default[name], stated[name]) for name in stated)
    with pytest.raises(NetworkError, match="outputs must be"):
        UNet(**asked, outputs=0)


# ---- two networks side by side


def two(**head):
    config = {"name": "confident", "base": {"name": "mlp", "dim": 2, "hidden": 8, "layers": 3}}
    return drifted(network({**config, "head": {"name": "mlp", "dim": 2, "hidden": 4, "outputs": 3, **head}}))


def test_outputs_stand_side_by_side():
    net = two()
    out = net(X, TIME)
    assert out.shape == (5, 5)
    assert torch.equal(out[:, :2], net.base(X, TIME))
    assert torch.equal(out[:, 2:], net.head(X, TIME))
    pictures = Confident(JIT, {**JIT, "outputs": 2, "classes": 0})
    assert pictures(PICTURES, torch.rand(3)).shape == (3, 3, 8, 8)


def test_labels_reach_both():
    asked = {**JIT, "classes": 4, "in_context": 0}
    net = drifted(Confident(asked, {**asked, "width": 8, "heads": 1}))
    out = [net(PICTURES, torch.full((3,), 0.5), y=torch.full((3,), y)) for y in (0, 1)]
    assert not torch.allclose(out[0][:, :1], out[1][:, :1])
    assert not torch.allclose(out[0][:, 1:], out[1][:, 1:])


def test_only_the_head_is_trained():
    net = two()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimiser = torch.optim.AdamW(net.parameters(), 0.1, weight_decay=0.5)
    for _ in range(3):
        net(X, TIME).square().mean().backward()
        assert all(p.grad is None for p in net.base.parameters())
        optimiser.step()
        optimiser.zero_grad()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("base.")
    assert not net.base(X, TIME).requires_grad


def test_the_base_is_always_in_evaluation_mode():
    base = nn.Sequential(nn.Dropout(0.5))
    net = Confident(base, nn.Sequential(nn.Dropout(0.5)))
    for mode in (True, False, True):
        net.train(mode)
        assert not net.base.training
        assert not net.base[0].training
        assert net.head[0].training == mode
    outer = nn.ModuleList([net]).train()
    assert not outer[0].base.training
    assert copy.deepcopy(net).train().base.training is False
    assert base.training  # the caller's own network is left alone


def test_the_gradient_with_respect_to_x_goes_through_both():
    """As the divergence of a likelihood needs it."""
    net, x = two(), X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net(x, TIME)[:, :2].sum(), x)
    step = 1e-3 * torch.eye(2)[0]
    change = (net(X + step, TIME) - net(X - step, TIME))[:, :2].sum(1) / 2e-3
    torch.testing.assert_close(grad[:, 0], change, atol=2e-3, rtol=2e-3)


def test_it_is_saved_and_loaded_whole(tmp_path):
    net = two(activation="silu", gain=True, outputs=2)
    rp.save(rp.Denoiser(net, "rectified_flow", rp.Gaussian("x0")), tmp_path / "m.safetensors")
    found = rp.load(tmp_path / "m.safetensors").net
    assert isinstance(found, Confident)
    assert torch.equal(found(X, TIME), net(X, TIME))
    assert not any(p.requires_grad for p in found.base.parameters())
    assert {k.split(".")[0] for k in read_tensors(tmp_path / "m.safetensors")[0]} == {"base", "head"}
    stored = read_spec(tmp_path / "m.safetensors").network
    assert stored == json.loads(json.dumps(net.config))
    assert (stored["base"]["hidden"], stored["head"]["hidden"], stored["head"]["outputs"]) == (8, 4, 2)


def test_the_base_begins_with_weights_of_its_own(tmp_path):
    base = drifted(MLP(2, hidden=8, layers=3))
    rp.save(rp.Denoiser(base, "rectified_flow", "x0"), tmp_path / "m.safetensors")
    head = {"name": "mlp", "dim": 2}
    net = Confident(base.config, head, weights=str(tmp_path / "m.safetensors"))
    assert torch.equal(net(X, TIME)[:, :2], base(X, TIME))
    assert "weights" not in net.config
    with pytest.raises(NetworkError, match="do not fit the base MLP"):
        Confident({"name": "mlp", "dim": 2}, head, weights=str(tmp_path / "m.safetensors"))


def test_networks_of_the_users_own():
    net = Confident(nn.Identity(), MLP(2))
    assert config_of(net) is None
    assert config_of(MLP(2)) == MLP(2).config
    assert config_of(two()) == two().config
    nested = {"name": "confident", "base": {"name": "mine:make"}, "head": {"name": "mlp", "dim": 2}}
    assert own_code(nested) == ["mine:make"]
    assert own_code({"name": "mlp"}) == []
    assert own_network({"name": "mlp", "dim": 2}) is None
    with pytest.raises(NetworkError, match="head is a network's config"):
        Confident(MLP(2), "mlp")
    with pytest.raises(NetworkError, match="needs base and head"):
        network({"name": "confident"})
    with pytest.raises(NetworkError, match="needs dim"):
        network({"name": "confident", "base": {"name": "mlp"}, "head": {"name": "mlp"}})


def test_activations_are_computed_again_in_the_head_alone():
    net = drifted(Confident(JIT, JIT))
    time = torch.tensor([0.1, 0.5, 0.9])
    plain = net(PICTURES, time)
    net.checkpoint_activations(True)
    assert not net.base._again
    assert net.head._again
    assert torch.equal(net(PICTURES, time), plain)
    with pytest.raises(NetworkError, match="the head, MLP"):
        two().checkpoint_activations()


# ---- a confidence for a finished run

RECIPE = {
    "name": "toy",
    "network": {"name": "mlp", "hidden": 32, "layers": 4, "activation": "silu", "gain": True},
    "target": {"name": "edm", "sigma_data": 1.0},
    "schedule": {"name": "ve", "sigma_min": 0.002, "sigma_max": 20},
    "times": {"name": "logit_normal"},
    "time": "log_sigma/4",
    "input": "edm",
    "train": {
        "steps": 250,
        "batch": 256,
        "warmup": 10,
        "lr": 5e-3,
        "precision": "float32",
        "ema": 0.99,
        "ema_widths": [0.05, 0.1],
    },
    "sample": {"n": 64, "steps": 4, "grid": "karras"},
    "metrics": ["frechet_distance"],
}
#: σ/α at which variances are compared with errors.
LEVELS = (0.1, 1.0, 3.0)


def clusters(n, seed):
    """A narrow cluster of points [n, 2] and a wide one: std 0.05 about (-1, -1), and 0.5 about (1, 1)."""
    narrow, wide = torch.randn(2, n, 2, generator=torch.Generator().manual_seed(seed))
    return 0.05 * narrow - 1, 0.5 * wide + 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run, and one that adds a confidence to it."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    folder = tmp_path_factory.mktemp("heads")
    np.save(folder / "x.npy", torch.cat(clusters(2000, 0)).numpy())
    options = {"device": "cpu", "tracker": None, "say": lambda text: None}
    recipe = {**RECIPE, "data": str(folder / "x.npy")}
    rp.train(recipe, out=folder / "base", **options)
    settings = ["train.steps=600", "train.snapshots=5"]
    rp.train(add_confidence=folder / "base", out=folder / "sure", settings=settings, **options)
    return folder / "base", folder / "sure"


def noisy(denoiser, x0, sigma, seed=0):
    """(x_t, t) at σ/α = ``sigma``."""
    t = denoiser.schedule.time_at(torch.tensor(-2 * math.log(sigma), dtype=torch.float64))
    return denoiser.schedule.add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)), t), t


def test_the_mean_stays_the_same_to_the_bit(runs):
    base, sure = (rp.load(folder / "model.safetensors") for folder in runs)
    before, after = base.net.state_dict(), sure.net.state_dict()
    assert {f"base.{name}" for name in before} == {name for name in after if name.startswith("base.")}
    assert all(torch.equal(after[f"base.{name}"], value) for name, value in before.items())
    with torch.no_grad():
        for sigma in LEVELS:
            x_t, t = noisy(base, X, sigma)
            assert torch.equal(base(x_t, t).mean, sure(x_t, t).mean)
            assert sure(x_t, t).var.shape == X.shape


def test_the_variance_is_the_error_of_the_mean(runs):
    """By noise level, cluster and element, on fresh data: the mean of the variance is that of (x0 − mean)²."""
    sure = rp.load(runs[1] / "model.safetensors")
    for sigma in LEVELS:
        for x0 in clusters(4000, 1):
            x_t, t = noisy(sure, x0, sigma, seed=5)
            with torch.no_grad():
                mean, var, *_ = sure(x_t, t)
            ratio = (x0 - mean).square().mean(0) / var.mean(0)
            assert ((ratio > 0.75) & (ratio < 1.33)).all(), (sigma, ratio)


def test_the_variance_tells_samples_apart(runs):
    """At σ = 0.4 a point of the narrow cluster has variance 0.0025, one of the wide one 0.098."""
    sure = rp.load(runs[1] / "model.safetensors")
    with torch.no_grad():
        narrow, wide = (sure(*noisy(sure, x0, 0.4)).var.median() for x0 in clusters(1000, 1))
    assert wide > 2 * narrow
    assert wide == pytest.approx(0.25 * 0.16 / (0.25 + 0.16), rel=0.3)


def test_what_the_run_becomes(runs):
    base, sure = runs
    before, after = (yaml.safe_load((folder / "recipe.yaml").read_text()) for folder in runs)
    for key in ("data", "schedule", "time", "input", "t_range", "times", "conditional", "sample", "seed"):
        assert after[key] == before[key]
    asked = {"name": "confident", "base": before["network"], "head": before["network"]}
    assert after["network"] == {**asked, "weights": str(base / "model.safetensors")}
    assert after["target"] == {"name": "gaussian", "target": before["target"], "covariance": "diagonal", "of": "x0"}
    assert after["name"] == "base-confidence"
    assert json.loads((sure / "result.json").read_text())["status"] == "finished"


def test_an_average_of_any_width_keeps_the_mean(runs):
    """A sum of snapshots rounds; weights that were never trained are not taken from there."""
    average, _ = average_run(runs[1], 0.13, allow_inexact=True)
    trained, averaged = (read_tensors(path)[0] for path in (runs[1] / "model.safetensors", average))
    assert any(not torch.equal(trained[k], averaged[k]) for k in trained if k.startswith("head."))
    assert all(torch.equal(trained[k], averaged[k]) for k in trained if k.startswith("base."))


def test_it_is_continued(runs, tmp_path):
    """Stopped and continued as in one go, with the base of the checkpoint."""
    options = {"device": "cpu", "tracker": None, "say": lambda text: None}
    for out, steps in (("once", [8]), ("twice", [4, 8])):
        for n in steps:
            settings = ["train.decay=constant", "train.ema_widths=[]", "train.warmup=0", f"train.steps={n}"]
            rp.train(add_confidence=runs[0], out=tmp_path / out, settings=settings, **options)
    once, twice = (read_tensors(tmp_path / out / "model.safetensors")[0] for out in ("once", "twice"))
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert len(list((tmp_path / "twice" / "checkpoints").glob("step-*"))) == 2


def test_settings_reach_the_head_and_the_likelihood(runs):
    plan = load_recipe(with_confidence(runs[0]), ["target.covariance=full", "network.head.hidden=16", "train.steps=2"])
    (config,) = plan.runs.values()
    check_base(config)
    net = make_network(config, load_data(config.data))
    assert net(X, TIME).shape == (5, 2 + 3)
    assert (net.head.config["hidden"], net.base.config["hidden"]) == (16, 32)


def test_a_learned_k_stays_what_it_became(tmp_path):
    k = rp.targets.KTarget(0.3)
    rp.save(rp.Denoiser(MLP(2, hidden=32), "rectified_flow", k), tmp_path / "model.safetensors")
    raw = {
        **RECIPE,
        "data": "spiral",
        "schedule": "rectified_flow",
        "time": "t",
        "input": "none",
        "loss_space": "velocity",
    }
    raw |= {"target": {"name": "k", "learned": True}, "network": {"name": "mlp", "hidden": 32}}
    raw["sample"] = {"n": 64, "steps": 4}
    (config,) = load_recipe(raw).runs.values()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config.to_dict()))
    found = with_confidence(tmp_path / "model.safetensors")
    assert found["target"]["target"] == {"name": "k", "k": 0.3, "learned": False}
    assert found["loss_space"] is None
    (config,) = load_recipe(found).runs.values()
    check_base(config)


def fails(capsys, *args):
    assert main([str(a) for a in args]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told


def test_what_gets_no_confidence(runs, tmp_path, capsys):
    base, sure = runs
    assert "mean and a variance already" in fails(capsys, "train", "--add-confidence", sure)
    assert "expected the folder of a finished run" in fails(capsys, "train", "--add-confidence", tmp_path / "none")
    assert "leave out the recipe" in fails(capsys, "train", "spiral", "--add-confidence", base)
    assert "needs a recipe" in fails(capsys, "train")
    for name in ("model.safetensors", "recipe.yaml", "result.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    row = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps({**row, "status": "diverged"}))
    with pytest.raises(DataError, match="not finished"):
        with_confidence(tmp_path)
    (tmp_path / "result.json").unlink()
    with pytest.raises(DataError, match="not finished"):
        with_confidence(tmp_path)
    assert with_confidence(tmp_path / "model.safetensors")["network"]["name"] == "confident"
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "network": {"name": "Mine"}}))
    with pytest.raises(NetworkError, match="given as an object"):
        with_confidence(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["target={name: edm, sigma_data: 1.0}"], "gives a mean and a variance, and the target is edm"),
        (["target.target={name: edm, sigma_data: 0.5}"], "was trained with target"),
        (["schedule={name: ve, sigma_min: 0.002, sigma_max: 10}"], "was trained with schedule"),
        (["time=log_snr"], "was trained with time log_sigma/4"),
        (["input=unit_variance"], "was trained with input edm"),
        (["network.weights=null"], "needs network.weights"),
        (["network.head={}"], "needs network.head"),
        (["network.head=mlp"], "network.head is a network's own mapping"),
        (["network.head={hidden: 8}"], "network.head is a network's own mapping"),
    ],
)
def test_a_base_is_used_only_for_what_it_was_trained_for(runs, settings, says):
    (config,) = load_recipe(with_confidence(runs[0]), settings).runs.values()
    with pytest.raises((Conflict, NetworkError, RecipeError), match=says):
        check_base(config)


def test_a_base_is_used_only_at_the_times_of_its_training(runs, tmp_path):
    denoiser = rp.load(runs[0] / "model.safetensors")
    kept = rp.Denoiser(
        denoiser.net, denoiser.schedule, denoiser.target, time="log_sigma/4", input="edm", t_range=(0, 0.9)
    )
    rp.save(kept, tmp_path / "model.safetensors")
    settings = [f"network.weights={tmp_path / 'model.safetensors'}"]
    (config,) = load_recipe(with_confidence(runs[0]), settings).runs.values()
    with pytest.raises(Conflict, match="give a t_range within the base's"):
        check_base(config)


def test_a_network_of_the_users_own_gets_a_head_that_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heads_of_mine.py").write_text(
        "from reparam.networks import MLP\n\n\ndef make(**more):\n    return MLP(2, **more)\n"
    )
    base = MLP(2, hidden=8)
    rp.save(rp.Denoiser(base, "rectified_flow", "v"), tmp_path / "model.safetensors")
    raw = {"data": {"name": "spiral", "dim": 2}, "network": {"name": "heads_of_mine:make", "hidden": 8}, "target": "v"}
    (config,) = load_recipe(raw).runs.values()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config.to_dict()))
    found = with_confidence("model.safetensors")
    (config,) = load_recipe(found).runs.values()
    with pytest.raises(NetworkError, match="needs network.head"):
        check_base(config)
    (config,) = load_recipe(found, ["network.head={name: mlp, hidden: 4}"]).runs.values()
    check_base(config)
    net = make_network(config, load_data(config.data))
    assert net(X, TIME).shape == (5, 4)
    assert torch.equal(net(X, TIME)[:, :2], base(X, TIME))
