"""What the adapted layers of a model share during one forward pass and its recomputation.

The layers are called by the language model, which passes them nothing but x. The rest stands here: the noise's name,
which rows are whose, and where the divergences go. All of it stays in place until the next pass, because activation
checkpointing runs the forward again inside the backward; the recorded terms are closed by then, so that nothing is
counted twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from abmll.kernels import Groups, NoiseKey, ThetaGradient


class OuterWeights(NamedTuple):
    """Weights of theta's two terms: beta and beta / M."""

    kl: float
    prior: float


@dataclass
class RecordedTerms:
    """What one forward pass left behind, by the layers' indices: a KL [G], or theta's local gradient (each group's)."""

    kl: dict[int, Tensor] = field(default_factory=dict)
    theta: dict[int, ThetaGradient] = field(default_factory=dict)

    def kl_by_layer(self) -> Tensor:
        """[L, G], in the order of the layers' indices, which need not be that of their calls."""
        return torch.stack([self.kl[index] for index in sorted(self.kl)])

    def total_kl(self) -> Tensor:
        """[G], over layers."""
        return self.kl_by_layer().sum(dim=0)

    def theta_kl_by_layer(self) -> Tensor:
        return torch.stack([self.theta[index].kl for index in sorted(self.theta)])

    def total_theta_kl(self) -> Tensor:
        return self.theta_kl_by_layer().sum(dim=0)

    def total_negative_log_prior(self) -> Tensor:
        return torch.stack([term.negative_log_prior for term in self.theta.values()]).sum(dim=0)


@dataclass
class AdapterContext:
    """`names` [G, 3] name the noise, on the device (see `NoiseKey.rows`); None: the posterior mean, without terms.
    `kl_estimate`: of the whole run, the closed form or what one sample says of it.
    `groups`: which of the batch's rows belong to which of phi's groups; None: all to one. `kl`: every layer's KL joins
    the graph. `outer` set: theta's local gradients are made in the forward pass. `slot`: phi's only group to be used;
    with several groups it serves all of them (samples of one posterior side by side). None: each group has its own.
    """

    kl_estimate: Literal["closed_form", "sample"] = "closed_form"
    names: NoiseKey | Tensor | None = None
    token_mask: Tensor | None = None
    groups: Groups | None = None
    slot: int | None = None
    kl: bool = False
    outer: OuterWeights | None = None
    recorded: RecordedTerms | None = None

    @contextmanager
    def forward_pass(
        self,
        key: NoiseKey | Tensor | None,
        token_mask: Tensor | None = None,
        kl: bool = False,
        outer: OuterWeights | None = None,
        groups: Groups | None = None,
        slot: int | None = None,
    ) -> Iterator[RecordedTerms]:
        """Fix the integers, the groups and the mask of the next forward pass; yields what the layers record in it.

        `key` may be rows [G, 3] on the device of the adapters. They are kept as they are, so that a captured CUDA graph
        draws other noise where they are written over. A NoiseKey itself is for one group.
        """
        self.names = key
        self.token_mask, self.groups, self.slot, self.kl, self.outer = token_mask, groups, slot, kl, outer
        self.recorded = RecordedTerms()
        try:
            yield self.recorded
        finally:
            self.recorded = None

    def phi_of(self, factor: Tensor) -> Tensor:
        """The factor [G, ...] of phi that this pass uses: all groups', or one slot's for each group of the batch."""
        if self.slot is None:
            return factor
        own = factor[self.slot : self.slot + 1]
        return own if self.groups is None else own.expand(len(self.groups), *factor.shape[1:])
