"""The page of a study: verdict, leaderboard, samples at every sampling step, errors, notes.

One HTML file that needs nothing else. All words, numbers and charts are static; the script only
moves the samples along the sampling steps.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..files import write_text
from . import plots
from .plots import escape, number

Row = dict[str, Any]

#: Known targets come in this order, and so keep their colours from study to study.
_KNOWN = ("x0", "velocity", "eps", "v", "score", "edm", "k")
#: What else may set two runs of one target apart; named where it does.
_VARIANTS = ("network", "schedule", "loss_space", "weighting", "times", "time", "input", "t_range", "steps")
#: Bytes of samples the page may carry before base64 makes them a third larger.
_BUDGET = 2_300_000
_POINTS, _PICTURES, _LARGEST = 256, 36, 64
#: Points are kept up to this many times the half width of the frame, and clipped there.
_SPAN = 4.0
_MISSING = -32768
#: Ratios below these are not called a difference, and not called a disagreement.
_LEVEL, _DISAGREE = 1.1, 1.25
_DUST = 1e-7


# ------------------------------------------------------------------------------------ rows, in order


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

    def values(self, metric: str) -> list[float]:
        """The metric's finite values, one a finished run."""
        found = [_metric(row, metric).get("value") for row in self.finished]
        return [float(v) for v in found if v is not None and math.isfinite(v)]

    def value(self, metric: str) -> float | None:
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def spread(self, metric: str) -> float:
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else 0.0


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
        found = (_metric(row, metric).get("floor") for e in self.groups[data] for row in e.runs)
        return next((float(v) for v in found if v is not None), None)

    def ranked(self, data: str, metric: str | None = None) -> list[Entry]:
        """The entries of a data set, the best first and what has no value last."""
        name = metric or self.metric(data)

        def place(entry: Entry) -> tuple[float, int]:
            value = entry.value(name)
            return (math.inf if value is None else value, entry.series)

        return sorted(self.groups[data], key=place)


def _metric(row: Row, name: str) -> dict[str, Any]:
    return (row.get("metrics") or {}).get(name) or {}


def _series_keys(rows: Sequence[Row]) -> list[str]:
    """What makes runs one series, as JSON: the target and its variant, without data, seed and rate.

    A run that failed early may know no more than its target's name: it joins the one series of that
    name. Runs that agree in all that is known and in their seed are told apart by a count.
    """
    keys, seen = [], Counter[tuple[str, str, str]]()
    rates = not any("best_lr" in row for row in rows)
    complete = [_identity(row, rates) for row in rows if row.get("status") != "failed"]
    for row in rows:
        identity = _identity(row, rates)
        if row.get("status") == "failed" and identity not in complete:
            same = {json.dumps(i, sort_keys=True): i for i in complete if _name(i) == _name(identity)}
            identity = next(iter(same.values())) if len(same) == 1 else identity
        place = (str(row.get("data")), json.dumps(identity, sort_keys=True), str(row.get("seed")))
        seen[place] += 1
        keys.append(json.dumps({**identity, "again": seen[place]}, sort_keys=True))
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
        parts = [_words(identity["target"])]
        for name in (*_VARIANTS, "lr"):
            if len({json.dumps(i.get(name), sort_keys=True) for i in rivals}) > 1:
                told = _words(identity.get(name))
                parts.append(told if name == "network" else f"{name} {told}")
        labels.append(", ".join(parts) + (f" #{identity['again']}" if identity["again"] > 1 else ""))
    return labels


