"""MAML and its first-order form (Finn, Abbeel and Levine, "Model-agnostic meta-learning", ICML 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from abmll.learner import Learner, StepTerms
from abmll.methods.base import Method, Update, Visit
from abmll.models.packing import prompt_by_prompt
from abmll.objective import gradient_norm
from abmll.tasks.task import Batch


class FOMAML(Method):
    """K steps of phi on the NLL; theta gets the outer batch's gradient at the adapted phi.

    As published the outer batch is a fresh one (`outer_batch: query`). `reuse` takes the last inner batch again.
    """

    name = "fomaml"

    @property
    def passes_per_episode(self) -> int:
        return self.config.inner_steps + 1

    def update(self, learner: Learner, visit: Visit) -> Update:
        inner = tuple(learner.phi_step(batch, None, visit.optimizer) for batch in visit.support)
        gradient, outer = learner.theta_gradient_at_phi(visit.outer)
        return Update(gradient, inner, outer, (*visit.support, visit.outer))


class MAML(FOMAML):
    """The same steps, by SGD, with the derivative taken through all of them: K + 1 forward passes live at a time."""

    name = "maml"
    second_order = True

    def update(self, learner: Learner, visit: Visit) -> Update:
        config, answers = self.config, _Answers(learner)
        start = phi = {name: value.detach().requires_grad_() for name, value in learner.adapters.phi.items()}
        inner = []
        with prompt_by_prompt(learner.model), sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            for batch in visit.support:
                nll = answers.nll(phi, batch)
                gradients = torch.autograd.grad(nll.sum(), list(phi.values()), create_graph=True)
                inner.append(_terms(nll, gradients))
                decayed = zip(phi.items(), gradients, strict=True)
                phi = {name: p - config.inner_lr * (g + config.weight_decay * p) for (name, p), g in decayed}
            nll = answers.nll(phi, visit.outer)
            gradients = torch.autograd.grad(nll.sum(), list(start.values()))
        gradient = dict(zip(start, gradients, strict=True))
        return Update(gradient, tuple(inner), _terms(nll, gradients), (*visit.support, visit.outer))


class _Answers(nn.Module):
    """The learner's answers as a function of phi's values."""

    def __init__(self, learner: Learner):
        super().__init__()
        self.model = learner.model.train()
        self.learner = learner

    def forward(self, batch: Batch) -> Tensor:
        return self.learner.forward(batch, None)[0]

    def nll(self, phi: dict[str, Tensor], batch: Batch) -> Tensor:
        """[G], with a graph to phi."""
        paths = self.learner.adapters.phi_paths
        logits = functional_call(self, {f"model.{paths[name]}": value for name, value in phi.items()}, (batch,))
        return self.learner.nll(logits, batch)


def _terms(nll: Tensor, gradients: tuple[Tensor, ...]) -> StepTerms:
    none = torch.zeros_like(nll.detach())
    norm = gradient_norm([gradient.detach() for gradient in gradients])
    return StepTerms(nll.detach(), none, none, norm, none.new_zeros(len(none), 0))
