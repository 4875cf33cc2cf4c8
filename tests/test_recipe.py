import pytest
import torch

import reparam as rp
from reparam.errors import Conflict, RecipeError, ReparamError, SingularTime, UnknownName, Unsupported, unknown
from reparam.studies.recipe import built_in, from_dict, load_recipe, parse_yaml

BASE = {"data": {"name": "spiral", "dim": 2}, "network": "mlp", "target": "x0"}


def test_built_in_recipes_load():
    assert set(built_in()) >= {"spiral", "digits"}
    spiral = load_recipe("spiral")
    assert len(spiral.runs) == 12
    assert {c.data["dim"] for c in spiral.runs.values()} == {2, 8, 16, 512}
    assert {c.loss_space for c in spiral.runs.values()} == {"velocity"}
    # All are validated at the same noise levels, those inside every run's range.
    assert {tuple(c.validate_on) for c in spiral.runs.values()} == {(0.0, 0.98)}
    assert [c.t_range for r, c in spiral.runs.items() if r == "dim512-eps"] == [[0, 0.98]]
    assert load_recipe("digits").runs["x0"].network["hidden"] < 64


def test_lists_are_swept_and_named():
    recipe = load_recipe({**BASE, "target": ["x0", "v"], "seed": [0, 1], "train": {"lr": [1e-3, 1e-2], "steps": 5}})
    assert len(recipe.runs) == 8
    assert "lr0.001-v-seed1" in recipe.runs
    assert recipe.runs["lr0.01-x0-seed0"].train.lr == 0.01
    same = load_recipe({**BASE, "target": [{"name": "v", "t_range": [0, 0.5]}, {"name": "v", "t_range": [0, 0.9]}]})
    assert list(same.runs) == ["v", "v-2"]
    ranges = load_recipe({**BASE, "t_range": [[0, 0.5], [0, 0.9]]})
    assert [c.t_range for c in ranges.runs.values()] == [[0, 0.5], [0, 0.9]]
    # A list given to a network of the user's own is swept too; a list within it is one value.
    own = load_recipe({**BASE, "network": {"name": "pkg.mod:make", "widths": [[8, 16]]}})
    assert [c.network["widths"] for c in own.runs.values()] == [[8, 16]]


def likelihood(kind="x0", **others):
    return {"name": "gaussian", "target": kind, **others}


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (
            [likelihood(covariance="full"), likelihood(), likelihood("v", covariance="isotropic"), "x0"],
            ["x0-gaussian-full", "x0-gaussian-diagonal", "v-gaussian-isotropic", "x0"],
        ),
        # What two of them share, or what is so anyway, names neither.
        (
            [likelihood(of="x0", beta=0.5), likelihood(of="noisy", beta=0.5), likelihood("v", beta=1.0)],
            ["x0-gaussian-diagonal", "x0-gaussian-diagonal-of_noisy", "v-gaussian-diagonal"],
        ),
        (
            [likelihood(), likelihood(detach_mean=True), likelihood(t_range=[0.1, 0.5])],
            ["x0-gaussian-diagonal", "x0-gaussian-diagonal-detach_mean", "x0-gaussian-diagonal-t_range_0.1_0.5"],
        ),
        (
            [likelihood({"name": "edm", "sigma_data": 0.5}), likelihood({"name": "edm", "sigma_data": 1.5})],
            ["edm-gaussian-diagonal-sigma_data_0.5", "edm-gaussian-diagonal-sigma_data_1.5"],
        ),
        ([likelihood(), likelihood()], ["x0-gaussian-diagonal", "x0-gaussian-diagonal-2"]),
    ],
)
def test_likelihoods_are_named_by_what_they_are_of_and_what_differs(targets, names):
    assert list(load_recipe({**BASE, "target": targets, "t_range": [0.1, 1]}).runs) == names


def test_a_likelihood_alone_is_named_as_among_others():
    assert list(load_recipe({**BASE, "target": likelihood("v", of="noisy")}).runs) == ["v-gaussian-diagonal"]
    runs = load_recipe({**BASE, "target": [likelihood("v"), "v"], "seed": [0, 1]}).runs
    assert list(runs) == ["v-gaussian-diagonal-seed0", "v-gaussian-diagonal-seed1", "v-seed0", "v-seed1"]
    for broken in ({"name": "gaussian"}, likelihood(["x0", "v"]), likelihood(None)):
        with pytest.raises(ReparamError):
            load_recipe({**BASE, "target": broken})


