"""Averages of another width than was tracked, after training (arXiv 2312.02696, section 3.2).

While training, the power-function averages are written now and then (:func:`write_snapshot`). Afterwards any width, at
any step that was written, is a weighted sum of the files (:func:`reconstruct`): the weights make the sum of the stored
profiles nearest to the wanted profile. Some widths need more, or closer, snapshots than there are; how near the sum
comes is computed beforehand from the profiles alone, and what is too far off is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, OutputError, ReparamError, SpecError, Unsupported
from ..files import read_tensors, write_tensors
from .averages import WIDEST, Averages, fit, gamma_of

#: Of the layout of a snapshot.
VERSION = 1
#: Relative L2 distance between the profile that comes out and the wanted one, above which it is refused.
MAX_RESIDUAL = 0.1
#: Rounding of the stored weights, as it comes out, relative to the weights, above which it is refused.
MAX_ROUNDING = 0.01
_KEY = "reparam.average"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_PRECISION = {name: torch.finfo(dtype).eps / 2 for dtype, name in _DTYPES.items()}


class SnapshotError(SpecError):
    """A snapshot cannot be used."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: {why}. Leave it out with skip_bad=True, or remove it.")
        self.path = path
        self.why = why


@dataclass(frozen=True)
class Snapshot:
    """One stored average.

    Attributes:
        path: the file. step: updates that it averages. sigma_rel: its width.
        rounding: the relative precision of its numbers, as 2⁻⁸ for bfloat16.
        kept: names of what is not averaged: buffers, integer parameters.
    """

    path: Path
    step: int
    sigma_rel: float
    rounding: float
    kept: frozenset[str]


@dataclass(frozen=True)
class Reconstruction:
    """What a reconstructed average was made of.

    Attributes:
        step, sigma_rel: of the average.
        residual: ‖profile − wanted profile‖/‖wanted profile‖; 0 is exact. Of weights that fluctuate independently
            from step to step, it is the error relative to what is left of the fluctuation in the average; of weights
            that drift, the error is smaller.
        rounding: what rounding of the snapshots comes to, relative to the weights (root mean square, at most).
        coefficients: by file name; they add up to 1.
        skipped: file name and reason of each bad snapshot that was left out.
    """

    step: int
    sigma_rel: float
    residual: float
    rounding: float
    coefficients: dict[str, float]
    skipped: dict[str, str]


def write_snapshot(folder: str | Path, averages: Averages, step: int, dtype: torch.dtype = torch.float32) -> list[Path]:
    """Write every power-function average as it is, one file each.

    Args:
        folder: where to; made if need be. A run has its own.
        averages: with at least one width.
        step: optimiser steps done, for the names; must be the averages' own count.
        dtype: of the weights in the file: float32, bfloat16 or float16. The narrow ones cost accuracy where
            coefficients are large, for widths below the stored ones (:attr:`Reconstruction.rounding`).

    Returns:
        The paths, in the order of ``averages.widths``.

    Raises:
        ReparamError: if there is no width, the step differs, or weights are not finite (in this dtype).
        Unsupported: for another dtype.
        OutputError: if the files cannot be written.
    """
    if dtype not in _DTYPES:
        raise Unsupported(f"snapshots are of float32, bfloat16 or float16, not of {dtype}.")
    if not averages.widths:
        raise ReparamError("no power-function average to write; make Averages with widths=(0.05, 0.1).")
    if step != averages.updates or step < 1:
        raise ReparamError(
            f"a snapshot was asked for at step {step}, and the averages are at {averages.updates}. "
            "Write it after update(step), from step 1 on."
        )
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"cannot make the folder {folder}: {e.strerror or e}. Choose another place.") from e
    paths = []
    for width in averages.widths:
        which = f"width-{width!r}"
        narrowed = {k: _narrowed(k, v, dtype) for k, v in averages.averaged(which).items()}
        kept = {k: v for k, v in averages.state_dict(which).items() if k not in narrowed}
        record = {"version": VERSION, "step": step, "sigma_rel": width, "kept": sorted(kept), "dtype": _DTYPES[dtype]}
        paths.append(folder / f"step-{step:010d}_width-{width!r}.safetensors")
        write_tensors(paths[-1], {**narrowed, **kept}, {_KEY: json.dumps(record)})
    return paths


