"""Recipes: what to compare, on what, for how long.

A recipe is YAML. A list where one value is expected is a sweep, and a study is the product
of all its sweeps. Every key and value is checked on load, and an error gives its path.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from ..confidence import Gaussian
from ..data import DATA, LATENTS
from ..denoiser import Denoiser
from ..errors import Conflict, RecipeError, ReparamError, TimeOutOfRange, Unsupported, unknown
from ..metrics import EXTRACTORS, METRICS
from ..metrics.model import MODEL_METRICS
from ..networks import NETWORKS, is_factory
from ..objective import Objective
from ..report.published import runs_beside
from ..samplers import GRIDS, SAMPLERS, THRESHOLDS, Sampler
from ..schedules import SCHEDULES, Schedule
from ..times import TIMES
from ..training import TrainConfig
from .published import About, Published, published_of

#: Keys whose value is a pair by nature; a list of such pairs is a sweep.
_RANGES = ("t_range", "validate_on")
_PAIRS = {
    *(*_RANGES, "data.size", "times.density"),
    *("sample.guidance_interval", "sample.sigma_range", "sample.autoguidance.interval"),
}
#: Keys whose value is a list.
_LISTS = ("metrics", "train.also_ema", "train.ema_widths", "train.keep_at")
#: Parts that have a name, and may be written as it alone.
_PARTS = ("data", "network", "schedule", "times", "target", "extractor")
#: Of these, what may be a user's own ``pkg.mod:make``.
_OWN_CODE = ("network", "extractor")
#: What an entry of ``target`` may set besides the target's own arguments.
_PER_TARGET = ("t_range", "loss_space", "weighting", "times", "supervision")
#: What a recipe says besides its runs; the first two say what they are made from, the others change no result.
_BESIDES = ("extends", "tiny", "about", "published")
#: Where to look for a recipe.
_HOW_LISTED = "reparam study lists the built-in recipes; one of your own is given by the path of its .yaml file."
#: What a likelihood is unless an entry of ``target`` says otherwise.
_LIKELIHOOD = {f.name: f.default for f in fields(Gaussian) if f.name != "target"}


def _check_range(key: str, pair: list[float]) -> None:
    if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= 1:
        raise RecipeError(f"{key}: expected two increasing numbers in [0, 1], found {pair}.")


def _split(part: str | dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a part and its arguments."""
    arguments = {"name": part} if isinstance(part, str) else dict(part)
    return str(arguments.pop("name")), arguments


