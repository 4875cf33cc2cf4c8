import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reparam as rp
from reparam.errors import SingularTime, UnknownName, Unsupported
from reparam.targets import Target
from reparam.weightings import Capped, Space, weighting

SCHEDULES = [rp.RectifiedFlow(), rp.RectifiedFlow(noise_scale=3.0), rp.Cosine(), rp.DDPM()]
#: Those, every other table, the variance-exploding one, and one made of two functions.
EVERY = [
    *SCHEDULES,
    rp.DDPM(betas="scaled_linear"),
    rp.DDPM(betas="squared_cosine"),
    rp.DDPM(zero_terminal_snr=True),
    rp.VE(),
    rp.Path("cos(pi * t / 2)", "sin(pi * t / 2)"),
]
#: Every target, by a short name; those that need arguments with some.
NAMED = {
    **{name: name for name in ("x0", "eps", "v", "velocity", "score", "edm", "k")},
    "edm(1)": {"name": "edm", "sigma_data": 1.0},
    "k(0.9)": {"name": "k", "k": 0.9},
    "-velocity": {"name": "negated", "of": "velocity"},
    "linear": {"name": "linear", "p": "-0.3 * sigma", "q": "sqrt(alpha) + 0.5"},
}
PAIRS = list(itertools.product(NAMED, NAMED))


def named(name):
    return rp.target(NAMED[name])


EPS = {torch.float32: torch.finfo(torch.float32).eps, torch.float64: torch.finfo(torch.float64).eps}


