"""The real data that samples are compared with, and what is computed of them once."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Data
from ..errors import ReparamError
from ..files import read_tensors, write_tensors, write_text
from .features import Extractor, Pixels, extractor
from .frechet import Moments

_BATCH = 256


@dataclass(frozen=True)
class Statistics:
    """Of features of real data: their moments, and their mean and number in each class."""

    moments: Moments
    class_means: Tensor
    class_counts: Tensor

    @classmethod
    def of(cls, features: Iterator[tuple[Tensor, Tensor | None]], classes: int) -> Statistics:
        """From parts: features [n, dim] and their labels [n], or None."""
        moments: Moments | None = None
        sums, counts = torch.zeros(classes, 0), torch.zeros(classes, dtype=torch.int64)
        for part, y in features:
            if moments is None:
                moments = Moments(part.shape[1])
                sums = torch.zeros(classes, part.shape[1], dtype=torch.float64)
            moments.update(part)
            if y is not None:
                sums.index_add_(0, y, part.double())
                counts += torch.bincount(y, minlength=classes)
        assert moments is not None
        return cls(moments, sums / counts.clamp(min=1)[:, None], counts)

    def save(self, path: Path) -> None:
        """Write them to a file."""
        m = self.moments
        tensors = {"mean": m.mean, "scatter": m.scatter, "class_means": self.class_means, "counts": self.class_counts}
        write_tensors(path, tensors, {"count": str(m.count)})

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Those in a file."""
        tensors, metadata = read_tensors(path)
        moments = Moments.of(int(metadata["count"]), tensors["mean"], tensors["scatter"])
        return cls(moments, tensors["class_means"], tensors["counts"])


class Reference:
    """Real data as samples are compared with them.

    Args:
        data: the data set. Samples are compared with its training part.
        features: the extractor for pictures; efficientnet_lite0 by default.
        count: at most so many real pictures are compared with.
        cache: a folder to keep statistics in, shared by processes.
        device: where features are computed.
        ask: called between batches; it may raise to end the work.
    """

    def __init__(
        self,
        data: Data,
        features: str | dict[str, Any] | None = None,
        count: int = 10_000,
        cache: Path | None = None,
        device: torch.device | str = "cpu",
        ask: Callable[[], None] = lambda: None,
    ) -> None:
        self.data, self.cache, self.device, self._ask = data, cache, device, ask
        self.count = min(count, len(data.train))
        self._features = features or "efficientnet_lite0"

    @functools.cached_property
    def extractor(self) -> Extractor:
        """The extractor, made when it is first needed."""
        found = extractor(self._features).to(self.device)
        found.shown(self.data.shape)
        return found

    @functools.cached_property
    def pixels(self) -> Extractor:
        """The extractor of pixels."""
        return Pixels()

    def features(self, x: Tensor, by: Extractor) -> Tensor:
        """Features of samples as they are stored, shape [n, dim]."""
        return torch.cat([self._by(by, part) for part in x.split(_BATCH)])

    def _by(self, by: Extractor, part: Tensor) -> Tensor:
        self._ask()
        return by(part)

    def key(self, metrics: Sequence[str]) -> list[Any]:
        """What of this decides the values of these metrics, as plain data."""
        used = {by.name: by.digest for name in metrics if (by := self._extractor_of(name)) is not None}
        return [self.count, sorted(used.items())]

    def _extractor_of(self, metric: str) -> Extractor | None:
        if not self.data.pictures:
            return None
        if metric == "pixel_frechet_distance":
            return self.pixels
        return self.extractor if metric in ("frechet_distance", "class_error") else None

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Of the real pictures' features."""
        return self._statistics(self.extractor)

    @functools.cached_property
    def pixel_statistics(self) -> Statistics:
        """Of the real pictures' pixels."""
        return self._statistics(self.pixels)

    def _statistics(self, by: Extractor) -> Statistics:
        if self.cache is None:
            return self._computed(by)
        key = json.dumps([self.data.digest, self.count, by.name, by.digest])
        path = self.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        self.cache.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            with contextlib.suppress(ReparamError, KeyError, ValueError):
                return Statistics.load(path)
            found = self._computed(by)
            found.save(path)
            return found

    def kept(self, key: str, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What was computed before under this key, else what is computed now."""
        if self.cache is None:
            return compute()
        path = self.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        self.cache.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            with contextlib.suppress(OSError, ValueError):
                return dict(json.loads(path.read_text(encoding="utf-8")))
            found = compute()
            write_text(path, json.dumps(found))
            return found

    def _computed(self, by: Extractor) -> Statistics:
        data = self.data
        labels = None if data.labels is None else data.labels[: self.count].split(_BATCH)

        def parts() -> Iterator[tuple[Tensor, Tensor | None]]:
            for i, part in enumerate(data.train[: self.count].split(_BATCH)):
                yield self._by(by, part), None if labels is None else labels[i]

        return Statistics.of(parts(), len(data.classes))

    def about(self, metric: str, n: int) -> dict[str, Any]:
        """What a score was measured on and with; plain data."""
        if not self.data.pictures:
            return {"n": n}
        by = self._extractor_of(metric)
        if by is None:
            return {"n": n, "reference": len(self.data.train)}
        found = {"n": n, "reference": self.count, "extractor": by.name}
        return {**found, "weights": by.digest} if by.digest else found


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process computes, the others wait for it."""
    with path.open("a") as file:
        try:
            import fcntl
        except ImportError:  # no advisory locks on this system: the work may be done twice
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
