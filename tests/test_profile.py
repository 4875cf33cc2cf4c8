"""Error profiles, and the sampling times that follow from them, against exact oracles."""

import functools
import itertools
import json
import math

import pytest
import torch

import reparam as rp
from oracles import GaussianOracle, MixtureOracle
from reparam.denoiser import Posterior
from reparam.errors import NetworkError, ReparamError, TimeOutOfRange, Unsupported
from reparam.metrics import sliced_wasserstein
from reparam.samplers import ErrorProfile, grids
from reparam.samplers.profile import best_times, falling, measure

pytestmark = pytest.mark.usefixtures("one_thread")

FLOW = rp.RectifiedFlow()


class Exact(rp.Denoiser):
    """The exact posterior of an oracle, with its variances."""

    def forward(self, x_t, t, **cond):
        mean, cov = self.net.posterior(x_t, float(t))
        return Posterior(mean, cov.diagonal(dim1=1, dim2=2))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def unit(n, d, seed):
    return torch.randn(n, d, dtype=torch.float64, generator=seeded(seed))


def gaussian(schedule, var=0.25, d=2, **conventions):
    cov = var * torch.eye(d, dtype=torch.float64)
    net = GaussianOracle(torch.zeros(d, dtype=torch.float64), cov, schedule, rp.target("x0"))
    return Exact(net, schedule, "x0", **conventions)


def gaussian_profile(var=0.25, ends=(-16.0, 16.0), n=1025):
    """v = 1/(1/v_data + SNR), in closed form."""
    lam = torch.linspace(*ends, n, dtype=torch.float64)
    return ErrorProfile(lam.tolist(), (1 / (1 / var + lam.exp())).tolist())


K = 12
MEANS = unit(K, 2, 0) * 0.9
_A = unit(2 * K, 2, 1).reshape(K, 2, 2) * 0.06
COVS = _A @ _A.mT + 1e-4 * torch.eye(2, dtype=torch.float64)


def mixture(schedule):
    """Twelve blobs of a twentieth of the spread of their centres."""
    return Exact(MixtureOracle(torch.ones(K), MEANS, COVS, schedule, rp.target("x0")), schedule, "x0")


def draw(n, seed):
    k = torch.randint(K, (n,), generator=seeded(seed))
    return MEANS[k] + torch.einsum("bij,bj->bi", torch.linalg.cholesky(COVS)[k], unit(n, 2, seed + 1))


@functools.cache
def measured(schedule, n=1024, levels=64, seed=5):
    return measure(mixture(schedule), draw(n, seed), levels=levels, generator=seeded(seed + 2))


def with_profile(schedule):
    model = mixture(schedule)
    model.data = {"error_profile": measured(schedule).to_dict()}
    return model


def cost(profile, schedule, times):
    """The divergence of all steps but the leap."""
    return float(profile.step_kl(schedule.log_snr(torch.tensor(times[:-1], dtype=torch.float64))).sum())


# The profile.


@pytest.mark.parametrize("schedule", [FLOW, rp.RectifiedFlow(3.0), rp.VE(), rp.Cosine(), rp.DDPM()], ids=str)
def test_the_profile_of_gaussian_data_is_the_closed_form(schedule):
    found = measure(gaussian(schedule, 0.25), 0.5 * unit(4, 2, 0), levels=16, generator=seeded(0))
    t = schedule.time_at(torch.tensor(found.log_snr, dtype=torch.float64))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    expected = 0.25 * sigma**2 / (0.25 * alpha**2 + sigma**2)
    torch.testing.assert_close(torch.tensor(found.var, dtype=torch.float64), expected, rtol=1e-7, atol=0)
    assert len(found.var) == 16
    torch.testing.assert_close(found.at(torch.tensor(found.log_snr)), expected, rtol=1e-5, atol=0)


def test_the_profile_of_a_mixture_is_the_squared_error_of_its_mean():
    """Var[x0 | x_t] on average is E|x0 − μ|²: held against the errors themselves, at three levels."""
    model = mixture(FLOW)
    found = measure(model, draw(2048, 0), levels=64, generator=seeded(7))
    for t in (0.1, 0.4, 0.9):
        x0 = draw(20_000, 2)
        mean, _ = model.net.posterior(FLOW.add_noise(x0, unit(20_000, 2, 9), t), t)
        assert float(found.at(FLOW.log_snr(t))) == pytest.approx(float((x0 - mean).square().mean()), rel=0.05)


