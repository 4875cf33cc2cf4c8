"""The figures that the lesson quotes, each with the command that makes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from formulas import rounded
from torch import Tensor

import reparam as rp

COMMAND = "python docs/lesson/data.py"
TARGETS = ("x0", "eps", "v", "velocity")
LOSSES: dict[str, Any] = {"x0": "x0", "eps": "eps", "velocity": "velocity", "hybrid": {"x0": 1, "eps": 0.1}}
#: The first of the levels at which errors are measured.
LOWEST_LEVEL = 0.1
SPIRAL_TARGETS = TARGETS

#: What a reader of the curves has to know.
DIGITS_NOTE = (
    "One seed each; the same scans, noise and times for all. Rectified flow up to t = 0.98, where an error in ε is "
    "49 times as large in x₀: ε's failure begins there. These are plain networks without a skip connection, which "
    "shows what width does and is harder on ε and velocity than a U-Net would be. The error is that of x₀ on held-out "
    "scans over the variance of the data: 1 is one grey for all pixels. It does not rank samples. The Fréchet distance "
    "is the mean over four groups of 449 samples, as many as there are held-out scans. It is to the scans trained on, "
    "so that a model that copies them scores better than new scans do."
)
SAMPLING_NOTE = (
    "The networks 256 wide of the curves, Heun's method in 20 even steps from t = 0.98, all from the same noise. The "
    "raw output is drawn at half contrast, −2 … 2. At t = 0 nothing is asked any more: x is what comes out."
)
CONFIDENCE_NOTE = (
    "A network 256 wide that predicts x₀ and, for every pixel, a variance, trained by their likelihood; all pictures "
    "and figures are of scans that it never saw. Much of what a map shows is the same for every digit, since the "
    "pixels at the border are always dark: the correlation beyond position has that taken away."
)

Found = Mapping[str, dict[str, Any]]


def table(found: Found) -> dict[str, Any]:
    """Rows from what was run here, and beside them what was published at full size."""
    rows = [_one_loss(), _conversion(), _amplification(), *_digits(found), *_spiral(found), _confidence(found)]
    return {"rows": rows, "published": PUBLISHED}


def _row(name: str, claim: str, numbers: dict[str, Any], *runs: str) -> dict[str, Any]:
    command = f"{COMMAND} --only {' '.join(runs)}" if runs else COMMAND
    return {"id": name, "claim": claim, "numbers": numbers, "command": command}


def _drawn() -> tuple[Tensor, Tensor, Tensor]:
    """A batch of data and of noise, [4096, 64], and times between 0.01 and 0.98, all float64."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4096, 64, generator=generator, dtype=torch.float64)
    return x0, eps, 0.01 + 0.97 * torch.rand(4096, generator=generator, dtype=torch.float64)


def _one_loss() -> dict[str, Any]:
    """The ε-loss of a network that predicts x0, over its x0-loss, sample by sample, beside the SNR."""
    x0, eps, t = _drawn()
    torch.manual_seed(0)
    net = rp.networks.MLP(64, 32, 3).double()
    schedule, losses = rp.schedule("rectified_flow"), {}
    with torch.no_grad():
        for space in ("x0", "eps"):
            objective = rp.Objective(schedule, "x0", loss_space=space, t_range=(0.0, 0.98))
            losses[space] = objective(net, x0, t, eps)
        own = net(schedule.add_noise(x0, eps, t), t)
    as_eps = rp.convert(own, schedule.add_noise(x0, eps, t), t, schedule, source="x0", to="eps")
    by_hand = (as_eps - eps).square().mean(1)
    off = (losses["eps"] / (schedule.log_snr(t).exp() * losses["x0"]) - 1).abs().max()
    converted = (losses["eps"] / by_hand - 1).abs().max()
    numbers = {"samples": len(t), "off_snr": rounded(float(off), 2), "off_converted": rounded(float(converted), 2)}
    return _row("one-loss", "The ε-loss is the x₀-loss times the SNR, sample by sample, whatever is predicted", numbers)


