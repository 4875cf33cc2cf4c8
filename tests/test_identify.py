"""reparam identify: small networks are named from what they answer, and those that know nothing are not."""

import importlib.util
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import reparam as rp
from oracles import MixtureOracle
from reparam.cli import main
from reparam.denoiser import INPUT_CONVENTIONS, TIME_CONVENTIONS
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


def _words(made):
    target, schedule, time, _ = made
    return (target if isinstance(target, str) else target["name"], schedule["name"], time)


#: Target, schedule, time, input: every target on a path that preserves variance and on a straight one, in three times,
#: and further conventions.
GRID = [
    (target, schedule, time, "edm" if target is F else "none")
    for target in ("x0", "eps", "v", "velocity", F)
    for schedule in (COSINE, FLOW)
    for time in ("t", "1-t", "1000t")
    if (target, schedule) != ("v", FLOW)  # below
] + [
    ("eps", LINEAR, "step", "none"),
    ("v", SCALED, "step", "none"),
    ("x0", COSINE, "log_snr", "none"),
    (F, VE, "log_sigma/4", "edm"),
]
#: The time embedding of the last of those trained is made for times up to 1000, and is given times up to 1.
SPANS = [benchmark.SPANS[time] for _, _, time, _ in GRID] + [1000.0]
TRAINED = [*GRID, ("eps", COSINE, "t", "none")]


