"Official formats made synthetically, their damage, and arrays of samples."

import gzip
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_sets import idx, make_cifar, make_folder, make_imagenet, make_mnist
from torchvision.datasets import FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file

from dddm.data import FASHION, load
from dddm.sources import CIFAR10, read_idx

pytestmark = pytest.mark.usefixtures("pixel_cache")


def test_cifar_folder_archive_and_torchvision_agree(tmp_path, monkeypatch):
    rows, marks = make_cifar(tmp_path / "root")
    images = load("cifar10", tmp_path / "root")
    assert images.shape == (3, 32, 32) and images.classes == 10 and images.class_names == CIFAR10
    assert images.labels.tolist() == marks and np.array_equal(images.pixels.numpy().reshape(-1, 3072), rows)
    assert load("cifar10", tmp_path / "root" / "cifar-10-batches-py").fingerprint == images.fingerprint
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "root" / "cifar-10-batches-py", "cifar-10-batches-py")
    assert load("cifar10", tmp_path / "c.tar.gz").fingerprint == images.fingerprint
    from torchvision import datasets

    monkeypatch.setattr(
        datasets.cifar, "check_integrity", lambda *a: True
    )  # its md5 are those of the real files
    theirs = datasets.CIFAR10(tmp_path / "root", train=True)
    assert theirs.targets == marks and theirs.classes == CIFAR10
    for i in range(len(images)):
        assert np.array_equal(np.asarray(theirs[i][0]).transpose(2, 0, 1), images.pixels[i])


