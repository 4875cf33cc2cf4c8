"""What is kept of a run to be drawn: how sure it was on the way, and eight panels of a mixture in the plane.

``figure.npz`` holds, in the data's units, ``truth``, ``samples`` and ``guided`` samples with the ``view`` (centre and
half width) to show them in; and of a ``zoom``, at the noise level ``zoom_sigma``: the logarithms of the model's,
its guide's and the true density on a grid, row by row from low to high, and ``paths`` of samples from that
level to none, without and with guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Data
from ..data.order import mix
from ..denoiser import Denoiser
from ..errors import TimeOutOfRange, Unsupported
from ..files import written_whole
from ..guidance import Autoguidance
from ..metrics.model import NEAR, Asked, log_density
from ..report.views import View
from ..samplers import GRIDS, Trajectory, sample
from .recipe import RunConfig

#: Of the zoom: the noise level; points of the grid along a side, and steps of the ODE from each; paths; their steps.
_SIGMA, _SIDE, _FLOW, _PATHS, _STEPS = 0.03, 96, 24, 64, 16
#: Fresh data among which those in the zoom are looked for.
_DRAWN = 20_000
#: The published frames of the tree (Karras et al., arXiv 2406.02507): centre and half width of the view and the zoom.
_TREE = (0.30, 0.30, 1.2), (0.45, 1.22, 0.3)

_Frame = tuple[float, float, float]


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """A .npz file.

    Raises:
        OutputError: if it cannot be written.
    """
    with written_whole(path) as temporary:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]


def states_variances(denoiser: Denoiser) -> bool:
    """Whether the model says what variance x0 has given x_t."""
    likelihood = denoiser.conventions.likelihood
    return likelihood is not None and likelihood.of == "x0"


def spreads(way: Trajectory, view: View, reduced: Callable[[Tensor], Tensor]) -> dict[str, np.ndarray]:
    """How sure the model was on the way, for trajectory.npz; nothing where it states no variance.

    Of points ``spread``, the covariance (xx, xy, yy) in the plane that is drawn, float32 [F, m, 3]; of pictures the
    standard deviation (the root of the mean variance over channels), uint8 [F, m, H, W], of which 255 is
    ``spread_max``. The last frame, the sample itself, is all zeros.
    """
    if way.var is None:
        return {}
    if view.kind == "points":
        assert view.basis is not None
        plane = view.basis.double()
        if way.root is not None:
            root = plane.T @ way.root.cpu().double()
            cov = root @ root.mT
        else:
            cov = torch.einsum("...d,di,dj->...ij", way.var.cpu().double(), plane, plane)
        found = torch.stack([cov[..., 0, 0], cov[..., 0, 1], cov[..., 1, 1]], -1).float()
        return {"spread": torch.cat([found, torch.zeros_like(found[:1])]).numpy()}
    var = reduced(way.var.cpu().float().unflatten(2, (-1, *view.image)) if way.var.ndim == 3 else way.var.cpu().float())
    std = var.mean(2).sqrt()
    most = float(std.max())
    if not 0 < most < math.inf:
        return {}
    levels = (std / most * 255).round().to(torch.uint8)
    return {
        "spread": torch.cat([levels, torch.zeros_like(levels[:1])]).numpy(),
        "spread_max": np.asarray(most),
    }


def write_figure(
    folder: Path,
    config: RunConfig,
    data: Data,
    denoiser: Denoiser,
    samples: Tensor,
    guided: Autoguidance | None = None,
    guided_samples: Tensor | None = None,
) -> None:
    """``figure.npz``, for a mixture in the plane and a model that is trained at the zoom's noise level."""
    if data.mixture is None or data.mixture.dim != 2:
        return
    try:
        arrays = _zoomed(config, data, denoiser, guided)
    except (TimeOutOfRange, Unsupported):  # not trained there, or without a gradient in x
        return
    view, _ = _frames(config, data)
    found = {"samples": samples} | ({} if guided_samples is None else {"guided": guided_samples})
    write_arrays(
        folder / "figure.npz",
        truth=data.fresh(len(samples)).numpy(),
        view=np.asarray(view),
        **{name: x.numpy() for name, x in found.items()},
        **arrays,
    )


