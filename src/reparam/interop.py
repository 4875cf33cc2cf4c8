"""diffusers' models as denoisers, and ours in diffusers' pipelines.

Every convention is read from what a model's scheduler states: its table of noise levels, what the network
predicts. Where nothing is stated, or two places contradict each other, nothing is guessed: the caller's word
decides, and is recorded.

In diffusers pictures lie in [−1, 1]; its integer step k of a table of T is our t = (k + 1)/T; its flow-matching
σ is our t, and the network predicts ε − x0, the velocity; which time it is given then, and whether its negative, no
scheduler says, and is known by the model's class; the EDM schedulers' network is EDM's F, or its negative
("v_prediction").
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .denoiser import Denoiser
from .errors import NetworkError, OutputError, SpecError, Unsupported, unknown
from .files import read_header
from .networks import DiffusersModel, UNet
from .networks.diffusers_model import FLOW_CALLS, FlowCall, model_class
from .schedules import BETAS, DDPM, VE, RectifiedFlow, Schedule
from .targets import ALIASES, Target, target
from .tools.markers import NOT_V, ZERO_SNR, read_markers

#: Beta tables: diffusers' names and ours.
_TABLES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "squared_cosine"}
#: Targets that diffusers' schedulers have: our names and theirs.
_PREDICTIONS = {ours: theirs for theirs, ours in ALIASES.items()}
#: Where a pipeline keeps the network that denoises.
_PARTS = ("unet", "transformer")
#: And a second one, for the times at which the first is not asked.
_SECOND = "transformer_2"
_OWN = "its own "
#: The times that a flow model can be given.
_FLOW_TIMES = ("t", "1-t", "1000t")
#: α of their table, of float32, against ours.
_CLOSE = 3e-5


def from_diffusers(
    source: Any,
    scheduler: Any = None,
    prediction_type: Target | str | dict[str, Any] | None = None,
    *,
    time: str | None = None,
    t_range: tuple[float, float] | None = None,
    data: dict[str, Any] | None = None,
) -> Denoiser:
    """A model of diffusers as a denoiser, under the conventions that its scheduler states.

    What is remarkable (a contradiction that the caller resolved, clipping that the scheduler would do and reparam does
    not, outputs that are dropped) is said as a warning and kept in ``denoiser.data["diffusers"]``.

    Args:
        source: a pipeline, a folder that one was saved to (only its network and scheduler are read, from safetensors),
            or a model such as ``UNet2DModel``; conditions go through by its own names,
            ``cond={"encoder_hidden_states": …}``.
        scheduler: a scheduler, or its folder, in place of the pipeline's own; needed beside a model alone.
        prediction_type: what the network predicts, by diffusers' name, ours, or as a target: the caller's word, which
            wins over what is stated.
        time: which time a flow model is given for the scheduler's σ: "t" (σ), "1-t" (1 − σ) or "1000t" (the
            scheduler's timestep). Needed where reparam does not know a pipeline of its class; wins where it does.
        t_range: where to use it; needed for noise prediction at zero terminal SNR, for example (0, 0.98).
        data: what is known of its data, in addition.

    Raises:
        SpecError: if it is nowhere stated what the network predicts (a default of diffusers states nothing) or which
            time a flow model is given, if statements contradict each other and no prediction_type is given, or if a
            scheduler or a folder cannot be read.
        SingularTime: if x0 does not follow from the prediction inside t_range.
        Unsupported: for a scheduler of another kind of process.
        NetworkError: if the model is not called as model(data, timestep), or diffusers is not installed.
    """
    found = _found(source, scheduler)
    if found.scheduler is None:
        raise SpecError(
            f"{type(found.model).__name__} comes without a scheduler, and a model of diffusers alone does not say what "
            "it predicts or under which noise; give one: from_diffusers(model, scheduler)."
        )
    meaning = _decided(found, found.word if prediction_type is None else prediction_type)
    process = _called(found, _process(found.scheduler), time)
    _check_end(found, process.schedule)
    net = DiffusersModel.of(found.model, time_scale=process.time_scale, sign=meaning.sign)
    found.notes += _remarks(found.scheduler, net)
    denoiser = Denoiser(
        net,
        process.schedule,
        meaning.target,
        time=process.time,
        input=process.input,
        t_range=process.t_range if t_range is None else t_range,
        data=_data(found, net) | (data or {}),
    )
    denoiser.overrides = found.overrides or None
    for note in found.notes:
        warnings.warn(note, stacklevel=2)
    return denoiser


def raw_network(source: Any) -> DiffusersModel:
    """The network of a pipeline, a folder or a model of diffusers, called as ``net(x, time, **cond)``; nothing about
    what it predicts is read."""
    return DiffusersModel.of(_found(source, None).model)


def schedule_of(scheduler: Any) -> Schedule:
    """The forward process of a scheduler of diffusers.

    Raises:
        Unsupported: if it is neither a table of betas, flow matching nor EDM.
    """
    return _process(scheduler).schedule


def times_of(scheduler: Any, steps: int, mu: float | None = None) -> list[float]:
    """The falling times at which a scheduler of diffusers would ask the network, and where it ends.

    For ``times=`` of :func:`reparam.sample`, with ``start=`` from :func:`start_of`. It ends at the first entry of the
    table in place of 0 under ``set_alpha_to_one=False``.

    Args:
        scheduler: a scheduler, or a pipeline with one. It is not changed.
        steps: how many.
        mu: of a flow-matching scheduler with dynamic shifting.

    Raises:
        SpecError: if it is no scheduler.
        Unsupported: if its steps lie between those of its table, run from data to noise, or cannot be that many; if mu
            is needed.
    """
    scheduler, process = _set(scheduler, steps, mu)
    if isinstance(process.schedule, DDPM):
        return _table_times(scheduler, process.schedule)
    sigmas = scheduler.sigmas.double()
    if isinstance(process.schedule, RectifiedFlow):
        times = sigmas
    else:
        low = process.schedule.time_at(-2 * sigmas[sigmas > 0].log())
        times = torch.cat([low, torch.zeros(len(sigmas) - len(low), dtype=torch.float64)])
        # Their σ is of float32: its least and greatest are a rounding beyond ours.
        times[times > 0] = times[times > 0].clamp(*process.t_range)
    return _distinct(times.tolist())


def start_of(scheduler: Any, noise: Tensor, steps: int, mu: float | None = None) -> Tensor:
    """Where diffusers' loop begins from unit noise, as x at the first of :func:`times_of`.

    For ``start=`` of :func:`reparam.sample`. Theirs begins from σ_max ε or sqrt(σ_max² + 1) ε in some, and from ε
    itself in others, wherever the first step stands; the states of the Euler and Heun kinds are x_t/α besides.

    Args:
        scheduler, steps, mu: as of :func:`times_of`.
        noise: what their pipeline draws, of variance 1.

    Raises:
        SpecError, Unsupported: as of :func:`times_of`.
    """
    scheduler, process = _set(scheduler, steps, mu)
    x: Tensor = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    if isinstance(process.schedule, DDPM):
        # A network of a table is shown x_t, whatever the state is.
        x = scheduler.scale_model_input(x, scheduler.timesteps[0])
    return x


def to_diffusers(denoiser: Denoiser, folder: str | Path) -> list[str]:
    """Write a denoiser as a folder that diffusers loads without reparam: network, scheduler and, where diffusers has
    one that can call the network, a pipeline.

    The network is diffusers' own (:class:`reparam.networks.UNet` is its UNet2DModel). Under a DDPM table,
    ``time: step``, it predicts eps, x0 or v and becomes a DDIMPipeline with "trailing" steps, without clipping; on
    rectified flow, ``time: 1000t``, it predicts velocity and becomes a DDPMPipeline with a
    FlowMatchEulerDiscreteScheduler; models that came from diffusers, as their own pipelines call them.

    Args:
        denoiser: the model.
        folder: a new or empty folder.

    Returns:
        What a user of the folder should know.

    Raises:
        NetworkError: if it is no denoiser.
        Unsupported: for anything that diffusers has no name for; the message says what.
        OutputError: if the folder is not empty, or cannot be written.
    """
    model = _model_of(denoiser)
    scheduler = _scheduler_for(denoiser, model)
    folder = Path(folder)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder} is not an empty folder; choose another place (--out).")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            notes = _write(model, scheduler, temporary) + _differences(denoiser)
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o777 & ~mask)  # a temporary folder is private
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as e:
        raise OutputError(f"cannot write {folder}: {e.strerror or e}. Choose another place (--out).") from e
    return notes


# Reading


@dataclass
class _Found:
    """A network, its scheduler, and what is said of it where."""

    model: nn.Module
    scheduler: Any
    #: By place: what the network is said to predict, in diffusers' words.
    stated: dict[str, str] = field(default_factory=dict)
    #: By place: whether the last step is said to be pure noise.
    zero_snr: dict[str, bool] = field(default_factory=dict)
    #: Pictures in [−1, 1] (True), latents (False), or unknown.
    pictures: bool | None = None
    #: The scheduler is the caller's; and what it says that the network predicts.
    given: bool = False
    word: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class _Process(NamedTuple):
    """How the noise is added, and how a network is called under it."""

    schedule: Schedule
    time: str
    input: str = "none"
    t_range: tuple[float, float] = (0.0, 1.0)
    time_scale: float = 1.0


class _Meaning(NamedTuple):
    target: Target
    sign: int = 1


def _found(source: Any, scheduler: Any) -> _Found:
    found = _in_folder(Path(source)) if isinstance(source, str | Path) else _in_memory(source)
    if scheduler is None:
        return found
    # What the model came with is still said, and may contradict: a solver put in its place often forgets the type.
    found.stated = {_OWN + place if place.startswith("scheduler") else place: w for place, w in found.stated.items()}
    found.given = True
    found.scheduler = _given_scheduler(scheduler)
    stated = _stated(found.scheduler)
    found.stated |= stated
    if stated:
        found.word = next(iter(stated.values()))
    return found


def _given_scheduler(scheduler: Any) -> Any:
    if not isinstance(scheduler, str | Path):
        return _checked(scheduler)
    path = Path(scheduler)
    if not path.is_dir():
        raise SpecError(f"no folder {path}; expected one that a scheduler of diffusers was saved to, or a scheduler.")
    where = _scheduler_folder(path)
    if where is None:
        raise SpecError(f"{path} holds no scheduler_config.json, and neither does scheduler in it or beside it.")
    return _read_scheduler(where)


def _checked(scheduler: Any) -> Any:
    """A scheduler that is one."""
    if isinstance(scheduler, type):
        name = scheduler.__name__
        raise SpecError(f"found the class {name}, expected a scheduler of diffusers: {name}(…), with its settings.")
    if not isinstance(getattr(scheduler, "config", None), Mapping):
        raise SpecError(f"found {type(scheduler).__name__}, expected a scheduler of diffusers.")
    return scheduler


def _in_memory(source: Any) -> _Found:
    parts = getattr(source, "components", None)
    if not isinstance(parts, Mapping):
        if isinstance(source, nn.Module):
            return _Found(source, None)
        raise NetworkError(
            f"found {type(source).__name__}, expected a pipeline of diffusers, the folder that one was saved to, or a "
            "model such as UNet2DModel."
        )
    model = next((parts[name] for name in _PARTS if parts.get(name) is not None), None)
    if model is None:
        raise NetworkError(
            f"{type(source).__name__} has none of the parts {', '.join(_PARTS)}; give the model itself and its "
            "scheduler."
        )
    if parts.get(_SECOND) is not None:
        raise _two_networks(type(source).__name__)
    found = _Found(model, parts.get("scheduler"), pictures=not _compressed(parts))
    if found.scheduler is not None:
        found.stated = _stated(_checked(found.scheduler))
    return found


def _two_networks(what: object) -> Unsupported:
    return Unsupported(
        f"{what} has two networks ({_PARTS[1]}, {_SECOND}), one for each part of the noise; give one of them and the "
        "scheduler, with the times of that part as t_range."
    )


def _compressed(parts: Any) -> bool:
    return any(name in parts for name in ("vae", "vqvae", "movq"))


def _in_folder(path: Path) -> _Found:
    if not path.is_dir():
        raise SpecError(
            f"no folder {path}; expected one that diffusers saved a pipeline or a model to. Nothing is downloaded: "
            "save_pretrained a pipeline there, or give it instead of its name."
        )
    place = next((p for p in (*(path / part for part in _PARTS), path) if (p / "config.json").is_file()), None)
    if place is None:
        raise SpecError(f"{path} holds no config.json, and neither do {' and '.join(_PARTS)} in it.")
    if place != path and (path / _SECOND / "config.json").is_file():
        raise _two_networks(path)
    name = _json(place / "config.json").get("_class_name")
    kind = model_class(str(name))
    try:
        model = kind.from_pretrained(str(place), use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as e:
        raise SpecError(
            f"the {name} in {place} cannot be loaded: {e} Only safetensors are read; pickled weights are not."
        ) from e
    index = path / "model_index.json"
    found = _Found(model, None, pictures=not _compressed(_json(index)) if index.is_file() else None)
    where = _scheduler_folder(path)
    if where is not None:
        found.scheduler = _read_scheduler(where)
        found.stated = _stated(found.scheduler)
    _add_marks(found, place)
    return found


def _scheduler_folder(path: Path) -> Path | None:
    places = (path / "scheduler", path, path.parent / "scheduler")
    return next((p for p in places if (p / "scheduler_config.json").is_file()), None)


def _read_scheduler(folder: Path) -> Any:
    import diffusers

    record = _json(folder / "scheduler_config.json")
    name = record.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise SpecError(f"{folder}/scheduler_config.json is of {name!r}, which diffusers does not have as a scheduler.")
    try:
        scheduler: Any = kind.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, NotImplementedError) as e:
        raise SpecError(f"{folder}/scheduler_config.json does not stand for a scheduler: {e}") from e
    return scheduler


def _json(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise SpecError(f"{file} cannot be read as JSON: {e}.") from e
    if not isinstance(record, dict):
        raise SpecError(f"{file} holds {type(record).__name__}, expected a mapping.")
    return record


def _stated(scheduler: Any) -> dict[str, str]:
    """What a scheduler says that its network predicts; a default that nobody chose says nothing."""
    name = type(scheduler).__name__
    kind = scheduler.config.get("prediction_type")
    if kind is None:
        return {f"scheduler ({name})": "flow_prediction"} if _is_flow(scheduler) else {}
    return {} if "prediction_type" in scheduler.config.get("_use_default_values", ()) else {f"scheduler ({name})": kind}


def _decided(found: _Found, given: Target | str | dict[str, Any] | None) -> _Meaning:
    """What the network predicts: the caller's word, or what is stated without contradiction."""
    said = ", ".join(f"{place} says {word!r}" for place, word in found.stated.items())
    words = [word for word in found.stated.values() if word != NOT_V]
    if given is None and not words:
        raise SpecError(
            f"nothing states what this network predicts ({said or 'prediction_type of its scheduler is not set'}), and "
            "nothing is guessed; diffusers would silently take a default, mostly 'epsilon'. Say "
            "prediction_type='epsilon', 'sample', 'v_prediction' or 'flow_prediction', or find out with reparam "
            "identify."
        )
    chosen = _meaning(words[0] if given is None else given, found)
    others = {place: word for place, word in found.stated.items() if not _agrees(word, chosen, found)}
    if not others:
        return chosen
    if given is None:
        raise SpecError(f"contradiction: {said}. Say which is right: prediction_type=…, or ask reparam identify.")
    word = given if isinstance(given, str) else target(given).name
    found.notes.append(f"contradiction: {said}; {word!r} was given, and is used.")
    stated = next((w for w in others.values() if w != NOT_V), None)
    if stated is not None:
        was, now = _meaning(stated, found).target.config(), chosen.target.config()
        if was != now:  # not if they differ in sign alone
            found.overrides["target"] = {"file": was, "given": now}
    return chosen


