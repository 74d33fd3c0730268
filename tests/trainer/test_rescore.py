"""Scoring a finished run again gives the scores that the run itself wrote."""

import json
import math
import shutil

import pytest

from abmll.config import Refused
from abmll.rescore import evaluate


def test_the_same_settings_give_the_same_scores(finished, tmp_path, capsys):
    evaluate(str(finished.folder), [], str(tmp_path / "again.json"))
    assert json.loads((tmp_path / "again.json").read_text()) == finished.scores
    printed = capsys.readouterr().out
    facts = json.loads((finished.folder / "final/summary.json").read_text())
    assert f"after step {facts['step']}" in printed
    assert (finished.folder / "scores.md").read_text() in printed


def test_other_settings_are_honoured(finished, tmp_path):
    evaluate(str(finished.folder), ["eval.samples=2", "eval.max_examples=1"], str(tmp_path / "other.json"))
    (again,) = json.loads((tmp_path / "other.json").read_text())
    assert {task["n"] for task in again["tasks"]["0"].values()} == {1}
    assert again["tasks"] != finished.scores[-1]["tasks"]


@pytest.fixture
def other_tasks(tmp_path):
    """A folder of two tasks that no run has seen, one of them with a single training row; nothing else."""
    for task, rows in (("red", 8), ("blue", 1)):
        for split, count in (("train", rows), ("test", 4)):
            path = tmp_path / "tasks" / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            row = {"task": task, "output": "yes", "options": ["yes", "no"]}
            path.write_text("".join(json.dumps({**row, "input": f"{task} {n}?"}) + "\n" for n in range(count)))
    return ["tasks.source=jsonl", f"tasks.folder={tmp_path / 'tasks'}", "tasks.test=[red, blue]"]


def test_other_tasks_need_no_training_tasks(finished, other_tasks, tmp_path, capsys):
    """The run validates (eval.every), and its training tasks are not in the folder."""
    evaluate(str(finished.folder), other_tasks, str(tmp_path / "other.json"))
    (found,) = json.loads((tmp_path / "other.json").read_text())
    assert {name: task["n"] for name, task in found["tasks"]["2"].items()} == {"red": 4, "blue": 4}
    assert all(math.isfinite(task["nll"]) for task in found["tasks"]["2"].values())
    evaluate(str(finished.folder), [*other_tasks[:2], "tasks.test=[red, gone]"], None)
    assert "note: missing task gone: " in capsys.readouterr().out


def test_a_run_on_files_is_scored_again_without_them(run, other_tasks, tmp_path):
    """Its own list file and training tasks are gone; the scores on a task that it scored itself are the same."""
    lists = tmp_path / "lists.yaml"
    lists.write_text("train: [blue]\ntest: [red]\n")
    run.train(*other_tasks[:2], f"tasks.lists={lists}", "trainer.episodes=1", "eval.every=1")
    lists.unlink()
    shutil.rmtree(tmp_path / "tasks/blue")
    evaluate(str(run.folder), ["tasks.test=[red]"], str(tmp_path / "again.json"))
    assert json.loads((tmp_path / "again.json").read_text()) == run.scores
    with pytest.raises(Refused, match=r"tasks\.lists: .*lists\.yaml: no such file"):
        evaluate(str(run.folder), [], None)


def test_a_folder_without_a_finished_run_is_refused(finished, tmp_path):
    with pytest.raises(Refused, match=r"holds no config\.yaml; name the output folder of a run"):
        evaluate(str(tmp_path), [], None)
    (tmp_path / "config.yaml").write_text((finished.folder / "config.yaml").read_text())
    with pytest.raises(Refused, match=r"summary .*final.*; name a folder written by a run"):
        evaluate(str(tmp_path), [], None)
    with pytest.raises(Refused, match="do not fit this model"):
        evaluate(str(finished.folder), ["adapters.rank=3"], None)
