"What a module imports: the heavy libraries wait for the function that needs them."

import json
import subprocess
import sys

HEAVY = (
    "torch_fidelity",
    "torchvision",
    "lpips",
    "ipywidgets",
    "IPython",
    "matplotlib",
    "sklearn",
    "papermill",
)


def imported(*steps):
    "Which of the heavy libraries a fresh Python holds after each of `steps`, pieces of code."
    code = f"import json, sys\ndef heavy(): return [name for name in {HEAVY} if name in sys.modules]\n"
    code += "found = []\n"
    code += "".join(f"{step}\nfound.append(heavy())\n" for step in steps) + "print(json.dumps(found))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_modules_bring_nothing_heavy(root):
    modules = sorted(p.stem for p in (root / "dddm").glob("*.py") if not p.stem.startswith("_"))
    found = dict(zip(modules, imported(*(f"import dddm.{m}" for m in modules))))
    assert {"explore", "metrics", "sampling", "training", "zoo"} <= set(modules)
    assert found == {m: [] for m in modules}


def test_a_shipped_model_opens_and_samples_without_widgets_and_figures():
    found = imported(
        "from dddm.zoo import SHIPPED, Pretrained",
        "models = [Pretrained.from_pretrained(name) for name in SHIPPED]",
        "from dddm.sampling import sample\nsample(models[-1], 2, label=[0, 1])",
        "from dddm.explore import StepExplorer\nStepExplorer(models[0], n=2, steps=1).wait()",
    )
    assert found[:3] == [[], [], []] and {"ipywidgets", "matplotlib"} <= set(found[3])


def test_metrics_bring_torch_fidelity_where_it_is_asked():
    found = imported(
        "from dddm.metrics import precision_recall; from dddm.extractors import load_extractor",
        "import torch\nprecision_recall(torch.rand(9, 2), torch.rand(8, 2))",
        "load_extractor('digits')",
    )
    assert found[:2] == [[], []] and "torch_fidelity" in found[2]