def points(n, seed, count=4, blur=0.1):
    """A few blurred points in ten dimensions."""
    means = torch.randint(2, (count, 10), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    g = torch.Generator().manual_seed(seed)
    return means[torch.randint(count, (n,), generator=g)] + blur * torch.randn(n, 10, generator=g)


def lesson(made, span, x0, eps, t):
    """What a network is given, and what it is to answer: both [n, …]."""
    target, process, time, scaling = rp.target(made[0]), rp.schedule(made[1]), *made[2:]
    scale = INPUT_CONVENTIONS[scaling]
    x = process.add_noise(x0, eps, t) * (1 if scale is None else scale(t, process, target)[:, None])
    u = TIME_CONVENTIONS[time](t, process)[:, None] / span
    waves = u * torch.arange(1.0, 5.0)
    return torch.cat([x, u, waves.sin(), waves.cos()], 1).float(), target.encode(x0, eps, t, process).float()


@pytest.fixture(scope="module")
def grid(one_thread):
    """A small network for each of TRAINED, all trained at once: their weights are [networks, …]."""
    steps, batch, hidden, count = 300, 128, 64, len(TRAINED)
    g = torch.Generator().manual_seed(1)
    t = torch.randint(5, 981, (steps * batch,), generator=g).double() / 1000
    x0, eps = points(steps * batch, 2).double(), torch.randn(steps * batch, 10, generator=g, dtype=torch.float64)
    lessons = [lesson(made, span, x0, eps, t) for made, span in zip(TRAINED, SPANS, strict=True)]
    asked, wanted = (torch.stack(part).unflatten(1, (steps, batch)) for part in zip(*lessons, strict=True))
    widths = [asked.shape[-1], hidden, hidden, hidden, 10]
    weights = [
        ((2 * torch.rand(count, rows, columns, generator=g) - 1) / math.sqrt(a)).requires_grad_()
        for a, b in itertools.pairwise(widths)
        for rows, columns in ((a, b), (1, b))
    ]
    optimiser = torch.optim.AdamW(weights, 4e-3)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        y = asked[:, step]
        for i in range(0, 8, 2):
            y = torch.baddbmm(weights[i + 1], nn.functional.silu(y) if i else y, weights[i])
        loss = (y - wanted[:, step]).square().mean((1, 2)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        slower.step()
    return [alone(weights, i, hidden) for i in range(count)]


def alone(weights, i, hidden):
    """One of the networks by itself."""
    net = benchmark.Small(10, SPANS[i], hidden)
    with torch.no_grad():
        for own, trained in zip(net.parameters(), weights, strict=True):
            own.copy_(trained[i].T.reshape(own.shape))
    return net


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("i", range(len(GRID)), ids=lambda i: "-".join(_words(GRID[i])))
def test_what_a_small_network_was_trained_for_is_named_on_held_out_data(grid, i, sign):
    target, schedule, time, scaling = GRID[i]
    asked = case(target, sign, schedule, time, scaling)
    found = rp.identify(grid[i] if sign > 0 else benchmark.Opposite(grid[i]), points(256, 3))
    assert benchmark.outcome(asked, found) == "named"
    assert found.margin > 1.3
    assert found.error < 0.6
    assert time in found.times
    assert scaling in found.inputs
    assert benchmark.among(asked, found)


@pytest.mark.parametrize("time", ["t", "1-t", "1000t"])
def test_v_on_a_straight_path_is_named_where_x0_is_nearly_certain(time):
    """There it is the negative of EDM's F for unit data but for a factor of 1 to 1.41: better networks tell."""
    asked = case("v", 1, FLOW, time)
    net = benchmark.trained(asked, points(20_000, 2, count=2, blur=0.03), 600)
    heldout = points(256, 3, count=2, blur=0.03)
    for sign, made in ((1, net), (-1, benchmark.Opposite(net))):
        found = rp.identify(made, heldout)
        assert benchmark.outcome(asked._replace(sign=sign), found) == "named"
        assert found.margin > 1.3
        assert time in found.times
        assert benchmark.among(asked, found)


@pytest.mark.parametrize(("data", "seed"), [("2", 0), ("8", 1), ("8", 2), ("digits", 0)])
def test_an_untrained_network_is_not_named(data, seed):
    asked = case("x0", 1, FLOW, ["t", "1000t", "log_snr"][seed], data=data, trained=False, seed=seed)
    x, heldout = benchmark.samples(asked)
    found = rp.identify(benchmark.trained(asked, x, 0), heldout)
    assert found.verdict == "undecided"
    assert found.target is None
    assert "shows no knowledge of these data" in found.reason
    assert "\nschedule  " not in found.text()


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


def test_a_time_embedding_made_for_a_thousand_is_seen(grid):
    found = rp.identify(grid[-1], points(256, 3))
    assert found.verdict == "eps"
    assert any("its time embedding is made for times up to 1000" in s for s in found.symptoms)
    found = rp.identify(grid[GRID.index(("eps", COSINE, "t", "none"))], points(256, 3))
    assert found.verdict == "eps"
    assert not [s for s in found.symptoms if "hardly responds" in s]


@pytest.mark.parametrize("claimed", ["t", "1000t"])
@pytest.mark.parametrize("trained", ["t", "1000t"])
def test_a_time_wrong_by_a_thousand_is_seen(grid, trained, claimed):
    net = grid[GRID.index(("velocity", FLOW, trained, "none"))]
    found = rp.identify(rp.Denoiser(net, "rectified_flow", "velocity", time=claimed), points(256, 3))
    assert (found.verdict, found.times) == ("velocity", [trained])
    assert ("that is a time scaled wrongly by 1000." in found.symptoms) == (trained != claimed)


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (1 / 0.18215, "times 0.18215, as latents often are"),
        (0.18215, "divided by 0.18215, as latents are before they are scaled"),
        (1.0, None),
    ],
)
def test_a_missing_or_doubled_scale_of_latents_is_seen(grid, factor, words):
    net = grid[GRID.index(("v", COSINE, "t", "none"))]
    noted = [s for s in rp.identify(net, factor * points(256, 3), schedule_="cosine").symptoms if "better on" in s]
    assert len(noted) == (words is not None)
    assert all(f"on data {words} (" in s for s in noted)


