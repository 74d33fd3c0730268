from __future__ import annotations

import json
import math

import pandas as pd
import pytest
from made_up import BATCH_SIZE, PARAMETERS, examples_of, listed_run, steps_of, write_comparison, write_run

from abmll.compare.results import condition, load_results, parse_name

TWO = [[0.8, 0.2], [0.6, 0.4]]


def test_scores_of_a_run(tmp_path):
    """One of two right: the metrics of test_metrics.py, and the error is the less sure one of the two."""
    write_run(
        tmp_path / "runs/abmll/default/seed-0",
        "abmll",
        {"scores/plain": examples_of(TWO, [0, 1], variance=[0.03, 0.01])},
    )
    write_comparison(tmp_path, [listed_run("abmll")])
    found = load_results(tmp_path)
    (row,) = found.scores.to_dict("records")
    assert (row["label"], row["method"], row["steps"], row["task"], row["n"]) == ("abmll", "abmll", 5, "task", 2)
    assert row["accuracy"] == 0.5 and row["ece"] == pytest.approx((0.2 + 0.6) / 2)
    # calibrated answers of these confidences, alone in their bins: the mean of 2 p (1 - p)
    assert row["ece_excess"] == pytest.approx(row["ece"] - (0.8 * 0.2 + 0.6 * 0.4))
    assert row["nll_options"] == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)
    assert row["aurc"] == pytest.approx((0 + 1 / 2) / 2) and row["commonest_prediction"] == 1
    assert (row["auroc_confidence"], row["auroc_variance"], row["auroc_mutual_information"]) == (1, 0, 0)
    assert found.baselines == ("pretrained", "lora", "reptile") and not found.skipped


def test_only_the_own_method_on_test_tasks_counts(tmp_path):
    own = examples_of(TWO, [0, 0])
    beside = examples_of(TWO, [1, 1], method="pretrained")
    frame = pd.concat([own, beside, examples_of(TWO, [1, 1]).assign(split="validation")])
    write_run(tmp_path / "runs/abmll-weight/default/seed-0", "abmll", {"scores/plain": frame})
    write_run(tmp_path / "runs/pretrained/default/seed-0", "pretrained", {"scores/plain": beside})
    write_comparison(tmp_path, [listed_run("abmll-weight"), listed_run("pretrained")])
    found = load_results(tmp_path)
    assert found.scores.set_index("label")["accuracy"].to_dict() == {"abmll-weight": 1.0, "pretrained": 0.0}
    assert len(found.predictions) == 4


def test_what_is_not_there_is_left_out_and_told(tmp_path):
    write_run(tmp_path / "runs/abmll/default/seed-0", "abmll", {"scores/plain": examples_of(TWO, [0, 1])})
    write_comparison(tmp_path, [listed_run("abmll", scores=["plain", "samples-8"]), listed_run("lora", 1)])
    found = load_results(tmp_path)
    assert found.skipped == (
        "runs/abmll/default/seed-0: not scored as samples-8",
        "runs/lora/default/seed-1: not finished",
    )
    assert found.runs["run_label"].tolist() == ["abmll"]


def test_a_run_without_scores_is_not_finished(tmp_path):
    """Training wrote a summary, and was stopped before it scored."""
    for method in ("abmll", "lora"):
        write_run(tmp_path / f"runs/{method}/default/seed-0", method, {"scores/plain": examples_of(TWO, [0, 1])})
    path = tmp_path / "runs/lora/default/seed-0/final/summary.json"
    facts = json.loads(path.read_text())
    del facts["scores"]
    path.write_text(json.dumps(facts))
    write_comparison(tmp_path, [listed_run("abmll"), listed_run("lora")])
    found = load_results(tmp_path)
    assert found.skipped == ("runs/lora/default/seed-0: not finished",) and set(found.scores["method"]) == {"abmll"}


