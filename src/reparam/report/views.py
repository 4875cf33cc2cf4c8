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
        shape: of one sample: (D,), or (C, H, W) of a picture in 1 or 3 channels.
    """

    kind: str
    axes: str = ""
    centre: Tensor | None = None
    basis: Tensor | None = None
    image: tuple[int, int] = (0, 0)
    limits: tuple[float, float] = (-1.0, 1.0)
    shape: tuple[int, ...] = (-1,)

    def compact(self, x: Tensor) -> np.ndarray:
        """Samples of shape [..., *shape] as what is drawn.

        Returns:
            float32 of shape [..., 2], or uint8 of shape [..., H, W] or [..., H, W, 3]. Of pictures, what is
            not finite is grey.
        """
        leading = x.shape[: x.ndim - len(self.shape)]
        if self.kind == "pictures":
            low, high = self.limits
            grey = ((x.float() - low) / (high - low) * 255).round().clamp(0, 255)
            grey = torch.where(x.isfinite(), grey, 128.0).to(torch.uint8)
            # The colours last, and no axis for them where there is but one.
            return grey.reshape(*leading, -1, *self.image).movedim(-3, -1).squeeze(-1).numpy()
        assert self.centre is not None
        assert self.basis is not None
        return ((x.double().reshape(*leading, -1) - self.centre) @ self.basis).float().numpy()


def view_of(data: Data) -> View:
    """The plane of a curve or a mixture, pictures where samples are pictures, else the top two principal axes."""
    if data.curve is not None:
        centre = torch.zeros(data.shape[0], dtype=torch.float64)
        return View("points", "the plane of the curve", centre, data.curve.basis)
    if data.mixture is not None and data.mixture.dim == 2:
        axes = torch.eye(2, dtype=torch.float64)
        return View("points", "the plane of the data", torch.zeros(2, dtype=torch.float64), axes)
    if data.image is not None:
        return View("pictures", image=data.image, limits=_limits(data))
    if len(data.shape) == 3 and data.shape[0] in (1, 3):
        return View("pictures", image=(data.shape[1], data.shape[2]), limits=_limits(data), shape=data.shape)
    flat = data.train.flatten(1)
    centre = flat.mean(0, dtype=torch.float64)
    if flat.shape[1] == 1:
        basis = torch.ones(1, 2, dtype=torch.float64)
        return View("points", "the value (both axes)", centre, basis, shape=data.shape)
    _, _, axes = torch.linalg.svd(flat[:4096].double() - centre, full_matrices=False)
    top = axes[:2].T
    signs = torch.sign(top.gather(0, top.abs().argmax(0, keepdim=True)))  # the same picture every time
    return View("points", "the top two principal axes of the data", centre, top * signs, shape=data.shape)


def _limits(data: Data) -> tuple[float, float]:
    """The values of black and white, in normalised units."""
    if data.train.dtype == torch.uint8:
        return (0 - data.mean) / data.std, (255 - data.mean) / data.std
    low, high = float(data.train.min()), float(data.train.max())
    return low, high if high > low else low + 1
