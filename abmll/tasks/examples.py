"""Prompts that are made when they are asked for: a start need not wait for a hundred thousand that nobody takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from abmll.tasks.shuffle import keyed_random, permutation
from abmll.tasks.task import Example, PromptedExample

# Rows -> their prompts, in order; None for a row that does not fit. What it makes of a row depends on that row alone.
Encode = Callable[[Sequence[Example]], list[PromptedExample | None]]


@dataclass(frozen=True)
class Demonstrations:
    """How many answered examples a prompt shows before its question, and which prompts do."""

    count: int = 0
    demonstrate: Literal["test", "adaptation", "always"] = "test"

    @property
    def before_adaptation(self) -> int:
        """Before each example that a trained model adapts to."""
        return 0 if self.demonstrate == "test" else self.count

    @property
    def before_training(self) -> int:
        """Before each example of training episodes."""
        return self.count if self.demonstrate == "always" else 0


class TrainingExamples:
    """The rows of a training split; a prompt is made when its place is first taken, and kept.

    Which rows fit is known only once they are tokenised, so a place is a row's, whether it fits or not: the draw of
    places depends on the number of rows alone. A row that does not fit gives its place to another one of the split,
    drawn by the task's name and the place. So what a place holds is the same on every rank and after a resume,
    whatever was looked at before.
    """

    def __init__(self, name: str, rows: Sequence[Example], encode: Encode):
        self._name, self._rows, self._encode = name, rows, encode
        self._made: dict[int, PromptedExample | None] = {}  # by row, None for one that does not fit

    @property
    def digest(self) -> str:
        """Of the rows, in their order."""
        return _digest(self._rows)

    def __len__(self) -> int:
        """Places, that is rows."""
        return len(self._rows)

    def take(self, places: Sequence[int]) -> list[PromptedExample]:
        """The examples at these places. ValueError if no row of the split fits."""
        return [self._made[row] for row in self._held(places)]

    def rows(self, places: Sequence[int]) -> list[Example]:
        """What these places hold as text, each row once. ValueError as `take`."""
        return [self._rows[row] for row in dict.fromkeys(self._held(places))]

    def first_of_rows(self, places: Sequence[int]) -> list[int]:
        """Of these places the numbers of those whose row none before them holds. ValueError as `take`."""
        first: dict[int, int] = {}
        for number, row in enumerate(self._held(places)):
            first.setdefault(row, number)
        return list(first.values())

    def demonstrated(
        self, places: Sequence[int], pool: Sequence[int], count: int, *key: int | str
    ) -> list[PromptedExample]:
        """The examples at these places, each behind `count` of those at the places `pool`, or all where they are fewer.

        `key` and an example's number decide which. No example is shown to itself.
        """
        if not count:
            return self.take(places)
        others, asked = self.rows(pool), []
        for number, row in enumerate(self._held(places)):
            own = self._rows[row]
            shown = [other for other in others if not own.asks_as(other)]
            asked.append(own.behind(shown[at] for at in permutation(len(shown), *key, number)[:count]))
        return self._encode(asked)

    def _held(self, places: Sequence[int]) -> list[int]:
        candidates = [self._candidates(place) for place in places]
        rows = [next(of_place) for of_place in candidates]
        while True:
            self._make(rows)
            unfit = [at for at, row in enumerate(rows) if self._made[row] is None]
            if not unfit:
                return rows
            if len(self._made) == len(self) and not any(self._made.values()):
                raise ValueError(
                    f"task {self._name}: none of its {len(self)} training prompts fits; raise tasks.max_tokens"
                )
            for at in unfit:
                rows[at] = next(candidates[at])

    def _make(self, rows: Sequence[int]) -> None:
        new = [row for row in dict.fromkeys(rows) if row not in self._made]
        self._made.update(zip(new, self._encode([self._rows[row] for row in new]), strict=True))

    def _candidates(self, place: int) -> Iterator[int]:
        """Rows for a place: the first of them that fits takes it."""
        yield place
        draw = keyed_random("instead", self._name, place)
        while True:
            yield draw.randrange(len(self._rows))


class ScoredExamples(Sequence[PromptedExample]):
    """The examples of a validation or test split that fit, each once; all are made at the first look, and kept."""

    def __init__(self, rows: Sequence[Example], encode: Encode):
        self._rows, self._encode = rows, encode
        self._behind: dict[tuple[Example, ...], ScoredExamples] = {}

    @property
    def digest(self) -> str:
        """Of the rows, in their order."""
        return _digest(self._rows)

    @property
    def num_rows(self) -> int:
        """Before any is left out: known without tokenising."""
        return len(self._rows)

    def work(self, most: int | None) -> int:
        """Characters of the rows, or of the first so many: about proportional to tokens, and known without them."""
        return sum(len(row.input) for row in self._rows[:most])

    def behind(self, demonstrations: Sequence[Example]) -> ScoredExamples:
        """The same examples, each behind these; kept too, since a run scores the same again and again."""
        if not demonstrations:
            return self
        shown = tuple(demonstrations)
        if shown not in self._behind:
            self._behind[shown] = ScoredExamples([row.behind(shown) for row in self._rows], self._encode)
        return self._behind[shown]

    @cached_property
    def _fitting(self) -> tuple[PromptedExample, ...]:
        return tuple(example for example in self._encode(self._rows) if example is not None)

    def __len__(self) -> int:
        return len(self._fitting)

    def __getitem__(self, place):
        return self._fitting[place]


def _digest(rows: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.input, row.options, row.output]).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class PromptedTask:
    name: str
    train: TrainingExamples
    validation: ScoredExamples
    test: ScoredExamples
    demonstrations: Demonstrations = Demonstrations()


@dataclass
class PromptCounts:
    """Of one task's examples: how many, how many lost part of the question, how many do not fit at all.

    `left_out` counts the demonstrations that did not fit before those that do.
    """

    total: int = 0
    truncated: int = 0
    dropped: int = 0
    left_out: int = 0
    longest: int = 0  # tokens, of those that fit

    def add(self, examples: Sequence[PromptedExample | None]) -> None:
        fitting = [example for example in examples if example is not None]
        self.total += len(examples)
        self.dropped += len(examples) - len(fitting)
        self.truncated += sum(example.truncated for example in fitting)
        self.left_out += sum(example.left_out for example in fitting)
        self.longest = max([self.longest, *(len(example.token_ids) for example in fitting)])

    def loss(self, name: str, max_tokens: int) -> str:
        """A sentence about a task that lost something, else an empty string."""
        if not (self.truncated or self.dropped or self.left_out):
            return ""
        left_out = f"; {self.left_out} demonstrations were left out" if self.left_out else ""
        return (
            f"{name}: of {self.total} prompts {self.truncated} truncated and {self.dropped} dropped at "
            f"{max_tokens} tokens{left_out}"
        )


def any_fits(rows: Sequence[Example], encode: Encode) -> bool:
    """Whether a row fits; looks at twice as many in each turn, so that one is enough for most splits."""
    start = 0
    while start < len(rows):
        part = rows[start : 2 * start + 1]
        if any(example is not None for example in encode(part)):
            return True
        start += len(part)
    return False
