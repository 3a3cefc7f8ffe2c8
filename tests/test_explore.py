"""The explorer's widgets: memory, figures, bad input without a browser; and JupyterLab with a real one.

The browser is driven through its DevTools protocol.
"""

import base64
import contextlib
import gc
import io
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from small_models import Halving, halving, random_model

from dddm import explore, presets, runs, training, trajectories
from dddm.data import digits
from dddm.model import DDDM
from dddm.sampling import sample
from dddm.schedule import VPSchedule

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def wait_for(what, check, seconds=120):
    "The first true answer of `check`; fails naming `what` when there is none in time."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := check():
            return answer
        time.sleep(0.2)
    pytest.fail(f"waited {seconds} s for {what}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of three steps."
    settings = presets.preset(
        "digits",
        epochs=1,
        batch=600,
        checkpoint_every=3,
        sample_every=0,
        device="cpu",
        net=dict(base=16, attention=[], estimate=[4]),
    )
    return training.train(settings, tmp_path_factory.mktemp("runs") / "short", progress=False)


def told(explorer, row=0):
    "What the page says in the frame of a row, or in the only one: the sentence and the picture are one text."
    return (explorer.rows[row] if hasattr(explorer, "rows") else explorer).frame.html.value


@pytest.mark.slow
def test_a_model_of_few_steps_is_shown_by_its_own_sampler():
    """A model that re-noises ends at 100 steps on a slider that goes to 1,000, and the text says so.

    Then a model that iterates goes to the end again.
    """
    explorer = explore.StepExplorer(random_model("improved_consistency"), n=4).wait()
    assert (
        explorer.trajectory.model.sampler == "renoise"
        and explorer.progress.value == explorer.progress.max == 100
    )
    explorer.step.value = 5
    assert "after 5 steps of re-noising: an image is" in told(
        explorer
    ) and "from the one after 4, on average" in told(explorer)
    for _, step in explorer.step.options:  # whatever the slider offers up to 100 is there
        explorer.step.value = step
        assert "being computed" not in told(explorer) and (
            step > 100 or f" after {step:,} step" in told(explorer)
        )
    explorer.step.value = 1000
    assert "after 100 steps" in told(explorer) and "This sampler is shown up to 100 steps." in told(explorer)
    explorer.rows[0].model.value = "digits-paper"
    explorer.wait()
    assert (
        "after 1,000 steps: the last one moved" in told(explorer)
        and explorer.progress.value == explorer.progress.max == 1000
    )
    explorer.close()


def test_more_images_than_memory_allows():
    model = halving()
    each = trajectories.Trajectory(model, 1).nbytes
    assert trajectories.Trajectory(model, 10, memory=10 * each).nbytes == 10 * each
    with pytest.raises(ValueError, match="at most 9 fit"):
        trajectories.Trajectory(model, 10, memory=10 * each - 1)
    explorer = explore.StepExplorer(model, n=10, memory=10 * each - 1).wait()
    assert "at most 9 fit" in told(explorer) and explorer.trajectory is None
    explorer.n.value = 9
    assert "dddm-message" in told(explorer.wait()) and explorer.trajectory.n == 9


def test_kept_trajectories_stay_within_the_bound():
    model = halving()
    explorer = explore.StepExplorer(
        model, n=4, steps=10, memory=3.5 * trajectories.Trajectory(model, 4, steps=10).nbytes
    )
    first = explorer.wait().trajectory
    for seed in (1, 2, 3):
        explorer.seed.value = seed
        explorer.wait()
    assert [key[1] for key in explorer.cache] == [1, 2, 3]
    explorer.seed.value = 1
    explorer.wait()
    explorer.seed.value = 4
    explorer.wait()
    assert [key[1] for key in explorer.cache] == [3, 1, 4]  # the one used last was kept
    explorer.seed.value = 0
    assert torch.equal(explorer.wait().trajectory.frames, first.frames)


def figures():
    "How many matplotlib figures are alive."
    from matplotlib.figure import Figure

    gc.collect()
    return sum(type(o) is Figure for o in gc.get_objects())


def test_what_is_kept_are_numbers_not_figures():
    """A figure of the curves takes megabytes: however many seeds are kept, one is alive.

    And a model that many trajectories share is kept, and counted, once.
    """
    explorer, before = explore.StepExplorer("digits-paper", n=1, steps=2, runs=()).wait(), figures()
    for seed in range(1, 6):
        explorer.seed.value = seed
        explorer.wait()
    assert figures() == before
    kept = [t for t, _ in explorer.cache.values()]
    assert len(kept) == 6
    model = kept[0].model
    assert all(t.model is model for t in kept)
    weights = sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
    assert weights > 1e6 and explore.kept_bytes(kept + kept) == weights + sum(
        t.frames.nbytes + 3 * t.x_T.nbytes + t.moved.nbytes for t in kept
    )
    explorer.memory = explore.kept_bytes(kept)  # full: the next one makes room
    explorer.seed.value = 9
    explorer.wait()
    assert [key[1] for key in explorer.cache] == [1, 2, 3, 4, 5, 9]
    explorer.close()


# Several models


def test_rows_of_mnist_start_from_the_same_noise(monkeypatch):
    """MeanFlow and the paper's objective, 28x28, told the classes: a row is what `sample` makes of the seed.

    The number in a frame is that of its picture, also where a row ends before the slider does.
    """
    monkeypatch.setitem(trajectories.LONGEST, "meanflow", 10)
    models = random_model("meanflow"), random_model("paper")
    explorer = explore.StepExplorer(*models, n=4, seed=3, steps=20).wait()
    flow, iterated = (row.trajectory for row in explorer.rows)
    assert torch.equal(flow.x_T, iterated.x_T) and flow.frames.shape[2:] == (1, 28, 28)
    assert (flow.steps[-1], iterated.steps[-1], explorer.progress.value) == (10, 20, 30)
    label = torch.arange(4)
    for t, model in zip((flow, iterated), models):
        for s, x in sample(model, 4, (1, 2, 10), seed=3, label=label).items():
            assert (t.samples(s) - x).abs().max() < 1 / 255 + 1e-4
    explorer.step.value = 5
    assert "after 5 steps along the flow: an image is" in told(explorer, 0)
    assert "after 5 steps: the last one moved an image by" in told(explorer, 1)
    explorer.step.value = 20
    assert "after 10 steps along the flow" in told(explorer, 0)
    assert "This sampler is shown up to 10 steps." in told(explorer, 0)
    assert "after 20 steps" in told(explorer, 1) and "shown up to" not in told(explorer, 1)
    explorer.label.value = 7
    assert (explorer.wait().trajectory.label == 7).all() and len(explorer.cache) == 4
    explorer.close()


def test_rows_keep_in_step_and_the_page_keeps_its_height():
    "While two models of unequal speed are computed neither is ahead, and no frame changes its height."
    explorer = explore.StepExplorer(halving(seconds=0.01), halving(seconds=0.03), n=2, steps=60)
    frames = [*(row.frame for row in explorer.rows), explorer.curves]
    heights, ahead = [frame.html.layout.height for frame in frames], []
    explorer.step.value = 60
    while explorer.thread.is_alive():
        with explorer.lock:
            done = [row.trajectory.done for row in explorer.rows if row.trajectory]
            said = [told(explorer, k) for k in range(2)]
        ahead += [abs(done[0] - done[1])] if len(done) == 2 else []
        assert all("after 60 step" in text or "computed" in text for text in said if "after" in text)
        time.sleep(0.02)
    assert max(ahead) <= 2 and [frame.html.layout.height for frame in frames] == heights
    assert all(frame.html.layout.height for frame in frames)
    assert "data:image/png" in explorer.curves.html.value
    explorer.close()


def test_a_broken_model_leaves_the_other_row_alone(tmp_path):
    explorer = explore.StepExplorer(halving(), tmp_path, n=2, steps=5, runs=()).wait()
    assert "dddm-wrong" in told(explorer, 1) and "empty directory" in told(explorer, 1)
    assert "after 1 step:" in told(explorer, 0) and "data:image/png" in explorer.curves.html.value
    explorer.rows[1].model.value = None
    explorer.wait()
    assert explorer.rows[1].frame.html.layout.display == "none" and len(explorer.cache) == 1
    explorer.close()


# The widget


def test_only_what_was_asked_for_last_is_shown():
    explorer = explore.StepExplorer(halving(seconds=0.002), n=2, steps=500)
    for seed in range(1, 6):
        explorer.seed.value = seed
    assert (
        list(explorer.wait().cache) == [(explorer.rows[0].model.value, 5, 2, None)]
        and explorer.trajectory.done == 500
    )
    assert torch.equal(explorer.trajectory.x_T, trajectories.Trajectory(halving(), 2, 5).x_T)
    explorer.close()


def test_a_number_typed_beside_the_slider_becomes_the_nearest_kept_step():
    explorer = explore.StepExplorer(halving(), n=2, steps=200).wait()
    explorer.go_to.value = 57
    kept = trajectories.log_steps(200)
    assert explorer.step.value == explorer.go_to.value == min(
        kept, key=lambda s: abs(s - 57)
    ) and f"after {explorer.step.value} steps" in told(explorer)
    explorer.step.value = 5
    assert explorer.go_to.value == 5
    explorer.close()


def test_while_computing_the_last_computed_step_is_drawn():
    explorer = explore.StepExplorer(halving(seconds=0.02), n=2, steps=200)
    explorer.step.value = 200
    wait_for("a step", lambda: "is being computed" in told(explorer), 20)
    assert 0 < explorer.progress.value < 200 and "data:image/png;base64," in told(explorer)
    assert "when all steps are computed" in explorer.curves.html.value
    assert "after 200 steps" in told(explorer.wait()) and explorer.progress.value == 200
    explorer.close()


@pytest.mark.parametrize("model, n", [("digits-paper", 16), (DDDM(Halving((3, 32, 32)), VPSchedule()), 64)])
def test_a_redraw_takes_less_than_a_tenth_of_a_second(model, n):
    explorer, times = explore.StepExplorer(model, n=n, steps=20).wait(), []
    for s in 2 * trajectories.log_steps(20):
        began = time.perf_counter()
        explorer.step.value = s
        times.append(time.perf_counter() - began)
    assert min(times[:20]) < 0.1 and sorted(times)[len(times) // 4] < 0.1  # quartile: the machine may be busy


def everything(box):
    "A widget and all that it holds."
    return {box}.union(*(everything(child) for child in getattr(box, "children", ())))


def test_a_notebook_shows_the_box_and_figures_without_pyplot():
    explorer = explore.StepExplorer(halving(), n=2, steps=3).wait()
    shown = explorer._repr_mimebundle_()
    assert shown["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.box.model_id
    assert shown["text/plain"].startswith("StepExplorer: run this cell")
    assert {explorer.step, explorer.rows[0].frame.html} <= everything(explorer.box)
    explorer.close()
    for figure, size in (
        (trajectories.new_figure(2, 1), (160, 80)),
        (explore.distance_figure(100, 0.1), (640, 312)),
    ):
        with Image.open(io.BytesIO(figure._repr_png_())) as picture:
            assert picture.size == size


def test_python_ends_while_a_trajectory_is_computed():
    code = "from dddm import explore\nexplore.StepExplorer()\nprint('made')"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "made\n", "")


def test_runs_are_found_and_opened(run):
    explorer = explore.StepExplorer(runs=(run.parent, run.parent.parent / "nowhere"), n=2, steps=3).wait()
    assert str(run) in [value for _, value in explorer.rows[0].model.options]
    explorer.rows[0].model.value = str(run)
    assert torch.equal(
        explorer.wait().trajectory.frames, trajectories.Trajectory(runs.load(run), 2, steps=3).run().frames
    )
    assert explore.StepExplorer(run, n=2, steps=3, runs=()).wait().trajectory is not None


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: [p.unlink() for p in folder.rglob("*") if p.is_file()], "no config.json"),
        (lambda folder: shutil.rmtree(folder / "checkpoints"), "no checkpoint yet"),
        (lambda folder: [p.write_bytes(b"") for p in folder.rglob("ema.safetensors")], "damaged"),
        (
            lambda folder: (folder / "config.json").write_text(
                json.dumps(runs.read_config(folder).to_dict()).replace('"base": 16', '"base": 32')
            ),
            "are of another network",
        ),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "config.json is not the configuration of a run (Expecting property name",
        ),
        (
            lambda folder: (
                shutil.copytree(next(folder.glob("checkpoints/*")), folder / "checkpoints" / "step-1.bak")
                and shutil.rmtree(next(folder.glob("checkpoints/step-*[0-9]")))
            ),
            "no checkpoint yet",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:checkpoint")
def test_a_broken_run_is_a_message(run, tmp_path, damage, message):
    shutil.copytree(run, tmp_path / "run")
    damage(tmp_path / "run")
    explorer = explore.StepExplorer(tmp_path / "run", n=2, steps=3).wait()
    assert "dddm-wrong" in told(explorer) and message in told(explorer)
    explorer.rows[0].model.value = "digits-paper"  # and the reader goes on
    assert "dddm-message" in told(explorer.wait())


def test_images_of_another_shape_are_a_message():
    explorer = explore.StepExplorer(halving(shape=(3, 16, 16)), n=2, steps=3, data=digits()).wait()
    assert (
        "(1, 8, 8)" in told(explorer) and "(3, 16, 16)" in told(explorer) and "dddm-wrong" in told(explorer)
    )
    for shape in (None, (2,), (2, 8, 8)):
        assert "dddm-wrong" in told(explore.StepExplorer(halving(shape=shape), n=2, steps=3).wait())


def test_an_output_that_is_not_finite_is_a_message():
    model = halving()
    with torch.no_grad():
        model.net.w.fill_(float("nan"))
    assert "RuntimeError: the model&#x27;s output at step 1" in told(
        explore.StepExplorer(model, n=2, steps=3).wait()
    )


def test_points_of_another_dimension_are_a_message():
    from dddm.pfode import GaussianMixture

    explorer = explore.MixtureExplorer(
        GaussianMixture(torch.zeros(1, 2), [1.0], [1.0]),
        {"pictures": halving(), "points": halving(shape=(2,))},
        n=5,
        steps=10,
    )
    assert "dddm-wrong" in told(explorer)
    explorer.model.value = "points"
    assert "dddm-message" in told(explorer) and "data:image/png;base64," in told(explorer)
    explorer.n.value = -3
    assert "n=-3" in told(explorer)


def test_points_of_a_model_that_walks_down_the_schedule():
    "Its numbers of steps are runs of their own, up to 100, and the curve has a value at each of them."
    from dddm.pfode import GaussianMixture

    mixture, model = GaussianMixture(torch.zeros(1, 2), [1.0], [1.0]), halving(shape=(2,))
    model.sampler = "ddim"
    explorer = explore.MixtureExplorer(mixture, {"points": model}, n=5)
    at, moved = explorer.trajectory.moves()
    assert at[-1] == 100 and np.isfinite(moved).all() and len(moved) == len(at)
    explorer.step.value = 1000
    assert "after 100 steps" in told(explorer) and "up to 100 steps" in told(explorer)
    with pytest.raises(ValueError, match="run.. it first"):
        trajectories.Trajectory(model, 5).moves()


# A browser


class Page:
    "One page of a headless Chromium, through the DevTools protocol."

    def __init__(self, folder, url, size=(1200, 1100)):
        import websocket

        self.ids, self.log = itertools.count(1), []
        self.process = subprocess.Popen(
            [
                BROWSER,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--remote-debugging-port=0",
                "--remote-allow-origins=*",
                f"--user-data-dir={folder}",
                f"--window-size={size[0]},{size[1]}",
                "--hide-scrollbars",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port = wait_for(
            "the browser",
            lambda: (
                (folder / "DevToolsActivePort").exists()
                and (folder / "DevToolsActivePort").read_text().split()
            ),
        )[0]
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        self.socket = websocket.create_connection(
            next(p["webSocketDebuggerUrl"] for p in pages if p["type"] == "page"), timeout=600
        )
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)

    def call(self, method, **params):
        number = next(self.ids)
        self.socket.send(json.dumps(dict(id=number, method=method, params=params)))
        while (answer := json.loads(self.socket.recv())).get("id") != number:
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.log.append(answer["params"])
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def js(self, code):
        "The value of a JavaScript expression, promises awaited."
        result = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{code}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def box(self, element):
        "[x, y, width, height] of an element, given as JavaScript."
        return self.js(f"(r => [r.x, r.y, r.width, r.height])(({element}).getBoundingClientRect())")

    def shot(self, path=None, box=None):
        "A screenshot, whole or of a box, as uint8 [height, width, 3]; also written to `path`."
        clip = (
            {} if box is None else dict(clip=dict(x=box[0], y=box[1], width=box[2], height=box[3], scale=1))
        )
        blob = base64.b64decode(self.call("Page.captureScreenshot", format="png", **clip)["data"])
        if path:
            path.write_bytes(blob)
        return np.asarray(Image.open(io.BytesIO(blob)).convert("RGB"))

    def mouse(self, kind, x, y):
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def drag(self, element, dx, moves=12):
        "Drag the middle of an element by dx pixels."
        x, y, w, h = self.box(element)
        x, y = x + w / 2, y + h / 2
        self.mouse("mouseMoved", x, y)
        self.mouse("mousePressed", x, y)
        for i in range(1, moves + 1):
            self.mouse("mouseMoved", x + dx * i / moves, y)
        self.mouse("mouseReleased", x + dx, y)

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=dict(ArrowLeft=37, ArrowRight=39)[key],
            )


@contextlib.contextmanager
def server(app, folder):
    "A Jupyter server of its own on a loopback port; yields its address and token."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    where = {f"JUPYTER_{k}_DIR": str(folder / k) for k in ("CONFIG", "DATA", "RUNTIME")}
    quiet = folder / "CONFIG" / "labconfig"
    quiet.mkdir(parents=True)
    (quiet / "page_config.json").write_text(
        json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}})
    )
    command = [
        sys.executable,
        "-m",
        app,
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--IdentityProvider.token=explore",
        f"--ServerApp.root_dir={folder}",
        "--expose-app-in-browser",
    ]
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **where, "MPLBACKEND": ""},
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def up():
        if process.poll() is not None:
            pytest.fail((folder / "server.log").read_text()[-3000:])
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token=explore").status == 200

    try:
        wait_for(app, up)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


