"""The metric card: a score together with all that decided it."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import Conflict, DataError, ReparamError
from .scoring import Scoring
from .sets import SampleSet, hashes
from .significance import independent_difference
from .table import METRICS

FORMAT = 1
#: Pictures that copies are looked for among; more would take long.
_LOOKED_AT = 60_000
#: Settings whose difference makes two cards incomparable, and where they stand in a card.
_ALIKE = (
    ("extractor", ("extractor", "name")),
    ("weights of the extractor", ("extractor", "weights")),
    ("reference", ("reference", "digest")),
    ("number of reference data", ("reference", "n")),
    ("number of samples", ("samples", "n")),
    ("rule by which samples became bytes", ("samples", "to_uint8")),
)


def card(
    scoring: Scoring,
    metrics: Mapping[str, Mapping[str, Any]],
    *,
    source: str,
    to_uint8: str | None = None,
    model: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    noise_levels: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """All that decides scores, as plain data.

    Args:
        scoring: what was scored, beside what. metrics: the scores, by name.
        source: where the samples come from. to_uint8: the rule by which numbers became bytes, of pictures.
        model, sampling, noise_levels: what is known of how they were made.
        calibration: how honest the model's variance is, as :meth:`reparam.metrics.Calibration.to_dict` has it.
    """
    real, data = scoring.real, scoring.real.data
    return {
        "format": FORMAT,
        "metrics": {name: dict(entry) for name, entry in metrics.items()},
        **facts(scoring, source=source, to_uint8=to_uint8, model=model, sampling=sampling),
        **({"noise_levels": dict(noise_levels)} if noise_levels else {}),
        **({"calibration": dict(calibration)} if calibration else {}),
        "warnings": [*warnings, *remarks(scoring, [name for name in metrics if name in METRICS])],
        "data": {"name": data.name, "shape": list(real.data.shape)},
    }


def facts(
    scoring: Scoring,
    *,
    source: str,
    to_uint8: str | None = None,
    model: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What all metrics of a card share."""
    real = scoring.real
    return {
        "samples": {"source": source, "n": scoring.samples.count, **({"to_uint8": to_uint8} if to_uint8 else {})},
        "reference": {"name": real.data.name, "n": real.count, "digest": real.digest},
        "extractor": real.extractor.record() if real.data.pictures else None,
        "model": dict(model) if model else None,
        "sampling": dict(sampling) if sampling else None,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what computed the scores."""
    found = {"reparam": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def remarks(scoring: Scoring, metrics: Sequence[str]) -> list[str]:
    """What a reader must know before believing the scores."""
    found = []
    n, m = scoring.samples.count, scoring.real.count
    distances = [name for name in metrics if name in ("frechet_distance", "pixel_frechet_distance")]
    for name in distances:
        by = METRICS[name].uses
        dim = scoring.of(by(scoring.real)).moments.dim if by else 0
        few = [f"{count:,} {what}" for count, what in ((n, "samples"), (m, "reference data")) if count <= dim]
        if few:
            found.append(
                f"{name}: {' and '.join(few)} for {dim:,} features, so a covariance lacks rank. The distance is exact, "
                "but biased upward: compare it only with others at the same numbers, and beside its floor."
            )
    return found + copies(scoring)


def copies(scoring: Scoring) -> list[str]:
    """Pictures that occur twice among the samples, or are in the reference too.

    Raises:
        DataError: if samples and reference are the same pictures.
    """
    real, samples = scoring.real, scoring.samples
    if not real.data.pictures or samples.count > _LOOKED_AT:
        return []
    ours = list(_hashed(samples))
    twice = len(ours) - len(set(ours))
    found = [f"{twice:,} of {len(ours):,} samples are exact copies of other samples"] if twice else []
    if real.given is not None or real.count > _LOOKED_AT:
        return found
    theirs = set(_hashed(real.samples()))
    shared = sum(h in theirs for h in ours)
    if shared and theirs == set(ours):
        raise DataError(
            f"samples ({samples.name}) and reference ({real.data.name}) are the same {len(theirs):,} pictures: the "
            "distance would be 0 and say nothing."
        )
    if shared:
        found.append(f"{shared:,} of {len(ours):,} samples are exact copies of reference pictures")
    return found


def _hashed(samples: SampleSet) -> Iterator[bytes]:
    import torch

    for part in torch.arange(samples.count).split(1024):
        yield from hashes(samples.rows(part))


def read_card(path: str | Path) -> dict[str, Any]:
    """The card in a .json file, or in the folder of a run.

    Raises:
        DataError: if there is none.
    """
    file = Path(path)
    file = file / "card.json" if file.is_dir() else file
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("metrics"), dict) or "samples" not in found:
            raise ValueError("it has no metrics, or does not say of which samples")
        if not all(isinstance(entry, dict) for entry in found["metrics"].values()):
            raise ValueError("its metrics are no scores")
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise DataError(f"{file} is no metric card: {reason}. reparam eval … --out CARD.json writes one.") from e
    if found.get("format") != FORMAT:
        raise DataError(f"{file}: a card of format {found.get('format')!r}, this version reads {FORMAT}.")
    return found


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the scores on two cards differ beyond noise.

    Of each metric on both: the difference a − b with the interval that both cards' intervals make
    (half widths added in quadrature), and who is better: "a", "b" or "no difference".

    The intervals are those of the samples; another training of the same model may differ by more.

    Raises:
        Conflict: if something that decides the scores differs, so that they cannot be compared.
    """
    differing = []
    for what, path in _ALIKE:
        ours, theirs = _at(a, path), _at(b, path)
        if ours != theirs:
            differing.append(f"{what} ({ours} and {theirs})")
    shared = [name for name in a["metrics"] if name in b["metrics"]]
    for name in shared:
        ours, theirs = a["metrics"][name].get("settings"), b["metrics"][name].get("settings")
        if ours != theirs:
            differing.append(f"settings of {name} ({ours} and {theirs})")
    if differing:
        raise Conflict(f"these cards cannot be compared: they differ in {'; '.join(differing)}.")
    if not shared:
        raise ReparamError("these cards have no metric in common.")
    return {name: _compared(name, a["metrics"][name], b["metrics"][name]) for name in shared}


def _at(card: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = card
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _compared(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    ours, theirs = a.get("value"), b.get("value")
    if ours is None or theirs is None or not (math.isfinite(ours) and math.isfinite(theirs)):
        return {"a": ours, "b": theirs, "verdict": "unknown", "why": "a value is missing"}
    found = {"a": ours, "b": theirs, "difference": ours - theirs}
    if a.get("interval") is None or b.get("interval") is None:
        return {**found, "verdict": "unknown", "why": "a card has no interval for it"}
    difference = independent_difference(ours, tuple(a["interval"]), theirs, tuple(b["interval"]))
    if difference is None or not difference.beyond_noise:
        verdict = "no difference"
    else:
        verdict = "a" if (ours > theirs) == (a.get("better") == "higher") else "b"
    interval = None if difference is None else [difference.low, difference.high]
    return {**found, "interval": interval, "verdict": verdict}


def told(compared: Mapping[str, Mapping[str, Any]]) -> str:
    """A comparison for a reader."""
    lines = []
    for name, found in compared.items():
        if found["verdict"] == "unknown":
            lines.append(f"{name}: cannot be told: {found['why']}")
            continue
        low, high = found["interval"] or (found["difference"], found["difference"])
        what = {"a": "A is better", "b": "B is better"}.get(found["verdict"], "no difference beyond noise")
        lines.append(
            f"{name}: {what}: {found['a']:.4g} and {found['b']:.4g}, apart by {found['difference']:.3g} "
            f"({low:.3g} … {high:.3g} with 95 % confidence)"
        )
    lines.append("The intervals are those of the samples: another training of the same model may differ by more.")
    return "\n".join(lines)
