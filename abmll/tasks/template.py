"""The templates of a `HubTask`: text with a row's columns in braces."""

from __future__ import annotations

import re
import string
from typing import Any

from abmll.tasks.checks import LETTERS, RowError


class Lettered(tuple):
    """Options that a template writes as MetaICL does, `(A) one (B) two`, or one by one: `{options[0]}`."""


class Template(string.Formatter):
    """Fills `{column}` and its parts, `{examples[0][input]}`; a list is written with spaces between.

    `line_break`: what line breaks and tabs in the columns become, and a backslash with an n; None: they are kept.
    """

    def __init__(self, line_break: str | None):
        self._line_break = line_break

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            raise RowError("a column is empty; name it in required to leave such rows out")
        if isinstance(value, Lettered):
            return " ".join(f"({letter}) {option}" for letter, option in zip(LETTERS, value, strict=False))
        if isinstance(value, (list, tuple)):
            return " ".join(self.format_field(part, "") for part in value)
        text = format(value, format_spec)
        # yelp_polarity writes a line break as a backslash and an n
        return text if self._line_break is None else re.sub(r"\s*[\n\r\t]\s*|\\n", self._line_break, text.strip())
