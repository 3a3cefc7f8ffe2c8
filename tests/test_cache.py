"The pixel cache: its places, damage, kills, full disks, several processes."

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from synthetic_sets import encoded, make_cifar, make_folder, picture, splits, written

from dddm import cache as cache_module
from dddm import layouts as layouts_module
from dddm.cache import cache_folder
from dddm.data import load

pytestmark = pytest.mark.usefixtures("pixel_cache")


def test_cache_folder_order(tmp_path, monkeypatch):
    assert cache_folder("here") == Path("here") and cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("DDDM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "dddm"


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


def damage(pixel_cache, how):
    array, side = next(pixel_cache.glob("*.npy")), next(pixel_cache.glob("*.json"))
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
def test_a_damaged_cache_is_made_again(tmp_path, pixel_cache, how):
    root = make_folder(tmp_path / "f")
    good = load(root)
    pixels, labels, mark = good.pixels.clone(), good.labels.clone(), good.fingerprint
    damage(pixel_cache, how)
    with pytest.warns(UserWarning, match="decoded again"):
        again = load(root)
    assert (
        torch.equal(again.pixels, pixels) and torch.equal(again.labels, labels) and again.fingerprint == mark
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(root)


def flip_bit(path, at):
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << at % 7
    path.write_bytes(content)


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_no_damaged_bit_blocks_or_passes(tmp_path, pixel_cache, suffix, step):
    root = make_folder(tmp_path / "f", each=2)
    good = load(root)
    pixels, mark = good.pixels.clone(), good.fingerprint
    file = next(pixel_cache.glob(f"*{suffix}"))
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
def test_a_sidecar_that_is_none(tmp_path, pixel_cache, content):
    root = make_folder(tmp_path / "f")
    mark = load(root).fingerprint
    next(pixel_cache.glob("*.json")).write_text(content, encoding="latin1")
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
def test_ill_typed_fields_of_an_older_sidecar(tmp_path, pixel_cache, field, value):
    "A sidecar without a checksum is believed where it is whole, and not where a field is of the wrong kind."
    root = make_folder(tmp_path / "f")
    mark, side = load(root).fingerprint, next(pixel_cache.glob("*.json"))
    meta = json.loads(side.read_text())
    del meta["checksum"]
    side.write_text(json.dumps(meta))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(root).fingerprint == mark
    side.write_text(json.dumps(meta | {field: value}))
    with pytest.warns(UserWarning, match="decoded again"):
        assert load(root).fingerprint == mark


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


def test_a_cache_that_understood_the_folder_otherwise_is_made_again(tmp_path, pixel_cache, monkeypatch):
    root = written(tmp_path, splits("Train", "Test"), "folder")
    with monkeypatch.context() as patch:
        patch.setattr(layouts_module, "split_kinds", lambda folders: [None] * len(folders))
        with pytest.warns(UserWarning):
            assert load(root).class_names == ["Test", "Train"]
    with pytest.warns(UserWarning, match="understood otherwise now"):
        assert load(root).class_names == ["a", "b"]


def test_a_foreign_file_is_never_overwritten(tmp_path, pixel_cache):
    root = make_folder(tmp_path / "f")
    load(root)
    side = next(pixel_cache.glob("*.json"))
    side.write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="was not written by dddm"):
        load(root)
    assert side.read_text() == '{"mine": 1}'


LOADER = """
import sys
from dddm.data import load
print(load(sys.argv[1], size=int(sys.argv[2])).fingerprint, flush=True)
"""


def test_a_kill_while_the_cache_is_written(tmp_path, pixel_cache):
    root = tmp_path / "f"
    root.mkdir()
    some = [encoded(picture(i, (64, 64))) for i in range(20)]
    for i in range(3000):
        (root / f"{i:05}.png").write_bytes(some[i % 20])
    writer = subprocess.Popen([sys.executable, "-c", LOADER, str(root), "64"])
    deadline = time.time() + 60

    def growing():
        try:
            return any(p.stat().st_size > 10**6 for p in pixel_cache.glob("*.part"))
        except FileNotFoundError:
            return False  # renamed between the listing and the look

    while not growing() and time.time() < deadline and writer.poll() is None:
        time.sleep(0.002)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert list(pixel_cache.glob("*.part")) and not list(pixel_cache.glob("*.json"))
    images = load(root, size=64)
    assert len(images) == 3000 and not list(pixel_cache.glob("*.part"))
    assert images.fingerprint == load(root, size=64, cache=tmp_path / "other").fingerprint


def test_two_processes_at_once(tmp_path):
    root = make_folder(tmp_path / "f", each=100)
    both = [
        subprocess.Popen([sys.executable, "-c", LOADER, str(root), "8"], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    out = [p.communicate()[0].split() for p in both]
    assert out[0] == out[1] == [load(root, size=8).fingerprint] and [p.returncode for p in both] == [0, 0]


def test_anothers_leftovers_do_not_matter(tmp_path, pixel_cache, monkeypatch):
    root = make_folder(tmp_path / "f")
    name = next(iter([load(root), *pixel_cache.glob("*.npy")][1:])).stem
    for file in pixel_cache.iterdir():
        file.unlink()
    (pixel_cache / f"{name}.999999999.part").mkdir()  # cannot be removed as a file
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load(root)) == 10


def leftover(folder, host, pid, age, name="set-0123456789abcdef"):
    "A `.part` file that a writer left `age` seconds ago."
    folder.mkdir(exist_ok=True)
    part = folder / ".".join(filter(None, (name, host, str(pid), "part")))
    part.write_bytes(b"x")
    os.utime(part, (time.time() - age,) * 2)
    return part


def test_leftovers_are_swept_and_others_files_stay(tmp_path, pixel_cache):
    "Those of any data set, whose writers are gone; never those that a process may still be writing."
    gone, here, me = 2**22 + 5, cache_module.HOST, os.getpid()  # no process has a number above 2**22
    young = psutil.Process().create_time()
    swept = [
        leftover(pixel_cache, here, gone, 0),
        leftover(pixel_cache, None, gone, 0),  # as an older version named them
        leftover(pixel_cache, "elsewhere", gone, 2 * cache_module.DAY),
        leftover(pixel_cache, here, me, time.time() - young + 60),  # written before this process began
    ]
    kept = [
        leftover(pixel_cache, "elsewhere", gone + 1, 60),
        leftover(pixel_cache, here, os.getppid(), 0),
        leftover(pixel_cache, here, gone, 0, name="film"),  # of another program
    ]
    load(make_folder(tmp_path / "f", each=1))
    assert not any(part.exists() for part in swept) and all(part.exists() for part in kept)


def test_a_slow_writer_keeps_its_file(tmp_path, pixel_cache):
    "A process that lives and began before its file was last changed may still be writing, however long ago."
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        part = leftover(pixel_cache, cache_module.HOST, sleeper.pid, 0)
        load(make_folder(tmp_path / "f", each=1))
        assert part.exists()
    finally:
        sleeper.kill()
        sleeper.wait()
    load(make_folder(tmp_path / "g", each=1))
    assert not part.exists()


FULL = """
import resource, sys, warnings
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from dddm.data import load
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always"); images = load(sys.argv[1])
print(images.fingerprint, len(images), "decoded into memory" in str(said[-1].message))
"""


@pytest.mark.skipif(os.name == "nt", reason="file size limits are a Unix matter")
def test_a_file_that_cannot_grow_falls_back_to_memory(tmp_path, pixel_cache):
    root = tmp_path / "f"
    root.mkdir()
    some = [encoded(picture(i)) for i in range(20)]
    for i in range(2000):
        (root / f"{i:05}.png").write_bytes(some[i % 20])
    out = subprocess.run(
        [sys.executable, "-c", FULL, str(root)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not list(pixel_cache.glob("*"))
    assert out == [load(root).fingerprint, "2000", "True"]


def test_a_cache_that_cannot_be_made_falls_back_to_memory(tmp_path):
    root = make_folder(tmp_path / "f")
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="decoded into memory"):
        images = load(root, cache=tmp_path / "file" / "cache")
    assert images.fingerprint == load(root).fingerprint and images.class_names == ["cat", "dog"]
    x, y = images.get(torch.tensor([9, 0]))
    assert y.tolist() == [1, 0] and torch.equal(x, load(root).get(torch.tensor([9, 0]))[0])


def test_a_full_disk_late_in_the_writing(tmp_path, pixel_cache, monkeypatch):
    root = make_folder(tmp_path / "f")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left"):
        images = load(root)
    assert len(images) == 10 and not list(pixel_cache.glob("*"))


@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_a_folder_where_the_cache_should_be(tmp_path, pixel_cache, suffix):
    root = make_folder(tmp_path / "f")
    mark, file = load(root).fingerprint, next(pixel_cache.glob(f"*{suffix}"))
    file.unlink()
    file.mkdir()
    with pytest.warns(UserWarning, match="decoded into memory"):
        assert load(root).fingerprint == mark


@pytest.mark.skipif(os.name == "nt", reason="file modes are a Unix matter")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_cache_has_the_mode_that_umask_says(tmp_path, pixel_cache, umask):
    before = os.umask(umask)
    try:
        load(make_folder(tmp_path / "f"))
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in pixel_cache.iterdir()} == {0o666 & ~umask}


WINDOWS = "import sys; sys.modules['fcntl'] = None; from dddm.data import load; print(len(load(sys.argv[1])))"


def test_without_what_windows_lacks(tmp_path):
    root = make_folder(tmp_path / "f")
    out = subprocess.run(
        [sys.executable, "-c", WINDOWS, str(root)], capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == "10"


def test_a_file_that_could_not_be_read_is_tried_again(tmp_path, monkeypatch):
    "Permissions, or a disk that answers late: the file is as it was, so its time tells nothing."
    root = make_folder(tmp_path / "set")

    def hurt(path, *mode):
        if Path(path).name == "003.png":
            raise PermissionError(13, "no")
        return open(path, *mode)

    with monkeypatch.context() as within:
        within.setattr(layouts_module, "open", hurt, raising=False)
        assert len(load(root, on_error="skip")) == 8
        with pytest.raises(ValueError, match="003.png cannot be read .PermissionError"):
            load(root)
    assert len(load(root, on_error="skip")) == len(load(root)) == 10
