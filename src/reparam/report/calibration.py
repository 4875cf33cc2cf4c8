"""How honest the variances are that models state: by noise level, in words, as charts and as numbers."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from ..metrics.calibration import LOST
from . import plots
from .charts import CUT, Line, line_chart
from .curves import grid, legend
from .plots import escape, number
from .rows import Entry, Study

#: Up to so far from 1 a mean z² is called honest, however surely it is not 1.
_NEAR = 0.1
#: Above this a mean z² is named even where it may be chance.
_FAR = 2.0
#: A 99 % interval that surely holds less than this is too narrow. Posteriors of several modes whose variance is
#: honest may come near it: they are no Gaussians.
_WIDEST, _TOO_FEW = "0.99", 0.95
#: A mean z² more than so many times the median of its samples is told with that.
_FAR_APART = 4.0
_NLL = {"nll": "−log q", "gaussian_nll": "of the best Gaussian", "exact_nll": "of the truth"}

_ON_COVERAGE = (
    "How many of the central intervals that a model states for each number of x0 hold it. The calibration error is the "
    "mean distance of that share from the nominal one, over noise levels and intervals of 5 %, 10 %, … 95 %."
)
_ON_LIKELIHOODS = "How likely the model finds the x0 that was there, by noise level: smaller is better."


@dataclass(frozen=True)
class _Judged:
    """What was found of an entry: the mean over its runs, as the plain data of :class:`reparam.metrics.Calibration`.

    Attributes:
        runs: z² by noise level of each run, where there are several.
    """

    entry: Entry
    edges: list[float]
    bins: list[dict[str, Any]]
    total: dict[str, Any]
    runs: list[list[float]]

    @property
    def centres(self) -> list[float]:
        return [(a + b) / 2 for a, b in itertools.pairwise(self.edges)]

    @property
    def name(self) -> str:
        """Its label with its mark (HTML)."""
        return f"{plots.swatch(self.entry.series)}<span>{escape(self.entry.label)}</span>"

    def line(self) -> Line:
        """z² by noise level."""
        runs = [(self.centres, z2) for z2 in self.runs] if len(self.runs) > 1 else []
        return Line(self.entry.series, self.entry.label, self.centres, _values(self.bins, "z2"), runs)


def _values(bins: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [one[name]["value"] for one in bins]


def _judged(entry: Entry) -> _Judged | None:
    """What was found of an entry; of runs with other noise levels than the first, nothing."""
    found = [row["calibration"] for row in entry.finished if isinstance(row.get("calibration"), dict)]
    found = [one for one in found if one.get("edges_t") == found[0].get("edges_t")]
    if not found:
        return None
    mean = _mean(found)
    runs = [_values(one["bins"], "z2") for one in found]
    return _Judged(entry, mean["edges_t"], mean["bins"], mean["total"], runs)


def _mean(found: Sequence[Any]) -> Any:
    """Plain data of one form, averaged number by number.

    Standard errors too: seeds are judged on the same data and noise, so that more of them do not lessen these errors.
    """
    first = found[0]
    if isinstance(first, dict):
        return {key: _mean([one[key] for one in found]) for key in first if all(key in one for one in found)}
    if isinstance(first, list):
        return [_mean(list(parts)) for parts in zip(*found, strict=True)]
    return None if any(one is None for one in found) else statistics.fmean(found)


def of_another(entry: Entry) -> str | None:
    """Of what else than x0 an entry's likelihood is; None where it is of x0, or there is none."""
    target = entry.shown.get("target")
    if not isinstance(target, dict) or target.get("name") != "gaussian":
        return None
    of = str(target.get("of", "x0"))
    return None if of == "x0" else of


def calibration_section(study: Study) -> str:
    """The section "Calibration"; empty where no model has a likelihood (HTML)."""
    groups = {data: [j for e in entries if (j := _judged(e)) is not None] for data, entries in study.groups.items()}
    groups = {data: judged for data, judged in groups.items() if judged}
    several = len(study.groups) > 1
    told = [_sentence(j, several) for judged in groups.values() for j in judged]
    told += [_left_out(e, several) for e in study.entries if e.finished and of_another(e) and _judged(e) is None]
    if not told:
        return ""
    words = "".join(f"<li>{sentence}</li>" for sentence in told)
    return (
        '<section><h2 id="calibration">Calibration</h2>'
        "<p>Whether the variance that a model states beside its mean is as large as its error, on held-out data. z² is "
        "the squared error over that variance, in the mean: 1 (dotted) where the model is honest; above, it says less "
        f'than its error; below, more.</p><ul class="words">{words}</ul>{_found(study, groups)}</section>'
    )


def _found(study: Study, groups: dict[str, list[_Judged]]) -> str:
    """Charts and tables of what was found on each data set (HTML)."""
    if not groups:
        return ""
    lines = [j.line() for judged in groups.values() for j in judged]
    figures = [_chart(data, [j.line() for j in judged]) for data, judged in groups.items()]
    coverage = "".join(_by_entry(data, judged) for data, judged in groups.items())
    likelihoods = "".join(_likelihoods(data, part) for data, judged in groups.items() for part in _alike(judged))
    numbers = "".join(_by_level(j) for judged in groups.values() for j in judged)
    return (
        f"{legend(study, lines)}{grid(figures)}{_part(_ON_COVERAGE, coverage)}{_part(_ON_LIKELIHOODS, likelihoods)}"
        f"<details><summary>All by noise level, as numbers</summary>{numbers}</details>"
    )


