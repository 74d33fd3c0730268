"""Examples as token ids: the prompt's wording, the model's chat template, and the letters that answer it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from abmll.tasks.checks import LETTERS
from abmll.tasks.shuffle import permutation
from abmll.tasks.task import Example, PromptedExample, PromptedTask, Task

_INSTRUCTION = "Return the label of the correct answer for the question below."
_PLACE = "THE QUESTION'S PLACE"
_PROBE = Example("Is water wet?", ("yes", "no"), "yes")
# Some templates print today's date or open a chain of thought: a prompt must be the same every day, and its next
# token must be the answer. Templates that know neither variable ignore them.
_TEMPLATE_VARIABLES = {"date_string": "26 Jul 2024", "enable_thinking": False}


@dataclass
class PromptCounts:
    """Of one task's examples: how many, how many lost part of the question, how many were left out."""

    total: int = 0
    truncated: int = 0
    dropped: int = 0
    longest: int = 0  # tokens, of those that are kept


@dataclass
class PromptReport:
    """What `max_tokens` did to each task."""

    max_tokens: int
    tasks: dict[str, PromptCounts] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """One sentence for every task that lost something."""
        return [
            f"{name}: of {c.total} prompts {c.truncated} truncated and {c.dropped} dropped at {self.max_tokens} tokens"
            for name, c in self.tasks.items()
            if c.truncated or c.dropped
        ]


class Prompter:
    """Turns tasks into token ids. `letter_ids` are the ids of A .. Z as they follow a prompt; `report` counts."""

    def __init__(self, tokenizer: Any, max_tokens: int, too_long: Literal["drop", "truncate"]):
        """`max_tokens` bounds a prompt, template included. ValueError if the tokenizer cannot serve."""
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.too_long = too_long
        self.report = PromptReport(max_tokens)
        self._name = f"tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self._before, self._after = self._frame()
        self.letter_ids = self._find_letters()

    def prompt(self, example: Example) -> str:
        """The text whose next token is the answer's letter."""
        choices = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, example.options, strict=False))
        question = f"{_INSTRUCTION}\n\nQuestion: {example.input}\n\nChoices:\n{choices}".rstrip()
        return f"{self._before}{question}{self._after}"

    def prompt_task(
        self,
        task: Task,
        max_train: int | None = None,
        max_validation: int | None = None,
        max_test: int | None = None,
    ) -> PromptedTask:
        """Prompts at most so many examples of each split: a fixed draw, the same for every seed and method.

        ValueError if a split has examples but none is short enough.
        """
        counts = self.report.tasks[task.name] = PromptCounts()
        splits = {}
        for split, limit in (("train", max_train), ("validation", max_validation), ("test", max_test)):
            examples = getattr(task, split)
            if limit is not None and limit < len(examples):
                drawn = sorted(permutation(len(examples), "limit", task.name, split)[:limit])
                examples = [examples[place] for place in drawn]
            splits[split] = self._prompt_all(examples, counts)
            if examples and not splits[split]:
                raise ValueError(
                    f"task {task.name}: none of its {len(examples)} {split} prompts fits in tasks.max_tokens: "
                    f"{self.max_tokens}; raise it, or set tasks.too_long to truncate if it is drop"
                )
        return PromptedTask(task.name, **splits)

    def _prompt_all(self, examples: Sequence[Example], counts: PromptCounts) -> tuple[PromptedExample, ...]:
        ids = self._encode([self.prompt(example) for example in examples])
        long = [place for place, tokens in enumerate(ids) if len(tokens) > self.max_tokens]
        if self.too_long == "truncate":
            self._shorten(examples, ids, long)
        prompted = tuple(
            PromptedExample(array("i", tokens), example.label, len(example.options))
            for example, tokens in zip(examples, ids, strict=True)
            if len(tokens) <= self.max_tokens
        )
        dropped = len(examples) - len(prompted)
        counts.total += len(examples)
        counts.dropped += dropped
        counts.truncated += len(long) - dropped
        counts.longest = max([counts.longest, *(len(example.token_ids) for example in prompted)])
        return prompted

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


def _without_middle(text: str, length: int) -> str:
    head = length - length // 2
    return f"{text[:head]} ... {text[len(text) - length // 2 :]}"
