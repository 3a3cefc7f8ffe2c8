"Models as folders: what ships, what an export holds, damage, kills, and a stand-in for the Hugging Face Hub."

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import hub_mixin
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

from dddm import config, presets, runs, training, zoo
from dddm.explore import StepExplorer
from dddm.sampling import sample
from dddm.store import without_checksum
from dddm.zoo import SHIPPED, Pretrained, portable

FILES = {"config.json", "model.safetensors", "README.md"}


def small_config(**fields):
    small = dict(epochs=1, batch=600, checkpoint_every=3, sample_every=0, device="cpu")
    return presets.preset("digits", **{**small, "net": dict(base=16, attention=[], estimate=[4]), **fields})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of three steps."
    return training.train(small_config(), tmp_path_factory.mktemp("runs") / "short", progress=False)


@pytest.fixture
def folder(run, tmp_path):
    "Its export."
    Pretrained.from_pretrained(run).save_pretrained(tmp_path / "model", description="short", command="a test")
    return tmp_path / "model"


def about(folder):
    return json.loads((folder / "config.json").read_text())


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# What ships


def test_shipped_models_are_the_pinned_ones():
    assert {p.name for p in zoo.WEIGHTS.iterdir() if p.is_dir()} == set(SHIPPED)
    total = 0
    for name, pinned in SHIPPED.items():
        blob = (zoo.WEIGHTS / name / "model.safetensors").read_bytes()
        assert hashlib.sha256(blob).hexdigest() == pinned == about(zoo.WEIGHTS / name)["sha256"]
        total += len(blob)
        model = Pretrained.from_pretrained(name)
        assert model.command.startswith("papermill nbs/train.ipynb") and model.description
        assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert total < 6e6


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_folders_are_what_saving_writes(name, tmp_path):
    "Weights, configuration and card: a change of the code that would leave one of them stale is noticed."
    Pretrained.from_pretrained(name).save_pretrained(tmp_path / name)
    assert content(tmp_path / name) == content(zoo.WEIGHTS / name)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_code_on_a_card_runs(name):
    code = (zoo.WEIGHTS / name / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope = {}
    exec(code.replace("PATH", str(zoo.WEIGHTS / name)), scope)
    assert scope["images"].shape == (10, *about(zoo.WEIGHTS / name)["config"]["shape"])


def test_a_damaged_or_missing_shipped_model_is_named(tmp_path, monkeypatch):
    name = next(iter(SHIPPED))
    shipped = zoo.WEIGHTS / name
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="config.json is missing: install dddm again"):
        Pretrained.from_pretrained(name)
    shutil.copytree(shipped, tmp_path / name)
    path = tmp_path / name / "model.safetensors"
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    with pytest.raises(
        ValueError, match="model.safetensors is damaged: its sha256 is .*: install dddm again"
    ):
        Pretrained.from_pretrained(name)
    assert "dddm-wrong" in StepExplorer(name, steps=2).wait().rows[0].frame.html.value
    path.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing: install dddm again"):
        Pretrained.from_pretrained(name)
    shutil.rmtree(tmp_path / name)
    shutil.copytree(shipped.with_name("mnist-one-step"), tmp_path / name)
    with pytest.raises(ValueError, match="not the model that belongs to this version"):
        Pretrained.from_pretrained(name)


# What the shell draws


