"""Networks: called as ``net(x, time, **cond)``; they know nothing of targets."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import NetworkError, ReparamError, unknown
from .jit import JiT
from .mlp import MLP
from .unet import UNet

__all__ = ["MLP", "NETWORKS", "JiT", "UNet", "import_factory", "is_factory", "made_by", "network"]

NETWORKS: dict[str, type[nn.Module]] = {"mlp": MLP, "jit": JiT, "unet": UNet}


def is_factory(name: object) -> bool:
    """Whether a network's name is a user's own ``pkg.mod:make``."""
    return isinstance(name, str) and ":" in name


def network(config: dict[str, Any]) -> nn.Module:
    """A network from plain data: ``{name: mlp, dim: 2, …}`` or ``{name: "pkg.mod:make", …}``.

    A factory of the user's is called with the other entries as keyword arguments and returns
    an ``nn.Module``. Modules are looked for in the current folder as well.

    Raises:
        UnknownName: if no network has that name, or it takes no such argument.
        NetworkError: if the user's factory cannot be imported, or does not return a network.
    """
    arguments = dict(config)
    name = arguments.pop("name", None)
    if is_factory(name):
        return made_by(import_factory(str(name)), arguments, str(name))
    if name not in NETWORKS:
        raise unknown("network", name, [*NETWORKS, "pkg.mod:make"])
    known = list(inspect.signature(NETWORKS[name]).parameters)
    for key in arguments:
        if key not in known:
            raise unknown(f"argument of network {name!r}", key, known)
    return NETWORKS[name](**arguments)


def import_factory(path: str, what: str = "network") -> Callable[..., Any]:
    """What ``pkg.mod:make`` names, looked for in the current folder as well.

    Raises:
        NetworkError: if it cannot be imported.
    """
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make: Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as e:
        raise NetworkError(
            f"cannot import {what} {path!r}: {e}. Expected 'package.module:function', importable from the "
            "current folder or installed."
        ) from e
    return make


def made_by(make: Callable[..., Any], arguments: dict[str, Any], name: str) -> nn.Module:
    """A network of its own from a user's function: a copy, should the function return one and the same.

    Raises:
        NetworkError: if the function fails, or returns something else.
    """
    try:
        net = make(**arguments)
    except ReparamError:
        raise
    except Exception as e:
        raise NetworkError(f"network {name!r} could not be made with {arguments}: {e!r}.") from e
    if not isinstance(net, nn.Module):
        raise NetworkError(f"network {name!r} returned {type(net).__name__}, expected a torch.nn.Module.")
    if not any(p.requires_grad for p in net.parameters()):
        raise NetworkError(f"network {name!r} has no parameters to train.")
    return copy.deepcopy(net)
