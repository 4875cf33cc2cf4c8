"""Tools that look at a target, a checkpoint or a setting and say what they found."""

from .check import Check, check
from .identify import Identified, identify

__all__ = ["Check", "Identified", "check", "identify"]
