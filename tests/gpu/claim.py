"""What does the paper's estimate teach? `paper` with estimate store, truth and noise, as many steps each."""

import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from stages import Job

from dddm.pictures import save_grid
from dddm.presets import preset
from dddm.sampling import draws, sample
from dddm.training import start_run, step

ARMS = {  # name: fields that differ; other networks belong here, too
    "store": dict(estimate="store"),
    "truth": dict(estimate="truth"),
    "noise": dict(estimate="noise"),
}
FED = ("truth", "noise")  # what the trained network is given in place of the estimate
RESERVE = 5  # seconds for what comes after an arm's training

job = Job(__doc__, dry_budget=60, budget=540, data="the zip of CIFAR-10's training images")
cuda = job.cuda
if cuda and not job.options.data:
    raise SystemExit("--data: give the zip of CIFAR-10's training images")


def configuration(**changes):
    "Algorithm 1 on CIFAR-10 with a network of 22.7 M parameters; dry: on digits."
    fields = dict(objective="paper", sample_every=0, ema=0.999)
    if not cuda:
        return preset("digits", batch=64, device="cpu", **{**fields, **changes})
    fields |= dict(data_path=job.options.data, batch=512, micro_batch=512)
    fields |= dict(net=dict(base=96, blocks=2, dropout=0.1))
    fields |= dict(distance="pseudo_huber", distance_options={}, compile=True)
    return preset("cifar10", **{**fields, **changes})


def errors(run, n=512):
    "Root mean square error of the averaged model by quarter of t: {what it is fed: [4 numbers]}."
    model, c = run.ema, run.config
    g = torch.Generator().manual_seed(0)
    n = min(n, len(run.data))
    x0 = run.data.get(torch.arange(n))[0].float().cpu()
    noise, other = torch.randn(2, *x0.shape, generator=g)
    found = {}
    for fed in FED:
        found[fed] = []
        for quarter in range(4):
            t = torch.randint(quarter * c.T // 4 + 1, (quarter + 1) * c.T // 4 + 1, (n,), generator=g)
            x_t = model.schedule.diffuse(x0, t, noise)
            inputs = (v.to(job.device) for v in (x0 if fed == "truth" else other, x_t, t))
            with torch.inference_mode():
                estimate = model(*inputs).cpu()
            found[fed].append((estimate - x0).square().mean().sqrt().item())
    return found


def open_arm(name):
    "A run of the arm, after the steps that fill its store and compile its network."
    run = start_run(configuration(**ARMS[name]), Path(tempfile.mkdtemp()) / name)
    for _ in range(3):
        step(run)
    return run


def train_arm(name, steps):
    "Train one arm for `steps` (None: a share of the time) and keep its errors and grid; returns the steps."
    run = open_arm(name)
    if steps is None:
        share = (job.left() - (len(ARMS) + 1) * RESERVE) / len(ARMS)
        took = job.seconds(lambda: [step(run) for _ in range(3)])[0] / 3
        steps = max(10, int(0.9 * share / took))  # a tenth for opening and compiling the other arms
    began, opened = time.perf_counter(), run.done
    while run.done < steps and job.left() > RESERVE:
        step(run)
    job.wait()
    took = (time.perf_counter() - began) / max(run.done - opened, 1)
    samples = sample(run.ema, 24, (1, 5))
    save_grid(torch.cat(list(samples.values())), job.out / f"grid-{name}.png", columns=12)
    job.results.setdefault("arms", {})[name] = dict(
        steps=run.done,
        planned=steps,
        batch=run.config.batch,
        seconds_a_step=took,
        error_by_quarter_of_t=errors(run),
        copies={s: correlation(x, run.config.shape) for s, x in samples.items()},
    )
    return steps


def correlation(samples, shape):
    "Mean squared correlation of samples with the noise that is their first estimate: 1 is a copy."
    first = draws(0, range(len(samples)), shape)[1]
    a, b = (v.flatten(1) - v.flatten(1).mean(1, keepdim=True) for v in (samples, first))
    return ((a * b).sum(1) ** 2 / ((a * a).sum(1) * (b * b).sum(1)).clamp(min=1e-12)).mean().item()


planned = None
for name in ARMS:
    planned = job.stage(partial(train_arm, name, planned), need=10, name=name) or planned
job.finish()
