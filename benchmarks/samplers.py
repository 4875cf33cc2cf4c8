"""Time a sampling step takes outside the network, against diffusers' DDIMScheduler, in one process.

    python benchmarks/samplers.py [--repeats 30] [--steps 50] [--threads 1]

The network is trivial: it returns one tensor, made beforehand. Ours is ``rp.sample`` with DDIM,
which draws nothing but the given start, through ``Denoiser`` (and once through classifier-free
guidance, for which there is nothing to compare to: its cost is stated beside). Theirs is the loop of their
documentation: set_timesteps, then ``scheduler.step`` at every time, without clipping. Both walk the
same steps of the same table from the same noise, which is checked. They take turns; the figures
are medians, in microseconds a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import reparam as rp
from reparam.guidance import ClassifierFree

SHAPES = ((64, 2), (64, 3, 32, 32))
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Trivial(nn.Module):
    """Always the same answer, of the input's shape."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        return self.answer[: len(x)]


def theirs(net: nn.Module, prediction: str, noise: Tensor, steps: int) -> Callable[[], Tensor]:
    """diffusers' loop."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        prediction_type=prediction, clip_sample=False, timestep_spacing="trailing", beta_start=1e-4, beta_end=0.02
    )

    @torch.no_grad()
    def run() -> Tensor:
        scheduler.set_timesteps(steps)
        x = noise
        for k in scheduler.timesteps:
            x = scheduler.step(net(x, k.expand(len(x))), k, x).prev_sample
        return x

    return run


def ours(denoiser: rp.Denoiser, start: Tensor, steps: int, **options: object) -> Callable[[], Tensor]:
    """rp.sample on the same steps."""

    def run() -> Tensor:
        x = rp.sample(denoiser, start=start, sampler="ddim", steps=steps, grid="trailing", **options)
        assert isinstance(x, Tensor)
        return x

    return run


def measure(runs: dict[str, Callable[[], Tensor]], repeats: int, steps: int) -> dict[str, float]:
    """Median microseconds a step, the runs taking turns."""
    seconds: dict[str, list[float]] = {who: [] for who in runs}
    for i in range(-3, repeats):  # the first three are not counted
        for who in reversed(runs) if i % 2 else runs:
            begun = time.perf_counter()
            runs[who]()
            if i >= 0:
                seconds[who].append(time.perf_counter() - begun)
    return {who: statistics.median(taken) / steps * 1e6 for who, taken in seconds.items()}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.steps} steps, microseconds a step")
    print(f"{'shape':>16} {'prediction':>13} {'diffusers':>10} {'reparam':>8} {'ratio':>6} {'guided':>8}")
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(0)
        noise, answer = torch.randn(2, *shape, generator=generator)
        for prediction in PREDICTIONS:
            net = Trivial(torch.cat([answer, answer]))
            denoiser = rp.Denoiser(net, "ddpm", prediction, time="step")
            guided = ClassifierFree(denoiser, 2.0, null_label=1)
            label = {"y": torch.zeros(len(noise), dtype=torch.long)}
            runs = {
                "diffusers": theirs(net, prediction, noise, args.steps),
                "reparam": ours(denoiser, noise, args.steps),
            }
            torch.testing.assert_close(runs["reparam"](), runs["diffusers"](), rtol=1e-4, atol=1e-4)
            found = measure(runs, args.repeats, args.steps)
            # Apart, so that its larger blocks of memory leave the comparison alone.
            found |= measure({"guided": ours(guided, noise, args.steps, cond=label)}, args.repeats, args.steps)
            ratio = found["reparam"] / found["diffusers"]
            print(
                f"{'x'.join(map(str, shape)):>16} {prediction:>13} {found['diffusers']:10.1f} {found['reparam']:8.1f} "
                f"{ratio:6.2f} {found['guided']:8.1f}"
            )


if __name__ == "__main__":
    main()
