"What 04b_features and classifiers do not show: damage, other processes, networks by hand, the job itself."

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from synthetic_sets import make_mnist
from torch import nn

from dddm import data, losses
from dddm.classifiers import RECIPES, LabelledImages, classifier_images, confusion, fit
from dddm.data import Images
from dddm.features import FEATURES, FeatureNet, network, read_weights, trunk

NAMES = list(FEATURES)
WEIGHTS = files("dddm") / "weights"


def some(name, n=4, seed=0):
    return torch.rand(n, *FEATURES[name]["shape"], generator=torch.Generator().manual_seed(seed)) * 2 - 1


def held_out():
    bunch = load_digits()
    index = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[:297]
    return torch.tensor(bunch.images).float()[index, None] / 8 - 1, torch.tensor(bunch.target)[index]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_files_are_the_pinned_ones(name):
    blob = (WEIGHTS / FEATURES[name]["file"]).read_bytes()
    assert hashlib.sha256(blob).hexdigest() == FEATURES[name]["sha256"]
    assert all(
        v.dtype == torch.float16 and v.isfinite().all()
        for v in load_file(WEIGHTS / FEATURES[name]["file"]).values()
        if v.is_floating_point()
    )


def test_the_files_together_are_small():
    assert sum((WEIGHTS / spec["file"]).stat().st_size for spec in FEATURES.values()) < 3e6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["bit", "cut", "longer", "empty", "exchanged"])
def test_a_damaged_file_is_refused(name, damage, tmp_path):
    spec, path = FEATURES[name], tmp_path / FEATURES[name]["file"]
    blob = bytearray((WEIGHTS / spec["file"]).read_bytes())
    if damage == "bit":
        blob[len(blob) // 2] ^= 1
    if damage == "exchanged":
        blob = (WEIGHTS / FEATURES[NAMES[NAMES.index(name) - 1]]["file"]).read_bytes()
    path.write_bytes({"cut": blob[:-1], "longer": blob + b"\0", "empty": b""}.get(damage, blob))
    with pytest.raises(ValueError, match=spec["file"]):
        read_weights(name, tmp_path)


def test_a_missing_file_and_bad_names_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="features-digits.safetensors is missing.*install dddm again"):
        read_weights("digits", tmp_path)
    for build in network, trunk, read_weights:
        with pytest.raises(ValueError, match="digits, cifar, mnist"):
            build("inception")
    for seed in (-1, 1.5, True, "0"):
        with pytest.raises(ValueError, match="random="):
            network("digits", random=seed)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_relations_of_the_three_outputs(name):
    spec, net, x = FEATURES[name], network(name), some(name)
    maps, f, logits = net.maps(x), net.features(x), net(x)
    side = spec["shape"][1] // spec["stride"]
    widths = (spec["widths"][0], *spec["widths"])
    assert [tuple(m.shape) for m in maps] == [
        (4, w, side >> max(i - 1, 0), side >> max(i - 1, 0)) for i, w in enumerate(widths)
    ]
    assert (
        f.shape == (4, spec["dimension"])
        and logits.shape == (4, spec["classes"])
        and len(spec["class_names"]) == spec["classes"]
    )
    assert (
        torch.equal(f, maps[-1].mean((2, 3)))
        and torch.equal(logits, net.head(f))
        and all((m >= 0).all() for m in maps)
    )
    assert all(torch.equal(a, b) for a, b in zip(trunk(name)(x), maps))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("random", [None, 5])
def test_frozen_whatever_is_done_to_it(name, random):
    net, x = network(name, random), some(name)
    before, state = net(x), {k: v.clone() for k, v in net.state_dict().items()}
    holder = nn.ModuleList([net]).train()
    assert not any(m.training for m in net.modules()) and not any(
        p.requires_grad for p in holder.parameters()
    )
    assert torch.equal(net(3 * x + 1).isfinite().all(), torch.tensor(True)) and torch.equal(net(x), before)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_batch(name):
    net, x = network(name), some(name, 7)
    torch.testing.assert_close(net(x), torch.cat([net(v[None]) for v in x]), rtol=1e-4, atol=1e-4)