def test_a_list_that_an_argument_takes_is_one_value():
    pytest.importorskip("diffusers")
    unet = {"name": "unet", "widths": [32, 64]}
    assert [c.network["widths"] for c in load_recipe({**BASE, "network": unet}).runs.values()] == [[32, 64]]
    swept = load_recipe({**BASE, "network": {"name": "unet", "widths": [[32, 32], [32, 64]]}}).runs
    assert [c.network["widths"] for c in swept.values()] == [[32, 32], [32, 64]]
    assert len(load_recipe({**BASE, "network": {"name": "mlp", "hidden": [8, 16]}}).runs) == 2
    kept = load_recipe(BASE, ["train.also_ema=[0.9, 0.99]", "train.ema_widths=[0.05, 0.1]"]).runs["x0"].train
    assert (kept.also_ema, kept.ema_widths) == ([0.9, 0.99], [0.05, 0.1])


def test_overrides():
    recipe = load_recipe(
        "spiral", ["train.steps=7", "data.dim=3", "target=[x0, v]", "network.hidden=8", "train.lr=1e-4"]
    )
    assert list(recipe.runs) == ["x0", "v"]
    config = recipe.runs["v"]
    assert (config.train.steps, config.data["dim"], config.network["hidden"], config.train.lr) == (7, 3, 8, 1e-4)
    assert load_recipe(BASE, ["network.hidden=9"]).runs["x0"].network == {"name": "mlp", "hidden": 9}
    assert load_recipe({**BASE, "data": "x.npz"}).runs["x0"].data == {"name": "array", "path": "x.npz"}


def test_a_run_is_a_recipe_again():
    config = load_recipe("spiral").runs["dim8-eps"]
    assert from_dict(config.to_dict()) == config
    assert next(iter(load_recipe(config.to_dict()).runs.values())) == config


def test_yaml_reads_numbers_and_refuses_a_key_given_twice():
    assert parse_yaml("{a: 1e-3, b: 5E3, c: -2e+4, d: 1_000}", "x") == {"a": 1e-3, "b": 5e3, "c": -2e4, "d": 1000}
    with pytest.raises(RecipeError, match="key 'a' is given twice"):
        parse_yaml("a: 1\na: 2", "x")
    with pytest.raises(RecipeError, match="not valid YAML"):
        parse_yaml("a: [1, 2", "x")


BAD = [
    ({"target": "velocty"}, [], UnknownName, r"unknown target 'velocty'. Did you mean 'velocity'"),
    ({"trian": {}}, [], UnknownName, r"unknown key 'trian'. Did you mean 'train'"),
    ({}, ["train.stepz=3"], UnknownName, r"unknown key 'train.stepz'. Did you mean 'train.steps'"),
    ({}, ["data.dimm=3"], UnknownName, r"data.dimm.*Did you mean 'data.dim'"),
    ({}, ["network.hiden=3"], UnknownName, r"network.hiden.*Did you mean 'network.hidden'"),
    ({}, ["network=mpl"], UnknownName, r"unknown network 'mpl'. Did you mean 'mlp'"),
    ({}, ["data=spyral"], UnknownName, r"unknown data 'spyral'"),
    ({}, ["times.name=logit-normal"], UnknownName, "logit_normal"),
    ({}, ["sample.sampler=huen"], UnknownName, "Did you mean 'heun'"),
    ({}, ["sample.sampler={name: ddim, etta: 1}"], UnknownName, "Did you mean 'sample.sampler.eta'"),
    ({}, ["sample.sampler={name: ddim, eta: 2}"], Unsupported, r"eta lies in \[0, 1\], found 2"),
    ({}, ["sample.grid=log-snr"], UnknownName, "Did you mean 'log_snr'"),
    ({}, ["sample.grid={name: shifted, shift: much}"], RecipeError, "sample.grid.shift: expected .*number"),
    ({}, ["sample.threshold=clip"], UnknownName, "sample.threshold.*static"),
    ({}, ["rank_by=fid"], UnknownName, "unknown metric 'fid'"),
    ({}, ["train.steps=many"], RecipeError, r"train.steps: expected .*integer, found 'many'"),
    ({}, ["train.steps=2.5"], RecipeError, r"train.steps: expected .*integer, found 2.5"),
    ({}, ["train.lr=true"], RecipeError, r"train.lr: expected .*number, found True"),
    ({}, ["data.dim=two"], RecipeError, r"data.dim: expected .*integer, found 'two'"),
    ({}, ["network.hidden='9'"], RecipeError, r"network.hidden: expected .*integer, found '9'"),
    ({}, ["schedule={name: rectified_flow, noise_scale: big}"], RecipeError, "schedule.noise_scale: expected"),
    ({}, ["seed=one"], RecipeError, "seed: expected .*integer, found 'one'"),
    ({}, ["train=fast"], RecipeError, "train: expected .*found 'fast'"),
    ({}, ["train.steps"], RecipeError, r"expected a.b=value"),
    ({}, ["seed.x=3"], RecipeError, "seed is 0, not a mapping"),
    ({}, ["train.lr=[]"], RecipeError, r"train.lr: the list of values to sweep is empty"),
    ({}, ["t_range=[0.5]"], RecipeError, r"t_range: expected two increasing numbers"),
    ({}, ["t_range=[0.9, 0.1]"], RecipeError, r"found \[0.9, 0.1\]"),
    ({}, ["target=null"], RecipeError, "target: missing"),
    ({}, ["target=eps"], SingularTime, r"eps .*t = 1 .*t_range: \[0, 0.98\]"),
    ({}, ["loss_space=v", "weighting=eps"], Conflict, "loss_space .v. and weighting .eps. are both given"),
    ({}, ["train.lr=-1"], ReparamError, "train.lr must be a positive number, found -1"),
    ({}, ["sample.n=1"], RecipeError, "sample.n must be at least 2"),
    ({}, ["metrics=[fid]"], UnknownName, "unknown metric 'fid'"),
]


