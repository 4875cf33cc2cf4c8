"""JiT against the published network, and against the plain one of plain_jit.py."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import reparam as rp
from plain_jit import PlainJiT, randomise
from reparam.errors import NetworkError, ReparamError, UnknownName
from reparam.networks.jit import JiT, rotary_table

BASE = {
    "input_size": 24,
    "patch_size": 8,
    "in_channels": 3,
    "hidden_size": 48,
    "depth": 4,
    "num_heads": 3,
    "num_classes": 5,
    "bottleneck_dim": 10,
    "in_context_len": 3,
    "in_context_start": 2,
}
PLAIN = {"num_classes": 0, "in_context_len": 0}


pytestmark = pytest.mark.usefixtures("one_thread")


def ours_of(config, dropout=0.0):
    """Our network of the published configuration's keys."""
    size = config["input_size"]
    return JiT(
        size if isinstance(size, int) else list(size),
        config["patch_size"],
        config["in_channels"],
        width=config["hidden_size"],
        depth=config["depth"],
        heads=config["num_heads"],
        bottleneck=config["bottleneck_dim"],
        classes=config["num_classes"],
        in_context=config["in_context_len"],
        in_context_start=config["in_context_start"],
        dropout=dropout,
    )


def pair(dropout=0.0, **changes):
    """Both networks with the same random weights."""
    config = {**BASE, **changes}
    plain, ours = PlainJiT(**config, dropout=dropout), ours_of(config, dropout)
    randomise(plain)
    ours.load_state_dict(plain.state_dict())
    return ours, plain


def inputs(net, n=4, seed=1):
    """Pictures, times and, where the network has classes, labels."""
    g = torch.Generator().manual_seed(seed)
    shape = (net.channels, net.grid[0] * net.patch, net.grid[1] * net.patch)
    x, t = torch.randn(n, *shape, generator=g), torch.rand(n, generator=g)
    return (x, t, torch.randint(net.null_label + 1, (n,), generator=g)) if net.null_label else (x, t)


def small(**arguments):
    return JiT(**{"image": 16, "patch": 8, "width": 32, "depth": 3, "heads": 4, "bottleneck": 8, **arguments})


@pytest.fixture(scope="module")
def golden():
    """The tensors of jit_golden.safetensors, the weights apart, and the configuration."""
    folder = Path(os.environ.get("REPARAM_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    path = folder / "jit_golden.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is missing; the environment variable REPARAM_DATA names its folder")
    with safe_open(path, "pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        config = json.loads(f.metadata()["config"])
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    return tensors, weights, config


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_published_network(golden):
    tensors, weights, config = golden
    call = [tensors[f"input.{name}"] for name in "xty"]
    plain = PlainJiT(**config)
    plain.load_state_dict(weights)
    close(plain(*call), tensors["output"])
    close(JiT.from_official(weights, **config)(*call), tensors["output"])


@torch.no_grad()
def test_official_files_may_carry_prefixes_and_tables(golden):
    tensors, weights, config = golden
    wrapped = {f"module._orig_mod.net.{k}": v for k, v in weights.items()}
    wrapped["module._orig_mod.net.feat_rope.freqs_cos"] = torch.zeros(16, 16)
    wrapped["module._orig_mod.net.feat_rope_incontext.freqs_sin"] = torch.zeros(20, 16)
    net = JiT.from_official(wrapped, **config)
    close(net(*(tensors[f"input.{name}"] for name in "xty")), tensors["output"])
    assert net.config["image"] == [32, 32]
    assert net.config["classes"] == 10


def test_weights_that_do_not_fit_are_refused(golden):
    _, weights, config = golden
    with pytest.raises(NetworkError, match=r"(?s)not those of a JiT of this configuration.*blocks\.3"):
        JiT.from_official(weights, **{**config, "depth": 3})
    with pytest.raises(NetworkError, match=r"(?s)not those of a JiT.*pos_embed"):
        JiT.from_official({k: v for k, v in weights.items() if k != "pos_embed"}, **config)
    with pytest.raises(NetworkError, match=r"(?s)not those of a JiT.*y_embedder.embedding_table.weight"):
        JiT.from_official(weights, **{**config, "num_classes": 9})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"input_size": (24, 40)},
        {"input_size": (40, 16), "in_channels": 1},
        {"in_context_start": 0},
        {"in_context_start": 3, "in_context_len": 7},
        {"in_context_len": 0},
        PLAIN,
        {**PLAIN, "input_size": 8},
        {"input_size": 8},
        {"input_size": (15, 21), "patch_size": 3, "hidden_size": 20, "num_heads": 5, "bottleneck_dim": 7, "depth": 5},
        {"patch_size": 1, "input_size": (3, 5), "depth": 1, "in_context_start": 0},
    ],
    ids=lambda changes: ", ".join(f"{k}={v}" for k, v in changes.items()) or "base",
)
def test_outputs_and_gradients_are_the_plain_networks(changes):
    ours, plain = pair(**changes)
    call = inputs(ours)
    found, expected = ours(*call), plain(*call)
    assert found.shape == call[0].shape
    close(found, expected)
    toward = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    for out in (found, expected):
        (out * toward).sum().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    largest = max(float(g.norm()) for g in gradients.values())
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        apart = float((p.grad - gradients[name]).norm())
        assert apart < 1e-4 * float(gradients[name].norm()) + 1e-7 * largest, name


