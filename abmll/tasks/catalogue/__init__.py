"""The catalogue: how every task of the shipped lists is read from the hub, a YAML file for each family of tasks."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from abmll.config.checks import hub_task_disagrees
from abmll.config.errors import ConfigError, did_you_mean, duplicates, show
from abmll.config.schema import HubTask
from abmll.config.yaml_text import read_mapping

FOLDER = Path(__file__).parent


def load_catalogue(*others: str | Path) -> dict[str, HubTask]:
    """Every entry that is shipped, by the task's name; those of the files in `others` are added, or replace them.

    Raises ConfigError, with a line for every key that is wrong.
    """
    shipped = [read_entries(path) for path in sorted(FOLDER.glob("*.yaml"))]
    if twice := duplicates(name for entries in shipped for name in entries):
        raise ConfigError(f"{FOLDER}: {name}: is in two files; keep one of them" for name in twice)
    return {name: task for entries in (*shipped, *map(read_entries, others)) for name, task in entries.items()}


def read_entries(path: str | Path) -> dict[str, HubTask]:
    """The entries of one file: a mapping `tasks` from a name to a HubTask's keys, which `defaults` completes.

    Raises ConfigError, with a line for every key that is wrong.
    """
    data = read_mapping(path)
    problems = [
        f"{path}: {key}: unknown key; {did_you_mean(key, ('defaults', 'tasks'))}"
        for key in data
        if key not in ("defaults", "tasks")
    ]
    defaults, tasks = data.get("defaults") or {}, data.get("tasks") or {}
    if not isinstance(defaults, dict) or not isinstance(tasks, dict):
        raise ConfigError([*problems, f"{path}: defaults and tasks must be mappings; write `key: value` lines"])
    entries = {}
    for name, keys in tasks.items():
        where = f"{path}: tasks.{name}"
        if not isinstance(keys, dict):
            problems.append(f"{where}: {show(keys)}: must be a mapping; write `key: value` lines")
            continue
        written = {**defaults, **keys}
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in written.items()}
        try:
            entries[str(name)] = task = HubTask.model_validate(values, strict=True)
            problems += [f"{where}.{line}" for line in hub_task_disagrees(task)]
        except ValidationError as error:
            problems += [f"{where}.{_line(fault)}" for fault in error.errors(include_url=False)]
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return entries


def _line(fault: dict) -> str:
    key = fault["loc"][0]
    if fault["type"] == "missing":
        return f"{key}: not set: it is required; write it in the entry or in defaults"
    if fault["type"] == "extra_forbidden":
        return f"{key}: {show(fault['input'])}: unknown key; {did_you_mean(str(key), HubTask.model_fields)}"
    return f"{key}: {show(fault['input'])}: {fault['msg'].replace('Input should', 'must')}; change it"
