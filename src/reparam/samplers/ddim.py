r"""Steps through the posterior of x_s given x_t and x0, for any two times t > s of any schedule.

With :math:`e = \alpha_t\sigma_s/(\alpha_s\sigma_t)` it is the normal distribution

.. math:: q(x_s \mid x_t, x_0) = N\big(e\tfrac{\sigma_s}{\sigma_t}\,x_t + \alpha_s(1 - e^2)\,x_0,\;
          \sigma_s^2(1 - e^2)\big) .

References:
    DDPM: Ho et al., arXiv 2006.11239, eq. 6 and 7. DDIM: Song et al., arXiv 2010.02502, eq. 12.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..denoiser import Estimate, matched
from ..errors import Unsupported
from .steps import Linear, Row, Step, correlation, lost, sqrt


@dataclass(frozen=True)
class DDIM(Linear):
    r"""x_s = α_s x̂0 + sqrt(σ_s² − η²σ̃²) ε̂ + η σ̃ z, with
    σ̃² = σ_s² (1 − α_t²σ_s²/(α_s²σ_t²)) the variance of x_s given x_t and x0.

    Args:
        eta: 0 for the deterministic sampler, 1 for DDPM's ancestral noise; in [0, 1].
    """

    name: ClassVar[str] = "ddim"
    order: ClassVar[int] = 1
    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise Unsupported(f"DDIM's eta lies in [0, 1], found {self.eta!r}.")

    @property
    def stochastic(self) -> bool:
        """It draws noise where eta > 0."""
        return self.eta > 0

    def row(self, at: Step) -> Row:
        here, to = at.here, at.to
        spread = self.eta * to.sigma * sqrt(lost(at)) if self.eta else None
        rest = to.sigma if spread is None else sqrt(to.sigma**2 - spread**2)
        kept = rest / here.sigma  # the factor on x_t − α_t x̂0 = σ_t ε̂
        return Row(kept, to.alpha - kept * here.alpha, noise=spread)


@dataclass(frozen=True)
class Ancestral(Linear):
    r"""DDPM's ancestral step, with a variance that is fixed or the model's own.

    What the step does not know of x0 adds to the noise: by the law of total variance the best normal
    approximation of x_s given x_t has the mean of the step above and the covariance

    .. math:: \sigma_s^2(1 - e^2)\,I + \alpha_s^2(1 - e^2)^2\,\mathrm{Cov}[x_0 \mid x_t] .

    Args:
        variance: "small", that of x_s given x_t and x0 (β̃: right where the data are one point);
            "large", σ_t² − (α_t/α_s)²σ_s², that of x_t given x_s (β: right where the data are
            unit normal noise); or "learned", the one above, of a model that has a posterior variance.

    References:
        Optimal and learned variances: Bao et al., arXiv 2201.06503 and 2206.07309.
    """

    name: ClassVar[str] = "ancestral"
    order: ClassVar[int] = 1
    variance: str = "small"

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large", "learned"):
            raise Unsupported(
                f"the variance of ancestral steps is 'small', 'large' or 'learned', found {self.variance!r}."
            )

    @property
    def stochastic(self) -> bool:
        """It draws noise at every step but the last."""
        return True

    def row(self, at: Step) -> Row:
        here, to = at.here, at.to
        new = lost(at)
        spread = sqrt(new) * (here.sigma if self.variance == "large" else to.sigma)
        return Row(correlation(at) * to.sigma / here.sigma, to.alpha * new, noise=spread)

    def step(self, x: Tensor, at: Step) -> tuple[Tensor, Estimate]:
        if self.variance != "learned" or at.to.t == 0:
            return super().step(x, at)
        found, row = at.denoise(x, at.here.t), self.row(at)
        assert row.noise is not None
        return found.blend(row.x, row.mean) + _unsure(found, row, at.noise()), found


def _unsure(found: Estimate, row: Row, z: Tensor) -> Tensor:
    """Noise of the covariance noise² I + mean² Cov[x0 | x_t], of unit noise z [B, …].

    Raises:
        Unsupported: if the model has no variance.
    """
    if found.var is None:
        raise Unsupported(
            "ancestral steps with variance='learned' need a model with a posterior variance: one trained with "
            "rp.Gaussian(…, of='x0') (of='noisy' has none of x0), or one attached by reparam train --add-confidence. "
            "Or use variance='small'."
        )
    if found.root is None:
        noise, mean = matched(row.noise, z), matched(row.mean, z)  # type: ignore[arg-type]
        return (noise**2 + mean**2 * found.var).sqrt() * z
    with torch.autocast(z.device.type, enabled=False):
        covariance = row.mean**2 * found.root @ found.root.mT
        covariance = covariance + row.noise**2 * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)  # type: ignore[operator]
        factor, _ = torch.linalg.cholesky_ex(covariance)  # which does not wait for the device to say that it worked
        return (factor @ z[..., None])[..., 0]
