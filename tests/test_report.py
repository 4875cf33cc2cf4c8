"""The study page: what it says, what it carries, and that it works in a browser."""

import base64
import html
import json
import math
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path

import numpy as np
import pytest

from reparam.report import write_report
from reparam.report.plots import contact_sheet, number, png

NASTY = "</script><script>alert(1)</script> \"quoted\" 'single' &amp; <b>bold</b> {{title}} \ud800 \x00"


def frames_of(kind, steps, count, shape, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "points":
        return rng.normal(size=(steps + 1, count, 2)).astype(np.float32)
    return rng.integers(0, 256, (steps + 1, count, *shape), dtype=np.uint8)


def make_run(out, name, *, kind="points", steps=10, count=40, shape=(4, 6), log=True):
    """A run's folder; returns its frames and real data."""
    folder = out / name
    folder.mkdir(parents=True)
    frames = frames_of(kind, steps, count, shape)
    if kind == "points":
        frames[0] *= 3  # some of the first points lie outside the frame, none of the last
        frames[-1] *= 0.1
    real = frames_of(kind, 0, count, shape, seed=1)[0]
    times = np.linspace(1, 0, steps + 1)
    arrays = {"frames": frames, "times": times, "real": real}
    np.savez(folder / "trajectory.npz", kind=np.asarray(kind), axes=np.asarray("a <plane>"), **arrays)
    if log:
        entries = [{"step": s, "loss": 1.0, "x0_error": [1 / s, 0.5, 2.0]} for s in (10, 20, 30)]
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (folder / "metrics.jsonl").write_text(lines + '{"step": 40, "x0_er')
    return frames, real


def make_row(run, data="spiral", target="x0", value=0.1, **others):
    metrics = {"sliced_wasserstein": {"value": value, "floor": 0.01}, "off_manifold": {"value": value, "floor": 2e-16}}
    return {
        "run": run,
        "data": data,
        "network": "mlp(hidden=64)",
        "target": target,
        "loss_space": "velocity",
        "weighting": None,
        "t_range": [0.0, 1.0],
        "lr": 0.003,
        "seed": 0,
        "steps": 30,
        "params": 1234,
        "wall_s": 3.0,
        "status": "finished",
        "metrics": metrics,
        "x0_error": [0.1, 0.5, 1.0],
        "noise_bins": [0.0, 0.3, 0.6, 0.9],
        **others,
    }


def write(out, rows, **others):
    """The page's text."""
    said = {"title": "a title", "description": "what it is", "rank_by": "sliced_wasserstein", "notes": ["a note"]}
    path = write_report(out, rows=rows, **{**said, **others})
    assert path == out / "report.html"
    assert not list(out.glob(".*"))  # nothing temporary is left
    return path.read_text(encoding="utf-8")


def make_study(out, **others):
    """Two targets on one data set."""
    make_run(out, "x0")
    make_run(out, "v", steps=25)
    return write(out, [make_row("x0", value=0.1), make_row("v", target="v", value=0.35)], **others)


def embedded(page):
    return json.loads(re.search(r'<script type="application/json" id="samples-data">(.*?)</script>', page, re.S)[1])


def words(page):
    """What a reader reads."""
    body = re.sub(r"<(script|style|svg|noscript)\b.*?</\1>", " ", page[page.index("<body") :], flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"</(td|th|li|p|dt|div)>", " ", body))))


def section(page, name):
    return words("<body>" + page[page.index(f'id="{name}"') :].split("</section>")[0])


def test_the_page_needs_nothing_else(tmp_path):
    page = make_study(tmp_path)
    assert not re.search(r"https?:", page)
    assert "@import" not in page
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "default-src 'none'" in page  # and the browser holds it to that
    assert str(tmp_path) not in page


def test_title_notes_and_metrics_in_words(tmp_path):
    text = words(make_study(tmp_path, notes=["one thing", "another"]))
    for expected in ("a title", "what it is", "one thing", "another", "Wasserstein-1 distance", "2 runs", "30 steps"):
        assert expected in text


