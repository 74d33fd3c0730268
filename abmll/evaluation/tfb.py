"""Training-free Bayesianization (Shi et al., "Training-free Bayesianization for low-rank adapters of large language
models", arXiv 2412.05723): noise around a point estimate, its size the largest that a few examples bear.

    B = U diag(d) V^T,   B A' = B A + sigma U V^T E,   A' = A + sigma (V diag(1 / d) V^T) E,   E [r, K] ~ N(0, 1)

The paper draws V^T A' with deviations sigma / d_i, whose product with B is B A + sigma U E. V^T E has the distribution
of E, and in this form nothing depends on the signs and the order in which a decomposition comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from abmll.adapters import AdapterSet
from abmll.kernels import LowRank, NoiseKey, standard_normal

RANGE = (1e-4, 1.0)  # of sigma: from far below a weight's size to far above it


@dataclass(frozen=True)
class DrawnWeights:
    """S draws of one task's adapters, which stand in phi's slots."""

    pairs: list[LowRank]  # phi's own parameters, a [S, r, K]
    means: list[Tensor]  # of A, [r, K]
    directions: list[Tensor]  # what A gains for a sigma of 1, [S, r, K]

    @property
    def varies(self) -> bool:
        """Whether there is noise: an untrained B, which is zero, has no direction for any."""
        return any(bool(direction.any()) for direction in self.directions)

    @torch.no_grad()
    def set_sigma(self, sigma: float) -> None:
        for pair, mean, direction in zip(self.pairs, self.means, self.directions, strict=True):
            pair.a.data = mean + sigma * direction


@contextmanager
def drawn_weights(adapters: AdapterSet, slot: int, samples: int, seed: int) -> Iterator[DrawnWeights]:
    """Within it phi's slots are S draws of the weights in `slot`, with a sigma of 0 until it is set.

    The draws are a function of (seed, layer, sample). Afterwards phi is what it was, in the same memory.
    """
    pairs = [layer.phi.mean.factors() for layer in adapters.layers.values()]
    before = [LowRank(pair.a.data, pair.b.data) for pair in pairs]
    try:
        means = [pair.a[slot] for pair in before]
        directions = [_directions(pair.a[slot], pair.b[slot], samples, seed, i) for i, pair in enumerate(before)]
        for pair, old in zip(pairs, before, strict=True):
            pair.b.data = old.b[slot].expand(samples, -1, -1)
        drawn = DrawnWeights(pairs, means, directions)
        drawn.set_sigma(0.0)
        yield drawn
    finally:
        for pair, old in zip(pairs, before, strict=True):
            pair.a.data, pair.b.data = old


def _directions(a: Tensor, b: Tensor, samples: int, seed: int, layer: int) -> Tensor:
    """[S, r, K]."""
    noise = [standard_normal(*a.shape, NoiseKey(seed, 0), layer, sample, a.device) for sample in range(samples)]
    return inverse_root(b) @ torch.stack(noise).to(a.dtype)


def inverse_root(b: Tensor) -> Tensor:
    """V diag(1 / d) V^T [r, r] of B = U diag(d) V^T [N, r], with 0 in place of 1 / d where d is 0: where it is at most
    max(N, r) * epsilon of b's dtype * the largest d. NaN where B is not finite.
    """
    if not b.isfinite().all():  # which LAPACK refuses
        return torch.full_like(b[:1].mT @ b[:1], torch.nan)
    _, d, vh = torch.linalg.svd(b.double(), full_matrices=False)
    kept = d > max(b.shape) * torch.finfo(b.dtype).eps * d.max()
    return ((vh.mT * torch.where(kept, 1 / d, 0.0)) @ vh).to(b.dtype)


def largest_sigma(nll: Callable[[float], float], most: float, evaluations: int) -> float:
    """The largest sigma found in RANGE by bisecting its logarithm whose nll(sigma) is at most `most`, or 0.

    It is the largest of all where nll grows with sigma.
    """
    found, (low, high) = 0.0, (math.log(end) for end in RANGE)
    for _ in range(evaluations):
        middle = (low + high) / 2
        if nll(math.exp(middle)) <= most:
            found, low = math.exp(middle), middle
        else:
            high = middle
    return found
