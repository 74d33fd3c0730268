"""What makes a task's scores say something else than they seem to: told before a run, and refused nowhere."""

from __future__ import annotations

from collections.abc import Iterator

from abmll.tasks.task import Task

FEWEST = 8  # questions of which all have the answer at one place: of two options each that is chance once in 128


def doubts(task: Task) -> Iterator[str]:
    """A line for test rows that are training rows, for answers that stand at one place among differing options, and for
    training rows of one answer.
    """
    known = {(example.input, frozenset(example.options)) for example in task.train}
    shared = sum((example.input, frozenset(example.options)) in known for example in task.test)
    if shared:
        yield f"{task.name}: {shared} of {len(task.test)} test rows are training rows too; leave them out of one"
    for split in ("train", "test"):
        examples = getattr(task, split)
        places = {example.label for example in examples}
        if len(examples) < FEWEST or len(places) > 1:
            continue
        if len({example.options for example in examples}) > 1:
            yield (
                f"{task.name}: all {len(examples)} {split} rows have their answer at place {places.pop() + 1} of their "
                "own options, which is all that can be learned; shuffle the options"
            )
        elif split == "train":  # a few test rows may be of one class by chance
            yield f"{task.name}: all {len(examples)} train rows have one answer, {examples[0].output!r}; add others"
