"""Scores of any samples against any real data, each with its card."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data import DATA, Data, from_array, load_data
from ..data.base import as_bytes
from ..errors import Conflict, DataError, OutputError, ReparamError, unknown
from ..files import write_text
from ..metrics import METRICS, Reference, SampleSet, Scoring, given_reference, save_reference
from ..metrics.card import card
from ..metrics.reference import WrongFile
from ..metrics.statistics import processes
from ..metrics.table import floors, keeps, scored
from .leaderboard import number
from .pool import resources
from .recipe import RunConfig, data_named, from_dict, parse_yaml
from .run import data_of, fitting_metrics, forget_data, made_by_run, to_uint8

#: Metrics that are left out with a word where samples do not suffice, unless they were asked for.
_OPTIONAL = ("frechet_infinity", "kernel_distance", "mmd", "precision", "recall", "density", "coverage")
_BYTES = "bytes as they are"


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
        head = ["metric", "value", "95 % interval", "floor"]
        lines = [head]
        for name, entry in self.card["metrics"].items():
            interval = entry["interval"]
            span = "–" if interval is None else f"{number(interval[0])} … {number(interval[1])}"
            better = " (higher is better)" if entry["better"] == "higher" else ""
            lines.append([name + better, number(entry["value"]), span, number(entry["floor"])])
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        table = "\n".join(
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        )
        samples, reference, extractor = self.card["samples"], self.card["reference"], self.card["extractor"]
        by = f", by {extractor['name']}" if extractor else ""
        said = [f"{samples['n']:,} samples against {reference['n']:,} of {reference['name']}{by}", "", table]
        said += [f"left out: {name}: {why}" for name, why in self.left_out.items()]
        return "\n".join([*said, *(f"warning: {warning}" for warning in self.card["warnings"])])


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

    Returns:
        The card, and what was left out.

    Raises:
        DataError: if samples or reference cannot be read, do not fit each other, or hold NaN.
        UnknownName: if there is no such metric or extractor.
        Conflict: if a metric does not apply.
    """
    forget_data()
    _refuse_places(out, keep_reference)
    run = _run_in(samples)
    with _together(), _bar() as ask:
        folder = None if cache is None else Path(cache)
        real = _reference(reference, run, extractor, count, folder, _device(device), ask)
        found, rule = _samples(samples, real.data, value_range, labels)
        names = _chosen(metrics, real, found.labels is not None)
        if keep_reference is not None:
            _keep(real, Path(keep_reference))
        scoring = Scoring(found, real, keep=keeps(names), ask=ask)
        if scoring.keep:  # before anything asks for the moments alone: one pass over the reference does for both
            real.statistics(real.extractor, keep=True)
        entries, left_out = _scores(scoring, names, asked=metrics is not None)
        least = _floors(real, list(entries), found.count)
        for name, entry in entries.items():
            entry["floor"] = least[name]
        made: dict[str, Any] = made_by_run(run[0], run[1]) if run else {}
        levels = _noise_levels(run[1]) if run else None
        remarks = [f"{side.name}: {remark}" for side in (found, real.data) for remark in side.remarks]
        whole = card(
            scoring, entries, source=_told(samples), to_uint8=rule, noise_levels=levels, warnings=remarks, **made
        )
        if out is not None and processes()[0] == 0:
            write_text(out, json.dumps(whole, indent=2) + "\n")
    return Evaluation(whole, left_out)


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