def test_the_profile_travels_as_plain_data_and_across_schedules():
    model = with_profile(FLOW)
    found = ErrorProfile.of(model)
    assert json.loads(json.dumps(model.data["error_profile"])) == found.to_dict()
    elsewhere = measure(model.on("cosine"), draw(512, 5), generator=seeded(7))
    lam = torch.linspace(-8, 8, 33, dtype=torch.float64)
    torch.testing.assert_close(elsewhere.at(lam), found.at(lam), rtol=0.05, atol=1e-6)
    ours = model.schedule.log_snr(torch.tensor(grids.learned(model, 12)[1:-1], dtype=torch.float64))
    moved = model.on(rp.RectifiedFlow(4.0))
    theirs = moved.schedule.log_snr(torch.tensor(grids.learned(moved, 12)[1:-1], dtype=torch.float64))
    torch.testing.assert_close(theirs, ours)


def test_measuring_keeps_to_t_range_and_to_the_steps_of_a_table():
    found = measure(gaussian(FLOW, t_range=(0.1, 0.9)), unit(4, 2, 0), levels=5)
    ends = FLOW.log_snr(torch.tensor([0.9, 0.1], dtype=torch.float64)).tolist()
    assert [found.log_snr[0], found.log_snr[-1]] == pytest.approx(ends)
    part = measure(gaussian(FLOW), unit(4, 2, 0), levels=5, t_range=(0.2, 0.5))
    assert part.log_snr[-1] == pytest.approx(float(FLOW.log_snr(0.2)))
    table = rp.DDPM(zero_terminal_snr=True)
    stepped = measure(gaussian(table, time="step"), unit(4, 2, 0), levels=64)
    table.step(table.time_at(torch.tensor(stepped.log_snr, dtype=torch.float64)))  # raises off the steps
    with pytest.raises(TimeOutOfRange, match="must lie in the model's"):
        measure(gaussian(FLOW, t_range=(0.1, 0.9)), unit(4, 2, 0), t_range=(0.0, 0.5))


def test_a_rising_profile_is_made_to_fall():
    """The projection's own conditions: it does not rise, and no other falling sequence is nearer."""
    values = [5.0, 3.0, 4.0, 3.6, 1.0, 1.5, 0.2]
    found = falling(values)
    assert found == pytest.approx([5, *[10.6 / 3] * 3, 1.25, 1.25, 0.2])
    assert falling([3.0, 2.0, 1.0]) == [3.0, 2.0, 1.0]
    assert ErrorProfile([2, -1, 0], [0.5, 2, 1]).var == [2, 1, 0.5]  # in any order
    rising = ErrorProfile([0, 1], [1, 2])
    assert rising.var == [1.5, 1.5]
    assert float(rising.step_kl(torch.tensor([0.0, 1.0])).sum()) == pytest.approx(0, abs=1e-14)


def test_level_inverts_the_profile():
    profile = gaussian_profile()
    for var in (0.2, 0.01, 1e-4):
        assert float(profile.at(torch.tensor(profile.level(var), dtype=torch.float64))) == pytest.approx(var, rel=1e-12)
        assert profile.level(var) == pytest.approx(math.log(1 / var - 4), abs=1e-3)
    assert profile.level(1.0) == -16
    assert profile.level(1e-9) == 16


# The theory.


def test_the_posterior_mean_is_a_martingale():
    """E|μ_s − μ_t|² = v(t) − v(s), by simulation of the exact process y(u) = u x0 + W(u)."""
    net, n = mixture(FLOW).net, 40_000
    x0 = draw(n, 0)
    u = [0.5, 4.0, 40.0]
    t = [float(FLOW.time_at(math.log(v))) for v in u]
    y, walk, means, left = None, torch.zeros(n, 2, dtype=torch.float64), [], []
    for i, (now, before) in enumerate(zip(u, [0.0, *u[:-1]], strict=True)):
        walk = walk + math.sqrt(now - before) * unit(n, 2, 20 + i)
        y = now * x0 + walk
        mean, cov = net.posterior(y * FLOW.sigma(t[i]) ** 2 / FLOW.alpha(t[i]), t[i])
        means.append(mean)
        left.append(float(cov.diagonal(dim1=1, dim2=2).mean()))
    for i, j in itertools.combinations(range(3), 2):
        assert float((means[j] - means[i]).square().mean()) == pytest.approx(left[i] - left[j], rel=0.03)


