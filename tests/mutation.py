"""Do the tests notice a wrong formula? Every mutant is the mathematics with one thing wrong.

A mutant flips a sign, exchanges × and ÷, drops a square, or exchanges one of a pair of names: α and σ, p and q, or
the two ends of a step. Each runs in a copy of ``src`` against the tests of its module, and at least one test must
fail. Of all that could be changed a few are chosen, spread over modules, functions and kinds of changes, by a hash of
what is changed: the same every time, wherever the lines stand.

    python tests/mutation.py [--list] [--only SUBSTRING] [--jobs N]

Exit code: 0 if every mutant is killed, 1 if one survives or there are fewer than 40, 2 if the tests do not run.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("src/reparam")

#: Everything that asks samplers a question, the quickest to notice an error first.
SAMPLERS = (
    *(
        f"tests/test_samplers.py::test_{name}"
        for name in (
            "ancestral_between_neighbours_of_a_table_is_ddpm",
            "eta_one_is_the_ancestral_step_of_small_variance_and_sde_dpmpp_without_memory",
            "ddim_propagates_mean_and_covariance_as_derived",
            "edm_is_algorithm_2",
            "multistep_remembers_one_step_and_steps_of_infinite_length_are_first_order",
            "grids_are_even_in_what_they_say",
            "karras_grid_is_edms",
            "table_grids_keep_to_integer_steps",
            "dynamic_thresholds_are_imagens",
            "euler_and_heun_take_the_slopes_of_the_ode_where_they_should",
            "churn_raises_the_noise_level_by_at_most_the_square_root_of_two",
            "inversion_starts_from_data_of_any_scale",
            "elementwise_noise",
            "noise_and_dtype",
            "the_table_of_a_grid_changes_nothing",
            "from_zero_terminal_snr",
            "the_oracle_takes_the_same_way_through_any_target",
            "stochastic_samplers_carry_mean_and_covariance_at_their_order",
            "measured_order_is_the_declared_one",
        )
    ),
    *("-k", "not mixture"),  # the order on Gaussian data will do
)
TARGETS = ("tests/test_algebra.py", "tests/test_targets.py")
#: The modules that hold formulas, and the tests that answer for them.
PLAN: dict[str, tuple[str, ...]] = {
    "targets/core.py": TARGETS,
    "targets/linear.py": TARGETS,
    "targets/basis.py": TARGETS,
    "schedules.py": ("tests/test_schedules.py", "tests/test_paths.py", "tests/test_algebra.py"),
    "objective.py": ("tests/test_objective.py", "tests/test_algebra.py"),
    "weightings.py": ("tests/test_weightings.py",),
    "times.py": ("tests/test_times.py", "tests/test_objective.py"),
    "denoiser.py": ("tests/test_objective.py", *(test for test in SAMPLERS if "order" not in test)),
    **{
        f"samplers/{name}.py": SAMPLERS for name in ("ddim", "dpm", "grids", "ode", "sampling", "steps", "thresholding")
    },
    "guidance.py": ("tests/test_guidance.py",),
    "likelihood.py": ("tests/test_likelihood.py",),
}

#: Fewer than these are a failure: something has gone wrong with finding them.
FEWEST = 40
#: At most so many are chosen.
PER_FUNCTION = 2
PER_MODULE = 6

#: Mutants that cannot change a result: (module, function, before, after) and why.
EQUIVALENT: dict[tuple[str, str, str, str], str] = {
    (
        "targets/linear.py",
        "_function",
        "entry(*aligned(t, s.alpha(t), s.sigma(t))) + aligned(t, torch.zeros_like(t), s.sigma(t))[0]",
        "entry(*aligned(t, s.alpha(t), s.sigma(t))) - aligned(t, torch.zeros_like(t), s.sigma(t))[0]",
    ): "the second term is 0: it gives the sum its shape",
}

#: Functions without a formula: they search by bisection, check, or word an error.
SKIPPED = {
    "targets/core.py": {"Target._zero_between"},
    "targets/basis.py": {"Basis.__post_init__"},
    "schedules.py": {"Path._time_at"},
    "times.py": {"Mode.cdf"},
    "denoiser.py": {"suggested"},
}

#: Names that are exchanged, as a name or as an attribute (also with an underscore in front).
COEFFICIENTS = (("alpha", "sigma"), ("alpha_dot", "sigma_dot"))
#: Names that are exchanged where both are names of the function.
ROWS = (("p", "q"), ("p2", "q2"))
ENDS = (("here", "to"), ("start", "end"), ("first", "last"), ("p", "p2"), ("q", "q2"))

#: Calls whose arguments are shapes, counts and bounds, or that check.
NOT_FORMULAS = {
    "_refuse_infinite", "any", "arange", "clamp", "expand", "full_like", "isinstance", "linspace", "number", "permute",
    "range", "reshape",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change to one module; ``begin`` and ``end`` are positions in its bytes."""

    module: str
    function: str
    line: int
    kind: str
    before: str
    after: str
    begin: int
    end: int

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.module, self.function, self.before, self.after

    @property
    def name(self) -> str:
        before, after = _excerpts(self.before, self.after)
        return f"{self.module}:{self.line} {self.function}: {before} -> {after}"

    def applied(self, source: bytes) -> bytes:
        return source[: self.begin] + f"({self.after})".encode() + source[self.end :]


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: the test that killed it, or None."""

    mutant: Mutant
    killed_by: str | None
    seconds: float


class Broken(Exception):
    """The tests cannot be run, or fail without a mutant."""


def _excerpts(before: str, after: str, width: int = 60) -> list[str]:
    """Both, about where they differ."""
    same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
    begin = max(0, same - width // 2)
    cut = [text[begin : begin + width] + "…" * (len(text) > begin + width) for text in (before, after)]
    return [f"…{text}" if begin else text for text in cut]


class _Finder(ast.NodeVisitor):
    """Collects what can be changed in the formulas of a module, and nothing else."""

    def __init__(self, module: str, source: bytes) -> None:
        self.module = module
        self.found: list[Mutant] = []
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.scope: list[str] = []
        self.names: set[str] = set()
        self.visit(ast.parse(source))

    def add(self, node: ast.expr, kind: str, after: str) -> None:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        begin = self.starts[node.lineno - 1] + node.col_offset
        end = self.starts[node.end_lineno - 1] + node.end_col_offset
        function = ".".join(self.scope) or "the module"
        self.found.append(Mutant(self.module, function, node.lineno, kind, ast.unparse(node), after, begin, end))

    # What is entered, and how.

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._scoped(node.name, node.body)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = self.names
        self.names = outer | {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | {a.arg for a in node.args.args}
        if ".".join([*self.scope, node.name]) not in SKIPPED.get(self.module, ()):
            self._scoped(node.name, node.body)
        self.names = outer

    def _scoped(self, name: str, body: Sequence[ast.AST]) -> None:
        self.scope.append(name)
        for part in body:
            self.visit(part)
        self.scope.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.visit(node.value)

    def visit_For(self, node: ast.For) -> None:
        for part in (node.iter, *node.body):
            self.visit(part)

    def visit_If(self, node: ast.If) -> None:
        for part in (*node.body, *node.orelse):
            self.visit(part)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.body)
        self.visit(node.orelse)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.visit(node.iter)

    def _pass_over(self, node: ast.AST) -> None:
        """Errors, checks and conditions are no formulas."""

    visit_Raise = visit_Assert = visit_Compare = visit_JoinedStr = _pass_over

    def visit_Call(self, node: ast.Call) -> None:
        self.visit(node.func)
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called not in NOT_FORMULAS:
            for argument in (*node.args, *(k.value for k in node.keywords)):
                self.visit(argument)

    # What is changed.

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if any(_counts(side) for side in (node.left, node.right)):
            return
        swapped: dict[type[ast.operator], tuple[str, ast.operator]] = {
            ast.Add: ("sign", ast.Sub()),
            ast.Sub: ("sign", ast.Add()),
            ast.Mult: ("quotient", ast.Div()),
            ast.Div: ("quotient", ast.Mult()),
        }
        if type(node.op) in swapped:
            kind, other = swapped[type(node.op)]
            self.add(node, kind, ast.unparse(ast.BinOp(node.left, other, node.right)))
        elif isinstance(node.op, ast.Pow) and isinstance(node.right, ast.Constant) and node.right.value == 2:
            self.add(node, "square", ast.unparse(node.left))
        for side in (node.left, node.right):
            if _is_minus(side) and isinstance(side.operand, ast.Constant):
                self.add(side, "sign", ast.unparse(side.operand))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if _is_minus(node) and not isinstance(node.operand, ast.Constant):
            self.add(node, "sign", ast.unparse(node.operand))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        for kind, pairs in (("coefficient", COEFFICIENTS), ("row", ROWS), ("end", ENDS)):
            for other in _partners(node.id, pairs):
                if other in self.names:
                    self.add(node, kind, other)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        at_ends = isinstance(node.value, ast.Name) and node.value.id == "at"
        for kind, pairs in (("coefficient", COEFFICIENTS), ("end", ENDS if at_ends else ())):
            for other in _partners(node.attr, pairs):
                self.add(node, kind, f"{ast.unparse(node.value)}.{other}")
        self.visit(node.value)


def _partners(name: str, pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    plain, mark = name.lstrip("_"), "_" if name.startswith("_") else ""
    for a, b in pairs:
        if plain in (a, b):
            yield mark + (b if plain == a else a)


def _is_minus(node: ast.expr) -> TypeGuard[ast.UnaryOp]:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)


def _counts(node: ast.expr) -> bool:
    """Lists, shapes, and lengths of sequences."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "len"
    if isinstance(node, ast.Subscript):
        node = node.value
    return isinstance(node, ast.List | ast.Tuple) or (
        isinstance(node, ast.Attribute) and node.attr in ("ndim", "shape")
    )


