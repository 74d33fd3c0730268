"""Tasks read with `datasets.load_dataset`, each described by a `HubTask` in the configuration."""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from abmll.config.schema import HubTask
from abmll.tasks.checks import Faults, Found, check_names, check_options, check_output, no_rows, similar
from abmll.tasks.task import Example, Task


def load_hub_tasks(hub: dict[str, HubTask], names: Iterable[str], scored: Collection[str] | None = None) -> Found:
    """Loads the named tasks; those without an entry in `hub` are returned in `missing`.

    `scored` names the tasks whose test split is read (None: all). ValueError names the entries and what is wrong with
    them, all of it up to a bound.
    """
    names = check_names(names, "tasks")
    known = [name for name in names if name in hub]
    if names and not known:
        raise ValueError(
            f"tasks.hub: describes none of {', '.join(names[:5])}{similar(names, hub)}; add an entry tasks.hub.NAME"
        )
    faults = Faults("tasks.hub", "entries")
    tasks = {name: _load(name, hub[name], scored is None or name in scored, faults) for name in known}
    faults.check()
    missing = {name: f"no entry tasks.hub.{name}" for name in names if name not in hub}
    return Found(tasks, missing)


def _load(name: str, task: HubTask, needs_test: bool, faults: Faults) -> Task:
    key = f"tasks.hub.{name}"
    names = {"train": task.train_split, "validation": task.validation_split, "test": task.test_split}
    if not needs_test:
        names["test"] = None
    splits = {role: _read_split(key, task, split, faults) if split else () for role, split in names.items()}
    if key not in faults:  # else rows may be there, and bad
        for role in ("train", "test") if needs_test else ("train",):
            if not splits[role]:
                faults.add(key, no_rows(name, role, f"{key}.{role}_split: {names[role]}"))
    return Task(name, **splits)


def _read_split(key: str, task: HubTask, split: str, faults: Faults) -> tuple[Example, ...]:
    """The good rows; what is wrong with the entry or with the other rows is added to `faults`."""
    from datasets import load_dataset  # slow to import, and needed by this source only

    try:
        rows = load_dataset(
            task.path, task.name, revision=task.revision, data_files=_plain(task.data_files), split=split
        )
    except Exception as error:  # the library raises half a dozen types; all are the user's to act on
        faults.add(key, f"{key}: {task.path}, split {split}: {error}{_remedy(error)}")
        return ()
    wrong = list(_wrong_columns(key, task, rows.column_names))
    for line in wrong:
        faults.add(key, line)
    examples = []
    for number, row in enumerate(() if wrong else rows):
        try:
            examples.append(_example(row, task, f"{key}: split {split}, row {number}"))
        except ValueError as error:
            faults.add(key, str(error))
    return tuple(examples)


def _plain(data_files: str | dict[str, str] | None) -> str | dict[str, str] | None:
    return dict(data_files) if isinstance(data_files, dict) else data_files


def _remedy(error: Exception) -> str:
    if "script" in str(error).lower() or "trust_remote_code" in str(error):
        return " (the data set comes as a loading script; set revision: refs/convert/parquet to read its Parquet copy)"
    return ""


def _wrong_columns(key: str, task: HubTask, columns: list[str]) -> Iterator[str]:
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(task.input) if name is not None]
    except ValueError as error:
        yield f"{key}.input: {task.input!r}: {error}; write {{column}}, and {{{{ for a brace"
        fields = []
    used = [("input", re.split(r"[.\[]", name)[0]) for name in fields] + [("label", task.label)]
    if isinstance(task.options, str):
        used.append(("options", task.options))
    for where, column in used:
        if column not in columns:
            hint = similar([column], columns)
            yield f"{key}.{where}: no column {column!r}; the columns are {', '.join(columns)}{hint}"


def _example(row: dict[str, Any], task: HubTask, where: str) -> Example:
    options, names = task.options, None
    if isinstance(options, str):
        options = row[options]
        if isinstance(options, dict):  # {'text': [...], 'label': ['A', 'B', ...]}, as question-answering sets have it
            names, options = options.get("label"), options.get("text")
        if not isinstance(options, (list, tuple)):
            raise ValueError(
                f"{where}: column {task.options!r} holds {row[task.options]!r}: neither a list nor a dict with 'text'"
            )
    options = check_options(options, where)
    return Example(
        task.input.format(**row), options, _answer(row[task.label], options, names, f"{where}: {task.label}")
    )


def _answer(label: object, options: tuple[str, ...], names: list | None, where: str) -> str:
    """The option that a label means: its name in the options' own labels, its text, or its index."""
    if names is not None and label in names:
        return options[names.index(label)]
    if isinstance(label, str) and (label in options or not re.fullmatch(r"-?\d+", label)):
        check_output(label, options, where)
        return label
    if not isinstance(label, (int, str)):
        raise ValueError(f"{where}: {label!r}, a {type(label).__name__}: a label is an index or an option's text")
    index = int(label)
    if not 0 <= index < len(options):
        unlabelled = " (-1 marks a split without labels: read another split)" if index == -1 else ""
        raise ValueError(f"{where}: {index}: not an index into the {len(options)} options{unlabelled}")
    return options[index]
