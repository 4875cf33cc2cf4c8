"""benchmarks/scale.py as a command: assumptions that cannot be are refused before anything is counted."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scale.py"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--peak", "0"], "argument --peak: expected a finite number above 0, found 0"),
        (["--link", "-1"], "argument --link: expected a finite number above 0, found -1"),
        (["--reading", "nan"], "argument --reading: expected a finite number above 0, found nan"),
        (["--bandwidth", "inf"], "argument --bandwidth: expected a finite number above 0, found inf"),
        (["--node", "0"], "argument --node: expected a finite number above 0, found 0"),
        (["--node", "1.5"], "argument --node: invalid int value: '1.5'"),
        (["--latency", "-1"], "argument --latency: expected a finite number of at least 0, found -1"),
        (["--fraction", "2"], "argument --fraction: expected a part of the peak, at most 1, found 2"),
        (["--latency", "0", "--launch", "0", "nonesuch"], "unknown recipe 'nonesuch'"),
    ],
)
def test_wrong_arguments_are_errors_of_the_user(monkeypatch, capsys, args, message):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *args])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert left.value.code == 2
    assert message in capsys.readouterr().err
