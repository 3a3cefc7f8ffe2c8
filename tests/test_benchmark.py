"The computed floors and the comparison with other libraries, in the benchmark notebook."

import json

import nbformat
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dddm.config import build
from dddm.passes import checkpoint_bytes
from dddm.presets import preset
from dddm.training import start_run


@pytest.fixture(scope="module")
def cells(request):
    "Sources and outputs of the notebook's code cells."
    path = request.config.rootpath / "nbs" / "benchmark.ipynb"
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


@pytest.fixture(scope="module")
def names(cells):
    "What the notebook's imports and the cell that computes the floors define."
    found = {}
    for start in ("import gc", "RATE = "):
        exec(next(c.source for c in cells if c.source.startswith(start)), found)
    return found


def network_flops(name):
    "Forward and backward of the preset's bare network for one image, on tensors without storage."
    config = preset(name)
    with torch.device("meta"):
        model = build(config)
        x, t = torch.zeros(2, *config.shape), torch.ones(2, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model.net(x, t, x, None if config.classes is None else t).sum().backward()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    "name, gflop, seconds, hours",
    [
        ("cifar10", 47.7, (0.172, 0.121), (2.4, 1.7)),
        ("imagenet64", 494.2, (1.787, 1.251), (331, 232)),
    ],
)
def test_floors_of_the_papers_runs(names, name, gflop, seconds, hours):
    "Figures worked out by hand: images x epochs x operations, over the share of 790 TFLOP/s."
    flops = network_flops(name)
    found = names["floor"](preset(name), names["parameters"](name), flops)
    assert flops == pytest.approx(1e9 * gflop, rel=2e-3)
    assert found["seconds_1000"] == pytest.approx(seconds, rel=5e-3)
    assert found["hours"] == pytest.approx(hours, rel=2e-2)


@pytest.mark.parametrize("name, passes", [("digits", 1), ("cifar10-small", 1), ("digits-consistency", 5 / 3)])
def test_operations_follow_the_passes_of_the_objective(names, name, passes):
    "A target, and self-conditioning of half a batch on both sides: two more forward passes, a third each."
    assert names["objective_flops"](name) == pytest.approx(passes * network_flops(name), rel=1e-3)


def test_floor_of_a_checkpoint_is_what_a_run_says(names, tmp_path):
    run = start_run(preset("digits", device="cpu"), tmp_path / "run")
    weights = sum(p.numel() for p in run.model.parameters())
    found = names["floor"](run.config, weights, 1e6)
    assert found["checkpoint"] == pytest.approx(checkpoint_bytes(run), rel=0.02)
    assert found["parameters"] == names["parameters"]("digits")


def test_committed_tables_are_what_the_cells_compute(cells, names):
    "Presets, parameters and operations in the committed outputs."
    source = next(c for c in cells if 'results["floors, computed"]' in c.source)
    text = "".join(o.data.get("text/markdown", "") for c in cells if c is source for o in c.outputs)
    rows = {line.split("|")[1].strip(" `"): line.split("|")[2:4] for line in text.splitlines()[2:]}
    assert list(rows) == list(names["FLOOR_PRESETS"])
    for name, (weights, _) in rows.items():
        assert float(weights) == pytest.approx(names["parameters"](name) / 1e6, rel=5e-3)
    for name in ("cifar10", "imagenet64", "cifar10-small", "digits"):
        assert float(rows[name][1]) == pytest.approx(network_flops(name) / 1e9, rel=5e-3)


def test_peers_are_of_equal_size_and_named(root):
    "Networks within 3% of ours; the published one, whose widths are multiples of 32, within 10%."
    peers = json.loads((root / "nbs" / "results" / "benchmark-peers.json").read_text())
    assert peers["threads"] == 1
    assert peers["versions"].keys() == {"torch", "diffusers", "denoising-diffusion-pytorch"}
    ours = None
    for row in peers["rows"]:
        ours = row if row["library"] == "dddm" else ours
        middle, low, high = row["over_ours"]
        assert low <= middle <= high
        allowed = 0.1 if row["library"] == "published code" else 0.03
        assert row["parameters"] == pytest.approx(ours["parameters"], rel=allowed)
        assert middle == pytest.approx(row["seconds"] / ours["seconds"], rel=0.25)