def test_the_shell_draws_a_grid_or_a_folder(run, folder, tmp_path, capsys):
    "Of a shipped model, a run and an export; each image is the one that `sample` gives."
    for source in ("digits-paper", str(run), str(folder)):
        zoo.main([source, "--n", "4", "--out", str(tmp_path / "grid.png")])
        assert "4 images of 8x8, 1 step by iterate, seed 0: a grid in" in capsys.readouterr().out
        assert Image.open(tmp_path / "grid.png").size == (2 * 48 + 18, 2 * 48 + 18)
    arguments = ["mnist-one-step", "--n", "3", "--steps", "2", "--label", "7", "--seed", "5"]
    zoo.main([*arguments, "--out", str(tmp_path / "sevens")])
    assert sorted(p.name for p in (tmp_path / "sevens").iterdir()) == [f"{i:06}.png" for i in range(3)]
    expected = sample(Pretrained.from_pretrained("mnist-one-step"), 3, 2, seed=5, label=7)
    drawn = [
        torch.tensor(np.asarray(Image.open(p)).flatten()) for p in sorted((tmp_path / "sevens").iterdir())
    ]
    assert torch.equal(torch.stack(drawn), ((expected.flatten(1) + 1) * 127.5).round().byte())
    for refused, words in (
        ([*arguments, "--out", str(tmp_path / "sevens")], "sevens: holds other files"),
        ([*arguments, "--out", str(tmp_path / "x.jpg")], "must end in .png"),
        ([*arguments, "--out", str(tmp_path / "no" / "x.png")], "there is no folder"),
        (["mnist-one-step", "--label", "10", "--out", str(tmp_path / "x.png")], "classes are 0..9"),
        (["digits-paper", "--label", "1", "--out", str(tmp_path / "x.png")], "model is unconditional"),
        (["digits-paper", "--n", "0", "--out", str(tmp_path / "x.png")], "n=0: must be"),
        (["digits-papr", "--out", str(tmp_path / "x.png")], "the shipped ones are"),
        (["--out", str(tmp_path / "x.png")], "--out needs a model"),
    ):
        with pytest.raises(SystemExit):
            zoo.main(refused)
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists() and not list(tmp_path.glob(".*"))


# What an export holds


def test_export_keeps_what_a_run_is(run, tmp_path, capsys):
    folder = tmp_path / "new" / "model"
    zoo.main([str(run), str(folder), "--description", "short", "--command", "a test"])
    assert capsys.readouterr().out.strip() == runs.sha256(folder / "model.safetensors")
    model, of_the_run = Pretrained.from_pretrained(folder), runs.read_config(run).to_dict()
    assert about(folder)["config"] == {k: v for k, v in of_the_run.items() if k not in config.MACHINE}
    assert (model.description, model.command, model.config.data) == ("short", "a test", "digits")
    assert set(content(folder)) == FILES and "# short\n" in (folder / "README.md").read_text()
    exact = runs.load(run)
    for a, b in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(a, b.half().float())
    for a, b in zip(Pretrained.from_pretrained(run).parameters(), exact.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_command_line_lists_and_refuses(run, tmp_path, capsys):
    zoo.main([])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in listed] == list(SHIPPED)
    wanted = ["--description", "", "--command", ""]
    for arguments, words in (
        ([str(run)], "give FOLDER, --description and --command; to draw images --out"),
        ([str(run), str(tmp_path / "x"), "--command", ""], "give FOLDER"),
        ([str(tmp_path), str(tmp_path / "x"), *wanted], "is an empty directory"),
        ([str(run.parent), str(tmp_path / "x"), *wanted], "no config.json"),
        ([str(run), str(run), *wanted], "is no exported model"),
    ):
        with pytest.raises(SystemExit):
            zoo.main(arguments)
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_export_keeps_no_path(tmp_path):
    "Of a folder of images the name is left, of the store's file nothing; and the model opens."
    images = tmp_path / "private" / "digits"  # a name that is also a built-in one's
    (images / "a").mkdir(parents=True)
    for i in range(8):
        Image.new("L", (8, 8), 30 * i).save(images / "a" / f"{i}.png")
    store = tmp_path / "private" / "store.bin"
    weights = str(tmp_path / "private" / "vgg16.pth")
    fields = dict(data=str(images), store_path=str(store), batch=8)
    run = training.train(small_config(**fields), tmp_path / "run", progress=False)
    Pretrained.from_pretrained(run).save_pretrained(tmp_path / "model", command="a test")
    assert not any(b"private" in c for c in content(tmp_path / "model").values())
    fields = about(tmp_path / "model")["config"]
    assert fields["data"] == "folder digits" and fields["store_path"] is None
    model = Pretrained.from_pretrained(tmp_path / "model")
    assert model.shape == (1, 8, 8) and model.config.data != "digits"
    model.save_pretrained(tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "model")
    options = dict(distance="lpips", distance_options=dict(net="vgg", resize=32, weights=weights))
    assert "private" not in str(portable(small_config(**options)))


