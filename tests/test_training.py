import copy
import itertools
import math
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import reparam as rp
from reparam.data import Data, load_data
from reparam.data.order import Order
from reparam.errors import NetworkError, ReparamError, SpecError
from reparam.training import Averages, Diverged, Draws, TrainConfig, Trainer, Validation
from reparam.training.averages import AverageStuck


def trainer(target="velocity", net=None, **options):
    data = load_data({"name": "spiral", "dim": 6, "size": 500})
    torch.manual_seed(0)
    config = TrainConfig(**{"steps": 60, "batch": 100, "lr": 1e-3, "warmup": 10, **options})
    objective = rp.Objective("rectified_flow", target, t_range=(0.0, 0.98))
    validation = Validation.draw(data, (0.0, 0.98), bins=5, each=32)
    return Trainer(net or rp.networks.MLP(6, 32, 3), objective, data, config, validation=validation, seed=3)


def tensors(t):
    """All that continuing needs of a trainer's averages."""
    return t.averages.tensors()


def test_draws_are_a_function_of_seed_and_step():
    a, b = Draws(1, 100, 33, (4,)), Draws(1, 100, 33, (4,))
    for step in (5, 0, 7):
        b(step)  # whatever was drawn before
    first = a(7)
    again = b(7)
    assert torch.equal(first.index, again.index)
    assert torch.equal(first.u, again.u)
    assert torch.equal(first.eps, again.eps)
    assert not torch.equal(Draws(2, 100, 33, (4,))(7).u, first.u)
    # A batch of another size begins with the same samples.
    assert torch.equal(Draws(1, 70, 33, (4,))(0).eps, a(0).eps[:70])
    assert torch.equal(Draws(1, 70, 33, (4,))(0).u, a(0).u[:70])


def test_every_epoch_sees_every_sample_once():
    draws = Draws(0, 10, 35, (1,))
    seen = torch.cat([draws(step).index for step in range(7)])
    for epoch in seen.split(35):
        assert torch.equal(epoch.sort().values, torch.arange(35))
    assert not torch.equal(seen[:35], seen[35:])


def test_noise_is_standard_normal_and_uniform():
    draws = Draws(0, 512, 100, (16,))
    eps, u = zip(*((b.eps.clone(), b.u) for b in map(draws, range(40))), strict=True)
    eps, u = torch.cat(eps), torch.cat(u)
    assert abs(eps.mean()) < 0.01
    assert abs(eps.std() - 1) < 0.01
    assert (eps.flatten().sort().values.diff() == 0).float().mean() < 0.02  # no repeated blocks
    torch.testing.assert_close(u.sort().values, torch.linspace(0, 1, len(u)).double(), rtol=0, atol=0.02)
    assert len(u.unique()) == len(u)


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, precision):
    whole, first, second = (trainer(precision=precision) for _ in range(3))
    list(whole.run())
    for step in first.run():
        if step == 23:
            break
    first.save(tmp_path / "state.safetensors")
    second.restore(tmp_path / "state.safetensors")
    assert second.step == 23
    list(second.run())
    for a, b in ((whole.trainee.state_dict(), second.trainee.state_dict()), (tensors(whole), tensors(second))):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole.history == second.history


def test_a_state_of_another_run_is_refused(tmp_path):
    trainer().save(tmp_path / "state.safetensors")
    other = trainer(net=rp.networks.MLP(6, 16, 3))
    with pytest.raises(SpecError, match="does not belong to this run"):
        other.restore(tmp_path / "state.safetensors")
    (tmp_path / "state.safetensors").write_bytes(b"cut short")
    with pytest.raises(SpecError, match="not a readable safetensors file"):
        trainer().restore(tmp_path / "state.safetensors")


def test_training_learns_and_the_average_follows():
    t = trainer(steps=300, lr=3e-3)
    before = t.validation.errors(t.denoiser)
    list(t.run())
    after = t.validation.errors(t.denoiser)
    assert sum(after) < 0.6 * sum(before)
    assert t.history[-1]["x0_error"] == after  # measured at the end
    average = t.denoiser.net.state_dict()
    assert all(not torch.equal(average[name], value) for name, value in t.trainee.net.state_dict().items())


