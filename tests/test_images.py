"""Pictures from every source that is read, and every way in which they can be unusable."""

import io
import json
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from reparam.data.images import load_images, memory
from reparam.errors import DataError, UnknownName

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")


def noise(n=6, height=8, width=10, channels=3, seed=0):
    shape = (n, height, width, channels) if channels else (n, height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(x, kind="PNG", **options):
    file = io.BytesIO()
    (Image.fromarray(x) if isinstance(x, np.ndarray) else x).save(file, kind, **options)
    return file.getvalue()


def write(folder, files):
    """Files by name, as bytes or as pictures that become PNG."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else encoded(content))
    return str(folder)


def zipped(path, files, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content if isinstance(content, bytes) else encoded(content))
    return str(path)


def numbered(x, form="{}.png"):
    return {form.format(i): one for i, one in enumerate(x)}


def chw(x):
    """[N, H, W(, C)] as the tensor [N, C, H, W] that should come out."""
    return torch.from_numpy(x[:, None] if x.ndim == 3 else np.moveaxis(x, 3, 1).copy())


def same(found, x):
    return found.pixels.dtype == torch.uint8 and torch.equal(found.pixels, chw(x))


def message(*arguments, error=DataError, **options):
    with pytest.raises(error) as caught:
        load_images(*arguments, **options)
    return str(caught.value)


# Folders and archives


def test_a_folder_of_class_folders(tmp_path):
    x = noise()
    names = ["dog/1.png", "cat/b.PNG", "cat/a.png", "dog/deep/0.png", "ant/x.png", "ant/y.png"]
    path = write(tmp_path / "pets", dict(zip(names, x, strict=True)))
    write(tmp_path / "pets", {".hidden/a.png": b"", ".DS_Store": b"", "cat/Thumbs.db": b"", "__MACOSX/._a.png": b""})
    found = load_images(path)
    assert found.classes == ("ant", "cat", "dog")
    assert found.labels.dtype == torch.int64
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert same(found, x[[4, 5, 2, 1, 0, 3]])
    assert found.remarks == ()
    ignored = load_images(path, labels="none")
    assert ignored.labels is None
    assert ignored.classes == ()
    assert same(ignored, x[[4, 5, 2, 1, 0, 3]])


def test_a_flat_folder_has_no_labels(tmp_path, monkeypatch):
    x = noise(4, channels=0)
    write(tmp_path / "flat", numbered(x))
    monkeypatch.setenv("HOME", str(tmp_path))
    found = load_images("~/flat")
    assert same(found, x)
    assert found.labels is None
    assert found.classes == found.remarks == ()
    assert load_images("~/flat", classes=3).remarks == ("no labels, though data.classes=3",)


def test_pictures_beside_sub_folders_have_no_labels(tmp_path):
    found = load_images(write(tmp_path, dict(zip(["a/1.png", "b/1.png", "c.png"], noise(3), strict=True))))
    assert found.labels is None
    assert found.remarks == ("no labels: 1 of 3 pictures lie beside the sub-folders, not in one of them",)


def test_one_class_is_remarked_on_and_splits_are_no_classes(tmp_path):
    one = load_images(write(tmp_path / "one", numbered(noise(2), "only/{}.png")))
    assert one.classes == ("only",)
    assert one.remarks == ("all pictures lie in one sub-folder, only: one class",)
    path = write(tmp_path / "splits", dict(zip(["train/a/1.png", "val/a/1.png"], noise(2), strict=True)))
    said = message(path)
    assert "train, val: splits of a data set" in said
    assert "--set data.path=FOLDER/val" in said
    assert load_images(path, labels="none").labels is None


def test_names_are_only_names(tmp_path):
    x = noise(4)
    names = ["<b>x&.png", "größe 日本.png", "new\nline.png", "\x1b[31mred.png"]
    path = write(tmp_path / "weird", {f"<i>é/{name}": one for name, one in zip(names, x, strict=True)})
    found = load_images(path)
    assert found.classes == ("<i>é",)
    assert same(found, x[[names.index(name) for name in sorted(names)]])
    for name in names:
        write(tmp_path / "broken", {name: b"no picture"})
    said = message(str(tmp_path / "broken"))
    assert "<b>x&.png" in said
    assert "größe 日本.png" in said
    assert r"new\nline.png" in said
    assert r"\x1b[31mred.png" in said
    assert said.isprintable()


def test_links_are_followed_but_not_in_circles(tmp_path):
    x = noise(2)
    write(tmp_path / "elsewhere", numbered(x))
    path = tmp_path / "links"
    path.mkdir()
    (path / "cat").symlink_to(tmp_path / "elsewhere")
    found = load_images(str(path))
    assert found.classes == ("cat",)
    assert same(found, x)
    (path / "gone.png").symlink_to(tmp_path / "nowhere")
    assert "gone.png (broken: No such file or directory)" in message(str(path))
    (path / "up").symlink_to(path)
    assert "a link in it leads back" in message(str(path))


@pytest.mark.parametrize("top", ["", "data/", "/abs/../"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive(tmp_path, top, method):
    x = noise(4)
    names = ["cat/1.png", "cat/2.png", "dog\\1.png", "dog/2.png"]
    files = {top + name: one for name, one in zip(names, x, strict=True)}
    path = zipped(tmp_path / "x.ZIP", {**files, "__MACOSX/cat/._1.png": b"", top + ".DS_Store": b""}, method)
    before = sorted(tmp_path.rglob("*"))
    found = load_images(path)
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert same(found, x)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_common_folder_of_an_archive_is_no_class(tmp_path):
    x = noise(3)
    found = load_images(zipped(tmp_path / "x.zip", numbered(x, "photos/{}.png")))
    assert found.labels is None
    assert same(found, x)
    files = {**numbered(x, "photos/{}.png"), "photos/a.txt": b"?", "readme.md": b"?"}
    said = message(zipped(tmp_path / "y.zip", files))
    assert "2 of 5 files" in said
    assert "photos/a.txt (not a picture), readme.md (not a picture)" in said


def lying(path, field, value):
    """Change a field of every entry in an archive's directory: 8 the flags, 24 the unpacked size."""
    raw = bytearray(Path(path).read_bytes())
    at = raw.find(b"PK\x01\x02")
    while at >= 0:
        struct.pack_into("<H" if field == 8 else "<I", raw, at + field, value)
        at = raw.find(b"PK\x01\x02", at + 4)
    Path(path).write_bytes(raw)
    return path


def test_a_zip_bomb_is_refused_unread(tmp_path):
    path = lying(zipped(tmp_path / "x.zip", numbered(noise(2))), 24, 3 * 10**9)
    said = message(path, skip_bad=True)
    assert "would unpack to 5.59 GiB: a zip bomb" in said
    assert "--set data.path=FOLDER" in said


def test_declared_sizes_are_not_believed(tmp_path):
    # Declared far smaller than it is: no more than that is unpacked, and the checksum then fails.
    x = np.zeros((3, 8, 10, 3), dtype=np.uint8)
    files = {**numbered(x), "bomb.png": bytes(10**6)}
    path = zipped(tmp_path / "x.zip", files, zipfile.ZIP_DEFLATED)
    said = message(lying(path, 24, 20))
    assert "4 of 4 files" in said
    assert "bomb.png (broken: Bad CRC-32" in said


def test_an_encrypted_or_broken_archive(tmp_path):
    said = message(lying(zipped(tmp_path / "x.zip", numbered(noise(2))), 8, 1))
    assert "is encrypted (2 of its 2 files)" in said
    assert "without a password" in said
    (tmp_path / "y.zip").write_bytes(b"not an archive")
    assert "y.zip: File is not a zip file" in message(str(tmp_path / "y.zip"))


def test_nothing_to_read(tmp_path):
    empty = message(str(tmp_path))
    assert "holds no pictures; looked for .png, .jpg" in empty
    assert "sub-folders too" in empty
    (tmp_path / "a.csv").write_text("1")
    assert "1 other file, such as a.csv" in message(str(tmp_path))
    neither = message(str(tmp_path / "a.csv"))
    for kind in ("folder of pictures", ".parquet", ".zip", ".npz", "data.path"):
        assert kind in neither
    assert "no file or folder" in message(str(tmp_path / "gone"))
    assert "no path is given" in message("")
    assert "no file or folder a\\x00b" in message("a\0b")
    assert "cannot look at ~nobody-of-this-name/x" in message("~nobody-of-this-name/x")
    write(tmp_path, {"one.png": noise(1)[0]})
    assert "is one picture" in message(str(tmp_path / "one.png"))
    assert "1 picture to use; at least 2 are needed" in message(str(tmp_path), skip_bad=True)


# Unusable files


@pytest.fixture
def damaged(tmp_path):
    """Four good pictures among six bad files."""
    x = noise(4, 40, 40)
    jpeg = encoded(noise(1, 40, 40)[0], "JPEG")
    frames = [Image.fromarray(one) for one in noise(3, 40, 40)]
    bad = {
        "a.txt": b"hello",
        "text.png": b"hello",
        "cut.jpg": jpeg[: len(jpeg) * 2 // 3],
        "cut.png": encoded(x[0])[:-500],
        "empty.png": b"",
        "moves.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }
    return write(tmp_path / "damaged", {**numbered(x, "{}0.png"), **bad}), x


def test_bad_files_are_named_with_reasons(damaged):
    said = message(damaged[0])
    assert "6 of 10 files cannot be used" in said
    assert "a.txt (not a picture)" in said
    assert "cut.jpg (truncated)" in said
    assert "cut.png (truncated)" in said
    assert "empty.png (empty file)" in said
    assert "moves.gif (3 frames, a picture has one) and 1 more" in said
    assert "--skip-bad (data.skip_bad: true)" in said


def test_bad_files_can_be_skipped_and_are_counted(damaged):
    path, x = damaged
    found = load_images(path, skip_bad=True)
    assert same(found, x)
    (remark,) = found.remarks
    assert remark.startswith("6 files skipped: a.txt (not a picture), cut.jpg (truncated)")
    assert remark.endswith("and 1 more")


def test_labels_stay_with_their_pictures_when_some_are_skipped(tmp_path):
    x = noise(4)
    files = dict(zip(["a/1.png", "a/3.png", "b/1.png", "b/3.png"], x, strict=True))
    found = load_images(write(tmp_path, {**files, "a/2.png": b"?", "b/0.png": b"?"}), skip_bad=True)
    assert same(found, x)
    assert found.labels.tolist() == [0, 0, 1, 1]


def test_nothing_left(tmp_path):
    path = write(tmp_path, {"a.png": b"?", "b.png": b"?"})
    assert "none of 2 files can be used: a.png (not a picture that Pillow can read)" in message(path, skip_bad=True)


def test_a_picture_that_is_a_bomb(tmp_path):
    raw = bytearray(encoded(np.zeros((1, 1), dtype=np.uint8)))
    struct.pack_into(">II", raw, 16, 40_000, 40_000)
    struct.pack_into(">I", raw, 29, zlib.crc32(raw[12:29]))
    said = message(write(tmp_path, {**numbered(noise(2)), "big.png": bytes(raw)}))
    assert "big.png (a decompression bomb, it seems: 1,600,000,000 pixels" in said


def test_one_frame_is_no_animation(tmp_path):
    x = np.repeat(noise(1, 8, 10, 0), 2, axis=0)
    found = load_images(write(tmp_path, {"a.gif": encoded(x[0], "GIF"), "b.tif": encoded(x[1], "TIFF")}))
    assert same(found, x)


def test_the_previews_in_a_cameras_files_are_no_animation(tmp_path):
    first, second = (Image.fromarray(one) for one in noise(2, 16, 24))
    for name in ("a.jpg", "b.jpg"):
        first.save(tmp_path / name, "MPO", save_all=True, append_images=[second])
    expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"))
    assert same(load_images(str(tmp_path)), np.stack([expected] * 2))


# Sizes


def test_differing_sizes(tmp_path):
    files = {**numbered(noise(3, 8, 10), "a{}.png"), **numbered(noise(2, 20, 6), "b{}.png"), "c.png": noise(1, 4, 4)[0]}
    path = write(tmp_path, files)
    said = message(path)
    assert "3 different sizes: smallest 4×4, largest 20×6, most frequent 8×10 (3 of 6)" in said
    assert "--set data.size=64 --set data.resize=crop" in said
    assert "--set data.resize=squash" in said
    assert "--set data.size=[8,10]" in message(path, size=[8, 10])
    write(tmp_path, {"z.txt": b"?"})
    assert "Besides, z.txt (not a picture) cannot be used (--skip-bad" in message(path)
    found = load_images(path, size=16, resize="crop", skip_bad=True)
    assert list(found.pixels.shape) == [6, 3, 16, 16]
    assert "resized from 3 different sizes" in found.remarks
    assert "6 of 6 were smaller than 16×16 and enlarged" in found.remarks


def test_one_size_that_is_not_the_one_asked_for(tmp_path):
    x = noise(3)
    path = write(tmp_path, numbered(x))
    said = message(path, size=16)
    assert "are 8×10; data.size asks for 16×16" in said
    assert "--set data.size=16 --set data.resize=crop" in said
    assert same(load_images(path, size=[8, 10]), x)
    for resize in ("crop", "squash"):
        already = load_images(path, size=[8, 10], resize=resize)
        assert same(already, x)
        assert already.remarks == ()


def test_crop_and_squash(tmp_path):
    # Left half dark, right half bright, with a mark at each end.
    x = np.zeros((2, 8, 16), dtype=np.uint8)
    x[:, :, 8:] = 200
    x[:, :, :2], x[:, :, -2:] = 255, 255
    path = write(tmp_path, numbered(x))
    crop = load_images(path, size=4, resize="crop")
    assert crop.pixels[0, 0].tolist() == [[0, 0, 200, 200]] * 4
    assert crop.remarks == ("resized from 8×16",)
    squash = load_images(path, size=[4, 8], resize="squash")
    assert squash.pixels[0, 0].tolist() == [[255, 0, 0, 0, 200, 200, 200, 255]] * 4
    # Cutting alone copies pixels.
    odd = noise(2, 9, 16)
    path = write(tmp_path / "odd", numbered(odd))
    assert same(load_images(path, size=9, resize="crop"), odd[:, :, 3:12])


def test_scaling_by_other_factors_is_pillows(tmp_path):
    x = noise(2, 20, 30)
    path = write(tmp_path, numbered(x))
    down = np.asarray(Image.fromarray(x[1]).resize((12, 8), Image.Resampling.LANCZOS))
    assert np.array_equal(load_images(path, size=[8, 12], resize="squash").pixels[1].permute(1, 2, 0).numpy(), down)
    up = np.asarray(Image.fromarray(x[1]).resize((60, 40), Image.Resampling.BICUBIC))
    assert np.array_equal(load_images(path, size=[40, 60], resize="squash").pixels[1].permute(1, 2, 0).numpy(), up)


@pytest.mark.parametrize("size", [[8], [8, 0], 0, -3, 2.5, "64", True, [8, 8, 3]])
def test_a_size_is_one_or_two_sides(tmp_path, size):
    assert "--set data.size=64 or --set data.size=[48,64]" in message(str(tmp_path), size=size)


def test_options_are_checked_before_anything_is_read(tmp_path):
    gone = str(tmp_path / "gone")
    assert "Did you mean 'crop'" in message(gone, size=8, resize="crops", error=UnknownName)
    assert "Known: grey, rgb" in message(gone, colour="gray!", error=UnknownName)
    assert "--set data.size=64" in message(gone, resize="crop")
    assert "data.limit" in message(gone, limit=1)
    assert "data.classes" in message(gone, classes=0)


def test_pictures_larger_than_memory(tmp_path, monkeypatch):
    path = write(tmp_path, numbered(noise(4)))
    monkeypatch.setattr(memory, "available", lambda: 900)
    said = message(path)
    assert "4 pictures of 8×10 with 3 channels take" in said
    assert "--set data.size=64 --set data.resize=crop" in said
    assert "--set data.limit=2" in said
    monkeypatch.setattr(memory, "available", lambda: 960)
    assert len(load_images(path).pixels) == 4
    assert "with 1 channel take" in message(path, size=10_000, resize="crop")
    monkeypatch.setattr(memory, "available", lambda: None)
    assert len(load_images(path).pixels) == 4


def test_a_limit_takes_an_even_spread_before_decoding(tmp_path):
    x = noise(10)
    files = {f"{'ab'[i >= 5]}/{i}.png": one for i, one in enumerate(x)}
    files["a/1.png"] = b"never looked at"
    found = load_images(write(tmp_path, files), limit=4)
    assert same(found, x[[0, 2, 5, 7]])
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.remarks == ("4 of 10 pictures taken, evenly spread (data.limit)",)


# Colour


def test_grey_only_if_all_are_grey(tmp_path):
    grey, rgb = noise(2, channels=0), noise(2)
    flat = write(tmp_path / "grey", numbered(grey))
    assert load_images(flat).pixels.shape[1] == 1
    as_rgb = load_images(flat, colour="rgb")
    assert same(as_rgb, np.repeat(grey[..., None], 3, axis=3))
    assert as_rgb.remarks == ("2 of 2 were grey, repeated into three channels",)
    mixed = write(tmp_path / "mixed", {**numbered(grey, "a{}.png"), **numbered(rgb, "b{}.png")})
    both = load_images(mixed)
    assert same(both, np.concatenate([np.repeat(grey[..., None], 3, axis=3), rgb]))
    assert both.remarks == ("2 of 4 were grey, repeated into three channels",)
    made_grey = load_images(mixed, colour="grey")
    assert torch.equal(made_grey.pixels[:2], chw(grey))
    assert np.array_equal(made_grey.pixels[2, 0].numpy(), np.asarray(Image.fromarray(rgb[0]).convert("L")))
    assert made_grey.remarks == ("2 of 4 were in colour, made grey",)


def test_transparency_is_laid_over_white(tmp_path):
    x = np.zeros((2, 4, 4, 4), dtype=np.uint8)
    x[..., 0], x[..., 3] = 100, 255
    opaque = load_images(write(tmp_path / "opaque", numbered(x)))
    assert opaque.pixels[0, :, 0, 0].tolist() == [100, 0, 0]
    assert opaque.remarks == ()
    x[0, 0, 0, 3], x[0, 0, 1, 3] = 0, 128
    found = load_images(write(tmp_path / "rgba", numbered(x)))
    assert found.pixels[0, :, 0, 0].tolist() == [255, 255, 255]
    assert found.pixels[0, :, 0, 1].tolist() == [177, 127, 127]
    assert found.pixels[0, :, 0, 2].tolist() == [100, 0, 0]
    assert found.remarks == ("1 of 2 had an alpha channel, laid over white",)
    la = load_images(write(tmp_path / "la", numbered(x[..., [0, 3]])))
    assert la.pixels[0, 0, 0, :3].tolist() == [255, 177, 100]
    assert la.pixels.shape[1] == 1


def test_palettes(tmp_path):
    im = Image.new("P", (4, 4), 1)
    im.putpalette([255, 0, 0, 0, 0, 200, 9, 9, 9])
    im.putpixel((0, 0), 0)
    path = write(tmp_path / "p", {"a.png": encoded(im), "b.png": encoded(im, transparency=0)})
    found = load_images(path)
    assert found.pixels[0, :, 0, 0].tolist() == [255, 0, 0]
    assert found.pixels[1, :, 0, 0].tolist() == [255, 255, 255]
    assert found.pixels[1, :, 1, 1].tolist() == [0, 0, 200]
    assert found.remarks == ("1 of 2 had an alpha channel, laid over white",)
    im.putpalette([7, 7, 7, 60, 60, 60])
    grey = load_images(write(tmp_path / "grey", {"a.png": encoded(im), "b.tif": encoded(im.convert("PA"), "TIFF")}))
    assert grey.pixels.shape[1] == 1
    assert grey.pixels[:, 0, 0, :2].tolist() == [[7, 60], [7, 60]]


def test_one_bit(tmp_path):
    x = noise(2, channels=0) > 127
    found = load_images(write(tmp_path, {f"{i}.png": encoded(Image.fromarray(one)) for i, one in enumerate(x)}))
    assert same(found, x.astype(np.uint8) * 255)


def test_16_bits(tmp_path):
    x = np.array([[0, 128, 129, 257], [1000, 32768, 65406, 65407], [65535, 1, 2, 3]], dtype=np.uint16)
    expected = torch.from_numpy(np.round(x / 257).astype(np.uint8))
    wide = Image.fromarray(x.astype(np.int32))
    files = {
        "a.png": encoded(x),
        "b.tif": encoded(x, "TIFF"),
        "c.tif": encoded(wide, "TIFF"),
        "d.pgm": encoded(wide, "PPM"),
    }
    found = load_images(write(tmp_path / "deep", files))
    assert all(torch.equal(one[0], expected) for one in found.pixels)
    assert found.remarks == ("4 of 4 had 16 bits a pixel, divided by 257 to 8",)
    eight = Image.fromarray(np.arange(12, dtype=np.int32).reshape(3, 4) * 20)
    plain = load_images(write(tmp_path / "eight", {f"{i}.tif": encoded(eight, "TIFF") for i in "ab"}))
    assert plain.pixels[0, 0, 2].tolist() == [160, 180, 200, 220]
    assert plain.remarks == ()


def test_numbers_that_are_no_pixels(tmp_path):
    real = Image.fromarray(np.ones((3, 4), dtype=np.float32))
    wide = Image.fromarray(np.full((3, 4), 70_000, dtype=np.int32))
    said = message(write(tmp_path, {"f.tif": encoded(real, "TIFF"), "i.tif": encoded(wide, "TIFF")}))
    assert "f.tif (floating point numbers" in said
    assert "i.tif (32-bit numbers from 70000 to 70000" in said


def test_other_colour_spaces(tmp_path):
    rgb = Image.new("RGB", (6, 6), (200, 40, 90))
    files = {
        "a.jpg": encoded(rgb.convert("CMYK"), "JPEG", quality=100),
        "b.tif": encoded(rgb.convert("CMYK"), "TIFF"),
        "c.tif": encoded(rgb.convert("YCbCr"), "TIFF"),
    }
    found = load_images(write(tmp_path, files))
    off = (found.pixels.int() - torch.tensor([200, 40, 90])[None, :, None, None]).abs()
    assert int(off.max()) <= 4
    assert found.remarks == ("2 CMYK pictures converted to RGB", "1 YCbCr picture converted to RGB")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_exif_orientation(tmp_path, kind):
    x = np.kron(noise(1, 2, 3, 0)[0], np.ones((8, 8), dtype=np.uint8))  # blocks of a JPEG: nearly exact
    files, upright = {}, []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files[f"{orientation}.{kind.lower()}"] = raw = encoded(x, kind, exif=exif)
        upright.append(np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(raw)))))
    assert {one.shape for one in upright} == {(16, 24), (24, 16)}
    standing = {name: raw for i, (name, raw) in enumerate(files.items()) if upright[i].shape == (24, 16)}
    found = load_images(write(tmp_path / "standing", standing))
    assert same(found, np.stack([one for one in upright if one.shape == (24, 16)]))
    if kind != "TIFF":  # Pillow itself turns those
        assert found.remarks == ("4 of 4 turned upright as their EXIF orientation says",)
    assert "2 different sizes: smallest 16×24, largest 24×16" in message(write(tmp_path / "all", files))


