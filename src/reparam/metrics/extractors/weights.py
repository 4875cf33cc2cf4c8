"""Where a network's weights lie: a path that is given, or one in the environment."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import DataError


def given(path: str | None, variable: str, extractor: str) -> Path | None:
    """The path that is given, or else that in the environment; None if neither.

    Raises:
        DataError: if there is nothing at that path.
    """
    told = path or os.environ.get(variable)
    if not told:
        return None
    found = Path(told).expanduser()
    if not found.exists():
        how = "extractor.path" if path else f"{variable} in the environment"
        raise DataError(f"extractor {extractor}: there is nothing at {told} ({how}). Give the path of its weights.")
    return found


def nothing_given(extractor: str, what: str, variable: str) -> DataError:
    """The error that says all the ways to give an extractor its weights."""
    return DataError(
        f"extractor {extractor} needs {what}, and none was given. Give its path (--set extractor.path=PATH), or set "
        f"{variable}=PATH in the environment, or have it downloaded (--set extractor.download=true)."
    )
