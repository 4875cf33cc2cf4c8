"""What the network predicts: see :mod:`reparam.targets.core` for the one idea."""

from .basis import Basis, InBasis, principal
from .core import (
    ALIASES,
    TARGETS,
    X0,
    Amplification,
    Eps,
    Target,
    aligned,
    coefficients,
    combined,
    convert,
    target,
)
from .file import File
from .linear import EDM, KTarget, Linear, Negated, Score, V, Velocity

TARGETS |= {c.name: c for c in (V, Velocity, Score, EDM, Linear, KTarget, Negated, InBasis, File)}

__all__ = [
    "ALIASES",
    "EDM",
    "TARGETS",
    "X0",
    "Amplification",
    "Basis",
    "Eps",
    "File",
    "InBasis",
    "KTarget",
    "Linear",
    "Negated",
    "Score",
    "Target",
    "V",
    "Velocity",
    "aligned",
    "coefficients",
    "combined",
    "convert",
    "principal",
    "target",
]
