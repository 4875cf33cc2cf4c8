"""The tree, and mixtures of Gaussians as data: against a second construction, Bayes by hand, autograd, other code."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from oracles import MixtureOracle
from reparam.data import Mixture, from_array, load_data, mixtures
from reparam.data.tree import tree
from reparam.errors import DataError, RecipeError, ReparamError, UnknownName
from reparam.metrics import METRICS, Reference, SampleSet, Scoring
from reparam.report.views import view_of
from reparam.studies.recipe import load_recipe

LEVELS = [1e-4, 1e-3, 0.01, 0.1, 0.3, 1.0, 5.0, 80.0]


@pytest.fixture(scope="module")
def a():
    return tree("a")


@pytest.fixture(scope="module")
def data():
    return load_data({"name": "tree", "size": 5000})


def noisy(mixture, n, sigma, seed=0):
    x0 = mixture.draw(n, [seed, 77])
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    return x0 + torch.as_tensor(sigma, dtype=torch.float32).reshape(-1, 1) * eps


def some(dim, k=5, seed=0):
    """A mixture of a few broad and narrow Gaussians."""
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(k, dim, dim, dtype=torch.float64, generator=generator) * 0.4
    covs = roots @ roots.transpose(1, 2) + 0.01 * torch.eye(dim, dtype=torch.float64)
    weights = torch.rand(k, dtype=torch.float64, generator=generator) + 0.1
    return Mixture(weights, torch.randn(k, dim, dtype=torch.float64, generator=generator), covs)


def grown_again():
    """Both classes once more: all normals drawn beforehand, complex numbers, a stack in place of recursion."""
    normals = iter(np.random.RandomState(2).standard_normal(2 * 127 * 3))
    classes = []
    for trunk in (0.25, 1.25):
        found, waiting = [], [("branch", 0.0030 + 0.0325j, trunk * math.pi, 0)]
        while waiting:
            kind, at, angle, depth = waiting.pop()
            if kind == "branch":
                length = 0.292 * 0.8**depth * (1 + next(normals) / 5)
                ahead = complex(math.cos(angle), math.sin(angle))
                thin = 0.2 * 0.8**depth / length
                turn = np.array([[ahead.real, -ahead.imag], [ahead.imag, ahead.real]])
                size = np.diag([0.06 * 1.3136 * length, 0.06 * 1.3844 * length])
                cov = size @ turn @ np.diag([1, thin**2]) @ turn.T @ size
                for i in range(8):
                    mean = at + ahead * length * (0.07 + 0.86 * i / 7)
                    found.append((length / 2**depth, [1.3136 * mean.real, 1.3844 * mean.imag], cov))
                end = at + ahead * length
                waiting += [("right", end, angle, depth), ("left", end, angle, depth)]  # the left is next
                continue
            turned = angle + (1 if kind == "left" else -1) * 0.7**depth * (1 + next(normals) / 5)
            if depth < 6:
                waiting.append(("branch", at, turned, depth + 1))
        classes.append(found)
    assert next(normals, None) is None
    return classes


def test_every_component_is_that_of_a_second_construction(a):
    both = grown_again()
    for mixture, parts in ((a, both[0]), (tree("b"), both[1]), (tree("both"), both[0] + both[1])):
        weights, means, covs = (torch.from_numpy(np.array(v)) for v in zip(*parts, strict=True))
        assert mixture.weights.shape == (len(parts),)
        torch.testing.assert_close(mixture.weights, weights / weights.sum(), rtol=1e-12, atol=0)
        torch.testing.assert_close(mixture.means, means, rtol=0, atol=1e-14)
        torch.testing.assert_close(mixture.covs, covs, rtol=1e-10, atol=1e-16)


def test_moments_of_the_tree_are_the_published_ones(a):
    assert a.weights.shape == (1016,)
    assert float(a.weights.sum()) == pytest.approx(1, abs=1e-14)
    assert a.mean.tolist() == pytest.approx([0.37185, 0.36461], abs=5e-6)
    assert a.cov.flatten().tolist() == pytest.approx([0.11093, -0.01639, -0.01639, 0.11661], abs=5e-6)
    assert tree("b").weights.shape == (1016,)
    # Both together are about of mean 0 and standard deviation 0.5: what the published origin and scale are for.
    both = tree("both")
    assert both.mean.abs().max() < 1e-3
    assert both.cov.diagonal().sqrt().tolist() == pytest.approx([0.5, 0.5], abs=1e-3)


def test_the_tree_is_the_same_every_time_and_leaves_global_generators_alone(a):
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    state, other = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    again = tree("a")
    again.draw(100, [1])
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), other)
    for name in ("weights", "means", "covs"):
        assert torch.equal(getattr(again, name), getattr(a, name))
    assert torch.equal(a.draw(100, [1]), again.draw(100, [1]))
    assert not torch.equal(a.draw(100, [1]), a.draw(100, [2]))
    with pytest.raises(UnknownName, match="unknown tree 'c'"):
        tree("c")


@pytest.mark.parametrize("sigma", LEVELS)
def test_log_prob_and_bayes_by_hand_with_torchs_distributions(a, sigma):
    x0, x = a.draw(200, [3]).double(), noisy(a, 200, sigma).double()
    x = torch.where(torch.arange(200)[:, None] < 100, x, x0 + sigma * (x - x.mean(0)))  # near x0, and anywhere

    def density(level):
        parts = MultivariateNormal(a.means, a.covs + level**2 * torch.eye(2, dtype=torch.float64))
        return MixtureSameFamily(Categorical(a.weights), parts)

    torch.testing.assert_close(a.log_prob(x, sigma), density(sigma).log_prob(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a.log_prob(x), density(0.0).log_prob(x), rtol=1e-10, atol=1e-10)
    likelihood = torch.distributions.Normal(x0, sigma).log_prob(x).sum(1)
    bayes = density(0.0).log_prob(x0) + likelihood - density(sigma).log_prob(x)
    torch.testing.assert_close(a.posterior_log_prob(x0, x, sigma), bayes, rtol=1e-10, atol=1e-9)


def test_the_posterior_density_integrates_to_one_and_has_the_posteriors_moments():
    mixture, sigma = some(1), 0.3
    grid = torch.linspace(-8, 8, 40001, dtype=torch.float64)[:, None]
    for x in (-1.0, 0.2, 3.0):
        p = mixture.posterior_log_prob(grid, torch.full_like(grid, x), sigma).exp()
        mean, cov = mixture.posterior(torch.tensor([[x]], dtype=torch.float64), sigma)
        assert float(torch.trapezoid(p, grid[:, 0])) == pytest.approx(1, abs=1e-9)
        first = float(torch.trapezoid(p * grid[:, 0], grid[:, 0]))
        assert first == pytest.approx(float(mean), abs=1e-9)
        assert float(torch.trapezoid(p * (grid[:, 0] - first) ** 2, grid[:, 0])) == pytest.approx(float(cov), abs=1e-9)


@pytest.mark.parametrize("sigma", LEVELS)
def test_score_is_the_gradient_and_gives_the_posterior_mean(a, sigma):
    x = noisy(a, 300, sigma).double().requires_grad_()
    (slope,) = torch.autograd.grad(a.log_prob(x, sigma).sum(), x)
    x = x.detach()
    score = a.score(x, sigma)
    torch.testing.assert_close(score, slope, rtol=1e-9, atol=1e-9 / sigma)
    mean = x + sigma**2 * score
    torch.testing.assert_close(a.posterior(x, sigma)[0], mean, rtol=0, atol=1e-13 * max(1, sigma**2))
    torch.testing.assert_close(a.posterior_mean(x, sigma), mean, rtol=0, atol=1e-13 * max(1, sigma**2))


@pytest.mark.parametrize("sigma", [1e-3, 0.03, 0.5, 20.0])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_posterior_covariance_is_of_the_hessian(a, dim, sigma):
    mixture = a if dim == 2 else some(dim)
    x = noisy(mixture, 6, sigma).double()
    cov = mixture.posterior(x, sigma)[1]
    for i in range(len(x)):
        hessian = torch.autograd.functional.hessian(lambda v: mixture.log_prob(v[None], sigma)[0], x[i])
        # σ² I + σ⁴ ∇² log p: at high noise two terms of the size of σ² all but cancel.
        expected = sigma**2 * torch.eye(dim, dtype=torch.float64) + sigma**4 * hessian
        torch.testing.assert_close(cov[i], expected, rtol=1e-6, atol=1e-13 * max(1, sigma**2))


@pytest.mark.parametrize("dim", [1, 2, 3, 5])
def test_posterior_is_the_oracles_in_any_dimension(dim):
    mixture = some(dim, seed=dim)
    plain = SimpleNamespace(alpha=lambda t: 1.0, sigma=lambda t: t)
    oracle = MixtureOracle(mixture.weights, mixture.means, mixture.covs, plain, None)
    for sigma in (0.02, 0.4, 7.0):
        x = noisy(mixture, 50, sigma).double()
        mean, cov = oracle.posterior(x, sigma)
        for found, expected in zip(mixture.posterior(x, sigma), (mean, cov), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(mixture.posterior_mean(x, sigma), mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(mixture.posterior_mean(x.float(), sigma), mean.float(), rtol=0, atol=5e-6)
        torch.testing.assert_close(mixture.score(x, sigma), oracle.score(x, sigma), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma", LEVELS)
def test_the_fast_mean_is_the_exact_one(a, sigma):
    x = noisy(a, 1500, sigma)
    found = a.posterior_mean(x, sigma)
    assert found.dtype == torch.float32
    assert float((found - a.posterior(x, sigma)[0]).abs().max()) < 3e-6


def test_the_fast_mean_takes_a_noise_level_for_each_sample_and_any_batch(a, monkeypatch):
    sigma = torch.logspace(-4, math.log10(80), 1001, dtype=torch.float64)
    x = noisy(a, 1001, sigma)
    exact = a.posterior(x, sigma)[0]
    assert float((a.posterior_mean(x, sigma) - exact).abs().max()) < 3e-6
    half = a.posterior_mean(x.bfloat16(), sigma)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, a.posterior(x.bfloat16(), sigma)[0].bfloat16(), rtol=2**-7, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert float((a.posterior_mean(x, sigma) - exact).abs().max()) < 3e-6
    for rows in (1, 7, 5000):
        monkeypatch.setattr(mixtures, "_CACHED", rows * 1016)
        assert float((a.posterior_mean(x, sigma) - exact).abs().max()) < 3e-6
    for n in (0, 1):
        assert a.posterior_mean(x[:n], sigma[:n]).shape == (n, 2)


def test_levels_for_each_sample_and_chunks_change_nothing(a, monkeypatch):
    sigma = torch.tensor([1e-3, 0.1, 2.0, 0.1])
    x = noisy(a, 4, sigma).double()

    def everything(x, sigma):
        joint = a.posterior_log_prob(x + 0.01, x, sigma)
        return a.log_prob(x, sigma), a.score(x, sigma), *a.posterior(x, sigma), joint

    whole = everything(x, sigma)
    alone = [everything(x[i : i + 1], float(sigma[i])) for i in range(4)]
    monkeypatch.setattr(mixtures, "_EXACT", 3 * 1016 * 4)
    for found, again, one in zip(whole, everything(x, sigma), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, torch.cat(one), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found, again, rtol=1e-9, atol=1e-12)


def test_no_noise_and_no_end_of_noise(a):
    x = torch.cat([a.draw(50, [0]), torch.tensor([[30.0, -40.0]])]).double()  # the last far from all
    for sigma in (0.0, 1e-12):
        mean, cov = a.posterior(x, sigma)
        torch.testing.assert_close(mean, x, rtol=0, atol=1e-13)
        assert cov.abs().max() <= sigma**2 + 1e-28
        assert a.score(x, sigma).isfinite().all()
        assert a.log_prob(x, sigma).isfinite().all()
        torch.testing.assert_close(a.posterior_mean(x.float(), sigma), x.float(), rtol=2e-7, atol=1e-6)
    high = 1e6
    x = high * torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, cov = a.posterior(x, high)
    torch.testing.assert_close(mean, a.mean.expand_as(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(cov, a.cov.expand_as(cov), rtol=0, atol=1e-5)
    torch.testing.assert_close(a.posterior_mean(x.float(), high), a.mean.float().expand_as(x), rtol=0, atol=1e-5)
    expected = MultivariateNormal(a.mean, a.cov + high**2 * torch.eye(2, dtype=torch.float64)).log_prob(x)
    torch.testing.assert_close(a.log_prob(x, high), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", ["a", "both"])
def test_draws_are_of_the_mixture(which):
    mixture, n = tree(which), 40_000
    x = mixture.draw(n, [0, 1])
    assert x.dtype == torch.float32
    x = x.double()
    error = (mixture.cov.diagonal() / n).sqrt()
    assert ((x.mean(0) - mixture.mean).abs() < 4 * error).all()
    products = torch.einsum("ni,nj->nij", x - mixture.mean, x - mixture.mean)
    assert ((products.mean(0) - mixture.cov).abs() < 4 * products.std(0) / n**0.5).all()
    for angle in (0.0, 0.7, 1.6, 2.5):  # every projection is a mixture in one dimension, whose distribution is known
        ray = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        along = (x @ ray).sort().values[:: n // 500]
        spread = torch.einsum("i,kij,j->k", ray, mixture.covs, ray).sqrt()
        below = (torch.special.ndtr((along[:, None] - mixture.means @ ray) / spread) * mixture.weights).sum(1)
        share = torch.arange(0, n, n // 500, dtype=torch.float64) / n
        assert (below - share).abs().max() < 2 / n**0.5  # Kolmogorov's 0.07 %


def test_a_mixture_is_normalised_and_of_any_size():
    x = torch.tensor([[0.3]])
    plain = Mixture(torch.tensor([2.0]), torch.tensor([[1.0]]), torch.tensor([[[4.0]]]))
    assert plain.weights.tolist() == [1]
    assert float(plain.log_prob(x)) == pytest.approx(-0.5 * (0.35**2 + math.log(8 * math.pi)), rel=1e-6)
    assert plain.draw(3, [0]).shape == (3, 1)
    assert plain.draw(0, [0]).shape == (0, 1)
    assert plain.log_prob(torch.zeros(0, 1)).shape == (0,)


BAD_MIXTURES = {
    "shapes": ((torch.ones(2), torch.zeros(3, 2), torch.eye(2).repeat(3, 1, 1)), "weights \\[K\\], means \\[K, D\\]"),
    "nan": ((torch.ones(1), torch.full((1, 2), math.nan), torch.eye(2)[None]), "finite"),
    "weight": ((torch.tensor([1.0, 0.0]), torch.zeros(2, 2), torch.eye(2).repeat(2, 1, 1)), "positive, found 0"),
    "singular": ((torch.ones(1), torch.zeros(1, 2), torch.zeros(1, 2, 2)), "covariance 0 .*not positive definite"),
    "negative": ((torch.ones(1), torch.zeros(1, 2), -torch.eye(2)[None]), "not positive definite"),
    "skewed": ((torch.ones(1), torch.zeros(1, 2), torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])), "symmetric"),
}


@pytest.mark.parametrize("case", BAD_MIXTURES)
def test_bad_mixtures(case):
    given, message = BAD_MIXTURES[case]
    with pytest.raises(DataError, match=message):
        Mixture(*given)


def test_bad_questions(a):
    x = torch.zeros(3, 2)
    for wrong, sigma, message in (
        (torch.zeros(3, 3), 1.0, r"takes x of shape \[B, 2\], found \[3, 3\]"),
        (x[0], 1.0, r"takes x of shape \[B, 2\]"),
        (x, torch.ones(2), r"shape \[3\] like x, found \[2\]"),
        (x, -1.0, "at least 0, found"),
        (x, math.nan, "finite"),
        (x, math.inf, "finite"),
    ):
        for ask in (a.log_prob, a.score, a.posterior, a.posterior_mean):
            with pytest.raises(ReparamError, match=message):
                ask(wrong, sigma)
    with pytest.raises(ReparamError, match="above 0"):
        a.posterior_log_prob(x, x, 0.0)


def test_the_tree_as_data(data):
    assert data.name == "tree a N=5000"
    assert data.train.shape == (5000, 2)
    assert data.heldout.shape == (4096, 2)
    assert data.endless
    assert data.curve is None
    assert (data.mean, data.std) == (0.0, 1.0)
    assert data.sigma_data == pytest.approx(float(data.mixture.cov.diagonal().mean()) ** 0.5, rel=0.05)
    assert "tree a N=5000: 5000 training + 4096 held-out samples of shape [2]" in data.preflight()
    # Each part is a draw of its own, of as many as are asked for.
    parts = [data.train, data.heldout, data.reference(6000), data.fresh(6000)]
    assert [len(p) for p in parts[2:]] == [6000, 6000]
    for i, one in enumerate(parts):
        for other in parts[:i]:
            assert not torch.isin(one[:, 0], other[:, 0]).float().mean() > 0.01
    assert torch.equal(data.reference(6000), parts[2])
    again = load_data({"name": "tree", "size": 5000})
    assert again.digest == data.digest
    others = [{"seed": 1}, {"which": "b"}, {"which": "both"}]
    found = [load_data({"name": "tree", "size": 5000, **more}) for more in others]
    assert len({d.digest for d in [data, *found]}) == 4
    assert len({d.name for d in [data, *found]}) == 4
    assert found[1].mixture.mean.tolist() == tree("b").mean.tolist()


def test_what_of_other_data_stays_as_it_was():
    curve, array = load_data({"name": "spiral", "size": 100}), from_array(torch.randn(100, 2))
    assert curve.endless
    assert curve.mixture is None
    assert torch.equal(curve.fresh(50), curve.curve.draw(50, [0, 3]))
    assert torch.equal(curve.reference(50), curve.curve.draw(50, [0, 2]))
    assert not array.endless
    assert array.reference(5) is array.train
    assert torch.equal(array.fresh(5), array.heldout[:5])


def test_bad_arguments_of_the_tree():
    for wrong in ({"size": 1}, {"seed": -1}, {"size": "many"}, {"size": 1e4}):
        with pytest.raises(DataError, match="size must be at least 2 and seed at least 0, whole numbers"):
            load_data({"name": "tree", **wrong})
    with pytest.raises(UnknownName, match="unknown tree 'c'. *Known: a, b, both"):
        load_data({"name": "tree", "which": "c"})
    with pytest.raises(UnknownName, match="data.which"):
        load_data({"name": "tree", "whitch": "a"})


def test_recipes_check_the_arguments_of_the_tree():
    base = {"network": {"name": "mlp"}, "target": "v"}
    for wrong, message in (
        ({"which": "c"}, "data.which"),
        ({"size": "many"}, "data.size"),
        ({"seed": 1.5}, "data.seed"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe({**base, "data": {"name": "tree", **wrong}})
    load_recipe({**base, "data": {"name": "tree", "which": "both", "size": 3000, "seed": 2}})


def test_the_plane_is_drawn_as_it_is(data):
    view = view_of(data)
    assert view.kind == "points"
    np.testing.assert_array_equal(view.compact(data.heldout[None]), data.heldout[None].numpy())


def test_metrics_that_mean_something_for_the_tree(data):
    fitting = [name for name, metric in METRICS.items() if metric.applies(data, False)]
    assert [name for name in fitting if METRICS[name].usual] == ["sliced_wasserstein", "frechet_distance"]
    assert "nearest_neighbour" not in fitting
    real = Reference(data, None, None)
    drawn, shifted = data.mixture.draw(1000, [5]), data.mixture.draw(1000, [5]) + 0.1
    for name in ("sliced_wasserstein", "frechet_distance"):
        own, away = (
            METRICS[name].compute(Scoring(SampleSet.held(x), real, keep=False, intervals=False)).value
            for x in (drawn, shifted)
        )
        # A shift by v moves all by |v|: along a direction by 2/π of it on average, squared for Fréchet's distance.
        expected = 2 / math.pi * 0.1 * 2**0.5 if name == "sliced_wasserstein" else 2 * 0.1**2
        assert own < 0.5 * expected
        assert away == pytest.approx(expected, rel=0.3)
