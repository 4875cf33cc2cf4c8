r"""A target that differs by direction: one inside the span of a basis, another outside.

With orthonormal columns :math:`B` and the projection :math:`\Pi = B B^\top`, the network is asked for

.. math:: y = \Pi\,(p_i x_0 + q_i \varepsilon) + (1 - \Pi)\,(p_o x_0 + q_o \varepsilon) .

White noise has no preferred directions, so the two parts are two independent 2×2 systems, and every
conversion is the usual one with a coefficient for each part. AsymFlow (arXiv 2605.12964) predicts the
velocity in the top principal directions of each patch and x0 in the rest.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, Unsupported
from ..files import read_tensors, write_tensors
from ..schedules import Schedule, like
from .core import Target, target


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal directions, of whole samples or of each patch of a picture.

    Args:
        columns: shape [D, r], float32, orthonormal; D numbers a sample, or channels·patch² a patch
            (channel first, row by row).
        patch: side of the patches, or None for whole samples.

    Raises:
        Unsupported: if the columns are not orthonormal.
    """

    columns: Tensor
    patch: int | None = None

    def __post_init__(self) -> None:
        columns = self.columns.detach().to("cpu", torch.float32)
        if columns.ndim != 2 or not 1 <= columns.shape[1] <= columns.shape[0]:
            raise Unsupported(f"a basis has shape [D, r] with 1 <= r <= D, found {list(columns.shape)}.")
        off = (columns.double().T @ columns.double() - torch.eye(columns.shape[1], dtype=torch.float64)).abs().max()
        if not off < 1e-4:
            raise Unsupported(f"the columns of a basis are orthonormal; found products off by {off:.2g}.")
        object.__setattr__(self, "columns", columns)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the directions."""
        found = hashlib.sha256(repr((self.columns.shape, self.patch)).encode())
        found.update(self.columns.contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Basis) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        d, r = self.columns.shape
        return f"Basis({r} of {d} directions{f' of patches of {self.patch}' if self.patch else ''})"

    def project(self, x: Tensor) -> Tensor:
        """The part of ``x`` [B, …] inside the span.

        Raises:
            Unsupported: if the samples are not of this basis' size.
        """
        columns = self.columns.to(device=x.device, dtype=x.dtype)
        vectors = self.vectors(x)
        if vectors.shape[-1] != len(columns):
            raise Unsupported(
                f"{self} is of vectors of {len(columns)} numbers; samples of shape {list(x.shape[1:])} give "
                f"{vectors.shape[-1]}."
            )
        return self._back((vectors @ columns) @ columns.T, x)

    def vectors(self, x: Tensor) -> Tensor:
        """What the directions are directions of: [B, D] whole samples, or [B, N, D] patches, row by row.

        Raises:
            Unsupported: if pictures cannot be cut into these patches.
        """
        if self.patch is None:
            return x.flatten(1)
        p = self.patch
        if x.ndim != 4 or x.shape[2] % p or x.shape[3] % p:
            raise Unsupported(f"{self}: samples of shape {list(x.shape[1:])} cannot be cut into patches of {p}.")
        high, wide = x.shape[2] // p, x.shape[3] // p
        cut = x.reshape(len(x), -1, high, p, wide, p).permute(0, 2, 4, 1, 3, 5)
        return cut.reshape(len(x), high * wide, -1)

    def _back(self, vectors: Tensor, like_x: Tensor) -> Tensor:
        if self.patch is None:
            return vectors.reshape(like_x.shape)
        b, c, height, width = like_x.shape
        p = self.patch
        cut = vectors.reshape(b, height // p, width // p, c, p, p).permute(0, 3, 1, 4, 2, 5)
        return cut.reshape(like_x.shape)

    def config(self) -> dict[str, Any]:
        """The basis as plain data; the directions as base64 of little-endian float32."""
        raw = self.columns.contiguous().numpy().astype("<f4").tobytes()
        return {"patch": self.patch, "shape": list(self.columns.shape), "float32": base64.b64encode(raw).decode()}

    def save(self, path: str | Path) -> None:
        """Write it to a .safetensors file."""
        write_tensors(path, {"columns": self.columns}, {"patch": str(self.patch or "")})

    @classmethod
    def load(cls, path: str | Path) -> Basis:
        """The basis in a .safetensors file.

        Raises:
            SpecError: if the file cannot be read.
            DataError: if it holds no basis.
        """
        tensors, metadata = read_tensors(path)
        if "columns" not in tensors:
            raise DataError(f"{path} holds no basis (a tensor 'columns'); make one with reparam basis.")
        return cls(tensors["columns"], int(metadata["patch"]) if metadata.get("patch") else None)


def basis(which: str | Path | dict[str, Any] | Basis | Tensor) -> Basis:
    """A basis from a file, from plain data, from a matrix of columns, or itself."""
    if isinstance(which, Basis):
        return which
    if isinstance(which, Tensor):
        return Basis(which)
    if isinstance(which, str | Path):
        return Basis.load(which)
    raw = np.frombuffer(base64.b64decode(which["float32"]), "<f4").reshape(which["shape"])
    return Basis(torch.from_numpy(raw.copy()), which["patch"])


def principal(samples: Tensor | Iterable[Tensor], rank: int, patch: int | None = None) -> Basis:
    """The top principal directions of samples [N, …], or of their patches, about their mean.

    Args:
        samples: all at once, or in parts.

    Raises:
        Unsupported: if there are fewer directions than asked for.
    """
    found = Basis(torch.eye(1), patch)  # only its way of cutting is used
    total: Tensor | None = None
    mean = None
    count = 0
    for part in samples.split(1024) if isinstance(samples, Tensor) else samples:
        v = found.vectors(part).double()
        v = v.reshape(-1, v.shape[-1])
        total = v.T @ v if total is None else total + v.T @ v
        mean = v.sum(0) if mean is None else mean + v.sum(0)
        count += len(v)
    assert total is not None
    assert mean is not None
    if not 1 <= rank <= len(mean):
        raise Unsupported(f"rank must lie in 1 … {len(mean)}, the numbers of a vector, found {rank}.")
    mean = mean / count
    _, vectors = torch.linalg.eigh(total / count - torch.outer(mean, mean))
    top = vectors.flip(1)[:, :rank]
    signs = torch.sign(top.gather(0, top.abs().argmax(0, keepdim=True)))  # the same directions every time
    return Basis((top * signs).float(), patch)


@dataclass(frozen=True)
class InBasis(Target):
    """One target inside the span of a basis, another outside.

    Args:
        basis: a :class:`Basis`, its file, or a matrix of orthonormal columns.
        inside, outside: targets, or their names. Both must be plain (no basis of their own).
    """

    name: ClassVar[str] = "in_basis"
    basis: Any
    inside: Any = "velocity"
    outside: Any = "x0"

    def __post_init__(self) -> None:
        object.__setattr__(self, "basis", basis(self.basis))
        for part in ("inside", "outside"):
            chosen = target(getattr(self, part))
            if isinstance(chosen, InBasis):
                raise Unsupported("in_basis: the targets inside and outside have no basis of their own.")
            object.__setattr__(self, part, chosen)

    @property
    def words(self) -> str:  # type: ignore[override]
        """What it is, for a reader."""
        return f"{self.inside.name} inside the span of {self.basis!r}, {self.outside.name} outside"

    def rows(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """(p, q) of shape [B or 1, 2]: inside, outside.

        Raises:
            Unsupported: if the noise differs by element, which a basis would mix.
        """
        if schedule.sigma(t).ndim > t.ndim:
            raise Unsupported(f"{self.name} needs the same noise in all elements; {schedule.name} has not.")
        pairs = zip(self.inside.rows(t, schedule), self.outside.rows(t, schedule), strict=True)
        p, q = (torch.stack([i.reshape(-1), o.reshape(-1)], dim=1) for i, o in pairs)
        return p, q

    def apply(self, c: Tensor, y: Tensor) -> Tensor:
        """c_out·y + (c_in − c_out)·Π y for coefficients [B or 1, 2]."""
        inside, outside = c[:, 0], c[:, 1]
        return like(outside, y) * y + like(inside - outside, y) * self.basis.project(y)

    def config(self) -> dict[str, Any]:
        parts = {"inside": self.inside.config(), "outside": self.outside.config()}
        return {"name": self.name, "basis": self.basis.config(), **parts}
