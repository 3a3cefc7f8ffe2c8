"""How a pass is made: one compiled graph, its number format, its size, what the program waits for, where the
history goes."""

import importlib.util
import json
import math
import warnings

import pytest
import torch
from cuda_twin import cuda_twin
from test_cuda_twin import CASES, TINY, as_before, few_digits, few_images, tiny  # noqa: F401 (fixtures)

from dddm import config, passes, runs, sampling, training
from dddm.config import TrainConfig, build
from dddm.objectives import OBJECTIVES
from dddm.passes import fitting_micro_batch, step_dtype
from dddm.presets import PRESETS, preset
from dddm.runs import checkpoints, history
from dddm.training import train

ONE_BLOCK = dict(base=8, multipliers=(1,), blocks=1, attention=(), estimate=(8,))
GRAPH_CASES = [(o, e, c) for o, e, c in CASES if (c is None) == (e in ("self", "none", "truth"))]


@pytest.fixture
def graphs(monkeypatch):
    "torch.compile that traces and does not generate code; a list of the graphs that it made."
    made, real = [], torch.compile

    def keep(graph, inputs):
        made.append(graph)
        return graph

    def compile_without_code(f, options=None, **how):
        assert how == dict(fullgraph=True, dynamic=False)
        return real(f, backend=keep, **how)

    monkeypatch.setattr(torch, "compile", compile_without_code)
    return made


@pytest.mark.parametrize("objective, estimate, classes", GRAPH_CASES)
def test_a_run_is_one_graph(objective, estimate, classes, graphs, few_images, tmp_path):  # noqa: F811
    """One graph, and the losses of eager passes.

    Three epochs with a smaller last batch, two parts a batch, levels that grow, labels, dropout.

    fullgraph: a break in the graph is an error."""
    fields = dict(
        objective=objective,
        classes=classes,
        epochs=3,
        levels=(2, 8),
        flip=True,
        device="cpu",
        net={**ONE_BLOCK, "dropout": 0.3},
        estimate=None if OBJECTIVES[objective].estimate == estimate else estimate,
    )
    found = {}
    for compiled in (False, True):
        run = train(tiny(**{**fields, "compile": compiled}), tmp_path / str(compiled), progress=False)
        found[compiled] = [r["loss"] for r in history(run)]
    assert len(graphs) == 1
    assert len(found[True]) == 6 and found[True] == pytest.approx(found[False], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["paper", "consistency"])
def test_generated_code_gives_the_eager_gradients(objective, few_images, tmp_path):  # noqa: F811
    "As `compiling_pays` compares them, by the real compiler, with dropout."
    run = training.start_run(
        tiny(objective=objective, device="cpu", net={**ONE_BLOCK, "dropout": 0.3}), tmp_path
    )
    eager = passes.trial(run, 6).gradients
    run.compiled, run.compute = True, passes.compile_pass(run.device)
    compiled = passes.trial(run, 6).gradients
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_graph_that_cannot_be_made_is_a_warning(few_images, tmp_path):  # noqa: F811
    """compile=None on the simulated device, for which nothing can be compiled: the run goes on in eager
    passes, and says so."""
    with cuda_twin(), pytest.warns(UserWarning, match="passes stay eager"):
        run = training.start_run(tiny(compile=None), tmp_path)
        assert not run.compiled and "eager, of up to 6 images" in passes.describe(run)
        training.step(run)


def test_the_number_format_follows_objective_and_device():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for capability, able in (((9, 0), True), ((8, 0), True), ((7, 5), False)):
        with cuda_twin(capability=capability):
            for objective in OBJECTIVES:
                config = TrainConfig(objective=objective)
                wanted = able and objective in ("paper", "published_code", "regression")
                assert step_dtype(config, gpu) == (torch.bfloat16 if wanted else torch.float32)
                assert step_dtype(config, cpu) == torch.float32
            asked = TrainConfig(objective="consistency", precision="bfloat16")
            if able:
                assert step_dtype(asked, gpu) == torch.bfloat16
            else:
                with pytest.raises(ValueError, match="has no bfloat16.*'float32' or 'auto'"):
                    step_dtype(asked, gpu)


@pytest.mark.parametrize(
    "free, compiled, wanted",
    [(10**12, False, 1024), (700 * 10**6 + 100, False, 512), (700 * 10**6 + 100, True, 1024), (1, False, 16)],
)
def test_the_micro_batch_follows_the_memory(free, compiled, wanted, monkeypatch):
    "An image takes a million bytes, and a pass a hundred more."
    run = type("Run", (), dict(config=TrainConfig(batch=1024), world=1))
    monkeypatch.setattr(passes, "memory_of_trial", lambda run, n: 100 + n * 10**6)
    assert fitting_micro_batch(run, free, compiled) == wanted
    run.config = TrainConfig(batch=1022)
    assert all(fitting_micro_batch(run, 10**6 * k, compiled) % 2 == 0 for k in range(1, 1000, 7))


