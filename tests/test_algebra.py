"""Targets beyond the four classics, noise that differs by element, data that carry a standard deviation."""

import copy
import math
from pathlib import Path as File

import pytest
import torch
from torch import nn

import reparam as rp
from reparam.errors import Conflict, NetworkError, ReparamError, SingularTime, UnknownName, Unsupported
from reparam.targets import EDM, Basis, InBasis, KTarget, Linear, principal
from reparam.weightings import Space

HERE = File(__file__).parent


def draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(2))


# ------------------------------------------------------------------------------- score, EDM, linear, k


@pytest.mark.parametrize("schedule", [rp.RectifiedFlow(2.0), rp.Cosine(), rp.VE(0.1, 30)], ids=str)
def test_score_and_edm_are_the_published_formulas(schedule):
    x0, eps = draw(8, 3)
    t, s = torch.linspace(0.1, 0.9, 8).double(), 0.7
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    x_t = alpha * x0 + sigma * eps
    # ∇ log N(x_t; α x0, σ²), by automatic differentiation.
    x = x_t.clone().requires_grad_()
    (-((x - alpha * x0) ** 2) / (2 * sigma**2)).sum().backward()
    torch.testing.assert_close(rp.target("score").encode(x0, eps, t, schedule), x.grad)
    # EDM in its own terms: x̃ = x_t/α, noise σ̃ = σ/α, D = c_skip x̃ + c_out F.
    noisy, level = x_t / alpha, sigma / alpha
    f = EDM(s).encode(x0, eps, t, schedule)
    c_skip, c_out = s**2 / (level**2 + s**2), level * s / (level**2 + s**2).sqrt()
    torch.testing.assert_close(c_skip * noisy + c_out * f, x0)
    assert EDM(s).amplification(t, schedule).x0.tolist() == pytest.approx(c_out[:, 0].tolist())
    assert EDM(s).singular_times(schedule) == []


def test_edm_has_unit_variance_for_data_of_its_sigma():
    p, q = EDM(0.5).rows(torch.linspace(0, 1, 11).double(), rp.Cosine())
    torch.testing.assert_close(0.25 * p**2 + q**2, torch.ones(11).double())


@pytest.mark.parametrize(
    ("p", "q", "name"),
    [
        ("-sigma", "alpha", "v"),
        (lambda a, s: -s, lambda a, s: a, "v"),
        (1, 0, "x0"),
        (0.0, "1", "eps"),
        ("alpha_dot", "sigma_dot", "velocity"),
        ("0", "-1/sigma", "score"),
        ("sigma/(0.5*sqrt(alpha**2*0.25+sigma**2))", "-alpha*0.5/(0.25*alpha**2+sigma**2)**0.5", "edm"),
    ],
)
def test_any_linear_target_may_be_written_as_a_row(p, q, name):
    t = torch.linspace(0.1, 0.9, 9).double()
    for schedule in (rp.RectifiedFlow(), rp.Cosine()):
        for ours, theirs in zip(Linear(p, q).rows(t, schedule), rp.target(name).rows(t, schedule), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "alpha.real",
        "[1][0]",
        "lambda: 1",
        "alpha if 1 else 2",
        "'a'",
        "alpha;1",
        "True",
    ],
)
def test_a_formula_can_do_nothing_else(text):
    with pytest.raises(ReparamError):
        Linear(text, 0)


def test_formulas_say_what_they_know():
    with pytest.raises(UnknownName, match=r"name in the formula 'alhpa \* 2'.*'alhpa'.*Did you mean 'alpha'"):
        Linear("alhpa * 2", 0)
    with pytest.raises(UnknownName, match="function in the formula 'cosh"):
        Linear("cosh(alpha)", 0)
    with pytest.raises(ReparamError, match="takes one argument"):
        Linear("sqrt(alpha, 2)", 0)
    with pytest.raises(ReparamError, match="found nan"):
        Linear(math.nan, 1)
    with pytest.raises(ReparamError, match="target 'linear' needs p and q"):
        rp.target("linear")
    with pytest.raises(Unsupported, match="cannot be written down"):
        Linear(lambda a, s: a, 0).config()


