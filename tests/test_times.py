import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reparam as rp
from reparam.errors import ReparamError, UnknownName, Unsupported
from reparam.times import (
    TIMES,
    CosMap,
    Importance,
    LogNormalSigma,
    Mode,
    Shifted,
    Stratified,
    Table,
    Times,
    Within,
    log_speed,
    open_uniform,
    resolution_shift,
    shift_time,
    stratify,
    times,
)

F64 = torch.float64
FLOW, FLOW2, COSINE, DDPM = rp.RectifiedFlow(), rp.RectifiedFlow(2.0), rp.Cosine(), rp.DDPM()
#: Distributions whose density has no jumps.
SMOOTH = [
    rp.Uniform(),
    rp.LogitNormal(0.8, 0.8),
    rp.LogitNormal(-1.0, 1.7),
    LogNormalSigma().on(FLOW2),
    LogNormalSigma(-0.4, 1.0).on(COSINE),
    Mode(),
    Mode(0.5),
    Mode(-0.9),
    Mode(0.0),
    CosMap(),
    Shifted("uniform", 3.0),
    Shifted("logit_normal", 0.25),
    Shifted(LogNormalSigma(), 2.0).on(COSINE),
    Stratified("cosmap"),
]
JUMPS = [
    LogNormalSigma().on(DDPM),
    LogNormalSigma(3.0, 2.0).on(DDPM),  # a fifth of it lies beyond the table's last noise level
    Table([1.0, 0.0, 0.0, 3.0, 2.0]),
    Table([0.0, 1.0, 4.0, 0.0]),
    Importance("min_snr", "eps", bins=40).on(COSINE),
    Importance("velocity", "x0", base={"name": "logit_normal"}, bins=16).on(FLOW),
    Within("logit_normal", 0.2, 0.9),
    Shifted(Within("mode", 0.1, 1.0), 3.0),
    Within(Shifted("cosmap", 0.5), 0.0, 0.75),
]
ids = [str(d)[:60] for d in SMOOTH + JUMPS]


@pytest.mark.parametrize("drawn", SMOOTH + JUMPS, ids=ids)
def test_cdf_is_the_inverse_of_quantile_in_both_tails(drawn):
    tail = torch.logspace(-14, -1, 300, dtype=F64)
    for u in (tail, 1 - tail, torch.linspace(0.001, 0.999, 999, dtype=F64)):
        t = drawn.quantile(u)
        assert t.dtype == F64
        assert bool(((t >= 0) & (t <= 1)).all())
        torch.testing.assert_close(drawn.cdf(t), u, rtol=0, atol=1e-10)
        assert bool((t.sort().values == t.sort(stable=True).values).all())
        assert bool((drawn.quantile(u.sort().values).diff() >= 0).all())


@pytest.mark.parametrize("drawn", SMOOTH, ids=lambda d: str(d)[:60])
def test_the_lower_tail_keeps_its_relative_precision(drawn):
    u = torch.logspace(-10, -3, 100, dtype=F64)
    torch.testing.assert_close(drawn.cdf(drawn.quantile(u)), u, rtol=1e-5, atol=0)


@pytest.mark.parametrize("drawn", SMOOTH, ids=lambda d: str(d)[:60])
def test_smooth_densities_integrate_to_one(drawn):
    """Over x = logit t, where the ends are far away: the trapezoidal rule is then exact to rounding."""
    x = torch.linspace(-80, 36, 400_001, dtype=F64)
    t = torch.sigmoid(x)
    total = torch.trapezoid(drawn.log_prob(t).exp() * t * torch.sigmoid(-x), x)
    assert total.item() == pytest.approx(1, abs=2e-7)


@pytest.mark.parametrize("drawn", JUMPS, ids=lambda d: str(d)[:60])
def test_densities_with_jumps_integrate_to_one(drawn):
    n = 400_000
    middles = (torch.arange(n, dtype=F64) + 0.5) / n
    assert drawn.log_prob(middles).exp().mean().item() == pytest.approx(1, abs=2e-5)


