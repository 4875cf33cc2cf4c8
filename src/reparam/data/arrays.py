"""The user's own arrays, and the real digits that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError


def load_array(path: str, key: str | None = None, allow_constant: bool = False) -> tuple[Tensor, str]:
    """A float64 tensor [N, …] and its name from a .npy or .npz file (never pickled).

    Raises:
        DataError: if the file is missing, empty or malformed; if it has fewer than two axes;
            if it holds NaN or infinity; or, unless allowed, if a column never changes.
    """
    file = Path(path).expanduser()
    return checked(_read(file, key), str(file), allow_constant), file.name


def checked(raw: np.ndarray, file: str, allow_constant: bool = False) -> Tensor:
    """The samples as float64, or the errors of :func:`load_array`; ``file`` is what to call them."""
    if raw.dtype.kind not in "fiub":
        raise DataError(f"{file} holds {raw.dtype}; expected real numbers.")
    if raw.ndim < 2:
        raise DataError(
            f"{file} has shape {list(raw.shape)}; expected one sample a row, shape [N, D]. For N samples of one "
            "number each, save x.reshape(-1, 1)."
        )
    if raw.dtype == np.uint8 and raw.ndim in (3, 4):
        raise DataError(
            f"{file} holds bytes of shape {list(raw.shape)}: pictures, by the look of it. As such they are read from a "
            "file with --set data.name=images, or given from Python as [N, C, H, W] with C = 1 or 3; if they are none, "
            "give floating-point numbers."
        )
    if 0 in raw.shape:
        raise DataError(f"{file} is empty: shape {list(raw.shape)}.")
    x = torch.from_numpy(raw.astype(np.float64))
    _refuse_non_finite(x, file)
    if not allow_constant:
        _refuse_constant(x, file)
    elif not bool(x.std(correction=0) > 0):
        raise DataError(f"{file} holds one and the same number everywhere.")
    return x


def _read(file: Path, key: str | None) -> np.ndarray:
    if not file.exists():
        raise DataError(f"no file {file} (data.path); expected a .npy or .npz file.")
    if not file.is_file() or file.suffix not in (".npy", ".npz"):
        raise DataError(f"{file} (data.path) is not a .npy or .npz file.")
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            names = list(loaded.files)
            if key is None and len(names) == 1:
                key = names[0]
            if key not in names:
                asked = "which one is not said" if key is None else f"none is called {key!r}"
                raise DataError(
                    f"{file} holds the arrays {', '.join(names)}; {asked}. Give data.key, "
                    f"for example --set data.key={names[0] if names else 'x'}."
                )
            return np.asarray(loaded[key])
    except (OSError, ValueError, EOFError, BadZipFile) as e:
        raise DataError(f"cannot read {file}: {e}. Expected an array saved by numpy, not pickled.") from e


def _refuse_non_finite(x: Tensor, file: str) -> None:
    bad = ~x.isfinite()
    if bool(bad.any()):
        first = [int(i) for i in bad.nonzero()[0]]
        rows = int(bad.flatten(1).any(1).sum())
        raise DataError(
            f"{file} holds NaN or infinity in {rows} of {len(x)} samples, first at index {first}; drop or repair them."
        )


def _refuse_constant(x: Tensor, file: str) -> None:
    flat = x.flatten(1)
    constant = (flat == flat[0]).all(0).nonzero().flatten().tolist()
    if constant:
        shown = ", ".join(map(str, constant[:8])) + (", …" if len(constant) > 8 else "")
        raise DataError(
            f"{file}: {len(constant)} of {flat.shape[1]} columns never change ({shown}); a model learns nothing "
            "from them. Drop them, or keep them with --set data.allow_constant=true."
        )


def load_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 scanned digits, 8×8: pixels [N, 64] in 0 … 16, float32, and their labels, int64.

    Raises:
        DataError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as e:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install 'reparam[digits]'."
        ) from e
    found = load()
    return torch.from_numpy(found.data).float(), torch.from_numpy(found.target).long()
