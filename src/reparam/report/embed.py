"""The samples as the page carries them: quantised, compressed, and thinned out to a bounded size."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .plots import contact_sheet
from .rows import Study
from .sheets import Cells, Sheet, can_be_lossy, link
from .tracks import LARGEST, SPAN, Frame, Strip, Track, evenly

#: Bytes that the page may carry of points, of pictures, and of final pictures without loss: each
#: before base64 makes them a third larger.
_POINTS, _PICTURES, _STILLS = 2_300_000, 3_500_000, 1_200_000
#: The quality of JPEG for the final pictures where there are too many of them, and for those before.
_FINE, _COARSE = 92, 80
#: So many steps of each run are to be shown. Pictures stay without loss where that leaves _PLENTY.
_FEW, _PLENTY = 10, 24
#: How large and how many pictures are shown: the first of these that leaves room for enough steps.
_LADDER = [(side, most) for side in (LARGEST, 48, 32, 24, 16) for most in (36, 25, 16)]
#: Of the room of pictures, maps of how sure a model was take at most this part, in pictures no larger than
#: the first of these that leaves room for enough steps.
_MAPS, _MAP_SIDES = 0.25, (32, 24, 16, 8)


def strips(study: Study, out: Path) -> list[Strip]:
    """All samples of the study, in as many bytes as the page may carry."""
    found = []
    for data, entries in study.groups.items():
        tracks = {e.series: Track.read(out, str(e.shown.get("run", ""))) for e in entries}
        present = {series: track for series, track in tracks.items() if track is not None}
        kind = next((track.kind for track in present.values()), "points")
        found.append(Strip(data, entries, {s: track for s, track in present.items() if track.kind == kind}))
    points = [strip for strip in found if strip.first is not None and strip.first.kind == "points"]
    used = _fit_points(points)
    pictures = [strip for strip in found if strip.first is not None and strip.first.kind == "pictures"]
    if pictures:
        _fit_pictures(pictures, max(_PICTURES - used, _PICTURES // 3))
    return found


def _fit_points(found: Sequence[Strip]) -> int:
    """Quantise all points, and leave out steps until they fit. Returns the bytes they take."""
    for strip in found:
        assert strip.first is not None
        strip.frame = Frame.around(strip.first.real)
        real = strip.frame.quantised(strip.first.real)
        for track in strip.tracks.values():
            track.frames, track.real = strip.frame.quantised(track.frames), real
            track.spread = None if track.spread is None else strip.frame.roots(track.spread)
    total = sum(_weight(track) for strip in found for track in strip.tracks.values())
    if total > _POINTS:
        for strip in found:
            strip.tracks = {s: t.thinned(int(len(t.frames) * _POINTS / total)) for s, t in strip.tracks.items()}
    return min(total, _POINTS)


def _weight(track: Track) -> int:
    """The bytes of a track of points."""
    return track.frames.nbytes + (0 if track.spread is None else track.spread.nbytes)


# ------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True)
class _Plan:
    """How pictures are shown: their size, how many, how finely, and how many steps of each run.

    ``still`` and ``moving``: the quality of the final ones and of those before; None is without loss.
    """

    side: int
    most: int
    still: int | None
    moving: int | None
    steps: int = 0


def _fit_pictures(found: Sequence[Strip], room: int) -> None:
    """Give every strip its sheets, in about ``room`` bytes together."""
    for_maps = int(_MAPS * room) if any(t.spread is not None for s in found for t in s.tracks.values()) else 0
    plan = _plan(found, room - for_maps)
    for strip in found:
        for series, track, cells in _panels(strip, plan.most):
            at = np.array([len(track.frames) - 1]) if series is None else evenly(len(track.frames), plan.steps)
            links = [link(cells.sheet(track.frames[i], plan.side), plan.moving) for i in at[:-1]]
            final = track.real if series is None else track.frames[-1]
            links.append(link(cells.sheet(final, plan.side), plan.still))
            lossy = (plan.still is not None, plan.moving is not None)
            strip.sheets[series] = Sheet(cells, tuple(links), at, cells.arranged(final, plan.side), track.size, lossy)
    _fit_maps(found, for_maps)


def _fit_maps(found: Sequence[Strip], room: int) -> None:
    """Give the sheets their maps of standard deviations, in about ``room`` bytes together."""
    quality = _COARSE if can_be_lossy() else None
    mapped = [
        (strip.sheets[series].cells, track, deepest(strip))
        for strip in found
        for series, track in strip.tracks.items()
        if track.spread is not None
    ]
    if not mapped:
        return
    longest, side, steps = max(len(track.frames) for _, track, _ in mapped), 0, 0
    for side in _MAP_SIDES:
        few = [_map(*each, i, side, quality) for each in mapped for i in evenly(len(each[1].frames), 3)]
        steps = room * len(few) // (len(mapped) * sum(_bytes(text) for text in few))
        if steps >= min(_FEW, longest):
            break
    for strip in found:
        for series, sheet in strip.sheets.items():
            track = None if series is None else strip.tracks[series]
            if track is not None and track.spread is not None:
                at = evenly(len(track.frames), steps)
                maps = tuple(_map(sheet.cells, track, deepest(strip), i, side, quality) for i in at)
                strip.sheets[series] = replace(sheet, maps=maps, mapped=at)


def deepest(strip: Strip) -> float:
    """The standard deviation that is brightest in all maps of a strip."""
    return max(track.spread_max for track in strip.tracks.values() if track.spread is not None)


def _map(cells: Cells, track: Track, brightest: float, frame: int, side: int, quality: int | None) -> str:
    """A map of standard deviations; brightness goes with the root, or the last steps would all be black."""
    assert track.spread is not None
    part = cells.arranged(track.spread[frame], side, 0) * (track.spread_max / (255 * brightest))
    return link(contact_sheet(np.rint(255 * np.sqrt(part)).astype(np.uint8), columns=cells.columns, ground=0), quality)


def _plan(found: Sequence[Strip], room: int) -> _Plan:
    """The first of the ladder that leaves enough steps."""
    lossy = _COARSE if can_be_lossy() else None
    longest = max(len(track.frames) for strip in found for track in strip.tracks.values())
    side, most = _LADDER[0]
    plan, left = _still(found, side, most, room)
    steps = 1 + left // _cost(found, plan, None)
    if steps >= min(_PLENTY, longest):
        return _Plan(side, most, plan.still, None, steps)
    for side, most in _LADDER:
        plan, left = _still(found, side, most, room)
        steps = 1 + left // _cost(found, plan, lossy)
        if steps >= min(_FEW, longest):
            break
    return _Plan(side, most, plan.still, lossy, max(2, steps))


def _still(found: Sequence[Strip], side: int, most: int, room: int) -> tuple[_Plan, int]:
    """How the final pictures of this size and number are kept, and the bytes that this leaves."""

    def total(quality: int | None) -> int:
        return sum(
            _bytes(link(cells.sheet(track.real if series is None else track.frames[-1], side), quality))
            for strip in found
            for series, track, cells in _panels(strip, most)
        )

    exact = total(None)
    if exact <= _STILLS or not can_be_lossy():
        return _Plan(side, most, None, None), room - exact
    return _Plan(side, most, _FINE, None), room - total(_FINE)


def _cost(found: Sequence[Strip], plan: _Plan, quality: int | None) -> int:
    """The bytes that a step of all runs takes, by a few of them."""
    total = 1.0
    for strip in found:
        for series, track, cells in _panels(strip, plan.most):
            if series is not None:
                sheets = [cells.sheet(track.frames[i], plan.side) for i in evenly(len(track.frames), 3)]
                total += float(np.mean([_bytes(link(sheet, quality)) for sheet in sheets]))
    return int(total)


def _bytes(data: str) -> int:
    return len(data) * 3 // 4


def _panels(strip: Strip, most: int) -> Iterator[tuple[int | None, Track, Cells]]:
    """The panels of a strip: the real data's (None) and each track's, with where its pictures stand."""
    assert strip.first is not None
    shared = Cells.of(strip.labels, min(t.frames.shape[1] for t in strip.tracks.values()), most)
    real = next((t for t in strip.tracks.values() if t.real_labels), strip.first)
    if shared.classes and set(real.real_labels) & set(shared.classes):
        yield None, real, Cells.by_class(real.real_labels, shared.classes, most)
    else:
        yield None, real, Cells(shared.columns, tuple(range(min(len(real.real), len(shared.places)))))
    for series, track in strip.tracks.items():
        # The same cell holds the same sample in all panels, though only some were asked for classes.
        yield series, track, Cells(shared.columns, shared.places, shared.classes if track.labels else ())


# ------------------------------------------------------------------------------------ for the script


def packed(strip: Strip) -> dict[str, Any]:
    """A strip as the script reads it. Final pictures and real ones it takes from the page."""
    first, frame = strip.first, strip.frame
    if first is not None and strip.sheets:
        panels = [
            {
                **_steps(series, track, strip.sheets[series].kept),
                "frames": strip.sheets[series].links[:-1],
                **_maps(track, strip.sheets[series]),
            }
            for series, track in strip.tracks.items()
        ]
        return {"kind": "pictures", "panels": panels}
    return {
        "kind": "points" if first else "none",
        "span": SPAN,
        "centre": list(frame.centre) if frame else None,
        "half": frame.half if frame else None,
        "real": None if first is None else {"shape": [1, *first.real.shape], "data": _text(first.real)},
        "panels": [
            {**_steps(s, t, t.kept), "shape": list(t.frames.shape), "data": _text(t.frames), **_ellipses(t)}
            for s, t in strip.tracks.items()
        ],
    }


def _steps(series: int, track: Track, kept: np.ndarray) -> dict[str, Any]:
    return {
        "series": series,
        "steps": len(track.times) - 1,
        "kept": kept.tolist(),
        "t": [round(float(track.times[i]), 4) for i in kept],
    }


def _ellipses(track: Track) -> dict[str, Any]:
    """How many of the points have an ellipse, and the roots of all frames; nothing where a model tells none."""
    return {} if track.spread is None else {"sure": {"count": track.spread.shape[1], "data": _text(track.spread)}}


def _maps(track: Track, sheet: Sheet) -> dict[str, Any]:
    """The maps with their times; nothing where a model tells none."""
    times = [round(float(track.times[i]), 4) for i in sheet.mapped]
    return {"sure": {"t": times, "frames": sheet.maps}} if sheet.maps else {}


def _text(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
