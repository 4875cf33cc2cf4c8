"""reparam check: the verdict on a target, from a name, a row or a file."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import reparam as rp
from reparam.cli import main
from reparam.errors import NetworkError, ReparamError, UnknownName

DATA = Path(__file__).parent / "data"
FILES = {
    "eps_target": "consistent",
    "mix_target": "consistent",
    "scaled_eps_target": "consistent",
    "rotated_v_target": "consistent",
    "tilted_eps_target": "consistent",
    "inconsistent_target": "inconsistent",
    "cubed_target": "inconsistent",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_gets_its_verdict_and_exit_code(name, capsys):
    code = main(["check", str(DATA / f"{name}.py"), "--json"])
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["verdict"] == FILES[name]
    assert code == (0 if FILES[name] == "consistent" else 1)
    assert "running your code" in captured.err
    assert len(found["inverse_error"]) == len(found["times"]) == 65
    if FILES[name] == "consistent":
        assert found["max_inverse_error"]["float64"] < 1e-9
        assert found["minimiser_error"] < 1e-6
        assert found["singular_times"] == []


def test_an_inconsistent_file_is_told_where_and_by_how_much(capsys):
    assert main(["check", str(DATA / "inconsistent_target.py")]) == 1
    told = capsys.readouterr().out
    assert told.startswith("inconsistent: x0 does not come back from the target: at t = ")
    assert "at 65 of 65 times" in told
    # Off by 2 of its size where the sign turns x0 around.
    assert rp.check(str(DATA / "inconsistent_target.py")).max_inverse_error["float64"] == pytest.approx(2, abs=0.05)


def test_a_target_whose_mean_is_not_the_mean_is_told():
    found = rp.check(str(DATA / "cubed_target.py"))
    assert "does not learn to denoise" in found.reason
    assert found.max_inverse_error["float64"] < 1e-9
    assert found.minimiser_error > 0.05
    assert found.amplification is None
    assert "not p*x0 + q*eps" in found.notes[0]


@pytest.mark.parametrize(
    ("target", "schedule", "t_range", "verdict", "singular"),
    [
        ("x0", "rectified_flow", None, "consistent", []),
        ("v", {"name": "ddpm", "zero_terminal_snr": True}, None, "consistent", []),
        ("edm", "ve", None, "consistent", []),
        ("p=-sigma,q=alpha", "cosine", None, "consistent", []),
        ("eps", "ddpm", None, "consistent", []),
        ("eps", {"name": "ddpm", "zero_terminal_snr": True}, None, "singular", [1.0]),
        ("eps", "rectified_flow", None, "singular", [1.0]),
        ("eps", "rectified_flow", (0.0, 0.98), "consistent", []),
        ("score", "cosine", None, "singular", [0.0, 1.0]),
        ("score", "cosine", (0.01, 0.98), "consistent", []),
        ("p=-1,q=-0.5", "rectified_flow", None, "singular", [1 / 3]),
    ],
)
def test_singular_only_where_a_singular_time_is_in_range(target, schedule, t_range, verdict, singular):
    found = rp.check(target, schedule, t_range=t_range)
    assert found.verdict == verdict, found.text()
    assert found.singular_times == pytest.approx(singular, abs=1e-9)
    json.dumps(found.to_dict())


def test_what_is_said_of_a_target_is_right():
    found = rp.check("eps", "rectified_flow", t_range=(0.0, 0.98))
    assert found.amplification == pytest.approx(0.98 / 0.02, rel=1e-9)
    assert min(d for d in found.delta) == pytest.approx(0.02)
    assert "x0 is x_t/alpha whatever is predicted" in found.ends["data"]
    assert "does not follow" in found.ends["noise"]
    log_snr, weight = found.x0_weight[2]
    assert weight == pytest.approx(2.718281828**log_snr, rel=0.02)  # the noise weighs x0 by the SNR
    assert found.max_inverse_error["float64"] < found.max_inverse_error["float32"] < found.max_inverse_error["bfloat16"]


@pytest.mark.parametrize("target", ["eps", "v", "x0", "velocity"])
def test_the_effective_weight_of_the_plain_loss_on_the_linear_path(target):
    """w(λ) = p(λ) m_ε(λ), by hand for uniform times: dλ/dt = −2/(t(1 − t)) there."""
    found = rp.check(target, "rectified_flow", t_range=(0.0, 0.98) if target == "eps" else None)
    t, log_snr, w = torch.tensor(found.effective_weight, dtype=torch.float64).unbind(1)
    torch.testing.assert_close(log_snr, 2 * ((1 - t) / t).log())
    own = {"eps": 1 - t, "x0": -t, "v": (1 - t) ** 2 + t**2, "velocity": 1.0}[target]  # Δ of the target; of ε it is α
    density = t * (1 - t) / 2 / (0.98 if target == "eps" else 1.0)
    torch.testing.assert_close(w, density * (own / (1 - t)) ** 2)
    assert len(t) > 60


def test_the_plot_is_a_drawing(tmp_path, capsys):
    assert main(["check", "v", "--plot", str(tmp_path / "a.svg")]) == 0
    drawing = (tmp_path / "a.svg").read_text()
    assert drawing.startswith("<svg xmlns=")
    ElementTree.fromstring(drawing)
    assert "Error of x0 after target and inverse" in drawing
    assert "w(log-SNR)" in drawing
    heights = [
        float(y) for path in re.findall(r'<path d="(M[^"HZ]*L[^"]*)"', drawing) for y in re.findall(r" ([-\d.]+)", path)
    ]
    assert len(heights) > 100
    assert min(heights) >= 0
    assert max(heights) <= 212  # inside the axes: an error of 1e-16 is seen


def test_a_target_as_a_recipe_writes_it(capsys):
    told = []
    for target in ('{name: linear, p: "-sigma", q: alpha}', "p=-sigma,q=alpha"):
        assert main(["check", target, "--schedule", "cosine", "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1]
    assert main(["check", "{name: linear, p: -sigma"]) == 2


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        ("vv", UnknownName, "unknown target 'vv'"),
        ("p=1", ReparamError, "p=…,q=…"),
        ("p=1,r=2", ReparamError, "p=…,q=…"),
        ("gone.py", NetworkError, "no Python file gone.py"),
    ],
)
def test_bad_targets(target, error, words):
    with pytest.raises(error, match=words):
        rp.check(target)


def test_a_basis_comes_from_data_by_one_command(tmp_path, capsys):
    pytest.importorskip("sklearn")
    out = tmp_path / "basis.safetensors"
    assert (
        main(["basis", "{name: digits, pictures: true}", "--patch", "4", "--rank", "3", "--out", str(out), "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["shape"] == [16, 3]
    kind = rp.target({"name": "in_basis", "basis": str(out), "inside": "velocity", "outside": "x0"})
    assert kind.basis.digest == found["digest"]
    settings = [
        "--set",
        "data={name: digits, pictures: true}",
        "--set",
        "network={name: jit, patch: 4, width: 16, depth: 2, heads: 2, bottleneck: 8}",
    ]
    settings += [
        "--set",
        f"target={{name: in_basis, basis: {out}}}",
        "--set",
        "conditional=false",
        "--set",
        "sample={n: 20, steps: 3}",
    ]
    settings += ["--set", "train={steps: 5, batch: 16, warmup: 1}"]
    assert main(["study", "digits-jit", "--out", str(tmp_path / "study"), *settings]) == 0
    model = next((tmp_path / "study").glob("*/model.safetensors"))
    assert rp.load(model).target == kind  # the basis travels with the weights
    assert main(["basis", "digits", "--rank", "65", "--out", str(out)]) == 2
    assert "1 … 64" in capsys.readouterr().err
