"""The Fréchet distance against SciPy, closed forms, and covariances that are hardly of full rank; its moments."""

import numpy as np
import pytest
import scipy.linalg
import torch

import reparam as rp
from reparam.errors import DataError
from reparam.metrics import Moments, frechet


def orthogonal(d, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=g))[0]


def spread(d, power, seed):
    """A covariance with eigenvalues from 1 down to 10^power, in random directions."""
    root = orthogonal(d, seed) * torch.logspace(0, power / 2, d, dtype=torch.float64)
    return root @ root.T


def between(c1, c2):
    """The distance of two centred Gaussians."""
    zero = torch.zeros(len(c1), dtype=torch.float64)
    return rp.metrics.frechet_distance(zero, c1, zero, c2)


@pytest.fixture
def svds(monkeypatch):
    """The calls of svdvals, which the fast way does without."""
    calls, real = [], torch.linalg.svdvals

    def counted(a):
        calls.append(a.shape)
        return real(a)

    monkeypatch.setattr(torch.linalg, "svdvals", counted)
    return calls


@pytest.mark.parametrize("d", [1, 2, 300])
def test_regular_covariances_are_scipys_and_need_no_singular_values(d, svds):
    c1, c2 = spread(d, -4, 1), 1.3 * spread(d, -5, 2)
    root = np.atleast_2d(scipy.linalg.sqrtm((c1 @ c2).numpy()))
    theirs = float(c1.trace() + c2.trace()) - 2 * np.trace(root).real
    assert between(c1, c2) == pytest.approx(theirs, rel=1e-9)
    assert between(c2, c1) == pytest.approx(theirs, rel=1e-9)
    assert svds == []


@pytest.mark.parametrize("directions", [40, 60, 100])
@pytest.mark.parametrize("smallest", [1.0, 1e-4, 1e-6])
def test_the_square_root_by_scipy_in_the_factors_own_directions(directions, smallest):
    """C = F Fᵀ in 100 dimensions, of low or full rank, in five directions hardly any.

    sqrtm(C1 C2) may fail or lose half of the digits where the product is singular. F1ᵀ C2 F1 has the same
    eigenvalues but the zeros, and is symmetric: sqrtm is reliable there, to √ε for each of five directions.
    """
    g = torch.Generator().manual_seed(directions)
    f1, f2 = torch.randn(2, 100, directions, dtype=torch.float64, generator=g) / 10
    f1[:, :5] *= smallest
    f2[:, -5:] *= smallest
    c1, c2 = f1 @ f1.T, f2 @ f2.T
    trace = float(c1.trace() + c2.trace())
    exact = trace - 2 * np.trace(scipy.linalg.sqrtm((f1.T @ c2 @ f1).numpy())).real
    assert between(c1, c2) == pytest.approx(exact, abs=1e-8 * trace)
    assert between(c2, c1) == pytest.approx(exact, abs=1e-8 * trace)


@pytest.mark.parametrize(("n1", "n2"), [(50, 50), (50, 400), (400, 50), (20, 90), (90, 20), (1, 1), (1, 400)])
def test_fewer_samples_than_features(n1, n2):
    """The roots of rank-deficient covariances are known here without decomposing them."""
    g = torch.Generator().manual_seed(4)
    scales = torch.logspace(0, -1.5, 120, dtype=torch.float64)
    a1, a2 = (torch.randn(n, 120, dtype=torch.float64, generator=g).T * scales[:, None] / n**0.5 for n in (n1, n2))
    c1, c2 = a1 @ a1.T, a2 @ a2.T
    exact = float(c1.trace() + c2.trace() - 2 * torch.linalg.svdvals(a1.T @ a2).sum())
    assert between(c1, c2) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("power", [-6, -12])
@pytest.mark.parametrize("ascending", [False, True])
def test_commuting_covariances_up_to_condition_1e12(power, ascending):
    q = orthogonal(200, 3)
    d1 = torch.logspace(0, power, 200, dtype=torch.float64)
    d2 = d1 * (1 + 0.5 * torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))
    exact = float((d1.sqrt() - d2.sqrt()).square().sum())
    turned = [(q * d) @ q.T for d in (d1, d2)]
    along = [torch.diag(d.flip(0) if ascending else d) for d in (d1, d2)]
    assert between(*along) == pytest.approx(exact, rel=1e-7)
    assert between(*turned) == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("c", [spread(150, -3, 6), spread(150, -12, 7), torch.diag(torch.arange(3.0)).double()])
def test_identical_covariances_are_no_distance_apart(c, svds):
    assert between(c, c) < 1e-12 * float(c.trace())
    assert len(svds) == 1


