"The table of tries: what `load` makes of folders and archives as people have them, of odd files, and of a damaged cache."

import io
import json
import os
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from test_data import encoded, make_cifar, make_folder, make_imagenet, picture, png16

from dddm import data as data_module
from dddm.data import decode_image, find_classes, load


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DDDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(place, files, kind):
    "`files`, name -> bytes, as a folder or an archive of `kind`; its path."
    path = place / f"set.{kind}"
    if kind == "folder":
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as z:
            for name, content in files.items():
                entry = zipfile.ZipInfo("x")
                entry.filename = name  # as it is, backslashes too
                z.writestr(entry, content)
    else:
        with tarfile.open(path, "w:" + kind.partition(".")[2]) as tar:
            for name, content in reversed(files.items()):
                entry = tarfile.TarInfo("./" + name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


def images(*names):
    return {name: encoded(picture(i)) for i, name in enumerate(names)}


def splits(*folders, classes="ab"):
    return images(*(f"{folder}/{c}/{i}.png" for folder in folders for c in classes for i in (0, 1)))


def table(labels, n=6):
    "Images in numbered folders and EDM's table of labels."
    names = [f"{i // 3:05}/img{i:08}.png" for i in range(n)]
    content = (
        labels
        if isinstance(labels, bytes)
        else json.dumps({"labels": labels and [list(p) for p in zip(names, labels)]}).encode()
    )
    return images(*names) | {"dataset.json": content}


# name: (files, what is found or None, what is warned of, what `labels=True` says)
# found: (number of images, class names or number of classes)
TRIES = {
    "splits": (splits("train", "test"), (4, ["a", "b"]), "", ""),
    "splits in capitals": (splits("Train", "Test"), (4, ["a", "b"]), "", ""),
    "-ing": (splits("training", "testing"), (4, ["a", "b"]), "", ""),
    "three splits": (splits("train", "test", "dev"), (4, ["a", "b"]), "", ""),
    "splits of a year": (splits("train2017", "val2017"), (4, ["a", "b"]), "", ""),
    "splits with a prefix": (splits("mnist_train", "mnist_test"), (4, ["a", "b"]), "", ""),
    "splits with a suffix": (splits("Train_Images", "Validation-Set"), (4, ["a", "b"]), "", ""),
    "splits deeper": (splits("set/TRAIN", "set/VAL"), (4, ["a", "b"]), "", ""),
    "splits without classes": (images("Train/0.png", "Test/0.png"), (1, None), "", "one folder 'Train'"),
    "two trainings": (
        splits("train", "training", "test"),
        None,
        "train, training are all training parts",
        "",
    ),
    "no training": (splits("dev", "test"), None, "none is a training part", ""),
    "splits and more": (splits("train", "test", "unlabeled"), None, "unlabeled lies beside them", ""),
    "splits and a stray": (
        splits("train", "test") | images("preview.png"),
        None,
        "preview.png lies beside them",
        "",
    ),
    "a split for a class": (
        splits("train", "extra"),
        (8, ["extra", "train"]),
        "train is named like a split",
        "",
    ),
    "unknown splits": (
        splits("lernen", "prüfen"),
        (8, ["lernen", "prüfen"]),
        "all have the sub-folders a, b",
        "",
    ),
    "splits in classes": (
        splits("cat", "dog", classes=("train", "test")),
        (8, ["cat", "dog"]),
        "sub-folders test, train",
        "",
    ),
    "one common sub-folder": (splits("cat", "dog", classes=("images",)), (4, ["cat", "dog"]), "", ""),
    "trains and cars": (
        images("train/0.png", "car/0.png"),
        (2, ["car", "train"]),
        "train is named like a split",
        "",
    ),
    "trains, cars, buses": (
        images("train/0.png", "car/0.png", "bus/0.png"),
        (3, ["bus", "car", "train"]),
        "",
        "",
    ),
    "one class": (images("cat/0.png", "cat/1.png"), (2, None), "", "one folder 'cat'"),
    "no folder": (images("0.png", "1.jfif"), (2, None), "", "in a folder named after its class"),
    "a stray": (
        images("cat/0.png", "dog/0.png", "p.png"),
        (3, None),
        "p.png lies beside the folders cat, dog",
        "p.png lies",
    ),
    "numbered parts": (
        images("00000/0.png", "01000/1.png"),
        (2, ["00000", "01000"]),
        "numbered like parts",
        "",
    ),
    "numbers": (images("0/0.png", "10/1.png"), (2, ["0", "10"]), "", ""),
    "a table": (table([4, 3, 2, 1, 0, 0]), (6, 5), "", ""),
    "a table in a folder": ({f"set/{k}": v for k, v in table([4, 3, 2, 1, 0, 0]).items()}, (6, 5), "", ""),
    "a table without labels": (table(None), (6, None), "", "dataset.json has no labels"),
    "a short table": (table([0, 1, 2]), (6, None), "no label for 00001/img00000003.png", "no label for"),
    "a table of vectors": (table([[0.5, 1]] * 6), (6, None), "not a whole number", "not a whole number"),
    "a table below 0": (table([0, 1, 2, 3, 4, -1]), (6, None), "label -1", "label -1"),
    "a table of pairs that are none": (
        table(b'{"labels": [1, 2]}'),
        (6, None),
        "is not the label table",
        "is not the label table",
    ),
    "a damaged table": (
        table(b'{"labels": [["'),
        (6, None),
        "is not the label table",
        "is not the label table",
    ),
    "another table": (
        table(b'{"version": 2}') | images("cat/0.png", "dog/1.png"),
        (8, ["00000", "00001", "cat", "dog"]),
        "",
        "",
    ),
    "another name": (
        images("0.png", "1.dat", "2.dat"),
        (1, None),
        "files of .dat such as 1.dat hold a PNG image",
        "class",
    ),
    "other names alone": (images("1.dat", "2"), None, "1.dat hold a PNG image", ""),
    "other files": (images("a/0.png", "b/0.png") | {"notes.txt": b"x"}, (2, ["a", "b"]), "", ""),
}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz", "tar.xz"])
@pytest.mark.parametrize("name", TRIES)
def test_the_table_of_tries(tmp_path, name, kind):
    files, found, said, insisting = TRIES[name]
    path = written(tmp_path, files, kind)
    if found is None:
        for labels in (None, False, True):
            with pytest.raises(ValueError, match=said) as error:
                load(path, labels=labels)
            assert str(path) in str(error.value)
        return
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        got = load(path)
        assert load(path, labels=False).labels is None
    assert said in " ".join(str(w.message) for w in heard) and bool(said) == bool(heard)
    classes = len(found[1]) if isinstance(found[1], list) else found[1]
    assert (len(got), got.classes, got.class_names) == (
        found[0],
        classes,
        found[1] if isinstance(found[1], list) else None,
    )
    assert (got.labels is None) == (classes is None) and f"{found[0]} images of 8x8, RGB" in got.summary()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not insisting:
            assert torch.equal(load(path, labels=True, classes=classes).labels, got.labels)
        for options in (dict(labels=True), dict(classes=2)) if insisting else (dict(classes=classes + 1),):
            with pytest.raises(ValueError, match=insisting or f"has {classes} classes"):
                load(path, **options)


@pytest.mark.parametrize("name", [name for name, (_, found, *_) in TRIES.items() if found])
def test_every_packing_is_one_data_set(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sets = [load(written(tmp_path, TRIES[name][0], kind)) for kind in ("folder", "zip", "tar", "tar.gz")]
    assert len({s.fingerprint for s in sets}) == 1
    assert all(torch.equal(s.pixels, sets[0].pixels) for s in sets)


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


def test_windows_archives(tmp_path):
    path = written(
        tmp_path, images("set\\Train\\cat\\0.png", "set\\Train\\dog\\0.png", "set\\Test\\cat\\0.png"), "zip"
    )
    assert load(path, labels=True).class_names == ["cat", "dog"]


def test_tables_of_a_named_set(tmp_path):
    "As EDM keeps CIFAR-10 and ImageNet: numbers alone, of which some classes may be missing."
    files = {
        k: encoded(picture(i, (32, 32))) if k.endswith("png") else v
        for i, (k, v) in enumerate(table([4, 3, 2, 1, 0, 0]).items())
    }
    path = written(tmp_path, files, "zip")
    assert (
        load("cifar10", path, labels=True).classes == 10
        and load("cifar10", path, labels=False).classes is None
    )
    assert load("cifar10", path, classes=10).labels.tolist() == [4, 3, 2, 1, 0, 0]
    assert load(path).fingerprint == load("cifar10", path).fingerprint
    two = make_folder(tmp_path / "two")
    with pytest.warns(UserWarning, match="2 classes and cifar10 has 10"):
        assert load("cifar10", two, size=32).labels is None
    assert load("cifar10", two, size=32, labels=False).labels is None
    with pytest.raises(ValueError, match="2 classes and cifar10 has 10"):
        load("cifar10", two, size=32, labels=True)


def test_an_empty_class_folder(tmp_path):
    root = make_folder(tmp_path / "f")
    (root / "emu").mkdir()
    with pytest.raises(ValueError, match="emu"):
        load(root, labels=True)
    with pytest.warns(UserWarning, match="no image in the class folder emu"):
        assert load(root).classes == 2
    assert load(root, labels=True, on_error="skip").classes == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(root, labels=False)


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


def test_names_that_are_no_text(tmp_path):
    root = tmp_path / "f"
    for name in (b"\xff", b"b"):
        folder = os.path.join(os.fsencode(root), name)
        try:
            os.makedirs(folder)
        except OSError:
            pytest.skip("this file system has text alone")
        with open(os.path.join(folder, b"0.png"), "wb") as file:
            file.write(encoded(picture(0)))
    images = load(root)
    assert images.classes == 2 and "\\udcff (1)" in images.summary() and images.summary().encode()
    assert load(root).fingerprint == images.fingerprint


# --- the shape that is expected


def test_a_forgotten_size_stops_at_the_first_image(tmp_path, cache, monkeypatch):
    root = make_folder(tmp_path / "f", each=50)
    seen, decode = [], data_module.decode_image
    monkeypatch.setattr(data_module, "decode_image", lambda *a: seen.append(1) or decode(*a))
    with pytest.raises(
        ValueError, match=r"cat/000.png is 8x8 where 4x4 is expected; size=4 \(in a training: resize=True\)"
    ):
        load(root, shape=(3, 4, 4))
    assert len(seen) == 1 and not list(cache.glob("*"))
    with pytest.raises(
        ValueError,
        match="has 3 channels where 1 is expected and is 8x8 where 4x4 is expected; channels=1, size=4",
    ):
        load(root, shape=(1, 4, 4))
    good = load(root, shape=(3, 8, 8))
    assert (
        good.shape == (3, 8, 8)
        and len(list(cache.glob("*.npy"))) == 1
        and good.fingerprint == load(root).fingerprint
    )
    assert len(list(cache.glob("*.npy"))) == 1  # the shape makes no second copy
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


# --- files by what they hold


def test_a_wrong_suffix_does_not_matter(tmp_path):
    files = splits("Train", "Test")
    for kind in ("zip", "tar", "tar.gz"):
        path = written(tmp_path, files, kind)
        for suffix in (".zip", ".npz", ".tar", ".bin", ""):
            other = path.rename(tmp_path / f"other{suffix}")
            assert load(other).class_names == ["a", "b"]
            path = other
        path.unlink()


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_no_file(tmp_path):
    root = make_folder(tmp_path / "f")
    os.mkfifo(root / "cat" / "pipe.png")
    os.mkfifo(root / "cat" / "pipe")
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="pipe.png is a pipe|gone.png cannot be opened"):
        load(root)
    with pytest.warns(UserWarning, match="is left out"):
        assert len(load(root, on_error="skip")) == 10
    os.mkfifo(tmp_path / "pipe.zip")
    with pytest.raises(ValueError, match="neither a folder nor a file"):
        load(tmp_path / "pipe.zip")


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
def test_archives_that_are_cut_or_damaged(tmp_path, kind):
    "Whatever the place, the archive is refused by name, or the pixels that are read were written."
    path = written(tmp_path, splits("Train", "Test"), kind)
    good, whole = load(path).fingerprint, path.read_bytes()
    written_pixels = {picture(i).tobytes() for i in range(8)}
    end = (
        -(-len(whole.rstrip(b"\0")) // 512) * 512 + 512
    )  # a tar archive ends in blocks of zeros; one must be there
    for at in range(7, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:at])
        if kind == "tar" and at >= end:
            assert load(path).fingerprint == good
        else:
            with pytest.raises(ValueError, match=f"set.{kind} .*cut short"):
                load(path)
    for at in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read = load(path)
            except ValueError as error:
                assert str(path) in str(error)
            else:
                assert {image.permute(1, 2, 0).numpy().tobytes() for image in read.pixels} <= written_pixels


# --- metadata


def chunk(kind, body):
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


PNG = encoded(picture(0))
LONG = b"x" * 3_000_000
METADATA = {
    "text": chunk(b"tEXt", b"prompt\0" + LONG),
    "packed text": chunk(b"zTXt", b"prompt\0\0" + zlib.compress(LONG)),
    "international text": chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(LONG)),
    "damaged text": chunk(b"tEXt", b"a\0b")[:-1] + b"?",
    "profile": chunk(b"iCCP", b"big\0\0" + zlib.compress(LONG)),
    "damaged profile": chunk(b"iCCP", b"odd\0\0" + b"no zlib"),
    "many texts": chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 1_000_000)) * 70,
    "EXIF": chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff"),
}


