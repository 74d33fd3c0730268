"""Choosing settings: the best mean over seeds, from validation tasks, written down with what was tried."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from abmll.compare.load import load_comparison
from abmll.compare.runner import Outcome
from abmll.compare.tuning import best, choose, write_choices
from abmll.config import Refused, load_config, override_texts

CONFIG = Path(__file__).parents[2] / "configs/cls23.yaml"
TEXT = f"""
name: some
config: {CONFIG}
output: out
methods: {{lora: {{method.name: lora}}, abmll: {{}}, pretrained: {{method.name: pretrained}}}}
seeds: [0, 1, 2]
tune:
  tasks: [glue-sst2, rotten_tomatoes]
  seeds: [7, 8]
  overrides: {{trainer.episodes: 4}}
  grid:
    lora: {{method.outer_lr: [1e-4, 1e-3, 1e-2]}}
    abmll: {{method.outer_lr: [1e-4, 1e-3], method.beta: [1e-12, 1e-10]}}
    pretrained: {{method.test_lr: [3e-4]}}
"""


class MadeUp:
    """A runner whose runs score what a function says."""

    def __init__(self, folder, nll):
        self.folder, self.nll, self.jobs = folder, nll, []
        self.failing = set()  # values of the outer rate whose runs fail

    def run(self, jobs, ready):
        for job in jobs:
            self.jobs.append(job)
            config = load_config(CONFIG, job.overrides)
            place = self.folder / job.folder
            place.mkdir(parents=True)
            overall = {"0": {"nll_options": 9.0}, "5": {"nll_options": self.nll(config)}}
            (place / "scores.json").write_text(json.dumps([{"overall": overall}]))
            for name, values in job.scores.items():
                of_score = {
                    "5": {"nll_options": self.nll(load_config(CONFIG, [*job.overrides, *override_texts(values)]))}
                }
                (place / "scores" / name).mkdir(parents=True)
                (place / "scores" / name / "scores.json").write_text(json.dumps([{"overall": of_score}]))
        rates = [load_config(CONFIG, job.overrides).method.outer_lr for job in jobs]
        return [Outcome(job, "broken" if rate in self.failing else None) for job, rate in zip(jobs, rates, strict=True)]


def test_every_method_tries_its_grid_and_the_best_is_written_down(tmp_path):
    (tmp_path / "comparison.yaml").write_text(TEXT)
    comparison = load_comparison(tmp_path / "comparison.yaml")

    def nll(config):  # lora best at 1e-3; abmll at (1e-3, 1e-10), at one seed worse
        target = -3.0
        value = abs(math.log10(config.method.outer_lr) - target)
        if config.method.name == "abmll":
            value += abs(math.log10(config.method.beta) + 10) + (0.5 if config.seed == 8 else 0.0)
        return value

    runner = MadeUp(tmp_path / "out", nll)
    runner.folder.mkdir()
    choices, outcomes = choose(comparison, runner, ("tasks.folder=x",), tmp_path)
    assert len(outcomes) == len(runner.jobs) == 2 * (3 + 4)
    for job in runner.jobs:
        config = load_config(CONFIG, job.overrides)
        assert config.tasks.test == ("glue-sst2", "rotten_tomatoes") and config.trainer.episodes == 4
        assert config.seed in (7, 8) and config.tasks.folder == "x" and job.scores == {}
    assert len({job.folder for job in runner.jobs}) == 14
    found = {choice.cell[2]: choice for choice in choices}
    assert found["lora"].chosen == {"method.outer_lr": 1e-3} and found["lora"].at_the_end_of == []
    assert found["abmll"].chosen == {"method.outer_lr": 1e-3, "method.beta": 1e-10}
    assert found["abmll"].at_the_end_of == ["method.outer_lr", "method.beta"]
    assert found["pretrained"].chosen == {"method.test_lr": 3e-4} and found["pretrained"].tried == []
    assert not (tmp_path / "tuning.json").exists()  # before the runs are known to be these
    write_choices(comparison, choices, tmp_path)
    written = json.loads((tmp_path / "tuning.json").read_text())
    assert [one["method"] for one in written] == ["lora", "abmll", "pretrained"]
    scores = [one["score"] for one in written[1]["tried"]]
    assert scores == pytest.approx([1 + 2 + 0.25, 1 + 0.25, 2 + 0.25, 0.25])


def test_tries_of_the_adaptation_are_further_scores_of_one_training(tmp_path):
    grid = "pretrained: {method.test_lr: [1e-2, 1e-4, 1e-5]}"
    text = TEXT.replace("pretrained: {method.test_lr: [3e-4]}", grid)
    text = text.replace("trainer.episodes: 4", "trainer.episodes: 4, eval.every: null")
    (tmp_path / "comparison.yaml").write_text(text)
    comparison = load_comparison(tmp_path / "comparison.yaml")
    runner = MadeUp(tmp_path / "out", lambda config: abs(math.log10(config.method.test_lr) + 4) + (config.seed == 8))
    runner.folder.mkdir()
    choices, _ = choose(comparison, runner, (), tmp_path)
    assert sum(job.method == "pretrained" for job in runner.jobs) == 2  # one a seed
    assert choices[2].chosen == {"method.test_lr": 1e-4} and choices[2].at_the_end_of == []
    assert [score for _, score in choices[2].tried] == pytest.approx([2.5, 0.5, 1.5])


def test_while_a_try_is_missing_nothing_is_chosen(tmp_path):
    """A full disk is no verdict on a setting; nor is the pretrained score, which is written before the training."""
    (tmp_path / "comparison.yaml").write_text(TEXT)
    comparison = load_comparison(tmp_path / "comparison.yaml")
    runner = MadeUp(tmp_path / "out", lambda config: config.method.outer_lr)  # the smallest rate has the best score
    runner.folder.mkdir()
    runner.failing = {1e-4}
    choices, outcomes = choose(comparison, runner, (), tmp_path)
    assert choices is None and sum(outcome.problem == "broken" for outcome in outcomes) == 2 * (1 + 2)


def test_a_diverged_try_counts_as_the_worst(tmp_path):
    (tmp_path / "comparison.yaml").write_text(TEXT)
    comparison = load_comparison(tmp_path / "comparison.yaml")
    runner = MadeUp(
        tmp_path / "out", lambda c: math.nan if (c.method.outer_lr, c.seed) == (1e-4, 8) else c.method.outer_lr
    )
    runner.folder.mkdir()
    choices, _ = choose(comparison, runner, (), tmp_path)
    assert {choice.cell[2]: choice.chosen.get("method.outer_lr") for choice in choices}["lora"] == 1e-3
    write_choices(comparison, choices, tmp_path)
    lora = json.loads((tmp_path / "tuning.json").read_text())[0]
    assert [one["score"] for one in lora["tried"]] == [None, 1e-3, 1e-2]


def test_where_all_tries_diverge_nothing_is_chosen():
    with pytest.raises(Refused, match=r"tune: model tasks lora: all 2 tries diverged; name other values in tune.grid"):
        best(("model", "tasks", "lora"), [({"a": 1}, math.nan), ({"a": 2}, math.nan)], "nll", {"a": [1, 2]})


def test_keys_that_take_one_value(tmp_path):
    scored = [({"a": value, "b": value}, score) for value, score in ((1, 3.0), (2, 1.0), (3, 0.5))]
    choice = best(("model", "tasks", "lora"), scored, "nll", {"a+b": [1, 2, 3]})
    assert choice.chosen == {"a": 3, "b": 3} and choice.at_the_end_of == ["a+b"]
    scored = [({"a": value}, score) for value, score in ((True, 3.0), (False, 1.0))]
    assert best(("model", "tasks", "lora"), scored, "nll", {"a": [True, False]}).at_the_end_of == []


@pytest.mark.parametrize(("select_by", "expected"), [("nll_options", 2), ("accuracy", 3)])
def test_a_diverged_try_is_never_the_best(select_by, expected):
    scored = [({"a": value}, score) for value, score in ((1, math.nan), (2, 0.2), (3, 0.9), (4, 0.5))]
    choice = best(("model", "tasks", "lora"), scored, select_by, {"a": [1, 2, 3, 4]})
    assert choice.chosen == {"a": expected}
    assert choice.to_json()["tried"][0]["score"] is None
