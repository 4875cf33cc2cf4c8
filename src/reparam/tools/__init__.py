"""Tools that look at a target, a checkpoint or a setting and say what they found."""

from .check import Check, check

__all__ = ["Check", "check"]
