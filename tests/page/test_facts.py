"""What a run's folder says, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_runs import LAYERS, evaluation, step_lines, theta, write_run

from abmll.config import Refused
from abmll.page.facts import distinct_names, read_run, read_runs
from abmll.score_files import save_scores


def test_a_whole_folder(tmp_path):
    episodes = [{"step": 1, "episode": 0, "task": "x", "finite": True, "nll_first": 3.0, "nll_last": 1.0}]
    folder = write_run(tmp_path / "run", episodes=episodes)
    save_scores(folder / "scores/samples-8", [evaluation()], {"eval.samples": 8})
    (folder / "provenance.json").write_text('{"commit": "abc", "dirty": false}')
    (folder / "adapters/mine").mkdir(parents=True)
    (folder / "adapters/mine/card.json").write_text('{"task": "mine"}')
    run = read_run(folder, "run")
    assert run.notes == []
    assert run.steps["nll_last"].tolist() == [2.0, 1.0, pytest.approx(2 / 3), 0.5]
    assert run.validations[["step", "episode", "steps"]].values.tolist() == [[2, 2, 0], [2, 2, 2], [4, 4, 0], [4, 4, 2]]
    assert run.validations["nll"].tolist() == [0.5, 0.5, 0.25, 0.25]
    assert run.kl_by_layer.columns.tolist() == LAYERS
    assert run.kl_by_layer.loc[3].tolist() == [3.0, 6.0, 9.0, 12.0]
    assert run.summary == {"parameters": 1234, "layers": LAYERS, "step": 4, "trained_steps": 4, "best": None}
    assert run.setting("adapters.rank") == 2 and run.setting("no.such.key", 7) == 7
    assert run.provenance["commit"] == "abc" and run.adapters == [{"task": "mine"}]
    (other,) = run.others
    assert (other.name, other.settings) == ("samples-8", {"eval.samples": 8})
    assert list(run.evaluations[0].predictions[2]) == ["first task", "second task"]
    assert set(run.theta) == set(theta(LAYERS))


def test_a_run_that_goes_on_has_notes_for_what_is_missing(tmp_path):
    """As train.py leaves it when it is killed: the configuration, step lines, the last of them cut off."""
    (tmp_path / "config.yaml").write_text("model: {name: x}\nmethod: {beta: 1e-3}\n")
    lines = [json.dumps(line) for line in step_lines(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "nll']))
    run = read_run(tmp_path, "run")
    assert len(run.steps) == 3 and run.setting("method.beta") == 1e-3
    assert run.kl_by_layer.columns.tolist() == [0, 1, 2, 3]  # the layers' names come with the summary
    assert run.evaluations == [] and run.theta == {}
    assert [note.rpartition("there is no ")[2] for note in run.notes] == ["final/summary.json.", "scores.json."]


def test_scores_without_predictions_are_read(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "predictions.parquet").unlink()
    run = read_run(folder, "run")
    assert run.evaluations[0].overall[2]["accuracy"] == 0.625 and run.evaluations[0].predictions == {}
    assert "no predictions.parquet" in run.notes[0]


def test_an_older_runs_lines_have_no_kl_by_layer(tmp_path):
    run = read_run(write_run(tmp_path / "run", step_lines(layers=0)), "run")
    assert len(run.steps) == 4 and run.kl_by_layer.empty


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(Refused, match=f"RUN: {tmp_path}: holds no config.yaml; name the output folder of a run"):
        read_runs([tmp_path])
    with pytest.raises(Refused, match=r"holds no config\.yaml"):
        read_runs([tmp_path / "nothing"])


def test_a_damaged_file_is_named_not_traced(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "scores.json").write_text("[{")
    with pytest.raises(Refused, match=f"RUN: {folder}: cannot be read"):
        read_runs([folder])


def test_a_run_named_twice_is_refused(tmp_path):
    folder = write_run(tmp_path / "run")
    with pytest.raises(Refused, match="is named twice"):
        read_runs([folder, tmp_path / "run/../run"])


@pytest.mark.parametrize(
    "paths, names",
    [
        (["/r/a"], ["a"]),
        (["/r/a", "/s/b"], ["a", "b"]),
        (["/r/abmll/default/seed-0", "/r/lora/default/seed-0"], ["abmll", "lora"]),
        (["/r/abmll/x/seed-0", "/r/lora/x/seed-0", "/r/lora/x/seed-1"], ["abmll/seed-0", "lora/seed-0", "lora/seed-1"]),
        (["/r/a/b/x", "/r/b/a/x"], ["b", "a"]),
    ],
)
def test_names_tell_runs_apart(paths, names):
    assert distinct_names([Path(path) for path in paths]) == names