def test_names_are_escaped(tmp_path):
    make_run(tmp_path, "x0")
    row = make_row("x0", data=NASTY, network=NASTY, target={"name": NASTY, "k": 0.5})
    rows = [row, make_row("gone", data=NASTY, target="eps", status="failed", reason=NASTY)]
    page = write(tmp_path, rows, title=NASTY, description=NASTY, notes=[NASTY])
    assert page.count("<script") == page.count("</script>") == 2
    assert "<b>bold" not in page
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page
    assert "{{title}}" in words(page)
    assert embedded(page)["strips"][0]["panels"]
    ElementTree.parse(tmp_path / "overview.svg")


def test_a_run_cannot_point_outside_the_study(tmp_path):
    make_run(tmp_path / "elsewhere", "secret")
    out = tmp_path / "study"
    out.mkdir()
    for name in ("../elsewhere/secret", str(tmp_path / "elsewhere" / "secret")):
        assert embedded(write(out, [make_row(name)]))["strips"][0]["panels"] == []


def test_runs_that_did_not_finish_are_listed_with_their_reason(tmp_path):
    make_run(tmp_path, "x0")
    lost = {"x0_error": None, "metrics": {"sliced_wasserstein": {"value": None, "floor": 0.01}}}
    rows = [
        make_row("a", target="v", status="diverged", reason="the loss was nan at step 17", **lost),
        make_row("x0"),
        make_row(
            "b", target="eps", status="failed", reason="out of memory", **{**lost, "noise_bins": None, "params": None}
        ),
        make_row("c", target="edm", status="unfinished", **lost),
    ]
    page = write(tmp_path, rows)
    table = section(page, "leaderboard")
    assert "diverged: the loss was nan at step 17" in table
    assert "failed: out of memory" in table
    assert "unfinished" in table
    assert table.index("x0") < table.index("diverged")
    assert "the only target that finished" in words(page)


@pytest.mark.parametrize("rows", [[], [make_row("gone", value=None, status="unfinished", x0_error=None)]])
def test_a_study_of_nothing(tmp_path, rows):
    write(tmp_path, rows, notes=[], description="")
    ElementTree.parse(tmp_path / "overview.svg")


def test_one_run_without_log_or_errors(tmp_path):
    make_run(tmp_path, "x0", log=False)
    page = write(tmp_path, [make_row("x0", x0_error=None, noise_bins=None)], rank_by="no such metric")
    assert 'id="noise"' not in page
    assert 'id="learning"' not in page
    assert "the only target here" in words(page)


def test_the_verdict_names_the_best_and_by_how_much(tmp_path):
    text = words(make_study(tmp_path))
    assert "x0 is best (0.100); the runner-up, v (0.350), scores 3.5 times as much." in text
    assert "One seed per target, so there are no error bars" in text


def test_the_verdict_over_data_sets(tmp_path):
    scores = {("a", "x0"): 0.1, ("a", "v"): 0.2, ("b", "x0"): 0.3, ("b", "v"): 0.1, ("c", "x0"): 0.5, ("c", "v"): 0.49}
    rows = [make_row(f"{d}-{t}", data=d, target=t, value=value) for (d, t), value in scores.items()]
    text = words(write(tmp_path, rows))
    assert "x0 is best on 1 of 3 data sets and v on 1; on c the first two are level." in text
    assert "c: v (0.490) and x0 (0.500) are level." in text


def test_the_verdict_tells_of_metrics_that_disagree(tmp_path):
    rows = [make_row("x0", value=0.2), make_row("v", target="v", value=0.1)]
    rows[1]["metrics"]["off_manifold"]["value"] = 5.0
    assert "but off_manifold (0.200 against 5.00) favours x0." in words(write(tmp_path, rows))


