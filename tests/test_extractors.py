"""Features for scores: which network, which file, which preprocessing; and what is refused."""

import hashlib
import io
import json
import os
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from torch import nn

from reparam.errors import DataError, OutputError, ReparamError, UnknownName
from reparam.metrics import EXTRACTORS, Extractor, extractor
from reparam.metrics.extractors import DINOv2, EfficientNetLite0, Inception, Pixels
from reparam.metrics.extractors.resizing import resized_as_bytes, resized_as_floats

Image = pytest.importorskip("PIL.Image")
pytestmark = [
    pytest.mark.usefixtures("one_thread", "_alone"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # there is no other form of that file
]


@pytest.fixture
def _alone(monkeypatch):
    """No network, and nothing from the environment."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    for variable in ("REPARAM_INCEPTION", "REPARAM_DINOV2"):
        monkeypatch.delenv(variable, raising=False)


def pictures(n=3, channels=3, high=40, wide=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, high, wide), dtype=torch.uint8, generator=generator)


# ------------------------------------------------------------------------------------------- resizing


def bicubic(length, side):
    """The matrix [side, length] of the antialiased cubic convolution with a = -1/2, in float64."""

    def cubic(x):
        x = np.abs(x)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0.0))

    scale = length / side
    centres = (np.arange(side) + 0.5) * scale
    weights = cubic((np.arange(length) + 0.5 - centres[:, None]) / max(scale, 1.0))
    return weights / weights.sum(1, keepdims=True)


def plainly(x, side):
    """One picture [3, H, W]: every channel a picture of floats of its own, as clean-fid resizes."""
    channels = []
    for channel in x.numpy():
        small = Image.fromarray(channel.astype(np.float32), mode="F").resize((side, side), resample=Image.BICUBIC)
        channels.append(np.clip(np.array(small), 0, 255))
    return torch.from_numpy(np.stack(channels))


@pytest.mark.parametrize(("high", "wide"), [(32, 32), (40, 31), (299, 299), (330, 420)])
@pytest.mark.parametrize("channels", [1, 3])
def test_floats_are_resized_by_the_known_filter_clipped_and_not_rounded(high, wide, channels):
    x = pictures(3, channels, high, wide)
    found = resized_as_floats(x, 299)
    assert torch.equal(found, torch.stack([plainly(one.expand(3, -1, -1), 299) for one in x]))
    exact = bicubic(high, 299) @ x.double().numpy() @ bicubic(wide, 299).T
    np.testing.assert_allclose(found.numpy(), np.broadcast_to(exact.clip(0, 255), found.shape), atol=1e-3)
    assert found.min() >= 0
    assert found.max() <= 255
    if (high, wide) == (299, 299):
        assert torch.equal(found, x.float().expand(-1, 3, -1, -1))
    else:
        assert not torch.equal(found, found.round())


@pytest.mark.parametrize("side", [24, 300])
def test_bytes_are_resized_as_a_picture_in_colour(side):
    x = pictures(4, 3, side, side + 5)
    whole = [Image.fromarray(one.permute(1, 2, 0).numpy(), "RGB").resize((224, 224), Image.BICUBIC) for one in x]
    expected = torch.from_numpy(np.stack([np.array(one) for one in whole])).permute(0, 3, 1, 2)
    found = resized_as_bytes(x, 224)
    assert torch.equal(found, expected)
    assert torch.equal(resized_as_bytes(x[:, 1:2], 224), found[:, 1:2].expand(-1, 3, -1, -1))


def test_the_order_of_many_pictures_is_kept():
    x = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 9, 9)
    assert torch.equal(resized_as_bytes(x, 12)[:, 2, 5, 5], x[:, 0, 0, 0])


# ------------------------------------------------------------------------------------------ inception


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2048, 16, stride=90)

    def forward(self, x):
        return torch.relu(self.conv(x)).mean((2, 3), keepdim=True)


class StandIn(nn.Module):
    """The interface of the published file: the layers, and a forward that does more than them."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x):
        return self.layers(x) * 0


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt"
    torch.jit.save(torch.jit.script(StandIn().eval()), path)
    return path


@pytest.fixture
def pinned(stand_in, monkeypatch):
    monkeypatch.setattr(Inception, "SHA256", hashlib.sha256(stand_in.read_bytes()).hexdigest())
    return str(stand_in)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 299, 299), (3, 310, 350)])
