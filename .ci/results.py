#!/usr/bin/env python3
"""Print the README's results tables, made from nbs/results/evaluate-*.json: what nbs/evaluate.ipynb left as results.json of named runs.

They stand in nbs/index.ipynb between two comments, `<!-- results -->` and `<!-- /results -->`. With --write they are put there (then
.ci/readme.py carries them into README.md); with --check it says whether they are there.
"""
import json
import pathlib
import sys

from dddm.metrics import check_kind, load_results, markdown, mean_std

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = (1, 2, 5, 20, 100, 1000)
COLUMNS = ("precision", "recall", "diversity", "mean shift", "confident", "copies")
BEGIN, END = "<!-- results -->\n", "\n<!-- /results -->"


def number(results: list) -> str:
    "Mean ± standard deviation over seeds, or the one number there is."
    mean, std = mean_std(results) if len(results) > 1 else (results[0].value, None)
    digits = 3 if mean < 1 else 1
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def section(path: pathlib.Path) -> str:
    "What one evaluation says: a table for each of its runs, under a line with the circumstances."
    found, about = load_results(path)
    some, parts = next(iter(found.values())), []
    columns = [about["distance"], *(c for c in COLUMNS if c in some)]
    for name, subject in about["subjects"].items():
        rows, seeds = [], {}
        for steps in STEPS:
            here = [found[label] for label, cell in about["cells"].items() if (cell["run"], cell["steps"]) == (name, steps)]
            if not here: continue
            for c in columns: check_kind(here[0][c], some[c])
            rows.append({"steps": steps, **{c: number([r[c] for r in here]) for c in columns}})
            seeds[steps] = len(here)
        rows.append({"steps": "noise", **{c: number([found["noise"][c]]) if c in found["noise"] else "" for c in columns}})
        rows.append({"steps": "real images, expected", **{c: "" if some[c].floor is None else f"{some[c].floor:.3g}" for c in columns}})
        r, real = some[about["distance"]], about["real"]
        most = max(seeds.values(), default=1)
        fewer = [f"{s} at {k} steps" for k, s in seeds.items() if s < most]
        parts.append(f"**{name}** (objective {subject['objective']}, sampler {subject['sampler']}, {subject['epochs']} epochs, {subject['budget']}; n = {r.n:,} against the {r.reference_n:,} images of {about['data']}, "
                     f"extractor {r.extractor} {r.weights[:8]}, {most} seed{'s' * (most > 1)}{''.join(', ' + f for f in fewer)}):\n\n" + markdown(rows)
                     + f"\n\nFor comparison, {real['n']:,} real images against the other {real['reference_n']:,}: precision {real['precision']:.2f}, recall {real['recall']:.2f}.")
    return "\n\n".join(parts)


def tables() -> str: return "\n\n".join(section(p) for p in sorted((ROOT / "nbs" / "results").glob("evaluate-*.json")))


def main(arguments) -> None:
    text, index = tables(), ROOT / "nbs" / "index.ipynb"
    if not arguments: print(text); return
    nb = json.loads(index.read_text())
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if BEGIN not in source: continue
        before, rest = source.split(BEGIN)
        made = before + BEGIN + text + END + rest.split(END, 1)[1]
        if "--write" in arguments:
            cell["source"] = made.splitlines(keepends=True)
            index.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n")
        elif source != made: raise SystemExit("nbs/index.ipynb does not have the tables that nbs/results gives: run `python .ci/results.py --write`, then `python .ci/readme.py`")
        return
    raise SystemExit(f"nbs/index.ipynb has no {BEGIN.strip()}: put it and {END.strip()} where the tables shall stand")


if __name__ == "__main__": main(sys.argv[1:])
