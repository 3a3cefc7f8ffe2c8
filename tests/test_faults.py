"Faults that a run meets: another run on its file, a full disk, damage, signals. Nothing is lost or silent."

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from dddm import extractors, runs, tables, training
from dddm.config import TrainConfig
from dddm.pictures import save_grid
from dddm.runs import history
from dddm.store import PAGE, EstimateStore, read_page
from dddm.training import train

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


def tiny(**fields):
    return TrainConfig(**{**TINY, **fields})


def command(folder, out, *options, **fields):
    "The command line that trains a tiny configuration, which is written to `folder`."
    path = folder / f"{out}.json"
    path.write_text(json.dumps(tiny(**fields).to_dict()))
    return [sys.executable, "-m", "dddm.training", str(path), "--out", str(folder / out), *options]


def start(folder, out, **fields):
    "A process that trains and has logged a step."
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command(folder, out, **fields), **pipes)
    while process.poll() is None and not (folder / out / "history.jsonl").exists():
        time.sleep(0.02)
    return process


def stop_at(step):
    def callback(record):
        if record["step"] == step:
            raise RuntimeError("stopped")

    return callback


def last_rows(run):
    return torch.load(runs.newest_checkpoint(run) / "store-0.pt", weights_only=True)["rows"]


# --- a store file belongs to one run ---


@pytest.mark.slow
def test_two_runs_at_a_time_on_one_store_file(tmp_path):
    "The second is refused at once, and the first ends as if it had been alone."
    rows = str(tmp_path / "rows")
    first = start(tmp_path, "first", epochs=15, store_path=rows)
    second = subprocess.run(command(tmp_path, "second", store_path=rows), capture_output=True, text=True)
    assert first.poll() is None, "the first run was over too soon for this test"
    assert second.returncode != 0 and f"{rows} is in use by another process" in second.stderr
    first.communicate()
    assert first.returncode == 0
    alone = train(tiny(epochs=15), tmp_path / "alone", progress=False)
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
    rows.unlink()  # its owner makes it again, from the checkpoint
    train(tiny(epochs=4, store_path=str(rows)), tmp_path / "moved", progress=False)
    alone = train(tiny(epochs=4), tmp_path / "alone", progress=False)
    assert torch.equal(last_rows(tmp_path / "moved"), last_rows(alone))
    shutil.rmtree(tmp_path / "moved")
    again = train(tiny(epochs=4, store_path=str(rows)), tmp_path / "moved", progress=False)  # in its place
    assert torch.equal(last_rows(again), last_rows(alone))


def test_store_files_and_runs_from_before_owners(tmp_path):
    "A file without an owner, and a run without an identity, go on; then the file is that run's."
    rows, run = tmp_path / "rows", tmp_path / "run"
    config = tiny(store_path=str(rows))
    with pytest.raises(RuntimeError):
        train(config, run, callback=stop_at(3), progress=False)
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
    with pytest.raises(RuntimeError) as caught:
        train(config, tmp_path / "run", callback=stop_at(2), progress=False)
    train(config, tmp_path / "run", progress=False)
    assert caught.value is not None


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no space")
def test_space_for_the_store_is_reserved(tmp_path, monkeypatch):
    shape, rows = (3, 64, 64), tmp_path / "rows"
    store = EstimateStore(400, shape, path=rows)
    assert rows.stat().st_blocks * 512 < store.nbytes / 10
    with store.owned("a", "there"):
        assert rows.stat().st_blocks * 512 >= store.nbytes
    rows.unlink()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="cannot have them .No space left") as caught:
        train(tiny(store_path=str(rows)), tmp_path / "run", progress=False)
    assert caught.value.filename == str(rows) and not rows.exists()
    monkeypatch.undo()
    train(tiny(store_path=str(rows)), tmp_path / "run", progress=False)


# --- readers: what is damaged is named, and shortens nothing ---


def test_a_torn_last_line_is_dropped_and_damage_amid_the_lines_is_told(tmp_path):
    run = train(tiny(), tmp_path / "run", progress=False)
    path, records = run / "history.jsonl", history(run)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(records) == 6
    path.write_bytes(b"".join(lines) + lines[-1][:20])
    assert history(run) == records
    for harm in (b"\0" * 30, b"{}", b"[1]", b'{"step": "3"}', b'{"step": 3, "epoch": 1}', b"\xff"):
        path.write_bytes(b"".join([*lines[:2], harm + b"\n", *lines[3:]]))
        with pytest.warns(UserWarning, match=r"line 3 of .*history.jsonl is damaged"):
            found = history(run)
        assert found == records[:2] + records[3:]
    with pytest.warns(UserWarning, match="line 3 of .*history.jsonl"):
        train(tiny(epochs=3), run, progress=False)  # the run goes on, and the damage stays visible
    with pytest.warns(UserWarning, match="line 3 of .*history.jsonl"):
        found = history(run)
    alone = train(tiny(epochs=3), tmp_path / "alone", progress=False)
    assert found == [r for r in history(alone) if r["step"] != 3]


