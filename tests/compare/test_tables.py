from __future__ import annotations

import math
from dataclasses import replace
from importlib.resources import files

import pandas as pd
import pytest
import yaml

from abmll.compare.calibration import GAPS
from abmll.compare.estimates import ACCURACY, MAIN
from abmll.compare.tables import all_tables, beside_paper, interval, markdown, number


@pytest.fixture(scope="module")
def tables(full):
    return {table.name: table for table in all_tables(full)}


def cells(text: str, *beginning: str) -> list[str]:
    """Of the one row that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {' | '.join(beginning)} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_which_tables_are_made(tables):
    assert list(tables) == [
        "summary",
        "uncertainty",
        "against_baseline",
        "against_each",
        "conditions",
        "by_task",
        "costs",
        "sweep_beta",
        "sweep_pruning",
        "sweep_samples",
        "paper",
    ]
    assert all("## cls-23, random:tiny\n" in table.text for table in tables.values())


def test_what_was_tried_and_chosen(full):
    """The best marked, a diverged try as NaN, the end of a list beside the choice; nothing of who tried nothing."""
    place = {"task_set": "cls-23", "model": "random:tiny", "select_by": "nll_options"}
    tried = [
        ({"method.outer_lr": 1e-3, "method.beta": 1e-9}, 0.25),
        ({"method.outer_lr": 1e-2, "method.beta": 1e-9}, None),
    ]
    choices = (
        {**place, "method": "abmll", "chosen": tried[0][0], "at_the_end_of": ["method.outer_lr"],
         "tried": [{"values": values, "score": score} for values, score in tried]},
        {**place, "method": "pretrained", "chosen": {}, "at_the_end_of": [], "tried": []},
    )  # fmt: skip
    (table,) = [table for table in all_tables(replace(full, choices=choices)) if table.name == "chosen"]
    setting = "method.outer_lr=0.001, method.beta=1e-09"
    assert cells(table.text, "abmll", setting)[2:] == ["0.2500", "yes, at the end of method.outer_lr"]
    assert cells(table.text, "abmll", "method.outer_lr=0.01, method.beta=1e-09")[2:] == ["NaN", ""]
    assert "pretrained" not in table.text and table.frame["chosen"].tolist() == [True, False]


def test_numbers_as_text():
    nll = next(metric for metric in MAIN if metric.name == "nll_options")
    assert number(0.60249, ACCURACY) == "60.2" and number(0.8124, nll) == "0.812" and number(math.nan, nll) == ""
    row = {"accuracy": 0.602, "accuracy_low": 0.5, "accuracy_high": 0.7}
    assert (
        interval(row, ACCURACY) == "60.2 [50.0, 70.0]" and interval(row, ACCURACY, sign=True) == "+60.2 [+50.0, +70.0]"
    )
    assert interval({**row, "accuracy_low": math.nan}, ACCURACY) == "60.2"
    assert interval({**row, "accuracy": math.nan}, ACCURACY) == "NaN"
    assert markdown([{"a": "1", "b": ""}]) == "| a | b |\n| --- | --- |\n| 1 |  |"


def test_summary_shows_its_numbers(tables):
    row = tables["summary"].frame.set_index(["label", "steps"]).loc[("abmll", 5)]
    found = cells(tables["summary"].text, "abmll", "5")
    bounds = f"[{100 * row['accuracy_low']:.1f}, {100 * row['accuracy_high']:.1f}]"
    assert found[2] == f"{100 * row['accuracy']:.1f} {bounds}"
    pooled = cells(tables["summary"].text, "method", "steps").index("pooled ECE")
    assert found[pooled] == f"{row['pooled_ece']:.3f}"
    assert found[-2:] == ["2", "6"]  # seeds, tasks
    assert "abmll, pruning-0.1" not in tables["summary"].text  # another condition, which has its own table


def test_by_task_marks_wins_losses_and_constant_predictions(tables):
    """On every third made-up task nothing but the commonest label is learned."""
    head = cells(tables["by_task"].text, "task", "n", "majority %")
    ours, theirs = head.index("abmll"), head.index("reptile")
    for task in ("task-0", "task-3"):
        found = cells(tables["by_task"].text, task)
        assert found[ours] == found[theirs] == f"{found[2]} c"
    frame = tables["by_task"].frame.set_index(["label", "task"])
    for task in ("task-1", "task-2"):
        mark = {1: " +", 0: "", -1: " -"}[frame.loc[("abmll", task), "outcome"]]
        assert cells(tables["by_task"].text, task)[ours] == f"{100 * frame.loc[('abmll', task), 'accuracy']:.1f}{mark}"


def test_by_task_names_what_the_marks_are_against(tables, full):
    head = cells(tables["by_task"].text, "task", "n", "majority %")
    frame = tables["by_task"].frame.groupby("label")["baseline"].first()
    against = dict(zip(head, cells(tables["by_task"].text, "minus", "", ""), strict=True))
    assert against["abmll"] == frame["abmll"] != "" and against["lora"] == ""
    (alone,) = [table for table in all_tables(replace(full, baselines=())) if table.name == "by_task"]
    assert "| minus |" not in alone.text


def test_what_diverged_is_nan_in_every_table_and_nothing_is_empty(full):
    """All of one method's first task and seed: its means are none, and no cell reads as if it had not been scored."""
    (run,) = full.runs.index[(full.runs["run_label"] == "abmll") & (full.runs["seed"] == 0)]
    lost = (full.scores["run"] == run) & (full.scores["task"] == "task-1") & (full.scores["steps"] == 5)
    numbers = [*(metric.name for metric in MAIN), "commonest_prediction", *GAPS]
    scores = full.scores.assign(**{name: full.scores[name].mask(lost) for name in numbers})
    made = {table.name: table for table in all_tables(replace(full, scores=scores))}
    head = cells(made["summary"].text, "method", "steps")
    found = dict(zip(head, cells(made["summary"].text, "abmll", "5"), strict=True))
    assert {found[name] for name in ("accuracy %", "ECE", "pooled ECE", "constant %")} == {"NaN"}
    assert found["commonest %"] == cells(made["summary"].text, "lora", "5")[head.index("commonest %")]
    each = cells(made["against_each"].text, "abmll", "lora")
    assert each[2:6] == ["NaN"] * 4
    head = cells(made["by_task"].text, "task", "n", "majority %")
    assert cells(made["by_task"].text, "task-1")[head.index("abmll")] == "NaN -"


