"""What a network predicts, found out by trying: every reading of its output, held against real data.

Real data are noised at middle levels, the network is asked once for every way of asking, and every target is turned
into x0 by algebra. The right reading has the least error in x0: comparing the losses themselves would always favour
the noise. Readings whose x0 estimates coincide are one; where the next reading is not clearly worse, or the best does
no better than a network that knows nothing, the verdict is "undecided".
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Data, load_data
from ..denoiser import Conventions, Denoiser
from ..errors import DataError, NetworkError, ReparamError, SpecError, Unsupported
from ..schedules import DDPM, Schedule, schedule
from ..targets import EDM, Negated, Target
from .hypotheses import (
    LEVELS,
    Call,
    Hypothesis,
    Probe,
    Work,
    first_look,
    hypotheses,
    in_the_running,
    schedules_tried,
    targets_tried,
)

#: The error of the next reading over that of the best, from which on the best is believed.
MARGIN = 1.3
#: The error over that of guessing, from which on a network shows no knowledge of the data.
KNOWS = 0.8
#: Mean squared difference of two x0 estimates over their error, up to which it does not matter which is used.
SAME = 0.1
#: The error of a reading over that of the best, up to which schedule, time and input are not told apart.
TOLD = 1.1


@dataclass(frozen=True)
class Identified:
    """What was found.

    Attributes:
        verdict: what the network predicts, "-" before it for the opposite sign, or "undecided".
        equivalent: other names of the same function: x0 read so differs by less than a tenth of its squared error.
        sign: 1, or -1 for a network that predicts the negative. target: the target as plain data, for a spec.
        schedule, time, input: those of the best reading; ``schedules``, ``times`` and ``inputs`` are all that cannot
            be told apart from them, by name. Where there are several, the target may still be certain.
        margin: the x0-error of the next reading that is another, over that of the best.
        error: the best x0-error over that of guessing, mean over ``levels``; 1 is what knowing nothing gives.
        scores: the best reading of every target: its label, conventions, ``error``, and ``by_level``.
        symptoms: what else is odd, in sentences. reason: the verdict in a sentence.
        levels: log-SNR, relative to the data's variance, at which the network was asked; ``count`` samples each.
    """

    verdict: str
    equivalent: list[str]
    sign: int | None
    target: dict[str, Any] | None
    schedule: dict[str, Any]
    schedules: list[str]
    time: str
    times: list[str]
    input: str
    inputs: list[str]
    margin: float
    error: float
    scores: list[dict[str, Any]]
    levels: list[float]
    count: int
    reason: str = ""
    symptoms: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain data."""
        return asdict(self)

    def text(self) -> str:
        """The findings for a reader."""
        ways = {"schedule": self.schedules, "time": self.times, "input": self.inputs}
        lines = [
            f"{self.verdict}: {self.reason}",
            "",
            *([f"the same as      {', '.join(self.equivalent)}"] if self.equivalent else []),
            # Of a network that knows nothing, the best way of asking it means nothing.
            *(f"{name:<17}{' or '.join(seen)}" for name, seen in ways.items() if self.error <= KNOWS),
            f"asked            {self.count} samples at log-SNR {', '.join(f'{v:g}' for v in self.levels)}",
            "",
            "x0-error over guessing, best reading of each target:",
            *(
                f"  {row['error']:<8.3g} {row['target']:<22} {_named(schedule(row['schedule']))}, time {row['time']}, "
                f"input {row['input']}"
                for row in self.scores[:8]
            ),
        ]
        return "\n".join([*lines, *(f"note: {symptom}" for symptom in self.symptoms)])


