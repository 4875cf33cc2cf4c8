"""One run of a study: train, sample, score, and leave everything in its folder.

A folder holds ``recipe.yaml``, ``model.safetensors`` (the averaged weights with their spec),
``spec.json``, ``metrics.jsonl``, ``samples.npz``, ``trajectory.npz`` (what the model believed
x0 to be at every step, as the report shows it), for pictures ``nearest.npz`` (some samples and
the training pictures nearest to them), for a mixture in the plane ``figure.npz`` (:mod:`.figure`),
``card.json`` (the scores and all that decided them) and, last of all, ``result.json``: its row of
the leaderboard. Until then ``resume.safetensors`` holds what continuing needs. ``snapshots/`` holds
the averaged network as it was after the steps that the recipe asks to keep. Statistics of the real
pictures are kept beside the runs, in ``reference``.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from ..data import Data, load_data
from ..data.order import mix
from ..denoiser import Denoiser
from ..errors import DataError, NetworkError, OutputError, Unsupported
from ..files import write_text
from ..guidance import Autoguidance, ClassifierFree
from ..metrics import METRICS, Calibration, Reference, SampleSet, Scoring, nearest_training
from ..metrics import card as cards
from ..metrics.model import MODEL_METRICS, NEAR, Asked
from ..metrics.table import floors as floors_of
from ..metrics.table import keeps
from ..metrics.table import scored as scores_of
from ..networks import described, made_by, network
from ..objective import Objective
from ..report.views import View, view_of
from ..samplers import THRESHOLDS, Trajectory
from ..samplers.profile import ErrorProfile, measure
from ..schedules import Elementwise, Schedule, like
from ..spec import code_in, load, save
from ..training import Diverged, Engine, Trainer, Validation
from ..training.loop import Exact
from .figure import spreads, states_variances, write_arrays, write_figure
from .recipe import RunConfig, SampleConfig
from .walk import walked

RESULT, RESUME = "result.json", "resume.safetensors"
#: Of how many samples the way from noise to data is kept: points, and pictures at most.
SHOWN, SHOWN_PICTURES = 256, 40
#: Numbers that the way may take; fewer large pictures are shown.
_WAY = 2**26
#: Side of the pictures kept of the way; larger ones are averaged down.
_SIDE = 64
#: Numbers that the data have of which the profile of variances is made.
_PROFILED = 2**17
#: How many samples are shown beside their nearest training pictures, and how many of these.
_BESIDE, _NEAREST = 12, 4

Progress = Callable[[int], None]


class _Stopped(Exception):
    """Asked to end. The state of training is kept; scoring begins again when continued."""


@contextlib.contextmanager
def _stoppable(net: nn.Module, stop: Callable[[], bool]) -> Iterator[None]:
    """Inside, a stop is heard at every evaluation of the network."""

    def ask(*inputs: Any) -> None:
        if stop():
            raise _Stopped

    hook = net.register_forward_pre_hook(ask)
    try:
        yield
    finally:
        hook.remove()


def make_network(config: RunConfig, data: Data, factory: Callable[..., nn.Module] | None = None) -> nn.Module:
    """The run's network with its initial weights: a function of the seed, not of the target.

    Raises:
        NetworkError: if it cannot be made.
        DataError: if it takes vectors and the data are something else, or the other way round.
    """
    if config.conditional and data.labels is None:
        raise DataError(f"{data.name} has no labels; conditional: true needs them.")
    arguments = {**config.network, **(_fitted(config, data) if factory is None else {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(config.seed, 0x1717))
        if factory is not None:
            return made_by(factory, {k: v for k, v in arguments.items() if k != "name"}, arguments["name"])
        return network(arguments)


def _fitted(config: RunConfig, data: Data) -> dict[str, Any]:
    """What a built-in network must know of its data, and of what it is to give."""
    likelihood, size = config.objective().conventions.likelihood, data.shape[0]
    outputs = size if likelihood is None else likelihood.outputs(data.shape)[0]
    asked = config.network
    if asked["name"] == "reexpressed":
        return {"of": {**asked["of"], **_sizes(config, data, asked["of"]["name"], outputs)}}
    if asked["name"] != "confident":
        return _sizes(config, data, asked["name"], outputs)
    parts = {"base": size, "head": outputs - size}
    return {part: {**asked[part], **_sizes(config, data, asked[part]["name"], n)} for part, n in parts.items()}


def _sizes(config: RunConfig, data: Data, name: str, outputs: int) -> dict[str, Any]:
    """What the network of this name must know to give so many outputs, along the first axis of the data."""
    shape = list(data.shape)
    if name == "mlp":
        if len(shape) != 1:
            raise DataError(
                f"{data.name} has samples of shape {shape}, and the network mlp takes vectors. Save the array as "
                "x.reshape(len(x), -1), take network: jit or unet for pictures, or bring a network for this shape: "
                "network: pkg.mod:make."
            )
        if config.conditional:
            raise NetworkError("network mlp takes no labels; conditional: true needs jit, unet or a network of yours.")
        return {"dim": shape[0], "outputs": outputs}
    if name in ("jit", "unet"):
        if len(shape) != 3:
            hint = " (data: {name: digits, pictures: true})" if data.image else ""
            raise DataError(
                f"{data.name} has samples of shape {shape}, and the network {name} takes pictures of shape [channels, "
                f"height, width]{hint}."
            )
        classes = len(data.classes) if config.conditional else 0
        return {"image": shape[1:], "channels": shape[0], "classes": classes, "outputs": outputs}
    return {}


@lru_cache(maxsize=2)
def _cached_data(config: str) -> Data:
    return load_data(json.loads(config))


def data_of(config: RunConfig) -> Data:
    """The run's data; those of the last runs are kept, since neighbours share them."""
    return _cached_data(json.dumps(config.data, sort_keys=True))


