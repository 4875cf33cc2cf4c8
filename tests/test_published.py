"""Recipes that extend others, have a small version, and stand beside published numbers."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import reparam as rp
from reparam import cli
from reparam.errors import Conflict, DataError, NetworkError, OutputError, RecipeError, UnknownName
from reparam.networks import NETWORKS
from reparam.studies import open_study
from reparam.studies.catalogue import written
from reparam.studies.leaderboard import estimate_lines
from reparam.studies.published import About, Published
from reparam.studies.recipe import built_in, load_recipe, read_recipe, target_named
from reparam.studies.run import execute

ROOT = Path(__file__).parents[1]
#: Parameters in millions, as published, and how far off a rounding or "about" may be.
SIZES = [
    ("cifar10-unet-small", 8.95, 0.005),
    ("cifar10-unet-medium", 36, 0.5),
    ("cifar10-unet-large", 140, 5),
    ("cifar10-parameterization", 8.95, 0.005),
    ("cifar10-parameterization-medium", 36, 0.5),
    ("cifar10-parameterization-large", 140, 5),
]
MINE = [name for name, _, _ in SIZES]

BASE = {
    "data": {"name": "digits"},
    "network": {"name": "mlp", "hidden": 8, "layers": 2},
    "schedule": "ddpm",
    "time": "step",
    "rank_by": "frechet_distance",
    "target": ["x0", "v"],
    "train": {"steps": 3, "batch": 8, "validations": 1},
    "sample": {"n": 8, "steps": 2, "sampler": "ddim"},
}
ROW = {"label": "ours", "metric": "FID", "value": 1.5, "run": "v", "source": "a paper"}


def yaml_file(folder, name, text):
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- the built-in recipes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", built_in())
def test_every_built_in_recipe_parses_and_names_runs_that_it_has(name):
    full = load_recipe(name)
    assert full.name == name
    assert full.runs
    for row in full.published:
        assert row.run in ("", *full.runs), f"{row.label} stands beside no run"
    assert full.about.source
    assert full.about.hardware
    assert full.about.expected
    if "two CPU cores" not in full.about.hardware:  # those are small as they are
        tiny = load_recipe(name, tiny=True)
        assert (tiny.name, tiny.tiny, tiny.published) == (f"{name}-tiny", True, full.published)
        assert len(tiny.runs) == len(full.runs)
        assert {c.data["name"] for c in tiny.runs.values()} == {"digits"}


@pytest.mark.parametrize(("name", "millions", "off"), SIZES)
def test_full_sizes_have_the_published_number_of_parameters(name, millions, off):
    pytest.importorskip("diffusers")
    for config in load_recipe(name).runs.values():
        arguments = {key: value for key, value in config.network.items() if key != "name"}
        with torch.device("meta"):
            net = NETWORKS[config.network["name"]](image=config.data["size"], **arguments)
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=off)


def test_the_cifar10_recipes_are_the_task_to_the_letter():
    batches = {"small": 128, "medium": 128, "large": 64}
    scores = {"small": (18.58, 21.70, 25.25), "medium": (8.46, 11.59, 13.56), "large": (7.17, 8.80, 11.99)}
    for size, batch in batches.items():
        study = load_recipe("cifar10-parameterization" + ("" if size == "small" else f"-{size}"))
        assert list(study.runs) == ["eps", "v", "x0"]
        assert tuple(p.value for p in study.published[:3]) == scores[size]
        assert [p.run for p in study.published] == ["eps", "v", "x0", "", "", "", "", ""]
        (alone,) = load_recipe(f"cifar10-unet-{size}").runs.values()
        for config in (*study.runs.values(), alone):
            train, objective = config.train, config.objective()
            assert (train.steps, train.batch, train.lr, train.ema) == (35_000, batch, 2e-4, 0.9995)
            assert (train.weight_decay, train.clip, train.precision, config.seed) == (1e-4, 1.0, "bf16", 42)
            assert (config.sample.method().name, config.sample.steps, config.sample.threshold) == ("ddim", 50, "static")
            assert config.data["flip"] is True
            assert (config.time, config.loss_space, config.weighting) == ("step", None, None)
            betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
            k = torch.tensor([0, 400, 999])
            expected = torch.cumprod(1 - betas, 0)[k].sqrt()
            torch.testing.assert_close(objective.schedule.alpha(objective.schedule.time(k)).double(), expected)


def test_ddim_walks_the_steps_that_diffusers_walks():
    diffusers = pytest.importorskip("diffusers")
    config = load_recipe("cifar10-unet-small").runs["eps"]
    theirs = diffusers.DDIMScheduler(num_train_timesteps=1000)
    theirs.set_timesteps(50)
    denoiser = config.objective().denoiser(nn.Identity())
    times = config.sample.times(denoiser)
    assert [int(denoiser.schedule.step(torch.tensor(t))) for t in times[:-1]] == theirs.timesteps.tolist()
    assert times[-1] == 0


@pytest.mark.parametrize("run", ["eps", "x0"])
def test_the_small_versions_train_sample_and_score(run, tmp_path):
    pytest.importorskip("diffusers")
    settings = ["train.steps=3", "train.batch=8", "train.validations=1", "sample.n=8", "sample.steps=5"]
    tiny = load_recipe("cifar10-parameterization", settings, tiny=True).runs[run]
    # All sizes and both kinds have the same small version, so that this one stands for them.
    for name in MINE:
        others = load_recipe(name, settings, tiny=True).runs
        if run in others:
            same = {"name": tiny.name, "description": tiny.description, "validate_on": tiny.validate_on}
            assert {**others[run].to_dict(), **same} == {
                **tiny.to_dict(),
                "train": {**tiny.to_dict()["train"], "batch": others[run].train.batch},
                "network": {**tiny.network},
            }
    row = execute(run, tiny, tmp_path / run)
    assert row is not None
    assert (row["status"], row["steps"]) == ("finished", 3)
    assert row["metrics"]["frechet_distance"]["value"] > 0
    assert (tmp_path / run / "model.safetensors").exists()


def test_the_page_of_recipes_is_that_of_the_recipes():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page == written(page), "write it anew: python -m reparam.studies.catalogue docs/recipes.md"
    assert all(f"\n| `{name}`" in page for name in built_in())
    with pytest.raises(OutputError, match="no place for the table"):
        written("# Recipes")


# --- extends and tiny -------------------------------------------------------------------------------------------------


def test_a_recipe_is_merged_over_the_one_that_it_extends(tmp_path):
    yaml_file(tmp_path, "below", "extends: digits-jit\nnetwork: {width: 32}\nsample: {n: 16}\nabout: {source: s}\n")
    above = yaml_file(
        tmp_path,
        "above",
        "extends: below.yaml\ntrain: {lr: 1e-4}\nextractor: null\ndata: {name: digits, holdout: 0.5}\n"
        "about: {hardware: h}\ntarget: x0\n",
    )
    found, jit = load_recipe(above), load_recipe("digits-jit").runs["x0"]
    config = found.runs["x0"]
    expected = load_recipe("digits-jit").about.expected
    assert (found.name, config.name) == ("above", "above")
    assert found.about == About(source="s", hardware="h", expected=expected)
    assert found.description == load_recipe("digits-jit").description
    assert config.network == {**jit.network, "width": 32}
    assert (config.train.lr, config.train.steps) == (1e-4, jit.train.steps)
    assert (config.sample.n, config.sample.guidance, config.extractor) == (16, jit.sample.guidance, None)
    assert config.data == {"name": "digits", "pictures": True, "holdout": 0.5}
    # A part of another name is replaced whole, a name alone too; the short form counts as a name.
    for network in ("mlp", {"name": "mlp"}):
        other = load_recipe({"extends": "digits-jit", "network": network, "data": "digits", "conditional": False,
                             "target": "x0", "sample": {"guidance": 1.0}, "extractor": None})  # fmt: skip
        assert other.runs["x0"].network == {"name": "mlp"}
        assert other.runs["x0"].data == {"name": "digits"}
    longer = load_recipe({"extends": "digits", "data": {"holdout": 0.5}, "target": "x0"})
    assert longer.runs["x0"].data == {"name": "digits", "holdout": 0.5}


def test_settings_come_after_tiny_and_tiny_after_extends(tmp_path):
    below = yaml_file(tmp_path, "below", json.dumps({**BASE, "tiny": {"train": {"steps": 2}, "seed": 3}}))
    raw = {"extends": str(below), "name": "mine", "train": {"batch": 16}, "tiny": {"train": {"batch": 4}}}
    full, tiny = load_recipe(raw).runs["x0"], load_recipe(raw, ["seed=5"], tiny=True).runs["x0"]
    assert (full.train.steps, full.train.batch, full.seed) == (3, 16, 0)
    assert (tiny.train.steps, tiny.train.batch, tiny.seed, tiny.name) == (2, 4, 5, "mine-tiny")
    said = {**BASE, "about": {"source": "s", "hardware": "h"}, "tiny": {"about": {"expected": "e"}}}
    assert load_recipe(said, tiny=True).about == About(source="s", expected="e")


@pytest.mark.parametrize(
    ("change", "tiny", "error", "message"),
    [
        ({"extends": "nothing"}, False, UnknownName, "unknown recipe 'nothing'"),
        ({"extends": "none.yaml"}, False, RecipeError, "cannot read recipe none.yaml"),
        ({"extends": ["digits"]}, False, RecipeError, r"extends: expected the name .* found \['digits'\]"),
        ({}, True, RecipeError, "recipe study has no tiny version"),
        ({"tiny": "small"}, False, RecipeError, "tiny: expected a mapping .* found 'small'"),
        ({"tiny": {"published": []}}, True, RecipeError, "tiny.published: .* not within it"),
        ({"tiny": {"extends": "digits"}}, True, RecipeError, "tiny.extends"),
        ({"tiny": {"trian": {}}}, True, UnknownName, "Did you mean 'train'"),
        ({"about": "good"}, False, RecipeError, "about: expected a mapping .* found 'good'"),
        ({"about": {"sorce": "x"}}, False, UnknownName, "Did you mean 'about.source'"),
        ({"about": {"source": 3}}, False, RecipeError, "about.source: expected text, found 3"),
        ({"about": {"unsaid": "much"}}, False, RecipeError, "about.unsaid: expected a list of texts"),
        ({"published": {"x0": 3}}, False, RecipeError, "published: expected a list"),
        ({"published": [3]}, False, RecipeError, "published.0: expected a mapping"),
        ({"published": [ROW, {**ROW, "valu": 3}]}, False, UnknownName, "Did you mean 'published.1.value'"),
        ({"published": [{"label": "x"}]}, False, RecipeError, "published.0: metric, value, source missing"),
        ({"published": [{**ROW, "value": "3"}]}, False, RecipeError, "published.0.value: expected a number, or null"),
        ({"published": [{**ROW, "value": True}]}, False, RecipeError, "published.0.value: .* found True"),
        ({"published": [{**ROW, "value": float("nan")}]}, False, RecipeError, "published.0.value"),
        ({"published": [{**ROW, "source": None}]}, False, RecipeError, "published.0.source: expected text, found None"),
        ({"published": [{**ROW, "run": 3}]}, False, RecipeError, "published.0.run: expected text, found 3"),
    ],
)
def test_bad_recipes(change, tiny, error, message):
    with pytest.raises(error, match=message):
        load_recipe({**BASE, **change}, tiny=tiny)


def test_a_recipe_cannot_extend_itself(tmp_path):
    a = yaml_file(tmp_path, "a", "extends: b.yaml")
    yaml_file(tmp_path, "b", "extends: ./a.yaml")
    with pytest.raises(RecipeError, match=r"extends: .*a\.yaml → .*b\.yaml → .*a\.yaml: .*cannot extend itself"):
        load_recipe(a)


def test_what_is_said_beside_the_runs_changes_no_result():
    plain, told = load_recipe(BASE), load_recipe({**BASE, "published": [ROW], "about": {"source": "s"}})
    assert told.to_dict() == plain.to_dict()
    assert told.published == (Published("ours", "FID", 1.5, "a paper", "v"),)


# --- further targets --------------------------------------------------------------------------------------------------

SCALED = """
def compute_training_target(x_0, noise, timesteps, schedule):
    return 2 * x_0

