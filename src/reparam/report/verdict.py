"""What a study found, in plain words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .plots import escape, number
from .rows import DUST, Entry, Study

#: Ratios below these are not called a difference, and not called a disagreement.
_LEVEL, _DISAGREE = 1.1, 1.25
#: So many times the floor is far from it.
_FAR = 20
#: How a run may end without a score.
_ENDS = ("diverged", "failed")


@dataclass(frozen=True)
class Finding:
    """What the rows say about one data set: the winner (None where there is none) and words (HTML)."""

    winner: str | None
    level: bool
    words: str
    disagrees: bool = False


def _apart(low: Entry, high: Entry, metric: str, floor: float | None) -> float:
    """How many times the lower value the higher is; what is below the floor counts as at the floor."""
    least = max(floor or 0.0, DUST)
    return max(high.value(metric) or 0.0, least) / max(low.value(metric) or 0.0, least)


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 9.95 else f"{float(f'{ratio:.2g}'):,.0f}"


def _finding(study: Study, data: str) -> Finding:
    metric = study.metric(data)
    ranked = [e for e in study.ranked(data) if e.value(metric) is not None]
    if not ranked:
        return Finding(None, False, "no run finished.")
    best = ranked[0]
    name, score = f"<b>{escape(best.label)}</b>", _told(best, metric)
    if len(ranked) == 1:
        others = len(study.groups[data]) > 1
        words = f"{name} ({score}) is the only target {'that finished' if others else 'here'}."
        words += _how_bad(study, data, best) + _lost(study, data)
        return Finding(best.label if others else None, False, words)
    second = ranked[1]
    ratio = _apart(best, second, metric, study.floor(data, metric))
    gap = (second.value(metric) or 0.0) - (best.value(metric) or 0.0)
    rival = f"{escape(second.label)} ({_told(second, metric)})"
    if ratio < _LEVEL or gap < best.spread(metric) + second.spread(metric):
        level, words = True, f"{name} ({score}) and {rival} are level"
    else:
        level, words = (
            False,
            f"{name} is best ({score}); the runner-up, {rival}, scores {_times(ratio)} times as much",
        )
    objections = _objections(study, data, best)
    words += f", but {objections}." if objections else "."
    words += _how_bad(study, data, best) + _lost(study, data)
    near = best.value("nearest_neighbour"), study.floor(data, "nearest_neighbour")
    if near[0] is not None and near[1] is not None and near[0] < 0.5 * near[1]:
        words += " Its nearest_neighbour is far below the floor: it may repeat training data."
    return Finding(best.label, level, words, bool(objections))


def _how_bad(study: Study, data: str, best: Entry) -> str:
    """That even the best is far from real data, where it is."""
    metric = study.metric(data)
    value, floor = best.value(metric), study.floor(data, metric)
    if value is None or floor is None or floor < DUST or value < _FAR * floor:
        return ""
    return f" Even <b>{escape(best.label)}</b> is far from real data, which get {number(floor)}."


def _lost(study: Study, data: str) -> str:
    """Which targets have no score, and why (HTML)."""
    lost: dict[str, list[str]] = {}
    for entry in study.groups[data]:
        if not entry.finished:
            lost.setdefault(str(entry.runs[0].get("status")), []).append(f"<b>{escape(entry.label)}</b>")
    told = [
        f"{_listed(names)} {escape(status) if status in _ENDS else 'did not finish'}" for status, names in lost.items()
    ]
    return f" {'; '.join(told)}." if told else ""


def _told(entry: Entry, metric: str) -> str:
    spread = entry.spread(metric)
    return number(entry.value(metric)) + (f" ± {number(spread)}" if len(entry.values(metric)) > 1 else "")


def _objections(study: Study, data: str, best: Entry) -> str:
    """The metrics by which another target is clearly better than the winner."""
    found: dict[str, list[str]] = {}
    for metric in study.metrics([data]):
        rival = study.ranked(data, metric)[0]
        ours, theirs = best.value(metric), rival.value(metric)
        if metric == study.metric(data) or rival is best or ours is None or theirs is None:
            continue
        if _apart(rival, best, metric, study.floor(data, metric)) >= _DISAGREE:
            told = f"{escape(metric)} ({number(theirs)} against {number(ours)})"
            found.setdefault(rival.label, []).append(told)
    return " and ".join(
        f"{' and '.join(values)} favour{'s' if len(values) == 1 else ''} <b>{escape(label)}</b>"
        for label, values in found.items()
    )


def verdict(study: Study) -> str:
    """The answer in plain words, with what it is worth (HTML)."""
    findings = {data: _finding(study, data) for data in study.groups}
    metrics = {study.metric(data) for data in study.groups}
    by = f"By {escape(metrics.pop())}" if len(metrics) == 1 else "By each data set’s own metric"
    if not findings:
        return '<p class="lead">There are no runs yet.</p>'
    if len(findings) == 1:
        ((data, only),) = findings.items()
        place = f" on {escape(data)}" if only.winner else f" on {escape(data)}:"
        return f'<p class="lead">{by},{place} {only.words}</p><p>{_caveat(study)}</p>'
    items = "".join(f"<li><span>{escape(data)}:</span> {f.words}</li>" for data, f in findings.items())
    return f'<p class="lead">{by}, {_summary(findings)}</p><ul>{items}</ul><p>{_caveat(study)}</p>'


def _summary(findings: dict[str, Finding]) -> str:
    """How often each target won, over several data sets (HTML)."""
    wins = Counter(f.winner for f in findings.values() if f.winner and not f.level)
    level = [data for data, f in findings.items() if f.level]
    silent = [data for data, f in findings.items() if f.winner is None]
    total = len(findings)
    told = []
    if wins:
        (first, n), *others = wins.most_common()
        parts = [f"<b>{escape(first)}</b> is best on {'all' if n == total else f'{n} of'} {total} data sets"]
        parts += [f"<b>{escape(name)}</b> on {n}" for name, n in others]
        told.append(_listed(parts))
    if level:
        told.append(f"on {_places(level, total)} the first two are level")
    if silent:
        told.append(f"on {_places(silent, total)} there is nothing to compare")
    disagree = sum(f.disagrees for f in findings.values())
    share = f"on {disagree} of them" if disagree < total else "everywhere"
    return "; ".join(told) + "." + (f" Other metrics disagree {share}." if disagree else "")


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts)


def _places(data: Sequence[str], total: int) -> str:
    """Data sets by name where there is one, else how many (HTML)."""
    if len(data) == 1:
        return escape(data[0])
    return f"all {total} data sets" if len(data) == total else f"{len(data)} of {total} data sets"


def _caveat(study: Study) -> str:
    counts = {len(entry.finished) for entry in study.entries if entry.finished} or {1}
    if max(counts) == 1:
        return "One seed per target, so there are no error bars: small differences may be chance."
    seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts)}"
    return (
        f"Means over {seeds} seeds, ± the standard deviation between them; what lies within that spread is "
        "called level."
    )