@pytest.mark.parametrize("where", [33, -12], ids=["before the pixels", "after the pixels"])
@pytest.mark.parametrize("kind", METADATA)
def test_metadata_never_costs_a_png(kind, where):
    blob = PNG[:where] + METADATA[kind] + PNG[where:]
    assert np.array_equal(decode_image(blob), decode_image(PNG))


def test_what_bad_metadata_does_not_excuse():
    "Damaged pixels and 16 bits stay refused, and an orientation stays followed, beside a text that is too long."
    long = METADATA["text"]
    with pytest.raises(OSError):
        decode_image(PNG[:33] + long + PNG[33:120])
    deep = png16(2, 3)
    with pytest.raises(ValueError, match="16 bits"):
        decode_image(deep[:33] + long + deep[33:])
    packet = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6"/></x:xmpmeta>'
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", packet)
    turned = encoded(picture(0, (8, 6)), pnginfo=info)
    assert np.array_equal(decode_image(turned[:33] + long + turned[33:]), decode_image(turned))
    assert decode_image(turned).shape == (3, 6, 8)


def exif_block(*tags):
    "An EXIF block with `tags`, each (number, type, count, four bytes)."
    body = b"".join(
        t.to_bytes(2, "little") + k.to_bytes(2, "little") + n.to_bytes(4, "little") + v for t, k, n, v in tags
    )
    return (
        b"II*\0\x08\0\0\0"
        + len(tags).to_bytes(2, "little")
        + body
        + bytes(4)
        + (72).to_bytes(4, "little")
        + bytes(4)
    )


