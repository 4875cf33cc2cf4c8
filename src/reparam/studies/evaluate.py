"""Scores of any samples against any real data, each with its card."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..confidence import Gaussian, prediction
from ..data import DATA, Data, from_array, load_data
from ..errors import Conflict, DataError, OutputError, ReparamError, unknown
from ..files import write_text
from ..metrics import METRICS, Calibration, Reference, Scoring, given_reference, save_reference
from ..metrics.card import card
from ..metrics.reference import WrongFile
from ..metrics.statistics import processes
from ..metrics.table import floors, keeps, scored
from ..spec import Spec
from .given import drawn_as, holds_floats, refuse_dark, run_in, samples_to_score
from .leaderboard import number
from .pool import resources
from .recipe import RunConfig, data_named
from .run import data_of, fitting_metrics, forget_data, made_by_run, noise_levels
from .sampling import opened

#: Metrics that are left out with a word where samples do not suffice, unless they were asked for.
_OPTIONAL = ("frechet_infinity", "kernel_distance", "mmd", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Evaluation:
    """What was found of samples.

    Attributes:
        card: the scores and all that decided them, as plain data.
        left_out: metrics that could not be computed of so few samples, and why.
    """

    card: dict[str, Any]
    left_out: dict[str, str]

    def text(self) -> str:
        """For a reader."""
        lines = [["metric", "value", "95 % interval", "floor"]]
        for name, entry in self.card["metrics"].items():
            interval = entry["interval"]
            span = "–" if interval is None else f"{number(interval[0])} … {number(interval[1])}"
            better = " (higher is better)" if entry["better"] == "higher" else ""
            lines.append([name + better, number(entry["value"]), span, number(entry["floor"])])
        samples, reference, extractor = self.card["samples"], self.card["reference"], self.card["extractor"]
        by = f", by {extractor['name']}" if extractor else ""
        said = [f"{samples['n']:,} samples against {reference['n']:,} of {reference['name']}{by}", "", _table(lines)]
        said += _calibration_told(self.card["calibration"]) if "calibration" in self.card else []
        said += [f"left out: {name}: {why}" for name, why in self.left_out.items()]
        return "\n".join([*said, *(f"warning: {warning}" for warning in self.card["warnings"])])


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def _calibration_told(found: Mapping[str, Any]) -> list[str]:
    """How honest the variance is, as a table for a reader."""
    total = found["total"]
    shares = list(total["coverage"])
    names = {"nll": "nll", "exact_nll": "exact nll", "var": "variance", "mse": "squared error"}
    names = {name: words for name, words in names.items() if total[name] is not None}
    lines = [["noise level", "z²", *(f"within {100 * float(p):g} %" for p in shares), *names.values()]]
    levels = [f"t {low:.2f} … {high:.2f}" for low, high in itertools.pairwise(found["edges_t"])]
    for level, one in zip([*levels, "all"], [*found["bins"], total], strict=True):
        z2 = f"{number(one['z2']['value'])} ± {number(one['z2']['error'])}"
        covered = [f"{100 * one['coverage'][p]['value']:.1f} %" for p in shares]
        lines.append([level, z2, *covered, *(number(one[name]["value"]) for name in names)])
    error, chance = number(total["calibration_error"]), number(total["calibration_floor"])
    words = (
        "calibration of the stated variance, on held-out data (z² is 1 where it is honest, above where it is too "
        f"small): error {error}, by chance {chance}"
    )
    return ["", words, "", _table(lines)]


def evaluate(
    samples: str | Path | np.ndarray | Tensor,
    reference: str | Path | Mapping[str, Any] | np.ndarray | Tensor | Data | None = None,
    metrics: Sequence[str] | None = None,
    *,
    extractor: str | dict[str, Any] | None = None,
    labels: np.ndarray | Tensor | None = None,
    value_range: tuple[float, float] | None = None,
    count: int | None = None,
    cache: str | Path | None = None,
    device: str | None = None,
    out: str | Path | None = None,
    keep_reference: str | Path | None = None,
    spec: Spec | Mapping[str, Any] | str | Path | None = None,
) -> Evaluation:
    """Score samples against real data.

    Started by ``torchrun`` on several processes, each extracts the features of its part.

    Args:
        samples: the folder of a run; a folder, .zip, .tar or .parquet file of pictures; a .npz or .npy file; or an
            array [N, …]. Pictures are bytes, [N, C, H, W] in memory; other numbers are in the units of the data.
        reference: real data, as a recipe's ``data``: a path, a name or a mapping; all of them are compared with, unless
            ``holdout`` is among the mapping. Or an array, or a .safetensors file that ``keep_reference`` wrote. Of a
            run, its own data by default, as in its study.
        metrics: names from :data:`reparam.metrics.METRICS`; all that apply by default.
        extractor: of pictures; efficientnet_lite0, or the run's own, by default.
        labels: the class that each sample was asked to be, int64 [N], for samples in an array.
        value_range: what black and white are in an array of float pictures, such as (-1, 1) or (0, 1).
        count: at most so many reference data; all by default, for a run as many as in its study.
        cache: a folder in which statistics of references are kept.
        device: "cpu", "cuda" or "mps"; the best there is by default.
        out: a .json file that the card is written to.
        keep_reference: a .safetensors file that the reference's statistics are written to.
        spec: what a run's weights say wrongly of themselves, as in :func:`reparam.load`: under it the model's
            variance is judged anew. Its samples are there already, and stay what they are.

    Returns:
        The card, and what was left out.

    Raises:
        DataError: if samples or reference cannot be read, do not fit each other, or hold NaN.
        UnknownName: if there is no such metric or extractor.
        Conflict: if a metric does not apply.
    """
    forget_data()
    _refuse_places(out, keep_reference)
    run = run_in(samples)
    if spec is not None:
        _refuse_needless_spec(samples, run, spec)
    with _together(), _bar() as ask:
        folder = None if cache is None else Path(cache)
        real = _reference(reference, run, extractor, count, folder, _device(device), ask)
        found, rule = samples_to_score(samples, real.data, value_range, labels)
        names = _chosen(metrics, real, found.labels is not None)
        if keep_reference is not None:
            _keep(real, Path(keep_reference))
        scoring = Scoring(found, real, keep=keeps(names), ask=ask)
        entries, left_out = _beside_floors(scoring, names, asked=metrics is not None)
        found_of_variance = _calibration(run, _device(device), left_out, spec) if run else None
        whole = _card(scoring, entries, samples, run, rule, found_of_variance)
        if left_out:
            whole["left_out"] = left_out
        if out is not None and processes()[0] == 0:
            write_text(out, json.dumps(whole, indent=2) + "\n")
    return Evaluation(whole, left_out)


def _beside_floors(
    scoring: Scoring, names: Sequence[str], asked: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The scores, each with what fresh real data get; and why others are left out."""
    real = scoring.real
    if scoring.keep:  # before anything asks for the moments alone: one pass over the reference does for both
        real.statistics(real.extractor, keep=True)
    entries, left_out = _scores(scoring, names, asked=asked)
    least = _floors(real, list(entries), scoring.samples.count)
    for name, entry in entries.items():
        entry["floor"] = least[name]
    return entries, left_out


