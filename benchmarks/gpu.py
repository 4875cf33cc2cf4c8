"""What only a GPU can show, in parts of a few minutes that continue where they were stopped.

    python benchmarks/gpu.py throughput --out figures
    python benchmarks/gpu.py train --out figures --state state --data train.parquet [--steps 35000]
    python benchmarks/gpu.py sample --out figures --state state
    python benchmarks/gpu.py kernels --out figures
    python benchmarks/gpu.py table figures              # the figures as the Markdown of docs/benchmarks.md

throughput: training of the recipes cifar10-unet-small, -medium and -large against the loop of diffusers' example of
unconditional generation (benchmarks/training.py), and JiT-B/16 at 256 pixels as a share of what a bf16 matrix product
reaches on the same card in the same minute. Goals: 3 times as fast for small; 40 %.
train: cifar10-unet-small for eps, v and x0, equally long, scored by EfficientNet-Lite0's features.
sample: 50,000 samples of U-Net small by DDIM in 50 steps, drawn as `reparam sample --precision … --compile` draws them,
from noise made on the host to bytes there, beside the network's evaluations alone; and whether a step of any sampler
makes the host wait for the device. Goals: 60 s; none.
kernels: precision, memory layout, torch.compile and the optimiser, one by one.

A call ends after --budget-s, with exit code 75 where something is left; the same command continues. Figures are kept as
they are found, in --out (a few kB). --state holds what continuing a training needs, written every minute: 145 MB for
the run in progress and about 60 MB for each finished one. It has to lie on a disk that outlasts the call; on a machine
lent for less than all of it takes, give fewer --steps, the same for all three. --tiny does everything on small
networks in minutes, on a CPU too: a rehearsal, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import reparam as rp
from reparam.data import Data
from reparam.denoiser import Denoiser, Estimate, evaluating
from reparam.errors import ReparamError
from reparam.files import write_text
from reparam.networks.unet import LAYOUTS, SIZES
from reparam.samplers import SAMPLERS, THRESHOLDS, Sampler, sample
from reparam.studies.drawing import Drawing, in_precision, tf32
from reparam.studies.recipe import RunConfig, load_recipe
from reparam.studies.run import data_of, execute, make_network, trainer_of
from reparam.studies.scale import stand_in, work_of
from reparam.training import Engine, Trainer
from training import SIDE, STEPS, Step, example, interval, pictures, ratios, take

UNFINISHED = 75
#: Published FIDs of U-Net small (docs/benchmarks.md): another metric, so that only order and ratios compare.
PUBLISHED = {"eps": 18.58, "v": 21.70, "x0": 25.25}
#: What a rehearsal sets otherwise in the recipes.
TINY = ["network={name: unet, widths: [32, 32]}", "train.batch=4", "sample.steps=4", "sample.n=32"]
TINY_DATA = ["data.limit=400", "data.size=8", "data.resize=crop", "train.validations=1"]
TINY_JIT = ["network={name: jit, patch: 16, width: 64, depth: 2, heads: 4, bottleneck: 16}", "train.batch=2"]
#: Ways to sample: what the network computes in, and whether it is compiled.
PRECISIONS = {
    "float32": ("float32", False),
    "tf32": ("tf32", False),
    "bf16": ("bf16", False),
    "bf16, compiled": ("bf16", True),
}


class OutOfTimeError(Exception):
    """This call's time is up; the next one continues."""


class Figures:
    """What a part has found so far, in a file of its own."""

    def __init__(self, folder: Path, part: str, device: torch.device) -> None:
        self.path = folder / f"{part}.json"
        self.found: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        cuda = device.type == "cuda"
        self._where = {
            "hardware": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU",
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }

    def done(self, name: str) -> bool:
        """Whether a figure is there in full."""
        return self.found.get(name, {}).get("done", False)

    def add(self, name: str, values: dict[str, Any], done: bool = True) -> None:
        """Keep a figure, with where and when it was taken."""
        self.found[name] = {**values, **self._where, "done": done}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.found, indent=1) + "\n")
        if done:
            print(f"{name}: {values}", flush=True)