def test_a_network_in_training_trains():
    "The override of train() is for frozen ones only: batch normalisation of a fresh network moves."
    net = FeatureNet((1, 8, 8), (4, 8)).train()
    assert net.training and net.stem[1].training
    net(torch.randn(8, 1, 8, 8)).sum().backward()
    assert net.stem[1].running_mean.abs().sum() > 0 and all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_random_weights_come_from_the_seed_alone(name):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    a = network(name, random=3)
    network(name)
    assert torch.equal(torch.rand(3), expected)  # the global generator is as it was
    b, c, x = network(name, random=3), network(name, random=4), some(name)
    assert torch.equal(a.features(x), b.features(x)) and not torch.equal(a.features(x), c.features(x))
    assert {k: v.shape for k, v in a.state_dict().items()} == {
        k: v.shape for k, v in network(name).state_dict().items()
    }


def test_another_process_computes_the_same():
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from dddm.features import network\n"
        "x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)\n"
        "print(network('digits')(x).double().tolist(), network('digits', random=2)(x).double().tolist())"
    )
    found = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(found) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_network_written_out_by_hand(name):
    "Straight from the file's tensors, with torch.nn.functional and batch norm as arithmetic, in float64."
    spec = FEATURES[name]
    w = {k: v.double() for k, v in load_file(WEIGHTS / spec["file"]).items()}
    x = some(name).double()

    def norm(h, at):
        scale = w[at + ".weight"] / (w[at + ".running_var"] + 1e-5).sqrt()
        return h * scale.view(1, -1, 1, 1) + (w[at + ".bias"] - w[at + ".running_mean"] * scale).view(
            1, -1, 1, 1
        )

    h = norm(F.conv2d(x, w["stem.0.weight"], stride=spec["stride"], padding=1), "stem.1").relu()
    for i in range(len(spec["widths"])):
        stride, at = 1 if i == 0 else 2, f"stages.{i}."
        a = norm(F.conv2d(h, w[at + "conv1.weight"], stride=stride, padding=1), at + "norm1").relu()
        a = norm(F.conv2d(a, w[at + "conv2.weight"], padding=1), at + "norm2")
        h = (a + (h if i == 0 else F.conv2d(F.avg_pool2d(h, 2), w[at + "shortcut.1.weight"]))).relu()
    logits = h.mean((2, 3)) @ w["head.weight"].T + w["head.bias"]
    torch.testing.assert_close(network(name)(x.float()).double(), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_images_that_do_not_fit_are_refused(name):
    net, (c, h, w) = network(name), FEATURES[name]["shape"]
    for x in (
        torch.zeros(2, 4 - c, h, w),
        torch.zeros(c, h, w),
        torch.zeros(2, c, h, w, dtype=torch.uint8),
        torch.zeros(2, c, 4, 4),
    ):
        with pytest.raises(ValueError):
            net.maps(x)
    with pytest.raises(ValueError, match="resize"):
        net.features(torch.zeros(2, c, 2 * h, 2 * w))
    assert len(net.maps(torch.zeros(2, c, 2 * h, 2 * w))) == len(FEATURES[name]["widths"]) + 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["lpips", "pseudo_lpips"])
