"""Evaluations of a tiny run, on one rank or several, and a task's adaptation by hand."""

from __future__ import annotations

import threading

import torch

from abmll.config.schema import ActiveConfig, PruneConfig, TFBConfig
from abmll.evaluation import Evaluator
from abmll.kernels import NoiseKey, fold_seed
from abmll.tasks.episodes import in_batches

# Batches of another shape are summed in other orders: fp32's roundings, all to one side, in a row of sums over 320 keys
# and 128 columns in each of two layers.
ROUNDING = (320 + 128) * 2 * 2.0**-24
CLOSE = {"rtol": ROUNDING, "atol": ROUNDING}

OPTIONS = {
    "mean": {},
    "samples": {"samples": 2},
    "support": {"support_labels": "shuffled", "active": ActiveConfig(labels=2, candidates=6)},
    "predictions": {"temperature": "support", "prune": PruneConfig(fraction=0.2)},
    "held out": {"temperature": "held_out", "support_labels": "shuffled"},
    "tfb": {"temperature": "support", "tfb": TFBConfig(samples=3, evaluations=3)},
}


class OneRank:
    rank, world_size, device = 0, 1, torch.device("cpu")

    def owns(self, index):
        return index % self.world_size == self.rank

    def gather(self, item):
        return [item]


class Meeting:
    """Several ranks as threads of this process."""

    def __init__(self, world_size):
        self.items, self.barrier = [None] * world_size, threading.Barrier(world_size, timeout=60)

    def rank(self, number):
        ranks = OneRank()
        ranks.rank, ranks.world_size = number, len(self.items)

        def gather(item):
            self.items[number] = item
            self.barrier.wait()
            return list(self.items)

        ranks.gather = gather
        return ranks


def evaluator(tiny, ranks=None, beside=1, **changes):
    config = tiny.config.eval.model_copy(update=changes)
    return Evaluator(
        tiny.learner,
        tiny.parts.tasks.letter_ids,
        config,
        config.batch_size,
        tiny.config.seed,
        ranks or OneRank(),
        beside,
    )


def evaluate(tiny, split="test", method=None, beside=1, **changes):
    return evaluator(tiny, beside=beside, **changes).evaluate(method or tiny.method, tiny.parts.tasks.test, split)


def predictions(tiny, method=None, **changes):
    """The stored predictions of the first task, by adaptation steps."""
    task = tiny.parts.tasks.test[0]
    found = evaluator(tiny, **changes)._evaluate_tasks(method or tiny.method, [task], "test")[task.name]
    return {steps: scored.predictions for steps, scored in found.items()}


def scattered(tiny, size=0.03):
    """As between two outer steps: theta somewhere, phi its copy."""
    tiny.scatter(size)
    tiny.adapters.reset_phi()
    return tiny


def adapt_by_hand(tiny, support):
    """phi from theta by a step on each batch of the first task's support examples."""
    tiny.adapters.reset_phi()
    letters, batch_size = tiny.parts.tasks.letter_ids, tiny.config.tasks.batch_size
    optimizer = tiny.learner.optimizer(tiny.config.method.test_lr)
    seed = fold_seed(tiny.config.seed, "adaptation", tiny.parts.tasks.test[0].name)
    for step, batch in enumerate(in_batches(support, letters, batch_size)):
        tiny.learner.phi_step(batch, NoiseKey(seed, step) if tiny.method.sampled else None, optimizer)


def mean_nll(tiny, examples):
    """Each example's NLL [n], float64, by phi's mean as it stands."""
    tokens = []
    for batch in in_batches(examples, tiny.parts.tasks.letter_ids, 3):
        with torch.no_grad():
            log_probabilities = tiny.learner.forward(batch, None)[0].log_softmax(dim=-1)
        tokens.append(-log_probabilities.gather(1, batch.target[:, None])[:, 0].double())
    return torch.cat(tokens)
