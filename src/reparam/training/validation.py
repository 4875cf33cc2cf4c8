"""The error of x0 by noise level: the only loss by which targets compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Data
from ..data.order import mix
from ..denoiser import Denoiser, evaluating

#: Numbers that the validation's pictures may have in all; of large pictures there are fewer.
_NUMBERS = 2**25


@dataclass(frozen=True)
class Validation:
    """The same x0, t and ε for every run of a study: the only loss that compares targets.

    Attributes:
        edges: of the noise bins, in t, length K + 1.
        x0, eps: shape [K·n, …], n samples a bin. t: shape [K·n], stratified within each bin.
        variance: of the data, by which the error is divided.
        y: class numbers, for a conditional run.
    """

    edges: list[float]
    x0: Tensor
    t: Tensor
    eps: Tensor
    variance: float
    y: Tensor | None = None

    @staticmethod
    def size(shape: Sequence[int], bins: int = 10, each: int = 256) -> int:
        """How many samples of this shape are drawn, in all bins together."""
        return bins * max(8, min(each, _NUMBERS // (bins * math.prod(shape))))

    @classmethod
    def draw(
        cls,
        data: Data,
        t_range: tuple[float, float],
        *,
        conditional: bool = False,
        bins: int = 10,
        each: int = 256,
    ) -> Validation:
        """A fixed draw over the held-out data and times in ``t_range``."""
        low, high = t_range
        n = cls.size(data.shape, bins, each)
        generator = torch.Generator().manual_seed(mix(0, 0xE44))
        t = low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
        order = torch.randperm(n, generator=generator) % len(data.heldout)
        eps = torch.randn(n, *data.shape, generator=generator)
        edges = [low + (high - low) * k / bins for k in range(bins + 1)]
        y = data.heldout_labels[order] if conditional and data.heldout_labels is not None else None
        return cls(edges, data.normalised(data.heldout[order]), t, eps, data.sigma_data**2, y)

    def errors(self, denoiser: Denoiser) -> list[float]:
        """The mean squared error of x0 in each bin over the data's variance: 1 is guessing the mean."""
        device = next(denoiser.parameters()).device
        chunk = max(1, min(1024, 2**21 // math.prod(self.x0.shape[1:])))
        found = []
        with evaluating(denoiser):
            for at in torch.arange(len(self.t)).split(chunk):
                x0, eps, t = self.x0[at].to(device), self.eps[at].to(device), self.t[at]
                if denoiser.conventions.time == "step":
                    t = denoiser.schedule.on_steps(t)  # type: ignore[attr-defined]
                cond = {} if self.y is None else {"y": self.y[at].to(device)}
                mean = denoiser(denoiser.schedule.add_noise(x0, eps, t), t, **cond).mean
                found.append((mean - x0).square().flatten(1).mean(1).double().cpu())
        each = torch.cat(found).reshape(len(self.edges) - 1, -1).mean(1)
        return [float(v) for v in each / self.variance]
