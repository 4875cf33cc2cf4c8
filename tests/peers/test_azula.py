"""Whole trajectories against azula, on the exact denoiser for Gaussian data, in float64.

Theirs gets its own analytical denoiser, ours the network in every prediction; the states after
every step are compared. Its schedules end at σ(0) = 1e-3 by default, where ours end at the data:
grids stop above t = 0 except where the end is what is looked at.
"""

import math

import pytest
import torch

import reparam as rp
from peers.side_by_side import COV, MEAN, draws, measured_order, network, noise, ours, seeded
from reparam.samplers import EDM, Ancestral, DPMpp2M, Heun

pytest.importorskip("azula", reason="azula is not installed; make peers installs it")
from azula import denoise, sample
from azula.linalg.covariance import FullCovariance
from azula.noise import (
    CosineSchedule,
    DecaySchedule,
    RectifiedSchedule,
    Schedule,
    VESchedule,
    VPSchedule,
)

START, STOP, STEPS = 1.0, 0.01, 25
THEIRS = [VPSchedule(), VESchedule(1e-3, 80.0), CosineSchedule(), RectifiedSchedule(), DecaySchedule()]


class Ours(Schedule):
    """One of our schedules as theirs."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, t):
        return self.schedule.alpha(t), self.schedule.sigma(t)


class Borrowed(rp.schedules.Schedule):
    """One of their schedules as ours, for samplers that need α and σ and nothing else."""

    name = "borrowed"

    def __init__(self, theirs):
        self.theirs = theirs

    def _alpha(self, t):
        return self.theirs(t)[0]

    def _sigma(self, t):
        return self.theirs(t)[1]

    def _alpha_dot(self, t):
        raise NotImplementedError

    def _sigma_dot(self, t):
        raise NotImplementedError

    def _time_at(self, log_snr):
        raise NotImplementedError


PAIRS = [*((theirs, Borrowed(theirs)) for theirs in THEIRS), (Ours(rp.DDPM()), rp.DDPM())]
every_schedule = pytest.mark.parametrize(
    ("theirs", "schedule"), PAIRS, ids=[*(type(s).__name__ for s in THEIRS), "our DDPM"]
)
every_prediction = pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])


class Watched(denoise.Denoiser):
    """Their exact denoiser for Gaussian data, which keeps the states it is asked at."""

    def __init__(self, schedule):
        super().__init__()
        values, vectors = torch.linalg.eigh(COV)
        self.inner = denoise.GaussianDenoiser(MEAN, FullCovariance(vectors, values), schedule)
        self.schedule, self.asked = schedule, []

    def forward(self, x_t, t):
        self.asked.append(x_t)
        return self.inner(x_t, t)


class Given(denoise.Denoiser):
    """Our denoiser as theirs, for pure noise: their analytical one divides by α, even where that is 0."""

    def __init__(self, denoiser, schedule):
        super().__init__()
        self.denoiser, self.schedule = denoiser, schedule

    def forward(self, x_t, t):
        return denoise.DiracPosterior(self.denoiser(x_t, t).mean)


def theirs_at(kind, schedule, x, start=START, stop=STOP, steps=STEPS, calls=1, **options):
    """(the times of the grid, the states at them) of one of their samplers, with ``calls`` evaluations a step."""
    sampler = kind(Watched(schedule), start=start, stop=stop, steps=steps, silent=True, dtype=torch.float64, **options)
    end = seeded(lambda: sampler(x))
    return sampler.timesteps.tolist(), torch.stack([*sampler.denoiser.asked[::calls], end])


def agree(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@every_schedule
@every_prediction
def test_denoiser(theirs, schedule, prediction):
    _, denoiser = network(prediction, schedule)
    for t in (0.01, 0.3, 0.77, 1.0):
        t = torch.tensor(t, dtype=torch.float64)
        x = denoiser.schedule.sigma(t) * noise()
        agree(denoiser(x, t).mean, Watched(theirs)(x, t).mean)


@every_schedule
@every_prediction
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim(theirs, schedule, prediction, eta):
    """Their eta multiplies the variance of the noise, that of the paper and ours its standard deviation."""
    _, denoiser = network(prediction, schedule)
    start = noise() * schedule.sigma(START)
    times, states = theirs_at(sample.DDIMSampler, theirs, start, eta=eta**2)
    agree(ours(denoiser, start, rp.DDIM(eta), times, noises=draws(start, STEPS)), states)


@every_schedule
@every_prediction
def test_ddpm(theirs, schedule, prediction):
    _, denoiser = network(prediction, schedule)
    start = noise() * schedule.sigma(START)
    times, states = theirs_at(sample.DDPMSampler, theirs, start)
    zs = draws(start, STEPS)
    agree(ours(denoiser, start, Ancestral("small"), times, noises=zs), states)
    agree(ours(denoiser, start, rp.DDIM(1.0), times, noises=zs), states)


FIRST_ORDER = [
    (sample.EulerSampler, {}),
    (sample.ItoSampler, {"eta": 0.0}),
    (sample.zABSampler, {"order": 1}),
    (sample.zEABSampler, {"order": 1}),
    (sample.xEABSampler, {"order": 1}),
]


@every_schedule
@pytest.mark.parametrize(("kind", "options"), FIRST_ORDER, ids=lambda v: getattr(v, "__name__", ""))
def test_first_order_in_x0_in_noise_and_in_sigma_over_alpha_are_our_ddim(theirs, schedule, kind, options):
    _, denoiser = network("v_prediction", schedule)
    start = noise() * schedule.sigma(START)
    times, states = theirs_at(kind, theirs, start, **options)
    agree(ours(denoiser, start, "ddim", times), states)


@every_schedule
@every_prediction
def test_heun(theirs, schedule, prediction):
    """Theirs steps in σ/α; ours has two names for that."""
    _, denoiser = network(prediction, schedule)
    start = noise() * schedule.sigma(START)
    times, states = theirs_at(sample.HeunSampler, theirs, start, calls=2)
    agree(ours(denoiser, start, Heun("sigma/alpha"), times), states)
    agree(ours(denoiser, start, EDM(), times), states)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction", "flow_prediction"])
def test_adams_bashforth_in_velocity_begins_as_our_euler(prediction):
    """Theirs steps in u = σ/(α + σ), which on rectified flow is t; from pure noise to the data."""
    _, denoiser = network(prediction, rp.RectifiedFlow())
    given = Given(denoiser, RectifiedSchedule(0.0, 0.0))
    sampler = sample.vABSampler(given, order=1, steps=STEPS, silent=True, dtype=torch.float64)
    agree(rp.sample(denoiser, noise(), sampler="euler", times=sampler.timesteps), sampler(noise()))


@pytest.mark.parametrize(
    ("theirs", "name"), [(CosineSchedule(0.0, 0.0), "cosine"), (RectifiedSchedule(0.0, 0.0), "rectified_flow")]
)
def test_ddim_from_pure_noise_to_the_data(theirs, name):
    """Their schedules with both minima 0 are ours, up to rounding."""
    _, denoiser = network("v_prediction", rp.schedules.schedule(name))
    sampler = sample.DDIMSampler(Given(denoiser, theirs), steps=STEPS, silent=True, dtype=torch.float64)
    agree(rp.sample(denoiser, noise(), sampler="ddim", times=sampler.timesteps), sampler(noise()))


def test_sigma_over_alpha_from_pure_noise_is_not_a_number_in_theirs_and_an_error_in_ours():
    theirs = RectifiedSchedule(0.0, 0.0)
    _, denoiser = network("v_prediction", rp.RectifiedFlow())
    sampler = sample.EulerSampler(Given(denoiser, theirs), stop=0.5, silent=True, dtype=torch.float64)
    assert sampler(noise()).isnan().all()
    with pytest.raises(rp.errors.SingularTime, match="infinite at t = 1"):
        ours(denoiser, noise(), "edm", [1.0, 0.5])
    assert ours(denoiser, noise(), "ddim", [1.0, 0.5]).isfinite().all()


def test_heun_to_the_data_is_not_a_number_in_theirs_and_the_x0_estimate_in_ours():
    """Theirs asks for the noise at σ = 0; their schedules stop short of it by default."""
    theirs = RectifiedSchedule(0.0, 0.0)
    times, states = theirs_at(sample.HeunSampler, theirs, noise(), start=0.9, stop=0.0, calls=2)
    assert states[-2].isfinite().all()
    assert states[-1].isnan().all()
    net, denoiser = network("v_prediction", rp.RectifiedFlow())
    found = ours(denoiser, noise(), Heun("sigma/alpha"), times)
    agree(found[:-1], states[:-1])
    torch.testing.assert_close(found[-1], net.flow(noise(), 0.9, 0.0), rtol=0, atol=0.02)


T = torch.linspace(0, 1, 101, dtype=torch.float64)


@pytest.mark.parametrize(
    ("theirs", "schedule"),
    [
        (RectifiedSchedule(0.0, 0.0), rp.RectifiedFlow()),
        (CosineSchedule(0.0, 0.0), rp.Cosine()),
        (DecaySchedule(0.0, 0.0, 0.1), rp.schedules.Path("1 - (1 - 0.1**t)/0.9", "(1 - 0.1**t)/0.9")),
    ],
    ids=lambda s: type(s).__name__,
)
def test_schedules(theirs, schedule):
    alpha, sigma = theirs(T)
    torch.testing.assert_close(schedule.alpha(T), alpha, rtol=0, atol=1e-15)
    torch.testing.assert_close(schedule.sigma(T), sigma, rtol=0, atol=1e-14)


def test_ours_are_exact_at_pure_noise():
    assert CosineSchedule(0.0, 0.0)(torch.ones((), dtype=torch.float64))[0] != 0
    assert rp.Cosine().alpha(1.0) == 0


def test_variance_exploding():
    """Theirs begins at σ_min, ours is the process that adds noise to exact data: σ² is less by σ_min²."""
    alpha, sigma = VESchedule(0.002, 80.0)(T)
    schedule = rp.schedules.VE(0.002, 80.0)
    torch.testing.assert_close(schedule.alpha(T), alpha)
    torch.testing.assert_close((schedule.sigma(T) ** 2 + 0.002**2).sqrt(), sigma, rtol=1e-12, atol=0)


def test_variance_preserving_is_the_limit_of_our_tables():
    """log α = t² log α_min is ∫β/2 for a β that begins at 0 and ends at −4 log(α_min)/T; one step's β² is
    what a table of T steps differs by, so that the difference falls as 1/T."""
    alpha_min = 0.05
    alpha, _ = VPSchedule(alpha_min, 0.0)(T)
    counts, errors = [1000, 2000, 4000], []
    for count in counts:
        table = rp.DDPM(T=count, beta_start=1e-12, beta_end=-4 * math.log(alpha_min) / count)
        errors.append(float((table.alpha(T) - alpha).abs().max()))
    assert errors[-1] < 2e-3
    assert measured_order(counts, errors) == pytest.approx(1, abs=0.05)


class Backbone(torch.nn.Module):
    """A network of (x, log σ/α), with a fixed random answer."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))

    def forward(self, x, time):
        time = time.expand(len(x))[:, None]
        return torch.tanh(torch.cat([x, time], 1) @ self.weight)


