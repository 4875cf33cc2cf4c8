import math

import pytest
import torch
from torch import nn

import reparam as rp
from reparam.errors import Conflict, NetworkError, ReparamError, SingularTime, TimeOutOfRange, UnknownName, Unsupported


class Recorder(nn.Module):
    """Returns zeros and remembers what it was given."""

    def forward(self, x, time, **cond):
        self.x, self.time, self.cond = x, time, cond
        return torch.zeros_like(x)


def test_loss_is_per_sample_and_accepts_draws():
    x0, eps = torch.randn(6, 3, 4), torch.randn(6, 3, 4)
    t = torch.linspace(0.1, 0.9, 6)
    loss = rp.Objective("rectified_flow", "velocity")(Recorder(), x0, t, eps)
    torch.testing.assert_close(loss, (eps - x0).square().flatten(1).mean(1))


@pytest.mark.parametrize("target", ["x0", "eps", "v", "velocity"])
def test_the_same_error_costs_the_same_under_every_target(target):
    """One x0 estimate, expressed as any target: equal loss and equal gradient in the estimate."""
    x0, eps, guess = (torch.randn(6, 5, dtype=torch.float64) for _ in range(3))
    t = torch.linspace(0.1, 0.9, 6).double()
    guess.requires_grad_(True)
    schedule = rp.Cosine()
    x_t = schedule.add_noise(x0, eps, t)

    class AsTarget(nn.Module):
        def forward(self, x, time):
            return rp.convert(guess, x_t, t, schedule, source="x0", to=target)

    objective = rp.Objective(schedule, target, loss_space="velocity", t_range=(0.0, 0.95))
    loss = objective(AsTarget(), x0, t, eps)
    (gradient,) = torch.autograd.grad(loss.sum(), guess)
    weight = rp.weightings.weighting("velocity")(t, schedule)[:, None]
    torch.testing.assert_close(loss, (weight * (guess - x0) ** 2).mean(1))
    torch.testing.assert_close(gradient, 2 * weight * (guess - x0) / 5)


def test_drawn_times_are_reproducible_and_stay_in_range():
    objective = rp.Objective("rectified_flow", "eps", t_range=(0.1, 0.98), times=rp.LogitNormal(1.0, 2.0))
    net, x0 = Recorder(), torch.zeros(5000, 1)
    a = objective(net, x0, generator=torch.Generator().manual_seed(1))
    first = net.time
    b = objective(net, x0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(a, b)
    assert torch.equal(first, net.time)
    assert 0.1 <= float(first.min()) < 0.2
    assert 0.97 < float(first.max()) <= 0.98


@pytest.mark.parametrize("times", [rp.Uniform(), rp.LogitNormal(0.8, 0.8), rp.LogitNormal(-0.4, 1.5).within(0.2, 0.9)])
def test_times_are_consistent(times):
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    t = times.quantile(u)
    torch.testing.assert_close(times.cdf(t), u, rtol=1e-9, atol=1e-12)
    # The density is the derivative of the distribution function, and integrates to one.
    grid = torch.linspace(1e-6, 1 - 1e-6, 200_001, dtype=torch.float64)
    assert torch.trapezoid(times.log_prob(grid).exp(), grid).item() == pytest.approx(1, abs=1e-3)
    drawn = times.sample(20_000, torch.Generator().manual_seed(0))
    assert bool(((drawn > 0) & (drawn < 1)).all())
    torch.testing.assert_close(times.cdf(drawn).sort().values, torch.linspace(0, 1, 20_000).double(), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        ("t", lambda t, s: t),
        ("1-t", lambda t, s: 1 - t),
        ("1000t", lambda t, s: 1000 * t),
        ("log_snr", lambda t, s: s.log_snr(t)),
        ("log_sigma/4", lambda t, s: (s.sigma(t) / s.alpha(t)).log() / 4),
        ("step", lambda t, s: (1000 * t).round().long() - 1),
    ],
)
def test_time_conventions(convention, expected):
    schedule = rp.DDPM()
    net, t = Recorder(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    rp.Objective(schedule, "v", time=convention)(net, torch.zeros(3, 2), t)
    want = expected(t, schedule)
    torch.testing.assert_close(net.time, want if want.dtype == torch.int64 else want.float())


def test_input_scaling_and_conditions_reach_the_network():
    net = Recorder()
    objective = rp.Objective("rectified_flow", "v", input="unit_variance")
    x0, eps = torch.randn(4, 2), torch.randn(4, 2)
    objective(net, x0, 0.25, eps, cond={"label": 3})
    torch.testing.assert_close(net.x, (0.75 * x0 + 0.25 * eps) / math.sqrt(0.75**2 + 0.25**2))
    assert net.cond == {"label": 3}


@pytest.mark.parametrize("schedule", [rp.VE(), rp.RectifiedFlow(), rp.Cosine()])
def test_edms_input_is_of_unit_variance_for_data_of_its_sigma(schedule):
    net, t, s = Recorder(), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), 0.3
    x0, eps = torch.randn(2, 3, 4)
    rp.Objective(schedule, rp.targets.EDM(s), input="edm")(net, x0, t, eps)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    # EDM's own: c_in(σ̃) x̃ with x̃ = x_t/α, σ̃ = σ/α and c_in = 1/sqrt(σ̃² + σ_d²).
    noisy = schedule.add_noise(x0, eps, t) / alpha[:, None]
    torch.testing.assert_close(net.x, (noisy / ((sigma / alpha) ** 2 + s**2).sqrt()[:, None]).float())


