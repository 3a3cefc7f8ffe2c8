"What the training notebook cannot show: real processes, kills, damage, a full disk, two devices."

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import TINY, assert_same_run, command, write_config

from dddm import passes, training
from dddm.config import TrainConfig, epoch_batches, learning_rate
from dddm.data import digits
from dddm.objectives import OBJECTIVES
from dddm.runs import checkpoints, history, load, newest_checkpoint
from dddm.training import start_run, train


def kill_and_resume(config, out, kills, seed):
    """Kill the run `kills` times, then let it finish. Returns how many it killed.

    Every other kill falls at a random instant of its start: imports, restoring, trimming the history. The
    others come after it logged something new, at a random moment: into steps, logs and checkpoints alike."""
    rng, done = random.Random(seed), 0
    logged = lambda: (out / "speed.jsonl").stat().st_size if (out / "speed.jsonl").exists() else 0
    for k in range(kills):
        before, process = (
            logged(),
            subprocess.Popen(command(config, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
        )
        if k % 2:
            time.sleep(rng.uniform(0, 6))
        else:
            while process.poll() is None and logged() <= before:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
        if process.poll() is not None:
            break  # it finished: no more to kill
        process.kill()
        process.wait()
        done += 1
    finished = subprocess.run(command(config, out), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return done


def test_killed_run_ends_where_the_unbroken_one_does(tmp_path):
    config = write_config(tmp_path / "config.json", epochs=12)
    subprocess.run(command(config, tmp_path / "whole"), check=True, capture_output=True)
    assert kill_and_resume(config, tmp_path / "broken", kills=3, seed=0) >= 1
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills(tmp_path):
    config = write_config(tmp_path / "config.json", epochs=80)
    subprocess.run(command(config, tmp_path / "whole"), check=True, capture_output=True)
    assert kill_and_resume(config, tmp_path / "broken", kills=20, seed=1) == 20
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_sigterm_saves_and_leaves(tmp_path):
    config = write_config(tmp_path / "config.json", epochs=200, checkpoint_every=10_000, log_every=1)
    process = subprocess.Popen(
        command(config, tmp_path / "run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (tmp_path / "run" / "speed.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err[-2000:]
    saved = checkpoints(tmp_path / "run" / "checkpoints")
    assert len(saved) == 1 and f"stopped after step {saved[0].name.removeprefix('step-')}" in out


def ranks(count, config, out):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    return [sys.executable, *launcher, *command(config, out)[1:]]


def two_ranks(config, out):
    return ranks(2, config, out)


def joined(n, batch, seed, epoch, world=1, drop_last=False):
    "What two ranks take at each step, for one process to take."
    return [[torch.cat(shares)] for shares in epoch_batches(n, batch, seed, epoch, 2)]


def test_two_processes_are_one(tmp_path):
    """Two gloo ranks against one process: the same global batches, equal gradients up to rounding.

    Every row is written by its owner alone. 1,797 samples in batches of 898 leave one sample, for rank 0, in
    the last batch: rank 1 then has none. Micro-batches cut each share. The rate is next to nothing, so that
    the comparison is of gradients and not of signs that Adam makes of rounding errors."""
    fields = dict(epochs=1, batch=898, micro_batch=200, lr=1e-12)
    config = write_config(tmp_path / "config.json", **fields)
    done = subprocess.run(two_ranks(config, tmp_path / "two"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = newest_checkpoint(tmp_path / "two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "epoch_batches", joined)
        one = newest_checkpoint(
            train(TrainConfig(**{**TINY, **fields, "micro_batch": None}), tmp_path / "one", progress=False)
        )
    assert one.name == two.name == "step-3"
    a, b = (
        torch.load(c / "state.pt", weights_only=True)["optimizer"]["state"] for c in (one, two)
    )  # Adam's first moment: the gradients of all steps
    largest = max(v["exp_avg"].abs().max() for v in a.values())
    assert a.keys() == b.keys() and largest > 0
    for key in a:
        assert (a[key]["exp_avg"] - b[key]["exp_avg"]).abs().max() < 1e-4 * largest
    whole = torch.load(one / "store-0.pt", weights_only=True)
    shares = [torch.load(two / f"store-{r}.pt", weights_only=True) for r in (0, 1)]
    assert [len(s["rows"]) for s in shares] == [899, 898] and all(s["written"].all() for s in shares)
    for r, s in enumerate(shares):
        torch.testing.assert_close(s["rows"].float(), whole["rows"][r::2].float(), rtol=1e-3, atol=1e-3)
    for a, b in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_a_quarter_of_t_without_samples_is_a_gap(tmp_path):
    "One sample a step: three quarters have no loss, and the mean is that of the fourth."
    fields = dict(batch=1, log_every=1, epochs=1, checkpoint_every=10_000)
    run = start_run(TrainConfig(**{**TINY, **fields}), tmp_path)
    training.step(run)
    record = training.log(run, 1.0, 1)
    assert record["loss_by_t"].count(None) == 3 and record["loss"] in record["loss_by_t"]
    assert history(tmp_path)[0]["loss_by_t"] == record["loss_by_t"]


def all_rows(checkpoint, world):
    shares = [torch.load(checkpoint / f"store-{r}.pt", weights_only=True)["rows"] for r in range(world)]
    rows = torch.empty(sum(map(len, shares)), *shares[0].shape[1:], dtype=shares[0].dtype)
    for r, share in enumerate(shares):
        rows[r::world] = share
    return rows


@pytest.mark.slow
def test_a_store_goes_on_with_another_number_of_processes(tmp_path):
    """Two processes, then one, then three: same global batch, each row at its new owner, the loss goes on.

    A run that began anew there would have the loss of its first step, which is twice the last one."""
    out, worlds = tmp_path / "run", (2, 1, 3)
    fields = dict(batch=256, log_every=1, checkpoint_every=10_000, store_path=str(tmp_path / "rows"))
    for k, world in enumerate(worlds):
        config = write_config(tmp_path / "config.json", epochs=3 * (k + 1), **fields)
        if world == 1:
            with pytest.warns(UserWarning, match=r"is of 2 device\(s\), this is 1"):
                run = start_run(TrainConfig(**{**TINY, **fields, "epochs": 6}), tmp_path / "run")
            assert torch.equal(run.store.rows, all_rows(newest_checkpoint(out), 2))
            del run
        done = subprocess.run(ranks(world, config, out), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(list(newest_checkpoint(out).glob("store-*.pt"))) == world
    loss = [r["loss"] for r in history(out)]
    assert [r["step"] for r in history(out)] == list(range(1, 9 * 8 + 1)) and loss[0] > 1.6 * loss[-1]
    for change in (24, 48):
        before, after = np.mean(loss[change - 4 : change]), np.mean(loss[change : change + 4])
        assert after < 1.1 * before


@pytest.mark.slow
def test_two_ranks_stop_together_and_resume(tmp_path):
    "SIGTERM to the launcher: both ranks save the same step; the resumed run ends as the unbroken one."
    config = write_config(tmp_path / "config.json", epochs=40, checkpoint_every=10_000, log_every=1)
    process = subprocess.Popen(
        two_ranks(config, tmp_path / "run"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (tmp_path / "run" / "speed.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    assert len(checkpoints(tmp_path / "run" / "checkpoints")) == 1
    for out in ("run", "whole"):
        subprocess.run(two_ranks(config, tmp_path / out), check=True, capture_output=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("objective", ["paper", "meanflow", "consistency"])
def test_micro_batches_change_nothing_but_rounding(objective, tmp_path):
    fields = {**TINY, "epochs": 1, "batch": 900, "objective": objective}
    runs = [
        train(TrainConfig(**fields, micro_batch=m), tmp_path / str(m), progress=False) for m in (None, 50)
    ]
    a, b = (
        torch.load(newest_checkpoint(r) / "state.pt", weights_only=True)["optimizer"]["state"] for r in runs
    )
    largest = max(v["exp_avg"].abs().max() for v in a.values())
    for key in a:
        assert (a[key]["exp_avg"] - b[key]["exp_avg"]).abs().max() < 1e-4 * largest


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    """The operating system refuses to let files grow (RLIMIT_FSIZE) after the first checkpoint; the run names
    that checkpoint, and goes on later."""
    config = write_config(tmp_path / "config.json")
    code = f"""
import resource, signal, sys
from dddm import store as store_module
from dddm import training
from dddm.config import TrainConfig
from dddm.data import digits
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def limit(record):
    if record["step"] == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
config = TrainConfig.from_dict(__import__("json").load(open({str(config)!r})))
training.train(config, {str(tmp_path / "run")!r}, callback=limit, progress=False)
"""
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        failed.returncode != 0
        and "could not be written" in failed.stderr
        and "the last good checkpoint is" in failed.stderr
        and "free more and run again" in failed.stderr
    ), failed.stderr[-2000:]
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-2"]
    whole = train(TrainConfig(**TINY), tmp_path / "whole", progress=False)
    train(TrainConfig(**TINY), tmp_path / "run", progress=False)
    assert_same_run(whole, tmp_path / "run")


def test_loss_that_is_no_number(tmp_path):
    """A rate that blows the weights up: the run stops, names step, samples and checkpoint, and the
    checkpoint's weights are finite."""
    with pytest.raises(FloatingPointError, match=r"the last good checkpoint is .*step-\d+") as caught:
        train(
            TrainConfig(**{**TINY, "lr": 1e19, "checkpoint_every": 1, "epochs": 20}),
            tmp_path / "run",
            progress=False,
        )
    named = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert named.name in str(caught.value) and all(
        v.isfinite().all() for v in load_file(named / "model.safetensors").values()
    )


def test_first_loss_that_is_no_number_names_step_and_samples(tmp_path, monkeypatch):
    broken = lambda model, d, batch, estimate: (
        torch.full((len(batch.x0),), float("nan"), requires_grad=True),
        batch.x0,
    )
    monkeypatch.setitem(OBJECTIVES, "paper", OBJECTIVES["paper"]._replace(loss=broken))
    with pytest.raises(
        FloatingPointError,
        match=r"the loss is nan at step 0 \(epoch 0\), for the samples \[\d+, "
        ".* no checkpoint had been saved",
    ):
        train(TrainConfig(**TINY), tmp_path / "run", progress=False)


def test_a_grid_that_fails_costs_no_training(tmp_path, monkeypatch):
    "The checkpoint comes first, the failure is a warning, and the next start makes the grid."
    config = TrainConfig(**{**TINY, "epochs": 1})
    with (
        monkeypatch.context() as patch,
        pytest.warns(UserWarning, match="no grid of samples at step 8.*No space left"),
    ):
        patch.setattr(
            training,
            "save_grid",
            lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")),
        )
        run = train(config, tmp_path / "run", progress=False)
    assert [p.name for p in checkpoints(run / "checkpoints")][-1] == "step-8" and not list(
        run.glob("samples/*")
    )
    train(config, run, progress=False)
    assert [p.name for p in run.glob("samples/*")] == ["step-0000008.png"]
    with pytest.raises(ValueError, match="seed=.*2.63-1"):
        TrainConfig(**{**TINY, "seed": 2**63})  # no sampler could take it


def test_longer_run_is_the_long_run(tmp_path):
    "One epoch, then made two, equals two at once, with a log interval that divides neither."
    fields = {**TINY, "log_every": 5}
    longer = train(TrainConfig(**{**fields, "epochs": 1}), tmp_path / "longer", progress=False)
    assert history(longer)[-1]["closing"]
    train(TrainConfig(**{**fields, "epochs": 2}), longer, progress=False)
    assert_same_run(longer, train(TrainConfig(**{**fields, "epochs": 2}), tmp_path / "whole", progress=False))


def test_a_second_run_may_want_another_format(tmp_path):
    for precision in ("float32", "bfloat16"):
        train(
            TrainConfig(**{**TINY, "epochs": 1, "precision": precision}), tmp_path / precision, progress=False
        )
    a, b = (history(tmp_path / p)[-1]["loss"] for p in ("float32", "bfloat16"))
    assert a != b and a == pytest.approx(b, rel=0.02)


def test_flipped_samples_keep_the_store_in_one_orientation(tmp_path, monkeypatch):
    """At t = 1 and F = 0 an estimate is its image. In the second epoch a mirrored image must meet its
    estimate mirrored, and the store hold it as the data have it."""
    seen = []

    def watch(model, d, batch, estimate):
        seen.append((batch.x0, batch.stored))
        return original.loss(model, d, batch, estimate)

    original = OBJECTIVES["paper"]
    monkeypatch.setitem(OBJECTIVES, "paper", original._replace(loss=watch))
    monkeypatch.setattr(
        training,
        "draw",
        lambda c, step, n, device: dict(
            t=torch.ones(n, dtype=torch.long),
            noise=torch.zeros(n, *c.shape),
            flips=torch.arange(n) % (2 + step) == 0,
        ),
    )
    run = train(
        TrainConfig(
            **{
                **TINY,
                "epochs": 2,
                "batch": 1797,
                "flip": True,
                "store_dtype": "float32",
                "lr": 1e-12,
                "log_every": 1,
            }
        ),
        tmp_path / "run",
        progress=False,
    )
    pixels = digits().get(torch.arange(1797))[0]
    for step, (x0, estimate) in enumerate(seen):
        index, mirrored = epoch_batches(1797, 1797, 0, step)[0][0], torch.arange(1797) % (2 + step) == 0
        assert torch.equal(x0[mirrored], pixels[index[mirrored]].flip(-1)) and torch.equal(
            x0[~mirrored], pixels[index[~mirrored]]
        )
        if step:
            torch.testing.assert_close(estimate, x0, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        torch.load(newest_checkpoint(run) / "store-0.pt", weights_only=True)["rows"],
        pixels,
        rtol=0,
        atol=1e-4,
    )


def test_conditional_and_store_in_a_file(tmp_path):
    "Labels reach the network, and a store in a file gives the same run as one in memory, also when resumed."
    fields = {**TINY, "classes": 10, "epochs": 2}
    memory = train(TrainConfig(**fields), tmp_path / "memory", progress=False)

    def stop(record):
        if record["step"] == 6:
            raise RuntimeError

    on_disk = TrainConfig(**fields, store_path=str(tmp_path / "store.bin"))
    with pytest.raises(RuntimeError):
        train(on_disk, tmp_path / "file", callback=stop, progress=False)
    train(on_disk, tmp_path / "file", progress=False)
    assert_same_run(memory, tmp_path / "file")
    with pytest.raises(ValueError, match="label"):
        load(memory)(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), torch.ones(1, dtype=torch.long))


def test_the_callers_random_state_is_left(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(TrainConfig(**{**TINY, "epochs": 1}), tmp_path / "run", progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_a_store_file_that_an_abandoned_run_left_is_not_read(tmp_path):
    """Killed before the first checkpoint, a run begins again; its store file must not remember the first
    attempt."""
    fields = {**TINY, "epochs": 1, "checkpoint_every": 100, "store_path": str(tmp_path / "store.bin")}

    def stop(record):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        train(TrainConfig(**fields), tmp_path / "file", callback=stop, progress=False)
    train(TrainConfig(**fields), tmp_path / "file", progress=False)
    memory = train(TrainConfig(**{**fields, "store_path": None}), tmp_path / "memory", progress=False)
    assert_same_run(memory, tmp_path / "file")


def test_the_rate_falls_over_the_last_share(tmp_path):
    """lr_decay: Adam's own rate, read at each step, is constant, then falls linearly; a run stopped in the
    fall ends where the whole one does; 0 leaves the paper's constant."""
    fields, seen = {**TINY, "epochs": 1, "checkpoint_every": 5, "lr": 1e-3, "lr_decay": 0.5}, []
    run = training.start_run(TrainConfig(**fields), tmp_path / "whole")
    while run.done < run.steps:
        training.step(run)
        seen.append(run.optimizer.param_groups[0]["lr"])
    torch.testing.assert_close(
        torch.tensor(seen), 1e-3 * ((1 - torch.arange(len(seen)) / len(seen)) / 0.5).clamp(max=1)
    )
    assert seen[0] == 1e-3 and learning_rate(TrainConfig(**{**TINY, "lr": 1e-3}), 0.99) == 1e-3
    training.save(run)

    def stop(record):
        if record["step"] >= 6:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(TrainConfig(**{**fields, "log_every": 6}), tmp_path / "broken", callback=stop, progress=False)
    train(TrainConfig(**{**fields, "log_every": 6}), tmp_path / "broken", progress=False)
    for part in ("model", "ema"):
        left, right = (
            load_file(newest_checkpoint(tmp_path / name) / f"{part}.safetensors")
            for name in ("whole", "broken")
        )
        for key in left:
            assert torch.equal(left[key], right[key]), key
    for wrong in (-0.1, 1.5, "half"):
        with pytest.raises(ValueError, match="lr_decay"):
            TrainConfig(**{**TINY, "lr_decay": wrong})


def test_a_distance_that_has_not_seen_imagenet_trains(tmp_path):
    """`distance_options: {features: digits}`: Pseudo-LPIPS on a trunk of our own, by name, through checkpoint
    and resume."""
    fields = dict(
        shape=(1, 8, 8),
        net=dict(base=8, multipliers=(1,), blocks=1, attention=(), estimate=(8,)),
        distance="pseudo_lpips",
        c=0.1,
        distance_options=dict(features="digits"),
        batch=600,
        sample_every=0,
        checkpoint_every=1,
    )
    train(TrainConfig(epochs=1, **fields), tmp_path / "run", progress=False)
    train(TrainConfig(epochs=2, **fields), tmp_path / "run", progress=False)
    losses = [r["loss"] for r in history(tmp_path / "run")]
    assert len(losses) and all(math.isfinite(v) and v > 0 for v in losses)
    with pytest.raises(ValueError, match="digts"):
        passes.open_distance(TrainConfig(**{**fields, "distance_options": dict(features="digts")}))


@pytest.mark.slow
def test_the_slurm_script_saves_and_queues_again(tmp_path, root):
    """The script of the notebook, on two ranks: SIGTERM, as SLURM sends it, leaves a checkpoint and a job in
    the queue."""
    text = next(
        c["source"]
        for c in json.loads((root / "nbs" / "09c_training.ipynb").read_text())["cells"]
        if "#SBATCH" in "".join(c["source"])
    )
    script = (
        "".join(text)
        .split("```bash\n")[1]
        .split("```")[0]
        .replace("torchrun", f"{sys.executable} -m torch.distributed.run --standalone")
    )
    script = (
        script.replace("--nproc_per_node 8", "--nproc_per_node 2")
        .replace("cifar10.json", "c.json")
        .replace("runs/cifar10", "run")
    )
    (tmp_path / "c.json").write_text(json.dumps(TrainConfig(**{**TINY, "epochs": 10_000}).to_dict()))
    (tmp_path / "job.sh").write_text(script)
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\necho $@ > {tmp_path}/queue\n")
    (tmp_path / "scontrol").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(
        ["bash", "job.sh"], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / "run" / "history.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    job.send_signal(signal.SIGTERM)
    job.wait(timeout=120)
    assert (tmp_path / "queue").read_text().split() == ["requeue", "7"]
    assert newest_checkpoint(tmp_path / "run") is not None
