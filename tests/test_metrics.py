"Metrics where a lesson cannot show them: independent arithmetic, torch-fidelity's command line, memory, files that are stale, damaged or of others."

import hashlib
import json
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.metric_prc import prc_features_to_metric

from dddm import extractors, metrics
from dddm.data import Images, digits
from dddm.extractors import (
    Collector,
    extract,
    load_extractor,
    pictures,
    reference_features,
    statistics,
    to_bytes,
)
from dddm.features import network
from dddm.metrics import (
    Result,
    bias_constant,
    check_kind,
    confident,
    evaluate,
    frechet,
    frechet_bias,
    inception_score,
    mean_shift,
    measure,
    memorisation,
    nearest,
    pairwise_distance,
    precision_recall,
)
from dddm.tables import PAPER, TABLE_1, TABLE_2, beside_paper, load_results, mean_std, save_results, table


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


def colour(n, seed, dark=1):
    "Random RGB pictures, uint8 [n, 3, 32, 32], of 4x4 blocks of 8 pixels."
    small = np.random.default_rng(seed).integers(0, 256, (n, 3, 4, 4), np.uint8) // dark
    return torch.from_numpy(small.repeat(8, 2).repeat(8, 3))


def folder(path, pixels):
    path.mkdir(parents=True)
    for i, p in enumerate(pixels):
        Image.fromarray(p.permute(1, 2, 0).numpy().squeeze()).save(path / f"{i:04}.png")
    return path


# arithmetic, computed independently


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


@pytest.mark.parametrize("n, D", [(5, 8), (3000, 96), (20_000, 16)])
def test_statistics_are_torch_fidelitys(n, D):
    f = torch.rand(n, D, generator=torch.Generator().manual_seed(0))
    ours, theirs = statistics(f), fid_features_to_statistics(f)
    assert ours["mu"].dtype == theirs["mu"].dtype and (ours["mu"] == theirs["mu"]).all()
    if n <= extractors.ROWS:
        assert (ours["sigma"] == theirs["sigma"]).all()
    np.testing.assert_allclose(ours["sigma"], theirs["sigma"], atol=1e-14)


