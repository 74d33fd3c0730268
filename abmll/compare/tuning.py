"""Settings chosen by validation tasks: every method tries its grid, the best mean score counts, all is written down.

A choice at the end of a list of numbers may have a better one behind it: such a choice is marked.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abmll.compare.grid import Comparison, Job, Overrides, grid_of, jobs
from abmll.compare.runner import Outcome, Runner
from abmll.config import override_texts
from abmll.files import write_whole
from abmll.score_files import SCORES

HIGHER_IS_BETTER = ("accuracy", "macro_f1")
Cell = tuple[str, str, str]  # model, task set, method


@dataclass(frozen=True)
class Choice:
    """What one method tried, its score each time (the mean over validation tasks, then seeds), and the best."""

    cell: Cell
    tried: list[tuple[Overrides, float]]
    chosen: Overrides
    at_the_end_of: list[str]  # keys

    def to_json(self) -> dict[str, Any]:
        model, task_set, method = self.cell
        tried = [{"values": values, "score": None if math.isnan(score) else score} for values, score in self.tried]
        place = {"model": model, "task_set": task_set, "method": method}
        return {**place, "chosen": self.chosen, "at_the_end_of": self.at_the_end_of, "tried": tried}


def choose(comparison: Comparison, runner: Runner, extra: tuple[str, ...]) -> tuple[list[Choice], list[Outcome]]:
    """Runs the tries of every method and writes tuning.json; failed tries count as the worst.

    Methods with one combination have nothing to try, and run nothing.
    """
    tries = _tries(comparison, extra)
    outcomes = runner.run([job for of_cell in tries.values() for _, own in of_cell for job in own])
    choices = []
    for cell, of_cell in tries.items():
        scored = [(values, _score(own, runner.folder, comparison)) for values, own in of_cell]
        choices.append(best(cell, scored, comparison.tune.select_by, grid_lists(comparison, cell)))
    for cell in _cells(comparison):
        if cell not in tries and (only := grid_of(comparison.tune, cell[2])) and only[0]:
            choices.append(Choice(cell, [], only[0], []))
    text = json.dumps([choice.to_json() for choice in choices], indent=1)
    write_whole(runner.folder / "tuning.json", text)
    return choices, outcomes


def best(cell: Cell, scored: list[tuple[Overrides, float]], select_by: str, lists: Mapping[str, list[Any]]) -> Choice:
    """The first of the best; NaN, of a try that failed or diverged, is the worst."""
    sign = -1.0 if select_by in HIGHER_IS_BETTER else 1.0
    chosen, _ = min(scored, key=lambda one: math.inf if math.isnan(one[1]) else sign * one[1])
    numbers = {key: values for key, values in lists.items() if all(isinstance(value, (int, float)) for value in values)}
    ends = [key for key, values in numbers.items() if len(values) > 1 and chosen[key] in (min(values), max(values))]
    return Choice(cell, scored, chosen, ends)


def grid_lists(comparison: Comparison, cell: Cell) -> dict[str, list[Any]]:
    return comparison.tune.grid.get(cell[2], comparison.tune.grid.get("all", {}))


def _cells(comparison: Comparison) -> list[Cell]:
    return [(m, t, method) for m in comparison.models for t in comparison.task_sets for method in comparison.methods]


def _tries(comparison: Comparison, extra: tuple[str, ...]) -> dict[Cell, list[tuple[Overrides, list[Job]]]]:
    tuning, found = comparison.tune, {}
    plain = comparison.model_copy(update={"settings": {"default": {}}, "seeds": tuning.seeds, "scores": {}})
    tests = override_texts({**tuning.overrides, "tasks.test": tuning.tasks})
    for cell in _cells(comparison):
        grid = grid_of(tuning, cell[2])
        if len(grid) < 2:
            continue
        for number, values in enumerate(grid):
            own = [
                Job(
                    **{**job.facts(), "setting": f"try-{number}", "folder": f"tuning/{_place(job, number)}"},
                    overrides=(*job.overrides, *tests),
                    scores={},
                )
                for job in jobs(plain, {cell: values}, extra)
                if (job.model, job.task_set, job.method) == cell
            ]
            found.setdefault(cell, []).append((values, own))
    return found


def _place(job: Job, number: int) -> str:
    return f"{job.model}/{job.task_set}/{job.method}/try-{number}/seed-{job.seed}"


def _score(own: list[Job], folder: Path, comparison: Comparison) -> float:
    """The mean over seeds; NaN where a run is missing."""
    found = []
    for job in own:
        try:
            *_, last = json.loads((folder / job.folder / SCORES).read_text())
        except (OSError, ValueError):
            return math.nan
        steps = max(last["overall"], key=int)
        found.append(last["overall"][steps][comparison.tune.select_by])
    return statistics.mean(found)
