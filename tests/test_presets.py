"""Presets: the published configuration, its size, and the table of what sets `cifar10` apart from it."""

import dataclasses
import json
import pathlib
import re
import warnings

import pytest
import torch

from dddm import presets
from dddm.config import TrainConfig, build
from dddm.passes import open_distance
from dddm.presets import preset
from dddm.training import train

NOTEBOOK = pathlib.Path(__file__).resolve().parents[1] / "nbs" / "11_presets.ipynb"


def differing(a, b) -> dict[str, tuple]:
    "{field: both values} where two configurations differ; arguments of the network one by one, as built."
    pairs = {
        f.name: (getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a) if f.name != "net"
    }
    with torch.device("meta"):
        one, other = (build(config).net.config for config in (a, b))
    pairs |= {f"net.{name}": (one[name], other[name]) for name in one}
    return {name: values for name, values in pairs.items() if values[0] != values[1]}


def shown_table() -> dict[str, tuple[str, str]]:
    "{field: the two cells} of the table of departures that notebook 11 shows."
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    outputs = [o["data"].get("text/markdown", "") for c in cells for o in c.get("outputs", []) if "data" in o]
    (table,) = ["".join(text) for text in outputs if "`cifar10-published` | where" in "".join(text)]
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.*?) \| .+ \|$", table, re.M)
    return {name: (a, b) for name, a, b in rows}


def test_the_table_of_departures_is_the_difference_of_the_two_presets():
    found = differing(preset("cifar10"), preset("cifar10-published"))
    assert shown_table() == {name: tuple(map(str, values)) for name, values in found.items()}


def test_the_published_preset_has_the_published_values():
    "As read in the authors' repository at commit 7af7068; notebook 22 names the files."
    config = preset("cifar10-published")
    assert (config.T, config.beta_min, config.beta_max, config.lr) == (4000, 0.01, 50.0, 1e-4)
    assert (config.objective, config.distance, config.c) == ("published_code", "pseudo_lpips", 1.4e-4)
    assert config.distance_options == dict(square=False, resize=224)
    assert (config.batch, config.ema, config.ema_warmup, config.lr_decay) == (8 * 128, 0.9999, False, 0.0)
    assert config.epochs * -(-50_000 // config.batch) == pytest.approx(1000 * 390, rel=0.01)
    assert config.net["dropout"] == 0.0 and not config.flip and config.classes is None
    with torch.device("meta"):
        count = sum(p.numel() for p in build(config).parameters())
    assert count == pytest.approx(131.34e6, rel=0.02)


@pytest.mark.parametrize("name", ["digits", "digits-one-step", "cifar10"])
@pytest.mark.parametrize("distance", ["l1", "l2", "squared_l2", "pseudo_huber"])
def test_the_distance_of_a_preset_can_be_changed(name, distance):
    "The constant and the options of the preset's own distance do not stay in its way."
    config = preset(name, distance=distance)
    assert open_distance(config)(torch.zeros(2, *config.shape), torch.ones(2, *config.shape)).shape == (2,)
    assert distance.startswith("pseudo_") or config.c == 0


@pytest.mark.parametrize("wrong", ["digits", None, 3])
def test_recipes_say_what_they_take(wrong):
    for recipe in (presets.one_step,):
        with pytest.raises(ValueError, match=r"fields=.*PRESETS\['digits'\]"):
            recipe(wrong)
    with pytest.raises(ValueError, match=r"must be a TrainConfig, such as .*preset\('digits'\)"):
        train(wrong, "nowhere")


def test_recipes_take_a_configuration():
    made = presets.one_step(presets.preset("digits"))
    assert TrainConfig(**made).objective == "meanflow"


@pytest.mark.parametrize("objective", ["paper", "consistency"])
def test_an_objective_whose_estimate_nobody_reads_is_said(objective):
    "The networks of MeanFlow's recipes have no layer for it: any number of steps would be one."
    change = dict(objective=objective, drop_last=False)
    with pytest.warns(UserWarning, match="no layer that reads one.*net=dict.estimate="):
        preset("digits-one-step", **change)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preset("digits-one-step", **change, net=dict(estimate=(8,)))
        preset("digits-one-step", objective="improved_consistency")