def _words(value: Any) -> str:
    """A setting as a reader writes it."""
    if isinstance(value, dict):
        rest = ", ".join(f"{k}={_words(v)}" for k, v in value.items() if k != "name")
        name = str(value.get("name", ""))
        return f"{name}({rest})" if rest else name
    if isinstance(value, list):
        return "[" + ", ".join(_words(v) for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


# ------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True)
class Finding:
    """What the rows say about one data set: the winner (None where there is none) and words (HTML)."""

    winner: str | None
    level: bool
    words: str
    disagrees: bool = False


def _apart(low: Entry, high: Entry, metric: str, floor: float | None) -> float:
    """How many times the lower value the higher is; what is below the floor counts as at the floor."""
    least = max(floor or 0.0, _DUST)
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
    near = best.value("nearest_neighbour"), study.floor(data, "nearest_neighbour")
    if near[0] is not None and near[1] is not None and near[0] < 0.5 * near[1]:
        words += " Its nearest_neighbour is far below the floor: it may repeat training data."
    return Finding(best.label, level, words, bool(objections))


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


# --------------------------------------------------------------------------------------- leaderboard


def leaderboard(study: Study) -> str:
    """The table of all entries, by data set (HTML)."""
    metrics = study.metrics()
    heads = "".join(_metric_head(name, name == study.rank_by) for name in metrics)
    head = (
        f'<thead><tr><th scope="col">target</th>{heads}<th scope="col" class="n">learning rate</th>'
        '<th scope="col" class="n">parameters</th><th scope="col" class="n">time</th></tr></thead>'
    )
    bodies = "".join(_table_group(study, data, metrics) for data in study.groups)
    hidden = ""
    if study.hidden:
        runs, are = ("1 run", "is") if study.hidden == 1 else (f"{study.hidden} runs", "are")
        hidden = f"<p>{runs} at other learning rates did no better and {are} not listed.</p>"
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Leaderboard, scrolls sideways">'
        f"<table>{head}{bodies}</table></div>{_definitions(metrics)}{hidden}"
    )


def _metric_head(name: str, ranks: bool) -> str:
    words = escape(name).replace("_", "_<wbr>")
    sort = ' aria-sort="ascending"' if ranks else ""
    return f'<th scope="col" class="n"{sort}>{words}{"<small>ranked by this</small>" if ranks else ""}</th>'


def _table_group(study: Study, data: str, metrics: Sequence[str]) -> str:
    floors = "".join(f'<td class="n">{number(study.floor(data, m))}</td>' for m in metrics)
    rows = "".join(_table_row(study, entry, metrics) for entry in study.ranked(data))
    return (
        f'<tbody><tr class="group"><th scope="rowgroup" colspan="{len(metrics) + 4}">'
        f"<span>{escape(data)}</span></th></tr>"
        f'{rows}<tr class="floor"><th scope="row">real data (floor)</th>{floors}<td colspan="3"></td></tr></tbody>'
    )


def _table_row(study: Study, entry: Entry, metrics: Sequence[str]) -> str:
    head = f'<th scope="row">{plots.swatch(entry.series)}<span>{escape(entry.label)}</span>{_remarks(entry)}</th>'
    if entry.finished:
        values = "".join(_value_cell(study, entry, metric) for metric in metrics)
    else:
        row = entry.runs[0]
        reason = f": {escape(row['reason'])}" if row.get("reason") else ""
        values = f'<td colspan="{len(metrics)}" class="bad"><b>{escape(row.get("status"))}</b>{reason}</td>'
    params = next((row["params"] for row in entry.runs if row.get("params") is not None), None)
    times = [row["wall_s"] for row in entry.finished or entry.runs if row.get("wall_s") is not None]
    return (
        f'<tr>{head}{values}<td class="n rate">{_rate(entry)}</td>'
        f'<td class="n">{"–" if params is None else f"{params:,}"}</td>'
        f'<td class="n">{duration(statistics.fmean(times)) if times else "–"}</td></tr>'
    )


def _remarks(entry: Entry) -> str:
    """Below a target's name: the times it covers, where not all, and which seeds did not finish."""
    remarks = []
    span = entry.shown.get("t_range")
    if isinstance(span, list) and [float(t) for t in span] != [0.0, 1.0]:
        remarks.append(f"t from {span[0]:g} to {span[1]:g}")
    lost = [row for row in entry.runs if row not in entry.finished]
    if len(entry.runs) > 1:
        remarks.append(f"{len(entry.runs)} seeds")
    if lost and entry.finished:
        told = ", ".join(f"seed {_words(row.get('seed'))} {row.get('status')}" for row in lost)
        remarks.append(told)
    return f"<small>{escape('; '.join(remarks))}</small>" if remarks else ""


