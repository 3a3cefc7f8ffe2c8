"What is understood of folders and archives as people have them; links, pipes, odd names, cut archives."

import gzip
import io
import os
import struct
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_sets import encoded, images, make_folder, picture, splits, table, written

from dddm import layouts as layouts_module
from dddm.data import load
from dddm.layouts import find_classes

pytestmark = pytest.mark.usefixtures("pixel_cache")


def test_find_classes_corner_cases():
    assert find_classes(["train/1.png", "test/2.png"], [])[:2] == (["train/1.png"], None)
    assert find_classes(["only/cat/1.png"], [])[1] is None
    assert find_classes(["x/train/1.png", "x/other/1.png"], [])[1] == ["train", "other"]
    assert find_classes(["cat/1.png", "cat2/1.png"], ["cat", "cat2", "cat/deep"])[2] == []


def test_many_names_are_sorted_out_quickly():
    names = [f"{split}/n{c:04}/{i}.jpg" for split in ("train", "val") for c in range(500) for i in range(100)]
    layout = find_classes(names, [])
    assert len(layout.names) == 50000 and len(set(layout.classes)) == 500 and not layout.image_doubts


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


def test_order_and_labels_do_not_depend_on_the_file_system(tmp_path):
    root = make_folder(tmp_path / "f", ("b", "a", "c"), each=40)
    images = load(root)
    assert images.class_names == ["a", "b", "c"] and images.labels.tolist() == [0] * 40 + [1] * 40 + [2] * 40
    for i in range(40):
        assert np.array_equal(images.pixels[40 + i].numpy().transpose(1, 2, 0), np.asarray(picture(i)))
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for file in reversed(sorted(root.rglob("*.png"))):
            z.write(file, f"some/train/{file.relative_to(root)}")
        z.writestr("some/test/a/1.png", b"not looked at")
        z.writestr("__MACOSX/some/train/a/._1.png", b"x")
        z.writestr("some/readme.txt", "x")
    assert load(tmp_path / "z.zip").fingerprint == images.fingerprint
    assert load(root, size=4, channels=1).shape == (1, 4, 4) and load(root, labels=False).labels is None
    assert load(root, labels=False).fingerprint == images.fingerprint


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


def test_a_link_that_leads_back_up_is_not_followed(tmp_path):
    make_folder(tmp_path / "set", each=1)
    (tmp_path / "set" / "cat" / "up").symlink_to("..")
    (tmp_path / "elsewhere").mkdir()
    picture(9).save(tmp_path / "elsewhere" / "9.png")
    (tmp_path / "set" / "bird").symlink_to(tmp_path / "elsewhere")  # another link is
    images = load(tmp_path / "set")
    assert len(images) == 3 and images.class_names == ["bird", "cat", "dog"]


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


def test_a_wrong_suffix_does_not_matter(tmp_path):
    files = splits("Train", "Test")
    for kind in ("zip", "tar", "tar.gz"):
        path = written(tmp_path, files, kind)
        for suffix in (".zip", ".npz", ".tar", ".bin", ""):
            other = path.rename(tmp_path / f"other{suffix}")
            assert load(other).class_names == ["a", "b"]
            path = other
        path.unlink()


def test_a_damaged_zip_member_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
        for i in range(3):
            z.writestr(f"{i}.bmp", encoded(picture(i), "BMP"))
    blob = bytearray((tmp_path / "z.zip").read_bytes())
    blob[blob.find(b"1.bmp") + 60] ^= 1
    (tmp_path / "z.zip").write_bytes(blob)
    with pytest.raises(ValueError, match="1.bmp cannot be decoded .*CRC"):
        load(tmp_path / "z.zip")


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


# --- archives that unpack to too much


def zeros(kind, sizes, name="{}.png"):
    "An archive of `kind` as bytes, with files of zeros."
    packed = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as z:
            for i, size in enumerate(sizes):
                z.writestr(name.format(i), bytes(size))
    else:
        with tarfile.open(fileobj=packed, mode="w:" + kind.partition(".")[2]) as tar:
            for i, size in enumerate(sizes):
                entry = tarfile.TarInfo(name.format(i))
                entry.size = size
                tar.addfile(entry, io.BytesIO(bytes(size)))
    return packed.getvalue()


@pytest.fixture
def low_limits(monkeypatch):
    "Limits that small archives can exceed."
    monkeypatch.setattr(layouts_module, "ALWAYS_ALLOWED", 10**6)
    monkeypatch.setattr(layouts_module, "MAX_RATIO", 50)
    monkeypatch.setattr(layouts_module, "MAX_IMAGE", 10**6)
    monkeypatch.setattr(layouts_module, "MAX_ENTRIES", 100)


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
@pytest.mark.parametrize(
    "sizes, name, said",
    [
        ([10**5] * 40, "{}.png", "unpacks to more than .* bytes, over 50 times its size"),
        ([6 * 10**6], "{}.bin", "unpacks to more than .* bytes, over 50 times its size"),
        ([2 * 10**6], "{}.png", "has an image file of 2,000,000 bytes, 0.png"),
        ([0] * 101, "{}.png", "has more than 100 entries"),
    ],
    ids=["many files", "one file", "one image", "many entries"],
)
def test_archives_that_unpack_to_too_much(tmp_path, low_limits, monkeypatch, kind, sizes, name, said):
    path = tmp_path / f"set.{kind}"
    path.write_bytes(zeros(kind, sizes, name))
    monkeypatch.setattr(layouts_module.tempfile, "TemporaryFile", None)  # nothing is unpacked
    with pytest.raises(ValueError, match=f"set.{kind} {said}; such an archive is not opened"):
        load(path)


