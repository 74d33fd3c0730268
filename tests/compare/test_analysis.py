from __future__ import annotations

import json
import re
import shutil

import pandas as pd
import pytest
from made_up import examples_of, listed_run, write_comparison, write_run

from abmll.compare.analysis import analyse
from abmll.compare.results import load_results


def test_analysis_of_a_comparison(full_folder, tmp_path):
    """The report's links and plots are there, it says what is missing, and a second analysis changes no table."""
    folder = tmp_path / "comparison"
    shutil.copytree(full_folder, folder)
    written = analyse(folder)
    assert all(path.is_file() for path in written)
    text = (folder / "report.md").read_text()
    assert "runs/fomaml/default/seed-0: not finished" in text and "## One against another" in text
    assert text.count("95 % intervals over tasks. Tasks differ far more") == 1  # a caption for all sweeps
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert {folder / link for link in links} == set(written) - {folder / "report.md"}
    before = {path: path.read_bytes() for path in written if path.suffix != ".png"}
    (folder / "tables" / "of_a_run_that_is_gone.csv").touch()
    (folder / "tables" / "notes.txt").touch()
    assert analyse(folder) == written
    assert before == {path: path.read_bytes() for path in before}
    assert not (folder / "tables" / "of_a_run_that_is_gone.csv").exists() and (folder / "tables" / "notes.txt").exists()


def test_analysis_of_a_list_that_lies_elsewhere(full_folder, tmp_path):
    """Its runs are found, and tables, plots and report lie beside it."""
    into = tmp_path / "comparisons" / "other"
    into.mkdir(parents=True)
    listed = json.loads((full_folder / "comparison.json").read_text())
    runs = [run for run in listed["runs"] if run["seed"] == 0 and run["method"] in ("lora", "abmll")]
    (into / "comparison.json").write_text(json.dumps({**listed, "name": "other", "runs": runs}))
    before = set(full_folder.iterdir())
    written = analyse(full_folder, into)
    assert all(path.is_file() and path.is_relative_to(into) for path in written)
    assert (into / "report.md").read_text().startswith("# other\n") and set(full_folder.iterdir()) == before


def test_analysis_of_a_half_finished_comparison(tmp_path):
    """Of other tasks the baseline's score is not there yet, and the seeds that are there differ."""
    of = {
        ("lora", 0): {"plain": "task", "temperature": "other"},
        ("lora", 1): {"plain": "task"},
        ("abmll", 0): {"plain": "task", "other-1": "new", "temperature": "third"},
        ("reptile", 2): {"plain": "task"},
    }
    runs = []
    for (method, seed), scores in of.items():
        runs.append(listed_run(method, seed, scores=[*scores, "other-1"] if method == "lora" else list(scores)))
        frames = {
            f"scores/{name}": examples_of([[0.8, 0.2], [0.6, 0.4]], [0, 1], method=method, task=task)
            for name, task in scores.items()
        }
        write_run(tmp_path / runs[-1]["folder"], method, frames)
    write_comparison(tmp_path, runs)
    analyse(tmp_path)
    found = pd.read_csv(tmp_path / "tables/against_each.csv")
    assert set(zip(found["label"], found["rival"], strict=True)) == {("abmll", "lora")}
    assert set(found["seeds"]) == set(found["tasks"]) == {1}


@pytest.mark.parametrize("method", ["pretrained", "abmll"])
def test_analysis_of_one_run_on_one_task(tmp_path, method):
    """Nothing to compare, no interval, no curve: what can be said is said."""
    frame = examples_of([[0.8, 0.2], [0.6, 0.4]], [0, 1], method=method)
    write_run(tmp_path / f"runs/{method}/default/seed-0", method, {"scores/plain": frame})
    write_comparison(tmp_path, [listed_run(method)])
    analyse(tmp_path)
    assert f"| {method} | 5 | 50.0 |" in (tmp_path / "tables" / "summary.md").read_text()


def test_analysis_with_a_diverged_task(tmp_path):
    nan = float("nan")
    for method, options in (("lora", [[0.8, 0.2], [0.6, 0.4]]), ("abmll", [[nan, nan], [nan, nan]])):
        frame = examples_of(options, [0, 1], method=method)
        write_run(tmp_path / f"runs/{method}/default/seed-0", method, {"scores/plain": frame})
    write_comparison(tmp_path, [listed_run("lora"), listed_run("abmll")])
    analyse(tmp_path)
    assert "| abmll | 5 | NaN | NaN |" in (tmp_path / "tables" / "summary.md").read_text()


def test_analysis_of_a_run_that_was_trained(make_run, one_thread, tmp_path):
    """What a run leaves is what the analysis reads; its own table of scores says the same."""
    run = make_run().train("eval.every=2", "eval.pretrained=true")
    listed = {**listed_run("abmll"), "folder": "run", "scores": {"plain": "."}}
    write_comparison(tmp_path, [listed])
    analyse(tmp_path)
    found = load_results(tmp_path)
    overall = {evaluation["method"]: evaluation["overall"] for evaluation in run.scores}["abmll"]
    means = found.scores.groupby("steps")[["accuracy", "ece", "nll", "brier", "macro_f1"]].mean()
    for steps, values in means.iterrows():
        assert values.to_dict() == pytest.approx({name: overall[str(steps)][name] for name in values.index})
    (cost,) = found.costs.to_dict("records")
    assert (cost["episodes"], cost["inner_steps"]) == (6, 12)
    assert cost["parameters"] == sum(value.numel() for value in run.theta.values())
    assert found.curves["accuracy"].notna().sum() == sum("validation_2_steps" in line for line in run.metrics) > 0
