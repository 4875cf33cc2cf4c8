"""Studies: the same network, data, budget and noise under different targets."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..data import Data
from ..errors import Conflict, DataError, NetworkError, OutputError
from ..files import write_text, written_whole
from ..metrics import Reference
from ..networks import NETWORKS, is_factory
from ..report.plots import picture_sheet
from ..samplers.thresholding import refuse_cut
from .console import Console
from .estimate import describe, probe
from .leaderboard import as_text, rank_metric, ranked
from .pool import Resources, gentle_interrupt, resources, run_here, run_in_workers
from .recipe import Recipe, RunConfig, data_named, from_dict, load_recipe, read_recipe
from .run import RESULT, blank_row, data_of, forget_data, make_network, scored

__all__ = ["Interrupted", "Recipe", "RunConfig", "Study", "load_recipe", "open_study", "study"]

_RECORD = "study.json"
#: Pictures on a contact sheet.
_ON_SHEET = 64


class Interrupted(KeyboardInterrupt):
    """A study was stopped before its end. Its state is kept; the message says how to go on."""


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
    jobs: int | None = None,
    device: str | None = None,
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
        jobs: runs at a time; by default one a core, or one a GPU. Functions, modules and
            arrays of the caller's stay in this process, one run after another.
        device: "cpu", "cuda", "mps"; the best there is by default.
        estimate_only: say what it would cost, and do nothing.
        say: where lines for the reader go.

    Returns:
        The finished study, or None with ``estimate_only``.

    Raises:
        ReparamError: for whatever is wrong with recipe, data, network or folder, before it starts.
        Interrupted: if it was stopped; the state is kept.
    """
    forget_data()
    own = _Own.of(data, network)
    raw = own.into(read_recipe(recipe))
    settings = [settings] if isinstance(settings, str) else list(settings)
    plan = load_recipe(raw, settings, extra_networks=own.networks, extra_data=own.data_names)
    folder = Path("runs") / _folder_name(plan.name) if out is None else Path(out)
    on = resources(len(plan.runs), 1 if own.in_process else jobs, device)
    say(f"study {plan.name}: {len(plan.runs)} runs")
    digests = _preflight(plan, own, say)
    if estimate_only:
        say(f"it would take {describe(probe(plan.runs, on, data=own.data, factory=own.factory), on)}")
        return None
    with _claimed(folder, {"recipe": plan.to_dict(), "data": digests}) as claim:
        costs = probe(plan.runs, on, data=own.data, factory=own.factory)
        say(f"the whole takes {describe(costs, on)}")
        claim()  # only now that every run is known to work: a mistake found above leaves the folder free
        _contact_sheets(plan, own, folder, say)
        rows, stopped = _do(plan, folder, on, own, digests, {run: cost.seconds for run, cost in costs.items()}, say)
        if stopped:
            again = _again(None if data is not None or network is not None else recipe, settings, folder)
            raise Interrupted(
                f"stopped with {len(rows)} of {len(plan.runs)} runs done; everything is kept in {folder}. "
                f"To continue: {again}"
            )
        return _conclude(folder, plan, rows)


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.+=-]+", "_", name).strip("._") or "study"


