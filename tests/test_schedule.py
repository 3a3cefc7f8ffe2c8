"What notebook 00 does not show: recomputations, dtypes, devices, pickling, the whole list of bad inputs."

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from dddm.checks import check_finite
from dddm.schedule import VPSchedule, linear_betas


@pytest.mark.parametrize("T", [1000, 2000, 4000, 8000])
def test_alphas_bar_against_a_sum_of_logarithms(T):
    betas = [(0.1 + (t - 1) / (T - 1) * 19.9) / T for t in range(1, T + 1)]
    schedule = VPSchedule(T)
    assert schedule.betas.dtype == schedule.alphas_bar.dtype == torch.float64
    assert schedule.betas.shape == schedule.alphas_bar.shape == (T + 1,)
    assert schedule.betas[0] == 0 and schedule.alphas_bar[0] == 1
    for t in (1, 2, T // 3, T):
        exact = math.exp(math.fsum(math.log1p(-b) for b in betas[:t]))
        assert schedule.alphas_bar[t].item() == pytest.approx(exact, rel=1e-11)
    assert (schedule.alphas_bar.diff() < 0).all()


@pytest.mark.parametrize("s, t", [(0, 1), (3, 4), (10, 400), (999, 1000)])
def test_kernel_from_s_to_t_composes(s, t):
    "Noising to s, then on from s to t, has the mean factor and variance of noising to t."
    schedule = VPSchedule()
    ab_s, ab_t = schedule.alphas_bar[s], schedule.alphas_bar[t]
    step = torch.prod(1 - schedule.betas[s + 1 : t + 1])
    assert torch.isclose(ab_s * step, ab_t, rtol=1e-13)
    assert torch.isclose(step * (1 - ab_s) + 1 - step, 1 - ab_t, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 3, 4, 4)])
def test_diffuse_recomputed_sample_by_sample(dtype, shape):
    schedule, g = VPSchedule(), torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, *shape, generator=g).to(dtype)
    t = torch.tensor([0, 1, 2, 500, 999, 1000])
    x_t = schedule.diffuse(x0, t, noise)
    assert x_t.dtype == dtype and x_t.shape == shape
    for i, ab in enumerate(schedule.alphas_bar[t].tolist()):
        expected = (
            torch.tensor(math.sqrt(ab)).to(dtype) * x0[i]
            + torch.tensor(math.sqrt(1 - ab)).to(dtype) * noise[i]
        )
        assert torch.allclose(x_t[i], expected, rtol=1e-6)
    assert torch.equal(x_t[0], x0[0])


def test_small_t_keeps_its_relative_precision_in_float32():
    schedule = VPSchedule(8000)
    _, b = schedule.signal_noise(torch.tensor([1]), torch.zeros(1, 2))
    assert b.item() == pytest.approx(math.sqrt(0.1 / 8000), rel=1e-6)


def test_integer_like_arguments_are_accepted():
    schedule, x = VPSchedule(T=np.int64(50), beta_max=20), torch.ones(3, 2)
    assert schedule.T == 50 and type(schedule.T) is int
    for t in (7, np.int64(7), torch.tensor(7, dtype=torch.int32), torch.tensor([7, 7, 7], dtype=torch.int16)):
        assert torch.equal(schedule.diffuse(x, t, x), schedule.diffuse(x, torch.full((3,), 7), x))
    assert schedule.check_t(7, 3).dtype == torch.long


def test_copies_are_equal_and_inputs_untouched():
    schedule, x, t = VPSchedule(T=30), torch.ones(2, 2), torch.tensor([3, 30])
    for other in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert repr(other) == repr(schedule) and torch.equal(other.alphas_bar, schedule.alphas_bar)
        assert torch.equal(other.diffuse(x, t, x), schedule.diffuse(x, t, x))
    assert torch.equal(x, torch.ones(2, 2)) and t.tolist() == [3, 30]


