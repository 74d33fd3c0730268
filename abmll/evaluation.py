"""Scores on tasks that training never saw: before adaptation and after K steps on a few of the task's examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from abmll.config.schema import EvalConfig
from abmll.dealing import deal
from abmll.distributed import Ranks
from abmll.kernels import NoiseKey, fold_seed, rows_of_keys
from abmll.learner import Learner
from abmll.methods import Method
from abmll.metrics import Predictions, ScoreAccumulator, pool, score
from abmll.resident import release_freed
from abmll.tasks.batch import side_by_side
from abmll.tasks.episodes import by_length, scored_examples, scoring_batches, support_batches
from abmll.tasks.examples import PromptedTask
from abmll.tasks.task import Batch, PromptedExample

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Evaluation:
    """Scores of one method on several tasks; `steps` counts adaptation steps.

    tasks[steps][task] holds the task's scores, overall[steps] the means over tasks and the pooled scores;
    predictions[steps][task] what they are made of, which is no part of the JSON.
    """

    method: str
    split: Split
    tasks: dict[int, dict[str, dict[str, float]]]
    overall: dict[int, dict[str, float]]
    predictions: dict[int, dict[str, Predictions]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def steps(self) -> list[int]:
        return sorted(self.overall)

    @property
    def diverged(self) -> list[tuple[int, str]]:
        """(steps, task) where a prediction was not finite; such a task's scores are NaN, and so are the means."""
        return [(k, name) for k, tasks in self.tasks.items() for name, s in tasks.items() if math.isnan(s["nll"])]

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method, "split": self.split, "tasks": self.tasks, "overall": self.overall}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Evaluation:
        """The inverse of `to_json`, through JSON's string keys."""
        tasks, overall = ({int(k): v for k, v in saved[key].items()} for key in ("tasks", "overall"))
        return cls(saved["method"], saved["split"], tasks, overall)


class Evaluator:
    """Adapts copies of theta to several tasks side by side, scores each, and throws them away.

    The copies are phi itself: they equal theta before and after, bit for bit, and theta is never written. Tasks are
    dealt to the ranks, and every rank gets all the scores. A task's scores do not depend on those beside it.
    """

    def __init__(
        self,
        learner: Learner,
        letter_ids: Sequence[int],
        config: EvalConfig,
        batch_size: int,  # config's own, or what the plan makes of `auto`
        seed: int,
        ranks: Ranks,
        parallel_tasks: int = 1,
    ):
        self.learner, self.letter_ids, self.config, self.seed, self.ranks = learner, letter_ids, config, seed, ranks
        self.batch_size, self.parallel_tasks = batch_size, parallel_tasks

    def evaluate(self, method: Method, tasks: Sequence[PromptedTask], split: Split) -> Evaluation:
        """All ranks call this with the same tasks. Scores are NaN where a prediction is."""
        work = [(task.test if split == "test" else task.validation).work(self.config.max_examples) for task in tasks]
        own = [tasks[number] for number in deal(work, self.ranks.world_size)[self.ranks.rank]]
        mine = {}
        for start in range(0, len(own), self.parallel_tasks):
            mine |= self._evaluate_tasks(method, own[start : start + self.parallel_tasks], split)
        by_task = {name: found for part in self.ranks.gather(mine) for name, found in part.items()}
        steps = (0, method.config.adaptation_steps)
        return Evaluation(
            method.name,
            split,
            {k: {task.name: asdict(score(by_task[task.name][k])) for task in tasks} for k in steps},
            {k: pool([by_task[task.name][k] for task in tasks]) for k in steps},
            {k: {task.name: by_task[task.name][k] for task in tasks} for k in steps},
        )

    def _evaluate_tasks(
        self, method: Method, tasks: Sequence[PromptedTask], split: Split
    ) -> dict[str, dict[int, Predictions]]:
        adapters, steps = self.learner.adapters, method.config.adaptation_steps
        size, most = self.learner.batch_size, self.config.max_examples if split == "test" else None
        examples = {task.name: scored_examples(task, split, steps, size, self.seed)[:most] for task in tasks}
        adapters.reset_phi()
        found = {name: {0: self._predict(method, name, own, adapted=0)} for name, own in examples.items()}
        adapters.reset_phi(len(tasks))
        support = [support_batches(task, self.letter_ids, steps, self.learner.batch_size, self.seed) for task in tasks]
        batches = [side_by_side(own).to(self.ranks.device) for own in zip(*support, strict=True)]
        seeds = [fold_seed(self.seed, "adaptation", task.name) for task in tasks]
        keys = [rows_of_keys([NoiseKey(seed, step) for seed in seeds], self.ranks.device) for step in range(steps)]
        method.adapt(self.learner, batches, keys)
        for slot, (name, own) in enumerate(examples.items()):
            found[name][steps] = self._predict(method, name, own, adapted=steps, slot=slot)
        adapters.reset_phi()
        release_freed(self.ranks.device)
        return found

    @torch.inference_mode()
    def _predict(
        self, method: Method, task: str, examples: Sequence[PromptedExample], adapted: int, slot: int = 0
    ) -> Predictions:
        self.learner.model.eval()
        accumulator = ScoreAccumulator()
        keys = self._prediction_keys(method, task, adapted)
        order = by_length(examples)
        for batch in scoring_batches([examples[place] for place in order], self.letter_ids, self.batch_size):
            batch = batch.to(self.ranks.device)
            accumulator.update(self.probabilities(batch, keys, slot), batch)
        return accumulator.predictions().take(order.argsort())

    def _prediction_keys(self, method: Method, task: str, adapted: int) -> Iterator[NoiseKey] | None:
        """An endless row of noise names, or None for the posterior mean (all that a point estimate has)."""
        if not (method.sampled and self.config.samples):
            return None
        seed = fold_seed(self.seed, "prediction", task, adapted)
        return (NoiseKey(seed, step) for step in range(2**32))

    def probabilities(self, batch: Batch, keys: Iterator[NoiseKey] | None, slot: int = 0) -> Tensor:
        """Probabilities over the vocabulary by the phi in `slot`: of the mean [1, B, V], or of S posterior samples
        [S, B, V], whose average predicts.
        """
        if keys is None:
            return self.learner.mean_probabilities(batch, slot)[None]
        return self.learner.sampled_probabilities(batch, next(keys), self.config.samples, slot)
