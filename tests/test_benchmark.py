"The computed floors and the comparison with other libraries: the room `costs` and the job `benchmark`."

import json
import sys

import nbformat
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dddm.config import build
from dddm.costs import (
    Network,
    equal_networks,
    find_peers,
    in_turns,
    objective_operations,
    size_of,
    training_floor,
)
from dddm.passes import checkpoint_bytes
from dddm.presets import preset
from dddm.training import start_run


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
    "name, gflop, hours", [("cifar10", 49.3, (2.47, 1.73)), ("imagenet64", 512.5, (343, 240))]
)
def test_floors_of_the_papers_runs(name, gflop, hours):
    "Figures worked out by hand: images x epochs x operations, over the share of 790 TFLOP/s."
    found = training_floor(preset(name))
    assert network_flops(name) == pytest.approx(1e9 * gflop, rel=2e-3)
    assert found.gflop == pytest.approx(gflop, rel=2e-3)
    assert found.hours == pytest.approx(hours, rel=2e-2)


@pytest.mark.parametrize("name, passes", [("digits", 1), ("cifar10-small", 1), ("digits-one-step", 1.5)])
def test_operations_follow_the_passes_of_the_objective(name, passes):
    "MeanFlow: three more forward passes of half a batch, each a third of forward and backward."
    assert objective_operations(preset(name)) == pytest.approx(passes * network_flops(name), rel=1e-3)


def test_floor_of_a_checkpoint_is_what_a_run_says(tmp_path):
    run = start_run(preset("digits", device="cpu"), tmp_path / "run")
    found = training_floor(run.config)
    assert found.checkpoint == pytest.approx(checkpoint_bytes(run), rel=0.02)
    assert found.parameters == sum(p.numel() for p in run.model.parameters())


def test_committed_table_is_what_the_room_computes(root):
    "Parameters and operations of the presets in the job's committed outputs."
    cells = nbformat.read(root / "nbs" / "benchmark.ipynb", 4).cells
    outputs = next(c.outputs for c in cells if 'results["floors, computed"]' in c.source)
    lines = "".join(o.data.get("text/markdown", "") for o in outputs).splitlines()[2:]
    rows = {line.split("|")[1].strip(" `"): line.split("|")[2:4] for line in lines}
    assert {"cifar10", "imagenet64", "cifar10-small", "digits"} <= rows.keys()
    for name, (weights, gflop) in rows.items():
        with torch.device("meta"):
            assert float(weights) == pytest.approx(size_of(build(preset(name))) / 1e6, rel=5e-3)
        if name in ("cifar10", "imagenet64", "cifar10-small", "digits"):  # one pass an image
            assert float(gflop) == pytest.approx(network_flops(name) / 1e9, rel=5e-3)


def test_calls_take_turns_and_the_first_round_is_not_counted():
    order = []
    taken = in_turns({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2)
    assert order == list("ababab") and {name: len(times) for name, times in taken.items()} == dict(a=2, b=2)
    with pytest.raises(ValueError, match="rounds=0: must be an integer >= 1"):
        in_turns({}, rounds=0)


def test_networks_beside_ours_are_the_nearest_in_size():
    "A library whose networks have weights in proportion to the square of their width."

    def make(width):
        return Network(torch.nn.Linear(width, 960 * width, bias=False), None)

    networks = equal_networks(32, dict(another=make))
    ours, theirs = (size_of(network.module) for network in networks.values())
    assert list(networks) == ["dddm", "another"]
    assert abs(theirs - ours) <= min(abs(960 * w**2 - ours) for w in range(16, 48, 2))


def test_published_code_is_a_clone_and_its_network_joins_at_its_width(tmp_path, monkeypatch):
    "Refused before any work where it is none; else built at the width that has about as many weights."
    with pytest.raises(ValueError, match="published_code=.*has no DDDM/unet.py: give a clone"):
        find_peers(tmp_path)
    (tmp_path / "DDDM").mkdir()
    (tmp_path / "DDDM" / "__init__.py").touch()
    (tmp_path / "DDDM" / "unet.py").write_text(
        "import torch\n"
        "class UNetModel(torch.nn.Linear):\n"
        "    def __init__(self, in_channels, model_channels, **others):\n"
        "        super().__init__(in_channels, model_channels)\n"
    )
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "einops" else None)
    peers = find_peers(str(tmp_path))
    assert list(peers) == ["published code"]
    assert list(equal_networks(64, peers)) == ["dddm"]
    assert equal_networks(96, peers)["published code"].module.out_features == 64


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
