"""Studies: the same network, data, budget and noise under different targets."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..errors import Conflict, DataError, OutputError
from ..files import write_text, written_whole
from ..report.plots import picture_sheet
from ..report.rows import words_of
from .console import Console
from .estimate import Cost, computed, describe, probe
from .folders import differences, folder_name, locked, refuse_foreign
from .inputs import Inputs, preflight
from .leaderboard import as_text, estimate_lines, rank_metric, ranked, told_of
from .pool import Interrupted, Pool, gentle_interrupt, pool_on, run_here, run_in_workers
from .recipe import Recipe, RunConfig, from_dict, load_recipe, target_named, told_to
from .run import RESULT, blank_row, data_of, forget_data
from .summary import summary

__all__ = ["Interrupted", "Recipe", "RunConfig", "Study", "load_recipe", "open_study", "study"]

_RECORD = "study.json"
#: Pictures on a contact sheet.
_ON_SHEET = 64


@dataclass(frozen=True)
class Study:
    """A finished study.

    Attributes:
        out: its folder. report: the page.
        rows: the leaderboard, best first within each data set.
        failed: what went wrong, for runs that ended in an error; running again retries them.
    """

    out: Path
    report: Path
    rows: list[dict[str, Any]]
    recipe: Recipe
    failed: dict[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """The leaderboard as text."""
        return as_text(self.rows, self.recipe)


def study(
    recipe: str | Path | dict[str, Any],
    data: str | Path | np.ndarray | Tensor | None = None,
    network: str | nn.Module | Callable[..., nn.Module] | None = None,
    *,
    out: str | Path | None = None,
    settings: Sequence[str] = (),
    tiny: bool = False,
    targets: Sequence[str | dict[str, Any]] = (),
    jobs: int | None = None,
    device: str | None = None,
    on: str = "local",
    per_run: Mapping[str, float] | None = None,
    estimate_only: bool = False,
    say: Callable[[str], None] = print,
) -> Study | None:
    """Train a network under every target of a recipe, on the same draws, and compare.

    Args:
        recipe: the name of a built-in recipe, a YAML file, or plain data.
        data: the caller's own samples instead of the recipe's: a .npy/.npz file or an array
            [N, D], which is scaled to mean 0 and standard deviation 1, and samples scaled back;
            or pictures: a folder, a .zip or a .parquet file.
        network: the caller's own network: "pkg.mod:make", a function that makes one (called with
            what ``settings`` give as network.…), or a module (copied for every run).
        out: the folder to write to; runs/NAME by default. Where it holds an unfinished
            study of the same recipe, that one is continued.
        settings: overrides such as "train.steps=500".
        tiny: the small version of the recipe, where it has one.
        targets: further targets to compare: names, .py files with the two functions of
            :class:`reparam.targets.File`, or mappings such as {name: k, k: 0.3}.
        jobs: runs at a time; by default one a core, or one a GPU. Functions, modules and
            arrays of the caller's stay in this process, one run after another.
        device: "cpu", "cuda", "mps"; the best there is by default.
        on: "local" for this machine, or "ray" for a Ray cluster: that of RAY_ADDRESS, or one started here for the
            study alone.
        per_run: what a run asks of the cluster, {"num_cpus": 8, "num_gpus": 0.5}; by default one GPU where there
            are any, and the cores divided among the runs.
        estimate_only: say what it would cost, and do nothing.
        say: where lines for the reader go.

    Returns:
        The finished study, or None with ``estimate_only``.

    Raises:
        ReparamError: for whatever is wrong with recipe, data, network or folder, before it starts.
        Interrupted: if it was stopped; the state is kept.
    """
    forget_data()
    own = Inputs.of(data, network)
    settings = [settings] if isinstance(settings, str) else list(settings)
    listed = [targets] if isinstance(targets, str | dict) else targets
    targets = [target_named(target) if isinstance(target, str) else target for target in listed]
    plan = load_recipe(
        recipe,
        settings,
        tiny=tiny,
        targets=targets,
        change=own.into,
        extra_networks=own.networks,
        extra_data=own.data_names,
    )
    folder = Path("runs") / folder_name(plan.name) if out is None else Path(out)
    if own.in_process and on != "local":
        raise Conflict(
            f"on: {on} does the runs in other processes, which have no array, function or module of this one; name "
            "them: data='FILE.npy', network='pkg.mod:make'."
        )
    with pool_on(on, len(plan.runs), 1 if own.in_process else jobs, device, per_run) as pool:
        say(f"study {plan.name}: {len(plan.runs)} run{'s' * (len(plan.runs) > 1)}")
        if estimate_only:
            _estimate(plan, own, pool, say)
            return None
        digests = preflight(plan, own, say)
        record = {"recipe": plan.to_dict(), "data": digests, "told": asdict(told_of(plan))}
        with _claimed(folder, record) as claim:
            pool.check(folder)
            costs = _costs(plan, own, pool)
            say(f"the whole takes {describe(costs, pool.on)}, and some seconds to start")
            claim()  # only now that every run is known to work: a mistake found above leaves the folder free
            _contact_sheets(plan, own, folder, say)
            seconds = {run: cost.seconds for run, cost in costs.items()}
            rows, stopped = _do(plan, folder, pool, own, digests, seconds, say)
            if stopped:
                named = None if data is not None or network is not None else recipe
                again = _again(named, settings, tiny, targets, folder, on, per_run)
                raise Interrupted(
                    f"stopped with {len(rows)} of {len(plan.runs)} runs done; everything is kept in {folder}. "
                    f"To continue: {again}"
                )
            return _conclude(folder, plan, rows)


def _estimate(plan: Recipe, own: Inputs, pool: Pool, say: Callable[[str], None]) -> None:
    """Say what the recipe says of itself, and last what it costs: from its data, or without them."""
    for line in estimate_lines(plan):
        say(line)
    if not own.in_process and (elsewhere := computed(plan.runs)) is not None:
        say("\n" + "\n".join(elsewhere.lines()))
        return
    preflight(plan, own, say)
    say(f"\nit would take {describe(_costs(plan, own, pool), pool.on)}")


def _costs(plan: Recipe, own: Inputs, pool: Pool) -> dict[str, Cost]:
    return pool.call(probe, plan.runs, pool.on, data=own.data, factory=own.factory)


def _contact_sheets(plan: Recipe, own: Inputs, folder: Path, say: Callable[[str], None]) -> None:
    """For pictures, a sheet of them as training sees them: a look tells what no statistics do."""
    sets = {json.dumps(c.data, sort_keys=True): own.data or data_of(c) for c in plan.runs.values()}
    pictures = [data for data in sets.values() if data.pictures]
    for i, data in enumerate(pictures):
        path = folder / ("contact-sheet.png" if len(pictures) == 1 else f"contact-sheet-{i + 1}.png")
        rows = data.train[:_ON_SHEET].movedim(1, -1).numpy()
        with written_whole(path) as temporary:
            temporary.write_bytes(picture_sheet(rows[..., 0] if rows.shape[-1] == 1 else rows))
        say(f"  {data.name}, the first {len(rows)} pictures: {path}")


@contextmanager
def _claimed(folder: Path, record: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """The folder, made, locked and found free for this very recipe and data; call to take it for good."""
    with locked(folder, "study"):
        if (folder / _RECORD).exists():
            _refuse_another(folder, record)
        else:
            refuse_foreign(folder, "study")
        yield lambda: write_text(folder / _RECORD, json.dumps(record, indent=1) + "\n")


def _refuse_another(folder: Path, record: dict[str, Any]) -> None:
    try:
        before = json.loads((folder / _RECORD).read_text())
        if not isinstance(before, dict) or not isinstance(before.get("recipe"), dict):
            raise ValueError("it is not the record of a study")
    except (OSError, ValueError) as e:
        raise Conflict(f"{folder / _RECORD} cannot be read ({e}); choose another --out.") from e
    now = json.loads(json.dumps(record))
    if all(before.get(key) == now[key] for key in ("recipe", "data")):  # what is told beside them may have changed
        return
    changes = list(differences(before.get("recipe"), now["recipe"]))
    if not changes:
        changed = [key for key in now["data"] if before.get("data", {}).get(key) != now["data"][key]]
        for code in ("extractor", *(key for key in changed if key.startswith("target "))):
            if code in changed:
                raise DataError(f"the {code} has changed since the study in {folder} began; choose another --out.")
        networks = {json.dumps(run["network"], sort_keys=True) for run in now["recipe"]["runs"].values()}
        what = "network has" if any(key in networks for key in changed) else "data have"
        raise DataError(f"the {what} changed since the study in {folder} began; choose another --out.")
    raise Conflict(
        f"{folder} holds another study: {'; '.join(changes[:4])}. Nothing was touched. Choose another folder "
        "with --out, or run the recipe that is there."
    )


def _finished(folder: Path, plan: Recipe) -> dict[str, dict[str, Any]]:
    """The rows of runs that are done. A file that cannot be read counts as not done."""
    rows = {}
    for run in plan.runs:
        try:
            row = json.loads((folder / run / RESULT).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(row, dict) and row.get("run") == run and row.get("status") in ("finished", "diverged"):
            rows[run] = row
    return rows


def _do(
    plan: Recipe,
    folder: Path,
    pool: Pool,
    own: Inputs,
    digests: dict[str, str],
    seconds: dict[str, float],
    say: Callable[[str], None],
) -> tuple[dict[str, dict[str, Any]], bool]:
    """Do what is left of a study: the rows of all runs done, and whether it was stopped before the end."""
    rows = _finished(folder, plan)
    if rows:
        say(f"continuing in {folder}: {len(rows)} of {len(plan.runs)} runs are done already")
    # The longest first, so that none is left to run alone at the end.
    left = {run: plan.runs[run] for run in sorted(plan.runs, key=lambda run: -seconds[run]) if run not in rows}
    watch = Console({run: seconds[run] for run in left}, {run: c.train.steps for run, c in left.items()}, say)
    with gentle_interrupt() as interrupted, watch:
        if left and own.in_process:
            run_here(left, folder, pool.on, watch, interrupted.is_set, data=own.data, factory=own.factory)
        elif left:
            found = {run: digests[json.dumps(config.data, sort_keys=True)] for run, config in left.items()}
            run_in_workers(left, folder, pool, watch, interrupted.is_set, found)
    rows |= watch.rows
    if interrupted.is_set():
        return rows, True
    for run, message in watch.failures.items():
        row = blank_row(run, plan.runs[run], own.data or data_of(plan.runs[run]))
        rows[run] = {**row, "status": "failed", "reason": message}
    return rows, False


def _conclude(folder: Path, plan: Recipe, rows: dict[str, dict[str, Any]]) -> Study:
    from ..report import write_report  # not needed by the workers, which import this package

    order = ranked(list(rows.values()), plan)
    write_text(folder / "leaderboard.json", json.dumps(order, indent=2) + "\n")
    summed = summary(order, rank_metric(order[0], plan))
    write_text(folder / "summary.json", json.dumps(summed, indent=2) + "\n")
    report = write_report(
        folder,
        title=plan.name,
        description=plan.description,
        rows=order,
        rank_by=rank_metric(order[0], plan),
        notes=_notes(plan),
        published=told_of(plan),
    )
    failed = {row["run"]: row["reason"] for row in order if row["status"] == "failed"}
    return Study(folder, report, order, plan, failed)


def _notes(plan: Recipe) -> list[str]:
    """What a reader of the page must know to judge it."""
    configs = list(plan.runs.values())
    first = configs[0]
    seeds = {c.seed for c in configs}
    notes = [
        "Runs are paired: with the same seed they start from the same weights and see the same data, noise and "
        "noise levels, step by step.",
        f"{first.train.steps} steps of {first.train.batch} samples; the averaged weights (EMA {first.train.ema:g}) are "
        f"scored on samples by {first.sample.method().name} in {first.sample.steps} steps, all from the same noise.",
    ]
    if len(seeds) == 1:
        notes.append("One seed: small differences may be chance. A list of seeds (seed: [0, 1, 2]) tells them apart.")
    else:
        notes.append(
            f"{len(seeds)} seeds: what is said of a target is of its mean over them, and targets are compared seed by "
            "seed."
        )
    restricted = {c.target["name"]: c.t_range for c in configs if tuple(c.t_range) != (0.0, 1.0)}
    for name, (low, high) in restricted.items():
        notes.append(f"{name} is trained and sampled on t in [{low:g}, {high:g}], where it is regular.")
    errors = [c for c in configs if c.target["name"] != "gaussian"]
    if spaces := {words_of(c.loss_space or c.weighting or "its own target's") for c in errors}:
        notes.append(f"Loss measured in {', '.join(sorted(spaces))} space.")
    notes += _of_how_they_learn(configs)
    if len({c.train.lr for c in configs}) > 1:
        notes.append(
            "Several learning rates were tried; each target is shown at its best one, by the ranking metric"
            f"{'’s mean over seeds' if len(seeds) > 1 else ''}."
        )
    return notes


def _of_how_they_learn(configs: Sequence[RunConfig]) -> list[str]:
    """What is said of likelihoods, of exact means and of guides, where there are any."""
    notes, sampling = [], configs[0].sample
    if any(c.target["name"] == "gaussian" for c in configs):
        notes.append("gaussian predicts a mean and how sure it is of it; its loss is the likelihood of the data.")
    if any(c.supervision == "exact" for c in configs):
        notes.append(
            "With supervision exact a network learns from the exact mean of x0 given x_t instead of from samples, "
            "which takes data of known density."
        )
    if sampling.start == "data":
        notes.append("Samples start from fresh data with the noise of the first time: exactly what belongs there.")
    if guide := sampling.autoguidance:
        notes.append(
            f"Each model is also guided, with weight {guide.weight:g}, by its own averaged weights after {guide.step} "
            "steps (autoguidance)."
        )
    return notes


def _again(
    recipe: Any,
    settings: Sequence[str],
    tiny: bool,
    targets: Sequence[str | dict[str, Any]],
    folder: Path,
    on: str,
    per_run: Mapping[str, float] | None,
) -> str:
    if not isinstance(recipe, str | Path):
        return f"call study again with the same arguments and out={str(folder)!r}"
    words = ["reparam", "study", str(recipe), "--out", str(folder), *(["--tiny"] if tiny else [])]
    for target in targets:
        # YAML reads JSON.
        words += ["--target", target if isinstance(target, str) else json.dumps(target)]
    for setting in settings:
        words += ["--set", setting]
    words += [] if on == "local" else ["--on", on]
    words += ["--per-run", json.dumps(dict(per_run))] if per_run else []
    return shlex.join(words)


def open_study(out: str | Path) -> Study:
    """The study in a folder, its page written anew.

    Raises:
        OutputError: if the folder holds no finished study.
    """
    folder = Path(out)
    try:
        record = json.loads((folder / _RECORD).read_text())
        rows = json.loads((folder / "leaderboard.json").read_text())
        if not rows or any(row["run"] not in record["recipe"]["runs"] for row in rows):
            raise ValueError("they do not belong together")
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise OutputError(f"{folder} holds no finished study ({_RECORD} and leaderboard.json): {e}.") from e
    recipe = record["recipe"]
    runs = {run: from_dict(config) for run, config in recipe["runs"].items()}
    description = next(iter(runs.values())).description
    plan = told_to(Recipe(recipe["name"], description, runs, recipe["rank_by"]), record.get("told") or {})
    return _conclude(folder, plan, {row["run"]: row for row in rows})
