"""What the runs' samples went through, step by step, as their folders hold it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from .rows import Entry
from .sheets import Sheet, shrunk

#: What is kept of a run: points; pictures, of which enough for some of every class; and their size.
_POINTS, _PICTURES, LARGEST = 256, 120, 64
#: Of so many points it is drawn how sure the model was.
ELLIPSES = 12
#: Points are kept up to this many times the half width of the frame, and clipped there.
SPAN = 4.0
_MISSING = -32768


def arrays_of(out: Path, run: str, name: str) -> dict[str, np.ndarray]:
    """The arrays in a file of a run's folder; none where it is missing, damaged or outside the study."""
    if not run or Path(run).is_absolute() or ".." in Path(run).parts:
        return {}
    try:
        with np.load(out / run / name, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
        return {}


def colours_last(pictures: np.ndarray, leading: int) -> np.ndarray | None:
    """uint8 pictures with so many leading axes as [..., H, W, C]; None if they are no such pictures."""
    if pictures.dtype != np.uint8 or 0 in pictures.shape:
        return None
    if pictures.ndim == leading + 2:
        return pictures[..., None]
    return pictures if pictures.ndim == leading + 3 and pictures.shape[-1] in (1, 3) else None


@dataclass
class Track:
    """What a run believed x0 to be, step by step: points in units of the frame, or pictures.

    Attributes:
        kind: "points" or "pictures". axes: what is drawn.
        frames: [F, m, 2] int16, or uint8 pictures [F, m, H, W, C]. real: the same for real data.
        times: t at each of all steps. kept: which of the steps are in ``frames``.
        labels: the class asked of each picture, and ``real_labels`` that of the real ones; may be empty.
        size: height and width of the pictures as they were.
        spread: how sure the model was, where it told: of the first ``ELLIPSES`` points the covariance (xx, xy,
            yy) of x0 given x_t, [F, n, 3], and once quantised its triangular root; or of pictures the standard
            deviations, uint8 [F, m, H, W, 1], of which 255 is ``spread_max``.
    """

    kind: str
    axes: str
    frames: np.ndarray
    real: np.ndarray
    times: np.ndarray
    kept: np.ndarray
    labels: tuple[str, ...] = ()
    real_labels: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)
    spread: np.ndarray | None = None
    spread_max: float = 1.0

    @classmethod
    def read(cls, out: Path, run: str) -> Track | None:
        """A run's track, unquantised; None where there is none."""
        file = arrays_of(out, run, "trajectory.npz")
        if not {"kind", "frames", "real", "times"} <= set(file):
            return None
        times = np.asarray(file["times"], float).reshape(-1)
        if not len(times) or len(file["frames"]) != len(times):
            return None
        kept, axes = np.arange(len(times)), str(file.get("axes", ""))
        if str(file["kind"]) == "pictures":
            return cls._of_pictures(file, axes, times, kept)
        frames, real = file["frames"], file["real"]
        if frames.ndim != 3 or real.ndim != 2 or frames.shape[2] != 2 or real.shape[1] != 2:
            return None
        kept_points = frames[:, :_POINTS].astype(float)
        return cls("points", axes, kept_points, real[:_POINTS].astype(float), times, kept, spread=_covariances(file))

    @classmethod
    def _of_pictures(cls, file: dict[str, np.ndarray], axes: str, times: np.ndarray, kept: np.ndarray) -> Track | None:
        frames, real = colours_last(file["frames"], 2), colours_last(file["real"], 1)
        if frames is None or real is None:
            return None
        small = np.stack([shrunk(frame[:_PICTURES], LARGEST) for frame in frames])
        spread, most = _deviations(file, frames.shape[:4])
        return cls(
            "pictures",
            axes,
            small,
            shrunk(real[:_PICTURES], LARGEST),
            times,
            kept,
            _names(file.get("labels"), frames.shape[1]),
            _names(file.get("real_labels"), len(real)),
            (frames.shape[2], frames.shape[3]),
            spread,
            most,
        )

    def thinned(self, most: int) -> Track:
        """Points with at most so many frames, the first and the last among them."""
        at = evenly(len(self.frames), most)
        spread = None if self.spread is None else self.spread[at]
        return Track(self.kind, self.axes, self.frames[at], self.real, self.times, self.kept[at], spread=spread)


def _names(labels: np.ndarray | None, count: int) -> tuple[str, ...]:
    """Labels as text, one a picture that is kept; none where they do not belong to the pictures."""
    if labels is None or labels.shape != (count,):
        return ()
    return tuple(str(label) for label in labels[:_PICTURES])


