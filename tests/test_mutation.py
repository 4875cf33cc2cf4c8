"""Every chosen mutant of the mathematics is noticed by a test (slow), and the script can tell one that is not."""

import ast
import subprocess
import sys

import pytest

import mutation
from mutation import EQUIVALENT, FEWEST, PACKAGE, PLAN, ROOT, SKIPPED, candidates, chosen, main


def test_there_are_enough_and_each_is_another_program():
    found = chosen(candidates(ROOT, PLAN))
    assert len(found) >= FEWEST
    assert {m.module for m in found} == set(PLAN)
    assert len({(m.module, m.begin, m.end, m.after) for m in found}) == len(found)
    for m in found:
        source = (ROOT / PACKAGE / m.module).read_bytes()
        assert ast.unparse(ast.parse(source[m.begin : m.end])) == m.before
        mutated = m.applied(source)
        compile(mutated, m.name, "exec")
        assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(source)), m.name


def test_exceptions_are_of_what_there_is():
    keys = {m.key for m in candidates(ROOT, PLAN)}
    for key, reason in EQUIVALENT.items():
        assert key in keys, f"no such mutant any more: {key}"
        assert reason
    for module, functions in SKIPPED.items():
        text = (ROOT / PACKAGE / module).read_text()
        assert all(f"def {f.split('.')[-1]}(" in text for f in functions)


SOURCE = '''
def step(x, at, alpha, p, q, names):
    """a - b, which is no formula."""
    if x.ndim - 1 > 2:
        raise ValueError(f"{x.ndim - 1} is not {2 * 3}")
    y = x[len(x) - 1].reshape(-1, *[1] * (x.ndim - 1))
    scale = -at.here.sigma**2 if alpha - 1 else 3
    return scale + p / y
'''


def mini(tmp_path, source, test):
    """A package of that name with one module, and its test."""
    (tmp_path / PACKAGE).mkdir(parents=True)
    (tmp_path / PACKAGE / "__init__.py").write_text("")
    (tmp_path / PACKAGE / "formulas.py").write_text(source)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_formulas.py").write_text(test)
    return {"root": tmp_path, "plan": {"formulas.py": ("tests/test_formulas.py",)}}


def test_formulas_are_changed_and_nothing_else(tmp_path):
    found = candidates(**mini(tmp_path, SOURCE, ""))
    assert {(m.before, m.after) for m in found} == {
        ("-at.here.sigma ** 2", "at.here.sigma ** 2"),
        ("at.here.sigma ** 2", "at.here.sigma"),
        ("at.here.sigma", "at.here.alpha"),
        ("at.here", "at.to"),
        ("scale + p / y", "scale - p / y"),
        ("p / y", "p * y"),
        ("p", "q"),
    }


def test_the_choice_does_not_depend_on_where_the_lines_stand(tmp_path):
    before = candidates(**mini(tmp_path / "before", SOURCE, ""))
    after = candidates(**mini(tmp_path / "after", f"def other():\n    return None\n\n{SOURCE}", ""))
    assert [m.key for m in chosen(before)] == [m.key for m in chosen(after)]
    assert [m.line + 3 for m in chosen(before)] == [m.line for m in chosen(after)]


FORMULAS = """\
def checked(a, b):
    return a - b


def unchecked(a, b):
    return a - b
"""
TEST = "from reparam.formulas import checked\n\ndef test_difference():\n    assert checked(3, 1) == 2\n"


def test_a_formula_without_a_test_is_reported(tmp_path, capsys, monkeypatch):
    case = mini(tmp_path, FORMULAS, TEST)
    monkeypatch.setattr(mutation, "FEWEST", 2)
    assert main([], **case) == 1
    printed = capsys.readouterr().out
    assert "formulas.py:2 checked: a - b -> a + b  [test_formulas.py::test_difference, " in printed
    assert "survives: formulas.py:6 unchecked: a - b -> a + b" in printed
    assert "1 of 2 killed" in printed
    assert main(["--only", " checked"], **case) == 0
    assert (tmp_path / PACKAGE / "formulas.py").read_text() == FORMULAS


def test_too_few_mutants_and_failing_tests_are_failures(tmp_path, capsys):
    case = mini(tmp_path / "few", FORMULAS, TEST)
    assert main(["--only", " checked"], **case) == 1
    assert f"only 2 mutants were generated, at least {FEWEST}" in capsys.readouterr().out
    assert main(["--only", "nothing like it"], **case) == 2
    assert main([], **mini(tmp_path / "wrong", FORMULAS, TEST.replace("== 2", "== 3"))) == 2
    assert "without a mutant, test_formulas.py::test_difference fails" in capsys.readouterr().err
    assert main([], **mini(tmp_path / "none", FORMULAS, "")) == 2
    assert "pytest ended with 5" in capsys.readouterr().err


def test_a_module_that_cannot_be_imported_is_noticed(tmp_path, capsys):
    case = mini(
        tmp_path,
        "HALF = 1 / (1 + 1)\n",
        "from reparam.formulas import HALF\n\ndef test_half():\n    assert HALF == 0.5\n",
    )
    case["plan"] = {"formulas.py": ("tests/test_formulas.py::test_half",)}
    assert main(["--only", "1 - 1"], **case) == 1
    printed = capsys.readouterr().out
    assert "1 of 1 killed" in printed
    assert "[test_formulas.py, " in printed


@pytest.mark.slow
def test_every_mutant_is_killed():
    done = subprocess.run([sys.executable, mutation.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
