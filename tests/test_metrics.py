import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

import reparam as rp
from reparam.data import Curve, load_data
from reparam.errors import DataError
from reparam.metrics import METRICS, Reference, SampleSet, Scoring, nearest
from reparam.metrics.vectors import sliced_wasserstein, wasserstein_1d


def covariance(d, rank, seed):
    a = torch.randn(d, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / rank


@pytest.mark.parametrize(("rank1", "rank2"), [(40, 40), (40, 12), (12, 30), (1, 1)])
def test_frechet_distance_is_scipys(rank1, rank2):
    c1, c2 = covariance(40, rank1, 1), covariance(40, rank2, 2)
    m1, m2 = torch.randn(2, 40, dtype=torch.float64)
    # SciPy's root needs regular matrices; a shift that small moves the distance by less than the tolerance.
    e = 1e-13 * torch.eye(40, dtype=torch.float64)
    root = scipy.linalg.sqrtm(((c1 + e) @ (c2 + e)).numpy())
    theirs = float((m1 - m2).square().sum() + c1.trace() + c2.trace()) - 2 * np.trace(root).real
    assert rp.metrics.frechet_distance(m1, c1, m2, c2) == pytest.approx(theirs, abs=2e-5 * float(c1.trace()))


def test_frechet_distance_closed_forms():
    d1, d2 = torch.rand(2, 30, dtype=torch.float64)
    m = torch.randn(30, dtype=torch.float64)
    zero = torch.zeros_like(m)
    exact = float(m.square().sum() + (d1.sqrt() - d2.sqrt()).square().sum())
    assert rp.metrics.frechet_distance(m, torch.diag(d1), zero, torch.diag(d2)) == pytest.approx(exact, rel=1e-12)
    c = covariance(30, 7, 3)
    assert rp.metrics.frechet_distance(m, c, m, c) < 1e-10
    assert rp.metrics.frechet_distance(m, torch.zeros_like(c), zero, c) == pytest.approx(
        float(m.square().sum() + c.trace())
    )


def test_moments_stream_and_merge_exactly():
    x = 1e4 + torch.randn(1000, 5, generator=torch.Generator().manual_seed(0))
    whole = rp.metrics.Moments(5)
    whole.update(x)
    parts = [rp.metrics.Moments(5) for _ in range(3)]
    for part, rows in zip(parts, x.split([1, 599, 400]), strict=True):
        for chunk in rows.split(37):
            part.update(chunk)
    parts[2].merge(parts[0])
    parts[2].merge(parts[1])
    assert parts[2].count == 1000
    torch.testing.assert_close(parts[2].mean, x.double().mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(parts[2].cov, torch.cov(x.double().T), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(whole.cov, parts[2].cov, rtol=1e-9, atol=1e-12)


def test_bad_features_are_refused():
    m = rp.metrics.Moments(3)
    with pytest.raises(DataError, match=r"shape \[n, 3\], found \[2, 4\]"):
        m.update(torch.zeros(2, 4))
    with pytest.raises(DataError, match="NaN"):
        m.update(torch.tensor([[0.0, 1.0, float("nan")]]))
    m.update(torch.zeros(1, 3))
    with pytest.raises(DataError, match="at least two samples, found 1"):
        _ = m.cov
    with pytest.raises(DataError, match=r"means \[d\] and covariances \[d, d\]"):
        rp.metrics.frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(3), torch.eye(4))


@pytest.mark.parametrize("sizes", [(300, 300), (300, 170)])
def test_wasserstein_is_scipys(sizes):
    a, b = torch.randn(sizes[0], 3).double(), torch.rand(sizes[1], 3).double()
    ours = wasserstein_1d(a, b)
    for i in range(3):
        assert ours[i].item() == pytest.approx(scipy.stats.wasserstein_distance(a[:, i], b[:, i]), rel=1e-10)


def test_sliced_wasserstein_of_a_shift():
    x = torch.randn(500, 2).double()
    shift = torch.tensor([3.0, 4.0]).double()
    # Over all directions |cos| averages to 2/π.
    assert sliced_wasserstein(x, x + shift) == pytest.approx(5 * 2 / np.pi, rel=1e-3)
    y = torch.randn(400, 9)
    assert sliced_wasserstein(y, y) == 0
    assert sliced_wasserstein(y, y + 1) == sliced_wasserstein(y, y + 1)


def test_nearest_distance_is_exact_for_tiny_distances():
    x = torch.randn(50, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e3
    assert bool((nearest(x, x)[0] == 0).all())
    moved = x + 1e-9 * 1e3
    distance, index = nearest(moved, x)
    torch.testing.assert_close(distance[:, 0], torch.full((50,), 1e-6 * 20**0.5).double(), rtol=1e-4, atol=0)
    assert torch.equal(index[:, 0], torch.arange(50))


@pytest.mark.parametrize("chunk", [7, 64, 4096])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_nearest_is_what_comparing_all_gives(chunk, k):
    generator = torch.Generator().manual_seed(1)
    x, others = torch.randn(30, 2, 3, generator=generator), torch.randn(37, 2, 3, generator=generator)
    distance, index = nearest(x, others, k, chunk=chunk)
    every = torch.cdist(x.flatten(1).double(), others.flatten(1).double())
    values, places = every.sort(dim=1)
    torch.testing.assert_close(distance, values[:, :k], rtol=1e-9, atol=1e-9)
    assert torch.equal(index, places[:, :k])
    assert index.shape == (30, min(k, 37))


@pytest.mark.parametrize("name", ["spiral", "swissroll"])
@pytest.mark.parametrize("dim", [2, 5, 512])
def test_curves_and_their_distances(name, dim):
    curve = Curve.make(name, dim, seed=3)
    torch.testing.assert_close(curve.basis.T @ curve.basis, torch.eye(2).double(), rtol=0, atol=1e-13)
    x = curve.draw(2000, [1])
    assert x.shape == (2000, dim)
    assert curve.off_plane(x).max() < 1e-6
    assert curve.off_curve(x).max() < 1e-6
    assert 0.5 < float(curve.plane(x).std()) < 2
    if dim > 2:
        away = torch.randn(2000, dim).double()
        away = away - curve.embed(curve.plane(away))
        away = 0.7 * away / away.norm(dim=1, keepdim=True)
        torch.testing.assert_close(curve.off_plane(x + away), torch.full((2000,), 0.7).double(), rtol=1e-5, atol=0)
        assert curve.off_curve(x + away).max() < 1e-5
    # The centre of the plane has a known distance to the start of the curve, its innermost point.
    start = curve.points[0].norm()
    assert curve.off_curve(torch.zeros(1, dim)).item() == pytest.approx(float(start), abs=1e-4)


def test_every_metric_is_near_its_floor_on_real_data_and_far_off_it():
    for config in ({"name": "spiral", "dim": 6, "size": 4000}, {"name": "digits"}):
        data = load_data(config)
        real = Reference(data)
        fresh = data.fresh(400)
        noise = torch.randn(fresh.shape) * 3
        ours, theirs = (Scoring(SampleSet.held(x), real) for x in (fresh, noise))
        for name, metric in METRICS.items():
            if metric.applies(data, False):
                at, off = metric.compute(ours), metric.compute(theirs)
                if metric.better == "lower":
                    assert off.value > 3 * at.value, name
                else:
                    assert at.value > 0.8, name
                    assert metric.compute(theirs).value < 0.2 or name == "recall", name
                if at.interval is not None:
                    assert at.interval[0] <= at.value <= at.interval[1], name
    assert {n for n, m in METRICS.items() if m.applies(data, False) and m.usual} == {
        "sliced_wasserstein",
        "frechet_distance",
        "nearest_neighbour",
    }
