"""How often `reparam identify` names what small networks were trained to predict, and whether it is ever wrong.

    python benchmarks/identify.py [--trainings 200] [--first 0] [--steps 500] [--out table.json]

Each seed draws a data set (a mixture of Gaussians of 2 to 12 dimensions, or digits), a target, a sign, a schedule,
a time convention, an input scaling and a training; the network is then identified on held-out data, with nothing told
of it. One in five networks is left untrained, and must come out undecided. Wrong is a verdict that is neither what was
trained nor another name of the same function.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import reparam as rp
from reparam.data.arrays import load_digits
from reparam.tools.identify import Identified

#: What each time convention is divided by before the network takes its sines and cosines.
SPANS = {"t": 1.0, "1-t": 1.0, "1000t": 1000.0, "step": 1000.0, "log_snr": 5.0, "log_sigma/4": 1.0}
TABLES = ("linear", "scaled_linear", "squared_cosine")


class Small(nn.Module):
    """A multilayer perceptron on x and a few waves of the time."""

    def __init__(self, dim: int, span: float, hidden: int = 128) -> None:
        super().__init__()
        self.span = span
        self.register_buffer("waves", torch.arange(1.0, 5.0))
        widths = [dim + 9, hidden, hidden, hidden]
        layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.SiLU())]
        self.stack = nn.Sequential(*layers, nn.Linear(hidden, dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Shape [B, dim], for x of that shape and time of shape [B]."""
        u = time.to(x.dtype)[:, None] / self.span
        waves = u * self.waves
        return self.stack(torch.cat([x, u, waves.sin(), waves.cos()], 1))


class Opposite(nn.Module):
    """The negative of a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """As the network's."""
        return -self.net(x, time)


class Case(NamedTuple):
    """A training, drawn by its seed."""

    data: str
    target: dict[str, Any]
    sign: int
    schedule: dict[str, Any]
    time: str
    input: str
    trained: bool
    seed: int


def mixture(dim: int, seed: int, n: int = 20_000) -> tuple[Tensor, Tensor]:
    """Training and held-out samples of six Gaussians apart from one another, of standard deviation 1 over all."""
    g = torch.Generator().manual_seed(seed)
    means, spreads = torch.randn(6, dim, generator=g), 0.03 + 0.07 * torch.rand(6, generator=g)
    which = torch.randint(6, (n + 1024,), generator=g)
    x = means[which] + spreads[which, None] * torch.randn(len(which), dim, generator=g)
    x = (x - x.mean()) / x.std()
    return x[:n], x[n:]


def digits() -> tuple[Tensor, Tensor]:
    """Training and held-out digits, in [-1, 1]."""
    x = load_digits()[0].float() / 8 - 1
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return x[:1400], x[1400:]


def samples(case: Case) -> tuple[Tensor, Tensor]:
    """Training and held-out data of a case."""
    return digits() if case.data == "digits" else mixture(int(case.data), case.seed)


def drawn(seed: int) -> Case:
    """The case of a seed: conventions that are in use."""
    r = random.Random(seed)
    data = r.choice(["2", "4", "8", "8", "12", "digits"])
    ddpm = {"name": "ddpm", "betas": r.choice(TABLES), "zero_terminal_snr": r.random() < 0.3}
    kind = r.choice(["x0", "eps", "v", "velocity", "edm"])
    spread = {"name": "edm", "sigma_data": 0.5}
    schedule: dict[str, Any] = r.choice([{"name": "rectified_flow"}, {"name": "cosine"}, ddpm])
    times = ["t", "1-t", "1000t", "log_snr"] + (["step", "step"] if schedule is ddpm else [])
    conventions = (r.choice(times), "none")
    if kind == "v" and schedule["name"] == "rectified_flow":
        schedule = {"name": "cosine"}
    if kind == "velocity":
        schedule = {"name": "rectified_flow"} if r.random() < 0.7 else {"name": "cosine"}
        conventions = (r.choice(["t", "1-t", "1000t"]), "none")
    if kind == "edm":
        schedule = {"name": "ve"} if r.random() < 0.6 else {"name": "rectified_flow"}
        conventions = ("log_sigma/4", "edm")
    target = spread if kind == "edm" else {"name": kind}
    return Case(data, target, r.choice([1, 1, -1]), schedule, *conventions, trained=r.random() < 0.8, seed=seed)


