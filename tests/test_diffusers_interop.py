"""diffusers' models as denoisers, ours in its pipelines, and its training loop with our targets: tiny random models."""

import contextlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import reparam as rp
from reparam import interop
from reparam.errors import NetworkError, OutputError, SingularTime, SpecError, UnknownName, Unsupported
from reparam.networks import DiffusersModel, UNet
from reparam.samplers import Ancestral, Clipped

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

TABLES = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"trained_betas": np.geomspace(2e-4, 0.03, 1000).tolist()},
    "zero_snr": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    "trained_zero_snr": {"trained_betas": np.geomspace(2e-4, 0.03, 1000).tolist(), "rescale_betas_zero_snr": True},
}
SHAPE = (2, 3, 8, 8)


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks of a few channels are slower on several, and the same to the bit on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def unet(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DModel(**settings | changes).eval()


def conditional(seed=0):
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


def dit(seed=0):
    torch.manual_seed(seed)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=2,
    ).eval()


def noise(shape=SHAPE, seed=7):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def theirs(pipe, steps, **options):
    """What their pipeline makes of noise(): the images it returns, and its last state before they are cut to [0, 1]."""
    states, step = [], pipe.scheduler.step

    def kept(*args, **kwargs):
        found = step(*args, **kwargs)
        states.append(found.prev_sample)
        return found

    pipe.scheduler.step = kept
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        batch_size=SHAPE[0],
        generator=torch.Generator().manual_seed(7),
        num_inference_steps=steps,
        output_type="np",
        **options,
    ).images
    pipe.scheduler.step = step
    return torch.from_numpy(images).permute(0, 3, 1, 2), states[-1]


def as_images(x):
    return (x / 2 + 0.5).clamp(0, 1)


def assert_same(x, images, state):
    torch.testing.assert_close(as_images(x), images, rtol=0, atol=1e-4)
    # Noise prediction by a random network leaves [0, 1] far behind, so the images alone would say little.
    assert float((x - state).abs().max()) < 1e-4 * max(1.0, float(state.abs().max()))


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def ddim(**config):
    return diffusers.DDIMScheduler(**{"clip_sample": False, "prediction_type": "epsilon"} | config)


SPACED = [("leading", {}, 10), ("leading", {"steps_offset": 1, "set_alpha_to_one": False}, 8), ("trailing", {}, 8)]


#: Noise prediction at zero terminal SNR is refused: see below.
CASES = [
    (table, prediction)
    for table in TABLES
    for prediction in ("epsilon", "sample", "v_prediction")
    if not (prediction == "epsilon" and table.endswith("zero_snr"))
]


def exact(scheduler):
    """Theirs with its table in float64: rounded to float32, 1 − ᾱ of the first steps is wrong by up to 1e-3 of itself,
    which a grid that ends on them shows."""
    config, T = scheduler.config, 1000
    start, end = config.beta_start, config.beta_end
    if config.trained_betas is not None:
        betas = np.array(config.trained_betas)
    elif config.beta_schedule == "squaredcos_cap_v2":
        signal = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
    else:
        power = 2 if config.beta_schedule == "scaled_linear" else 1
        betas = np.linspace(start ** (1 / power), end ** (1 / power), T) ** power
    root = np.sqrt(np.cumprod(1 - betas))
    if config.rescale_betas_zero_snr:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    scheduler.alphas_cumprod = torch.from_numpy(root**2)
    scheduler.final_alpha_cumprod = torch.ones(()) if config.set_alpha_to_one else scheduler.alphas_cumprod[0]


@pytest.mark.parametrize(("table", "prediction"), CASES)
@pytest.mark.parametrize(("spacing", "more", "steps"), SPACED, ids=["leading", "offset", "trailing"])
def test_ddim_gives_their_images(table, prediction, spacing, more, steps):
    scheduler = ddim(**TABLES[table], prediction_type=prediction, timestep_spacing=spacing, **more)
    pipe = diffusers.DDIMPipeline(unet(), scheduler)
    denoiser = rp.from_diffusers(pipe)
    assert denoiser.target == rp.target(prediction)
    assert denoiser.schedule.zero_terminal_snr == table.endswith("zero_snr")
    assert denoiser.data["shape"] == [3, 8, 8]
    assert (denoiser.data["min"], denoiser.data["max"]) == (-1.0, 1.0)
    x = rp.sample(denoiser, start=noise(), sampler="ddim", times=interop.times_of(pipe, steps))
    if "steps_offset" in more:
        exact(pipe.scheduler)
    assert_same(x, *theirs(pipe, steps))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_linspace_gives_their_images_where_theirs_keeps_to_its_own_grid(prediction):
    """Theirs steps to k − T // n wherever its next step is; with "linspace" that is its next step at n = T only."""
    scheduler = ddim(num_train_timesteps=20, timestep_spacing="linspace", prediction_type=prediction)
    pipe = diffusers.DDIMPipeline(unet(), scheduler)
    denoiser = rp.from_diffusers(pipe)
    times = interop.times_of(pipe, 20)
    assert times == pytest.approx(rp.samplers.grids.linspace(denoiser, 20))
    assert_same(rp.sample(denoiser, start=noise(), sampler="ddim", times=times), *theirs(pipe, 20))


