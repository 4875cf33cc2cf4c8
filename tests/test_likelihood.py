"""Densities and bounds, held against those of Gaussians and their mixtures."""

import math

import pytest
import torch
from torch import nn

import reparam as rp
from oracles import GaussianOracle, MixtureOracle
from reparam.errors import Conflict, ReparamError, TimeOutOfRange, UnknownName, Unsupported
from reparam.guidance import ClassifierFree
from reparam.likelihood import log_likelihood, variational_bound
from reparam.schedules import Elementwise

MEAN = torch.tensor([0.7, -1.1, 0.3], dtype=torch.float64)
_A = torch.tensor([[1.0, 0.2, 0.0], [0.3, 0.5, 0.1], [0.0, -0.2, 0.3]], dtype=torch.float64)
COV = _A @ _A.T
EYE = torch.eye(3, dtype=torch.float64)
SCHEDULES = [rp.RectifiedFlow(2.0), rp.Cosine(), rp.VE(), rp.DDPM()]
#: Six noises whose mean is 0 and whose mean square is 1, in every direction: exact for what is quadratic.
COMPLETE = math.sqrt(3) * torch.cat([EYE, -EYE])[:, None]


def draw(n=8, seed=0):
    """Gaussian data of MEAN and COV."""
    z = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return MEAN + z @ torch.linalg.cholesky(COV).T


def gaussian(schedule, target="v", **conventions):
    net = GaussianOracle(MEAN, COV, rp.schedule(schedule), rp.target(target))
    return net, rp.Denoiser(net, schedule, target, **conventions)


def mixture(schedule, target="v"):
    means = torch.tensor([[0.7, -1.1], [-0.9, 0.4], [1.2, 1.0]], dtype=torch.float64)
    covs = torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]], [[0.05, 0.0], [0.0, 0.02]]]).double()
    net = MixtureOracle(torch.tensor([0.5, 0.3, 0.2]), means, covs, rp.schedule(schedule), rp.target(target))
    return net, rp.Denoiser(net, schedule, target)


def exact(net, x0, t, schedule):
    """log p of x_t/α at x0."""
    alpha = float(schedule.alpha(t))
    return net.log_density(alpha * x0, t) + x0.shape[1] * math.log(alpha)


def at_end(net, t=1.0):
    """The exact density of the noisiest data, as a prior."""
    return lambda x: net.log_density(x.double(), t)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_density_of_gaussian_data(schedule):
    net, denoiser = gaussian(schedule)
    x0 = draw()
    got = log_likelihood(denoiser, x0, steps=40, prior=at_end(net))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, exact(net, x0, 1e-3, schedule), atol=5e-5, rtol=0)


@pytest.mark.parametrize("schedule", [rp.RectifiedFlow(), rp.VE()], ids=str)
def test_the_density_of_a_mixture(schedule):
    net, denoiser = mixture(schedule)
    x0 = torch.tensor([[0.7, -1.1], [-0.9, 0.4], [1.2, 1.1], [0.2, 0.2], [0.5, -1.0]], dtype=torch.float64)
    got = log_likelihood(denoiser, x0, prior=at_end(net))
    torch.testing.assert_close(got, exact(net, x0, 1e-3, schedule), atol=1e-4, rtol=0)


@pytest.mark.parametrize("schedule", [rp.RectifiedFlow(), rp.Cosine()], ids=str)
def test_without_a_signal_at_the_end_the_prior_is_exact(schedule):
    net, denoiser = gaussian(schedule)
    x0 = draw(4)
    torch.testing.assert_close(
        log_likelihood(denoiser, x0, steps=40), exact(net, x0, 1e-3, schedule), atol=2e-5, rtol=0
    )


def test_with_a_signal_at_the_end_the_prior_is_that_of_data_of_one_variance():
    """Exact for such data; for others the gap is that of the two priors at x_1."""
    net = GaussianOracle(MEAN, 0.25 * EYE, rp.VE(sigma_max=5.0), rp.target("v"))
    denoiser = rp.Denoiser(net, net.schedule, "v")
    x0 = draw(4)
    got = log_likelihood(denoiser, x0, data_mean=MEAN, data_std=0.5, steps=40)
    torch.testing.assert_close(got, exact(net, x0, 1e-3, net.schedule), atol=1e-5, rtol=0)
    assert (log_likelihood(denoiser, x0, steps=40) - got).abs().max() > 1e-2


