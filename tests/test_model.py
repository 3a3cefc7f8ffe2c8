"""What notebook 02 does not show.

The flow recomputed by two other methods, gradients, precision, state dict, and the list of bad inputs.
"""

import copy

import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import nn

from dddm.model import DDDM, Boundary
from dddm.pfode import GaussianMixture
from dddm.schedule import VPSchedule


class ExactF(nn.Module):
    def __init__(self, mixture, schedule):
        super().__init__()
        self.mixture, self.schedule = mixture, schedule

    def forward(self, x_t, t, x0_estimate, label):
        return x_t - self.mixture.flow(x_t, t, self.schedule)


class Conv(nn.Module):
    "A small image net that uses all of its inputs; `shape` is of one sample."

    shape = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.conv, self.label = nn.Conv2d(6, 3, 3, padding=1), nn.Embedding(5, 3)

    def forward(self, x_t, t, x0_estimate, label):
        h = self.conv(torch.cat([x_t, x0_estimate], 1)) + (t / 1000).to(x_t)[:, None, None, None]
        return h if label is None else h + self.label(label)[:, :, None, None]


def images(n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DDDM(Conv(), VPSchedule())
    return (
        model,
        torch.randn(n, 3, 8, 8, generator=g),
        torch.randn(n, 3, 8, 8, generator=g),
        torch.tensor([0, 1, 10, 500, 1000])[:n],
    )


def test_exact_net_against_root_finding_on_quantiles():
    "In one dimension the flow keeps the share of mass to the left: recomputed with scipy alone."
    mix, schedule = GaussianMixture([[-0.7], [0.1], [1.3]], [0.3, 0.2, 0.25], [0.3, 0.5, 0.2]), VPSchedule()
    model = DDDM(ExactF(mix, schedule), schedule)

    def cdf(x, ab):
        parts = zip(mix.weights.tolist(), mix.means[:, 0].tolist(), mix.stds.tolist())
        return sum(w * norm.cdf(x, ab**0.5 * m, (ab * s * s + 1 - ab) ** 0.5) for w, m, s in parts)

    for t in (1, 50, 300, 1000):
        for x in (-1.1, 0.05, 0.9):
            share = cdf(x, schedule.alphas_bar[t].item())
            expected = brentq(lambda y, share=share: cdf(y, 1.0) - share, -6, 6, xtol=1e-13)
            got = model(torch.zeros(1, 1).double(), torch.tensor([[x]]).double(), torch.tensor([t])).item()
            assert got == pytest.approx(expected, abs=1e-7)


def test_exact_F_against_a_plain_solver_in_3_dimensions():
    """Heun steps of dx/d lambda = -(x + score)/2 over the schedule's own grid.

    Second order, so two grids extrapolate.
    """
    g = torch.Generator().manual_seed(1)
    mix = GaussianMixture(torch.randn(4, 3, generator=g), [0.3, 0.4, 0.5, 0.6], [0.1, 0.2, 0.3, 0.4])
    x_T, ends = torch.randn(20, 3, generator=g).double(), []
    for T in (500, 1000):
        schedule, x = VPSchedule(T), x_T
        lam = -schedule.alphas_bar.log()
        slope = lambda x, s, schedule=schedule: -0.5 * (x + mix.score(x, s, schedule))
        for s in range(T, 0, -1):
            h, k = lam[s - 1] - lam[s], slope(x, s)
            x = x + h / 2 * (k + slope(x + h * k, s - 1))
        model = DDDM(ExactF(mix, schedule), schedule)
        ends.append((x - model(x_T, x_T, torch.full((20,), T))).abs().max().item())
    assert ends[1] < 5e-4 and 2.5 < ends[0] / ends[1] < 6


def test_f_is_x_t_minus_F_and_x_t_at_zero():
    model, estimate, x_t, t = images()
    F = model.net(x_t, t, estimate, None)
    out = model(estimate, x_t, t)
    assert torch.equal(out[1:], (x_t - F)[1:]) and torch.equal(out[0], x_t[0])
    assert model.shape == (3, 8, 8) and DDDM(nn.Identity(), model.schedule).shape is None


def test_samples_do_not_see_each_other():
    model, estimate, x_t, t = images()
    alone = torch.cat([model(estimate[i : i + 1], x_t[i : i + 1], t[i : i + 1]) for i in range(5)])
    assert torch.allclose(model(estimate, x_t, t), alone, atol=1e-6)


def test_label_and_estimate_reach_the_net():
    model, estimate, x_t, t = images()
    plain, label = model(estimate, x_t, t), torch.tensor([0, 1, 2, 3, 4])
    for other in (model(estimate, x_t, t, label), model(-estimate, x_t, t)):
        assert torch.equal(other[0], plain[0]) and (other[1:] != plain[1:]).flatten(1).any(1).all()


def test_gradients_reach_the_net_except_from_t_0():
    model, estimate, x_t, t = images()
    model(estimate, x_t, t)[1:].square().sum().backward()
    assert model.net.conv.weight.grad.abs().sum() > 0
    model.zero_grad()
    model(estimate, x_t, t)[0].square().sum().backward()
    assert model.net.conv.weight.grad.abs().sum() == 0


def test_autocast_keeps_the_subtraction_in_float32():
    model, estimate, x_t, t = images()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(estimate, x_t, t)
    assert out.dtype == torch.float32 and torch.equal(out[0], x_t[0])


def test_state_dict_is_the_nets_weights_alone():
    model, estimate, x_t, t = images()
    assert set(model.state_dict()) == {"net." + k for k in model.net.state_dict()}
    other = images(seed=1)[0]
    other.load_state_dict(model.state_dict())
    for m in (other, copy.deepcopy(model)):
        assert torch.equal(m(estimate, x_t, t), model(estimate, x_t, t))


def test_bad_input_is_refused_before_the_net_runs():
    class Never(nn.Module):
        def forward(self, *_):
            raise AssertionError("the net ran")

    model, x, t = DDDM(Never(), VPSchedule()), torch.zeros(4, 2), torch.tensor([1, 2, 3, 4])
    spoilt = x.clone()
    spoilt[2, 1] = float("nan")
    for arguments, name in (
        ((x[:3], x, t), "x0_estimate"),
        ((x[:, :1], x, t), "x0_estimate"),
        ((x, x, t[:3]), "t has shape"),
        ((x, x, t - 2), "t ranges"),
        ((x, x, t + 999), "t ranges"),
        ((x, x, t.float()), "t has dtype"),
        ((x, x, t, t[:2]), "label"),
        ((spoilt, x, t), "x0_estimate"),
        ((x, spoilt, t), "x_t"),
    ):
        with pytest.raises(ValueError, match=name):
            model(*arguments)


def test_a_net_of_the_wrong_shape_is_refused():
    class Sum(nn.Module):
        def forward(self, x_t, *_):
            return x_t.sum(1, keepdim=True)  # would broadcast in silence

    with pytest.raises(ValueError, match=r"net returned shape \(4, 1\)"):
        DDDM(Sum(), VPSchedule())(torch.zeros(4, 2), torch.zeros(4, 2), torch.tensor([1, 2, 3, 4]))


def test_boundary_at_another_size_of_the_data_is_the_scaling_of_edm():
    "EDM's factors in its own variables, x = x_0 + sigma noise (Karras et al. 2022, table 1)."
    schedule, sigma_data = VPSchedule(1000), 0.5
    net = Recording()
    f = DDDM(Boundary(net, schedule, sigma_data), schedule)
    t = torch.tensor([1, 30, 400, 1000])
    x_t, estimate = torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4, 4)
    answer = f(estimate, x_t, t)
    alphas_bar = schedule.alphas_bar[t].double().reshape(-1, 1, 1, 1)
    x, sigma = x_t.double() / alphas_bar.sqrt(), ((1 - alphas_bar) / alphas_bar).sqrt()
    total = (sigma**2 + sigma_data**2).sqrt()
    c_skip, c_out, c_in = sigma_data**2 / total**2, sigma * sigma_data / total, 1 / total
    torch.testing.assert_close(net.seen.double(), c_in * x, rtol=1e-5, atol=1e-5)
    expected = c_skip * x - c_out * net.answer(net.seen).double()  # the net's sign is the velocity's
    torch.testing.assert_close(answer.double(), expected, rtol=1e-4, atol=1e-5)


class Recording(nn.Module):
    def answer(self, x):
        return torch.sin(3 * x)

    def forward(self, x_t, t, x0_estimate, label):
        self.seen = x_t
        return self.answer(x_t)


def test_at_unit_size_boundary_is_what_it_was():
    "The network is fed x_t itself, bit for bit, so runs of before go on as they were."
    schedule, net = VPSchedule(1000), Recording()
    x_t, t = torch.randn(3, 1, 4, 4), torch.tensor([0, 10, 1000])
    F = Boundary(net, schedule)(x_t, t, torch.zeros_like(x_t))
    signal, noise = schedule.signal_noise(t, x_t)
    assert torch.equal(net.seen, x_t)
    assert torch.equal(F, (1 - signal) * x_t + noise * net.answer(x_t))
