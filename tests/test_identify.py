"""reparam identify: small networks are named from what they answer, and those that know nothing are not."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import reparam as rp
from oracles import MixtureOracle
from reparam.cli import main
from reparam.errors import DataError, NetworkError, Unsupported
from reparam.targets import EDM, Negated
from reparam.tools.hypotheses import LEVELS, Probe, hypotheses, schedules_tried, targets_tried

_FILE = Path(__file__).parents[1] / "benchmarks" / "identify.py"
_SPEC = importlib.util.spec_from_file_location("benchmark_identify", _FILE)
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)

pytestmark = pytest.mark.usefixtures("one_thread")
FLOW, COSINE, VE = {"name": "rectified_flow"}, {"name": "cosine"}, {"name": "ve"}
LINEAR, SCALED = {"name": "ddpm"}, {"name": "ddpm", "betas": "scaled_linear"}
F = {"name": "edm", "sigma_data": 0.5}


def case(target, sign, schedule, time, scaling="none", data="8", trained=True, seed=1):
    target = {"name": target} if isinstance(target, str) else target
    return benchmark.Case(data, target, sign, schedule, time, scaling, trained, seed)


#: Target, sign, schedule, time, input.
CASES = [
    ("x0", 1, FLOW, "t", "none"),
    ("x0", -1, COSINE, "log_snr", "none"),
    ("eps", 1, LINEAR, "step", "none"),
    ("eps", -1, FLOW, "t", "none"),
    ("v", 1, SCALED, "step", "none"),
    ("v", -1, COSINE, "1000t", "none"),
    ("velocity", 1, FLOW, "1000t", "none"),
    ("velocity", -1, FLOW, "1-t", "none"),
    (F, 1, VE, "log_sigma/4", "edm"),
    (F, -1, FLOW, "t", "edm"),
]


@pytest.mark.parametrize("made", CASES, ids=lambda c: f"{c[0]}{c[1]}")
def test_what_a_small_network_was_trained_for_is_named_on_held_out_data(made):
    asked = case(*made)
    x, heldout = benchmark.samples(asked)
    found = rp.identify(benchmark.trained(asked, x, 400), heldout)
    assert benchmark.outcome(asked, found) == "named"
    assert found.margin > 1.3
    assert found.error < 0.6
    assert asked.time in found.times
    assert asked.input in found.inputs
    assert benchmark.among(asked, found)


@pytest.mark.parametrize(("data", "seed"), [("2", 0), ("8", 1), ("8", 2), ("digits", 0)])
def test_an_untrained_network_is_not_named(data, seed):
    asked = case("x0", 1, FLOW, ["t", "1000t", "log_snr"][seed], data=data, trained=False, seed=seed)
    x, heldout = benchmark.samples(asked)
    found = rp.identify(benchmark.trained(asked, x, 0), heldout)
    assert found.verdict == "undecided"
    assert found.target is None
    assert "shows no knowledge of these data" in found.reason


class AtTime(nn.Module):
    """An ideal network that is given its time in its own way."""

    def __init__(self, oracle, back):
        super().__init__()
        self.oracle, self.back = oracle, back

    def forward(self, x, time):
        return self.oracle(x.double(), self.back(time.double())).to(x.dtype)


def ideal(schedule, target, back=lambda time: time):
    """The exact network for four blurred points in ten dimensions, each coordinate 1 or -1; and samples of them."""
    g = torch.Generator().manual_seed(0)
    means = torch.randint(2, (4, 10), generator=g).double() * 2 - 1
    covs = 0.01 * torch.eye(10, dtype=torch.float64).expand(4, 10, 10)
    x = means[torch.randint(4, (200,), generator=g)] + 0.1 * torch.randn(200, 10, generator=g, dtype=torch.float64)
    return AtTime(MixtureOracle(torch.ones(4), means, covs, schedule, target), back), x.float()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["x0", "eps", "v", "velocity", "score"])
def test_the_error_is_that_of_the_ideal_network(name, sign):
    """Of the true reading it is E|x0 − E[x0|x_t]|², which the mixture's own posterior says."""
    process, kind = rp.Cosine(), rp.target(name)
    net, x = ideal(process, kind if sign > 0 else Negated(kind))
    probe = Probe(net, x, torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    tried = [h for h in hypotheses([process], [kind]) if h.sign == sign and h.call.time == "t"]
    assert len(tried) == 1
    for level, found in zip(LEVELS, probe.errors(tried)[0].tolist(), strict=True):
        t = float(probe.time_of(level, process))
        x_t = float(process.alpha(t)) * x.double() + float(process.sigma(t)) * probe.eps.double()
        exact = (net.oracle.posterior_mean(x_t, t) - x.double()).square().mean()
        variance = x.double().var(0, correction=0).mean()
        assert found == pytest.approx(float(exact / (variance / (1 + math.exp(level)))), rel=1e-4)
        assert float(process.log_snr(t) + variance.log()) == pytest.approx(level)


def test_edm_on_the_cosine_with_unit_data_is_minus_v_and_both_are_said():
    net, x = ideal(rp.Cosine(), EDM(1.0))
    found = rp.identify(net, x)
    assert found.verdict == "edm"
    assert "-v" in found.equivalent
    net, x = ideal(rp.Cosine(), rp.target("v"))
    found = rp.identify(net, x)
    assert (found.verdict, found.sign, found.target) == ("v", 1, {"name": "v"})
    assert "-edm(sigma_data=1)" in found.equivalent
    assert found.margin > 1.3


def test_the_negative_is_named_as_a_target_that_loads():
    net, x = ideal(rp.RectifiedFlow(), Negated("velocity"))
    found = rp.identify(net, x)
    assert found.verdict == "-velocity"
    assert rp.target(found.target) == Negated("velocity")
    assert rp.schedule(found.schedule) == rp.RectifiedFlow()
    denoiser = rp.Denoiser(net, found.schedule, found.target, time=found.time, input=found.input)
    assert float((denoiser(0.7 * x, 0.3).mean - x).square().mean()) < 0.05


def test_a_network_that_hears_no_time_leaves_time_open_but_not_the_target():
    net, x = ideal(rp.Cosine(), rp.target("x0"))
    blind = AtTime(net.oracle, lambda time: torch.full_like(time, 0.3))
    found = rp.identify(blind, x)
    assert found.verdict == "x0"
    assert {"t", "1-t", "1000t", "log_snr"} <= set(found.times)
    assert any("hardly responds to its time" in s for s in found.symptoms)


def test_schedules_that_differ_only_in_their_times_are_reported_together():
    net, x = ideal(rp.Cosine(), rp.target("x0"), lambda time: rp.Cosine().time_at(time))
    found = rp.identify(net, x)  # asked by log-SNR, all that preserve variance are one
    assert found.verdict == "x0"
    assert found.time == "log_snr"
    assert {"cosine", "ddpm", "ddpm(betas=scaled_linear)"} <= set(found.schedules)


def test_a_time_embedding_made_for_a_thousand_is_seen():
    class Trained(AtTime):
        def forward(self, x, time):
            wave = (time[:, None].double() / 1e4).cos()
            return (super().forward(x, torch.full_like(time, 0.3)).double() * wave).to(x.dtype)

    net, x = ideal(rp.Cosine(), rp.target("x0"))
    found = rp.identify(Trained(net.oracle, lambda time: time), x, schedule_="cosine")
    assert found.verdict == "x0"
    assert any("hardly responds" in s for s in found.symptoms)


def test_what_the_weights_claim_is_held_against_what_was_found():
    net, x = ideal(rp.RectifiedFlow(), rp.target("velocity"), lambda time: time / 1000)
    truly = rp.Denoiser(net, "rectified_flow", "velocity", time="1000t")
    assert not [s for s in rp.identify(truly, x).symptoms if "weights say" in s]
    wrongly = rp.Denoiser(net, "rectified_flow", "v", time="t")
    symptoms = rp.identify(wrongly, x).symptoms
    assert "the weights say that they predict v; they behave as velocity." in symptoms
    assert "the weights say time t; they behave as 1000t." in symptoms
    assert "that is a time scaled wrongly by 1000." in symptoms
    assert not [s for s in rp.identify(wrongly, x, use_spec=False).symptoms if "weights say" in s]


def test_data_in_other_units_are_seen():
    net, x = ideal(rp.Cosine(), rp.target("v"))
    squeezed = (x.clamp(-1.5, 1.5) / 1.5 + 1) / 2

    class InUnits(nn.Module):
        """Made for the square in [-1.5, 1.5], asked at data in [-1, 1]."""

        def forward(self, x, time):
            scale = 1 / 1.5
            t = time.double()
            alpha, sigma = rp.Cosine().alpha(t), rp.Cosine().sigma(t)
            s = rp.Cosine().time_at(2 * (alpha / (sigma / scale)).log())
            x0 = scale * torch.cat([net.oracle.posterior_mean(x[i : i + 1].double() / alpha[i] / scale
                * rp.Cosine().alpha(s[i]), float(s[i])) for i in range(len(x))])  # fmt: skip
            eps = (x.double() - alpha[:, None] * x0) / sigma[:, None]
            return (alpha[:, None] * eps - sigma[:, None] * x0).float()

    found = rp.identify(InUnits(), squeezed, schedule_="cosine", n=48)
    assert any("in [-1, 1] instead of [0, 1]" in s for s in found.symptoms)


@pytest.mark.parametrize("zero", [True, False])
def test_zero_terminal_snr_is_told_from_how_the_network_hears_its_steps(zero):
    process = rp.DDPM("scaled_linear", zero_terminal_snr=zero)
    net, x = ideal(process, rp.target("v"), lambda step: (step + 1) / 1000)
    found = rp.identify(net, x)
    assert found.verdict == "v"
    assert rp.schedule(found.schedule).zero_terminal_snr is zero or len(found.schedules) > 1
    assert str(process.config().get("betas")) in str(found.schedules)


def test_channels_of_a_variance_are_left_out_and_said():
    net, x = ideal(rp.Cosine(), rp.target("eps"))

    class Wide(nn.Module):
        def forward(self, x, time):
            return torch.cat([net(x, time), torch.ones_like(x)], 1)

    found = rp.identify(Wide(), x)
    assert found.verdict == "eps"
    assert "10 more channels" in found.symptoms[0]


def test_a_network_of_whole_steps_only_is_asked_at_whole_steps():
    net, x = ideal(rp.DDPM(), rp.target("eps"), lambda step: (step + 1) / 1000)

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(1000, 1)

        def forward(self, x, time):
            self.table(time)  # refuses what is no whole number
            return net(x, time)

    found = rp.identify(Steps(), x)
    assert (found.verdict, found.times) == ("eps", ["step"])
    assert any("could not be asked with time" in s for s in found.symptoms)


def test_hypotheses_are_distinct_and_complete():
    tried = hypotheses(schedules_tried(), targets_tried(0.7))
    assert len(set(tried)) == len(tried)
    assert {h.label for h in tried} == {
        sign + name
        for sign in ("", "-")
        for name in (
            "x0", "eps", "v", "velocity", "score",
            "edm(sigma_data=0.7)", "edm(sigma_data=1)", "edm(sigma_data=0.5)",
        )
    }  # fmt: skip


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        (lambda: rp.identify(nn.Linear(2, 2), torch.randn(20, 2)), NetworkError, "could not be asked in any way"),
        (lambda: rp.identify(nn.Linear(2, 2)), DataError, "give some"),
        (lambda: rp.identify(nn.Linear(2, 2), torch.randn(20)), DataError, "expected finite samples"),
        (lambda: rp.identify(nn.Linear(2, 2), torch.full((20, 2), torch.nan)), DataError, "expected finite samples"),
        (
            lambda: rp.identify(
                nn.Linear(2, 2), torch.randn(20, 2), schedule_={"name": "ve", "sigma_max": 0.1, "sigma_min": 0.01}
            ),
            Unsupported,
            "log-SNR from 3 to 0",
        ),
    ],
)
def test_what_cannot_be_asked_is_an_error_that_says_so(what, error, words):
    with pytest.raises(error, match=words):
        what()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small trained network of ours and held-out data, in files."""
    folder = tmp_path_factory.mktemp("identify")
    torch.manual_seed(0)
    x, heldout = benchmark.mixture(8, 1)
    net = rp.networks.MLP(8, hidden=128, layers=4, activation="silu")
    objective = rp.Objective("cosine", "v")
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(400):
        loss = objective(net, x[torch.randint(len(x), (256,))]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    rp.save(objective.denoiser(net), folder / "model.safetensors")
    torch.save(heldout, folder / "never-read.pt")
    import numpy as np

    np.save(folder / "heldout.npy", heldout.numpy())
    from safetensors.torch import save_file

    save_file(net.state_dict(), folder / "bare.safetensors")
    return folder


def test_command_line_names_a_file_with_and_without_its_spec(saved, capsys):
    data = f"{{name: array, path: {saved / 'heldout.npy'}, normalise: none}}"
    assert main(["identify", str(saved / "model.safetensors"), "--data", data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "v"
    assert found["margin"] > 1.3
    assert found["scores"][0]["error"] == found["error"]
    network = "{name: mlp, dim: 8, hidden: 128, layers: 4, activation: silu}"
    bare = ["identify", str(saved / "bare.safetensors"), "--data", data]
    assert main([*bare, "--network", network]) == 0
    assert capsys.readouterr().out.startswith("v: read as v, the network has an x0-error of ")
    assert main(bare) == 2
    assert "--network" in capsys.readouterr().err


def test_command_line_says_undecided_with_exit_code_1(saved, capsys, tmp_path, monkeypatch):
    (tmp_path / "mine_untrained.py").write_text(
        "from reparam.networks import MLP\n\n\ndef make():\n    return MLP(8, layers=3)\n"
    )
    monkeypatch.chdir(tmp_path)
    data = f"{{name: array, path: {saved / 'heldout.npy'}, normalise: none}}"
    assert main(["identify", "mine_untrained:make", "--data", data]) == 1
    told = capsys.readouterr()
    assert told.out.startswith("undecided: ")
    assert "running your code: network mine_untrained:make" in told.err


@pytest.mark.slow
def test_random_trainings_are_never_named_wrongly():
    rows = [benchmark.run(seed, 500) for seed in range(1000, 1020)]
    assert not [benchmark.line(row) for row in rows if row["outcome"] == "wrong"]
    learned = [row for row in rows if row["trained"]]
    assert sum(row["outcome"] == "named" for row in learned) > len(learned) / 2
