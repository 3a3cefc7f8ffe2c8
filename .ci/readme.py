#!/usr/bin/env python3
"""Write README.md from nbs/index.ipynb, or with --check say whether README.md is what it gives.

Cells that begin with `#| hide` are left out; of a code cell only its outputs are kept. Links to the other notebooks
become links into nbs/. (nbdev-readme does the same with Quarto; this needs nothing but nbconvert.)
"""
import pathlib
import re
import sys

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTE = "<!-- Written from nbs/index.ipynb by .ci/readme.py: edit the notebook, not this file. -->\n\n"


def readme() -> str:
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    exporter = MarkdownExporter(config=Config({
        "MarkdownExporter": {"preprocessors": ["nbconvert.preprocessors.RegexRemovePreprocessor"], "exclude_input": True, "exclude_input_prompt": True},
        "RegexRemovePreprocessor": {"patterns": [r"\A#\|\s*hide"]}}))
    text, resources = exporter.from_notebook_node(nb)
    if resources.get("outputs"): raise SystemExit("index.ipynb makes pictures in a cell; save them under nbs/images and link them, so that README.md can show them")
    text = re.sub(r"\]\((?!https?:|#|/|\.\.)([^)]+)\)", r"](nbs/\1)", text).replace("](../", "](")
    return NOTE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    path, text = ROOT / "README.md", readme()
    if "--check" in sys.argv:
        if not path.exists() or path.read_text() != text: raise SystemExit("README.md is not what nbs/index.ipynb gives: run `python .ci/readme.py`")
    else: path.write_text(text)
