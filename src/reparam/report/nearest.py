"""Samples beside the training pictures nearest to them: whether a model repeats what it was shown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .plots import escape, number, swatch
from .rows import Entry, Study
from .sheets import link, shrunk
from .tracks import arrays_of, colours_last

_ROWS, _NEAREST = 12, 4
#: So many rows are seen at once, the rest on demand.
_SHOWN = 6
#: Bytes of all pictures here. How many rows and how large: the first of these that fits.
_ROOM = 750_000
_LADDER = [(12, 64), (8, 64), (8, 48), (6, 48), (8, 32), (6, 32), (4, 32), (4, 24), (2, 24)]
#: A sample this much nearer than real pictures are is counted.
_CLOSE = 0.5
_ORDINALS = ("nearest", "2nd", "3rd", "4th")


@dataclass(frozen=True)
class Neighbours:
    """The nearest training pictures of a run's samples, the closest sample first.

    Attributes:
        samples: [m, H, W, C]. nearest: [m, k, H, W, C], the nearest first.
        distance: [m, k], not finite where it is not known.
        typical: the mean distance of held-out real pictures to their nearest; may be NaN.
    """

    samples: np.ndarray
    nearest: np.ndarray
    distance: np.ndarray
    typical: float

    @classmethod
    def read(cls, out: Path, run: str) -> Neighbours | None:
        """A run's, or None where there are none."""
        file = arrays_of(out, run, "nearest.npz")
        if not {"samples", "nearest", "distance"} <= set(file):
            return None
        samples, nearest = colours_last(file["samples"], 1), colours_last(file["nearest"], 2)
        distance = np.asarray(file["distance"], float)
        if samples is None or nearest is None:
            return None
        if nearest.shape[:2] != distance.shape or (len(nearest), *nearest.shape[2:]) != samples.shape:
            return None
        typical = float(np.asarray(file.get("typical", math.nan), float).reshape(-1)[0])
        order = np.argsort(distance[:, 0], kind="stable")[:_ROWS]
        return cls(samples[order], nearest[order, :_NEAREST], distance[order, :_NEAREST], typical)

    def links(self, rows: int, side: int) -> list[list[str]]:
        """The pictures of the first rows, each sample before its neighbours, as ends of data URIs."""
        small = [shrunk(pictures[:rows], side) for pictures in (self.samples, self.nearest)]
        return [[link(picture) for picture in (sample, *near)] for sample, near in zip(*small, strict=True)]


def nearest_section(study: Study, out: Path) -> str:
    """Samples beside the training pictures nearest to them (HTML); empty where no run has any."""
    found = {
        data: [
            (entry, near)
            for entry in entries
            if entry.finished and (near := Neighbours.read(out, str(entry.shown.get("run", "")))) is not None
        ]
        for data, entries in study.groups.items()
    }
    found = {data: pairs for data, pairs in found.items() if pairs}
    if not found:
        return ""
    links = _fitted([near for pairs in found.values() for _, near in pairs])
    strips = ""
    for data, pairs in found.items():
        figures = "".join(_figure(entry, near, links.pop(0)) for entry, near in pairs)
        strips += f'<section class="strip"><h3>{escape(data)}</h3><div class="nears">{figures}</div></section>'
    return (
        '<section><h2 id="nearest">Nearest training pictures</h2>'
        "<p>Each row is a sample, and then the training pictures nearest to it with their distance (Euclidean, in "
        "the normalised units that the model sees). A sample far closer to one of them than real pictures are was "
        "memorised, not made up. Blurred and plain pictures come close to many without repeating any, so look "
        f"at the pair before you judge. The closest samples come first.</p>{strips}</section>"
    )


def _fitted(all_of_them: list[Neighbours]) -> list[list[list[str]]]:
    """The pictures of every figure, fewer and smaller until all fit."""
    links: list[list[list[str]]] = []
    for rows, side in _LADDER:
        links = [near.links(rows, side) for near in all_of_them]
        if sum(len(link) for rows_of in links for row in rows_of for link in row) * 3 // 4 <= _ROOM:
            break
    return links


def _figure(entry: Entry, near: Neighbours, links: list[list[str]]) -> str:
    """One entry's rows (HTML)."""
    small = ' class="small"' if max(near.samples.shape[1:3]) <= 48 else ""
    count = near.nearest.shape[1]
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("sample", *_ORDINALS[:count]))
    rows = [_row(i, pictures, near.distance[i]) for i, pictures in enumerate(links)]

    def table(part: list[str]) -> str:
        return f"<table{small}><thead><tr>{heads}</tr></thead><tbody>{''.join(part)}</tbody></table>"

    more = len(rows) - _SHOWN
    rest = f"<details><summary>{more} more</summary>{table(rows[_SHOWN:])}</details>" if more > 0 else ""
    return (
        f'<figure class="near"><figcaption>{swatch(entry.series)}<span>{escape(entry.label)}</span></figcaption>'
        f"<p>{_told(near)}</p>{table(rows[:_SHOWN])}{rest}</figure>"
    )


def _row(index: int, pictures: list[str], distance: np.ndarray) -> str:
    sample = f'<td><img src="data:{pictures[0]}" alt="sample {index + 1}"></td>'
    others = "".join(
        f'<td><img src="data:{picture}" alt="training picture"><small>{number(float(d))}</small></td>'
        for picture, d in zip(pictures[1:], distance, strict=True)
    )
    return f"<tr>{sample}{others}</tr>"


def _told(near: Neighbours) -> str:
    """How close the samples come, and how close real pictures do (HTML)."""
    known = near.distance[:, 0][np.isfinite(near.distance[:, 0])]
    if not len(known):
        return "No distance is known."
    words = f"Distance to the nearest: median {number(float(np.median(known)))} of {len(known)} samples"
    if not math.isfinite(near.typical):
        return words + "."
    close = int((known < _CLOSE * near.typical).sum())
    told = f"<b>{close} of {len(known)}</b> come" if close else "None comes"
    return f"{words}; real pictures: {number(near.typical)}. {told} closer than half of that."