class OfLogSNR(torch.nn.Module):
    """The same, called with the log-SNR."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x, time):
        return self.backbone(x, -time / 2)


@pytest.mark.parametrize(
    ("kind", "target"),
    [(denoise.SimpleDenoiser, "x0"), (denoise.KarrasDenoiser, {"name": "edm", "sigma_data": 1.0})],
    ids=["SimpleDenoiser", "KarrasDenoiser"],
)
def test_preconditioning_and_loss(kind, target):
    """Their preconditioners are ours for unit data, their weight of an x0 error, 1 + SNR, our EDM space."""
    backbone, x0, eps = Backbone(), noise() * 0.5, draws(noise(), 1)[0]
    theirs = kind(backbone, RectifiedSchedule(0.0, 0.0))
    calls = {"time": "log_snr", "input": "unit_variance", "t_range": (0.0, 0.99)}
    denoiser = rp.Denoiser(OfLogSNR(backbone), "rectified_flow", target, **calls)
    space = {"name": "edm", "sigma_data": 1.0}
    objective = rp.Objective("rectified_flow", target, loss_space=space, **calls)
    t = torch.linspace(0.05, 0.95, 16, dtype=torch.float64)
    agree(denoiser(x0, t).mean, theirs(x0, t).mean)
    agree(objective(denoiser.net, x0, t=t, eps=eps).mean(), seeded(lambda: theirs.loss(x0, t)))


# Far from both ends; where every sampler is past its first steps.
COUNTS, GRID = [40, 80, 160, 320], {"start": 0.9, "stop": 0.1}


def errors_of_theirs(kind, schedule):
    net, _ = network("v_prediction", Borrowed(schedule))
    truth = net.flow(noise(), GRID["start"], GRID["stop"])
    ends = [theirs_at(kind, schedule, noise(), steps=n, **GRID)[1][-1] for n in COUNTS]
    return [float((end - truth).norm()) for end in ends]


def errors_of_ours(sampler, schedule):
    net, denoiser = network("v_prediction", Borrowed(schedule))
    truth = net.flow(noise(), GRID["start"], GRID["stop"])
    grids = [torch.linspace(GRID["start"], GRID["stop"], n + 1, dtype=torch.float64) for n in COUNTS]
    ends = [ours(denoiser, noise(), sampler, grid)[-1] for grid in grids]
    return [float((end - truth).norm()) for end in ends]


every_smooth = pytest.mark.parametrize(
    "schedule", [VPSchedule(), CosineSchedule(), RectifiedSchedule()], ids=lambda s: type(s).__name__
)
SECOND_ORDER = [sample.HeunSampler, sample.zABSampler, sample.vABSampler, sample.zEABSampler, sample.xEABSampler]


@every_smooth
def test_orders(schedule):
    """Against the exact solution; theirs with the order 2 that they have by default."""
    for kind in SECOND_ORDER:
        assert measured_order(COUNTS, errors_of_theirs(kind, schedule)) == pytest.approx(2, abs=0.15), kind
    for sampler in (DPMpp2M(), EDM(), Heun("alpha/sigma")):
        assert measured_order(COUNTS, errors_of_ours(sampler, schedule)) == pytest.approx(2, abs=0.15), sampler


@every_smooth
def test_two_step_solvers_of_data_prediction_differ_by_their_order(schedule):
    """Theirs integrates the line through two x0 estimates exactly, DPM-Solver++(2M) to second order."""
    _, denoiser = network("v_prediction", Borrowed(schedule))
    apart = []
    for n in COUNTS:
        times, states = theirs_at(sample.xEABSampler, schedule, noise(), steps=n, **GRID)
        apart.append(float((ours(denoiser, noise(), "dpmpp_2m", times)[-1] - states[-1]).norm()))
    assert apart[0] > 1e-6
    assert measured_order(COUNTS, apart) == pytest.approx(2, abs=0.2)


class Repaired(sample.REABSampler):
    """REABSampler with the factor on its integral that its own derivation has: sqrt(α_s² + σ_s²)."""

    def _exponential_adams_bashforth(self, u, i, n):
        alpha, sigma = self.denoiser.schedule(self.timesteps)
        has, needs = torch.hypot(alpha[i + 1], sigma[i]), torch.hypot(alpha[i + 1], sigma[i + 1])
        return sample.REABSampler._exponential_adams_bashforth(u, i=i, n=n) * (needs / has)


@every_smooth
def test_rosenbrock_adams_bashforth_is_of_first_order_in_theirs(schedule):
    """REABSampler multiplies its integral by sqrt(α_s² + σ_t²), where its docstring says, and the method
    needs, sqrt(1 + e^{2s}), that is sqrt(α_s² + σ_s²): an error of O(h²) a step. A test of shapes does not
    see it, a measured order does."""
    found, repaired = errors_of_theirs(sample.REABSampler, schedule), errors_of_theirs(Repaired, schedule)
    assert measured_order(COUNTS, found) == pytest.approx(1, abs=0.15)
    assert measured_order(COUNTS, repaired) == pytest.approx(2, abs=0.15)
    # With as many calls of the network:
    assert errors_of_ours(DPMpp2M(), schedule)[-1] < 0.1 * found[-1]