@dataclass(frozen=True)
class _Own:
    """What the caller brings: names for the recipe, and objects that stay in this process."""

    data: Data | None = None
    data_config: dict[str, Any] | None = None
    factory: Callable[..., nn.Module] | None = None
    network_name: str | None = None

    @classmethod
    def of(cls, data: Any, network: Any) -> _Own:
        config = data_named(str(data)) if isinstance(data, str | Path) else None
        held = None if data is None or config else _data_from(data)
        if network is None or isinstance(network, str):
            return cls(held, config, None, network)
        if isinstance(network, nn.Module):
            return cls(held, config, lambda **_: copy.deepcopy(network), type(network).__name__)
        if not callable(network):
            raise NetworkError(f"network must be a name, a module or a function, found {type(network).__name__}.")
        return cls(held, config, network, getattr(network, "__name__", "network"))

    @property
    def in_process(self) -> bool:
        return self.data is not None or self.factory is not None

    @property
    def networks(self) -> tuple[str, ...]:
        return (self.network_name,) if self.factory and self.network_name else ()

    @property
    def data_names(self) -> tuple[str, ...]:
        return ("given",) if self.data is not None else ()

    def into(self, raw: dict[str, Any]) -> dict[str, Any]:
        """The recipe with the caller's names in the place of its own."""
        if self.data is not None:
            raw["data"] = {"name": "given"}
        elif self.data_config is not None:
            before = raw.get("data")
            if isinstance(before, dict) and before.get("name") == self.data_config["name"]:
                raw["data"] = {**before, **self.data_config}  # how to read them stays
            else:
                raw["data"] = self.data_config
        if self.network_name is not None:
            raw["network"] = {"name": self.network_name}
        return raw


def _data_from(array: Any) -> Data:
    from ..data import from_array

    if not isinstance(array, np.ndarray | Tensor):
        raise DataError(f"data must be a path or an array, found {type(array).__name__}.")
    return from_array(array)


def _preflight(plan: Recipe, own: _Own, say: Callable[[str], None]) -> dict[str, str]:
    """Load each data set, say what it is, announce code of the user's; digests by data."""
    digests: dict[str, str] = {}
    for config in plan.runs.values():
        mine = own.data or data_of(config)
        key = json.dumps(config.data, sort_keys=True)
        if key not in digests:
            digests[key] = mine.digest
            say(f"  {mine.preflight()}")
            if (n := scored(config, mine)) < config.sample.n:
                say(f"  {n} samples are scored, as many as pictures or vectors are held out, not {config.sample.n}")
            if not mine.pictures and (not 0.05 < mine.flat(mine.train).std() < 20 or abs(mine.train.mean()) > 3):
                say("  warning: these data are far from unit scale, where the noise is; consider data.normalise: scale")
        if config.sample.threshold != "none":
            record = mine.record()
            refuse_cut(record["min"], record["max"])
    for what in ("network", "extractor"):
        parts = [part for c in plan.runs.values() if (part := getattr(c, what))]
        for name in sorted({str(part["name"]) for part in parts if is_factory(part["name"])}):
            say(f"  running your code: {what} {name}")
        if config.extractor and is_factory(config.extractor["name"]) and mine.pictures:
            digests["extractor"] = Reference(mine, config.extractor).extractor.digest
    for config in plan.runs.values():
        key = json.dumps(config.network, sort_keys=True)
        if key not in digests and config.network["name"] not in NETWORKS:
            digests[key] = _fingerprint(make_network(config, own.data or data_of(config), own.factory))
    return digests


def _contact_sheets(plan: Recipe, own: _Own, folder: Path, say: Callable[[str], None]) -> None:
    """For pictures, a sheet of them as training sees them: a look tells what no statistics do."""
    sets = {json.dumps(c.data, sort_keys=True): own.data or data_of(c) for c in plan.runs.values()}
    pictures = [data for data in sets.values() if data.pictures]
    for i, data in enumerate(pictures):
        path = folder / ("contact-sheet.png" if len(pictures) == 1 else f"contact-sheet-{i + 1}.png")
        rows = data.train[:_ON_SHEET].movedim(1, -1).numpy()
        with written_whole(path) as temporary:
            temporary.write_bytes(picture_sheet(rows[..., 0] if rows.shape[-1] == 1 else rows))
        say(f"  {data.name}, the first {len(rows)} pictures: {path}")


def _fingerprint(net: nn.Module) -> str:
    """A hash of a network of the user's: its printed form and its initial weights."""
    found = hashlib.sha256(repr(net).encode())
    for name, value in net.state_dict().items():
        found.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


