"""Scores on tasks that training never saw: before adaptation and after K steps on a few of the task's examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, NamedTuple

from abmll.config.schema import EvalConfig
from abmll.dealing import deal
from abmll.evaluation.active import choose
from abmll.evaluation.adapted import AdaptedTasks
from abmll.evaluation.held_out import leave_one_batch_out
from abmll.evaluation.labels import shuffle_labels
from abmll.evaluation.predictor import Predictor
from abmll.evaluation.scores import Evaluation, Split
from abmll.evaluation.temperature import fit_temperature
from abmll.evaluation.tfb import RANGE, drawn_weights, largest_sigma
from abmll.interrupt import Interrupted
from abmll.kernels import fold_seed
from abmll.learner import Learner
from abmll.methods import Frequencies, Method
from abmll.metrics import Predictions, concatenate, pool, score
from abmll.resident import release_freed
from abmll.tasks.episodes import first_of_rows, scored_examples, support_examples
from abmll.tasks.examples import PromptedTask
from abmll.tasks.task import PromptedExample

if TYPE_CHECKING:  # DeepSpeed comes with it, which predicting does not need
    from abmll.distributed import Ranks


class Support(NamedTuple):
    """What a task is adapted to: the examples of all batches together, and each row of them once."""

    examples: list[PromptedExample]
    distinct: list[PromptedExample]


class Scored(NamedTuple):
    """One task's predictions, and what was fitted to its support set to make them."""

    predictions: Predictions
    fitted: dict[str, float]

    def scores(self) -> dict[str, float]:
        return asdict(score(self.predictions)) | self.fitted


