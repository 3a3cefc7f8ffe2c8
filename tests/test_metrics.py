"Metrics: independent arithmetic, torch-fidelity's command line, memory, arguments that are refused."

import hashlib
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from scored_images import colour, folder
from torch import nn
from torch_fidelity.metric_prc import prc_features_to_metric

from dddm import metrics
from dddm.data import digits
from dddm.extractors import (
    extract,
    load_extractor,
    statistics,
    to_bytes,
)
from dddm.metrics import (
    bias_constant,
    confident,
    evaluate,
    frechet,
    frechet_bias,
    inception_score,
    mean_shift,
    memorisation,
    nearest,
    pairwise_distance,
    precision_recall,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DDDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def net():
    return load_extractor("digits", device="cpu")


@pytest.fixture(scope="module")
def x():
    data = digits()
    return data.get(torch.randperm(len(data), generator=torch.Generator().manual_seed(0)))[0]


@pytest.mark.parametrize("n, m, D", [(600, 500, 32), (2000, 3000, 100), (20, 25, 32), (40, 5000, 64)])
def test_frechet_is_scipys(n, m, D):
    g = torch.Generator().manual_seed(n)
    mix = torch.randn(D, D, generator=g) / D**0.5
    a, b = ((torch.randn(k, D, generator=g) @ mix + s).relu() for k, s in ((n, 0.0), (m, 0.1)))
    (ma, ca), (mb, cb) = (
        (v.double().mean(0).numpy(), np.cov(v.double().numpy(), rowvar=False)) for v in (a, b)
    )
    root = scipy.linalg.sqrtm(ca @ cb).real
    expected = ((ma - mb) ** 2).sum() + np.trace(ca + cb - 2 * root)
    assert frechet(statistics(a), statistics(b)) == pytest.approx(expected, rel=1e-6)


def test_bias_of_equal_eigenvalues_is_the_textbooks():
    D, n = 50, 1000
    assert frechet_bias(bias_constant(2.0 * np.ones(D)), n) == pytest.approx(
        2 * (D / n + D * (D + 1) / (4 * n))
    )
    assert frechet_bias(bias_constant(np.array([1.0, 0, 0])), 10, 10) == pytest.approx(
        2 / 10 * 1.5
    )  # eigenvalues of zero divide nothing


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_by_brute_force(k):
    rng = np.random.default_rng(k)
    a, b = rng.normal(size=(300, 6)) * 1.5, rng.normal(size=(270, 6))

    def share(x, y):
        inside = 0
        radius = np.sort(np.sqrt(((y[:, None] - y[None]) ** 2).sum(-1)), 1)[:, k]
        for p in x:
            inside += bool((np.sqrt(((p - y) ** 2).sum(-1)) <= radius).any())
        return inside / len(x)

    found = precision_recall(torch.tensor(a).float(), torch.tensor(b).float(), k)
    assert found == pytest.approx((share(a, b), share(b, a)), abs=1e-6)
    assert 0.02 < found[0] < 0.98


def by_library(a, b, k=3):
    found = prc_features_to_metric(
        a, b, prc_neighborhood=k, prc_batch_size=1000, save_cpu_ram=False, verbose=False
    )
    return found["precision"], found["recall"]


@pytest.mark.parametrize("block", [metrics.BLOCK, 10_000, 1])
def test_precision_and_recall_are_torch_fidelitys_in_blocks_of_any_size(net, x, block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    f = extract(x[:1000], net).features
    noise = torch.randn(700, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = extract((x[1000:1700] + 0.2 * noise).clamp(-1, 1), net).features
    for k in (1, 3, 5):
        found = precision_recall(noisy, f, k, device="cpu")
        assert found == by_library(noisy, f, k) and all(0.05 < share < 0.95 for share in found)
    wide = torch.randn(300, 2048, generator=torch.Generator().manual_seed(0)).relu()
    assert precision_recall(wide[:140] * 1.02, wide[140:]) == by_library(wide[:140] * 1.02, wide[140:])


@pytest.mark.parametrize("shift", [0, 100, 10_000])
def test_precision_and_recall_far_from_the_origin_are_those_of_float64(shift):
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(700, 16, generator=g) + shift, 0.9 * torch.randn(600, 16, generator=g) + shift

    def distances(x, y):
        return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")

    balls_a, balls_b = (distances(v, v).kthvalue(4).values for v in (a, b))
    inside, covered = (distances(a, b) <= balls_b).any(1), (distances(b, a) <= balls_a).any(1)
    expected = inside.float().mean().item(), covered.float().mean().item()
    assert precision_recall(a, b) == expected and 0.2 < expected[0] < 0.95
    if shift == 10_000:
        assert by_library(a, b) != expected  # what moving the points is for


def test_precision_and_recall_of_what_does_not_fit():
    for a, b, words in (
        (torch.rand(3, 2), torch.rand(9, 2), "k=3.*3 and 9"),
        (torch.rand(9, 2), torch.rand(9, 3), "N, 3"),
    ):
        with pytest.raises(ValueError, match=words):
            precision_recall(a, b)


def test_inception_score_is_its_formula():
    logits = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)) * 3
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    expected = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert inception_score(logits, 1)[0] == pytest.approx(expected, rel=1e-9)
    order = np.random.RandomState(2020).permutation(500)
    parts = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in np.split(p[order], 10)]
    assert inception_score(logits) == pytest.approx((np.mean(parts), np.std(parts)), rel=1e-9)
    with pytest.raises(ValueError, match="10 splits; there are 9"):
        inception_score(logits[:9])