def predict_x0(model_output, x_t, timesteps, schedule):
    return model_output / 2
"""


def test_targets_are_added_to_those_that_are_compared(tmp_path):
    mine, other = tmp_path / "mine.py", tmp_path / "other.py"
    mine.write_text(SCALED)
    other.write_text(SCALED)
    named = [target_named(text) for text in (str(mine), str(other), "eps", "{name: k, k: 0.3}")]
    assert named == [{"name": "file", "path": str(p)} for p in (mine, other)] + ["eps", {"name": "k", "k": 0.3}]
    assert list(load_recipe(BASE, targets=named).runs) == ["x0", "v", "mine", "other", "eps", "k"]
    assert list(load_recipe(BASE, ["target=x0"], targets=["eps"]).runs) == ["x0", "eps"]
    for again in ("v", {"name": "v"}):
        with pytest.raises(Conflict, match="the target .* is compared already"):
            load_recipe(BASE, targets=[again])
    with pytest.raises(UnknownName, match="Did you mean 'eps'"):
        load_recipe(BASE, targets=["epss"])
    with pytest.raises(NetworkError, match="no Python file"):
        load_recipe(BASE, targets=[target_named("nowhere.py")])
    with pytest.raises(RecipeError, match=r"targets: expected names or mappings.*found V\(\)"):
        load_recipe(BASE, targets=[rp.target("v")])


def test_a_file_that_changed_is_not_gone_on_with(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(SCALED)
    said: list[str] = []
    options = {"out": tmp_path / "out", "network": Plain, "targets": str(mine)}
    rp.study(BASE, **options, say=said.append)
    assert f"  running your code: target {mine}" in said
    mine.write_text(SCALED + "\n")
    with pytest.raises(DataError, match=r"the target .*mine\.py has changed since the study"):
        rp.study(BASE, **options, say=said.append)


# --- what is shown ----------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """The least that can be trained on the digits; brought as an object, it runs in this process."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x, time):
        return self.inner(x)


