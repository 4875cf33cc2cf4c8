"""Whether targets differ by more than chance: intervals, paired differences, and what a study says of them."""

import math

import numpy as np
import pytest
from scipy import stats

from reparam.metrics.significance import Difference, independent_difference, mean_interval, paired_difference
from reparam.report.rows import Study
from reparam.report.verdict import verdict
from reparam.studies.leaderboard import as_text, ranked
from reparam.studies.recipe import load_recipe
from reparam.studies.summary import summary


def rows_of(scores, better=None, floor=0.01, data="spiral"):
    """Rows of a metric "m"; scores: by target, a value a seed. None: diverged; (value, low, high): with an interval."""
    rows = []
    for target, values in scores.items():
        for seed, value in enumerate(values):
            value, *interval = value if isinstance(value, tuple) else (value,)
            entry = {"value": value, "floor": floor, "interval": interval or None}
            entry |= {"better": better} if better else {}
            status = "diverged" if value is None else "finished"
            row = {"run": f"{target}-{seed}", "data": data, "target": target, "seed": seed, "status": status}
            rows.append({**row, "lr": 1e-3, "wall_s": 1.0, "metrics": {"m": entry}})
    return rows


def standings(rows):
    return {entry["target"]: entry["metrics"]["m"]["verdict"] for entry in summary(rows, "m")}


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("level", [0.95, 0.983])
def test_intervals_are_those_of_scipy(n, level):
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=(2, n)).tolist()
    expected = stats.t.interval(level, n - 1, loc=np.mean(a), scale=stats.sem(a))
    np.testing.assert_allclose(mean_interval(a, level), expected, rtol=1e-9)
    found = paired_difference(dict(enumerate(a)), {**dict(enumerate(b)), 99: 7.0}, level)
    test = stats.ttest_rel(a, b)
    expected = test.confidence_interval(level)
    np.testing.assert_allclose((found.low, found.high), (expected.low, expected.high), rtol=1e-9)
    assert found.value == pytest.approx(np.mean(a) - np.mean(b))
    assert found.beyond_noise == (test.pvalue < 1 - level)
    assert found.source == f"{n} seeds, paired"


def test_too_few_seeds_and_seeds_that_are_alike():
    assert mean_interval([]) is mean_interval([1.0]) is None
    assert mean_interval([2.0, 2.0]) == (2.0, 2.0)
    assert paired_difference({0: 1.0, 1: 2.0}, {1: 2.0, 2: 3.0}) is None
    same = paired_difference(dict.fromkeys(range(3), 0.1 + 0.2), dict.fromkeys(range(3), 0.3))
    assert (same.value, same.beyond_noise) == (0, False)  # they differ by rounding alone
    assert paired_difference({0: 2.0, 1: 2.0}, {0: 1.0, 1: 1.0}).beyond_noise
    assert not Difference(0.0, 0.0, 0.0, "samples").beyond_noise
    assert Difference(-1.0, -2.0, -0.5, "samples").beyond_noise


def test_two_runs_by_their_own_intervals():
    found = independent_difference(5.0, (2.0, 8.0), 1.0, (-3.0, 5.0))
    assert (found.value, found.low, found.high) == (4.0, -1.0, 9.0)  # 3 and 4 add to 5
    uneven = independent_difference(5.0, (2.0, 6.0), 1.0, (-1.0, 5.0))
    assert (uneven.low, uneven.high) == (4 - 5.0, 4 + math.hypot(1, 2))
    wider = independent_difference(5.0, (2.0, 8.0), 1.0, (-3.0, 5.0), level=0.99)
    assert wider.high - 4 == pytest.approx(5 * stats.t.ppf(0.995, 9) / stats.t.ppf(0.975, 9))
    assert independent_difference(5.0, (2.0, math.inf), 1.0, (0.0, 2.0)) is None


def test_own_intervals_hold_as_often_as_they_say():
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, 1, (2000, 40)), rng.normal(1, 2, (2000, 40))
    held = 0
    for a, b in zip(x, y, strict=True):
        found = independent_difference(a.mean(), mean_interval(a.tolist()), b.mean(), mean_interval(b.tolist()))
        held += found.low <= 2 <= found.high
    assert 0.94 <= held / 2000 <= 0.97


