"""What a study found, in plain words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..metrics.significance import Difference
from .plots import escape, number
from .rows import DUST, Entry, Study

#: Ratios below these are called small (or, where no interval is known, level), and not called a disagreement.
_LEVEL, _DISAGREE = 1.1, 1.25
#: So many times the floor is far from it; where more is better, so small a share of it.
_FAR, _FAR_SHARE = 20, 0.5
#: How a run may end without a score.
_ENDS = ("diverged", "failed")


@dataclass(frozen=True)
class Finding:
    """What the rows say about one data set: the winner (None where there is none) and words (HTML).

    ``tie``: "no difference" or "level" where the winner is not told from all others.
    """

    winner: str | None
    tie: str
    words: str
    disagrees: bool = False


def _apart(study: Study, better: Entry, worse: Entry, metric: str) -> float | None:
    """How many times one value the other is; what is beyond the floor counts as at the floor.

    None where a value or the end of an interval is negative: of such numbers a ratio tells nothing.
    """
    floor = study.floor(better.data, metric)
    values = [better.value(metric) or 0.0, worse.value(metric) or 0.0]
    ends = [interval[0] for e in (better, worse) if (interval := e.interval(metric)) is not None]
    if min([*values, *ends, floor or 0.0]) < -DUST:
        return None
    if study.higher(metric):
        values = values if floor is None else [min(v, floor) for v in values]
        return max(values[0], DUST) / max(values[1], DUST)
    least = max(floor or 0.0, DUST)
    return max(values[1], least) / max(values[0], least)


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 9.95 else f"{float(f'{ratio:.2g}'):,.0f}"


def _bold(entry: Entry) -> str:
    return f"<b>{escape(entry.label)}</b>"


def _finding(study: Study, data: str) -> Finding:
    metric = study.metric(data)
    ranked = [e for e in study.ranked(data) if e.value(metric) is not None]
    if not ranked:
        return Finding(None, "", "no run finished.")
    best = ranked[0]
    if len(ranked) == 1:
        others = len(study.groups[data]) > 1
        words = f"{_bold(best)} ({_told(best, metric)}) is the only target {'that finished' if others else 'here'}."
        words += _how_bad(study, data, best) + _lost(study, data)
        return Finding(best.label if others else None, "", words)
    tie, words = _compared(study, best, ranked[1:], metric)
    objections = _objections(study, data, best)
    words += f", but {objections}." if objections else "."
    words += _how_bad(study, data, best) + _lost(study, data)
    near = best.value("nearest_neighbour"), study.floor(data, "nearest_neighbour")
    if near[0] is not None and near[1] is not None and near[0] < 0.5 * near[1]:
        words += " Its nearest_neighbour is far below the floor: it may repeat training data."
    return Finding(best.label, tie, words, bool(objections))


def _compared(study: Study, best: Entry, others: Sequence[Entry], metric: str) -> tuple[str, str]:
    """The best against all others: whether that is a tie, and words (HTML)."""
    standing = {id(e): study.standing(e, metric) for e in others}
    same = [e for e in others if standing[id(e)] in ("no difference", "better")]
    if same:
        worse = [_bold(e) for e in others if standing[id(e)] == "worse"]
        after = f"; {_listed(worse)} {'is' if len(worse) == 1 else 'are'} worse" if worse else ""
        return "no difference", _no_difference(study, best, same, metric) + after
    second = others[0]
    difference, ratio = study.from_best(second, metric), _apart(study, best, second, metric)
    rival = f"{escape(second.label)} ({_told(second, metric)})"
    gap = abs((second.value(metric) or 0.0) - (best.value(metric) or 0.0))
    small = ratio is not None and ratio < _LEVEL
    if difference is None and (small or gap < max(best.spread(metric) + second.spread(metric), DUST)):
        return "level", f"{_bold(best)} ({_told(best, metric)}) and {rival} are level"
    if ratio is None or small:
        behind = f"is behind by {number(gap)}{', a small difference' if small else ''}"
    elif study.higher(metric):
        behind = f"reaches {100 / ratio:.0f} % of that"
    else:
        behind = f"scores {_times(ratio)} times as much"
    words = f"{_bold(best)} is best ({_told(best, metric)}); the runner-up, {rival}, {behind}"
    if difference is not None:
        words += f"; they differ by {_span(difference)} ({_basis(study, [difference], best, metric)})"
    return "", words


def _no_difference(study: Study, best: Entry, same: Sequence[Entry], metric: str) -> str:
    """That some targets cannot be told from the best, with the intervals (HTML)."""
    found = {e.series: d for e in same if (d := study.from_best(e, metric)) is not None}
    even: list[str] = []
    ahead: list[str] = []
    for entry in same:
        told = f"<b>{escape(entry.label)}</b> ({_told(entry, metric)}): {_span(found[entry.series])}"
        (ahead if found[entry.series].beyond_noise else even).append(told)
    words = [f"there is no difference from {', nor from '.join(even)}"] if even else []
    words += [f"better on the seeds that both finished: {', '.join(ahead)}"] if ahead else []
    mean = "has the best mean" if len(best.values(metric)) > 1 else "scores best"
    basis = _basis(study, list(found.values()), best, metric)
    return f"{_bold(best)} {mean} ({_told(best, metric)}), but {'; '.join(words)} ({basis})"


def _span(difference: Difference) -> str:
    return f"{number(difference.low)} to {number(difference.high)}"


def _basis(study: Study, found: Sequence[Difference], best: Entry, metric: str) -> str:
    """What the intervals are of."""
    many = study.comparisons(best.data, metric)
    sources = dict.fromkeys(d.source for d in found)
    words = [
        "of these samples only; another seed may differ by more" if s == "samples" else f"over {s}" for s in sources
    ]
    level = f"{100 * found[0].level:.3g} % interval{'' if len(found) == 1 else 's'}"
    return f"{level}{f' for {many} comparisons' if many > 1 else ''}, {' or '.join(words)}"


def _how_bad(study: Study, data: str, best: Entry) -> str:
    """That even the best is far from real data, where it is."""
    metric = study.metric(data)
    value, floor = best.value(metric), study.floor(data, metric)
    if value is None or floor is None or floor < DUST:
        return ""
    if value > _FAR_SHARE * floor if study.higher(metric) else value < _FAR * floor:
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
    half = entry.half(metric)
    return number(entry.value(metric)) + ("" if half is None else f" ± {number(half)}")


def _objections(study: Study, data: str, best: Entry) -> str:
    """The metrics by which another target is clearly better than the winner."""
    found: dict[str, list[str]] = {}
    for metric in study.metrics([data]):
        rival = study.ranked(data, metric)[0]
        ours, theirs = best.value(metric), rival.value(metric)
        if metric == study.metric(data) or rival is best or ours is None or theirs is None:
            continue
        difference, ratio = study.from_best(best, metric), _apart(study, rival, best, metric)
        large = difference is not None if ratio is None else ratio >= _DISAGREE
        if large and (difference is None or study.standing(best, metric) == "worse"):
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
    wins = Counter(f.winner for f in findings.values() if f.winner and not f.tie)
    level = [data for data, f in findings.items() if f.tie == "level"]
    same = [data for data, f in findings.items() if f.tie == "no difference"]
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
    if same:
        told.append(f"on {_places(same, total)} there is no difference between the best and another")
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
    """What the intervals mean and what they leave out."""
    counts = {len(entry.finished) for entry in study.entries if entry.finished} or {1}
    ranks = [entry.half(study.metric(entry.data)) for entry in study.entries]
    if max(counts) == 1 and all(half is None for half in ranks):
        return "One seed per target, so there are no error bars: small differences may be chance."
    if max(counts) == 1:
        words = (
            "One seed per target. ± is half of the 95 % interval of these samples: what other samples of the same "
            "model would score. Another seed may differ by more, which only more seeds can tell."
        )
    else:
        seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts)}"
        words = (
            f"Means over {seeds} seeds, ± half of the 95 % interval of the mean. Targets are compared seed by seed, "
            "since runs of one seed share their first weights, data and noise."
        )
        words += " Two seeds make wide intervals; five tell more." if max(counts) == 2 else ""
    words += " “No difference” says that the interval of the difference includes 0, not that there is none."
    if max(study.comparisons(data, study.metric(data)) for data in study.groups) > 1:
        words += (
            " Where the best is compared with several others, the intervals are widened so that together they hold in "
            "95 % (Bonferroni)."
        )
    return words
