r"""From noise to data.

A sampler is a class with an ``order`` and a ``step``; :func:`sample` walks it along a grid of
falling times (:mod:`~reparam.samplers.grids`). Every step works from the x0 estimate, in float32
or better, with coefficients computed in float64 once for the whole grid; a step to t = 0 returns
that estimate, so that nothing is ever divided by σ = 0.
"""

from __future__ import annotations

from . import grids, profile
from .ddim import DDIM, Ancestral
from .dpm import DPMpp2M, SDEDPMpp2M
from .grids import GRIDS
from .grids import linear as grid
from .ode import EDM, Euler, Heun
from .profile import ErrorProfile
from .sampling import SAMPLERS, Trajectory, named, sample
from .steps import Before, Level, Linear, Row, Sampler, Step, levels
from .thresholding import THRESHOLDS, Clipped, DynamicallyClipped

__all__ = [
    "DDIM",
    "EDM",
    "GRIDS",
    "SAMPLERS",
    "THRESHOLDS",
    "Ancestral",
    "Before",
    "Clipped",
    "DPMpp2M",
    "DynamicallyClipped",
    "ErrorProfile",
    "Euler",
    "Heun",
    "Level",
    "Linear",
    "Row",
    "SDEDPMpp2M",
    "Sampler",
    "Step",
    "Trajectory",
    "grid",
    "grids",
    "levels",
    "named",
    "profile",
    "sample",
]
