"""Figures as SVG: scatter plots, sheets of pictures, line charts, and the overview of a study.

Every element carries its light colour as a presentation attribute and a class. A page or a style
sheet may restyle the classes (the dark theme does); a converter that knows no CSS still draws the
light theme.
"""

from __future__ import annotations

import base64
import html
import math
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

#: Name of a colour: its value on a light and on a dark page. c0 to c7 are the targets', after Okabe
#: and Ito's palette, darkened or lightened to a contrast of at least 3 against the page.
COLOURS: dict[str, tuple[str, str]] = {
    "bg": ("#ffffff", "#14171a"),
    "panel": ("#fafbfc", "#1a1e22"),
    "ink": ("#1c2127", "#e8eaed"),
    "muted": ("#5a6470", "#a0a9b4"),
    "rule": ("#d9dee4", "#343b43"),
    "grid": ("#e8ebef", "#2a3037"),
    "faint": ("#c3c9d1", "#4b545e"),
    "c0": ("#0069ad", "#57b0f2"),
    "c1": ("#c84b00", "#ff9152"),
    "c2": ("#00805c", "#3fd0a0"),
    "c3": ("#a8478a", "#eb9fd0"),
    "c4": ("#8f6700", "#e6b94a"),
    "c5": ("#5b4bb5", "#b3a5f7"),
    "c6": ("#3b7d8f", "#8fd4e6"),
    "c7": ("#666666", "#c4c4c4"),
}
SERIES_COLOURS = 8
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2", "9 3 2 3 2 3")
#: Outlines of the markers around (0, 0), of about equal area.
MARKERS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z",
    "M-2.7 -2.7h5.4v5.4h-5.4z",
    "M0 -3.8L3.6 2.6H-3.6z",
    "M0 -4L3.4 0L0 4L-3.4 0z",
    "M0 3.8L3.6 -2.6H-3.6z",
    "M-3 -3L3 3M-3 3L3 -3",
    "M-3.6 0H3.6M0 -3.6V3.6",
)
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'

# What XML 1.0 forbids, and halves of surrogate pairs, which UTF-8 cannot carry.
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def escape(text: object) -> str:
    """Any text, safe in HTML and XML, in elements and in quoted attributes."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", str(text)), quote=True)


def number(x: float | None) -> str:
    """Three significant digits; rounding dust (below 1e-7) is 0, and what is missing a dash."""
    if x is None or math.isnan(x):
        return "–"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    sign, size = ("−" if x < 0 else ""), abs(x)
    if size < 1e-7:
        return "0"
    size = float(f"{size:.2e}")
    if not 1e-3 <= size < 1e5:
        digits, power = f"{size:.2e}".split("e")
        return f"{sign}{digits}e{int(power)}".replace("e-", "e−")
    return f"{sign}{size:,.{max(0, 2 - math.floor(math.log10(size)))}f}"


def paint(*, fill: str = "none", stroke: str = "none") -> str:
    """The attributes that colour an element, by names in :data:`COLOURS`."""
    names = [f"{kind}-{name}" for kind, name in (("f", fill), ("s", stroke)) if name != "none"]
    values = f'fill="{_light(fill)}"' + (f' stroke="{_light(stroke)}"' if stroke != "none" else "")
    return f'class="{" ".join(names)}" {values}' if names else values


def _light(name: str) -> str:
    return COLOURS[name][0] if name in COLOURS else name


def colour(series: int) -> str:
    """The name of a series' colour."""
    return f"c{series % SERIES_COLOURS}"


