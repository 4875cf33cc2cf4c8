"""Scores of any samples against any real data: right whatever they come as, or refused."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

import reparam as rp
from reparam.cli import main
from reparam.data import load_data, streams
from reparam.data.images import memory
from reparam.errors import Conflict, DataError, OutputError, ReparamError, SpecError, UnknownName
from reparam.metrics import SampleSet, Scoring, statistics
from reparam.metrics.card import compare, copies, read_card, told
from reparam.studies.evaluate import evaluate
from reparam.studies.recipe import load_recipe
from reparam.studies.run import execute

FD = ["frechet_distance"]
CALLS: list[int] = []


class Projected:
    """A user's extractor: six numbers a picture. It counts the pictures that it is shown."""

    def __init__(self, seed=0, spoil=-1):
        self.seed, self.spoil = seed, spoil

    def __call__(self, pictures):
        CALLS.append(len(pictures))
        x = pictures.flatten(1).double() / 255
        onto = torch.randn(x.shape[1], 6, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        features = x @ onto
        features[pictures.flatten(1)[:, 0] == self.spoil] = torch.nan
        return features


OWN = f"{__name__}:Projected"


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """The same sums on every machine."""


@pytest.fixture(scope="module")
def digits():
    """Two sets of scanned digits, uint8 [n, 1, 8, 8], without a picture that occurs twice."""
    pytest.importorskip("sklearn")
    x = load_data({"name": "digits", "pictures": True, "holdout": 0.0}).train.numpy()
    return x[:300], x[300:750]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of a small study."""
    pytest.importorskip("sklearn")
    settings = ["target=x0", "train.steps=20", "sample.n=100", "sample.steps=4"]
    ((name, config),) = load_recipe("digits-jit", settings).runs.items()
    folder = tmp_path_factory.mktemp("study") / name
    assert execute(name, config, folder)["status"] == "finished"
    return folder


def by_hand(a, b):
    """The Fréchet distance of the pixels, from numpy's covariances and the eigenvalues of their product."""
    a, b = (x.reshape(len(x), -1) / 255 for x in (a, b))
    c, d = np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.linalg.eigvals(c @ d).real.clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c) + np.trace(d) - 2 * roots)


def by_moments(a, b):
    a, b = (x.reshape(len(x), -1) / 255 for x in (a, b))
    return rp.metrics.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))


def values(found):
    return {name: entry["value"] for name, entry in found.card["metrics"].items()}


def pixels(samples, reference, metrics=FD, **more):
    return evaluate(samples, reference, metrics, extractor="pixels", **more)