@contextmanager
def _claimed(folder: Path, record: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """The folder, made, locked and found free for this very recipe and data; call to take it for good."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as e:
        raise OutputError(f"cannot write to {folder}: {e.strerror}. Choose another folder with --out.") from e
    with lock:
        _lock(lock, folder)
        os.set_inheritable(lock.fileno(), True)
        if (folder / _RECORD).exists():
            _refuse_another(folder, record)
        elif others := sorted(p.name for p in folder.iterdir() if p.name != ".lock"):
            raise Conflict(
                f"{folder} is not empty (found {', '.join(others[:3])}) and holds no study; nothing was touched. "
                "Choose a new folder with --out."
            )
        yield lambda: write_text(folder / _RECORD, json.dumps(record, indent=1) + "\n")


def _lock(lock: Any, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no advisory locks on this system
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        raise Conflict(f"another study is running in {folder}; wait for it, or choose another --out.") from e


def _refuse_another(folder: Path, record: dict[str, Any]) -> None:
    try:
        before = json.loads((folder / _RECORD).read_text())
        if not isinstance(before, dict) or not isinstance(before.get("recipe"), dict):
            raise ValueError("it is not the record of a study")
    except (OSError, ValueError) as e:
        raise Conflict(f"{folder / _RECORD} cannot be read ({e}); choose another --out.") from e
    now = json.loads(json.dumps(record))
    if before == now:
        return
    differences = list(_differences(before.get("recipe"), now["recipe"]))
    if not differences:
        changed = [key for key in now["data"] if before.get("data", {}).get(key) != now["data"][key]]
        if "extractor" in changed:
            raise DataError(f"the extractor has changed since the study in {folder} began; choose another --out.")
        networks = {json.dumps(run["network"], sort_keys=True) for run in now["recipe"]["runs"].values()}
        what = "network has" if any(key in networks for key in changed) else "data have"
        raise DataError(f"the {what} changed since the study in {folder} began; choose another --out.")
    raise Conflict(
        f"{folder} holds another study: {'; '.join(differences[:4])}. Nothing was touched. Choose another folder "
        "with --out, or run the recipe that is there."
    )


def _differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path.removeprefix('runs.')} was {_brief(before)} there, is {_brief(now)} now"


def _brief(value: Any) -> str:
    return "absent" if value is None else "present" if isinstance(value, dict) else repr(value)


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
    on: Resources,
    own: _Own,
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
            run_here(left, folder, on, watch, interrupted.is_set, data=own.data, factory=own.factory)
        elif left:
            found = {run: digests[json.dumps(config.data, sort_keys=True)] for run, config in left.items()}
            run_in_workers(left, folder, on, watch, interrupted.is_set, found)
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
    report = write_report(
        folder,
        title=plan.name,
        description=plan.description,
        rows=order,
        rank_by=rank_metric(order[0], plan),
        notes=_notes(plan),
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
        notes.append("One seed: small differences may be chance.")
    restricted = {c.target["name"]: c.t_range for c in configs if tuple(c.t_range) != (0.0, 1.0)}
    for name, (low, high) in restricted.items():
        notes.append(f"{name} is trained and sampled on t in [{low:g}, {high:g}], where it is regular.")
    spaces = {str(c.loss_space or c.weighting or "its own target's") for c in configs}
    notes.append(f"Loss measured in {', '.join(sorted(spaces))} space.")
    if len({c.train.lr for c in configs}) > 1:
        notes.append("Several learning rates were tried; each target is shown at its best one, by the ranking metric.")
    return notes


def _again(recipe: Any, settings: Sequence[str], folder: Path) -> str:
    if not isinstance(recipe, str | Path):
        return f"call study again with the same arguments and out={str(folder)!r}"
    words = ["reparam", "study", str(recipe), "--out", str(folder)]
    for setting in settings:
        words += ["--set", setting]
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
    plan = Recipe(recipe["name"], description, runs, recipe["rank_by"])
    return _conclude(folder, plan, {row["run"]: row for row in rows})