def test_as_the_trunk_of_a_distance(name, kind):
    d, y = (
        losses.distance(kind, features=trunk(name), **({"c": 0.1} if kind == "pseudo_lpips" else {})),
        some(name),
    )
    x = (y + 0.2 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    v = d(x, y)
    v.sum().backward()
    assert (
        v.shape == (4,)
        and (v > 0).all()
        and (v < 8).all()
        and x.grad.isfinite().all()
        and (x.grad.flatten(1).norm(dim=1) > 0).all()
    )
    assert (
        torch.equal(d(y, y), torch.zeros(4))
        and not list(d.parameters())
        and not d.state_dict()
        and not d.train().training
    )
    with torch.no_grad():
        lpips = sum(
            (losses.unit_channels(a) - losses.unit_channels(b)).square().sum(1).mean((1, 2))
            for a, b in zip(network(name).maps(x), network(name).maps(y))
        )
    torch.testing.assert_close(
        v.detach(), lpips if kind == "lpips" else (lpips**2 + 0.01).sqrt() - 0.1, rtol=1e-4, atol=1e-5
    )


def test_digits_is_a_good_judge():
    x, y = held_out()
    p = network("digits")(x).softmax(1)
    accuracy = (p.argmax(1) == y).float().mean().item()
    assert accuracy == pytest.approx(FEATURES["digits"]["accuracy"], abs=1e-4) and accuracy >= 0.98
    assert (p.amax(1) >= 0.9).float().mean() >= 0.93
    g = torch.Generator().manual_seed(3)
    no_digits = {
        "uniform": torch.rand(2000, 1, 8, 8, generator=g) * 2 - 1,
        "normal": torch.randn(2000, 1, 8, 8, generator=g).clamp(-1, 1),
        "means of ten": x[torch.randint(297, (2000, 10), generator=g)].mean(1),
        "grey": torch.linspace(-1, 1, 21).view(-1, 1, 1, 1).expand(-1, 1, 8, 8),
    }
    for kind, z in no_digits.items():
        assert (network("digits")(z).softmax(1).amax(1) >= 0.9).float().mean() <= 0.01, kind


@pytest.mark.slow
def test_cifar_accuracy_on_a_part_of_the_copy(cifar10_copy, tmp_path):
    images = data.load("cifar10", path=cifar10_copy / "cifar10-jpeg-test.zip", cache=tmp_path)
    x, y = images.get(torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:1000])
    assert images.class_names == list(FEATURES["cifar"]["class_names"])
    assert (network("cifar")(x).argmax(1) == y).float().mean() >= 0.83


def test_mnist_is_a_good_judge(mnist_root, tmp_path):
    path = next(mnist_root.glob("MNIST/raw/t10k-images-idx3-ubyte*"))
    images = data.load("mnist", path, cache=tmp_path)
    x, y = images.get(torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:2000])
    p = network("mnist")(x).softmax(1)
    assert images.class_names == list(FEATURES["mnist"]["class_names"])
    assert (p.argmax(1) == y).float().mean() >= 0.985
    assert (p.amax(1) >= 0.9).float().mean() >= 0.9
    g = torch.Generator().manual_seed(3)
    no_digits = {
        "uniform": torch.rand(500, 1, 28, 28, generator=g) * 2 - 1,
        "normal": torch.randn(500, 1, 28, 28, generator=g).clamp(-1, 1),
        "means of ten": x[torch.randint(2000, (500, 10), generator=g)].mean(1),
        "grey": torch.linspace(-1, 1, 21).view(-1, 1, 1, 1).expand(-1, 1, 28, 28),
    }
    for kind, z in no_digits.items():
        assert (network("mnist")(z).softmax(1).amax(1) >= 0.9).float().mean() <= 0.01, kind


def job(root, out, parameters):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            root / "nbs" / "classifiers.ipynb",
            out / "out.ipynb",
            "-y",
            "{" + parameters + "}",
            "--no-progress-bar",
        ],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "DDDM_CACHE": str(out / "cache")},
    )


