"The papermill jobs, as a user starts them: a process, parameters, an output notebook."

import json
import subprocess
import sys
import zipfile

import nbformat
import numpy as np
import pytest
from PIL import Image

from dddm.results import load_rows, select

SMALL = (
    "overrides: {epochs: 1, batch: 600, net: {base: 16, attention: [], estimate: [4]}, "
    "sample_every: 0, device: cpu}"
)


def papermill(root, notebook, output, parameters):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            root / "nbs" / notebook,
            output,
            "-y",
            "{" + parameters + "}",
            "--no-progress-bar",
        ],
        cwd=root,
        capture_output=True,
        text=True,
    )


def printed(path):
    "All that the notebook at `path` printed."
    return "\n".join(
        o.text
        for c in nbformat.read(path, 4).cells
        if c.cell_type == "code"
        for o in c.outputs
        if o.output_type == "stream"
    )


def test_train_trains_samples_and_measures(root, tmp_path):
    """The whole story at a size of seconds.

    Configuration, curve, samples and numbers at 1, 2, 5, 20, 100 steps; a second start resumes.
    """
    done = papermill(
        root, "train.ipynb", tmp_path / "out.ipynb", f"preset: digits, out: {tmp_path / 'run'}, {SMALL}"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [r["steps"] for r in results["rows"]] == [1, 2, 5, 20, 100] and results["steps"] == 3
    assert all(
        np.isfinite(r["energy_distance"]) and r["energy_distance"] > results["floor"] for r in results["rows"]
    )
    assert "starts at step 0 of 3" in printed(tmp_path / "out.ipynb")
    longer = papermill(
        root,
        "train.ipynb",
        tmp_path / "again.ipynb",
        f"preset: digits, out: {tmp_path / 'run'}, {SMALL.replace('epochs: 1', 'epochs: 2')}",
    )
    assert longer.returncode == 0, longer.stderr[-3000:]
    assert "resumes at step 3 of 6" in printed(tmp_path / "again.ipynb")


def test_train_compares_two_presets(root, tmp_path):
    "A list is trained one after the other, each in its own directory, and ends in one figure and one table."
    done = papermill(
        root,
        "train.ipynb",
        tmp_path / "out.ipynb",
        f"preset: [digits, digits-one-step], out: {tmp_path / 'runs'}, {SMALL}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, objective in (("digits", "paper"), ("digits-one-step", "meanflow")):
        results = json.loads((tmp_path / "runs" / name / "results.json").read_text())
        assert (results["preset"], results["objective"]) == (name, objective)
        assert [r["steps"] for r in results["rows"]] == [1, 2, 5, 20, 100]


@pytest.mark.parametrize(
    "parameters, message",
    [
        ("presset: digits", "unknown parameter presset; the parameters are preset"),
        ("preset: digit", "did you mean 'digits'"),
        ("overrides: {epoch: 3}", "did you mean 'epochs'"),
        ("preset: cifar10-small, data_path: nowhere.zip", "nowhere.zip"),
        ("preset: own", "'own' needs data, the path of its images"),
        ("preset: digits, data: pictures", "others take neither"),
        ("preset: [own, digits], data: pictures", "stands alone"),
        ("preset: digits, size: 32", "others take neither"),
        ("preset: own, data: nowhere", "nowhere' is neither a path that exists"),
        ("preset: [digits, mnist]", "they are for different images"),
        ("data_path: 5", "data_path=5: must be a path, as text, or None (papermill: -r data_path 5)"),
    ],
)
def test_train_refuses_before_any_work(root, tmp_path, parameters, message):
    done = papermill(root, "train.ipynb", tmp_path / "out.ipynb", f"out: {tmp_path / 'run'}, {parameters}")
    assert done.returncode == 1 and message in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("notebook", ["10c_trust", "benchmark", "classifiers", "evaluate", "study", "train"])
def test_parameters_are_checked_once_and_their_cell_may_run_again(root, notebook):
    """Its first cells as a kernel runs them.

    A name that is none stops it; after the notebook has run, changed parameters do not.
    """
    code = [
        c.source for c in nbformat.read(root / "nbs" / f"{notebook}.ipynb", 4).cells if c.cell_type == "code"
    ]
    at = next(k for k, source in enumerate(code) if source.startswith(("given.check(", "known = ")))
    with pytest.raises(ValueError, match="unknown parameter stepps; the parameters are"):
        exec("\n".join([*code[:at], "stepps = [1]", code[at]]), {})
    names = {}
    exec("\n".join(code[: at + 1]), names)
    names |= dict(json=json, figure=1)  # what the cells below bring
    exec("\n".join(code[at - 1 : at + 1]), names)  # the parameters, and the check
    exec("\n".join(code[: at + 1]), names)  # from the top, in the same kernel


@pytest.mark.slow
def test_train_on_two_processes_and_a_zip_of_class_folders(root, tmp_path):
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as z:
        for i in range(40):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "one.png")
            z.write(tmp_path / "one.png", f"train/{'ab'[i % 2]}/{i:03d}.png")
    parameters = (
        f"out: {tmp_path / 'run'}, devices: 2, preset: digits, "
        f"overrides: {{data: {tmp_path / 'pictures.zip'}, shape: [3, 16, 16], classes: 2, batch: 20, "
        f"epochs: 2, device: cpu, net: {{base: 16, attention: [], estimate: [8]}}}}"
    )
    done = papermill(root, "train.ipynb", tmp_path / "out.ipynb", parameters)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 4
    assert len(list((tmp_path / "run" / "checkpoints").glob("*/store-1.pt"))) == 1


@pytest.mark.slow
def test_train_on_the_cifar10_copy(root, tmp_path, cifar10_copy):
    images = cifar10_copy / "cifar10-jpeg-test.zip"
    parameters = (
        f"out: {tmp_path / 'run'}, preset: cifar10-small, data_path: {images}, overrides: "
        "{epochs: 1, batch: 2500, micro_batch: 250, net: {base: 16, estimate: [8]}, sample_every: 0}"
    )
    done = papermill(root, "train.ipynb", tmp_path / "out.ipynb", parameters)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 4


@pytest.mark.slow
def test_benchmark(root, tmp_path):
    done = papermill(
        root,
        "benchmark.ipynb",
        tmp_path / "out.ipynb",
        f"out: {tmp_path / 'benchmark.json'}, rounds: 1, big: false",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"machine", "loop digits", "sampling", "GFLOP an image"} <= json.loads(
        (tmp_path / "benchmark.json").read_text()
    ).keys()


STUDY = f"seeds: [0], epochs: 1, n: 64, steps: [1, 2], {SMALL.replace('epochs: 1, ', '')}"


@pytest.mark.parametrize(
    "parameters, name, lines",
    [
        (
            "variants: [paper, regression]",
            "digits",
            [("paper", "iterate"), ("regression", "ddim")],
        ),
        pytest.param(
            "sets: [c, T], options: {objectives: [paper], c_values: [0.1, 0.12], T_values: [100, 200]}",
            "digits-c-T",
            [
                ("paper, lpips", "iterate"),
                *((f"paper, pseudo_lpips, c = {c}", "iterate") for c in (0.1, 0.12)),
                *((f"T = {T}, {epochs} epochs", "iterate") for T, epochs in ((100, 1), (200, 1), (200, 2))),
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "sets: [recipe]",
            "digits-recipe",
            [
                (f"{levels}, {rate}, {last}", "renoise")
                for levels in ("lognormal", "rising")
                for rate in ("constant", "falling")
                for last in ("kept", "left out")
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_study_does_each_training_once(root, tmp_path, parameters, name, lines):
    "It writes beside its runs, not into the repository; started again, it trains only what is missing."
    parameters = f"train: true, out: {tmp_path / 'runs'}, {parameters}, {STUDY}"
    done = papermill(root, "study.ipynb", tmp_path / "out.ipynb", parameters)
    assert done.returncode == 0, done.stderr[-3000:]
    first = load_rows(tmp_path / f"{name}.json")
    found = {(r.variant, r.sampler, r.steps): r.value for r in select(first.rows, metric="fd")}
    assert found.keys() == {(*line, s) for line in lines for s in (1, 2)}
    assert all(np.isfinite(value) and value > 0 for value in found.values())
    assert first.provenance["command"].startswith("papermill nbs/study.ipynb OUT -y '{")
    files = sorted((tmp_path / "runs").glob("*.json"))
    times = {p: p.stat().st_mtime_ns for p in files}
    files[0].unlink()  # as if the job had been stopped before this one was written
    again = papermill(root, "study.ipynb", tmp_path / "again.ipynb", parameters)
    assert again.returncode == 0, again.stderr[-3000:]
    assert [p for p in files if p.stat().st_mtime_ns != times[p]] == files[:1]
    second = select(load_rows(tmp_path / f"{name}.json").rows, metric="fd")
    assert {(r.variant, r.sampler, r.steps): r.value for r in second} == found


@pytest.mark.slow
def test_study_gathers_what_is_there(root, tmp_path):
    "A study of one variant, then `gather` with two: nothing is trained. Without both, a file is shown."

    def job(parameters):
        parameters = f"out: {tmp_path / 'runs'}, results: {tmp_path / 'r.json'}, {parameters}, {STUDY}"
        done = papermill(root, "study.ipynb", tmp_path / "out.ipynb", parameters)
        assert done.returncode == 0, done.stderr[-3000:]
        return printed(tmp_path / "out.ipynb")

    job("train: true, variants: [paper]")
    rows = load_rows(tmp_path / "r.json").rows
    job("gather: true, variants: [paper, regression]")
    assert load_rows(tmp_path / "r.json").rows == rows
    assert not (tmp_path / "runs" / "regression-0").exists()
    assert "as many real images would score" in job("variants: [paper]")


@pytest.mark.parametrize(
    "parameters, message",
    [
        ("variants: [papr]", "did you mean 'paper'"),
        ("sets: [d]", "set 'd' is unknown"),
        ("sets: [T], options: {c_values: [1]}", "option 'c_values' is unknown"),
        ("overrides: {lr: 0.01}", "overrides has lr, which the variants set themselves"),
        ("overrides: {epochs: 1}", "overrides has epochs, which the study sets itself"),
        ("steps: [1, 2000]", "steps=2000: the schedule has only T=1000 times"),
        ("seeds: []", "seeds=[]: must be a list of different integers"),
        ("n: 0", "n=0: must be an integer >= 1"),
        ("results: 5", "results=5: must be a path"),
        ("tolerance: small", "tolerance='small': must be None"),
        ("sets: [c], options: {c_values: [-1.0]}", "expected a finite number >= 0"),
        ("seed: 1", "unknown parameter seed"),
    ],
)
def test_study_refuses_before_any_work(root, tmp_path, parameters, message):
    parameters = f"train: true, out: {tmp_path / 'runs'}, {parameters}"
    done = papermill(root, "study.ipynb", tmp_path / "out.ipynb", parameters)
    assert done.returncode == 1 and message in done.stderr and not (tmp_path / "runs").exists()


def test_a_preset_brings_its_objective(root, tmp_path):
    """`-p preset digits-one-step` is all that it takes.

    The objective is the preset's.
    """
    done = papermill(
        root,
        "train.ipynb",
        tmp_path / "out.ipynb",
        f"preset: digits-one-step, out: {tmp_path / 'run'}, {SMALL}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["objective"] == "meanflow"