def _run_in(samples: Any) -> tuple[RunConfig, Path] | None:
    """The recipe of a run and its folder, if that is what samples are."""
    if not isinstance(samples, str | Path):
        return None
    folder = Path(samples).expanduser()
    if not (folder / "recipe.yaml").is_file() or not (folder / "model.safetensors").is_file():
        return None
    if not (folder / "samples.npz").is_file():
        raise DataError(f"{folder} is a run without samples.npz. Draw samples (reparam sample) and evaluate those.")
    return from_dict(parse_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"), str(folder))), folder


def _noise_levels(folder: Path) -> dict[str, Any] | None:
    """The x0 error by noise level that a run's training ended with."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        row = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return {"edges_t": row["noise_bins"], "x0_error": row["x0_error"]} if row["x0_error"] else None
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
        _refuse_dark(found.samples())
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
    if path.suffix in (".npy", ".npz") and path.is_file() and not _floats(path):
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


def _samples(
    samples: Any, data: Data, value_range: tuple[float, float] | None, labels: np.ndarray | Tensor | None
) -> tuple[SampleSet, str | None]:
    """What is scored, and the rule by which it became bytes."""
    if isinstance(samples, str | Path):
        path = Path(samples).expanduser()
        if labels is not None:
            raise Conflict(f"labels are for samples in an array; those of {path} are read with them.")
        run = _run_in(path)
        if run and value_range is not None:
            raise Conflict(
                f"--range is for floats, and {path} is a run, whose samples are stored as they are compared."
            )
        if run:
            return _of_array_file(path / "samples.npz", data, None, to_uint8(data), str(path))
        if path.suffix in (".npz", ".npy") and (not data.pictures or value_range is not None or _floats(path)):
            return _of_array_file(path, data, value_range, None, str(path))
        if not data.pictures:
            raise DataError(f"{path}: the reference holds vectors; expected samples in a .npz or .npy file.")
        if value_range is not None:
            raise Conflict(f"--range is for arrays of floats, and {path} holds pictures.")
        return _pictures(str(samples), data), _BYTES
    held = torch.as_tensor(np.asarray(samples) if not isinstance(samples, Tensor) else samples.detach().cpu())
    return _of_array(held, None if labels is None else _labels(labels, held, data), data, value_range, None, "samples")


def _labels(labels: np.ndarray | Tensor, samples: Tensor, data: Data) -> Tensor:
    y = torch.as_tensor(labels).cpu()
    if y.shape != samples.shape[:1]:
        raise DataError(f"labels have shape {list(y.shape)}, expected one for each of {len(samples)} samples.")
    if y.is_floating_point() or y.dtype == torch.bool:
        raise DataError(f"labels are {str(y.dtype).removeprefix('torch.')}; expected the numbers of classes, int64.")
    if data.classes and len(y) and not 0 <= int(y.min()) <= int(y.max()) < len(data.classes):
        raise DataError(
            f"labels go from {int(y.min())} to {int(y.max())}; the reference {data.name} has classes 0 to "
            f"{len(data.classes) - 1}."
        )
    return y.long()


def _pictures(path: str, data: Data) -> SampleSet:
    """Pictures at a path, with the colour of the reference; their labels where their classes are the reference's."""
    from ..data.images import asked, opened, read
    from ..data.streams import keep_open, stream_of, too_large

    ask = asked(colour="grey" if data.shape[0] == 1 else "rgb")
    with contextlib.ExitStack() as stack:
        source = opened(path, ask, stack)
        if too_large(source, ask):
            stream = stream_of(source, ask)
            keep_open(stream, stack)
            found, classes, remarks = SampleSet.read(stream, path), stream.classes, tuple(source.remarks)
        else:
            pictures = read(source, ask)
            found, classes = SampleSet.held(pictures.pixels, pictures.labels, path), pictures.classes
            remarks = pictures.remarks
    if found.shape == data.shape:
        _refuse_dark(found)
    return replace(found, labels=found.labels if classes == data.classes else None, remarks=remarks)


def _refuse_dark(found: SampleSet) -> None:
    """Bytes that are 0 and 1 only are floats in [0, 1] that were cast."""
    some = found.spread(256).all()
    if some.numel() and int(some.max()) <= 1:
        raise DataError(
            f"{found.name} holds bytes from {int(some.min())} to {int(some.max())}: floats in [0, 1] that were cast, "
            "by the look of it. Expected 0 … 255: save round(255 x)."
        )


def _floats(path: Path) -> bool:
    """Whether an array file holds no bytes that could be pictures."""
    try:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r")
        if isinstance(loaded, np.ndarray):
            return loaded.dtype != np.uint8
        with loaded:
            return not any(loaded[key].dtype == np.uint8 and loaded[key].ndim > 2 for key in loaded.files)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise DataError(f"cannot read {path}: {e}. Expected arrays saved by numpy, not pickled.") from e


def _of_array_file(
    path: Path, data: Data, value_range: tuple[float, float] | None, rule: str | None, name: str
) -> tuple[SampleSet, str | None]:
    x, y = _arrays(path)
    if x.dtype.kind not in "fiub":
        raise DataError(f"{name} holds {x.dtype}; expected real numbers.")
    labels = torch.from_numpy(y).long() if y is not None and y.shape == x.shape[:1] and y.dtype.kind in "iu" else None
    return _of_array(torch.from_numpy(x), labels, data, value_range, rule, name)


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The samples in an array file, and what may be their labels."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded, None
        with loaded:
            keys = list(loaded.files)
            key = "x" if "x" in keys else keys[0] if len(keys) == 1 else None
            key = next((k for k in ("arr_0", "samples") if key is None and k in keys), key)
            if key is not None:
                return loaded[key], loaded["y"] if "y" in keys else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise DataError(f"cannot read {path}: {e}. Expected arrays saved by numpy, not pickled.") from e
    raise DataError(f"{path} holds the arrays {', '.join(keys)}; call the samples x.")


def _of_array(
    x: Tensor,
    y: Tensor | None,
    data: Data,
    value_range: tuple[float, float] | None,
    rule: str | None,
    name: str,
) -> tuple[SampleSet, str | None]:
    if x.ndim < 2:
        raise DataError(f"{name} has shape {list(x.shape)}; expected one sample a row, [N, …].")
    if x.is_floating_point() and not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).flatten(1).any(1).sum())
        raise DataError(f"{name}: {bad} of {len(x)} samples hold NaN or infinity.")
    if 0 in x.shape:
        raise DataError(f"{name} is empty: shape {list(x.shape)}; a score needs samples.")
    if not data.pictures:
        if value_range is not None:
            raise Conflict("--range says what black and white are, and these are no pictures.")
        if x.dtype == torch.uint8 and x.ndim in (3, 4):
            raise DataError(
                f"{name} holds bytes of shape {list(x.shape)}, pictures by the look of it, and the reference "
                f"{data.name} numbers of shape {list(data.shape)}. Give both as bytes, or both as floats in the same "
                "units."
            )
        return SampleSet.held(((x.double() - data.mean) / data.std).float(), y, name), None
    x = _channels_second(x, data.shape, name)
    if x.dtype == torch.uint8:
        if value_range is not None:
            raise Conflict(f"--range is for floats, and {name} holds bytes.")
        found = SampleSet.held(x, y, name)
        if rule is None:  # else they are a run's, whose model may well draw black
            _refuse_dark(found)
        return found, rule or _BYTES
    return SampleSet.held(_to_bytes(x, value_range, name), y, name), _rule(value_range)


