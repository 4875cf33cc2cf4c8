"""Whole trajectories against other libraries, on the exact network for Gaussian data.

Every library gets the network in its own convention; the states after every step are compared.
"""

import pytest
import torch

import reparam as rp
from oracles import GaussianOracle
from reparam.samplers import Ancestral, DPMpp2M, Heun, SDEDPMpp2M, grids

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

MEAN = torch.tensor([0.7, -1.1, 0.3], dtype=torch.float64)
_A = torch.tensor([[1.0, 0.2, 0.0], [0.3, 0.5, 0.1], [0.0, -0.2, 0.3]], dtype=torch.float64)
COV = _A @ _A.T
DDPM = rp.DDPM()
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
TABLE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def noise(n=16):
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(prediction, schedule=DDPM):
    net = GaussianOracle(MEAN, COV, schedule, rp.target(prediction))
    return net, rp.Denoiser(net, schedule, prediction)


def exact(scheduler):
    """Theirs with its table in float64: what is compared is the method, not float32."""
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    return scheduler


def walked(scheduler, net, x, times, options=lambda i: {}, scale=lambda i: 1.0):
    """Their states, as x_t, from x; ``times`` are the schedule's at scheduler.timesteps, one after the other."""
    states = [x * scale(0)]
    for i, (k, t) in enumerate(zip(scheduler.timesteps, times, strict=True)):
        output = net(x * scale(i), torch.as_tensor(t, dtype=torch.float64).expand(len(x)))
        x = scheduler.step(output, k, x, **options(i)).prev_sample
        states.append(x * scale(i + 1))
    return torch.stack(states).double()


def ours(denoiser, start, sampler, times, **options):
    return rp.sample(denoiser, start=start, sampler=sampler, times=times, trajectory=True, **options).states


def table_times(scheduler):
    return [*DDPM.time(scheduler.timesteps.long()).tolist(), 0.0]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim(prediction, eta, spacing):
    theirs = exact(
        diffusers.DDIMScheduler(
            **TABLE, prediction_type=prediction, clip_sample=False, timestep_spacing=spacing, set_alpha_to_one=True
        )
    )
    theirs.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    theirs.set_timesteps(50)
    net, denoiser = network(prediction)
    times = table_times(theirs)
    assert getattr(grids, spacing)(denoiser, 50) == pytest.approx(times)
    start, zs = noise() * DDPM.sigma(times[0]), torch.stack([noise().roll(i, 0) for i in range(50)])
    # At the last step theirs adds noise of variance 0 (leading) or 1e-20 and less: none.
    states = walked(theirs, net, start, times[:-1], lambda i: {"eta": eta, "variance_noise": zs[i] if eta else None})
    found = ours(denoiser, start, rp.DDIM(eta), times, noises=zs)
    torch.testing.assert_close(found, states, rtol=0, atol=1e-5)