TARGETS = ["x0", "v", "velocity", "edm", "eps", "score", {"name": "k", "k": 0.3}, {"name": "linear", "p": 1, "q": -2}]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_target_makes_no_difference(target):
    """Where the target is singular at pure noise the range ends before it, with the density of x there."""
    schedule = rp.Cosine()
    end = 0.98 if target in ("eps", "score") else 1.0
    net, denoiser = gaussian(schedule, target, t_range=(1e-3, end))
    x0 = draw(4)
    got = log_likelihood(denoiser, x0, steps=32, prior=at_end(net, end))
    torch.testing.assert_close(got, exact(net, x0, 1e-3, schedule), atol=5e-5, rtol=0)


class Split(nn.Module):
    """The ideal network of a target in a basis: its parts' answers, each in its own span."""

    def __init__(self, parts, basis):
        super().__init__()
        self.parts, self.basis = parts, basis

    def forward(self, x, time):
        inside, outside = (part(x, time) for part in self.parts)
        return outside + self.basis.project(inside - outside)


def test_a_target_in_a_basis():
    schedule, basis = rp.RectifiedFlow(), rp.targets.Basis(torch.eye(3)[:, :1])
    target = rp.targets.InBasis(basis, "velocity", "x0")
    nets = [gaussian(schedule, name)[0] for name in ("velocity", "x0")]
    denoiser = rp.Denoiser(Split(nets, basis), schedule, target)
    x0 = draw(4)
    got = log_likelihood(denoiser, x0, steps=40)
    torch.testing.assert_close(got, exact(nets[0], x0, 1e-3, schedule), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("solver", "order"), [("rk4", 4), ("heun", 2)])
@pytest.mark.parametrize("schedule", [rp.RectifiedFlow(), rp.DDPM()], ids=str)
def test_the_order_of_convergence(solver, order, schedule):
    net, denoiser = gaussian(schedule)
    x0, steps = draw(4), [20, 40]
    want = exact(net, x0, 0.05, schedule)
    found = [log_likelihood(denoiser, x0, steps=n, t_min=0.05, solver=solver, prior=at_end(net)) - want for n in steps]
    errors = [float(e.abs().mean()) for e in found]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.5)


def test_steps_of_a_table():
    """A network that takes integers is asked on the steps of its table only."""
    seen = []

    class Steps(nn.Module):
        def forward(self, x, time):
            assert time.dtype == torch.int64
            seen.append(int(time[0]))
            return net(x, net.schedule.time(time))

    net = GaussianOracle(MEAN, COV, rp.DDPM(), rp.target("v"))
    denoiser = rp.Denoiser(Steps(), "ddpm", "v", time="step")
    x0 = draw(4)
    got = log_likelihood(denoiser, x0, steps=100, prior=at_end(net))
    torch.testing.assert_close(got, exact(net, x0, 1e-3, net.schedule), atol=5e-3, rtol=0)
    assert (min(seen), max(seen)) == (0, 999)
    with pytest.raises(Unsupported, match="'heun'"):
        log_likelihood(denoiser, x0, solver="rk4")


def test_times_of_ones_own_and_single_precision():
    net, denoiser = gaussian("rectified_flow")
    x0 = draw(4)
    want = exact(net, x0, 0.02, net.schedule)
    times = torch.logspace(math.log10(0.02), 0, 41, dtype=torch.float64)
    times[0], times[-1] = 0.02, 1.0
    torch.testing.assert_close(log_likelihood(denoiser, x0, times=times), want, atol=1e-5, rtol=0)
    single = log_likelihood(denoiser, x0.float(), t_min=0.02, steps=32)
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, want, atol=1e-4, rtol=0)


class Small(nn.Module):
    """An untrained network, with three classes."""

    def __init__(self, dim):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(dim, 16, generator=g))
        self.last = nn.Parameter(torch.randn(16, dim, generator=g) / 4)
        self.label = nn.Embedding(3, 16)

    def forward(self, x, time, y=None):
        hidden = x @ self.first + time[:, None]
        return torch.tanh(hidden if y is None else hidden + self.label(y)) @ self.last


