"""What a path stands for: a folder, a file, or a pattern of shards."""

from __future__ import annotations

import glob
import itertools
import re
from pathlib import Path

from ...errors import DataError
from .messages import shown

#: What pictures are read from.
READS = (
    "a folder of pictures, a folder of .parquet or .tar shards, a .zip of pictures, a .parquet or .tar file, a pattern "
    "of shards (train-{0000..0009}.tar, *.parquet), hub:OWNER/NAME, or a .npz or .npy file of uint8 pictures"
)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST = 1_000_000  # files that a pattern may stand for


def found(path: str) -> list[Path]:
    """The folder or the file at ``path``, or the files that a pattern stands for; ``~`` is the home directory.

    Raises:
        DataError: if there is nothing, or not all that a pattern names.
    """
    if not path:
        raise DataError(f"no path is given; expected {READS}: --set data.path=PATH.")
    try:
        file = Path(path).expanduser()
        if file.exists():
            return [file]
    except (OSError, RuntimeError, ValueError) as e:
        raise DataError(f"cannot look at {shown(str(path))} (data.path): {e}.") from e
    if re.search(r"[*?\[{]", path):
        return _matching(str(file))
    raise DataError(f"no file or folder {shown(str(file))} (data.path); expected {READS}.")


def _matching(pattern: str) -> list[Path]:
    """The files of a pattern: ``{0..9}`` stands for each number, with as many digits; ``*``, ``?`` as in a shell."""
    files: list[Path] = []
    for one in _spelled(pattern):
        here = [one] if not glob.has_magic(one) else sorted(glob.glob(one, recursive=True))
        if not here or not Path(here[0]).exists():
            raise DataError(f"no file {shown(one, 400)}, of the pattern {shown(pattern, 400)} (data.path).")
        files += map(Path, here)
    endings = {file.suffix.lower() or "other" for file in files}
    if endings not in ({".parquet"}, {".tar"}):
        raise DataError(
            f"the pattern {shown(pattern, 400)} (data.path) stands for {', '.join(sorted(endings))} files, "
            f"such as {shown(files[0].name)}; expected only .parquet or only .tar shards."
        )
    return files


def _spelled(pattern: str) -> list[str]:
    pieces = _RANGE.split(pattern)
    choices = [[pieces[0]]]
    for first, last, rest in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        numbers = range(int(first), int(last) + 1)
        if not 0 < len(numbers) <= _MOST:
            raise DataError(
                f"{{{first}..{last}}} in {shown(pattern, 400)} (data.path) counts {len(numbers)} files; expected at "
                f"least 1 and at most {_MOST:,}, in ascending order."
            )
        choices.append([f"{n:0{len(first)}d}{rest}" for n in numbers])
    return ["".join(parts) for parts in itertools.product(*choices)]