def test_nothing_to_read_is_the_users_mistake(tmp_path):
    with pytest.raises(ValueError, match=r"no comparison\.json"):
        load_results(tmp_path)
    write_comparison(tmp_path, [listed_run("lora")])
    with pytest.raises(ValueError, match="none of 1 runs is finished"):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("method", "inner", "outer"), [("abmll", 20 * 5, 10), ("lora", 0, 10 * 5), ("pretrained", 0, 0)]
)
def test_costs_by_hand(tmp_path, method, inner, outer):
    """Ten outer steps of two episodes and two seconds, at 100 tokens a second, with K = 5."""
    lines = [] if method == "pretrained" else steps_of(10)
    frame = examples_of(TWO, [0, 1], method=method)
    write_run(tmp_path / f"runs/{method}/default/seed-0", method, {"scores/plain": frame}, lines)
    write_comparison(tmp_path, [listed_run(method)])
    (row,) = load_results(tmp_path).costs.to_dict("records")
    assert (row["inner_steps"], row["outer_steps"], row["parameters"]) == (inner, outer, PARAMETERS)
    if lines:
        assert (row["seconds"], row["episodes"], row["tokens"]) == (20, 20, 2000)
        assert row["peak_memory_bytes"] == 10**9 + 10
    else:
        assert (row["seconds"], row["episodes"], row["tokens"]) == (0, 0, 0) and math.isnan(row["peak_memory_bytes"])


def test_curves_hold_steps_and_validations_at_their_episode(tmp_path):
    lines = steps_of(10)
    write_run(tmp_path / "runs/abmll/default/seed-0", "abmll", {"scores/plain": examples_of(TWO, [0, 1])}, lines)
    write_comparison(tmp_path, [listed_run("abmll")])
    curves = load_results(tmp_path).curves
    validated = curves[curves["accuracy"].notna()]
    assert validated["episode"].tolist() == [10, 20]
    wanted = [line["validation_5_steps"]["accuracy"] for line in lines if "validation_5_steps" in line]
    assert validated["accuracy"].tolist() == wanted and validated["nll"].isna().all()


@pytest.mark.parametrize(("reduction", "summed"), [("sum", BATCH_SIZE), ("mean", 1)])
def test_a_curves_nll_is_an_examples_whatever_the_objective_sums(tmp_path, reduction, summed):
    lines = steps_of(4)
    config = {"method": {"nll_reduction": reduction}}
    scores = {"scores/plain": examples_of(TWO, [0, 1])}
    write_run(tmp_path / "runs/abmll/default/seed-0", "abmll", scores, lines, config=config)
    write_comparison(tmp_path, [listed_run("abmll")])
    found = load_results(tmp_path).curves["nll"]
    assert found.tolist() == [line["nll_last"] / summed for line in lines]


def test_labels_name_settings_and_scores_that_do_not_go_without_saying(tmp_path):
    runs = [listed_run("abmll", setting=setting, scores=["plain", "samples-8"]) for setting in ("default", "beta-1e-8")]
    for run in runs:
        scores = {place: examples_of(TWO, [0, 1]) for place in run["scores"].values()}
        write_run(tmp_path / run["folder"], "abmll", scores)
    write_comparison(tmp_path, runs)
    found = load_results(tmp_path)
    assert found.runs["run_label"].tolist() == ["abmll", "abmll, beta-1e-8"]
    labels = ["abmll", "abmll, samples-8", "abmll, beta-1e-8", "abmll, beta-1e-8, samples-8"]
    assert found.scores["label"].tolist() == labels


@pytest.mark.parametrize(
    ("name", "sweep", "value", "under"),
    [
        ("plain", "plain", None, "standard"),
        ("temperature", "temperature", None, "standard"),
        ("samples-8", "samples", 8, "standard"),
        ("pruning-0.01", "pruning", 0.01, "pruning-0.01"),
        ("support-4", "support", 4, "support-4"),
        ("beta-1e-8", "beta", 1e-8, "beta-1e-8"),
        ("c--20", "c", -20, "c--20"),
        ("active-4-random", "active-4-random", None, "active-4"),
        ("pruning-0.1-temperature", "pruning-0.1-temperature", None, "pruning-0.1"),
        ("leave-one-out", "leave-one-out", None, "standard"),
    ],
)
def test_names(name, sweep, value, under):
    found = parse_name(name)
    assert found[0] == sweep and condition(name) == under
    assert math.isnan(found[1]) if value is None else found[1] == value
