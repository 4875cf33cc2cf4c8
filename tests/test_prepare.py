"""Pictures cut to squares against the same arithmetic in numpy, and latents against encoding by hand."""

import io
import json
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from reparam.data.images import load_images
from reparam.data.latents import digest, load_latents
from reparam.errors import DataError, OutputError, UnknownName, Unsupported
from reparam.files import read_tensors, write_tensors
from reparam.tools import prepare as module
from reparam.tools.prepare import centre_crop, prepare

pq = pytest.importorskip("pyarrow.parquet")


pytestmark = pytest.mark.usefixtures("one_thread")


def picture(height, width, seed=0, channels=3):
    shape = (height, width, channels) if channels == 3 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def folder_of(root, sizes, classes=("ant", "bee"), name="pictures"):
    """Random pictures of these (height, width) going round the classes; the folder, and [(class, array)] in order."""
    made = []
    for i, (height, width) in enumerate(sizes):
        label = i % len(classes)
        place = root / name / classes[label]
        place.mkdir(parents=True, exist_ok=True)
        made.append((label, f"{classes[label]}/{i:03d}.png", picture(height, width, seed=i)))
        Image.fromarray(made[-1][2]).save(root / name / made[-1][1])
    return root / name, sorted(made, key=lambda one: one[1])


# ------------------------------------------------------------------------------------------ cutting


def cubic(x):
    """Keys' kernel with a = −1/2, which Pillow's BICUBIC is."""
    x = abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def along(x, to, kernel, support):
    """One axis (the first) scaled to ``to``, with the kernel stretched where that shrinks; rounded to bytes."""
    scale = len(x) / to
    stretch = max(scale, 1.0)
    out = []
    for i in range(to):
        centre = (i + 0.5) * scale
        low = max(int(centre - support * stretch + 0.5), 0)
        high = min(int(centre + support * stretch + 0.5), len(x))
        weights = kernel((np.arange(low, high) + 0.5 - centre) / stretch)
        out.append(np.tensordot(weights / weights.sum(), x[low:high].astype(float), 1))
    return np.clip(np.floor(np.array(out) + 0.5), 0, 255)


def scaled(x, height, width, kernel, support):
    across = along(x.swapaxes(0, 1), width, kernel, support).swapaxes(0, 1)
    return along(across, height, kernel, support)