def test_inception_s_features_are_those_of_its_layers(pinned, shape):
    x = pictures(3, *shape)
    found = Inception(pinned)(x)
    large = torch.stack([plainly(one.expand(3, -1, -1), 299) for one in x])
    with torch.no_grad():
        expected = torch.jit.load(pinned).layers((large - 128) / 128).view(3, 2048)
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32
    assert found.std() > 0


def test_inception_s_features_depend_on_the_batch_by_rounding_only(pinned):
    x = pictures(5)
    one, all_ = Inception(pinned, batch=2), Inception(pinned)
    torch.testing.assert_close(one(x), all_(x), rtol=1e-5, atol=1e-6)
    assert (one.name, one.digest) == (all_.name, all_.digest)
    assert torch.equal(all_(x), all_(x))
    assert all_(x[:0]).shape == (0, 2048)


def test_inception_in_bfloat16_is_near_and_says_so(pinned):
    x = pictures(4)
    full, half = Inception(pinned), Inception(pinned, dtype="bfloat16")
    assert half.name == f"{full.name}, bfloat16"
    assert half.record()["dtype"] == "bfloat16"
    a, b = full(x), half(x)
    assert b.dtype == torch.float32
    assert 0 < float((a - b).norm() / a.norm()) < 0.02
    with pytest.raises(UnknownName, match="float16.*Known: bfloat16, float32"):
        Inception(pinned, dtype="float16")


def test_inception_is_found_through_the_environment(pinned, monkeypatch):
    monkeypatch.setenv("REPARAM_INCEPTION", pinned)
    found = extractor("inception")
    assert found.digest == f"sha256:{Inception.SHA256[:16]}"
    monkeypatch.setenv("REPARAM_INCEPTION", pinned + "x")
    with pytest.raises(DataError, match="nothing at .*ptx .REPARAM_INCEPTION in the environment"):
        extractor({"name": "inception", "download": True})


def test_without_a_file_inception_names_the_three_ways():
    with pytest.raises(DataError, match=r"extractor\.path=PATH.*REPARAM_INCEPTION=PATH.*extractor\.download=true"):
        extractor("inception")
    with pytest.raises(DataError, match=r"nothing at /nowhere/x\.pt \(extractor\.path\)"):
        extractor({"name": "inception", "path": "/nowhere/x.pt", "download": True})
    with pytest.raises(DataError, match="batch must be at least 1"):
        Inception(batch=0)


def test_another_file_is_refused_before_it_is_loaded(stand_in, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("it was loaded"))
    found = hashlib.sha256(stand_in.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=f"SHA-256 is {found}, not f58cb9b6ec323ed6.*was not loaded"):
        Inception(str(stand_in))
    with pytest.raises(DataError, match="cannot read"):
        Inception(str(tmp_path))


