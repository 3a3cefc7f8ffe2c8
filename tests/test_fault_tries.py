"Every kind of fault, tried as often as the table in notebook 09a says: nothing is lost, silent or nameless."

import json
import subprocess
import sys

import pytest
from fault_tries import BAD, GOOD, KINDS, World, tries

from dddm.store import without_checksum


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    for path in (folder, folder.parent):
        path.chmod(0o755)
    return World(folder / "world")


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_lost_silent_or_nameless(world, name):
    found = tries(world, name)
    assert {*found} <= {*GOOD}, found


def test_the_table_is_of_all_kinds_and_has_no_bad_outcome(root):
    kept = without_checksum(json.loads((root / "nbs" / "results" / "faults.json").read_text()))
    rows = [dict(zip(kept["columns"], row, strict=True)) for row in kept["rows"]]
    assert [row["fault"] for row in rows] == list(KINDS)
    assert sum(row["tries"] for row in rows) >= 500 and not any(row[bad] for row in rows for bad in BAD)
    assert all(row["tries"] == sum(row[outcome] for outcome in GOOD) for row in rows)


def test_a_few_tries_by_the_command(root, tmp_path):
    out = tmp_path / "faults.json"
    command = [sys.executable, str(root / "tests" / "fault_tries.py"), str(out), "kept images, cut short"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert without_checksum(json.loads(out.read_text()))["rows"][0][1:3] == ["kept images, cut short", 20]
