"""Likelihoods: held against the unsubstituted formulas, torch.distributions and exact posteriors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import reparam as rp
from oracles import GaussianOracle, MixtureOracle
from reparam.confidence import LARGEST_FULL, Gaussian, VarianceLost, prediction
from reparam.errors import Conflict, NetworkError, SpecError, UnknownName, Unsupported
from reparam.metrics.vectors import sliced_wasserstein
from reparam.samplers import Ancestral

SCHEDULES = {
    "ve": rp.VE(sigma_min=1e-5, sigma_max=2e4),
    "flow": rp.RectifiedFlow(),
    "scaled_flow": rp.RectifiedFlow(noise_scale=2.0),
    "cosine": rp.Cosine(),
}
TARGETS = ["edm", "x0", "eps", "v", "velocity", "score"]
#: Noise levels σ/α, from far below the data's scale to far above.
RATIOS = np.logspace(-4, 4, 9)


class Says(nn.Module):
    """A network that says the same whatever it is asked."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = nn.Parameter(out)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.out.to(x.dtype)


def draw(d: int = 3, n: int = 8) -> tuple[Tensor, Tensor, torch.Generator]:
    g = torch.Generator().manual_seed(7)
    return torch.randn(n, d, generator=g, dtype=torch.float64) * 0.5, torch.randn(n, d, generator=g).double(), g


def times_at(schedule: rp.Schedule, ratio: float) -> float:
    return float(schedule.time_at(-2 * math.log(ratio)))


def mean_of(net: Says, objective: rp.Objective, x_t: Tensor, t: float) -> Tensor:
    y = net(x_t, torch.tensor(t))[:, : x_t.shape[1]]
    return objective.target.to_x0(y, x_t, t, objective.schedule)


def plain(of: str, schedule: rp.Schedule, t: float, mean: Tensor, log_ratio: Tensor, x0: Tensor, s: float) -> Tensor:
    """The likelihood as it is written before anything is substituted, in float64, by element; the fresh noise of
    the predictive reading averaged out."""
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    posterior = 1 / (alpha**2 / sigma**2 + 1 / s**2)
    if of == "x0":
        var = posterior * log_ratio.exp()
        return (torch.log(2 * math.pi * var) + (mean - x0) ** 2 / var) / 2
    var = (sigma**2 + alpha**2 * posterior) * log_ratio.exp()
    return (torch.log(2 * math.pi * var) + (sigma**2 + alpha**2 * (mean - x0) ** 2) / var) / 2


