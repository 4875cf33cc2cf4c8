"""What a study will cost, measured on a few steps before it starts."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..data import Data
from ..denoiser import evaluating
from ..errors import DataError, NetworkError, ReparamError
from ..metrics import Reference
from ..training import Diverged, Engine, Trainer, Validation
from .pool import Resources
from .recipe import RunConfig
from .run import check_data, chosen_metrics, data_of, make_network, sample_chunk, scored, trainer_of
from .scale import Machine, Projection, Stated, Work, averages_of, counting, memory, project, stated, work_of

#: What Python and torch themselves take, a process.
_BASE_BYTES = 350e6
#: Networks whose cost elsewhere is computed, and the numbers of GPUs.
_COUNTED, _GPUS = ("mlp", "jit", "unet"), (1, 8, 64)
#: On a CPU, a batch of more numbers than this is counted before it is tried; a step that is tried takes at most so many
#: operations, and this share of the memory.
_LARGE, _MOST_FLOPS, _MOST_MEMORY = 2**23, 1e12, 0.25


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes of one run; and the floating-point operations of one step of training, where counted.

    ``scaled``: the seconds that training would take on so many GPUs, computed (:mod:`.scale`), where it was asked for.
    ``validate_s``: of measuring the x0-error by noise level, as often as the recipe asks.
    ``kept``: of the bytes, those that a step holds for its backward pass.
    ``computed``: nothing was tried, for want of data; then seconds and bytes are of one such GPU, and only of training.
    """

    train_s: float
    sample_s: float
    score_s: float
    bytes: float
    flops: float = 0.0
    scaled: dict[int, float] = field(default_factory=dict)
    kept: float = 0.0
    computed: bool = False
    validate_s: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.train_s + self.validate_s + self.sample_s + self.score_s


