"""What the three jobs share: stages with a time guard each, and results that grow as they go."""

import argparse
import contextlib
import json
import os
import random
import signal
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from dddm.losses import distance
from dddm.objectives import Batch, objective_value


class OutOfTime(BaseException):
    "A stage took longer than it may. No `except Exception` on the way may take it for a fault of its own."


class Job:
    """A job of named stages on one device, within a budget of seconds.

    `results` is written to `out`/results.json after every stage. A stage that fails or runs out of time is
    noted there with its error, and the next one runs. With `--dry` everything is small, on a CPU.
    """

    def __init__(self, about, dry_budget=100.0, budget=540.0, **options):
        parser = argparse.ArgumentParser(description=about)
        parser.add_argument("--dry", action="store_true", help="all stages at the size of digits, on a CPU")
        parser.add_argument("--budget", type=float, help=f"seconds for all stages (default {budget:.0f})")
        parser.add_argument("--only", nargs="+", default=[], help="names of stages; the others are left out")
        for name, text in options.items():
            parser.add_argument(f"--{name.replace('_', '-')}", help=text)
        self.options = parser.parse_args()
        self.dry = self.options.dry
        self.budget = self.options.budget or (dry_budget if self.dry else budget)
        self.began = time.perf_counter()
        self.cuda = torch.cuda.is_available() and not self.dry
        self.device = torch.device("cuda" if self.cuda else "cpu")
        torch.set_float32_matmul_precision("high")  # TF32, as `train` has it
        self.out = Path(os.environ.get("OUT") or tempfile.mkdtemp())
        self.out.mkdir(parents=True, exist_ok=True)
        name = torch.cuda.get_device_name() if self.cuda else "CPU"
        if self.dry:
            trace_only()
        self.results = dict(dry=self.dry, device=name, torch=torch.__version__, stages={})
        self.write()

    def left(self):
        "Seconds of the budget that are left."
        return self.budget - (time.perf_counter() - self.began)

    def write(self):
        "Write results.json whole: a kill leaves the one before."
        temporary = self.out / ".results.json"
        temporary.write_text(json.dumps(self.results, indent=1, default=str))
        temporary.rename(self.out / "results.json")

    def stage(self, function, need=0.0, limit=float("inf"), name=None):
        """Run `function()` and keep what it returns under its name; returns that, or None where it failed.

        need: seconds without which it is left out; limit: seconds after which it is stopped.
        """
        name = name or function.__name__
        if self.options.only and name not in self.options.only:
            return None
        if self.left() < need:
            self.results["stages"][name] = dict(left_out=f"{self.left():.0f} of {need:.0f} s are left")
            self.write()
            return None
        print(f"{name}, with {self.left():.0f} s left", flush=True)
        began, found = time.perf_counter(), None
        try:
            with stopped_after(min(limit, max(self.left(), 1.0))):
                found = function()
            kept = dict(result=found)
        except (Exception, OutOfTime) as e:
            where = traceback.format_exc().splitlines()[-8:]
            kept = dict(error=f"{type(e).__name__}: {e}"[:800], where=where)
        kept["seconds"] = round(time.perf_counter() - began, 1)
        self.results["stages"][name] = kept
        self.write()
        print("  ", json.dumps(kept, default=str)[:1500], flush=True)
        if self.cuda:
            torch.cuda.empty_cache()
        return found

    def finish(self):
        "Print which stages failed; the exit status is 0 so that the files come back."
        failed = [name for name, kept in self.results["stages"].items() if "error" in kept]
        self.results["total_seconds"] = round(time.perf_counter() - self.began, 1)
        self.write()
        print(f"{self.results['total_seconds']} s; failed: {', '.join(failed) or 'none'}")

    def seconds(self, function):
        "(Wall-clock seconds of a call, the device's queue emptied before and after, what it returned)."
        self.wait()
        began = time.perf_counter()
        found = function()
        self.wait()
        return time.perf_counter() - began, found

    def wait(self):
        "Empty the device's queue."
        if self.cuda:
            torch.cuda.synchronize()


def trace_only():
    "Let `torch.compile` trace its graphs and run them as they are: C++ for a CPU takes minutes."
    compile = torch.compile

    def traced(*args, backend=None, mode=None, options=None, **kwargs):
        return compile(*args, backend="eager", **kwargs)

    torch.compile = traced


@contextlib.contextmanager
def stopped_after(seconds):
    "Within, `OutOfTime` is raised in the main thread after so many seconds."

    def stop(number, frame):
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def noise_folder(n, size):
    "A folder of n colour pictures of noise, `size` pixels a side: speed does not depend on what images show."
    from PIL import Image

    folder = Path(tempfile.mkdtemp())
    source = random.Random(0)
    for i in range(n):
        Image.frombytes("RGB", (size, size), source.randbytes(3 * size * size)).save(folder / f"{i:05d}.png")
    return str(folder)


def random_part(config, n, device="cpu"):
    "A `Batch` of n samples with every field filled, drawn on the CPU from one seed."
    g = torch.Generator().manual_seed(3)

    def normal():
        return torch.randn(n, *config.shape, generator=g)

    batch = Batch(
        x0=normal().clamp(-1, 1),
        stored=normal().clamp(-1, 1),
        noise=normal(),
        estimate_noise=normal(),
        estimate_noise_below=normal(),
        t=torch.randint(1, config.T + 1, (n,), generator=g),
        u=(torch.arange(n) + 0.5) / n,
        label=None if config.classes is None else torch.arange(n) % config.classes,
        progress=0.4,
        epoch=1,
    )
    moved = {name: v.to(device) for name, v in vars(batch).items() if torch.is_tensor(v)}
    return replace(batch, **moved)


def objective_loss(model, config, batch):
    "The configuration's objective on a `Batch`: distances [B]."
    d = distance(config.distance, c=config.c).to(batch.x0.device)
    options = (config.estimate, config.levels, config.level_distribution)
    return objective_value(config.objective, model, d, batch, *options).loss
