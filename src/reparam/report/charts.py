"""Line charts over a logarithmic axis, as static SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .plots import DASHES, colour, marker, paint, short, standalone, text


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
    least: float = 1e-6,
) -> str:
    """Lines over a linear x and a logarithmic y, as a static SVG element.

    Args:
        label: what it shows, for readers who do not see it.
        x_words: the x axis' name. x_end: where it ends; it begins at 0.
        ends: what its two ends mean. markers: about how many markers a line gets.
    """
    inner = (_WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM)
    axes = _Axes(*inner, (-0.015 * x_end, 1.015 * x_end), _log_range(lines, least))
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


def one_above_another(titles: Sequence[str], charts: Sequence[str]) -> str:
    """Charts of :func:`line_chart` as one SVG element, each under its title."""
    each, parts = _HEIGHT + 26, []
    for i, (title, chart) in enumerate(zip(titles, charts, strict=True)):
        parts.append(text(_LEFT, i * each + 16, title))
        placed = f'<svg x="0" y="{short(i * each + 26)}" width="{_WIDTH:g}" height="{_HEIGHT:g}" '
        parts.append(chart.replace("<svg ", placed, 1))
    return standalone("".join(parts), _WIDTH, each * len(charts), label="; ".join(titles))


def _log_range(lines: Sequence[Line], least: float) -> tuple[float, float]:
    values = [y for line in lines for y in line.y] + [1.0]
    low, high = math.log10(max(min(values), least)), math.log10(min(max(values), CUT))
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
    powers = list(range(math.ceil(low), math.floor(high) + 1, max(1, round((high - low) / 8))))
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
        power = math.floor(math.log10(value) + 1e-9)
        words = f"{value:g}" if -4 < power < 4 else f"{value / 10.0**power:g}e{power}".replace("-", "\N{MINUS SIGN}")
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
