"""The trainer against loops written by hand, side by side in one process.

    python benchmarks/training.py overhead [--patch 16] [--batch 128] [--threads 2] [--precision auto]
    python benchmarks/training.py unet [--device cuda] [--batch 128] [--compile]

overhead: JiT, 192 wide, 6 deep, on pictures of 32×32. Bare: the same network in the same precision, x_t, target,
mean squared error, backward and fused AdamW written down, with data and noise drawn as anyone would. Beside it the
bare loop with clipping of the gradient and an average of the weights, which the trainer does too.

unet: U-Net small, noise as the target on DDPM's linear table. diffusers: the loop of its example of unconditional
generation at that example's defaults (Accelerate without mixed precision, plain AdamW, clipping, a DataLoader in the
same process), and once with its --use_ema. Ours: the trainer at its own defaults for the device. Pictures are in
memory on both sides, so that the example is spared decoding and resizing. Both begin at equal weights.

The loops take turns in blocks of steps, in an order that is reversed every time. A ratio of seconds is taken within
each turn; its median is printed with a 95 % interval, and the measurement ends when all intervals are within --within
of their medians, or after --seconds. "processor" is the same of processor time (CPU only).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from reparam.data import PICTURE_MEAN, PICTURE_STD, Data
from reparam.networks import JiT, UNet
from reparam.networks.unet import LAYOUTS, SIZES
from reparam.objective import Objective
from reparam.training import Engine, TrainConfig, Trainer, Validation

#: One step of training.
Step = Callable[[], object]
#: Turns that are measured at least.
LEAST = 11
#: More than any measurement takes.
STEPS = 100_000
SIDE = 32


def pictures() -> Data:
    """Random bytes: how long a step takes does not depend on them."""
    x = torch.randint(0, 256, (10_240, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Data(name="bytes", train=x[:10_000], heldout=x[10_000:], mean=PICTURE_MEAN, std=PICTURE_STD, flip=True)


def trainer_of(net: nn.Module, objective: Objective, data: Data, config: TrainConfig, device: str) -> Trainer:
    """Ours, at its first step."""
    validation = Validation.draw(data, (0.0, 1.0), each=8)
    return Trainer(net, objective, data, config, validation=validation, engine=Engine(device))


# Trainer overhead


def bare(net: nn.Module, data: Data, batch: int, device: str, bf16: bool, config: TrainConfig, more: bool) -> Step:
    """A step of the loop that anyone would write for the velocity; ``more``: with clipping and an average."""
    x, net = data.train.to(device), net.to(device)
    parameters = list(net.parameters())
    averaged = [p.detach().clone() for p in parameters]
    optimiser = torch.optim.AdamW(
        parameters, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, fused=True
    )

    def step() -> Tensor:
        x0 = x[torch.randint(len(x), (batch,), device=device)].float() / 127.5 - 1
        x0 = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, x0.flip(-1), x0)
        t = torch.rand(batch, device=device)
        eps = torch.randn_like(x0)
        s = t[:, None, None, None]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            out = net((1 - s) * x0 + s * eps, 1 - t)
        loss = F.mse_loss(out.float(), eps - x0)
        loss.backward()
        if more:
            nn.utils.clip_grad_norm_(parameters, config.clip)
        optimiser.step()
        optimiser.zero_grad()
        if more:
            torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - config.ema)
        return loss.detach()

    return step


def overhead(args: argparse.Namespace) -> None:
    """The trainer against the bare loop."""
    data, batch = pictures(), args.batch or 128
    config = TrainConfig(steps=STEPS, batch=batch, decay="constant", warmup=0, validations=1, precision=args.precision)
    nets = [JiT(SIDE, args.patch, 3, width=192, depth=6, heads=6, bottleneck=96) for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    trainer = trainer_of(nets[0], Objective("rectified_flow", "velocity", time="1-t"), data, config, args.device)
    loops: dict[str, Step] = {
        "bare": bare(nets[1], data, batch, args.device, trainer.bf16, config, more=False),
        "bare + clip + average": bare(nets[2], data, batch, args.device, trainer.bf16, config, more=True),
        "Trainer": trainer.run().__next__,
    }
    precision = "bf16 autocast" if trainer.bf16 else "float32"
    print(f"JiT patch {args.patch}, width 192, depth 6, {SIDE}×{SIDE}, batch {batch}, {precision} on all sides")
    bare_, more, ours = loops
    report(loops, [(more, bare_), (ours, more), (ours, bare_)], args)


# U-Net against diffusers' example


class Transformed(Dataset[Tensor]):
    """Pictures one by one as that example's transforms leave them: mirrored half of the time, in [-1, 1]."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        x = self.x[index]
        x = x.flip(-1) if torch.rand(1) < 0.5 else x
        return x.float().div(255).sub(0.5).div(0.5)


def endless(loader: Any) -> Iterator[Tensor]:
    """Epoch after epoch."""
    while True:
        yield from loader


