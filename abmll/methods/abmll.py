"""Amortized Bayesian meta-learning for LoRA (Zhang, Snell and Griffiths, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from abmll.kernels import NoiseKey
from abmll.learner import Learner
from abmll.methods.base import Method, Update
from abmll.tasks.task import Episode


class ABMLL(Method):
    """Inner: K steps of phi on NLL + beta KL. Outer: one step of theta at the adapted phi."""

    name = "abmll"
    gaussian = True

    @property
    def passes_per_episode(self) -> int:
        return self.config.inner_steps + 1

    def update(
        self,
        learner: Learner,
        episode: Episode,
        index: int,
        keys: Sequence[NoiseKey],
        optimizer: torch.optim.Optimizer,
        progress: float,
    ) -> Update:
        *inner_keys, outer_key = keys
        inner = tuple(
            learner.phi_step(batch, key, optimizer) for batch, key in zip(episode.support, inner_keys, strict=True)
        )
        batch = episode.support[-1] if episode.query is None else episode.query
        if self.config.meta_gradient == "kl":
            gradient, outer = learner.theta_gradient_kl(batch, outer_key)
        else:
            gradient, outer = learner.theta_gradient_first_order(batch, outer_key)
        return Update(gradient, inner, outer, (*episode.support, batch))

    def adaptation_parameters(self, learner: Learner) -> list[nn.Parameter]:
        return list(learner.adapters.phi.values())
