"""The multilayer perceptron of the manifold experiment (Li & He, arXiv 2511.13720, section 4)."""

from __future__ import annotations

import itertools
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import NetworkError, unknown

Activation = Literal["relu", "silu"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class MLP(nn.Module):
    """``layers`` linear layers with an activation between them, on x and the time side by side.

    There is no skip connection, so the output spans at most ``hidden`` directions: with
    data of more dimensions than that, a target with noise in it cannot be represented.

    The network of the two-dimensional toy of Karras et al. (arXiv 2406.02507) is
    ``MLP(2, hidden=64, layers=6, activation="silu", gain=True)``; the constant that theirs gets beside x and the time
    is what the first layer's biases are.

    Args:
        dim: the data's dimension D; the input is of shape [B, D].
        hidden: width of the hidden layers.
        layers: the number of linear layers, at least 2.
        outputs: how many numbers a sample gets; D by default.
        activation: "relu" or "silu".
        gain: whether the output is multiplied by one learned number, which starts at 0.

    Raises:
        UnknownName: if there is no such activation.
        NetworkError: if a number is out of range.
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 256,
        layers: int = 5,
        outputs: int | None = None,
        activation: Activation = "relu",
        gain: bool = False,
    ) -> None:
        super().__init__()
        outputs = dim if outputs is None else outputs
        numbers = (("dim", dim, 1), ("hidden", hidden, 1), ("layers", layers, 2), ("outputs", outputs, 1))
        for name, value, least in numbers:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise NetworkError(f"mlp: {name} must be an integer of at least {least}, found {value!r}.")
        if activation not in get_args(Activation):
            raise unknown("activation of mlp", activation, _ACTIVATIONS)
        if not isinstance(gain, bool):
            raise NetworkError(f"mlp: gain is true or false, found {gain!r}.")
        self.config: dict[str, Any] = {
            "name": "mlp",
            "dim": dim,
            "hidden": hidden,
            "layers": layers,
            "outputs": outputs,
            "activation": activation,
            "gain": gain,
        }
        widths = [dim + 1, *[hidden] * (layers - 1), outputs]
        parts: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            parts += [nn.Linear(width_in, width_out), _ACTIVATIONS[activation]()]
        self.stack = nn.Sequential(*parts[:-1])
        self.gain = nn.Parameter(torch.zeros(())) if gain else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """The output, shape [B, outputs], for x of shape [B, D] and time of shape [B]."""
        if x.ndim != 2 or x.shape[1] != self.config["dim"]:
            raise NetworkError(f"mlp takes vectors of shape [B, {self.config['dim']}], found {list(x.shape)}.")
        both = x.new_empty(len(x), x.shape[1] + 1)  # torch.cat along rows is several times slower on a CPU
        both[:, :-1] = x
        both[:, -1] = time
        out: Tensor = self.stack(both)
        return out if self.gain is None else out * self.gain
