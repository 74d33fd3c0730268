from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from made_up import drawn, listed_run, write_comparison, write_run

from abmll.compare.calibration import GAPS
from abmll.compare.estimates import (
    MAIN,
    TESTED,
    UNCERTAINTY,
    adapted,
    against_baseline,
    against_each,
    beatable,
    by_task,
    summary,
    sweeps,
    under_conditions,
)
from abmll.compare.results import condition, load_results
from abmll.compare.statistics import estimate, holm, permutation_p
from abmll.config.schema import MethodConfig

METRICS = [metric.name for metric in (*MAIN, *UNCERTAINTY)] + ["accuracy_vocabulary", "ece_paper", *GAPS]


def rows(
    label: str, values: list[list[float]], method: str | None = None, score: str = "plain", steps: int = 5, **more
):
    """Scores of a label: values[task][seed] is every metric's value; the majority share is a half."""
    return pd.DataFrame(
        [
            {
                "task_set": "cls-23",
                "model": "tiny",
                "method": method or label,
                "run_label": label,
                "setting": "default",
                "label": label if score == "plain" else f"{label}, {score}",
                "score": score,
                "condition": condition(score),
                "seed": seed,
                "steps": steps,
                "task": f"task-{task}",
                **{name: value for name in METRICS},
                "majority": 0.5,
                "commonest_prediction": 0.7,
                "n": 20,
                **more,
            }
            for task, seeds in enumerate(values)
            for seed, value in enumerate(seeds)
        ]
    )


BASE = [[0.4, 0.4], [0.5, 0.7], [0.3, 0.3], [0.6, 0.4]]  # by task .4 .6 .3 .5
OURS = [[0.6, 0.6], [0.6, 0.6], [0.5, 0.1], [0.8, 0.8]]  # by task .6 .6 .3 .8


def test_mean_over_seeds_then_tasks_with_the_tasks_interval():
    (row,) = summary(rows("abmll", [*OURS, [0.2, 0.4], [0.9, 0.9], [0.1, 0.1]])).to_dict("records")
    assert (row["seeds"], row["tasks"]) == (2, 7)
    by_hand = np.array([0.6, 0.6, 0.3, 0.8, 0.3, 0.9, 0.1])
    assert row["accuracy"] == pytest.approx(by_hand.mean())
    assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx(estimate(by_hand)[1:])
    seeds = np.array([(0.6 + 0.6 + 0.5 + 0.8 + 0.2 + 1.0) / 7, (0.6 + 0.6 + 0.1 + 0.8 + 0.4 + 1.0) / 7])
    assert row["accuracy_seed_sd"] == pytest.approx(seeds.std(ddof=1))


def test_beatable_tasks_are_those_that_some_row_beats():
    scores = pd.concat([rows("lora", BASE), rows("abmll", OURS)])
    assert beatable(scores) == ["task-0", "task-1", "task-3"]
    found = summary(scores).set_index("label")
    assert (found["beatable_tasks"] == 3).all()
    assert found.loc["abmll", "beatable_accuracy"] == pytest.approx((0.6 + 0.6 + 0.8) / 3)
    assert math.isnan(summary(rows("abmll", [[0.5], [0.2]])).loc[0, "beatable_accuracy"])


def test_every_condition_has_rows_of_its_own():
    """Beside the standard one's, and of tasks that none of it was scored on."""
    validation = rows("abmll", [[0.2], [0.4]], score="validation-1-mean")
    scores = pd.concat([rows("abmll", OURS), validation])
    assert summary(scores)["label"].tolist() == ["abmll"]
    (row,) = under_conditions(scores).to_dict("records")
    assert (row["condition"], row["label"], row["tasks"]) == ("validation-1", "abmll, validation-1-mean", 2)
    assert row["accuracy"] == pytest.approx(0.3)
    assert under_conditions(rows("abmll", OURS)).empty


def test_share_of_constant_tasks_is_a_mean_over_seeds_as_scores_are():
    """Two of two seeds of one task of four, and one of two of another; more seeds alone do not lower it."""
    scores = rows("abmll", OURS)
    scores.loc[
        (scores["task"] == "task-0") | ((scores["task"] == "task-1") & (scores["seed"] == 1)), "commonest_prediction"
    ] = 1
    assert summary(scores).loc[0, "constant"] == (1 + 0.5) / 4