@dataclass(frozen=True)
class AutoguidanceConfig:
    """What guides samples: the model itself as it was earlier in training.

    Attributes:
        step: of which the averaged network is kept and guides. weight: 1 is no guidance.
        interval: the times t where it is applied.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True}

    step: int
    weight: float
    interval: list[float] = field(default_factory=lambda: [0.0, 1.0])

    def __post_init__(self) -> None:
        if self.step < 1:
            raise RecipeError(f"sample.autoguidance.step must be at least 1, found {self.step}.")
        if not math.isfinite(self.weight):
            raise RecipeError(f"sample.autoguidance.weight must be a finite number, found {self.weight}.")
        _check_range("sample.autoguidance.interval", self.interval)


@dataclass(frozen=True)
class SampleConfig:
    """How samples are drawn for scoring.

    Attributes:
        n: how many. sampler: by which method, a name or a mapping such as {name: ddim, eta: 1}.
        steps: in how many steps. grid: at which times, a name or a mapping such as {name: shifted, shift: 3}.
        threshold: "none", or how x0 is kept in [-1, 1]: "static" or "dynamic". seed: of their noise.
        guidance: the weight of classifier-free guidance; 1 is none.
        guidance_interval: the times t where it is applied.
        autoguidance: how samples are drawn that are scored beside the others, guided by an earlier state.
        start: what they are drawn from: "noise", or "data" with the noise of the grid's first time, so that nothing is
            wrong with them at that time; for data of which there is no end.
        sigma_range: the noise over signal, σ/α, at the grid's last time before 0 and at its first; for the grids karras
            and log_snr, by default the ends of t_range.
        reference: at most so many real pictures they are compared with.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True}

    n: int = 2048
    sampler: str | dict[str, Any] = "heun"
    steps: int = 50
    grid: str | dict[str, Any] = "linear"
    threshold: str = "none"
    seed: int = 0
    guidance: float = 1.0
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    autoguidance: AutoguidanceConfig | None = None
    start: Literal["noise", "data"] = "noise"
    sigma_range: list[float] | None = None
    reference: int = 10_000

    def __post_init__(self) -> None:
        for name, least in (("n", 2), ("steps", 1), ("reference", 2)):
            if getattr(self, name) < least:
                raise RecipeError(f"sample.{name} must be at least {least}, found {getattr(self, name)}.")
        if not math.isfinite(self.guidance):
            raise RecipeError(f"sample.guidance must be a finite number, found {self.guidance}.")
        _check_range("sample.guidance_interval", self.guidance_interval)
        if self.threshold not in THRESHOLDS:
            raise unknown("way to threshold (sample.threshold)", self.threshold, THRESHOLDS)
        _check_part("sample.sampler", _named("sampler", self.sampler), SAMPLERS)
        _check_part("sample.grid", _named("grid", self.grid), GRIDS, supplied=("denoiser", "steps", "start"))
        self._check_sigma_range()
        self.method()

    def _check_sigma_range(self) -> None:
        if self.sigma_range is None:
            return
        if len(self.sigma_range) != 2 or not 0 < self.sigma_range[0] < self.sigma_range[1] < math.inf:
            raise RecipeError(
                f"sample.sigma_range: expected two increasing positive numbers, found {self.sigma_range}."
            )
        name, arguments = _split(self.grid)
        if not takes_ends(self.grid):
            raise Conflict(
                f"sample.sigma_range says where a grid in noise levels begins and ends, and sample.grid is {name}; use "
                "sample.grid: karras or log_snr."
            )
        if "last" in arguments:
            raise Conflict("sample.grid.last and sample.sigma_range say the same thing; remove one of the two.")

    def method(self) -> Sampler:
        """The sampler.

        Raises:
            ReparamError: if it does not take such arguments.
        """
        name, arguments = _split(self.sampler)
        return SAMPLERS[name](**arguments)

    def times(self, denoiser: Denoiser) -> list[float]:
        """The grid that the sampler walks with this model."""
        name, arguments = _split(self.grid)
        return GRIDS[name](denoiser, self.steps, **arguments, **self.ends(denoiser.schedule, denoiser.t_range))

    def ends(self, schedule: Schedule, t_range: tuple[float, float]) -> dict[str, float]:
        """The times ``last`` and ``start`` of ``sigma_range``, for the grid; nothing where there is none.

        Raises:
            RecipeError: if the model is not trained there.
        """
        if self.sigma_range is None:
            return {}
        try:
            last, start = (float(schedule.time_at(-2 * math.log(sigma))) for sigma in self.sigma_range)
        except TimeOutOfRange as e:
            raise RecipeError(f"sample.sigma_range {self.sigma_range}: {e}") from e
        if not t_range[0] <= last < start <= t_range[1]:
            raise RecipeError(
                f"sample.sigma_range {self.sigma_range} is t = [{last:.4g}, {start:.4g}] under {schedule}, and the "
                f"model is trained on [{t_range[0]:g}, {t_range[1]:g}]; keep within that."
            )
        return {"last": last, "start": start}

    def evaluations(self) -> int:
        """How often a sample asks the network, classifier-free guidance aside."""
        once = self.steps * (2 if _split(self.sampler)[0] in ("heun", "edm") else 1)
        return once if self.autoguidance is None else 3 * once  # again, by the model and by its guide


def takes_ends(grid: str | dict[str, Any]) -> bool:
    """Whether a grid can be told the noise levels at which it begins and ends."""
    make = GRIDS.get(_split(grid)[0])
    return make is not None and {"start", "last"} <= inspect.signature(make).parameters.keys()


