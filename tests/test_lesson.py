"""The lesson: how it is put together, and what it says against its data and the library."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import reparam as rp

pytest.importorskip("latex2mathml")
from lesson_page import LESSON, TARGETS, build, figures, luminance


@pytest.fixture(scope="module")
def data():
    return json.loads((LESSON / "data.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(data):
    return build.page(data)


# How it is put together


class Elements(HTMLParser):
    """All elements, and for every control whether a label is around it."""

    def __init__(self, text):
        super().__init__()
        self.found, self.inside, self.unlabelled = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.found.append((tag, given))
        if tag in ("input", "select") and "label" not in self.inside and "aria-label" not in given:
            self.unlabelled.append(given)
        if tag not in ("input", "meta", "path", "rect", "br", "link", "img"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass


def test_the_page_is_one_file_that_asks_for_nothing(page):
    assert len(page.encode()) <= 3_000_000
    elements = Elements(page).found
    assert not [tag for tag, given in elements if "src" in given or tag in ("link", "img", "iframe", "object", "use")]
    assert "url(" not in re.sub(r'clip-path="url\(#', "", page)
    assert "@import" not in page
    for tag, given in elements:
        if "href" in given:
            assert tag == "a"
            assert given["href"].startswith(("#", "https://")), given["href"]
    policy = next(given["content"] for _, given in elements if given.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy


def test_links_lead_somewhere_and_every_control_is_labelled(page):
    parsed = Elements(page)
    ids = [given["id"] for _, given in parsed.found if "id" in given]
    assert len(ids) == len(set(ids))
    assert {given["href"][1:] for _, given in parsed.found if given.get("href", "").startswith("#")} <= set(ids)
    assert parsed.unlabelled == []
    assert [tag for tag, _ in parsed.found if tag in ("h1", "main")] == ["h1", "main"]
    for tag, given in parsed.found:
        if tag == "svg":
            assert given.get("aria-hidden") == "true" or (given["role"], bool(given["aria-label"])) == ("img", True)
            assert given["width"]
            assert given["height"]


def test_every_cell_of_the_summary_leads_to_a_figure(page):
    table = re.search(r'<table class="summary".*?</table>', page, re.S)[0]
    cells = re.findall(r"<td>(.*?)</td>", table)
    assert len(cells) == 5 * 8
    for cell in cells:
        assert cell == "–" or re.fullmatch(r'<a href="#fig-\w+"(?: data-set="[^"]+")?>[×−,\d.e]+</a>', cell), cell


# Sentences that no number of the data is filled into: each holds of the data.


def test_what_the_text_says_of_the_digits_holds(data):
    digits = data["dynamics"]["digits"]
    wide, narrow = digits["targets"], digits["narrow"]["targets"]
    scores = {name: [run["frechet"] for run in by_loss.values()] for name, by_loss in narrow.items()}
    assert max(scores["x0"]) < min(v for name, values in scores.items() if name != "x0" for v in values)
    # By loss the narrow network's score moves less than from x0 to the target next to it.
    assert all(max(values) < 2 * min(values) for values in scores.values())
    assert min(min(scores[name]) for name in ("v", "velocity")) > 3 * max(scores["x0"])
    for name in ("v", "velocity"):
        assert 1.3 * wide["x0"]["frechet"] < wide[name]["frechet"] < 0.1 * min(scores[name])
        assert wide[name]["nearest"]["trained_on"] > 0.98 * wide[name]["nearest"]["held_out"]
    assert wide["x0"]["nearest"]["trained_on"] < 0.95 * wide["x0"]["nearest"]["held_out"]
    floor = digits["floor"]
    assert floor["copied"] < floor["frechet"] < wide["x0"]["frechet"]
    # Scans that nobody learned from are as far from those trained on as the samples are from those that were not.
    assert floor["nearest"] == pytest.approx(wide["x0"]["nearest"]["held_out"], rel=0.02)
    assert floor["x_t_error"][0] == pytest.approx((1 / 9) ** 2 / 0.752**2, rel=0.02)
    late = {name: narrow[name]["velocity"]["error"][-1][digits["levels"].index(0.9)] for name in ("x0", "v")}
    assert late["v"] < late["x0"]
    low, top = digits["levels"].index(0.1), len(digits["levels"]) - 1
    ends = {name: run["error"][-1] for name, run in wide.items()}
    assert ends["x0"][low] > max(ends[name][low] for name in ("eps", "v", "velocity"))
    assert ends["eps"][top] > 10 * max(ends[name][top] for name in ("x0", "v", "velocity"))
    by_loss = [{name: narrow[name][loss] for name in narrow} for loss in digits["narrow"]["losses"]]
    for runs in (wide, *by_loss):
        assert max(runs, key=lambda name: runs[name]["error"][-1][top]) == "eps"
        ranked = sorted(runs, key=lambda name: runs[name]["frechet"])
        assert (ranked[0], ranked[-1]) == ("x0", "eps")


def test_every_training_ended_after_as_many_steps(data):
    digits, spiral = data["dynamics"]["digits"], data["dynamics"]["spiral"]
    rows = [digits["targets"], *digits["narrow"]["targets"].values(), *spiral["runs"].values()]
    assert {(run["status"], run["steps"][-1]) for row in rows for run in row.values()} == {("done", 2500)}


def test_what_the_text_says_of_the_spiral_holds(data):
    spiral = data["dynamics"]["spiral"]
    least = spiral["ideal_by_dim"]["2"][spiral["levels"].index(spiral["level"])]
    plane, middle, space = (spiral["runs"][dim] for dim in ("2", "32", "512"))
    assert all(run["error"][-1] < 1.03 * least for run in plane.values())
    assert min(plane, key=lambda name: plane[name]["manifold_distance"]) == "x0"
    assert spiral["width"] == 8 * 32 == 512 / 2
    assert middle["x0"]["manifold_distance"] < spiral["blind"] / 5
    for name in ("v", "velocity", "eps"):
        assert 0.8 < middle[name]["manifold_distance"] / spiral["blind"] < 1.25
    for name in ("v", "velocity"):
        assert 100 * space["x0"]["off_manifold"] < space[name]["off_manifold"] < 0.1 * space["eps"]["off_manifold"]
    lowest = {
        dim: {name: run["error_by_level"][-1][0] for name, run in row.items()} for dim, row in spiral["runs"].items()
    }
    assert {min(row, key=row.__getitem__) for row in lowest.values()} == {"x0"}


def test_what_the_text_says_of_sampling_and_confidence_holds(data):
    away = {name: run["away"] for name, run in data["sampling"]["runs"].items()}
    first = {name: row[0] for name, row in away.items()}
    assert data["sampling"]["t"][10] == pytest.approx(0.49)
    agree = {(name, at): figures.agreement(data, name, at) for name in ("eps", "v", "velocity") for at in (0, 10)}
    assert agree["eps", 0] < 0.5 < 0.8 < min(agree["eps", 10], agree["v", 0], agree["velocity", 0])
    assert max(first["v"], first["velocity"]) < 1.3 * first["x0"]
    assert first["eps"] > 5 * max(v for name, v in first.items() if name != "eps")
    for level in data["confidence"]["reliability"]:
        assert 0.8 < level["z2"] < 1.25
        assert 0 < level["beyond_position"] < 0.75 * level["correlation"]
    confidence, longer = data["confidence"], data["confidence"]["longer"]
    at = data["dynamics"]["digits"]["levels"].index(0.3)
    plain = data["dynamics"]["digits"]["targets"]["x0"]["error"][-1][at]
    assert plain < longer["error"][-1][at] < confidence["error"][-1][at]
    assert confidence["reliability"][0]["t"] == longer["reliability"][0]["t"] == 0.3
    assert longer["reliability"][0]["z2"] > 2


def test_what_errors_of_v_and_velocity_count_is_as_the_text_says(page):
    """On DDPM's table by differences from step to step; σ/|Δ| of v is 1 on every schedule with α² + σ² = 1."""
    kept = np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))])
    alpha, sigma = np.sqrt(kept), np.sqrt(1 - kept)
    slopes = [float(np.polyval(np.polyder(np.polyfit(np.arange(-5, 1) / 1000, v[-6:], 3)), 0)) for v in (alpha, sigma)]
    last = sigma[-1] / abs(alpha[-1] * slopes[1] - sigma[-1] * slopes[0])
    said = re.search(r"an error of velocity counts up to ([\d.]+) times in x₀", page)
    assert float(said[1]) == pytest.approx(last, rel=0.01)
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    for name in ("rectified_flow", "cosine"):
        for target in ("v", "velocity"):
            assert float(rp.target(target).amplification(t, rp.schedule(name)).x0.max()) < 1.21


