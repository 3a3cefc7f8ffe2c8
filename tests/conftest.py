"Each worker and each process it starts uses one thread: two workers on two cores must not fight over them."
import os
import pathlib

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"): os.environ[variable] = "1"
os.environ["MPLBACKEND"] = "agg"

import pytest
import torch

torch.set_num_threads(1)
ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def root(): return ROOT


@pytest.fixture(scope="session")
def cifar10_copy():
    "Folder of the CIFAR-10 copy (two zips of class folders), or a skip that says how to give one."
    folder = pathlib.Path(os.environ.get("DDDM_CIFAR10", ROOT.parent / "shared" / "data"))
    if not (folder / "cifar10-jpeg-train.zip").exists():
        pytest.skip(f"no cifar10-jpeg-train.zip in {folder}; set DDDM_CIFAR10 to a folder that has it")
    return folder
