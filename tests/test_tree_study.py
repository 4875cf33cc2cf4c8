"""The study of the tree: what its recipe asks for beyond other studies', each key against an independent formula."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import reparam as rp
from reparam.data import Data, Mixture
from reparam.errors import Conflict, DataError, OutputError, RecipeError, ReparamError, UnknownName
from reparam.metrics.model import MODEL_METRICS, Asked
from reparam.report.views import View
from reparam.studies import figure, load_recipe
from reparam.studies.figure import spreads
from reparam.studies.leaderboard import as_text, ranked
from reparam.studies.run import data_of, draw_samples, execute, floors, make_network, reference_of, trainer_of
from reparam.studies.train import _bound
from reparam.training import Diverged, TrainConfig, Trainer, Validation

pytestmark = pytest.mark.usefixtures("one_thread")

#: The recipe of the tree, as small as it can be.
SMALL = [
    "data.size=4096",
    "network.hidden=16",
    "network.layers=3",
    "train.steps=12",
    "train.batch=64",
    "train.validations=1",
    "sample.n=64",
    "sample.steps=6",
    "sample.autoguidance.step=4",
]


def small(*settings, **changes):
    """The runs of the small recipe, by name."""
    return load_recipe("tree", [*SMALL, *settings]).runs


def refused(error, match, *settings):
    with pytest.raises(error, match=match):
        load_recipe("tree", [*SMALL, *settings])


@pytest.fixture
def few_points(monkeypatch):
    """Densities on few points: they take most of the time."""
    monkeypatch.setattr(figure, "_SIDE", 5)
    monkeypatch.setattr(figure, "_FLOW", 8)
    monkeypatch.setattr("reparam.metrics.model._STEPS", 8)


@pytest.fixture
def few_data(monkeypatch):
    """Metrics of a model on fewer data."""
    for name, value in {"_SCORED": 4096, "_LIKELY": 1024, "_STEPS": 32}.items():
        monkeypatch.setattr(f"reparam.metrics.model.{name}", value)


# ------------------------------------------------------------------------------------------ the recipe


def test_the_three_runs_have_names_and_differ_in_what_they_learn_from():
    runs = load_recipe("tree").runs
    assert list(runs) == ["edm", "edm-gaussian-full", "edm_exact"]
    assert [c.supervision for c in runs.values()] == ["sample", "sample", "exact"]
    objective = runs["edm-gaussian-full"].objective()
    assert objective.likelihood.covariance == "full"
    levels = -objective.schedule.log_snr(objective.times_at((torch.arange(9999.0) + 0.5) / 9999)) / 2
    assert float(levels.mean()) == pytest.approx(-2.4, abs=0.01)
    assert float(levels.std()) == pytest.approx(1.5, abs=0.01)


def test_seeds_is_how_many():
    assert [c.seed for c in small("seeds=3", "target=x0", "input=none").values()] == [0, 1, 2]
    assert [c.seed for c in small("seeds=2", "seed=5", "target=x0", "input=none").values()] == [5, 6]
    assert list(small("seeds=1")) == ["edm", "edm-gaussian-full", "edm_exact"]
    assert "edm_exact-seed1" in small("seeds=2")
    for value in (0, 2.5, "true", "[0, 1]"):
        refused(RecipeError, "seeds: expected how many", f"seeds={value}")
    refused(Conflict, "both say which seeds", "seeds=2", "seed=[0, 1]")


def test_the_rate_falls_as_published():
    train = load_recipe("tree").runs["edm"].train
    for step in (0, 1, 511, 512, 513, 2048, 4095):
        assert train.lr_at(step) == pytest.approx(1e-2 / math.sqrt(max(step / 512, 1)), rel=1e-12)
    warm = TrainConfig(steps=10, warmup=4, decay="inverse_sqrt", decay_after=2)
    assert warm.lr_at(1) == pytest.approx(warm.lr / 2)
    refused(Conflict, "go together", "train.decay_after=null")
    refused(Conflict, "go together", "train.decay=cosine")
    refused(ReparamError, "decay_after must be at least 1", "train.decay_after=0")
    longer, shorter = (small(f"train.steps={n}")["edm"].to_dict() for n in (12, 20))
    assert _bound(longer) == _bound(shorter)  # such a training may be continued for longer


def test_what_a_recipe_asks_of_sampling_is_checked():
    refused(ReparamError, "keep_at holds steps from 1 to train.steps", "train.keep_at=[13]")
    refused(ReparamError, "keep_at repeats", "train.keep_at=[3, 3]")
    refused(RecipeError, "autoguidance.step is 13", "sample.autoguidance.step=13")
    refused(RecipeError, "autoguidance.weight: missing", "sample.autoguidance={step: 4}")
    refused(RecipeError, "weight must be a finite number", "sample.autoguidance.weight=.nan")
    refused(RecipeError, "autoguidance.interval", "sample.autoguidance.interval=[1, 0.5]")
    refused(UnknownName, "Did you mean 'sample.autoguidance.weight'", "sample.autoguidance.weigth=2")
    refused(RecipeError, "two increasing positive numbers", "sample.sigma_range=[5, 0.1]")
    refused(RecipeError, "the model is trained on", "t_range=[0, 0.5]")
    refused(RecipeError, "lies below", "sample.sigma_range=[0.002, 500]")
    refused(Conflict, "sample.grid is linear", "sample.grid=linear")
    refused(Conflict, "say the same thing", "sample.grid.last=0.1")
    refused(Conflict, "learns from samples", "supervision=exact")
    assert small("train.keep_at=[2, 4]")["edm"].keep_at == [2, 4]
    assert small("sample.autoguidance=null")["edm"].keep_at == []


def test_sigma_range_is_where_the_grid_begins_and_ends():
    config = small("sample.steps=32")["edm"]
    denoiser = config.objective().denoiser(nn.Identity())
    times = torch.tensor(config.sample.times(denoiser), dtype=torch.float64)
    sigma = denoiser.schedule.sigma(times)
    ramp = torch.linspace(0, 1, 32, dtype=torch.float64)
    published = (5 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 5 ** (1 / 7))) ** 7
    torch.testing.assert_close(sigma[:-1], published, rtol=1e-9, atol=0)
    assert times[-1] == 0


# ------------------------------------------------------------------------------------------ supervision


def test_exact_supervision_regresses_on_the_exact_mean():
    config = small()["edm_exact"]
    data = data_of(config)
    trainer = trainer_of(config, data, make_network(config, data))
    batch = trainer.batches(0)
    t = trainer.trainee.objective.times_at(batch.u)
    losses = trainer.trainee(batch.x0, t, batch.eps)
    sigma = trainer.trainee.objective.schedule.sigma(t)[:, None]
    x = (batch.x0 + sigma * batch.eps).double()
    mean, _ = data.mixture.posterior(x, sigma[:, 0])
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / (sigma**2 + 0.25).sqrt()
    with torch.no_grad():
        net_in = (x / (sigma**2 + 0.25).sqrt()).float()
        answer = trainer.trainee.net(net_in, (sigma[:, 0].log() / 4).float()).double()
    expected = (answer - (mean - c_skip * x) / c_out).square().mean(1)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-3, atol=1e-5)


def test_exact_supervision_needs_a_mixture():
    curve = {"name": "spiral", "size": 500}
    config = load_recipe({"data": curve, "network": "mlp", "target": "x0", "supervision": "exact"}).runs["x0"]
    with pytest.raises(DataError, match="known for a mixture"):
        trainer_of(config, data_of(config), make_network(config, data_of(config)))


# ------------------------------------------------------------------------------------------ snapshots


def run_for(config, folder, steps=None):
    """The run, or so many steps of it."""
    done = [0]

    def stop():
        done[0] += 1
        return steps is not None and done[0] > steps

    return execute("edm", config, folder, stop=stop)


@pytest.mark.usefixtures("few_points")
@pytest.mark.parametrize("stopped_after", [2, 7])
def test_snapshots_are_the_averages_of_their_step_and_survive_resuming(tmp_path, stopped_after):
    config = small("train.keep_at=[6]")["edm"]
    data = data_of(config)
    trainer = trainer_of(config, data, make_network(config, data))
    expected = {}
    for step in trainer.run():
        expected[step] = copy.deepcopy(trainer.denoiser.net.state_dict())
    assert run_for(config, tmp_path / "run", stopped_after) is None
    row = run_for(config, tmp_path / "run")
    assert row["status"] == "finished"
    for step in (4, 6):
        kept = rp.load(tmp_path / "run" / "snapshots" / f"step-{step}.safetensors")
        found = kept.net.state_dict()
        assert all(torch.equal(found[name], expected[step][name]) for name in found)
        assert kept.target == rp.targets.EDM(0.5)
        assert kept.data["name"] == data.name
    assert not all(torch.equal(expected[4][k], expected[12][k]) for k in expected[4])


@pytest.mark.usefixtures("few_points")
def test_a_guide_that_was_not_kept_is_an_error(tmp_path):
    config = small()["edm"]
    assert run_for(config, tmp_path, 7) is None
    (tmp_path / "snapshots" / "step-4.safetensors").unlink()
    with pytest.raises(OutputError, match=r"step-4.safetensors is missing"):
        run_for(config, tmp_path)


# ------------------------------------------------------------------------------------------ sampling


def test_samples_that_start_from_data_are_near_data_no_one_has_seen():
    config = small("sample.sigma_range=[0.002, 0.01]", "sample.n=200")["edm"]
    data = data_of(config)
    net = make_network(config, data)
    denoiser = config.objective().denoiser(net.requires_grad_(False))
    x, _ = draw_samples(denoiser, config.sample, data, 200)
    assert float(data.mixture.log_prob(x, 0.05).mean()) > 0  # about the middle of N(0, 0.01²) it would be -4
    assert float(torch.cdist(x, data.fresh(200)).min()) > 0
    again, _ = draw_samples(denoiser, config.sample, data, 200, shown=7)
    torch.testing.assert_close(x, again)
    from_noise, _ = draw_samples(denoiser, small("sample.start=noise")["edm"].sample, data, 64)
    assert from_noise.shape == (64, 2)


def test_to_start_from_data_there_must_be_no_end_of_them():
    config = small()["edm"]
    array = Data("points", torch.randn(100, 2), torch.randn(50, 2))
    with pytest.raises(DataError, match="points has no end"):
        trainer_of(config, array, make_network(config, array))


# ------------------------------------------------------------------------------------------ metrics of the model


class Exactly(nn.Module):
    """A network that predicts x0 as the posterior mean of a mixture; c is of no effect."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture = mixture
        self.c = nn.Parameter(torch.zeros(()))

    def forward(self, x, time):
        return (self.mixture.posterior(x, (4 * time).exp())[0] + self.c).to(x.dtype)


