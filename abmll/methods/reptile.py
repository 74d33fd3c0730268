"""Reptile (Nichol, Achiam and Schulman, "On first-order meta-learning algorithms", 2018)."""

from __future__ import annotations

from abmll.learner import Learner
from abmll.methods.base import Method, Update, Visit


class Reptile(Method):
    """K steps of phi on the NLL, then theta <- theta + epsilon (phi - theta), epsilon constant or annealed to 0."""

    name = "reptile"

    def update(self, learner: Learner, visit: Visit) -> Update:
        inner = tuple(learner.phi_step(batch, None, visit.optimizer) for batch in visit.support)
        return self.step_towards_phi(learner, visit, inner)
