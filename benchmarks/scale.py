"""What the built-in recipes cost at full size: operations, memory, bytes and time on 1, 8 and 64 GPUs. Computed.

    python benchmarks/scale.py [RECIPE …]    # the tables of docs/scale.md, as Markdown
    python benchmarks/scale.py --check       # the model against published operations and measured memory

No picture and no GPU is needed: networks are counted on tensors without content, for pictures of the side that a recipe
states (32 where it states none, as CIFAR-10 has). The formulas are in reparam.studies.scale; every assumption about
the machine is an option here. Of a recipe with several runs, the figures are of its last. Counting takes some seconds a
network, and a minute for the largest.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from reparam.data import Data
from reparam.errors import ReparamError
from reparam.studies.recipe import RunConfig, built_in, load_recipe
from reparam.studies.run import data_of, make_network, trainer_of
from reparam.studies.scale import Machine, Memory, Projection, Work, averages_of, memory, project, stand_in, work_of

GPUS = (1, 8, 64)
#: How many pictures and classes the data sets have that recipes are meant for, by side: CIFAR-10, or else ImageNet.
CIFAR10, IMAGENET = (50_000, 10), (1_281_167, 1000)
#: Recipes whose data are the reader's own.
OPEN = ("folder",)
#: Assumptions that may be 0: seconds that something takes besides what it moves.
FREE = ("launch", "latency")
#: Published multiplications with addition of a forward pass at 256 pixels, in units of 10⁹ (arXiv 2511.13720, table 9).
PUBLISHED = {"B": 25, "L": 88, "H": 182, "G": 383}
#: Networks whose peak of memory is measured, on pictures of a side, with a batch.
_JIT = {"name": "jit", "patch": 4, "width": 128, "depth": 6, "heads": 4}
MEASURED = ((_JIT, 32, 32), (_JIT, 32, 128), ({"name": "unet", "size": "small"}, 32, 32))


@dataclass(frozen=True)
class Row:
    """A recipe at scale: how many runs it has, and what the last of them costs."""

    recipe: str
    runs: int
    config: RunConfig
    work: Work
    on: dict[int, Projection | None]


def pictures_of(config: RunConfig) -> tuple[Data, tuple[float, int]]:
    """Data of the recipe's shape, and the bytes of a sample and how many there are."""
    if config.data["name"] != "images":
        data = data_of(config)
        return data, (data.train[0].nbytes, data.count)
    size = config.data.get("size", 32)
    high, wide = (size, size) if isinstance(size, int) else size
    count, classes = CIFAR10 if max(high, wide) == 32 else IMAGENET
    kept = round(count * (1 - config.data.get("holdout", 0.1)))
    return stand_in((3, high, wide), classes), (3 * high * wide, kept)


_counted: dict[str, Work] = {}


def row_of(recipe: str, machine: Machine) -> Row:
    """What a recipe costs."""
    runs = load_recipe(recipe).runs
    config = list(runs.values())[-1]
    kind = json.dumps([config.network, config.data, config.conditional, config.target, config.train.precision])
    like, data = pictures_of(config)
    work = _counted.get(kind) or work_of(config, like)
    _counted[kind] = work
    on: dict[int, Projection | None] = {}
    for gpus in GPUS:
        fits = config.train.batch % (gpus * config.train.accumulate) == 0
        on[gpus] = project(work, config, gpus, data, machine) if fits else None
    return Row(recipe, len(runs), config, work, on)


# The tables


WORK_HEAD = (
    "| recipe | runs | parameters | forward, a sample | backward | in all, a run | state | activations, a sample | "
    "memory of one of 8 GPUs |\n|---|---|---|---|---|---|---|---|---|"
)
TIME_HEAD = (
    "| recipe | batch × steps | data read, a step | reduced, a step and GPU | 1 GPU | 8 GPUs | 64 GPUs | "
    "bound on 8 |\n|---|---|---|---|---|---|---|---|"
)


def work_line(row: Row) -> str:
    """Operations and memory, as a line of a table."""
    work, on = row.work, row.on[8]
    whole = work.flops * row.config.train.batch * row.config.train.steps
    state = memory(4 * work.parameters, averages_of(row.config), 0.0).total
    cells = [
        row.recipe,
        str(row.runs),
        _si(work.parameters, ""),
        _si(work.forward, "FLOP"),
        _si(work.backward, "FLOP"),
        _si(whole, "FLOP"),
        _si(state, "B"),
        _si(work.kept, "B"),
        "–" if on is None else _si(on.memory.total, "B"),
    ]
    return f"| {' | '.join(cells)} |"


def time_line(row: Row) -> str:
    """Bytes and times, as a line of a table."""
    on, train = row.on[8], row.config.train
    cells = [row.recipe, f"{train.batch:,} × {train.steps:,}"]
    cells += ["–", "–"] if on is None else [_si(on.read, "B") if on.read else "in memory", _si(on.reduced, "B")]
    cells += ["–" if p is None else _hours(p.seconds) for p in row.on.values()]
    cells.append("–" if on is None else on.bound)
    return f"| {' | '.join(cells)} |"


