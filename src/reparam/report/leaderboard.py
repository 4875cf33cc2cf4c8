"""The table of a study: every target's scores, settings and costs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from . import plots
from .plots import escape, number
from .rows import DUST, Entry, Study, words_of

#: What is said below a value, by how the entry stands to the best.
_STANDINGS = {"no difference": "no difference from best", "better": "better on shared seeds"}


def leaderboard(study: Study) -> str:
    """The table of all entries, by data set (HTML)."""
    metrics = study.metrics()
    heads = "".join(_metric_head(study, name) for name in metrics)
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
        f"<table>{head}{bodies}</table></div>{_definitions(study, metrics)}{hidden}"
    )


def _metric_head(study: Study, name: str) -> str:
    words, higher = escape(name).replace("_", "_<wbr>"), study.higher(name)
    ranks = name == study.rank_by
    sort = f' aria-sort="{"descending" if higher else "ascending"}"' if ranks else ""
    remarks = ["higher is better"] * higher + ["ranked by this"] * ranks
    told = "".join(f"<small>{remark}</small>" for remark in remarks)
    return f'<th scope="col" class="n"{sort}>{words}{told}</th>'


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
        told = ", ".join(f"seed {words_of(row.get('seed'))} {row.get('status')}" for row in lost)
        remarks.append(told)
    return f"<small>{escape('; '.join(remarks))}</small>" if remarks else ""


def _value_cell(study: Study, entry: Entry, metric: str) -> str:
    value, half = entry.value(metric), entry.half(metric)
    several = study.comparisons(entry.data, metric) > 0 or len(study.groups[entry.data]) > 1
    best = study.ranked(entry.data, metric)[0].value(metric)
    words = number(value)
    if half is not None:
        words += f"<small>± {number(half)}</small>"
    if several and value is not None and value == best and abs(value) >= DUST:
        words = f"<b>{words}</b>"
    if metric == study.metric(entry.data):
        standing = _STANDINGS.get(study.standing(entry, metric) or "")
        words += f'<small class="same">{standing}</small>' if standing else ""
    return f'<td class="n">{words}</td>'


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


def _definitions(study: Study, metrics: Sequence[str]) -> str:
    """What the metrics mean (HTML)."""
    from ..metrics import METRICS  # imports torch
    from ..metrics.model import MODEL_METRICS

    words = {name: m.words for name, m in METRICS.items()} | {name: m.words for name, m in MODEL_METRICS.items()}
    known = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(words[name])}</dd></div>" for name in metrics if name in words
    )
    higher = [name for name in metrics if study.higher(name)]
    direction = "Smaller is better" + (f", but of {escape(', '.join(higher))} more is" if higher else "")
    floor = (
        f"<p>{direction}. The floor is what as many fresh real data get: no model can be expected to do "
        f"better. In bold: the best value of each column.{_intervals(study, metrics)}</p>"
    )
    return floor + (f'<dl class="words">{known}</dl>' if known else "")


def _intervals(study: Study, metrics: Sequence[str]) -> str:
    """What stands behind ±, where it stands somewhere."""
    counts = [len(e.values(m)) for e in study.entries for m in metrics if e.half(m) is not None]
    if not counts:
        return ""
    of = ["of the mean over seeds"] * (max(counts) > 1) + ["of one run’s samples"] * (min(counts) == 1)
    return f" ±: half of the 95 % interval {' or, with one seed, '.join(of)}."
