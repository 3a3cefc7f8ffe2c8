"What nbs/02a_toy.ipynb has no room for: the network against plain layers, a step by hand, a closed form."

import math

import pytest
import torch
from torch import nn

from dddm.model import DDDM
from dddm.schedule import VPSchedule
from dddm.toy import RingNet, eight_gaussians, energy_distance, train_toy

SCHEDULE = VPSchedule()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_turning_the_ring_by_one_gaussian_changes_nothing():
    ring, x = eight_gaussians(), torch.randn(50, 2, generator=seeded(0), dtype=torch.float64)
    c, s = math.cos(math.pi / 4), math.sin(math.pi / 4)
    turn = torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
    for t in (0, 1, 300, 1000):
        there = ring.posterior_mean(x @ turn, t, SCHEDULE)
        assert torch.allclose(there, ring.posterior_mean(x, t, SCHEDULE) @ turn, atol=1e-10)
    assert ring.means.norm(dim=1).sub(1).abs().max() < 1e-15 and ring.stds.unique().numel() == 1


def test_energy_distance_of_two_gaussians():
    "On the line E|X - Y| of normals has a closed form; the estimate must meet it, in images' shape, too."
    g, n = seeded(1), 3000
    x = torch.randn(n, 1, 1, 1, generator=g, dtype=torch.float64)
    y = 2 + torch.randn(n, 1, 1, 1, generator=g, dtype=torch.float64)
    mean_abs = lambda m, v: (
        math.sqrt(2 * v / math.pi) * math.exp(-(m**2) / (2 * v)) + m * math.erf(m / math.sqrt(2 * v))
    )
    exact = 2 * mean_abs(2, 2) - 2 * mean_abs(0, 2)
    assert abs(energy_distance(x, y) - exact) < 0.1
    plain = sum((a - b).abs().item() for a in x[:20] for b in x[:20])
    assert abs(energy_distance(x[:20], x[:20]) - (2 * plain / 400 - 2 * plain / 380)) < 1e-12


@pytest.mark.parametrize("T", [50, 1000])
def test_each_network_is_a_plain_perceptron(T):
    k, B, width = 3, 5, 16
    net, g = RingNet(k, width, seeded(2), T=T), seeded(3)
    x_t, estimate = torch.randn(k * B, 2, generator=g), torch.randn(k * B, 2, generator=g)
    t = torch.randint(1, T + 1, (k * B,), generator=g)
    out = net(x_t, t, estimate, None).view(k, B, 2)
    angles = [math.pi / 2 * 2**j for j in range(8)]
    for j in range(k):
        rows = slice(j * B, (j + 1) * B)
        u = (t[rows] / T).double()
        h = [*x_t[rows].double().T, *estimate[rows].double().T, u]
        h = torch.stack(h + [(w * u).sin() for w in angles] + [(w * u).cos() for w in angles], 1)
        for i, (W, b) in enumerate(zip(net.weights, net.biases)):
            h = h @ W[j].double() + b[j].double()
            h = nn.functional.silu(h) if i < 3 else h
        assert torch.allclose(out[j].double(), h, atol=1e-5)


@pytest.mark.parametrize("write", ["own", "noise", "truth"])
def test_one_step_by_hand(write):
    "One epoch of one batch, for one network, against a step that is written without any grouping."
    N, seed = 64, 4
    x0 = eight_gaussians().sample(N, seeded(5)).float()[None]
    model, twin = (DDDM(RingNet(1, 16, seeded(6)), SCHEDULE) for _ in range(2))
    epoch = next(train_toy(model, x0, 1, write, lr=0.01, batch=N, seed=seed))

    g = seeded(seed)
    store = x0[0] if write == "truth" else torch.randn(1, N, 2, generator=g)[0]
    i = torch.rand(1, N, generator=g).argsort(1)[0]
    t = torch.randint(1, 1001, (N,), generator=g)
    noise = torch.randn(N, 2, generator=g)
    x_hat = twin(store[i], SCHEDULE.diffuse(x0[0, i], t, noise), t)
    loss = ((x_hat - x0[0, i]) ** 2).sum(1).mean()
    loss.backward()
    with torch.no_grad():
        for p in twin.parameters():  # Adam's first step: the learning rate times the sign, nearly
            p -= 0.01 * p.grad / (p.grad.abs() + 1e-8)
    assert torch.allclose(epoch.loss, loss.detach())
    for a, b in zip(model.parameters(), twin.parameters()):
        assert torch.allclose(a, b, atol=1e-5)
    written = {"own": x_hat, "truth": x0[0, i], "noise": torch.randn(1, N, 2, generator=g)[0]}[write]
    assert torch.allclose(epoch.store[0, i], written.detach(), atol=1e-6)


def test_networks_side_by_side_share_nothing():
    "Other data for the second network leave the first one's weights and store as they were, bit for bit."
    x0 = eight_gaussians().sample(2 * 256, seeded(7)).float().view(2, 256, 2)
    other = torch.stack([x0[0], x0[1] + 1])
    found = []
    for data in (x0, other):
        model = DDDM(RingNet(2, 16, seeded(8)), SCHEDULE)
        *_, epoch = train_toy(model, data, 3, batch=100)
        found.append((model.net.weights[1].detach(), epoch.store))
    for a, b in zip(*found):
        assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


def test_an_unknown_write_is_refused():
    model = DDDM(RingNet(), SCHEDULE)
    with pytest.raises(ValueError, match="write 'nosie' is unknown; did you mean 'noise'"):
        next(train_toy(model, torch.zeros(1, 8, 2), 1, write="nosie"))
