"""Tasks read with `datasets.load_dataset`, each described by a `HubTask` in the configuration."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from abmll.config.schema import HubTask
from abmll.tasks.checks import Faults, Found, RowError, check_names, no_rows, similar
from abmll.tasks.rows import Row, RowReader
from abmll.tasks.shuffle import permutation
from abmll.tasks.task import Example, Task

PARQUET_COPY = "refs/convert/parquet"  # a revision that the hub makes of every data set


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
    tasks, notes = {}, []
    for name in known:
        needs_test = scored is None or name in scored
        tasks[name], _ = load_hub_task(name, hub[name], f"tasks.hub.{name}", faults, notes, needs_test)
    faults.check()
    missing = {name: f"no entry tasks.hub.{name}" for name in names if name not in hub}
    return Found(tasks, missing, notes)


def load_hub_task(
    name: str, task: HubTask, key: str, faults: Faults, notes: list[str], needs_test: bool = True, seed: int = 0
) -> tuple[Task, int]:
    """One task, and how many rows it leaves out; what is wrong is added to `faults`, in lines that open with `key`.

    Rows that cannot be used are left out and told in `notes`, or faults where they are more than 1 % of a split.
    `seed` decides the order of shuffled options and which rows are set aside as test.
    """
    splits: dict[str, tuple[Example, ...]] = {"train": (), "validation": (), "test": ()}
    names = {"train": task.train_split, "validation": task.validation_split}
    if needs_test and task.test_split is not None:
        names["test"] = task.test_split
    left_out = 0
    reader = RowReader(task, seed)
    for role, split in names.items():
        if split is None:
            continue
        if (rows := _rows(key, task, split, faults)) is None:
            break  # it would be the same with the next split
        splits[role], groups, dropped = _examples(rows, reader, f"{key}: split {split}", key, faults, notes)
        left_out += dropped
        if role == "train" and task.holdout is not None:
            splits["train"], test = _hold_out(splits["train"], groups, task.holdout, seed, task.path)
            splits["test"] = test if needs_test else ()
    if key not in faults:  # else rows may be there, and bad
        for role in ("train", "test") if needs_test else ("train",):
            if not splits[role]:
                faults.add(key, no_rows(name, role, f"{key}.{role}_split: {names.get(role, task.train_split)}"))
    return Task(name, **splits), left_out


def _rows(key: str, task: HubTask, split: str, faults: Faults) -> Collection[Row] | None:
    """The rows of a split; None, and why is added to `faults`, where they cannot be had or lack a column."""
    from datasets import load_dataset  # slow to import, and needed by this source only

    # The hub's Parquet copy knows no configurations: each is a folder there, and its name would be refused
    name, folder = (None, task.name) if task.revision == PARQUET_COPY else (task.name, None)
    files = _plain(task.data_files)
    try:
        rows = load_dataset(task.path, name, revision=task.revision, data_dir=folder, data_files=files, split=split)
    except Exception as error:  # the library raises half a dozen types; all are the user's to act on
        cause = f" ({error.__cause__})" if error.__cause__ else ""  # "an error occurred" says nothing of itself
        faults.add(key, f"{key}: {task.path}, split {split}: {error}{cause}{_remedy(error)}")
        return None
    reader = RowReader(task)
    wrong = [*reader.wrong_columns(rows.column_names), *reader.wrong_order(rows.features)]
    for line in wrong:
        faults.add(key, f"{key}.{line}")
    return None if wrong else rows


def _examples(
    rows: Collection[Row], reader: RowReader, where: str, key: str, faults: Faults, notes: list[str]
) -> tuple[tuple[Example, ...], list[tuple[str, ...]], int]:
    """The good rows' examples, each one's group (for a task with a holdout), and how many rows the task leaves out."""
    examples, groups, left_out, unusable = [], [], 0, []
    for number, row in enumerate(rows):
        place = f"{where}, row {number}"
        try:
            example = reader.example(row, number, place)
            if example is None:
                left_out += 1
                continue
            if reader.task.holdout is not None:
                groups.append(reader.group(row, example, place))
            examples.append(example)
        except RowError as error:
            unusable.append(str(error))
        except ValueError as error:
            faults.add(key, str(error))
    if 100 * len(unusable) > len(rows):
        for line in unusable:
            faults.add(key, line)
    elif unusable:
        notes.append(
            f"{len(unusable):,} of {len(rows):,} rows cannot be used and are left out, the first: {unusable[0]}"
        )
    return tuple(examples), groups, left_out + len(unusable)


def _hold_out(
    examples: Sequence[Example], groups: Sequence[tuple[str, ...]], share: float, seed: int, path: str
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(train, test): a share of the groups goes to test, whole.

    The data set's path names the shuffle, not the task: tasks on the same texts (ethos) then set aside the same ones.
    """
    distinct = list(dict.fromkeys(groups))
    order = permutation(len(distinct), seed, "holdout", path)
    test = {distinct[place] for place in order[: round(share * len(distinct))]}
    sides = ([], [])
    for example, group in zip(examples, groups, strict=True):
        sides[group in test].append(example)
    return tuple(sides[0]), tuple(sides[1])


def _plain(data_files: str | dict[str, str] | None) -> str | dict[str, str] | None:
    return dict(data_files) if isinstance(data_files, dict) else data_files


def _remedy(error: Exception) -> str:
    text = str(error).lower()
    if "script" in text or "trust_remote_code" in text:
        return f" (the data set comes as a loading script; set revision: {PARQUET_COPY} to read its Parquet copy)"
    if isinstance(error, ConnectionError) or "reach" in text or "offline" in text:
        return " (no way to the hub: run it where there is a network, with HF_HUB_OFFLINE unset, and copy the folder)"
    return ""
