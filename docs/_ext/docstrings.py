"""Docstrings as they are written for a reader of the code: |Δ| is an absolute value in them, no substitution."""

from __future__ import annotations

import re
from typing import Any

# What is marked as code or as a formula is left alone.
_MARKED = re.compile(r"(``.+?``|:\w+:`[^`]*`|`[^`]*`)")


def _escaped(line: str) -> str:
    parts = _MARKED.split(line)
    return "".join(part if i % 2 else part.replace("|", r"\|") for i, part in enumerate(parts))


def escape_bars(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    in_formula = False
    for i, line in enumerate(lines):
        if line.lstrip().startswith(".. math::"):
            in_formula = True
        elif line and not line.startswith(" "):
            in_formula = False
        if not in_formula:
            lines[i] = _escaped(line)


def setup(app: Any) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", escape_bars)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
