"""How honest a variance is: held against posteriors known in closed form, on the page and on the card."""

import itertools
import json
import math
import re
import shutil
from statistics import NormalDist

import pytest
import torch

import reparam as rp
from oracles import MixtureOracle
from reparam.cli import main
from reparam.data import Data
from reparam.data.mixtures import Mixture
from reparam.errors import DataError, NetworkError, Unsupported
from reparam.metrics import Calibration, calibration
from reparam.metrics.calibration import COVERAGES, LEVELS, _interval, skewed_interval
from reparam.metrics.card import compare
from reparam.report.plots import number
from reparam.studies.evaluate import evaluate
from reparam.studies.recipe import from_dict, load_recipe, parse_yaml
from reparam.studies.run import data_of, execute
from reparam.training import Validation
from test_report import NASTY, make_row, make_run, section, write

FLOW = rp.RectifiedFlow()
EDGES = [0.0, 0.1, 0.3, 0.6, 0.9]
NORMAL = NormalDist()
#: Of variances far apart, and one direction that no other resembles.
SPREAD = torch.tensor([4.0, 1.0, 0.25, 0.01, 1.0, 0.09], dtype=torch.float64)


class Stated(rp.Denoiser):
    """A denoiser that answers what a function of (x_t, t) [B, …] says; labels must be those it was made for."""

    def __init__(self, answer, schedule=FLOW, target="x0", labels=None, **settings):
        super().__init__(torch.nn.Identity(), schedule, target, **settings)
        self.answer, self.labels, self.seen = answer, labels, []

    def forward(self, x_t, t, **cond):
        self.seen.append((len(x_t), self.training, torch.is_grad_enabled()))
        if self.labels is not None:
            return self.answer(x_t, t, cond["y"])
        assert not cond
        return self.answer(x_t, t)


