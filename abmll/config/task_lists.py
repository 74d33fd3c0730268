"""Which tasks a run trains on and which it keeps unseen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError, did_you_mean, duplicates, show
from .schema import TasksConfig
from .yaml_text import read_mapping

_KEYS = ("train", "test", "validation")


@dataclass(frozen=True)
class TaskLists:
    """Names of tasks, in the order of their lists. `overlap_removed` were in train and in test, and left train."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    validation: tuple[str, ...]
    overlap_removed: tuple[str, ...]


def resolve_task_lists(tasks: TasksConfig, resolve: Callable[[str], Path], scoring: bool = False) -> TaskLists:
    """The lists of `tasks.lists`, each replaced by the configuration's own where it has one.

    A training task that is also a test task leaves training, unless `tasks.keep_overlap`: a score on it would not be
    one on an unseen task. `resolve` finds the list file. Not for the source `builtin`, whose tasks name themselves.

    `scoring`: for a command that trains and validates on nothing. There are no training tasks, whatever the lists say,
    and `validation` is what it holds of the test tasks: a run spared some of their rows. The file may be gone where
    `tasks.test` is set.

    Raises ConfigError, with a line for each unknown key and each list that is missing, empty, no list of names, or that
    names a task twice.
    """
    own = {key: getattr(tasks, key) for key in _KEYS}
    written, source = {}, "tasks"
    path = None if tasks.lists is None else resolve(tasks.lists)
    if path and not (scoring and own["test"] and not path.is_file()):
        if not path.is_file():
            raise ConfigError([f"tasks.lists: {tasks.lists}: no such file ({path}); check the path"])
        written, source = read_mapping(path), str(path)

    problems = [f"{source}: {key}: unknown key; {did_you_mean(key, _KEYS)}" for key in written if key not in _KEYS]
    for key in ("test", "validation") if scoring else _KEYS:
        if own[key] is None and (written.get(key) is not None or key != "validation"):
            problems += [f"{source}: {key}: {problem}" for problem in _wrong(key, written.get(key))]
    if problems:
        raise ConfigError(problems)

    lists = {key: tuple(own[key] or written.get(key) or ()) for key in _KEYS}
    validation = lists["validation"] or lists["test"]
    if scoring:
        return TaskLists((), lists["test"], tuple(name for name in validation if name in lists["test"]), ())
    overlap = () if tasks.keep_overlap else tuple(name for name in lists["train"] if name in lists["test"])
    train = tuple(name for name in lists["train"] if name not in overlap)
    if not train:
        remedy = "add training tasks, or set tasks.keep_overlap=true"
        raise ConfigError([f"{source}: train: {show(lists['train'])}: each is a test task too; {remedy}"])
    return TaskLists(train, lists["test"], validation, overlap)


def _wrong(key: str, names: object) -> list[str]:
    remedy = f"write a list of task names, or set tasks.{key}=[a, b]"
    if names is None:
        return [f"not set: {remedy}"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return [f"{show(names)}: is no list of names; {remedy}"]
    if not names:
        return [f"[]: is empty; {remedy}"]
    return [f"{name}: is listed twice; keep one of them" for name in duplicates(names)]