def _narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = tensor.detach().to(dtype)
    if not bool(narrow.isfinite().all()):
        raise ReparamError(
            f"the average of {name!r} is not finite in {str(dtype).removeprefix('torch.')}. "
            + ("Use bfloat16 or float32." if bool(tensor.isfinite().all()) else "Training has diverged.")
        )
    return narrow


def list_snapshots(folder: str | Path, *, skip_bad: bool = False) -> tuple[list[Snapshot], dict[str, str]]:
    """The snapshots of a folder by step and width, and why others are left out.

    Args:
        skip_bad: leave out unreadable files, instead of raising.

    Raises:
        DataError: if there are none.
        SnapshotError: if one is not readable.
    """
    folder = Path(folder)
    found, skipped = [], {}
    for path in sorted(folder.glob("step-*_width-*.safetensors")):
        try:
            found.append(_snapshot(path))
        except SnapshotError as e:
            if not skip_bad:
                raise
            skipped[path.name] = e.why
    if not found:
        less = f" but {len(skipped)} that cannot be read" if skipped else ""
        raise DataError(f"no snapshots in {folder}{less}. Train with widths=(0.05, 0.1) and write_snapshot() into it.")
    return sorted(found, key=lambda s: (s.step, s.sigma_rel)), skipped


def _snapshot(path: Path) -> Snapshot:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as f:
            record = json.loads((f.metadata() or {})[_KEY])
        if record["version"] == VERSION:
            step, width, precision = int(record["step"]), float(record["sigma_rel"]), _PRECISION[record["dtype"]]
            gamma_of(width)
            if step < 1:
                raise ValueError(f"step {step}")
            return Snapshot(path, step, width, precision, frozenset(record["kept"]))
    except KeyError as e:
        raise SnapshotError(path, f"not a snapshot of an average (no {e})") from e
    except (SafetensorError, OSError, TypeError, ValueError) as e:
        raise SnapshotError(path, f"not readable: {e}") from e
    raise SnapshotError(path, f"of version {record['version']!r}; this reparam reads {VERSION}")


def reconstruct(
    folder: str | Path,
    width: float,
    step: int | None = None,
    *,
    allow_inexact: bool = False,
    skip_bad: bool = False,
) -> tuple[dict[str, Tensor], Reconstruction]:
    """The average of any width, from the snapshots of a run.

    Files are read one at a time: memory (the CPU's) holds one of them besides the result.

    Args:
        folder: of :func:`write_snapshot`.
        width: σ_rel in (0, 0.2887].
        step: up to which to average, from 1 to the last snapshot's, which it is by default. Best one that has a
            snapshot: in between, an average that ends there is not in what was stored.
        allow_inexact: accept a residual above 0.1, or rounding above 0.01.
        skip_bad: leave out snapshots that are not readable or not finite, instead of raising.

    Returns:
        The weights by name, float32, with the buffers of the snapshot nearest to ``step``; what they were made of.

    Raises:
        DataError: if there are no snapshots.
        SnapshotError: if one is damaged. SpecError: if they are of different networks.
        ReparamError: if ``width`` or ``step`` is out of range.
        Unsupported: if the snapshots do not give this width at this step well enough.
    """
    gamma_of(width)
    found, skipped = list_snapshots(folder, skip_bad=skip_bad)
    while found:
        plan = _plan(found, width, step, skipped)
        if not allow_inexact:
            _refuse_inexact(found, plan)
        try:
            return _combined(found, plan), plan
        except SnapshotError as e:
            if not skip_bad:
                raise
            skipped[e.path.name] = e.why
            found = [s for s in found if s.path != e.path]
    raise DataError(
        f"none of the snapshots in {folder} is usable: {'; '.join(f'{k}: {v}' for k, v in skipped.items())}."
    )


