"""Low-rank pairs as parameters: one pair for a plain LoRA layer, two (mean, log-variance) for a Gaussian one.

Theta's factors are a [rank, in_features], b [out_features, rank]; phi's have a first dimension for the episodes side by
side, [G, ...].
"""

from __future__ import annotations

import math

import torch
from torch import nn

from abmll.kernels import GaussianFactors, LowRank


class LowRankPair(nn.Module):
    """Factors a [*lead, rank, in_features] and b [*lead, out_features, rank], fp32 whatever the base model's dtype.

    AdamW steps of 1e-5 would stall in bf16 parameters.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, device: torch.device | str, *lead: int):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(*lead, rank, in_features, dtype=torch.float32, device=device))
        self.b = nn.Parameter(torch.zeros(*lead, out_features, rank, dtype=torch.float32, device=device))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """a Kaiming-uniform with slope sqrt(5), b zero: the product starts at zero. Same bits on every device."""
        bound = 1.0 / math.sqrt(self.a.shape[-1])  # Kaiming: sqrt(6 / ((1 + 5) fan_in))
        self.a.copy_(torch.empty(self.a.shape, device="cpu").uniform_(-bound, bound, generator=generator))
        self.b.zero_()

    def factors(self) -> LowRank:
        return LowRank(self.a, self.b)


class MeanPairs(nn.Module):
    """The parameters of a point estimate: the mean's pair alone (plain LoRA)."""

    def __init__(self, in_features: int, out_features: int, rank: int, device: torch.device | str, *lead: int):
        super().__init__()
        self.mean = LowRankPair(in_features, out_features, rank, device, *lead)


class GaussianPairs(MeanPairs):
    """The parameters of a Gaussian posterior: a pair for the mean and one for the log-variance."""

    def __init__(self, in_features: int, out_features: int, rank: int, device: torch.device | str, *lead: int):
        super().__init__(in_features, out_features, rank, device, *lead)
        self.log_variance = LowRankPair(in_features, out_features, rank, device, *lead)

    def factors(self) -> GaussianFactors:
        return GaussianFactors(self.mean.factors(), self.log_variance.factors())
