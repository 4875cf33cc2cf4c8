import math

import pytest
import torch
from torch import nn

import reparam as rp
from oracles import GaussianOracle
from reparam.errors import ReparamError, TimeOutOfRange, UnknownName, Unsupported
from reparam.samplers import SAMPLERS

MEAN = torch.tensor([0.7, -1.1, 0.3], dtype=torch.float64)
_A = torch.tensor([[1.0, 0.2, 0.0], [0.3, 0.5, 0.1], [0.0, -0.2, 0.3]], dtype=torch.float64)
COV = _A @ _A.T
SMOOTH = [rp.RectifiedFlow(), rp.RectifiedFlow(2.0), rp.Cosine()]
SCHEDULES = [*SMOOTH, rp.DDPM()]


def oracle(schedule, target="v"):
    t_range = (0.0, 0.98) if target == "eps" else (0.0, 1.0)
    net = GaussianOracle(MEAN, COV, schedule, rp.target(target))
    return net, rp.Denoiser(net, schedule, target, t_range=t_range)


def noise(n=16):
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_measured_order_is_the_declared_one(name, schedule):
    """Against the exact flow of a Gaussian, between two interior times, by regression."""
    method = SAMPLERS[name]()
    if method.needs_smooth and not schedule.smooth:
        with pytest.raises(Unsupported, match=f"{name} steps in t.*use sampler='ddim'"):
            rp.sample(oracle(schedule)[1], noise(), sampler=name)
        return
    net, denoiser = oracle(schedule)
    # On the steps of a table, whose kinks between them would spoil the order.
    start, end = 0.9, 0.1
    x = noise()
    truth = net.flow(x * schedule.sigma(start), start, end)
    counts = [10, 20, 40, 80, 160]
    errors = []
    for n in counts:
        grid = torch.linspace(start, end, n + 1, dtype=torch.float64)
        got = rp.sample(denoiser, x, sampler=name, times=grid)
        errors.append((got - truth).norm().item())
    slope = -torch.tensor(errors).log().diff() / math.log(2)
    assert slope[-2:].mean().item() == pytest.approx(method.order, abs=0.15), errors


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_oracle_takes_the_same_way_through_any_target(schedule):
    names = [n for n in SAMPLERS if schedule.smooth or not SAMPLERS[n].needs_smooth]
    grid = [0.98, 0.8, 0.5, 0.3, 0.05, 0.0]
    for name in names:
        ways = [
            rp.sample(oracle(schedule, target)[1], noise(), sampler=name, times=grid, trajectory=True)
            for target in ("x0", "eps", "v", "velocity")
        ]
        for way in ways[1:]:
            torch.testing.assert_close(way.states, ways[0].states, rtol=0, atol=1e-10)
            torch.testing.assert_close(way.x0, ways[0].x0, rtol=0, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_propagates_mean_and_covariance_as_derived(eta):
    """One affine step on the Gaussian oracle: its mean and covariance, computed exactly, equal the
    true marginal's at s for η = 1 in the limit, and DDIM's own formula for any η."""
    schedule, t, s = rp.Cosine(), 0.6, 0.5
    _net, denoiser = oracle(schedule)
    method = rp.DDIM(eta)
    zero = torch.zeros(1, 3, dtype=torch.float64)

    def step(x, z):
        at = rp.samplers.Step(t, s, schedule, lambda x, t: denoiser(x, t), lambda: z)
        return method.step(x, at)[0]

    offset = step(zero, zero)
    matrix = torch.cat([step(e[None], zero) - offset for e in torch.eye(3, dtype=torch.float64)])
    spread = step(zero, torch.ones_like(zero)) - offset
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    marginal = alpha**2 * COV + sigma**2 * torch.eye(3, dtype=torch.float64)
    gain = alpha * COV @ torch.linalg.inv(marginal)
    tilde = sigma_s**2 * (1 - (alpha * sigma_s / (alpha_s * sigma)) ** 2)
    # x_s = (α_s − kα) x̂0 + k x_t + η σ̃ z
    k = (sigma_s**2 - eta**2 * tilde).sqrt() / sigma
    torch.testing.assert_close(matrix.T, (alpha_s - k * alpha) * gain + k * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(spread, (eta * tilde.sqrt()).expand(1, 3))
    # The mean of the marginal is carried over exactly.
    torch.testing.assert_close(step((alpha * MEAN)[None], zero), (alpha_s * MEAN)[None])


def test_eta_one_is_exact_for_a_point_mass():
    """With all data at one point the ancestral step samples the true posterior: σ_s² in all."""
    schedule = rp.RectifiedFlow()
    net = GaussianOracle(MEAN, torch.zeros(3, 3, dtype=torch.float64), schedule, rp.target("x0"))
    denoiser = rp.Denoiser(net, schedule, "x0")
    x = noise(200_000) * 0.8 + 0.2 * MEAN
    z = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    at = rp.samplers.Step(0.8, 0.4, schedule, lambda x, t: denoiser(x, t), lambda: z)
    x_s, _ = rp.DDIM(eta=1.0).step(x, at)
    torch.testing.assert_close(x_s.mean(0), 0.6 * MEAN, rtol=0, atol=0.005)
    torch.testing.assert_close(x_s.var(0), torch.full((3,), 0.16, dtype=torch.float64), rtol=0.02, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_is_diffusers(prediction_type, eta):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        prediction_type=prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    theirs.alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    theirs.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    theirs.set_timesteps(50)
    schedule = rp.DDPM()
    net = GaussianOracle(MEAN, COV, schedule, rp.target(prediction_type))
    ddpm_times = [*schedule.time(theirs.timesteps).tolist(), 0.0]

    x = noise() * schedule.sigma(ddpm_times[0])
    fresh = torch.Generator().manual_seed(3)
    states = [x]
    for k in theirs.timesteps:
        output = net(x, schedule.time(k).expand(len(x)))
        z = (
            torch.randn(x.shape, dtype=torch.float64, generator=fresh)
            if k > theirs.timesteps[-1]
            else torch.zeros_like(x)
        )
        x = theirs.step(output, int(k), x, eta=eta, variance_noise=z if eta else None).prev_sample
        states.append(x)
    denoiser = rp.Denoiser(net, schedule, prediction_type)
    ours = rp.sample(
        denoiser,
        noise(),
        sampler=rp.DDIM(eta),
        times=ddpm_times,
        generator=torch.Generator().manual_seed(3),
        trajectory=True,
    )
    torch.testing.assert_close(ours.states, torch.stack(states), rtol=0, atol=1e-6)


def test_euler_on_the_flow_is_diffusers_flow_matching():
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    sigmas = torch.linspace(1.0, 0.02, 50, dtype=torch.float64)
    theirs.set_timesteps(sigmas=sigmas.tolist())
    schedule = rp.RectifiedFlow()
    net, denoiser = oracle(schedule, "velocity")
    x = noise().float()
    for sigma, k in zip(sigmas, theirs.timesteps, strict=True):
        x = theirs.step(net(x.double(), sigma.expand(len(x))).float(), k, x).prev_sample
    ours = rp.sample(denoiser, noise(), sampler="euler", times=[*sigmas.tolist(), 0.0])
    torch.testing.assert_close(ours.float(), x, rtol=0, atol=1e-5)


def test_samples_reach_the_data_distribution():
    denoiser = oracle(rp.RectifiedFlow())[1]
    x = rp.sample(denoiser, noise(100_000), steps=40)
    torch.testing.assert_close(x.mean(0), MEAN, rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(x.T), COV, rtol=0.02, atol=0.02)


def test_trajectory_holds_the_belief_at_every_step():
    way = rp.sample(
        oracle(rp.Cosine())[1], (4, 3), steps=7, trajectory=True, generator=torch.Generator().manual_seed(0)
    )
    assert way.x0.shape == (7, 4, 3)
    assert way.states.shape == (8, 4, 3)
    assert way.times[0] == 1.0
    assert way.times[-1] == 0.0
    assert torch.equal(way.x, way.states[-1])
    assert torch.equal(way.x, way.x0[-1])  # the last step returns the estimate, without a division


class Counting(nn.Module):
    """A zero network in evaluation mode that notes when it was called."""

    def __init__(self):
        super().__init__()
        self.times = []

    def forward(self, x, time):
        assert not self.training
        self.times.append(float(time[0]))
        return torch.zeros_like(x)


def test_the_network_is_asked_inside_t_range_only_and_left_as_it_was():
    net = Counting().train()
    denoiser = rp.Denoiser(net, "rectified_flow", "eps", t_range=(0.1, 0.9))
    x = rp.sample(denoiser, (2, 3), sampler="euler", steps=20)
    assert net.times[0] == pytest.approx(0.9)
    assert min(net.times) >= 0.1 - 1e-7
    assert len(net.times) == 20
    assert net.training
    assert x.dtype == torch.float32
    assert not x.requires_grad


def test_grid_on_the_steps_of_a_table():
    net = Counting()
    denoiser = rp.Denoiser(net, "ddpm", "eps", time="step")
    rp.sample(denoiser, (2, 3), sampler="ddim", steps=7)
    assert net.times[0] == 999
    assert all(t == int(t) for t in net.times)
    with pytest.raises(Unsupported, match="more than this table of 1000"):
        rp.sample(denoiser, (2, 3), sampler="ddim", steps=1001)


def test_noise_and_dtype():
    denoiser = oracle(rp.RectifiedFlow(2.0))[1]
    unit = noise()
    half = rp.sample(rp.Denoiser(Counting(), rp.RectifiedFlow(2.0), "x0"), unit.to(torch.bfloat16), steps=2)
    assert half.dtype == torch.float32  # the state is never below float32
    way = rp.sample(denoiser, unit, steps=3, trajectory=True)
    torch.testing.assert_close(way.states[0], 2 * unit)  # multiplied by σ(1) = 2
    a = rp.sample(denoiser, (3, 3), steps=3, generator=torch.Generator().manual_seed(5))
    b = rp.sample(denoiser, (3, 3), steps=3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(a, b)


def test_a_grid_that_ends_above_zero_returns_x_there():
    schedule = rp.RectifiedFlow()
    net, denoiser = oracle(schedule)
    x = rp.sample(denoiser, noise(), times=torch.linspace(1, 0.5, 201).double())
    torch.testing.assert_close(x, net.flow(noise(), 1.0, 0.5), rtol=0, atol=1e-4)


BAD = [
    ({"sampler": "huen"}, UnknownName, "Did you mean 'heun'"),
    ({"times": [0.2, 0.5]}, ReparamError, "falling"),
    ({"times": [0.99, 0.5, 0.0]}, TimeOutOfRange, r"0.99, but this model was trained on t in \[0, 0.9\]"),
    ({"steps": 0}, Unsupported, "positive integer, found 0"),
    ({"steps": 2.5}, Unsupported, "positive integer, found 2.5"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_requests(options, error, message):
    denoiser = rp.Denoiser(Counting(), "rectified_flow", "eps", t_range=(0.0, 0.9))
    with pytest.raises(error, match=message):
        rp.sample(denoiser, (2, 3), **options)
    with pytest.raises(ReparamError, match="a batch and the data's own shape"):
        rp.sample(denoiser, (2, 0))
    with pytest.raises(Unsupported, match="eta"):
        rp.DDIM(eta=1.5)
