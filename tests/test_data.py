"Data sets where a lesson cannot show them: official formats made synthetically, damage, kills, full disks, several processes."

import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import time
import urllib.error
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dddm import data as data_module
from dddm.data import CIFAR10, Images, cache_folder, decode_image, find_classes, flip, load
from dddm.store import EstimateStore


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DDDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(i, size=(8, 8), mode="RGB"):
    "A random image that depends on `i` alone."
    h, w = size
    pixels = np.random.default_rng(i).integers(0, 256, (h, w, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def make_folder(root, classes=("cat", "dog"), each=5):
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            picture(100 * k + i).save(root / name / f"{i:03}.png")
    return root


def make_cifar(root, per_batch=4, labels=lambda i: i % 10):
    "torchvision's folder: five pickles of Python 2 style, and the file of class names. Returns pixels and labels."
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    rng, pixels, marks = np.random.default_rng(0), [], []
    for b in range(1, 6):
        rows = rng.integers(0, 256, (per_batch, 3072), np.uint8)
        label = [labels(b * per_batch + i) for i in range(per_batch)]
        (base / f"data_batch_{b}").write_bytes(pickle.dumps({"data": rows, "labels": label}, protocol=2))
        pixels.append(rows)
        marks += label
    (base / "test_batch").write_bytes(pickle.dumps({"data": rows, "labels": label}, protocol=2))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR10}, protocol=2))
    return np.concatenate(pixels), marks


def make_imagenet(root, per_batch=3):
    root.mkdir()
    rng, pixels, marks = np.random.default_rng(1), [], []
    for b in range(1, 11):
        rows, label = rng.integers(0, 256, (per_batch, 12288), np.uint8), rng.integers(1, 1001, per_batch)
        np.savez(root / f"train_data_batch_{b}.npz", data=rows, labels=label, mean=rows.mean(0))
        pixels.append(rows)
        marks.append(label)
    return np.concatenate(pixels), np.concatenate(marks)


# --- formats


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


def test_find_classes_corner_cases():
    assert find_classes(["train/1.png", "test/2.png"], [])[:2] == (["train/1.png"], None)
    assert find_classes(["only/cat/1.png"], [])[1] is None
    assert find_classes(["x/train/1.png", "x/other/1.png"], [])[1] == ["train", "other"]
    assert find_classes(["cat/1.png", "cat2/1.png"], ["cat", "cat2", "cat/deep"])[2] == []


# --- pixels


def test_file_kinds():
    rgb = np.asarray(picture(0)).transpose(2, 0, 1)
    for format in ("PNG", "BMP", "PPM", "TIFF"):
        assert np.array_equal(decode_image(encoded(picture(0), format)), rgb)
    assert np.array_equal(decode_image(encoded(picture(0, mode="L")))[0], np.asarray(picture(0).convert("L")))
    assert np.array_equal(
        decode_image(encoded(picture(0)), channels=1)[0], np.asarray(picture(0).convert("L"))
    )
    assert decode_image(encoded(picture(0, mode="P"))).shape == (3, 8, 8)
    assert decode_image(encoded(picture(0, mode="CMYK"), "JPEG")).shape == (3, 8, 8)
    clear = Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    assert (decode_image(encoded(clear)) == 255).all()
    with pytest.raises(ValueError, match="16 bits a channel"):
        decode_image(encoded(Image.fromarray(np.zeros((4, 4), np.uint16))))


def png16(kind, channels):
    "A 2x2 PNG of 16 bits a channel, written by hand: Pillow writes none in colour."

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = b"".join(
        b"\0" + struct.pack(f">{2 * channels}H", *range(1000, 1000 + 2 * channels)) for _ in range(2)
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, kind, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "blob",
    [
        png16(0, 1),
        png16(2, 3),
        png16(4, 2),
        png16(6, 4),
        b"P6 # two\n2 2\n65535\n" + bytes(24),
        b"II*\0\x08\0\0\0\x09\0"
        + b"".join(
            struct.pack("<HHII", *tag)
            for tag in (
                (256, 3, 1, 2),
                (257, 3, 1, 2),
                (258, 3, 3, 130),
                (259, 3, 1, 1),
                (262, 3, 1, 2),
                (273, 4, 1, 136),
                (277, 3, 1, 3),
                (278, 3, 1, 2),
                (279, 4, 1, 24),
            )
        )
        + bytes(4)
        + bytes(8)
        + struct.pack("<HHH", 16, 16, 16)
        + bytes(24),
    ],
    ids=["PNG grey", "PNG", "PNG grey alpha", "PNG alpha", "PPM", "TIFF"],
)
def test_sixteen_bits_are_refused(blob):
    with pytest.raises(ValueError, match="16 bits a channel are more than 8|is not 8 bits a channel"):
        decode_image(blob)


