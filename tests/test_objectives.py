"""What the objectives notebook cannot show.

Each number recomputed sample by sample, what must not leak, and two processes.
"""

import copy
import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from dddm import passes, runs
from dddm.config import TrainConfig, build, epoch_batches
from dddm.levels import intervals, noise_levels, sigma
from dddm.losses import distance
from dddm.model import DDDM, Boundary
from dddm.objectives import (
    ESTIMATES,
    OBJECTIVES,
    Batch,
    assemble,
    draw_angles,
    estimate_of,
    needs_store,
    network_estimate,
    objective_value,
    sampler_of,
)
from dddm.passes import open_store
from dddm.runs import newest_checkpoint
from dddm.sampling import ddim, meanflow, sample, times_down
from dddm.schedule import VPSchedule
from dddm.training import train
from dddm.unet import Dropout, seed_dropout

schedule, T = VPSchedule(1000), 1000
AB = np.cumprod(
    1 - np.concatenate([[0], (0.1 + np.arange(1000) / 999 * 19.9) / 1000])
)  # the schedule, on its own
FEEDS = [
    (o, e)
    for o, e in [("paper", h) for h in ("store", "noise", "truth", "shuffled", "self")]
    + [
        ("published_code", "store"),
        ("consistency", "self"),
        ("consistency", "noise"),
        ("consistency", "store"),
        ("improved_consistency", "none"),
        ("regression", "none"),
    ]
]


class Toy(nn.Module):
    "A net that is as easily written in numpy: tanh of a mixture of its inputs, then dropout."

    shape = (1, 2, 2)

    def __init__(self, dropout=0.0):
        super().__init__()
        self.w, self.drop, self.calls = nn.Parameter(torch.tensor([0.7, 0.4, -0.3])), Dropout(dropout), []

    def forward(self, x_t, t, x0_estimate, label):
        out = self.drop(
            torch.tanh(self.w[0] * x_t + self.w[1] * x0_estimate + self.w[2] * (t / T).reshape(-1, 1, 1, 1))
        )
        self.calls.append(
            (
                x_t.detach().clone(),
                t.clone(),
                x0_estimate.detach().clone(),
                torch.is_grad_enabled(),
                out.detach().clone(),
            )
        )
        return out


def some_batch(n=12, seed=0, **more):
    g = torch.Generator().manual_seed(seed)
    x0, stored, noise, estimate_noise = (torch.randn(n, 1, 2, 2, generator=g) for _ in range(4))
    t, u = torch.randint(1, T + 1, (n,), generator=g), torch.rand(n, generator=g)
    draws = dict(noise=noise, stored=stored, estimate_noise=estimate_noise, u=u)
    return Batch(x0.clamp(-1, 1), t, **draws, **more)


def evaluate(objective, model, batch, estimate=None, **more):
    "Value, row for the store, and the times that were used."
    value, row, batch = objective_value(objective, model, distance("squared_l2"), batch, estimate, **more)
    return value, row, batch.t


def net_by_hand(x, t, e):
    return np.tanh(0.7 * x + 0.4 * e - 0.3 * t / T)


def f_by_hand(x, t, e, scaled):
    if t == 0:
        return x
    a, b = math.sqrt(AB[t]), math.sqrt(1 - AB[t])
    return a * x - b * net_by_hand(x, t, e) if scaled else x - net_by_hand(x, t, e)


def estimate_by_hand(how, p, i, x, t, scaled):
    if how == "store":
        return p["stored"][i]
    if how == "truth":
        return p["x0"][i]
    if how == "shuffled":
        return p["stored"][i - 1]
    if how == "none":
        return 0 * x
    if how == "noise" or i % 2:
        return p["estimate_noise"][i]
    return np.clip(f_by_hand(x, t, p["estimate_noise"][i], scaled), -1, 1)


