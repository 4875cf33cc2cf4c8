"""What a study's page shows of how sure the models were, and of the densities that they learned."""

import base64
import io
import itertools
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from reparam.report import density, embed
from reparam.report.density import figure_svg, write_figures
from reparam.report.tracks import ELLIPSES
from test_report import (
    NASTY,
    decoded,
    embedded,
    make_row,
    make_run,
    section,
    smooth,
    unlinked,
    words,
    write,
)

pytest_plugins = ["browsing"]

SVG = "{http://www.w3.org/2000/svg}"


def covariances(steps, count, seed=5):
    """Covariances of random matrices, as the matrices and as what a run keeps; the last frame has none."""
    roots = np.random.default_rng(seed).normal(size=(steps + 1, count, 2, 2)) * 0.5
    roots[-1] = 0
    full = roots @ roots.swapaxes(-1, -2)
    return full, np.stack([full[..., 0, 0], full[..., 0, 1], full[..., 1, 1]], -1).astype(np.float32)


def add(out, run, file="trajectory.npz", **arrays):
    """Put arrays into a run's file."""
    path = out / run / file
    known = dict(np.load(path)) if path.exists() else {}
    np.savez(path, **{**known, **arrays})


# --------------------------------------------------------------------------------------- how sure


def test_ellipses_come_through_within_quantisation(tmp_path):
    full, spread = covariances(10, 40)
    make_run(tmp_path, "x0", spread=spread)
    page = write(tmp_path, [make_row("x0")])
    strip = embedded(page)["strips"][0]
    sure = strip["panels"][0]["sure"]
    assert sure["count"] == ELLIPSES < 40
    roots = np.frombuffer(base64.b64decode(sure["data"]), "<i2").reshape(11, ELLIPSES, 3)
    unit = strip["half"] * strip["span"] / 32767
    lower = np.zeros((11, ELLIPSES, 2, 2))
    lower[..., 0, 0], lower[..., 1, 0], lower[..., 1, 1] = np.moveaxis(roots * unit, -1, 0)
    np.testing.assert_allclose(lower @ lower.swapaxes(-1, -2), full[:, :ELLIPSES], atol=8 * unit)
    assert (roots[-1] == 0).all()
    assert page.count('id="sure"') == page.count('id="sure-about"') == 1


def test_what_is_no_covariance_is_not_drawn_and_others_are(tmp_path):
    _, spread = covariances(3, 8)
    spread[0, 0] = [1, 2, 1]  # a correlation of 2
    spread[0, 1] = [np.nan, 0, 1]
    spread[0, 2] = [-1, 0, 1]
    spread[0, 3] = [0.25, 0.25, 0.25]  # a line
    spread[0, 4] = [0, 0, 0.25]
    spread[0, 5] = [1e9, 0, 1e9]
    make_run(tmp_path, "x0", steps=3, count=8, spread=spread)
    strip = embedded(write(tmp_path, [make_row("x0")]))["strips"][0]
    roots = np.frombuffer(base64.b64decode(strip["panels"][0]["sure"]["data"]), "<i2").reshape(4, 8, 3)
    half = round(0.5 / strip["half"] * 32767 / strip["span"])
    assert (roots[0, :3] == -32768).all()
    np.testing.assert_allclose(roots[0, 3], [half, half, 0], atol=half * 1e-3 + 1)
    np.testing.assert_allclose(roots[0, 4], [0, 0, half], atol=1)
    np.testing.assert_array_equal(roots[0, 5], [32767, 0, 32767])  # cut off, four times as wide as the frame
    assert (roots[1:] != -32768).all()


