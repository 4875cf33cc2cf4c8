"""How samples of a data set are drawn: as points in a plane, or as pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data import Data


@dataclass(frozen=True)
class View:
    """A way to draw samples.

    Attributes:
        kind: "points" or "pictures".
        axes: what the two axes of the points are, for a caption.
        centre, basis: the projection onto the plane drawn, for points: shapes [D] and [D, 2].
        image: height and width, for pictures, with ``limits`` the values of black and white.
    """

    kind: str
    axes: str = ""
    centre: Tensor | None = None
    basis: Tensor | None = None
    image: tuple[int, int] = (0, 0)
    limits: tuple[float, float] = (-1.0, 1.0)

    def compact(self, x: Tensor) -> np.ndarray:
        """Samples of shape [..., D] as what is drawn: float32 [..., 2], or uint8 [..., H, W]."""
        if self.kind == "pictures":
            low, high = self.limits
            grey = ((x - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)
            return grey.reshape(*x.shape[:-1], *self.image).numpy()
        assert self.centre is not None
        assert self.basis is not None
        flat = x.double().reshape(*x.shape[:-1], -1)
        return ((flat - self.centre) @ self.basis).float().numpy()


def view_of(data: Data) -> View:
    """The plane of a curve, pictures where vectors are pictures, else the top two principal axes."""
    if data.curve is not None:
        centre = torch.zeros(data.shape[0], dtype=torch.float64)
        return View("points", "the plane of the curve", centre, data.curve.basis)
    if data.image is not None:
        return View("pictures", image=data.image, limits=(float(data.train.min()), float(data.train.max())))
    flat = data.train.flatten(1).double()
    centre = flat.mean(0)
    if flat.shape[1] == 1:
        return View("points", "the value (both axes)", centre, torch.ones(1, 2, dtype=torch.float64))
    _, _, axes = torch.linalg.svd(flat[:4096] - centre, full_matrices=False)
    top = axes[:2].T
    signs = torch.sign(top.gather(0, top.abs().argmax(0, keepdim=True)))  # the same picture every time
    return View("points", "the top two principal axes of the data", centre, top * signs)