class Text(HTMLParser):
    """The words of a page's section of published numbers."""

    def __init__(self):
        super().__init__()
        self.inside, self.words = False, []

    def handle_starttag(self, tag, attrs):
        if tag == "section":
            self.inside = ("class", "published") in attrs

    def handle_data(self, data):
        if self.inside:
            self.words.append(data)


def shown(page):
    parser = Text()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser.words


def test_published_numbers_stand_beside_our_runs_and_not_among_them(tmp_path):
    rows = [ROW, {**ROW, "label": "<b>theirs</b>", "value": None, "run": ""}, {**ROW, "run": "<eps>", "source": "<i>"}]
    raw = {**BASE, "published": rows, "about": {"source": "<script>", "unsaid": ["a choice"]}}
    done = rp.study(raw, network=Plain, settings=["seed=0"], out=tmp_path / "out", say=lambda _: None)
    assert done is not None
    ours = next(row for row in done.rows if row["run"] == "v")["metrics"]["frechet_distance"]["value"]
    assert {row["run"] for row in json.loads((tmp_path / "out" / "leaderboard.json").read_text())} == {"x0", "v"}

    for table in (done.table(), open_study(tmp_path / "out").table()):
        text = [line.split("  ") for line in table.splitlines()]
        start = next(i for i, line in enumerate(text) if line[0].startswith("published, not measured here: FID (a pap"))
        mine, theirs = table.splitlines()[start + 1 : start + 3]
        assert "1.5" in mine
        assert f"here: frechet_distance {ours:.3g} on 8 samples: not FID" in mine
        assert theirs.split() == ["<b>theirs</b>", "failed"]
        assert table.splitlines()[-1].endswith("1.5  (no counterpart here: there is no run <eps>)")

    words = shown(done.report)
    assert words[0] == "Published, not measured here"
    assert "<b>theirs</b>" in words
    assert f"{ours:.3g}" in " ".join(words)
    assert any("not FID" in text for text in words)
    assert words.count("no counterpart here: there is no run <eps>") == 1
    page = done.report.read_text(encoding="utf-8")
    for raw_text in ("<b>theirs", "<script>&", "<dd><script>", "<small><i>", "<eps>"):
        assert raw_text not in page
    assert "&lt;script&gt;" in page
    assert "a choice" in page