def test_dust_is_no_difference(tmp_path):
    rows = [make_row("x0", value=0.1), make_row("v", target="v", value=0.4)]
    for row, value in zip(rows, (2.4e-16, 2.1e-17), strict=True):
        row["metrics"]["off_manifold"]["value"] = value
    text = words(write(tmp_path, rows))
    assert "favours" not in text
    assert "e-16" not in text
    assert "e−16" not in text


def test_several_seeds_are_one_entry(tmp_path):
    rows = [
        make_row(f"{t}-{seed}", target=t, seed=seed, value=value + 0.01 * seed)
        for t, value in (("x0", 0.1), ("v", 0.12))
        for seed in range(3)
    ]
    text = words(write(tmp_path, rows))
    assert "x0 (0.110 ± 0.0100) and v (0.130 ± 0.0100) are level" not in text  # a gap of two deviations, just
    assert "Means over 3 seeds" in text
    assert "3 seeds" in text
    assert len(re.findall(r'<th scope="row">.{0,900}?<span>x0</span>', write(tmp_path, rows))) == 1
    rows[4]["metrics"]["sliced_wasserstein"]["value"] = 0.2
    assert "are level" in words(write(tmp_path, rows))


def test_only_the_best_learning_rate_is_shown(tmp_path):
    make_run(tmp_path, "x0")
    tried = {"lr_tried": [0.001, 0.003, 0.01]}
    rows = [
        make_row("x0", best_lr=True, **tried),
        make_row("x0-low", best_lr=False, lr=0.001, value=7.77, **tried),
        make_row("v", target="v", best_lr=True, lr=0.01, **tried),
    ]
    page = write(tmp_path, rows)
    table = section(page, "leaderboard")
    assert "0.003best of 3 " in table
    assert "0.01best of 3, the largest tried" in table
    assert "1 run at other learning rates" in table
    assert "7.77" not in page


def test_what_sets_two_runs_of_a_target_apart_is_named(tmp_path):
    rows = [
        make_row("a", network="mlp(hidden=64)"),
        make_row("b", network="mlp(hidden=256)"),
        make_row("c", target="v"),
    ]
    rows.append(make_row("d", target="v", status="failed", network="mlp", data="other", value=None))
    table = section(write(tmp_path, rows), "leaderboard")
    assert "x0, mlp(hidden=64)" in table
    assert "x0, mlp(hidden=256)" in table
    assert "v, " not in table  # a failed run, which knows only its target's name, does not split it


def decoded(panel, dtype):
    return np.frombuffer(base64.b64decode(panel["data"]), dtype).reshape(panel["shape"])


def test_points_come_through_within_quantisation(tmp_path):
    frames, real = make_run(tmp_path, "x0", steps=10)
    frames[3, 0] = np.nan
    arrays = dict(np.load(tmp_path / "x0" / "trajectory.npz"))
    np.savez(tmp_path / "x0" / "trajectory.npz", **{**arrays, "frames": frames})
    strip = embedded(write(tmp_path, [make_row("x0")]))["strips"][0]
    panel = strip["panels"][0]
    assert panel["kept"] == list(range(11))
    unit = strip["half"] * strip["span"] / 32767
    whole = decoded(panel, "<i2")
    got = whole * unit + strip["centre"]
    known = np.isfinite(frames)
    np.testing.assert_allclose(got[known], frames[known], atol=0.51 * unit)
    assert (whole[3, 0] == -32768).all()
    np.testing.assert_allclose(decoded(strip["real"], "<i2")[0] * unit + strip["centre"], real, atol=0.51 * unit)
    assert np.abs(real - strip["centre"]).max() < strip["half"]


