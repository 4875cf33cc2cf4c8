"""The real data that samples are compared with, and what is computed of them once."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Data
from ..data.order import mix, permutation
from ..errors import DataError, SpecError
from ..files import write_text
from .extractors import Extractor, Pixels, extractor
from .sets import SampleSet
from .statistics import Statistics, processes, statistics_of

#: So many real features are kept, where a metric needs them themselves.
KEPT = 10_000
_FORMAT = 1


class WrongFile(DataError):
    """A file of a cache holds something else than its name says."""


class Reference:
    """Real data as samples are compared with them.

    Args:
        data: the data set. Samples are compared with its training part.
        features: the extractor for pictures; efficientnet_lite0 by default.
        count: at most so many real samples are compared with; None takes all.
        cache: a folder to keep statistics in, shared by processes.
        device: where features are computed.
        ask: told after each batch how many samples are done; it may raise to end the work.
        given: statistics computed before, by ``features``, to be used instead of data.
    """

    def __init__(
        self,
        data: Data,
        features: str | dict[str, Any] | None = None,
        count: int | None = 10_000,
        cache: Path | None = None,
        device: torch.device | str = "cpu",
        ask: Callable[[int], None] = lambda done: None,
        given: Statistics | None = None,
    ) -> None:
        self.data, self.cache, self.device, self.ask = data, cache, device, ask
        most = len(data.train) if count is not None else data.count
        self.count = given.moments.count if given else min(count or most, most)
        self.given = given
        self._features = features or "efficientnet_lite0"
        self._statistics: dict[tuple[str, bool], Statistics] = {}

    @functools.cached_property
    def extractor(self) -> Extractor:
        """The extractor, made when it is first needed; of vectors, their numbers."""
        if not self.data.pictures:
            return Numbers()
        found = extractor(self._features).to(self.device)
        found.shown(self.data.shape)
        return found

    @functools.cached_property
    def pixels(self) -> Extractor:
        """The extractor of pixels."""
        return Pixels()

    @functools.cached_property
    def digest(self) -> str:
        """Of the real data that are compared with: of which, and how many."""
        return hashlib.sha256(f"{self.data.digest} {self.count}".encode()).hexdigest()[:16]

    def samples(self) -> SampleSet:
        """The real data that are compared with, as they are stored."""
        return SampleSet.training(self.data, self.count)

    def statistics(self, by: Extractor, keep: bool = False) -> Statistics:
        """Of the real data's features; with some features themselves if they are to be kept."""
        for key in ((by.name, keep), (by.name, True)):
            if key in self._statistics:
                return self._statistics[key]
        found = self._statistics[by.name, keep] = self._found(by, KEPT if keep else 0)
        return found

    def _found(self, by: Extractor, keep: int) -> Statistics:
        if self.given is not None:
            return self.given
        if self.cache is None:
            return self._computed(by, keep)
        made_of = self.made_of(by, keep)
        path = self._path(made_of, ".safetensors")
        with _locked(path.with_suffix(".lock")):
            if _there(path):
                with contextlib.suppress(SpecError, KeyError):
                    found, told = Statistics.load(path)
                    _refuse_another(path, told, made_of)
                    return found
            found = self._computed(by, keep)
            if processes()[0] == 0:
                found.save(path, made_of)
            return found

    def made_of(self, by: Extractor, keep: int) -> str:
        """What decides the statistics, as text: data, how many, extractor with its preprocessing, weights."""
        return json.dumps(
            {
                "format": _FORMAT,
                "data": self.data.digest,
                "name": self.data.name,
                "shape": list(self.data.shape),
                "count": self.count,
                "extractor": by.name,
                "weights": by.digest,
                "keep": keep,
            }
        )

    def _path(self, key: str, suffix: str) -> Path:
        assert self.cache is not None
        self.cache.mkdir(parents=True, exist_ok=True)
        return self.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}{suffix}"

    def kept(self, key: str, compute: Callable[[], dict[str, float | None]]) -> dict[str, float | None]:
        """What was computed before under this key, else what is computed now."""
        if self.cache is None:
            return compute()
        path = self._path(key, ".json")
        with _locked(path.with_suffix(".lock")):
            if _there(path):
                told, known = None, None
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    stored = json.loads(path.read_text(encoding="utf-8"))
                    told, known = str(stored["made_of"]), dict(stored["values"])
                if told is not None and known is not None:
                    _refuse_another(path, told, key)
                    return known
            found = compute()
            if processes()[0] == 0:
                write_text(path, json.dumps({"made_of": key, "values": found}))
            return found

    def _computed(self, by: Extractor, keep: int) -> Statistics:
        return statistics_of(self.samples(), by, classes=len(self.data.classes), keep=keep, ask=self.ask)

    def key(self, extractors: Sequence[Extractor]) -> list[Any]:
        """What of this decides the values of metrics that use these extractors, as plain data."""
        return [self.digest, sorted({by.name: by.digest for by in extractors}.items())]

    def fresh(self, n: int) -> tuple[SampleSet, Reference] | None:
        """As many real data to be scored like samples, and what they are compared with; None if there are none.

        They are held out of training, or else of the reference itself: at most half of it, and then the rest is
        what they are compared with.
        """
        data = self.data
        if data.endless:
            return SampleSet.held(data.fresh(n), name=data.name), self
        if len(data.heldout) >= 2:
            labels = None if data.heldout_labels is None else data.heldout_labels[:n]
            return SampleSet.held(data.heldout[:n], labels, data.name), self
        if self.given is not None or data.stream is not None or self.count < 4:
            return None
        order = permutation(self.count, mix(0, 0xF10))
        part = order[: min(n, self.count // 2)].sort().values
        return self.samples().only(part), _Rest(self, part)

    def fresh_counts(self, n: int) -> dict[str, int] | None:
        """Of how many fresh real data a floor for ``n`` samples is, and against how many; None where there is none."""
        if self.data.endless:
            return {"n": n, "reference": n}
        if len(self.data.heldout) >= 2:
            return {"n": min(n, len(self.data.heldout)), "reference": self.count}
        if self.given is not None or self.data.stream is not None or self.count < 4:
            return None
        part = min(n, self.count // 2)
        return {"n": part, "reference": self.count - part}


class _Rest(Reference):
    """A reference without a part of it, which is compared with it."""

    def __init__(self, whole: Reference, part: Tensor) -> None:
        left = torch.ones(whole.count, dtype=torch.bool)
        left[part] = False
        data = whole.data
        labels = None if data.labels is None else data.labels[: whole.count][left]
        rest = replace(data, train=data.train[: whole.count][left], labels=labels)
        super().__init__(rest, whole._features, None, None, whole.device, whole.ask)
        self._whole, self._part = whole, part
        self._parts: dict[str, Statistics] = {}
        self.extractor = whole.extractor

    def _found(self, by: Extractor, keep: int) -> Statistics:
        classes = len(self.data.classes)
        if by.name not in self._parts:
            samples = self._whole.samples().only(self._part)
            self._parts[by.name] = statistics_of(samples, by, classes=classes, ask=self.ask)
        return self._whole.statistics(by, keep > 0).without(self._parts[by.name], self._part)


class Numbers(Extractor):
    """The numbers of vectors themselves."""

    name = "the numbers themselves"

    def __call__(self, pictures: Tensor) -> Tensor:
        return pictures.flatten(1).float()

    def record(self) -> dict[str, Any]:
        return {"name": self.name}


def _there(path: Path) -> bool:
    """Whether there is such a file: for all processes what the first finds."""
    found = torch.tensor(path.exists())
    if processes()[1] > 1:
        torch.distributed.broadcast(found, 0)
    return bool(found)


def _refuse_another(path: Path, told: str, made_of: str) -> None:
    """A file of the cache that is not what its name says is neither used nor overwritten."""
    if told != made_of:
        raise WrongFile(
            f"{path} holds statistics of something else than its name says: {told}, expected {made_of}. It was copied "
            "or changed by hand; remove it, and they are computed anew."
        )


def given_reference(path: Path, features: str | dict[str, Any] | None, device: torch.device | str) -> Reference:
    """A reference from statistics that ``save_reference`` wrote.

    Raises:
        SpecError: if the file cannot be read.
        DataError: if they were computed by another extractor, other weights or other preprocessing.
    """
    try:
        found, told = Statistics.load(path)
        record = json.loads(told)
        shape = [int(n) for n in record["shape"]]
    except (KeyError, ValueError) as e:
        raise SpecError(f"{path} holds no statistics of a reference ({e}); write them with --keep-reference.") from e
    empty = torch.zeros((0, *shape), dtype=torch.uint8)
    data = Data(name=str(record["name"]), train=empty, heldout=empty)
    data.__dict__["digest"] = str(record["data"])
    reference = Reference(data, features, None, None, device, given=found)
    by = reference.extractor
    for what, ours, theirs in (("extractor", by.name, record["extractor"]), ("weights", by.digest, record["weights"])):
        if ours != theirs:
            raise DataError(
                f"{path}: its {what} was {theirs!r}, and samples would go through {ours!r}. Such distances mean "
                "nothing; choose the same extractor (--extractor), or compute the reference anew."
            )
    return reference


def save_reference(reference: Reference, path: Path) -> None:
    """Write the statistics of a reference of pictures to a file, to be used as one.

    Raises:
        OutputError: if it cannot be written.
    """
    by = reference.extractor
    found = reference.statistics(by, keep=True)
    if processes()[0] == 0:
        found.save(path, reference.made_of(by, KEPT))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process computes, the others wait for it; processes that share the work do it together."""
    if processes()[1] > 1:
        yield
        return
    with path.open("a") as file:
        try:
            import fcntl
        except ImportError:  # no advisory locks on this system: the work may be done twice
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
