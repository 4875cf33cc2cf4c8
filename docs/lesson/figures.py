"""The figures of the lesson as they stand before anything is moved: inline SVG, and the tables beside it.

lesson.js draws into the same elements: it replaces the fill of pixels, the ``d`` of paths and the text of readouts,
nothing else, so that nothing moves on the page. What is computed here comes from reparam itself; the page computes
it again.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import torch

import reparam as rp

Data = dict[str, Any]
TARGETS = ("x0", "eps", "v", "velocity", "score")
SHORT = {"x0": "x₀", "eps": "ε", "v": "v", "velocity": "velocity", "score": "score"}
WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 352, 8, 190
START: dict[str, Any] = {"digit": 3, "noise": 0, "t": 0.5, "source": "eps", "convert_t": 0.8, "error": 0.2}

escape = html.escape


# Pixels


def grey(value: float, low: float, high: float) -> int:
    """A value as a level 0…255, black at ``low``."""
    return round(255 * min(max((value - low) / (high - low), 0), 1))


def heat(level: int) -> str:
    """The colours of a map of standard deviations or errors: black to amber."""
    return f"#{level:02x}{round(level * 0.753):02x}{round(level * 0.302):02x}"


def shade(level: int) -> str:
    return f"#{level:02x}{level:02x}{level:02x}"


def picture(name: str, label: str, fills: Sequence[str]) -> str:
    """64 pixels that the script may repaint."""
    pixels = "".join(f'<path d="M{i % 8} {i // 8}h1v1h-1z" fill="{fill}"/>' for i, fill in enumerate(fills))
    return (
        f'<svg class="pixels" data-picture="{name}" viewBox="0 0 8 8" width="96" height="96" role="img" '
        f'aria-label="{escape(label)}" shape-rendering="crispEdges">{pixels}</svg>'
    )


def table(label: str, kind: str, head: Iterable[str], rows: str) -> str:
    """A table that scrolls, by keyboard too, where it is too wide for the window."""
    columns = "".join(f'<th scope="col">{words}</th>' for words in head)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="{kind}">'
        f"<thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def greys(values: Iterable[float], low: float, high: float) -> list[str]:
    return [shade(grey(v, low, high)) for v in values]


def rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's; 0 where one of the two is constant."""
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    cov = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    size = math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))
    return cov / size if size else 0.0


def rounded(value: float, digits: int) -> str:
    """As JavaScript's toFixed: of two equally near ones the larger."""
    exact = Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return f"{exact:,.{digits}f}"


def number(value: float) -> str:
    """Three digits, as the script writes them; what is nothing but rounding is 0."""
    if not math.isfinite(value):
        return "∞"
    if abs(value) < 1e-12:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return scientific(value)
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2 if abs(value) >= 0.9995 else 3
    return rounded(value, digits).replace("-", "−")


