"""The same model as another target: the network around the network, the command, and training that begins with it."""

import copy
import itertools
import json
import subprocess
import sys

import pytest
import torch
import yaml
from torch import nn

import reparam as rp
from reparam.cli import main
from reparam.data import from_array, load_data
from reparam.denoiser import TIME_CONVENTIONS, Conventions
from reparam.errors import (
    Conflict,
    DataError,
    NetworkError,
    OutputError,
    ReparamError,
    SingularTime,
    SpecError,
    Unsupported,
)
from reparam.files import read_tensors
from reparam.networks import MLP, Reexpressed, config_of, network
from reparam.networks.reexpressed import INVERSES
from reparam.spec import Spec, read_spec
from reparam.studies.initial import Initial
from reparam.studies.recipe import load_recipe
from reparam.studies.run import make_network, trainer_of
from reparam.targets import InBasis, KTarget, Linear
from reparam.tools.convert import ORIGIN, convert_model, worst_condition

DIM = 4
TARGETS = {
    "x0": "x0",
    "eps": "eps",
    "v": "v",
    "velocity": "velocity",
    "score": "score",
    "edm": {"name": "edm", "sigma_data": 0.7},
    "k": {"name": "k", "k": 0.3},
    "row": {"name": "linear", "p": "-sigma**2", "q": "2*alpha"},
}
SCHEDULES = {
    "flow": rp.RectifiedFlow(1.5),
    "cosine": rp.Cosine(),
    "ve": rp.VE(0.02, 50),
    "ddpm": rp.DDPM(),
}
TIMES = ("t", "1-t", "1000t", "log_snr", "log_sigma/4")
INPUTS = ("none", "unit_variance", "edm")


class Smooth(nn.Module):
    """A network whose answer depends on all it is given, and hardly moves when its time moves by a rounding."""

    def __init__(self, outputs=DIM):
        super().__init__()
        self.first, self.last = nn.Linear(DIM + 1, 16), nn.Linear(16, outputs)
        self.shift = nn.Embedding(3, 16)

    def forward(self, x, time, y=None):
        h = self.first(torch.cat([x, (time.to(x) / 1000)[:, None]], 1)).tanh()
        return self.last(h if y is None else h + self.shift(y))


def smooth(dtype=torch.float32, outputs=DIM):
    torch.manual_seed(5)
    return Smooth(outputs).to(dtype)


def model(schedule, target, net=None, **more):
    return rp.Denoiser(smooth() if net is None else net, schedule, target, t_range=(0.02, 0.98), **more)