def put(folder: Path, pictures):
    """A folder of .png files."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture[0] if len(picture) == 1 else np.moveaxis(picture, 0, 2)).save(folder / f"{i:04}.png")
    return folder


# --- what samples come as ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_pictures_score_the_same_in_whatever_they_come(tmp_path, digits, channels):
    x, real = (np.concatenate([d, 255 - d, d // 2][:channels], 1) for d in digits)
    x = x[:120]
    folder = put(tmp_path / "folder", x)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    np.savez(tmp_path / "nchw.npz", x=x)
    np.savez(tmp_path / "nhwc.npz", arr_0=np.moveaxis(x, 1, 3))
    np.save(tmp_path / "x.npy", x)
    ways = [folder, *(tmp_path / n for n in ("x.zip", "nchw.npz", "nhwc.npz", "x.npy")), x, torch.from_numpy(x)]
    ways += [np.moveaxis(x, 1, 3)]
    metrics = ["frechet_distance", "kernel_distance", "precision", "nearest_neighbour"]
    found = [values(pixels(way, real, metrics)) for way in ways]
    assert all(one == found[0] for one in found)
    assert found[0]["frechet_distance"] == pytest.approx(by_moments(x, real), rel=1e-6)
    assert found[0]["frechet_distance"] == pytest.approx(by_hand(x, real), rel=1e-3)
    for way in ways[1:5]:  # and as a reference
        assert values(pixels(real, str(way)))["frechet_distance"] == pytest.approx(by_moments(real, x), rel=1e-6)


def test_a_run_scores_as_in_its_study_and_its_card_says_all_that_decided_it(run, tmp_path):
    row = json.loads((run / "result.json").read_text())
    found = evaluate(run, out=tmp_path / "card.json")
    for name, entry in row["metrics"].items():
        again = found.card["metrics"][name]
        assert again["value"] == pytest.approx(entry["value"], rel=1e-9), name
        assert again["floor"] == pytest.approx(entry["floor"], rel=1e-9), name
    own = read_card(run)
    assert own["metrics"] == row["metrics"]
    for card in (own, read_card(tmp_path / "card.json")):
        data = load_data({"name": "digits", "pictures": True})
        assert (card["samples"]["n"], card["reference"]["n"]) == (100, len(data.train))
        assert card["samples"]["to_uint8"] == "round(127.5 x + 127.5), cut off at 0 and 255"
        assert card["extractor"]["name"] == "pixels, at most 16x16"
        assert card["model"]["weights"] == sha256((run / "model.safetensors").read_bytes()).hexdigest()
        assert card["model"]["ema"] is not None
        assert card["model"]["steps"] == 20
        assert card["sampling"]["sampler"] == "heun"
        assert card["sampling"]["steps"] == 4
        assert card["sampling"]["guidance"] == 1.5
        assert card["versions"]["torch"] == torch.__version__
        assert card["versions"]["reparam"] == rp.__version__
        assert len(card["noise_levels"]["edges_t"]) == len(card["noise_levels"]["x0_error"]) + 1
        entry = card["metrics"]["frechet_distance"]
        assert entry["interval"][0] < entry["value"] < entry["interval"][1]
        assert entry["better"] == "lower"
    samples = np.load(run / "samples.npz")["x"]
    assert own["metrics"]["frechet_distance"]["value"] == pytest.approx(
        by_moments(samples, data.train.numpy()), rel=1e-6
    )
    floor = by_moments(data.heldout[:100].numpy(), data.train.numpy())
    assert own["metrics"]["frechet_distance"]["floor"] == pytest.approx(floor, rel=1e-6)


def test_a_floor_without_held_out_data_is_of_a_part_of_the_reference_against_the_rest(digits):
    from reparam.data.order import mix, permutation

    x, real = digits
    part = permutation(len(real), mix(0, 0xF10))[: len(real) // 2]
    rest = np.setdiff1d(np.arange(len(real)), part.numpy())
    floor = pixels(x, real).card["metrics"]["frechet_distance"]["floor"]
    assert floor == pytest.approx(by_moments(real[part.numpy()], real[rest]), rel=1e-6)


def test_floors_that_too_few_fresh_data_leave_unknown(digits):
    x, real = digits
    found = pixels(x, real[:6], None).card["metrics"]  # 3 fresh ones: too few for KID
    assert found["kernel_distance"]["floor"] is None
    assert found["kernel_distance"]["value"] is not None
    assert found["frechet_distance"]["floor"] > 0


# --- what changes nothing ---------------------------------------------------------------------------------------------


def test_neither_order_nor_batch_size_changes_scores(digits, monkeypatch):
    x, real = digits
    metrics = ["frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage", "nearest_neighbour"]
    found = pixels(x, real, metrics)
    order = np.random.default_rng(0).permutation(len(x))
    assert values(pixels(x[order], real, metrics)) == pytest.approx(values(found), rel=1e-9)
    monkeypatch.setattr(statistics, "BATCH", 7)
    again = pixels(x, real, metrics)
    both = found.card, again.card
    assert _flat(both[0], "value", "floor") == pytest.approx(_flat(both[1], "value", "floor"), rel=1e-9)
    assert _ends(both[0]) == pytest.approx(_ends(both[1]), rel=1e-6)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_find_what_one_finds(digits, tmp_path, world):
    x, real = digits
    np.savez(tmp_path / "x.npz", x=x)
    np.savez(tmp_path / "real.npz", x=real)
    places = [str(tmp_path / name) for name in ("x.npz", "real.npz", "card.json", "kept.safetensors", "cache")]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m", "reparam.cli", "eval"]
    options = ["--reference", places[1], "--extractor", "pixels", "--device", "cpu", "--json", "--out", places[2]]
    options += ["--keep-reference", places[3], "--cache", places[4]]
    done = subprocess.run(
        [sys.executable, *start, places[0], *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    card = json.loads(done.stdout)  # one object: only the first prints
    assert card["left_out"].keys() == {"frechet_infinity"}
    assert card == read_card(places[2])
    one = evaluate(places[0], places[1], extractor="pixels", device="cpu").card
    assert _flat(card, "value", "floor") == pytest.approx(_flat(one, "value", "floor"), rel=1e-9)
    assert _ends(card) == pytest.approx(_ends(one), rel=1e-6)  # differences of ten nearly equal distances
    assert {k: v for k, v in card.items() if k != "metrics"} == {k: v for k, v in one.items() if k != "metrics"}
    assert values(pixels(x, places[3])) == pytest.approx({"frechet_distance": by_moments(x, real)}, rel=1e-6)


def _flat(card, *keys):
    return {(name, key): entry[key] for name, entry in card["metrics"].items() for key in keys}


def _ends(card):
    """The ends of all intervals."""
    entries = card["metrics"].items()
    return {(name, i): end for name, entry in entries for i, end in enumerate(entry["interval"] or ())}


# --- floats, bytes and ranges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 1), (0, 255), (-0.5, 0.5)])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_floats_score_as_the_bytes_they_came_from(digits, tmp_path, low, high, kind):
    x, real = digits
    floats = (x / 255 * (high - low) + low).astype(kind)
    expected = values(pixels(x, real))
    found = pixels(floats, real, value_range=(low, high))
    assert values(found) == expected
    assert found.card["samples"]["to_uint8"].startswith("round((x ")
    assert "cut off" in found.card["samples"]["to_uint8"]
    np.save(tmp_path / "x.npy", np.moveaxis(floats, 1, 3))
    assert values(pixels(tmp_path / "x.npy", real, value_range=(low, high))) == expected


RANGES = {
    "no range": (lambda x: x / 255, None, "say what black and white are"),
    "[0, 1] declared -1 … 1": (lambda x: x / 255, (-1, 1), "leaves much of --range -1 1 unused"),
    "[-1, 1] declared 0 … 1": (lambda x: x / 127.5 - 1, (0, 1), "far outside --range 0 1"),
    "[0, 255] declared 0 … 1": (lambda x: x * 1.0, (0, 1), "far outside --range 0 1"),
    "[0, 1] declared 0 … 255": (lambda x: x / 255, (0, 255), "leaves much of --range 0 255 unused"),
    "turned round": (lambda x: x / 255, (1, 0), "two increasing numbers"),
    "NaN for a range": (lambda x: x / 255, (0, float("nan")), "two increasing numbers"),
    "whole numbers": (lambda x: x.astype(np.int64), (0, 255), "pictures are bytes, uint8"),
    "bytes of 0 and 1": (lambda x: (x > 127).astype(np.uint8), None, "bytes from 0 to 1.*save round"),
    "bytes and a range": (lambda x: x, (-1, 1), "--range is for floats"),
}


@pytest.mark.parametrize("case", RANGES)
def test_numbers_that_are_not_what_was_said(digits, tmp_path, case):
    make, value_range, message = RANGES[case]
    x = make(digits[0])
    np.savez(tmp_path / "x.npz", x=x)
    for samples in (x, tmp_path / "x.npz"):
        if case in ("no range", "whole numbers") and samples is not x:
            message = "pictures are bytes"
        with pytest.raises(ReparamError, match=message):
            pixels(samples, digits[1], value_range=value_range)


def test_a_reference_of_bytes_0_and_1_is_refused(digits):
    with pytest.raises(DataError, match="bytes from 0 to 1"):
        pixels(digits[0], (digits[1] > 127).astype(np.uint8))


def test_a_range_for_what_is_stored_as_bytes(run, tmp_path, digits):
    put(tmp_path / "x", digits[0][:4])
    with pytest.raises(Conflict, match="--range is for arrays of floats"):
        pixels(tmp_path / "x", digits[1], value_range=(0, 1))
    with pytest.raises(Conflict, match="is a run"):
        evaluate(run, value_range=(0, 1))


# --- samples and references that do not do ----------------------------------------------------------------------------


def test_pictures_of_mixed_sizes(tmp_path, digits):
    folder = put(tmp_path / "x", digits[0][:5])
    put(tmp_path / "y", [np.zeros((1, 9, 8), np.uint8)])
    shutil.copy(tmp_path / "y" / "0000.png", folder / "zz.png")
    with pytest.raises(DataError, match="of one size"):
        pixels(folder, digits[1])


def test_samples_of_another_size_or_colour_than_the_reference(digits):
    x, real = digits
    with pytest.raises(DataError, match=r"shape \[1, 7, 8\].*shape \[1, 8, 8\].*resize: crop"):
        pixels(x[:, :, 1:], real)
    with pytest.raises(DataError, match=r"shape \[3, 8, 8\].*shape \[1, 8, 8\].*colour"):
        pixels(x.repeat(3, 1), real)


def test_vectors_and_pictures_are_not_compared(digits, tmp_path):
    x, real = digits
    vectors = np.random.default_rng(0).normal(size=(50, 64))
    with pytest.raises(DataError, match="expected pictures"):
        pixels(vectors, real)
    with pytest.raises(DataError, match="pictures by the look of it, and the reference"):
        evaluate(x, np.random.default_rng(0).normal(size=real.shape))
    with pytest.raises(DataError, match="shape"):
        evaluate(x, vectors)
    with pytest.raises(DataError, match="the reference holds vectors"):
        evaluate(put(tmp_path / "x", x[:5]), vectors)
    with pytest.raises(Conflict, match="--extractor is for pictures"):
        evaluate(vectors, vectors + 1, extractor="pixels")


def test_a_reference_is_needed(tmp_path, digits):
    with pytest.raises(DataError, match="--reference DATA"):
        evaluate(put(tmp_path / "x", digits[0][:5]))
    with pytest.raises(DataError, match="--reference nowhere: no file or folder"):
        pixels(digits[0], "nowhere")
    with pytest.raises(DataError, match="a reference needs at least 2"):
        pixels(digits[0], digits[1][:1])


def test_too_few_samples(tmp_path, digits):
    x, real = digits
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        pixels(tmp_path / "empty", real)
    with pytest.raises(DataError, match="is empty"):
        pixels(x[:0], real)
    for one in (x[:1], put(tmp_path / "one", x[:1])):
        with pytest.raises(DataError, match="at least 2 (samples, found 1|are needed)"):
            pixels(one, real)
    assert values(pixels(x[:2], real))["frechet_distance"] == pytest.approx(by_moments(x[:2], real), rel=1e-6)


def test_nan_in_samples(digits, tmp_path):
    x = digits[0] / 255
    x[[3, 5], 0, 2, 2] = np.nan, np.inf
    np.save(tmp_path / "x.npy", x)
    for samples in (x, tmp_path / "x.npy"):
        with pytest.raises(DataError, match=r"^[^:]*: 2 of 300 samples hold NaN or infinity\.$"):
            pixels(samples, digits[1], value_range=(0, 1))
    vectors = np.random.default_rng(0).normal(size=(50, 3))
    broken = np.where(vectors == vectors[7], np.nan, vectors)
    with pytest.raises(DataError, match="1 of 50 samples hold NaN"):
        evaluate(broken, vectors)
    with pytest.raises(DataError, match="NaN or infinity in 1 of 50"):
        evaluate(vectors, broken)


def test_nan_from_an_extractor(digits):
    x, real = (d.copy() for d in digits)
    x[250, 0, 0, 0] = 77  # one picture, beyond the first batch with BATCH = 256 or not
    with pytest.raises(DataError, match="NaN"):
        evaluate(x, real, FD, extractor={"name": OWN, "spoil": 77})
    with pytest.raises(DataError, match="NaN"):
        evaluate(real, x, FD, extractor={"name": OWN, "spoil": 77})


def test_metrics_that_are_unknown_or_do_not_apply(digits):
    x, real = digits
    with pytest.raises(UnknownName, match="unknown metric 'frechet_distanc'"):
        pixels(x, real, ["frechet_distanc"])
    with pytest.raises(Conflict, match="off_manifold does not apply"):
        pixels(x, real, ["off_manifold"])
    with pytest.raises(Conflict, match="class_error does not apply"):
        pixels(x, real, ["class_error"])
    assert values(pixels(x, real, "frechet_distance")) == values(pixels(x, real, [" frechet_distance "]))


def test_labels_that_do_not_fit():
    data = load_data({"name": "digits", "pictures": True})
    x, y = data.heldout, data.heldout_labels
    reference = {"name": "digits", "pictures": True, "holdout": 0.25}
    right = values(pixels(x, reference, ["class_error"], labels=y))["class_error"]
    assert right < 0.2
    wrong = values(pixels(x, reference, ["class_error"], labels=(y + 1) % 10))["class_error"]
    assert wrong > 0.9
    with pytest.raises(DataError, match=r"labels have shape \[3\], expected one for each of 449"):
        pixels(x, reference, labels=y[:3])
    with pytest.raises(DataError, match="labels go from 1 to 10"):
        pixels(x, reference, labels=y + 1)
    with pytest.raises(DataError, match="labels are float64"):
        pixels(x, reference, labels=y.double() + 0.5)


# --- copies and few samples -------------------------------------------------------------------------------------------


def test_duplicates_are_counted(digits):
    x, real = digits
    found = pixels(np.concatenate([x[:100], x[:20], x[:5]]), real).card["warnings"]
    assert "25 of 125 samples are exact copies of other samples" in found


def test_copies_of_the_reference_are_counted(digits):
    x, real = digits
    found = pixels(np.concatenate([x[:100], real[7:20]]), real).card["warnings"]
    assert found == ["13 of 113 samples are exact copies of reference pictures"]
    assert pixels(x[:200], real).card["warnings"] == []


def test_the_same_set_on_both_sides_is_refused(digits, tmp_path):
    real = digits[1]
    for same in (real, real[::-1].copy(), put(tmp_path / "x", real)):
        with pytest.raises(DataError, match="are the same 450 pictures"):
            pixels(same, real)


def test_fewer_samples_than_features_are_exact_and_warned_of(digits):
    """Against SciPy's root of the product, in the plane that holds the samples: their covariance is singular."""
    x, real = digits[0][:20], digits[1]
    linalg = pytest.importorskip("scipy.linalg")
    a, b = (d.reshape(len(d), -1) / 255 for d in (x, real))
    half = (a - a.mean(0)) / np.sqrt(len(a) - 1)  # half.T @ half is the covariance
    root = linalg.sqrtm(half @ np.cov(b.T) @ half.T).real
    cross = 2 * np.trace(root)
    exact = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(half @ half.T) + np.trace(np.cov(b.T)) - cross
    found = pixels(x, real)
    assert values(found)["frechet_distance"] == pytest.approx(exact, rel=1e-5)
    assert any(re.match("frechet_distance: 20 samples for 64 features", w) for w in found.card["warnings"])
    found = pixels(real, x)
    assert any("20 reference data for 64 features" in w for w in found.card["warnings"])


