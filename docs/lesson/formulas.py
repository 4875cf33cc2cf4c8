"""What the lesson shows without training anything: digits, noise, schedules, targets and weightings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import reparam as rp
from reparam.data import Data, load_data

#: Log-SNRs at which weightings are drawn.
LAMBDA = torch.linspace(-10, 10, 81, dtype=torch.float64)
SCHEDULES = {"rectified_flow": "Rectified flow", "cosine": "Cosine", "ddpm": "DDPM, linear betas"}


def digits() -> Data:
    """scikit-learn's scans as vectors of 64 numbers in [−1, 1]; a quarter of them is held out of training."""
    return load_data({"name": "digits"})


def u8(x: Tensor, half_width: float = 1.0) -> Any:
    """Values in [−half_width, half_width] as nested lists of bytes; what lies outside is cut off, no number is grey."""
    level = (x.double() / half_width).nan_to_num(0.0).clamp(-1, 1)
    return ((level + 1) * 127.5).round().to(torch.int64).tolist()


def rounded(values: Tensor | Sequence[Any] | float, digits: int = 4) -> Any:
    """Numbers to so many significant digits, in nested lists; what is not finite is None."""
    if isinstance(values, Tensor):
        values = values.tolist()
    if isinstance(values, Sequence):
        return [rounded(v, digits) for v in values]
    if not math.isfinite(values):
        return None
    short = float(f"{values:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e9 else short


def scans() -> list[dict[str, Any]]:
    """The first held-out scan of every class."""
    data = digits()
    assert data.heldout_labels is not None
    first = [int((data.heldout_labels == label).nonzero()[0]) for label in range(10)]
    return [{"label": label, "pixels": u8(data.heldout[i])} for label, i in enumerate(first)]


def noise() -> list[list[float]]:
    """Four draws of standard normal noise, of a digit's size."""
    draws = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [[round(v, 3) for v in draw] for draw in draws.tolist()]


def schedules() -> dict[str, dict[str, Any]]:
    """α, σ and their derivatives on an even grid of times."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    found = {}
    for name, label in SCHEDULES.items():
        s = rp.schedule(name)
        columns = {"alpha": s.alpha(t), "sigma": s.sigma(t), "alpha_dot": s.alpha_dot(t), "sigma_dot": s.sigma_dot(t)}
        found[name] = {"label": label, "t": rounded(t), **{k: rounded(v, 6) for k, v in columns.items()}}
    found["ddpm"]["note"] = (
        "A table of 1,000 steps, joined up here: the angle between signal and noise is linear from one step to the "
        "next. Its derivatives jump from step to step, and at t = 1 a signal of 0.6 % is left."
    )
    return found


class Row(NamedTuple):
    """A weighting, and the setting that it is drawn in.

    Attributes:
        formula: LaTeX of m_x, the weight on the x0-error.
        published: whether schedule and times are those that it was published with; otherwise they are ours.
    """

    name: str
    label: str
    formula: str
    schedule: str
    weighting: Any
    times: Any
    published: bool
    source: str


_UNIFORM = "uniform"
_HO, _SALIMANS = "Ho et al., arXiv 2006.11239", "Salimans and Ho, arXiv 2202.00512"
_EDM = r"\frac{\sigma_r^2+\sigma_d^2}{(\sigma_r\sigma_d)^2}"
_SD3 = {"name": "logit_normal", "mean": 0.0, "std": 1.0}
_JIT = {"name": "logit_normal", "mean": 0.8, "std": 0.8}
_FLOW, _VP = "rectified_flow", "cosine"
#: σ_r is σ/α, the noise in units of the signal, and SNR is 1/σ_r².
ROWS = (
    Row("x0", "x₀-MSE", "1", _VP, "x0", _UNIFORM, True, _SALIMANS),
    Row("eps", "ε-MSE (DDPM)", r"\mathrm{SNR}", "ddpm", "eps", _UNIFORM, True, _HO),
    Row("v", "v-MSE", r"\mathrm{SNR}+1", _VP, "v", _UNIFORM, True, _SALIMANS),
    Row("snr_trunc", "truncated SNR", r"\max(\mathrm{SNR},1)", _VP, "snr_trunc", _UNIFORM, True, _SALIMANS),
    Row("hybrid", "hybrid, x₀ + 0.1 ε", r"1+0.1\,\mathrm{SNR}", _VP, {"x0": 1, "eps": 0.1}, _UNIFORM, False, "ours"),
    Row(
        *("velocity", "velocity-MSE, uniform times", r"1/t^2", _FLOW, "velocity", _UNIFORM, True),
        "Liu et al., arXiv 2209.03003; Lipman et al., arXiv 2210.02747",
    ),
    Row(
        *("velocity_sd3", "velocity-MSE, SD3's times", r"1/t^2", _FLOW, "velocity", _SD3, True),
        "Esser et al., arXiv 2403.03206",
    ),
    Row(
        *("jit", "JiT: velocity, capped", r"1/\max(t,0.05)^2", _FLOW),
        *({"name": "capped", "base": "velocity", "cap": 400}, _JIT, True, "Li and He, arXiv 2511.13720"),
    ),
    Row(
        *("min_snr", "Min-SNR, γ = 5", r"\min(\mathrm{SNR},5)", _VP, {"name": "min_snr", "gamma": 5.0}, _UNIFORM),
        *(False, "Hang et al., arXiv 2303.09556"),
    ),
    Row(
        *("soft_min_snr", "soft Min-SNR, γ = 4", r"\frac{4\,\mathrm{SNR}}{\mathrm{SNR}+4}", _VP),
        *({"name": "soft_min_snr", "gamma": 4.0}, _UNIFORM, False, "Crowson et al., arXiv 2401.11605"),
    ),
    Row(
        *("p2", "P2, k = 1, γ = 1", r"\frac{\mathrm{SNR}}{1+\mathrm{SNR}}", "ddpm", {"name": "p2"}, _UNIFORM),
        *(False, "Choi et al., arXiv 2204.00227"),
    ),
    Row(
        *("sigmoid", "sigmoid, b = 0", r"\mathrm{SNR}\cdot\frac{\mathrm{sigmoid}(-\lambda)}{p(\lambda)}", _VP),
        *({"name": "sigmoid", "bias": 0.0}, _UNIFORM, False, "Kingma and Gao, arXiv 2303.00848"),
    ),
    Row(
        *("edm", "EDM, σ_d = 0.5", _EDM, _FLOW, {"name": "edm", "sigma_data": 0.5}),
        *({"name": "log_normal_sigma", "mean": -1.2, "std": 1.2}, True, "Karras et al., arXiv 2206.00364"),
    ),
    Row(
        *("edm2", "EDM2, u learned on the digits", _EDM + r"\,e^{-u(\lambda)}", _FLOW),
        *({"name": "edm", "sigma_data": 0.5}, {"name": "log_normal_sigma", "mean": -0.4, "std": 1.0}),
        *(True, "Karras et al., arXiv 2312.02696"),
    ),
    Row(
        *("score", "score-MSE, unweighted", r"\alpha^2/\sigma^4", _VP, "score", _UNIFORM, False),
        "nobody trains it: it is dominated by the least noise",
    ),
)


def weightings(u: Tensor | None = None) -> list[dict[str, Any]]:
    """Every weighting at :data:`LAMBDA`: m_x and w = p(λ) m_ε, by which two objectives are one.

    Args:
        u: EDM2's learned logarithm of the loss, at the same log-SNRs; 0 if not given.
    """
    return [_drawn(row, u if row.name == "edm2" else None) for row in ROWS]


def _to_one(w: Tensor) -> Any:
    return rounded((w / w.max()).clamp(min=1e-12), 3)


def _drawn(row: Row, u: Tensor | None) -> dict[str, Any]:
    objective = rp.Objective(row.schedule, "v", weighting=row.weighting, times=row.times)
    t = objective.schedule.time_at(LAMBDA)
    m_x, w = objective.weighting(t, objective.schedule), rp.weightings.effective(objective, LAMBDA)
    if u is not None:
        m_x, w = m_x * torch.exp(-u), w * torch.exp(-u)
    if row.schedule == "ddpm":  # whose table draws no time before its first step
        w = torch.where(t < 1 / objective.schedule.T, 0.0, w)  # type: ignore[attr-defined]
    found = {
        "name": row.name,
        "label": row.label,
        "formula": row.formula,
        "schedule": row.schedule,
        "times": row.times if isinstance(row.times, str) else row.times["name"],
        "times_arguments": {} if isinstance(row.times, str) else {k: v for k, v in row.times.items() if k != "name"},
        "published": row.published,
        "source": row.source,
        "m_x": rounded(m_x),
        "w": _to_one(w),
    }
    return found if u is None else found | {"u": rounded(u)}
