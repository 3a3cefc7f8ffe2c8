"What a GPU would refuse or wait for, found on a CPU: the simulated device itself, then dddm on it."

import contextlib
import copy
import dataclasses
import os
import threading
import warnings
from collections import Counter
from unittest import mock

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from cuda_twin import CUDA, Twin, cuda_twin, table
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from dddm import data, extractors, metrics, objectives, presets, runs, training
from dddm.config import build
from dddm.losses import distance
from dddm.sampling import SAMPLERS, sample
from dddm.schedule import VPSchedule
from dddm.store import DTYPES, EstimateStore
from dddm.unet import UNet

# Every objective and estimate. A training step may wait for the device once, for the flags of the last step.
MOST_SYNCS = 1
KNOWN = [
    ("paper", "store"),
    ("paper", "noise"),
    ("paper", "truth"),
    ("paper", "shuffled"),
    ("paper", "self"),
    ("published_code", "store"),
    ("consistency", "self"),
    ("consistency", "noise"),
    ("consistency", "store"),
    ("improved_consistency", "none"),
    ("meanflow", "none"),
    ("regression", "none"),
]


@pytest.fixture(autouse=True)
def as_before():
    "Accelerate remembers its device and number format, in itself and in the environment: not beyond a test."
    with mock.patch.dict(os.environ):
        yield
    AcceleratorState._reset_state(True)


# ---- the simulated device itself


def test_a_tensor_says_cuda_and_has_the_cpus_values():
    wanted = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    with cuda_twin():
        generator = torch.Generator("cuda").manual_seed(1)
        assert isinstance(generator, torch.Generator) and generator.device == CUDA
        x = torch.randn(3, 4, device="cuda", generator=generator)
        assert x.device == CUDA and x.is_cuda and not x.is_cpu and not x.is_meta and x.shape == (3, 4)
        assert torch.equal(x.cpu(), wanted) and x.cpu().device.type == "cpu"
        assert (
            x.to("cuda") is x
            and x.cuda() is x
            and wanted.cuda().device == CUDA
            and torch.empty_like(x).device == CUDA
        )
        assert torch.equal((x @ x.T).softmax(1).cpu(), (wanted @ wanted.T).softmax(1))
        assert (
            torch.tensor([1, 2], device="cuda").tolist()
            == torch.as_tensor([1, 2], device=CUDA).tolist()
            == [1, 2]
        )
        x[1] = 0.5
        x[0, x[0] > 0] = 2.0
        wanted[1], wanted[0, wanted[0] > 0] = 0.5, 2.0
        assert torch.equal(x.cpu(), wanted)


def small_training(device: str):
    "The losses and weights of a small network whose every kind of layer computes on `device`."
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(128, 3),
    )
    weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    model.to(device)
    assert model[0].weight is weight and isinstance(
        weight, nn.Parameter
    )  # as on CUDA, moving a module keeps its parameters' identity
    average, losses = copy.deepcopy(model).requires_grad_(False), []
    x, y = torch.randn(6, 1, 4, 4).to(device), torch.arange(6).to(device) % 3
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 0.1)
        losses.append(loss.item())
    assert all(p.grad.device == p.device for p in model.parameters())
    return losses, [p.detach().cpu() for m in (model, average) for p in m.parameters()]


def test_training_a_network_gives_the_cpus_numbers():
    cpu = small_training("cpu")
    with cuda_twin():
        twin = small_training("cuda")
    assert twin[0] == pytest.approx(cpu[0], rel=1e-6)
    for a, b in zip(twin[1], cpu[1], strict=True):
        torch.testing.assert_close(a, b)


