"""The lesson: how it is put together, its mathematics against the library's, and every control in a browser."""

import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import reparam as rp
from reparam.errors import ReparamError

LESSON = Path(__file__).parents[1] / "docs" / "lesson"
TARGETS = ("x0", "eps", "v", "velocity", "score")

pytest.importorskip("latex2mathml")


def module(name):
    """A module of docs/lesson, which is no package."""
    spec = importlib.util.spec_from_file_location(f"lesson_{name}", LESSON / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


build, figures = module("build"), module("figures")


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
        assert cell == "–" or re.fullmatch(r'<a href="#fig-\w+">[×−,\d.e]+</a>', cell), cell


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
    assert wide["x0"]["frechet"] > digits["floor"]["frechet"]
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
    for name in ("velocity", "eps"):
        assert 0.8 < middle[name]["manifold_distance"] / spiral["blind"] < 1.25
    assert 100 * space["x0"]["off_manifold"] < space["velocity"]["off_manifold"] < 0.1 * space["eps"]["off_manifold"]


def test_what_the_text_says_of_sampling_and_confidence_holds(data):
    away = {name: run["away"] for name, run in data["sampling"]["runs"].items()}
    first, half = ({name: row[i] for name, row in away.items()} for i in (0, 10))
    assert data["sampling"]["t"][10] == pytest.approx(0.49)
    assert half["eps"] < half["x0"]
    assert max(first["v"], first["velocity"]) < 1.3 * first["x0"]
    assert first["eps"] > 5 * max(v for name, v in first.items() if name != "eps")
    for level in data["confidence"]["reliability"]:
        assert 0.8 < level["z2"] < 1.25
        assert 0 < level["beyond_position"] < 0.75 * level["correlation"]


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


def luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = [int(digits[i : i + 2], 16) for i in (0, 2, 4)]
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_the_contrast_of_wcag_aa(scheme):
    block = re.findall(r":root \{(.*?)\}", (LESSON / "lesson.css").read_text(encoding="utf-8"), re.S)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]+);", block))
    for ground in ("bg", "panel"):
        for name, least in {"ink": 4.5, "muted": 4.5, "link": 4.5, "right": 4.5, "wrong": 4.5, "rule": 3}.items() | {
            (name, 3) for name in (*TARGETS, "other")
        }:
            low, high = sorted([luminance(colours[name]), luminance(colours[ground])])
            assert (high + 0.05) / (low + 0.05) >= least, (name, ground)


def test_the_command_writes_the_page_or_says_why_not(tmp_path, data, capsys):
    out, large = tmp_path / "new" / "lesson.html", tmp_path / "data.json"
    large.write_text(json.dumps(data | {"padding": "x" * 3_000_000}))
    for given, said in ((large, "more than 3,000,000"), (tmp_path / "none.json", "No such file")):
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


# In a browser


def browser():
    """Where Chromium is. Its absence skips the test, and fails it where CI says it must be there."""
    found = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if found is None and os.environ.get("CI") == "true":
        pytest.fail("the tests of the page need chromium, and CI is true: install it")
    return found or pytest.skip("chromium is not installed")


DRIVER = """<!doctype html><meta charset="utf-8"><pre id="seen"></pre><script>
const seen = {errors: []}, ask = JSON.parse(ASK);
addEventListener("error", (e) => seen.errors.push(e.message));
const wait = (ms) => new Promise((r) => setTimeout(r, ms));
async function open(width) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.src = "lesson.html";
  const loaded = new Promise((done) => { frame.onload = done; });
  document.body.append(frame);
  await loaded;
  frame.contentWindow.addEventListener("error", (e) => seen.errors.push(e.message));
  await wait(100);
  return frame;
}
STEPS
(async () => {
  try { await drive(); } catch (e) { seen.errors.push(String(e.stack || e)); }
  document.getElementById("seen").textContent = JSON.stringify(seen);
})();
</script>"""


