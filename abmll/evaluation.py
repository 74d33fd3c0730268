"""Scores on tasks that training never saw: before adaptation and after K steps on a few of the task's examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from abmll.config.schema import EvalConfig
from abmll.distributed import Ranks
from abmll.kernels import NoiseKey, fold_seed
from abmll.learner import Learner
from abmll.methods import Method
from abmll.metrics import Predictions, ScoreAccumulator, pool, score
from abmll.resident import release_freed
from abmll.tasks.episodes import scoring_batches, support_batches
from abmll.tasks.examples import PromptedTask
from abmll.tasks.task import Batch, PromptedExample

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Evaluation:
    """Scores of one method on several tasks; `steps` counts adaptation steps.

    tasks[steps][task] holds the task's scores, overall[steps] the means over tasks and the pooled scores.
    """

    method: str
    split: Split
    tasks: dict[int, dict[str, dict[str, float]]]
    overall: dict[int, dict[str, float]]

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
    """Adapts a copy of theta to each task, scores it, and throws it away.

    The copy is phi itself: it equals theta before and after, bit for bit, and theta is never written. Tasks are dealt
    to the ranks, and every rank gets all the scores.
    """

    def __init__(
        self,
        learner: Learner,
        letter_ids: Sequence[int],
        config: EvalConfig,
        batch_size: int,  # config's own, or what the plan makes of `auto`
        seed: int,
        ranks: Ranks,
    ):
        self.learner, self.letter_ids, self.config, self.seed, self.ranks = learner, letter_ids, config, seed, ranks
        self.batch_size = batch_size

    def evaluate(self, method: Method, tasks: Sequence[PromptedTask], split: Split) -> Evaluation:
        """All ranks call this with the same tasks. ValueError where predictions are not finite."""
        own = [task for index, task in enumerate(tasks) if self.ranks.owns(index)]
        mine = {task.name: self._evaluate_task(method, task, split) for task in own}
        by_task = {name: found for part in self.ranks.gather(mine) for name, found in part.items()}
        steps = (0, method.config.adaptation_steps)
        return Evaluation(
            method.name,
            split,
            {k: {task.name: asdict(score(by_task[task.name][k])) for task in tasks} for k in steps},
            {k: pool([by_task[task.name][k] for task in tasks]) for k in steps},
        )

    def _evaluate_task(self, method: Method, task: PromptedTask, split: Split) -> dict[int, Predictions]:
        adapters, steps = self.learner.adapters, method.config.adaptation_steps
        examples = task.test[: self.config.max_examples] if split == "test" else task.validation
        adapters.reset_phi()
        found = {0: self._predict(method, task.name, examples, adapted=0)}
        batches = support_batches(task, self.letter_ids, steps, self.learner.batch_size, self.seed)
        keys = [NoiseKey(fold_seed(self.seed, "adaptation", task.name), step) for step in range(steps)]
        method.adapt(self.learner, [batch.to(self.ranks.device) for batch in batches], keys)
        found[steps] = self._predict(method, task.name, examples, adapted=steps)
        adapters.reset_phi()
        release_freed(self.ranks.device)
        return found

    @torch.inference_mode()
    def _predict(self, method: Method, task: str, examples: Sequence[PromptedExample], adapted: int) -> Predictions:
        self.learner.model.eval()
        accumulator = ScoreAccumulator()
        keys = self._prediction_keys(method, task, adapted)
        for batch in scoring_batches(examples, self.letter_ids, self.batch_size):
            batch = batch.to(self.ranks.device)
            accumulator.update(self.probabilities(batch, keys), batch)
        return accumulator.predictions()

    def _prediction_keys(self, method: Method, task: str, adapted: int) -> Iterator[NoiseKey] | None:
        """An endless row of noise names, or None for the posterior mean (all that a point estimate has)."""
        if not (method.gaussian and self.config.samples):
            return None
        seed = fold_seed(self.seed, "prediction", task, adapted)
        return (NoiseKey(seed, step) for step in range(2**32))

    def probabilities(self, batch: Batch, keys: Iterator[NoiseKey] | None) -> Tensor:
        """Predictive probabilities over the vocabulary [B, V]: of the mean, or the average over S posterior samples."""
        if keys is None:
            return self.learner.forward(batch, None)[0].softmax(dim=-1)
        return self.learner.sampled_probabilities(batch, next(keys), self.config.samples)
