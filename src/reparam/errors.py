"""Errors that a user can cause.

Each says what was found, what was expected and what to do. The command line prints
the message without a traceback and exits with code 2 (``--debug`` shows the traceback).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: So many known names are listed in an error, and more where there is no other list of them.
_FEW = 12


class ReparamError(ValueError):
    """Base of every error that a user can cause."""


class UnknownName(ReparamError):
    """A target, schedule, sampler, recipe, key … of this name does not exist."""


class RecipeError(ReparamError):
    """A recipe, or a ``--set`` override, is malformed."""


class DataError(ReparamError):
    """The data cannot be used as they are."""


class NetworkError(ReparamError):
    """The network cannot be built, or does not return what its target needs."""


class SingularTime(ReparamError):
    """A conversion is asked for at a time at which it does not exist."""


class TimeOutOfRange(ReparamError):
    """A time lies outside [0, 1], or outside what a schedule or a model covers."""


class Conflict(ReparamError):
    """Two settings contradict each other, or are the same thing stated twice."""


class Unsupported(ReparamError):
    """The combination is well formed, but mathematically or practically not available."""


class OutputError(ReparamError):
    """The place to write to is not usable."""


class SpecError(ReparamError):
    """Weights do not say what they are, or what they say cannot be read."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like ``name``, best first."""
    lower = {k.lower(): k for k in known}
    return [lower[m] for m in difflib.get_close_matches(name.lower(), lower, n=count, cutoff=0.5)]


def unknown(kind: str, name: object, known: Iterable[str], listed: str = "") -> UnknownName:
    """The error for a ``name`` that is not among the ``known`` ones of its ``kind``.

    Where there are more than a dozen it says what ``listed`` does of how to see them, and names the nearest alone.
    """
    known = sorted(known)
    close = nearest(str(name), known)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    if listed and len(known) > _FEW:
        return UnknownName(f"unknown {kind} {str(name)!r}.{hint} {listed}")
    return UnknownName(
        f"unknown {kind} {str(name)!r}.{hint} " + (f"Known: {', '.join(known)}." if known else "There is none.")
    )
