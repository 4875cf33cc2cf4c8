"""What the comparisons share: Gaussian data, a grid's states, and submodules of packages that ask for torchvision."""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch

import reparam as rp
from oracles import GaussianOracle

MEAN = torch.tensor([0.7, -1.1, 0.3], dtype=torch.float64)
_A = torch.tensor([[1.0, 0.2, 0.0], [0.3, 0.5, 0.1], [0.0, -0.2, 0.3]], dtype=torch.float64)
COV = _A @ _A.T


def noise(n=16):
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(prediction, schedule, **conventions):
    net = GaussianOracle(MEAN, COV, schedule, rp.target(prediction))
    return net, rp.Denoiser(net, schedule, prediction, **conventions)


def ours(denoiser, start, sampler, times, **options):
    return rp.sample(denoiser, start=start, sampler=sampler, times=times, trajectory=True, **options).states


def draws(like, steps, seed=5):
    """The noise that torch.randn_like gives ``steps`` times after manual_seed(seed)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.stack([torch.randn_like(like) for _ in range(steps)])


def seeded(run, seed=5):
    """run(), with the global generator seeded and then put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return run()


def measured_order(counts, errors):
    """The slope of log error against log step size, by regression."""
    u, v = -torch.tensor(counts).double().log(), torch.tensor(errors).double().log()
    return float(((u - u.mean()) * (v - v.mean())).sum() / ((u - u.mean()) ** 2).sum())


def submodules(package, names, without=()):
    """Submodules of a package whose own __init__, and imports named in ``without``, are left out.

    The mathematics of some packages lies beside code for pictures that imports torchvision, CLIP and
    more, none of which it uses. Skips the calling test module if the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed; make peers installs it", allow_module_level=True)
    left_out = [name for name in without if importlib.util.find_spec(name.split(".")[0]) is None]
    sys.modules[package] = importlib.util.module_from_spec(spec)  # found, but not run
    sys.modules.update({name: ModuleType(name) for name in left_out})
    for name in left_out:
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    try:
        return [importlib.import_module(f"{package}.{name}") for name in names]
    finally:
        for name in left_out:
            del sys.modules[name]