@dataclass(frozen=True)
class Call:
    """What this call was asked for, and until when it may take."""

    out: Path
    state: Path
    device: torch.device
    deadline: float
    tiny: bool
    data: str | None
    steps: int
    samples: int
    chunk: int

    def need(self, seconds: float) -> None:
        """Ends the call where less than that is left; a rehearsal needs less."""
        if time.monotonic() + (1 if self.tiny else seconds) > self.deadline:
            raise OutOfTimeError

    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def recipe(self, name: str, *settings: str) -> RunConfig:
        """The first run of a recipe, with settings; in a rehearsal a small one."""
        small = TINY_JIT if "jit" in name else TINY
        found = load_recipe(name, ["data.path=none", *(small if self.tiny else []), *settings])
        return next(iter(found.runs.values()))

    def trainer(self, config: RunConfig, data: Data, **train: Any) -> Trainer:
        """Its trainer at the first step, with other settings of training, and steps enough for any measurement."""
        config = replace(config, train=replace(config.train, steps=STEPS, validations=1, keep_at=[], **train))
        return trainer_of(config, data, make_network(config, data), Engine(self.device))

    def turns(self, loops: dict[str, Step], seconds: float = 40) -> dict[str, list[tuple[float, float]]]:
        """Seconds that each takes for a block of steps, in turn and in an order that is reversed every time."""
        block, least = (1, 3) if self.tiny else (10, 7)
        for step in loops.values():
            take(step, block + 2, self.wait)  # what is compiled is compiled here
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
        start = time.perf_counter()
        while len(next(iter(taken.values()))) < least or (not self.tiny and time.perf_counter() - start < seconds):
            turn = len(next(iter(taken.values())))
            for name in reversed(loops) if turn % 2 else loops:
                wall, processor = take(loops[name], block, self.wait)
                taken[name].append((wall / block, processor / block))
        return taken


def milliseconds(taken: list[tuple[float, float]]) -> float:
    """The median of a step."""
    return round(1e3 * statistics.median(wall for wall, _ in taken), 4)


# Throughput


def throughput(call: Call, figures: Figures) -> None:
    """Training against diffusers' example; JiT against the card."""
    for size in SIZES:
        if not figures.done(f"unet-{size}"):
            call.need(150)
            figures.add(f"unet-{size}", unet(call, size))
    if not figures.done("jit-b16"):
        call.need(200)
        figures.add("jit-b16", jit(call))


def unet(call: Call, size: str) -> dict[str, Any]:
    """One size."""
    config, data = call.recipe(f"cifar10-unet-{size}"), pictures()
    widths = (32, 32) if call.tiny else SIZES[size]
    eager = call.trainer(config, data, compile=False)
    loops: dict[str, Step] = {
        "example": example(unet2d(widths), data, config.train.batch, call.device.type, use_ema=False),
        "example, EMA": example(unet2d(widths), data, config.train.batch, call.device.type, use_ema=True),
        "ours": eager.run().__next__,
    }
    if call.device.type == "cuda" or not call.tiny:
        loops["ours, compiled"] = call.trainer(config, data, compile=True).run().__next__
    taken = call.turns(loops)
    against = {
        ours: [round(v, 3) for v in interval(ratios(taken, "example", ours))] for ours in loops if "ours" in ours
    }
    return {
        "batch": config.train.batch,
        "precision": f"example float32, ours {'bf16' if eager.bf16 else 'float32'}",
        "ms_a_step": {name: milliseconds(found) for name, found in taken.items()},
        "times_as_fast": against,
    }


def unet2d(widths: tuple[int, ...]) -> Any:
    """diffusers' own model of the shape of ours."""
    from diffusers import UNet2DModel

    down = ["AttnDownBlock2D" if i == 1 else "DownBlock2D" for i in range(len(widths))]
    up = ["AttnUpBlock2D" if i == 1 else "UpBlock2D" for i in reversed(range(len(widths)))]
    groups = {} if min(widths) >= 64 else {"norm_num_groups": 16}
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=widths,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        **groups,
        **LAYOUTS["ddpm-cifar10"],
    )


def jit(call: Call) -> dict[str, Any]:
    """JiT-B/16 at 256 pixels, a GPU's share of a batch over eight."""
    config, data = call.recipe("imagenet256-jit-b16"), big_pictures(call)
    batch = config.train.batch if call.tiny else config.train.batch // 8
    config = replace(config, train=replace(config.train, batch=batch))
    flops = work_of(config, stand_in(data.shape, len(data.classes))).flops * batch
    before = matmul_rate(call)
    loops: dict[str, Step] = {"ours": call.trainer(config, data, compile=False).run().__next__}
    if call.device.type == "cuda" or not call.tiny:
        loops["ours, compiled"] = call.trainer(config, data, compile=True).run().__next__
    taken = call.turns(loops)
    peak = max(before, matmul_rate(call))
    ms = {name: milliseconds(found) for name, found in taken.items()}
    return {
        "batch": batch,
        "precision": "bf16",
        "ms_a_step": ms,
        "FLOP_a_step": flops,
        "matmul_TFLOP/s": round(peak / 1e12, 2),
        "share_of_matmul": {name: round(flops / (1e-3 * each) / peak, 4) for name, each in ms.items()},
    }


