"""Is the library right on a GPU, and how fast? Nine minutes; `--dry`: every stage at digits size on a CPU."""

import collections
import copy
import tempfile
import warnings
from pathlib import Path
from statistics import median

import torch
from stages import Job, noise_folder, objective_loss, random_part

from dddm.config import build
from dddm.objectives import ESTIMATES, OBJECTIVES, estimate_of, needs_store
from dddm.presets import preset
from dddm.runs import history, load
from dddm.sampling import sample
from dddm.training import start_run, step, train

job = Job(__doc__)
cuda, device = job.cuda, job.device
BATCH, MICRO_BATCHES = (1024, (256, 512, 1024)) if cuda else (16, (8, 16))
SMALL = dict(base=16, attention=(), estimate=(8,))  # a network for a CPU
TOLERANCE = dict(float32=(1e-4, 1e-3), bfloat16=(3e-2, 1e-1))  # of loss, of gradient
pictures = noise_folder(*(2048, 32) if cuda else (64, 8))


def large(**changes):
    "The configuration whose speed is asked for: the paper's CIFAR-10 network; dry: a small one, in colour."
    fields = dict(data=pictures, data_path=None, sample_every=0, batch=BATCH)
    fields |= dict(distance="pseudo_huber", distance_options={})
    if not cuda:
        fields |= dict(shape=(3, 8, 8), device="cpu", net=SMALL)
    return preset("cifar10" if cuda else "digits", **{**fields, **changes})


def open_run(config):
    "A run in a new directory, after the epoch that fills its store."
    torch._dynamo.reset()  # a second micro-batch would make sizes symbolic
    run = start_run(config, Path(tempfile.mkdtemp()) / "run")
    steps = 1 + (run.steps_per_epoch if needs_store(config.objective, config.estimate) else 1)
    for _ in range(steps):
        step(run)
    return run


def images_per_second(call, batch, n):
    "Rate of n calls of `batch` images each: median, slowest, fastest; and the memory's peak."
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    taken = [job.seconds(call)[0] for _ in range(n)]
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    spread = dict(slowest=batch / max(taken), fastest=batch / min(taken))
    return dict(rate=batch / median(taken), **spread, peak_GB=peak)


def ceilings():
    "What the hardware can do: a large product in bfloat16, and a copy."
    n, size = (8192, 2**31) if cuda else (256, 2**20)
    a, b = torch.randn(2, n, n, device=device).bfloat16()
    x = torch.empty(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    product = min(job.seconds(lambda: a @ b)[0] for _ in range(10))
    copied = min(job.seconds(lambda: y.copy_(x))[0] for _ in range(10))
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9 if cuda else None
    return dict(bf16_TFLOPs=2 * n**3 / product / 1e12, copy_TBs=2 * size / copied / 1e12, memory_GB=memory)


def arms():
    "Every objective with every estimate that it takes."
    for objective in OBJECTIVES:
        for estimate in ESTIMATES:
            try:
                yield objective, estimate_of(objective, estimate)
            except ValueError:
                continue


def difference(a, b):
    "Norm of a - b over that of b."
    return ((a - b).norm() / b.norm()).item()


def same_as_cpu():
    "Loss and gradient of every objective on the device against float32 on the CPU."
    worst, wrong = {name: [0.0, 0.0] for name in TOLERANCE}, []
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        for objective, estimate in arms():
            for classes in (None, 10) if cuda else (10,):
                config = preset("digits", objective=objective, estimate=estimate, classes=classes)
                compare_with_cpu(config, worst, wrong)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv
    return dict(worst_loss_and_gradient=worst, out_of_tolerance=wrong)


def compare_with_cpu(config, worst, wrong):
    "Add the configuration's differences to `worst`, and those out of `TOLERANCE` to `wrong`."
    model = build(config).train()
    torch.manual_seed(1)
    for p in model.parameters():  # layers that begin at zero would hide what is before them
        if not p.count_nonzero():
            torch.nn.init.normal_(p, std=0.05)
    expected = loss_and_gradient(model, config, "cpu", torch.float32)
    moved = copy.deepcopy(model).to(device)
    for name in TOLERANCE:
        found = loss_and_gradient(moved, config, device, getattr(torch, name))
        errors = [difference(a, b) for a, b in zip(found, expected, strict=True)]
        worst[name] = [max(pair) for pair in zip(worst[name], errors, strict=True)]
        if not all(e < bar for e, bar in zip(errors, TOLERANCE[name], strict=True)):
            arm = dict(objective=config.objective, estimate=config.estimate, classes=config.classes)
            wrong.append(dict(arm, dtype=name, loss_and_gradient=errors))


def loss_and_gradient(model, config, where, dtype):
    "Distances [B] and the gradient of all weights, float32 on the CPU."
    part = random_part(config, 16, where)
    kind = torch.device(where).type
    with torch.autocast(kind, torch.bfloat16, enabled=dtype == torch.bfloat16):
        d = objective_loss(model, config, part)
    d.sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).float().cpu()
    model.zero_grad()
    return d.detach().float().cpu(), gradient


