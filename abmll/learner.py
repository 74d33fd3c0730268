"""The adapted model as the methods see it: forward passes, phi's gradient steps, theta's gradient.

A learner knows nothing of tasks' sources, engines or ranks. Methods are written in its terms. A batch holds one group
of prompts for each episode that phi has a copy of theta for (`AdapterSet.reset_phi`), and every number that comes back
is each episode's own: what an episode gives does not depend on those beside it, but for the order of sums. What names a
step's noise is a `NoiseKey` (of one episode) or, on the device, rows [G, 3] (`rows_of_keys`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from abmll.adapters import AdapterSet, OuterWeights, RecordedTerms
from abmll.config.schema import MethodConfig
from abmll.kernels import NoiseKey
from abmll.models.answers import Rows, answer_logits
from abmll.objective import answer_nll, gradient_norm, inner_objective
from abmll.profiling import phase
from abmll.tasks.batch import side_by_side
from abmll.tasks.task import Batch


class StepTerms(NamedTuple):
    """One gradient step's terms on the device: reading them would wait for it.

    [G] each; kl_by_layer [G, L] in the order of the layers, L = 0 where the step has no KL.
    """

    nll: Tensor
    kl: Tensor
    prior: Tensor
    gradient_norm: Tensor
    kl_by_layer: Tensor


class Learner:
    """A frozen language model with adapters. theta never receives a gradient here except as a returned dict."""

    def __init__(
        self, model: nn.Module, adapters: AdapterSet, method: MethodConfig, num_train_tasks: int | None, batch_size: int
    ):
        """`num_train_tasks` is M, which weighs the prior in theta's gradient; None where theta is not trained."""
        self.model, self.adapters, self.method, self.batch_size = model, adapters, method, batch_size
        self.outer_weights = OuterWeights(method.beta, method.beta / num_train_tasks) if num_train_tasks else None
        adapters.context.kl_estimate = method.kl_estimate
        for parameter in adapters.theta.values():
            parameter.requires_grad_(False)  # the engine alone turns it on, for the moment of its backward

    def optimizer(self, lr: float, parameters: Iterable[nn.Parameter] | None = None) -> torch.optim.Optimizer:
        """A fresh optimizer over phi (or some of it): AdamW with the configuration's betas and epsilon, or SGD."""
        method, phi = self.method, list(self.adapters.phi.values() if parameters is None else parameters)
        if method.inner_optimizer == "sgd":
            return torch.optim.SGD(phi, lr=lr, weight_decay=method.weight_decay, fused=True)
        return torch.optim.AdamW(
            phi,
            lr=lr,
            betas=method.adam_betas,
            eps=method.adam_eps,
            weight_decay=method.weight_decay,
            fused=True,  # one launch
        )

    @torch.no_grad()
    def sampled_probabilities(self, batch: Batch, key: NoiseKey | Tensor, samples: int, slot: int = 0) -> Tensor:
        """Every sample's probabilities [samples, S, V], all samples side by side in one forward pass."""
        rows = Rows.of(self.model, side_by_side([batch] * samples))
        names = key.rows(samples, batch.input_ids.device) if isinstance(key, NoiseKey) else key
        with self.adapters.context.forward_pass(names, rows.token_mask, groups=rows.groups, slot=slot):
            logits = answer_logits(self.model, rows)
        return logits.softmax(dim=-1).unflatten(0, (samples, -1))

    @torch.no_grad()
    def mean_probabilities(self, batch: Batch, slot: int = 0) -> Tensor:
        """[S, V] of the posterior mean of one episode's phi, number `slot`."""
        return self.forward(batch, None, slot=slot)[0].softmax(dim=-1)

    @torch.no_grad()
    def probabilities_by_slot(self, batch: Batch) -> Tensor:
        """[G, S, V]: by each of phi's G slots, all of them on the same batch in one forward pass."""
        logits, _ = self.forward(side_by_side([batch] * self.adapters.groups), None)
        return logits.softmax(dim=-1).unflatten(0, (self.adapters.groups, -1))

    @phase("forward")
    def forward(
        self,
        batch: Batch,
        key: NoiseKey | Tensor | None,
        terms: Literal["none", "kl", "theta"] = "none",
        slot: int | None = None,
    ) -> tuple[Tensor, RecordedTerms]:
        """Answer logits [S, V] and the recorded terms; `key` None runs the posterior mean, which has no terms.

        `slot`: the episode whose phi serves the whole batch; None: each group has its own.
        """
        rows, outer = Rows.of(self.model, batch), self.outer_weights if terms == "theta" else None
        names = key.rows(1, batch.input_ids.device) if isinstance(key, NoiseKey) else key
        with self.adapters.context.forward_pass(
            names, rows.token_mask, terms == "kl", outer, rows.groups, slot
        ) as recorded:
            logits = answer_logits(self.model, rows)
        return logits, recorded

    def nll(self, logits: Tensor, batch: Batch) -> Tensor:
        return answer_nll(logits, batch.target, self.method.nll_reduction, batch.group_prompts)

    @phase("inner step")
    def phi_step(
        self, batch: Batch, key: NoiseKey | Tensor | None, optimizer: torch.optim.Optimizer, beta: float | None = None
    ) -> StepTerms:
        """One step of every episode's phi on its NLL + beta * KL (without a key: on the NLL of the mean).

        beta: None takes the configuration's.

        With packed prompts (`model.attention` but for eager) nothing in it waits for the device. It can then be
        captured in a CUDA graph, which replays with the noise of the rows that are given as `key`, if the optimizer has
        `capturable=True`.
        """
        terms = self._phi_gradient(batch, key, self.method.beta if beta is None else beta)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = gradient_norm([p.grad for p in parameters])
        with phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return terms._replace(gradient_norm=norm)

    def _phi_gradient(self, batch: Batch, key: NoiseKey | Tensor | None, beta: float) -> StepTerms:
        logits, recorded = self._train().forward(batch, key, "kl")
        nll = self.nll(logits, batch)
        none = torch.zeros_like(nll)
        by_layer = recorded.kl_by_layer() if recorded.kl else nll.new_zeros(0, len(nll))
        kl = by_layer.sum(dim=0)
        with phase("backward"):
            inner_objective(nll, kl, beta).backward()
        return StepTerms(nll.detach(), kl.detach(), none, none, by_layer.detach().T)

    @phase("theta gradient")
    def theta_gradient_at_phi(
        self, batch: Batch, key: NoiseKey | Tensor | None = None
    ) -> tuple[dict[str, Tensor], StepTerms]:
        """The gradient of NLL + beta * KL by each episode's phi, where it stands, named as theta, [G, ...].

        Without a key of the mean's NLL. For methods without a task level, whose phi is theta, and for first-order MAML.
        """
        terms = self._phi_gradient(batch, key, self.method.beta)
        gradient = self._take_phi_gradient()
        return gradient, terms._replace(gradient_norm=gradient_norm(list(gradient.values())))

    @phase("theta gradient")
    def theta_gradient_kl(self, batch: Batch, key: NoiseKey | Tensor) -> tuple[dict[str, Tensor], StepTerms]:
        """Gradient of beta * KL + (beta / M) * (-log prior) by theta, each episode's own [G, ...]: one forward pass, no
        backward pass.
        """
        with torch.no_grad():
            logits, recorded = self._train().forward(batch, key, "theta")
            return self._outer_result(self.nll(logits, batch), recorded)

    @phase("theta gradient")
    def theta_gradient_of_weights(self) -> tuple[dict[str, Tensor], StepTerms]:
        """`theta_gradient_kl` in the weight posterior, whose divergence reads no batch: no forward pass, no NLL."""
        terms = {layer.index: layer.theta_gradient(self.outer_weights) for layer in self.adapters.layers.values()}
        recorded = RecordedTerms(theta=terms)
        return self._outer_result(torch.zeros_like(recorded.total_theta_kl()), recorded)

    @phase("theta gradient")
    def theta_gradient_first_order(self, batch: Batch, key: NoiseKey | Tensor) -> tuple[dict[str, Tensor], StepTerms]:
        """As `theta_gradient_kl`, plus the NLL's gradient at the adapted phi, as first-order MAML gives it to theta."""
        logits, recorded = self._train().forward(batch, key, "theta")
        nll = self.nll(logits, batch)
        with phase("backward"):
            nll.sum().backward()
        gradient, terms = self._outer_result(nll.detach(), recorded)
        for name, value in self._take_phi_gradient().items():
            gradient[name] = gradient[name] + value
        return gradient, terms._replace(gradient_norm=gradient_norm(list(gradient.values())))

    @phase("theta gradient")
    def theta_gradient_towards_phi(self, share: float) -> dict[str, Tensor]:
        """`share` (theta - phi), [G, ...]: taken off theta as it is, theta has gone that share of the way to phi."""
        phi = self.adapters.phi
        return {name: share * (theta - phi[name]).detach() for name, theta in self.adapters.theta.items()}

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
        by_layer = recorded.theta_kl_by_layer()
        return gradient, StepTerms(nll, by_layer.sum(dim=0), recorded.total_negative_log_prior(), norm, by_layer.T)