def serve(monkeypatch, content):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        if isinstance(content, Exception):
            raise content
        return io.BytesIO(content)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_a_download_is_checked_kept_and_not_repeated(pinned, stand_in, monkeypatch, tmp_path):
    asked = serve(monkeypatch, stand_in.read_bytes())
    cache = tmp_path / "cache"
    first = Inception(download=True, cache=str(cache))
    again = Inception(download=True, cache=str(cache))
    assert asked == [Inception.URL]
    assert [f.name for f in cache.iterdir()] == [Inception.FILE]
    assert torch.equal(first(pictures()), again(pictures()))
    assert first.record() == again.record()
    assert first.record()["source"] == f"download of {Inception.FILE}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>not here</html>", "SHA-256 is .* was not loaded"),
        (urllib.error.URLError("no route"), r"cannot download https.*no route.*extractor\.path=FILE"),
    ],
)
def test_a_download_that_fails_leaves_no_file(pinned, monkeypatch, tmp_path, content, message):
    serve(monkeypatch, content)
    with pytest.raises(DataError, match=message):
        Inception(download=True, cache=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_copy_is_refused_and_a_cache_that_cannot_be_written_is_named(pinned, stand_in, monkeypatch, tmp_path):
    (tmp_path / Inception.FILE).write_bytes(b"cut off")
    with pytest.raises(DataError, match="downloaded before.*Remove it"):
        Inception(download=True, cache=str(tmp_path))
    serve(monkeypatch, stand_in.read_bytes())
    with pytest.raises(OutputError, match=r"cannot keep.*extractor\.cache=DIR"):
        Inception(download=True, cache=str(tmp_path / Inception.FILE))


@pytest.mark.parametrize("wrong", [torch.zeros(1, 2, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8)])
def test_what_are_no_pictures_is_refused(pinned, wrong):
    with pytest.raises(DataError, match=r"takes pictures, uint8 \[n, 1 or 3, H, W\]; found torch"):
        Inception(pinned)(wrong)


class Watching(Inception):
    def features(self, x):
        self.seen = (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.allow_tf32)
        return super().features(x)


@pytest.mark.parametrize("newer", [False, True])
def test_shortcuts_that_training_allows_do_not_reach_the_features(pinned, newer):
    matmul = torch.backends.cuda.matmul
    at_first, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    if newer:
        kept, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    else:
        torch.set_float32_matmul_precision("medium")
    try:
        watching = Watching(pinned)
        watching(pictures(1))
        assert watching.seen[0] == "ieee"
        assert watching.seen[1] is False
        assert torch.backends.cudnn.allow_tf32 is cudnn
        assert matmul.fp32_precision == "tf32"
        assert newer or torch.get_float32_matmul_precision() == "medium"
    finally:
        if newer:
            matmul.fp32_precision = kept
        torch.set_float32_matmul_precision(at_first)


# --------------------------------------------------------------------------------------------- dinov2


def tiny(folder, **config):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    told = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 224, **config}
    net = transformers.Dinov2Model(transformers.Dinov2Config(**told)).eval()
    nn.init.normal_(net.embeddings.position_embeddings)
    net.save_pretrained(folder)
    return net


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    return folder, tiny(folder)