def test_a_tar_archive_with_a_long_end(tmp_path, low_limits):
    path = tmp_path / "set.tar.gz"
    path.write_bytes(gzip.compress(zeros("tar", [10]) + bytes(10**7)))
    with pytest.raises(ValueError, match="unpacks to more than"):
        load(path)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_a_tar_archive_with_a_huge_header(tmp_path, kind):
    entry = tarfile.TarInfo("long")
    entry.type, entry.size = kind, 3 * 2**20
    path = tmp_path / "set.tar"
    path.write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + b"x" * entry.size + bytes(1024))
    with pytest.raises(ValueError, match="a header in it has 3,145,728 bytes"):
        load(path)


def test_a_zip_archive_whose_entries_overlap(tmp_path):
    "One packed file, listed a hundred times."
    blob = zeros("zip", [10**5])
    start = blob.index(b"PK\1\2")
    entry, end = blob[start : blob.index(b"PK\5\6")], bytearray(blob[blob.index(b"PK\5\6") :])
    struct.pack_into("<HHI", end, 8, 100, 100, 100 * len(entry))
    listed = b"".join(entry.replace(b"0.png", b"%c.png" % (40 + i)) for i in range(100))
    path = tmp_path / "set.zip"
    path.write_bytes(blob[:start] + listed + end)
    assert len(zipfile.ZipFile(path).namelist()) == 100
    with pytest.raises(ValueError, match="set.zip has entries that overlap"):
        load(path)


def test_many_entries_are_refused_before_they_are_listed(tmp_path, low_limits, monkeypatch):
    path = tmp_path / "set.zip"
    path.write_bytes(zeros("zip", [0] * 101))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="has more than 100 entries"):
        patch.setattr(layouts_module.zipfile, "ZipFile", None)
        load(path)
    path.write_bytes(zeros("zip", [0] * 70_000))
    assert layouts_module.zip_entries(path) == 70_000


def test_arrays_that_unpack_to_too_much(tmp_path, low_limits):
    np.savez_compressed(tmp_path / "s.npz", np.zeros((2000, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="unpacks to more than"):
        load(tmp_path / "s.npz")
    (tmp_path / "in").mkdir()
    for i in range(1, 11):
        rows, labels = np.zeros((500, 12288), np.uint8), np.ones(500, int)
        np.savez_compressed(tmp_path / "in" / f"train_data_batch_{i}.npz", data=rows, labels=labels)
    with pytest.raises(ValueError, match="train_data_batch_1.npz unpacks to more than"):
        load("imagenet64", tmp_path / "in")


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz"])
def test_drawings_that_pack_well_pass(tmp_path, kind):
    "Ten thousand blank images, which pack to a hundredth of their size and less."
    blank = encoded(Image.new("L", (64, 64)), "PPM")
    assert len(load(written(tmp_path, {f"{i}.pgm": blank for i in range(10_000)}, kind))) == 10_000


def test_links_in_a_tar_are_those_of_the_folder(tmp_path):
    "A link to a file is that file; one that leads elsewhere is an error, as in a folder."
    make_folder(tmp_path / "set", each=2)
    (tmp_path / "set" / "cat" / "link.png").symlink_to("../dog/001.png")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(tmp_path / "set", arcname=".")
    folder, packed = load(tmp_path / "set"), load(tmp_path / "set.tar")
    assert len(folder) == 5 and packed.fingerprint == folder.fingerprint
    (tmp_path / "set" / "cat" / "twice.png").symlink_to("link.png")  # to a link
    (tmp_path / "set" / "README.md").symlink_to("../elsewhere.md")  # no image can lie behind it
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(tmp_path / "set", arcname=".")
    assert load(tmp_path / "set.tar").fingerprint == load(tmp_path / "set").fingerprint
    (tmp_path / "set" / "bird").symlink_to("dog")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(tmp_path / "set", arcname=".")
    with pytest.raises(ValueError, match="bird is a link to dog, which is no file in the archive"):
        load(tmp_path / "set.tar")


def test_a_name_that_a_zip_has_twice_counts_once(tmp_path):
    "Appending to a zip keeps the old entry; its reader, like whoever unpacks it, has the new one."
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as z:
        z.writestr("a/0.png", encoded(picture(0)))
        z.writestr("b/1.png", encoded(picture(1)))
    with zipfile.ZipFile(tmp_path / "set.zip", "a") as z, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's, of the duplicate
        z.writestr("a/0.png", encoded(picture(2)))
    found = load(tmp_path / "set.zip")
    assert len(found) == 2 and found.pixels[0].tolist() == np.asarray(picture(2)).transpose(2, 0, 1).tolist()
