import pytest
import torch
from torch import nn

import reparam as rp
from oracles import GaussianOracle
from reparam.errors import Conflict, ReparamError, Unsupported
from reparam.guidance import Autoguidance, ClassifierFree

NONE = 3  # the label that means "no label"


class Shifted(nn.Module):
    """x0 is the class number everywhere (and 10 without a label), said as any target."""

    def __init__(self, target="x0"):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.target, self.calls, self.seen = target, 0, []

    def forward(self, x, time, y, extra=None):
        self.calls += 1
        self.seen.append(y.clone())
        x0 = torch.where(y == NONE, 10.0, y.float())[:, None].expand_as(x)
        if extra is not None:
            x0 = x0 + extra
        return rp.convert(x0, x, time, rp.RectifiedFlow(), source="x0", to=self.target)


def denoiser(target="x0", classes=("a", "b", "c")):
    return rp.Denoiser(Shifted(target), "rectified_flow", target, t_range=(0.0, 0.98), data={"classes": list(classes)})


x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
y = torch.tensor([0, 1, 2])


@pytest.mark.parametrize("target", ["x0", "v", "velocity", "eps"])
def test_the_mean_is_extrapolated_alike_whatever_the_network_predicts(target):
    guided = ClassifierFree(denoiser(target), 2.5)
    mean = guided(x, 0.4, y=y).mean
    expected = (10 + 2.5 * (y.float() - 10))[:, None].expand(3, 5)
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-4)


def test_the_interval_is_in_t_and_closed_and_by_sample():
    guided = ClassifierFree(denoiser(), 3.0, (0.2, 0.6))
    conditional, full = y.float(), 10 + 3 * (y.float() - 10)
    for t, expected in ((0.1, conditional), (0.2, full), (0.6, full), (0.61, conditional)):
        assert torch.allclose(guided(x, t, y=y).mean[:, 0], expected), t
    mixed = guided(x, torch.tensor([0.1, 0.5, 0.9]), y=y).mean[:, 0]
    assert torch.allclose(mixed, torch.stack([conditional[0], full[1], conditional[2]]))


def test_one_evaluation_of_a_doubled_batch_and_a_plain_one_where_there_is_no_guidance():
    inner = denoiser()
    guided = ClassifierFree(inner, 2.0, (0.0, 0.5))
    guided(x, 0.4, y=y)
    assert [len(s) for s in inner.net.seen] == [6]
    assert inner.net.seen[0].tolist() == [0, 1, 2, NONE, NONE, NONE]
    guided(x, 0.7, y=y)
    ClassifierFree(inner, 1.0)(x, 0.4, y=y)
    assert [len(s) for s in inner.net.seen] == [6, 3, 3]


def test_other_conditions_go_along():
    guided = ClassifierFree(denoiser(), 2.0)
    extra = torch.full((3, 5), 0.5)
    mean = guided(x, 0.4, y=y, extra=extra).mean
    assert torch.allclose(mean, guided(x, 0.4, y=y).mean + 0.5)


