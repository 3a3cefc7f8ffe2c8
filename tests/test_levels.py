"Where noise levels lie, and how often each interval between two of them is drawn."

import itertools

import pytest
import torch

from dddm.levels import LEVEL_DISTRIBUTIONS, intervals, level_count, noise_levels
from dddm.schedule import VPSchedule

schedule = VPSchedule()


@pytest.mark.parametrize("distribution", LEVEL_DISTRIBUTIONS)
def test_intervals_are_a_distribution_at_every_moment(distribution):
    noiseless = VPSchedule(1000, 0.0, 20.0)  # its first step adds no noise
    for s, progress in itertools.product((schedule, noiseless), (0.0, 0.5, 1 - 1e-9)):
        times, cumulative, weight = intervals(s, 40, distribution, progress)
        assert weight.isfinite().all()
        assert cumulative[0] == 0 and cumulative[-1] == 1 and (cumulative.diff() > 0).all()
        assert len(times) == len(cumulative) == len(weight) + 1 and (weight > 0).all()
        assert weight.dtype == torch.float64


def test_levels_and_doubling():
    for T_ in (2, 10, 1000, 4000):
        s = VPSchedule(T_, 0.1, min(20.0, 0.9 * T_))
        for n in (2, 10, 80):
            times = noise_levels(s, n)
            assert (
                times[0] == 0
                and times[1] == 1
                and times[-1] == T_
                and (times.diff() > 0).all()
                and len(times) <= n + 1
            )
    assert [level_count(p, 10, 80) for p in (0, 0.2499, 0.25, 0.5, 0.75, 0.9999)] == [10, 10, 20, 40, 80, 80]
    assert level_count(0.9999, 10, 100) == 100 and level_count(0.5, 7, 7) == 7


@pytest.mark.parametrize("least, most", [(80, 10), (1, 10)])
def test_levels_that_fall_are_refused(least, most):
    with pytest.raises(ValueError, match="need 2 <= least <= most"):
        level_count(0.5, least, most)
