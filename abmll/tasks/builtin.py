"""A generator of small text tasks that need no file, for a first run and for tests.

Every task shows short texts of two kinds (numbers or animals, dates or code, ...) and asks which is which. Two
families, in turns:
    mapping   two nonsense words answer the two kinds; which answers which is drawn for each task, so that only its own
              examples can tell: without them half of the answers are right, by construction
    named     the options are the kinds' own names, in an order that is fixed within the task
Training and test tasks share no kind of text and no nonsense word.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from random import Random

from abmll.config.schema import BuiltinTasks
from abmll.tasks.kinds import KINDS, NONSENSE
from abmll.tasks.shuffle import keyed_random
from abmll.tasks.task import Example, Task

_TRAIN_SHARE = 2 / 3  # of the kinds and of the nonsense words


def builtin_tasks(config: BuiltinTasks, seed: int) -> tuple[list[Task], list[Task]]:
    """Training and test tasks, a pure function of the two arguments; of an odd number, one more is a mapping.

    ValueError where more tasks are asked for than there are.
    """
    rng = keyed_random(seed, "builtin", "materials")
    train_kinds, test_kinds = _parted(list(KINDS), rng)
    train_words, test_words = _parted(list(NONSENSE), rng)
    return (
        _tasks(train_kinds, train_words, config.train_tasks, "train", config, seed),
        _tasks(test_kinds, test_words, config.test_tasks, "test", config, seed),
    )


def _parted(items: list[str], rng: Random) -> tuple[list[str], list[str]]:
    rng.shuffle(items)
    cut = round(len(items) * _TRAIN_SHARE)
    return items[:cut], items[cut:]


def _tasks(kinds: list[str], words: list[str], count: int, role: str, config: BuiltinTasks, seed: int) -> list[Task]:
    rng = keyed_random(seed, "builtin", role)
    mapping, named = _mapping(kinds, words, rng), _named(kinds, rng)
    most = 2 * len(kinds) * (len(kinds) - 1) // 2
    if count > most:
        raise ValueError(f"tasks.builtin.{role}_tasks: {count}: the generator has {most}; ask for fewer")
    made = []
    for place in range(count):
        family, (pair, options) = ("named", next(named)) if place % 2 else ("mapping", next(mapping))
        name = "/".join((family, "-".join(pair), *(("-".join(options),) if family == "mapping" else ())))
        made.append(_task(name, pair, options, config, keyed_random(seed, "builtin", name)))
    return made


def _mapping(kinds: list[str], words: list[str], rng: Random) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Pairs of kinds with two nonsense words. The kinds' order is the rule: the first kind is answered by the first."""
    pairs = list(combinations(kinds, 2))
    rng.shuffle(pairs)
    for pair in pairs:
        yield tuple(rng.sample(pair, 2)), tuple(rng.sample(words, 2))


def _named(kinds: list[str], rng: Random) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    pairs = list(combinations(kinds, 2))
    rng.shuffle(pairs)
    for pair in pairs:
        drawn = tuple(rng.sample(pair, 2))
        yield drawn, drawn


def _task(name: str, pair: tuple[str, str], options: tuple[str, str], config: BuiltinTasks, rng: Random) -> Task:
    """Texts of pair[i] are answered by options[i]; no text is both in training and in test."""
    needed = (config.train_examples + 1) // 2 + (config.test_examples + 1) // 2
    texts = [_distinct(kind, needed, rng) for kind in pair]

    def split(count: int, start: int) -> tuple[Example, ...]:
        examples = [Example(texts[i % 2][start + i // 2], options, options[i % 2]) for i in range(count)]
        rng.shuffle(examples)
        return tuple(examples)

    train = split(config.train_examples, 0)
    return Task(name, train, (), split(config.test_examples, (config.train_examples + 1) // 2))


def _distinct(kind: str, count: int, rng: Random) -> list[str]:
    drawn = dict.fromkeys(KINDS[kind](rng) for _ in range(4 * count))
    if len(drawn) < count:
        raise ValueError(
            f"tasks.builtin.train_examples, test_examples: {count} texts of the kind {kind}: too few of them differ; "
            "ask for fewer examples"
        )
    return list(drawn)[:count]