def _channels_second(x: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """Pictures [N, C, H, W]; the last axis is that of channels where only this fits the reference."""
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4:
        raise DataError(f"{name} has shape {list(x.shape)}; expected pictures [N, {', '.join(map(str, shape))}].")
    last = tuple(x.shape[i] for i in (3, 1, 2))
    return x.movedim(3, 1) if tuple(x.shape[1:]) != shape and last == shape else x


def _rule(value_range: tuple[float, float] | None) -> str:
    low, high = value_range or (0.0, 0.0)
    return f"round((x {'+' if low < 0 else '-'} {abs(low):g})/{high - low:g}·255), cut off at 0 and 255"


def _to_bytes(x: Tensor, value_range: tuple[float, float] | None, name: str) -> Tensor:
    """Float pictures as bytes, where it is said what black and white are, and the numbers bear it out."""
    least, most = (float(v) for v in (x.min(), x.max()))
    seen = f"{str(x.dtype).removeprefix('torch.')} from {least:.3g} to {most:.3g}"
    if not x.is_floating_point() or value_range is None:
        raise DataError(
            f"{name} holds {seen}, and pictures are bytes, uint8 from 0 to 255. Of floats say what black and white "
            "are: --range -1 1 or --range 0 1 (value_range=(-1, 1))."
        )
    low, high = value_range
    if not low < high or not math.isfinite(high - low):
        raise DataError(f"--range {low:g} {high:g}: expected two increasing numbers, black and white.")
    width = high - low
    if most > high + width / 2 or least < low - width / 2:
        raise DataError(f"{name} holds {seen}, far outside --range {low:g} {high:g}. Say the right one, or clip first.")
    if least >= low + 0.4 * width or most <= high - 0.4 * width:
        raise DataError(
            f"{name} holds {seen}, which leaves much of --range {low:g} {high:g} unused: floats in another range, "
            "by the look of it."
        )
    parts = [as_bytes((part.double() - low) / width * 255) for part in x.split(1024)]
    return torch.cat(parts)
