"""A network that has seen no labels, whose features agree better with people's judgement of pictures."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import DataError
from ...files import sha256_of
from .base import Trained
from .resizing import pillow, resized_as_bytes
from .weights import given, nothing_given

VARIABLE = "REPARAM_DINOV2"
_SIDE, _PATCH = 224, 14
#: Of ImageNet's pictures in [0, 1].
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WEIGHTS = "model.safetensors"
#: What every DINOv2 has, and its weights do not tell.
_ALWAYS = {
    "model_type": "dinov2",
    "patch_size": _PATCH,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
#: Width, layers and heads of those that were published.
_SIZES = {(384, 12, 6): "ViT-S/14", (768, 12, 12): "ViT-B/14", (1024, 24, 16): "ViT-L/14", (1536, 40, 24): "ViT-g/14"}


class DINOv2(Trained):
    """The class token of a DINOv2 after the final norm: 768 features for ViT-B/14, 1,024 for ViT-L/14.

    Pictures are resized to 224×224 by Pillow's bicubic filter in bytes (antialiased), divided by 255, and
    standardised by the mean and standard deviation of ImageNet. Grey ones are repeated in three channels.
    The embeddings of positions are interpolated as by the network's authors, whatever the version of
    transformers does. FD-DINOv2 as published uses ViT-L/14: give its folder as ``path``.
    Source: Oquab et al., "DINOv2" (arXiv 2304.07193); Stein et al., "Exposing flaws of generative model
    evaluation metrics and their unfair treatment of diffusion models" (arXiv 2306.04675).

    Args:
        path: a folder as transformers writes it, with config.json and model.safetensors; by default that of
            the environment's REPARAM_DINOV2.
        download: whether facebook/dinov2-base may be downloaded, where neither says where it is.
        dtype: "float32" or "bfloat16".
        batch: how many pictures are computed at a time.

    Raises:
        DataError: if transformers is missing, or there is no such folder, or it holds something else. Pickled
            weights are refused: reading them runs what is in them.
    """

    HUB = "facebook/dinov2-base"
    resize = (
        "PIL bicubic, in bytes, to 224x224; grey repeated in three channels; position embeddings bicubic, offset 0.1"
    )
    scaling = f"(x/255 - mean)/std, mean {_MEAN}, std {_STD}"

    def __init__(
        self, path: str | None = None, download: bool = False, dtype: str = "float32", batch: int = 64
    ) -> None:
        if batch < 1:
            raise DataError(f"extractor dinov2: batch must be at least 1, found {batch}.")
        pillow()
        folder, self.source = _folder(path, download, self.HUB)
        _check_config(folder)
        weights = _weights(folder)
        net = _loaded(folder)
        super().__init__(net, f"dinov2 {_size(net.config)} at {_SIDE}x{_SIDE}", sha256_of(weights), dtype, batch)

    def prepared(self, pictures: Tensor) -> Tensor:
        x = resized_as_bytes(pictures, _SIDE).to(self._device).float() / 255
        mean, std = (torch.tensor(v, device=self._device).view(3, 1, 1) for v in (_MEAN, _STD))
        return (x - mean) / std

    def features(self, x: Tensor) -> Tensor:
        found: Tensor = self._net(pixel_values=x).last_hidden_state[:, 0]
        return found


def _folder(path: str | None, download: bool, hub: str) -> tuple[Path, str]:
    """The folder of the weights, and where they come from."""
    found = given(path, VARIABLE, "dinov2")
    if found is not None:
        return found, f"folder {found.resolve().name}"
    if not download:
        raise nothing_given("dinov2", f"a folder with a DINOv2 (config.json, {_WEIGHTS})", VARIABLE)
    folder = _downloaded(hub)
    return folder, f"{hub} of the Hugging Face hub, revision {folder.name}"


def _downloaded(hub: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise _missing() from e
    print(f"fetching {hub} from the Hugging Face hub, if it is not cached", file=sys.stderr)
    try:
        return Path(snapshot_download(hub, allow_patterns=["config.json", _WEIGHTS]))
    except Exception as e:  # of the network, the server, the cache and the file system, each its own
        said = str(e).strip().split("\n")[0][:300] or type(e).__name__
        raise DataError(
            f"extractor dinov2: cannot get {hub} from the Hugging Face hub: {said} Get its config.json and {_WEIGHTS} "
            f"by other means and give their folder: --set extractor.path=DIR, or {VARIABLE}=DIR in the environment."
        ) from e


def _missing() -> DataError:
    return DataError("extractor dinov2 needs transformers: pip install 'reparam[dino]'.")


def _check_config(folder: Path) -> None:
    if not folder.is_dir():
        raise _refused(folder, f"is a file{_pickled([folder])}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = {key: config.get(key, default) for key, default in {**_ALWAYS, "model_type": None}.items()}
    except (OSError, ValueError, AttributeError) as e:
        raise _refused(folder, f"has no readable config.json ({type(e).__name__})") from e
    wrong = ", ".join(f"{k} {v!r} (expected {_ALWAYS[k]!r})" for k, v in found.items() if v != _ALWAYS[k])
    if wrong:
        raise _refused(folder, f"holds another network, by its config.json: {wrong}")


def _weights(folder: Path) -> Path:
    path = folder / _WEIGHTS
    if not path.is_file():
        others = sorted(f for f in folder.iterdir() if f.name != "config.json")
        there = ", ".join(f.name for f in others[:8]) or "nothing"
        raise _refused(folder, f"has no {_WEIGHTS}; beside config.json there is {there}{_pickled(others)}")
    return path


def _pickled(files: list[Path]) -> str:
    if not any(f.suffix in (".bin", ".pth", ".pt", ".pkl", ".ckpt") for f in files):
        return ""
    return ", pickled weights, which are refused since reading them runs what is in them"


def _refused(folder: Path, found: str) -> DataError:
    return DataError(
        f"extractor dinov2: {folder} {found}. Expected a folder with the config.json and {_WEIGHTS} of a DINOv2 with "
        f"patches of {_PATCH}, as transformers saves it: --set extractor.path=DIR, or "
        f"{VARIABLE}=DIR in the environment."
    )


def _size(config: Any) -> str:
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    return _SIZES.get((width, layers, heads), f"of width {width}, {layers} layers, {heads} heads")


def _loaded(folder: Path) -> Any:
    try:
        transformers: Any = importlib.import_module("transformers")  # by name: a type checker would read all of it
    except ImportError as e:
        raise _missing() from e
    try:
        with torch.random.fork_rng(devices=[]):  # weights are drawn before they are replaced
            net, told = transformers.Dinov2Model.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as e:  # a configuration that transformers cannot follow, or weights of another shape
        raise _refused(folder, f"cannot be loaded by transformers: {str(e)[:400]}") from e
    if absent := sorted(told["missing_keys"]):  # transformers would leave them random
        raise _refused(folder, f"lacks weights that its config.json calls for: {', '.join(map(str, absent[:4]))}")
    embeddings = net.embeddings
    embeddings.position_embeddings = nn.Parameter(_at(embeddings.position_embeddings.detach().float(), _SIDE // _PATCH))
    return net


def _at(positions: Tensor, side: int) -> Tensor:
    """Embeddings of the class token and of a square of positions, for one of ``side``×``side``.

    The authors scale by (side + 0.1)/(the side there is), which moves the positions a little; the weights were
    never used without it, and versions of transformers differ in it.
    """
    there = round((positions.shape[1] - 1) ** 0.5)
    if there == side:
        return positions
    grid = positions[:, 1:].transpose(1, 2).unflatten(2, (there, there))
    scale = (side + 0.1) / there
    moved = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], moved.flatten(2).transpose(1, 2)], dim=1)