ODD_TAGS = {
    "resolution as text": (0x11A, 2, 3, b"72\0\0"),
    "unit as bytes": (0x128, 7, 4, b"\2\0\0\0"),
    "resolution 72/0": (0x11A, 5, 1, b"\x26\0\0\0"),
    "unknown type": (0x131, 99, 1, bytes(4)),
    "place outside": (0x131, 2, 400, b"\xff\xff\xff\x7f"),
    "huge count": (0x9286, 7, 2**31, bytes(4)),
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", ODD_TAGS)
def test_an_odd_tag_does_not_cost_the_picture_or_its_turn(name, format):
    options = dict(lossless=True) if format == "WEBP" else {}
    image = picture(0, (16, 24))
    plain = decode_image(encoded(image, format, **options))
    turned = decode_image(
        encoded(
            image,
            format,
            exif=b"Exif\0\0" + exif_block((0x112, 3, 1, b"\6\0\0\0"), ODD_TAGS[name]),
            **options,
        )
    )
    assert np.array_equal(turned, np.rot90(plain, -1, (1, 2)))


SEGMENTS = {
    "profile": (0xE2, b"ICC_PROFILE\0"),
    "Photoshop": (0xED, b"Photoshop 3.0\x008BIM\4\4\0"),
    "JFIF": (0xE0, b"JFIF\0"),
    "Adobe": (0xEE, b"Adobe"),
    "several pictures": (0xE2, b"MPF\0II*"),
    "comment": (0xFE, b"\xff\xd8\0"),
    "XMP": (0xE1, b"http://ns.adobe.com/xap/1.0/\0<"),
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_a_short_segment_does_not_cost_a_jpeg_or_its_turn(name):
    marker, body = SEGMENTS[name]
    segment = bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body
    exif = Image.Exif()
    exif[0x112] = 6
    for image in (picture(0, (16, 24)), picture(0, (16, 24), "CMYK"), picture(0, (16, 24), "L")):
        blob = encoded(image, "JPEG", exif=exif)
        assert np.array_equal(decode_image(blob[:2] + segment + blob[2:]), decode_image(blob))
    with pytest.raises(OSError):
        decode_image(blob[:2] + segment + blob[2:-40])


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"II*\0",
        b"junk" * 20,
        exif_block((0x112, 2, 1, b"6\0\0\0")),
        exif_block((0x112, 3, 1, b"\x63\0\0\0")),
    ],
)
def test_an_unreadable_orientation_leaves_the_picture_as_it_lies(block):
    image = picture(0, (16, 24))
    assert np.array_equal(
        decode_image(encoded(image, "JPEG", exif=b"Exif\0\0" + block)), decode_image(encoded(image, "JPEG"))
    )


