"""The adapted model as the methods see it: forward passes, phi's gradient steps, theta's gradient.

A learner knows nothing of tasks' sources, engines or ranks. Methods are written in its terms. What names a step's noise
is a `NoiseKey` or, on the device, the rows that `NoiseKey.rows` makes of one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from abmll.adapters import AdapterSet, OuterWeights, RecordedTerms
from abmll.config.schema import MethodConfig
from abmll.kernels import NoiseKey
from abmll.models.answers import answer_logits
from abmll.objective import answer_nll, gradient_norm, inner_objective
from abmll.profiling import phase
from abmll.tasks.task import Batch


class StepTerms(NamedTuple):
    """One gradient step's terms, scalars on the device: reading them would wait for it."""

    nll: Tensor
    kl: Tensor
    prior: Tensor
    gradient_norm: Tensor


class Learner:
    """A frozen language model with adapters. theta never receives a gradient here except as a returned dict."""

    def __init__(
        self, model: nn.Module, adapters: AdapterSet, method: MethodConfig, num_train_tasks: int | None, batch_size: int
    ):
        """`num_train_tasks` is M, which weighs the prior in theta's gradient; None where theta is not trained."""
        self.model, self.adapters, self.method, self.batch_size = model, adapters, method, batch_size
        self.outer_weights = OuterWeights(method.beta, method.beta / num_train_tasks) if num_train_tasks else None
        self.zero = torch.zeros((), device=next(iter(adapters.phi.values())).device)
        for parameter in adapters.theta.values():
            parameter.requires_grad_(False)  # the engine alone turns it on, for the moment of its backward

    def optimizer(self, lr: float, parameters: Iterable[nn.Parameter] | None = None) -> torch.optim.AdamW:
        """A fresh AdamW over phi (or some of it), with the configuration's betas and epsilon."""
        method = self.method
        return torch.optim.AdamW(
            list(self.adapters.phi.values() if parameters is None else parameters),
            lr=lr,
            betas=method.adam_betas,
            eps=method.adam_eps,
            weight_decay=method.weight_decay,
        )

    @torch.no_grad()
    def sampled_probabilities(self, batch: Batch, key: NoiseKey | Tensor, samples: int) -> Tensor:
        """[B, V], the average of S samples' probabilities: all S side by side in one forward pass of S x B prompts."""
        repeated = batch.repeat(samples)
        with self.adapters.context.forward_pass(key, repeated.token_mask, groups=samples):
            logits = answer_logits(self.model, repeated)
        return logits.softmax(dim=-1).unflatten(0, (samples, -1)).mean(dim=0)

    @phase("forward")
    def forward(
        self, batch: Batch, key: NoiseKey | Tensor | None, terms: Literal["none", "kl", "theta"] = "none"
    ) -> tuple[Tensor, RecordedTerms]:
        """Answer logits [B, V] and the recorded terms; `key` None runs the posterior mean, which has no terms."""
        outer = self.outer_weights if terms == "theta" else None
        with self.adapters.context.forward_pass(key, batch.token_mask, terms == "kl", outer) as recorded:
            logits = answer_logits(self.model, batch)
        return logits, recorded

    def nll(self, logits: Tensor, batch: Batch) -> Tensor:
        return answer_nll(logits, batch.target, self.method.nll_reduction)

    @phase("inner step")
    def phi_step(self, batch: Batch, key: NoiseKey | Tensor | None, optimizer: torch.optim.Optimizer) -> StepTerms:
        """One step of phi on NLL + beta * KL (without a key: on the NLL of the mean).

        It can be captured in a CUDA graph, which replays with the noise of the rows [1, 3] that are given as `key`. Of
        what it calls, two things must be seen to: the optimizer must be one with `capturable=True`, and transformers
        asks the device in each forward pass whether sequences are packed (`masking_utils`), which waits for it.
        """
        terms, parameters = self._phi_gradient(batch, key), [p for g in optimizer.param_groups for p in g["params"]]
        norm = gradient_norm([p.grad for p in parameters])
        with phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return terms._replace(gradient_norm=norm)

    def _phi_gradient(self, batch: Batch, key: NoiseKey | Tensor | None) -> StepTerms:
        logits, recorded = self._train().forward(batch, key, "kl")
        nll = self.nll(logits, batch)
        kl = recorded.total_kl() if recorded.kl else self.zero
        with phase("backward"):
            inner_objective(nll, kl, self.method.beta).backward()
        return StepTerms(nll.detach(), kl.detach(), self.zero, self.zero)

    @phase("theta gradient")
    def theta_gradient_at_mean(self, batch: Batch) -> tuple[dict[str, Tensor], StepTerms]:
        """The NLL's gradient by phi at the posterior mean, named as theta: for methods without a task level."""
        terms = self._phi_gradient(batch, key=None)
        gradient = self._take_phi_gradient()
        return gradient, terms._replace(gradient_norm=gradient_norm(list(gradient.values())))

    @phase("theta gradient")
    def theta_gradient_kl(self, batch: Batch, key: NoiseKey | Tensor) -> tuple[dict[str, Tensor], StepTerms]:
        """Gradient of beta * KL + (beta / M) * (-log prior) by theta: one forward pass, no backward pass."""
        with torch.no_grad():
            logits, recorded = self._train().forward(batch, key, "theta")
            return self._outer_result(self.nll(logits, batch), recorded)

    @phase("theta gradient")
    def theta_gradient_of_weights(self) -> tuple[dict[str, Tensor], StepTerms]:
        """`theta_gradient_kl` in the weight posterior, whose divergence reads no batch: no forward pass, no NLL."""
        terms = {layer.index: layer.theta_gradient(self.outer_weights) for layer in self.adapters.layers.values()}
        return self._outer_result(self.zero, RecordedTerms(theta=terms))

    @phase("theta gradient")
    def theta_gradient_first_order(self, batch: Batch, key: NoiseKey | Tensor) -> tuple[dict[str, Tensor], StepTerms]:
        """As `theta_gradient_kl`, plus the NLL's gradient at the adapted phi, as first-order MAML gives it to theta."""
        logits, recorded = self._train().forward(batch, key, "theta")
        nll = self.nll(logits, batch)
        with phase("backward"):
            nll.backward()
        gradient, terms = self._outer_result(nll.detach(), recorded)
        for name, value in self._take_phi_gradient().items():
            gradient[name] = gradient[name] + value
        return gradient, terms._replace(gradient_norm=gradient_norm(list(gradient.values())))

    def _train(self) -> Learner:
        """Training mode, which is what transformers checkpoints activations in."""
        if not self.model.training:
            self.model.train()
        return self

    def _take_phi_gradient(self) -> dict[str, Tensor]:
        """Phi's gradients, by theta's names (the names are the same); phi's are cleared."""
        gradient = {}
        for name, parameter in self.adapters.phi.items():
            gradient[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
        return gradient

    def _outer_result(self, nll: Tensor, recorded: RecordedTerms) -> tuple[dict[str, Tensor], StepTerms]:
        gradient = {}
        for (layer_name, _), term in zip(
            self.adapters.layers.items(), (recorded.theta[i] for i in sorted(recorded.theta)), strict=True
        ):
            for kind, pair in zip(term.gradient._fields, term.gradient, strict=True):
                gradient[f"{layer_name}.{kind}.a"] = pair.a
                gradient[f"{layer_name}.{kind}.b"] = pair.b
        norm = gradient_norm(list(gradient.values()))
        return gradient, StepTerms(nll, recorded.total_theta_kl(), recorded.total_negative_log_prior(), norm)
