"""Active choice: of many unlabelled examples, which few to have labelled and adapt on?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from abmll.config.schema import ActiveConfig
from abmll.metrics import Predictions
from abmll.tasks.task import PromptedExample


def choose(
    candidates: Sequence[PromptedExample],
    predict: Callable[[Sequence[PromptedExample]], Predictions],
    config: ActiveConfig,
) -> list[PromptedExample]:
    """`config.labels` of the candidates (all where there are fewer), the most uncertainly predicted first.

    By the entropy of the average prediction, or by the samples' variance; at random they are the first ones, since the
    candidates come shuffled. No label is looked at.
    """
    if config.by == "random":
        return list(candidates[: config.labels])
    predictions = predict(candidates)
    uncertainty = predictions.entropy() if config.by == "entropy" else predictions.variance
    return [candidates[place] for place in uncertainty.argsort(descending=True, stable=True)[: config.labels]]