def forget_data() -> None:
    """Keep no data any longer: files may have changed since they were read."""
    _cached_data.cache_clear()


def trainer_of(
    config: RunConfig, data: Data, net: nn.Module, engine: Engine | None = None, entries: int = 100
) -> Trainer:
    """A run at its first step; its history gets about so many entries.

    Raises:
        DataError: if the run needs to know more of the data than is known.
    """
    check_data(config, data)
    low, high = config.validate_on or config.t_range
    objective = config.objective()
    return Trainer(
        net,
        objective,
        data,
        config.train,
        seed=config.seed,
        conditional=config.conditional,
        validation=Validation.draw(data, (low, high), conditional=config.conditional),
        exact=_exact(data, objective.schedule) if config.supervision == "exact" else None,
        engine=engine,
        entries=entries,
    )


def check_data(config: RunConfig, data: Data) -> None:
    """Refuse data of which a run does not know what it needs.

    Raises:
        DataError: if so.
    """
    if config.supervision == "exact" and data.mixture is None:
        raise DataError(
            f"supervision: exact learns from E[x0 | x_t], which is known for a mixture of Gaussians (data: tree), and "
            f"not for {data.name}; use supervision: sample."
        )
    if config.sample.start == "data" and not data.endless:
        raise DataError(
            f"sample.start: data noises data that nobody has seen, of which {data.name} has no end; use start: noise."
        )