@torch.no_grad()
def test_state_dicts_are_exchanged_both_ways():
    ours, plain = pair(input_size=(24, 40))
    fresh = PlainJiT(**{**BASE, "input_size": (24, 40)})
    torch.testing.assert_close(fresh.pos_embed, ours.pos_embed, rtol=0, atol=1e-6)
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh(*inputs(ours)), plain(*inputs(ours)))


@torch.no_grad()
def test_no_labels_means_the_null_label():
    ours, _ = pair()
    x, t, _ = inputs(ours)
    assert torch.equal(ours(x, t), ours(x, t, torch.full((4,), 5)))
    assert not torch.allclose(ours(x, t), ours(x, t, torch.zeros(4, dtype=torch.int64)))


def test_tokens_in_context_are_not_turned():
    cos, sin = rotary_table((2, 3), 8, still=2)
    assert torch.equal(cos[:2], torch.ones(2, 8))
    assert torch.equal(sin[:2], torch.zeros(2, 8))
    # Token 2 + 4 lies at row 1, column 1: the first half turns with the row, the second with the column.
    angles = torch.tensor([1.0, 1.0, 0.01, 0.01, 1.0, 1.0, 0.01, 0.01])
    torch.testing.assert_close(cos[6], angles.cos())
    torch.testing.assert_close(sin[6], angles.sin() * torch.tensor([-1.0, 1.0]).repeat(4))


@torch.no_grad()
def test_a_fresh_network_gives_zero_and_is_drawn_as_published():
    torch.manual_seed(0)
    net = JiT(32, 8, width=64, depth=2, heads=2, bottleneck=24, classes=200, in_context=16)
    call = inputs(net)
    assert torch.equal(net(*call), torch.zeros_like(call[0]))
    zero, rows = [], []
    for name, p in net.named_parameters():
        if "adaLN" in name or name.startswith("final_layer.linear") or name.endswith("bias"):
            zero.append(name)
            assert torch.count_nonzero(p) == 0, name
        elif "norm" in name:
            assert torch.equal(p, torch.ones_like(p)), name
        elif "t_embedder" in name or "y_embedder" in name or "in_context" in name:
            rows.append(name)
            assert float(p.std()) == pytest.approx(0.02, rel=0.1), name
            assert abs(float(p.mean())) < 0.002, name
        else:
            bound = math.sqrt(6 / (p.shape[0] + p[0].numel()))
            assert 0.95 * bound < float(p.abs().max()) <= bound, name
            assert float(p.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1), name
    assert len(zero) == 2 * 3 + 2 + 2 + 2 * 4 + 1
    assert len(rows) == 4


