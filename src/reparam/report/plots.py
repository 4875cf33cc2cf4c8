"""Figures as SVG: the colours, words and marks of all, scatter plots, and sheets of pictures.

Every element carries its light colour as a presentation attribute and a class. A page or a style
sheet may restyle the classes (the dark theme does); a converter that knows no CSS still draws the
light theme.
"""

from __future__ import annotations

import html
import math
import re
import struct
import zlib

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

# What XML 1.0 forbids, halves of surrogate pairs, which UTF-8 cannot carry, and the marks that turn the
# direction of all text after them.
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]")


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


def dark_rules() -> str:
    """The dark colours of a drawing that stands by itself."""
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
    """A PNG file of uint8 pixels: [H, W] or [H, W, 1] grey, or [H, W, 3] colour."""
    height, width, *colours = np.shape(pixels)
    rows = np.ascontiguousarray(pixels, dtype=np.uint8).reshape(height, -1)
    channels = 3 if colours == [3] else 1
    body = zlib.compress(_filtered(rows, channels).tobytes(), 6)

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _filtered(rows: np.ndarray, channels: int) -> np.ndarray:
    """Rows of bytes as what PNG's filters leave of them, each behind its filter's number.

    Of no filter, left, above, mean and Paeth's, each row gets the one that leaves the least.
    """
    x = rows.astype(np.int16)
    left = np.pad(x, ((0, 0), (channels, 0)))[:, : x.shape[1]]
    above = np.pad(x, ((1, 0), (0, 0)))[:-1]
    corner = np.pad(left, ((1, 0), (0, 0)))[:-1]
    guess = left + above - corner
    off = [abs(guess - near) for near in (left, above, corner)]
    paeth = np.where((off[0] <= off[1]) & (off[0] <= off[2]), left, np.where(off[1] <= off[2], above, corner))
    rest = np.stack([x, x - left, x - above, x - (left + above) // 2, x - paeth]).astype(np.uint8)
    best = np.abs(rest.view(np.int8).astype(np.int16)).sum(2).argmin(0)
    return np.concatenate([best[:, None].astype(np.uint8), rest[best, np.arange(len(x))]], axis=1)


def sheet_columns(count: int) -> int:
    """How many pictures stand side by side on a sheet."""
    return max(1, math.ceil(math.sqrt(count)))


def contact_sheet(pictures: np.ndarray, *, columns: int | None = None, gap: int = 0, ground: int = 128) -> np.ndarray:
    """Pictures [n, H, W(, C)] side by side, [h, w(, C)], with ``ground`` between them and after the last."""
    count, height, width, *colours = pictures.shape
    columns = columns or sheet_columns(count)
    lines = math.ceil(count / columns)
    tall, wide = height + gap, width + gap
    full = np.full((lines * columns, tall, wide, *colours), ground, np.uint8)
    full[:count, :height, :width] = pictures
    grid = full.reshape(lines, columns, tall, wide, *colours).swapaxes(1, 2)
    return grid.reshape(lines * tall, columns * wide, *colours)[: lines * tall - gap, : columns * wide - gap]


def enlarged(sheet: np.ndarray, least: int) -> np.ndarray:
    """A sheet enlarged by the smallest whole factor that makes its longer side at least so long."""
    by = max(1, math.ceil(least / max(sheet.shape[:2])))
    return sheet.repeat(by, axis=0).repeat(by, axis=1)


def picture_sheet(pictures: np.ndarray, *, gap: int = 2, least: int = 256) -> bytes:
    """A PNG file of uint8 pictures [n, H, W(, 3)] side by side on white, large enough to be looked at.

    Args:
        gap: pixels between the pictures, before they are enlarged.
        least: the whole is enlarged by the smallest whole factor that makes its longer side at least this.

    Raises:
        ValueError: if there are no pictures, or the array is none of pictures.
    """
    if pictures.ndim not in (3, 4) or 0 in pictures.shape or (pictures.ndim == 4 and pictures.shape[3] not in (1, 3)):
        raise ValueError(f"expected pictures of shape [n, H, W] or [n, H, W, 3], found {list(pictures.shape)}.")
    return png(enlarged(contact_sheet(pictures, gap=gap, ground=255), least))


def pictures_panel(link: str, cells: tuple[int, int], size: tuple[int, int], width: float) -> tuple[str, float]:
    """A sheet of pictures ``width`` wide, and its height.

    Args:
        link: the sheet as a data URI but for its beginning.
        cells: how many pictures stand side by side, and how many lines there are.
        size: height and width of a picture, in pixels of the sheet.
    """
    columns, lines = cells
    cell = width / columns
    height = lines * cell * size[0] / size[1]
    crisp = ' style="image-rendering:pixelated"' if cell > size[1] else ""
    gaps = "".join(f"M{short(cell * i)} 0v{short(height)}" for i in range(1, columns))
    gaps += "".join(f"M0 {short(height * i / lines)}h{short(width)}" for i in range(1, lines))
    box = f'width="{short(width)}" height="{short(height)}"'
    image = f'<image {box} preserveAspectRatio="none"{crisp} href="data:{link}"/>'
    return f'{image}<path d="{gaps}" {paint(stroke="bg")} stroke-width="{short(min(3, cell / 16))}"/>', height


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
