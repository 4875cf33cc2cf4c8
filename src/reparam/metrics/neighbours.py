"""Fidelity and diversity from nearest neighbours: precision, recall, density and coverage."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError
from .blocks import checked, positive

_EPS = torch.finfo(torch.float64).eps
_NUMBERS = 2**22  # in a batch of distances computed from differences


def precision_recall(real: Tensor, fake: Tensor, k: int = 5, *, chunk: int = 1024) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Around each sample lies a closed ball that reaches to its k-th nearest neighbour in its own set, not
    counting itself. With N real and M fake samples,

    - precision: the share of fakes in the ball of any real sample, in [0, 1];
    - recall: the share of real samples in the ball of any fake, in [0, 1];
    - density: the number of pairs of a fake in a real sample's ball, over k M, in [0, N/k]; for equal
      distributions and N = M it is 1 on average; the same samples twice give (k + 1)/k;
    - coverage: the share of real samples whose ball holds any fake, in [0, 1]; for equal distributions and N = M
      about 1 − 2^−k (Naeem et al. 2020).

    All of them depend on N, M, k and the features; precision and recall are moved by outliers, whose balls
    are large. Compare only values at the same N, M and k.

    In float64. A distance that rounding leaves in doubt, duplicates and ties above all, is computed again
    from the difference, so that a sample on a ball's surface is in it. Time O((N + M)² d), memory
    O(chunk² + chunk · d) beside the features; neither order nor chunk matters.

    Args:
        real: shape [N, d], any float dtype. fake: shape [M, d].
        k: the neighbour that balls reach to, at least 1 and below N and M.

    Returns:
        ``{"precision": …, "recall": …, "density": …, "coverage": …}``.

    Raises:
        ReparamError: if k or chunk is below 1.
        DataError: if shapes or values are unusable, or a side has k samples or fewer.
    """
    positive("k", k)
    positive("chunk", chunk)
    real = checked(real, "real", 1)
    fake = checked(fake, "fake", 1, real.shape[1])
    _refuse_few(k, real=real, fake=fake)
    origin = real[:chunk].double().mean(0)  # far from the origin distances would be rounded
    reach_real, reach_fake = (_reach(x, k, origin, chunk) for x in (real, fake))
    precise, recalled, covered = (torch.zeros(len(x), dtype=torch.bool) for x in (fake, real, real))
    inside = 0
    for i in range(0, len(real), chunk):
        rows = slice(i, i + chunk)
        a = real[rows].double()
        for j in range(0, len(fake), chunk):
            columns = slice(j, j + chunk)
            b = fake[columns].double()
            near, doubt = _squared_distances(a, b, origin)
            held = _held(near, doubt, reach_real[rows, None], a, b)
            precise[columns] |= held.any(0)
            covered[rows] |= held.any(1)
            inside += int(held.sum())
            recalled[rows] |= _held(near, doubt, reach_fake[columns], a, b).any(1)
    return {
        "precision": float(precise.double().mean()),
        "recall": float(recalled.double().mean()),
        "density": inside / (k * len(fake)),
        "coverage": float(covered.double().mean()),
    }


def _refuse_few(k: int, **sides: Tensor) -> None:
    for name, x in sides.items():
        if len(x) <= k:
            raise DataError(
                f"{name}: the {k}th nearest neighbour needs more than {k} samples, found {len(x)}; lower k."
            )


def _reach(x: Tensor, k: int, origin: Tensor, chunk: int) -> Tensor:
    """The squared distance from every row to its k-th nearest other one, float64 [n]."""
    found = []
    for i in range(0, len(x), chunk):
        a = x[i : i + chunk].double()
        best = torch.full((len(a), k), torch.inf, dtype=torch.float64)
        index = torch.zeros(len(a), k, dtype=torch.int64)
        for j in range(0, len(x), chunk):
            near = _squared_distances(a, x[j : j + chunk].double(), origin)[0]
            if i == j:
                near.fill_diagonal_(torch.inf)
            place = torch.arange(j, j + near.shape[1]).expand(len(a), -1)
            near, place = torch.cat([best, near], 1), torch.cat([index, place], 1)
            best, kept = near.topk(k, dim=1, largest=False)
            index = place.gather(1, kept)
        exact = [_from_differences(a, x[index[:, c]].double()) for c in range(k)]
        found.append(torch.stack(exact).amax(0))
    return torch.cat(found)


def _squared_distances(a: Tensor, b: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """|a_i − b_j|², float64 [n, m], by |a|² − 2ab + |b|², and how far off rounding may have put it."""
    a, b = a - origin, b - origin
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    return norms - 2 * (a @ b.T), norms.mul(2 * _EPS * (a.shape[1] + 4))


def _held(near: Tensor, doubt: Tensor, reach: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Whether squared distances are at most ``reach``, those in doubt being computed again."""
    held = near <= reach
    unsure = ((near - reach).abs() <= doubt).nonzero()
    reach = reach.expand_as(near)
    for pairs in unsure.split(max(1, _NUMBERS // a.shape[1])):
        i, j = pairs.unbind(1)
        held[i, j] = _from_differences(a[i], b[j]) <= reach[i, j]
    return held


def _from_differences(a: Tensor, b: Tensor) -> Tensor:
    """|a_i − b_i|² for rows of the same shape."""
    return (a - b).square_().sum(1)