def test_metrics_that_samples_do_not_suffice_for_are_left_out_with_a_reason(digits):
    x, real = digits
    found = pixels(x[:3], real, None)
    assert set(found.left_out) == {"kernel_distance", "frechet_infinity"}
    assert "at least 4" in found.left_out["kernel_distance"]
    assert "takes 320" in found.left_out["frechet_infinity"]
    assert "left out: kernel_distance: " in found.text()
    for name in found.left_out:
        with pytest.raises(DataError):
            pixels(x[:3], real, [name])
    vectors = np.random.default_rng(0).normal(size=(60, 3))
    assert "mmd" in evaluate(vectors[:3], vectors[3:]).left_out


# --- references that are kept -----------------------------------------------------------------------------------------


def test_a_second_evaluation_computes_no_features_of_the_reference(digits, tmp_path):
    x, real = digits
    CALLS.clear()
    first = evaluate(x, real, extractor=OWN, cache=tmp_path)
    assert sum(CALLS) == 1 + len(x) + len(real) + 2 * 225  # its digest; floors: half of them, as samples and taken away
    CALLS.clear()
    second = evaluate(x, real, extractor=OWN, cache=tmp_path)
    assert sum(CALLS) == 1 + len(x)
    assert second.card == first.card


def test_what_decides_a_cached_reference(digits, tmp_path):
    x, real = digits

    def kept():
        return len(list(tmp_path.glob("*.safetensors")))

    evaluate(x, real, FD, extractor=OWN, cache=tmp_path)
    assert kept() == 1
    seen = {"extractor": OWN, "cache": tmp_path}
    for i, (reference, more) in enumerate(
        [
            (real, {**seen, "extractor": "pixels"}),
            (real, {**seen, "extractor": {"name": OWN, "seed": 1}}),
            (real, {**seen, "count": 400}),
            (real[::-1].copy(), seen),
        ]
    ):
        evaluate(x, reference, FD, **more)
        assert kept() == 2 + i


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_a_cached_file_under_another_s_name_is_refused(digits, tmp_path, suffix):
    x, real = digits
    pixels(x, real[:400], cache=tmp_path / "a")
    pixels(x, real, cache=tmp_path / "b")
    (one,), (other,) = (list((tmp_path / side).glob(f"*.{suffix}")) for side in "ab")
    shutil.copy(one, other)
    with pytest.raises(DataError, match="holds statistics of something else than its name says"):
        pixels(x, real, cache=tmp_path / "b")
    other.write_bytes(b"broken")  # that is computed anew
    assert values(pixels(x, real, cache=tmp_path / "b")) == values(pixels(x, real))


