"""Tasks from JSONL files, a row `{"task", "input", "output", "options"}` a line.

Two layouts, a folder per task in both:
    <folder>/<task>/{train,test}.jsonl and, if there, validation.jsonl or dev.jsonl
    <folder>/<task>/<task>_<k>_<seed>_{train,dev,test}.jsonl, as MetaICL writes them
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from abmll.tasks.checks import Faults, Found, check_names, check_options, check_output, no_rows, similar
from abmll.tasks.task import Example, Task

_FIELDS = {"input": str, "output": str, "options": list}
_SPLITS = ("train", "validation", "test")


def load_jsonl_tasks(folder: str | Path, names: Iterable[str], scored: Collection[str] | None = None) -> Found:
    """Reads the named tasks, and no others.

    `scored` names the tasks that must have test rows (None: all); MetaICL's training tasks have none.
    A task that is not there is returned in `missing`; ValueError when none is there, or, naming all of them up to a
    bound, when rows are bad.
    """
    folder = Path(folder)
    names = check_names(names, "tasks")
    for name in names:  # one task by two names would be trained on and scored as unseen
        if os.path.normpath(name) != name or name.startswith(("/", "..")):
            raise ValueError(f"tasks: {name!r}: is no name of a folder in tasks.folder; write {Path(name).name!r}")
    if not folder.is_dir():
        raise ValueError(f"tasks.folder: {folder}: no such folder; set tasks.folder to the folder that holds the tasks")
    tasks, missing, notes = {}, {}, []
    faults = Faults(f"tasks.folder: {folder}", "files")
    for name in names:
        needs_test = scored is None or name in scored
        files, note = find_files(folder / name, name, needs_test)
        if not files:
            missing[name] = f"no {folder / name}/train.jsonl and no {folder / name}/{name}_<k>_<seed>_train.jsonl"
            continue
        tasks[name] = _read_task(name, folder / name, files, needs_test, faults)
        notes += note
    faults.check()
    if names and not tasks:
        hint = similar(names, (path.name for path in folder.iterdir() if path.is_dir()))
        raise ValueError(
            f"tasks.folder: {folder}: holds none of the {len(names)} tasks asked for ({', '.join(names[:5])}"
            f"{', ...' if len(names) > 5 else ''}){hint}; check tasks.folder and the list"
        )
    return Found(tasks, missing, notes)


def _read_task(name: str, folder: Path, files: dict[str, Path], needs_test: bool, faults: Faults) -> Task:
    splits = {split: read_examples(files[split], faults) if split in files else () for split in _SPLITS}
    for split in ("train", "test") if needs_test else ("train",):
        where = str(files.get(split, folder))
        if not splits[split] and where not in faults:  # else its rows are there, and bad
            faults.add(where, no_rows(name, split, where))
    return Task(name, **splits)


def find_files(folder: Path, name: str, needs_test: bool) -> tuple[dict[str, Path], list[str]]:
    """Path of each split that is there, and a note on the choice where there was one; ({}, []) for no task."""
    if not folder.is_dir():
        return {}, []
    choices = (("train", "train"), ("validation", "dev"), ("validation", "validation"), ("test", "test"))
    plain = {split: folder / f"{stem}.jsonl" for split, stem in choices if (folder / f"{stem}.jsonl").is_file()}
    if plain:
        return plain, []
    draws: dict[tuple[int, int], dict[str, Path]] = {}
    pattern = re.compile(re.escape(name) + r"_(\d+)_(\d+)_(train|dev|test)\.jsonl")
    for path in folder.iterdir():
        if match := pattern.fullmatch(path.name):
            split = {"dev": "validation"}.get(match[3], match[3])
            draws.setdefault((int(match[1]), int(match[2])), {})[split] = path
    if not draws:
        return {}, []
    # a draw without the splits that are needed is taken only if there is no better, and then told as an error
    needed = {"train", "test"} if needs_test else {"train"}
    k, seed = max(draws, key=lambda draw: (needed <= draws[draw].keys(), draw[0], draw[1] == 100, -draw[1]))
    note = [f"{name}: k = {k}, seed {seed} chosen of {len(draws)} draws in {folder}"] if len(draws) > 1 else []
    return draws[k, seed], note


def read_examples(path: Path, faults: Faults) -> tuple[Example, ...]:
    """The good rows of one file; blank lines, CRLF and a byte-order mark are fine.

    What is wrong with the other rows is added to `faults`, as file, line and reason.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        faults.add(str(path), f"{path}: {error.strerror}: make it a file that can be read")
        return ()
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        lines = _decodable(data, path, faults)
    checked: dict[tuple, tuple[str, ...]] = {}  # most rows of a task share their options: check and keep them once
    examples = []
    for number, line in enumerate(lines, 1):
        if line and not line.isspace():
            try:
                examples.append(_parse(line, path, number, checked))
            except ValueError as error:
                faults.add(str(path), str(error))
    return tuple(examples)


def _decodable(data: bytes, path: Path, faults: Faults) -> list[str]:
    """The lines, those that are not UTF-8 left blank."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # else each of its lines would be a fault
        faults.add(str(path), f"{path}:1: byte 0x{data[0]:02x} is not UTF-8 but UTF-16: save the file as UTF-8")
        return []
    lines = []
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError as error:
            byte = line[error.start]
            faults.add(str(path), f"{path}:{number}: byte 0x{byte:02x} is not UTF-8: save the file as UTF-8")
            lines.append("")
    return lines


def _parse(line: str, path: Path, number: int, checked: dict[tuple, tuple[str, ...]]) -> Example:
    try:
        row = json.loads(line)
        # the four fields in one line, for speed; the unhappy cases are told apart below
        text, output, options = row["input"], row["output"], row["options"]
        good = type(text) is str and type(output) is str and type(options) is list
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}:{number}: {_reason(line, error)}") from None
    if not good:
        raise ValueError(f"{path}:{number}: {_reason(line, None)}")
    where = f"{path}:{number}"
    try:
        shared = checked[tuple(options)]
    except (KeyError, TypeError):  # TypeError: an option that is a list or an object
        shared = check_options(options, where)
        checked[shared] = shared
    if output not in shared:
        check_output(output, shared, where)
    if ("\\ud" in line or "\\uD" in line) and any("\ud800" <= letter <= "\udfff" for letter in text + "".join(shared)):
        raise ValueError(f"{where}: half a surrogate pair (\\ud8.. to \\udf..): no tokenizer can read it; remove it")
    return Example(text, shared, output)


def _reason(line: str, error: Exception | None) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"malformed JSON: {error.msg} at column {error.colno}: {line.strip()[:60]!r}"
    if isinstance(error, (ValueError, RecursionError)):
        return f"malformed JSON: {error}"
    row = json.loads(line)
    if not isinstance(row, dict):
        return f"a {type(row).__name__}, not an object with the fields input, output and options"
    for name, wanted in _FIELDS.items():
        if name not in row:
            return f"field {name!r} is missing; the row has {sorted(row)}"
        if not isinstance(row[name], wanted):
            kind = "list of strings" if wanted is list else "string"
            return f"field {name!r} is {row[name]!r}, a {type(row[name]).__name__}: it must be a {kind}"
    raise AssertionError(line)
