"""Faults, injected by kind into small runs and files, and what came of each try.

    python tests/fault_tries.py nbs/results/faults.json

The second run of a kind has the same faults: each kind draws from its own seed. Only the instants of signals
are the clock's.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from dddm import data, evaluation, extractors, metrics, pictures, results, runs, tables, training, zoo
from dddm.config import TrainConfig
from dddm.store import whole_file, with_checksum

NOTHING = "nothing lost"
SAID = "made again or passed over, said so"
EARLIER = "one checkpoint earlier, said so"
RECORD = "a history line lost, said so"
REFUSED = "refused, naming the file"
LOST, SILENT, NAMELESS = "lost", "silent", "nameless"
GOOD, BAD = (NOTHING, SAID, EARLIER, RECORD, REFUSED), (LOST, SILENT, NAMELESS)
PLAIN = (ValueError, OSError, FloatingPointError)  # what the library raises where it refuses
NOBODY = 65534


# --- a world: pictures, a run that is over, and the run that it becomes when it goes on ---


class World:
    """20 grey images of 8x8; a run of 3 epochs (9 steps, checkpoints at 6 and 9), and one of 4.

    Histories have lines at even steps, and at the last.
    """

    def __init__(self, folder: Path):
        self.folder, self.pictures, self.number = folder, folder / "pictures", 0
        os.environ["DDDM_CACHE"] = str(folder / "cache")
        self.pictures.mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
        for i, picture in enumerate(pixels):
            Image.fromarray(picture).save(self.pictures / f"{i:02d}.png")
        self.done = training.train(self.config(3), folder / "done", progress=False)
        began = time.perf_counter()
        whole = training.train(self.config(4), folder / "whole", progress=False)
        self.seconds, self.end = time.perf_counter() - began, end_state(whole)

    def config(self, epochs: int, **fields) -> TrainConfig:
        net = dict(base=8, multipliers=(1,), blocks=1, attention=(), estimate=(8,), groups=4)
        fixed = dict(shape=(1, 8, 8), batch=8, log_every=2, checkpoint_every=3, sample_every=0, device="cpu")
        return TrainConfig(**{**dict(data=str(self.pictures), net=net), **fixed, "epochs": epochs, **fields})

    def new(self) -> Path:
        "A path that nobody has used."
        self.number += 1
        return self.folder / f"try-{self.number}"

    def copy(self) -> Path:
        "A copy of the run that is over."
        return Path(shutil.copytree(self.done, self.new()))


def end_state(run: Path) -> dict:
    "What a run left: its weights, their average, the store's rows, and its history."
    folder = runs.checkpoints(run / "checkpoints")[-1]
    store = torch.load(folder / "store-0.pt", weights_only=True)
    files = {name: load_file(folder / f"{name}.safetensors") for name in ("model", "ema")}
    weights = {f"{name}.{k}": v.numpy().tobytes() for name, kept in files.items() for k, v in kept.items()}
    rows = {k: store[k].view(torch.uint8).numpy().tobytes() for k in ("rows", "written")}
    return dict(step=folder.name, weights=weights, rows=rows, history=runs.history(run))


class Answer:
    "What a call gave: a value or an error, and the warnings on the way."

    def __init__(self, work):
        self.value = self.error = None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                self.value = work()
            except (Exception, SystemExit, KeyboardInterrupt) as e:
                self.error = e
        self.words = [str(w.message) for w in said]

    def refusal(self, name: str) -> str:
        "Whether the error is one of the library's, and says the name."
        return REFUSED if isinstance(self.error, PLAIN) and name in str(self.error) else NAMELESS


def judge_run(world: World, run: Path, name: str, **fields) -> str:
    "Go on to 4 epochs with a run in which the file of this name was damaged."
    answer = Answer(lambda: training.train(world.config(4, **fields), run, progress=False))
    if answer.error is not None:
        return answer.refusal(name)
    end = Answer(lambda: end_state(run))
    words, named = answer.words, any(name in w for w in answer.words)
    if words and not named:
        return NAMELESS
    if end.value == world.end:
        return went_back(words) or (SAID if words else NOTHING)
    kept = end.value is not None and all(end.value[k] == world.end[k] for k in ("step", "weights", "rows"))
    if kept and all(r in world.end["history"] for r in end.value["history"]):
        return RECORD if named else SILENT
    return LOST if words else SILENT


def went_back(words: list[str]) -> str | None:
    "Whether the words say that an earlier checkpoint was taken."
    passed_over = any("trying the one before" in w for w in words)
    return EARLIER if passed_over and not any("without its manifest" in w for w in words) else None


def judge_read(answer: Answer, right, name: str) -> str:
    "A reader was given a damaged file of this name; `right` says whether a value is what was written."
    if answer.error is not None:
        return answer.refusal(name)
    if answer.words and not any(name in w for w in answer.words):
        return NAMELESS
    if right(answer.value):
        return SAID if answer.words else NOTHING
    return LOST if answer.words else SILENT


# --- damage ---


def flip(path: Path, rng) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def remove(path: Path, rng) -> None:
    path.unlink()


HARMS = {"a flipped bit": flip, "cut short": cut, "missing": remove}


@contextlib.contextmanager
def unreadable(path: Path, tree: Path):
    "Within, nobody may read the file. Root may read all, so it becomes another user for the time."
    root = os.geteuid() == 0
    if root:
        for p in [tree, *tree.rglob("*")]:
            os.chown(p, NOBODY, NOBODY)
    mode = path.stat().st_mode
    path.chmod(0)
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        if path.exists():
            path.chmod(stat.S_IMODE(mode))


# --- processes ---


def start(work) -> int:
    "A process of its own that does the work: ended by a signal, or with 0, or 1 after an error it prints."
    if pid := os.fork():
        return pid
    status = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        warnings.simplefilter("ignore")
        work()
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
    except KeyboardInterrupt:
        status = 130
    finally:
        os._exit(status)


def wait(pid: int) -> int:
    "Its exit status, or the negative number of the signal that ended it."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Trap:
    """Counts the calls that write to the disk, and does something at one of them.

    at: which (None: none); full: give the error of a full disk instead of a kill. A kill in the midst of
    writing tensors leaves half their file.
    """

    def __init__(self, at: int | None = None, full: bool = False):
        self.at, self.full, self.count = at, full, 0

    @contextlib.contextmanager
    def set(self):
        safe = [m for m in (training, evaluation, extractors) if hasattr(m, "save_file")]
        places = [(os, "fsync"), (torch, "save"), *((m, "save_file") for m in safe)]
        if not self.full:  # these need no space
            places += [(os, name) for name in ("replace", "rename", "unlink", "mkdir", "rmdir")]
        before = [(place, name, getattr(place, name)) for place, name in places]
        for place, name, real in before:
            setattr(place, name, self.watched(name, real))
        try:
            yield
        finally:
            for place, name, real in before:
                setattr(place, name, real)

    def watched(self, name: str, real):
        def call(*args, **options):
            self.count += 1
            if self.count != self.at:
                return real(*args, **options)
            if not self.full:
                if name in ("save", "save_file"):
                    real(*args, **options)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "save_file":
                raise SafetensorError(
                    "Error while serializing: I/O error: No space left on device (os error 28)"
                )
            if name == "save":
                raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return call


def start_trapped(work, at: int) -> int:
    "A process that does the work, and is killed at the call of this number that writes to the disk."

    def trapped():
        with Trap(at).set():
            work()

    return start(trapped)


def count_calls(work, full: bool = False) -> int:
    trap = Trap(full=full)
    with trap.set():
        work()
    return trap.count


# --- kinds: each a function of the world, a random generator and a number of tries ---


def kills(world: World, rng, times: int):
    "SIGKILL at a random instant of a training; it is started again."
    for _ in range(times):
        run = world.new()
        pid = start(lambda run=run: training.train(world.config(4), run, progress=False))
        time.sleep(rng.uniform(0, 1.1 * world.seconds))
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        yield judge_run(world, run, "")


def kills_in_writes(world: World, rng, times: int):
    "SIGKILL at a call that writes, renames or removes a file of the run."
    work = lambda run: training.train(world.config(4), run, progress=False)
    calls = count_calls(lambda: work(world.new()))
    for _ in range(times):
        run = world.new()
        status = wait(start_trapped(lambda run=run: work(run), rng.randint(1, calls)))
        yield judge_run(world, run, "") if status == -signal.SIGKILL else LOST


def stopped(world: World, rng, times: int, number: int):
    "A signal that asks for the end, at a random instant after the first step."
    for _ in range(times):
        run = world.new()
        endless = world.config(10**5, checkpoint_every=10**6)
        pid = start(lambda run=run, c=endless: training.train(c, run, progress=False))
        while not (run / "history.jsonl").exists():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        os.kill(pid, number)
        if wait(pid) != 128 + number or not (saved := runs.checkpoints(run / "checkpoints")):
            yield LOST
            continue
        step = runs.step_of(saved[-1])
        lines = [r["step"] for r in runs.history(run)]
        whole = runs.damage(saved[-1]) is None and lines == list(range(2, step + 1, 2))
        yield NOTHING if whole and runs.load(run) is not None else LOST


def interrupts(world, rng, times):
    return stopped(world, rng, times, signal.SIGINT)


def terminations(world, rng, times):
    return stopped(world, rng, times, signal.SIGTERM)


def after_full(world: World, run: Path, answer: Answer) -> str:
    "A training met a full disk: its message, and the run when there is room again."
    if answer.error is not None and answer.refusal(str(run)) == NAMELESS:
        return NAMELESS
    if answer.error is None and not answer.words and (run / "checkpoints").exists():
        return judge_run(world, run, str(run))  # it did not come to that
    came = judge_run(world, run, str(run))
    return REFUSED if came == NOTHING and answer.error is not None else came


def full_calls(world: World, rng, times: int):
    "A call that writes says that the disk is full."
    work = lambda run: training.train(world.config(4), run, progress=False)
    calls = count_calls(lambda: work(world.new()), full=True)
    for _ in range(times):
        run = world.new()
        with Trap(rng.randint(1, calls), full=True).set():
            answer = Answer(lambda run=run: work(run))
        yield after_full(world, run, answer)


def full_limits(world: World, rng, times: int):
    "The system refuses to let a file grow beyond a size: every library meets it in its own way."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for _ in range(times):
        run = world.new()
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(2 ** rng.uniform(5, 16)), before[1]))
        try:
            answer = Answer(lambda run=run: training.train(world.config(4), run, progress=False))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        yield after_full(world, run, answer)


def full_disks(world: World, rng, times: int):
    "A real disk (in memory, 4 MB) that fills up in the middle of a training."
    disk = world.folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        return  # only root may mount one
    try:
        for i in range(times):
            run, filler, at = disk / f"run-{i}", disk / "filler", rng.choice([2, 4, 6, 8, 10])
            room = rng.randrange(200_000)

            def fill(record, filler=filler, at=at, room=room):
                if record["step"] == at:
                    filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - room)))

            answer = Answer(
                lambda run=run, fill=fill: training.train(world.config(4), run, callback=fill, progress=False)
            )
            filler.unlink()
            yield after_full(world, run, answer)
            shutil.rmtree(run)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # errors may still hold its files


def full_store(world: World, rng, times: int):
    "The disk has no room for the store's file."
    real = os.posix_fallocate

    def refuse(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for _ in range(times):
        run = world.copy()
        path = run.with_suffix(".rows")
        os.posix_fallocate = refuse
        try:
            answer = Answer(
                lambda run=run, path=path: training.train(
                    world.config(4, store_path=str(path)), run, progress=False
                )
            )
        finally:
            os.posix_fallocate = real
        came = answer.refusal(path.name) if answer.error is not None else SILENT
        yield came if judge_run(world, run, path.name, store_path=str(path)) == NOTHING else LOST


def harmed_runs(relative: str, harm, both: bool = False):
    "A kind: a file of a run that is over is damaged (in both checkpoints), and the run goes on."

    def kind(world: World, rng, times: int):
        for _ in range(times):
            run = world.copy()
            found = sorted(run.glob(relative))
            for path in found if both else found[-1:]:
                harm(path, rng)
            yield judge_run(world, run, found[-1].name)

    return kind


def harmed_grid(harm):
    "A kind: the last grid of samples is damaged, and the run is started again."

    def kind(world: World, rng, times: int):
        for _ in range(times):
            run = world.copy()
            (picture,) = (run / "samples").glob("*.png")
            whole = picture.read_bytes()
            harm(picture, rng)
            answer = Answer(lambda run=run: training.train(world.config(3), run, progress=False))
            yield judge_read(answer, lambda _, p=picture, w=whole: p.read_bytes() == w, picture.name)

    return kind


def unreadable_runs(world: World, rng, times: int):
    "A file of a run may not be read."
    names = [str(p.relative_to(world.done)) for p in sorted(world.done.rglob("*")) if p.is_file()]
    for k in range(times):
        run = world.copy()
        path = run / names[k % len(names)]
        with unreadable(path, run):
            came = judge_run(world, run, path.name)
        again = judge_run(world, run, path.name)  # readable again: nothing was spoilt meanwhile
        yield came if again in (NOTHING, SAID, EARLIER, came) else LOST


def harmed_loads(world: World, rng, times: int):
    "A file of a run is damaged, and its model and history are read."
    weights = {k: v for k, v in runs.load(world.done).state_dict().items()}
    raw = end_state(world.done)["history"]
    names = [
        p for p in world.done.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json", ".jsonl")
    ]
    same = lambda found: all(torch.equal(found[0][k], weights[k]) for k in weights) and found[1] == raw
    for k in range(times):
        run = world.copy()
        path = run / sorted(names)[k % len(names)].relative_to(world.done)
        rng.choice([flip, cut, remove])(path, rng)
        answer = Answer(lambda run=run: (runs.load(run).state_dict(), runs.history(run)))
        came = judge_read(answer, same, path.name)
        if came == LOST:  # an earlier checkpoint, or fewer lines: they must be right as far as they go
            fewer = all(r in raw for r in answer.value[1])
            came = (went_back(answer.words) or RECORD) if fewer else LOST
        yield came


def harmed_store_file(world: World, rng, times: int):
    "The store's file on disk is damaged between two starts."
    for k in range(times):
        run = world.copy()
        path = run.with_suffix(".rows")
        training.train(world.config(3, store_path=str(path)), run, progress=False)
        if k % 4 == 0:
            cut(path, rng)
        elif k % 4 == 1:
            flip(path, rng)
        else:  # its header
            content = bytearray(path.read_bytes())
            content[rng.randrange(len(content[:4096].rstrip()))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
        yield judge_run(world, run, path.name, store_path=str(path))


def two_runs_on_one_store(world: World, rng, times: int):
    "A second run is given the store file of one that trains, or that is over."
    for k in range(times):
        first, second = world.copy(), world.new()
        path = first.with_suffix(".rows")
        config = world.config(4, store_path=str(path))
        pid = start_owner(config, first, path, stays=k % 2 == 0)
        answer = Answer(lambda c=config, out=second: training.train(c, out, progress=False))
        if pid:
            os.kill(pid, signal.SIGKILL)
            wait(pid)
        refused = answer.refusal(path.name) if answer.error is not None else SILENT
        yield refused if judge_first(world, first, path) else LOST


def start_owner(config: TrainConfig, run: Path, path: Path, stays: bool) -> int | None:
    "The run that owns the store: the process in which it still trains, or None where it is over."
    if not stays:
        training.train(replace(config, epochs=3), run, progress=False)
        return None
    long = replace(config, epochs=10**5, checkpoint_every=10**6)
    pid = start(lambda: training.train(long, run, progress=False))
    while not path.exists() or (run / "history.jsonl").read_text().count("\n") < 6:
        time.sleep(0.01)
    return pid


def judge_first(world: World, run: Path, path: Path) -> bool:
    "Whether the run that owns the store goes on as if nothing had been."
    shutil.rmtree(run / "samples", ignore_errors=True)
    config_file = run / "config.json"
    config_file.write_text(json.dumps(world.config(3, store_path=str(path)).to_dict()))
    return judge_run(world, run, path.name, store_path=str(path)) == NOTHING


def two_runs_in_one_folder(world: World, rng, times: int):
    "A second process trains in a run's folder; in half of the tries the lock file was removed."
    for k in range(times):
        run = world.new()
        pid = start(lambda run=run: training.train(world.config(10**5), run, progress=False))
        while not (run / "history.jsonl").exists():
            time.sleep(0.01)
        if k % 2:
            (run / ".lock").unlink()
        answer = Answer(lambda run=run: training.train(world.config(10**5), run, progress=False))
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        good = runs.newest_checkpoint(run) is None or runs.load(run) is not None
        yield (answer.refusal(run.name) if answer.error is not None else SILENT) if good else LOST


def no_locks(world: World, rng, times: int):
    "The disk knows no locks, or cannot flush folders."
    flock, fsync = fcntl.flock, os.fsync

    def no_flock(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def files_only(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(fd)

    for k in range(times):
        run = world.copy()
        if k % 2:
            fcntl.flock = no_flock
        else:
            os.fsync = files_only
        try:
            yield judge_run(world, run, ".lock" if k % 2 else "cannot flush a folder")
        finally:
            fcntl.flock, os.fsync = flock, fsync


def moved_images(world: World, rng, times: int):
    "The images moved, are spelt otherwise, or one of them is another."
    for k in range(times):
        run, there = world.copy(), world.new()
        shutil.copytree(world.pictures, there)
        if k % 3 == 2:
            changed = Image.fromarray(np.full((8, 8), rng.randrange(256), np.uint8))
            changed.save(there / f"{rng.randrange(20):02d}.png")
            came = judge_run(world, run, run.name, data=str(there))
            yield came if came == REFUSED and judge_run(world, run, "") == NOTHING else LOST
        else:
            spelt = [str(there), os.path.relpath(there), f"{there}/", f"{there}/../{there.name}"][k % 4]
            yield judge_run(world, run, there.name, data=spelt)


def torn_lines(world: World, rng, times: int):
    "A kill cut the last line short: a line that was written after the newest checkpoint."
    line = (world.done / "history.jsonl").read_bytes().splitlines(keepends=True)[0]
    for _ in range(times):
        run = world.copy()
        for name in ("history.jsonl", "speed.jsonl"):
            path = run / name
            path.write_bytes(
                path.read_bytes() + line.replace(b'"step": 2', b'"step": 10')[: rng.randrange(1, 40)]
            )
        answer = Answer(lambda run=run: runs.history(run))
        came = judge_read(answer, lambda found: found == runs.history(world.done), "history.jsonl")
        yield came if came != NOTHING else judge_run(world, run, "history.jsonl")


# --- files that are read by themselves: how each is written, read, and compared ---


def result(value: float) -> metrics.Result:
    return metrics.Result("fd", value, 10, 10, "a", "digits", "b", "none", seed=0)


class Kept:
    "A kind of file: `write(path, k)` writes content number k, `read(path)` gives it back."

    def __init__(self, name, write, read, same=lambda a, b: a == b, damaged=None):
        self.name, self.write, self.read, self.same = name, write, read, same
        self.damaged = damaged  # the file in a folder that is damaged


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def picture_rows(k: int) -> dict:
    pixels = torch.arange(3 * 64).reshape(3, 1, 8, 8) + k
    return {"one": (pixels % 256) / 127.5 - 1, "two": ((pixels * 7) % 256) / 127.5 - 1}


def read_made_again(read):
    "A reader that gives nothing where the file has to be made again."

    def call(path):
        found = read(path)
        return None if found.images is None else dict(images=found.images, steps=torch.tensor(found.steps))

    return call


def study_rows(k: int) -> list:
    return [results.Row("paper", 0, "ddim", s, None, "fd", s + k / 10, 100) for s in (1, 2, 5)]


def write_kept_images(path, k):
    kept = evaluation.KeptImages(picture_rows(k)["one"], 5)
    evaluation.write_images(path, kept, dict(model="m", seed=0))


def small_features(k: int) -> extractors.Features:
    x = torch.linspace(-1, 1, 16 * 64).reshape(16, 1, 8, 8).roll(k)
    return extractors.extract(x, extractors.load_extractor("digits"), progress=False)


KEPT = [
    Kept(
        "results of an evaluation",
        lambda path, k: tables.save_results(path, {"a": {"fd": result(1.5 + k)}}, seed=0),
        lambda path: tables.load_results(path),
    ),
    Kept(
        "results of a study",
        lambda path, k: results.save_rows(path, dict(seed=0), study_rows(k), dict(command="c")),
        lambda path: results.load_rows(path),
    ),
    Kept(
        "kept images",
        lambda path, k: pictures.keep_images(picture_rows(k), path),
        pictures.kept_images,
        same_tensors,
    ),
    Kept(
        "samples of an evaluation",
        write_kept_images,
        read_made_again(lambda path: evaluation.read_images(path, dict(model="m", seed=0))),
        same_tensors,
    ),
]


def harmed_kept(kept: Kept, harm):
    "A kind: a file is damaged and read."

    def kind(world: World, rng, times: int):
        whole = world.new()
        kept.write(whole, 0)
        right = kept.read(whole)
        for _ in range(times):
            path = world.new()
            shutil.copy(whole, path)
            harm(path, rng)
            answer = Answer(lambda path=path: kept.read(path))
            if answer.error is None and answer.value is None and any(path.name in w for w in answer.words):
                yield SAID  # it is made again
            else:
                yield judge_read(
                    answer, lambda found: found is not None and kept.same(found, right), path.name
                )

    return kind


def harmed_features(world: World, rng, times: int):
    "The cache of the reference's features is damaged; it is computed again."
    images, extractor = data.digits(), extractors.load_extractor("digits")
    see = lambda cache: extractors.reference_features(images, extractor, n=32, cache=cache, progress=False)
    cache = world.new()
    right = see(cache).features
    for k in range(times):
        copy = Path(shutil.copytree(cache, world.new()))
        path = next(copy.glob("features-*"))
        (flip, cut)[k % 2](path, rng)
        yield judge_read(
            Answer(lambda copy=copy: see(copy).features), lambda x: torch.equal(x, right), path.name
        )


def harmed_cache(suffix: str, harm):
    "A kind: the cache of decoded images is damaged; the images are decoded again."

    def kind(world: World, rng, times: int):
        cache, every = world.new(), torch.arange(20)
        see = lambda folder: data.load(world.pictures, cache=folder)
        right = see(cache)
        for _ in range(times):
            copy = Path(shutil.copytree(cache, world.new()))
            path = next(copy.glob(f"*.{suffix.split()[0]}"))
            if suffix == "npy header":
                content = bytearray(path.read_bytes())
                content[rng.randrange(128)] ^= 1 << rng.randrange(8)
                path.write_bytes(content)
            else:
                harm(path, rng)
            answer = Answer(lambda copy=copy: see(copy))
            same = lambda x: (
                torch.equal(x.get(every)[0], right.get(every)[0]) and x.fingerprint == right.fingerprint
            )
            yield judge_read(answer, same, path.stem)

    return kind


def harmed_export(name: str, harm):
    "A kind: a file of an exported model is damaged, and the model is opened."

    def kind(world: World, rng, times: int):
        whole = world.new()
        model = zoo.Pretrained.from_pretrained(world.done)
        model.save_pretrained(whole, description="d", command="c")
        right = zoo.Pretrained.from_pretrained(whole)
        same = lambda m: same_tensors(m.state_dict(), right.state_dict()) and m.config == right.config
        for _ in range(times):
            folder = Path(shutil.copytree(whole, world.new()))
            harm(folder / name, rng)
            yield judge_read(Answer(lambda f=folder: zoo.Pretrained.from_pretrained(f)), same, name)

    return kind


def killed_writers(world: World, rng, times: int):
    "SIGKILL while a small file is written over an older one: the older or the new one is there, whole."
    for k in range(times):
        kept, path = KEPT[k % len(KEPT)], world.new()
        kept.write(path, 0)
        first = kept.read(path)
        other = world.new()
        calls = count_calls(lambda kept=kept, other=other: kept.write(other, 1))
        second = kept.read(other)

        write = lambda kept=kept, path=path: kept.write(path, 1)
        wait(start_trapped(write, rng.randint(1, calls)))
        found = kept.read(path)
        yield NOTHING if kept.same(found, first) or kept.same(found, second) else LOST


def full_writers(world: World, rng, times: int):
    "A full disk while a small file is written: the older one stays, and the error names the file."
    for k in range(times):
        kept, path = KEPT[k % len(KEPT)], world.new()
        kept.write(path, 0)
        first = kept.read(path)
        calls = count_calls(lambda kept=kept: kept.write(world.new(), 1), full=True)
        with Trap(rng.randint(1, calls), full=True).set():
            answer = Answer(lambda kept=kept, path=path: kept.write(path, 1))
        came = answer.refusal(path.name) if answer.error is not None else SILENT
        yield came if kept.same(kept.read(path), first) else LOST


def killed_exports(world: World, rng, times: int):
    "SIGKILL while a model is exported over an older export."
    model = zoo.Pretrained.from_pretrained(world.done)
    write = lambda folder, text: model.save_pretrained(folder, description=text, command="c")
    first = world.new()
    write(first, "first")
    spare = Path(shutil.copytree(first, world.new()))
    calls = count_calls(lambda: write(spare, "second"))
    for _ in range(times):
        folder = Path(shutil.copytree(first, world.new()))

        wait(start_trapped(lambda folder=folder: write(folder, "second"), rng.randint(1, calls)))
        answer = Answer(lambda folder=folder: zoo.Pretrained.from_pretrained(folder))
        came = judge_read(answer, lambda m: m.description in ("first", "second"), folder.name)
        write(folder, "third")  # and it can be written
        yield came if zoo.Pretrained.from_pretrained(folder).description == "third" else LOST


def killed_caches(world: World, rng, times: int):
    "SIGKILL while images are decoded into the cache; they are read again."
    see = lambda folder: data.load(world.pictures, cache=folder)
    calls, right = count_calls(lambda: see(world.new())), see(world.new())
    for _ in range(times):
        folder = world.new()
        wait(start_trapped(lambda folder=folder: see(folder), rng.randint(1, calls)))
        answer = Answer(lambda folder=folder: see(folder))
        came = judge_read(answer, lambda x: x.fingerprint == right.fingerprint, str(folder))
        yield came if not list(folder.glob("*.part")) else LOST


CHECKPOINT = ("model.safetensors", "ema.safetensors", "state.pt", "store-0.pt")
GROUPS = {  # what the kinds are about: {kind: (its function, how often it is tried)}
    "a process is killed or stopped": {
        "SIGKILL of a training, at any instant": (kills, 40),
        "SIGKILL inside a write": (kills_in_writes, 60),
        "SIGINT": (interrupts, 15),
        "SIGTERM": (terminations, 15),
        "SIGKILL while a small file is written": (killed_writers, 24),
        "SIGKILL while a model is exported": (killed_exports, 20),
        "SIGKILL while images are decoded": (killed_caches, 15),
    },
    "the disk is full": {
        "full disk: a write fails": (full_calls, 25),
        "full disk: a file cannot grow": (full_limits, 25),
        "full disk, a real one": (full_disks, 20),
        "full disk: no room for the store": (full_store, 4),
        "full disk while a small file is written": (full_writers, 40),
    },
    "a file of a checkpoint is damaged": {
        **{
            f"{name}, {what}": (harmed_runs(f"checkpoints/*/{name}", harm), 3 if harm is remove else 12)
            for name in (*CHECKPOINT, "manifest.json")
            for what, harm in HARMS.items()
        },
        **{
            f"all manifests, {what}": (
                harmed_runs("checkpoints/*/manifest.json", harm, both=True),
                3 if harm is remove else 12,
            )
            for what, harm in HARMS.items()
        },
    },
    "another file of a run is damaged": {
        "config.json, a flipped bit": (harmed_runs("config.json", flip), 60),
        "config.json, cut short": (harmed_runs("config.json", cut), 10),
        "history.jsonl, a flipped bit": (harmed_runs("history.jsonl", flip), 30),
        "history.jsonl, cut short": (harmed_runs("history.jsonl", cut), 20),
        "history.jsonl, missing": (harmed_runs("history.jsonl", remove), 3),
        "history.jsonl, a last line that a kill tore": (torn_lines, 20),
        "speed.jsonl, a flipped bit": (harmed_runs("speed.jsonl", flip), 10),
        "the run's identity, a flipped bit": (harmed_runs(".id", flip), 5),
        "a grid of samples, a flipped bit": (harmed_grid(flip), 10),
        "a grid of samples, cut short": (harmed_grid(cut), 5),
        "a run's model and history are read, one file damaged": (harmed_loads, 40),
        "the store's file, damaged": (harmed_store_file, 24),
    },
    "a cache is damaged": {
        "the image cache's header, a flipped bit": (harmed_cache("npy header", flip), 40),
        "the image cache's pixels, a flipped bit": (harmed_cache("npy", flip), 40),
        "the image cache's pixels, cut short": (harmed_cache("npy", cut), 5),
        "the image cache's description, a flipped bit": (harmed_cache("json", flip), 60),
        "the image cache's description, cut short": (harmed_cache("json", cut), 10),
        "the features' cache, damaged": (harmed_features, 20),
    },
    "an exported model is damaged": {
        f"an exported model's {name}, {what}": (harmed_export(name, HARMS[what]), times)
        for name in ("config.json", "model.safetensors")
        for what, times in (("a flipped bit", 60), ("cut short", 20), ("missing", 1))
    },
    "results or kept images are damaged": {
        f"{kept.name}, {what}": (harmed_kept(kept, HARMS[what]), times)
        for kept in KEPT
        for what, times in (("a flipped bit", 60), ("cut short", 20))
    },
    "two runs at once; places": {
        "two runs on one store": (two_runs_on_one_store, 8),
        "two processes in one run, the lock removed or not": (two_runs_in_one_folder, 10),
        "a disk without locks, or without flushing of folders": (no_locks, 6),
        "a file of a run may not be read": (unreadable_runs, 20),
        "images that moved, or changed": (moved_images, 15),
    },
}
KINDS = {name: kind for kinds in GROUPS.values() for name, kind in kinds.items()}


def tries(world: World, name: str) -> Counter:
    "All tries of a kind: how many had which outcome."
    kind, times = KINDS[name]
    return Counter(kind(world, random.Random(name), times))


def main(path: str, *names: str) -> None:
    "Try all kinds, or those that are named, and write how many tries had which outcome."
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        world = World(Path(folder) / "world")
        for name in names or KINDS:
            began = time.time()
            found = tries(world, name)
            group = next(group for group, kinds in GROUPS.items() if name in kinds)
            rows.append([group, name, sum(found.values()), *(found[outcome] for outcome in (*GOOD, *BAD))])
            print(f"{time.time() - began:6.1f} s  {name}: {dict(found)}", flush=True)
    provenance = dict(
        command=f"python tests/fault_tries.py {path}",
        machine=f"{platform.system()}, one CPU thread",
        torch=torch.__version__,
        python=platform.python_version(),
    )
    kept = dict(columns=["group", "fault", "tries", *GOOD, *BAD], rows=rows, provenance=provenance)
    with whole_file(path) as part:
        part.write_text(json.dumps(with_checksum(kept), indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
