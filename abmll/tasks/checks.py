"""What every source of tasks demands of an example and of a list of names."""

from __future__ import annotations

import difflib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from abmll.tasks.task import Task

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MOST_LINES, _LONGEST_LINE = 20, 1000  # of an error message


@dataclass(frozen=True)
class Found:
    """What a source holds of the tasks asked for: missing maps a name to where it was looked for."""

    tasks: dict[str, Task]
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Faults:
    """What is wrong with several files or entries, for one ValueError that names them all.

    Each keeps its first lines and counts the others, so that a file full of faults costs no memory.
    """

    def __init__(self, where: str, kind: str):
        """`where` opens the message, `kind` is the plural of what may be at fault."""
        self._where, self._kind = where, kind
        self._kept: dict[str, list[str]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, place: str, line: str) -> None:
        """`line` says alone what is wrong and where; `place` is the file or entry that it is about."""
        kept = self._kept.setdefault(place, [])
        line = line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 1]}…"
        if line not in kept:
            self._counts[place] += 1
            if len(kept) < _MOST_LINES:
                kept.append(line)

    def __contains__(self, place: str) -> bool:
        return place in self._kept

    def check(self) -> None:
        """ValueError if there are faults: some 20 lines, dealt to the places in turns, and how many more there are."""
        total = self._counts.total()
        if total == 1:
            raise ValueError(next(iter(self._kept.values()))[0])
        if total:
            raise ValueError(f"{self._where}: {total:,} faults in {len(self._kept):,} {self._kind}:{self._listing()}")

    def _listing(self) -> str:
        turns = sorted((turn, at) for at, kept in enumerate(self._kept.values()) for turn in range(len(kept)))
        shown = Counter(at for _, at in turns[:_MOST_LINES])
        lines = []
        for at, (place, kept) in enumerate(self._kept.items()):
            lines += kept[: shown[at]]
            if shown[at] and self._counts[place] > shown[at]:
                lines.append(f"{place}: {self._counts[place] - shown[at]:,} more")
        unseen = [count for at, count in enumerate(self._counts.values()) if not shown[at]]
        if unseen:
            lines.append(f"{sum(unseen):,} more in {len(unseen):,} other {self._kind}")
        return "".join(f"\n  {line}" for line in lines)


class RowError(ValueError):
    """A row that cannot be used, where another row of the same columns can: a data set may have a few of them."""


def check_options(options: Sequence[object], where: str) -> tuple[str, ...]:
    """The options as a tuple; RowError, opening with `where`, unless they are 2 to 26 distinct strings."""
    for option in options:
        if not isinstance(option, str):
            raise RowError(
                f"{where}: options hold {option!r}, a {type(option).__name__}: every option must be a string"
            )
    if len(options) < 2:
        raise RowError(
            f"{where}: {len(options)} option(s): a multiple-choice question has 2 or more; "
            "take tasks of free answers out of the list"
        )
    if len(options) > len(LETTERS):
        raise RowError(f"{where}: {len(options)} options: more than the {len(LETTERS)} letters that label them")
    if len(set(options)) != len(options):
        twice = next(option for option in options if options.count(option) > 1)
        raise RowError(f"{where}: option {twice!r} is listed twice: which letter is right would be ambiguous")
    return tuple(options)


def check_output(output: str, options: tuple[str, ...], where: str) -> None:
    """ValueError, opening with `where`, unless it is one of the options."""
    if output not in options:
        alike = {unicodedata.normalize("NFC", option): option for option in options}
        option = alike.get(unicodedata.normalize("NFC", output))
        if option is not None:  # repr would show them alike
            raise ValueError(
                f"{where}: output {output!a} and option {option!a} differ in Unicode form alone: "
                "write one of them throughout"
            )
        raise ValueError(f"{where}: output {output!r} is not among the options {list(options)}")


def no_rows(name: str, split: str, where: str) -> str:
    return f"{where}: task {name} has no {split} rows: add some, or take it out of the list"


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