def test_a_kept_reference_is_as_good_as_the_data(digits, tmp_path):
    x, real = digits
    kept = tmp_path / "r.safetensors"
    metrics = ["frechet_distance", "kernel_distance", "recall"]
    first = evaluate(x, real, metrics, extractor=OWN, keep_reference=kept)
    CALLS.clear()
    second = evaluate(x, kept, metrics, extractor=OWN)
    assert sum(CALLS) == 1 + len(x)
    assert values(second) == values(first)
    assert second.card["reference"] == first.card["reference"]
    assert {f["verdict"] for n, f in compare(first.card, second.card).items() if n != "recall"} == {"no difference"}


def test_a_kept_reference_of_another_extractor_is_refused(digits, tmp_path, monkeypatch):
    x, real = digits
    kept = tmp_path / "r.safetensors"
    evaluate(x, real, FD, extractor=OWN, keep_reference=kept)
    with pytest.raises(DataError, match="its extractor was"):
        pixels(x, kept)
    monkeypatch.setattr(Projected, "__init__", lambda self: self.__dict__.update(seed=1, spoil=-1))
    with pytest.raises(DataError, match="its weights was"):
        evaluate(x, kept, FD, extractor=OWN)
    with pytest.raises(Conflict, match="--count"):
        evaluate(x, kept, FD, extractor=OWN, count=10)
    with pytest.raises(SpecError, match="no file"):
        pixels(x, tmp_path / "gone.safetensors")