def test_costs(tables):
    # 50 outer steps of two episodes and two seconds at 100 tokens a second, K = 5
    assert cells(tables["costs"].text, "abmll")[1:] == ["1.7", "100", "500", "50", "10,000", "1.00", "24", "2"]
    assert cells(tables["costs"].text, "pretrained")[1:] == ["0.0", "0", "0", "0", "0", "", "24", "2"]


def test_variance_is_shown_where_samples_were_drawn(tables):
    text = tables["uncertainty"].text
    assert cells(text, "abmll, samples-8", "5")[-2] != "" and cells(text, "abmll", "5")[-2] == ""


def test_uncertainty_adds_up(tables):
    frame = tables["summary"].frame
    pd.testing.assert_series_equal(frame["refinement"] + frame["calibration"], frame["nll_options"], check_names=False)


def test_files(tables, tmp_path):
    paths = tables["summary"].write(tmp_path)
    assert [path.name for path in paths] == ["summary.md", "summary.csv"]
    assert paths[0].read_text() == tables["summary"].text
    back = pd.read_csv(paths[1])
    pd.testing.assert_frame_equal(back, tables["summary"].frame, rtol=1e-5, check_dtype=False)


def test_papers_figures_stand_beside_ours(tables):
    lines = [line for line in tables["paper"].text.splitlines() if line.startswith("| lora | ")]
    (lora,) = lines
    assert lora.startswith("| lora | 71.4 ± 0.5 | 0.328 ± 0.006 | lora | 5 | ")
    assert "| abmll, 30% pruned | 71.5 ± 0.4 |  | abmll, pruning-0.3 | 5 |" in tables["paper"].text
    assert cells(tables["paper"].text, "structured_lora")[3:] == ["", "", "", ""]  # not among the runs
    assert tables["paper"].frame["beta"].isna().all()  # the paper has it on cls-45 alone


def test_paper_is_matched_by_its_task_sets(full):
    scores = full.scores[(full.scores["score"] == "plain") & (full.scores["steps"] == 5)]
    for name, count in {"cls23": 5, "NLI": 5, "CLS-45": 5, "quickstart": 0}.items():
        found = beside_paper(scores.assign(task_set=name))
        mains = found[found["pruned"].isna() & found["beta"].isna()] if len(found) else found
        assert (mains["paper_method"].nunique() if count else len(found)) == count, name
    beta = beside_paper(scores.assign(task_set="cls-45"))["beta"].dropna()
    assert beta.tolist() == [1, 1e-5, 1e-8, 1e-16]


def test_papers_file_is_whole():
    paper = yaml.safe_load((files("abmll.compare") / "paper.yaml").read_text())
    methods = ["pretrained", "lora", "structured_lora", "reptile", "abmll"]
    assert list(paper["scores"]) == list(paper["pruning"]) == ["cls-45", "cls-23", "nli", "para", "mcqa"]
    for task_set in paper["scores"]:
        assert list(paper["scores"][task_set]) == list(paper["pruning"][task_set]) == methods
        assert all(len(values) == len(paper["pruned"]) for values in paper["pruning"][task_set].values())
    # the mean over task sets, added up from the paper's Table 1
    accuracy = {m: sum(found[m]["accuracy"][0] for found in paper["scores"].values()) / 5 for m in methods}
    assert accuracy == pytest.approx(
        {"pretrained": 47.7, "lora": 71.5, "structured_lora": 70.5, "reptile": 73.7, "abmll": 73.94}
    )
