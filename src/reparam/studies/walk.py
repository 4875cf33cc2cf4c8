"""A walk from noise to samples of which each is a function of the seed and its number, wherever it is drawn."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..samplers import Sampler, Trajectory, sample
from ..training.draws import step_noise, unit_noise


def walked(
    denoiser: Denoiser,
    method: Sampler,
    times: Sequence[float],
    seed: int,
    numbers: tuple[int, int],
    shape: tuple[int, ...],
    *,
    y: Tensor | None = None,
    clean: Tensor | None = None,
    trajectory: bool = False,
) -> Tensor | Trajectory:
    """The samples of a seed, from number … to, as the network knows data; on its device, in float32 without TF32.

    What each is does not depend on how many others are drawn with it, but for rounding: all its noise is a function of
    seed and number, and each kind of device has its own for the steps.

    Args:
        shape: of one sample.
        y, clean: of all samples of the seed: the labels, int64 [n], and the data that they start from once those
            are noised, [n, …]; no labels, and noise alone, by default.
        trajectory: return the whole way.
    """
    device, mine = next(denoiser.parameters()).device, slice(*numbers)
    noise = unit_noise(seed, *numbers, shape)
    begun: dict[str, Any] = (
        {"shape_or_noise": noise.to(device)}
        if clean is None
        else {"start": denoiser.schedule.add_noise(clean[mine], noise, times[0]).to(device)}
    )
    with tf32(False):
        return sample(
            denoiser,
            **begun,
            sampler=method,
            times=times,
            cond={} if y is None else {"y": y[mine].to(device)},
            noises=(step_noise(seed, step, *numbers, shape, device) for step in itertools.count()),
            trajectory=trajectory,
        )


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, products and convolutions of float32 may or may not use TF32, whose rounding is a thousand times as much
    and differs with the batch."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = allowed
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before
