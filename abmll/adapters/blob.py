"""The layer of BLoB, Bayesian LoRA without a task level: a mean-field normal on A, a point estimate of B.

    A ~ N(M, Omega^2), Omega = G^2 elementwise, prior N(0, prior_std^2);  y = W0 x + bias + s B A x

Source: Wang et al., "BLoB: Bayesian low-rank adaptation by backpropagation for large language models", NeurIPS 2024;
its samples within a batch are made independent by flipout (Wen et al., ICLR 2018): one draw E of a group, with random
signs of every token, B (t o ((Omega o E) (u o x))).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from abmll.adapters.context import AdapterContext
from abmll.adapters.layers import frozen_base
from abmll.adapters.pairs import MeanPairs
from abmll.kernels import LowRank, mean_linear, standard_normal
from abmll.kernels.reference import add_change, compute_dtype

SIGNS = 1 << 30  # added to a layer's index: the signs' stream of noise


def normal_kl(mean: Tensor, std: Tensor, prior_std: float) -> Tensor:
    """KL( N(mean, std^2) || N(0, prior_std^2) ), elementwise, in nats."""
    return math.log(prior_std) - std.log() + (std.square() + mean.square()) / (2 * prior_std**2) - 0.5


class Deviations(nn.Module):
    """The roots G [*lead, rank, in_features] of A's standard deviations, fp32."""

    def __init__(self, in_features: int, rank: int, initial: float, device: torch.device | str, *lead: int):
        super().__init__()
        self.root = nn.Parameter(torch.zeros(*lead, rank, in_features, dtype=torch.float32, device=device))
        self.initial = initial

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Uniform in [initial / sqrt(2), initial], as the authors start."""
        low = self.initial / math.sqrt(2.0)
        self.root.copy_(torch.empty(self.root.shape, device="cpu").uniform_(low, self.initial, generator=generator))

    def std(self) -> Tensor:
        return self.root.square()


class BlobPairs(MeanPairs):
    """M and B as a pair of low rank, and A's deviations."""

    def __init__(self, in_features: int, out_features: int, rank: int, initial: float, device, *lead: int):
        super().__init__(in_features, out_features, rank, device, *lead)
        self.deviations = Deviations(in_features, rank, initial, device, *lead)


class BlobLinear(nn.Module):
    """A projection with a drawn A; the KL to the prior joins the shared context. Without noise names: the mean.

    theta and phi as in every adapted layer; the KL is phi's alone, to a fixed prior.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        scaling: float,
        prior_std: float,
        initial_std: float,
        context: AdapterContext,
        index: int,
    ):
        super().__init__()
        self.base, self.scaling, self.prior_std, self.context, self.index = base, scaling, prior_std, context, index
        sizes = (base.in_features, base.out_features, rank, initial_std, base.weight.device)
        self.theta, self.phi = BlobPairs(*sizes), BlobPairs(*sizes, 1)

    def forward(self, x: Tensor) -> Tensor:
        context = self.context
        mean = LowRank(*(context.phi_of(factor) for factor in self.phi.mean.factors()))
        y = mean_linear(x, frozen_base(self.base, x), mean, self.scaling, context.groups)
        if context.names is None:
            return y
        std = context.phi_of(self.phi.deviations.std())
        rows = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
        sizes = [len(rows) // len(std)] * len(std) if context.groups is None else list(context.groups.sizes)
        parts = [self._noise(own, mean.b[g], std[g], g) for g, own in enumerate(rows.split(sizes))]
        if context.kl:  # made in a recomputation too, which must keep the same tensors, and recorded once
            kl = normal_kl(mean.a, std, self.prior_std).sum(dim=(1, 2))
            if context.recorded is not None:
                context.recorded.kl[self.index] = kl
        return add_change(y, torch.cat(parts).view(y.shape))

    def _noise(self, x: Tensor, b: Tensor, std: Tensor, group: int) -> Tensor:
        """What one group's draw adds to its rows: [T, K] -> [T, N]."""
        names, (rank, inputs) = self.context.names, std.shape
        draw = standard_normal(rank, inputs, names, self.index, group, x.device).to(x.dtype)
        signs = standard_normal(len(x), inputs + rank, names, self.index + SIGNS, group, x.device).sign().to(x.dtype)
        low = ((x * signs[:, :inputs]) @ (std * draw).mT) * signs[:, inputs:]
        return self.scaling * low @ b.mT