def noisy(schedule, t, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0, eps = (torch.randn(len(t), DIM, generator=g, dtype=torch.float64) for _ in range(2))
    return schedule.add_noise(0.7 * x0, eps, t).to(dtype)


def bound(before, after, t, x, dtype):
    """16 eps of all that is rounded, [B]: the two ways to x0, and the conversion whose error the second amplifies."""
    s, a, b = before.schedule, before.target, after.target
    p, q = b.rows(t, s)
    on_the_way = a.condition(t, s, b) * (p.abs() + q.abs()) * b.amplification(t, s).x0
    sizes = torch.maximum(x.double().abs().amax(1) / (s.alpha(t) + s.sigma(t)), torch.tensor(1.0))
    return 16 * torch.finfo(dtype).eps * (on_the_way + a.condition(t, s) + b.condition(t, s)) * sizes


def difference(before, after, t, dtype=torch.float32, **cond):
    x = noisy(before.schedule, t, dtype)
    with torch.no_grad():
        want = before(x, t, **cond).mean.double()
        apart = (want - after(x, t, **cond).mean).abs().amax(1)
        size = want.abs().amax(1).clamp(min=1)
    return (apart / (bound(before, after, t, x, dtype) * size)).max().item()


# ------------------------------------------------------------------------------------------- the function


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_all_pairs_of_targets_have_one_x0(schedule, dtype):
    """Under every time convention and input scaling, up to the rounding that the targets declare."""
    t = torch.linspace(0.02, 0.98, 33, dtype=torch.float64)
    worst = 0.0
    times = enumerate(TIMES if dtype == torch.float32 else TIMES[1::3])
    for (i, (a, source)), (j, time) in itertools.product(enumerate(TARGETS.items()), times):
        inputs = INPUTS if a == "edm" else INPUTS[:2]
        for k, (b, to) in enumerate(TARGETS.items()):
            scaling = inputs[(i + j + k) % len(inputs)]  # over all, every one with every convention of time
            before = model(schedule, source, smooth(dtype), time=time, input=scaling)
            after = rp.reexpress(before, to)
            assert after.target == rp.target(to)
            worst = max(worst, difference(before, after, t, dtype))
            assert worst < 1, (a, b, time, scaling)
    assert worst > 0  # rounding was seen


def test_integer_steps_too():
    ddpm = rp.DDPM(zero_terminal_snr=True)
    t = ddpm.time(torch.tensor([0, 1, 10, 500, 900, 979]))
    for a, b in itertools.permutations(TARGETS, 2):
        before = rp.Denoiser(smooth(), ddpm, TARGETS[a], time="step", t_range=(0, 0.98))
        assert difference(before, rp.reexpress(before, TARGETS[b]), t) < 1, (a, b)


def test_what_the_network_outputs_is_the_published_formula():
    """v = α ε − σ x0 from a network for ε, and the network itself is called as before."""
    before = model(rp.Cosine(), "eps", time="1000t", input="unit_variance")
    after = rp.reexpress(before, "v")
    t = torch.linspace(0.1, 0.9, 7).double()
    x = noisy(before.schedule, t)
    eps = before.net(x, (1000 * t).float())
    alpha, sigma = (c[:, None].float() for c in (before.schedule.alpha(t), before.schedule.sigma(t)))
    v = alpha * eps - sigma * (x - sigma * eps) / alpha
    torch.testing.assert_close(after.net(x, (1000 * t).float()), v, rtol=1e-5, atol=1e-5)
    assert after.conventions.time == "1000t"
    assert after.conventions.input == "unit_variance"
    assert after.net.of is before.net


def test_every_time_convention_is_turned_back():
    assert INVERSES.keys() == TIME_CONVENTIONS.keys()
    for name, schedule in SCHEDULES.items():
        t = torch.linspace(0.02, 1 if name == "ddpm" else 0.98, 50, dtype=torch.float64)
        if name == "ddpm":
            t = (t * 1000).round() / 1000
        for time in TIME_CONVENTIONS if name == "ddpm" else TIMES:
            c = Conventions(schedule, "v", time, t_range=(0.02, 0.98))
            torch.testing.assert_close(INVERSES[time](c.network_time(t), schedule), t, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", [rp.VE(0.02, 50), rp.DDPM()], ids=str)
@pytest.mark.parametrize("time", ["log_snr", "log_sigma/4"])
def test_a_time_that_is_rounded_beyond_the_end_is_the_end(schedule, time):
    """The last log-SNR in float32 may lie a rounding below the schedule's own last."""
    low = schedule.time_at(10.0) if schedule.name == "ddpm" else 0.02
    before = rp.Denoiser(smooth(), schedule, "eps", time=time, t_range=(float(low), 1.0))
    after = rp.reexpress(before, "v")
    for nudge in (-1e-7, 0.0, 1e-7):
        given = (before.conventions.network_time(torch.tensor(1.0).double()) * (1 + nudge)).float().expand(2)
        assert after.net(torch.ones(2, DIM), given).isfinite().all()
    with pytest.raises(rp.errors.TimeOutOfRange):
        after.net(torch.ones(2, DIM), 2 * given)


def test_samples_are_the_same():
    for name in ("euler", "ddim", "dpmpp_2m"):
        before = model(rp.RectifiedFlow(), "velocity", smooth(torch.float64))
        noise = torch.randn(8, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        want = rp.sample(before, noise, sampler=name, steps=8)
        torch.testing.assert_close(rp.sample(rp.reexpress(before, "x0"), noise, sampler=name, steps=8), want)


def test_the_scaling_of_edm_goes_inside_where_no_target_states_it():
    before = model(rp.VE(0.02, 50), {"name": "edm", "sigma_data": 0.7}, input="edm", time="log_sigma/4")
    after = rp.reexpress(before, "x0")
    assert (after.conventions.input, after.net.scales) == ("none", True)
    same = rp.reexpress(before, {"name": "negated", "of": {"name": "edm", "sigma_data": 0.7}})
    assert (same.conventions.input, same.net.scales) == ("edm", False)
    other = rp.reexpress(before, {"name": "edm", "sigma_data": 1.0})
    assert (other.conventions.input, other.net.scales) == ("none", True)
    t = torch.linspace(0.02, 0.98, 9).double()
    assert max(difference(before, made, t) for made in (after, same, other)) < 1


def test_in_a_basis():
    columns = torch.tensor([[1, 1], [1, -1], [1, 1], [1, -1]]) / 2  # orthonormal without rounding
    split = InBasis(columns, "velocity", "x0")
    t = torch.linspace(0.05, 0.95, 9).double()
    for a, b in ((split, rp.target("v")), (rp.target("eps"), split), (split, InBasis(split.basis, "v", "eps"))):
        before = model(rp.RectifiedFlow(), a, smooth(torch.float64), input="unit_variance")
        after = rp.reexpress(before, b)
        x = noisy(before.schedule, t, torch.float64)
        torch.testing.assert_close(after(x, t).mean, before(x, t).mean, rtol=1e-11, atol=1e-11)
        for one in t:
            torch.testing.assert_close(after(x, float(one)).mean, before(x, float(one)).mean, rtol=1e-11, atol=1e-11)
    with pytest.raises(Unsupported, match="two different bases"):
        rp.reexpress(model(rp.RectifiedFlow(), split), InBasis(columns[:, :1], "velocity", "x0"))


def test_noise_that_differs_by_element():
    schedule = rp.Elementwise(rp.RectifiedFlow(), torch.tensor([0.5, 1.0, 2.0, 3.0]))
    before = model(schedule, "eps", smooth(torch.float64), input="unit_variance")
    t = torch.linspace(0.1, 0.9, 9).double()
    x = noisy(rp.RectifiedFlow(), t, torch.float64)
    for to in ("x0", "v", "velocity"):
        after = rp.reexpress(before, to)
        torch.testing.assert_close(after(x, t).mean, before(x, t).mean, rtol=1e-11, atol=1e-11)
        assert rp.reexpress(after, "eps").net is before.net


def test_conditional_networks_and_pictures():
    before = model(rp.RectifiedFlow(), "x0")
    y = torch.tensor([0, 1, 2, 1])
    t = torch.linspace(0.1, 0.9, 4).double()
    assert difference(before, rp.reexpress(before, "eps"), t, y=y) < 1
    x = noisy(before.schedule, t)
    assert not torch.equal(rp.reexpress(before, "eps")(x, t, y=y).mean, rp.reexpress(before, "eps")(x, t).mean)
    jit = network({"name": "jit", "image": 8, "patch": 4, "width": 16, "depth": 1, "heads": 2, "bottleneck": 8})
    with torch.no_grad():
        jit.final_layer.linear.weight.normal_(std=0.1)
    before = model(rp.RectifiedFlow(), "velocity", jit)
    pictures = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    want = before(pictures, t).mean
    torch.testing.assert_close(rp.reexpress(before, "x0")(pictures, t).mean, want, rtol=1e-5, atol=1e-5)


def test_bfloat16_inside_does_not_reach_the_arithmetic():
    before = model(rp.RectifiedFlow(), "eps")
    after = rp.reexpress(before, "v")
    t, x = torch.tensor([0.5, 0.9]).double(), torch.randn(2, DIM, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        a, b = before(x, t).mean, after(x, t).mean
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert b.dtype == torch.float32


def test_the_network_inside_is_what_is_compiled_and_spared():
    made = rp.reexpress(model(rp.RectifiedFlow(), "eps"), "v").net
    compiled = []
    made.of.compile = lambda **options: compiled.append(options)
    made.compile(dynamic=True)
    assert compiled == [{"dynamic": True}]
    with pytest.raises(NetworkError, match="Smooth has no method checkpoint_activations"):
        made.checkpoint_activations()
    made.of.checkpoint_activations = compiled.append
    made.checkpoint_activations(False)
    assert compiled[1:] == [False]


# ------------------------------------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("covariance", ["isotropic", "diagonal", "full"])
@pytest.mark.parametrize("of", ["x0", "noisy"])
def test_a_likelihood_keeps_its_variances(covariance, of):
    likelihood = rp.Gaussian({"name": "edm", "sigma_data": 0.7}, covariance=covariance, of=of)
    net = smooth(torch.float64, likelihood.outputs((DIM,))[0])
    before = model(rp.Cosine(), likelihood, net, input="edm")
    after = rp.reexpress(before, "eps")
    assert after.conventions.likelihood.sigma_data == 0.7
    t = torch.linspace(0.1, 0.9, 5).double()
    x, other = (noisy(before.schedule, t, torch.float64, seed) for seed in (0, 1))
    for ours, theirs in zip(after(x, t), before(x, t), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(after.log_prob(other, x, t), before.log_prob(other, x, t))
    asked = rp.Gaussian("v", covariance=covariance, of=of, sigma_data=0.7)
    assert rp.reexpress(after, asked).conventions.predicted() == asked


def test_a_conversion_makes_no_likelihood():
    with pytest.raises(Conflict, match="this model has none"):
        rp.reexpress(model(rp.Cosine(), "v"), rp.Gaussian("x0"))
    sure = model(rp.Cosine(), rp.Gaussian("v"), smooth(outputs=2 * DIM))
    with pytest.raises(Conflict, match=r"'covariance': 'diagonal'.*'covariance': 'isotropic'"):
        rp.reexpress(sure, rp.Gaussian("x0", covariance="isotropic"))


# ------------------------------------------------------------------------------------------- there and back


def test_back_again_is_the_network_itself():
    before = model(rp.RectifiedFlow(), "x0", data={"shape": [DIM]})
    before.training_record = {"weighting": "a record"}
    there = rp.reexpress(before, "v")
    back = rp.reexpress(there, "x0")
    assert back.net is before.net
    assert (back.conventions, back.data) == (before.conventions, before.data)
    assert back.training_record == before.training_record
    twice = rp.reexpress(rp.reexpress(there, "eps"), "velocity")
    assert isinstance(twice.net, Reexpressed)
    assert twice.net.of is before.net  # nothing piles up
    assert (twice.net.source, twice.net.wanted) == (rp.target("x0"), rp.target("velocity"))
    assert twice.training_record[ORIGIN]["target"] == {"name": "x0"}


def test_back_again_from_the_scaling_of_edm():
    before = model(rp.VE(0.02, 50), {"name": "edm", "sigma_data": 0.7}, input="edm")
    back = rp.reexpress(rp.reexpress(before, "x0"), before.target)
    assert back.conventions == before.conventions
    assert back.net is before.net


def test_a_claim_that_is_not_the_networks_own_is_taken_at_its_word():
    """A network re-expressed as v, said to predict something else, is wrapped as any network is."""
    inner = rp.reexpress(model(rp.RectifiedFlow(), "x0"), "v").net
    said = model(rp.Cosine(), "eps", inner)
    made = rp.reexpress(said, "v")
    assert made.net.of is inner
    assert difference(said, made, torch.linspace(0.1, 0.9, 5).double()) < 1


def test_the_record_keeps_the_spec_of_the_first_model():
    before = model(rp.RectifiedFlow(), "x0", MLP(DIM, hidden=8), data={"shape": [DIM], "sigma_data": 0.5})
    before.training_record = {"loss_space": None, "weighting": {"name": "space"}, "times": {"name": "uniform"}}
    made = rp.reexpress(before, "v")
    assert made.training_record == {**before.training_record, ORIGIN: Spec.of(before).to_dict()}
    assert before.training_record.keys() == {"loss_space", "weighting", "times"}  # and the first one's is as it was


def test_a_learned_k_is_taken_as_it_is_now():
    learned = KTarget(0.3, learned=True)
    made = rp.reexpress(model(rp.RectifiedFlow(), "x0"), learned)
    assert made.target == KTarget(0.3)


def test_functions_convert_but_are_not_written(tmp_path):
    row = Linear(lambda a, s: -s, lambda a, s: a)
    made = rp.reexpress(model(rp.Cosine(), row, MLP(DIM, hidden=8)), "eps")
    same = rp.reexpress(model(rp.Cosine(), "v", made.net.of), "eps")
    t = torch.linspace(0.1, 0.9, 5).double()
    x = noisy(made.schedule, t)
    torch.testing.assert_close(made(x, t).mean, same(x, t).mean)
    with pytest.raises(Unsupported, match="cannot be written down"):
        rp.save(made, tmp_path / "model.safetensors")


# ------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("schedule", "source", "to", "at", "remedy"),
    [
        (rp.RectifiedFlow(), "x0", "eps", "t = 0 ", r"\[0.001, 0.98\]"),
        (rp.RectifiedFlow(), "x0", "v", "t = 0 ", r"\[0.001, 1\]"),
        (rp.RectifiedFlow(), "velocity", "eps", "t = 1 ", r"\[0, 0.98\]"),
        (rp.Cosine(), "v", "score", "t = 0 ", r"\[0.001, 0.98\]"),
        (rp.DDPM(zero_terminal_snr=True), "v", "eps", "t = 1 ", r"\[0, 0.98\]"),
        (rp.Cosine(), "v", {"name": "linear", "p": "sigma", "q": "alpha"}, "t = 0.5 ", "leave that time out"),
    ],
)
def test_singular_inside_t_range_is_refused_and_says_where(schedule, source, to, at, remedy):
    before = rp.Denoiser(smooth(), schedule, source)
    with pytest.raises(SingularTime, match=f"{at}.*{remedy}"):
        rp.reexpress(before, to)


def test_what_is_singular_outside_the_times_asked_for_is_converted():
    before = rp.Denoiser(smooth(torch.float64), rp.RectifiedFlow(), "velocity")
    after = rp.reexpress(before, "eps", t_range=(0.0, 0.9))
    assert after.t_range == (0.0, 0.9)
    assert difference(before, after, torch.linspace(0, 0.9, 9).double(), torch.float64) < 1
    with pytest.raises(SingularTime, match="t = 0 "):
        rp.reexpress(after, "score")


def test_more_that_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\n"
        "def compute_training_target(x_0, noise, timesteps, schedule):\n    return noise\n"
        "def predict_x0(model_output, x_t, timesteps, schedule):\n    return x_t\n"
    )
    with pytest.raises(SpecError, match="weights run no code"):
        Reexpressed(smooth(), "cosine", "v", {"name": "negated", "of": {"name": "file", "path": str(file)}})
    assert not file.with_suffix(".ran").exists()
    with pytest.raises(Unsupported, match="a way of its own to x0"):
        rp.reexpress(model(rp.DDPM(), "v"), rp.targets.File(str(file)))
    with pytest.raises(Unsupported, match="a model around another one"):
        rp.reexpress(model(rp.Cosine(), "v").on("rectified_flow"), "x0")
    with pytest.raises(NetworkError, match=r"returned shape \[2, 3\]"):
        rp.reexpress(model(rp.Cosine(), "v", smooth(outputs=3)), "x0")(torch.ones(2, DIM), 0.5)
    with pytest.raises(rp.errors.UnknownName, match="time convention 'T'"):
        Reexpressed(smooth(), "cosine", "v", "x0", time="T")


@pytest.mark.parametrize(
    "changes",
    [
        {"source": 5},
        {"to": None},
        {"to": {"name": []}},
        {"to": {"name": "in_basis", "basis": {"float32": "?"}}},
        {"schedule": [1]},
        {"schedule": {"name": "ve", "sigma_min": "a", "sigma_max": 1}},
        {"time": []},
        {"input": "squared"},
        {"scales": "yes"},
        {"of": "mlp"},
        {"of": {"name": "reexpressed"}},
        {"more": 1},
    ],
    ids=str,
)
def test_a_config_that_is_none_is_an_error_of_ours(changes):
    config = rp.reexpress(model(rp.Cosine(), "v", MLP(DIM, hidden=8)), "eps").net.config
    network(config)
    with pytest.raises(ReparamError):
        network({**config, **changes})


# ------------------------------------------------------------------------------------------- files


SCRIPT = """
import sys, torch, reparam as rp
torch.set_num_threads(1)
x = torch.linspace(-2, 2, 20).reshape(5, 4)
torch.save(rp.load(sys.argv[1])(x, torch.linspace(0.1, 0.9, 5).double()).mean.detach(), sys.argv[2])
assert "reparam.studies" not in sys.modules
"""


def test_a_file_loads_alone_in_a_clean_process(tmp_path):
    torch.manual_seed(1)
    before = model(rp.VE(0.02, 50), {"name": "edm", "sigma_data": 0.7}, MLP(DIM, hidden=16), input="edm")
    after = rp.reexpress(before, InBasis(torch.eye(DIM)[:, :2], "eps", {"name": "k", "k": 0.3}))
    rp.save(after, tmp_path / "model.safetensors")
    out = tmp_path / "out.pt"
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "model.safetensors"), str(out)], check=True)
    x, t = torch.linspace(-2, 2, 20).reshape(5, 4), torch.linspace(0.1, 0.9, 5).double()
    torch.testing.assert_close(torch.load(out, weights_only=True), after(x, t).mean, rtol=1e-6, atol=1e-6)
    again = rp.load(tmp_path / "model.safetensors")
    assert again.conventions == after.conventions
    assert rp.reexpress(again, before.target).conventions == before.conventions
    assert config_of(again.net) == config_of(after.net)