@pytest.mark.parametrize("of", ["x0", "noisy"])
@pytest.mark.parametrize("covariance", ["isotropic", "diagonal"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_loss_is_the_likelihood(name: str, target: str, covariance: str, of: str) -> None:
    schedule, s = SCHEDULES[name], 0.7
    kind = rp.target({"name": "edm", "sigma_data": s}) if target == "edm" else rp.target(target)
    x0, eps, g = draw()
    t_range = (1e-7, 1 - 1e-7)
    objective = rp.Objective(schedule, Gaussian(kind, covariance, of, sigma_data=s), t_range=t_range)
    for ratio in RATIOS:
        t = times_at(schedule, ratio)
        x_t = schedule.add_noise(x0, eps, t)
        rest = torch.randn(8, 1 if covariance == "isotropic" else 3, generator=g, dtype=torch.float64)
        # A prediction with an x0-error of the size of the posterior's standard deviation.
        c = ratio * s / math.hypot(ratio, s)
        wrong = x0 + c * torch.randn(x0.shape, generator=g, dtype=torch.float64)
        y = kind.encode(wrong, (x_t - schedule.alpha(t) * wrong) / schedule.sigma(t), t, schedule)
        net = Says(torch.cat([y, rest], 1))
        loss = objective(net, x0, t, eps)
        expected = plain(of, schedule, t, mean_of(net, objective, x_t, t), rest, x0, s).mean(1)
        assert torch.allclose(loss, expected, rtol=1e-10, atol=1e-10), (ratio, (loss - expected).abs().max())
        assert bool(loss.isfinite().all())


@pytest.mark.parametrize("of", ["x0", "noisy"])
def test_a_full_covariance_is_that_of_torch_distributions(of: str) -> None:
    schedule, s, d = rp.VE(sigma_min=1e-5, sigma_max=2e4), 0.5, 3
    objective = rp.Objective(schedule, Gaussian("edm", "full", of), t_range=(1e-7, 1))
    x0, eps, g = draw(d)
    for ratio in RATIOS:
        t = times_at(schedule, ratio)
        x_t = schedule.add_noise(x0, eps, t)
        net = Says(torch.randn(8, d + d * (d + 1) // 2, generator=g, dtype=torch.float64))
        below = torch.zeros(8, d, d, dtype=torch.float64)
        rows, columns = torch.tril_indices(d, d, -1)
        rest = net.out.detach()[:, d:]
        below[:, rows, columns] = rest[:, d:]
        factor = below + torch.diag_embed(rest[:, :d].exp())
        c2 = 1 / (1 / ratio**2 + 1 / s**2) + (ratio**2 if of == "noisy" else 0.0)
        covariance = c2 * torch.linalg.inv(factor @ factor.mT)
        mean = mean_of(net, objective, x_t, t)
        q = torch.distributions.MultivariateNormal(mean, covariance)
        if of == "x0":
            expected = -q.log_prob(x0) / d
            posterior = objective.denoiser(net)(x_t, t)
            assert posterior.root is not None
            assert torch.allclose(posterior.root @ posterior.root.mT, covariance, rtol=1e-9)
            assert torch.allclose(posterior.var, covariance.diagonal(dim1=1, dim2=2), rtol=1e-9)
        else:  # E over a fresh noisy sample: its own deviation adds σ² times the trace of the precision
            trace = torch.linalg.inv(covariance).diagonal(dim1=1, dim2=2).sum(1)
            expected = (-q.log_prob(x0) + ratio**2 * trace / 2) / d
        loss = objective(net, x0, t, eps)
        assert torch.allclose(loss, expected, rtol=1e-9, atol=1e-9)
        assert torch.allclose(objective.denoiser(net).log_prob(x0, x_t, t), q.log_prob(x0), rtol=1e-9, atol=1e-9)


def test_contracting_the_other_index_of_the_factor_is_another_likelihood() -> None:
    """The published code multiplies rows of S with the error; with Sᵀ and S exchanged the loss is a wrong one."""
    objective = rp.Objective(rp.VE(), Gaussian("edm", "full"), t_range=(0.01, 1))
    x0, eps, g = draw(2)
    t, c = 0.5, None
    net = Says(torch.randn(8, 5, generator=g, dtype=torch.float64))
    x_t = objective.schedule.add_noise(x0, eps, t)
    rest = net.out.detach()[:, 2:]
    factor = torch.diag_embed(rest[:, :2].exp())
    factor[:, 1, 0] = rest[:, 2]
    c = 1 / (1 / objective.schedule.sigma(t) ** 2 + 1 / 0.25)
    e = (mean_of(net, objective, x_t, t) - x0) / c.sqrt()

    def loss(contracted: Tensor) -> Tensor:
        volume = 2 * (2 * math.pi * c).log() - 2 * rest[:, :2].sum(1)
        return (volume + contracted.square().sum(1)) / 4

    right, published = (loss(torch.einsum(s, factor, e)) for s in ("bij,bi->bj", "bij,bj->bi"))
    ours = objective(net, x0, t, eps)
    assert torch.allclose(ours, right, rtol=1e-10)
    assert bool(((ours - published).abs() > 1e-3).all())


@pytest.mark.parametrize("target", ["edm", "x0", "v"])
def test_the_gradient_in_the_mean_is_its_error_over_the_variance(target: str) -> None:
    schedule, t = rp.RectifiedFlow(), 0.4
    objective = rp.Objective(schedule, Gaussian(target), t_range=(0.01, 0.99))
    x0, eps, g = draw()
    net = Says(torch.randn(8, 6, generator=g, dtype=torch.float64))
    x_t = schedule.add_noise(x0, eps, t)
    objective(net, x0, t, eps).sum().backward()
    posterior = objective.denoiser(net)(x_t, t)
    assert posterior.var is not None
    y = net.out.detach()[:, :3].requires_grad_()
    objective.target.to_x0(y, x_t, t, schedule).sum().backward()  # dμ/dy
    expected = y.grad * (posterior.mean - x0) / posterior.var / 3  # the loss is averaged over three elements
    assert net.out.grad is not None
    assert torch.allclose(net.out.grad[:, :3], expected.detach(), rtol=1e-9)


def test_frozen_variances_give_edms_objective() -> None:
    """At c_out it is half of EDM's, and a constant; at σ, in the predictive reading, that times σ_d²/(σ² + σ_d²)."""
    schedule = rp.VE()
    x0, eps, g = draw()
    edm = rp.Objective(schedule, "edm", t_range=(0.01, 1))
    f, other = (torch.randn(8, 3, generator=g, dtype=torch.float64) for _ in range(2))
    for t in (0.05, 0.4, 0.9):
        ratio2 = float(schedule.sigma(t)) ** 2
        base = edm(Says(f), x0, t, eps) - edm(Says(other), x0, t, eps)
        at_c = rp.Objective(schedule, Gaussian("edm"), t_range=(0.01, 1))
        zeros = torch.zeros(8, 3, dtype=torch.float64)
        ours = [at_c(Says(torch.cat([y, zeros], 1)), x0, t, eps) for y in (f, other)]
        assert torch.allclose(2 * (ours[0] - ours[1]), base, rtol=1e-9)
        noisy = rp.Objective(schedule, Gaussian("edm", of="noisy"), t_range=(0.01, 1))
        at_sigma = torch.full_like(zeros, -math.log(1 + 0.25 / (ratio2 + 0.25)))  # c_var² e^G = σ²
        ours = [noisy(Says(torch.cat([y, at_sigma], 1)), x0, t, eps) for y in (f, other)]
        assert torch.allclose(2 * (ours[0] - ours[1]), base * 0.25 / (ratio2 + 0.25), rtol=1e-8)


@pytest.mark.parametrize("of", ["x0", "noisy"])
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_the_minimiser_is_the_exact_posterior(covariance: str, of: str) -> None:
    """Over all x0 that could have given one x_t, by Gauss-Hermite quadrature, for a correlated Gaussian."""
    schedule, t = rp.RectifiedFlow(), 0.45
    mean, cov = torch.tensor([0.3, -0.2]).double(), torch.tensor([[0.5, 0.3], [0.3, 0.4]]).double()
    oracle = GaussianOracle(mean, cov, schedule, rp.target("edm"))
    x_t = torch.tensor([[0.4, 0.7]]).double()
    exact_mean, exact_cov = oracle.posterior(x_t, t)
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    z = torch.tensor([[a, b] for a in nodes for b in nodes])
    w = torch.tensor([a * b for a in weights for b in weights]) / (2 * math.pi)
    x0 = exact_mean + z @ torch.linalg.cholesky(exact_cov[0]).T
    eps = (x_t - schedule.alpha(t) * x0) / schedule.sigma(t)
    objective = rp.Objective(schedule, Gaussian("edm", covariance, of), t_range=(0.01, 0.99))
    net = Says(torch.zeros(1, 4 if covariance == "diagonal" else 5, dtype=torch.float64))
    optimiser = torch.optim.LBFGS(
        net.parameters(), max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    class Repeated(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return net.out.expand(len(x), -1)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = (w * objective(Repeated(), x0, t, eps)).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    rest = net.out.detach()[:, 2:]
    assert torch.allclose(mean_of(net, objective, x_t, t), exact_mean, atol=1e-6)
    likelihood = objective.likelihood
    assert likelihood is not None
    var, root = likelihood.covariance_of(rest, x_t, torch.tensor(t).double(), schedule)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    wanted = exact_cov if of == "x0" else alpha**2 * exact_cov + sigma**2 * torch.eye(2)
    assert torch.allclose(var, wanted.diagonal(dim1=1, dim2=2), rtol=1e-5)
    if root is not None:
        assert torch.allclose(root @ root.mT, wanted, rtol=1e-5)


def test_data_that_are_gaussian_around_x0_add_their_variance() -> None:
    """Against the plain loss averaged over many z ~ N(x0, s²) that could have given one x_t."""
    schedule, t, s = rp.RectifiedFlow(), 0.3, 0.4
    objective = rp.Objective(schedule, Gaussian("v", "diagonal"), t_range=(0.01, 0.99))
    x0, n, g = draw()
    net = Says(torch.randn(8, 6, generator=g, dtype=torch.float64))
    loss = objective(net, x0, t, n, x0_std=s)
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    x_t = alpha * x0 + math.hypot(alpha * s, sigma) * n
    share = alpha * s**2 / (alpha**2 * s**2 + sigma**2)
    centre, var = x0 + share * (x_t - alpha * x0), s**2 * sigma**2 / (alpha**2 * s**2 + sigma**2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    expected = torch.zeros(8, dtype=torch.float64)
    for node, weight in zip(nodes, weights / math.sqrt(2 * math.pi), strict=True):
        z = centre + node * math.sqrt(var)
        expected += weight * objective(net, z, t, (x_t - alpha * z) / sigma)
    assert torch.allclose(loss, expected, rtol=1e-9)


def test_elementwise_noise_has_elementwise_scales() -> None:
    scale = torch.tensor([0.5, 1.0, 2.0])
    schedule, t = rp.Elementwise(rp.RectifiedFlow(), scale), 0.4
    objective = rp.Objective(schedule, Gaussian("x0"), t_range=(0.01, 0.99))
    x0, eps, g = draw()
    net = Says(torch.randn(8, 6, generator=g, dtype=torch.float64))
    each = []
    for i, s in enumerate(scale.tolist()):
        alone = rp.Objective(rp.RectifiedFlow(noise_scale=s), Gaussian("x0"), t_range=(0.01, 0.99))
        one = Says(net.out.detach()[:, [i, 3 + i]])
        each.append(alone(one, x0[:, [i]], t, eps[:, [i]]))
    assert torch.allclose(objective(net, x0, t, eps), torch.stack(each).mean(0), rtol=1e-9)


def test_pictures_have_maps_of_variance() -> None:
    g = torch.Generator().manual_seed(3)
    x0 = torch.randn(2, 3, 4, 4, generator=g)
    for covariance, channels in (("diagonal", 6), ("isotropic", 4)):
        objective = rp.Objective(rp.RectifiedFlow(), Gaussian("x0", covariance), t_range=(0.01, 0.99))
        net = Says(torch.randn(2, channels, 4, 4, generator=g))
        posterior = objective.denoiser(net)(x0, 0.5)
        assert posterior.var is not None
        assert posterior.var.shape == x0.shape
        assert objective(net, x0, 0.5, torch.zeros_like(x0)).shape == (2,)
        if covariance == "isotropic":
            assert bool((posterior.var == posterior.var[:, :1, :1, :1]).all())


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_beta_takes_back_the_weight_and_one_gives_edms(covariance: str) -> None:
    schedule, t = rp.RectifiedFlow(), 0.4
    x0, eps, g = draw()
    out = torch.randn(8, 6 if covariance == "diagonal" else 9, generator=g, dtype=torch.float64)
    if covariance == "full":
        out[:, 6:] = 0
        out[:, 3:6] = out[:, 3:4]  # the same in every direction: then all of it can be said by elements
    x_t = schedule.add_noise(x0, eps, t)

    def gradient(beta: float) -> Tensor:
        net = Says(out.clone())
        objective = rp.Objective(schedule, Gaussian("x0", covariance, beta=beta), t_range=(0.01, 0.99))
        objective(net, x0, t, eps).sum().backward()
        assert net.out.grad is not None
        return net.out.grad[:, :3]

    var = rp.Denoiser(Says(out), schedule, Gaussian("x0", covariance), t_range=(0.01, 0.99))(x_t, t).var
    assert var is not None
    error, c2 = (out[:, :3] - x0) / 3, 1 / (0.36 / 0.16 + 1 / 0.25)
    for beta in (0.0, 0.5, 1.0):
        assert torch.allclose(gradient(beta), error / var.detach() * (var.detach() / c2) ** beta, rtol=1e-9)


@pytest.mark.parametrize("covariance", ["isotropic", "diagonal", "full"])
@pytest.mark.parametrize("of", ["x0", "noisy"])
def test_a_detached_mean_learns_from_edms_loss_and_the_value_is_the_likelihood(of: str, covariance: str) -> None:
    schedule, t = rp.RectifiedFlow(), 0.4
    x0, eps, g = draw()
    width = {"isotropic": 4, "diagonal": 6, "full": 9}[covariance]
    out = torch.randn(8, width, generator=g, dtype=torch.float64)
    nets, losses = [Says(out.clone()) for _ in range(2)], []
    for net, detached in zip(nets, (True, False), strict=True):
        likelihood = Gaussian("v", covariance, of, detach_mean=detached)
        losses.append(rp.Objective(schedule, likelihood, t_range=(0.01, 0.99))(net, x0, t, eps))
    assert torch.equal(*losses)
    edm = Says(out[:, :3].clone())
    space = {"name": "edm", "sigma_data": 0.5}
    losses.append(rp.Objective(schedule, "v", loss_space=space, t_range=(0.01, 0.99))(edm, x0, t, eps) / 2)
    for loss in losses:
        loss.sum().backward()
    gradients = [net.out.grad for net in (*nets, edm)]
    assert torch.allclose(gradients[0][:, 3:], gradients[1][:, 3:])  # type: ignore[index]
    assert torch.allclose(gradients[0][:, :3], gradients[2])  # type: ignore[index, arg-type]


def test_a_likelihood_goes_with_the_weights(tmp_path) -> None:  # type: ignore[no-untyped-def]
    objective = rp.Objective(
        rp.VE(), {"name": "gaussian", "target": "edm", "covariance": "full"}, input="edm", t_range=(0.01, 1)
    )
    net = rp.networks.MLP(2, hidden=8, layers=3, outputs=5)
    denoiser = objective.denoiser(net)
    rp.save(denoiser, tmp_path / "m.safetensors")
    loaded = rp.load(tmp_path / "m.safetensors")
    assert loaded.conventions.likelihood == denoiser.conventions.likelihood
    assert rp.Spec.of(loaded).training["weighting"] == "likelihood"
    x = torch.randn(4, 2)
    ours, theirs = denoiser(x, 0.5), loaded(x, 0.5)
    assert theirs.var is not None
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert "gaussian" in dict(rp.Spec.of(loaded).in_words())["predicts"]


def test_a_learned_k_may_be_learned_by_a_likelihood() -> None:
    objective = rp.Objective(rp.RectifiedFlow(), Gaussian(rp.targets.KTarget(0.5, learned=True)), t_range=(0.01, 0.99))
    x0, eps, g = draw()
    net = Says(torch.randn(8, 6, generator=g, dtype=torch.float64))
    objective(net, x0, 0.4, eps).sum().backward()
    assert objective.k_logit is not None
    assert objective.k_logit.grad is not None
    assert float(objective.k_logit.grad) != 0
    denoiser = objective.denoiser(net)
    assert not denoiser.target.learned  # type: ignore[attr-defined]
    assert denoiser(x0, 0.4).var is not None


def test_exact_posterior_means_are_what_is_learned_from() -> None:
    schedule, t = rp.RectifiedFlow(), 0.4
    oracle = MixtureOracle(
        torch.tensor([0.4, 0.6]), torch.tensor([[0.5, 0.0], [-0.5, 0.2]]), 0.05 * torch.eye(2).expand(2, 2, 2),
        schedule, rp.target("v"),
    )  # fmt: skip
    objective = rp.Objective(schedule, "v", t_range=(0.01, 0.99))
    x0, eps, _ = draw(2)

    def exact(x: Tensor, at: Tensor) -> Tensor:
        return oracle.posterior_mean(x, float(at))

    assert float(objective(oracle, x0, t, eps, exact=exact).max()) < 1e-24
    assert float(objective(oracle, x0, t, eps).max()) > 1e-3
    with pytest.raises(Conflict, match="nothing to be unsure of"):
        rp.Objective(schedule, Gaussian("v"), t_range=(0.01, 0.99))(oracle, x0, t, eps, exact=exact)


# -- what is learned, and sampling with it ------------------------------------------------------------------------


WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
MEANS = torch.tensor([[0.8, 0.0], [-0.6, 0.5], [0.0, -0.9]])
COVS = torch.tensor([[[0.02, 0.01], [0.01, 0.03]], [[0.05, -0.02], [-0.02, 0.02]], [[0.01, 0.0], [0.0, 0.04]]])
SCHEDULE = rp.RectifiedFlow()
T_RANGE = (0.02, 1.0)


def mixture_draw(n: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    which = torch.multinomial(WEIGHTS, n, replacement=True, generator=g)
    z = torch.randn(n, 2, generator=g)
    return MEANS[which] + (torch.linalg.cholesky(COVS)[which] @ z[..., None])[..., 0]


class Exact(rp.Denoiser):
    """The exact posterior of the mixture."""

    def __init__(self) -> None:
        oracle = MixtureOracle(WEIGHTS, MEANS, COVS, SCHEDULE, rp.target("edm"))
        super().__init__(oracle, SCHEDULE, "edm", t_range=T_RANGE)

    def forward(self, x_t: Tensor, t: object, **cond: object) -> rp.Posterior:
        mean, cov = self.net.posterior(x_t.double(), float(t))  # type: ignore[arg-type, operator]
        return rp.Posterior(mean.to(x_t), cov.diagonal(dim1=1, dim2=2).to(x_t), torch.linalg.cholesky(cov).to(x_t))


@pytest.fixture(scope="module")
def learned() -> rp.Denoiser:
    """A small network that has learned the mixture, with full covariances."""
    torch.manual_seed(0)
    net = rp.networks.MLP(2, hidden=64, layers=5, outputs=5, activation="silu")
    objective = rp.Objective(
        SCHEDULE,
        Gaussian("edm", "full"),
        input="edm",
        time="log_snr",
        times=rp.LogitNormal(0.0, 1.2),
        t_range=(0.02, 0.999),
    )
    g = torch.Generator().manual_seed(1)
    data, steps = mixture_draw(200_000, 2), 2000
    optimiser = torch.optim.Adam(net.parameters(), lr=4e-3)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        x0 = data[torch.randint(len(data), (512,), generator=g)]
        loss = objective(net, x0, generator=g).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return objective.denoiser(net)


@pytest.mark.parametrize("t", [0.05, 0.15, 0.3, 0.5, 0.7, 0.9])
def test_the_learned_variance_is_the_exact_one_at_every_noise_level(learned: rp.Denoiser, t: float) -> None:
    """To 6 % in the mean, and a tenth of the variance at most points."""
    x0 = mixture_draw(4000, 11)
    x_t = SCHEDULE.add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(12)), t)
    with torch.no_grad():
        ours, exact = learned(x_t, t), Exact()(x_t, t)
    assert ours.var is not None
    assert exact.var is not None
    assert abs(float(ours.var.mean() / exact.var.mean()) - 1) < 0.06
    assert float(((ours.var - exact.var).abs() / exact.var.mean()).median()) < 0.1
    nll, best = (
        -float(torch.distributions.MultivariateNormal(p.mean, p.root @ p.root.mT).log_prob(x0).mean())  # type: ignore[operator, union-attr]
        for p in (ours, exact)
    )
    assert abs(nll - best) < 0.05
    assert abs(-float(learned.log_prob(x0, x_t, t).detach().mean()) - nll) < 1e-4


@pytest.mark.parametrize("steps", [5, 10, 25])
def test_ancestral_steps_with_the_learned_variance_beat_fixed_ones(learned: rp.Denoiser, steps: int) -> None:
    """In sliced Wasserstein distance, averaged over three draws; and come within noise of the exact variance."""
    real, real2 = mixture_draw(6000, 21), mixture_draw(6000, 22)

    def distance(denoiser: rp.Denoiser, variance: str) -> Tensor:
        times = [*np.linspace(0.98, 0.03, steps).tolist(), 0.0]
        found = []
        for seed in (31, 32, 33):
            g = torch.Generator().manual_seed(seed)
            x = rp.sample(denoiser, (6000, 2), sampler=Ancestral(variance), times=times, generator=g)
            found.append(sliced_wasserstein(x, real))
        return torch.tensor(found)

    ours, small, large = (distance(learned, v) for v in ("learned", "small", "large"))
    exact = distance(Exact(), "learned")
    floor = sliced_wasserstein(real2, real)
    assert ours.mean() < small.mean()
    assert ours.mean() < large.mean()
    noise = float(max(ours.max() - ours.min(), exact.max() - exact.min(), floor))
    assert abs(float(ours.mean() - exact.mean())) < 2 * noise, (ours, exact, floor)


def test_an_ancestral_step_has_the_total_variance() -> None:
    """By elements and with a full covariance, against σ_s²(1 − e²) I + α_s²(1 − e²)² Cov."""
    exact = Exact()
    x = torch.tensor([[0.3, -0.1]]).expand(200_000, 2)
    t, s = 0.6, 0.3
    g = torch.Generator().manual_seed(5)

    class ByElement(Exact):
        def forward(self, x_t: Tensor, t: object, **cond: object) -> rp.Posterior:
            return super().forward(x_t, t)._replace(root=None)

    mean, cov = (p[0].float() for p in exact.net.posterior(x[:1].double(), t))
    alpha_t, sigma_t, alpha, sigma = 0.4, 0.6, 0.7, 0.3
    e = alpha_t * sigma / (alpha * sigma_t)
    for denoiser, spread in ((exact, cov), (ByElement(), torch.diag(cov.diagonal()))):
        y = rp.sample(denoiser, start=x, sampler=Ancestral("learned"), times=[t, s], generator=g)
        assert isinstance(y, Tensor)
        wanted = sigma**2 * (1 - e**2) * torch.eye(2) + alpha**2 * (1 - e**2) ** 2 * spread
        assert torch.allclose(y.mean(0), e * sigma / sigma_t * x[0] + alpha * (1 - e**2) * mean, atol=0.01)
        assert torch.allclose(torch.cov(y.T), wanted, atol=0.003)


def test_a_trajectory_has_the_variances(learned: rp.Denoiser) -> None:
    way = rp.sample(learned, (7, 2), sampler="ddim", steps=6, grid="linear", trajectory=True)
    assert isinstance(way, rp.Trajectory)
    assert way.var is not None
    assert way.root is not None
    assert way.var.shape == way.x0.shape == (6, 7, 2)
    assert way.root.shape == (6, 7, 2, 2)
    mean_only = rp.sample(rp.Denoiser(rp.networks.MLP(2), SCHEDULE, "x0"), (7, 2), steps=3, trajectory=True)
    assert isinstance(mean_only, rp.Trajectory)
    assert mean_only.var is None


def test_guidance_keeps_the_variance(learned: rp.Denoiser) -> None:
    x = torch.randn(5, 2)
    guided = rp.guidance.Autoguidance(learned, learned, weight=2.0)(x, 0.5)
    plain_ = learned(x, 0.5)
    assert torch.equal(guided.var, plain_.var)  # type: ignore[arg-type]
    assert torch.equal(guided.root, plain_.root)  # type: ignore[arg-type]
    on = learned.on("cosine")
    assert on(x, 0.5).var is not None


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sign", "word"), [(-1.0, "collapsed"), (1.0, "exploded")])
@pytest.mark.parametrize("covariance", ["isotropic", "diagonal", "full"])
def test_a_lost_variance_is_named_with_its_time(covariance: str, sign: float, word: str) -> None:
    objective = rp.Objective(rp.RectifiedFlow(), Gaussian("x0", covariance), t_range=(0.01, 0.99))
    x0, eps, _ = draw(2, 4)
    width = {"isotropic": 3, "diagonal": 4, "full": 5}[covariance]
    out = torch.zeros(4, width, dtype=torch.float64)
    out[2, 2] = sign * 31 * (-0.5 if covariance == "full" else 1)
    with pytest.raises(VarianceLost, match=rf"{word} to e\^-?31 .* t = 0\.3\. Train more slowly") as found:
        objective(Says(out), x0, torch.tensor([0.1, 0.2, 0.3, 0.4]), eps)
    assert found.value.t == pytest.approx(0.3)


@pytest.mark.parametrize(("covariance", "wanted"), [("isotropic", 3), ("diagonal", 4), ("full", 5)])
def test_a_network_with_too_few_outputs_is_told_how_many(covariance: str, wanted: int) -> None:
    objective = rp.Objective(rp.RectifiedFlow(), Gaussian("x0", covariance), t_range=(0.01, 0.99))
    with pytest.raises(
        NetworkError, match=rf"returned shape \[4, 2\].*returns shape \[4, {wanted}\].*{wanted - 2} more"
    ):
        objective(rp.networks.MLP(2), torch.zeros(4, 2), 0.5)


def test_a_full_covariance_of_much_data_is_refused() -> None:
    big = LARGEST_FULL + 1
    objective = rp.Objective(rp.RectifiedFlow(), Gaussian("x0", "full"), t_range=(0.01, 0.99))
    for shape in ((big,), (3, 8, 8)):
        with pytest.raises(Unsupported, match="at most 64 numbers.*diagonal"):
            objective(Says(torch.zeros(2, big)), torch.zeros(2, *shape), 0.5)
    with pytest.raises(Unsupported, match="elementwise"):
        rp.Objective(rp.Elementwise(rp.RectifiedFlow(), [1.0, 2.0]), Gaussian("x0", "full"))


def test_a_variance_that_a_model_has_not_is_refused() -> None:
    plain_ = rp.Denoiser(rp.networks.MLP(2), "rectified_flow", "x0")
    noisy = rp.Denoiser(rp.networks.MLP(2, outputs=4), "rectified_flow", Gaussian("x0", of="noisy"))
    for denoiser in (plain_, noisy):
        assert denoiser(torch.zeros(3, 2), 0.5).var is None
        with pytest.raises(Unsupported, match="of='noisy' has none of x0"):
            rp.sample(denoiser, (3, 2), sampler=Ancestral("learned"), steps=3)
    with pytest.raises(Unsupported, match="without a variance"):
        plain_.log_prob(torch.zeros(3, 2), torch.zeros(3, 2), 0.5)
    assert noisy.log_prob(torch.zeros(3, 2), torch.zeros(3, 2), 0.5).shape == (3,)


@pytest.mark.parametrize("given", [{"loss_space": "velocity"}, {"weighting": "min_snr"}])
def test_a_loss_space_or_weighting_beside_a_likelihood_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(Conflict, match="beside a Gaussian likelihood"):
        rp.Objective(rp.RectifiedFlow(), Gaussian("x0"), **given)  # type: ignore[arg-type]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(UnknownName, match="covariance of gaussian 'diag'.*diagonal"):
        Gaussian("x0", "diag")
    with pytest.raises(UnknownName, match="of of gaussian"):
        Gaussian("x0", of="x")
    with pytest.raises(UnknownName, match="Known: .*gaussian"):
        prediction("gausian")
    with pytest.raises(Unsupported, match="sigma_data"):
        Gaussian("x0", sigma_data=0.0)
    with pytest.raises(Unsupported, match="beta"):
        Gaussian("x0", beta=2.0)
    with pytest.raises(Unsupported, match="not finite"):
        rp.Objective(rp.RectifiedFlow(), Gaussian("v"))(Says(torch.zeros(4, 4)), torch.zeros(4, 2), 0.0)
    with pytest.raises(rp.errors.SingularTime, match=r"without bound at t = 0 .*t_range: \[0\.02, 1\].*v, velocity"):
        rp.Objective(rp.RectifiedFlow(), Gaussian("x0"))
    for value in ([], ["x0", "v"], 3, None):
        with pytest.raises(rp.errors.ReparamError, match="a target is a name or a mapping.*list whole targets"):
            Gaussian(value)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="linear one, found gaussian"):
        Gaussian({"name": "gaussian", "target": "x0"})  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="one of isotropic, diagonal, full.*list whole targets"):
        Gaussian("x0", ["full", "diagonal"])  # type: ignore[arg-type]
    for beta in (-1, None, True, "a"):
        with pytest.raises(Unsupported, match=r"beta is a number in \[0, 1\]"):
            Gaussian("x0", beta=beta)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="There is none"):
        Gaussian({"name": "eps", "t_range": [0, 0.9]})  # type: ignore[arg-type]
    with pytest.raises(rp.errors.ReparamError, match="needs target"):
        prediction({"name": "gaussian"})
    with pytest.raises(SpecError, match="does not stand for a model"):
        rp.Spec(target={"name": "gaussian", "target": "x0", "covariance": "?"}, schedule={"name": "cosine"}, time="t",
                input="none", t_range=[0.0, 1.0]).denoiser(rp.networks.MLP(2))  # fmt: skip
