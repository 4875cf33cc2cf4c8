"""The rows of a leaderboard, in order: by data set, then by target."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from ..metrics.significance import Difference, independent_difference, mean_interval, paired_difference

Row = dict[str, Any]

#: What is below this is rounding dust, and no difference.
DUST = 1e-7
#: Known targets come in this order, and so keep their colours from study to study.
_KNOWN = ("x0", "velocity", "eps", "v", "score", "edm", "gaussian", "k")
#: What else may set two runs of one target apart; named where it does.
_VARIANTS = (
    *("network", "schedule", "loss_space", "weighting", "times", "time", "input", "t_range", "steps"),
    *("conditional", "guidance", "supervision"),
)


@dataclass
class Entry:
    """One target on one data set: its runs, one a seed."""

    data: str
    series: int
    label: str
    runs: list[Row] = field(default_factory=list)

    @property
    def finished(self) -> list[Row]:
        return [row for row in self.runs if row.get("status", "finished") == "finished"]

    @property
    def shown(self) -> Row:
        """The run whose samples are drawn: the first that finished."""
        return (self.finished or self.runs)[0]

    def by_seed(self, metric: str) -> dict[Hashable, float]:
        """The metric's finite values, by seed."""
        found = {row.get("seed"): metric_of(row, metric).get("value") for row in self.finished}
        return {seed: float(v) for seed, v in found.items() if v is not None and math.isfinite(v)}

    def values(self, metric: str) -> list[float]:
        """The metric's finite values, one a finished run."""
        return list(self.by_seed(metric).values())

    def value(self, metric: str) -> float | None:
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def spread(self, metric: str) -> float:
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def interval(self, metric: str) -> tuple[float, float] | None:
        """Of 95 %: of the mean over seeds, or where there is but one, of that run's samples."""
        values = self.by_seed(metric)
        return own_interval(self, next(iter(values)), metric) if len(values) == 1 else mean_interval([*values.values()])

    def half(self, metric: str) -> float | None:
        """Half of the interval's width."""
        interval = self.interval(metric)
        return None if interval is None else (interval[1] - interval[0]) / 2


