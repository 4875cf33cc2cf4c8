import pytest
import torch
from torch import nn

import reparam as rp
from reparam.errors import Conflict, ReparamError
from reparam.guidance import ClassifierFree

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
