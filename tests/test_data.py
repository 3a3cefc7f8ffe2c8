"Images and `load`: options, shapes, bad images, what is said of them."

import shutil
import urllib.error
import warnings

import pytest
import torch
from synthetic_sets import (
    encoded,
    images,
    make_cifar,
    make_folder,
    make_imagenet,
    make_mnist,
    picture,
    splits,
    written,
)

from dddm import cache as cache_module
from dddm import data as data_module
from dddm import decoding as decoding_module
from dddm import layouts as layouts_module
from dddm import sources as sources_module
from dddm.cache import cache_folder
from dddm.data import Images, flip, load
from dddm.store import EstimateStore

pytestmark = pytest.mark.usefixtures("pixel_cache")


def test_ends_of_the_range_are_exact():
    images = Images(torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(3, 1, 1, 1), None, "x", "")
    x, label = images.to("cpu").get(torch.tensor([1, 0, 2]))
    assert x.flatten().tolist()[:2] == [1, -1] and abs(x[2].item() + 0.6) < 1e-7 and label is None
    assert load("digits").get(torch.arange(1797))[0].mul(8).add(8).frac().abs().max() == 0


def test_the_summary(tmp_path):
    files = splits("Train", "Test") | {"notes.txt": b"x", "Train/a/2.png": b"broken"}
    with pytest.warns(UserWarning, match="1 of 5 images"):
        lines = (
            load(written(tmp_path, files, "zip"), size=4, channels=1, on_error="skip").summary().split("\n")
        )
    assert lines[0] == "set: 4 images of 4x4, grey" and lines[1].endswith("set.zip")
    assert [line.strip() for line in lines[2:6]] == [
        "split: Train (5 images) is used; left out: Test (4)",
        "left out, as not named like images: 1 of .txt",
        "pixels: the centred square resized to 4x4, turned to grey",
        "classes: 2: a (2), b (2)",
    ]
    assert "skipped: 1, the first: Train/a/2.png cannot be decoded" in lines[6]
    many = load(written(tmp_path, images(*(f"{i:03}/0.png" for i in range(40))), "folder")).summary()
    assert "40: 000 (1), 001 (1), 002 (1), …, 039 (1), from 1 to 1 images each" in many
    assert "classes: none" in load("digits", labels=False).summary()


# of sets that loaded rightly before any of this was told apart: a run resumes by them
MARKS = {
    "folder": "1bacab8e",
    "split": "1bacab8e",
    "flat": "5d0acb23",
    "one": "c6b2f532",
    "stray": "501fd80b",
    "cifar": "845f59b6",
    "imagenet": "1f78ec8a",
    "digits": "f80302a4",
}


def test_fingerprints_stay(tmp_path):
    make_folder(tmp_path / "folder")
    make_folder(tmp_path / "split" / "train")
    make_folder(tmp_path / "split" / "test")
    (tmp_path / "flat").mkdir()
    for i in range(4):
        picture(i).save(tmp_path / "flat" / f"{i}.png")
    make_folder(tmp_path / "one", ("cat",))
    make_folder(tmp_path / "stray")
    picture(1).save(tmp_path / "stray" / "p.png")
    make_cifar(tmp_path / "cifar")
    make_imagenet(tmp_path / "imagenet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name: load(tmp_path / name) for name in MARKS if name != "digits"} | {
            "digits": load("digits")
        }
    assert {name: images.fingerprint[:8] for name, images in found.items()} == MARKS