def test_exif_that_cannot_be_read_does_not_matter(tmp_path):
    x = noise(1)[0]
    files = {f"{i}.png": encoded(x, exif=b"Exif\x00\x00rubbish rubbish") for i in range(2)}
    assert same(load_images(write(tmp_path, files)), np.stack([x, x]))


def test_many_pictures_keep_their_order(tmp_path):
    x = noise(200, 4, 4)
    assert same(load_images(write(tmp_path, numbered(x, "{:03}.png"))), x)


# Parquet


def table(path, x, stored="struct", paths=None, features=None, column="image", **columns):
    """A Parquet file of pictures (or bytes, or None) as PNG, in row groups of four."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    raw = [one if isinstance(one, bytes) or one is None else encoded(one) for one in x]
    if stored == "struct":
        raw = [{"bytes": b, "path": p} for b, p in zip(raw, paths or [None] * len(raw), strict=True)]
        stored = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    made = arrow.table({column: arrow.array(raw, stored), **columns})
    if features is not None:
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(made, path, row_group_size=4)
    return str(path)


@pytest.mark.parametrize("stored", ["struct", "binary", "large_binary"])
def test_parquet_as_on_the_hub(tmp_path, stored):
    x = noise(10)
    label = [0, 1, 2, 1, 0, 2, 2, 1, 0, 0]
    path = table(tmp_path / "x.parquet", x, stored, label=label, caption=["b", "a"] * 5)
    found = load_images(path)
    assert same(found, x)
    assert found.labels.tolist() == label
    assert found.labels.dtype == torch.int64
    assert found.classes == ("0", "1", "2")
    assert found.remarks == ()
    few = load_images(path, limit=3, classes=5)
    assert same(few, x[[0, 3, 6]])
    assert few.labels.tolist() == [0, 1, 2]
    assert few.classes == ("0", "1", "2", "3", "4")
    assert load_images(path, labels="none").labels is None
    by_text = load_images(path, labels="caption")
    assert by_text.classes == ("a", "b")
    assert by_text.labels.tolist() == [1, 0] * 5


def test_class_names_of_the_hub(tmp_path):
    features = {"pic": {"_type": "Image"}, "species": {"_type": "ClassLabel", "names": ["cat", "dog", "emu"]}}
    x = noise(4)
    columns = {"species": [2, 0, 0, 2], "number": [7, 8, 9, 10], "mask": [b"?"] * 4}
    path = table(tmp_path / "x.parquet", x, features=features, column="pic", **columns)
    found = load_images(path)
    assert same(found, x)
    assert found.labels.tolist() == [2, 0, 0, 2]
    assert found.classes == ("cat", "dog", "emu")
    path = table(tmp_path / "y.parquet", x, features=features, column="pic", species=[2, 0, 0, 3])
    assert "run up to 3, but the file names only 3 classes" in message(path)


def test_metadata_that_is_not_the_hubs_is_ignored(tmp_path):
    for i, features in enumerate([[], {"label": 3}, {"label": {"names": "cat"}}]):
        path = table(tmp_path / f"{i}.parquet", noise(2), features=features, label=[0, 1])
        assert load_images(path).classes == ("0", "1")


def test_a_folder_of_shards(tmp_path):
    x = noise(10)
    for i, rows in enumerate([slice(0, 5), slice(5, 6), slice(6, 10)]):
        name = f"data/train-{i:05}-of-00003.parquet"
        table(tmp_path / "hub" / name, x[rows], label=list(range(10))[rows])
    found = load_images(str(tmp_path / "hub"))
    assert same(found, x)
    assert found.labels.tolist() == list(range(10))
    assert found.remarks == ()
    assert same(load_images(str(tmp_path / "hub"), limit=5), x[::2])
    (tmp_path / "hub/data/train-00001-of-00003.parquet").unlink()
    assert load_images(str(tmp_path / "hub")).remarks == ("2 of 3 shards are there",)
    table(tmp_path / "hub/data/train-00001-of-00003.parquet", x, label=["a"] * 10)
    said = message(str(tmp_path / "hub"))
    assert "column 'label' is not the same in all shards: string in train-00001-of-00003.parquet" in said
    table(tmp_path / "hub/data/test-00000-of-00001.parquet", x, label=[0] * 10)
    said = message(str(tmp_path / "hub"))
    assert "holds the splits test, train" in said
    assert "--set data.path=" in said


def test_columns_of_pictures(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    path = table(tmp_path / "x.parquet", [b"?"] * 2, "string", text=[1.5, 2.5])
    said = message(path)
    assert "no column of pictures" in said
    assert "image (string), text (double)" in said
    x = noise(2)
    second = arrow.array([encoded(one) for one in x], "binary")
    path = table(tmp_path / "y.parquet", x[::-1], left=second, label=[0, 1])
    assert "picture columns image, left; say which: --set data.column=image" in message(path)
    assert same(load_images(path, column="left"), x)
    assert "'label' (data.column)" in message(path, column="label")
    assert "does not exist" in message(path, column="lable")


def test_columns_of_labels(tmp_path):
    x = noise(3)
    path = table(tmp_path / "x.parquet", x, fine_label=[0, 1, 2], coarse_label=[0, 0, 1], score=[0.5, 1.0, 1.5])
    assert "--set data.labels=fine_label" in message(path)
    assert load_images(path, labels="coarse_label").labels.tolist() == [0, 0, 1]
    assert "has no column 'fine'" in message(path, labels="fine")
    said = message(path, labels="score")
    assert "holds double; expected whole numbers or text" in said
    cases = {
        "-1 to 1: 1 of 3 pictures are unlabelled": [-1, 0, 1],
        "is empty in 1 of 3 rows": [0, None, 1],
        "from 0 to 1000000 with only 3 different ones": [0, 5, 10**6],
    }
    for i, (expected, label) in enumerate(cases.items()):
        path = table(tmp_path / f"{i}.parquet", x, label=label)
        said = message(path)
        assert expected in said
        assert "--set data.labels=none" in said
        assert same(load_images(path, labels="none"), x)


def test_more_classes_than_declared(tmp_path):
    label = list(range(7))
    said = message(table(tmp_path / "x.parquet", noise(7), label=label), classes=3)
    assert "has 7 classes (0, 1, 2, 3, 4, …), and data.classes=3" in said
    assert "--set data.classes=7" in said
    path = write(tmp_path / "folder", dict(zip(["cat/1.png", "dog/1.png"], noise(2), strict=True)))
    assert "2 classes (cat, dog)" in message(path, classes=1)
    assert load_images(path, classes=4).classes == ("cat", "dog", "2", "3")


def test_parquet_of_paths_only(tmp_path):
    path = table(tmp_path / "x.parquet", [None] * 3, paths=["a.png", "b.png", "c.png"])
    said = message(path, skip_bad=True)
    assert "holds only the paths of pictures" in said
    assert "--set data.path=FOLDER" in said


def test_bad_rows(tmp_path):
    x = noise(6)
    content = [*x[:2], b"?", None, *x[2:]]
    path = table(tmp_path / "x.parquet", content, paths=[f"{i}.png" for i in range(8)], label=list(range(8)))
    assert "2 of 8 rows cannot be used: row 2 (2.png) (not a picture that Pillow can read), row 3" in message(path)
    found = load_images(path, skip_bad=True)
    assert same(found, x)
    assert found.labels.tolist() == [0, 1, 4, 5, 6, 7]
    assert found.remarks[0].startswith("2 rows skipped: row 2")


def test_a_broken_parquet_file(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"not a table")
    assert "x.parquet" in message(str(tmp_path / "x.parquet"))
    assert "Expected a Parquet file" in message(str(tmp_path / "x.parquet"))
    path = tmp_path / "y.parquet"
    table(path, noise(20, 30, 30))
    raw = bytearray(path.read_bytes())
    raw[4:3000] = bytes(2996)
    path.write_bytes(raw)
    assert "cannot read" in message(str(path))


@pytest.mark.parametrize(("module", "name"), [("PIL", "x"), ("pyarrow", "x.parquet")])
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, module, name):
    path = table(tmp_path / "x.parquet", noise(2))
    monkeypatch.setitem(sys.modules, module, None)
    said = message(path)
    assert "pip install 'reparam[images]'" in said
    assert ("Pillow" if module == "PIL" else "pyarrow") in said


# Arrays


LAYOUTS = {
    "N H W": (noise(5, channels=0), lambda x: x),
    "N H W 3": (noise(5), lambda x: x),
    "N H W 1": (noise(5, channels=1), lambda x: x),
    "N 3 H W": (noise(5), lambda x: np.moveaxis(x, 3, 1)),
    "N 1 H W": (noise(5, channels=1), lambda x: np.moveaxis(x, 3, 1)),
    "N 4 4 3": (noise(5, 4, 4), lambda x: x),
    "N 3 4 4": (noise(5, 4, 4), lambda x: np.moveaxis(x, 3, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_in_every_layout(tmp_path, layout):
    x, stored = LAYOUTS[layout]
    np.savez(tmp_path / "x.npz", images=stored(x), y=[0, 1, 2, 1, 0], other=np.zeros(3))
    found = load_images(str(tmp_path / "x.npz"))
    assert same(found, x)
    assert found.labels.tolist() == [0, 1, 2, 1, 0]
    assert found.classes == ("0", "1", "2")
    np.save(tmp_path / "x.npy", stored(x))
    bare = load_images(str(tmp_path / "x.npy"), limit=3)
    assert same(bare, x[[0, 1, 3]])
    assert bare.labels is None


def test_arrays_go_through_the_same_steps(tmp_path):
    x = np.full((3, 8, 8, 4), 100, dtype=np.uint8)
    x[..., 3] = 255
    x[0, ..., 3] = 0
    np.savez_compressed(tmp_path / "x.npz", x)
    found = load_images(str(tmp_path / "x.npz"), size=4, resize="crop", colour="grey")
    assert found.pixels[:, 0, 0, 0].tolist() == [255, 100, 100]
    assert list(found.pixels.shape) == [3, 1, 4, 4]
    assert "1 of 3 had an alpha channel, laid over white" in found.remarks


BAD_ARRAYS = {
    "floats": ({"x": noise(3) / 255}, ("x is float64 [3, 8, 10, 3]", "0…255", "data.name: array takes floats")),
    "integers": ({"x": noise(3).astype(int)}, ("x is int64", "x.astype(np.uint8)")),
    "two axes": ({"x": noise(3).reshape(3, -1)}, ("holds no pictures: x (uint8 [3, 240])", "[N, H, W]")),
    "two arrays": ({"a": noise(3), "b": noise(2)}, ("a (uint8 [3, 8, 10, 3]), b", "--set data.column=a")),
    "no channels": ({"x": noise(3, channels=5)}, ("without an axis of 1, 3 or 4 channels",)),
    "either axis": ({"x": noise(3, 3, 9, 3)}, ("[3, 3, 9, 3]: the channels may be the second axis or the last",)),
    "one picture": ({"x": noise(1)[0]}, ("one colour picture, or 8 grey ones",)),
    "empty": ({"x": noise(3)[:0]}, ("x is uint8 [0, 8, 10, 3]",)),
    "one only": ({"x": noise(1)}, ("1 picture to use; at least 2",)),
    "two labels": ({"x": noise(3), "y": [0, 1, 1], "label": [0, 0, 1]}, ("--set data.labels=y",)),
    "unlabelled": ({"x": noise(3), "y": [0, 1, -1]}, ("1 of 3 pictures are unlabelled", "--set data.labels=none")),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays(tmp_path, case):
    arrays, expected = BAD_ARRAYS[case]
    np.savez(tmp_path / "x.npz", **arrays)
    said = message(str(tmp_path / "x.npz"))
    for part in (*expected, "x.npz"):
        assert part in said


def test_arrays_by_name(tmp_path):
    x = noise(4)
    path = str(tmp_path / "x.npz")
    np.savez(path, x_train=x, x_test=x[:2], y_train=[0, 1, 1, 0], y_test=[0, 1], name=["b", "a", "b", "b"])
    found = load_images(path, column="x_train", labels="y_train")
    assert same(found, x)
    assert found.labels.tolist() == [0, 1, 1, 0]
    assert load_images(path, column="x_train", labels="name").classes == ("a", "b")
    assert "shape [4]" in message(path, column="x_train", labels="y_test")
    assert "no array 'z' (data.labels)" in message(path, column="x_train", labels="z")
    assert "no array 'z' (data.column)" in message(path, column="z")
    np.save(tmp_path / "x.npy", x)
    assert "without a name" in message(str(tmp_path / "x.npy"), column="x")
    folder = write(tmp_path / "folder", numbered(x))
    assert "data.labels=y names a column" in message(folder, labels="y")
    assert "data.column=x names a column" in message(folder, column="x")


def test_arrays_are_never_unpickled_nor_larger_than_memory(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", x=np.array([{"a": 1}] * 4, dtype=object))
    assert "holds no pictures: x (object [4])" in message(str(tmp_path / "x.npz"))
    np.save(tmp_path / "x.npy", np.array([{"a": 1}] * 4, dtype=object))
    assert "not pickled" in message(str(tmp_path / "x.npy"))
    (tmp_path / "y.npz").write_bytes(b"not an archive")
    assert "cannot read" in message(str(tmp_path / "y.npz"))
    np.savez_compressed(tmp_path / "damaged.npz", x=noise(4))
    raw = bytearray((tmp_path / "damaged.npz").read_bytes())
    raw[60:200] = bytes(140)
    (tmp_path / "damaged.npz").write_bytes(raw)
    assert "cannot read" in message(str(tmp_path / "damaged.npz"))
    np.savez_compressed(tmp_path / "z.npz", x=np.zeros((100, 50, 50), dtype=np.uint8))
    monkeypatch.setattr(memory, "available", lambda: 200_000)
    said = message(str(tmp_path / "z.npz"))
    assert "array 'x'" in said
    assert "0.238 MiB unpacked" in said
    assert "--set data.limit" in said
