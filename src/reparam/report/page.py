"""The page of a study: verdict, leaderboard, samples at every sampling step, errors, how it was measured, notes.

One HTML file that needs nothing else. All words, numbers and charts are static; the script only
moves the samples along the sampling steps.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from .._version import __version__
from ..files import write_text
from . import plots
from .calibration import calibration_section
from .cards import cards_section
from .curves import learning_section, noise_section
from .density import density_section, write_figures
from .embed import strips
from .guided import guided_section
from .leaderboard import leaderboard
from .nearest import nearest_section
from .overview import overview
from .plots import escape
from .published import Published, about_section, published_section
from .rows import Study, words_of
from .samples import samples_section
from .tracks import Strip
from .verdict import verdict


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
        ("guidance", "by class, guidance "),
        ("seed", "seed "),
    ):
        values = {words_of(row.get(name)) for row in rows if row.get("status") != "failed"}
        if len(values) == 1 and values != {"none"}:
            facts.append(before + values.pop())
    steps = {row.get("steps") for row in rows}
    if len(steps) == 1 and None not in steps:
        facts.append(f"{steps.pop():,} steps")
    return "".join(f"<li>{escape(fact)}</li>" for fact in facts)


def _filled(template: str, fields: dict[str, str]) -> str:
    """The template with its {{fields}}; what is filled in is not searched again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def render(
    study: Study,
    found: Sequence[Strip],
    out: Path,
    *,
    title: str,
    description: str,
    notes: Sequence[str],
    published: Published,
) -> str:
    """The whole page."""
    script = _resource("page.js")
    page = _resource("template.html").split("<!-- controls -->")
    samples, data = samples_section(study, found, page[1])
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
            "published": published_section(published, study),
            "about": about_section(published),
            "samples": samples,
            "density": density_section(study, out),
            "guided": guided_section(study),
            "nearest": nearest_section(study, out),
            "noise": noise_section(study),
            "calibration": calibration_section(study),
            "learning": learning_section(study, out),
            "measured": cards_section(study),
            "notes": f'<section><h2 id="notes">Notes</h2><ul>{listed}</ul></section>' if notes else "",
            "version": escape(__version__),
            "data": data,
            "script": script,
            "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        },
    )


def write_report(
    out: Path,
    *,
    title: str,
    description: str,
    rows: list[dict[str, Any]],
    rank_by: str,
    notes: list[str],
    published: Published | None = None,
) -> Path:
    """Write a study's page and its overview figure.

    Args:
        out: the study's folder: it holds a folder for each run, named by the row's "run", with
            ``trajectory.npz``, ``metrics.jsonl``, ``nearest.npz`` and ``figure.npz`` (any may be missing).
        title, description: what was studied, in plain words.
        rows: the leaderboard. Rows whose "best_lr" is false are left out.
        rank_by: the metric that ranks; data sets it does not apply to are ranked by their first.
        notes: what a reader must know to judge the study.
        published: what the recipe says of itself, and what others published of what it compares.

    Returns:
        The path of ``report.html``; ``overview.svg`` and the figures of runs that have any, ``figure-RUN.svg``,
        lie beside it. Each appears whole or not at all.

    Raises:
        OutputError: if they cannot be written.
    """
    out = Path(out)
    study = Study.of(rows, rank_by)
    found = strips(study, out)
    write_text(out / "overview.svg", overview(study, found, title))
    write_figures(out, rows)
    told = published or Published()
    page = render(study, found, out, title=title, description=description, notes=notes, published=told)
    write_text(out / "report.html", page)
    return out / "report.html"
