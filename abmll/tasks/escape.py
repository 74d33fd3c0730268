"""Text of the data that spells one of the tokenizer's own tokens stays text.

A tokenizer reads `<|im_end|>` as one token wherever it stands. In an example's text it would close the question and
could open an answer; so it is spelled `< |im_end|>` there, which is none. All other text is left to the letter.
"""

from __future__ import annotations

import re
from typing import Any

_BREAKS = (" ", "\u200d")  # the second where a tokenizer drops spaces


class Escape:
    """Breaks the spelling of a tokenizer's special tokens, and of added ones that its chat template writes."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, template = tokenizer, str(getattr(tokenizer, "chat_template", None) or "")
        # others (a run of spaces, `<table>`) are words like any: what they stand for is in the text
        own = {
            number: token
            for number, token in tokenizer.added_tokens_decoder.items()
            if len(token.content.strip()) > 1 and (token.special or token.content in template)
        }
        self._ids = set(own)
        words = sorted({token.content.strip() for token in own.values()}, key=len, reverse=True)
        self._spelled = _any_of(words)
        self._starts = _any_of(sorted({word[:4] for word in words}))  # thousands of words begin alike
        backend = getattr(tokenizer, "backend_tokenizer", None)
        normalizer = getattr(backend, "normalizer", None)
        # such tokens are looked for in the normalised text: other letters may stand for theirs
        self._normalize = (
            normalizer.normalize_str if normalizer and any(token.normalized for token in own.values()) else None
        )

    def __call__(self, text: str) -> str:
        """The text, so spelled that it holds none of the tokens. ValueError where that cannot be had."""
        if not self._may_hold(text):
            return text
        for mark in _BREAKS:
            broken = text
            for _ in range(len(text)):
                if not (places := self._places(broken)):
                    return broken
                for place in reversed(places):
                    broken = f"{broken[:place]}{mark}{broken[place:]}"
        raise ValueError(f"the text {text[:80]!r} spells a special token that cannot be broken up; take it out")

    def _may_hold(self, text: str) -> bool:
        return bool(self._starts.search(text) or (self._normalize and self._starts.search(self._normalize(text))))

    def _places(self, text: str) -> list[int]:
        """Behind the first character of each of the tokens that the tokenizer reads in the text."""
        if not self._tokenizer.is_fast:
            return [found.start() + 1 for found in self._spelled.finditer(text)]
        read = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        pairs = zip(read["input_ids"], read["offset_mapping"], strict=True)
        # a token may take the spaces before it
        return [end - len(text[start:end].lstrip()) + 1 for number, (start, end) in pairs if number in self._ids]


def _any_of(words: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, words)) if words else r"(?!)")
