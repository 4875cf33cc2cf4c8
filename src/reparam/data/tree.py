"""The tree: a mixture of Gaussians along the branches of a random binary tree in the plane.

The toy data of Karras et al. (arXiv 2406.02507): two classes, one tree each, small enough to train on in
minutes, with fine detail and empty space between the branches; and all about it is known exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from ..errors import unknown
from .mixtures import Mixture

#: The angle at which the trunk of each class grows; the classes are drawn in this order, from one generator.
_TRUNKS = {"a": math.pi / 4, "b": 5 * math.pi / 4}
#: Which components a name stands for.
TREES = {"a": ("a",), "b": ("b",), "both": ("a", "b")}
_ORIGIN, _SCALE = np.array([0.0030, 0.0325]), np.array([1.3136, 1.3844])
_SEED, _DEPTH, _ALONG = 2, 6, 8

#: Of a Gaussian: weight, mean [2] and covariance [2, 2].
_Component = tuple[float, np.ndarray, np.ndarray]


def tree(which: str = "a") -> Mixture:
    """The mixture of class "a", of class "b", or of both together: 1,016 Gaussians a class.

    Raises:
        UnknownName: if there is no such class.
    """
    if which not in TREES:
        raise unknown("tree", which, TREES)
    rng = np.random.RandomState(_SEED)
    classes = {name: list(_branch(rng, _ORIGIN, angle, 0)) for name, angle in _TRUNKS.items()}
    weights, means, covs = zip(*(c for name in TREES[which] for c in classes[name]), strict=True)
    return Mixture(*(torch.from_numpy(np.array(v)) for v in (weights, means, covs)))


def _branch(rng: np.random.RandomState, start: np.ndarray, angle: float, depth: int) -> Iterator[_Component]:
    """A branch and all that grows on it; the order of the draws from ``rng`` is part of the definition."""
    distance = 0.292 * 0.8**depth * (1 + 0.2 * rng.randn())
    direction = np.array([math.cos(angle), math.sin(angle)])
    yield from _along(start, direction, distance, depth)
    for side in (1, -1):
        turned = angle + side * 0.7**depth * (1 + 0.2 * rng.randn())  # drawn at the tips too, where nothing grows
        if depth < _DEPTH:
            yield from _branch(rng, start + direction * distance, turned, depth + 1)


def _along(start: np.ndarray, direction: np.ndarray, distance: float, depth: int) -> Iterator[_Component]:
    """The components along one branch, alike but for their means."""
    thickness = 0.2 * 0.8**depth / distance
    size = _SCALE * distance * 0.06
    lengthwise = np.outer(direction, direction)
    cov = (lengthwise + (np.eye(2) - lengthwise) * thickness**2) * np.outer(size, size)
    for s in np.linspace(0.07, 0.93, _ALONG):
        yield distance * 0.5**depth, (start + direction * distance * s) * _SCALE, cov
