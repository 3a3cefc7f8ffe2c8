"""Every notebook runs from top to bottom.

One test a notebook, by nbdev's own runner, each in a process of its own.
"""

import ast
import pathlib
import subprocess
import sys

import nbformat
import pytest

NBS = pathlib.Path(__file__).resolve().parents[1] / "nbs"
JOBS = {
    "train",
    "benchmark",
    "classifiers",
    "evaluate",
    "study",
}  # papermill jobs, minutes each: tests/test_jobs.py runs them, at a small size
RUN = (
    "import sys; from nbdev.test import test_nb; "
    "ok, _ = test_nb(sys.argv[1], skip_flags=['notest'], force_flags=['slow'], basepath=sys.argv[2]); "
    "sys.exit(not ok)"
)


def notebooks(but=()):
    return [pytest.param(p, id=p.stem) for p in sorted(NBS.glob("*.ipynb")) if p.stem not in but]


@pytest.mark.parametrize("path", notebooks(but=JOBS))
def test_runs(path):
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), str(NBS.parent)], cwd=NBS, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{path.name}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"


def shows(source: str) -> bool:
    "Whether a cell prints or shows something at its top level; exported and hidden cells do not count."
    if source.startswith("#|"):
        return False
    calls = [n.value for n in ast.parse(source).body if isinstance(n, ast.Expr)]
    names = {ast.unparse(call.func) for call in calls if isinstance(call, ast.Call)}
    return bool(names & {"print", "display", "show_rows", "plt.show", "show", "Markdown"})


@pytest.mark.parametrize("path", notebooks())
def test_as_committed(path):
    "A notebook is small, carries outputs without errors, no widget state, and no path of a machine."
    text = path.read_text()
    assert len(text) < 300_000, f"{path.name} has {len(text)} bytes; keep outputs under 300 KB"
    nb = nbformat.reads(text, 4)
    nbformat.validate(nb)
    code = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    assert "widgets" not in nb.metadata
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]
    assert not code or any(c.outputs for c in code), f"{path.name} is committed without outputs: run it"
    silent = [c.id for c in code if shows(c.source) and not c.outputs]
    assert not silent, f"{path.name} lacks the outputs of {silent}: run it"
    for place in {str(pathlib.Path.home()), str(NBS.parents[1])} - {"/"}:
        assert f"{place}/" not in text, f"{path.name} names {place}"


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(NBS / f"{name}.ipynb", id=name)
        for name in sorted(JOBS | {"20b_ring", "20c_digits", "21_cifar"})
    ],
)
def test_takes_parameters(path):
    "papermill puts its parameters behind the one cell that has the tag."
    tagged = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0].cell_type == "code"
