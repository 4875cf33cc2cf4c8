"""One run of a study: train, sample, score, and leave everything in its folder.

A folder holds ``recipe.yaml``, ``model.safetensors`` (the averaged weights with their spec),
``spec.json``, ``metrics.jsonl``, ``samples.npz``, ``trajectory.npz`` (what the model believed
x0 to be at every step, as the report shows it) and, last of all, ``result.json``: its row of
the leaderboard. Until then ``resume.safetensors`` holds what continuing needs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from ..data import Data, load_data
from ..denoiser import Denoiser
from ..errors import DataError
from ..files import write_text, written_whole
from ..metrics import METRICS
from ..networks import made_by, network
from ..report.views import view_of
from ..samplers import Trajectory, sample
from ..spec import Spec, save
from ..training import Diverged, Trainer, Validation
from ..training.draws import mix
from .recipe import RunConfig

RESULT, RESUME = "result.json", "resume.safetensors"
#: Of how many samples the way from noise to data is kept.
SHOWN = 256

Progress = Callable[[int], None]


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """A .npz file.

    Raises:
        OutputError: if it cannot be written.
    """
    with written_whole(path) as temporary:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]


def make_network(config: RunConfig, data: Data, factory: Callable[..., nn.Module] | None = None) -> nn.Module:
    """The run's network with its initial weights: a function of the seed, not of the target.

    Raises:
        NetworkError: if it cannot be made.
        DataError: if it takes vectors and the data are something else.
    """
    arguments = dict(config.network)
    if arguments["name"] == "mlp":
        if len(data.shape) != 1:
            raise DataError(
                f"{data.name} has samples of shape {list(data.shape)}, and the network mlp takes vectors. Save the "
                "array as x.reshape(len(x), -1), or bring a network for this shape: network: pkg.mod:make."
            )
        arguments["dim"] = data.shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(config.seed, 0x1717))
        if factory is not None:
            return made_by(factory, {k: v for k, v in arguments.items() if k != "name"}, arguments["name"])
        return network(arguments)


@lru_cache(maxsize=2)
def _cached_data(config: str) -> Data:
    return load_data(json.loads(config))


def data_of(config: RunConfig) -> Data:
    """The run's data; those of the last runs are kept, since neighbours share them."""
    return _cached_data(json.dumps(config.data, sort_keys=True))


def trainer_of(config: RunConfig, data: Data, net: nn.Module, device: str = "cpu") -> Trainer:
    """A run at its first step."""
    low, high = config.validate_on or config.t_range
    validation = Validation.draw(data.heldout, data.sigma_data**2, (low, high))
    return Trainer(
        net,
        config.objective(),
        data.train,
        config.train,
        seed=config.seed,
        validation=validation,
        device=device,
    )


def execute(
    run: str,
    config: RunConfig,
    folder: Path,
    *,
    device: str = "cpu",
    data: Data | None = None,
    factory: Callable[..., nn.Module] | None = None,
    progress: Progress = lambda step: None,
    stop: Callable[[], bool] = lambda: False,
    save_every: float = 10.0,
) -> dict[str, Any] | None:
    """Do a run, or what is left of it.

    Args:
        run: its name. folder: where it leaves everything.
        data, factory: the caller's own data and network, instead of the recipe's.
        progress: told the number of steps done.
        stop: asked after every step; where it says so the state is saved and None returned.
        save_every: seconds between checkpoints.

    Returns:
        The run's row of the leaderboard, or None if it was stopped.
    """
    data = data or data_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
    trainer = trainer_of(config, data, make_network(config, data, factory), device)
    if (folder / RESUME).exists():
        trainer.restore(folder / RESUME)
    row = blank_row(run, config, data)
    row["params"] = sum(p.numel() for p in trainer.trainee.parameters())
    row["noise_bins"] = trainer.validation.edges
    try:
        if not _train(trainer, folder, progress, stop, save_every):
            return None
        start = time.perf_counter()
        denoiser = trainer.denoiser
        denoiser.data = data.record()
        save(denoiser, folder / "model.safetensors")
        write_text(folder / "spec.json", json.dumps(Spec.of(denoiser).to_dict(), indent=2) + "\n")
        _score(row, config, data, denoiser, folder)
        row["status"] = "finished"
        row["wall_s"] = round(trainer.seconds + time.perf_counter() - start, 2)
    except Diverged as e:
        row["status"], row["reason"], row["wall_s"] = "diverged", str(e), round(trainer.seconds, 2)
    row["x0_error"] = next((h["x0_error"] for h in reversed(trainer.history) if "x0_error" in h), None)
    _write_history(trainer, folder)
    write_text(folder / RESULT, json.dumps(row, indent=2) + "\n")
    (folder / RESUME).unlink(missing_ok=True)
    return row


