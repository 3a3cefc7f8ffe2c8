"What a run's directory goes through: damage, strangers, a full disk, a second process, old names."

import dataclasses
import errno
import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
from PIL import Image
from small_runs import TINY, assert_same_run

from dddm import passes, runs, training
from dddm import store as store_module
from dddm.config import TrainConfig
from dddm.data import digits
from dddm.runs import checkpoints, history, load, newest_checkpoint, read_config
from dddm.training import train


@pytest.mark.parametrize("harm", ["flipped byte", "cut short", "missing"])
def test_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, harm):
    whole = train(TrainConfig(**TINY), tmp_path / "whole", progress=False)

    def stop(record):
        if record["step"] == 9:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train(TrainConfig(**TINY), tmp_path / "run", callback=stop, progress=False)
    victim = checkpoints(tmp_path / "run" / "checkpoints")[-1] / "state.pt"
    content = bytearray(victim.read_bytes())
    if harm == "flipped byte":
        content[len(content) // 2] ^= 4
        victim.write_bytes(content)
    elif harm == "cut short":
        victim.write_bytes(content[:1000])
    else:
        victim.unlink()
    with pytest.warns(UserWarning, match="step-8 is damaged: state.pt"):
        train(TrainConfig(**TINY), tmp_path / "run", progress=False)
    assert_same_run(whole, tmp_path / "run")


def test_all_checkpoints_damaged(tmp_path):
    run = train(TrainConfig(**{**TINY, "epochs": 1}), tmp_path / "run", progress=False)
    for folder in checkpoints(run / "checkpoints"):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="every checkpoint"):
        load(run)


def test_no_room_is_seen_before_the_first_step(tmp_path, monkeypatch):
    usage = type("usage", (), dict(free=1000))
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="free some space"):
        train(TrainConfig(**TINY), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "history.jsonl").exists()


def test_directory_of_another_run(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        train(TrainConfig(**TINY), tmp_path / "other", progress=False)
    run = train(TrainConfig(**{**TINY, "epochs": 1}), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="lr: 0.0002 there, 0.1 here"):
        train(TrainConfig(**{**TINY, "lr": 0.1}), run, progress=False)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(TrainConfig(**TINY), run, resume=False, progress=False)
    with pytest.raises(FileNotFoundError, match="no run directory"):
        load(tmp_path / "nothing")


def test_a_process_that_is_refused_leaves_the_run_alone(tmp_path):
    """While one process trains, another is refused before it touches configuration, history or the store's
    file."""
    fields = {**TINY, "epochs": 1, "store_path": str(tmp_path / "store.bin")}
    run = train(TrainConfig(**fields), tmp_path / "run", progress=False)
    (run / "history.jsonl").write_text(
        (run / "history.jsonl").read_text() + json.dumps(dict(step=99)) + "\n"
    )  # the other one is ahead of its checkpoint
    (tmp_path / "store.bin").write_bytes(bytes(b ^ 1 for b in (tmp_path / "store.bin").read_bytes()))
    files = [run / "config.json", run / "history.jsonl", tmp_path / "store.bin"]
    before = [p.read_bytes() for p in files]
    with runs.locked(run), pytest.raises(FileExistsError, match="another process"):
        train(TrainConfig(**{**fields, "epochs": 2, "sampler": "ddim"}), run, progress=False)
    assert [p.read_bytes() for p in files] == before


def test_a_strangers_configuration_is_kept(tmp_path):
    (tmp_path / "other").mkdir()
    for content in ('{"model_type": "bert"}', "", "[]"):
        (tmp_path / "other" / "config.json").write_text(content)
        with pytest.raises(FileExistsError, match="holds no run"):
            train(TrainConfig(**TINY), tmp_path / "other", progress=False)
        assert (tmp_path / "other" / "config.json").read_text() == content


def test_fewer_epochs_than_were_trained(tmp_path):
    run = train(TrainConfig(**{**TINY, "epochs": 2}), tmp_path / "run", progress=False)
    before = (run / "config.json").read_text()
    with pytest.raises(ValueError, match="16 steps, more than the 8 of epochs=1; give at least 2"):
        train(TrainConfig(**{**TINY, "epochs": 1}), run, progress=False)
    assert (run / "config.json").read_text() == before


def test_more_epochs_where_steps_follow_the_progress(tmp_path):
    """A rate that falls, or noise levels that double, depend on the number of epochs: the longer run says
    that it is another one."""
    for name, more in (("rate", dict(lr_decay=0.5)), ("levels", dict(objective="consistency"))):
        fields = {**TINY, **more}
        run = train(TrainConfig(**{**fields, "epochs": 1}), tmp_path / name, progress=False)
        with pytest.warns(UserWarning, match="begun with epochs=1"):
            train(TrainConfig(**{**fields, "epochs": 2}), run, progress=False)


def test_odd_files_in_a_run(tmp_path):
    "A copy of a checkpoint is passed over; what cannot be read is named."
    run = train(TrainConfig(**{**TINY, "epochs": 1}), tmp_path / "run", progress=False)
    newest = checkpoints(run / "checkpoints")[-1]
    shutil.copytree(newest, newest.with_name(newest.name + ".bak"))
    assert checkpoints(run / "checkpoints")[-1] == newest and load(run) is not None
    (newest / "manifest.json").write_text("[]")
    with pytest.warns(UserWarning, match="does not list the files"):
        load(run)
    config = read_config(run).to_dict()
    (run / "config.json").write_text(json.dumps({**config, "net": {**config["net"], "base": 32}}))
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="of another network than the one in .*config.json"),
    ):
        load(run)
    (run / "config.json").write_text("")
    for use in (lambda: load(run), lambda: train(TrainConfig(**TINY), run, progress=False)):
        with pytest.raises(ValueError, match="config.json is not the configuration of a run"):
            use()