def test_k_runs_from_the_noise_over_the_velocity_to_the_data():
    t = torch.linspace(0.1, 0.9, 9).double()
    flow = rp.RectifiedFlow()
    for k, name, factor in ((1.0, "x0", 1), (0.0, "eps", -1), (0.5, "velocity", -0.5)):
        for ours, theirs in zip(KTarget(k).rows(t, flow), rp.target(name).rows(t, flow), strict=True):
            torch.testing.assert_close(ours, factor * theirs)
    with pytest.raises(Unsupported, match=r"\[0, 1\], found 1.5"):
        KTarget(1.5)


class Affine(nn.Module):
    """A network that sees t: a(t) x + b(t), with a and b polynomials."""

    def __init__(self, dim=2):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 4, dim))

    def forward(self, x, time):
        powers = time[:, None] ** torch.arange(4, device=x.device)
        a, b = (powers @ w for w in self.weight.to(x.dtype))
        return a * x + b


def test_a_learned_k_is_trained_saved_and_sampled_with(tmp_path):
    objective = rp.Objective("rectified_flow", {"name": "k", "k": 0.5, "learned": True}, loss_space="x0")
    net = Affine()
    assert [name for name, _ in objective.named_parameters()] == ["k_logit"]
    optimiser = torch.optim.Adam([*net.parameters(), *objective.parameters()], 1e-2)
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        loss = objective(net, torch.randn(64, 2, generator=g) * 0.1 + 3, generator=g).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    learned = objective.target.value
    assert abs(learned - 0.5) > 1e-3
    denoiser = objective.denoiser(net)
    assert denoiser.target == KTarget(learned)
    torch.manual_seed(0)
    assert rp.sample(denoiser, (4, 2), steps=4).shape == (4, 2)
    rp.save(denoiser, tmp_path / "k.safetensors")
    assert rp.load(tmp_path / "k.safetensors", net=Affine()).target.k == pytest.approx(learned)