def gaussian(variance):
    one = torch.ones(1, dtype=torch.float64)
    return Mixture(one, torch.zeros(1, 2), variance * torch.eye(2)[None])


def asked_of(mixture, low=0.01, high=40.0):
    """A denoiser's schedule and what metrics are told, for noise between two levels."""
    schedule = rp.schedules.VE(0.002, 80.0)
    data = Data("mixture", mixture.draw(64, [0]), mixture.draw(64, [1]), mixture=mixture)
    times = rp.times.LogNormalSigma(-1.0, 0.7).on(schedule)
    ends = tuple(float(schedule.time_at(-2 * math.log(s))) for s in (low, high))
    return schedule, Asked(data, times.quantile, ends)


@pytest.mark.usefixtures("few_data")
def test_an_exact_model_has_no_score_error_and_the_exact_likelihood():
    mixture = rp.data.load_data({"name": "tree", "size": 100}).mixture
    few = Mixture(mixture.weights[:4], mixture.means[:4], mixture.covs[:4])
    schedule, asked = asked_of(few)
    denoiser = rp.Denoiser(Exactly(few), schedule, "x0", time="log_sigma/4")
    assert MODEL_METRICS["score_error"].compute(denoiser, asked).value < 1e-6
    found = MODEL_METRICS["nll"].compute(denoiser, asked)
    assert found.value == pytest.approx(MODEL_METRICS["nll"].floor(schedule, asked), abs=2e-3)


