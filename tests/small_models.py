"Untrained models: one whose trajectory is known, and random weights opened as a shipped model is."

import time

import torch
from torch import nn

from dddm import config, presets
from dddm.model import DDDM
from dddm.schedule import VPSchedule
from dddm.zoo import Pretrained


class Halving(nn.Module):
    "f = half the estimate: a trajectory that is known. `seconds`: how long a step takes."

    def __init__(self, shape=(1, 8, 8), seconds=0.0):
        super().__init__()
        self.shape, self.seconds, self.w = shape, seconds, nn.Parameter(torch.zeros(1))

    def forward(self, x_t, t, estimate, label):
        time.sleep(self.seconds)
        return x_t - estimate / 2 + self.w


def halving(**options):
    return DDDM(Halving(**options), VPSchedule())


def random_model(objective):
    "A network for MNIST with random weights, told the class, and opened as a shipped one is."
    estimate = [] if objective == "meanflow" else [14]
    net = dict(base=16, multipliers=[1, 1], attention=[], estimate=estimate)
    settings = presets.preset("mnist", objective=objective, classes=10, net=net)
    torch.manual_seed(0)
    return Pretrained(config.build(settings).eval(), settings)
