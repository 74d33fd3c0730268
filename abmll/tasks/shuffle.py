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
    """An endless concatenation of shuffles of range(size); shuffle number p depends on the key and p only.

    Any stretch of it can be asked for in any order, so a position in the data is one integer.
    """

    def __init__(self, size: int, *key: int | str):
        self.size = size
        self.key = key
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
            # two neighbours are enough for reading in order, and keep the memory bounded
            self._passes = {near: order for near, order in self._passes.items() if abs(near - number) == 1}
            self._passes[number] = permutation(self.size, *self.key, number)
        return self._passes[number]
