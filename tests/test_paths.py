"""Schedules beyond the three classics: diffusers' tables, zero terminal SNR, VE, functions of one's own."""

import math

import pytest
import torch

import reparam as rp
from reparam.errors import ReparamError, TimeOutOfRange, UnknownName, Unsupported
from reparam.schedules import BETAS, Path

TABLES = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squared_cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("steps", [1000, 250])
def test_tables_are_those_of_diffusers(betas, zero, steps):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(num_train_timesteps=steps, rescale_betas_zero_snr=zero, **TABLES[betas])
    ours = rp.DDPM(betas, T=steps, zero_terminal_snr=zero)
    k = torch.arange(steps)
    alpha = ours.alpha(ours.time(k))
    # Theirs are products in float32.
    torch.testing.assert_close(alpha**2, theirs.alphas_cumprod.double(), rtol=2e-4, atol=3e-6)
    torch.testing.assert_close(alpha**2 + ours.sigma(ours.time(k)) ** 2, torch.ones(steps).double(), rtol=0, atol=1e-14)
    assert torch.equal(ours.step(ours.time(k)), k)
    assert (float(alpha[-1]) == 0) == zero
    assert math.isinf(float(ours.log_snr(1.0))) == zero


def test_zero_terminal_snr_keeps_the_first_step_and_is_told_apart():
    plain, zero = rp.DDPM("scaled_linear"), rp.DDPM("scaled_linear", zero_terminal_snr=True)
    assert float(zero.alpha(0.001)) == pytest.approx(float(plain.alpha(0.001)), abs=1e-15)
    assert plain != zero
    assert rp.schedule(zero.config()) == zero
    assert rp.target("eps").singular_times(zero) == [1.0]
    assert rp.target("v").singular_times(zero) == []


def test_other_betas():
    own = rp.DDPM("linear", beta_start=0.001, beta_end=0.01)
    assert float(own.alpha(0.001)) == pytest.approx(math.sqrt(1 - 0.001), rel=1e-12)
    with pytest.raises(Unsupported, match="0 < start <= end < 1"):
        rp.DDPM(beta_start=0.5, beta_end=0.1)
    with pytest.raises(Unsupported, match="has no beta_start"):
        rp.DDPM("squared_cosine", beta_start=0.1)
    with pytest.raises(UnknownName, match="scaled_linear"):
        rp.DDPM("scaled")


def test_variance_exploding():
    s = rp.VE(0.01, 50.0)
    assert float(s.sigma(0.0)) == 0
    assert float(s.alpha(0.7)) == 1
    assert float(s.sigma(1.0)) == pytest.approx(50, rel=1e-6)
    # Where the data's end is far, it is the geometric sequence.
    assert float(s.sigma(0.5)) == pytest.approx(math.sqrt(0.01 * 50), rel=1e-3)
    t = torch.linspace(0.01, 1, 50).double()
    torch.testing.assert_close(s.time_at(s.log_snr(t)), t, rtol=1e-10, atol=0)
    for at in (0.1, 0.5, 0.9):
        slope = (s.sigma(at + 1e-6) - s.sigma(at - 1e-6)) / 2e-6
        assert float(s.sigma_dot(at)) == pytest.approx(float(slope), rel=1e-6)
    with pytest.raises(TimeOutOfRange, match="lowest that VE"):
        s.time_at(-20.0)
    with pytest.raises(Unsupported, match="sigma_min < sigma_max"):
        rp.VE(5, 1)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (Path("1 - t", "2 * t"), rp.RectifiedFlow(2.0)),
        (Path("cos(pi * t / 2)", "sin(pi * t / 2)"), rp.Cosine()),
        (Path(lambda t: torch.cos(t * math.pi / 2), lambda t: torch.sin(t * math.pi / 2)), rp.Cosine()),
        (Path("1 - t", "t", alpha_dot_of="-1", sigma_dot_of="1"), rp.RectifiedFlow()),
    ],
    ids=["flow", "cosine", "functions", "derivatives"],
)
def test_a_schedule_from_two_functions_is_the_built_in_one(mine, theirs):
    t = torch.linspace(0.01, 0.99, 50).double()
    for name in ("alpha", "sigma", "alpha_dot", "sigma_dot", "log_snr"):
        torch.testing.assert_close(getattr(mine, name)(t), getattr(theirs, name)(t), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mine.time_at(theirs.log_snr(t)), t, rtol=0, atol=1e-10)
    assert not mine.sigma_dot(t).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(mine.alpha_dot(0.3), theirs.alpha_dot(0.3))


def test_a_path_is_checked():
    with pytest.raises(Unsupported, match="sigma must be 0 and alpha positive; found 0.5"):
        Path("1 - t", "0.5 + t")
    with pytest.raises(Unsupported, match="must fall all the way"):
        Path("1", "t * (1 - t)")
    with pytest.raises(Unsupported, match="finite"):
        Path("1/(1 - t)", "t")
    with pytest.raises(UnknownName, match="'alpha'"):
        Path("alpha", "t")
    with pytest.raises(ReparamError, match="found 3"):
        Path(3, "t")
    with pytest.raises(TimeOutOfRange, match="lowest that Path"):
        Path("1", "t").time_at(-3.0)
    own = Path("1 - t", "t")
    assert rp.schedule(own.config()) == own
    assert rp.schedule({"name": "path", "alpha_of": "1 - t", "sigma_of": "t"}) == own
    with pytest.raises(Unsupported, match="cannot be written down"):
        Path(lambda t: 1 - t, "t").config()
    with pytest.raises(ReparamError, match="schedule 'path' needs alpha_of and sigma_of"):
        rp.schedule("path")