def cut_by_hand(x, size):
    while min(x.shape[:2]) >= 2 * size:
        x = scaled(x, x.shape[0] // 2, x.shape[1] // 2, box, 0.5)
    factor = size / min(x.shape[:2])
    x = scaled(x, round(x.shape[0] * factor), round(x.shape[1] * factor), cubic, 2.0)
    top, left = (x.shape[0] - size) // 2, (x.shape[1] - size) // 2
    return x[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "shape", [(16, 16), (16, 29), (41, 23), (64, 32), (67, 150), (33, 31), (9, 20), (11, 7)], ids=str
)
def test_a_crop_is_the_arithmetic_it_says(shape):
    x = picture(*shape)
    found = np.asarray(centre_crop(Image.fromarray(x), 16)).astype(float)
    assert found.shape == (16, 16, 3)
    assert np.abs(found - cut_by_hand(x, 16)).max() <= 1  # Pillow's weights have a fixed point


@pytest.mark.parametrize(("height", "width"), [(64, 200), (200, 64), (64, 64)])
def test_the_centre_of_a_gradient_stays_the_centre(height, width):
    rows, columns = np.mgrid[0:height, 0:width]
    x = np.stack([rows * 255 / 199, columns * 255 / 199, np.full_like(rows, 7.0)], axis=-1)
    found = np.asarray(centre_crop(Image.fromarray(x.round().astype(np.uint8)), 32)).astype(float)
    centre = [(height - 1) / 2 * 255 / 199, (width - 1) / 2 * 255 / 199, 7]
    np.testing.assert_allclose(found.mean((0, 1)), centre, atol=1)
    slope = (found[-1].mean(0) - found[0].mean(0))[0] / 31  # 64 pixels became 32
    assert slope == pytest.approx(2 * 255 / 199, rel=0.05)


def test_a_line_is_not_scaled_into_all_memory():
    with pytest.raises(DataError, match=r"1×300000 pixels: too narrow"):
        centre_crop(Image.fromarray(np.zeros((300_000, 1), np.uint8)), 256)


# ------------------------------------------------------------------------------------------- shards


def test_shards_hold_the_pictures_in_order_with_labels_and_names(tmp_path):
    where, made = folder_of(tmp_path, [(16 + 3 * i, 40 - i) for i in range(11)], classes=("ant", "bee", "cat"))
    done = prepare(where, tmp_path / "out", size=16, shard=4, workers=1)
    assert (done.count, done.shards, done.shape, done.classes) == (11, 3, (16, 16), ("ant", "bee", "cat"))
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [*(f"part-{i:05d}-of-00003.parquet" for i in range(3)), "prepared.json"]
    rows = [row for name in files[:3] for row in pq.read_table(tmp_path / "out" / name).to_pylist()]
    assert [row["label"] for row in rows] == [label for label, _, _ in made]
    assert [row["image"]["path"] for row in rows] == [name for _, name, _ in made]
    for row, (_, _, x) in zip(rows, made, strict=True):
        stored = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert stored.format == "PNG"
        assert np.array_equal(np.asarray(stored), np.asarray(centre_crop(Image.fromarray(x), 16)))
    found = load_images(str(tmp_path / "out"))
    assert found.classes == ("ant", "bee", "cat")
    assert found.labels.tolist() == [label for label, _, _ in made]
    assert found.pixels.shape == (11, 3, 16, 16)
    assert done.to_dict()["out"] == str(tmp_path / "out")
    assert "11 pictures of 16×16, 3 classes, in 3 shards" in done.text()


def test_the_layout_is_the_hubs(tmp_path):
    where, _ = folder_of(tmp_path, [(20, 20)] * 3)
    prepare(where, tmp_path / "out", size=16, workers=1)
    schema = pq.read_schema(tmp_path / "out" / "part-00000-of-00001.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["ant", "bee"]}}
    assert str(schema.field("image").type) == "struct<bytes: binary, path: string>"


def test_archives_and_parquet_give_the_same_as_the_folder(tmp_path):
    where, _ = folder_of(tmp_path, [(20, 30)] * 5)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for file in sorted(where.rglob("*.png")):
            archive.write(file, file.relative_to(where))
    prepare(where, tmp_path / "a", size=16, workers=1)
    prepare(tmp_path / "all.zip", tmp_path / "b", size=16, workers=1)
    prepare(tmp_path / "a", tmp_path / "c", size=16, workers=1)  # of that size already: nothing changes
    pixels = [load_images(str(tmp_path / name)) for name in "abc"]
    for other in pixels[1:]:
        assert torch.equal(other.pixels, pixels[0].pixels)
        assert torch.equal(other.labels, pixels[0].labels)
        assert other.classes == pixels[0].classes


def test_processes_give_the_same_bytes(tmp_path):
    where, _ = folder_of(tmp_path, [(20 + i, 30) for i in range(20)])
    prepare(where, tmp_path / "one", size=16, shard=7, workers=1)
    prepare(where, tmp_path / "two", size=16, shard=7, workers=2)
    same(tmp_path / "one", tmp_path / "two")


def same(one, two):
    assert [file.name for file in sorted(one.iterdir())] == [file.name for file in sorted(two.iterdir())]
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name


def test_what_was_done_to_pictures_is_said(tmp_path):
    where, _ = folder_of(tmp_path, [(20, 20), (10, 30)])
    Image.fromarray(picture(20, 20, channels=1)).convert("CMYK").save(where / "ant" / "z.jpg")
    done = prepare(where, tmp_path / "out", size=16, workers=1)
    assert done.remarks == ("1 of 3 were CMYK, converted to RGB", "1 of 3 were smaller than the size and enlarged")


def test_grey_pictures_without_classes_stay_so(tmp_path):
    (tmp_path / "grey").mkdir()
    for i in range(3):
        Image.fromarray(picture(20, 20, i, channels=1)).save(tmp_path / "grey" / f"{i}.png")
    done = prepare(tmp_path / "grey", tmp_path / "out", size=16, workers=1)
    found = load_images(str(tmp_path / "out"))
    assert found.pixels.shape == (3, 1, 16, 16)
    assert found.labels is None
    assert done.classes == ()


# ----------------------------------------------------------------------------------------- resuming


def test_an_interrupted_preparation_goes_on_where_it_was(tmp_path, monkeypatch):
    where, _ = folder_of(tmp_path, [(20, 24)] * 14)
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare(where, whole, size=16, shard=3, workers=1)
    real, written = module.PictureShards.write, []

    def dies(self, path, *rest):
        if len(written) == 2:
            (out / ".part-00002-of-00005.77.tmp.parquet").write_bytes(b"half of it")
            raise KeyboardInterrupt
        written.append(path.name)
        real(self, path, *rest)

    monkeypatch.setattr(module.PictureShards, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare(where, out, size=16, shard=3, workers=1)
    assert json.loads((out / "prepared.json").read_text())["complete"] is False
    monkeypatch.setattr(module.PictureShards, "write", lambda self, path, *rest: again(self, path, rest))
    remade = []

    def again(self, path, rest):
        remade.append(path.name)
        real(self, path, *rest)

    prepare(where, out, size=16, shard=3, workers=1)
    assert remade == [f"part-{i:05d}-of-00005.parquet" for i in (2, 3, 4)]
    same(whole, out)
    prepare(where, out, size=16, shard=3, workers=1)  # nothing left to do
    (out / "part-00001-of-00005.parquet").write_bytes(b"damaged")
    prepare(where, out, size=16, shard=3, workers=1)
    assert remade[3:] == ["part-00001-of-00005.parquet"]
    same(whole, out)


CALL = """
import sys
from reparam.tools.prepare import prepare

if __name__ == "__main__":
    prepare(*sys.argv[1:], size=256, shard=1, workers=2)
"""


def test_a_killed_preparation_takes_its_workers_along_and_goes_on(tmp_path):
    where, _ = folder_of(tmp_path, [(600, 600)] * 24)
    (tmp_path / "call.py").write_text(CALL)
    out = tmp_path / "out"
    command = [sys.executable, tmp_path / "call.py", where, out]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    while not (out / "part-00001-of-00024.parquet").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=20)  # waits for all that hold its end of the pipe: the workers do
    assert len(list(out.glob("part-*"))) < 24
    prepare(where, out, size=256, shard=1, workers=1)
    prepare(where, tmp_path / "whole", size=256, shard=1, workers=1)
    same(tmp_path / "whole", out)


def test_other_settings_and_other_pictures_are_refused_where_something_was_begun(tmp_path):
    where, _ = folder_of(tmp_path, [(20, 24)] * 4)
    prepare(where, tmp_path / "out", size=16, workers=1)
    before = (tmp_path / "out" / "prepared.json").read_bytes()
    with pytest.raises(OutputError, match=r"another preparation: side \[16, 16\], asked for is \[8, 8\].*--out"):
        prepare(where, tmp_path / "out", size=8, shard=4096, workers=1)
    (where / "ant" / "000.png").rename(where / "ant" / "new.png")
    with pytest.raises(OutputError, match=r"another preparation: another list of pictures"):
        prepare(where, tmp_path / "out", size=16, workers=1)
    assert (tmp_path / "out" / "prepared.json").read_bytes() == before


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    where, _ = folder_of(tmp_path, [(20, 24)] * 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"holds something else \(thesis\.tex\).*Choose another place \(--out\)"):
        prepare(where, tmp_path / "out", size=16, workers=1)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    with pytest.raises(OutputError, match=r"lies in .*choose a place outside"):
        prepare(where, where / "small", size=16, workers=1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"cannot write to"):
        prepare(where, tmp_path / "file", size=16, workers=1)


# ---------------------------------------------------------------------------------------- bad ones


def test_a_bad_picture_is_named_or_skipped(tmp_path):
    where, made = folder_of(tmp_path, [(20, 24)] * 6)
    (where / "ant" / "002.png").write_bytes((where / "ant" / "002.png").read_bytes()[:200])
    with pytest.raises(DataError, match=r"ant/002\.png \(.+\) cannot be used\..*--skip-bad"):
        prepare(where, tmp_path / "out", size=16, shard=1, workers=1)
    done = prepare(where, tmp_path / "out", size=16, shard=1, workers=1, skip_bad=True)
    assert [name for name, _ in done.bad] == ["ant/002.png"]
    assert "skipped ant/002.png: " in done.text()
    assert (done.count, done.shards) == (5, 6)
    kept = [label for label, name, _ in made if name != "ant/002.png"]
    assert load_images(str(tmp_path / "out")).labels.tolist() == kept


def test_files_that_are_no_pictures_are_named(tmp_path):
    where, _ = folder_of(tmp_path, [(20, 24)] * 2)
    (where / "ant" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"1 file cannot be used: ant/notes\.txt \(not a picture\).*--skip-bad"):
        prepare(where, tmp_path / "out", size=16, workers=1)
    assert not (tmp_path / "out").exists()
    assert prepare(where, tmp_path / "out", size=16, workers=1, skip_bad=True).count == 2


def test_without_one_good_picture_it_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no pictures"):
        prepare(tmp_path / "empty", tmp_path / "out", size=16)
    with pytest.raises(DataError, match=r"no file or folder"):
        prepare(tmp_path / "nowhere", tmp_path / "out", size=16)
    with pytest.raises(DataError, match=r"cannot look at"):
        prepare("~nobody-of-this-name/x", tmp_path / "out", size=16)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of 1 pictures can be used: a\.png \(empty file\)"):
        prepare(tmp_path / "bad", tmp_path / "out", size=16, workers=1, skip_bad=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, r"no size is given.*--size 256"), ({"size": 0}, r"size must be an integer of at least 1, found 0: --size N")],
    ids=str,
)
def test_sizes_that_are_none_are_refused(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, tmp_path / "out", **arguments)