def _plan(found: list[Snapshot], width: float, step: int | None, skipped: dict[str, str]) -> Reconstruction:
    last = found[-1].step
    step = last if step is None else step
    if not 1 <= step <= last:
        raise ReparamError(f"step {step} is not covered: the snapshots reach step {last}. Choose from 1 to {last}.")
    weights, residual, rounding = _quality(found, step, np.array([width]))
    names = [s.path.name for s in found]
    each = dict(zip(names, weights[:, 0].tolist(), strict=True))
    return Reconstruction(step, width, float(residual[0]), float(rounding[0]), each, dict(skipped))


def _quality(found: list[Snapshot], step: int, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The coefficients [snapshots, M] for the widths [M], with their residuals and rounding [M]."""
    known = [(float(s.step), gamma_of(s.sigma_rel)) for s in found]
    weights, residual = fit(known, np.full(len(widths), float(step)), gamma_of(widths))
    precision = np.array([s.rounding for s in found])[:, None]
    return weights, residual, np.sqrt(np.sum((weights * precision) ** 2, axis=0))


def _refuse_inexact(found: list[Snapshot], plan: Reconstruction) -> None:
    if plan.residual <= MAX_RESIDUAL and plan.rounding <= MAX_ROUNDING:
        return
    tried = np.append(np.unique(np.round(np.geomspace(0.005, WIDEST, 80)[:-1], 4)), WIDEST)
    _, residual, rounding = _quality(found, plan.step, tried)
    good = (residual <= MAX_RESIDUAL) & (rounding <= MAX_ROUNDING)
    steps = sorted({s.step for s in found}, key=lambda s: abs(s - plan.step))
    between = "" if plan.step in steps else f" No snapshot ends at step {plan.step}; the nearest is at {steps[0]}."
    raise Unsupported(
        f"{len(found)} snapshots do not give width {plan.sigma_rel:g} at step {plan.step}: the profile is off by "
        f"{plan.residual:.2g} (at most {MAX_RESIDUAL:g}), rounding comes to {plan.rounding:.2g} of the weights (at "
        f"most {MAX_ROUNDING:g}).{between} Widths that work at this step: {_ranges(tried, good)}. "
        "Or take it as it is with allow_inexact=True."
    )


def _ranges(values: np.ndarray, good: np.ndarray) -> str:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], good, [False]]).astype(int)))
    pairs = [(values[a], values[b - 1]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return ", ".join(f"{a:.4f} to {b:.4f}" if a < b else f"{a:.4f}" for a, b in pairs) or "none"


def _combined(found: list[Snapshot], plan: Reconstruction) -> dict[str, Tensor]:
    nearest = min(found, key=lambda s: abs(s.step - plan.step))
    total: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    shapes: dict[str, torch.Size] = {}
    for snapshot in found:
        tensors = _tensors(snapshot)
        mine = {k: v.shape for k, v in tensors.items()}
        shapes = shapes or mine
        if mine != shapes:
            raise SpecError(f"{found[0].path} and {snapshot.path} are of different networks. Keep runs apart.")
        total = total or {k: torch.zeros(shape) for k, shape in shapes.items() if k not in snapshot.kept}
        for name, sum_ in total.items():
            sum_.add_(tensors[name].float(), alpha=plan.coefficients[snapshot.path.name])
        if snapshot == nearest:
            kept = {k: v for k, v in tensors.items() if k in snapshot.kept}
        del tensors  # before the next file is read
    return {**total, **kept}


def _tensors(snapshot: Snapshot) -> dict[str, Tensor]:
    try:
        tensors, _ = read_tensors(snapshot.path)
    except SpecError as e:
        raise SnapshotError(snapshot.path, str(e).rstrip(".")) from e
    for name in tensors.keys() - snapshot.kept:
        if not bool(tensors[name].isfinite().all()):
            raise SnapshotError(snapshot.path, f"{name!r} is not finite")
    return tensors
