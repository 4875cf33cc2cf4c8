"""The convolutional U-Net of DDPM (Ho et al., arXiv 2006.11239), as diffusers' ``UNet2DModel`` builds it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, full_like, int64, nn
from torch.utils.checkpoint import checkpoint

from ..errors import Conflict, NetworkError, unknown

#: Channels at each resolution, from the finest down: 8.95, 35.7 and 142.8 million parameters on RGB.
SIZES = {
    "small": (64, 128, 128, 128),
    "medium": (128, 256, 256, 256),
    "large": (256, 512, 512, 512),
}

#: Settings that change what is computed, and not one parameter's shape.
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddpm-cifar10": {
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "attention_head_dim": None,
        "norm_eps": 1e-6,
    },
    "default": {
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "attention_head_dim": 8,
        "norm_eps": 1e-5,
    },
}

_GROUPS = 32  # of every normalisation, of narrow networks half as many
_ATTENTION = 1  # the resolution with self-attention, from the finest on: 16×16 of 32×32


class UNet(nn.Module):
    """diffusers' ``UNet2DModel``, called as ``net(x, time, y)``; parameters carry its names.

    Two residual blocks a resolution, self-attention at the second one and in the middle.
    google/ddpm-cifar10-32 is size "medium", and its weights go straight in:
    ``net.load_state_dict(UNet2DModel.from_pretrained(folder).state_dict())``.

    The time goes through sinusoids of periods from 2π up, so a network that is given t in [0, 1]
    hardly sees it. In a recipe write ``time: step`` under a DDPM table (diffusers' integer steps
    0 … T − 1), and ``time: 1000t`` under any other schedule; in Python
    ``Objective(..., time="step")``. Times between the steps are fine.

    The two layouts have the same parameters. "ddpm-cifar10" is google/ddpm-cifar10-32's own:
    sines before cosines with frequencies 10000^(−k/(n/2 − 1)), downsampling padded at the right and
    bottom only, one attention head, normalisation with ε = 1e-6. "default" is what ``UNet2DModel``
    does when nothing is said: cosines first, frequencies 10000^(−k/(n/2)), padding on all sides,
    heads of 8 channels, ε = 1e-5. Published studies in this layout do not say which they used; we take
    google/ddpm-cifar10-32's, whose published scores can be compared with.

    Args:
        image: the pictures' side, or [height, width]; divisible by 8, or by 2^(n − 1) for n widths.
        channels: of the pictures.
        classes: how many; 0 for a network without labels. Label ``classes`` means "no label".
        size: "small" (the default), "medium" or "large".
        widths: in place of a size, the channels at each resolution: at least two multiples of 32.
        layout: "ddpm-cifar10" or "default".
        dropout: in every residual block.
        outputs: channels of the output; those of the pictures by default.

    Raises:
        UnknownName: if there is no such size or layout.
        Conflict: if both a size and widths are given.
        NetworkError: if the numbers do not fit together, or diffusers is not installed.
    """

    def __init__(
        self,
        image: int | list[int],
        channels: int = 3,
        classes: int = 0,
        size: str | None = None,
        widths: list[int] | None = None,
        layout: str = "ddpm-cifar10",
        dropout: float = 0.0,
        outputs: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(layout, str) or layout not in LAYOUTS:
            raise unknown("layout of unet", layout, LAYOUTS)
        self.config: dict[str, Any] = {
            "name": "unet",
            "image": list(image) if isinstance(image, list | tuple) else [image, image],
            "channels": channels,
            "classes": classes,
            "widths": _widths(size, widths),
            "layout": layout,
            "dropout": dropout,
            "outputs": channels if outputs is None else outputs,
        }
        _check(self.config)
        model = _model(**{k: v for k, v in self.config.items() if k != "name"})
        # The model's parts are ours, and the model itself is not one of them: all names stay diffusers'.
        for name, part in model.named_children():
            self.add_module(name, part)
        self._whole = (model,)
        self.null_label = classes

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        """The output, shape [B, outputs, height, width].

        Args:
            x: pictures, shape [B, channels, height, width].
            time: shape [B], integer or float, in steps of about a thousandth of the whole.
            y: class numbers, int64, shape [B]; ``classes`` means "no label", and so does None.

        Raises:
            NetworkError: if x is of another shape, or labels are given to a network without classes.
        """
        expected = (self.config["channels"], *self.config["image"])
        if x.shape[1:] != expected:
            raise NetworkError(
                f"this UNet takes pictures of shape [B, {', '.join(map(str, expected))}], found {list(x.shape)}."
            )
        if not self.null_label and y is not None:
            raise NetworkError("labels were given to a UNet without classes; make it with classes=….")
        if self.null_label and y is None:
            y = full_like(time, self.null_label, dtype=int64)
        out: Tensor = self._whole[0](x, time, class_labels=y, return_dict=False)[0]
        return out

    def checkpoint_activations(self, on: bool = True) -> None:
        """Compute each block again in the backward pass instead of keeping what it computed.

        The numbers stay the same, dropout's too; memory falls, and a step takes about a third longer.
        """
        if on:
            self._whole[0].enable_gradient_checkpointing(_again)
        else:
            self._whole[0].disable_gradient_checkpointing()


def _again(block: nn.Module, *inputs: Any) -> Any:
    return checkpoint(block, *inputs, use_reentrant=False)


def _model(
    image: list[int], channels: int, classes: int, widths: list[int], layout: str, dropout: float, outputs: int
) -> Any:
    try:
        from diffusers import UNet2DModel
    except ImportError as e:
        raise NetworkError(
            f"the network unet is diffusers' UNet2DModel, which cannot be imported ({e}): pip install "
            "'reparam[diffusers]', or take network: jit."
        ) from e
    level = range(len(widths))
    down = ["AttnDownBlock2D" if i == _ATTENTION else "DownBlock2D" for i in level]
    up = ["AttnUpBlock2D" if i == _ATTENTION else "UpBlock2D" for i in reversed(level)]
    return UNet2DModel(
        sample_size=tuple(image),
        in_channels=channels,
        out_channels=outputs,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=tuple(widths),
        layers_per_block=2,
        dropout=dropout,
        # With one channel a group a normalisation takes out again whatever the time has added to that channel.
        norm_num_groups=_GROUPS if min(widths) >= 2 * _GROUPS else _GROUPS // 2,
        num_class_embeds=classes + 1 if classes else None,
        **LAYOUTS[layout],
    )


def _widths(size: Any, widths: Any) -> list[int]:
    if widths is None:
        size = "small" if size is None else size
        if not isinstance(size, str) or size not in SIZES:
            raise unknown("size of unet", size, SIZES)
        return list(SIZES[size])
    if size is not None:
        raise Conflict(f"unet: size {size!r} and widths {widths!r} say the same thing twice; leave one of them out.")
    if not isinstance(widths, list | tuple) or len(widths) < 2 or not all(_whole(w, _GROUPS) for w in widths):
        raise NetworkError(
            f"unet: widths are at least two numbers of channels, multiples of {_GROUPS}, found {widths!r}; for example "
            "network.widths=[64,128]."
        )
    if odd := [w for w in widths if w % _GROUPS]:
        raise NetworkError(
            f"unet: every width is a multiple of {_GROUPS}, the groups of its normalisations, found {odd[0]} in "
            f"{list(widths)}; the nearest is {max(1, round(odd[0] / _GROUPS)) * _GROUPS}."
        )
    return list(widths)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check(config: dict[str, Any]) -> None:
    for name, least in (("channels", 1), ("classes", 0), ("outputs", 1)):
        if not _whole(config[name], least):
            raise NetworkError(f"unet: {name} must be an integer of at least {least}, found {config[name]!r}.")
    image, factor = config["image"], 2 ** (len(config["widths"]) - 1)
    if len(image) != 2 or not all(_whole(side, 1) for side in image):
        raise NetworkError(f"unet: image is a side, or [height, width], in pixels, found {image!r}.")
    if any(side % factor for side in image):
        sides = {max(1, round(side / factor)) * factor for side in image}
        nearest = sides.pop() if len(sides) == 1 else [max(1, round(side / factor)) * factor for side in image]
        raise NetworkError(
            f"unet: pictures of {image[0]}×{image[1]} cannot be halved {len(config['widths']) - 1} times; both sides "
            f"must be divisible by {factor}. Resize the pictures (--set 'data.size={nearest}' --set data.resize=crop) "
            "or give fewer widths (network.widths)."
        )
    dropout = config["dropout"]
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise NetworkError(f"unet: dropout must be a number in [0, 1), found {dropout!r}.")