def test_the_quiz_has_twelve_questions_each_with_one_right_answer():
    entries = json.loads((LESSON / "quiz.json").read_text(encoding="utf-8"))
    assert len(entries) == 12
    assert len({entry["right"] for entry in entries}) > 2
    for entry in entries:
        assert 3 <= len(entry["options"]) <= 4
        assert len({option["text"] for option in entry["options"]}) == len(entry["options"])
        assert all(len(option["why"]) > 20 for option in entry["options"])


def test_the_published_figures_of_the_text_agree_with_each_other(page, data):
    """A skip does harm; and by what shares ε is ahead in the short comparison that section 7 states."""
    published = {entry["id"]: entry["numbers"] for entry in data["results"]["published"]}
    skip = published["jit-skip"]
    assert skip["x0"] == published["jit-256"]["velocity"][0] < min(skip["edm"], skip["linear"])
    assert "FID of 8.62 predicting x₀, 35.49 with EDM's preconditioning,\nand 46.25 with a linear skip" in page
    stated = re.search(r"ε is ahead at three sizes: (.*?) against (.*?) for v and (.*?) for x₀", page).groups()
    eps, *others = ([float(v) for v in re.findall(r"\d+\.\d+", words)] for words in stated)
    ahead = [100 * (1 - ours / theirs) for other in others for ours, theirs in zip(eps, other, strict=True)]
    low, high = re.search(r"ε was ahead, by (\d+) to (\d+) %", (LESSON / "quiz.json").read_text("utf-8")).groups()
    assert (round(min(ahead)), round(max(ahead))) == (int(low), int(high))