def _value_cell(study: Study, entry: Entry, metric: str) -> str:
    value = entry.value(metric)
    least = min((v for e in study.groups[entry.data] if (v := e.value(metric)) is not None), default=None)
    several = len(study.groups[entry.data]) > 1
    mark = several and value is not None and value == least and value >= _DUST
    words = number(value)
    if len(entry.values(metric)) > 1:
        words += f"<small>± {number(entry.spread(metric))}</small>"
    return f'<td class="n">{f"<b>{words}</b>" if mark else words}</td>'


def _rate(entry: Entry) -> str:
    rates = sorted({row["lr"] for row in entry.runs if row.get("lr") is not None})
    tried = sorted({lr for row in entry.runs for lr in row.get("lr_tried") or []})
    words = ", ".join(f"{lr:g}" for lr in rates) or "–"
    if len(tried) < 2 or not rates:
        return escape(words)
    edge = "largest" if tried[-1] in rates else "smallest" if tried[0] in rates else ""
    # The best of a range lies safely inside it, or may lie beyond its end.
    return escape(words) + f"<small>best of {len(tried)}{f', the {edge} tried' if edge else ''}</small>"


def duration(seconds: float) -> str:
    """Seconds as a reader says them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"


def _definitions(metrics: Sequence[str]) -> str:
    from ..metrics import METRICS  # imports torch

    known = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(METRICS[name].words)}</dd></div>"
        for name in metrics
        if name in METRICS
    )
    floor = (
        "<p>Smaller is better. The floor is what as many fresh real data get: no model can be expected to do "
        "better. In bold: the lowest value of each column.</p>"
    )
    return floor + (f'<dl class="words">{known}</dl>' if known else "")


# ---------------------------------------------------------------------------------- samples, embedded


@dataclass
class Track:
    """What a run believed x0 to be, step by step: points in units of the frame, or pictures.

    Attributes:
        kind: "points" or "pictures". axes: what is drawn.
        frames: [F, m, 2] int16, or uint8 pictures [F, m, H, W(, 3)]. real: the same for real data.
        times: t at each of all steps. kept: which of the steps are in ``frames``.
    """

    kind: str
    axes: str
    frames: np.ndarray
    real: np.ndarray
    times: np.ndarray
    kept: np.ndarray

    @classmethod
    def read(cls, out: Path, run: str) -> Track | None:
        """A run's track, unquantised; None where there is none."""
        if not run or Path(run).is_absolute() or ".." in Path(run).parts:
            return None
        try:
            with np.load(out / run / "trajectory.npz", allow_pickle=False) as file:
                kind, axes = str(file["kind"]), str(file["axes"])
                frames, real, times = file["frames"], file["real"], file["times"]
        except (OSError, ValueError, KeyError, EOFError):
            return None
        if kind == "pictures":
            frames, real = _smaller(frames[:, :_PICTURES]), _smaller(real[:_PICTURES])
        else:
            frames, real = frames[:, :_POINTS].astype(float), real[:_POINTS].astype(float)
        return cls(kind, axes, frames, real, np.asarray(times, float), np.arange(len(frames)))

    def thinned(self, most: int) -> Track:
        """With at most so many frames, the first and the last among them."""
        count = min(len(self.frames), max(2, most))
        at = np.unique(np.rint(np.linspace(0, len(self.frames) - 1, count)).astype(int))
        return Track(self.kind, self.axes, self.frames[at], self.real, self.times, self.kept[at])


def _smaller(pictures: np.ndarray, side: int = _LARGEST) -> np.ndarray:
    """Pictures [..., n, H, W(, 3)] no larger than ``side``, by averaging blocks of pixels."""
    colours = (pictures.shape[-1] == 3 and pictures.ndim > 4) or (pictures.ndim == 4 and pictures.shape[-1] == 3)
    *lead, height, width = pictures.shape[:-1] if colours else pictures.shape
    by = math.ceil(max(height, width) / side)
    if by == 1:
        return np.array(pictures)
    tail = (3,) if colours else ()
    cut = pictures.reshape(*lead, height, width, *tail)
    rows, columns = height // by, width // by
    axis = len(lead)
    cut = cut.take(range(rows * by), axis).take(range(columns * by), axis + 1)
    blocks = cut.reshape(*lead, rows, by, columns, by, *tail)
    return np.rint(blocks.mean((axis + 1, axis + 3))).astype(np.uint8)