@dataclass
class Study:
    """The rows of a leaderboard by data set and target.

    Attributes:
        labels: the targets' names on the page, by series.
        groups: the entries of each data set, in the order of the series.
        hidden: runs at other learning rates, which are not shown.
    """

    rank_by: str
    labels: list[str]
    groups: dict[str, list[Entry]]
    hidden: int

    @classmethod
    def of(cls, rows: Sequence[Row], rank_by: str) -> Study:
        listed = [row for row in rows if row.get("best_lr", True)]
        keys = _series_keys(listed)
        order = sorted(dict.fromkeys(keys), key=_known)
        labels = _labels(order)
        groups: dict[str, list[Entry]] = {}
        for row, key in zip(listed, keys, strict=True):
            entries = groups.setdefault(str(row.get("data", "data")), [])
            series = order.index(key)
            entry = next((e for e in entries if e.series == series), None)
            if entry is None:
                entry = Entry(str(row.get("data", "data")), series, labels[series])
                entries.append(entry)
            entry.runs.append(row)
        for entries in groups.values():
            entries.sort(key=lambda e: e.series)
            for entry in entries:
                entry.runs.sort(key=lambda r: r.get("seed") or 0)
        return cls(rank_by, labels, groups, len(rows) - len(listed))

    @property
    def entries(self) -> list[Entry]:
        return [entry for entries in self.groups.values() for entry in entries]

    def metric(self, data: str) -> str:
        """What ranks a data set: the study's metric where it applies, else the first that does."""
        names = self.metrics([data])
        return self.rank_by if self.rank_by in names or not names else names[0]

    def metrics(self, data: Iterable[str] | None = None) -> list[str]:
        """All metrics' names, the ranking one first."""
        groups = self.groups if data is None else data
        rows = [row for name in groups for e in self.groups[name] for row in e.runs]
        names = dict.fromkeys(name for row in rows for name in row.get("metrics") or {})
        return sorted(names, key=lambda name: name != self.rank_by)

    def floor(self, data: str, metric: str) -> float | None:
        """What as many fresh real data get."""
        found = (metric_of(row, metric).get("floor") for e in self.groups[data] for row in e.runs)
        return next((float(v) for v in found if v is not None), None)

    def higher(self, metric: str) -> bool:
        """Whether more of it is better."""
        return any(metric_of(row, metric).get("better") == "higher" for e in self.entries for row in e.runs)

    def ranked(self, data: str, metric: str | None = None) -> list[Entry]:
        """The entries of a data set, the best first and what has no value last."""
        name = metric or self.metric(data)
        sign = -1 if self.higher(name) else 1

        def place(entry: Entry) -> tuple[float, int]:
            value = entry.value(name)
            return (math.inf if value is None else sign * value, entry.series)

        return sorted(self.groups[data], key=place)

    def difference(self, a: Entry, b: Entry, metric: str, level: float = 0.95) -> Difference | None:
        """a less b: over the seeds that both finished, else from the intervals of one run each."""
        ours, theirs = a.by_seed(metric), b.by_seed(metric)
        common = [seed for seed in ours if seed in theirs]
        if len(common) > 1:
            return paired_difference(ours, theirs, level)
        if not common and (len(ours), len(theirs)) != (1, 1):
            return None
        first, second = (common[0], common[0]) if common else (next(iter(ours)), next(iter(theirs)))
        left, right = own_interval(a, first, metric), own_interval(b, second, metric)
        if left is None or right is None:
            return None
        return independent_difference(ours[first], left, theirs[second], right, level)

    def comparisons(self, data: str, metric: str) -> int:
        """How many targets the best is compared with."""
        return max(0, sum(e.value(metric) is not None for e in self.groups[data]) - 1)

    def from_best(self, entry: Entry, metric: str) -> Difference | None:
        """An entry less the best of its data set by this metric; None for the best itself.

        The level is such that all the intervals of a data set hold together in 95 % (Bonferroni).
        """
        best = self.ranked(entry.data, metric)[0]
        if entry is best or entry.value(metric) is None:
            return None
        return self.difference(entry, best, metric, 1 - 0.05 / self.comparisons(entry.data, metric))

    def standing(self, entry: Entry, metric: str) -> str | None:
        """How an entry stands to the best of its data set by this metric.

        Returns:
            "best"; "no difference" or "worse", from the interval of its difference from the best; or
            "better": over the seeds that both finished, though not in the mean over its own. None
            where there is nothing to compare or nothing to tell it by.
        """
        if entry.value(metric) is None or not self.comparisons(entry.data, metric):
            return None
        if entry is self.ranked(entry.data, metric)[0]:
            return "best"
        found = self.from_best(entry, metric)
        if found is None:
            return None
        if not found.beyond_noise:
            return "no difference"
        return "better" if (found.value > 0) == self.higher(metric) else "worse"


def own_interval(entry: Entry, seed: Hashable, metric: str) -> tuple[float, float] | None:
    """The interval of one run's samples."""
    row = next(row for row in entry.finished if row.get("seed") == seed)
    found = metric_of(row, metric).get("interval")
    return None if found is None else (float(found[0]), float(found[1]))


def metric_of(row: Row, name: str) -> dict[str, Any]:
    return (row.get("metrics") or {}).get(name) or {}


