"What a configuration refuses, what it reads of old files, and what is drawn from it."

import dataclasses
import json

import pytest
import torch
from small_runs import TINY

from dddm import training
from dddm.config import TrainConfig, draw, epoch_batches
from dddm.training import train


def test_bad_input_before_any_work(tmp_path):
    def refused(match, error=ValueError, **fields):
        with pytest.raises(error, match=match):
            train(TrainConfig(**{**TINY, **fields}), tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()

    refused("batch=1798 is larger than the data", batch=1798)
    refused(r"shape=\(3, 8, 8\), but every image has 1 channel.*resize=True", shape=(3, 8, 8))
    refused("classes=4, but digits has 10 classes", classes=4)
    refused("argument of the network 'bases' is unknown; did you mean 'base'", net=dict(bases=3))
    refused("objective 'papers' is unknown; did you mean 'paper'", objective="papers")
    refused("flip='no'", flip="no")
    refused("epochs=True", epochs=True)
    refused("lr='2e-4'.*2.0e-4", lr="2e-4")
    refused("net=3", net=3)
    refused("pseudo_huber", distance="pseudo_hubert")
    net32 = dict(base=16, multipliers=(1, 1), blocks=1, attention=(), estimate=(16,))
    refused(
        "nowhere",
        error=FileNotFoundError,
        data="cifar10",
        data_path=str(tmp_path / "nowhere"),
        shape=(3, 32, 32),
        net=net32,
    )
    refused("sampler='meanflow': needs objective='meanflow', not 'paper'", sampler="meanflow")
    for fields in (dict(objective="meanflow"), dict(objective="consistency")):
        refused("micro_batch=3: .*rows in pairs: give an even number", micro_batch=3, **fields)
        refused("batch=1: .*rows in pairs: give at least 2", batch=1, **fields)
    for wrong in (dict(attention=8), dict(multipliers=2), dict(dropout="0.1"), dict(estimate="8")):
        refused(f"{next(iter(wrong))}=.*: need a ", net={**TINY["net"], **wrong})
    with pytest.raises(ValueError, match="did you mean 'epochs'.*Known: .*batch"):
        TrainConfig.from_dict(dict(epoch=3))


def test_levels_are_drawn_evenly():
    "u: one in each n-th of (0, 1), in an order that changes, so a batch meets every noise level."
    config = TrainConfig(**{**TINY, "objective": "consistency"})
    a, b = (draw(config, step, 50)["u"] for step in (3, 4))
    for u in (a, b):
        assert torch.equal((u * 50).floor().sort().values, torch.arange(50.0)) and not torch.equal(
            u, u.sort().values
        )
    assert not torch.equal(a, b) and torch.equal(a, draw(config, 3, 50)["u"])


def test_drop_last_leaves_out_the_smaller_batch_and_nothing_else(tmp_path):
    for n, batch, world in ((1797, 128, 1), (100, 7, 3), (64, 8, 2)):
        whole, full = (epoch_batches(n, batch, 5, 2, world, drop) for drop in (False, True))
        assert len(full) == n // batch and all(sum(map(len, shares)) == batch for shares in full)
        assert all(torch.equal(a, b) for k, shares in enumerate(full) for a, b in zip(shares, whole[k]))
    run = training.start_run(
        TrainConfig(**{**TINY, "batch": 700, "objective": "consistency", "drop_last": True}), tmp_path / "run"
    )
    assert run.steps == 2 * 4
    with pytest.raises(ValueError, match="keeps a store"):
        TrainConfig(**{**TINY, "drop_last": True})


# fields as a run of before had them
OLD_CONFIG = """{"data": "digits", "shape": [1, 8, 8], "c": 0.01,
 "objective": "consistency", "rungs": "rising", "sampler": "fixed",
 "net": {"base": 16, "multipliers": [1, 2], "blocks": 1, "attention": [], "estimate": [8, 4]},
 "batch": 256, "epochs": 1,  "device": "cpu", "log_every": 3,
 "checkpoint_every": 2, "sample_every": 0}"""


def test_old_names_are_read_from_a_file_and_nowhere_else():
    config = TrainConfig.from_dict(json.loads(OLD_CONFIG))
    assert (config.level_distribution, config.sampler) == ("rising", "iterate")
    assert "rungs" not in config.to_dict() and TrainConfig.from_dict(config.to_dict()) == config
    with pytest.raises(TypeError):
        TrainConfig(rungs="rising")
    with pytest.raises(ValueError, match="sampler 'fixed' is unknown"):
        TrainConfig(sampler="fixed")


def test_every_field_is_in_the_table():
    config = TrainConfig(epochs=7)
    text, table = str(config), config._repr_markdown_()
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["meaning"] and f"| `{field.name}` |" in table
        assert any(line.startswith(f"{field.name} ") for line in text.splitlines())
    assert "| `epochs` | `7` | passes over the data, at least 1 | `100`, ours |" in table
    assert "| `lr` | `0.0002` | Adam's rate, above 0 | `0.0002`, paper 5.1 |" in table
    assert eval(repr(config)) == config
