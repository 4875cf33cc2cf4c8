"""The networks that the lesson trains: what is recorded while they learn, and what they draw afterwards.

Every run is a plain function of its arguments, which are plain data; :mod:`data` keeps what it returns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from formulas import LAMBDA, digits, rounded, u8
from torch import Tensor, nn

import reparam as rp
from reparam.data import Data, load_data
from reparam.denoiser import Denoiser, evaluating
from reparam.training import Diverged, TrainConfig, Trainer
from reparam.training.draws import unit_noise
from reparam.training.validation import Validation

#: Where training draws and sampling starts, of every target alike: ε says nothing of x0 at t = 1 on this path.
T_RANGE = (0.0, 0.98)
#: Times at which the error of x0 is measured.
LEVELS = [0.1, 0.3, 0.5, 0.7, 0.9, 0.97]
#: Samples are scored in groups of as many as there are held-out scans: fewer have a larger Fréchet distance.
_GROUPS = 4
#: The one level of the spiral's curve: there the plane still tells most of x0.
SPIRAL_LEVEL = 0.3
SCHEDULE = "rectified_flow"
TIMES = {"name": "logit_normal", "mean": 0.0, "std": 1.0}
_LR = 3e-3


def _objective(target: Any, loss: Any) -> rp.Objective:
    return rp.Objective(SCHEDULE, target, loss_space=loss, times=TIMES, t_range=T_RANGE)


def _validation(data: Data, each: int) -> Validation:
    """The same held-out data and noise for every run, at exactly LEVELS."""
    x0 = data.normalised(data.heldout[:each])
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor(LEVELS, dtype=torch.float64).repeat_interleave(len(x0))
    n = len(LEVELS)
    return Validation([0.0, *LEVELS], x0.repeat(n, 1), t, eps.repeat(n, 1), data.sigma_data**2)


def _recorded_steps(steps: int) -> list[int]:
    """About evenly spaced on a logarithmic axis."""
    wanted = (10, 20, 50, 100, 200, 350, 500, 750, 1000, 1500, 2000, 3000, 4000, 6000)
    return [*(s for s in wanted if s < steps), steps]


def _trained(net: nn.Module, objective: rp.Objective, data: Data, steps: int) -> tuple[Denoiser, dict[str, Any]]:
    """The averaged network, and its x0-error by level with the loss between two records."""
    each = 449 if data.curve is None else 512
    validation = _validation(data, each)
    config = TrainConfig(steps=steps, batch=256, lr=_LR, precision="float32", validations=1)
    trainer = Trainer(net, objective, data, config, validation=validation, entries=steps)
    at, errors, losses, seen = _recorded_steps(steps), [], [], 0
    begun = time.process_time()
    status = "done"
    try:
        for step in trainer.run(looks=at):
            if step in at:
                errors.append(validation.errors(trainer.denoiser))
                loss = [entry["loss"] for entry in trainer.history[seen:] if "loss" in entry]
                losses.append(sum(loss) / len(loss))
                seen = len(trainer.history)
    except Diverged:
        status = "diverged"
    record = {
        "status": status,
        "steps": at[: len(errors)],
        "error": rounded(errors, 3),
        "loss": rounded(losses, 3),
        "cpu_seconds": round(time.process_time() - begun, 1),
    }
    return trainer.denoiser, record


def _mlp(dim: int, hidden: int, outputs: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    return rp.networks.MLP(dim, hidden, layers=5, outputs=outputs)


def _grid(steps: int) -> list[float]:
    """Even times from the end of T_RANGE to 0."""
    return [float(t) for t in torch.linspace(T_RANGE[1], 0, steps + 1, dtype=torch.float64)]


def frechet(x: Tensor, data: Data) -> float:
    """The Fréchet distance of pixels to the training scans; infinite for samples that are not numbers."""
    if not bool(x.isfinite().all()):
        return float("inf")
    ours, real = (rp.metrics.moments(v) for v in (x, data.train))
    return rp.metrics.frechet_distance(ours.mean, ours.cov, real.mean, real.cov)


def nearest(x: Tensor, data: Data) -> dict[str, Any]:
    """The mean distance to the nearest of the held-out scans, and of as many that were trained on.

    For samples of a model that copies nothing the two are alike, and so they are for scans of neither.
    """
    to_held_out = rp.metrics.nearest(x, data.heldout)[0].mean()
    return {"trained_on": _to_trained_on(x, data), "held_out": rounded(float(to_held_out))}


def _to_trained_on(x: Tensor, data: Data) -> Any:
    groups = [g for g in data.train.split(len(data.heldout)) if len(g) == len(data.heldout)]
    return rounded(float(torch.stack([rp.metrics.nearest(x, g)[0].mean() for g in groups]).mean()))


def digits_run(hidden: int, target: str, loss: Any, steps: int, peek: bool = False) -> dict[str, Any]:
    """An MLP on the digits: its errors as it learns, its samples, and (``peek``) how it got to six of them."""
    data = digits()
    denoiser, record = _trained(_mlp(64, hidden), _objective(target, loss), data, steps)
    each = len(data.heldout)
    x = rp.sample(denoiser, unit_noise(0, 0, _GROUPS * each, (64,)), sampler="heun", times=_grid(20))
    assert isinstance(x, Tensor)
    scores = [frechet(group, data) for group in x.split(each)]
    found = record | {
        "frechet": rounded(sum(scores) / len(scores)),
        "nearest": nearest(x, data),
        "samples": u8(x[:6]),
    }
    return found | ({"peek": peeked(denoiser, data)} if peek else {})


def digits_floor() -> dict[str, Any]:
    """What it takes no network for.

    ``frechet`` is that of the held-out scans, ``copied`` that of as many of those trained on, drawn at random;
    ``nearest`` how far the held-out scans are from those trained on, as :func:`nearest` has it of samples. Errors
    of x0, relative to the variance, are those of the mean scan, always the same, and by level of x_t/α.
    """
    data = digits()
    scans, train = len(data.heldout), len(data.train)
    generator = torch.Generator().manual_seed(4)
    drawn = [data.train[torch.randint(train, (scans,), generator=generator)] for _ in range(20)]
    copied = sum(frechet(group, data) for group in drawn) / len(drawn)
    away = data.normalised(data.heldout) - data.normalised(data.train).mean(0)
    variance = data.sigma_data**2
    return {
        "scans": scans,
        "frechet": rounded(frechet(data.heldout, data)),
        "copied": rounded(copied),
        "nearest": _to_trained_on(data.heldout, data),
        "mean_error": rounded(float(away.square().mean()) / variance, 3),
        "x_t_error": rounded([(t / (1 - t)) ** 2 / variance for t in LEVELS], 3),
    }


def peeked(denoiser: Denoiser, data: Data, shown: int = 6, counted: int = 256) -> dict[str, Any]:
    """Sampling, step by step: x_t, the raw output, and the x0 that follows from it.

    ``away`` is the root-mean-square distance, a pixel, of that x0 from the final sample, over ``counted`` of them.
    """
    times = _grid(20)
    path = rp.sample(denoiser, unit_noise(0, 0, counted, (64,)), sampler="heun", times=times, trajectory=True)
    assert not isinstance(path, Tensor)
    raw, x0 = [], []
    with evaluating(denoiser):
        for t, x in zip(path.times, path.states, strict=True):
            at = torch.tensor(t, dtype=torch.float64)
            y, _ = denoiser.conventions.call(denoiser.net, x, at, {})
            raw.append(y)
            x0.append(denoiser.target.to_x0(y, x, at, denoiser.schedule))
    raws, beliefs = torch.stack(raw), torch.stack(x0)
    away = (beliefs - path.x).square().mean(dim=(1, 2)).sqrt()
    by_digit = {"x": path.states, "x0": beliefs}
    return {
        "t": rounded(path.times),
        **{name: u8(v[:, :shown].transpose(0, 1)) for name, v in by_digit.items()},
        "raw": u8(raws[:, :shown].transpose(0, 1), 2.0),
        "away": rounded(away, 3),
    }


def spiral_run(dim: int, target: str, steps: int) -> dict[str, Any]:
    """An MLP on the spiral in ``dim`` dimensions: its errors as it learns, and its samples in the plane."""
    data = load_data({"name": "spiral", "dim": dim})
    assert data.curve is not None
    denoiser, record = _trained(_mlp(dim, 256), _objective(target, "velocity"), data, steps)
    x = rp.sample(denoiser, unit_noise(0, 0, 1024, (dim,)), sampler="heun", times=_grid(40))
    assert isinstance(x, Tensor)
    plane = (data.curve.plane(x[:200]) * 100).round()
    by_level = record.pop("error")
    return record | {
        "points": plane.nan_to_num(400).clamp(-400, 400).to(torch.int64).tolist(),
        "off_manifold": rounded(float(data.curve.off_plane(x).square().mean().sqrt()), 3),
        "manifold_distance": rounded(float(data.curve.off_curve(x).mean()), 3),
        "error": [row[LEVELS.index(SPIRAL_LEVEL)] for row in by_level],
        "error_by_level": by_level,
    }


def spiral_truth() -> dict[str, Any]:
    """The curve in its plane, in hundredths; and how far from it points are that know its mean and covariance alone."""
    data = load_data({"name": "spiral", "dim": 2})
    assert data.curve is not None
    curve = data.curve.points
    truth = curve[torch.linspace(0, len(curve) - 1, 150).long()]
    noise = torch.randn(4096, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    blind = curve.mean(0) + noise @ torch.linalg.cholesky(torch.cov(curve.T)).T
    return {
        "truth": (truth * 100).round().to(torch.int64).tolist(),
        "blind": rounded(float(data.curve.off_curve(data.curve.embed(blind)).mean()), 3),
    }


def spiral_ideal(dim: int) -> dict[str, Any]:
    """The error of the best denoiser there is, by level: the posterior mean over the curve's own points.

    Only the plane tells of x0, so it is the same in every dimension, but for the draw that it is measured on.
    """
    data = load_data({"name": "spiral", "dim": dim})
    assert data.curve is not None
    schedule, validation, found = rp.schedule(SCHEDULE), _validation(data, 512), []
    x_t = schedule.add_noise(validation.x0.double(), validation.eps.double(), validation.t)
    clean = data.curve.plane(validation.x0)
    for x, x0, t in zip(data.curve.plane(x_t).split(512), clean.split(512), LEVELS, strict=True):
        distance = torch.cdist(x, schedule.alpha(t) * data.curve.points) / schedule.sigma(t)
        mean = (-(distance**2) / 2).softmax(1) @ data.curve.points
        found.append(float((mean - x0).square().sum(1).mean()) / (dim * validation.variance))
    return {"error_by_level": rounded(found, 3)}


def edm2_run(steps: int) -> dict[str, Any]:
    """EDM2's u(λ), the logarithm of the loss of EDM's F by noise level, learned on the digits."""
    data = digits()
    objective = rp.Objective(
        SCHEDULE,
        {"name": "edm", "sigma_data": 0.5},
        weighting={"name": "edm2", "sigma_data": 0.5},
        times={"name": "log_normal_sigma", "mean": -0.4, "std": 1.0},
        input="edm",
        time="log_sigma/4",
        t_range=T_RANGE,
    )
    _, record = _trained(_mlp(64, 256), objective, data, steps)
    assert objective.learned is not None
    with torch.no_grad():
        u = objective.learned.u(LAMBDA)
    return {"u": rounded(u.double()), "status": record["status"], "cpu_seconds": record["cpu_seconds"]}


#: Noise levels at which confidence is shown, and the classes that it is shown for.
CONFIDENCE_LEVELS = (0.3, 0.45, 0.6)
_SHOWN_CLASSES = (3, 8, 0, 4)
#: The standard deviation that a map draws as white.
FULL_SCALE = 0.6


def confidence_run(steps: int) -> dict[str, Any]:
    """A mean and a variance of every pixel, on scans that training never saw.

    From t = 0.05 on: a prediction of x0 would have to be as exact as the noise is small.
    """
    data = digits()
    likelihood = rp.Gaussian("x0", covariance="diagonal", of="x0", sigma_data=data.sigma_data)
    objective = rp.Objective(SCHEDULE, likelihood, times=TIMES, t_range=(0.05, T_RANGE[1]))
    denoiser, record = _trained(_mlp(64, 256, outputs=128), objective, data, steps)
    measured = [_judged(denoiser, data, t) for t in CONFIDENCE_LEVELS]
    return record | {
        "examples": [example for t in CONFIDENCE_LEVELS for example in _examples(denoiser, data, t)],
        "reliability": measured,
        "full_scale": FULL_SCALE,
    }


def _looked(denoiser: Denoiser, data: Data, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, and the mean and standard deviation of x0, of all held-out scans."""
    eps = torch.randn(data.heldout.shape, generator=torch.Generator().manual_seed(2))
    x_t = denoiser.schedule.add_noise(data.heldout, eps, t)
    with evaluating(denoiser):
        posterior = denoiser(x_t, t)
    assert posterior.var is not None
    return x_t, posterior.mean, posterior.var.sqrt()


