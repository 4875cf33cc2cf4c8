"""A confidence for a run that is finished: its network, frozen, and a head beside it that learns the variance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..confidence import Gaussian, prediction
from ..errors import Conflict, DataError, NetworkError
from ..networks import NETWORKS, is_factory
from ..schedules import schedule
from ..spec import Spec, read_spec, weights_file
from .recipe import RunConfig, from_dict, parse_yaml
from .run import RESULT


def with_confidence(run: str | Path) -> dict[str, Any]:
    """The recipe, as plain data, that learns how sure a run's network is of what it predicts.

    Data, schedule, conventions, labels and training stay the run's; the network becomes ``confident``, with the run's
    averaged weights as its base and a head of the same kind; the target becomes a ``gaussian`` over the run's.

    Args:
        run: the folder of a finished run, or a .safetensors file of it beside its recipe.yaml.

    Raises:
        DataError: if there is no such run, or it is not finished.
        SpecError: if its weights cannot be read.
        Conflict: if it has a likelihood already.
        NetworkError: if its network was an object, which nothing here could make again.
    """
    weights = weights_file(run)
    config, spec = _finished(Path(run), weights), read_spec(weights)
    if spec.target.get("name") == "gaussian":
        raise Conflict(
            f"{run} predicts a mean and a variance already ({spec.target.get('covariance')}). Expected a run whose "
            "target is a linear one."
        )
    target = _target(spec)
    return {
        **config.to_dict(),
        "name": f"{weights.resolve().parent.name}-confidence",
        "description": f"How sure {run} is of what it predicts.",
        "network": _network(config.network, weights),
        "target": target,
        "t_range": _t_range(spec, target),
        "loss_space": None,
        "weighting": None,
        **_as_by_default(config),
    }


def _finished(run: Path, weights: Path) -> RunConfig:
    """The recipe of a finished run."""
    folder = weights.parent
    if not weights.is_file() or not (folder / "recipe.yaml").is_file():
        raise DataError(
            f"--add-confidence {run}: expected the folder of a finished run, with model.safetensors and recipe.yaml, "
            "or such a .safetensors file beside its recipe.yaml."
        )
    if run.is_dir() and _status(folder / RESULT) != "finished":
        raise DataError(
            f"--add-confidence {run}: this run is not finished (no {RESULT} that says so). Continue it first; or give "
            f"its weights as they are: --add-confidence {weights}."
        )
    return from_dict(parse_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"), str(folder / "recipe.yaml")))


def _status(result: Path) -> Any:
    try:
        row = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return row.get("status") if isinstance(row, dict) else None


def _network(base: dict[str, Any], weights: Path) -> dict[str, Any]:
    """The frozen network and a head of the same kind; for a network of the user's, one that is yet to be named."""
    name = base["name"]
    if name not in NETWORKS and not is_factory(name):
        raise NetworkError(
            f"the network of {weights.parent}, {name}, was given as an object, and cannot be made again from its "
            "recipe. Expected a built-in network, or one that can be imported: network: pkg.mod:make."
        )
    head = {} if is_factory(name) else {"head": dict(base)}
    return {"name": "confident", "base": dict(base), **head, "weights": str(weights)}


def _target(spec: Spec) -> dict[str, Any]:
    """A likelihood over what the run predicts; a k that it learned stays as it became."""
    stated = "sigma_data" in spec.target or not (spec.data or {}).get("sigma_data")
    scale = {} if stated else {"sigma_data": (spec.data or {})["sigma_data"]}
    return {"name": "gaussian", "target": spec.target, "covariance": "diagonal", "of": "x0", **scale}


def _t_range(spec: Spec, target: dict[str, Any]) -> list[float]:
    """The run's own, less an end at which the target's error would count without bound: for x0, that without noise."""
    low, high = spec.t_range
    likelihood, process = prediction(target), schedule(spec.schedule)
    assert isinstance(likelihood, Gaussian)
    if likelihood.singular_times(process, (low, high), likelihood.target) == [low]:
        low += 0.02 * (high - low)
    return [low, high]


def _as_by_default(config: RunConfig) -> dict[str, Any]:
    """What a likelihood refuses, or has no use for: exact means, and a guide, which would have the same mean."""
    plain = config.to_dict()
    found: dict[str, Any] = {"supervision": "sample"} if "supervision" in plain else {}
    if plain["sample"].get("autoguidance"):
        found["sample"] = {**plain["sample"], "autoguidance": None}
    return found


def check_base(config: RunConfig) -> None:
    """Refuse a network ``confident`` whose base was trained for something else than what the run says.

    Raises:
        Conflict: if target, schedule or conventions differ, or the run has no likelihood.
        NetworkError: if a part of it is not said.
    """
    if config.network["name"] != "confident":
        return
    example = "network: {name: confident, base: {…}, head: {…}, weights: runs/mine/model.safetensors}"
    if missing := [key for key in ("base", "head", "weights") if not config.network.get(key)]:
        raise NetworkError(
            f"network confident needs {' and '.join(f'network.{key}' for key in missing)}; expected {example}, with "
            "the base's own weights, and beside a network of yours a head that gives the outputs for the variance."
        )
    for part in ("base", "head"):
        if not isinstance(config.network[part], dict) or not isinstance(config.network[part].get("name"), str):
            raise NetworkError(
                f"network.{part} is a network's own mapping, such as {{name: mlp, hidden: 64}}, found "
                f"{config.network[part]!r}."
            )
    weights, asked = config.network["weights"], config.objective().conventions
    spec, likelihood = read_spec(weights), asked.likelihood
    if likelihood is None:
        raise Conflict(
            f"network confident gives a mean and a variance, and the target is {asked.target.name}; expected target: "
            f"{{name: gaussian, target: {spec.target.get('name')}}}."
        )
    same = {
        "target": (spec.target, asked.target.config()),
        "schedule": (spec.schedule, asked.schedule.config()),
        "time": (spec.time, asked.time),
        "input": (spec.input, asked.input),
    }
    for what, (was, now) in same.items():
        if _plain(was) != _plain(now):
            raise Conflict(
                f"the base in {weights} was trained with {what} {was}, and this run says {now}; a frozen network keeps "
                "what it was trained for."
            )
    (low, high), (low_was, high_was) = asked.t_range, spec.t_range
    if low < low_was or high > high_was:
        raise Conflict(
            f"the base in {weights} was trained on t in [{low_was:g}, {high_was:g}], and this run is on [{low:g}, "
            f"{high:g}]; give a t_range within the base's."
        )


def _plain(value: Any) -> Any:
    """As it is after having been stored."""
    return json.loads(json.dumps(value))
