"""The size of every SVG picture stands in the page, so that nothing moves when the picture arrives."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any


def size(svg: Path) -> tuple[int, int]:
    """Width and height of a picture, from its view box."""
    _, _, width, height = map(float, ElementTree.parse(svg).getroot().attrib["viewBox"].split())
    return round(width), round(height)


def add_sizes(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    def sized(tag: re.Match[str]) -> str:
        width, height = size(Path(app.srcdir) / tag["name"])
        return f'{tag[0]} width="{width}" height="{height}" loading="lazy"'

    if "body" in context:
        context["body"] = re.sub(r'<img (?:[^>]*? )?src="[^"]*_images/(?P<name>[^"]+\.svg)"', sized, context["body"])


def setup(app: Any) -> dict[str, Any]:
    app.connect("html-page-context", add_sizes)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
