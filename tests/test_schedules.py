import math

import pytest
import torch

import reparam as rp
from reparam.errors import TimeOutOfRange, UnknownName, Unsupported

SCHEDULES = [rp.RectifiedFlow(), rp.RectifiedFlow(noise_scale=4.0), rp.Cosine(), rp.DDPM(), rp.DDPM(T=50)]
ids = [str(s) for s in SCHEDULES]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
def test_data_end_is_exact(schedule):
    assert schedule.alpha(0.0).item() == 1
    assert schedule.sigma(0.0).item() == 0
    assert schedule.log_snr(0.0).item() == math.inf
    assert schedule.time_at(math.inf).item() == 0


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s.smooth], ids=str)
def test_noise_end_is_exact(schedule):
    assert schedule.alpha(1.0).item() == 0
    assert schedule.sigma(1.0).item() == getattr(schedule, "noise_scale", 1.0)
    assert schedule.log_snr(1.0).item() == -math.inf
    assert schedule.time_at(-math.inf).item() == 1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
def test_derivatives_match_finite_differences(schedule):
    # Midway between a table's steps, where it is smooth.
    t = (
        (torch.arange(49, dtype=torch.float64) + 0.5) / 50
        if not schedule.smooth
        else torch.linspace(0.01, 0.99, 49).double()
    )
    t = t if schedule.smooth else (torch.round(t * schedule.T) + 0.5) / schedule.T
    h = 1e-7
    for value, slope in ((schedule.alpha, schedule.alpha_dot), (schedule.sigma, schedule.sigma_dot)):
        numeric = (value(t + h) - value(t - h)) / (2 * h)
        torch.testing.assert_close(slope(t), numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
def test_time_at_inverts_log_snr(schedule):
    t = torch.cat([torch.logspace(-9, -1, 50), torch.linspace(0.1, 0.999, 99)]).double()
    torch.testing.assert_close(schedule.time_at(schedule.log_snr(t)), t, rtol=1e-9, atol=1e-13)


def test_ddpm_is_diffusers_table():
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear").alphas_cumprod
    ddpm = rp.DDPM()
    t = ddpm.time(torch.arange(1000))
    torch.testing.assert_close(ddpm.alpha(t) ** 2, theirs.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ddpm.alpha(t) ** 2 + ddpm.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-15)
    # Against the product itself, in float64.
    product = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    torch.testing.assert_close(ddpm.alpha(t) ** 2, product, rtol=1e-12, atol=0)


def test_ddpm_steps_and_angles():
    ddpm = rp.DDPM()
    k = torch.arange(1000)
    assert torch.equal(ddpm.step(ddpm.time(k)), k)
    assert torch.equal(ddpm.step(ddpm.time(k).float()), k)  # float32 times find their step too
    between = ddpm.time(torch.tensor([10, 500])) + 0.5 / 1000
    angle = lambda t: torch.atan2(ddpm.sigma(t), ddpm.alpha(t))  # noqa: E731
    middle = (angle(ddpm.time(torch.tensor([10, 500]))) + angle(ddpm.time(torch.tensor([11, 501])))) / 2
    torch.testing.assert_close(angle(between), middle, rtol=0, atol=1e-14)
    with pytest.raises(TimeOutOfRange, match=r"t = 0\.0115 is not a step"):
        ddpm.step(0.0115)
    with pytest.raises(TimeOutOfRange, match="0 to 999"):
        ddpm.time(1000)
    # Uniform times rounded up to steps are uniform steps.
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert torch.equal(ddpm.step(ddpm.on_steps(u)).bincount(), torch.full((1000,), 10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_at_least_float32(dtype):
    value = rp.Cosine().alpha(torch.tensor([0.25, 0.5], dtype=dtype))
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert value.shape == (2,)
    assert rp.Cosine().alpha(0.5).dtype == torch.float64


def test_add_noise_broadcasts_over_the_batch():
    x0, eps = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t = torch.tensor([0.0, 0.5, 1.0])
    x = rp.RectifiedFlow().add_noise(x0, eps, t)
    assert torch.equal(x[0], x0[0])
    assert torch.equal(x[2], eps[2])
    torch.testing.assert_close(x[1], (x0[1] + eps[1]) / 2)


@pytest.mark.parametrize("t", [-0.1, 1.5, 999.0, float("nan"), torch.tensor([0.5, 250.0])])
def test_times_outside_the_unit_interval_are_refused(t):
    with pytest.raises(TimeOutOfRange, match=r"from 0 \(data\) to 1 \(noise\)"):
        rp.Cosine().alpha(t)


def test_unreachable_log_snr_is_refused():
    with pytest.raises(TimeOutOfRange, match="never becomes pure noise"):
        rp.DDPM().time_at(-30.0)


def test_by_name():
    assert rp.schedule({"name": "rectified_flow", "noise_scale": 2.0}) == rp.RectifiedFlow(2.0)
    for s in SCHEDULES:
        assert rp.schedule(s.config()) == s
    with pytest.raises(UnknownName, match="Did you mean 'cosine'"):
        rp.schedule("cosin")
    with pytest.raises(UnknownName, match="noise_scale"):
        rp.schedule({"name": "rectified_flow", "noisescale": 2.0})
    with pytest.raises(Unsupported, match="positive"):
        rp.RectifiedFlow(-1.0)


def test_float32_times_find_their_own_interval():
    ddpm = rp.DDPM()
    for k in (2, 500, 999):
        exact = float(ddpm.time(k))
        rounded = torch.tensor(exact, dtype=torch.float32)
        assert ddpm.alpha_dot(rounded).item() == pytest.approx(ddpm.alpha_dot(exact).item(), rel=1e-4)
        assert ddpm.on_steps(rounded).item() == pytest.approx(exact, abs=1e-12)
