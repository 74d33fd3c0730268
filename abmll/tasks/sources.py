"""The tasks of a run, from whichever source the configuration names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from abmll.config.schema import TasksConfig
from abmll.tasks.builtin import builtin_tasks
from abmll.tasks.checks import Found, check_names
from abmll.tasks.hub import load_hub_tasks
from abmll.tasks.jsonl import load_jsonl_tasks
from abmll.tasks.made_from import evaluation_only
from abmll.tasks.shuffle import permutation
from abmll.tasks.task import Task


class TaskNames(Protocol):
    """The lists of a run, as `abmll.config` resolves them; `overlap_removed` were taken out of train."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    validation: tuple[str, ...]
    overlap_removed: tuple[str, ...]


@dataclass(frozen=True)
class LoadedTasks:
    """`validation` tasks serve by their validation split only; `missing` maps a name to where it was looked for."""

    train: list[Task]
    validation: list[Task]
    test: list[Task]
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # choices made on the way, for the caller to print

    def scored(self) -> LoadedTasks:
        """The test tasks alone, as far as they are adapted to and scored."""
        return replace(self, train=[], validation=[], test=[replace(task, validation=()) for task in self.test])


def load_tasks(
    config: TasksConfig,
    lists: TaskNames | None,
    seed: int,
    validation_examples: int | None,
    resolve: Callable[[str], str | Path] = Path,
    scoring: bool = False,
) -> LoadedTasks:
    """Reads or makes the tasks; `resolve` turns `tasks.folder` into a path. `lists` is None for the builtin source.

    Every validation task has validation examples that are not among its training examples: its own split, or
    `validation_examples` (at most half) of its training rows; None: nothing is validated, and no rows are spared for
    it. ValueError when a list comes out empty, when a task cannot spare any, for a task that serves evaluation only in
    training or validation, or for any missing task under `missing: error`.

    `scoring`: only the test tasks, with the training rows that they have in a run: those that it spares for validation
    are left out, where there are enough.
    """
    if config.source == "builtin":
        train, test = builtin_tasks(config.builtin, seed)
        if validation_examples is None:
            loaded = LoadedTasks(train, [], test)
        else:
            carved = [_with_validation(task, validation_examples, seed) for task in test]
            loaded = LoadedTasks(train, carved, carved)
        return loaded.scored() if scoring else loaded
    if lists is None:
        raise ValueError(
            f"tasks.source: {config.source}: needs lists of tasks; set tasks.lists, or tasks.train and tasks.test"
        )

    validation = lists.validation if validation_examples is not None else ()
    roles = {"train": lists.train, "validation": validation, "test": lists.test}
    for role, names in roles.items():
        check_names(names, f"tasks.{role}")
    if not scoring:
        _check_use(config, roles, resolve)
    found = _find(config, dict.fromkeys(name for names in roles.values() for name in names), set(lists.test), resolve)
    if found.missing and config.missing == "error":
        listing = "".join(f"\n  {name}: {where}" for name, where in found.missing.items())
        raise ValueError(f"tasks.missing: error: {len(found.missing)} listed tasks are not there:{listing}")
    tasks = dict(found.tasks)
    for name in roles["validation"]:
        if name in tasks and not (scoring and _spare(tasks[name], validation_examples) == 0):
            tasks[name] = _with_validation(tasks[name], validation_examples, seed)
    present = {role: [tasks[name] for name in names if name in tasks] for role, names in roles.items()}
    for role, names in roles.items():
        if names and not present[role]:
            raise ValueError(f"tasks.{role}: {list(names)}: none of them is there; missing: {list(found.missing)}")
    notes = list(found.notes)
    if lists.overlap_removed:
        notes.append(
            f"{', '.join(lists.overlap_removed)}: both in the training and in the test list, so kept out of training "
            "(tasks.keep_overlap=true keeps it in)"
        )
    loaded = LoadedTasks(**present, missing=found.missing, notes=notes)
    return loaded.scored() if scoring else loaded


def _check_use(config: TasksConfig, roles: Mapping[str, Iterable[str]], resolve: Callable[[str], str | Path]) -> None:
    """ValueError for tasks to train or validate on that serve evaluation only."""
    for role, remedy in {
        "train": "name them in tasks.test alone",
        "validation": "name other tasks in tasks.validation, or set eval.every=null",
    }.items():
        if config.source == "hub":
            kept = [name for name in roles[role] if name in config.hub and config.hub[name].evaluation_only]
        else:
            kept = [name for name in roles[role] if evaluation_only(Path(resolve(config.folder)) / name)]
        if kept:
            raise ValueError(f"tasks.{role}: {', '.join(kept)}: for evaluation only, as the entry says; {remedy}")


def _find(config: TasksConfig, names: Iterable[str], scored: set[str], resolve: Callable[[str], str | Path]) -> Found:
    if config.source == "hub":
        return load_hub_tasks(config.hub, names, scored)
    return load_jsonl_tasks(resolve(config.folder), names, scored)


def _spare(task: Task, count: int) -> int:
    """How many of its training rows a task without a validation split gives up for one."""
    return min(count, len(task.train) // 2)


def _with_validation(task: Task, count: int, seed: int) -> Task:
    """The task, with the last `count` of its shuffled training rows as validation if it has no split of its own."""
    if task.validation:
        return task
    count = _spare(task, count)
    if count == 0:
        raise ValueError(
            f"task {task.name}: {len(task.train)} training row(s) and no validation split: none can be spared for "
            "validation; add validation.jsonl, or name other tasks in tasks.validation"
        )
    order = permutation(len(task.train), seed, "validation", task.name)
    rows = [task.train[place] for place in order]
    return replace(task, train=tuple(rows[:-count]), validation=tuple(rows[-count:]))