def test_difference_to_the_best_baseline():
    """The best by accuracy is the one of the largest mean, by NLL the one of the smallest; tasks are paired."""
    worse = [[value - 0.1 for value in seeds] for seeds in BASE]
    scores = pd.concat([rows("lora", BASE), rows("reptile", worse), rows("abmll", OURS), rows("abmll", BASE, steps=0)])
    found = against_baseline(scores, ("lora", "reptile")).set_index("metric")
    assert set(found["label"]) == {"abmll"} and len(found) == len(TESTED)
    accuracy, nll = found.loc["accuracy"], found.loc["nll_options"]
    by_hand = np.array([0.2, 0.0, 0.0, 0.3])
    assert accuracy["baseline"] == "lora" and accuracy["difference"] == pytest.approx(by_hand.mean())
    assert (accuracy["wins"], accuracy["ties"], accuracy["losses"], accuracy["tasks"]) == (2, 2, 0, 4)
    assert accuracy["p"] == pytest.approx(permutation_p(by_hand)) == pytest.approx(0.5)
    assert nll["baseline"] == "reptile" and (nll["wins"], nll["losses"]) == (0, 4)
    np.testing.assert_allclose(found["p_holm"], holm(found["p"].to_numpy()))


def test_the_best_baseline_is_that_on_the_seeds_of_all():
    """Seed 0 is the easier one; a baseline that was run on it alone is not better for that."""
    easy = rows("reptile", [[value - 0.05 for value in seeds] for seeds in BASE])
    easy = easy[easy["seed"] == 0]
    scores = pd.concat([rows("lora", [[high + 0.1, low - 0.3] for high, low in BASE]), easy, rows("abmll", OURS)])
    means = scores.groupby("label")["accuracy"].mean()
    assert means["reptile"] > means["lora"]
    found = against_baseline(scores, ("lora", "reptile")).set_index("metric")
    assert found.loc["accuracy", "baseline"] == "lora" and found.loc["accuracy", "seeds"] == 2


def test_the_commonest_answer_stands_beside_the_means():
    scores = rows("abmll", OURS)
    scores["majority"] = scores["task"].map({f"task-{n}": share for n, share in enumerate((0.5, 0.6, 0.9, 1.0))})
    assert summary(scores).loc[0, "commonest"] == pytest.approx(0.75)


def test_like_is_compared_with_like():
    """Pruned against the best pruned baseline, plain against all corrections; none where no baseline was."""
    low = [[0.1, 0.1]] * 4
    scores = pd.concat(
        [
            rows("lora", BASE),
            rows("lora", low, score="pruning-0.1"),
            rows("lora", OURS, score="temperature"),
            *(rows("abmll", OURS, score=score) for score in ("plain", "pruning-0.1", "pruning-0.2")),
        ]
    )
    found = against_baseline(scores, ("lora",))
    accuracy = found[found["metric"] == "accuracy"].set_index("label")["baseline"].to_dict()
    assert accuracy == {"abmll": "lora, temperature", "abmll, pruning-0.1": "lora, pruning-0.1"}


def test_ways_to_do_the_same_compete():
    """Four labels each: the best baseline's way is the rival of all of ours, and each is held against our first."""
    scores = pd.concat(
        [
            rows("lora", BASE, score="active-4-random"),
            rows("lora", OURS, score="active-4-entropy"),
            rows("abmll", BASE, score="active-4-random"),
            rows("abmll", OURS, score="active-4-variance"),
            rows("abmll", OURS),
        ]
    )
    best = against_baseline(scores, ("lora",)).query("metric == 'accuracy'").set_index("label")["baseline"].to_dict()
    assert best == {label: "lora, active-4-entropy" for label in ("abmll, active-4-random", "abmll, active-4-variance")}
    each = against_each(scores, ("lora",)).query("metric == 'accuracy'").set_index(["label", "rival"])["difference"]
    assert each.to_dict() == {
        ("lora, active-4-entropy", "lora, active-4-random"): pytest.approx(0.125),
        ("abmll, active-4-variance", "abmll, active-4-random"): pytest.approx(0.125),
        ("abmll, active-4-random", "lora, active-4-random"): 0,
        ("abmll, active-4-variance", "lora, active-4-random"): pytest.approx(0.125),
        ("abmll, active-4-random", "lora, active-4-entropy"): pytest.approx(-0.125),
        ("abmll, active-4-variance", "lora, active-4-entropy"): 0,
    }