class Nothing(torch.nn.Module):
    """A network that answers zeros, of so many numbers a sample."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, x, time):
        return x.new_zeros(len(x), *self.shape)


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """The same sums on every machine."""


def normal(n, d, seed, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def times(n, low=0.0, high=0.9):
    """Stratified, in no order."""
    t = low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return t[torch.randperm(n, generator=torch.Generator().manual_seed(9))]


def levels(t, schedule=FLOW):
    return schedule.alpha(t).double()[:, None], schedule.sigma(t).double()[:, None]


def diagonal(factor=1.0, schedule=FLOW, spread=SPREAD):
    """The posterior of N(0, diag(spread)): precision 1/c + α²/σ², its variance times ``factor``."""

    def answer(x_t, t):
        alpha, sigma = levels(t, schedule)
        var = 1 / (1 / spread + alpha**2 / sigma**2)
        return rp.Posterior(alpha / sigma**2 * var * x_t, factor * var)

    return answer


def gaussian_data(n=8000, seed=0, spread=SPREAD):
    return normal(n, len(spread), seed) * spread.sqrt(), times(n), normal(n, len(spread), seed + 1)


def near(measured, expected, by=4.0):
    return abs(measured.value - expected) < by * measured.error


def each_bin(found, t):
    for k, (low, high) in enumerate(itertools.pairwise(EDGES)):
        yield found.bins[k], (t >= low) & (t < high)


# --- honest, too sure, too careful ------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 0.5, 2.0, 9.0])
def test_a_gaussian_posterior_and_its_variance_times_a_factor(factor):
    x0, t, eps = gaussian_data()
    found = calibration(Stated(diagonal(factor)), x0, t, eps, EDGES)
    alpha, sigma = levels(t)
    truth = 1 / (1 / SPREAD + alpha**2 / sigma**2)
    share = {p: 2 * NORMAL.cdf(NORMAL.inv_cdf((1 + p) / 2) * math.sqrt(factor)) - 1 for p in (*COVERAGES, *LEVELS)}
    wrong = sum(abs(share[p] - p) for p in LEVELS) / len(LEVELS)
    nll = (math.log(2 * math.pi * factor) + 1 / factor + truth.log().mean(1)) / 2
    for one, inside in [*each_bin(found, t), (found.total, t < 1)]:
        n = int(inside.sum())
        assert one.n == n
        assert near(one.z2, 1 / factor)
        assert one.z2.error == pytest.approx(math.sqrt(2 / (n * len(SPREAD))) / factor, rel=0.12)
        # The sum of a sample's six z² is of χ², whose median is about 6 (1 − 2/54)³ (Wilson and Hilferty).
        assert one.z2_median == pytest.approx((1 - 2 / 54) ** 3 / factor, abs=6 * one.z2.error)
        for p in COVERAGES:
            spread = math.sqrt(share[p] * (1 - share[p]) / (n * len(SPREAD)))
            assert abs(one.coverage[p].value - share[p]) < 4 * spread + 1e-4
            if share[p] < 0.999:  # else too few lie outside to tell
                assert one.coverage[p].error == pytest.approx(spread, rel=0.3)
        assert one.calibration_error == pytest.approx(wrong, abs=3 * one.calibration_floor)
        # Over the levels a share p (1 − p) has a root of 0.393 in the mean.
        if factor == 1:
            root = sum(math.sqrt(p * (1 - p)) for p in LEVELS) / len(LEVELS)
            chance = math.sqrt(2 / math.pi / (n * len(SPREAD))) * root
            if one is not found.total:
                assert one.calibration_floor == pytest.approx(chance, rel=0.1)
        assert near(one.nll, float(nll[inside].mean()))
        assert one.var.value == pytest.approx(factor * float(truth[inside].mean()), rel=1e-12)
        assert near(one.mse, float(truth[inside].mean()))
        assert (one.exact_nll, one.gaussian_nll) == (None, None)


def test_deviations_at_two_noise_levels_do_not_cancel():
    x0, t, eps = gaussian_data(4000)

    def answer(x_t, t):
        mean, var, *_ = diagonal()(x_t, t)
        return rp.Posterior(mean, var * torch.where(t < 0.45, 0.5, 2.0)[:, None].double())

    found = calibration(Stated(answer), x0, t, eps, [0.0, 0.45, 0.9])
    assert near(found.bins[0].z2, 2.0)
    assert near(found.bins[1].z2, 0.5)
    assert found.total.calibration_error == pytest.approx(
        (found.bins[0].calibration_error + found.bins[1].calibration_error) / 2
    )
    assert found.total.calibration_error > 0.1
    # Each half has its own spread about its own mean; what sets the halves apart is no error.
    halves = math.hypot(found.bins[0].z2.error, found.bins[1].z2.error) / 2
    assert found.total.z2.error == pytest.approx(halves)


def test_elements_of_a_sample_are_not_taken_for_independent():
    """All elements of a sample alike: as uncertain as one element a sample."""
    x0, t, eps = gaussian_data(3000, spread=torch.ones(1, dtype=torch.float64))
    alone = calibration(Stated(diagonal(spread=torch.ones(1))), x0, t, eps, EDGES)
    many = calibration(Stated(diagonal(spread=torch.ones(1))), x0.expand(-1, 50), t, eps.expand(-1, 50), EDGES)
    assert many.total.z2.error == pytest.approx(alone.total.z2.error)
    assert many.total.coverage[0.9].error == pytest.approx(alone.total.coverage[0.9].error)
    assert many.total.z2.value == pytest.approx(alone.total.z2.value)


@pytest.mark.parametrize("shape", [(3, 4, 4), (48,)])
def test_pictures_and_a_variance_for_a_whole_sample(shape):
    n = 2000
    x0 = 0.5 * normal(n, 48, 3).reshape(n, *shape)
    eps = normal(n, 48, 4).reshape(n, *shape)
    t = times(n)

    def answer(x_t, t):
        alpha, sigma = (v.reshape(-1, *[1] * len(shape)) for v in levels(t))
        var = 1 / (4 + alpha**2 / sigma**2)
        return rp.Posterior(alpha / sigma**2 * var * x_t, var)  # [B, 1, …]

    found = calibration(Stated(answer), x0, t, eps, EDGES)
    assert found.elements == 48
    assert near(found.total.z2, 1.0)
    assert found.total.z2.error == pytest.approx(math.sqrt(2 / (n * 48)), rel=0.1)
    assert near(found.total.coverage[0.99], 0.99)


# --- a full covariance ------------------------------------------------------------------------------------------------


COV = torch.tensor([[1.0, 0.8, 0.0], [0.8, 1.0, 0.3], [0.0, 0.3, 0.5]], dtype=torch.float64)


def full(root_of):
    """The posterior of N(0, COV): C − α²C(α²C + σ²)⁻¹C, with its covariance as ``root_of`` has it."""

    def answer(x_t, t):
        alpha, sigma = (v[..., None] for v in levels(t))
        gain = alpha * COV @ torch.linalg.inv(alpha**2 * COV + sigma**2 * torch.eye(3, dtype=torch.float64))
        cov = COV - alpha * gain @ COV
        return root_of((gain @ x_t[..., None])[..., 0], (cov + cov.mT) / 2)

    return answer


def lower(mean, cov):
    return rp.Posterior(mean, torch.diagonal(cov, dim1=1, dim2=2), torch.linalg.cholesky(cov))


def upper(mean, cov):
    """R upper triangular with R Rᵀ = C: of the matrix read backwards."""
    return rp.Posterior(mean, None, torch.linalg.cholesky(cov.flip(1, 2)).flip(1, 2))


def symmetric(mean, cov):
    values, vectors = torch.linalg.eigh(cov)
    return rp.Posterior(mean, None, vectors * values.sqrt()[:, None] @ vectors.mT)


def no_root(mean, cov):
    return rp.Posterior(mean, torch.diagonal(cov, dim1=1, dim2=2), None)


def test_any_root_of_the_covariance_is_one_likelihood_and_a_diagonal_pays_what_it_ignores():
    n = 6000
    x0 = normal(n, 3, 5) @ torch.linalg.cholesky(COV).T
    t, eps = times(n), normal(n, 3, 6)
    found = {kind: calibration(Stated(full(kind)), x0, t, eps, EDGES) for kind in (lower, upper, symmetric, no_root)}
    alpha, sigma = (v[..., None] for v in levels(t))
    precision = torch.linalg.inv(COV) + alpha**2 / sigma**2 * torch.eye(3, dtype=torch.float64)
    entropy = (math.log(2 * math.pi * math.e) - torch.logdet(precision) / 3) / 2
    cov = torch.linalg.inv(precision)
    mutual = (torch.diagonal(cov, dim1=1, dim2=2).log().sum(1) - torch.logdet(cov)) / 6
    for kind, one in found.items():
        for reliability, inside in each_bin(one, t):
            assert near(reliability.z2, 1.0)
            for p in COVERAGES:
                assert near(reliability.coverage[p], p)
            ignored = float(mutual[inside].mean()) if kind is no_root else 0.0
            assert near(reliability.nll, float(entropy[inside].mean()) + ignored)
        assert one.total.var.value == pytest.approx(found[lower].total.var.value)
    for kind in (upper, symmetric):
        assert found[kind].total.nll.value == pytest.approx(found[lower].total.nll.value, rel=1e-9)
        assert found[kind].total.z2.value == pytest.approx(found[lower].total.z2.value, rel=1e-9)
    gap = found[no_root].total.nll.value - found[lower].total.nll.value
    assert gap == pytest.approx(float(mutual.mean()), rel=0.15)
    assert gap > 0.01


@pytest.mark.parametrize(("covariance", "size"), [("isotropic", 5), ("diagonal", 8), ("full", 14)])
def test_a_network_that_says_nothing_is_honest_about_gaussian_data_of_its_own_spread(covariance, size):
    """Where the likelihood's numbers are 0 it is the posterior of such data; of others it is as wrong as they are."""
    likelihood = rp.Gaussian(rp.target({"name": "edm", "sigma_data": 0.5}), covariance=covariance)
    model = rp.Denoiser(Nothing(size), FLOW, likelihood, input="edm")
    t, x0, eps = times(4000), 0.5 * normal(4000, 4, 0, torch.float32), normal(4000, 4, 1, torch.float32)
    found = calibration(model, x0, t, eps, EDGES)
    alpha, sigma = levels(t)
    var = (1 / (4 + alpha**2 / sigma**2))[:, 0]
    for one, inside in each_bin(found, t):
        assert near(one.z2, 1.0)
        assert near(one.coverage[0.9], 0.9)
        assert near(one.nll, float((2 * math.pi * math.e * var[inside]).log().mean()) / 2)
        assert one.var.value == pytest.approx(float(var[inside].mean()), rel=1e-5)
    # Of data of variance 1 the same mean g x_t is off by (1 − gα) x0 − gσ ε.
    wider = calibration(model, 2 * x0, t, eps, EDGES)
    gain = alpha[:, 0] / sigma[:, 0] ** 2 * var
    wrong = ((1 - gain * alpha[:, 0]) ** 2 + gain**2 * sigma[:, 0] ** 2) / var
    for one, inside in each_bin(wider, t):
        assert near(one.z2, float(wrong[inside].mean()))
    assert float(wrong[inside].mean()) > 2


