"""What a method is: its adapters, what one update of theta consists of, and its adaptation to an unseen task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from abmll.adapters import LayerKind
from abmll.config.schema import MethodConfig
from abmll.kernels import NoiseKey, Posterior, rows_of_keys
from abmll.learner import Learner, StepTerms
from abmll.objective import gradient_norm
from abmll.tasks.batch import side_by_side
from abmll.tasks.task import Batch, Episode


@dataclass(frozen=True)
class Visit:
    """What an update is made from: number `index` of the `updates_per_episode` of G episodes side by side.

    `support` holds the K inner batches and `query` the outer one, if there is a fresh one, each with a group for every
    episode.
    """

    episodes: Sequence[int]  # their numbers in the run
    support: Sequence[Batch]
    query: Batch | None
    index: int
    keys: Sequence[NoiseKey | Tensor]  # K + 1 noise names (rows [G, 3] on the device), one a forward pass
    optimizer: torch.optim.Optimizer  # the inner one, over phi
    progress: float  # of training, in [0, 1)

    @property
    def outer(self) -> Batch:
        """The batch of theta's step: a fresh one, or the last inner one again."""
        return self.support[-1] if self.query is None else self.query

    @classmethod
    def of(
        cls,
        episodes: Sequence[Episode],
        index: int,
        keys: Sequence[Sequence[NoiseKey]],
        optimizer: torch.optim.Optimizer,
        progress: float,
        device: torch.device | str = "cpu",
    ) -> Visit:
        """`keys`: each episode's own K + 1."""
        batches = [side_by_side(own).to(device) for own in zip(*(episode.support for episode in episodes), strict=True)]
        queries = [episode.query for episode in episodes if episode.query is not None]
        query = side_by_side(queries).to(device) if queries else None
        names = [rows_of_keys(own, device) for own in zip(*keys, strict=True)]
        return cls([episode.index for episode in episodes], batches, query, index, names, optimizer, progress)


@dataclass(frozen=True)
class Update:
    """What G episodes contribute to one step of theta: gradients [G, ...] by name, and each step's terms."""

    gradient: dict[str, Tensor]
    inner: tuple[StepTerms, ...]
    outer: StepTerms
    batches: tuple[Batch, ...]  # of the forward passes made, for counting tokens

    def total(self, finite: Sequence[bool]) -> dict[str, Tensor]:
        """The gradient of the episodes whose numbers are finite, summed; empty if none are."""
        wanted = [number for number, good in enumerate(finite) if good]
        if not wanted:
            return {}
        if len(finite) == 1:
            return {name: value.squeeze(0) for name, value in self.gradient.items()}
        all_finite = len(wanted) == len(finite)
        return {name: (own if all_finite else own[wanted]).sum(dim=0) for name, own in self.gradient.items()}


class Method:
    """Base of all methods: plain LoRA adapters, adapted to an unseen task by K steps on the NLL of the mean."""

    name: ClassVar[str]
    layers: ClassVar[LayerKind] = "mean"
    pooled: ClassVar[bool] = False  # batches mix all tasks instead of holding one
    second_order: ClassVar[bool] = False  # an update keeps the graphs of all its inner steps
    inner_loop: ClassVar[bool] = True  # an update adapts phi to its task, by the inner optimizer

    def __init__(self, config: MethodConfig, posterior: Posterior = "activation"):
        self.config, self.posterior = config, posterior

    @property
    def sampled(self) -> bool:
        """Whether its forward passes draw from a posterior, and need the noise's name."""
        return self.layers != "mean"

    @property
    def pulled_to_theta(self) -> bool:
        """Whether its KL is phi's to theta: 0 before phi's first step, and the larger the further phi goes."""
        return self.layers == "gaussian"

    @property
    def draws_weights(self) -> bool:
        """Whether a draw is a change to W0, the same for every token: then a draw's answers can agree with each other.
        (BLoB's is not: flipout gives every token signs of its own.)
        """
        return self.layers == "gaussian" and self.posterior == "weight"

    @property
    def updates_per_episode(self) -> int:
        """Steps of theta that one episode gives rise to; 0 trains nothing."""
        return 1

    @property
    def passes_per_episode(self) -> int:
        """Forward passes that one episode takes."""
        return self.config.inner_steps

    @property
    def rate_of_theta(self) -> str:
        """The key of how far theta goes in a step, for messages."""
        return "method.reptile_step" if self.config.interpolates else "method.outer_lr"

    def outer_optimizer(self, theta: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        config = self.config
        if config.interpolates:
            return torch.optim.SGD(theta, lr=1.0)  # the share is in the gradient: it is annealed
        if config.outer_optimizer == "sgd":
            return torch.optim.SGD(theta, lr=config.outer_lr, weight_decay=config.weight_decay)
        return torch.optim.AdamW(
            theta, lr=config.outer_lr, betas=config.adam_betas, eps=config.adam_eps, weight_decay=config.weight_decay
        )

    def update(self, learner: Learner, visit: Visit) -> Update:
        """One update of episodes side by side, from phi = theta; phi may be left anywhere."""
        raise ValueError(f"method.name: {self.name!r}: this method does not train")

    def step_towards_phi(self, learner: Learner, visit: Visit, inner: tuple[StepTerms, ...]) -> Update:
        """Reptile's update behind its inner steps: theta <- theta + epsilon (phi - theta)."""
        annealed = self.config.reptile_schedule == "annealed"
        epsilon = self.config.reptile_step * (1.0 - visit.progress if annealed else 1.0)
        gradient = learner.theta_gradient_towards_phi(epsilon)
        # of the last inner step are the terms that the step line shows as the outer step's: no others are computed
        outer = inner[-1]._replace(gradient_norm=gradient_norm(list(gradient.values())))
        return Update(gradient, inner, outer, tuple(visit.support))

    def adaptation_parameters(self, learner: Learner) -> list[nn.Parameter]:
        return list(learner.adapters.phi.values()) if self.sampled else learner.adapters.mean_phi

    def adapt(self, learner: Learner, batches: Sequence[Batch], keys: Sequence[NoiseKey | Tensor]) -> list[StepTerms]:
        """Adapt phi (= theta) to unseen tasks, to each on its group of every batch, with a fresh optimizer."""
        optimizer = learner.optimizer(self.config.test_lr, self.adaptation_parameters(learner))
        beta = self.config.beta if self.config.test_kl else 0.0
        return [
            learner.phi_step(batch, key if self.sampled else None, optimizer, beta)
            for batch, key in zip(batches, keys, strict=True)
        ]
