"""The recipes of JiT as published: the networks they build, the weights they train with, and their tiny versions."""

import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import reparam as rp
from reparam.studies.recipe import built_in, load_recipe, read_recipe
from reparam.studies.run import execute

pytestmark = pytest.mark.usefixtures("one_thread")

#: Recipe: millions of parameters and billions of multiply-adds, as published for 256 pixels, and FID-50K.
IMAGENET = {
    "imagenet256-jit-b16": (131, 25, 3.66),
    "imagenet256-jit-l16": (459, 88, 2.36),
    "imagenet256-jit-h16": (953, 182, 1.86),
    "imagenet256-jit-g16": (2007, 383, 1.82),
    "imagenet512-jit-b32": (None, None, 4.02),
    "imagenet512-jit-l32": (None, None, 2.53),
    "imagenet512-jit-h32": (None, None, 1.94),
    "imagenet512-jit-g32": (None, None, 1.78),
    "imagenet1024-jit-b64": (None, None, 4.82),
}
ABLATIONS = [
    "jit-ablation",
    "jit-ablation-64",
    "jit-ablation-shift",
    "jit-ablation-bottleneck",
    "jit-ablation-architecture",
]
#: What makes any tiny version take seconds.
SECONDS = ["train.steps=3", "train.batch=16", "train.warmup=1", "train.validations=1"]
SECONDS += ["sample.n=8", "sample.steps=3", "sample.reference=64"]


def full(name):
    """The runs of the full recipe."""
    return load_recipe(name, ["data.path=imagenet"]).runs


def network_of(run, side):
    """The network of a run on ImageNet, without its memory."""
    arguments = {k: v for k, v in run.network.items() if k != "name"}
    with torch.device("meta"):
        return rp.networks.JiT(side, classes=1000, **arguments)


def parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_recipes_are_the_published_setting(name):
    millions, multiply_adds, fid = IMAGENET[name]
    size, patch = int(name[8:].split("-")[0]), int(name[-2:])
    (run,) = full(name).values()
    assert (run.data["size"], run.network["patch"], run.network["size"].lower()) == (size, patch, name[-3])
    assert run.schedule["noise_scale"] == size / 256
    assert run.network.get("dropout") is None
    net = network_of(run, size)
    assert net.grid == (16, 16)
    assert net.config["dropout"] == (0.2 if name[-3] in "hg" else 0.0)
    if millions:
        assert round(parameters(net) / 1e6) == millions
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            net(torch.zeros(1, 3, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
        # G comes to 383.7.
        assert counter.get_total_flops() / 2 / 1e9 == pytest.approx(multiply_adds, abs=0.75)
    published = load_recipe(name, ["data.path=imagenet"]).published
    assert [(p.value, p.run) for p in published] == [(fid, "x0")]


@pytest.mark.parametrize("name", [n for n in IMAGENET if not n.startswith("imagenet256")])
def test_larger_pictures_change_only_the_two_ends(name):
    """As many tokens at every size, so only embedding (p·p·3·bottleneck) and output (p·p·3·(width + 1)) grow."""
    (run,) = full(name).values()
    (small,) = full(f"imagenet256-jit-{name[-3]}16").values()
    larger, net = network_of(run, run.data["size"]), network_of(small, 256)
    numbers = 3 * (run.network["patch"] ** 2 - 16**2)
    ends = net.config["bottleneck"] + net.config["width"] + 1
    assert parameters(larger) - parameters(net) == numbers * ends


@pytest.mark.parametrize("name", IMAGENET)
def test_training_is_the_published_one(name):
    (run,) = full(name).values()
    train, epoch = run.train, 1_281_167 // 1024
    epochs = 200 if "1024" in name else 320 if name[-3] == "g" else 600
    assert (train.steps, train.warmup) == (epochs * epoch, 5 * epoch)
    assert (train.batch, train.lr, train.decay) == (1024, pytest.approx(5e-5 * 1024 / 256), "constant")
    assert (train.beta1, train.beta2, train.weight_decay) == (0.9, 0.95, 0)
    assert {train.ema, *train.also_ema} == {0.9996, 0.9998, 0.9999}
    assert (train.precision, train.label_drop, run.conditional) == ("bf16", 0.1, True)
    sample = run.sample
    assert (sample.n, sample.sampler, sample.steps, sample.guidance_interval) == (50_000, "heun", 50, [0, 0.9])
    if (guidance := {"b": 2.9, "h": 2.2}.get(name[-3])) is not None:
        assert sample.guidance == guidance


@pytest.mark.parametrize("name", ["imagenet256-jit-b16", "imagenet512-jit-l32", "jit-ablation-shift"])
def test_the_loss_is_that_of_velocity_with_the_published_floor(name):
    """In the paper's time u = 1 − t: ‖(x̂0 − x0)/max(1 − u, 0.05)‖², whatever the noise scale."""
    run = next(iter(full(name).values()))
    objective = run.objective()
    u = torch.linspace(0.02, 0.999, 200, dtype=torch.float64)
    weights = objective.weighting(1 - u, objective.schedule)
    torch.testing.assert_close(weights, 1 / (1 - u).clamp(min=0.05) ** 2, rtol=1e-9, atol=0)


def test_noise_levels_are_the_published_ones():
    """The logit of the paper's time u = 1 − t is normal with mean −0.8 and standard deviation 0.8."""
    for run, mean in [*((r, -0.8) for r in full("imagenet256-jit-b16").values()), *shifts()]:
        u = 1 - run.objective().times.quantile(torch.tensor([0.1587, 0.5, 0.8413], dtype=torch.float64))
        torch.testing.assert_close(u.logit(), torch.tensor([mean + 0.8, mean, mean - 0.8]).double(), atol=1e-3, rtol=0)


def shifts():
    """The runs of jit-ablation-shift with the paper's means."""
    means = {f"mean{m}": -m for m in (0.0, 0.4, 0.8, 1.2)}
    return [(run, means[name]) for name, run in full("jit-ablation-shift").items()]


@pytest.mark.parametrize("name", ["jit-ablation", "jit-ablation-64"])
def test_the_ablation_weighs_errors_as_derived(name):
    """Each loss written out in its space, against the weight on the error of the prediction."""
    t, e = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64), 0.3
    # What an error e in the prediction is in each space: x0 = (x_t − tε)/(1 − t) = x_t − t·velocity.
    in_x0 = {"x0": e + 0 * t, "eps": -t / (1 - t) * e, "velocity": -t * e}
    runs = full(name)
    assert len(runs) == 9
    for label, run in runs.items():
        of, space = run.target["name"], run.loss_space
        assert label == f"loss_space{space}-{of}"
        error = in_x0[of] / {"x0": torch.ones(()), "eps": -t / (1 - t), "velocity": -t}[space]
        objective = run.objective()
        weight = objective.weighting.on_prediction(t, objective.schedule, objective.target)
        torch.testing.assert_close(weight * e**2, error**2)
        assert run.t_range == ([0, 0.98] if of == "eps" else [0, 1])


def test_the_share_of_draws_that_the_papers_floor_would_change():
    """What jit-ablation says of it in words, and what its times come to, are both that of the closed form."""
    (x0, *_) = full("jit-ablation").values()
    below = 0.5 * math.erfc((0.8 - math.log(0.05 / 0.95)) / 0.8 / math.sqrt(2))
    drawn = x0.objective().times.cdf(torch.tensor([0.05], dtype=torch.float64))
    assert float(drawn) == pytest.approx(below, rel=1e-6)
    said = re.search(r"one draw in ([\d,]+)", built_in()["jit-ablation"])
    assert said is not None
    assert int(said[1].replace(",", "")) == pytest.approx(1 / below, rel=0.01)


@pytest.mark.parametrize("name", ABLATIONS)
def test_published_numbers_stand_beside_runs(name):
    recipe = load_recipe(name, ["data.path=imagenet"])
    assert all(p.run in recipe.runs for p in recipe.published)
    assert len({p.run for p in recipe.published}) == len(recipe.published)
    assert recipe.about.source
    assert recipe.about.unsaid


def test_networks_of_the_ablations():
    nets = {name: network_of(run, 256).config for name, run in full("jit-ablation-architecture").items()}
    found = {n: (c["rope"], c["qk_norm"], c["in_context"], c["bottleneck"]) for n, c in nets.items()}
    assert found["ropeFalse-qk_normFalse-in_context0"] == (False, False, 0, 128)
    assert found["ropeTrue-qk_normTrue-in_context0"] == (True, True, 0, 128)
    assert found["ropeTrue-qk_normTrue-in_context32"] == (True, True, 32, 128)
    assert len(found) == 8
    for name, run in full("jit-ablation-bottleneck").items():
        assert name == f"bottleneck{network_of(run, 256).config['bottleneck']}"


def test_direct_x0_is_as_described():
    (run,) = full("direct-x0").values()
    net = run.network
    assert (net["patch"], net["width"], net["depth"], net["rope"], net["qk_norm"]) == (4, 768, 12, False, False)
    assert (run.train.lr, run.train.clip, run.train.weight_decay) == (1e-4, 1, 0)
    assert (run.sample.sampler, run.sample.steps, run.sample.threshold) == ("ddim", 100, "static")
    objective = run.objective()
    assert objective.schedule == rp.DDPM(betas="linear", T=1000)
    t = torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64)
    assert objective.weighting.on_prediction(t, objective.schedule, objective.target).tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", [*IMAGENET, *ABLATIONS, "direct-x0"])
def test_tiny_versions_are_small_and_complete(name):
    recipe = load_recipe(name, tiny=True)
    assert {c.data["name"] for c in recipe.runs.values()} == {"digits"}
    for run in recipe.runs.values():
        arguments = {k: v for k, v in run.network.items() if k != "name"}
        net = rp.networks.JiT(8, channels=1, classes=10 if run.conditional else 0, **arguments)
        assert parameters(net) < 1e6
        assert run.train.steps * run.train.batch <= 200_000
    assert read_recipe(name)["about"]["source"]


#: Of every recipe one that stands for its runs; recipes that differ in numbers only stand for one another.
RUNS = {
    "imagenet512-jit-h32": [],
    "jit-ablation": ["loss_space=x0", "target={name: eps, t_range: [0, 0.98]}"],
    "jit-ablation-64": ["loss_space=eps", "target=velocity"],
    "jit-ablation-shift": ["times.mean=1.2"],
    "jit-ablation-bottleneck": ["network.bottleneck=4"],
    "jit-ablation-architecture": ["network.rope=false", "network.qk_norm=false", "network.in_context=4"],
    "direct-x0": [],
}


@pytest.mark.parametrize("name", RUNS)
def test_tiny_versions_train_sample_and_score(name, tmp_path):
    pytest.importorskip("sklearn")
    ((label, run),) = load_recipe(name, [*SECONDS, *RUNS[name]], tiny=True).runs.items()
    row = execute(label, run, tmp_path / "run")
    assert row["status"] == "finished"
    assert {"frechet_distance", "nearest_neighbour"} <= set(row["metrics"])
    assert all(math.isfinite(m["value"]) for m in row["metrics"].values())