@pytest.mark.parametrize("ends", [(-math.inf, 0.0), (-3.0, -2.9), (-1.0, 2.0), (2.0, 9.0)])
def test_the_divergence_of_a_step_is_the_closed_form_of_gaussian_data(ends):
    """v = 1/(1/v_d + u): ½ [v_t (u_s − u_t) − log((1/v_d + u_s)/(1/v_d + u_t))]."""
    found = gaussian_profile().step_kl(torch.tensor(ends, dtype=torch.float64))
    u, s = (math.exp(e) for e in ends)
    expected = ((s - u) / (4 + u) - math.log((4 + s) / (4 + u))) / 2
    assert float(found) == pytest.approx(expected, rel=2e-3)


def test_the_divergence_of_a_step_is_that_of_its_paths():
    """Against the divergence of two Gaussian chains of many small steps: no martingale and no Girsanov in it.

    y at δ later is N(y + μ(u) δ, δ + δ² v(u)) in truth, and N(y + μ(u_t) δ, δ) with the mean frozen; the means'
    squared difference follows from cov(y_a, y_b) = u_a u_b v_d + min(u_a, u_b).
    """
    data, start, stop, n = 0.25, 0.5, 9.0, 200_000
    u = torch.linspace(start, stop, n + 1, dtype=torch.float64)[:-1]
    step = (stop - start) / n
    v, v_t = 1 / (1 / data + u), 1 / (1 / data + start)
    own, first = u**2 * data + u, start**2 * data + start
    apart = v**2 * own + v_t**2 * first - 2 * v * v_t * (u * start * data + start)
    chain = (step * v - torch.log1p(step * v) + step * apart).sum() / 2
    levels = torch.tensor([math.log(start), math.log(stop)], dtype=torch.float64)
    assert float(gaussian_profile(data).step_kl(levels)) == pytest.approx(float(chain), rel=1e-4)


def gaussian_outcome(variances, u):
    """KL from the truth to the ancestral sampler at the last u, a Gaussian of known variance, by direction."""
    spread = torch.zeros_like(variances)  # Var[y] at u = 0
    for here, to in itertools.pairwise(u):
        gain = 1 + (to - here) * variances / (1 + here * variances)  # y + (to − here) μ, μ = v y
        spread = gain**2 * spread + to - here
    ratio = (u[-1] + u[-1] ** 2 * variances) / spread
    return float((ratio - 1 - ratio.log()).sum() / 2)


def test_the_bound_holds_and_the_learned_grid_ends_nearer_to_the_truth():
    """The divergence of the outcome itself, exact for Gaussian data of three scales, by one recursion."""
    variances = torch.tensor([1.0, 0.1, 0.001], dtype=torch.float64)
    lam = torch.linspace(-14, 14, 513, dtype=torch.float64)
    profile = ErrorProfile(lam.tolist(), (1 / (1 / variances + lam.exp()[:, None])).mean(1).tolist())
    last = float(FLOW.time_at(profile.level(1e-3)))
    other = rp.Denoiser(torch.nn.Identity(), FLOW, "x0", data={"error_profile": profile.to_dict()})
    for steps in (8, 16, 32):
        found = {}
        for name, extra in (("learned", {}), ("log_snr", {}), ("karras", {})):
            times = grids.GRIDS[name](other, steps, last=last, **extra)
            u = FLOW.log_snr(torch.tensor(times[:-1], dtype=torch.float64)).exp().tolist()
            found[name] = gaussian_outcome(variances, u)
            assert found[name] <= 3 * cost(profile, FLOW, times) * 1.001
        assert found["learned"] < 0.8 * min(found["log_snr"], found["karras"])


# The programme.