def _named(entry: Entry, several: bool) -> str:
    return f"<b>{escape(entry.label)}</b>" + (f" on {escape(entry.data)}" if several else "")


def _left_out(entry: Entry, several: bool) -> str:
    """Why an entry with a likelihood is not judged (HTML)."""
    of = escape(of_another(entry))
    return (
        f"{_named(entry, several)}: not judged, for it states no variance of x0: its likelihood is of another noisy "
        f"sample (of: {of}); {LOST}. With of: x0 it is judged."
    )


def _part(words: str, tables: str) -> str:
    return f'<div class="strip"><p class="about">{words}</p>{tables}</div>'


def _sentence(judged: _Judged, several: bool) -> str:
    """At which noise levels a model is too sure of itself or too careful (HTML)."""
    z2, edges = _values(judged.bins, "z2"), judged.edges
    spans = [one["z2_interval"] for one in judged.bins]
    beyond = [low > 1 and value > 1 + _NEAR for value, (low, _) in zip(z2, spans, strict=True)]
    narrow = _too_narrow(judged)
    less = [a or b for a, b in zip(beyond, narrow, strict=True)]
    more = [high < 1 and value < 1 - _NEAR for value, (_, high) in zip(z2, spans, strict=True)]
    unsure = [value > _FAR and not one for value, one in zip(z2, less, strict=True)]
    parts = []
    if any(less):
        words = f"says less than its error (overconfident) {_where(less, edges)}"
        words += f", {_largest(judged, beyond)}" if any(beyond) else ""
        parts.append(words + (f", and {_held(judged, narrow)}" if any(narrow) else ""))
    if any(more):
        worst = number(min(z2))
        parts.append(f"says more than its error (underconfident) {_where(more, edges)}, z² down to {worst}")
    if any(unsure):
        parts.append(f"may be overconfident {_where(unsure, edges)}, {_largest(judged, unsure)}, or so by chance")
    if not parts:
        span = f"{number(min(z2))} to {number(max(z2))}"
        parts.append(f"as far as can be told honest at every noise level, z² from {span}")
    return f"{_named(judged.entry, several)}: {'; '.join(parts)}."


def _too_narrow(judged: _Judged) -> list[bool]:
    """In which bins the widest interval surely holds too few (95 % for all bins together)."""
    far = NormalDist().inv_cdf(1 - 0.025 / len(judged.bins))
    held = [one["coverage"].get(_WIDEST) for one in judged.bins]
    return [one is not None and one["value"] + far * one["error"] < _TOO_FEW for one in held]


def _largest(judged: _Judged, among: Sequence[bool]) -> str:
    """The largest mean z² of some bins, with the median of its samples where that is far less."""
    worst = max(itertools.compress(judged.bins, among), key=lambda one: one["z2"]["value"])
    value, median = worst["z2"]["value"], worst.get("z2_median")
    words = f"z² up to {number(value)}"
    if median is not None and value > _FAR_APART * median:
        words += f" in the mean (below {number(median)} for half of the samples)"
    return words


def _held(judged: _Judged, among: Sequence[bool]) -> str:
    """The least that the widest interval holds in some bins."""
    held = (one["coverage"][_WIDEST] for one in itertools.compress(judged.bins, among))
    worst = min(held, key=lambda one: one["value"])
    share = f"{100 * worst['value']:.1f} ± {100 * worst['error']:.1f} %"
    return f"as little as {share} inside its {100 * float(_WIDEST):g} % interval"


def _where(which: Sequence[bool], edges: Sequence[float]) -> str:
    """The noise levels of some bins, in words."""
    if all(which):
        return "at every noise level"
    places = []
    for flag, group in itertools.groupby(range(len(which)), key=lambda k: which[k]):
        k = list(group)
        low, high = f"{edges[k[0]]:.3g}", f"{edges[k[-1] + 1]:.3g}"
        if flag and k[0] == 0:
            places.append(f"below t = {high}")
        elif flag:
            places.append(f"above t = {low}" if k[-1] == len(which) - 1 else f"from t = {low} to {high}")
    return " and ".join(places)


def _chart(data: str, lines: Sequence[Line]) -> str:
    """z² by noise level on one data set (HTML)."""
    drawn = [line for line in lines if all(0 < y < math.inf for y in line.y)]
    label = f"Squared error over stated variance by noise level on {data}: {', '.join(line.label for line in drawn)}"
    picture = line_chart(drawn, label=label, x_words="noise level t", x_end=1.0, ends=("data", "noise"), markers=10)
    beyond = [f"{escape(line.label)} goes up to {number(max(line.y))}" for line in drawn if max(line.y) > CUT]
    note = f" <small>{', '.join(beyond)}</small>" if beyond else ""
    return f'<figure class="chart"><figcaption><b>{escape(data)}</b> z²{note}</figcaption>{picture}</figure>'


