"""Whole trajectories against k-diffusion, on the exact network for Gaussian data, in float64.

Theirs counts noise in σ/α and has states x/α; it gets the same network as ours, in its own wrappers.
The package imports torchvision, CLIP and more, which the samplers and wrappers do without: only those
submodules are loaded.
"""

import math

import pytest
import torch

import reparam as rp
from peers.side_by_side import draws, network, noise, ours, seeded, submodules
from reparam.samplers import EDM, Ancestral, DPMpp2M, SDEDPMpp2M, grids

sampling, external, layers = submodules(
    "k_diffusion",
    ["sampling", "external", "layers"],
    without=[
        "dctorch",
        "dctorch.functional",
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.functional",
    ],
)

HIGH, LOW, STEPS = 80.0, 0.002, 20
SCHEDULES = [rp.Cosine(), rp.RectifiedFlow(), rp.schedules.VE(0.002, 100.0)]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)


def time_of(sigma, schedule):
    return float(schedule.time_at(-2 * math.log(sigma))) if sigma > 0 else 0.0


def sigmas_of(times, schedule):
    t = torch.tensor(times, dtype=torch.float64)
    return schedule.sigma(t) / schedule.alpha(t)


def wrapped(net):
    """Their model, the posterior mean at x/α and σ/α, from our network for any schedule."""

    def model(x, sigma):
        t = time_of(float(sigma[0]), net.schedule)
        return net.posterior_mean(x * net.schedule.alpha(t), t)

    return model


def theirs(sampler, model, schedule, start, times, **options):
    """The states at the times, as x_t: theirs tells them by its callback."""
    alpha, states = schedule.alpha(torch.tensor(times, dtype=torch.float64)), []

    def keep(told):
        states.append(told["x"])

    x = start / alpha[0]
    end = seeded(lambda: sampler(model, x, sigmas_of(times, schedule), callback=keep, disable=True, **options))
    return torch.stack([*states, end]) * alpha[:, None, None]


def agree(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def set_up(schedule, prediction="v_prediction", steps=STEPS):
    net, denoiser = network(prediction, schedule, t_range=(0.0, 0.999))
    times = grids.karras(denoiser, steps, start=time_of(HIGH, schedule), last=time_of(LOW, schedule))
    return net, denoiser, times, noise() * schedule.sigma(times[0])


@every_schedule
@pytest.mark.parametrize("rho", [7.0, 3.0])
def test_karras_grid(schedule, rho):
    """Theirs is in float32."""
    _, denoiser = network("v_prediction", schedule)
    ends = {"start": time_of(HIGH, schedule), "last": time_of(LOW, schedule)}
    expected = sampling.get_sigmas_karras(STEPS, LOW, HIGH, rho=rho).double()
    found = sigmas_of(grids.karras(denoiser, STEPS, rho=rho, **ends), schedule)
    torch.testing.assert_close(found, expected, rtol=3e-6 * rho, atol=0)


@every_schedule
def test_exponential_grid(schedule):
    _, denoiser = network("v_prediction", schedule)
    ends = {"start": time_of(HIGH, schedule), "last": time_of(LOW, schedule)}
    expected = sampling.get_sigmas_exponential(STEPS, LOW, HIGH).double()
    found = sigmas_of(grids.log_snr(denoiser, STEPS, **ends), schedule)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


DETERMINISTIC = [
    (sampling.sample_euler, rp.DDIM()),
    (sampling.sample_heun, EDM()),
    (sampling.sample_dpmpp_2m, DPMpp2M()),
]
every_prediction = pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])


@every_schedule
@every_prediction
@pytest.mark.parametrize(("sampler", "method"), DETERMINISTIC, ids=["euler", "heun", "dpmpp_2m"])
def test_deterministic(schedule, prediction, sampler, method):
    net, denoiser, times, start = set_up(schedule, prediction)
    agree(ours(denoiser, start, method, times), theirs(sampler, wrapped(net), schedule, start, times))


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ancestral(schedule, eta):
    """Its Euler steps with noise are DDIM's, eta for eta."""
    net, denoiser, times, start = set_up(schedule)
    states = theirs(sampling.sample_euler_ancestral, wrapped(net), schedule, start, times, eta=eta)
    zs = draws(start, STEPS)
    agree(ours(denoiser, start, rp.DDIM(eta), times, noises=zs), states)
    if eta == 1:
        agree(ours(denoiser, start, Ancestral("small"), times, noises=zs), states)


@every_schedule
def test_dpmpp_2m_sde(schedule):
    """With the same noise in place of its Brownian tree."""
    net, denoiser, times, start = set_up(schedule)
    zs = draws(start, STEPS)
    given = iter(zs)
    states = theirs(
        sampling.sample_dpmpp_2m_sde, wrapped(net), schedule, start, times, noise_sampler=lambda here, to: next(given)
    )
    agree(ours(denoiser, start, SDEDPMpp2M(), times, noises=zs), states)


