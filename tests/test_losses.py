"""What 04_losses does not show: weights on disk, the trunks against the lpips package, float64 formulas."""

import copy
import hashlib
import math
import random
import urllib.error
import warnings

import lpips
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from dddm import losses
from dddm.losses import RANDOM, PerceptualDistance, distance, pseudo_huber_c, trunk_file


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pair(shape=(3, 3, 40, 40), noise=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = F.interpolate(
        torch.rand(shape[0], shape[1], 5, 5, generator=g) * 2 - 1, size=shape[2:], mode="bilinear"
    )
    return (y + noise * torch.randn(shape, generator=g)).clamp(-1, 1), y


def value_and_gradient(d, x, y):
    x = x.clone().requires_grad_()
    v = d(x, y).flatten()
    v.sum().backward()
    return v.detach(), x.grad


def package(net, **options):
    "The lpips package's own module over the same random trunk."
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False, **options)


def squeezenet(seed=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torchvision.models.squeezenet1_1(weights=None)


class Maps(nn.Module):
    "Two smooth feature maps, with normalisation and dropout that must stay off."

    def __init__(self, channels=3):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.a, self.b = nn.Conv2d(channels, 6, 3), nn.Conv2d(6, 4, 3, stride=2)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g) / 3
        self.norm, self.drop = nn.BatchNorm2d(6), nn.Dropout(0.5)

    def forward(self, x):
        a = self.norm(torch.tanh(self.a(x)))
        return [a, torch.tanh(self.b(self.drop(a)))]


# ---------------------------------------------------------------- pixel distances


def exact(name, e, c, elementwise=False):
    "The formulas, in float64 NumPy, from the flattened differences e [B, D]."
    if name == "l1":
        return np.abs(e).sum(1)
    if name == "squared_l2":
        return (e**2).sum(1)
    if name == "l2":
        return np.sqrt((e**2).sum(1))
    if elementwise:
        return (np.sqrt(e**2 + c**2) - c).mean(1)
    return np.sqrt((e**2).sum(1) + c**2) - c


@pytest.mark.parametrize(
    "name, c, options",
    [
        ("l1", 0, {}),
        ("l2", 0, {}),
        ("squared_l2", 0, {}),
        ("pseudo_huber", 0, {}),
        ("pseudo_huber", 0.03, {}),
        ("pseudo_huber", 5.0, {}),
        ("pseudo_huber", 0.3, dict(elementwise=True)),
    ],
)
@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (3, 1, 8, 8), (3, 5)])
def test_pixel_distances_against_float64(name, c, options, shape):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    v = distance(name, c=c, **options)(x, y)
    assert v.dtype == torch.float32 and v.shape == (3,)
    np.testing.assert_allclose(
        v.numpy(), exact(name, (x - y).double().flatten(1).numpy(), c, **options), rtol=1e-6
    )


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 100.0])
def test_pseudo_huber_gradient_against_its_formula(scale):
    c, e = 0.03, scale * torch.randn(2, 48, generator=torch.Generator().manual_seed(2))
    _, g = value_and_gradient(distance("pseudo_huber", c=c), e, torch.zeros_like(e))
    e = e.double()
    torch.testing.assert_close(g.double(), e / ((e**2).sum(1, keepdim=True) + c**2).sqrt(), rtol=1e-5, atol=0)


def test_song_and_dhariwals_c():
    assert pseudo_huber_c((3, 32, 32)) == pytest.approx(0.00054 * math.sqrt(3072), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype):
    x, y = (v.to(dtype) for v in pair())
    for d in (distance("l2"), distance("pseudo_huber", c=0.03), PerceptualDistance(features=Maps())):
        assert d(x, y).dtype == torch.float32
        torch.testing.assert_close(d(x, y), d(x.float(), y.float()), rtol=0, atol=0)


def test_an_infinity_or_a_nan_comes_out():
    x, y = pair()
    pixel = [
        distance("l2"),
        distance("pseudo_huber", c=0.03),
        distance("pseudo_huber", c=0.03, elementwise=True),
    ]
    trunk = [
        distance("pseudo_lpips", c=c, square=s, net="squeeze", weights=RANDOM)
        for c in (0.0, 0.01)
        for s in (True, False)
    ]
    for bad, ds in (
        (math.inf, pixel + trunk),
        (math.nan, [*pixel, *trunk, PerceptualDistance(features=Maps())]),
    ):
        x[1, 0, 3, 3] = bad
        for d in ds:
            v = d(x, y)
            assert not v[1].isfinite() and v[[0, 2]].isfinite().all()


# ---------------------------------------------------------------- LPIPS against the package


