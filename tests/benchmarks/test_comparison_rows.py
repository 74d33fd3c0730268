"""Kept rows give the tables of the runs that they were kept of, and name nothing of the machine."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(Path(__file__).parents[1] / "compare"))
from made_up import write_full_comparison  # noqa: E402

from abmll.compare.analysis import analyse  # noqa: E402


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("comparison_rows", BENCHMARKS / "comparison_rows.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def finish(folder: Path) -> dict:
    """What made-up runs lack of real ones: a whole configuration with paths in it, and scores."""
    from abmll.config import load_config

    index = json.loads((folder / "comparison.json").read_text())
    whole = load_config(BENCHMARKS.parent / "configs/tiny.yaml").model_dump(mode="json")
    for run in index["runs"]:
        path = folder / run["folder"] / "final/summary.json"
        run["overrides"] = ["tasks.folder=/home/somebody/tasks"]
        if path.is_file():
            facts = json.loads(path.read_text())
            method = {**whole["method"], **facts["config"]["method"]}
            tasks = {**whole["tasks"], "folder": "/home/somebody/tasks"}
            config = {**whole, "method": method, "tasks": tasks, "output": "/home/somebody/run"}
            path.write_text(json.dumps({**facts, "config": config, "scores": []}))
            for place in run["scores"].values():
                (folder / run["folder"] / place / "scores.json").write_text("[]")
    return index


def test_kept_rows_give_the_same_tables(rows, tmp_path):
    source, target = tmp_path / "runs", tmp_path / "rows"
    write_full_comparison(source, tasks=3, n=8, seeds=1)
    index = finish(source)
    analyse(source)
    rows.keep(source, index, target, {"device": "a test"})
    for table in (source / "tables").iterdir():
        assert (target / "tables" / table.name).read_text() == table.read_text(), table.name
    for path in target.rglob("*.json"):
        assert "somebody" not in path.read_text(), path
    assert not list(target.rglob("*.safetensors"))
    kept = json.loads((target / "comparison.json").read_text())["runs"]
    assert {run["provenance"]["device"] for run in kept} == {"a test"}
    assert len(kept) < len(index["runs"])  # an unfinished one is not among them

    rows.keep(source, {**index, "runs": index["runs"][:1]}, target, {"device": "another"})
    again = json.loads((target / "comparison.json").read_text())["runs"]
    assert again == kept
