"""LoRA without a task level: on pooled tasks, or on one task at a time (structured)."""

from __future__ import annotations

from abmll.learner import Learner
from abmll.methods.base import Method, Update, Visit


class StructuredLoRA(Method):
    """K steps of theta on the NLL of one task after another; nothing is reset between tasks."""

    name = "structured_lora"
    inner_loop = False

    @property
    def updates_per_episode(self) -> int:
        return self.config.inner_steps

    def update(self, learner: Learner, visit: Visit) -> Update:
        batch = visit.support[visit.index]
        key = visit.keys[visit.index] if self.sampled else None
        gradient, terms = learner.theta_gradient_at_phi(batch, key)
        return Update(gradient, (), terms, (batch,))


class LoRA(StructuredLoRA):
    """The same steps on batches drawn from all training tasks, pooled and shuffled."""

    name = "lora"
    pooled = True
