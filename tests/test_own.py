"Images of one's own, as a user has them: trained on, sampled in the shell, evaluated, resumed."

import json
import os
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dddm.evaluation import open_evaluation
from dddm.metrics import energy_distance, evaluate
from dddm.presets import main, own_images, own_network
from dddm.runs import history, read_config
from dddm.tables import load_results
from dddm.unet import UNet

COLOURS = {"disc": (220, 60, 40), "square": (40, 160, 60), "triangle": (50, 80, 220)}


def draw(kind, seed, size=(32, 32)):
    "A shape in its colour, somewhere on white."
    image, rng = Image.new("RGB", size, "white"), np.random.default_rng(seed)
    x, y = rng.integers(2, 10, 2).tolist()
    side = int(rng.integers(14, 20))
    brush, box = ImageDraw.Draw(image), (x, y, x + side, y + side)
    if kind == "disc":
        brush.ellipse(box, fill=COLOURS[kind])
    elif kind == "square":
        brush.rectangle(box, fill=COLOURS[kind])
    else:
        brush.polygon([(x, y + side), (x + side, y + side), (x + side / 2, y)], fill=COLOURS[kind])
    return image


def shapes(root, each=14, size=(32, 32), mode="RGB"):
    for kind in COLOURS:
        (root / kind).mkdir(parents=True)
        for i in range(each):
            draw(kind, i, size).convert(mode).save(root / kind / f"{i:02}.png")
    return root


def start(arguments, root, cwd):
    "A command of a user in the folder `cwd`."
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True
    )


