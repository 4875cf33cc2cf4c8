"""Formulas as MathML, made when the site is built: browsers show it by themselves, and screen readers read it."""

from __future__ import annotations

import html
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.errors import ExtensionError
from sphinx.util import logging

logger = logging.getLogger(__name__)


def mathml(latex: str, display: bool, where: nodes.Element) -> str:
    """The formula; one that cannot be read is a warning, and with warnings as errors ends the build."""
    try:
        element = convert(latex, display="block" if display else "inline")
    except Exception as error:  # the converter has no base class for what it raises
        logger.warning("formula %r cannot be read: %r", latex, error, location=where)
        return f"<code>{html.escape(latex)}</code>"
    if "\\" in element:
        logger.warning("formula %r has a command that is not known", latex, location=where)
    return element.replace("<math ", f'<math alttext="{html.escape(latex, quote=True)}" ', 1)


def visit_math(translator: Any, node: nodes.Element) -> None:
    translator.body.append(mathml(node.astext(), False, node))
    raise nodes.SkipNode


def visit_block(translator: Any, node: nodes.Element) -> None:
    if node.get("number") is not None:
        raise ExtensionError("numbered formulas are not supported: give the formula a heading to link to")
    formula = mathml(node.astext(), True, node)
    # Wide formulas scroll in place (site.css), by keyboard as well in Firefox and in Chromium from 130, which
    # give what scrolls a tab stop.
    translator.body.append(f'<div class="formula">{formula}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