PANEL = "[...jupyterapp.shell.widgets('main')].find(w => w.sessionContext)"


def cell(containing):
    "JavaScript: the number of the cell whose source has these words."
    has = f"c => c.model.sharedModel.source.includes({json.dumps(containing)})"
    return f"{PANEL}.content.widgets.findIndex({has})"


@pytest.mark.slow
@pytest.mark.skipif(
    BROWSER is None,
    reason="no chromium, chromium-browser or google-chrome on the PATH: apt-get install chromium",
)
@pytest.mark.parametrize("app, path", [("jupyterlab", "lab/tree"), ("notebook", "notebooks")])
@pytest.mark.parametrize("name", ["play", "others"])
def test_slider_in_a_browser(root, tmp_path, name, app, path):
    "Run All; drag the slider, press its arrow keys: the picture changes, and nothing shows an error."
    pytest.importorskip("websocket")
    pytest.importorskip(app, reason=f"{app} is not installed")
    (tmp_path / "nbs").mkdir()
    shutil.copy(root / "nbs" / "play.ipynb", tmp_path / "nbs")
    cells = [nbformat.v4.new_code_cell(source) for source in OTHERS]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3"))
    others = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    nbformat.write(others, tmp_path / "nbs" / "others.ipynb")
    with server(app, tmp_path) as address:
        page = Page(tmp_path / "browser", f"{address}/{path}/nbs/{name}.ipynb?token=explore")
        try:
            run_all(page)
            drive(page, name, tmp_path, arrows=app == "jupyterlab")
            assert page.js(ERRORS) == [] and page.js(STDERR) == 0 and page.js(BROKEN) == 0
        finally:
            page.shot(tmp_path / "last.png")
            page.close()