def test_resume_on_other_images(tmp_path, monkeypatch):
    run = train(TrainConfig(**{**TINY, "epochs": 1}), tmp_path / "run", progress=False)
    real = digits()
    monkeypatch.setattr(
        passes, "load_images", lambda config: dataclasses.replace(real, fingerprint="another")
    )
    before = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file() and p.name != ".lock"}
    for back in (0, 1):
        with pytest.raises(ValueError, match="trained on other images"):
            train(TrainConfig(**{**TINY, "epochs": 2}), run, progress=False, back=back)
    after = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file() and p.name != ".lock"}
    assert after == before  # a start that is refused leaves the run as it was


def test_a_run_that_never_took_a_step_gives_way(tmp_path, monkeypatch):
    """A setting that fails late (here: the disk) must not leave a directory that refuses the corrected
    setting."""
    with monkeypatch.context() as patch:
        patch.setattr(training, "check_disk", lambda out, needed: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError):
            train(TrainConfig(**{**TINY, "epochs": 1}), tmp_path / "run", progress=False)
    for left in ("samples/step-0000004.png", "dddm/events", "store"):  # a grid, a tracker's folder, a store
        (tmp_path / "run" / left).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / left).write_bytes(b"of the start that failed")
    fields = {**TINY, "epochs": 1, "lr": 1e-3, "sample_every": 0}
    run = train(TrainConfig(**fields), tmp_path / "run", progress=False)
    assert not (run / "samples" / "step-0000004.png").exists()


def test_grids_of_steps_that_are_taken_again_are_drawn_again(tmp_path):
    fields = {**TINY, "epochs": 2, "lr_decay": 1.0, "sample_every": 3}
    run = train(TrainConfig(**fields), tmp_path / "run", progress=False)
    grids = lambda: {int(p.stem.removeprefix("step-")): p for p in (run / "samples").iterdir()}
    assert [*sorted(grids())] == [3, 6, 9, 12, 15, 16]
    before = grids()[15].read_bytes()
    with pytest.warns(UserWarning, match="was begun with epochs=2"):
        train(TrainConfig(**{**fields, "epochs": 3}), run, progress=False, back=1)  # from step 14
    assert [*sorted(grids())] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert grids()[15].read_bytes() != before


def test_disks_that_cannot_lock_or_flush_folders_warn(tmp_path, monkeypatch):
    "flock on Lustre or FUSE, fsync of a folder on CIFS, no fcntl on Windows: the run goes on."
    config, real = TrainConfig(**{**TINY, "epochs": 1}), os.fsync

    def refuse(*args):
        raise OSError(errno.ENOSYS, "not implemented")

    def no_folders(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "invalid")
        real(fd)

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="cannot be locked"):
        patch.setattr("fcntl.flock", refuse)
        train(config, tmp_path / "unlocked", progress=False)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="cannot be locked .*no flock"):
        patch.setattr(store_module, "fcntl", None)
        train(config, tmp_path / "windows", progress=False)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="cannot flush a folder"):
        patch.setattr(os, "fsync", no_folders)
        train(config, tmp_path / "unflushed", progress=False)
    assert_same_run(tmp_path / "unlocked", tmp_path / "unflushed")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    train(TrainConfig(**{**TINY, "epochs": 1, "store_path": "~/rows"}), "~/run", progress=False)
    assert {p.name for p in (tmp_path / "home").iterdir()} == {"run", "rows"} and not (
        tmp_path / "~"
    ).exists()
    assert load("~/run") is not None


