"The estimate store where a lesson cannot show it: kills, files, other processes, sizes, recomputed numbers."

import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pytest
import torch

from dddm import store as store_module
from dddm.store import DTYPES, EstimateStore, seeded_normal

SHAPE = (3, 8, 8)
Usage = namedtuple("Usage", "total used free")


def test_seeded_normal_is_philox_keyed_by_seed_and_row():
    for seed, row, stream in ((0, 0, 0), (7, 1281166, 0), (2**62, 3, 1)):
        philox = np.random.Philox(
            key=np.array([seed, row], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64)
        )
        expected = np.random.Generator(philox).standard_normal(SHAPE, np.float32)
        assert torch.equal(seeded_normal(seed, [row], SHAPE, stream)[0], torch.from_numpy(expected))


def test_seeded_normal_does_not_touch_global_generators():
    torch.manual_seed(0)
    np.random.seed(0)
    a = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    seeded_normal(3, range(5), SHAPE)
    assert (torch.rand(1), np.random.rand()) == a


@pytest.mark.parametrize("dtype", DTYPES)
def test_file_and_memory_agree_and_a_state_restores(tmp_path, dtype):
    n, g = 50, torch.Generator().manual_seed(0)
    kept = [
        EstimateStore(n, SHAPE, dtype, seed=3),
        EstimateStore(n, SHAPE, dtype, path=tmp_path / "s", seed=3),
    ]
    for _ in range(6):
        index = torch.randperm(n, generator=g)[:7]
        x = torch.rand(7, *SHAPE, generator=g) * 3 - 1.5
        for s in kept:
            s.write(index, x)
        assert torch.equal(kept[0].read(index), kept[1].read(index))
    everything = torch.arange(n)
    for s in (kept[1], EstimateStore(n, SHAPE, dtype, path=tmp_path / "s", seed=3)):
        assert torch.equal(kept[0].read(everything), s.read(everything)) and s.unwritten == kept[0].unwritten
    torch.save(kept[0].state_dict(), tmp_path / "state.pt")
    fresh = EstimateStore(n, SHAPE, dtype, seed=3)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (
        torch.equal(fresh.read(everything), kept[0].read(everything)) and fresh.unwritten == kept[0].unwritten
    )


@pytest.mark.parametrize("world", [2, 3, 5])
def test_shares_together_are_the_whole_store(world):
    n, whole = 13, EstimateStore(13, SHAPE, "float32", seed=9)
    shares = [EstimateStore(n, SHAPE, "float32", seed=9, share=(r, world)) for r in range(world)]
    index, x = torch.tensor([0, 12, 5, 7]), torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    whole.write(index, x)
    for i, row in zip(index, x):
        shares[i % world].write(i[None], row[None])
    for i in torch.arange(n):
        assert torch.equal(shares[i % world].read(i[None]), whole.read(i[None]))
    assert sum(s.nbytes for s in shares) == whole.nbytes


WRITER = """
import sys, torch
from dddm.store import EstimateStore
store = EstimateStore(400, (3, 64, 64), path=sys.argv[1])
print("ready", flush=True)
for i in torch.randperm(400).split(4): store.write(i, (i + 1.0).reshape(-1, 1, 1, 1).expand(-1, 3, 64, 64))
"""


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.01])
def test_a_kill_leaves_every_written_row_whole(tmp_path, delay):
    path = tmp_path / "s"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "ready\n"
    time.sleep(delay)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    store = EstimateStore(400, (3, 64, 64), path=path)
    written = store.written.nonzero().flatten()
    if len(written):
        assert torch.equal(store.read(written), (written + 1.0).reshape(-1, 1, 1, 1).expand(-1, 3, 64, 64))
    missing = (~store.written).nonzero().flatten()
    assert torch.equal(store.read(missing), seeded_normal(0, missing, (3, 64, 64)))


def test_a_half_made_file_is_ignored_and_a_damaged_one_refused(tmp_path):
    path = tmp_path / "s"
    (tmp_path / "s.1.part").write_bytes(b"half")
    EstimateStore(5, SHAPE, path=path).write(torch.tensor([0]), torch.zeros(1, *SHAPE))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="cut short"):
        EstimateStore(5, SHAPE, path=path)
    path.write_bytes(b"X" + whole[1:])
    with pytest.raises(ValueError, match="not an estimate store"):
        EstimateStore(5, SHAPE, path=path)
    path.write_bytes(whole)
    for change in (dict(n=6), dict(shape=(3, 8, 4)), dict(dtype="uint8"), dict(seed=1), dict(share=(0, 2))):
        with pytest.raises(ValueError, match="holds another store"):
            EstimateStore(**{**dict(n=5, shape=SHAPE, path=path), **change})
    assert path.read_bytes() == whole