def saved(folder, target="x0", **more):
    torch.manual_seed(2)
    before = rp.Denoiser(MLP(DIM, hidden=16), "rectified_flow", target, t_range=(0.02, 0.98), **more)
    rp.save(before, folder / "first.safetensors")
    return before


def test_the_command(tmp_path, capsys):
    before = saved(tmp_path)
    out = tmp_path / "new" / "second.safetensors"
    asked = ["convert", str(tmp_path / "first.safetensors"), "--out", str(out), "--to", "{name: k, k: 0.3}", "--json"]
    assert main(asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["source"] == {"name": "x0"}
    assert told["to"] == {"name": "k", "k": 0.3, "learned": False}
    after = rp.load(out)
    # κ of x0 → k, by hand: a = -(1 - k)/σ and b = k + (1 - k) α/σ, against |k| + |1 - k| = 1; and from k to x0 σ/|Δ|.
    alpha, sigma = 1 - told["at"], told["at"]
    kappa, back = 0.7 / sigma * (alpha + sigma) + 0.3 + 0.7 * alpha / sigma, sigma / abs(-0.7 * alpha - 0.3 * sigma)
    assert told["condition"] == pytest.approx(kappa * back)
    assert difference(before, after, torch.linspace(0.02, 0.98, 9).double()) < 1
    before_it = out.read_bytes()
    assert main([*asked[:-1], "--json"]) == 2
    assert "exists; nothing was touched" in capsys.readouterr().err
    assert out.read_bytes() == before_it
    assert main(["convert", str(out), "--to", "sample", "--out", str(tmp_path / "folder")]) == 0
    assert "now the clean data x0" in capsys.readouterr().out
    back = tmp_path / "folder" / "model.safetensors"
    first, again = (read_tensors(path)[0] for path in (tmp_path / "first.safetensors", back))
    assert all(torch.equal(first[name], again[name]) for name in {*first, *again})
    assert main(["show", str(back)]) == 0


def test_the_command_refuses(tmp_path, capsys):
    saved(tmp_path)
    first = str(tmp_path / "first.safetensors")

    def fails(*more):
        assert main(["convert", first, *more]) == 2
        told = capsys.readouterr().err
        assert "Traceback" not in told
        return told

    assert "choose another place" in fails("--to", "v", "--out", first)
    assert "needs a target" in fails("--out", str(tmp_path / "b"))
    assert "Did you mean" in fails("--to", "velocty", "--out", str(tmp_path / "b"))
    assert "unknown format 'onnx'" in fails("--to", "v", "--format", "onnx", "--out", str(tmp_path / "b"))
    told = fails("--to", "eps", "--t-range", "0.02", "1", "--out", str(tmp_path / "b"))
    assert "t = 1 " in told
    assert "--t-range" in told
    assert "there is no part of it where that works" in fails("--to", "p=alpha,q=sigma", "--out", str(tmp_path / "b"))
    told = fails("--to", "p=sigma,q=alpha", "--out", str(tmp_path / "b"))
    assert "t = 0.5 " in told
    assert "[0.02, 0.4904]" in told or "[0.5096, 0.98]" in told
    assert "a mapping has the name of a target" in fails("--to", "{target: v}", "--out", str(tmp_path / "b"))
    assert "ends in .safetensors" in fails("--to", "v", "--out", str(tmp_path / "b.ckpt"))
    name = str(tmp_path / "b.safetensors")
    assert "is a folder" in fails("--to", "v", "--format", "diffusers", "--out", name)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    assert "is the folder of a run" in fails("--to", "v", "--out", str(tmp_path / "run"))
    assert convert_model(first, "v", tmp_path / "run" / "other.safetensors") is not None  # a recipe of the reader's own
    for file in (tmp_path / "run").glob("other.*"):
        file.unlink()
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert "is the folder of a run" in fails("--to", "v", "--out", str(tmp_path / "run" / "other.safetensors"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first.safetensors", "first.spec.json", "run"]
    (tmp_path / "a file").touch()
    with pytest.raises(OutputError, match="choose another place|Choose another place"):
        convert_model(first, "v", tmp_path / "a file" / "below")


def test_the_worst_rounding_is_where_the_condition_is():
    """ε = x_t + (1 − t) velocity: κ = 1 + 2 (1 − t); and from ε to x0 an error grows by t/(1 − t)."""
    made = rp.reexpress(model(rp.RectifiedFlow(), "velocity"), "eps")
    assert worst_condition(made) == pytest.approx(((1 + 2 * 0.02) * 0.98 / 0.02, 0.98))
    assert worst_condition(model(rp.RectifiedFlow(), "velocity"))[0] == 1


def test_a_spec_of_the_users_own_is_converted_from(tmp_path, capsys):
    """A file that says x0 and predicts v: the user's word is what is converted, and stays in the record."""
    saved(tmp_path)
    out = tmp_path / "second.safetensors"
    asked = ["convert", str(tmp_path / "first.safetensors"), "--spec", "{target: v}", "--to", "eps", "--out", str(out)]
    assert main(asked) == 0
    assert "it predicted v = alpha*eps - sigma*x0" in capsys.readouterr().out
    record = rp.load(out).training_record[ORIGIN]
    assert record["target"] == {"name": "v"}
    assert record["overrides"]["target"]["file"] == {"name": "x0"}
    assert main(["show", str(out)]) == 0
    told = capsys.readouterr().out
    assert "converted from" in told
    assert "None" not in told
    assert rp.reexpress(rp.load(out), "v").overrides == record["overrides"]


def test_what_a_user_said_stays_said_through_a_conversion(tmp_path):
    saved(tmp_path)
    word = {"target": "v", "time": "1-t", "t_range": [0.1, 0.9]}
    told = rp.load(tmp_path / "first.safetensors", spec=word)
    made = rp.reexpress(told, "eps")
    assert made.overrides.keys() == {"time", "t_range"}  # that of the target is the first network's
    assert made.overrides["t_range"] == {"file": [0.02, 0.98], "given": [0.1, 0.9]}
    rp.save(made, tmp_path / "second.safetensors")
    again = rp.load(tmp_path / "second.safetensors")
    assert again.overrides == made.overrides
    words = [f"{key} {value}" for key, value in rp.Spec.of(again).in_words()]
    assert sum(w.startswith("said otherwise") for w in words) == 3
    assert any(w.startswith("said otherwise target: {'name': 'v'}; by the file {'name': 'x0'}") for w in words)
    assert rp.reexpress(again, "v").overrides == told.overrides


def test_for_diffusers(tmp_path, capsys):
    """A network that predicts what it is to be written as; a map around one is nothing that diffusers loads."""
    diffusers = pytest.importorskip("diffusers")
    net = network({"name": "unet", "image": 8, "channels": 1, "widths": [32, 32]})
    first = rp.Denoiser(net, "ddpm", "eps", time="step", data={"shape": [1, 8, 8]})
    rp.save(first, tmp_path / "first.safetensors")
    rp.save(rp.reexpress(first, "v"), tmp_path / "second.safetensors")
    asked = [
        "convert",
        str(tmp_path / "second.safetensors"),
        "--format",
        "diffusers",
        "--out",
        str(tmp_path / "folder"),
    ]
    assert main(asked) == 2
    assert "Write it as what it predicts (--to eps)" in capsys.readouterr().err
    assert main([*asked, "--to", "eps"]) == 0
    model = diffusers.UNet2DModel.from_pretrained(tmp_path / "folder", subfolder="unet")
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(x, 10).sample, net(x, torch.tensor([10, 10])))


# ------------------------------------------------------------------------------------------- fine-tuning


RECIPE = {
    "name": "base",
    "data": {"name": "spiral", "dim": DIM, "size": 500},
    "network": {"name": "mlp", "hidden": 32, "layers": 3},
    "target": "x0",
    "t_range": [0.02, 0.98],
    "times": {"name": "uniform"},
    "train": {"steps": 150, "lr": 0.01, "batch": 64, "warmup": 2, "precision": "float32", "validations": 1, "ema": 0.9},
    "sample": {"n": 64, "steps": 4},
}
OPTIONS = {"device": "cpu", "tracker": None}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    out = tmp_path_factory.mktemp("runs") / "base"
    rp.train(RECIPE, out=out, say=lambda text: None, **OPTIONS)
    return out


def without(*keys, **changes):
    recipe = {key: value for key, value in copy.deepcopy(RECIPE).items() if key not in keys}
    return {**recipe, **changes}


def begun(base, recipe, settings=(), run=None):
    """The run that training would begin with --init."""
    start, raw = Initial.of(base).into(recipe, list(settings))
    runs = load_recipe(raw, list(settings)).runs
    return start.begun(runs[run] if run else next(iter(runs.values())))


@pytest.mark.parametrize("target", ["v", "eps", "velocity", "x0", {"name": "k", "k": 0.5}])
def test_step_0_has_the_error_of_the_source(base, target):
    """And an untrained network has not, which is what not being told would give."""
    config = begun(base, without("network", target=target))
    data = load_data(config.data)
    trainer = trainer_of(config, data, make_network(config, data))
    source = rp.load(base / "model.safetensors")
    want, found = trainer.validation.errors(source), trainer.validation.errors(trainer.denoiser)
    assert found == pytest.approx(want, rel=1e-3)
    assert sum(want) < 0.7 * sum(trainer.validation.errors(rp.Denoiser(MLP(DIM, 32, 3), "rectified_flow", "x0")))
    assert trainer.denoiser.target == rp.target(target)
    assert all(p.requires_grad for p in trainer.trainee.net.parameters())


def test_the_gradient_is_that_of_the_source_with_its_loss_in_the_new_space(base):
    """The affine map is fixed: what learns is the old prediction, weighed as the new target weighs it."""
    old = rp.load(base / "model.safetensors")
    new = rp.reexpress(old, "v")
    x0 = torch.randn(16, DIM, generator=torch.Generator().manual_seed(0))
    t, eps = torch.linspace(0.1, 0.9, 16).double(), torch.randn(16, DIM, generator=torch.Generator().manual_seed(1))
    first = rp.Objective("rectified_flow", "x0", loss_space="v", t_range=(0.02, 0.98))(old.net, x0, t, eps).mean()
    wanted = torch.autograd.grad(first, list(old.net.parameters()))
    second = rp.Objective("rectified_flow", "v", t_range=(0.02, 0.98))(new.net, x0, t, eps).mean()
    found = torch.autograd.grad(second, list(old.net.parameters()))
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-6)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """Without a recipe: the run's own, for another target; and what was said."""
    out, said = tmp_path_factory.mktemp("runs") / "tuned", []
    settings = ["target=v", "train.steps=20"]
    rp.train(init=base, out=out, settings=settings, say=said.append, **OPTIONS)
    return out, "\n".join(said)


def test_a_run_continued_as_another_target(base, tuned):
    out, said = tuned
    assert f"beginning with the network of {base / 'model.safetensors'}, which predicts x0, stated exactly as v" in said
    spec = read_spec(out / "model.safetensors")
    assert spec.target == {"name": "v"}
    assert spec.network["of"] == read_spec(base / "model.safetensors").network
    assert "weights" not in spec.network
    row = json.loads((out / "result.json").read_text())
    assert row["status"] == "finished"
    assert row["network"].endswith(", from x0 to v")
    first, last = (read_tensors(where / "model.safetensors")[0] for where in (base, out))
    assert {f"of.{name}" for name in first} == set(last)
    assert any(not torch.equal(first[name], last[f"of.{name}"]) for name in first)  # it learned
    assert main(["sample", str(out), "--n", "4"]) == 0


def test_begun_with_what_was_begun_so(base, tuned):
    """A network re-expressed before is not wrapped twice; a recipe.yaml stands alone."""
    out, _ = tuned
    again = begun(out, without("network", target="eps"))
    assert again.network["of"]["name"] == "mlp"
    assert (again.network["source"], again.network["to"]) == ({"name": "x0"}, {"name": "eps"})
    data = load_data(again.data)
    trainer = trainer_of(again, data, make_network(again, data))
    want = trainer.validation.errors(rp.load(out / "model.safetensors"))
    assert trainer.validation.errors(trainer.denoiser) == pytest.approx(want, rel=1e-3)
    (config,) = load_recipe(out / "recipe.yaml").runs.values()
    alone = make_network(config, data)
    first = read_tensors(base / "model.safetensors")[0]
    assert all(torch.equal(value, first[name.removeprefix("of.")]) for name, value in alone.state_dict().items())


def test_it_is_continued_to_the_bit(base, tmp_path):
    for out, steps in (("once", [8]), ("twice", [4, 8])):
        for n in steps:
            settings = ["target=v", "train.decay=constant", "train.warmup=0", f"train.steps={n}"]
            rp.train(init=base, out=tmp_path / out, settings=settings, say=lambda text: None, **OPTIONS)
    once, twice = (read_tensors(tmp_path / out / "model.safetensors")[0] for out in ("once", "twice"))
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert len(list((tmp_path / "twice" / "checkpoints").glob("step-*"))) == 2


def test_the_command_line_begins_with_a_run(base, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(without("network", target=["x0", "eps"])))
    asked = ["train", str(recipe), "--init", str(base), "--target", "{name: k, k: 0.3}", "--set", "train.steps=2"]
    assert main([*asked, "--out", str(tmp_path / "out"), "--tracker", "none", "--device", "cpu"]) == 0
    assert "stated exactly as k" in capsys.readouterr().out
    assert read_spec(tmp_path / "out" / "model.safetensors").target["k"] == 0.3


def test_what_is_left_out_is_taken_and_what_is_said_must_be_so(base):
    ve = rp.VE(0.02, 50)
    torch.manual_seed(0)
    edm = rp.Denoiser(
        MLP(DIM, hidden=16), ve, {"name": "edm", "sigma_data": 0.5}, time="log_sigma/4", input="edm", t_range=(0.1, 1)
    )
    rp.save(edm, base.parent / "edm.safetensors")
    config = begun(base.parent / "edm.safetensors", without("network", "t_range", target="eps"))
    assert config.schedule == ve.config()
    assert (config.time, config.input, config.t_range) == ("log_sigma/4", "none", [0.1, 1.0])
    assert config.network["scales"]
    same = begun(base, without(target="v"))
    assert same.network["of"]["hidden"] == 32


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"schedule": "cosine"}, Conflict, "trained with schedule .*rectified_flow.*leave that out"),
        ({"time": "1000t"}, Conflict, "trained with time t, and this training says 1000t"),
        ({"input": "unit_variance"}, Conflict, "trained with input none"),
        ({"network": {"name": "mlp", "hidden": 64}}, Conflict, "hidden 32, and this recipe says network.hidden: 64"),
        ({"network": "jit"}, Conflict, "has name 'mlp'"),
        ({"target": {"name": "gaussian", "target": "v"}}, Conflict, "trained with likelihood None"),
        ({"target": "eps", "t_range": [0, 0.98]}, SingularTime, r"--init .*t = 0 .*\[0.00098, 0.98\]"),
    ],
)
def test_a_mismatch_is_refused(base, changes, error, says):
    with pytest.raises(error, match=says):
        begun(base, without(**changes))


