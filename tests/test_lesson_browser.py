"""The lesson in a browser: its mathematics against the library's, every control, and who can use it how."""

import html
import json
import re

import numpy as np
import pytest
import torch

import reparam as rp
from reparam.errors import ReparamError

pytest.importorskip("latex2mathml")
from lesson_page import LESSON, TARGETS, build, figures, luminance

pytest_plugins = ["browsing"]

# Words that only a mistake of the page puts there.
SLIPS = re.compile(r"undefined|\bNaN\b|\bnull\b|\[object|\{\{|\$")


@pytest.fixture(scope="module")
def page():
    return build.page(json.loads((LESSON / "data.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def path(tmp_path_factory, page):
    written = tmp_path_factory.mktemp("lesson") / "lesson.html"
    written.write_text(page, encoding="utf-8")
    return written


@pytest.fixture
def opened(visit, path):
    """Opens the lesson, with what the scripts of these tests share."""

    def open_lesson(**how):
        found = visit(path, **how)
        found.evaluate(SHARED)
        return found

    return open_lesson


SHARED = """() => {
  // All that the figures of a control's section show: pixels, lines, words.
  window.content = (e) => [...e.closest("section").querySelectorAll("path, output")].map((part) =>
    [part.getAttribute("fill"), part.getAttribute("d"), part.localName === "path" ? part.getAttribute("class")
      : part.textContent].join()).join("|");
  // The same as a number: another one for another state.
  const known = new Map();
  window.state = (e) => {
    const all = content(e);
    if (!known.has(all)) known.set(all, known.size);
    return known.get(all);
  };
  window.out = (name) => document.querySelector(`[data-out="${name}"]`).textContent;
  // Whether it comes true: the browser scrolls in its own time.
  window.soon = async (condition) => {
    for (let left = 250; left > 0 && !condition(); left -= 1) await new Promise((done) => setTimeout(done, 20));
    return condition();
  };
  window.shown = (e) => e.checkVisibility({visibilityProperty: true}) && !e.closest(".unseen");
  // What holds words of its own.
  window.texts = () => [...document.body.querySelectorAll("*")].filter((e) =>
    !e.matches("script, noscript, option, annotation") &&
    [...e.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.textContent.trim()));
  window.named = (e) => `${e.localName}.${e.className.baseVal ?? e.className} ${e.textContent.trim().slice(0, 40)}`;
  window.sized = (e) => { const r = e.getBoundingClientRect(); return r.width > 0 && r.height > 0; };
  // What can be scrolled sideways where it stands.
  window.scrollers = () => [...document.querySelectorAll("main *")].filter((e) => e.checkVisibility() &&
    ["auto", "scroll"].includes(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth);
  window.overflow = () => document.documentElement.scrollWidth - document.documentElement.clientWidth;
  // What sticks out of the page, other than in a part that scrolls.
  window.outside = () => {
    const scrolled = scrollers();
    return [...document.body.querySelectorAll("*")].filter((e) => shown(e) &&
      e.getBoundingClientRect().right > innerWidth + 0.5 && !scrolled.some((s) => s.contains(e))).map(named);
  };
}"""


def test_every_number_of_the_summary_leads_to_a_figure_that_shows_it(opened):
    """Where it leads the controls are set, and an output or a table has the same number."""
    lesson = opened(calm=True)
    links = lesson.locator("#summary a")
    for i in range(links.count()):
        link = links.nth(i)
        words, figure = link.text_content().lstrip("×"), link.get_attribute("href")
        link.click()
        shown = lesson.locator(f"{figure} output, {figure} td").all_text_contents()
        assert any(re.search(rf"(?<![\d.,]){re.escape(words)}(?![\d]|[.,]\d)", text) for text in shown), (words, figure)
    assert links.count() > 25


def test_what_is_said_is_of_the_figure_whose_control_moved(opened):
    lesson = opened(clock=True)
    for control, value, words in (
        ("digit", "3", "Digit 3, draw 1, t = 0.50: α"),
        ("draw", "2", "Digit 3, draw 3, t = 0.50: α"),
        ("convert-schedule", "cosine", "An error of"),
        ("sample", "1", "Sample 2. Distance"),
        ("sample", "2", "Sample 3. Distance"),
        ("setting", "hybrid", "Error of x₀ at t = 0.70"),
    ):
        lesson.locator(f"#{control}").select_option(value)
        lesson.clock.run_for(1000)
        assert lesson.locator("#said").text_content().startswith(words), control


# The mathematics


FUNCTIONS = """(ask) => {
  const {lesson} = window, data = JSON.parse(document.getElementById("data").textContent), seen = {};
  seen.convert = ask.convert.map(([name, t, source, to, y, x]) =>
    lesson.convert(y, x, source, to, lesson.coefficients(data.schedules[name], t)));
  seen.encode = ask.encode.map(([name, t, target, x0, eps]) => {
    const c = lesson.coefficients(data.schedules[name], t);
    return [lesson.noisy(x0, eps, c), lesson.encode(target, x0, eps, c)];
  });
  seen.grow = ask.grow.map(([name, t, target, of]) =>
    lesson.amplification(target, of, lesson.coefficients(data.schedules[name], t)));
  seen.between = lesson.coefficients(data.schedules.rectified_flow, 0.123);
  seen.weights = ask.weights.map(([times, b]) => ask.levels.map((at) =>
    [lesson.density(times, at) * lesson.hybridOnEps(b, at), lesson.hybridOnX0(b, at)]));
  const {rms, correlation} = lesson;
  seen.statistics = [rms(ask.a), correlation(ask.a, ask.b), correlation(ask.a, ask.a.map(() => 1))];
  seen.numbers = ask.numbers.map(lesson.number);
  seen.levels = ask.a.map((v) => lesson.level(v, -1, 1));
  seen.paths = ask.paths.map(([f, xs, ys]) => lesson.linePath(f, xs, ys));
  const every = (selector) => [...document.querySelectorAll(selector)];
  seen.pictures = Object.fromEntries(every("[data-picture]").map((e) =>
    [e.dataset.picture, [...e.children].map((p) => p.getAttribute("fill").match(/\\d+/g).map(Number))]));
  seen.outputs = Object.fromEntries(every("[data-out]").map((e) => [e.dataset.out, e.textContent]));
  seen.lines = every("[data-line], [data-dots]").map((e) => e.getAttribute("d"));
  seen.said = document.getElementById("said").textContent;
  return seen;
}"""


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
    return not np.isfinite(values).all()


def test_the_pages_mathematics_is_the_librarys(opened, page):
    """With the tables' six digits; and what the page shows at first is what reparam computed."""
    ask = asked()
    seen = opened().evaluate(FUNCTIONS, ask)
    check_conversions(ask, seen)
    for (name, t, target, of), got in zip(ask["grow"], seen["grow"], strict=True):
        schedule = rp.schedule(name)
        p, q = (float(v) for v in rp.target(target).rows(torch.tensor(t, dtype=torch.float64), schedule))
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        if not np.isfinite([p, q]).all() or alpha * q == sigma * p:
            assert infinite(got)
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


# Every control, everywhere


EVERYTHING = """() => {
  const got = {controls: {}, aria: [], heights: [], options: {}, boxes: {}, words: []};
  const every = (selector) => [...document.querySelectorAll(selector)];
  window.shift = 0;
  const add = (e) => { if (!e.hadRecentInput) shift += e.value; };
  new PerformanceObserver((list) => list.getEntries().forEach(add)).observe({type: "layout-shift", buffered: true});
  const said = document.getElementById("said");
  window.spoken = [];
  new MutationObserver(() => spoken.push(said.textContent))
    .observe(said, {childList: true, characterData: true, subtree: true});
  const height = () => document.documentElement.scrollHeight;
  const set = (e, value) => {
    e.value = value;
    e.dispatchEvent(new Event("input", {bubbles: true}));
    got.heights.push(height());
    got.words.push(content(e).match(/undefined|NaN|\\bnull\\b|Infinity/g));
    return state(e);
  };
  got.before = height();
  for (const e of every("input[type=range]")) {
    const states = new Set([state(e)]), first = e.value;
    const steps = Math.min(40, Math.round((e.max - e.min) / e.step));
    for (let i = 0; i <= steps; i += 1) {
      states.add(set(e, Number(e.min) + (e.max - e.min) * i / steps));
      got.aria.push([e.id, e.getAttribute("aria-valuetext"), out(e.id)]);
    }
    got.controls[e.id] = [states.size, steps + 1];
    set(e, first);
  }
  for (const e of every("select")) {
    const first = e.value;
    got.options[e.id] = [new Set([...e.options].map((option) => set(e, option.value))).size, e.options.length];
    set(e, first);
  }
  got.sources = new Set(every("[name=source]").map((e) => { e.click(); return state(e); })).size;
  got.framed = every("li.source [data-picture]").map((e) => e.dataset.picture);
  for (const e of every("[data-weighting]")) {
    const lines = every(`#fig-weights [data-line="${e.dataset.weighting}"]`);
    const visible = () => lines.map((l) => getComputedStyle(l).display !== "none");
    const before = visible();
    e.click();
    got.boxes[e.dataset.weighting] = [e.checked, before, visible()];
  }
  got.after = height();
  // The score is infinite at t = 0, and ε says nothing of x0 at t = 1.
  set(document.getElementById("noise-t"), 0);
  document.querySelector("[value=eps]").click();
  set(document.getElementById("convert-t"), 1);
  got.ends = ["noise-score", "convert-x0", "convert-words", "noise-mix"].map(out);
  got.overflow = overflow();
  got.cut = every(".formula").filter((e) => e.scrollHeight > e.clientHeight).length;
  return got;
}"""

QUIZ = """() => {
  const got = {answers: [], score: [], unchecked: [], silent: []};
  document.querySelectorAll(".question").forEach((q, n) => {
    const inputs = [...q.querySelectorAll("input")], right = inputs.findIndex((e) => e.hasAttribute("data-right"));
    // The first half is answered rightly first, the other half wrongly.
    const order = n < 6 ? [right] : [(right + 1) % inputs.length];
    inputs.forEach((_, i) => { if (!order.includes(i)) order.push(i); });
    const why = q.querySelector(".why"), button = q.querySelector(".check"), before = out("score");
    button.click();
    got.unchecked.push([why.textContent, out("score") === before]);
    order.forEach((i, nth) => {
      inputs[i].click();
      got.silent.push(why.textContent === "" && (nth > 0 || out("score") === before));
      button.click();
      got.answers.push([n, i, why.className, why.textContent]);
    });
    got.score.push(out("score"));
  });
  document.getElementById("again").click();
  got.again = out("score");
  got.left = [...document.querySelectorAll(".question input")].filter((e) => e.checked).length;
  got.left += [...document.querySelectorAll(".why")].filter((e) => e.textContent).length;
  return got;
}"""


@pytest.mark.parametrize("width", [360, 1280])
def test_every_control_moves_what_it_should(opened, width):
    lesson = opened(width=width, clock=True)
    got = lesson.evaluate(EVERYTHING)
    assert len(got["controls"]) == 7
    for name, (states, positions) in got["controls"].items():
        # Two places may draw the same, no more: the ends of what is rounded.
        assert states >= 0.9 * positions, (name, states, positions)
    assert len(got["options"]) == 8
    for name, (states, options) in got["options"].items():
        assert states == options, name
    assert got["sources"] == 5
    assert got["framed"] == ["convert-score"]
    for ticked, before, after in got["boxes"].values():
        assert after == [ticked] * 2
        assert before == [not ticked] * 2
    for name, spoken, shown in got["aria"]:
        assert spoken == shown != "", name
    assert not any(got["words"])
    assert set(got["heights"]) == {got["before"]}
    assert got["after"] == got["before"]
    lesson.clock.run_for(1500)
    assert lesson.evaluate("new Promise((done) => setTimeout(() => done(shift), 100))") < 0.01
    assert len(lesson.evaluate("spoken")) == 1  # much was moved without a pause: one sentence
    assert got["ends"] == [
        "infinite here",
        "not to be had",
        "At t = 1.00 ε says nothing of x₀.",
        "α = 1.000, σ = 0.000",
    ]
    assert got["overflow"] <= 0
    assert got["cut"] == 0
    check_quiz(lesson.evaluate(QUIZ))


def entries():
    return json.loads((LESSON / "quiz.json").read_text(encoding="utf-8"))


def check_quiz(got):
    assert len(got["answers"]) == sum(len(entry["options"]) for entry in entries())
    for n, option, kind, words in got["answers"]:
        right = option == entries()[n]["right"]
        assert kind == ("why right" if right else "why wrong")
        assert words.startswith("Right. " if right else "Not so. ")
        assert words.split(" ")[-1].rstrip(".") != ""
    assert got["unchecked"] == [["Choose an answer first.", True]] * 12
    assert all(got["silent"])
    assert len(got["silent"]) == len(got["answers"])
    assert got["score"] == [score(min(n, 6), n) for n in range(1, 13)]
    assert (got["again"], got["left"]) == (score(0, 0), 0)


def score(right, answered):
    return f"{right} right of {answered} answered; 12 questions"


# The keyboard alone


# All stops in the order of the page; and from there on each key that is let go notes where it led.
STOPS = """() => {
  window.stops = [...document.querySelectorAll("a[href], button, input, select, summary, [tabindex]")].filter(shown);
  // Radio buttons of one name are one stop.
  window.stopOf = (e) => (e.type === "radio" ? e.name : `${stops.indexOf(e)} ${named(e)}`);
  window.walked = [];
  addEventListener("keyup", () => {
    const e = document.activeElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
    const ring = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1;
    walked.push([stopOf(e), ring, box.bottom > 0 && box.top < innerHeight && box.width > 0]);
  });
  return [...new Set(stops.map(stopOf))];
}"""


def test_tab_goes_through_all_controls_in_the_order_of_the_page_and_back(opened):
    lesson = opened(calm=True)
    stops = lesson.evaluate(STOPS)
    assert len(stops) > 80

    for key, expected in (("Tab", stops), ("Shift+Tab", stops[-2::-1])):
        for _ in expected:
            lesson.keyboard.press(key)
        # Shift is let go too, after Tab.
        places = lesson.evaluate("walked.splice(0)")[:: 1 if key == "Tab" else 2]
        assert [place for place, _, _ in places] == expected
        assert [place for place, ring, _ in places if not ring] == []
        assert [place for place, _, in_view in places if not in_view] == []


MOVED = "(e) => [Number(e.value), state(e), out(e.id) === e.getAttribute('aria-valuetext')]"


def test_sliders_move_by_their_keys_and_the_figures_follow(opened):
    lesson = opened(calm=True)
    sliders = lesson.locator("input[type=range]")
    assert sliders.count() == 7
    for slider in sliders.all():
        slider.focus()
        low, high, step = slider.evaluate("(e) => [Number(e.min), Number(e.max), Number(e.step)]")

        def after(key, slider=slider):
            lesson.keyboard.press(key)
            value, state, told = slider.evaluate(MOVED)
            assert told
            return value, state

        (first, at_first), (last, at_last) = after("Home"), after("End")
        assert (first, last) == (low, high)
        assert at_first != at_last
        after("Home")
        for key, moved in (("ArrowRight", 1), ("ArrowUp", 2), ("ArrowLeft", 1), ("ArrowDown", 0)):
            value, state = after(key)
            assert value == pytest.approx(low + moved * step), key
            assert (state != at_first) == (moved > 0), key
        leap, there = after("PageUp")
        assert leap == pytest.approx(low + max(step, (high - low) / 10), abs=step / 2 + 1e-9)
        assert there != at_first
        assert after("PageDown") == (low, at_first)


def test_menus_and_radio_buttons_move_by_arrow_keys(opened):
    lesson = opened(calm=True)
    menus = lesson.locator("select")
    assert menus.count() == 8
    for menu in menus.all():
        menu.focus()
        lesson.keyboard.press("Home")
        states = [menu.evaluate("state")]
        count = menu.evaluate("(e) => e.options.length")
        for place in range(1, count):
            lesson.keyboard.press("ArrowDown")
            at, state = menu.evaluate("(e) => [e.selectedIndex, state(e)]")
            assert at == place
            states.append(state)
        assert len(set(states)) == count
        lesson.keyboard.press("ArrowUp")
        assert menu.evaluate("state") == states[-2]
    lesson.locator("[name=source]:checked").focus()
    chosen, states = [], []
    for _ in range(5):
        lesson.keyboard.press("ArrowRight")
        value, checked, state = lesson.evaluate(
            "() => { const e = document.activeElement; return [e.value, e.checked, state(e)]; }"
        )
        assert checked
        chosen.append(value)
        states.append(state)
    assert chosen == ["v", "velocity", "score", "x0", "eps"]
    assert len(set(states)) == 5
    box = lesson.locator("[data-weighting]").first
    before = box.evaluate("state")
    box.press("Space")
    assert box.evaluate("state") != before


CHOSEN = """(n) => {
  const question = document.querySelectorAll(".question")[n], why = question.querySelector(".why");
  const at = [...question.querySelectorAll("input")].findIndex((e) => e.checked);
  return [at, why.className, why.textContent, out("score")];
}"""


def test_the_quiz_is_answered_by_keys_and_an_arrow_is_no_answer(opened):
    lesson = opened(calm=True)
    press = lesson.keyboard.press
    lesson.locator("#question-1 input").first.focus()
    for n, entry in enumerate(entries()):
        rightly, count = n % 2 == 0, len(entry["options"])
        goal = (entry["right"] + (0 if rightly else 1)) % count
        before, after = score((n + 1) // 2, n), score((n + 1) // 2 + rightly, n + 1)
        press("Enter")
        assert lesson.evaluate(CHOSEN, n) == [-1, "why", "Choose an answer first.", before]
        press("Space")
        assert lesson.evaluate(CHOSEN, n) == [0, "why", "", before]
        for place in [*range(1, count), *range(goal + 1)]:  # all round, and on to the answer
            press("ArrowDown")
            assert lesson.evaluate(CHOSEN, n) == [place, "why", "", before]
        # By Enter where the choice is; every second time by the button.
        for key in ["Enter"] if n % 4 < 2 else ["Tab", "Space"]:
            press(key)
        place, kind, words, now = lesson.evaluate(CHOSEN, n)
        assert (place, kind, now) == (goal, "why right" if rightly else "why wrong", after)
        assert words.startswith("Right. " if rightly else "Not so. ")
        if n % 4 >= 2:
            press("Shift+Tab")
        press("ArrowDown")
        assert lesson.evaluate(CHOSEN, n) == [(goal + 1) % count, "why", "", after]
        press("Enter")
        assert lesson.evaluate(CHOSEN, n)[2:] == [lesson.locator(".why").nth(n).text_content(), after]
        assert lesson.evaluate(CHOSEN, n)[1] != "why"
        press("Tab")
        press("Tab")
    assert lesson.evaluate("document.activeElement.id") == "again"
    press("Enter")
    assert lesson.evaluate("document.activeElement === document.querySelector('#question-1 input')")
    assert lesson.locator(".question input:checked").count() == 0
    assert lesson.evaluate(CHOSEN, 11) == [-1, "why", "", score(0, 0)]


def test_what_is_too_wide_scrolls_by_keys_and_details_open_by_them(opened):
    lesson = opened(width=360, calm=True)
    summary = lesson.locator("summary")
    assert summary.count() == 1
    summary.press("Enter")
    assert lesson.locator(".results").is_visible()
    scrollers = lesson.evaluate_handle("() => { window.wide = scrollers(); return wide; }")
    count = scrollers.evaluate("(all) => all.length")
    assert count >= 4
    assert set(lesson.evaluate("[...document.querySelectorAll('[tabindex]')].map((e) => wide.includes(e))")) == {True}
    for i in range(count):
        lesson.evaluate("(i) => wide[i].focus()", i)
        lesson.keyboard.press("ArrowRight")
        assert lesson.evaluate("(i) => soon(() => wide[i].scrollLeft > 0)", i)
        lesson.keyboard.press("ArrowLeft")
        assert lesson.evaluate("(i) => soon(() => wide[i].scrollLeft === 0)", i)
    summary.press("Enter")
    assert not lesson.locator(".results").is_visible()


# The mouse


AT_TOP = """(figure) => soon(() => {
  const {top} = document.querySelector(figure).getBoundingClientRect();
  return -1 < top && top < 100;
})"""


def test_a_slider_is_dragged_and_a_number_leads_to_its_figure(opened):
    lesson = opened(calm=True)
    slider = lesson.locator("#noise-t")
    slider.scroll_into_view_if_needed()
    box, states = slider.bounding_box(), []
    middle = box["y"] + box["height"] / 2
    lesson.mouse.move(box["x"] + box["width"] / 2, middle)
    lesson.mouse.down()
    for share in (0.6, 0.7, 0.9):
        lesson.mouse.move(box["x"] + share * box["width"], middle, steps=3)
        assert slider.evaluate("(e) => Number(e.value)") == pytest.approx(share, abs=0.05)
        states.append(slider.evaluate("state"))
    lesson.mouse.up()
    lesson.mouse.move(box["x"], middle)
    assert slider.evaluate("state") == states[-1]
    assert len(set(states)) == 3
    figures = lesson.evaluate("[...new Set([...document.querySelectorAll('#summary a')].map((e) => e.hash))]")
    assert len(figures) == 5
    for figure in figures:
        lesson.locator(f'#summary a[href="{figure}"]').first.click()
        assert lesson.evaluate("location.hash") == figure
        assert lesson.evaluate(AT_TOP, figure)


# Without the script, in the dark, large, on paper


STILL = """() => {
  const every = (selector) => [...document.querySelectorAll(selector)];
  const words = "p, li, dt, dd, td, th, h1, h2, h3, legend, figcaption, caption, summary, label, output, b, code";
  return {
    empty: every(words).filter((e) => !e.textContent.trim() && !e.querySelector("svg")).map(named),
    lost: texts().filter((e) => !e.closest("details, .unseen, .total, .check") && !(shown(e) && sized(e))).map(named),
    formulas: every("math").map((e) => [e.closest("details") !== null || sized(e), e.textContent.trim()]),
    pictures: every("svg").map((e) => [sized(e) && e.querySelectorAll("path:not([d=''])").length, named(e)]),
    lines: every("[data-line], [data-dots], .truth, .swatch path").filter((e) => !e.getAttribute("d")).map(named),
    pixels: every("[data-picture] path").filter((e) => !/^#[0-9a-f]{6}$/.test(e.getAttribute("fill"))).length,
    figures: every("figure").map(sized),
    labels: every("[aria-label]").map((e) => e.getAttribute("aria-label")),
  };
}"""


def test_without_its_script_the_page_is_all_there(opened):
    lesson = opened(script=False)
    seen = lesson.evaluate(STILL)
    # Two places that have no words, and what the script fills: answers, score and the live region.
    assert seen["empty"] == ["td. ", "output. ", *["p.why "] * 12, "output. ", "p.unseen "]
    assert seen["lost"] == []
    assert len(seen["formulas"]) > 100
    assert all(sized and text for sized, text in seen["formulas"])
    assert len(seen["pictures"]) > 60
    assert [name for paths, name in seen["pictures"] if not paths] == []
    assert seen["lines"] == []
    assert seen["pixels"] == 0
    assert len(seen["figures"]) == 9
    assert all(seen["figures"])
    assert all(seen["labels"])
    words = lesson.evaluate("document.body.innerText")
    assert SLIPS.search(words) is None
    assert "the controls do nothing" in lesson.locator("noscript p").inner_text()
    assert not lesson.locator(".check, #again").filter(visible=True).count()
    answers = lesson.locator(".question details")
    assert answers.count() == 12
    for entry, details in zip(entries(), answers.all(), strict=True):
        assert not details.locator("li").first.is_visible()
        details.locator("summary").click()
        told = [answer.inner_text() for answer in details.locator("li").all() if answer.is_visible()]
        assert [text.startswith("Right. ") for text in told] == [i == entry["right"] for i in range(len(told))]
        assert len(told) == len(entry["options"])
        assert min(map(len, told)) > 20


COLOURS = """() => texts().filter(shown).map((e) => {
  const style = getComputedStyle(e);
  let seen = 1, ground = null;
  for (let at = e; at; at = at.parentElement) {
    const own = getComputedStyle(at), filled = own.backgroundColor;
    seen *= Number(own.opacity);
    if (!ground && filled !== "rgba(0, 0, 0, 0)") ground = filled;
  }
  const colour = e.closest("svg") ? style.fill : style.color;
  return [named(e), colour, ground, seen, parseFloat(style.fontSize), Number(style.fontWeight)];
})"""


def channels(colour):
    assert re.fullmatch(r"rgb\(\d+, \d+, \d+\)", colour), colour
    return np.array([int(v) for v in re.findall(r"\d+", colour)])


@pytest.mark.parametrize("script", [True, False], ids=["live", "still"])
def test_all_words_have_contrast_in_light_and_dark(opened, script):
    """WCAG 2.1, 1.4.3 (AA): 4.5, and 3 for large letters, of what is computed for every word of the page."""
    lesson, grounds = opened(script=script, scheme="dark"), []
    if script:
        for n in (1, 2):  # a right answer and a wrong one
            lesson.locator(f"#question-{n} input{'[data-right]' if n == 1 else ':not([data-right])'}").first.click()
            lesson.locator(f"#question-{n} .check").click()
        assert lesson.locator(".why.right, .why.wrong").count() == 2
    for scheme in ("dark", "light"):
        lesson.emulate_media(color_scheme=scheme)
        found = lesson.evaluate(COLOURS)
        assert len(found) > 400
        for name, ink, ground, opacity, size, weight in found:
            below = channels(ground)
            above = opacity * channels(ink) + (1 - opacity) * below
            low, high = sorted([luminance(above), luminance(below)])
            large = size >= 24 or (size >= 18.66 and weight >= 700)
            assert (high + 0.05) / (low + 0.05) >= (3 if large else 4.5), (scheme, name, ink, ground, opacity)
        ink, ground = (luminance(channels(colour)) for colour in found[0][1:3])
        assert (ink < ground) == (scheme == "light")
        grounds.append({ground for _, _, ground, *_ in found})
    assert not grounds[0] & grounds[1]


MOTION = """() => {
  const long = (style) => `${style.transitionDuration}, ${style.animationDuration}`.split(", ").some((d) => d !== "0s");
  const parts = [null, "::before", "::after"];
  return [...document.querySelectorAll("*")].filter((e) => parts.some((p) => long(getComputedStyle(e, p)))).map(named);
}"""
JUMP = """() => {
  const before = scrollY;
  document.querySelector("nav a[href='#quiz']").click();
  return [before, scrollY, document.getElementById("quiz").getBoundingClientRect().top];
}"""


def test_nothing_moves_by_itself_where_motion_is_not_wanted(opened):
    lesson = opened(calm=True)
    assert lesson.evaluate(MOTION) == []
    assert lesson.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    before, after, top = lesson.evaluate(JUMP)
    assert before == 0
    assert after > 1000
    assert 0 <= top < 100
    lesson.evaluate("scrollTo(0, 0)")
    lesson.emulate_media(reduced_motion="no-preference")
    before, after, _ = lesson.evaluate(JUMP)  # elsewhere it glides there, and is still where it was
    assert before == after == 0


@pytest.mark.parametrize(("width", "zoom"), [(320, 1), (1280, 2)])
def test_large_letters_and_narrow_windows_need_no_scrolling_sideways(opened, width, zoom):
    """WCAG 2.1, 1.4.4 and 1.4.10: all letters follow the reader's size."""
    lesson = opened(width=width)
    sizes = "texts().filter((e) => !e.closest('svg')).map((e) => parseFloat(getComputedStyle(e).fontSize))"
    before = np.array(lesson.evaluate(sizes))
    lesson.evaluate("(zoom) => { document.documentElement.style.fontSize = `${100 * zoom}%`; }", zoom)
    np.testing.assert_allclose(lesson.evaluate(sizes), zoom * before, rtol=0.01)
    assert lesson.evaluate("overflow()") <= 0
    assert lesson.evaluate("outside()") == []


PAPER = """() => texts().filter((e) => (shown(e) || e.closest("details")) && !e.closest("nav, button, noscript"))"""


def test_on_paper_all_text_is_there(opened):
    """As wide as a page of A4 within its margins."""
    lesson = opened(width=720)
    lesson.evaluate(f"() => {{ window.readable = ({PAPER})(); }}")
    lesson.emulate_media(media="print")
    assert lesson.evaluate("readable.length") > 400
    assert lesson.evaluate("readable.filter((e) => !(shown(e) && sized(e))).map(named)") == []
    assert lesson.evaluate("scrollers().map(named)") == []  # paper does not scroll
    assert lesson.evaluate("overflow()") <= 0
    assert not lesson.locator("button").filter(visible=True).count()


# Who hears the page


ROLES = {
    "input[type=range]": "slider",
    "input[type=radio]": "radio",
    "input[type=checkbox]": "checkbox",
    "select": "combobox",
    "button": "button",
    "a": "link",
    "fieldset": "group",
    "[role=radiogroup]": "radiogroup",
    "svg:not([aria-hidden])": "image",
    "figure": "figure",
    "table[aria-label]": "table",
    "main section, [role=region]": "region",
    "nav": "navigation",
    "summary": "DisclosureTriangle",
}


def heard(lesson):
    """Role and name of all that the browser tells assistive technology."""
    session = lesson.context.new_cdp_session(lesson)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    return [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]]


def test_everything_has_a_role_and_a_name(opened):
    lesson = opened()
    lesson.locator("summary").click()
    told = heard(lesson)
    for selector, role in ROLES.items():
        names = [name for found, name in told if found == role and name.strip()]
        shown = lesson.evaluate("(s) => [...document.querySelectorAll(s)].filter(shown).length", selector)
        assert (role, len(names)) == (role, shown)
        assert shown, role
        assert not any(SLIPS.search(name) for name in names), role
        # Where a formula was left out of a name.
        assert not [name for name in names if re.search(r"\( ?,|\s[,?)]|(at|than|is|of)\s*[?,]|: on", name)], role
    # A table without a name of its own is all that a region with a name has.
    assert lesson.locator("table:not([aria-label])").count() > 0
    assert lesson.locator("table:not([aria-label]):not([role=region][aria-label] > :only-child)").count() == 0


def test_ids_are_one_each_and_headings_skip_no_level(opened):
    lesson = opened()
    ids = lesson.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids)) > 40
    levels = lesson.evaluate(
        "[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map((e) => Number(e.localName[1]))"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(np.diff(levels)) <= 1