def test_every_orientation():
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    turns = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels),
    }
    for orientation, right in turns.items():
        exif = Image.Exif()
        exif[0x112] = orientation
        for format in ("PNG", "TIFF"):
            assert np.array_equal(
                decode_image(encoded(Image.fromarray(pixels), format, exif=exif)), right.transpose(2, 0, 1)
            )


# --- the cache, its places and its damage


def flip_bit(path, at):
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << at % 7
    path.write_bytes(content)


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_no_damaged_bit_blocks_or_passes(tmp_path, cache, suffix, step):
    root = make_folder(tmp_path / "f", each=2)
    good = load(root)
    pixels, mark = good.pixels.clone(), good.fingerprint
    file = next(cache.glob(f"*{suffix}"))
    whole = file.read_bytes()
    for at in range(0, min(len(whole), 1400), step):
        flip_bit(file, at)
        with pytest.warns(UserWarning, match="decoded again"):
            again = load(root)
        assert torch.equal(again.pixels, pixels) and (again.fingerprint, again.classes, again.skipped) == (
            mark,
            2,
            [],
        ), at
        assert file.read_bytes() == whole


@pytest.mark.parametrize("content", ["[]", "null", "7", '"text"', "{}{", "[" * 10**5, "\xff\xfe", ""])
def test_a_sidecar_that_is_none(tmp_path, cache, content):
    root = make_folder(tmp_path / "f")
    mark = load(root).fingerprint
    next(cache.glob("*.json")).write_text(content, encoding="latin1")
    with pytest.warns(UserWarning, match="decoded again"):
        assert load(root).fingerprint == mark