def _card(
    scoring: Scoring,
    entries: dict[str, dict[str, Any]],
    samples: Any,
    run: tuple[RunConfig, Path] | None,
    rule: str | None,
    calibration: dict[str, Any] | None,
) -> dict[str, Any]:
    """The scores with all that is known of how they came about."""
    found, real = scoring.samples, scoring.real
    made: dict[str, Any] = made_by_run(run[0], run[1]) if run else drawn_as(samples)
    levels = _noise_levels(run[1]) if run else None
    remarks = [f"{side.name}: {remark}" for side in (found, real.data) for remark in side.remarks]
    whole = card(
        scoring,
        entries,
        source=_told(samples),
        to_uint8=rule,
        model=made.get("model"),
        sampling=made.get("sampling"),
        noise_levels=levels,
        calibration=calibration,
        warnings=remarks,
    )
    whole["floor"] = real.fresh_counts(found.count)
    whole["warnings"] += _of_floor(whole["floor"], found.count)
    return whole


def _of_floor(counts: dict[str, int] | None, n: int) -> list[str]:
    """What a reader must know of the floor."""
    if counts is None:
        return ["there are no fresh real data, and so no floor: give the reference a holdout"]
    if counts["n"] < n:
        told = f"{counts['n']:,} fresh real data against {counts['reference']:,}, not of {n:,}"
        return [
            f"the floor is of {told}: a distance is biased more at fewer, so samples may seem better than real data"
        ]
    return []


