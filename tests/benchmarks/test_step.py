"""benchmarks/step.py: every contender on a tiny model, and the rows that it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "benchmarks/step.py"), "--device", "cpu", "--model", "random:tiny"]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)


def test_rows_of_a_tiny_model(tmp_path):
    pytest.importorskip("peft")
    rows_file = tmp_path / "rows.json"
    shape = ("--examples", "2", "--tokens", "8", "--rounds", "3", "--threads", "1", "--checkpointing")
    done = run(*shape, "--output", str(rows_file))
    assert done.returncode == 0, done.stderr
    facts = json.loads(rows_file.read_text())
    assert (facts["examples"], facts["tokens"], facts["threads"], facts["rounds"]) == (2, 8, 1, 3)
    rows = {row["contender"]: row for row in facts["rows"]}
    assert list(rows) == ["frozen", "PEFT LoRA", "LoRA", "activation", "weight"]
    for name, row in rows.items():
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["ratio"] == pytest.approx(row["median_ms"] / rows["PEFT LoRA"]["median_ms"], rel=2e-3)
        assert f"| {name} |" in done.stdout


def test_committed_rows_say_where_they_come_from():
    for path in (ROOT / "benchmarks/results").glob("step_*.json"):
        facts = json.loads(path.read_text())
        assert facts["provenance"]["commit"] and facts["provenance"]["versions"]["peft"]
        assert {"PEFT LoRA", "activation", "weight"} <= {row["contender"] for row in facts["rows"]}
