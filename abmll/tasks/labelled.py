"""A user's own examples: a JSONL or CSV file with a column of texts and one of labels, or texts alone.

JSONL rows may be the task files' (`input`, `output`, `options`); then every row has its own options. Elsewhere the
options are all labels of the file, in alphabetical order.
"""

from __future__ import annotations

import json
import math
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from abmll.config.errors import show
from abmll.tasks.checks import LETTERS, Faults, check_options, check_output
from abmll.tasks.delimited import delimited_rows
from abmll.tasks.shuffle import permutation
from abmll.tasks.task import Example

TEXTS, LABELS, OPTIONS = ("text", "input"), ("label", "output"), "options"
FEWEST, MOST = 4, 500  # examples of an adaptation
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?")  # JSON's: 007 is a text


@dataclass(frozen=True)
class Columns:
    """Names of the columns; None: the first of the usual ones that a row has."""

    text: str | None = None
    label: str | None = None


class Row(NamedTuple):
    """One row of a file: `where` is its file and line."""

    where: str
    fields: dict[str, Any]

    def text(self, columns: Columns) -> str:
        """ValueError where the row has none."""
        text = self._value(columns.text, TEXTS, "text")
        if not isinstance(text, str):
            raise ValueError(f"{self.where}: the text is {text!r}, a {type(text).__name__}: it must be a string")
        return readable(text, self.where)

    def label(self, columns: Columns) -> str:
        """A number or a truth value as JSON writes it. ValueError where the row has none."""
        label = self._value(columns.label, LABELS, "label")
        if isinstance(label, bool | int) or (isinstance(label, float) and math.isfinite(label)):
            return json.dumps(label)
        if not isinstance(label, str) or not label.strip():  # NaN is how pandas writes that there is none
            raise ValueError(
                f"{self.where}: the label is {label!r}: it must be a text or a finite number; remove the row"
            )
        return readable(label, self.where)

    def options(self) -> tuple[str, ...] | None:
        """The row's own, if it has any: null and an empty CSV cell are none. ValueError where they cannot serve."""
        found = self.fields.get(OPTIONS)
        if found is None or found == "":
            return None
        if not isinstance(found, list):
            kind = "text" if isinstance(found, str) else f"a {type(found).__name__}"
            raise ValueError(
                f"{self.where}: `{OPTIONS}` is {kind}, {str(found)[:60]!r}: write a JSON list, in a .jsonl file, or "
                "rename the column if it means something else"
            )
        options = check_options(found, self.where)
        readable("".join(options), self.where)
        return options

    def _value(self, name: str | None, usual: Sequence[str], what: str) -> Any:
        names = [name] if name else [one for one in usual if one in self.fields][:1]
        if not names or names[0] not in self.fields:
            raise ValueError(
                f"{self.where}: no column {name or ' or '.join(usual)}; it has {', '.join(map(repr, self.fields))}: "
                f"name the one that holds the {what} with --{what}"
            )
        return self.fields[names[0]]


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a .csv, .tsv or .jsonl file, or of standard input (`-`, JSONL), one by one as they are read.

    ValueError, with file and line, at a row that cannot be read, and where the file cannot.
    """
    if str(path) == "-":
        source, raw = "standard input", getattr(sys.stdin, "buffer", None)  # what stands in for it may hold text alone
        yield from _json_rows(sys.stdin if raw is None else _decoded(raw, source), source)
        return
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() in (".csv", ".tsv"):
                yield from (Row(where, fields) for where, fields in delimited_rows(file, str(path)))
            else:
                yield from _json_rows(file, str(path))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}: name a JSONL or CSV file that can be read") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte 0x{error.object[error.start]:02x} is not UTF-8: save it as UTF-8") from error


def read_labelled(
    path: str | Path, columns: Columns | None = None, options: tuple[str, ...] | None = None
) -> list[Example]:
    """A file's examples. `options`: of all of them; (): each row brings its own.

    ValueError, naming every row that has no text, label or fitting options, up to a bound; at the first row that cannot
    be read at all; and where the rows are no task, or some have options of their own and others none.
    """
    columns, faults, found = columns or Columns(), Faults(str(path), "rows"), []
    with_own: dict[bool, str] = {}  # the first row of each kind
    for row in read_rows(path):
        try:
            check_alike(row.options(), options, row.where)
            text, label, own = row.text(columns), row.label(columns), options or row.options()
            if not text.strip():
                raise ValueError(f"{row.where}: the text is empty; remove the row")
            if own is not None:
                check_output(label, own, row.where)
            elif options is not None:
                raise ValueError(f"{row.where}: needs its own `{OPTIONS}`, a list of strings")
            with_own.setdefault(own is not None, row.where)
            found.append((text, label, own))
        except ValueError as error:
            faults.add(row.where, str(error))
    faults.check()
    if not found:
        raise ValueError(f"{path}: holds no rows; write one example a line")
    if len(with_own) > 1:
        raise ValueError(
            f"{with_own[False]}: has no `{OPTIONS}`, and {with_own[True]} has: give all rows some, or none"
        )
    labels = tuple(sorted({label for _, label, own in found if own is None}))
    if labels:
        labels = _as_options(labels, path, columns)
    return [Example(text, own or labels, label) for text, label, own in found]


def check_alike(own: tuple[str, ...] | None, options: Sequence[str] | None, where: str) -> None:
    """ValueError where a row has options of its own and they are not the task's, whatever their order."""
    if own is not None and options and set(own) != set(options):
        raise ValueError(
            f"{where}: `{OPTIONS}` {show(own)}: the task has {show(tuple(options))} for all its questions; take the "
            f"row out, or its `{OPTIONS}`"
        )