def _train(trainer: Trainer, folder: Path, progress: Progress, stop: Callable[[], bool], save_every: float) -> bool:
    def keep() -> None:
        trainer.save(folder / RESUME)
        _write_history(trainer, folder)

    saved = told = time.perf_counter()
    for step in trainer.run(stop):
        now = time.perf_counter()
        if now - told > 0.2:
            progress(step)
            told = now
        if now - saved > save_every:
            keep()
            saved = now
    keep()
    progress(trainer.step)
    return trainer.step == trainer.config.steps


def _write_history(trainer: Trainer, folder: Path) -> None:
    write_text(folder / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in trainer.history))


def blank_row(run: str, config: RunConfig, data: Data) -> dict[str, Any]:
    """A run's row of the leaderboard before anything is known but its recipe and its floors."""
    arguments = ", ".join(f"{k}={v}" for k, v in config.network.items() if k != "name")
    return {
        "run": run,
        "data": data.name,
        "network": f"{config.network['name']}({arguments})",
        "target": config.target["name"] if len(config.target) == 1 else config.target,
        "loss_space": config.loss_space,
        "weighting": config.weighting,
        "t_range": config.t_range,
        "lr": config.train.lr,
        "seed": config.seed,
        "steps": config.train.steps,
        "params": None,
        "wall_s": 0.0,
        "status": "unfinished",
        "metrics": {
            name: {"value": None, "floor": floor}
            for name, floor in floors(data, config.metrics, config.sample.n).items()
        },
        "x0_error": None,
        "noise_bins": None,
    }


def chosen_metrics(data: Data, names: Sequence[str] | None) -> list[str]:
    """The metrics that apply to the data, or those asked for.

    Raises:
        DataError: if one that was asked for does not apply.
    """
    if names is None:
        return [name for name, metric in METRICS.items() if metric.applies(data)]
    for name in names:
        if not METRICS[name].applies(data):
            fitting = [n for n, m in METRICS.items() if m.applies(data)]
            raise DataError(f"metric {name} does not apply to {data.name}; these do: {', '.join(fitting)}.")
    return list(names)


_floors: dict[tuple[Any, ...], dict[str, float]] = {}


def floors(data: Data, names: Sequence[str] | None, n: int) -> dict[str, float]:
    """What fresh real data get, by metric: the values no model can be expected to beat."""
    key = (data.digest, tuple(chosen_metrics(data, names)), n)
    if key not in _floors:
        real = data.fresh(n)
        _floors[key] = {name: METRICS[name].compute(real, data) for name in chosen_metrics(data, names)}
    return _floors[key]


def draw_samples(
    denoiser: Denoiser, config: RunConfig, shape: tuple[int, ...], n: int, *, shown: int = SHOWN
) -> tuple[Tensor, Trajectory]:
    """``n`` samples, and the whole way of the first ``shown``. The noise depends on the seed alone."""
    generator = torch.Generator().manual_seed(mix(config.sample.seed, 0x5A3))
    noise = torch.randn(n, *shape, generator=generator)
    device = next(denoiser.parameters()).device
    options: dict[str, Any] = {
        "sampler": config.sample.sampler,
        "steps": config.sample.steps,
        "generator": torch.Generator(device).manual_seed(mix(config.sample.seed, 0x5A4)),
    }
    way = sample(denoiser, noise[:shown].to(device), trajectory=True, **options)
    assert isinstance(way, Trajectory)
    parts = [way.x]
    for part in noise[shown:].split(1024):
        x = sample(denoiser, part.to(device), **options)
        assert isinstance(x, Tensor)
        parts.append(x)
    return torch.cat(parts).cpu(), way


def _score(row: dict[str, Any], config: RunConfig, data: Data, denoiser: Denoiser, folder: Path) -> None:
    # As many samples as there are fresh real data, so that the floor is a fair one.
    n = min(config.sample.n, len(data.fresh(config.sample.n)))
    x, way = draw_samples(denoiser, config, data.shape, n)
    write_arrays(folder / "samples.npz", x=data.original(x).numpy())
    if not bool(x.isfinite().all()):
        raise Diverged(config.train.steps, "sampling produced numbers that are not finite")
    view = view_of(data)
    write_arrays(
        folder / "trajectory.npz",
        frames=view.compact(torch.cat([way.x0.cpu(), x[None, : way.x0.shape[1]]])),
        times=np.asarray(way.times),
        real=view.compact(data.fresh(way.x0.shape[1])),
        kind=np.asarray(view.kind),
        axes=np.asarray(view.axes),
    )
    for name, entry in row["metrics"].items():
        entry["value"] = METRICS[name].compute(x, data)
