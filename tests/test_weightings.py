import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import reparam as rp
from reparam.errors import ReparamError, TimeOutOfRange, UnknownName, Unsupported
from reparam.times import CosMap, Importance, LogNormalSigma, Mode, Shifted, Stratified, Times
from reparam.weightings import (
    EDM,
    P2,
    WEIGHTINGS,
    Capped,
    Corrected,
    Floored,
    JiT,
    LearnedScale,
    MinSNR,
    Sigmoid,
    SoftMinSNR,
    Space,
    Sum,
    Weighting,
    effective,
    space,
    weighting,
)

F64 = torch.float64
INF = math.inf
FLOW, FLOW2, COSINE, DDPM = rp.RectifiedFlow(), rp.RectifiedFlow(2.0), rp.Cosine(), rp.DDPM()
SCHEDULES = [FLOW, FLOW2, COSINE, DDPM]
STEPS = [1, 20, 100, 300, 500, 700, 900, 990]


def coefficients(schedule):
    """α and σ at t = k/1000, written out here once more."""
    t = torch.tensor(STEPS, dtype=F64) / 1000
    if isinstance(schedule, rp.RectifiedFlow):
        return t, 1 - t, schedule.noise_scale * t
    if isinstance(schedule, rp.Cosine):
        return t, torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
    signal = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64)).cumprod(0)[torch.tensor(STEPS) - 1]
    return t, signal.sqrt(), (1 - signal).sqrt()