def _as_options(labels: tuple[str, ...], path: str | Path, columns: Columns) -> tuple[str, ...]:
    if len(labels) == 1:
        raise ValueError(f"{path}: every label is {labels[0]!r}: a task needs examples of two labels or more")
    if len(labels) > len(LETTERS):
        raise ValueError(
            f"{path}: {len(labels)} different labels in column {columns.label or ' or '.join(LABELS)}: a question has "
            f"at most {len(LETTERS)} options; name the right column with --label"
        )
    check_spelling(labels, str(path))
    return labels


def check_spelling(labels: Iterable[str], where: str) -> None:
    """ValueError, opening with `where`, for two labels that only differ in case, spaces around them or Unicode form, or
    that are one number (1 and 1.0).

    Most often they are one label that was typed in two ways, and would be two options of one meaning.
    """
    seen: dict[str | Decimal, str] = {}
    for label in labels:
        composed = unicodedata.normalize("NFC", label)
        number = Decimal(label) if _NUMBER.fullmatch(label) else None
        other = seen.setdefault(
            unicodedata.normalize("NFC", composed.strip().casefold()) if number is None else number, label
        )
        if other != label and number is not None:
            raise ValueError(
                f"{where}: labels {other!r} and {label!r} are one number: write one of them throughout, or rename one "
                "that means something else"
            )
        if other != label:
            same = unicodedata.normalize("NFC", other) == composed  # repr would show them alike
            told = [ascii(one) if same else repr(one) for one in (other, label)]
            raise ValueError(
                f"{where}: labels {' and '.join(told)} differ in {'Unicode form' if same else 'case or spaces'} alone: "
                "write one of them throughout, or rename one that means something else"
            )


def question(example: Example) -> tuple[str, frozenset[str]]:
    """What an example asks: its text and its options, in whatever order."""
    return example.input, frozenset(example.options)


def by_question(examples: Iterable[Example]) -> list[list[Example]]:
    """The examples that ask the same together, in the order of the first ones."""
    found: dict[tuple[str, frozenset[str]], list[Example]] = defaultdict(list)
    for example in examples:
        found[question(example)].append(example)
    return list(found.values())


def contradictions(examples: Iterable[Example]) -> int:
    """How many questions occur with more than one answer."""
    return sum(len({example.output for example in alike}) > 1 for alike in by_question(examples))


def draw(examples: Sequence[Example], count: int | None, seed: int, source: str) -> list[Example]:
    """`count` of the examples, drawn by the seed (None: all): one of each label, the others as they come, so that
    labels are about as frequent as among all.

    ValueError unless these are FEWEST to MOST, and no fewer than the labels of rows that share their options.
    """
    available = len(examples)
    if count is not None and count < available:
        labels, alike = {example.output for example in examples}, len({question(one)[1] for one in examples}) == 1
        if alike and FEWEST <= count < len(labels):
            raise ValueError(
                f"--examples: {count}: fewer than there are labels, {len(labels)}; raise it, or leave it out"
            )
        places = _each_label_first(examples, permutation(len(examples), seed, "drawn examples"))
        examples = [examples[place] for place in sorted(places[:count])]
    if len(examples) > MOST:
        raise ValueError(
            f"{source}: {len(examples):,} examples: an adaptation takes {FEWEST} to {MOST}; draw some of them with "
            "--examples 100, or train on them"
        )
    if count is not None and count < FEWEST <= available:
        raise ValueError(f"--examples: {count}: an adaptation takes {FEWEST} to {MOST}; raise it, or leave it out")
    if len(examples) < FEWEST:
        raise ValueError(f"{source}: {len(examples)} examples: an adaptation takes {FEWEST} to {MOST}; add some")
    return list(examples)


def _each_label_first(examples: Sequence[Example], places: Sequence[int]) -> list[int]:
    """The places, each label's first one before all others."""
    first: dict[str, int] = {}
    for place in places:
        first.setdefault(examples[place].output, place)
    chosen = set(first.values())
    return [*first.values(), *(place for place in places if place not in chosen)]


def task_files(folder: str | Path) -> dict[str, Path]:
    """Of a folder of tasks, the file of each by name: NAME.jsonl, NAME.csv, NAME.tsv or NAME/train.jsonl.

    ValueError where there is none, or two have one name.
    """
    folder = Path(folder)
    named = [
        (path.stem, path) for path in sorted(folder.glob("*")) if path.suffix.lower() in (".jsonl", ".csv", ".tsv")
    ]
    named += [(path.parent.name, path) for path in sorted(folder.glob("*/train.jsonl"))]
    files: dict[str, Path] = {}
    for name, path in named:
        if name in files:
            raise ValueError(f"{folder}: {files[name]} and {path} are both task {name}: rename or remove one")
        files[name] = path
    if not files:
        raise ValueError(f"{folder}: holds no tasks: NAME.jsonl, NAME.csv, NAME.tsv or NAME/train.jsonl; check --tasks")
    return files


def _decoded(lines: Iterable[bytes], source: str) -> Iterator[str]:
    """Line by line, so that those before one that is not UTF-8 are answered."""
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise ValueError(f"{source}:{number}: byte 0x{byte:02x} is not UTF-8: write it as UTF-8") from error


def _json_rows(lines: Iterable[str], source: str) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line or line.isspace():
            continue
        where = f"{source}:{number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: malformed JSON: {error}: {line.strip()[:60]!r}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: a {type(fields).__name__}, not an object with a text and a label")
        yield Row(where, fields)


def readable(text: str, where: str) -> str:
    """The text. ValueError where no tokenizer can read it."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{where}: half a surrogate pair (\\ud8.. to \\udf..): no tokenizer can read it; remove it")
    return text