def test_validation_is_the_same_for_every_target_and_knows_the_truth():
    t = trainer()
    v = t.validation

    class Truth(nn.Module):
        """An x0 network that looks the answer up."""

        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1))
            self.at = 0

        def forward(self, x, time):
            self.at += len(x)
            return v.x0[self.at - len(x) : self.at]

    assert v.errors(rp.Denoiser(Truth(), "rectified_flow", "x0")) == [0] * 5

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1))

        def forward(self, x, time):
            return t.data.train.mean(0).expand_as(x)

    for error in v.errors(rp.Denoiser(Mean(), "rectified_flow", "x0")):
        assert error == pytest.approx(1, abs=0.35)  # guessing the mean; 32 samples a bin


def test_divergence_stops_the_run():
    class Exploding(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))
            self.calls = 0

        def forward(self, x, time):
            self.calls += 1
            return x * self.w * (math.inf if self.calls == 12 else 1)

    t = trainer(net=Exploding())
    with pytest.raises(Diverged, match=r"the loss became (inf|nan) at step 12"):
        list(t.run())
    assert t.step == 12
    assert all(bool(p.isfinite().all()) for p in t.trainee.parameters())  # the bad step was not taken


def test_learning_rate_shape():
    config = TrainConfig(steps=100, warmup=10, lr=2.0)
    assert config.lr_at(0) == pytest.approx(0.2)
    assert config.lr_at(9) == pytest.approx(2.0)
    assert config.lr_at(55) == pytest.approx(1.0)
    assert config.lr_at(99) < 0.01
    assert TrainConfig(decay="constant", warmup=0, lr=2.0).lr_at(1999) == 2.0
    assert TrainConfig(steps=100, decay="linear", warmup=0, lr=2.0).lr_at(50) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"batch": 0}, {"lr": 0.0}, {"lr": math.nan}, {"ema": 1.0}, {"clip": -1.0}]
)
def test_bad_settings(bad):
    with pytest.raises(ReparamError, match=f"train.{next(iter(bad))} must"):
        TrainConfig(**bad)


def test_dropout_is_a_function_of_the_step_too():
    def run(disturb):
        torch.manual_seed(0)
        net = nn.Sequential(rp.networks.MLP(6, 32, 3))

        class Dropping(nn.Module):
            def __init__(self):
                super().__init__()
                self.net, self.drop = net[0], nn.Dropout(0.5)

            def forward(self, x, time):
                return self.net(self.drop(x), time)

        t = trainer(net=Dropping(), steps=5)
        for _ in t.run():
            if disturb:
                torch.rand(3)  # what else happens in the process
        return [h["loss"] for h in t.history]

    assert run(False) == run(True)


# ------------------------------------------------------------------------- how a step is computed


def pictures(n=60, spread=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, 8, 8, generator=generator)
    std = 0.3 * torch.rand(n, 3, 8, 8, generator=generator) if spread else None
    return Data("noise", train=x, heldout=x[:10], spread=std)


def of_pictures(net, data=None, **options):
    data = data or pictures()
    config = TrainConfig(**{"steps": 4, "batch": 12, "lr": 1e-3, "warmup": 1, "precision": "float32", **options})
    torch.manual_seed(0)
    objective = rp.Objective("rectified_flow", "velocity")
    validation = Validation.draw(data, (0.0, 1.0), bins=2, each=8)
    return Trainer(net(), objective, data, config, validation=validation, seed=1)


def jit():
    return rp.networks.JiT(8, 4, 3, width=16, depth=2, heads=2, bottleneck=8)


def trained(t):
    list(t.run())
    return {name: value.contiguous() for name, value in t.trainee.state_dict().items()}


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_accumulating_leaves_the_numbers_alone(parts):
    whole, split = trained(of_pictures(jit)), trained(of_pictures(jit, accumulate=parts))
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=1e-5, atol=1e-6)


def test_checkpointed_activations_leave_the_numbers_alone():
    plain, less = trained(of_pictures(jit)), trained(of_pictures(jit, checkpoint_activations=True))
    assert all(torch.equal(plain[name], less[name]) for name in plain)
    with pytest.raises(NetworkError, match="train.checkpoint_activations: MLP has no method"):
        trainer(checkpoint_activations=True)


