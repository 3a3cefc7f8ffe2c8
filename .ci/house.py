"""Print what the house is measured by; with --check, end with 1 where a bar does not hold."""

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("ipywidgets", "matplotlib", "lpips", "torch_fidelity")
PUBLIC, DEFINITIONS, WIDTH = 150, 25, 110


def public_names() -> dict[str, int]:
    "{module: number of names in its `__all__`}."
    found = {}
    for path in sorted((ROOT / "dddm").glob("[!_]*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                found[path.stem] = len(ast.literal_eval(node.value))
    return found


def definitions(module: str) -> int:
    "Functions and classes at the top level of a module."
    tree = ast.parse((ROOT / "dddm" / f"{module}.py").read_text())
    return sum(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree.body)


def wide_lines() -> list[str]:
    "Code lines over 110 columns in notebooks and tests, but for tables between `# fmt: off` and `# fmt: on`."
    sources = {path: [path.read_text()] for path in (ROOT / "tests").rglob("*.py")}
    for path in (ROOT / "nbs").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        sources[path] = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    found = []
    for path, texts in sources.items():
        for text in texts:
            table = False
            for line in text.splitlines():
                table = (table or "# fmt: off" in line) and "# fmt: on" not in line
                if len(line) > WIDTH and not table:
                    found.append(f"{path.relative_to(ROOT)}: {line.strip()[:60]}")
    return found


def loaded(code: str) -> list[str]:
    "Which of the heavy packages a fresh process has loaded after running the code."
    tail = f"\nimport sys\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.split()


def imports(module: str) -> list[str]:
    "The modules of dddm that a module imports."
    tree = ast.parse((ROOT / "dddm" / f"{module}.py").read_text())
    froms = (n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1)
    return sorted({n.module or alias.name for n in froms for alias in n.names})


def main() -> int:
    names, wide = public_names(), wide_lines()
    shipped = "from dddm.zoo import SHIPPED, Pretrained\nPretrained.from_pretrained(next(iter(SHIPPED)))"
    heavy = {"dddm.sampling": loaded("import dddm.sampling"), "a shipped model": loaded(shipped)}
    per_module = ", ".join(f"{m} {n}" for m, n in names.items())
    rows = [
        (f"public names: {sum(names.values())} of {PUBLIC} ({per_module})", sum(names.values()) <= PUBLIC),
        (
            f"definitions in dddm.training: {definitions('training')} of {DEFINITIONS}",
            definitions("training") <= DEFINITIONS,
        ),
        (f"code lines over {WIDTH} columns: {len(wide)}", not wide),
        (
            f"dddm.sampling imports: {', '.join(imports('sampling'))}",
            set(imports("sampling")) <= {"checks", "store"},
        ),
    ]
    for what, found in heavy.items():
        rows.append((f"{what} loads: {', '.join(found) or 'none of ' + ', '.join(HEAVY)}", not found))
    for text, holds in rows:
        print("holds " if holds else "FAILS ", text)
    for line in wide[:20]:
        print("       ", line)
    return int("--check" in sys.argv and not all(holds for _, holds in rows))


if __name__ == "__main__":
    sys.exit(main())