def test_a_run_on_images_that_moved_goes_on(tmp_path, monkeypatch):
    "Spelt otherwise, or elsewhere: the same pictures. Others are refused."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDDM_CACHE", str(tmp_path / "cache"))
    for folder, first in (("pics", 0), ("elsewhere", 0), ("others", 9)):
        (tmp_path / folder).mkdir()
        for i in range(8):
            Image.new("RGB", (8, 8), (first + i, 9, 9)).save(tmp_path / folder / f"{i}.png")
    fields = {
        **TINY,
        "shape": (3, 8, 8),
        "batch": 4,
        "net": dict(base=8, multipliers=(1,), attention=(), estimate=(8,)),
    }
    config = lambda data, epochs: TrainConfig(**{**fields, "data": data, "epochs": epochs})
    train(config("pics", 1), "run", progress=False)
    assert "pics: 8 images of 8x8, RGB" in (tmp_path / "run" / "data.txt").read_text()
    for epochs, data in enumerate(("pics/", str(tmp_path / "pics"), "elsewhere"), 2):
        train(config(data, epochs), "run", progress=False)
    with pytest.raises(ValueError, match="other images"):
        train(config("others", 6), "run", progress=False)


def test_a_run_of_before_loads_and_goes_on(tmp_path):
    """A run whose config.json has the old names: its model loads, and a resumed run ends where an unbroken
    one does."""
    fields = {**TINY, "objective": "consistency", "level_distribution": "rising", "sampler": "iterate"}
    config = TrainConfig(**fields)

    def stop(record):
        if record["step"] == 9:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train(config, tmp_path / "run", callback=stop, progress=False)
    path = tmp_path / "run" / "config.json"
    old = read_config(path.parent).to_dict()
    old["rungs"], old["sampler"] = old.pop("level_distribution"), "fixed"
    path.write_text(json.dumps(old))
    assert load(tmp_path / "run").net is not None
    train(config, tmp_path / "run", progress=False)
    assert "rungs" not in json.loads(path.read_text())
    whole = train(config, tmp_path / "whole", progress=False)
    files = [newest_checkpoint(run) / "ema.safetensors" for run in (tmp_path / "run", whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert history(tmp_path / "run") == history(whole)


def test_what_a_killed_writer_had_begun_is_swept(tmp_path):
    run = train(TrainConfig(**{**TINY, "epochs": 1}), tmp_path / "run", progress=False)
    begun = [run / ".history.99999.part.jsonl", run / "samples" / ".step-0000001.99999.part.png"]
    for path in begun:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half a li")
    train(TrainConfig(**{**TINY, "epochs": 2}), run, progress=False)
    assert not any(path.exists() for path in begun)


def test_the_last_good_checkpoint_is_whole(tmp_path):
    run = train(TrainConfig(**TINY), tmp_path / "run", progress=False)
    before, last = checkpoints(run / "checkpoints")
    (last / "state.pt").write_bytes(b"")
    assert str(before) in runs.last_checkpoint_text(run)
    (before / "state.pt").write_bytes(b"")
    assert "are damaged" in runs.last_checkpoint_text(run)


def test_a_folder_of_data_txt_alone_is_nobodys_run(tmp_path):
    (tmp_path / "data.txt").write_text("my own")
    with pytest.raises(FileExistsError, match="holds no run"):
        train(TrainConfig(**TINY), tmp_path, progress=False)
    assert (tmp_path / "data.txt").read_text() == "my own"


def test_a_summary_in_a_locale_without_its_characters(tmp_path):
    "Of 13 classes some are left out, with an ellipsis: data.txt has it, and the terminal an escape."
    for k in range(13):
        (tmp_path / "set" / f"class{k}").mkdir(parents=True)
        Image.new("L", (8, 8), 10 * k).save(tmp_path / "set" / f"class{k}" / "0.png")
    fields = {**TINY, "data": str(tmp_path / "set"), "classes": 13, "batch": 13, "epochs": 1}
    (tmp_path / "config.json").write_text(json.dumps(TrainConfig(**fields).to_dict()))
    call = [sys.executable, "-m", "dddm.training", "config.json", "--out", "run"]
    old = os.environ | dict(PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C", PYTHONIOENCODING="ascii")
    done = subprocess.run(call, cwd=tmp_path, env=old, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    assert b"\\u2026" in done.stdout and "\u2026" in (tmp_path / "run" / "data.txt").read_text("utf-8")