@pytest.mark.usefixtures("few_data")
def test_metrics_of_a_model_that_takes_the_data_for_narrower_than_they_are():
    c, s, low = 0.2, 0.1, 0.01
    schedule, asked = asked_of(gaussian(c), low)
    denoiser = rp.Denoiser(Exactly(gaussian(s)), schedule, "x0", time="log_sigma/4")
    u = (np.arange(20_000) + 0.5) / 20_000
    var = np.exp(2 * (-1.0 + 0.7 * torch.special.ndtri(torch.from_numpy(u)).numpy()))
    # x̂0 − E[x0 | x] = (s/(s + σ²) − c/(c + σ²)) x, and x has the variance c + σ².
    expected = np.mean((s / (s + var) - c / (c + var)) ** 2 * (c + var) / var)
    found = MODEL_METRICS["score_error"].compute(denoiser, asked)
    assert found.interval[0] < expected < found.interval[1]
    assert found.value == pytest.approx(expected, rel=0.15)
    # Where the noise is great both are one, so that the model's density is N(0, s + σ²).
    nll = MODEL_METRICS["nll"].compute(denoiser, asked)
    wide, narrow = c + low**2, s + low**2
    floor = MODEL_METRICS["nll"].floor(schedule, asked)
    assert floor == pytest.approx(math.log(2 * math.pi * wide) + 1, abs=0.1)
    excess = math.log(narrow / wide) + wide / narrow - 1
    assert nll.interval[0] - floor < excess < nll.interval[1] - floor
    assert nll.value - floor == pytest.approx(excess, abs=0.1)


