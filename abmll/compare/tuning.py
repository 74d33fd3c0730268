"""Settings chosen by validation tasks: every method tries its grid, the best mean score counts, all is written down.

A choice at the end of a list of numbers may have a better one behind it: such a choice is marked.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abmll.compare.grid import cells, grid_of, lists_of, place_of_score, tries
from abmll.compare.results import TUNING
from abmll.compare.runner import Outcome, Runner, made
from abmll.compare.schema import Cell, Comparison, Overrides, Try
from abmll.config import Refused
from abmll.files import write_whole
from abmll.metrics import HIGHER_IS_BETTER
from abmll.score_files import SCORES


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


def choose(
    comparison: Comparison, runner: Runner, extra: tuple[str, ...], into: Path
) -> tuple[list[Choice] | None, list[Outcome]]:
    """Runs the tries of every method. None where one failed: what it would have scored is not known, and another
    setting than the best would go into all runs.

    Methods with one combination have nothing to try, and run nothing. `into`: where the choices are to be written.
    """
    tried = tries(comparison, extra)
    runs = {job.folder: job for of_cell in tried.values() for one in of_cell for job in one.runs}
    outcomes = runner.run(list(runs.values()), lambda: made(into))
    if any(outcome.problem for outcome in outcomes):
        return None, outcomes
    choices = []
    for cell in cells(comparison):
        scored = [(one.values, _score(one, runner, comparison)) for one in tried.get(cell, ())]
        if scored:
            choices.append(best(cell, scored, comparison.tune.select_by, lists_of(comparison.tune, cell[2])))
        else:
            choices.append(Choice(cell, [], *grid_of(comparison.tune, cell[2]), []))
    return choices, outcomes


def write_choices(comparison: Comparison, choices: Sequence[Choice], into: Path) -> None:
    """INTO/tuning.json, of a comparison that tunes; of another one none, not even an older one."""
    if not comparison.tune:
        (into / TUNING).unlink(missing_ok=True)
        return
    select_by = comparison.tune.select_by
    text = json.dumps([{**choice.to_json(), "select_by": select_by} for choice in choices], indent=1)
    write_whole(into / TUNING, text)


def chosen_before(into: Path) -> dict[Cell, Overrides]:
    """Each cell's settings, as `write_choices` wrote them; none where nothing was chosen yet."""
    if not (into / TUNING).is_file():
        return {}
    choices = json.loads((into / TUNING).read_text())
    return {(one["model"], one["task_set"], one["method"]): one["chosen"] for one in choices}


def best(cell: Cell, scored: list[tuple[Overrides, float]], select_by: str, lists: Mapping[str, list[Any]]) -> Choice:
    """The first of the best; NaN, of a try that diverged, is the worst. Refused where all did."""
    if all(math.isnan(score) for _, score in scored):
        raise Refused(f"tune: {' '.join(cell)}: all {len(scored)} tries diverged; name other values in tune.grid")
    sign = -1.0 if select_by in HIGHER_IS_BETTER else 1.0
    chosen, _ = min(scored, key=lambda one: math.inf if math.isnan(one[1]) else sign * one[1])
    numbers = {key: values for key, values in lists.items() if all(type(value) in (int, float) for value in values)}
    at = {key: chosen[key.partition("+")[0]] for key in numbers}
    ends = [key for key, values in numbers.items() if len(values) > 1 and at[key] in (min(values), max(values))]
    return Choice(cell, scored, chosen, ends)


def _score(one: Try, runner: Runner, comparison: Comparison) -> float:
    """The mean over seeds; NaN where a run diverged."""
    found = []
    for job in one.runs:
        *_, last = json.loads((runner.folder / job.folder / place_of_score(one.score) / SCORES).read_text())
        steps = max(last["overall"], key=int)
        found.append(last["overall"][steps][comparison.tune.select_by])
    return statistics.mean(found)
