#!/usr/bin/env python3
"""Print how the notebooks read: `python .ci/prose.py [FILES] [--at REV]`.

One line a notebook and one for all: words, words a sentence, the share of sentences over 30 words, numbers in
100 words, code lines over 110 columns. Prose is what Markdown cells say outside headings, tables, code blocks
and displayed formulas; of a link its text. Formulas and code inside a sentence are one word each, and no
number. A paragraph or a list item ends a sentence. FILES: notebooks, by default nbs/*.ipynb. With --at, as
the commit REV has them.
"""

import argparse
import json
import pathlib
import re
import subprocess
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
LONG, WIDTH = 30, 110
LEFT_OUT = r"```.*?(?:```|\Z)|\$\$.*?\$\$|\\begin\{(\w+\*?)\}.*?\\end\{\1\}|<!--.*?-->|<[^<>\n]+>"
ITEM = r"\n\s*(?:[-*+]|\d+[.)])\s+"  # the mark that opens a list item
ABBREVIATION = r"\b(?:e\.g|i\.e|et al|vs|cf|Fig|eq)\."


class Reading(NamedTuple):
    words: int = 0
    sentences: int = 0
    long: int = 0  # sentences over LONG words
    numbers: int = 0
    wide: int = 0  # code lines over WIDTH columns

    def row(self, name: str) -> str:
        per_sentence, share = self.words / max(1, self.sentences), 100 * self.long / max(1, self.sentences)
        numbers = 100 * self.numbers / max(1, self.words)
        return f"{name:28s} {self.words:7d} {per_sentence:8.1f} {share:7.1f}% {numbers:8.1f} {self.wide:6d}"


def sentences(markdown: str) -> list[str]:
    "The sentences of one Markdown cell."
    text = re.sub(LEFT_OUT, "\n\n", markdown, flags=re.S)
    text = re.sub(r"(?m)^\s*(?:#+ |\||[-=]{3,}$).*$", "\n", text)  # headings, tables, rules
    text = re.sub(r"``[^`]+``|`[^`]+`|\$[^$\n]+\$", "code", text)
    text = re.sub(r"!?\[([^\[\]]*)\]\([^()\s]*(?:\([^()]*\))?[^()]*\)", r"\1", text)
    text = re.sub(r"(?m)^\s*>+ ?", "", text)
    text = re.sub(ITEM, "\n\n", "\n" + text)
    text = re.sub(ABBREVIATION, lambda m: m[0].replace(".", ""), text)
    blocks = re.split(r"\n\s*\n", text)
    found = [s for block in blocks for s in re.split(r"(?<=[.!?])[\"'”’)\]*_]*\s+", block)]
    return [s for s in found if words(s)]


def words(sentence: str) -> list[str]:
    return [w for w in sentence.split() if re.search(r"[^\W_]", w)]


def read(notebook: dict) -> Reading:
    "Count one notebook, given as its JSON."
    cells = [(c["cell_type"], "".join(c["source"])) for c in notebook["cells"]]
    found = [s for kind, text in cells if kind == "markdown" for s in sentences(text)]
    lengths = [len(words(s)) for s in found]
    numbers = sum(len(re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*(?!\w)", s)) for s in found)
    lines = [line for kind, text in cells if kind == "code" for line in text.splitlines()]
    wide = sum(len(line) > WIDTH for line in lines)
    return Reading(sum(lengths), len(lengths), sum(n > LONG for n in lengths), numbers, wide)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=pathlib.Path)
    parser.add_argument("--at", metavar="REV", help="measure a commit's notebooks")
    given = parser.parse_args()
    if given.at:
        listed = [f"nbs/{path.name}" for path in given.files]
        names = listed or git("ls-tree", "--name-only", given.at, "nbs/").splitlines()
        texts = {n[4:-6]: git("show", f"{given.at}:{n}") for n in names if n.endswith(".ipynb")}
    else:
        files = given.files or sorted((ROOT / "nbs").glob("*.ipynb"))
        texts = {path.stem: path.read_text() for path in files}
    print(f"{'notebook':28s} {'words':>7s} {'a sent.':>8s} {'over 30':>8s} {'no./100':>8s} {'wide':>6s}")
    readings = {name: read(json.loads(text)) for name, text in texts.items()}
    for name, reading in readings.items():
        print(reading.row(name))
    print(Reading(*map(sum, zip(*readings.values()))).row(f"all {len(readings)}"))


if __name__ == "__main__":
    main()
