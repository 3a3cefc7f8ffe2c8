"Each worker and each process it starts uses one thread: two workers on two cores must not fight over them."

import os
import pathlib

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ["MPLBACKEND"] = "agg"

import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

torch.set_num_threads(1)
ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def root():
    return ROOT


@pytest.fixture(scope="session")
def cifar10_copy():
    "Folder of the CIFAR-10 copy (two zips of class folders), or a skip that says how to give one."
    folder = pathlib.Path(os.environ.get("DDDM_CIFAR10", ROOT.parent / "shared" / "data"))
    if not (folder / "cifar10-jpeg-train.zip").exists():
        pytest.skip(f"no cifar10-jpeg-train.zip in {folder}; set DDDM_CIFAR10 to a folder that has it")
    return folder


@pytest.fixture(scope="session")
def mnist_root():
    "torchvision's folder with the official files of MNIST, or a skip that says how to give one."
    folder = pathlib.Path(os.environ.get("DDDM_MNIST", ROOT.parent / "shared" / "data"))
    if not list(folder.glob("MNIST/raw/train-images-idx3-ubyte*")):
        pytest.skip(
            f"no MNIST/raw/train-images-idx3-ubyte in {folder}; set DDDM_MNIST to a folder that has it"
        )
    return folder


@pytest.fixture
def pixel_cache(tmp_path, monkeypatch):
    "A cache folder for decoded images of this test alone."
    monkeypatch.setenv("DDDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Blank(FeatureExtractorInceptionV3):
    def load_state_dict(self, state):
        pass


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory):
    """A weights file with Inception's names and shapes, and random numbers in it.

    What it scores means nothing.
    """
    path = tmp_path_factory.mktemp("weights") / "inception-shaped.pth"
    torch.save({}, path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Blank("blank", ["2048"], feature_extractor_weights_path=str(path))
        for p in model.parameters():
            if p.ndim > 1:
                nn.init.kaiming_normal_(p)
    torch.save(model.state_dict(), path)
    return path