def test_bias_of_equal_eigenvalues_is_the_textbooks():
    D, n = 50, 1000
    assert frechet_bias(bias_constant(2.0 * np.eye(D)), n) == pytest.approx(
        2 * (D / n + D * (D + 1) / (4 * n))
    )
    assert frechet_bias(bias_constant(np.diag([1.0, 0, 0])), 10, 10) == pytest.approx(
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


# torch-fidelity's own command line, and Inception without a network


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


def test_published_weights_are_called_fid(random_inception, monkeypatch):
    monkeypatch.setattr(metrics, "sha256", lambda path: "6726825d" + "0" * 56)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_extractor("inception", random_inception).distance == "FID"


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


def test_weights_that_do_not_fit(tmp_path, random_inception):
    (tmp_path / "cut.pth").write_bytes(random_inception.read_bytes()[:10_000])
    with pytest.raises(ValueError, match="cut short"):
        load_extractor("inception", tmp_path / "cut.pth")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit inception"):
        load_extractor("inception", tmp_path / "other.pth")
    (tmp_path / extractors.INCEPTION).write_bytes(b"half a download")
    with pytest.raises(ValueError, match="damaged: its SHA-256"):
        load_extractor("inception", tmp_path / extractors.INCEPTION)
    with pytest.raises(ValueError, match="weights= goes with"):
        load_extractor("digits", tmp_path / "other.pth")
    with pytest.raises(ValueError, match="'lenet' is unknown"):
        load_extractor("lenet")


@pytest.mark.parametrize("which", ["inception", "vgg16"])
def test_no_weights_and_no_network_fails_before_sampling(which, tmp_path, monkeypatch):
    def offline(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    drawn = []
    with pytest.raises(FileNotFoundError, match="cannot be fetched.*Put the file there"):
        evaluate(lambda start, count: drawn.append(count), colour(8, 0), which, n=8)
    assert not drawn


@pytest.mark.slow
def test_vgg16_from_a_file_and_under_its_name(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(torchvision.models.vgg16().state_dict(), tmp_path / "vgg.pth")
    with pytest.warns(UserWarning, match="not the published file.*FD-vgg16"):
        eye = load_extractor("vgg16", tmp_path / "vgg.pth", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate(colour(6, 0), colour(5, 1), eye, ("fd", "precision"), device="cpu")
    assert list(found) == ["FD-vgg16", "precision"] and found["FD-vgg16"].value > 0
    assert extract(colour(6, 0), eye).features.shape == (6, 4096)


# sources


def test_batches_do_not_matter(net, x):
    a, b = extract(x[:300], net, batch_size=300), extract((v for v in x[:300].split(11)), net, batch_size=7)
    torch.testing.assert_close(a.features, b.features, atol=1e-4, rtol=1e-4)
    assert a.data == b.data and a.logits.shape == (300, 10)
    assert extract(x[:299], net).data != a.data and extract(to_bytes(x[:300]), net).data == a.data


def test_a_subset_is_spread_over_the_source():
    rows = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
    assert torch.cat(list(pictures(rows, 10).batches(3)))[:, 0, 0, 0].tolist() == list(range(0, 100, 10))
    with pytest.raises(ValueError, match="n=101: generated has 100 images"):
        pictures(rows, 101)
    with pytest.raises(ValueError, match="n=0"):
        pictures(rows, 0)


def test_bad_sources(net, x, tmp_path):
    with pytest.raises(ValueError, match="ended 3 images short of n=20"):
        extract(iter([x[:17]]), net, 20)
    assert len(extract(iter([x[:17], x[17:34]]), net, 20)) == 20
    with pytest.raises(ValueError, match=r"generated\(64, 36\) gave 35 images"):
        extract(lambda a, c: x[a : min(a + c, 99)], net, 100)
    with pytest.raises(ValueError, match="is a network, not images"):
        extract(network("digits"), net, 10)
    with pytest.raises(ValueError, match="is a list"):
        extract([x], net)
    with pytest.raises(ValueError, match="has no images"):
        extract(x[:0], net)
    with pytest.raises(ValueError, match="at least 2"):
        extract(x[:1], net)
    with pytest.raises(ValueError, match="dtype torch.int64"):
        extract((x[:5] * 8).long(), net)
    broken = x[:100].clone()
    broken[70, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="first in image 6 of a batch of 36"):
        extract(broken, net)
    with pytest.raises(FileNotFoundError):
        evaluate(tmp_path / "nowhere", x)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(ValueError, match="has no images"):
        evaluate(tmp_path / "empty.zip", x)
    damaged = folder(tmp_path / "damaged", to_bytes(x[:9]))
    (damaged / "0004.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="0004.png"):
        evaluate(damaged, x)
    with pytest.raises(ValueError, match="reference \\(3, 32, 32\\), extractor 'digits' \\(1, 8, 8\\)"):
        evaluate(x[:50], colour(9, 0))
    with pytest.raises(ValueError, match="generated: images are \\(1, 9, 9\\)"):
        evaluate(lambda a, c: torch.zeros(c, 1, 9, 9), x, n=20)
    collector = Collector(net, n=4)
    with pytest.raises(ValueError, match="more than the n=4"):
        collector.add(x[:5])


def test_ranges_of_other_conventions_warn(net, x):
    with pytest.warns(UserWarning, match="images in .0, 1. must be brought"):
        extract((x[:50] + 1) / 2, net)
    with pytest.warns(UserWarning, match="brightest pixel is 16 of 255"):
        extract(digits().pixels[:50], net)


def test_modules_of_ones_own(x, cache):
    class Rows(nn.Module):
        def __init__(self, out):
            super().__init__()
            self.out = out

        def forward(self, x):
            return self.out(x)

    flat = load_extractor(Rows(lambda x: x.flatten(1)[:, :5]), name="corner", device="cpu")
    images = digits()
    found = evaluate(x[:300], images, flat, "fd")["FD-corner"]
    assert found.extractor == "corner" and not cache.exists()  # its code may change: nothing is kept on disk
    with pytest.raises(ValueError, match="one row an image"):
        extract(x[:20], load_extractor(Rows(lambda x: x), device="cpu"))
    with pytest.raises(ValueError, match="non-finite features"):
        extract(x[:20], load_extractor(Rows(lambda x: x.flatten(1) / 0), device="cpu"))
    with pytest.raises(ValueError, match="without class scores"):
        measure(extract(x[:20], flat), extract(x[20:40], flat), "confident")
    random, trained = (load_extractor(network("digits", random=r), device="cpu") for r in (0, None))
    assert random.weights != trained.weights and random.shape == (1, 8, 8)
    with pytest.raises(ValueError, match="two extractors: weights"):
        measure(extract(x[:100], random), extract(x[:100], trained))
    with pytest.raises(ValueError, match="made already"):
        load_extractor(flat, name="other")


# the reference's cache


class Counting:
    def __init__(self, extractor):
        self.extractor, self.calls, self.original = extractor, 0, extractor.module.forward

    def __enter__(self):
        self.extractor.module.forward = self.forward
        return self

    def __exit__(self, *_):
        del self.extractor.module.forward

    def forward(self, x):
        self.calls += len(x)
        return self.original(x)


def part(images, rows):
    return Images(images.pixels[rows], None, "part", "", images.levels)


def test_cache_is_used_and_goes_by_content(cache):
    net, data = load_extractor("digits", device="cpu"), digits()
    with Counting(net) as seen:
        a = reference_features(data, net)
        b = reference_features(data, net)
        assert (
            seen.calls == len(data)
            and (a.features == b.features).all()
            and (a.logits == b.logits).all()
            and a.data == b.data
            and (a.mean == b.mean).all()
        )
        assert all(
            (a.statistics[k] == b.statistics[k]).all() and a.statistics[k].dtype == b.statistics[k].dtype
            for k in ("mu", "sigma")
        )
        other = reference_features(part(data, slice(0, 1000)), net)
        assert (
            seen.calls == len(data) + 1000
            and len(list(cache.glob("features-digits-*"))) == 2
            and other.data != a.data
        )
        reference_features(data, net, cache=False)
        assert seen.calls == 2 * len(data) + 1000
    assert not list(cache.glob("*.part"))


def test_stale_damaged_and_foreign_caches(cache, net):
    data = digits()
    good = reference_features(data, net)
    [path] = cache.glob("features-*")
    reference_features(part(data, slice(0, 1000)), net)
    [other] = set(cache.glob("features-*")) - {path}
    whole = path.read_bytes()
    cases = {
        "it is of data": other.read_bytes(),
        "it is damaged": whole[: len(whole) // 2],
        "its checksum is wrong": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        " it is damaged": b"",
    }
    for why, content in cases.items():
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=f"computed again: {why.strip()}"):
            assert (reference_features(data, net).features == good.features).all()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reference_features(data, net)  # whole again
    save_file({"features": torch.zeros(3)}, path)
    for foreign in (path.read_bytes(), b"somebody's notes\n" * 40):
        path.write_bytes(foreign)
        with pytest.raises(ValueError, match="was not written by dddm"):
            reference_features(data, net)
        assert path.read_bytes() == foreign


def test_a_library_of_another_version_is_another_kind(cache, net, monkeypatch):
    data = digits()
    reference_features(data, net)
    a = evaluate(data, data, metrics="fd")["FD-digits"]
    monkeypatch.setattr(metrics, "LIBRARY", "dddm 9")
    reference_features(data, net)
    assert len(list(cache.glob("features-*"))) == 2
    with pytest.raises(ValueError, match="library"):
        check_kind(a, Result(**{**a.__dict__, "library": "dddm 9"}))


def test_a_folder_that_cannot_be_written(tmp_path, net):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="could not be kept"):
        assert len(reference_features(digits(), net, cache=tmp_path / "file")) == 1797


# results


def test_results_travel_and_refuse(tmp_path, net, x):
    runs = {
        f"seed {s}": evaluate(x[:600][s::2], extract(x[600:], net), metrics=("fd", "precision"), seed=s)
        for s in range(2)
    }
    save_results(tmp_path / "deep" / "r.json", runs, run="x", budget=["a", 1])
    assert load_results(tmp_path / "deep" / "r.json") == (runs, {"run": "x", "budget": ["a", 1]})
    rows = table(runs)
    assert [r["run"] for r in rows] == ["seed 0", "seed 1"] and set(rows[0]) == {
        "run",
        "n",
        "extractor",
        "FD-digits",
        "precision",
    }
    a, b = (r["FD-digits"] for r in runs.values())
    assert mean_std([a, b]) == pytest.approx(
        (np.mean([a.value, b.value]), np.std([a.value, b.value], ddof=1))
    )
    assert (
        (a < b) == (a.value < b.value)
        and a - b == a.value - b.value
        and max(a, b).value == max(a.value, b.value)
    )
    for field in metrics.KIND:
        with pytest.raises(ValueError, match=field):
            mean_std([a, Result(**{**b.__dict__, field: 7})])
    with pytest.raises(ValueError, match="seeds"):
        mean_std([a, Result(**{**b.__dict__, "seed": 0})])
    for text in ("{", "[]", json.dumps({"format": "other"})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="bad.json"):
            load_results(tmp_path / "bad.json")


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


def test_keep_nothing_keeps_nothing(tmp_path, cache):
    for i in range(12):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    found = evaluate(tmp_path, tmp_path, "digits", "diversity", cache=False, device="cpu", progress=False)
    assert found["diversity"].value == pytest.approx(1) and not cache.exists()


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


# the paper's tables


def test_the_papers_tables():
    assert (len(TABLE_1), len(TABLE_2)) == (38, 35)
    found = {(r.table, r.method, r.nfe): r for r in PAPER}
    assert len(found) == len(PAPER)
    deep = (
        found[1, "DDDM-deep(T=1000)", 1],
        found[1, "DDDM-deep(T=1000)", 2],
        found[1, "DDDM-deep(T=1000)", 1000],
    )
    assert [r.fid for r in deep] == [2.57, 2.33, 1.79]  # the abstract
    assert [found[2, "DDDM(T=1000)", n].fid for n in (1, 2)] == [4.21, 3.53]  # section 5.3
    assert all(r.inception_score is None for r in TABLE_2) and all(r.precision is None for r in TABLE_1)


def test_measured_numbers_share_a_line_with_the_papers_only_where_they_are_of_its_kind():
    rows = [r for r in TABLE_1 if r.method == "DDDM(T=1000)"]
    kind = dict(reference_n=50_000, reference="ab", extractor="inception", weights="6726825d", resize="")
    same, few, other = (
        Result("FID", 3.1, 50_000, **kind),
        Result("FID", 3.1, 10_000, **kind),
        Result("FD-cifar", 3.1, 50_000, **kind),
    )
    lines = beside_paper(rows, [("DDDM(T=1000)", 1, same, "8 h")])
    assert (
        len(lines) == 6
        and lines[0]["paper"] == "2.90"
        and lines[0]["measured"] == "3.1"
        and lines[0]["budget"] == "8 h"
    )
    for r in (few, other):
        lines = beside_paper(rows, [("DDDM(T=1000)", 1, r, "8 h")])
        assert (
            len(lines) == 7
            and lines[-1]["paper"] == ""
            and lines[0]["measured"] == ""
            and lines[-1]["n"] == f"{r.n:,}"
        )


# memory

MEMORY = """
import resource, sys, torch
from dddm import metrics, extractors
torch.set_num_threads(1)
n, D = int(sys.argv[1]), int(sys.argv[2])
class Wide(torch.nn.Module):
    def __init__(self): super().__init__(); self.register_buffer("w", torch.randn(192, D, generator=torch.Generator().manual_seed(0)) / 14)
    def forward(self, x): return (x.flatten(1) @ self.w).relu()
wide = extractors.load_extractor(Wide(), device="cpu")
def draw(first): return lambda start, count: torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(first + start))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
start = peak()
metrics.evaluate(draw(10**6), extractors.extract(draw(0), wide, n, batch_size=500, progress=False), wide, "fd", n=n, batch_size=500, progress=False)
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
