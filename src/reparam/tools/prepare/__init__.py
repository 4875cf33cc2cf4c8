"""Pictures cut once to one size, or encoded once by a VAE, for training that reads them many times.

The work is divided into shards, each written whole under its final name, so that a preparation
that was interrupted goes on with those that are missing. What a shard holds is a function of the
pictures and the settings: not of the number of workers, nor of where it was interrupted.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from ...errors import DataError, OutputError
from .cropping import centre_crop
from .plan import Plan, Prepared, first_side, found_at
from .shards import Kind, LatentShards, PictureShards, require
from .workers import cores, fill

__all__ = ["Prepared", "centre_crop", "prepare"]


def prepare(
    data: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    vae: str | Path | None = None,
    dtype: str = "float16",
    workers: int | None = None,
    skip_bad: bool = False,
    labels: str | None = None,
    column: str | None = None,
    hub: str | None = None,
    shard: int | None = None,
    batch: int = 16,
    device: str | None = None,
    progress: bool = True,
) -> Prepared:
    """Cut pictures to squares, and encode them where a VAE is given; go on where an earlier call ended.

    Without a VAE, ``out`` becomes Parquet shards in the layout of the Hugging Face hub, with a lossless
    PNG, the name it had, and the class of each picture; ``data: OUT`` in a recipe reads them. With one,
    it becomes what :func:`reparam.data.latents.load_latents` reads: mean and standard deviation of
    the encoder's Gaussian at every element, from pictures scaled to [−1, 1]. The encoder computes in
    float32. How a picture is cut: :func:`centre_crop`. Grey pictures stay grey unless a VAE wants
    colour; the order is that in which ``load_images`` reads them.

    More than one worker starts other processes: a script that calls this does so under
    ``if __name__ == "__main__":``.

    Args:
        data: whatever :func:`reparam.data.images.load_images` reads: a folder or .zip of pictures
            (first-level sub-folders are classes), .parquet or .tar shards, …
        out: the folder to write; new, empty, or with the beginning of the same preparation.
        size: the side in pixels. With a VAE it may be None where all pictures have one size.
        vae: a local folder with diffusers' ``AutoencoderKL`` (config.json and .safetensors).
        dtype: of the latents on disk: "float16" (a standard deviation below 3e-8 becomes 0), "bfloat16"
            or "float32".
        workers: processes that decode; by default one a core.
        skip_bad: leave out pictures that cannot be used, and list them in the record.
        labels, column, hub: as of ``load_images``.
        shard: pictures a shard; by default 256 MiB of pixels, or 4,096 latents.
        batch: pictures that the VAE encodes at a time.
        device: where it does: "cpu", "cuda", …; the GPU where there is one.
        progress: whether to show progress on standard error, if that is a terminal.

    Raises:
        DataError: if there are no pictures, or some cannot be used; if the VAE cannot be read; if a
            package is not installed.
        OutputError: if ``out`` holds something else, or cannot be written.
        UnknownName: if there is no such dtype.
    """
    _refuse_numbers(size=size, workers=workers, shard=shard, batch=batch)
    if size is None and vae is None:
        raise DataError("no size is given to cut pictures to: --size 256.")
    require("PIL", "images", "pictures are read by Pillow")
    from ...data.images import asked

    folder = Path(os.path.expanduser(out))
    with contextlib.ExitStack() as stack:
        ask = asked(labels=labels, column=column, skip_bad=skip_bad)
        found = found_at(str(data), ask, stack, hub)
        _refuse_inside(folder, Path(os.path.expanduser(data)))
        kind: Kind = PictureShards() if vae is None else LatentShards(vae, dtype, batch, device)
        side = (size, size) if size is not None else first_side(found)
        kind.refuse_side(side)
        plan = Plan(found, kind, folder, side, size is not None, shard or kind.rows(side))
        plan.begin()
        fill(plan, skip_bad, workers or cores(), progress)
        return plan.finish()


def _refuse_numbers(**numbers: Any) -> None:
    for name, value in numbers.items():
        if name == "batch" or value is not None:
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or value < 1:
                raise DataError(f"{name} must be an integer of at least 1, found {value!r}: --{name} N.")


def _refuse_inside(out: Path, data: Path) -> None:
    if data.is_dir() and out.resolve().is_relative_to(data.resolve()):
        raise OutputError(f"{out} lies in {data}, whose pictures it is made from; choose a place outside (--out).")
