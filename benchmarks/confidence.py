"""What a likelihood costs: training steps of `reparam study tree`, its three ways of learning taking turns.

    python benchmarks/confidence.py [--rounds 15] [--steps 40] [--threads 1]

Prints the median time of a step (draws, loss, gradient, optimiser, average, checks) and its ratio to the
baseline's, with the 95 % interval of that median by bootstrap over rounds. In a round every way does `steps`
steps, in an order of its own.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import time

import numpy as np
import torch

from reparam.studies.recipe import load_recipe
from reparam.studies.run import data_of, make_network, trainer_of
from reparam.training import Engine, Trainer


def trainers() -> dict[str, Trainer]:
    """One trainer a way, at the same step."""
    runs = load_recipe("tree", ["data.size=200000", "sample.autoguidance=null"]).runs
    return {run: trainer_of(c, data_of(c), make_network(c, data_of(c)), Engine("cpu")) for run, c in runs.items()}


def milliseconds(trainer: Trainer, steps: int) -> float:
    """Of a step, over ``steps`` of them."""
    begun = time.perf_counter()
    for _ in range(steps):
        trainer.update()
    return (time.perf_counter() - begun) / steps * 1e3


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """The median and its 95 % interval."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ways = trainers()
    for trainer in ways.values():
        milliseconds(trainer, 5)
    order, times = random.Random(0), {run: [] for run in ways}
    for _ in range(args.rounds):
        for run in order.sample(list(ways), len(ways)):
            times[run].append(milliseconds(ways[run], args.steps))
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {args.threads} threads, ", end="")
    print(f"load {os.getloadavg()[0]:.1f}, {args.rounds} rounds of {args.steps} steps")
    base = np.array(next(iter(times.values())))
    for run, found in times.items():
        middle, low, high = interval(np.array(found) / base)
        print(f"{run:12} {np.median(found):7.2f} ms   {middle:.3f} ({low:.3f}–{high:.3f})")


if __name__ == "__main__":
    main()
