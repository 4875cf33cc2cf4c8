"""The table of all built-in recipes; ``python -m reparam.studies.catalogue docs/recipes.md`` writes it there."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import OutputError, RecipeError
from ..files import write_text
from .published import About
from .recipe import built_in, read_recipe

_BEGIN, _END = "<!-- all recipes: written by python -m reparam.studies.catalogue -->", "<!-- end of all recipes -->"


#: The parts of the table, by how the names in them begin; what begins otherwise is in the first.
_FIRST = "Small ones, and starts"
_PARTS = {
    "cifar10-unet": "The task on CIFAR-10",
    "cifar10-parameterization": "The task on CIFAR-10",
    "imagenet": "JiT on ImageNet",
    "jit-ablation": "JiT's ablations",
}


def table() -> str:
    """All built-in recipes in Markdown, in parts: what each compares, what it takes and what it should come to."""
    parts: dict[str, list[str]] = {title: [] for title in (_FIRST, *_PARTS.values())}
    for name in built_in():
        title = next((title for start, title in _PARTS.items() if name.startswith(start)), _FIRST)
        parts[title].append(name)
    return "\n\n".join(_part(title, names) for title, names in parts.items())


def _part(title: str, names: list[str]) -> str:
    """A part of the table, with a line above of what all of its recipes have in common."""
    raws = {name: read_recipe(name) for name in names}
    abouts = {name: About.of(raw.get("about") or {}) for name, raw in raws.items()}
    sources, hardware = ({getattr(about, key) for about in abouts.values()} for key in ("source", "hardware"))
    same = [
        f"{key}: {next(iter(all_of))}"
        for key, all_of in (("Source", sources), ("Hardware", hardware))
        if len(all_of) == 1
    ]
    small = [name for name in names if _has_tiny(name)]
    same += ["all have `--tiny`"] if small == names else []
    kept = [key for key, all_of in (("hardware", hardware), ("source", sources)) if len(all_of) > 1]
    columns = ["recipe", "what", "expected", *kept]
    lines = [f"**{title}**" + (f" ({'; '.join(same)})" if same else ""), ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, about in abouts.items():
        tiny = "" if name not in small or small == names else ", `--tiny`"
        cells = [f"`{name}`{tiny}", str(raws[name].get("description", "")), about.expected]
        lines.append("| " + " | ".join(map(_cell, [*cells, *(getattr(about, key) for key in kept)])) + " |")
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