def unet2d() -> Any:
    """diffusers' own model of the shape of ours."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=SIZES["small"],
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        **LAYOUTS["ddpm-cifar10"],
    )


def example(model: nn.Module, data: Data, batch: int, device: str, use_ema: bool) -> Step:
    """A step of the example's loop, its log of the loss at every step included."""
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(mixed_precision="no", cpu=device == "cpu")
    table = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    loader = DataLoader(Transformed(data.train), batch_size=batch, shuffle=True, drop_last=True)
    rates = get_scheduler("cosine", optimizer=optimiser, num_warmup_steps=500, num_training_steps=STEPS)
    model, optimiser, loader, rates = accelerator.prepare(model, optimiser, loader, rates)
    model.train()
    average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    batches = endless(loader)

    def step() -> float:
        clean = next(batches)
        noise = torch.randn(clean.shape, device=clean.device)
        k = torch.randint(0, 1000, (len(clean),), device=clean.device)
        with accelerator.accumulate(model):
            loss = F.mse_loss(model(table.add_noise(clean, noise, k), k).sample, noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            rates.step()
            optimiser.zero_grad()
        if use_ema:
            average.step(model.parameters())
        return loss.detach().item()

    return step


def unet(args: argparse.Namespace) -> None:
    """The trainer against diffusers' example."""
    data, batch = pictures(), args.batch or (128 if args.device.startswith("cuda") else 16)
    models = [unet2d(), unet2d()]
    models[1].load_state_dict(models[0].state_dict())
    loops: dict[str, Step] = {
        "diffusers' example": example(models[0], data, batch, args.device, use_ema=False),
        "diffusers' example --use_ema": example(models[1], data, batch, args.device, use_ema=True),
    }
    for compiled in (False, True) if args.compile else (False,):
        net = UNet(SIDE, size="small")
        net.load_state_dict(models[0].state_dict())
        config = TrainConfig(
            steps=STEPS, batch=batch, lr=1e-4, warmup=500, validations=1, precision=args.precision, compile=compiled
        )
        objective = Objective("ddpm", "eps", time="step")
        trainer = trainer_of(net, objective, data, config, args.device)
        loops["Trainer, train.compile=true" if compiled else "Trainer"] = trainer.run().__next__
    precision = "float32"
    if args.device.startswith("cuda"):
        precision += f", TF32 in convolutions {'on' if torch.backends.cudnn.allow_tf32 else 'off'} as PyTorch has it"
    ours = "bf16 autocast, weights in float32" if trainer.bf16 else "float32"
    print(f"U-Net small, {SIDE}×{SIDE}, batch {batch} on all sides; the example: {precision}; ours: {ours}")
    names = list(loops)
    report(loops, [(theirs, ours) for theirs in names[:2] for ours in names[2:]], args)


# The measurement


def take(step: Step, count: int, synchronise: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of some steps."""
    synchronise()
    start = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    synchronise()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def interval(values: list[float]) -> tuple[float, float, float]:
    """The median, and what it lies between with 95 % confidence (by ranks)."""
    ranked, n = sorted(values), len(values)
    below = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    return statistics.median(values), ranked[below], ranked[n - 1 - below]


def report(loops: dict[str, Step], pairs: list[tuple[str, str]], args: argparse.Namespace) -> None:
    """Let the loops take turns; print what each takes, and the first of every pair over the second."""
    cuda = args.device.startswith("cuda")
    synchronise = torch.cuda.synchronize if cuda else contextlib.nullcontext
    block = args.block or (20 if cuda else 2)
    for step in loops.values():
        take(step, max(3, block), synchronise)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    load, start = os.getloadavg()[0], time.perf_counter()
    for turn in range(STEPS // block):
        for name in reversed(loops) if turn % 2 else loops:
            taken[name].append(take(loops[name], block, synchronise))
        spread = [interval(ratios(taken, *pair)) for pair in pairs]
        narrow = all(max(high / middle, middle / low) - 1 <= args.within for middle, low, high in spread)
        if turn + 1 >= LEAST and (narrow or time.perf_counter() - start > args.seconds):
            break
    print(f"  {turn + 1} turns of {block} steps each; load {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    for name, found in taken.items():
        wall = 1e3 * statistics.median(seconds for seconds, _ in found) / block
        print(f"  {name:30}{wall:10.2f} ms a step")
    for pair in pairs:
        middle, low, high = interval(ratios(taken, *pair))
        more = "" if cuda else f"; processor {statistics.median(ratios(taken, *pair, 1)):.3f}"
        print(f"  {' / '.join(pair)}: {middle:.3f} ({low:.3f} to {high:.3f}){more}")


def ratios(taken: dict[str, list[tuple[float, float]]], name: str, against: str, which: int = 0) -> list[float]:
    """One a turn: what ``name`` took over what ``against`` took, wall (0) or processor (1) time."""
    return [a[which] / b[which] for a, b in zip(taken[name], taken[against], strict=True)]


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("overhead", "unet"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, help="overhead 128; unet 128 on a GPU, 16 (the example's own) on a CPU")
    parser.add_argument("--patch", type=int, default=16, help="of JiT: 16 makes 4 tokens, 4 makes 64")
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto")
    parser.add_argument("--compile", action="store_true", help="unet: the trainer with torch.compile as well")
    parser.add_argument("--threads", type=int, help="of the CPU; all cores unless given")
    parser.add_argument("--block", type=int, help="steps in a turn; 2 on a CPU, 20 on a GPU")
    parser.add_argument("--within", type=float, default=0.005, help="how well a ratio is to be known")
    parser.add_argument("--seconds", type=float, default=180, help="but no longer than this")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    where = f"{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    if args.device.startswith("cuda"):
        where = torch.cuda.get_device_name(args.device)
    print(f"{where}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    {"overhead": overhead, "unet": unet}[args.part](args)


if __name__ == "__main__":
    main()