# --- a mixture, whose posterior is no Gaussian ------------------------------------------------------------------------


WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[-2.0, 0.0], [2.0, 1.0], [0.0, -2.0]], dtype=torch.float64)
COVS = torch.stack([0.05 * COV[:2, :2], 0.2 * torch.eye(2, dtype=torch.float64), 0.02 * COV[1:, 1:]])


def mixture_data(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k = torch.multinomial(WEIGHTS, n, replacement=True, generator=generator)
    x0 = MEANS[k] + (torch.linalg.cholesky(COVS)[k] @ normal(n, 2, seed + 1)[..., None])[..., 0]
    return x0, times(n, 0.02, 0.98), normal(n, 2, seed + 2)


def mixture_posterior(oracle, shape):
    def answer(x_t, t):
        found = [oracle.posterior(x_t[i : i + 1], float(t[i])) for i in range(len(t))]
        return shape(torch.cat([m for m, _ in found]), torch.cat([c for _, c in found]))

    return answer


@pytest.mark.parametrize("schedule", [FLOW, rp.Cosine()], ids=str)
def test_a_mixture_beside_its_exact_likelihood_and_that_of_the_best_gaussian(schedule):
    known = Mixture(WEIGHTS, MEANS, COVS)
    oracle = MixtureOracle(WEIGHTS, MEANS, COVS, schedule, rp.target("x0"))
    x0, t, eps = mixture_data(600)
    edges = [0.0, 0.25, 0.5, 0.75, 1.0]
    model = Stated(mixture_posterior(oracle, lower), schedule)
    found = calibration(model, x0, t, eps, edges, exact=known)
    alpha, sigma = levels(t, schedule)
    x_t = alpha * x0 + sigma * eps
    # Bayes: log p(x0 | x_t) = log p(x0) + log N(x_t; α x0, σ²) − log p(x_t)
    noise = -(eps.square().sum(1) + 2 * (2 * math.pi * sigma[:, 0] ** 2).log()) / 2
    marginal = torch.cat([oracle.log_density(x_t[i : i + 1], float(t[i])) for i in range(len(t))])
    exact = -(oracle.log_density(x0, 0.0) + noise - marginal) / 2
    for one, low, high in zip(found.bins, edges[:-1], edges[1:], strict=True):
        assert near(one.z2, 1.0)  # whatever the distribution
        assert one.exact_nll.value == pytest.approx(float(exact[(t >= low) & (t < high)].mean()), abs=1e-7)
        assert one.gaussian_nll.value == pytest.approx(one.nll.value, abs=1e-7)
    assert found.total.gaussian_nll.value > found.total.exact_nll.value + 0.1
    wide = calibration(Stated(mixture_posterior(oracle, no_root), schedule), x0, t, eps, edges, exact=known)
    assert wide.total.nll.value > wide.total.gaussian_nll.value
    assert wide.total.exact_nll == found.total.exact_nll


def test_an_honest_model_of_rare_modes_is_not_accused():
    """Few z² of such a posterior are large, so the mean of most draws lies below 1; the interval allows for that."""
    known = Mixture(WEIGHTS, MEANS, COVS)

    def answer(x_t, t):
        alpha, sigma = levels(t)
        return lower(*known.posterior(x_t / alpha, (sigma / alpha)[:, 0]))

    accused, plainly = 0, 0
    for seed in range(20):
        x0, t, eps = mixture_data(2560, 100 * seed)
        found = calibration(Stated(answer), x0, t, eps, [k / 10 for k in range(11)])
        accused += any(not one.z2_interval[0] < 1 < one.z2_interval[1] for one in found.bins)
        plainly += any(abs(one.z2.value - 1) > 2.807 * one.z2.error for one in found.bins)
    assert accused <= 4 < plainly  # of 20 nominally 1


def test_the_interval_undoes_skewness():
    """Its ends are where Hall's polynomial of (m − μ)/s takes the values of Student's quantile."""
    stats = pytest.importorskip("scipy.stats")
    values = normal(60, 1, 0)[:, 0].mul(1.2).exp()
    low, high = skewed_interval(values, 0.9)
    skew, n = stats.skew(values.numpy()), len(values)
    for end, sign in ((low, 1), (high, -1)):
        x = float((values.mean() - end) / values.std())
        leant = x + skew * x**2 / 3 + skew**2 * x**3 / 27 + skew / (6 * n)
        assert leant * math.sqrt(n) == pytest.approx(sign * stats.t.ppf(0.95, n - 1), rel=1e-6)
    even = torch.tensor([-1.0, 1.0, 2.0, -2.0], dtype=torch.float64)
    plain = stats.t.interval(0.9, 3, 0.0, float(even.std()) / 2)
    assert skewed_interval(even, 0.9) == pytest.approx(plain)
    assert skewed_interval(torch.full((5,), 3.0), 0.9) == (3.0, 3.0)


def rarely_sure(x_t, t):
    """Honest, but below t = 0.1 of one sample in six the variance is 10⁻² to 10⁻¹² of it, seldom the least."""
    mean, var, *_ = diagonal()(x_t, t)
    wrong = (t < 0.1) & (x_t[:, 0].mul(1e4).floor() % 6 == 0)
    return rp.Posterior(mean, var * torch.where(wrong, 10 ** (-2 - 10 * (x_t[:, 1].mul(1e4) % 1) ** 8), 1.0)[:, None])


def test_an_interval_for_a_mean_of_squares_is_not_negative_and_finds_what_few_samples_tell():
    x0, t, eps = gaussian_data(4000)
    few = Stated(rarely_sure)
    found = calibration(few, x0, t, eps, EDGES)
    with torch.no_grad():
        alpha, sigma = levels(t)
        mean, var, *_ = few(alpha * x0 + sigma * eps, t)
    z2 = ((x0 - mean) ** 2 / var).mean(1)[t < 0.1]
    assert skewed_interval(z2, 0.9875)[0] < 0
    low, high = found.bins[0].z2_interval
    assert low > 1  # surely more than an honest model's, however few samples tell
    assert low < found.bins[0].z2.value
    assert high > found.bins[0].z2.value
    assert 0 <= found.total.z2_interval[0] < found.total.z2.value < found.total.z2_interval[1]
    assert found.bins[0].z2_median < 3 < 1000 < found.bins[0].z2.value
    for one in found.bins[1:]:
        assert one.z2_interval[0] < 1 < one.z2_interval[1]


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_the_lower_end_is_sound_however_heavy_the_tail(spread):
    """Of log-normal values, whose mean is e^(s²/2): too high no more often than it says, and never negative."""
    draws = normal(300, 300, 3).mul(spread).sub(spread**2 / 2).exp()
    lows = torch.tensor([_interval(values, 0.95)[0] for values in draws], dtype=torch.float64)
    assert float(lows.min()) >= 0
    # 2.5 % and the chance of 300 draws
    assert float((lows > 1).double().mean()) < 0.025 + 3 * math.sqrt(0.025 * 0.975 / 300)
    assert float(lows.median()) > 0.5


def test_where_no_data_are_left_the_exact_posterior_is_the_distribution_of_the_data():
    known = Mixture(WEIGHTS, MEANS, COVS)
    mean = WEIGHTS @ MEANS
    apart = MEANS - mean
    cov = (WEIGHTS[:, None, None] * (COVS + apart[:, :, None] * apart[:, None])).sum(0)
    x0, _, eps = mixture_data(400)
    model = Stated(lambda x_t, t: lower(mean.expand_as(x_t), cov.expand(len(x_t), 2, 2)))
    found = calibration(model, x0, torch.ones(400), eps, [0.5, 1.0], exact=known)
    density = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(WEIGHTS), torch.distributions.MultivariateNormal(MEANS, COVS)
    )
    assert found.total.exact_nll.value == pytest.approx(-float(density.log_prob(x0).mean()) / 2)
    assert found.total.gaussian_nll.value == pytest.approx(found.total.nll.value)


