"""Train the recommended one-step preset all of the time, and bring the weights back in three small files.

OUT=first python tests/gpu/images.py --data cifar10-jpeg-train.zip --until 0.5
OUT=second python tests/gpu/images.py --data cifar10-jpeg-train.zip --weights first
"""

import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from stages import Job

from dddm.config import build
from dddm.extractors import load_extractor, reference_features
from dddm.metrics import evaluate
from dddm.pictures import save_grid
from dddm.presets import preset
from dddm.sampling import sample
from dddm.training import start_run, step

FILES, LARGEST = 3, 16 * 2**20  # weights come back in so many files, each smaller than this
NET = dict(base=96, blocks=2, dropout=0.1)  # 22.7 M parameters
STEPS = (1, 2, 5)
RESERVE = 10  # seconds for what comes after the training

job = Job(
    __doc__.splitlines()[0],
    dry_budget=60,
    budget=540,
    data="the zip of CIFAR-10's training images",
    weights="folder of the files that an earlier session left",
    until="share of the whole training, in (0, 1], at which this session ends (default 1)",
)
cuda = job.cuda
EVERY, SCORED, EXTRACTOR = (120, 5_000, "cifar") if cuda else (job.budget / 6, 200, "digits")
until = float(job.options.until or 1)
if cuda and not job.options.data:
    raise SystemExit("--data: give the zip of CIFAR-10's training images")


def configuration(compile):
    "The recommended preset with a network whose weights come back; dry: that of digits, unlabelled."
    if not cuda:
        return preset("digits-one-step", batch=64, device="cpu", sample_every=0)
    return preset(
        "cifar10-one-step",
        data_path=job.options.data,
        net=NET,
        batch=512,
        micro_batch=512,
        ema=0.999,
        flip=True,
        sample_every=0,
        compile=compile,
    )


def write_weights(state, folder, progress):
    "float16 weights in `FILES` files of about equal size, with the share of training done in their headers."
    groups, sizes = [{} for _ in range(FILES)], [0] * FILES
    for name, value in sorted(state.items(), key=lambda item: -item[1].numel()):
        smallest = sizes.index(min(sizes))
        groups[smallest][name] = value.detach().half().contiguous().cpu()
        sizes[smallest] += 2 * value.numel()
    for k, group in enumerate(groups):
        temporary = folder / f".weights-{k}.safetensors"
        save_file(group, temporary, metadata=dict(progress=str(progress)))
        temporary.rename(folder / f"weights-{k}.safetensors")
    if max(sizes) >= LARGEST:
        raise ValueError(f"a file has {max(sizes)} bytes of weights: more than the {LARGEST} that come back")


def read_weights(folder):
    "(state of float32 weights, share of the training done) from the files of `write_weights`."
    state, progress = {}, set()
    for k in range(FILES):
        with safe_open(Path(folder) / f"weights-{k}.safetensors", "pt") as f:
            progress.add(float(f.metadata()["progress"]))
            state |= {name: f.get_tensor(name).float() for name in f.keys()}
    if len(progress) != 1:
        raise ValueError(f"{folder} holds weights of different moments: {sorted(progress)} of the training")
    return state, progress.pop()


def open_run():
    "(The run, the share of training done before), compiled on a GPU where that works."
    for compile in (True, False) if cuda else (False,):
        run = start_run(configuration(compile), Path(tempfile.mkdtemp()) / "run")
        before = 0.0
        if job.options.weights:
            state, before = read_weights(job.options.weights)
            run.model.load_state_dict(state)
            run.ema.load_state_dict(state)
        try:
            step(run)
            step(run)
        except Exception as e:
            if not compile:
                raise
            job.results["not_compiled"] = f"{type(e).__name__}: {e}"[:500]
            continue
        return run, before


def seconds_a_step(run, n=5):
    "Measured over n steps of the training itself."
    return job.seconds(lambda: [step(run) for _ in range(n)])[0] / n


rows = []  # pictures of each scoring


def score(run, reference):
    "Keep the weights, a row of pictures and the Fréchet distance at `STEPS`; returns the seconds it took."
    begin = time.perf_counter()
    images = sample(run.ema, SCORED, STEPS, batch_size=1024 if cuda else 200)
    rows.append(torch.cat([x[:8] for x in images.values()]))  # one row a scoring
    save_grid(torch.cat(rows), job.out / "grids.png", columns=8 * len(STEPS))
    save_grid(torch.cat([x[:64] for x in images.values()]), job.out / "last.png", columns=16)
    metric = dict(extractor=EXTRACTOR, metrics="fd", device=job.device, batch_size=500, progress=False)
    row = dict(step=run.done, progress=run.done / run.steps, seconds=begin - job.began)
    for steps, x in images.items():
        row[f"FD-{EXTRACTOR} at {steps}"] = evaluate(x, reference, **metric)[f"FD-{EXTRACTOR}"].value
    write_weights(run.ema.state_dict(), job.out, row["progress"])
    row["scoring_seconds"] = time.perf_counter() - begin
    job.results.setdefault("scores", []).append(row)
    job.write()
    print("  ", json.dumps(row), flush=True)
    return row["scoring_seconds"]


def plan(run, progress, rate, pause):
    """Set the run's length: the steps that there is time for lead from `progress` to `until`.

    Noise levels and learning rate follow run.done / run.steps, so the two are set together.
    rate: seconds a step; pause: seconds that a scoring takes.
    """
    scorings = job.left() // EVERY + 1
    steps = max(1, int((job.left() - RESERVE - scorings * pause) / rate))
    run.steps = max(round(steps / (until - progress)), 1)
    run.done = round(progress * run.steps)
    speed = dict(seconds_a_step=rate, images_per_second=run.config.batch / rate)
    job.results.setdefault("plans", []).append(dict(speed, progress=progress, steps=steps))


def train():
    "From the share of training that is done to `--until`, in the time that is left; scored every `EVERY` s."
    run, progress = open_run()
    if not progress < until <= 1:
        raise ValueError(f"--until {until}: must be over the {progress} that is done, and at most 1")
    size = sum(p.numel() for p in run.model.parameters())
    job.results["run"] = dict(parameters=size, batch=run.config.batch, before=progress, until=until)
    extractor = load_extractor(EXTRACTOR, device=job.device)
    reference = reference_features(run.data, extractor, batch_size=500, progress=False)
    run.done, run.steps = round(progress * 10**6), 10**6  # until the rate is known
    pause, total = score(run, reference), 0
    plan(run, progress, seconds_a_step(run), pause)
    while run.done < until * run.steps and job.left() > RESERVE + pause:
        began, steps = time.perf_counter(), 0
        while run.done < until * run.steps and job.left() > RESERVE + pause:
            step(run)
            steps += 1
            if time.perf_counter() - began > EVERY:
                break
        job.wait()
        rate, total = (time.perf_counter() - began) / max(steps, 1), total + steps
        pause, progress = score(run, reference), run.done / run.steps
        if progress < until:
            plan(run, progress, rate, pause)
    return dict(steps=total, progress=progress)


def reload():
    "The files that come back make images: their size, and the standard deviation of 16 samples."
    state, progress = read_weights(job.out)
    model = build(configuration(False))
    model.load_state_dict(state)
    x = sample(model.to(job.device).eval(), 16)
    sizes = [(job.out / f"weights-{k}.safetensors").stat().st_size for k in range(FILES)]
    if max(sizes) >= LARGEST:
        raise ValueError(f"files of {sizes} bytes: more than the {LARGEST} that come back")
    return dict(progress=progress, bytes=sizes, standard_deviation=x.std().item())


job.stage(train)
job.stage(reload)
job.finish()