#: The published table: (name or mapping, m_x, m_ε), as functions of SNR, t and the noise scale.
TABLE = {
    "x0": ("x0", lambda r, t, s: torch.ones_like(r), lambda r, t, s: 1 / r),
    "eps": ("eps", lambda r, t, s: r, lambda r, t, s: torch.ones_like(r)),
    "snr_trunc": ("snr_trunc", lambda r, t, s: r.clamp(min=1), lambda r, t, s: (1 / r).clamp(min=1)),
    "min_snr": ("min_snr", lambda r, t, s: r.clamp(max=5), lambda r, t, s: (5 / r).clamp(max=1)),
    "min_snr 2": (
        {"name": "min_snr", "gamma": 2},
        lambda r, t, s: r.clamp(max=2),
        lambda r, t, s: (2 / r).clamp(max=1),
    ),
    "soft_min_snr": (
        {"name": "soft_min_snr", "gamma": 5.0},
        lambda r, t, s: r * 5 / (r + 5),
        lambda r, t, s: 5 / (r + 5),
    ),
    "p2": ("p2", lambda r, t, s: r / (1 + r), lambda r, t, s: 1 / (1 + r)),
    "p2 0.5": (
        {"name": "p2", "k": 2, "gamma": 0.5},
        lambda r, t, s: r / (2 + r) ** 0.5,
        lambda r, t, s: (2 + r) ** -0.5,
    ),
    "edm": (
        "edm",
        lambda r, t, s: (1 / r + 0.25) / (1 / r * 0.25),
        lambda r, t, s: (1 / r + 0.25) / (1 / r * 0.25) / r,
    ),
    "edm2": (
        {"name": "edm2", "sigma_data": 1.5},
        lambda r, t, s: (1 / r + 2.25) / (1 / r * 2.25),
        lambda r, t, s: (1 / r + 2.25) / (1 / r * 2.25) / r,
    ),
    "jit": ("jit", lambda r, t, s: 1 / t.clamp(min=0.05) ** 2, lambda r, t, s: 1 / t.clamp(min=0.05) ** 2 / r),
    "hybrid": ({"x0": 1, "eps": 0.1}, lambda r, t, s: 1 + 0.1 * r, lambda r, t, s: 1 / r + 0.1),
    "capped eps": (
        {"name": "capped", "base": "eps", "cap": 10},
        lambda r, t, s: r.clamp(max=10),
        lambda r, t, s: (10 / r).clamp(max=1),
    ),
    "floored min_snr": (
        {"name": "floored", "base": "min_snr", "floor": 1},
        lambda r, t, s: r.clamp(1, 5),
        lambda r, t, s: r.clamp(1, 5) / r,
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("row", TABLE)
def test_the_published_table(row, schedule):
    config, m_x, m_eps = TABLE[row]
    t, alpha, sigma = coefficients(schedule)
    snr, scale = (alpha / sigma) ** 2, getattr(schedule, "noise_scale", None)
    w = weighting(config)
    torch.testing.assert_close(w(t, schedule), m_x(snr, t, scale), rtol=1e-10, atol=0)
    torch.testing.assert_close(w.on_eps(t, schedule), m_eps(snr, t, scale), rtol=1e-10, atol=0)


@pytest.mark.parametrize("schedule", [COSINE, DDPM], ids=str)
def test_v_is_snr_plus_one_where_variance_is_preserved(schedule):
    t, alpha, sigma = coefficients(schedule)
    snr = (alpha / sigma) ** 2
    torch.testing.assert_close(weighting("v")(t, schedule), snr + 1, rtol=1e-10, atol=0)
    torch.testing.assert_close(weighting("v").on_eps(t, schedule), 1 + 1 / snr, rtol=1e-10, atol=0)
    # The weight of Min-SNR on v that took diffusers three rounds.
    on_v = weighting("min_snr").on_prediction(t, schedule, rp.target("v"))
    torch.testing.assert_close(on_v, snr.clamp(max=5) / (snr + 1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("schedule", [FLOW, FLOW2], ids=str)
def test_velocity_on_the_straight_path(schedule):
    t, alpha, sigma = coefficients(schedule)
    log_snr, s = 2 * (alpha / sigma).log(), schedule.noise_scale
    torch.testing.assert_close(weighting("velocity")(t, schedule), 1 / t**2, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        weighting("velocity").on_eps(t, schedule), (s + (-log_snr / 2).exp()) ** 2, rtol=1e-10, atol=0
    )
    ends = torch.tensor([0.0, *t.tolist(), 1.0], dtype=F64)
    for on in ("x0", "v", "velocity"):  # JiT's weight is a cap on velocity's, at every noise scale
        of = rp.target(on)
        capped = Capped("velocity", 400).on_prediction(ends, schedule, of)
        torch.testing.assert_close(JiT().on_prediction(ends, schedule, of), capped)
    torch.testing.assert_close(
        JiT().on_prediction(ends, schedule, rp.target("velocity")), (ends / 0.05).clamp(max=1) ** 2
    )


def test_edm_is_the_space_of_edms_f():
    t = torch.tensor([0.0, 0.001, 0.3, 0.9, 0.999, 1.0], dtype=F64)
    f = rp.targets.EDM(0.7)
    for schedule in SCHEDULES:
        for on in ("x0", "v", "velocity", f):
            of = rp.target(on)
            torch.testing.assert_close(EDM(0.7).on_prediction(t, schedule, of), Space(f).on_prediction(t, schedule, of))
    assert weighting({"name": "edm", "sigma_data": 0.7}) == EDM(0.7)


ENDS = [
    # weighting, schedule, end, on a prediction of, weight
    ("eps", COSINE, 1.0, "eps", 1),
    ("x0", COSINE, 0.0, "x0", 1),
    ("x0", COSINE, 1.0, "eps", INF),  # truly: at α = 0 ε says nothing of x0
    ("eps", COSINE, 0.0, "x0", INF),  # and at σ = 0 x0 says nothing of ε
    ("eps", COSINE, 1.0, "x0", 0),
    ("x0", COSINE, 0.0, "eps", 0),
    ("v", COSINE, 0.0, "eps", 1),
    ("v", COSINE, 1.0, "x0", 1),
    ("v", COSINE, 0.0, "x0", INF),
    ("v", COSINE, 1.0, "eps", INF),
    ("velocity", FLOW2, 0.0, "eps", 4),
    ("velocity", FLOW2, 1.0, "x0", 1),
    ("velocity", FLOW2, 0.0, "v", 4),
    ("velocity", FLOW2, 1.0, "v", 0.25),
    ("velocity", COSINE, 0.0, "v", (math.pi / 2) ** 2),
    ("min_snr", COSINE, 1.0, "eps", 1),
    ("min_snr", COSINE, 1.0, "v", 0),
    ("min_snr", COSINE, 1.0, "x0", 0),
    ("min_snr", COSINE, 0.0, "x0", 5),
    ("min_snr", COSINE, 0.0, "v", 0),
    ("min_snr", COSINE, 0.0, "eps", 0),
    ("soft_min_snr", FLOW, 1.0, "eps", 1),
    ("soft_min_snr", FLOW, 0.0, "x0", 4),
    ({"name": "floored", "base": "min_snr", "floor": 0.5}, COSINE, 1.0, "v", 0.5),
    ({"name": "floored", "base": "min_snr", "floor": 0.5}, COSINE, 1.0, "x0", 0.5),
    ({"name": "floored", "base": "min_snr", "floor": 0.5}, COSINE, 0.0, "x0", 5),
    ("snr_trunc", COSINE, 1.0, "x0", 1),
    ("snr_trunc", COSINE, 1.0, "v", 1),
    ("snr_trunc", COSINE, 0.0, "v", 1),
    ("snr_trunc", COSINE, 0.0, "eps", 1),
    ("snr_trunc", COSINE, 0.0, "x0", INF),
    ("snr_trunc", COSINE, 1.0, "eps", INF),
    ({"name": "edm", "sigma_data": 0.5}, COSINE, 1.0, "x0", 4),
    ({"name": "edm", "sigma_data": 0.5}, COSINE, 1.0, "v", 4),
    ({"name": "edm", "sigma_data": 0.5}, COSINE, 0.0, "v", 1),
    ({"name": "edm", "sigma_data": 0.5}, COSINE, 0.0, rp.targets.EDM(0.5), 1),
    ({"name": "edm", "sigma_data": 0.5}, COSINE, 1.0, rp.targets.EDM(0.5), 1),
    ({"name": "p2", "gamma": 1}, COSINE, 0.0, "x0", 1),
    ({"name": "p2", "gamma": 1}, COSINE, 1.0, "eps", 1),
    ({"name": "p2", "gamma": 2, "k": 2}, COSINE, 1.0, "eps", 0.25),
    ({"name": "p2", "gamma": 2}, COSINE, 0.0, "x0", 0),
    ({"name": "p2", "gamma": 0.5}, COSINE, 0.0, "x0", INF),
    ({"name": "p2", "gamma": 0}, COSINE, 1.0, "eps", 1),
    ({"x0": 1, "eps": 0.1}, COSINE, 0.0, "v", 0.1),
    ({"x0": 1, "eps": 0.1}, COSINE, 1.0, "v", 1),
    ({"x0": 1, "eps": 0.1}, COSINE, 1.0, "x0", 1),
    ("jit", FLOW2, 0.0, "x0", 400),
    ("jit", FLOW2, 1.0, "x0", 1),
    ("jit", FLOW2, 0.0, "velocity", 0),
    ("jit", FLOW2, 1.0, "velocity", 1),
    ({"name": "capped", "base": "velocity", "cap": 400}, FLOW2, 0.0, "x0", 400),
    ({"name": "capped", "base": "eps", "cap": 7}, FLOW2, 0.0, "x0", 7),
    ({"name": "capped", "base": "eps", "cap": 7}, FLOW2, 1.0, "eps", 1),
    ({"name": "capped", "base": "eps", "cap": 7}, FLOW2, 0.0, "velocity", 0),
]


@pytest.mark.parametrize(("config", "schedule", "end", "of", "expected"), ENDS, ids=range(len(ENDS)))
def test_at_the_ends(config, schedule, end, of, expected):
    found = weighting(config).on_prediction(end, schedule, rp.target(of)).item()
    assert found == pytest.approx(expected, rel=1e-14, abs=0)


ALL = [
    *(config for config, _, _ in TABLE.values()),
    "v",
    "velocity",
    {"name": "score"},
    {"name": "p2", "gamma": 2.0},
    {"name": "corrected", "base": "min_snr", "reference": "cosmap"},
    {"name": "sigmoid", "bias": -1.0},
    [("velocity", 2), ({"name": "capped", "base": "v", "cap": 3}, 0.5)],
]


def every(drawn=None):
    """One of everything, told that uniform times are drawn."""
    return [(Sum(c) if isinstance(c, list) else weighting(c)).drawn_from(drawn or rp.Uniform()) for c in ALL]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("of", ["x0", "eps", "v", "velocity", "edm", "k"])
def test_the_value_at_an_end_is_the_limit(of, schedule):
    """For every weighting on every target: no NaN, and at the ends what it tends to."""
    of = rp.target(of)
    for w in every():
        for end, near in ((0.0, 1e-13), (1.0, 1 - 1e-13)):
            at, close = (w.on_prediction(t, schedule, of).item() for t in (end, near))
            if schedule == DDPM and end == 1.0:
                assert at == pytest.approx(close, rel=1e-9)  # the table ends before pure noise
            elif math.isinf(at):
                assert close > 1e10, w
            elif at == 0:
                assert close < 1e-5, w
            else:
                assert at == pytest.approx(close, rel=1e-3), w


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_loss_and_gradient_do_not_depend_on_the_target(schedule):
    """One x0 estimate, expressed as any target: equal loss, and equal gradient in the estimate."""
    g = torch.Generator().manual_seed(0)
    x0, eps, guess = (torch.randn(9, 5, dtype=F64, generator=g) for _ in range(3))
    t = torch.linspace(0.05, 0.95, 9, dtype=F64)
    guess.requires_grad_(True)
    x_t = schedule.add_noise(x0, eps, t)

    class As(nn.Module):
        def __init__(self, target):
            super().__init__()
            self.target = target

        def forward(self, x, time):
            return rp.convert(guess, x_t, t, schedule, source="x0", to=self.target)

    t_range = (0.04, 0.96)
    for w in every(rp.Uniform().within(*t_range)):
        weight = w(t, schedule)[:, None]
        assert bool((weight > 0).all())
        want_loss = (weight * (guess - x0) ** 2).mean(1).detach()
        want_gradient = 2 * weight * (guess - x0).detach() / 5
        for name in ["x0", "eps", "v", "velocity", "score", "edm", "k"]:
            objective = rp.Objective(schedule, name, weighting=w, t_range=t_range)
            loss = objective(As(objective.target), x0, t, eps)
            (gradient,) = torch.autograd.grad(loss.sum(), guess)
            torch.testing.assert_close(loss, want_loss, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(gradient, want_gradient, rtol=1e-8, atol=1e-10)


@settings(max_examples=300, deadline=None)
@given(
    x=st.floats(-600, 36),  # logit of t: down to 1e-260
    gamma=st.floats(1e-3, 1e3),
    power=st.floats(0, 3),
    schedule=st.sampled_from([FLOW, FLOW2, COSINE]),
    of=st.sampled_from(["x0", "v", "velocity", "edm"]),
)
def test_nothing_overflows_that_need_not(x, gamma, power, schedule, of):
    """Far into both ends: never NaN, within its bounds, and ordered as the formulas are."""
    t = torch.tensor(x, dtype=F64).sigmoid()
    hard, soft = MinSNR(gamma), SoftMinSNR(gamma)
    for w in (hard, soft, P2(gamma, power), EDM(gamma), JiT(), Capped("velocity", gamma), Floored(hard, gamma / 2)):
        on = w.on_prediction(t, schedule, rp.target(of)).item()
        assert on >= 0
        assert not math.isnan(w(t, schedule).item())
        assert not math.isnan(w.on_eps(t, schedule).item())
    tiny = 1 + 1e-9
    assert hard(t, schedule).item() / 2 <= soft(t, schedule).item() * tiny <= hard(t, schedule).item() * tiny**2
    assert Capped("velocity", gamma)(t, schedule).item() <= gamma * tiny
    assert Floored("eps", gamma)(t, schedule).item() * tiny >= gamma
    # The two forms differ by the SNR wherever both are within float64.
    log_x, log_eps = (P2(gamma, power).log_weight(t, schedule, e).item() for e in ("x0", "eps"))
    assert log_x - log_eps == pytest.approx(schedule.log_snr(t).item(), rel=1e-9, abs=1e-9)


def test_a_learned_target_gets_its_gradient_through_the_weight():
    k = rp.targets.KTarget(0.4, learned=True).to_learn()
    for name in ("min_snr", "eps", {"name": "capped", "base": "velocity", "cap": 9}):
        weight = weighting(name).on_prediction(torch.tensor([0.2, 0.6], dtype=F64), COSINE, k)
        (gradient,) = torch.autograd.grad(weight.sum(), k.parameter)
        step = 1e-3
        moved = [rp.targets.KTarget(float(torch.sigmoid(k.parameter.detach().double() + d))) for d in (step, -step)]
        up, down = (
            weighting(name).on_prediction(torch.tensor([0.2, 0.6], dtype=F64), COSINE, m).sum().item() for m in moved
        )
        assert gradient.item() == pytest.approx((up - down) / (2 * step), rel=1e-4)


def test_sums_are_sums_of_losses():
    x0, eps = torch.randn(6, 3, dtype=F64), torch.randn(6, 3, dtype=F64)
    t = torch.linspace(0.1, 0.9, 6, dtype=F64)
    zero = nn.Module()
    zero.forward = lambda x, time: torch.zeros_like(x)
    hybrid, in_x0, in_eps = (
        rp.Objective(COSINE, "v", weighting=w)(zero, x0, t, eps) for w in ({"x0": 1, "eps": 0.1}, "x0", "eps")
    )
    torch.testing.assert_close(hybrid, in_x0 + 0.1 * in_eps)
    assert space({"x0": 1, "eps": 0.1}) == weighting({"x0": 1, "eps": 0.1}) == Sum({"x0": 1.0, "eps": 0.1})
    assert space("velocity") == space({"name": "velocity"}) == weighting("velocity")
    assert space(rp.targets.X0()) == Space(rp.targets.X0())
    assert space({"epsilon": 2}).config() == {"eps": 2.0}


CONFIGS = [
    "snr_trunc",
    {"name": "min_snr", "gamma": 5},
    {"name": "soft_min_snr", "gamma": 4.0},
    {"name": "p2", "k": 1.0, "gamma": 0.5},
    {"name": "sigmoid", "bias": -2.0},
    {"name": "edm", "sigma_data": 0.5},
    {"name": "edm2", "sigma_data": 0.5},
    {"name": "jit", "floor": 0.05},
    {"name": "capped", "base": {"name": "sigmoid", "bias": 1.0}, "cap": 400},
    {"name": "floored", "base": {"name": "capped", "base": "v", "cap": 5}, "floor": 0.1},
    {"name": "sum", "terms": {"min_snr": 1, "jit": 2}},
    {"name": "corrected", "base": "velocity", "reference": {"name": "mode", "scale": 1.0}},
    {"x0": 1, "eps": 0.1},
    {"name": "sum", "terms": [[{"name": "min_snr", "gamma": 2}, 1.0], [{"name": "min_snr", "gamma": 7}, 2.0]]},
    "velocity",
    {"name": "k", "k": 0.3},
]


def test_every_name_is_covered():
    assert {c if isinstance(c, str) else c.get("name") for c in CONFIGS} >= set(WEIGHTINGS)
    assert not set(WEIGHTINGS) & (set(rp.targets.TARGETS) - {"edm"})  # edm is both, and the two are one


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_config_round_trip(config):
    built = weighting(config)
    again = weighting(json.loads(json.dumps(built.config())))
    assert again == built
    assert weighting(built) is built
    t = torch.linspace(0.1, 0.9, 5, dtype=F64)
    bound, bound_again = (w.drawn_from(CosMap()) for w in (built, again))
    torch.testing.assert_close(bound(t, COSINE), bound_again(t, COSINE), rtol=0, atol=0)
    assert weighting(bound.config()) == built  # what it was told of the times is not part of the record


class Everywhere(Weighting):
    """A weighting of one's own with one method; infinite above ½."""

    name = "everywhere"

    def log_weight(self, t, schedule, error):
        log = torch.where(t > 0.5, torch.inf, t)
        return log if error == "x0" else log - schedule.log_snr(t)


BAD = [
    (lambda: weighting("min-snr"), UnknownName, "unknown weighting 'min-snr'. Did you mean 'min_snr'"),
    (
        lambda: weighting({"name": "min_snr", "gama": 5}),
        UnknownName,
        "weighting 'min_snr' 'gama'. Did you mean 'gamma'",
    ),
    (lambda: weighting({"name": "v", "gamma": 5}), UnknownName, "gamma"),
    (lambda: weighting({"gamma": 5}), UnknownName, "unknown weighting 'gamma'"),
    (lambda: weighting({}), UnknownName, "unknown weighting"),
    (lambda: weighting(3), UnknownName, "unknown weighting '3'"),
    (lambda: weighting({"name": "capped", "base": "v"}), ReparamError, "needs cap"),
    (lambda: weighting({"name": "sigmoid", "_drawn": "uniform"}), UnknownName, "'_drawn'"),
    (lambda: MinSNR(0), Unsupported, "gamma of weighting 'min_snr' must be positive, found 0"),
    (lambda: MinSNR(True), Unsupported, "found True"),
    (lambda: SoftMinSNR(-1.0), Unsupported, "must be positive, found -1.0"),
    (lambda: P2(k=0), Unsupported, "k of weighting 'p2'"),
    (lambda: P2(gamma=-1), Unsupported, "0 or more, found -1"),
    (lambda: EDM(0.0), Unsupported, "sigma_data"),
    (lambda: JiT(0.0), Unsupported, "floor of weighting 'jit'"),
    (lambda: Sigmoid(math.inf), Unsupported, "finite number, found inf"),
    (lambda: Capped("velocity", 0), Unsupported, "cap on a weighting must be positive, found 0"),
    (lambda: Floored("velocity", "low"), Unsupported, "floor of a weighting must be positive, found 'low'"),
    (lambda: Capped("velocty", 3), UnknownName, "Did you mean 'velocity'"),
    (lambda: Sum({}), Unsupported, "mapping of names to factors"),
    (lambda: Sum({"x0": -1}), Unsupported, "factor of x0 must be positive, found -1"),
    (lambda: Sum(["x0", "eps"]), Unsupported, "mapping of names to factors"),
    (lambda: space({"x0": 1, "min_snr": 1}), UnknownName, "unknown target 'min_snr'"),
    (lambda: Corrected("x0", "unifrom"), UnknownName, "Did you mean 'uniform'"),
    (lambda: Capped("edm2", 5), Unsupported, "'edm2' learns its own scale.*around it.*use 'edm' inside it"),
    (lambda: Sum({"edm2": 1}), Unsupported, "'edm2' learns its own scale"),
    (lambda: Corrected("edm2"), Unsupported, "'edm2' learns its own scale"),
    (lambda: Sigmoid()(0.5, COSINE), Unsupported, r"divides by the density .*drawn_from\(times\)"),
    (lambda: Corrected("x0")(0.5, COSINE), Unsupported, "divides by the density"),
    (lambda: MinSNR()(1.5, COSINE), TimeOutOfRange, "found t = 1.5"),
    (lambda: Importance(Everywhere(), "x0").on(FLOW), Unsupported, "finite weight at every time"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=range(len(BAD)))
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_weighting_of_ones_own():
    w, t = Everywhere(), torch.tensor([0.0, 0.3], dtype=F64)
    torch.testing.assert_close(w(t, COSINE), t.exp())
    torch.testing.assert_close(w.on_prediction(t, COSINE, rp.target("x0")), t.exp())
    torch.testing.assert_close(w.on_prediction(t, COSINE, rp.target("v")), t.exp() * COSINE.sigma(t) ** 2)


# The learned scale of EDM2.


def test_a_learned_scale_starts_as_none_and_is_the_published_formula():
    before = torch.get_rng_state()
    scale = weighting("edm2").learned()
    assert torch.equal(torch.get_rng_state(), before)  # a network made after it has the same weights
    loss, log_snr = torch.rand(7) + 0.5, torch.linspace(-20, 20, 7, dtype=F64)
    assert torch.equal(scale(loss, log_snr), loss)
    nn.init.normal_(scale.weight)
    u = scale.u(log_snr)
    torch.testing.assert_close(scale(loss, log_snr), loss / u.exp() + u)
    noise = ((-log_snr / 8).float()[:, None] * scale.frequencies + scale.phases).cos()
    torch.testing.assert_close(u, (noise * math.sqrt(2 / 128)) @ scale.weight)
    assert bool(scale.u(torch.tensor([-INF, INF], dtype=F64)).isfinite().all())
    assert scale(loss.double(), log_snr).dtype == F64
    assert weighting("edm").learned() is None
    # The same frequencies every time, and in the state.
    assert torch.equal(LearnedScale().frequencies, scale.frequencies)
    assert set(scale.state_dict()) == {"frequencies", "phases", "weight"}


def test_the_learned_scale_finds_the_mean_loss_at_every_noise_level():
    """The minimum of E[L] e^−u + u is at e^u = E[L], where every level's loss is 1."""
    scale = LearnedScale()
    optimiser = torch.optim.Adam(scale.parameters(), lr=0.03)
    g = torch.Generator().manual_seed(0)
    for step in range(800):
        log_snr = torch.rand(256, generator=g, dtype=F64) * 16 - 8
        expected = torch.exp(1 + log_snr / 8)
        loss = expected * torch.empty(256, dtype=F64).exponential_(generator=g)
        optimiser.param_groups[0]["lr"] = 0.03 * (1 - step / 800)
        optimiser.zero_grad()
        scale(loss.float(), log_snr).mean().backward()
        optimiser.step()
    log_snr = torch.linspace(-7.5, 7.5, 50, dtype=F64)
    assert (scale.u(log_snr).detach() - (1 + log_snr / 8)).abs().max().item() < 0.2


# What an objective comes to.

LOG_SNR = torch.linspace(-12, 12, 97, dtype=F64)


def curve(schedule, target="v", **settings):
    return effective(rp.Objective(schedule, target, **settings), LOG_SNR)


def test_eps_loss_with_uniform_times_on_cosine():
    got = curve(COSINE, weighting="eps")
    torch.testing.assert_close(got, 1 / torch.cosh(LOG_SNR / 2) / (2 * math.pi))


def test_v_and_velocity_losses_are_the_same_objective():
    """w = e^{−λ/2} up to a factor: v on cosine, velocity on the straight path (Kingma & Gao, table 1)."""
    torch.testing.assert_close(curve(COSINE, loss_space="v"), (-LOG_SNR / 2).exp() / math.pi)
    torch.testing.assert_close(curve(FLOW, loss_space="velocity"), (-LOG_SNR / 2).exp() / 2)
    torch.testing.assert_close(
        curve(COSINE, loss_space="velocity"), (-LOG_SNR / 2).exp() / math.pi * (math.pi / 2) ** 2
    )
    torch.testing.assert_close(curve(COSINE, weighting={"x0": 1, "eps": 1}), curve(COSINE, loss_space="v"))
    for target in ("x0", "v", "velocity"):
        torch.testing.assert_close(curve(COSINE, target, loss_space="v"), curve(COSINE, loss_space="v"))


class Mixture(Times):
    """Logit-normals N(m, 1), mixed."""

    name = "mixture"
    shares = torch.tensor([1.0, 2 * math.exp(0.5), math.exp(2)], dtype=F64)

    def quantile(self, u):
        raise NotImplementedError

    cdf = quantile

    def log_prob(self, t):
        parts = torch.stack([rp.LogitNormal(float(m), 1.0).log_prob(t) for m in range(3)])
        return torch.logsumexp(parts + (self.shares / self.shares.sum()).log()[:, None], 0)


def test_velocity_loss_with_logit_normal_times_is_an_eps_loss_with_others():
    """(1 + e^x)² N(x; 0, 1) = N(x; 0, 1) + 2 e^½ N(x; 1, 1) + e² N(x; 2, 1)."""
    velocity = curve(FLOW, loss_space="velocity", times=rp.LogitNormal(0.0, 1.0))
    eps = curve(FLOW, weighting="eps", times=Mixture())
    torch.testing.assert_close(velocity, eps * Mixture.shares.sum())


def test_edm_is_what_kingma_and_gao_say():
    """w = N(λ; 2.4, 2.4²) (e^{−λ} + σ_d²)/σ_d², on any schedule that reaches it."""
    normal = torch.exp(-(((LOG_SNR - 2.4) / 2.4) ** 2) / 2) / (2.4 * math.sqrt(2 * math.pi))
    expected = normal * ((-LOG_SNR).exp() + 0.25) / 0.25
    for schedule in (FLOW, FLOW2, COSINE):
        torch.testing.assert_close(curve(schedule, weighting="edm", times=LogNormalSigma()), expected)
    inside = LOG_SNR > -10
    # DDPM's table ends at λ = −10: the same curve, but for the share of noise levels beyond it.
    reached = 0.5 * (1 + math.erf((float(-DDPM.log_snr(1.0)) / 2 + 1.2) / 1.2 / math.sqrt(2)))
    got = effective(rp.Objective(DDPM, "v", weighting="edm", times=LogNormalSigma()), LOG_SNR[inside])
    torch.testing.assert_close(got, expected[inside] / reached, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "config", ["x0", "eps", "min_snr", "soft_min_snr", "p2", "snr_trunc", "edm", {"x0": 1, "eps": 0.1}]
)
def test_changing_the_schedule_with_matched_times_changes_nothing(config):
    """CosMap is the cosine's uniform times on the straight path; with a noise scale s, shifted by 1/s."""
    cosine = curve(COSINE, weighting=config)
    torch.testing.assert_close(curve(FLOW, weighting=config, times=CosMap()), cosine)
    torch.testing.assert_close(curve(FLOW2, weighting=config, times=Shifted(CosMap(), 0.5)), cosine)
    # And a distribution of noise levels is matched by itself.
    levels = LogNormalSigma(0.2, 1.5)
    torch.testing.assert_close(
        curve(FLOW2, weighting=config, times=levels), curve(COSINE, weighting=config, times=levels)
    )
    assert (curve(FLOW, weighting=config) / cosine - 1).abs().max().item() > 0.1  # unmatched, it does change


@pytest.mark.parametrize(
    "drawn", [rp.Uniform(), rp.LogitNormal(0.8, 0.8), Mode(1.0), LogNormalSigma(), Stratified("cosmap")]
)
@pytest.mark.parametrize("schedule", [FLOW, FLOW2, COSINE], ids=str)
def test_sigmoid_is_a_weighting_of_the_density(schedule, drawn):
    got = curve(schedule, weighting=Sigmoid(-1.0), times=drawn)
    torch.testing.assert_close(got, torch.sigmoid(-1.0 - LOG_SNR), rtol=1e-6, atol=0)


def test_sigmoid_with_uniform_times_is_the_speed():
    t = torch.linspace(0.05, 0.95, 19, dtype=F64)
    speed = 2 * math.pi / torch.sin(math.pi * t)
    got = Sigmoid(0.5).drawn_from(rp.Uniform()).on_eps(t, COSINE)
    torch.testing.assert_close(got, speed * torch.sigmoid(0.5 - COSINE.log_snr(t)))


def test_a_range_of_times():
    """Under a t_range the sigmoid is unchanged inside, and everything is 0 outside."""
    objective = rp.Objective(COSINE, "eps", weighting="sigmoid", times=rp.LogitNormal(), t_range=(0.2, 0.9))
    got, t = effective(objective, LOG_SNR), COSINE.time_at(LOG_SNR)
    inside = (t >= 0.2) & (t <= 0.9)
    torch.testing.assert_close(got, torch.where(inside, torch.sigmoid(-LOG_SNR), 0.0))
    with pytest.raises(TimeOutOfRange, match="never becomes pure noise"):
        curve(DDPM, weighting="eps")


@pytest.mark.parametrize("t_range", [(0.0, 1.0), (0.1, 0.9)])
def test_importance_corrected_is_the_same_objective(t_range):
    for drawn in (rp.LogitNormal(0.3, 1.2), Importance("min_snr", "v", bins=50), LogNormalSigma()):
        plain = curve(COSINE, weighting="min_snr", times=Mode(1.0), t_range=t_range)
        corrected = Corrected("min_snr", Mode(1.0))
        torch.testing.assert_close(curve(COSINE, weighting=corrected, times=drawn, t_range=t_range), plain)
    # Times in proportion to the weight: what is left to weight is nearly constant.
    drawn = Importance("min_snr", "v", bins=2000).on(COSINE)
    t = torch.linspace(0.1, 0.9, 99, dtype=F64)
    left = Corrected("min_snr", "uniform").drawn_from(drawn).on_prediction(t, COSINE, rp.target("v"))
    assert (left / left.mean() - 1).abs().max().item() < 0.01


def test_the_normalisation():
    """The mean weighted loss over the drawn times is ∫ w(λ) error(λ) dλ."""
    drawn = rp.LogitNormal(0.4, 0.9)
    objective = rp.Objective(FLOW2, "velocity", weighting="soft_min_snr", times=drawn)
    error = lambda log_snr: 1 / torch.cosh((log_snr - 1) / 3)  # noqa: E731 (of the ε-prediction, squared)
    u = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000
    t = objective.times.quantile(u)
    mean = (objective.weighting.on_eps(t, FLOW2) * error(FLOW2.log_snr(t))).mean().item()
    log_snr = torch.linspace(-40, 40, 20_001, dtype=F64)
    integral = torch.trapezoid(effective(objective, log_snr) * error(log_snr), log_snr).item()
    assert mean == pytest.approx(integral, rel=1e-6)


@pytest.mark.parametrize(
    "config", ["min_snr", "edm", {"x0": 1, "eps": 0.1}, {"name": "capped", "base": "eps", "cap": 2}]
)
def test_a_target_that_differs_by_direction_costs_the_same(config):
    """Its weight has a value for each part, and the loss is again that of its x0 estimate."""
    g = torch.Generator().manual_seed(0)
    x0, eps, guess = (torch.randn(9, 6, dtype=F64, generator=g) for _ in range(3))
    columns = torch.linalg.qr(torch.randn(6, 2, dtype=F64, generator=g)).Q
    target = rp.targets.InBasis(columns, "velocity", "x0")
    t = torch.linspace(0.05, 0.95, 9, dtype=F64)
    x_t = COSINE.add_noise(x0, eps, t)
    net = nn.Module()
    net.forward = lambda x, time: rp.convert(guess, x_t, t, COSINE, source="x0", to=target)
    loss = rp.Objective(COSINE, target, weighting=config)(net, x0, t, eps)
    torch.testing.assert_close(loss, weighting(config)(t, COSINE) * ((guess - x0) ** 2).mean(1), rtol=1e-5, atol=0)


def test_noise_that_differs_by_element():
    """Functions of log-SNR, JiT's floor and bounds have then a value for each element; α = 1 − t, σ = scale·t."""
    schedule, t = rp.schedules.Elementwise(FLOW, torch.tensor([0.5, 2.0])), torch.tensor([0.02, 0.5], dtype=F64)
    for config in ("min_snr", "edm", "jit", {"name": "capped", "base": "velocity", "cap": 400}):
        found = weighting(config).on_prediction(t, schedule, rp.target("x0"))
        for i, scale in enumerate((0.5, 2.0)):
            expected = weighting(config)(t, rp.RectifiedFlow(scale))
            torch.testing.assert_close(found.expand(2, 2)[:, i], expected)


def test_the_features_of_the_learned_scale_are_edm2s():
    """Frequencies 2π N(0, 1) and phases even on [0, 2π), so that the features have mean 0 and variance 1."""
    learned = LearnedScale(channels=20_000)
    turns, phases = learned.frequencies / (2 * math.pi), learned.phases / (2 * math.pi)
    assert float(turns.mean()) == pytest.approx(0, abs=0.03)
    assert float(turns.square().mean()) == pytest.approx(1, abs=0.05)
    assert float((turns.abs() < 1).double().mean()) == pytest.approx(math.erf(math.sqrt(0.5)), abs=0.02)
    even = torch.linspace(0, 1, len(phases))
    torch.testing.assert_close(phases.sort().values, even, rtol=0, atol=0.02)
