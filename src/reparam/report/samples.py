"""The samples of a study as the page's panels, and what stands around them."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from . import plots
from .calibration import of_another
from .embed import deepest, packed
from .plots import escape, number
from .rows import Entry, Study, metric_of, words_of
from .sheets import Cells, Sheet
from .tracks import Strip, unit

_WIDTH = 200.0
#: A panel is at least so wide for each picture that stands side by side in it, and at least _NARROW. On a
#: page as narrow as a phone, _PHONE, it may be half as wide as the page where its pictures still can be seen.
_CELL, _NARROW, _PHONE = 36, 216, 340
#: So many ellipses in a panel can be told apart.
_ELLIPSES = 12
#: What turns on how sure the models were.
_SURE = (
    '<label class="sure"><input type="checkbox" id="sure" autocomplete="off">'
    "<span>show how sure the model is</span></label>"
)


def drawn(strip: Strip, series: int | None, width: float) -> tuple[str, float]:
    """The final points of an entry (None: the real data) as SVG, and their height."""
    first = strip.first
    track = first if series is None else strip.tracks.get(series)
    if track is None or first is None:
        return absent(strip, series, width, width)
    behind = None if series is None else unit(first.real)
    shown = track.real if series is None else track.frames[-1]
    return plots.points_panel(unit(shown), width, series=series, behind=behind), width


def absent(strip: Strip, series: int | None, width: float, height: float) -> tuple[str, float]:
    """A panel that says why an entry has no samples."""
    entry = next((e for e in strip.entries if e.series == series), None)
    words = "no samples kept"
    if entry is not None and not entry.finished:
        words = str(entry.runs[0].get("status", words))
    return plots.empty_panel(words, width, height), height


def shape_of(sheet: Sheet, width: float) -> float:
    """How high a sheet is that is so wide."""
    height, wide = sheet.final.shape[1:3]
    return width * sheet.cells.rows * height / (sheet.cells.columns * wide)


def _drawing(strip: Strip, series: int | None) -> tuple[str, float]:
    """A panel as the page shows it without its script, and its height."""
    sheet = strip.sheets.get(series)
    if sheet is not None:
        cells, size = (sheet.cells.columns, sheet.cells.rows), sheet.final.shape[1:3]
        return plots.pictures_panel(sheet.links[-1], cells, (size[0], size[1]), _WIDTH)
    if strip.sheets:
        return absent(strip, series, _WIDTH, min(shape_of(strip.sheets[None], _WIDTH), _WIDTH))
    return drawn(strip, series, _WIDTH)


def samples_figure(study: Study, strip: Strip, index: int, about: str) -> str:
    """One data set's panels, the real data's first (HTML)."""
    panels = [] if strip.first is None else [_panel(study, strip, index, None)]
    panels += [_panel(study, strip, index, entry) for entry in strip.entries]
    look = f'class="panels" style="--n:{min(5, max(3, len(panels)))}"'
    if strip.sheets:
        look = f'class="panels pictures" style="{_widths(strip.sheets[None])}"'
    return f'<section class="strip"><h3>{escape(strip.data)}</h3>{about}<div {look}>{"".join(panels)}</div></section>'


def _widths(sheet: Sheet) -> str:
    """How wide a panel of pictures is at least: on a wide page, and as a share of a narrow one."""
    # The names of classes take the room of two pictures.
    columns = sheet.cells.columns + (2 if sheet.cells.classes else 0)
    fits = columns * min(sheet.final.shape[2], _CELL) <= _PHONE / 2
    return f"--w:{max(_NARROW, _CELL * columns)}px;--least:{47 if fits else 100}%"


def _about(strip: Strip) -> str:
    """What a data set's panels show (HTML)."""
    first = strip.first
    if first is None:
        return ""
    if strip.sheets:
        return _about_pictures(next(sheet for series, sheet in strip.sheets.items() if series is not None))
    plane = f"Drawn: {escape(first.axes)}, in" if first.axes else "In"
    return f"{plane} the same window for all panels of a row; behind, in grey, real data."


