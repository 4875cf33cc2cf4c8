"""The lesson's data: the schema that the page relies on, and its numbers against independent formulas."""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

LESSON = Path(__file__).parents[1] / "docs" / "lesson"
TARGETS = ("x0", "eps", "v", "velocity")


@pytest.fixture(scope="module")
def found() -> Any:
    return json.loads((LESSON / "data.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def maker() -> Iterator[ModuleType]:
    """docs/lesson/data.py with its neighbours, which are scripts and no package."""
    names = ("formulas", "results", "runs", "data")
    sys.path.insert(0, str(LESSON))
    try:
        yield importlib.import_module("data")
    finally:
        sys.path.remove(str(LESSON))
        for name in names:
            sys.modules.pop(name, None)


def decoded(bytes_: Any, half_width: float = 1.0) -> np.ndarray:
    values = np.array(bytes_)
    assert values.dtype.kind == "i"
    assert values.min() >= 0
    assert values.max() <= 255
    return (values / 127.5 - 1) * half_width


# --- what the page relies on ------------------------------------------------------------------------------------------


def test_it_is_small_and_says_how_it_was_made(found: Any) -> None:
    assert (LESSON / "data.json").stat().st_size <= 1_500_000
    made = found["made"]
    assert made["command"] == "python docs/lesson/data.py"
    assert made["version"]
    assert made["hardware"]
    assert made["date"].count("-") == 2
    assert 0 < made["seconds"] < 2 * 600  # processor time: ten minutes of two cores


def test_no_number_is_nan_or_infinite(found: Any) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"data.json holds {name}, which no browser reads as JSON")

    json.loads((LESSON / "data.json").read_text(encoding="utf-8"), parse_constant=refuse)


def test_the_curves_of_training_have_one_entry_a_recorded_step(found: Any) -> None:
    digits, spiral = found["dynamics"]["digits"], found["dynamics"]["spiral"]
    runs = [*digits["targets"].values(), *(r for row in digits["narrow"]["targets"].values() for r in row.values())]
    assert set(digits["targets"]) == set(digits["narrow"]["targets"]) == set(TARGETS)
    for run in runs:
        assert run["status"] == "done"
        assert run["steps"] == sorted(set(run["steps"]))
        assert len(run["steps"]) == len(run["error"]) == len(run["loss"])
        assert {len(row) for row in run["error"]} == {len(digits["levels"])}
        assert 0 < run["frechet"] < math.inf
        assert set(run["nearest"]) == {"trained_on", "held_out"}
        assert decoded(run["samples"]).shape == (6, 64)
    assert [str(d) for d in spiral["dims"]] == list(spiral["runs"])
    for row in spiral["runs"].values():
        for run in row.values():
            assert len(run["steps"]) == len(run["error"]) == len(run["error_by_level"]) == len(run["loss"])
            points = np.array(run["points"])
            assert points.shape == (200, 2)
            assert np.abs(points).max() <= 400


def test_the_scans_are_real_ones_that_no_network_learned_from(found: Any, maker: ModuleType) -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    known = sklearn.load_digits()
    trained_on = {tuple(v) for v in ((maker.formulas.digits().train + 1) * 8).round().int().tolist()}
    for label, scan in enumerate(found["digits"]):
        pixels = np.round(np.array(scan["pixels"]) / 255 * 16)
        assert scan["label"] == label
        same = (known.data == pixels).all(1)
        assert label in known.target[same]
        assert tuple(int(p) for p in pixels) not in trained_on


def test_the_noise_is_standard_normal(found: Any) -> None:
    noise = np.array(found["noise"])
    assert noise.shape == (4, 64)
    assert abs(noise.mean()) < 4 / 16
    assert abs(noise.std() - 1) < 4 / math.sqrt(2 * 256)


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_the_schedules_are_their_formulas(found: Any) -> None:
    t = np.linspace(0, 1, 101)
    one, zero = np.ones_like(t), np.zeros_like(t)
    angle = math.pi * t / 2
    expected = {
        "rectified_flow": (1 - t, t, -one, one),
        "cosine": (np.cos(angle), np.sin(angle), -math.pi / 2 * np.sin(angle), math.pi / 2 * np.cos(angle)),
    }
    for name, columns in expected.items():
        s = found["schedules"][name]
        assert np.allclose(s["t"], t)
        for key, column in zip(("alpha", "sigma", "alpha_dot", "sigma_dot"), columns, strict=True):
            assert np.allclose(s[key], column, atol=1e-5), (name, key)
    kept = np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[9::10]])
    ddpm = found["schedules"]["ddpm"]
    assert np.allclose(ddpm["alpha"], np.sqrt(kept), atol=1e-5)
    assert np.allclose(ddpm["sigma"], np.sqrt(1 - kept), atol=1e-5)
    slope = np.gradient(np.array(ddpm["alpha"]), t)
    assert np.allclose(ddpm["alpha_dot"][5:-5], slope[5:-5], atol=0.02)
    assert zero[0] == ddpm["sigma"][0]