def test_a_density_integrates_to_one():
    """For any network whatever: here an untrained one, of one dimension."""
    denoiser = rp.Denoiser(Small(1).double(), "rectified_flow", "x0")
    x = torch.linspace(-8, 8, 801, dtype=torch.float64)
    p = log_likelihood(denoiser, x[:, None], steps=40, t_min=0.2).exp()
    assert float(torch.trapezoid(p, x)) == pytest.approx(1, abs=1e-4)


def test_hutchinson_with_all_of_a_basis_is_the_exact_trace():
    _, denoiser = gaussian("cosine")
    x0 = draw(4)
    got = log_likelihood(denoiser, x0, trace="hutchinson", noises=COMPLETE[:3], steps=10)
    torch.testing.assert_close(got, log_likelihood(denoiser, x0, steps=10), atol=1e-10, rtol=0)


def test_hutchinson_is_unbiased():
    _, denoiser = gaussian("cosine")
    x0 = draw(1)
    estimates = log_likelihood(
        denoiser,
        x0.expand(1000, 3),
        trace="hutchinson",
        probes=2,
        steps=10,
        generator=torch.Generator().manual_seed(0),
    )
    error = estimates.std() / math.sqrt(len(estimates))
    assert error > 0
    assert (estimates.mean() - log_likelihood(denoiser, x0, steps=10)).abs() < 4 * error


class ByClass(nn.Module):
    """Two Gaussians, one a class, and their even mixture for the label 2."""

    def __init__(self, schedule):
        super().__init__()
        target, apart = rp.target("v"), torch.stack([MEAN, -MEAN])
        covs = torch.stack([COV, 0.3 * EYE])
        nets = [GaussianOracle(m, c, schedule, target) for m, c in zip(apart, covs, strict=True)]
        self.nets = nn.ModuleList([*nets, MixtureOracle(torch.ones(2), apart, covs, schedule, target)])

    def forward(self, x, time, y):
        answers = torch.stack([net(x, time) for net in self.nets])
        return answers[y, torch.arange(len(x))]


def test_conditional_densities():
    net = ByClass(rp.Cosine())
    denoiser, y = rp.Denoiser(net, "cosine", "v"), torch.tensor([0, 1, 2, 1])
    x0 = draw(4)
    want = torch.stack([exact(n, x0, 0.05, rp.Cosine()) for n in net.nets])[y, torch.arange(4)]
    for model in (denoiser, ClassifierFree(denoiser, 1.0, null_label=2)):
        torch.testing.assert_close(
            log_likelihood(model, x0, cond={"y": y}, t_min=0.05, steps=20), want, atol=1e-3, rtol=0
        )
    assert log_likelihood(ClassifierFree(denoiser, 2.0, null_label=2), x0, cond={"y": y}, steps=4).isfinite().all()
    bound = variational_bound(denoiser, x0, cond={"y": y}, eps=COMPLETE, levels=4)
    alone = variational_bound(gaussian("cosine")[1], x0, eps=COMPLETE, levels=4)
    torch.testing.assert_close(bound.total[0], alone.total[0])


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_are_left_as_they_were(around):
    net = Small(3)
    denoiser = rp.Denoiser(net.train(), "rectified_flow", "v")
    with around():
        got = log_likelihood(denoiser, draw(4).float(), cond={"y": torch.tensor([0, 1, 0, 1])}, steps=2)
        assert torch.is_grad_enabled() == (around is torch.enable_grad)
    assert net.training
    assert not got.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert not net._forward_hooks


def cross_entropy(x0, t, schedule):
    """−E log p(x0 + s ε) over ε, for Gaussian data, with s = σ/α."""
    s = float(schedule.sigma(t) / schedule.alpha(t))
    cov = COV + s**2 * EYE
    inverse, dev = torch.linalg.inv(cov), x0 - MEAN
    squares = torch.einsum("bi,ij,bj->b", dev, inverse, dev) + s**2 * inverse.trace()
    return (torch.logdet(2 * math.pi * cov) + squares) / 2


