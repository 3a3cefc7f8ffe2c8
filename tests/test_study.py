"Studies at a size of seconds: what they measure, what a kill loses (nothing), and what they refuse."

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import dddm.study as study_room
from dddm.data import load
from dddm.extractors import load_extractor, to_bytes
from dddm.presets import preset
from dddm.results import (
    Row,
    course,
    gap_table,
    groups_of,
    load_rows,
    plot_course,
    plot_steps,
    save_rows,
    scores_table,
    select,
    steps_table,
    values,
    write_rows,
)
from dddm.schedule import VPSchedule
from dddm.store import EstimateStore
from dddm.study import Study, Variant, chosen_variants, one_step_samples

TINY = dict(batch=600, net=dict(base=16, attention=(), estimate=(4,)), device="cpu")
NAMES = ["paper", "consistency"]


def tiny(folder, **changes):
    "Two variants, one seed, two numbers of steps, two epochs of three steps."
    fields = dict(
        variants=chosen_variants(names=NAMES), seeds=(0,), epochs=2, n=40, steps=(1, 2), overrides=TINY
    )
    return Study(folder, **{**fields, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A study that ran without a break, and its results."
    study = tiny(tmp_path_factory.mktemp("study") / "runs")
    study.run()
    return study, study.gather(study.out.parent / "results.json", "the command")


def scores_of(rows):
    "The rows but for seconds, which no two runs share."
    return [row for row in rows if row.metric != "training_seconds"]


def test_what_a_study_measures(finished):
    study, found = finished
    lines = {("paper", "iterate"), ("consistency", "iterate"), ("consistency", "renoise")}
    for metric in ("fd", "precision", "recall", "energy", "copied_estimate", "classes"):
        rows = select(found.rows, metric=metric)
        assert {(r.variant, r.sampler, r.steps) for r in rows} == {
            (*line, s) for line in lines for s in (1, 2)
        }
        assert all(r.n == 40 and r.seed == 0 and r.training_step is None for r in rows)
    assert min(values(found.rows, "fd")) > 0
    for name in NAMES:
        assert list(course(found.rows, name)) == list(range(1, 7 if name == "paper" else 5))  # drop_last
        (error,) = values(found.rows, "error_mean", variant=name)
        assert 0.2 < error < 0.4
    (end,) = values(found.rows, "fd", variant="paper", training_step=6)
    assert end == values(found.rows, "fd", variant="paper", steps=1)[0]
    assert found.config["sets"] == {"objectives": NAMES} and found.config["epochs"] == 2
    assert found.config["variants"]["paper"] == {}
    assert found.config["variants"]["consistency"]["level_distribution"] == "rising"
    assert found.provenance["command"] == "the command" and found.provenance["torch"] == torch.__version__


def test_tables_and_figures_take_any_results(finished):
    study, found = finished
    assert [line["variant"] for line in steps_table(found.rows)] == [
        "paper",
        "consistency",
        "consistency + renoise",
    ]
    assert list(steps_table(found.rows)[0]) == ["variant", "1 step", "2 steps"]
    assert list(scores_table(found.rows, {"recall": "reached"}, 1)[0]) == ["variant", "reached"]
    assert len(gap_table(found.rows)) == 2
    groups = groups_of(found.rows, found.config)
    assert groups == {"the estimate leaks": ["paper"], "consistency, rising levels": ["consistency"]}
    for figure in (plot_steps(found.rows, groups, real=0.3), plot_course(found.rows, groups)):
        assert len(figure.axes) == 2
    assert one_step_samples(study, 3)["consistency"].shape == (3, 1, 8, 8)


def test_figures_of_any_variants_and_metrics(finished):
    "Variants of no group share a panel, a line without the metric is left out, a metric of no line refused."
    _, found = finished
    other = [row._replace(variant=f"T = {row.variant}") for row in found.rows]
    for draw in (plot_steps, plot_course):
        (panel,) = draw(other).axes
        assert panel.get_title() == "all variants" and panel.get_legend() is not None
        with pytest.raises(ValueError, match="metric 'fid' is unknown; did you mean 'fd'"):
            draw(found.rows, metric="fid")
    some = [row for row in found.rows if (row.variant, row.metric) != ("paper", "energy")]
    one, empty = plot_steps(some, {"a": NAMES, "b": ["paper"]}, "energy").axes
    assert [text.get_text() for text in one.get_legend().get_texts()] == [
        "consistency",
        "consistency + renoise",
    ]
    assert empty.get_legend() is None


def test_rows_read_back(tmp_path, finished):
    _, found = finished
    save_rows(tmp_path / "new" / "again.json", found.config, found.rows, found.provenance)
    assert load_rows(tmp_path / "new" / "again.json") == found
    (tmp_path / "other.json").write_text(json.dumps(dict(rows=[])))
    with pytest.raises(ValueError, match="is no results file of a study"):
        load_rows(tmp_path / "other.json")
    with pytest.raises(ValueError, match="column 'arm' is unknown"):
        select(found.rows, arm="paper")


class Killed(BaseException):
    "Stands for a kill: nothing catches it."


@pytest.mark.parametrize("function, calls", [("measure", 3), ("measure_gap", 2), ("score", 2)])
def test_a_killed_study_goes_on(tmp_path, monkeypatch, finished, function, calls):
    "Killed while it trains, samples or measures: started again, it has the same numbers."
    own, left = getattr(study_room, function), [calls]

    def killed(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return own(*arguments)

    study, (whole, _) = tiny(tmp_path), finished
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(study_room, function, killed)
        study.run()
    assert not (tmp_path / "consistency-0.json").exists() or function == "measure_gap"
    study.run()
    again, before = (s.gather(tmp_path / "r.json").rows for s in (study, whole))
    assert sorted(map(repr, scores_of(again))) == sorted(map(repr, scores_of(before)))


def test_further_steps_are_measured_on_the_run_that_is_there(tmp_path, finished, monkeypatch):
    whole, found = finished
    longer = replace(whole, steps=(1, 2, 5))
    before = {path: path.stat().st_mtime_ns for path in whole.out.glob("*/checkpoints/*/manifest.json")}

    def refused(*arguments, **more):
        raise AssertionError("trained again")

    monkeypatch.setattr(study_room, "train", refused)
    longer.run()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    more = longer.gather(tmp_path / "more.json").rows
    assert {row.steps for row in select(more) if row.steps} == {1, 2, 5}
    assert set(found.rows) <= set(more)
    assert set(whole.gather(tmp_path / "again.json").rows) == set(
        found.rows
    )  # as asked: two numbers of steps


def test_another_request_is_refused(finished):
    whole, _ = finished
    with pytest.raises(ValueError, match="n: 40 there, 32 here.*choose another `out`"):
        replace(whole, n=32).run()
    with pytest.raises(ValueError, match=r"was made otherwise \(epochs: 2 there, 3 here\)"):
        replace(whole, epochs=3).run()
    with pytest.raises(ValueError, match="tolerance: None there, 2e-06 here"):
        replace(whole, tolerance=2e-6).run()


def test_a_study_with_inception_asks_no_class_scores(tmp_path, monkeypatch):
    "It has two outputs, as our classifiers have, but ImageNet's classes are not those of the data."
    stand_in = replace(load_extractor("digits", device="cpu"), name="inception", named=False)
    monkeypatch.setattr(study_room, "load_extractor", lambda which: stand_in)
    study = tiny(
        tmp_path / "runs", variants=chosen_variants(names=["regression"]), steps=(1,), n=10, tolerance=0.1
    )
    study.run()
    found = study.gather(tmp_path / "results.json")
    metrics = {row.metric for row in found.rows}
    assert {"fd", "copies", "energy"} < metrics and not {"confident", "classes"} & metrics
    assert found.config["tolerance"] == 0.1  # DDIM has none, so its file does not ask for it
    assert json.loads((study.out / "regression-0.json").read_text())["request"]["tolerance"] is None
    assert list(found.config["real"]) == ["fd", "mean_distance", "diversity"]


@pytest.mark.parametrize("n", [1000, 20_000])
def test_real_images_score_what_n_of_them_would(tmp_path, n):
    "The floors are those of the number of samples, also where there are fewer images than that."
    study = tiny(tmp_path / "runs", n=n)
    inputs = study_room.open_inputs(study)
    found = study_room.real_scores(study, inputs)
    x, net = load("digits").get(torch.arange(1797))[0].double(), load_extractor("digits", device="cpu")
    l = np.linalg.eigvalsh(np.cov(net(to_bytes(x)).features.double().numpy(), rowvar=False)).clip(1e-12)
    bracket = 1.25 * l.sum() + 0.5 * sum(a * b / (a + b) for a in l for b in l)
    assert found["fd"] == pytest.approx((1 / n + 1 / 1797) * bracket, rel=1e-3)
    shift = (x.var(0).mean().item() * (1 / n + 1 / 1797)) ** 0.5
    assert found["mean_distance"] == pytest.approx(shift, rel=1e-3)  # images are seen as bytes


def test_files_of_before_a_field_existed_are_read(finished, tmp_path):
    "A field that the configuration got later counts with its default."
    whole, found = finished
    shutil.copytree(whole.out, tmp_path / "old")
    for path in (tmp_path / "old").glob("*.json"):
        kept = json.loads(path.read_text())
        del kept["request"]["config"]["sigma_data"], kept["request"]["tolerance"]
        rows = [Row(*values) for values in kept["rows"]]
        write_rows(path, rows, dict(request=kept["request"]), dict(provenance=kept["provenance"]))
    assert set(replace(whole, out=tmp_path / "old").gather(tmp_path / "again.json").rows) == set(found.rows)


def test_gather_of_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished training"):
        tiny(tmp_path / "empty").gather(tmp_path / "results.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(overrides=dict(level_distribution="uniform")), "which the variants set themselves"),
        (dict(overrides=dict(epochs=1)), "overrides has epochs, which the study sets itself"),
        (dict(overrides=dict(epoch=1)), "did you mean 'epochs'"),
        (dict(steps=(1, 2000)), "steps=2000: the schedule has only T=1000 times"),
        (dict(steps=()), "at least one entry each"),
        (dict(seeds=(0, 0)), "one comes twice"),
        (dict(n=0), "n=0: must be an integer >= 1"),
        (dict(n=3), "n=3: precision and recall need"),
        (dict(extractor="pixels"), "extractor='pixels': a study has the Fréchet distance"),
        (dict(tolerance="small"), "tolerance='small': must be None"),
        (dict(variants=[]), "at least one entry each"),
        (dict(variants=[Variant("a", dict(objectiv="paper"), ("iterate",))]), "did you mean 'objective'"),
        (dict(variants=[Variant("a", {}, ("iterated",))]), "did you mean 'iterate'"),
        (dict(variants=[Variant("a", {}, ())]), "has no sampler"),
        (dict(variants=[Variant("a/b", {}, ("iterate",))]), "its name must do for a file"),
    ],
)
def test_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        tiny(tmp_path / "runs", **changes)


def test_a_missing_file_is_found_before_the_first_training(tmp_path):
    with pytest.raises(FileNotFoundError):
        missing = str(tmp_path / "none.zip")
        tiny(tmp_path / "runs", preset="cifar10-small", data_path=missing, overrides={}).run()
    with pytest.raises(ValueError, match="expected a finite number >= 0"):
        tiny(tmp_path / "runs", variants=chosen_variants("c", c_values=[-1.0])).run()
    assert not (tmp_path / "runs").exists()


def test_sets_of_variants():
    both = chosen_variants(["distance", "c"])
    assert [v.name for v in both if v.sets == ("distance", "c")] == [
        "paper, lpips",
        "paper, pseudo_lpips, c = 0.03",
        "consistency, lpips",
        "consistency, pseudo_lpips, c = 0.03",
    ]
    times = chosen_variants("T", T_values=(100, 200), epochs=1)
    assert [v.name for v in times] == ["T = 100, 1 epochs", "T = 200, 1 epochs", "T = 200, 2 epochs"]
    assert (
        len(chosen_variants("recipe")) == 8 and len({str(v.fields) for v in chosen_variants("recipe")}) == 8
    )
    network = chosen_variants("network", resolution=4)
    assert [v.name for v in network][::4] == ["paper, store, positions", "paper, store, no positions"]
    for with_places, without in zip(network[:4], network[4:]):
        assert without.fields["net"] == dict(estimate=(4,), estimate_positions=False)
        assert with_places.fields == without.fields | dict(net=dict(estimate=(4,), estimate_positions=True))
    read_at = {
        name: chosen_variants("network", name)[0].fields["net"]["estimate"] for name in ("digits", "mnist")
    }
    assert read_at == dict(digits=(8,), mnist=(14,))
    for wrong, message in (
        (dict(sets="network", preset="mnist-one-step"), "reads no estimate"),
        (dict(sets="distances"), "did you mean 'distance'"),
        (dict(names=["papr"]), "did you mean 'paper'"),
        (dict(sets="T", c_values=[1]), "option 'c_values' is unknown"),
        (dict(preset="digit"), "did you mean 'digits'"),
        (dict(sets="c", objectives=["papers"]), "did you mean 'paper'"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen_variants(**wrong)


class Returns(torch.nn.Module):
    "A model that answers with its estimate, whatever x_t."

    schedule = VPSchedule()

    def forward(self, estimate, x_t, t, label=None):
        return estimate


@pytest.mark.parametrize("how", ["store", "truth", "noise"])
def test_the_errors_of_a_copier_are_the_distances_of_its_estimates(how):
    "Fed the truth none; fed another image's or noise, what two independent draws have."
    config = preset("digits", estimate=how)
    images = load("digits")
    every = images.get(torch.arange(len(images)))[0]
    store = EstimateStore(len(images), (1, 8, 8))
    store.write(torch.arange(len(images)), every / 2)
    errors = study_room.gap(Returns(), config, images, store, seed=0)
    variance, square = every.var(0).mean().item(), every.square().mean().item()
    expected = dict(store=square / 4, truth=0.0, noise=1 + square)
    other = dict(store=variance * 5 / 4 + every.mean(0).square().mean().item() / 4, truth=2 * variance)
    assert errors["error_truth"] == 0
    assert errors["error_sampling"] == pytest.approx(1 + square, rel=0.05)
    assert errors["error_training"] == pytest.approx(expected[how], rel=0.05)
    assert errors["error_other"] == pytest.approx(other.get(how, 1 + square), rel=0.08)


def test_every_set_makes_configurations(tmp_path):
    "All variants of all sets, on two presets."
    for base in ("digits", "cifar10"):
        for name in study_room.SETS:
            study = Study(tmp_path, chosen_variants(name, base), base)
            assert all(study.config(variant, 0).objective for variant in study.variants)
            assert len({study.path(variant, 0) for variant in study.variants}) == len(study.variants)


@pytest.mark.parametrize(
    "name",
    "digits digits-more-seeds digits-batch-120 digits-distance-c-T digits-recipe digits-lpips "
    "network-digits network-long network-mnist network-cifar10-small digits-one-step digits-scaling "
    "mnist-scaling mnist-equal-time".split(),
)
def test_committed_results_are_what_the_sets_describe(root, name):
    "The variants' fields in the repository's files are those that the library gives."
    config = load_rows(root / "nbs" / "results" / f"{name}.json").config
    for group, names in config["sets"].items():
        options = dict(epochs=config["epochs"]) if group == "T" else {}
        known = {v.name: v.fields for v in chosen_variants(group, config["preset"], **options)}
        for variant in names:
            fields = json.loads(json.dumps(known[variant]))
            if "net" in fields:
                fields["net"] = {**config["fields"]["net"], **fields["net"]}
            changed = {k: v for k, v in fields.items() if v != config["fields"].get(k)}
            there = dict(config["variants"][variant])
            if group != "T":
                there.pop("epochs", None)  # chosen for equal time
            assert changed == there


def test_a_changed_number_is_noticed(finished, tmp_path):
    study, _ = finished
    kept = json.loads((study.out.parent / "results.json").read_text())
    kept["rows"][0][6] += 1
    changed = tmp_path / "results.json"
    changed.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="does not match its checksum"):
        load_rows(changed)
