"""What to expect of an adaptation before any test set: each of its examples, predicted by a phi that did not see it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from abmll.compare.statistics import wilson
from abmll.deploy.adaptation import Support, make_support
from abmll.deploy.base import AdaptedBase
from abmll.evaluation.temperature import RANGE, fit_temperature
from abmll.metrics import Predictions, score
from abmll.tasks.labelled import by_question
from abmll.tasks.shuffle import permutation
from abmll.tasks.task import Example

NEAR = 1.05  # an end of the temperature's range, by this factor


@dataclass(frozen=True)
class Fold:
    """One part of the examples left out: those that are, and what adaptation sees instead."""

    held_out: tuple[Example, ...]
    support: Support


def make_folds(base: AdaptedBase, task: str, examples: Sequence[Example], folds: int, steps: int | None) -> list[Fold]:
    """`folds` folds in which every label is spread as evenly as may be; fewer where there are fewer examples.

    A question that occurs several times is left out as a whole. `steps`: of each adaptation, None: as `make_support`.
    """
    by_label: dict[str, list[list[Example]]] = defaultdict(list)
    for alike in by_question(examples):
        by_label[alike[0].output].append(alike)
    dealt: list[list[Example]] = []
    for label, questions in sorted(by_label.items()):
        for place in permutation(len(questions), base.config.seed, "folds", task, label):
            dealt.append(questions[place])
    count, made = min(folds, len(dealt)), []
    for number in range(count if count > 1 else 0):
        held_out = [example for alike in dealt[number::count] for example in alike]
        seen = [
            example for other in range(count) if other != number for alike in dealt[other::count] for example in alike
        ]
        made.append(Fold(tuple(held_out), make_support(base, task, seen, steps)))
    return made


def summarise(held_out: Predictions, folds: int, questions: int | None = None) -> dict[str, float]:
    """Scores of all held-out examples as one set (see `abmll.metrics.Scores`), and what they say beyond them.

    accuracy_low, accuracy_high: Wilson's 95 % interval of the accuracy on `questions` independent ones, None: as many
    as there are examples; those that repeat another tell nothing new. The questions share most of what the folds were
    adapted on, so it is a little too narrow. temperature: the one that fits the held-out
    predictions (`fit_temperature`); NaN where one of them is, or where it lies at an end of its range: predictions that
    are no better than guesses say nothing about confidence in others.
    """
    scores = asdict(score(held_out))
    _, low, high = wilson(scores["accuracy"], scores["n"] if questions is None else questions)
    temperature = fit_temperature(held_out)
    if not RANGE[0] * NEAR < temperature < RANGE[1] / NEAR:
        temperature = math.nan
    return {"folds": folds, **scores, "accuracy_low": low, "accuracy_high": high, "temperature": temperature}