def _agrees(word: str, meaning: _Meaning, found: _Found) -> bool:
    if word == NOT_V:
        return meaning.target.name != "v"
    return _meaning(word, found) == meaning


def _meaning(word: Target | str | dict[str, Any], found: _Found) -> _Meaning:
    scheduler = found.scheduler
    if _is_edm(scheduler) and word in ("epsilon", "v_prediction"):
        edm = target({"name": "edm", "sigma_data": float(scheduler.config.sigma_data)})
        return _Meaning(edm, 1 if word == "epsilon" else -1)
    chosen = target(word)
    if _is_flow(scheduler) and chosen.name == "velocity":
        return _Meaning(chosen, _flow_call(found.model).sign)
    return _Meaning(chosen)


def _flow_call(model: Any) -> FlowCall:
    return FLOW_CALLS.get(type(model).__name__, FlowCall("1000t"))


def _called(found: _Found, process: _Process, word: str | None) -> _Process:
    """The process with the time that the network is given: of flow matching no scheduler says it."""
    name, scale = type(found.model).__name__, process.time_scale
    if not isinstance(process.schedule, RectifiedFlow):
        if word is not None:
            raise Unsupported(
                f"time= is of flow models, and {type(found.scheduler).__name__} gives a network its time itself: "
                f"{process.time!r} here. For another, make a Denoiser by hand."
            )
        return process
    if word is not None and word not in _FLOW_TIMES:
        raise unknown("time of a flow model", word, _FLOW_TIMES)
    usual = FLOW_CALLS.get(name)
    if word is None and (usual is None or (usual.time != "1000t" and scale != 1)):
        why = f" where a scheduler counts to {1000 * scale:g}" if usual else ", which is none of those reparam knows"
        raise SpecError(
            f"no scheduler says which time a flow model is given, and neither does {name}{why}. See how its pipeline "
            "calls it, and say time='t' for σ, '1-t' for 1 − σ, or '1000t' for the scheduler's own timestep."
        )
    if usual is not None and word not in (None, usual.time):
        found.notes.append(
            f"diffusers' pipeline gives {name} its time as {usual.time!r}; {word!r} was given, and is used."
        )
        found.overrides["time"] = {"file": usual.time, "given": word}
    time = usual.time if usual is not None and word is None else str(word)
    if time != "1000t":
        return process._replace(time=time, time_scale=1.0)
    return process._replace(time_scale=scale * _own_factor(found.model))


