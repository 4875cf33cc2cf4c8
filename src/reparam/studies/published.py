"""What a recipe says of itself, and the published numbers that its runs stand beside."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ..errors import RecipeError, unknown


@dataclass(frozen=True)
class About:
    """What a reader of a recipe must know; nothing of it changes a result.

    Attributes:
        source: what is reproduced, and where that is described.
        hardware: what a run takes. expected: what it should come to.
        unsaid: what the source leaves open, and what was chosen.
    """

    source: str = ""
    hardware: str = ""
    expected: str = ""
    unsaid: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: Any) -> About:
        """A recipe's ``about``.

        Raises:
            RecipeError, UnknownName: if it is anything but a mapping of texts.
        """
        _check_mapping("about", given, [f.name for f in fields(cls)])
        unsaid = given.get("unsaid") or []
        if not isinstance(unsaid, list) or not all(isinstance(text, str) for text in unsaid):
            raise RecipeError(f"about.unsaid: expected a list of texts, found {unsaid!r}.")
        texts = {key: _text(f"about.{key}", given.get(key) or "") for key in ("source", "hardware", "expected")}
        return cls(**texts, unsaid=tuple(_text("about.unsaid", text) for text in unsaid))

    def lines(self) -> list[str]:
        """For a reader of the command line."""
        said = [
            ("source", self.source),
            ("hardware", self.hardware),
            ("expected of the recipe as it is written", self.expected),
        ]
        return [f"  {what}: {text}" for what, text in said if text] + [f"  unsaid: {text}" for text in self.unsaid]


@dataclass(frozen=True)
class Published:
    """A number that others published, which is not measured here.

    Attributes:
        label: what was run. metric: what was measured, and how. value: what came of it; None if it failed.
        source: where it is published. run: the run of the recipe that it stands beside, or nothing.
    """

    label: str
    metric: str
    value: float | None
    source: str
    run: str = ""

    @classmethod
    def of(cls, given: Any, where: str) -> Published:
        """An entry of a recipe's ``published``.

        Raises:
            RecipeError, UnknownName: if it is malformed.
        """
        names = [f.name for f in fields(cls)]
        _check_mapping(where, given, names)
        if missing := [name for name in names if name != "run" and name not in given]:
            raise RecipeError(f"{where}: {', '.join(missing)} missing; expected label, metric, value and source.")
        value = given["value"]
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
        ):
            raise RecipeError(f"{where}.value: expected a number, or null for a run that failed, found {value!r}.")
        texts = {name: _text(f"{where}.{name}", given.get(name) or "") for name in names if name != "value"}
        if empty := [name for name in ("label", "metric", "source") if not texts[name]]:
            raise RecipeError(f"{where}.{empty[0]}: expected text, found {given[empty[0]]!r}.")
        return cls(**texts, value=None if value is None else float(value))


def published_of(given: Any) -> tuple[Published, ...]:
    """A recipe's ``published``.

    Raises:
        RecipeError, UnknownName: if it is malformed.
    """
    if not isinstance(given, list):
        raise RecipeError(f"published: expected a list of {{label, metric, value, source}}, found {given!r}.")
    return tuple(Published.of(entry, f"published.{i}") for i, entry in enumerate(given))


def _check_mapping(where: str, given: Any, known: list[str]) -> None:
    if not isinstance(given, dict):
        raise RecipeError(f"{where}: expected a mapping with {', '.join(known)}, found {given!r}.")
    for key in given:
        if key not in known:
            raise unknown("key", f"{where}.{key}", [f"{where}.{name}" for name in known])


def _text(where: str, given: Any) -> str:
    if not isinstance(given, str):
        raise RecipeError(f"{where}: expected text, found {given!r}.")
    return " ".join(given.split())
