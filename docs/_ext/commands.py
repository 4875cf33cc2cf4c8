"""The directive `commands`: the help of every command, as the program itself prints it."""

from __future__ import annotations

import os
from typing import Any, ClassVar
from unittest import mock

from docutils import nodes
from docutils.parsers.rst import Directive

from reparam.cli import _parser


class Commands(Directive):
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        # argparse wraps, and colours, for the terminal that builds the site
        with mock.patch.dict(os.environ, COLUMNS="88", NO_COLOR="1"):
            parsers = next(action for action in _parser()._actions if action.dest == "command").choices
            return [self._section(name, parser.format_help()) for name, parser in parsers.items()]

    def _section(self, name: str, text: str) -> nodes.Node:
        section = nodes.section(ids=[name], names=[name])
        section += nodes.title("", f"reparam {name}")
        section += nodes.literal_block(text, text, language="none", classes=["help"])
        self.state.document.note_explicit_target(section, section)
        return section


def setup(app: Any) -> dict[str, Any]:
    app.add_directive("commands", Commands)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