def loss_by_hand(objective, how, p, i, epoch, count):
    "The number of sample i in plain numpy."
    scaled, x0, noise = (
        objective in ("consistency", "improved_consistency", "regression"),
        p["x0"][i],
        p["noise"][i],
    )

    def answer(t):
        x = math.sqrt(AB[t]) * x0 + math.sqrt(1 - AB[t]) * noise
        return f_by_hand(x, t, estimate_by_hand(how, p, i, x, t, scaled), scaled)

    if "consistency" not in objective:
        x_hat, w = answer(int(p["t"][i])), 1 / (epoch + 1)
        to_row = ((x_hat - p["stored"][i]) ** 2).sum()
        return (
            w * ((x_hat - x0) ** 2).sum() + (1 - w) * to_row
            if objective == "published_code"
            else ((x_hat - x0) ** 2).sum()
        )
    s = np.sqrt((1 - AB) / AB)
    spaced = [0] + sorted(
        {
            int(np.abs(s ** (1 / 7) - v + 1e9 * (s ** (1 / 7) < v - 1e-12)).argmin())
            for v in np.linspace(s[1] ** (1 / 7), s[-1] ** (1 / 7), count)
        }
    )
    phi = [0.0] + [0.5 * (1 + math.erf((math.log(s[t]) + 1.1) / (2 * math.sqrt(2)))) for t in spaced[1:]]
    k = next(k for k in range(1, len(spaced)) if p["u"][i] < phi[k] / phi[-1] or k == len(spaced) - 1)
    return ((answer(spaced[k]) - answer(spaced[k - 1])) ** 2).sum() / (s[spaced[k]] - s[spaced[k - 1]])


@pytest.mark.parametrize("objective, how", FEEDS)
def test_every_number_by_hand(objective, how):
    model = assemble(objective, Toy(), schedule)
    for epoch, progress in ((0, 0.0), (3, 0.6)):
        batch = some_batch(epoch=epoch, progress=progress)
        value, row, t = evaluate(objective, model, batch, how, level_range=(10, 80))
        p = {k: v.double().numpy() if torch.is_tensor(v) else v for k, v in vars(batch).items()}
        expected = [
            loss_by_hand(objective, how, p, i, epoch, {0.0: 10, 0.6: 40}[progress]) for i in range(12)
        ]
        np.testing.assert_allclose(value.detach().numpy(), expected, rtol=2e-3, atol=1e-5)
        assert value.shape == (12,) and value.requires_grad and t.shape == (12,)


def test_what_goes_to_the_store():
    batch = some_batch()
    before = batch.stored.clone()
    for objective, how in FEEDS:
        value, row, t = evaluate(objective, assemble(objective, Toy(), schedule), batch, how)
        if "consistency" in objective and how != "store":
            assert row is None
        elif objective == "published_code":
            assert torch.equal(row, batch.x0)
        else:
            assert row.shape == batch.x0.shape and not row.requires_grad and not torch.equal(row, batch.x0)
        assert torch.equal(batch.stored, before), "an objective changed its input"
        if "consistency" not in objective:
            assert torch.equal(t, batch.t)


def test_published_code_weighs_by_epoch():
    model, batch = assemble("published_code", Toy(), schedule), some_batch()
    to_truth = evaluate("paper", model, batch)[0]
    mixed = {}
    for batch.epoch in (0, 1, 4):
        mixed[batch.epoch] = evaluate("published_code", model, batch)[0]
    to_row = 2 * mixed[1] - to_truth  # at w = 1/2
    torch.testing.assert_close(mixed[0], to_truth)
    torch.testing.assert_close(mixed[4], to_truth / 5 + to_row * 4 / 5)