class Evaluator:
    """Adapts copies of theta to several tasks side by side, scores each, and throws them away.

    The copies are phi itself: they equal theta before and after, bit for bit, and theta is never written. Tasks are
    dealt to the ranks, and every rank gets all the scores. A task's scores do not depend on those beside it.
    """

    stopping: Callable[[], bool] = staticmethod(lambda: False)  # whether this rank was asked to stop

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
        self.predictor = Predictor(learner, letter_ids, config, batch_size, seed)
        self.learner, self.config, self.seed, self.ranks = learner, config, seed, ranks
        self.parallel_tasks = parallel_tasks

    def evaluate(
        self, method: Method, tasks: Sequence[PromptedTask], split: Split, adapted: AdaptedTasks | None = None
    ) -> Evaluation:
        """All ranks call this with the same tasks. Scores are NaN where a prediction is.

        `adapted` has the tasks' phi of scorings before, by the same theta, and gets those that it has not.
        Interrupted, on all ranks, where one of them was asked to stop before its last tasks.
        """
        work = [(task.test if split == "test" else task.validation).work(self.config.max_examples) for task in tasks]
        own = [tasks[number] for number in deal(work, self.ranks.world_size)[self.ranks.rank]]
        mine: dict[str, dict[int, Scored]] | None = {}
        for start in range(0, len(own), self.parallel_tasks):
            if self.stopping():
                mine = None
                break
            mine |= self._evaluate_tasks(method, own[start : start + self.parallel_tasks], split, adapted)
        parts = self.ranks.gather(mine)
        if None in parts:
            raise Interrupted(f"stopped while scoring {method.name} on the {split} tasks")
        by_task = {name: found for part in parts for name, found in part.items()}
        steps = (0, method.config.adaptation_steps)
        return Evaluation(
            method.name,
            split,
            {k: {task.name: by_task[task.name][k].scores() for task in tasks} for k in steps},
            {k: pool([by_task[task.name][k].predictions for task in tasks]) for k in steps},
            {k: {task.name: by_task[task.name][k].predictions for task in tasks} for k in steps},
        )

    def _evaluate_tasks(
        self, method: Method, tasks: Sequence[PromptedTask], split: Split, adapted: AdaptedTasks | None = None
    ) -> dict[str, dict[int, Scored]]:
        adapters, steps = self.learner.adapters, method.config.adaptation_steps
        size, most = steps * self.learner.batch_size, self.config.max_examples if split == "test" else None
        examples = {task.name: scored_examples(task, split, size, self.seed)[:most] for task in tasks}
        adapters.reset_phi()
        support = {task.name: self._support(method, task, size) for task in tasks}
        found = {name: {0: self._score(method, name, own, support[name].distinct, 0)} for name, own in examples.items()}
        held_out = {}
        if self.config.temperature == "held_out":
            held_out = {name: self._predict_held_out(method, name, own.examples) for name, own in support.items()}
        if adapted is None:
            self.predictor.adapt(method, list(support), [own.examples for own in support.values()])
        else:
            adapted.adapt(self.predictor, method, {name: own.examples for name, own in support.items()})
        for slot, (name, own) in enumerate(examples.items()):
            distinct = support[name].distinct
            found[name][steps] = self._score(method, name, own, distinct, steps, slot, held_out.get(name))
        adapters.reset_phi()
        release_freed(self.ranks.device)
        return found

    def _predict_held_out(self, method: Method, task: str, support: Sequence[PromptedExample]) -> Predictions:
        """Of the support examples, each by a phi adapted on the batches that it is not in.

        Folds stand side by side as tasks do, so that they need no more memory than tasks.
        """
        found, folds = [], leave_one_batch_out(support, self.learner.batch_size, task)
        for start in range(0, len(folds), self.parallel_tasks):
            part = folds[start : start + self.parallel_tasks]
            self.predictor.adapt(method, [task] * len(part), [fold.seen for fold in part])
            for slot, fold in enumerate(part):
                found.append(self.predictor.predict(method, ("held out", task, start + slot), fold.held_out, slot))
        return concatenate(found)

    def _support(self, method: Method, task: PromptedTask, count: int) -> Support:
        """`count` examples. phi equals theta."""
        active = self.config.active
        if active is None:
            support = support_examples(task, count, self.seed)
            first = first_of_rows(task, count, self.seed)
        else:
            candidates = support_examples(task, min(active.candidates, len(task.train)), self.seed)
            chosen = choose(
                candidates,
                partial(self.predictor.predict, method, ("candidate", task.name, 0)),
                active.labels,
                active.by,
            )
            support = list(islice(cycle(chosen), count))
            first = range(min(len(chosen), count))
        if self.config.support_labels == "shuffled":
            support = shuffle_labels(support, self.seed, task.name)
        return Support(support, [support[number] for number in first])

    def _score(
        self,
        method: Method,
        task: str,
        examples: Sequence[PromptedExample],
        support: Sequence[PromptedExample],
        adapted: int,
        slot: int = 0,
        held_out: Predictions | None = None,
    ) -> Scored:
        """One task's examples by the phi in `slot`, or by draws around it; T from `held_out` where it is given.
        `support`: each of its examples once.
        """
        tfb = self.config.tfb
        if isinstance(method, Frequencies):
            return Scored(method.predict(support if adapted else (), examples), {})
        if not tfb.samples:
            return self._score_by_slot(method, task, examples, support, adapted, slot, held_out)
        anchor, seed = ("support", task, adapted), fold_seed(self.seed, "tfb", task)
        with drawn_weights(self.learner.adapters, slot, tfb.samples, seed) as drawn:

            def nll(sigma: float) -> float:
                drawn.set_sigma(sigma)
                return float(self.predictor.predict(method, anchor, support, slot=None).nll.mean())

            # against the least noise, not none: in bf16 any noise moves the roundings that phi was adapted with
            sigma = 0.0
            if drawn.varies:
                sigma = largest_sigma(nll, (1 + tfb.tolerance) * nll(RANGE[0]), tfb.evaluations)
            drawn.set_sigma(sigma)
            scored = self._score_by_slot(method, task, examples, support, adapted, slot=None)
        return scored._replace(fitted=scored.fitted | {"tfb_sigma": sigma})

    def _score_by_slot(
        self,
        method: Method,
        task: str,
        examples: Sequence[PromptedExample],
        support: Sequence[PromptedExample],
        adapted: int,
        slot: int | None,
        held_out: Predictions | None = None,
    ) -> Scored:
        predictions = self.predictor.predict(method, ("prediction", task, adapted), examples, slot)
        if self.config.temperature == "none":
            return Scored(predictions, {})
        if held_out is None:
            held_out = self.predictor.predict(method, ("support", task, adapted), support, slot)
        temperature = fit_temperature(held_out)
        return Scored(predictions.tempered(temperature), {"temperature": temperature})
