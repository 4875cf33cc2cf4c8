"""A training that begins where another one ended: its network, stated exactly as the target that is now learned."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..confidence import Gaussian
from ..data import Data
from ..denoiser import Denoiser
from ..errors import Conflict, DataError, NetworkError, ReparamError
from ..networks import NETWORKS, Reexpressed, config_of, is_factory
from ..spec import weights_file
from ..tools.convert import reexpress
from .recipe import RunConfig, override, read_recipe
from .run import RESULT
from .sampling import opened, recipe_beside

#: What of the network's conventions a recipe may leave out.
_TAKEN = ("schedule", "time", "t_range")


@dataclass(frozen=True)
class Initial:
    """A model to begin with.

    Attributes:
        run: as it was given. weights: its averaged network.
        model: the network under its conventions. recipe: of its run, where that is known.
        network: the config of the innermost network.
        stated: whether the new recipe says how the network's input is scaled.
    """

    run: str
    weights: Path
    model: Denoiser
    recipe: RunConfig | None
    network: dict[str, Any]
    stated: bool = False

    @classmethod
    def of(cls, run: str | Path) -> Initial:
        """The model in the folder of a finished run, or in a .safetensors file with its spec.

        Raises:
            DataError: if there is none, or the run is not finished.
            SpecError: if it cannot be read.
            NetworkError: if its network was an object, which nothing here could make again.
        """
        weights = weights_file(run)
        if not weights.is_file():
            raise DataError(
                f"--init {run}: expected the folder of a finished run, with model.safetensors, or such a file itself."
            )
        if Path(run).is_dir() and (status := _status(weights.parent / RESULT)) in ("diverged", "unfinished"):
            raise DataError(
                f"--init {run}: this run is {status}. Continue it first; or give its weights as they are: --init "
                f"{weights}."
            )
        recipe = recipe_beside(weights)
        if recipe is not None and not (recipe.network["name"] in NETWORKS or is_factory(recipe.network["name"])):
            raise NetworkError(
                f"the network of {weights.parent}, {recipe.network['name']}, was given as an object, and cannot be "
                "made again. Expected a built-in network, or one that can be imported: network: pkg.mod:make."
            )
        model = opened(weights, recipe)
        return cls(str(run), weights, model, recipe, _innermost(model, recipe))

    def into(self, raw: Any, settings: list[str]) -> tuple[Initial, dict[str, Any]]:
        """A recipe with what it leaves out, the network and its conventions, taken from this model.

        Args:
            raw: a recipe's name, file or mapping, or None for the run's own. settings: what ``--set`` says besides.

        Returns:
            The recipe; and this model, which now knows what was stated.

        Raises:
            DataError: if no recipe is given and none lies beside the weights.
        """
        raw = self._own() if raw is None else read_recipe(raw)
        stated = override(raw, settings)
        c = self.model.conventions
        given = {"schedule": c.schedule.config(), "time": c.time, "t_range": list(c.t_range)}
        raw |= {key: given[key] for key in _TAKEN if stated.get(key) is None}
        if stated.get("network") is None:
            raw["network"] = {"name": "reexpressed"}
        if self.recipe is not None and stated.get("conditional") is None:
            raw["conditional"] = self.recipe.conditional
        return replace(self, stated=stated.get("input") is not None), raw

    def _own(self) -> dict[str, Any]:
        """The run's recipe, without what is the network's."""
        if self.recipe is None:
            raise DataError(f"{self.weights} has no recipe.yaml beside it; give a recipe with its data and target.")
        left_out = ("network", "input", "name", "description", "validate_on", *_TAKEN)
        raw = {key: value for key, value in self.recipe.to_dict().items() if key not in left_out}
        return {"name": f"{self.weights.resolve().parent.name}-continued", **raw}

    def begun(self, config: RunConfig) -> RunConfig:
        """The run with this model's network, stated as the run's target.

        Raises:
            Conflict: if the run says something else of the network, or of how it is called, than it is.
            SingularTime: if the target does not follow from what the network predicts, somewhere in t_range.
        """
        asked = config.objective().conventions
        self._refuse_other_network(config.network)
        self._same("schedule", self.model.schedule.config(), asked.schedule.config())
        self._same("time", self.model.conventions.time, asked.time)
        likelihood = self.model.conventions.likelihood
        self._same("likelihood", _apart(likelihood), _apart(asked.likelihood))
        low, high = config.t_range
        try:
            made = reexpress(self.model, asked.predicted(), t_range=(low, high))
        except ReparamError as e:
            raise type(e)(f"--init {self.run}: {e}") from e
        if self.stated:
            self._same("input", made.conventions.input, asked.input)
        net = made.net
        if not isinstance(net, Reexpressed):
            c = made.conventions
            net = Reexpressed(net, c.schedule, c.target, c.target, c.time, c.input)
        network = {**net.config, "of": self.network, "weights": str(self.weights)}
        return replace(config, network=network, input=made.conventions.input)

    def _same(self, what: str, was: Any, now: Any) -> None:
        if _plain(was) != _plain(now):
            raise Conflict(
                f"the network of {self.run} was trained with {what} {was}, and this training says {now}; leave that "
                "out to take it from there."
            )

    def _refuse_other_network(self, stated: dict[str, Any]) -> None:
        """What a recipe says of the network must be so."""
        if stated["name"] == "reexpressed":
            return
        for key, value in stated.items():
            if key not in self.network or _plain(self.network[key]) != _plain(value):
                raise Conflict(
                    f"the network of {self.run} has {key} {self.network.get(key)!r}, and this recipe says network."
                    f"{key}: {value!r}; leave the network out to take it from there."
                )

    def check_data(self, data: Data) -> list[str]:
        """Refuse data of another shape; remarks on what else differs.

        Raises:
            DataError: for another shape, or other classes.
        """
        record = self.model.data or {}
        if "shape" in record and list(record["shape"]) != list(data.shape):
            raise DataError(
                f"the network of {self.run} was trained on samples of shape {list(record['shape'])}, and {data.name} "
                f"has {list(data.shape)}; expected data of the same shape."
            )
        scale, now = record.get("normalised_by"), {"mean": data.mean, "std": data.std}
        if scale is not None and scale != now:
            return [f"  warning: {self.run} was trained on data normalised by {scale}, and these are by {now}"]
        return []

    def text(self, config: RunConfig) -> str:
        """What happens, for a reader."""
        was, now = self.model.target.name, config.objective().conventions.target.name
        how = "which it goes on to learn" if was == now else f"stated exactly as {now}: the same x0 at step 0"
        return f"  beginning with the network of {self.weights}, which predicts {was}, {how}"


def _innermost(model: Denoiser, recipe: RunConfig | None) -> dict[str, Any]:
    """The config from which the network inside can be made again."""
    net = model.net.of if isinstance(model.net, Reexpressed) else model.net
    config = config_of(net)
    if config is None:  # of the user's own, which only a recipe could name
        assert recipe is not None
        config = recipe.network["of"] if recipe.network["name"] == "reexpressed" else recipe.network
    return config


def _apart(likelihood: Gaussian | None) -> dict[str, Any] | None:
    """A likelihood but for the target of its mean, and for what concerns its loss alone."""
    if likelihood is None:
        return None
    return {key: value for key, value in likelihood.config().items() if key in ("covariance", "of", "sigma_data")}


def _plain(value: Any) -> Any:
    """As it is after having been stored."""
    return json.loads(json.dumps(value))


def _status(result: Path) -> Any:
    """What became of a run; None for weights that are of none."""
    if not (result.parent / "recipe.yaml").is_file():
        return None
    try:
        row = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "unfinished"
    return row.get("status", "unfinished") if isinstance(row, dict) else "unfinished"
