"""Samples from a trained run, on demand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ReparamError, SpecError
from ..networks import is_factory, network
from ..samplers import sample
from ..spec import load, read_spec, weights_file
from ..training.draws import mix
from .recipe import RunConfig, from_dict, parse_yaml
from .run import write_arrays


def sample_run(
    where: str | Path,
    n: int,
    *,
    out: str | Path | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> tuple[Path, tuple[int, ...]]:
    """Draw ``n`` samples from a run, in the units of its data, and write them to a .npz file.

    Args:
        where: the folder of a run, or a .safetensors file with its spec.
        out: the file; samples-N-seedS.npz beside the weights by default.
        sampler, steps: those of the run's recipe by default, else Heun in 50 steps.
        seed: of the noise.

    Returns:
        The file, and the shape of the array ``x`` in it.

    Raises:
        SpecError, NetworkError: if the model cannot be read or built.
    """
    if n < 1:
        raise ReparamError(f"--n must be at least 1, found {n}.")
    if steps is not None and steps < 1:
        raise ReparamError(f"--steps must be at least 1, found {steps}.")
    weights = weights_file(where)
    spec = read_spec(weights)
    config = _recipe_beside(weights)
    own = network(config.network) if config and is_factory(config.network["name"]) else None
    denoiser = load(weights, net=own)
    if not spec.data or "shape" not in spec.data:
        raise SpecError(f"{weights} does not say what shape its data have, so no noise can be drawn for it.")
    shape = tuple(spec.data["shape"])
    generator = torch.Generator().manual_seed(mix(seed, 0x5A3))
    noise = torch.randn(n, *shape, generator=generator)
    parts = [
        sample(
            denoiser,
            part,
            sampler=sampler or (config.sample.sampler if config else "heun"),
            steps=steps or (config.sample.steps if config else 50),
            generator=generator,
        )
        for part in noise.split(1024)
    ]
    x = _in_original_units(torch.cat([p for p in parts if isinstance(p, Tensor)]), spec.data)
    target = Path(out) if out else weights.parent / f"samples-{n}-seed{seed}.npz"
    if target.suffix != ".npz":
        raise ReparamError(f"--out {target}: expected a file that ends in .npz.")
    write_arrays(target, x=x.numpy())
    return target, tuple(x.shape)


def _in_original_units(x: Tensor, data: dict[str, Any]) -> Tensor:
    scale = data.get("normalised_by", {"mean": 0.0, "std": 1.0})
    return x * scale["std"] + scale["mean"]


def _recipe_beside(weights: Path) -> RunConfig | None:
    file = weights.parent / "recipe.yaml"
    return from_dict(parse_yaml(file.read_text(encoding="utf-8"), str(file))) if file.exists() else None
