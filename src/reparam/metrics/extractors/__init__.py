"""What pictures are turned into before their distributions are compared.

An extractor is called with pictures, uint8 [n, C, H, W], and returns features, float32
[n, dim]. It says its name and a digest of its weights, since scores by different ones cannot
be compared.
"""

from __future__ import annotations

import inspect
from typing import Any

from ...errors import unknown
from ...networks import is_factory
from .base import Extractor
from .dinov2 import DINOv2
from .efficientnet_lite0 import EfficientNetLite0
from .inception import Inception
from .own import own
from .pixels import Pixels

__all__ = ["EXTRACTORS", "DINOv2", "EfficientNetLite0", "Extractor", "Inception", "Pixels", "extractor"]

EXTRACTORS: dict[str, type[Extractor]] = {
    "efficientnet_lite0": EfficientNetLite0,
    "inception": Inception,
    "dinov2": DINOv2,
    "pixels": Pixels,
}


def extractor(config: str | dict[str, Any]) -> Extractor:
    """An extractor from its name, ``{name: …, argument: …}``, or a user's ``pkg.mod:make``.

    Raises:
        UnknownName: if there is none of that name, or it takes no such argument.
        DataError: if what it needs is not installed, or not there.
        NetworkError: if a user's factory cannot be imported.
    """
    arguments = {"name": config} if isinstance(config, str) else dict(config)
    name = arguments.pop("name", None)
    if is_factory(name):
        return own(str(name), arguments)
    if name not in EXTRACTORS:
        raise unknown("extractor", name, [*EXTRACTORS, "pkg.mod:make"])
    known = list(inspect.signature(EXTRACTORS[name]).parameters)
    for key in arguments:
        if key not in known:
            raise unknown(f"argument of extractor {name!r}", key, known)
    return EXTRACTORS[name](**arguments)