def test_a_forgotten_size_stops_at_the_first_image(tmp_path, pixel_cache, monkeypatch):
    root = make_folder(tmp_path / "f", each=50)
    seen, decode = [], decoding_module.decode_image
    monkeypatch.setattr(decoding_module, "decode_image", lambda *a: seen.append(1) or decode(*a))
    with pytest.raises(
        ValueError, match=r"cat/000.png is 8x8 where 4x4 is expected; size=4 \(in a training: resize=True\)"
    ):
        load(root, shape=(3, 4, 4))
    assert len(seen) == 1 and not list(pixel_cache.glob("*"))
    with pytest.raises(
        ValueError,
        match="has 3 channels where 1 is expected and is 8x8 where 4x4 is expected; channels=1, size=4",
    ):
        load(root, shape=(1, 4, 4))
    good = load(root, shape=(3, 8, 8))
    assert (
        good.shape == (3, 8, 8)
        and len(list(pixel_cache.glob("*.npy"))) == 1
        and good.fingerprint == load(root).fingerprint
    )
    assert len(list(pixel_cache.glob("*.npy"))) == 1  # the shape makes no second copy
    with pytest.raises(ValueError, match="every image is 8x8 where 4x4"):
        load(root, shape=(3, 4, 4))
    assert load(root, shape=(1, 4, 4), size=4, channels=1).shape == (1, 4, 4)


def test_a_shape_with_skip(tmp_path):
    root = make_folder(tmp_path / "f")
    picture(0, (4, 4)).save(root / "cat" / "000.png")
    with pytest.warns(UserWarning, match="9 of 10 images"):
        assert len(load(root, shape=(3, 4, 4), on_error="skip")) == 1
    with pytest.warns(UserWarning, match="1 of 10 images"):
        assert len(load(root, on_error="skip")) == 9


@pytest.mark.parametrize("size", [4.0, True, 0])
def test_sizes_that_are_no_size(tmp_path, size):
    make_folder(tmp_path / "set", each=1)
    with pytest.raises(ValueError, match="size=.*integer >= 1"):
        load(tmp_path / "set", size=size)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(shape=(3, 4)), r"shape=\(3, 4\): must be"),
        (dict(shape=8), "shape=8: must be"),
        (dict(classes=0), "classes=0"),
        (dict(classes=2, labels=False), "drop one of them"),
        (dict(size=8, shape=(3, 4, 4)), "every image is 8x8 where 4x4"),
        (dict(data="digits", shape=(3, 8, 8)), "has 1 channel where 3"),
        (dict(data="digits", classes=3), "digits has 10"),
        (dict(data="cifar10", shape=(3, 64, 64)), "is 32x32 where 64x64"),
        (dict(data=None), "data=None: must be a name or a path"),
    ],
)
def test_options_that_disagree(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        load(**dict(data=make_folder(tmp_path / "f")) | options)


@pytest.mark.parametrize(
    "content, reason",
    [
        (encoded(picture(0))[:100], "cannot be decoded"),
        (b"", "the file is empty"),
        (b"hello", "not an image"),
        (encoded(picture(0, (9, 8))), "8x9"),
        (encoded(picture(0, mode="L")), "1 channel"),
        (encoded(picture(0))[:-30] + bytes(30), "cannot be decoded"),
    ],
)
def test_bad_images_stop_by_name_or_are_listed(tmp_path, content, reason):
    root = make_folder(tmp_path / "f")
    good = load(root, cache=tmp_path / "other")
    (root / "cat" / "000a.png").write_bytes(content)
    with pytest.raises(ValueError, match="cat/000a.png.*" + reason):
        load(root)
    with pytest.warns(UserWarning, match="1 of 11 images"):
        images = load(root, on_error="skip")
    assert (
        len(images) == 10
        and [s[0] for s in images.skipped] == ["cat/000a.png"]
        and reason in images.skipped[0][1]
    )
    assert images.fingerprint == good.fingerprint and images.labels.tolist() == [0] * 5 + [1] * 5
    with pytest.raises(ValueError, match="cat/000a.png"):
        load(root)  # also from the cache made by "skip"


def test_the_odd_one_is_named_even_where_it_comes_first(tmp_path):
    root = make_folder(tmp_path / "f")
    picture(0, (9, 9)).save(root / "cat" / "000.png")
    with pytest.raises(ValueError, match="cat/000.png is 9x9 where 8x8"):
        load(root)


def test_nothing_usable(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="none of the 1 images"):
        load(tmp_path / "f", on_error="skip")
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(ValueError, match="no folder, .zip"):
        load(tmp_path / "text.txt")
    assert not [p for p in cache_folder().glob("*") if p.suffix == ".part"]


@pytest.mark.parametrize(
    "content, said",
    [
        (encoded(picture(0)), "a PNG image: give the folder"),
        (b"PAR1" + bytes(9), "a Parquet table"),
        (b"\x89HDF\r\n\x1a\n", "an? HDF5 file"),
        (b"\x93NUMPY\1\0", "NumPy array"),
        (b"", "no folder"),
        (b"text", "no folder"),
    ],
)
def test_other_files_say_what_they_are(tmp_path, content, said):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=f"file is no folder, .zip.*{said}|file is {said}"):
        load(tmp_path / "file")