def test_nothing_is_kept_of_features_where_moments_suffice(digits):
    x, real = (torch.from_numpy(d) for d in digits)
    data = rp.data.from_array(real, holdout=0.0)
    reference = rp.metrics.Reference(data, "pixels", None)
    scoring = Scoring(SampleSet.held(x), reference, keep=False)
    rp.metrics.METRICS["frechet_distance"].compute(scoring)
    assert scoring.features.shape == (0, 64)
    assert reference.statistics(reference.extractor).kept.shape == (0, 64)
    assert copies(scoring) == []


def test_a_reference_that_is_streamed_scores_the_same(digits, tmp_path, monkeypatch):
    x, real = digits
    folder = put(tmp_path / "real", real)
    whole = pixels(x, folder)
    monkeypatch.setattr(memory, "total", lambda: 40_000)
    streamed = []
    opened = streams.stream_of
    monkeypatch.setattr(streams, "stream_of", lambda *a, **k: streamed.append(1) or opened(*a, **k))
    found = pixels(x, folder)
    assert len(streamed) == 1  # the reference
    assert found.card["reference"]["n"] == len(real)
    assert values(found) == pytest.approx(values(whole), rel=1e-9)
    again = pixels(put(tmp_path / "x", x), folder)
    assert len(streamed) == 3  # and the samples too
    assert values(again) == pytest.approx(values(whole), rel=1e-9)


