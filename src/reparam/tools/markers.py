"""What other programs write beside weights to say what they predict: read, compared and, where asked for, written.

- Empty tensors in the file: ``v_pred``, ``ztsnr`` (zero terminal SNR), ``__x0__``.
- Metadata of a safetensors file: ``modelspec.prediction_type``, and kohya's ``ss_v_parameterization`` and
  ``ss_zero_terminal_snr``.
- A diffusers folder: ``scheduler/scheduler_config.json`` and ``model_index.json``.

Such marks say neither the schedule nor how a network is called, and their absence says nothing: so they are never
what a file is loaded by. They are read for people, and held against a record that says otherwise. What they predict
and whether the terminal SNR is zero are two separate facts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import SpecError, Unsupported
from ..files import json_in

if TYPE_CHECKING:
    from ..denoiser import Denoiser
    from ..spec import Spec

PREDICTS, ZERO_SNR = "target", "zero terminal SNR"
#: Empty tensors, by the last part of their name.
TENSORS: dict[str, tuple[str, Any]] = {"v_pred": (PREDICTS, "v"), "ztsnr": (ZERO_SNR, True), "__x0__": (PREDICTS, "x0")}
#: What prediction types are called; "velocity" is not among them: it is used for v and for the flow's velocity.
TYPES = {
    "epsilon": "eps",
    "eps": "eps",
    "v": "v",
    "v_prediction": "v",
    "sample": "x0",
    "x0": "x0",
    "flow_prediction": "velocity",
}
_TRUTH = {"true": True, "1": True, "false": False, "0": False}
#: Flags that only say that something is not v.
NOT_V = "not v"


@dataclass(frozen=True)
class Mark:
    """One thing that was said: a ``fact`` ("target", "zero terminal SNR"), its ``value`` and where it stands.

    A value of a target is one of ours, or "not v"; of the other fact true or false; None where it cannot be read.
    """

    fact: str
    value: Any
    where: str


@dataclass(frozen=True)
class Markers:
    """All that was said.

    Attributes:
        marks: in the order of the sources: tensors, metadata, folder.
        unread: what stands where a mark is expected, and is none.
    """

    marks: tuple[Mark, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def target(self) -> str | None:
        """What the network predicts, where all who say it agree."""
        return self._agreed(PREDICTS)

    @property
    def zero_terminal_snr(self) -> bool | None:
        """Whether the last step is pure noise, where all who say it agree."""
        return self._agreed(ZERO_SNR)

    @property
    def contradictions(self) -> list[str]:
        """Every two marks of which only one can be true, in words."""
        return [
            f"{a.fact} is {_words(a.value)} by {a.where}, and {_words(b.value)} by {b.where}"
            for a, b in itertools.combinations(self.marks, 2)
            if a.fact == b.fact and not _together(a.value, b.value)
        ]

    def text(self) -> str:
        """All marks in a line, with what contradicts."""
        said = [f"{m.fact} {_words(m.value)} ({m.where})" for m in self.marks] + list(self.unread)
        found = self.contradictions
        return "; ".join(said) + (f". They contradict each other: {'; '.join(found)}" if found else "")

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "target": self.target,
            "zero_terminal_snr": self.zero_terminal_snr,
            "marks": [{"fact": m.fact, "value": m.value, "where": m.where} for m in self.marks],
            "unread": list(self.unread),
            "contradictions": self.contradictions,
        }

    def against(self, spec: Spec) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Where a spec says otherwise: (its field, what that is by the mark, in words)."""
        kind, steps = spec.target, spec.schedule
        kind = kind.get("target", kind) if kind.get("name") == "gaussian" else kind
        predicted = str(kind.get("name") if isinstance(kind, dict) else kind)
        predicted = TYPES.get(predicted, predicted)
        for mark in self.marks:
            if mark.fact == PREDICTS and not _together(mark.value, predicted):
                why = f"its spec says that it predicts {predicted}, and {mark.where} {_words(mark.value)}"
                yield "target", {"name": mark.value}, why
            # Betas that are a list of numbers may end in pure noise by themselves.
            if mark.fact == ZERO_SNR and steps.get("name") == "ddpm" and isinstance(steps.get("betas", ""), str):
                zero = bool(steps.get("zero_terminal_snr", False))
                if zero != mark.value:
                    why = f"{ZERO_SNR} is {_words(zero)} by its spec, {_words(mark.value)} by {mark.where}"
                    yield "schedule", {**steps, "zero_terminal_snr": mark.value}, why

    def _agreed(self, fact: str) -> Any:
        values = [m.value for m in self.marks if m.fact == fact]
        if any(not _together(a, b) for a, b in itertools.combinations(values, 2)):
            return None
        return next((v for v in values if v != NOT_V), None)


def _together(a: Any, b: Any) -> bool:
    """Whether two values of a fact may both be true."""
    if NOT_V in (a, b):
        return (b if a == NOT_V else a) != "v"
    return bool(a == b)