def test_inputs_are_scaled_by_element_where_the_noise_is():
    schedule = rp.schedules.Elementwise("rectified_flow", torch.tensor([0.5, 1.0, 2.0]))
    net, x0, eps = Recorder(), torch.randn(4, 3), torch.randn(4, 3)
    rp.Objective(schedule, "x0", input="unit_variance")(net, x0, 0.5, eps)
    scale = torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(net.x, (x0 + scale * eps) / (1 + scale**2).sqrt())
    denoiser = rp.Denoiser(net, schedule, "x0", input="unit_variance")
    rp.sample(denoiser, start=x0, sampler="ddim", times=[0.5, 0.0])
    torch.testing.assert_close(net.x, 2 * x0 / (1 + scale**2).sqrt())


def test_integer_steps_are_drawn_for_tables():
    net = Recorder()
    rp.Objective("ddpm", "eps", time="step")(net, torch.zeros(4000, 1), generator=torch.Generator().manual_seed(0))
    assert net.time.dtype == torch.int64
    assert 0 <= int(net.time.min()) < 10
    assert 990 < int(net.time.max()) <= 999


def test_a_bf16_output_is_cast_up_before_it_is_converted():
    class Half(nn.Module):
        def forward(self, x, time):
            return x.bfloat16()

    posterior = rp.Denoiser(Half(), rp.Cosine(), "v")(torch.randn(4, 3), 0.5)
    assert posterior.mean.dtype == torch.float32
    assert posterior.var is None
    assert rp.Objective("cosine", "v")(Half(), torch.randn(4, 3)).dtype == torch.float32


def test_conventions_travel_from_training_to_sampling():
    objective = rp.Objective("cosine", "eps", time="1-t", input="unit_variance", t_range=(0.0, 0.9))
    assert objective.denoiser(Recorder()).conventions == objective.conventions


BAD = [
    (lambda: rp.Objective("rectified_flow", "eps"), SingularTime, r"eps .*t = 1 .*t_range: \[0, 0.98\]"),
    (lambda: rp.Objective("cosine", "epsilon"), SingularTime, "x0, v or velocity"),
    (
        lambda: rp.Objective("cosine", "v", loss_space="x0", weighting="eps"),
        Conflict,
        "loss_space .x0. and weighting .eps.",
    ),
    (lambda: rp.Objective("cosine", "vee"), UnknownName, "unknown target 'vee'"),
    (lambda: rp.Objective("cosine", "v", time="seconds"), UnknownName, "time convention 'seconds'"),
    (
        lambda: rp.Objective("cosine", "v", input="edm"),
        Unsupported,
        "sigma_data from the target edm, and the target is v",
    ),
    (lambda: rp.Objective("cosine", "v", input="unit_varience"), UnknownName, "Did you mean 'unit_variance'"),
    (lambda: rp.Objective("cosine", "v", time="step"), Unsupported, "integer steps"),
    (lambda: rp.Objective("cosine", "v", t_range=(0.9, 0.1)), TimeOutOfRange, r"found \[0.9, 0.1\]"),
    (
        lambda: rp.Objective("cosine", "v")(Recorder(), torch.zeros(2, 3), 0.5, torch.zeros(2, 4)),
        ReparamError,
        "eps has shape",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=lambda v: getattr(v, "__name__", None))
def test_contradictions_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_wrong_output_shape_names_both_shapes():
    class Wide(nn.Module):
        def forward(self, x, time):
            return torch.cat([x, x], 1)

    with pytest.raises(NetworkError, match=r"Wide returned shape \[2, 6\] for an input of shape \[2, 3\]"):
        rp.Objective("cosine", "v")(Wide(), torch.zeros(2, 3))


def test_the_loss_is_not_rounded_under_autocast():
    """Autocast would take the sum over elements in bfloat16."""
    x0, eps = torch.randn(64, 300), torch.randn(64, 300)
    t = torch.linspace(0.1, 0.9, 64)
    objective = rp.Objective("rectified_flow", "velocity")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = objective(Recorder(), x0, t, eps)
    torch.testing.assert_close(rounded, objective(Recorder(), x0, t, eps), rtol=1e-6, atol=0)


def test_an_infinite_weight_is_refused():
    objective = rp.Objective("rectified_flow", "x0", loss_space="velocity")
    with pytest.raises(SingularTime, match="not finite at t = 0; .*Capped"):
        objective(Recorder(), torch.zeros(2, 3), 0.0)


@pytest.mark.parametrize("convention", ["log_snr", "log_sigma/4"])
def test_a_time_that_is_infinite_at_the_start_of_sampling_is_refused(convention):
    with pytest.raises(SingularTime, match=rf"time='{convention}' is infinite at t = 1 .*\[0, 0.98\]"):
        rp.Objective("rectified_flow", "v", time=convention)
    rp.Objective("rectified_flow", "v", time=convention, t_range=(0.0, 0.98))


def test_times_without_any_mass_in_the_range_are_refused():
    with pytest.raises(Unsupported, match=r"draws no times in \[0, 0.5\]"):
        rp.Objective("rectified_flow", "v", times=rp.LogitNormal(5.0, 0.01), t_range=(0.0, 0.5))


def test_steps_stay_inside_t_range():
    net = Recorder()
    objective = rp.Objective("ddpm", "eps", time="step", t_range=(0.0, 0.98051))
    objective(net, torch.zeros(5000, 1), generator=torch.Generator().manual_seed(0))
    assert int(net.time.max()) == 979