def test_sampling_under_guidance_ends_at_the_guided_mean():
    guided = ClassifierFree(denoiser(), 2.0, (0.0, 0.9))
    out = rp.sample(guided, (3, 5), steps=8, cond={"y": y}, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(out, (10 + 2 * (y.float() - 10))[:, None].expand(3, 5), atol=1e-4)
    assert guided.t_range == guided.inner.t_range
    assert guided.net is guided.inner.net


def test_the_null_label_may_be_given():
    plain = rp.Denoiser(Shifted(), "rectified_flow", "x0")
    guided = ClassifierFree(plain, 2.0, null_label=NONE)
    assert torch.allclose(guided(x, 0.3, y=y).mean[:, 0], 10 + 2 * (y.float() - 10))
    with pytest.raises(Conflict, match="null_label="):
        ClassifierFree(plain, 2.0)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_must_be_finite(weight):
    with pytest.raises(ReparamError, match="finite"):
        ClassifierFree(denoiser(), weight)


@pytest.mark.parametrize("interval", [(0.5, 0.2), (-0.1, 0.5), (0.0, 1.1)])
def test_an_interval_lies_in_0_to_1(interval):
    with pytest.raises(ReparamError, match="interval"):
        ClassifierFree(denoiser(), 2.0, interval)


# --------------------------------------------------------------------------------------- autoguidance


class Constant(nn.Module):
    """x0 is one number, whatever it is asked."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value)))

    def forward(self, x, time, y=None):
        return self.value.expand_as(x)


def constant(value, schedule="rectified_flow"):
    return rp.Denoiser(Constant(value), schedule, "x0")


def test_a_worse_model_guides_inside_the_interval():
    guided = Autoguidance(constant(3.0), constant(1.0), 2.5, (0.2, 0.8))
    for t, expected in ((0.1, 3.0), (0.5, 1 + 2.5 * 2), (0.9, 3.0)):
        assert torch.allclose(guided(x, t).mean, torch.full_like(x, expected)), t
    mixed = guided(x, torch.tensor([0.1, 0.5, 0.9])).mean[:, 0]
    assert torch.allclose(mixed, torch.tensor([3.0, 6.0, 3.0]))
    assert torch.allclose(Autoguidance(constant(3.0), constant(1.0), 1.0)(x, 0.5).mean, torch.full_like(x, 3.0))
    with pytest.raises(ReparamError, match="finite"):
        Autoguidance(constant(3.0), constant(1.0), float("nan"))


def test_a_guide_of_another_schedule_is_matched_by_log_snr():
    guided = Autoguidance(constant(3.0), constant(1.0, "cosine"), 2.0)
    assert guided.guide.schedule == guided.schedule
    assert torch.allclose(guided(x, 0.5).mean, torch.full_like(x, 5.0))


def test_guidance_around_guidance():
    inner = Autoguidance(denoiser(), denoiser(), 2.0)  # the same model twice: no guidance at all
    both = ClassifierFree(inner, 3.0)
    assert torch.allclose(both(x, 0.4, y=y).mean, ClassifierFree(denoiser(), 3.0)(x, 0.4, y=y).mean)
    assert both.net is inner.inner.net
    out = rp.sample(both, (3, 5), steps=4, cond={"y": y}, generator=torch.Generator().manual_seed(0))
    assert out.isfinite().all()


# --------------------------------------------------------------------------------- another schedule


PROCESSES = [rp.RectifiedFlow(2.0), rp.Cosine(), rp.VE(0.01, 60.0), rp.DDPM("scaled_linear", zero_terminal_snr=True)]


def oracle(schedule, target="v"):
    mean = torch.tensor([0.5, -1.0]).double()
    cov = torch.tensor([[0.5, 0.2], [0.2, 0.3]]).double()
    target = rp.target(target)
    return rp.Denoiser(GaussianOracle(mean, cov, schedule, target), schedule, target)


@pytest.mark.parametrize("own", PROCESSES, ids=lambda s: s.name)
@pytest.mark.parametrize("new", PROCESSES, ids=lambda s: s.name)
@pytest.mark.parametrize("target", ["v", "x0"])
def test_a_denoiser_on_another_schedule_is_the_denoiser_of_that_schedule(own, new, target):
    moved, truth = oracle(own, target).on(new), oracle(new, target)
    g = torch.Generator().manual_seed(0)
    low, high = moved.t_range
    for t in torch.linspace(max(low, 0.02), min(high, 0.98), 9).double():
        noisy = new.add_noise(*(torch.randn(6, 2, generator=g, dtype=torch.float64) for _ in range(2)), t)
        torch.testing.assert_close(moved(noisy, t).mean, truth(noisy, t).mean, rtol=1e-7, atol=1e-7)


def test_both_ends_and_batches_of_times_on_another_schedule():
    moved, truth = oracle(rp.RectifiedFlow()).on("cosine"), oracle(rp.Cosine())
    assert moved.t_range == (0.0, 1.0)
    noisy = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([1e-5, 0.5, 1.0]).double()
    mean = moved(noisy, t).mean
    for i in range(3):
        torch.testing.assert_close(mean[i : i + 1], truth(noisy[i : i + 1], t[i]).mean, rtol=0, atol=1e-9)
    at_data = constant(1.0).on("cosine")
    assert torch.equal(at_data(noisy, 0.0).mean, noisy)  # where there is no noise, x_t is the data
    ours = rp.sample(moved, noisy, sampler="heun", steps=12)
    torch.testing.assert_close(ours, rp.sample(truth, noisy, sampler="heun", steps=12), rtol=0, atol=1e-6)


def test_where_it_was_not_trained_it_is_not_used():
    partly = rp.Denoiser(Constant(1.0), "rectified_flow", "eps", t_range=(0.1, 0.9))
    low, high = partly.on("cosine").t_range
    cosine, flow = rp.Cosine(), rp.RectifiedFlow()
    assert float(cosine.log_snr(low)) == pytest.approx(float(flow.log_snr(0.1)))
    assert float(cosine.log_snr(high)) == pytest.approx(float(flow.log_snr(0.9)))
    assert partly.on(rp.VE(0.01, 2.0)).t_range[1] == 1.0  # which never becomes as noisy
    with pytest.raises(Unsupported, match="differs by element"):
        partly.on(rp.Elementwise("cosine", [1.0, 2.0]))