def test_the_gradient_of_a_learned_k_is_that_of_the_loss():
    objective = rp.Objective("cosine", {"name": "k", "k": 0.3, "learned": True}, loss_space="velocity")
    net = Affine()
    nn.init.normal_(net.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    x0, eps = draw(16, 2)
    t = torch.linspace(0.1, 0.9, 16).double()
    objective(net, x0, t, eps).mean().backward()

    def loss_at(logit):
        k = 1 / (1 + math.exp(-logit))
        fixed = rp.Objective("cosine", KTarget(k), loss_space="velocity")
        return fixed(net, x0, t, eps).mean().item()

    logit = float(objective.k_logit)
    numeric = (loss_at(logit + 1e-4) - loss_at(logit - 1e-4)) / 2e-4
    assert float(objective.k_logit.grad) == pytest.approx(numeric, rel=1e-4)


def test_a_learned_k_needs_a_loss_that_does_not_change_with_it():
    with pytest.raises(Conflict, match="loss_space"):
        rp.Objective("cosine", KTarget(0.5, learned=True))
    with pytest.raises(Unsupported, match="strictly between"):
        KTarget(0.0, learned=True)


# ------------------------------------------------------------------------------------------- in a basis


def some_basis(d=6, r=2, seed=0):
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return Basis(q[:, :r]), q


@pytest.mark.parametrize("t", [0.3, torch.linspace(0.1, 0.9, 5).double()])
@pytest.mark.parametrize("to", ["x0", "eps", "v", "velocity"])
def test_a_target_in_a_basis_is_two_targets_in_rotated_axes(t, to):
    basis, axes = some_basis()
    kind, schedule = InBasis(basis, "velocity", "x0"), rp.RectifiedFlow(1.5)
    x0, eps = draw(5, 6)
    x_t, y = schedule.add_noise(x0, eps, t), kind.encode(x0, eps, t, schedule)
    turned = y @ axes
    inside = rp.target("velocity").encode(x0 @ axes, eps @ axes, t, schedule)
    torch.testing.assert_close(turned[:, :2], inside[:, :2], rtol=0, atol=1e-6)
    torch.testing.assert_close(turned[:, 2:], (x0 @ axes)[:, 2:], rtol=0, atol=1e-6)
    got = rp.convert(y, x_t, t, schedule, source=kind, to=to)
    torch.testing.assert_close(got, rp.target(to).encode(x0, eps, t, schedule), rtol=0, atol=1e-5)
    back = rp.convert(got, x_t, t, schedule, source=to, to=kind)
    torch.testing.assert_close(back, y, rtol=0, atol=1e-5)


def test_the_loss_in_another_space_is_a_weight_for_each_direction():
    basis, _ = some_basis()
    kind, schedule = InBasis(basis, "eps", "x0"), rp.Cosine()
    x0, eps = draw(7, 6)
    t = torch.linspace(0.1, 0.9, 7).double()
    net = Affine(6)
    nn.init.normal_(net.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    for space in ("x0", "velocity", "v"):
        objective = rp.Objective(schedule, kind, loss_space=space, t_range=(0.0, 0.98))
        x_t = schedule.add_noise(x0, eps, t)
        guess = net(x_t, t)
        exact = rp.convert(guess, x_t, t, schedule, source=kind, to=space)
        expected = (exact - rp.target(space).encode(x0, eps, t, schedule)).square().mean(1)
        torch.testing.assert_close(objective(net, x0, t, eps), expected, rtol=1e-5, atol=1e-8)
    own = rp.Objective(schedule, kind, t_range=(0.0, 0.98))
    expected = (net(schedule.add_noise(x0, eps, t), t) - kind.encode(x0, eps, t, schedule)).square().mean(1)
    torch.testing.assert_close(own(net, x0, t, eps), expected, rtol=1e-6, atol=1e-9)


def test_a_basis_target_is_singular_where_a_part_of_it_is():
    basis, _ = some_basis()
    assert InBasis(basis, "eps", "x0").singular_times(rp.Cosine()) == [1.0]
    assert InBasis(basis, "velocity", "x0").singular_times(rp.Cosine()) == []
    with pytest.raises(SingularTime, match="in_basis"):
        rp.Objective("cosine", InBasis(basis, "eps", "x0"))
    assert InBasis(basis).condition(torch.tensor([0.5]).double(), rp.Cosine()).shape == (1, 2)


def test_patches_of_pictures_have_directions_of_their_own(tmp_path):
    g = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(12, 3, generator=g, dtype=torch.float64))[0]
    patches = torch.randn(50, 6, 3, generator=g, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0]) @ directions.T
    pictures = Basis(torch.eye(12), 2)._back(patches, torch.zeros(50, 3, 4, 6)) + 5
    found = principal(pictures, 3, patch=2)
    # The same directions, up to sign; the mean is no direction.
    torch.testing.assert_close((found.columns.double().T @ directions).abs(), torch.eye(3).double(), rtol=0, atol=0.15)
    inside = found.project(pictures - 5)
    torch.testing.assert_close(inside, pictures - 5, rtol=0, atol=1e-4)
    found.save(tmp_path / "basis.safetensors")
    kind = rp.target({"name": "in_basis", "basis": str(tmp_path / "basis.safetensors"), "inside": "v"})
    assert kind.basis == found
    assert rp.target(kind.config()) == kind
    with pytest.raises(Unsupported, match=r"\[3, 5, 6\] cannot be cut into patches of 2"):
        found.project(torch.zeros(1, 3, 5, 6))
    with pytest.raises(Unsupported, match="of vectors of 12 numbers"):
        found.project(torch.zeros(1, 1, 4, 6))
    with pytest.raises(Unsupported, match="orthonormal"):
        Basis(torch.ones(4, 2))
    with pytest.raises(Unsupported, match=r"rank must lie in 1 … 12"):
        principal(pictures, 13, patch=2)


