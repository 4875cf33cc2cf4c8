"""Any model of diffusers as a network: called as ``net(x, time, **cond)`` and known by its config."""

from __future__ import annotations

import inspect
import json
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import NetworkError, unknown

#: What diffusers' models call the noisy data and the time.
_DATA = ("sample", "hidden_states")
_TIME = "timestep"


class FlowCall(NamedTuple):
    """How diffusers' own pipelines call a flow model, of which no scheduler says anything."""

    #: The time they give it, σ of the scheduler being t.
    time: str
    #: −1 where they negate what it returns before the scheduler takes it for ε − x0.
    sign: int = 1
    #: The entry of its config by which they multiply that time.
    factor: str | None = None


#: By class, as read in diffusers 0.42. CogView4 and GLM-Image are not among them: under a shift the time that they
#: are given is not that of their noise. Nor is Cosmos, whose input is scaled.
FLOW_CALLS = {
    **dict.fromkeys(
        (
            "BriaFiboTransformer2DModel",
            "BriaTransformer2DModel",
            "HunyuanVideoTransformer3DModel",
            "LTXVideoTransformer3DModel",
            "SanaVideoTransformer3DModel",
            "SD3Transformer2DModel",
            "SkyReelsV2Transformer3DModel",
            "UNet2DConditionModel",
            "UNet2DModel",
            "WanTransformer3DModel",
        ),
        FlowCall("1000t"),
    ),
    **dict.fromkeys(
        (
            "AuraFlowTransformer2DModel",
            "ChromaTransformer2DModel",
            "Flux2Transformer2DModel",
            "FluxTransformer2DModel",
            "Krea2Transformer2DModel",
            "LongCatImageTransformer2DModel",
            "OvisImageTransformer2DModel",
            "PRXTransformer2DModel",
            "QwenImageTransformer2DModel",
        ),
        FlowCall("t"),
    ),
    "Lumina2Transformer2DModel": FlowCall("1-t", -1),
    "NucleusMoEImageTransformer2DModel": FlowCall("t", -1),
    "SanaTransformer2DModel": FlowCall("1000t", factor="timestep_scale"),
}


class DiffusersModel(nn.Module):
    """A model of diffusers: ``UNet2DModel``, ``UNet2DConditionModel``, ``DiTTransformer2DModel`` and the like.

    Conditions go through by the model's own names: ``cond={"encoder_hidden_states": …, "class_labels": …}``.
    A model with twice as many channels out as in also learned a variance (improved DDPM, DiT); that half is dropped.
    The model runs in the dtype of its weights.

    Args:
        model: the class's name in diffusers.
        arguments: the class's arguments, as in its config.json.
        time_scale: factor on the time before the model sees it.
        sign: 1, or −1 for a model that predicts the negative of what it is called here.

    Raises:
        UnknownName: if diffusers has no such model, or the model takes no such argument.
        NetworkError: if it cannot be made, is not called as model(data, timestep), or diffusers is not installed.
    """

    def __init__(self, model: str, arguments: dict[str, Any], time_scale: float = 1.0, sign: int = 1) -> None:
        super().__init__()
        self._take(_made(model, arguments), time_scale, sign)

    @classmethod
    def of(cls, model: nn.Module, time_scale: float = 1.0, sign: int = 1) -> DiffusersModel:
        """A model that exists already; it is not copied."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._take(model, time_scale, sign)
        return made

    def _take(self, model: nn.Module, time_scale: float, sign: int) -> None:
        name, own = type(model).__name__, getattr(model, "config", None)
        takes = inspect.signature(model.forward).parameters
        data = [p for p in takes if p in _DATA]
        if own is None or not data or _TIME not in takes:
            raise NetworkError(
                f"{name} is not called as model(sample or hidden_states, timestep) with a config, as diffusers' "
                "denoising models are; write an nn.Module called as net(x, time, **cond) around it."
            )
        if sign not in (1, -1):
            raise NetworkError(f"sign is 1 or -1, found {sign!r}.")
        self.model, self._takes, self._data = model, list(takes), data[0]
        self.time_scale, self.sign = float(time_scale), sign
        channels_in, channels_out = own.get("in_channels"), own.get("out_channels")
        #: Half of the output is a variance, and dropped.
        self.learned_variance = channels_in is not None and channels_out == 2 * channels_in
        arguments = {key: value for key, value in own.items() if not key.startswith("_")}
        self.config: dict[str, Any] = {
            "name": "diffusers",
            "model": name if _theirs(model) else None,  # a class of the user's is not built in
            "arguments": json.loads(json.dumps(arguments, default=str)),
            "time_scale": self.time_scale,
            "sign": sign,
        }

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """The model's prediction, shape [B, …].

        Args:
            x: noisy data, shape [B, …]. time: shape [B]. cond: the model's other arguments, by its own names.

        Raises:
            NetworkError: if the model takes no such condition, or misses one.
        """
        if strange := [key for key in cond if key not in self._takes]:
            name = type(self.model).__name__
            raise NetworkError(f"{name} takes no {strange[0]!r}; it takes {', '.join(self._takes)}.")
        dtype = next((p.dtype for p in self.model.parameters()), x.dtype)
        if self.time_scale != 1:
            time = time * self.time_scale
        given = {self._data: x.to(dtype), _TIME: time, **cond}
        try:
            y: Tensor = self.model(**given, **({"return_dict": False} if "return_dict" in self._takes else {}))[0]
        except (AttributeError, TypeError, ValueError) as e:  # of an argument that is None, often the first
            raise NetworkError(
                f"{type(self.model).__name__} could not be called with {', '.join(given)}: {e}. Give what is missing "
                "as cond={…}."
            ) from e
        if self.learned_variance:
            y = y[:, : x.shape[1]]
        return y if self.sign == 1 else -y


def _theirs(model: nn.Module) -> bool:
    return type(model).__module__.partition(".")[0] == "diffusers"


def _made(name: str, arguments: dict[str, Any]) -> Any:
    kind = model_class(name)
    known = inspect.signature(kind.__init__).parameters
    for key in arguments:
        if key not in known:
            raise unknown(f"argument of diffusers' {name}", key, [k for k in known if k != "self"])
    try:
        return kind(**arguments)
    except (TypeError, ValueError, NotImplementedError, KeyError) as e:
        raise NetworkError(f"diffusers' {name} could not be made with {arguments}: {e!r}.") from e


def model_class(name: str) -> Any:
    """A class of models of diffusers by name.

    Raises:
        NetworkError: if diffusers is not installed.
        UnknownName: if it has no model of that name.
    """
    try:
        import diffusers
        from diffusers import ModelMixin
    except ImportError as e:
        raise NetworkError(
            f"{name} is a model of diffusers, which cannot be imported ({e}): pip install 'reparam[diffusers]'."
        ) from e
    kind = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise unknown("model of diffusers", name, ["UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel"])
    return kind
