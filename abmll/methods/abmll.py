"""Amortized Bayesian meta-learning for LoRA (Zhang, Snell and Griffiths, algorithm 1)."""

from __future__ import annotations

from abmll.learner import Learner
from abmll.methods.base import Method, Update, Visit


class ABMLL(Method):
    """Inner: K steps of phi on NLL + beta KL. Outer: one step of theta at the adapted phi."""

    name = "abmll"
    layers = "gaussian"

    @property
    def passes_per_episode(self) -> int:
        return self.config.inner_steps + (not (self.config.interpolates or self._theta_reads_no_batch))

    @property
    def _theta_reads_no_batch(self) -> bool:
        return (
            self.posterior == "weight"
            and self.config.meta_gradient == "kl"
            and self.config.kl_estimate == "closed_form"  # a sample's is another for every forward pass
        )

    def update(self, learner: Learner, visit: Visit) -> Update:
        *inner_keys, outer_key = visit.keys
        inner = tuple(
            learner.phi_step(batch, key, visit.optimizer) for batch, key in zip(visit.support, inner_keys, strict=True)
        )
        if self.config.interpolates:
            return self.step_towards_phi(learner, visit, inner)
        if self._theta_reads_no_batch:
            gradient, outer = learner.theta_gradient_of_weights()
            # what the step line shows as the outer step's: the last that was computed
            return Update(gradient, inner, outer._replace(nll=inner[-1].nll), tuple(visit.support))
        make = learner.theta_gradient_kl if self.config.meta_gradient == "kl" else learner.theta_gradient_first_order
        gradient, outer = make(visit.outer, outer_key)
        return Update(gradient, inner, outer, (*visit.support, visit.outer))