def test_linspace_of_fewer_steps_is_theirs_walked_as_theirs_walks_it():
    scheduler = ddim(timestep_spacing="linspace", prediction_type="v_prediction")
    pipe = diffusers.DDIMPipeline(unet(), scheduler)
    denoiser, x = rp.from_diffusers(pipe), noise()
    pipe.scheduler.set_timesteps(7)
    for k in pipe.scheduler.timesteps.tolist():
        t, meant = ((j + 1) / 1000 if j >= 0 else 0.0 for j in (k, k - 1000 // 7))
        x = rp.sample(denoiser, start=x, sampler="ddim", times=[t, meant])
    assert_same(x, *theirs(pipe, 7))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_flow_matching_gives_their_images(shift, sampler):
    pipe = diffusers.DDPMPipeline(unet(), diffusers.FlowMatchEulerDiscreteScheduler(shift=shift))
    denoiser = rp.from_diffusers(pipe)
    assert (denoiser.target, denoiser.schedule) == (rp.targets.Velocity(), rp.RectifiedFlow())
    times = interop.times_of(pipe, 8)
    assert (times[0], times[-1], len(times)) == (1.0, 0.0, 9)
    if shift == 3:
        assert times[1] > 0.9  # the shift spends its steps near the noise
    # On the straight path Euler and DDIM are the same step.
    assert_same(rp.sample(denoiser, noise(), sampler=sampler, times=times), *theirs(pipe, 8))


TEXT = {"num_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 8}
ROPE = {"attention_head_dim": 16, "axes_dims_rope": (4, 4, 8)}
GRID = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4}
POOLED = {"attention_head_dim": 8, "caption_projection_dim": 16}


def flow_model(name):
    """A transformer, the shape of its data, and its conditions."""
    torch.manual_seed(5)
    words = {"encoder_hidden_states": torch.randn(2, 3, 8)}
    pooled = words | {"pooled_projections": torch.randn(2, 8)}
    grid = (2, 4, 8, 8)
    if name == "flux":
        made = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_single_layers=1, pooled_projection_dim=8, **TEXT, **ROPE
        )
        return made.eval(), (2, 4, 4), pooled | {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
    if name == "qwen":
        made = diffusers.QwenImageTransformer2DModel(patch_size=2, in_channels=16, out_channels=4, **TEXT, **ROPE)
        mask = {"encoder_hidden_states_mask": torch.ones(2, 3, dtype=torch.int64)}
        return made.eval(), (2, 4, 16), words | mask | {"img_shapes": [[(1, 2, 2)]] * 2}
    if name == "sd3":
        made = diffusers.SD3Transformer2DModel(pooled_projection_dim=8, **TEXT, **GRID, **POOLED)
        return made.eval(), grid, pooled
    if name == "aura":
        layers = {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 8}
        made = diffusers.AuraFlowTransformer2DModel(pos_embed_max_size=16, **layers, **GRID, **POOLED)
        return made.eval(), grid, words
    if name == "sana":
        made = diffusers.SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
            timestep_scale=0.5,
        )  # fmt: skip
        return made.eval(), grid, words
    heads = {"num_attention_heads": 2, "num_kv_heads": 1, "axes_dim_rope": (4, 2, 2), "axes_lens": (20, 20, 20)}
    made = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1, multiple_of=4, cap_feat_dim=8,
        **heads,
    )  # fmt: skip
    return made.eval(), grid, words | {"encoder_attention_mask": torch.ones(2, 3, dtype=torch.bool)}


