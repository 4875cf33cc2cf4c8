import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import reparam as rp
from oracles import EmpiricalOracle, GaussianOracle, MixtureOracle
from reparam.denoiser import estimate, prepared, weighted
from reparam.errors import Conflict, ReparamError, SingularTime, TimeOutOfRange, UnknownName, Unsupported
from reparam.guidance import ClassifierFree, Guided
from reparam.samplers import (
    EDM,
    GRIDS,
    SAMPLERS,
    Ancestral,
    Clipped,
    DPMpp2M,
    DynamicallyClipped,
    Heun,
    SDEDPMpp2M,
    Step,
    grids,
    levels,
)
from reparam.samplers.steps import moved

MEAN = torch.tensor([0.7, -1.1, 0.3], dtype=torch.float64)
_A = torch.tensor([[1.0, 0.2, 0.0], [0.3, 0.5, 0.1], [0.0, -0.2, 0.3]], dtype=torch.float64)
COV = _A @ _A.T
SMOOTH = [rp.RectifiedFlow(), rp.RectifiedFlow(2.0), rp.Cosine()]
SCHEDULES = [*SMOOTH, rp.DDPM()]
METHODS = [c() for c in SAMPLERS.values()]
METHODS += [Heun("sigma/alpha"), Heun("alpha/sigma"), rp.DDIM(0.5), Ancestral("large"), EDM(churn=5.0, s_max=2.0)]
DETERMINISTIC = [m for m in METHODS if not m.stochastic]


def oracle(schedule, target="v"):
    t_range = (0.0, 0.98) if target == "eps" else (0.0, 1.0)
    net = GaussianOracle(MEAN, COV, schedule, rp.target(target))
    return net, rp.Denoiser(net, schedule, target, t_range=t_range)


def noise(n=16):
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def mixture(schedule, target="v"):
    """Three components, one of them a point."""
    means = torch.tensor([[0.7, -1.1], [-0.9, 0.4], [1.2, 1.0]], dtype=torch.float64)
    covs = torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]], [[0.0, 0.0], [0.0, 0.0]]])
    net = MixtureOracle(torch.tensor([0.5, 0.3, 0.2]), means, covs.double(), schedule, rp.target(target))
    return net, rp.Denoiser(net, schedule, target, t_range=(0.0, 0.98) if target == "eps" else (0.0, 1.0))


