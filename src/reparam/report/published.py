"""Numbers that others published, beside those of the runs: told apart from them, and never ranked among them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from . import plots
from .plots import escape, number
from .rows import Entry, Row, Study, words_of

#: Who has measured nothing of it.
_HEADING = "published, not measured here"


@dataclass(frozen=True)
class Published:
    """What a recipe says of itself, and what others published of what it compares.

    Attributes:
        rows: mappings with "label", "metric", "value" (None: it failed), "source" and "run" ("" for none).
        about: a mapping with "source", "hardware", "expected" and "unsaid".
        tiny: whether the study is a small version of what was published.
        runs: those of the study.
    """

    rows: Sequence[dict[str, Any]] = ()
    about: dict[str, Any] | None = None
    tiny: bool = False
    runs: Sequence[str] = ()

    def by_source(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """The rows by what they measure and where that is published."""
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault((row["metric"], row["source"]), []).append(row)
        return found

    @property
    def heading(self) -> str:
        return _HEADING + (", of the recipe at its full size" if self.tiny else "")

    def remark(self, row: dict[str, Any]) -> str:
        """What is said of a number whose run the study lacks, as where it is smaller or changed; else nothing."""
        if not row.get("run") or not self.runs or runs_beside(row, self.runs):
            return ""
        return f"no counterpart here: there is no run {row['run']}"


def runs_beside(row: dict[str, Any], runs: Sequence[str]) -> list[str]:
    """Those runs that a published number stands beside: the one of its name, of all seeds where several are swept."""
    name = row.get("run") or ""
    return [run for run in runs if name and name in (run, re.sub(r"-seed\d+$", "", run))]


def lines(told: Published, study: Study | None = None) -> Iterator[str]:
    """For a terminal: a line a number; with a study, what its run came to."""
    for (metric, source), rows in told.by_source().items():
        yield f"{told.heading}: {metric} ({source})"
        widest = max(len(row["label"]) for row in rows)
        for row in rows:
            line = f"  {row['label']:<{widest}}  {_value(row):>7}"
            if remark := told.remark(row):
                line += f"  ({remark})"
            yield line + (_ours_in_words(study, row) if study and not told.tiny else "")


def _ours_in_words(study: Study, row: dict[str, Any]) -> str:
    entry = _entry(study, row)
    if entry is None:
        return ""
    metric = study.metric(entry.data)
    return f"  here: {metric} {number(entry.value(metric))} {measure(entry.shown, metric)}"


def _value(row: dict[str, Any]) -> str:
    return "failed" if row["value"] is None else f"{row['value']:g}"


def _entry(study: Study, row: dict[str, Any]) -> Entry | None:
    """What of the study a published number stands beside."""
    for entry in study.entries:
        if runs_beside(row, [str(run.get("run")) for run in entry.runs]):
            return entry
    return None


def measure(row: Row, metric: str) -> str:
    """What a metric of a run is, in the words that published numbers need: of a Fréchet distance, whether it is FID."""
    card = row.get("card") or {}
    n = (card.get("samples") or {}).get("n")
    of = f"on {n:,} samples" if isinstance(n, int) else "on some samples"
    if metric != "frechet_distance":
        return f"{of}, another measure"
    features = str((card.get("extractor") or {}).get("name", "unknown"))
    return f"{of}: {'FID' if features.startswith('inception') else f'not FID, its features are {features}'}"


def published_section(told: Published, study: Study) -> str:
    """The published numbers beside the study's own (HTML); empty where there are none."""
    if not told.rows:
        return ""
    ours = {} if told.tiny else {id(row): entry for row in told.rows if (entry := _entry(study, row)) is not None}
    said = "Others measured these, on their own runs and by their own means; nothing of it is measured here. "
    said += (
        "This study is a small version of the recipe, and its scores are of other data: nothing stands side by side."
        if told.tiny
        else "Two numbers in a line are of the same setting, and comparable only where what they measure is the same."
    )
    here = '<th scope="col">our run</th><th scope="col" class="n">measured here</th>' if ours else ""
    bodies = "".join(_group(study, told, key, rows, ours) for key, rows in told.by_source().items())
    return (
        f'<section class="published"><h2 id="published">{escape(told.heading[0].upper() + told.heading[1:])}</h2>'
        f"<p>{said}</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Published numbers, scroll sideways">'
        f'<table><thead><tr><th scope="col">published</th><th scope="col" class="n">published value</th>{here}'
        f"</tr></thead>{bodies}</table></div></section>"
    )


def _group(
    study: Study,
    told: Published,
    key: tuple[str, str],
    rows: Sequence[dict[str, Any]],
    ours: dict[int, Entry],
) -> str:
    metric, source = key
    head = (
        f'<tr class="group"><th scope="rowgroup" colspan="{4 if ours else 2}"><span>{escape(metric)}</span>'
        f"<small>{escape(source)}</small></th></tr>"
    )
    body = "".join(
        f'<tr><th scope="row">{escape(row["label"])}{_remark(told, row)}</th><td class="n">{escape(_value(row))}</td>'
        f"{_ours(study, ours.get(id(row))) if ours else ''}</tr>"
        for row in rows
    )
    return f"<tbody>{head}{body}</tbody>"


def _remark(told: Published, row: dict[str, Any]) -> str:
    remark = told.remark(row)
    return f"<small>{escape(remark)}</small>" if remark else ""


def _ours(study: Study, entry: Entry | None) -> str:
    if entry is None:
        return "<td></td><td></td>"
    metric = study.metric(entry.data)
    value = number(entry.value(metric)) if entry.finished else escape(words_of(entry.runs[0].get("status")))
    told = f"{escape(metric)} {escape(measure(entry.shown, metric))}"
    label = f"{plots.swatch(entry.series)}<span>{escape(entry.label)}</span>"
    return f'<td>{label}</td><td class="n">{value}<small>{told}</small></td>'


def about_section(told: Published) -> str:
    """What the recipe says of itself (HTML); empty where it says nothing."""
    about = told.about or {}
    facts = [("Source", about.get("source")), ("Hardware", about.get("hardware")), ("Expected", about.get("expected"))]
    terms = "".join(f"<div><dt>{what}</dt><dd>{escape(text)}</dd></div>" for what, text in facts if text)
    unsaid = "".join(f"<li>{escape(text)}</li>" for text in about.get("unsaid") or ())
    if not terms and not unsaid:
        return ""
    return (
        '<section><h2 id="about">About this recipe</h2>'
        + (f'<dl class="words">{terms}</dl>' if terms else "")
        + (f"<p>What the source leaves unsaid, and what was chosen:</p><ul>{unsaid}</ul>" if unsaid else "")
        + "</section>"
    )
