"""Sampling with a real network, split over processes, interrupted, and compared with the five lines of
algorithm 2.
"""

import subprocess
import sys

import pytest
import torch
from torch import nn

from dddm.model import DDDM
from dddm.sampling import draws, iterate, sample
from dddm.schedule import VPSchedule
from dddm.store import seeded_normal
from dddm.unet import UNet

SHAPE = (3, 8, 8)


def unet(classes=None, dropout=0.3):
    """A small U-Net whose zero-initialised layers are filled, so that it does something.

    Left in training mode.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet(
            shape=SHAPE,
            base=16,
            multipliers=(1, 2),
            blocks=1,
            dropout=dropout,
            attention=(4,),
            estimate=(4,),
            head_channels=16,
            groups=8,
            classes=classes,
        )
        for p in net.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.05)
    return DDDM(net, VPSchedule()).train()


def algorithm_2(model, x_T, x, steps, label=None):
    model.eval()
    t = torch.full((len(x_T),), 1000)
    with torch.no_grad():
        for _ in range(steps):
            x = model(x, x_T, t, label).clamp(-1, 1)
    return x


def test_unet_equals_the_plain_loop_and_modes_come_back():
    model = unet()
    model.net.requires_grad_(True)
    x_T, x_0 = draws(3, range(5), SHAPE)
    model.train()
    before = [m.training for m in model.modules()]
    ours = sample(model, 5, steps=3, seed=3)
    assert [m.training for m in model.modules()] == before and all(before)
    torch.testing.assert_close(ours, algorithm_2(model, x_T, x_0, 3), rtol=0, atol=0)
    assert (
        ours.dtype == torch.float32
        and ours.shape == (5, *SHAPE)
        and not ours.requires_grad
        and not ours.is_inference()
    )
    assert not torch.equal(ours, sample(model, 5, steps=2, seed=3)) and not torch.equal(
        ours, sample(model, 5, steps=3, seed=4)
    )


def test_any_cut_of_the_job_gives_the_same_images():
    model = unet(classes=4)
    label = torch.arange(11) % 4
    whole = sample(model, 11, (1, 4), seed=1, label=label)
    for size in (1, 2, 4, 11, 64):
        cut = sample(model, 11, (4, 1), seed=1, label=label, batch_size=size)
        assert list(cut) == [1, 4]
        for s in cut:
            torch.testing.assert_close(cut[s], whole[s], rtol=0, atol=1e-5)
    parts = [sample(model, b - a, 4, seed=1, label=label[a:b], start=a) for a, b in ((0, 3), (3, 4), (4, 11))]
    torch.testing.assert_close(torch.cat(parts), whole[4], rtol=0, atol=1e-5)


HALVES = """
import sys, torch
from dddm.model import DDDM
from dddm.sampling import sample
from dddm.schedule import VPSchedule
class Net(torch.nn.Module):
    shape = (1, 4, 4)
    def forward(self, x_t, t, e, label): return x_t - torch.tanh(0.5 * e + x_t)