OTHERS = (  # a notebook of the other two sliders
    """import torch
from dddm.explore import DistanceExplorer, MixtureExplorer
from dddm.model import DDDM
from dddm.schedule import VPSchedule
from dddm.toy import RingNet, eight_gaussians
ring, model = eight_gaussians(), DDDM(RingNet(generator=torch.Generator().manual_seed(0)), VPSchedule())""",
    "MixtureExplorer(ring, dict(random=model), n=50, steps=100)",
    "DistanceExplorer()",
)
OUTPUTS = f"""{PANEL}.content.widgets
    .filter(c => c.model.type === 'code').flatMap(c => c.model.sharedModel.outputs)"""
ERRORS = f"""{OUTPUTS}.filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue)"""
STDERR = """document.querySelectorAll(
    '.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]').length"""
BROKEN = """[...document.querySelectorAll('.jp-OutputArea-output')]
    .filter(o => /Error displaying widget|Loading widget/.test(o.textContent)).length"""


class Widget:
    "The explorer that the cell with these words shows, on a page."

    def __init__(self, page, name, source):
        self.page, self.name, number = page, name, page.js(cell(source))
        self.node = f"{PANEL}.content.widgets[{number}].node"
        self.picture = f"{self.node}.querySelector('.widget-html img')"
        self.box = f"{self.node}.querySelector('.jp-OutputArea-output .widget-vbox')"
        self.message = f"[...{self.node}.querySelectorAll('.dddm-message')].map(e => e.textContent).join(' ')"
        self.handle = f"{self.node}.querySelector('.noUi-handle')"
        there = f"nb.activeCellIndex = {number}; nb.scrollToItem({number}, 'start')"
        page.js(f"(nb => {{ {there} }})({PANEL}.content)")
        wait_for("the widget", lambda: page.js(f"{self.picture}?.width > 100"))
        page.js(f"{self.box}.scrollIntoView()")
        self.seen = [self.look()]

    def still(self):
        before = self.page.box(self.box)
        time.sleep(0.5)
        return before[2] > 100 and self.page.box(self.box) == before and before

    def look(self):
        """The picture and the message beside it, once it has stayed in its place.

        JupyterLab moves cells about for a while.
        """
        box = wait_for(f"{self.name}: a picture that stays in its place", self.still)
        return self.page.shot(box=box), self.page.js(self.message)

    def other(self):
        "Whether picture and message are others than those seen last."
        (shot, words), (last, before) = self.look(), self.seen[-1]
        if words == before or shot.shape == last.shape and (shot == last).all():
            return False
        self.seen.append((shot, words))
        return True

    def changed(self, what):
        wait_for(f"{self.name}: another picture after {what}", self.other, 30)

    def type(self, text):
        "Type into the last field for a number."
        fields = f"{self.node}.querySelectorAll('.widget-text input[type=number]')"
        send = "for (const e of ['input', 'change']) f.dispatchEvent(new Event(e, {bubbles: true}))"
        self.page.js(f"(f => {{ f.focus(); f.value = '{text}'; {send} }})([...{fields}].at(-1))")

    def menu(self, number):
        return f"{self.node}.querySelectorAll('select')[{number}]"

    def pick(self, number, option):
        "Choose an option of a menu."
        send = "s.dispatchEvent(new Event('change', {bubbles: true}))"
        self.page.js(f"(s => {{ s.selectedIndex = {option}; {send} }})({self.menu(number)})")

    def drawn(self):
        "Wait until every frame has its picture: all steps are computed, and the curves are there."
        frames, images = (f"{self.box}.querySelectorAll('{what}').length" for what in (".widget-html", "img"))
        wait_for("all pictures", lambda: self.page.js(f"{frames} === {images}"), 400)

    def keeps_its_height(self, seconds=2):
        "Whether the box is as high as it was, whenever it is looked at for a while."
        height, end = self.page.box(self.box)[3], time.monotonic() + seconds
        while time.monotonic() < end:
            if self.page.box(self.box)[3] != height:
                return False
        return True


