"""The multilayer perceptron of the manifold experiment (Li & He, arXiv 2511.13720, section 4)."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor, nn

from ..errors import NetworkError


class MLP(nn.Module):
    """``layers`` linear layers with ReLU between them, on x and the time side by side.

    There is no skip connection, so the output spans at most ``hidden`` directions: with
    data of more dimensions than that, a target with noise in it cannot be represented.

    Args:
        dim: the data's dimension D; input and output are of shape [B, D].
        hidden: width of the hidden layers.
        layers: the number of linear layers, at least 2.
    """

    def __init__(self, dim: int, hidden: int = 256, layers: int = 5) -> None:
        super().__init__()
        for name, value, least in (("dim", dim, 1), ("hidden", hidden, 1), ("layers", layers, 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise NetworkError(f"mlp: {name} must be an integer of at least {least}, found {value!r}.")
        self.config: dict[str, Any] = {"name": "mlp", "dim": dim, "hidden": hidden, "layers": layers}
        widths = [dim + 1, *[hidden] * (layers - 1), dim]
        parts: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            parts += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.stack = nn.Sequential(*parts[:-1])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """The output, shape [B, D], for x of shape [B, D] and time of shape [B]."""
        if x.ndim != 2 or x.shape[1] != self.config["dim"]:
            raise NetworkError(f"mlp takes vectors of shape [B, {self.config['dim']}], found {list(x.shape)}.")
        both = x.new_empty(len(x), x.shape[1] + 1)  # torch.cat along rows is several times slower on a CPU
        both[:, :-1] = x
        both[:, -1] = time
        out: Tensor = self.stack(both)
        return out