def test_points_outside_the_frame_are_counted(tmp_path):
    make_run(tmp_path, "x0", count=40)
    arrays = dict(np.load(tmp_path / "x0" / "trajectory.npz"))
    arrays["frames"][-1] = 0
    arrays["frames"][-1, :5] = 1e9
    np.savez(tmp_path / "x0" / "trajectory.npz", **arrays)
    assert "5 of 40 points outside the frame" in section(write(tmp_path, [make_row("x0")]), "samples")


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3)])
def test_pictures_come_through_exactly(tmp_path, shape):
    frames, real = make_run(tmp_path, "x0", kind="pictures", steps=5, shape=shape)
    page = write(tmp_path, [make_row("x0")])
    strip = embedded(page)["strips"][0]
    np.testing.assert_array_equal(decoded(strip["panels"][0], np.uint8), frames[:, :36])
    np.testing.assert_array_equal(decoded(strip["real"], np.uint8)[0], real[:36])
    assert "data:image/png;base64" in page
    ElementTree.parse(tmp_path / "overview.svg")


def test_long_ways_are_thinned_out_and_large_pictures_made_smaller(tmp_path):
    rows = []
    for i in range(3):
        make_run(tmp_path, f"p{i}", steps=900, count=256)
        rows.append(make_row(f"p{i}", data="points", target=f"t{i}"))
        make_run(tmp_path, f"q{i}", kind="pictures", steps=12, count=36, shape=(96, 80, 3))
        rows.append(make_row(f"q{i}", data="pictures", target=f"t{i}"))
    page = write(tmp_path, rows)
    assert len(page) < 4_000_000
    for strip in embedded(page)["strips"]:
        for panel in strip["panels"]:
            assert panel["kept"][0] == 0
            assert panel["kept"][-1] == panel["steps"]
            assert len(panel["kept"]) == panel["shape"][0] == len(panel["t"]) >= 2
    assert "Some steps are left out" in words(page)


def test_the_overview_is_one_drawing(tmp_path):
    make_study(tmp_path)
    path = tmp_path / "overview.svg"
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    said = " ".join(root.itertext())
    for expected in ("a title", "spiral", "real data", "x0", "v", "0.350", "sliced_wasserstein"):
        assert expected in said
    assert path.stat().st_size < 60_000


def test_charts_are_static_and_also_numbers(tmp_path):
    page = make_study(tmp_path)
    for svg in re.findall(r'<figure class="chart">.*?(<svg.*?</svg>)</figure>', page, re.S):
        ElementTree.fromstring(svg)
    assert "does not rank the quality of samples" in section(page, "noise")
    assert "0.500" in section(page, "noise")
    assert page.count('<figure class="chart">') == 2


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (2e-16, "0"), (0.05497, "0.0550"), (0.9996, "1.00"), (20.03, "20.0"), (1046.2, "1,050"), (-3.0, "−3.00"),
        (90343.1, "90,300"), (2.7e7, "2.70e7"), (4.2e-5, "4.20e−5"), (None, "–"), (math.nan, "–"), (math.inf, "∞"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value, written):
    assert number(value) == written


def test_png_holds_the_pixels():
    pixels = frames_of("pictures", 0, 5, (3, 4, 3))[0]
    sheet = contact_sheet(pixels)
    assert sheet.shape == (6, 12, 3)
    np.testing.assert_array_equal(sheet[3:6, 4:8], pixels[4])
    raw = png(sheet)
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    size = int.from_bytes(raw[33:37], "big")
    lines = np.frombuffer(zlib.decompress(raw[41 : 41 + size]), np.uint8).reshape(6, 37)
    np.testing.assert_array_equal(lines[:, 1:], sheet.reshape(6, 36))


# ----------------------------------------------------------------------------------- in a browser

