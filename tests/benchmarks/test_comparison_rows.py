"""Kept rows give the tables of the runs that they were kept of, and name nothing of the machine."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pandas as pd
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(Path(__file__).parents[1] / "compare"))
from made_up import drawn, listed_run, write_comparison, write_full_comparison, write_run  # noqa: E402

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
    kept = listed(target)
    assert len(kept) < len(index["runs"])  # an unfinished one is not among them
    assert not (target / "runs/fomaml").exists()


def listed(folder: Path) -> list[dict]:
    return json.loads((folder / "comparison.json").read_text())["runs"]


@pytest.fixture
def two_runs(tmp_path):
    """A comparison of two finished runs, of which the first says where it was made."""
    source = tmp_path / "runs"
    runs = [listed_run(method, scores=["plain", "samples-8"]) for method in ("lora", "abmll")]
    for run in runs:
        frame = drawn(run["method"], 0, 1.0, 5, tasks=2, n=8)
        write_run(source / run["folder"], run["method"], {place: frame for place in run["scores"].values()})
    write_comparison(source, runs)
    (source / runs[0]["folder"] / "provenance.json").write_text('{"device": "where it ran", "commit": "abc"}')
    return source, finish(source)


def test_provenance_is_the_runs_own_and_choices_are_kept(rows, two_runs, tmp_path):
    source, index = two_runs
    chosen = {"task_set": "cls-23", "model": "random:tiny", "method": "lora", "chosen": {"method.outer_lr": 1e-3}}
    tried = {"tried": [{"values": {"method.outer_lr": 1e-3}, "score": 0.5}], "at_the_end_of": [], "select_by": "nll"}
    (source / "tuning.json").write_text(json.dumps([{**chosen, **tried}]))
    rows.keep(source, index, tmp_path / "rows", {"device": "where it is kept"}, source / "tuning.json")
    assert "| lora | method.outer_lr=0.001 | 0.5000 | yes |" in (tmp_path / "rows/report.md").read_text()
    lora, abmll = listed(tmp_path / "rows")
    assert lora["provenance"] == {"device": "where it ran", "commit": "abc"} and "kept_by" not in lora
    assert abmll["kept_by"] == {"device": "where it is kept"} and "provenance" not in abmll


def test_a_kept_run_stays_and_gets_its_new_scores(rows, two_runs, tmp_path):
    source, index = two_runs
    target, place = tmp_path / "rows", "runs/abmll/default/seed-0"
    without = [{**run, "scores": {"plain": run["scores"]["plain"]}} for run in index["runs"]]
    rows.keep(source, {**index, "runs": without}, target, {"device": "one"})
    before = {path: path.read_bytes() for path in (target / place).rglob("*") if path.is_file()}
    (source / place / "metrics.jsonl").write_text("{}")
    (source / place / "scores/plain/scores.json").write_text("[1]")
    (source / place / "provenance.json").write_text('{"device": "another"}')
    rows.keep(source, index, target, {"device": "another"})
    assert before == {path: path.read_bytes() for path in before}
    kept = listed(target)[1]
    assert kept["kept_by"] == {"device": "one"} and "provenance" not in kept
    assert kept["scores"] == {"plain": "scores/plain", "samples-8": "scores/samples-8"}
    assert (target / place / "scores/samples-8/predictions.parquet").is_file()


def test_a_run_that_went_on_after_a_kill_is_the_same(rows, two_runs, tmp_path):
    """It names the episodes of an outer step, which its first session left to the ranks."""
    source, index = two_runs
    rows.keep(source, index, tmp_path / "rows", {})
    path = source / "runs/abmll/default/seed-0/final/summary.json"
    facts = json.loads(path.read_text())
    steps = facts.get("trained_steps")
    facts["config"].setdefault("trainer", {})["tasks_per_step"] = 1
    path.write_text(json.dumps(facts))
    rows.keep(source, index, tmp_path / "rows", {})
    path.write_text(json.dumps({**facts, "trained_steps": (steps or 0) + 1}))
    with pytest.raises(ValueError, match="'tasks_per_step': 1"):
        rows.keep(source, index, tmp_path / "rows", {})


def test_another_run_of_the_same_name_is_refused(rows, two_runs, tmp_path):
    source, index = two_runs
    rows.keep(source, index, tmp_path / "rows", {})
    path = source / "runs/abmll/default/seed-0/final/summary.json"
    facts = json.loads(path.read_text())
    facts["config"]["method"]["outer_lr"] = 0.5
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"runs/abmll\S* not the run kept in \S*rows/runs/abmll.*'outer_lr': 0\.5"):
        rows.keep(source, index, tmp_path / "rows", {})


def test_another_training_of_the_same_name_is_refused(rows, two_runs, tmp_path):
    """Of the same configuration: on another base, or with other predictions, beside which new scores would be kept."""
    source, index = two_runs
    place = "runs/abmll/default/seed-0"
    without = [{**run, "scores": {"plain": run["scores"]["plain"]}} for run in index["runs"]]
    summary = source / place / "final/summary.json"
    facts = json.loads(summary.read_text())
    summary.write_text(json.dumps({**facts, "fingerprint": "one"}))
    rows.keep(source, {**index, "runs": without}, tmp_path / "rows", {})
    summary.write_text(json.dumps({**facts, "fingerprint": "two"}))
    with pytest.raises(ValueError, match="fingerprint: one kept, two now"):
        rows.keep(source, index, tmp_path / "rows", {})
    summary.write_text(json.dumps({**facts, "fingerprint": "one"}))
    rows.keep(source, {**index, "runs": without}, tmp_path / "rows", {})
    predictions = source / place / "scores/plain/predictions.parquet"
    pd.read_parquet(predictions).assign(nll=1.0).to_parquet(predictions, index=False)
    with pytest.raises(ValueError, match=r"abmll/default/seed-0/scores/plain: not the predictions kept in"):
        rows.keep(source, index, tmp_path / "rows", {})


def test_names_of_the_tasks_are_kept(rows, two_runs):
    source, _ = two_runs
    facts = json.loads((source / "runs/abmll/default/seed-0/final/summary.json").read_text())
    facts["config"]["tasks"] |= {"test": ["art", "swag"], "train": ["piqa"], "lists": "/home/somebody/cls23.yaml"}
    kept = rows.without_paths(facts)["config"]["tasks"]
    assert (kept["test"], kept["train"], kept["lists"]) == (["art", "swag"], ["piqa"], "cls23.yaml")
    assert "folder" not in kept
