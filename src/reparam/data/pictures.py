"""The data of a recipe's ``data: {name: images, …}``: pictures in memory, or streamed from disk."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import DataError, unknown
from .base import PICTURE_MEAN, PICTURE_STD, Data
from .order import held_out, mix, permutation, samples_of, split

if TYPE_CHECKING:
    from .images import Options, Source
    from .streams import Stream

#: Of streamed data, so many training pictures, and so many held-out ones, are in memory at most.
_MOST, _MOST_BYTES = 10_000, 2**29
#: Blocks from which those are taken, where there are more: reading a few of every block would read everything.
_FEW = 1024


def load_pictures(
    path: str | None = None,
    size: int | list[int] | None = None,
    resize: str | None = None,
    colour: str | None = None,
    labels: str | None = None,
    column: str | None = None,
    classes: int | None = None,
    flip: bool = False,
    holdout: float = 0.1,
    skip_bad: bool = False,
    limit: int | None = None,
    seed: int = 0,
    stream: bool | str = "auto",
    hub: str | None = None,
) -> Data:
    """Pictures as :func:`reparam.data.images.load_images` reads them, split into training and held-out ones.

    Args:
        flip: whether training sees each picture mirrored half of the time.
        holdout: the share kept from training; 0 where nothing is trained.
        seed: of the split.
        stream: whether pictures are read from disk as training asks for them; "auto" does so where all of
            them would take more than a quarter of the machine's memory.

    Raises:
        UnknownName, DataError: as ``load_images`` and :func:`reparam.data.order.split`.
    """
    if path is None:
        raise DataError(
            "data 'images' needs data.path: a folder or .zip of pictures, a .parquet or .tar file or a folder of "
            "such, hub:OWNER/NAME, or a .npz of bytes; for example --set data.path=photos/."
        )
    if stream not in (True, False, "auto"):
        raise unknown("way to stream", stream, ["true", "false", "auto"])
    from .images import asked, opened, read

    ask = asked(size, resize, colour, labels, column, classes, skip_bad, limit)
    chosen = {"size": size, "resize": resize, "colour": colour, "column": column, "limit": limit}
    name = _name(path) + _besides(chosen, flip, holdout, seed)
    with contextlib.ExitStack() as stack:
        source = opened(path, ask, stack, hub)
        if stream is True or (stream == "auto" and _too_large(source, ask)):
            return _streamed(name, source, ask, stack, flip, holdout, seed)
        found = read(source, ask)
    train, heldout = split(len(found.pixels), holdout, seed)
    return Data(
        name=name,
        train=found.pixels[train],
        heldout=found.pixels[heldout],
        mean=PICTURE_MEAN,
        std=PICTURE_STD,
        labels=None if found.labels is None else found.labels[train],
        heldout_labels=None if found.labels is None else found.labels[heldout],
        classes=found.classes,
        flip=flip,
        remarks=found.remarks,
    )


def _besides(chosen: Mapping[str, object], flip: bool, holdout: float, seed: int) -> str:
    """What was asked for besides the path, in parentheses."""
    told = [f"{key} {value}" for key, value in chosen.items() if value is not None]
    told += ["mirrored"] if flip else []
    told += [f"holdout {holdout:g}"] if holdout != 0.1 else []
    told += [f"seed {seed}"] if seed else []
    return f" ({', '.join(told)})" if told else ""


def _name(path: str) -> str:
    """A path's last part; of a file that may be called train.parquet everywhere, its folder too."""
    if path.startswith("hub:"):
        return path.removeprefix("hub:")
    file = Path(path).expanduser().absolute()
    return "/".join(file.parts[-2:]) if file.suffix in (".parquet", ".tar") else file.name


def _too_large(source: Source, ask: Options) -> bool:
    from .streams import too_large

    return too_large(source, ask)


def _streamed(
    name: str, source: Source, ask: Options, stack: contextlib.ExitStack, flip: bool, holdout: float, seed: int
) -> Data:
    from .streams import keep_open, stream_of

    everything = stream_of(source, ask)
    keep_open(everything, stack)
    train, heldout, part = _parts(everything, holdout, seed)
    h = len(heldout)
    pixels, labels = everything.only(torch.cat([heldout, part])).batch(torch.arange(h + len(part)))
    stream = everything.only(train)
    return Data(
        name=name,
        train=pixels[h:],
        heldout=pixels[:h],
        mean=PICTURE_MEAN,
        std=PICTURE_STD,
        labels=None if labels is None else labels[h:],
        heldout_labels=None if labels is None else labels[:h],
        classes=stream.classes,
        flip=flip,
        remarks=(
            *_told(stream, h, len(part), held_out(everything.count, holdout) if holdout else 0),
            *everything.remarks,
        ),
        stream=stream,
    )


def _told(stream: Stream, held: int, part: int, asked: int) -> list[str]:
    told = [
        f"streamed from disk; statistics, the reference and nearest neighbours are those of {part} of {stream.count} "
        "training pictures, spread over them"
    ]
    return told + ([f"{held} held out, of {asked} asked for: they are in memory"] if held < asked else [])


def _parts(stream: Stream, holdout: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which pictures to train on, which are held out, and the part of the first that is held in memory."""
    most = max(2, min(_MOST, _MOST_BYTES // math.prod(stream.shape)))
    held = min(held_out(stream.count, holdout), most) if holdout else 0
    count = stream.count - held
    if stream.blocks is not None and count > stream.window:
        return _of_few_blocks(stream, held, most, seed)
    order = permutation(stream.count, seed)
    train = order[held:]
    return train, order[:held], train[torch.arange(min(most, count)) * count // min(most, count)]


def _of_few_blocks(stream: Stream, held: int, most: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for pictures in blocks: what is in memory is taken from some blocks, and training keeps their order."""
    assert stream.blocks is not None
    sizes = torch.tensor(stream.blocks)
    blocks = permutation(len(sizes), seed)
    enough = int((sizes[blocks].cumsum(0) < 4 * (held + most)).sum()) + 1
    near = samples_of(blocks[: max(_FEW, enough)], sizes)
    near = near[permutation(len(near), mix(seed, 0xFE3))]
    train = torch.ones(stream.count, dtype=torch.bool)
    train[near[:held]] = False
    return train.nonzero().flatten(), near[:held], near[held : held + most]