@pytest.mark.slow
def test_the_job_trains_keeps_and_resumes(root, tmp_path):
    done = job(root, tmp_path, f"networks: [digits], epochs: 2, limit: 300, out: {tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "classifiers.json").read_text())["digits"]
    path = tmp_path / "run" / FEATURES["digits"]["file"]
    assert (
        record["images"] == 300 and len(record["history"]) == 2 and sum(map(sum, record["confusion"])) == 297
    )
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and {
        k: v.shape for k, v in load_file(path).items()
    } == {k: v.shape for k, v in network("digits").state_dict().items()}
    again = job(root, tmp_path, f"networks: [digits], epochs: 2, limit: 300, out: {tmp_path / 'run'}")
    assert (
        again.returncode == 0
        and json.loads((tmp_path / "run" / "classifiers.json").read_text())["digits"]["sha256"]
        == record["sha256"]
    )
    other = job(root, tmp_path, f"networks: [digits], epochs: 3, limit: 300, out: {tmp_path / 'run'}")
    assert other.returncode == 1 and "is of another recipe" in other.stderr


@pytest.mark.slow
def test_the_job_trains_cifar_on_images_in_class_folders(root, tmp_path):
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, n in ("train", 30), ("test", 2):
        for name in FEATURES["cifar"]["class_names"]:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                    tmp_path / split / name / f"{i}.png"
                )
    done = job(
        root,
        tmp_path,
        f"networks: [cifar], epochs: 1, cifar_train: {tmp_path / 'train'}, "
        f"cifar_test: {tmp_path / 'test'}, out: {tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "classifiers.json").read_text())["cifar"]
    assert record["images"] == 300 and record["test_images"] == 20 and record["parameters"] == 973386


@pytest.mark.slow
def test_the_job_trains_mnist_on_idx_files(root, tmp_path):
    make_mnist(tmp_path, count=300)
    test = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    given = f"mnist_train: {tmp_path}, mnist_test: {test}"
    done = job(root, tmp_path, f"networks: [mnist], epochs: 1, {given}, out: {tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "classifiers.json").read_text())["mnist"]
    assert record["images"] == 300 and record["test_images"] == 150 and record["parameters"] == 77386


@pytest.mark.slow
@pytest.mark.parametrize(
    "parameters, message",
    [
        ("network: digits", "unknown parameter network; the parameters are networks"),
        ("networks: [lenet]", "must be a list of digits, cifar, mnist"),
        ("networks: [mnist]", "mnist_train and mnist_test must be the paths"),
        ("networks: digits", "must be a list of digits, cifar, mnist"),
        ("networks: [cifar]", "cifar_train and cifar_test must be the paths"),
        ("networks: [cifar], cifar_train: nowhere.zip, cifar_test: nowhere.zip", "nowhere.zip"),
        ("epochs: 0", "epochs=0: must be an integer >= 1"),
        ("seed: a", "seed='a': must be an integer"),
    ],
)
def test_the_job_refuses_before_any_work(root, tmp_path, parameters, message):
    done = job(root, tmp_path, f"{parameters}, out: {tmp_path / 'run'}")
    assert done.returncode == 1 and message in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", NAMES)
def test_images_of_any_size_from_8_pixels(name):
    net = network(name)
    for h, w in ((8, 11), (13, 28), (36, 69)):
        maps = net.maps(torch.zeros(1, net.shape[0], h, w))
        assert all(m.isfinite().all() for m in maps) and len(maps) == len(FEATURES[name]["widths"]) + 1


def test_a_classifier_of_ones_own(tmp_path):
    "Another number of classes; too few images, and a name that does not exist, are told."
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=g)
    images = Images(pixels, torch.arange(40) % 5, "five", "x", classes=5)
    data, recipe = LabelledImages(images, torch.arange(40)), replace(RECIPES["digits"], batch=20)
    net = FeatureNet((1, 8, 8), (8,), classes=5)
    (record,) = next(fit(net, recipe, data, data, 0, tmp_path / "a.pt"))
    assert 0 < record["loss"] < 5 and torch.tensor(confusion(net, data)).sum(1).tolist() == [8] * 5
    with pytest.raises(ValueError, match="batch=20 is larger than the 10 training images"):
        next(fit(net, recipe, data.few(10, 0), data, 0, tmp_path / "b.pt"))
    with pytest.raises(ValueError, match="name='cifar10' is no feature network"):
        classifier_images("cifar10")
