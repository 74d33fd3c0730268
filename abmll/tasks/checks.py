"""What every source of tasks demands of an example and of a list of names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from abmll.tasks.task import Example, Task

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Found:
    """What a source holds of the tasks asked for: missing maps a name to where it was looked for."""

    tasks: dict[str, Task]
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def check_options(options: Sequence[object], where: str) -> tuple[str, ...]:
    """The options as a tuple; ValueError, opening with `where`, unless they are 2 to 26 distinct strings."""
    for option in options:
        if not isinstance(option, str):
            raise ValueError(
                f"{where}: options hold {option!r}, a {type(option).__name__}: every option must be a string"
            )
    if len(options) < 2:
        raise ValueError(
            f"{where}: {len(options)} option(s): a multiple-choice question has 2 or more; "
            "take tasks of free answers out of the list"
        )
    if len(options) > len(LETTERS):
        raise ValueError(f"{where}: {len(options)} options: more than the {len(LETTERS)} letters that label them")
    if len(set(options)) != len(options):
        twice = next(option for option in options if options.count(option) > 1)
        raise ValueError(f"{where}: option {twice!r} is listed twice: which letter is right would be ambiguous")
    return tuple(options)


def check_output(output: str, options: tuple[str, ...], where: str) -> None:
    if output not in options:
        raise ValueError(f"{where}: output {output!r} is not among the options {list(options)}")


def check_split(examples: Sequence[Example], name: str, split: str, where: str) -> None:
    if not examples:
        raise ValueError(f"{where}: task {name} has no {split} rows: add some, or take it out of the list")


def check_names(names: Iterable[str], where: str) -> tuple[str, ...]:
    """The names as a tuple; ValueError when one is listed twice, which would train or score it twice."""
    names = tuple(names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{where}: {', '.join(twice)}: listed more than once; keep one of each")
    return names


def similar(names: Iterable[str], known: Iterable[str]) -> str:
    """', similar: ...' with known names close to any of `names`, or an empty string."""
    known = sorted(known)
    close = sorted({match for name in names for match in difflib.get_close_matches(name, known, n=2)})
    return f"; similar names there: {', '.join(close[:8])}" if close else ""