def run_all(page):
    "Run all cells of the notebook on a page."
    wait_for(
        "the notebook",
        lambda: page.js(f"typeof jupyterapp !== 'undefined' && !!{PANEL}?.content?.widgets?.length"),
    )
    wait_for("a kernel", lambda: page.js(f"{PANEL}.sessionContext.session?.kernel?.status === 'idle'"))
    page.js(f"jupyterapp.shell.activateById({PANEL}.id)")
    page.js("jupyterapp.commands.execute('notebook:run-all-cells').then(() => 1)")
    assert page.js(ERRORS) == []


WIDGETS = {  # notebook: a name of a widget, words of its cell, pixels to drag
    "play": [("step", "StepExplorer(", (-100, 120))],
    "others": [("plane", "MixtureExplorer(ring", (250,)), ("panel", "DistanceExplorer()", (-100,))],
}


def drive(page, notebook, folder, arrows):
    "Move what there is to move."
    for name, source, moves in WIDGETS[notebook]:
        widget = Widget(page, name, source)
        for dx in moves:
            page.drag(widget.handle, dx)
            widget.changed(f"a drag by {dx} pixels")
        widget.drawn()
        page.shot(folder / f"{name}.png", page.box(widget.box))
        page.js(f"{widget.handle}.focus()")
        for key in ("ArrowLeft", "ArrowRight") if arrows else ():  # Notebook 7 does not let them through
            page.key(key)
            widget.changed(key)
        if name != "panel":
            widget.type("3")
            assert widget.keeps_its_height()
            widget.changed("a number in the field")
        if name == "step":
            choose_models(page, widget, folder)
        assert page.js(f"{widget.node}.querySelectorAll('.dddm-wrong').length") == 0


def choose_models(page, widget, folder):
    """The second row's model has classes, so their menu is there. The first row's first model has none.

    The third model is re-noised, and says so.
    """
    classes = "the classes", lambda: page.js(f"{widget.menu(0)}.options.length") == 11
    wait_for(*classes)
    widget.pick(0, 4)
    assert widget.keeps_its_height()
    widget.changed("a class")
    page.shot(folder / "class.png")
    widget.pick(1, 2)
    wait_for("the words on its sampler", lambda: "of re-noising" in page.js(widget.message))
    widget.drawn()
    widget.changed("another model")
    wait_for(*classes)
    assert page.js(f"{widget.menu(0)}.selectedIndex") == 4  # the class that was chosen stays
    page.shot(folder / "few.png")
