"""Labels as numbers, and the names of their classes."""

from __future__ import annotations

import numpy as np

from ...errors import DataError
from .messages import shown
from .source import Options, Source

#: Names of sub-folders and files that are no classes, but parts of a data set.
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
#: What a column or a field of labels may be called.
LABELS = ("label", "labels", "fine_label", "coarse_label", "class", "target", "y")
_MOST_IDS = 1000  # labels that skip numbers are fine up to here; beyond, they may be anything


def numbered(values: np.ndarray, names: tuple[str, ...], what: str, ask: Options) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels, whole numbers or text, as numbers 0, 1, …, int64; and the names of the classes."""
    if values.dtype.kind == "U":
        found, numbers = np.unique(values, return_inverse=True)
        return numbers.astype(np.int64), tuple(shown(name, 400) for name in found.tolist())
    high, wrong = int(values.max(initial=0)), ""
    if (values < 0).any():
        below = int((values < 0).sum())
        wrong = f"run from {values.min()} to {high}: {below} of {len(values)} pictures are unlabelled (below 0)"
    elif names and high >= len(names):
        wrong = f"run up to {high}, but the file names only {len(names)} classes"
    elif high >= max(_MOST_IDS, 2 * (different := len(np.unique(values))), ask.classes or 0):
        wrong = f"run from {values.min()} to {high} with only {different} different ones"
    if wrong:
        raise DataError(
            f"{what} {wrong}. Expected classes numbered 0, 1, …; number them so, or ignore the labels with "
            "--set data.labels=none."
        )
    return values.astype(np.int64), names or tuple(map(str, range(high + 1)))


def declared(source: Source, classes: int | None) -> tuple[str, ...]:
    """The names of the classes, padded up to as many as were declared."""
    names = source.classes
    if classes is None or source.labels is None:
        return names
    if len(names) > classes:
        few = ", ".join(shown(name) for name in names[:5]) + (", …" if len(names) > 5 else "")
        raise DataError(
            f"{source.what} has {len(names)} classes ({few}), and data.classes={classes} expects at most {classes}. "
            f"Correct it with --set data.classes={len(names)}, or ignore the labels with --set data.labels=none."
        )
    return names + tuple(map(str, range(len(names), classes)))