def papermill(notebook, output, parameters, root, cwd):
    job = ["papermill", root / "nbs" / notebook, output, "-y", "{" + parameters + "}", "--no-progress-bar"]
    done = start(job, root, cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = [c for c in nbformat.read(output, 4).cells if c.cell_type == "code"]
    return "\n".join(o.text for c in cells for o in c.outputs if o.output_type == "stream")


def test_a_folder_is_trained_sampled_evaluated_and_resumed(root, tmp_path, pixel_cache):
    """Started where the folder lies, sampled and evaluated from elsewhere, resumed with another spelling.

    The distance is that of the pixels: nothing is downloaded, and no network of other images judges.
    """
    for rare in sorted((shapes(tmp_path / "pictures") / "disc").iterdir())[4:]:
        rare.unlink()
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    small = "net: {base: 8}, sample_every: 0, device: cpu"
    parameters = f"preset: own, data: pictures, size: 8, out: {out}, overrides: {{epochs: 2, {small}}}"
    text = papermill("train.ipynb", tmp_path / "out.ipynb", parameters, root, tmp_path)
    assert "pictures: 32 images, shape (3, 8, 8) resized to size=8; 3 classes" in text
    assert "classes: 3: disc (4), square (14), triangle (14)" in text and "starts at step 0 of 2" in text
    config = read_config(out)
    assert (config.data, config.classes, config.batch) == (str((tmp_path / "pictures").resolve()), 3, 32)

    done = start(["dddm.zoo", out, "--n", "6", "--label", "2", "--out", "grid.png"], root, elsewhere)
    assert done.returncode == 0, done.stderr
    assert "6 images of 8x8, class 2, 1 step by meanflow, seed 0: a grid in grid.png" in done.stdout
    assert np.asarray(Image.open(elsewhere / "grid.png")).std() > 0

    parameters = f"run: {out}, n: 12, steps: [1, 2], seeds: [0, 1], device: cpu"
    text = papermill("evaluate.ipynb", tmp_path / "eval.ipynb", parameters, root, elsewhere)
    assert "extractor pixels" in text and "run: lowest energy distance" in text
    found, about = load_results(out / "evaluation" / "results.json")
    scored = found["run, 1 steps, seed 1"]
    assert set(scored) == {"energy distance", "diversity", "mean shift", "copies"}
    assert scored["energy distance"].reference_n == 32 and about["real"]["spread"] > 0

    [subject] = open_evaluation([out], [1], 12, [0], device="cpu").subjects
    assert subject.classes_of(torch.arange(64)).bincount().tolist() == [8, 28, 28]

    parameters = f"preset: own, data: ../pictures/, size: 8, out: {out}, overrides: {{epochs: 3, {small}}}"
    text = papermill("train.ipynb", tmp_path / "again.ipynb", parameters, root, elsewhere)
    assert "resumes at step 2 of 3" in text and history(out)[-1]["step"] == 3


def test_what_images_say_becomes_the_configuration(tmp_path, pixel_cache, capsys):
    folder = shapes(tmp_path / "grey", mode="L")
    config = own_images(folder, lr=1e-4, net=dict(blocks=2))
    assert (config.shape, config.classes, config.resize, config.lr) == ((1, 32, 32), 3, False, 1e-4)
    assert (config.net["blocks"], config.net["base"], config.net["estimate"]) == (2, 32, ())
    assert (config.epochs, config.objective, config.drop_last) == (3000, "meanflow", True)
    assert own_images(folder, size=16).shape == (1, 16, 16)
    (folder / "disc" / "bad.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="1 of .* images .* skipped"):
        assert own_images(folder, size=16, on_error="skip").shape == (1, 16, 16)
    (folder / "disc" / "bad.png").unlink()
    draw("disc", 99).save(folder / "square" / "zz.png")  # one in colour, among the last
    assert own_images(folder, size=16, classes=None).shape == (3, 16, 16)
    capsys.readouterr()
    main(["own", "--set", f"data={folder}", "--set", "size=8", "--set", "batch=20"])
    written = json.loads(capsys.readouterr().out)
    assert (written["shape"], written["batch"], written["epochs"]) == ([3, 8, 8], 20, 1500)
    for side in (4, 8, 12, 20, 28, 36, 64, 100, 128):  # the network can be built
        with torch.device("meta"):
            UNet((3, side, side), estimate=(), **own_network(side))


def test_what_cannot_be_used_is_refused_with_what_can(tmp_path, pixel_cache):
    wide = shapes(tmp_path / "wide", each=4, size=(48, 36))
    for arguments, words in (
        (dict(data=wide), "the images are 48x36.*such as size=36"),
        (dict(data=wide, size=30), "size=30: must be a multiple of 4, such as 28"),
        (dict(data=wide, size="32"), "size='32': must be an integer"),
        (dict(data=None), "data=None: must be the path"),
        (dict(data=wide, shape=(3, 8, 8)), "shape=.*follows from data and size"),
        (dict(data=wide, size=32, epoch=3), "did you mean 'epochs'"),
        (dict(data=wide / "disc", size=32), "has 4 images; a training needs at least 10"),
    ):
        with pytest.raises(ValueError, match=words):
            own_images(**arguments)
    with pytest.raises(FileNotFoundError, match="neither a path that exists"):
        own_images(tmp_path / "nowhere", size=32)
    draw("disc", 0).save(wide / "disc" / "small.png")
    with pytest.raises(ValueError, match="small.png is 32x32 where 48x36 is expected.*give a size"):
        own_images(wide)


def test_pixels_are_scored_by_their_energy_distance():
    x, y = (torch.rand(n, 1, 5, 5, generator=torch.Generator().manual_seed(n)) * 2 - 1 for n in (30, 40))
    y = ((y + 1) * 127.5).round().to(torch.uint8)
    found = evaluate(x, y, "pixels", ("energy", "diversity"), cache=False, progress=False)
    seen = ((x + 1) * 127.5).round() / 127.5 - 1
    assert found["energy distance"].value == pytest.approx(energy_distance(seen, y / 127.5 - 1), abs=1e-5)
    with pytest.raises(ValueError, match="no Fréchet distance; take the metric 'energy'"):
        evaluate(x, y, "pixels", cache=False)
