"""What the adapted layers of a model share during one forward pass and its recomputation.

The layers are called by the language model, which passes them nothing but x. The rest stands here: the noise's name,
the token mask, and where the divergences go. Noise and mask stay in place until the next pass, because activation
checkpointing runs the forward again inside the backward; the recorded terms are closed by then, so that nothing is
counted twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from abmll.kernels import NoiseKey, ThetaGradient


class OuterWeights(NamedTuple):
    """Weights of theta's two terms: beta and beta / M."""

    kl: float
    prior: float


@dataclass
class RecordedTerms:
    """What one forward pass left behind: a KL scalar a layer, or theta's local gradient a layer."""

    kl: list[Tensor] = field(default_factory=list)
    theta: dict[int, ThetaGradient] = field(default_factory=dict)

    def total_kl(self) -> Tensor:
        return torch.stack(self.kl).sum()

    def total_theta_kl(self) -> Tensor:
        return torch.stack([term.kl for term in self.theta.values()]).sum()

    def total_negative_log_prior(self) -> Tensor:
        return torch.stack([term.negative_log_prior for term in self.theta.values()]).sum()


@dataclass
class AdapterContext:
    """`names` [G, 3] name the noise, on the device (see `NoiseKey.rows`); None: the posterior mean, without terms.
    `kl`: every layer's KL joins the graph. `outer` set: theta's local gradients are made in the forward pass. `groups`
    G: the batch is G equal parts, each with noise of its own (samples of the posterior side by side).
    """

    names: Tensor | None = None
    token_mask: Tensor | None = None
    groups: int = 1
    kl: bool = False
    outer: OuterWeights | None = None
    recorded: RecordedTerms | None = None

    @contextmanager
    def forward_pass(
        self,
        key: NoiseKey | Tensor | None,
        token_mask: Tensor,
        kl: bool = False,
        outer: OuterWeights | None = None,
        groups: int = 1,
    ) -> Iterator[RecordedTerms]:
        """Fix the integers and the mask of the next forward pass; yields what the layers record in it.

        `key` may be rows [groups, 3] on the device. They are kept as they are, so that a captured CUDA graph draws
        other noise where they are written over.
        """
        self.names = key.rows(groups, token_mask.device) if isinstance(key, NoiseKey) else key  # once for all layers
        self.token_mask, self.kl, self.outer, self.groups = token_mask, kl, outer, groups
        self.recorded = RecordedTerms()
        try:
            yield self.recorded
        finally:
            self.recorded = None
