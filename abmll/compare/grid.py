"""The runs that a comparison's file stands for.

    models x task sets x methods x settings x seeds, each with the overrides of all of them, in this order

Where the file has a `tune` section, every method's settings are chosen first, on tasks that are neither training nor
test tasks: see `abmll.compare.tuning`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from abmll.compare.schema import ONLY, PLAIN, Cell, Comparison, Job, Overrides, Try, Tuning
from abmll.config import ConfigError, load_config, override_texts, resolve_path
from abmll.config.task_lists import resolve_task_lists

OF_TEST = "method.test_"  # keys of the adaptation to an unseen task, which no training reads


def jobs(comparison: Comparison, chosen: Mapping[Cell, Overrides], extra: tuple[str, ...]) -> list[Job]:
    """The runs, in an order in which all methods of one seed come before the next seed.

    `chosen`: each (model, task set, method)'s settings, of a comparison that tunes.
    """
    found = []
    for seed, model, task_set, setting, method in itertools.product(
        comparison.seeds, comparison.models, comparison.task_sets, comparison.settings, comparison.methods
    ):
        if method not in _methods_of(comparison, comparison.settings[setting]):
            continue
        layers = (
            comparison.overrides,
            comparison.models[model],
            comparison.task_sets[task_set],
            comparison.methods[method],
            chosen.get((model, task_set, method), {}),
            without_methods(comparison.settings[setting]),
        )
        folder = f"{model}/{task_set}/{method}/{setting}/seed-{seed}"
        scores = {
            name: without_methods(values)
            for name, values in comparison.scores.items()
            if method in _methods_of(comparison, values)
        }
        found.append(Job(model, task_set, method, setting, seed, folder, (*_texts(layers, seed), *extra), scores))
    return found


def _texts(layers: tuple[Overrides, ...], seed: int) -> tuple[str, ...]:
    merged: Overrides = {}
    for layer in layers:
        merged |= layer
    return (*override_texts(merged), f"seed={seed}")


def without_methods(values: Overrides) -> Overrides:
    return {key: value for key, value in values.items() if key != ONLY}


def _methods_of(comparison: Comparison, values: Overrides) -> list[str]:
    return values.get(ONLY, list(comparison.methods))


def lists_of(tuning: Tuning, method: str) -> dict[str, list[Any]]:
    """A method's values to try, by section.key, or by several joined by + that take one value."""
    return tuning.grid.get(method, tuning.grid.get("all", {}))


def keys_to_choose(comparison: Comparison, method: str) -> list[str]:
    """The keys of a method that the comparison chooses; none where it chooses nothing."""
    lists = lists_of(comparison.tune, method) if comparison.tune else {}
    return [key for keys in lists for key in keys.split("+")]


def grid_of(tuning: Tuning, method: str) -> list[Overrides]:
    """A method's tries, in the order of its lists."""
    lists = lists_of(tuning, method)
    return [
        {key: value for keys, value in zip(lists, values, strict=True) for key in keys.split("+")}
        for values in itertools.product(*lists.values())
    ]


def tries(comparison: Comparison, extra: tuple[str, ...], least: int = 2) -> dict[Cell, list[Try]]:
    """Each cell's combinations, of the cells that have at least so many: one is nothing to try. Those that differ in
    the adaptation to an unseen task alone (`OF_TEST`) share a training: the first one's runs are scored as the others
    say, too.
    """
    found = {}
    for cell in cells(comparison):
        grid = grid_of(comparison.tune, cell[2])
        of_cell: list[Try] = []
        first: dict[str, int] = {}  # by what is trained, the first try's number
        for number, values in enumerate(grid if len(grid) >= least else ()):
            own = _runs_of_try(comparison, extra, cell, values, number)
            of_test = {key: value for key, value in values.items() if key.startswith(OF_TEST)}
            trained = repr([item for item in values.items() if item[0] not in of_test])
            if trained in first and not _chooses_theta(comparison, own[0]):
                own, name = of_cell[first[trained]].runs, f"try-{number}"
                for job in own:
                    job.scores[name] = of_test
                of_cell.append(Try(values, own, name))
            else:
                first[trained] = number
                of_cell.append(Try(values, own, PLAIN))
        if of_cell:
            found[cell] = of_cell
    return found


def _chooses_theta(comparison: Comparison, job: Job) -> bool:
    """Whether validations on the way choose the run's theta, so that the adaptation is a part of its training."""
    with suppress(ConfigError):  # told with the other mistakes
        settings = load_config(comparison.config, job.overrides).eval
        return settings.every is not None and settings.select_by is not None
    return True


def _runs_of_try(
    comparison: Comparison, extra: tuple[str, ...], cell: Cell, values: Overrides, number: int
) -> list[Job]:
    tuning = comparison.tune
    plain = comparison.model_copy(update={"settings": {"default": {}}, "seeds": tuning.seeds, "scores": {}})
    validation = {"tasks.test": tuning.tasks} if tuning.tasks else {}
    over = (*override_texts(tuning.overrides), *extra, *override_texts(validation))
    return [
        replace(
            job,
            setting=f"try-{number}",
            folder=f"tuning/{job.model}/{job.task_set}/{job.method}/try-{number}/seed-{job.seed}",
            overrides=(*job.overrides, *over, *_training_tasks(comparison, (*job.overrides, *extra))),
            scores={},
            needed=tuple(tuning.tasks),
        )
        for job in jobs(plain, {cell: values}, ())
        if (job.model, job.task_set, job.method) == cell
    ]


def _training_tasks(comparison: Comparison, overrides: Sequence[str]) -> list[str]:
    """A run's test tasks leave its training, and so they do a try's, which has other test tasks."""
    with suppress(ConfigError):  # told with the other mistakes
        tasks = load_config(comparison.config, overrides).tasks
        if tasks.source != "builtin":
            lists = resolve_task_lists(tasks, lambda path: resolve_path(path, comparison.config))
            return override_texts({"tasks.train": list(lists.train)}) if lists.overlap_removed else []
    return []


def place_of_score(name: str) -> str:
    """Where a run keeps a score, relative to its folder."""
    return "." if name == PLAIN else f"scores/{name}"


def cells(comparison: Comparison) -> list[Cell]:
    return list(itertools.product(comparison.models, comparison.task_sets, comparison.methods))