@pytest.mark.parametrize("net", ["squeeze", "alex", "vgg"])
def test_lpips_equals_the_package(net):
    x, y = pair()
    ours, theirs = PerceptualDistance(net=net, weights=RANDOM), package(net)
    for a, b in ((x, y), (y, y), (x, -y)):
        (v, g), (v_ref, g_ref) = value_and_gradient(ours, a, b), value_and_gradient(theirs, a, b)
        torch.testing.assert_close(v, v_ref, rtol=0, atol=1e-6)
        torch.testing.assert_close(g, g_ref, rtol=0, atol=1e-6 * max(1e-3, g_ref.abs().max().item()) + 1e-9)
        assert (v >= 0).all()


def test_heads_are_the_shipped_ones():
    shipped = torch.load(
        f"{lpips.__path__[0]}/weights/v0.1/squeeze.pth", map_location="cpu", weights_only=True
    )
    heads = PerceptualDistance(net="squeeze", weights=RANDOM).heads
    for head, w in zip(heads, shipped.values(), strict=True):
        assert torch.equal(head.weight, w)


def test_features_equal_the_packages_unweighted_baseline():
    x, y = pair()
    theirs = package("squeeze", lpips=False)
    ours = PerceptualDistance(features=nn.Sequential(theirs.scaling_layer, theirs.net))
    torch.testing.assert_close(ours(x, y), theirs(x, y).flatten(), rtol=1e-5, atol=1e-6)


def test_resize_and_grey():
    x, y = pair()
    native, resized = (
        PerceptualDistance(net="squeeze", weights=RANDOM),
        PerceptualDistance(net="squeeze", resize=56, weights=RANDOM),
    )
    up = [F.interpolate(v, size=(56, 56), mode="bilinear", align_corners=False) for v in (x, y)]
    assert torch.equal(resized(x, y), native(*up))
    x1, y1 = x[:, :1], y[:, :1]
    assert torch.equal(native(x1, y1), native(x1.repeat(1, 3, 1, 1), y1.repeat(1, 3, 1, 1)))
    small = PerceptualDistance(net="squeeze", resize=32, weights=RANDOM)
    assert small(x1[..., :8, :8], y1[..., :8, :8]).shape == (3,)
    grey = PerceptualDistance(
        features=Maps(channels=1)
    )  # the caller's module gets the channels that there are
    assert grey(x1, y1).shape == (3,)


@pytest.mark.parametrize("net, least", [("squeeze", 17), ("alex", 31), ("vgg", 16)])
def test_smallest_size(net, least):
    d = PerceptualDistance(net=net, weights=RANDOM)
    x, y = pair((1, 3, least, least))
    assert d(x, y).isfinite().all()
    with pytest.raises(ValueError, match=f"needs {least} pixels a side; pass resize=224"):
        d(x[..., 1:, :], y[..., 1:, :])


@pytest.mark.parametrize("square", [True, False])
def test_pseudo_lpips_is_the_formula_of_lpips(square):
    x, y = pair()
    options = dict(net="squeeze", weights=RANDOM)
    score, c = distance("lpips", **options)(x, y).double(), 0.01
    expected = (score**2 + c**2).sqrt() - c if square else (score + c**2).sqrt() - c
    torch.testing.assert_close(
        distance("pseudo_lpips", c=c, square=square, **options)(x, y).double(), expected, rtol=1e-5, atol=0
    )
    zero = distance("pseudo_lpips", square=square, **options)(x, y).double()
    torch.testing.assert_close(zero, score if square else score.sqrt(), rtol=1e-6, atol=0)


def test_samples_do_not_mix():
    x, y = pair()
    for d in (
        distance("l2"),
        distance("pseudo_lpips", c=0.01, net="squeeze", weights=RANDOM),
        PerceptualDistance(features=Maps()),
    ):
        torch.testing.assert_close(
            d(x, y), torch.cat([d(x[i : i + 1], y[i : i + 1]) for i in range(3)]), rtol=1e-5, atol=1e-7
        )
        assert d(x[:0], y[:0]).shape == (0,)


@pytest.mark.parametrize("net", ["squeeze", "alex"])
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("c", [0.0, 1e-30, 1e-19, 1e-4, 0.1])
def test_gradients_are_finite_on_the_way_to_zero(net, square, c):
    d = distance("pseudo_lpips", c=c, square=square, net=net, weights=RANDOM)
    for y in (torch.full((1, 3, 40, 40), -1.0), pair((1, 3, 40, 40))[1]):  # a black image too
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        for s in (0.1, 1e-4, 1e-7, 1e-20, 0.0):
            v, g = value_and_gradient(d, y + s * noise, y)
            assert v.isfinite().all() and g.isfinite().all()
        assert v.item() == 0 and not g.any()