# --- how it is measured -----------------------------------------------------------------------------------------------


def test_it_is_measured_in_evaluation_mode_without_gradients_in_parts_that_add_up():
    n, d = 6, 2**19
    x0, eps = normal(n, d, 0, torch.float32), normal(n, d, 1, torch.float32)
    t = times(n)
    model = Stated(diagonal(spread=torch.ones(1, dtype=torch.float64)))
    model.train()
    found = calibration(model, x0, t, eps, [0.0, 0.9])
    assert model.seen == [(4, False, False), (2, False, False)]
    assert model.training
    var = (1 / (1 + (1 - t) ** 2 / t**2))[:, None]
    mean = (1 - t)[:, None] / t[:, None] ** 2 * var * ((1 - t)[:, None] * x0 + t[:, None] * eps)
    assert found.total.z2.value == pytest.approx(float(((x0 - mean) ** 2 / var).mean()), rel=1e-5)
    assert found.total.mse.value == pytest.approx(float(((x0 - mean) ** 2).mean()), rel=1e-5)


def test_of_a_validation_with_labels_on_integer_steps():
    schedule = rp.DDPM()
    n = 400
    y = torch.arange(n) % 3
    shift = torch.tensor([-5.0, 0.0, 5.0], dtype=torch.float64)[y][:, None]
    x0 = normal(n, 4, 0) + shift

    def answer(x_t, t, y):
        assert torch.equal((t * 1000).round(), t * 1000)
        of = torch.tensor([-5.0, 0.0, 5.0], dtype=torch.float64)[y][:, None]
        alpha, _ = levels(t, schedule)
        mean, var, *_ = diagonal(schedule=schedule, spread=torch.ones(4, dtype=torch.float64))(x_t - alpha * of, t)
        return rp.Posterior(mean + of, var)

    model = Stated(answer, schedule, "eps", labels=True, time="step")
    validation = Validation([0.0, 0.5, 1.0], x0, times(n, 0.0, 1.0), normal(n, 4, 1), 1.0, y)
    found = Calibration.of(model, validation)
    assert [one.n for one in found.bins] == [200, 200]
    assert near(found.total.z2, 1.0)
    assert near(found.total.coverage[0.5], 0.5)


