"The papermill jobs, as a user starts them: a process, parameters, an output notebook."

import json
import shutil
import subprocess
import sys
import zipfile

import nbformat
import numpy as np
import pytest
from PIL import Image

SMALL = "overrides: {epochs: 1, batch: 600, net: {base: 16, attention: [], estimate: [4]}, sample_every: 0, device: cpu}"


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
    done = papermill(root, "train.ipynb", tmp_path / "out.ipynb", f"out: {tmp_path / 'run'}, {SMALL}")
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
        f"out: {tmp_path / 'run'}, {SMALL.replace('epochs: 1', 'epochs: 2')}",
    )
    assert longer.returncode == 0, longer.stderr[-3000:]
    assert "resumes at step 3 of 6" in printed(tmp_path / "again.ipynb")


@pytest.mark.parametrize(
    "parameters, message",
    [
        ("presset: digits", "unknown parameter presset; the parameters are preset"),
        ("preset: digit", "did you mean 'digits'"),
        ("overrides: {epoch: 3}", "did you mean 'epochs'"),
        ("preset: cifar10-small, data_path: nowhere.zip", "nowhere.zip"),
        ("data_path: 5", "data_path=5: must be a path, as text, or None (papermill: -r data_path 5)"),
    ],
)
def test_train_refuses_before_any_work(root, tmp_path, parameters, message):
    done = papermill(root, "train.ipynb", tmp_path / "out.ipynb", f"out: {tmp_path / 'run'}, {parameters}")
    assert done.returncode == 1 and message in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "notebook", ["10c_trust", "ablate", "benchmark", "classifiers", "compare", "evaluate", "train"]
)
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
    parameters = f"out: {tmp_path / 'run'}, preset: cifar10-small, data_path: {cifar10_copy / 'cifar10-jpeg-test.zip'}, overrides: {{epochs: 1, batch: 2500, micro_batch: 250, net: {{base: 16, estimate: [8]}}, sample_every: 0}}"
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


@pytest.mark.parametrize(
    "notebook, parameters, lines",
    [
        (
            "compare.ipynb",
            "arms: [paper, regression], long_arms: [paper], long_steps: 4",
            [("paper", 1), ("paper", 2), ("paper", 4), ("regression", 1), ("regression", 2)],
        ),
        (
            "ablate.ipynb",
            "parts: [c, T], objectives: [paper], c_values: [0.1, 0.12], T_values: [100, 200]",
            [
                ("paper, lpips", 1),
                ("paper, lpips", 2),
                *((f"paper, pseudo_lpips, c = {c}", s) for c in (0.1, 0.12) for s in (1, 2)),
                ("T = 100, 1 epochs", 1),
                ("T = 100, 1 epochs", 2),
                ("T = 200, 1 epochs", 1),
                ("T = 200, 1 epochs", 2),
                ("T = 200, 2 epochs", 1),
                ("T = 200, 2 epochs", 2),
            ],
        ),
        (
            "ablate.ipynb",
            "parts: [recipe]",
            [
                (f"{rungs}, {rate}, {last}", s)
                for rungs in ("lognormal", "rising")
                for rate in ("constant", "falling")
                for last in ("kept", "left out")
                for s in (1, 2)
            ],
        ),
    ],
)
def test_a_job_of_many_runs_does_each_once(root, tmp_path, notebook, parameters, lines):
    """Every arm is trained and scored, into a file beside the runs, not over the repository's.

    Started again, the job reads what is there and trains only what is missing.
    """
    small, written = (
        SMALL.replace("epochs: 1, ", ""),
        tmp_path / f"{'recipe' if 'recipe' in parameters else notebook.removesuffix('.ipynb')}-digits.json",
    )
    parameters = f"train: true, out: {tmp_path / 'runs'}, seeds: [0], epochs: 1, n: 64, steps: [1, 2], {parameters}, {small}"
    done = papermill(root, notebook, tmp_path / "out.ipynb", parameters)
    assert done.returncode == 0, done.stderr[-3000:]
    first = json.loads(written.read_text())["rows"]
    assert sorted((r.get("name", r.get("arm")), r["steps"]) for r in first) == sorted(lines)
    assert all(np.isfinite(r["fd"]) and r["fd"] > 0 for r in first)
    pieces = sorted((tmp_path / "runs").glob("*.json"))
    times = {p: p.stat().st_mtime_ns for p in pieces}
    pieces[0].unlink()  # as if the job had been stopped before this one was written
    again = papermill(root, notebook, tmp_path / "again.ipynb", parameters)
    assert again.returncode == 0, again.stderr[-3000:]
    assert [p for p in pieces if p.stat().st_mtime_ns != times[p]] == pieces[:1]
    assert [(r["steps"], r["fd"]) for r in json.loads(written.read_text())["rows"]] == [
        (r["steps"], r["fd"]) for r in first
    ]


