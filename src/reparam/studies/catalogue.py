"""The table of all built-in recipes; ``python -m reparam.studies.catalogue docs/recipes.md`` writes it there."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import OutputError, RecipeError
from ..files import write_text
from .published import About
from .recipe import built_in, read_recipe

_BEGIN, _END = "<!-- all recipes: written by python -m reparam.studies.catalogue -->", "<!-- end of all recipes -->"


def table() -> str:
    """All built-in recipes in Markdown: what each compares, what it takes, what it should come to, and the source."""
    lines = ["| recipe | what | hardware | expected | source | `--tiny` |", "|---|---|---|---|---|---|"]
    for name in built_in():
        raw = read_recipe(name)
        about = About.of(raw.get("about") or {})
        cells = [f"`{name}`", str(raw.get("description", "")), about.hardware, about.expected, about.source]
        cells.append("yes" if _has_tiny(name) else "")
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _has_tiny(name: str) -> bool:
    """Whether it has a small version, its own or that of the one it extends."""
    try:
        read_recipe(name, tiny=True)
    except RecipeError:
        return False
    return True


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or "–"


def written(text: str) -> str:
    """A page with the table between its two marks.

    Raises:
        OutputError: if they are not there.
    """
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise OutputError(f"the page has no place for the table: expected {_BEGIN} and {_END}.")
    return f"{before}{begin}\n\n{table()}\n\n{end}{after}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    write_text(page, written(page.read_text(encoding="utf-8")))