@pytest.mark.parametrize(("change", "settings", "error", "message"), BAD, ids=[str(b[0] or b[1][0]) for b in BAD])
def test_bad_recipes(change, settings, error, message):
    base = {**BASE, "seed": 0, "times": "uniform", **change}
    with pytest.raises(error, match=message):
        load_recipe(base, settings)


def test_bad_recipe_files(tmp_path):
    with pytest.raises(UnknownName, match=r"unknown recipe 'spirall'. Did you mean 'spiral'"):
        load_recipe("spirall")
    with pytest.raises(UnknownName) as told:
        load_recipe("nothing of the kind")
    assert "reparam study lists the built-in recipes" in str(told.value)
    assert "spiral" not in str(told.value)  # nor any other: there are too many to read
    with pytest.raises(RecipeError, match=r"cannot read recipe .*gone.yaml: No such file.* reparam study lists"):
        load_recipe(tmp_path / "gone.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n- 2")
    with pytest.raises(RecipeError, match="holds list, expected a mapping"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="it is not text"):
        load_recipe(tmp_path / "binary.yaml")
    (tmp_path / "evil.yaml").write_text("data: !!python/object/apply:os.system ['true']")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "evil.yaml")


def test_a_sampler_and_a_grid_may_have_arguments():
    options = ["sample.sampler={name: ddim, eta: 0.5}", "sample.grid={name: shifted, shift: 4}", "sample.steps=4"]
    config = load_recipe(BASE, options).runs["x0"].sample
    assert config.method() == rp.DDIM(eta=0.5)
    denoiser = rp.Denoiser(torch.nn.Identity(), "rectified_flow", "x0")
    even = [1, 0.75, 0.5, 0.25, 0]
    assert config.times(denoiser) == pytest.approx([4 * u / (1 + 3 * u) for u in even])
    swept = load_recipe(BASE, ["sample.sampler=[heun, {name: ddim, eta: 1}]"]).runs
    assert list(swept) == ["heun", "ddim"]


def test_a_sampler_that_the_schedule_refuses_is_found_before_training():
    with pytest.raises(Unsupported, match=r"heun steps in t, where DDPM.*sample.sampler=ddim"):
        load_recipe({**BASE, "schedule": "ddpm"})
    assert load_recipe({**BASE, "schedule": "ddpm"}, ["sample.sampler=ddim", "target.name=v"])


def test_long_lists_of_names_are_told_of_where_they_can_be_had():
    many = [f"name{i:02}" for i in range(13)]
    told = str(unknown("thing", "name03x", many, "ask for them."))
    assert told.startswith("unknown thing 'name03x'. Did you mean 'name03' or ")
    assert told.endswith("? ask for them.")
    assert told.count("'name") == 4  # the wrong one, and the three nearest
    assert str(unknown("thing", "?", many, "ask for them.")) == "unknown thing '?'. ask for them."
    for known, listed in ((many[:12], "ask for them."), (many, "")):
        assert str(unknown("thing", "?", known, listed)) == f"unknown thing '?'. Known: {', '.join(known)}."


@pytest.mark.parametrize(
    "setting", ["seed=-1", "seed=9223372036854775808", "sample.seed=-1", "data.seed=-1", "seed=[0, -2]"]
)
def test_seeds_that_would_be_one_are_refused(setting):
    with pytest.raises(RecipeError, match=r"seed must lie in 0 … 2\*\*63 - 1, found"):
        load_recipe("digits", [setting])
