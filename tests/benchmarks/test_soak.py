"""benchmarks/soak.py: a handful of kills at random moments of runs with one and with two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/soak.py"


@pytest.mark.distributed
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU alone: its runs are forked")
def test_runs_that_are_killed_again_and_again_equal_the_one_that_was_left_alone(tmp_path):
    seed = str(int.from_bytes(os.urandom(2), "little"))
    print(f"seed {seed}")
    row, asked = tmp_path / "row.json", ["--kills", "5", "--steps", "8", "--seed", seed]
    command = [sys.executable, str(SCRIPT), *asked, "--output", str(row)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=1100)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    row = json.loads(row.read_text())
    assert row["lost"] == 0 and row["kills"] >= 5 and row["runs_finished"] >= 1
    assert sum(row["by_signal"].values()) == row["kills"] <= sum(row["phases"].values())
    assert row["provenance"]["device"] and row["seed"] == int(seed)


def test_a_run_that_differs_is_lost(load, tmp_path):
    """Or the row above would be 0 whatever happened."""
    soak = load("soak")
    job, found = soak.Job(tmp_path / "run", 1, 8), soak.Soak(None)
    expected = {"theta": b"1", "scores": "a"}
    job.result = lambda: {**expected, "theta": b"2"}
    found.compare(job, expected)
    assert found.lost == ["run: other theta than the uninterrupted run"]
    job.result = lambda: expected
    found.compare(job, expected)
    assert len(found.lost) == 1
