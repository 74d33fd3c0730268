"""The error of everything that a user configures, and the wording that its messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """All that is wrong with a configuration, one problem a line: `file: section.key: value: what is wrong; remedy`."""

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class Refused(ValueError):
    """A run that cannot start; the message says what to change."""


def show(value: object, limit: int = 60) -> str:
    """A value as messages print it: on one line and not too long."""
    text = "null" if value is None else repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean X?`, or the list of what is known."""
    known = [str(name) for name in known]
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known) or 'none'}"


def duplicates(items: Iterable) -> list:
    """The items that occur more than once, each once, in order."""
    seen, twice = set(), []
    for item in items:
        if item in seen and item not in twice:
            twice.append(item)
        seen.add(item)
    return twice