def driven(folder, page, steps, ask=None):
    """What a script saw that was run beside the page, and what was said on the console."""
    (folder / "lesson.html").write_text(page, encoding="utf-8")
    driver = DRIVER.replace("ASK", json.dumps(json.dumps(ask)).replace("<", "\\u003c")).replace("STEPS", steps)
    (folder / "driver.html").write_text(driver, encoding="utf-8")
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"),
        *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=90000", "--window-size=1400,900", "--dump-dom"),
    ]
    command = [browser(), *options, f"--user-data-dir={folder / 'profile'}", (folder / "driver.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)[1]))
    assert seen.pop("errors") == []
    return seen


FUNCTIONS = """
// Numbers that JSON has no word for are told apart from null.
const plain = (v) => (typeof v === "number" && !Number.isFinite(v) ? "infinite" : Array.isArray(v) ? v.map(plain) : v);
async function drive() {
  const frame = await open(1280);
  const lesson = frame.contentWindow.lesson;
  const data = JSON.parse(frame.contentDocument.getElementById("data").textContent);
  seen.convert = ask.convert.map(([name, t, source, to, y, x]) =>
    plain(lesson.convert(y, x, source, to, lesson.coefficients(data.schedules[name], t))));
  seen.encode = ask.encode.map(([name, t, target, x0, eps]) => {
    const c = lesson.coefficients(data.schedules[name], t);
    return plain([lesson.noisy(x0, eps, c), lesson.encode(target, x0, eps, c)]);
  });
  seen.grow = ask.grow.map(([name, t, target, of]) =>
    plain(lesson.amplification(target, of, lesson.coefficients(data.schedules[name], t))));
  seen.between = lesson.coefficients(data.schedules.rectified_flow, 0.123);
  seen.weights = ask.weights.map(([times, b]) => ask.levels.map((at) =>
    [lesson.density(times, at) * lesson.hybridOnEps(b, at), lesson.hybridOnX0(b, at)]));
  const {rms, correlation} = lesson;
  seen.statistics = [rms(ask.a), correlation(ask.a, ask.b), correlation(ask.a, ask.a.map(() => 1))];
  seen.numbers = ask.numbers.map(lesson.number);
  seen.levels = ask.a.map((v) => lesson.level(v, -1, 1));
  seen.paths = ask.paths.map(([f, xs, ys]) => lesson.linePath(f, xs, ys));
  const d = frame.contentDocument;
  seen.pictures = Object.fromEntries([...d.querySelectorAll("[data-picture]")].map((e) =>
    [e.dataset.picture, [...e.children].map((p) => p.getAttribute("fill").match(/\\d+/g).map(Number))]));
  seen.outputs = Object.fromEntries([...d.querySelectorAll("[data-out]")].map((e) => [e.dataset.out, e.textContent]));
  seen.lines = [...d.querySelectorAll("[data-line], [data-dots]")].map((e) => e.getAttribute("d"));
  seen.said = d.getElementById("said").textContent;
}
"""


def asked():
    """Questions to the page's functions: every schedule, both ends of time, every pair of targets."""
    rng = np.random.default_rng(0)
    x0, eps = rng.uniform(-1, 1, 4), rng.standard_normal(4)
    ask = {"convert": [], "encode": [], "grow": []}
    for name in ("rectified_flow", "cosine", "ddpm"):
        schedule = rp.schedule(name)
        for t in (0.0, 0.01, 0.3, 0.5, 0.97, 1.0):
            x_t = schedule.add_noise(torch.tensor(x0), torch.tensor(eps), t).tolist()
            for source in TARGETS:
                ask["encode"].append([name, t, source, x0.tolist(), eps.tolist()])
                ask["grow"] += [[name, t, source, of] for of in ("x0", "eps")]
                y = rng.standard_normal(4).tolist()
                ask["convert"] += [[name, t, source, to, y, x_t] for to in TARGETS]
    frame = figures.frame_of((1, 100), (0.01, 10), log_x=True)
    times = [{"name": "uniform"}, {"name": "logit_normal", "mean": 0.8, "std": 0.8}]
    return ask | {
        "weights": [[kind, b] for kind in times for b in (0.001, 1.0, 1000.0)],
        "levels": [-9.0, -2.0, 0.0, 1.5, 8.0],
        "a": x0.tolist(),
        "b": eps.tolist(),
        "numbers": [0.0, 1.0, 9.996, 0.0996, 123.4, 99999.0, 0.00072, -0.5, 1e9, 12.34],
        "paths": [[frame, [1, 3, 10, 30, 100], [0.02, 1, None, 500, 0]]],
    }


def infinite(values):
    return any(v == "infinite" for v in values)


def test_the_pages_mathematics_is_the_librarys(tmp_path, page):
    """With the tables' six digits; and what the page shows at first is what reparam computed."""
    ask = asked()
    seen = driven(tmp_path, page, FUNCTIONS, ask)
    check_conversions(ask, seen)
    for (name, t, target, of), got in zip(ask["grow"], seen["grow"], strict=True):
        schedule = rp.schedule(name)
        p, q = (float(v) for v in rp.target(target).rows(torch.tensor(t, dtype=torch.float64), schedule))
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        if not np.isfinite([p, q]).all() or alpha * q == sigma * p:
            assert got == "infinite"
        else:
            expected = (sigma if of == "x0" else alpha) / abs(alpha * q - sigma * p)
            assert got == pytest.approx(expected, rel=2e-4, abs=2e-6), (name, t, target, of)
    assert seen["between"]["sigma"] == pytest.approx(0.123)
    for (times, b), got in zip(ask["weights"], seen["weights"], strict=True):
        drawn = rp.Uniform() if times["name"] == "uniform" else rp.LogitNormal(times["mean"], times["std"])
        objective = rp.Objective(rp.RectifiedFlow(), "x0", loss_space={"x0": 1, "eps": b}, times=drawn)
        levels = torch.tensor(ask["levels"], dtype=torch.float64)
        on_x0 = objective.weighting(objective.schedule.time_at(levels), objective.schedule)
        expected = torch.stack([rp.weightings.effective(objective, levels), on_x0], 1)
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)
    a, b = np.array(ask["a"]), np.array(ask["b"])
    np.testing.assert_allclose(seen["statistics"], [np.sqrt((a**2).mean()), np.corrcoef(a, b)[0, 1], 0], rtol=1e-12)
    assert seen["levels"] == [figures.grey(v, -1, 1) for v in ask["a"]]
    assert seen["numbers"] == [figures.number(v) for v in ask["numbers"]]
    assert seen["numbers"][:7] == ["0", "1.00", "10.0", "0.100", "123", "99,999", "7.2e−4"]
    assert seen["paths"] == [figures.line_path(*path) for path in ask["paths"]]
    assert seen["said"] == ""
    check_first_state(page, seen)


def check_conversions(ask, seen):
    for (name, t, target, x0, eps), (x_t, y) in zip(ask["encode"], seen["encode"], strict=True):
        schedule, x0, eps = rp.schedule(name), torch.tensor(x0).double(), torch.tensor(eps).double()
        np.testing.assert_allclose(x_t, schedule.add_noise(x0, eps, t), atol=1e-5)
        if target == "score" and t == 0:
            assert infinite(y)
        else:
            np.testing.assert_allclose(y, rp.target(target).encode(x0, eps, t, schedule), rtol=1e-4, atol=2e-4)
    refused = 0
    for (name, t, source, to, y, x_t), got in zip(ask["convert"], seen["convert"], strict=True):
        y, x_t = torch.tensor(y).double(), torch.tensor(x_t).double()
        try:
            expected = rp.convert(y, x_t, t, rp.schedule(name), source=source, to=to)
        except ReparamError:
            refused += 1
            assert got is None or infinite(got), (name, t, source, to)
            continue
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3, err_msg=f"{name} {t} {source} {to}")
    assert refused > 20