class Interrupted(Exception):
    "Stands for what ends a process."


def whole_runs():
    "A training that is interrupted and goes on, against one in one go; samples on both devices."
    found, stop = {}, 15 if cuda else 3
    for objective in ("paper", "consistency"):
        fields = dict(objective=objective, epochs=2, batch=180)
        fields |= dict(checkpoint_every=4, log_every=5, sample_every=10)
        if not cuda:
            fields |= dict(device="cpu", net=SMALL, epochs=1, batch=300, checkpoint_every=2, log_every=1)
        config = preset("digits", **fields)
        whole, parts = (Path(tempfile.mkdtemp()) / "run" for _ in range(2))
        train(config, whole, progress=False)

        def interrupt(record):
            if record["step"] == stop:
                raise Interrupted

        try:
            train(config, parts, progress=False, callback=interrupt)
        except Interrupted:
            train(config, parts, progress=False)
        a, b = load(whole), load(parts)
        weights = [torch.cat([p.flatten() for p in m.parameters()]).detach() for m in (a, b)]
        here = sample(copy.deepcopy(a).to(device), 32, (1, 3))
        there = sample(a, 32, (1, 3))
        losses = [record["loss"] for record in history(parts)]
        samples_differ = max(difference(here[s], there[s]) for s in here)
        found[objective] = dict(
            weights_differ=difference(*weights),
            samples_differ=samples_differ,
            first_loss=losses[0],
            last_loss=losses[-1],
            grids=len(list((parts / "samples").iterdir())),
        )
    return found


def count_syncs(call):
    "Calls that made the CPU wait for the device, by line: {'file.py:12': times}."
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return dict(collections.Counter(lines).most_common(25))


def syncs():
    "Host syncs in one step of each objective, and in one sampled batch."
    found = {}
    for objective, estimate in (("paper", "store"), ("consistency", "self")):
        run = open_run(large(objective=objective, estimate=estimate, batch=64, micro_batch=32))
        call = lambda run=run: step(run)
        found[objective] = count_syncs(call) if cuda else f"no CUDA: {job.seconds(call)[0]:.3f} s a step"
    model = build(large()).to(device).eval()
    sample(model, 32, 1, batch_size=32)
    if cuda:
        found["sampling"] = count_syncs(lambda: sample(model, 32, 1, batch_size=32))
    return found


def rates(compiled, micro_batches, n):
    "Training images a second at each micro-batch; a failure, as of memory, is noted."
    found = {}
    for micro_batch in micro_batches:
        try:
            warm, run = job.seconds(lambda m=micro_batch: open_run(large(micro_batch=m, compile=compiled)))
            rate = images_per_second(lambda r=run: step(r), BATCH, n)
            found[micro_batch] = dict(rate, warm_up_seconds=warm)
        except RuntimeError as e:
            found[micro_batch] = f"{type(e).__name__}: {e}"[:300]
        run = None
        if cuda:
            torch.cuda.empty_cache()
    return found


def eager():
    "Training without compilation."
    return rates(False, MICRO_BATCHES, 4 if cuda else 1)


def compiled():
    "Compiled training, from the largest micro-batch down."
    return rates(True, MICRO_BATCHES[::-1][: 2 if cuda else 1], 6 if cuda else 1)


def choices():
    "What a run decides by itself: micro-batch, compiled passes, number format."
    torch._dynamo.reset()
    run = start_run(large(), Path(tempfile.mkdtemp()) / "run")
    return dict(micro_batch=run.micro_batch, compiled=run.compiled, dtype=str(run.dtype))


