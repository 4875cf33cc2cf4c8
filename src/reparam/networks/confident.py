"""A network that is finished, and one beside it that learns how far to trust it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NetworkError
from ..files import read_tensors


class Confident(nn.Module):
    r"""Two networks side by side: a frozen base for the mean, and a head for how sure it is.

    .. math:: net(x, time, cond) = [base(x, time, cond),\; head(x, time, cond)]

    along the first axis of the data. The base is never trained, and always in evaluation mode: what it predicts stays
    the same to the bit. The head is a network in its own right, which sees x_t itself (no features of the base) and
    gives the rest of the outputs; it may be smaller. Weights stand under ``base.`` and ``head.``.

    Args:
        base: a network's config, such as ``{name: mlp, dim: 2}``, or a network, which is copied.
        head: likewise, with as many ``outputs`` as the covariance has numbers; a network is trained in place.
        weights: a .safetensors file with the base's weights, such as a run's model. Not part of ``config``: once saved,
            the base's weights travel with the head's.

    Raises:
        UnknownName: if a config names no network, or an argument that it does not take.
        NetworkError: if base or head is neither of these, or the weights do not fit the base.
        SpecError: if the file of weights cannot be read.
    """

    def __init__(self, base: Any, head: Any, weights: str | None = None) -> None:
        super().__init__()
        self.base = _made(copy.deepcopy(base), "base")
        self.head = _made(head, "head")
        if weights is not None:
            _fill(self.base, weights)
        self.base.requires_grad_(False).eval()
        from . import config_of

        self.config: dict[str, Any] = {
            "name": "confident",
            "base": config_of(self.base),
            "head": config_of(self.head),
        }

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """The outputs of both, shape [B, base's + head's, …].

        Args:
            x: shape [B, …]. time: shape [B]. cond: what both networks are given besides, such as labels ``y``.
        """
        # No graph is kept of the base, whose parameters are frozen, unless the gradient with respect to x is wanted.
        return torch.cat([self.base(x, time, **cond), self.head(x, time, **cond)], dim=1)

    def train(self, mode: bool = True) -> Confident:
        """Training mode for the head alone."""
        super().train(mode)
        self.base.eval()
        return self

    def checkpoint_activations(self, on: bool = True) -> None:
        """Compute the head's activations again in the backward pass; the base keeps none.

        Raises:
            NetworkError: if the head cannot do that.
        """
        ask = getattr(self.head, "checkpoint_activations", None)
        if ask is None:
            raise NetworkError(
                f"train.checkpoint_activations: the head, {type(self.head).__name__}, has no method "
                "checkpoint_activations(True); jit and unet have. Leave the setting out."
            )
        ask(on)


def _made(part: Any, what: str, where: str = "confident") -> nn.Module:
    from . import network

    if isinstance(part, nn.Module):
        return part
    if not isinstance(part, dict):
        raise NetworkError(
            f"{where}: {what} is a network's config, such as {{name: mlp, hidden: 64}}, or a network, found {part!r}."
        )
    return network(part)


def _fill(base: nn.Module, weights: str | Path) -> None:
    tensors, _ = read_tensors(weights)
    try:
        base.load_state_dict(tensors)
    except RuntimeError as e:
        raise NetworkError(f"the weights in {weights} do not fit the base {type(base).__name__}: {e}") from e