def _conversion() -> dict[str, Any]:
    """The largest error of y → y′ over all pairs of targets, by number format, in proportion to y′."""
    x0, eps, t = _drawn()
    schedule, numbers = rp.schedule("rectified_flow"), {"pairs": 25}
    names = (*TARGETS, "score")
    for kind in (torch.float64, torch.float32):
        x_t = schedule.add_noise(x0.to(kind), eps.to(kind), t)
        exact = {n: rp.target(n).encode(x0, eps, t, schedule) for n in names}
        worst = 0.0
        for source in names:
            for to in names:
                y = rp.convert(exact[source].to(kind), x_t, t, schedule, source=source, to=to).double()
                worst = max(worst, float(((y - exact[to]).norm(dim=1) / exact[to].norm(dim=1)).max()))
        numbers[str(kind).removeprefix("torch.")] = rounded(worst, 2)
    return _row("conversion", "Each prediction says the same as any other, given x_t and t", numbers)


def _amplification() -> dict[str, Any]:
    """By how much an error in the prediction grows in x0, on rectified flow."""
    schedule = rp.schedule("rectified_flow")
    times = [0.02, 0.1, 0.5, 0.9, 0.98]
    t = torch.tensor(times, dtype=torch.float64)
    grown = {n: rounded(rp.target(n).amplification(t, schedule).x0, 3) for n in TARGETS}
    claim = (
        "Near pure noise an error in ε grows without bound in x₀; one in velocity never grows, one in v by 1.21 at most"
    )
    return _row("amplification", claim, {"t": times, "in_x0": grown})


def _digits(found: Found) -> list[dict[str, Any]]:
    floor = found["digits-floor"]["frechet"]
    wide = {t: found[f"wide-{t}"]["frechet"] for t in TARGETS}
    narrow = {t: found[f"narrow-{t}-velocity"]["frechet"] for t in TARGETS}
    grid = {t: {loss: found[f"narrow-{t}-{loss}"]["frechet"] for loss in LOSSES} for t in TARGETS}
    nearest = {s: {t: found[f"wide-{t}"]["nearest"][s] for t in TARGETS} for s in ("trained_on", "held_out")}
    best = {t: min(row.values()) for t, row in grid.items()}
    low = {t: found[f"wide-{t}"]["error"][-1][0] for t in TARGETS}
    away = {t: found[f"wide-{t}"]["peek"]["away"][0] for t in TARGETS}
    names = {w: [f"{w}-{t}" + ("-velocity" if w == "narrow" else "") for t in TARGETS] for w in ("narrow", "wide")}
    all_narrow = [f"narrow-{t}-{loss}" for t in TARGETS for loss in LOSSES]
    return [
        _row("digits-narrow", _CLAIMS["digits-narrow"], {"floor": floor, "frechet": narrow}, *names["narrow"]),
        _row("digits-wide", _CLAIMS["digits-wide"], {"floor": floor, "frechet": wide}, *names["wide"]),
        _row("digits-losses", _CLAIMS["digits-losses"], {"floor": floor, "frechet": grid, "best": best}, *all_narrow),
        _row("low-noise", _CLAIMS["low-noise"], {"t": LOWEST_LEVEL, "error": low}, *names["wide"]),
        _row("sampling", _CLAIMS["sampling"], {"t": 0.98, "away": away}, *names["wide"]),
        _row("copying", _CLAIMS["copying"], nearest, *names["wide"]),
    ]


