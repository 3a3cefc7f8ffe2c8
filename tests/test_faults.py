"Faults that a run meets: another run on its file, a full disk, damaged lines and files, signals. Nothing is lost or silent."
import errno
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from dddm import training
from dddm.store import PAGE, EstimateStore, read_page
from dddm.training import TrainConfig, train

TINY = dict(
    net=dict(base=8, multipliers=(1,), blocks=1, attention=(), estimate=(8,)),
    c=0.01,
    batch=600,
    epochs=2,
    log_every=1,
    checkpoint_every=1,
    sample_every=0,
    device="cpu",
)


def tiny(**fields): return TrainConfig(**{**TINY, **fields})


def command(folder, out, *options, **fields):
    "The command line that trains a tiny configuration, which is written to `folder`."
    path = folder / f"{out}.json"
    path.write_text(json.dumps(tiny(**fields).to_dict()))
    return [sys.executable, "-m", "dddm.training", str(path), "--out", str(folder / out), *options]


def stop_at(step):
    def callback(record):
        if record["step"] == step: raise RuntimeError("stopped")
    return callback


def last_rows(run): return torch.load(training.newest_checkpoint(run) / "store-0.pt", weights_only=True)["rows"]


# --- a store file belongs to one run ---

def test_two_runs_at_a_time_on_one_store_file(tmp_path):
    "The second is refused at once, and the first ends as if it had been alone."
    rows = str(tmp_path / "rows")
    first = subprocess.Popen(command(tmp_path, "first", epochs=40, store_path=rows), stdout=subprocess.DEVNULL)
    while first.poll() is None and not (tmp_path / "first" / "history.jsonl").exists(): time.sleep(0.02)
    second = subprocess.run(command(tmp_path, "second", store_path=rows), capture_output=True, text=True)
    assert first.poll() is None, "the first run was over too soon for this test"
    assert second.returncode != 0 and f"{rows} is in use by another process" in second.stderr
    assert first.wait() == 0
    alone = train(tiny(epochs=40), tmp_path / "alone", progress=False)
    assert torch.equal(last_rows(tmp_path / "first"), last_rows(alone))


def test_two_runs_one_after_the_other_on_one_store_file(tmp_path):
    rows = tmp_path / "rows"
    first = train(tiny(epochs=1, store_path=str(rows)), tmp_path / "first", progress=False)
    before = rows.read_bytes()
    with pytest.raises(FileExistsError, match="belongs to another run, in .*first"):
        train(tiny(store_path=str(rows)), tmp_path / "second", progress=False)
    assert rows.read_bytes() == before
    train(tiny(epochs=2, store_path=str(rows)), first, progress=False)
    shutil.move(first, tmp_path / "moved")
    train(tiny(epochs=3, store_path=str(rows)), tmp_path / "moved", progress=False)
    rows.unlink()                                                       # its owner makes it again, from the checkpoint
    train(tiny(epochs=4, store_path=str(rows)), tmp_path / "moved", progress=False)
    assert torch.equal(last_rows(tmp_path / "moved"), last_rows(train(tiny(epochs=4), tmp_path / "alone", progress=False)))


def test_store_files_and_runs_from_before_owners(tmp_path):
    "A file without an owner, and a run without an identity, go on; then the file is that run's."
    rows, run = tmp_path / "rows", tmp_path / "run"
    with pytest.raises(RuntimeError): train(tiny(store_path=str(rows)), run, callback=stop_at(3), progress=False)
    about = read_page(rows)
    assert about.pop("owner")["directory"] == str(run)
    rows.write_bytes(json.dumps(about).encode().ljust(PAGE) + rows.read_bytes()[PAGE:])
    (run / ".id").unlink()
    train(tiny(store_path=str(rows)), run, progress=False)
    assert torch.equal(last_rows(run), last_rows(train(tiny(), tmp_path / "alone", progress=False)))
    assert read_page(rows)["owner"]["run"] == (run / ".id").read_text()


def test_an_interrupted_run_gives_its_store_file_free(tmp_path):
    "In a notebook the failed call's frames stay alive; its lock must not."
    config = tiny(store_path=str(tmp_path / "rows"))
    with pytest.raises(RuntimeError) as caught: train(config, tmp_path / "run", callback=stop_at(2), progress=False)
    train(config, tmp_path / "run", progress=False)
    assert caught.value is not None


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no space")
def test_space_for_the_store_is_reserved(tmp_path, monkeypatch):
    shape, rows = (3, 64, 64), tmp_path / "rows"
    store = EstimateStore(400, shape, path=rows)
    assert rows.stat().st_blocks * 512 < store.nbytes / 10
    with store.owned("a"): assert rows.stat().st_blocks * 512 >= store.nbytes
    rows.unlink()

    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="cannot have them .No space left") as caught:
        train(tiny(store_path=str(rows)), tmp_path / "run", progress=False)
    assert caught.value.filename == str(rows) and not rows.exists()
    monkeypatch.undo()
    train(tiny(store_path=str(rows)), tmp_path / "run", progress=False)