# ------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The three runs of the small study, their rows and folder."""
    patch = pytest.MonkeyPatch()
    patch.setattr(figure, "_SIDE", 5)
    patch.setattr(figure, "_FLOW", 8)
    patch.setattr("reparam.metrics.model._STEPS", 8)
    folder, plan = tmp_path_factory.mktemp("tree"), load_recipe("tree", SMALL)
    rows = {run: execute(run, config, folder / run) for run, config in plan.runs.items()}
    patch.undo()
    return plan, folder, rows


def test_a_row_tells_what_the_model_learned_from_and_how_it_scores(study):
    plan, folder, rows = study
    assert [row["status"] for row in rows.values()] == ["finished"] * 3
    assert [row["supervision"] for row in rows.values()] == ["sample", "sample", "exact"]
    for run, row in rows.items():
        assert next(iter(row["metrics"])) == "sliced_wasserstein"
        for name in ("score_error", "nll"):
            found = row["metrics"][name]
            assert found["interval"][0] <= found["value"] <= found["interval"][1]
        assert row["metrics"]["score_error"]["floor"] == 0
        assert row["metrics"]["nll"]["value"] > row["metrics"]["nll"]["floor"]
        assert json.loads((folder / run / "result.json").read_text()) == json.loads(json.dumps(row))
    text = as_text(ranked(list(rows.values()), plan), plan)
    table = text.split("guided by")[0].splitlines()
    assert {"edm", "edm ± full", "edm, exact means"} <= {line.strip().split("  ")[0] for line in table}


def test_guided_samples_are_scored_beside_the_others(study):
    plan, folder, rows = study
    row, config = rows["edm"], plan.runs["edm"]
    assert (row["autoguided"]["step"], row["autoguided"]["weight"]) == (4, 3)
    model = rp.load(folder / "edm" / "model.safetensors")
    guide = rp.load(folder / "edm" / "snapshots" / "step-4.safetensors")
    guided = rp.guidance.Autoguidance(model, guide, 3.0)
    data = data_of(config)
    x, _ = draw_samples(guided, config.sample, data, 64)
    kept = np.load(folder / "edm" / "figure.npz")
    np.testing.assert_allclose(kept["guided"], x.numpy(), atol=1e-5)
    assert np.abs(kept["guided"] - kept["samples"]).max() > 1e-3
    metric = row["autoguided"]["metrics"]["sliced_wasserstein"]
    assert metric["floor"] == row["metrics"]["sliced_wasserstein"]["floor"] is not None
    assert metric["value"] != row["metrics"]["sliced_wasserstein"]["value"]
    assert "nll" not in row["autoguided"]["metrics"]


def test_a_model_with_variances_is_calibrated_and_shows_them(study):
    plan, folder, rows = study
    assert rows["edm"]["calibration"] is None
    assert len(rows["edm-gaussian-full"]["calibration"]["bins"]) == 10
    model = rp.load(folder / "edm-gaussian-full" / "model.safetensors")
    profile = model.data["error_profile"]
    assert profile["log_snr"] == sorted(profile["log_snr"])
    assert min(profile["var"]) > 0
    way = np.load(folder / "edm-gaussian-full" / "trajectory.npz")
    frames, m = way["frames"].shape[:2]
    assert way["spread"].shape == (frames, m, 3)
    assert way["spread"].dtype == np.float32
    assert not way["spread"][-1].any()
    # The first frame is what the model says of the states that samples start from.
    config, data = plan.runs["edm-gaussian-full"], data_of(plan.runs["edm-gaussian-full"])
    _, again = draw_samples(model, config.sample, data, 64)
    with torch.no_grad():
        posterior = model(again.states[0], again.times[0])
    cov = posterior.root @ posterior.root.mT
    expected = torch.stack([cov[:, 0, 0], cov[:, 0, 1], cov[:, 1, 1]], 1)
    np.testing.assert_allclose(way["spread"][0], expected.numpy(), rtol=1e-4, atol=1e-6)
    assert "spread" not in np.load(folder / "edm" / "trajectory.npz")