def test_pixels_mean_and_variance_and_shift(net, x):
    f = extract(x[:500], net, batch_size=77)
    shown = to_bytes(x[:500]).double() / 127.5 - 1
    torch.testing.assert_close(f.mean, shown.mean(0))
    torch.testing.assert_close(f.variance, shown.var(0), atol=1e-7, rtol=1e-5)
    other = extract(x[500:900], net)
    shift, floor = mean_shift(f, other)
    assert shift == pytest.approx(
        (to_bytes(x[:500]).double().mean(0) - to_bytes(x[500:900]).double().mean(0))
        .square()
        .mean()
        .sqrt()
        .item()
        / 127.5
    )
    assert floor == pytest.approx((other.variance.mean().item() * (1 / 500 + 1 / 400)) ** 0.5)


def test_nearest_and_pairwise_distances_by_brute_force():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(60, 5, generator=g), torch.randn(1200, 5, generator=g)
    d = (a[:, None] - b[None]).double().norm(dim=2)
    distance, index = nearest(a, b)
    assert (index == d.argmin(1)).all()
    torch.testing.assert_close(distance, d.amin(1))
    own = torch.arange(60)
    assert (nearest(b[:60], b, own)[1] != own).all() and (nearest(b, b)[0] == 0).all()
    assert pairwise_distance(a) == pytest.approx(
        np.mean([(a[i] - a[j]).norm().item() for i in range(60) for j in range(60) if i != j]), rel=1e-6
    )


def test_inception_path_runs_offline_under_its_own_name(random_inception):
    a, b = colour(12, 0), colour(11, 1)
    with pytest.warns(UserWarning) as seen:
        found = evaluate(
            a,
            b,
            "inception",
            ("fd", "is", "precision"),
            weights=random_inception,
            batch_size=12,
            device="cpu",
        )
    assert list(found) == [
        "FD-inception",
        "IS-inception",
        "precision",
    ]  # FID is the name of the published weights alone
    assert any("is no FID" in str(w.message) for w in seen) and any(
        "12 samples against 11 images in 2048 dimensions" in str(w.message) for w in seen
    )
    r = found["FD-inception"]
    assert (
        r.weights == hashlib.sha256(random_inception.read_bytes()).hexdigest()
        and "299x299" in r.resize
        and (r.n, r.reference_n) == (12, 11)
    )