# --- comparing cards --------------------------------------------------------------------------------------------------


def noisy(x, seed, by=60):
    noise = np.random.default_rng(seed).normal(size=x.shape) * by
    return (x + noise).round().clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def cards(digits):
    """Of real digits, of others, and of others with noise: 220 each."""
    pytest.importorskip("sklearn")
    x = load_data({"name": "digits", "pictures": True, "holdout": 0.0}).train.numpy()
    order = np.random.default_rng(1).permutation(len(x))
    a, b, real = x[order[:300]], x[order[300:600]], x[order[600:1400]]
    metrics = ["frechet_distance", "kernel_distance", "nearest_neighbour", "precision"]
    return [pixels(samples, real, metrics).card for samples in (a, b, noisy(b, 0))]


def test_samples_of_one_model_do_not_differ(cards):
    found = compare(cards[0], cards[1])
    assert found["frechet_distance"]["verdict"] == found["kernel_distance"]["verdict"] == "no difference"
    assert "no difference beyond noise" in told(found)


def test_worse_samples_are_found_worse_whichever_comes_first(cards):
    for a, b, better in ((cards[0], cards[2], "a"), (cards[2], cards[0], "b")):
        found = compare(a, b)
        for name in ("frechet_distance", "kernel_distance", "nearest_neighbour"):
            assert found[name]["verdict"] == better
            assert found[name]["difference"] == a["metrics"][name]["value"] - b["metrics"][name]["value"]
    assert "B is better" in told(found)