def test_plain_data_say_all_and_survive_a_file():
    x0, t, eps = gaussian_data(200)
    found = calibration(Stated(diagonal()), x0, t, eps, EDGES)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["edges_t"] == EDGES
    assert plain["elements"] == 6
    assert len(plain["bins"]) == 4
    assert set(plain["total"]["coverage"]) == {"0.5", "0.9", "0.99"}
    for one, told in zip([*found.bins, found.total], [*plain["bins"], plain["total"]], strict=True):
        assert told["z2"] == {"value": one.z2.value, "error": one.z2.error}
        assert told["coverage"]["0.9"]["value"] == one.coverage[0.9].value
        assert told["exact_nll"] is None
        assert told["z2_interval"] == list(one.z2_interval)
        assert told["z2_median"] == one.z2_median
        assert told["n"] == one.n
        assert told["calibration_error"] == one.calibration_error


def test_on_data_there_are_more_of_small_samples_and_the_truth_where_it_is_known():
    known = Mixture(WEIGHTS, MEANS, COVS)
    heldout = known.draw(500, [1])
    data = Data("made", heldout, heldout, mixture=known)
    model = rp.Denoiser(Nothing(4), FLOW, rp.Gaussian("edm"), input="edm")
    found = Calibration.on(model, data, (0.0, 1.0))
    assert [one.n for one in found.bins] == [2048] * 10
    assert found.edges == pytest.approx([k / 10 for k in range(11)])
    assert found.total.exact_nll.value < found.total.gaussian_nll.value < found.total.nll.value
    large = torch.zeros(300, 3, 16, 16)
    assert (
        Calibration.on(
            rp.Denoiser(Nothing(6, 16, 16), FLOW, rp.Gaussian("edm"), input="edm"),
            Data("made", large, large),
            (0.0, 1.0),
        )
        .bins[0]
        .n
        == 256
    )


