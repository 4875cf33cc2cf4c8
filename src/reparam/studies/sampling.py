"""Samples from a trained run, on demand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..confidence import prediction
from ..data.base import as_bytes
from ..data.order import mix
from ..denoiser import Denoiser
from ..errors import Conflict, OutputError, ReparamError, SpecError, unknown
from ..files import write_text, written_whole
from ..networks import own_network
from ..report.plots import picture_sheet, png
from ..samplers import sample
from ..spec import Spec, code_in, load, read_spec, stated, weights_file
from ..training.draws import unit_noise
from .pool import resources
from .recipe import RunConfig, SampleConfig, from_dict, parse_yaml, takes_ends
from .run import as_sampled, begun, byte_rule, data_of, made_by_run, sample_chunk, starts, write_arrays

#: At most so many pictures in a grid.
_GRID = 400


def sample_run(
    where: str | Path,
    n: int,
    *,
    out: str | Path | None = None,
    sampler: str | dict[str, Any] | None = None,
    steps: int | None = None,
    grid: str | dict[str, Any] | None = None,
    threshold: str | None = None,
    seed: int = 0,
    label: str | None = None,
    guidance: float | None = None,
    interval: tuple[float, float] | None = None,
    device: str | None = None,
    spec: Spec | Mapping[str, Any] | str | Path | None = None,
) -> tuple[Path, tuple[int, ...]]:
    """Draw ``n`` samples from a run, in the units of its data, and write them.

    Pictures become a folder of PNG files, and a grid of the first 400 beside it (FOLDER-grid.png), or, where
    ``out`` ends in .npz, one array of bytes; anything else becomes a .npz file. Which model they are of and how
    they were drawn is in FOLDER.json beside it, or in the array "about", for the cards of their scores.

    Args:
        where: the folder of a run, or a .safetensors file with its spec.
        out: the folder or file; samples-N-seedS(.npz) beside the weights by default.
        sampler, steps, grid, threshold: as in a recipe's ``sample``; those of the run's by default, else Heun in
            50 even steps.
        seed: of the noise; the first samples of a seed are the same, however many are drawn.
        label: a class by name or number, for a conditional model; all in turn by default.
        guidance, interval: of classifier-free guidance; the recipe's by default, else none.
        device: "cpu", "cuda" or "mps"; the best there is by default.
        spec: what the weights do not say of themselves, or say wrongly, as in :func:`reparam.load`.

    Returns:
        The folder or file, and the shape of the samples.

    Raises:
        SpecError, NetworkError: if the model cannot be read or built.
        Conflict: if a label or guidance is asked of a model without classes.
        OutputError: if the place to write to is not usable.
    """
    for name, count in (("n", n), ("steps", steps)):
        if count is not None and count < 1:
            raise ReparamError(f"--{name} must be at least 1, found {count}.")
    weights = weights_file(where)
    config = recipe_beside(weights)
    denoiser = opened(weights, config, spec).to(resources(1, 1, device).devices[0])
    record = denoiser.data or {}
    if "shape" not in record:
        raise SpecError(f"{weights} does not say what shape its data have, so no noise can be drawn for it.")
    asked = {
        "sampler": sampler,
        "steps": steps,
        "grid": grid,
        "threshold": threshold,
        "guidance": guidance,
        "guidance_interval": interval,
    }
    chosen = _chosen(config.sample if config else SampleConfig(), {**asked, "seed": seed})
    y = _labels(record.get("classes"), label, chosen.guidance, n)
    target = _place(weights, n, {"seed": seed, "label": label, **asked}, out, bool(record.get("pictures")))
    clean = starts(chosen, data_of(config), n) if config is not None and chosen.start == "data" else None
    x = _drawn(denoiser, chosen, record, n, y, clean)
    made = _made(denoiser, made_by_run(replace(config, sample=chosen), weights) if config else {})
    rule = _rule(record) if record.get("pictures") else None
    about = json.dumps({**made, "to_uint8": rule, "labels": None if y is None else y.tolist()})
    _write(target, x, y, about)
    return target, tuple(x.shape)


def _write(target: Path, x: Tensor, y: Tensor | None, about: str) -> None:
    if target.suffix == ".npz":
        write_arrays(target, x=x.numpy(), about=np.asarray(about), **({} if y is None else {"y": y.numpy()}))
    else:
        _write_pictures(target, x)
        write_text(told_beside(target), about + "\n")


def _chosen(recipe: SampleConfig, asked: dict[str, Any]) -> SampleConfig:
    """How to sample: as the recipe says, but for what was asked for."""
    given: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in asked.items() if v is not None}
    if "grid" in given and not takes_ends(given["grid"]):
        given["sigma_range"] = None  # the recipe's, for its own grid
    chosen = replace(recipe, **given)
    if "guidance_interval" in given and chosen.guidance == 1:
        raise Conflict("--interval says where guidance is applied, and there is none: give --guidance too.")
    return chosen


def _labels(classes: list[str] | None, label: str | None, guidance: float, n: int) -> Tensor | None:
    """The class of every sample; None for a model without classes."""
    if not classes:
        if label is not None or guidance != 1:
            asked = f"--label {label}" if label is not None else f"--guidance {guidance:g}"
            raise Conflict(f"{asked}: this model was trained without labels.")
        return None
    if label is None:
        return torch.arange(n) % len(classes)
    if label in classes:
        return torch.full((n,), classes.index(label))
    if label.isdecimal() and int(label) < len(classes):
        return torch.full((n,), int(label))
    raise unknown("class", label, classes)


def _drawn(
    denoiser: Denoiser, config: SampleConfig, record: dict[str, Any], n: int, y: Tensor | None, clean: Tensor | None
) -> Tensor:
    """Samples in the units of the data, on the CPU; from ``clean`` data once they are noised, or from noise."""
    device, shape = next(denoiser.parameters()).device, tuple(record["shape"])
    denoiser = as_sampled(denoiser, config)
    method, times = config.method(), config.times(denoiser)
    generator = torch.Generator(device).manual_seed(mix(config.seed, 0x5A4))
    parts, chunk = [], sample_chunk(shape)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        noise = unit_noise(config.seed, start, stop, shape)
        x = sample(
            denoiser,
            **begun(noise, None if clean is None else clean[start:stop], denoiser, times[0]),
            sampler=method,
            times=times,
            cond={} if y is None else {"y": y[start:stop].to(device)},
            generator=generator,
        )
        assert isinstance(x, Tensor)
        parts.append(_in_original_units(x.cpu(), record))
    return torch.cat(parts)


def _in_original_units(x: Tensor, data: dict[str, Any]) -> Tensor:
    scale = data.get("normalised_by", {"mean": 0.0, "std": 1.0})
    found = x * scale["std"] + scale["mean"]
    return as_bytes(found) if data.get("pictures") else found


def _rule(data: dict[str, Any]) -> str:
    scale = data.get("normalised_by", {"mean": 0.0, "std": 1.0})
    return byte_rule(scale["mean"], scale["std"])


def _place(weights: Path, n: int, asked: dict[str, Any], out: str | Path | None, pictures: bool) -> Path:
    """Where to write, found usable before anything is drawn; by default named after what was asked for."""
    if out is None:
        told = [_part_of_name(key, value) for key, value in asked.items() if value is not None]
        stem = re.sub(r"[^\w.+=-]+", "_", "-".join(["samples", str(n), *told]))
        name = weights.name.removesuffix(".safetensors")
        stem = stem if name == "model" else f"{name}-{stem}"
        return weights.parent / (stem if pictures else f"{stem}.npz")
    if not str(out):
        raise OutputError("--out is empty; expected a folder for pictures, or a name that ends in .npz.")
    target = Path(out)
    if target.suffix == ".npz":
        return target
    if not pictures:
        raise ReparamError(f"--out {target}: expected a file that ends in .npz.")
    if target.exists() and not target.is_dir():
        raise OutputError(f"--out {target} is a file; expected a folder for pictures, or a name that ends in .npz.")
    others = sorted({p.name for p in target.iterdir()} - set(_names(n))) if target.exists() else []
    if others:
        raise OutputError(
            f"--out {target} is not empty (found {', '.join(others[:3])}), and the new pictures would lie among the "
            "old; nothing was touched. Choose a new folder."
        )
    return target


def _part_of_name(key: str, value: Any) -> str:
    """Such as steps8, or of a sampler with arguments ancestral_variance=learned."""
    if isinstance(value, dict):
        value = "_".join([str(value.get("name")), *(f"{k}={v}" for k, v in value.items() if k != "name")])
    return str(value) if key == "sampler" else f"{key}{value}"


def told_beside(folder: Path) -> Path:
    """The file that says of which model the pictures in a folder are, and how they were drawn."""
    return folder.with_name(f"{folder.name}.json")


def _names(n: int) -> list[str]:
    """The files of n pictures."""
    digits = max(4, len(str(n - 1)))
    return [f"{i:0{digits}d}.png" for i in range(n)]


def _write_pictures(folder: Path, x: Tensor) -> None:
    """A PNG for every picture, and a grid of the first ones beside the folder, where no score takes it for a sample."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"cannot write to {folder}: {e.strerror}. Choose another place (--out).") from e
    rows = x.movedim(1, -1).numpy()
    rows = np.ascontiguousarray(rows[..., 0] if rows.shape[-1] == 1 else rows)
    for name, picture in zip(_names(len(rows)), rows, strict=True):
        _write_bytes(folder / name, png(picture))
    _write_bytes(folder.with_name(f"{folder.name}-grid.png"), picture_sheet(rows[:_GRID]))


