"""The leaderboard: the rows of all runs, in order, and as text."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from dataclasses import asdict
from typing import Any

from ..report import guided, published
from ..report.rows import Entry, Study
from .recipe import Recipe

#: A table for a terminal is widened by intervals up to so many columns.
_WIDEST = 100


def ranked(rows: list[dict[str, Any]], recipe: Recipe) -> list[dict[str, Any]]:
    """The rows in the order of the leaderboard, each told whether its learning rate is its best.

    Data come in the order of the recipe; within them the best comes first by the ranking metric's
    mean over the seeds of a setting, and what did not finish comes last. ``group`` is the same for runs that
    differ in seed and learning rate alone.
    """
    place = {run: i for i, run in enumerate(recipe.runs)}
    rows = _with_rates(sorted(rows, key=lambda r: place[r["run"]]), recipe)
    order = list(dict.fromkeys(row["data"] for row in rows))
    settings: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        settings.setdefault((row["group"], row["lr"]), []).append(score(row, recipe))

    def key(row: dict[str, Any]) -> tuple[int, bool, float, int]:
        lost = math.isinf(score(row, recipe))
        return (order.index(row["data"]), lost, _mean(settings[row["group"], row["lr"]]), place[row["run"]])

    return sorted(rows, key=key)


def rank_metric(row: dict[str, Any], recipe: Recipe) -> str:
    """The metric that orders this row's data."""
    first = str(next(iter(row["metrics"])))
    return recipe.rank_by if recipe.rank_by and recipe.rank_by in row["metrics"] else first


def score(row: dict[str, Any], recipe: Recipe) -> float:
    """The value of the ranking metric, negated where more is better; infinite for what did not finish."""
    if not row["metrics"]:
        return math.inf
    found = row["metrics"][rank_metric(row, recipe)]
    if found["value"] is None:
        return math.inf
    return -float(found["value"]) if found.get("better") == "higher" else float(found["value"])


def _mean(scores: list[float]) -> float:
    """The mean of those that are known."""
    known = [s for s in scores if not math.isinf(s)]
    return statistics.fmean(known) if known else math.inf


def _with_rates(rows: list[dict[str, Any]], recipe: Recipe) -> list[dict[str, Any]]:
    """Runs that differ in their learning rate alone compete; the best by the mean over all seeds stands for them.

    A rate at which fewer seeds are lost comes before one with the better mean of those that are left.
    """
    groups = _groups(rows, recipe)
    rates: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        rates.setdefault(groups[row["run"]], {}).setdefault(row["lr"], []).append(score(row, recipe))

    def place(scores: list[float]) -> tuple[int, float]:
        return sum(math.isinf(s) for s in scores), _mean(scores)

    best = {group: min(found, key=lambda lr: place(found[lr])) for group, found in rates.items()}
    return [
        {**row, "group": group, "best_lr": row["lr"] == best[group], "lr_tried": sorted(rates[group])}
        for row in rows
        for group in [groups[row["run"]]]
    ]


def _groups(rows: list[dict[str, Any]], recipe: Recipe) -> dict[str, str]:
    """By run, the first run that differs from it in seed and learning rate alone.

    Runs that are the same in these too are of different groups.
    """
    firsts: dict[str, str] = {}
    again: Counter[str] = Counter()
    groups = {}
    for row in rows:
        config = recipe.runs[row["run"]].to_dict()
        again[json.dumps(config, sort_keys=True)] += 1
        config = {**config, "again": again[json.dumps(config, sort_keys=True)]}
        config["train"] = {**config["train"], "lr": None}
        key = json.dumps({**config, "seed": None}, sort_keys=True)
        groups[row["run"]] = firsts.setdefault(key, row["run"])
    return groups


def number(value: float | None) -> str:
    """Three significant digits; what rounding errors leave of zero is zero."""
    if value is None:
        return "–"
    if abs(value) < 1e-7:
        return "0"
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.2e}"