def test_ellipses_stay_with_their_steps_where_steps_are_left_out(tmp_path, monkeypatch):
    _, spread = covariances(20, 8)
    spread[..., 1] = 0
    spread[..., 0] = spread[..., 2] = (np.arange(21)[:, None] / 20) ** 2  # the step is the ellipse's size
    make_run(tmp_path, "x0", steps=20, count=8, spread=spread)
    monkeypatch.setattr(embed, "_POINTS", 21 * 8 * (2 + 3) * 2 // 2)
    strip = embedded(write(tmp_path, [make_row("x0")]))["strips"][0]
    panel = strip["panels"][0]
    roots = np.frombuffer(base64.b64decode(panel["sure"]["data"]), "<i2").reshape(-1, 8, 3)
    assert 8 <= len(panel["kept"]) == len(roots) == len(decoded(panel, "<i2")) <= 11
    sizes = roots[:, 0, 0] * strip["half"] * strip["span"] / 32767
    np.testing.assert_allclose(sizes, np.array(panel["kept"]) / 20, atol=1e-3)


def maps_of(steps, count, height=8, width=8):
    """Maps that are of one value each: 255 at the first step of the first picture, falling to 0."""
    falling = np.linspace(255, 0, steps + 1)[:, None] * np.linspace(1, 0.5, count)
    values = np.rint(falling).astype(np.uint8)
    return np.broadcast_to(values[..., None, None], (steps + 1, count, height, width))


def test_maps_are_roots_on_one_scale(tmp_path):
    for name, most in (("x0", 0.8), ("v", 0.2)):
        make_run(tmp_path, name, kind="pictures", steps=4, count=9, shape=(8, 8, 3))
        add(tmp_path, name, spread=maps_of(4, 9), spread_max=np.float64(most))
    page = write(tmp_path, [make_row("x0"), make_row("v", target="v")])
    for panel, share in zip(embedded(page)["strips"][0]["panels"], (1, 0.25), strict=True):
        assert panel["sure"]["t"] == [1, 0.75, 0.5, 0.25, 0]
        for step, link in enumerate(panel["sure"]["frames"]):
            from PIL import Image

            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(link.split(",")[1]))).convert("L"))
            means = pixels.reshape(3, 8, 3, 8).mean((1, 3)).reshape(-1)
            expected = 255 * np.sqrt(maps_of(4, 9)[step, :, 0, 0] / 255 * share)
            np.testing.assert_allclose(means, expected, atol=4)  # JPEG
    (ticks,) = re.findall('<div class="ticks">(.*?)</div>', page)
    # A quarter of the way along the colours is a sixteenth of the deviation.
    assert re.findall("<span>(.*?)</span>", ticks) == ["0", "0.0500", "0.200", "0.450", "0.800"]


def test_each_data_set_has_its_scale(tmp_path):
    for name, most in (("x0", 0.8), ("v", 0.2)):
        make_run(tmp_path, name, kind="pictures", steps=4, count=9, shape=(8, 8, 3))
        add(tmp_path, name, spread=maps_of(4, 9), spread_max=np.float64(most))
    page = write(tmp_path, [make_row("x0", data="a"), make_row("v", data=NASTY)])
    scales = re.findall('<div class="scale"><small>(.*?)</small>.*?<span>([0-9.]+)</span></div></div>', page)
    names, tops = zip(*scales, strict=True)
    assert names[0] == "Standard deviation of a pixel on a"
    assert tops == ("0.800", "0.200")
    assert page.count("<script") == page.count("</script>") == 2


def test_maps_of_other_pictures_and_broken_ones_are_left_out(tmp_path):
    good = maps_of(2, 4)
    broken = {
        "kind": {"spread": good.astype(np.float32), "spread_max": 1.0},
        "shape": {"spread": good[:, :3], "spread_max": 1.0},
        "axes": {"spread": good[0], "spread_max": 1.0},
        "no scale": {"spread": good},
        "zero": {"spread": good, "spread_max": 0.0},
        "nan": {"spread": good, "spread_max": np.nan},
        "two": {"spread": good, "spread_max": np.ones(2)},
        "words": {"spread": good, "spread_max": "1"},
    }
    rows = []
    for name, arrays in broken.items():
        make_run(tmp_path, name, kind="pictures", steps=2, count=4, shape=(8, 8), **arrays)
        rows.append(make_row(name, target=name))
    page = write(tmp_path, rows)
    panels = embedded(page)["strips"][0]["panels"]
    assert len(panels) == len(broken)
    assert not any("sure" in panel for panel in panels)
    assert 'id="sure' not in page


