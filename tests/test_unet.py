"""The U-Net: shapes at the paper's sizes, each kind of bad input, an independent cross-attention."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dddm.model import DDDM
from dddm.sampling import sample
from dddm.schedule import VPSchedule
from dddm.unet import (
    CrossAttention,
    Dropout,
    Resample,
    SelfAttention,
    UNet,
    describe,
    grid_positions,
    group_norm,
    seed_dropout,
)
from dddm.zoo import Pretrained

SIZES = {
    "digits": dict(shape=(1, 8, 8), base=32, multipliers=(1, 2), blocks=2, attention=(8, 4), estimate=(8, 4)),
    "cifar10": dict(dropout=0.3),
    "cifar10-deep": dict(blocks=6, dropout=0.3),
    "cifar10-published": dict(head_channels=128, estimate_positions=False, transformer=True),
    "imagenet64": dict(shape=(3, 64, 64), base=192, multipliers=(1, 2, 3, 4), classes=1000),
    "imagenet64-deep": dict(shape=(3, 64, 64), base=192, multipliers=(1, 2, 3, 4), blocks=6, classes=1000),
}


PALETTE = dict(estimate_positions=False)  # the estimate as a set of pixels
PUBLISHED = dict(PALETTE, transformer=True, attention=(16, 8))  # and the whole published block


def awake(**options):
    "A small network whose zeroed layers hold small random numbers, in eval mode."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet(
            **{
                **dict(
                    shape=(3, 16, 16),
                    base=32,
                    multipliers=(1, 2),
                    blocks=1,
                    attention=(8,),
                    estimate=(16, 8),
                    head_channels=16,
                ),
                **options,
            }
        )
        for p in net.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.05)
    return net.eval()


def inputs(net, batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x_t, estimate = torch.randn(2, batch, *net.shape, generator=g).unbind(0)
    t = torch.randint(0, 1001, (batch,), generator=g)
    label = None if net.classes is None else torch.randint(0, net.classes, (batch,), generator=g)
    return x_t, t, estimate, label


@pytest.mark.parametrize("name", SIZES)
def test_shapes_and_config(name):
    config = json.loads(json.dumps(SIZES[name]))
    with torch.device("meta"):
        net = UNet(**config)
        x = torch.empty(2, *net.shape)
        label = None if net.classes is None else torch.zeros(2, dtype=torch.long)
        out = net(x, torch.zeros(2, dtype=torch.long), x, label)
        again = UNet(**json.loads(json.dumps(net.config)))
    assert out.shape == x.shape and out.dtype == x.dtype
    assert again.config == net.config
    assert [(n, p.shape) for n, p in again.named_parameters()] == [
        (n, p.shape) for n, p in net.named_parameters()
    ]


def test_parameter_counts():
    with torch.device("meta"):
        counts = {name: describe(UNet(**options)) for name, options in SIZES.items()}
    assert counts["imagenet64"]["total"] == pytest.approx(270e6, rel=0.05)
    assert counts["cifar10-published"]["total"] == pytest.approx(131.34e6, rel=0.02)  # their code's count
    for name, count in counts.items():
        with torch.device("meta"):
            net = UNet(**SIZES[name])
        assert (
            count["total"]
            == sum(p.numel() for p in net.parameters())
            == sum(v for k, v in count.items() if k != "total")
        )
    residual = {name: count["residual blocks"] for name, count in counts.items()}
    assert residual["cifar10-deep"] > 1.7 * residual["cifar10"]


def test_deep_has_twice_the_blocks():
    with torch.device("meta"):
        base, deep = UNet(), UNet(blocks=6)
    assert [len(s.blocks) for s in base.down] == [3] * 4 and [len(s.blocks) for s in deep.down] == [6] * 4


@pytest.mark.parametrize(
    "size, multipliers, estimate",
    [(8, (1, 2), (8, 4)), (16, (1, 2, 2), (8, 4)), (32, (1, 1, 1), (8,)), (64, (1, 1, 1, 1), (16, 8))],
)
def test_starts_as_identity(size, multipliers, estimate):
    net = UNet((3, size, size), 16, multipliers, 1, attention=(8,), estimate=estimate, head_channels=8)
    x_t, t, x0, _ = inputs(net)
    assert torch.equal(DDDM(net, VPSchedule())(x0, x_t, t), x_t)


@pytest.mark.parametrize("options", [{}, PALETTE, PUBLISHED])
def test_gradient_reaches_every_parameter(options):
    net = awake(classes=5, blocks=2, **options)
    net(*inputs(net)).square().mean().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("options", [{}, PALETTE, PUBLISHED])
def test_every_input_matters(options):
    net = awake(classes=5, **options)
    x_t, t, estimate, label = inputs(net)
    out = net(x_t, t, estimate, label)
    for changed in (
        (x_t + 1, t, estimate, label),
        (x_t, (t + 500) % 1000, estimate, label),
        (x_t, t, -estimate, label),
        (x_t, t, estimate, (label + 1) % 5),
    ):
        assert ((net(*changed) - out).abs().amax((1, 2, 3)) > 1e-4).all()


def test_no_dependence_across_the_batch():
    net = awake()
    x_t, t, estimate, _ = inputs(net, batch=4)
    together = net(x_t, t, estimate)
    for i in range(4):
        torch.testing.assert_close(
            net(x_t[i : i + 1], t[i : i + 1], estimate[i : i + 1]), together[i : i + 1], atol=1e-5, rtol=1e-4
        )
    x = x_t.clone().requires_grad_()
    net(x, t, estimate)[1].sum().backward()
    assert x.grad[1].any() and not x.grad[[0, 2, 3]].any()


def test_dropout_acts_in_training_only():
    net = awake(dropout=0.5)
    args = inputs(net)
    assert torch.equal(net(*args), net(*args))
    net.train()
    assert not torch.equal(net(*args), net(*args))


def test_self_attention_against_a_plain_softmax():
    layer = SelfAttention(32, 16, 32)
    nn.init.normal_(layer.out.weight, std=0.1)
    h = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    x = F.group_norm(h, 8, layer.norm.weight, layer.norm.bias).flatten(2).transpose(1, 2)
    answer = []
    for head in range(2):
        q, k, v = (
            F.linear(x, w[16 * head : 16 * head + 16], b[16 * head : 16 * head + 16])
            for w, b in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3))
        )
        answer.append(torch.softmax(q @ k.mT / 4, -1) @ v)
    expected = h + layer.out(torch.cat(answer, -1)).mT.reshape(h.shape)
    torch.testing.assert_close(layer(h), expected, atol=1e-5, rtol=1e-4)


def test_cross_attention_place_by_place():
    "One loop over places and patches, with its own cutting into patches and its own position code."
    layer = CrossAttention(32, size=4, image_channels=1, patch=2, head_channels=16, groups=32)
    nn.init.normal_(layer.out.weight, std=0.1)
    g = torch.Generator().manual_seed(0)
    h, estimate = torch.randn(1, 32, 4, 4, generator=g), torch.randn(1, 1, 8, 8, generator=g)
    code = lambda p: [
        f(2 * math.pi / w * p) for f in (math.cos, math.sin) for w in [4 * 32 ** (i / 3) for i in range(4)]
    ]
    place = torch.tensor([code(r) + code(c) for r in range(4) for c in range(4)])
    torch.testing.assert_close(place, grid_positions(4, 16), atol=1e-5, rtol=1e-4)
    patches = torch.stack(
        [estimate[0, 0, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten() for r in range(4) for c in range(4)]
    )
    q = layer.q(F.group_norm(h, 8)[0].flatten(1).mT)
    k, v = layer.kv(patches).chunk(2, 1)
    rows = []
    for i in range(16):
        heads = []
        for s in (slice(0, 16), slice(16, 32)):
            score = torch.stack([(q[i, s] + place[i]) @ (k[j, s] + place[j]) / 4 for j in range(16)])
            heads.append(torch.softmax(score, 0) @ v[:, s])
        rows.append(layer.out(torch.cat(heads)))
    torch.testing.assert_close(
        layer(h, estimate), h + torch.stack(rows).mT.reshape(1, 32, 4, 4), atol=1e-4, rtol=1e-4
    )


def test_position_of_the_estimate_matters():
    net = awake(estimate=(16,))  # 16 px: tokens are single pixels
    x_t, t, estimate, _ = inputs(net)
    shuffled = estimate.flatten(2)[
        ..., torch.randperm(256, generator=torch.Generator().manual_seed(1))
    ].reshape(estimate.shape)
    with torch.no_grad():
        assert (net(x_t, t, estimate) - net(x_t, t, shuffled)).abs().max() > 1e-3
        for m in net.modules():
            if isinstance(m, CrossAttention):
                m.gain.zero_()
        assert (net(x_t, t, estimate) - net(x_t, t, shuffled)).abs().max() < 1e-4


@pytest.mark.parametrize("options", [PALETTE, PUBLISHED])
def test_without_positions_the_estimate_is_a_set_of_pixels(options):
    "At each resolution that reads it; and the set still matters."
    net = awake(**options)
    x_t, t, estimate, _ = inputs(net)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    shuffled = estimate.flatten(2)[..., order].reshape(estimate.shape)
    with torch.no_grad():
        out = net(x_t, t, estimate)
        assert (out - net(x_t, t, shuffled)).abs().max() < 1e-4
        assert (out - net(x_t, t, estimate.flip(1))).abs().max() > 1e-3


def test_the_published_block_follows_every_block_that_attends():
    with torch.device("meta"):
        net = UNet(**SIZES["cifar10-published"])
    has = {s.resolution: [b.transformer is not None for b in s.blocks] for s in net.down}
    assert has == {32: [False] * 3, 16: [True] * 3, 8: [True] * 3, 4: [False] * 3}
    has = {s.resolution: [b.transformer is not None for b in s.blocks] for s in net.up}
    assert has == {4: [False] * 4, 8: [True] * 4, 16: [True] * 4, 32: [False] * 4}
    assert [b.transformer is not None for b in net.middle] == [True, False]
    assert not any(b.self_attention or b.cross_attention for s in (*net.down, *net.up) for b in s.blocks)


def test_a_configuration_of_before_is_the_network_with_positions():
    net = awake()
    before = {k: v for k, v in net.config.items() if k not in ("estimate_positions", "transformer")}
    again = UNet(**before).eval()
    again.load_state_dict(net.state_dict())
    assert again.config == net.config and torch.equal(again(*inputs(net)), net(*inputs(net)))


def test_patches_keep_every_pixel():
    "Each pixel of the estimate moves the keys and values of exactly one patch."
    layer = CrossAttention(16, size=2, image_channels=3, patch=4, head_channels=8, groups=32)
    h, estimate = torch.zeros(1, 16, 2, 2), torch.zeros(1, 3, 8, 8)
    _, k0, v0 = layer.queries_keys_values(h, estimate)
    for r, c in ((0, 0), (3, 3), (3, 4), (7, 0), (6, 5)):
        one = estimate.clone()
        one[0, 1, r, c] = 1
        _, k, v = layer.queries_keys_values(h, one)
        assert ((k - k0).abs().sum((0, 1, 3)) > 0).nonzero().flatten().tolist() == [2 * (r // 4) + c // 4]
        assert ((v - v0).abs().sum((0, 1, 3)) > 0).nonzero().flatten().tolist() == [2 * (r // 4) + c // 4]


def test_resampling_up_equals_doubling_both_branches():
    up = Resample(16, up=True, groups=4)
    nn.init.normal_(up.conv.weight, std=0.1)
    h = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    double = lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(up(h), double(h) + double(up.conv(F.silu(up.norm(h)))))


def test_bfloat16_agrees_with_float32():
    net = awake(classes=5)
    args = inputs(net, batch=8)
    with torch.no_grad():
        high = net(*args)
        with torch.autocast("cpu", torch.bfloat16):
            low = net(*args)
    assert low.dtype == torch.float32
    assert ((low - high).square().mean() / high.square().mean()).sqrt() < 0.03


def test_time_is_exact_under_bfloat16():
    net = awake()
    t = torch.tensor([1000, 1001, 7999, 8000])
    high = net.embedding(t, None)
    with torch.autocast("cpu", torch.bfloat16):
        low = net.embedding(t, None)
    assert low.dtype == torch.float32 and torch.equal(low, high)
    assert (high[0] - high[1]).abs().max() > 1e-3 and (high[2] - high[3]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, dict(classes=5), PUBLISHED])
def test_compiles_without_graph_breaks(options):
    net = awake(**options)
    args = inputs(net)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args), net(*args))
    exact = net(*args)
    with torch.autocast("cpu", torch.bfloat16):
        rough = [f(*args) for f in (net, compiled)]
    eager, graph = (((x - exact).norm() / exact.norm()).item() for x in rough)
    assert 0 < graph < 1.5 * eager < 0.1, "in bfloat16 the graph rounds elsewhere, and no worse"


def test_the_layout_of_the_input_does_not_matter():
    net = awake()
    x_t, t, estimate, _ = inputs(net)
    last = dict(memory_format=torch.channels_last)
    torch.testing.assert_close(
        net(x_t.to(**last), t, estimate.to(**last)), net(x_t, t, estimate), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(shape=(3, 32, 16)), "square"),
        (dict(shape=(3, 32)), "square"),
        (dict(shape=(3, 36, 36)), "multiple of 8"),
        (dict(base=130), "groups"),
        (dict(base=0), "base=0"),
        (dict(blocks=0), "blocks=0"),
        (dict(multipliers=()), "multipliers"),
        (dict(multipliers=(1, 0)), r"multipliers\[1\]=0"),
        (dict(dropout=1.0), "dropout=1.0"),
        (dict(classes=0), "classes=0"),
        (dict(attention=(64,)), r"attention=.*\[64\].*\[32, 16, 8, 4\]"),
        (dict(estimate=(12,)), r"estimate=.*\[12\].*\[32, 16, 8, 4\]"),
        (dict(head_channels=96), "head_channels=96"),
        (dict(head_channels=2), "head_channels=2"),
        (dict(estimate_positions=0), "estimate_positions=0"),
        (dict(transformer=True), "set estimate_positions=False"),
        (dict(transformer=True, estimate_positions=False, estimate=(8,)), "estimate like attention"),
    ],
)
def test_bad_configurations(options, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        UNet(**options)


def test_channels_of_a_group():
    assert group_norm(128, 32).num_groups == 32 and group_norm(32, 32).num_groups == 8
    with pytest.raises(ValueError, match="3 channels"):
        group_norm(3, 32)


def test_bad_calls():
    net, plain = awake(classes=5), awake()
    x_t, t, estimate, label = inputs(net)
    for call, words in [
        (lambda: net(x_t, t, estimate), "conditional"),
        (lambda: plain(x_t, t, estimate, label), "unconditional"),
        (lambda: net(x_t, t, estimate, label + 5), r"0\.\.4"),
        (lambda: net(x_t, t, estimate, label - 5), r"0\.\.4"),
        (lambda: net(x_t, t, estimate, label.float()), "label"),
        (lambda: net(x_t, t, estimate, label[:1]), "label"),
        (lambda: net(x_t, t.float(), estimate, label), "t is"),
        (lambda: net(x_t, t[:1], estimate, label), "t is"),
        (lambda: net(x_t[:, :1], t, estimate, label), "x_t has shape"),
        (lambda: net(x_t, t, estimate[..., ::2], label), "x0_estimate has shape"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_dropout_is_a_function_of_seed_layer_and_place():
    "The hash in plain Python integers; another seed or layer is unrelated; the share kept; its gradient."

    def mix(x):
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    layer, seed = Dropout(0.3, number=5), 0x2B8D_1234_9ABC_DEF0
    layers = nn.ModuleList([layer, nn.Linear(1, 1)])
    seed_dropout(layers, seed)
    x = torch.ones(4, 3, 8, 8, requires_grad=True)
    out = layer(x)
    low, high = seed & 0x7FFFFFFF, seed >> 31 & 0x7FFFFFFF
    bits = [mix((mix(place ^ low) + mix(high + 5)) % 2**32) & 0x7FFFFFFF for place in range(x.numel())]
    assert (out.flatten() > 0).tolist() == [b >= int(0.3 * 2**31) for b in bits]
    assert torch.equal(out, (out > 0) / (1 - 0.3))
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    many = torch.ones(200_000)
    kept = {}
    for seed, number in ((1, 0), (2, 0), (1, 1)):
        layer.number = number
        seed_dropout(layers, seed)
        kept[seed, number] = layer(many) > 0
        assert abs(kept[seed, number].float().mean() - 0.7) < 0.004
    for other in ((2, 0), (1, 1)):
        assert abs((kept[1, 0] == kept[other]).float().mean() - 0.58) < 0.005
    assert torch.equal(layers.eval()[0](many), many)


def test_dropout_without_a_seed_is_torchs():
    net = UNet(shape=(1, 8, 8), base=8, multipliers=(1,), attention=(), estimate=(8,), dropout=0.5)
    drops = [m for m in net.modules() if isinstance(m, Dropout)]
    assert [m.number for m in drops] == [*range(len(drops))] and not any(
        k.endswith("seed") for k in net.state_dict()
    )
    x = torch.ones(100)
    assert not torch.equal(drops[0](x), drops[0](x))
    seed_dropout(net, 3)
    assert torch.equal(drops[0](x), drops[0](x)) and not torch.equal(drops[0](x), drops[1](x))
    twin = copy.deepcopy(net)
    seed_dropout(twin, 4)
    assert net.down[0].blocks[0].residual.dropout.seed == 3, "a copy has a seed of its own"
    seed_dropout(net, None)
    assert not torch.equal(drops[0](x), drops[0](x))


def test_a_forward_derivative_compiles():
    "A JVP through the whole network as one graph, and the gradient of it, against eager."
    net = awake(base=16, multipliers=(1,), attention=(), estimate=(16,))
    x, t, estimate, _ = inputs(net)
    direction = torch.ones_like(x)

    def derivative(x, direction):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.jvp(lambda x: net(x, t, estimate), (x,), (direction,))[1]

    def gradient(f):
        net.zero_grad()
        value = f(x, direction)
        value.square().sum().backward()
        return value.detach(), net.stem.weight.grad.clone()

    expected = gradient(derivative)
    torch.compiler.reset()
    found = gradient(torch.compile(derivative, backend="aot_eager", fullgraph=True, dynamic=False))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_in_another_number_format_are_refused_in_a_sentence(dtype):
    with pytest.raises(ValueError, match=rf"the weights are {dtype}.*model\.float\(\).*precision="):
        sample(Pretrained.from_pretrained("digits-paper").to(dtype), 2, 1)
