"""phi from a task's examples: K steps or one look at every example, several tasks side by side."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from abmll.deploy.base import AdaptedBase
from abmll.tasks.episodes import demonstrated_rows, support_examples
from abmll.tasks.task import Example, PromptedExample, Task


@dataclass(frozen=True)
class Support:
    """What one adaptation goes through, batch by batch; `shown`: the examples that its predictions' prompts show."""

    task: str
    steps: int
    prompts: tuple[PromptedExample, ...]
    shown: tuple[Example, ...]


def steps_for(base: AdaptedBase, examples: int) -> int:
    """The run's number of steps, or as many as it takes to see each of the examples once."""
    return max(base.config.method.adaptation_steps, math.ceil(examples / base.config.tasks.batch_size))


def make_support(base: AdaptedBase, task: str, examples: Sequence[Example], steps: int | None = None) -> Support:
    """Batches of the run's size, shuffled by its seed; None: as many as `steps_for` says.

    ValueError where no example fits into a prompt.
    """
    steps = steps_for(base, len(examples)) if steps is None else steps
    seed = base.config.seed
    prompted, count = base.prompter.prompt_task(Task(task, tuple(examples), (), ())), steps * base.learner.batch_size
    shown = demonstrated_rows(prompted, count, seed)
    return Support(task, steps, tuple(support_examples(prompted, count, seed)), tuple(shown))


def adapt_side_by_side(
    base: AdaptedBase, supports: Sequence[Support], tell: Callable[[int], None] = lambda steps: None
) -> Iterator[tuple[int, int, list[float]]]:
    """Adapts to each support set from theta; yields its number, the slot in which its phi stands until the next is
    asked for, and the NLL an example at each step (nats, before the step).

    Those with as many batches go side by side. `tell` is called with the steps made.
    """
    alike: dict[int, list[int]] = defaultdict(list)
    for number, support in enumerate(supports):
        alike[support.steps].append(number)
    predictor = base.predictor()
    summed = base.config.method.summed_examples(base.learner.batch_size)
    for steps, numbers in alike.items():
        for start in range(0, len(numbers), base.side_by_side):
            part = numbers[start : start + base.side_by_side]
            own = [supports[number] for number in part]
            base.forget()
            terms = predictor.adapt(base.method, [s.task for s in own], [s.prompts for s in own])
            tell(steps * len(part))
            for slot, number in enumerate(part):
                yield number, slot, [float(term.nll[slot]) / summed for term in terms]