def test_only_tasks_and_seeds_of_both_are_paired():
    """Seed 1 of the baseline and task 0 of ours are not there: tasks 1 to 3 of seed 0 are left."""
    theirs, ours = rows("lora", BASE), rows("abmll", OURS)
    scores = pd.concat([theirs[theirs["seed"] == 0], ours[ours["task"] != "task-0"]])
    for frame in (against_baseline(scores, ("lora",)), against_each(scores, ("lora",))):
        row = frame[frame["metric"] == "accuracy"].iloc[0]
        assert row["difference"] == pytest.approx(((0.6 - 0.5) + (0.5 - 0.3) + (0.8 - 0.6)) / 3)
        assert (row["tasks"], row["seeds"], row["wins"]) == (3, 1, 3)
    outcome = by_task(scores, ("lora",)).set_index(["label", "task"])["outcome"]
    assert outcome["abmll"].to_dict() == {"task-1": 1, "task-2": 1, "task-3": 1}
    apart = pd.concat([theirs[theirs["seed"] == 0], ours[ours["seed"] == 1]])
    assert against_baseline(apart, ("lora",)).empty and against_each(apart, ("lora",)).empty


def test_a_method_that_diverged_is_nobodys_best_and_has_no_mean():
    broken = [[math.nan, 0.9], [0.9, 0.9], [0.9, 0.9], [0.9, 0.9]]
    scores = pd.concat([rows("lora", BASE), rows("reptile", broken), rows("abmll", broken)])
    found = summary(scores).set_index("label")
    assert math.isnan(found.loc["abmll", "accuracy"]) and not math.isnan(found.loc["lora", "accuracy"])
    against = against_baseline(scores, ("lora", "reptile"))
    assert set(against["baseline"]) == {"lora"}
    assert against[["difference", "p", "p_holm"]].isna().all(axis=None)
    row = against[against["metric"] == "accuracy"].iloc[0]
    assert row["losses"] >= 1 and row[["wins", "ties", "losses"]].sum() == 4  # the task that diverged is one of them
    assert by_task(scores, ("lora",)).set_index(["label", "task"]).loc[("abmll", "task-0"), "outcome"] == -1
    assert math.isnan(found.loc["abmll", "accuracy_seed_sd"])


def test_what_diverged_in_a_seed_is_neither_constant_nor_beats_anything():
    """The other seed alone says nothing of the mean over both; the commonest answer depends on the labels alone."""
    scores = pd.concat([rows("lora", BASE), rows("abmll", OURS)])
    lost = (scores["label"] == "abmll") & (scores["task"] == "task-3") & (scores["seed"] == 0)
    names = [*(metric.name for metric in MAIN), "commonest_prediction"]
    scores.loc[scores["task"] == "task-3", "commonest_prediction"] = 1
    scores.loc[lost, names] = math.nan
    assert beatable(scores) == ["task-0", "task-1"]
    found = summary(scores).set_index("label")
    assert math.isnan(found.loc["abmll", "constant"]) and found.loc["lora", "constant"] == 0.25
    assert (found["commonest"] == 0.5).all()
    tasks = by_task(scores, ("lora",)).set_index(["label", "task"])
    assert not tasks.loc[("abmll", "task-3"), "constant"] and tasks.loc[("lora", "task-3"), "constant"]


def test_tasks_without_errors_are_left_out_of_an_auroc():
    scores = rows("abmll", OURS)
    scores.loc[scores["task"] == "task-0", "auroc_variance"] = math.nan
    assert summary(scores).loc[0, "auroc_variance"] == pytest.approx((0.6 + 0.3 + 0.8) / 3)


def test_wins_and_losses_by_task():
    scores = pd.concat([rows("lora", BASE), rows("abmll", OURS)])
    scores.loc[scores["task"] == "task-2", "commonest_prediction"] = 1
    found = by_task(scores, ("lora",)).set_index(["label", "task"])
    assert found.loc["abmll", "outcome"].tolist() == [1, 0, 0, 1]
    assert found.loc["lora", "outcome"].isna().all()
    assert (found.loc["abmll", "baseline"] == "lora").all() and (found.loc["lora", "baseline"] == "").all()
    assert found.loc["abmll", "constant"].tolist() == [False, False, True, False]
    assert found.loc["abmll", "accuracy"].tolist() == pytest.approx([0.6, 0.6, 0.3, 0.8])


def test_a_settings_outcome_is_against_the_baselines_own_setting():
    longer = {"setting": "episodes-9"}
    scores = pd.concat(
        [
            rows("lora", BASE),
            rows("abmll", OURS),
            rows("lora, episodes-9", OURS, method="lora", **longer),
            rows("abmll, episodes-9", BASE, method="abmll", **longer),
        ]
    )
    found = by_task(scores, ("lora",)).set_index(["label", "task"])["outcome"]
    assert found["abmll"].tolist() == [1, 0, 0, 1] and found["abmll, episodes-9"].tolist() == [-1, 0, 0, -1]