@pytest.mark.parametrize("drawn", SMOOTH + JUMPS, ids=ids)
def test_the_density_is_the_derivative_of_the_cdf(drawn):
    # Between the steps of DDPM's table and off the edges of every grid above.
    t = (torch.arange(3, 997, 7, dtype=F64) + 0.43) / 1000
    h = 1e-6
    slope = (drawn.cdf(t + h) - drawn.cdf(t - h)) / (2 * h)
    torch.testing.assert_close(drawn.log_prob(t).exp(), slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("drawn", SMOOTH + JUMPS, ids=ids)
def test_nothing_is_drawn_outside(drawn):
    outside = torch.tensor([-0.5, 1.5], dtype=F64)
    assert drawn.log_prob(outside).tolist() == [-math.inf, -math.inf]
    assert drawn.cdf(outside).tolist() == [0.0, 1.0]
    drawn_times = drawn.sample(4000, torch.Generator().manual_seed(0))
    assert bool(drawn.log_prob(drawn_times).isfinite().all())
    even = torch.linspace(0, 1, 4000, dtype=F64)
    torch.testing.assert_close(drawn.cdf(drawn_times).sort().values, even, rtol=0, atol=0.04)


CONFIGS = [
    {"name": "uniform"},
    {"name": "logit_normal", "mean": 0.8, "std": 0.8},
    {"name": "log_normal_sigma", "mean": -0.4, "std": 1.0},
    {"name": "mode", "scale": 0.8},
    {"name": "cosmap"},
    {"name": "shifted", "base": {"name": "mode", "scale": 1.29}, "shift": 3.0},
    {"name": "shifted", "base": "log_normal_sigma", "shift": 3.0},
    {"name": "stratified", "base": "cosmap"},
    {"name": "table", "density": [1.0, 2.0]},
    {"name": "importance", "weighting": {"name": "min_snr", "gamma": 3.0}, "of": "v", "base": "cosmap", "bins": 7},
    {"name": "within", "base": "log_normal_sigma", "low": 0.1, "high": 0.9},
]


def test_every_name_is_covered():
    assert {c["name"] for c in CONFIGS} == set(TIMES)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c["name"])
def test_config_round_trip(config):
    built = times(config)
    again = times(json.loads(json.dumps(built.config())))
    assert again == built
    u = torch.linspace(0.01, 0.99, 9, dtype=F64)
    torch.testing.assert_close(again.on(COSINE).quantile(u), built.on(COSINE).quantile(u), rtol=0, atol=0)
    # Bound to a schedule it is the same record, but for what only a schedule can say.
    if config["name"] != "importance":
        assert times(built.on(COSINE).config()) == built
    assert built.on(COSINE).bound
    assert built.on(COSINE).on(FLOW) == built.on(FLOW) or config["name"] == "importance"


def test_log_normal_sigma_on_rectified_flow_is_logit_normal():
    u = torch.linspace(0.001, 0.999, 99, dtype=F64)
    for scale in (1.0, 2.0, 4.0):
        edm = LogNormalSigma(-1.2, 1.2).on(rp.RectifiedFlow(scale))
        same = rp.LogitNormal(-1.2 - math.log(scale), 1.2)
        t = same.quantile(u)
        torch.testing.assert_close(edm.quantile(u), t)
        torch.testing.assert_close(edm.log_prob(t), same.log_prob(t))


@pytest.mark.parametrize("schedule", [FLOW2, COSINE, DDPM], ids=str)
def test_log_normal_sigma_draws_these_noise_levels(schedule):
    drawn = LogNormalSigma(-1.2, 1.2).on(schedule)
    u = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    t = drawn.quantile(u)
    level = (schedule.sigma(t) / schedule.alpha(t)).log()
    assert level.mean().item() == pytest.approx(-1.2, abs=1e-4)
    assert level.std().item() == pytest.approx(1.2, abs=1e-3)