@dataclass(frozen=True)
class RunConfig:
    """One run: a recipe without sweeps. All fields are plain data."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True}

    data: dict[str, Any]
    network: dict[str, Any]
    target: dict[str, Any]
    name: str = ""
    description: str = ""
    schedule: dict[str, Any] = field(default_factory=lambda: {"name": "rectified_flow"})
    loss_space: str | dict[str, Any] | None = None
    weighting: str | dict[str, Any] | None = None
    times: dict[str, Any] = field(default_factory=lambda: {"name": "uniform"})
    time: str = "t"
    input: str = "none"
    conditional: bool = False
    extractor: dict[str, Any] | None = None
    t_range: list[float] = field(default_factory=lambda: [0.0, 1.0])
    validate_on: list[float] | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    metrics: list[str] | None = None
    rank_by: str | None = None
    supervision: Literal["sample", "exact"] = "sample"
    seed: int = 0

    @property
    def keep_at(self) -> list[int]:
        """The steps after which the averaged network is kept."""
        guide = self.sample.autoguidance
        return sorted({*self.train.keep_at, *([guide.step] if guide else [])})

    def objective(self) -> Objective:
        """The objective that the run trains for.

        Raises:
            ReparamError: if its parts contradict each other.
        """
        low, high = self.t_range
        return Objective(
            self.schedule,
            self.target,
            loss_space=self.loss_space,
            weighting=self.weighting,
            times=self.times,
            time=self.time,
            input=self.input,
            t_range=(low, high),
        )

    def to_dict(self) -> dict[str, Any]:
        """The run as plain data; again a recipe."""
        return asdict(self)


@dataclass(frozen=True)
class Recipe:
    """A loaded recipe.

    Attributes:
        name, description: of the study.
        runs: what it comes to, by run name.
        rank_by: the metric that orders the leaderboard, or None for the data's first.
        about: where it is from and what it takes. published: what others measured.
        tiny: whether this is the small version of it.
    """

    name: str
    description: str
    runs: dict[str, RunConfig]
    rank_by: str | None
    about: About = field(default_factory=About)
    published: tuple[Published, ...] = ()
    tiny: bool = False

    def to_dict(self) -> dict[str, Any]:
        """All that decides the results; two recipes are the same where this is."""
        return {
            "name": self.name,
            "rank_by": self.rank_by,
            "runs": {run: config.to_dict() for run, config in self.runs.items()},
        }


def from_dict(config: dict[str, Any]) -> RunConfig:
    """The run that :meth:`RunConfig.to_dict` wrote."""
    built: RunConfig = _validated("", RunConfig, config)
    return built


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number and refuses a key given twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(k) for k, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.YAMLError(f"key {key!r} is given twice, line {node.start_mark.line + 1}")
    return loader.construct_mapping(node)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """YAML as plain data.

    Raises:
        RecipeError: if it is not well formed.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of the safe loader
    except yaml.YAMLError as e:
        raise RecipeError(f"{where} is not valid YAML: {e}") from e


def built_in() -> dict[str, str]:
    """The recipes that come with reparam: name → text."""
    folder = files("reparam") / "recipes"
    found = [f for f in folder.iterdir() if f.name.endswith(".yaml")]
    return dict(sorted((f.name.removesuffix(".yaml"), f.read_text(encoding="utf-8")) for f in found))


def read_recipe(which: str | Path | dict[str, Any], tiny: bool = False) -> dict[str, Any]:
    """The raw recipe: a built-in one by name, a YAML file, or plain data; merged over the one that it extends.

    Args:
        which: the recipe.
        tiny: merge its ``tiny`` over it, and add "-tiny" to its name.

    Raises:
        UnknownName: if there is no such recipe.
        RecipeError: if the file cannot be read as a mapping, extends itself, or has no ``tiny`` where it is asked for.
    """
    raw = _extended(which, Path(), ())
    small = raw.pop("tiny", None)
    if small is not None and not isinstance(small, dict):
        raise RecipeError(f"tiny: expected a mapping of keys of the recipe, found {small!r}.")
    if not tiny:
        return raw
    name = str(raw.get("name", "study"))
    if small is None:
        raise RecipeError(
            f"recipe {name} has no tiny version: it has no key tiny, which gives what is smaller there, such as "
            "tiny: {train: {steps: 100}}. Leave --tiny out, or make it smaller with --set."
        )
    for key in _BESIDES:
        if key in small and key != "about":
            raise RecipeError(f"tiny.{key}: {key} stands beside tiny in a recipe, not within it.")
    if isinstance(raw.get("about"), dict):
        raw["about"] = _of_full_size(raw["about"])
    return _merged({**raw, "name": f"{name}-tiny"}, small)


