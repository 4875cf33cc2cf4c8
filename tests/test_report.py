"""The study page: what it says, what it carries, and that it works in a browser."""

import base64
import html
import io
import json
import math
import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib

import numpy as np
import pytest
import torch

from reparam.data import Data
from reparam.report import embed, overview, write_report
from reparam.report.plots import contact_sheet, number, picture_sheet, png
from reparam.report.views import view_of

pytest_plugins = ["browsing"]

NASTY = "</script><script>alert(1)</script> \"quoted\" 'single' &amp; <b>bold</b> {{title}} \ud800 \x00"


def frames_of(kind, steps, count, shape, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "points":
        return rng.normal(size=(steps + 1, count, 2)).astype(np.float32)
    return rng.integers(0, 256, (steps + 1, count, *shape), dtype=np.uint8)


def make_run(out, name, *, kind="points", steps=10, count=40, shape=(4, 6), log=True, frames=None, **others):
    """A run's folder; returns its frames and real data."""
    folder = out / name
    folder.mkdir(parents=True)
    if frames is None:
        frames = frames_of(kind, steps, count, shape)
    else:
        kind, steps, count, shape = "pictures", len(frames) - 1, frames.shape[1], frames.shape[2:]
    if kind == "points":
        frames[0] *= 3  # some of the first points lie outside the frame, none of the last
        frames[-1] *= 0.1
    real = frames_of(kind, 0, count, shape, seed=1)[0]
    times = np.linspace(1, 0, steps + 1)
    arrays = {"frames": frames, "times": times, "real": real, **others}
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


@pytest.mark.parametrize("kind", ["points", "pictures"])
def test_the_page_needs_nothing_else(tmp_path, kind):
    if kind == "points":
        page = make_study(tmp_path)
    else:
        make_run(tmp_path, "x0", kind=kind, shape=(8, 8, 3))
        make_nearest(tmp_path, "x0")
        page = write(tmp_path, [make_row("x0")])
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
    half = 0.01 * 4.302653 / math.sqrt(3)  # Student's quantile with 2 degrees of freedom
    assert f"x0 is best (0.110 ± {half:.4f}); the runner-up, v (0.130 ± {half:.4f})" in text  # of every seed
    assert "Means over 3 seeds" in text
    assert "3 seeds" in text
    assert len(re.findall(r'<th scope="row">.{0,900}?<span>x0</span>', write(tmp_path, rows))) == 1
    rows[4]["metrics"]["sliced_wasserstein"]["value"] = 0.2
    page = write(tmp_path, rows)
    assert "there is no difference from v (0.153 ± " in words(page)
    assert section(page, "leaderboard").count("no difference from best") == 1
    assert section(page, "leaderboard").count(f"± {half:.4f}") == 3


def test_a_data_set_without_a_difference_is_no_win(tmp_path):
    values = {("a", "x0"): (0.1, 0.11), ("a", "v"): (0.2, 0.211), ("b", "x0"): (0.3, 0.31), ("b", "v"): (0.29, 0.33)}
    rows = [
        make_row(f"{d}-{t}-{seed}", data=d, target=t, seed=seed, value=value)
        for (d, t), found in values.items()
        for seed, value in enumerate(found)
    ]
    text = words(write(tmp_path, rows))
    assert "x0 is best on 1 of 2 data sets; on b there is no difference between the best and another." in text
    assert "Two seeds make wide intervals" in text


def test_the_interval_of_a_single_run(tmp_path):
    rows = [make_row("x0", value=0.1), make_row("v", target="v", value=0.12), make_row("k", target="k", value=0.5)]
    for row in rows:
        entry = row["metrics"]["sliced_wasserstein"]
        entry |= {"interval": [entry["value"] - 0.02, entry["value"] + 0.03], "interval_from": "10 blocks of samples"}
    page = write(tmp_path, rows)
    text = words(page)
    assert "x0 scores best (0.100 ± 0.0250), but there is no difference from v (0.120 ± 0.0250)" in text
    assert "for 2 comparisons, of these samples only; another seed may differ by more); k is worse." in text
    assert "of one run’s samples" in section(page, "leaderboard")
    assert section(page, "leaderboard").count("no difference from best") == 1
    assert "interval from 10 blocks of samples" in section(page, "measured")


def test_columns_where_more_is_better(tmp_path):
    rows = [make_row("x0"), make_row("v", target="v")]
    for row, value in zip(rows, (0.4, 0.8), strict=True):
        row["metrics"]["precision"] = {"value": value, "floor": 0.9, "better": "higher"}
        row["metrics"]["kernel_distance"] = {"value": -0.001 * value, "floor": -0.001}
    page = write(tmp_path, rows, rank_by="precision")
    table = section(page, "leaderboard")
    assert table.index("v 0.800") < table.index("x0 0.400")
    assert "precisionhigher is betterranked by this" in table
    assert "but of precision more is" in table
    assert 'aria-sort="descending"' in page
    assert "<b>0.800</b>" in page
    assert "<b>−8.00e−4</b>" in page
    assert "v is best (0.800); the runner-up, x0 (0.400), reaches 50 % of that" in words(page)
    assert "(higher is better)" in " ".join(ElementTree.parse(tmp_path / "overview.svg").getroot().itertext())


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


def test_long_ways_are_thinned_out(tmp_path):
    rows = []
    for i in range(3):
        make_run(tmp_path, f"p{i}", steps=900, count=256)
        rows.append(make_row(f"p{i}", target=f"t{i}"))
    page = write(tmp_path, rows)
    assert len(page) < 4_000_000
    for panel in embedded(page)["strips"][0]["panels"]:
        assert panel["kept"][0] == 0
        assert panel["kept"][-1] == panel["steps"]
        assert 400 < len(panel["kept"]) == panel["shape"][0] == len(panel["t"]) < 900
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


# -------------------------------------------------------------------------------------- pictures


def unpng(raw):
    """The pixels of a PNG, [H, W] or [H, W, 3], by the standard's own words."""
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    at, body = 8, b""
    while at < len(raw):
        size, name = int.from_bytes(raw[at : at + 4], "big"), raw[at + 4 : at + 8]
        content = raw[at + 8 : at + 8 + size]
        assert zlib.crc32(name + content) == int.from_bytes(raw[at + 8 + size : at + 12 + size], "big")
        if name == b"IHDR":
            width, height, depth, colour = (*struct.unpack(">II", content[:8]), content[8], content[9])
        body += content if name == b"IDAT" else b""
        at += 12 + size
    assert depth == 8
    assert name == b"IEND"
    step = {0: 1, 2: 3}[colour]
    lines = np.frombuffer(zlib.decompress(body), np.uint8).reshape(height, 1 + width * step).tolist()
    above = [0] * (width * step)
    for line in lines:
        kind = line.pop(0)
        for i, up in enumerate(above):
            left, corner = (line[i - step], above[i - step]) if i >= step else (0, 0)
            guess = left + up - corner
            paeth = min((left, up, corner), key=lambda near: abs(guess - near))
            line[i] = (line[i] + (0, left, up, (left + up) // 2, paeth)[kind]) % 256
        above = line
    pixels = np.array(lines, np.uint8)
    return pixels.reshape(height, width, 3) if step == 3 else pixels


def unlinked(link):
    """The pixels of a data URI, with or without its beginning."""
    kind, _, data = link.removeprefix("data:").partition(";base64,")
    if kind == "image/png":
        return unpng(base64.b64decode(data))
    assert kind == "image/jpeg"
    image = pytest.importorskip("PIL.Image")
    return np.asarray(image.open(io.BytesIO(base64.b64decode(data))))


def static_sheets(page):
    """What the panels show without the script: the pictures' pixels, by the name of the panel."""
    found = re.findall(r'<svg viewBox="[^"]*" role="img" aria-label="([^"]*)"><image [^>]*href="([^"]*)"', page)
    return {name: unlinked(link) for name, link in found}


def smooth(steps, count, side, seed=0):
    """Colour pictures that are about as hard to compress as photographs."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 226, (steps + 1, count, side // 4, side // 4, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=2).repeat(4, axis=3) + rng.integers(0, 12, (side, side, 3), dtype=np.uint8)


def make_nearest(out, run, samples=7, k=3, shape=(8, 8, 3), **others):
    rng = np.random.default_rng(5)
    arrays = {
        "samples": rng.integers(0, 256, (samples, *shape), dtype=np.uint8),
        "nearest": rng.integers(0, 256, (samples, k, *shape), dtype=np.uint8),
        "distance": np.linspace(9, 3, samples)[:, None].astype(np.float32) + np.arange(k, dtype=np.float32) / 4,
        "typical": np.asarray(8.5),
        **others,
    }
    np.savez(out / run / "nearest.npz", **arrays)
    return arrays


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 1), (3, 4, 3), (1, 1, 3)])
@pytest.mark.parametrize("even", [True, False])
def test_png_holds_the_pixels(shape, even):
    pixels = frames_of("pictures", 0, 5, shape)[0]
    if even:  # filters pay
        pixels = np.cumsum(np.ones_like(pixels), axis=2, dtype=np.uint8) + pixels[:, :1, :1] // 2
    sheet = contact_sheet(pixels)
    np.testing.assert_array_equal(sheet[shape[0] : 2 * shape[0], shape[1] : 2 * shape[1]], pixels[4])
    assert (sheet[shape[0] :, 2 * shape[1] :] == 128).all()
    expected = sheet[..., 0] if shape[2:] == (1,) else sheet
    np.testing.assert_array_equal(unpng(png(sheet)), expected)


def test_png_of_what_changes_smoothly_is_small():
    down, across = np.mgrid[:64, :64]
    pixels = np.stack([2 * down, across + down, 3 * across], axis=-1).astype(np.uint8)
    assert len(png(pixels)) < 600 < pixels.nbytes / 10
    np.testing.assert_array_equal(unpng(png(pixels)), pixels)


@pytest.mark.parametrize(
    ("gap", "least", "by"),
    [(2, 1, 1), (2, 22, 1), (2, 23, 2), (0, 100, 6)],
)
def test_a_picture_sheet_is_enlarged_by_a_whole_factor(gap, least, by):
    pictures = frames_of("pictures", 0, 5, (4, 6, 3))[0]
    got = unpng(picture_sheet(pictures, gap=gap, least=least))
    assert got.shape == (by * (8 + gap), by * (18 + 2 * gap), 3)
    small = got[::by, ::by]
    np.testing.assert_array_equal(got, small.repeat(by, 0).repeat(by, 1))
    np.testing.assert_array_equal(small[4 + gap :, 6 + gap : 12 + gap], pictures[4])
    assert (small[4 + gap :, 12 + gap :] == 255).all()
    assert gap == 0 or (small[4:6] == 255).all()


def test_a_picture_sheet_of_one_grey_picture_and_of_none():
    grey = frames_of("pictures", 0, 1, (8, 8))[0]
    np.testing.assert_array_equal(unpng(picture_sheet(grey))[::32, ::32], grey[0])
    assert unpng(picture_sheet(grey)).shape == (256, 256)
    for bad in (grey[:0], grey[0], np.zeros((2, 4, 4, 2), np.uint8)):
        with pytest.raises(ValueError, match="expected pictures of shape"):
            picture_sheet(bad)


def test_without_pillow_pages_are_without_loss(tmp_path, monkeypatch):
    for module in (embed, overview):
        monkeypatch.setattr(module, "can_be_lossy", lambda: False)
    monkeypatch.setattr(embed, "_PICTURES", 900_000)
    for target in ("x0", "v"):
        make_run(tmp_path, target, frames=smooth(50, 36, 32))
    page = write(tmp_path, [make_row(t, target=t) for t in ("x0", "v")])
    assert "image/jpeg" not in page
    assert "(JPEG)" not in page
    assert len(embedded(page)["strips"][0]["panels"][0]["kept"]) >= 2


# -- what is stored


def colour_data(dtype, channels=3):
    train = torch.randint(0, 256, (20, channels, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    train[0, 0, 0, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    if dtype == torch.uint8:
        return train, Data("c", train, train, mean=127.5, std=63.75)
    return train, Data("c", (train.float() - 100) / 50, train[:2].float(), mean=100, std=50)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_kept_as_their_bytes(dtype, channels):
    train, data = colour_data(dtype, channels)
    view = view_of(data)
    assert (view.kind, view.image) == ("pictures", (4, 6))
    x = (train.double() - data.mean) / data.std
    got = view.compact(x.float().reshape(4, 5, channels, 4, 6))
    expected = train.reshape(4, 5, channels, 4, 6).movedim(2, -1).numpy()
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, expected if channels == 3 else expected[..., 0])


def test_pictures_of_no_numbers_are_grey_and_far_values_are_cut_off():
    _, data = colour_data(torch.uint8)
    x = torch.zeros(5, 3, 4, 6)
    for i, value in enumerate((math.nan, math.inf, -math.inf, 1e6, -1e6)):
        x[i, 1] = value
    got = view_of(data).compact(x)[:, 0, 0]
    assert got[:, 1].tolist() == [128, 128, 128, 255, 0]
    assert (got[:, 0] == 128).all()


def test_vectors_that_are_pictures_and_pictures_in_many_channels():
    digits = Data("d", torch.linspace(-1, 1, 12).reshape(2, 6), torch.zeros(2, 6), image=(2, 3))
    got = view_of(digits).compact(digits.train[None])
    np.testing.assert_array_equal(got[0, 1], [[139, 162, 185], [209, 232, 255]])
    latents = Data("l", torch.randn(30, 4, 2, 2), torch.zeros(2, 4, 2, 2))
    assert view_of(latents).compact(latents.train.reshape(3, 10, 4, 2, 2)).shape == (3, 10, 2)
    constant = Data("k", torch.zeros(4, 1, 2, 2), torch.zeros(2, 1, 2, 2))
    assert (view_of(constant).compact(constant.train) == 0).all()


# -- what the page carries


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (8, 8), (5, 3), (32, 32, 3)])
def test_pictures_come_through_exactly(tmp_path, shape):
    frames, real = make_run(tmp_path, "x0", kind="pictures", steps=5, count=11, shape=shape)
    page = write(tmp_path, [make_row("x0")])
    strip = embedded(page)["strips"][0]
    assert strip["kind"] == "pictures"
    panel = strip["panels"][0]
    assert panel["kept"] == list(range(6))
    assert len(panel["frames"]) == 5  # the script takes the final ones from the page
    for i, link in enumerate(panel["frames"]):
        np.testing.assert_array_equal(unlinked(link), contact_sheet(frames[i]))
    still = static_sheets(page)
    np.testing.assert_array_equal(still["x0, spiral"], contact_sheet(frames[-1]))
    np.testing.assert_array_equal(still["real data, spiral"], contact_sheet(real))
    assert 'data-columns="4" data-count="11"' in page
    text = section(page, "samples")
    assert "Drawn: 11 pictures of each. The same cell starts from the same noise in every panel" in text
    assert "compressed" not in text
    assert "Some steps" not in text
    ElementTree.parse(tmp_path / "overview.svg")


def test_at_most_36_pictures_are_shown(tmp_path):
    frames, _ = make_run(tmp_path, "x0", kind="pictures", steps=2, count=50)
    np.testing.assert_array_equal(
        static_sheets(write(tmp_path, [make_row("x0")]))["x0, spiral"], contact_sheet(frames[-1, :36])
    )


def test_large_pictures_are_shrunk_by_averaging(tmp_path):
    frames, _ = make_run(tmp_path, "x0", kind="pictures", steps=1, count=1, shape=(128, 96, 3))
    make_run(tmp_path, "v", kind="pictures", steps=1, count=1, shape=(96, 96))
    page = write(tmp_path, [make_row("x0", data="a"), make_row("v", data="b", target="v")])
    still = static_sheets(page)
    blocks = frames[-1, 0].reshape(64, 2, 48, 2, 3).mean((1, 3))
    assert still["x0, a"].shape == (64, 48, 3)
    assert np.abs(still["x0, a"] - blocks).max() <= 0.51
    assert still["v, b"].shape == (64, 64)
    assert "shrunk from 96×128 to 48×64 pixels" in words(page)
    assert "shrunk from 96×96 to 64×64 pixels" in words(page)


def test_a_picture_of_one_colour_keeps_it_when_shrunk(tmp_path):
    frames = np.full((2, 1, 100, 70, 3), (10, 200, 90), np.uint8)
    make_run(tmp_path, "x0", frames=frames)
    got = static_sheets(write(tmp_path, [make_row("x0")]))["x0, spiral"]
    np.testing.assert_array_equal(got, np.broadcast_to(frames[0, 0, 0, 0], (64, 45, 3)))


@pytest.mark.parametrize(("runs", "steps", "side"), [(3, 50, 32), (6, 50, 32), (3, 20, 64), (3, 9, 128)])
def test_a_study_of_colour_pictures_stays_below_six_megabytes(tmp_path, runs, steps, side):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(runs):
        # One target yields noise, as targets do that fail; the others pictures.
        noise = rng.integers(0, 256, (steps + 1, 36, side, side, 3), dtype=np.uint8)
        make_run(tmp_path, f"r{i}", frames=noise if i == 0 else smooth(steps, 36, side, i))
        make_nearest(tmp_path, f"r{i}", samples=12, k=4, shape=(side, side, 3))
        rows.append(make_row(f"r{i}", target=f"t{i}"))
    page = write(tmp_path, rows)
    assert len(page) < 6_000_000
    for panel in embedded(page)["strips"][0]["panels"]:
        assert panel["kept"][0] == 0
        assert panel["kept"][-1] == panel["steps"] == steps
        assert 8 <= len(panel["kept"]) == len(panel["frames"]) + 1 == len(panel["t"])
        assert all(link.startswith("image/jpeg") for link in panel["frames"])
    wide, count = int(re.search(r'data-columns="(\d+)"', page)[1]), int(re.search(r'data-count="(\d+)"', page)[1])
    assert count >= 16
    cell = unlinked(embedded(page)["strips"][0]["panels"][1]["frames"][0]).shape[1] // wide
    assert cell >= min(side, 48)
    assert "(JPEG)" in section(page, "samples")
    drawing = (tmp_path / "overview.svg").read_text()
    assert len(drawing) < 260_000 * (runs + 1)  # well below 1.5 MB for four panels
    assert max(len(link) for link in re.findall(r'href="([^"]*)"', drawing)) < 260_000


def test_compressed_pictures_are_near_and_the_final_ones_exact(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "_PICTURES", 900_000)
    frames = smooth(50, 36, 32)
    make_run(tmp_path, "x0", frames=frames)
    make_run(tmp_path, "v", frames=frames[::-1])
    make_run(tmp_path, "k", frames=frames)
    page = write(tmp_path, [make_row(t, target=t) for t in ("x0", "v", "k")])
    panel = embedded(page)["strips"][0]["panels"][0]
    assert panel["frames"][0].startswith("image/jpeg")
    assert "The pictures before the final ones are compressed (JPEG)." in words(page)
    for at, link in list(zip(panel["kept"], panel["frames"], strict=False))[:3]:
        off = unlinked(link).astype(float) - contact_sheet(frames[at])
        assert np.sqrt((off**2).mean()) < 12
    still = static_sheets(page)
    np.testing.assert_array_equal(still["x0, spiral"], contact_sheet(frames[-1]))
    np.testing.assert_array_equal(still["v, spiral"], contact_sheet(frames[0]))


def test_final_pictures_are_compressed_too_where_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "_PICTURES", 900_000)
    monkeypatch.setattr(embed, "_STILLS", 90_000)
    frames = smooth(30, 36, 32)
    make_run(tmp_path, "x0", frames=frames)
    make_run(tmp_path, "v", frames=frames)
    page = write(tmp_path, [make_row("x0"), make_row("v", target="v")])
    assert "All pictures are compressed (JPEG), the final ones only a little." in words(page)
    off = static_sheets(page)["v, spiral"].astype(float) - contact_sheet(frames[-1])
    assert 0 < np.sqrt((off**2).mean()) < 6


def test_points_and_pictures_share_a_page(tmp_path):
    make_run(tmp_path, "p")
    make_run(tmp_path, "q", kind="pictures")
    page = write(tmp_path, [make_row("p", data="a"), make_row("q", data="b")])
    assert [strip["kind"] for strip in embedded(page)["strips"]] == ["points", "pictures"]
    assert "Real data in grey behind. The same cell starts" in " ".join(
        ElementTree.parse(tmp_path / "overview.svg").getroot().itertext()
    )


def test_damaged_files_are_as_none(tmp_path):
    good, _ = make_run(tmp_path, "x0", kind="pictures", steps=2, count=4)
    rows = [make_row("x0")]
    bad = {
        "dtype": good.astype(float),
        "axes": good[0],
        "colours": good[..., :2, None].repeat(2, -1),
        "none": good[:, :0],
    }
    for name, frames in bad.items():
        make_run(tmp_path, name, frames=good)
        arrays = dict(np.load(tmp_path / name / "trajectory.npz"))
        np.savez(tmp_path / name / "trajectory.npz", **{**arrays, "frames": frames})
        rows.append(make_row(name, target=name))
    make_run(tmp_path, "cut", frames=good)
    whole = (tmp_path / "cut" / "trajectory.npz").read_bytes()
    (tmp_path / "cut" / "trajectory.npz").write_bytes(whole[: len(whole) // 2])
    make_run(tmp_path, "short", frames=good, times=np.zeros(2))
    make_run(tmp_path, "deep", frames=good)
    np.savez(tmp_path / "deep" / "trajectory.npz", **{**arrays, "frames": good, "kind": "points"})
    rows += [make_row(name, target=name) for name in ("cut", "short", "deep")]
    page = write(tmp_path, rows)
    assert [p["series"] for p in embedded(page)["strips"][0]["panels"]] == [0]
    assert section(page, "samples").count("no samples kept") == 0  # it is said in the drawing
    assert page.count(">no samples kept</text>") == 7


# -- classes


def class_names(page):
    return [re.findall(r"<li[^>]*>(.*?)</li>", found) for found in re.findall(r'<ul class="classes".*?</ul>', page)]


def in_cells(sheet, height, width):
    """The pictures of a sheet as [rows, columns, H, W(, 3)]."""
    rows, columns = sheet.shape[0] // height, sheet.shape[1] // width
    return sheet.reshape(rows, height, columns, width, *sheet.shape[2:]).swapaxes(1, 2)


def test_pictures_of_classes_stand_line_by_line(tmp_path):
    names = np.array([f"class {i}" for i in range(10)])
    labels, real_labels = names[np.arange(64) % 10], names[np.arange(64) * 7 % 10]
    frames, real = make_run(
        tmp_path, "x0", kind="pictures", steps=2, count=64, shape=(4, 6, 3), labels=labels, real_labels=real_labels
    )
    page = write(tmp_path, [make_row("x0")])
    assert class_names(page) == [names.tolist()] * 2
    still = static_sheets(page)
    got, genuine = (in_cells(still[f"{name}, spiral"], 4, 6) for name in ("x0", "real data"))
    assert got.shape[:2] == genuine.shape[:2] == (10, 4)
    for i, name in enumerate(names):
        np.testing.assert_array_equal(got[i], frames[-1][labels == name][:4])
        np.testing.assert_array_equal(genuine[i], real[real_labels == name][:4])
    first = in_cells(unlinked(embedded(page)["strips"][0]["panels"][0]["frames"][0]), 4, 6)
    np.testing.assert_array_equal(first[7], frames[0][labels == "class 7"][:4])
    assert "each line was asked for the class named beside it" in words(page)
    assert "Drawn: 40 pictures of each" in words(page)
    assert "Line by line: class 0, class 1," in " ".join(
        ElementTree.parse(tmp_path / "overview.svg").getroot().itertext()
    )


def test_few_classes_take_several_lines_and_missing_pictures_are_grey(tmp_path):
    labels = np.array(["a"] * 17 + ["b"] * 3)
    frames, _ = make_run(tmp_path, "x0", kind="pictures", steps=1, count=20, shape=(2, 2), labels=labels)
    page = write(tmp_path, [make_row("x0")])
    assert class_names(page) == [["a", "b"]]  # the real pictures are of no known class
    got = in_cells(static_sheets(page)["x0, spiral"], 2, 2)
    assert got.shape[:2] == (6, 6)  # three lines a class
    np.testing.assert_array_equal(got[:3].reshape(18, 2, 2)[:17], frames[-1, :17])
    np.testing.assert_array_equal(got[3, :3], frames[-1, 17:])
    assert (got[4:] == 128).all()
    assert (got[3, 3:] == 128).all()


def test_a_run_without_classes_shows_the_same_noise_in_the_same_cell(tmp_path):
    labels = np.array(["a", "b"])[np.arange(12) % 2]
    frames, _ = make_run(tmp_path, "x0", kind="pictures", steps=1, count=12, shape=(2, 3), labels=labels)
    make_run(tmp_path, "v", frames=frames[::-1])
    page = write(tmp_path, [make_row("x0"), make_row("v", target="v")])
    assert len(class_names(page)) == 1
    still = static_sheets(page)
    np.testing.assert_array_equal(in_cells(still["x0, spiral"], 2, 3).reshape(12, 2, 3)[:6], frames[1, ::2])
    np.testing.assert_array_equal(in_cells(still["v, spiral"], 2, 3).reshape(12, 2, 3)[6:], frames[0, 1::2])


def test_many_classes_are_listed_below(tmp_path):
    labels = np.array([f"<class {i}>" for i in range(20)])
    make_run(tmp_path, "x0", kind="pictures", steps=1, count=20, labels=labels)
    page = write(tmp_path, [make_row("x0")])
    assert class_names(page) == []
    listed = re.search(r"<summary>Classes asked for</summary><ol>(.*?)</ol>", page)[1]
    lines = [html.unescape(line) for line in re.findall("<li>(.*?)</li>", listed)]
    assert lines[1] == "<class 5>, <class 6>, <class 7>, <class 8>, <class 9>"
    assert len(lines) == 4


def test_runs_that_were_asked_for_other_classes_are_not_laid_out_alike(tmp_path):
    labels = np.array(["a", "b"])[np.arange(9) % 2]
    frames, _ = make_run(tmp_path, "x0", kind="pictures", steps=1, count=9, labels=labels)
    make_run(tmp_path, "v", frames=frames, labels=labels[::-1].copy()[np.argsort(np.arange(9) % 3)])
    page = write(tmp_path, [make_row("x0"), make_row("v", target="v")])
    assert class_names(page) == []
    assert page.count("Classes asked for") == 2
    np.testing.assert_array_equal(static_sheets(page)["x0, spiral"], contact_sheet(frames[-1]))


def test_labels_that_are_not_the_pictures_are_left_out(tmp_path):
    frames, _ = make_run(tmp_path, "x0", kind="pictures", steps=1, count=9, labels=np.array(["a"] * 8))
    page = write(tmp_path, [make_row("x0")])
    assert class_names(page) == []
    np.testing.assert_array_equal(static_sheets(page)["x0, spiral"], contact_sheet(frames[-1]))


# -- nearest training pictures


def test_nearest_training_pictures_are_shown_the_closest_first(tmp_path):
    make_run(tmp_path, "x0", kind="pictures", shape=(8, 8, 3))
    make_run(tmp_path, "v", kind="pictures", shape=(8, 8, 3))
    arrays = make_nearest(tmp_path, "x0")
    page = write(tmp_path, [make_row("x0"), make_row("v", target="v")])
    found = page[page.index('id="nearest"') :].split("</section>")[0]
    rows = re.findall(r"<tr><td>(.*?)</tr>", found)
    assert len(rows) == 7
    assert found.count("<figure") == 1  # v has none
    for place, row in enumerate(rows):
        i = 6 - place
        pictures = [unlinked(link) for link in re.findall(r'src="([^"]*)"', row)]
        for got, expected in zip(pictures, [arrays["samples"][i], *arrays["nearest"][i]], strict=True):
            np.testing.assert_array_equal(got, expected)
        assert re.findall("<small>(.*?)</small>", row) == [number(float(d)) for d in arrays["distance"][i]]
    assert "<summary>1 more</summary>" in found
    text = words("<body>" + found)
    assert "median 6.00 of 7 samples; real pictures: 8.50. 2 of 7 come closer than half of that." in text
    assert "memorised" in text


def test_far_samples_and_unknown_distances(tmp_path):
    for name in ("x0", "v", "eps"):
        make_run(tmp_path, name, kind="pictures")
    make_nearest(tmp_path, "x0", shape=(8, 8), distance=np.full((7, 3), 9.0))
    make_nearest(tmp_path, "v", typical=np.asarray(math.nan), distance=np.full((7, 3), math.inf))
    arrays = make_nearest(tmp_path, "eps", samples=3, distance=np.array([[math.nan] * 3, [5.0] * 3, [2.0] * 3]))
    page = write(tmp_path, [make_row(t, target=t) for t in ("x0", "v", "eps")])
    text = section(page, "nearest")
    assert "None comes closer than half of that." in text
    assert "No distance is known." in text
    assert "median 3.50 of 2 samples; real pictures: 8.50. 1 of 2 come" in text
    last = page[page.index('id="nearest"') :].split("</figure>")[1]
    first = unlinked(re.search(r'src="([^"]*)" alt="sample 1"', last)[1])
    np.testing.assert_array_equal(first, arrays["samples"][2])


@pytest.mark.parametrize("bad", ["missing", "shape", "dtype", "count", "cut", "outside"])
def test_there_is_no_section_without_nearest_pictures(tmp_path, bad):
    make_run(tmp_path, "x0", kind="pictures")
    arrays = make_nearest(tmp_path, "x0")
    path = tmp_path / "x0" / "nearest.npz"
    if bad in ("shape", "dtype", "count"):
        wrong = {"shape": arrays["nearest"][:, :, 0], "dtype": arrays["nearest"] / 2, "count": arrays["nearest"][:2]}
        np.savez(path, **{**arrays, "nearest": wrong[bad]})
    if bad == "missing":
        path.unlink()
    if bad == "cut":
        path.write_bytes(path.read_bytes()[:300])
    page = write(tmp_path, [make_row("../x0" if bad == "outside" else "x0")])
    assert 'id="nearest"' not in page


# -- words


def with_metric(row, name, value, floor, **others):
    row["metrics"][name] = {"value": value, "floor": floor, **others}
    return row


def make_card(n=2048, *warnings, **others):
    reference = {"name": "photos", "digest": "ab" * 32, "n": 50000}
    return {"samples": {"n": n}, "reference": reference, "extractor": None, "warnings": list(warnings), **others}


def test_how_it_was_measured(tmp_path):
    rows = [
        make_row("a", card=make_card(2048, "few samples", pixels="bilinear")),
        make_row("b", target="v", card=make_card(2048, "few samples", "copies", pixels="bilinear")),
        with_metric(make_row("c", target="k", card=make_card(512, "few samples")), "fd", 2.0, 1.0, settings={"k": 3}),
        make_row("d", target="eps", status="failed", reason="no memory"),
    ]
    page = write(tmp_path, rows)
    found = page[page.index('id="measured"') :].split("</section>")[0]
    text = section(page, "measured")
    before, details = found.split("<details>")
    assert re.findall("<b>Warning:</b> (.*?)<small>(.*?)</small>", before) == [
        ("few samples", "all runs"),
        ("copies", "b"),
    ]
    assert "Warning" not in details
    assert "reference name photos; digest abababababab…; n 50,000" in text
    assert "extractor none" in text
    lines = re.findall('<tr><th scope="row">(.*?)</th>(.*?)</tr>', details)
    assert [(run, re.findall("<td>(.*?)</td>", cells)) for run, cells in lines] == [
        ("a, b", ["2048", "bilinear", "–"]),
        ("c", ["512", "–", "3"]),
    ]
    assert "samples n pixels fd k" in re.sub(r"</th>", " ", words("<body>" + details).replace("\n", " "))
    assert "Nothing is recorded of d." in text


def test_what_cards_say_is_escaped(tmp_path):
    card = make_card(3, NASTY, **{NASTY: {NASTY: NASTY, "list": [NASTY, 1]}})
    rows = [make_row("<b>bold", card=card), make_row("v", target="v", card=make_card(4, NASTY, **{NASTY: 1}))]
    with_metric(rows[0], NASTY, 1.0, 0.5, settings={NASTY: NASTY}, interval=[0.5, 1.5], interval_from=NASTY)
    page = write(tmp_path, rows)
    assert page.count("<script") == page.count("</script>") == 2
    assert "<b>bold" not in page
    assert section(page, "measured").count("{{title}}") > 4


@pytest.mark.parametrize("card", [None, [], "text", {}, {"warnings": "text"}, {"warnings": None, "samples": None}])
def test_cards_that_are_none(tmp_path, card):
    page = write(tmp_path, [make_row("x0", card=card), make_row("v", target="v")])
    assert ('id="measured"' in page) == (isinstance(card, dict) and "samples" in card)


def test_the_verdict_where_all_targets_fail(tmp_path):
    rows = [
        with_metric(make_row("a"), "frechet", 702.3, 5.2),
        with_metric(make_row("b", target="v"), "frechet", 1104.0, 5.2),
        with_metric(make_row("c", target="eps", status="diverged", reason="nan"), "frechet", None, 5.2),
        with_metric(make_row("d", target="k", status="unfinished"), "frechet", None, 5.2),
    ]
    text = words(write(tmp_path, rows, rank_by="frechet"))
    assert (
        "By frechet, on spiral x0 is best (702); the runner-up, v (1,100), scores 1.6 times as much. "
        "Even x0 is far from real data, which get 5.20. eps diverged; k did not finish." in text
    )
    rows[0]["metrics"]["frechet"]["value"] = 100.0
    assert "is far from real data" not in words(write(tmp_path, rows, rank_by="frechet"))
    for row in rows[1:]:
        row["status"] = "diverged"
    text = words(write(tmp_path, rows, rank_by="frechet"))
    assert "x0 (100) is the only target that finished. eps, v and k diverged." in text


def test_names_of_pictures_are_escaped(tmp_path):
    nasty = NASTY.replace("\ud800", "").replace("\x00", "") + "\u202e\u2067 rtl 🦊"
    labels = np.array([nasty, "b"])[np.arange(40) % 2]
    make_run(tmp_path, "x0", kind="pictures", shape=(8, 8, 3), labels=labels, real_labels=labels)
    make_run(tmp_path, "v", kind="pictures", shape=(8, 8, 3), labels=np.array([f"{nasty} {i}" for i in range(40)]))
    make_nearest(tmp_path, "x0")
    settings = {nasty: nasty, "n": 3}
    rows = [with_metric(make_row("x0", data=nasty, target={"name": nasty}), nasty, 0.5, 0.4, settings=settings)]
    rows.append(make_row("v", data=nasty + "2", target="v"))
    page = write(tmp_path, rows, title=nasty, description=nasty, notes=[nasty])
    assert page.count("<script") == page.count("</script>") == 2
    assert "<b>bold" not in page
    assert "\u202e" not in page
    assert "\u2067" not in page
    assert "🦊" in page
    assert class_names(page)[0][0].startswith("&lt;/script&gt;&lt;script&gt;alert(1)")
    assert "&quot;quoted&quot; &#x27;single&#x27;" in page
    assert len(embedded(page)["strips"][1]["panels"]) == 1
    ElementTree.parse(tmp_path / "overview.svg")


# ----------------------------------------------------------------------------------- in a browser

TOOLS = """() => {
  const canvas = (i) => document.querySelectorAll("canvas")[i];
  const scratch = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  window.pixels = (i) => canvas(i).toDataURL();
  // How many different colours a canvas shows.
  window.colours = (i) => {
    const c = canvas(i), g = document.createElement("canvas").getContext("2d");
    [g.canvas.width, g.canvas.height] = [c.width, c.height];
    g.drawImage(c, 0, 0);
    return new Set(new Uint32Array(g.getImageData(0, 0, c.width, c.height).data.buffer)).size;
  };
  // The colour in the middle of a picture on a canvas.
  window.colour = ([i, n]) => {
    const c = canvas(i), columns = Number(c.dataset.columns);
    const rows = Math.ceil(Number(c.dataset.count) / columns);
    const x = (n % columns + 0.45) / columns, y = (Math.floor(n / columns) + 0.45) / rows;
    scratch.drawImage(c, -Math.floor(x * c.width), -Math.floor(y * c.height));
    return [...scratch.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
}"""
HIDDEN = "[...document.querySelectorAll('.plot > svg')].map((svg) => getComputedStyle(svg).visibility)"
HALF_THE_WAY = """() => new Promise((done) => {
  addEventListener("hashchange", () => done());
  location.hash = "#step=0.5";
})"""
HEIGHT = "document.documentElement.scrollHeight"


def used(page, pictures):
    """What a page shows to a reader who goes to the start, half the way, plays it, and holds it."""
    page.evaluate(TOOLS)
    step, play, readout = page.locator("#step"), page.locator("#play"), page.locator("#readout")

    def shown():
        return [page.evaluate("colour", at) for at in ((2, 0), (2, 5), (1, 5))] if pictures else []

    got = {"last": readout.text_content(), "different": page.evaluate("colours(0)")}
    got["overflow"] = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    got["canvases"] = page.locator("canvas").count()
    real, before, height = page.evaluate("pixels(0)"), page.evaluate("pixels(1)"), page.evaluate(HEIGHT)
    step.press("Home")
    got |= {"first": readout.text_content(), "spoken": step.get_attribute("aria-valuetext"), "colours": [shown()]}
    got["moved"] = page.evaluate("pixels(1)") != before
    got["real_stays"] = page.evaluate("pixels(0)") == real
    got["grown"] = page.evaluate(HEIGHT) - height
    page.evaluate(HALF_THE_WAY)
    got |= {"half": readout.text_content(), "hidden": page.evaluate(HIDDEN)}
    got["colours"].append(shown())
    play.click()
    got["button"] = play.get_attribute("aria-label")
    page.clock.run_for(12_000)
    got |= {"played": readout.text_content(), "rest": play.get_attribute("aria-label")}
    got["colours"].append(shown())
    got["again"] = page.evaluate("pixels(1)") == before
    play.click()
    page.clock.run_for(300)
    step.press("Home")
    page.clock.run_for(2_000)
    return got | {"held": readout.text_content()}


def solid(steps):
    """Pictures of one colour each, which tells the step (red and blue) and the picture (green)."""
    step, count = np.arange(steps + 1)[:, None], np.arange(12)
    colours = np.stack(np.broadcast_arrays(10 * step, 20 * count, 255 - 10 * step), -1).astype(np.uint8)
    return np.broadcast_to(colours[:, :, None, None], (steps + 1, 12, 8, 8, 3))


def make_picture_studies(out, monkeypatch):
    """Two studies of colour pictures: one without loss, and one of classes, compressed."""
    labels = np.array(["a", NASTY.replace("\ud800", "").replace("\x00", "")])[np.arange(12) % 2]
    for name, others in (("pictures", {}), ("classes", {"labels": labels, "real_labels": labels})):
        make_run(out / name, "x0", frames=solid(25), **others)
        # On another grid of times: at t = 0.49 it is at its third step of ten.
        make_run(out / name, "v", frames=solid(10), times=np.linspace(1, 0, 11) ** 2, **others)
        make_nearest(out / name, "x0")
        if name == "classes":
            monkeypatch.setattr(embed, "_plan", lambda found, room: embed._Plan(64, 36, 92, 80, 26))
        rows = [make_row("x0", target=NASTY), make_row("v", target="v")]
        page = write(out / name, rows, title=NASTY)
        assert ("image/jpeg" in page) == (name == "classes")


@pytest.fixture
def studies(tmp_path, monkeypatch):
    long = "a_name_without_any_space_in_it_" * 6
    make_run(tmp_path / "points", "x0", steps=10)
    make_run(tmp_path / "points", "v", steps=25)
    rows = [make_row("x0", data=long), make_row("v", data=long, target="v", value=0.35)]
    rows.append(make_row("k", data=long, target={"name": long}, status="failed", reason=long, value=None))
    write(tmp_path / "points", rows, title=long, notes=[long], description=long)
    make_picture_studies(tmp_path, monkeypatch)
    return tmp_path


def test_the_page_works_in_a_browser(visit, studies):
    for name in ("points", "pictures", "classes"):
        for width in (375, 1280):
            where = f"{name} {width}"
            page = visit(studies / name / "report.html", width=width, height=800, clock=True)
            got = used(page, pictures=name != "points")
            assert got["overflow"] <= 0, where
            assert got["canvases"] == 3
            assert got["last"] == got["played"] == "final samples"
            assert got["first"] == got["spoken"] == got["held"] == "step 0 of 25, t = 1.00"
            assert re.match(r"step 1[23] of 25, t = 0\.[45]", got["half"]), got["half"]
            assert got["moved"]
            assert got["real_stays"]
            assert got["again"]
            assert got["grown"] == 0, where  # no jump of what is below
            assert (got["button"], got["rest"]) == ("Pause", "Play")
            if name != "points":
                check_colours(where, got)


def check_colours(where, got):
    """That the canvases show the pictures of the step the slider is at, and no static picture behind them."""
    # Two classes in turn: the first line of the sheet holds the even pictures.
    first, sixth = (0, 5) if where.startswith("pictures") else (0, 10)
    half = int(re.match(r"step (\d+)", got["half"])[1])
    for shown, (ours, theirs) in zip(got["colours"], [(0, 0), (half, 3), (25, 10)], strict=True):
        expected = [[10 * s, 20 * n, 255 - 10 * s] for s, n in ((ours, first), (ours, sixth), (theirs, sixth))]
        np.testing.assert_allclose(shown, expected, atol=0 if where.startswith("pictures") else 6, err_msg=where)
    assert set(got["hidden"]) == {"hidden"}
    if where.startswith("pictures"):  # enlarged pixels have sharp edges
        assert got["different"] <= 12 * 64 + 1
