"""Studies of pictures from end to end: a folder of files in, a leaderboard, a page and PNGs out."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import reparam as rp
from reparam import files
from reparam.cli import main
from reparam.errors import OutputError

Image = pytest.importorskip("PIL.Image")

SMALL = [
    "network.patch=8",
    "network.width=16",
    "network.depth=2",
    "network.heads=2",
    "network.bottleneck=8",
    "data.size=null",
    "data.resize=null",
    "train.steps=12",
    "train.batch=16",
    "train.warmup=2",
    "train.validations=2",
    "sample.n=20",
    "sample.steps=4",
    "sample.reference=60",
    "extractor=pixels",
]


def make_folder(where, n=40, size=(16, 24)):
    """Pictures of two classes, one red and one blue, in folders of odd names."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(("<b>red&", "bläu")):
        (where / name).mkdir(parents=True)
        for i in range(n):
            x = rng.integers(0, 80, (*size, 3))
            x[..., 0 if k == 0 else 2] += 150
            Image.fromarray(x.astype(np.uint8)).save(where / name / f"{i:03d}.png")
    return where


def settings(*more):
    return [word for s in [*SMALL, *more] for word in ("--set", s)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    more = settings(f"data.path={photos}", "conditional=true", "network.in_context=2", "sample.guidance=1.5")
    command = [sys.executable, "-m", "reparam.cli", "study", "folder", "--out", str(out), "--json", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_folder_of_pictures_becomes_a_leaderboard(finished):
    out, done = finished
    rows = json.loads(done.stdout)["leaderboard"]
    assert {row["target"] for row in rows} == {"x0", "velocity"}
    for row in rows:
        assert row["status"] == "finished"
        assert set(row["metrics"]) == {"frechet_distance", "class_error", "nearest_neighbour"}
        for name, entry in row["metrics"].items():
            assert entry["value"] >= 0, name
            assert entry["floor"] >= 0, name
        card = json.loads((out / row["run"] / "card.json").read_text())
        # 8 of 80 pictures are held out, and as many samples are scored.
        assert card["samples"]["n"] == 8
        assert card["reference"]["n"] == 60
        assert card["extractor"]["name"] == "pixels, at most 16x16"
        assert card["metrics"] == row["metrics"]
        assert any("lacks rank" in warning for warning in card["warnings"])
        assert row["metrics"]["class_error"]["floor"] == 0  # red and blue are easily told apart
        assert row["guidance"] == 1.5
    assert "2 classes" in done.stderr
    assert "contact-sheet.png" in done.stderr


def test_what_a_run_leaves_is_bytes_labels_and_neighbours(finished, photos):
    out, _ = finished
    with np.load(out / "x0" / "samples.npz") as file:
        assert file["x"].dtype == np.uint8
        assert file["x"].shape == (8, 3, 16, 24)
        assert file["y"].tolist() == [0, 1] * 4
    with np.load(out / "x0" / "trajectory.npz") as file:
        assert file["frames"].shape == (5, 8, 16, 24, 3)
        assert file["labels"].tolist() == ["<b>red&", "bläu"] * 4
    with np.load(out / "x0" / "nearest.npz") as file:
        assert file["nearest"].shape == (8, 4, 16, 24, 3)
        assert bool((np.diff(file["distance"], axis=1) >= 0).all())
        real = {Image.open(p).tobytes() for p in photos.rglob("*.png")}
        mirrored = {Image.open(p).transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes() for p in photos.rglob("*.png")}
        assert all(p.tobytes() in real | mirrored for p in file["nearest"].reshape(-1, 16, 24, 3))
    spec = json.loads((out / "x0" / "spec.json").read_text())
    assert spec["data"]["classes"] == ["<b>red&", "bläu"]
    assert spec["network"]["image"] == [16, 24]
    sheet = Image.open(out / "contact-sheet.png")
    assert sheet.mode == "RGB"
    assert max(sheet.size) >= 256


def test_names_are_escaped_in_the_page(finished):
    out, _ = finished
    page = (out / "report.html").read_text()
    assert "<b>red&" not in page
    assert "&lt;b&gt;red&amp;" in page


def test_sample_writes_pngs_and_a_grid(finished, tmp_path, capsys):
    out, _ = finished
    assert main(["sample", str(out / "x0"), "--n", "5", "--out", str(tmp_path / "a")]) == 0
    assert "5 samples of shape [3, 16, 24]" in capsys.readouterr().out
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["0000.png", "0001.png", "0002.png", "0003.png", "0004.png"]
    assert Image.open(tmp_path / "a-grid.png").size[0] >= 24
    about = json.loads((tmp_path / "a.json").read_text())
    assert about["labels"] == [0, 1, 0, 1, 0]
    assert about["sampling"]["sampler"] == "heun"
    assert len(about["model"]["weights"]) == 64
    first = np.asarray(Image.open(tmp_path / "a" / "0000.png"))
    assert first.shape == (16, 24, 3)
    # The same, as an array; and the first ones of a seed are the same however many are drawn.
    assert main(["sample", str(out / "x0"), "--n", "40", "--out", str(tmp_path / "a.npz")]) == 0
    with np.load(tmp_path / "a.npz") as file:
        assert file["x"].dtype == np.uint8
        assert np.abs(file["x"][0].transpose(1, 2, 0).astype(int) - first).max() <= 1
        assert file["y"].tolist() == [0, 1] * 20


def test_sample_takes_a_class_and_guidance(finished, tmp_path, capsys):
    out, _ = finished
    found = {}
    for label, weight in (("bläu", "1"), ("1", "1"), ("<b>red&", "1"), ("bläu", "4")):
        place = tmp_path / f"{len(found)}.npz"
        args = ["sample", str(out / "x0"), "--n", "3", "--label", label, "--guidance", weight, "--out", str(place)]
        assert main(args) == 0
        with np.load(place) as file:
            found[label, weight] = file["x"].astype(int), file["y"].tolist()
    assert found["bläu", "1"][1] == [1, 1, 1] == found["1", "1"][1]
    assert np.array_equal(found["bläu", "1"][0], found["1", "1"][0])
    assert not np.array_equal(found["bläu", "1"][0], found["bläu", "4"][0])
    assert main(["sample", str(out / "x0"), "--label", "green"]) == 2
    assert "unknown class 'green'" in capsys.readouterr().err
    assert main(["sample", str(out / "x0"), "--guidance", "2", "--interval", "0.9", "0.1"]) == 2
    assert "interval" in capsys.readouterr().err


def test_the_weights_are_a_conditional_denoiser_of_the_spec(finished):
    out, _ = finished
    denoiser = rp.load(out / "x0" / "model.safetensors")
    assert isinstance(denoiser.net, rp.networks.JiT)
    x = torch.randn(2, 3, 16, 24)
    a, b = (denoiser(x, 0.5, y=torch.tensor([k, k])).mean for k in (0, 1))
    assert not torch.allclose(a, b)
    assert "rope" not in load_file(out / "x0" / "model.safetensors")


# ------------------------------------------------------------------------------------------ bad input


def fails(capsys, *args):
    code = main(list(args))
    told = capsys.readouterr().err
    assert code == 2, told
    assert "Traceback" not in told
    return told


def study(photos, tmp_path, *more):
    return ["study", "folder", "--out", str(tmp_path / "out"), *settings(f"data.path={photos}", *more)]


def test_a_bad_file_is_named_and_may_be_skipped(photos, tmp_path, capsys):
    mixed = make_folder(tmp_path / "mixed", n=6)
    (mixed / "bläu" / "notes.txt").write_text("not a picture")
    cut = (mixed / "bläu" / "000.png").read_bytes()
    (mixed / "bläu" / "cut.png").write_bytes(cut[: len(cut) // 2])
    told = fails(capsys, *study(mixed, tmp_path))
    assert "notes.txt" in told
    assert "cut.png" in told
    assert "--skip-bad" in told
    assert main([*study(mixed, tmp_path, "data.holdout=0.3"), "--skip-bad", "--estimate"]) == 0
    assert "2 files skipped" in capsys.readouterr().out


def test_differing_sizes_say_which_option_helps(photos, tmp_path, capsys):
    mixed = make_folder(tmp_path / "mixed", n=6)
    Image.new("RGB", (50, 40)).save(mixed / "bläu" / "large.png")
    told = fails(capsys, *study(mixed, tmp_path))
    assert "data.size" in told
    assert "data.resize=crop" in told


def test_a_size_that_patches_do_not_divide(photos, tmp_path, capsys):
    told = fails(capsys, *study(photos, tmp_path, "network.patch=5"))
    assert "16×24" in told
    assert "patches of 5" in told
    assert "(2, 4, 8)" in told


def test_more_classes_than_declared(photos, tmp_path, capsys):
    assert "data.classes" in fails(capsys, *study(photos, tmp_path, "data.classes=1"))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("sample.guidance=2", ["conditional: true"]),
        ("sample.guidance_interval=[0.5, 0.1]", ["sample.guidance_interval", "[0.5, 0.1]"]),
        ("train.label_drop=2", ["train.label_drop", "[0, 1]"]),
        ("extractor=incepton", ["unknown extractor 'incepton'", "inception", "pixels"]),
        ("extractor=inception", ["inception-2015-12-05.pt", "extractor.path", "REPARAM_INCEPTION"]),
        ("extractor={name: pixels, sides: 4}", ["extractor.sides", "extractor.side"]),
        ("sample.reference=1", ["sample.reference"]),
        ("metrics=[class_error]", ["class_error does not apply"]),
        ("extractor=[pixels, {name: pixels, side: 4}]", ["extractor", "cannot be compared"]),
        ("sample.reference=[20, 30]", ["sample.reference", "cannot be compared"]),
        ("network=mlp", ["takes vectors", "jit"]),
        ("network.classes=4", ["network.classes"]),
        ("data.path=null", ["data.path"]),
        ("data.holdout=0.999", ["holdout=0.999"]),
    ],
)
def test_settings_that_do_not_fit(photos, tmp_path, capsys, setting, words):
    args = study(photos, tmp_path, setting)
    if setting == "network=mlp":  # which has none of jit's keys
        args = [*args[:4], "--set", f"data={{name: images, path: {photos}}}", "--set", setting]
    told = fails(capsys, *args)
    for word in words:
        assert word in told


def test_labels_are_needed_for_a_conditional_run(tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(30):
        Image.new("RGB", (16, 24), (i * 8, 0, 0)).save(flat / f"{i}.png")
    assert "has no labels" in fails(capsys, *study(flat, tmp_path, "conditional=true"))


def test_vectors_are_not_for_jit(tmp_path, capsys):
    told = fails(capsys, "study", "digits", "--out", str(tmp_path / "o"), "--set", "network={name: jit, patch: 8}")
    assert "pictures: true" in told


def test_clipping_is_refused_before_training_where_it_would_cut(tmp_path, capsys):
    """Standardised vectors, as latents, reach beyond [-1, 1]; pictures do not."""
    array, out = tmp_path / "x.npy", str(tmp_path / "o")
    np.save(array, np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32))
    common = ["--set", "train.steps=2", "--set", "sample.n=4", "--set", "target=x0", "--set", "data.holdout=0.2"]
    options = ["--set", "sample.threshold=static", "--out", out, *common]
    told = fails(capsys, "study", "spiral", "--set", f"data={{name: array, path: {array}}}", *options)
    assert "thresholding clips x0 to [-1, 1], and the data reach from" in told
    assert not (tmp_path / "o").exists()


def test_sampling_takes_a_grid_and_thresholds_pictures(finished, tmp_path, capsys):
    out, _ = finished

    def drawn(*options):
        place = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
        args = ["sample", str(out / "x0"), "--n", "3", "--steps", "3", "--out", str(place), *options]
        assert main(args) == 0, capsys.readouterr().err
        return np.load(place)["x"]

    plain = drawn("--sampler", "ddim")
    assert np.array_equal(plain, drawn("--sampler", "{name: ddim, eta: 0.0}", "--grid", "linear"))
    assert not np.array_equal(plain, drawn("--sampler", "ddim", "--grid", "{name: shifted, shift: 3}"))
    assert drawn("--threshold", "dynamic").dtype == np.uint8
    assert "sample.threshold" in fails(capsys, "sample", str(out / "x0"), "--threshold", "hard")


def test_guidance_and_labels_are_refused_by_a_model_without_classes(tmp_path, capsys):
    net = rp.networks.JiT(8, 8, 1, width=8, depth=1, heads=2, bottleneck=4)
    record = {"shape": [1, 8, 8], "pictures": True, "normalised_by": {"mean": 127.5, "std": 127.5}}
    rp.save(rp.Denoiser(net, "rectified_flow", "x0", data=record), tmp_path / "m.safetensors")
    for option in (["--label", "3"], ["--guidance", "2"]):
        assert "trained without labels" in fails(capsys, "sample", str(tmp_path / "m.safetensors"), *option)
    assert main(["sample", str(tmp_path / "m.safetensors"), "--n", "2", "--steps", "2"]) == 0
    assert (tmp_path / "m-samples-2-seed0-steps2-grid.png").exists()
    (tmp_path / "file").write_text("")
    told = fails(capsys, "sample", str(tmp_path / "m.safetensors"), "--out", str(tmp_path / "file"))
    assert "is a file; expected a folder" in told


def test_guidance_needs_dropped_labels(photos, tmp_path, capsys):
    told = fails(capsys, *study(photos, tmp_path, "conditional=true", "sample.guidance=2", "train.label_drop=0"))
    assert "train.label_drop" in told


def test_old_and_new_pictures_are_not_mixed(finished, tmp_path, capsys):
    run, place = str(finished[0] / "x0"), str(tmp_path / "a")
    assert main(["sample", run, "--n", "4", "--steps", "2", "--out", place]) == 0
    assert main(["sample", run, "--n", "4", "--steps", "2", "--out", place]) == 0  # the same files
    told = fails(capsys, "sample", run, "--n", "2", "--steps", "2", "--out", place)
    assert "0002.png" in told
    assert "nothing was touched" in told
    assert "--out is empty" in fails(capsys, "sample", run, "--out", "")
    assert "--guidance too" in fails(capsys, "sample", run, "--guidance", "1", "--interval", "0", "0.5")


def tiny(data, **more):
    """A recipe for pictures that ends in no time."""
    return {
        "data": data,
        "network": {"name": "jit", "patch": 8, "width": 16, "depth": 2, "heads": 2, "bottleneck": 8},
        "target": "x0",
        "time": "1-t",
        "extractor": "pixels",
        "train": {"steps": 3, "batch": 8, "warmup": 1, "validations": 1},
        "sample": {"n": 8, "steps": 2, "reference": 20},
        **more,
    }


def test_from_python_the_recipe_says_how_pictures_are_read(tmp_path):
    odd = make_folder(tmp_path / "odd", n=10, size=(20, 30))
    recipe = tiny({"name": "images", "path": "elsewhere", "size": 16, "resize": "crop", "flip": True, "holdout": 0.3})
    said = []
    done = rp.study(recipe, data=odd, out=tmp_path / "out", jobs=1, say=said.append)
    assert "[3, 16, 16]" in " ".join(said)
    assert done.rows[0]["data"] == "odd (size 16, resize crop, mirrored, holdout 0.3)"
    # Files that are added are seen by the next study of the same process.
    make_folder(tmp_path / "more", n=4, size=(20, 30))
    for p in (tmp_path / "more").rglob("*.png"):
        p.rename(odd / "bläu" / f"new{p.parent.name[0]}{p.name}".replace("<", "_"))
    said.clear()
    rp.study(recipe, data=odd, estimate_only=True, say=said.append)
    assert "20 training + 8 held-out" in " ".join(said)


def test_bytes_from_python_are_pictures(tmp_path):
    pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    done = rp.study(tiny("given"), data=pixels, out=tmp_path / "out", say=lambda line: None)
    assert set(done.rows[0]["metrics"]) == {"frechet_distance", "nearest_neighbour"}
    with np.load(tmp_path / "out" / done.rows[0]["run"] / "samples.npz") as file:
        assert file["x"].dtype == np.uint8


def test_scoring_can_be_stopped_and_begins_again(tmp_path):
    from reparam.data import from_array
    from reparam.studies.recipe import load_recipe
    from reparam.studies.run import execute

    data = from_array(torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8))
    recipe = tiny({"name": "images", "path": "given"})
    recipe["sample"]["steps"] = 50
    ((run, config),) = load_recipe(recipe).runs.items()
    folder, asked = tmp_path / "out" / run, []

    def stop():
        asked.append(1)
        return (folder / "spec.json").exists()  # training is over

    assert execute(run, config, folder, data=data, stop=stop) is None
    assert not (folder / "samples.npz").exists()
    assert (folder / "resume.safetensors").exists()
    row = execute(run, config, folder, data=data)
    whole = execute(run, config, tmp_path / "again" / run, data=data)
    assert row["status"] == "finished"
    assert row["metrics"] == whole["metrics"]


def test_data_that_change_under_a_study_are_refused(tmp_path):
    from reparam.data import from_array
    from reparam.errors import DataError
    from reparam.studies.recipe import load_recipe
    from reparam.studies.run import execute

    data = from_array(torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8))
    ((run, config),) = load_recipe(tiny({"name": "images", "path": "given"})).runs.items()
    with pytest.raises(DataError, match="changed while the study was running"):
        execute(run, config, tmp_path / run, data=data, digest="another")


def test_a_full_disk_is_told_and_leaves_no_half_files(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OutputError, match=r"grid\.bin: No space left on device.*--out"):
        files.write_text(tmp_path / "grid.bin", "content")
    assert list(tmp_path.iterdir()) == []
