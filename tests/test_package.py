"""What is shipped: the wheel builds, installs elsewhere and works; house rules hold."""

import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import reparam

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(folder),
            str(ROOT),
        ],
        check=True,
    )
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_everything(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    recipes = [f"recipes/{name}.yaml" for name in ("spiral", "digits", "digits-jit", "cifar10-patch16", "folder")]
    for name in ("py.typed", *recipes, "studies/worker.py", "cli.py"):
        assert f"reparam/{name}" in names
    assert any(n.startswith("reparam/report/") and n.endswith(".html") for n in names)
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert not any(n.startswith(("tests", "runs", "benchmarks")) for n in names)


def test_the_wheel_installs_and_works(wheel, tmp_path):
    """In an environment of its own, beside this one's torch, away from the checkout."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    here = (
        Path(sys.modules["torch"].__file__).parents[1]
        if "torch" in sys.modules
        else Path(__import__("torch").__file__).parents[1]
    )
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    (site / "rest.pth").write_text(f"{here}\n")
    where = subprocess.run(
        [python, "-c", "import reparam; print(reparam.__file__, reparam.__version__)"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    ).stdout
    assert str(site) in where
    assert reparam.__version__ in where
    small = [
        "data.dim=2",
        "data.size=200",
        "network.hidden=8",
        "train.steps=3",
        "train.batch=8",
        "sample.n=8",
        "sample.steps=2",
    ]
    done = subprocess.run(
        [tmp_path / "env" / "bin" / "reparam", "study", "spiral", *[w for s in small for w in ("--set", s)]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "spiral" / "report.html").exists()


def test_versions_agree():
    cff = (ROOT / "CITATION.cff").read_text()
    assert f"version: {reparam.__version__}" in cff
    assert f"[{reparam.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_names_every_command_and_no_other():
    readme = (ROOT / "README.md").read_text()
    from reparam.cli import _parser

    commands = set(next(a for a in _parser()._actions if a.dest == "command").choices)
    assert set(re.findall(r"^\| `reparam (\w+)", readme, flags=re.M)) == commands
