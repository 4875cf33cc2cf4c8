"""Whether a target and its inverse agree, where it is singular, and what its loss learns.

The target is probed on small pictures, in float64 and in what training uses: x0 and ε become the
training target, the target becomes x0 again. A target given by a file is taken as it is, so that its
two functions are held against each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import NetworkError, ReparamError, SingularTime
from ..objective import Objective
from ..schedules import DDPM, Schedule, schedule
from ..targets import Target, target
from ..targets.file import File
from ..weightings import effective

#: x0 may come back off by this much of its size in float64: a wrong formula is off by far more.
_TOLERANCE = 1e-3
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
_TIMES = 65
#: How many pictures, and their shape.
_SHAPE = (8, 3, 8, 8)


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        verdict: "consistent", "inconsistent" (target and inverse disagree) or "singular" (a time in
            ``t_range`` at which x0 does not follow from the prediction).
        target, schedule, t_range: what was checked.
        max_inverse_error: by dtype, the largest error of x0 after target and inverse, over its size;
            None where it is not finite. float32 and bfloat16 are those of the stored prediction and x_t.
        worst_time: where the float64 error is largest. inverse_error: it, at every one of ``times``.
        singular_times: those inside ``t_range``. delta: Δ at ``times``, None for what is not linear.
        amplification, condition: the largest error growth into x0, and condition number, over ``times``.
        ends: what happens at both ends of time, in words.
        x0_weight: what the plain loss on this target weighs the x0-error with: pairs of log-SNR and weight.
        effective_weight: what that comes to with times drawn uniformly over ``t_range``, as a weight on the
            ε-error over log-SNR (:func:`reparam.weightings.effective`): triples of t, log-SNR and finite w.
        minimiser_error: how far x0 from the best prediction is from the posterior mean on a data set
            of two points, over their distance; None where it could not be computed.
        reason: the verdict in a sentence.
    """

    verdict: str
    target: str
    schedule: str
    t_range: tuple[float, float]
    max_inverse_error: dict[str, float | None]
    worst_time: float | None
    times: list[float]
    inverse_error: list[float | None]
    singular_times: list[float]
    delta: list[float | None]
    amplification: float | None
    condition: float | None
    ends: dict[str, str]
    x0_weight: list[tuple[float, float]]
    effective_weight: list[tuple[float, float, float]]
    minimiser_error: float | None
    reason: str = ""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain data."""
        return asdict(self)

    def text(self) -> str:
        """The findings for a reader."""
        errors = ", ".join(f"{dtype} {_number(e)}" for dtype, e in self.max_inverse_error.items())
        lines = [
            f"{self.verdict}: {self.reason}",
            "",
            f"target          {self.target}",
            f"schedule        {self.schedule}, t in [{self.t_range[0]:g}, {self.t_range[1]:g}]",
            f"inverse error   {errors} (largest over t, of the size of x0)",
            f"delta           {_signs(self.delta)}",
            f"error growth    at most {_number(self.amplification)} into x0; condition {_number(self.condition)}",
            f"at the data     {self.ends['data']}",
            f"at the noise    {self.ends['noise']}",
            f"x0-weight       {_by_snr(self.x0_weight)}",
            f"w(log-SNR)      {_by_snr(_spread(self.effective_weight))} (on the eps-error, times uniform)",
            f"minimiser       {_minimiser(self.minimiser_error)}",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def check(
    which: str | dict[str, Any] | Target,
    schedule_: str | dict[str, Any] | Schedule | None = None,
    *,
    t_range: Sequence[float] | None = None,
) -> Check:
    """Probe a target.

    Args:
        which: a target, its name, a row such as ``{"name": "linear", "p": "-sigma", "q": "alpha"}``, or
            the path of a Python file with ``compute_training_target`` and ``predict_x0``.
        schedule_: the forward process; DDPM's linear table by default.
        t_range: where the target is to be used; by default all steps of a table, or [0, 1].

    Raises:
        ReparamError: if there is no such target or schedule, or a file's functions fail.
    """
    kind = named_target(which)
    process = DDPM() if schedule_ is None else schedule(schedule_)
    on_steps = isinstance(process, DDPM)
    low, high = t_range or ((1 / process.T if isinstance(process, DDPM) else 0.0), 1.0)
    t = _times(process, low, high)
    linear, notes = _is_linear(kind, t, process)
    singular = _singular(kind, t, process) if linear else []
    errors = {name: _errors(kind, t, process, dtype) for name, dtype in _DTYPES.items()}
    exact = errors["float64"]
    worst = int(exact.nan_to_num(math.inf, math.inf).argmax())
    largest = {name: _finite(e.max()) for name, e in errors.items()}
    inside = t[(t > 0) & _regular(kind, t, process, linear)]
    growth, condition = _growth(kind, inside, process, linear)
    mean_off = _minimiser_error(kind, inside, process)
    verdict, reason = _verdict(kind, exact, t, singular, mean_off)
    return Check(
        verdict,
        _named(kind),
        str(process),
        (float(low), float(high)),
        largest,
        float(t[worst]),
        [float(v) for v in t],
        [_finite(e) for e in exact],
        singular,
        [_finite(d) for d in kind.delta(t, process).reshape(len(t), -1)[:, 0]] if linear else [None] * len(t),
        growth,
        condition,
        {"data": _end(kind, process, low if on_steps else 0.0), "noise": _end(kind, process, 1.0)},
        _weights(kind, inside, process, linear),
        _effective(kind, inside, process, linear, low, high),
        mean_off,
        reason,
        notes,
    )


def named_target(which: str | dict[str, Any] | Target) -> Target:
    """A target as it is written at the command line: a name, a file, or p=…,q=…

    Raises:
        ReparamError: if it is none of them.
    """
    if isinstance(which, str) and which.endswith(".py"):
        return File(which)
    if isinstance(which, str) and "=" in which:
        parts = dict(part.partition("=")[::2] for part in which.split(","))
        row = {key.strip(): value.strip() for key, value in parts.items()}
        if set(row) != {"p", "q"}:
            raise ReparamError(f"{which!r}: a row is written p=…,q=…, for example 'p=-sigma,q=alpha'.")
        return target({"name": "linear", **row})
    return target(which)


def _named(kind: Target) -> str:
    return kind.path if isinstance(kind, File) else f"{kind.name}: {kind.words}"


def _times(process: Schedule, low: float, high: float) -> Tensor:
    t = torch.linspace(low, high, _TIMES, dtype=torch.float64)
    return process.on_steps(t, high).unique() if isinstance(process, DDPM) else t


def _draw(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(count, *_SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    return x0, eps


def _errors(kind: Target, t: Tensor, process: Schedule, dtype: torch.dtype) -> Tensor:
    """At each time, the RMS error of x0 over its size, with prediction and x_t rounded to ``dtype``."""
    x0, eps = _draw(len(t))
    found = torch.full((len(t),), math.nan, dtype=torch.float64)
    for i, at in enumerate(t):
        try:
            times = at.expand(_SHAPE[0])
            y = kind.encode(x0[i], eps[i], times, process).to(dtype)
            x_t = process.add_noise(x0[i], eps[i], times).to(dtype)
            # Cast up before it is converted, as everywhere.
            back = kind.to_x0(y.double(), x_t.double(), times, process)
        except SingularTime:
            continue
        found[i] = (back.double() - x0[i]).square().mean().sqrt() / x0[i].square().mean().sqrt()
    return found


def _is_linear(kind: Target, t: Tensor, process: Schedule) -> tuple[bool, list[str]]:
    """Whether the target is p x0 + q ε; what to tell of it where it is not."""
    if not isinstance(kind, File):
        return True, []
    x0, eps = _draw(1)
    for at in t[:: max(1, len(t) // 8)]:
        times = at.expand(_SHAPE[0])
        p, q = kind.rows(at.reshape(1), process)
        off = kind.encode(x0[0], eps[0], times, process) - (p * x0[0] + q * eps[0])
        if float(off.abs().max()) > 1e-3 * float(1 + p.abs() + q.abs()):
            return False, [f"the target is not p*x0 + q*eps with p and q the same for all samples (t = {at:g})"]
    return True, []


def _singular(kind: Target, t: Tensor, process: Schedule) -> list[float]:
    """The times from the first to the last of ``t`` where the target is infinite, or x0 does not follow from it."""
    rows = torch.stack([row.reshape(len(t), -1).sum(1) for row in kind.rows(t, process)])
    infinite = set(t[~rows.sum(0).isfinite()].tolist())
    if isinstance(kind, File):  # defined on its steps alone
        lost = ~kind.amplification(t, process).x0.isfinite()
        return sorted(infinite | set(t[lost].tolist()))
    return sorted(infinite | set(kind.singular_times(process, (float(t[0]), float(t[-1])))))


def _regular(kind: Target, t: Tensor, process: Schedule, linear: bool) -> Tensor:
    if not linear:
        return torch.ones_like(t, dtype=torch.bool)
    return kind.amplification(t, process).x0.reshape(len(t), -1).isfinite().all(1)


def _growth(kind: Target, t: Tensor, process: Schedule, linear: bool) -> tuple[float | None, float | None]:
    if not linear or not len(t):
        return None, None
    return _finite(kind.amplification(t, process).x0.max()), _finite(kind.condition(t, process).max())


def _minimiser_error(kind: Target, t: Tensor, process: Schedule) -> float | None:
    """On data that are one of two pictures: x0 from the mean of the target given x_t, against E[x0 | x_t].

    The mean is what the plain squared error learns; for a target that is linear in (x0, ε) with the
    same p and q for all samples the two are the same.
    """
    data, noise = _draw(1)
    a, b = data[0][:1], data[0][1:2]
    worst = 0.0
    for at in t[:: max(1, len(t) // 12)]:
        alpha, sigma = float(process.alpha(at)), float(process.sigma(at))
        # In between the two, at a distance at which either may have been it.
        x_t = alpha * (0.55 * a + 0.45 * b) + 0.1 * sigma * noise[0][:1]
        both = torch.cat([a, b])
        eps = (x_t - alpha * both) / sigma
        share = (-0.5 * eps.square().sum((1, 2, 3))).softmax(0)[:, None, None, None]
        try:
            times = at.expand(2)
            mean = (share * kind.encode(both, eps, times, process)).sum(0, keepdim=True)
            found = kind.to_x0(mean, x_t, at.expand(1), process)
        except (SingularTime, NetworkError):
            return None
        truth = (share * both).sum(0, keepdim=True)
        worst = max(worst, float((found - truth).square().mean().sqrt() / (a - b).square().mean().sqrt()))
    return worst if math.isfinite(worst) else None


def _verdict(kind: Target, errors: Tensor, t: Tensor, singular: list[float], mean_off: float | None) -> tuple[str, str]:
    usable = errors.clone()
    for time in singular:
        usable[(t - time).abs() < 1e-9] = 0.0
    bad = ~(usable <= _TOLERANCE)
    if bool(bad.any()):
        worst = int(usable.nan_to_num(math.inf, math.inf).argmax())
        return "inconsistent", (
            f"x0 does not come back from the target: at t = {t[worst]:.4g} it is off by "
            f"{_number(_finite(errors[worst]))} of its size, and by more than {_TOLERANCE:g} at {int(bad.sum())} of "
            f"{len(t)} times. Make the inverse solve for x0 what the target function computes."
        )
    if singular:
        return "singular", (
            f"the target is infinite, or x0 does not follow from it, at "
            f"t = {', '.join(f'{v:g}' for v in singular[:4])}; keep that out of t_range, or predict x0 or v."
        )
    if mean_off is not None and mean_off > 0.01:
        return "inconsistent", (
            f"target and inverse agree, but the mean of the target is not turned into the mean of x0 (off by "
            f"{mean_off:.2g} on two points): a network trained on it by squared error does not learn to denoise."
        )
    return "consistent", f"target and inverse agree at all {len(t)} times probed."


def _end(kind: Target, process: Schedule, t: float) -> str:
    at = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = float(process.alpha(at)), float(process.sigma(at))
    where = f"t = {t:g}, alpha = {alpha:.4g}, sigma = {sigma:.4g}: "
    try:
        x0, eps = (v[0] for v in _draw(1))
        times = at.expand(_SHAPE[0])
        x_t = process.add_noise(x0, eps, times)
        y = kind.encode(x0, eps, times, process)
        off = float((kind.to_x0(y, x_t, times, process) - x0).abs().max())
    except SingularTime as e:
        return where + ("the target is infinite" if "no finite value" in str(e) else "x0 does not follow from it")
    return where + (
        "x0 is x_t/alpha whatever is predicted" if sigma == 0 else f"regular, off by at most {_number(off)}"
    )


def _weights(kind: Target, t: Tensor, process: Schedule, linear: bool) -> list[tuple[float, float]]:
    if not linear or not len(t):
        return []
    chosen = t[torch.linspace(0, len(t) - 1, min(5, len(t))).round().long()]
    weight = kind.amplification(chosen, process).x0.reshape(len(chosen), -1)[:, 0] ** -2
    return [
        (round(float(process.log_snr(at)), 2), float(w)) for at, w in zip(chosen, weight, strict=True) if w.isfinite()
    ]


def _effective(
    kind: Target, t: Tensor, process: Schedule, linear: bool, low: float, high: float
) -> list[tuple[float, float, float]]:
    if not linear or not len(t):
        return []
    try:
        snr, inner = process.log_snr(t), (float(t[0]), float(t[-1]))
        # The objective must be regular, so it is asked inside; uniform times are that much denser there.
        weight = effective(Objective(process, kind, t_range=inner), snr) * (inner[1] - inner[0]) / (high - low)
    except ReparamError:  # a singular setting, which the verdict says, or one without a single weight a time
        return []
    rows = torch.stack([t, snr, weight.expand_as(t)], dim=1)
    return [(at, lam, w) for at, lam, w in rows[rows.isfinite().all(1)].tolist()]


def _spread(rows: Sequence[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """Log-SNR and w of five of them, evenly."""
    chosen = torch.linspace(0, len(rows) - 1, min(5, len(rows))).round().int().tolist()
    return [rows[i][1:] for i in chosen]


def _by_snr(pairs: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"{_number(w)} at log-SNR {snr:.3g}" for snr, w in pairs) or "not defined"


def _finite(value: Tensor | float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _number(value: float | None) -> str:
    return "infinity" if value is None else f"{value:.3g}"


def _signs(delta: Sequence[float | None]) -> str:
    known = [d for d in delta if d is not None]
    if not known:
        return "not defined: the target is not linear"
    low, high = min(known), max(known)
    sign = "negative" if high < 0 else "positive" if low > 0 else "changes sign or is zero"
    return f"{sign}, from {low:.3g} to {high:.3g}"


def _minimiser(error: float | None) -> str:
    if error is None:
        return "could not be computed"
    return f"{'is' if error <= 0.01 else 'is NOT'} the posterior mean (off by {error:.2g} on two points)"


def plot(found: Check, path: Path) -> None:
    """The inverse error, and the effective weight over its greatest value, over t, as an SVG file.

    Raises:
        OutputError: if it cannot be written.
    """
    from ..files import write_text
    from ..report.charts import Line, line_chart, one_above_another

    points = [(t, max(e, 1e-17)) for t, e in zip(found.times, found.inverse_error, strict=True) if e is not None]
    lines = [Line(0, "inverse error, float64", [t for t, _ in points], [e for _, e in points])]
    charts = [("Error of x0 after target and inverse, float64", lines)]
    if weights := [(t, w) for t, _, w in found.effective_weight if w > 0]:
        most = max(w for _, w in weights)
        scaled = Line(1, "w", [t for t, _ in weights], [max(w / most, 1e-6) for _, w in weights])
        charts.append(("w(log-SNR) over its greatest value, times uniform", [scaled]))
    titles = [title for title, _ in charts]
    drawn = []
    for title, lines in charts:
        label = f"{title} ({found.target})"
        drawn.append(line_chart(lines, label=label, x_words="t", x_end=1.0, ends=("data", "noise"), least=1e-18))
    drawing = one_above_another(titles, drawn)
    write_text(path, drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n")
