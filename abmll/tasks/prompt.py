"""Examples as token ids: the prompt's wording, the model's chat template, and the letters that answer it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from abmll.tasks.checks import LETTERS
from abmll.tasks.examples import PromptCounts, PromptedTask, ScoredExamples, TrainingExamples, any_fits
from abmll.tasks.shuffle import permutation
from abmll.tasks.task import Example, PromptedExample, Task

_INSTRUCTION = "Return the label of the correct answer for the question below."
_PLACE = "THE QUESTION'S PLACE"
_PROBE = Example("Is water wet?", ("yes", "no"), "yes")
# Some templates print today's date or open a chain of thought: a prompt must be the same every day, and its next
# token must be the answer. Templates that know neither variable ignore them.
_TEMPLATE_VARIABLES = {"date_string": "26 Jul 2024", "enable_thinking": False}
_CHUNK = 1024  # examples that are measured at a time


@dataclass(frozen=True)
class Limits:
    """At most so many examples of each split; None: all."""

    train: int | None = None
    validation: int | None = None
    test: int | None = None


_ALL = Limits()


class Prompter:
    """Turns tasks into token ids. `letter_ids` are the ids of A .. Z as they follow a prompt."""

    def __init__(self, tokenizer: Any, max_tokens: int, too_long: Literal["drop", "truncate"]):
        """`max_tokens` bounds a prompt, template included. ValueError if the tokenizer cannot serve."""
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.too_long = too_long
        self._name = f"tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self._before, self._after = self._frame()
        self.letter_ids = self._find_letters()

    def prompt(self, example: Example) -> str:
        """The text whose next token is the answer's letter."""
        choices = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, example.options, strict=False))
        question = f"{_INSTRUCTION}\n\nQuestion: {example.input}\n\nChoices:\n{choices}".rstrip()
        return f"{self._before}{question}{self._after}"

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
        )

    def measure(self, task: Task, limits: Limits = _ALL) -> PromptCounts:
        """What `max_tokens` does to the examples that `prompt_task` draws: tokenises them all, and keeps none."""
        counts = PromptCounts()
        for rows in _drawn(task, limits).values():
            for start in range(0, len(rows), _CHUNK):
                counts.add(self.encode(rows[start : start + _CHUNK]))
        return counts

    def encode(self, examples: Sequence[Example]) -> list[PromptedExample | None]:
        """The examples as token ids, each of at most `max_tokens`; None for one that does not fit."""
        ids = self._encode([self.prompt(example) for example in examples])
        long = {place for place, tokens in enumerate(ids) if len(tokens) > self.max_tokens}
        if self.too_long == "truncate":
            self._shorten(examples, ids, sorted(long))
        return [
            PromptedExample(array("i", tokens), example.label, len(example.options), place in long)
            if len(tokens) <= self.max_tokens
            else None
            for place, (example, tokens) in enumerate(zip(examples, ids, strict=True))
        ]

    def _shorten(self, examples: Sequence[Example], ids: list[list[int]], long: list[int]) -> None:
        """Replaces ids[place], for each of the too long, by those of the same prompt with a shorter question.

        The question loses characters from its middle, so that a premise and its hypothesis, or a text and what is
        asked about it, both keep a part. Where no room is left for it at all, the ids stay too long.
        """
        bare = self._encode([self.prompt(replace(examples[place], input="")) for place in long])
        room = {place: self.max_tokens - len(tokens) for place, tokens in zip(long, bare, strict=True)}
        kept = {place: len(examples[place].input) for place in long if room[place] > 0}
        while kept:  # each round's cut is proportional to what the last one left over, so two or three rounds do
            for place in kept:
                used = len(ids[place]) - self.max_tokens + room[place]
                kept[place] = min(kept[place] - 1, kept[place] * room[place] // used)
            kept = {place: length for place, length in kept.items() if length > 0}
            cut = [
                replace(examples[place], input=_without_middle(examples[place].input, kept[place])) for place in kept
            ]
            for place, tokens in zip(kept, self._encode([self.prompt(example) for example in cut]), strict=True):
                ids[place] = tokens
            kept = {place: length for place, length in kept.items() if len(ids[place]) > self.max_tokens}

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # a chat template writes the special tokens itself: adding them again would give two BOS
        return self.tokenizer(
            texts, add_special_tokens=not self._has_template, return_attention_mask=False, verbose=False
        )["input_ids"]

    def _frame(self) -> tuple[str, str]:
        """What stands before and after the question: rendered once, since a template costs more than the tokens."""
        if not self._has_template:
            return "", "\n\nAnswer:"
        pieces = self._render(_PLACE).split(_PLACE)
        if len(pieces) != 2 or self._render("Question:\n?") != "Question:\n?".join(pieces):
            raise ValueError(
                f"{self._name}: its chat template does not hold the user's message once and verbatim; "
                "use a model with another template"
            )
        return pieces[0], pieces[1]

    def _render(self, content: str) -> str:
        message = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, **_TEMPLATE_VARIABLES
        )

    def _find_letters(self) -> tuple[int, ...]:
        probe = self.prompt(_PROBE)
        # after a line's end a model writes "A"; after a word or a bracket " A", which is another token
        spaces = ("",) if probe[-1].isspace() else (" ", "")
        problem = ""
        for space in spaces:
            prompt_ids, *answers = self._encode([probe, *(f"{probe}{space}{letter}" for letter in LETTERS)])
            wrong = [
                letter
                for letter, ids in zip(LETTERS, answers, strict=True)
                if ids[:-1] != prompt_ids or ids[-1] == self.tokenizer.unk_token_id
            ]
            found = tuple(ids[-1] for ids in answers)
            if not wrong and len(set(found)) == len(LETTERS):
                return found
            problem = problem or f"{', '.join(wrong[:5]) or 'some letters'} as {space + 'A'!r} after {probe[-12:]!r}"
        raise ValueError(
            f"{self._name}: cannot write every answer's letter as one token behind the prompt ({problem}); "
            "use a model whose tokenizer has the letters A to Z"
        )


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
