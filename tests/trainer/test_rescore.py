"""Scoring a finished run again gives the scores that the run itself wrote."""

import json

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


def test_a_folder_without_a_finished_run_is_refused(finished, tmp_path):
    with pytest.raises(Refused, match=r"holds no config\.yaml; name the output folder of a run"):
        evaluate(str(tmp_path), [], None)
    (tmp_path / "config.yaml").write_text((finished.folder / "config.yaml").read_text())
    with pytest.raises(Refused, match=r"summary .*final.*; name a folder written by a run"):
        evaluate(str(tmp_path), [], None)
    with pytest.raises(Refused, match="do not fit this model"):
        evaluate(str(finished.folder), ["adapters.rank=3"], None)