def big_pictures(call: Call) -> Data:
    """Random bytes with labels, at 256 pixels; a rehearsal's at 32."""
    side, count = (32, 64) if call.tiny else (256, 2048)
    x = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y, like = torch.arange(count) % 1000, stand_in((3, side, side), 1000)
    half = count // 2
    return replace(like, train=x[:half], heldout=x[half:], labels=y[:half], heldout_labels=y[half:], flip=True)


def matmul_rate(call: Call) -> float:
    """Operations a second of a large bf16 product of random numbers."""
    n = 256 if call.tiny else 8192
    a, b = (torch.randn(n, n, device=call.device, dtype=torch.bfloat16) for _ in range(2))

    def product() -> Tensor:
        return a @ b

    take(product, 3, call.wait)
    return 2 * n**3 / statistics.median(take(product, 10, call.wait)[0] / 10 for _ in range(5))


# Training to the end


def train(call: Call, figures: Figures) -> None:
    """The three targets, one after the other; each goes on where it was stopped."""
    if call.data is None:
        sys.exit("error: train needs --data, pictures such as train.parquet of CIFAR-10.")
    steps = 4 if call.tiny else call.steps
    for target in PUBLISHED:
        if figures.done(target):
            continue
        call.need(20)
        asked = [f"data.path={call.data}", f"target={target}", f"train.steps={steps}", "metrics=[frechet_distance]"]
        config = call.recipe("cifar10-unet-small", *asked, *(TINY_DATA if call.tiny else []))
        began = time.perf_counter()
        row = execute(
            target, config, call.state / target, device=str(call.device), stop=call.over, save_every=60, progress=told
        )
        if row is None:
            print(f"{target}: stopped after {time.perf_counter() - began:.0f} s", flush=True)
            raise OutOfTimeError
        figures.add(target, trained(row, config, data_of(config)))


def told(step: int) -> None:
    """Where it is, every thousand steps or so."""
    if step % 1000 == 0:
        print(f"  step {step}", flush=True)


def trained(row: dict[str, Any], config: RunConfig, data: Data) -> dict[str, Any]:
    """What is told of a finished run."""
    distance = row["metrics"]["frechet_distance"]
    return {
        "status": row["status"],
        "steps": row["steps"],
        "batch": config.train.batch,
        "precision": config.train.precision,
        "frechet_distance": distance["value"],
        "floor": distance["floor"],
        "samples": min(config.sample.n, len(data.heldout)),
        "training_and_scoring_s": row["wall_s"],
    }


# Sampling


def sampling(call: Call, figures: Figures) -> None:
    """The time of 50,000 samples in every precision, then who waits for whom."""
    config, data = call.recipe("cifar10-unet-small"), pictures()
    denoiser, of = model(call, config, data)
    for name in PRECISIONS:
        if name in ("tf32", "bf16, compiled") and call.device.type != "cuda":
            continue
        drawn(call, figures, name, denoiser, config, of)
    if not figures.done("synchronisation"):
        call.need(30)
        figures.add("synchronisation", {"batch": 4, "precision": "float32", "waits": waits(call)})


def model(call: Call, config: RunConfig, data: Data) -> tuple[Denoiser, str]:
    """The trained network where the part ``train`` has left one; else a fresh one, which takes as long."""
    weights = call.state / "eps" / "model.safetensors"
    if weights.exists():
        return rp.load(weights).to(call.device), f"{weights.parent.name}, trained"
    made = config.objective().denoiser(make_network(config, data)).to(call.device)
    made.data = data.record()
    return made, "fresh weights"


