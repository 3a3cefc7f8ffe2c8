"What nbs/01_pfode.ipynb has no room for: other schedules, independent re-computation, devices, timing."

import math
import time

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from dddm.pfode import GaussianMixture
from dddm.schedule import VPSchedule


def mixture(K, D, std, seed=0):
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(K, generator=g) + 0.1
    return GaussianMixture(
        torch.randn(K, D, generator=g), std * (0.5 + torch.rand(K, generator=g)), weights / weights.sum()
    )


def points(n, D, T, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g, dtype=torch.float64), torch.randint(0, T + 1, (n,), generator=g)


def naive(gm, x, ab):
    "log q, score and posterior mean of one point in plain numpy, from the differences x - a m_k themselves."
    a, m, s, w = math.sqrt(ab), gm.means.numpy(), gm.stds.numpy(), gm.weights.numpy()
    v = ab * s**2 + 1 - ab
    logit = np.log(w) - 0.5 * m.shape[1] * np.log(2 * math.pi * v) - ((x - a * m) ** 2).sum(1) / (2 * v)
    r = np.exp(logit - logit.max())
    logq, r = logit.max() + math.log(r.sum()), r / r.sum()
    score = (r[:, None] * (a * m - x) / v[:, None]).sum(0)
    return logq, score, (r[:, None] * (m + a * (s**2 / v)[:, None] * (x - a * m))).sum(0)


@pytest.mark.parametrize("D,std", [(1, 0.1), (2, 1e-3), (64, 0.1), (64, 1e-3)])
def test_log_prob_score_and_mean_against_plain_differences(D, std):
    gm, schedule = mixture(7, D, std), VPSchedule(1000)
    noise, t = points(200, D, 1000)
    x = schedule.diffuse(gm.sample(200, torch.Generator().manual_seed(2)), t, noise)
    expected = [
        np.stack(v) for v in zip(*(naive(gm, p.numpy(), schedule.alphas_bar[i].item()) for p, i in zip(x, t)))
    ]
    for value, wanted in zip(
        (gm.log_prob(x, t, schedule), gm.score(x, t, schedule), gm.posterior_mean(x, t, schedule)), expected
    ):
        np.testing.assert_allclose(value.numpy(), wanted, rtol=1e-7, atol=1e-7 * np.abs(wanted).max())


@pytest.mark.parametrize("std", [0.2, 0.01])
def test_flow_against_the_ode_in_another_variable(std):
    "The ODE of x/a in log sigma, score by `naive`, integrated to sigma far below every std."
    gm, schedule = mixture(4, 2, std), VPSchedule(1000)
    x, t = points(4, 2, 1000)
    t[0] = 1000
    for p, i, end in zip(x, t, gm.flow(x, t, schedule)):
        ab = schedule.alphas_bar[i].item()

        def velocity(log_sigma, y):
            sigma = math.exp(log_sigma)
            ab = 1 / (1 + sigma**2)
            return -(sigma**2) * math.sqrt(ab) * naive(gm, math.sqrt(ab) * y, ab)[1]

        span = 0.5 * math.log((1 - ab) / ab), math.log(1e-7 * std)
        other = solve_ivp(velocity, span, p.numpy() / math.sqrt(ab), method="RK45", rtol=1e-9, atol=1e-11).y[
            :, -1
        ]
        np.testing.assert_allclose(end.numpy(), other, atol=1e-5 * max(1, np.abs(other).max()))


@pytest.mark.parametrize("T,beta_max", [(1, 0.5), (10, 5.0), (1000, 20.0), (8000, 20.0), (2000, 1500.0)])
@pytest.mark.parametrize("K,D,std", [(1, 2, 0.1), (3, 1, 0.1), (8, 64, 1e-3)])
def test_flow_on_every_schedule(T, beta_max, K, D, std):
    "(2000, 1500) has alphas_bar_T = 0: the angle is exactly pi/2 there."
    gm, schedule = mixture(K, D, std), VPSchedule(T, 0.1, beta_max)
    x, t = points(60, D, T)
    t[:2] = torch.tensor([0, T])
    end = gm.flow(x, t, schedule)
    assert torch.equal(end[t == 0], x[t == 0])
    assert (end - gm.flow(x, t, schedule, tol=1e-13)).abs().max() < 1e-6


def test_each_row_uses_its_own_t():
    gm, schedule = mixture(3, 2, 0.2), VPSchedule(1000)
    x, t = points(6, 2, 1000)
    together = gm.flow(x, t, schedule)
    for i in range(6):
        torch.testing.assert_close(
            gm.flow(x[i : i + 1], int(t[i]), schedule)[0], together[i], rtol=0, atol=1e-8
        )


