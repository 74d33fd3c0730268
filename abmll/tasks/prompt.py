"""Examples as token ids: the prompt's wording, the examples that it shows before the question, and what fits."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from abmll.tasks.chat import Chat
from abmll.tasks.checks import LETTERS
from abmll.tasks.examples import Demonstrations, PromptCounts, PromptedTask, ScoredExamples, TrainingExamples, any_fits
from abmll.tasks.shuffle import permutation
from abmll.tasks.task import Example, PromptedExample, Task

_INSTRUCTION = "Return the label of the correct answer for the question below."
_PROBE = Example("Is water wet?", ("yes", "no"), "yes")
_CHUNK = 1024  # examples that are measured at a time


@dataclass(frozen=True)
class Limits:
    """At most so many examples of each split; None: all."""

    train: int | None = None
    validation: int | None = None
    test: int | None = None


_ALL = Limits()
_NONE = Demonstrations()


class Prompter:
    """Turns tasks into token ids. `letter_ids` are the ids of A .. Z as they follow a prompt."""

    def __init__(
        self,
        tokenizer: Any,
        max_tokens: int,
        too_long: Literal["drop", "truncate"],
        demonstrations: Demonstrations = _NONE,
    ):
        """`max_tokens` bounds a prompt, template and demonstrations included.

        ValueError if the tokenizer cannot serve, or `max_tokens` has no room for the demonstrations.
        """
        self.max_tokens = max_tokens
        self.too_long = too_long
        self.demonstrations = demonstrations
        self._chat = Chat(tokenizer, _question(_PROBE), demonstrations.count)
        self.tokenizer, self.letter_ids = tokenizer, self._chat.letter_ids
        self._share = max_tokens // (demonstrations.count + 1)
        if demonstrations.count:
            self._check_room()

    def prompt(self, example: Example) -> str:
        """The text whose next token is the answer's letter."""
        shown = example.demonstrations
        return self._chat.text([_question(one) for one in (*shown, example)], [LETTERS[one.label] for one in shown])

    def digest(self) -> str:
        """SHA-256 of how a question without demonstrations is written and tokenised, and of the letters' tokens: other
        than a tokenizer's or a template's name it tells whether two bases are asked alike.
        """
        ids = self._encode([self.prompt(_PROBE)])[0]
        return hashlib.sha256(json.dumps([list(ids), list(self.letter_ids)]).encode()).hexdigest()

    def prompt_task(self, task: Task, limits: Limits = _ALL) -> PromptedTask:
        """The task's examples, at most `limits` of a split: a fixed draw, the same for every seed and method.

        Prompts are made when they are used (see `abmll.tasks.examples`). ValueError if a split has examples but none
        fits, which most often is known from its first.
        """
        splits = _drawn(task, limits)
        for split, rows in splits.items():
            if rows and not any_fits(rows, self.encode):
                raise ValueError(
                    f"task {task.name}: none of its {len(rows)} {split} prompts fits in tasks.max_tokens: "
                    f"{self.max_tokens}; raise it, or set tasks.too_long to truncate if it is drop"
                )
        return PromptedTask(
            task.name,
            TrainingExamples(task.name, splits["train"], self.encode),
            ScoredExamples(splits["validation"], self.encode),
            ScoredExamples(splits["test"], self.encode),
            self.demonstrations,
        )

    def measure(self, task: Task, limits: Limits = _ALL, before_train: int = 0, before_scored: int = 0) -> PromptCounts:
        """What `max_tokens` does to the examples that `prompt_task` draws: tokenises them all, and keeps none.

        Each example of the training split, and each of the others, is behind so many demonstrations: the next ones of
        the training split, where a run draws them by its seed.
        """
        counts, splits = PromptCounts(), _drawn(task, limits)
        for split, rows in splits.items():
            count = before_train if split == "train" else before_scored
            for start in range(0, len(rows), _CHUNK):
                part = range(start, min(start + _CHUNK, len(rows)))
                counts.add(self.encode([rows[at].behind(_others(splits["train"], at, count)) for at in part]))
        return counts

    def encode(self, examples: Sequence[Example]) -> list[PromptedExample | None]:
        """The examples as token ids, each of at most `max_tokens`; None for one that does not fit.

        A demonstration may take an equal share of `max_tokens`, max_tokens // (k + 1), counted as a prompt of its own;
        a longer one is treated as `too_long` says. Where a prompt is too long nevertheless, it loses demonstrations,
        the farthest from the question first, and only without any of them a part of the question.
        """
        asked = [len(example.demonstrations) for example in examples]
        examples = self._with_fitting_demonstrations(examples)
        ids = self._encode([self.prompt(example) for example in examples])
        self._leave_out(examples, ids)
        left_out = [count - len(example.demonstrations) for count, example in zip(asked, examples, strict=True)]
        long = self._shorten(examples, ids, self.max_tokens)
        return [
            PromptedExample(array("i", tokens), example.label, len(example.options), at in long, left_out[at])
            if len(tokens) <= self.max_tokens
            else None
            for at, (example, tokens) in enumerate(zip(examples, ids, strict=True))
        ]

    def _with_fitting_demonstrations(self, examples: Sequence[Example]) -> list[Example]:
        shown = list(dict.fromkeys(one for example in examples for one in example.demonstrations))
        short = shown.copy()
        ids = self._encode([self.prompt(one) for one in shown])
        self._shorten(short, ids, self._share)
        pairs = zip(shown, short, ids, strict=True)
        fitting = {one: cut for one, cut, tokens in pairs if len(tokens) <= self._share}
        return [
            replace(example, demonstrations=tuple(fitting[one] for one in example.demonstrations if one in fitting))
            if example.demonstrations
            else example
            for example in examples
        ]

    def _leave_out(self, examples: list[Example], ids: list[list[int]]) -> None:
        """Takes demonstrations from those that are too long, until they fit or have none."""
        long = list(range(len(ids)))
        while long := [at for at in long if len(ids[at]) > self.max_tokens and examples[at].demonstrations]:
            for at in long:
                examples[at] = replace(examples[at], demonstrations=examples[at].demonstrations[1:])
            for at, tokens in zip(long, self._encode([self.prompt(examples[at]) for at in long]), strict=True):
                ids[at] = tokens

    def _shorten(self, examples: list[Example], ids: list[list[int]], limit: int) -> set[int]:
        """Gives those that are longer than `limit`, whose places it returns, a shorter question, if too_long says so.

        The question loses characters from its middle, so that a premise and its hypothesis, or a text and what is
        asked about it, both keep a part. Where no room is left for it at all, the ids stay too long.
        """
        long = [place for place, tokens in enumerate(ids) if len(tokens) > limit]
        if self.too_long == "drop":
            return set(long)
        bare = self._encode([self.prompt(replace(examples[place], input="")) for place in long])
        room = {place: limit - len(tokens) for place, tokens in zip(long, bare, strict=True)}
        texts = {place: examples[place].input for place in long}
        kept = {place: len(texts[place]) for place in long if room[place] > 0}
        while kept:  # each round's cut is proportional to what the last one left over, so two or three rounds do
            for place in kept:
                used = len(ids[place]) - limit + room[place]
                kept[place] = min(kept[place] - 1, kept[place] * room[place] // used)
            kept = {place: length for place, length in kept.items() if length > 0}
            for place in kept:
                examples[place] = replace(examples[place], input=_without_middle(texts[place], kept[place]))
            for place, tokens in zip(kept, self._encode([self.prompt(examples[place]) for place in kept]), strict=True):
                ids[place] = tokens
            kept = {place: length for place, length in kept.items() if len(ids[place]) > limit}
        return set(long)

    def _check_room(self) -> None:
        count, (bare,) = self.demonstrations.count, self._encode([self.prompt(replace(_PROBE, input=""))])
        if len(bare) >= self._share:
            raise ValueError(
                f"tasks.demonstrations: {count}: each may take {self._share} of tasks.max_tokens: {self.max_tokens}, "
                f"and a prompt without its question takes {len(bare)}; set fewer, or tasks.max_tokens to at least "
                f"{(count + 1) * (len(bare) + 1)}"
            )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._chat.encode(texts)


def _question(example: Example) -> str:
    choices = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, example.options, strict=False))
    return f"{_INSTRUCTION}\n\nQuestion: {example.input}\n\nChoices:\n{choices}".rstrip()


def _others(rows: Sequence[Example], place: int, count: int) -> list[Example]:
    """The rows behind a place, from the end to the start again."""
    return [rows[(place + step) % len(rows)] for step in range(1, min(count, len(rows)) + 1)]


def _drawn(task: Task, limits: Limits) -> dict[str, Sequence[Example]]:
    splits: dict[str, Sequence[Example]] = {}
    for split, limit in vars(limits).items():
        rows = splits[split] = getattr(task, split)
        if limit is not None and limit < len(rows):
            drawn = sorted(permutation(len(rows), "limit", task.name, split)[:limit])
            splits[split] = [rows[place] for place in drawn]
    return splits


def _without_middle(text: str, length: int) -> str:
    head = length - length // 2
    return f"{text[:head]} ... {text[len(text) - length // 2 :]}"
