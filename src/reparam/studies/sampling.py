"""Samples from a model, on demand: a few of a run, or the 50,000 that a benchmark asks for."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..confidence import prediction
from ..denoiser import Denoiser
from ..errors import Conflict, OutputError, ReparamError, SpecError, unknown
from ..files import sha256_of
from ..networks import own_network
from ..spec import Spec, code_in, load, read_spec, stated, weights_file
from ..training.engine import Accelerated, Engine
from .drawing import Drawing, Progress, batches, draw_all, in_precision, usual_batch
from .folders import locked
from .official import Official
from .pool import Interrupted, resources
from .recipe import RunConfig, SampleConfig, from_dict, parse_yaml, takes_ends
from .run import as_sampled, byte_rule, data_of, made_by_run, starts
from .sample_files import Place, kind_of_place, told_beside

__all__ = ["Official", "opened", "recipe_beside", "sample_run", "told_beside"]

#: Threads that encode pictures, at most.
_THREADS = 16


@dataclass(frozen=True)
class _Model:
    """A model to draw from.

    Attributes:
        weights: its file. denoiser: what it is. usual: how samples are drawn where nothing else is asked for.
        config: the recipe of its run, where that is known. official: where it is an official file.
    """

    weights: Path
    denoiser: Denoiser
    usual: SampleConfig
    config: RunConfig | None = None
    official: Official | None = None

    def made(self, chosen: SampleConfig) -> dict[str, dict[str, Any]]:
        """What a card says of it, and of how samples are drawn."""
        if self.official is not None:
            sampling = {key: value for key, value in asdict(chosen).items() if key in _SAMPLING}
            return {"model": {**self.official.record(), "weights": sha256_of(self.weights)}, "sampling": sampling}
        told = made_by_run(replace(self.config, sample=chosen), self.weights) if self.config else {}
        return _made(self.denoiser, told)


_SAMPLING = ("sampler", "steps", "grid", "threshold", "seed", "guidance", "guidance_interval")


def sample_run(
    where: str | Path | Official,
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
    batch: int | None = None,
    device: str | None = None,
    precision: str = "float32",
    compile: bool = False,
    spec: Spec | Mapping[str, Any] | str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Path, tuple[int, ...]] | None:
    """Draw ``n`` samples from a model, in the units of its data, and write them as they come.

    Pictures become a folder of PNG files or, where ``out`` ends so, a .zip of them, a .parquet table in the hub's
    layout, or one .npz array of bytes; anything else becomes a .npz file. A grid of the first 400 lies beside
    (PLACE-grid.png). Which model they are of and how they were drawn is in PLACE.json beside, or in the array
    "about", for the cards of their scores.

    Call it alone, or let ``torchrun`` or ``accelerate launch`` start several processes that do, which share the samples
    out. All noise of a sample is a function of the seed and its number, so neither the batch nor the number of
    processes changes one but for rounding. Until all are drawn they lie in PLACE.unfinished; there the same call
    continues after whatever stopped it, and what was being drawn and written is all that is lost.

    Args:
        where: the folder of a run, or a .safetensors file with its spec; or an :class:`.official.Official`.
        out: the folder or file; samples-N-seedS(.npz) beside the weights by default.
        sampler, steps, grid, threshold: as in a recipe's ``sample``; those of the run's by default, else Heun in
            50 even steps.
        seed: of the noise; the first samples of a seed are the same, however many are drawn.
        label: a class by name or number, for a conditional model; all in turn by default.
        guidance, interval: of classifier-free guidance; the recipe's or the published one by default, else none.
        batch: how many are drawn at a time, by each process; as many as usually fit by default. Multiples of 32 waste
            no noise.
        device: "cpu", "cuda" or "mps"; the best there is by default.
        precision: what the network computes in, "float32", "tf32" or "bf16"; all else is float32 always. In the
            latter two a sample depends on the batch and the machine, in the order of that precision's rounding.
        compile: run the network through torch.compile, which takes a minute or so at first.
        spec: what the weights do not say of themselves, or say wrongly, as in :func:`reparam.load`.
        say: where lines for the reader go.

    Returns:
        The folder or file, and the shape of the samples; None in all processes but the first.

    Raises:
        SpecError, NetworkError: if the model cannot be read or built.
        UnknownName, Unsupported: if there is no such precision, or not on this device.
        Conflict: if a label or guidance is asked of a model without classes; if samples of another command are there.
        OutputError: if the place to write to is not usable.
        Interrupted: if it was stopped by Ctrl-C; what is drawn is kept.
    """
    for name, count in (("n", n), ("steps", steps), ("batch", batch)):
        if count is not None and count < 1:
            raise ReparamError(f"--{name} must be at least 1, found {count}.")
    if not 0 <= seed < 2**63:  # beyond, seeds draw one another's noise
        raise ReparamError(f"--seed must be an integer in 0 … 2**63 − 1, found {seed}.")
    model = _model(where, spec, guidance)
    engine = _engine(device)
    denoiser = in_precision(model.denoiser.to(engine.device), precision, compile)
    record = denoiser.data or {}
    if "shape" not in record:
        raise SpecError(f"{model.weights} does not say what shape its data have, so no noise can be drawn for it.")
    asked = {
        "sampler": sampler,
        "steps": steps,
        "grid": grid,
        "threshold": threshold,
        "guidance": guidance,
        "guidance_interval": interval,
    }
    chosen = _chosen(model.usual, {**asked, "seed": seed})
    y = _labels(record.get("classes"), label, chosen.guidance, n)
    named = {"seed": seed, "label": label, **asked, "precision": None if precision == "float32" else precision}
    target = _target(model, n, named, out)
    drawing = _drawing(denoiser, model.config, chosen, n, y)
    kind = kind_of_place(target, bool(record.get("pictures")))
    place = kind(target, n, drawing.shape, y, record.get("classes") or (), _threads(engine))
    usual = usual_batch(drawing.shape, engine.device)
    work = _Work(model, chosen, precision, drawing, place, engine, batch or usual, say)
    found = work.do(label)
    engine.end()
    return found


@dataclass(frozen=True)
class _Work:
    """Samples on their way to their place."""

    model: _Model
    chosen: SampleConfig
    precision: str
    drawing: Drawing
    place: Place
    engine: Engine
    batch: int
    say: Callable[[str], None]

    def do(self, label: str | None) -> tuple[Path, tuple[int, ...]] | None:
        """Draw what is missing, then put all in its place."""
        place, first = self.place, self.engine.first
        drawn = self._drawn(label) if first else {}
        finished = first and place.finished(drawn)
        if not self.engine.most(float(finished)):
            with locked(place.work, "sampling") if first else contextlib.nullcontext():
                self._draw(drawn)
        elif first:
            self.say(f"drawn already, in {place.target}")
            place.clear()  # what a process left that was killed once it was done
        return (place.target, (place.n, *self.drawing.shape)) if first else None

    def _draw(self, drawn: dict[str, Any]) -> None:
        place, engine = self.place, self.engine
        with self._kept():
            if engine.first:
                place.claim(drawn)
            engine.wait()
            missing = place.missing()
            left = sum(stop - start for start, stop in missing)
            if engine.most(left) != -engine.most(-left):
                raise OutputError(
                    f"the processes find different samples in {place.work}; it must be one folder that all of them see."
                )
            mine = batches(missing, self.batch, engine.rank, engine.world)
            self._tell(left)
            own = sum(stop - start for start, stop in mine) if engine.first else 0
            with Progress(place.n, place.n - left, own, self.say) as progress:
                draw_all(self.drawing, place, mine, progress)
            engine.wait()
            if engine.first:
                place.finish(self._about(), drawn)

    def _tell(self, left: int) -> None:
        n, engine = self.place.n, self.engine
        if engine.first:
            many = f"{engine.world} processes" if engine.world > 1 else "one process"
            there = f", {n - left} are there already" if left < n else ""
            self.say(f"drawing {n} samples, {self.batch} at a time at most, {many} on {engine.device.type}{there}")

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """What was stopped says how to go on; what failed before anything was drawn leaves nothing."""
        place = self.place
        try:
            yield
        except BaseException as e:
            done = sum(stop - start for start, stop in place.parts())
            if self.engine.first and not done:
                place.clear()
            if isinstance(e, KeyboardInterrupt) and self.engine.first:
                kept = f"{done} of {place.n} samples are kept in {place.work}; the same command continues."
                raise Interrupted(f"stopped. {kept if done else 'Nothing was drawn yet.'}") from e
            raise

    def _drawn(self, label: str | None) -> dict[str, Any]:
        """All that decides what the samples are."""
        sampling = {
            key: value for key, value in asdict(self.chosen).items() if key in (*_SAMPLING, "start", "sigma_range")
        }
        denoiser = self.model.denoiser
        return {
            "weights": sha256_of(self.model.weights)[:16],
            "n": self.place.n,
            "label": label,
            "precision": self.precision,
            **sampling,
            "overrides": denoiser.overrides,
            "official": self.model.official and self.model.official.record(),
        }

    def _about(self) -> dict[str, Any]:
        record, y = self.drawing.data, self.drawing.y
        rule = _rule(record) if record.get("pictures") else None
        made = self.model.made(self.chosen)
        made["sampling"] = {**made.get("sampling", {}), "precision": self.precision}
        return {**made, "to_uint8": rule, "labels": None if y is None else y.tolist()}


def _model(
    where: str | Path | Official, spec: Spec | Mapping[str, Any] | str | Path | None, guidance: float | None
) -> _Model:
    if isinstance(where, Official):
        if spec is not None:
            raise Conflict("--spec says what weights do not say of themselves, and of --official ones it is known.")
        usual = where.sampling(guidance)
        return _Model(Path(where.file), where.denoiser(), usual, official=where)
    weights = weights_file(where)
    config = recipe_beside(weights)
    return _Model(weights, opened(weights, config, spec), config.sample if config else SampleConfig(), config)


def _engine(device: str | None) -> Engine:
    """This process, or its part among those that torchrun or accelerate launch started."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return Accelerated(device)
    return Engine(resources(1, 1, device).devices[0])


