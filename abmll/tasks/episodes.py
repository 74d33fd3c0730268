"""Which examples an episode sees: pure functions of (seed, index), so a run's position in its data is one integer.

Ranks and groups only decide who asks for which index; the sequence of episodes is the same for any number of them.
An episode's prompts are made when it is drawn.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from abmll.tasks.batch import collate
from abmll.tasks.examples import PromptedTask, ScoredExamples
from abmll.tasks.shuffle import EndlessShuffle, permutation
from abmll.tasks.task import Batch, Episode, Example, PromptedExample

POOLED = "pooled"  # in the place of a task's name


class EpisodeSampler:
    """Every epoch visits each task once, in a new order; a task's examples come back only after all were seen, and no
    episode has one twice that could do without.

    (But for those that take the place of a row which does not fit: see `abmll.tasks.examples`.)
    """

    def __init__(
        self,
        tasks: Sequence[PromptedTask],
        letter_ids: Sequence[int],
        seed: int,
        inner_steps: int,
        batch_size: int,
        query: bool,
    ):
        """An episode holds `inner_steps` support batches of `batch_size` examples, and one more as query if asked."""
        _check_trainable(tasks)
        self.tasks = tuple(tasks)
        self.letter_ids = tuple(letter_ids)
        self.inner_steps = inner_steps
        self.batch_size = batch_size
        self.query = query
        self._seed = seed
        self._order = EndlessShuffle(len(self.tasks), seed, "tasks")
        visit = self.examples_per_visit
        self._data = [EndlessShuffle(len(task.train), seed, "train", task.name, together=visit) for task in self.tasks]

    @property
    def episodes_per_epoch(self) -> int:
        return len(self.tasks)

    @property
    def examples_per_visit(self) -> int:
        return (self.inner_steps + self.query) * self.batch_size

    def task(self, index: int) -> str:
        """The name of an episode's task, without drawing its examples."""
        (number,) = self._order.take(index, 1)
        return self.tasks[number].name

    def episode(self, index: int) -> Episode:
        batches = tuple(in_batches(self._examples(index), self.letter_ids, self.batch_size))
        query = batches[-1] if self.query else None
        return Episode(index, index // self.episodes_per_epoch, self.task(index), batches[: self.inner_steps], query)

    def num_tokens(self, index: int) -> int:
        """Of an episode's prompts, without making its batches."""
        return sum(len(example.token_ids) for example in self._examples(index))

    def _examples(self, index: int) -> list[PromptedExample]:
        epoch = index // self.episodes_per_epoch
        (number,) = self._order.take(index, 1)
        places = self._data[number].take(epoch * self.examples_per_visit, self.examples_per_visit)
        task = self.tasks[number]
        support, count = places[: self.inner_steps * self.batch_size], task.demonstrations.before_training
        return task.train.demonstrated(places, support, count, self._seed, "demonstrations", task.name, index)


class PooledSampler(EpisodeSampler):
    """Episodes of the same size from all tasks' examples in one shuffled pool, for training that ignores tasks.

    Demonstrations are of the example's own task, or they would show another question's answer. An episode seldom holds
    two examples of a task, so they are drawn from all of its training examples.
    """

    def __init__(
        self,
        tasks: Sequence[PromptedTask],
        letter_ids: Sequence[int],
        seed: int,
        inner_steps: int,
        batch_size: int,
        query: bool,
    ):
        super().__init__(tasks, letter_ids, seed, inner_steps, batch_size, query)
        *self._starts, size = accumulate((len(task.train) for task in self.tasks), initial=0)  # of each task's places
        self._places = EndlessShuffle(size, seed, "pooled", together=self.examples_per_visit)

    def task(self, index: int) -> str:
        return POOLED

    def _examples(self, index: int) -> list[PromptedExample]:
        places = self._places.take(index * self.examples_per_visit, self.examples_per_visit)
        if self.tasks[0].demonstrations.before_training:
            return [self._demonstrated(place, index, number) for number, place in enumerate(places)]
        wanted: dict[int, list[int]] = {}
        for place in places:
            wanted.setdefault(bisect_right(self._starts, place) - 1, []).append(place)
        taken = {}
        for number, own in wanted.items():
            start = self._starts[number]
            taken |= zip(own, self.tasks[number].train.take([place - start for place in own]), strict=True)
        return [taken[place] for place in places]

    def _demonstrated(self, place: int, index: int, number: int) -> PromptedExample:
        """The example at a place of the pool, number so and so of an episode, behind others of its task."""
        task_number = bisect_right(self._starts, place) - 1
        task, own = self.tasks[task_number], place - self._starts[task_number]
        key, count = (self._seed, "demonstrations", index, number), task.demonstrations.before_training
        pool = [other for other in permutation(len(task.train), *key)[: count + 1] if other != own]
        (example,) = task.train.demonstrated([own], pool, count, *key)
        return example


def support_examples(task: PromptedTask, count: int, seed: int) -> list[PromptedExample]:
    """The first examples of an unseen task's support shuffle: the same for every method that is given the same seed,
    and more of them go on from fewer.

    With demonstrations in adaptation each example is behind others of these (leave-one-out).
    """
    places, shown = _support_places(task, count, seed), task.demonstrations.before_adaptation
    return task.train.demonstrated(places, places, shown, seed, "demonstrations", task.name)


def first_of_rows(task: PromptedTask, count: int, seed: int) -> list[int]:
    """The numbers of the `support_examples` that are the first of their row: of a small task they come again, with
    demonstrations behind others.
    """
    return task.train.first_of_rows(_support_places(task, count, seed))


def scored_examples(task: PromptedTask, split: Literal["validation", "test"], count: int, seed: int) -> ScoredExamples:
    """A split as it is scored: every question behind the first of the examples that adaptation takes: of
    the `count` of `support_examples`.
    """
    return getattr(task, split).behind(demonstrated_rows(task, count, seed))


def demonstrated_rows(task: PromptedTask, count: int, seed: int) -> list[Example]:
    """What a scored question's prompt shows before it: none without demonstrations."""
    shown = task.demonstrations.count
    return task.train.rows(_support_places(task, count, seed))[:shown] if shown else []


def _support_places(task: PromptedTask, number: int, seed: int) -> list[int]:
    _check_trainable([task])
    return EndlessShuffle(len(task.train), seed, "support", task.name).take(0, number)


def in_batches(examples: Sequence[PromptedExample], letter_ids: Sequence[int], batch_size: int) -> Iterator[Batch]:
    """Every example once, in its order; the last batch may be smaller."""
    for start in range(0, len(examples), batch_size):
        yield collate(examples[start : start + batch_size], letter_ids)


def by_length(examples: Sequence[PromptedExample]) -> Tensor:
    """Places of the examples, the shortest first (int64 [n]): together with its like a prompt needs little padding."""
    return torch.tensor([len(example.token_ids) for example in examples], dtype=torch.int64).argsort(stable=True)


def _check_trainable(tasks: Sequence[PromptedTask]) -> None:
    if not tasks:
        raise ValueError("tasks.train: []: there is no task to train on")
    for task in tasks:
        if not len(task.train):
            raise ValueError(f"task {task.name}: no training examples: take it out of the list")