def drawn(call: Call, figures: Figures, name: str, denoiser: Denoiser, config: RunConfig, of: str) -> None:
    """All samples in one precision, a chunk at a time; what is done is kept after each."""
    total, chunk = (16, 8) if call.tiny else (call.samples, call.chunk)
    if figures.done(name):
        return
    found = figures.found.get(name, {"drawn": 0, "seconds": 0.0, "network_s": 0.0})
    asked = in_precision(denoiser, *PRECISIONS[name])
    chosen = config.sample
    draw = Drawing(asked, chosen.method(), chosen.times(asked), chosen.seed, None, None, asked.data or {})
    both(call, draw, 0, chunk)  # compiling and choosing kernels is not part of it
    while found["drawn"] < total:
        call.need(60)
        whole, network = both(call, draw, found["drawn"], chunk)
        found = {
            "batch": chunk,
            "precision": name,
            "steps": chosen.steps,
            "weights": of,
            "drawn": found["drawn"] + chunk,
            "seconds": found["seconds"] + whole,
            "network_s": found["network_s"] + network,
        }
        figures.add(name, found, done=False)
    figures.add(name, {**found, "per_50000_s": round(50_000 / found["drawn"] * found["seconds"], 2)})


def both(call: Call, draw: Drawing, start: int, n: int) -> tuple[float, float]:
    """Seconds of n samples from noise to bytes on the host, and of the network's evaluations alone."""
    noise = torch.randn(n, *draw.shape, device=call.device)
    at = torch.full((n,), 500.0, device=call.device)

    def ask() -> None:
        with tf32(False), evaluating(draw.denoiser):
            for _ in range(len(draw.times) - 1):
                draw.denoiser.net(noise, at)

    return take(lambda: draw(start, start + n), 1, call.wait)[0], take(ask, 1, call.wait)[0]


class HostWaitedError(Exception):
    """On a CPU: an operation that would have made the host wait for a GPU."""


class Waits(TorchDispatchMode):
    """Stands in for CUDA's own check in a rehearsal: a tensor's value asked for, or a shape that depends on it.

    Only of float32 tensors, as the state is: coefficients are float64 and live on the host, and so do checks of them.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asks = func.__name__.startswith(("_local_scalar_dense", "nonzero", "masked_select", "_unique"))
        if asks and any(isinstance(a, Tensor) and a.dtype == torch.float32 for a in args):
            raise HostWaitedError(func.__name__)
        return func(*args, **(kwargs or {}))


class Watched(Sampler):
    """A sampler whose steps are refused where they make the host wait."""

    def __init__(self, inner: Sampler, cuda: bool) -> None:
        self.inner, self.cuda = inner, cuda
        self.needs_smooth = inner.needs_smooth  # type: ignore[misc]

    @property
    def stochastic(self) -> bool:
        return self.inner.stochastic

    def check(self, path: Any, schedule: Any) -> None:
        self.inner.check(path, schedule)

    def asked(self, path: Any, schedule: Any, on_steps: bool) -> list[float]:
        return self.inner.asked(path, schedule, on_steps)

    def step(self, x: Tensor, at: Any) -> tuple[Tensor, Estimate]:
        if not self.cuda:
            with Waits():
                return self.inner.step(x, at)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return self.inner.step(x, at)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def waits(call: Call) -> dict[str, str]:
    """By sampler, and by way to threshold: "no", or the operation that made the host wait."""
    cases = {name: ("none", SAMPLERS[name]()) for name in SAMPLERS}
    cases |= {f"ddim, {threshold}": (threshold, SAMPLERS["ddim"]()) for threshold in THRESHOLDS if threshold != "none"}
    cases |= {"ddim, eta 1": ("none", SAMPLERS["ddim"](eta=1.0)), "edm, churn": ("none", churning())}
    return {name: waited(call, threshold, method) for name, (threshold, method) in cases.items()}


def churning() -> Sampler:
    """EDM's sampler with fresh noise in every step but the first."""
    return SAMPLERS["edm"](churn=10.0, s_max=50.0)


def waited(call: Call, threshold: str, method: Sampler) -> str:
    """Whether any of six steps did."""
    torch.manual_seed(0)
    net = make_network(call.recipe("cifar10-unet-small"), stand_in((3, SIDE, SIDE))).to(call.device)
    schedule = "rectified_flow" if method.needs_smooth else "ddpm"
    denoiser = THRESHOLDS[threshold](Denoiser(net, schedule, "v", time="1000t"))
    noise = torch.randn(4, 3, SIDE, SIDE, device=call.device)
    try:
        sample(denoiser, noise, sampler=Watched(method, call.device.type == "cuda"), steps=6)
    except (HostWaitedError, RuntimeError) as e:  # a RuntimeError is CUDA's word for it
        return f"yes: {str(e).splitlines()[0]}"
    return "no"