@pytest.mark.parametrize(
    ("schedule", "target"), [(rp.RectifiedFlow(), "velocity"), (rp.RectifiedFlow(2.0), "x0"), (rp.Cosine(), "v")]
)
def test_the_bound_of_the_exact_denoiser_is_the_negative_log_likelihood(schedule, target):
    """For every x0, over its noise: the pointwise I-MMSE relation. What is left is the quadrature's error."""
    _, denoiser = gaussian(schedule, target)
    x0 = draw(4)
    bound = variational_bound(denoiser, x0, eps=COMPLETE)
    torch.testing.assert_close(bound.total, cross_entropy(x0, 1e-3, schedule), atol=2e-4, rtol=0)
    assert bound.terms.shape == (32, 4)
    assert bound.log_snr.shape == bound.times.shape == (33,)
    assert bound.log_snr[-1] == -math.inf
    assert bool((bound.prior == 0).all())
    finer = variational_bound(denoiser, x0, eps=COMPLETE, levels=12, nodes=5)
    torch.testing.assert_close(finer.total, cross_entropy(x0, 1e-3, schedule), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("nodes", "order"), [(1, 2), (2, 4)])
def test_the_order_of_the_quadrature(nodes, order):
    _, denoiser = gaussian("cosine")
    x0 = draw(4)
    want = cross_entropy(x0, 1e-3, rp.Cosine())
    totals = [variational_bound(denoiser, x0, levels=n, nodes=nodes, eps=COMPLETE).total for n in (16, 32)]
    coarse, fine = ((total - want).abs().mean() for total in totals)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.3)


def test_one_bin_is_a_difference_of_densities():
    """A term is what −E log p(x_t/α) + (D/2) log(2πe σ²/α²) changes by across its bin."""
    schedule = rp.Cosine()
    _, denoiser = gaussian(schedule)
    x0, times = draw(4), [0.01, 0.1, 0.4, 0.9]
    bound = variational_bound(denoiser, x0, times=times, nodes=12, eps=COMPLETE)
    noise = 1.5 * torch.log(2 * math.pi * math.e * torch.exp(-schedule.log_snr(torch.tensor(times).double())))
    left = torch.stack([cross_entropy(x0, t, schedule) for t in times]) - noise[:, None]
    torch.testing.assert_close(bound.terms, left[:-1] - left[1:], atol=1e-6, rtol=0)


def test_the_prior_of_the_bound_where_a_signal_is_left():
    """Exact for data of the prior's own mean and variance."""
    net = GaussianOracle(MEAN, 0.25 * EYE, rp.VE(sigma_max=5.0), rp.target("v"))
    denoiser = rp.Denoiser(net, net.schedule, "v")
    x0 = draw(4)
    bound = variational_bound(denoiser, x0, eps=COMPLETE, levels=12, nodes=5, data_mean=MEAN, data_std=0.5)
    var = 0.25 + float(net.schedule.sigma(1e-3)) ** 2
    squares = (x0 - MEAN).square().sum(1) + 3 * (var - 0.25)
    want = squares / (2 * var) + 1.5 * math.log(2 * math.pi * var)
    torch.testing.assert_close(bound.total, want, atol=1e-6, rtol=0)
    assert bool((bound.prior > 0).all())


def test_the_bound_of_a_mixture():
    schedule = rp.RectifiedFlow()
    net, denoiser = mixture(schedule)
    x0 = torch.tensor([[0.3, -0.4]], dtype=torch.float64).expand(500, 2)
    g = torch.Generator().manual_seed(0)
    bound = variational_bound(denoiser, x0, t_min=0.3, generator=g)
    s = float(schedule.sigma(0.3) / schedule.alpha(0.3))
    y = x0 + s * torch.randn(500, 2, dtype=torch.float64, generator=g)
    want = -exact(net, y, 0.3, schedule)
    error = torch.hypot(bound.total.std(), want.std()) / math.sqrt(500)
    assert (bound.total.mean() - want.mean()).abs() < 4 * error


class Shrunk(rp.Denoiser):
    """A worse denoiser: the mean, drawn to 0."""

    def forward(self, x_t, t, **cond):
        return rp.denoiser.Posterior(0.9 * super().forward(x_t, t, **cond).mean)