def _exact(data: Data, schedule: Schedule) -> Exact:
    """E[x0 | x_t] of a mixture."""
    mixture = data.mixture
    assert mixture is not None

    def mean(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return mixture.posterior_mean(x_t / like(alpha, x_t), sigma / alpha)

    return mean


def reference_of(
    config: RunConfig, data: Data, cache: Path, device: str = "cpu", stop: Callable[[], bool] = lambda: False
) -> Reference:
    """The real data that a run is compared with; of pictures, statistics are kept in ``cache``."""

    def ask(done: int = 0) -> None:
        if stop():
            raise _Stopped

    place, count = (cache, config.sample.reference) if data.pictures else (None, None)
    return Reference(data, config.extractor, count, place, device, ask)


def execute(
    run: str,
    config: RunConfig,
    folder: Path,
    *,
    device: str = "cpu",
    data: Data | None = None,
    factory: Callable[..., nn.Module] | None = None,
    digest: str | None = None,
    progress: Progress = lambda step: None,
    stop: Callable[[], bool] = lambda: False,
    save_every: float = 10.0,
) -> dict[str, Any] | None:
    """Do a run, or what is left of it.

    Args:
        run: its name. folder: where it leaves everything.
        data, factory: the caller's own data and network, instead of the recipe's.
        digest: of the data the study began with; others are refused.
        progress: told the number of steps done.
        stop: asked after every step; where it says so the state is saved and None returned.
        save_every: seconds between checkpoints.

    Returns:
        The run's row of the leaderboard, or None if it was stopped.
    """
    data = data or data_of(config)
    if digest is not None and data.digest != digest:
        raise DataError(f"{data.name} changed while the study was running; begin it again in another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
    trainer = trainer_of(config, data, make_network(config, data, factory), Engine(device))
    if (folder / RESUME).exists():
        trainer.restore(folder / RESUME)

    def work() -> None:
        _train(trainer, config, folder, progress, stop, save_every)

    row = concluded(run, config, trainer, folder, stop, work)
    if row is not None:
        (folder / RESUME).unlink(missing_ok=True)
    return row


def concluded(
    run: str,
    config: RunConfig,
    trainer: Trainer,
    folder: Path,
    stop: Callable[[], bool],
    work: Callable[[], None] = lambda: None,
    cache: Path | None = None,
) -> dict[str, Any] | None:
    """Train by ``work``, then save and score the model: the run's row of the leaderboard, or None if it was stopped.

    ``cache``: where statistics of real pictures are kept; beside the folder by default.
    """
    data = trainer.data
    row = blank_row(run, config, data)
    row["params"] = sum(p.numel() for p in trainer.trainee.parameters())
    row["noise_bins"] = trainer.validation.edges
    real = reference_of(config, data, cache or folder.parent / "reference", str(trainer.device), stop)
    try:
        try:
            work()
            _finish(row, config, real, trainer, folder, stop)
        except Diverged as e:
            row |= {"status": "diverged", "reason": str(e), "wall_s": round(trainer.seconds, 2)}
        for name, floor in floors(config, real).items():
            row["metrics"][name]["floor"] = floor
            if "autoguided" in row and name in row["autoguided"]["metrics"]:
                row["autoguided"]["metrics"][name]["floor"] = floor
    except _Stopped:
        return None
    row["x0_error"] = next((h["x0_error"] for h in reversed(trainer.history) if "x0_error" in h), None)
    write_history(trainer, folder)
    if "card" in row:
        card = {"format": cards.FORMAT, "metrics": row["metrics"], **row["card"], "noise_levels": noise_levels(row)}
        if row["calibration"] is not None:
            card["calibration"] = row["calibration"]
        write_text(folder / "card.json", json.dumps(card, indent=2) + "\n")
    write_text(folder / RESULT, json.dumps(row, indent=2) + "\n")
    return row


def noise_levels(row: dict[str, Any]) -> dict[str, Any] | None:
    """The x0 error by noise level of a card: mean squared, over the data's variance; None where none was measured."""
    return {"edges_t": row["noise_bins"], "x0_error": row["x0_error"]} if row["x0_error"] else None


def _finish(
    row: dict[str, Any],
    config: RunConfig,
    real: Reference,
    trainer: Trainer,
    folder: Path,
    stop: Callable[[], bool],
) -> None:
    """Save the trained model with its spec, and score it."""
    start = time.perf_counter()
    denoiser = trainer.denoiser
    denoiser.data = data_record(config, real.data)
    with _stoppable(denoiser.net, stop):
        if states_variances(denoiser):
            row["calibration"] = _calibrated(denoiser, config, trainer)
        save(denoiser, folder / "model.safetensors")
        _score(row, config, real, denoiser, folder)
    row |= {"status": "finished", "wall_s": round(trainer.seconds + time.perf_counter() - start, 2)}


def _calibrated(denoiser: Denoiser, config: RunConfig, trainer: Trainer) -> dict[str, Any]:
    """How honest the model's variances are; and their profile, which travels with the weights.

    Raises:
        Diverged: if they are no variances.
    """
    data = trainer.data
    try:
        edges = trainer.validation.edges
        found = Calibration.on(denoiser, data, (edges[0], edges[-1]), conditional=config.conditional).to_dict()
        if not isinstance(denoiser.schedule, Elementwise):
            denoiser.data = {**(denoiser.data or {}), "error_profile": _profile(denoiser, config, data).to_dict()}
    except NetworkError as e:
        raise Diverged(f"the learned variance is not usable: {e}") from e
    return found


def _profile(denoiser: Denoiser, config: RunConfig, data: Data) -> ErrorProfile:
    """The mean variance by noise level, on some held-out data."""
    n, device = max(32, min(512, _PROFILED // math.prod(data.shape))), next(denoiser.parameters()).device
    labels = data.heldout_labels if config.conditional else None
    return measure(
        denoiser,
        data.normalised(data.heldout[:n]).to(device),
        cond={} if labels is None else {"y": labels[:n].to(device)},
        generator=torch.Generator(device).manual_seed(mix(0, 0x9F0)),
    )


def _train(
    trainer: Trainer,
    config: RunConfig,
    folder: Path,
    progress: Progress,
    stop: Callable[[], bool],
    save_every: float,
) -> None:
    def keep() -> None:
        trainer.save(folder / RESUME)
        write_history(trainer, folder)

    saved = told = time.perf_counter()
    for step in trainer.run(stop, config.keep_at):
        if step in config.keep_at:
            keep_snapshot(trainer, config, folder)
        now = time.perf_counter()
        if now - told > 0.2:
            progress(step)
            told = now
        if now - saved > save_every:
            keep()
            saved = now
    keep()
    progress(trainer.step)
    if trainer.step < trainer.config.steps:
        raise _Stopped


def snapshot_file(folder: Path, step: int) -> Path:
    """Where the averaged network is kept as it was after a step."""
    return folder / "snapshots" / f"step-{step}.safetensors"


def keep_snapshot(trainer: Trainer, config: RunConfig, folder: Path) -> None:
    """Keep the averaged network as it is now, with its spec."""
    denoiser, path = trainer.denoiser, snapshot_file(folder, trainer.step)
    denoiser.data = data_record(config, trainer.data)
    path.parent.mkdir(exist_ok=True)
    save(denoiser, path)


def write_history(trainer: Trainer, folder: Path) -> None:
    """What training measured, an entry a line."""
    write_text(folder / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in trainer.history))


def data_record(config: RunConfig, data: Data) -> dict[str, Any]:
    """What travels with a run's weights of its data; for a conditional run, the classes too."""
    return {**data.record(), "classes": list(data.classes)} if config.conditional else data.record()


def blank_row(run: str, config: RunConfig, data: Data) -> dict[str, Any]:
    """A run's row of the leaderboard before anything is known but its recipe."""
    return {
        "run": run,
        "data": data.name,
        "network": described(config.network),
        "target": config.target["name"] if len(config.target) == 1 else config.target,
        "loss_space": config.loss_space,
        "weighting": config.weighting,
        "t_range": config.t_range,
        "supervision": config.supervision,
        "conditional": config.conditional,
        "guidance": config.sample.guidance if config.conditional else None,
        "lr": config.train.lr,
        "seed": config.seed,
        "steps": config.train.steps,
        "params": None,
        "wall_s": 0.0,
        "status": "unfinished",
        "metrics": {name: {"value": None, "floor": None} for name in chosen_metrics(config, data)},
        "x0_error": None,
        "noise_bins": None,
        "calibration": None,
    }


def chosen_metrics(config: RunConfig, data: Data) -> list[str]:
    """The metrics that apply to the run's data, or those its recipe asks for.

    Raises:
        DataError: if one that was asked for does not apply.
    """
    fitting = fitting_metrics(data, config.conditional)
    for name in config.metrics or []:
        if name not in fitting:
            raise DataError(f"metric {name} does not apply to {data.name}; these do: {', '.join(fitting)}.")
    if config.metrics:
        return config.metrics
    once = (config.extractor or {}).get("name") == "pixels"  # the features are the pixels already
    usual = [name for name in fitting if (METRICS.get(name) or MODEL_METRICS[name]).usual]
    return [name for name in usual if not (once and name == "pixel_frechet_distance")]


def fitting_metrics(data: Data, conditional: bool) -> list[str]:
    """The metrics that mean anything for these data, and for samples with labels or without."""
    of_samples = [name for name, metric in METRICS.items() if metric.applies(data, conditional)]
    return of_samples + [name for name, metric in MODEL_METRICS.items() if metric.applies(data)]


def scored(config: RunConfig, data: Data) -> int:
    """How many samples are scored: as many as there are fresh real data, so that the floor is a fair one."""
    return config.sample.n if data.endless else min(config.sample.n, len(data.heldout))


_floors: dict[str, dict[str, float | None]] = {}


def floors(config: RunConfig, real: Reference) -> dict[str, float | None]:
    """What fresh real data get, by metric: the values no model can be expected to beat."""
    names, n = chosen_metrics(config, real.data), scored(config, real.data)
    of_samples = [name for name in names if name in METRICS]
    key = json.dumps([real.digest, of_samples, n, config.extractor])
    if key not in _floors:
        _floors[key] = floors_of(real, of_samples, n)
    objective = config.objective()
    asked = _asked(config, objective, real.data)
    of_model = [name for name in names if name in MODEL_METRICS]
    return _floors[key] | {name: MODEL_METRICS[name].floor(objective.schedule, asked) for name in of_model}


def _asked(config: RunConfig, objective: Objective, data: Data) -> Asked:
    """What metrics of the model are told: at which noise levels it was trained, and between which times it samples."""
    low, high = objective.conventions.t_range
    ends = config.sample.ends(objective.schedule, (low, high))
    return Asked(data, objective.times_at, (ends.get("last", low or NEAR), ends.get("start", high)))


def sample_chunk(shape: tuple[int, ...]) -> int:
    """How many samples of a shape are drawn at a time."""
    return max(1, min(1024, 2**21 // math.prod(shape)))


def as_sampled(denoiser: Denoiser, config: SampleConfig) -> Denoiser:
    """The denoiser under the guidance and the thresholding that are asked for."""
    low, high = config.guidance_interval
    if config.guidance != 1:
        denoiser = ClassifierFree(denoiser, config.guidance, (low, high))
    return THRESHOLDS[config.threshold](denoiser)


def draw_samples(
    denoiser: Denoiser, config: SampleConfig, data: Data, n: int, y: Tensor | None = None, *, shown: int = SHOWN
) -> tuple[Tensor, Trajectory]:
    """``n`` samples as the data are stored, and the whole way of the first ``shown``.

    They are those that :func:`.sampling.sample_run` draws of the same seed and labels. ``y``: their labels, shape [n].

    Raises:
        Diverged: if a sample is not finite.
    """
    denoiser = as_sampled(denoiser, config)
    method, times, clean = config.method(), config.times(denoiser), starts(config, data, n)

    def drawn(start: int, stop: int, trajectory: bool = False) -> Any:
        numbers, seed = (start, stop), config.seed
        found = walked(denoiser, method, times, seed, numbers, data.shape, y=y, clean=clean, trajectory=trajectory)
        x = found.x if isinstance(found, Trajectory) else found
        if not bool(x.isfinite().all()):
            raise Diverged("sampling produced numbers that are not finite")
        return found

    shown = min(shown, n)
    way = drawn(0, shown, trajectory=True)
    parts = [data.stored(way.x.cpu())]
    chunk = sample_chunk(data.shape)
    for start in range(shown, n, chunk):
        parts.append(data.stored(drawn(start, min(start + chunk, n)).cpu()))
    return torch.cat(parts), way


def starts(config: SampleConfig, data: Data, n: int) -> Tensor | None:
    """The fresh data that samples start from once they are noised; None where they start from noise alone."""
    if config.start == "noise":
        return None
    source = data.mixture if data.curve is None else data.curve
    assert source is not None
    return source.draw(n, [data.seed, config.seed, 0x57A])


def labels_like(data: Data, n: int) -> Tensor:
    """``n`` labels in the proportions of the training data, going round the classes; int64 [n]."""
    assert data.labels is not None
    in_order = data.labels.sort().values
    chosen = in_order[((torch.arange(n) + 0.5) / n * len(in_order)).long()]
    return chosen[_going_round(chosen)]


def _going_round(y: Tensor) -> Tensor:
    """An order of labels [n] in which the first of each class come first, then the second of each; int64 [n]."""
    turn = torch.empty_like(y)
    for k in y.unique():
        turn[y == k] = torch.arange(int((y == k).sum()))
    return (turn * (int(y.max()) + 1) + y).argsort()


def _shown(config: RunConfig, data: Data, kind: str) -> int:
    """Of how many samples the way is kept; of a few classes, as many of each."""
    if kind != "pictures":
        return SHOWN
    most = min(SHOWN_PICTURES, _WAY // (config.sample.steps * math.prod(data.shape)))
    each = most // len(data.classes) * len(data.classes) if config.conditional else 0
    return max(4, each or most)


def _score(row: dict[str, Any], config: RunConfig, real: Reference, denoiser: Denoiser, folder: Path) -> None:
    data = real.data
    n = scored(config, data)
    y = labels_like(data, n) if config.conditional else None
    view = view_of(data)
    x, way = draw_samples(denoiser, config.sample, data, n, y, shown=_shown(config, data, view.kind))
    kept = x.numpy() if data.pictures else data.original(x).numpy()
    write_arrays(folder / "samples.npz", x=kept, **({} if y is None else {"y": y.numpy()}))
    shown = way.x0.shape[1]
    real_shown, names = data.fresh(shown), {}
    if y is not None and data.heldout_labels is not None:
        first = _going_round(data.heldout_labels)[:shown]
        real_shown = data.normalised(data.heldout[first])
        asked = {"labels": y[:shown], "real_labels": data.heldout_labels[first]}
        names = {key: np.asarray([data.classes[i] for i in value]) for key, value in asked.items()}
    final = data.normalised(x[:shown])
    write_arrays(
        folder / "trajectory.npz",
        frames=view.compact(_reduced(torch.cat([way.x0.cpu(), final[None]]))),
        times=np.asarray(way.times),
        real=view.compact(_reduced(real_shown)),
        kind=np.asarray(view.kind),
        axes=np.asarray(view.axes),
        **names,
        **spreads(way, view, _reduced),
    )
    if view.kind == "pictures":
        _write_nearest(folder / "nearest.npz", data, data.normalised(x[:_BESIDE]), view)
    of_samples = [name for name in row["metrics"] if name in METRICS]
    scoring = Scoring(SampleSet.held(x, y, row["run"]), real, keep=keeps(of_samples))
    for name, found in scores_of(scoring, of_samples).items():
        row["metrics"][name] |= found
    _score_model(row, config, data, denoiser)
    guided = _guided(config, denoiser, folder)
    better = None if guided is None else _score_guided(row, config, real, guided, y)
    write_figure(folder, config, data, denoiser, x, guided, better)
    row["card"] = {
        **cards.facts(scoring, source="drawn from the model", to_uint8=to_uint8(data), **made_by_run(config, folder)),
        "floor": real.fresh_counts(scoring.samples.count),
        "warnings": cards.remarks(scoring, of_samples),
    }


def _score_model(row: dict[str, Any], config: RunConfig, data: Data, denoiser: Denoiser) -> None:
    """The metrics of the model itself; that which it does not allow stays unknown."""
    asked = _asked(config, config.objective(), data)
    for name in row["metrics"]:
        if name in MODEL_METRICS:
            metric = MODEL_METRICS[name]
            with contextlib.suppress(Unsupported):  # a network without a gradient in x
                row["metrics"][name] |= {**metric.compute(denoiser, asked).to_dict(), "better": metric.better}


def _guided(config: RunConfig, denoiser: Denoiser, folder: Path) -> Autoguidance | None:
    """The model as an earlier state of it guides it, if that is asked for.

    Raises:
        OutputError: if that state has not been kept.
    """
    asked = config.sample.autoguidance
    if asked is None:
        return None
    path = snapshot_file(folder, asked.step)
    if not path.is_file():
        raise OutputError(
            f"{path} is missing, and sample.autoguidance needs it: it is kept as training passes that step. Train anew "
            "in another folder (--out)."
        )
    # Its target, where that is code, is one that runs here already.
    kind = denoiser.conventions.predicted()
    spec = {"target": kind} if code_in(kind.config()) else None
    guide = load(path, net=copy.deepcopy(denoiser.net), spec=spec).to(next(denoiser.parameters()).device)
    low, high = asked.interval
    return Autoguidance(denoiser, guide, asked.weight, (low, high))


def _score_guided(
    row: dict[str, Any], config: RunConfig, real: Reference, guided: Autoguidance, y: Tensor | None
) -> Tensor:
    """Guided samples from the same noise, scored beside the others."""
    x, _ = draw_samples(guided, config.sample, real.data, scored(config, real.data), y, shown=2)
    names = [name for name in row["metrics"] if name in METRICS]
    scoring = Scoring(SampleSet.held(x, y, row["run"]), real, keep=keeps(names))
    metrics = {name: {"floor": None, **found} for name, found in scores_of(scoring, names).items()}
    asked = config.sample.autoguidance
    assert asked is not None
    row["autoguided"] = {"step": asked.step, "weight": asked.weight, "metrics": metrics}
    return x


def to_uint8(data: Data) -> str | None:
    """The rule by which what a network draws becomes bytes, for pictures."""
    return byte_rule(data.mean, data.std) if data.pictures else None


def byte_rule(mean: float, std: float) -> str:
    """How numbers of a network become bytes, in words."""
    return f"round({std:g} x + {mean:g}), cut off at 0 and 255"


def made_by_run(config: RunConfig, where: Path) -> dict[str, dict[str, Any]]:
    """What a card says of the model of a run (its folder, or a file of weights), and of how samples were drawn."""
    weights, train, drawn = where / "model.safetensors" if where.is_dir() else where, config.train, config.sample
    model: dict[str, Any] = {
        "target": config.target,
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "ema": train.ema,
        "steps": train.steps,
        "seed": config.seed,
    }
    sampling: dict[str, Any] = {
        "sampler": drawn.sampler,
        "steps": drawn.steps,
        "grid": drawn.grid,
        "t_range": config.t_range,
        "threshold": drawn.threshold,
        "seed": drawn.seed,
    }
    if drawn.sigma_range is not None:
        sampling |= {"sigma_range": drawn.sigma_range}
    if drawn.start != "noise":
        sampling |= {"start": drawn.start}
    if config.conditional:
        sampling |= {"guidance": drawn.guidance, "guidance_interval": drawn.guidance_interval}
    return {"model": model, "sampling": sampling}


def _reduced(x: Tensor) -> Tensor:
    """Pictures [..., C, H, W] averaged down to at most :data:`_SIDE` pixels a side; vectors as they are."""
    if x.ndim < 4 or max(x.shape[-2:]) <= _SIDE:
        return x
    scale = _SIDE / max(x.shape[-2:])
    size = [max(1, round(n * scale)) for n in x.shape[-2:]]
    return nn.functional.interpolate(x.flatten(0, -4), size, mode="area").unflatten(0, x.shape[:-3])


def _write_nearest(path: Path, data: Data, x: Tensor, view: View) -> None:
    """Some samples, their nearest training pictures, and how near held-out pictures come."""
    distance, found = nearest_training(x, data, _NEAREST)
    typical = nearest_training(data.fresh(256), data)[0].mean()
    write_arrays(
        path,
        samples=view.compact(_reduced(x)),
        nearest=view.compact(_reduced(data.normalised(found))),
        distance=distance.float().numpy(),
        typical=np.asarray(float(typical)),
    )