@pytest.mark.parametrize(("targets", "seeds"), [(2, 3), (4, 5)])
def test_equal_targets_show_no_difference(targets, seeds):
    """Of four equal targets the best is chosen by its luck; hence no more than a bound is known of them."""
    rng = np.random.default_rng(targets)
    silent = 0
    for _ in range(400):
        luck = rng.normal(0, 1, seeds)  # of a seed, shared by all targets
        scores = {f"t{i}": (5 + luck + rng.normal(0, 0.3, seeds)).tolist() for i in range(targets)}
        silent += "worse" not in standings(rows_of(scores)).values()
    assert (0.92 if targets == 2 else 0.87) <= silent / 400 <= 0.98


def test_targets_that_differ_are_told_though_seeds_spread_more():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(100):
        luck = rng.normal(0, 1, 4)
        a, b = 5 + luck + rng.normal(0, 0.02, 4), 5.3 + luck + rng.normal(0, 0.02, 4)
        found.append(standings(rows_of({"a": a.tolist(), "b": b.tolist()})))
    assert all(f == {"a": "best", "b": "worse"} for f in found)


def test_one_diverged_seed_is_left_out_of_the_pairs():
    rows = rows_of({"a": [1.0, 2.0, 3.1], "b": [1.5, None, 3.5]})
    (first, second) = summary(rows, "m")
    assert (first["target"], first["metrics"]["m"]["n"]) == ("a", 3)
    assert second["seeds"] == [0, 2]
    assert second["metrics"]["m"]["difference_from_best"]["source"] == "2 seeds, paired"
    assert second["metrics"]["m"]["difference_from_best"]["value"] == pytest.approx(0.45)
    # By its mean b leads, having lost its hardest seed; by the seeds that both finished it does not.
    rows = rows_of({"a": [1.0, 2.01, 9.0], "b": [1.5, 2.5, None]})
    assert standings(rows) == {"b": "best", "a": "better"}
    assert "but better on the seeds that both finished: <b>a</b>" in verdict(Study.of(rows, "m"))


def test_higher_is_better_and_negative_values():
    rows = rows_of({"a": [0.5, 0.52, 0.51], "b": [0.8, 0.81, 0.82]}, better="higher", floor=0.9)
    assert standings(rows) == {"b": "best", "a": "worse"}
    text = verdict(Study.of(rows, "m"))
    assert "<b>b</b> is best (0.810 ± 0.0248); the runner-up, a (0.510 ± 0.0248), reaches 63 % of that" in text
    rows = rows_of({"a": [-2e-3, -1e-3, 1e-3], "b": [0.4, 0.401, 0.404]}, floor=-1e-4)
    assert standings(rows) == {"a": "best", "b": "worse"}
    assert "is behind by 0.402" in verdict(Study.of(rows, "m"))
    rows = rows_of({"a": [(-1e-3, -3e-3, 1e-3)], "b": [(1e-3, -1e-3, 3e-3)]}, floor=-1e-4)
    assert standings(rows) == {"a": "best", "b": "no difference"}


def test_verdicts_in_words():
    rows = rows_of({"a": [1.0, 2.0, 3.0], "b": [1.1, 1.9, 3.3], "c": [9.0, 10.0, 11.5]})
    text = verdict(Study.of(rows, "m"))
    pair, level = stats.ttest_rel([1.1, 1.9, 3.3], [1.0, 2.0, 3.0]), 1 - 0.05 / 2
    low, high = pair.confidence_interval(level)
    assert "there is no difference from <b>b</b>" in text
    assert f"−{-low:.3g} to {high:.3g} (97.5 % interval for 2 comparisons, over 3 seeds, paired); <b>c</b> is" in text
    assert "Bonferroni" in text
    rows = rows_of({"a": [(1.0, 0.9, 1.1)], "b": [(3.0, 2.8, 3.2)]})
    text = verdict(Study.of(rows, "m"))
    assert "scores 3.0 times as much; they differ by 1.78 to 2.22 (95 % interval, of these samples only;" in text
    assert "another seed may differ by more" in text
    assert "Bonferroni" not in text
    close = rows_of({"a": [(1.0, 0.99, 1.01)], "b": [(1.05, 1.04, 1.06)]})
    assert "is behind by 0.0500, a small difference" in verdict(Study.of(close, "m"))


def test_summary_of_a_single_run():
    (only,) = summary(rows_of({"a": [(1.0, 0.9, 1.1)]}), "m")
    assert only["metrics"]["m"] == {
        "mean": 1.0, "interval": [0.9, 1.1], "n": 1, "floor": 0.01, "better": "lower",
        "difference_from_best": None, "verdict": None,
    }  # fmt: skip
    (nothing,) = summary(rows_of({"a": [None]}), "m")
    assert nothing["metrics"]["m"]["mean"] is nothing["metrics"]["m"]["interval"] is None