def test_grey_stays_grey_under_transparency():
    grey = picture(3, mode="L")
    with_alpha = Image.merge("LA", (grey, Image.new("L", grey.size, 255)))
    for blob in (encoded(with_alpha), encoded(grey, transparency=44)):
        assert decode_image(blob).shape == (1, 8, 8)
    assert np.array_equal(decode_image(encoded(with_alpha)), decode_image(encoded(grey)))
    assert decode_image(encoded(picture(3), "GIF")).shape == (3, 8, 8) and decode_image(
        encoded(with_alpha), channels=3
    ).shape == (3, 8, 8)


def test_a_link_that_leads_back_up_is_not_followed(tmp_path):
    make_folder(tmp_path / "set", each=1)
    (tmp_path / "set" / "cat" / "up").symlink_to("..")
    (tmp_path / "elsewhere").mkdir()
    picture(9).save(tmp_path / "elsewhere" / "9.png")
    (tmp_path / "set" / "bird").symlink_to(tmp_path / "elsewhere")  # another link is
    images = load(tmp_path / "set")
    assert len(images) == 3 and images.class_names == ["bird", "cat", "dog"]


@pytest.mark.parametrize("size", [4.0, True, 0])
def test_sizes_that_are_no_size(tmp_path, size):
    make_folder(tmp_path / "set", each=1)
    with pytest.raises(ValueError, match="size=.*integer >= 1"):
        load(tmp_path / "set", size=size)


def test_upright_by_exif():
    image, exif = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)), Image.Exif()
    exif[0x0112] = 3  # upside down
    assert np.array_equal(
        decode_image(encoded(image, exif=exif)), np.asarray(image)[::-1, ::-1].transpose(2, 0, 1)
    )


def test_size_cuts_the_centre_and_averages():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, :20] = [255, 0, 0]
    pixels[:, 40:] = [0, 0, 255]
    pixels[:, 20:40] = 100
    assert (
        decode_image(encoded(Image.fromarray(pixels)), size=5) == 100
    ).all()  # nothing of the sides bleeds in
    assert np.array_equal(decode_image(encoded(picture(3)), size=8), decode_image(encoded(picture(3))))


def test_ends_of_the_range_are_exact():
    images = Images(torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(3, 1, 1, 1), None, "x", "")
    x, label = images.to("cpu").get(torch.tensor([1, 0, 2]))
    assert x.flatten().tolist()[:2] == [1, -1] and abs(x[2].item() + 0.6) < 1e-7 and label is None
    assert load("digits").get(torch.arange(1797))[0].mul(8).add(8).frac().abs().max() == 0


# --- bad images


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


def test_a_damaged_zip_member_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
        for i in range(3):
            z.writestr(f"{i}.bmp", encoded(picture(i), "BMP"))
    blob = bytearray((tmp_path / "z.zip").read_bytes())
    blob[blob.find(b"1.bmp") + 60] ^= 1
    (tmp_path / "z.zip").write_bytes(blob)
    with pytest.raises(ValueError, match="1.bmp cannot be decoded .*CRC"):
        load(tmp_path / "z.zip")


def test_nothing_usable(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="none of the 1 images"):
        load(tmp_path / "f", on_error="skip")
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(ValueError, match="no folder, .zip"):
        load(tmp_path / "text.txt")
    assert not [p for p in cache_folder().glob("*") if p.suffix == ".part"]


def test_no_network(tmp_path, monkeypatch):
    import torchvision.datasets

    def offline(*a, **k):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(OSError, match="could not be downloaded.*path= names"):
        load("cifar10", download=True)


def test_a_download_is_found_again(tmp_path, monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, **k: make_cifar(Path(root)))
    first = load("cifar10", download=True)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", None)
    assert load("cifar10").fingerprint == first.fingerprint


# --- the cache