def identify(
    what: Any,
    data: Any = None,
    *,
    network: Any = None,
    schedule_: Any = None,
    cond: Mapping[str, Tensor] | None = None,
    labels: bool = False,
    use_spec: bool = True,
    n: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, expected: None,
) -> Identified:
    """Find out what a network predicts.

    Args:
        what: a network called as ``net(x, time, **cond)``, a :class:`reparam.Denoiser`, the folder of a run, a
            .safetensors file, "pkg.mod:make", or a diffusers pipeline or its folder.
        data: real data that it was not trained on: a tensor [N, …] in the units the network sees, a
            :class:`reparam.data.Data`, or what a recipe names. Of a run, its own held-out data by default.
        network: for weights whose network is not written beside them: an nn.Module, its name or mapping.
        schedule_: the forward process, where it is known; otherwise all in use are tried.
        cond: passed on to the network, one entry a sample. labels: pass it the labels of the data, as ``y``
            (``class_labels`` to a model of diffusers).
        use_spec: whether what the weights say of themselves is one of the readings tried, and is compared.
        n: how many samples, by default 512, fewer of large ones. seed: of the noise.
        progress: told how many samples the network has seen, and how many it is expected to see.

    Raises:
        DataError: if there are no data, or they do not fit.
        NetworkError: if the network cannot be made, or can be asked in none of the ways tried.
        SpecError: if a file cannot be read.
    """
    net, claimed, own = opened(what, network)
    x0, tags = _samples(own() if data is None and own is not None else data, n, labels)
    given = {} if tags is None else {_name_of_labels(net): tags}
    place = next(net.parameters(), torch.zeros(()))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    more = {name: value[: len(x0)].to(place.device) for name, value in {**given, **(cond or {})}.items()}
    claimed = claimed if use_spec else None
    with _asleep(net):
        probe = Probe(net, x0.to(place.device), noise.to(place.device), more, work=Work(progress))
        found = _Found.of(probe, _tried(probe, schedule_, claimed))
        return found.concluded([*_odd(found, claimed), *_other_units(found)])


@contextlib.contextmanager
def _asleep(net: nn.Module) -> Iterator[None]:
    """Inside, the network is not in training mode."""
    was = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(was)


def _tried(probe: Probe, given: Any, claimed: Conventions | None) -> list[Hypothesis]:
    """All readings; with those of the conventions that the weights claim."""
    processes = schedules_tried() if given is None else [schedule(given)]
    targets = targets_tried(math.sqrt(probe.variance))
    if claimed is not None:
        kind, _ = _without_sign(claimed.target)
        targets += [kind] if kind not in targets and type(kind).apply is Target.apply else []
        processes += [claimed.schedule] if given is None and claimed.schedule not in processes else []
    usable = [process for process in processes if process.sigma(0.5).ndim == 0 and probe.reached_by(process)]
    if not usable:
        raise Unsupported(
            f"{processes[0]} does not serve: identify needs the same noise in all elements, and log-SNR from "
            f"{LEVELS[0]:g} to {LEVELS[-1]:g} for data of this variance."
        )
    return hypotheses(usable, targets)


def _without_sign(kind: Target) -> tuple[Target, int]:
    return (kind.of, -1) if isinstance(kind, Negated) else (kind, 1)


