"""The evaluation job, as a user starts it.

What it leaves, what it refuses, and that an interrupted one ends where an unbroken one does.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from synthetic_sets import make_mnist

from dddm.config import TrainConfig
from dddm.data import digits
from dddm.evaluation import Evaluation, open_evaluation
from dddm.metrics import check_kind, evaluate
from dddm.presets import preset
from dddm.runs import load
from dddm.sampling import sample
from dddm.sources import CIFAR10
from dddm.store import encode, without_checksum
from dddm.study import Study, chosen_variants, open_inputs
from dddm.tables import load_results
from dddm.training import train

SMALL = dict(epochs=1, batch=600, net=dict(base=16, attention=[], estimate=[4]), sample_every=0, device="cpu")


def offline(*args):
    raise OSError("no network")


def command(root, output, parameters):
    return [
        sys.executable,
        "-m",
        "papermill",
        str(root / "nbs" / "evaluate.ipynb"),
        str(output),
        "-y",
        "{" + parameters + "}",
        "--no-progress-bar",
    ]


def papermill(root, output, parameters):
    return subprocess.run(command(root, output, parameters), cwd=root, capture_output=True, text=True)


def printed(path):
    "All that the notebook at `path` printed."
    return "\n".join(
        o.text
        for c in nbformat.read(path, 4).cells
        if c.cell_type == "code"
        for o in c.outputs
        if o.output_type == "stream"
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of one epoch."
    return train(preset("digits", **SMALL), tmp_path_factory.mktemp("runs") / "tiny", progress=False)


def test_interrupted_and_damaged_ends_in_the_numbers_of_the_library(root, run, tmp_path):
    """Stopped in its last step count, with a finished piece cut short while it was away: started again it
    reads back what is whole, makes the rest, and every number is what the library gives for samples drawn in
    one go.
    """
    out = tmp_path / "results"
    parameters = f"run: {run}, out: {out}, n: 80, batch_size: 40, device: cpu, "
    parameters += "steps: [3, 1, 200], seeds: [0, 1], all_seeds_to: 3"
    process = subprocess.Popen(
        command(root, tmp_path / "broken.ipynb", parameters),
        cwd=root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # a background job's shell ignores it
    until = time.monotonic() + 300
    while not (pieces := sorted(out.glob("samples/*/seed0-steps3.safetensors"))) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) != 0 and not (out / "results.json").exists()
    first, third = pieces[0].with_name("seed0-steps1.safetensors"), pieces[0]
    written = first.stat().st_mtime_ns
    third.write_bytes(third.read_bytes()[:-100])
    [scores] = out.rglob("seed0-steps1-*.json")
    scores.write_text(scores.read_text()[:40])

    done = papermill(root, tmp_path / "again.ipynb", parameters)
    assert done.returncode == 0, done.stderr[-3000:]
    text = printed(tmp_path / "again.ipynb")
    assert (
        first.stat().st_mtime_ns == written
        and "seed0-steps3.safetensors is made again: it is damaged" in text
        and f"the scores in {scores.name} are made again: the file is damaged" in text
        and "tiny: lowest FD-digits" in text
    )
    found, about = load_results(out / "results.json")
    assert list(found) == [
        f"tiny, {s} steps, seed {k}" for k, s in ((0, 1), (0, 3), (0, 200), (1, 1), (1, 3))
    ] + ["noise"]
    assert (
        about["cells"]["tiny, 3 steps, seed 1"] == dict(run="tiny", steps=3, seed=1)
        and about["subjects"]["tiny"]["sampler"] == "iterate"
    )
    metrics = ("fd", "precision", "recall", "diversity", "mean shift", "confident")
    for seed, steps in ((0, (1, 3, 200)), (1, (1, 3))):
        for s, x in sample(load(run), 80, steps, "iterate", seed, batch_size=40).items():
            scored = found[f"tiny, {s} steps, seed {seed}"]
            assert 0 <= scored["copies"].value <= 1
            expected = evaluate(
                x, digits(), "digits", metrics, seed=seed, device="cpu", cache=False, progress=False
            )
            assert scored.keys() == expected.keys() | {"copies"}
            for name, r in expected.items():
                check_kind(scored[name], r)
                assert (scored[name].value, scored[name].seed) == (
                    pytest.approx(r.value, rel=1e-4, abs=1e-6),
                    seed,
                ), name


def test_samples_in_another_precision_are_scored_anew(run, tmp_path):
    "The second evaluation makes its samples again, so the scores of the first are not theirs."
    options = dict(steps=[2], n=80, seeds=[0], device="cpu", out=tmp_path)
    exact = open_evaluation([run], **options, precision="float32")
    rough = open_evaluation([run], **options, precision="bfloat16")
    list(exact.run())
    with pytest.warns(UserWarning, match="of other samples, data, weights or library"):
        list(rough.run())
    x = rough.samples(rough.subjects[0], 0).read(2)
    fresh = evaluate(x, digits(), "digits", "fd", seed=0, device="cpu", cache=False, progress=False)
    scores = rough.scores["tiny", 2, 0]
    assert scores["FD-digits"].value == pytest.approx(fresh["FD-digits"].value, rel=1e-6)
    assert scores["FD-digits"].value != pytest.approx(exact.scores["tiny", 2, 0]["FD-digits"].value, rel=1e-6)
    again = open_evaluation([run], **options, precision="bfloat16")
    list(again.run())
    assert again.scores == rough.scores
    assert again.paper_table() == []  # it has no digits


@pytest.mark.parametrize("name, fid", [("cifar10", "2.90"), ("imagenet64", "4.21"), ("mnist", None)])
def test_the_papers_rows_are_those_of_the_data(name, fid):
    "One step of the paper's T = 1000, Tables 1 and 2; it has no table of other images."
    subject = SimpleNamespace(config=preset(name), name="run", budget="")
    about = dict(subjects=[subject], distance="FID", seeds=[0], steps=[1], scores={("run", 1, 0): {}})
    found = [(r["NFE"], r["metric"], r["paper"]) for r in Evaluation.paper_table(SimpleNamespace(**about))]
    assert found[:1] == ([(1, "FID", fid)] if fid else [])


@pytest.mark.slow
def test_two_runs_with_another_sampler(root, run, tmp_path):
    "Several runs side by side, each with the sampler of its objective, one table for all."
    other = train(preset("digits", objective="regression", **SMALL), tmp_path / "regression", progress=False)
    done = papermill(
        root,
        tmp_path / "out.ipynb",
        f"runs: [{run}, {other}], out: {tmp_path / 'results'}, n: 80, steps: [1, 4], seeds: [3], device: cpu",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, about = load_results(tmp_path / "results" / "results.json")
    assert {name: s["sampler"] for name, s in about["subjects"].items()} == {
        "tiny": "iterate",
        "regression": "ddim",
    }
    again = papermill(
        root,
        tmp_path / "again.ipynb",
        f"run: {run}, sampler: renoise, out: {tmp_path / 'renoise'}, n: 80, steps: [4], seeds: [3], "
        "device: cpu",
    )
    assert again.returncode == 0, again.stderr[-3000:]
    images = load_file(next((tmp_path / "renoise" / "samples").rglob("seed3-steps4.safetensors")))["images"]
    assert (
        images.int() - encode(sample(load(run), 80, 4, "renoise", seed=3), torch.uint8).int()
    ).abs().max() <= 1  # this model reads its estimate
    expected = evaluate(
        sample(load(other), 80, 4, "ddim", seed=3),
        digits(),
        "digits",
        "fd",
        seed=3,
        device="cpu",
        cache=False,
        progress=False,
    )
    assert found["regression, 4 steps, seed 3"]["FD-digits"].value == pytest.approx(
        expected["FD-digits"].value, rel=1e-4
    )


def test_cifar10_runs_are_judged_by_cifar(root, tmp_path):
    """A run on CIFAR-10 of class folders, and no word about the extractor.

    The small network of that data judges, under its name.
    """
    for k, name in enumerate(CIFAR10):
        (tmp_path / "c10" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(
                np.random.default_rng(10 * k + i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            ).save(tmp_path / "c10" / name / f"{i}.png")
    config = preset(
        "cifar10-small",
        data_path=str(tmp_path / "c10"),
        epochs=1,
        batch=20,
        net=dict(base=8, attention=[], estimate=[8]),
        sample_every=0,
        device="cpu",
    )
    run = train(config, tmp_path / "small", progress=False)
    done = papermill(
        root,
        tmp_path / "out.ipynb",
        f"run: {run}, out: {tmp_path / 'results'}, n: 20, steps: [1, 3], seeds: [0], device: cpu",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, about = load_results(tmp_path / "results" / "results.json")
    scored = found["small, 3 steps, seed 0"]
    assert about["distance"] == "FD-cifar" and (
        scored["FD-cifar"].n,
        scored["FD-cifar"].reference_n,
        scored["FD-cifar"].extractor,
    ) == (20, 40, "cifar")


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_which_network_judges_idx_images(tmp_path, pixel_cache, monkeypatch, name, folder):
    "MNIST's own judges MNIST, in a study too. Fashion-MNIST has none: Inception, or what a message names."
    make_mnist(tmp_path, folder, 40)
    tiny = dict(net=dict(base=8, attention=[], estimate=[14]), epochs=1, batch=20, device="cpu")
    config = preset("mnist", data=name, data_path=str(tmp_path), sample_every=0, **tiny)
    run = train(config, tmp_path / "run", progress=False)
    wanted = dict(steps=[1], n=10, seeds=[0], device="cpu")
    paper, fields = chosen_variants("objectives", "mnist", ["paper"]), dict(data=name)
    study = Study(tmp_path, paper, "mnist", data_path=str(tmp_path), overrides=fields)
    if name == "mnist":
        test = tmp_path / folder / "raw" / "t10k-images-idx3-ubyte.gz"
        whole, held_out = open_evaluation([run], **wanted), open_evaluation([run], data=test, **wanted)
        assert whole.distance == "FD-mnist" and (len(whole.images), len(held_out.images)) == (40, 20)
        assert open_inputs(study).extractor.name == "mnist"
        return
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for opened in (lambda: open_evaluation([run], **wanted), lambda: open_inputs(study)):
        with pytest.raises(FileNotFoundError, match="extractor='inception' needs.*digits, cifar, mnist"):
            opened()
    assert open_evaluation([run], extractor="mnist", **wanted).distance == "FD-mnist"


@pytest.mark.slow
def test_inception_from_a_file_as_a_job(root, tmp_path, random_inception):
    """The path of the paper's own numbers, at a dozen images and random weights.

    Their name says that it is no FID.
    """
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(60):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            folder / f"{k:02d}.png"
        )
    config = TrainConfig(
        data=str(folder),
        shape=(3, 16, 16),
        epochs=1,
        batch=30,
        net=dict(base=8, multipliers=(1,), blocks=1, attention=(), estimate=(16,)),
        sample_every=0,
        device="cpu",
    )
    run = train(config, tmp_path / "colour", progress=False)
    done = papermill(
        root,
        tmp_path / "out.ipynb",
        f"run: {run}, out: {tmp_path / 'results'}, n: 12, steps: [1, 2], seeds: [0], extractor: inception, "
        f"weights: {random_inception}, batch_size: 12, device: cpu",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, _ = load_results(tmp_path / "results" / "results.json")
    assert set(found["colour, 1 steps, seed 0"]) == {
        "FD-inception",
        "IS-inception",
        "precision",
        "recall",
        "diversity",
        "mean shift",
        "copies",
    }
    assert "is no FID" in printed(tmp_path / "out.ipynb")


@pytest.mark.parametrize(
    "parameters, message",
    [
        ("run: {run}, step: [1]", "unknown parameter step; the parameters are run"),
        ("run: {run}, steps: '[1, 2]'", "steps='[1, 2]': must be a list of different integers >= 1"),
        ("run: {run}, seeds: [0, 0]", "seeds=[0, 0]: must be a list of different integers >= 0"),
        ("run: 5", "run=5: must be a path"),
        ("run: {empty}", "holds no config.json: it is no run directory"),
        ("run: {moved}", "gone.zip' is neither a path that exists"),
        ("run: {run}, extractor: inception, weights: {empty}/inception.pth", "inception.pth' is not a file"),
        ("run: {run}, extractor: cifar, n: 20", "(1, 8, 8)"),
    ],
)
def test_refuses_before_sampling(root, run, tmp_path, parameters, message):
    empty, moved = tmp_path / "empty", tmp_path / "moved"
    empty.mkdir()
    shutil.copytree(run, moved, ignore=shutil.ignore_patterns("evaluation"))
    config = without_checksum(json.loads((moved / "config.json").read_text()))
    (moved / "config.json").write_text(json.dumps({**config, "data": str(tmp_path / "gone.zip")}))
    done = papermill(
        root,
        tmp_path / "out.ipynb",
        f"out: {tmp_path / 'results'}, device: cpu, " + parameters.format(run=run, empty=empty, moved=moved),
    )
    assert done.returncode == 1 and message in done.stderr, done.stderr[-2000:]
    assert not list(tmp_path.rglob("samples/*/seed*"))
