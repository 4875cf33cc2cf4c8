"""Scores of features, and FID's way of resizing, against clean-fid, torch-fidelity and torchmetrics.

Theirs read pictures and load networks with torchvision, and clean-fid and torch-fidelity import that beside
their mathematics; the modules that do are replaced by empty ones, so that what is compared loads without it.
clean-fid asks SciPy's sqrtm for disp=False, which SciPy 1.18 took away: make peers installs an older one.
"""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from peers.side_by_side import submodules
from reparam.metrics import frechet_distance, kernel_distance, mmd2
from reparam.metrics.extractors.resizing import resized_as_floats


class _Empty(ModuleType):
    """A module of which any name may be imported, and none works."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)


def _without(package, names, empty):
    """Submodules of a package, with others of it empty while they load."""
    replaced = {f"{package}.{name}": _Empty(f"{package}.{name}") for name in empty}
    sys.modules.update(replaced)
    try:
        return submodules(package, names)
    finally:
        for name in replaced:
            del sys.modules[name]


clean_fid, clean_resize = _without("cleanfid", ["fid", "resize"], ["utils", "features"])
fidelity_fid, fidelity_kid = _without("torch_fidelity", ["metric_fid", "metric_kid"], ["utils"])
torchmetrics_fid = pytest.importorskip("torchmetrics.image.fid")
torchmetrics_kid = pytest.importorskip("torchmetrics.image.kid")

EPS = np.finfo(np.float64).eps


def features(n, d, seed, rank=None):
    """Correlated features [n, d], float64, in a space of ``rank`` directions."""
    g = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -1, rank or d, dtype=torch.float64)
    mix = torch.randn(rank or d, d, dtype=torch.float64, generator=g) * scales[:, None]
    return torch.randn(n, rank or d, dtype=torch.float64, generator=g) @ mix + 0.1 * seed


def by_clean_fid(m1, c1, m2, c2):
    return float(clean_fid.frechet_distance(*(v.numpy() for v in (m1, c1, m2, c2))))


def by_torch_fidelity(m1, c1, m2, c2):
    first, second = ({"mu": m.numpy(), "sigma": c.numpy()} for m, c in ((m1, c1), (m2, c2)))
    return fidelity_fid.fid_statistics_to_metric(first, second, False)[fidelity_fid.KEY_METRIC_FID]


def by_torchmetrics(*moments):
    return float(torchmetrics_fid._compute_fid(*moments))


DISTANCES = [by_clean_fid, by_torch_fidelity, by_torchmetrics]


def given(n, d, rank=None):
    """Means and covariances of two sets of features."""
    x, y = features(n, d, 1, rank), features(n, d, 2, rank)
    return x.mean(0), x.T.cov(), y.mean(0), y.T.cov()


@pytest.mark.parametrize("theirs", DISTANCES)
@pytest.mark.parametrize(("n", "d"), [(500, 2), (500, 10), (2000, 200)])
def test_frechet_distance(theirs, n, d):
    moments = given(n, d)
    assert frechet_distance(*moments) == pytest.approx(theirs(*moments), rel=1e-9)


@pytest.mark.parametrize("theirs", DISTANCES)
@pytest.mark.parametrize(("n", "d", "rank"), [(50, 100, None), (2000, 100, 30)])
def test_frechet_distance_of_low_rank(theirs, n, d, rank):
    """Of C1 C2 the eigenvalues that are 0 come out about ε of the largest, and theirs takes their roots: √ε of it
    for each. Ours is held to exact values in tests/test_frechet.py."""
    moments = given(n, d, rank)
    largest = float(torch.linalg.matrix_norm(moments[1] @ moments[3], 2))
    assert frechet_distance(*moments) == pytest.approx(theirs(*moments), abs=2 * d * (EPS * largest) ** 0.5)


def test_kid_where_the_subset_is_all():
    x, y = features(200, 64, 1), features(200, 64, 2)
    ours = kernel_distance(x, y, subsets=1, size=200)[0]
    assert ours == pytest.approx(clean_fid.kernel_distance(x.numpy(), y.numpy(), 1, 200), rel=1e-9)
    assert ours == pytest.approx(float(torchmetrics_kid.poly_mmd(x, y)), rel=1e-9)
    found = fidelity_kid.kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=200, verbose=False)
    assert ours == pytest.approx(found[fidelity_kid.KEY_METRIC_KID_MEAN], rel=1e-9)


def test_kid_on_the_subsets_that_torch_fidelity_draws():
    x, y = features(150, 64, 1), features(90, 64, 2)
    found = fidelity_kid.kid_features_to_metric(x, y, kid_subsets=7, kid_subset_size=40, rng_seed=3, verbose=False)
    draw = np.random.RandomState(3)
    drawn = [[v[draw.choice(len(v), 40, replace=False)] for v in (x, y)] for _ in range(7)]
    values = [mmd2(a, b).value for a, b in drawn]
    assert np.mean(values) == pytest.approx(found[fidelity_kid.KEY_METRIC_KID_MEAN], rel=1e-9)
    assert np.std(values) == pytest.approx(found[fidelity_kid.KEY_METRIC_KID_STD], rel=1e-7)


@pytest.mark.parametrize(("high", "wide"), [(32, 32), (64, 48), (299, 299), (400, 513)])
def test_pictures_are_resized_as_clean_fid_does_to_the_last_bit(high, wide):
    pictures = torch.randint(0, 256, (3, 3, high, wide), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    pictures[0] = 255 * (pictures[0] > 127)  # edges overshoot, and are clipped
    resize = clean_resize.build_resizer("clean")
    theirs = np.stack([resize(picture.permute(1, 2, 0).numpy()) for picture in pictures])
    ours = resized_as_floats(pictures, 299)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, torch.from_numpy(theirs).permute(0, 3, 1, 2))
