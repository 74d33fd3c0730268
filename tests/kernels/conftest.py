"""Small random inputs of a projection."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from abmll.kernels import GaussianFactors, LowRank, PosteriorSettings

SETTINGS = PosteriorSettings(scaling=2.0, log_variance_offset=-1.0, prior_shape=1.5, prior_rate=0.3)


@dataclass
class Inputs:
    x: Tensor
    weight: Tensor
    bias: Tensor
    phi: GaussianFactors
    theta: GaussianFactors

    @property
    def factors(self) -> list[Tensor]:
        return [factor for side in (self.phi, self.theta) for pair in side for factor in pair]


@pytest.fixture
def settings() -> PosteriorSettings:
    return SETTINGS


@pytest.fixture
def make_inputs():
    """x [.., T, K], weight [N, K], bias [N] and factors of order one, all different; `groups` gives x and phi a G."""

    def make(
        tokens=3, inputs=4, outputs=5, rank=2, dtype=torch.float64, groups: int | None = None, size=0.3, seed=0
    ) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        wide = torch.promote_types(dtype, torch.float32)  # factors are never 16-bit
        lead = () if groups is None else (groups,)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def factors(*lead: int) -> GaussianFactors:
            shapes = ((*lead, rank, inputs), (*lead, outputs, rank))
            return GaussianFactors(*(LowRank(*(size * draw(*shape).to(wide) for shape in shapes)) for _ in range(2)))

        x, weight, bias = draw(*lead, tokens, inputs), draw(outputs, inputs), draw(outputs)
        return Inputs(x.to(dtype), weight.to(dtype), bias.to(dtype), factors(*lead), factors())

    return make
