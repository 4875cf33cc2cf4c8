"""What the caller brings to a study or a training, and what is said of it before it starts."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..data import Data, from_array
from ..errors import DataError, NetworkError
from ..metrics import Reference
from ..networks import NETWORKS, is_factory, own_code
from ..samplers.thresholding import refuse_cut
from .confidence import check_base
from .recipe import Recipe, data_named
from .run import data_of, make_network, scored


@dataclass(frozen=True)
class Inputs:
    """What the caller brings: names for the recipe, and objects that stay in this process."""

    data: Data | None = None
    data_config: dict[str, Any] | None = None
    factory: Callable[..., nn.Module] | None = None
    network_name: str | None = None

    @classmethod
    def of(cls, data: Any, network: Any) -> Inputs:
        config = data_named(str(data)) if isinstance(data, str | Path) else None
        held = None if data is None or config else _data_from(data)
        if network is None or isinstance(network, str):
            return cls(held, config, None, network)
        if isinstance(network, nn.Module):
            return cls(held, config, lambda **_: copy.deepcopy(network), type(network).__name__)
        if not callable(network):
            raise NetworkError(f"network must be a name, a module or a function, found {type(network).__name__}.")
        return cls(held, config, network, getattr(network, "__name__", "network"))

    @property
    def in_process(self) -> bool:
        return self.data is not None or self.factory is not None

    @property
    def networks(self) -> tuple[str, ...]:
        return (self.network_name,) if self.factory and self.network_name else ()

    @property
    def data_names(self) -> tuple[str, ...]:
        return ("given",) if self.data is not None else ()

    def into(self, raw: dict[str, Any]) -> dict[str, Any]:
        """The recipe with the caller's names in the place of its own."""
        if self.data is not None:
            raw["data"] = {"name": "given"}
        elif self.data_config is not None:
            before = raw.get("data")
            if isinstance(before, dict) and before.get("name") == self.data_config["name"]:
                raw["data"] = {**before, **self.data_config}  # how to read them stays
            else:
                raw["data"] = self.data_config
        if self.network_name is not None:
            raw["network"] = {"name": self.network_name}
        return raw


def _data_from(array: Any) -> Data:
    if not isinstance(array, np.ndarray | Tensor):
        raise DataError(f"data must be a path or an array, found {type(array).__name__}.")
    return from_array(array)


def preflight(plan: Recipe, own: Inputs, say: Callable[[str], None]) -> dict[str, str]:
    """Load each data set, say what it is, announce code of the user's; digests by data."""
    digests: dict[str, str] = {}
    for config in plan.runs.values():
        check_base(config)
        mine = own.data or data_of(config)
        key = json.dumps(config.data, sort_keys=True)
        if key not in digests:
            digests[key] = mine.digest
            say(f"  {mine.preflight()}")
            if (n := scored(config, mine)) < config.sample.n:
                say(f"  {n} samples are scored, as many as pictures or vectors are held out, not {config.sample.n}")
            if not mine.pictures and (not 0.05 < mine.flat(mine.train).std() < 20 or abs(mine.train.mean()) > 3):
                say("  warning: these data are far from unit scale, where the noise is; consider data.normalise: scale")
        if config.sample.threshold != "none":
            record = mine.record()
            refuse_cut(record["min"], record["max"])
    for what in ("network", "extractor"):
        parts = [part for c in plan.runs.values() if (part := getattr(c, what))]
        for name in sorted({name for part in parts for name in own_code(part)}):
            say(f"  running your code: {what} {name}")
        if config.extractor and is_factory(config.extractor["name"]) and mine.pictures:
            digests["extractor"] = Reference(mine, config.extractor).extractor.digest
    for path in sorted({str(c.target["path"]) for c in plan.runs.values() if c.target.get("name") == "file"}):
        say(f"  running your code: target {path}")
        digests[f"target {path}"] = hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()[:16]
    for config in plan.runs.values():
        key = json.dumps(config.network, sort_keys=True)
        if key not in digests and (config.network["name"] not in NETWORKS or "weights" in config.network):
            digests[key] = _fingerprint(make_network(config, own.data or data_of(config), own.factory))
    return digests


def _fingerprint(net: nn.Module) -> str:
    """A hash of a network of the user's, or of one that begins with weights: its printed form and its first weights."""
    found = hashlib.sha256(repr(net).encode())
    for name, value in net.state_dict().items():
        found.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