@dataclass(frozen=True)
class _Found:
    """Every reading with its error, and what follows from them."""

    probe: Probe
    #: All readings, and those of them that were worth more than a first look.
    everything: list[Hypothesis]
    tried: list[Hypothesis]
    by_level: Tensor
    error: Tensor
    best: int
    #: Labels whose x0 estimates coincide with the best one's; the verdict is their plainest.
    labels: list[str]
    rival: int | None

    @classmethod
    def of(cls, probe: Probe, everything: list[Hypothesis], looked: list[float] | None = None) -> _Found:
        tried = in_the_running(everything, first_look(probe, everything) if looked is None else looked)
        probe.work.expect(probe.planned(tried, LEVELS))
        by_level = probe.errors(tried)
        error = by_level.mean(1)
        if not bool(error.isfinite().any()):
            why = next(iter(probe.refused.values()), "its answers were not finite")
            raise NetworkError(
                f"{type(probe.net).__name__} could not be asked in any way tried: {why}. It is called as "
                "net(x, time); what else it needs goes into cond=."
            )
        best = int(error.argmin())
        # Estimates this close have errors whose roots differ by at most sqrt(SAME) of the best one's.
        near = (error <= error[best] * (1 + math.sqrt(SAME)) ** 2).nonzero().flatten().tolist()
        if float(error[best]) > KNOWS:  # which of them coincide is of no interest then
            near = [best]
        apart = probe.apart(tried[best], [tried[i] for i in near])
        same = {tried[i].label for i, off in zip(near, apart.tolist(), strict=True) if off <= SAME}
        plainest = list(dict.fromkeys(h.label for h in tried))
        labels = sorted(same, key=plainest.index)
        family = _family(labels[0])  # of EDM's F, with whatever sigma_data
        others = [i for i, h in enumerate(tried) if h.label not in same and _family(h.label) != family]
        rival = min(others, key=lambda i: float(error[i])) if others else None
        return cls(probe, everything, tried, by_level, error, best, labels, rival)

    @property
    def least(self) -> float:
        return float(self.error[self.best])

    @property
    def margin(self) -> float:
        return math.inf if self.rival is None else float(self.error[self.rival]) / self.least

    @property
    def decided(self) -> bool:
        return self.least <= KNOWS and self.margin >= MARGIN

    @property
    def fitted(self) -> bool:
        """Whether the best is EDM's F for the spread of these very data: what another target for data of unit spread
        looks like on data in other units."""
        kind = self.reading.target
        return isinstance(kind, EDM) and kind.sigma_data not in (0.5, 1.0)

    @property
    def reading(self) -> Hypothesis:
        """The best one under the plainest of its names."""
        of_it = [i for i, h in enumerate(self.tried) if h.label == self.labels[0]]
        return self.tried[min(of_it, key=lambda i: float(self.error[i]))]

    @property
    def readings(self) -> list[Hypothesis]:
        """All of that name that cannot be told apart from the best, best first."""
        most = TOLD * self.least
        close = [i for i, h in enumerate(self.tried) if h.label == self.labels[0] and float(self.error[i]) <= most]
        return [self.tried[i] for i in sorted(close, key=lambda i: float(self.error[i]))] or [self.reading]

    def reason(self) -> str:
        """The verdict in a sentence."""
        best, error = self.labels[0], f"{self.least:.3g} of that of guessing"
        if self.least > KNOWS:
            return (
                f"the best reading ({best}) has an x0-error of {error}: the network shows no knowledge of these data. "
                "It may be untrained, trained on other data or other units, or follow a convention not tried."
            )
        rival = "no other" if self.rival is None else self.tried[self.rival].label
        against = f"the next, {rival}, has {self.margin:.3g} times that"
        if not self.decided:
            return f"the best reading ({best}) has an x0-error of {error}, and {against}: too little to tell."
        return f"read as {best}, the network has an x0-error of {error}; {against}."

    def concluded(self, symptoms: list[str]) -> Identified:
        """The findings, for the user."""
        h, close = self.reading, self.readings
        config = h.target.config()
        signed = config if h.sign > 0 else {"name": "negated", "of": config}
        return Identified(
            verdict=_family(self.labels[0]) if self.decided else "undecided",
            equivalent=self.labels[1:] if self.decided else [],
            sign=h.sign if self.decided else None,
            target=signed if self.decided else None,
            schedule=h.call.schedule.config(),
            schedules=list(dict.fromkeys(_named(r.call.schedule) for r in close)),
            time=h.call.time,
            times=list(dict.fromkeys(r.call.time for r in close)),
            input=h.call.input,
            inputs=list(dict.fromkeys(r.call.input for r in close)),
            margin=self.margin,
            error=self.least,
            scores=self.scores(),
            levels=list(LEVELS),
            count=len(self.probe.x0),
            reason=self.reason(),
            symptoms=symptoms,
        )

    def scores(self) -> list[dict[str, Any]]:
        """The best reading of every label, best first."""
        rows: dict[str, dict[str, Any]] = {}
        for i in self.error.argsort().tolist():
            h = self.tried[i]
            if h.label not in rows and math.isfinite(float(self.error[i])):
                call = {"schedule": h.call.schedule.config(), "time": h.call.time, "input": h.call.input}
                rows[h.label] = {
                    "target": h.label,
                    **call,
                    "error": float(self.error[i]),
                    "by_level": self.by_level[i].tolist(),
                }
        return list(rows.values())


def _family(label: str) -> str:
    """A label without its arguments."""
    return label.partition("(")[0]


def _named(process: Schedule) -> str:
    """A schedule with those of its arguments that are not the usual ones."""
    usual = type(process)().config() if process.name not in ("path", "elementwise") else {}
    rest = [f"{k}={v}" for k, v in process.config().items() if k != "name" and usual.get(k) != v]
    return f"{process.name}({', '.join(rest)})" if rest else process.name


