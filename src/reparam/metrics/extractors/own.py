"""A user's own extractor."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import DataError, ReparamError
from ...networks import import_factory
from .base import Extractor


def own(path: str, arguments: dict[str, Any]) -> Extractor:
    """What ``pkg.mod:make`` returns, as an extractor.

    Raises:
        DataError: if it fails, or returns nothing that can be called.
        NetworkError: if it cannot be imported.
    """
    told = ", ".join(f"{k}={v}" for k, v in sorted(arguments.items()))
    name = f"{path}({told})" if told else path
    make = import_factory(path, "extractor")
    try:
        call = make(**arguments)
    except ReparamError:
        raise
    except Exception as e:
        raise DataError(f"extractor {name} could not be made: {e!r}.") from e
    return Own(call, name)


class Own(Extractor):
    """A user's: whatever its factory returns, called with pictures in batches.

    Its digest is of the features of a fixed picture of the shape that it is first shown, rounded to three
    digits: other code or other weights are another extractor.
    """

    resize = scaling = dtype = source = "the factory's own"

    def __init__(self, call: Any, name: str) -> None:
        if not callable(call):
            raise DataError(f"extractor {name} returned {type(call).__name__}, expected a function of pictures.")
        self.name, self._call, self._device = name, call, torch.device("cpu")
        if isinstance(call, nn.Module):
            call.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> Extractor:
        if isinstance(self._call, nn.Module):
            self._device = torch.device(device)
            self._call.to(self._device)
        return self

    def shown(self, shape: tuple[int, ...]) -> None:
        """Take the digest, for pictures of a shape [C, H, W]."""
        generator = torch.Generator().manual_seed(0)
        picture = torch.randint(0, 256, (1, *shape), dtype=torch.uint8, generator=generator)
        told = [f"{v:.3g}" for v in self(picture)[0].tolist()]
        self.digest = f"features:{hashlib.sha256(' '.join(told).encode()).hexdigest()[:16]}"

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        try:
            features = self._call(pictures.to(self._device))
        except Exception as e:
            shape = list(pictures.shape)
            raise DataError(f"extractor {self.name} failed on pictures of shape {shape}, uint8: {e!r}.") from e
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(pictures):
            found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise DataError(
                f"extractor {self.name} returned {found} for {len(pictures)} pictures; expected features of shape "
                f"[{len(pictures)}, dim]."
            )
        return features.float().cpu()
