"""The leaderboard: the rows of all runs, in order, and as text."""

from __future__ import annotations

import math
from typing import Any

from .recipe import Recipe


def ranked(rows: list[dict[str, Any]], recipe: Recipe) -> list[dict[str, Any]]:
    """The rows in the order of the leaderboard, each told whether its learning rate is its best.

    Data come in the order of the recipe; within them the best comes first by the ranking metric,
    and what did not finish comes last.
    """
    place = {run: i for i, run in enumerate(recipe.runs)}
    order = list(dict.fromkeys(row["data"] for row in sorted(rows, key=lambda r: place[r["run"]])))
    rows = [_with_rates(row, rows, recipe) for row in rows]
    return sorted(rows, key=lambda r: (order.index(r["data"]), score(r, recipe), place[r["run"]]))


def rank_metric(row: dict[str, Any], recipe: Recipe) -> str:
    """The metric that orders this row's data."""
    first = str(next(iter(row["metrics"])))
    return recipe.rank_by if recipe.rank_by and recipe.rank_by in row["metrics"] else first


def score(row: dict[str, Any], recipe: Recipe) -> float:
    """The value of the ranking metric; infinite for what did not finish."""
    if not row["metrics"]:
        return math.inf
    value = row["metrics"][rank_metric(row, recipe)]["value"]
    return math.inf if value is None else float(value)


def _with_rates(row: dict[str, Any], rows: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """Runs that differ in nothing but their learning rate compete; the best stands for all."""

    def apart_from_rate(r: dict[str, Any]) -> dict[str, Any]:
        config = recipe.runs[r["run"]].to_dict()
        config["train"].pop("lr")
        return config

    rivals = [r for r in rows if apart_from_rate(r) == apart_from_rate(row)]
    best = min(rivals, key=lambda r: score(r, recipe))
    return {**row, "best_lr": row["run"] == best["run"], "lr_tried": sorted(r["lr"] for r in rivals)}


def number(value: float | None) -> str:
    """Three significant digits; what rounding errors leave of zero is zero."""
    if value is None:
        return "–"
    if abs(value) < 1e-7:
        return "0"
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.2e}"


def as_text(rows: list[dict[str, Any]], recipe: Recipe) -> str:
    """The leaderboard as a table for a terminal, the best learning rate of each only."""
    shown = [row for row in rows if row.get("best_lr", True)]
    metrics = list(dict.fromkeys(name for row in shown for name in row["metrics"]))
    table = [["data", "target", *metrics, "time", ""]]
    data = None
    for row in shown:
        if row["data"] != data:
            data = row["data"]
            floors = [number(row["metrics"].get(name, {}).get("floor")) for name in metrics]
            table.append([data, "(real data)", *floors, "", "floor"])
        alike = [r for r in shown if (r["data"], r["target"], r["seed"]) == (data, row["target"], row["seed"])]
        table.append(["", *_cells(row, metrics, by_run=len(alike) > 1)])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = [
        "  ".join(
            c.ljust(w) if i < 2 or i == len(line) - 1 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]
    lines.insert(1, "  ".join("─" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def _cells(row: dict[str, Any], metrics: list[str], by_run: bool) -> list[str]:
    target = row["target"] if isinstance(row["target"], str) else row["target"]["name"]
    target = row["run"] if by_run else target
    values = [number(row["metrics"].get(name, {}).get("value")) for name in metrics]
    remarks = [] if row["status"] == "finished" else [row["status"]]
    if len(row.get("lr_tried", [])) > 1:
        remarks.append(f"lr {row['lr']:g}, the best of {len(row['lr_tried'])}")
    if row["seed"]:
        remarks.append(f"seed {row['seed']}")
    return [target, *values, f"{row['wall_s']:.1f} s", "; ".join(remarks)]