def test_gradient_flows_to_x0():
    schedule, x0 = VPSchedule(), torch.ones(2, 3, requires_grad=True)
    schedule.diffuse(x0, torch.tensor([0, 500]), torch.zeros(2, 3)).sum().backward()
    assert torch.allclose(x0.grad[:, 0], schedule.alphas_bar[[0, 500]].sqrt().float())


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_other_devices_agree_with_the_cpu(device):
    if not (torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available()):
        pytest.skip(f"no {device} here")
    schedule, g = VPSchedule(), torch.Generator().manual_seed(0)
    x0, noise, t = (
        torch.randn(4, 3, generator=g),
        torch.randn(4, 3, generator=g),
        torch.tensor([0, 1, 500, 1000]),
    )
    expected = schedule.diffuse(x0, t, noise)
    for steps in (t, t.to(device)):
        got = schedule.diffuse(x0.to(device), steps, noise.to(device))
        assert got.device.type == device and torch.allclose(got.cpu(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "arguments, name",
    [
        (dict(T="5"), "T='5'"),
        (dict(beta_min=None), "beta_min=None"),
        (dict(T=0), "T=0"),
        (dict(T=-3), "T=-3"),
        (dict(T=1.5), "T=1.5"),
        (dict(T=float("nan")), "T=nan"),
        (dict(T=float("inf")), "T=inf"),
        (dict(beta_min=-0.1), "beta_min=-0.1"),
        (dict(beta_min=21), "beta_min=21"),
        (dict(beta_min=float("nan")), "beta_min=nan"),
        (dict(beta_max=float("inf")), "beta_max=inf"),
        (dict(T=20), "beta_max=20"),
        (dict(T=1, beta_max=1.0), "beta_max=1.0"),
    ],
)
def test_bad_schedules_are_refused(arguments, name):
    for build in (VPSchedule, linear_betas):
        with pytest.raises(ValueError, match=name):
            build(**arguments)


@pytest.mark.parametrize("t", [-1, 1001, 0.5, True, [0, 1], [[0], [1], [2]], [0, 1, 1001], [0.0, 1.0, 2.0]])
def test_bad_t_is_refused_everywhere(t):
    schedule, x = VPSchedule(), torch.zeros(3, 2)
    for call in (
        lambda t: schedule.diffuse(x, t, x),
        lambda t: schedule.signal_noise(t, x),
        lambda t: schedule.check_t(t, 3),
    ):
        with pytest.raises(ValueError, match="^t "):
            call(torch.tensor(t))


def test_bad_images_are_refused():
    schedule, x, t = VPSchedule(), torch.zeros(3, 2), torch.tensor([1, 2, 3])
    for value in (float("nan"), float("inf"), -float("inf")):
        spoilt = x.clone()
        spoilt[1, 1] = value
        with pytest.raises(ValueError, match="x0"):
            schedule.diffuse(spoilt, t, x)
        with pytest.raises(ValueError, match="noise"):
            schedule.diffuse(x, t, spoilt)
        with pytest.raises(ValueError, match="weights"):
            check_finite("weights", spoilt)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for value in (float("nan"), float("inf"), -float("inf")):
            for place in (0, 2, 5):
                spoilt = torch.arange(6.0, dtype=dtype).requires_grad_()
                spoilt.data[place] = value
                with pytest.raises(ValueError, match="x_t"):
                    check_finite("x_t", spoilt)
        check_finite("x_t", torch.ones(0, 3, dtype=dtype))
        check_finite("x_t", torch.full((3,), torch.finfo(dtype).max, dtype=dtype))
    with pytest.raises(ValueError, match="noise"):
        schedule.diffuse(x, t, x[:, :1])
    with pytest.raises(ValueError, match="dtype"):
        schedule.diffuse(x.long(), t, x)
    for noise in (x.double(), x.bfloat16(), x.long()):
        with pytest.raises(ValueError, match="noise has dtype .* x0 torch.float32"):
            schedule.diffuse(x, t, noise)