# A page that loads reports in frames of two widths, uses them as a reader would and writes what it saw.
_DRIVER = """<!doctype html><body><pre id="seen">nothing</pre><script>
const seen = {errors: []};
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const pixels = (d, i) => {
  return d.querySelectorAll("canvas")[i].toDataURL();
};
async function open(address, width) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:800px;border:0`;
  frame.src = address;
  const loaded = new Promise((done) => { frame.onload = done; });
  document.body.append(frame);
  frame.contentWindow.addEventListener("error", (e) => seen.errors.push(e.message));
  await loaded;
  await wait(200);
  return frame;
}
async function visit(address, width) {
  const frame = await open(address, width), d = frame.contentDocument, w = frame.contentWindow;
  const step = d.getElementById("step"), readout = d.getElementById("readout"), play = d.getElementById("play");
  const got = {overflow: d.documentElement.scrollWidth - width, canvases: d.querySelectorAll("canvas").length};
  got.last = readout.textContent;
  const before = pixels(d, 1), real = pixels(d, 0), height = d.documentElement.scrollHeight;
  step.value = "0";
  step.dispatchEvent(new w.Event("input"));
  got.first = readout.textContent;
  got.spoken = step.getAttribute("aria-valuetext");
  got.moved = pixels(d, 1) !== before;
  got.real_stays = pixels(d, 0) === real;
  got.grown = d.documentElement.scrollHeight - height;
  w.location.hash = "#step=0.5";
  await wait(100);
  got.half = readout.textContent;
  play.click();
  got.button = play.getAttribute("aria-label");
  await wait(12000);
  got.played = readout.textContent;
  got.again = pixels(d, 1) === before;
  got.rest = play.getAttribute("aria-label");
  play.click();
  await wait(300);
  step.value = "0";
  step.dispatchEvent(new w.Event("input"));
  await wait(2000);
  got.held = readout.textContent;
  frame.remove();
  return got;
}
(async () => {
  try {
    for (const address of ADDRESSES) {
      for (const width of [375, 1280]) seen[address + width] = await visit(address, width);
    }
  } catch (e) { seen.errors.push(String(e)); }
  document.getElementById("seen").textContent = JSON.stringify(seen);
})();
</script>"""


def browser():
    """Where Chromium is. Its absence skips the test, and fails it where CI says it must be there."""
    found = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if found is None and os.environ.get("CI") == "true":
        pytest.fail("the tests of the page need chromium, and CI is true: install it")
    return found or pytest.skip("chromium is not installed")


def look(page: Path, profile: Path):
    """The page's document after its scripts have run, and what was said on the console."""
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"),
        *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=90000", "--window-size=1400,900", "--dump-dom"),
    ]
    command = [browser(), *options, f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def test_the_page_works_in_a_browser(tmp_path):
    browser()
    long = "a_name_without_any_space_in_it_" * 6
    make_run(tmp_path / "points", "x0", steps=10)
    make_run(tmp_path / "points", "v", steps=25)
    rows = [make_row("x0", data=long), make_row("v", data=long, target="v", value=0.35)]
    rows.append(make_row("k", data=long, target={"name": long}, status="failed", reason=long, value=None))
    write(tmp_path / "points", rows, title=long, notes=[long], description=long)
    make_run(tmp_path / "pictures", "x0", kind="pictures", steps=25)
    write(tmp_path / "pictures", [make_row("x0", target=NASTY)], title=NASTY)

    driver = tmp_path / "driver.html"
    driver.write_text(_DRIVER.replace("ADDRESSES", '["points/report.html", "pictures/report.html"]'), encoding="utf-8")
    document, console = look(driver, tmp_path / "profile")
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', document, re.S)[1]))
    assert console == []
    assert seen.pop("errors") == []
    assert len(seen) == 4
    for where, got in seen.items():
        assert got["overflow"] <= 0, where
        assert got["canvases"] == (3 if where.startswith("points") else 2)
        assert got["last"] == got["played"] == "final samples"
        assert got["first"] == got["spoken"] == got["held"] == "step 0 of 25, t = 1.00"
        assert got["half"].startswith(("step 12 of 25, t = 0.5", "step 13 of 25, t = 0.4")), got["half"]
        assert got["moved"]
        assert got["real_stays"]
        assert got["again"]
        assert got["grown"] == 0, where  # no jump of what is below
        assert (got["button"], got["rest"]) == ("Pause", "Play")