def test_a_basis_target_trains_samples_and_is_saved(tmp_path):
    basis, _ = some_basis(2, 1)
    objective = rp.Objective("rectified_flow", InBasis(basis), loss_space="velocity")
    net = Affine()
    objective(net, torch.randn(8, 2)).mean().backward()
    denoiser = objective.denoiser(net)
    x = rp.sample(denoiser, torch.randn(3, 2), steps=3)
    rp.save(denoiser, tmp_path / "b.safetensors")
    again = rp.load(tmp_path / "b.safetensors", net=net)
    assert again.target == denoiser.target
    assert x.isfinite().all()


# ------------------------------------------------------------------------------------------ from a file


def test_a_file_is_used_as_its_task_uses_it():
    kind, ddpm = rp.target({"name": "file", "path": str(HERE / "data" / "eps_target.py")}), rp.DDPM()
    x0, eps = draw(5, 3, 4, 4)
    t = ddpm.time(torch.tensor([0, 10, 400, 900, 999]))
    x_t = ddpm.add_noise(x0, eps, t)
    y = kind.encode(x0, eps, t, ddpm)
    assert torch.equal(y, eps)
    torch.testing.assert_close(kind.to_x0(y, x_t, t, ddpm), x0, rtol=0, atol=1e-9)
    for ours, theirs in zip(kind.rows(t, ddpm), rp.target("eps").rows(t, ddpm), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(kind.to_x0(y, x_t, torch.zeros(5).double(), ddpm), x_t)
    with pytest.raises(Unsupported, match="integer steps"):
        kind.encode(x0, eps, 0.5, rp.Cosine())


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_trains_and_samples_on_the_steps_of_a_table(wrapped):
    kind = rp.target({"name": "file", "path": str(HERE / "data" / "mix_target.py")})
    kind = InBasis(some_basis(2, 1)[0], inside=kind, outside="x0") if wrapped else kind
    objective = rp.Objective("ddpm", kind, time="step")
    net = rp.networks.MLP(2, 16, 2)
    x0, eps = draw(64, 2)
    loss = objective(net, x0.float(), eps=eps.float(), generator=torch.Generator().manual_seed(1))
    assert loss.isfinite().all()
    denoiser = copy.deepcopy(objective.denoiser(net))
    assert denoiser.target == kind
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert rp.sample(denoiser, noise, sampler="ddim", steps=4).isfinite().all()
    with pytest.raises(Unsupported, match="integer steps alone.*time: step"):
        rp.Objective("ddpm", kind)


def test_the_steps_at_which_a_file_loses_x0_are_found(tmp_path):
    (tmp_path / "lost.py").write_text(
        "def compute_training_target(x_0, noise, timesteps, schedule):\n"
        "    gone = ((timesteps == 500) | (timesteps == 0)).double().reshape(-1, *[1] * (x_0.ndim - 1))\n"
        "    a, s = (schedule[k][timesteps].view_as(gone) for k in ('sqrt_alpha', 'sqrt_one_minus_alpha'))\n"
        "    return gone * (a * x_0 + s * noise) + (1 - gone) * noise\n"
        "def predict_x0(y, x_t, timesteps, schedule): return y\n"
    )
    kind = rp.target({"name": "file", "path": str(tmp_path / "lost.py")})
    assert kind.singular_times(rp.DDPM()) == [1 / 1000, 501 / 1000]
    assert kind.singular_times(rp.DDPM(), (0.1, 0.5)) == []
    with pytest.raises(SingularTime, match=r"t = 0\.501"):
        rp.Denoiser(torch.nn.Identity(), "ddpm", kind, time="step", t_range=(0.002, 1.0))


def test_a_file_that_is_no_target_says_why(tmp_path):
    with pytest.raises(NetworkError, match="no Python file"):
        rp.target({"name": "file", "path": str(tmp_path / "gone.py")})
    (tmp_path / "half.py").write_text("def predict_x0(*a): return 1\n")
    with pytest.raises(NetworkError, match="does not define compute_training_target"):
        rp.target({"name": "file", "path": str(tmp_path / "half.py")})
    (tmp_path / "broken.py").write_text("1/0\n")
    with pytest.raises(NetworkError, match="cannot be run"):
        rp.target({"name": "file", "path": str(tmp_path / "broken.py")})
    (tmp_path / "odd.py").write_text("def predict_x0(*a): return 1\ndef compute_training_target(x, *a): return x[0]\n")
    kind, (x0, eps) = rp.target({"name": "file", "path": str(tmp_path / "odd.py")}), draw(2, 3, 4, 4)
    with pytest.raises(NetworkError, match=r"compute_training_target in .*odd.py returned \[3, 4, 4\]"):
        kind.encode(x0, eps, 0.5, rp.DDPM())
    with pytest.raises(NetworkError, match="returned int"):
        kind.to_x0(x0, x0, 0.5, rp.DDPM())


# ------------------------------------------------------------------------- noise and data by element


def test_noise_by_element_is_the_plain_one_in_units_of_its_scale():
    scale = torch.tensor([[0.5, 1.0, 2.0], [3.0, 0.1, 1.0]])
    plain, uneven = rp.Cosine(), rp.Elementwise("cosine", scale)
    x0, eps = draw(4, 2, 3)
    for t in (0.3, torch.tensor([0.1, 0.4, 0.6, 0.9]).double()):
        x_t = uneven.add_noise(x0, eps, t)
        torch.testing.assert_close(x_t / scale, plain.add_noise(x0 / scale, eps, t))
        for name in ("x0", "eps", "v", "velocity", "score", "edm", "k"):
            y = rp.target(name).encode(x0, eps, t, uneven)
            torch.testing.assert_close(rp.target(name).to_x0(y, x_t, t, uneven), x0, rtol=0, atol=1e-9)
            torch.testing.assert_close(rp.target(name).to_eps(y, x_t, t, uneven), eps, rtol=0, atol=1e-9)
    assert torch.equal(uneven.add_noise(x0, eps, 0.0), x0)
    assert rp.schedule(uneven.config()) == uneven
    assert rp.target("eps").singular_times(uneven) == [1.0]


def test_the_loss_under_noise_by_element_is_weighted_by_element():
    scale = torch.tensor([0.5, 2.0])
    uneven = rp.Elementwise("cosine", scale)
    x0, eps = draw(6, 2)
    t = torch.linspace(0.1, 0.9, 6).double()
    net = Affine()
    nn.init.normal_(net.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    x_t = uneven.add_noise(x0, eps, t)
    objective = rp.Objective(uneven, "x0", loss_space="eps", t_range=(0.01, 0.98))
    error = rp.convert(net(x_t, t), x_t, t, uneven, source="x0", to="eps") - eps
    torch.testing.assert_close(objective(net, x0, t, eps), error.square().mean(1), rtol=1e-6, atol=1e-9)


def test_a_basis_refuses_noise_that_it_would_mix():
    basis, _ = some_basis(2, 1)
    with pytest.raises(Unsupported, match="same noise in all elements"):
        InBasis(basis).rows(torch.tensor(0.5).double(), rp.Elementwise("cosine", [1.0, 2.0]))


@pytest.mark.parametrize("scale", [0.5, [1.0, -1.0], [math.inf, 1.0], "wide"])
def test_a_scale_is_an_array_of_positive_numbers(scale):
    with pytest.raises(Unsupported, match="scale must be an array"):
        rp.Elementwise("cosine", scale)


@pytest.mark.parametrize("schedule", [rp.RectifiedFlow(), rp.Cosine()], ids=str)
def test_data_with_a_standard_deviation_are_learned_through_their_posterior_mean(schedule):
    """E[z | z_t, x0] = x0 + α s²/(α² s² + σ²)·(z_t − α x0), and the noise that goes with it."""
    from reparam.objective import blurred

    x0, eps = draw(5, 3)
    std = torch.tensor([0.0, 0.3, 2.0]).double()
    t = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0]).double()
    z_t, z, e = blurred(x0, eps, std, t, schedule)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    total = alpha**2 * std**2 + sigma**2
    expected = torch.where(total > 0, x0 + alpha * std**2 / total.clamp(min=1e-300) * (z_t - alpha * x0), x0)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(alpha * z + sigma * e, z_t)  # a consistent pair
    torch.testing.assert_close(z_t - alpha * x0, total.sqrt() * eps)
    # No standard deviation is the ordinary loss.
    net = Affine(3)
    nn.init.normal_(net.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    objective = rp.Objective(schedule, "velocity")
    plain, nought = objective(net, x0, t, eps), objective(net, x0, t, eps, x0_std=0.0)
    torch.testing.assert_close(plain, nought)
    assert not torch.allclose(plain, objective(net, x0, t, eps, x0_std=std))


def test_loss_spaces_of_the_new_targets_agree_with_conversion():
    t = torch.linspace(0.05, 0.95, 32).double()
    x0, eps = draw(32, 3)
    schedule = rp.VE(0.1, 20)
    for own in (EDM(0.5), KTarget(0.3), Linear("1", "0.5*sigma")):
        for space in (EDM(0.5), rp.target("x0"), rp.target("score")):
            x_t, y = schedule.add_noise(x0, eps, t), own.encode(x0, eps, t, schedule)
            guess = y + 0.1 * eps.flip(0)
            direct = rp.convert(guess, x_t, t, schedule, source=own, to=space) - space.encode(x0, eps, t, schedule)
            weighted = Space(space).on_prediction(t, schedule, own)[:, None] * (guess - y) ** 2
            torch.testing.assert_close(weighted, direct**2, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("target", ["v", "x0", "edm"])
def test_a_last_step_that_is_never_trained_is_refused(target):
    zero = rp.DDPM("scaled_linear", zero_terminal_snr=True)
    with pytest.raises(Conflict, match=r"min_snr.*is 0 on an error in .*t = 1, so that step is never trained"):
        rp.Objective(zero, target, weighting="min_snr")
    floored = {"name": "floored", "base": "min_snr", "floor": 0.01}
    assert float(rp.Objective(zero, target, weighting=floored).weight(1.0)) > 0
    rp.Objective(zero, target, weighting="min_snr", t_range=(0.001, 0.999))
    rp.Objective(rp.DDPM("scaled_linear"), target, weighting="min_snr")
    rp.Objective("cosine", target, weighting="min_snr")  # one point of a continuum is no step


def test_principal_directions_are_those_of_all_parts_together():
    """Pairs of points on either side of a mean, along orthogonal axes: the further apart, the sooner the axis comes."""
    axes = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))[0]
    axes = axes * torch.sign(axes.gather(0, axes.abs().argmax(0, keepdim=True)))
    apart = axes * torch.tensor([1.0, 4.0, 2.0, 3.0])
    mean = torch.tensor([5.0, -3.0, 1.0, 2.0], dtype=torch.float64)
    samples = mean + torch.cat([apart.T, -apart.T])
    for parts in (samples, [samples[:1], samples[1:6], samples[6:]], samples.repeat(300, 1)):  # 2400: parts of its own
        torch.testing.assert_close(principal(parts, 3).columns, axes[:, [1, 3, 2]].float())


def test_functions_of_one_coefficient_mix_with_noise_by_element():
    """p(α) is one number a sample and q(σ) one an element: here y = 2 x_t − α x0."""
    uneven = rp.Elementwise("cosine", [[0.5, 1.0, 2.0], [3.0, 0.1, 1.0]])
    x0, eps = draw(4, 2, 3)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9]).double()
    own = Linear(p=lambda alpha, sigma: alpha, q=lambda alpha, sigma: 2 * sigma)
    x_t = uneven.add_noise(x0, eps, t)
    torch.testing.assert_close(own.encode(x0, eps, t, uneven), 2 * x_t - uneven.alpha(t)[:, None, None] * x0)


def test_the_slopes_of_noise_by_element_are_those_of_its_coefficients():
    uneven, h = rp.Elementwise("cosine", [0.5, 2.0]), 1e-6
    t = torch.tensor([0.2, 0.7]).double()
    for value, slope in ((uneven.alpha, uneven.alpha_dot), (uneven.sigma, uneven.sigma_dot)):
        torch.testing.assert_close(slope(t), (value(t + h) - value(t - h)) / (2 * h), rtol=1e-8, atol=1e-8)
