#!/usr/bin/env python3
"""Print the README's results tables, made from nbs/results: evaluate-*.json is what nbs/evaluate.ipynb left as results.json of named runs,
compare-*.json what nbs/compare.ipynb and nbs/20_reproduction.ipynb wrote.

They stand in nbs/index.ipynb between pairs of comments, `<!-- results -->` and `<!-- /results -->`, `<!-- compare-digits -->` and so on. With
--write they are put there (then .ci/readme.py carries them into README.md); with --check it says whether they are there.
"""

import json
import pathlib
import sys

from dddm.metrics import check_kind
from dddm.tables import load_results, markdown, mean_range

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = (1, 2, 5, 20, 100, 1000)
COLUMNS = ("precision", "recall", "diversity", "mean shift", "confident", "copies")
RESULTS = ROOT / "nbs" / "results"
KEPT = {"fixed": "fixed $x_T$", "renoise": "re-noised", "ddim": "DDIM"}


def section(path: pathlib.Path) -> str:
    "What one evaluation says: a table for each of its runs, under a line with the circumstances."
    found, about = load_results(path)
    some, parts = next(iter(found.values())), []
    columns = [about["distance"], *(c for c in COLUMNS if c in some)]
    for name, subject in about["subjects"].items():
        rows, seeds = [], {}
        for steps in STEPS:
            here = [
                found[label]
                for label, cell in about["cells"].items()
                if (cell["run"], cell["steps"]) == (name, steps)
            ]
            if not here:
                continue
            for c in columns:
                check_kind(here[0][c], some[c])
            rows.append({"steps": steps, **{c: mean_range([r[c] for r in here]) for c in columns}})
            seeds[steps] = len(here)
        rows.append(
            {
                "steps": "noise",
                **{c: mean_range([found["noise"][c]]) if c in found["noise"] else "" for c in columns},
            }
        )
        rows.append(
            {
                "steps": "real images, expected",
                **{c: "" if some[c].floor is None else f"{some[c].floor:.3g}" for c in columns},
            }
        )
        r, real = some[about["distance"]], about["real"]
        most = max(seeds.values(), default=1)
        fewer = [f"{s} at {k} steps" for k, s in seeds.items() if s < most]
        parts.append(
            f"**{name}** (objective {subject['objective']}, sampler {subject['sampler']}, "
            f"{subject['epochs']} epochs, {subject['budget']}; n = {r.n:,} against the {r.reference_n:,} "
            f"images of {about['data']}, "
            f"extractor {r.extractor} {r.weights[:8]}, {most} seed{'s' * (most > 1)}"
            f"{''.join(', ' + f for f in fewer)}):\n\n"
            + markdown(rows)
            + (
                f"\n\nFor comparison, {real['n']:,} real images against the other {real['reference_n']:,}: "
                f"precision {real['precision']:.2f}, recall {real['recall']:.2f}."
            )
        )
    return "\n\n".join(parts)


def compared(name: str) -> str:
    """The table of a results file of compare.ipynb.

    Frechet distance by arm, sampler and number of steps, with the number of seeds.
    """
    if not (path := RESULTS / f"compare-{name}.json").exists():
        return "(not run yet)"
    found = json.loads(path.read_text())
    about, rows, lines = found["config"], found["rows"], []
    steps = sorted({r["steps"] for r in rows})
    for arm, sampler in dict.fromkeys((r["arm"], r["sampler"]) for r in rows):
        mine = [r for r in rows if (r["arm"], r["sampler"]) == (arm, sampler)]
        values, sure = (
            {s: [r["fd"] for r in mine if r["steps"] == s] for s in steps},
            [r["confident"] for r in mine if r["steps"] == 1],
        )
        lines.append(
            {
                "arm, sampler": f"{arm}, {KEPT[sampler]}",
                "seeds": len({r["seed"] for r in mine}),
                **{
                    f"{s} step{'s' * (s > 1)}": mean_range(v, of=len(sure)) if v else ""
                    for s, v in values.items()
                },
                "sure, 1 step": f"{sum(sure) / len(sure):.2f}",
            }
        )
    return (
        f"FD-{about['extractor']} (arms of notebook `compare`, {about['epochs']} epochs of "
        f"{about['reference_n']:,} images, batch {about['batch']}, n = {about['n']:,}; as many real images "
        f"are expected at {about['real']['fd']:.2g}); "
        f'mean [smallest, largest] over the seeds; "sure": share of samples with p >= 0.9, of the data {about["real"]["confident"]:.2g}:\n\n'
        + markdown(lines)
    )


