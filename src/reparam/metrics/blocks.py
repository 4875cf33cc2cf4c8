"""An interval for a score of samples, from leaving blocks of them out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import DataError, ReparamError

_ROWS = 4096  # of features converted to float64 at a time


def block_interval(
    score: Callable[[Tensor], float], features: Tensor, blocks: int = 10, *, level: float = 0.95
) -> tuple[float, float]:
    """A confidence interval for a score of features, by the delete-one-block jackknife.

    The rows are dealt to B blocks at random (the same way in every call, so that samples sorted by
    class, or with classes in turn, do no harm) and the score is computed B times without one
    block. With θ of all rows, θ_b without block b and θ̄ the mean of the θ_b, the interval is
    θ ± t · √((B − 1)/B Σ_b (θ_b − θ̄)²), t being Student's quantile with B − 1 degrees of freedom
    (Shao & Wu 1989; Efron & Stein 1981 show that such a variance is on average too large, if anything).

    It covers what other samples of the same number would score, given the same real data: the bias
    that a score has at this number of samples stays in it. The rows must be independent, and the
    score smooth in them; a median or a nearest neighbour's distance is not smooth.

    Args:
        score: from features [n, d] to a number. It is called with n = N and B times with about N (B − 1)/B.
        features: shape [N, d], any float dtype; N at least ``blocks``.
        blocks: B, at least 2.
        level: how often the interval is to hold the value, in (0, 1).

    Returns:
        The lower and the upper end.

    Raises:
        ReparamError: if ``blocks`` or ``level`` is out of its range.
        DataError: if there are fewer rows than blocks, or a feature or a score is not finite.
    """
    if blocks < 2:
        raise ReparamError(f"blocks must be at least 2, found {blocks}.")
    if not 0 < level < 1:
        raise ReparamError(f"level must lie between 0 and 1, found {level}; use 0.95 for 95 per cent.")
    x = checked(features, "features", blocks)
    block = torch.empty(len(x), dtype=torch.int64)
    block[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))] = torch.arange(len(x)) % blocks
    whole = float(score(x))
    without = torch.tensor([float(score(x[block != b])) for b in range(blocks)], dtype=torch.float64)
    if not math.isfinite(whole) or not bool(without.isfinite().all()):
        raise DataError(f"the score is {whole:g} of all features and {without.tolist()} without a block; not finite.")
    return jackknife_interval(whole, without, level)


def jackknife_interval(whole: float, without: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The interval of :func:`block_interval`, from the score of all rows and those without each block, float64 [B]."""
    blocks = len(without)
    error = float(((blocks - 1) * without.var(correction=0)).sqrt())
    margin = student_quantile(level, blocks - 1) * error
    return whole - margin, whole + margin


def student_quantile(level: float, degrees: int) -> float:
    """The t with P(|T| ≤ t) = ``level`` for Student's T with ``degrees`` ≥ 1 degrees of freedom.

    With t = √degrees · tan θ that probability is a finite sum in sin θ and cos θ (Abramowitz &
    Stegun 26.7.3 and 26.7.4), which is inverted by bisection.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _within(middle, degrees) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _within(angle: float, degrees: int) -> float:
    """P(|T| ≤ √degrees · tan ``angle``)."""
    odd = degrees % 2
    cos, sin = math.cos(angle), math.sin(angle)
    term = total = cos if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    if not odd:
        return sin * total
    return 2 / math.pi * (angle + (sin * total if degrees > 1 else 0.0))


def checked(features: Tensor, name: str, least: int, dim: int | None = None) -> Tensor:
    """``features`` detached and on the CPU, neither copied nor converted there.

    Raises:
        DataError: if they are not of a float dtype and a shape [n, dim] with n ≥ ``least``, or not finite.
    """
    if features.ndim != 2 or features.shape[1] == 0 or dim not in (None, features.shape[1]):
        raise DataError(f"{name}: expected shape [n, {'d' if dim is None else dim}], found {list(features.shape)}.")
    if not features.is_floating_point():
        kind = str(features.dtype).removeprefix("torch.")
        raise DataError(f"{name}: expected a float dtype, found {kind}; give features, not pictures.")
    if len(features) < least:
        raise DataError(f"{name}: expected at least {least} samples, found {len(features)}.")
    x = features.detach().to("cpu")
    if not all(bool(part.isfinite().all()) for part in x.split(_ROWS)):
        raise DataError(f"{name}: some features are NaN or infinite; a score of them would mean nothing.")
    return x


def positive(name: str, value: int) -> None:
    """Refuse a number that is not at least 1.

    Raises:
        ReparamError: naming the argument.
    """
    if value < 1:
        raise ReparamError(f"{name} must be at least 1, found {value}.")
