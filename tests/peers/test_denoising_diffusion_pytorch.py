"""Whole trajectories against denoising-diffusion-pytorch, on the exact network for Gaussian pictures.

The package imports torchvision; its continuous-time classes do not, and only those are loaded. They draw
the start, keep pictures of shape [B, C, H, W] in the default dtype and clip the end: the states that their
network is asked at are compared, with float64 as the default.
"""

import pytest
import torch

import reparam as rp
from oracles import GaussianOracle
from peers.side_by_side import COV, MEAN, ours, seeded, submodules
from reparam.samplers import EDM, Ancestral, DPMpp2M, grids

elucidated, continuous, v_continuous = submodules(
    "denoising_diffusion_pytorch",
    [
        "elucidated_diffusion",
        "continuous_time_gaussian_diffusion",
        "v_param_continuous_time_gaussian_diffusion",
    ],
)

SHAPE, STEPS = (8, 3, 1, 1), 20
EDM_UNIT = {"name": "edm", "sigma_data": 1.0}


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Watched(torch.nn.Module):
    """The exact network as theirs is called, which keeps the states x_t and the times it is asked at.

    Args:
        to_log_snr: from the time that theirs gives it to the log-SNR.
        scale: from a time of the schedule to the factor that makes its input x_t.
    """

    self_condition = False
    random_or_learned_sinusoidal_cond = True

    def __init__(self, schedule, prediction, to_log_snr, scale):
        super().__init__()
        self.oracle = GaussianOracle(MEAN, COV, schedule, rp.target(prediction))
        self.to_log_snr, self.scale = to_log_snr, scale
        self.on = torch.nn.Parameter(torch.zeros(()))  # tells their classes the device
        self.asked, self.levels = [], []

    def forward(self, x, time, self_cond=None):
        t = self.oracle.schedule.time_at(self.to_log_snr(time))
        x_t = x.flatten(1) * self.scale(t)[:, None]
        self.asked.append(x_t)
        self.levels.append(float(t[0]))
        return self.oracle(x_t, t).reshape(x.shape)


def drawn(count, seed=5):
    return seeded(lambda: torch.stack([torch.randn(SHAPE) for _ in range(count)]), seed).flatten(2)


