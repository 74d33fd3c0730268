"""benchmarks/adaptation.py on the tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "deploy"))

from deployed import EXAMPLES, save_run


def test_the_command_times_and_writes(load, build_tiny, tmp_path, capsys):
    adaptation = load("adaptation")
    run = save_run(build_tiny(), tmp_path / "run")
    (tmp_path / "tasks").mkdir()
    for name in "ab":
        rows = [json.dumps({"text": text, "label": label}) for text, label in EXAMPLES]
        (tmp_path / "tasks" / f"{name}.jsonl").write_text("\n".join(rows))
    output = tmp_path / "rows.json"
    command = ["--run", str(run), "--tasks", str(tmp_path / "tasks"), "--count", "2", "--folds", "2"]
    adaptation.main([*command, "--output", str(output), "method.test_steps=2"])
    facts = json.loads(output.read_text())
    assert facts["tasks"] == ["a", "b"] and [row["folds"] for row in facts["rows"]] == [2, 0]
    for row in facts["rows"]:
        assert row["steps"] == 6 and row["seconds_a_task"] * 2 == row["seconds"] > 0
    assert str(tmp_path) not in output.read_text()
    assert "2 tasks of 6 examples" in capsys.readouterr().out
