"""Reptile (Nichol, Achiam and Schulman, "On first-order meta-learning algorithms", 2018)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from abmll.learner import Learner
from abmll.methods.base import Method, Update, Visit
from abmll.objective import gradient_norm


class Reptile(Method):
    """K steps of phi on the NLL, then theta <- theta + epsilon (phi - theta), epsilon constant or annealed to 0."""

    name = "reptile"

    def outer_optimizer(self, theta: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(theta, lr=1.0)  # the step size is in the gradient: it is annealed

    def update(self, learner: Learner, visit: Visit) -> Update:
        inner = tuple(learner.phi_step(batch, None, visit.optimizer) for batch in visit.support)
        annealed = self.config.reptile_schedule == "annealed"
        step_size = self.config.reptile_step * (1.0 - visit.progress if annealed else 1.0)
        adapters = learner.adapters
        gradient = {name: step_size * (theta - adapters.phi[name]).detach() for name, theta in adapters.theta.items()}
        outer = inner[-1]._replace(gradient_norm=gradient_norm(list(gradient.values())))
        return Update(gradient, inner, outer, tuple(visit.support))
