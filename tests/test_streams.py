"""Streaming: the same pictures as in memory, in an order that is a pure function of the position."""

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
import torch

from reparam.data import load_data
from reparam.data.images import load_images, memory
from reparam.data.order import Order, mix
from reparam.data.prefetch import Prefetcher
from reparam.data.streams import open_stream
from reparam.errors import DataError, UnknownName
from reparam.training.draws import Draws

Image = pytest.importorskip("PIL.Image")
arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

N = 44


def pictures(n=N, height=12, width=10, channels=3, seed=0):
    shape = (n, height, width, channels) if channels else (n, height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(x, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(x).save(file, kind)
    return file.getvalue()


def labels(n=N):
    return (np.arange(n) * 7 % 3).tolist()


def names(n=N):
    return [f"class{label}/{i:03}.png" for i, label in enumerate(labels(n))]


def in_folder(path, raw):
    for name, one in zip(names(len(raw)), raw, strict=True):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(one)
    return str(path)


def in_zip(path, raw):
    with zipfile.ZipFile(path, "w") as archive:
        for name, one in zip(names(len(raw)), raw, strict=True):
            archive.writestr(name, one)
    return str(path)


def in_parquet(path, raw, shards=3, group=5):
    """Shards of several row groups, the last group of each shorter than the others."""
    path.mkdir(parents=True, exist_ok=True)
    struct = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    for k, rows in enumerate(np.array_split(np.arange(len(raw)), shards)):
        table = arrow.table(
            {
                "image": arrow.array([{"bytes": raw[i], "path": None} for i in rows], struct),
                "label": [labels(len(raw))[i] for i in rows],
            }
        )
        parquet.write_table(table, path / f"train-{k:05}-of-{shards:05}.parquet", row_group_size=group)
    return str(path)


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def in_tar(path, raw, shards=3, told="cls", suffix="png"):
    path.mkdir(parents=True, exist_ok=True)
    for k, rows in enumerate(np.array_split(np.arange(len(raw)), shards)):
        with tarfile.open(path / f"train-{k:04}.tar", "w") as archive:
            for i in rows:
                add(archive, f"./{i:06}.{suffix}", raw[i])
                if told == "cls":
                    add(archive, f"./{i:06}.cls", str(labels(len(raw))[i]).encode())
                elif told == "json":
                    add(archive, f"./{i:06}.json", json.dumps({"label": f"k{labels(len(raw))[i]}", "w": 3}).encode())
                    add(archive, f"./{i:06}.txt", b"a caption")
    return str(path)


def in_npy(path, raw):
    np.save(path, np.stack([np.asarray(Image.open(io.BytesIO(one))) for one in raw]))
    return f"{path}.npy"


KINDS = {"folder": in_folder, "x.zip": in_zip, "parquet": in_parquet, "tar": in_tar, "array": in_npy}


def both(path, **options):
    """The same data in memory and streamed."""
    return (load_data({"name": "images", "path": path, "stream": how, **options}) for how in (False, True))


# The same pictures


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"size": 8, "resize": "crop", "colour": "grey"}, {"limit": 31, "holdout": 0.3, "seed": 5}]
)
def test_streaming_gives_the_batches_of_training_in_memory(tmp_path, kind, options):
    path = KINDS[kind](tmp_path / kind, [encoded(x) for x in pictures()])
    here, there = both(path, **options)
    assert there.stream is not None
    assert here.stream is None
    assert there.count == here.count == there.record()["count"] == len(here.train)
    assert there.shape == here.shape
    assert there.classes == here.classes
    assert torch.equal(there.heldout, here.heldout)
    order, draws = Order(3, there.count, there.blocks, there.window), Draws(3, 16, here.count, here.shape)
    for step in range(6):
        index = order(torch.arange(step * 16, step * 16 + 16))
        assert torch.equal(index, draws(step).index)
        streamed, kept = there.batch(index), here.batch(index)
        assert streamed[0].dtype == torch.uint8
        assert torch.equal(streamed[0], kept[0])
        assert (streamed[1] is None and kept[1] is None) or torch.equal(streamed[1], kept[1])
    assert "streamed from disk" in there.preflight()
    assert f"{here.count} training" in there.preflight()