def _about_pictures(sheet: Sheet) -> str:
    count = sum(place >= 0 for place in sheet.cells.places)
    words = [f"Drawn: {count} pictures of each. The same cell starts from the same noise in every panel of a row"]
    if sheet.cells.classes:
        words.append("; each line was asked for the class named beside it")
    height, width = sheet.final.shape[1:3]
    words.append(".")
    if (height, width) != sheet.size:
        words.append(f" They are shrunk from {sheet.size[1]}×{sheet.size[0]} to {width}×{height} pixels.")
    if sheet.lossy[0]:
        words.append(" All pictures are compressed (JPEG), the final ones only a little.")
    elif sheet.lossy[1]:
        words.append(" The pictures before the final ones are compressed (JPEG).")
    return "".join(words)


def _panel(study: Study, strip: Strip, index: int, entry: Entry | None) -> str:
    label = "real data" if entry is None else entry.label
    series = None if entry is None else entry.series
    drawing, height = _drawing(strip, series)
    name = f"{label}, {strip.data}"
    picture = plots.standalone(drawing, _WIDTH, height, label=name)
    mark = "" if series is None else plots.swatch(series)
    seed = ""
    if entry is not None and len(entry.runs) > 1:
        seed = f" <small>seed {escape(words_of(entry.shown.get('seed')))}</small>"
    sheet = strip.sheets.get(series)
    if entry is None or entry.series in strip.tracks:
        place = f'data-strip="{index}" data-series="{"real" if series is None else series}"'
        if sheet is not None:
            place += f' data-columns="{sheet.cells.columns}" data-count="{len(sheet.cells.places)}"'
        canvas = f'<canvas {place} role="img" aria-label="{escape(name)}"></canvas>'
        # The script draws the final pictures from the static ones, which it then hides.
        picture = canvas + (picture if sheet is not None else f"<noscript>{picture}</noscript>")
    plot = f'<div class="plot" style="aspect-ratio:{_WIDTH:g}/{height:.1f}">{picture}</div>'
    return (
        f'<figure class="panel"><figcaption>{mark}<span>{escape(label)}{seed}</span></figcaption>'
        f"{_named(plot, sheet)}{_panel_metrics(study, strip.data, entry)}{_below(strip, series)}</figure>"
    )


def _named(plot: str, sheet: Sheet | None) -> str:
    """A plot with its classes beside its lines (HTML)."""
    if sheet is None or not sheet.cells.classes:
        return plot
    names = "".join(f'<li title="{escape(name)}">{escape(name)}</li>' for name in sheet.cells.classes)
    return f'<div class="named"><ul class="classes" aria-label="Classes, line by line">{names}</ul>{plot}</div>'


def _below(strip: Strip, series: int | None) -> str:
    """What is told below a panel: how many points it does not show, or its pictures' classes (HTML)."""
    if strip.frame:
        missed, count = outside(strip, series)
        told = f"{missed} of {count} points outside the frame" if missed else ""  # the script says the same
        return f'<p class="out">{told}</p>'
    sheet, track = strip.sheets.get(series), None if series is None else strip.tracks.get(series)
    if sheet is None or track is None or not track.labels or sheet.cells.classes:
        return ""
    return f"<details><summary>Classes asked for</summary>{_listed(sheet.cells, track.labels)}</details>"


def _listed(cells: Cells, labels: Sequence[str]) -> str:
    """The class of every cell, a line of the list for a line of the sheet (HTML)."""
    names = [escape(labels[place]) for place in cells.places]
    lines = [names[i : i + cells.columns] for i in range(0, len(names), cells.columns)]
    return "<ol>" + "".join(f"<li>{', '.join(line)}</li>" for line in lines) + "</ol>"


def outside(strip: Strip, series: int | None) -> tuple[int, int]:
    """How many of the final points are not seen, and of how many."""
    track = strip.first if series is None else strip.tracks.get(series)
    if track is None or strip.frame is None:
        return 0, 0
    points = unit(track.real if series is None else track.frames[-1])
    return int((np.abs(points) > 1).any(1).sum()), len(points)


