"""Reptile (Nichol, Achiam and Schulman, "On first-order meta-learning algorithms", 2018)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from abmll.kernels import NoiseKey
from abmll.learner import Learner
from abmll.methods.base import Method, Update
from abmll.objective import gradient_norm
from abmll.tasks.task import Episode


class Reptile(Method):
    """K steps of phi on the NLL, then theta <- theta + epsilon (phi - theta), epsilon annealed linearly to 0."""

    name = "reptile"

    def outer_optimizer(self, theta: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(theta, lr=1.0)  # the step size is in the gradient: it is annealed

    def update(
        self,
        learner: Learner,
        episode: Episode,
        index: int,
        keys: Sequence[NoiseKey],
        optimizer: torch.optim.Optimizer,
        progress: float,
    ) -> Update:
        inner = tuple(learner.phi_step(batch, None, optimizer) for batch in episode.support)
        step_size = self.config.reptile_step * (1.0 - progress)
        adapters = learner.adapters
        gradient = {name: step_size * (theta - adapters.phi[name]).detach() for name, theta in adapters.theta.items()}
        outer = inner[-1]._replace(gradient_norm=gradient_norm(list(gradient.values())))
        return Update(gradient, inner, outer, episode.support)