def test_noise_levels_beyond_the_schedule_are_left_out():
    drawn = LogNormalSigma(5.0, 1.0).on(DDPM)  # the table ends at ln(σ/α) = 5.05
    last = float((DDPM.sigma(1.0) / DDPM.alpha(1.0)).log())
    half = 0.5 * (1 + math.erf((last - 5) / math.sqrt(2)))
    middle = torch.special.ndtri(torch.tensor(half / 2, dtype=F64)) + 5
    expected = DDPM.time_at(-2 * middle)
    torch.testing.assert_close(drawn.quantile(torch.tensor(0.5, dtype=F64)), expected)
    assert drawn.quantile(torch.tensor(1 - 2.0**-53, dtype=F64)).item() <= 1.0


def test_shift():
    t = torch.linspace(0, 1, 21, dtype=F64)
    for shift in (0.2, 1.0, 3.0):
        moved = shift_time(t, shift)
        torch.testing.assert_close(FLOW.time_at(FLOW.log_snr(t) - 2 * math.log(shift)), moved)
        torch.testing.assert_close(shift_time(moved, 1 / shift), t)
        u = torch.linspace(0.01, 0.99, 20, dtype=F64)
        shifted, same = Shifted(rp.LogitNormal(0.3, 0.9), shift), rp.LogitNormal(0.3 + math.log(shift), 0.9)
        torch.testing.assert_close(shifted.quantile(u), same.quantile(u))
        torch.testing.assert_close(shifted.log_prob(u), same.log_prob(u))
    assert shift_time(torch.tensor(0.5), 3.0).item() == 0.75
    assert resolution_shift(1024**2, 256**2) == 4.0
    assert resolution_shift(64 * 64, 128 * 128) == 0.5


def test_mode_and_cosmap_are_sd3s():
    u = torch.linspace(0, 1, 101, dtype=F64)
    for s in (-1.0, -0.3, 0.0, 0.81, 1.29, 1.75):
        sd3 = 1 - u - s * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
        torch.testing.assert_close(Mode(s).quantile(1 - u), sd3, rtol=0, atol=1e-15)
    # At the two ends of its range: the arcsine distribution, and no slope in the middle.
    t = torch.linspace(0.01, 0.99, 99, dtype=F64)
    torch.testing.assert_close(Mode(-1).cdf(t), 2 / math.pi * torch.asin(t.sqrt()), rtol=0, atol=1e-12)
    torch.testing.assert_close(Mode(-1).log_prob(t).exp(), 1 / (math.pi * (t * (1 - t)).sqrt()))
    assert Mode(-1).cdf(torch.tensor([0.0, 1.0], dtype=F64)).tolist() == [0.0, 1.0]
    assert Mode(2 / (math.pi - 2)).log_prob(torch.tensor(0.5, dtype=F64)).item() > 10
    t = torch.linspace(0, 1, 101, dtype=F64)
    torch.testing.assert_close(CosMap().log_prob(t).exp(), 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2))
    # Uniform on the cosine schedule, at the same noise levels.
    torch.testing.assert_close(FLOW.log_snr(CosMap().quantile(u[1:-1])), COSINE.log_snr(u[1:-1]))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**31))
def test_stratified_uniforms_lie_one_in_each_stratum(n, seed):
    u = rp.times.open_uniform(n, torch.Generator().manual_seed(seed))
    spread = stratify(u)
    assert (spread * n).long().sort().values.tolist() == list(range(n))
    assert bool(((spread > 0) & (spread < 1)).all())
    assert spread[0] == u[0]


@pytest.mark.parametrize("n", [2, 3, 8, 64, 256])
def test_stratified_uniforms_never_reach_an_end(n):
    for u in (1 - 2.0**-53, 2.0**-53):
        spread = stratify(torch.full((n,), u, dtype=F64))
        assert 0 < float(spread.min()) < float(spread.max()) < 1


