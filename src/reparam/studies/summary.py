"""What a study found, as plain data: means over seeds, and what tells targets apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..report.rows import Entry, Row, Study


def summary(rows: Sequence[Row], rank_by: str) -> list[dict[str, Any]]:
    """The rows of a leaderboard summed up, an entry for each target on each data set, best first.

    Args:
        rows: of the leaderboard; those at other than the best learning rate are left out.
        rank_by: the metric that ranks; data sets it does not apply to are ranked by their first.

    Returns:
        Of each target "data", "target", "runs" (their names), "seeds" (those that finished) and
        "metrics", with for each of them

        - "mean" over the finished seeds, "n" of them, and the 95 % "interval" [low, high] of that
          mean, or with one seed of that run's samples; null where it is not known;
        - "floor", what real data get, and which is "better", "lower" or "higher";
        - "difference_from_best": this target less the best by this metric, with the interval at such
          a "level" that all of a data set hold together in 95 %; null for the best;
        - "verdict": see :meth:`reparam.report.rows.Study.standing`.
    """
    study = Study.of(rows, rank_by)
    return [_summed(study, entry) for data in study.groups for entry in study.ranked(data)]


def _summed(study: Study, entry: Entry) -> dict[str, Any]:
    return {
        "data": entry.data,
        "target": entry.label,
        "runs": [row.get("run") for row in entry.runs],
        "seeds": [row.get("seed") for row in entry.finished],
        "metrics": {name: _metric(study, entry, name) for name in study.metrics([entry.data])},
    }


def _metric(study: Study, entry: Entry, name: str) -> dict[str, Any]:
    interval, found = entry.interval(name), study.from_best(entry, name)
    difference = found and {
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "level": found.level,
        "source": found.source,
        "beyond_noise": found.beyond_noise,
    }
    return {
        "mean": entry.value(name),
        "interval": None if interval is None else list(interval),
        "n": len(entry.values(name)),
        "floor": study.floor(entry.data, name),
        "better": "higher" if study.higher(name) else "lower",
        "difference_from_best": difference,
        "verdict": study.standing(entry, name),
    }