def of_calibration(row: dict[str, Any]) -> list[str]:
    """What a line on a run says of its variance, over all noise levels; nothing where its model states none."""
    if not row.get("calibration"):
        return []
    total = row["calibration"]["total"]
    return [
        f"z² {number(total['z2']['value'])} ± {number(total['z2']['error'])}",
        f"calibration error {number(total['calibration_error'])} (by chance {number(total['calibration_floor'])})",
        f"−log q {number(total['nll']['value'])} nats an element",
    ]


def as_text(rows: list[dict[str, Any]], recipe: Recipe) -> str:
    """The leaderboard as a table for a terminal: a line a target, at its best learning rate only.

    A target's value is its mean over seeds, ± half of the 95 % interval of that mean; with one seed it
    is the run's value, and for the ranking metric, where there is room, ± half of its samples' interval.
    """
    study = Study.of(rows, rank_metric(rows[0], recipe))
    metrics = study.metrics()
    several = any(len(entry.runs) > 1 for entry in study.entries)
    lines = _lines(study, metrics, intervals=metrics if several else [study.rank_by])
    if not several and len(lines[0]) > _WIDEST:
        lines = _lines(study, metrics, intervals=[])
    told = told_of(recipe)
    said = [*lines, *guided.lines(study), *([""] if told.rows else []), *published.lines(told, study)]
    return "\n".join(line.rstrip() for line in said)


def told_of(recipe: Recipe) -> published.Published:
    """What a recipe says of itself, and its published numbers, as the page takes them."""
    rows = [asdict(row) for row in recipe.published]
    return published.Published(rows, asdict(recipe.about), recipe.tiny, tuple(recipe.runs))


def estimate_lines(recipe: Recipe) -> list[str]:
    """The same for a reader who asks what the recipe would cost."""
    return [*recipe.about.lines(), *(f"  {line}" for line in published.lines(told_of(recipe)))]


def _lines(study: Study, metrics: list[str], intervals: list[str]) -> list[str]:
    """All lines of the table, of the same length."""
    table = [["data", "target", *metrics, "time", ""]]
    for data in study.groups:
        table.append([data, "(real data)", *(number(study.floor(data, name)) for name in metrics), "", "floor"])
        table += [["", *_cells(study, entry, metrics, intervals)] for entry in study.ranked(data)]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = [
        "  ".join(
            c.ljust(w) if i < 2 or i == len(line) - 1 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]
    lines.insert(1, "  ".join("─" * w for w in widths))
    return lines


def _cells(study: Study, entry: Entry, metrics: list[str], intervals: list[str]) -> list[str]:
    values = []
    for name in metrics:
        half = entry.half(name) if name in intervals else None
        values.append(number(entry.value(name)) + ("" if half is None else f" ± {number(half)}"))
    times = [row["wall_s"] for row in entry.finished or entry.runs]
    return [_named(study, entry), *values, f"{statistics.fmean(times):.1f} s", "; ".join(_remarks(study, entry))]


def _named(study: Study, entry: Entry) -> str:
    """The target's name; of a likelihood, and where several entries of the data share it, its label on the page."""

    def target(e: Entry) -> str:
        found = e.shown["target"]
        return str(found if isinstance(found, str) else found["name"])

    name = target(entry)
    alone = sum(target(e) == name for e in study.groups[entry.data]) == 1
    return name if alone and name not in ("gaussian", "file") else entry.label


def _remarks(study: Study, entry: Entry) -> list[str]:
    first, several = entry.runs[0], len(entry.runs) > 1
    lost = [row for row in entry.runs if row not in entry.finished]
    remarks = []
    if not entry.finished:
        remarks.append(str(first["status"]))
    if several:
        remarks.append(f"({len(entry.runs)} seeds)")
        remarks += [f"seed {row['seed']} {row['status']}" for row in lost if entry.finished]
    if len(first.get("lr_tried", [])) > 1:
        remarks.append(f"lr {first['lr']:g}, the best of {len(first['lr_tried'])}")
    if first["seed"] and not several:
        remarks.append(f"seed {first['seed']}")
    standing = study.standing(entry, study.metric(entry.data))
    if standing == "no difference":
        remarks.append("no difference from the best")
    if standing == "better":
        remarks.append("better than the first on the seeds that both finished")
    return remarks