@pytest.mark.parametrize(
    "objective, how",
    [
        ("consistency", "self"),
        ("consistency", "noise"),
        ("consistency", "store"),
        ("improved_consistency", "none"),
    ],
)
def test_the_smaller_side_has_no_gradient(objective, how):
    """Gradient of the loss with the target as a constant, computed apart, and no graph in any pass but the
    last.
    """
    net = Toy()
    model, batch = assemble(objective, net, schedule), some_batch()
    evaluate(objective, model, batch, how)[0].sum().backward()
    assert [c[3] for c in net.calls] == [False] * (len(net.calls) - 1) + [True]
    times, *_ = intervals(schedule, 10)
    x_t, t, e, _, _ = net.calls[-1]
    s = times[torch.searchsorted(times, t) - 1]
    x_s, _, e_s, _, _ = next(c for c in net.calls if len(c[1]) == len(s) and torch.equal(c[1], s))
    with torch.no_grad():
        target = model(e_s, x_s, s)
    got, net.w.grad = net.w.grad.clone(), None
    gap = (sigma(schedule)[t] - sigma(schedule)[s]).float()
    (((model(e, x_t, t) - target) ** 2).flatten(1).sum(1) / gap).sum().backward()
    torch.testing.assert_close(got, net.w.grad)
    assert (s == 0).sum() == 0 or torch.equal(x_s[s == 0], batch.x0[s == 0])


def test_zero_is_the_target_at_the_boundary():
    "With t at the first level the target is x_0 to the last bit, whatever the network says."
    model, batch = assemble("consistency", Toy(), schedule), some_batch()
    batch.u = torch.zeros(12)
    value, _, t = evaluate("consistency", model, batch)
    assert (t == 1).all()
    x_1 = schedule.diffuse(batch.x0, t, batch.noise)
    second_rows = (torch.arange(12) % 2 == 0).reshape(-1, 1, 1, 1)
    again = torch.where(second_rows, model(batch.estimate_noise, x_1, t).clamp(-1, 1), batch.estimate_noise)
    torch.testing.assert_close(
        value, ((model(again, x_1, t) - batch.x0) ** 2).flatten(1).sum(1) / sigma(schedule)[1].float()
    )
    assert torch.equal(model(batch.estimate_noise, batch.x0, torch.zeros(12, dtype=torch.long)), batch.x0)


@pytest.mark.parametrize("how", ["self", "noise"])
def test_both_sides_drop_the_same_units(how):
    net = Toy(dropout=0.5)
    model, batch = assemble("consistency", net, schedule).train(), some_batch(n=64, seed=1)
    seed_dropout(model, 1234)
    first = evaluate("consistency", model, batch, how)[0]
    whole = [c[4] == 0 for c in net.calls if len(c[1]) == 64]
    assert len(whole) == 2 and torch.equal(*whole) and 0.3 < whole[0].float().mean() < 0.7
    halves = [c[4] == 0 for c in net.calls if len(c[1]) < 64]
    if how == "self":
        assert len(halves) == 2 and torch.equal(*halves)
    assert torch.equal(first, evaluate("consistency", model, batch, how)[0])
    seed_dropout(model, 1235)
    assert not torch.equal(first, evaluate("consistency", model, batch, how)[0])


@pytest.mark.parametrize("objective, how", [f for f in FEEDS if f[1] != "shuffled"])
def test_a_batch_is_the_sum_of_its_samples(objective, how):
    "Cut into micro-batches, the numbers are the same: no sample sees another."
    model, batch = assemble(objective, Toy(), schedule), some_batch(epoch=2, progress=0.4)
    whole = evaluate(objective, model, batch, how)
    for size in (2, 4) if how == "self" else (1, 5):  # every second row of a batch has an estimate of its own
        pieces = [
            evaluate(
                objective,
                model,
                Batch(**{k: v[a : a + size] if torch.is_tensor(v) else v for k, v in vars(batch).items()}),
                how,
            )
            for a in range(0, 12, size)
        ]
        torch.testing.assert_close(torch.cat([p[0] for p in pieces]), whole[0])
        assert torch.equal(torch.cat([p[2] for p in pieces]), whole[2])


@pytest.mark.parametrize(
    "objective, how",
    [("paper", "self"), ("paper", "noise"), ("consistency", "self"), ("improved_consistency", "none")],
)
def test_nothing_of_x0_reaches_the_network_but_through_x_t(objective, how):
    "Two different x_0 and noises that give the same x_t: all that the network gets at t is the same."
    seen = []
    for shift in (0.0, 0.5):
        net, batch = Toy(), some_batch(seed=3)
        model, t = (
            assemble(objective, net, schedule),
            evaluate(objective, assemble(objective, Toy(), schedule), batch, how)[2],
        )
        a, b = schedule.signal_noise(t, batch.x0)
        batch.x0, batch.noise = batch.x0 + shift, batch.noise - shift * a / b
        evaluate(objective, model, batch, how)
        seen.append(net.calls[-1])
    for k in (0, 1, 2):
        torch.testing.assert_close(seen[0][k].float(), seen[1][k].float(), rtol=1e-3, atol=1e-3)