def _frames(config: RunConfig, data: Data) -> tuple[_Frame, _Frame]:
    """Centre and half width of the whole and of a detail."""
    if config.data.get("name") == "tree" and config.data.get("which", "a") == "a":
        return _TREE
    assert data.mixture is not None
    means = data.mixture.means
    low, high = means.amin(0), means.amax(0)
    x, y = ((low + high) / 2).tolist()
    half = 1.15 * float((high - low).max()) / 2
    at = means[(means - data.mixture.mean).square().sum(1).argmax()].tolist()
    return (x, y, half), (at[0], at[1], half / 4)


def _zoomed(config: RunConfig, data: Data, denoiser: Denoiser, guided: Autoguidance | None) -> dict[str, np.ndarray]:
    """Densities and paths in the zoom."""
    mixture, schedule = data.mixture, denoiser.schedule
    assert mixture is not None
    _, zoom = _frames(config, data)
    low, high = denoiser.t_range
    ends = config.sample.ends(schedule, (low, high))
    at, last, first = (
        float(schedule.time_at(-2 * math.log(_SIGMA))),
        ends.get("last", low or NEAR),
        ends.get("start", high),
    )
    if not last < at < first:
        raise TimeOutOfRange(f"the noise level {_SIGMA:g} lies outside of where samples pass.")
    grid, alpha = _grid(zoom), float(schedule.alpha(at))  # densities are drawn of x_t/alpha
    asked = Asked(data, lambda u: u, (at, first))

    def density(of: Denoiser) -> np.ndarray:
        device = next(of.parameters()).device
        found = log_density(of, (alpha * grid).to(device), at, first, asked, _FLOW)
        return _square(found + grid.shape[1] * math.log(alpha))

    found: dict[str, Any] = {
        "zoom": np.asarray(zoom),
        "zoom_sigma": np.asarray(_SIGMA),
        "log_density": density(denoiser),
        "truth_log_density": _square(mixture.log_prob(grid.double(), _SIGMA)),
        "paths": _paths(config, data, denoiser, zoom, (at, last)),
    }
    if guided is not None:
        found["guide_log_density"] = density(guided.guide)
        found["guided_paths"] = _paths(config, data, guided, zoom, (at, last))
    return found


def _grid(zoom: _Frame) -> Tensor:
    """Points of the zoom, row by row from low to high; float32 [n·n, 2]."""
    x, y, half = zoom
    along = torch.linspace(-half, half, _SIDE)
    rows, columns = torch.meshgrid(y + along, x + along, indexing="ij")
    return torch.stack([columns.flatten(), rows.flatten()], 1)


def _square(values: Tensor) -> np.ndarray:
    found: np.ndarray = values.cpu().float().reshape(_SIDE, _SIDE).numpy()
    return found


def _paths(config: RunConfig, data: Data, denoiser: Denoiser, zoom: _Frame, ends: tuple[float, float]) -> np.ndarray:
    """Samples from data with the zoom's noise, of those that begin inside, step by step; float32 [F, m, 2]."""
    schedule, (at, last) = denoiser.schedule, ends
    assert data.mixture is not None
    clean = data.mixture.draw(_DRAWN, [data.seed, 0x200])
    generator = torch.Generator().manual_seed(mix(0, 0x201))
    x_t = schedule.add_noise(clean, torch.randn(clean.shape, generator=generator), at)
    x = x_t / float(schedule.alpha(at))
    inside = ((x - torch.tensor(zoom[:2])).abs() < zoom[2]).all(1)
    times = GRIDS["karras"](denoiser, _STEPS, start=at, last=last)
    device = next(denoiser.parameters()).device
    way = sample(
        denoiser,
        start=x_t[inside][:_PATHS].to(device),
        times=times,
        sampler=config.sample.method(),
        generator=torch.Generator(device).manual_seed(mix(0, 0x202)),
        trajectory=True,
    )
    assert isinstance(way, Trajectory)
    alphas = schedule.alpha(torch.tensor(way.times, dtype=torch.float64)).float()
    found: np.ndarray = (way.states.cpu() / alphas[:, None, None]).numpy()
    return found