def test_compare_adds_what_a_piece_lacks_and_refuses_another_kind(root, tmp_path):
    "More steps are measured on the run that is there; other settings are refused; `gather` trains nothing."
    small = SMALL.replace("epochs: 1, ", "")

    def job(changes, **more):
        fields = dict(dict(train="true", n=64, steps="[1, 2]", seeds="[0]", arms="[paper]"), **more)
        return papermill(
            root,
            "compare.ipynb",
            tmp_path / "out.ipynb",
            f"out: {tmp_path / 'runs'}, results: {tmp_path / 'r.json'}, epochs: 1, {changes}"
            f"{', '.join(f'{k}: {v}' for k, v in fields.items())}, {small}",
        )

    rows = lambda: {
        (r["arm"], r["steps"]): r["fd"] for r in json.loads((tmp_path / "r.json").read_text())["rows"]
    }
    assert (done := job("")).returncode == 0, done.stderr[-3000:]
    first, weights = (
        rows(),
        next((tmp_path / "runs" / "paper-0" / "checkpoints").iterdir()).stat().st_mtime_ns,
    )
    assert (done := job("long_steps: 5, long_arms: null, settle: 2.0e-6, ")).returncode == 0, done.stderr[
        -3000:
    ]
    assert (
        rows().keys() == {("paper", 1), ("paper", 2), ("paper", 5)} and {k: rows()[k] for k in first} == first
    )
    assert next((tmp_path / "runs" / "paper-0" / "checkpoints").iterdir()).stat().st_mtime_ns == weights
    refused = job("", n=32)
    assert refused.returncode == 1 and "n: 64 there, 32 here" in refused.stderr
    gathered = job("gather: true, ", train="false", arms="[paper, regression]")
    assert (
        gathered.returncode == 0
        and rows().keys() == {("paper", 1), ("paper", 2)}
        and not (tmp_path / "runs" / "regression-0").exists()
    )


@pytest.mark.slow
def test_compiled_sampling_measures_the_same(root, tmp_path):
    "More steps on a copy of one run, compiled and not: the same distances, and the early rows untouched."
    small = SMALL.replace("epochs: 1, ", "")

    def job(name, changes):
        done = papermill(
            root,
            "compare.ipynb",
            tmp_path / "out.ipynb",
            f"train: true, out: {tmp_path / name}, results: {tmp_path / name}.json, epochs: 1, n: 64, "
            f"seeds: [0], arms: [paper], steps: [1], {changes}{small}",
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return {r["steps"]: r["fd"] for r in json.loads((tmp_path / f"{name}.json").read_text())["rows"]}

    first = job("plain", "")
    shutil.copytree(tmp_path / "plain", tmp_path / "fast")
    plain, fast = (
        job(name, f"long_steps: 4, long_arms: [paper], compiled: {name == 'fast'}, ")
        for name in ("plain", "fast")
    )
    assert plain.keys() == fast.keys() == {1, 4} and plain[1] == fast[1] == first[1]
    assert fast[4] == pytest.approx(plain[4], rel=1e-3)


@pytest.mark.parametrize(
    "notebook, parameters, message",
    [
        ("compare.ipynb", "arms: [papr]", "did you mean paper"),
        ("compare.ipynb", "overrides: {lr: 0.01}", "overrides has lr, which the arms set themselves"),
        ("compare.ipynb", "steps: [1, 2000]", "steps=2000: the schedule has only T=1000 times"),
        ("compare.ipynb", "seeds: []", "at least one entry each"),
        ("compare.ipynb", "n: 0", "n=0: must be an integer >= 1"),
        ("compare.ipynb", "results: 5", "results=5: must be a path"),
        ("compare.ipynb", "settle: small", "settle=small: must be None"),
        (
            "ablate.ipynb",
            "overrides: {epochs: 1}",
            "overrides has epochs, which this job varies or sets itself",
        ),
        ("ablate.ipynb", "parts: [d]", "Known: distance, c, T, recipe"),
        ("ablate.ipynb", "c_values: [-1]", "expected a finite number >= 0"),
        ("ablate.ipynb", "seed: 1", "unknown parameter seed"),
    ],
)
def test_a_job_of_many_runs_refuses_before_any_work(root, tmp_path, notebook, parameters, message):
    done = papermill(
        root, notebook, tmp_path / "out.ipynb", f"train: true, out: {tmp_path / 'runs'}, {parameters}"
    )
    assert (
        done.returncode == 1 and message in done.stderr.replace("'", "") and not (tmp_path / "runs").exists()
    )


def test_a_preset_brings_its_objective(root, tmp_path):
    """`-p preset digits-consistency` is all that the README says.

    The objective is the preset's, and a model with classes is sampled with them.
    """
    done = papermill(
        root,
        "train.ipynb",
        tmp_path / "out.ipynb",
        f"preset: digits-consistency, out: {tmp_path / 'run'}, {SMALL}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["objective"] == "consistency"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["classes"] == 10