def test_what_is_not_finite_is_noticed_a_step_late(few_images, tmp_path, monkeypatch):  # noqa: F811
    """On a GPU the step itself does not look; the next one, or a checkpoint, does, and names the step and its
    samples."""
    for looks in (training.step, training.save):
        with cuda_twin():
            run = training.start_run(tiny(), tmp_path / looks.__name__)
            training.step(run)
            training.save(run)
            samples = run.batch()[0].tolist()
            run.model.net.stem.weight.data[0] = math.nan
            training.step(run)
            with pytest.raises(FloatingPointError) as told:
                looks(run)
            assert (
                "at step 1 " in str(told.value)
                and str(samples) in str(told.value)
                and "step-1" in str(told.value)
            )
            assert [p.name for p in checkpoints(run.out / "checkpoints")] == ["step-1"]


def test_moments_that_are_not_finite_are_not_saved(few_images, tmp_path):  # noqa: F811
    run = training.start_run(tiny(device="cpu"), tmp_path)
    training.step(run)
    next(iter(run.optimizer.state.values()))["exp_avg"].fill_(math.inf)
    with pytest.raises(FloatingPointError, match="moments are not finite after step 1; no checkpoint"):
        training.save(run)


def test_weights_in_another_memory_format_are_saved(few_images, tmp_path):  # noqa: F811
    run = training.start_run(tiny(device="cpu"), tmp_path)
    run.model.to(memory_format=torch.channels_last)
    training.step(run)
    training.save(run)
    loaded = runs.load(tmp_path, ema=False).state_dict()
    for name, value in run.model.state_dict().items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_a_sampled_batch_waits_once(sampler):
    """Five images in batches of two, at two numbers of steps: three waits, and an image that is not finite is
    told at the end."""
    objective = "meanflow" if sampler == "meanflow" else "paper"
    model = config.build(TrainConfig(objective=objective, net=ONE_BLOCK)).eval()
    net = model.net.net if sampler == "meanflow" else model.net
    wanted = sampling.sample(model, 5, (1, 3), sampler, batch_size=2)
    with cuda_twin() as record:
        model.to("cuda")
        sampling.sample(model, 2, 2, sampler)  # the schedule's tables are made
        record.reset()
        found = sampling.sample(model, 5, (1, 3), sampler, batch_size=2)
        assert record.syncs.total() == 3 and {kind for kind, _ in record.syncs} == {"synchronize"}, (
            record.syncs
        )
        for s in (1, 3):
            torch.testing.assert_close(found[s], wanted[s], rtol=1e-4, atol=1e-4)
        net.head[-1].bias.data.fill_(math.nan)
        with pytest.raises(RuntimeError, match="non-finite"):
            sampling.sample(model, 5, (1, 3), sampler, batch_size=2)


def test_bfloat16_samples_where_they_are_as_good():
    model = config.build(TrainConfig(net=ONE_BLOCK)).eval()
    assert sampling.sampling_dtype(model, "auto") == torch.float32  # a CPU
    with cuda_twin(), torch.no_grad():
        model.to("cuda")
        assert sampling.sampling_dtype(model, "auto") == torch.bfloat16  # fresh: F = 0
        model.net.head[-1].weight.normal_(std=30.0)
        assert sampling.sampling_dtype(model, "auto") == torch.float32
        assert sampling.sampling_dtype(model, "bfloat16") == torch.bfloat16
        assert sampling.sample(model, 2, precision="bfloat16").dtype == torch.float32
    with cuda_twin(capability=(7, 5)):
        assert sampling.sampling_dtype(model.to("cuda"), "auto") == torch.float32
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"):
        sampling.sampling_dtype(model, "bfloat")


def test_blocks_that_are_computed_twice_change_nothing(few_images, tmp_path):  # noqa: F811
    losses = [
        [
            r["loss"]
            for r in history(
                train(
                    tiny(device="cpu", recompute=r, net={**ONE_BLOCK, "dropout": 0.2}),
                    tmp_path / str(r),
                    progress=False,
                )
            )
        ]
        for r in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_history_goes_to_a_tracker_too(few_images, tmp_path):  # noqa: F811
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(tiny(device="cpu", tracker="tensorboard"), tmp_path / "run", progress=False)
    events = EventAccumulator(str(run / "dddm")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(
        [r["loss"] for r in history(run)], rel=1e-5
    )


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_told(few_images, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="tracker='wandb'.*pip install wandb"):
        training.start_run(tiny(device="cpu", tracker="wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="did you mean 'wandb'"):
        TrainConfig(tracker="wanbd")


def test_old_runs_go_on(few_images, tmp_path):  # noqa: F811
    "A configuration of before: passes eager, a micro-batch of its preset. It resumes under today's preset."
    run = train(tiny(device="cpu", epochs=1, compile=False, micro_batch=6), tmp_path / "run", progress=False)
    fields = json.loads((run / "config.json").read_text())
    for name in ("recompute", "tracker", "checksum"):
        del fields[name]
    (run / "config.json").write_text(json.dumps(fields))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tiny(device="cpu", epochs=2, compile=None, micro_batch=None), run, progress=False)


def test_no_preset_says_what_a_gpu_can_hold():
    assert all(preset(name).micro_batch is None and preset(name).compile is None for name in PRESETS)
    weights = sum(p.numel() for p in build(preset("cifar10-ten-minutes")).parameters())
    assert weights < 25e6