def test_ddim_on_linspace_differs_because_theirs_takes_another_previous_step():
    """Theirs goes from k to k − T // steps, whatever the next step of its own grid is: with "linspace" the x it
    hands over belongs to another noise level than the network is then asked at. Ours steps to the next time."""
    theirs = exact(diffusers.DDIMScheduler(**TABLE, clip_sample=False, timestep_spacing="linspace"))
    theirs.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    theirs.set_timesteps(20)
    net, denoiser = network("epsilon")
    times = table_times(theirs)
    assert grids.linspace(denoiser, 20) == pytest.approx(times)
    start = noise() * DDPM.sigma(times[0])
    states = walked(theirs, net, start, times[:-1])
    found = ours(denoiser, start, "ddim", times)
    truth = net.flow(start, times[0], times[10])
    assert (found[10] - truth).norm() < 0.5 * (states[10] - truth).norm()
    # Their one step is ours to the time that theirs means.
    meant = [times[0], float(DDPM.time(int(theirs.timesteps[0]) - 1000 // 20))]
    assert meant[1] != pytest.approx(times[1])
    torch.testing.assert_close(ours(denoiser, start, "ddim", meant)[1], states[1], rtol=0, atol=1e-9)


def test_ddim_of_noise_prediction_without_signal_is_singular_in_theirs_and_an_error_in_ours():
    """diffusers #3851: the first step divides by α = 0; clipping x0 hides it."""
    theirs = diffusers.DDIMScheduler(
        **TABLE, rescale_betas_zero_snr=True, clip_sample=False, timestep_spacing="trailing"
    )
    theirs.set_timesteps(10)
    x = noise().float()
    assert not theirs.step(0.9 * x, theirs.timesteps[0], x).pred_original_sample.isfinite().all()
    with pytest.raises(rp.errors.SingularTime, match="predict x0, v or velocity"):
        rp.Denoiser(torch.nn.Identity(), "cosine", "epsilon")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("variance", "name"), [("small", "fixed_small"), ("large", "fixed_large")])
@pytest.mark.parametrize("steps", [50, 1000])
def test_ddpm(prediction, variance, name, steps):
    """Their noise is drawn from a generator: ours is given the same draws."""
    theirs = exact(
        diffusers.DDPMScheduler(
            **TABLE, prediction_type=prediction, variance_type=name, clip_sample=False, timestep_spacing="trailing"
        )
    )
    theirs.one = torch.ones((), dtype=torch.float64)
    theirs.set_timesteps(steps)
    net, denoiser = network(prediction)
    times = table_times(theirs)
    start, generator = noise() * DDPM.sigma(times[0]), torch.Generator().manual_seed(5)
    states = walked(theirs, net, start, times[:-1], lambda i: {"generator": generator})
    generator = torch.Generator().manual_seed(5)
    zs = (torch.randn(start.shape, generator=generator, dtype=torch.float64) for _ in range(steps))
    found = ours(denoiser, start, Ancestral(variance), times, noises=zs)
    # With fewer steps theirs adds noise of the step to alpha = 1 also at its last: see below.
    last = steps if steps == 1000 else steps - 1
    torch.testing.assert_close(found[: last + 1], states[: last + 1], rtol=0, atol=1e-5)


def test_ddpm_adds_noise_to_its_last_step_when_that_is_long():
    """Theirs leaves the noise out only at step 0 of the table. "trailing" with 50 steps ends at step 19, from
    where it leaps to the data: there "large" adds σ of step 19, noise that nothing removes any more."""
    theirs = exact(
        diffusers.DDPMScheduler(**TABLE, variance_type="fixed_large", clip_sample=False, timestep_spacing="trailing")
    )
    theirs.one = torch.ones((), dtype=torch.float64)
    theirs.set_timesteps(50)
    net, denoiser = network("epsilon")
    times = table_times(theirs)
    x = noise()
    output = net(x, torch.full((16,), times[-2], dtype=torch.float64))
    last = theirs.step(output, 19, x, generator=torch.Generator().manual_seed(1))
    spread = (last.prev_sample - last.pred_original_sample).std()
    assert spread == pytest.approx(float(DDPM.sigma(times[-2]) / DDPM.alpha(times[-2])), rel=0.5)
    found = rp.sample(denoiser, start=x, sampler="ancestral", times=times[-2:])
    torch.testing.assert_close(found, last.pred_original_sample, rtol=0, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_heun(prediction):
    """Theirs walks x/α in σ/α, with two calls a step."""
    theirs = diffusers.HeunDiscreteScheduler(**TABLE, prediction_type=prediction, timestep_spacing="trailing")
    theirs.set_timesteps(25)
    ks = theirs.timesteps[[0, *range(1, len(theirs.timesteps), 2)]]
    times = [*DDPM.time(ks.long()).tolist(), 0.0]
    net, denoiser = network(prediction)
    start = noise() * DDPM.sigma(times[0])
    x, states = (start / DDPM.alpha(times[0])).double(), [start]
    for i, k in enumerate(theirs.timesteps):
        t = DDPM.time(k.long())
        output = net(x * DDPM.alpha(t), t.expand(len(x)))
        x = theirs.step(output, k, x).prev_sample
        if i % 2 == 1 or i == len(theirs.timesteps) - 1:
            states.append(x * DDPM.alpha(times[len(states)]))
    found = ours(denoiser, start, Heun("sigma/alpha"), times)
    torch.testing.assert_close(found, torch.stack(states), rtol=0, atol=2e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("karras", [False, True])
def test_euler_in_noise_level_is_our_ddim(prediction, karras):
    """Euler's step of x/α in σ/α and DDIM's are one formula."""
    theirs = diffusers.EulerDiscreteScheduler(
        **TABLE, prediction_type=prediction, timestep_spacing="trailing", use_karras_sigmas=karras
    )
    theirs.set_timesteps(40)
    times = [*(float(DDPM.time_at(-2 * s.double().log())) for s in theirs.sigmas[:-1]), 0.0]
    net, denoiser = network(prediction)
    if karras:
        ends = {"start": times[0], "last": times[-2]}
        assert grids.karras(denoiser, 40, **ends) == pytest.approx(times, abs=1e-5)
    alpha = [float(DDPM.alpha(t)) for t in times]
    start = noise() * DDPM.sigma(times[0])
    states = walked(theirs, net, start / alpha[0], times[:-1], scale=lambda i: alpha[i])
    torch.testing.assert_close(ours(denoiser, start, "ddim", times), states, rtol=0, atol=2e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", [DPMpp2M(), SDEDPMpp2M()], ids=str)
@pytest.mark.parametrize("steps", [10, 30])
def test_dpm_solver_multistep(prediction, method, steps):
    """2M with midpoint, the paper's; first step, and last step to σ = 0, of first order in both."""
    stochastic = isinstance(method, SDEDPMpp2M)
    theirs = diffusers.DPMSolverMultistepScheduler(
        **TABLE,
        prediction_type=prediction,
        algorithm_type="sde-dpmsolver++" if stochastic else "dpmsolver++",
        solver_order=2,
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(steps)
    net, denoiser = network(prediction)
    times = table_times(theirs)
    start, zs = noise() * DDPM.sigma(times[0]), torch.stack([noise().roll(i, 0) for i in range(steps)])
    states = walked(theirs, net, start, times[:-1], lambda i: {"variance_noise": zs[i]} if stochastic else {})
    found = ours(denoiser, start, method, times, noises=zs)
    torch.testing.assert_close(found, states, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_euler(shift):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    even = torch.linspace(1.0, 0.02, 50, dtype=torch.float64)
    theirs.set_timesteps(sigmas=even.tolist())
    net, denoiser = network("flow_prediction", rp.RectifiedFlow())
    times = [*theirs.sigmas[:-1].double().tolist(), 0.0]
    assert grids.shifted(denoiser, 50, shift=shift) == pytest.approx(times, abs=1e-6)
    states = walked(theirs, net, noise(), times[:-1])
    torch.testing.assert_close(ours(denoiser, noise(), "euler", times), states, rtol=0, atol=1e-5)


def test_flow_matching_in_bfloat16_loses_what_a_float32_state_keeps():
    """diffusers #13098: theirs computes a step in float32 but hands over bf16; our state never is."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    theirs.set_timesteps(sigmas=torch.linspace(1.0, 0.005, 200).tolist())
    net, denoiser = network("flow_prediction", rp.RectifiedFlow())
    times = [*theirs.sigmas[:-1].double().tolist(), 0.0]
    start = noise().bfloat16()
    exact_end = ours(denoiser, start.double(), "euler", times)[-1]
    x = start
    for k, t in zip(theirs.timesteps, times[:-1], strict=True):
        output = net(x.double(), torch.full((16,), t, dtype=torch.float64)).bfloat16()
        x = theirs.step(output, k, x).prev_sample
    found = rp.sample(denoiser, start=start, sampler="euler", times=times)
    assert found.dtype == torch.float32
    assert (found - exact_end).norm() < 1e-3 * (x - exact_end).norm()
