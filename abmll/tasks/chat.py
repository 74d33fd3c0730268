"""How a tokenizer's model is asked: the text around questions and former answers, and the tokens of the letters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from abmll.tasks.checks import LETTERS
from abmll.tasks.escape import Escape

_PLACE, _ANSWER = "THE QUESTION'S PLACE", "THE ANSWER'S PLACE"
# Some templates print today's date or open a chain of thought: a prompt must be the same every day, and its next
# token must be the answer. Templates that know neither variable ignore them.
_DATE = "26 Jul 2024"
_TEMPLATE_VARIABLES = {"date_string": _DATE, "enable_thinking": False}
_NOW = "strftime_now"  # today's date, which transformers gives every template; a macro of that name comes before it


class Chat:
    """Joins questions and answers as the tokenizer's chat template does, or as plain blocks where it has none.

    The template is rendered at the start alone, since it costs more than the tokens. `letter_ids` are the ids of
    A .. Z as they follow a prompt, and as a former answer has them.
    """

    def __init__(self, tokenizer: Any, probe: str, demonstrations: int = 0):
        """`probe`: any question; `demonstrations`: answered questions in a prompt, at most.

        ValueError if the tokenizer or its template cannot serve.
        """
        self.tokenizer = tokenizer
        self._name = f"tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"
        self._escaped = Escape(tokenizer)
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self._before, self._after = self._frame()
        self.letter_ids, space = self._letters_behind(self.text([probe]))
        if demonstrations:
            self._find_turn(probe, demonstrations, space)

    def text(self, questions: Sequence[str], letters: Sequence[str] = ()) -> str:
        """The text whose next token answers the last question; `letters` answer those before it.

        Special tokens are the template's alone: where a question spells one, it is escaped (`abmll.tasks.escape`).
        """
        *former, last = map(self._escaped, questions)
        turns = [f"{q}{self._answer}{letter}{self._next}" for q, letter in zip(former, letters, strict=True)]
        return f"{self._before}{''.join(turns)}{last}{self._after}"

    def encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # a chat template writes the special tokens itself: adding them again would give two BOS
        return self.tokenizer(
            texts, add_special_tokens=not self._has_template, return_attention_mask=False, verbose=False
        )["input_ids"]

    def _frame(self) -> tuple[str, str]:
        """What stands before and after the question."""
        if not self._has_template:
            return "", "\n\nAnswer:"
        pieces = self._render([_PLACE]).split(_PLACE)
        if len(pieces) != 2 or self._render(["Question:\n?"]) != "Question:\n?".join(pieces):
            raise ValueError(
                f"{self._name}: its chat template does not hold the user's message once and verbatim; "
                "use a model with another template"
            )
        return pieces[0], pieces[1]

    def _find_turn(self, probe: str, demonstrations: int, space: str) -> None:
        """Learns what stands between a question and the letter that answers it, and between that and the next."""
        for before_letter in dict.fromkeys((space, "", " ")):  # templates differ in what they strip from an answer
            try:
                self._answer, self._next = self._between(before_letter)
                if all(
                    self._joins_as_rendered(probe, number, before_letter) for number in range(1, demonstrations + 1)
                ) and self._same_letters(probe):
                    return
            except (TemplateError, ValueError):  # ValueError: other pieces than wanted, or a letter of several tokens
                continue
        raise ValueError(
            f"{self._name}: a prompt cannot repeat former questions and answers verbatim, with the letter as the token "
            "that the model would write (its chat template changes or refuses them); set tasks.demonstrations=0, or "
            "use a model with another template"
        )

    def _between(self, before_letter: str) -> tuple[str, str]:
        if not self._has_template:
            return f"{self._after}{before_letter}", "\n\n"
        _, between, _ = self._render([_PLACE, _PLACE], [f"{before_letter}{_ANSWER}"]).split(_PLACE)
        answer, following = between.split(_ANSWER)
        return answer, following

    def _joins_as_rendered(self, probe: str, number: int, before_letter: str) -> bool:
        """Whether a conversation with so many answered questions is what the template makes of it."""
        questions = [f"{probe}\n{place}" for place in range(number + 1)]
        letters = [LETTERS[place % 2] for place in range(number)]
        written = [f"{before_letter}{letter}" for letter in letters]
        return not self._has_template or self.text(questions, letters) == self._render(questions, written)

    def _same_letters(self, probe: str) -> bool:
        """Whether a former answer is the letter's own token, and the answer behind it the same as without it."""
        ids = self.encode([self.text([probe, probe], [letter]) for letter in LETTERS])
        if len(set(map(len, ids))) != 1:
            return False
        if [column for column in zip(*ids, strict=True) if len(set(column)) > 1] != [self.letter_ids]:
            return False
        return self._letters_behind(self.text([probe, probe], ["A"]))[0] == self.letter_ids

    def _render(self, questions: Sequence[str], answers: Sequence[str] = ()) -> str:
        messages = [{"role": "user", "content": questions[0]}]
        for answer, question in zip(answers, questions[1:], strict=True):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        variables = dict(_TEMPLATE_VARIABLES)
        if _NOW in str(self.tokenizer.chat_template):
            macro = f"{{% macro {_NOW}(format) %}}{_DATE}{{% endmacro %}}"
            variables["chat_template"] = macro + self.tokenizer.get_chat_template()
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)

    def _letters_behind(self, prompt: str) -> tuple[tuple[int, ...], str]:
        """The ids of A .. Z behind the prompt, and the space that they include."""
        # after a line's end a model writes "A"; after a word or a bracket " A", which is another token
        spaces = ("",) if prompt[-1].isspace() else (" ", "")
        problem = ""
        for space in spaces:
            prompt_ids, *answers = self.encode([prompt, *(f"{prompt}{space}{letter}" for letter in LETTERS)])
            wrong = [
                letter
                for letter, ids in zip(LETTERS, answers, strict=True)
                if ids[:-1] != prompt_ids or ids[-1] == self.tokenizer.unk_token_id
            ]
            found = tuple(ids[-1] for ids in answers)
            if not wrong and len(set(found)) == len(LETTERS):
                return found, space
            problem = problem or f"{', '.join(wrong[:5]) or 'some letters'} as {space + 'A'!r} after {prompt[-12:]!r}"
        raise ValueError(
            f"{self._name}: cannot write every answer's letter as one token behind the prompt ({problem}); "
            "use a model whose tokenizer has the letters A to Z"
        )
