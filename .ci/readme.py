#!/usr/bin/env python3
"""Write README.md from nbs/index.ipynb, or with --check say whether README.md is what it gives.

Links to the other notebooks become links into nbs/. A picture images/NAME.png is the figure of the cell that
is tagged `readme-NAME` in some notebook, so that README shows what the notebooks show. (nbdev-readme does the
first part with Quarto; this needs nothing but nbconvert.) NAME.gif is the animation that such a cell shows.
"""

import base64
import pathlib
import re
import sys

import nbformat
from nbconvert import MarkdownExporter

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTE = "<!-- Written from nbs/index.ipynb by .ci/readme.py: edit the notebook, not this file. -->\n\n"


def figure(name: str, kind: str = "png") -> bytes:
    "The picture that the cell tagged readme-NAME shows."
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            if f"readme-{name}" in cell.metadata.get("tags", []):
                mime = f"image/{kind}"
                found = [o.data[mime] for o in cell.outputs if mime in o.get("data", {})]
                if found:
                    return base64.b64decode(found[0])
    raise SystemExit(f"index.ipynb shows images/{name}.{kind}, but no cell tagged readme-{name} has a figure")


def made() -> dict[pathlib.Path, bytes]:
    "What README.md and its pictures should be."
    text, _ = MarkdownExporter().from_notebook_node(nbformat.read(ROOT / "nbs" / "index.ipynb", 4))
    pictures = {
        ROOT / "nbs" / "images" / f"{name}.{kind}": figure(name, kind)
        for name, kind in re.findall(r"\]\(images/([\w-]+)\.(png|gif)\)", text)
    }
    text = re.sub(r"\]\((?!https?:|#|/|\.\.)([^)]+)\)", r"](nbs/\1)", text).replace("](../", "](")
    return {ROOT / "README.md": (NOTE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n").encode(), **pictures}


if __name__ == "__main__":
    for path, content in made().items():
        if "--check" not in sys.argv:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        elif not path.exists() or path.read_bytes() != content:
            raise SystemExit(
                f"{path.relative_to(ROOT)} is not what the notebooks give: run `python .ci/readme.py`"
            )
