"""Cross-fitting: what a support set says about predictions of examples that an adaptation has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from abmll.tasks.task import PromptedExample


class Fold(NamedTuple):
    """One support batch left out."""

    seen: list[PromptedExample]  # the other batches, in their order
    held_out: list[PromptedExample]  # of the batch: each question once, and none that is asked in the others too


def leave_one_batch_out(support: Sequence[PromptedExample], batch_size: int, task: str) -> list[Fold]:
    """A fold for each of the support set's batches, but for those that leave nothing out.

    ValueError where none leaves anything out: a task with few examples has them all in several batches.
    """
    folds = []
    for start in range(0, len(support), batch_size):
        seen = [*support[:start], *support[start + batch_size :]]
        questions = {tuple(example.token_ids) for example in seen}
        own = {tuple(example.token_ids): example for example in support[start : start + batch_size]}
        folds.append(Fold(seen, [example for question, example in own.items() if question not in questions]))
    folds = [fold for fold in folds if fold.held_out]
    if not folds:
        raise ValueError(
            f"eval.temperature: 'held_out': task {task}: each of its support examples is in several of the batches; "
            "set eval.temperature=support, or a smaller method.test_steps or tasks.batch_size"
        )
    return folds