def test_lossy_and_mixed_pictures_are_the_same_too(tmp_path):
    raw = [encoded(x, "JPEG") for x in pictures(20)] + [encoded(x) for x in pictures(12, 20, 30, channels=0)]
    here, there = both(in_folder(tmp_path / "x", raw), size=[6, 9], resize="squash")
    index = torch.arange(here.count)
    assert torch.equal(there.batch(index)[0], here.train)
    assert torch.equal(there.batch(index)[1], here.labels)
    assert there.shape == (3, 6, 9)
    assert any("12 of 32 were grey, repeated" in remark for remark in there.remarks)


def test_a_stream_reads_any_indices_in_the_order_asked_for(tmp_path):
    x = pictures()
    stream = open_stream(in_parquet(tmp_path, [encoded(one) for one in x]), ask())
    index = torch.tensor([43, 0, 7, 7, 12, 1, 43])
    assert torch.equal(stream.read(index), torch.from_numpy(x[index.numpy()]).movedim(3, 1))
    assert stream.blocks == (5, 5, 5, 5, 5, 5, 5, 5, 4)
    part = stream.only(torch.tensor([9, 2, 40]))
    assert torch.equal(part.read(torch.tensor([1, 2])), stream.read(torch.tensor([2, 40])))
    assert part.labels.tolist() == [labels()[i] for i in (9, 2, 40)]


def ask(**options):
    from reparam.data.images import asked

    return asked(**options)


