"""The Fréchet distance against SciPy, closed forms, and covariances that are hardly of full rank."""

import numpy as np
import pytest
import scipy.linalg
import torch

import reparam as rp
from reparam.metrics import frechet


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