@every_schedule
def test_dpmpp_2m_sde_without_noise_is_dpmpp_2m(schedule):
    net, denoiser, times, start = set_up(schedule)
    options = {"eta": 0.0, "noise_sampler": lambda here, to: None}
    states = theirs(sampling.sample_dpmpp_2m_sde, wrapped(net), schedule, start, times, **options)
    agree(ours(denoiser, start, DPMpp2M(), times), states)


@every_schedule
@pytest.mark.parametrize("limits", [(0.0, 79.0), (0.05, 50.0)])
def test_heun_with_churn(schedule, limits):
    """Theirs draws noise at every step, ours where there is churn. The first σ has none: from there it would
    lead beyond all noise of the process."""
    net, denoiser, times, start = set_up(schedule)
    low, high = limits
    churned = [low <= s <= high for s in sigmas_of(times[:-1], schedule).tolist()]
    zs = draws(start, STEPS)[churned]
    options = {"s_churn": 10.0, "s_tmin": low, "s_tmax": high, "s_noise": 1.003}
    # Only the end: the callback is told the state after noise was added.
    end = theirs(sampling.sample_heun, wrapped(net), schedule, start, times, **options)[-1]
    method = EDM(churn=10.0, s_min=low, s_max=high, s_noise=1.003)
    assert 0 < len(zs) < STEPS
    agree(ours(denoiser, start, method, times, noises=zs)[-1], end)


def test_v_wrapper():
    """VDenoiser's v and time, atan(σ)·2/π, are those of our cosine path."""
    net, denoiser, times, start = set_up(rp.Cosine())
    states = theirs(sampling.sample_heun, external.VDenoiser(net), rp.Cosine(), start, times)
    agree(ours(denoiser, start, "edm", times), states)


class AtTimes(torch.nn.Module):
    """A network called with integer steps, as the oracle of the table's times."""

    def __init__(self, net, table):
        super().__init__()
        self.net, self.table = net, table

    def forward(self, x, step):
        return self.net(x, self.table.time(step.round().long()))


def test_noise_prediction_on_a_table():
    """DiscreteEpsDDPMDenoiser, on steps of the table; ours calls the same network with time="step"."""
    table = rp.DDPM()
    net, _ = network("epsilon", table)
    by_step = AtTimes(net, table)
    denoiser = rp.Denoiser(by_step, table, "epsilon", time="step")
    signal = table.alpha(table.time(torch.arange(1000))) ** 2
    model = external.DiscreteEpsDDPMDenoiser(by_step, signal, quantize=True)
    times = grids.trailing(denoiser, STEPS)
    start = noise() * table.sigma(times[0])
    for sampler, method in DETERMINISTIC:
        agree(ours(denoiser, start, method, times), theirs(sampler, model, table, start, times))


class OfSigma(torch.nn.Module):
    """A network with a fixed random answer, called with σ as theirs is, or with ours, log(σ)/4."""

    def __init__(self, logarithmic=False):
        super().__init__()
        self.logarithmic = logarithmic
        self.weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def forward(self, x, time):
        log = 4 * time if self.logarithmic else time.log()
        return torch.tanh(torch.cat([x, log[:, None]], 1) @ self.weight)


def test_preconditioning_and_loss():
    """Their Denoiser, c_skip, c_out and c_in of EDM at unit data, and its loss: that of F."""
    theirs_ = layers.Denoiser(OfSigma(), sigma_data=1.0)
    target, schedule = {"name": "edm", "sigma_data": 1.0}, rp.schedules.VE(0.002, 100.0)
    calls = {"time": "log_sigma/4", "input": "unit_variance"}
    net = OfSigma(logarithmic=True)
    denoiser = rp.Denoiser(net, schedule, target, **calls)
    t, x0 = torch.linspace(0.05, 1, 16, dtype=torch.float64), noise()
    sigma = schedule.sigma(t)
    agree(denoiser(x0, t).mean, theirs_(x0, sigma))
    eps = draws(x0, 1)[0]
    losses = rp.Objective(schedule, target, **calls)(net, x0, t=t, eps=eps)
    agree(losses, theirs_.loss(x0, eps, sigma))


def test_one_step_of_dpmpp_2m_sde_fails_in_theirs_and_is_the_x0_estimate_in_ours():
    """Theirs keeps a step size that the step to σ = 0 never computes."""
    schedule = rp.RectifiedFlow()
    net, denoiser = network("v_prediction", schedule)
    start = noise() * schedule.sigma(0.9)
    with pytest.raises(UnboundLocalError):
        theirs(
            sampling.sample_dpmpp_2m_sde,
            wrapped(net),
            schedule,
            start,
            [0.9, 0.0],
            noise_sampler=lambda here, to: torch.zeros_like(start),
        )
    agree(ours(denoiser, start, "sde_dpmpp_2m", [0.9, 0.0])[-1], net.posterior_mean(start, 0.9))
