"""phi adapted to tasks in slots side by side, and what it predicts: for scores, and for a user's own task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

import torch
from torch import Tensor

from abmll.config.schema import EvalConfig
from abmll.evaluation.prune import pruned
from abmll.kernels import NoiseKey, fold_seed, rows_of_keys
from abmll.learner import Learner, StepTerms
from abmll.methods import Method
from abmll.metrics import Predictions, ScoreAccumulator
from abmll.tasks.batch import side_by_side
from abmll.tasks.episodes import by_length, in_batches
from abmll.tasks.task import Batch, PromptedExample


class Predictor:
    """Adapts phi and predicts with it as `config` asks (its samples and pruning); theta is never written.

    `batch_size`: examples predicted at a time. `seed` and the tasks' names decide the noise.
    """

    def __init__(self, learner: Learner, letter_ids: Sequence[int], config: EvalConfig, batch_size: int, seed: int):
        self.learner, self.letter_ids, self.config = learner, letter_ids, config
        self.batch_size, self.seed = batch_size, seed

    @property
    def device(self) -> torch.device:
        return next(iter(self.learner.adapters.phi.values())).device

    def adapt(
        self,
        method: Method,
        tasks: Sequence[str],
        examples: Sequence[Sequence[PromptedExample]],
    ) -> list[StepTerms]:
        """phi from theta, a slot for each row of examples; `tasks` name the slots' noise. Returns each step's terms.

        The rows hold equally many of the learner's batches.
        """
        self.learner.adapters.reset_phi(len(tasks))
        batches = [in_batches(own, self.letter_ids, self.learner.batch_size) for own in examples]
        batches = [side_by_side(own).to(self.device) for own in zip(*batches, strict=True)]
        seeds = [fold_seed(self.seed, "adaptation", task) for task in tasks]
        steps = range(len(batches))
        keys = [rows_of_keys([NoiseKey(seed, step) for seed in seeds], self.device) for step in steps]
        return method.adapt(self.learner, batches, keys)

    @torch.inference_mode()
    def predict(
        self,
        method: Method,
        stream: tuple[str, str, int],
        examples: Sequence[PromptedExample],
        slot: int | None = 0,
    ) -> Predictions:
        """Of examples in their order; `stream` names the noise: what for, the task, and the steps it is adapted by or
        the fold.
        """
        self.learner.model.eval()
        accumulator = ScoreAccumulator()
        keys = self._keys(method, stream)
        order = by_length(examples)
        for batch in in_batches([examples[place] for place in order], self.letter_ids, self.batch_size):
            batch = batch.to(self.device)
            accumulator.update(self.probabilities(batch, keys, slot), batch)
        return accumulator.predictions().take(order.argsort())

    def _keys(self, method: Method, stream: tuple[str, str, int]) -> Iterator[NoiseKey] | None:
        """The noise's name for each batch, or None for the posterior mean (all that a point estimate has).

        Drawn weights are one function: every batch has the same, so that the batches' size changes nothing. Drawn
        activations are every token's own, other ones for every batch.
        """
        if not (method.sampled and self.config.samples):
            return None
        seed = fold_seed(self.seed, *stream)
        return repeat(NoiseKey(seed, 0)) if method.draws_weights else (NoiseKey(seed, step) for step in range(2**32))

    def probabilities(self, batch: Batch, keys: Iterator[NoiseKey] | None, slot: int | None = 0) -> Tensor:
        """Probabilities over the vocabulary by the phi in `slot`: of the mean [1, B, V], or of S posterior samples
        [S, B, V], whose average predicts. Without a slot each of phi's slots is a sample.
        """
        with pruned(self.learner.model, self.learner.adapters, self.config.prune):
            if slot is None:
                return self.learner.probabilities_by_slot(batch)
            if keys is None:
                return self.learner.mean_probabilities(batch, slot)[None]
            return self.learner.sampled_probabilities(batch, next(keys), self.config.samples, slot)