@dataclass(frozen=True)
class Frame:
    """The window of all panels of a data set: centre and half width, from the real data."""

    centre: tuple[float, float]
    half: float

    @classmethod
    def around(cls, real: np.ndarray) -> Frame:
        finite = real[np.isfinite(real).all(1)]
        if not len(finite):
            return cls((0.0, 0.0), 1.0)
        low, high = finite.min(0), finite.max(0)
        middle = (low + high) / 2
        return cls((float(middle[0]), float(middle[1])), float((high - low).max()) * 0.5 * 1.15 or 1.0)

    def quantised(self, points: np.ndarray) -> np.ndarray:
        """Points as int16, the frame's half width being 32767/_SPAN; what is not finite as -32768."""
        scaled = (points - np.asarray(self.centre)) / self.half * (32767 / _SPAN)
        whole = np.clip(np.rint(np.nan_to_num(scaled, nan=0.0, posinf=1e9, neginf=-1e9)), -32767, 32767)
        whole[~np.isfinite(points).all(-1)] = _MISSING
        return whole.astype("<i2")


def _unit(points: np.ndarray) -> np.ndarray:
    """Quantised points in units of the frame's half width."""
    return points.astype(float) * (_SPAN / 32767)


@dataclass
class Strip:
    """The panels of one data set: the real data's and a track for each entry that has one."""

    data: str
    entries: list[Entry]
    tracks: dict[int, Track]
    frame: Frame | None = None

    @property
    def first(self) -> Track | None:
        return next(iter(self.tracks.values()), None)


def strips(study: Study, out: Path) -> list[Strip]:
    """All samples of the study, quantised and thinned out to what the page may carry."""
    found = []
    for data, entries in study.groups.items():
        tracks = {e.series: Track.read(out, str(e.shown.get("run", ""))) for e in entries}
        present = {series: track for series, track in tracks.items() if track is not None}
        strip = Strip(data, entries, present)
        if strip.first is not None and strip.first.kind != "pictures":
            strip.frame = Frame.around(strip.first.real)
            for track in present.values():
                track.frames, track.real = (
                    strip.frame.quantised(track.frames),
                    strip.frame.quantised(strip.first.real),
                )
        found.append(strip)
    tracks_of_all = [track for strip in found for track in strip.tracks.values()]
    _fit_pictures([track for track in tracks_of_all if track.kind == "pictures"], len(tracks_of_all))
    total = sum(track.frames.nbytes for track in tracks_of_all)
    if total > _BUDGET:
        for strip in found:
            strip.tracks = {
                series: track.thinned(int(len(track.frames) * _BUDGET / total))
                for series, track in strip.tracks.items()
            }
    return found


def _fit_pictures(tracks: Sequence[Track], panels: int, frames: int = 6) -> None:
    """Show fewer, then smaller pictures until at least so many frames of each run can be kept."""
    for side in (_LARGEST, 32, 24, 16, 12, 8):
        for count in (_PICTURES, 25, 16, 9, 4):
            most = [_smaller(track.frames[:1, :count], side).nbytes for track in tracks]
            if panels * frames * max(most, default=0) <= _BUDGET:
                for track in tracks:
                    track.frames = _smaller(track.frames[:, :count], side)
                    track.real = _smaller(track.real[:count], side)
                return