def probe(
    runs: dict[str, RunConfig],
    on: Resources,
    *,
    data: Data | None = None,
    factory: Callable[..., nn.Module] | None = None,
) -> dict[str, Cost]:
    """The cost of every run, from a few steps of each distinct data and network.

    It is also where a network that does not fit its data is found out, before anything starts.

    Raises:
        NetworkError, DataError: if a run cannot work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(on.threads)
    seen: dict[str, Cost] = {}
    costs = {}
    try:
        for run, config in runs.items():
            check_data(config, data or data_of(config))
            varied = (config.train.batch, config.time, config.input, config.rank_by, config.conditional)
            likelihood = config.target if config.target.get("name") == "gaussian" else None
            loss = (likelihood, config.supervision)
            kind = json.dumps([config.data, config.network, config.extractor, *varied, *loss])
            if kind not in seen:
                mine = data or data_of(config)
                fitting = chosen_metrics(config, mine)
                if config.rank_by and config.rank_by not in fitting:
                    raise DataError(
                        f"rank_by: {config.rank_by} is not measured on {mine.name}; these are: {', '.join(fitting)}. "
                        f"For example --set rank_by={fitting[0]}."
                    )
                seen[kind] = _tried(config, mine, factory, on.devices[0])
            costs[run] = _of_run(config, data or data_of(config), seen[kind], len(runs))
    finally:
        torch.set_num_threads(threads)
    return costs


def _of_run(config: RunConfig, data: Data, one: Cost, runs: int) -> Cost:
    """A run's cost from that of one step, one evaluated sample and one picture's features."""
    c = config.sample
    evaluations = c.evaluations() * (1 if c.guidance == 1 else 2)
    # Real pictures' features are computed once for all runs.
    n = scored(config, data)
    features = one.score_s * (n + (min(c.reference, len(data.train)) + n) / runs)
    validate = one.sample_s * config.train.validations * Validation.size(data.shape)
    train, sample = one.train_s * config.train.steps, one.sample_s * evaluations * n
    return replace(one, train_s=train, validate_s=validate, sample_s=sample, score_s=features)


def probe_training(
    config: RunConfig, engine: Engine, data: Data, factory: Callable[..., nn.Module] | None = None
) -> Cost:
    """The cost of one training on an engine's processes, from a few steps of this process's share of a batch.

    Raises:
        NetworkError, DataError, ReparamError: if it cannot work.
    """
    low, high = engine.part(config.train.batch, config.train.accumulate)
    share = replace(config, train=replace(config.train, batch=high - low))
    cost = _of_run(share, data, _tried(share, data, factory, str(engine.device)), 1)
    return replace(cost, scaled=_scaled(config, data)) if engine.first and factory is None else cost


#: What more GPUs, or faster ones, would not make shorter, by :attr:`reparam.studies.scale.Projection.bound`.
_LIMITED = {
    "compute": "",
    "host": "; the host is the limit, which starts every operation",
    "network": "; the network between the GPUs is the limit",
    "reading": "; reading the data is the limit",
}


@dataclass(frozen=True)
class Computed:
    """What training costs elsewhere, by run, where the data are not here: nothing of it was tried.

    Attributes:
        pictures: what is known of the data. flops: of a step, by run.
        on: the runs by the number of GPUs, for those numbers among which every run's batch can be shared out.
    """

    pictures: Stated
    flops: dict[str, float]
    on: dict[int, dict[str, Projection]]

    def cost(self) -> Cost:
        """That of the first run, as a training has it."""
        run, first = next(iter(self.on[1].items()))
        scaled = {n: runs[run].seconds for n, runs in self.on.items()}
        return Cost(first.seconds, 0.0, 0.0, first.memory.total, self.flops[run], scaled, computed=True)

    def lines(self) -> list[str]:
        """For a reader: of what, how many operations, and on so many GPUs how long and how much memory."""
        machine, runs, (_, count) = Machine(), self.on[1], self.pictures.stored
        whole = sum(self.flops[run] * p.steps for run, p in runs.items())
        told = [
            "the data are not here (data.path is missing), so nothing is tried on this machine. Computed, not measured",
            f"(docs/scale.md), for pictures of shape {list(self.pictures.data.shape)}, as the recipe states, and "
            f"{count:,} of them, by {self.pictures.like}'s number:",
            f"  {'training' if len(runs) == 1 else f'{len(runs)} trainings, one after another'}: {_flops(whole)}FLOP",
        ]
        for n, found in self.on.items():
            most, time = max(p.memory.total for p in found.values()), sum(p.seconds for p in found.values())
            beyond = f", and one has {machine.memory / 1e9:.0f} GB" if most > machine.memory else ""
            slowest = max(found.values(), key=lambda p: p.seconds)
            told.append(
                f"  on {n:>2} {machine.name}: {in_words(time)}, {most / 1e9:.1f} GB of memory each{beyond}"
                f"{_LIMITED[slowest.bound]}"
            )
        return [*told, "  validation, samples and scores come on top"]


def computed(runs: dict[str, RunConfig]) -> Computed | None:
    """The cost of runs whose data are not here, from the size of their pictures; None where that cannot be had.

    It can where no run has a data.path, all state the same size, and every network is built in.

    Raises:
        NetworkError, ReparamError: if a network does not fit such pictures, or a batch cannot be shared out.
    """
    configs = list(runs.values())
    pictures = stated(configs[0])
    if pictures is None or any(c.data != configs[0].data or c.network["name"] not in _COUNTED for c in configs):
        return None
    counted: dict[str, Work] = {}
    works = {}
    for run, c in runs.items():
        likelihood = c.target if c.target.get("name") == "gaussian" else None
        how = (c.train.precision, c.train.checkpoint_activations)
        kind = json.dumps([c.network, c.conditional, likelihood, *how])
        if kind not in counted:
            with _telling(c, pictures.data):
                counted[kind] = work_of(c, pictures.data)
        works[run] = counted[kind]
    fits = [n for n in _GPUS if n == 1 or all(c.train.batch % (n * c.train.accumulate) == 0 for c in configs)]
    on = {n: {run: project(works[run], c, n, pictures.stored) for run, c in runs.items()} for n in fits}
    return Computed(pictures, {run: works[run].flops * c.train.batch for run, c in runs.items()}, on)


def _scaled(config: RunConfig, data: Data) -> dict[int, float]:
    """Seconds of training on GPUs that are not here, where the network is built in and the batch can be shared out."""
    if config.network["name"] not in _COUNTED:
        return {}
    work, stored = work_of(config, data), (data.train[0].nbytes, data.count)
    fits = [n for n in _GPUS if config.train.batch % (n * config.train.accumulate) == 0]
    return {n: project(work, config, n, stored).seconds for n in fits}


def describe_training(cost: Cost, config: RunConfig, engine: Engine) -> str:
    """One line: how long, how many operations, how much memory."""
    steps, whole = config.train.steps, cost.flops * engine.world
    each = cost.train_s / steps
    return (
        f"about {in_words(cost.seconds)}: {in_words(cost.train_s)} of training, {each:.3g} s a step of "
        f"{_flops(whole)}FLOP ({_flops(whole * steps)}FLOP in all, {_flops(cost.flops / each)}FLOP/s a process), "
        f"the rest validation, samples and scores; {cost.bytes / 1e9:.1f} GB of memory a process{_elsewhere(cost)}"
    )


def _elsewhere(cost: Cost) -> str:
    """What training would take on GPUs that are not here."""
    if not cost.scaled:
        return ""
    told = ", ".join(f"{in_words(seconds)} on {gpus}" for gpus, seconds in cost.scaled.items())
    return f". Computed, not measured, for {Machine().name}s (docs/scale.md): training takes {told}"


def _flops(value: float) -> str:
    """A number with the prefix of its size."""
    for size, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def _tried(config: RunConfig, data: Data, factory: Callable[..., nn.Module] | None, device: str) -> Cost:
    with _telling(config, data):
        fits = _affordable(config, data, factory, device)
        if fits >= config.train.batch:
            return _measure(config, data, factory, device)
        few = replace(config, train=replace(config.train, batch=fits, accumulate=1))
        return _more(_measure(few, data, factory, device), config.train.batch / fits, config.train.accumulate)


@contextlib.contextmanager
def _telling(config: RunConfig, data: Data) -> Iterator[None]:
    """Inside, what goes wrong in a network is told as its error."""
    try:
        yield
    except ReparamError:
        raise
    except Exception as e:
        name = config.network["name"]
        called = "net(x, time) with x of shape [B, …] and time of shape [B]"
        if config.conditional:
            called = f"net(x, time, y=y) with labels y, int64 of shape [B], {len(data.classes)} meaning 'no label'"
        raise NetworkError(
            f"network {name} failed in its first training step on samples of shape {list(data.shape)}: {e!r}. It is "
            f"called as {called} (--debug shows where)."
        ) from e


def _affordable(config: RunConfig, data: Data, factory: Callable[..., nn.Module] | None, device: str) -> int:
    """How many samples a step may have that is only tried: on a CPU no more than it does in some seconds."""
    batch = config.train.batch
    known = factory is None and config.network["name"] in _COUNTED
    if device != "cpu" or not known or batch * math.prod(data.shape) <= _LARGE:
        return batch
    work: Work = work_of(config, data)
    room = _MOST_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**31
    return max(1, min(batch, int(_MOST_FLOPS / work.flops), int(room / work.kept)))


def _more(one: Cost, times: float, parts: int) -> Cost:
    """The cost of a batch that is so many times as large, in so many parts."""
    kept = one.kept * times / parts
    return replace(
        one, train_s=one.train_s * times, flops=one.flops * times, bytes=one.bytes + kept - one.kept, kept=kept
    )


def _measure(config: RunConfig, data: Data, factory: Callable[..., nn.Module] | None, device: str) -> Cost:
    """Seconds a step, an evaluated sample, and a picture's features; bytes."""
    trainer = trainer_of(config, data, make_network(config, data, factory), Engine(device))
    with counting(trainer.trainee) as count:
        _step(trainer)
    flops, kept = count.flops, count.kept / config.train.accumulate
    del count  # and with it what it has kept
    times = [_timed(lambda: _step(trainer), trainer.device) for _ in range(5)]
    n = min(config.sample.n, sample_chunk(data.shape))
    x = torch.randn(n, *data.shape, device=trainer.device)
    cond = {"y": torch.zeros(n, dtype=torch.long, device=trainer.device)} if config.conditional else {}
    denoiser = trainer.denoiser
    with evaluating(denoiser):
        t = float(trainer.trainee.objective.times_at(torch.tensor([0.5])))
        forward = _timed(lambda: denoiser(x, t, **cond), trainer.device) / n
    parameters = sum(p.numel() * p.element_size() for p in trainer.trainee.parameters())
    tensors: list[Any] = [data.train, trainer.validation.x0, trainer.validation.eps]
    size = sum(t.numel() * t.element_size() for t in tensors)
    features = _features(config, data, device)
    # And the samples kept on the way.
    held = _BASE_BYTES + memory(parameters, averages_of(config), kept, size).total + 60 * x.nbytes
    return Cost(sorted(times)[2], forward, features, held, flops, kept=kept)


