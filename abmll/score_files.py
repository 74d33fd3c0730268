"""What scores leave in a folder: scores.json, and every example's prediction for whatever is asked later.

Risk against coverage, reliability, tests that pair two methods' examples: all need predictions and not means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from abmll.config import Refused
from abmll.evaluation import Evaluation
from abmll.files import write_whole
from abmll.metrics import Predictions

SCORES, PREDICTIONS, SETTINGS = "scores.json", "predictions.parquet", "settings.json"
MADE_WITH = "made_with.json"  # what the folder's scores depend on beside its settings
_PLACE = ["method", "split", "steps", "task", "example"]
_NUMBERS = ["label", "nll", "correct_vocabulary", "variance", "mutual_information"]


def prediction_table(evaluations: Sequence[Evaluation]) -> pd.DataFrame:
    """A row an example: method, split, steps (of adaptation), task, example (its place among the task's scored
    examples, the same for every method), label, nll (nats, of the right letter in the whole vocabulary),
    correct_vocabulary, variance and mutual_information (NaN without samples), p0 .. pC-1 (NaN beyond the example's
    options).
    """
    parts = [
        _rows(predictions).assign(method=evaluation.method, split=evaluation.split, steps=steps, task=task)
        for evaluation in evaluations
        for steps, tasks in evaluation.predictions.items()
        for task, predictions in tasks.items()
    ]
    table = pd.concat(parts, ignore_index=True)
    options = sorted(column for column in table if column not in (*_PLACE, *_NUMBERS))
    return table[[*_PLACE, *_NUMBERS, *options]]


def save_scores(
    folder: Path,
    evaluations: Sequence[Evaluation],
    settings: Mapping[str, Any] | None = None,
    made_with: Mapping[str, Any] | None = None,
) -> None:
    """Both files; the scores last: where they are, the predictions are whole. `settings`, the overrides they are under
    if they are not the run's own, and `made_with`, see `scored_under`, are kept beside them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SCORES).unlink(missing_ok=True)  # older ones should not stand beside what they were not made with
    if settings is not None:
        write_whole(folder / SETTINGS, json.dumps(settings))
    write_whole(folder / MADE_WITH, json.dumps(made_with or {}))
    write_whole(folder / PREDICTIONS, prediction_table(evaluations).to_parquet(index=False))
    write_whole(folder / SCORES, json.dumps([evaluation.to_json() for evaluation in evaluations], indent=1))


def scored_under(folder: Path, settings: Mapping[str, Any], made_with: Mapping[str, Any] | None = None) -> bool:
    """Whether the folder holds scores under these overrides. Refused where they are under others.

    `made_with`: the command's own `overrides` and, where they are known, `theta`'s digest, the `scoring` of its
    configuration and the digests of its test `tasks`, to be held against those that the scores were made with. Those of
    another theta are not there: it is gone; nor are those that are to be made otherwise now. Scores that do not know
    what made them are there.
    """
    if not (folder / SCORES).is_file():
        return False
    there, wanted = json.loads((folder / SETTINGS).read_text()), dict(settings)
    if there != wanted:
        raise Refused(f"{folder}: holds scores under {there}, not {wanted}; remove it, or take another name")
    known = load_made_with(folder)
    if not known or made_with is None:
        return True
    if known["overrides"] != made_with["overrides"]:
        told = " and not ".join(" ".join(one["overrides"]) or "none" for one in (known, made_with))
        raise Refused(f"{folder}: holds scores with the overrides {told}; remove it, or take another name")
    return all(
        known[key] == made_with[key] for key in ("theta", "scoring", "tasks") if key in known and key in made_with
    )


def load_made_with(folder: Path) -> dict[str, Any]:
    """What the folder's scores say of what made them; nothing where they do not know."""
    try:
        return json.loads((folder / MADE_WITH).read_text())
    except (OSError, ValueError):
        return {}


def load_scores(folder: Path) -> list[Evaluation]:
    """What `save_scores` wrote. OSError or ValueError where it cannot be read."""
    table = pd.read_parquet(folder / PREDICTIONS)
    saved = [Evaluation.from_json(item) for item in json.loads((folder / SCORES).read_text())]
    return [replace(evaluation, predictions=_of_method(table, evaluation.method)) for evaluation in saved]


def _of_method(table: pd.DataFrame, method: str) -> dict[int, dict[str, Predictions]]:
    """One method's predictions by steps and task, as `Evaluation` holds them."""
    found: dict[int, dict[str, Predictions]] = {}
    for (steps, task), rows in table[table["method"] == method].groupby(["steps", "task"], sort=False):
        found.setdefault(int(steps), {})[task] = as_predictions(rows)
    return found


def as_predictions(rows: pd.DataFrame) -> Predictions:
    """Rows of a prediction table, in their order: 0 beyond an example's options, NaN where the adaptation diverged."""
    columns = sorted((name for name in rows if re.fullmatch(r"p\d+", name)), key=lambda name: int(name[1:]))
    options = rows[columns].to_numpy(dtype=float, copy=True)
    diverged = np.isnan(options[:, 0])
    options[np.isnan(options) & ~diverged[:, None]] = 0.0
    used = diverged.all() or options[~diverged].any(axis=0)  # another task may have more options
    numbers = {name: torch.from_numpy(rows[name].to_numpy(copy=True)) for name in _NUMBERS}
    return Predictions(torch.from_numpy(options[:, np.broadcast_to(used, len(columns))]), **numbers)


def _rows(predictions: Predictions) -> pd.DataFrame:
    options = predictions.options.masked_fill(predictions.options == 0, torch.nan)  # of an option it is never 0
    table = {name: getattr(predictions, name).numpy() for name in _NUMBERS}
    table |= {f"p{number}": column for number, column in enumerate(options.T.numpy())}
    return pd.DataFrame(table).rename_axis("example").reset_index()
