"A configuration that trains in a second, and what a run of it leaves."

import json
import sys

import torch
from safetensors.torch import load_file

from dddm.config import TrainConfig
from dddm.runs import history, newest_checkpoint

TINY = dict(
    net=dict(base=16, multipliers=(1, 2), blocks=1, attention=(), estimate=(8, 4)),
    c=0.01,
    batch=256,
    epochs=4,
    log_every=3,
    checkpoint_every=2,
    sample_every=0,
    device="cpu",
)


def write_config(path, **fields):
    path.write_text(json.dumps(TrainConfig(**{**TINY, **fields}).to_dict()))
    return path


def command(config, out):
    return [sys.executable, "-m", "dddm.training", str(config), "--out", str(out)]


def end_state(run):
    folder = newest_checkpoint(run)
    store = torch.load(folder / "store-0.pt", weights_only=True)
    return (
        load_file(folder / "model.safetensors"),
        load_file(folder / "ema.safetensors"),
        {k: store[k] for k in ("rows", "written")},
        history(run),
    )


def assert_same_run(a, b):
    for left, right in zip(end_state(a)[:3], end_state(b)[:3]):
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), key
    assert end_state(a)[3] == end_state(b)[3]
