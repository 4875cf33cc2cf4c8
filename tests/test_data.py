import numpy as np
import pytest
import torch

from reparam.data import from_array, load_data
from reparam.errors import DataError, UnknownName


def array(n=40, d=3, seed=0):
    return np.random.default_rng(seed).normal(5, 2, (n, d))


def test_arrays_are_scaled_and_scaled_back(tmp_path):
    x = array()
    np.save(tmp_path / "x.npy", x)
    data = load_data({"name": "array", "path": str(tmp_path / "x.npy"), "holdout": 0.25})
    both = torch.cat([data.train, data.heldout])
    assert len(data.train) == 30
    assert len(data.heldout) == 10
    assert both.mean().item() == pytest.approx(0, abs=1e-6)
    assert both.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    back = data.original(both).double().numpy()
    np.testing.assert_allclose(np.sort(back, 0), np.sort(x, 0), rtol=1e-5)
    record = data.record()
    assert record["sigma_data"] == data.sigma_data
    assert record["normalised_by"] == {"mean": pytest.approx(x.mean()), "std": pytest.approx(x.std())}
    assert "30 training + 10 held-out samples of shape [3]" in data.preflight()
    # The same samples have the same digest, others another.
    again = load_data({"name": "array", "path": str(tmp_path / "x.npy"), "holdout": 0.25})
    assert again.digest == data.digest
    assert from_array(array(seed=1)).digest != from_array(array()).digest


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float32, bool])
def test_kinds_of_numbers(tmp_path, dtype):
    np.savez(tmp_path / "x.npz", (array() > 5) if dtype is bool else array().astype(dtype))
    data = load_data({"name": "array", "path": str(tmp_path / "x.npz")})
    assert data.train.dtype == torch.float32


def test_npz_with_several_arrays_asks_which(tmp_path):
    np.savez(tmp_path / "x.npz", a=array(), b=array(d=2))
    with pytest.raises(DataError, match="holds the arrays a, b; which one is not said"):
        load_data({"name": "array", "path": str(tmp_path / "x.npz")})
    with pytest.raises(DataError, match="none is called 'c'"):
        load_data({"name": "array", "path": str(tmp_path / "x.npz"), "key": "c"})
    assert load_data({"name": "array", "path": str(tmp_path / "x.npz"), "key": "b"}).shape == (2,)


def broken(change):
    x = array()
    return change(x)


def with_value(x, value):
    x[7, 1] = value
    return x


BAD = {
    "nan": (lambda x: with_value(x, np.nan), r"NaN or infinity in 1 of 40 samples, first at index \[7, 1\]"),
    "inf": (lambda x: with_value(x, np.inf), "NaN or infinity"),
    "constant": (
        lambda x: np.concatenate([x, np.ones((40, 1))], 1),
        r"1 of 4 columns never change \(3\).*allow_constant",
    ),
    "one axis": (lambda x: x[:, 0], r"shape \[40\]; expected one sample a row.*reshape\(-1, 1\)"),
    "empty": (lambda x: x[:0], r"is empty: shape \[0, 3\]"),
    "text": (lambda x: np.full((4, 2), "a"), "expected real numbers"),
    "complex": (lambda x: x + 1j, "expected real numbers"),
    "too few": (lambda x: x[:3], "each needs at least 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays(tmp_path, case):
    change, message = BAD[case]
    np.save(tmp_path / "x.npy", broken(change))
    with pytest.raises(DataError, match=message):
        load_data({"name": "array", "path": str(tmp_path / "x.npy")})


def test_constant_columns_may_be_kept(tmp_path):
    np.save(tmp_path / "x.npy", np.concatenate([array(), np.ones((40, 1))], 1))
    kept = load_data({"name": "array", "path": str(tmp_path / "x.npy"), "allow_constant": True})
    assert kept.shape == (4,)
    np.save(tmp_path / "y.npy", np.ones((40, 2)))
    with pytest.raises(DataError, match="one and the same number"):
        load_data({"name": "array", "path": str(tmp_path / "y.npy"), "allow_constant": True})


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="needs data.path"):
        load_data({"name": "array"})
    with pytest.raises(DataError, match="needs data.path"):
        load_data({"name": "array", "path": ""})
    with pytest.raises(DataError, match=r"no file .*gone.npy"):
        load_data({"name": "array", "path": str(tmp_path / "gone.npy")})
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"not a .npy or .npz file"):
        load_data({"name": "array", "path": str(tmp_path / "x.csv")})
    (tmp_path / "x.npy").write_bytes(b"not an array")
    with pytest.raises(DataError, match="cannot read"):
        load_data({"name": "array", "path": str(tmp_path / "x.npy")})
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}] * 4, dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not pickled"):
        load_data({"name": "array", "path": str(tmp_path / "objects.npy")})
    with pytest.raises(UnknownName, match="Did you mean 'spiral'"):
        load_data({"name": "spirall"})
    with pytest.raises(DataError, match="dim must be at least 2, found 1"):
        load_data({"name": "spiral", "dim": 1})
    with pytest.raises(UnknownName, match=r"data.dim"):
        load_data({"name": "spiral", "dims": 4})


def test_digits_are_real_and_split():
    data = load_data({"name": "digits"})
    assert len(data.train) + len(data.heldout) == 1797
    assert data.shape == (64,)
    assert data.image == (8, 8)
    assert float(data.train.min()) == -1
    assert float(data.train.max()) == 1
    # No held-out image is a training image (the scans have no duplicates).
    assert float(torch.cdist(data.heldout, data.train).min()) > 0.1