def test_more_that_cannot_begin(base, tmp_path, capsys):
    def fails(*more):
        assert main(["train", *map(str, more), "--out", str(tmp_path / "none"), "--tracker", "none"]) == 2
        told = capsys.readouterr().err
        assert "Traceback" not in told
        return told

    assert "expected the folder of a finished run" in fails("--init", tmp_path / "nothing")
    assert "give one of the two" in fails("--init", base, "--add-confidence", base)
    assert "trained on samples of shape [4]" in fails("--init", base, "--set", "data.dim=6")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((base / "model.safetensors").read_bytes())
    assert "no recipe.yaml beside it" in fails("--init", alone)
    with pytest.raises(Conflict, match="leave the network out"):
        rp.train(init=base, network=MLP(DIM), out=tmp_path / "none")
    folder = tmp_path / "half"
    folder.mkdir()
    for name in ("model.safetensors", "recipe.yaml"):
        (folder / name).write_bytes((base / name).read_bytes())
    with pytest.raises(DataError, match="this run is unfinished"):
        Initial.of(folder)
    assert Initial.of(folder / "model.safetensors").network["name"] == "mlp"
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "network": {"name": "Mine"}}))
    with pytest.raises(NetworkError, match="given as an object"):
        Initial.of(folder / "model.safetensors")


def test_other_data_of_the_same_shape_are_taken_and_said(base):
    start = Initial.of(base)
    assert start.check_data(load_data({**RECIPE["data"], "size": 300})) == []
    scaled = from_array((5 * torch.randn(300, DIM, generator=torch.Generator().manual_seed(0))).numpy())
    assert "was trained on data normalised by {'mean': 0.0, 'std': 1.0}" in start.check_data(scaled)[0]


def test_a_network_of_the_users_own_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_to_go_on.py").write_text(
        "from torch import nn\nfrom reparam.networks import MLP\n\n\nclass Mine(MLP):\n    pass\n\n\n"
        "def make(hidden):\n    return Mine(4, hidden)\n"
    )
    small = without(network={"name": "nets_to_go_on:make", "hidden": 8})
    small["train"] = {**small["train"], "steps": 3}
    rp.train(small, out="first", say=lambda text: None, **OPTIONS)
    rp.train(init="first", out="second", settings=["target=v"], say=lambda text: None, **OPTIONS)
    assert main(["sample", "second", "--n", "2"]) == 0
    with pytest.raises(NetworkError, match="give it as net="):
        rp.load("second/model.safetensors")
    assert main(["convert", "second", "--to", "x0", "--out", "third.safetensors"]) == 0