@pytest.mark.parametrize("t", [0.1, 0.6, 0.95])
def test_the_oracles_agree_with_derivatives_of_the_log_density(t):
    """The score, and by Tweedie the mean and the covariance of x0, by automatic differentiation."""
    schedule = rp.RectifiedFlow()
    points = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cases = [mixture(schedule)[0], oracle(schedule)[0], EmpiricalOracle(points, schedule, rp.target("v"))]
    for net in cases:
        x = torch.randn(4, net.means.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        mean, cov = net.posterior(x, t)

        def log_density(v, net=net):
            return net.log_density(v[None], t)[0]

        for i in range(len(x)):
            row = x[i].clone().requires_grad_()
            gradient = torch.func.grad(log_density)(row)
            hessian = torch.func.hessian(log_density)(row)
            torch.testing.assert_close(net.score(x, t)[i], gradient)
            torch.testing.assert_close(mean[i], (x[i] + sigma**2 * gradient) / alpha)
            eye = torch.eye(len(row), dtype=torch.float64)
            torch.testing.assert_close(cov[i], (sigma / alpha) ** 2 * (eye + sigma**2 * hessian))


def test_a_finite_data_set_by_brute_force():
    schedule, t = rp.Cosine(), 0.4
    points = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    net = EmpiricalOracle(points, schedule, rp.target("x0"))
    x = noise(4)
    share = (-((x[:, None] - schedule.alpha(t) * points) ** 2).sum(-1) / (2 * schedule.sigma(t) ** 2)).softmax(1)
    mean, cov = net.posterior(x, t)
    torch.testing.assert_close(mean, share @ points)
    second = torch.einsum("bk,ki,kj->bij", share, points, points)
    torch.testing.assert_close(cov, second - mean[:, :, None] * mean[:, None, :])
    assert net.posterior(x, 1e-4)[0].isfinite().all()  # no underflow: the nearest point


FLOWS = {}


def exact_flow(net, x, start, end):
    """The probability-flow ODE of :func:`mixture` from start to end by scipy's eighth-order solver."""
    from scipy.integrate import solve_ivp

    s = net.schedule
    if (known := FLOWS.get((s, start, end))) is not None:  # the same x for every sampler
        return known

    def slope(t, flat):
        now = torch.from_numpy(flat).reshape(x.shape)
        mean = net.posterior_mean(now, t)
        eps = (now - s.alpha(t) * mean) / s.sigma(t)
        return (s.alpha_dot(t) * mean + s.sigma_dot(t) * eps).flatten().numpy()

    found = solve_ivp(slope, (start, end), x.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-13)
    FLOWS[s, start, end] = torch.from_numpy(found.y[:, -1]).reshape(x.shape)
    return FLOWS[s, start, end]


def measured_order(counts, errors):
    """The slope of log error against log step size, by regression."""
    u, v = -torch.tensor(counts).double().log(), torch.tensor(errors).double().log()
    return float(((u - u.mean()) * (v - v.mean())).sum() / ((u - u.mean()) ** 2).sum())


@pytest.mark.parametrize("method", DETERMINISTIC, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
@pytest.mark.parametrize("data", [oracle, mixture], ids=["gaussian", "mixture"])
def test_measured_order_is_the_declared_one(method, schedule, data):
    """Between two interior times, by regression; on the steps of a table, whose kinks between them would spoil it."""
    net, denoiser = data(schedule)
    x = noise(8)[:, : net.means.shape[1]]
    if method.needs_smooth and not schedule.smooth:
        with pytest.raises(Unsupported, match=f"{method.name} steps in t.*use sampler='ddim'"):
            rp.sample(denoiser, x, sampler=method)
        return
    start, end = 0.9, 0.1
    if data is oracle:
        truth = net.flow(x * schedule.sigma(start), start, end)
    elif schedule.smooth:
        truth = exact_flow(net, x * schedule.sigma(start), start, end)
    else:  # another schedule with the same path of noise levels: cosine's, at the same σ/α
        ends = [float(rp.Cosine().time_at(schedule.log_snr(t))) for t in (start, end)]
        truth = exact_flow(mixture(rp.Cosine())[0], x * schedule.sigma(start), *ends)
    counts = [20, 40, 80, 160] if method.order == 1 else [40, 80, 160, 200]
    errors = []
    for n in counts:
        times = torch.linspace(start, end, n + 1, dtype=torch.float64)
        errors.append((rp.sample(denoiser, x, sampler=method, times=times) - truth).norm().item())
    order = measured_order(counts, errors)
    print(f"{method} {schedule.name} {data.__name__}: {order:.3f}")
    assert order == pytest.approx(method.order, abs=0.15), errors


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_the_oracle_takes_the_same_way_through_any_target(schedule):
    times = [0.98, 0.8, 0.5, 0.3, 0.05, 0.0]
    for method in METHODS:
        if method.needs_smooth and not schedule.smooth:
            continue
        for data in (oracle, mixture):
            x = noise()[:, : 3 if data is oracle else 2]
            ways = [
                rp.sample(
                    data(schedule, target)[1],
                    x,
                    sampler=method,
                    times=times,
                    trajectory=True,
                    generator=torch.Generator().manual_seed(4),
                )
                for target in ("x0", "eps", "v", "velocity")
            ]
            for way in ways[1:]:
                torch.testing.assert_close(way.states, ways[0].states, rtol=0, atol=1e-10)
                torch.testing.assert_close(way.x0, ways[0].x0, rtol=0, atol=1e-10)


def single(method, denoiser, t, s, x, z=None, steps=1):
    """x_s by one step."""
    here, to = levels(denoiser.schedule, [t, s])
    at = Step(here, to, denoiser.schedule, lambda x, t: estimate(denoiser, x, t, {}), lambda: z, steps)
    return method.step(x, at)[0]


def affine(denoiser, method, times, d=3):
    """(matrix, offset, gains): x_end = matrix x_start + offset + Σ gains_i z_i, exactly, for an affine denoiser.

    One batch: the origin, every basis vector, and every basis vector of every step's noise.
    """
    n, eye = len(times) - 1, torch.eye(d, dtype=torch.float64)
    x = torch.zeros(1 + d + n * d, d, dtype=torch.float64)
    x[1 : 1 + d] = eye
    noises = torch.zeros(n, *x.shape, dtype=torch.float64)
    for i in range(n):
        noises[i, 1 + d + i * d : 1 + d + (i + 1) * d] = eye
    out = rp.sample(denoiser, start=x, sampler=method, times=times, noises=noises)
    columns = (out[1:] - out[0]).reshape(1 + n, d, d).mT
    return columns[0], out[0], columns[1:]


def carried(net, method, denoiser, times):
    """Mean and covariance at the end, from the exact marginal at the start."""
    mean, cov = net.marginal(float(times[0]))
    matrix, offset, gains = affine(denoiser, method, times)
    return matrix @ mean + offset, matrix @ cov @ matrix.T + (gains @ gains.mT).sum(0)


#: How fast the covariance at the end approaches the exact one.
STOCHASTIC = [
    (rp.DDIM(0.5), 1),
    (rp.DDIM(1.0), 1),
    (Ancestral(), 1),
    (Ancestral("large"), 1),
    (EDM(churn=5.0, s_max=2.0), 2),
    (SDEDPMpp2M(), 2),
]


@pytest.mark.parametrize(("method", "order"), STOCHASTIC, ids=lambda v: str(v))
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_stochastic_samplers_carry_mean_and_covariance_at_their_order(method, order, schedule):
    """Exactly, through the affine map that the whole walk is on Gaussian data: nothing is drawn."""
    net, denoiser = oracle(schedule)
    counts, start, end = [20, 40, 80, 160], 0.9, 0.1
    mean, cov = net.marginal(end)
    errors = []
    for n in counts:
        found = carried(net, method, denoiser, torch.linspace(start, end, n + 1, dtype=torch.float64))
        torch.testing.assert_close(found[0], mean, rtol=0, atol=1e-12)  # the mean at any step size
        errors.append((found[1] - cov).norm().item())
    measured = measured_order(counts[1:], errors[1:])
    print(f"{method} {schedule.name}: {measured:.3f}")
    assert measured == pytest.approx(order, abs=0.2), errors


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_eta_one_is_the_ancestral_step_of_small_variance_and_sde_dpmpp_without_memory(schedule):
    denoiser = oracle(schedule)[1]
    x, z = noise(), noise().flip(0)
    for t, s in ((0.9, 0.89), (0.9, 0.2), (0.3, 0.05)):
        expected = single(Ancestral(), denoiser, t, s, x, z)
        for method in (rp.DDIM(1.0), SDEDPMpp2M()):
            torch.testing.assert_close(single(method, denoiser, t, s, x, z), expected, rtol=0, atol=1e-13)


def test_ancestral_variances_are_exact_where_they_should_be():
    """Small for data at one point, large for unit normal data under a variance-preserving schedule; any step."""
    for variance, cov in (("small", torch.zeros(3, 3)), ("large", torch.eye(3))):
        schedule = rp.Cosine()
        net = GaussianOracle(MEAN, cov.double(), schedule, rp.target("x0"))
        denoiser = rp.Denoiser(net, schedule, "x0")
        for times in ([0.8, 0.3], [0.9, 0.6, 0.5, 0.1]):
            mean, covariance = carried(net, Ancestral(variance), denoiser, times)
            torch.testing.assert_close(mean, net.marginal(times[-1])[0])
            torch.testing.assert_close(covariance, net.marginal(times[-1])[1])


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_between_neighbours_of_a_table_is_ddpm(variance):
    """Ho et al., eq. 7, written in betas."""
    schedule, k = rp.DDPM(), 400
    denoiser = oracle(schedule)[1]
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)
    x, z = noise(), noise().flip(0)
    t = float(schedule.time(k))
    x0 = denoiser(x, t).mean
    mean = kept[k - 1].sqrt() * betas[k] / (1 - kept[k]) * x0
    mean = mean + (1 - betas[k]).sqrt() * (1 - kept[k - 1]) / (1 - kept[k]) * x
    spread = betas[k] if variance == "large" else betas[k] * (1 - kept[k - 1]) / (1 - kept[k])
    found = single(Ancestral(variance), denoiser, t, float(schedule.time(k - 1)), x, z)
    torch.testing.assert_close(found, mean + spread.sqrt() * z, rtol=1e-12, atol=1e-11)


def test_edm_without_churn_is_heun_in_noise_level_and_with_it_raises_it():
    denoiser = oracle(rp.Cosine())[1]
    times = [0.9, 0.7, 0.4, 0.1, 0.0]
    plain = rp.sample(denoiser, noise(), sampler=Heun("sigma/alpha"), times=times)
    torch.testing.assert_close(rp.sample(denoiser, noise(), sampler="edm", times=times), plain, rtol=0, atol=0)
    churned = rp.sample(denoiser, noise(), sampler=EDM(churn=4.0, s_max=0.1), times=times)
    torch.testing.assert_close(churned, plain, rtol=0, atol=0)  # nothing in [s_min, s_max]
    with pytest.raises(SingularTime, match="infinite at t = 1"):
        rp.sample(denoiser, noise(), sampler="edm")
    with pytest.raises(TimeOutOfRange, match="s_max below"):
        rp.sample(oracle(rp.DDPM())[1], noise(), sampler=EDM(churn=4.0))
    with pytest.raises(ReparamError, match="churn >= 0"):
        EDM(churn=-1.0)


def test_edm_is_algorithm_2():
    """Written in σ/α and x/α, as in the paper."""
    schedule, times = rp.RectifiedFlow(), [0.9, 0.6, 0.3, 0.0]
    net, denoiser = oracle(schedule)
    method = EDM(churn=1.2, s_min=0.5, s_max=5.0, s_noise=1.003)
    zs = torch.stack([noise(), noise().flip(0), noise().roll(3, 0)])
    levels_ = [t / (1 - t) for t in times]
    x = zs[0] * levels_[0] * 1.1
    found = rp.sample(denoiser, start=x * 0.1, sampler=method, times=times, noises=zs[1:])

    def D(x, sigma):
        t = sigma / (1 + sigma)
        return net.posterior_mean(x * (1 - t), t)

    draws = iter(zs[1:])
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels_)):
        gamma = min(1.2 / 3, math.sqrt(2) - 1) if 0.5 <= sigma <= 5.0 else 0.0
        hat = sigma * (1 + gamma)
        if gamma:
            x = x + math.sqrt(hat**2 - sigma**2) * 1.003 * next(draws)
        d = (x - D(x, hat)) / hat
        following = x + (sigma_next - hat) * d
        if i < 2:
            d2 = (following - D(following, sigma_next)) / sigma_next
            following = x + (sigma_next - hat) * (d + d2) / 2
        x = following
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", [rp.RectifiedFlow(), rp.Cosine()], ids=str)
def test_from_zero_terminal_snr(schedule):
    """α(1) = 0: all that do not step in σ/α start there, and reach the Gaussian."""
    net, denoiser = oracle(schedule, "x0")
    x = noise()
    truth = net.flow(x * schedule.sigma(1.0), 1.0, 0.1)
    for method, tolerance in ((Heun("alpha/sigma"), 2e-3), (Heun(), 2e-3), (DPMpp2M(), 4e-3), (rp.DDIM(), 0.1)):
        found = rp.sample(denoiser, x, sampler=method, times=torch.linspace(1, 0.1, 81, dtype=torch.float64))
        torch.testing.assert_close(found, truth, rtol=0, atol=tolerance)
    for method in (Ancestral(), SDEDPMpp2M(), rp.DDIM(1.0)):
        assert rp.sample(denoiser, x, sampler=method, steps=20).isfinite().all()
    with pytest.raises(SingularTime, match="Heun\\(variable='alpha/sigma'\\)"):
        rp.sample(denoiser, x, sampler=Heun("sigma/alpha"))