#: What their pipelines make of the scheduler's timestep of 0 … 1000, and of what the network returns.
PIPELINES = {
    "flux": (lambda t: t / 1000, 1),
    "qwen": (lambda t: t / 1000, 1),
    "aura": (lambda t: t / 1000, 1),
    "sd3": (lambda t: t, 1),
    "sana": (lambda t: t * 0.5, 1),
    "lumina2": (lambda t: 1 - t / 1000, -1),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_flow_transformers_are_called_as_their_pipelines_do(name, tmp_path):
    model, shape, cond = flow_model(name)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    denoiser = rp.from_diffusers(model, scheduler)
    given, sign = PIPELINES[name]
    x = state = noise(shape)
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = sign * model(hidden_states=state, timestep=given(t).expand(2), return_dict=False, **cond)[0]
            state = scheduler.step(out, t, state).prev_sample
    times = interop.times_of(scheduler, 3)
    x = rp.sample(denoiser, start=noise(shape), sampler="euler", times=times, cond=cond)
    torch.testing.assert_close(x, state, rtol=1e-4, atol=1e-4)
    # And it goes back: written as the same pipeline would call it, and read alike.
    with quiet():
        rp.to_diffusers(denoiser, tmp_path / "out")
        again = rp.from_diffusers(tmp_path / "out")
    assert (again.conventions, again.net.config) == (denoiser.conventions, denoiser.net.config)
    assert _scheduler(tmp_path / "out").config.num_train_timesteps == 1000
    if name == "lumina2":
        wrong = rp.Denoiser(DiffusersModel.of(model), rp.RectifiedFlow(), "velocity", time="1-t")
        with pytest.raises(Unsupported, match="negative of a target.*Lumina2"):
            rp.to_diffusers(wrong, tmp_path / "wrong")


@pytest.mark.slow
def test_their_pipelines_call_flow_transformers_so(monkeypatch):
    """The table above, from the pipelines themselves."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    second = dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    third = dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    mask, plain = {"prompt_attention_mask": torch.ones(1, 3, dtype=torch.bool)}, {"guidance_scale": 1.0}
    kinds = {
        "flux": ("FluxPipeline", second, {}, 32),
        "qwen": ("QwenImagePipeline", {}, {"prompt_embeds_mask": torch.ones(1, 3, dtype=torch.int64)}, 32),
        "aura": ("AuraFlowPipeline", {}, mask | plain, 64),
        "sd3": ("StableDiffusion3Pipeline", second | third, plain, 64),
        "lumina2": ("Lumina2Pipeline", {}, mask | plain, 64),
    }
    for name, (kind, parts, options, size) in kinds.items():
        model, _, _ = flow_model(name)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipe = getattr(diffusers, kind)(transformer=model, scheduler=scheduler, **nothing, **parts)
        pipe.set_progress_bar_config(disable=True)
        calls, steps, forward, step = [], [], model.forward, scheduler.step

        def called(*args, calls=calls, forward=forward, **kwargs):
            calls.append((kwargs["timestep"], forward(*args, **kwargs)[0]))
            return calls[-1][1:]

        def stepped(out, t, x, steps=steps, step=step, **kwargs):
            steps.append((out, t))
            return step(out, t, x, **kwargs)

        monkeypatch.setattr(model, "forward", called)
        monkeypatch.setattr(scheduler, "step", stepped)
        if name in ("flux", "sd3"):
            options = options | {"pooled_prompt_embeds": torch.randn(1, 8)}
        words = torch.randn(1, 3, 8)
        pipe(prompt_embeds=words, height=size, width=size, num_inference_steps=2, output_type="latent", **options)
        given, sign = PIPELINES[name]
        assert len(calls) == len(steps) == 2
        for (time, out), (taken, t) in zip(calls, steps, strict=True):
            torch.testing.assert_close(time, given(t).expand(1))
            assert torch.equal(taken, sign * out)


def test_the_time_of_a_flow_model_is_not_guessed(tmp_path):
    flow, table = diffusers.FlowMatchEulerDiscreteScheduler(), ddim()
    with pytest.raises(SpecError, match="no scheduler says which time.*DiTTransformer2DModel.*say time='t'"):
        rp.from_diffusers(dit(), flow)
    x, labels = noise((2, 4, 8, 8)), torch.tensor([1, 3])
    for word, seen in {"t": 0.3, "1-t": 0.7, "1000t": 300.0}.items():
        model = dit()
        with quiet(), torch.no_grad():
            denoiser = rp.from_diffusers(model, flow, time=word)
            out = model(x, torch.full((2,), seen), class_labels=labels).sample[:, :4]
            found = denoiser(x, 0.3, class_labels=labels).mean
        torch.testing.assert_close(found, x - 0.3 * out, rtol=1e-4, atol=1e-4)
        assert denoiser.overrides is None  # nobody had said otherwise
    with pytest.warns(UserWarning, match="UNet2DModel its time as '1000t'; 't' was given"):
        denoiser = rp.from_diffusers(unet(), flow, time="t")
    assert denoiser.overrides == {"time": {"file": "1000t", "given": "t"}}
    rp.save(denoiser, tmp_path / "m.safetensors")
    again = rp.load(tmp_path / "m.safetensors")
    assert (again.conventions.time, again.overrides) == ("t", denoiser.overrides)
    assert rp.from_diffusers(unet(), flow, time="1000t").overrides is None
    with pytest.raises(UnknownName, match="time of a flow model 'step'"):
        rp.from_diffusers(unet(), flow, time="step")
    with pytest.raises(Unsupported, match="time= is of flow models, and DDIMScheduler"):
        rp.from_diffusers(unet(), table, time="t")
    odd = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500)
    with pytest.raises(SpecError, match="Lumina2Transformer2DModel where a scheduler counts to 500"):
        rp.from_diffusers(flow_model("lumina2")[0], odd)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_gives_their_images_from_the_same_draws(variance):
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=20, variance_type=f"fixed_{variance}", clip_sample=False, prediction_type="epsilon"
    )
    pipe = diffusers.DDPMPipeline(unet(), scheduler)
    denoiser = rp.from_diffusers(pipe)
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(SHAPE, generator=generator)
    draws = (torch.randn(SHAPE, generator=generator) for _ in range(20))
    x = rp.sample(denoiser, start=start, sampler=Ancestral(variance), times=interop.times_of(pipe, 20), noises=draws)
    assert_same(x, *theirs(pipe, 20))


def walked(scheduler, model, x, steps):
    """Their loop, for schedulers that no pipeline of pictures takes."""
    scheduler.set_timesteps(steps)
    x = x * getattr(scheduler, "init_noise_sigma", 1)
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(scaled(x, t), t).sample, t, x).prev_sample
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_gives_their_states(prediction):
    scheduler = diffusers.EDMEulerScheduler(sigma_max=20.0, prediction_type=prediction)
    model = unet()
    state = walked(scheduler, model, noise(), 8)
    denoiser = rp.from_diffusers(model, scheduler)
    assert denoiser.target == rp.targets.EDM(0.5)
    times = interop.times_of(scheduler, 8)
    x = rp.sample(denoiser, start=noise() * scheduler.init_noise_sigma, sampler="ddim", times=times)
    torch.testing.assert_close(x, state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"])
def test_solvers_of_a_table_state_the_same_process(kind):
    settings = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler = getattr(diffusers, kind)(beta_start=0.00085, beta_end=0.012, **settings)
    with quiet():
        denoiser = rp.from_diffusers(unet(), scheduler)
    assert denoiser.schedule == rp.DDPM("scaled_linear")
    assert (denoiser.target, denoiser.conventions.time) == (rp.targets.V(), "step")


#: The states of Euler are x_t/α, those of EDM begin at sqrt(σ_max² + 1), and those of DDIM at 1 whatever σ is.
STARTS = {
    "euler_leading": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    "euler_trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "edm": ("EDMEulerScheduler", {"sigma_max": 3.0}),
    "ddim": ("DDIMScheduler", {"timestep_spacing": "leading", "clip_sample": False}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 2.0}),
}


@pytest.mark.parametrize("name", STARTS)
def test_their_loop_from_their_start_is_our_ddim(name):
    kind, settings = STARTS[name]
    told = {} if name == "flow" else {"prediction_type": "v_prediction"}
    scheduler, model = getattr(diffusers, kind)(**settings, **told), unet()
    denoiser = rp.from_diffusers(model, scheduler)
    start, times = interop.start_of(scheduler, noise(), 5), interop.times_of(scheduler, 5)
    x = rp.sample(denoiser, start=start, sampler="ddim", times=times)
    torch.testing.assert_close(x, walked(scheduler, model, noise(), 5), rtol=1e-4, atol=1e-4)


def test_a_start_is_of_the_noise_that_their_state_has():
    """By the closed forms: theirs is x_t/α for Euler, where α = 1/sqrt(1 + σ²)."""
    euler = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", beta_schedule="scaled_linear")
    variance = float(euler.alphas_cumprod[-1])
    torch.testing.assert_close(interop.start_of(euler, noise(), 4), noise() * (1 - variance) ** 0.5)
    # Their step of DDIM stands at less noise than 1, and is given noise of 1 all the same.
    assert torch.equal(interop.start_of(ddim(timestep_spacing="leading"), noise(), 4), noise())
    edm = diffusers.EDMEulerScheduler(sigma_max=3.0)
    torch.testing.assert_close(interop.start_of(edm, noise(), 4), noise() * 10**0.5)


def test_a_solver_of_flow_matching():
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    denoiser = rp.from_diffusers(unet(), scheduler)
    assert (denoiser.target, denoiser.schedule) == (rp.targets.Velocity(), rp.RectifiedFlow())
    assert denoiser.conventions.time == "1000t"


def test_a_table_of_another_make_is_taken_by_its_numbers():
    scheduler = diffusers.DDPMScheduler(beta_schedule="sigmoid", prediction_type="v_prediction", clip_sample=False)
    found = interop.schedule_of(scheduler)
    k = torch.arange(1000)
    torch.testing.assert_close(
        found.alpha(found.time(k)), scheduler.alphas_cumprod.double().sqrt(), rtol=1e-5, atol=1e-9
    )
    assert "<1000 numbers>" in repr(found)
    assert len(repr(found)) < 200
    assert rp.schedule(json.loads(json.dumps(found.config()))) == found


@pytest.mark.parametrize(
    ("betas", "T"), [([0.1, 0.2], 3), ([0.1, 1.2], 2), ([0.0, 0.2], 2), ([1.0, 0.2], 2), (["a", 1], 2), (3, 2)]
)
def test_a_table_that_is_none_is_refused(betas, T):
    with pytest.raises(Unsupported, match="betas"):
        rp.DDPM(betas, T)


# What is said, and by whom


def test_noise_prediction_without_signal_is_refused_with_the_remedy():
    scheduler = ddim(rescale_betas_zero_snr=True)
    with pytest.raises(SingularTime, match=r"t = 1 .*t_range: \[0, 0\.98\]"):
        rp.from_diffusers(unet(), scheduler)
    denoiser = rp.from_diffusers(unet(), scheduler, t_range=(0.0, 0.98))
    x = rp.sample(denoiser, SHAPE, sampler="ddim", steps=5, generator=torch.Generator().manual_seed(0))
    assert bool(x.isfinite().all())


def test_the_callers_word_wins_and_is_recorded():
    scheduler = ddim(prediction_type="v_prediction")
    with pytest.warns(UserWarning, match="contradiction.*'v_prediction'; 'sample' was given"):
        denoiser = rp.from_diffusers(unet(), scheduler, prediction_type="sample")
    assert denoiser.target == rp.targets.X0()
    assert denoiser.overrides == {"target": {"file": {"name": "v"}, "given": {"name": "x0"}}}
    assert any("contradiction" in note for note in denoiser.data["diffusers"]["notes"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to say where it agrees
        assert rp.from_diffusers(unet(), scheduler, prediction_type="v").overrides is None


def test_a_default_that_nobody_stated_is_not_taken(tmp_path):
    """A scheduler, a pipeline and a folder alike."""
    silent = diffusers.DDIMScheduler(clip_sample=False)
    assert silent.config.prediction_type == "epsilon"
    for source in (lambda: (unet(), silent), lambda: (diffusers.DDIMPipeline(unet(), silent),)):
        with pytest.raises(SpecError, match="nothing is guessed.*prediction_type='epsilon'"):
            rp.from_diffusers(*source())
    assert rp.from_diffusers(unet(), silent, "epsilon").overrides is None
    # Saved, it says so.
    silent.save_pretrained(tmp_path)
    assert rp.from_diffusers(unet(), tmp_path).target == rp.targets.Eps()


def test_clipping_is_said_and_neither_done_nor_lost():
    scheduler = ddim(clip_sample=True, timestep_spacing="trailing")
    pipe = diffusers.DDIMPipeline(unet(), scheduler)
    with pytest.warns(UserWarning, match=r"clips x0 to \[-1, 1\].*Clipped\(denoiser, limit=1\)"):
        denoiser = rp.from_diffusers(pipe)
    times = interop.times_of(pipe, 8)
    unclipped = rp.sample(denoiser, start=noise(), sampler="ddim", times=times)
    assert float(unclipped.abs().max()) > 1.5
    # As said, with what theirs calls use_clipped_model_output: ε follows from the clipped x0.
    x = rp.sample(Clipped(denoiser, limit=1), start=noise(), sampler="ddim", times=times)
    assert_same(x, *theirs(pipe, 8, use_clipped_model_output=True))
    with pytest.warns(UserWarning, match=r"thresholds x0.*DynamicallyClipped\(denoiser, quantile=0.9\)"):
        rp.from_diffusers(unet(), ddim(thresholding=True, dynamic_thresholding_ratio=0.9))


def test_a_folder_that_does_not_say_is_refused(tmp_path):
    diffusers.DDIMPipeline(unet(), ddim()).save_pretrained(tmp_path)
    rp.from_diffusers(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    record = json.loads(file.read_text())
    del record["prediction_type"]
    file.write_text(json.dumps(record))
    with pytest.raises(SpecError, match="nothing is guessed.*prediction_type='epsilon'"):
        rp.from_diffusers(tmp_path)
    assert rp.from_diffusers(tmp_path, prediction_type="epsilon").target == rp.targets.Eps()


def marked(folder, names=(), metadata=None):
    """A pipeline's folder whose weights carry the community's markers."""
    diffusers.DDIMPipeline(unet(), ddim(prediction_type="v_prediction")).save_pretrained(folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file) | {name: torch.empty(0) for name in names}
    save_file(tensors, file, {"format": "pt"} | (metadata or {}))
    return folder


def test_contradictions_are_reported_and_the_argument_decides(tmp_path):
    """The config says v, the weights say ε, the caller says x0."""
    folder = marked(tmp_path / "one", metadata={"modelspec.prediction_type": "epsilon"})
    both = "contradiction: .*DDIMScheduler.*'v_prediction'.*modelspec.prediction_type.*'epsilon'"
    with pytest.raises(SpecError, match=f"{both}.*Say which is right: prediction_type="):
        rp.from_diffusers(folder)
    with pytest.warns(UserWarning, match=f"{both}.*'sample' was given, and is used"):
        denoiser = rp.from_diffusers(folder, prediction_type="sample")
    assert denoiser.target == rp.targets.X0()
    assert denoiser.overrides == {"target": {"file": {"name": "v"}, "given": {"name": "x0"}}}
    assert set(denoiser.data["diffusers"]["stated"].values()) == {"v_prediction", "epsilon"}
    with pytest.warns(UserWarning, match="contradiction"):
        assert rp.from_diffusers(folder, prediction_type="v_prediction").target == rp.targets.V()


def test_marks_that_agree_and_marks_of_the_end(tmp_path):
    assert rp.from_diffusers(marked(tmp_path / "v", ["v_pred"])).target == rp.targets.V()
    with pytest.raises(SpecError, match="contradiction.*__x0__"):
        rp.from_diffusers(marked(tmp_path / "x0", ["__x0__"]))
    with pytest.raises(SpecError, match="contradiction.*ss_v_parameterization"):
        rp.from_diffusers(marked(tmp_path / "kohya", metadata={"ss_v_parameterization": "False"}))
    folder = marked(tmp_path / "zero", ["ztsnr"])
    with pytest.raises(SpecError, match=r"by an empty tensor ztsnr .* is pure noise .* it is not.*rescale_betas_zero"):
        rp.from_diffusers(folder)
    right = ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert float(rp.from_diffusers(folder, right).schedule.alpha(1.0)) == 0
    with pytest.warns(UserWarning, match="the scheduler that was given is used"):
        rp.from_diffusers(folder, ddim(prediction_type="v_prediction"))


def test_a_folder_is_read_like_its_pipeline(tmp_path):
    pipe = diffusers.DDIMPipeline(unet(), ddim(**TABLES["squaredcos"], prediction_type="v_prediction"))
    pipe.save_pretrained(tmp_path / "whole")
    ours = rp.from_diffusers(pipe)
    for place in (tmp_path / "whole", tmp_path / "whole" / "unet"):
        found = rp.from_diffusers(place)
        assert (found.target, found.schedule) == (ours.target, ours.schedule)
        torch.testing.assert_close(found(noise(), 0.5).mean, ours(noise(), 0.5).mean, rtol=1e-5, atol=1e-5)
    assert found.data["shape"] == [3, 8, 8]


def test_another_scheduler_in_place_of_its_own():
    pipe = diffusers.DDIMPipeline(unet(), ddim(prediction_type="v_prediction"))
    solver = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rp.from_diffusers(pipe, solver).target == rp.targets.V()
        # A solver that was made anew and not told says nothing: with it, diffusers would sample noise prediction.
        assert rp.from_diffusers(pipe, diffusers.DPMSolverMultistepScheduler()).target == rp.targets.V()
    with pytest.warns(UserWarning, match="'sample' was given"):
        found = rp.from_diffusers(pipe, ddim(prediction_type="sample"))
    assert found.overrides == {"target": {"file": {"name": "v"}, "given": {"name": "x0"}}}


def test_what_is_no_scheduler(tmp_path):
    for wrong, says in ((42, "found int"), (diffusers.DDIMScheduler, "the class DDIMScheduler")):
        for use in (interop.schedule_of, lambda s: interop.times_of(s, 3), lambda s: rp.from_diffusers(unet(), s)):
            with pytest.raises(SpecError, match=f"{says}.*expected a scheduler"):
                use(wrong)
    diffusers.DDIMPipeline(unet(), ddim()).save_pretrained(tmp_path / "whole")
    with pytest.raises(SpecError, match="no folder .*nofolder; expected one that a scheduler"):
        rp.from_diffusers(unet(), tmp_path / "whole" / "nofolder")  # the one beside it is not meant
    with pytest.raises(SpecError, match=r"holds no scheduler_config\.json"):
        rp.from_diffusers(unet(), tmp_path)


@pytest.mark.parametrize(
    ("kind", "settings", "steps", "says"),
    [
        ("HeliosScheduler", {}, 4, "3 stages"),
        ("HeliosDMDScheduler", {}, 4, "3 stages"),
        ("DDIMInverseScheduler", {"timestep_spacing": "linspace"}, 4, "from data to noise"),
        ("DDIMInverseScheduler", {}, 4, "from data to noise"),
        ("EulerDiscreteScheduler", {}, 5, r"\(linspace\) lie between.*timestep_spacing='trailing'"),
        ("KDPM2DiscreteScheduler", {"timestep_spacing": "trailing"}, 4, "not KDPM2"),
        ("DDIMScheduler", {}, 5000, "cannot be set to 5000 steps"),
        ("DDIMScheduler", {}, 0, "1 or more, found 0"),
        ("DDIMScheduler", {}, 4.5, "found 4.5"),
    ],
)
def test_steps_that_are_not_a_grid_of_times(kind, settings, steps, says):
    with pytest.raises(Unsupported, match=says):
        interop.times_of(getattr(diffusers, kind)(**settings), steps)


def test_a_pipeline_of_two_networks_is_refused(tmp_path):
    class Two:
        def __init__(self):
            flow = diffusers.FlowMatchEulerDiscreteScheduler()
            self.components = {"transformer": dit(), "transformer_2": dit(), "scheduler": flow}

    with pytest.raises(Unsupported, match="Two has two networks.*t_range"):
        rp.from_diffusers(Two())
    for part in ("transformer", "transformer_2"):
        dit().save_pretrained(tmp_path / part)
    with pytest.raises(Unsupported, match="two networks"):
        rp.from_diffusers(tmp_path)


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(SpecError, match="no folder"):
        rp.from_diffusers("someone/some-model")
    with pytest.raises(SpecError, match=r"no config\.json"):
        rp.from_diffusers(tmp_path)
    with pytest.raises(SpecError, match="without a scheduler"):
        rp.from_diffusers(unet())
    with pytest.raises(NetworkError, match="expected a pipeline"):
        rp.from_diffusers(3)
    with pytest.raises(NetworkError, match="not called as model"):
        rp.from_diffusers(nn.Linear(2, 2), ddim())
    with pytest.raises(Unsupported, match="neither a table"):
        rp.from_diffusers(unet(), diffusers.KarrasVeScheduler(), "epsilon")
    pipe = diffusers.DDIMPipeline(unet(), ddim())
    pipe.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(SpecError, match="Only safetensors are read"):
        rp.from_diffusers(tmp_path / "pickled")
    pipe.save_pretrained(tmp_path / "bad")
    (tmp_path / "bad" / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(SpecError, match="cannot be read as JSON"):
        rp.from_diffusers(tmp_path / "bad")


def test_without_diffusers_it_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(NetworkError, match=r"pip install 'reparam\[diffusers\]'"):
        rp.from_diffusers(tmp_path)


# Other networks


def test_a_learned_variance_is_dropped_and_said():
    model, scheduler = dit(), ddim(num_train_timesteps=1000)
    with pytest.warns(UserWarning, match="learned variance, is dropped"):
        denoiser = rp.from_diffusers(model, scheduler)
    x, labels = noise((2, 4, 8, 8)), torch.tensor([1, 3])
    t = denoiser.schedule.time(499)
    with torch.no_grad():
        raw = model(x, torch.tensor([499, 499]), class_labels=labels).sample
        assert raw.shape[1] == 8
        x0 = (x - denoiser.schedule.sigma(t) * raw[:, :4]) / denoiser.schedule.alpha(t)
        found = denoiser(x, t, class_labels=labels).mean
    torch.testing.assert_close(found, x0.float(), rtol=1e-5, atol=1e-5)


def test_improved_ddpm_with_a_learned_variance():
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False, prediction_type="epsilon")
    with pytest.warns(UserWarning, match="learned variance"):
        denoiser = rp.from_diffusers(unet(out_channels=6), scheduler)
    assert denoiser(noise(), 0.5).mean.shape == SHAPE


def test_conditions_go_through_by_their_names():
    model = conditional()
    scheduler = ddim(prediction_type="v_prediction", timestep_spacing="trailing")
    denoiser = rp.from_diffusers(model, scheduler)
    x, words = noise((2, 4, 8, 8)), noise((2, 5, 12), seed=3)
    scheduler.set_timesteps(8)
    state = x
    with torch.no_grad():
        for t in scheduler.timesteps:
            state = scheduler.step(model(state, t, encoder_hidden_states=words).sample, t, state).prev_sample
    cond = {"encoder_hidden_states": words}
    found = rp.sample(denoiser, start=x, sampler="ddim", times=interop.times_of(scheduler, 8), cond=cond)
    torch.testing.assert_close(found, state, rtol=1e-4, atol=1e-4)
    other = rp.sample(denoiser, start=x, sampler="ddim", steps=8, cond={"encoder_hidden_states": 0 * words})
    assert float((other - found).abs().max()) > 1e-3
    with pytest.raises(NetworkError, match="takes no 'y'"):
        denoiser(x, 0.5, y=torch.tensor([0, 1]))
    with pytest.raises(NetworkError, match="could not be called.*encoder_hidden_states"):
        denoiser(x, 0.5)


def test_class_labels():
    model = unet(num_class_embeds=4)
    denoiser = rp.from_diffusers(model, ddim())
    labels = torch.tensor([0, 3])
    t = denoiser.schedule.time(499)
    with torch.no_grad():
        found = denoiser(noise(), t, class_labels=labels).mean
        raw = model(noise(), 499, class_labels=labels).sample
    expected = denoiser.target.to_x0(raw, noise(), t, denoiser.schedule)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(NetworkError, match="could not be called.*class_labels"):
        denoiser(noise(), t)


def test_a_model_in_half_precision_is_called_in_it():
    model = unet()
    exact = rp.from_diffusers(model, ddim(prediction_type="v_prediction"))(noise(), 0.5).mean
    half = rp.from_diffusers(unet().to(torch.bfloat16), ddim(prediction_type="v_prediction"))(noise(), 0.5).mean
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0.1)


def test_it_is_saved_and_loaded_like_any_other(tmp_path):
    with quiet():
        denoiser = rp.from_diffusers(unet(), ddim(**TABLES["trained_betas"], prediction_type="v_prediction"), "sample")
    rp.save(denoiser, tmp_path / "m.safetensors")
    found = rp.load(tmp_path / "m.safetensors")
    assert isinstance(found.net, DiffusersModel)
    assert (found.schedule, found.target, found.overrides) == (denoiser.schedule, denoiser.target, denoiser.overrides)
    torch.testing.assert_close(found(noise(), 0.5).mean, denoiser(noise(), 0.5).mean, rtol=1e-5, atol=1e-5)


def test_a_network_of_diffusers_by_name():
    config = DiffusersModel.of(unet()).config
    net = rp.networks.network(json.loads(json.dumps(config)))
    assert net.config == config
    assert net(noise(), torch.tensor([1, 2])).shape == SHAPE
    with pytest.raises(UnknownName, match="UNet3Model"):
        DiffusersModel("UNet3Model", {})
    with pytest.raises(UnknownName, match="chanels"):
        DiffusersModel("UNet2DModel", {"in_chanels": 3})
    with pytest.raises(UnknownName):
        DiffusersModel("DDIMPipeline", {})  # not a model


# Ours in theirs

SCRIPT = """
import sys
import numpy as np, torch
import diffusers
for folder, kind in zip(sys.argv[1::2], sys.argv[2::2]):
    pipe = getattr(diffusers, kind).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    states, step = [], pipe.scheduler.step
    def kept(*args, **kwargs):
        found = step(*args, **kwargs)
        states.append(found.prev_sample)
        return found
    pipe.scheduler.step = kept
    images = pipe(batch_size=2, generator=torch.Generator().manual_seed(7), num_inference_steps=10, output_type="np")
    np.savez(folder + "/out.npz", images=images.images, state=states[-1].numpy())
assert "reparam" not in sys.modules
"""

OURS = {
    "epsilon": (rp.DDPM(T=100), "eps", "step", "DDIMPipeline"),
    "sample": (rp.DDPM("scaled_linear"), "x0", "step", "DDIMPipeline"),
    "v_prediction": (rp.DDPM("squared_cosine", zero_terminal_snr=True), "v", "step", "DDIMPipeline"),
    "trained_betas": (rp.DDPM([0.01 + 0.002 * i for i in range(50)], 50), "v", "step", "DDIMPipeline"),
    "flow": (rp.RectifiedFlow(), "velocity", "1000t", "DDPMPipeline"),
}


def ours(name, **changes):
    schedule, target, time, _ = OURS[name]
    torch.manual_seed(1)
    return rp.Denoiser(UNet(image=8, widths=[32, 32]), schedule, target, time=time, **changes)


def test_ours_in_their_pipelines_in_a_process_of_their_own(tmp_path):
    arguments = []
    for name in OURS:
        rp.to_diffusers(ours(name), tmp_path / name)
        assert (tmp_path / name / "model_index.json").is_file()
        arguments += [str(tmp_path / name), OURS[name][3]]
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *arguments]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    for name in OURS:
        found = np.load(tmp_path / name / "out.npz")
        images, state = torch.from_numpy(found["images"]).permute(0, 3, 1, 2), torch.from_numpy(found["state"])
        denoiser = ours(name)
        if name == "flow":
            x = rp.sample(denoiser, noise(), sampler="euler", times=interop.times_of(_scheduler(tmp_path / name), 10))
        else:
            x = rp.sample(denoiser, start=noise(), sampler="ddim", steps=10)  # theirs begins at unit noise
        assert float(((images > 0) & (images < 1)).float().mean()) > 0.2
        assert_same(x, images, state)
        again = rp.from_diffusers(tmp_path / name)
        assert (again.schedule, again.target) == (denoiser.schedule, denoiser.target)
        with torch.no_grad():
            torch.testing.assert_close(again(noise(), 0.5).mean, denoiser(noise(), 0.5).mean, rtol=1e-5, atol=1e-5)


def _scheduler(folder):
    return diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")


def test_the_folder_says_what_it_predicts(tmp_path):
    for name in ("epsilon", "sample", "v_prediction"):
        rp.to_diffusers(ours(name), tmp_path / name)
        record = json.loads((tmp_path / name / "scheduler" / "scheduler_config.json").read_text())
        assert record["prediction_type"] == name
        assert record["rescale_betas_zero_snr"] == (name == "v_prediction")
        assert record["clip_sample"] is False


def test_a_conditional_network_is_written_in_parts(tmp_path):
    model, scheduler = dit(), ddim(timestep_spacing="trailing")
    with quiet():
        denoiser = rp.from_diffusers(model, scheduler)
        notes = rp.to_diffusers(denoiser, tmp_path / "dit")
        again = rp.from_diffusers(tmp_path / "dit")
    assert any("DiTTransformer2DModel.from_pretrained" in note for note in notes)
    x, labels = noise((2, 4, 8, 8)), torch.tensor([1, 3])
    with torch.no_grad():
        one, other = (d(x, 0.5, class_labels=labels).mean for d in (denoiser, again))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    with_labels = rp.Denoiser(UNet(image=8, widths=[32, 32], classes=3), rp.DDPM(), "v", time="step")
    rp.to_diffusers(with_labels, tmp_path / "labels")
    assert not (tmp_path / "labels" / "model_index.json").exists()
    assert rp.from_diffusers(tmp_path / "labels").target == rp.targets.V()


def _unet(outputs=3):
    return UNet(image=8, widths=[32, 32], outputs=outputs)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: rp.Denoiser(rp.networks.MLP(dim=2), rp.DDPM(), "v", time="step"), "MLP is not a network of diffusers"),
        (lambda: rp.Denoiser(_unet(), rp.DDPM(), "velocity", time="step"), "not velocity"),
        (lambda: rp.Denoiser(_unet(), rp.DDPM(), "v"), "wants time='t'"),
        (lambda: rp.Denoiser(_unet(), rp.DDPM(), "v", time="1000t"), "wants time='1000t'"),
        (lambda: rp.Denoiser(_unet(), rp.RectifiedFlow(), "x0", time="1000t"), "predicts x0"),
        (lambda: rp.Denoiser(_unet(), rp.RectifiedFlow(), "velocity"), "wants time='t'"),
        (lambda: rp.Denoiser(_unet(), rp.RectifiedFlow(2.0), "velocity", time="1000t"), "noise scale 1"),
        (lambda: rp.Denoiser(_unet(), "cosine", "v", time="1000t"), "no scheduler for Cosine"),
        (lambda: rp.Denoiser(_unet(), rp.DDPM(), "v", time="step", input="unit_variance"), "scale the input"),
        (lambda: rp.Denoiser(_unet(), rp.DDPM(), "v", time="step", t_range=(0, 0.9)), "begins at t = 1"),
        (lambda: rp.Denoiser(_unet(6), rp.DDPM(), rp.Gaussian("x0"), time="step"), "Gaussian likelihood"),
        (lambda: Clipped(rp.Denoiser(_unet(), rp.DDPM(), "v", time="step")), "more than a network"),
    ],
)
def test_what_diffusers_has_no_name_for_is_refused_by_name(make, says, tmp_path):
    with pytest.raises(Unsupported, match=says):
        rp.to_diffusers(make(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_would_come_out_otherwise_is_said(tmp_path):
    (grid,) = rp.to_diffusers(ours("flow", data={"min": -1.0, "max": 1.0}), tmp_path / "flow")
    assert "least noise" in grid
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "flow")
    images, state = theirs(pipe, 7)
    same = rp.sample(ours("flow"), noise(), sampler="euler", times=interop.times_of(pipe.scheduler, 7))
    assert_same(same, images, state)
    even = rp.sample(ours("flow"), noise(), sampler="euler", steps=7)
    assert float((even - state).abs().max()) > 1e-3
    notes = rp.to_diffusers(ours("sample", data={"min": -2.5, "max": 3.0}, t_range=(0.1, 1)), tmp_path / "sample")
    assert [n for n in notes if "-2.5 to 3" in n]
    assert [n for n in notes if "sigma is 0.9977" in n]
    assert [n for n in notes if "more than 10 steps" in n]


@pytest.mark.parametrize("wrong", [None, nn.Linear(1, 1), "runs/mine"])
def test_only_a_denoiser_is_written(wrong, tmp_path):
    with pytest.raises(NetworkError, match="expected a denoiser: rp.load"):
        rp.to_diffusers(wrong, tmp_path / "out")


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(OutputError, match="not an empty folder"):
        rp.to_diffusers(ours("flow"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


# Our targets in their training loop


def test_our_loss_in_their_loop_is_theirs():
    """Noise prediction as in their example: the same number from the same steps and noise."""
    model, scheduler = unet(), diffusers.DDPMScheduler(num_train_timesteps=1000)
    images, eps, k = noise(), noise(seed=1), torch.tensor([10, 900])
    expected = F.mse_loss(model(scheduler.add_noise(images, eps, k), k).sample, eps)
    objective = rp.Objective(interop.schedule_of(scheduler), "epsilon", time="step")
    found = objective(lambda x, t: model(x, t).sample, images, objective.schedule.time(k), eps).mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def added_lines():
    """The four lines that docs/diffusers.md adds to their example."""
    page = (Path(__file__).parents[1] / "docs" / "diffusers.md").read_text()
    added = [line[1:].strip() for line in page.splitlines() if line.startswith("+")]
    assert len(added) == 4
    return added


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_their_training_loop_with_four_lines_more(prediction, tmp_path):
    """The loop of their example of unconditional generation, with the lines of the documentation as they stand."""
    torch.manual_seed(0)
    noise_scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, prediction_type=prediction)
    model = unet().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    names = {"noise_scheduler": noise_scheduler, "model": model}
    *before, last = added_lines()
    exec("\n".join(before), names)
    line, losses = compile(last, "docs/diffusers.md", "exec"), []
    for _ in range(40):
        names["clean_images"] = 0.5 + 0.05 * torch.randn(16, 3, 8, 8)
        exec(line, names)
        loss = names["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])
    diffusers.DDPMPipeline(unet=model, scheduler=noise_scheduler).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="clips x0"):  # as DDPMScheduler does by default
        denoiser = rp.from_diffusers(tmp_path)
    objective = names["objective"]
    assert (denoiser.target, denoiser.schedule) == (objective.target, objective.schedule)
    # What is saved says the truth: under any other name the model is further from the data.
    x_t = denoiser.schedule.add_noise(torch.full(SHAPE, 0.5), noise(), 0.3)
    errors = {}
    for word in ("epsilon", "sample", "v_prediction"):
        with quiet(), torch.no_grad():
            x0 = rp.from_diffusers(tmp_path, prediction_type=word)(x_t, 0.3).mean
        errors[word] = float((x0 - 0.5).square().mean())
    assert min(errors, key=errors.__getitem__) == prediction, errors
