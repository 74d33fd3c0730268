"""Score what a run learned again: on other tasks, with posterior samples, on more examples."""

from __future__ import annotations

import json
from pathlib import Path

from abmll.build import build
from abmll.config import Refused, load_config
from abmll.distributed import joined_ranks
from abmll.evaluation import Evaluator
from abmll.lockstep import in_step
from abmll.methods import Pretrained
from abmll.models.checkpointing import checkpoint_layers
from abmll.report import score_table
from abmll.run import plan_on
from abmll.summary import load_summary


def evaluate(run: str, overrides: list[str], output: str | None) -> None:
    """The command `launch/evaluate.py`: print a run's table of scores, and write them as JSON where asked to.

    The configuration is the run's own, with `overrides` (of tasks and eval; the adapters must fit the model's). Only
    the test tasks are read: the run's training and validation tasks may be gone.
    ConfigError or Refused where the folder holds no finished run, or its configuration cannot be had.
    """
    folder = Path(run)
    config_path = folder / "config.yaml"
    if not config_path.is_file():
        raise Refused(f"--run: {run}: holds no config.yaml; name the output folder of a run")
    config = load_config(config_path, overrides, scoring=True)
    with joined_ranks() as ranks:
        try:
            theta, facts = load_summary(folder / "final")
            parts = build(config, config_path, ranks.device, scoring=True)
            ranks = in_step(ranks, config.model, parts.learner)
            parts.learner.adapters.load_theta(theta)
            plan = plan_on(ranks, config, {})  # no engine runs here
        except ValueError as error:
            raise Refused(str(error)) from error
        checkpoint_layers(parts.model, plan.checkpointing)
        letters = parts.tasks.letter_ids
        beside = config.trainer.parallel_episodes
        evaluator = Evaluator(parts.learner, letters, config.eval, plan.eval_batch_size, config.seed, ranks, beside)
        evaluations = [evaluator.evaluate(parts.method, parts.tasks.test, "test")]
        if config.eval.pretrained and not isinstance(parts.method, Pretrained):
            parts.learner.adapters.initialise(config.seed)  # back to the start, where the adapters are zero
            evaluations.insert(0, evaluator.evaluate(Pretrained(config.method), parts.tasks.test, "test"))
        if ranks.is_main:
            for note in parts.tasks.notes:
                print(f"note: {note}")
            print(f"{folder / 'final'}, after step {facts['step']}\n\n{score_table(evaluations)}")
            if output:
                Path(output).write_text(json.dumps([evaluation.to_json() for evaluation in evaluations], indent=1))
