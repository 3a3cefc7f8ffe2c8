"Extractors: weights that do not fit, sources that end early, caches that are stale, damaged or of others."

import warnings
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from scored_images import colour, folder
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics

from dddm import extractors
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
    check_kind,
    evaluate,
    measure,
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


@pytest.mark.parametrize("n, D", [(5, 8), (3000, 96), (20_000, 16)])
def test_statistics_are_torch_fidelitys(n, D):
    f = torch.rand(n, D, generator=torch.Generator().manual_seed(0))
    ours, theirs = statistics(f), fid_features_to_statistics(f)
    assert ours["mu"].dtype == theirs["mu"].dtype and (ours["mu"] == theirs["mu"]).all()
    if n <= extractors.ROWS:
        assert (ours["sigma"] == theirs["sigma"]).all()
    np.testing.assert_allclose(ours["sigma"], theirs["sigma"], atol=1e-14)


def test_published_weights_are_called_fid(random_inception, monkeypatch):
    monkeypatch.setattr(extractors, "sha256", lambda path: "6726825d" + "0" * 56)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_extractor("inception", random_inception).distance == "FID"


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
    monkeypatch.setattr(extractors, "LIBRARY", "dddm 9")
    reference_features(data, net)
    assert len(list(cache.glob("features-*"))) == 2
    with pytest.raises(ValueError, match="library"):
        check_kind(a, Result(**{**a.__dict__, "library": "dddm 9"}))


def test_a_folder_that_cannot_be_written(tmp_path, net):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="could not be kept"):
        assert len(reference_features(digits(), net, cache=tmp_path / "file")) == 1797


def test_keep_nothing_keeps_nothing(tmp_path, cache):
    for i in range(12):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    found = evaluate(tmp_path, tmp_path, "digits", "diversity", cache=False, device="cpu", progress=False)
    assert found["diversity"].value == pytest.approx(1) and not cache.exists()
