"""The record of all conventions, which travels with the weights.

Weights are safetensors; the spec is JSON in the file's metadata under the key ``reparam``.
Loading never guesses: weights without a spec are refused unless the caller supplies one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from ._version import __version__
from .confidence import prediction
from .denoiser import Denoiser
from .errors import NetworkError, ReparamError, SpecError
from .files import read_tensors, write_tensors
from .networks import config_of, network, own_code

#: Raised whenever a field is added or changes its meaning; a newer one is refused.
SCHEMA = 1
KEY = "reparam"


@dataclass(frozen=True)
class Spec:
    """Everything that must be known to use a network's output.

    Attributes:
        target, schedule: as plain data (``Target.config`` or ``Gaussian.config``, ``Schedule.config``).
        time, input, t_range: see :class:`reparam.denoiser.Conventions`.
        network: name and arguments of a built-in network, or None for a network of the user's.
        data: shape, normalisation and statistics of the training data, σ_data among them.
        training: loss space, weighting and times, where known.
        version: the reparam that wrote it.
        schema: the version of this record.
    """

    target: dict[str, Any]
    schedule: dict[str, Any]
    time: str
    input: str
    t_range: list[float]
    network: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    version: str = __version__
    schema: int = SCHEMA

    @classmethod
    def of(cls, denoiser: Denoiser) -> Spec:
        """The spec of a denoiser."""
        c = denoiser.conventions
        return cls(
            target=c.predicted().config(),
            schedule=c.schedule.config(),
            time=c.time,
            input=c.input,
            t_range=list(c.t_range),
            network=config_of(denoiser.net),
            data=denoiser.data,
            training=denoiser.training_record,
        )

    @classmethod
    def from_dict(cls, record: Any, where: str = "the spec") -> Spec:
        """The spec that plain data stand for.

        Raises:
            SpecError: if a field is missing, unknown, or written by a newer reparam.
        """
        if not isinstance(record, dict):
            raise SpecError(f"{where} is {type(record).__name__}, expected a mapping.")
        schema = record.get("schema")
        if not isinstance(schema, int) or schema > SCHEMA:
            raise SpecError(
                f"{where} has schema {schema!r}; this reparam ({__version__}) reads up to {SCHEMA}. "
                "Upgrade reparam to read it."
            )
        names = {f.name for f in fields(cls)}
        needed = {"target", "schedule", "time", "input", "t_range"}
        if missing := sorted(needed - record.keys()):
            raise SpecError(f"{where} does not say {', '.join(missing)}.")
        if extra := sorted(record.keys() - names):
            raise SpecError(f"{where} has unknown fields: {', '.join(extra)}.")
        kinds = {"time": str, "input": str, "t_range": list, "version": str}
        kinds |= dict.fromkeys(("target", "schedule", "network", "data", "training"), dict)
        for name, kind in kinds.items():
            value = record.get(name)
            optional = name not in needed
            if not (isinstance(value, kind) or (optional and value is None)):
                raise SpecError(f"{where}: {name} is {value!r}, expected a {kind.__name__}.")
        low_high = record["t_range"]
        if len(low_high) != 2 or not all(isinstance(v, int | float) for v in low_high):
            raise SpecError(f"{where}: t_range is {low_high!r}, expected two numbers.")
        return cls(**record)

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data."""
        return asdict(self)

    def denoiser(self, net: nn.Module) -> Denoiser:
        """A network under these conventions.

        Raises:
            SpecError: if the record does not stand for conventions that exist.
        """
        try:
            low, high = self.t_range
            built = Denoiser(
                net,
                self.schedule,
                self.target,
                time=self.time,
                input=self.input,
                t_range=(low, high),
                data=self.data,
            )
        except (ReparamError, TypeError, ValueError) as e:
            raise SpecError(f"the spec does not stand for a model: {e}") from e
        built.training_record = self.training
        return built

    def in_words(self) -> list[tuple[str, str]]:
        """The record for a reader: (what, how) pairs."""
        predicted = prediction(self.target)
        rows = [
            ("predicts", f"{predicted.name}: {predicted.words}"),
            (
                "forward process",
                _arguments(self.schedule) + ", x_t = alpha*x0 + sigma*eps; t = 0 data, t = 1 noise",
            ),
            ("network", _arguments(self.network) if self.network else "the user's own (not built in)"),
            ("time given as", self.time),
            ("input scaling", self.input),
            ("trained on t in", f"[{self.t_range[0]:g}, {self.t_range[1]:g}]"),
        ]
        if self.training:
            times, space = self.training.get("times"), self.training.get("loss_space")
            rows.append(("loss measured in", str(space or self.training.get("weighting"))))
            rows.append(("noise levels drawn", _arguments(times) if isinstance(times, dict) else str(times)))
        if self.data:
            rows.append(("data", ", ".join(f"{k} {_short(v)}" for k, v in self.data.items())))
        return [*rows, ("written by", f"reparam {self.version} (schema {self.schema})")]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _arguments(config: dict[str, Any]) -> str:
    rest = ", ".join(f"{k}={v}" for k, v in config.items() if k != "name")
    return f"{config.get('name')}({rest})" if rest else str(config.get("name"))


