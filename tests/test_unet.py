"""The U-Net against diffusers' own, and recomputed activations against kept ones."""

import copy
import sys

import pytest
import torch

import reparam as rp
from reparam.errors import Conflict, NetworkError, UnknownName
from reparam.networks import JiT, UNet, network

diffusers = pytest.importorskip("diffusers")

#: What google/ddpm-cifar10-32 states in its config.json, by hand.
GOOGLE = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": (128, 256, 256, 256),
    "center_input_sample": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**arguments):
    torch.manual_seed(0)
    return UNet(**{"image": 16, "widths": [32, 64], **arguments})


def inputs(net, n=3):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, net.config["channels"], *net.config["image"], generator=g)
    return x, torch.tensor([0, 417, 999])[:n]


@pytest.mark.parametrize(("size", "millions"), [("small", 8.95), ("medium", 36), ("large", 143)])
def test_the_sizes_have_the_published_numbers_of_parameters(size, millions):
    with torch.device("meta"):
        net = UNet(32, size=size)
    found = sum(p.numel() for p in net.parameters()) / 1e6
    assert found == pytest.approx(millions, abs=0.005 if size == "small" else 0.5)


def test_medium_is_ddpm_cifar10_and_weights_are_exchanged_by_name():
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(**GOOGLE)
    ours = UNet(32, size="medium")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    ours.load_state_dict(theirs.state_dict())
    x, time = inputs(ours, 2)
    with torch.no_grad():
        assert torch.equal(ours(x, time), theirs(x, time).sample)


@torch.no_grad()
def test_the_default_layout_is_what_diffusers_does_untold():
    ours = tiny(layout="default", classes=2)
    theirs = diffusers.UNet2DModel(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        num_class_embeds=3,
        norm_num_groups=16,  # of networks as narrow as this
    )
    theirs.load_state_dict(ours.state_dict())
    x, time = inputs(ours)
    y = torch.tensor([0, 1, 2])
    assert torch.equal(ours(x, time, y), theirs(x, time, y).sample)
    other = tiny(classes=2)
    other.load_state_dict(ours.state_dict())  # the layouts differ in what they compute only
    assert not torch.allclose(other(x, time, y), ours(x, time, y), atol=1e-3)


@torch.no_grad()
def test_labels():
    net = tiny(classes=4)
    x, time = inputs(net)
    plain, null = net(x, time), net(x, time, torch.full((3,), 4))
    assert torch.equal(plain, null)
    assert net.null_label == 4
    assert (net(x, time, torch.zeros(3, dtype=torch.int64)) - plain).abs().amax() > 1e-3
    with pytest.raises(NetworkError, match=r"labels were given to a UNet without classes; make it with classes="):
        tiny()(x, time, torch.zeros(3, dtype=torch.int64))