def test_spreads_are_covariances_of_points_and_standard_deviations_of_pictures():
    generator = torch.Generator().manual_seed(0)
    var = torch.rand(3, 4, 5, generator=generator)
    basis = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64, generator=generator)).Q
    way = rp.samplers.Trajectory(torch.zeros(4, 5), [1, 0.5, 0.2, 0], torch.zeros(4, 4, 5), torch.zeros(3, 4, 5), var)
    found = spreads(way, View("points", centre=torch.zeros(5), basis=basis), lambda x: x)["spread"]
    cov = basis.numpy().T @ np.diag(var[1, 2]) @ basis.numpy()
    np.testing.assert_allclose(found[1, 2], [cov[0, 0], cov[0, 1], cov[1, 1]], rtol=1e-5)
    pictures = replace(way, var=torch.rand(3, 4, 3, 2, 2, generator=generator))
    maps = spreads(pictures, View("pictures", image=(2, 2), shape=(3, 2, 2)), lambda x: x)
    std = pictures.var.mean(2).sqrt().numpy()
    assert maps["spread"].dtype == np.uint8
    assert maps["spread"].shape == (4, 4, 2, 2)
    np.testing.assert_allclose(maps["spread"][:-1] / 255 * maps["spread_max"], std, atol=std.max() / 500)
    flat = replace(way, var=pictures.var[:, :, 0].flatten(2))
    same = spreads(flat, View("pictures", image=(2, 2), shape=(4,)), lambda x: x)
    assert same["spread"].shape == (4, 4, 2, 2)
    assert spreads(replace(way, var=None), View("pictures"), lambda x: x) == {}


def test_the_figure_holds_what_is_drawn(study):
    plan, folder, _ = study
    found = np.load(folder / "edm-gaussian-full" / "figure.npz")
    assert found["truth"].shape == found["samples"].shape == found["guided"].shape == (64, 2)
    (x, y, half), sigma = found["zoom"], float(found["zoom_sigma"])
    mixture = data_of(plan.runs["edm"]).mixture
    right_low = torch.tensor([[x + half, y - half]])  # columns are x, rows y from low to high
    assert found["truth_log_density"].shape == (5, 5)
    assert found["truth_log_density"][0, -1] == pytest.approx(float(mixture.log_prob(right_low, sigma)), rel=1e-4)
    for name in ("log_density", "guide_log_density"):
        assert found[name].shape == (5, 5)
        assert np.isfinite(found[name]).all()
    assert np.abs(found["log_density"] - found["guide_log_density"]).max() > 1e-3
    for name in ("paths", "guided_paths"):
        assert found[name].shape[2] == 2
        assert (np.abs(found[name][0] - [x, y]) <= half).all()
    assert np.array_equal(found["paths"][0], found["guided_paths"][0])


def test_floors_are_those_of_the_exact_density(study):
    plan, _, _ = study
    config = plan.runs["edm"]
    data = data_of(config)
    found = floors(config, reference_of(config, data, None))
    assert found["score_error"] == 0
    y = data.mixture.draw(20_000, [77]) + 0.002 * torch.randn(20_000, 2, generator=torch.Generator().manual_seed(3))
    entropy = -float(data.mixture.log_prob(y, 0.002).mean())
    assert found["nll"] == pytest.approx(entropy, abs=0.15)


# ------------------------------------------------------------------------------------------ what goes wrong


class Lost(nn.Module):
    """A network whose variance is lost at great noise after some steps."""

    def __init__(self, after):
        super().__init__()
        self.w, self.after, self.seen = nn.Parameter(torch.ones(())), after, 0

    def forward(self, x, time):
        self.seen += 1
        rest = torch.full_like(x, -100.0 if self.seen > self.after else 0.0) * (time[:, None] > 0)
        return torch.cat([self.w * x, rest], 1)


def test_a_variance_that_is_lost_ends_training_and_names_where():
    config = small()["edm-gaussian-full"]
    data = data_of(config)
    objective = rp.Objective(
        config.schedule, rp.Gaussian("edm", "diagonal"), times=config.times, time="log_sigma/4", input="edm"
    )
    trainer = Trainer(
        Lost(after=3), objective, data, TrainConfig(steps=9, batch=512), validation=Validation.draw(data, (0.0, 1.0))
    )
    with pytest.raises(Diverged, match=r"collapsed .* at step 4, for a sample at t = 0\.\d+ \(noise bin 0\.\d+ to"):
        list(trainer.run())
    assert trainer.step == 4
