"""A whole study's samples as one drawing that stands by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .plots import (
    FONT,
    contact_sheet,
    dark_rules,
    escape,
    fitted,
    marker,
    number,
    paint,
    pictures_panel,
    short,
    text,
)
from .rows import Entry, Study, metric_of
from .samples import absent, drawn, outside, shape_of
from .sheets import Sheet, can_be_lossy, link, shrunk
from .tracks import Strip


@dataclass(frozen=True)
class Cell:
    """A panel of the overview: its heading, a caption below, and what draws it at a width.

    ``draw`` returns the panel and its height.
    """

    heading: str
    caption: str
    draw: Callable[[float], tuple[str, float]]
    series: int | None = None


_PANEL, _GAP, _PER_LINE = 150.0, 14.0, 7
#: A panel's pictures are kept without loss up to so many characters, and beyond them in JPEG, hardly rounded.
_LARGE, _FINE = 220_000, 92


def _drawing(title: str, groups: Sequence[tuple[str, Sequence[Cell]]], caption: str) -> str:
    """A figure by itself: per group a line of panels (more where they do not fit).

    Args:
        title: its heading. caption: words below.
        groups: names of the groups (data sets) and their panels.
    """
    widest = min(_PER_LINE, max((len(cells) for _, cells in groups), default=1))
    width = max(2 * _GAP + widest * (_PANEL + _GAP) - _GAP, 340.0)
    parts = [text(_GAP, 30, fitted(title, width - 2 * _GAP, 16), size=16, extra='font-weight="600"')]
    y = 44.0
    for name, cells in groups:
        y += 16
        parts.append(text(_GAP, y, fitted(name, width - 2 * _GAP, 13), size=13, extra='font-weight="600"'))
        for start in range(0, len(cells), _PER_LINE):
            content, height = _panel_line(cells[start : start + _PER_LINE])
            parts.append(f'<g transform="translate({_GAP:g} {short(y + 8)})">{content}</g>')
            y += height + 14
        y += 6
    for line in wrapped(caption, width - 2 * _GAP):
        y += 15
        parts.append(text(_GAP, y, line, fill="muted", size=11))
    height = y + 14
    size = f'width="{short(width)}" height="{short(height)}" viewBox="0 0 {short(width)} {short(height)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{escape(FONT)}" role="img">'
        f'<title>{escape(title)}</title>{dark_rules()}<rect width="100%" height="100%" {paint(fill="bg")}/>'
        + "".join(parts)
        + "</svg>\n"
    )


def _panel_line(cells: Sequence[Cell]) -> tuple[str, float]:
    parts, tallest = [], 0.0
    for i, cell in enumerate(cells):
        drawing, height = cell.draw(_PANEL)
        tallest = max(tallest, height)
        indent = 0.0 if cell.series is None else 11.0
        mark = "" if cell.series is None else marker(4, 8, cell.series)
        heading = text(indent, 12, fitted(cell.heading, _PANEL - indent), size=12)
        caption = text(0, 18 + height + 14, fitted(cell.caption, _PANEL, 11), fill="muted", size=11)
        parts.append(
            f'<g transform="translate({short(i * (_PANEL + _GAP))} 0)">{mark}{heading}'
            f'<g transform="translate(0 18)">{drawing}</g>{caption}</g>'
        )
    return "".join(parts), 18 + tallest + 18


def wrapped(words: str, width: float, size: float = 11) -> list[str]:
    """Words in lines of a width, at an average letter's width."""
    room, lines, line = int(width / (0.53 * size)), [], ""
    for word in words.split():
        if line and len(line) + 1 + len(word) > room:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line] if line else lines


def _panel(strip: Strip, series: int | None, width: float) -> tuple[str, float]:
    """The final samples of an entry (None: the real data), and their height."""
    sheet = strip.sheets.get(series)
    if sheet is not None:
        return _pictures(sheet, width)
    if strip.sheets:
        return absent(strip, series, width, shape_of(strip.sheets[None], width))
    return drawn(strip, series, width)


def _pictures(sheet: Sheet, width: float) -> tuple[str, float]:
    # About twice as many pixels as are drawn: many viewers blur what they enlarge.
    cells, most = sheet.cells, round(2 * width)
    small = shrunk(sheet.final, most // cells.columns)
    by = max(1, round(most / (cells.columns * small.shape[2])))
    large = small.repeat(by, axis=1).repeat(by, axis=2)
    pixels = contact_sheet(large, columns=cells.columns)
    image = link(pixels)
    if len(image) > _LARGE and can_be_lossy():
        image = link(pixels, _FINE)
    return pictures_panel(image, (cells.columns, cells.rows), (large.shape[1], large.shape[2]), width)


def overview(study: Study, found: Sequence[Strip], title: str) -> str:
    """The final samples of the whole study as one standalone SVG."""

    def cell(strip: Strip, entry: Entry | None) -> Cell:
        metric = study.metric(strip.data)
        value = study.floor(strip.data, metric) if entry is None else metric_of(entry.shown, metric).get("value")
        series = None if entry is None else entry.series
        caption = [number(value)] if value is not None else []
        missed, count = outside(strip, series)
        if missed:
            caption.append(f"{missed} of {count} outside")
        label = "real data" if entry is None else entry.label
        return Cell(label, ", ".join(caption), lambda width: _panel(strip, series, width), series)

    groups = [
        (s.data, [*([] if s.first is None else [cell(s, None)]), *(cell(s, e) for e in s.entries)]) for s in found
    ]
    metrics = {study.metric(data): data for data in study.groups}
    names = [metric if len(metrics) == 1 else f"{metric} on {data}" for metric, data in metrics.items()]
    ways = list(dict.fromkeys("higher" if study.higher(metric) else "smaller" for metric in metrics))
    better = f" ({ways[0]} is better)" if len(ways) == 1 else ""
    scores = f", with {' or '.join(names)} below{better}" if 0 < len(names) < 4 else ""
    return _drawing(title, groups, f"Final samples{scores}.{_remarks(found)}")


def _remarks(found: Sequence[Strip]) -> str:
    """What the panels' backgrounds and lines mean."""
    behind = " Real data in grey behind." if any(strip.frame for strip in found) else ""
    noise = " The same cell starts from the same noise." if any(strip.sheets for strip in found) else ""
    classes = {sheet.cells.classes for strip in found for sheet in strip.sheets.values() if sheet.cells.classes}
    lines = f" Line by line: {', '.join(classes.pop())}." if len(classes) == 1 else ""
    return behind + noise + lines