def test_no_baseline_no_comparison():
    assert against_baseline(rows("abmll", OURS), ("lora",)).empty
    assert by_task(rows("abmll", OURS), ("lora",))["outcome"].isna().all()


def test_sweeps(full):
    found = sweeps(full)
    assert list(found) == ["beta", "pruning", "samples"]
    assert found["beta"]["line"].tolist() == ["abmll"] * 4
    assert found["beta"]["value"].tolist() == [1e-14, 1e-12, 1e-10, MethodConfig().beta]  # the default run's last
    plain = summary(full.scores).set_index(["label", "steps"])["accuracy"]
    assert found["beta"]["accuracy"].tolist() == [
        plain[label, 5] for label in ("abmll, beta-1e-14", "abmll, beta-1e-12", "abmll, beta-1e-10", "abmll")
    ]
    pruning = found["pruning"].set_index(["line", "value"])["accuracy"]
    assert pruning["lora"].index.tolist() == [0, 0.01, 0.1, 0.2, 0.3]
    assert pruning["lora", 0] == plain["lora", 5]
    assert found["samples"].set_index("line").loc["abmll", "value"].tolist() == [0, 8]


def test_a_sweep_of_a_setting_has_a_line_a_method_and_score_and_the_default_at_its_own_value(tmp_path):
    """c of the default runs is -20; reptile, which has the key and no other c, is no line."""
    runs = [listed_run("reptile")]
    runs += [listed_run("abmll", setting=name, scores=["plain", "samples-8"]) for name in ("default", "c--12", "c--6")]
    for run in runs:
        frame = drawn(run["method"], 0, 1.0, 5, tasks=2, n=8)
        c = float(run["setting"].removeprefix("c-")) if run["setting"] != "default" else -20.0
        own = {"adapters": {"log_variance_offset": c}, "method": {"beta": 1e-8}}
        write_run(
            tmp_path / run["folder"], run["method"], {place: frame for place in run["scores"].values()}, config=own
        )
    write_comparison(tmp_path, runs)
    found = sweeps(load_results(tmp_path))
    lines = found["c"].groupby("line")["value"].apply(list).to_dict()
    assert lines == {"abmll": [-20, -12, -6], "abmll, samples-8": [-20, -12, -6]}
    pruned = [run | {"scores": {**run["scores"], "pruning-0.3": run["scores"]["plain"]}} for run in runs[:1]]
    facts = tmp_path / runs[0]["folder"] / "final/summary.json"
    old = json.loads(facts.read_text())
    del old["config"]["eval"]["prune"]  # a run of before there was pruning: it has none
    facts.write_text(json.dumps(old))
    write_comparison(tmp_path, pruned)
    assert sweeps(load_results(tmp_path))["pruning"]["value"].tolist() == [0, 0.3]
    samples = found["samples"].groupby("line")["value"].apply(list).to_dict()
    assert samples == {name: [0, 8] for name in ("abmll", "abmll, c--12", "abmll, c--6")}


@pytest.mark.parametrize("rate", ["inner_lr", "outer_lr", "test_lr"])
def test_a_sweep_of_a_rate_has_the_default_at_its_own(tmp_path, rate):
    runs = [listed_run("abmll", setting=name) for name in ("default", f"{rate}-3e-3")]
    for run, value in zip(runs, (1e-3, 3e-3), strict=True):
        frame = drawn("abmll", 0, 1.0, 5, tasks=2, n=8)
        write_run(tmp_path / run["folder"], "abmll", {"scores/plain": frame}, config={"method": {rate: value}})
    write_comparison(tmp_path, runs)
    assert sorted(sweeps(load_results(tmp_path))[rate]["value"]) == [1e-3, 3e-3]


def test_the_plain_score_stands_at_its_own_number_of_steps(tmp_path):
    """K = 5 where test_steps says nothing, and not where a point of the sweep is there already; other names: none."""
    run = listed_run("lora", scores=["plain", "steps-1", "depth-2"])
    for method, own in (("lora", {}), ("reptile", {"method": {"test_steps": 1}})):
        frame = drawn(method, 0, 1.0, 5, tasks=2, n=8)
        places = {place: frame for place in run["scores"].values()}
        write_run(tmp_path / run["folder"].replace("lora", method), method, places, config=own)
    write_comparison(tmp_path, [run, listed_run("reptile", scores=["plain", "steps-1"])])
    found = sweeps(load_results(tmp_path))
    assert found["steps"].groupby("line")["value"].apply(list).to_dict() == {"lora": [1, 5], "reptile": [1]}
    assert found["depth"]["value"].tolist() == [2]