def _own_factor(model: Any) -> float:
    """By what the pipelines of a model multiply the scheduler's timestep."""
    key = _flow_call(model).factor
    return 1.0 if key is None else float(model.config.get(key, 1.0))


def _add_marks(found: _Found, place: Path) -> None:
    """What the weights themselves say, by the community's markers."""
    for file in sorted(place.glob("*.safetensors")):
        header = read_header(file)
        for mark in read_markers(header.shapes, header.metadata).marks:
            if mark.fact == ZERO_SNR:
                found.zero_snr[f"{mark.where} in {file.name}"] = bool(mark.value)
            else:
                found.stated[f"{mark.where} in {file.name}"] = _PREDICTIONS.get(mark.value, mark.value)


def _check_end(found: _Found, schedule: Schedule) -> None:
    """Whether the last step is pure noise: a fact of its own, on which marks and scheduler may differ."""
    pure = float(schedule.alpha(1.0)) == 0
    wrong = [where for where, zero in found.zero_snr.items() if zero != pure]
    if not (wrong and isinstance(schedule, DDPM)):
        return
    said = (
        f"contradiction: by {wrong[0]} the last step is {'not ' if pure else ''}pure noise (zero terminal SNR), and by "
        f"{type(found.scheduler).__name__} it is{'' if pure else ' not'}"
    )
    if not found.given:
        raise SpecError(f"{said}. Give the right one as scheduler=…, with or without rescale_betas_zero_snr.")
    found.notes.append(f"{said}; the scheduler that was given is used.")