def _odd(found: _Found, claimed: Conventions | None) -> list[str]:
    """What is odd about the network."""
    probe, notes = found.probe, []
    if probe.extra:
        notes.append(
            f"the network returns {probe.extra} more channels than the data have, of a variance by the look of it; "
            "they were left out."
        )
    if probe.refused:
        notes.append(f"it could not be asked with time {', '.join(sorted(probe.refused))}.")
    if found.least > KNOWS:
        return notes
    notes += _about_time(found)
    if found.decided:
        notes += _about_the_end(found)
        notes += [] if claimed is None else _contradictions(found, claimed)
    return notes


def _response(probe: Probe, call: Call, scale: float) -> float:
    """How much the answer to one input changes over the times of middle noise, given in ``scale`` times their size."""
    t = [probe.time_of(level, call.schedule) for level in (LEVELS[0], LEVELS[-1])]
    x = call.factor(t[1]) * call.schedule.add_noise(probe.x0, probe.eps, t[1])
    ends = [probe.asked(x, (scale * call.network_time(at)).to(x), call.time) for at in t]
    if ends[0] is None or ends[1] is None:
        return math.nan
    return float((ends[0] - ends[1]).norm() / ends[1].norm().clamp(min=1e-12))


def _about_time(found: _Found) -> list[str]:
    if found.reading.call.time == "step":
        return []
    up_to_one = [r.call for r in found.readings if r.call.time in ("t", "1-t")]
    call = up_to_one[0] if up_to_one else found.reading.call
    usual = _response(found.probe, call, 1.0)
    if not usual < 0.01:
        return []
    note = f"the network hardly responds to its time (its answer changes by {usual:.2g} over middle noise)"
    if up_to_one and _made_for_a_thousand(found.probe, call):
        return [
            f"{note}, but would to 1000 times as much: its time embedding is made for times up to 1000, and it was "
            "trained with times up to 1."
        ]
    return [f"{note}: the time conventions cannot be told apart."]


def _made_for_a_thousand(probe: Probe, call: Call) -> bool:
    """Whether it takes a thousand times as much for the answer to change; not some thirty times already."""
    full = _response(probe, call, 1000.0)
    return full > 0.05 and _response(probe, call, 30.0) < 0.2 * full


def _about_the_end(found: _Found) -> list[str]:
    """Zero terminal SNR: trained so or not, and what comes of pure noise."""
    notes = []
    processes = [r.call.schedule for r in found.readings]
    kinds = {s.zero_terminal_snr for s in processes if isinstance(s, DDPM)}
    if all(isinstance(s, DDPM) for s in processes) and len(kinds) == 1:
        notes.append(f"{'trained' if kinds == {True} else 'not trained'} with zero terminal SNR.")
    elif len(kinds) == 2:
        notes.append("at middle noise it cannot be told whether it was trained with zero terminal SNR.")
    error = _from_pure_noise(found)
    if error is not None and error > 1.1:
        notes.append(
            f"from pure noise at t = 1 its x0 is worse than the mean of the data ({error:.3g} times its error): "
            "it was not trained with zero terminal SNR; start sampling before t = 1."
        )
    return notes


def _from_pure_noise(found: _Found) -> float | None:
    """The error of x0 made from pure noise at t = 1, over the data's variance; None where it is not defined."""
    h, probe = found.reading, found.probe
    process = h.call.schedule
    if isinstance(process, DDPM):
        process = replace(process, zero_terminal_snr=True)
    call = replace(h.call, schedule=process)
    end = torch.ones((), dtype=torch.float64)
    time = call.network_time(end)
    if float(process.alpha(end)) != 0 or not bool(time.isfinite()):
        return None
    p, q = h.target.rows(end, process)
    if float(p) == 0 or not bool((p + q).isfinite()):
        return None  # an answer that says nothing of x0
    x = float(process.sigma(end)) * probe.eps
    y = probe.asked(call.factor(end) * x, time if time.dtype == torch.int64 else time.to(x), call.time)
    if y is None:
        return None
    x0 = (h.sign * y.double() - float(q) * probe.eps.double()) / float(p)
    return float((x0 - probe.x0.double()).square().mean()) / probe.variance