# ---------------------------------------------------------------- an instrument


def test_frozen_whatever_the_caller_does():
    x, y = pair()
    maps = Maps()
    before = copy.deepcopy(maps.state_dict())
    d = PerceptualDistance(features=maps)
    v = d(x, y)
    outer = nn.ModuleDict({"d": d, "other": nn.Linear(2, 2)})
    outer.train()
    assert not d.training and not any(m.training for m in d.modules())
    assert torch.equal(d(x, y), v) and torch.equal(d(x, y), v)
    assert (
        list(d.parameters()) == []
        and d.state_dict() == {}
        and sum(p.numel() for p in outer.parameters()) == 6
    )
    assert all(
        torch.equal(before[k], b) for k, b in maps.state_dict().items()
    )  # the caller's module is not touched
    assert (
        len(list(maps.parameters())) == 6
        and all(p.requires_grad for p in maps.parameters())
        and maps.training
    )
    with torch.no_grad():
        maps.a.weight.zero_()
    assert torch.equal(d(x, y), v)


def test_to_moves_everything():
    d = distance("lpips", net="squeeze", weights=RANDOM).to("meta")
    assert {b.device.type for b in d.buffers()} == {"meta"}
    assert distance("l2").to("meta") is not None


def test_float32_inside_autocast_and_no_gradient_to_the_target():
    x, y = pair()
    for d in (
        distance("l1"),
        distance("pseudo_huber", c=0.03),
        distance("lpips", net="squeeze", weights=RANDOM),
    ):
        v, g = value_and_gradient(d, x, y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            v_in, g_in = value_and_gradient(d, x, y)
        assert v_in.dtype == torch.float32 and torch.equal(v, v_in) and torch.equal(g, g_in)
        target = y.clone().requires_grad_()
        d(x.clone().requires_grad_(), target).sum().backward()
        assert target.grad is None


def test_building_leaves_the_random_states_alone():
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    a, b = (distance("lpips", net="squeeze", weights=RANDOM) for _ in range(2))
    assert states() == before
    assert all(torch.equal(p, q) for p, q in zip(a.buffers(), b.buffers(), strict=True))


# ---------------------------------------------------------------- weights on disk


def no_network(*args, **kwargs):
    raise urllib.error.URLError("no network in this test")


def test_weights_from_a_file(tmp_path):
    x, y = pair()
    model, path = squeezenet(), tmp_path / "mine.pth"
    torch.save(model.state_dict(), path)
    theirs = package("squeeze")
    for k in theirs.net.state_dict():
        theirs.net.state_dict()[k].copy_(model.state_dict()["features." + k.split(".", 1)[1]])
    for weights in (path, str(path)):
        torch.testing.assert_close(
            distance("lpips", net="squeeze", weights=weights)(x, y),
            theirs(x, y).flatten().detach(),
            rtol=0,
            atol=1e-6,
        )
    assert (
        distance("lpips", net="squeeze", weights=RANDOM)(x, y) - theirs(x, y).flatten()
    ).abs().min() > 1e-5


def test_weights_in_torchs_own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(squeezenet().state_dict(), folder / "new.pth")
    digest = hashlib.sha256((folder / "new.pth").read_bytes()).hexdigest()[:8]
    path = (folder / "new.pth").rename(folder / f"squeezenet1_1-{digest}.pth")
    monkeypatch.setitem(losses.TRUNKS, "squeeze", losses.TrunkFile(path.name, 17))
    x, y = pair()
    assert torch.equal(
        distance("lpips", net="squeeze")(x, y), distance("lpips", net="squeeze", weights=path)(x, y)
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # one flipped bit
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged: its SHA-256"):
        distance("lpips", net="squeeze")


@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
@pytest.mark.parametrize("name", ["lpips", "pseudo_lpips"])
def test_missing_weights_stop_before_any_work(tmp_path, monkeypatch, net, name):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(lpips, "LPIPS", lambda *a, **k: pytest.fail("a network was built"))
    with pytest.raises(FileNotFoundError) as err:
        distance(name, net=net)
    for part in (
        losses.TRUNKS[net].name,
        str(tmp_path),
        "https://download.pytorch.org/models/",
        "option weights",
        "no network in this test",
    ):
        assert part in str(err.value)
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        distance(name, net=net, weights=tmp_path / "nowhere.pth")


def test_a_download_goes_where_torchvision_looks(tmp_path, monkeypatch):
    asked = []

    def download(url, dst, *args, **kwargs):
        asked.append(url)
        open(dst, "wb").write(b"weights")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    name = f"squeezenet1_1-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    monkeypatch.setitem(losses.TRUNKS, "squeeze", losses.TrunkFile(name, 17))
    assert trunk_file("squeeze") == trunk_file("squeeze") == tmp_path / "hub" / "checkpoints" / name
    assert asked == [f"https://download.pytorch.org/models/{name}"]


def test_torchvision_names_match_ours():
    from torchvision.models import AlexNet_Weights, SqueezeNet1_1_Weights, VGG16_Weights

    for net, w in (("vgg", VGG16_Weights), ("alex", AlexNet_Weights), ("squeeze", SqueezeNet1_1_Weights)):
        assert w.IMAGENET1K_V1.url == f"https://download.pytorch.org/models/{losses.TRUNKS[net].name}"


def damaged_files(folder):
    good = folder / "good.pth"
    torch.save(squeezenet().state_dict(), good)
    cut = folder / "cut.pth"
    cut.write_bytes(good.read_bytes()[:200_000])
    empty = folder / "empty.pth"
    empty.write_bytes(b"")
    text = folder / "page.pth"
    text.write_text("<html>404</html>")
    other = folder / "other.pth"
    torch.save(nn.Linear(2, 2).state_dict(), other)
    shape = folder / "shape.pth"
    torch.save({k: v[:1] for k, v in squeezenet().state_dict().items()}, shape)
    tensor = folder / "tensor.pth"
    torch.save(torch.zeros(3), tensor)
    return {
        cut: "cannot be read",
        empty: "cannot be read",
        text: "cannot be read",
        other: "does not fit",
        shape: "does not fit",
        tensor: "does not fit",
    }


def test_damaged_weights_are_named(tmp_path):
    for path, message in damaged_files(tmp_path).items():
        with pytest.raises(ValueError, match=message) as err:
            distance("lpips", net="squeeze", weights=path)
        assert str(path) in str(err.value)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: distance("lpip"), "did you mean 'lpips'"),
        (lambda: distance(None), "distance None is unknown"),
        (lambda: distance("pseudo_huber", c=-1), "c=-1: expected a finite number >= 0"),
        (lambda: distance("pseudo_huber", c=math.inf), "expected a finite number"),
        (lambda: distance("pseudo_huber", c="1e-3"), "expected a finite number"),
        (lambda: distance("pseudo_huber", c=None), "expected a finite number"),
        (lambda: distance("pseudo_huber", c=True), "expected a finite number"),
        (lambda: distance("lpips", c=0.1, features=Maps()), "lpips has no c"),
        (lambda: distance("pseudo_lpips", sqare=False), "did you mean 'square'"),
        (lambda: distance("pseudo_huber", net="vgg"), "option of pseudo_huber 'net' is unknown"),
        (lambda: distance("lpips", finish=abs), "'finish' is unknown"),
        (
            lambda: distance("lpips", net="vgg16"),
            "net='vgg16' is unknown; expected one of vgg, alex, squeeze",
        ),
        (lambda: distance("lpips", features=Maps(), weights="x.pth"), "give one of the two"),
        (lambda: distance("lpips", features=lambda x: [x]), "must be a torch.nn.Module, not function"),
        *(
            (lambda r=r: distance("lpips", features=Maps(), resize=r), "expected None or a whole number")
            for r in (0, -1, 32.5, "224", True)
        ),
        (lambda: distance("lpips", features=nn.Conv2d(3, 4, 3))(*pair()), "non-empty list or tuple of maps"),
        (lambda: distance("lpips", features=Maps())(*pair()[:1], pair()[1][:2]), "expected that of x"),
        (lambda: distance("l1")(torch.zeros(3), torch.zeros(3)), r"expected \[B, …\]"),
        (
            lambda: distance("l1")(torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.long)),
            "y has dtype torch.int64",
        ),
        (
            lambda: distance("lpips", net="squeeze", weights=RANDOM)(
                torch.zeros(1, 4, 32, 32), torch.zeros(1, 4, 32, 32)
            ),
            "1 or 3 channels",
        ),
        (
            lambda: distance("lpips", net="squeeze", weights=RANDOM)(
                torch.zeros(1, 3, 32), torch.zeros(1, 3, 32)
            ),
            r"expected \[B, C, H, W\]",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_numpy_numbers_are_numbers():
    x, y = pair()
    assert torch.equal(
        distance("pseudo_huber", c=np.float32(0.5))(x, y), distance("pseudo_huber", c=0.5)(x, y)
    )
