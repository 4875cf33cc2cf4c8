"""What an extractor is, and what those with a trained network share."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import DataError, unknown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Extractor(ABC):
    """Pictures to features.

    Attributes:
        name: what it is, with whatever changes its features.
        digest: a hash of its weights, "" where it has none.
        weights: the same hash in full, where there is more of it.
        resize: what happens to the size of pictures, in words.
        scaling: what happens to their values, in words.
        dtype: what the features are computed in.
        source: where the weights come from, "" where there are none.
    """

    name: str
    digest: str = ""
    weights: str = ""
    resize: str = "not told"
    scaling: str = "not told"
    dtype: str = "float32"
    source: str = ""

    @abstractmethod
    def __call__(self, pictures: Tensor) -> Tensor:
        """Features, float32 [n, dim] on the CPU, of pictures, uint8 [n, C, H, W]."""

    def to(self, device: torch.device | str) -> Extractor:
        """Itself, at work on another device."""
        return self

    def shown(self, shape: tuple[int, ...]) -> None:  # noqa: B027 (most know their digest already)
        """Told the shape [C, H, W] of the pictures, before anything else."""

    def record(self) -> dict[str, Any]:
        """All that another needs to compute the same features; plain data."""
        return {
            "name": self.name,
            "weights": self.weights or self.digest,
            "resize": self.resize,
            "scaling": self.scaling,
            "dtype": self.dtype,
            "source": self.source,
        }


class Trained(Extractor):
    """An extractor with a trained network; how it prepares pictures and what it takes is a subclass's to say.

    Args:
        net: the network.
        name: its name, without the dtype.
        sha256: of the file of its weights.
        dtype: of weights and activations, "float32" or "bfloat16"; the name tells any but float32.
        batch: at most so many pictures at a time; None for all at once. Changes features by rounding at most.
    """

    def __init__(self, net: nn.Module, name: str, sha256: str, dtype: str, batch: int | None) -> None:
        self._dtype = _dtype_named(name, dtype)
        self._net: Any = net.eval().to(self._dtype)
        self._device = torch.device("cpu")
        self._batch = batch
        self.name = name if dtype == "float32" else f"{name}, {dtype}"
        self.dtype = dtype
        self.weights = f"sha256:{sha256}"
        self.digest = f"sha256:{sha256[:16]}"

    def to(self, device: torch.device | str) -> Extractor:
        self._device = torch.device(device)
        self._net.to(self._device)
        return self

    @abstractmethod
    def prepared(self, pictures: Tensor) -> Tensor:
        """What the network takes, float32 [n, 3, side, side] on its device, of pictures, uint8 [n, 1 or 3, H, W]."""

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Features [n, dim] of what was prepared."""

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Features, float32 [n, dim] on the CPU, of pictures, uint8 [n, 1 or 3, H, W].

        Raises:
            DataError: if these are not such pictures.
        """
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
            raise DataError(
                f"extractor {self.name} takes pictures, uint8 [n, 1 or 3, H, W]; found {pictures.dtype} "
                f"{list(pictures.shape)}. Convert them, or give an extractor of your own: extractor: pkg.mod:make."
            )
        with _plain_float32():
            parts = pictures.split(self._batch or len(pictures))
            return torch.cat([self.features(self.prepared(x).to(self._dtype)).float().cpu() for x in parts])


def _dtype_named(name: str, dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise unknown(f"dtype of extractor {name}", dtype, DTYPES)
    return DTYPES[dtype]


@contextlib.contextmanager
def _plain_float32() -> Iterator[None]:
    """Float32 without the shortcuts (TF32, bfloat16) that training may have allowed."""
    enabled = torch.backends.cudnn.enabled
    with (
        _plain_matmul(),
        torch.backends.cudnn.flags(enabled=enabled, deterministic=True, allow_tf32=False),
    ):
        yield


@contextlib.contextmanager
def _plain_matmul() -> Iterator[None]:
    backends: Any = torch.backends
    parts = (backends.cuda.matmul, backends.mkldnn.matmul)
    kept = [part.fp32_precision for part in parts]
    before = _matmul_precision()
    try:
        if before is not None:
            torch.set_float32_matmul_precision("highest")
        for part in parts:
            part.fp32_precision = "ieee"
        yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)
        for part, precision in zip(parts, kept, strict=True):
            part.fp32_precision = precision


def _matmul_precision() -> str | None:
    """PyTorch's older setting; None where the newer one, fp32_precision, was used, which it keeps apart."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
