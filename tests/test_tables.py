"Tables: files that are no results, results of several kinds, the paper's own numbers."

import json

import numpy as np
import pytest
import torch

from dddm import metrics
from dddm.data import digits
from dddm.extractors import (
    extract,
    load_extractor,
)
from dddm.metrics import (
    Result,
    evaluate,
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


def test_no_line_of_the_paper_and_no_seed_is_lost():
    "Both tables have DDDM(T=1000), on other data; a second seed has a line of its own."
    assert len(beside_paper(PAPER, [])) == len(beside_paper(TABLE_1, [])) + len(beside_paper(TABLE_2, []))
    kind = dict(reference_n=50_000, reference="ab", extractor="inception", weights="6726825d", resize="")
    seeds = [
        ("DDDM(T=1000)", 1, Result("FID", v, 50_000, seed=s, **kind), f"seed {s}")
        for s, v in enumerate((3.1, 3.3))
    ]
    for rows, shared in ((TABLE_1, 1), (PAPER, 0)):
        lines = [line for line in beside_paper(rows, seeds) if line["measured"]]
        assert [line["measured"] for line in lines] == ["3.1", "3.3"]
        assert sum(line["paper"] != "" for line in lines) == shared


def test_a_line_says_all_numbers_of_samples_and_extractors():
    kind = dict(reference_n=50_000, reference="ab", resize="")
    found = dict(
        FID=Result("FID", 3.1, 50_000, extractor="inception", weights="6726825d", **kind),
        precision=Result("precision", 0.7, 10_000, extractor="digits", weights="aaaaaaaa", **kind),
    )
    (line,) = table({"a": found})
    assert (line["n"], line["extractor"]) == ("50,000, 10,000", "inception 6726825d, digits aaaaaaaa")