LAMBDA = np.linspace(-10, 10, 81)
SNR = np.exp(LAMBDA)
RATIO = np.exp(-LAMBDA / 2)  # σ/α


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def normal(x: np.ndarray, mean: float, std: float) -> np.ndarray:
    return np.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))


T_FLOW = logistic(-LAMBDA / 2)
#: The density of λ of uniform times: |dt/dλ| of t = 1/(1 + e^{λ/2}), and of tan(πt/2) = e^{−λ/2}.
FLOW, COSINE = T_FLOW * (1 - T_FLOW) / 2, 1 / (2 * math.pi * np.cosh(LAMBDA / 2))


def logit_normal(mean: float, std: float) -> np.ndarray:
    """logit t = −λ/2 on the straight path, and so is ln(σ/α)."""
    return normal(-LAMBDA / 2, mean, std) / 2


def of_ddpm() -> np.ndarray:
    """The density of a table's log-SNRs, by differences from step to step; 0 above the first."""
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    levels = np.log(kept / (1 - kept))[::-1]
    return np.interp(LAMBDA, (levels[1:] + levels[:-1]) / 2, 1 / (1000 * np.diff(levels)), right=0.0)


EDM = (RATIO**2 + 0.25) / (RATIO * 0.5) ** 2
#: m_x and p(λ) by name.
EXPECTED = {
    "x0": (np.ones(81), COSINE),
    "eps": (SNR, of_ddpm()),
    "v": (SNR + 1, COSINE),
    "snr_trunc": (np.maximum(SNR, 1), COSINE),
    "hybrid": (1 + 0.1 * SNR, COSINE),
    "velocity": (1 / T_FLOW**2, FLOW),
    "velocity_sd3": (1 / T_FLOW**2, logit_normal(0.0, 1.0)),
    "jit": (1 / np.maximum(T_FLOW, 0.05) ** 2, logit_normal(0.8, 0.8)),
    "min_snr": (np.minimum(SNR, 5), COSINE),
    "soft_min_snr": (4 * SNR / (SNR + 4), COSINE),
    "p2": (SNR / (1 + SNR), of_ddpm()),
    "sigmoid": (SNR * logistic(-LAMBDA) / COSINE, COSINE),
    "edm": (EDM, logit_normal(-1.2, 1.2)),
    "score": (SNR * (1 + SNR), COSINE),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_weightings_are_their_formulas(found: Any, name: str) -> None:
    row = next(w for w in found["weightings"] if w["name"] == name)
    m_x, density = EXPECTED[name]
    assert np.allclose(found["lambda"], LAMBDA)
    assert np.allclose(row["m_x"], m_x, rtol=2e-3)
    # A table's first steps are wide apart, and the density between two of them is a matter of how they are joined.
    table = row["schedule"] == "ddpm"
    inside, tolerance = (slice(2, 64), 0.05) if table else (slice(None), 0.01)
    w, shown = density * m_x / SNR, np.array(row["w"])
    assert shown.max() == 1
    assert np.allclose(shown[inside], np.maximum(w * shown[40] / w[40], 1e-12)[inside], rtol=tolerance)


def test_edm2_is_edm_over_its_learned_loss(found: Any) -> None:
    row = next(w for w in found["weightings"] if w["name"] == "edm2")
    u = np.array(row["u"])
    assert u.shape == (81,)
    assert np.ptp(u) > 0.1
    assert np.allclose(row["m_x"], EDM * np.exp(-u), rtol=2e-3)
    w = logit_normal(-0.4, 1.0) * EDM / SNR * np.exp(-u)
    assert np.allclose(row["w"], np.maximum(w / w.max(), 1e-12), rtol=0.01)


def test_every_weighting_is_held_against_a_formula(found: Any) -> None:
    assert {w["name"] for w in found["weightings"]} == {*EXPECTED, "edm2"}


# --- what was recorded ------------------------------------------------------------------------------------------------


def test_the_true_spiral_is_archimedes(found: Any) -> None:
    x, y = np.array(found["dynamics"]["spiral"]["truth"]).T / 100
    radius = np.hypot(x, y)
    # r = 2θ/(4.5π): the direction follows from the radius.
    theta = radius * 4.5 * math.pi / 2
    assert np.abs(np.stack([x - radius * np.cos(theta), y - radius * np.sin(theta)])).max() < 0.08
    assert radius[0] == pytest.approx(2 / 9, abs=0.01)
    assert radius[-1] == pytest.approx(2, abs=0.01)


def test_no_network_beats_the_best_denoiser(found: Any) -> None:
    """The posterior mean has the least error there is; on 512 points others beat it by a little, by chance."""
    spiral = found["dynamics"]["spiral"]
    for dim, row in spiral["runs"].items():
        ideal = np.array(spiral["ideal_by_dim"][dim])
        assert (np.diff(ideal) > 0).all()
        assert ideal[-1] == pytest.approx(1, abs=0.05)
        for run in row.values():
            assert (np.array(run["error_by_level"]) > 0.97 * ideal).all()
            at = spiral["levels"].index(spiral["level"])
            assert run["error"] == [errors[at] for errors in run["error_by_level"]]


def test_the_believed_x0_follows_from_the_raw_output(found: Any) -> None:
    """x0 = (q x_t − σ y)/Δ on the straight path, to the rounding of bytes, where none of the three is cut off."""
    sampling = found["sampling"]
    t = np.array(sampling["t"])[None, :, None]
    rows = {"x0": (1, 0 * t), "eps": (0 * t, 1), "v": (-t, 1 - t), "velocity": (-1, 1)}
    assert set(sampling["runs"]) == set(rows)
    for name, run in sampling["runs"].items():
        x, x0, y = decoded(run["x"]), decoded(run["x0"]), decoded(run["raw"], 2.0)
        assert x.shape == x0.shape == y.shape == (6, 21, 64)
        p, q = rows[name]
        delta = (1 - t) * q - t * p
        with np.errstate(divide="ignore", invalid="ignore"):
            expected = np.where(t > 0, (q * x - t * y) / delta, x)
            slack = (np.abs(q) * 0.5 + t) / np.abs(delta) / 127.5 + 0.5 / 127.5
        inside = (np.abs(x) < 0.99) & (np.abs(x0) < 0.99) & (np.abs(y) < 1.98)
        slack = np.broadcast_to(np.where(t > 0, slack, 1.01 / 127.5), x.shape)
        assert inside.mean() > 0.1
        assert (np.abs(expected - x0) <= slack + 1e-3)[inside].all(), name


def test_a_map_of_confidence_says_where_the_errors_are(found: Any) -> None:
    confidence = found["confidence"]
    assert len(confidence["examples"]) == 12
    for example in confidence["examples"]:
        assert all(len(example[k]) == 64 for k in ("x0", "x_t", "mean", "std", "error"))
        error = np.abs(decoded(example["mean"]) - decoded(example["x0"])) / confidence["full_scale"] * 255
        shown = np.array(example["error"])
        unclipped = (shown < 255) & (np.abs(decoded(example["mean"])) < 0.99)
        assert np.abs(shown - error)[unclipped].max() <= 4  # two roundings of 1/255
    for level in confidence["reliability"]:
        assert len(level["stated"]) == len(level["found"]) == 10
        assert level["stated"] == sorted(level["stated"])


def test_what_is_recorded_is_what_the_code_makes(found: Any, maker: ModuleType) -> None:
    formulas = maker.formulas
    u = torch.tensor(next(w for w in found["weightings"] if w["name"] == "edm2")["u"], dtype=torch.float64)
    for key, value in (
        ("digits", formulas.scans()),
        ("noise", formulas.noise()),
        ("schedules", formulas.schedules()),
        ("weightings", formulas.weightings(u)),
    ):
        assert found[key] == value, key
    assert found["dynamics"]["digits"]["floor"] == maker.runs.digits_floor()
    results = maker.results
    assert found["results"]["published"] == results.PUBLISHED
    rows = {row["id"]: row for row in found["results"]["rows"]}
    assert {name: row["claim"] for name, row in rows.items() if name in results._CLAIMS} == results._CLAIMS
    for made in (results._one_loss(), results._conversion(), results._amplification()):
        assert (rows[made["id"]]["claim"], rows[made["id"]]["numbers"].keys()) == (
            made["claim"],
            made["numbers"].keys(),
        )
    assert rows["amplification"] == results._amplification()
    noted = (found["dynamics"]["digits"], found["sampling"], found["confidence"])
    assert [part["note"] for part in noted] == [results.DIGITS_NOTE, results.SAMPLING_NOTE, results.CONFIDENCE_NOTE]


def test_every_command_names_runs_that_exist(found: Any, maker: ModuleType) -> None:
    names = set(maker.jobs())
    rows = found["results"]["rows"]
    assert len({row["id"] for row in rows}) == len(rows)
    parts = [*rows, found["dynamics"]["digits"], found["dynamics"]["digits"]["narrow"], found["dynamics"]["spiral"]]
    for part in [*parts, found["sampling"], found["confidence"]]:
        program, _, only = part["command"].partition(" --only ")
        assert program == "python docs/lesson/data.py"
        assert set(only.split()) <= names
        assert part.get("numbers", True)


def test_what_was_made_is_not_made_again(maker: ModuleType, tmp_path: Path) -> None:
    job = maker.Job("edm2_run", {"steps": 1})
    (tmp_path / job.file).write_text('{"from": "the cache"}')
    assert maker.made({"one": job}, tmp_path, 1) == {"one": {"from": "the cache"}}
    assert maker.Job("edm2_run", {"steps": 2}).file != job.file
    assert maker.Job("confidence_run", {"steps": 1}).file != job.file


def test_a_misspelt_run_is_named(maker: ModuleType, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["data.py", "--only", "wide-x1", "--cache", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stopped:
        maker.main()
    assert stopped.value.code == 2
    assert "wide-x1" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# --- every claim of the summary, held against its own numbers ---------------------------------------------------------


@pytest.fixture(scope="module")
def numbers(found: Any) -> dict[str, Any]:
    return {row["id"]: row["numbers"] for row in found["results"]["rows"]}


def test_the_two_losses_are_one(numbers: Any) -> None:
    assert numbers["one-loss"]["off_snr"] < 1e-13
    assert numbers["one-loss"]["off_converted"] < 1e-13
    assert numbers["conversion"]["float64"] < 1e-12
    assert numbers["conversion"]["float32"] < 1e-3


def test_amplification_is_its_formula(numbers: Any) -> None:
    t = np.array(numbers["amplification"]["t"])
    expected = {"x0": 1 + 0 * t, "eps": t / (1 - t), "v": t / ((1 - t) ** 2 + t**2), "velocity": t}
    for name, column in expected.items():
        assert np.allclose(numbers["amplification"]["in_x0"][name], column, rtol=5e-3)
    every = np.linspace(0, 1, 10_001)
    assert (every / ((1 - every) ** 2 + every**2)).max() == pytest.approx(1.21, abs=0.005)


def test_width_decides(numbers: Any) -> None:
    narrow, wide = numbers["digits-narrow"]["frechet"], numbers["digits-wide"]["frechet"]
    assert all(narrow[t] > 3 * narrow["x0"] for t in ("v", "velocity", "eps"))
    assert narrow["eps"] > 1000 * narrow["x0"]
    assert all(wide["x0"] < wide[t] < 2 * wide["x0"] for t in ("v", "velocity"))
    assert wide["eps"] > 50 * wide["x0"]
    assert all(wide[t] < narrow[t] / 3 for t in TARGETS)


def test_no_loss_rescues_a_prediction(numbers: Any) -> None:
    grid = numbers["digits-losses"]["frechet"]
    others = [value for target, row in grid.items() if target != "x0" for value in row.values()]
    assert max(grid["x0"].values()) < min(others)


def test_little_noise_is_the_other_way_round(numbers: Any, found: Any) -> None:
    error = numbers["low-noise"]["error"]
    assert numbers["low-noise"]["t"] == found["dynamics"]["digits"]["levels"][0]
    assert all(error[t] < 0.7 * error["x0"] for t in ("eps", "v", "velocity"))


def test_what_eps_implies_at_first_is_far_off(numbers: Any) -> None:
    away = numbers["sampling"]["away"]
    assert numbers["sampling"]["away"]["eps"] > 10 * max(away[t] for t in ("x0", "v", "velocity"))


def test_samples_of_x0_are_nearer_to_scans_trained_on_than_to_others(numbers: Any) -> None:
    nearer = {t: 1 - numbers["copying"]["trained_on"][t] / numbers["copying"]["held_out"][t] for t in TARGETS}
    assert nearer["x0"] > 0.05
    assert all(0 < nearer[t] < 0.02 for t in ("v", "velocity"))


def test_the_plane_is_kept_or_left(numbers: Any) -> None:
    plane, space = numbers["spiral-2"]["runs"], numbers["spiral-512"]["runs"]
    assert all(run["off_manifold"] < 1e-9 for run in plane.values())
    assert all(run["manifold_distance"] < 0.5 * numbers["spiral-2"]["blind"] for run in plane.values())
    assert space["x0"]["off_manifold"] < 0.05
    assert space["velocity"]["off_manifold"] > 5
    assert space["eps"]["off_manifold"] > 50


def test_stated_and_real_errors_agree(numbers: Any, found: Any) -> None:
    for level in numbers["confidence"]["levels"]:
        assert 0.8 < level["z2"] < 1.25
        assert level["correlation"] > 0.5
        assert level["beyond_position"] > 0.2
        assert level["between_scans"] > 0.2
        assert level["inside_50"] == pytest.approx(0.5, abs=0.1)
        assert level["inside_90"] == pytest.approx(0.9, abs=0.05)
    for level in found["confidence"]["reliability"]:
        assert level["found"][-1] > 3 * level["found"][0]
