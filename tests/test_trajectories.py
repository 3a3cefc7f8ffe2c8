"Trajectories: what is kept of them, their curves, figures and files."

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import Halving, halving, random_model

from dddm import config, presets, trajectories
from dddm.colours import PALETTE
from dddm.data import Images, digits
from dddm.model import DDDM
from dddm.pictures import grid
from dddm.sampling import ddim
from dddm.schedule import VPSchedule
from dddm.zoo import Pretrained


def test_trajectory_of_a_known_map(monkeypatch):
    monkeypatch.setattr(trajectories, "BATCH", 2)
    t = trajectories.Trajectory(halving(), n=5, steps=30, dtype=torch.float32).run()
    for s in t.steps:
        torch.testing.assert_close(t.samples(s), t.x0 / 2**s)
    norm = t.x0.flatten(1).norm(dim=1).mean().item()
    np.testing.assert_allclose(t.moved, [norm / 2**s for s in range(1, 31)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "renoise"])
def test_trajectory_of_another_sampler(sampler, monkeypatch):
    """Each kept number of steps is a run of its own from the same noise.

    DDIM's are those of `ddim`; re-noised images of a longer list are the same as those of a shorter one, and
    of a part of the batch.
    """

    def f(x_t, t, estimate, label):
        return (0.9 - 0.5 * t.reshape(-1, 1, 1, 1) / 1000) * x_t - 0.05 * estimate  # its F

    model = DDDM(Halving(), VPSchedule())
    model.net.forward = f
    model.sampler = sampler
    monkeypatch.setattr(trajectories, "BATCH", 2)
    t = trajectories.Trajectory(model, n=5, dtype=torch.float32).run()
    assert t.steps == trajectories.log_steps(100) and t.done == 100 and torch.equal(t.samples(0), t.x_T)
    if sampler == "ddim":
        for s in (1, 3, 100):
            torch.testing.assert_close(
                t.samples(s), ddim(model, t.x_T, s, clamp=False, x0=t.x0), rtol=1e-4, atol=1e-5
            )
    monkeypatch.undo()
    torch.testing.assert_close(
        trajectories.Trajectory(model, n=3, steps=7, dtype=torch.float32).run().samples(7), t.samples(7)[:3]
    )
    assert not torch.allclose(
        t.samples(7),
        trajectories.Trajectory(model, n=5, steps=7, dtype=torch.float32, seed=1).run().samples(7),
    )
    moved = [
        (t.samples(b) - t.samples(a)).flatten(1).norm(dim=1).mean().item()
        for a, b in itertools.pairwise(t.steps)
    ]
    np.testing.assert_allclose(t.moved[np.array(t.steps[1:]) - 1], moved, rtol=1e-5)
    assert np.isnan(np.delete(t.moved, np.array(t.steps[1:]) - 1)).all()
    for wrong, words in (
        (dict(steps=2000), "has T=1000 times"),
        (dict(steps=[1, 5]), "begins with 0"),
        (dict(steps=[0, 5, 5]), "ascending"),
    ):
        with pytest.raises(ValueError, match=words):
            trajectories.Trajectory(model, **wrong)


def test_log_steps():
    assert trajectories.log_steps(1) == [0, 1] and trajectories.log_steps(7) == list(range(8))
    for last in (10, 99, 1000, 12345):
        at = trajectories.log_steps(last)
        assert at[:3] == [0, 1, 2] and at[-1] == last and at == sorted(set(at)) and len(at) < 95
        assert {s for s in (5, 10, 20, 50, 100, 1000) if s <= last} <= set(at)


def test_curves_of_a_class_are_not_compared_with_all_digits():
    "FD-digits stands only where the images are of all classes; the other curves always."
    settings = presets.preset("digits", classes=10)
    model = Pretrained(config.build(settings).eval(), settings)
    every, fours = (trajectories.Trajectory(model, n=66, label=label, steps=2).run() for label in (None, 4))
    titles = [list(trajectories.curves(t, digits())) for t in (every, fours)]
    assert titles[0] == titles[1] + ["FD-digits, 66 images"] and len(titles[1]) == 2


@pytest.mark.parametrize(
    "name, shape, title", [("mnist", (1, 32, 32), None), ("cifar10", (3, 32, 32), "FD-cifar, 257 images")]
)
def test_the_feature_network_is_that_of_the_images(name, shape, title):
    "CIFAR-10 has its own under another name; images of another size have none, whatever their folder's name."
    pixels = torch.randint(0, 256, (300, *shape), generator=torch.Generator().manual_seed(0))
    data = Images(pixels.byte(), None, name, "made here")
    found = trajectories.curves(trajectories.Trajectory(halving(shape=shape), n=257, steps=1).run(), data)
    assert list(found)[2:] == [title] * (title is not None)
    assert title is None or min(found[title].values) > 0


def test_two_lines_never_have_the_same_colour():
    models = [Pretrained.from_pretrained("digits-paper"), random_model("paper"), halving()]
    colours = trajectories.line_colours(models)
    assert len(set(colours)) == 3 and colours[0] == PALETTE["paper"]


def test_figures_are_matplotlib_figures():
    from matplotlib.figure import Figure

    t = trajectories.Trajectory(Pretrained.from_pretrained("digits-paper"), n=66, steps=5).run()
    figure = trajectories.steps_figure(t, steps=(1, 5), data=digits())
    assert isinstance(figure, Figure) and len(figure.axes) == 5 and "FD-digits" in figure.axes[-1].get_title()
    with pytest.raises(ValueError, match="step=3 is not computed"):
        trajectories.steps_figure(trajectories.Trajectory(halving(), 2), steps=(3,))


def test_gif(tmp_path):
    t = trajectories.Trajectory(halving(shape=(3, 8, 8)), n=3, steps=20).run()
    with Image.open(trajectories.save_trajectory(t, tmp_path / "new" / "a.gif", images=2)) as gif:
        assert gif.n_frames == len(t.steps) and gif.info["loop"] == 0
        stills = []
        for k in (0, 3, len(t.steps) - 1):
            gif.seek(k)
            stills.append(np.asarray(gif.convert("RGB"), dtype=int)[20:])
    for still, k in zip(stills, (0, 3, len(t.steps) - 1)):
        assert abs(still - grid(t.samples(t.steps[k])[:2], 2, 6)).mean() < 12  # a GIF has 256 colours
    for wrong, words in (
        (dict(path=tmp_path / "a.png"), "must be .gif"),
        (dict(path=tmp_path / "b.gif", images=0), "images=0"),
        (dict(path=tmp_path / "b.gif", trajectory=trajectories.Trajectory(halving(), 2)), "run.. it first"),
    ):
        with pytest.raises(ValueError, match=words):
            trajectories.save_trajectory(**(dict(trajectory=t) | wrong))
    assert not (tmp_path / "b.gif").exists()


def test_a_short_schedule_ends_the_steps():
    net = dict(base=16, multipliers=(1,), blocks=1, attention=(), estimate=())
    short = config.TrainConfig(objective="regression", T=50, net=net)
    assert trajectories.Trajectory(config.build(short).eval(), 2).steps[-1] == 50