# What the trainer is made of


def kernels(call: Call, figures: Figures) -> None:
    """U-Net small and JiT with one thing changed at a time; then the optimiser."""
    if not figures.done("unet-small"):
        call.need(200)
        config = call.recipe("cifar10-unet-small")
        ways: dict[str, dict[str, Any]] = {
            "float32": {"precision": "float32", "channels_last": False},
            "float32, channels_last": {"precision": "float32", "channels_last": True},
            "bf16": {"precision": "bf16", "channels_last": False},
            "bf16, channels_last": {"precision": "bf16", "channels_last": True},
            "bf16, channels_last, compiled": {"precision": "bf16", "channels_last": True, "compile": True},
        }
        figures.add("unet-small", variants(call, config, pictures(), ways))
    if not figures.done("jit-b16"):
        call.need(200)
        config = call.recipe("imagenet256-jit-b16")
        config = replace(config, train=replace(config.train, batch=2 if call.tiny else 64))
        ways = {
            "float32": {"precision": "float32"},
            "bf16": {"precision": "bf16"},
            "bf16, compiled": {"precision": "bf16", "compile": True},
        }
        figures.add("jit-b16", variants(call, config, big_pictures(call), ways))
    if not figures.done("optimiser"):
        call.need(90)
        figures.add("optimiser", optimiser(call))