def test_the_programme_is_a_search_of_all_grids():
    profile = ErrorProfile([-6.0, -2.0, 0.0, 3.0, 6.0], [1.0, 0.9, 0.3, 0.05, 0.001])
    between = FLOW.time_at(torch.linspace(4.2, -5, 11, dtype=torch.float64)).tolist()
    high, last = float(FLOW.time_at(-6.0)), float(FLOW.time_at(5.0))
    for steps in (2, 3, 5):
        found = best_times(profile, FLOW, steps, high, last, among=between)
        every = [[high, *c[::-1], last, 0.0] for c in itertools.combinations(between, steps - 2)]
        costs = [cost(profile, FLOW, t) for t in every]
        assert cost(profile, FLOW, found) == pytest.approx(min(costs), rel=1e-12)
        best = every[costs.index(min(costs))]
        assert found == pytest.approx(best)
    with pytest.raises(Unsupported, match="14 steps are more than the 13 times"):
        best_times(profile, FLOW, 14, high, last, among=between)


def test_no_grid_nearby_is_better():
    profile = ErrorProfile.of(with_profile(FLOW))
    times = best_times(profile, FLOW, 10, 1.0, 0.01)
    least = cost(profile, FLOW, times)
    lam = FLOW.log_snr(torch.tensor(times[1:-2], dtype=torch.float64))
    for i in range(200):
        moved = lam + 0.15 * 2.0 ** -(i % 3) * unit(len(lam), 1, i)[:, 0]
        others = [1.0, *FLOW.time_at(moved.sort().values).clamp(0.0101, 0.999).tolist(), 0.01, 0.0]
        assert cost(profile, FLOW, others) > least * (1 - 1e-3)  # the table's spacing


def test_many_steps_follow_the_density():
    """Gaussian data: density sqrt(e^λ (−v')), the divergence (∫ density)²/(4N); the two ways meet at 128 steps."""
    profile = gaussian_profile()
    last = float(FLOW.time_at(8.0))
    lam = torch.linspace(-40, 8, 100_001, dtype=torch.float64)
    density = lam.exp() / (4 + lam.exp())  # −v' = e^λ/(4 + e^λ)²
    whole = float(torch.trapezoid(density, lam))
    for steps in (100, 128, 129, 200):
        times = best_times(profile, FLOW, steps, 1.0, last)
        assert all(a > b for a, b in itertools.pairwise(times))
        assert len(times) == steps + 1
        # Measured: the limit is approached from above, by about one in N.
        assert cost(profile, FLOW, times) == pytest.approx(whole**2 / (4 * (steps - 1)), rel=0.1)
    times = torch.tensor(best_times(profile, FLOW, 100, 1.0, last)[1:-1], dtype=torch.float64)
    reached = torch.log((4 + FLOW.log_snr(times).exp()) / 4)  # ∫ density in closed form
    torch.testing.assert_close(reached / whole, torch.linspace(1 / 99, 1, 99, dtype=torch.float64), rtol=0, atol=0.02)


# The grid.


@pytest.mark.parametrize(
    "schedule", [FLOW, rp.VE(), rp.Cosine(), rp.DDPM(T=200), rp.DDPM(T=200, zero_terminal_snr=True)], ids=str
)
@pytest.mark.parametrize("t_range", [(0.0, 1.0), (0.05, 1.0), (0.0, 0.9)])
def test_the_grid_falls_from_the_end_of_t_range_to_0(schedule, t_range):
    for time in ("t", "step") if isinstance(schedule, rp.DDPM) else ("t",):
        model = gaussian(schedule, t_range=t_range, time=time)
        model.data = {"error_profile": measure(model, unit(2, 2, 0), levels=24).to_dict()}
        for steps in (1, 2, 7, 50):
            times = grids.learned(model, steps)
            assert len(times) == steps + 1
            assert times[-1] == 0
            assert all(a > b for a, b in itertools.pairwise(times))
            assert times[0] == pytest.approx(t_range[1])
            assert all(t_range[0] <= t <= t_range[1] for t in times[:-1])
            if time == "step":
                schedule.step(torch.tensor(times[:-1], dtype=torch.float64))  # raises between two steps
    x = rp.sample(model, unit(4, 2, 0), grid="learned", steps=7, sampler="ancestral", generator=seeded(0))
    assert x.isfinite().all()