def test_of_two_higher_is_better_the_higher(cards):
    a, b = json.loads(json.dumps(cards[0])), json.loads(json.dumps(cards[2]))
    high, low = a["metrics"]["precision"], b["metrics"]["precision"]
    assert high["better"] == "higher"
    assert high["value"] > low["value"] + 0.2
    assert compare(a, b)["precision"]["verdict"] == "unknown"  # no interval
    for entry in (high, low):
        entry["interval"] = [entry["value"] - 0.01, entry["value"] + 0.01]
    assert compare(a, b)["precision"]["verdict"] == "a"
    assert compare(b, a)["precision"]["verdict"] == "b"


def test_cards_that_cannot_be_compared_say_what_differs(digits):
    x, real = digits
    base = pixels(x, real).card
    others = {
        "extractor": evaluate(x, real, FD, extractor={"name": "pixels", "side": 4}).card,
        "weights of the extractor": None,
        "reference": pixels(x, real[::-1].copy()).card,
        "number of reference data": pixels(x, real, count=400).card,
        "number of samples": pixels(x[:250], real).card,
        "rule by which samples became bytes": pixels(x / 255, real, value_range=(0, 1)).card,
    }
    own = [evaluate(x, real, FD, extractor=OWN).card for _ in range(2)]
    own[1]["extractor"]["weights"] = "features:other"
    with pytest.raises(Conflict, match=r"weights of the extractor \(features:.* and features:other\)"):
        compare(*own)
    for what, card in others.items():
        if card is not None:
            with pytest.raises(Conflict, match=rf"differ in .*{what} \("):
                compare(base, card)
    settings = json.loads(json.dumps(base))
    settings["metrics"]["frechet_distance"]["settings"]["features"] = 1
    with pytest.raises(Conflict, match="settings of frechet_distance"):
        compare(base, settings)
    with pytest.raises(ReparamError, match="no metric in common"):
        compare(base, pixels(x, real, ["recall"]).card)


