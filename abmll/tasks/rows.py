"""A data set's row becomes an example, as a `HubTask` says."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from abmll.config.errors import show
from abmll.config.schema import HubTask
from abmll.tasks.checks import RowError, check_options, check_output, similar
from abmll.tasks.shuffle import permutation
from abmll.tasks.task import Example
from abmll.tasks.template import Lettered, Template

Row = dict[str, Any]


class RowReader:
    """Reads the rows of one task. Where the task shuffles options, `seed` and the row's number decide their order."""

    def __init__(self, task: HubTask, seed: int = 0):
        self.task = task
        self._seed = seed
        self._template = Template(task.line_break)

    def wrong_columns(self, columns: list[str]) -> Iterator[str]:
        """`key: what is wrong` for every template that is malformed or names a column that is not there."""
        task = self.task
        own = isinstance(task.options, tuple)
        templates = [("input", task.input), ("holdout_by", task.holdout_by or "")]
        templates += [("options", option) for option in task.options if own]
        fields = []
        for key, template in templates:
            try:
                names = [name for _, name, _, _ in self._template.parse(template) if name is not None]
            except ValueError as error:
                yield f"{key}: {template!r}: {error}; write {{column}}, and {{{{ for a brace"
                continue
            fields += [(key, name) for name in names if not (key == "input" and _column(name) == "options")]
        fields += [("label", task.label), *(("required", field) for field in task.required)]
        fields += [] if own else [("options", task.options)]
        for key, field in fields:
            if _column(field) not in columns:
                hint = similar([_column(field)], columns)
                yield f"{key}: no column {_column(field)!r}; the columns are {', '.join(columns)}{hint}"

    def wrong_order(self, features: Mapping[str, Any]) -> Iterator[str]:
        """`key: what is wrong` where the data set names its labels, and by them the entry takes one for another.

        Only for names that are the options' own words: of others nothing can be said.
        """
        from datasets import ClassLabel  # slow to import, and needed by this source only

        task, feature = self.task, features.get(self.task.label)
        if not isinstance(task.options, tuple) or task.label_is != "one" or not isinstance(feature, ClassLabel):
            return
        labels = range(len(task.options)) if task.labels is None else task.labels
        pairs = [
            (feature.names[label], option)
            for label, option in zip(labels, task.options, strict=False)
            if isinstance(label, int) and 0 <= label < len(feature.names)
        ]
        names, options = ([_letters(pair[side]) for pair in pairs] for side in (0, 1))
        if names != options and sorted(names) == sorted(options) and not all(name.isdigit() for name in names):
            listing = ", ".join(f"{name!r} becomes {option!r}" for name, option in pairs)
            yield (
                f"labels: {show(task.labels)}: the data set's names are in another order: {listing}; list the labels "
                "in the order of options"
            )

    def example(self, row: Row, number: int, where: str) -> Example | None:
        """The row's example, or None for a row that the task leaves out.

        ValueError, opening with `where`, for a row that does not fit the task; RowError, where that may be the row's
        own fault and not the entry's.
        """
        task = self.task
        if not all(self._filled(_get(row, field, where)) for field in task.required):
            return None
        if (label := self._label(_get(row, task.label, where), where)) is None:
            return None
        if (found := self._options(row, where)) is None:
            return None
        texts, names = found
        if task.drop_repeated_options and len(set(texts)) < len(texts):
            return None
        options = check_options(texts, where)
        answer = options.index(self._answer(label, options, names, f"{where}: {task.label}"))
        if task.shuffle_options:
            order = permutation(len(options), self._seed, "options", number)
            options, answer = tuple(options[place] for place in order), order.index(answer)
        text = self._fill(task.input, {**row, "options": Lettered(options)}, where)
        names = task.option_names or options
        return Example(text, check_options(names, where), names[answer])

    def group(self, row: Row, example: Example, where: str) -> tuple[str, ...]:
        """What keeps rows together when a part of them is set aside."""
        if self.task.holdout_by is not None:
            return (self._fill(self.task.holdout_by, row, where),)
        # a row's own options are part of its question: a whole task may ask "Which of these do you prefer?"
        own = isinstance(self.task.options, str)
        text = example.input
        if self.task.shuffle_options and (found := self._options(row, where)) is not None:
            # where the input shows them, rows that are alike show them in orders of their own
            text = self._fill(self.task.input, {**row, "options": Lettered(tuple(sorted(found[0])))}, where)
        return (text, *sorted(example.options)) if own else (text,)

    def _fill(self, template: str, row: Row, where: str) -> str:
        try:
            return self._template.vformat(template, (), row).strip()
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            kind = RowError if isinstance(error, RowError) else ValueError
            raise kind(f"{where}: the template {template!r} does not fit the row: {error}") from None

    def _clean(self, text: str) -> str:
        """An option's or a label's text as a template would write it."""
        return self._template.format_field(text, "").strip()

    @staticmethod
    def _filled(value: object) -> bool:
        return bool(value.strip()) if isinstance(value, str) else value not in (None, [], {})

    def _options(self, row: Row, where: str) -> tuple[list, list | None] | None:
        """The options' texts, and their names in the data set (A, B, ...) if it has some; None leaves the row out."""
        task = self.task
        if not isinstance(task.options, str):
            return [self._fill(option, row, where) if "{" in option else option for option in task.options], None
        value, names = _get(row, task.options, where), None
        if task.label_is == "scores":
            value = list(_scores(value, where))
        elif isinstance(value, dict):  # {'text': [...], 'label': ['A', 'B', ...]}, as question-answering sets have it
            names, value = value.get("label"), value.get("text")
        elif task.options_pattern is not None and isinstance(value, str):
            if (match := re.search(task.options_pattern, value, re.DOTALL)) is None:
                raise RowError(f"{where}: column {task.options!r} holds {value!r}: options_pattern does not match it")
            value = list(match.groups(""))
        if not isinstance(value, (list, tuple)):
            raise RowError(
                f"{where}: column {task.options!r} holds {_get(row, task.options, where)!r}: neither a list nor a dict "
                "with 'text'"
            )
        return [self._clean(option) if isinstance(option, str) else option for option in value], names

    def _label(self, label: object, where: str) -> object:
        """The label itself, or None for a row that is left out."""
        task = self.task
        if task.label_is == "votes":
            if not isinstance(label, (list, tuple)) or not label:
                raise ValueError(f"{where}: {task.label}: {label!r}: not a list of labels")
            (first, most), *others = Counter(label).most_common(2)
            if others and others[0][1] == most:
                return None
            label = first
        elif task.label_is == "scores":
            right = [option for option, score in _scores(label, f"{where}: {task.label}").items() if score == 1]
            label = right[0] if len(right) == 1 else None
        elif task.label_cuts is not None:
            if not isinstance(label, (int, float)):
                raise ValueError(f"{where}: {task.label}: {label!r}: not a number")
            low, high = task.label_cuts
            label = 0 if label < low else 1 if label > high else None
        elif label is None:
            raise RowError(f"{where}: {task.label}: the row has no label: read another split")
        return None if label in task.drop_labels else label

    def _answer(self, label: object, options: tuple[str, ...], names: list | None, where: str) -> str:
        """The option that a label means: by the task's labels, by the data set's names, as its text, or its index."""
        if self.task.label_is == "scores":
            return self._clean(str(label))
        if self.task.labels is not None and label in self.task.labels:
            return _numbered(options, self.task.labels.index(label), label, where)
        if self.task.labels is not None:
            raise ValueError(
                f"{where}: {label!r}: not among labels {list(self.task.labels)}; add it there, or to drop_labels to "
                "leave such rows out"
            )
        if names is not None and label in names:
            return _numbered(options, names.index(label), label, where)
        if isinstance(label, str) and ((text := self._clean(label)) in options or not re.fullmatch(r"-?\d+", label)):
            check_output(text, options, where)
            return text
        if not isinstance(label, (int, str)):
            raise ValueError(f"{where}: {label!r}, a {type(label).__name__}: a label is an index or an option's text")
        index = int(label)
        said = next((option for option in options if option.casefold() == str(label).casefold()), None)
        if not isinstance(label, str) and said not in (None, *options[max(index, 0) : index + 1]):  # 1 of ["1", "2"]
            raise ValueError(
                f"{where}: {label!r}: is the text of option {said!r}, whose index is {options.index(said)}; say which "
                "is meant by labels: [...], a value of the column for each option"
            )
        if not 0 <= index < len(options):
            unlabelled = " (-1 marks a split without labels: read another split)" if index == -1 else ""
            raise ValueError(f"{where}: {index}: not an index into the {len(options)} options{unlabelled}")
        return options[index]


def _numbered(options: tuple[str, ...], index: int, label: object, where: str) -> str:
    """RowError where the row has fewer options than the others."""
    if index >= len(options):
        raise RowError(f"{where}: {label!r}: is the label of option {index + 1}, and the row has {len(options)}")
    return options[index]


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text).lower()


def _column(field: str) -> str:
    return re.split(r"[.\[]", field)[0]


def _get(row: Row, field: str, where: str) -> Any:
    try:
        return string.Formatter().get_field(field, (), row)[0]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: no {field} in this row ({error})") from None


def _scores(value: object, where: str) -> dict[str, float]:
    """Options and their scores; nothing where the row has none, as a question with a free answer."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{where}: {value[:60]!r}: not JSON ({error})") from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{where}: {str(value)[:60]!r}: not a mapping of options to scores")
    return {str(option): score for option, score in (value or {}).items() if score is not None}