DOWNLOADS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}  # torchvision's names


def test_no_network(tmp_path, monkeypatch):
    import torchvision.datasets

    def offline(*a, **k):
        raise urllib.error.URLError("no network")

    for name, theirs in DOWNLOADS.items():
        monkeypatch.setattr(torchvision.datasets, theirs, offline)
        with pytest.raises(OSError, match=f"{name} could not be downloaded.*path= names"):
            load(name, download=True)
        with pytest.raises(FileNotFoundError, match=f"data='{name}' was not downloaded before"):
            load(name)


@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_download_is_found_again(monkeypatch, name):
    import torchvision.datasets

    def fetched(root, train, download):
        make_cifar(root) if name == "cifar10" else make_mnist(root, DOWNLOADS[name], packed=False)

    monkeypatch.setattr(torchvision.datasets, DOWNLOADS[name], fetched)
    first = load(name, download=True)
    monkeypatch.setattr(torchvision.datasets, DOWNLOADS[name], None)
    assert load(name).fingerprint == first.fingerprint


def test_a_download_that_was_cut_short_is_fetched_again(monkeypatch, pixel_cache):
    import torchvision.datasets

    root = pixel_cache / "torchvision"
    make_cifar(root)
    (root / "cifar-10-batches-py" / "data_batch_1").unlink()
    with pytest.raises(ValueError, match=r": data_batch_1 missing"):
        load("cifar10")

    def fetched(root, train, download):
        shutil.rmtree(root)
        make_cifar(root)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fetched)
    assert len(load("cifar10", download=True)) == 20


@pytest.mark.parametrize("name", ["digits", "imagenet64", "elsewhere"])
def test_what_cannot_be_downloaded(name):
    with pytest.raises(ValueError, match=f"only mnist, fashion-mnist, cifar10 can be downloaded, not {name}"):
        load(name, download=True)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_the_store_keeps_one_orientation(tmp_path, dtype):
    "A 'model' that answers its input image: whatever was mirrored, the store ends in the files' orientation."
    images, g = load(make_folder(tmp_path / "f")), torch.Generator().manual_seed(0)
    store = EstimateStore(len(images), images.shape, dtype, path=tmp_path / "s")
    for _ in range(3):
        for index in torch.randperm(10, generator=g).split(4):
            mask = torch.rand(len(index), generator=g) < 0.5
            x0 = flip(images.get(index)[0], mask)
            store.write(index, flip(x0, mask))
    assert (store.read(torch.arange(10)) - images.get(torch.arange(10))[0]).abs().max() < 1e-6


def test_advice_names_options_that_exist():
    "What a message tells to pass is an argument of `load`, or a field of a training where it says so."
    import inspect
    import re

    from dddm.config import TrainConfig

    modules = (decoding_module, layouts_module, sources_module, cache_module, data_module)
    source = "".join(map(inspect.getsource, modules))
    options, fields = set(inspect.signature(load).parameters), set(TrainConfig.__dataclass_fields__)
    for option in re.findall(r"pass (\w+)=", source):
        assert option in options & fields
    for field in re.findall(r"in a training: (\w+)", source):
        assert field in fields
    for option in re.findall(r"ask for (\w+)=", source):
        assert option in options & fields
    assert "pass on_error=" in source and "in a training: resize" in source