def _packed(strip: Strip) -> dict[str, Any]:
    """A strip as the script reads it."""

    def text(array: np.ndarray) -> str:
        return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()

    panels = []
    for series, track in strip.tracks.items():
        panels.append(
            {
                "series": series,
                "shape": list(track.frames.shape),
                "steps": len(track.times) - 1,
                "kept": track.kept.tolist(),
                "t": [round(float(track.times[i]), 4) for i in track.kept],
                "data": text(track.frames),
            }
        )
    first = strip.first
    real = None if first is None else {"shape": [1, *first.real.shape], "data": text(first.real)}
    frame = strip.frame
    return {
        "kind": first.kind if first else "none",
        "span": _SPAN,
        "centre": list(frame.centre) if frame else None,
        "half": frame.half if frame else None,
        "real": real,
        "panels": panels,
    }


# -------------------------------------------------------------------------------- samples, as figures


def _drawn(strip: Strip, series: int | None, width: float) -> tuple[str, float]:
    """The final samples of an entry (None: the real data) as SVG, and their height."""
    first = strip.first
    track = first if series is None else strip.tracks.get(series)
    if track is None or first is None:
        height = width if first is None or first.kind != "pictures" else plots.pictures_panel(first.real, width)[1]
        entry = next((e for e in strip.entries if e.series == series), None)
        return plots.empty_panel(_absence(entry), width, height), height
    shown = track.real if series is None else track.frames[-1]
    if track.kind == "pictures":
        return plots.pictures_panel(shown, width)
    behind = None if series is None else _unit(first.real)
    return plots.points_panel(_unit(shown), width, series=series, behind=behind), width


def _absence(entry: Entry | None) -> str:
    """Why an entry has no samples."""
    if entry is None or entry.finished:
        return "no samples kept"
    return str(entry.runs[0].get("status", "no samples kept"))


def samples_figure(study: Study, strip: Strip, index: int, about: str) -> str:
    """One data set's panels, the real data's first (HTML)."""
    first = strip.first
    panels = [] if first is None else [_panel(study, strip, index, None)]
    panels += [_panel(study, strip, index, entry) for entry in strip.entries]
    columns = min(5, max(3, len(panels)))
    return (
        f'<section class="strip"><h3>{escape(strip.data)}</h3>{about}'
        f'<div class="panels" style="--n:{columns}">{"".join(panels)}</div></section>'
    )


def _about(strip: Strip) -> str:
    """What a data set's panels show (HTML)."""
    first = strip.first
    if first is None:
        return ""
    if first.kind == "pictures":
        return f"Drawn: the first {len(first.real)} pictures of each."
    plane = f"Drawn: {escape(first.axes)}, in" if first.axes else "In"
    return f"{plane} the same window for all panels of a row; behind, in grey, real data."


def _panel(study: Study, strip: Strip, index: int, entry: Entry | None) -> str:
    label = "real data" if entry is None else entry.label
    series = None if entry is None else entry.series
    drawing, height = _drawn(strip, series, 200)
    name = f"{label}, {strip.data}"
    picture = plots.standalone(drawing, 200, height, label=name)
    mark = "" if series is None else plots.swatch(series)
    seed = ""
    if entry is not None and len(entry.runs) > 1:
        seed = f" <small>seed {escape(_words(entry.shown.get('seed')))}</small>"
    if entry is None or entry.series in strip.tracks:
        place = f'data-strip="{index}" data-series="{"real" if series is None else series}"'
        canvas = f'<canvas {place} role="img" aria-label="{escape(name)}"></canvas><noscript>{picture}</noscript>'
    else:
        canvas = picture
    missed, count = _outside(strip, series)
    told = f"{missed} of {count} points outside the frame" if missed else ""  # the script says the same
    outside = f'<p class="out">{told}</p>' if strip.frame else ""
    return (
        f'<figure class="panel"><figcaption>{mark}<span>{escape(label)}{seed}</span></figcaption>'
        f'<div class="plot" style="aspect-ratio:200/{height:.1f}">{canvas}</div>'
        f"{_panel_metrics(study, strip.data, entry)}{outside}</figure>"
    )


def _outside(strip: Strip, series: int | None) -> tuple[int, int]:
    """How many of the final points are not seen, and of how many."""
    track = strip.first if series is None else strip.tracks.get(series)
    if track is None or strip.frame is None:
        return 0, 0
    points = _unit(track.real if series is None else track.frames[-1])
    return int((np.abs(points) > 1).any(1).sum()), len(points)


