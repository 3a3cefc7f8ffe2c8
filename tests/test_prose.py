"The measure of the notebooks' prose, on a notebook whose figures were counted by hand."

import importlib.util
import json
import pathlib
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / ".ci" / "prose.py"

PROSE = """# A heading is left out
The first sentence has six words. It links to [this page](https://example.org/12/34),
and `two words` of code are one.

- An item ends a sentence
- Of $x_1 + x_2 = 3$ nothing is a number, e.g. here

| a table | 17 |
|---|---|

```
code with 99 words
```

$$1 + 1 = 2$$
"""
# sentences of 6, 11, 5 and 8 words: 30 words, no number

NUMBERS = "In 2024 it took 1,797 images, 3.5 hours and 40% of " + "a " * 20 + "day in notebook 08c."
# one sentence: 11 + 20 + 4 = 35 words, over 30; the numbers 2024, 1,797, 3.5 and 40, but not 08c


def notebook():
    cells = [
        {"cell_type": "markdown", "source": PROSE.splitlines(keepends=True)},
        {"cell_type": "markdown", "source": NUMBERS},
        {
            "cell_type": "code",
            "source": "# code is no prose: 1 2 3\n" + "x = " + "1" * 107 + "\n" + "y" * 110,
        },
    ]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def test_counts_what_a_hand_counts():
    spec = importlib.util.spec_from_file_location("prose", SCRIPT)
    prose = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prose)
    assert [len(prose.words(s)) for s in prose.sentences(PROSE)] == [6, 11, 5, 8]
    assert prose.read(notebook()) == prose.Reading(words=65, sentences=5, long=1, numbers=4, wide=1)


def test_prints_a_line_a_notebook_and_one_for_all(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(notebook()))
    files = sorted(tmp_path.iterdir())
    done = subprocess.run([sys.executable, SCRIPT, *files], capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    figures = ["13.0", "20.0%", "6.2", "1"]  # 65 / 5, 1 of 5, 100 * 4 / 65
    assert rows == [["one", "65", *figures], ["two", "65", *figures], ["all", "2", "130", *figures[:3], "2"]]