def _contradictions(found: _Found, claimed: Conventions) -> list[str]:
    """Where the weights say other things of themselves than were found."""
    notes = []
    said = Hypothesis(*_without_sign(claimed.target), Call(claimed.schedule, claimed.time, claimed.input, None)).label
    if said not in found.labels and _family(said) != _family(found.labels[0]):
        notes.append(f"the weights say that they predict {said}; they behave as {found.labels[0]}.")
    ways = {
        "schedule": (_named(claimed.schedule), [_named(r.call.schedule) for r in found.readings]),
        "time": (claimed.time, [r.call.time for r in found.readings]),
        "input": (claimed.input, [r.call.input for r in found.readings]),
    }
    for name, (stated, seen) in ways.items():
        if stated not in seen and not (name == "input" and _same_input(found, claimed)):
            notes.append(f"the weights say {name} {stated}; they behave as {seen[0]}.")
    if {claimed.time, found.reading.call.time} == {"t", "1000t"} and claimed.time not in ways["time"][1]:
        notes.append("that is a time scaled wrongly by 1000.")
    return notes


def _same_input(found: _Found, claimed: Conventions) -> bool:
    """Whether the input is scaled by the same factors as stated."""
    stated = Call(claimed.schedule, claimed.time, claimed.input, claimed.target)
    seen = found.reading.call
    times = [found.probe.time_of(level, claimed.schedule) for level in LEVELS]
    return all(abs(stated.factor(t) / seen.factor(t) - 1) < 1e-6 for t in times)


def _other_units(found: _Found) -> list[str]:
    """The units in which the network does better on the same data: of those that do it alike, the plainest."""
    fitted = found.decided and found.fitted
    better = []
    for words, change in _units(found.probe.x0):
        other = found.probe.in_units(change)
        error, label = _at_best(found, other) if found.decided and not fitted else _at_best_of_all(found, other)
        if error * (TOLD if fitted else MARGIN) < found.least:
            better.append((error, words, label))
    if not better:
        return []
    most = TOLD * min(error for error, _, _ in better)
    error, words, label = next(row for row in better if row[0] <= most)
    return [
        f"the network does better on data {words} (an error of {error:.3g} of guessing, read as {label}): give the "
        "data in those units."
    ]


def _at_best(found: _Found, other: Probe) -> tuple[float, str]:
    """The least error on other data of the readings found, and its reading."""
    tried = [h for h in found.readings if other.reached_by(h.call.schedule)]
    error = other.errors(tried).mean(1).tolist() if tried else []
    return min(zip(error, (h.label for h in tried), strict=True), default=(math.inf, ""))


def _at_best_of_all(found: _Found, other: Probe) -> tuple[float, str]:
    """The least error on other data of all readings, and its reading, where there it would be decided."""
    reached = {h.call.schedule for h in found.everything if other.reached_by(h.call.schedule)}
    tried = [h for h in found.everything if h.call.schedule in reached]
    looked = first_look(other, tried)
    if min(looked, default=math.inf) > 1:
        return math.inf, ""
    again = _Found.of(other, tried, looked)
    known = again.least <= KNOWS and not again.fitted if found.decided else again.decided
    return (again.least, again.labels[0]) if known else (math.inf, "")


def _units(x: Tensor) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """Other units that data such as these are often in."""
    low, high, mean, std = (float(v) for v in (x.min(), x.max(), x.double().mean(), x.double().std()))
    found: list[tuple[str, Callable[[Tensor], Tensor]]] = []
    if low >= -1e-3 and high <= 1 + 1e-3:
        found.append(("in [-1, 1] instead of [0, 1]", lambda x: 2 * x - 1))
    if -1 - 1e-3 <= low < -0.1 and high <= 1 + 1e-3:
        found.append(("in [0, 1] instead of [-1, 1]", lambda x: (x + 1) / 2))
    if high > 2 and low >= 0 and high <= 255:
        found.append(("in [-1, 1] instead of 0 to 255", lambda x: x / 127.5 - 1))
    if 3 < std < 12:
        found.append(("times 0.18215, as latents often are", lambda x: 0.18215 * x))
    if std < 1.6:
        found.append(("divided by 0.18215, as latents are before they are scaled", lambda x: x / 0.18215))
    if not 0.8 < std < 1.25:
        found.append((f"standardised, (x - {mean:.3g})/{std:.3g}", lambda x: (x - mean) / std))
    return found