def _write_bytes(path: Path, content: bytes) -> None:
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def opened(
    weights: Path, config: RunConfig | None, spec: Spec | Mapping[str, Any] | str | Path | None = None
) -> Denoiser:
    """The model in a file of weights, with the code that its run's recipe names and the file alone does not run.

    Raises:
        SpecError, NetworkError: if it cannot be read or built.
    """
    word = stated(spec)
    own = config is not None and "target" not in word and code_in(config.target)
    if config is not None and own and read_spec(weights, word).target == config.target:
        word["target"] = prediction(config.target)
    return load(weights, net=own_network(config.network) if config else None, spec=word)


def _made(denoiser: Denoiser, told: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a card says of the model, where somebody said otherwise than its file."""
    if not denoiser.overrides:
        return told
    model, sampling = told.get("model", {}), told.get("sampling", {})
    now = {"target": denoiser.conventions.predicted().config(), "overrides": denoiser.overrides}
    return {**told, "model": {**model, **now}, "sampling": {**sampling, "t_range": list(denoiser.t_range)}}


def recipe_beside(weights: Path) -> RunConfig | None:
    """The recipe of the run that the weights are of, where it lies beside them."""
    file = weights.parent / "recipe.yaml"
    return from_dict(parse_yaml(file.read_text(encoding="utf-8"), str(file))) if file.exists() else None