def test_where_squares_are_too_coarse_singular_values_are_taken(monkeypatch, svds):
    """Half of the directions are 1e-11 small: their squared singular values drown in rounding."""
    d = torch.ones(200, dtype=torch.float64)
    d[100:] = 1e-11
    q1 = orthogonal(200, 8)
    q2 = torch.linalg.qr(q1 + 0.01 * orthogonal(200, 9))[0]
    c1, c2 = (q1 * d) @ q1.T, (q2 * d) @ q2.T
    between(c1, 100 * c1)
    assert svds == []  # the distance is large beside what squaring costs
    careful = between(c1, c2)
    assert len(svds) == 1
    monkeypatch.setattr(frechet, "_TOLERANCE", np.inf)
    hasty = between(c1, c2)
    assert len(svds) == 1
    error = 2 * float(frechet._by_squares(c1, *frechet._factor(c2))[1])
    assert error / 100 < abs(hasty - careful) < error


def test_directions_of_rounding_size_do_not_count():
    """70 of 120 variances are rounding beside the others; the other covariance has 1e-6 there."""
    a = orthogonal(120, 4)[:, :50] * torch.linspace(1, 2, 50, dtype=torch.float64)
    c, one = a @ a.T, torch.eye(120, dtype=torch.float64)
    values = torch.linspace(1, 2, 50, dtype=torch.float64).square()
    exact = float(((values + 1e-6).sqrt() - values.sqrt()).square().sum()) + 70e-6
    rough, other = c + 2e-14 * one, c + 1e-6 * one
    torch.linalg.cholesky(rough)  # succeeds all the same
    assert between(rough, other) == pytest.approx(exact, rel=1e-6)
    assert between(other, rough) == pytest.approx(exact, rel=1e-6)


def test_features_that_never_vary():
    c1, c2 = spread(60, -2, 1), spread(60, -3, 2)
    padded = [torch.zeros(64, 64, dtype=torch.float64) for _ in range(2)]
    for big, c in zip(padded, (c1, c2), strict=True):
        big[2:62, 2:62] = c
    assert between(*padded) == pytest.approx(between(c1, c2), rel=1e-9)


def test_congruent_fills_the_lower_triangle():
    lower, c = torch.linalg.cholesky(spread(50, -3, 1)), spread(50, -1, 2)
    expected = (lower.T @ c @ lower).tril()
    for block in (7, 25, 50, 64):
        torch.testing.assert_close(frechet._congruent(c, lower, block).tril(), expected, rtol=1e-12, atol=1e-15)


def test_a_variance_at_the_very_edge_of_rounding():
    """Cholesky refuses this covariance for its last pivot, and by rounding every eigenvalue passes."""
    g = torch.Generator().manual_seed(0)
    variances = 0.25 + 0.5 * torch.rand(300, dtype=torch.float64, generator=g)
    variances[0], variances[-1] = 1.0, 300 * torch.finfo(torch.float64).eps * (1 - 1e-5)
    zero, one = torch.zeros(300, dtype=torch.float64), torch.eye(300, dtype=torch.float64)
    samples = torch.randn(900, 300, dtype=torch.float64, generator=g)
    other = samples.T @ samples / 900
    for _ in range(20):
        turn = torch.linalg.qr(one + 1e-8 * torch.randn(300, 300, dtype=torch.float64, generator=g))[0]
        edge = (turn * variances) @ turn.T
        there = rp.metrics.frechet_distance(zero, edge, zero, other)
        assert rp.metrics.frechet_distance(zero, other, zero, edge) == pytest.approx(there, rel=1e-6)


# ------------------------------------------------------------------------------------------- moments


def features(n=3000, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g) + torch.arange(float(d))


def counted(x, size=10**6):
    """The moments of x, counted in batches of a size."""
    m = Moments(x.shape[1])
    for part in x.split(size):
        m.update(part)
    return m


def assert_moments(found, x, tolerance=1e-12):
    """Against NumPy in float64, in proportion to the norms."""
    x = x.double().numpy()
    scatter = (len(x) - 1) * np.atleast_2d(np.cov(x, rowvar=False))
    assert found.count == len(x)
    assert np.linalg.norm(found.mean.numpy() - x.mean(0)) <= tolerance * np.linalg.norm(x.mean(0))
    assert np.linalg.norm(found.scatter.numpy() - scatter) <= tolerance * np.linalg.norm(scatter)


