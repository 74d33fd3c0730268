"""Active choice: of many unlabelled examples, which few to have labelled and adapt on?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from abmll.metrics import Predictions
from abmll.tasks.task import PromptedExample


def choose(
    candidates: Sequence[PromptedExample],
    predict: Callable[[Sequence[PromptedExample]], Predictions],
    count: int,
    by: Literal["random", "entropy", "variance"],
) -> list[PromptedExample]:
    """`count` of the distinct candidates (all where there are fewer), the most uncertainly predicted first.

    By the entropy of the average prediction, or by the samples' variance; at random they are the first ones, since the
    candidates come shuffled. No label is looked at. A prompt that comes several times is one candidate: its copies, all
    as uncertain, would be chosen together.
    """
    distinct: dict[tuple[int, ...], PromptedExample] = {}
    for example in candidates:
        distinct.setdefault(tuple(example.token_ids), example)
    candidates = list(distinct.values())
    if by == "random":
        return list(candidates[:count])
    predictions = predict(candidates)
    uncertainty = predictions.entropy() if by == "entropy" else predictions.variance
    return [candidates[place] for place in uncertainty.argsort(descending=True, stable=True)[:count]]