# Calls with x [4] float and i [2] long on the device; c and k are the same on the CPU.
REFUSED = {
    "add": lambda x, i, c, k: x + c,
    "in place": lambda x, i, c, k: c.add_(x),
    "where": lambda x, i, c, k: torch.where(x > 0, x, c),
    "mask of the other": lambda x, i, c, k: torch.where(c > 0, x, x),
    "cat": lambda x, i, c, k: torch.cat([x, c]),
    "stack of scalars": lambda x, i, c, k: torch.stack([x[0], c[0]]),
    "matmul": lambda x, i, c, k: x @ c,
    "linear": lambda x, i, c, k: nn.Linear(4, 1)(x),
    "embedding": lambda x, i, c, k: nn.Embedding(9, 2)(i),
    "index_select": lambda x, i, c, k: x.index_select(0, k),
    "gather": lambda x, i, c, k: c.gather(0, i),
    "index of a CPU tensor": lambda x, i, c, k: c[i],
    "value of an index": lambda x, i, c, k: x.index_put_((i,), c[:2]),
    "searchsorted": lambda x, i, c, k: torch.searchsorted(c, x),
    "loss": lambda x, i, c, k: F.mse_loss(x, c),
    "generator of the CPU": lambda x, i, c, k: torch.randn(3, device="cuda", generator=torch.Generator()),
    "generator of the device": lambda x, i, c, k: torch.randn(3, generator=torch.Generator("cuda")),
    "generator in place": lambda x, i, c, k: x.normal_(generator=torch.Generator()),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_of_two_devices_do_not_mix(case):
    c, k = torch.arange(4.0), torch.tensor([0, 2])
    with cuda_twin():
        x, i = c.to("cuda"), k.to("cuda")
        with pytest.raises(RuntimeError, match="device|indices"):
            REFUSED[case](x, i, c, k)


def test_a_cpu_scalar_mixes_and_numpy_does_not():
    with cuda_twin():
        x, half = torch.arange(4.0).to("cuda"), torch.tensor(0.5)
        assert (x + half).tolist() == [0.5, 1.5, 2.5, 3.5]
        assert torch.where(x > 1, x, half).tolist() == [0.5, 0.5, 2, 3] and x.mul_(half).tolist() == [
            0,
            0.5,
            1,
            1.5,
        ]
        with pytest.raises(TypeError, match="cuda:0"):
            x.numpy()
        with pytest.raises(RuntimeError, match="pin"):
            x.pin_memory()


# A call with x [4] float and mask [4] on the device and c [4] on the CPU; the kinds of its syncs, and the
# directions of its transfers.
SYNCS = {
    "item": (lambda x, mask, c: x[0].item(), ["item"], []),
    "bool": (lambda x, mask, c: bool(mask.any()), ["item"], []),
    "if": (lambda x, mask, c: 1 if x.sum() > 0 else 2, ["item"], []),
    "float": (lambda x, mask, c: float(x[1]), ["item"], []),
    "tolist": (lambda x, mask, c: x.tolist(), ["device to host"], ["device to host"]),
    "nonzero": (lambda x, mask, c: x.nonzero(), ["nonzero"], []),
    "where of one": (lambda x, mask, c: torch.where(mask), ["nonzero"], []),
    "masked_select": (lambda x, mask, c: x.masked_select(mask), ["masked_select"], []),
    "unique": (lambda x, mask, c: x.unique(), ["_unique2"], []),
    "equal": (lambda x, mask, c: torch.equal(x, x), ["equal"], []),
    "repeats": (lambda x, mask, c: x.repeat_interleave(mask.long()), ["repeat_interleave"], []),
    "repeats of known size": (lambda x, mask, c: x.repeat_interleave(mask.long(), output_size=3), [], []),
    "mask index": (lambda x, mask, c: x[mask], ["mask index"], []),
    "mask index of a value": (lambda x, mask, c: x.__setitem__(mask, x[:3] * 2), ["mask index"], []),
    "mask index of a number": (lambda x, mask, c: x.__setitem__(mask, 0.0), [], []),
    "masked_fill": (lambda x, mask, c: x.masked_fill(mask, 0.0), [], []),
    "index": (lambda x, mask, c: x[x.long()], [], []),
    "CPU index": (lambda x, mask, c: x[c.long()], ["index copy"], ["host to device"]),
    "CPU index of a value": (
        lambda x, mask, c: x.__setitem__(c.long(), x * 2),
        ["index copy"],
        ["host to device"],
    ),
    "to the host": (lambda x, mask, c: x.cpu(), ["device to host"], ["device to host"]),
    "copy to the host": (lambda x, mask, c: c.copy_(x), ["device to host"], ["device to host"]),
    "to the host, not waiting": (lambda x, mask, c: x.to("cpu", non_blocking=True), [], ["device to host"]),
    "to the device": (lambda x, mask, c: c.to("cuda"), ["host to device"], ["host to device"]),
    "cuda()": (lambda x, mask, c: c.cuda(), ["host to device"], ["host to device"]),
    "to another's device": (lambda x, mask, c: c.to(x), ["host to device"], ["host to device"]),
    "copy to the device": (lambda x, mask, c: x.copy_(c), ["host to device"], ["host to device"]),
    "new on the device": (
        lambda x, mask, c: torch.tensor([1.0, 2.0], device="cuda"),
        ["host to device"],
        ["host to device"],
    ),
    "to the device, not waiting": (
        lambda x, mask, c: c.pin_memory().to("cuda", non_blocking=True),
        [],
        ["host to device"],
    ),
    "copy to the device, not waiting": (
        lambda x, mask, c: x.copy_(c, non_blocking=True),
        [],
        ["host to device"],
    ),
    "synchronize": (lambda x, mask, c: torch.cuda.synchronize(), ["synchronize"], []),
    "event": (lambda x, mask, c: torch.cuda.Event().synchronize(), ["synchronize"], []),
    "made on the device": (
        lambda x, mask, c: torch.zeros(3, device="cuda") + torch.arange(3, device=x.device),
        [],
        [],
    ),
    "computed": (lambda x, mask, c: (x * 2 + 1).sum().sqrt().clamp(0, 1), [], []),
    "CPU alone": (lambda x, mask, c: (c[c > 0].sum().item(), c.nonzero(), bool(c.any())), [], []),
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("case", SYNCS)
def test_each_wait_of_the_host_is_seen(case, inference):
    call, syncs, transfers = SYNCS[case]
    with cuda_twin() as record, torch.inference_mode(inference):
        c = torch.arange(4.0)
        x = c.to("cuda")
        mask = x > 0
        record.reset()
        call(x, mask, c)
        assert [kind for kind, _ in record.syncs.elements()] == syncs
        assert [direction for direction, _ in record.transfers.elements()] == transfers


def test_a_sync_names_the_line_of_the_library():
    with cuda_twin() as record:
        x, t = torch.zeros(2, 1, 8, 8, device="cuda"), torch.ones(2, dtype=torch.long, device="cuda")
        x.sum().item()
        assert record.syncs == {("item", "outside"): 1} and "outside" in table(record.syncs)
        record.reset()
        assert not record.syncs and not record.transfers
        x.requires_grad_()
        store = EstimateStore(4, (1, 8, 8), device="cuda")
        store.write(torch.tensor([0, 1]), x)
        assert not record.syncs
        store.read(t)
        assert record.syncs and all(
            where.startswith("store.py:") and where.endswith("(locate)") for _, where in record.syncs
        )
        assert VPSchedule().diffuse(x, t, x).device == CUDA


def test_autocast_gives_bfloat16_to_the_operations_that_cuda_does():
    with cuda_twin():
        x, conv, linear, norm = (
            torch.randn(2, 4, 4, 4, device="cuda"),
            nn.Conv2d(4, 4, 3).cuda(),
            nn.Linear(4, 4).cuda(),
            nn.GroupNorm(1, 4).cuda(),
        )
        calls = dict(
            conv=lambda: conv(x),
            linear=lambda: linear(x),
            matmul=lambda: x @ x,
            bmm=lambda: torch.bmm(x[0], x[1]),
            attention=lambda: F.scaled_dot_product_attention(x, x, x),
            norm=lambda: norm(x.bfloat16()),
            sum=lambda: x.bfloat16().sum(),
            softmax=lambda: x.bfloat16().softmax(1),
            mse=lambda: F.mse_loss(x.bfloat16(), x),
            add=lambda: x + 1,
        )
        lower = {"conv", "linear", "matmul", "bmm", "attention"}
        with torch.autocast("cuda", torch.bfloat16):
            for name, call in calls.items():
                assert call().dtype == (torch.bfloat16 if name in lower else torch.float32), name
            assert (
                torch.zeros(2, 2) @ torch.zeros(2, 2)
            ).dtype == torch.float32  # the CPU's own autocast is another
            loss = conv(x).float().sum()
            with torch.autocast("cuda", enabled=False):
                for name in lower:
                    assert calls[name]().dtype == torch.float32, name
            assert conv(x).dtype == torch.bfloat16
        assert conv(x).dtype == torch.float32
        loss.backward()
        assert conv.weight.grad.dtype == torch.float32
        assert not torch.equal(calls["conv"]().cpu(), loss.cpu())


@pytest.mark.parametrize("where", [None, "cpu", "cuda", torch.device("cuda", 0), {"cuda:0": "cpu"}], ids=str)
def test_checkpoints_come_back_on_the_device_that_is_asked_for(tmp_path, where):
    with cuda_twin() as record:
        model = nn.Linear(3, 2).to("cuda")
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        model(torch.ones(1, 3, device="cuda")).sum().backward()
        optimizer.step()
        record.reset()
        torch.save(
            dict(model=model.state_dict(), optimizer=optimizer.state_dict(), host=torch.ones(2)),
            tmp_path / "state.pt",
        )
        assert set(kind for kind, _ in record.syncs) == {"device to host"}
        state = torch.load(tmp_path / "state.pt", map_location=where, weights_only=True)
        on_device = where in (None, "cuda", torch.device("cuda", 0))
        assert isinstance(state["model"]["weight"], Twin) == on_device
        assert isinstance(state["host"], Twin) == (on_device and where is not None)
        other = nn.Linear(3, 2).to("cuda")
        again = torch.optim.Adam(other.parameters(), fused=True)
        other.load_state_dict(state["model"])
        again.load_state_dict(state["optimizer"])
        for net, adam in ((model, optimizer), (other, again)):
            adam.zero_grad()
            net(torch.ones(1, 3, device="cuda")).square().sum().backward()
            adam.step()
        assert torch.equal(model.weight, other.weight)
    with pytest.raises(RuntimeError, match="map_location"):
        torch.load(tmp_path / "state.pt", weights_only=True)  # as a machine without CUDA says


def test_safetensors_writes_and_reads(tmp_path):
    with cuda_twin():
        x = torch.arange(6.0).to("cuda").reshape(2, 3)
        safetensors.torch.save_file({"x": x}, tmp_path / "x.safetensors")
        assert safetensors.torch.load_file(tmp_path / "x.safetensors")["x"].device.type == "cpu"
        found = safetensors.torch.load_file(tmp_path / "x.safetensors", device="cuda")["x"]
        assert found.device == CUDA and torch.equal(found, x)
        with pytest.raises(ValueError, match="contiguous"):
            safetensors.torch.save_file({"x": x.T}, tmp_path / "x.safetensors")
        with pytest.raises(RuntimeError, match="share memory"):
            safetensors.torch.save_file({"x": x, "y": x.view(6)}, tmp_path / "x.safetensors")


def test_a_thread_sees_the_device():
    found = []
    with cuda_twin() as record:
        worker = threading.Thread(
            target=lambda: found.append(torch.ones(3).to("cuda", non_blocking=True).sum())
        )
        worker.start()
        worker.join()
        assert found[0].device == CUDA and found[0].item() == 3 and sum(record.transfers.values()) == 1


def test_torch_cuda_answers():
    with cuda_twin(capability=(8, 6), free=10, total=20):
        assert (
            torch.cuda.is_available()
            and torch.cuda.device_count() == 1
            and torch.cuda.get_device_capability() == (8, 6)
        )
        assert (
            torch.cuda.mem_get_info(CUDA) == (10, 20)
            and torch.cuda.max_memory_allocated(CUDA) == 0
            and torch.cuda.is_bf16_supported()
        )
        with torch.random.fork_rng([torch.cuda.current_device()]):
            torch.manual_seed(0)
        with torch.cuda.stream(torch.cuda.Stream()):
            assert torch.cuda.Event(enable_timing=True).query()
    with cuda_twin():
        assert torch.cuda.get_device_capability() == (9, 0)


def everything() -> dict:
    "All that a context changes, as it is now."
    return dict(
        cuda=dict(vars(torch.cuda)),
        accelerator=dict(vars(torch.accelerator)),
        torch=(torch.load, torch.save, torch.Generator),
        tag=torch.serialization.location_tag,
        open=safetensors.torch.safe_open,
        thread=threading.Thread.run,
        calls=len(_get_current_function_mode_stack()),
        operations=len(_get_current_dispatch_mode_stack()),
        autocast=(
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            torch.is_autocast_enabled("cpu"),
        ),
        future=(
            torch.__future__.get_overwrite_module_params_on_conversion(),
            torch.__future__.get_swap_module_params_on_conversion(),
        ),
        inference=torch.is_inference_mode_enabled(),
    )


@pytest.mark.parametrize("how", ["ends", "error", "error within autocast"])
def test_everything_is_put_back(how):
    before, random_state = everything(), torch.get_rng_state()
    with contextlib.suppress(ZeroDivisionError), cuda_twin():
        x = torch.ones(2, device="cuda", requires_grad=True)
        (x * 2).sum().backward()
        assert everything() != before
        with torch.autocast("cuda", torch.bfloat16), torch.inference_mode():
            if how == "error within autocast":
                raise ZeroDivisionError
        if how == "error":
            raise ZeroDivisionError
    assert everything() == before and torch.equal(torch.get_rng_state(), random_state)
    assert torch.zeros(2, device="meta").is_meta
    with pytest.raises(RuntimeError, match="outside"):
        x + 1


def test_contexts_do_not_nest():
    with cuda_twin(), pytest.raises(RuntimeError, match="already"), cuda_twin():
        pass
    with cuda_twin():
        assert torch.ones(1, device="cuda").item() == 1


# ---- dddm on it

FEW = 20
ONE_STAGE, TWO_STAGES = dict(base=8, multipliers=(1,), attention=(), estimate=(8,)), dict(base=8)
CASES = [(objective, estimate, classes) for objective, estimate in KNOWN for classes in (None, 10)]


@pytest.fixture(scope="module")
def few_digits():
    whole = data.digits()
    return dataclasses.replace(whole, pixels=whole.pixels[:FEW], labels=whole.labels[:FEW])


@pytest.fixture
def few_images(monkeypatch, few_digits):
    monkeypatch.setattr(data, "digits", lambda: few_digits)


TINY = dict(
    net=ONE_STAGE,
    batch=12,
    micro_batch=6,
    epochs=3,
    flip=True,
    log_every=1,
    checkpoint_every=100,
    sample_every=0,
    compile=False,
    precision="float32",
)


def tiny(**fields):
    "Two steps an epoch, of two micro-batches each; the last step is smaller."
    return presets.preset("digits", **{**TINY, **fields})


def steps(run, number: int, record=None) -> tuple[list, Counter]:
    "The losses of so many steps, and the syncs of the step that has most."
    losses, most = [], Counter()
    for _ in range(number):
        if record is not None:
            record.reset()
        training.step(run)
        if record is not None:
            most = max(most, record.syncs.copy(), key=Counter.total)
        losses.append(training.log(run, 1.0, 12)["loss"])
    return losses, most


def weights(model) -> dict:
    return {name: v.detach().cpu().clone() for name, v in model.state_dict().items()}


def test_the_table_names_every_objective_and_estimate():
    known = set()
    for objective in objectives.OBJECTIVES:
        for estimate in (None, *objectives.ESTIMATES):
            with contextlib.suppress(ValueError):
                known.add((objective, objectives.estimate_of(objective, estimate)))
    assert known == set(KNOWN)


@pytest.mark.parametrize("objective, estimate, classes", CASES)
def test_training_on_the_device(objective, estimate, classes, few_images, tmp_path):
    usual = objectives.OBJECTIVES[objective].estimate == estimate
    fields = dict(objective=objective, estimate=None if usual else estimate, classes=classes)
    wanted, _ = steps(training.start_run(tiny(device="cpu", **fields), tmp_path / "cpu"), 3)
    with cuda_twin() as record:
        run = training.start_run(tiny(**fields), tmp_path / "cuda")
        assert run.device.type == "cuda" and run.data.pixels.device == CUDA
        assert all(p.device == CUDA for p in run.model.parameters())
        losses, most = steps(run, 2, record)
        training.save(run)
        last, most_later = steps(run, 1, record)  # in the second epoch
        assert losses + last == pytest.approx(wanted, rel=1e-4)
        assert all(v.isfinite().all() for v in weights(run.model).values())
        most = max(most, most_later, key=Counter.total)
        print(f"{most.total()} syncs in a step:\n{table(most)}")
        assert most.total() <= MOST_SYNCS, table(most)
        if classes is None:  # what follows once for each objective and estimate
            return
        again = training.start_run(tiny(**fields), tmp_path / "cuda")
        assert again.resumed and again.done == 2
        assert steps(again, 1)[0] == last
        for name, value in weights(run.model).items():
            assert torch.equal(weights(again.model)[name], value), name
        if usual:
            check_samples(again)


def check_samples(run) -> None:
    "A grid, and the images of every sampler, which are those of the same weights on the CPU."
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a grid that fails is a warning
        training.sample_grid(run, steps=(1, 2), n=4)
    assert runs.grid_path(run.out, run.done).exists()
    on_host = build(run.config).eval()
    on_host.load_state_dict(weights(run.ema))
    for sampler in SAMPLERS if run.config.objective == "meanflow" else ("iterate", "ddim", "renoise"):
        found, wanted = (
            sample(model, 3, 2, sampler, label=torch.arange(3), batch_size=2) for model in (run.ema, on_host)
        )
        assert found.device.type == "cpu"
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", ["paper", "consistency"])
def test_training_in_bfloat16(objective, few_images, tmp_path):
    wanted, _ = steps(
        training.start_run(tiny(device="cpu", objective=objective, net=TWO_STAGES), tmp_path / "cpu"), 3
    )
    with cuda_twin():
        run = training.start_run(
            tiny(objective=objective, net=TWO_STAGES, precision="bfloat16"), tmp_path / "cuda"
        )
        seen = Counter()
        unet = next(m for m in run.model.modules() if isinstance(m, UNet))
        unet.stem.register_forward_hook(lambda module, inputs, output: seen.update([output.dtype]))
        losses, _ = steps(run, 3)
        assert (
            set(seen) == {torch.bfloat16} and losses == pytest.approx(wanted, rel=0.05) and losses != wanted
        )
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in run.model.parameters())
        training.save(run)
        assert training.restore(run)


def test_a_whole_training(few_images, tmp_path):
    records = []
    with cuda_twin():
        training.train(
            tiny(epochs=2, sample_every=2, checkpoint_every=2, precision="auto"),
            tmp_path / "run",
            callback=records.append,
        )
    assert len(records) == 4 and len(list((tmp_path / "run" / "samples").iterdir())) == 2
    assert sample(runs.load(tmp_path / "run"), 2).isfinite().all()  # what it left is read without a GPU


def test_images_and_store_that_do_not_fit_stay_on_the_host(few_images, tmp_path):
    wanted, _ = steps(training.start_run(tiny(device="cpu"), tmp_path / "cpu"), 3)
    with cuda_twin(free=1000):
        run = training.start_run(tiny(), tmp_path / "cuda")
        assert run.data.pixels.device.type == run.store.rows.device.type == "cpu"
        assert steps(run, 3)[0] == pytest.approx(wanted, rel=1e-4)
        training.save(run)
        assert training.restore(run)


@pytest.mark.parametrize("dtype, path", [*((dtype, None) for dtype in DTYPES), ("float16", "rows")])
def test_the_store_in_every_number_format(dtype, path, few_images, tmp_path):
    cpu = training.start_run(tiny(device="cpu", store_dtype=dtype), tmp_path / "cpu")
    wanted, _ = steps(cpu, 3)
    with cuda_twin():
        run = training.start_run(
            tiny(store_dtype=dtype, store_path=path and str(tmp_path / path)), tmp_path / "cuda"
        )
        losses, _ = steps(run, 3)
        assert losses == pytest.approx(wanted, rel=1e-3)  # rounding may fall to the other side
        assert run.store.rows.device == (torch.device("cpu") if path else CUDA)
        index = torch.arange(FEW)
        assert run.store.unwritten == 0
        torch.testing.assert_close(run.store.read(index).cpu(), cpu.store.read(index), rtol=1e-2, atol=1e-2)
        training.save(run)
        rows = run.store.rows.clone()
        run.store.rows.zero_()
        assert training.restore(run) and torch.equal(run.store.rows, rows)


def test_a_distance_by_features(few_images, tmp_path):
    fields = dict(distance="pseudo_lpips", distance_options=dict(features="digits"))
    wanted, _ = steps(training.start_run(tiny(device="cpu", **fields), tmp_path / "cpu"), 3)
    with cuda_twin():
        assert steps(training.start_run(tiny(**fields), tmp_path / "cuda"), 3)[0] == pytest.approx(
            wanted, rel=1e-4
        )


def test_lpips_on_the_device():
    x, y = torch.rand(2, 2, 3, 32, 32).mul(2).sub(1)
    d = distance("lpips", net="alex", weights="random-for-tests")
    wanted = d(x, y)
    with cuda_twin(), torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(d.to("cuda")(x.cuda(), y.cuda()).cpu(), wanted, rtol=1e-4, atol=1e-6)


def test_features_and_scores(few_digits):
    generated = (torch.rand(FEW, 1, 8, 8) * 2 - 1).clamp(-1, 1)
    measure = lambda: metrics.evaluate(
        generated,
        few_digits,
        metrics=("precision", "recall", "diversity", "confident"),
        n=FEW,
        progress=False,
    )
    wanted = measure()
    with cuda_twin() as record:
        assert extractors.load_extractor("digits").device.type == "cuda"
        found = measure()
        assert record.transfers
    assert {k: v.value for k, v in found.items()} == pytest.approx(
        {k: v.value for k, v in wanted.items()}, rel=1e-4
    )


def test_inception_on_the_device(random_inception):
    x = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the weights are not the published ones
        wanted = extractors.load_extractor("inception", weights=random_inception, device="cpu")(x)
        with cuda_twin():
            extractor = extractors.load_extractor("inception", weights=random_inception)
            assert extractor.device.type == "cuda"
            found = extractor(x)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
