"""MMD, KID, neighbours, FD∞ and block intervals against closed forms, plain loops and repeated draws."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reparam.errors import DataError, ReparamError, UnknownName
from reparam.metrics import Moments, frechet_distance, moments
from reparam.metrics.blocks import block_interval, student_quantile
from reparam.metrics.extrapolation import frechet_infinity
from reparam.metrics.kernel import kernel_distance, mmd2
from reparam.metrics.neighbours import precision_recall


def normal(seed, n, d, shift=0.0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, dtype=torch.float64, generator=g) * scale + shift


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made meanwhile has."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # Views, and the storage of what was there before, cost nothing.
        if isinstance(out, torch.Tensor) and "view" not in func.name() and out._base is None:
            self.numbers = max(self.numbers, out.numel())
        return out


def polynomial(a, b):
    return (float(a @ b) / len(a) + 1) ** 3


def gaussian(a, b, h=1.3):
    return math.exp(-float(((a - b) ** 2).sum()) / (2 * h * h))


def looped(k, x, y):
    """MMD², pair by pair."""
    n, m = len(x), len(y)
    own = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    other = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return own + other - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def without(x, i):
    return np.delete(x, i, axis=0)


def effects_removed(values, effects):
    """The sum of squares that least squares on a constant and ``effects`` leaves, and its degrees of freedom."""
    design = np.column_stack([np.ones(len(values)), effects])
    rest = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return rest @ rest, len(values) - np.linalg.matrix_rank(design)


def pair_effects(k, x):
    n = len(x)
    pairs = [(i, j) for i in range(n) for j in range(i)]
    effects = np.array([[float(c in p) for c in range(n)] for p in pairs])
    square, degrees = effects_removed(np.array([k(x[i], x[j]) for i, j in pairs]), effects)
    return square / degrees / len(pairs)


def looped_variance(k, x, y):
    """The jackknife's variance, less the pairs' share that it counts too often."""
    n, m = len(x), len(y)
    whole = looped(k, x, y)
    jackknife = (n - 1) / n * sum((looped(k, without(x, i), y) - whole) ** 2 for i in range(n))
    jackknife += (m - 1) / m * sum((looped(k, x, without(y, j)) - whole) ** 2 for j in range(m))
    pairs = [(i, j) for i in range(n) for j in range(m)]
    effects = np.array([[float(i == c) for c in range(n)] + [float(j == c) for c in range(m)] for i, j in pairs])
    square, degrees = effects_removed(np.array([k(x[i], y[j]) for i, j in pairs]), effects)
    across = 4 * square / degrees / (n * m)
    own, other = pair_effects(k, x), pair_effects(k, y)
    often = 2 * across + 2 * (n - 1) / (n - 2) * own + 2 * (m - 1) / (m - 2) * other
    return max(jackknife - often, 0) + across + own + other


@pytest.mark.parametrize(("name", "k"), [("polynomial", polynomial), ("gaussian", gaussian)])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_mmd2_and_its_error_are_those_of_plain_loops(name, k, shift):
    x, y = normal(0, 9, 3), normal(1, 6, 3, shift)
    found = mmd2(x, y, name, 1.3 if name == "gaussian" else None)
    assert found.value == pytest.approx(looped(k, x.numpy(), y.numpy()), rel=1e-11)
    assert found.standard_error**2 == pytest.approx(looped_variance(k, x.numpy(), y.numpy()), rel=1e-9)
    assert (found.kernel, found.bandwidth) == (name, 1.3 if name == "gaussian" else None)


def test_polynomial_mmd2_from_power_sums():
    """In one dimension (xy + 1)³ = 1 + 3xy + 3x²y² + x³y³, so power sums say it all."""
    x, y = normal(2, 300, 1), normal(3, 200, 1, 0.4)

    def pairs(v, p):
        return float((v**p).sum() ** 2 - (v ** (2 * p)).sum()) / (len(v) * (len(v) - 1))

    exact = sum(
        c * (pairs(x, p) + pairs(y, p) - 2 * float((x**p).mean() * (y**p).mean())) for c, p in [(3, 1), (3, 2), (1, 3)]
    )
    assert mmd2(x, y).value == pytest.approx(exact, rel=1e-10)


def test_mmd2_of_gaussians_is_the_closed_form():
    s, t, shift, h = 1.0, 1.5, 0.7, 0.8

    def mean_kernel(variance, away):
        return h / math.sqrt(h * h + variance) * math.exp(-(away**2) / (2 * (h * h + variance)))

    exact = mean_kernel(2 * s * s, 0) + mean_kernel(2 * t * t, 0) - 2 * mean_kernel(s * s + t * t, shift)
    found = mmd2(normal(4, 1500, 1, 0, s), normal(5, 1200, 1, shift, t), "gaussian", h)
    assert found.standard_error < exact / 4
    assert abs(found.value - exact) < 4 * found.standard_error
    exact = 3 * shift**2 + 3 * shift**4 + (shift**3 + 3 * shift) ** 2
    found = mmd2(normal(6, 1500, 1), normal(7, 1200, 1, shift))
    assert found.standard_error < exact / 4
    assert abs(found.value - exact) < 4 * found.standard_error


def uniform(seed, n, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, dtype=torch.float64, generator=g) * 2 - 1 + shift


# In one dimension, with a shift c of uniform numbers on [−1, 1]: differences c, c² and c³ + c of the moments.
@pytest.mark.parametrize(("shift", "exact"), [(0.0, 0.0), (0.5, 3 * 0.5**2 + 3 * 0.5**4 + (0.5**3 + 0.5) ** 2)])
@pytest.mark.parametrize("score", ["mmd2", "kid"])
def test_over_many_draws_mean_and_error_are_right(score, shift, exact):
    values, errors = [], []
    for seed in range(300):
        x, y = uniform(2 * seed, 40), uniform(2 * seed + 1, 40, shift)
        if score == "mmd2":
            found = mmd2(x, y)
            value, error = found.value, found.standard_error
        else:
            value, error = kernel_distance(x, y, subsets=4, size=20)
        values.append(value)
        errors.append(error)
    values = np.array(values)
    assert abs(values.mean() - exact) < 4 * values.std() / len(values) ** 0.5
    ratio = np.mean(np.square(errors)) / values.var()
    if exact == 0:
        assert 0.2 < (values < 0).mean() < 0.9
        # Too large there, as documented.
        assert ratio > 1
        assert ratio < 2.5
    else:
        assert 0.75 < ratio < 1.3


def test_mmd2_for_any_order_chunk_and_dtype():
    x, y = normal(8, 70, 5), normal(9, 50, 5, 0.3)
    for name, h in [("polynomial", None), ("gaussian", 2.0)]:
        whole = mmd2(x, y, name, h)
        for chunk in (1, 7, 64):
            other = mmd2(x.flip(0), y[torch.randperm(50)], name, h, chunk=chunk)
            assert other.value == pytest.approx(whole.value, rel=1e-10)
            assert other.standard_error == pytest.approx(whole.standard_error, rel=1e-8)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert mmd2(x.to(dtype), y.to(dtype), name, h) == mmd2(x.to(dtype).double(), y.to(dtype).double(), name, h)


def test_gaussian_mmd2_does_not_mind_where_the_origin_is():
    x, y = normal(10, 60, 4), normal(11, 60, 4, 0.5)
    near, far = mmd2(x, y, "gaussian", 1.0), mmd2(x + 1e5, y + 1e5, "gaussian", 1.0)
    assert far.value == pytest.approx(near.value, rel=1e-7)


def test_the_bandwidth_found_is_the_median_distance():
    x, y = normal(12, 30, 3), normal(13, 41, 3, 2.0)
    both = torch.cat([x, y]).numpy()
    distances = sorted(float(np.linalg.norm(both[i] - both[j])) for i in range(71) for j in range(i))
    found = mmd2(x, y, "gaussian")
    assert found.bandwidth == pytest.approx(distances[(len(distances) - 1) // 2], rel=1e-12)
    assert mmd2(x, y, "gaussian", found.bandwidth) == found
    same = torch.ones(10, 3)
    with pytest.raises(DataError, match="give bandwidth="):
        mmd2(same, same, "gaussian")
    assert mmd2(same, same, "gaussian", 1.0).value == 0


def test_kid_of_whole_sets_is_mmd2_and_subsets_are_drawn_anew():
    x, y = normal(14, 40, 6), normal(15, 40, 6, 0.2)
    whole = mmd2(x, y)
    value, error = kernel_distance(x, y, subsets=3, size=40)
    assert value == pytest.approx(whole.value, rel=1e-10)
    assert error == pytest.approx(whole.standard_error, rel=1e-8)
    assert kernel_distance(x, y, subsets=5, size=10) == kernel_distance(x, y, subsets=5, size=10)
    g = torch.Generator().manual_seed(1)
    one, two = (kernel_distance(x, y, subsets=5, size=10, generator=g)[0] for _ in range(2))
    assert one != two
    g = torch.Generator().manual_seed(2)
    expected = []
    for _ in range(5):
        a, b = x[torch.randperm(40, generator=g)[:10]], y[torch.randperm(40, generator=g)[:10]]
        expected.append(looped(polynomial, a.numpy(), b.numpy()))
    found = kernel_distance(x, y, subsets=5, size=10, generator=torch.Generator().manual_seed(2))[0]
    assert found == pytest.approx(np.mean(expected), rel=1e-10)


def test_kid_subsets_larger_than_the_sets_are_refused():
    with pytest.raises(DataError, match=r"subsets of 1000 .* found 40 and 30.* size=30"):
        kernel_distance(normal(0, 40, 3), normal(1, 30, 3))
    with pytest.raises(ReparamError, match="size must be at least 4"):
        kernel_distance(normal(0, 40, 3), normal(1, 30, 3), size=3)
    with pytest.raises(ReparamError, match="subsets must be at least 1"):
        kernel_distance(normal(0, 40, 3), normal(1, 30, 3), size=9, subsets=0)


def test_mmd2_settings_that_mean_nothing_are_refused():
    x = normal(0, 9, 3)
    with pytest.raises(UnknownName, match="gaussian"):
        mmd2(x, x, "gausian")
    with pytest.raises(ReparamError, match="no bandwidth"):
        mmd2(x, x, "polynomial", 1.0)
    with pytest.raises(ReparamError, match="bandwidth must be positive"):
        mmd2(x, x, "gaussian", 0.0)
    with pytest.raises(ReparamError, match="chunk must be at least 1"):
        mmd2(x, x, chunk=0)


SCORES = {
    "mmd2": lambda x, y: mmd2(x, y),
    "kid": lambda x, y: kernel_distance(x, y, size=5),
    "neighbours": lambda x, y: precision_recall(x, y, 2),
    "infinity": lambda x, y: frechet_infinity(x, moments(y)),
    "blocks": lambda x, y: block_interval(lambda v: float(v.mean()), x, 3),
}


@pytest.mark.parametrize("name", SCORES)
def test_unusable_features_are_refused(name):
    good, score = normal(0, 12, 3), SCORES[name]
    score(good, normal(1, 12, 3))
    for bad, words in [
        (good[:, 0], r"expected shape \[n, "),
        (good[:1], "at least"),
        (good[:0], "at least"),
        ((good * 20).to(torch.uint8), "float dtype, found uint8"),
        (good.index_fill(0, torch.tensor([3]), math.nan), "NaN"),
        (good.index_fill(0, torch.tensor([3]), math.inf), "NaN"),
    ]:
        if name == "neighbours" and words == "at least":
            words = "at least|more than 2 samples"
        with pytest.raises(DataError, match=words):
            score(bad, normal(1, 12, 3))
    if name != "blocks":
        with pytest.raises(DataError, match=r"\[n, \d\], found"):
            score(good, normal(1, 12, 4))


def looped_neighbours(real, fake, k):
    """As the papers write it, sample by sample."""

    def squared(a, b):
        return float(((a - b) ** 2).sum())

    def reach(x):
        return [sorted(squared(a, b) for j, b in enumerate(x) if j != i)[k - 1] for i, a in enumerate(x)]

    real, fake = real.double().numpy(), fake.double().numpy()
    around_real, around_fake = reach(real), reach(fake)
    held = [[squared(r, f) <= R for f in fake] for r, R in zip(real, around_real, strict=True)]
    recalled = [any(squared(r, f) <= R for f, R in zip(fake, around_fake, strict=True)) for r in real]
    return {
        "precision": np.any(held, axis=0).mean(),
        "recall": np.mean(recalled),
        "density": np.sum(held) / (k * len(fake)),
        "coverage": np.any(held, axis=1).mean(),
    }


def lattice(seed, n, d, high):
    return torch.randint(0, high, (n, d), generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [1, 8, 1024])
def test_neighbours_are_those_of_plain_loops(k, chunk):
    real, fake = normal(0, 30, 2), normal(1, 22, 2, 0.8)
    assert precision_recall(real, fake, k, chunk=chunk) == pytest.approx(looped_neighbours(real, fake, k))
    # Whole numbers tie, coincide, and are exact in the loop; far from the origin, too.
    real, fake = lattice(2, 30, 2, 4) + 2**20, lattice(3, 22, 2, 5) + 2**20
    assert precision_recall(real, fake, k, chunk=chunk) == pytest.approx(looped_neighbours(real, fake, k))
    assert precision_recall(real.flip(0), fake.flip(0), k, chunk=chunk) == precision_recall(real, fake, k)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_same_samples_twice(dtype):
    """Every neighbour is on the surface of a ball, which must hold whatever rounding does."""
    x = normal(4, 60, 33, 100.0).to(dtype)
    expected = {"precision": 1.0, "recall": 1.0, "density": 6 / 5, "coverage": 1.0}
    assert precision_recall(x, x[torch.randperm(60)], chunk=17) == (
        pytest.approx(expected) if dtype == torch.float64 else pytest.approx(looped_neighbours(x, x, 5))
    )


def test_constructed_neighbours():
    x, y = normal(5, 40, 3), normal(6, 40, 3)
    assert set(precision_recall(x, y + 1e3).values()) == {0.0}
    one = torch.ones(10, 3)
    assert precision_recall(one, one, 2) == {"precision": 1.0, "recall": 1.0, "density": 5.0, "coverage": 1.0}
    # Fakes on one of two real clusters: all are precise, and half of the real samples are found.
    clusters = torch.cat([x, y + 1e3])
    found = precision_recall(clusters, x, 3)
    assert (found["precision"], found["recall"], found["coverage"]) == (1.0, 0.5, 0.5)
    found = precision_recall(x, clusters, 3)
    assert (found["precision"], found["recall"], found["coverage"]) == (0.5, 1.0, 1.0)


def test_equal_distributions_have_the_density_and_coverage_expected():
    found = [precision_recall(normal(2 * s, 120, 4), normal(2 * s + 1, 120, 4), 2) for s in range(20)]
    assert np.mean([f["density"] for f in found]) == pytest.approx(1, abs=0.06)
    assert np.mean([f["coverage"] for f in found]) == pytest.approx(0.75, abs=0.03)


def test_too_few_neighbours_are_refused():
    with pytest.raises(DataError, match=r"fake: .* more than 5 samples, found 5; lower k"):
        precision_recall(normal(0, 6, 2), normal(1, 5, 2))
    with pytest.raises(DataError, match="real: "):
        precision_recall(normal(0, 5, 2), normal(1, 6, 2))
    with pytest.raises(ReparamError, match="k must be at least 1"):
        precision_recall(normal(0, 5, 2), normal(1, 6, 2), 0)


@pytest.mark.parametrize("score", [lambda x: mmd2(x, x, chunk=16), lambda x: precision_recall(x, x, 2, chunk=16)])
def test_memory_is_a_chunks(score):
    x = normal(0, 160, 3)
    with Largest() as largest:
        score(x)
    assert largest.numbers <= max(x.numel(), 4 * 16 * 16)


def gaussian_distance(d, shift, scale):
    return d * (shift**2 + (scale - 1) ** 2)


def standard(d):
    return Moments.of(10**6, torch.zeros(d), torch.eye(d) * (10**6 - 1))


def test_fd_infinity_is_nearer_the_truth_and_its_error_is_right():
    d, shift, scale = 8, 0.25, 1.2
    exact = gaussian_distance(d, shift, scale)
    values, errors, at_n = [], [], []
    for seed in range(80):
        value, error, points = frechet_infinity(
            normal(seed, 200, d, shift, scale), standard(d), sizes=(50, 80, 120, 200)
        )
        values.append(value)
        errors.append(error)
        at_n.append(points[-1][1])
    values, bias = np.array(values), np.mean(at_n) - exact
    assert bias > 6 * np.std(at_n) / 80**0.5
    assert abs(values.mean() - exact) < bias / 4
    assert np.square(values - exact).mean() < np.square(np.array(at_n) - exact).mean()
    assert 0.6 < np.sqrt(np.mean(np.square(errors))) / values.std() < 1.6


def test_fd_infinity_is_the_line_through_its_points():
    x, real = normal(1, 100, 3, 0.5), standard(3)
    value, error, points = frechet_infinity(x, real, sizes=[100, 25, 50], repeats=2)
    assert [n for n, _ in points] == [25, 50, 100]
    line = np.polyfit([1 / n for n, _ in points], [v for _, v in points], 1)
    assert value == pytest.approx(line[1], rel=1e-9)
    m = moments(x)
    assert points[-1][1] == pytest.approx(frechet_distance(m.mean, m.cov, real.mean, real.cov), rel=1e-9)
    assert error > 0
    orders = torch.Generator().manual_seed(0)
    first = [torch.randperm(100, generator=orders)[:25] for _ in range(2)]
    some = [moments(x[rows]) for rows in first]
    expected = np.mean([frechet_distance(s.mean, s.cov, real.mean, real.cov) for s in some])
    assert points[0][1] == pytest.approx(expected, rel=1e-9)
    assert frechet_infinity(x, real, sizes=[100, 25, 50], repeats=2) == (value, error, points)
    other = frechet_infinity(x, real, sizes=[100, 25, 50], generator=torch.Generator().manual_seed(7))
    assert other[0] != value


def test_fd_infinity_default_sizes_and_refusals():
    x, real = normal(2, 200, 30), standard(30)
    at = [n for n, _ in frechet_infinity(x, real)[2]]
    assert (at[0], at[-1], len(at)) == (100, 200, 10)
    at = [n for n, _ in frechet_infinity(normal(3, 200, 2), standard(2))[2]]
    assert (at[0], at[-1], len(at)) == (20, 200, 10)
    for few, sizes in ((x[:60], None), (x, [30, 200])):
        with pytest.raises(DataError, match="FD∞ of 30 features needs every size above 30, found 30"):
            frechet_infinity(few, real, sizes=sizes)
    for sizes in ([50], [50, 50], [1, 50]):
        with pytest.raises(ReparamError, match="at least two different"):
            frechet_infinity(x, real, sizes=sizes)
    with pytest.raises(DataError, match="201 samples asked for, found 200"):
        frechet_infinity(x, real, sizes=[50, 201])
    with pytest.raises(ReparamError, match="repeats=2"):
        frechet_infinity(x, real, sizes=[50, 100], repeats=1)
    with pytest.raises(ReparamError, match="repeats must be at least 1"):
        frechet_infinity(x, real, repeats=0)


def test_students_quantile_is_scipys():
    for degrees in (1, 2, 3, 4, 9, 50):
        for level in (0.5, 0.9, 0.95, 0.999):
            exact = scipy.stats.t.ppf((1 + level) / 2, degrees)
            assert student_quantile(level, degrees) == pytest.approx(exact, rel=1e-9)


def test_the_interval_of_a_mean_is_students():
    x = normal(3, 15, 2)
    low, high = block_interval(lambda v: float(v[:, 0].mean()), x, blocks=15, level=0.9)
    error = float(x[:, 0].std()) / 15**0.5
    assert (low, high) == pytest.approx(scipy.stats.t.interval(0.9, 14, float(x[:, 0].mean()), error), rel=1e-9)


def test_block_intervals_have_the_known_width_and_cover():
    """|x̄|² of N(μ, I) has the variance 4|μ|²/N + 2d/N²."""
    n, d, shift = 100, 3, 0.5
    exact = math.sqrt(4 * d * shift**2 / n + 2 * d / n**2)
    errors, held = [], 0
    for seed in range(150):
        low, high = block_interval(lambda v: float(v.mean(0).square().sum()), normal(seed, n, d, shift))
        errors.append((high - low) / 2 / student_quantile(0.95, 9))
        held += low <= d * shift**2 + d / n <= high  # its expectation at this n
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(exact, rel=0.1)
    assert 0.9 <= held / 150 <= 0.99


def test_blocks_do_not_mind_sorted_or_alternating_samples():
    plain = (normal(4, 200, 1) > 0).double()
    for x in (plain.sort(0).values, torch.tensor([[0.0], [1.0]]).repeat(100, 1)):
        low, high = block_interval(lambda v: float(v.mean()), x)
        assert 0.25 < (high - low) / (2 * student_quantile(0.95, 9) * 0.5 / 200**0.5) < 2


def test_block_settings_that_mean_nothing_are_refused():
    x = normal(5, 9, 2)
    with pytest.raises(ReparamError, match="blocks must be at least 2"):
        block_interval(lambda v: 0.0, x, 1)
    with pytest.raises(DataError, match="at least 10 samples, found 9"):
        block_interval(lambda v: 0.0, x)
    with pytest.raises(ReparamError, match=r"use 0\.95"):
        block_interval(lambda v: 0.0, x, 3, level=95)
    with pytest.raises(DataError, match="not finite"):
        block_interval(lambda v: math.nan, x, 3)