def _threads(engine: Engine) -> int:
    """Threads that encode, of the cores that this process has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", str(engine.world)))
    return max(1, min(_THREADS, cores // here))


def _drawing(denoiser: Denoiser, config: RunConfig | None, chosen: SampleConfig, n: int, y: Tensor | None) -> Drawing:
    clean = starts(chosen, data_of(config), n) if config is not None and chosen.start == "data" else None
    seen = as_sampled(denoiser, chosen)
    return Drawing(seen, chosen.method(), chosen.times(seen), chosen.seed, y, clean, denoiser.data or {})


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


def _rule(data: dict[str, Any]) -> str:
    scale = data.get("normalised_by", {"mean": 0.0, "std": 1.0})
    return byte_rule(scale["mean"], scale["std"])


def _target(model: _Model, n: int, asked: dict[str, Any], out: str | Path | None) -> Path:
    """Where to write; by default named after what was asked for."""
    if out is not None and not str(out):
        raise OutputError(
            "--out is empty; expected a folder for pictures, or a name that ends in .zip, .parquet or .npz."
        )
    if out is not None:
        return Path(out)
    told = [_part_of_name(key, value) for key, value in asked.items() if value is not None]
    stem = re.sub(r"[^\w.+=-]+", "_", "-".join(["samples", str(n), *told]))
    name = model.weights.stem
    stem = stem if name == "model" else f"{name}-{stem}"
    pictures = (model.denoiser.data or {}).get("pictures")
    return model.weights.parent / (stem if pictures else f"{stem}.npz")


def _part_of_name(key: str, value: Any) -> str:
    """Such as steps8, or of a sampler with arguments ancestral_variance=learned."""
    if isinstance(value, dict):
        value = "_".join([str(value.get("name")), *(f"{k}={v}" for k, v in value.items() if k != "name")])
    return str(value) if key == "sampler" else f"{key}{value}"


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
