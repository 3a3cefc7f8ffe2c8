"Small data sets in every form, made for the tests of the rooms from `decoding` to `data`."

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib

import numpy as np
from PIL import Image

from dddm.sources import CIFAR10


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
    "torchvision's folder, five pickles of Python 2 style and the class names; returns pixels and labels."
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


def idx(array):
    "An array of bytes as an idx file."
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def make_mnist(root, name="MNIST", count=20, packed=True, labels=lambda i: i % 10):
    "torchvision's folder with idx files, packed or not; returns the training set's pixels and labels."
    raw, rng = root / name / "raw", np.random.default_rng(2)
    raw.mkdir(parents=True)
    for split, n in ("t10k", count // 2), ("train", count):
        pixels = rng.integers(0, 256, (n, 28, 28), np.uint8)
        marks = np.array([labels(i) for i in range(n)], np.uint8)
        for kind, array in ("images-idx3", pixels), ("labels-idx1", marks):
            content = gzip.compress(idx(array)) if packed else idx(array)
            (raw / f"{split}-{kind}-ubyte{'.gz' * packed}").write_bytes(content)
    return pixels, marks.tolist()


def make_imagenet(root, per_batch=3):
    root.mkdir()
    rng, pixels, marks = np.random.default_rng(1), [], []
    for b in range(1, 11):
        rows, label = rng.integers(0, 256, (per_batch, 12288), np.uint8), rng.integers(1, 1001, per_batch)
        np.savez(root / f"train_data_batch_{b}.npz", data=rows, labels=label, mean=rows.mean(0))
        pixels.append(rows)
        marks.append(label)
    return np.concatenate(pixels), np.concatenate(marks)


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
