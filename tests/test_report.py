"""The page of a study: self-contained, escaped, honest about what failed, and alive in a browser."""

import base64
import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from reparam.report import write_report

NASTY = "</script><script>alert('x')</script> \"<b>&"
METRICS = ("sliced_wasserstein", "off_manifold")


def row(run, target, value, **more):
    metrics = {m: {"value": value, "floor": 0.01} for m in METRICS}
    base = {"run": run, "data": "curve", "network": "mlp", "target": target, "loss_space": "velocity", "seed": 0}
    base |= {"weighting": None, "t_range": [0.0, 1.0], "lr": 1e-3, "steps": 40, "params": 1234, "wall_s": 3.2}
    base |= {"status": "finished", "metrics": metrics, "best_lr": True, "lr_tried": [1e-3]}
    base |= {"x0_error": [0.01, 0.1, 0.5], "noise_bins": [0.0, 0.3, 0.6, 0.98]}
    return base | more


def folder(out, run, kind="points", steps=5, count=40):
    """What a run leaves for the page."""
    rng = np.random.default_rng(sum(map(ord, run)))
    if kind == "points":
        frames, real = rng.normal(size=(steps + 1, count, 2)).astype(np.float32), rng.normal(size=(count, 2))
    else:
        frames, real = rng.integers(0, 256, (steps + 1, count, 8, 8)), rng.integers(0, 256, (count, 8, 8))
        frames, real = frames.astype(np.uint8), real.astype(np.uint8)
    (out / run).mkdir(parents=True)
    np.savez(
        out / run / "trajectory.npz",
        frames=frames,
        times=np.linspace(1, 0, steps + 1),
        real=real.astype(frames.dtype),
        kind=np.asarray(kind),
        axes=np.asarray("the plane"),
    )
    lines = [{"step": s, "loss": 1 / s, "x0_error": [0.5 / s, 0.6 / s, 0.9]} for s in (10, 20, 40)]
    (out / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return frames


def page(out, rows, **more):
    options = {"title": "a study", "description": "what it is", "rank_by": "sliced_wasserstein", "notes": ["one note"]}
    return write_report(out, rows=rows, **(options | more)).read_text(encoding="utf-8")


@pytest.fixture
def study(tmp_path):
    rows = [row("a", "x0", 0.02), row("b", "velocity", 0.5)]
    frames = {r["run"]: folder(tmp_path, r["run"]) for r in rows}
    return tmp_path, rows, frames


def embedded(text):
    return json.loads(re.search(r'<script type="application/json" id="samples-data">(.*?)</script>', text, re.S)[1])


def test_it_is_one_file_that_asks_for_nothing(study):
    out, rows, _ = study
    text = page(out, rows)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//|file:)""", text)
    assert "@import" not in text
    assert "default-src 'none'" in text  # and the browser is told to hold it to that
    assert "one note" in text
    assert sorted(p.name for p in out.iterdir()) == ["a", "b", "overview.svg", "report.html"]


def test_the_verdict_and_the_table_say_who_won(study):
    out, rows, _ = study
    text = page(out, rows)
    verdict = re.sub(r"<[^>]+>", "", re.search(r'<section class="verdict".*?</section>', text, re.S)[0])
    assert "x0 is best" in verdict
    assert "25 times" in verdict
    assert "no error bars" in verdict
    table = re.search(r"<table.*?</table>", text, re.S)[0]
    assert table.index("x0") < table.index("velocity")
    assert "0.0100" in table or "0.01" in table  # the floor


def test_nasty_names_are_escaped(tmp_path):
    rows = [row("a", NASTY, 0.02, data=NASTY, network=NASTY)]
    folder(tmp_path, "a")
    text = page(tmp_path, rows, title=NASTY, description=NASTY, notes=[NASTY])
    assert "<script>alert" not in text
    assert text.count("</script>") == 2
    ElementTree.parse(tmp_path / "overview.svg")


def test_what_failed_is_listed_with_its_reason(study):
    out, rows, _ = study
    gone = {m: {"value": None, "floor": 0.01} for m in METRICS}
    rows += [
        row("c", "eps", None, status="diverged", reason="the loss became nan at step 7", metrics=gone, x0_error=None),
        row("d", "v", None, status="failed", reason="its process <died>", metrics=gone, x0_error=None, params=None),
    ]
    text = page(out, rows)
    assert "the loss became nan at step 7" in text
    assert "its process &lt;died&gt;" in text
    everything_failed = [r for r in rows if r["status"] != "finished"]
    assert "diverged" in page(out, everything_failed)


def test_embedded_points_are_the_frames(study):
    out, rows, frames = study
    strip = embedded(page(out, rows))["strips"][0]
    for panel, run in zip(strip["panels"], ("a", "b"), strict=True):
        raw = np.frombuffer(base64.b64decode(panel["data"]), np.int16).reshape(panel["shape"]).astype(float)
        points = raw / 32767 * strip["span"] * strip["half"] + np.asarray(strip["centre"])
        inside = np.abs(raw) < 32767
        want = frames[run][panel["kept"]]
        assert inside.mean() > 0.95
        assert np.abs(points - want)[inside].max() < 1e-3 * strip["half"] * strip["span"]


def test_embedded_pictures_are_the_frames(tmp_path):
    frames = folder(tmp_path, "a", kind="pictures", count=50)
    panel = embedded(page(tmp_path, [row("a", "x0", 0.1)]))["strips"][0]["panels"][0]
    raw = np.frombuffer(base64.b64decode(panel["data"]), np.uint8).reshape(panel["shape"])
    assert np.array_equal(raw, frames[panel["kept"]][:, : panel["shape"][1]])
    svg = (tmp_path / "overview.svg").read_text()
    assert "data:image/png;base64," in svg


def test_learning_rates_other_than_the_best_are_left_out(study):
    out, rows, _ = study
    rows[0]["lr_tried"] = [1e-3, 1e-2]
    rows.append(row("worse", "x0", 0.9, lr=1e-2, best_lr=False, lr_tried=[1e-3, 1e-2]))
    text = page(out, rows)
    assert "best of 2" in text
    assert len(embedded(text)["strips"][0]["panels"]) == 2


def test_a_large_study_stays_small(tmp_path):
    rows = []
    for i in range(12):
        rows.append(row(f"r{i}", ("x0", "velocity", "eps")[i % 3], 0.1 + i, data=f"curve {i // 3}"))
        folder(tmp_path, f"r{i}", steps=50, count=256)
    assert len(page(tmp_path, rows)) < 4e6
    assert (tmp_path / "overview.svg").stat().st_size < 3e5


def test_missing_pieces_do_no_harm(tmp_path):
    assert "x0" in page(tmp_path, [row("a", "x0", 0.1)])  # no folder at all
    assert "a study" in page(tmp_path, [])


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = """<!doctype html>
<body><iframe id=f src="report.html" width="%d" height="900"></iframe><pre id=r></pre><script>
const frame = document.getElementById("f");
const pixels = (d) => [...d.querySelectorAll("canvas")].map((c) => c.toDataURL()).join();
frame.onload = () => setTimeout(() => {
  const d = frame.contentDocument, slider = d.getElementById("step"), before = pixels(d);
  const words = d.getElementById("readout").textContent;
  slider.value = 0;
  slider.dispatchEvent(new Event("input", {bubbles: true}));
  setTimeout(() => {
    document.getElementById("r").textContent = JSON.stringify({
      canvases: d.querySelectorAll("canvas").length, moved: pixels(d) !== before,
      said: d.getElementById("readout").textContent !== words,
      wide: d.documentElement.scrollWidth - d.documentElement.clientWidth,
      named: [...d.querySelectorAll("button, input")].every((e) => e.labels.length || e.ariaLabel || e.textContent),
    });
  }, 300);
}, 500);
</script>"""


@pytest.mark.skipif(BROWSER is None and os.environ.get("CI") != "true", reason="needs Chromium")
@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("kind", ["points", "pictures"])
def test_in_a_browser(tmp_path, width, kind):
    """The slider moves the pictures, nothing overflows, the console stays silent."""
    assert BROWSER, "CI needs Chromium"
    rows = [row(name, target, 0.1) for name, target in (("a", "x0"), ("b", "velocity"), ("c", "eps"))]
    for r in rows:
        folder(tmp_path, r["run"], kind=kind)
    page(tmp_path, rows)
    (tmp_path / "driver.html").write_text(DRIVER % width)
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=8000",
            f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "driver.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    found = json.loads(re.search(r'<pre id="r">(.*?)</pre>', done.stdout, re.S)[1] or "{}")
    assert found == {"canvases": 4, "moved": True, "said": True, "wide": 0, "named": True}, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, re.findall(r".*CONSOLE.*", done.stderr)
