"""Tasks' phi kept between scorings that differ in what comes after adaptation alone: pruning, samples, temperature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from abmll.evaluation.predictor import Predictor
from abmll.methods import Method
from abmll.tasks.task import PromptedExample


class AdaptedTasks:
    """Each task's last phi, on the host, and what it was adapted by. It serves as long as theta stays as it is."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, dict[str, Tensor]]] = {}

    def adapt(self, predictor: Predictor, method: Method, support: Mapping[str, Sequence[PromptedExample]]) -> None:
        """As `Predictor.adapt` on the tasks' examples: phi's slots in their order, from here where all of them are."""
        phi = predictor.learner.adapters.phi
        made_by = {task: _made_by(predictor, method, examples) for task, examples in support.items()}
        if all(task in self._kept and self._kept[task][0] == made for task, made in made_by.items()):
            predictor.learner.adapters.reset_phi(len(support))
            with torch.no_grad():
                for slot, task in enumerate(support):
                    for name, value in self._kept[task][1].items():
                        phi[name][slot].copy_(value)
            return
        predictor.adapt(method, list(support), list(support.values()))
        for slot, (task, made) in enumerate(made_by.items()):
            self._kept[task] = (made, {name: value[slot].detach().to("cpu", copy=True) for name, value in phi.items()})


def _made_by(predictor: Predictor, method: Method, examples: Sequence[PromptedExample]) -> tuple[Any, ...]:
    """All that a task's phi depends on beside its name, theta and the model."""
    prompts = [(tuple(example.token_ids), example.label, example.num_options) for example in examples]
    return method.name, method.config, predictor.seed, predictor.learner.batch_size, prompts