@pytest.mark.parametrize(
    "field, value",
    [
        ("shape", None),
        ("shape", [10, "x"]),
        ("labels", "x"),
        ("skipped", 3),
        ("skipped", [[1, 2]]),
        ("origin", None),
        ("sha256", 1),
        ("class_names", {}),
        ("format", "dddm-images-9"),
    ],
)
def test_ill_typed_fields_of_an_older_sidecar(tmp_path, cache, field, value):
    "A sidecar without a checksum is believed where it is whole, and not where a field is of the wrong kind."
    root = make_folder(tmp_path / "f")
    mark, side = load(root).fingerprint, next(cache.glob("*.json"))
    meta = json.loads(side.read_text())
    del meta["checksum"]
    side.write_text(json.dumps(meta))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(root).fingerprint == mark
    side.write_text(json.dumps(meta | {field: value}))
    with pytest.warns(UserWarning, match="decoded again"):
        assert load(root).fingerprint == mark


def test_a_cache_that_understood_the_folder_otherwise_is_made_again(tmp_path, cache, monkeypatch):
    root = written(tmp_path, splits("Train", "Test"), "folder")
    with monkeypatch.context() as patch:
        patch.setattr(data_module, "split_kinds", lambda folders: [None] * len(folders))
        with pytest.warns(UserWarning):
            assert load(root).class_names == ["Test", "Train"]
    with pytest.warns(UserWarning, match="understood otherwise now"):
        assert load(root).class_names == ["a", "b"]