def test_cache_folder_order(tmp_path, monkeypatch):
    assert cache_folder("here") == Path("here") and cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("DDDM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "dddm"


def damage(cache, how):
    array, side = next(cache.glob("*.npy")), next(cache.glob("*.json"))
    meta = json.loads(side.read_text())
    if how == "array cut":
        array.write_bytes(array.read_bytes()[:-1])
    if how == "array gone":
        array.unlink()
    if how == "sidecar gone":
        side.unlink()
    if how == "sidecar cut":
        side.write_text(side.read_text()[:-5])
    if how == "label changed":
        meta["labels"][0] = 1
        side.write_text(json.dumps(meta))
    if how == "byte flipped":
        b = bytearray(array.read_bytes())
        b[300] ^= 4
        array.write_bytes(b)


@pytest.mark.parametrize(
    "how", ["array cut", "array gone", "sidecar gone", "sidecar cut", "label changed", "byte flipped"]
)
def test_a_damaged_cache_is_made_again(tmp_path, cache, how):
    root = make_folder(tmp_path / "f")
    good = load(root)
    pixels, labels, mark = good.pixels.clone(), good.labels.clone(), good.fingerprint
    damage(cache, how)
    with pytest.warns(UserWarning, match="decoded again"):
        again = load(root)
    assert (
        torch.equal(again.pixels, pixels) and torch.equal(again.labels, labels) and again.fingerprint == mark
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(root)


def test_changed_files_are_noticed(tmp_path):
    root = make_folder(tmp_path / "f")
    before = load(root).fingerprint
    picture(999).save(root / "cat" / "003.png")
    os.utime(root / "cat" / "003.png", (1, 1))
    with pytest.warns(UserWarning, match="have changed"):
        after = load(root)
    assert after.fingerprint != before and np.array_equal(
        after.pixels[3].numpy().transpose(1, 2, 0), np.asarray(picture(999))
    )


def test_a_foreign_file_is_never_overwritten(tmp_path, cache):
    root = make_folder(tmp_path / "f")
    load(root)
    side = next(cache.glob("*.json"))
    side.write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="was not written by dddm"):
        load(root)
    assert side.read_text() == '{"mine": 1}'


LOADER = "import sys; from dddm.data import load; print(load(sys.argv[1], size=int(sys.argv[2])).fingerprint, flush=True)"


def test_a_kill_while_the_cache_is_written(tmp_path, cache):
    root = tmp_path / "f"
    root.mkdir()
    some = [encoded(picture(i, (64, 64))) for i in range(20)]
    for i in range(3000):
        (root / f"{i:05}.png").write_bytes(some[i % 20])
    writer = subprocess.Popen([sys.executable, "-c", LOADER, str(root), "64"])
    deadline = time.time() + 60

    def growing():
        try:
            return any(p.stat().st_size > 10**6 for p in cache.glob("*.part"))
        except FileNotFoundError:
            return False  # renamed between the listing and the look

    while not growing() and time.time() < deadline and writer.poll() is None:
        time.sleep(0.002)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert list(cache.glob("*.part")) and not list(cache.glob("*.json"))
    images = load(root, size=64)
    assert len(images) == 3000 and not list(cache.glob("*.part"))
    assert images.fingerprint == load(root, size=64, cache=tmp_path / "other").fingerprint


def test_two_processes_at_once(tmp_path):
    root = make_folder(tmp_path / "f", each=100)
    both = [
        subprocess.Popen([sys.executable, "-c", LOADER, str(root), "8"], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    out = [p.communicate()[0].split() for p in both]
    assert out[0] == out[1] == [load(root, size=8).fingerprint] and [p.returncode for p in both] == [0, 0]


FULL = """
import resource, sys, warnings
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from dddm.data import load
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always"); images = load(sys.argv[1])
print(images.fingerprint, len(images), "decoded into memory" in str(said[-1].message))
"""


@pytest.mark.skipif(os.name == "nt", reason="file size limits are a Unix matter")
def test_a_file_that_cannot_grow_falls_back_to_memory(tmp_path, cache):
    root = tmp_path / "f"
    root.mkdir()
    some = [encoded(picture(i)) for i in range(20)]
    for i in range(2000):
        (root / f"{i:05}.png").write_bytes(some[i % 20])
    out = subprocess.run(
        [sys.executable, "-c", FULL, str(root)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not list(cache.glob("*"))
    assert out == [load(root).fingerprint, "2000", "True"]


def test_a_cache_that_cannot_be_made_falls_back_to_memory(tmp_path):
    root = make_folder(tmp_path / "f")
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="decoded into memory"):
        images = load(root, cache=tmp_path / "file" / "cache")
    assert images.fingerprint == load(root).fingerprint and images.class_names == ["cat", "dog"]
    x, y = images.get(torch.tensor([9, 0]))
    assert y.tolist() == [1, 0] and torch.equal(x, load(root).get(torch.tensor([9, 0]))[0])


def test_a_full_disk_late_in_the_writing(tmp_path, cache, monkeypatch):
    root = make_folder(tmp_path / "f")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data_module.os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left"):
        images = load(root)
    assert len(images) == 10 and not list(cache.glob("*"))


# --- mirrored images and the store


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_the_store_keeps_one_orientation(tmp_path, dtype):
    "A 'model' that answers its input image: whatever was mirrored, the store ends up holding the files' orientation."
    images, g = load(make_folder(tmp_path / "f")), torch.Generator().manual_seed(0)
    store = EstimateStore(len(images), images.shape, dtype, path=tmp_path / "s")
    for _ in range(3):
        for index in torch.randperm(10, generator=g).split(4):
            mask = torch.rand(len(index), generator=g) < 0.5
            x0 = flip(images.get(index)[0], mask)
            store.write(index, flip(x0, mask))
    assert (store.read(torch.arange(10)) - images.get(torch.arange(10))[0]).abs().max() < 1e-6


# --- a real data set, where it is at hand


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