def test_a_weight_of_zero_is_as_if_the_component_were_absent():
    schedule, (x, t) = VPSchedule(1000), points(50, 2, 1000)
    with_zero = GaussianMixture([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]], [0.1, 0.2, 0.3], [0.0, 0.4, 0.6])
    without = GaussianMixture([[1.0, 0.0], [0.0, 2.0]], [0.2, 0.3], [0.4, 0.6])
    for name in ("log_prob", "score", "posterior_mean", "flow"):
        torch.testing.assert_close(
            getattr(with_zero, name)(x, t, schedule),
            getattr(without, name)(x, t, schedule),
            rtol=1e-9,
            atol=1e-8,
        )
    x = x.requires_grad_()
    assert torch.autograd.grad(with_zero.log_prob(x, t, schedule).sum(), x)[0].isfinite().all()


def test_float32_input_and_input_that_wants_a_gradient():
    gm, schedule = mixture(3, 2, 0.2), VPSchedule(1000)
    x, t = points(20, 2, 1000)
    single = x.float().requires_grad_()
    end = gm.flow(single, t, schedule)
    assert end.dtype == torch.float64 and not end.requires_grad
    torch.testing.assert_close(end, gm.flow(single.detach().double(), t, schedule), rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_results_come_back_on_the_device_of_x():
    gm, schedule = mixture(3, 2, 0.2), VPSchedule(1000)
    x, t = points(20, 2, 1000)
    for name in ("log_prob", "score", "posterior_mean", "flow"):
        there = getattr(gm, name)(x.cuda(), t.cuda(), schedule)
        assert there.is_cuda and torch.equal(there.cpu(), getattr(gm, name)(x, t, schedule))


def test_slices_give_what_one_batch_gives():
    "2,000 components make the flow work in slices of 65 rows."
    gm, schedule = mixture(2000, 2, 0.3), VPSchedule(1000)
    x, _ = points(80, 2, 1000)
    torch.testing.assert_close(
        gm.flow(x, 1000, schedule)[70:], gm.flow(x[70:], 1000, schedule), rtol=0, atol=1e-8
    )


@pytest.mark.parametrize(
    "arguments,message",
    [
        (([0.0, 1.0], [1.0, 1.0], [0.5, 0.5]), "means"),
        ((torch.zeros(0, 2), [], []), "means"),
        (([[0.0], [math.nan]], [1.0, 1.0], [0.5, 0.5]), "means"),
        (([[0.0], [1.0]], [1.0], [0.5, 0.5]), "stds"),
        (([[0.0], [1.0]], [1.0, 0.0], [0.5, 0.5]), "stds"),
        (([[0.0], [1.0]], [1.0, math.inf], [0.5, 0.5]), "stds"),
        (([[0.0], [1.0]], [1.0, 1.0], [0.5]), "weights"),
        (([[0.0], [1.0]], [1.0, 1.0], [1.5, -0.5]), "weights"),
        (([[0.0], [1.0]], [1.0, 1.0], [0.5, 0.6]), "weights"),
    ],
)
def test_bad_mixtures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)


@pytest.mark.parametrize("name", ["log_prob", "score", "posterior_mean", "flow"])
@pytest.mark.parametrize(
    "x,t,message",
    [
        (torch.zeros(3, 2, dtype=torch.long), 1, "x has dtype"),
        (torch.zeros(3), 1, "x has shape"),
        (torch.zeros(3, 5), 1, "x has shape"),
        (torch.full((3, 2), math.nan), 1, "x"),
        (torch.zeros(3, 2), 1001, "t "),
        (torch.zeros(3, 2), -1, "t "),
        (torch.zeros(3, 2), torch.tensor([1, 2]), "t "),
        (torch.zeros(3, 2), torch.rand(3), "t "),
    ],
)
def test_bad_points_and_times_are_refused(name, x, t, message):
    with pytest.raises(ValueError, match=message):
        getattr(mixture(3, 2, 0.2), name)(x, t, VPSchedule(1000))


@pytest.mark.parametrize("n", [0, -1, 2.5, "3", None])
def test_bad_counts_are_refused(n):
    with pytest.raises(ValueError, match="n="):
        mixture(3, 2, 0.2).sample(n)


def test_plain_numbers_keep_their_float64_precision():
    for values in (([[0.1]], [0.1], [1.0]), (np.array([[0.1]]), np.array([0.1]), np.array([1.0]))):
        gm = GaussianMixture(*values)
        assert gm.means.item() == gm.stds.item() == 0.1
    assert mixture(3, 2, 0.2).sample(np.int64(2)).shape == (2, 2)


@pytest.mark.parametrize("tol", [0.0, -1.0, 1e-14, 0.1, math.nan])
def test_bad_tolerances_are_refused(tol):
    with pytest.raises(ValueError, match="tol"):
        mixture(3, 2, 0.2).flow(torch.zeros(3, 2), 10, VPSchedule(1000), tol=tol)


@pytest.mark.slow
def test_ten_thousand_points_take_under_five_seconds_of_one_core():
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    gm = GaussianMixture(torch.stack([angle.cos(), angle.sin()], 1), [0.1] * 8, [1 / 8] * 8)
    x, _ = points(10_000, 2, 1000)
    start = time.process_time()
    gm.flow(x, 1000, VPSchedule(1000))
    assert time.process_time() - start < 5
