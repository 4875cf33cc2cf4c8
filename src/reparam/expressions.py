"""Formulas written as text, read by a parser that can do nothing else.

``"-sigma"``, ``"alpha / (alpha**2 + sigma**2)**0.5"``, ``"cos(pi * t / 2)"``: numbers, the names that
the caller allows, + − * / **, brackets, and the functions below.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .errors import ReparamError, unknown

CONSTANTS = {"pi": math.pi, "e": math.e}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    name: getattr(torch, name)
    for name in ("sqrt", "exp", "log", "sin", "cos", "tan", "atan", "tanh", "sigmoid", "abs", "log1p", "expm1")
}
_BINARY: dict[type[ast.operator], Callable[[Tensor, Tensor], Tensor]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Tensor], Tensor]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
#: A formula is a line, not a program.
_LONGEST = 500


def parsed(text: str, names: Sequence[str]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The function of ``names`` that a formula stands for: from their values, of one shape, to one of it.

    Raises:
        ReparamError: if it is not a formula, or names something that is not there.
    """
    if len(text) > _LONGEST:
        raise ReparamError(f"a formula may have {_LONGEST} characters, found {len(text)}.")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise ReparamError(f"{text!r} is not a formula such as '-sigma' or 'alpha / sqrt(1 + snr)'.") from e
    _check(tree, text, names)
    return lambda values: _value(tree, values)


def _check(node: ast.expr, text: str, names: Sequence[str]) -> None:
    """Refuse whatever is no formula, before anything is computed."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            raise ReparamError(f"{node.value!r} in {text!r} is not a number.")
    elif isinstance(node, ast.Name):
        if node.id not in names and node.id not in CONSTANTS:
            raise unknown(f"name in the formula {text!r}:", node.id, [*names, *CONSTANTS])
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        _check(node.left, text, names)
        _check(node.right, text, names)
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        _check(node.operand, text, names)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id not in FUNCTIONS:
            raise unknown(f"function in the formula {text!r}:", node.func.id, FUNCTIONS)
        if len(node.args) != 1 or node.keywords:
            raise ReparamError(f"{node.func.id} in {text!r} takes one argument.")
        _check(node.args[0], text, names)
    else:
        raise ReparamError(
            f"{text!r} has a part that is no formula ({type(node).__name__}); a formula has numbers, names "
            f"({', '.join([*names, *CONSTANTS])}), + - * / **, brackets and {', '.join(FUNCTIONS)}."
        )


def _value(node: ast.expr, values: Mapping[str, Tensor]) -> Tensor:
    if isinstance(node, ast.Constant):
        return torch.full_like(next(iter(values.values())), float(node.value))  # type: ignore[arg-type]
    if isinstance(node, ast.Name):
        constant = CONSTANTS.get(node.id)
        return values[node.id] if constant is None else torch.full_like(next(iter(values.values())), constant)
    if isinstance(node, ast.BinOp):
        return _BINARY[type(node.op)](_value(node.left, values), _value(node.right, values))
    if isinstance(node, ast.UnaryOp):
        return _UNARY[type(node.op)](_value(node.operand, values))
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Name)
    return FUNCTIONS[node.func.id](_value(node.args[0], values))