def _words(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def read_markers(
    tensors: Iterable[str] | Mapping[str, Iterable[int]] = (),
    metadata: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
) -> Markers:
    """The marks in the names of a file's tensors, in its metadata, and in a diffusers folder. Nothing is resolved.

    Args:
        tensors: their names; with their shapes (:func:`reparam.files.read_header`), only those without numbers count.
        metadata: of the safetensors file.
        folder: of a diffusers pipeline, or of its scheduler.

    Raises:
        SpecError: if a file of the folder cannot be read.
    """
    found = [*_of_tensors(tensors), *_of_metadata(metadata or {})]
    if folder is not None:
        found += _of_folder(Path(folder))
    return Markers(tuple(m for m in found if m.value is not None), tuple(m.where for m in found if m.value is None))


def write_markers(denoiser: Denoiser) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The marks that others would know this model by: empty tensors, and metadata. kohya's flags are only read.

    Raises:
        Unsupported: if there are none for what it predicts.
    """
    tensors = {"v": ["v_pred"], "x0": ["__x0__"], "eps": []}.get(denoiser.target.name)
    if tensors is None or denoiser.conventions.likelihood is not None:
        raise Unsupported(
            f"there are no marks of other programs for a network that predicts {denoiser.conventions.predicted().name}:"
            " they know eps, v and x0. Save it without markers."
        )
    schedule = denoiser.schedule.config()
    if schedule["name"] == "ddpm" and float(denoiser.schedule.alpha(1.0)) == 0:
        tensors = [*tensors, "ztsnr"]
    types = {"eps": "epsilon", "v": "v"}  # those that the model spec names
    told = {"modelspec.prediction_type": types[denoiser.target.name]} if denoiser.target.name in types else {}
    return {name: torch.empty(0) for name in tensors}, told


def without_markers(tensors: Mapping[str, Tensor], kept: Iterable[str]) -> dict[str, Tensor]:
    """The tensors but for the marks among them; those that are ``kept`` are a network's own."""
    kept = set(kept)
    return {k: v for k, v in tensors.items() if k in kept or v.numel() or k.rpartition(".")[2] not in TENSORS}


def _of_tensors(tensors: Iterable[str] | Mapping[str, Iterable[int]]) -> Iterator[Mark]:
    shapes = tensors if isinstance(tensors, Mapping) else dict.fromkeys(tensors, (0,))
    for name, shape in shapes.items():
        last = str(name).rpartition(".")[2]
        if last in TENSORS and math.prod(shape) == 0:
            fact, value = TENSORS[last]
            yield Mark(fact, value, f"an empty tensor {name}")


def _of_metadata(metadata: Mapping[str, str]) -> Iterator[Mark]:
    if (kind := metadata.get("modelspec.prediction_type")) is not None:
        yield _typed(kind, "modelspec.prediction_type")
    for key, fact, values in (
        ("ss_v_parameterization", PREDICTS, {True: "v", False: NOT_V}),
        ("ss_zero_terminal_snr", ZERO_SNR, {True: True, False: False}),
    ):
        said = metadata.get(key)
        if said is None or said == "None":
            continue
        truth = _TRUTH.get(str(said).lower())
        if truth is None:
            yield Mark(fact, None, f"{key} is {said!r}, expected True or False")
        else:
            yield Mark(fact, values[truth], f"{key}: {said}")


def _typed(kind: Any, where: str) -> Mark:
    known = TYPES.get(kind.lower()) if isinstance(kind, str) else None
    return Mark(PREDICTS, known, f"{where}: {kind}" if known else f"{where} is {kind!r}, which is not known")


def _of_folder(folder: Path) -> Iterator[Mark]:
    index, named = _json(folder / "model_index.json"), None
    if isinstance(entry := index.get("scheduler"), list) and len(entry) == 2 and isinstance(entry[1], str):
        named = entry[1]
    inner = folder / "scheduler" / "scheduler_config.json"
    file = inner if inner.is_file() else folder / "scheduler_config.json"
    config = _json(file)
    own = config.get("_class_name")
    for name, where in ((named, "model_index.json"), (own, file.name)):
        if isinstance(name, str) and (kind := _of_class(name)) is not None:
            yield Mark(PREDICTS, kind, f"the scheduler {name} in {where}")
    if config.get("use_flow_sigmas") is True:
        yield Mark(PREDICTS, "velocity", f"use_flow_sigmas in {file.name}")
    preconditioned = isinstance(own, str) and own.startswith("EDM")  # where a type names a sign of F
    if config.get("prediction_type") is not None and not preconditioned:
        yield _typed(config["prediction_type"], f"prediction_type in {file.name}")
    if isinstance(zero := config.get("rescale_betas_zero_snr"), bool):
        yield Mark(ZERO_SNR, zero, f"rescale_betas_zero_snr in {file.name}")


def _of_class(name: str) -> str | None:
    """What a class of schedulers implies."""
    return "velocity" if name.startswith("FlowMatch") else "edm" if name.startswith("EDM") else None


def _json(file: Path) -> dict[str, Any]:
    """A file's mapping; an empty one where there is no file.

    Raises:
        SpecError: if it is no JSON.
    """
    if not file.is_file():
        return {}
    try:
        found = json_in(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise SpecError(f"{file} cannot be read as JSON: {e}") from e
    if not isinstance(found, dict):
        raise SpecError(f"{file} is {type(found).__name__}, expected a mapping.")
    return found