def _series_keys(rows: Sequence[Row]) -> list[str]:
    """What makes runs one series, as JSON: the target and its variant, without data, seed and rate.

    A run that failed early may know no more than its target's name: it joins the one series of that
    name. Runs that agree in all that is known are told apart by their group, or where rows tell of
    none and they agree in their seed too, by a count.
    """
    keys, seen = [], Counter[tuple[str, str, str]]()
    groups: dict[tuple[str, str], list[Any]] = {}
    rates = not any("best_lr" in row for row in rows)
    complete = [_identity(row, rates) for row in rows if row.get("status") != "failed"]
    for row in rows:
        identity = _identity(row, rates)
        if row.get("status") == "failed" and identity not in complete:
            same = {json.dumps(i, sort_keys=True): i for i in complete if _name(i) == _name(identity)}
            identity = next(iter(same.values())) if len(same) == 1 else identity
        kind = (str(row.get("data")), json.dumps(identity, sort_keys=True))
        if "group" in row:
            known = groups.setdefault(kind, [])
            known += [row["group"]] if row["group"] not in known else []
            again = known.index(row["group"]) + 1
        else:
            place = (*kind, str(row.get("seed")))
            seen[place] += 1
            again = seen[place]
        keys.append(json.dumps({**identity, "again": again}, sort_keys=True))
    return keys


def _identity(row: Row, rates: bool) -> dict[str, Any]:
    """The target and its variant; with the learning rate where rates were not chosen among."""
    identity = {"target": row.get("target"), **{k: row[k] for k in _VARIANTS if k in row}}
    return {**identity, "lr": row.get("lr")} if rates else identity


def _name(identity: dict[str, Any]) -> str:
    target = identity.get("target")
    return str(target.get("name", "?")) if isinstance(target, dict) else str(target)


def _known(key: str) -> int:
    name = _name(json.loads(key))
    return _KNOWN.index(name) if name in _KNOWN else len(_KNOWN)


def _labels(keys: Sequence[str]) -> list[str]:
    """A name for each series: its target, and whatever sets it apart from others of that target."""
    identities = [json.loads(key) for key in keys]
    labels = []
    for identity in identities:
        rivals = [i for i in identities if i["target"] == identity["target"]]
        parts = [_target_words(identity["target"], [i["target"] for i in identities])]
        for name in (*_VARIANTS, "lr"):
            if len({json.dumps(i.get(name), sort_keys=True) for i in rivals}) > 1:
                told = words_of(identity.get(name))
                if name == "supervision":
                    parts += ["exact means"] if told == "exact" else []
                else:
                    parts.append(told if name == "network" else f"{name} {told}")
        labels.append(", ".join(parts) + (f" #{identity['again']}" if identity["again"] > 1 else ""))
    return labels


def _target_words(target: Any, among: Sequence[Any]) -> str:
    """A target's name, with its arguments where others of that name have other ones."""
    if not isinstance(target, dict):
        return words_of(target)
    if target.get("name") == "file":
        files = [str(t.get("path")) for t in among if isinstance(t, dict) and t.get("name") == "file"]
        path = PurePath(str(target.get("path")))
        return path.stem if sum(PurePath(file).stem == path.stem for file in files) == 1 else str(path)
    same = [t for t in among if isinstance(t, dict) and t.get("name") == target.get("name")]
    inner = target.get("target")
    if target.get("name") == "gaussian" and inner is not None:
        name = _target_words(_mapping(inner), [_mapping(t.get("target")) for t in same])
        covariance = str(target.get("covariance", "diagonal"))
        rest = {k: v for k, v in target.items() if k not in ("name", "target", "covariance")}
        alike = [t for t in same if t.get("covariance", "diagonal") == covariance]
        rivals = [t for t in alike if _mapping(t.get("target")) == _mapping(inner)]
        told = [f"{k} {words_of(v)}" for k, v in rest.items() if any(t.get(k) != v for t in rivals)]
        return f"{name} ± {', '.join([covariance, *told])}"
    return words_of(target) if any(t != target for t in same) else str(target.get("name", "?"))


def _mapping(target: Any) -> Any:
    """The long form of a target that is told by its name alone."""
    return {"name": target} if isinstance(target, str) else target


def words_of(value: Any) -> str:
    """A setting as a reader writes it."""
    if isinstance(value, dict):
        rest = ", ".join(f"{k}={words_of(v)}" for k, v in value.items() if k != "name")
        name = str(value.get("name", ""))
        return f"{name}({rest})" if rest else name
    if isinstance(value, list):
        return "[" + ", ".join(words_of(v) for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