def test_ellipses_of_other_points_are_left_out(tmp_path):
    _, spread = covariances(3, 8)
    broken = (spread[:, :7], spread[..., :2], spread[0], spread[:3], spread.astype(int), spread.astype(str))
    rows = []
    for i, wrong in enumerate(broken):
        make_run(tmp_path, f"r{i}", steps=3, count=8, spread=wrong)
        rows.append(make_row(f"r{i}", target=f"t{i}"))
    page = write(tmp_path, rows)
    assert len(embedded(page)["strips"][0]["panels"]) == len(broken)
    assert '"sure"' not in page.split("<script>")[0]


@pytest.mark.parametrize("kind", ["points", "pictures"])
def test_a_page_without_variances_is_as_it_was(tmp_path, kind):
    make_run(tmp_path, "x0", kind=kind, shape=(8, 8))
    page = write(tmp_path, [make_row("x0")])
    body = page[page.index("<body>") : page.index("<script>")]
    assert "sure" not in body
    assert 'aria-live="off">final samples</output>\n</div>' in body


def test_models_with_and_without_variances_share_a_page(tmp_path):
    make_run(tmp_path, "x0", spread=covariances(10, 40)[1])
    make_run(tmp_path, "v")
    page = write(tmp_path, [make_row("x0"), make_row("v", target="v")])
    assert ["sure" in panel for panel in embedded(page)["strips"][0]["panels"]] == [True, False]
    assert "Models that state no variance of x0 are shown as before." in words(page)
    assert "pictures" not in about(page)
    assert 'class="scale"' not in page


def about(page):
    """What is told of how sure the models are."""
    return re.search(r'<div id="sure-about"[^>]* hidden>(.*?)</div>', page)[1]


def test_a_variance_of_another_noisy_sample_is_not_called_none(tmp_path):
    make_run(tmp_path, "x0", spread=covariances(10, 40)[1])
    make_run(tmp_path, "noisy")
    noisy = {"name": "gaussian", "target": "edm", "of": "noisy"}
    page = write(tmp_path, [make_row("x0"), make_row("noisy", target=noisy)])
    assert "no variance of x0 are shown as before; that of edm ± diagonal is of another noisy sample." in about(page)


def test_where_all_tell_a_variance_none_is_said_to_be_silent(tmp_path):
    make_run(tmp_path, "x0", spread=covariances(10, 40)[1])
    assert "shown as before" not in about(write(tmp_path, [make_row("x0")]))