@torch.no_grad()
def test_times_between_the_steps_and_other_memory_formats():
    net = tiny()
    x, time = inputs(net)
    out = net(x, time)
    assert torch.equal(net(x, time.float()), out)
    assert not torch.equal(net(x, time.float() + 0.5), out)
    net = net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x.to(memory_format=torch.channels_last), time), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"image": [32, 36], "widths": None},
            NetworkError,
            r"32×36 cannot be halved 3 times.*divisible by 8.*'data\.size=32'",
        ),
        ({"image": 15}, NetworkError, r"15×15 cannot be halved 1 times; both sides must be divisible by 2"),
        ({"image": [16]}, NetworkError, r"image is a side, or \[height, width\], in pixels, found \[16\]"),
        ({"image": "16"}, NetworkError, r"image is a side"),
        ({"widths": [32, 48]}, NetworkError, r"a multiple of 32.*found 48 in \[32, 48\]; the nearest is 64"),
        ({"widths": [32]}, NetworkError, r"widths are at least two numbers"),
        ({"size": "small"}, Conflict, r"size 'small' and widths \[32, 64\] say the same thing twice"),
        ({"size": "huge", "widths": None}, UnknownName, r"unknown size of unet 'huge'"),
        ({"layout": "google"}, UnknownName, r"unknown layout of unet 'google'"),
        ({"channels": 0}, NetworkError, r"channels must be an integer of at least 1, found 0"),
        ({"classes": -1}, NetworkError, r"classes must be an integer of at least 0, found -1"),
        ({"dropout": 1.0}, NetworkError, r"dropout must be a number in \[0, 1\), found 1\.0"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        tiny(**arguments)


def test_inputs_of_another_shape_are_refused():
    for shape in ((2, 1, 16, 16), (2, 3, 16, 32), (3, 16, 16)):
        with pytest.raises(NetworkError, match=r"takes pictures of shape \[B, 3, 16, 16\], found \["):
            tiny()(torch.zeros(shape), torch.zeros(2))


def test_without_diffusers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(NetworkError, match=r"pip install 'reparam\[diffusers\]'"):
        tiny()


def test_saved_and_loaded_it_is_rebuilt_from_its_spec(tmp_path):
    net = tiny(image=[8, 16], channels=1, classes=3, layout="default", dropout=0.1).eval()
    denoiser = rp.Denoiser(net, "ddpm", "eps", time="step", t_range=(0.0, 1.0))
    path = tmp_path / "model.safetensors"
    rp.save(denoiser, path)
    again = rp.load(path)
    assert type(again.net) is UNet
    assert again.net.config == net.config
    assert network(net.config).config == net.config
    again.net.eval()
    x, y = torch.randn(2, 1, 8, 16), torch.tensor([0, 3])
    with torch.no_grad():
        expected, found = denoiser(x, 0.3, y=y).mean, again(x, 0.3, y=y).mean
    assert torch.equal(found, expected)


def test_a_copy_is_a_network_of_its_own():
    net = tiny()
    other = copy.deepcopy(net)
    x, time = inputs(net)
    with torch.no_grad():
        before = net(x, time)
        for p in other.parameters():
            p.zero_()
        assert torch.equal(net(x, time), before)
        assert (other(x, time) == 0).all()


def jit(dropout):
    torch.manual_seed(0)
    net = JiT(16, 4, width=32, depth=4, heads=2, bottleneck=8, classes=3, in_context=2, dropout=dropout)
    for p in net.parameters():  # a fresh JiT returns zero whatever its blocks do
        torch.nn.init.normal_(p, std=0.1)
    return net


@pytest.mark.parametrize("make", [lambda: tiny(dropout=0.3), lambda: jit(0.3)], ids=["unet", "jit"])
def test_recomputed_activations_change_no_number_and_save_memory(make):
    found = []
    for switched in ([], [True], [True, False]):
        net = make().train()
        for on in switched:
            net.checkpoint_activations(on)
        kept = 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(2)  # of the dropout
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = net(x, torch.tensor([3.0, 500.0, 900.0]))
        held = kept
        out.square().mean().backward()
        found.append((out.detach(), [p.grad for p in net.parameters()], held))
    (out, grads, all_kept), (again, grads_again, few_kept), (_, _, kept_off_again) = found
    assert torch.equal(out, again)
    for expected, actual in zip(grads, grads_again, strict=True):
        assert (expected is None) == (actual is None)
        assert expected is None or torch.equal(expected, actual)
    assert few_kept < 0.7 * all_kept == 0.7 * kept_off_again


@pytest.mark.parametrize("widths", [[32, 32], [32, 64], [64, 64]])
def test_narrow_networks_hear_their_time(widths):
    """A normalisation of one channel a group would take out what the time adds to that channel."""
    torch.manual_seed(0)
    net, x = UNet(image=8, channels=1, widths=widths), torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        early, late = (net(x, torch.full((4,), t)) for t in (1.0, 900.0))
    assert float((early - late).abs().max()) > 0.01 * float(early.abs().max())