@pytest.mark.parametrize("size", [1, 7, 256, 1000, 1024, 1025, 2999])
def test_the_batch_size_changes_no_bit(size):
    whole, parts = counted(features()), counted(features(), size)
    assert torch.equal(whole.mean, parts.mean)
    assert torch.equal(whole.scatter, parts.scatter)
    assert_moments(parts, features())


@pytest.mark.parametrize("d", [1, 300, 1100])
def test_moments_are_numpys_where_rows_are_few_and_many(d):
    assert_moments(counted(features(200, d), 64), features(200, d))
    assert_moments(counted(features(2500, d), 700), features(2500, d))


@pytest.mark.parametrize("lengths", [[3000], [1, 2999], [0, 1500, 1500], [1024, 1024, 952], [10] * 300])
@pytest.mark.parametrize("seed", [1, 2])
def test_parts_merge_in_any_order(lengths, seed):
    x = features()
    shuffled = x[torch.randperm(3000, generator=torch.Generator().manual_seed(seed))]
    whole = Moments(6)
    for part in shuffled.split(lengths):
        whole.merge(counted(part, 37))
    assert_moments(whole, x)


def test_looking_in_between_changes_nothing():
    m = Moments(6)
    for part in features().split(500):
        m.update(part)
        _ = m.mean, m.scatter, m.cov
    assert_moments(m, features())


@pytest.mark.parametrize("offset", [1e6, -3e6])
def test_a_large_common_offset_costs_no_accuracy(offset):
    """Of multiples of 2⁻²⁰, the offset is added without rounding: the covariance must not change."""
    x = (features().double() * 2**20).round() / 2**20
    plain, away = counted(x), counted(x + offset, 100)
    assert (plain.scatter - away.scatter).norm() <= 1e-11 * plain.scatter.norm()
    parts = counted(x[:1700] + offset)
    parts.merge(counted(x[1700:] + offset))
    assert (plain.scatter - parts.scatter).norm() <= 1e-11 * plain.scatter.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_and_layout_is_copied(dtype):
    x = features(100).to(dtype).T.contiguous().T.requires_grad_()
    m = counted(x)
    kept = x.detach().clone()
    with torch.no_grad():
        x.zero_()  # what was counted in is not looked at again
    assert_moments(m, kept)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_batch_that_is_not_finite_is_refused_as_a_whole(bad):
    m = counted(features(1500))
    x = features(2000, seed=1)
    x[-1, 3] = bad
    with pytest.raises(DataError, match="NaN or infinity"):
        m.update(x)
    assert_moments(m, features(1500))


def test_one_sample_has_a_mean_and_no_covariance():
    m = counted(features(1))
    torch.testing.assert_close(m.mean, features(1)[0].double(), rtol=0, atol=0)
    with pytest.raises(DataError, match="at least two samples, found 1"):
        _ = m.cov


def test_moments_known_already_are_not_written_to():
    first = counted(features(50))
    scatter, mean = first.scatter.clone(), first.mean.clone()
    again = Moments.of(50, first.mean, first.scatter)
    again.update(features(60, seed=1))
    again.merge(first)
    assert torch.equal(first.scatter, scatter)
    assert torch.equal(first.mean, mean)
    assert_moments(again, torch.cat([features(50), features(60, seed=1), features(50)]))


@pytest.mark.parametrize("blocks", [2, 10, 300])
def test_without_a_block_is_the_moments_of_the_others(blocks):
    parts = features().tensor_split(blocks)
    whole = counted(features())
    for i in range(0, blocks, max(1, blocks // 10)):
        rest = torch.cat([part for j, part in enumerate(parts) if j != i])
        assert_moments(whole.without(counted(parts[i])), rest, 1e-10)
    assert_moments(whole, features())


def test_without_none_and_without_all():
    whole = counted(features(40))
    assert_moments(whole.without(Moments(6)), features(40))
    nothing = whole.without(counted(features(40)))
    assert nothing.count == 0
    nothing.update(features(30, seed=1))
    assert_moments(nothing, features(30, seed=1))
    remains = whole.without(counted(features(40)[:39]))
    assert remains.count == 1
    torch.testing.assert_close(remains.mean, features(40)[39].double(), rtol=1e-12, atol=1e-12)


def test_without_what_cannot_have_been_counted_in():
    with pytest.raises(DataError, match="cannot take 50 samples from 40"):
        counted(features(40)).without(counted(features(50)))
    with pytest.raises(DataError, match="of 6 features, found moments of 5"):
        counted(features(40)).without(Moments(5))
    with pytest.raises(DataError, match="of 6 features, found moments of 5"):
        counted(features(40)).merge(Moments(5))