def numbers_in(path):
    return [float(v) for v in re.findall(r"[\d.]+", path)]


def check_first_state(page, seen):
    """The page without its script, and after the script ran, show the same."""
    drawings = re.findall(r'data-picture="([^"]+)".*?>(<path.*?)</svg>', page)
    assert {name for name, _ in drawings} == set(seen["pictures"])
    for name, paths in drawings:
        fills = [[int(f[i : i + 2], 16) for i in (0, 2, 4)] for f in re.findall(r'fill="#(\w{6})"', paths)]
        np.testing.assert_allclose(seen["pictures"][name], fills, atol=1, err_msg=name)
    static = {
        name: html.unescape(words)
        for name, words in re.findall(r'<output data-out="([^"]+)"[^>]*>(.*?)</output>', page)
    }
    assert static.keys() == seen["outputs"].keys()
    filled_by_script = {"score"}
    for name in static.keys() - filled_by_script:
        assert static[name] == seen["outputs"][name], name
    lines = re.findall(r'data-(?:line|dots)="[^"]+" d="([^"]*)"', page)
    assert len(lines) == len(seen["lines"])
    for before, after in zip(lines, seen["lines"], strict=True):
        np.testing.assert_allclose(numbers_in(after), numbers_in(before), atol=0.11)


EVERYTHING = """
const set = (w, e, value) => { e.value = value; e.dispatchEvent(new w.Event("input", {bubbles: true})); };
// All that a figure shows: pixels, lines, words.
const state = (figure) => [...figure.querySelectorAll("path, output")].map((e) =>
  [e.getAttribute("fill"), e.getAttribute("d"), e.tagName === "path" ? e.getAttribute("class") : e.textContent].join())
  .join("|");
// What a control may move: the figures of its section.
const moves = (e) => e.closest("section");
async function drive() {
  for (const width of [360, 1280]) {
    const frame = await open(width), w = frame.contentWindow, d = frame.contentDocument;
    const got = seen[width] = {controls: {}, aria: [], heights: [], shift: 0, options: {}, boxes: {}};
    const add = (e) => { if (!e.hadRecentInput) got.shift += e.value; };
    new w.PerformanceObserver((list) => list.getEntries().forEach(add)).observe({type: "layout-shift", buffered: true});
    const spoken = [];
    new w.MutationObserver(() => spoken.push(d.getElementById("said").textContent))
      .observe(d.getElementById("said"), {childList: true, characterData: true, subtree: true});
    const height = () => d.documentElement.scrollHeight;
    got.before = height();
    for (const e of d.querySelectorAll("input[type=range]")) {
      const states = new Set([state(moves(e))]), first = e.value;
      const steps = Math.min(40, Math.round((e.max - e.min) / e.step));
      for (let i = 0; i <= steps; i += 1) {
        set(w, e, Number(e.min) + (e.max - e.min) * i / steps);
        states.add(state(moves(e)));
        got.heights.push(height());
        got.aria.push([e.id, e.getAttribute("aria-valuetext"), d.querySelector(`[data-out="${e.id}"]`).textContent]);
      }
      got.controls[e.id] = [states.size, steps + 1];
      set(w, e, first);
    }
    await wait(1500);
    got.spoken = spoken.splice(0);
    for (const e of d.querySelectorAll("select")) {
      const first = e.value, states = new Set();
      for (const option of e.options) {
        set(w, e, option.value);
        states.add(state(moves(e)));
        got.heights.push(height());
      }
      got.options[e.id] = [states.size, e.options.length];
      set(w, e, first);
    }
    const sources = [...d.querySelectorAll("[name=source]")].map((e) => { e.click(); return state(moves(e)); });
    got.sources = new Set(sources).size;
    got.framed = [...d.querySelectorAll("li.source [data-picture]")].map((e) => e.dataset.picture);
    for (const e of d.querySelectorAll("[data-weighting]")) {
      const lines = d.querySelectorAll(`#fig-weights [data-line="${e.dataset.weighting}"]`);
      const shown = () => [...lines].map((l) => w.getComputedStyle(l).display !== "none");
      const before = shown();
      e.click();
      got.boxes[e.dataset.weighting] = [e.checked, before, shown()];
    }
    got.after = height();
    got.quiz = quiz(w, d);
    // The score is infinite at t = 0, and ε says nothing of x0 at t = 1.
    set(w, d.getElementById("noise-t"), 0);
    d.querySelector("[value=eps]").click();
    set(w, d.getElementById("convert-t"), 1);
    const out = (name) => d.querySelector(`[data-out="${name}"]`).textContent;
    got.ends = ["noise-score", "convert-x0", "convert-words", "noise-mix"].map(out);
    got.overflow = d.documentElement.scrollWidth - d.documentElement.clientWidth;
    got.cut = [...d.querySelectorAll(".formula")].filter((e) => e.scrollHeight > e.clientHeight).length;
    frame.remove();
  }
}
function quiz(w, d) {
  const got = {answers: [], score: [], unchecked: [], silent: []};
  const score = () => d.querySelector('[data-out="score"]').textContent;
  d.querySelectorAll(".question").forEach((q, n) => {
    const inputs = [...q.querySelectorAll("input")], right = inputs.findIndex((e) => e.hasAttribute("data-right"));
    // The first half is answered rightly first, the other half wrongly.
    const order = n < 6 ? [right] : [(right + 1) % inputs.length];
    inputs.forEach((_, i) => { if (!order.includes(i)) order.push(i); });
    const why = q.querySelector(".why");
    const button = q.querySelector(".check"), before = score();
    button.click();
    got.unchecked.push([why.textContent, score() === before]);
    order.forEach((i, nth) => {
      inputs[i].click();
      got.silent.push(why.textContent === "" && (nth > 0 || score() === before));
      // By the button or, every other time, by the keyboard.
      if (i % 2) button.click();
      else inputs[i].dispatchEvent(new w.KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
      got.answers.push([n, i, why.className, why.textContent]);
    });
    got.score.push(score());
  });
  d.getElementById("again").click();
  got.again = score();
  got.left = [...d.querySelectorAll(".question input")].filter((e) => e.checked).length;
  got.left += [...d.querySelectorAll(".why")].filter((e) => e.textContent).length;
  return got;
}
"""