def _step(trainer: Trainer) -> None:
    """A step, of the usual length too where training diverges in it; the run itself will tell of that."""
    try:
        trainer.update()
    except Diverged:
        trainer.trainee.lost = None  # told already, and nothing to be copied with the network


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that it takes, on a device that works ahead of the host too."""
    wait = torch.cuda.synchronize if device.type == "cuda" else _ready
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def _ready() -> None:
    """A CPU is done when it returns."""


def _features(config: RunConfig, data: Data, device: str) -> float:
    """Seconds that a picture's features take, where they are needed; what is missing is found out here."""
    if not data.pictures or not {"frechet_distance", "class_error"} & set(chosen_metrics(config, data)):
        return 0.0
    extractor = Reference(data, config.extractor, device=device).extractor
    some = data.train[:32]
    extractor(some[:2])
    start = time.perf_counter()
    extractor(some)
    return (time.perf_counter() - start) / len(some)


def describe(costs: dict[str, Cost], on: Resources) -> str:
    """One line: how long, how much memory."""
    total = sum(c.seconds for c in costs.values())
    longest = max(c.seconds for c in costs.values())
    wall = max(total / on.jobs, longest)
    memory = sum(sorted((c.bytes for c in costs.values()), reverse=True)[: on.jobs])
    return f"about {in_words(wall)} and {memory / 1e9:.1f} GB of memory ({on.describe()})"


def in_words(seconds: float) -> str:
    """A length of time for a reader."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