# The forward process


def _is_flow(scheduler: Any) -> bool:
    config = scheduler.config
    return type(scheduler).__name__.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))


def _is_edm(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("EDM")


def _process(scheduler: Any) -> _Process:
    config, name = _checked(scheduler).config, type(scheduler).__name__
    if (config.get("stages") or 1) > 1:
        raise Unsupported(
            f"{name} goes from noise to data in {config.get('stages')} stages of growing size, which is no one forward "
            "process; make a Denoiser by hand for one stage."
        )
    if _is_flow(scheduler):
        if config.get("invert_sigmas"):
            raise Unsupported(f"{name} with invert_sigmas counts its time from noise to data; make a Denoiser by hand.")
        return _Process(RectifiedFlow(), "1000t", time_scale=config.num_train_timesteps / 1000)
    if _is_edm(scheduler):
        low, high = float(config.sigma_min), float(config.sigma_max)
        # Ours has the variance of sigma_max less that of sigma_min at t = 1.
        schedule = VE(low, math.hypot(low, high))
        first = float(schedule.time_at(-2 * math.log(low)))
        return _Process(schedule, "log_sigma/4", "edm", (first, 1.0))
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        return _Process(_table(scheduler), "step")
    raise Unsupported(
        f"{name} is neither a table of betas, nor flow matching, nor EDM; state its conventions by hand: "
        "rp.Denoiser(rp.interop.raw_network(model), schedule, target, time=…)."
    )


def _table(scheduler: Any) -> DDPM:
    """The table of a scheduler: by its name where that gives its numbers, else the numbers themselves."""
    config, signal = scheduler.config, scheduler.alphas_cumprod.double().cpu()
    zero = bool(config.get("rescale_betas_zero_snr"))
    own = config.get("trained_betas")
    name = _TABLES.get(str(config.get("beta_schedule")))
    found = None
    if own is not None:
        found = DDPM(own, len(own), zero)
    elif name is not None:
        ends = (config.get("beta_start"), config.get("beta_end"))
        fixed = BETAS[name][1]
        kept = [None if fixed == (0.0, 0.0) or end == usual else end for end, usual in zip(ends, fixed, strict=True)]
        found = DDPM(name, len(signal), zero, *kept)
    if found is not None and len(signal) == found.T:
        close = (found.alpha(found.time(torch.arange(found.T))) - signal.sqrt()).abs() < _CLOSE
        # Some schedulers write 2⁻²⁴ for the 0 at the end, so as not to divide by it.
        if bool(close[: len(signal) - zero].all()):
            return found
    before = torch.cat([signal.new_ones(1), signal[:-1]])
    return DDPM((1 - signal / before).tolist(), len(signal))


def _set(scheduler: Any, steps: int, mu: float | None) -> tuple[Any, _Process]:
    """A copy of a scheduler, or of a pipeline's, set to so many steps."""
    scheduler = copy.deepcopy(getattr(scheduler, "scheduler", scheduler))
    process, name = _process(scheduler), type(scheduler).__name__
    if "Inverse" in name:
        raise Unsupported(
            f"{name} runs from data to noise; take the times of the scheduler that it inverts, reversed: reparam's "
            "ddim walks rising times."
        )
    if scheduler.config.get("use_dynamic_shifting") and mu is None:
        raise Unsupported(f"{name} shifts its steps by the size of the picture; give mu=.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise Unsupported(f"steps is a whole number of 1 or more, found {steps!r}.")
    try:
        scheduler.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
    except (TypeError, ValueError, LookupError, ArithmeticError) as e:
        settings = "" if mu is None else f" with mu={mu!r}"
        raise Unsupported(f"{name} cannot be set to {steps} steps{settings}: {e}") from e
    return scheduler, process


def _table_times(scheduler: Any, table: DDPM) -> list[float]:
    steps = scheduler.timesteps.double()
    if bool((steps != steps.round()).any()):
        raise Unsupported(
            f"the steps of {type(scheduler).__name__} ({scheduler.config.get('timestep_spacing')}) lie between those "
            "of its table; use timestep_spacing='trailing' without Karras or other sigmas where that has whole steps "
            "(EulerDiscrete, HeunDiscrete; not KDPM2Discrete), or one of reparam's grids."
        )
    if hasattr(scheduler, "final_alpha_cumprod"):
        exact = float(scheduler.final_alpha_cumprod) == 1
    else:
        exact = not hasattr(scheduler, "sigmas") or float(scheduler.sigmas[-1]) == 0
    return _distinct([*table.time(steps.long()).tolist(), 0.0 if exact else float(table.time(0))])


def _distinct(times: list[float]) -> list[float]:
    return sorted(set(times), reverse=True)


# What is said


def _remarks(scheduler: Any, net: DiffusersModel) -> list[str]:
    config, notes = scheduler.config, []
    if config.get("thresholding"):
        quantile = config.get("dynamic_thresholding_ratio", 0.995)
        notes.append(
            f"{type(scheduler).__name__} thresholds x0 at every step (thresholding); reparam does not unless asked: "
            f"sample from reparam.samplers.DynamicallyClipped(denoiser, quantile={quantile:g})."
        )
    elif config.get("clip_sample"):
        limit = config.get("clip_sample_range", 1.0)
        notes.append(
            f"{type(scheduler).__name__} clips x0 to [{-limit:g}, {limit:g}] at every step (clip_sample); reparam does "
            f"not unless asked: sample from reparam.samplers.Clipped(denoiser, limit={limit:g})."
        )
    if net.learned_variance:
        notes.append(
            f"{type(net.model).__name__} has twice as many channels out as in: the second half, a learned variance, is "
            "dropped."
        )
    return notes


def _data(found: _Found, net: DiffusersModel) -> dict[str, Any]:
    """What is known of the data: their shape, and their range where they are pictures."""
    own: Mapping[str, Any] = net.model.config  # type: ignore[assignment]
    record: dict[str, Any] = {}
    size, channels = own.get("sample_size"), own.get("in_channels")
    if size is not None and channels is not None:
        record["shape"] = [channels, *([size, size] if isinstance(size, int) else size)]
    if found.pictures:
        record |= {"pictures": True, "min": -1.0, "max": 1.0}
    kept = {
        "model": type(found.model).__name__,
        "scheduler": type(found.scheduler).__name__,
        "stated": found.stated,
        "notes": found.notes,
    }
    return record | {"diffusers": kept}


# Writing


def _model_of(denoiser: Denoiser) -> Any:
    if not isinstance(denoiser, Denoiser):
        raise NetworkError(
            f"found {type(denoiser).__name__}, expected a denoiser: rp.load(file), or rp.Denoiser(network, schedule, "
            "target, time=…), which say what a network predicts."
        )
    net = denoiser.net
    if type(denoiser).forward is not Denoiser.forward:
        raise Unsupported(f"{type(denoiser).__name__} is more than a network; give the denoiser inside it.")
    if isinstance(net, UNet):
        return net._whole[0]
    if isinstance(net, DiffusersModel):
        if net.sign != (_flow_call(net.model).sign if isinstance(denoiser.schedule, RectifiedFlow) else 1):
            raise Unsupported(
                "diffusers has no name for the negative of a target; this network predicts that of what pipelines "
                f"make of a {type(net.model).__name__}."
            )
        return net.model
    raise Unsupported(
        f"{type(net).__name__} is not a network of diffusers, which could not load it; what can be written is the "
        "network unet and models that came from diffusers."
    )


def _scheduler_for(denoiser: Denoiser, model: Any) -> Any:
    """The scheduler that states a denoiser's conventions.

    Raises:
        Unsupported: if diffusers has none.
    """
    c = denoiser.conventions
    if c.likelihood is not None:
        raise Unsupported("diffusers has no name for a Gaussian likelihood; it can have the mean's target alone.")
    if c.input != "none":
        raise Unsupported(
            f"diffusers' schedulers for {c.schedule.name} do not scale the input, found input={c.input!r}."
        )
    if c.t_range[1] != 1:
        raise Unsupported(
            f"diffusers begins at t = 1, and this model was trained on t in [{c.t_range[0]:g}, {c.t_range[1]:g}]: its "
            "first step would ask the network where it has learned nothing."
        )
    if isinstance(c.schedule, DDPM):
        return _ddim(denoiser)
    if isinstance(c.schedule, RectifiedFlow) and c.schedule.noise_scale == 1:
        return _flow(denoiser, model)
    raise Unsupported(
        f"diffusers has no scheduler for {c.schedule}; it has DDPM tables (ddpm) and rectified flow of noise scale 1."
    )


def _ddim(denoiser: Denoiser) -> Any:
    from diffusers import DDIMScheduler

    table, c = denoiser.schedule, denoiser.conventions
    assert isinstance(table, DDPM)
    if c.target.name not in ("eps", "x0", "v"):
        raise Unsupported(
            "diffusers' schedulers of a table know epsilon (eps), sample (x0) and v_prediction (v), not "
            f"{c.target.name}."
        )
    if c.time != "step" or getattr(denoiser.net, "time_scale", 1.0) != 1:
        raise Unsupported(
            f"diffusers gives a network the integer steps of its table, and this one wants time={c.time!r}; train it "
            "with time: step."
        )
    if isinstance(table.betas, str):
        names = {ours: theirs for theirs, ours in _TABLES.items()}
        (start, end), own = BETAS[table.betas][1], (table.beta_start, table.beta_end)
        ends = [usual if o is None else o for o, usual in zip(own, (start, end), strict=True)]
        which: dict[str, Any] = {"beta_schedule": names[table.betas]}
        if any(ends):
            which |= {"beta_start": ends[0], "beta_end": ends[1]}
    else:
        which = {"trained_betas": list(table.betas)}
    return DDIMScheduler(
        num_train_timesteps=table.T,
        prediction_type=_PREDICTIONS[c.target.name],
        rescale_betas_zero_snr=table.zero_terminal_snr,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        **which,
    )


def _flow(denoiser: Denoiser, model: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    c = denoiser.conventions
    if c.target.name != "velocity":
        raise Unsupported(
            f"diffusers' flow matching knows networks that predict velocity, and this one predicts {c.target.name}."
        )
    usual = _flow_call(model).time
    if c.time != usual:
        raise Unsupported(
            f"diffusers' flow matching gives a {type(model).__name__} its time as {usual!r}, and this one wants "
            f"time={c.time!r}; train it with time: {usual}."
        )
    scale = getattr(denoiser.net, "time_scale", 1.0) / (_own_factor(model) if usual == "1000t" else 1.0)
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=round(1000 * scale))


def _write(model: Any, scheduler: Any, folder: Path) -> list[str]:
    """The folder's files, and how to load them where there is no pipeline."""
    from diffusers import DDIMPipeline, DDPMPipeline

    flow = _is_flow(scheduler)
    alone = type(model).__name__ == "UNet2DModel" and model.config.get("num_class_embeds") is None
    if alone:
        pipeline: Any = DDPMPipeline if flow else DDIMPipeline
        pipeline(unet=model, scheduler=scheduler).save_pretrained(folder)
    else:
        part = "transformer" if "Transformer" in type(model).__name__ else "unet"
        model.save_pretrained(folder / part)
        scheduler.save_pretrained(folder / "scheduler")
    if alone:
        return []
    kind = type(model).__name__
    return [
        f"diffusers has no pipeline that gives a {kind} its conditions alone; load the parts: "
        f"{kind}.from_pretrained(folder, subfolder={part!r}) and "
        f"{type(scheduler).__name__}.from_pretrained(folder, subfolder='scheduler')"
    ]


def _differences(denoiser: Denoiser) -> list[str]:
    """Where the folder, used as it is, would do otherwise than reparam."""
    notes, data, schedule = [], denoiser.data or {}, denoiser.schedule
    low, high = data.get("min"), data.get("max")
    if low is not None and high is not None and (min(low, high) < -1.01 or max(low, high) > 1.01):
        notes.append(
            f"diffusers' pipelines show [-1, 1] as a picture, and this network's data reach from {low:.3g} to "
            f"{high:.3g}: its pictures come out clipped, unless they are turned back first"
        )
    if isinstance(schedule, DDPM):
        notes.append("its steps agree with reparam's even grid where their number divides that of the table")
        if abs(float(schedule.sigma(1.0)) - 1) > 1e-4:
            notes.append(
                f"diffusers begins from unit noise, and at the end of this table sigma is {schedule.sigma(1.0):.4f}; "
                "for the same pictures give reparam that noise as start="
            )
    else:
        notes.append(
            "its scheduler takes even steps from t = 1 to its least noise, just above 0, and one from there, unlike "
            "reparam's even grid; for the same pictures give reparam times=rp.interop.times_of(scheduler, steps)"
        )
    if denoiser.t_range[0] > 0:
        notes.append(
            f"it was trained on t from {denoiser.t_range[0]:g} on: more than {int(1 / denoiser.t_range[0])} steps ask "
            "it below"
        )
    return notes