def variants(call: Call, config: RunConfig, data: Data, ways: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A step of the trainer in every way."""
    skipped = call.tiny and call.device.type != "cuda"
    chosen = {name: way for name, way in ways.items() if not (way.get("compile") and skipped)}
    loops: dict[str, Step] = {
        name: call.trainer(config, data, **{"compile": False, **way}).run().__next__ for name, way in chosen.items()
    }
    taken = call.turns(loops, 60)
    ms = {name: milliseconds(found) for name, found in taken.items()}
    return {"batch": config.train.batch, "precision": "as named", "ms_a_step": ms}


def optimiser(call: Call) -> dict[str, Any]:
    """AdamW three ways on the parameters of U-Net small; beside it clipping and the average."""
    trainer = call.trainer(call.recipe("cifar10-unet-small"), pictures(), compile=False)
    trainer.update()
    parameters = [nn.Parameter(p.detach().clone()) for p in trainer.trainee.parameters()]
    for p in parameters:
        p.grad = torch.randn_like(p)
    ways = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for each alone": {"foreach": False}}
    loops: dict[str, Step] = {f"AdamW, {k}": torch.optim.AdamW(parameters, **way).step for k, way in ways.items()}
    loops["norm and clipping"] = lambda: nn.utils.clip_grad_norm_(parameters, 1.0)
    following = itertools.count(trainer.step + 1)
    loops["average"] = lambda: trainer.averages.update(next(following))
    taken = call.turns(loops, 10)
    return {"batch": 0, "precision": "float32", "ms_a_step": {name: milliseconds(t) for name, t in taken.items()}}


# The table


def table(folder: Path) -> None:
    """All figures found, as Markdown."""
    for part, show in SHOWN.items():
        path = folder / f"{part}.json"
        if not path.exists():
            print(f"`{part}`: not measured yet\n")
            continue
        found = {name: f for name, f in json.loads(path.read_text()).items() if f["done"]}
        places = sorted({f"{f['hardware']}, torch {f['torch']}, {f['date']}" for f in found.values()})
        print(f"`python benchmarks/gpu.py {part}`: {'; '.join(places) or 'nothing finished yet'}\n")
        print("\n".join(show(found)) + "\n")


def throughput_lines(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each way of each network."""
    yield "| network | batch | precision | what | ms a step | times as fast as the example, or share of the product |"
    yield "|---|---|---|---|---|---|"
    for name, f in found.items():
        for what, ms in f["ms_a_step"].items():
            beside = "–"
            if what in f.get("times_as_fast", {}):
                middle, low, high = f["times_as_fast"][what]
                beside = f"{middle:.2f} ({low:.2f}–{high:.2f})"
            if what in f.get("share_of_matmul", {}):
                beside = f"{f['share_of_matmul'][what]:.1%} of {f['matmul_TFLOP/s']:.4g} TFLOP/s"
            yield f"| {name} | {f['batch']} | {f['precision']} | {what} | {ms:.4g} | {beside} |"


def train_lines(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Distances and their ratios to the first, beside the published ones."""
    values = {name: f["frechet_distance"] for name, f in found.items()}
    yield "| target | steps | batch | seconds | Fréchet distance (floor) | over eps | published FID |"
    yield "|---|---|---|---|---|---|---|"
    for name, f in found.items():
        value, first = values[name], values.get("eps")
        mine = "diverged" if value is None else f"{value:.4g} ({f['floor']:.3g})"
        ratio = "–" if not value or not first else f"{value / first:.3f}"
        published = f"{PUBLISHED[name]:.2f} ({PUBLISHED[name] / PUBLISHED['eps']:.3f} over eps)"
        took = f"{f['training_and_scoring_s']:,.0f}"
        yield f"| {name} | {f['steps']:,} | {f['batch']} | {took} | {mine} | {ratio} | {published} |"
    if len(values) == len(PUBLISHED) and None not in values.values():
        order = sorted(values, key=lambda name: values[name])
        same = "as" if order == sorted(PUBLISHED, key=lambda name: PUBLISHED[name]) else "not as"
        yield f"\nOrder, best first: {', '.join(order)}, {same} published."
        yield "Ours is by EfficientNet-Lite0's features, not FID, on the pictures given: only order and ratios compare."


def sample_lines(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Seconds in every precision; then who waits."""
    yield "| precision | samples × steps | batch | seconds | network alone | for 50,000 |"
    yield "|---|---|---|---|---|---|"
    for name, f in found.items():
        if name in PRECISIONS:
            n = f"{f['drawn']:,} × {f['steps']}"
            per = f"{f['per_50000_s']:.4g}"
            yield f"| {name} | {n} | {f['batch']} | {f['seconds']:.4g} | {f['network_s']:.4g} | {per} |"
    if "synchronisation" in found:
        told = found["synchronisation"]["waits"]
        yield "\nSteps that make the host wait: " + "; ".join(f"{name}: {said}" for name, said in told.items()) + "."


def kernel_lines(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each way."""
    yield "| what | batch | how | ms a step |\n|---|---|---|---|"
    for name, f in found.items():
        for how, ms in f["ms_a_step"].items():
            yield f"| {name} | {f['batch'] or '–'} | {how} | {ms:.4g} |"


PARTS: dict[str, Callable[[Call, Figures], None]] = {
    "throughput": throughput,
    "train": train,
    "sample": sampling,
    "kernels": kernels,
}
SHOWN = {"throughput": throughput_lines, "train": train_lines, "sample": sample_lines, "kernels": kernel_lines}


def main() -> None:
    """One part, or the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*PARTS, "table"))
    parser.add_argument("figures", nargs="?", type=Path, help="table: the folder of figures")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="where figures go (%(default)s)")
    parser.add_argument("--state", type=Path, default=Path("state"), help="where trainings are kept (%(default)s)")
    parser.add_argument("--budget-s", type=float, default=500, help="seconds of this call (%(default)g)")
    parser.add_argument("--data", help="train: pictures, such as CIFAR-10's train.parquet")
    parser.add_argument("--steps", type=int, default=35_000, help="train: of each target (%(default)s)")
    parser.add_argument("--samples", type=int, default=50_000, help="sample: in every precision (%(default)s)")
    parser.add_argument("--chunk", type=int, default=1000, help="sample: at a time (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on small networks")
    args = parser.parse_args()
    if args.part == "table":
        return table(args.figures or args.out)
    device = torch.device(args.device)
    if device.type != "cuda" and not args.tiny:
        sys.exit("error: there is no GPU here; --tiny rehearses on the CPU.")
    call = Call(
        out=args.out,
        state=args.state,
        device=device,
        deadline=time.monotonic() + args.budget_s,
        tiny=args.tiny,
        data=args.data,
        steps=args.steps,
        samples=args.samples,
        chunk=args.chunk,
    )
    try:
        PARTS[args.part](call, Figures(args.out, args.part, device))
    except OutOfTimeError:
        print("the time of this call is up; the same command continues", flush=True)
        sys.exit(UNFINISHED)
    except ReparamError as e:
        sys.exit(f"error: {e}")
    return print(f"finished; python benchmarks/gpu.py table {args.out}")


if __name__ == "__main__":
    main()