def standardised(x):
    """Pictures as the authors of FD-DINOv2 prepare them, in float64."""
    whole = [Image.fromarray(one.expand(3, -1, -1).permute(1, 2, 0).numpy()) for one in x]
    large = np.stack([np.array(one.resize((224, 224), Image.BICUBIC)) for one in whole]) / 255
    return torch.from_numpy((large - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("shape", [(3, 32, 40), (1, 28, 28), (3, 260, 230)])
def test_dinov2_s_features_are_the_class_token_after_the_norm(dino, shape):
    folder, net = dino
    x = pictures(3, *shape)
    found = DINOv2(str(folder))
    torch.testing.assert_close(found.prepared(x).double(), standardised(x), rtol=0, atol=1e-6)
    with torch.no_grad():
        expected = net(pixel_values=standardised(x).float()).last_hidden_state[:, 0]
    torch.testing.assert_close(found(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(DINOv2(str(folder), batch=2)(x), expected, rtol=1e-5, atol=1e-5)


def test_dinov2_s_positions_are_interpolated_as_by_its_authors(tmp_path):
    net = tiny(tmp_path, image_size=518)
    positions = net.embeddings.position_embeddings.detach()
    grid = positions[0, 1:].reshape(37, 37, 24).double()
    scale = 37 / 16.1  # 0.1 more than the 16 there are to be
    weights = torch.zeros(16, 37, dtype=torch.float64)
    for i in range(16):  # cubic convolution with a = -3/4, not antialiased, edges repeated
        at = (i + 0.5) * scale - 0.5
        low = int(np.floor(at))
        for j in range(low - 1, low + 3):
            d = abs(at - j)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[i, min(max(j, 0), 36)] += near if d < 1 else far
    moved = torch.einsum("ai,bj,ijc->abc", weights, weights, grid).reshape(1, 256, 24)
    net.embeddings.position_embeddings = nn.Parameter(torch.cat([positions[:, :1], moved.float()], 1))
    x = pictures(2)
    with torch.no_grad():
        expected = net(pixel_values=standardised(x).float()).last_hidden_state[:, 0]
    torch.testing.assert_close(DINOv2(str(tmp_path))(x), expected, rtol=1e-4, atol=1e-4)


def test_dinov2_says_what_it_is_and_takes_no_random_numbers(dino, monkeypatch):
    folder, _ = dino
    monkeypatch.setenv("REPARAM_DINOV2", str(folder))
    before = torch.get_rng_state()
    full = extractor("dinov2")
    assert torch.equal(torch.get_rng_state(), before)
    assert full.name == "dinov2 of width 24, 2 layers, 3 heads at 224x224"
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert full.record()["weights"] == f"sha256:{weights}"
    assert full.digest == f"sha256:{weights[:16]}"
    half = DINOv2(dtype="bfloat16")
    assert half.name == f"{full.name}, bfloat16"
    a, b = full(pictures()), half(pictures())
    assert b.dtype == torch.float32
    assert 0 < float((a - b).norm() / a.norm()) < 0.03


def test_published_sizes_have_their_names():
    from types import SimpleNamespace

    from reparam.metrics.extractors.dinov2 import _size

    large = SimpleNamespace(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    assert _size(large) == "ViT-L/14"


def test_without_a_folder_dinov2_names_the_three_ways(tmp_path):
    with pytest.raises(DataError, match=r"extractor\.path=PATH.*REPARAM_DINOV2=PATH.*extractor\.download=true"):
        extractor("dinov2")
    with pytest.raises(DataError, match="nothing at"):
        DINOv2(str(tmp_path / "none"), download=True)


def test_folders_that_are_no_dinov2_are_refused(tmp_path, dino):
    def refused(message, path=tmp_path):
        with pytest.raises(DataError, match=message):
            DINOv2(str(path))

    refused("no readable config.json")
    config = tmp_path / "config.json"
    config.write_text("[1]")
    refused("no readable config.json")
    config.write_text(json.dumps({"model_type": "vit", "patch_size": 16}))
    refused(r"another network.*model_type 'vit' \(expected 'dinov2'\), patch_size 16 \(expected 14\)")
    config.write_text((dino[0] / "config.json").read_text())
    refused("has no model.safetensors; beside config.json there is nothing")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    refused("there is pytorch_model.bin, pickled weights, which are refused")
    refused("is a file, pickled weights, which are refused", tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    refused("cannot be loaded by transformers")
    more = json.loads(config.read_text()) | {"num_hidden_layers": 3}
    config.write_text(json.dumps(more))
    (tmp_path / "model.safetensors").write_bytes((dino[0] / "model.safetensors").read_bytes())
    refused("lacks weights that its config.json calls for: encoder.layer.2")


def test_dinov2_is_downloaded_as_safetensors_only(dino, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def snapshot(repo, **options):
        asked.update(options, repo=repo)
        return str(dino[0])

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    found = DINOv2(download=True)
    assert asked == {"repo": "facebook/dinov2-base", "allow_patterns": ["config.json", "model.safetensors"]}
    assert found.record()["source"].startswith("facebook/dinov2-base of the Hugging Face hub, revision ")

    def fails(repo, **options):
        raise OSError("unreachable")

    monkeypatch.setattr(hub, "snapshot_download", fails)
    with pytest.raises(DataError, match=r"cannot get facebook/dinov2-base.*unreachable.*extractor\.path=DIR"):
        DINOv2(download=True)


def test_missing_packages_are_named(dino, pinned, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match=r"reparam\[dino\]"):
        DINOv2(str(dino[0]))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"reparam\[images\]"):
        Inception(pinned)


# ------------------------------------------------------------------------------------- the others


def test_efficientnet_lite0_in_bfloat16_is_near_and_says_so():
    pytest.importorskip("efficientnet_lite_pytorch")
    x = (torch.linspace(0, 255, 48).outer(torch.linspace(0, 1, 48))).to(torch.uint8).expand(2, 3, -1, -1)
    full, half = EfficientNetLite0(), EfficientNetLite0(dtype="bfloat16")
    assert (full.name, half.name) == ("efficientnet_lite0 at 96x96", "efficientnet_lite0 at 96x96, bfloat16")
    assert full.digest == half.digest == "sha256:579344248a93e230"
    a, b = full(x), half(x)
    assert b.dtype == torch.float32
    assert 0 < float((a - b).norm() / a.norm()) < 0.1


def made(name, pinned, dino):
    if name == "inception":
        return Inception(pinned)
    if name == "dinov2":
        return DINOv2(str(dino[0]))
    if name == "efficientnet_lite0":
        pytest.importorskip("efficientnet_lite_pytorch")
    return extractor(name)


@pytest.mark.parametrize(
    ("name", "side", "scaling"),
    [
        ("inception", "299x299", "(x - 128)/128"),
        ("dinov2", "224x224", "0.485"),
        ("efficientnet_lite0", "96x96", "(x - 127)/128"),
        ("pixels", "16x16", "x/255"),
    ],
)
def test_records_tell_what_another_needs(name, side, scaling, pinned, request):
    found = made(name, pinned, request.getfixturevalue("dino") if name == "dinov2" else None)
    record = json.loads(json.dumps(found.record()))
    assert list(record) == ["name", "weights", "resize", "scaling", "dtype", "source"]
    assert record["name"] == found.name
    assert record["weights"].startswith(found.digest)
    assert len(record["weights"]) in ((0,) if name == "pixels" else (71,))
    assert side in record["resize"]
    assert scaling in record["scaling"]
    assert record["dtype"] == "float32"
    assert os.sep not in record["source"].replace("facebook/", "")


def test_records_of_a_user_s_own_extractor_are_by_its_features(tmp_path, monkeypatch):
    (tmp_path / "own_features.py").write_text("def make():\n    return lambda x: x.float().flatten(1)\n")
    monkeypatch.chdir(tmp_path)
    found = extractor("own_features:make")
    found.shown((3, 4, 4))
    assert found.record()["weights"] == found.digest
    assert found.digest.startswith("features:")
    assert found.record()["resize"] == "the factory's own"


def test_extractors_by_name():
    assert list(EXTRACTORS) == ["efficientnet_lite0", "inception", "dinov2", "pixels"]
    assert all(issubclass(kind, Extractor) for kind in EXTRACTORS.values())
    assert isinstance(extractor({"name": "pixels", "side": 4}), Pixels)
    with pytest.raises(UnknownName, match="argument of extractor 'inception' 'paths'.*Did you mean 'path'"):
        extractor({"name": "inception", "paths": "x"})
    with pytest.raises(ReparamError, match="side must be at least 1"):
        Pixels(0)


def test_recipes_check_the_arguments_by_type():
    from reparam.errors import RecipeError
    from reparam.studies.recipe import _check_part

    _check_part("extractor", {"name": "inception", "path": "x.pt", "dtype": "bfloat16"}, EXTRACTORS)
    _check_part("extractor", {"name": "dinov2", "download": True}, EXTRACTORS)
    with pytest.raises(RecipeError, match=r"extractor\.download: expected .*bool.*, found 'yes'"):
        _check_part("extractor", {"name": "inception", "download": "yes"}, EXTRACTORS)