def _panel_metrics(study: Study, data: str, entry: Entry | None) -> str:
    lines = []
    for metric in study.metrics([data]):
        value = study.floor(data, metric) if entry is None else _metric(entry.shown, metric).get("value")
        if value is not None:
            name = escape(metric).replace("_", "_<wbr>")
            lines.append(f"<div><dt>{name}</dt><dd>{number(value)}</dd></div>")
    if entry is not None and not entry.finished:
        reason = entry.runs[0].get("reason")
        return f'<p class="why">{escape(reason)}</p>' if reason else ""
    return f"<dl>{''.join(lines)}</dl>" if lines else ""


def overview(study: Study, found: Sequence[Strip], title: str) -> str:
    """The final samples of the whole study as one standalone SVG."""

    def cell(strip: Strip, entry: Entry | None) -> plots.Cell:
        metric = study.metric(strip.data)
        value = study.floor(strip.data, metric) if entry is None else _metric(entry.shown, metric).get("value")
        series = None if entry is None else entry.series
        caption = [number(value)] if value is not None else []
        outside, count = _outside(strip, series)
        if outside:
            caption.append(f"{outside} of {count} outside")
        label = "real data" if entry is None else entry.label
        return plots.Cell(label, ", ".join(caption), lambda width: _drawn(strip, series, width), series)

    groups = [
        (s.data, [*([] if s.first is None else [cell(s, None)]), *(cell(s, e) for e in s.entries)]) for s in found
    ]
    metrics = {study.metric(data): data for data in study.groups}
    names = [metric if len(metrics) == 1 else f"{metric} on {data}" for metric, data in metrics.items()]
    scores = f", with {' or '.join(names)} below (smaller is better)" if 0 < len(names) < 4 else ""
    behind = " Real data in grey behind." if any(strip.frame for strip in found) else ""
    return plots.overview(title, groups, f"Final samples{scores}.{behind}")


# -------------------------------------------------------------------------------------------- charts


def _positive(values: Sequence[float | None]) -> bool:
    return bool(values) and all(v is not None and math.isfinite(v) and v > 0 for v in values)


def _mean_line(entry: Entry, curves: Sequence[tuple[list[float], list[float]]]) -> plots.Line | None:
    """An entry's line: the mean of its runs', over what they have in common."""
    if not curves:
        return None
    length = min(len(x) for x, _ in curves)
    if any(x[:length] != curves[0][0][:length] for x, _ in curves):
        curves = curves[:1]
        length = len(curves[0][0])
    y = np.mean([y[:length] for _, y in curves], axis=0)
    runs = curves if len(curves) > 1 else ()
    return plots.Line(entry.series, entry.label, curves[0][0][:length], [float(v) for v in y], runs)


def _noise_lines(entries: Sequence[Entry]) -> list[plots.Line]:
    lines = []
    for entry in entries:
        curves = []
        for row in entry.finished:
            error, edges = row.get("x0_error"), row.get("noise_bins")
            if error and edges and len(edges) == len(error) + 1 and _positive(error):
                centres = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
                curves.append((centres, [float(e) for e in error]))
        lines.append(_mean_line(entry, curves))
    return [line for line in lines if line is not None]


def history(folder: Path) -> tuple[list[float], list[float]]:
    """Steps and mean x0 error of a run; empty where its log is missing or short."""
    steps, errors = [], []
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return [], []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed
        error = entry.get("x0_error") if isinstance(entry, dict) else None
        if isinstance(error, list) and _positive(error) and isinstance(entry.get("step"), int):
            steps.append(float(entry["step"]))
            errors.append(statistics.fmean(error))
    return steps, errors


def _learning_lines(entries: Sequence[Entry], out: Path) -> list[plots.Line]:
    lines = []
    for entry in entries:
        curves = [history(out / str(row.get("run", "?"))) for row in entry.finished or entry.runs]
        lines.append(_mean_line(entry, [curve for curve in curves if curve[0]]))
    return [line for line in lines if line is not None]