@pytest.mark.parametrize("objective", ["paper", "regression", "improved_consistency"])
def test_a_pretrained_model_answers_like_what_it_was_made_of(objective, tmp_path):
    "Also where the network is scaled to the boundary, or sees zeros in place of the estimate."
    fields = small_config(objective=objective)
    model = config.build(fields).eval()
    for p in model.parameters():
        p.data = p.data.half().float() + 1e-2  # zero layers, too, have an effect
        p.data = p.data.half().float()
    pretrained = Pretrained(model, fields)
    pretrained.save_pretrained(tmp_path / "model")
    opened = Pretrained.from_pretrained(tmp_path / "model")
    expected = sample(model, 2, 2, clamp=False)
    for other in (pretrained, opened):
        assert other.sampler == model.sampler and other.schedule.T == model.schedule.T
        assert torch.equal(sample(other, 2, 2, clamp=False), expected)


def test_a_sampler_that_was_set_is_kept(tmp_path):
    pretrained = Pretrained(config.build(small_config()).eval(), small_config())
    pretrained.sampler = "ddim"
    pretrained.save_pretrained(tmp_path / "model")
    assert Pretrained.from_pretrained(tmp_path / "model").sampler == "ddim"


# Whole or not at all


def test_an_export_takes_the_place_of_an_export_alone(run, folder, tmp_path):
    model = Pretrained.from_pretrained("mnist-one-step")
    model.save_pretrained(folder)
    assert about(folder)["sha256"] == SHIPPED["mnist-one-step"]
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    assert content(tmp_path / "empty") == content(folder)
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    for place, words in (
        (folder, "holds other files, too .notes.txt."),
        (tmp_path / "file", "exists and is no exported model"),
        (tmp_path / "other", "exists and is no exported model"),
        (run, "exists and is no exported model"),
    ):
        with pytest.raises(FileExistsError, match=words):
            model.save_pretrained(place)
    assert (folder / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "model", "other"]


def test_a_failure_while_writing_leaves_the_export_that_was(folder, monkeypatch):
    before, model = content(folder), Pretrained.from_pretrained("mnist-one-step")
    for name in ("model_card", "fsync"):
        with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
            patched.setattr(zoo, name, lambda *_: (_ for _ in ()).throw(OSError("disk full")))
            model.save_pretrained(folder)
        assert content(folder) == before and [p.name for p in folder.parent.iterdir()] == ["model"]
    real = os.rename

    def rename(source, target):
        if str(source).endswith(".part"):
            raise OSError("disk full")
        real(source, target)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
        patched.setattr(zoo.os, "rename", rename)
        model.save_pretrained(folder)
    assert content(folder) == before and [p.name for p in folder.parent.iterdir()] == ["model"]


CUT = """
import os, sys
from dddm import zoo
zoo.fsync = lambda path: os.kill(os.getpid(), 9)
zoo.Pretrained.from_pretrained("digits-paper").save_pretrained(sys.argv[1])
"""


def test_a_kill_while_writing_leaves_the_export_that_was(folder):
    before = content(folder)
    for place in (folder, folder.with_name("new")):
        assert subprocess.run([sys.executable, "-c", CUT, str(place)]).returncode == -signal.SIGKILL
    assert content(folder) == before and not folder.with_name("new").exists()
    Pretrained.from_pretrained("digits-paper").save_pretrained(folder)
    assert about(folder)["sha256"] == SHIPPED["digits-paper"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_others_may_read_an_export(run, tmp_path):
    before = os.umask(0o022)
    try:
        Pretrained.from_pretrained(run).save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in (tmp_path / "model").iterdir()}
    assert set(modes.values()) == {"0o644"} and (tmp_path / "model").stat().st_mode & 0o777 == 0o755


# Damage, and what is no model