def ring() -> str:
    "Notebook 20's table of the ring: mean over its repeats."
    found = json.loads((RESULTS / "compare-2d.json").read_text())
    rows, lines = found["rows"], []
    for arm, sampler in dict.fromkeys((r["arm"], r["sampler"]) for r in rows):
        value = lambda key, s: [
            r[key] for r in rows if (r["arm"], r["sampler"], r["steps"]) == (arm, sampler, s)
        ]
        lines.append(
            {
                "arm, sampler": f"{arm}, {KEPT[sampler]}",
                **{
                    f"{s} step{'s' * (s > 1)}": f"{sum(value('energy', s)) / len(value('energy', s)):.2g}"
                    if value("energy", s)
                    else ""
                    for s in (1, 2, 5, 100, 1000)
                },
                "rms to the flow, 1 step": f"{sum(value('rms_to_flow', 1)) / len(value('rms_to_flow', 1)):.2f}",
            }
        )
    return markdown(lines)


def generators() -> str:
    "The shipped generators: three columns of their evaluations, by number of steps."
    lines = []
    for path in (RESULTS / "evaluate-digits-consistency.json", RESULTS / "evaluate-digits-few-steps.json"):
        found, about = load_results(path)
        ((name, subject),) = about["subjects"].items()
        for column, word in (
            (about["distance"], about["distance"]),
            ("confident", "sure"),
            ("copies", "copies"),
        ):
            at = {
                steps: [
                    found[label][column] for label, cell in about["cells"].items() if cell["steps"] == steps
                ]
                for steps in STEPS
            }
            lines.append(
                {
                    "model, sampler": f"{name}, {KEPT[subject['sampler']]}"
                    if word == about["distance"]
                    else "",
                    "score": word,
                    **{f"{s} step{'s' * (s > 1)}": mean_range(v) for s, v in at.items() if v},
                    "real images, expected": f"{found[next(iter(about['cells']))][column].floor:.3g}",
                }
            )
    return markdown(lines)


def tables() -> dict:
    "{name of the pair of comments: text between them}."
    return {
        "results": "\n\n".join(section(p) for p in sorted(RESULTS.glob("evaluate-*.json"))),
        "compare-2d": ring(),
        "shipped": generators(),
        **{f"compare-{name}": compared(name) for name in ("digits", "cifar10-small")},
    }


def main(arguments) -> None:
    index = ROOT / "nbs" / "index.ipynb"
    nb, changed = json.loads(index.read_text()), False
    for name, text in tables().items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        if not arguments:
            print(begin + text + end + "\n")
            continue
        for cell in nb["cells"]:
            source = "".join(cell["source"])
            if begin not in source:
                continue
            before, rest = source.split(begin)
            made = before + begin + text + end + rest.split(end, 1)[1]
            changed |= source != made
            cell["source"] = made.splitlines(keepends=True)
            break
        else:
            raise SystemExit(
                f"nbs/index.ipynb has no {begin.strip()}: put it and {end.strip()} where the tables shall "
                "stand"
            )
    if "--write" in arguments:
        index.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n")
    elif changed:
        raise SystemExit(
            "nbs/index.ipynb does not have the tables that nbs/results gives: run `python .ci/results.py "
            "--write`, then `python .ci/readme.py`"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