def test_published_numbers_of_a_small_study_are_of_the_full_size(tmp_path):
    raw = {**BASE, "published": [ROW], "tiny": {"train": {"steps": 2}}}
    done = rp.study(raw, network=Plain, tiny=True, out=tmp_path / "out", say=lambda _: None)
    assert done is not None
    heading = "published, not measured here, of the recipe at its full size"
    for study in (done, open_study(tmp_path / "out")):
        assert study.recipe.name == "study-tiny"
        lines = study.table().splitlines()
        assert lines[-2].startswith(f"{heading}: FID")
        assert lines[-1].split() == ["ours", "1.5"]
        words = shown(study.report)
        assert words[0].lower() == heading
        assert "our run" not in words
    # What is told beside the runs may change, and the study goes on.
    again = {**raw, "published": [{**ROW, "value": 7.5}]}
    more = rp.study(again, network=Plain, tiny=True, out=tmp_path / "out", say=lambda _: None)
    assert more is not None
    assert more.rows == done.rows
    assert more.table().splitlines()[-1].split() == ["ours", "7.5"]


def test_a_number_stands_beside_all_seeds_of_its_run(tmp_path):
    raw = {**BASE, "published": [ROW], "seed": [0, 1], "target": ["v", "x0"]}
    done = rp.study(raw, network=Plain, out=tmp_path / "out", say=lambda _: None)
    assert done is not None
    values = [row["metrics"]["frechet_distance"]["value"] for row in done.rows if row["run"].startswith("v-seed")]
    assert f"here: frechet_distance {sum(values) / 2:.3g} " in done.table().splitlines()[-1]