def draw(dtype=torch.float64, n=64, d=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    eps = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    return x0, eps


@pytest.mark.parametrize("schedule", EVERY, ids=str)
@pytest.mark.parametrize(("source", "to"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conversion_error_is_within_the_declared_bound(schedule, source, to, dtype):
    """Design: at most 16·κ·eps, at all t incl. close to both ends, relative to the size of the answer."""
    a, b = named(source), named(to)
    t = torch.cat([torch.logspace(-6, -1, 24), torch.linspace(0.1, 0.9, 17), 1 - torch.logspace(-1, -6, 23)]).double()
    x0, eps = draw(n=len(t))
    x_t = schedule.add_noise(x0, eps, t).to(dtype)  # rounded once: the input of the conversion
    y = a.encode(x0, eps, t, schedule).to(dtype)
    truth = b.encode(x0, eps, t, schedule)
    got = rp.convert(y, x_t, t, schedule, source=a, to=b)
    assert got.dtype == dtype
    p, q = b.rows(t, schedule)
    size = (p.abs() + q.abs())[:, None] * torch.maximum(x0.abs(), eps.abs()).amax(1, keepdim=True)
    error = (got.double() - truth).abs() / size
    bound = 16 * a.condition(t, schedule, to=b) * EPS[dtype]
    assert bool((error.amax(1) <= bound).all()), (error.amax(1) / bound).max()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_published_amplifications(schedule):
    t = torch.linspace(0.05, 0.95, 19).double()
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    torch.testing.assert_close(rp.target("x0").amplification(t, schedule).x0, torch.ones_like(t))
    torch.testing.assert_close(rp.target("eps").amplification(t, schedule).x0, sigma / alpha)
    torch.testing.assert_close(rp.target("eps").amplification(t, schedule).eps, torch.ones_like(t))
    torch.testing.assert_close(rp.target("v").amplification(t, schedule).x0, sigma / (alpha**2 + sigma**2))
    if isinstance(schedule, rp.RectifiedFlow):
        torch.testing.assert_close(rp.target("velocity").amplification(t, schedule).x0, t)


def test_velocity_is_the_time_derivative_of_x_t():
    x0, eps = draw()
    for schedule in (rp.RectifiedFlow(2.0), rp.Cosine()):
        y = rp.target("velocity").encode(x0, eps, 0.3, schedule)
        numeric = (schedule.add_noise(x0, eps, 0.3 + 1e-6) - schedule.add_noise(x0, eps, 0.3 - 1e-6)) / 2e-6
        torch.testing.assert_close(y, numeric, rtol=1e-6, atol=1e-8)
    # v and velocity differ by π/2 on the cosine path, and are different things on the straight one.
    torch.testing.assert_close(
        rp.target("velocity").encode(x0, eps, 0.3, rp.Cosine()),
        rp.target("v").encode(x0, eps, 0.3, rp.Cosine()) * math.pi / 2,
    )
    straight = rp.RectifiedFlow()
    assert not torch.allclose(
        rp.target("v").encode(x0, eps, 0.3, straight), rp.target("velocity").encode(x0, eps, 0.3, straight)
    )


# (target, schedule, end) → what happens on the way to x0: "exact", or an error.
PATHS = {
    "rectified_flow": rp.RectifiedFlow(),
    "noise_scale": rp.RectifiedFlow(2.0),
    "cosine": rp.Cosine(),
    "ddpm": rp.DDPM(),
    "scaled_linear": rp.DDPM("scaled_linear"),
    "squared_cosine": rp.DDPM("squared_cosine"),
    "zero_terminal_snr": rp.DDPM("scaled_linear", zero_terminal_snr=True),
    "ve": rp.VE(0.01, 50.0),
    "path": rp.schedules.Path("(1 - t)**2", "t * (2 - t)"),
}
#: Those that end in pure noise.
PURE = ("rectified_flow", "noise_scale", "cosine", "zero_terminal_snr", "path")
ENDS = {(name, s, end): "exact" for name in NAMED for s in PATHS for end in (0.0, 1.0)}
ENDS |= {(name, s, 1.0): SingularTime for name in ("eps", "score") for s in PURE}
# The score itself is infinite where there is no noise, and so is dσ/dt of VE.
ENDS |= {("score", s, 0.0): "infinite" for s in PATHS}
for sign in ("", "-"):
    ENDS[f"{sign}velocity", "ve", 0.0] = "infinite"
    ENDS[f"{sign}velocity", "path", 1.0] = SingularTime  # the path stands still there


@pytest.mark.parametrize(("name", "schedule", "t"), ENDS, ids=str)
def test_both_ends_of_time(name, schedule, t):
    expected, label = ENDS[name, schedule, t], schedule
    schedule, target = PATHS[schedule], named(name)
    x0, eps = draw()
    x_t = schedule.add_noise(x0, eps, t)
    if expected == "infinite":
        with pytest.raises(SingularTime, match=rf"has no finite value at t = {t:g}.*sigma = 0"):
            target.encode(x0, eps, t, schedule)
        # x0 is x_t/α there all the same, whatever is predicted.
        torch.testing.assert_close(target.to_x0(eps, x_t, t, schedule), x0, rtol=0, atol=1e-10)
        return
    y = target.encode(x0, eps, t, schedule)
    if expected == "exact":
        size = 1 + float(schedule.sigma(t)) * EPS[torch.float64] / 1e-13
        torch.testing.assert_close(target.to_x0(y, x_t, t, schedule), x0, rtol=0, atol=1e-10 * size), label
    else:
        with pytest.raises(
            expected, match=rf"{target.name} cannot be converted to x0 at t = 1 under .*alpha = 0.*t_range"
        ):
            target.to_x0(y, x_t, t, schedule)


def test_noise_is_lost_at_the_data_end_for_x0():
    x0, eps = draw()
    with pytest.raises(SingularTime, match="x0 cannot be converted to eps at t = 0"):
        rp.target("x0").to_eps(x0, x0, 0.0, rp.RectifiedFlow())
    # … and where α = 0 the noise is x_t/σ, whatever was predicted.
    torch.testing.assert_close(rp.target("x0").to_eps(x0, 3 * eps, 1.0, rp.RectifiedFlow(3.0)), eps)


def test_at_sigma_zero_x0_is_x_t_whatever_the_prediction():
    x0, eps = draw()
    for name in NAMED:
        assert torch.equal(named(name).to_x0(eps * 100, x0, 0.0, rp.Cosine()), x0)


def test_batched_times_equal_single_ones():
    x0, eps = draw(n=5)
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    schedule = rp.Cosine()
    x_t, y = schedule.add_noise(x0, eps, t), rp.target("v").encode(x0, eps, t, schedule)
    together = rp.convert(y, x_t, t, schedule, source="v", to="eps")
    for i in range(5):
        one = rp.convert(y[i : i + 1], x_t[i : i + 1], float(t[i]), schedule, source="v", to="eps")
        torch.testing.assert_close(one, together[i : i + 1], rtol=0, atol=1e-15)


def test_singular_times_are_found_by_sign_changes():
    class Mixed(Target):
        """Linear from x0 to −ε: Δ crosses zero inside (0, 1)."""

        name = "mixed"

        def rows(self, t, schedule):
            return torch.full_like(t, -1.0), torch.full_like(t, -0.5) + 0 * t

    # Δ = −0.5 α + σ is zero where t = 1/3 on the straight path.
    found = Mixed().singular_times(rp.RectifiedFlow())
    assert len(found) == 1
    assert found[0] == pytest.approx(1 / 3, abs=1e-12)
    assert rp.target("eps").singular_times(rp.RectifiedFlow()) == [1.0]
    assert rp.target("eps").singular_times(rp.RectifiedFlow(), (0.0, 0.98)) == []
    assert all(rp.target(n).singular_times(s) == [] for n in ("x0", "v", "velocity") for s in SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(("own", "space"), PAIRS)
def test_loss_space_is_a_weight(schedule, own, space):
    """weight·(ŷ − y)² == (conv(ŷ) − conv(y))², to rounding."""
    a, s = named(own), named(space)
    t = torch.linspace(0.02, 0.98, 64).double()
    x0, eps = draw()
    x_t, y = schedule.add_noise(x0, eps, t), a.encode(x0, eps, t, schedule)
    guess = y + draw(seed=1)[0]
    direct = (
        rp.convert(guess, x_t, t, schedule, source=a, to=s) - rp.convert(y, x_t, t, schedule, source=a, to=s)
    ) ** 2
    weighted = Space(s).on_prediction(t, schedule, a)[:, None] * (guess - y) ** 2
    torch.testing.assert_close(weighted, direct, rtol=1e-8, atol=1e-10)


def test_published_weights_on_the_x0_error():
    t = torch.linspace(0.02, 0.98, 49).double()
    flow, cosine = rp.RectifiedFlow(), rp.Cosine()
    snr = (cosine.alpha(t) / cosine.sigma(t)) ** 2
    torch.testing.assert_close(weighting("velocity")(t, flow), 1 / t**2)
    torch.testing.assert_close(weighting("eps")(t, cosine), snr)
    torch.testing.assert_close(weighting("v")(t, cosine), snr + 1)
    torch.testing.assert_close(weighting("x0")(t, cosine), torch.ones_like(t))
    capped = Capped("velocity", 400)
    torch.testing.assert_close(capped(t, flow), 1 / t.clamp(min=0.05) ** 2)  # JiT's floor
    # On the velocity's own error that is min(1, t/0.05)².
    torch.testing.assert_close(capped.on_prediction(t, flow, rp.target("velocity")), (t / 0.05).clamp(max=1) ** 2)
    assert weighting(capped.config()) == capped
    with pytest.raises(UnknownName, match="Did you mean 'velocity'"):
        weighting("velocty")


def test_by_name():
    assert rp.target("epsilon") == rp.target("eps")
    assert rp.target("flow_prediction") == rp.target("velocity")
    assert rp.target("sample") == rp.target("x0")
    for name in NAMED:
        assert rp.target(named(name).config()) == named(name)
    with pytest.raises(UnknownName, match=r"unknown target 'v_pred'. Did you mean 'v_prediction'"):
        rp.target("v_pred")


@settings(max_examples=100, deadline=None)
@given(
    rows=st.tuples(*[st.floats(-3, 3) for _ in range(4)]),
    t=st.floats(0.01, 0.99),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_any_two_rows_convert_into_each_other(rows, t, shape):
    """A new target is one class with rows(): all conversions follow."""

    def linear(p, q):
        class Row(Target):
            name = f"row({p}, {q})"

            def rows(self, t, schedule):
                return torch.full_like(t, p), torch.full_like(t, q)

        return Row()

    a, b = linear(*rows[:2]), linear(*rows[2:])
    schedule = rp.RectifiedFlow()
    if abs(float(a.delta(t, schedule))) < 1e-3:
        return
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(2))
    x_t = schedule.add_noise(x0, eps, t)
    got = rp.convert(a.encode(x0, eps, t, schedule), x_t, t, schedule, source=a, to=b)
    torch.testing.assert_close(got, b.encode(x0, eps, t, schedule), rtol=0, atol=1e-10)


def test_condition_numbers_are_sums_of_sizes():
    """(|a|(α + σ) + |b|(|p| + |q|)) / (|p'| + |q'|), of y' = a x_t + b y solved by hand where α² + σ² = 1."""
    schedule, t = rp.Cosine(), torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    known = {
        ("v", "x0"): (alpha + sigma) ** 2,  # x0 = α x_t − σ v
        ("eps", "x0"): (alpha + 2 * sigma) / alpha,  # x0 = (x_t − σ ε)/α
        ("x0", "v"): (alpha * (alpha + sigma) + 1) / sigma / (alpha + sigma),  # v = (α x_t − x0)/σ
    }
    for (source, to), expected in known.items():
        torch.testing.assert_close(rp.target(source).condition(t, schedule, to), expected)


def test_at_the_ends_the_one_unknown_left_is_x_t_in_its_units():
    schedule = rp.schedule({"name": "path", "alpha_of": "2 - 2*t", "sigma_of": "3*t"})
    y, x = draw(torch.float64)
    for name in ("x0", "eps", "v", "velocity"):
        torch.testing.assert_close(rp.target(name).to_x0(y, x, 0.0, schedule), x / 2)
        torch.testing.assert_close(rp.target("x0").to_eps(y, x, 1.0, schedule), x / 3)


def test_a_negated_target_is_the_other_sign_of_it():
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    flow = rp.RectifiedFlow()
    other = rp.target({"name": "negated", "of": "velocity"})
    x_t, y = flow.add_noise(x0, eps, t), x0 - eps  # as many codes of flow matching have it
    assert torch.allclose(other.encode(x0, eps, t, flow), y, rtol=0, atol=1e-14)
    assert torch.allclose(other.to_x0(y, x_t, t, flow), x_t + t[:, None] * y, rtol=0, atol=1e-14)
    assert torch.allclose(other.to_eps(y, x_t, t, flow), x_t - (1 - t[:, None]) * y, rtol=0, atol=1e-14)
    assert rp.target(other.config()) == other
    assert "minus velocity" in other.words
    # EDM's F for data of standard deviation 1 is -v where alpha^2 + sigma^2 = 1.
    minus_v, f = rp.target({"name": "negated", "of": "v"}), rp.targets.EDM(1.0)
    for schedule in (rp.Cosine(), rp.DDPM()):
        ours, theirs = (kind.encode(x0, eps, t, schedule) for kind in (minus_v, f))
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_a_negated_edm_keeps_its_scaling_of_the_input():
    kind = rp.target({"name": "negated", "of": {"name": "edm", "sigma_data": 0.25}})
    assert rp.Conventions(rp.Cosine(), kind, input="edm").target.sigma_data == 0.25
    with pytest.raises(Unsupported, match="takes sigma_data from the target edm"):
        rp.Conventions(rp.Cosine(), rp.target({"name": "negated", "of": "v"}), input="edm")


@pytest.mark.parametrize(
    "of",
    [
        {"name": "negated", "of": "v"},
        {"name": "k", "learned": True},
        rp.targets.InBasis(torch.eye(3)[:, :1]),
    ],
)
def test_what_cannot_be_negated_as_a_whole_is_refused(of):
    with pytest.raises(Unsupported, match="expected a plain target"):
        rp.target({"name": "negated", "of": of})


def test_two_different_bases_are_refused():
    one, other = (
        rp.targets.InBasis(
            torch.linalg.qr(torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)))[0], "x0", "v"
        )
        for seed in (0, 1)
    )
    y, schedule = torch.randn(3, 4), rp.RectifiedFlow()
    with pytest.raises(Unsupported, match="two different bases"):
        rp.convert(y, y, 0.5, schedule, source=one, to=other)
    assert torch.equal(rp.convert(y, y, 0.5, schedule, source=one, to=one), y)
