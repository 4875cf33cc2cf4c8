"""One training, for as long as it takes: on one process or many, stopped and continued at will.

The folder is a run's (:mod:`.run`), and holds besides ``checkpoints/`` (the last few states), ``best.safetensors``
(the averaged network at its lowest validation error, with its spec), ``averages/`` (snapshots for averages of any
width), ``previews/`` (samples as training went on) and what the tracker writes.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from ..data import Data
from ..denoiser import Denoiser
from ..errors import Conflict, DataError, OutputError, RecipeError, ReparamError, unknown
from ..files import remove_unfinished, write_text, written_whole
from ..report.plots import picture_sheet
from ..spec import save
from ..training import Accelerated, Diverged, Trainer
from ..training.checkpoints import Checkpoints
from ..training.engine import check_tracker
from ..training.memory import keep_freed_memory
from ..training.posthoc import write_snapshot
from .confidence import with_confidence
from .estimate import Cost, computed, describe_training, in_words, probe_training
from .folders import differences, folder_name, locked, refuse_foreign
from .initial import Initial
from .inputs import Inputs, preflight
from .leaderboard import estimate_lines, of_calibration
from .pool import Interrupted, gentle_interrupt
from .recipe import Recipe, RunConfig, load_recipe, read_recipe
from .run import (
    RESULT,
    blank_row,
    concluded,
    data_of,
    data_record,
    draw_samples,
    forget_data,
    keep_snapshot,
    labels_like,
    make_network,
    trainer_of,
    write_history,
)

_RECORD = "training.json"
#: What may change when a training is continued: the numbers of the steps that are done do not depend on it.
_FREE = ("name", "description", "sample", "metrics", "rank_by", "extractor")
_FREE_TRAIN = ("accumulate", "compile", "channels_last", "checkpoint_activations")
#: Seconds between two lines in a log.
_QUIET = 60.0
#: Entries of the history of a whole training.
_ENTRIES = 1000


@dataclass(frozen=True)
class Training:
    """A training that has come to its end.

    Attributes:
        out: its folder. row: what became of it, as a row of a leaderboard.
    """

    out: Path
    row: dict[str, Any]

    def text(self) -> str:
        """For a reader."""
        row = self.row
        found = {name: m for name, m in row["metrics"].items() if m["value"] is not None}
        scores = [f"{name} {m['value']:.4g} (floor {m['floor']:.4g})" for name, m in found.items()]
        what = ", ".join([*scores, *of_calibration(row)]) if row["status"] == "finished" else row.get("reason", "")
        model = self.out / "model.safetensors"
        return f"{row['run']}: {row['status']}: {what}" + (f"\nmodel: {model}" if model.exists() else "")


def train(
    recipe: str | Path | dict[str, Any] | None = None,
    data: str | Path | np.ndarray | Tensor | None = None,
    network: str | nn.Module | Callable[..., nn.Module] | None = None,
    *,
    add_confidence: str | Path | None = None,
    init: str | Path | None = None,
    out: str | Path | None = None,
    run: str | None = None,
    settings: Sequence[str] = (),
    tiny: bool = False,
    device: str | None = None,
    save_every: float = 600.0,
    keep: int = 2,
    tracker: str | None = "tensorboard",
    previews: int = 16,
    estimate_only: bool = False,
    say: Callable[[str], None] = print,
) -> Training | Cost | None:
    """Train one network for one target, on as many processes as were started.

    Call it alone, or let ``torchrun`` or ``accelerate launch`` start several processes that do: they share each
    batch out among them, and the numbers are the same but for rounding. Where ``out`` holds the same training,
    unfinished, that one is continued, on any number of processes.

    Args:
        recipe, data, network, settings, tiny: as of :func:`reparam.study`; sweeps must leave one run.
        add_confidence: in place of a recipe and a network, the folder of a finished run (or weights beside its
            recipe.yaml): its network is kept as it is, and one beside it learns how sure it is.
        init: the folder of a finished run, or a .safetensors file with its spec: training begins with that network,
            stated exactly as the recipe's target (:func:`reparam.reexpress`). What the recipe leaves out of network,
            schedule, time, input and t_range is that run's; without a recipe, all but the settings is.
        out: the folder to write to; runs/NAME by default.
        run: which of a recipe's runs, where it compares several.
        device: "cpu", "cuda" or "mps"; the best there is by default.
        save_every: seconds between checkpoints. keep: how many of them are kept.
        tracker: where curves go, by Accelerate's name ("tensorboard", "wandb", …), or None.
        previews: how many samples are drawn at each validation, of pictures; 0 for none.
        estimate_only: say what it would cost, and do nothing.
        say: where lines for the reader go.

    Returns:
        The training, or its cost with ``estimate_only``; None in all processes but the first.

    Raises:
        ReparamError: for whatever is wrong with recipe, data, network or folder, before it starts.
        Interrupted: if it was stopped, by Ctrl-C or SIGTERM; the state is kept.
    """
    forget_data()
    settings = [settings] if isinstance(settings, str) else list(settings)
    again = _words(recipe, add_confidence, init, tiny)
    by_name = data is None and network is None and again is not None
    recipe = _small(recipe) if tiny else recipe
    recipe, start = _recipe_of(recipe, network, add_confidence, init, settings)
    own = Inputs.of(data, network)
    plan = load_recipe(
        read_recipe(recipe),
        settings,
        change=own.into,
        extra_networks=own.networks,
        extra_data=own.data_names,
        derived=tiny or add_confidence is not None or init is not None,
    )
    plan = replace(plan, tiny=tiny)
    name, config = _one(plan, run)
    config = config if start is None else start.begun(config)
    _check_options(save_every, keep, previews)
    engine, tracker = Accelerated(device), check_tracker(tracker)
    if engine.device.type == "cpu":
        keep_freed_memory()
    tell = say if engine.first else _silent
    tell(
        f"training {plan.name}: {name}, {config.train.steps} steps of {config.train.batch} samples, {engine.describe()}"
    )
    only = Recipe(plan.name, plan.description, {name: config}, plan.rank_by)
    if estimate_only and (cost := _without_data(plan, only, own, tell)) is not None:
        return cost if engine.first else None
    if start is not None:
        for line in (start.text(config), *start.check_data(own.data or data_of(config))):
            tell(line)
    digests = preflight(only, own, tell)
    mine = own.data or data_of(config)
    if estimate_only:
        cost = probe_training(config, engine, mine, own.factory)
        tell(f"\nit would take {describe_training(cost, config, engine)}")
        return cost if engine.first else None
    folder = Path("runs") / folder_name(plan.name) if out is None else Path(out)
    record = {"run": name, "recipe": config.to_dict(), "data": digests[json.dumps(config.data, sort_keys=True)]}
    told = _again(again if by_name else None, settings, run, folder)
    trainer = trainer_of(config, mine, make_network(config, mine, own.factory), engine, _ENTRIES)
    work = _Work(name, config, mine, trainer, folder, engine, save_every, keep, tracker, previews, tell, told)
    with locked(folder, "training") if engine.first else contextlib.nullcontext():
        if engine.first:
            _claim(folder, record)
            for place in (folder, *(folder / name for name in ("checkpoints", "averages", "snapshots"))):
                remove_unfinished(place)
        engine.wait()
        done, found = work.done()
        return found if done else work.do()


def _without_data(plan: Recipe, only: Recipe, own: Inputs, tell: Callable[[str], None]) -> Cost | None:
    """Say what the recipe says of itself, and where its data are not here what it costs elsewhere; else None."""
    for line in estimate_lines(plan):
        tell(line)
    if own.in_process or (elsewhere := computed(only.runs)) is None:
        return None
    tell("\n" + "\n".join(elsewhere.lines()))
    return elsewhere.cost()


def _recipe_of(
    recipe: Any,
    network: Any,
    add_confidence: str | Path | None,
    init: str | Path | None,
    settings: list[str],
) -> tuple[Any, Initial | None]:
    """The recipe, or that of a finished run with a confidence added; and the model that it begins with."""
    if add_confidence is not None and init is not None:
        raise Conflict(
            f"a confidence is learned beside a network that stays as it is ({add_confidence}), and with --init a "
            f"network ({init}) goes on learning; give one of the two."
        )
    if init is not None:
        if network is not None and not isinstance(network, str):
            raise Conflict(f"the network is that of {init}; leave the network out.")
        start, raw = Initial.of(init).into(recipe, settings)
        return raw, start
    if add_confidence is None:
        if recipe is None:
            raise RecipeError(
                "a training needs a recipe, or a finished run to add a confidence to (--add-confidence) or to begin "
                "with (--init)."
            )
        return recipe, None
    if recipe is not None or network is not None:
        raise Conflict(
            f"a confidence is added to what {add_confidence} was trained as: leave out the recipe and the network, and "
            "change single values with --set, such as --set network.head.hidden=64."
        )
    return with_confidence(add_confidence), None


def _small(recipe: Any) -> dict[str, Any]:
    """The small version of a recipe."""
    if recipe is None:
        raise RecipeError("--tiny asks for the small version of a recipe, and no recipe is given.")
    return read_recipe(recipe, tiny=True)


def _words(recipe: Any, add_confidence: str | Path | None, init: str | Path | None, tiny: bool) -> list[str] | None:
    """What the command line would be given for these; None where it cannot."""
    if isinstance(recipe, dict):
        return None
    named = ([] if recipe is None else [str(recipe)]) + ["--tiny"] * tiny
    for option, value in (("--add-confidence", add_confidence), ("--init", init)):
        named += [] if value is None else [option, str(value)]
    return named


def _check_options(save_every: float, keep: int, previews: int) -> None:
    for name, value, least in (("save-every", save_every, 0), ("keep", keep, 1), ("previews", previews, 0)):
        if not value >= least:
            raise ReparamError(f"--{name} must be at least {least}, found {value:g}.")


def _silent(text: str) -> None:
    """What the other processes say."""


def _one(plan: Recipe, run: str | None) -> tuple[str, RunConfig]:
    """The run to train."""
    if run is not None:
        if run not in plan.runs:
            raise unknown("run", run, plan.runs)
        return run, plan.runs[run]
    if len(plan.runs) > 1:
        names = list(plan.runs)
        some = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise Conflict(
            f"this recipe compares {len(names)} runs ({some}), and a training is of one: choose it with --run "
            f"{names[0]}, or give single values with --set."
        )
    return next(iter(plan.runs.items()))


def _claim(folder: Path, record: dict[str, Any]) -> None:
    """Make the folder this training's, or find that it is already."""
    file = folder / _RECORD
    if not file.exists():
        refuse_foreign(folder, "training")
    elif any((folder / "checkpoints").glob("step-*")):  # else there is nothing to lose
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            changes = list(differences(_bound(before["recipe"]), _bound(json.loads(json.dumps(record["recipe"])))))
            other_data = before["data"] != record["data"]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise Conflict(f"{file} cannot be read ({e}); choose another --out.") from e
        if changes:
            raise Conflict(
                f"{folder} holds checkpoints of another training: {'; '.join(changes[:6])}. Nothing was touched. "
                "Choose another folder with --out, or continue with the recipe that is there."
            )
        if other_data:
            raise DataError(
                f"the data are not those that the training in {folder} began with; choose another --out. (On a machine "
                "with other memory data.stream: auto may decide otherwise: say data.stream=true or false.)"
            )
    if not any((folder / "checkpoints").glob("step-*")):
        _remove_leavings(folder)
    write_text(file, json.dumps(record, indent=1) + "\n")