def _examples(denoiser: Denoiser, data: Data, t: float) -> list[dict[str, Any]]:
    x_t, mean, std = _looked(denoiser, data, t)
    assert data.heldout_labels is not None
    found = []
    for label in _SHOWN_CLASSES:
        i = int((data.heldout_labels == label).nonzero()[0])
        error = (mean[i] - data.heldout[i]).abs()
        pictures = {"x0": data.heldout[i], "x_t": x_t[i], "mean": mean[i]}
        maps = {"std": std[i], "error": error}
        found.append(
            {"label": label, "t": t}
            | {name: u8(v) for name, v in pictures.items()}
            | {name: (v / FULL_SCALE * 255).clamp(max=255).round().int().tolist() for name, v in maps.items()}
        )
    return found


def _judged(denoiser: Denoiser, data: Data, t: float) -> dict[str, Any]:
    """How honest the standard deviations are: pixels in ten groups by what was stated, and what came out.

    ``beyond_position`` is the correlation that is left when every pixel's own mean over all scans is taken away: some
    pixels are always dark, and to know that is to know nothing of this scan. ``between_scans`` is that of whole scans,
    the root-mean-square of what was stated and of what came out.
    """
    _, mean, std = _looked(denoiser, data, t)
    error = (mean - data.heldout).double()
    apart = _correlation(std - std.mean(0), error.abs() - error.abs().mean(0))
    whole = _correlation(*(v.square().mean(1).sqrt() for v in (std, error)))
    error, std = error.flatten(), std.double().flatten()
    groups = std.argsort().chunk(10)
    z = error.abs() / std
    return {
        "t": t,
        "stated": [rounded(float(std[g].square().mean().sqrt()), 3) for g in groups],
        "found": [rounded(float(error[g].square().mean().sqrt()), 3) for g in groups],
        "z2": rounded(float(z.square().mean()), 3),
        "inside_50": rounded(float((z < 0.67449).double().mean()), 3),
        "inside_90": rounded(float((z < 1.64485).double().mean()), 3),
        "correlation": _correlation(std, error.abs()),
        "beyond_position": apart,
        "between_scans": whole,
    }


def _correlation(a: Tensor, b: Tensor) -> Any:
    return rounded(float(torch.corrcoef(torch.stack([a.double().flatten(), b.double().flatten()]))[0, 1]), 3)


RUNS: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f for f in (digits_run, digits_floor, spiral_run, spiral_truth, spiral_ideal, edm2_run, confidence_run)
}
