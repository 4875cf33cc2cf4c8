"""Errors by noise level and during training, as charts and as numbers."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from . import plots
from .charts import CUT, Line, line_chart
from .plots import escape, number
from .rows import Entry, Study


def _positive(values: Sequence[float | None]) -> bool:
    return bool(values) and all(v is not None and math.isfinite(v) and v > 0 for v in values)


def _mean_line(entry: Entry, curves: Sequence[tuple[list[float], list[float]]]) -> Line | None:
    """An entry's line: the mean of its runs', over what they have in common."""
    if not curves:
        return None
    length = min(len(x) for x, _ in curves)
    if any(x[:length] != curves[0][0][:length] for x, _ in curves):
        curves = curves[:1]
        length = len(curves[0][0])
    y = np.mean([y[:length] for _, y in curves], axis=0)
    runs = curves if len(curves) > 1 else ()
    return Line(entry.series, entry.label, curves[0][0][:length], [float(v) for v in y], runs)


def _noise_lines(entries: Sequence[Entry]) -> list[Line]:
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


def _learning_lines(entries: Sequence[Entry], out: Path) -> list[Line]:
    lines = []
    for entry in entries:
        curves = [history(out / str(row.get("run", "?"))) for row in entry.finished or entry.runs]
        lines.append(_mean_line(entry, [curve for curve in curves if curve[0]]))
    return [line for line in lines if line is not None]


def _chart(data: str, lines: Sequence[Line], kind: str) -> str:
    """One data set's chart with its caption (HTML)."""
    names = ", ".join(line.label for line in lines)
    if kind == "noise":
        label = f"x0 error by noise level on {data}: {names}"
        picture = line_chart(lines, label=label, x_words="noise level t", x_end=1.0, ends=("data", "noise"), markers=10)
    else:
        end = max(x for line in lines for x in line.x)
        label = f"Mean x0 error during training on {data}: {names}"
        picture = line_chart(lines, label=label, x_words="training step", x_end=end, markers=4)
    beyond = [
        f"{escape(line.label)} {'leaves' if min(line.y) <= CUT else 'lies above'} the chart, "
        f"up to {number(max(line.y))}"
        for line in lines
        if max(line.y) > CUT
    ]
    note = f"<small>{', '.join(beyond)}</small>" if beyond else ""
    return f'<figure class="chart"><figcaption><b>{escape(data)}</b>{note}</figcaption>{picture}</figure>'


def legend(study: Study, lines: Iterable[Line]) -> str:
    """The targets that occur among lines (HTML)."""
    used = sorted({line.series for line in lines})
    items = "".join(f"<li>{plots.swatch(i)}{escape(study.labels[i])}</li>" for i in used)
    return f'<ul class="legend" aria-label="Legend">{items}</ul>'


def grid(figures: Sequence[str]) -> str:
    """Charts side by side, as many as fit (HTML)."""
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
        f"{legend(study, (line for lines in charts.values() for line in lines))}{grid(figures)}"
        f"<details><summary>The same as numbers</summary>{tables}</details></section>"
    )


def _noise_table(data: str, lines: Sequence[Line]) -> str:
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
        f"{legend(study, (line for lines in charts.values() for line in lines))}{grid(figures)}"
        "</section>"
    )