def _chart(data: str, lines: Sequence[plots.Line], kind: str) -> str:
    """One data set's chart with its caption (HTML)."""
    names = ", ".join(line.label for line in lines)
    if kind == "noise":
        label = f"x0 error by noise level on {data}: {names}"
        picture = plots.line_chart(
            lines, label=label, x_words="noise level t", x_end=1.0, ends=("data", "noise"), markers=10
        )
    else:
        end = max(x for line in lines for x in line.x)
        label = f"Mean x0 error during training on {data}: {names}"
        picture = plots.line_chart(lines, label=label, x_words="training step", x_end=end, markers=4)
    beyond = [
        f"{escape(line.label)} {'leaves' if min(line.y) <= plots.CUT else 'lies above'} the chart, "
        f"up to {number(max(line.y))}"
        for line in lines
        if max(line.y) > plots.CUT
    ]
    note = f"<small>{', '.join(beyond)}</small>" if beyond else ""
    return f'<figure class="chart"><figcaption><b>{escape(data)}</b>{note}</figcaption>{picture}</figure>'


def _legend(study: Study, lines: Iterable[plots.Line]) -> str:
    used = sorted({line.series for line in lines})
    items = "".join(f"<li>{plots.swatch(i)}{escape(study.labels[i])}</li>" for i in used)
    return f'<ul class="legend" aria-label="Legend">{items}</ul>'


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="charts{" two" if len(figures) in (2, 4) else ""}">{"".join(figures)}</div>'


def noise_section(study: Study) -> str:
    """Errors by noise level: charts, and the same as numbers (HTML)."""
    charts = {data: _noise_lines(entries) for data, entries in study.groups.items()}
    charts = {data: lines for data, lines in charts.items() if lines}
    if not charts:
        return ""
    figures = [_chart(data, lines, "noise") for data, lines in charts.items()]
    tables = "".join(_noise_table(data, lines) for data, lines in charts.items())
    return (
        '<section><h2 id="noise">Error by noise level</h2>'
        "<p>Every prediction turned into x0, and its mean squared error on held-out data divided by the data’s "
        "variance: 1 (dotted) is as bad as guessing the mean. It is the only loss that may be compared across targets, "
        "whatever each was trained on, but it does not rank the quality of samples.</p>"
        f"{_legend(study, (line for lines in charts.values() for line in lines))}{_grid(figures)}"
        f"<details><summary>The same as numbers</summary>{tables}</details></section>"
    )


def _noise_table(data: str, lines: Sequence[plots.Line]) -> str:
    longest = max(lines, key=lambda line: len(line.x))
    head = "".join(f'<th scope="col" class="n">{x:.2f}</th>' for x in longest.x)
    rows = ""
    for line in lines:
        cells = "".join(f'<td class="n">{number(y)}</td>' for y in line.y)
        rows += f'<tr><th scope="row">{escape(line.label)}</th>{cells}</tr>'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="x0 error on {escape(data)}, scrolls sideways">'
        f"<table><caption>{escape(data)}: x0 error / data variance</caption>"
        f'<thead><tr><th scope="col">t</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def learning_section(study: Study, out: Path) -> str:
    """Learning curves (HTML)."""
    charts = {data: _learning_lines(entries, out) for data, entries in study.groups.items()}
    charts = {data: lines for data, lines in charts.items() if lines}
    if not charts:
        return ""
    figures = [_chart(data, lines, "learning") for data, lines in charts.items()]
    return (
        '<section><h2 id="learning">Learning curves</h2>'
        "<p>The same error, averaged over all noise levels, during training: whether a run had settled when it "
        "ended.</p>"
        f"{_legend(study, (line for lines in charts.values() for line in lines))}{_grid(figures)}"
        "</section>"
    )


# -------------------------------------------------------------------------------------------- the page