def without(net, rope=True, qk_norm=True):
    """The same weights in a network that lacks the one or the other."""
    made = JiT(**{**{k: v for k, v in net.config.items() if k != "name"}, "rope": rope, "qk_norm": qk_norm})
    missing = made.load_state_dict(net.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all("q_norm" in k or "k_norm" in k for k in missing.unexpected_keys)
    return made


@torch.no_grad()
def test_without_rotary_positions_only_the_fixed_ones_tell_places_apart():
    """With the table of fixed positions at zero a permutation of the patches permutes the output, and only then."""
    ours, _ = pair()
    ours.pos_embed.zero_()
    x, t, y = inputs(ours)
    shuffle = torch.randperm(9, generator=torch.Generator().manual_seed(3))

    def shuffled(pictures):
        return ours._picture(ours._patches(pictures)[:, shuffle].unflatten(-1, (3, 64)).transpose(2, 3).flatten(2))

    still = without(ours, rope=False)
    assert still.rope is None
    close(still(shuffled(x), t, y), shuffled(still(x, t, y)))
    assert not torch.allclose(ours(shuffled(x), t, y), shuffled(ours(x, t, y)), atol=1e-2)


@torch.no_grad()
def test_normalised_queries_do_not_feel_their_scale():
    ours, _ = pair()
    call = inputs(ours)
    loose = without(ours, qk_norm=False)
    before, plain = ours(*call), loose(*call)
    for net in (ours, loose):
        for block in net.blocks:
            block.attn.qkv.weight[: 2 * 48] *= 4
            block.attn.qkv.bias[: 2 * 48] *= 4
    close(ours(*call), before)
    assert not torch.allclose(loose(*call), plain, atol=1e-2)


@torch.no_grad()
def test_a_patch_embedding_without_bottleneck_is_one_matrix():
    """It is the bottleneck's two matrices multiplied, where these are its weights."""
    ours, _ = pair()
    one = JiT(**{**{k: v for k, v in ours.config.items() if k != "name"}, "bottleneck": 0})
    first, second = ours.x_embedder.proj1, ours.x_embedder.proj2
    weights = {k: v for k, v in ours.state_dict().items() if not k.startswith("x_embedder.proj")}
    weights["x_embedder.proj2.weight"] = torch.einsum("wb,bchv->wchv", second.weight[:, :, 0, 0], first.weight)
    weights["x_embedder.proj2.bias"] = second.bias
    one.load_state_dict(weights)
    close(one(*inputs(ours)), ours(*inputs(ours)))


def test_position_table_has_the_column_first():
    table = small(image=[24, 40], patch=8, width=32).pos_embed[0]  # 3 rows of 5
    assert table.shape == (15, 32)
    for row, column in ((0, 0), (0, 3), (2, 0), (1, 4)):
        at = table[row * 5 + column]
        for k in (0, 1, 7):
            f = 10000 ** (-k / 8)
            expected = [math.sin(column * f), math.cos(column * f), math.sin(row * f), math.cos(row * f)]
            assert at[[k, 8 + k, 16 + k, 24 + k]].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("size", "millions", "depth", "width", "heads", "start", "dropout"),
    [
        ("B", 131, 12, 768, 12, 4, 0),
        ("L", 459, 24, 1024, 16, 8, 0),
        ("H", 953, 32, 1280, 16, 10, 0.2),
        ("G", 2007, 40, 1664, 16, 10, 0.2),
    ],
)
def test_sizes_are_the_published_ones(size, millions, depth, width, heads, start, dropout):
    with torch.device("meta"):
        net = JiT(256, 16, size=size, classes=1000)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions
    assert len(net.blocks) == net.config["depth"] == depth
    assert {block.attn.heads for block in net.blocks} == {heads}
    assert net.pos_embed.shape == (1, 256, width)
    assert (net.in_context, net.in_context_start, net.null_label) == (32, start, 1000)
    assert net.blocks[depth // 2].attn.proj_drop.p == net.config["dropout"] == dropout


def test_what_is_given_goes_before_the_size():
    net = small(size="H", depth=6)
    assert (net.config["in_context_start"], net.config["dropout"], net.config["in_context"]) == (2, 0, 0)
    assert small(size="H", depth=6, classes=3).config["in_context"] == 32
    assert JiT(**{k: v for k, v in net.config.items() if k != "name"}).config == net.config


class Halves(nn.Module):
    """A dropout that keeps even entries of the last axis, doubled."""

    def forward(self, x):
        return x * (2.0 * (torch.arange(x.shape[-1]) % 2 == 0))


@pytest.mark.parametrize(("depth", "middle"), [(8, {2, 3, 4, 5}), (6, {1, 2}), (3, set())])
@torch.no_grad()
def test_dropout_sits_in_the_middle_half(depth, middle):
    ours, plain = pair(depth=depth, dropout=0.3)
    for i, block in enumerate(ours.blocks):
        rate = 0.3 if i in middle else 0.0
        assert (block.attn.proj_drop.p, block.mlp.ffn_dropout.p) == (rate, rate)
    call = inputs(ours)
    undropped = plain.eval()(*call)
    close(ours.eval()(*call), undropped)
    for net in (ours, plain):
        for i in middle:
            net.blocks[i].attn.proj_drop = Halves()
            net.blocks[i].mlp.ffn_dropout = Halves()
    close(ours(*call), plain(*call))
    assert not middle or not torch.allclose(ours(*call), undropped, atol=1e-2)


@torch.no_grad()
def test_dropout_is_seeded_and_off_in_evaluation():
    ours, _ = pair(dropout=0.3)
    call = inputs(ours)

    def drawn(seed):
        torch.manual_seed(seed)
        return ours(*call)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    ours.eval()
    assert torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize("changes", [{}, {**PLAIN, "input_size": (24, 64)}])
def test_bfloat16_autocast_is_near_float32(changes):
    """To 3 % in the output and 5 % in the gradient; a bfloat16 product is good to 0.4 %."""
    ours, _ = pair(**changes)
    call = inputs(ours, n=16)
    found = []
    for enabled in (False, True):
        ours.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = ours(*call)
        out.float().square().mean().backward()
        found.append((out.detach().float(), torch.cat([p.grad.flatten() for p in ours.parameters()])))
    for full, half, tolerance in zip(*found, (0.03, 0.05), strict=True):
        assert bool(half.isfinite().all())
        assert 0 < float((half - full).norm()) < tolerance * float(full.norm())


def test_compiles_whole_and_once():
    from torch._dynamo.testing import CompileCounterWithBackend  # takes seconds to import

    ours, _ = pair(depth=2, in_context_start=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for seed in (1, 2, 3):
        call = inputs(ours, seed=seed)
        ours.zero_grad()
        expected = ours(*call)
        expected.square().sum().backward()
        gradients = [p.grad for p in ours.parameters()]
        ours.zero_grad()
        found = compiled(*call)
        found.square().sum().backward()
        close(found, expected)
        for p, gradient in zip(ours.parameters(), gradients, strict=True):
            assert float((p.grad - gradient).norm()) <= 1e-4 * float(gradient.norm())
    assert counter.frame_count == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(compiled(*inputs(ours)).isfinite().all())


@pytest.mark.parametrize("changes", [{}, {**PLAIN, "input_size": (24, 40)}])
@torch.no_grad()
def test_saving_and_loading_rebuild_the_network(tmp_path, changes):
    ours, _ = pair(**changes)
    assert "jit" in rp.networks.NETWORKS
    before = rp.Objective("rectified_flow", "x0", time="1-t").denoiser(ours)
    rp.save(before, tmp_path / "model.safetensors")
    after = rp.load(tmp_path / "model.safetensors")
    assert isinstance(after.net, JiT)
    assert after.net.config == ours.config
    assert torch.equal(after.net(*inputs(ours)), ours(*inputs(ours)))
    made = rp.networks.network(ours.config)
    assert [(k, v.shape) for k, v in made.state_dict().items()] == [(k, v.shape) for k, v in ours.state_dict().items()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": 28}, r"28×28.*patches of 8.*both sides \(2, 4, 7, 14, 28\)"),
        ({"image": [16, 30]}, r"16×30.*patches of 8.*both sides \(2\), or resize.*data.size"),
        ({"image": [16, 15]}, r"both sides, or resize"),
        ({"image": 0}, r"image must be an integer of at least 1, found \[0, 0\]"),
        ({"image": [16, 16, 3]}, r"image is a side, or \[height, width\]"),
        ({"patch": 8.0}, r"patch must be an integer of at least 1, found 8\.0"),
        ({"depth": 0}, "depth must be an integer of at least 1"),
        ({"channels": True}, "channels must be an integer of at least 1, found True"),
        ({"classes": -1}, "classes must be an integer of at least 0"),
        ({"heads": 5}, r"width 32 over 5 heads gives 6\.4 features a head"),
        ({"heads": 16}, "width 32 over 16 heads gives 2 features a head.*multiple of 4"),
        ({"heads": 5, "rope": False}, r"gives 6\.4 features a head; choose a number that divides it"),
        ({"width": 30, "heads": 2, "rope": False}, r"fixed positions need a width that is a multiple of 4, found 30"),
        ({"in_context": 4}, "4 class tokens in context need classes"),
        ({"classes": 3, "in_context_start": 3}, r"in_context_start must be below the depth \(3\), found 3"),
        ({"dropout": 1.0}, r"dropout must .* \[0, 1\), found 1\.0"),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(NetworkError, match=message):
        small(**arguments)


def test_an_unknown_size_is_refused():
    with pytest.raises(UnknownName, match=r"unknown size of JiT 'XL'.*Known: B, G, H, L"):
        JiT(32, size="XL")


def test_calls_that_do_not_fit_are_refused():
    net, t = small(), torch.rand(2)
    for shape in ((2, 3, 16, 8), (2, 1, 16, 16), (3, 16, 16)):
        with pytest.raises(NetworkError, match=r"takes pictures of shape \[B, 3, 16, 16\], found \["):
            net(torch.zeros(shape), t)
    with pytest.raises(NetworkError, match=r"labels were given to a JiT without classes; make it with classes="):
        net(torch.zeros(2, 3, 16, 16), t, torch.zeros(2, dtype=torch.int64))


@torch.no_grad()
def agrees_on(device):
    for changes in ({}, PLAIN):
        ours, _ = pair(**changes)
        call = inputs(ours)
        expected = ours(*call)
        found = ours.to(device)(*(v.to(device) for v in call)).cpu()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu():
    agrees_on("cuda")


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs Apple's MPS")
def test_mps_agrees_with_the_cpu():
    agrees_on("mps")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rope": "no"}, r"rope is true or false, found 'no'"),
        ({"qk_norm": 1}, r"qk_norm is true or false, found 1"),
        ({"bottleneck": -1}, r"bottleneck must be an integer of at least 0, found -1"),
        ({"image": 16.0}, r"image must be an integer of at least 1, found \[16\.0, 16\.0\]"),
        ({"image": None}, r"image must be an integer of at least 1, found \[None, None\]"),
        ({"dropout": "0.1"}, r"dropout must be a number in \[0, 1\), found '0\.1'"),
        ({"size": ["B"]}, r"unknown size of JiT"),
    ],
    ids=str,
)
def test_values_of_another_type_are_refused(arguments, message):
    with pytest.raises(ReparamError, match=message):
        small(**arguments)