def page_colours() -> str:
    """Style rules that give a page the colours as variables, and the classes of the figures."""
    themes = ["".join(f"--{name}:{pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1)]
    classes = "".join(f".f-{n}{{fill:var(--{n})}}.s-{n}{{stroke:var(--{n})}}" for n in COLOURS)
    return f":root{{{themes[0]}}}@media (prefers-color-scheme:dark){{:root{{{themes[1]}}}}}{classes}"


def _dark_rules() -> str:
    rules = "".join(f".f-{n}{{fill:{dark}}}.s-{n}{{stroke:{dark}}}" for n, (_, dark) in COLOURS.items())
    return f"<style>@media (prefers-color-scheme:dark){{{rules}}}</style>"


def short(x: float) -> str:
    """A coordinate in as few characters as a tenth of a pixel needs."""
    text = f"{x:.1f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def text(x: float, y: float, words: str, *, fill: str = "ink", size: float = 12, extra: str = "") -> str:
    """A line of text, escaped. ``extra``: more attributes, trusted."""
    return f'<text x="{short(x)}" y="{short(y)}" font-size="{size:g}" {paint(fill=fill)} {extra}>{escape(words)}</text>'


def fitted(words: str, width: float, size: float = 12) -> str:
    """Words cut to what fits a width, at an average letter's width."""
    room = max(3, int(width / (0.56 * size)))
    return words if len(words) <= room else words[: room - 1].rstrip() + "…"


def marker(x: float, y: float, series: int, scale: float = 1.0) -> str:
    """A series' marker."""
    shape = MARKERS[series % len(MARKERS)]
    grow = f" scale({scale:g})" if scale != 1 else ""
    look = paint(fill="bg", stroke=colour(series))
    return f'<path d="{shape}" transform="translate({short(x)} {short(y)}){grow}" {look} stroke-width="1.6"/>'


def swatch(series: int) -> str:
    """A piece of a series' line with its marker, for legends."""
    look = f'{paint(stroke=colour(series))} stroke-width="2" stroke-dasharray="{DASHES[series % len(DASHES)]}"'
    line = f'<path d="M0 6H30" {look}/>'
    size = 'width="30" height="12" viewBox="0 0 30 12"'
    return f'<svg class="swatch" {size} aria-hidden="true">{line}{marker(15, 6, series)}</svg>'


# ------------------------------------------------------------------------------------------ pictures


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of uint8 pixels: [H, W] grey or [H, W, 3] colour."""
    rows = np.ascontiguousarray(pixels, dtype=np.uint8)
    height, width = rows.shape[:2]
    flat = rows.reshape(height, -1)
    body = np.concatenate([np.zeros((height, 1), np.uint8), flat], axis=1).tobytes()

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2 if rows.ndim == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body, 9)) + chunk(b"IEND", b"")


def sheet_columns(count: int) -> int:
    """How many pictures stand side by side on a sheet."""
    return max(1, math.ceil(math.sqrt(count)))


def contact_sheet(pictures: np.ndarray) -> np.ndarray:
    """Pictures [n, H, W(, 3)] side by side, [rows·H, columns·W(, 3)]; the rest of the sheet is grey."""
    count, height, width, *colours = pictures.shape
    columns = sheet_columns(count)
    lines = math.ceil(count / columns)
    full = np.full((lines * columns, height, width, *colours), 128, np.uint8)
    full[:count] = pictures
    grid = full.reshape(lines, columns, height, width, *colours).swapaxes(1, 2)
    return grid.reshape(lines * height, columns * width, *colours)


def pictures_panel(pictures: np.ndarray, width: float) -> tuple[str, float]:
    """A sheet of pictures ``width`` wide, and its height."""
    columns = sheet_columns(len(pictures))
    sheet = contact_sheet(pictures)
    height = width * sheet.shape[0] / sheet.shape[1]
    # Enlarged here, since many viewers blur small pictures; runs of equal pixels cost little.
    grow = max(1, math.ceil(2 * width / sheet.shape[1]))
    large = sheet.repeat(grow, axis=0).repeat(grow, axis=1)
    link = "data:image/png;base64," + base64.b64encode(png(large)).decode()
    box = f'width="{short(width)}" height="{short(height)}"'
    lines = math.ceil(len(pictures) / columns)
    gaps = "".join(f"M{short(width * i / columns)} 0v{short(height)}" for i in range(1, columns))
    gaps += "".join(f"M0 {short(height * i / lines)}h{short(width)}" for i in range(1, lines))
    image = f'<image {box} preserveAspectRatio="none" style="image-rendering:pixelated" href="{link}"/>'
    return f'{image}<path d="{gaps}" {paint(stroke="bg")} stroke-width="3"/>', height


# -------------------------------------------------------------------------------------------- points


def dots(points: np.ndarray, size: float) -> str:
    """The outline of points [m, 2] in [-1, 1]² (y upwards), as one path to be drawn with round caps."""
    seen = points[(np.abs(points) <= 1).all(1)]
    tenths = np.rint((seen * [1, -1] + 1) * 5 * size).astype(int)
    steps = np.diff(tenths, axis=0, prepend=np.zeros((1, 2), int))
    # A zero-length line is drawn as its cap: a dot.
    return "".join(f"m{short(x / 10)} {short(y / 10)}h0" for x, y in steps)


def points_panel(
    points: np.ndarray, width: float, *, series: int | None = None, behind: np.ndarray | None = None
) -> str:
    """A scatter plot of points [m, 2] in [-1, 1]², ``width`` wide, with others faintly behind."""
    look = 'stroke-linecap="round" stroke-width="{}"'
    frame = f'<rect x="0.5" y="0.5" width="{width - 1:g}" height="{width - 1:g}" {paint(fill="panel", stroke="rule")}/>'
    parts = [frame]
    if behind is not None:
        parts.append(f'<path d="{dots(behind, width)}" {paint(stroke="faint")} {look.format(2.2)}/>')
    name = "muted" if series is None else colour(series)
    parts.append(f'<path d="{dots(points, width)}" {paint(stroke=name)} {look.format(2.6)} stroke-opacity="0.8"/>')
    return "".join(parts)


def empty_panel(words: str, width: float, height: float) -> str:
    """A panel with nothing to show but why."""
    frame = (
        f'<rect x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" {paint(fill="panel", stroke="rule")}/>'
    )
    middle = text(width / 2, height / 2 + 4, words, fill="muted", extra='text-anchor="middle"')
    return frame + middle


def standalone(content: str, width: float, height: float, *, label: str) -> str:
    """An SVG element that stands in a page."""
    box = f'viewBox="0 0 {short(width)} {short(height)}"'
    return f'<svg {box} role="img" aria-label="{escape(label)}">{content}</svg>'


# -------------------------------------------------------------------------------------------- charts


@dataclass(frozen=True)
class Line:
    """A series in a chart: its points, and those of the single runs it is the mean of."""

    series: int
    label: str
    x: Sequence[float]
    y: Sequence[float]
    runs: Sequence[tuple[Sequence[float], Sequence[float]]] = field(default=())


@dataclass(frozen=True)
class _Axes:
    """Where values fall in the chart's inner box."""

    width: float
    height: float
    x_range: tuple[float, float]
    log_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return (value - low) / (high - low) * self.width

    def y(self, value: float) -> float:
        low, high = self.log_range
        return (high - math.log10(value)) / (high - low) * self.height


_WIDTH, _HEIGHT = 400.0, 262.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 16.0, 8.0, 42.0
#: Above this many times the data's variance a line leaves the chart.
CUT = 1000.0


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    x_words: str,
    x_end: float,
    ends: tuple[str, str] | None = None,
    markers: int = 12,
) -> str:
    """Lines over a linear x and a logarithmic y, as a static SVG element.

    Args:
        label: what it shows, for readers who do not see it.
        x_words: the x axis' name. x_end: where it ends; it begins at 0.
        ends: what its two ends mean. markers: about how many markers a line gets.
    """
    inner = (_WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM)
    axes = _Axes(*inner, (-0.015 * x_end, 1.015 * x_end), _log_range(lines))
    parts = [f'<g transform="translate({_LEFT} {_TOP})">', _y_axis(axes), _x_axis(axes, x_end)]
    # An inner svg cuts off what leaves it.
    parts.append(f'<svg width="{inner[0]:g}" height="{inner[1]:g}" overflow="hidden">')
    parts += [_line(line, axes, markers) for line in lines]
    parts.append("</svg>")
    below = inner[1] + 34
    parts.append(text(inner[0] / 2, below, x_words, fill="muted", extra='text-anchor="middle"'))
    if ends:
        parts.append(text(axes.x(0), below, ends[0], fill="muted", extra='text-anchor="start"'))
        parts.append(text(axes.x(x_end), below, ends[1], fill="muted", extra='text-anchor="end"'))
    return standalone("".join(parts) + "</g>", _WIDTH, _HEIGHT, label=label)


def _log_range(lines: Sequence[Line]) -> tuple[float, float]:
    values = [y for line in lines for y in line.y] + [1.0]
    low, high = math.log10(max(min(values), 1e-6)), math.log10(min(max(values), CUT))
    room = max(0.08 * (high - low), 0.06)
    return low - room, high + room


def _line(line: Line, axes: _Axes, markers: int) -> str:
    dash = DASHES[line.series % len(DASHES)]
    look = f'{paint(stroke=colour(line.series))} stroke-linejoin="round"'
    path = _path(line.x, line.y, axes)
    single = "".join(_path(x, y, axes) for x, y in line.runs)
    every = max(1, round(len(line.x) / markers))
    places = range(len(line.x) - 1, -1, -every)
    return (
        (f'<path d="{single}" {look} stroke-width="0.8" stroke-opacity="0.45"/>' if single else "")
        + f'<path d="{path}" {look} stroke-width="1.9" stroke-dasharray="{dash}"/>'
        + "".join(marker(axes.x(line.x[i]), axes.y(line.y[i]), line.series) for i in places)
    )


def _path(x: Sequence[float], y: Sequence[float], axes: _Axes) -> str:
    pairs = [f"{short(axes.x(a))} {short(axes.y(b))}" for a, b in zip(x, y, strict=True)]
    return "M" + "L".join(pairs) if pairs else ""


def _y_axis(axes: _Axes) -> str:
    low, high = axes.log_range
    powers = list(range(math.ceil(low), math.floor(high) + 1))
    ticks = [10.0**p for p in powers]
    if high - low < 2.6:
        between = (1, 2, 5) if high - low < 1.4 else (1, 3)
        ticks = [m * 10.0**p for p in range(math.floor(low), math.ceil(high) + 1) for m in between]
        ticks = [v for v in ticks if low <= math.log10(v) <= high]
    parts = []
    for value in ticks:
        y = short(axes.y(value))
        guess = math.isclose(value, 1)
        look = f'{paint(stroke="muted")} stroke-dasharray="1 3"' if guess else paint(stroke="grid")
        parts.append(f'<path d="M0 {y}H{short(axes.width)}" {look}/>')
        words = f"{value:g}" if value < 1e4 else f"10^{round(math.log10(value))}"
        parts.append(text(-7, axes.y(value) + 4, words, fill="muted", extra='text-anchor="end"'))
    return "".join(parts)


def _x_axis(axes: _Axes, end: float) -> str:
    step = _round_step(end / 5)
    parts = [f'<path d="M0 {short(axes.height)}H{short(axes.width)}" {paint(stroke="rule")}/>']
    ticks = [i * step for i in range(round(end / step + 1e-9) + 1) if i * step <= end * 1.0001]
    for value in ticks:
        x = axes.x(value)
        parts.append(f'<path d="M{short(x)} {short(axes.height)}v4" {paint(stroke="rule")}/>')
        words = f"{value:,.0f}" if step >= 1 else f"{value:g}"
        parts.append(text(x, axes.height + 17, words, fill="muted", extra='text-anchor="middle"'))
    return "".join(parts)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)


# ------------------------------------------------------------------------------------------ overview


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


def overview(title: str, groups: Sequence[tuple[str, Sequence[Cell]]], caption: str) -> str:
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
    for line in _wrapped(caption, width - 2 * _GAP):
        y += 15
        parts.append(text(_GAP, y, line, fill="muted", size=11))
    height = y + 14
    size = f'width="{short(width)}" height="{short(height)}" viewBox="0 0 {short(width)} {short(height)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{escape(FONT)}" role="img">'
        f'<title>{escape(title)}</title>{_dark_rules()}<rect width="100%" height="100%" {paint(fill="bg")}/>'
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


def _wrapped(words: str, width: float, size: float = 11) -> list[str]:
    room, lines, line = int(width / (0.53 * size)), [], ""
    for word in words.split():
        if line and len(line) + 1 + len(word) > room:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line] if line else lines
