"""What a data set is: samples in memory and what is known of them."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .manifolds import Curve
from .mixtures import Mixture

if TYPE_CHECKING:
    from .streams import Stream

#: Pictures are bytes; the network sees (byte − 127.5)/127.5, in [−1, 1].
PICTURE_MEAN = PICTURE_STD = 127.5


@dataclass(frozen=True)
class Data:
    """A data set in memory, or one that is streamed from disk, with a part of it in memory.

    Of streamed data, ``train`` (with ``labels``) is a part of what training draws from, for statistics, as
    the reference and for nearest neighbours; training itself reads :meth:`batch`. No more than
    10,000 pictures and 512 MiB are held out. Up to that, a streamed data set that can be permuted as a
    whole (:class:`reparam.data.order.Order`) trains on the same batches as the same one in memory, to the
    bit; beyond, it trains on more pictures, or in another order.

    Attributes:
        name: what it is called in tables.
        train: what training draws from, shape [N, …]: float32, normalised; or uint8 pictures
            [N, C, H, W], normalised where they are used (:meth:`normalised`).
        heldout: real data that training never sees, shape [M, …]. Of endless data that is a
            fresh draw, and more can be drawn.
        mean, std: the network sees (original − mean)/std.
        curve: the plane and the curve that they lie on, where there is one.
        mixture: the Gaussians that they are drawn from, in the units the network sees, where these are known.
        image: [height, width] where a vector is really a picture, to draw it as one.
        labels, heldout_labels: class numbers, int64, shapes [N] and [M], where there are classes.
        classes: their names.
        flip: whether training sees each picture mirrored half of the time.
        remarks: what a reader must know of how they were read.
        stream: what training draws from, where that is not in memory.
        spread: where each sample is the mean of a Gaussian (a latent), its standard deviation, of train's shape.
        origin: what else travels with the weights of where the data come from; plain data.
    """

    name: str
    train: Tensor
    heldout: Tensor
    mean: float = 0.0
    std: float = 1.0
    curve: Curve | None = None
    mixture: Mixture | None = None
    image: tuple[int, int] | None = None
    seed: int = 0
    labels: Tensor | None = None
    heldout_labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    flip: bool = False
    remarks: tuple[str, ...] = ()
    stream: Stream | None = None
    spread: Tensor | None = None
    origin: dict[str, Any] | None = None

    @property
    def count(self) -> int:
        """How many samples training draws from."""
        return len(self.train) if self.stream is None else self.stream.count

    @property
    def endless(self) -> bool:
        """Whether more can be drawn of what they are samples of."""
        return self._source is not None

    @property
    def _source(self) -> Curve | Mixture | None:
        """What draws more of them."""
        return self.mixture if self.curve is None else self.curve

    @property
    def blocks(self) -> tuple[int, ...] | None:
        """How many of them lie in each block that is read together, in order; None where any can be read alone."""
        return None if self.stream is None else self.stream.blocks

    @property
    def window(self) -> int:
        """How many of them an order may permute at once; all of them, unless they are read in blocks."""
        return self.count if self.stream is None or self.stream.blocks is None else self.stream.window

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The training samples of these indices (0 … count − 1) as they are stored, and their labels, if any.

        Raises:
            DataError: if a streamed picture cannot be used.
        """
        if self.stream is not None:
            return self.stream.batch(index)
        return self.train[index], None if self.labels is None else self.labels[index]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.train.shape[1:])

    @property
    def pictures(self) -> bool:
        """Whether the samples are pictures of bytes, [C, H, W]."""
        return self.train.dtype == torch.uint8

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the samples: the same exactly where the data are the same.

        Of streamed data, of the listing of files (names, sizes where an archive or a shard tells them, counts,
        labels, options, split) and of the samples in memory.
        """
        found = hashlib.sha256(repr((self.shape, self.mean, self.std, self.flip, self.classes)).encode())
        if self.stream is not None:
            found.update(self.stream.digest.encode())
        for part in (self.train, self.heldout, self.labels, self.heldout_labels, self.spread):
            if part is not None:
                found.update(part.contiguous().numpy().data)
        return found.hexdigest()[:16]

    @functools.cached_property
    def _moments(self) -> tuple[float, float, float, float]:
        """Least, greatest, mean and standard deviation over all elements, after normalisation."""
        if not self.pictures:
            x, parts = self.train, self.train.split(4096)  # a part at a time: in float64 all of it may be too much
            mean = sum(float(part.double().sum()) for part in parts) / x.numel()
            var = sum(float((part.double() - mean).square().sum()) for part in parts) / x.numel()
            return float(x.min()), float(x.max()), mean, math.sqrt(var)
        count = sum(torch.bincount(part.flatten(), minlength=256) for part in self.train.split(4096))
        level = (torch.arange(256, dtype=torch.float64) - self.mean) / self.std
        share = torch.as_tensor(count).double() / self.train.numel()
        present = level[share > 0]
        centre = (share * level).sum()
        spread = (share * (level - centre) ** 2).sum().sqrt()
        return float(present[0]), float(present[-1]), float(centre), float(spread)

    @property
    def sigma_data(self) -> float:
        """The standard deviation over all elements after normalisation: EDM's σ_data."""
        return self._moments[3]

    def normalised(self, stored: Tensor) -> Tensor:
        """Samples, as they are stored, in the units the network sees: float32."""
        return stored if stored.is_floating_point() else (stored.float() - self.mean) / self.std

    def original(self, x: Tensor) -> Tensor:
        """Samples in the units of the user's data."""
        return x * self.std + self.mean

    def stored(self, x: Tensor) -> Tensor:
        """Samples as they would be stored: of pictures, the nearest bytes; what is not finite is grey."""
        if not self.pictures:
            return x
        return as_bytes(self.original(x))

    def flat(self, x: Tensor) -> Tensor:
        """Vectors to compare distributions in: of the plane, where there is one; shape [n, d]."""
        return self.curve.plane(x) if self.curve is not None else x.flatten(1)

    def reference(self, n: int) -> Tensor:
        """The real data that vectors are compared with: n fresh ones, or the training set."""
        return self.train if self._source is None else self._source.draw(n, [self.seed, 2])

    def fresh(self, n: int) -> Tensor:
        """Up to ``n`` real data outside the training set and the reference: what floors are made of."""
        if self._source is not None:
            return self._source.draw(n, [self.seed, 3])
        return self.normalised(self.heldout[:n])

    def chunks(self, size: int = 4096) -> Iterator[Tensor]:
        """The training set in the units the network sees, a part at a time."""
        for part in self.train.split(size):
            yield self.normalised(part)

    def record(self) -> dict[str, Any]:
        """What travels with the weights: shape, normalisation and statistics; plain data."""
        low, high, mean, std = self._moments
        return {
            "name": self.name,
            "count": self.count,
            "shape": list(self.shape),
            "digest": self.digest,
            "normalised_by": {"mean": self.mean, "std": self.std},
            "min": low,
            "max": high,
            "mean": mean,
            "sigma_data": std,
            "pictures": self.pictures,
            **(self.origin or {}),
        }

    def preflight(self) -> str:
        """What the data are, in a line; and a line for each remark."""
        low, high, mean, std = self._moments
        scaled = "" if (self.mean, self.std) == (0.0, 1.0) else f", from (x - {self.mean:.4g})/{self.std:.4g}"
        classes = f", {len(self.classes)} classes" if self.classes else ""
        line = (
            f"{self.name}: {self.count} training + {len(self.heldout)} held-out samples of shape "
            f"{list(self.shape)}{classes}, range [{low:.3g}, {high:.3g}], mean {mean:.3g}, sigma_data {std:.3g}{scaled}"
        )
        return "\n".join([line, *(f"    {remark}" for remark in self.remarks)])


def as_bytes(x: Tensor) -> Tensor:
    """Values in 0 … 255 as the nearest bytes; what lies outside is cut off, what is no number is grey."""
    return x.nan_to_num(127.5, 255.0, 0.0).round().clamp(0, 255).to(torch.uint8)
