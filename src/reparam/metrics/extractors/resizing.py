"""Pictures resized as Pillow does it, many at a time.

Bicubic filters differ between libraries, in their coefficient, their edges and whether they
antialias, and the scores with them; so the one that published scores were computed with is used.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError


def pillow() -> Any:
    """The module PIL.Image.

    Raises:
        DataError: if Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as e:
        raise DataError(
            "pictures are resized by Pillow before a network sees them: pip install 'reparam[images]'. Or compare "
            "pixels: --set extractor=pixels."
        ) from e
    return Image


def resized_as_floats(pictures: Tensor, side: int) -> Tensor:
    """Each channel bicubically in float32, clipped to [0, 255], not re-quantised.

    Args:
        pictures: uint8 [n, 1 or 3, H, W]; grey is repeated in three channels.
        side: the height and width wanted.

    Returns:
        float32 [n, 3, side, side], in [0, 255].
    """
    return _each(pictures, side, np.float32).clamp_(0, 255)


def resized_as_bytes(pictures: Tensor, side: int) -> Tensor:
    """Each channel bicubically in bytes, rounded as Pillow does for pictures of bytes.

    Args:
        pictures: uint8 [n, 1 or 3, H, W]; grey is repeated in three channels.
        side: the height and width wanted.

    Returns:
        uint8 [n, 3, side, side].
    """
    return _each(pictures, side, np.uint8)


def _each(pictures: Tensor, side: int, dtype: type[np.generic]) -> Tensor:
    """Every channel of every picture, in threads: Pillow works outside the interpreter's lock."""
    image = pillow()
    given = pictures.cpu().numpy()
    out = np.empty((len(given), 3, side, side), dtype)

    def place(i: int) -> None:
        channels = [image.fromarray(c.astype(dtype)).resize((side, side), image.Resampling.BICUBIC) for c in given[i]]
        out[i] = np.stack([np.asarray(c) for c in channels])  # a single channel fills all three

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(place, range(len(given))):
            pass  # an error inside is raised here
    return torch.from_numpy(out)