def test_large_sets_hold_a_part_in_memory_and_out(tmp_path, monkeypatch):
    from reparam.data import pictures as module

    x = pictures(240, 4, 4)
    path = in_parquet(tmp_path, [encoded(one) for one in x], shards=4, group=6)
    monkeypatch.setattr(module, "_MOST", 10)
    monkeypatch.setattr(module, "_FEW", 3)
    monkeypatch.setattr("reparam.data.streams.WINDOW", 30)
    data = load_data({"name": "images", "path": path, "stream": True})
    assert len(data.heldout) == len(data.train) == 10
    assert data.count == 230
    assert data.window == 30
    assert sum(data.blocks) == 230
    flat = torch.from_numpy(x).movedim(3, 1).flatten(1)
    where = lambda rows: (rows.flatten(1)[:, None] == flat).all(2).nonzero()[:, 1].tolist()  # noqa: E731
    trained = where(data.batch(torch.arange(230))[0])
    assert trained == sorted(trained)
    assert sorted(trained + where(data.heldout)) == list(range(240))
    assert set(where(data.train)) <= set(trained)
    # What is in memory comes from few blocks, or opening a large set would read all of it.
    assert len({i // 6 for i in where(data.heldout) + where(data.train)}) <= 240 // 6 // 2
    assert any("10 held out, of 24 asked for" in remark for remark in data.remarks)


def test_streaming_by_itself_where_memory_is_short(tmp_path, monkeypatch):
    path = in_folder(tmp_path, [encoded(x) for x in pictures(20)])
    whole = 20 * 12 * 10 * 3
    for free, streamed in ((None, False), (4 * whole, False), (4 * whole - 1, True)):
        monkeypatch.setattr(memory, "total", lambda free=free: free)
        assert (load_data({"name": "images", "path": path}).stream is not None) == streamed
    with pytest.raises(UnknownName, match="auto"):
        load_data({"name": "images", "path": path, "stream": "no"})


def test_the_digest_of_streamed_data_follows_files_options_and_split(tmp_path):
    x = [encoded(one) for one in pictures()]
    path = in_tar(tmp_path / "a", x)
    one = load_data({"name": "images", "path": path, "stream": True})
    assert load_data({"name": "images", "path": in_tar(tmp_path / "b", x), "stream": True}).digest == one.digest
    others = [{"seed": 1}, {"holdout": 0.2}, {"colour": "grey"}, {"limit": 40}, {"labels": "none"}]
    digests = {load_data({"name": "images", "path": path, "stream": True, **other}).digest for other in others}
    digests.add(load_data({"name": "images", "path": in_tar(tmp_path / "c", x[::-1]), "stream": True}).digest)
    assert len(digests | {one.digest}) == len(others) + 2


def test_sizes_and_colours_met_later_are_errors(tmp_path, monkeypatch):
    monkeypatch.setattr("reparam.data.streams._LOOKED_AT", 2)
    raw = [encoded(x) for x in pictures(channels=0)]
    raw[41] = encoded(pictures(1, 5, 5, 0)[0])
    stream = open_stream(in_folder(tmp_path / "sizes", raw), ask())
    with pytest.raises(DataError, match=r"class2/041.png of .* is 5×5, .* 12×10 .*--set data.size=12"):
        stream.read(torch.arange(N))
    raw[41] = encoded(pictures(1)[0])
    path = in_folder(tmp_path / "colours", raw)
    with pytest.raises(DataError, match=r"041.png of .* in colour.*--set data.colour=rgb"):
        open_stream(path, ask()).read(torch.arange(N))
    assert open_stream(path, ask(colour="rgb")).read(torch.arange(N)).shape == (N, 3, 12, 10)


# Tar shards


def test_tar_shards_in_memory(tmp_path):
    x = pictures(10)
    raw = [encoded(one) for one in x]
    expected = torch.from_numpy(x).movedim(3, 1)
    for told, classes in (("cls", ("0", "1", "2")), ("json", ("k0", "k1", "k2")), ("", ())):
        found = load_images(in_tar(tmp_path / f"by {told}", raw, told=told))
        assert torch.equal(found.pixels, expected)
        assert found.classes == classes
        assert found.labels is None if not told else found.labels.tolist() == labels(10)
    captions = load_images(str(tmp_path / "by json"), labels="txt")
    assert captions.classes == ("a caption",)
    assert load_images(str(tmp_path / "by json"), labels="w").labels.tolist() == [3] * 10
    one = load_images(str(tmp_path / "by cls/train-0001.tar"))
    assert torch.equal(one.pixels, expected[4:7])
    with pytest.raises(DataError, match=r"10 of 10 pictures have no label in 'score' .data.labels"):
        load_images(str(tmp_path / "by json"), labels="score")


def test_folders_inside_a_tar_are_classes(tmp_path):
    x = pictures(6)
    with tarfile.open(tmp_path / "pets.tar", "w") as archive:
        for i, one in enumerate(x):
            add(archive, f"pets/{'cat' if i < 3 else 'dog'}/{i}.png", encoded(one))
        add(archive, "pets/.DS_Store", b"?")
    found = load_images(str(tmp_path / "pets.tar"))
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_several_pictures_of_one_key(tmp_path):
    x = pictures(4)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for i, one in enumerate(x):
            add(archive, f"{i}.jpg", encoded(255 - one))
            add(archive, f"{i}.seg.png", encoded(one))
    with pytest.raises(DataError, match=r"0.jpg of .*x.tar has beside it seg.png.*--set data.column=jpg"):
        load_images(str(tmp_path / "x.tar"))
    found = load_images(str(tmp_path / "x.tar"), column="seg.png")
    assert torch.equal(found.pixels, torch.from_numpy(x).movedim(3, 1))


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar"])
def test_compressed_archives_are_refused(tmp_path, name):
    with tarfile.open(tmp_path / name, "w:gz") as archive:
        add(archive, "0.png", encoded(pictures(1)[0]))
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=r"is a compressed archive.*unpack it to a plain \.tar"):
            load_images(str(path))


def test_patterns_of_shards(tmp_path):
    x = pictures(12)
    raw = [encoded(one) for one in x]
    tar, table = in_tar(tmp_path / "tar", raw), in_parquet(tmp_path / "table", raw)
    expected = torch.from_numpy(x).movedim(3, 1)
    assert torch.equal(load_images(tar + "/train-{0001..0002}.tar").pixels, expected[4:])
    assert torch.equal(load_images(tar + "/train-*[01].tar").pixels, expected[:8])
    assert torch.equal(load_images(table + "/*-0000{0..2}-*.parquet").pixels, expected)
    with pytest.raises(DataError, match=r"no file .*train-0003.tar, of the pattern"):
        load_images(tar + "/train-{0000..0004}.tar")
    with pytest.raises(DataError, match="counts 0 files"):
        load_images(tar + "/train-{0004..0000}.tar")
    (tmp_path / "tar/notes.txt").write_text("?")
    with pytest.raises(DataError, match=r"stands for \.tar, \.txt files"):
        load_images(tar + "/*")


# What is broken


def cut(path, size):
    os.truncate(path, size)


def overwrite(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


SAMPLE = 3 * 512  # a header, and a picture of 14×14 pixels

DAMAGE = {
    "cut within a picture": (lambda p: cut(p, 3 * SAMPLE + 700), r"is cut short within \./0000"),
    "cut between members": (lambda p: cut(p, 3 * SAMPLE), "is cut short"),
    "cut within a header": (lambda p: cut(p, 3 * SAMPLE + 100), "is cut short"),
    "no tar at all": (lambda p: p.write_bytes(b"?" * 5000), "is broken"),
    "a bad header": (lambda p: overwrite(p, 3 * SAMPLE, b"?" * 512), "is broken from byte 4,608"),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("case", DAMAGE)
def test_a_broken_tar_shard(tmp_path, case, streamed):
    damage, said = DAMAGE[case]
    path = in_tar(tmp_path, [encoded(x) for x in pictures(30, 14, 14)], told="")
    with tarfile.open(tmp_path / "train-0001.tar") as archive:
        assert [member.offset for member in archive] == [i * SAMPLE for i in range(10)]
    damage(tmp_path / "train-0001.tar")
    with pytest.raises(DataError, match=rf"train-0001.tar {said}.*--skip-bad"):
        load_data({"name": "images", "path": path, "stream": streamed})
    data = load_data({"name": "images", "path": path, "stream": streamed, "skip_bad": True})
    assert 20 <= data.count + len(data.heldout) < 30
    assert any("train-0001.tar (" in remark and "skipped" in remark for remark in data.remarks)


def test_a_garbage_parquet_shard(tmp_path):
    path = in_parquet(tmp_path, [encoded(x) for x in pictures(30)])
    (tmp_path / "train-00001-of-00003.parquet").write_bytes(b"garbage")
    for streamed in (False, True):
        with pytest.raises(DataError, match=r"cannot read .*train-00001-of-00003.parquet"):
            load_data({"name": "images", "path": path, "stream": streamed})
        data = load_data({"name": "images", "path": path, "stream": streamed, "skip_bad": True})
        assert data.count + len(data.heldout) == 20
        assert any("train-00001-of-00003.parquet (broken" in remark for remark in data.remarks)


def test_a_garbage_row_group(tmp_path):
    x = pictures(40, 24, 24)
    path = in_parquet(tmp_path, [encoded(one) for one in x], shards=2, group=5)
    file = tmp_path / "train-00001-of-00002.parquet"
    chunk = parquet.ParquetFile(file).metadata.row_group(1).column(0)
    overwrite(file, chunk.dictionary_page_offset or chunk.data_page_offset, b"\xff" * 200)
    with pytest.raises(DataError, match=r"cannot read .*train-00001-of-00002.parquet"):
        open_stream(path, ask()).read(torch.arange(40))
    with pytest.raises(DataError, match=r"cannot read .*train-00001-of-00002.parquet"):
        load_images(path)
    good = [*range(25), *range(30, 40)]
    expected = torch.from_numpy(x).movedim(3, 1)
    assert torch.equal(load_images(path, skip_bad=True).pixels, expected[good])
    stream = open_stream(path, ask(skip_bad=True))
    # The next picture that can be read stands in, with its label, the same every time.
    stood_in = torch.tensor([*range(25), *[30] * 5, *range(30, 40)])
    found, told = stream.batch(torch.arange(40))
    assert torch.equal(found, expected[stood_in])
    assert torch.equal(told, stream.labels[stood_in])
    assert torch.equal(stream.read(torch.tensor([27])), expected[30:31])
    assert "5 rows skipped so far: row 25 of train-00001-of-00002.parquet (cannot read row group 1" in stream.skipped


@pytest.mark.parametrize("kind", ["folder", "x.zip", "parquet", "tar"])
def test_a_bad_picture(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("reparam.data.streams._LOOKED_AT", 2)
    raw = [encoded(x, "JPEG") for x in pictures()]
    raw[37] = raw[37][: len(raw[37]) // 2]
    path = KINDS[kind](tmp_path / kind, raw)
    entry = {"parquet": "row 37 of train-00002-of-00003.parquet", "tar": "train-0002.tar/000037.png"}
    name = entry.get(kind, "class1/037.png")
    stream = open_stream(path, ask())
    with pytest.raises(DataError, match=rf"{name} cannot be used: truncated.*--skip-bad"):
        stream.read(torch.arange(N))
    skipping = open_stream(path, ask(skip_bad=True))
    at = position(kind, 37)
    assert skipping.skipped == ""
    assert torch.equal(skipping.read(torch.tensor([at])), skipping.read(torch.tensor([at + 1])))
    assert skipping.read(torch.arange(N)).shape[0] == N
    unit = "row" if kind == "parquet" else "file"
    assert skipping.skipped.startswith(f"1 {unit} skipped so far: {name} (truncated)")


def position(kind, i):
    """Where picture ``i`` comes: folders and archives are sorted by name."""
    return sorted(names()).index(names()[i]) if kind in ("folder", "x.zip") else i


def test_where_nothing_is_left_to_stand_in(tmp_path, monkeypatch):
    monkeypatch.setattr("reparam.data.streams._LOOKED_AT", 4)
    x = pictures(400, 4, 4)
    raw = [encoded(one) if i % 100 == 0 else b"?" for i, one in enumerate(x)]
    stream = open_stream(in_tar(tmp_path, raw), ask(skip_bad=True))
    expected = torch.from_numpy(x).movedim(3, 1)[[0, *[100] * 100, *[200] * 100, *[300] * 100, *[0] * 99]]
    assert torch.equal(stream.read(torch.arange(400)), expected)
    assert stream.skipped.startswith("396 files skipped so far")
    fresh = open_stream(in_tar(tmp_path, raw), ask(skip_bad=True))
    assert torch.equal(fresh.read(torch.tensor([150, 50])), expected[[150, 50]])
    with pytest.raises(DataError, match="none of 3 pictures can be used: 396 files skipped"):
        stream.only(torch.tensor([1, 2, 3])).read(torch.tensor([2]))


def test_other_files_are_errors_before_anything_is_read(tmp_path):
    path = in_folder(tmp_path, [encoded(x) for x in pictures(20)])
    (tmp_path / "notes.txt").write_text("?")
    with pytest.raises(DataError, match=r"1 file cannot be used: notes.txt \(not a picture\).*--skip-bad"):
        open_stream(path, ask())
    assert open_stream(path, ask(skip_bad=True)).skipped == "1 file skipped so far: notes.txt (not a picture)"


# Memory


def test_the_cache_stays_below_its_limit(tmp_path):
    raw = [encoded(x) for x in pictures(200, 16, 16)]
    path = in_parquet(tmp_path, raw, shards=2, group=10)
    limit = 50 * len(raw[0])
    stream = open_stream(path, ask(), cache=limit)
    assert 20 <= stream.window <= 45
    order = Order(0, stream.count, stream.blocks, stream.window)
    seen = []
    for step in range(40):
        stream.read(order(torch.arange(step * 10, step * 10 + 10)))
        seen.append(stream.cache.held)
    assert max(seen) <= limit
    assert max(seen) > limit // 2
    # Two epochs of twenty row groups each: nearly every group is read once an epoch.
    assert stream.cache.reads <= 2 * 20 + 12
    small = open_stream(path, ask(), cache=1)
    assert torch.equal(small.read(torch.arange(200)), stream.read(torch.arange(200)))
    assert small.window == 1


# Order


def test_order_without_blocks_is_the_permutation_of_draws():
    order, draws = Order(7, 100), Draws(7, 32, 100, (1,))
    for step in (0, 3, 1000):
        assert torch.equal(order(torch.arange(step * 32, step * 32 + 32)), draws(step).index)
    generator = torch.Generator().manual_seed(mix(7, 2, 0x5EED))
    assert torch.equal(order(torch.arange(200, 300)), torch.randperm(100, generator=generator))
    small = Order(7, 100, [40, 35, 25], window=100)
    assert torch.equal(small(torch.arange(500)), order(torch.arange(500)))


BLOCKS = [7, 1, 12, 30, 5, 5, 9, 2, 2, 27]


@pytest.mark.parametrize("blocks", [None, BLOCKS])
def test_every_epoch_goes_once_through_all(blocks):
    order = Order(1, 100, blocks, window=20)
    epochs = [order(torch.arange(e * 100, e * 100 + 100)) for e in range(4)]
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(100))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    assert not torch.equal(Order(2, 100, blocks, window=20)(torch.arange(100)), epochs[0])


@pytest.mark.parametrize("blocks", [None, BLOCKS])
def test_order_is_a_pure_function_of_the_position(blocks):
    whole = Order(1, 100, blocks, window=20)(torch.arange(350))
    position = torch.randint(350, (60,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(Order(1, 100, blocks, window=20)(position), whole[position])
    backwards = Order(1, 100, blocks, window=20)
    assert [int(backwards(torch.tensor([p]))) for p in range(349, -1, -1)] == whole.flip(0).tolist()
    # However many processes share a batch, together they draw the same.
    for world in (2, 3):
        parts = [Order(1, 100, blocks, window=20)(torch.arange(rank, 350, world)) for rank in range(world)]
        for rank, part in enumerate(parts):
            assert torch.equal(part, whole[rank::world])


def test_a_window_touches_few_blocks():
    size, count, window = 50, 20_000, 1000
    order = Order(0, count, [size] * (count // size), window=window)
    index = order(torch.arange(count))
    for start in range(0, count, window):
        assert len((index[start : start + window] // size).unique()) == window // size
    for start in range(0, count, 256):
        assert len((index[start : start + 256] // size).unique()) <= 2 * window // size
    # The samples of a window are mixed, not block after block.
    assert len((index[:100] // size).unique()) > 15
    # And each window's blocks are from anywhere.
    assert (index[:window] // size).unique().diff().max() > 10


def test_order_refuses_blocks_that_do_not_add_up():
    with pytest.raises(ValueError, match="hold 9 samples, expected 10"):
        Order(0, 10, [4, 5])


# The hub


def hub(tmp_path, raw):
    root = tmp_path / "hub/some-one/pets.v2"
    in_parquet(root / "plain_text", raw)
    in_parquet(root / "elsewhere", raw[:4], shards=1)
    (root / "elsewhere/train-00000-of-00001.parquet").rename(root / "plain_text/test-00000-of-00001.parquet")
    (root / "elsewhere").rmdir()
    return tmp_path / "hub"


def test_a_local_copy_of_the_hub(tmp_path, monkeypatch):
    x = pictures()
    root = hub(tmp_path, [encoded(one) for one in x])
    expected = torch.from_numpy(x).movedim(3, 1)
    assert torch.equal(load_images("hub:some-one/pets.v2", hub=str(root)).pixels, expected)
    monkeypatch.setenv("REPARAM_HUB", str(root))
    test = load_images("hub:some-one/pets.v2/plain_text:test")
    assert torch.equal(test.pixels, expected[:4])
    pinned = load_images("hub:some-one/pets.v2@v1.0:train")
    assert torch.equal(pinned.pixels, expected)
    assert "whatever its revision" in pinned.remarks[0]
    with pytest.raises(DataError, match=r"no .* files of the split 'validation'.*splits there: test, train"):
        load_images("hub:some-one/pets.v2:validation")
    here, there = both("hub:some-one/pets.v2")
    assert there.name == "some-one/pets.v2"
    assert torch.equal(there.batch(torch.arange(there.count))[0], here.train)


@pytest.mark.parametrize("name", ["hub:pets", "hub:", "hub:a/b:", "hub:../b", "hub:a/../b", "hub:a/b@", "hub:/a/b"])
def test_names_that_are_none_on_the_hub(name):
    with pytest.raises(DataError, match="expected hub:OWNER/NAME"):
        load_images(name)


def test_two_folders_of_one_split(tmp_path):
    raw = [encoded(x) for x in pictures(6)]
    for folder in ("one", "two"):
        in_parquet(tmp_path / "a/b" / folder, raw, shards=1)
    with pytest.raises(DataError, match=r"in the folders one, two; say which: --set data.path=hub:a/b/one:train"):
        load_images("hub:a/b", hub=str(tmp_path))
    assert len(load_images("hub:a/b/two", hub=str(tmp_path)).pixels) == 6


def test_the_cache_of_the_hub(tmp_path, monkeypatch, capsys):
    module = pytest.importorskip("huggingface_hub")
    x = pictures()
    root = hub(tmp_path, [encoded(one) for one in x])
    asked_for = []

    def download(repo, *, repo_type, revision, allow_patterns):
        asked_for.append((repo, repo_type, revision, allow_patterns))
        return str(root / "some-one/pets.v2")

    monkeypatch.setattr(module, "snapshot_download", download)
    monkeypatch.delenv("REPARAM_HUB", raising=False)
    found = load_images("hub:some-one/pets.v2@abc:test")
    assert torch.equal(found.pixels, torch.from_numpy(x[:4]).movedim(3, 1))
    assert asked_for == [("some-one/pets.v2", "dataset", "abc", ["*test*.parquet", "*test*.tar"])]
    output = capsys.readouterr()
    assert "some-one/pets.v2, revision abc" in output.err
    assert output.out == ""

    def fail(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(module, "snapshot_download", fail)
    with pytest.raises(DataError, match=r"no route to host.*--set data.path=DIR.*--set data.hub=DIR"):
        load_images("hub:some-one/pets.v2", hub=str(tmp_path / "nowhere"))


def test_the_hub_offline(tmp_path):
    pytest.importorskip("huggingface_hub")
    script = "from reparam.data.images import load_images\nload_images('hub:some-one/pets')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "REPARAM_HUB": ""}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert "reparam.errors.DataError: cannot get the data set some-one/pets from the Hugging Face hub" in found.stderr
    assert "--set data.path=DIR" in found.stderr


# Loading ahead


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "reparam-prefetch"]


def test_batches_come_in_order_and_not_too_far_ahead():
    loaded = []
    with Prefetcher(lambda step: loaded.append(step) or step * step, ahead=3) as prefetcher:
        for step in range(20):
            assert prefetcher(step) == step * step
        wait_for(lambda: len(loaded) == 23)
        time.sleep(0.05)
        assert loaded == list(range(23))
        # Any other step starts afresh from there.
        assert prefetcher(5) == 25
        assert prefetcher(6) == 36
        assert len(threads()) == 1
    assert not threads()


def wait_for(what):
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_loading_goes_on_in_the_background():
    started = threading.Event()
    with Prefetcher(lambda step: started.set() if step == 2 else step) as prefetcher:
        prefetcher(0)
        assert started.wait(10)


def test_an_error_belongs_to_its_step():
    broken = {2: ValueError("step two")}

    def load(step):
        if step in broken:
            raise broken.pop(step)
        return step

    with Prefetcher(load) as prefetcher:
        assert prefetcher(0) == 0
        wait_for(lambda: not broken)
        assert prefetcher(1) == 1
        with pytest.raises(ValueError, match="step two"):
            prefetcher(2)
        assert [prefetcher(step) for step in (2, 3)] == [2, 3]


def test_nothing_is_loaded_past_the_end():
    loaded = []
    with Prefetcher(lambda step: loaded.append(step) or step, stop=4) as prefetcher:
        assert [prefetcher(step) for step in range(4)] == [0, 1, 2, 3]
        wait_for(lambda: not threads())
    assert loaded == [0, 1, 2, 3]


def test_a_forgotten_prefetcher_ends_its_thread():
    prefetcher = Prefetcher(lambda step: step)
    prefetcher(0)
    assert threads()
    del prefetcher
    wait_for(lambda: not threads())


@pytest.mark.parametrize("end", ["signal.raise_signal(signal.SIGINT)", ""])
def test_the_program_ends_while_batches_are_loaded(tmp_path, end):
    path = in_parquet(tmp_path, [encoded(x) for x in pictures()])
    script = f"""if True:
        import signal, torch
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        from reparam.data.images import asked
        from reparam.data.prefetch import Prefetcher
        from reparam.data.streams import open_stream
        stream = open_stream({path!r}, asked())
        prefetcher = Prefetcher(lambda step: stream.read(torch.randperm({N})))
        prefetcher(0)
        print("ready", flush=True)
        {end}
        """
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert found.stdout == "ready\n"
    assert found.returncode in ({1, 130, -2} if end else {0})
    assert "Fatal" not in found.stderr
    assert "Exception in thread" not in found.stderr
