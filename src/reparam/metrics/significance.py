"""Whether scores differ by more than chance: intervals of means and of differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

#: Values closer than this, as a share of the larger, differ by rounding alone.
_ROUNDING = 1e-12
#: Degrees of freedom of a run's own interval: those of ten blocks, the fewest in use.
_DEGREES = 9


@dataclass(frozen=True)
class Difference:
    """The difference of two scores, and its interval.

    Attributes:
        value: the first score less the second. low, high: the ends of the interval.
        source: what the interval is of: "3 seeds, paired" or "samples".
        level: how often such an interval holds the true difference.
    """

    value: float
    low: float
    high: float
    source: str
    level: float = 0.95

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's interval for the mean that ``values`` were drawn around.

    With mean m and standard deviation s (n − 1 in the denominator) of n values it is
    m ± t s/√n, t being Student's quantile with n − 1 degrees of freedom. Of values that are all
    alike it is that value: such data do not tell how unlike others would be.

    Args:
        values: independent, finite. level: how often the interval is to hold the mean, in (0, 1).

    Returns:
        The lower and the upper end; None for fewer than 2 values.
    """
    from .blocks import student_quantile  # imports torch

    if len(values) < 2:
        return None
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    margin = student_quantile(level, len(values) - 1) * error
    return mean - margin, mean + margin


def paired_difference(
    a: Mapping[Hashable, float], b: Mapping[Hashable, float], level: float = 0.95
) -> Difference | None:
    """How far two targets are apart over the seeds that both have.

    Runs of one seed begin with the same weights and see the same data in the same order and the
    same noise; what a seed adds to both scores falls out of their difference. The interval is
    Student's (:func:`mean_interval`) of the n differences: the paired t-test at ``1 − level``
    rejects exactly where it excludes 0.

    Args:
        a, b: scores by seed, finite. level: how often the interval is to hold the difference, in (0, 1).

    Returns:
        The mean of a − b with its interval; None where fewer than 2 seeds are in both.
    """
    gaps = [0.0 if math.isclose(a[seed], b[seed], rel_tol=_ROUNDING) else a[seed] - b[seed] for seed in a if seed in b]
    interval = mean_interval(gaps, level)
    if interval is None:
        return None
    return Difference(statistics.fmean(gaps), *interval, f"{len(gaps)} seeds, paired", level)


def independent_difference(
    value_a: float,
    interval_a: Sequence[float],
    value_b: float,
    interval_b: Sequence[float],
    level: float = 0.95,
) -> Difference | None:
    """How far two single runs are apart, from the 95 % interval of each.

    The distances of the ends from the values add in quadrature: for the lower end of a − b, that of a's
    lower and of b's upper end (Zou & Donner 2008, section 3). For other levels they grow as
    Student's quantile with 9 degrees of freedom does, those of an interval from ten blocks.
    Where the runs start from the same noise this is, if anything, too wide.

    Args:
        value_a, value_b: the scores. interval_a, interval_b: their 95 % intervals, (low, high).
        level: how often the interval is to hold the difference, in (0, 1).

    Returns:
        a − b with its interval; None if a number is not finite.
    """
    from .blocks import student_quantile  # imports torch

    (low_a, high_a), (low_b, high_b) = interval_a, interval_b
    if not all(math.isfinite(v) for v in (value_a, low_a, high_a, value_b, low_b, high_b)):
        return None
    wider = 1.0 if level == 0.95 else student_quantile(level, _DEGREES) / student_quantile(0.95, _DEGREES)
    gap = 0.0 if math.isclose(value_a, value_b, rel_tol=_ROUNDING) else value_a - value_b
    below = wider * math.hypot(value_a - low_a, high_b - value_b)
    above = wider * math.hypot(high_a - value_a, value_b - low_b)
    return Difference(gap, gap - below, gap + above, "samples", level)