def scientific(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


# Charts


Frame = dict[str, Any]


def frame_of(x: tuple[float, float], y: tuple[float, float], *, log_x: bool = False, log_y: bool = True) -> Frame:
    return {"x": list(x), "y": list(y), "logX": log_x, "logY": log_y}


def _share(value: float, axis: Sequence[float], log: bool) -> float:
    low, high = axis
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def place(frame: Frame, x: float, y: float) -> tuple[float, float]:
    """Where a point is in the picture; what is above or below the frame stays near it."""
    down = 1 - _share(y, frame["y"], frame["logY"])
    return (
        LEFT + (RIGHT - LEFT) * _share(x, frame["x"], frame["logX"]),
        TOP + (BOTTOM - TOP) * min(max(down, -0.5), 1.5),
    )


def line_path(frame: Frame, xs: Sequence[float], ys: Sequence[float | None]) -> str:
    """A line with gaps where a value is missing, or is not positive on a logarithmic axis."""
    path, pen = [], "M"
    for x, y in zip(xs, ys, strict=True):
        if y is None or not math.isfinite(y) or (frame["logY"] and y <= 0):
            pen = "M"
            continue
        px, py = place(frame, x, y)
        path.append(f"{pen}{px:.1f} {py:.1f}")
        pen = "L"
    return "".join(path)


def decades(low: float, high: float) -> list[tuple[float, str]]:
    """Ticks at powers of ten, at most six of them."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(1, math.ceil((last - first) / 5))
    small = {-2: "0.01", -1: "0.1", 0: "1", 1: "10", 2: "100", 3: "1000"}
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return [(10.0**k, small.get(k, "10" + str(k).translate(raised))) for k in range(first, last + 1, step)]


def around(values: Iterable[float | None]) -> tuple[float, float]:
    """A logarithmic axis around positive values, to the next 1, 2 or 5."""
    kept = [v for v in values if v is not None and v > 0 and math.isfinite(v)]
    steps = [m * 10.0**k for k in range(-6, 9) for m in (1, 2, 5)]
    return max(s for s in steps if s <= min(kept)), min(s for s in steps if s >= max(kept))


def chart(
    name: str,
    frame: Frame,
    lines: Sequence[tuple[str, Sequence[float], Sequence[float | None]]],
    *,
    label: str,
    x_label: str,
    x_ticks: Sequence[tuple[float, str]],
    mark: float | None = None,
) -> str:
    """A chart whose lines the script may redraw. The x label stands below; what y is stands in the caption."""
    ticks = []
    for value, words in x_ticks:
        x, _ = place(frame, value, frame["y"][0])
        ticks.append(
            f'<path class="grid" d="M{x:.1f} {TOP}V{BOTTOM}"/><text x="{x:.1f}" y="{BOTTOM + 15}">{words}</text>'
        )
    for value, words in decades(*frame["y"]):
        _, y = place(frame, frame["x"][0], value)
        ticks.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        ticks.append(f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{words}</text>')
    drawn = "".join(
        f'<path class="line of-{escape(key)}" data-line="{escape(key)}" d="{line_path(frame, xs, ys)}"/>'
        for key, xs, ys in lines
    )
    at = "" if mark is None else f"{place(frame, mark, frame['y'][0])[0]:.1f}"
    marker = f'<path class="mark" data-mark="" d="M{at} {TOP}V{BOTTOM}"/>' if at else ""
    return (
        f'<svg class="chart" data-chart="{name}" data-frame="{escape(json.dumps(frame))}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{escape(label)}">'
        f'<clipPath id="clip-{name}">'
        f'<rect x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" height="{BOTTOM - TOP}"/></clipPath>'
        f'{"".join(ticks)}<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 6}">{x_label}</text>'
        f'<g clip-path="url(#clip-{name})">{drawn}{marker}</g></svg>'
    )


def legend(names: Iterable[tuple[str, str]]) -> str:
    """Swatches with the dashes of the lines."""
    entries = "".join(f"<li>{swatch(key)}{escape(label)}</li>" for key, label in names)
    return f'<ul class="legend">{entries}</ul>'


def swatch(key: str) -> str:
    return (
        f'<svg class="swatch" viewBox="0 0 30 10" width="30" height="10" aria-hidden="true">'
        f'<path class="line of-{escape(key)}" d="M1 5H29"/></svg>'
    )


# 1 and 2: noise, what is asked for, and conversion


def _tensor(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sample_of(data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """The digit and the noise the page starts with."""
    x0 = _tensor(data["digits"][START["digit"]]["pixels"]) / 127.5 - 1
    return x0, _tensor(data["noise"][START["noise"]])


def span_of(target: str, sigma: float) -> float:
    """The value that is drawn white: 1 for pictures, 3 for noise and mixtures of it, 3/σ for the score."""
    return 1.0 if target == "x0" else 3.0 / sigma if target == "score" else 3.0


def options(entries: Iterable[tuple[Any, str]], chosen: Any) -> str:
    return "".join(
        f'<option value="{escape(str(value))}"{" selected" if value == chosen else ""}>{escape(words)}</option>'
        for value, words in entries
    )


def captioned(drawn: str, title: str, below: str, name: str) -> str:
    return f'<li><b>{title}</b>{drawn}<output data-out="{name}" aria-live="off">{escape(below)}</output></li>'


def noise_pictures(data: Data, formula: Callable[[str], str]) -> str:
    x0, eps = sample_of(data)
    flow, t = rp.RectifiedFlow(), START["t"]
    x_t = flow.add_noise(x0, eps, t).tolist()
    entries = [
        captioned(
            picture("noise-x_t", "the noisy digit", greys(x_t, -2, 2)),
            formula("x_t"),
            f"rms {number(rms(x_t))}",
            "noise-x_t",
        )
    ]
    for name in TARGETS:
        y = rp.target(name).encode(x0, eps, t, flow).tolist()
        span = span_of(name, t)
        drawn = picture(f"noise-{name}", f"target {SHORT[name]}", greys(y, -span, span))
        entries.append(captioned(drawn, SHORT[name], f"rms {number(rms(y))}", f"noise-{name}"))
    return f'<ul class="pictures">{"".join(entries)}</ul>'


def convert_pictures(data: Data) -> str:
    x0, eps = sample_of(data)
    flow, t, source = rp.RectifiedFlow(), START["convert_t"], START["source"]
    direction = _tensor(data["noise"][1])
    y = rp.target(source).encode(x0, eps, t, flow) + START["error"] * direction / rms(direction.tolist())
    x_t, entries = flow.add_noise(x0, eps, t), []
    for name in TARGETS:
        got = rp.convert(y, x_t, t, flow, source=source, to=name)
        error = rms((got - rp.target(name).encode(x0, eps, t, flow)).tolist())
        span = span_of(name, t)
        drawn = picture(f"convert-{name}", f"converted to {SHORT[name]}", greys(got.tolist(), -span, span))
        entries.append(captioned(drawn, SHORT[name], f"error {number(error)}", f"convert-{name}"))
    return f'<ul class="pictures">{"".join(entries)}</ul>'


def amplification_chart(of: str) -> str:
    flow = rp.RectifiedFlow()
    times = [round(0.01 * i, 2) for i in range(101)]
    frame = frame_of((0, 1), (0.01, 100))
    inner = _tensor(times[1:-1])
    lines = []
    for name in TARGETS:
        grown = getattr(rp.target(name).amplification(inner, flow), of).tolist()
        lines.append((name, times, [None, *grown, None]))
    words = {"x0": "x₀", "eps": "ε"}[of]
    return chart(
        f"grow-{of}",
        frame,
        lines,
        label=f"By what factor an error of each prediction counts in {words}, over time",
        x_label="time t: data at 0, noise at 1",
        x_ticks=[(v, f"{v:g}") for v in (0, 0.25, 0.5, 0.75, 1)],
        mark=START["convert_t"],
    )


# 3: weightings


def shown_at_first(name: str) -> bool:
    return name in ("x0", "eps", "velocity", "min_snr")


def through_one(values: Sequence[float]) -> list[float]:
    """Relative to the middle of the axis, λ = 0: a factor changes nothing."""
    return [v / values[len(values) // 2] for v in values]


def weight_chart(data: Data, kind: str) -> str:
    frame = frame_of((-10, 10), (1e-5, 1e5) if kind == "m_x" else (1e-4, 1e4))
    grid, lines = data["lambda"], [(e["name"], data["lambda"], through_one(e[kind])) for e in data["weightings"]]
    lines.append(("mine", grid, through_one(hybrid(grid, kind))))
    words = {"m_x": "Weight on the error of x₀", "w": "w, the weight on the error of ε times the density of λ"}
    drawn = chart(
        f"weight-{kind}",
        frame,
        lines,
        label=words[kind] + ", over log SNR, for each weighting",
        x_label="λ = log SNR: noise on the left, data on the right",
        x_ticks=[(v, str(v).replace("-", "−")) for v in (-10, -5, 0, 5, 10)],
    )
    for index, entry in enumerate(data["weightings"]):
        hidden = "" if shown_at_first(entry["name"]) else " hidden"
        drawn = drawn.replace(f'line of-{entry["name"]}"', f'line w{index}{hidden}"')
    return drawn


def hybrid(grid: Sequence[float], kind: str) -> list[float]:
    """L_x0 + L_eps on rectified flow with uniform times, what the page starts with."""
    objective = rp.Objective(rp.RectifiedFlow(), "x0", loss_space={"x0": 1, "eps": 1})
    levels = _tensor(grid)
    if kind == "m_x":
        return objective.weighting(objective.schedule.time_at(levels), objective.schedule).tolist()
    return rp.weightings.effective(objective, levels).tolist()


def drawn_with(entry: Data) -> str:
    """The schedule and the times of a weighting, in words."""
    schedule = {"rectified_flow": "flow", "cosine": "cosine", "ddpm": "DDPM"}[entry["schedule"]]
    given = entry["times_arguments"]
    times = entry["times"].replace("_", "-").replace("log-normal-sigma", "log-normal σ")
    return f"{schedule}, {times} times" + (f" ({given['mean']:g}, {given['std']:g})".replace("-", "−") if given else "")


def weighting_boxes(data: Data, formula: Callable[[str], str]) -> str:
    """One box a weighting: whether its curve is shown."""
    boxes = []
    for index, entry in enumerate(data["weightings"]):
        checked = " checked" if shown_at_first(entry["name"]) else ""
        swatched = swatch("w").replace("of-w", f"w{index}")
        boxes.append(
            f'<label><input type="checkbox" data-weighting="{escape(entry["name"])}"{checked} '
            f'aria-label="{escape(entry["label"])}, {drawn_with(entry)}">{swatched}'
            f"<span>{escape(entry['label'])} <small>{formula(entry['formula'])}, {drawn_with(entry)}</small></span>"
            "</label>"
        )
    return "".join(boxes)


# 4: training


def log_ticks(steps: Sequence[float]) -> list[tuple[float, str]]:
    low, high = min(steps), max(steps)
    return [(v, f"{v:,}".replace(",", " ")) for k in range(6) for m in (1, 3) if low <= (v := m * 10**k) <= high]


def middle(levels: Sequence[float]) -> int:
    return len(levels) // 2


def settings(data: Data) -> dict[str, tuple[str, dict[str, Data]]]:
    """The trainings of the digits that can be looked at: words, and a run for each target."""
    digits = data["dynamics"]["digits"]
    narrow, words = digits["narrow"], {"x0": "x₀", "eps": "ε", "velocity": "velocity", "hybrid": "x₀ + 0.1 ε"}
    found = {"wide": (f"width {digits['width']}, loss in velocity", digits["targets"])}
    for loss in narrow["losses"]:
        runs = {name: by_loss[loss] for name, by_loss in narrow["targets"].items()}
        found[loss] = (f"width {narrow['width']}, loss in {words[loss]}", runs)
    return found


def training_chart(data: Data, kind: str) -> str:
    """The digits' error at one noise level, or the loss that was trained with, over the steps."""
    every = [run for _, runs in settings(data).values() for run in runs.values()]
    runs, level = data["dynamics"]["digits"]["targets"], middle(data["dynamics"]["digits"]["levels"])
    if kind == "error":
        everything = [v for run in every for row in run["error"] for v in row]
        lines = [(name, run["steps"], [row[level] for row in run["error"]]) for name, run in runs.items()]
        label = "Squared error of x₀ over training steps, for each target"
    else:
        everything = [v for run in every for v in run["loss"]]
        lines = [(name, run["steps"], run["loss"]) for name, run in runs.items()]
        label = "The loss that was trained with, over training steps, for each target"
    steps = [step for run in every for step in run["steps"]]
    frame = frame_of((min(steps), max(steps)), around(everything), log_x=True)
    return chart(f"training-{kind}", frame, lines, label=label, x_label="training steps", x_ticks=log_ticks(steps))


DRAWN = 6


def drawn_digits(data: Data) -> str:
    """Some samples of every target."""
    rows = []
    for name, run in data["dynamics"]["digits"]["targets"].items():
        pictures = "".join(
            picture(f"drawn-{name}-{i}", f"sample {i + 1}", [shade(v) for v in run["samples"][i]]) for i in range(DRAWN)
        )
        score = f'<output data-out="frechet-{name}" aria-live="off">Fréchet {number(run["frechet"])}</output>'
        rows.append(f'<li><b>{swatch(name)}{SHORT[name]}</b><div class="row">{pictures}</div>{score}</li>')
    return f'<ul class="drawn">{"".join(rows)}</ul>'


def training_words(data: Data) -> str:
    """As the script has it for the level that is shown."""
    digits = data["dynamics"]["digits"]
    at = middle(digits["levels"])
    ends = ", ".join(f"{SHORT[name]} {number(run['error'][-1][at])}" for name, run in digits["targets"].items())
    return f"Error of x₀ at t = {digits['levels'][at]:.2f}, at the end of training: {ends}"


def frechet_table(data: Data) -> str:
    """Every setting and target: the distance of the samples from real digits."""
    every = settings(data)
    rows = []
    for name in data["dynamics"]["digits"]["targets"]:
        cells = "".join(f"<td>{number(runs[name]['frechet'])}</td>" for _, runs in every.values())
        rows.append(f'<tr><th scope="row">{SHORT[name]}</th>{cells}</tr>')
    floor = number(data["dynamics"]["digits"]["floor"]["frechet"])
    rows.append(f'<tr><th scope="row">real digits</th><td colspan="{len(every)}">{floor}</td></tr>')
    return table("Fréchet distances", "scores", ("target", *(words for words, _ in every.values())), "".join(rows))


SIDE = 180


def spiral_scale(data: Data) -> float:
    return 1.4 * max(abs(v) for point in data["dynamics"]["spiral"]["truth"] for v in point)


def dots(points: Sequence[Sequence[float]], scale: float) -> str:
    """One path of dots: round ends of lines without length."""
    inside = [(x, y) for x, y in points if abs(x) <= scale and abs(y) <= scale]
    return "".join(f"M{(x / scale + 1) * SIDE / 2:.1f} {(1 - y / scale) * SIDE / 2:.1f}h0" for x, y in inside)


def spiral_panels(data: Data) -> str:
    spiral = data["dynamics"]["spiral"]
    scale, dim = spiral_scale(data), str(spiral["dims"][0])
    truth = "M" + "L".join(
        f"{(x / scale + 1) * SIDE / 2:.1f} {(1 - y / scale) * SIDE / 2:.1f}" for x, y in spiral["truth"]
    )
    panels = []
    for name, run in spiral["runs"][dim].items():
        panels.append(
            f'<li><b>{SHORT[name]}</b><svg class="spiral" viewBox="0 0 {SIDE} {SIDE}" width="{SIDE}" height="{SIDE}" '
            f'role="img" aria-label="Samples of the model that predicts {SHORT[name]}, and the true spiral">'
            f'<path class="truth" d="{truth}"/>'
            f'<path class="dots of-{name}" data-dots="{name}" d="{dots(run["points"], scale)}"/></svg>'
            f"{spiral_words(name, run, scale)}</li>"
        )
    return f'<ul class="pictures spirals">{"".join(panels)}</ul>'


def spiral_words(name: str, run: Data, scale: float) -> str:
    outside = sum(1 for x, y in run["points"] if abs(x) > scale or abs(y) > scale)
    entries = {
        "off": ("off the plane", number(run["off_manifold"])),
        "from": ("from the curve", number(run["manifold_distance"])),
        "out": ("outside the picture", f"{outside} of {len(run['points'])}"),
    }
    lines = "".join(
        f'<div><dt>{words}</dt><dd><output data-out="spiral-{key}-{name}" aria-live="off">{value}</output></dd></div>'
        for key, (words, value) in entries.items()
    )
    return f"<dl>{lines}</dl>"


def spiral_chart(data: Data) -> str:
    spiral = data["dynamics"]["spiral"]
    lines = []
    for name in spiral["runs"][str(spiral["dims"][0])]:
        # In its own plane nothing is off it but by rounding, and the axis has no zero.
        values = [v if (v := spiral["runs"][str(d)][name]["off_manifold"]) > 1e-9 else None for d in spiral["dims"]]
        lines.append((name, spiral["dims"], values))
    frame = frame_of(
        (spiral["dims"][0], spiral["dims"][-1]), around(v for _, _, values in lines for v in values), log_x=True
    )
    return chart(
        "off-plane",
        frame,
        lines,
        label="Distance of the samples from the plane, over the dimension, for each target",
        x_label="dimension D the spiral is seen in",
        x_ticks=[(d, str(d)) for d in spiral["dims"]],
        mark=spiral["dims"][0],
    )


def spiral_training(data: Data) -> str:
    """The error at the middle noise level over the steps, and the least there can be."""
    spiral = data["dynamics"]["spiral"]
    runs = spiral["runs"][str(spiral["dims"][0])]
    every = [run for by_target in spiral["runs"].values() for run in by_target.values()]
    least = spiral["ideal_by_dim"][str(spiral["dims"][0])][spiral["levels"].index(spiral["level"])]
    steps = [step for run in every for step in run["steps"]]
    frame = frame_of((min(steps), max(steps)), around([least / 2, *(v for r in every for v in r["error"])]), log_x=True)
    lines = [(name, run["steps"], run["error"]) for name, run in runs.items()]
    lines.append(("ideal", [min(steps), max(steps)], [least, least]))
    label = "Squared error of x₀ over training steps, for each target, and the least there can be"
    return chart("spiral-error", frame, lines, label=label, x_label="training steps", x_ticks=log_ticks(steps))


# 5: sampling


PEEKS = {"x": "its input xₜ", "raw": "its raw output", "x0": "its belief of x₀"}


def peek_start(data: Data) -> int:
    return round(0.4 * (len(data["sampling"]["t"]) - 1))


def sampling_table(data: Data) -> str:
    runs, at = data["sampling"]["runs"], peek_start(data)
    head = "".join(f'<th scope="col">{SHORT[name]}</th>' for name in runs)
    rows = []
    for kind, words in PEEKS.items():
        cells = []
        for name, run in runs.items():
            levels, final = run[kind][0][at], run["x0"][0][-1]
            label = f"{words}, of the model that predicts {SHORT[name]}"
            drawn = picture(f"peek-{kind}-{name}", label, [shade(v) for v in levels])
            r = f'<output data-out="peek-{kind}-{name}" aria-live="off">{signed(correlation(levels, final))}</output>'
            cells.append(f"<td>{drawn}{r}</td>")
        rows.append(f'<tr><th scope="row">{words}</th>{"".join(cells)}</tr>')
    return (
        '<table class="peek" aria-label="What each model sees, says and believes">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def away_words(data: Data) -> str:
    """As the script has it for the step that is shown."""
    sampling, at = data["sampling"], peek_start(data)
    away = ", ".join(f"{SHORT[name]} {number(run['away'][at])}" for name, run in sampling["runs"].items())
    return f"Distance of the believed x₀ from the end at t = {sampling['t'][at]:.2f}: {away}"


def agreement(data: Data, name: str, at: int) -> float:
    """The correlation of a model's belief with that of x0, averaged over the samples that are shown."""
    ours, theirs = (data["sampling"]["runs"][n]["x0"] for n in (name, "x0"))
    return sum(correlation(a[at], b[at]) for a, b in zip(ours, theirs, strict=True)) / len(ours)


def signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def away_chart(data: Data) -> str:
    """How far the believed x0 is from the final sample, over the time of sampling."""
    sampling = data["sampling"]
    lines = [(name, sampling["t"], run["away"]) for name, run in sampling["runs"].items()]
    frame = frame_of((0, 1), around(v for run in sampling["runs"].values() for v in run["away"] if v > 1e-3))
    return chart(
        "away",
        frame,
        lines,
        label="Distance of the believed x₀ from the final sample, over time, for each target",
        x_label="time t: sampling goes from right to left",
        x_ticks=[(v, f"{v:g}") for v in (0, 0.25, 0.5, 0.75, 1)],
        mark=sampling["t"][peek_start(data)],
    )


# 6: confidence


MAPS = {"x0": "the digit", "x_t": "with noise", "mean": "its mean", "std": "its doubt", "error": "its error"}


def confidence_pictures(data: Data) -> str:
    example = data["confidence"]["examples"][0]
    entries = []
    for kind, words in MAPS.items():
        fills = [heat(v) if kind in ("std", "error") else shade(v) for v in example[kind]]
        told = sure_words(example, kind, data["confidence"]["full_scale"])
        entries.append(captioned(picture(f"sure-{kind}", words, fills), words, told, f"sure-{kind}"))
    return f'<ul class="pictures">{"".join(entries)}</ul>'


def sure_words(example: Data, kind: str, full_scale: float) -> str:
    if kind in ("std", "error"):
        return f"rms {number(full_scale / 255 * rms(example[kind]))}"
    return f"t = {example['t']:.2f}" if kind == "x_t" else f"a {example['label']}" if kind == "x0" else ""


def example_correlation(data: Data) -> str:
    example = data["confidence"]["examples"][0]
    return f"Over these 64 pixels the two maps correlate by {signed(correlation(example['std'], example['error']))}."


def reliability_chart(data: Data) -> str:
    """Stated against found: pixels in groups by what was stated."""
    measured = data["confidence"]["reliability"]
    low, high = around(v for entry in measured for key in ("stated", "found") for v in entry[key])
    lines: list[tuple[str, Sequence[float], Sequence[float]]] = [("ideal", [low, high], [low, high])]
    lines += [(f"level{i}", entry["stated"], entry["found"]) for i, entry in enumerate(measured)]
    return chart(
        "reliability",
        frame_of((low, high), (low, high), log_x=True),
        lines,
        label="Error found against standard deviation stated, for three noise levels; the diagonal is honest",
        x_label="standard deviation the model states",
        x_ticks=decades(low, high),
    )


def reliability_table(data: Data) -> str:
    measures = (
        "mean of (error/std)²",
        "in the 50 % interval",
        "in the 90 % interval",
        "correlation",
        "beyond position",
    )
    rows = []
    for i, entry in enumerate(data["confidence"]["reliability"]):
        shares = (f"{100 * entry[key]:.0f} %" for key in ("inside_50", "inside_90"))
        cells = (number(entry["z2"]), *shares, signed(entry["correlation"]), signed(entry["beyond_position"]))
        listed = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{swatch(f"level{i}")}t = {entry["t"]:.2f}</th>{listed}</tr>')
    return table("How honest the model is", "scores", ("noise", *measures), "".join(rows))


# 7: the summary


def growth() -> dict[tuple[str, str, str], float]:
    """By how much an error of each target counts in x0 at much noise, and in ε at little, on rectified flow."""
    found, flow = {}, rp.RectifiedFlow()
    for name in TARGETS:
        for of, t in (("x0", 0.9), ("eps", 0.1)):
            found[name, of, f"{t}"] = float(getattr(rp.target(name).amplification(t, flow), of))
    return found


def leading(figure: str, controls: str, words: str | None) -> str:
    """A link to a figure, which sets its controls; a dash for what was not measured."""
    asked = f' data-set="{controls}"' if controls else ""
    return f'<a href="#{figure}"{asked}>{words}</a>' if words else "–"


def summary(data: Data) -> str:
    """The rows of the last table: each number leads to its figure, and sets its controls."""
    digits, spiral, grown = data["dynamics"]["digits"], data["dynamics"]["spiral"]["runs"], growth()
    rows, at = [], digits["levels"].index(0.1)
    for name in TARGETS:
        narrow, wide = digits["narrow"]["targets"].get(name), digits["targets"].get(name)
        far, near, peeked = spiral["512"].get(name), spiral["2"].get(name), data["sampling"]["runs"].get(name)
        one = f"source={name} convert-error=1 convert-schedule=rectified_flow convert-t"
        cells = [
            ("fig-convert", f"{one}=0.9", f"×{number(grown[name, 'x0', '0.9'])}"),
            ("fig-convert", f"{one}=0.1", f"×{number(grown[name, 'eps', '0.1'])}"),
            ("fig-frechet", "", narrow and number(narrow["velocity"]["frechet"])),
            ("fig-frechet", "", wide and number(wide["frechet"])),
            ("fig-digits", f"setting=wide level={at}", wide and number(wide["error"][-1][at])),
            ("fig-spiral", f"dim={len(spiral) - 1}", far and number(far["off_manifold"])),
            ("fig-spiral", "dim=0", near and number(near["manifold_distance"])),
            ("fig-peek", "peek-at=0", peeked and number(peeked["away"][0])),
        ]
        linked = "".join(f"<td>{leading(*cell)}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{SHORT[name]}</th>{linked}</tr>')
    return "".join(rows)