def _refuse_places(out: str | Path | None, keep_reference: str | Path | None) -> None:
    """Places that could not be written to, before hours are spent."""
    for option, path, suffix in (("--out", out, ".json"), ("--keep-reference", keep_reference, ".safetensors")):
        if path is None:
            continue
        if Path(path).suffix != suffix:
            raise ReparamError(f"{option} {path}: expected a file that ends in {suffix}.")
        if not Path(path).absolute().parent.is_dir():
            raise OutputError(f"{option} {path}: there is no folder {Path(path).parent}; make it first.")


def _device(asked: str | None) -> str:
    """Where this process computes features: of several on a machine, each has an accelerator, as far as there are."""
    if processes()[1] == 1:
        return resources(1, 1, asked).devices[0]
    here, local = (int(os.environ.get(name, "0")) for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"))
    return resources(max(1, here), max(1, here), asked).devices[local]


def _told(samples: Any) -> str:
    return str(samples) if isinstance(samples, str | Path) else f"array of shape {list(samples.shape)}"


def _noise_levels(folder: Path) -> dict[str, Any] | None:
    """The x0 error by noise level that a run's training ended with."""
    with contextlib.suppress(KeyError):
        return noise_levels(_row(folder))
    return None


def _row(folder: Path) -> dict[str, Any]:
    """A run's row of the leaderboard; {} where there is none yet."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _refuse_needless_spec(
    samples: Any, run: tuple[RunConfig, Path] | None, spec: Spec | Mapping[str, Any] | str | Path
) -> None:
    """A spec where no model is asked for anything."""
    if run is None:
        raise Conflict(f"--spec is of a model, and {_told(samples)} are samples; give it to reparam sample.")
    likelihood = opened(run[1] / "model.safetensors", run[0], spec).conventions.likelihood
    if likelihood is None or likelihood.of != "x0":
        raise Conflict(
            f"--spec would change nothing: the samples of {run[1]} are there already, and under this spec its model "
            "states no variance of x0 to be judged. Draw others (reparam sample --spec) and evaluate those."
        )


def _calibration(
    run: tuple[RunConfig, Path],
    device: str,
    left_out: dict[str, str],
    spec: Spec | Mapping[str, Any] | str | Path | None,
) -> dict[str, Any] | None:
    """How honest the variance of a run's model is: as its study found, else measured now; None if it has no likelihood.

    Where its likelihood is of something else than x0, that is what the measurement says.
    """
    config, folder = run
    known = _row(folder).get("calibration")
    if spec is None and (known is not None or not isinstance(prediction(config.target), Gaussian)):
        return known
    try:
        denoiser = opened(folder / "model.safetensors", config, spec).to(device)
        said = "t_range" in (denoiser.overrides or {})
        low, high = denoiser.t_range if said else (config.validate_on or config.t_range)
        found = Calibration.on(denoiser, data_of(config), (low, high), conditional=config.conditional).to_dict()
        return found if denoiser.overrides is None else {**found, "overrides": denoiser.overrides}
    except ReparamError as e:
        left_out["calibration"] = str(e)
        return None


@contextlib.contextmanager
def _together() -> Any:
    """Several processes, where torchrun started them, as one group; features are on the CPU, so by gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _bar() -> Any:
    """What is told how many samples have been through an extractor, and shows it."""
    with tqdm(unit=" samples", file=sys.stderr, disable=not sys.stderr.isatty() or processes()[0] > 0) as bar:

        def ask(done: int) -> None:
            bar.update(done - bar.n if done >= bar.n else done)

        yield ask


def _reference(
    asked: Any,
    run: tuple[RunConfig, Path] | None,
    extractor: str | dict[str, Any] | None,
    count: int | None,
    cache: Path | None,
    device: str,
    ask: Callable[[int], None],
) -> Reference:
    if count is not None and count < 2:
        raise ReparamError(f"--count must be at least 2, found {count}.")
    features = extractor or (run[0].extractor if run else None)
    if asked is None:
        if run is None:
            raise DataError("these samples are no run, so the real data must be said: --reference DATA.")
        data = data_of(run[0])
        _refuse_needless(data, extractor, count)
        count = count or (run[0].sample.reference if data.pictures else None)
        return Reference(data, features, count, cache, device, ask)
    if isinstance(asked, str | Path) and str(asked).endswith(".safetensors"):
        if count is not None:
            raise Conflict(f"--count and {asked}: statistics that were kept are of a number already.")
        return given_reference(Path(asked).expanduser(), features, device)
    data = _real(asked)
    if data.curve is None and data.count < 2:
        raise DataError(f"{data.name} has {data.count} samples; a reference needs at least 2.")
    _refuse_needless(data, extractor, count)
    found = Reference(_cut(data, count), features, None, cache, device, ask)
    if data.pictures:
        refuse_dark(found.samples())
    return found


def _refuse_needless(data: Data, extractor: str | dict[str, Any] | None, count: int | None) -> None:
    """What was asked for and would change nothing."""
    if extractor is not None and not data.pictures:
        raise Conflict(f"--extractor is for pictures, and {data.name} holds vectors.")
    if count is not None and data.curve is not None:
        raise Conflict(f"--count and {data.name}: as many as there are samples are drawn anew.")


def _cut(data: Data, count: int | None) -> Data:
    """So many of the data, spread over them."""
    if count is None or count >= data.count:
        return data
    if data.stream is not None:
        raise Conflict("--count and a reference that is streamed: say data.limit in its mapping instead.")
    from ..metrics.sets import spread

    index = spread(len(data.train), count)
    return replace(data, train=data.train[index], labels=None if data.labels is None else data.labels[index])


def _real(asked: Any) -> Data:
    """The real data that were asked for, all of them unless a share is to be held out."""
    if isinstance(asked, Data):
        return asked
    if isinstance(asked, np.ndarray | Tensor):
        return from_array(asked, holdout=0.0)
    config = dict(asked) if isinstance(asked, Mapping) else _named(str(asked))
    if config.get("name") in ("images", "array", "digits", "latents"):
        config.setdefault("holdout", 0.0)
    return load_data(config)


def _named(name: str) -> dict[str, Any]:
    """The long form of data given by a name or a path; an array of bytes is one of pictures."""
    path = Path(name).expanduser()
    if path.suffix in (".npy", ".npz") and path.is_file() and not holds_floats(path):
        return {"name": "images", "path": name}
    found = data_named(name)
    if found == {"name": name} and name not in DATA:
        raise DataError(f"--reference {name}: no file or folder, and no data of that name: {', '.join(DATA)}.")
    return found


def _keep(real: Reference, path: Path) -> None:
    if not real.data.pictures:
        raise Conflict("--keep-reference keeps statistics of pictures; vectors are compared with the data themselves.")
    save_reference(real, path)


def _chosen(asked: str | Sequence[str] | None, real: Reference, labelled: bool) -> list[str]:
    asked = [name.strip() for name in ([asked] if isinstance(asked, str) else asked or [])]
    fitting = fitting_metrics(real.data, labelled and bool(real.data.classes))
    if real.given is not None:
        fitting = [name for name in fitting if name not in ("pixel_frechet_distance", "nearest_neighbour")]
    for name in asked:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
        if name not in fitting:
            raise Conflict(f"metric {name} does not apply to these samples and {real.data.name}: {', '.join(fitting)}.")
    once = real.data.pictures and real.extractor.name == real.pixels.name
    return list(dict.fromkeys(asked)) or [name for name in fitting if not (once and name == "pixel_frechet_distance")]


def _scores(scoring: Scoring, names: Sequence[str], asked: bool) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    entries: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name in names:
        if name == "frechet_infinity" and not asked and (why := _too_few(scoring)):
            left_out[name] = why
            continue
        try:
            entries |= scored(scoring, [name])
        except ReparamError as e:
            if asked or name not in _OPTIONAL:
                raise
            left_out[name] = str(e)
    return entries, left_out


def _floors(real: Reference, names: list[str], n: int) -> dict[str, float | None]:
    """Floors; where there are too few fresh data for some metric, none for those for which there are too few."""
    try:
        return floors(real, names, n)
    except WrongFile:
        raise
    except ReparamError:
        found: dict[str, float | None] = {}
        for name in names:
            try:
                found |= floors(real, [name], n)
            except ReparamError:
                if name not in _OPTIONAL:
                    raise
                found[name] = None
        return found


def _too_few(scoring: Scoring) -> str | None:
    """Why the distance is not extrapolated: it is no line in 1/n yet."""
    n, dim = scoring.samples.count, scoring.of(scoring.real.extractor).moments.dim
    return None if n >= 5 * dim else f"{n:,} samples; with {dim:,} features it takes {5 * dim:,} to be worth anything"
