"""The pixels themselves."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...errors import ReparamError
from .base import Extractor


class Pixels(Extractor):
    """The pixels themselves, in [0, 1], averaged down to at most ``side``×``side`` of them.

    A covariance of more numbers than there are pictures says little, hence so few.
    """

    scaling = "x/255"

    def __init__(self, side: int = 16) -> None:
        if side < 1:
            raise ReparamError(f"extractor pixels: side must be at least 1, found {side}.")
        self.side = side
        self.name = f"pixels, at most {side}x{side}"
        self.resize = f"averaged over areas, to at most {side}x{side}"

    def __call__(self, pictures: Tensor) -> Tensor:
        high, wide = (min(n, self.side) for n in pictures.shape[2:])
        return F.interpolate(pictures.float() / 255, (high, wide), mode="area").flatten(1)
