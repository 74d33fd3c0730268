"""Tasks of the catalogue as JSONL files, so that training asks no hub. What `launch/prepare.py` does.

A task's folder is whole or absent, whenever the process is killed; one that is there is not made again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from abmll.config.errors import ConfigError
from abmll.config.schema import HubTask
from abmll.config.settings import is_folder_name
from abmll.config.yaml_text import read_mapping
from abmll.files import MANIFEST, alone_in, damage, new_partial, publish, sweep
from abmll.tasks.checks import Faults, similar
from abmll.tasks.hub import load_hub_task
from abmll.tasks.jsonl import find_files
from abmll.tasks.made_from import MADE_FROM, MadeFrom
from abmll.tasks.shuffle import permutation
from abmll.tasks.task import Example


@dataclass(frozen=True)
class Outcome:
    """What became of one task. `failure` says why it is not there, and what to do; `notes` what is worth a look."""

    task: str
    rows: str = ""  # of train, validation and test
    left_out: int = 0
    seconds: float = 0.0
    failure: str = ""
    notes: tuple[str, ...] = ()


def names_of(tasks: str, lists: Path) -> tuple[str, ...]:
    """The tasks that a command means: a list in the folder `lists`, a list file, or names with commas between.

    ConfigError for a list file that is not there or is none.
    """
    path = lists / f"{tasks}.yaml"
    if not path.is_file():
        path = Path(tasks)
        if path.suffix not in (".yaml", ".yml"):
            return _named(tasks, lists)
    written = read_mapping(path)
    groups = [written.get(key) or [] for key in ("train", "validation", "test")]
    if not any(groups) or not all(isinstance(group, list) for group in groups):
        raise ConfigError([f"{path}: holds no list of tasks; write train, validation or test: [a, b]"])
    return tuple(dict.fromkeys(str(name) for group in groups for name in group))


def _named(tasks: str, lists: Path) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        raise ConfigError([f"--tasks: {tasks!r}: names no task; name a list, or tasks with commas between"])
    problems = [f"--tasks: {name}: is a list; name it alone" for name in names if (lists / f"{name}.yaml").is_file()]
    if problems:
        raise ConfigError(problems)
    return names


def prepare(
    names: Iterable[str],
    catalogue: Mapping[str, HubTask],
    out: Path,
    seed: int = 0,
    max_examples: int | None = None,
    progress: bool = True,
) -> list[Outcome]:
    """Writes OUT/TASK/{train,validation,test}.jsonl for each name, and goes on where one fails.

    `max_examples` bounds each split, whose rows are then drawn by `seed`. ValueError while another process prepares
    tasks in OUT: what it has begun would be swept away.
    """
    out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with alone_in(out), tqdm(list(names), unit="task", disable=not progress) as bar:
        sweep(out)
        for name in bar:
            bar.set_postfix_str(name)
            start = time.perf_counter()
            try:
                notes = []
                rows, left_out = _prepare(name, catalogue, out / name, seed, max_examples, notes)
                outcomes.append(Outcome(name, rows, left_out, time.perf_counter() - start, notes=tuple(notes)))
            except (ValueError, OSError) as error:
                outcomes.append(Outcome(name, seconds=time.perf_counter() - start, failure=str(error)))
                bar.write(f"{name}: failed")
    return outcomes


def _prepare(
    name: str, catalogue: Mapping[str, HubTask], folder: Path, seed: int, max_examples: int | None, notes: list[str]
) -> tuple[str, int]:
    if not is_folder_name(name):
        raise ValueError(f"{name!r}: names a folder; use letters, digits, `-`, `_`, `+` and `.`, 100 at most")
    if folder.exists() and not (folder / MANIFEST).exists():
        if "train" in find_files(folder, name, needs_test=False)[0]:
            return "is there, made by hand", 0
        if not folder.is_dir() or any(folder.iterdir()):  # to make it would remove somebody's files
            raise ValueError(
                f"{folder}: holds no train.jsonl, but what this command did not write; move it away, or name another "
                "folder with --out"
            )
    if name not in catalogue:
        raise ValueError(
            f"{name}: no entry in the catalogue{similar([name], catalogue)}; correct the name, or add an entry with "
            "--catalogue FILE"
        )
    made_from = MadeFrom(catalogue[name], seed, max_examples)
    if folder.exists() and damage(folder) is None:
        if other := made_from.differs(folder):
            raise ValueError(
                f"{folder}: was made with another {', '.join(other)}; remove it, or name another folder with --out"
            )
        return "is there", 0
    faults = Faults(name, "entries")
    task, left_out = load_hub_task(name, catalogue[name], name, faults, notes, seed=seed)
    faults.check()
    partial = new_partial(folder)
    counts = []
    for split in ("train", "validation", "test"):
        examples = _drawn(getattr(task, split), max_examples, seed, name, split)
        counts.append(f"{len(examples):,}")
        if examples:
            lines = (json.dumps(_row(name, example), ensure_ascii=False) + "\n" for example in examples)
            with open(partial / f"{split}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(lines)
    written = json.dumps(made_from.to_json(), indent=1, ensure_ascii=False)
    (partial / MADE_FROM).write_text(written, encoding="utf-8")
    publish(partial, folder)
    return " / ".join(counts), left_out


def _drawn(examples: Sequence[Example], most: int | None, *key: int | str) -> Sequence[Example]:
    """At most so many, in their order."""
    if most is None or len(examples) <= most:
        return examples
    return [examples[place] for place in sorted(permutation(len(examples), *key)[:most])]


def _row(name: str, example: Example) -> dict[str, Any]:
    return {"task": name, "input": example.input, "output": example.output, "options": list(example.options)}


def report(outcomes: Sequence[Outcome]) -> str:
    """A table of the tasks, and under it what is worth a look, and why those that failed did."""
    width = max((len(outcome.task) for outcome in outcomes), default=4)
    lines = [f"{'task':{width}}  {'train / validation / test':28}  {'left out':>8}  {'seconds':>7}"]
    for outcome in outcomes:
        rows = "FAILED" if outcome.failure else outcome.rows
        lines.append(f"{outcome.task:{width}}  {rows:28}  {outcome.left_out:>8,}  {outcome.seconds:>7.1f}")
    failed = [outcome for outcome in outcomes if outcome.failure]
    lines += ["", f"{len(outcomes) - len(failed)} of {len(outcomes)} tasks are there"]
    lines += [f"note: {note}" for outcome in outcomes for note in outcome.notes]
    return "\n".join(lines + [f"\n{outcome.failure}" for outcome in failed])
