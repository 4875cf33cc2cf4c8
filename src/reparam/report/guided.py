"""The same samples again, guided by an earlier state of their own model: what that changes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from . import plots
from .plots import escape, number
from .rows import Entry, Study, metric_of


class Pair(NamedTuple):
    """A metric without guidance and with it, each the mean over the same runs."""

    metric: str
    without: float
    guided: float


def pairs(entry: Entry) -> list[Pair]:
    """What is known of an entry's runs with guidance and without; nothing where none was guided."""
    rows = [row for row in entry.finished if row.get("autoguided")]
    found = []
    for name in dict.fromkeys(name for row in rows for name in row["autoguided"].get("metrics") or {}):
        values = [(metric_of(row, name).get("value"), metric_of(row["autoguided"], name).get("value")) for row in rows]
        known = [(a, b) for a, b in values if a is not None and b is not None]
        if known:
            found.append(Pair(name, *(statistics.fmean(side) for side in zip(*known, strict=True))))
    return found


def how(study: Study) -> str:
    """By which states, and how strongly."""
    rows = [row["autoguided"] for entry in study.entries for row in entry.finished if row.get("autoguided")]
    told = dict.fromkeys(f"that of step {row['step']:,} at weight {row['weight']:g}" for row in rows)
    return " or ".join(told)


def lines(study: Study) -> Iterator[str]:
    """For a terminal: a line an entry; none where nothing was guided."""
    told = [(entry, pairs(entry)) for entry in study.entries]
    if not any(found for _, found in told):
        return
    yield f"guided by an earlier state of each model, {how(study)}:"
    for entry, found in told:
        if found:
            values = "; ".join(f"{p.metric} {number(p.guided)} (without {number(p.without)})" for p in found)
            yield f"  {entry.label}: {values}"


def guided_section(study: Study) -> str:
    """The table of all entries that were sampled with guidance, too (HTML); empty where none was."""
    told = {data: [(e, pairs(e)) for e in study.ranked(data)] for data in study.groups}
    metrics = list(dict.fromkeys(p.metric for rows in told.values() for _, found in rows for p in found))
    if not metrics:
        return ""
    heads = "".join(_head(metric) for metric in metrics)
    bodies = "".join(_group(study, data, rows, metrics) for data, rows in told.items() if any(f for _, f in rows))
    return (
        '<section><h2 id="guided">Guided by an earlier self</h2>'
        f"<p>The same noise again, with each model guided by an earlier state of itself (autoguidance), "
        f"{escape(how(study))}. Guidance draws samples towards where the model has become surer, so a distance to the "
        "data may grow while fewer samples are outliers.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Guided samples, scrolls sideways">'
        f'<table><thead><tr><th scope="col">target</th>{heads}</tr></thead>{bodies}</table></div></section>'
    )


def _head(metric: str) -> str:
    name = escape(metric).replace("_", "_<wbr>")
    return f'<th scope="col" class="n">{name}<small>without, with</small></th>'


def _cell(pair: Pair | None) -> str:
    return "<td></td>" if pair is None else f'<td class="n">{number(pair.without)}, {number(pair.guided)}</td>'


def _group(study: Study, data: str, rows: Sequence[tuple[Entry, list[Pair]]], metrics: Sequence[str]) -> str:
    body = ""
    for entry, found in rows:
        by_name = {p.metric: p for p in found}
        cells = "".join(_cell(by_name.get(metric)) for metric in metrics)
        body += f'<tr><th scope="row">{plots.swatch(entry.series)}<span>{escape(entry.label)}</span></th>{cells}</tr>'
    floors = "".join(f'<td class="n">{number(study.floor(data, m))}</td>' for m in metrics)
    head = f'<tr class="group"><th scope="rowgroup" colspan="{len(metrics) + 1}"><span>{escape(data)}</span></th></tr>'
    return f'<tbody>{head}{body}<tr class="floor"><th scope="row">real data (floor)</th>{floors}</tr></tbody>'
