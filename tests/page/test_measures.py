"""The tables' numbers against hand arithmetic."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from made_runs import evaluation, step_lines, write_run

from abmll.compare.statistics import wilson
from abmll.page.facts import read_run, read_runs
from abmll.page.measures import (
    all_scored,
    configurations,
    costs,
    examples,
    interval,
    mean_aurc,
    over_tasks,
    task_scores,
    thinned,
    training_tasks,
)


def by_hand(right: int, n: int) -> tuple[float, float]:
    """Wilson, 1927: (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)."""
    z, p = 1.959963984540054, right / n
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return tuple((p + z**2 / (2 * n) + sign * half) / (1 + z**2 / n) for sign in (-1, 1))


@pytest.mark.parametrize("right, n", [(3, 4), (0, 10), (10, 10), (17, 40)])
def test_wilsons_interval(right, n):
    found = wilson(right / n, n)
    assert found.mean == right / n
    assert (found.low, found.high) == pytest.approx(by_hand(right, n), abs=1e-12)


def test_a_task_has_accuracy_and_nll_with_intervals(tmp_path):
    (scored, _) = all_scored(read_runs([write_run(tmp_path / "run")]))
    assert scored.label == "abmll, 0 steps" and not scored.adapted
    found = task_scores(scored, "first task")
    assert found.n == 4 and found.accuracy[0] == 0.75
    assert found.accuracy[1:] == pytest.approx(by_hand(3, 4))
    nll = [-math.log(p) for p in (0.9, 0.8, 0.7, 0.4)]
    assert found.nll.mean == pytest.approx(sum(nll) / 4)
    assert math.isnan(found.nll.low)  # of four examples there is none
    assert task_scores(scored, "third task") is None
    assert over_tasks(scored, "accuracy").mean == 0.625  # of 0.75 and 0.5, whatever their sizes


def test_a_tasks_nll_has_an_interval_over_its_examples(tmp_path):
    shares = (0.9, 0.8, 0.7, 0.6, 0.55, 0.4, 0.3)
    folder = write_run(tmp_path / "run", evaluations=[evaluation(tasks={"one": tuple((p, 0) for p in shares)})])
    found = task_scores(all_scored([read_run(folder, "run")])[0], "one").nll
    nll = [-math.log(p) for p in shares]
    assert found.mean == pytest.approx(sum(nll) / 7)
    assert min(nll) < found.low < found.mean < found.high < max(nll)


def test_without_predictions_only_wilsons_interval_is_known(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "predictions.parquet").unlink()
    scored = all_scored([read_run(folder, "run")])[0]
    found = task_scores(scored, "first task")
    assert found.accuracy[1:] == pytest.approx(by_hand(3, 4)) and math.isnan(found.nll.low)
    assert interval(found.nll, 1, 3) == ("0.400", "") and examples([scored]).empty


def test_a_diverged_task_is_nan_and_drawn_nowhere(tmp_path):
    tasks = {"good": ((0.9, 0), (0.8, 0)), "bad": ((math.nan, 0), (0.8, 0))}
    folder = write_run(tmp_path / "run", evaluations=[evaluation(tasks=tasks)])
    scored = all_scored([read_run(folder, "run")])[1]
    assert interval(task_scores(scored, "bad").accuracy, 100, 1) == ("–", "")
    assert math.isnan(over_tasks(scored, "nll").mean) and math.isnan(mean_aurc(scored))
    assert examples([scored])["task"].unique().tolist() == ["good"]


def test_examples_and_aurc(tmp_path):
    scored = all_scored([read_run(write_run(tmp_path / "run"), "run")])[1]
    found = examples([scored])
    assert found["confidence"].tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.75, 0.75])
    assert found["correct"].tolist() == [True, True, True, False, True, False]
    # errors among the surest 1, 2, 3, 4: 0, 0, 0, 1/4; of two equally sure ones, half is wrong at either coverage
    assert mean_aurc(scored) == pytest.approx((0.25 / 4 + 0.5) / 2)


def test_labels_tell_several_runs_apart(tmp_path):
    evaluations = [evaluation("pretrained", steps=(0,)), evaluation(steps=(0, 2))]
    folders = [write_run(tmp_path / name, evaluations=evaluations) for name in ("one", "two")]
    labels = [scored.label for scored in all_scored(read_runs(folders))]
    assert labels[:3] == ["one: pretrained, 0 steps", "one, 0 steps", "one, 2 steps"]
    assert len(set(labels)) == 6


def test_costs(tmp_path):
    found = costs(read_run(write_run(tmp_path / "run"), "run"))
    assert found["training time"] == "0:00:02" and found["tokens/s"] == "100" and found["tokens in all"] == "200"
    assert found["padding, share of the rows"] == "20.0 %" and found["peak memory"] == "1.00 GiB"
    assert found["episodes skipped for NaN or Inf"] == "1" and found["episodes"] == "4"
    assert costs(read_run(write_run(tmp_path / "untrained", lines=[]), "run")) == {}


def test_training_by_task_is_of_the_last_tenth_of_its_finite_episodes(tmp_path):
    own = [{"task": "x", "finite": True, "nll_first": float(k), "nll_last": k / 2} for k in range(20)]
    lines = [*own, {"task": "x", "finite": False}, {"task": "y", "finite": False}]
    found = training_tasks(read_run(write_run(tmp_path / "run", episodes=lines), "run"))
    assert found == [
        {"task": "x", "episodes": "21", "skipped": "1", "nll_first": "18.500", "nll_last": "9.250"},
        {"task": "y", "episodes": "1", "skipped": "1", "nll_first": "–", "nll_last": "–"},
    ]


def test_a_curve_keeps_its_end_and_few_points():
    values = pd.Series(range(1000), index=range(1, 1001), dtype=float)
    found = thinned(values, 10)
    assert 400 <= len(found) <= 800 and found.index[-1] == 1000 and found.iloc[-1] == 994.5
    assert thinned(values.head(3), 2).tolist() == [0.0, 0.5, 1.5]


def test_configurations_mark_what_is_no_default(tmp_path):
    hub = {"mine": {"path": "p", "input": "{x}", "options": ["a", "b"], "label": "y"}}
    one = write_run(tmp_path / "one", tasks={"source": "hub", "hub": hub, "train": ["mine"], "test": ["mine"]})
    two = write_run(tmp_path / "two", adapters={"rank": 8})
    rows = {row["key"]: row for row in configurations(read_runs([one, two]))}
    assert rows["adapters.rank"] == {
        "key": "adapters.rank",
        "default": "8",
        "values": ["2", "8"],
        "changed": [True, False],
        "differ": True,
    }
    assert rows["eval.tfb.samples"]["changed"] == [False, False] and not rows["method.beta"]["differ"]
    assert rows["model.name"]["default"] == "–" and '"path": "p"' in rows["tasks.hub.mine"]["values"][0]
    assert rows["tasks.hub.mine"]["values"][1] == "–"


def test_an_older_runs_key_without_a_default_is_kept(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {name: x}\neval: {gone: 3}\n")
    rows = {row["key"]: row for row in configurations([read_run(tmp_path, "run")])}
    assert rows["eval.gone"]["values"] == ["3"] and rows["eval.gone"]["changed"] == [True]
    assert rows["method.inner_steps"]["values"] == ["5"]  # not in the file: the default


def test_lines_of_an_older_version_are_enough(tmp_path):
    lines = [
        {name: line[name] for name in ("step", "episode", "seconds", "real_tokens_per_second", "peak_memory_bytes")}
        for line in step_lines()
        if "seconds" in line
    ]
    found = costs(read_run(write_run(tmp_path / "run", lines), "run"))
    assert found["padding, share of the rows"] == "–" and found["tokens in all"] == "200"