def _remove_leavings(folder: Path) -> None:
    """What a training left that ended before its first checkpoint would be taken for this one's."""
    for name in ("averages", "previews", "snapshots"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("best.safetensors", "model.safetensors", "metrics.jsonl", RESULT):
        (folder / name).unlink(missing_ok=True)


def _bound(recipe: dict[str, Any]) -> dict[str, Any]:
    """What of a training may not change while it is continued."""
    kept = {key: value for key, value in recipe["train"].items() if key not in _FREE_TRAIN}
    if kept["decay"] in ("constant", "inverse_sqrt"):  # then no step depends on how many there are
        del kept["steps"]
    return {key: value for key, value in recipe.items() if key not in _FREE} | {"train": kept}


@dataclass
class _Work:
    """A training in its folder."""

    name: str
    config: RunConfig
    data: Data
    trainer: Trainer
    folder: Path
    engine: Accelerated
    save_every: float
    keep: int
    tracker: str | None
    previews: int
    say: Callable[[str], None]
    again: str
    checkpoints: Checkpoints = field(init=False)
    #: Step and seconds of stepping at the last entry; step and time at which this process began; when it last spoke.
    last: tuple[int, float] = field(init=False, default=(0, 0.0))
    began: tuple[int, float] = field(init=False, default=(0, 0.0))
    said: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.keep)

    def done(self) -> tuple[bool, Training | None]:
        """Whether all is done already, as the first process finds for all of them; and, in that one, what was found."""
        found = self._found() if self.engine.first else None
        return self.engine.most(float(found is not None)) > 0, found

    def _found(self) -> Training | None:
        try:
            row = json.loads((self.folder / RESULT).read_text(encoding="utf-8"))
            recipe = yaml.safe_load((self.folder / "recipe.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return None
        if row.get("run") != self.name or recipe != self.config.to_dict():
            return None  # as when it is to be scored in another way
        self.say(f"finished already, in {self.folder}")
        return Training(self.folder, row)

    def do(self) -> Training | None:
        """Train what is left, then score the model in the first process."""
        first, trainer = self.engine.first, self.trainer
        if self.checkpoints.restore(trainer, self.say):
            self.say(f"continuing in {self.folder} at step {trainer.step}")
        if self.engine.most(trainer.step) != -self.engine.most(-trainer.step):
            raise OutputError(
                f"the processes find different checkpoints in {self.folder}; it must be one folder that all of them "
                "see, on every node."
            )
        if first:
            (self.folder / RESULT).unlink(missing_ok=True)  # from here on it would be of another state
            write_text(self.folder / "recipe.yaml", _as_yaml(self.config))
        with gentle_interrupt() as interrupted:
            try:
                self._train(interrupted.is_set)
            except Diverged as e:
                return Training(self.folder, self._diverged(str(e))) if first else None
            except OutputError as e:
                raise OutputError(f"{e} {self._kept()} To continue once there is room: {self.again}") from e
            self.engine.wait()  # a process that ends while the first one saves would have that one ended too
            if trainer.step < self.config.train.steps and not first:
                return None
            if trainer.step < self.config.train.steps:
                raise Interrupted(
                    f"stopped at step {trainer.step} of {self.config.train.steps}; everything is kept in "
                    f"{self.folder}. To continue: {self.again}"
                )
            self.engine.end()
            if not first:
                return None
            self.say("scoring the averaged network")
            reference = self.folder / "reference"
            row = concluded(self.name, self.config, trainer, self.folder, interrupted.is_set, cache=reference)
        if row is None:
            raise Interrupted(f"trained, but not yet scored; everything is kept. To continue: {self.again}")
        return Training(self.folder, row)

    def _train(self, stop: Callable[[], bool]) -> None:
        c, first, trainer = self.config.train, self.engine.first, self.trainer
        snapshots = {round(c.steps * (k + 1) / c.snapshots) for k in range(c.snapshots)} if c.ema_widths else set()
        if first and trainer.step < c.steps:
            self.engine.track(self.tracker, self.folder, self.name, self.config.to_dict(), self.say)
        saved, told, was = time.perf_counter(), len(trainer.history), trainer.step
        self.last, self.said, self.began = (trainer.step, trainer.stepping), saved, (trainer.step, saved)
        with _bar(trainer, c.steps, shown=first) as bar:
            for step in trainer.run(stop, {*snapshots, *self.config.keep_at}):
                bar.update(step - bar.n)
                if not first:
                    continue
                if len(trainer.history) > told or (trainer.history and trainer.history[-1]["step"] == step):
                    told = len(trainer.history)
                    self._noted(bar)
                if step in self.config.keep_at:
                    keep_snapshot(trainer, self.config, self.folder)
                if step in snapshots:
                    write_snapshot(self.folder / "averages", trainer.averages, step)
                if trainer.checked and time.perf_counter() - saved >= self.save_every and step < c.steps:
                    self._save()
                    saved = time.perf_counter()
        if first and trainer.step > was:
            self._save()

    def _save(self) -> None:
        self.checkpoints.save(self.trainer)
        save(self._denoiser(), self.folder / "model.safetensors")
        write_history(self.trainer, self.folder)

    def _denoiser(self) -> Denoiser:
        """The averaged network as it is now, with what it must know of its data."""
        denoiser = self.trainer.denoiser
        denoiser.data = data_record(self.config, self.data)
        return denoiser

    def _noted(self, bar: Any) -> None:
        """Pass on what the history's last entry says."""
        trainer = self.trainer
        entry = trainer.history[-1]
        values = {key: entry[key] for key in ("loss", "grad_norm", "lr") if entry.get(key) is not None}
        if errors := entry.get("x0_error"):
            bins = zip(trainer.validation.edges[:-1], trainer.validation.edges[1:], errors, strict=True)
            values |= {f"x0_error/t_{low:.2f}_to_{high:.2f}": e for low, high, e in bins if e is not None}
            values["x0_error"] = float(np.mean(errors))
            self._measured(errors)
        steps, seconds = trainer.step - self.last[0], trainer.stepping - self.last[1]
        self.last = trainer.step, trainer.stepping
        if steps:
            values["samples_per_second"] = self.config.train.batch * steps / max(seconds, 1e-9)
        self.engine.log(values, entry["step"])
        if "loss" in values and steps:
            bar.set_postfix_str(f"loss {values['loss']:.4g}", refresh=False)
            self._line(values["loss"])

    def _line(self, loss: float) -> None:
        """Where no bar is shown, as in a log, a line now and then."""
        if sys.stderr.isatty() or time.perf_counter() - self.said < _QUIET:
            return
        self.said, step, steps = time.perf_counter(), self.trainer.step, self.config.train.steps
        rate = (step - self.began[0]) / (self.said - self.began[1])  # validations and previews included
        left = in_words((steps - step) / rate)
        self.say(f"  step {step} of {steps}: loss {loss:.4g}, {rate:.3g} steps/s, about {left} left")

    def _measured(self, errors: list[float]) -> None:
        """Keep the network if it is the best so far, and show what it can do."""
        trainer, mean = self.trainer, sum(errors)
        if all(mean <= sum(entry["x0_error"]) for entry in trainer.history if entry.get("x0_error")):
            save(self._denoiser(), self.folder / "best.safetensors")
        if not (self.previews and self.data.pictures):
            return
        y = labels_like(self.data, self.previews) if self.config.conditional else None
        asked = replace(self.config.sample, n=max(2, self.previews))
        try:
            x, _ = draw_samples(self._denoiser(), asked, self.data, self.previews, y)
        except Diverged as e:
            self.say(f"  no preview at step {trainer.step}: {e}")
            return
        rows = np.ascontiguousarray(x.movedim(1, -1).numpy())
        (self.folder / "previews").mkdir(exist_ok=True)
        path = self.folder / "previews" / f"step-{trainer.step:09d}.png"
        with written_whole(path) as temporary:
            temporary.write_bytes(picture_sheet(rows[..., 0] if rows.shape[-1] == 1 else rows))
        self.engine.log_images("samples", rows, trainer.step)

    def _diverged(self, reason: str) -> dict[str, Any]:
        write_history(self.trainer, self.folder)
        row = blank_row(self.name, self.config, self.data)
        advice = (
            "Usual remedies, in another folder (--out): a lower train.lr, train.precision=float32, a smaller t_range, "
            "a capped weighting."
        )
        return {**row, "status": "diverged", "reason": f"{reason}. {self._kept()} {advice}"}

    def _kept(self) -> str:
        found = self.checkpoints.list()
        if not found:
            return "No checkpoint had been written yet."
        return f"The last good checkpoint is {found[0]}."


def _as_yaml(config: RunConfig) -> str:
    return str(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))


def _bar(trainer: Trainer, steps: int, shown: bool) -> Any:
    return tqdm(
        total=steps,
        initial=trainer.step,
        unit="step",
        file=sys.stderr,
        mininterval=0.5,
        dynamic_ncols=True,
        disable=not (shown and sys.stderr.isatty()),
    )


def _again(what: list[str] | None, settings: Sequence[str], run: str | None, folder: Path) -> str:
    if what is None:
        return f"call train again with the same arguments and out={str(folder)!r}"
    words = ["reparam", "train", *what, "--out", str(folder), *(["--run", run] if run else [])]
    for setting in settings:
        words += ["--set", setting]
    return shlex.join(words)