def _facts(study: Study) -> str:
    """How much was compared, and what all runs share."""
    rows = [row for entry in study.entries for row in entry.runs]
    if not rows:
        return ""

    def many(n: int, what: str) -> str:
        return f"{n} {what}{'' if n == 1 else 's'}"

    facts = [many(len(rows), "run"), many(len(study.groups), "data set"), many(len(study.labels), "target")]
    for name, before in (
        ("network", ""),
        ("loss_space", "loss in "),
        ("weighting", "weighting "),
        ("seed", "seed "),
    ):
        values = {_words(row.get(name)) for row in rows if row.get("status") != "failed"}
        if len(values) == 1 and values != {"none"}:
            facts.append(before + values.pop())
    steps = {row.get("steps") for row in rows}
    if len(steps) == 1 and None not in steps:
        facts.append(f"{steps.pop():,} steps")
    return "".join(f"<li>{escape(fact)}</li>" for fact in facts)


def _samples_section(study: Study, found: Sequence[Strip]) -> tuple[str, str]:
    """The samples with their slider (HTML), and the data for it (JSON)."""
    steps = max((len(t.times) - 1 for strip in found for t in strip.tracks.values()), default=0)
    abouts = [_about(strip) for strip in found]
    shared = abouts[0] if len(set(abouts)) == 1 else ""
    figures = "".join(
        samples_figure(study, strip, i, "" if shared else f'<p class="about">{about}</p>')
        for i, (strip, about) in enumerate(zip(found, abouts, strict=True))
    )
    thin = any(len(t.kept) < len(t.times) for strip in found for t in strip.tracks.values())
    note = " Some steps are left out to keep this page small." if thin else ""
    resource = files(__package__).joinpath("template.html").read_text(encoding="utf-8")
    controls = resource.split("<!-- controls -->")[1] if steps else ""
    page = (
        '<section class="samples"><h2 id="samples">Samples</h2>'
        f"<p>What each model believed the clean data x0 to be at every sampling step, from noise to the final "
        f"samples. {shared}{note}</p>"
        f"{_filled(controls, {'steps': str(steps)})}{figures}</section>"
    )
    data = {"steps": steps, "strips": [_packed(strip) for strip in found]}
    # In a script element nothing is escaped but what could end it.
    return page, json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def _filled(template: str, fields: dict[str, str]) -> str:
    """The template with its {{fields}}; what is filled in is not searched again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def render(
    study: Study, found: Sequence[Strip], out: Path, *, title: str, description: str, notes: Sequence[str]
) -> str:
    """The whole page."""
    script = _resource("page.js")
    samples, data = _samples_section(study, found)
    page = _resource("template.html").split("<!-- controls -->")
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return _filled(
        page[0] + page[2],
        {
            "title": escape(title),
            "description": f'<p class="description">{escape(description)}</p>' if description.strip() else "",
            "facts": _facts(study),
            "colours": plots.page_colours(),
            "style": _resource("page.css"),
            "verdict": verdict(study),
            "leaderboard": leaderboard(study),
            "samples": samples,
            "noise": noise_section(study),
            "learning": learning_section(study, out),
            "notes": f'<section><h2 id="notes">Notes</h2><ul>{listed}</ul></section>' if notes else "",
            "version": escape(__version__),
            "data": data,
            "script": script,
            "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        },
    )


def write_report(
    out: Path, *, title: str, description: str, rows: list[dict[str, Any]], rank_by: str, notes: list[str]
) -> Path:
    """Write a study's page and its overview figure.

    Args:
        out: the study's folder: it holds a folder for each run, named by the row's "run", with
            ``trajectory.npz`` and ``metrics.jsonl`` (either may be missing).
        title, description: what was studied, in plain words.
        rows: the leaderboard. Rows whose "best_lr" is false are left out.
        rank_by: the metric that ranks; data sets it does not apply to are ranked by their first.
        notes: what a reader must know to judge the study.

    Returns:
        The path of ``report.html``; ``overview.svg`` lies beside it. Both appear whole or not at all.

    Raises:
        OutputError: if they cannot be written.
    """
    out = Path(out)
    study = Study.of(rows, rank_by)
    found = strips(study, out)
    write_text(out / "overview.svg", overview(study, found, title))
    write_text(out / "report.html", render(study, found, out, title=title, description=description, notes=notes))
    return out / "report.html"
