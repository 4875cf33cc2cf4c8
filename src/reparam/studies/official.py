"""JiT as its authors publish it: weights, what they were trained as, and how they are sampled from.

A training's checkpoint holds ``model``, ``model_ema1`` and ``model_ema2`` side by side; the first average is the one
that the paper evaluates. Sampling there is Heun in 50 even steps with guidance for JiT's t in [0.1, 1], which here is
[0, 0.9]. One thing differs: where JiT's 1 − t < 0.05 the published sampler divides by 0.05, so its last steps stop
short of the estimate of x0, and here nothing is clamped.

References:
    Li & He, arXiv 2511.13720, table 9.
"""

from __future__ import annotations

import argparse
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import Conflict, NetworkError, ReparamError, SpecError, unknown
from ..files import read_tensors
from ..networks.jit import SIZES, JiT
from ..schedules import RectifiedFlow
from .recipe import SampleConfig

_PATCHES = (16, 32, 64)
_CLASSES, _IN_CONTEXT = 1000, 32
#: The weights of guidance that the official repository states.
_GUIDANCE = {"JiT-B/16": 2.9, "JiT-B/32": 2.9, "JiT-H/16": 2.2}
#: The time t where guidance is applied.
_INTERVAL = [0.0, 0.9]
_HELD = {"1": "model_ema1", "2": "model_ema2", "none": "model"}
#: The official names of a configuration, all of integers, and the least of each.
_LEAST = {
    "input_size": 1,
    "patch_size": 1,
    "in_channels": 1,
    "hidden_size": 4,
    "depth": 1,
    "num_heads": 1,
    "num_classes": 0,
    "bottleneck_dim": 0,
    "in_context_len": 0,
    "in_context_start": 0,
}
#: Those that need not be given; so need not proj_drop, a number.
_OPTIONAL = ("input_size", "in_channels")
#: So many differences are told.
_FEW = 4