def test_maps_keep_to_their_room(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    room = 900_000
    monkeypatch.setattr(embed, "_PICTURES", room)
    for i in range(3):
        noise = rng.integers(0, 256, (41, 36, 32, 32), dtype=np.uint8)
        make_run(tmp_path, f"r{i}", frames=smooth(40, 36, 32, i), spread=noise, spread_max=np.float64(1))
    page = write(tmp_path, [make_row(f"r{i}", target=f"t{i}") for i in range(3)])
    panels = embedded(page)["strips"][0]["panels"]
    maps = sum(len(link) for panel in panels for link in panel["sure"]["frames"]) * 3 / 4
    pictures = sum(len(link) for panel in panels for link in panel["frames"]) * 3 / 4
    stills = sum(map(len, re.findall(r'<image [^>]*href="data:([^"]*)"', page))) * 3 / 4
    assert maps < 1.1 * 0.25 * room
    assert 0.5 * room < pictures + stills + maps < 1.1 * room
    for panel in panels:
        assert len(panel["sure"]["frames"]) >= 10
        assert (panel["sure"]["t"][0], panel["sure"]["t"][-1]) == (1, 0)


# -- in a browser

# Ticks the box at the step asked for, by its label as a reader would, and tells what the canvases show.
BOX = """async () => {
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  const d = document, w = window;
  const canvases = [...d.querySelectorAll("canvas")];
  const shown = () => canvases.map((c) => c.toDataURL());
  const middle = (n) => {
    const c = canvases[n], g = document.createElement("canvas").getContext("2d");
    g.drawImage(c, -Math.floor(c.width * 0.15), -Math.floor(c.height * 0.15));
    return [...g.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const same = (a, b) => a.map((text, i) => text === b[i]);
  // Where a canvas has changed: the ends in x and in y (upwards) as shares of it, and their correlation.
  const data = (c) => {
    const copy = Object.assign(document.createElement("canvas"), {width: c.width, height: c.height});
    const g = copy.getContext("2d");
    g.drawImage(c, 0, 0);
    return g.getImageData(0, 0, c.width, c.height).data;
  };
  const changed = (c, before) => {
    const now = data(c), xs = [], ys = [];
    for (let i = 0; i < now.length; i += 4) {
      if (now[i] === before[i] && now[i + 1] === before[i + 1]) continue;
      xs.push(((i / 4) % c.width + 0.5) / c.width);
      ys.push(1 - (Math.floor(i / 4 / c.width) + 0.5) / c.height);
    }
    const mean = (v) => v.reduce((a, b) => a + b, 0) / v.length;
    const mx = mean(xs), my = mean(ys), of = (a, b) => mean(a.map((_, i) => a[i] * b[i]));
    const dx = xs.map((x) => x - mx), dy = ys.map((y) => y - my);
    const ends = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    return {ends, share: xs.length / c.width / c.height, tilt: of(dx, dy) / Math.sqrt(of(dx, dx) * of(dy, dy))};
  };
  const box = d.getElementById("sure"), about = d.getElementById("sure-about"), step = d.getElementById("step");
  const got = {checked: box.checked, hidden: about.hidden, label: box.labels[0].textContent.trim()};
  const last = shown();
  box.focus();
  got.focus = d.activeElement === box;
  box.labels[0].click();
  await wait(50);
  got.ticked = box.checked;
  got.told = !about.hidden && about.getBoundingClientRect().height > 0;
  got.moved = [step.value, step.max, d.getElementById("readout").textContent];
  got.seen = same(shown(), last);
  got.ticks = [...d.querySelectorAll(".scale .ticks span")].map((e) => e.textContent);
  w.location.hash = "#step=1";
  await wait(100);
  got.final = same(shown(), last);
  box.click();
  w.location.hash = "#step=0.4";
  await wait(100);
  const before = shown(), pixels = data(canvases[1]);
  const context = w.CanvasRenderingContext2D.prototype, stroke = context.stroke;
  got.strokes = 0;
  context.stroke = function () { got.strokes += 1; stroke.call(this); };
  box.click();
  await wait(50);
  got.changed = changed(canvases[1], pixels);
  got.there = same(shown(), before);
  got.middle = canvases.map((_, i) => middle(i));
  got.overflow = d.documentElement.scrollWidth - w.innerWidth;
  const bar = d.querySelector(".controls").getBoundingClientRect();
  got.inside = [...d.querySelectorAll(".controls > *")].every((e) => {
    const r = e.getBoundingClientRect();
    return r.top >= bar.top - 0.5 && r.bottom <= bar.bottom + 0.5 && r.right <= bar.right + 0.5;
  });
  box.click();
  await wait(50);
  got.back = same(shown(), before);
  return got;
}"""


def test_the_box_works_in_a_browser(visit, tmp_path):
    make_run(tmp_path / "points", "x0", spread=covariances(10, 40)[1])
    make_run(tmp_path / "points", "v", steps=25)
    black = np.zeros((11, 9, 8, 8), np.uint8)
    make_run(tmp_path / "pictures", "x0", frames=black, spread=maps_of(10, 9), spread_max=np.float64(0.5))
    make_run(tmp_path / "pictures", "v", frames=black)
    place, covariance = np.array([0.5, -0.25]), np.array([0.25, 0.2, 0.36])
    frames, spread = np.broadcast_to(place, (11, 4, 2)), np.zeros((11, 4, 3))
    spread[4, 0] = covariance
    make_run(tmp_path / "one", "x0", count=4, spread=spread)
    make_run(tmp_path / "one", "v")
    add(tmp_path / "one", "x0", frames=frames, real=np.array([[-2.0, -2.0], [2, 2], [0, 0], [0, 0]]))
    for name in ("points", "pictures", "one"):
        write(tmp_path / name, [make_row("x0"), make_row("v", target="v")])
    for where, width in itertools.product(("points", "pictures", "one"), (375, 1280)):
        got = visit(tmp_path / where / "report.html", width=width).evaluate(BOX)
        assert (got["checked"], got["hidden"], got["ticked"], got["told"]) == (False, True, True, True), where
        assert got["label"] == "show how sure the model is"
        assert got["focus"]
        assert got["overflow"] <= 0, where
        assert got["inside"], where
        assert got["there"] == [True, False, True], where  # real data and a model without variances stay
        assert all(got["back"]), where
        assert all(got["final"]), where  # samples leave no variance: here the pictures are black, as their maps
        halfway, steps = (12, 25) if where == "points" else (5, 10)
        assert got["moved"][:2] == [str(halfway), str(steps)], where  # no longer at the end
        assert got["moved"][2].startswith(f"step {halfway} of {steps}"), where
        assert got["seen"][:2] == [True, False], where  # the real data stay
        assert got["ticks"] == (["0", "0.0312", "0.125", "0.281", "0.500"] if where == "pictures" else [])
        most = {"points": 12, "one": 1}.get(where, 0)
        assert (most > 0) <= got["strokes"] <= most, where
        if where == "pictures":
            share = np.sqrt(maps_of(10, 9)[4, 0, 0, 0] / 255)
            np.testing.assert_allclose(got["middle"][1], share * np.array([255, 192, 77]), atol=5)
        if where == "one":
            half = 2 * 1.15  # of the frame, a little wider than the real data
            middle, reach = (place / half + 1) / 2, np.sqrt(covariance[[0, 2]]) / half / 2
            expected = [middle[0] - reach[0], middle[0] + reach[0], middle[1] - reach[1], middle[1] + reach[1]]
            np.testing.assert_allclose(got["changed"]["ends"], expected, atol=0.02, err_msg=where)
            area = np.pi / 4 * np.sqrt(covariance[0] * covariance[2] - covariance[1] ** 2) / half**2
            assert got["changed"]["share"] < 0.5 * area  # outlines only
            correlation = covariance[1] / np.sqrt(covariance[0] * covariance[2])
            assert got["changed"]["tilt"] == pytest.approx(correlation, abs=0.1)


# ----------------------------------------------------------------------------------------- density


class Mixture:
    """Two isotropic Gaussians in the plane, by their closed forms."""

    means, std = np.array([[0.2, 1.2], [0.6, 1.3]]), 0.05

    def log_density(self, x, sigma):
        var = self.std**2 + sigma**2
        apart = ((x[:, None] - self.means) ** 2).sum(-1)
        return np.logaddexp.reduce(-apart / (2 * var) - np.log(2 * np.pi * var) - np.log(2), axis=1)

    def draw(self, count, rng):
        return self.means[rng.integers(0, 2, count)] + self.std * rng.normal(size=(count, 2))

    def mean(self, x, sigma):
        """E[x0 | x]."""
        var = self.std**2 + sigma**2
        apart = ((x[:, None] - self.means) ** 2).sum(-1) / (2 * var)
        share = np.exp(apart.min(1, keepdims=True) - apart)
        share /= share.sum(1, keepdims=True)
        each = self.means + (self.std**2 / var) * (x[:, None] - self.means)
        return (share[..., None] * each).sum(1)

    def paths(self, x, sigmas):
        found = [x]
        for here, there in itertools.pairwise(sigmas):
            found.append(found[-1] + (there - here) * (found[-1] - self.mean(found[-1], here)) / here)
        return np.stack(found)


def figure(n=32, sigma=0.03):
    """All that a run's figure.npz may hold; the guide is the data with more noise."""
    data, rng = Mixture(), np.random.default_rng(0)
    zoom = np.array([0.4, 1.25, 0.3])
    side = np.linspace(-zoom[2], zoom[2], n)
    places = np.stack(np.meshgrid(zoom[0] + side, zoom[1] + side), -1).reshape(-1, 2)
    start = zoom[:2] + zoom[2] * rng.uniform(-1, 1, (50, 2))
    paths = data.paths(start, np.append(np.geomspace(sigma, 1e-3, 12), 0))
    return {
        "truth": data.draw(6000, rng),
        "samples": data.draw(500, rng),
        "guided": data.draw(500, rng),
        "view": np.array([0.3, 0.3, 1.2]),
        "zoom": zoom,
        "zoom_sigma": np.float64(sigma),
        "paths": paths,
        "guided_paths": paths,
        "paths_true": paths,
        "log_density": data.log_density(places, sigma).reshape(n, n),
        "guide_log_density": data.log_density(places, 3 * sigma).reshape(n, n),
        "truth_log_density": data.log_density(places, sigma).reshape(n, n),
    }


def headings(svg):
    """Where the panels' headings stand, by their text."""
    root = ElementTree.fromstring(svg)
    return [group.find(f"{SVG}text").text for group in root.findall(f"{SVG}g")]


def heat_maps(svg):
    """The pixels of every square picture, in order."""
    links = [image.get("href") for image in ElementTree.fromstring(svg).iter(f"{SVG}image")]
    pixels = [unlinked(link.removeprefix("data:")) for link in links]
    return [p for p in pixels if p.shape[0] == p.shape[1]]


def said(svg):
    return " ".join(" ".join(ElementTree.fromstring(svg).itertext()).split())


EIGHT = [
    *("Truth", "Samples without guidance", "Samples with guidance", "Paths without guidance"),
    *("Log density of the model", "Log density of the guide", "Log ratio, model to guide", "Paths with guidance"),
]


def test_eight_panels_and_two_that_compare():
    arrays = figure()
    svg = figure_svg(arrays, NASTY)
    assert headings(svg) == [*EIGHT, "Exact log density", "Log ratio, model to exact"]
    del arrays["truth_log_density"]
    assert headings(figure_svg(arrays, "a title")) == EIGHT
    for text in (
        "probability-flow ODE",
        "noise level σ = 0.03",
        "in nats",
        "half-width 0.3",
        "6,000 points; 4,000 drawn",
    ):
        assert text in said(svg), text
    assert len(svg) < 1_000_000
    assert not re.search(r'href="(?!data:)', svg)


def test_a_heat_map_is_upright_and_its_colours_are_in_order():
    arrays = figure()
    rows, columns = np.mgrid[:32, :32]
    arrays["log_density"] = arrays["truth_log_density"] = (rows + 0.1 * columns) / 5
    arrays["guide_log_density"] = arrays["log_density"] - np.where(columns < 16, 1.0, -1.0)
    model, _, ratio, exact, zero = heat_maps(figure_svg(arrays, ""))
    light = luminance(model)
    assert light[0].min() > light[-1].max()  # the highest row stands on top, and more is lighter
    assert (np.diff(light[:, 5]) <= 0).all()
    np.testing.assert_array_equal(model, exact)
    assert (ratio[:, :16, 0] > ratio[:, :16, 2]).all()  # more likely to the model: warm
    assert (ratio[:, 16:, 0] < ratio[:, 16:, 2]).all()
    assert len(np.unique(zero.reshape(-1, 3), axis=0)) == 1
    assert luminance(zero).min() > luminance(ratio).max()


def luminance(pixels):
    """Relative luminance of sRGB colours."""
    part = pixels / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_colours_are_perceptually_ordered():
    rising = np.cbrt(luminance(density.coloured(np.linspace(0, 1, 201), density._RISING)))
    assert (np.diff(rising) > -2e-3).all()
    assert (np.diff(rising[::10]) > 0.015).all()  # no stretch of it looks alike
    apart = np.cbrt(luminance(density.coloured(np.linspace(0, 1, 201), density._DIVERGING)))
    assert (np.diff(apart[:101]) > -2e-3).all()
    assert (np.diff(apart[100:]) < 2e-3).all()
    np.testing.assert_allclose(apart[:100][::-1], apart[101:], atol=0.08)  # neither side looks stronger
    np.testing.assert_array_equal(
        density.coloured(np.array([np.nan, -1, 2]), ("#000000", "#ffffff"))[:, 0], [128, 0, 255]
    )


def test_densities_share_a_scale_that_ends_below_the_highest():
    arrays = figure()
    for name, shift in (("log_density", 0.0), ("guide_log_density", -4.0), ("truth_log_density", -30.0)):
        arrays[name] = np.full((8, 8), shift)
    arrays["log_density"][0, 0] = 2.5
    svg = figure_svg(arrays, "")
    assert said(svg).count("2.50 nats") == 3
    assert said(svg).count("−7.50") == 3
    model, guide, _, exact, _ = heat_maps(svg)
    assert luminance(model)[0, 0] > luminance(guide)[0, 0] > luminance(exact)[0, 0]
    np.testing.assert_array_equal(exact[0, 0], density.coloured(np.zeros(1), density._RISING)[0])


def test_dots_and_paths_are_where_they_belong():
    arrays = figure()
    arrays["view"] = np.array([1.0, 2.0, 0.5])
    arrays["samples"] = np.array([[1.25, 2.25], [9.0, 9.0]])
    arrays["paths"] = np.array([[[0.1, 0.95], [np.nan, 0]], [[0.7, 1.55], [0.4, 1.25]]])
    del arrays["paths_true"]
    panels = density.panels(arrays)[0]
    assert 'd="m162 54h0"' in panels[1].content  # three quarters to the right, a quarter from the top, of 216
    assert "2 points, 1 outside" in panels[1].below
    assert 'd="M0 216l216 -216"' in panels[3].content
    assert "2 paths from σ = 0.03" in panels[3].below


def test_what_is_missing_leaves_its_panel_empty():
    arrays = {name: a for name, a in figure().items() if "guide" not in name and "tru" not in name}
    svg = figure_svg(arrays, "")
    assert headings(svg) == EIGHT
    assert said(svg).count("no guidance in this run") == 4
    assert said(svg).count("not kept by this run") == 1
    assert "snapshot" not in said(svg)
    assert said(figure_svg({}, "")).count("not kept") == 4


@pytest.mark.parametrize("name", sorted(figure(4)))
def test_damaged_arrays_leave_their_panel_empty(name):
    whole = figure(8)
    value = whole[name]
    broken = [np.asarray("words"), np.zeros((0, 2)), np.zeros((3, 3, 3, 3)), np.full(value.shape, np.nan)]
    broken += [np.asarray(None, dtype=object), value[None], np.full(value.shape, np.inf), -np.abs(value)]
    broken += [value[:-1]] if value.ndim else [np.ones(2)]
    for wrong in broken:
        assert headings(figure_svg({**whole, name: wrong}, ""))[:8] == EIGHT


def make_figures(out, count):
    """A study of so many runs with figures; the last is the best."""
    rows = []
    for i in range(count):
        make_run(out, f"r{i}")
        add(out, f"r{i}", "figure.npz", **figure(8))
        rows.append(make_row(f"r{i}", target=f"t{i}", value=1.0 - 0.1 * i))
    return rows


def test_the_best_stands_open_and_the_others_fold(tmp_path):
    page = write(tmp_path, make_figures(tmp_path, 3))
    part = page[page.index('<h2 id="density">') :].split("</section>")[0]
    assert part.index("t2, spiral") < part.index("<details>") < part.index("<summary>t1") < part.index("<summary>t0")
    assert part.count("<details>") == 2
    assert part.count("<svg xmlns") == 3
    files = sorted(path.name for path in tmp_path.glob("figure-*.svg"))
    assert files == ["figure-r0.svg", "figure-r1.svg", "figure-r2.svg"]
    assert (tmp_path / "figure-r1.svg").read_text(encoding="utf-8").strip() in page


def test_more_figures_than_a_page_should_hold_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(density, "_ON_PAGE", 1)
    page = write(tmp_path, make_figures(tmp_path, 2))
    assert page.count("<svg xmlns") == 1
    assert "t0, spiral: see figure-r0.svg, which lies beside this page." in section(page, "density")


def test_names_in_figures_are_escaped(tmp_path):
    make_run(tmp_path, "x0")
    add(tmp_path, "x0", "figure.npz", **figure(8))
    page = write(tmp_path, [make_row("x0", target=NASTY, data=NASTY), make_row("v", target="v", data=NASTY)])
    assert page.count("<script") == page.count("</script>") == 2
    assert "<b>bold" not in page
    ElementTree.parse(tmp_path / "figure-x0.svg")


def test_no_figure_no_section(tmp_path):
    make_run(tmp_path, "x0")
    (tmp_path / "x0" / "figure.npz").write_bytes(b"PK broken")
    make_run(tmp_path, "v")
    add(tmp_path, "v", "figure.npz", view=np.zeros(3), samples=np.zeros(3))
    outside = make_row("../elsewhere", target="eps")
    failed = make_row("gone", target="k", status="failed")
    rows = [make_row("x0"), make_row("v", target="v"), outside, failed]
    page = write(tmp_path, rows)
    assert 'id="density"' not in page
    assert "</section>\n" in page
    assert write_figures(tmp_path, rows) == []
    assert not list(tmp_path.glob("figure-*"))


def test_a_run_in_a_folder_of_its_own_has_one_file(tmp_path):
    make_run(tmp_path, "a/b")
    add(tmp_path, "a/b", "figure.npz", **figure(8))
    assert write_figures(tmp_path, [make_row("a/b")]) == [tmp_path / "figure-a-b.svg"]


def guided_row(target: str, seed: int, value: float, guided: float | None) -> dict:
    row = {"run": f"{target}-{seed}", "data": "tree", "target": target, "seed": seed, "lr": 1e-3, "status": "finished"}
    row |= {"wall_s": 1.0, "metrics": {"sliced_wasserstein": {"value": value, "floor": 0.1}}}
    if guided is not None:
        metrics = {"sliced_wasserstein": {"value": guided, "floor": 0.1}}
        row["autoguided"] = {"step": 1024, "weight": 3.0, "metrics": metrics}
    return row


def test_guided_samples_stand_beside_the_others_as_means_over_the_same_seeds():
    from reparam.report.guided import guided_section, lines
    from reparam.report.rows import Study

    three = [guided_row("x0", seed, *values) for seed, values in enumerate([(0.2, 0.3), (0.4, 0.5), (9.0, None)])]
    rows = [*three, guided_row("<i>", 0, 0.7, 0.6)]
    study = Study.of(rows, "sliced_wasserstein")
    page = guided_section(study)
    assert "0.300, 0.400" in page  # not the seed without guidance
    assert "0.700, 0.600" in page
    assert "that of step 1,024 at weight 3" in page
    assert "&lt;i&gt;" in page
    assert "<i>" not in page
    told = list(lines(study))
    assert told[1] == "  x0: sliced_wasserstein 0.400 (without 0.300)"
    plain = Study.of([guided_row("x0", 0, 0.2, None)], "sliced_wasserstein")
    assert guided_section(plain) == ""
    assert list(lines(plain)) == []