def _of_full_size(about: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe's ``about`` its small version inherits: not what it takes and comes to, and the rest marked."""
    kept = {key: said for key, said in about.items() if key not in ("hardware", "expected")}
    unsaid = kept.get("unsaid")
    if isinstance(unsaid, list):
        kept["unsaid"] = [f"of the full size: {text}" if isinstance(text, str) else text for text in unsaid]
    return kept


def _extended(which: Any, beside: Path, seen: tuple[Any, ...]) -> dict[str, Any]:
    """A recipe over the one that it extends; ``beside``: where relative paths begin; ``seen``: what extends it."""
    raw, place = _read(which, beside)
    if not isinstance(which, dict):
        here = place.resolve() if isinstance(place, Path) else place
        if here in seen:
            raise RecipeError(f"extends: {' → '.join(map(str, [*seen, here]))}: a recipe cannot extend itself.")
        seen = (*seen, here)
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise RecipeError(f"extends: expected the name of a built-in recipe or the path of one, found {base!r}.")
    folder = place.parent if isinstance(place, Path) else Path()
    below = _extended(base, folder, seen)
    del below["name"]  # it has its own
    return _merged(below, raw)


def _read(which: Any, beside: Path) -> tuple[dict[str, Any], str | Path]:
    """A recipe as it is written, and its name or path."""
    if isinstance(which, dict):
        return copy.deepcopy(which), ""
    if not isinstance(which, str | Path):
        raise RecipeError(f"a recipe is a name, a path or a mapping, found {which!r}.")
    recipes = built_in()
    if str(which) in recipes:
        raw = parse_yaml(recipes[str(which)], f"recipe {which}")
        raw.setdefault("name", str(which))
        return dict(raw), str(which)
    path = beside / which
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        raise unknown("recipe", which, recipes, _HOW_LISTED)
    try:
        text, where = path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not text"
        raise RecipeError(f"cannot read recipe {path}: {reason}. {_HOW_LISTED}") from e
    raw = parse_yaml(text, where)
    if not isinstance(raw, dict):
        raise RecipeError(f"{where} holds {type(raw).__name__}, expected a mapping with data, network, target.")
    raw.setdefault("name", path.stem)
    return raw, path


def _merged(below: dict[str, Any], above: dict[str, Any], top: bool = True) -> dict[str, Any]:
    """Two mappings, the second over the first, key by key; a part of another name replaces the whole part."""
    merged = dict(below)
    for key, value in above.items():
        before = _named(key, merged.get(key)) if top and key in _PARTS else merged.get(key)
        if not (isinstance(before, dict) and isinstance(value, dict)):
            merged[key] = value
        else:
            same = value.get("name", before.get("name")) == before.get("name")
            merged[key] = _merged(before, value, top=top and key == "tiny") if same else value
    return merged


def override(raw: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """The recipe with ``a.b=value`` settings applied; values are read as YAML.

    Raises:
        RecipeError: if a setting has no "=", or its path leads through a value.
    """
    raw = copy.deepcopy(raw)
    for setting in settings:
        path, equals, text = setting.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise RecipeError(f"--set {setting!r}: expected a.b=value, for example --set train.steps=500.")
        at: dict[str, Any] = raw
        for i, key in enumerate(keys[:-1]):
            below = at.get(key, {})
            if isinstance(below, str) and key in _PARTS:
                below = _named(key, below)
            if not isinstance(below, dict):
                raise RecipeError(f"--set {setting!r}: {'.'.join(keys[: i + 1])} is {below!r}, not a mapping.")
            at[key] = below
            at = below
        at[keys[-1]] = parse_yaml(text, f"--set {setting}")
    return raw


def load_recipe(
    which: str | Path | dict[str, Any],
    settings: list[str] | None = None,
    *,
    tiny: bool = False,
    targets: Sequence[str | dict[str, Any]] = (),
    change: Callable[[dict[str, Any]], dict[str, Any]] = copy.copy,
    extra_networks: tuple[str, ...] = (),
    extra_data: tuple[str, ...] = (),
    derived: bool = False,
) -> Recipe:
    """A recipe, checked and with its sweeps multiplied out.

    Args:
        which, tiny: see :func:`read_recipe`.
        settings: see :func:`override`; they are applied to what ``change`` makes of the recipe.
        targets: further ones to compare.
        extra_networks, extra_data: names that the caller supplies itself.
        derived: whether the recipe is made from another one, whose published numbers may be of runs that it lacks.

    Raises:
        RecipeError, UnknownName, Conflict, …: with the path of the key in the message.
    """
    written = read_recipe(which, tiny)
    raw = _seeded(override(change(copy.deepcopy(written)), settings or []))
    derived = derived or tiny or bool(settings or targets) or not _states_published(which) or raw != _seeded(written)
    about, published = About.of(raw.pop("about", None) or {}), published_of(raw.pop("published", None) or [])
    raw = _with_targets(raw, targets)
    _check_keys("", raw, [*(f.name for f in fields(RunConfig)), "seeds"])
    for key in ("data", "network", "target"):
        if raw.get(key) is None:
            raise RecipeError(f"{key}: missing. A recipe needs data, network and target.")
    for key in ("name", "description", "rank_by"):
        if not isinstance(raw.get(key, ""), str | None):
            raise RecipeError(f"{key}: expected text, found {raw[key]!r}.")
    runs: dict[str, RunConfig] = {}
    for label, chosen in _product(raw):
        config = _run(chosen, extra_networks, extra_data)
        run, n = label, 2
        while run in runs:
            run, n = f"{label}-{n}", n + 1
        runs[run] = config
    _same_scores(list(runs.values()))
    if not derived:
        _check_beside(published, runs)
    return Recipe(
        str(raw.get("name", "study")),
        str(raw.get("description", "")),
        _share_validation(runs),
        raw.get("rank_by"),
        about,
        published,
        tiny,
    )


def _states_published(which: str | Path | dict[str, Any]) -> bool:
    """Whether a recipe itself gives published numbers; those of one that it extends may be of runs that it lacks."""
    return "published" in _read(which, Path())[0]


def _check_beside(published: Sequence[Published], runs: dict[str, RunConfig]) -> None:
    """Refuse a published number that is to stand beside a run that there is not."""
    for i, row in enumerate(published):
        if row.run and not runs_beside(asdict(row), list(runs)):
            raise unknown(f"run (published.{i}.run)", row.run, runs)


def told_to(recipe: Recipe, told: dict[str, Any]) -> Recipe:
    """The recipe with what a study recorded beside it: about, rows (the published ones) and tiny.

    Raises:
        RecipeError: if they are none.
    """
    about, published = About.of(told.get("about") or {}), published_of(told.get("rows") or [])
    return replace(recipe, about=about, published=published, tiny=bool(told.get("tiny")))


def target_named(text: str) -> str | dict[str, Any]:
    """A target as the command line is given it: a .py file, a YAML mapping in braces, or a name.

    Raises:
        RecipeError: if the mapping is not well formed.
    """
    if text.endswith(".py"):
        return {"name": "file", "path": text}
    if not text.lstrip().startswith("{"):
        return text
    found: dict[str, Any] = parse_yaml(text, f"--target {text}")
    return found


def _with_targets(raw: dict[str, Any], targets: Sequence[str | dict[str, Any]]) -> dict[str, Any]:
    """The recipe with further targets; one that is there already is refused."""
    if not targets:
        return raw
    among = raw.get("target")
    listed = list(among) if isinstance(among, list) else [] if among is None else [among]
    for target in targets:
        if not isinstance(target, str | dict):
            raise RecipeError(
                "targets: expected names or mappings, which a recipe and a file of weights can hold, such as "
                f"{{'name': 'linear', 'p': '-sigma', 'q': 'alpha'}}; found {target!r}."
            )
        if any(_named("target", target) == _named("target", one) for one in listed):
            raise Conflict(f"the target {target!r} is compared already; leave it out.")
        listed.append(target)
    return {**raw, "target": listed}


def _seeded(raw: dict[str, Any]) -> dict[str, Any]:
    """``seeds: 3`` is ``seed: [0, 1, 2]``, from ``seed`` on where that is given."""
    if "seeds" not in raw:
        return raw
    seeds, first = raw.pop("seeds"), raw.get("seed", 0)
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise RecipeError(f"seeds: expected how many, an integer of at least 1, found {seeds!r}.")
    if isinstance(first, list):
        raise Conflict(f"seeds ({seeds}) and seed ({first}) both say which seeds there are; remove one of the two.")
    if isinstance(first, bool) or not isinstance(first, int):
        raise RecipeError(f"seed: expected an integer, found {first!r}.")
    return {**raw, "seed": first if seeds == 1 else list(range(first, first + seeds))}


def _same_scores(runs: list[RunConfig]) -> None:
    """Refuse a study whose values could not be compared."""
    for key, values in (
        ("extractor", [c.extractor for c in runs]),
        ("sample.reference", [c.sample.reference for c in runs]),
    ):
        if any(value != values[0] for value in values):
            raise RecipeError(f"{key}: scores by different ones cannot be compared; give one for the whole study.")


def _named(key: str, value: Any) -> Any:
    """The long form of ``network: mlp``, ``data: file.npz`` and the like."""
    if not isinstance(value, str):
        return value
    return data_named(value) if key == "data" else {"name": value}


def data_named(name: str) -> dict[str, Any]:
    """The long form of data given by a built-in name or by a path."""
    if name.endswith((".npy", ".npz")):
        return {"name": "array", "path": name}
    if (Path(name).expanduser() / LATENTS).is_file():
        return {"name": "latents", "path": name}
    if (
        name.endswith((".zip", ".parquet", ".tar"))
        or name.startswith("hub:")
        or (name not in DATA and Path(name).expanduser().is_dir())
    ):
        return {"name": "images", "path": name}
    return {"name": name}


def _sweeps(raw: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Every (path, values) where the recipe gives a list for one value."""
    for key, value in raw.items():
        path = f"{prefix}{key}"
        if path == "network" and isinstance(value, dict) and value.get("name") == "reexpressed":
            continue  # a network that is there already: its lists are its own
        if isinstance(value, dict) and key != "target":
            yield from _sweeps(value, f"{path}.")
        elif isinstance(value, list) and path not in _LISTS:
            if path in _PAIRS and not any(isinstance(v, list) for v in value):
                continue
            if _takes_a_list(prefix, raw, key, value):
                continue
            if not value:
                raise RecipeError(f"{path}: the list of values to sweep is empty.")
            yield path, value


def _takes_a_list(prefix: str, part: dict[str, Any], argument: str, value: list[Any]) -> bool:
    """Whether the list is what a built-in network (or the like) takes for one value of that argument."""
    parts: dict[str, dict[str, Any]] = {"schedule.": SCHEDULES, "times.": TIMES}
    parts |= dict.fromkeys(("network.", "network.base.", "network.head."), NETWORKS)
    make = parts.get(prefix, {}).get(str(part.get("name")))
    if make is None:
        return False
    hints = get_type_hints(make.__init__ if inspect.isclass(make) else make)
    try:
        TypeAdapter(hints[argument]).validate_python(value, strict=True)
    except (KeyError, ValidationError):
        return False
    return True


def _product(raw: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every combination of the swept values, with a name for it."""
    sweeps = list(_sweeps(raw))
    size = math.prod(len(values) for _, values in sweeps)
    if size > 10_000:
        raise RecipeError(f"this recipe comes to {size} runs; sweep fewer values.")
    # Names: what is swept, coarse to fine, the target last.
    order = sorted(sweeps, key=lambda s: (s[0] == "seed", s[0] == "target"))
    for values in itertools.product(*(v for _, v in order)):
        chosen = copy.deepcopy(raw)
        parts = []
        for (path, among), value in zip(order, values, strict=True):
            at = chosen
            *parents, last = path.split(".")
            for key in parents:
                at = at[key]
            at[last] = copy.deepcopy(value)
            parts.append(_label(last, value, among))
        yield "-".join(parts) or _label("target", raw["target"]), chosen


def _label(key: str, value: Any, among: Sequence[Any] = ()) -> str:
    """A value's part of a run's name, fit for a file's; ``among``: all values of its sweep."""
    text = value.get("name", "") if isinstance(value, dict) else value
    if key == "target" and text == "gaussian" and isinstance(value, dict):
        return _likelihood_label(value, among)
    if key == "target" and isinstance(value, dict) and value.get("supervision") == "exact":
        text = f"{text}_exact"
    if key == "target" and text == "file" and isinstance(value, dict):
        text = Path(str(value.get("path", text))).stem
    text = text if key in (*_PARTS, "sampler", "grid", "supervision") else f"{key}{text}"
    return _file_name(text) or key


def _file_name(text: Any) -> str:
    return re.sub(r"[^\w.+=]+", "_", str(text)).strip("_.")


def _likelihood_label(value: dict[str, Any], among: Sequence[Any]) -> str:
    """Such as x0-gaussian-full; and of the rest what sets it apart from others that are as much."""
    what, rest = _likelihood_parts(value)
    others = [_likelihood_parts(v) for v in among if isinstance(v, dict) and v.get("name") == "gaussian"]
    rivals = [theirs for name, theirs in others if name == what]
    told = [
        key if setting is True else f"{key} {setting.get('name') if isinstance(setting, dict) else setting}"
        for key, setting in rest.items()
        if setting != _LIKELIHOOD.get(key) and any(theirs.get(key) != setting for theirs in rivals)
    ]
    return "-".join(filter(None, map(_file_name, [*what, *told])))


def _likelihood_parts(value: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """What always names a likelihood, and all the rest, its target's own arguments included."""
    rest = {**_LIKELIHOOD, **value}
    name, arguments = rest.pop("name"), rest.pop("target", None)
    arguments = dict(arguments) if isinstance(arguments, dict) else {"name": arguments}
    return [str(arguments.pop("name", "")), str(name), str(rest.pop("covariance"))], {**rest, **arguments}


def _run(raw: dict[str, Any], extra_networks: tuple[str, ...], extra_data: tuple[str, ...]) -> RunConfig:
    raw = {
        **raw,
        **{k: _named(k, raw[k]) for k in _PARTS if k in raw},
    }
    if isinstance(raw["target"], dict):
        own = dict(raw["target"])
        raw |= {k: own.pop(k) for k in _PER_TARGET if k in own}
        raw["target"] = own
        raw["times"] = _named("times", raw.get("times", "uniform"))
    config = _validated("", RunConfig, raw)
    if config.loss_space is not None and config.weighting is not None:
        raise Conflict(
            f"loss_space ({config.loss_space}) and weighting ({config.weighting}) are both given; a loss space "
            "is itself a weighting. Remove one of the two."
        )
    _check_seeds(config)
    _check_part("data", config.data, DATA, extra_data)
    if config.data.get("holdout") == 0:
        raise RecipeError("data.holdout is 0, and a run is scored and validated on held-out data; give 0.1 or so.")
    supplied = ("dim", "image", "channels", "classes", "outputs")
    _check_part("network", config.network, NETWORKS, extra_networks, supplied)
    _check_part("schedule", config.schedule, SCHEDULES)
    _check_part("times", config.times, TIMES)
    _check_supervision(config)
    if config.extractor is not None:
        _check_part("extractor", config.extractor, EXTRACTORS)
    if config.sample.guidance != 1 and not config.conditional:
        raise Conflict(
            f"sample.guidance is {config.sample.guidance:g}, and guidance needs a conditional model: conditional: true."
        )
    if (guide := config.sample.autoguidance) is not None and guide.step > config.train.steps:
        raise RecipeError(
            f"sample.autoguidance.step is {guide.step}, and train.steps {config.train.steps}: a guide is an earlier "
            "state of the model."
        )
    if config.metrics is not None and not config.metrics:
        raise RecipeError("metrics: the list is empty; leave the key out to measure all that apply.")
    if config.sample.guidance != 1 and config.train.label_drop == 0:
        raise Conflict(
            "train.label_drop is 0, so the model never learns what it predicts without a label, and guidance "
            f"(sample.guidance: {config.sample.guidance:g}) needs that. Set train.label_drop=0.1."
        )
    for name in [*(config.metrics or []), *([config.rank_by] if config.rank_by else [])]:
        if name not in METRICS and name not in MODEL_METRICS:
            raise unknown("metric", name, [*METRICS, *MODEL_METRICS])
    for key in _RANGES:
        if (pair := getattr(config, key)) is not None:
            _check_range(key, pair)
    try:
        objective = config.objective()
    except ReparamError as e:
        raise type(e)(f"target {config.target.get('name')}: {e}") from e
    config.sample.ends(objective.schedule, objective.conventions.t_range)
    if config.sample.method().needs_smooth and not objective.schedule.smooth:
        raise Unsupported(
            f"sample.sampler: {config.sample.method().name} steps in t, where {objective.schedule} has kinks; use "
            "--set sample.sampler=ddim."
        )
    return config


def _check_seeds(config: RunConfig) -> None:
    """Seeds that differ draw different noise; beyond these limits some would not."""
    for key, seed in (
        ("seed", config.seed),
        ("sample.seed", config.sample.seed),
        ("data.seed", config.data.get("seed")),
    ):
        if isinstance(seed, int) and not 0 <= seed < 2**63:
            raise RecipeError(f"{key} must lie in 0 … 2**63 - 1, found {seed}.")


def _check_supervision(config: RunConfig) -> None:
    if config.supervision == "exact" and config.target.get("name") == "gaussian":
        raise Conflict(
            "supervision: exact has a network learn the exact mean of x0, and a gaussian target learns from samples "
            "how far they lie from its own; remove one of the two."
        )


def _check_keys(path: str, given: dict[str, Any], known: list[str]) -> None:
    for key in given:
        if key not in known:
            raise unknown("key", f"{path}{key}", [f"{path}{k}" for k in known])


def _validated(path: str, kind: Any, raw: dict[str, Any]) -> Any:
    try:
        # In JSON mode a mapping may stand for a dataclass, while types stay strict.
        return TypeAdapter(kind).validate_json(json.dumps(raw, default=str))
    except ValidationError as e:
        raise _translated(path, kind, e) from e


def _translated(path: str, kind: Any, error: ValidationError) -> ReparamError:
    first = error.errors()[0]
    where = path + ".".join(str(p) for p in first["loc"] if not str(p).startswith(("function-", "dict[", "str")))
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        parent, _, _ = where.rpartition(".")
        known = [f"{parent}.{f.name}" if parent else f.name for f in fields(_section(kind, parent))]
        return unknown("key", where, known)
    if first["type"] in ("missing", "missing_argument"):
        return RecipeError(f"{where}: missing.")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ReparamError):
        return cause
    return RecipeError(f"{where}: expected {_in_yaml_words(first['msg'])}, found {first['input']!r}.")


def _section(kind: Any, path: str) -> Any:
    """The dataclass that stands at a path in another one."""
    for key in filter(None, path.split(".")):
        hint = get_type_hints(kind)[key]
        kind = next((option for option in get_args(hint) if is_dataclass(option)), hint)
    return kind


def _in_yaml_words(message: str) -> str:
    wanted = message.removeprefix("Input should be ").removeprefix("a valid ")
    return {"array": "a list", "an object": "a mapping", "dictionary": "a mapping"}.get(wanted, wanted)


def _check_part(
    key: str,
    config: dict[str, Any],
    known: dict[str, Callable[..., Any]] | dict[str, type],
    extra: tuple[str, ...] = (),
    supplied: tuple[str, ...] = (),
) -> None:
    """Check ``{name: …, argument: …}`` against what the named thing takes, type by type."""
    if "name" not in config:
        raise RecipeError(f"{key}.name is missing; found {config!r}.")
    name = str(config["name"])
    if name in extra or (key in _OWN_CODE and is_factory(name)):
        return
    if name not in known:
        raise unknown(key, name, [*known, *(["pkg.mod:make"] if key in _OWN_CODE else [])])
    make: Any = known[name]
    hints = get_type_hints(make.__init__ if inspect.isclass(make) else make)
    parameters = [p for p in inspect.signature(make).parameters if p not in supplied]
    for argument, value in config.items():
        if argument == "name":
            continue
        if argument not in parameters:
            raise unknown(f"key of {key} {name!r}", f"{key}.{argument}", [f"{key}.{p}" for p in parameters])
        try:
            TypeAdapter(hints.get(argument, Any)).validate_python(value, strict=True)
        except ValidationError as e:
            wanted = _in_yaml_words(e.errors()[0]["msg"])
            raise RecipeError(f"{key}.{argument}: expected {wanted}, found {value!r}.") from e


def _share_validation(runs: dict[str, RunConfig]) -> dict[str, RunConfig]:
    """Give every run the same times to validate on: those inside every run's t_range."""
    low = max(c.t_range[0] for c in runs.values())
    high = min(c.t_range[1] for c in runs.values())
    shared = [low, high] if low < high else None
    return {
        run: c if c.validate_on else RunConfig(**{**vars(c), "validate_on": shared or c.t_range})
        for run, c in runs.items()
    }
