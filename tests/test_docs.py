"""The pages say what is true: their code runs, their commands exist and work, their links lead somewhere.

What a fenced block is, its info string says:

- ``python``: a program. It is run, in a folder of the page's own; if it begins with ``# NAME.py`` it is also that file.
- ``sh``: commands. Each is parsed by the program itself, and (slow) run, at a size that :data:`REDUCED` states.
- ``yaml``: a recipe, or a part of one. It is checked as a recipe; ``# NAME.yaml`` as above.
- ``py``: an excerpt. It has to be Python, and is not run.
- ``bash``: a script for a cluster. Bash reads it, and the commands of ours in it are parsed.
- none: a transcript. The commands behind its ``$`` are parsed; what they printed once is not compared.
- ``diff``: a patch to another project's file, which is not here. ``{toctree}``, ``{raw}``: the site's, built below.
"""

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import reparam
from reparam.cli import _parser, main
from reparam.studies.recipe import built_in, load_recipe, parse_yaml, read_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.name for page in PAGES]

#: What a study or a training of the pages is cut down to when it is run here: the same things are done, in less time.
REDUCED = [
    *("train.steps=4", "train.batch=8", "train.warmup=1", "train.validations=1"),
    *("sample.n=16", "sample.steps=2", "sample.reference=64", "metrics=null"),
]
_FEATURES = "metrics=[frechet_distance]"  # that of thousands of pixels takes its time
_SMALL_JIT = ["network.width=32", "network.depth=2", "network.heads=2", "network.bottleneck=16", _FEATURES]
_SMALL_UNET = ["network.size=null", "network.widths=[32, 32]", _FEATURES]
#: The same of built-in recipes whose network, data or sampler would be large or does not go with that, by the
#: beginnings of their names.
REDUCED_RECIPES = {
    "folder": _SMALL_JIT,
    "cifar10-patch16": _SMALL_JIT,
    "cifar10-parameterization": _SMALL_UNET,
    "cifar10-unet": _SMALL_UNET,
    "imagenet": [*_SMALL_JIT, "network.in_context=0", "data.size=32"],
    "jit-ablation": [*_SMALL_JIT, "data.size=32"],
}
#: Options of other commands, where the page's own number would take long.
REDUCED_OPTIONS = {
    "identify": ["--n", "32"],
    "sample": ["--n", "16", "--steps", "2"],
}
#: Words that stand for the reader's own, and what they are here.
STANDS_FOR = {"RUN": "runs/mine", "RECIPE": "spiral", "DIR": "runs/mine", "DATA": "mine.npy", "TARGET": "v"}
#: What is published with weights of gigabytes, or is fetched: tests of sampling and of extractors make small ones.
PUBLISHED_WEIGHTS = ("--official", "{name: inception, path: inception-2015-12-05.pt}")
#: In the text a command may be one of several, or of the reader's own.
PLACEHOLDER = r"[A-Z]{3,}|…|\||^reparam (?:\w+\.|[\w-]+$)"
#: A folder that all nodes of a cluster see, and where it is here.
SHARED = ("/shared/", "shared/")
#: Ways of starting the same command on several processes; tests of training and evaluation do so.
LAUNCHERS = (
    r"torchrun --nproc-per-node \d+( --[\w-]+ \S+)* -m reparam\.cli",
    r"accelerate launch( --[\w-]+ \S+)* -m reparam\.cli",
)
#: What a page may tell a reader to type besides, and why it is not run here.
NOT_RUN = {
    r"make [a-z-]+": "is a target of the Makefile",
    r"python3 -m venv \.venv": "test_package does so, with the wheel",
    r"\. \.venv/bin/activate": "the same",
    r"pip install \S+": "the same; the extra that it names exists",
    r"python (benchmarks/\w+\.py)( .*)?": "takes minutes to hours; the file exists",
}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    info: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@functools.cache
def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```[ ]*$", text, flags=re.S | re.M):
        found.append(Block(page.name, text.count("\n", 0, match.start()) + 1, match[1].strip(), match[2]))
    return found


def all_blocks(info: str) -> list[Block]:
    return [b for page in PAGES for b in blocks(page) if b.info == info]


def commands(block: Block) -> list[str]:
    """The commands of a block, one a line, or what follows ``$`` in a transcript, without comments."""
    text = re.sub(r"\\\n\s*", "", block.text)
    lines = text.splitlines()
    if block.info == "":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    stripped = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return [line for line in stripped if line]


def arguments(command: str) -> list[str] | None:
    """What follows ``reparam`` in a command, however it is launched; None of another program's."""
    for launcher in LAUNCHERS:
        command = re.sub(f"^{launcher}", "reparam", command)
    words = [STANDS_FOR.get(word, word).replace(*SHARED) for word in shlex.split(command)]
    return words[1:] if words[0] == "reparam" else None


def parsed(words: list[str]):
    """The words as the program reads them; a misspelt option or command fails."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return _parser().parse_args(words)
    except SystemExit:
        pytest.fail(told.getvalue())


def test_every_block_is_of_a_known_kind():
    kinds = {"python", "sh", "bash", "yaml", "py", "", "diff", "{toctree}", "{raw} html"}
    assert {str(b): b.info for page in PAGES for b in blocks(page) if b.info not in kinds} == {}


RUNNER = """
import json, os, sys, traceback
for where, folder, text in json.load(sys.stdin):
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    try:
        exec(compile(text, where, "exec"), {"__name__": "example"})
    except BaseException:
        sys.exit(f"{where}: {traceback.format_exc()}")
"""


def test_the_programs_run(tmp_path):
    """In one process, for the time that its imports take; each has its own names."""
    programs = [(str(b), str(tmp_path / b.page), b.text) for b in all_blocks("python")]
    assert len(programs) > 10
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(programs), text=True, capture_output=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_excerpts_are_python():
    for block in all_blocks("py"):
        ast.parse(block.text, str(block))


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_exist(name):
    """Every option, and every key of a built-in recipe that is set."""
    for block in (b for b in blocks(PAGES[NAMES.index(name)]) if b.info in ("sh", "")):
        for command in commands(block):
            words = arguments(command)
            if words is None:
                assert any(re.fullmatch(kind, command) for kind in NOT_RUN), f"{block}: {command}"
                continue
            args = parsed(words)
            if args.command in ("study", "train") and args.recipe in built_in():
                load_recipe(args.recipe, args.set, tiny=args.tiny)


@pytest.mark.parametrize("block", all_blocks("bash"), ids=str)
def test_a_script_for_a_cluster_is_one(block):
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
        if found := re.search(r"(?:reparam|-m reparam\.cli) ((?:study|train|sample|eval) .*)", line):
            parsed(shlex.split(found[1], comments=True))


def test_what_is_not_run_is_there():
    table = (
        (ROOT / "pyproject.toml")
        .read_text(encoding="utf-8")
        .split("[project.optional-dependencies]")[1]
        .split("\n[")[0]
    )
    extras = set(re.findall(r"^(\w+) = \[", table, flags=re.M))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    for command in (c for b in all_blocks("sh") for c in commands(b)):
        if found := re.fullmatch(r"make ([a-z-]+)", command):
            assert found[1] in targets, command
        if found := re.fullmatch(r"pip install .*\[(.*)\].*", command):
            assert set(found[1].split(",")) <= extras, command
        if found := re.fullmatch(r"python (benchmarks/\w+\.py).*", command):
            assert (ROOT / found[1]).is_file(), command


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=str)
def test_yaml_is_a_recipe_or_a_part_of_one(block):
    raw = parse_yaml(block.text, str(block))
    if "extends" in raw:
        assert load_recipe(raw).runs
        assert load_recipe(raw, tiny=True).runs
        return
    base = read_recipe("cifar10-patch16" if "images" in block.text else "digits")
    if "target" in raw and "loss_space" not in raw:
        base.pop("loss_space", None)
        base.pop("weighting", None)
    targets = raw.pop("target", base["target"])
    for target in targets if isinstance(targets, list) else [targets]:
        if isinstance(target, dict) and target["name"] in ("file", "in_basis"):
            continue  # what they name is the reader's: a file of code, a file of numbers
        assert load_recipe({"name": "page", **base, "sample": {}, **raw, "target": target}).runs


# --- Links -----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The names that GitHub and the site give to headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *$", text, flags=re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        n = 0
        while (name := f"{slug}-{n}" if n else slug) in found:
            n += 1
        found.add(name)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = PAGES[NAMES.index(name)]
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        to = (page.parent / path).resolve() if path else page
        if not to.exists() or (anchor and to.suffix == ".md" and anchor not in anchors(to)):
            broken.append(link)
    assert broken == []


# --- The site --------------------------------------------------------------------------------------------------------

needs_sphinx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_parser", "furo", "latex2mathml")),
    reason="needs the extra docs",
)
#: What a browser fetches by itself.
FETCHED = (
    r"""<(?:script|img|iframe|source|audio|video|embed)\b[^>]*\ssrc=["']?(?:https?:)?//"""
    r"""|<link\b[^>]*\shref=["']?(?:https?:)?//"""
)


def build(source: Path, out: Path, *more: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", *more, str(source), str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def refuse_what_is_fetched(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.search(FETCHED, page.read_text(encoding="utf-8")), page
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


@needs_sphinx
def test_two_pages_build(tmp_path):
    """With all settings of the site: formulas become MathML, pictures state their size, nothing is fetched."""
    source = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", source, ignore=shutil.ignore_patterns("_build", "*.md", "api"))
    for name in ("mathematics.md", "confidence.md"):
        shutil.copy(ROOT / "docs" / name, source)
    (source / "conf.py").write_text(
        (ROOT / "docs" / "conf.py").read_text(encoding="utf-8").replace("HERE.parent", f"Path({str(ROOT)!r})")
    )
    (source / "index.md").write_text("# Two\n\n```{toctree}\nmathematics\nconfidence\n```\n")
    build(source, tmp_path / "site", "-D", "suppress_warnings=myst.xref_missing")
    site = tmp_path / "site"
    formulas = (site / "mathematics.html").read_text(encoding="utf-8")
    assert formulas.count("<math ") > 100
    assert "alttext=" in formulas
    assert "$" not in re.sub(r"<(pre|script|math).*?</\1>", "", formulas, flags=re.S)
    picture = re.search(r"<img [^>]*tree\.svg[^>]*>", (site / "confidence.html").read_text(encoding="utf-8"))
    assert picture is not None
    assert re.search(r'width="\d+" height="\d+"', picture[0])
    assert 'alt="The tree' in picture[0]
    refuse_what_is_fetched(site)


@needs_sphinx
@pytest.mark.parametrize("latex", [r"\nonsense{x}", "x_a_b"])
def test_a_formula_that_cannot_be_read_is_a_warning(latex, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    mathml = importlib.import_module("mathml")
    told: list[str] = []
    monkeypatch.setattr(mathml.logger, "warning", lambda message, *args, **where: told.append(message % args))
    mathml.mathml(latex, False, None)
    assert [text.startswith("formula") for text in told] == [True]
    told.clear()
    assert mathml.mathml(r"\frac{1}{\sigma}", True, None).startswith('<math alttext="\\frac{1}{\\sigma}"')
    assert told == []


@needs_sphinx
@pytest.mark.slow
def test_the_whole_site_builds_and_its_links_hold(tmp_path):
    build(ROOT / "docs", tmp_path)
    refuse_what_is_fetched(tmp_path)
    ids: dict[Path, set[str]] = {}
    for page in tmp_path.rglob("*.html"):
        ids[page] = set(re.findall(r'\sid="([^"]+)"', page.read_text(encoding="utf-8")))
    broken = []
    for page, own in ids.items():
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r'<a [^>]*href="(?!https?:|mailto:)([^"]+)"', text):
            path, _, anchor = link.partition("#")
            to = (page.parent / path).resolve() if path else page
            known = own if to == page else ids.get(to)
            if (known is None and not to.exists()) or (anchor and known is not None and anchor not in known):
                broken.append((page.name, link))
    assert broken == []
    objects = (tmp_path / "api").rglob("*.html")
    reference = "".join(page.read_text(encoding="utf-8") for page in objects)
    named = {name for name in reparam.__all__ if re.search(rf'id="reparam[\w.]*\.{name}"', reference)}
    modules = {name for name in reparam.__all__ if f'id="module-reparam.{name}"' in reference}
    assert set(reparam.__all__) - named - modules == {"__version__"}


def test_the_commands_of_the_lesson_and_within_the_text_exist():
    lesson = (ROOT / "docs" / "lesson" / "page.html").read_text(encoding="utf-8")
    spans = re.findall(r"<code>(reparam .*?)</code>", lesson, flags=re.S)
    assert spans
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
        spans += [" ".join(span.split()) for span in re.findall(r"`(reparam [^`]+)`", prose)]
    assert len(spans) > 30
    for span in spans:
        if not re.search(PLACEHOLDER, span):
            parsed(arguments(span.replace("\\\n", " ")))


def test_the_command_that_made_a_picture_stands_below_it():
    captions = [
        c
        for page in PAGES
        for c in re.findall(r"!\[[^]]*\]\([^)]+\)\n\n(.*?)\n\n", page.read_text(encoding="utf-8"), flags=re.S)
    ]
    assert len(captions) == sum(page.read_text(encoding="utf-8").count("![") for page in PAGES) >= 4
    for caption in captions:
        named = re.findall(r"`((?:reparam|make) study[^`]*)`", " ".join(caption.split()))
        assert named, caption
        assert all(parsed(name.split()[1:]) for name in named if name.startswith("reparam"))


def test_every_page_is_in_the_table_of_contents():
    listed = set((ROOT / "docs" / "index.md").read_text(encoding="utf-8").split())
    assert [name for name in NAMES[1:] if name not in ("index.md", "README.md") and name[:-3] not in listed] == []


# --- The commands, run -----------------------------------------------------------------------------------------------

#: What else a page takes for granted: weights, pictures and recipes of the reader's, small ones.
MINE = """
data: mine.npy
network: {name: mlp, hidden: 16}
target: [x0, v, velocity]
loss_space: velocity
seed: [0, 1]
"""
RECIPE = """
data: digits
network: {name: mlp, hidden: 16}
target: velocity
train: {steps: 6, batch: 8, warmup: 1, validations: 1}
sample: {n: 16, steps: 2}
"""
OWN_NETWORK = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x, time):
        return self.layer(torch.cat([x, time[:, None]], 1))


make = Net
"""


def do(words: list[str], *expected: int) -> None:
    """The command in the current folder, which is to end with one of these exit codes, by default 0."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = main(words)
    assert code in (expected or (0,)), f"reparam {shlex.join(words)}: {told.getvalue()[-2000:]}"


def set_to(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def make_pictures(folder: Path) -> None:
    from PIL import Image

    draw = np.random.default_rng(0)
    for name, size, count in (("photos", 64, 24), ("samples", 64, 24), ("small", 32, 40)):
        (folder / name).mkdir()
        for i in range(count):
            Image.fromarray(draw.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    np.savez(folder / "samples.npz", draw.uniform(-1, 1, (24, 3, 64, 64)).astype(np.float32))
    for label in range(2):
        shutil.copytree(folder / "small", folder / "imagenet-256" / f"class{label}")
    (folder / "shared").mkdir()
    shutil.copytree(folder / "small", folder / "shared" / "cifar10")
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"bytes": file.read_bytes(), "path": None} for file in sorted((folder / "small").iterdir())]
    parquet.write_table(pa.table({"img": rows, "label": [i % 10 for i in range(40)]}), folder / "train.parquet")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """A folder with all that the pages name as the reader's own."""
    folder = tmp_path_factory.mktemp("reader")
    np.save(folder / "mine.npy", np.random.default_rng(0).normal(size=(400, 3)))
    (folder / "mine.yaml").write_text(MINE, encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "mine.py").write_text(next(b.text for b in all_blocks("python") if b.text.startswith("# mine.py")))
    (folder / "pkg").mkdir()
    (folder / "pkg" / "mod.py").write_text(OWN_NETWORK, encoding="utf-8")
    make_pictures(folder)
    with _in(folder):
        do(["train", "recipe.yaml", "--out", "runs/mine", "--tracker", "none"])
        shutil.copytree("runs/mine", "runs/copy")
        shutil.move("runs/copy", "runs/mine/x0")
        jobs = ["--jobs", "1", *set_to(REDUCED)]
        do(["study", "digits", "--out", "runs/digits", *jobs])
        do(["study", "spiral", *jobs, "--set", "data.dim=[2, 3]", "--set", "target=[x0, v]", "--out", "runs/spiral"])
        do(["study", "digits-jit", *jobs, "--out", "runs/digits-jit"])
        shutil.copytree("runs/digits-jit/x0", "runs/labelled")
        photos = [*REDUCED_RECIPES["folder"], "data.path=photos/", "target=x0"]
        do(["study", "folder", *jobs, *set_to(photos)])
        shutil.copytree("runs/folder/x0", "runs/photos")
        do(["train", "recipe.yaml", "--out", "runs/sure", "--set", "target={name: gaussian, target: v}"])
        for name, run in (("a", "x0"), ("b", "velocity")):
            do(["eval", f"runs/digits/{run}", "--out", f"{name}.json"])
    return folder


@contextlib.contextmanager
def _in(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def reduced(args, words: list[str]) -> list[str]:
    """The words of a command, and after them what makes it small."""
    if args.command in ("study", "train") and args.recipe:
        small = next((s for name, s in REDUCED_RECIPES.items() if args.recipe.startswith(name)), [])
        if args.tiny:
            small = [setting for setting in small if not setting.startswith("data.")]
        return [*words, *set_to([*REDUCED, *small])]
    return [*words, *REDUCED_OPTIONS.get(args.command, [])]


def run_command(command: str, expected: int) -> None:
    words = arguments(command)
    if words is None:
        return
    args = parsed(words)
    if any(weights in words for weights in PUBLISHED_WEIGHTS):
        return
    if args.command in ("study", "train") and (args.recipe or args.out) and not args.estimate:
        # Commands of a page that write to one folder are alternatives: each is to find it empty.
        out = Path(args.out or f"runs/{Path(args.recipe).stem}{'-tiny' * args.tiny}")
        init = [Path(p) for p in (getattr(args, "init", None), getattr(args, "add_confidence", None)) if p]
        if out.exists() and out not in init:
            shutil.rmtree(out)
    # What is trained for so few steps cannot be told by identify, which says so by 1; a mistake would be 2.
    do(reduced(args, words), *([0, 1] if args.command == "identify" else [expected]))


def expected_code(line: str) -> int:
    """Commands end with 0, unless the page says otherwise in a comment."""
    found = re.search(r"# .*exit code (\d+)", line)
    return int(found[1]) if found else 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_commands_work(name, stand_ins, tmp_path, monkeypatch):
    """A page from its beginning to its end, in a folder like a reader's, with files that it names itself."""
    folder = tmp_path / "reader"
    shutil.copytree(stand_ins, folder)
    monkeypatch.chdir(folder)
    for block in blocks(PAGES[NAMES.index(name)]):
        if found := re.match(r"# (\w+\.(?:py|yaml))\n", block.text):
            Path(found[1]).write_text(block.text, encoding="utf-8")
        if block.info == "python":
            subprocess.run([sys.executable, "-c", block.text], check=True)
        if block.info == "sh":
            for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
                for command in commands(Block(block.page, block.line, "sh", line)):
                    run_command(command, expected_code(line))