def test_channels_last_leaves_the_numbers_alone():
    pytest.importorskip("diffusers")

    def unet():
        return rp.networks.UNet(8, 3, widths=[32, 32])

    plain, last = of_pictures(unet), of_pictures(unet, channels_last=True)
    kernel = next(m.weight for m in last.trainee.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert trained(plain).keys() == trained(last).keys()
    for one, other in zip(plain.history, last.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_a_run_in_another_memory_layout_resumes_to_the_bit(tmp_path):
    """The optimiser's moments are stored in rows; fused kernels rely on their having the parameters' layout."""
    pytest.importorskip("diffusers")

    def started():
        return of_pictures(lambda: rp.networks.UNet(8, 3, widths=[32, 32]), channels_last=True)

    whole, first, second = started(), started(), started()
    expected = trained(whole)
    for step in first.run():
        if step == 2:
            break
    first.save(tmp_path / "state.safetensors")
    second.restore(tmp_path / "state.safetensors")
    found = trained(second)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_is_averaged_and_saved_under_its_own_names(tmp_path):
    plain, compiled = of_pictures(jit), of_pictures(jit, compile=True)
    one, other = trained(plain), trained(compiled)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)
    compiled.save(tmp_path / "state.safetensors")
    again = of_pictures(jit)
    again.restore(tmp_path / "state.safetensors")
    assert all(torch.equal(tensors(again)[name], value) for name, value in tensors(compiled).items())


def test_data_with_a_standard_deviation_are_trained_on_as_gaussians():
    data = pictures(spread=True)
    t = of_pictures(jit, data)
    batch = t.batches(0)
    index = t.batches.draws.index(0)
    assert torch.equal(batch.spread, data.spread[index])
    times = t.trainee.objective.times_at(batch.u)
    expected = t.trainee.objective(t.trainee.net, data.train[index], times, batch.eps, x0_std=data.spread[index])
    loss, _ = t.update()
    assert float(loss) == pytest.approx(float(expected.detach().mean()), rel=1e-6)


def test_an_average_that_does_not_follow_is_found_at_once():
    t = trainer()
    t.averages = Averages(copy.deepcopy(t.trainee), (0.99,))
    with pytest.raises(AverageStuck, match="do not follow the network"):
        t.update()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"also_ema": [0.9, 1.0]}, r"train.also_ema must lie in \[0, 1\)"),
        ({"ema": 0.9, "also_ema": [0.9]}, "repeats a decay"),
        ({"ema_widths": [0.05, 0.4]}, r"train.ema_widths must lie in \(0, 0.2887\]"),
        ({"ema_widths": [0.05]}, "two different widths"),
        ({"accumulate": 0}, "train.accumulate must be at least 1"),
    ],
)
def test_bad_settings_of_averages_and_parts(bad, words):
    with pytest.raises(ReparamError, match=words):
        TrainConfig(**bad)


def test_a_part_of_a_batch_draws_the_same_numbers():
    """Whatever the parts, and however large the samples, which decides how many are drawn from one generator."""
    order = Order(3, 1000)
    for shape in ((4,), (3, 64, 64)):
        whole = Draws(3, 24, order, shape)(5)
        for cuts in ((0, 12, 24), (0, 5, 6, 24)):
            parts = [Draws(3, 24, order, shape, part=part)(5) for part in itertools.pairwise(cuts)]
            assert torch.equal(torch.cat([p.eps for p in parts]), whole.eps)
            assert torch.equal(torch.cat([p.index for p in parts]), whole.index)
            assert torch.equal(torch.cat([p.coins for p in parts], dim=1), whole.coins)
            assert all(torch.equal(p.u, whole.u) for p in parts)


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's setting")
def test_memory_that_is_freed_is_kept():
    """In a process of its own: blocks asked for again and again are not cleared by the system every time."""
    code = (
        "import resource, sys, torch\n"
        "from reparam.training.memory import keep_freed_memory\n"
        "assert sys.argv[1] == 'no' or keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "x = torch.zeros(2**21)\n"
        "for i in range(22):\n"
        "    before = faults() if i == 2 else before if i > 2 else 0\n"
        "    y = [x + 1, x + 2]\n"
        "    del y\n"
        "print(faults() - before)\n"
    )
    found = {}
    for keep in ("no", "yes"):
        done = subprocess.run(
            [sys.executable, "-c", code, keep], capture_output=True, text=True, check=True, timeout=120
        )
        found[keep] = int(done.stdout)
    assert found["yes"] < 2000
    assert found["no"] > 10 * found["yes"]
