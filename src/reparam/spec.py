"""The record of all conventions, which travels with the weights.

Weights are safetensors; the spec is JSON in the file's metadata under the key ``reparam``, and once more in a file
beside it (:func:`beside`) for people and other tools. Loading never guesses: weights without a spec are refused
unless the caller supplies one, and so are two records that contradict each other. What the caller says wins, and
where the file says otherwise, the record keeps both (``overrides``). Nothing that a record names is run.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._version import __version__
from .confidence import Gaussian, prediction
from .denoiser import Conventions, Denoiser
from .errors import NetworkError, OutputError, ReparamError, SpecError, Unsupported
from .files import Header, json_in, read_header, read_tensors, write_tensors, write_text
from .networks import PARTS, config_of, described, is_factory, network
from .schedules import Schedule, schedule
from .targets import File, Target

#: Raised whenever a field is added or changes its meaning; a newer one is refused. 2: overrides.
SCHEMA = 2
KEY = "reparam"
#: What a network's output means; and what else is known.
_NEEDED = ("target", "schedule", "time", "input", "t_range")
_SAID = (*_NEEDED, "network", "data", "training")
_KINDS: dict[str, type] = {
    **dict.fromkeys(("target", "schedule", "network", "data", "training", "overrides"), dict),
    **dict.fromkeys(("time", "input", "version"), str),
    "t_range": list,
}
#: A record is plain data of a few levels.
_DEEPEST = 32
_LONGEST = 100_000_000


@dataclass(frozen=True)
class Spec:
    """Everything that must be known to use a network's output.

    Attributes:
        target, schedule: as plain data (``Target.config`` or ``Gaussian.config``, ``Schedule.config``). Both are
            stated with t = 0 the data and t = 1 the noise; a target of the other sign is ``negated``.
        time, input, t_range: see :class:`reparam.denoiser.Conventions`.
        network: name and arguments of a built-in network, or None for a network of the user's.
        data: shape, range, normalisation and statistics of the training data, σ_data among them.
        training: loss space, weighting and times, where known.
        overrides: fields that a user said otherwise than the file did: ``{field: {"file": …, "given": …}}``.
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
    overrides: dict[str, Any] | None = None
    version: str = __version__
    schema: int = SCHEMA

    @classmethod
    def of(cls, denoiser: Denoiser) -> Spec:
        """The spec of a denoiser."""
        c = denoiser.conventions
        found = cls(
            target=c.predicted().config(),
            schedule=c.schedule.config(),
            time=c.time,
            input=c.input,
            t_range=list(c.t_range),
            network=config_of(denoiser.net),
            data=denoiser.data,
            training=denoiser.training_record,
        )
        first = {name: both["file"] for name, both in (denoiser.overrides or {}).items()}
        # As it is now: a network has told all of its arguments, and data may have been said anew.
        now = {name: getattr(found, name) for name in first}
        overrides = {k: {"file": v, "given": now[k]} for k, v in first.items() if _text(v) != _text(now[k])}
        return replace(found, overrides=overrides or None)

    @classmethod
    def from_dict(cls, record: Any, where: str = "the spec") -> Spec:
        """The spec that plain data stand for.

        Raises:
            SpecError: if a field is missing, unknown, of another kind, or written by a newer reparam.
        """
        if not isinstance(record, dict):
            raise SpecError(f"{where} is {type(record).__name__}, expected a mapping.")
        _check_schema(record.get("schema"), where)
        _check_fields(record, where)
        if missing := sorted(set(_NEEDED) - record.keys()):
            raise SpecError(f"{where} does not say {', '.join(missing)}.")
        if record["schema"] < 2 and "overrides" in record:
            raise SpecError(f"{where} has unknown fields: overrides (its schema is {record['schema']}).")
        found = cls(**record)
        for name, both in (found.overrides or {}).items():
            if _text(both["given"]) != _text(getattr(found, name)):
                raise SpecError(
                    f"{where} contradicts itself: {name} is {_shown(getattr(found, name))}, and by its overrides it "
                    f"was given as {_shown(both['given'])}."
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data."""
        return asdict(self)

    def told(self, word: Mapping[str, Any]) -> Spec:
        """This spec with a user's word for some of its fields, and a record of where that differs."""
        overrides = dict(self.overrides or {})
        for name, given in word.items():
            first = overrides.pop(name, {"file": getattr(self, name)})["file"]
            if _text(_canonical(name, first)) != _text(given):
                overrides[name] = {"file": first, "given": given}
        # A word that says what is there already leaves the record as it was written.
        word = {k: v for k, v in word.items() if _text(v) != _text(_canonical(k, getattr(self, k)))}
        schema = SCHEMA if overrides else self.schema
        return replace(self, **word, overrides=overrides or None, schema=schema)

    def conventions(self, predicted: Target | Gaussian | None = None) -> Conventions:
        """What the record states, as objects.

        Args:
            predicted: the target, where the record names a Python file for it, which it does not run.

        Raises:
            SpecError: if there are no such conventions, or if it would take code to make them.
        """
        parts = {"schedule": self.schedule} | ({"target": self.target} if predicted is None else {})
        if code := code_in(parts):
            raise SpecError(
                f"the spec names code to run ({', '.join(code)}), and a record runs none. Where you trust it, give "
                "the target yourself: rp.load(path, spec={'target': rp.targets.File('mine.py')})."
            )
        low, high = self.t_range
        chosen: Any = predicted or self.target
        try:
            return Conventions(self.schedule, chosen, self.time, self.input, (low, high))  # type: ignore[arg-type]
        except Exception as e:  # whatever plain data do to what is made of them
            raise SpecError(f"the spec does not stand for a model: {e}") from e

    def denoiser(self, net: nn.Module, predicted: Target | Gaussian | None = None) -> Denoiser:
        """A network under these conventions; ``predicted`` as in :meth:`conventions`.

        Raises:
            SpecError: if the record does not stand for conventions that exist.
        """
        c = self.conventions(predicted)
        built = Denoiser(net, c.schedule, c.predicted(), time=c.time, input=c.input, t_range=c.t_range, data=self.data)
        built.training_record, built.overrides = self.training, self.overrides
        return built

    def in_words(self) -> list[tuple[str, str]]:
        """The record for a reader: (what, how) pairs. Nothing that it names is run.

        Raises:
            SpecError: if it does not stand for a model.
        """
        if code := code_in(self.target):
            predicts = f"{self.target.get('name')}: what the code in {', '.join(code)} asks for (not run)"
            process = None
        else:
            c = self.conventions()
            predicts, process = f"{c.predicted().name}: {c.predicted().words}", c.schedule
        rows = [
            ("predicts", predicts),
            (
                "forward process",
                _arguments(self.schedule) + ", x_t = alpha*x0 + sigma*eps; t = 0 data, t = 1 noise",
            ),
            ("network", described(self.network) if self.network else "the user's own (not built in)"),
            ("time given as", self.time),
            ("input scaling", self.input),
            ("trained on t in", f"[{self.t_range[0]:g}, {self.t_range[1]:g}]"),
        ]
        if process is not None:
            alpha, sigma = float(process.alpha(1.0)), process.sigma(1.0)
            end = f"alpha = {alpha:.3g}, sigma up to {float(sigma.max()):.4g}"
            rows.insert(2, ("zero terminal SNR", f"{'no' if alpha else 'yes'}: at t = 1, {end}"))
        origin = (self.training or {}).get("converted_from")
        if isinstance(origin, dict):
            rows.append(("converted from", _shown(origin.get("target"))))
            rows += _said_otherwise({k: v for k, v in (origin.get("overrides") or {}).items() if k == "target"})
        if self.training and (self.training.keys() & {"loss_space", "weighting", "times"}):
            times, space = self.training.get("times"), self.training.get("loss_space")
            loss = space or self.training.get("weighting")
            rows.append(("loss measured in", _arguments(loss) if isinstance(loss, dict) else str(loss)))
            rows.append(("noise levels drawn", _arguments(times) if isinstance(times, dict) else str(times)))
        if self.data:
            rows.append(("data", ", ".join(f"{k} {_short(v)}" for k, v in self.data.items())))
        rows += _said_otherwise(self.overrides or {})
        return [*rows, ("written by", f"reparam {self.version} (schema {self.schema})")]


def _said_otherwise(overrides: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("said otherwise", f"{name}: {_shown(both['given'])}; by the file {_shown(both['file'])}")
        for name, both in overrides.items()
        if isinstance(both, dict) and {"file", "given"} <= both.keys()
    ]


def _check_schema(schema: Any, where: str) -> None:
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise SpecError(
            f"{where} has schema {schema!r}; this reparam ({__version__}) reads up to {SCHEMA}. "
            "Upgrade reparam to read it."
        )


def _check_fields(record: dict[str, Any], where: str) -> None:
    """Refuse fields that are unknown or of another kind than theirs; none has to be there."""
    if extra := sorted(record.keys() - {f.name for f in fields(Spec)}):
        raise SpecError(f"{where} has unknown fields: {', '.join(extra)}.")
    if _depth(record) > _DEEPEST:
        raise SpecError(f"{where} is nested more than {_DEEPEST} levels deep; no model's record is.")
    for name, value in record.items():
        kind = _KINDS.get(name, object)
        if not (isinstance(value, kind) or (value is None and name not in (*_NEEDED, "version"))):
            raise SpecError(f"{where}: {name} is {_shown(value)}, expected a {kind.__name__}.")
    low_high = record.get("t_range", [0.0, 1.0])
    if len(low_high) != 2 or not all(type(v) in (int, float) for v in low_high):
        raise SpecError(f"{where}: t_range is {_shown(low_high)}, expected two numbers.")
    for name, both in (record.get("overrides") or {}).items():
        if name not in _SAID or not isinstance(both, dict) or both.keys() != {"file", "given"}:
            raise SpecError(
                f"{where}: overrides has {name}: {_shown(both)}, expected a field of the spec with what the file and "
                "what a user said: {file: …, given: …}."
            )


def _depth(value: Any) -> int:
    """How many levels of mappings and lists plain data have, counted a level at a time."""
    deep, level = 0, [value]
    while level := [v for v in level if isinstance(v, dict | list)]:
        deep += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return deep


def code_in(config: Any) -> list[str]:
    """What of a user's own (files of targets, functions ``pkg.mod:make``) making a thing from its config would run."""
    if not isinstance(config, dict | list):
        return []
    name = config.get("name") if isinstance(config, dict) else None
    named = [name] if isinstance(name, str) and is_factory(name) else []
    named += [str(config["path"])] if isinstance(config, dict) and name == File.name and "path" in config else []
    inner = config.values() if isinstance(config, dict) else config
    return [*named, *(found for part in inner for found in code_in(part))]


def _canonical(name: str, value: Any) -> Any:
    """A target or a schedule with its own name and all arguments, where that can be known; else as it is."""
    if name not in ("target", "schedule") or code_in(value):
        return value
    with contextlib.suppress(Exception):  # what does not exist is refused where it is used
        return _plain((prediction if name == "target" else schedule)(value).config(), name)
    return value


def _plain(value: Any, where: str) -> Any:
    """As it is after having been stored."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as e:
        raise SpecError(f"{where} is no plain data: {e}.") from e


def _text(value: Any) -> str:
    """What two equal values have in common: NaN included, and 1 as much as 1.0."""
    return json.dumps(_as_float(value), sort_keys=True)


def _as_float(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_float(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_float(part) for part in value]
    exact = type(value) is int and abs(value) <= 2**53
    return float(value) if exact else value


def _shown(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _arguments(config: dict[str, Any]) -> str:
    rest = ", ".join(f"{k}={_many(v)}" for k, v in config.items() if k != "name")
    return f"{config.get('name')}({rest})" if rest else str(config.get("name"))


def _many(value: Any) -> str:
    """A value for a reader; of a long list its length and its ends."""
    if isinstance(value, list) and len(value) > 16:
        return f"{len(value)} values from {_short(value[0])} to {_short(value[-1])}"
    return _cut(str(value))


def beside(path: str | Path) -> Path:
    """Where the spec is written once more: NAME.spec.json, and in the folder of a run (model.safetensors) spec.json."""
    path = Path(path)
    return path.with_name("spec.json" if path.name == "model.safetensors" else f"{path.stem}.spec.json")


def save(denoiser: Denoiser, path: str | Path, *, markers: bool = False) -> None:
    """Write the network's weights with their spec to one safetensors file, atomically; and the spec as JSON beside it.

    Args:
        path: a .safetensors file.
        markers: whether to write the marks that other programs look for too (:mod:`reparam.tools.markers`).

    Raises:
        OutputError: if the file cannot be written, or has another ending, by which it would not be loaded.
        Unsupported: for a denoiser that asks another one (of guidance, clipping, another schedule); or if there are no
            marks for what the network predicts.
    """
    check_plain(denoiser)
    if Path(path).suffix != ".safetensors":
        raise OutputError(f"{path}: weights are written as .safetensors, and under that name alone; change the ending.")
    record = Spec.of(denoiser).to_dict()
    tensors, metadata = dict(denoiser.net.state_dict()), {KEY: json.dumps(record)}
    if markers:
        from .tools.markers import write_markers

        empty, told = write_markers(denoiser)
        tensors, metadata = tensors | empty, metadata | told
    # Never the record of other weights: killed in between, there is none.
    with contextlib.suppress(OSError):
        beside(path).unlink(missing_ok=True)
    write_tensors(path, tensors, metadata)
    write_text(beside(path), json.dumps(record, indent=2) + "\n")


def check_plain(denoiser: Any) -> None:
    """Refuse what is no model by itself.

    Raises:
        Unsupported: for what is no denoiser, or one that asks another.
    """
    if not isinstance(denoiser, Denoiser):
        raise Unsupported(
            f"found {type(denoiser).__name__}, expected a Denoiser: a network says what it predicts only together "
            "with its conventions, rp.Denoiser(net, schedule, target, …) or objective.denoiser(net)."
        )
    if not denoiser.plain:
        raise Unsupported(
            f"found {type(denoiser).__name__}, a model around another one; take that one, and put the other around "
            "the result."
        )


def load(
    path: str | Path, net: nn.Module | None = None, spec: Spec | Mapping[str, Any] | str | Path | None = None
) -> Denoiser:
    """The denoiser that :func:`save` wrote, or a file of weights under a spec of the caller's.

    Args:
        path: a .safetensors file.
        net: the network to put the weights into, where it is not built in.
        spec: the conventions, where the file does not carry them; where it does, what is given here wins, and the
            denoiser's ``overrides`` say so. A :class:`Spec`, a mapping of some or all of its fields, or a .json or
            .yaml file with one. Targets and schedules may be objects or names; a target that runs a Python file must
            be an object.

    Raises:
        SpecError: if neither the file nor the caller says what the network predicts, if they contradict each other,
            or if the file is no safetensors.
        NetworkError: if the network is needed, or does not fit the weights.
    """
    if net is not None and not isinstance(net, nn.Module):
        raise NetworkError(f"net= is {type(net).__name__}, expected a torch.nn.Module to put the weights into.")
    header = read_header(path)
    found, predicted = _resolved(path, header, spec)
    found.conventions(predicted)
    if net is None:
        net = _network_of(found, header, path)
    from .tools.markers import without_markers

    try:
        net.load_state_dict(without_markers(read_tensors(path)[0], net.state_dict()))
    except RuntimeError as e:
        raise NetworkError(f"the weights in {path} do not fit {type(net).__name__}: {e}") from e
    return found.denoiser(net, predicted)


def weights_file(where: str | Path) -> Path:
    """The weights that the folder of a run, or a path to a file, stands for."""
    path = Path(where)
    if path.is_dir() and not (path / "model.safetensors").exists() and (path / "model_index.json").exists():
        raise SpecError(
            f"{path} is a pipeline of diffusers, expected a run of reparam or a .safetensors file. In Python, "
            "rp.from_diffusers(path) opens it; reparam identify reads it as it is."
        )
    return path / "model.safetensors" if path.is_dir() else path


def read_spec(path: str | Path, spec: Spec | Mapping[str, Any] | str | Path | None = None) -> Spec:
    """The spec in a safetensors file, with what the caller says (as in :func:`load`). No weights are read.

    Raises:
        SpecError: if there is none, or it cannot be read.
    """
    return _resolved(path, read_header(path), spec)[0]


def _network_of(spec: Spec, header: Header, path: str | Path) -> nn.Module:
    """The built-in network of a spec, found to be of the weights' size before it is made."""
    if spec.network is None:
        raise NetworkError(f"{path} holds weights of a network that is not built in; give it as net=.")
    if code := code_in(spec.network):
        raise SpecError(
            f"the spec in {path} names code to run ({', '.join(code)}), and a file of weights "
            "runs none; give the network as net=."
        )
    held = sum(map(math.prod, header.shapes.values()))
    if any(n > max(held, 100_000) for n in _integers(spec.network)):
        raise NetworkError(
            f"the network in the spec of {path}, {_arguments(spec.network)}, has a number in it larger than all of "
            f"its {held:,} weights; one of the two is damaged."
        )
    wanted = _shapes(spec.network)
    if odd := [name for name, shape in wanted.items() if header.shapes.get(name) != shape]:
        raise NetworkError(
            f"the weights in {path} do not fit the network of its spec, {_arguments(spec.network)}: {odd[0]} has shape "
            f"{header.shapes.get(odd[0])}, expected {wanted[odd[0]]}{_and(odd[1:4])}."
        )
    try:
        return network(spec.network)
    except ReparamError:
        raise
    except Exception as e:  # whatever plain data do to what is made of them
        raise NetworkError(f"the network in the spec of {path}, {_arguments(spec.network)}, cannot be made: {e}") from e


def _shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """The shapes of a built-in network's weights, of which none is allocated; {} where that cannot be known so."""
    if parts := [(part, config.get(part)) for part in PARTS.get(str(config.get("name")), ())]:
        inner = ((part, _shapes(of)) for part, of in parts if isinstance(of, dict))
        return {f"{part}.{name}": shape for part, shapes in inner for name, shape in shapes.items()}
    try:
        with torch.device("meta"):
            return {name: list(v.shape) for name, v in network(config).state_dict().items()}
    except ReparamError:
        raise
    except Exception:  # of code that wants numbers
        return {}


def _integers(config: Any) -> Iterator[int]:
    if isinstance(config, dict | list):
        for part in config.values() if isinstance(config, dict) else config:
            yield from _integers(part)
    elif isinstance(config, int):
        yield config


def _resolved(
    path: str | Path, header: Header, given: Spec | Mapping[str, Any] | str | Path | None
) -> tuple[Spec, Target | Gaussian | None]:
    """What the file and the caller say together; and the target, where the caller gave it as an object."""
    word, predicted = _word(given)
    try:
        found = _stated(path, header, word)
    except SpecError:
        if not set(_NEEDED) <= word.keys():
            raise
        found = None  # the caller says all that is needed, in place of a record that cannot be read
    if found is not None:
        found = found.told(word)
    elif word:
        found = Spec.from_dict({"schema": SCHEMA, **word}, f"{path} has no spec that can be read, and the one given")
    else:
        raise SpecError(
            f"{path} does not say what its network predicts (no {KEY!r} in its metadata, no {beside(path).name}), and "
            f"nothing is guessed.{_marked(header)} Give a spec: rp.load(path, spec=...), or --spec, with target, "
            "schedule, time, input and t_range; reparam identify tries them on data."
        )
    return _against_marks(path, header, found, word), predicted


def stated(given: Spec | Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    """The fields that a caller gives for a spec (see :func:`load`), objects among them as they are.

    Raises:
        SpecError: if there is no such file, or it holds no mapping.
    """
    found = _read(Path(given)) if isinstance(given, str | Path) else given
    found = found.to_dict() if isinstance(found, Spec) else {} if given is None else found
    if not isinstance(found, Mapping):
        raise SpecError(f"{_named(given)} is {type(found).__name__}, expected a mapping.")
    return dict(found)


def _named(given: Any) -> str:
    return f"the spec in {given}" if isinstance(given, str | Path) else "the spec given"


def _word(given: Spec | Mapping[str, Any] | str | Path | None) -> tuple[dict[str, Any], Target | Gaussian | None]:
    """The fields that a caller states, as plain data; and the target where that is an object."""
    where, record = _named(given), stated(given)
    chosen = record.get("target")
    predicted = chosen if isinstance(chosen, Target | Gaussian) else None
    record = {str(k): v.config() if isinstance(v, Target | Gaussian | Schedule) else v for k, v in record.items()}
    for name in ("target", "schedule", "network"):
        if isinstance(record.get(name), str):
            record[name] = {"name": record[name]}
    record = _plain(record, where)
    _check_fields(record, where)
    if "schema" in record:
        _check_schema(record["schema"], where)
    said = {k: _canonical(k, v) for k, v in record.items() if k in _SAID and v is not None}
    if "t_range" in said:
        said["t_range"] = [float(v) for v in said["t_range"]]
    return said, predicted


def _read(file: Path) -> Any:
    """The plain data in a .json or .yaml file."""
    try:
        if file.stat().st_size > _LONGEST:
            raise SpecError(f"{file} has more than {_LONGEST:,} bytes; expected a spec as JSON or YAML.")
        text = file.read_bytes().decode("utf-8")
        if file.suffix.lower() == ".json":
            return json_in(text)
        from .studies.recipe import parse_yaml

        return parse_yaml(text, str(file))
    except OSError as e:
        raise SpecError(f"cannot read {file}: {e.strerror or e}. Expected a spec as JSON or YAML.") from e
    except SpecError:
        raise
    except (ValueError, RecursionError) as e:
        raise SpecError(f"{file} is neither JSON nor YAML: {e}") from e


def _stated(path: str | Path, header: Header, word: Mapping[str, Any]) -> Spec | None:
    """What the file says of itself, and the JSON beside it, which must be the same but for what the caller says."""
    inside, outside = None, None
    if KEY in header.metadata:
        try:
            record = json_in(header.metadata[KEY])
        except (ValueError, RecursionError) as e:
            raise SpecError(f"the spec in {path} is not JSON: {e}.") from e
        inside = Spec.from_dict(record, f"the spec in {path}")
    if beside(path).exists():
        outside = Spec.from_dict(_read(beside(path)), f"the spec in {beside(path)}")
    if inside is None or outside is None:
        return inside or outside
    one, other = inside.to_dict(), outside.to_dict()
    differing = [name for name in one if _text(one[name]) != _text(other[name])]
    settled = {*word, "overrides"} if word else set()
    if undecided := [name for name in differing if name not in settled]:
        name = undecided[0]
        say = f", or say what it is: rp.load(path, spec={{{name!r}: ...}}), or --spec" if name in _SAID else ""
        raise SpecError(
            f"{path} and {beside(path)} contradict each other: {name} is {_shown(one[name])} in the one and "
            f"{_shown(other[name])} in the other{_and(undecided[1:])}. Remove what is wrong{say}."
        )
    return inside


def _and(more: Iterable[str]) -> str:
    return f" (and so for {', '.join(more)})" if more else ""


def _marked(header: Header) -> str:
    """What the marks of other programs say of weights without a spec; for a reader, not for a loader."""
    from .tools.markers import read_markers

    found = read_markers(header.shapes, header.metadata)
    return f" Marks in it say: {found.text()}." if found.marks else ""


def _against_marks(path: str | Path, header: Header, spec: Spec, word: Mapping[str, Any]) -> Spec:
    """The record, with the marks of other programs in the same file that the caller has overruled; others refuse it."""
    from .tools.markers import read_markers

    found = read_markers(header.shapes, header.metadata)
    overruled = dict(spec.overrides or {})
    for fact, marked, why in found.against(spec):
        if fact not in word and fact not in overruled:
            raise SpecError(
                f"{path} contradicts itself: {why}. Say which it is: rp.load(path, spec={{{fact!r}: ...}}), or --spec."
            )
        overruled.setdefault(fact, {"file": marked, "given": getattr(spec, fact)})
    return replace(spec, overrides=overruled or None, schema=SCHEMA if overruled else spec.schema)