def test_a_damaged_config_is_named(folder):
    path, sealed = folder / "config.json", about(folder)
    said = without_checksum(sealed)
    for wrong, words in (
        (json.dumps({**sealed, "command": "another"}), "does not match its checksum"),
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[]", "not written by Pretrained.save_pretrained"),
        (json.dumps({**said, "format": "dddm-model-9"}), "not written by Pretrained.save_pretrained"),
        (json.dumps({**said, "config": None}), "does not say the model's config"),
        (json.dumps({**said, "description": 1}), "does not say the model's description"),
        (json.dumps({k: v for k, v in said.items() if k != "sha256"}), "does not say the model's sha256"),
        (json.dumps({**said, "config": {"epoch": 1}}), "its configuration is none .*epoch"),
    ):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=f"model.config.json .*{words}"):
            Pretrained.from_pretrained(folder)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="config.json is damaged"):
        Pretrained.from_pretrained(folder)


def test_damaged_weights_are_named(folder):
    path, said = folder / "model.safetensors", without_checksum(about(folder))
    tensors = load_file(path)
    blob = path.read_bytes()
    path.write_bytes(blob[:-1])
    with pytest.raises(ValueError, match="model.safetensors is damaged: its sha256 is"):
        Pretrained.from_pretrained(folder)
    save_file(dict(list(tensors.items())[1:]), path)  # whole, and of another network
    for other in (path.read_bytes(), b"no safetensors"):
        path.write_bytes(other)
        sha256 = hashlib.sha256(other).hexdigest()
        (folder / "config.json").write_text(json.dumps({**said, "sha256": sha256}))
        with pytest.raises(ValueError, match="model.safetensors is damaged: its weights are of another"):
            Pretrained.from_pretrained(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        Pretrained.from_pretrained(folder)


def test_what_is_no_model_is_named(folder, tmp_path):
    for source, words in (
        (
            zoo.WEIGHTS / "features-digits.safetensors",
            "is a file, and a model is a folder .* export its run again",
        ),
        (tmp_path / "nothing", "the shipped ones are digits-paper"),
        ("digit-paper", "the shipped ones are digits-paper"),
        (str(tmp_path.parent / "no" / "such" / "model"), "the shipped ones are digits-paper"),
        (tmp_path, "no config.json"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=words):
            Pretrained.from_pretrained(source)


# The Hub, by a stand-in


def test_a_repository_of_the_hub_is_downloaded_and_checked(folder, tmp_path, monkeypatch):
    asked = []

    def download(repository, **options):
        asked.append((repository, options))
        return str(folder)

    monkeypatch.setattr(zoo, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    opened = Pretrained.from_pretrained("someone/digits", revision="v1")
    assert opened.description == "short"
    assert asked == [
        ("someone/digits", dict(revision="v1", allow_patterns=["config.json", "model.safetensors"]))
    ]
    (folder / "model.safetensors").write_bytes(b"swapped")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        Pretrained.from_pretrained("someone/digits")
    (tmp_path / "runs").mkdir()  # so this is a path with a typing error, and nobody asks the network
    with pytest.raises(FileNotFoundError, match="neither a run directory"):
        Pretrained.from_pretrained("runs/digts")
    assert len(asked) == 2


def test_without_a_network_the_error_says_what_was_tried(monkeypatch):
    def download(repository, **options):
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(zoo, "snapshot_download", download)
    with pytest.raises(
        FileNotFoundError, match="^someone/digits is neither a folder .*give it .no connection.$"
    ):
        Pretrained.from_pretrained("someone/digits")


def test_push_to_hub_uploads_the_folder(folder, tmp_path, monkeypatch):
    class Hub:
        def __init__(self, **options):
            pass

        def create_repo(self, repo_id, **options):
            return type("Repo", (), dict(repo_id=repo_id))

        def upload_folder(self, *, repo_id, folder_path, **options):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(hub_mixin, "HfApi", Hub)
    assert Pretrained.from_pretrained(folder).push_to_hub("someone/digits") == "https://hub/someone/digits"
    assert content(tmp_path / "hub" / "someone" / "digits") == content(folder)
