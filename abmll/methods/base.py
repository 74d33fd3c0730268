"""What a method is: its adapters, what one update of theta consists of, and its adaptation to an unseen task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from abmll.config.schema import MethodConfig
from abmll.kernels import NoiseKey, Posterior
from abmll.learner import Learner, StepTerms
from abmll.tasks.task import Batch, Episode


@dataclass(frozen=True)
class Visit:
    """What an update is made from: number `index` of an episode's `updates_per_episode`."""

    episode: Episode
    index: int
    keys: Sequence[NoiseKey]  # K + 1 noise names, one a forward pass
    optimizer: torch.optim.Optimizer  # the inner one, over phi
    progress: float  # of training, in [0, 1)


@dataclass(frozen=True)
class Update:
    """An episode's contribution to one step of theta: its gradient by name, and the terms of every step taken."""

    gradient: dict[str, Tensor]
    inner: tuple[StepTerms, ...]
    outer: StepTerms
    batches: tuple[Batch, ...]  # of the forward passes made, for counting tokens


class Method:
    """Base of all methods: plain LoRA adapters, adapted to an unseen task by K steps on the NLL of the mean."""

    name: ClassVar[str]
    gaussian: ClassVar[bool] = False
    pooled: ClassVar[bool] = False  # batches mix all tasks instead of holding one
    inner_loop: ClassVar[bool] = True  # an update adapts phi to its task, by the inner optimizer

    def __init__(self, config: MethodConfig, posterior: Posterior = "activation"):
        self.config, self.posterior = config, posterior

    @property
    def updates_per_episode(self) -> int:
        """Steps of theta that one episode gives rise to; 0 trains nothing."""
        return 1

    @property
    def passes_per_episode(self) -> int:
        """Forward passes that one episode takes."""
        return self.config.inner_steps

    def outer_optimizer(self, theta: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.AdamW(
            theta, lr=config.outer_lr, betas=config.adam_betas, eps=config.adam_eps, weight_decay=config.weight_decay
        )

    def update(self, learner: Learner, visit: Visit) -> Update:
        """One update of an episode, from phi = theta; phi may be left anywhere."""
        raise ValueError(f"method.name: {self.name!r}: this method does not train")

    def adaptation_parameters(self, learner: Learner) -> list[nn.Parameter]:
        return learner.adapters.mean_phi

    def adapt(self, learner: Learner, batches: Sequence[Batch], keys: Sequence[NoiseKey]) -> list[StepTerms]:
        """Adapt phi (= theta) to an unseen task, one step a batch, with a fresh optimizer."""
        optimizer = learner.optimizer(self.config.test_lr, self.adaptation_parameters(learner))
        return [
            learner.phi_step(batch, key if self.gaussian else None, optimizer)
            for batch, key in zip(batches, keys, strict=True)
        ]
