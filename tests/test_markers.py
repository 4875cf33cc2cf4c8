"""What other programs write beside weights to say what they predict."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import reparam as rp
from reparam.errors import SpecError, Unsupported
from reparam.files import read_header
from reparam.tools.markers import read_markers, write_markers

ZERO = {"name": "ddpm", "zero_terminal_snr": True}


def model(target="v", schedule="ddpm"):
    torch.manual_seed(0)
    return rp.Denoiser(rp.networks.MLP(3, 8, 2), schedule, target, t_range=(0.0, 0.98))


@pytest.mark.parametrize(
    ("names", "target", "zero"),
    [
        ([], None, None),
        (["w"], None, None),
        (["w", "v_pred"], "v", None),
        (["v_pred", "ztsnr"], "v", True),
        (["ztsnr"], None, True),  # a fact of its own
        (["model.diffusion_model.__x0__"], "x0", None),
    ],
)
def test_empty_tensors_are_read_by_name(names, target, zero):
    found = read_markers(names)
    assert (found.target, found.zero_terminal_snr, found.contradictions) == (target, zero, [])


def test_a_tensor_with_numbers_is_no_mark():
    assert read_markers({"v_pred": [3, 4], "head.ztsnr": [1]}).marks == ()
    assert read_markers({"v_pred": [0]}).target == "v"


@pytest.mark.parametrize(
    ("metadata", "target", "zero"),
    [
        ({"modelspec.prediction_type": "epsilon"}, "eps", None),
        ({"modelspec.prediction_type": "v"}, "v", None),
        ({"ss_v_parameterization": "True", "ss_zero_terminal_snr": "False"}, "v", False),
        ({"ss_v_parameterization": "false"}, None, None),  # anything but v
        ({"ss_v_parameterization": "None", "ss_zero_terminal_snr": "True"}, None, True),
    ],
)
def test_metadata_are_read(metadata, target, zero):
    found = read_markers((), metadata)
    assert (found.target, found.zero_terminal_snr, found.contradictions, found.unread) == (target, zero, [], ())


def test_what_cannot_be_read_is_reported_and_not_guessed():
    found = read_markers((), {"modelspec.prediction_type": "velocity", "ss_zero_terminal_snr": "maybe"})
    assert found.target is found.zero_terminal_snr is None
    assert len(found.unread) == 2
    assert "'velocity', which is not known" in found.unread[0]


@pytest.mark.parametrize(
    ("config", "index", "target", "zero"),
    [
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "DDIMScheduler", "v", True),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": False}, "DDPMScheduler", "eps", False),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler", "velocity", None),
        ({"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "UniPCMultistepScheduler", "velocity", None),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon"}, "EDMEulerScheduler", "edm", None),
        ({"_class_name": "DDPMScheduler"}, "DDPMScheduler", None, None),  # their default is a guess
    ],
)
@pytest.mark.parametrize("inner", [True, False])
def test_a_diffusers_folder_is_read(tmp_path, config, index, target, zero, inner):
    place = tmp_path / "scheduler" if inner else tmp_path
    place.mkdir(exist_ok=True)
    (place / "scheduler_config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", index]}))
    found = read_markers(folder=tmp_path)
    assert (found.target, found.zero_terminal_snr, found.contradictions) == (target, zero, [])


def test_a_real_scheduler_of_diffusers_is_read(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    made = diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    made.save_pretrained(tmp_path)
    found = read_markers(folder=tmp_path)
    assert (found.target, found.zero_terminal_snr) == ("v", True)


def test_contradictions_are_reported_and_not_resolved(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(
        json.dumps({"prediction_type": "epsilon", "rescale_betas_zero_snr": False})
    )
    found = read_markers(["v_pred", "ztsnr"], {"ss_v_parameterization": "False"}, tmp_path)
    assert found.target is None
    assert found.zero_terminal_snr is None
    assert len(found.contradictions) == 3  # v with not v, v with eps, yes with no; eps and not v agree
    assert any("v by an empty tensor v_pred" in c and "eps by prediction_type" in c for c in found.contradictions)
    assert json.loads(json.dumps(found.to_dict()))["contradictions"] == found.contradictions
    assert "They contradict each other" in found.text()


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1, "a": 2}', "\ud800", "[" * 100_000])
def test_a_damaged_folder_is_refused(tmp_path, text):
    (tmp_path / "model_index.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SpecError, match=r"model_index\.json"):
        read_markers(folder=tmp_path)


@pytest.mark.parametrize(
    ("target", "schedule", "tensors", "kind"),
    [
        ("v", ZERO, {"v_pred", "ztsnr"}, "v"),
        ("v", "ddpm", {"v_pred"}, "v"),
        ("x0", "rectified_flow", {"__x0__"}, None),
        ("eps", "ddpm", set(), "epsilon"),
    ],
)
def test_marks_are_written_where_asked_for_and_read_back(tmp_path, target, schedule, tensors, kind):
    made = model(target, schedule)
    rp.save(made, tmp_path / "plain.safetensors")
    rp.save(made, tmp_path / "m.safetensors", markers=True)
    own = set(load_file(tmp_path / "plain.safetensors"))
    assert own == set(made.net.state_dict())
    with safe_open(tmp_path / "m.safetensors", framework="pt") as f:
        assert set(f.keys()) - own == tensors
        assert all(f.get_tensor(name).numel() == 0 for name in tensors)
        assert f.metadata().get("modelspec.prediction_type") == kind
    header = read_header(tmp_path / "m.safetensors")
    found = read_markers(header.shapes, header.metadata)
    assert found.target == target
    assert found.contradictions == []
    assert (found.zero_terminal_snr is True) == ("ztsnr" in tensors)
    again = rp.load(tmp_path / "m.safetensors")
    x = torch.randn(2, 3)
    assert torch.equal(again(x, 0.5).mean, made(x, 0.5).mean)


@pytest.mark.parametrize("target", ["velocity", "edm", rp.Gaussian("v", "isotropic"), {"name": "negated", "of": "v"}])
def test_what_others_have_no_mark_for_is_said(target):
    with pytest.raises(Unsupported, match="they know eps, v and x0"):
        write_markers(model(target))


def test_bare_weights_are_refused_with_what_their_marks_say(tmp_path):
    save_file(
        {**model().net.state_dict(), "v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, tmp_path / "m.safetensors"
    )
    with pytest.raises(
        SpecError, match=r"nothing is guessed.*target v \(an empty tensor v_pred\); zero terminal SNR yes"
    ):
        rp.load(tmp_path / "m.safetensors")
    loaded = rp.load(tmp_path / "m.safetensors", spec=rp.Spec.of(model("v", ZERO)))
    assert loaded.target == rp.target("v")


@pytest.mark.parametrize(
    ("target", "schedule", "marks", "field", "given"),
    [
        ("eps", "ddpm", ["v_pred"], "target", "v"),
        ("v", "ddpm", ["v_pred", "ztsnr"], "schedule", ZERO),
        ({"name": "gaussian", "target": "x0", "covariance": "isotropic"}, "ddpm", ["v_pred"], "target", "v"),
    ],
)
def test_marks_that_contradict_the_spec_are_refused_until_somebody_says_which(
    tmp_path, target, schedule, marks, field, given
):
    spec = rp.Spec.of(model(target, schedule)).to_dict()
    tensors = model().net.state_dict() | {name: torch.empty(0) for name in marks}
    save_file(tensors, tmp_path / "m.safetensors", {"reparam": json.dumps(spec)})
    with pytest.raises(SpecError, match="contradicts itself"):
        rp.load(tmp_path / "m.safetensors")
    loaded = rp.load(tmp_path / "m.safetensors", spec={field: given})
    assert loaded.overrides is not None
    assert loaded.overrides[field]["file"] == spec[field]


def test_a_mark_that_was_overruled_is_in_the_record(tmp_path):
    tensors = model("x0").net.state_dict() | {"v_pred": torch.empty(0)}
    save_file(tensors, tmp_path / "m.safetensors", {"reparam": json.dumps(rp.Spec.of(model("x0")).to_dict())})
    loaded = rp.load(tmp_path / "m.safetensors", spec={"target": "x0"})
    assert loaded.overrides == {"target": {"file": {"name": "v"}, "given": {"name": "x0"}}}
    rp.save(loaded, tmp_path / "n.safetensors")
    assert rp.load(tmp_path / "n.safetensors").overrides == loaded.overrides


def test_a_tensor_of_the_network_with_the_name_of_a_mark_is_kept(tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.v_pred = torch.nn.Parameter(torch.empty(0))

        def forward(self, x, time):
            return x

    rp.save(rp.Denoiser(Odd(), "cosine", "v"), tmp_path / "m.safetensors")
    assert rp.load(tmp_path / "m.safetensors", net=Odd()).target == rp.target("v")