@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_a_folder_where_the_cache_should_be(tmp_path, cache, suffix):
    root = make_folder(tmp_path / "f")
    mark, file = load(root).fingerprint, next(cache.glob(f"*{suffix}"))
    file.unlink()
    file.mkdir()
    with pytest.warns(UserWarning, match="decoded into memory"):
        assert load(root).fingerprint == mark


@pytest.mark.skipif(os.name == "nt", reason="file modes are a Unix matter")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_cache_has_the_mode_that_umask_says(tmp_path, cache, umask):
    before = os.umask(umask)
    try:
        load(make_folder(tmp_path / "f"))
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in cache.iterdir()} == {0o666 & ~umask}


def test_anothers_leftovers_do_not_matter(tmp_path, cache, monkeypatch):
    root = make_folder(tmp_path / "f")
    name = next(iter([load(root), *cache.glob("*.npy")][1:])).stem
    for file in cache.iterdir():
        file.unlink()
    (cache / f"{name}.999999999.part").mkdir()  # cannot be removed as a file
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load(root)) == 10


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "set", each=1)
    make_cifar(tmp_path / "cifar")
    load("~/set", cache="~/here")
    load("cifar10", path="~/cifar", cache="~/here")
    monkeypatch.setenv("DDDM_CACHE", "~/there")
    load("~/set")
    monkeypatch.delenv("DDDM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/xdg")
    load("~/set")
    assert len(list((tmp_path / "here").glob("*.npy"))) == 2 and list((tmp_path / "there").glob("*.npy"))
    assert list((tmp_path / "xdg" / "dddm").glob("*.npy")) and not (tmp_path / "~").exists()


WINDOWS = "import sys; sys.modules['fcntl'] = None; from dddm.data import load; print(len(load(sys.argv[1])))"


def test_without_what_windows_lacks(tmp_path):
    root = make_folder(tmp_path / "f")
    out = subprocess.run(
        [sys.executable, "-c", WINDOWS, str(root)], capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == "10"


def test_many_names_are_sorted_out_quickly():
    names = [f"{split}/n{c:04}/{i}.jpg" for split in ("train", "val") for c in range(500) for i in range(100)]
    layout = find_classes(names, [])
    assert len(layout.names) == 50000 and len(set(layout.classes)) == 500 and not layout.warnings


def test_advice_names_options_that_exist():
    "What a message tells to pass is an argument of `load`, or a field of a training where it says so."
    import inspect
    import re

    from dddm.config import TrainConfig

    source = inspect.getsource(data_module)
    options, fields = set(inspect.signature(load).parameters), set(TrainConfig.__dataclass_fields__)
    for option in re.findall(r"pass (\w+)=", source):
        assert option in options & fields
    for field in re.findall(r"in a training: (\w+)", source):
        assert field in fields
    for option in re.findall(r"ask for (\w+)=", source):
        assert option in options & fields
    assert Path(data_module.__file__).name == "data.py"