def test_a_disk_too_small_is_known_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OSError, match="needs .* GB") as e:
        EstimateStore(100, SHAPE, path=tmp_path / "s")
    assert e.value.filename == str(tmp_path / "s") and not list(tmp_path.iterdir())


def test_imagenet_size_opens_at_once_and_takes_no_space(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: Usage(free.total, free.used, 10**12))
    try:
        store = EstimateStore(1281167, (3, 64, 64), path=tmp_path / "s")
    except OSError as e:
        pytest.skip(f"this file system has no sparse files of 31 GB: {e}")
    assert store.nbytes == 1281167 * 3 * 64 * 64 * 2
    index = torch.tensor([0, 1281166])
    store.write(index, torch.zeros(2, 3, 64, 64))
    assert store.read(index).abs().max() == 0 and store.unwritten == 1281165
    assert (tmp_path / "s").stat().st_blocks * 512 < 1e7


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        EstimateStore(5, SHAPE, path=tmp_path / "nowhere" / "s")


def test_large_finite_values_are_kept_although_their_sum_overflows():
    store = EstimateStore(4, SHAPE, "float32")
    x = torch.full((2, *SHAPE), 3e38)
    store.write(torch.tensor([0, 1]), x)
    assert torch.equal(store.read(torch.tensor([0, 1])), x)
    for value in (float("inf"), float("-inf"), float("nan")):
        bad = torch.zeros(2, *SHAPE)
        bad[1, 0, 0, 0] = value
        with pytest.raises(ValueError, match="sample 3"):
            store.write(torch.tensor([2, 3]), bad)
    bad = torch.zeros(1, *SHAPE)
    bad[0, 0, 0, :2] = torch.tensor([float("inf"), float("-inf")])
    for dtype in DTYPES:
        with pytest.raises(ValueError, match="cannot hold"):
            EstimateStore(4, SHAPE, dtype).write(torch.tensor([2]), bad)


def test_half_precision_input_and_gradients():
    store = EstimateStore(4, SHAPE, "uint8")
    x = (
        (torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1)
        .bfloat16()
        .requires_grad_()
    )
    store.write(torch.arange(4), x)
    out = store.read(torch.arange(4))
    assert (
        out.dtype == torch.float32
        and not out.requires_grad
        and (out - x.detach().float()).abs().max() <= 1 / 255 + 1e-6
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_it_keeps_what_it_keeps_on_the_cpu(dtype):
    g = torch.Generator().manual_seed(0)
    there, here = (EstimateStore(20, SHAPE, dtype, device=d) for d in ("cuda", "cpu"))
    index, x = torch.randperm(20, generator=g)[:6], torch.rand(6, *SHAPE, generator=g) * 2 - 1
    there.write(index.cuda(), x.cuda())
    here.write(index, x)
    out = there.read(torch.arange(20, device="cuda"))
    assert out.is_cuda and (out.cpu() - here.read(torch.arange(20))).abs().max() <= (
        2 / 255 if dtype == "uint8" else 0
    )
    fresh = EstimateStore(20, SHAPE, dtype)
    state = there.state_dict()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.read(torch.arange(20)), out.cpu())


@pytest.mark.parametrize("wrong", [dict(seed=-1), dict(seed=2**63), dict(seed=True), dict(path=".")])
def test_arguments_are_named_at_once(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EstimateStore(4, SHAPE, **wrong)


def test_shares_of_another_world_are_taken_over():
    "Every sample reads the same from two shares, from one store, from three; unwritten rows too."
    index, n = torch.arange(11), 11
    shared = lambda world: [
        EstimateStore(n, (1, 2, 2), torch.float32, seed=3, share=(r, world)) for r in range(world)
    ]

    def read_all(stores):
        return torch.stack([stores[i % len(stores)].read(index[i : i + 1])[0] for i in range(n)])

    before = shared(2)
    for i in (0, 3, 4, 9):
        before[i % 2].write(index[i : i + 1], torch.full((1, 1, 2, 2), float(i)))
    expected = read_all(before)
    for world in (1, 3, 2):
        after = shared(world)
        for store in after:
            store.load_state_dict(*(s.state_dict() for s in before))
        assert torch.equal(read_all(after), expected)
        assert sum(s.unwritten for s in after) == n - 4
        before = after
    with pytest.raises(ValueError, match="the shares are"):
        shared(3)[0].load_state_dict(before[1].state_dict())
    other = EstimateStore(n, (1, 2, 2), torch.float16, seed=3)
    with pytest.raises(ValueError, match="is of the store"):
        other.load_state_dict(*(s.state_dict() for s in before))