# --- what cannot be judged --------------------------------------------------------------------------------------------


def test_a_model_without_a_variance_says_what_it_has_and_what_to_do():
    x0, t, eps = gaussian_data(100)
    with pytest.raises(Unsupported, match=r"predicts velocity and states no variance.*target: \{name: gaussian"):
        calibration(rp.Denoiser(Nothing(6), FLOW, "velocity"), x0, t, eps, EDGES)
    noisy = rp.Gaussian("edm", covariance="diagonal", of="noisy")
    with pytest.raises(Unsupported, match=r"of another noisy sample \(of='noisy'\).*target: edm, of: x0"):
        calibration(rp.Denoiser(Nothing(12), FLOW, noisy), x0, t, eps, EDGES)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_a_variance_that_is_none_is_refused(bad):
    x0, t, eps = gaussian_data(100)

    def answer(x_t, t):
        mean, var, *_ = diagonal()(x_t, t)
        var[3, 2] = bad
        return rp.Posterior(mean, var)

    with pytest.raises(NetworkError, match=r"at t = 0\.\d+ .* for 1 of 100 samples"):
        calibration(Stated(answer), x0, t, eps, EDGES)


def test_a_root_without_inverse_is_refused():
    x0, t, eps = normal(100, 3, 0), times(100), normal(100, 3, 1)

    def answer(x_t, t):
        found = full(lower)(x_t, t)
        found.root[7, 1] = found.root[7, 0]
        found.root[7, 1, 1:] = 0
        return found

    with pytest.raises(NetworkError, match="for 1 of 100 samples"):
        calibration(Stated(answer), x0, t, eps, EDGES)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([0.0, 0.5], "run from .* to .*, beyond the noise bins"),
        ([0.0, 0.001, 0.9], r"from t = 0 to 0\.001 has 0 samples"),
        ([0.9, 0.0], "increasing"),
        ([0.0], "at least two"),
    ],
)
def test_noise_bins_that_do_not_fit(edges, message):
    x0, t, eps = gaussian_data(100)
    with pytest.raises(DataError, match=message):
        calibration(Stated(diagonal()), x0, t, eps, edges)


# --- on the page ------------------------------------------------------------------------------------------------------


def honesty(factor, n=4000, exact=None, seed=0):
    """Plain data of a model whose variance is the true one times ``factor(t)``."""
    x0, t, eps = gaussian_data(n, seed=seed)

    def answer(x_t, t):
        mean, var, *_ = diagonal()(x_t, t)
        return rp.Posterior(mean, var * factor(t)[:, None])

    found = calibration(Stated(answer), x0, t, eps, EDGES).to_dict()
    if exact is not None:
        for one in [*found["bins"], found["total"]]:
            one["exact_nll"], one["gaussian_nll"] = ({"value": v, "error": 0.0} for v in (exact, exact + 1))
    return found


def page_of(tmp_path, **calibrations):
    rows = [make_row(name, target=name, calibration=found) for name, found in calibrations.items()]
    for row in rows:
        make_run(tmp_path, row["run"])
    return write(tmp_path, rows)


def test_the_page_says_where_a_model_is_too_sure_and_where_too_careful(tmp_path):
    page = page_of(
        tmp_path,
        honest=honesty(lambda t: torch.ones_like(t)),
        sure=honesty(lambda t: torch.where(t < 0.3, 0.5, 1.0)),
        careful=honesty(lambda t: torch.where(t > 0.6, 3.0, 1.0)),
        both=honesty(lambda t: torch.where((t > 0.1) & (t < 0.3), 2.0, 0.1)),
        wrong=honesty(lambda t: torch.full_like(t, 4.0)),
        silent=None,
    )
    told = section(page, "calibration")
    assert re.search(r"honest: as far as can be told honest at every noise level, z² from (0\.9|1\.0)", told)
    assert "sure: says less than its error (overconfident) below t = 0.3, z² up to" in told
    assert "careful: says more than its error (underconfident) above t = 0.6, z² down to 0.3" in told
    assert "both: says less than its error (overconfident) below t = 0.1 and above t = 0.3, z² up to 10" in told
    assert "; says more than its error (underconfident) from t = 0.1 to 0.3, z² down to 0.5" in told
    assert "wrong: says more than its error (underconfident) at every noise level, z² down to 0.2" in told
    assert "silent" not in told