def _panel_metrics(study: Study, data: str, entry: Entry | None) -> str:
    lines = []
    for metric in study.metrics([data]):
        value = study.floor(data, metric) if entry is None else metric_of(entry.shown, metric).get("value")
        if value is not None:
            name = escape(metric).replace("_", "_<wbr>")
            lines.append(f"<div><dt>{name}</dt><dd>{number(value)}</dd></div>")
    if entry is not None and not entry.finished:
        reason = entry.runs[0].get("reason")
        return f'<p class="why">{escape(reason)}</p>' if reason else ""
    return f"<dl>{''.join(lines)}</dl>" if lines else ""


def samples_section(study: Study, found: Sequence[Strip], controls: str) -> tuple[str, str]:
    """The samples with their slider (HTML, from the template ``controls``), and the data for it (JSON)."""
    steps = max((len(t.times) - 1 for strip in found for t in strip.tracks.values()), default=0)
    abouts = [_about(strip) for strip in found]
    shared = abouts[0] if len(set(abouts)) == 1 else ""
    figures = "".join(
        samples_figure(study, strip, i, "" if shared else f'<p class="about">{about}</p>')
        for i, (strip, about) in enumerate(zip(found, abouts, strict=True))
    )
    note = " Some steps are left out to keep this page small." if any(_thin(strip) for strip in found) else ""
    told = _about_spread(found) if steps else ""
    slider = controls.replace("{{steps}}", str(steps)).replace("{{sure}}", _SURE if told else "") if steps else ""
    page = (
        '<section class="samples"><h2 id="samples">Samples</h2>'
        f"<p>What each model believed the clean data x0 to be at every sampling step, from noise to the final "
        f"samples. {shared}{note}</p>"
        f"{slider}{told}{figures}</section>"
    )
    data = {"steps": steps, "strips": [packed(strip) for strip in found]}
    # In a script element nothing is escaped but what could end it.
    return page, json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def _about_spread(found: Sequence[Strip]) -> str:
    """What is seen where a reader asks how sure the models are (HTML, shown by the script); may be empty."""
    told = [strip for strip in found if any(track.spread is not None for track in strip.tracks.values())]
    if not told:
        return ""
    words = []
    if any(strip.frame for strip in told):
        words.append(
            f"An ellipse is one standard deviation of x0 given what the model sees at that step, around what it "
            f"believes x0 to be: of at most {_ELLIPSES} points of a panel."
        )
    scales = {strip.data: deepest(strip) for strip in told if strip.sheets}
    if scales:
        words.append(
            "Maps in place of the pictures: the standard deviation of each pixel of x0 given what the model sees at "
            "that step, the root mean square of its colours (black to white is 2)."
        )
    words += _silent(told)
    words.append("The final samples leave no doubt: ticked there, the box moves the slider to the middle.")
    bars = "".join(_scale(top, f" on {data}" if len(scales) > 1 else "") for data, top in scales.items())
    return f'<div id="sure-about" data-ellipses="{_ELLIPSES}" hidden><p>{" ".join(words)}</p>{bars}</div>'


def _silent(told: Sequence[Strip]) -> list[str]:
    """Which models beside those that tell how sure they are do not, in words (HTML)."""
    seen = [(strip.tracks.get(e.series), e) for strip in told for e in strip.entries]
    silent = [e for track, e in seen if track is not None and track.spread is None]
    if not silent:
        return []
    noisy = dict.fromkeys(escape(e.label) for e in silent if of_another(e))
    which = f"; that of {' and of '.join(noisy)} is of another noisy sample" if noisy else ""
    return [f"Models that state no variance of x0 are shown as before{which}."]


def _scale(top: float, where: str) -> str:
    """The colours of maps and the standard deviations that they stand for, of which the brightness is the root."""
    values = [top * (k / 4) ** 2 for k in range(5)]
    ticks = "".join(f"<span>{number(value)}</span>" for value in values)
    name = escape(f"Standard deviation of a pixel{where}")
    return f'<div class="scale"><small>{name}</small><div class="bar"></div><div class="ticks">{ticks}</div></div>'


def _thin(strip: Strip) -> bool:
    """Whether some steps of a strip are left out."""
    return any(
        len(strip.sheets[series].kept if strip.sheets else track.kept) < len(track.times)
        for series, track in strip.tracks.items()
    )
