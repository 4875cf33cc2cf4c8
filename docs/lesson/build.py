"""Put the lesson into one file that needs nothing else: ``python docs/lesson/build.py OUT.html``.

Text and quiz come from page.html and quiz.json, numbers from data.json, the first state of every figure from
figures.py. In the text ``$…$`` and ``$$…$$`` are formulas, which become MathML, ``{{name}}`` is a figure, and
``{{path:to:number}}`` a number of data.json, ``|g`` behind it a format.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

HERE = Path(__file__).parent
sys.path.append(str(HERE))

import figures  # noqa: E402

import reparam as rp  # noqa: E402

LIMIT = 3_000_000
#: What the script reads of the data.
SCRIPTED = ("digits", "noise", "schedules", "lambda", "dynamics", "sampling", "confidence")
_FORMULA = re.compile(r"\$\$(.+?)\$\$|(\(?)\$(.+?)\$([.,:;)]*)", re.S)
_FIELD = re.compile(r"\{\{([^{}]+)\}\}")


class LessonError(Exception):
    """The page cannot be made; the message says why."""


def formula(latex: str, display: bool = False) -> str:
    """MathML, with its source as the text for those who cannot see it."""
    latex = html.unescape(latex).strip()
    if _FIELD.search(latex):
        raise LessonError(f"{latex!r}: a field cannot stand in a formula, it is filled in later")
    try:
        element = convert(latex, display="block" if display else "inline")
    except Exception as error:  # the converter has no base class for what it raises
        raise LessonError(f"the formula {latex!r} cannot be read: {error!r}") from error
    if "\\" in element:
        raise LessonError(f"the formula {latex!r} has a command that is not known")
    element = element.replace("<math ", f'<math alttext="{html.escape(latex)}" ', 1)
    return f'<div class="formula">{element}</div>' if display else element


def with_formulas(text: str) -> str:
    """Formulas in place of their source; a stop behind one does not begin a line."""

    def made(match: re.Match[str]) -> str:
        if match[1]:
            return formula(match[1], True)
        before, after = match[2], match[4]
        inline = before + formula(match[3]) + after
        return f'<span class="nowrap">{inline}</span>' if before or after else inline

    return _FORMULA.sub(made, text)


def with_named_figures(text: str) -> str:
    """Each figure is called by its number, which its caption begins with."""
    return re.sub(
        r'<figure id="([\w-]+)">(.*?)<figcaption><b>',
        r'<figure id="\1" aria-labelledby="\1-name">\2<figcaption><b id="\1-name">',
        text,
        flags=re.S,
    )


def filled(template: str, fields: dict[str, str], data: dict[str, Any]) -> str:
    """The template with its fields; what is filled in is not searched again."""

    def field(match: re.Match[str]) -> str:
        name = match[1]
        if name in fields:
            return fields[name]
        if ":" not in name:
            raise LessonError(f"page.html asks for {{{{{name}}}}}, which there is no figure for")
        path, _, shape = name.partition("|")
        number = number_at(data, path.split(":"))
        return format(number, shape) if shape else whole(number)

    return _FIELD.sub(field, template)


def whole(number: float) -> str:
    """A number of the data in full: what is small is measured here, and not 0."""
    if isinstance(number, int):
        return f"{number:,}"
    return figures.scientific(number) if 0 < abs(number) < 1e-3 else figures.number(number)


def number_at(data: Any, path: list[str]) -> float:
    """A number by the names on the way to it; an entry of a list has its place or its id for a name."""
    found = data
    for key in path:
        try:
            if isinstance(found, list):
                named = {entry.get("id"): entry for entry in found if isinstance(entry, dict)}
                found = named[key] if key in named else found[int(key)]
            else:
                found = found[key]
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise LessonError(f"data.json has no {':'.join(path)}: make it anew with data.py") from error
    if not isinstance(found, int | float):
        raise LessonError(f"{':'.join(path)} of data.json is no number but {found!r}")
    return found


def spoken(text: str) -> str:
    """A question or an option as the name of its field: browsers leave formulas out of the names that they make."""
    signs = {r"\varepsilon": "ε", r"\alpha": "α", r"\sigma": "σ", r"\,": " ", "_0": "₀", "^2": "²", "-": "−"}

    def said(match: re.Match[str]) -> str:
        words = match[1]
        for sign, character in signs.items():
            words = words.replace(sign, character)
        if re.search(r"[\\^_{}]", words):
            raise LessonError(f"{text!r} has a formula that cannot be said in words: give it another, “spoken”")
        return words

    return html.escape(re.sub(r"\$(.+?)\$", said, text))


def question(index: int, entry: dict[str, Any]) -> str:
    """A question with its options; without the script its answers open in place."""
    options, answers = [], []
    for number, option in enumerate(entry["options"]):
        right = number == entry["right"]
        marks = " data-right" if right else ""
        if "$" in option["text"]:
            marks += f' aria-label="{spoken(option["text"])}"'
        options.append(
            f'<label><input type="radio" name="question-{index}" value="{number}"{marks}>'
            f"<span>{option['text']}</span></label>"
        )
        answers.append(f"<li><b>{'Right.' if right else 'Not so.'}</b> {option['why']}</li>")
    words = spoken(entry.get("spoken", entry["question"]))
    name = f' aria-label="{index}. {words}"' if "$" in entry["question"] else ""
    return (
        f'<fieldset class="question" id="question-{index}"{name}><legend><b>{index}.</b> {entry["question"]}</legend>'
        f"{''.join(options)}"
        f"<details><summary>All answers, explained</summary><ol>{''.join(answers)}</ol></details>"
        '<button type="button" class="check">Check</button><p class="why" role="status"></p></fieldset>'
    )


def quiz(entries: list[dict[str, Any]]) -> str:
    for entry in entries:
        if not 3 <= len(entry["options"]) <= 4 or not 0 <= entry["right"] < len(entry["options"]):
            raise LessonError(f"a question needs three or four options, one of them right: {entry['question']!r}")
    return with_formulas("".join(question(i, entry) for i, entry in enumerate(entries, 1)))


def table_of_results(data: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(row['claim'])}</td><td>{html.escape(_listed(row['numbers']))}</td>"
        f"<td><code>{html.escape(row['command'])}</code></td></tr>"
        for row in data["results"]["rows"]
    )
    return figures.table("How to make the figures", "results", ("figure", "numbers", "how to make it"), rows)


def _listed(numbers: Any) -> str:
    if isinstance(numbers, dict):
        return ", ".join(f"{name} {_listed(value)}" for name, value in numbers.items())
    if isinstance(numbers, list):
        return " ".join(_listed(value) for value in numbers)
    return whole(numbers) if isinstance(numbers, int | float) else str(numbers)


def choices(data: dict[str, Any]) -> dict[str, str]:
    """What the menus of the page offer."""
    start = figures.START
    digits = figures.options(((i, str(d["label"])) for i, d in enumerate(data["digits"])), start["digit"])
    noise = figures.options(((i, f"draw {i + 1}") for i in range(len(data["noise"]))), start["noise"])
    schedules = figures.options(((k, s["label"]) for k, s in data["schedules"].items()), "rectified_flow")
    samples = figures.options(((i, f"sample {i + 1}") for i in range(len(data["sampling"]["runs"]["x0"]["x"]))), 0)
    levels, dims = data["dynamics"]["digits"]["levels"], data["dynamics"]["spiral"]["dims"]
    times = data["sampling"]["t"]
    examples = [(i, f"{e['label']} at t = {e['t']:.2f}") for i, e in enumerate(data["confidence"]["examples"])]
    return {
        "digits": digits,
        "draws": noise,
        "schedules": schedules,
        "settings": figures.options(((k, words) for k, (words, _) in figures.settings(data).items()), "wide"),
        "samples": samples,
        "examples": figures.options(examples, 0),
        "level_last": str(len(levels) - 1),
        "level_first": str(figures.middle(levels)),
        "level_words": f"t = {levels[figures.middle(levels)]:.2f}",
        "dim_last": str(len(dims) - 1),
        "dim_words": f"D = {dims[0]}",
        "peek_last": str(len(times) - 1),
        "peek_first": str(figures.peek_start(data)),
        "peek_words": f"t = {times[figures.peek_start(data)]:.2f}",
    }


def drawings(data: dict[str, Any]) -> dict[str, str]:
    """Every figure of the page by its name in page.html."""
    trained = figures.legend((n, figures.SHORT[n]) for n in data["dynamics"]["digits"]["targets"])
    spiral = [(name, figures.SHORT[name]) for name in data["dynamics"]["spiral"]["runs"]["2"]]
    return {
        "noise_pictures": figures.noise_pictures(data, formula),
        "convert_pictures": figures.convert_pictures(data),
        "grow_x0": figures.amplification_chart("x0"),
        "grow_eps": figures.amplification_chart("eps"),
        "legend": figures.legend((n, figures.SHORT[n]) for n in figures.TARGETS),
        "weight_boxes": figures.weighting_boxes(data, formula),
        "weight_m_x": figures.weight_chart(data, "m_x"),
        "weight_w": figures.weight_chart(data, "w"),
        "training_error": figures.training_chart(data, "error"),
        "training_loss": figures.training_chart(data, "loss"),
        "training_legend": trained,
        "training_words": figures.training_words(data),
        "away_words": figures.away_words(data),
        "drawn": figures.drawn_digits(data),
        "frechet": figures.frechet_table(data),
        "spirals": figures.spiral_panels(data),
        "spiral_training": figures.spiral_training(data),
        "spiral_legend": figures.legend([*spiral, ("ideal", "the least there can be")]),
        "off_plane": figures.spiral_chart(data),
        "peek": figures.sampling_table(data),
        "away": figures.away_chart(data),
        "confidence": figures.confidence_pictures(data),
        "example_correlation": figures.example_correlation(data),
        "reliability": figures.reliability_chart(data),
        "reliability_table": figures.reliability_table(data),
        "summary": figures.summary(data),
        "results": table_of_results(data),
    }


def measured(data: dict[str, Any]) -> dict[str, str]:
    """Numbers of the text that are computed here."""
    names, steps = ("eps", "v", "velocity"), (0, 10)
    agree = {f"agree_{n}_{at}": figures.signed(figures.agreement(data, n, at)) for n in names for at in steps}
    grown = {f"grow_{target}_{of}_{t}": figures.number(v) for (target, of, t), v in figures.growth().items()}
    # There an error of velocity counts most: where DDPM's table ends.
    last = rp.target("velocity").amplification(1.0, rp.schedule("ddpm")).x0
    return grown | agree | {"grow_velocity_ddpm": figures.number(float(last))}


def embedded(data: dict[str, Any]) -> str:
    """JSON that ends no script element."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def page(data: dict[str, Any], home: str | None = None) -> str:
    """The whole page.

    Args:
        data: what data.json holds.
        home: the address of the site it is a page of, which is linked to; without one it stands alone.

    Raises:
        LessonError: if a formula, a figure or a number is not to be had.
    """
    template, style, script, questions = (
        (HERE / name).read_text(encoding="utf-8") for name in ("page.html", "lesson.css", "lesson.js", "quiz.json")
    )
    noted = (data["dynamics"]["digits"], data["sampling"], data["confidence"])
    fields = {
        "style": style,
        "script": script,
        "style_hash": _digest(style),
        "script_hash": _digest(script),
        "data": embedded({key: data[key] for key in SCRIPTED}),
        "home": f'<a href="{html.escape(home)}">All of the documentation</a>' if home else "",
        "quiz": quiz(json.loads(questions)),
        "notes": "</p><p>".join(html.escape(part["note"]) for part in noted),
        **{key: html.escape(str(data["made"][key])) for key in ("command", "date", "hardware", "version")},
    }
    text = with_named_figures(with_formulas(template))
    return filled(text, fields | choices(data) | drawings(data) | measured(data), data)


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("out", type=Path, help="the page, such as lesson.html")
    parser.add_argument("--data", type=Path, default=HERE / "data.json", help="the numbers (default: %(default)s)")
    parser.add_argument("--home", help="link to this address as the documentation")
    given = parser.parse_args(arguments)
    try:
        written = page(json.loads(given.data.read_text(encoding="utf-8")), given.home)
        size = len(written.encode())
        if size > LIMIT:
            raise LessonError(f"the page has {size:,} bytes, more than {LIMIT:,}: round the numbers of data.json")
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(written, encoding="utf-8")
    except (LessonError, OSError, json.JSONDecodeError) as error:
        print(f"the lesson was not made: {error}", file=sys.stderr)
        return 2
    except KeyError as error:
        print(f"the lesson was not made: {given.data} lacks {error}; make it anew with data.py", file=sys.stderr)
        return 2
    print(f"{given.out}: {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