@dataclass(frozen=True)
class Official:
    """A file of official JiT weights.

    Args:
        file: a .safetensors file, or a .pth or .pt file, of which tensors and plain data alone are unpickled.
        model: such as "JiT-B/16"; or a mapping, the configuration under its official names (``input_size``,
            ``patch_size``, ``hidden_size``, ``depth``, ``num_heads``, ``num_classes``, ``bottleneck_dim``,
            ``in_context_len``, ``in_context_start``).
        image_size: side of the pictures; 16 patches by default, as published.
        ema: which weights of a training's checkpoint: "1" or "2", the averages, or "none".
    """

    file: str | Path
    model: str | Mapping[str, int]
    image_size: int | None = None
    ema: str | None = None

    def config(self) -> dict[str, Any]:
        """The network's configuration, under its official names.

        Raises:
            UnknownName: if there is no model of this name.
            ReparamError: if the configuration is incomplete or impossible, or the size is no whole number of patches.
        """
        if isinstance(self.model, Mapping):
            config = {"num_classes": _CLASSES, "in_context_len": _IN_CONTEXT, **self.model}
            _check_names(config)
        else:
            config = self._published(self.model)
        patch = config["patch_size"]
        side = config.get("input_size", 16 * patch) if self.image_size is None else self.image_size
        if side < patch or side % patch:
            named = "input_size" if self.image_size is None else "--image-size"
            raise ReparamError(f"{named} {side}: expected a multiple of the patch of {patch} pixels.")
        return {**config, "input_size": side}

    def _published(self, model: str) -> dict[str, Any]:
        known = {f"JiT-{letter}/{patch}": (letter, patch) for letter in SIZES for patch in _PATCHES}
        if model not in known:
            raise unknown("model of JiT", model, known)
        letter, patch = known[model]
        size = SIZES[letter]
        return {
            "patch_size": patch,
            "hidden_size": size.width,
            "depth": size.depth,
            "num_heads": size.heads,
            "num_classes": _CLASSES,
            "bottleneck_dim": size.bottleneck,
            "in_context_len": _IN_CONTEXT,
            "in_context_start": size.in_context_start,
            "proj_drop": size.dropout,
        }

    def record(self) -> dict[str, Any]:
        """What a card says of it."""
        model = self.model if isinstance(self.model, str) else dict(self.model)
        return {"model": model, "image_size": self.config()["input_size"], "ema": self.ema or "1"}

    def sampling(self, guidance: float | None) -> SampleConfig:
        """How it is sampled from, as published; ``guidance`` is that which is asked for, if any.

        Raises:
            ReparamError: if none is asked for, and no published one is known.
        """
        name = self.model if isinstance(self.model, str) else ""
        weight = _GUIDANCE.get(name) if guidance is None else guidance
        if weight is None:
            known = ", ".join(f"{w:g} for {model}" for model, w in _GUIDANCE.items())
            raise ReparamError(
                f"which guidance? The official repository states {known}, and none for {name or 'a configuration'}; "
                "give --guidance, 1 for none."
            )
        return SampleConfig(steps=50, guidance=weight, guidance_interval=[0.0, 1.0] if weight == 1 else _INTERVAL)

    def denoiser(self) -> Denoiser:
        """The model: it predicts x0 on the straight path whose noise is scaled by the side over 256.

        Raises:
            SpecError: if the file cannot be read, or is none of weights.
            NetworkError: if the weights are not those of the model.
        """
        config = self.config()
        side, classes = config["input_size"], config["num_classes"]
        weights = weights_of(Path(self.file), self.ema)
        self._check_size(weights, config)
        net = JiT.from_official(weights, **config)
        data = {
            "shape": [net.channels, side, side],
            "pictures": True,
            "normalised_by": {"mean": 127.5, "std": 127.5},
            "classes": [str(k) for k in range(classes)],
        }
        return Denoiser(net, RectifiedFlow(noise_scale=side / 256), "x0", time="1-t", data=data)

    def _check_size(self, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """Refuse weights that are of another size, in a line."""
        found = _size(weights)
        if not found:
            named = ", ".join(list(weights)[:3])
            raise NetworkError(f"{self.file} holds {named} … and no pos_embed; expected the weights of a JiT.")
        other = [name for name, value in found.items() if value != config.get(name, value)][:_FEW]
        if other:
            has = ", ".join(f"{name} {found[name]}" for name in other)
            asked = ", ".join(f"{name} {config[name]}" for name in other)
            model = self.model if isinstance(self.model, str) else "the configuration"
            raise NetworkError(
                f"{self.file} holds weights of another size: {has}; {model} has {asked}. Name the model that they are "
                "of (--model, --image-size)."
            )


def _check_names(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that lacks a name, has an unknown one, or a value that is none of its kind."""
    for name, value in config.items():
        if name not in _LEAST and name != "proj_drop":
            raise unknown("name in --model, which takes JiT's official names", name, [*_LEAST, "proj_drop"])
        least = _LEAST.get(name)
        if least is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ReparamError(f"--model: {name} must be an integer of at least {least}, found {value!r}.")
    if missing := [name for name in _LEAST if name not in config and name not in _OPTIONAL]:
        raise ReparamError(
            f"--model lacks {', '.join(missing)}: expected JiT's official names, all that have no default."
        )


def _size(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """What weights say of their network's size, under its official names; nothing if they are of no JiT."""

    def shape(ending: str, dimensions: int) -> list[int]:
        """That of the tensor whose name ends so; empty if there is none."""
        held = (v.shape for k, v in weights.items() if f".{k}".endswith(f".{ending}") and v.ndim == dimensions)
        return list(next(held, ()))

    if not (positions := shape("pos_embed", 3)):
        return {}
    found = {"hidden_size": positions[2]}
    if blocks := [int(m[1]) for name in weights if (m := re.search(r"\bblocks\.(\d+)\.", name))]:
        found["depth"] = max(blocks) + 1
    if first := shape("x_embedder.proj1.weight", 4):
        found |= {"patch_size": first[2], "input_size": first[2] * math.isqrt(positions[1]), "bottleneck_dim": first[0]}
    if norm := shape("blocks.0.attn.q_norm.weight", 1):
        found["num_heads"] = positions[2] // norm[0]
    if labels := shape("y_embedder.embedding_table.weight", 2):
        found["num_classes"] = labels[0] - 1
    if context := shape("in_context_posemb", 3):
        found["in_context_len"] = context[1]
    return found


def weights_of(file: Path, ema: str | None = None) -> dict[str, Tensor]:
    """The weights in an official file; of a training's checkpoint those of an average, the first unless ``ema`` says.

    Raises:
        SpecError: if the file cannot be read, or does not hold them.
        Conflict: if an average is asked of a file that holds one set of weights.
    """
    if ema is not None and ema not in _HELD:
        raise unknown("choice of --ema", ema, _HELD)
    held = _grouped(read_tensors(file)[0]) if file.suffix == ".safetensors" else _unpickled(file)
    present = [name for name in _HELD.values() if isinstance(held.get(name), Mapping)]
    if not present:
        if ema is not None:
            raise Conflict(f"--ema {ema}: {file} holds one set of weights, not a training's model and its averages.")
        chosen: Mapping[str, Any] = held
    else:
        name = _HELD[ema or "1"]
        if name not in present:
            raise SpecError(f"{file} holds {', '.join(present)}, and no {name}; choose by --ema 1, 2 or none.")
        chosen = held[name]
    if not chosen or not all(isinstance(value, Tensor) for value in chosen.values()):
        others = [f"{name} ({_kind(value)})" for name, value in chosen.items() if not isinstance(value, Tensor)]
        raise SpecError(
            f"{file} holds {', '.join(others[:6]) or 'nothing'}; expected JiT's weights by name, and tensors alone."
        )
    return {name: value.float() if value.is_floating_point() else value for name, value in chosen.items()}


def _grouped(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Tensors called ``model_ema1.…`` as dictionaries of their own, where there are any."""
    found: dict[str, Any] = {}
    for name, value in tensors.items():
        first, _, rest = name.partition(".")
        if first in _HELD.values() and rest:
            found.setdefault(first, {})[rest] = value
    return found or tensors


def _unpickled(file: Path) -> dict[str, Any]:
    """What torch.save wrote, tensors and plain data only; checkpoints hold the options they were trained with, too."""
    if not file.is_file():
        raise SpecError(f"no file {file}; expected official weights, .safetensors, .pth or .pt.")
    if not file.stat().st_size:
        raise SpecError(f"{file} holds nothing: it is empty. Expected what torch.save writes of tensors by name.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except OSError as e:
        raise SpecError(f"{file} cannot be read: {e.strerror or e}.") from e
    except Exception as e:  # whatever unpickling does with what it refuses or cannot read
        raise SpecError(
            f"{file} cannot be read as weights alone: {_refused(str(e))}. Expected what torch.save writes of tensors "
            "by name, such as a network's state_dict()."
        ) from e
    if not isinstance(found, dict):
        raise SpecError(f"{file} holds {_kind(found)}; expected weights by name.")
    return found


def _refused(message: str) -> str:
    """What a file holds that is not unpickled, as torch's message tells."""
    if "TorchScript" in message:
        return "it holds a TorchScript program, which is not run"
    if named := re.search(r"\b(?:GLOBAL|global|class|type)\W+([A-Za-z_]\w*(?:\.\w+)+)", message):
        return f"it holds {named[1]}, which is no tensor, and making one could run code of the file's; nothing was run"
    return "it is cut short, damaged, or nothing that torch.save wrote"


def _kind(value: Any) -> str:
    """What something is, in a word."""
    return type(value).__name__
