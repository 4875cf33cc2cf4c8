"""The cost model: operations against torch's counter and closed forms, memory against a process, time at its limits."""

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import reparam as rp
from reparam.cli import main
from reparam.errors import ReparamError
from reparam.networks.jit import SIZES
from reparam.studies import estimate
from reparam.studies.estimate import Cost
from reparam.studies.recipe import load_recipe
from reparam.studies.scale import Machine, Work, counting, memory, project, stand_in, stated, work_of
from reparam.training import Validation

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]


def run_of(network, *, conditional=False, **train):
    recipe = {"data": {"name": "images", "path": "none"}, "network": network, "target": "x0"}
    recipe |= {"conditional": conditional, "train": {"precision": "float32", **train}}
    return next(iter(load_recipe(recipe).runs.values()))


def script():
    spec = importlib.util.spec_from_file_location("scale_script", ROOT / "benchmarks" / "scale.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for what they name
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------ operations


def jit_forward(side, patch, channels, width, depth, bottleneck, classes, in_context, start):
    """Operations of one sample: two for a weight and each token that it meets, and attention's two products."""
    tokens, pixels, hidden = (side // patch) ** 2, channels * patch**2, int(2 / 3 * 4 * width)
    products = tokens * (pixels * bottleneck + bottleneck * width + width * pixels)
    products += 256 * width + width**2 + 2 * width**2
    for block in range(depth):
        n = tokens + (in_context if classes and block >= start else 0)
        products += n * (4 * width**2 + 3 * width * hidden) + 2 * n**2 * width + 6 * width**2
    return 2 * products


def test_operations_of_jit_are_those_of_the_closed_form():
    sizes = {"width": 32, "depth": 4, "heads": 4, "bottleneck": 8, "in_context": 4, "in_context_start": 2}
    found = work_of(run_of({"name": "jit", "patch": 4, **sizes}, conditional=True), stand_in((3, 16, 16), 10))
    expected = jit_forward(16, 4, 3, 32, 4, 8, 10, 4, 2)
    assert found.forward == pytest.approx(expected, rel=1e-9)
    # Backward is twice that, but for the gradient of the input's first product, which nobody asks for.
    first = 2 * 16 * 48 * 8 + 2 * 256 * 32
    assert found.backward == pytest.approx(2 * expected - first, rel=1e-9)


@pytest.mark.parametrize(("size", "published"), [("B", 25), ("L", 88), ("H", 182), ("G", 383)])
def test_the_closed_form_gives_the_published_operations(size, published):
    """arXiv 2511.13720, table 9, counts a multiplication and its addition as one; printed without decimals."""
    s = SIZES[size]
    found = jit_forward(256, 16, 3, s.width, s.depth, s.bottleneck, 1000, 32, s.in_context_start)
    assert found / 2e9 == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(
    ("network", "side"),
    [({"name": "unet", "widths": [32, 32]}, 8), ({"name": "jit", "patch": 4, "width": 32, "depth": 2, "heads": 4}, 16)],
)
def test_operations_are_those_that_torch_counts_on_real_tensors(network, side):
    config, data = run_of(network), stand_in((3, side, side))
    made = {"unet": rp.networks.UNet, "jit": rp.networks.JiT}[network["name"]]
    net = made(side, **{k: v for k, v in network.items() if k != "name"})
    x, counter = torch.randn(2, 3, side, side), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # whose products torch knows how to count on a CPU
        out = net(x, torch.rand(2))
        forward = counter.get_total_flops()
        out.square().mean().backward()
    found = work_of(config, data)
    assert found.parameters == sum(p.numel() for p in net.parameters())
    assert 2 * found.forward == pytest.approx(forward, rel=1e-9)
    assert 2 * found.flops == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_nothing_is_computed_while_counting_and_what_is_kept_grows_with_the_batch():
    config = run_of({"name": "jit", "patch": 4, "width": 32, "depth": 2, "heads": 4})
    found = work_of(config, stand_in((3, 16, 16)))
    assert found.kept_fixed < 0.1 * found.kept
    assert found.moved > found.kept > 0
    twice = work_of(run_of({**config.network, "depth": 4}), stand_in((3, 16, 16)))
    assert twice.kept == pytest.approx(2 * found.kept, rel=0.1)
    again = work_of(run_of(config.network, checkpoint_activations=True), stand_in((3, 16, 16)))
    assert again.kept < 0.3 * found.kept
    # Two blocks are computed again: as many operations as two blocks more have going forward.
    assert again.backward - found.backward == pytest.approx(twice.forward - found.forward)


def test_what_is_kept_for_the_backward_pass_of_a_linear_layer():
    net, x = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU()), torch.randn(4, 8)
    with counting(net) as count:
        net(x).sum().backward()
    assert count.kept == 4 * (x.numel() + 4 * 16)  # the input, and what ReLU gave
    assert count.flops == 2 * 2 * 4 * 8 * 16  # no gradient of x


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.slow
def test_memory_is_below_the_peak_of_a_fresh_process_and_not_by_much():
    """What the backward pass needs for a moment, and libraries, come on top: 1.6 times it where this was measured."""
    network, side, batch = {"name": "jit", "patch": 4, "width": 128, "depth": 6, "heads": 4}, 32, 128
    tool = script()
    computed, measured = tool.computed_memory(network, side, batch).total, tool.measured_peak(network, side, batch)
    assert computed < measured < 2 * computed


def test_memory_of_weights_gradients_optimiser_and_averages():
    found = memory(400.0, 3, 1000.0, 50.0)
    assert (found.weights, found.gradients, found.optimiser, found.averages) == (400, 400, 800, 1200)
    assert found.total == 2800 + 1050


# ------------------------------------------------------------------------------------------ time

WORK = Work(10**6, 2e9, 4e9, 1e6, 0.0, 1e7, 0.0, 100)
MACHINE = Machine(peak=1e12, fraction=0.5, bandwidth=1e11, launch=0.0, node=8, link=1e10, across=1e9, latency=0.0)


def projected(gpus, machine=MACHINE, work=WORK, stored=(3072, 1000), **train):
    config = run_of({"name": "mlp"}, batch=64, steps=10, **train)
    return project(work, config, gpus, stored, machine)


def test_one_gpu_takes_the_time_of_its_own_work():
    found = projected(1)
    compute = 64 * 6e9 / 5e11 + 64 * 1e7 / 1e11
    assert found.compute_s == pytest.approx(compute)
    assert found.reduce_s == 0
    assert found.step_s == pytest.approx(compute + 52e6 / 1e11)
    assert found.seconds == pytest.approx(10 * found.step_s)
    assert found.bound == "compute"


def test_gradients_are_free_until_they_take_longer_than_the_backward_pass():
    found = projected(8)
    assert found.reduce_s == pytest.approx(2 * 7 / 8 * 4e6 / 1e10)
    assert found.step_s == pytest.approx(projected(1).compute_s / 8 + found.update_s)
    slow = projected(64)  # over the network between nodes
    assert slow.reduce_s == pytest.approx(2 * 63 / 64 * 4e6 / 1e9)
    slower = projected(64, replace(MACHINE, across=1e6))
    assert slower.step_s == pytest.approx(slower.compute_s / 3 + slower.reduce_s + slower.update_s)
    assert slower.bound == "network"
    assert projected(64, replace(MACHINE, latency=1.0)).reduce_s == pytest.approx(slow.reduce_s + 126)


def test_what_else_may_decide():
    assert projected(1, replace(MACHINE, launch=1.0)).compute_s == 100
    assert projected(1, replace(MACHINE, launch=1.0)).bound == "host"
    streamed = projected(8, replace(MACHINE, reading=1e3), stored=(3072, 10**12))
    assert streamed.bound == "reading"
    assert streamed.step_s == pytest.approx(64 * 3072 / 1e3)
    assert projected(1).memory.data == 3072 * 1000
    assert streamed.memory.data == 0


def test_a_batch_that_cannot_be_shared_out():
    with pytest.raises(ReparamError, match="a batch of 64 cannot be shared out evenly among 7 parts"):
        projected(7)


# ------------------------------------------------------------------------------------------ where it is told


def test_the_page_says_what_the_script_prints():
    page, tool = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8"), script()
    for recipe in ("digits-jit", "cifar10-patch16"):
        row = tool.row_of(recipe, Machine())
        assert tool.work_line(row) in page
        assert tool.time_line(row) in page
    assert tool.WORK_HEAD in page
    assert tool.TIME_HEAD in page


def test_the_estimate_of_a_training_tells_of_other_gpus_too(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "data: {name: spiral, dim: 4, size: 500}\nnetwork: {name: mlp, hidden: 16, layers: 2}\ntarget: x0\n"
    )
    asked = [
        "train",
        str(recipe),
        "--device",
        "cpu",
        "--set",
        "train.batch=24",
        "--out",
        str(tmp_path / "out"),
        "--estimate",
    ]
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert re.search(r"Computed, not measured, for .*: training takes \S+ s on 1, \S+ s on 8$", told, re.MULTILINE)
    assert main([*asked, "--json"]) == 0
    assert sorted(json.loads(capsys.readouterr().out)["scaled"]) == ["1", "8"]


def test_a_batch_that_would_take_long_on_a_cpu_is_tried_on_a_few_samples(monkeypatch):
    network = {"name": "jit", "patch": 4, "width": 16, "depth": 1, "heads": 2}
    config, data = run_of(network, batch=16), stand_in((3, 16, 16))
    data = replace(data, train=data.train.repeat(64, 1, 1, 1), heldout=data.train.repeat(64, 1, 1, 1))
    assert estimate._affordable(config, data, None, "cpu") == 16
    monkeypatch.setattr(estimate, "_LARGE", 100)
    assert estimate._affordable(config, data, None, "cpu") == 16
    flops = work_of(config, data).flops
    monkeypatch.setattr(estimate, "_MOST_FLOPS", 4 * flops)
    assert estimate._affordable(config, data, None, "cpu") == 4
    seen = []

    def measure(few, *rest):
        seen.append(few.train.batch)
        return Cost(1, 2, 3, 50, 60, kept=10)

    monkeypatch.setattr(estimate, "_measure", measure)
    assert estimate._tried(config, data, None, "cpu") == Cost(4, 2, 3, 80, 240, kept=40)
    assert seen == [4]


# ------------------------------------------------------------------------------------------ before the data are there

UNSEEN = {
    "data": {"name": "images", "size": 32, "flip": True, "holdout": 0.05},
    "network": {"name": "jit", "patch": 8, "width": 32, "depth": 2, "heads": 2},
    "target": ["x0", "v"],
    "train": {"steps": 100, "batch": 24, "precision": "float32"},
    "about": {"source": "a source", "unsaid": ["something"]},
    "published": [{"label": "theirs", "metric": "FID", "value": 3.5, "source": "a paper"}],
}


def written(folder, **changes):
    path = folder / "unseen.yaml"
    path.write_text(json.dumps({**UNSEEN, **changes}))
    return str(path)


def test_a_recipe_says_what_it_is_and_costs_before_its_data_are_there(tmp_path, capsys):
    assert main(["study", written(tmp_path), "--estimate"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == ["study unseen: 2 runs", "  source: a source", "  unsaid: something"]
    assert "theirs" in told[4]
    assert told[5] == ""  # the cost stands apart, and last
    text = " ".join(told[6:])
    assert "Computed, not measured" in text
    assert "shape [3, 32, 32]" in text
    assert "47,500 of them, by CIFAR-10's number" in text
    assert "2 trainings, one after another" in text
    # As from data that are there: one run's work, twice, on as many GPUs as share 24 samples out.
    config, data = next(iter(load_recipe(UNSEEN).runs.values())), stand_in((3, 32, 32), 10)
    work = work_of(config, data)
    found = estimate.computed(load_recipe(UNSEEN).runs)
    assert sorted(found.on) == [1, 8]
    for gpus, runs in found.on.items():
        assert list(runs.values()) == 2 * [project(work, config, gpus, (3072, 47_500))]
    assert found.flops == dict.fromkeys(("x0", "v"), 24 * work.flops)
    assert f"{2 * 100 * 24 * work.flops / 1e9:.3g} GFLOP" in text
    assert [line.split(":")[0].strip() for line in told[9:11]] == ["on  1 NVIDIA H200", "on  8 NVIDIA H200"]
    assert all("the host is the limit" in line for line in told[9:11])  # too small a network for such a GPU


def test_an_estimate_counts_validation():
    config = next(iter(load_recipe(UNSEEN).runs.values()))
    data = stand_in((3, 32, 32), 10)
    one = Cost(train_s=0.5, sample_s=0.25, score_s=0.0, bytes=0.0)
    found = estimate._of_run(config, data, one, 1)
    drawn = len(Validation.draw(data, (0.0, 1.0)).t)
    assert found.validate_s == config.train.validations * drawn * 0.25 > 0
    assert found.seconds == found.train_s + found.validate_s + found.sample_s + found.score_s


def test_an_estimate_says_what_more_gpus_do_not_shorten(tmp_path):
    found = estimate.computed(load_recipe(UNSEEN).runs)
    limits = {
        "compute": "memory each",
        "host": "the host",
        "network": "the network between",
        "reading": "reading the data",
    }
    for bound, words in limits.items():
        slow = {run: replace(p, bound=bound) for run, p in found.on[1].items()}
        line = next(line for line in replace(found, on={1: slow}).lines() if "on  1" in line)
        assert words in line
        assert ("limit" in line) is (bound != "compute")


def test_a_training_has_a_cost_before_its_data_are_there(tmp_path, capsys):
    asked = ["train", written(tmp_path), "--run", "v", "--estimate", "--tracker", "none"]
    assert main(asked) == 0
    assert "source: a source" in capsys.readouterr().out
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["computed"] is True
    assert found["scaled"]["1"] == found["train_s"] > 0
    assert not list(tmp_path.glob("runs"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"name": "images"}}, "needs data.path"),
        ({"data": {"name": "images", "size": 32, "path": "nowhere"}}, "nowhere"),
        ({"network": {"name": "diffusers", "model": "UNet2DModel"}}, "needs data.path"),
        ({"network": {"name": "jit", "patch": 7}}, "patches of 7"),
        ({"train": {"batch": 25, "accumulate": 2}}, "25"),
    ],
)
def test_what_cannot_be_computed_is_said_after_what_the_recipe_says(tmp_path, capsys, changes, words):
    assert main(["study", written(tmp_path, **changes), "--estimate"]) == 2
    told = capsys.readouterr()
    assert words in told.err
    assert "source: a source" in told.out


def test_stated_pictures_are_those_of_the_recipe():
    def of(**data):
        return stated(next(iter(load_recipe({**UNSEEN, "data": {"name": "images", **data}}).runs.values())))

    wide = of(size=[64, 96], colour="grey", holdout=0.5, limit=1000, classes=7)
    assert (wide.data.shape, wide.stored, len(wide.data.classes)) == ((1, 64, 96), (64 * 96, 500), 7)
    assert (wide.like, of(size=32).like, of(size=32).data.flip) == ("ImageNet", "CIFAR-10", False)
    assert of(size=256).stored == (3 * 256**2, round(1_281_167 * 0.9))
    assert of(size=32, path="x") is of() is None


def test_more_memory_than_a_gpu_has_is_said():
    found = estimate.computed(load_recipe(UNSEEN).runs)
    assert not any("and one has" in line for line in found.lines())
    large = {**UNSEEN, "train": {"batch": 2**24, "precision": "float32"}}
    lines = [line for line in estimate.computed(load_recipe(large).runs).lines() if "  on " in line]
    assert lines[0].endswith("and one has 141 GB")
    assert [line.split(" NVIDIA")[0].split()[-1] for line in lines] == ["1", "8", "64"]