# ------------------------------------------------------------------------------ the terminal's table


def planned(scores, settings=(), better=None):
    """A recipe over targets, seeds and rates, and rows with the scores (value or (value, low, high)) by run."""
    raw = {"name": "s", "data": {"name": "spiral", "dim": 2}, "network": "mlp", "rank_by": "off_manifold"}
    plan = load_recipe(raw, ["target=[x0, v]", *settings])
    assert set(scores) == set(plan.runs)
    rows = []
    for run, config in plan.runs.items():
        (row,) = rows_of({"?": [scores[run]]}, better)
        metrics = {"off_manifold": row["metrics"]["m"]}
        own = {"run": run, "target": config.target["name"], "seed": config.seed, "lr": config.train.lr}
        rows.append({**row, **own, "metrics": metrics})
    return ranked(rows, plan), plan


def test_the_table_of_several_seeds():
    scores = {"x0-seed0": 1.0, "x0-seed1": 2.0, "x0-seed2": 3.0, "v-seed0": 1.1, "v-seed1": 1.9, "v-seed2": 3.3}
    rows, plan = planned(scores, ["seed=[0, 1, 2]"])
    lines = as_text(rows, plan).splitlines()
    assert len(lines) == 5
    half = stats.t.ppf(0.975, 2) / math.sqrt(3)
    assert f"2 ± {half:.3g}" in lines[3]
    assert lines[3].split()[0] == "x0"
    assert lines[3].endswith("(3 seeds)")
    assert lines[4].endswith("(3 seeds); no difference from the best")
    assert [row["target"] for row in rows] == ["x0"] * 3 + ["v"] * 3
    rows, plan = planned({**scores, "v-seed1": None}, ["seed=[0, 1, 2]"])
    assert "(3 seeds); seed 1 diverged" in as_text(rows, plan)


def test_the_table_of_one_seed():
    rows, plan = planned({"x0": (1.0, 0.9, 1.1), "v": (3.0, 2.8, 3.2)})
    lines = as_text(rows, plan).splitlines()
    assert "1 ± 0.1" in lines[3]
    assert "3 ± 0.2" in lines[4]
    assert "no difference" not in lines[4]
    rows, plan = planned({"x0": 1.0, "v": 1.1})
    assert "±" not in as_text(rows, plan)


def test_ranking_where_more_is_better():
    rows, plan = planned({"x0": 0.4, "v": 0.8}, better="higher")
    assert [row["target"] for row in rows] == ["v", "x0"]
    assert as_text(rows, plan).splitlines()[3].split()[0] == "v"


def test_the_best_learning_rate_is_that_of_the_mean_over_seeds():
    scores = {}
    for target in ("x0", "v"):
        for rate, values in (("0.001", (1.0, 5.0)), ("0.003", (2.0, 2.5))):
            scores |= {f"lr{rate}-{target}-seed{seed}": value for seed, value in enumerate(values)}
    rows, _ = planned(scores, ["seed=[0, 1]", "train.lr=[1e-3, 3e-3]"])
    assert {row["run"] for row in rows if row["best_lr"]} == {run for run in scores if "lr0.003" in run}
    assert all(row["lr_tried"] == [1e-3, 3e-3] for row in rows)
    scores["lr0.003-x0-seed0"] = None  # a rate that loses a seed is not the best
    rows, _ = planned(scores, ["seed=[0, 1]", "train.lr=[1e-3, 3e-3]"])
    assert {row["lr"] for row in rows if row["best_lr"] and row["target"] == "x0"} == {1e-3}


def test_settings_that_rows_do_not_tell_are_not_mixed_over_seeds():
    """Of two batch sizes the better one of each seed would be a third, better than both."""
    scores = {}
    for batch, values in ((16, (1.0, 4.0)), (32, (3.0, 2.0))):
        scores |= {f"batch{batch}-{t}-seed{s}": v for s, v in enumerate(values) for t in ("x0", "v")}
    rows, _ = planned(scores, ["seed=[0, 1]", "train.batch=[16, 32]"])
    means = {e["target"]: e["metrics"]["off_manifold"]["mean"] for e in summary(rows, "off_manifold")}
    assert sorted(means.values()) == [2.5] * 4
