"""Labels that say nothing: how much of adaptation is learning which answer is right?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from abmll.tasks.shuffle import permutation
from abmll.tasks.task import PromptedExample


def shuffle_labels(examples: Sequence[PromptedExample], seed: int, task: str) -> list[PromptedExample]:
    """The support set with its labels permuted, a pure function of (seed, task).

    Among examples of as many options, so that every label is one of its example's own, and the counts of the labels
    stay: what a method learns from these it has learned from the letters' frequencies. An example that comes several
    times keeps one label; one without its like keeps its own.
    """
    distinct = {id(example): example for example in examples}
    relabelled = {}
    for number in {example.num_options for example in distinct.values()}:
        alike = [key for key, example in distinct.items() if example.num_options == number]
        for key, place in zip(alike, permutation(len(alike), seed, "support labels", task, number), strict=True):
            relabelled[key] = replace(distinct[key], label=distinct[alike[place]].label)
    return [relabelled[id(example)] for example in examples]