def test_a_torn_line_is_no_warning(tmp_path, recwarn):
    good = dict(step=1, epoch=0.1, loss=1.0, loss_by_t=[1, 1, 1, 1.5])
    (tmp_path / "history.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good)[:-9])
    assert history(tmp_path) == [good] and not recwarn.list
    (tmp_path / "history.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good))
    assert history(tmp_path) == [good, good] and not recwarn.list


MANIFESTS = (
    '{"model.safetensors": 3}',
    '{"model.safetensors": {}}',
    '{"model.safetensors": {"bytes": "1", "sha256": 2}}',
    "3",
    "{",
    "",
)


def test_a_damaged_manifest_gives_way_to_the_checkpoint_before(tmp_path):
    run = train(tiny(epochs=1), tmp_path / "run", progress=False)
    before, newest = runs.checkpoints(run / "checkpoints")
    for text in MANIFESTS:
        (newest / "manifest.json").write_text(text)
        with pytest.warns(UserWarning, match="step-3 is damaged: manifest.json"):
            assert runs.newest_checkpoint(run) == before
    with pytest.warns(UserWarning, match="damaged"):
        train(tiny(epochs=1), run, progress=False)
    assert runs.newest_checkpoint(run) == newest


@pytest.mark.parametrize("text", [*MANIFESTS, None])
def test_damaged_manifests_alone_block_no_run(tmp_path, text):
    run = train(tiny(epochs=1), tmp_path / "run", progress=False)
    weights = runs.load(run).state_dict()
    before, newest = runs.checkpoints(run / "checkpoints")
    for checkpoint in (before, newest):
        path = checkpoint / "manifest.json"
        path.unlink() if text is None else path.write_text(text)
    with pytest.warns(UserWarning, match="step-3 is used without its manifest.*cannot be verified"):
        found = runs.load(run).state_dict()
    assert all(torch.equal(found[k], weights[k]) for k in weights)
    with pytest.warns(UserWarning, match="step-3 is used without its manifest"):
        train(tiny(), run, progress=False)
    alone = train(tiny(), tmp_path / "alone", progress=False)
    assert history(run) == history(alone) and torch.equal(last_rows(run), last_rows(alone))


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.pt", "store-0.pt"])
def test_without_manifests_what_can_be_checked_is_checked(tmp_path, name):
    run = train(tiny(epochs=1), tmp_path / "run", progress=False)
    for checkpoint in runs.checkpoints(run / "checkpoints"):
        (checkpoint / "manifest.json").unlink()
    before, newest = runs.checkpoints(run / "checkpoints")
    path = newest / name
    whole = path.read_bytes()
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        tensors[next(iter(tensors))].view(-1)[0] = float("nan")
        save_file(tensors, path)
    else:
        with zipfile.ZipFile(path) as z:
            at = z.getinfo(max(z.infolist(), key=lambda entry: entry.file_size).filename).header_offset + 200
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.warns(UserWarning):
        assert runs.newest_checkpoint(run) == before
    for harm in (whole[:-100], b"", whole[: len(whole) // 3]):
        path.write_bytes(harm)
        with pytest.warns(UserWarning):
            assert runs.newest_checkpoint(run) == before
    path.unlink()
    if name != "store-0.pt":
        with pytest.warns(UserWarning):
            assert runs.newest_checkpoint(run) == before


def test_lines_lost_at_the_end_of_the_history_are_told(tmp_path, recwarn):
    run = train(
        tiny(log_every=2, epochs=1), tmp_path / "run", progress=False
    )  # lines at 2 and, closing, at 3
    path, lost = run / "history.jsonl", "has no line of step 3"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(history(run)) == len(lines) == 2 and not recwarn.list
    for text in (b"", lines[0], lines[0] + lines[1][:30]):
        path.write_bytes(text)
        with pytest.warns(UserWarning, match=lost):
            history(run)
    path.write_bytes(whole[:-1] + b"\x0b")  # the line break itself
    with pytest.warns(UserWarning, match="line 2 of .* is damaged"):
        history(run)
    path.unlink()
    with pytest.warns(UserWarning, match="has no line of step 2"):  # the closing line is not missed there
        train(tiny(log_every=2), run, progress=False)
    path.write_bytes(whole)
    recwarn.clear()
    train(tiny(log_every=2), tmp_path / "longer", progress=False)
    stopped = train(tiny(log_every=2, epochs=1), tmp_path / "stopped", progress=False)
    with pytest.raises(RuntimeError):
        train(tiny(log_every=2), stopped, callback=stop_at(4), progress=False)
    history(stopped)
    train(tiny(log_every=2), stopped, progress=False)
    assert history(stopped) == history(tmp_path / "longer") and not recwarn.list


def test_removing_the_lock_lets_nobody_in(tmp_path):
    run = train(tiny(epochs=1), tmp_path / "run", progress=False)
    with runs.locked(run):
        (run / ".lock").unlink()
        with pytest.raises(FileExistsError, match="another process is training in"):
            train(tiny(), run, progress=False)
    train(tiny(), run, progress=False)


def test_damaged_features_and_results_are_named(tmp_path):
    tensor, path = torch.zeros(1), tmp_path / "f.safetensors"
    for about in ({}, {"identity": "{"}, {"identity": "[]"}, {"identity": "{}"}):
        save_file({"mu": tensor}, path, {"format": extractors.FORMAT, **about})
        found, why = extractors.read_features(path, {})
        assert found is None and why
    for listed in ([], {"a": {"fd": {}}}, {"a": 3}, None):
        (tmp_path / "r.json").write_text(
            json.dumps({"format": "dddm-results-1", "runs": listed, "about": {}})
        )
        with pytest.raises(ValueError, match="r.json"):
            tables.load_results(tmp_path / "r.json")


# --- writers: a name means a finished file ---

CUT = """
import os, sys
from dddm.store import whole_file
with whole_file(sys.argv[1]) as part:
    part.write_bytes(b"half")
    os.kill(os.getpid(), 9)
"""


def test_a_kill_while_writing_leaves_the_file_that_was(tmp_path):
    path = tmp_path / "file.txt"
    for before in (None, "whole"):
        if before:
            path.write_text(before)
        assert subprocess.run([sys.executable, "-c", CUT, str(path)]).returncode == -9
        assert path.exists() == bool(before) and (not before or path.read_text() == before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_others_may_read_what_is_written(tmp_path):
    "safetensors keeps its files to their owner; the umask decides here."
    before = os.umask(0o022)
    try:
        run = train(tiny(epochs=1), tmp_path / "run", progress=False)
    finally:
        os.umask(before)
    kept = [p for p in run.rglob("*") if p.is_file()]
    assert {oct(p.stat().st_mode & 0o777) for p in kept} == {"0o644"} and len(kept) > 8
    assert not [p for p in kept if ".part" in p.name]


def test_a_grid_that_a_kill_cut_short_is_made_again(tmp_path):
    run = train(tiny(epochs=1), tmp_path / "run", progress=False)
    picture = next(run.glob("samples/*.png"))
    whole = picture.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for cut in (b"", whole[:100], whole[:-1], bytes(flipped)):
        picture.write_bytes(cut)
        train(tiny(epochs=1), run, progress=False)
        assert picture.read_bytes() == whole


# --- signals and words ---

SIGNALS = [
    (signal.SIGTERM, "papermill"),
    (signal.SIGTERM, "kernel"),
    (signal.SIGTERM, "both"),
    (signal.SIGKILL, "papermill"),
]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_with_a_line(tmp_path, number):
    process = start(tmp_path, "run", epochs=5000, checkpoint_every=10**6)
    process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and runs.newest_checkpoint(tmp_path / "run")
    assert "Traceback" not in err and err.splitlines()[-1].startswith("dddm.training: ")


SLOW_DISK = """
import os, time
flush = os.fsync
os.fsync = lambda fd: (time.sleep(0.4), flush(fd))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number, whom", SIGNALS)
def test_whatever_ends_papermill_saves_the_run(root, tmp_path, number, whom):
    """Here a checkpoint takes seconds, and ipykernel would end a kernel without a parent within one.

    Ctrl-C is not among the signals: Jupyter itself ends the kernel five seconds after it.
    """
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    path = os.pathsep.join([str(tmp_path), str(root)])
    fields = (
        "{epochs: 5000, batch: 600, net: {base: 16, attention: [], estimate: [4]}, "
        "checkpoint_every: 1000000, log_every: 1, sample_every: 0, device: cpu}"
    )
    run, parameters = (
        tmp_path / "run",
        ["-y", f"{{preset: digits, out: {tmp_path / 'run'}, overrides: {fields}}}"],
    )
    command = [sys.executable, "-m", "papermill", "nbs/train.ipynb", str(tmp_path / "out.ipynb"), *parameters]
    job = subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE)
    while job.poll() is None and not (run / "history.jsonl").exists():
        time.sleep(0.1)
    (kernel,) = psutil.Process(job.pid).children()
    for process in (job, kernel)[dict(papermill=slice(0, 1), kernel=slice(1, 2), both=slice(0, 2))[whom]]:
        process.send_signal(number)
    job.communicate(timeout=120)
    kernel.wait(timeout=60)
    assert job.returncode != 0
    saved = runs.step_of(runs.newest_checkpoint(run))
    assert saved == history(run)[-1]["step"]  # the step it was in, and no more


def test_refusals_on_the_command_line_are_a_line(tmp_path, capsys):
    run = train(tiny(epochs=1), tmp_path / "run", progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    cases = [
        ("run", dict(lr=1.0), [], "lr: 0.0002 there, 1.0 here"),
        ("run", dict(epochs=1), ["--fresh"], "holds a run already"),
        ("run", dict(epochs=1), ["--back", "7"], "back=7"),
        ("other", {}, [], "holds no run"),
        ("new", dict(data=str(tmp_path / "nowhere")), [], "nowhere"),
    ]
    before = runs.checkpoints(run / "checkpoints")
    for out, fields, options, words in cases:
        with pytest.raises(SystemExit) as caught:
            training.main(command(tmp_path, out, *options, **fields)[3:])
        err = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2 and err[-1].startswith("dddm.training: ") and words in err[-1]
    assert runs.checkpoints(run / "checkpoints") == before


# --- a checkpoint that leads to a failure ---


def test_back_goes_on_from_the_checkpoint_before(tmp_path, monkeypatch):
    "A failure comes again from the newest checkpoint: the message names the way back, the option takes it."
    run, real, config = tmp_path / "run", training.step, tiny(epochs=4)

    def failing(run):
        if run.done == 7:
            raise FloatingPointError(training.not_finite_text(run, "the loss is nan", 7, torch.tensor([3])))
        return real(run)

    monkeypatch.setattr(training, "step", failing)
    with pytest.raises(FloatingPointError) as first:
        train(config, run, progress=False)
    with pytest.raises(FloatingPointError, match="step-7, from which.* before, step-6, give --back"):
        train(config, run, progress=False)
    assert "--back" not in str(first.value)
    monkeypatch.undo()
    train(config, run, progress=False, back=1)
    assert history(run) == history(train(config, tmp_path / "alone", progress=False))
    for wrong in (2, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"back={wrong}"):
            train(config, run, progress=False, back=wrong)


# --- other numbers of processes; averages of short runs ---


def test_a_run_without_a_store_goes_on_with_another_number_of_processes(tmp_path):
    fields = dict(objective="consistency", drop_last=True)
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    there = two + command(tmp_path, "run", epochs=2, **fields)[1:]
    done = subprocess.run(there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with pytest.warns(UserWarning, match=r"is of 2 device\(s\), this is 1"):
        train(tiny(epochs=4, **fields), tmp_path / "run", progress=False)
    assert [r["step"] for r in history(tmp_path / "run")] == list(range(1, 9))


def test_an_average_that_is_still_its_random_start_is_told(tmp_path, recwarn, capsys):
    slow = train(tiny(epochs=1, ema_warmup=False), tmp_path / "slow", progress=True)
    assert re.search(r"100% random start after \d steps \(ema=0.9999\)", capsys.readouterr().out)
    quick = train(tiny(epochs=1), tmp_path / "quick", progress=False)
    recwarn.clear()
    runs.load(slow, ema=False)
    runs.load(quick)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="100% the random start.*ema=False"):
        runs.load(slow)


def test_a_changed_number_in_a_small_file_is_noticed(tmp_path):
    "A digit that changed in history.jsonl or config.json is told from what was written."
    run = train(tiny(epochs=1), tmp_path / "run", progress=False)
    path = run / "history.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    assert len(history(run)) == 1 + len(rest) and "checksum" not in history(run)[0]
    record = json.loads(first)
    path.write_text(json.dumps({**record, "loss": record["loss"] + 1}) + "\n" + "".join(rest))
    with pytest.warns(UserWarning, match="line 1 of .* is damaged"):
        assert len(history(run)) == len(rest)
    del record["checksum"]  # as an earlier version wrote it
    path.write_text(json.dumps(record) + "\n" + "".join(rest))
    assert history(run)[0] == record

    path = run / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "batch": 601}))
    with pytest.raises(
        ValueError, match="config.json is not the configuration .*does not match its checksum"
    ):
        runs.load(run)
    del fields["checksum"]
    path.write_text(json.dumps(fields))
    assert runs.read_config(run) == tiny(epochs=1)


def test_a_grid_of_a_dict_of_samples_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"is a dict; expected one tensor.*samples\[1\]"):
        save_grid({1: torch.zeros(2, 1, 8, 8)}, tmp_path / "grid.png")