@pytest.mark.parametrize("name", ["jit-ablation-architecture", "jit-ablation-bottleneck"])
def test_a_small_study_says_which_numbers_have_no_run_in_it(name):
    plan = load_recipe(name, tiny=True)
    told = [line for line in estimate_lines(plan) if "no counterpart here" in line]
    gone = [row.run for row in plan.published if row.run not in plan.runs]
    assert gone
    assert [line.split()[-1].rstrip(")") for line in told] == gone
    assert not any("no counterpart" in line for line in estimate_lines(load_recipe(name)))


def test_a_number_beside_a_run_that_there_is_not(tmp_path):
    raw = {**BASE, "published": [ROW, {**ROW, "run": "vv"}], "tiny": {"seed": 1}}
    with pytest.raises(UnknownName, match=r"unknown run \(published\.1\.run\) 'vv'\. Did you mean 'v'\? Known: v, x0"):
        load_recipe(raw)
    with pytest.raises(UnknownName, match="published.1.run"):
        rp.train(raw, run="v", estimate_only=True, say=lambda _: None)
    # What is changed may lack them, and so may what extends another; all seeds of a run count as that run.
    changed = {"settings": ["seed=1"]}, {"targets": ["eps"]}, {"tiny": True}
    assert all(load_recipe(raw, **how).published[1].run == "vv" for how in changed)
    base = yaml_file(tmp_path, "base", json.dumps({**BASE, "published": [ROW]}))
    assert len(load_recipe({"extends": str(base), "target": "x0"}).published) == 1
    with pytest.raises(UnknownName, match="published.0.run"):
        load_recipe({"extends": str(base), "target": "x0", "published": [ROW]})
    assert load_recipe({**BASE, "published": [ROW], "seed": [0, 1]}).published[0].run == "v"
    wide = {**BASE, "network": {"name": "mlp", "hidden": [8, 16]}, "published": [{**ROW, "run": "hidden8-v"}]}
    assert load_recipe(wide, change=lambda found: {**found, "network": "mlp"}).published[0].run == "hidden8-v"


