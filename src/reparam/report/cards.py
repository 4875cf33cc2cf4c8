"""How the scores of a study were measured: what all runs share, what differs, and what to be warned of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from .plots import escape
from .rows import Row, Study, words_of

#: A run's record, flat: words by the path of what they are of, such as ("samples", "n").
_Facts = dict[tuple[str, ...], str]
#: So many runs are named one by one.
_NAMED = 6
#: Of a digest so many digits are shown.
_DIGEST, _DIGITS = re.compile("[0-9a-f]{32,}"), 12


def cards_section(study: Study) -> str:
    """The section "How this was measured"; empty where no run tells (HTML)."""
    rows = [row for entry in study.entries for row in entry.runs]
    with_card = [row for row in rows if isinstance(row.get("card"), dict)]
    facts = {str(row.get("run", "?")): found for row in with_card or rows if (found := _facts(row))}
    warnings = _warnings(with_card)
    if not facts and not warnings:
        return ""
    paths = list(dict.fromkeys(path for found in facts.values() for path in found))
    first = next(iter(facts.values()), {})
    shared = [path for path in paths if all(found.get(path) == first.get(path) for found in facts.values())]
    differing = [path for path in paths if path not in shared]
    without = [str(row.get("run", "?")) for row in rows if str(row.get("run", "?")) not in facts]
    untold = f"<p><small>Nothing is recorded of {escape(_runs(without, len(rows)))}.</small></p>" if without else ""
    details = _shared(first, shared) + _differing(facts, differing) + untold
    return (
        f'<section><h2 id="measured">How this was measured</h2>{_warned(warnings, len(with_card))}'
        + (f"<details><summary>Samples, reference, metrics and versions</summary>{details}</details>" if facts else "")
        + "</section>"
    )


def _facts(row: Row) -> _Facts:
    """All that a row tells of how it was scored, without warnings."""
    card = row.get("card")
    told = card if isinstance(card, dict) else {}
    found: dict[str, Any] = {key: value for key, value in told.items() if key != "warnings"}
    for name, metric in (row.get("metrics") or {}).items():
        settings = metric.get("settings") if isinstance(metric, dict) else None
        own = dict(settings) if isinstance(settings, dict) else {}
        if isinstance(metric, dict) and metric.get("interval_from"):
            own["interval from"] = metric["interval_from"]
        if own:
            found[name] = own
    return dict(_flat((), found))


def _flat(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat((*path, str(key)), inner)
    else:
        yield path, _words(value)


def _words(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:,}"
    words = words_of(value) or "none"
    return words[:_DIGITS] + "…" if _DIGEST.fullmatch(words) else words


def _warnings(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The runs of each warning; rows with a card."""
    found: dict[str, list[str]] = {}
    for row in rows:
        told = row["card"].get("warnings")
        for warning in dict.fromkeys(map(str, told if isinstance(told, list) else [])):
            found.setdefault(warning, []).append(str(row.get("run", "?")))
    return found


def _warned(warnings: dict[str, list[str]], total: int) -> str:
    if not warnings:
        return ""
    items = "".join(
        f"<li><b>Warning:</b> {escape(warning)}<small>{escape(_runs(runs, total))}</small></li>"
        for warning, runs in warnings.items()
    )
    return f'<ul class="warnings">{items}</ul>'


def _runs(runs: Sequence[str], total: int) -> str:
    """Which runs, in few words."""
    if len(runs) == total:
        return "all runs" if total > 1 else runs[0]
    more = len(runs) - _NAMED
    return ", ".join(runs[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _name(path: Sequence[str]) -> str:
    return " ".join(path).replace("_", " ")


def _shared(facts: _Facts, paths: Sequence[tuple[str, ...]]) -> str:
    """What all runs have in common, by its first key."""
    told: dict[str, list[str]] = {}
    for path in paths:
        told.setdefault(path[0], []).append(f"{_name(path[1:])} {facts[path]}".strip())
    items = "".join(
        f"<div><dt>{escape(key.replace('_', ' '))}</dt><dd>{escape('; '.join(values))}</dd></div>"
        for key, values in told.items()
    )
    return f'<dl class="words">{items}</dl>' if items else ""


def _differing(facts: dict[str, _Facts], paths: Sequence[tuple[str, ...]]) -> str:
    """What differs, a line for the runs that agree."""
    if not paths:
        return ""
    lines: dict[str, list[str]] = {}
    for run, found in facts.items():
        lines.setdefault(json.dumps([found.get(path) for path in paths]), []).append(run)
    heads = "".join(f'<th scope="col">{escape(_name(path))}</th>' for path in paths)
    body = ""
    for line, runs in lines.items():
        cells = "".join(f"<td>{'–' if value is None else escape(value)}</td>" for value in json.loads(line))
        body += f'<tr><th scope="row">{escape(_runs(runs, len(facts)))}</th>{cells}</tr>'
    return (
        '<div class="scroll card" tabindex="0" role="region" aria-label="What differs by run, scrolls sideways">'
        f'<table><caption>What differs by run</caption><thead><tr><th scope="col">run</th>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