def test_multistep_remembers_one_step_and_steps_of_infinite_length_are_first_order():
    schedule = rp.RectifiedFlow()
    denoiser = oracle(schedule, "x0")[1]
    x = noise()
    # No memory: the first step is DDIM's. From α = 0 the second step's memory is infinitely far.
    for times in ([0.9, 0.6], [1.0, 0.9, 0.6], [0.9, 0.0]):
        ours = rp.sample(denoiser, x, sampler="dpmpp_2m", times=times)
        torch.testing.assert_close(ours, rp.sample(denoiser, x, sampler="ddim", times=times), rtol=0, atol=1e-13)
    three = [0.9, 0.6, 0.3]
    assert not torch.allclose(
        rp.sample(denoiser, x, sampler="dpmpp_2m", times=three), rp.sample(denoiser, x, sampler="ddim", times=three)
    )
    method = DPMpp2M()
    first = rp.sample(denoiser, x, sampler=method, times=three)
    assert torch.equal(first, rp.sample(denoiser, x, sampler=method, times=three))  # nothing is left in the object


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_propagates_mean_and_covariance_as_derived(eta):
    """One affine step on the Gaussian oracle against DDIM's formula, for any η."""
    schedule, t, s = rp.Cosine(), 0.6, 0.5
    _net, denoiser = oracle(schedule)
    matrix, offset, gains = affine(denoiser, rp.DDIM(eta), [t, s])
    eye = torch.eye(3, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    gain = alpha * COV @ torch.linalg.inv(alpha**2 * COV + sigma**2 * eye)
    tilde = sigma_s**2 * (1 - (alpha * sigma_s / (alpha_s * sigma)) ** 2)
    # x_s = (α_s − kα) x̂0 + k x_t + η σ̃ z
    k = (sigma_s**2 - eta**2 * tilde).sqrt() / sigma
    torch.testing.assert_close(matrix, (alpha_s - k * alpha) * gain + k * eye)
    torch.testing.assert_close(gains[0], eta * tilde.sqrt() * eye)
    # The mean of the marginal is carried over exactly.
    torch.testing.assert_close(matrix @ (alpha * MEAN) + offset, alpha_s * MEAN)


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


def expected_levels(times, schedule):
    return [float(schedule.sigma(t) / schedule.alpha(t)) for t in times]


#: What the grid "learned" needs to know: here of unit normal data.
PROFILE = {"log_snr": [float(v) for v in range(-40, 41)], "var": [1 / (1 + math.exp(v)) for v in range(-40, 41)]}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_grids_fall_from_the_end_of_t_range_to_0(name, schedule):
    if name in ("leading", "trailing", "linspace") and schedule.smooth:
        with pytest.raises(Unsupported, match="steps of a table"):
            rp.sample(oracle(schedule)[1], noise(), grid=name, sampler="ddim")
        return
    for steps in (1, 2, 7, 50):
        for t_range in ((0.0, 1.0), (0.05, 1.0), (0.0, 0.9)):
            if name in ("leading", "trailing", "linspace") and t_range != (0.0, 1.0):
                continue
            denoiser = rp.Denoiser(Counting(), schedule, "x0", t_range=t_range, data={"error_profile": PROFILE})
            times = GRIDS[name](denoiser, steps)
            assert len(times) == steps + 1
            assert times[-1] == 0
            assert all(a > b for a, b in itertools.pairwise(times))
            if name not in ("leading", "linspace"):
                assert times[0] == pytest.approx(t_range[1])
            assert all(t_range[0] <= t <= t_range[1] for t in times[:-1])
            rp.sample(denoiser, (2, 3), grid=name, steps=steps, sampler="ddim")


def test_grids_are_even_in_what_they_say():
    schedule = rp.DDPM()
    denoiser = rp.Denoiser(Counting(), schedule, "x0")
    log_snr = schedule.log_snr(torch.tensor(grids.log_snr(denoiser, 10)[:-1], dtype=torch.float64))
    torch.testing.assert_close(log_snr.diff(), log_snr.diff().mean().expand(9))
    found = expected_levels(grids.karras(denoiser, 10, rho=5.0)[:-1], schedule)
    u = torch.tensor(found, dtype=torch.float64) ** (1 / 5)
    torch.testing.assert_close(u.diff(), u.diff().mean().expand(9))
    flow = rp.Denoiser(Counting(), "rectified_flow", "x0")
    shifted = grids.shifted(flow, 10, shift=3.0)
    even = grids.linear(flow, 10)
    torch.testing.assert_close(
        torch.tensor(expected_levels(shifted[1:], flow.schedule)),
        3 * torch.tensor(expected_levels(even[1:], flow.schedule)),
    )
    assert grids.shifted(flow, 10, shift=1.0) == pytest.approx(even)


def test_karras_grid_is_edms():
    """σ/α from 80 to 0.002 with ρ = 7 in 18 steps, eq. 5."""
    schedule = rp.RectifiedFlow()
    denoiser = rp.Denoiser(Counting(), schedule, "x0")
    ends = {k: float(schedule.time_at(-2 * math.log(v))) for k, v in (("start", 80.0), ("last", 0.002))}
    found = torch.tensor(expected_levels(grids.karras(denoiser, 18, **ends), schedule))
    i = torch.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(found[:-1], expected, rtol=1e-5, atol=0)
    assert found[-1] == 0


def test_table_grids_keep_to_integer_steps():
    net = Counting()
    denoiser = rp.Denoiser(net, "ddpm", "x0", time="step", data={"error_profile": PROFILE})
    for name in GRIDS:
        net.times.clear()
        rp.sample(denoiser, (2, 3), sampler="ddim", grid=name, steps=12)
        assert all(t == int(t) for t in net.times), name
    assert grids.leading(denoiser, 50, offset=1)[:-1] == pytest.approx([(k + 2) / 1000 for k in range(980, -1, -20)])


def test_a_grid_may_be_a_function_and_has_to_fit():
    denoiser = rp.Denoiser(Counting(), "rectified_flow", "x0", t_range=(0.1, 0.9))
    assert len(rp.sample(denoiser, (2, 3), grid=lambda d, n: [0.9, 0.5, 0.0], trajectory=True).times) == 3
    with pytest.raises(UnknownName, match="Did you mean 'karras'"):
        rp.sample(denoiser, (2, 3), grid="karas")
    for wrong in (0.05, 0.95):
        with pytest.raises(TimeOutOfRange, match="t_range"):
            grids.linear(denoiser, 5, start=wrong)
    with pytest.raises(ReparamError, match="rho"):
        grids.karras(denoiser, 5, rho=0)
    with pytest.raises(ReparamError, match="shift"):
        grids.shifted(denoiser, 5, shift=-1)
    with pytest.raises(TimeOutOfRange, match="last"):
        grids.log_snr(denoiser, 5, last=0.01)
    with pytest.raises(Unsupported, match="more than this table"):
        grids.karras(rp.Denoiser(Counting(), "ddpm", "x0", time="step"), 900)


@pytest.mark.parametrize("method", DETERMINISTIC, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_inversion_and_back(method, schedule):
    """Data to noise on rising times, from exactly t = 0, meets the exact flow; and the way back returns."""
    if method.needs_smooth and not schedule.smooth:
        return
    net, denoiser = oracle(schedule, "x0")
    x0 = MEAN + noise() @ torch.linalg.cholesky(COV).T
    up = [0.0, *torch.linspace(0.005, 0.9, 359, dtype=torch.float64).tolist()]
    if not schedule.smooth:
        up = [0.0, *torch.arange(1, 901, 2, dtype=torch.float64).div(1000).tolist()]
    found = rp.sample(denoiser, start=x0, sampler=method, times=up)
    torch.testing.assert_close(found, net.flow(x0, 0.0, up[-1]), rtol=0, atol=0.03 if method.order == 1 else 1e-2)
    back = rp.sample(denoiser, start=found, sampler=method, times=up[::-1])
    torch.testing.assert_close(back, x0, rtol=0, atol=0.05 if method.order == 1 else 2e-2)


def test_inversion_reaches_pure_noise_and_refuses_chance():
    net, denoiser = oracle(rp.RectifiedFlow(), "x0")
    x0 = MEAN + noise() @ torch.linalg.cholesky(COV).T
    up = torch.linspace(0, 1, 201, dtype=torch.float64)
    for method in (Heun(), Heun("alpha/sigma"), DPMpp2M()):
        torch.testing.assert_close(
            rp.sample(denoiser, start=x0, sampler=method, times=up), net.flow(x0, 0.0, 1.0), rtol=0, atol=5e-3
        )
    for method in (Ancestral(), rp.DDIM(0.1), EDM(churn=1.0), SDEDPMpp2M()):
        with pytest.raises(Unsupported, match="deterministic"):
            rp.sample(denoiser, start=x0, sampler=method, times=up)


def test_image_to_image_starts_in_the_middle():
    schedule = rp.Cosine()
    net, denoiser = oracle(schedule)
    picture = (MEAN + noise() @ torch.linalg.cholesky(COV).T).float()
    x = schedule.add_noise(picture, noise().float(), 0.5)
    times = grids.linear(denoiser, 40, start=0.5)
    assert times[0] == 0.5
    way = rp.sample(denoiser, start=x.half(), times=times, trajectory=True)
    assert way.x.dtype == torch.float32
    torch.testing.assert_close(way.states[0], x.half().float())
    exact = net.flow(x.half().double(), 0.5, 0.0)
    torch.testing.assert_close(way.x.double(), exact, rtol=0, atol=2e-3)
    with pytest.raises(Conflict, match="found both"):
        rp.sample(denoiser, (2, 3), start=x)
    with pytest.raises(Conflict, match="found neither"):
        rp.sample(denoiser)


def test_thresholds_act_on_x0_and_the_rest_follows():
    """The clipped walk is the walk of a denoiser whose x0 is the clipped one, for every sampler and any target."""
    schedule = rp.Cosine()

    class ClippedOracle(GaussianOracle):
        def posterior_mean(self, x, t):
            return super().posterior_mean(x, t).clamp(-0.5, 0.5)

    truth = rp.Denoiser(ClippedOracle(MEAN, COV, schedule, rp.target("x0")), schedule, "x0")
    times = [0.98, 0.7, 0.4, 0.1, 0.0]
    for method in METHODS:
        for target in ("eps", "v", "x0"):
            ways = [
                rp.sample(d, noise(), sampler=method, times=times, generator=torch.Generator().manual_seed(0))
                for d in (Clipped(oracle(schedule, target)[1], 0.5), truth)
            ]
            torch.testing.assert_close(ways[0], ways[1], rtol=0, atol=1e-10)
    assert rp.sample(Clipped(oracle(schedule)[1], 0.5), noise()).abs().max() <= 0.5


def test_dynamic_thresholds_are_imagens():
    class Same(nn.Module):
        def forward(self, x, time):
            return x

    x = (
        torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        * torch.tensor([0.1, 1, 2, 5])[:, None, None, None]
    )
    plain = rp.Denoiser(Same(), "rectified_flow", "x0")
    found = DynamicallyClipped(plain, quantile=0.9)(x, 0.5).mean
    for row, got in zip(x, found, strict=True):
        s = max(1.0, torch.quantile(row.abs().flatten(), 0.9).item())
        torch.testing.assert_close(got, row.clamp(-s, s) / s)
    for bad in ({"limit": 0.0}, {"quantile": 0.0}, {"quantile": 1.5}):
        with pytest.raises(ReparamError, match="thresholding"):
            DynamicallyClipped(plain, **bad)


@pytest.mark.parametrize("kind", [Clipped, DynamicallyClipped])
def test_data_that_reach_further_are_not_clipped(kind):
    latents = {"min": -7.3, "max": 6.1}
    denoiser = rp.Denoiser(Counting(), "rectified_flow", "x0", data=latents)
    with pytest.raises(Conflict, match=r"reach from -7.3 to 6.1 .*latents.*limit=7.3"):
        kind(denoiser)
    assert kind(denoiser, limit=7.3).limit == 7.3
    pictures = rp.Denoiser(Counting(), "rectified_flow", "x0", data={"min": -1.0, "max": 1.0})
    assert kind(pictures).limit == 1.0


def test_noises_may_be_given():
    denoiser = oracle(rp.Cosine())[1]
    zs = [noise().roll(i, 0) for i in range(9)]
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(16, 3, dtype=torch.float64, generator=generator) for _ in range(4)]
    drawn = rp.sample(denoiser, noise(), sampler="ancestral", steps=5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rp.sample(denoiser, noise(), sampler="ancestral", steps=5, noises=given), drawn)
    with pytest.raises(ReparamError, match="found no more"):
        rp.sample(denoiser, noise(), sampler="ancestral", steps=11, noises=zs)
    with pytest.raises(ReparamError, match=r"found shape \[2, 3\]"):
        rp.sample(denoiser, noise(), sampler="ancestral", steps=3, noises=[z[:2] for z in zs])


@pytest.mark.parametrize(
    ("target", "input"), [*itertools.product(["x0", "eps", "v", "velocity"], ["none", "unit_variance"]), ("edm", "edm")]
)
@pytest.mark.parametrize("time", ["t", "1-t", "log_snr", "step"])
def test_the_table_of_a_grid_changes_nothing(time, input, target):
    """The estimate by the table is the one by forward, at the grid's times and between them, for any kind of t."""

    class Affine(nn.Module):
        def forward(self, x, time):
            return 0.3 * x + 0.01 * time[:, None].to(x.dtype) + 0.1

    denoiser = rp.Denoiser(Affine(), "ddpm", target, time=time, input=input)
    x = noise()
    times = [0.9, 0.5, 0.1]
    plain = [denoiser(x, t).mean for t in (*times, 0.3)]
    with prepared(denoiser, times, x):
        assert len(denoiser._table[0]) == 3
        for t, expected in zip((*times, 0.3), plain, strict=True):
            for kind in (t, torch.tensor(t, dtype=torch.float64), torch.full((16,), t, dtype=torch.float64)):
                torch.testing.assert_close(denoiser(x, kind).mean, expected, rtol=1e-14, atol=1e-14)
            found = estimate(denoiser, x, t, {})
            torch.testing.assert_close(found.blend(0.7, -0.2), 0.7 * x - 0.2 * expected, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(found.mean, expected, rtol=1e-14, atol=1e-14)
        assert denoiser(x.float(), 0.5).mean.dtype == torch.float32
    assert denoiser._table is None


def test_errors_are_those_of_forward_inside_a_grid_too():
    class Wrong(nn.Module):
        def forward(self, x, time):
            return x[:, :1]

    denoiser = rp.Denoiser(Wrong(), "cosine", "v")
    with pytest.raises(ReparamError, match=r"Wrong returned shape \[2, 1\]"):
        rp.sample(denoiser, (2, 3))
    assert denoiser._table is None
    eps = rp.Denoiser(Counting().eval(), "cosine", "eps", t_range=(0.0, 0.9))
    with prepared(eps, [1.0, 0.5], torch.zeros(2, 3)), pytest.raises(SingularTime):
        eps(torch.zeros(2, 3), 1.0)


def test_wrappers_hooks_and_replaced_methods_are_all_heard():
    """A subclass's forward, a hook and a patched forward each change the samples they should."""

    class Twice(Guided):
        def forward(self, x, t, **cond):
            found = self.inner(x, t, **cond)
            return found._replace(mean=2 * found.mean)

    x = noise()
    one = rp.sample(oracle(rp.Cosine())[1], x, sampler="ddim", times=[0.9, 0.0])
    twice = rp.sample(Twice(oracle(rp.Cosine())[1]), x, sampler="ddim", times=[0.9, 0.0])
    torch.testing.assert_close(twice, 2 * one)
    hooked = oracle(rp.Cosine())[1]
    hooked.register_forward_hook(lambda m, args, out: out._replace(mean=3 * out.mean))
    torch.testing.assert_close(rp.sample(hooked, x, sampler="ddim", times=[0.9, 0.0]), 3 * one)
    patched = oracle(rp.Cosine())[1]
    inner = patched.forward
    patched.forward = lambda *a, **k: inner(*a, **k)._replace(mean=torch.zeros_like(x))
    assert not rp.sample(patched, x, sampler="ddim", times=[0.9, 0.0]).any()


def test_guided_sampling_uses_the_inner_table():
    class Labelled(nn.Module):
        def forward(self, x, time, y):
            return 0.5 * x + y[:, None]

    inner = rp.Denoiser(Labelled(), "cosine", "v")
    guided = ClassifierFree(inner, 2.0, null_label=0)
    x, y = noise(), torch.ones(16, dtype=torch.long)
    seen = []
    original = inner._entry
    inner._entry = lambda x, t: seen.append(original(x, t)) or seen[-1]
    found = rp.sample(guided, x, steps=10, sampler="ddim", cond={"y": y})
    assert len(seen) == 10
    assert all(entry is not None for entry in seen)
    del inner._entry
    plain = guided(x, 1.0, y=y).mean
    way = rp.sample(guided, x, steps=10, sampler="ddim", cond={"y": y}, trajectory=True)
    torch.testing.assert_close(way.x0[0], plain, rtol=1e-14, atol=1e-14)
    assert torch.equal(way.x, found)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_keeping_the_trajectory_changes_no_bit(method):
    denoiser = oracle(rp.Cosine())[1]
    start = noise().float() * 0.9
    options = {"sampler": method, "times": [0.95, 0.6, 0.3, 0.0]}
    plain = rp.sample(denoiser, start, **options, generator=torch.Generator().manual_seed(1))
    way = rp.sample(denoiser, start, **options, generator=torch.Generator().manual_seed(1), trajectory=True)
    assert torch.equal(plain, way.x)


def test_elementwise_noise():
    """Every sampler on noise whose size differs by element is itself on every element."""
    sizes = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    data = torch.tensor([0.4, 1.0, 0.2], dtype=torch.float64)

    class Independent(nn.Module):
        """The ideal network for independent normal elements of mean 0."""

        def __init__(self, schedule, size, spread):
            super().__init__()
            self.schedule, self.size, self.spread = schedule, size, spread

        def forward(self, x, time):
            t = time[0].double()
            alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t) * self.size
            return alpha * self.spread**2 / (alpha**2 * self.spread**2 + sigma**2) * x

    base = rp.RectifiedFlow()
    whole = rp.Denoiser(Independent(base, sizes, data), rp.schedules.Elementwise(base, sizes), "x0")
    times = [0.9, 0.7, 0.4, 0.1, 0.0]
    zs = torch.stack([noise().roll(i, 0) for i in range(4)])
    for method in METHODS:
        if isinstance(method, EDM) and method.churn:
            with pytest.raises(Unsupported, match="elementwise"):
                rp.sample(whole, noise(), sampler=method, times=times)
            continue
        found = rp.sample(whole, noise(), sampler=method, times=times, noises=zs)
        for i in range(3):
            schedule = rp.RectifiedFlow(float(sizes[i]))
            part = rp.Denoiser(Independent(base, sizes[i], data[i]), schedule, "x0")
            one = rp.sample(part, noise()[:, i : i + 1], sampler=method, times=times, noises=zs[:, :, i : i + 1])
            torch.testing.assert_close(found[:, i : i + 1], one, rtol=0, atol=1e-12)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_scaled_tensors_are_summed_alike_at_any_size(dtype):
    for shape in ((2, 3), (8, 3, 32, 32)):
        x, y = torch.randn(2, *shape, dtype=dtype)
        for one, other in ((x, y), (x.transpose(0, 1), y.transpose(0, 1))):
            torch.testing.assert_close(weighted(0.7, one, -0.3, other), 0.7 * one - 0.3 * other)
            torch.testing.assert_close(weighted(0.0, one * torch.nan, 2.0, other), 2.0 * other)
    a = torch.tensor(3.0, dtype=dtype, requires_grad=True)
    weighted(0.7, a.expand(5000).contiguous(), -0.3, torch.ones(5000, dtype=dtype)).sum().backward()
    assert float(a.grad) == pytest.approx(0.7 * 5000, rel=1e-5)


class Still(nn.Module):
    """Answers with its input, and may do something at its first call."""

    def __init__(self, at_first=lambda: None):
        super().__init__()
        self.at_first, self.calls = at_first, 0

    def forward(self, x, time, y=None):
        self.calls += 1
        if self.calls == 1:
            self.at_first()
        return x


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_no_step_reads_what_the_device_holds(name):
    """A tensor on the meta device has no values: whoever looks at one, as a host that waits for a GPU does, fails."""
    net = Still()
    x = torch.empty(4, 3, device="meta")
    denoiser = rp.Denoiser(net, rp.Cosine(), "v")
    found = rp.sample(denoiser, start=x, sampler=name, times=grids.karras(denoiser, 5, start=0.98))
    assert found.shape == x.shape
    assert found.device.type == "meta"
    guided = ClassifierFree(denoiser, 2.0, null_label=3)
    y = torch.empty(4, dtype=torch.long, device="meta")
    times = grids.karras(denoiser, 5, start=0.98)
    assert rp.sample(guided, start=x, sampler=name, times=times, cond={"y": y}).shape == x.shape
    assert net.calls >= 10


class Operations(TorchDispatchMode):
    """What is done inside to all but float64 coefficients, by name; and what carries a tensor to another device."""

    def __init__(self):
        super().__init__()
        self.names, self.carried = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if isinstance(out, torch.Tensor) and out.dtype != torch.float64:
            self.names.add(name)
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if name == "aten::copy_" else args[0]
            if source.device != out.device:
                self.carried.append(f"{name} of {list(source.shape)} from {source.device} to {out.device}")
        return out


ELEMENTWISE = rp.schedules.Elementwise(rp.Cosine(), [0.5, 1.0, 2.0])


@pytest.mark.parametrize("schedule", [rp.Cosine(), ELEMENTWISE], ids=["one noise", "elementwise"])
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(("target", "input"), [("v", "none"), ("eps", "unit_variance")])
def test_no_step_carries_anything_from_one_device_to_another(method, schedule, target, input):
    """All that steps need is on the state's device before the first one begins; a copy is what a GPU may wait for."""
    if isinstance(method, EDM) and method.churn and schedule is ELEMENTWISE:
        pytest.skip("refused")
    seen = Operations()
    net = Still(seen.__enter__)  # in the first evaluation, to the end of the walk
    denoiser = rp.Denoiser(net, schedule, target, input=input, t_range=(0.0, 0.98))
    times = [0.98, 0.6, 0.5, 0.3, 0.1, 0.0]
    rp.sample(denoiser, start=torch.zeros(4, 3), sampler=method, times=times[:2])
    assert seen.names  # it is awake
    seen.__exit__(None, None, None)
    assert not seen.carried
    net.calls = 0
    try:
        found = rp.sample(denoiser, start=torch.empty(4, 3, device="meta"), sampler=method, times=times)
    finally:
        seen.__exit__(None, None, None)
    assert found.shape == (4, 3)
    assert net.calls >= 5
    assert not seen.carried


def test_what_carries_a_tensor_is_noticed():
    x = torch.empty(4, 3, device="meta")
    with Operations() as seen:
        ELEMENTWISE.sigma(0.5).to(x)
        x.copy_(torch.zeros(4, 3))
    assert len(seen.carried) == 2


def test_elementwise_coefficients_too_many_for_the_device_stay_on_the_host(monkeypatch):
    denoiser, x = rp.Denoiser(Still(), ELEMENTWISE, "v"), noise()
    kept = rp.sample(denoiser, x, sampler="ddim", steps=10)
    with prepared(denoiser, [0.5], x):
        assert denoiser._table[0]
    monkeypatch.setattr("reparam.denoiser._MOST", 20)
    with prepared(denoiser, [0.5] * 10, x):
        assert not denoiser._table[0]
    assert moved(levels(ELEMENTWISE, [0.5] * 10), torch.device("meta"))[0].sigma.device.type == "cpu"
    torch.testing.assert_close(rp.sample(denoiser, x, sampler="ddim", steps=10), kept, rtol=1e-13, atol=1e-13)


def test_levels_of_plain_numbers_are_not_made_again():
    """A tenth of a step's time on the host, for small networks."""
    path = levels(rp.schedules.Cosine(), [0.9, 0.5, 0.0])
    assert all(a is b for a, b in zip(moved(path, torch.device("meta")), path, strict=True))


@pytest.mark.parametrize("time", ["t", "log_snr"])
@pytest.mark.parametrize(
    ("target", "input"), [("x0", "none"), ("eps", "unit_variance"), ("velocity", "none"), ("edm", "edm")]
)
def test_the_table_of_a_grid_changes_nothing_of_elementwise_noise(time, target, input):
    class Affine(nn.Module):
        def forward(self, x, time):
            return 0.3 * x + 0.01 * time.reshape(-1, 1, 1).to(x.dtype) + 0.1

    x, times = noise().reshape(8, 3, 2), [0.9, 0.5, 0.1]
    for scale in ([0.5, 1.0, 2.0], [[0.5, 0.6], [1.0, 1.1], [2.0, 2.2]]):
        schedule = rp.schedules.Elementwise(rp.RectifiedFlow(), scale)
        denoiser = rp.Denoiser(Affine(), schedule, target, time=time, input=input, t_range=(0.01, 0.99))
        plain = [denoiser(x, t).mean for t in times]
        with prepared(denoiser, times, x):
            assert len(denoiser._table[0]) == 3
            for t, expected in zip(times, plain, strict=True):
                torch.testing.assert_close(denoiser(x, t).mean, expected, rtol=1e-13, atol=1e-13)
                found = estimate(denoiser, x, t, {})
                torch.testing.assert_close(found.blend(0.7, -0.2), 0.7 * x - 0.2 * expected, rtol=1e-13, atol=1e-13)
            assert denoiser(x.float(), 0.5).mean.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_autocast_around_sampling_casts_nothing_but_the_network(method):
    """No step does what autocast casts, on any device; the network does."""
    net = rp.networks.MLP(dim=64, hidden=16)
    denoiser = rp.Denoiser(net, "cosine", "x0", t_range=(0.0, 0.98))
    start = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))  # as many numbers as the fast sum is for
    options = {"start": start, "sampler": method, "times": [0.9, 0.6, 0.3]}
    answers = []
    net.register_forward_hook(lambda m, args, out: answers.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert rp.sample(denoiser, **options).dtype == torch.float32
        assert set(answers) == {torch.bfloat16}
        denoiser.net = Still()
        with Operations() as seen:
            rp.sample(denoiser, **options)
    kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    lowered = {name for name in seen.names if kernel(name, "AutocastCUDA")}
    assert kernel("aten::addr", "AutocastCUDA")
    assert lowered == set()
    plain = rp.sample(denoiser, **options, noises=[start] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(rp.sample(denoiser, **options, noises=[start] * 3), plain, rtol=1e-6, atol=1e-6)


def from_host(name):
    """The steps' noise from a generator on the host, or given there."""
    if name == "generator":
        return {"generator": torch.Generator().manual_seed(0)}
    return {"noises": [torch.randn(64, 3, 32, 32) for _ in range(20)]}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("schedule", [rp.Cosine(), rp.schedules.Elementwise(rp.Cosine(), [[[0.5]], [[1.0]], [[2.0]]])])
@pytest.mark.parametrize("options", ["device", "generator", "noises"])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_no_step_waits_for_the_gpu(name, options, schedule):
    """From the first evaluation to the last, CUDA itself refuses whatever would synchronise."""
    denoiser = rp.Denoiser(Still(lambda: torch.cuda.set_sync_debug_mode("error")), schedule, "v")
    x = torch.randn(64, 3, 32, 32, device="cuda")
    noise = {"generator": torch.Generator("cuda").manual_seed(0)} if options == "device" else from_host(options)
    times = grids.karras(rp.Denoiser(Still(), rp.Cosine(), "v"), 20, start=0.98)
    try:
        rp.sample(denoiser, start=x, sampler=name, times=times, **noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", ["generator", "noises"])
def test_noise_of_the_host_is_the_same_on_a_gpu(options):
    torch.manual_seed(0)
    denoiser, x = rp.Denoiser(Still(), rp.Cosine(), "x0"), torch.randn(64, 3, 32, 32)
    torch.manual_seed(1)
    plain = rp.sample(denoiser, start=x, sampler="ancestral", steps=20, **from_host(options))
    torch.manual_seed(1)
    found = rp.sample(denoiser, start=x.cuda(), sampler="ancestral", steps=20, **from_host(options))
    torch.testing.assert_close(found.cpu(), plain, rtol=1e-5, atol=1e-5)


def test_inversion_starts_from_data_of_any_scale():
    """x at t = 0 is α(0) x0, whatever α(0) is, and away from there x_s = α_s x0."""
    denoiser, x0 = oracle(rp.schedule({"name": "path", "alpha_of": "2 - 2*t", "sigma_of": "t"}))[1], noise()
    way = rp.sample(denoiser, start=2 * x0, sampler="ddim", times=[0.0, 0.3, 0.6], trajectory=True)
    torch.testing.assert_close(way.x0[0], x0)
    torch.testing.assert_close(way.states[1], 1.4 * x0)


@pytest.mark.parametrize("schedule", SMOOTH, ids=str)
def test_euler_and_heun_take_the_slopes_of_the_ode_where_they_should(schedule):
    """x + h f(x, t), and x + h/2 (f(x, t) + f(x + h f(x, t), s)): a slope at the wrong end has the same order."""
    net, denoiser = oracle(schedule)
    t, s, x = 0.8, 0.5, noise()

    def f(x, t):
        mean = net.posterior_mean(x, t)
        eps = (x - schedule.alpha(t) * mean) / schedule.sigma(t)
        return schedule.alpha_dot(t) * mean + schedule.sigma_dot(t) * eps

    guess = x + (s - t) * f(x, t)
    torch.testing.assert_close(rp.sample(denoiser, start=x, sampler="euler", times=[t, s]), guess)
    better = x + (s - t) / 2 * (f(x, t) + f(guess, s))
    torch.testing.assert_close(rp.sample(denoiser, start=x, sampler="heun", times=[t, s]), better)


def test_churn_raises_the_noise_level_by_at_most_the_square_root_of_two():
    """σ̂ = √2 σ, so that the noise added is σ z itself, in units of α."""
    schedule, t, s = rp.RectifiedFlow(), 0.5, 0.2
    denoiser, x, z = oracle(schedule)[1], noise(), noise().flip(0)
    found = single(EDM(churn=1000.0), denoiser, t, s, x, z)
    raised = math.sqrt(2) / (1 + math.sqrt(2))  # t/(1 − t) = √2
    start = (1 - raised) * (x / 0.5 + z)
    torch.testing.assert_close(found, single(Heun("sigma/alpha"), denoiser, raised, s, start))


class OnSteps(nn.Module):
    """A network of t, asked by integer steps of a table alone."""

    def __init__(self, net, schedule):
        super().__init__()
        self.net, self.schedule = net, schedule

    def forward(self, x, time):
        assert time.dtype == torch.int64
        return self.net(x, self.schedule.time(time))


@pytest.mark.parametrize(("k", "gamma"), [(0, 0.4), (0, 0.1), (1, 0.3), (60, 0.02), (400, 0.4), (700, 0.41)])
def test_churn_on_a_table_raises_to_its_nearest_step(k, gamma):
    """Algorithm 2 in σ/α and x/α, with the noise that leads from the step to the nearest one of the raised level."""
    schedule, x, z = rp.DDPM(), noise(), noise().flip(0)
    net = oracle(schedule)[0]
    denoiser = rp.Denoiser(OnSteps(net, schedule), schedule, "v", time="step")
    every = schedule.time(torch.arange(1000))
    angles = torch.atan2(schedule.sigma(every), schedule.alpha(every))
    raised = int((angles - torch.atan((1 + gamma) * angles[k].tan())).abs().argmin())
    assert (raised > k) == ((k, gamma) != (0, 0.1))  # one is too far from the next for so little

    def D(y, k):
        return net.posterior_mean(y * angles[k].cos(), float(every[k]))

    y = x / angles[k].cos() + (angles[raised].tan() ** 2 - angles[k].tan() ** 2).sqrt() * z
    times, expected = [float(every[k]), 0.0], D(y, raised)
    if k > 1:
        sigma, end, times[1] = angles[raised].tan(), angles[k // 3].tan(), float(every[k // 3])
        slope = (y - expected) / sigma
        guess = y + (end - sigma) * slope
        y = y + (end - sigma) * (slope + (guess - D(guess, k // 3)) / end) / 2
        expected = y * angles[k // 3].cos()
    found = rp.sample(denoiser, start=x, sampler=EDM(churn=gamma), times=times, noises=[z])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_churn_is_known_before_the_first_step():
    """Where it leads is in the table of coefficients, or refused before the network is asked."""
    schedule, method = rp.DDPM(), EDM(churn=10.0, s_max=20.0)
    net = oracle(schedule)[0]
    denoiser = rp.Denoiser(OnSteps(net, schedule), schedule, "v", time="step")
    seen, original = [], denoiser._entry
    denoiser._entry = lambda x, t: seen.append(original(x, t)) or seen[-1]
    assert bool(rp.sample(denoiser, (16, 3), sampler=method, steps=25).isfinite().all())
    assert len(seen) == 2 * 25 - 1
    assert all(entry is not None for entry in seen)
    still = rp.Denoiser(Still(), "ddpm", "v")
    with pytest.raises(TimeOutOfRange, match="s_max below"):
        rp.sample(still, (2, 3), sampler=EDM(churn=4.0))
    narrow = rp.Denoiser(Still(), "ddpm", "v", t_range=(0.0, 0.6))
    with pytest.raises(TimeOutOfRange, match=r"trained on t in \[0, 0.6\]; give edm an s_max"):
        rp.sample(narrow, (2, 3), sampler=EDM(churn=4.0))
    assert still.net.calls == narrow.net.calls == 0