def _spiral(found: Found) -> list[dict[str, Any]]:
    def scores(dim: int) -> dict[str, Any]:
        kept = ("off_manifold", "manifold_distance")
        runs = {t: {k: found[f"spiral-{dim}-{t}"][k] for k in kept} for t in SPIRAL_TARGETS}
        return {"blind": found["spiral-truth"]["blind"], "runs": runs}

    return [
        _row(
            f"spiral-{dim}",
            _CLAIMS[f"spiral-{dim}"],
            scores(dim),
            *("spiral-truth", *(f"spiral-{dim}-{t}" for t in SPIRAL_TARGETS)),
        )
        for dim in (2, 512)
    ]


def _confidence(found: Found) -> dict[str, Any]:
    kept = ("t", "z2", "inside_50", "inside_90", "correlation", "beyond_position", "between_scans")
    levels = [{k: level[k] for k in kept} for level in found["confidence"]["reliability"]]
    return _row("confidence", _CLAIMS["confidence"], {"levels": levels}, "confidence")


def _published(name: str, claim: str, numbers: dict[str, Any], source: str) -> dict[str, Any]:
    return {"id": name, "claim": claim, "numbers": numbers, "source": source}


#: A test holds each of them against its numbers.
_CLAIMS = {
    "digits-narrow": "In a network 48 wide, below the 64 pixels, only x₀ gives digits; v and velocity give noisy ones, "
    "ε none",
    "digits-wide": "In a network 256 wide v and velocity give digits too, x₀ somewhat better ones; ε still fails at "
    "the start",
    "digits-losses": "At width 48 no loss rescues a prediction: the worst loss of x₀ beats the best of all others",
    "low-noise": "On the digits, where there is little noise, it is the other way round: x₀ from ε, v or velocity has "
    "less error than x₀ predicted directly",
    "sampling": "At the first step the x₀ that ε implies is far from where sampling ends; x₀'s own is a blurred guess",
    "copying": "The wide x₀-model's samples lie closer to scans that it learned from than to as many others: it has "
    "begun to copy. Those of v and velocity hardly do",
    "spiral-2": "In its own plane, D = 2, none fails: all come at least twice as near to the spiral as its mean and "
    "covariance alone",
    "spiral-512": "In 512 dimensions, twice the width of the network, x₀ stays on the plane, and v, velocity and ε "
    "leave it",
    "confidence": "Stated and real errors agree: the network knows where it is unsure",
}

#: Read in the papers. FID, lower is better; v in Li and He's table is the flow's velocity.
PUBLISHED = [
    _published(
        "jit-256",
        "ImageNet 256, patches of 768 numbers, a transformer 768 wide: only x₀ works, whichever the loss",
        {
            "columns": ["x0", "eps", "velocity"],
            "x0": [10.14, 379.21, 107.55],
            "eps": [10.45, 394.58, 126.88],
            "velocity": [8.62, 372.38, 96.53],
        },
        "Li and He, arXiv 2511.13720, table 2: FID-50K, rows are losses",
    ),
    _published(
        "jit-skip",
        "ImageNet 256, the same transformer and the loss of velocity: a skip connection from x_t does harm",
        {"x0": 8.62, "edm": 35.49, "linear": 46.25},
        "Li and He, arXiv 2511.13720: FID-50K of x₀, of EDM's preconditioning and of a linear skip, JiT-B/16",
    ),
    _published(
        "jit-64",
        "ImageNet 64, patches of 48 numbers, the same width: all three work",
        {
            "columns": ["x0", "eps", "velocity"],
            "x0": [5.76, 6.20, 6.12],
            "eps": [3.56, 4.02, 3.76],
            "velocity": [3.55, 3.63, 3.46],
        },
        "Li and He, arXiv 2511.13720, table 2: FID-50K, rows are losses",
    ),
    _published(
        "salimans-cifar10",
        "CIFAR-10, U-Net, trained to the end: with its best weighting each target is within 0.4 of the others",
        {"x0": 2.51, "v": 2.75, "eps": 2.91},
        "Salimans and Ho, arXiv 2202.00512: FID, 2M steps, DDIM, mean of 3 seeds, ± 0.1",
    ),
]