def test_any_other_denoiser_bounds_the_entropy_from_above():
    """Averaged over the data (here points with their very mean and covariance); the exact one attains it."""
    net, denoiser = gaussian("cosine")
    x0 = MEAN + COMPLETE[:, 0] @ torch.linalg.cholesky(COV).T
    s = float(net.schedule.sigma(1e-3) / net.schedule.alpha(1e-3))
    entropy = torch.logdet(2 * math.pi * math.e * (COV + s**2 * EYE)) / 2
    best = variational_bound(denoiser, x0, eps=COMPLETE, levels=12, nodes=5)
    torch.testing.assert_close(best.total.mean(), entropy, atol=1e-6, rtol=0)
    worse = variational_bound(Shrunk(net, "cosine", "v"), x0, eps=COMPLETE, levels=12, nodes=5)
    assert bool((worse.terms.mean(1) > best.terms.mean(1)).all())


def test_the_bound_of_a_network_with_integer_steps_is_the_discrete_one():
    """It lies above the other, and falls to it with the number of levels."""
    net = GaussianOracle(MEAN, COV, rp.DDPM(), rp.target("v"))

    class Steps(nn.Module):
        def forward(self, x, time):
            return net(x, net.schedule.time(time))

    x0 = MEAN + COMPLETE[:, 0] @ torch.linalg.cholesky(COV).T
    smooth = variational_bound(rp.Denoiser(net, "ddpm", "v"), x0, eps=COMPLETE, t_min=1e-3).total.mean()
    stepping = rp.Denoiser(Steps(), "ddpm", "v", time="step")
    totals = [float(variational_bound(stepping, x0, levels=n, eps=COMPLETE).total.mean()) for n in (20, 60)]
    assert smooth < totals[1] < totals[0]


def test_draws_follow_the_generator():
    _, denoiser = gaussian("cosine")
    x0 = draw(4)
    for f, kw in ((variational_bound, {"draws": 2}), (log_likelihood, {"trace": "hutchinson", "steps": 3})):
        a, b, c = (f(denoiser, x0, generator=torch.Generator().manual_seed(i), **kw) for i in (0, 0, 1))
        a, b, c = (getattr(v, "total", v) for v in (a, b, c))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


class Cut(nn.Module):
    @torch.no_grad()
    def forward(self, x, time):
        return 0.5 * x


def test_errors():
    net, denoiser = gaussian("cosine")
    x0 = draw(2)
    uneven = rp.Denoiser(net, Elementwise("cosine", [1.0, 2.0, 3.0]), "v")
    learned = rp.Denoiser(net, "cosine", rp.targets.KTarget(0.5, learned=True), t_range=(0.0, 0.9))
    for f in (log_likelihood, variational_bound):
        with pytest.raises(Unsupported, match="is elementwise"):
            f(uneven, x0)
        with pytest.raises(Unsupported, match=r"frozen\(\)"):
            f(learned, x0)
        with pytest.raises(Conflict, match="both times and t_min"):
            f(denoiser, x0, times=[0.1, 1.0], t_min=0.1)
        with pytest.raises(ReparamError, match="rising"):
            f(denoiser, x0, times=[1.0, 0.1])
        for t in (0.0, 1.5, math.nan):
            with pytest.raises(TimeOutOfRange, match=r"begin above t = 0"):
                f(denoiser, x0, t_min=t)
        with pytest.raises(TimeOutOfRange, match="must lie below"):
            f(denoiser, x0, t_min=1.0)
        with pytest.raises(ReparamError, match="data_std"):
            f(denoiser, x0, data_std=0)
    with pytest.raises(Unsupported, match="without a gradient"):
        log_likelihood(rp.Denoiser(Cut(), "cosine", "v"), x0)
    with pytest.raises(UnknownName, match="trace 'exakt'"):
        log_likelihood(denoiser, x0, trace="exakt")
    with pytest.raises(UnknownName, match="solver 'rk5'"):
        log_likelihood(denoiser, x0, solver="rk5")
    with pytest.raises(Conflict, match="trace='hutchinson'"):
        log_likelihood(denoiser, x0, noises=COMPLETE)
    for wrong in ({"probes": 0}, {"noises": COMPLETE[0]}, {"noises": COMPLETE, "steps": 0}):
        with pytest.raises(ReparamError, match=r"positive integer|shape \[count"):
            log_likelihood(denoiser, x0, trace="hutchinson", **wrong)
    for wrong in ({"levels": 0}, {"nodes": 0}, {"draws": True}, {"eps": x0}):
        with pytest.raises(ReparamError, match=r"positive integer|shape \[count"):
            variational_bound(denoiser, x0, **wrong)
