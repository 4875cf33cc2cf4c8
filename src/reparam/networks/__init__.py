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
from .confident import Confident
from .diffusers_model import DiffusersModel
from .jit import JiT
from .mlp import MLP
from .reexpressed import Reexpressed
from .unet import UNet

__all__ = [
    "MLP",
    "NETWORKS",
    "Confident",
    "DiffusersModel",
    "JiT",
    "Reexpressed",
    "UNet",
    "config_of",
    "described",
    "import_factory",
    "is_factory",
    "made_by",
    "network",
    "own_code",
    "own_network",
]

NETWORKS: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "jit": JiT,
    "unet": UNet,
    "confident": Confident,
    "reexpressed": Reexpressed,
    "diffusers": DiffusersModel,
}
#: Where a network that is made of others states them.
PARTS = {"confident": ("base", "head"), "reexpressed": ("of",)}


def is_factory(name: object) -> bool:
    """Whether a network's name is a user's own ``pkg.mod:make``."""
    return isinstance(name, str) and ":" in name


def own_code(config: dict[str, Any]) -> list[str]:
    """The functions ``pkg.mod:make`` of a user's own that making this network runs; none for a built-in one."""
    parts = [config.get(part) for part in PARTS.get(str(config.get("name")), ())]
    named = [str(config["name"])] if is_factory(config.get("name")) else []
    return [*named, *(name for part in parts if isinstance(part, dict) for name in own_code(part))]


def own_network(config: dict[str, Any]) -> nn.Module | None:
    """The network of a recipe, for weights to be put into, where it runs code of the user's; None for a built-in one,
    whose config is with the weights."""
    return network({key: value for key, value in config.items() if key != "weights"}) if own_code(config) else None


def described(config: dict[str, Any]) -> str:
    """A network's config for a reader."""
    if config.get("name") == "reexpressed" and all(isinstance(config.get(key), dict) for key in ("of", "source", "to")):
        return f"{described(config['of'])}, from {config['source'].get('name')} to {config['to'].get('name')}"
    rest = ", ".join(f"{key}={value}" for key, value in config.items() if key != "name")
    return f"{config.get('name')}({rest})" if rest else str(config.get("name"))


def config_of(net: nn.Module) -> dict[str, Any] | None:
    """The config from which :func:`network` makes such a network again; None for one that is not built in."""
    if type(net) not in NETWORKS.values():
        return None
    config: dict[str, Any] = dict(net.config)  # type: ignore[arg-type]
    return None if any(config.get(part, {}) is None for part in ("base", "head", "of", "model")) else config


def network(config: dict[str, Any]) -> nn.Module:
    """A network from plain data: ``{name: mlp, dim: 2, …}`` or ``{name: "pkg.mod:make", …}``.

    A factory of the user's is called with the other entries as keyword arguments and returns
    an ``nn.Module``. Modules are looked for in the current folder as well.

    Raises:
        UnknownName: if no network has that name, or it takes no such argument.
        NetworkError: if an argument is missing or out of range, or if the user's factory cannot be imported, or does
            not return a network.
    """
    arguments = dict(config)
    name = arguments.pop("name", None)
    if is_factory(name):
        return made_by(import_factory(str(name)), arguments, str(name))
    if name not in NETWORKS:
        raise unknown("network", name, [*NETWORKS, "pkg.mod:make"])
    known = inspect.signature(NETWORKS[name]).parameters
    for key in arguments:
        if key not in known:
            raise unknown(f"argument of network {name!r}", key, known)
    if missing := [key for key, p in known.items() if p.default is p.empty and key not in arguments]:
        raise NetworkError(f"network {name!r} needs {' and '.join(missing)}; found {config}.")
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