def test_each_stratified_uniform_is_uniform_by_itself():
    g = torch.Generator().manual_seed(0)
    n, trials = 12, 20_000
    drawn = torch.stack([stratify(rp.times.open_uniform(n, g)) for _ in range(trials)])
    even = (torch.arange(trials, dtype=F64) + 0.5) / trials
    largest = (drawn.sort(0).values - even[:, None]).abs().max().item()
    assert largest < 1.95 / math.sqrt(trials)  # Kolmogorov–Smirnov at 0.1 %, for the worst of 12
    # And every part of a batch is spread over the whole range.
    batch = stratify(rp.times.open_uniform(256, g))
    assert all(float(part.sort().values.diff().max()) < 0.1 for part in batch.split(32))


def test_stratification_reduces_the_variance_and_passes_through_wrappers():
    plain = rp.LogitNormal(0.3, 1.0)
    nested = Shifted(Stratified(plain), 2.0).within(0.1, 0.9)
    assert nested.stratified
    assert Stratified(LogNormalSigma()).within(0, 0.9).on(COSINE).stratified
    assert Importance("min_snr", base=Stratified("uniform")).on(COSINE).stratified
    assert not Shifted(plain, 2.0).stratified
    u = rp.times.open_uniform(64, torch.Generator().manual_seed(3))
    torch.testing.assert_close(nested.draw(u), nested.quantile(stratify(u)), rtol=0, atol=0)
    torch.testing.assert_close(plain.draw(u), plain.quantile(u), rtol=0, atol=0)
    means = {}
    for name, drawn in (("plain", plain), ("stratified", Stratified(plain))):
        g = torch.Generator().manual_seed(1)
        means[name] = torch.stack([drawn.sample(64, g).mean() for _ in range(300)]).std().item()
    assert means["stratified"] < means["plain"] / 20


def test_table_is_piecewise_constant():
    table = Table([1, 0, 3, 4])
    assert table.cdf(torch.tensor([0.0, 0.25, 0.4, 0.5, 0.75, 1.0], dtype=F64)).tolist() == pytest.approx(
        [0, 1 / 8, 1 / 8, 1 / 8, 1 / 2, 1]
    )
    density = table.log_prob(torch.tensor([0.1, 0.3, 0.6, 1.0], dtype=F64)).exp()
    assert density.tolist() == pytest.approx([0.5, 0, 1.5, 2])
    assert table.quantile(torch.tensor([1 / 16, 5 / 16, 3 / 4], dtype=F64)).tolist() == pytest.approx(
        [0.125, 0.625, 0.875]
    )


def test_importance_is_proportional_to_the_weight_times_the_base():
    drawn = Importance("min_snr", "eps", base=rp.LogitNormal(0.5, 1.0), bins=200).on(COSINE)
    t = (torch.arange(200, dtype=F64) + 0.5) / 200
    weight = torch.minimum(torch.ones_like(t), 5 / (COSINE.alpha(t) / COSINE.sigma(t)) ** 2)
    edges = torch.arange(201, dtype=F64) / 200
    share = weight * rp.LogitNormal(0.5, 1.0).cdf(edges).diff()
    torch.testing.assert_close(drawn.log_prob(t).exp() / 200, share / share.sum())
    ratio = drawn.log_prob(t) - weight.log() - rp.LogitNormal(0.5, 1.0).log_prob(t)
    assert (ratio[20:180] - ratio[100]).abs().max().item() < 0.001  # a constant, but for the width of a part


def test_log_speed():
    t = torch.linspace(0.1, 0.9, 9, dtype=F64)
    torch.testing.assert_close(log_speed(t, FLOW2).exp(), 2 / (t * (1 - t)))
    torch.testing.assert_close(log_speed(t, COSINE).exp(), 2 * math.pi / torch.sin(math.pi * t))
    mid = (torch.arange(100, 900, 50, dtype=F64) + 0.5) / 1000
    slope = (DDPM.log_snr(mid - 1e-6) - DDPM.log_snr(mid + 1e-6)) / 2e-6
    torch.testing.assert_close(log_speed(mid, DDPM).exp(), slope, rtol=1e-6, atol=0)


