"""What a model of data in the plane has learned: its samples, and the log density it gives, as eight panels."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_text
from .overview import wrapped
from .plots import FONT, dark_rules, dots, empty_panel, escape, fitted, number, paint, png, short, text
from .rows import Entry, Row, Study, words_of
from .tracks import arrays_of, evenly

#: Control colours, evenly apart; between them each channel is a straight line. The first row goes from dark to
#: light and nothing else; the second is as dark at both ends and lightest at 0.
_RISING = ("#150a2e", "#3c1a6e", "#5b3fa0", "#5a6fc0", "#4a9dc4", "#58c4b0", "#9fe08f", "#f4f5b4")
_DIVERGING = ("#07315c", "#1f6fae", "#8fc1de", "#f5f3ee", "#f0b48c", "#c5562a", "#5e1708")
_UNKNOWN = (128, 128, 128)
#: Colours end this many nats below the highest density that is shown.
_DEPTH = 10.0
#: At most so many points, paths, steps of a path, and cells of a map along each side.
_DOTS, _PATHS, _STEPS, _CELLS = 4000, 96, 40, 192
_PANEL, _GAP, _HEAD, _FOOT, _LINE = 216.0, 16.0, 20.0, 30.0, 15.0
_COLUMNS = 4
#: So many figures stand in a page; of the others it tells the files.
_ON_PAGE = 6

Arrays = dict[str, np.ndarray]
_DENSITIES = ("log_density", "guide_log_density", "truth_log_density")


# ------------------------------------------------------------------------------------------- colours


def coloured(values: np.ndarray, controls: Sequence[str]) -> np.ndarray:
    """Values from 0 to 1 as uint8 colours [..., 3]; what is beyond has the colour of the end, NaN is grey."""
    table = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in controls], float)
    place = np.clip(np.nan_to_num(values, nan=0.5), 0, 1)
    knots = np.linspace(0, 1, len(table))
    colours = np.stack([np.interp(place, knots, table[:, channel]) for channel in range(3)], -1)
    colours[np.isnan(values)] = _UNKNOWN
    return np.rint(colours).astype(np.uint8)


@dataclass(frozen=True)
class Scale:
    """The values at the two ends of a row of colours."""

    low: float
    high: float
    controls: tuple[str, ...]

    @classmethod
    def of_densities(cls, maps: Iterable[np.ndarray]) -> Scale:
        """One scale for all of them, down from the highest."""
        found = np.concatenate([values[np.isfinite(values)] for values in maps])
        high = float(found.max()) if len(found) else 0.0
        low = max(float(found.min()), high - _DEPTH) if len(found) else -1.0
        return cls(low if low < high else high - 1.0, high, _RISING)

    @classmethod
    def of_difference(cls, difference: np.ndarray, likely: np.ndarray) -> Scale:
        """Even around 0, to the largest but a hundredth of what is seen where ``likely`` holds."""
        found = np.abs(difference[likely & np.isfinite(difference)])
        most = float(np.quantile(found, 0.99)) if len(found) else 0.0
        most = most if most > 0 else 1.0
        return cls(-most, most, _DIVERGING)

    def picture(self, values: np.ndarray) -> np.ndarray:
        """A map whose first row is the lowest, as pixels whose first row is the highest."""
        return coloured((values[::-1] - self.low) / (self.high - self.low), self.controls)

    def bar(self, width: float) -> str:
        """The colours with the values at their ends, to stand below a panel."""
        strip = coloured(np.linspace(0, 1, 128)[None], self.controls)
        wide = width - 108
        ends = [text(0, 13, number(self.low), fill="muted", size=11)]
        ends.append(text(width, 13, f"{number(self.high)} nats", fill="muted", size=11, extra='text-anchor="end"'))
        return f'<g transform="translate(46 4)">{_image(strip, wide, 11)}</g>' + "".join(ends)


def _image(pixels: np.ndarray, width: float, height: float) -> str:
    box = f'width="{short(width)}" height="{short(height)}" preserveAspectRatio="none"'
    return f'<image {box} href="data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"/>'


# -------------------------------------------------------------------------------------------- arrays


@dataclass(frozen=True)
class Window:
    """A square of the plane."""

    x: float
    y: float
    half: float

    @classmethod
    def of(cls, arrays: Arrays, name: str) -> Window | None:
        found = _numbers(arrays, name, 1)
        if found is None or found.shape != (3,) or not np.isfinite(found).all() or found[2] <= 0:
            return None
        return cls(*map(float, found))

    def unit(self, points: np.ndarray) -> np.ndarray:
        """Points in units of the half width, from the centre."""
        return (points - [self.x, self.y]) / self.half

    @property
    def words(self) -> str:
        return f"centre ({_brief(self.x)}, {_brief(self.y)}), half-width {_brief(self.half)}"


def _brief(x: float) -> str:
    """Three digits at most, and no zeros after them."""
    return f"{x:.3g}".replace("-", "−")


def _numbers(arrays: Arrays, name: str, axes: int) -> np.ndarray | None:
    """An array of real numbers with so many axes, none of length 0."""
    found = arrays.get(name)
    if found is None or found.dtype.kind not in "fiu" or found.ndim != axes or 0 in found.shape:
        return None
    return found.astype(float)


def _points(arrays: Arrays, name: str, axes: int = 2) -> np.ndarray | None:
    """Points [..., 2]."""
    found = _numbers(arrays, name, axes)
    return None if found is None or found.shape[-1] != 2 else found


def _map(arrays: Arrays, name: str) -> np.ndarray | None:
    """Log densities [n, n], of no more rows and columns than are drawn; NaN where they are infinite upwards."""
    found = _numbers(arrays, name, 2)
    if found is None or found.shape[0] != found.shape[1] or len(found) < 2:
        return None
    at = evenly(len(found), _CELLS)
    return np.where(found == math.inf, math.nan, found)[np.ix_(at, at)]


# -------------------------------------------------------------------------------------------- panels


@dataclass(frozen=True)
class Panel:
    """A panel: its heading, its content ``_PANEL`` wide and high, and what stands below it (SVG)."""

    heading: str
    content: str
    below: str = ""


def _note(words: str) -> str:
    return text(0, 14, fitted(words, _PANEL, 11), fill="muted", size=11)


def _missing(heading: str, words: str = "not kept by this run") -> Panel:
    return Panel(heading, empty_panel(words, _PANEL, _PANEL))


def _ground() -> str:
    return f'<rect width="{_PANEL:g}" height="{_PANEL:g}" {paint(fill="panel")}/>'


def _edge() -> str:
    return f'<rect x="0.5" y="0.5" width="{_PANEL - 1:g}" height="{_PANEL - 1:g}" {paint(stroke="rule")}/>'


def _scatter(heading: str, points: np.ndarray | None, view: Window | None, zoom: Window | None, why: str) -> Panel:
    """Points in the view, with the square that is enlarged elsewhere."""
    if points is None or view is None:
        return _missing(heading, why)
    units = view.unit(points[evenly(len(points), _DOTS)])
    look = f'{paint(stroke="c0")} stroke-width="1.3" stroke-linecap="round" stroke-opacity="0.6"'
    content = f'{_ground()}<path d="{dots(units, _PANEL)}" {look}/>'
    if zoom is not None:
        x, y = view.unit(np.array([zoom.x - zoom.half, zoom.y + zoom.half]))
        side = short(zoom.half / view.half * _PANEL / 2)
        place = f'x="{short((x + 1) * _PANEL / 2)}" y="{short((1 - y) * _PANEL / 2)}" width="{side}" height="{side}"'
        content += f'<rect {place} {paint(stroke="ink")} stroke-width="1.2"/>'
    seen = (np.abs(view.unit(points)) <= 1).all(1)
    told = f"{len(points):,} points" + ("" if seen.all() else f", {len(points) - int(seen.sum()):,} outside")
    if len(units) < len(points):
        told += f"; {len(units):,} drawn"
    return Panel(heading, content + _edge(), _note(told))


def _lines(paths: np.ndarray, zoom: Window) -> str:
    """The outline of paths [F, m, 2]; they end where they are not finite or far outside."""
    some = paths[np.ix_(evenly(paths.shape[0], _STEPS), evenly(paths.shape[1], _PATHS))]
    units = zoom.unit(some)
    tenths = np.clip(np.nan_to_num((units * [1, -1] + 1) * 5 * _PANEL), -1e5, 1e5).round().astype(int)
    good = (np.isfinite(units) & (np.abs(units) <= 4)).all(2)
    outlines = []
    for path in range(tenths.shape[1]):
        count = int(np.cumprod(good[:, path]).sum())
        steps = np.diff(tenths[:count, path], axis=0, prepend=0)
        moves = [f"{short(x / 10)} {short(y / 10)}" for x, y in steps]
        outlines.append(f"M{'l'.join(moves)}" if moves else "")
    return "".join(outlines)


def _trajectories(heading: str, arrays: Arrays, name: str, zoom: Window | None, sigma: str, why: str) -> Panel:
    """Paths in the zoom with their ends; behind them in grey those of the exact score, where they are kept."""
    paths = _points(arrays, name, 3)
    if paths is None or zoom is None:
        return _missing(heading, why)
    exact = _points(arrays, "paths_true", 3)
    behind = "" if exact is None else f'<path d="{_lines(exact, zoom)}" {paint(stroke="faint")} stroke-width="0.8"/>'
    ends = dots(zoom.unit(paths[-1, evenly(paths.shape[1], _PATHS)]), _PANEL)
    content = (
        f'{_ground()}{behind}<path d="{_lines(paths, zoom)}" {paint(stroke="c0")} stroke-width="0.8" '
        f'stroke-opacity="0.75"/><path d="{ends}" {paint(stroke="ink")} stroke-width="2.4" stroke-linecap="round"/>'
    )
    return Panel(heading, _clipped(content) + _edge(), _note(f"{min(_PATHS, paths.shape[1])} paths{sigma}"))


def _clipped(content: str) -> str:
    """A drawing of which nothing is seen outside its panel."""
    box = f'width="{_PANEL:g}" height="{_PANEL:g}"'
    return f'<svg {box} viewBox="0 0 {_PANEL:g} {_PANEL:g}" overflow="hidden">{content}</svg>'


def _heat(heading: str, values: np.ndarray | None, scale: Scale, why: str) -> Panel:
    if values is None:
        return _missing(heading, why)
    return Panel(heading, _image(scale.picture(values), _PANEL, _PANEL) + _edge(), scale.bar(_PANEL))


def _difference(heading: str, a: np.ndarray | None, b: np.ndarray | None, why: str) -> Panel:
    """Log density a less b, on a scale that the places count for where either is at all likely."""
    if a is None or b is None or a.shape != b.shape:
        return _missing(heading, why)
    with np.errstate(invalid="ignore"):
        difference, tops = a - b, [np.nanmax(x) if np.isfinite(x).any() else math.inf for x in (a, b)]
        likely = (a > tops[0] - _DEPTH) | (b > tops[1] - _DEPTH)
    return _heat(heading, difference, Scale.of_difference(difference, likely), why)


def panels(arrays: Arrays) -> tuple[list[Panel], list[Panel]]:
    """The eight panels, and those that compare with the exact density, where it is known."""
    view, zoom = Window.of(arrays, "view"), Window.of(arrays, "zoom")
    sigma, unguided = _noise(arrays), "no guidance in this run"
    to = f" from σ = {sigma}" if sigma else ""
    model, guide, truth = (_map(arrays, name) if zoom else None for name in _DENSITIES)
    scale = Scale.of_densities([m for m in (model, guide, truth) if m is not None] or [np.zeros(0)])
    lost = "not kept by this run"
    eight = [
        _scatter("Truth", _points(arrays, "truth"), view, zoom, lost),
        _scatter("Samples without guidance", _points(arrays, "samples"), view, zoom, lost),
        _scatter("Samples with guidance", _points(arrays, "guided"), view, zoom, unguided),
        _trajectories("Paths without guidance", arrays, "paths", zoom, to, lost),
        _heat("Log density of the model", model, scale, lost),
        _heat("Log density of the guide", guide, scale, unguided),
        _difference("Log ratio, model to guide", model, guide, unguided),
        _trajectories("Paths with guidance", arrays, "guided_paths", zoom, to, unguided),
    ]
    if truth is None:
        return eight, []
    exact = _heat("Exact log density", truth, scale, lost)
    return eight, [exact, _difference("Log ratio, model to exact", model, truth, lost)]


def _noise(arrays: Arrays) -> str:
    """The noise level of the densities in words; empty where it is not known."""
    found = arrays.get("zoom_sigma")
    if found is None or found.dtype.kind != "f" or found.size != 1 or not np.isfinite(found).all():
        return ""
    return _brief(float(found.reshape(())))


def _caption(arrays: Arrays) -> str:
    """What exactly the panels show, of those that show anything."""
    view, zoom, sigma = Window.of(arrays, "view"), Window.of(arrays, "zoom"), _noise(arrays)
    known = {name for name in _DENSITIES if zoom and _map(arrays, name) is not None}
    words = []
    if view:
        words.append(f"The first three panels show {view.words}; the square is what the others enlarge.")
    if zoom:
        grey = "" if _points(arrays, "paths_true", 3) is None else "; in grey behind, those of the exact score"
        words.append(f"The others show {zoom.words}. Paths end in dots{grey}.")
    if known:
        words.append(
            f"Log densities are in nats{f', at noise level σ = {sigma}' if sigma else ''}. Those of models are of "
            f"their probability-flow ODE, from integrating it with its divergence: not read off a network's output. "
            f"All have one scale, which ends at most {_DEPTH:g} nats below the highest; what is lower is as dark."
        )
    if "guide_log_density" in known:
        words.append(
            "The guide is the model's earlier snapshot. The log ratio is its log density taken from the model's."
        )
    if "truth_log_density" in known:
        words.append("The exact log density is that of the data with noise of that level.")
    return " ".join(words)


# -------------------------------------------------------------------------------------------- figure


def figure_svg(arrays: Arrays, title: str) -> str:
    """The eight panels as one drawing that stands by itself.

    Args:
        arrays: those of a run's ``figure.npz``. What is missing or damaged leaves its panel empty.
        title: its heading, any text.
    """
    eight, compared = panels(arrays)
    width = _COLUMNS * (_PANEL + _GAP) + _GAP
    tall = _HEAD + _PANEL + _FOOT
    parts = [text(_GAP, 28, fitted(title, width - 2 * _GAP, 16), size=16, extra='font-weight="600"')]
    y = 44.0
    for line in (eight[:_COLUMNS], eight[_COLUMNS:], compared):
        parts += [_placed(panel, _GAP + i * (_PANEL + _GAP), y) for i, panel in enumerate(line)]
        y += tall if line else 0.0
    # Where two panels compare, the caption stands in the room beside them.
    indent = len(compared) * (_PANEL + _GAP)
    lines = wrapped(_caption(arrays), width - 2 * _GAP - indent)
    top = y - tall + _HEAD if compared else y
    parts += [text(_GAP + indent, top + _LINE * (i + 1), line, fill="muted", size=11) for i, line in enumerate(lines)]
    height = max(y, top + _LINE * len(lines)) + 14
    size = f'width="{short(width)}" height="{short(height)}" viewBox="0 0 {short(width)} {short(height)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{escape(FONT)}" role="img">'
        f'<title>{escape(title)}</title>{dark_rules()}<rect width="100%" height="100%" {paint(fill="bg")}/>'
        + "".join(parts)
        + "</svg>\n"
    )


def _placed(panel: Panel, x: float, y: float) -> str:
    head = text(0, 13, fitted(panel.heading, _PANEL, 12), size=12)
    inner = f'<g transform="translate(0 {_HEAD:g})">{panel.content}</g>'
    below = f'<g transform="translate(0 {_HEAD + _PANEL:g})">{panel.below}</g>'
    return f'<g transform="translate({short(x)} {short(y)})">{head}{inner}{below}</g>'


def _figure_of(out: Path, row: Row, label: str) -> str:
    """A run's figure; empty where it has none, or nothing in it can be drawn."""
    arrays = arrays_of(out, str(row.get("run", "")), "figure.npz")
    if not arrays or all(not panel.below for part in panels(arrays) for panel in part):
        return ""
    return figure_svg(arrays, label)