def _with_error(measured: dict[str, float], percent: bool = False) -> str:
    if percent:
        return f"{100 * measured['value']:.1f} %<small>± {100 * measured['error']:.1f}</small>"
    return f"{number(measured['value'])}<small>± {number(measured['error'])}</small>"


def _mostly(judged: _Judged) -> str:
    """Which bin makes up more than half of the mean z² over all, and what the others' is (HTML)."""
    parts = [one["n"] * one["z2"]["value"] for one in judged.bins]
    k = max(range(len(parts)), key=parts.__getitem__)
    if len(parts) < 3 or 2 * parts[k] <= math.fsum(parts):
        return ""
    rest = math.fsum(parts[:k] + parts[k + 1 :]) / (sum(one["n"] for one in judged.bins) - judged.bins[k]["n"])
    where = _where([i == k for i in range(len(parts))], judged.edges)
    return f"<small>mostly {where}:</small><small>{number(rest)} without</small>"


def _table(caption: str, label: str, heads: Sequence[str], rows: Iterator[tuple[str, str, list[str]]]) -> str:
    """A table of numbers: the class of each row, its head (HTML) and its cells (HTML)."""
    head = "".join(f'<th scope="col"{" class=n" if i else ""}>{words}</th>' for i, words in enumerate(heads))
    body = ""
    for kind, name, cells in rows:
        values = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        body += f'<tr{f" class={kind}" if kind else ""}><th scope="row">{name}</th>{values}</tr>'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}, scrolls sideways"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _by_entry(data: str, judged: Sequence[_Judged]) -> str:
    """Coverage and calibration error by target (HTML)."""
    shares = list(judged[0].total["coverage"])

    def rows() -> Iterator[tuple[str, str, list[str]]]:
        for j in judged:
            covered = [_with_error(j.total["coverage"][p], percent=True) for p in shares]
            chance = f"<small>by chance {number(j.total['calibration_floor'])}</small>"
            error = number(j.total["calibration_error"]) + chance
            yield "", j.name, [*covered, error, _with_error(j.total["z2"]) + _mostly(j)]
        nominal = [f"{100 * float(p):g} %" for p in shares]
        yield "floor", "an honest Gaussian", [*nominal, "0", "1"]

    heads = ["target", *(f"inside the {100 * float(p):g} % interval" for p in shares), "calibration error", "z²"]
    return _table(f"{data}: over all noise levels", f"Coverage on {data}", heads, rows())


def _alike(judged: Sequence[_Judged]) -> list[list[_Judged]]:
    """Those of the same noise levels, together."""
    found: dict[tuple[float, ...], list[_Judged]] = {}
    for j in judged:
        found.setdefault(tuple(j.edges), []).append(j)
    return list(found.values())


def _likelihoods(data: str, judged: Sequence[_Judged]) -> str:
    """The likelihood of x0 by noise level: of each target, of the best Gaussian and of the truth (HTML)."""
    first = judged[0]

    def rows() -> Iterator[tuple[str, str, list[str]]]:
        for j in judged:
            yield "", j.name, [number(v) for v in (*_values(j.bins, "nll"), j.total["nll"]["value"])]
        for name, words in (("gaussian_nll", "the best Gaussian"), ("exact_nll", "the truth")):
            if first.total[name] is not None:
                values = (*_values(first.bins, name), first.total[name]["value"])
                yield "floor", words, [number(v) for v in values]

    heads = ["t", *(f"{t:.2f}" for t in first.centres), "all"]
    caption = f"{data}: −log q(x0 | x_t), nats an element"
    return _table(caption, f"Likelihood by noise level on {data}", heads, rows())


def _by_level(judged: _Judged) -> str:
    """All that was found of a target, a line a noise level (HTML)."""
    shares = list(judged.total["coverage"])
    known = [name for name in _NLL if judged.total[name] is not None]
    median = "z2_median" in judged.total

    def rows() -> Iterator[tuple[str, str, list[str]]]:
        levels = [f"{low:.2f} … {high:.2f}" for low, high in itertools.pairwise(judged.edges)]
        for level, one in zip([*levels, "all"], [*judged.bins, judged.total], strict=True):
            covered = [_with_error(one["coverage"][p], percent=True) for p in shares]
            rest = [number(one[name]["value"]) for name in ("var", "mse")]
            error = number(one["calibration_error"])
            likelihoods = [_with_error(one[name]) for name in known]
            medians = [number(one["z2_median"])] if median else []
            yield "", level, [_with_error(one["z2"]), *medians, *rest, *covered, error, *likelihoods]

    heads = [
        "t",
        "z²",
        *(["its median"] if median else []),
        "stated variance",
        "squared error",
        *(f"inside {100 * float(p):g} %" for p in shares),
    ]
    heads += ["calibration error", *(_NLL[name] for name in known)]
    of = f"{judged.entry.label} on {judged.entry.data}"
    return _table(of, f"Calibration of {of}", heads, rows())