def loop_against_bare():
    "What a step costs over a bare compiled forward, backward and Adam of the same network, in turns."
    micro_batch = MICRO_BATCHES[-2]
    run = open_run(large(micro_batch=micro_batch, compile=True))
    x, target = torch.randn(2, micro_batch, *run.config.shape, device=device)
    t = torch.randint(1, run.config.T + 1, (micro_batch,), device=device)
    net, adam = copy.deepcopy(run.ema.net).train().requires_grad_(True), torch.optim.Adam
    optimizer = adam(net.parameters(), fused=True)
    net.compile(dynamic=False)

    def bare():
        optimizer.zero_grad(set_to_none=True)
        for _ in range(BATCH // micro_batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                y = net(x, t, x, None)
            (y.float() - target).square().mean().backward()
        optimizer.step()

    calls = dict(bare=bare, loop=lambda: step(run))
    taken = {name: [] for name in calls}
    for round_ in range(7 if cuda else 3):
        for name, call in calls.items():
            took = job.seconds(call)[0]
            if round_:
                taken[name].append(took)
    ratios = [a / b - 1 for a, b in zip(taken["loop"], taken["bare"], strict=True)]
    return dict(
        overhead=median(ratios),
        least=min(ratios),
        most=max(ratios),
        images_per_second={name: BATCH / median(s) for name, s in taken.items()},
    )


def sampling():
    "Images a second in one step: float32, bfloat16, bfloat16 compiled; 50,000 in seconds."
    n, batch = (16_384, 1024) if cuda else (64, 32)
    model = build(large()).to(device).eval()
    found = {}
    for name in ("float32", "bfloat16", "bfloat16, compiled"):
        if "compiled" in name:
            torch._dynamo.reset()
            model.net.compile(dynamic=False)
        with torch.autocast(device.type, torch.bfloat16, enabled=name != "float32"):
            sample(model, batch, 1, batch_size=batch)
            took = job.seconds(lambda: sample(model, n, 1, batch_size=batch))[0]
        found[name] = dict(images_per_second=n / took, seconds_for_50000=50_000 * took / n)
    return found


def peers():
    "A step of other libraries' networks in bfloat16, beside ours of as many weights; or why it is left out."
    batch = 128 if cuda else 8
    ours = build(large()).to(device).net.train()
    size = sum(p.numel() for p in ours.parameters())
    networks, found = {"dddm": (ours, lambda x, t: ours(x, t, x, None))}, {}
    for name, open_network in (("diffusers", open_diffusers), ("denoising-diffusion-pytorch", open_unet)):
        try:
            networks[name] = open_network(size)
        except ImportError as e:
            found[name] = f"not measured: {e}"
    for name, (module, forward) in networks.items():
        module.to(device).train()
        optimizer = torch.optim.Adam(module.parameters(), fused=True)
        x, target = torch.randn(2, batch, *large().shape, device=device)
        t = torch.randint(1, 1000, (batch,), device=device)

        def call(forward=forward, optimizer=optimizer, x=x, target=target, t=t):
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                y = forward(x, t)
            (y.float() - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        call()
        weights = sum(p.numel() for p in module.parameters())
        found[name] = dict(images_per_second(call, batch, 5 if cuda else 1), parameters=weights)
    return found


def nearest(make, size, widths):
    "The network whose number of weights is nearest to `size`."
    with torch.device("meta"):
        sizes = {width: sum(p.numel() for p in make(width).parameters()) for width in widths}
    return make(min(sizes, key=lambda width: abs(sizes[width] - size)))


def open_diffusers(size):
    "diffusers' UNet2DModel with (about) `size` weights, and its call."
    from diffusers import UNet2DModel

    stages, side = (4, 32) if cuda else (2, 8)

    def make(width):
        widths = [width] + [2 * width] * (stages - 1)
        return UNet2DModel(
            side,
            3,
            3,
            layers_per_block=3 if cuda else 1,
            block_out_channels=widths,
            norm_num_groups=8,
            down_block_types=["DownBlock2D"] * (stages - 1) + ["AttnDownBlock2D"],
            up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * (stages - 1),
        )

    network = nearest(make, size, range(8, 257, 8))
    return network, lambda x, t: network(x, t).sample


def open_unet(size):
    "denoising-diffusion-pytorch's Unet with (about) `size` weights, and its call."
    from denoising_diffusion_pytorch import Unet

    stages = 4 if cuda else 2
    factors = [1] + [2] * (stages - 1)
    network = nearest(lambda width: Unet(width, dim_mults=factors, channels=3), size, range(8, 257, 8))
    return network, network


STAGES = (  # seconds that each needs, seconds after which it is stopped
    (ceilings, 5, 30),
    (same_as_cpu, 20, 90),
    (whole_runs, 20, 80),
    (syncs, 10, 60),
    (eager, 20, 80),
    (compiled, 60, 150),
    (choices, 60, 120),
    (loop_against_bare, 60, 120),
    (sampling, 20, 90),
    (peers, 15, 60),
)
for stage, need, limit in STAGES:
    job.stage(stage, need if cuda else 1, limit)
job.finish()