def test_cifar_damage_is_named(tmp_path):
    make_cifar(tmp_path / "a")
    base = tmp_path / "a" / "cifar-10-batches-py"
    whole = (base / "data_batch_3").read_bytes()
    (base / "data_batch_3").write_bytes(whole[:5000])
    with pytest.raises(ValueError, match="data_batch_3 is damaged"):
        load("cifar10", tmp_path / "a")
    (base / "data_batch_3").write_bytes(
        b"cposix\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    )
    with pytest.raises(ValueError, match="posix.system is no array"):
        load("cifar10", tmp_path / "a")
    assert not (tmp_path / "ran").exists()
    (base / "data_batch_3").unlink()
    with pytest.raises(ValueError, match="data_batch_3 missing"):
        load("cifar10", tmp_path / "a")
    make_cifar(tmp_path / "b", labels=lambda i: i % 11)
    with pytest.raises(ValueError, match="image 2 has label 10, out of range 0..9"):
        load("cifar10", tmp_path / "b")
    with pytest.raises(ValueError, match="drop these options"):
        load("cifar10", tmp_path / "b", size=16)
    (tmp_path / "cut.tar.gz").write_bytes(b"\x1f\x8b\x08\x00" + bytes(20))
    with pytest.raises(ValueError, match="cut.tar.gz is not a readable tar"):
        load("cifar10", tmp_path / "cut.tar.gz")


def test_mnist_in_all_its_forms(tmp_path):
    pixels, marks = make_mnist(tmp_path / "packed")
    images = load("mnist", tmp_path / "packed")
    assert images.shape == (1, 28, 28) and images.classes == 10 and images.class_names == list("0123456789")
    assert np.array_equal(images.pixels[:, 0], pixels) and images.labels.tolist() == marks
    for place in ("MNIST", "MNIST/raw", "MNIST/raw/train-images-idx3-ubyte.gz"):
        assert load("mnist", tmp_path / "packed" / place).fingerprint == images.fingerprint
    make_mnist(tmp_path / "plain", packed=False)
    assert load("mnist", tmp_path / "plain").fingerprint == images.fingerprint
    (tmp_path / "plain/MNIST/raw/train-labels-idx1-ubyte").unlink()
    packed = tmp_path / "packed/MNIST/raw/train-labels-idx1-ubyte.gz"
    (tmp_path / "plain/MNIST/raw" / packed.name).write_bytes(packed.read_bytes())
    assert load("mnist", tmp_path / "plain").fingerprint == images.fingerprint
    unnamed = load(tmp_path / "packed/MNIST/raw")
    assert np.array_equal(unnamed.pixels, images.pixels) and unnamed.labels.tolist() == marks


def test_the_test_images_of_mnist(tmp_path):
    make_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    images = load("mnist", raw / "t10k-images-idx3-ubyte.gz")
    assert np.array_equal(images.pixels[:, 0], read_idx(raw / "t10k-images-idx3-ubyte.gz", 3))
    assert images.labels.tolist() == list(range(10)) and images.class_names == list("0123456789")
    (raw / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="train-images-idx3-ubyte missing.*path of another images file"):
        load("mnist", tmp_path)


def test_fashion_mnist_and_mnist_are_told_apart(tmp_path):
    make_mnist(tmp_path / "both")
    pixels, _ = make_mnist(tmp_path / "both", "FashionMNIST", 30)
    make_mnist(tmp_path / "one", "FashionMNIST")
    images = load("fashion-mnist", tmp_path / "both")
    assert np.array_equal(images.pixels[:, 0], pixels) and len(load("mnist", tmp_path / "both")) == 20
    assert images.class_names == FASHION == [name.lower() for name in FashionMNIST.classes]
    raw = "one/FashionMNIST/raw"
    for place in ("one", "one/FashionMNIST", raw, f"{raw}/t10k-images-idx3-ubyte.gz"):
        with pytest.raises(ValueError, match="data='mnist'.*give data='fashion-mnist'"):
            load("mnist", tmp_path / place)


CUT = "download it again"


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("images-idx3", lambda b: b"", f"images-idx3-ubyte.gz is empty.*{CUT}"),
        ("images-idx3", lambda b: b[:10], f"images-idx3-ubyte.gz ends within its header; {CUT}"),
        ("images-idx3", lambda b: b[:-1], f"images-idx3-ubyte.gz has 15,679 bytes.*ask for 15,680; {CUT}"),
        ("images-idx3", lambda b: b + b"x", f"has more than 15,680 bytes after its header.*{CUT}"),
        ("images-idx3", lambda b: b[:2] + b"\x09" + b[3:], f"starts with 00 00 09 03, .*00 00 08 03: {CUT}"),
        ("images-idx3", lambda b: b[:3] + b"\x01" + b[4:], "it holds labels; were two files exchanged"),
        ("labels-idx1", lambda b: b[:3] + b"\x03" + b[4:], "it holds images; were two files exchanged"),
        (
            "images-idx3",
            lambda b: b[:4] + b"\xff" * 4 + b[8:],
            f"images and .*20 labels.*{CUT}|download both",
        ),
        ("images-idx3", lambda b: b[:4] + bytes(4) + b[8:], r"has no images: its sizes are \[0, 28, 28\]"),
        ("labels-idx1", lambda b: b[:-1], "labels-idx1-ubyte.gz has 19 bytes after its header"),
        (
            "labels-idx1",
            lambda b: idx(np.zeros(19, np.uint8)),
            "has 20 images and .*19 labels; download both",
        ),
        ("labels-idx1", lambda b: b[:-1] + b"\x0a", "image 19 has label 10, out of range 0..9"),
        ("images-idx3", lambda b: idx(np.zeros((20, 32, 32), np.uint8)), "is 32x32 where 28x28 is expected"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_damage_of_mnist_is_named(tmp_path, name, change, said, packed):
    make_mnist(tmp_path, packed=False)
    whole = tmp_path / "MNIST" / "raw" / f"train-{name}-ubyte"
    content = change(whole.read_bytes())
    whole.unlink()
    (whole.parent / f"{whole.name}.gz").write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=said):
        load("mnist", tmp_path)


def test_damage_within_gzip_is_named(tmp_path):
    make_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    whole = bytearray(file.read_bytes())
    for damaged in (whole[:-4], whole[: len(whole) // 2], whole[:-6] + b"xx" + whole[-4:], whole[:5]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz is damaged.*download it again"):
            load("mnist", tmp_path)


def test_a_header_that_promises_too_much_takes_no_memory(tmp_path):
    for pack in (bytes, gzip.compress):
        (tmp_path / "a").write_bytes(pack(b"\0\0\x08\x03" + b"\xff" * 12 + b"few"))
        with pytest.raises(ValueError, match="has 3 bytes after its header"):
            read_idx(tmp_path / "a", 3)


def test_exchanged_files(tmp_path):
    make_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    a, b = raw / "train-images-idx3-ubyte.gz", raw / "train-labels-idx1-ubyte.gz"
    content = a.read_bytes(), b.read_bytes()
    a.write_bytes(content[1])
    b.write_bytes(content[0])
    with pytest.raises(ValueError, match="images-idx3-ubyte.gz starts with.*exchanged"):
        load("mnist", tmp_path)


def test_the_official_files_of_mnist(mnist_root, tmp_path):
    "Against torchvision's reader, which reads unpacked files."
    raw = mnist_root / "MNIST" / "raw"
    for name, path, n in ("train", mnist_root, 60_000), ("t10k", None, 10_000):
        for kind in ("images-idx3", "labels-idx1"):
            packed = raw / f"{name}-{kind}-ubyte.gz"
            content = (
                gzip.decompress(packed.read_bytes())
                if packed.exists()
                else packed.with_suffix("").read_bytes()
            )
            (tmp_path / f"{name}-{kind}-ubyte").write_bytes(content)
        images = load("mnist", path or next(raw.glob("t10k-images-idx3-ubyte*")))
        assert images.pixels.shape == (n, 1, 28, 28) and images.labels.bincount().min() > n / 12
        assert torch.equal(images.pixels[:, 0], read_image_file(str(tmp_path / f"{name}-images-idx3-ubyte")))
        assert torch.equal(images.labels, read_label_file(str(tmp_path / f"{name}-labels-idx1-ubyte")))
    assert torch.equal(load("mnist", tmp_path).pixels, load("mnist", mnist_root).pixels)


def test_imagenet_batches(tmp_path):
    rows, marks = make_imagenet(tmp_path / "in")
    images = load("imagenet64", tmp_path / "in")
    assert images.shape == (3, 64, 64) and images.classes == 1000 and len(images) == 30
    assert (
        np.array_equal(images.pixels.numpy().reshape(-1, 12288), rows)
        and images.labels.tolist() == (marks - 1).tolist()
    )
    assert len(load("imagenet64", tmp_path / "in" / "train_data_batch_4.npz")) == 3
    (tmp_path / "in" / "train_data_batch_7.npz").unlink()
    with pytest.raises(ValueError, match="train_data_batch_7.npz missing"):
        load("imagenet64", tmp_path / "in")
    (tmp_path / "in" / "train_data_batch_7.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="train_data_batch_7.npz is damaged"):
        load("imagenet64", tmp_path / "in")
    (tmp_path / "in" / "train_data_batch_7.npz").unlink()
    np.savez(tmp_path / "in" / "train_data_batch_7.npz", data=np.zeros((2, 3072), np.uint8), labels=[1, 2])
    with (
        pytest.warns(UserWarning, match="have changed"),
        pytest.raises(ValueError, match=r"train_data_batch_7.npz: images are \(3, 32, 32\)"),
    ):
        load("imagenet64", tmp_path / "in")


def test_class_folders_of_a_named_set(tmp_path):
    make_folder(tmp_path / "two")
    make_folder(tmp_path / "ten", CIFAR10, 1)
    with pytest.raises(ValueError, match="8x8 where 32x32 is expected"):
        load("cifar10", tmp_path / "ten")
    images = load("cifar10", tmp_path / "ten", size=32)
    assert images.shape == (3, 32, 32) and images.class_names == CIFAR10
    with pytest.raises(ValueError, match="2 classes and cifar10 has 10"):
        load("cifar10", tmp_path / "two")


def test_samples_of_evaluators(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    labels = np.array([0, 1, 2, 2, 1, 0])
    np.savez(tmp_path / "s.npz", pixels, labels)  # guided-diffusion: arr_0, arr_1
    samples = load(tmp_path / "s.npz", labels=True)
    assert (
        np.array_equal(samples.pixels, pixels.transpose(0, 3, 1, 2))
        and samples.labels.tolist() == labels.tolist()
    )
    assert samples.classes == 3 and "from the array arr_0" in samples.summary()
    np.savez_compressed(
        tmp_path / "t.npz", arr_0=pixels.transpose(0, 3, 1, 2), mu=np.zeros(5), sigma=np.eye(5)
    )
    other = load(tmp_path / "t.npz")
    assert (
        torch.equal(other.pixels, samples.pixels)
        and other.labels is None
        and "not used: mu, sigma" in other.summary()
    )
    np.savez(tmp_path / "u.npz", samples=pixels, labels=labels[:3])
    with pytest.warns(UserWarning, match="used without classes: labels is int64"):
        assert load(tmp_path / "u.npz").labels is None
    with pytest.raises(ValueError, match="labels=True.*no classes"):
        load(tmp_path / "u.npz", labels=True)
    with pytest.raises(ValueError, match="every image is 8x8 where 32x32"):
        load("cifar10", tmp_path / "s.npz")


@pytest.mark.parametrize(
    "arrays, said",
    [
        (dict(mu=np.zeros(7), sigma=np.eye(7)), "mu and sigma, statistics of features.*metrics.frechet"),
        (
            dict(arr_0=np.zeros((4, 8, 8, 3), np.float32)),
            r"no array of images; it holds arr_0: float32 \[4, 8, 8, 3\]",
        ),
        (
            dict(a=np.zeros((2, 8, 8, 3), np.uint8), b=np.zeros((2, 8, 8, 3), np.uint8)),
            "several arrays of images",
        ),
        (dict(arr_0=np.zeros((0, 8, 8, 3), np.uint8)), "arr_0 has no images"),
        (dict(arr_0=np.array([{}])), "arr_0: object"),
        ({}, "is damaged|holds nothing|has no images"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, arrays, said):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ValueError, match=said):
        load(tmp_path / "s.npz")


@pytest.mark.slow
def test_the_jpeg_copy_of_cifar10(tmp_path):
    copy = Path(os.environ.get("DDDM_CIFAR10", Path(__file__).parents[1] / ".." / "shared" / "data"))
    archives = [copy] if copy.is_file() else sorted(copy.glob("cifar10*train*.zip"))
    if not archives:
        pytest.skip("no copy of CIFAR-10 as JPEG files: point DDDM_CIFAR10 to a zip or its folder")
    images = load("cifar10", archives[0])
    assert len(images) == 50000 and images.shape == (3, 32, 32) and images.class_names == CIFAR10
    assert images.labels.bincount().tolist() == [5000] * 10
    mean = images.get(torch.arange(50000))[0].mean((0, 2, 3))
    assert (
        mean - torch.tensor([-0.017, -0.035, -0.107])
    ).abs().max() < 0.01  # 0.4914, 0.4822, 0.4465 in [0, 1]
    assert load("cifar10", archives[0]).fingerprint == images.fingerprint