@pytest.mark.parametrize("zero", [True, False])
def test_pure_noise_is_a_symptom_for_a_network_that_never_saw_it(zero):
    """Ideal for data that are bright or dark all over: where the last step of training still shows which, pure noise
    is taken for a brightness of its own."""
    g = torch.Generator().manual_seed(0)
    cov = (0.01 * torch.eye(64) + torch.ones(64, 64)).double()
    x = torch.randn(256, 1, generator=g) + 0.1 * torch.randn(256, 64, generator=g)
    process = rp.DDPM("scaled_linear", zero_terminal_snr=zero)
    oracle = MixtureOracle(torch.ones(1), torch.zeros(1, 64).double(), cov[None], process, rp.target("v"))
    found = rp.identify(AtTime(oracle, lambda step: (step + 1) / 1000), x, schedule_=process)
    assert found.verdict == "v"
    assert any("worse than the mean of the data" in s for s in found.symptoms) != zero


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
    told = capsys.readouterr()
    assert "running your code" not in told.err
    assert told.out.startswith("v: read as v, the network has an x0-error of ")
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


@pytest.fixture(scope="module")
def theirs(one_thread):
    """A model of diffusers, trained as its own examples train, to predict the sample."""
    diffusers = pytest.importorskip("diffusers")
    model, scheduler = tiny_unet(diffusers), diffusers.DDPMScheduler()
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(240):
        x, noise, step = stripes(32), torch.randn(32, 1, 8, 8), torch.randint(1000, (32,))
        loss = (model(scheduler.add_noise(x, noise, step), step).sample - x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


@pytest.mark.parametrize("said", ["sample", "epsilon"])
def test_a_pipeline_that_diffusers_wrote_is_named_whatever_it_says(theirs, said, tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(prediction_type=said)
    diffusers.DDPMPipeline(theirs, scheduler).save_pretrained(tmp_path / "pipe")
    np.save(tmp_path / "x.npy", stripes(64).numpy())
    data = f"{{name: array, path: {tmp_path / 'x.npy'}, normalise: none, holdout: 0.5}}"
    capsys.readouterr()
    assert main(["identify", str(tmp_path / "pipe"), "--data", data, "--schedule", "ddpm", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "x0"
    contradicted = "the weights say that they predict eps; they behave as x0." in found["symptoms"]
    assert contradicted == (said == "epsilon")


def tiny_unet(diffusers, **more):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        **more,
    )


def stripes(n):
    """Pictures of two columns of brightness, each 1 or -1."""
    return (2.0 * torch.randint(2, (n, 1, 1, 2)) - 1).repeat_interleave(4, 3).expand(n, 1, 8, 8).contiguous()


def labelled(x, y):
    return rp.data.Data(name="labelled", train=x, heldout=x, labels=y, heldout_labels=y)


def test_labels_of_the_data_are_passed_on():
    points, y = torch.randn(10, 6, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 10

    class Labelled(nn.Module):
        def forward(self, x, time, y):
            return points[y]

    data = labelled(points[y] + 0.1 * torch.randn(200, 6, generator=torch.Generator().manual_seed(1)), y)
    assert rp.identify(Labelled(), data, labels=True, schedule_="cosine").verdict == "x0"
    with pytest.raises(NetworkError, match="could not be asked in any way"):
        rp.identify(Labelled(), data, schedule_="cosine")
    with pytest.raises(DataError, match="has no labels"):
        rp.identify(Labelled(), rp.data.from_array(data.train), labels=True)
    with pytest.raises(DataError, match="a tensor alone has no labels"):
        rp.identify(Labelled(), data.train, labels=True)


def test_labels_have_their_own_name_in_models_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.DDPMPipeline(tiny_unet(diffusers, num_class_embeds=10), diffusers.DDPMScheduler())
    data = labelled(stripes(32), torch.arange(32) % 10)
    assert rp.identify(pipe, data, labels=True, schedule_="ddpm").verdict == "undecided"
    with pytest.raises(NetworkError, match="class_labels"):
        rp.identify(pipe, data, schedule_="ddpm")


@pytest.mark.slow
def test_random_trainings_are_never_named_wrongly():
    rows = [benchmark.run(seed, 500) for seed in range(1000, 1020)]
    assert not [benchmark.line(row) for row in rows if row["outcome"] == "wrong"]
    learned = [row for row in rows if row["trained"]]
    assert sum(row["outcome"] == "named" for row in learned) > len(learned) / 2