# ------------------------------------------------------------------------------------------ latents


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny random autoencoder in a folder, and itself."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    made = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=3,
        shift_factor=0.25,
        scaling_factor=0.5,
        mid_block_add_attention=False,
    )
    folder = tmp_path_factory.mktemp("vae")
    made.save_pretrained(folder)
    return folder, made.eval()


def test_latents_are_those_of_encoding_by_hand(tmp_path, vae):
    where, made = folder_of(tmp_path, [(20 + i, 24) for i in range(7)], classes=("ant", "bee", "cat"))
    done = prepare(where, tmp_path / "out", size=16, vae=vae[0], dtype="float32", shard=3, batch=2, workers=1)
    assert (done.count, done.shards, done.shape) == (7, 3, (3, 8, 8))
    found = load_latents(tmp_path / "out")
    cut = np.stack([np.asarray(centre_crop(Image.fromarray(x), 16)) for _, _, x in made])
    with torch.no_grad():
        pixels = torch.from_numpy(cut).permute(0, 3, 1, 2)
        moments = vae[1].quant_conv(vae[1].encoder(pixels.float() / 127.5 - 1))
    mean, log_variance = moments.chunk(2, dim=1)
    std = (log_variance.double().clamp(-30, 20) / 2).exp().float()
    torch.testing.assert_close(found.mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.std, std, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == [label for label, _, _ in made]
    assert found.classes == ("ant", "bee", "cat")
    assert (found.shift, found.scale) == (0.25, 0.5)
    torch.testing.assert_close(found.x0, (mean - 0.25) * 0.5, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.x0_std, std * 0.5, rtol=1e-4, atol=1e-5)
    assert found.record["vae"]["hash"] == digest(vae[1].state_dict())
    assert found.record["vae"]["config"]["scaling_factor"] == 0.5
    assert str(vae[0]) not in (tmp_path / "out" / "latents.json").read_text()
    without = load_latents(tmp_path / "out", std=False)
    assert without.std is None
    assert without.x0_std is None


def test_latents_in_half_precision_of_prepared_pictures_without_classes(tmp_path, vae):
    (tmp_path / "grey").mkdir()
    for i in range(3):
        Image.fromarray(picture(16, 24, i, channels=1)).save(tmp_path / "grey" / f"{i}.png")
    prepare(tmp_path / "grey", tmp_path / "half", vae=vae[0], workers=1)  # of one size: nothing is cut
    prepare(tmp_path / "grey", tmp_path / "full", vae=vae[0], dtype="float32", workers=1)
    half, full = load_latents(tmp_path / "half"), load_latents(tmp_path / "full")
    assert read_tensors(tmp_path / "half" / "part-00000-of-00001.safetensors")[0]["mean"].dtype == torch.float16
    assert half.mean.shape == (3, 3, 8, 12)
    assert half.labels is None
    torch.testing.assert_close(half.mean, full.mean, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(half.std, full.std, rtol=1e-3, atol=1e-6)


def test_latents_go_on_and_are_checked(tmp_path, vae):
    where, _ = folder_of(tmp_path, [(16, 16)] * 5)
    out, whole = tmp_path / "out", tmp_path / "whole"

    def call(place=out, **arguments):
        return prepare(where, place, **{"vae": vae[0], "shard": 2, "workers": 1, **arguments})

    call(whole)
    shutil.copytree(whole, out)
    middle = out / "part-00001-of-00003.safetensors"
    middle.unlink()
    with pytest.raises(DataError, match=r"part-00001-of-00003\.safetensors is missing, one of 3 shards.*go on with"):
        load_latents(out)
    call()
    same(whole, out)
    with pytest.raises(OutputError, match=r"another preparation: dtype float16, asked for is float32"):
        call(dtype="float32")
    tensors, metadata = read_tensors(middle)
    write_tensors(middle, {**tensors, "mean": tensors["mean"] + 1}, metadata)
    with pytest.raises(DataError, match=r"is damaged, or of another preparation"):
        load_latents(out)
    load_latents(out, verify=False)
    write_tensors(middle, {**tensors, "mean": tensors["mean"][:, :2]}, metadata)
    with pytest.raises(DataError, match=r"holds .*\[2, 2, 8, 8\].*says .*\[2, 3, 8, 8\]"):
        load_latents(out)
    record = json.loads((out / "latents.json").read_text())
    for change, message in (
        ({"complete": False}, r"are unfinished; go on with reparam prepare"),
        ({"format": 99}, r"has format 99; this reparam reads up to 1"),
        ({"count": 6}, r"does not add up"),
        ({"vae": None}, r"does not say vae"),
    ):
        (out / "latents.json").write_text(json.dumps({**record, **change}))
        with pytest.raises(DataError, match=message):
            load_latents(out)
    with pytest.raises(DataError, match=r"holds no latents\.json"):
        load_latents(where)


def test_a_shard_of_nothing_but_bad_pictures_is_empty(tmp_path, vae):
    where, made = folder_of(tmp_path, [(16, 20)] * 4)
    (where / "ant" / "000.png").write_bytes(b"x")
    done = prepare(where, tmp_path / "out", size=16, vae=vae[0], shard=1, workers=1, skip_bad=True)
    assert (done.count, done.shards, len(done.bad)) == (3, 4, 1)
    found = load_latents(tmp_path / "out")
    assert found.mean.shape == (3, 3, 8, 8)
    assert found.labels.tolist() == [label for label, _, _ in made[1:]]


def test_pictures_that_do_not_suit_the_vae_are_refused(tmp_path, vae):
    where, _ = folder_of(tmp_path, [(16, 16), (16, 17)], classes=("ant",))
    with pytest.raises(DataError, match=r"001\.png \(16×17, where the first is 16×16; --size cuts them\)"):
        prepare(where, tmp_path / "out", vae=vae[0], workers=1)
    with pytest.raises(DataError, match=r"reduces pictures by 2, and 15×15 is not divisible by it.*--size 16"):
        prepare(where, tmp_path / "odd", size=15, vae=vae[0], workers=1)


def test_what_is_no_vae_is_refused(tmp_path, vae, monkeypatch):
    where, _ = folder_of(tmp_path, [(16, 16)] * 2)

    def call(place, **arguments):
        return prepare(where, tmp_path / "out", vae=place, workers=1, **arguments)

    with pytest.raises(DataError, match=r"no VAE in .*expected a local folder with config\.json"):
        call(tmp_path)
    with pytest.raises(UnknownName, match=r"unknown dtype of latents 'float8'"):
        call(vae[0], dtype="float8")
    other = tmp_path / "other"
    shutil.copytree(vae[0], other)
    config = json.loads((other / "config.json").read_text())
    for change, error, message in (
        ({"latents_mean": [0.0] * 3}, Unsupported, r"each channel by its own number"),
        ({"_class_name": "UNet2DModel"}, DataError, r"holds UNet2DModel; expected"),
    ):
        (other / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(error, match=message):
            call(other)
    (other / "config.json").write_text(json.dumps(config))
    (other / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"cannot load the VAE in"):
        call(other)
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(DataError, match=r"pip install 'reparam\[diffusers\]'"):
        call(vae[0])


def test_latents_are_trained_on_as_gaussians_with_shift_and_scale_in_the_spec(tmp_path, vae):
    """From the command line: prepare, train on the folder, and samples back in the VAE's own units."""
    pytest.importorskip("accelerate")
    import reparam as rp
    from reparam.cli import main
    from reparam.data import load_data
    from reparam.spec import read_spec

    where, _ = folder_of(tmp_path, [(16, 16)] * 12)
    place = tmp_path / "latents"
    told = ["prepare", str(where), "--out", str(place), "--vae", str(vae[0]), "--dtype", "float32", "--workers", "1"]
    assert main(told) == 0
    data, raw = load_data({"name": "latents", "path": str(place), "holdout": 0.2}), load_latents(place)
    kept = [int((raw.x0 == x).flatten(1).all(1).nonzero()) for x in data.train]
    torch.testing.assert_close(data.spread, raw.std[kept] * raw.scale)
    torch.testing.assert_close(data.original(data.train), raw.mean[kept])
    network = "{name: unet, widths: [32, 32]}"
    more = ["train.steps=2", "train.batch=4", "sample.n=2", "sample.steps=2", "data.holdout=0.2", f"network={network}"]
    options = [word for setting in more for word in ("--set", setting)]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{{data: '{place}', network: unet, target: velocity, time: 1000t}}")
    run = tmp_path / "run"
    assert main(["train", str(recipe), "--out", str(run), "--tracker", "none", *options]) == 0
    record = read_spec(run / "model.safetensors").data
    assert record["normalised_by"] == {"mean": raw.shift, "std": 1 / raw.scale}
    assert record["vae"]["hash"] == raw.record["vae"]["hash"]
    assert main(["sample", str(run), "--n", "2", "--steps", "2", "--out", str(tmp_path / "z.npz")]) == 0
    assert np.load(tmp_path / "z.npz")["x"].shape == (2, *data.shape)
    assert rp.load(run / "model.safetensors").data["vae"] == record["vae"]