def part(start, n): return sample(DDDM(Net(), VPSchedule()), n, 5, seed=2, start=start)
if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(part(int(sys.argv[1]), int(sys.argv[2])), sys.argv[3])
"""


def test_two_processes_make_the_halves_of_one_call(tmp_path):
    (tmp_path / "halves.py").write_text(HALVES)
    both = [
        subprocess.Popen([sys.executable, tmp_path / "halves.py", str(a), str(n), tmp_path / f"{a}.pt"])
        for a, n in ((0, 4), (4, 3))
    ]
    assert [p.wait() for p in both] == [0, 0]
    space = {"__name__": "here"}
    exec(HALVES, space)
    torch.testing.assert_close(
        torch.cat([torch.load(tmp_path / f"{a}.pt") for a in (0, 4)]), space["part"](0, 7), rtol=0, atol=1e-6
    )


def test_noise_streams_are_apart_from_each_other_and_from_the_store():
    index = torch.arange(64)
    x_T, x_0 = draws(0, index, (32, 32))
    noises = [
        x_T,
        x_0,
        seeded_normal(0, index, (32, 32)),
        draws(1, index, (32, 32))[0],
        draws(0, index + 1, (32, 32))[0],
    ]
    for i, a in enumerate(noises):
        assert abs(a.mean()) < 0.02 and abs(a.std() - 1) < 0.02
        for b in noises[:i]:
            assert abs((a * b).mean()) < 0.02  # 65,536 products: five standard deviations


def test_conditional_unet_refuses_wrong_labels():
    model, plain = unet(classes=4), unet()
    for label, words in (
        (None, "label"),
        (4, "0..3"),
        (-1, "0..3"),
        (torch.tensor([0, 9]), "0..3"),
        (torch.zeros(2), "dtype"),
    ):
        with pytest.raises(ValueError, match=words):
            sample(model, 2, label=label)
    with pytest.raises(ValueError, match="unconditional"):
        sample(plain, 2, label=0)
    assert torch.equal(sample(model, 2, label=3), sample(model, 2, label=[3, 3]))
    assert model.training


class Scripted(nn.Module):
    "f gives the estimates of a list, one a call."

    shape = (2,)

    def __init__(self, values):
        super().__init__()
        self.values = list(values)

    def forward(self, x_t, t, e, label):
        return x_t - self.values.pop(0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clamp", [True, False])
def test_one_bad_entry_stops_at_its_step(bad, clamp):
    third = torch.zeros(4, 2)
    third[3, 1] = bad
    model = DDDM(Scripted([torch.zeros(4, 2)] * 2 + [third] + [torch.zeros(4, 2)] * 3), VPSchedule()).train()
    seen = []
    with pytest.raises(RuntimeError, match="step 3 of 6"):
        for x in iterate(model, torch.zeros(4, 2), steps=6, clamp=clamp):
            seen.append(x)
    assert len(seen) == 2 and model.training
    model.net.values = [third] * 2
    with pytest.raises(RuntimeError, match="step 1 of 2"):
        sample(model, 4, steps=2, clamp=clamp)
    assert model.training


def test_large_finite_half_precision_output_is_not_called_infinite():
    big = torch.full((4, 2), 30000.0, dtype=torch.float16)
    model = DDDM(Scripted([big]), VPSchedule())
    assert next(iterate(model, torch.zeros(4, 2, dtype=torch.float16), clamp=False)).eq(30000).all()


def test_a_batch_is_left_when_nothing_of_it_moves():
    rest, creeping = torch.zeros(2, 2), torch.zeros(2, 2)
    creeping[1, 0] = 1e-3  # one value of one image moves
    script = [rest, creeping, creeping] + [
        rest,
        rest,
    ]  # batch 1 rests after its third step, batch 2 after its second
    found = sample(DDDM(Scripted(script), VPSchedule()), 4, (1, 2, 3, 4, 500), batch_size=2, tolerance=1e-4)
    for s, first in ((1, rest), (2, creeping), (3, creeping), (4, creeping), (500, creeping)):
        torch.testing.assert_close(
            found[s], torch.cat([first, rest]), rtol=0, atol=1e-6
        )  # F = x_T - f rounds
    net = Scripted([rest, creeping] * 3)
    moving = sample(DDDM(net, VPSchedule()), 2, (2, 6), tolerance=1e-4)  # it never rests: every step is made
    assert not net.values and torch.allclose(moving[6], creeping, atol=1e-6)
    wide = Scripted([rest, creeping] * 3)
    assert (
        torch.allclose(sample(DDDM(wide, VPSchedule()), 2, (6,), tolerance=1e-2)[6], creeping, atol=1e-6)
        and len(wide.values) == 4
    )
    with pytest.raises(RuntimeError, match="step 2 of 6"):
        sample(DDDM(Scripted([rest, rest / 0]), VPSchedule()), 2, (6,), tolerance=1e-4)


def test_arguments_are_checked_before_the_model_runs():
    model = DDDM(Scripted([]), VPSchedule())  # any call of it fails
    x = torch.zeros(3, 2)
    for call in (
        lambda: iterate(model, x, steps=0),
        lambda: iterate(model, x[:, :1]),
        lambda: iterate(model, x, x[:1]),
        lambda: iterate(model, x * torch.nan),
        lambda: iterate(model, x, x / 0),
        lambda: sample(model, 0),
        lambda: sample(model, 2, -1),
        lambda: sample(model, 2, batch_size=0),
        lambda: sample(model, 2, seed=-1),
        lambda: sample(model, 2, start=-1),
        lambda: sample(model, 2, ()),
        lambda: sample(model, 2, (1, 0)),
        lambda: sample(model, 2, tolerance=-1),
    ):
        with pytest.raises(ValueError):
            call()


def test_stopping_early_and_going_on_alone():
    model = unet(dropout=0.0)
    x_T, x_0 = draws(0, range(2), SHAPE)
    path = iterate(model, x_T, x_0, steps=1000)
    third = [next(path) for _ in range(3)][-1]
    path.close()
    *_, fifth = iterate(model, x_T, third, steps=2)  # algorithm 2 has no other state than the estimate
    torch.testing.assert_close(fifth, sample(model, 2, steps=5), rtol=0, atol=1e-5)
    (fifth * torch.ones(1, requires_grad=True)).sum().backward()


def test_dtype_is_the_weights_and_autocast_gives_float32():
    class Linear(nn.Module):
        shape = (2,)

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2, dtype=torch.float64)

        def forward(self, x_t, t, e, label):
            return self.layer(x_t + e)

    assert sample(DDDM(Linear(), VPSchedule()), 3, steps=2).dtype == torch.float64
    model = unet()
    exact = sample(model, 3, steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        half = sample(model, 3, steps=2)
    assert half.dtype == torch.float32 and (half - exact).abs().mean() < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_images_and_names_the_bad_step():
    model = unet(dropout=0.0)
    on_cpu = sample(model, 5, steps=2)
    on_gpu = sample(model.cuda(), 5, steps=2, batch_size=2)
    assert on_gpu.device.type == "cpu"
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-2)
    bad = torch.full((4, 2), torch.inf, device="cuda")
    broken = DDDM(Scripted([bad * 0 + 1, bad, bad * 0 + 1]), VPSchedule())
    with pytest.raises(RuntimeError, match="step 2 of 3"):
        list(iterate(broken, torch.zeros(4, 2, device="cuda"), steps=3))


class Constant(nn.Module):
    "A network whose answer is one value, of a flow's velocity as well."

    shape = (1, 4, 4)

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x_t, t, estimate, label):
        return torch.full_like(x_t, self.value)

    def move(self, x, r, theta, label=None):
        return torch.full_like(x, self.value)


@pytest.mark.parametrize("sampler", ["iterate", "ddim", "renoise", "meanflow"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_overflows_is_no_image(sampler, value):
    "No clamp makes an infinity a 1, and the step that failed is named."
    for steps in (1, 3):
        with pytest.raises(RuntimeError, match=f"output at step 1 of {steps} has non-finite"):
            sample(DDDM(Constant(value), VPSchedule()), 2, steps, sampler)