def _label(entry: Entry, row: Row) -> str:
    """What a figure shows: the target, the data, and the seed where there are several."""
    seed = f", seed {words_of(row.get('seed'))}" if len(entry.runs) > 1 else ""
    return f"{entry.label}, {entry.data}{seed}"


def file_name(run: str) -> str:
    """The file of a run's figure."""
    return f"figure-{run.replace('/', '-')}.svg"


def write_figures(out: Path, rows: list[dict[str, Any]]) -> list[Path]:
    """Write ``figure-RUN.svg`` beside the page for each run whose folder holds a ``figure.npz``.

    Args:
        out: the study's folder. rows: its leaderboard, as :func:`~reparam.report.write_report` takes it.

    Returns:
        The files' paths, each whole.

    Raises:
        OutputError: if one cannot be written.
    """
    written = []
    for entry in Study.of(rows, "").entries:
        for row in entry.finished:
            drawing = _figure_of(out, row, _label(entry, row))
            if drawing:
                written.append(out / file_name(str(row["run"])))
                write_text(written[-1], drawing)
    return written


# ----------------------------------------------------------------------------------------------- page


def density_section(study: Study, out: Path) -> str:
    """The figures of the runs that are drawn, the best of each data set open (HTML); empty where there is none."""
    figures: list[str] = []
    for data in study.groups:
        drawn = [
            (_label(entry, entry.shown), entry.shown, drawing)
            for entry in study.ranked(data)
            if entry.finished and (drawing := _figure_of(out, entry.shown, _label(entry, entry.shown)))
        ]
        for place, (label, row, drawing) in enumerate(drawn):
            figures.append(_on_page(label, row, drawing if len(figures) < _ON_PAGE else "", folded=place > 0))
    if not figures:
        return ""
    return (
        '<section><h2 id="density">What the models have learned</h2>'
        "<p>Samples, the paths that lead to them, and the log density that each model itself gives the square that is "
        f"enlarged. The best of a data set comes first.</p>{''.join(figures)}</section>"
    )


def _on_page(label: str, row: Row, drawing: str, *, folded: bool) -> str:
    """A figure, or without its drawing where it lies (HTML)."""
    name = escape(file_name(str(row["run"])))
    if not drawing:
        return f"<p>{escape(label)}: see {name}, which lies beside this page.</p>"
    # A narrow page scrolls the figure, whose words would else be too small to read.
    figure = f'<div class="scroll eight" tabindex="0" role="region" aria-label="{escape(label)}">{drawing}</div>'
    return f"<details><summary>{escape(label)}</summary>{figure}</details>" if folded else figure