@pytest.mark.slow
def test_equals_the_command_line_to_the_last_printed_digit(tmp_path, random_inception):
    a, b = folder(tmp_path / "a", colour(40, 0)), folder(tmp_path / "b", colour(44, 1, dark=2))
    command = [
        str(Path(sys.executable).parent / "fidelity"),
        "--cpu",
        "--isc",
        "--fid",
        "--prc",
        "--feature-extractor",
        "inception-v3-compat",
        "--feature-extractor-weights-path",
        str(random_inception),
        "--input1",
        str(a),
        "--input2",
        str(b),
        "--no-cache",
        "--save-cpu-ram",
        "--silent",
        "--batch-size",
        "16",
    ]
    printed = dict(
        line.split(": ")
        for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        r = evaluate(
            a,
            b,
            "inception",
            ("fd", "is", "precision", "recall"),
            weights=random_inception,
            batch_size=16,
            device="cpu",
        )
    ours = {
        "frechet_inception_distance": r["FD-inception"].value,
        "inception_score_mean": r["IS-inception"].value,
        "inception_score_std": r["IS-inception"].spread,
        "precision": r["precision"].value,
        "recall": r["recall"].value,
    }
    assert {k: f"{v:.7g}" for k, v in ours.items()} == {k: printed[k] for k in ours}


def test_arguments_are_checked_first(net, x):
    for options, text in (
        ({"metrics": ()}, "expected some of"),
        ({"metrics": ("fd", "psnr")}, "psnr"),
        ({"reference": None}, "reference is missing"),
        ({"extractor": "nobody"}, "nobody"),
        ({"n": 0}, "n=0"),
        ({"k": 400}, "k=400"),
        ({"batch_size": 0}, "batch_size=0"),
    ):
        with pytest.raises(ValueError, match=text):
            evaluate(**{"generated": x[:300], "reference": x[300:600], **options})
    assert list(evaluate(x[:200], extractor=net, metrics="is")) == ["IS-digits"]


def test_what_cannot_be_measured_fails_before_the_first_sample(net, x):
    "Wrong k, too few images for a metric, an extractor without classes: said before anything is drawn."

    class Plain(nn.Module):
        def forward(self, x):
            return x.flatten(1)

    drawn = []

    def sampler(start, count):
        drawn.append(count)
        return x[:count]

    for wrong, words in (
        (dict(k=0), "k=0"),
        (dict(k=1.5), "k=1.5"),
        (dict(k="3"), "k='3'"),
        (dict(k=500), "generated has 300 images.*need at least 501"),
        (dict(n=3), "need at least 4"),
        (dict(n=1, metrics="fd"), "need at least 2"),
        (dict(n=5, metrics="is"), "need at least 10"),
        (dict(extractor=Plain(), metrics="confident"), "no classes for confident"),
        (dict(extractor=Plain(), metrics="is"), "no classes for is"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(sampler, digits(), **{"extractor": net, "n": 300, **wrong}, progress=False)
    assert drawn == []


def test_confident_and_memorisation(net, x):
    f, g = extract(x[:700], net), extract(x[700:1400], net)
    assert (
        confident(f, 0.9) >= confident(f, 0.99)
        and metrics.class_counts(f).sum() == 700
        and len(metrics.class_counts(f)) == 10
    )
    with pytest.raises(ValueError, match="p=1.5"):
        confident(f, 1.5)
    assert (
        memorisation(f, f).share == 1.0
        and (memorisation(f, f).index == torch.arange(700)).float().mean() > 0.99
    )
    fresh = memorisation(f, g, level=0.2)
    assert 0.1 < fresh.share < 0.3  # the stand-in for held-out images: training images against each other
    with pytest.raises(ValueError, match="level=0"):
        memorisation(f, g, level=0)


@pytest.mark.parametrize("twice", [200, 400])
def test_copies_are_found_among_data_with_duplicates(net, x, twice):
    "Half of the images come twice, or all: who returns them makes copies alone, fresh images are none."
    data = extract(torch.cat([x[:400], x[:twice]]), net)
    copier, fresh = extract(x[:400], net, batch_size=37), extract(x[400:800], net)
    assert memorisation(copier, data).share == 1.0
    once = memorisation(fresh, extract(x[:400], net))
    found = memorisation(fresh, data)
    assert found.share <= once.share + 0.05 and (found.distance / found.limit).isfinite().all()


MEMORY = """
import resource, sys, torch
from dddm import extractors, metrics

torch.set_num_threads(1)
n, D = int(sys.argv[1]), int(sys.argv[2])

class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("w", torch.randn(192, D, generator=torch.Generator().manual_seed(0)) / 14)

    def forward(self, x):
        return (x.flatten(1) @ self.w).relu()

def draw(first):
    def images(start, count):
        g = torch.Generator().manual_seed(first + start)
        return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=g)

    return images

wide = extractors.load_extractor(Wide(), device="cpu")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
start = peak()
options = dict(batch_size=500, progress=False)
reference = extractors.extract(draw(0), wide, n, **options)
metrics.evaluate(draw(10**6), reference, wide, "fd", n=n, **options)
print(start, peak())
"""


def peak_memory(n, D):
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY, str(n), str(D)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return map(int, out.split())


@pytest.mark.skipif(sys.platform == "win32", reason="no peak memory to read")
def test_memory_is_features_and_little_more():
    start, peak = peak_memory(16_000, 512)
    assert (
        peak - start < 2 * 16_000 * 512 * 4 + 250e6
    )  # both sides' features, and blocks and matrices that do not grow with n


@pytest.mark.skipif(sys.platform == "win32", reason="no peak memory to read")
def test_precision_and_recall_hold_a_block_of_distances():
    code = """
import resource, sys, torch
from dddm.metrics import precision_recall
torch.set_num_threads(1)
a, b = torch.randn(2, 12_000, 8)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
precision_recall(a[:50], b[:50], device="cpu")
start = peak()
precision_recall(a, b, device="cpu")
print(peak() - start)
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True
    )
    assert int(run.stdout) < 5 * metrics.BLOCK + 30e6  # all distances would be 576 MB


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no peak memory to read")
def test_50_000_samples_of_2048_features_fit_in_2_GB():
    _, peak = peak_memory(50_000, 2048)
    assert peak < 2e9


def test_the_mean_distance_of_many_rows_does_not_depend_on_their_order():
    "Classes in turn, as samples of a conditional model come: rows at even spacing would be of two classes."
    g = torch.Generator().manual_seed(0)
    label = torch.arange(10_000) % 10
    rows = torch.randn(10_000, 4, generator=g) + 10 * label[:, None]
    exact = (torch.cdist(rows[:5000], rows[:5000]).sum() / (5000 * 4999)).item()
    assert pairwise_distance(rows) == pytest.approx(exact, rel=0.03)
    assert pairwise_distance(rows[label.argsort()]) == pytest.approx(exact, rel=0.03)
