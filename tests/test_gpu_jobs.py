"The jobs for a GPU, each whole, at the size of digits on a CPU."

import json
import os
import subprocess
import sys

import pytest


def run(root, job, out, *options):
    "The results of `tests/gpu/<job>.py --dry`, of which no stage failed or was left out."
    command = [sys.executable, root / "tests" / "gpu" / f"{job}.py", "--dry", *options]
    environment = {**os.environ, "OUT": str(out), "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((out / "results.json").read_text())
    wrong = {name: kept for name, kept in results["stages"].items() if "result" not in kept}
    assert results["dry"] and not wrong, wrong
    return results


@pytest.mark.slow
def test_check(root, tmp_path):
    results = run(root, "check", tmp_path, "--budget", "600")
    stages = {name: kept["result"] for name, kept in results["stages"].items()}
    assert len(stages) == 10
    assert stages["same_as_cpu"]["out_of_tolerance"] == []
    assert all(r["weights_differ"] == r["samples_differ"] == 0 for r in stages["whole_runs"].values())


@pytest.mark.slow
def test_images_and_going_on_from_its_weights(root, tmp_path):
    first = run(root, "images", tmp_path / "first", "--until", "0.5")
    second = run(root, "images", tmp_path / "second", "--weights", str(tmp_path / "first"))
    scores = [s for results in (first, second) for s in results["scores"]]
    half, end = (results["stages"]["reload"]["result"]["progress"] for results in (first, second))
    assert 0.3 < half <= 0.52
    assert second["scores"][0]["progress"] == pytest.approx(half, abs=1e-3)
    assert 0.8 < end <= 1.05
    assert scores[-1]["FD-digits at 1"] < scores[0]["FD-digits at 1"]
    assert len(list((tmp_path / "second").iterdir())) <= 8


@pytest.mark.slow
def test_claim(root, tmp_path):
    arms = run(root, "claim", tmp_path)["arms"]
    assert list(arms) == ["store", "truth", "noise"]
    assert len({arm["steps"] for arm in arms.values()}) == 1
    assert all((tmp_path / f"grid-{name}.png").exists() for name in arms)


@pytest.mark.slow
def test_a_failing_stage_is_noted_and_the_next_one_runs(root, tmp_path):
    "A job whose first stage fails and whose second never ends: both are noted, and the third has its result."
    script = tmp_path / "job.py"
    script.write_text(
        "import time\nfrom stages import Job\njob = Job('three stages')\n"
        "job.stage(lambda: 1 / 0, name='fails')\n"
        "def hangs():\n    try: time.sleep(60)\n    except Exception: time.sleep(60)\n"
        "job.stage(hangs, limit=0.5)\njob.stage(lambda: 7, name='works')\njob.finish()\n"
    )
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHONPATH": f"{root}:{root / 'tests' / 'gpu'}"}
    subprocess.run([sys.executable, script, "--dry"], env=environment, check=True, capture_output=True)
    stages = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert stages["fails"]["error"].startswith("ZeroDivisionError")
    assert stages["hangs"]["error"].startswith("OutOfTime")
    assert stages["works"]["result"] == 7
