"""A generator of small text tasks that need no file, for a first run and for tests.

Two families, in turns:
    mapping    two categories of words, and two nonsense words that answer them; which one answers which is drawn for
               each task, so that only a task's examples can tell (without them half the answers are right)
    semantic   the options are words that mean something, in an order that changes from example to example
               (categories, membership, sentiment, numbers): what one task teaches helps with the next at once
Training and test tasks share no category, no nonsense word, no subject and no range of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, permutations, zip_longest
from random import Random

from abmll.config.schema import BuiltinTasks
from abmll.tasks.shuffle import keyed_random
from abmll.tasks.task import Example, Task
from abmll.tasks.words import BAD, CATEGORIES, FRAMES, GOOD, NONSENSE, OPINIONS, RANGES, SUBJECTS

_TRAIN_SHARE = 5 / 8  # of the categories, the nonsense, the subjects and the ranges
_MOST_PAIRS = 600  # of numbers, for one task

# One split's examples in groups from which a draw takes equally: every answer at every letter.
_Strata = list[list[Example]]


@dataclass(frozen=True)
class _Variant:
    """A task that can be made; `make` gives the strata of its training and of its test examples."""

    name: str
    make: Callable[[Random], tuple[_Strata, _Strata]]


@dataclass(frozen=True)
class _Material:
    categories: list[str]
    nonsense: list[str]
    subjects: list[str]
    comparisons: list[tuple[str, int]]


def builtin_tasks(config: BuiltinTasks, seed: int) -> tuple[list[Task], list[Task]]:
    """Training and test tasks, a pure function of the two arguments; odd numbers of them hold one mapping task more."""
    train, test = _materials(keyed_random(seed, "builtin", "materials"))
    return (
        _tasks(train, config.train_tasks, "train", config, seed),
        _tasks(test, config.test_tasks, "test", config, seed),
    )


def _materials(rng: Random) -> tuple[_Material, _Material]:
    parts = []
    comparisons = [(which, top) for top in RANGES for which in ("larger", "smaller")]
    for items in (list(CATEGORIES), list(NONSENSE), list(SUBJECTS), comparisons):
        rng.shuffle(items)
        cut = round(len(items) * _TRAIN_SHARE)
        parts.append((items[:cut], items[cut:]))
    train, test = zip(*parts, strict=True)
    return _Material(*train), _Material(*test)


def _tasks(material: _Material, count: int, role: str, config: BuiltinTasks, seed: int) -> list[Task]:
    rng = keyed_random(seed, "builtin", role)
    mapping, semantic = _mapping_variants(material, rng), _semantic_variants(material, rng)
    if count > 2 * len(semantic):
        raise ValueError(f"tasks.builtin.{role}_tasks: {count}: the generator has {2 * len(semantic)}; ask for fewer")
    variants = [variant for both in zip(mapping, semantic, strict=False) for variant in both][:count]
    tasks = []
    for variant in variants:
        draw = keyed_random(seed, "builtin", variant.name)
        train, test = variant.make(draw)
        train = _draw(train, config.train_examples, "train", variant.name, draw)
        tasks.append(Task(variant.name, train, (), _draw(test, config.test_examples, "test", variant.name, draw)))
    return tasks


def _draw(strata: _Strata, count: int, split: str, name: str, rng: Random) -> tuple[Example, ...]:
    most = len(strata) * min(len(stratum) for stratum in strata)
    if count > most:
        raise ValueError(f"tasks.builtin.{split}_examples: {count}: task {name} has {most}; ask for fewer")
    shuffled = [rng.sample(stratum, len(stratum)) for stratum in strata]
    drawn = [shuffled[place % len(strata)][place // len(strata)] for place in range(count)]
    rng.shuffle(drawn)
    return tuple(drawn)


def _mapping_variants(material: _Material, rng: Random) -> list[_Variant]:
    pairs = list(combinations(material.categories, 2))
    options = list(permutations(material.nonsense, 2))
    rng.shuffle(pairs)
    rng.shuffle(options)
    variants: dict[str, _Variant] = {}
    for place in range(2 * max(len(pairs), len(options))):
        # each pair comes twice, with opposite rules, so that knowing the category alone is worth nothing
        pair, answers = sorted(pairs[place // 2 % len(pairs)]), options[place % len(options)]
        ordered = pair if place % 2 == 0 else pair[::-1]
        if place // 2 % len(pairs) % 2:  # and neither rule is the first of each two
            ordered = ordered[::-1]
        name = _name("mapping", *pair, *answers)
        variants.setdefault(name, _Variant(name, partial(_mapping, ordered, answers)))
    return list(variants.values())


def _mapping(categories: Sequence[str], options: tuple[str, str], rng: Random) -> tuple[_Strata, _Strata]:
    """Words of categories[i] are answered by options[i]."""
    halves = [_halves(CATEGORIES[category], rng) for category in categories]
    train, test = (
        [
            [Example(frame.format(word=word), options, answer) for word in half[split] for frame in FRAMES]
            for half, answer in zip(halves, options, strict=True)
        ]
        for split in (0, 1)
    )
    return train, test


def _semantic_variants(material: _Material, rng: Random) -> list[_Variant]:
    kinds = [
        [
            _Variant(_name("semantic", "kind", *pair), partial(_kind, pair))
            for pair in combinations(material.categories, 2)
        ],
        [
            _Variant(_name("semantic", "member", category), partial(_member, category, material.categories))
            for category in material.categories
        ],
        [
            _Variant(_name("semantic", "sentiment", subject), partial(_sentiment, subject))
            for subject in material.subjects
        ],
        [_Variant(_name("semantic", which, top), partial(_compare, which, top)) for which, top in material.comparisons],
    ]
    for kind in kinds:
        rng.shuffle(kind)
    return [variant for turn in zip_longest(*kinds) for variant in turn if variant is not None]


def _kind(pair: tuple[str, str], rng: Random) -> tuple[_Strata, _Strata]:
    words = [_halves(CATEGORIES[category], rng) for category in pair]
    return _both_splits(
        words, ("What kind of thing is {word}?", "Which word describes {word}?", "Category of {word}:"), pair
    )


def _member(category: str, categories: Sequence[str], rng: Random) -> tuple[_Strata, _Strata]:
    others = [word for other in categories if other != category for word in CATEGORIES[other]]
    words = [_halves(CATEGORIES[category], rng), _halves(rng.sample(others, len(CATEGORIES[category])), rng)]
    questions = (f"Category: {category}. Does {{word}} belong?", f"Is {{word}} in the category {category}?")
    return _both_splits(words, questions, ("yes", "no"))


def _sentiment(subject: str, rng: Random) -> tuple[_Strata, _Strata]:
    opinions = [opinion.replace("{subject}", subject) for opinion in OPINIONS]
    return _both_splits([_halves(GOOD, rng), _halves(BAD, rng)], opinions, ("positive", "negative"))


def _compare(which: str, top: int, rng: Random) -> tuple[_Strata, _Strata]:
    numbers = range(1, top + 1)
    if top * (top - 1) // 2 <= _MOST_PAIRS:
        pairs = list(combinations(numbers, 2))
        rng.shuffle(pairs)
    else:
        pairs = list({tuple(sorted(rng.sample(numbers, 2))): None for _ in range(_MOST_PAIRS)})
    question = f"Which number is {which}?"
    train, test = (
        [
            [
                Example(question, (str(first), str(second)), str((max if which == "larger" else min)(first, second)))
                for first, second in (pair[::step] for pair in half)
            ]
            for step in (1, -1)
        ]
        for half in _halves(pairs, rng)
    )
    return train, test


def _both_splits(
    words: Sequence[tuple[list, list]], questions: Sequence[str], answers: Sequence[str]
) -> tuple[_Strata, _Strata]:
    """Strata of (answer, its letter) for both splits; words[i] = (training, test) words whose answer is answers[i]."""
    train, test = (
        [
            [Example(text.format(word=word), order, answers[i]) for word in words[i][split] for text in questions]
            for i in (0, 1)
            for order in (tuple(answers), tuple(answers[::-1]))
        ]
        for split in (0, 1)
    )
    return train, test


def _halves(items: Sequence, rng: Random) -> tuple[list, list]:
    shuffled = rng.sample(items, len(items))
    return shuffled[: len(shuffled) // 2], shuffled[len(shuffled) // 2 :]


def _name(family: str, *parts: object) -> str:
    return f"{family}/{'-'.join(str(part).replace(' ', '_') for part in parts)}"