def test_what_is_no_card(tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"metrics": {}}')
    (tmp_path / "b.json").write_text("no json")
    (tmp_path / "c.json").write_text('{"format": 9, "metrics": {}, "samples": {}}')
    (tmp_path / "d.json").write_text('{"format": 1, "metrics": {"recall": 1}, "samples": {}}')
    for name, message in {
        "a": "is no metric card",
        "b": "is no metric card",
        "c": "format 9",
        "d": "no scores",
    }.items():
        with pytest.raises(DataError, match=message):
            read_card(tmp_path / f"{name}.json")
    assert main(["eval", "--compare", str(tmp_path / "gone.json"), str(tmp_path)]) == 2
    assert "No such file" in capsys.readouterr().err


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line(digits, tmp_path, capsys):
    x, real = digits
    np.savez(tmp_path / "x.npz", x=x)
    np.savez(tmp_path / "y.npz", x=noisy(x, 3))
    np.savez(tmp_path / "real.npz", x=real)
    options = ["--reference", str(tmp_path / "real.npz"), "--extractor", "{name: pixels, side: 16}"]
    asked = ["--metrics", "frechet_distance, kernel_distance"]
    assert main(["eval", str(tmp_path / "x.npz"), *options, *asked, "--json", "--out", str(tmp_path / "x.json")]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card.pop("left_out") == {}
    assert card == read_card(tmp_path / "x.json")
    assert main(["eval", str(tmp_path / "y.npz"), *options, *asked, "--out", str(tmp_path / "y.json")]) == 0
    text = capsys.readouterr().out
    assert "300 samples against 450 of real.npz" in text
    assert f"card: {tmp_path / 'y.json'}" in text
    assert main(["eval", "--compare", str(tmp_path / "x.json"), str(tmp_path / "y.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    assert found["frechet_distance"]["verdict"] == found["kernel_distance"]["verdict"] == "a"
    assert main(["eval", "--compare", str(tmp_path / "x.json"), str(tmp_path / "y.json")]) == 0
    assert "frechet_distance: A is better" in capsys.readouterr().out


BAD = {
    "no samples": ([], "which samples?"),
    "no reference": (["x.npz"], "--reference DATA"),
    "samples beside --compare": (["x.npz", "--compare", "a", "b"], "--compare takes two cards"),
    "count": (["x.npz", "--reference", "real.npz", "--count", "0"], "--count must be at least 2, found 0"),
    "an unwritable place": (["x.npz", "--reference", "real.npz", "--out", "gone/x.json"], "there is no folder"),
    "a card that is no .json": (["x.npz", "--reference", "real.npz", "--out", "x.txt"], "ends in .json"),
    "device": (["x.npz", "--reference", "real.npz", "--device", "abacus"], "device 'abacus'"),
    "extractor": (["x.npz", "--reference", "real.npz", "--extractor", "pixel"], "Did you mean 'pixels'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_to_the_command_line(digits, tmp_path, monkeypatch, capsys, case):
    np.savez(tmp_path / "x.npz", x=digits[0])
    np.savez(tmp_path / "real.npz", x=digits[1])
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *BAD[case][0]]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert BAD[case][1] in captured.err


def test_an_interrupted_evaluation_leaves_no_card(digits, tmp_path, monkeypatch, capsys):
    def interrupt(self, pictures):
        raise KeyboardInterrupt

    np.savez(tmp_path / "x.npz", x=digits[0])
    np.savez(tmp_path / "real.npz", x=digits[1])
    monkeypatch.setattr("reparam.metrics.extractors.Pixels.__call__", interrupt)
    places = [str(tmp_path / name) for name in ("x.npz", "real.npz", "card.json")]
    assert main(["eval", places[0], "--reference", places[1], "--extractor", "pixels", "--out", places[2]]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not Path(places[2]).exists()


def test_places_are_refused_before_any_work(digits, tmp_path):
    with pytest.raises(OutputError, match="there is no folder"):
        evaluate(digits[0], digits[1], FD, extractor=OWN, keep_reference=tmp_path / "no" / "r.safetensors")
    with pytest.raises(ReparamError, match=r"ends in \.safetensors"):
        evaluate(digits[0], digits[1], FD, extractor=OWN, keep_reference=tmp_path / "r.npz")


def test_drawn_samples_carry_their_model_labels_and_rule_to_the_card(run, tmp_path):
    """A folder that reparam sample wrote scores as the run itself, and its card says as much."""
    assert main(["sample", str(run), "--n", "40", "--out", str(tmp_path / "drawn")]) == 0
    assert main(["sample", str(run), "--n", "40", "--out", str(tmp_path / "drawn.npz")]) == 0
    reference = {"name": "digits", "pictures": True}
    cards = [evaluate(tmp_path / name, reference, extractor="pixels").card for name in ("drawn", "drawn.npz")]
    own = json.loads((run / "card.json").read_text())
    for card in cards:
        assert card["samples"]["to_uint8"] == own["samples"]["to_uint8"]
        assert card["model"] == own["model"]
        assert card["sampling"]["sampler"] == "heun"
    assert values_of(cards[0]) == values_of(cards[1])
    assert "class_error" in cards[0]["metrics"]
    assert cards[0]["floor"] == {"n": 40, "reference": 1757}


@pytest.mark.parametrize("of", ["noisy", "x0"])
def test_a_likelihood_of_another_noisy_sample_says_why_it_has_no_calibration(tmp_path, of):
    recipe = {
        "data": {"name": "spiral", "dim": 2, "size": 300},
        "network": {"name": "mlp", "hidden": 8},
        "target": {"name": "gaussian", "target": "v", "of": of},
        "train": {"steps": 5, "batch": 32},
        "sample": {"n": 40, "steps": 3},
    }
    ((name, config),) = load_recipe(recipe).runs.items()
    assert execute(name, config, tmp_path / name)["status"] == "finished"
    found = evaluate(tmp_path / name, device="cpu", out=tmp_path / "card.json")
    card, why = read_card(tmp_path / "card.json"), "the variance of x0 would be that less the noise's own"
    assert ("calibration" in card) == (of == "x0")
    assert (why in card.get("left_out", {}).get("calibration", "")) == (of == "noisy")
    assert found.text().count(why) == (of == "noisy")
    assert found.text().count("calibration of the stated variance") == (of == "x0")
    assert found.left_out == card.get("left_out", {})


def values_of(card):
    return {name: entry["value"] for name, entry in card["metrics"].items()}


def test_a_floor_of_fewer_data_than_samples_is_told(tmp_path):
    x = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    card = evaluate(x[:40], x[40:], ["frechet_distance"], extractor="pixels").card
    assert card["floor"] == {"n": 10, "reference": 10}
    assert any("10 fresh real data against 10, not of 40" in warning for warning in card["warnings"])