def test_the_page_names_what_few_samples_make_of_a_bin(tmp_path):
    x0, t, eps = gaussian_data(4000)
    found = calibration(Stated(rarely_sure), x0, t, eps, EDGES).to_dict()
    told = section(page_of(tmp_path, rare=found), "calibration")
    first = found["bins"][0]
    share = first["coverage"]["0.99"]
    assert 0.75 < share["value"] < 0.9
    assert (
        f"rare: says less than its error (overconfident) below t = 0.1, z² up to {number(first['z2']['value'])} in the "
        f"mean (below {number(first['z2_median'])} for half of the samples), and as little as "
        f"{100 * share['value']:.1f} ± {100 * share['error']:.1f} % inside its 99 % interval."
    ) in told
    others = found["bins"][1:]
    rest = sum(one["n"] * one["z2"]["value"] for one in others) / sum(one["n"] for one in others)
    assert f"mostly below t = 0.1:{number(rest)} without" in told
    assert 0.9 < rest < 1.1


def test_a_bin_is_judged_by_its_coverage_too(tmp_path):
    def covering(value, error):
        found = honesty(lambda t: torch.ones_like(t))
        found["bins"][0]["coverage"]["0.99"] = {"value": value, "error": error}
        return found

    told = section(page_of(tmp_path, narrow=covering(0.82, 0.01), few=covering(0.82, 0.06)), "calibration")
    words = "(overconfident) below t = 0.1, and as little as 82.0 ± 1.0 % inside its 99 % interval."
    assert f"narrow: says less than its error {words}" in told
    assert "few: as far as can be told honest" in told
    assert "mostly" not in told


def test_a_large_mean_that_may_be_chance_is_named_as_such(tmp_path):
    found = honesty(lambda t: torch.where(t > 0.6, 3.0, 1.0))
    found["bins"][0] |= {"z2": {"value": 40.0, "error": 39.0}, "z2_interval": [0.4, 500.0], "z2_median": 0.9}
    told = section(page_of(tmp_path, x0=found), "calibration")
    assert "may be overconfident below t = 0.1, z² up to 40.0 in the mean (below 0.900 for half of the samples)" in told
    assert "(underconfident) above t = 0.6" in told


def test_the_narrower_intervals_of_honest_modes_are_no_finding(tmp_path):
    known = Mixture(WEIGHTS, MEANS, COVS)

    def answer(x_t, t):
        alpha, sigma = levels(t)
        return lower(*known.posterior(x_t / alpha, (sigma / alpha)[:, 0]))

    x0, t, eps = mixture_data(20000)
    found = calibration(Stated(answer), x0, t, eps, [k / 10 for k in range(11)])
    least = min(found.bins, key=lambda one: one.coverage[0.99].value).coverage[0.99]
    assert least.value + 3 * least.error < 0.99
    assert "inside its" not in section(page_of(tmp_path, x0=found.to_dict()), "calibration")


def test_older_rows_without_medians_are_shown_without(tmp_path):
    new, old = (honesty(lambda t: torch.full_like(t, 0.5), seed=seed) for seed in (0, 50))
    for one in [*old["bins"], old["total"]]:
        del one["z2_median"]
    rows = [make_row(f"s{i}", seed=i, calibration=found) for i, found in enumerate([new, old])]
    for row in rows:
        make_run(tmp_path, row["run"])
    told = section(write(tmp_path, rows), "calibration")
    assert "overconfident) at every noise level" in told
    assert "its median" not in told
    assert "its median" in section(page_of(tmp_path, x0=new), "calibration")


@pytest.mark.parametrize("alone", [True, False])
def test_a_likelihood_of_another_noisy_sample_is_named_with_the_reason(tmp_path, alone):
    noisy = {"name": "gaussian", "target": "edm", "of": "noisy"}
    rows = [make_row("noisy", target=noisy, calibration=None), make_row("v", target="v", calibration=None)]
    rows.append(make_row("gone", target={**noisy, "target": "v"}, status="failed"))
    if not alone:
        target = {"name": "gaussian", "target": "x0"}
        rows.append(make_row("x0", target=target, calibration=honesty(lambda t: torch.ones_like(t))))
    for row in rows:
        make_run(tmp_path, row["run"])
    page = write(tmp_path, rows)
    told = section(page, "calibration")
    assert re.search(r"edm ± diagonal[^:.]*: not judged, for it states no variance of x0: .* \(of: noisy\)", told)
    assert "lost to rounding" in told
    assert told.count("not judged") == 1
    assert ("x0 ± diagonal: as far as can be told honest" in told) is not alone
    assert ("<svg" in page[page.index('id="calibration"') :].split("</section>")[0]) is not alone


def test_what_few_samples_may_do_by_chance_is_no_finding(tmp_path):
    found = honesty(lambda t: torch.ones_like(t), n=80, seed=14)
    z2 = [one["z2"]["value"] for one in found["bins"]]
    assert min(z2) < 0.8
    assert max(z2) > 1.2
    assert "few: as far as can be told honest" in section(page_of(tmp_path, few=found), "calibration")


