"Pictures that the tests of extractors and metrics score."

import numpy as np
import torch
from PIL import Image


def colour(n, seed, dark=1):
    "Random RGB pictures, uint8 [n, 3, 32, 32], of 4x4 blocks of 8 pixels."
    small = np.random.default_rng(seed).integers(0, 256, (n, 3, 4, 4), np.uint8) // dark
    return torch.from_numpy(small.repeat(8, 2).repeat(8, 3))


def folder(path, pixels):
    path.mkdir(parents=True)
    for i, p in enumerate(pixels):
        Image.fromarray(p.permute(1, 2, 0).numpy().squeeze()).save(path / f"{i:04}.png")
    return path