def candidates(root: Path, plan: Mapping[str, Sequence[str]]) -> list[Mutant]:
    """All that could be changed."""
    return [m for module in plan for m in _Finder(module, (root / PACKAGE / module).read_bytes()).found]


def chosen(everything: Sequence[Mutant]) -> list[Mutant]:
    """The mutants that are run: of every module a few, function by function, of kinds that are rare so far first."""
    picked: list[Mutant] = []
    for module in dict.fromkeys(m.module for m in everything):
        own = [m for m in everything if m.module == module and m.key not in EQUIVALENT]
        used = {"quotient": 2}  # × for ÷ is the coarsest change
        taken: list[Mutant] = []
        for _ in range(PER_FUNCTION):
            for function in sorted({m.function for m in own}, key=_rank):
                left = [m for m in own if m.function == function and m not in taken]
                if left and len(taken) < PER_MODULE:
                    best = min(left, key=lambda m: (used.get(m.kind, 0), _rank(repr((m.kind, m.before, m.after)))))
                    used[best.kind] = used.get(best.kind, 0) + 1
                    taken.append(best)
        picked += sorted(taken, key=lambda m: (m.line, m.begin))
    return picked


def _rank(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


#: Exit code of a run that imported reparam from elsewhere.
ELSEWHERE = 99


class Copy:
    """A copy of ``src`` that the tests import from: one run of them at a time, in a process of its own."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        shutil.copytree(root / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))

    def start(self, tests: Sequence[str], mutant: Mutant | None, limit: float) -> None:
        """Runs ``tests`` on the original, or with one mutant in its place."""
        self.mutant = mutant
        if mutant is not None:
            self.path = self.folder / PACKAGE / mutant.module
            self.original = self.path.read_bytes()
            if ast.unparse(ast.parse(self.original[mutant.begin : mutant.end])) != mutant.before:
                raise Broken(f"{mutant.module} was edited meanwhile; run again")
            self.path.write_bytes(mutant.applied(self.original))
        self.process = CONTEXT.Process(target=_pytest, args=(self.root, self.folder, tests))
        self.begun = time.monotonic()
        self.deadline = self.begun + limit
        self.process.start()

    def running(self) -> bool:
        return self.process.is_alive() and time.monotonic() < self.deadline

    def result(self) -> tuple[str | None, float]:
        """The first test that failed (None: all passed), and the seconds."""
        seconds, overdue = time.monotonic() - self.begun, self.process.is_alive()
        self.process.kill()
        self.process.join()
        if self.mutant is not None:
            self.path.write_bytes(self.original)
        if overdue:
            return "the time limit", seconds
        if self.process.exitcode == 0:
            return None, seconds
        output = (self.folder / "output").read_text()
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        if failed is None or self.process.exitcode == ELSEWHERE:
            raise Broken(f"pytest ended with {self.process.exitcode}:\n{output[-3000:]}")
        return failed[1].removeprefix("tests/"), seconds


def _pytest(root: Path, copy: Path, tests: Sequence[str]) -> None:
    """In the new process: pytest, with reparam from the copy, which it checks."""
    with open(copy / "output", "w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.chdir(root)
    sys.path.insert(0, str(copy / "src"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "reparam"]:
        del sys.modules[name]  # of the process it is a copy of, where that was begun by somebody else
    sys.dont_write_bytecode = True  # a mutant as old and as long as the original would be taken for it
    os.environ.update(PYTHONPATH=str(copy / "src"), HYPOTHESIS_STORAGE_DIRECTORY=str(copy / "hypothesis"))
    import pytest

    options = ["-x", "-q", "-m", "not slow and not gpu and not data", "-p", "no:cacheprovider", "--tb=line"]
    code = pytest.main(["-o", "addopts=", *options, "--hypothesis-seed=0", *tests])
    sys.stdout.flush()
    imported = getattr(sys.modules.get("reparam"), "__file__", None)
    if imported is not None and not Path(imported).is_relative_to(copy):
        print(f"reparam was imported from {imported}, not from {copy}", flush=True)
        sys.exit(ELSEWHERE)
    sys.exit(int(code))


#: Processes start as copies of one that has imported what takes long to import, and nothing of reparam.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "pytest", "hypothesis"])

_Task = tuple[Sequence[str], "Mutant | None", float]


def _results(copies: Sequence[Copy], tasks: Sequence[_Task]) -> Iterator[tuple[_Task, str | None, float]]:
    """Every task and what became of it, as they come; as many at once as there are copies."""
    waiting, idle = list(reversed(tasks)), list(copies)
    busy: dict[Copy, _Task] = {}
    try:
        while waiting or busy:
            while waiting and idle:
                copy, task = idle.pop(), waiting.pop()
                copy.start(*task)
                busy[copy] = task
            multiprocessing.connection.wait([copy.process.sentinel for copy in busy], timeout=1)
            for copy in [copy for copy in busy if not copy.running()]:
                yield busy.pop(copy), *copy.result()
                idle.append(copy)
    finally:
        for copy in busy:
            copy.process.kill()
            copy.process.join()


def run(root: Path, plan: Mapping[str, Sequence[str]], mutants: Sequence[Mutant], jobs: int) -> Iterator[Outcome]:
    """Every mutant's outcome, as they come; first the tests without one.

    Raises:
        Broken: if they fail then, or cannot be run.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        copies = [Copy(root, Path(folder).resolve() / str(job)) for job in range(jobs)]
        limits = {}
        unmutated = [(names, None, math.inf) for names in dict.fromkeys(tuple(plan[m.module]) for m in mutants)]
        for (names, _, _), failed, seconds in _results(copies, unmutated):
            if failed is not None:
                raise Broken(f"without a mutant, {failed} fails")
            limits[names] = 60 + 3 * seconds
        tasks = [(plan[m.module], m, limits[tuple(plan[m.module])]) for m in mutants]
        for (_, mutant, _), killed_by, seconds in _results(copies, tasks):
            assert mutant is not None
            yield Outcome(mutant, killed_by, seconds)


def main(argv: Sequence[str] | None = None, root: Path = ROOT, plan: Mapping[str, Sequence[str]] = PLAN) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--only", metavar="SUBSTRING", default="", help="those whose line in the list contains this")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="how many run at once (default: 2)")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    everything = candidates(root, plan)
    mutants = chosen(everything)
    selected = [m for m in mutants if options.only in m.name]
    if options.list:
        print(*(m.name for m in selected), sep="\n")
        return 0
    if not selected:
        print(f"no mutant's line in the list contains {options.only!r}", file=sys.stderr)
        return 2
    print(f"{len(selected)} of {len(mutants)} mutants, chosen from {len(everything)}", flush=True)
    survivors = []
    try:
        for done in run(root, plan, selected, options.jobs):
            print(f"{done.mutant.name}  [{done.killed_by or 'SURVIVES'}, {done.seconds:.0f} s]", flush=True)
            survivors += [] if done.killed_by else [done.mutant]
    except Broken as e:
        print(e, file=sys.stderr)
        return 2
    for survivor in survivors:
        print(f"survives: {survivor.name}")
    if len(mutants) < FEWEST:
        print(f"only {len(mutants)} mutants were generated, at least {FEWEST} are expected")
    print(f"{len(selected) - len(survivors)} of {len(selected)} killed")
    return 1 if survivors or len(mutants) < FEWEST else 0


if __name__ == "__main__":
    sys.exit(main())