@pytest.mark.parametrize("schedule", [FLOW, rp.VE()], ids=str)
def test_the_leap_begins_where_the_error_is_small_enough(schedule):
    model = with_profile(schedule)
    profile = ErrorProfile.of(model)
    for steps in (8, 50):
        last = grids.learned(model, steps)[-2]
        left = float(profile.at(schedule.log_snr(last)) / profile.at(schedule.log_snr(1.0)))
        assert math.sqrt(left) == pytest.approx(1 / steps, rel=1e-6)
    times = grids.learned(model, 9, start=0.6, last=0.2)
    assert (times[0], times[-2]) == (0.6, 0.2)


def test_what_cannot_be_is_refused():
    model = gaussian(FLOW)
    with pytest.raises(Unsupported, match=r"no error profile; train it with rp.Gaussian\(of=\"x0\"\)"):
        rp.sample(model, (2, 2), grid="learned")
    with pytest.raises(Unsupported, match="states none"):
        measure(rp.Denoiser(GaussianOracle(MEANS[0], COVS[0], FLOW, rp.target("x0")), FLOW, "x0"), unit(2, 2, 0))
    broken = gaussian(FLOW)
    broken.forward = lambda x, t: Posterior(x, x * math.nan)
    with pytest.raises(NetworkError, match="mean posterior variance at t = .* is nan"):
        measure(broken, unit(2, 2, 0))
    model.data = {"error_profile": [1.0, 2.0]}
    with pytest.raises(ReparamError, match="an error profile is"):
        grids.learned(model, 5)
    for levels, var in (([0.0], [1.0]), ([0.0, 0.0], [1.0, 0.5]), ([0.0, 1.0], [1.0])):
        with pytest.raises(ReparamError, match="two or more different"):
            ErrorProfile(levels, var)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ReparamError, match="finite"):
            ErrorProfile([0.0, 1.0], [1.0, bad])
    model.data = {"error_profile": {"log_snr": [-2.0, 4.0], "var": [0.2, 0.01]}}
    with pytest.raises(TimeOutOfRange, match="the error profile from -2 to 4"):
        grids.learned(model, 5)
    assert len(grids.learned(model, 5, start=0.7)) == 6
    with pytest.raises(TimeOutOfRange, match="the error profile from -2 to 4"):
        grids.learned(model, 5, start=0.7, last=0.05)
    with pytest.raises(TimeOutOfRange, match="last"):
        grids.learned(model, 5, start=0.7, last=0.8)
    apart = rp.schedules.Elementwise(FLOW, [1.0, 2.0])
    with pytest.raises(Unsupported, match="differs by element"):
        best_times(gaussian_profile(), apart, 5, 1.0, 0.1)


# The point of it.


@pytest.mark.parametrize("schedule", [FLOW, rp.VE()], ids=str)
@pytest.mark.parametrize("steps", [8, 16])
def test_it_costs_less_than_any_other_grid(schedule, steps):
    """The bound, at the other grid's own last time, with a profile measured on other data than the judge's."""
    model = with_profile(schedule)
    judge = measured(schedule, 2048, 150, seed=30)
    for name in ("linear", "log_snr", "karras", "shifted"):
        other = grids.GRIDS[name](model, steps)
        ours = grids.learned(model, steps, last=other[-2])
        assert cost(judge, schedule, ours) < 0.9 * cost(judge, schedule, other), name


@pytest.mark.parametrize(
    ("schedule", "others"), [(FLOW, ["log_snr", "karras"]), (rp.VE(), ["linear", "log_snr", "karras"])], ids=str
)
@pytest.mark.parametrize("steps", [8, 16])
def test_ancestral_samples_are_nearer_to_the_data(schedule, others, steps):
    """In sliced Wasserstein distance. On rectified flow the even grid is about as good."""
    model, n = with_profile(schedule), 2048
    real = draw(n, 40)

    def distance(grid):
        x = rp.sample(model, unit(n, 2, 43), sampler="ancestral", steps=steps, grid=grid, generator=seeded(44))
        return sliced_wasserstein(x, real)

    ours = distance("learned")
    for name in others:
        assert ours < 0.9 * distance(name), name