def test_the_page_shows_coverage_errors_and_likelihoods_beside_the_truth(tmp_path):
    found = honesty(lambda t: torch.ones_like(t), exact=-7.25)
    told = section(page_of(tmp_path, x0=found), "calibration")
    for p, words in (("0.5", "50 %"), ("0.9", "90 %"), ("0.99", "99 %")):
        assert f"inside the {words} interval" in told
        share = found["total"]["coverage"][p]
        assert f"{100 * share['value']:.1f} %± {100 * share['error']:.1f}" in told
    assert f"{number(found['total']['calibration_error'])}by chance" in told
    for one in found["bins"]:
        assert number(one["nll"]["value"]) in told
        assert number(one["var"]["value"]) in told
    assert "the best Gaussian −6.25 −6.25" in told
    assert "the truth −7.25 −7.25" in told


def test_seeds_are_averaged_and_other_noise_levels_left_out(tmp_path):
    several = [honesty(lambda t: torch.full_like(t, 2.0), seed=seed) for seed in (0, 50)]
    other = honesty(lambda t: torch.full_like(t, 0.01))
    other["edges_t"] = [0.0, 0.2, 0.4, 0.6, 0.9]
    rows = [make_row(f"s{i}", seed=i, calibration=found) for i, found in enumerate([*several, other])]
    for row in rows:
        make_run(tmp_path, row["run"])
    told = section(write(tmp_path, rows), "calibration")
    mean = sum(found["total"]["z2"]["value"] for found in several) / 2
    assert 0.48 < mean < 0.52
    assert f"{number(mean)}± " in told
    assert f"{number(other['total']['z2']['value'])}±" not in told


def test_a_line_beyond_the_chart_is_told_and_names_are_escaped(tmp_path):
    found = honesty(lambda t: torch.where(t < 0.1, 1e-4, 1.0))
    make_run(tmp_path, "x")
    page = write(tmp_path, [make_row("x", data=NASTY, target=NASTY, calibration=found)])
    part = page[page.index('id="calibration"') :].split("</section>")[0]
    assert "<script" not in part
    assert "<b>bold" not in part
    assert "z² <small>" in part
    assert "goes up to" in part
    assert "scrolls sideways" in part


def test_without_variances_there_is_no_such_section(tmp_path):
    make_run(tmp_path, "x0")
    page = write(tmp_path, [make_row("x0")])
    assert 'id="calibration"' not in page


# --- on the card ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def confident_run(tmp_path_factory):
    """The folder of a run of a model with variances."""
    settings = ["data.dim=2", "train.steps=20", "train.lr=1e-3", "sample.n=50", "sample.steps=4", "loss_space=null"]
    target = "target={name: gaussian, target: edm, covariance: diagonal}"
    ((name, config),) = load_recipe("spiral", [target, *settings, "seed=0"]).runs.items()
    folder = tmp_path_factory.mktemp("study") / name
    assert execute(name, config, folder)["status"] == "finished"
    return folder


def test_a_run_is_evaluated_with_its_calibration(confident_run, capsys):
    row = json.loads((confident_run / "result.json").read_text())
    found = evaluate(confident_run)
    assert found.card["calibration"] == row["calibration"]
    assert main(["eval", str(confident_run)]) == 0
    told = capsys.readouterr().out
    assert "calibration of the stated variance" in told
    for p in ("50 %", "90 %", "99 %"):
        assert f"within {p}" in told
    assert sum(line.startswith("t 0.") for line in told.splitlines()) == len(row["calibration"]["bins"])
    assert main(["eval", str(confident_run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calibration"] == row["calibration"]


def test_a_runs_variance_is_judged_under_what_is_said_of_it(confident_run, capsys):
    score = ["eval", str(confident_run), "--json", "--spec"]

    def judged(spec):
        assert main([*score, spec]) == 0
        return json.loads(capsys.readouterr().out)

    plain = json.loads((confident_run / "result.json").read_text())
    other = judged("{target: {name: gaussian, target: v, covariance: diagonal}}")
    assert other["calibration"]["overrides"]["target"]["file"]["target"]["name"] == "edm"
    assert other["calibration"]["total"]["mse"] != plain["calibration"]["total"]["mse"]
    assert other["metrics"] == evaluate(confident_run).card["metrics"]  # the samples are what they were
    within = judged("{t_range: [0.25, 0.75]}")["calibration"]["edges_t"]
    assert (within[0], within[-1]) == (0.25, 0.75)
    assert main([*score, "{target: v}"]) == 2
    assert "--spec would change nothing" in capsys.readouterr().err


def test_where_a_run_lacks_it_it_is_measured_or_said_why_not(confident_run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(confident_run, folder)
    (folder / "result.json").unlink()
    card = evaluate(folder).card
    model = rp.load(folder / "model.safetensors")
    data = data_of(from_dict(parse_yaml((folder / "recipe.yaml").read_text(), "recipe")))
    assert card["calibration"] == Calibration.on(model, data, (0.0, 1.0)).to_dict()
    assert compare(card, card).keys() == card["metrics"].keys()

    def unusable(*asked, **more):
        raise NetworkError("its variance is none")

    monkeypatch.setattr(Calibration, "on", unusable)
    found = evaluate(folder)
    assert "calibration" not in found.card
    assert found.left_out["calibration"] == "its variance is none"
    assert "left out: calibration: its variance is none" in found.text()