def _name_of_labels(net: nn.Module) -> str:
    from ..networks import DiffusersModel

    return "class_labels" if isinstance(net, DiffusersModel) else "y"


def _samples(data: Any, n: int | None, labels: bool) -> tuple[Tensor, Tensor | None]:
    """Real data in the units the network sees, float32; their labels, if asked for."""
    if data is None:
        raise DataError("identify holds a network against real data; give some (--data), best such as it never saw.")
    if isinstance(data, Tensor):
        if data.ndim < 2 or len(data) < 2 or not bool(data.isfinite().all()):
            raise DataError(f"data of shape {list(data.shape)}; expected finite samples [N, …], at least 2.")
        if labels:
            raise DataError("a tensor alone has no labels; give data that have, or cond={'y': labels}.")
        return data.detach().float()[: _count(data, n)], None
    if not isinstance(data, Data):
        from ..studies.recipe import data_named

        data = load_data(dict(data) if isinstance(data, Mapping) else data_named(str(data)))
    kept = data.heldout if len(data.heldout) >= 16 else data.train
    tags = data.heldout_labels if kept is data.heldout else data.labels
    if labels and tags is None:
        raise DataError(f"{data.name} has no labels.")
    count = _count(kept, n)
    return data.normalised(kept[:count]), tags[:count] if labels and tags is not None else None


def _count(samples: Tensor, n: int | None) -> int:
    most = max(32, min(512, 2**17 // max(1, samples[0].numel()))) if n is None else n
    if most < 2:
        raise DataError(f"n must be at least 2, found {n}.")
    return min(len(samples), most)


Opened = tuple[nn.Module, Conventions | None, Callable[[], Data] | None]


def opened(what: Any, network: Any = None) -> Opened:
    """The network, what it says of itself, and how to come by its data, where there is such."""
    if isinstance(what, Denoiser):
        return what.net, what.conventions, None
    if isinstance(what, nn.Module):
        return what, None, None
    if not isinstance(what, str | Path):
        return _of_diffusers(what)
    from ..networks import is_factory
    from ..networks import network as built

    path = Path(what).expanduser()
    if isinstance(what, str) and is_factory(what) and not path.exists():
        return built({"name": what}), None, None
    if path.is_dir() and not (path / "model.safetensors").is_file():
        return _of_diffusers(what)
    if path.is_dir() and not (path / "recipe.yaml").is_file() and (path / "model_index.json").is_file():
        return _of_diffusers(what)
    return _of_weights(path, network)


def _of_diffusers(what: Any) -> Opened:
    from ..interop import from_diffusers, raw_network

    net = raw_network(what)
    claimed = None
    with contextlib.suppress(ReparamError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of remarks on how to sample, and contradictions are what is looked into
        claimed = from_diffusers(what).conventions
    return net, claimed, None


def _of_weights(path: Path, network: Any) -> Opened:
    """The network of a run or a file, without trusting what else is written there."""
    from ..files import read_tensors
    from ..networks import network as built
    from ..networks import own_code
    from ..spec import KEY, read_spec, weights_file

    file = weights_file(path)
    tensors, metadata = read_tensors(file)
    config = network
    if config is None:
        try:
            config = json.loads(metadata.get(KEY, "{}")).get("network")
        except (json.JSONDecodeError, AttributeError):
            config = None
        if config is not None and own_code(config):
            raise SpecError(f"{file} names code to run ({', '.join(own_code(config))}); give the network as network=.")
    if config is None:
        raise NetworkError(f"{file} does not say what network its weights are of; give it (--network).")
    net = config if isinstance(config, nn.Module) else built({"name": config} if isinstance(config, str) else config)
    try:
        net.load_state_dict(tensors)
    except RuntimeError as e:
        raise NetworkError(f"the weights in {file} do not fit {type(net).__name__}: {e}") from e
    claimed = None
    with contextlib.suppress(ReparamError):
        claimed = read_spec(file).denoiser(net).conventions
    recipe = path / "recipe.yaml"
    return net, claimed, (lambda: _data_of_run(recipe)) if recipe.is_file() else None


def _data_of_run(recipe: Path) -> Data:
    from ..studies.recipe import from_dict, parse_yaml
    from ..studies.run import data_of

    return data_of(from_dict(parse_yaml(recipe.read_text(encoding="utf-8"), str(recipe))))