def channels(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    return [int(digits[i : i + 2], 16) for i in (0, 2, 4)]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_the_contrast_of_wcag_aa(scheme):
    block = re.findall(r":root \{(.*?)\}", (LESSON / "lesson.css").read_text(encoding="utf-8"), re.S)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]+);", block))
    for ground in ("bg", "panel"):
        for name, least in {"ink": 4.5, "muted": 4.5, "link": 4.5, "right": 4.5, "wrong": 4.5, "rule": 3}.items() | {
            (name, 3) for name in (*TARGETS, "other")
        }:
            low, high = sorted(luminance(channels(colours[which])) for which in (name, ground))
            assert (high + 0.05) / (low + 0.05) >= least, (name, ground)


def test_the_command_writes_the_page_or_says_why_not(tmp_path, data, capsys):
    out, large, old = tmp_path / "new" / "lesson.html", tmp_path / "data.json", tmp_path / "old.json"
    large.write_text(json.dumps(data | {"confidence": data["confidence"] | {"padding": "x" * 3_000_000}}))
    old.write_text("{}")
    told = {large: "more than 3,000,000", old: "make it anew with data.py", tmp_path / "none.json": "No such file"}
    for given, said in told.items():
        assert build.main([str(out), "--data", str(given)]) == 2
        assert said in capsys.readouterr().err
        assert not out.exists()
    command = [sys.executable, str(LESSON / "build.py"), str(out), "--home", "index.html"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert '<a href="index.html">' in out.read_text(encoding="utf-8")


def test_what_cannot_be_filled_in_is_an_error(data):
    with pytest.raises(build.LessonError, match=r"no made:nothing"):
        build.filled("{{made:nothing}}", {}, data)
    assert build.filled("{{a:b}} {{a:c}} {{a:d}}", {}, {"a": {"b": 1.6e-15, "c": 0.0, "d": 2500}}) == "1.6e−15 0 2,500"
    with pytest.raises(build.LessonError, match="no number"):
        build.filled("{{made:command}}", {}, data)
    with pytest.raises(build.LessonError, match="no figure"):
        build.filled("{{nothing}}", {}, data)
    with pytest.raises(build.LessonError, match="cannot be read|not known"):
        build.formula(r"\nosuchcommand{x}")
    with pytest.raises(build.LessonError, match="cannot stand in a formula"):
        build.formula("t = {{made:t}}")
    option = {"text": "a", "why": "b"}
    with pytest.raises(build.LessonError, match="three or four"):
        build.quiz([{"question": "?", "right": 0, "options": [option, option]}])


def test_an_option_is_called_by_what_its_formula_says():
    assert build.spoken(r"$0.7\,\varepsilon - 0.3\,x_0$") == "0.7 ε − 0.3 x₀"
    assert build.spoken(r"the signal-to-noise ratio, $\alpha^2/\sigma^2$") == "the signal-to-noise ratio, α²/σ²"
    with pytest.raises(build.LessonError, match="cannot be said in words"):
        build.spoken(r"$\frac{1}{2}$")
