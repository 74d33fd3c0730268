"""benchmarks/host_time.py: what can be counted of the host's work is bounded, and the committed rows are readable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "benchmarks/results/host_time.json"


@pytest.fixture(scope="module")
def host_time():
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import host_time

    yield host_time
    sys.path[:] = before


# Of a forward and backward pass of Llama3-8B's Q at 1,024 tokens: launches with the library's, PyTorch's operators and
# allocations. What makes one of them larger costs every layer of every step its time.
BOUNDS = {"activation": (6, 26, 13), "weight": (9, 34, 13)}


@pytest.mark.parametrize("posterior", BOUNDS)
def test_launches_operators_and_allocations_of_a_step(host_time, posterior):
    found = host_time.count(posterior)
    counts = (len(found["kernels"]) + len(found["library"]), found["operators"], found["allocations"])
    assert all(0 < value <= bound for value, bound in zip(counts, BOUNDS[posterior], strict=True)), (counts, found)


@pytest.mark.parametrize("sizes", [(256,) * 4, (500, 24, 300, 200)], ids=["equal", "unequal"])
def test_launches_of_several_groups(host_time, sizes):
    """The activation posterior's serve all groups; the weight posterior's change is one group's at a time."""
    launches = {
        posterior: len(found["kernels"]) + len(found["library"])
        for posterior in BOUNDS
        for found in [host_time.count(posterior, sizes)]
    }
    assert launches == {"activation": 6, "weight": 6 * 4 + 4}


def test_committed_rows_are_of_the_launches_that_the_code_makes(host_time):
    rows = json.loads(ROWS.read_text())["rows"]
    assert [row["posterior"] for row in rows] == list(host_time.POSTERIORS)
    for row in rows:
        assert row["counts"]["kernels"] == host_time.count(row["posterior"])["kernels"]
        assert set(row["parts"]) == set(host_time.PARTS)
        # the parts are differences of nested calls: all but the binders make up what is beyond the frozen linear
        parts = sum(value for name, value in row["parts"].items() if name != "binders")
        assert parts == pytest.approx(row["beyond"], rel=1e-6)


def test_the_command_measures_and_prints_what_was_measured(tmp_path):
    """A few calls are enough to see that every part takes time; the interpreter, which has no binders, is refused."""
    command = [sys.executable, str(ROOT / "benchmarks/host_time.py")]
    path = tmp_path / "rows.json"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    made = [*command, "--rounds", "5", "--calls", "5", "--write", str(path)]
    run = subprocess.run(made, capture_output=True, text=True, env=environment, check=True)
    report = subprocess.run(
        [*command, "--report", str(path)], capture_output=True, text=True, env=environment, check=True
    )
    assert report.stdout == run.stdout and run.stdout.count("| activation |") == 2
    refused = subprocess.run(command, capture_output=True, text=True, env={**environment, "TRITON_INTERPRET": "1"})
    assert refused.returncode == 2 and "TRITON_INTERPRET: set" in refused.stderr