def test_a_setting_is_held_against_its_methods_default_by_the_same_score(full):
    found = against_each(full.scores, full.baselines)
    pairs = set(zip(found["label"], found["rival"], strict=True))
    assert ("abmll, beta-1e-10", "abmll") in pairs and ("abmll, beta-1e-14", "abmll") in pairs
    assert not {("abmll", "abmll, beta-1e-10"), ("abmll, beta-1e-10", "abmll, beta-1e-14")} & pairs
    assert not {(label, rival) for label, rival in pairs if "beta" in label and rival == "abmll, samples-8"}


def test_every_method_is_held_against_the_label_counts():
    names = ("frequencies", "lora", "reptile", "abmll")
    frame = pd.concat([rows(name, OURS if name == "abmll" else BASE) for name in names])
    pairs = set(against_each(frame, names[:3])[["label", "rival"]].itertuples(index=False, name=None))
    own = {("abmll", rival) for rival in names[:3]}
    assert pairs == own | {("lora", "frequencies"), ("reptile", "frequencies")}


def test_a_setting_of_both_is_held_against_the_baselines_same_setting():
    """With an eighth of the budget neither is held against the other's whole one; what the baseline lacks, is."""
    worse = [[value - 0.3 for value in seeds] for seeds in BASE]
    ours, theirs = ("abmll", OURS), ("lora", BASE)
    scores = [rows(name, of) for name, of in (ours, theirs)]
    scores += [rows(f"{name}, short", worse, method=name, setting="short") for name, _ in (ours, theirs)]
    scores.append(rows("abmll, own", OURS, method="abmll", setting="own"))
    frame = pd.concat(scores)
    pairs = set(against_each(frame, ("lora",))[["label", "rival"]].itertuples(index=False, name=None))
    against_own_default = {("abmll, short", "abmll"), ("abmll, own", "abmll"), ("lora, short", "lora")}
    assert pairs - against_own_default == {("abmll", "lora"), ("abmll, short", "lora, short"), ("abmll, own", "lora")}
    best = against_baseline(frame, ("lora",)).groupby("label")["baseline"].unique()
    assert {label: list(found) for label, found in best.items()} == {
        "abmll": ["lora"],
        "abmll, short": ["lora, short"],
        "abmll, own": ["lora"],
    }


def test_under_a_condition_baselines_are_those_of_the_same_condition(full):
    found = against_each(full.scores, full.baselines)
    pairs = set(zip(found["label"], found["rival"], strict=True))
    assert ("abmll, pruning-0.1", "lora, pruning-0.1") in pairs
    assert not {("abmll, pruning-0.1", "lora"), ("abmll, pruning-0.1", "lora, pruning-0.2")} & pairs
    assert not {("abmll", "lora, pruning-0.1"), ("lora, pruning-0.1", "abmll, pruning-0.1")} & pairs


def test_each_label_is_held_against_every_baseline_and_its_own_plain_score(full):
    found = against_each(full.scores, full.baselines)
    own = found[(found["task_set"] == found["task_set"].iloc[0]) & (found["model"] == found["model"].iloc[0])]
    pairs = set(zip(own["label"], own["rival"], strict=True))
    assert ("abmll", "lora") in pairs and ("abmll", "pretrained") in pairs and ("lora", "abmll") not in pairs
    assert ("lora", "pretrained") not in pairs and all(label != rival for label, rival in pairs)
    with_samples = [pair for pair in pairs if pair[0].startswith("abmll, samples") and pair[1] == "abmll"]
    assert with_samples and ("abmll", with_samples[0][0]) not in pairs
    row = own[(own["label"] == "abmll") & (own["rival"] == "lora") & (own["metric"] == "nll_options")].iloc[0]
    scores = adapted(full.scores)
    scores = scores[(scores["task_set"] == row["task_set"]) & (scores["model"] == row["model"])]
    means = [scores[scores["label"] == label].groupby("task")["nll_options"].mean() for label in ("abmll", "lora")]
    assert row["difference"] == pytest.approx((means[0] - means[1]).mean())
    assert row["wins"] == (means[0] < means[1]).sum() and row["p_holm"] >= row["p"]