def _si(value: float, unit: str) -> str:
    """Three digits and a prefix."""
    for size, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            digits = max(0, 2 - int(math.log10(value / size)))
            return f"{value / size:.{digits}f} {prefix}{unit}".rstrip()
    return f"{value:.3g} {unit}".rstrip()


def _hours(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.2g} s"


def tables(recipes: list[str], machine: Machine) -> None:
    """Print both."""
    rows = []
    for recipe in recipes:
        print(f"counting {recipe}", file=sys.stderr, flush=True)
        rows.append(row_of(recipe, machine))
    print("\n".join([WORK_HEAD, *map(work_line, rows), "", TIME_HEAD, *map(time_line, rows)]))


# The model against what is known


def check() -> None:
    """Operations against the published ones, memory against the peak of a fresh process."""
    print("| network | published, 10⁹ multiply-adds | counted | ratio |\n|---|---|---|---|")
    for size, published in PUBLISHED.items():
        counted = work_of(_plain({"name": "jit", "size": size}, 256, conditional=True), stand_in((3, 256, 256), 1000))
        found = counted.forward / 2e9
        print(f"| JiT-{size}/16 | {published} | {found:.1f} | {found / published:.3f} |", flush=True)
    print("\n| network | batch | computed | measured peak | ratio |\n|---|---|---|---|---|")
    for net, side, batch in MEASURED:
        computed = computed_memory(net, side, batch).total
        measured = measured_peak(net, side, batch)
        cells = [_named(net), str(batch), _si(computed, "B"), _si(measured, "B"), f"{computed / measured:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def _named(net: dict[str, object]) -> str:
    return f"{net['name']} ({', '.join(f'{k} {v}' for k, v in net.items() if k != 'name')})"


def _plain(net: dict[str, object], side: int, batch: int = 2, conditional: bool = False) -> RunConfig:
    """A run in float32 of a network, for pictures that are not needed."""
    recipe = {
        "data": {"name": "images", "path": "none", "size": side},
        "network": net,
        "target": "x0",
        "conditional": conditional,
        "train": {"batch": batch, "steps": 3, "precision": "float32"},
    }
    return next(iter(load_recipe(recipe).runs.values()))


def computed_memory(net: dict[str, object], side: int, batch: int) -> Memory:
    """What the model says of a process on a CPU in float32."""
    work = work_of(_plain(net, side), stand_in((3, side, side)))
    return memory(4 * work.parameters, 1, work.kept_fixed + batch * work.kept)


def measured_peak(net: dict[str, object], side: int, batch: int) -> float:
    """By how many bytes a fresh process grows, at its peak, that trains a few steps."""
    command = [sys.executable, __file__, "--train", json.dumps([net, side, batch])]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(told.split()[-1])


def train(net: dict[str, object], side: int, batch: int) -> None:
    """What that process does."""
    torch.set_num_threads(1)
    config, data = _plain(net, side, batch), stand_in((3, side, side))
    if net["name"] == "unet":
        import diffusers.models.unets.unet_2d  # noqa: F401  # so that its code is not counted
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    trainer = trainer_of(config, data, make_network(config, data))
    for _ in range(3):
        trainer.update()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def _amount(name: str, kind: type) -> Callable[[str], float]:
    """What reads an assumption about the machine; only what takes time by itself may be none."""

    def read(text: str) -> float:
        value = float(kind(text))
        if not math.isfinite(value) or value < 0 or (value == 0 and name not in FREE):
            least = "of at least 0" if name in FREE else "above 0"
            raise argparse.ArgumentTypeError(f"expected a finite number {least}, found {text}")
        if name == "fraction" and value > 1:
            raise argparse.ArgumentTypeError(f"expected a part of the peak, at most 1, found {text}")
        return kind(text)

    read.__name__ = kind.__name__  # which argparse names where this is no number at all
    return read


def main() -> None:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="all built-in ones but folder by default")
    parser.add_argument("--check", action="store_true", help="the model against what is published and measured")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    for assumed in fields(Machine):
        if assumed.name != "name":
            kind = _amount(assumed.name, type(assumed.default))
            parser.add_argument(f"--{assumed.name}", type=kind, default=assumed.default, help="%(default)g assumed")
    args = parser.parse_args()
    if args.train:
        return train(*json.loads(args.train))
    if args.check:
        return check()
    machine = Machine(**{f.name: getattr(args, f.name) for f in fields(Machine) if f.name != "name"})
    try:
        return tables(args.recipes or [name for name in built_in() if name not in OPEN], machine)
    except ReparamError as e:
        parser.exit(2, f"error: {e}\n")


if __name__ == "__main__":
    main()