def _covariances(file: dict[str, np.ndarray]) -> np.ndarray | None:
    """Of the points whose ellipses are drawn; None where a run tells none, or none of these points."""
    spread = file.get("spread")
    if spread is None or spread.dtype.kind != "f" or spread.shape != (*file["frames"].shape[:2], 3):
        return None
    return spread[:, :ELLIPSES].astype(float)


def _deviations(file: dict[str, np.ndarray], shape: tuple[int, ...]) -> tuple[np.ndarray | None, float]:
    """Maps of standard deviations with what 255 stands for; None where a run tells none of these pictures."""
    spread, most = file.get("spread"), np.asarray(file.get("spread_max", math.nan))
    if spread is None or spread.dtype != np.uint8 or spread.shape != shape or most.size != 1 or most.dtype.kind != "f":
        return None, 1.0
    largest = float(most.reshape(()))
    if not (math.isfinite(largest) and largest > 0):
        return None, 1.0
    return np.stack([shrunk(frame[:_PICTURES, :, :, None], LARGEST) for frame in spread]), largest


def evenly(count: int, most: int) -> np.ndarray:
    """At most so many of 0 … count − 1, evenly apart, the first and the last among them."""
    return np.unique(np.rint(np.linspace(0, count - 1, min(count, max(2, most)))).astype(int))


@dataclass(frozen=True)
class Frame:
    """The window of all panels of a data set: centre and half width, from the real data."""

    centre: tuple[float, float]
    half: float

    @classmethod
    def around(cls, real: np.ndarray) -> Frame:
        finite = real[np.isfinite(real).all(1)]
        if not len(finite):
            return cls((0.0, 0.0), 1.0)
        low, high = finite.min(0), finite.max(0)
        middle = (low + high) / 2
        return cls((float(middle[0]), float(middle[1])), float((high - low).max()) * 0.5 * 1.15 or 1.0)

    def quantised(self, points: np.ndarray) -> np.ndarray:
        """Points as int16, the frame's half width being 32767/SPAN; what is not finite as -32768."""
        scaled = (points - np.asarray(self.centre)) / self.half * (32767 / SPAN)
        whole = np.clip(np.rint(np.nan_to_num(scaled, nan=0.0, posinf=1e9, neginf=-1e9)), -32767, 32767)
        whole[~np.isfinite(points).all(-1)] = _MISSING
        return whole.astype("<i2")

    def roots(self, covariances: np.ndarray) -> np.ndarray:
        """Covariances [..., 3] (xx, xy, yy) as int16: their lower triangular roots [..., 3] (xx, xy, yy).

        In the units of :meth:`quantised`, and cut off where that is. What is no covariance is -32768.
        """
        xx, xy, yy = np.moveaxis(covariances / self.half**2, -1, 0)
        with np.errstate(all="ignore"):
            first = np.sqrt(xx)
            slant = np.where(xx > 0, xy / first, 0.0)
            rest = yy - slant**2
            # What is negative by no more than the rounding of float32 is a line, not an ellipse.
            second = np.sqrt(np.where((rest < 0) & (rest > -1e-6 * yy), 0.0, rest))
        root = np.stack([first, slant, second], -1)
        known = np.isfinite(root).all(-1)
        whole = np.clip(np.rint(np.where(known[..., None], root, 0.0) * (32767 / SPAN)), -32767, 32767)
        whole[~known] = _MISSING
        return whole.astype("<i2")


def unit(points: np.ndarray) -> np.ndarray:
    """Quantised points in units of the frame's half width."""
    return points.astype(float) * (SPAN / 32767)


@dataclass
class Strip:
    """The panels of one data set: the real data's and a track for each entry that has one.

    Attributes:
        frame: the window of all panels, for points.
        sheets: what is shown of each track, and of the real data (None), for pictures.
    """

    data: str
    entries: list[Entry]
    tracks: dict[int, Track]
    frame: Frame | None = None
    sheets: dict[int | None, Sheet] = field(default_factory=dict)

    @property
    def first(self) -> Track | None:
        return next(iter(self.tracks.values()), None)

    @property
    def labels(self) -> Sequence[str]:
        """The classes asked of the samples, where all tracks that have any agree; else none."""
        found = {track.labels for track in self.tracks.values() if track.labels}
        return found.pop() if len(found) == 1 else ()