def agree(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def elucidated_set_up(**options):
    """Theirs, and ours on rectified flow at the same σ/α, where their input has the standard deviation 1."""
    schedule = rp.RectifiedFlow()
    net = Watched(
        schedule, EDM_UNIT, lambda time: -8 * time, lambda t: torch.hypot(schedule.alpha(t), schedule.sigma(t))
    )
    theirs = elucidated.ElucidatedDiffusion(
        net, image_size=1, channels=3, num_sample_steps=STEPS, sigma_data=1.0, **options
    )
    sigmas = theirs.sample_schedule().double()
    times = [*(float(schedule.time_at(-2 * s.log())) for s in sigmas[:-1]), 0.0]
    denoiser = rp.Denoiser(net.oracle, schedule, EDM_UNIT)
    return net, theirs, denoiser, times, sigmas


def picture(x):
    """As theirs ends: clipped, from 0 to 1."""
    return (x.clamp(-1, 1) + 1) / 2


def test_karras_grid():
    """Theirs is in float32."""
    _, _, denoiser, times, _ = elucidated_set_up()
    found = grids.karras(denoiser, STEPS, start=times[0], last=times[-2])
    assert found == pytest.approx(times, rel=1e-5)


@pytest.mark.parametrize("churn", [0.0, 10.0])
def test_elucidated_heun(churn):
    net, theirs, denoiser, times, sigmas = elucidated_set_up(S_churn=churn, S_tmin=0.05, S_tmax=50, S_noise=1.003)
    end = seeded(lambda: theirs.sample(SHAPE[0], clamp=False)).flatten(1)
    zs = drawn(STEPS + 1)
    churned = [0.05 <= s <= 50 for s in sigmas[:-1].tolist()]
    method = EDM(churn=churn, s_min=0.05, s_max=50, s_noise=1.003)
    start = denoiser.schedule.alpha(times[0]) * sigmas[0] * zs[0]
    states = ours(denoiser, start, method, times, noises=zs[1:][churned])
    if not churn:
        agree(states[:-1], torch.stack(net.asked[::2]))
    agree(picture(states[-1]), end)


def test_elucidated_dpmpp():
    net, theirs, denoiser, times, sigmas = elucidated_set_up()
    end = seeded(lambda: theirs.sample_using_dpmpp(SHAPE[0])).flatten(1)
    start = denoiser.schedule.alpha(times[0]) * sigmas[0] * drawn(1)[0]
    states = ours(denoiser, start, DPMpp2M(), times)
    # Theirs takes logarithms of its float32 σ.
    agree(states[:-1], torch.stack(net.asked), 1e-5)
    agree(picture(states[-1]), end, 1e-5)


def test_elucidated_loss():
    """Its weighted x0 error is the error of F, our EDM target's own."""
    _, theirs, denoiser, _, _ = elucidated_set_up()
    images = drawn(1, seed=1)[0].sigmoid().reshape(SHAPE)
    sigma = torch.linspace(0.01, 20, 8)
    expected = seeded(lambda: theirs(images, sigma=sigma, loss_reduction="none"))
    x0, eps = (images * 2 - 1).flatten(1), drawn(1)[0]
    t = denoiser.schedule.time_at(-2 * sigma.log())
    objective = rp.Objective(denoiser.schedule, EDM_UNIT)
    agree(objective(denoiser.net, x0, t=t, eps=eps), expected)


def ancestral_states(kind, prediction, **options):
    """(their network, with the states it was asked at; the noise that was drawn)."""
    net = Watched(rp.Cosine(), prediction, lambda log_snr: log_snr, torch.ones_like)
    theirs = kind(net, image_size=1, num_sample_steps=STEPS, clip_sample_denoised=False, **options)
    seeded(lambda: theirs.sample(SHAPE[0]))
    return net, drawn(STEPS)


NOISE, VELOCITY = continuous.ContinuousTimeGaussianDiffusion, v_continuous.VParamContinuousTimeGaussianDiffusion


@pytest.mark.parametrize(("kind", "prediction"), [(NOISE, "epsilon"), (VELOCITY, "v_prediction")])
def test_continuous_time_ancestral(kind, prediction):
    """Their step is our ancestral one of small variance, on times of the same log-SNR. Their last step ends in
    the mean of a state that still has noise, at a log-SNR of 9 or more; ours in the data: it is left out."""
    net, zs = ancestral_states(kind, prediction)
    denoiser = rp.Denoiser(net.oracle, rp.Cosine(), prediction, t_range=(0.0, net.levels[0]))
    states = ours(denoiser, zs[0], Ancestral("small"), net.levels, noises=zs[1:])
    agree(states, torch.stack(net.asked))


def test_noise_prediction_from_pure_noise_takes_x0_for_0_in_theirs_and_is_an_error_in_ours():
    """Their cosine begins at a log-SNR of −74. The exact noise there is x_t itself, and x_t − σ ε, to be divided
    by α = 1e-16, is 0: the first step knows nothing of the data's mean, which v prediction keeps."""
    net, _ = ancestral_states(NOISE, "epsilon", noise_schedule="cosine")
    by_v, _ = ancestral_states(VELOCITY, "v_prediction")
    assert net.levels == by_v.levels
    missing = by_v.asked[1] - net.asked[1]
    agree(missing, (rp.Cosine().alpha(net.levels[1]) * MEAN).expand(SHAPE[:2]))
    with pytest.raises(rp.errors.SingularTime, match="predict x0, v or velocity"):
        rp.Denoiser(net.oracle, "cosine", "epsilon")