def test_every_control_moves_what_it_should(tmp_path, page):
    seen = driven(tmp_path, page, EVERYTHING)
    assert len(seen) == 2
    for width, got in seen.items():
        assert len(got["controls"]) == 7
        for name, (states, positions) in got["controls"].items():
            # Two places may draw the same, no more: the ends of what is rounded.
            assert states >= 0.9 * positions, (width, name, states, positions)
        assert len(got["options"]) == 8
        for name, (states, options) in got["options"].items():
            assert states == options, (width, name)
        assert got["sources"] == 5
        assert got["framed"] == ["convert-score"]
        for ticked, before, after in got["boxes"].values():
            assert after == [ticked] * 2
            assert before == [not ticked] * 2
        for name, spoken, shown in got["aria"]:
            assert spoken == shown != "", name
        assert set(got["heights"]) == {got["before"]}, width
        assert got["after"] == got["before"]
        assert got["shift"] < 0.01
        assert len(got["spoken"]) == 1  # seven sliders were moved without a pause: one sentence
        assert got["ends"] == [
            "infinite here",
            "not to be had",
            "At t = 1.00 ε says nothing of x₀.",
            "α = 1.000, σ = 0.000",
        ]
        assert got["overflow"] <= 0
        assert got["cut"] == 0
        check_quiz(got["quiz"])


def check_quiz(got):
    entries = json.loads((LESSON / "quiz.json").read_text(encoding="utf-8"))
    assert len(got["answers"]) == sum(len(entry["options"]) for entry in entries)
    for n, option, kind, words in got["answers"]:
        right = option == entries[n]["right"]
        assert kind == ("why right" if right else "why wrong")
        assert words.startswith("Right. " if right else "Not so. ")
        assert words.split(" ")[-1].rstrip(".") != ""
    assert got["unchecked"] == [["Choose an answer first.", True]] * 12
    assert all(got["silent"])
    assert len(got["silent"]) == len(got["answers"])
    expected = [f"{min(n, 6)} right of {n} answered; 12 questions" for n in range(1, 13)]
    assert got["score"] == expected
    assert (got["again"], got["left"]) == ("0 right of 0 answered; 12 questions", 0)