def trained(case: Case, x: Tensor, steps: int) -> nn.Module:
    """The network of a case."""
    torch.manual_seed(case.seed)
    net = Small(x.shape[1], SPANS[case.time])
    if not case.trained:
        return net
    low, high = 0.005, 0.98 if case.target["name"] == "eps" else 0.995
    objective = rp.Objective(case.schedule, case.target, time=case.time, input=case.input, t_range=(low, high))
    asked = net if case.sign > 0 else Opposite(net)
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        loss = objective(asked, x[torch.randint(len(x), (256,))]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        slower.step()
    return net


def outcome(case: Case, found: Identified) -> str:
    """ "named", "undecided" or "wrong"."""
    if found.verdict == "undecided":
        return "undecided"
    names = {name.partition("(")[0] for name in (found.verdict, *found.equivalent)}
    true = ("-" if case.sign < 0 else "") + case.target["name"]
    return "named" if case.trained and true in names else "wrong"


def run(seed: int, steps: int) -> dict[str, Any]:
    """One training, identified: a row of the table."""
    case = drawn(seed)
    x, heldout = samples(case)
    start = time.perf_counter()
    net = trained(case, x, steps)
    middle = time.perf_counter()
    found = rp.identify(net, heldout)
    return {
        **case._asdict(),
        "outcome": outcome(case, found),
        "verdict": found.verdict,
        "best": found.scores[0]["target"],
        "margin": found.margin,
        "error": found.error,
        "schedules": found.schedules,
        "times": found.times,
        "schedule_told": rp.schedule(case.schedule) == rp.schedule(found.schedule),
        "schedule_among": among(case, found),
        "time_among": case.time in found.times,
        "symptoms": found.symptoms,
        "training_s": middle - start,
        "identify_s": time.perf_counter() - middle,
    }


def among(case: Case, found: Identified) -> bool:
    """Whether the true schedule is among those reported."""
    from reparam.tools.identify import _named

    return _named(rp.schedule(case.schedule)) in found.schedules


def line(row: dict[str, Any]) -> str:
    """A row for a reader."""
    true = ("-" if row["sign"] < 0 else "") + row["target"]["name"] if row["trained"] else "untrained"
    made = f"{row['schedule']['name']}, {row['time']}"
    return (
        f"{row['seed']:>4}  {row['data']:<7}{true:<10} {made:<24} {row['outcome']:<10} best {row['best']:<18} "
        f"margin {row['margin']:<7.3g} error {row['error']:.3g}"
    )


def summary(rows: list[dict[str, Any]]) -> str:
    """The figures of all rows."""
    learned, blank = ([r for r in rows if r["trained"] is was] for was in (True, False))
    named = [r for r in learned if r["outcome"] == "named"]
    counts = Counter(r["outcome"] for r in learned)
    return (
        f"{len(learned)} trained: {counts['named']} named, {counts['undecided']} undecided, {counts['wrong']} wrong; "
        f"{len(blank)} untrained: {sum(r['outcome'] == 'undecided' for r in blank)} undecided, "
        f"{sum(r['outcome'] == 'wrong' for r in blank)} wrong. Of those named, the true schedule is among those "
        f"reported in {sum(r['schedule_among'] for r in named)}, the true time in {sum(r['time_among'] for r in named)}"
        f"; least margin {min((r['margin'] for r in named), default=float('nan')):.3g}."
    )


def main() -> None:
    """Run the trainings and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainings", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, help="write all rows to this .json file")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rows = []
    for seed in range(args.first, args.first + args.trainings):
        rows.append(run(seed, args.steps))
        print(line(rows[-1]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1))
    print(summary(rows))


if __name__ == "__main__":
    main()