def save(denoiser: Denoiser, path: str | Path) -> None:
    """Write the network's weights and its spec to one safetensors file, atomically.

    Raises:
        OutputError: if the file cannot be written.
    """
    write_tensors(path, denoiser.net.state_dict(), {KEY: json.dumps(Spec.of(denoiser).to_dict())})


def load(path: str | Path, net: nn.Module | None = None, spec: Spec | dict[str, Any] | None = None) -> Denoiser:
    """The denoiser that :func:`save` wrote, or a file of weights under a spec of the caller's.

    Args:
        path: a .safetensors file.
        net: the network to put the weights into, where it is not built in.
        spec: the conventions, where the file does not carry them; where it does, this one wins.

    Raises:
        SpecError: if neither the file nor the caller says what the network predicts.
        NetworkError: if the network is needed, or does not fit the weights.
    """
    tensors, metadata = read_tensors(path)
    spec = _spec_of(path, metadata, spec)
    if net is None:
        if spec.network is None:
            raise NetworkError(f"{path} holds weights of a network that is not built in; give it as net=.")
        if own_code(spec.network):
            raise SpecError(
                f"the spec in {path} names code to run ({', '.join(own_code(spec.network))}), and a file of weights "
                "runs none; give the network as net=."
            )
        net = network(spec.network)
    try:
        net.load_state_dict(tensors)
    except RuntimeError as e:
        raise NetworkError(f"the weights in {path} do not fit {type(net).__name__}: {e}") from e
    return spec.denoiser(net)


def weights_file(where: str | Path) -> Path:
    """The weights that the folder of a run, or a path to a file, stands for."""
    path = Path(where)
    return path / "model.safetensors" if path.is_dir() else path


def read_spec(path: str | Path) -> Spec:
    """The spec in a safetensors file.

    Raises:
        SpecError: if there is none, or it cannot be read.
    """
    return _spec_of(path, read_tensors(path)[1], None)


def _spec_of(path: str | Path, metadata: dict[str, str], given: Spec | dict[str, Any] | None) -> Spec:
    if isinstance(given, Spec):
        return given
    if given is not None:
        return Spec.from_dict(given)
    if KEY not in metadata:
        raise SpecError(
            f"{path} does not say what its network predicts (no {KEY!r} in its metadata), and nothing is "
            "guessed. Give a spec: rp.load(path, spec=...)."
        )
    try:
        record = json.loads(metadata[KEY])
    except json.JSONDecodeError as e:
        raise SpecError(f"the spec in {path} is not JSON: {e}.") from e
    return Spec.from_dict(record, f"the spec in {path}")
