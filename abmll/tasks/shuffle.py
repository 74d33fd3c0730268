"""Shuffles that are pure functions of a key, the same on every machine, rank and Python version."""

from __future__ import annotations

import hashlib
import random


def keyed_random(*key: int | str) -> random.Random:
    """A generator that the key alone decides. (Python's own `hash` of a string differs from process to process.)"""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "little"))


def permutation(size: int, *key: int | str) -> list[int]:
    order = list(range(size))
    keyed_random(*key).shuffle(order)
    return order


class EndlessShuffle:
    """An endless concatenation of shuffles of range(size), which are a function of the key and `together`.

    Any stretch of it can be asked for in any order, so a position in the data is one integer. A stretch of `together`
    elements that starts at a multiple of it holds none twice, if there are as many: where two shuffles meet in it, the
    second one's first elements are those that it does not have from the first.
    """

    def __init__(self, size: int, *key: int | str, together: int = 1):
        self.size = size
        self.key = key
        self.together = together
        self._passes: dict[int, list[int]] = {}

    def take(self, start: int, count: int) -> list[int]:
        """Elements start .. start + count - 1."""
        taken: list[int] = []
        while len(taken) < count:
            number, offset = divmod(start + len(taken), self.size)
            taken += self._pass(number)[offset : offset + count - len(taken)]
        return taken

    def _pass(self, number: int) -> list[int]:
        if number not in self._passes:
            # a pass's order may depend on the one before, and so on down to one that begins with a stretch
            first = number
            while self._straddled(first) and first - 1 not in self._passes:
                first -= 1
            for following in range(first, number + 1):
                # two neighbours are enough for reading in order, and keep the memory bounded
                order = self._shuffled(following)
                self._passes = {near: own for near, own in self._passes.items() if abs(near - following) == 1}
                self._passes[following] = order
        return self._passes[number]

    def _straddled(self, number: int) -> int:
        """How many elements of the pass before stand in the stretch that this pass begins in."""
        return number * self.size % self.together if self.together <= self.size else 0

    def _shuffled(self, number: int) -> list[int]:
        order = permutation(self.size, *self.key, number)
        before = self._straddled(number)
        if not before:
            return order
        taken = set(self._passes[number - 1][-before:])
        head = [element for element in order if element not in taken][: self.together - before]
        chosen = set(head)
        return head + [element for element in order if element not in chosen]