def test_uniform_draws_every_interval_equally_often():
    times, share, _ = intervals(schedule, 80, "uniform")
    assert torch.equal(times, noise_levels(schedule, 80)) and torch.allclose(
        share.diff(), torch.full((len(times) - 1,), 1 / (len(times) - 1), dtype=torch.float64)
    )
    batch = some_batch(n=4000)
    t = evaluate(
        "consistency",
        assemble("consistency", Toy(), schedule),
        batch,
        "noise",
        level_range=(10, 10),
        level_distribution="uniform",
    )[2]
    assert abs((t == T).float().mean() - 1 / 10) < 0.02 and set(t.tolist()) == set(
        noise_levels(schedule, 10).tolist()
    ) - {0}
    with pytest.raises(ValueError, match="did you mean 'uniform'"):
        intervals(schedule, 80, "unifrm")


def test_rising_moves_upwards_and_weigh_by_the_formula():
    """Levels even in angle.

    At p = 0 the normal and the weight of Song & Dhariwal; later more draws at t = T, and the weight (1 + p
    sigma_t) / (sigma_t - sigma_s) in the loss itself.
    """
    times, share, weight = intervals(schedule, 40, "rising", 0.0)
    angle = sigma(schedule)[times[1:]].atan()
    assert (
        times[0] == 0
        and times[1] == 1
        and times[-1] == T
        and (angle.diff() - angle.diff().mean()).abs().max() < 0.02
    )  # the schedule's grid is what is left
    s = sigma(schedule)[times]
    normal = torch.distributions.Normal(-1.1, 2.0).cdf(s.clamp(min=1e-30).log())
    torch.testing.assert_close(share, (normal - normal[0]) / (normal[-1] - normal[0]))
    torch.testing.assert_close(weight, 1 / s.diff())
    top = [intervals(schedule, 40, "rising", p)[1].diff()[-1] for p in (0.0, 0.5, 1.0)]
    assert top[0] < top[1] < top[2] and intervals(schedule, 40, "lognormal", 0.5)[1].equal(
        intervals(schedule, 40, "lognormal")[1]
    )
    model, batch = assemble("consistency", Toy(), schedule), some_batch(n=64)
    batch.progress = 0.5
    value, _, t = evaluate(
        "consistency", model, batch, "noise", level_range=(40, 40), level_distribution="rising"
    )
    below = times[torch.searchsorted(times, t) - 1]
    with torch.no_grad():
        d = (
            (
                (
                    model(batch.estimate_noise, schedule.diffuse(batch.x0, t, batch.noise), t)
                    - model(batch.estimate_noise, schedule.diffuse(batch.x0, below, batch.noise), below)
                )
                ** 2
            )
            .flatten(1)
            .sum(1)
        )
    torch.testing.assert_close(
        value.detach(),
        (d * (1 + 0.5 * sigma(schedule)[t]) / (sigma(schedule)[t] - sigma(schedule)[below])).float(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_needs_store_and_refusals():
    assert [o for o in OBJECTIVES if needs_store(o)] == ["paper", "published_code"]
    assert [e for e in ESTIMATES if e != "none" and needs_store("paper", e)] == ["store", "shuffled"]
    assert [e for e in ("self", "noise", "store") if needs_store("consistency", e)] == ["store"]
    for objective, estimate, words in (
        ("papre", None, "did you mean 'paper'"),
        ("paper", "nosie", "did you mean 'noise'"),
        ("consistency", "truth", "self or noise"),
        ("consistency", "none", "self or noise"),
        ("regression", "self", "takes none"),
        ("improved_consistency", "noise", "takes none"),
        ("published_code", "truth", "takes store"),
        ("paper", "none", "store or noise"),
    ):
        with pytest.raises(ValueError, match=words):
            estimate_of(objective, estimate)
    with pytest.raises(ValueError, match="self or noise"):
        TrainConfig(objective="consistency", estimate="truth")
    with pytest.raises(ValueError, match="did you mean"):
        assemble("consistancy", Toy(), schedule)


def test_names_and_options_that_do_not_exist_are_refused():
    batch = some_batch()
    with pytest.raises(ValueError, match="did you mean 'store'"):
        network_estimate("stor", None, batch, batch.x0, batch.t)
    with pytest.raises(ValueError, match="at least two levels"):
        noise_levels(schedule, 1)
    for name in ("paper", "consistency"):
        with pytest.raises(TypeError):
            objective_value(name, None, None, batch, distribution="uniform")


def test_runs_without_store_save_none(tmp_path):
    tiny = dict(
        net=dict(base=16, multipliers=(1,), blocks=1, attention=(), estimate=(8,)),
        batch=900,
        epochs=1,
        sample_every=0,
        device="cpu",
    )
    for objective, estimate in (("paper", "noise"), ("consistency", None)):
        run = train(
            TrainConfig(objective=objective, estimate=estimate, **tiny), tmp_path / objective, progress=False
        )
        assert not list(run.glob("checkpoints/*/store-*"))


def test_consistency_with_a_store_keeps_its_own_answers(tmp_path):
    """The control of the repair, trained for an epoch.

    Its checkpoint has a store, in which every row differs from the N(0, I) that it began with; a part of an
    epoch is refused.
    """
    tiny = dict(
        net=dict(base=16, multipliers=(1,), blocks=1, attention=(), estimate=(8,)),
        batch=128,
        epochs=1,
        sample_every=0,
        device="cpu",
    )
    config = TrainConfig(objective="consistency", estimate="store", **tiny)
    run = train(config, tmp_path / "run", progress=False)
    store, fresh = (
        open_store(config, 1797, 0, 1, torch.device("cpu")),
        open_store(config, 1797, 0, 1, torch.device("cpu")),
    )
    store.load_state_dict(torch.load(newest_checkpoint(run) / "store-0.pt", weights_only=True))
    every = torch.arange(1797)
    assert ((store.read(every) - fresh.read(every)).flatten(1).abs().amax(1) > 0).all()
    with pytest.raises(ValueError, match="every row must be written"):
        TrainConfig(objective="consistency", estimate="store", drop_last=True, **tiny)


@pytest.mark.parametrize("objective", ["consistency", "improved_consistency", "regression"])
@pytest.mark.parametrize("sampler", ["iterate", "ddim", "renoise"])
def test_image_i_depends_on_seed_and_i_alone(objective, sampler):
    model = assemble(objective, Toy(), schedule)
    whole = sample(model, 9, (3, 1), sampler, seed=4)
    assert list(whole) == [1, 3] and all(
        v.shape == (9, 1, 2, 2) and v.abs().max() <= 1 for v in whole.values()
    )
    for batch_size in (1, 4):
        torch.testing.assert_close(
            sample(model, 5, (3,), sampler, seed=4, batch_size=batch_size)[3], whole[3][:5]
        )
    assert not torch.allclose(sample(model, 9, (3,), sampler, seed=5)[3], whole[3])
    assert model.training, "the mode must be left as it was"


def test_a_model_knows_its_sampler():
    """`sample` without a sampler uses the model's own.

    The objective's, or the one it was assembled with; a copy has it too, and a model that was made otherwise
    iterates.
    """
    for objective, own in (
        ("paper", "iterate"),
        ("consistency", "iterate"),
        ("improved_consistency", "renoise"),
        ("regression", "ddim"),
    ):
        assert sampler_of(objective) == own
        for given in (None, "iterate", "ddim", "renoise"):
            model = copy.deepcopy(assemble(objective, Toy(), schedule, given))
            assert model.sampler == (given or own) and torch.equal(
                sample(model, 3, 3), sample(model, 3, 3, given or own)
            )
    plain = DDDM(Toy(), schedule)
    assert torch.equal(sample(plain, 3, 3), sample(plain, 3, 3, "iterate"))
    for sampler in ("iterate", "ddim", "renoise"):
        assert list(sample(plain, 2, (k for k in (3, 1)), sampler)) == [1, 3]  # any iterable
        assert sample(plain, 2, 5, sampler).shape == (2, 1, 2, 2)
    for wrong in (
        lambda: sampler_of("consistancy"),
        lambda: assemble("paper", Toy(), schedule, "dim"),
        lambda: TrainConfig(sampler="dim"),
    ):
        with pytest.raises(ValueError, match="did you mean"):
            wrong()


@pytest.mark.filterwarnings("ignore:.*begun with epochs=1")
def test_the_sampler_of_a_run_may_change_when_it_goes_on(tmp_path):
    """It is no batch of the training.

    The weights are the same, the run then samples as it was told last, and the grids of a run that re-noises
    are others.
    """
    tiny = dict(
        objective="consistency",
        net=dict(base=16, multipliers=(1,), blocks=1, attention=(), estimate=(8,)),
        batch=900,
        epochs=1,
        sample_every=2,
        device="cpu",
    )
    run = train(TrainConfig(**tiny), tmp_path / "run", progress=False)
    assert runs.load(run).sampler == "iterate"
    weights, iterated = (
        (run / name).read_bytes()
        for name in (newest_checkpoint(run).relative_to(run) / "ema.safetensors", "samples/step-0000002.png")
    )
    train(TrainConfig(sampler="renoise", **{**tiny, "epochs": 2}), run, progress=False)
    assert runs.load(run).sampler == "renoise"
    again = train(TrainConfig(sampler="renoise", **tiny), tmp_path / "again", progress=False)
    assert (newest_checkpoint(again) / "ema.safetensors").read_bytes() == weights and (
        again / "samples" / "step-0000002.png"
    ).read_bytes() != iterated


def test_ddim_step_by_hand():
    model, x = (
        assemble("regression", Toy(), schedule),
        torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)),
    )
    assert times_down(T, 3) == [1000, 667, 333, 0]
    y = x.double().numpy()
    for t, s in ((1000, 667), (667, 333), (333, 0)):
        x_hat = np.clip(f_by_hand(y, t, 0 * y, True), -1, 1)
        y = math.sqrt(AB[s]) * x_hat + math.sqrt(1 - AB[s]) * (y - math.sqrt(AB[t]) * x_hat) / math.sqrt(
            1 - AB[t]
        )
    np.testing.assert_allclose(ddim(model, x, 3).detach().numpy(), y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sampler", ["iterate", "ddim", "renoise"])
def test_models_with_estimates_are_fed_them(sampler):
    """Every sampler gives a model that was trained with estimates noise or an answer, and one that was not,
    zeros; so does a copy of it, and a call of one's own.
    """
    for objective, blind in (("consistency", False), ("improved_consistency", True), ("regression", True)):
        net = Toy()
        model = assemble(objective, net, schedule)
        made = sample(model, 3, (1, 2), sampler)
        assert len(net.calls) == (2 if sampler == "iterate" else 3) and all(
            (c[2] == 0).all() == blind for c in net.calls
        )
        twin = copy.deepcopy(model)
        twin(torch.ones(2, 1, 2, 2), torch.ones(2, 1, 2, 2), torch.tensor([1, T]))
        assert (twin.net.net.calls[-1][2] == 0).all() == blind
        if blind and sampler == "iterate":
            assert torch.equal(made[1], made[2]) and torch.equal(made[1], sample(model, 3, 1, "ddim"))


@pytest.mark.parametrize("how", ["store", "shuffled"])
def test_a_missing_store_is_told(how):
    p = some_batch()
    p.stored = None
    with pytest.raises(ValueError, match="batch.stored is None"):
        evaluate("paper", assemble("paper", Toy(), schedule), p, how)


def test_boundary_keeps_what_the_sampler_asks_of_a_net():
    net = Toy()
    net.classes = 10
    scaled = Boundary(net, schedule)
    assert (
        scaled.shape == (1, 2, 2)
        and scaled.classes == 10
        and [*DDDM(scaled, schedule).state_dict()] == ["net.net.w"]
    )
    copy.deepcopy(scaled)


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_one(tmp_path, monkeypatch):
    """Two gloo processes under `consistency`, with different numbers of samples that get an estimate of
    their own, against one process on the same batches. The rate is next to nothing, so Adam's first moment
    compares the gradients of all steps.
    """
    fields = dict(
        objective="consistency",
        net=dict(base=16, multipliers=(1,), blocks=1, attention=(), estimate=(8,)),
        c=0.01,
        batch=600,
        epochs=1,
        lr=1e-12,
        sample_every=0,
        device="cpu",
    )
    (tmp_path / "config.json").write_text(json.dumps(TrainConfig(**fields).to_dict()))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "-m",
            "dddm.training",
            tmp_path / "config.json",
            "--out",
            tmp_path / "two",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setattr(
        passes,
        "epoch_batches",
        lambda n, batch, seed, epoch, world=1, drop_last=False: [
            [torch.cat(s)] for s in epoch_batches(n, batch, seed, epoch, 2)
        ],
    )
    train(TrainConfig(**fields), tmp_path / "one", progress=False)
    a, b = (
        torch.load(newest_checkpoint(tmp_path / run) / "state.pt", weights_only=True)["optimizer"]["state"]
        for run in ("one", "two")
    )
    largest = max(v["exp_avg"].abs().max() for v in a.values())
    assert a.keys() == b.keys() and largest > 0
    for key in a:
        assert (a[key]["exp_avg"] - b[key]["exp_avg"]).abs().max() < 1e-4 * largest


def meanflow_model(**options):
    "A small U-Net of average velocities whose zeroed layers are filled, and a batch for it."
    g = torch.Generator().manual_seed(0)
    net = dict(base=16, multipliers=(1,), blocks=1, attention=(8,), estimate=(), **options)
    config = TrainConfig(objective="meanflow", net=net, classes=3)
    model = build(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    batch = Batch(
        x0=torch.randn(8, 1, 8, 8, generator=g).clamp(-1, 1),
        t=torch.zeros(8, dtype=torch.long),
        noise=torch.randn(8, 1, 8, 8, generator=g),
        label=torch.arange(8) % 3,
        uniforms=torch.rand(8, 4, generator=g),
    )
    return model, batch


def test_two_angles_are_drawn_as_said():
    n = 100_000
    batch = draw_angles(Batch(torch.zeros(n, 1), None, None, uniforms=torch.rand(n, 4)), schedule)
    last = math.acos(AB[-1] ** 0.5)
    even, odd = slice(None, None, 2), slice(1, None, 2)
    assert (
        (batch.below <= batch.angle).all() and (batch.below >= 0).all() and batch.angle.max() <= last + 1e-6
    )
    assert torch.equal(batch.below[odd], batch.angle[odd])
    assert (batch.below[even] == 0).double().mean().item() == pytest.approx(0.35, abs=0.01)
    # half of ln(sigma) is N(0, 1.6²), and half of the angles are even
    sure = 0.5 * (0.5 + 0.25 * math.pi / last)
    assert (batch.angle[odd] < math.pi / 4).double().mean().item() == pytest.approx(sure, abs=0.01)
    angles = np.arccos(AB**0.5)
    t = batch.t[:500].numpy()
    assert (np.abs(angles[t] - batch.angle[:500].numpy()) <= np.diff(angles).max()).all()


@pytest.mark.parametrize("guidance, derivative", [(1.0, "jvp"), (2.0, "difference"), (2.0, "jvp")])
def test_meanflow_row_by_row(guidance, derivative):
    "The derivative along the network's path by central differences, the guided velocity by its formula."
    model, batch = meanflow_model()
    batch = dataclasses.replace(batch, guidance=guidance, label_dropout=0.3, derivative=derivative)
    value = objective_value("meanflow", model, distance("squared_l2"), batch)
    assert value.rows is None
    batch, net, h = value.batch, model.net.net, 1e-2
    for i in range(8):
        angle, below = batch.angle[i : i + 1], batch.below[i : i + 1]
        x0, noise = batch.x0[i : i + 1], batch.noise[i : i + 1]
        x, v = angle.cos() * x0 + angle.sin() * noise, angle.cos() * noise - angle.sin() * x0
        hidden = batch.uniforms[i, 3] < 0.3
        label = torch.tensor([-1]) if hidden else batch.label[i : i + 1]
        u = lambda x, a, b, label: net(x, a, torch.zeros_like(x), label, a - b)
        with torch.no_grad():
            if guidance != 1 and not hidden:
                v = guidance * v + (1 - guidance) * u(x, angle, angle, torch.tensor([-1]))
            w = u(x, angle, angle, label)  # the network's own velocity: where the path goes
            change = (u(x + h * w, angle + h, below, label) - u(x - h * w, angle - h, below, label)) / (2 * h)
            target = v - (angle - below) * change
            expected = (u(x, angle, below, label) - target).square().sum()
        assert value.loss[i].item() == pytest.approx(expected.item(), rel=2e-3), i
    assert (batch.below[::2] < batch.angle[::2]).any()


def test_the_target_of_meanflow_has_no_gradient():
    "The gradient is that of the distance to a fixed target."
    model, batch = meanflow_model()
    batch = draw_angles(batch, schedule)
    seen = []

    def d(u, target):
        seen.append((u, target))
        return (u - target).square().flatten(1).sum(1)

    OBJECTIVES["meanflow"].loss(model, d, batch, "none")[0].sum().backward()
    (u, target), grads = seen[0], [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert u.requires_grad and not target.requires_grad and grads


def test_a_mean_velocity_keeps_the_boundary_and_jumps():
    model, batch = meanflow_model()
    x, zero = batch.noise, torch.zeros_like(batch.noise)
    assert torch.equal(model(zero, x, torch.tensor(0), batch.label), x)
    one = model(zero, x, torch.tensor(T), batch.label).clamp(-1, 1)
    torch.testing.assert_close(meanflow(model, x, 1, batch.label), one)
    assert not torch.equal(meanflow(model, x, 3, batch.label), one)
    assert torch.equal(model(zero + 1, x, torch.tensor(T), batch.label).clamp(-1, 1), one)  # no estimate
    found = sample(model, 5, (1, 3), label=1)
    whole = sample(model, 8, 3, label=1, batch_size=3)
    torch.testing.assert_close(found[3], whole[:5], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="meanflow.*own is 'iterate'"):
        sample(assemble("paper", Toy(), schedule), 2, sampler="meanflow")


@pytest.mark.parametrize(
    "fields, match",
    [
        (dict(objective="meanflow", net=dict(time="step")), "needs interval"),
        (dict(objective="paper", net=dict(time="interval")), "needs step or angle"),
        (dict(objective="paper", guidance=2.0), "guidance=2.0.*meanflow"),
        (dict(objective="meanflow", guidance=2.0), "guidance=2.0.*classes"),
        (dict(objective="meanflow", classes=10, guidance=2.0), "label_dropout"),
        (dict(objective="meanflow", classes=10, label_dropout=1.0), "label_dropout=1.0"),
        (dict(objective="meanflow", classes=10, guidance=0.5, label_dropout=0.1), "guidance=0.5"),
    ],
)
def test_what_meanflow_cannot_be_told(fields, match):
    with pytest.raises(ValueError, match=match):
        TrainConfig(**fields)


def test_the_time_as_an_angle():
    "Any objective may have its network told the angle; it is that of the step."
    model = build(TrainConfig(net=dict(base=16, multipliers=(1,), attention=(), estimate=(), time="angle")))
    seen, x = [], torch.zeros(2, 1, 8, 8)
    model.net.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    model(x, x, torch.tensor([1, T]))
    np.testing.assert_allclose(seen[0].numpy(), np.arccos(AB[[1, T]] ** 0.5), rtol=1e-5)