def test_what_a_small_version_inherits_is_marked_as_of_the_full_size(tmp_path, capsys):
    raw = {**BASE, "target": "v", "published": [ROW], "about": {"source": "s", "unsaid": ["a choice", "another"]}}
    recipe = yaml_file(tmp_path, "mine", json.dumps({**raw, "tiny": {"train": {"steps": 2}}}))
    told = []
    for command in ("study", "train"):
        assert cli.main([command, str(recipe), "--tiny", "--estimate"]) == 0
        told.append(capsys.readouterr().out)
        assert "unsaid: of the full size: a choice\n  unsaid: of the full size: another\n" in told[-1]
        assert "published, not measured here, of the recipe at its full size: FID" in told[-1]
        assert told[-1].count("a choice") == 1
        # The cost comes last, and apart.
        assert told[-1].rstrip("\n").split("\n")[-2] == ""
        assert told[-1].rstrip("\n").split("\n")[-1].startswith("it would take about")
        assert cli.main([command, str(recipe), "--estimate"]) == 0
        assert "full size" not in capsys.readouterr().out
    assert told[0].startswith("study mine-tiny: 1 run\n")
    own = {**raw, "tiny": {"about": {"unsaid": ["its own"]}}}
    assert load_recipe(own, tiny=True).about.unsaid == ("its own",)


def test_a_study_without_a_recipe(capsys):
    assert cli.main(["study"]) == 0
    assert "spiral" in capsys.readouterr().out
    options = ["--tiny", "--estimate", "--out x", "--set a=b", "--target v", "--jobs 0", "--device cpu", "--skip-bad"]
    for options_given in (*options, "--on ray", "--per-run {}", "--json --tiny"):
        assert cli.main(["study", *options_given.split()]) == 2
        said = capsys.readouterr()
        assert "which recipe? --" in said.err
        assert said.out == ""


def test_the_command_line_tells_and_takes_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml_file(
        tmp_path,
        "mine",
        json.dumps(
            {**BASE, "target": "x0", "published": [{**ROW, "run": "x0"}], "about": {"source": "s"}, "tiny": {"seed": 1}}
        ),
    )
    assert cli.main(["study", str(recipe), "--tiny", "--target", "v", "--estimate"]) == 0
    said = capsys.readouterr().out
    assert "study mine-tiny: 2 runs" in said
    assert "source: s" in said
    assert "published, not measured here, of the recipe at its full size: FID (a paper)" in said
    assert cli.main(["train", str(recipe), "--tiny", "--json", "--out", "t", "--tracker", "none"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 1
    assert cli.main(["train", str(recipe), "--estimate"]) == 0
    assert "published, not measured here: FID (a paper)" in capsys.readouterr().out
    assert cli.main(["study", "spiral", "--tiny"]) == 2
    assert "recipe spiral has no tiny version" in capsys.readouterr().err
    assert cli.main(["train", "--init", "somewhere", "--tiny"]) == 2
    assert "no recipe is given" in capsys.readouterr().err
    assert cli.main(["study", str(recipe), "--target", "x0"]) == 2
    assert "is compared already" in capsys.readouterr().err


def test_a_recipe_read_whole_has_neither_extends_nor_tiny():
    raw = read_recipe("cifar10-parameterization-large")
    assert not {"extends", "tiny"} & set(raw)
    assert raw["network"]["size"] == "large"