BAD = [
    (lambda: times("logit-normal"), UnknownName, "Did you mean 'logit_normal'"),
    (lambda: times({"name": "mode", "scael": 1}), UnknownName, "argument of distribution of times 'mode' 'scael'"),
    (lambda: times(3), Unsupported, "a name, a mapping or a Times, found 3"),
    (lambda: times({"name": "shifted", "base": "uniform"}), ReparamError, "needs shift"),
    (lambda: Mode(1.8), Unsupported, "scale of mode must be from -1 to .* = 1.7519, found 1.8"),
    (lambda: Mode(-1.01), Unsupported, "found -1.01"),
    (lambda: Mode("big"), Unsupported, "found 'big'"),
    (lambda: Shifted("uniform", 0.0), Unsupported, "shift of the times must be positive, found 0.0"),
    (lambda: Shifted("unifrom", 1.0), UnknownName, "Did you mean 'uniform'"),
    (lambda: LogNormalSigma(0.0, 0.0), Unsupported, "std of log_normal_sigma must be positive"),
    (lambda: LogNormalSigma(math.nan), Unsupported, "mean of log_normal_sigma must be a finite number, found nan"),
    (lambda: LogNormalSigma().sample(2), Unsupported, r"sigma/alpha, .* use times.on\(schedule\)"),
    (lambda: LogNormalSigma().cdf(torch.ones(1)), Unsupported, "on"),
    (lambda: LogNormalSigma().log_prob(torch.ones(1)), Unsupported, "on"),
    (
        lambda: LogNormalSigma(50.0, 1.0).on(DDPM),
        Unsupported,
        "no noise levels in common with DDPM.*runs from -inf to 5",
    ),
    (lambda: Importance("min_snr").sample(2), Unsupported, "known under a schedule"),
    (lambda: Importance("min_snr", bins=0), Unsupported, "positive integer, found 0"),
    (lambda: Importance("min_sn"), UnknownName, "Did you mean 'min_snr'"),
    (lambda: Importance("x0", "velocty"), UnknownName, "unknown target"),
    (lambda: Table([]), Unsupported, r"found \[\]"),
    (lambda: Table([1, -1]), Unsupported, "not negative, found -1"),
    (lambda: Table([0, 0]), Unsupported, "only zeros"),
    (lambda: resolution_shift(0, 5), Unsupported, "number of pixels must be positive, found 0"),
    (lambda: Table([0, 1]).within(0.0, 0.5), Unsupported, r"draws no times in \[0, 0.5\]"),
    (lambda: LogNormalSigma(-20, 0.1).within(0.5, 1).on(FLOW).sample(1), Unsupported, "draws no times"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=range(len(BAD)))
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_distribution_of_ones_own_needs_three_methods():
    class Late(Times):
        name = "late"

        def quantile(self, u):
            return u.sqrt()

        def cdf(self, t):
            return t.clamp(0, 1) ** 2

        def log_prob(self, t):
            return torch.where((t > 0) & (t <= 1), (2 * t).log(), -torch.inf)

    drawn = Shifted(Stratified(Late()), 1.0).within(0.5, 1.0).on(DDPM)
    u = torch.tensor([0.25], dtype=F64)
    torch.testing.assert_close(drawn.quantile(u), (0.25 + 0.75 * u).sqrt())


@pytest.mark.parametrize("extreme", [0, 2**52 - 1])
def test_uniform_numbers_lie_strictly_inside_whatever_the_generator_gives(extreme, monkeypatch):
    def drawn(low, high, shape, **_):
        assert low <= extreme < high
        return torch.full(shape, extreme)

    monkeypatch.setattr(torch, "randint", drawn)
    u = open_uniform(3)
    assert bool(((u > 0) & (u < 1)).all())
    assert u.tolist() == [2.0**-53 if extreme == 0 else 1 - 2.0**-53] * 3  # as far from one end as from the other
