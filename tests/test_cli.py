"""The command line: exit codes, messages without tracebacks, and speed."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from reparam.cli import main


def fails(capsys, *args):
    code = main(list(args))
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == "" or "study" in captured.out
    assert "Traceback" not in captured.err
    return captured.err


def nan_file(tmp_path):
    x = np.ones((20, 2)) * np.arange(20)[:, None]
    x[3, 1] = np.nan
    np.save(tmp_path / "nan.npy", x)
    return f"data={tmp_path / 'nan.npy'}"


BAD = {
    "target": (["--set", "target=x1"], ["unknown target 'x1'", "x0"]),
    "key": (["--set", "trian.steps=3"], ["unknown key 'trian'", "'train'"]),
    "type": (["--set", "train.steps=lots"], ["train.steps", "'lots'"]),
    "singular": (["--set", "target=eps"], ["t = 1", "t_range: [0, 0.98]"]),
    "loss space and weighting": (["--set", "weighting=x0"], ["loss_space", "weighting", "Remove one"]),
    "missing data": (["--set", "data=gone.npy"], ["no file gone.npy", "data.path"]),
    "empty data path": (["--set", "data={name: array, path: ''}"], ["needs data.path"]),
    "jobs": (["--jobs", "0"], ["--jobs must be at least 1, found 0"]),
    "device": (["--device", "abacus"], ["device 'abacus' cannot be used"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_to_study(capsys, tmp_path, case):
    args, messages = BAD[case]
    told = fails(capsys, "study", "digits", "--out", str(tmp_path / "out"), *args)
    assert told.startswith("error: ")
    for message in messages:
        assert message in told
    assert not (tmp_path / "out" / "study.json").exists()


def test_more_bad_input(capsys, tmp_path):
    out = str(tmp_path / "out")
    assert "Did you mean 'digits'" in fails(capsys, "study", "digit")
    assert "first at index [3, 1]" in fails(capsys, "study", "digits", "--out", out, "--set", nan_file(tmp_path))
    np.save(tmp_path / "flat.npy", np.arange(9.0))
    assert "one sample a row" in fails(
        capsys, "study", "digits", "--out", out, "--set", f"data={tmp_path / 'flat.npy'}"
    )
    (tmp_path / "file").write_text("")
    assert "Choose another folder with --out" in fails(capsys, "study", "digits", "--out", str(tmp_path / "file" / "x"))
    assert "no file" in fails(capsys, "show", out)
    assert "no file" in fails(capsys, "sample", out)
    assert "holds no finished study" in fails(capsys, "report", str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder(capsys, tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in fails(capsys, "study", "digits", "--out", str(tmp_path / "x"))


def test_weights_without_a_spec_are_refused(capsys, tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "bare.safetensors")
    told = fails(capsys, "show", str(tmp_path / "bare.safetensors"))
    assert "does not say what its network predicts" in told
    assert "rp.load(path, spec=...)" in told
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04not safetensors")
    assert "not a readable safetensors file" in fails(capsys, "show", str(tmp_path / "pickle.safetensors"))


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="unknown recipe"):
        main(["study", "nothing", "--debug"])


@pytest.mark.parametrize("args", [["--nope"], ["stduy"], ["sample"], []])
def test_usage_errors_exit_with_2(capsys, args):
    with pytest.raises(SystemExit) as left:
        main(args)
    assert left.value.code == 2
    assert "--help" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["study", "sample", "report", "show"])
def test_every_command_has_help_with_an_example(capsys, command):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"Example: reparam {command}" in capsys.readouterr().out


def test_recipes_as_json(capsys):
    assert main(["study", "--json"]) == 0
    assert {"spiral", "digits"} <= json.loads(capsys.readouterr().out)["recipes"].keys()


def seconds(code_or_args):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(code_or_args, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return sorted(times)[1]


def test_importing_and_help_are_fast():
    bare = seconds([sys.executable, "-c", "pass"])
    ours = seconds([sys.executable, "-c", "import reparam"])
    assert ours - bare < 0.1
    assert seconds([sys.executable, "-m", "reparam.cli", "--help"]) < 0.5
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            "import reparam.cli, sys; print(sorted(m for m in ('torch', 'numpy') if m in sys.modules))",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    assert loaded.stdout.strip() == "[]"


def test_the_core_needs_only_torch_numpy_and_safetensors():
    code = (
        "import sys\n"
        "for name in ('yaml', 'pydantic', 'tqdm', 'sklearn', 'scipy', 'diffusers'): sys.modules[name] = None\n"
        "import torch, reparam as rp\n"
        "net = rp.networks.MLP(3, 8, 2)\n"
        "d = rp.Objective('rectified_flow', 'velocity').denoiser(net)\n"
        "rp.save(d, sys.argv[1]); x = rp.sample(rp.load(sys.argv[1]), (2, 3), steps=2)\n"
        "rp.metrics.frechet_distance(torch.zeros(1), torch.eye(1), torch.zeros(1), torch.eye(1))\n"
    )
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", code, f"{folder}/m.safetensors"], check=True)
