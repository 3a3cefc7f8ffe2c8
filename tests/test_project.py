"""The house.

Settings that mirror each other, a library that is what the notebooks export, a README that is index.ipynb.
"""

import configparser
import importlib
import pathlib
import pkgutil
import re
import subprocess
import sys
import tomllib

import pytest

import dddm

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def settings():
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    return ini["DEFAULT"]


def test_settings_mirror_pyproject(project, settings):
    "nbdev 3 reads pyproject.toml, nbdev 2 settings.ini: a difference would be two projects in one tree."
    meta, nbdev = project["project"], project["tool"]["nbdev"]
    assert settings["version"] == dddm.__version__
    assert f"\nversion: {dddm.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {dddm.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert settings["lib_name"] == meta["name"]
    assert settings["description"] == meta["description"]
    assert settings["min_python"] == meta["requires-python"].removeprefix(">=")
    assert settings["keywords"].split() == [w for k in meta["keywords"] for w in k.split()]
    assert settings["author"] == meta["authors"][0]["name"]
    for key in ("lib_path", "nbs_path", "doc_path", "branch", "title", "tst_flags"):
        assert settings[key] == nbdev[key], key
    assert settings["allowed_cell_metadata_keys"].split() == nbdev["allowed_cell_metadata_keys"]
    assert settings["update_pyproject"] == "False"


def test_readme_is_index():
    made = subprocess.run(
        [sys.executable, ROOT / ".ci" / "readme.py", "--check"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stdout + made.stderr


def test_every_module_comes_from_one_notebook():
    "Each module names the notebook that exports it, and no two notebooks export the same module."
    sources = {}
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        for name in re.findall(r"#\| default_exp (\w+)", path.read_text()):
            assert name not in sources, f"{name} is exported by {sources.get(name)} and {path.name}"
            sources[name] = path.name
    modules = {m.name for m in pkgutil.iter_modules(dddm.__path__)} - {"_modidx"}
    assert modules == set(sources)
    for module, notebook in sources.items():
        assert f"../nbs/{notebook}" in (ROOT / "dddm" / f"{module}.py").read_text(), (
            f"dddm/{module}.py was not exported from {notebook}"
        )


def test_imports_flow_one_way():
    "No notebook imports a module of a later one."
    order = {}
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        for name in re.findall(r"#\| default_exp (\w+)", path.read_text()):
            order[name] = path.name
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        for name in re.findall(r"(?:from|import) dddm\.(\w+)", path.read_text()):
            assert order[name] <= path.name, f"{path.name} imports dddm.{name} of the later {order[name]}"


def test_every_module_imports():
    for module in pkgutil.iter_modules(dddm.__path__):
        importlib.import_module(f"dddm.{module.name}")


def test_the_project_names_no_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    for name in files.stdout.split():
        path = ROOT / name
        if (
            name == "tests/test_project.py"
            or name == "tests/test_notebooks.py"
            or path.suffix in (".safetensors", ".png", ".gif")
            or not path.exists()
        ):
            continue
        text = path.read_text()
        for place in {str(pathlib.Path.home()), str(ROOT.parent)} - {"/"}:
            assert f"{place}/" not in text, f"{name} names {place}"
