"""The lesson's parts, for its tests: docs/lesson holds programs, and is no package."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

LESSON = Path(__file__).parents[1] / "docs" / "lesson"
TARGETS = ("x0", "eps", "v", "velocity", "score")


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"lesson_{name}", LESSON / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


build, figures = module("build"), module("figures")


def luminance(colour: Sequence[float]) -> float:
    """The relative luminance of WCAG 2, of red, green and blue in 0 … 255."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
