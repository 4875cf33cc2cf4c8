"""Averages of any width, made of a training's snapshots after the fact."""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError, SpecError
from ..spec import save, weights_file
from ..training import Trainee
from ..training.averages import load_into
from ..training.posthoc import Reconstruction, reconstruct
from .sampling import opened, recipe_beside


def average_run(
    run: str | Path,
    width: float,
    *,
    step: int | None = None,
    out: str | Path | None = None,
    allow_inexact: bool = False,
) -> tuple[Path, Reconstruction]:
    """The averaged network of a width, as if it had been tracked, written with its spec.

    Args:
        run: the folder of a training with ``train.ema_widths``.
        width: σ_rel, relative to the length of training; EDM2's best lie at 0.05 … 0.15.
        step: of which the average is; the last by default.
        out: the .safetensors file; average-WIDTH.safetensors in the folder by default.
        allow_inexact: whether to write what the snapshots represent only roughly.

    Raises:
        DataError, SpecError, ReparamError: if there are no snapshots, one is damaged, or the width or the step is out
            of their reach.
    """
    weights = weights_file(run)
    config = recipe_beside(weights)
    if config is None:
        raise SpecError(f"{weights.parent} holds no recipe.yaml; expected the folder of a training.")
    snapshots = weights.parent / "averages"
    if not snapshots.is_dir():
        raise DataError(
            f"{weights.parent} holds no snapshots of averages; train with --set train.ema_widths=[0.05,0.1] to keep "
            "some."
        )
    tensors, made = reconstruct(snapshots, width, step, allow_inexact=allow_inexact)
    denoiser = opened(weights, config)
    trainee = Trainee(denoiser.net, config.objective())
    exact = {name: p for name, p in trainee.named_parameters() if not p.requires_grad}  # a sum of snapshots rounds
    load_into(trainee, {**tensors, **exact})
    target = Path(out) if out is not None else weights.parent / f"average-{width:g}.safetensors"
    save(trainee.objective.denoiser(trainee.net, data=denoiser.data), target)
    return target, made
