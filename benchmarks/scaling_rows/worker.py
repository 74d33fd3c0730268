"""A rank's process: builds a run, and makes outer steps when it is told to.

Reads a line from its standard input for each order, "steps TASKS NUMBER" or "traffic TASKS"; the main rank answers with
a line of JSON behind the mark, because libraries write to standard output too. Ends with its input.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from abmll.config import Config, load_config
from abmll.distributed import start_ranks, stop_ranks
from abmll.run import open_session
from abmll.tasks.batch import collate
from abmll.tasks.task import Batch, Episode, PromptedExample
from abmll.trainer import COLUMNS, Trainer

from .traffic import traffic_of_step

MARK = "scaling> "
SEED = 20260723


class EqualEpisodes:
    """Stands for a run's sampler: episodes of random tokens, all prompts of one length."""

    episodes_per_epoch = 28

    def __init__(self, config: Config, tokens: int, vocabulary: int):
        self.config, self.tokens, self.vocabulary = config, tokens, vocabulary

    def task(self, index: int) -> str:
        return f"made up {index}"

    def num_tokens(self, index: int) -> int:
        return self.config.method.inner_steps * self.config.tasks.batch_size * self.tokens

    def episode(self, index: int) -> Episode:
        generator = torch.Generator().manual_seed(SEED + index)
        batches = tuple(self._batch(generator) for _ in range(self.config.method.inner_steps))
        return Episode(index, index // self.episodes_per_epoch, self.task(index), batches, None)

    def _batch(self, generator: torch.Generator) -> Batch:
        size = (self.config.tasks.batch_size, self.tokens)
        ids = torch.randint(self.vocabulary, size, generator=generator).tolist()
        return collate([PromptedExample(row, label=0, num_options=4) for row in ids], letter_ids=(1, 2, 3, 4))


def work(config_path: str, overrides: Sequence[str], tokens: int | None) -> None:
    torch.set_num_threads(1)
    ranks = start_ranks()
    try:
        config = load_config(config_path, overrides)
        session, _ = open_session(config, config_path, ranks, resume=False, overwrite=False)
        trainer = session.trainer
        if tokens is not None:
            trainer.sampler = EqualEpisodes(config, tokens, session.parts.model.config.get_text_config().vocab_size)
        theta = sum(value.nbytes for value in trainer.learner.adapters.theta.values())
        _answer(
            ranks.is_main, {"ranks": ranks.world_size, "zero_stage": trainer.engine.zero_stage, "theta_bytes": theta}
        )
        for line in sys.stdin:
            order, tasks, *rest = line.split()
            trainer.tasks_per_step = int(tasks)
            if order == "traffic":
                _answer(ranks.is_main, traffic_of_step(trainer, 0))
            else:
                ranks.barrier()
                _answer(ranks.is_main, _steps(trainer, int(rest[0])))
    finally:
        stop_ranks()


def _steps(trainer: Trainer, number: int) -> dict[str, Any]:
    """Seconds and real tokens of so many outer steps; the same episodes each time."""
    began, tokens = time.perf_counter(), 0
    for step in range(number):
        table = trainer._outer_step(step)
        tokens += int(table[:, COLUMNS.index("real_tokens")].sum())
    return {"seconds": time.perf_counter() - began, "real_tokens": tokens}


def _answer(is_main: bool, facts: Any) -> None:
    if is_main:
        print(f"{MARK}{json.dumps(facts)}", flush=True)
