"""The two adapted linear layers: a point estimate (plain LoRA) and a Gaussian posterior.

Both hold theta (global) and phi (the task's), and always run with phi. theta enters the Gaussian layer's KL alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abmll.adapters.context import AdapterContext, OuterWeights
from abmll.adapters.pairs import GaussianPairs, MeanPairs
from abmll.kernels import (
    Backend,
    FrozenLinear,
    GaussianFactors,
    LowRank,
    Posterior,
    PosteriorSettings,
    ThetaGradient,
    mean_linear,
    posterior_projection,
    sampling_error,
    sampling_error_by_theta,
    theta_gradient,
)


def frozen_base(layer: nn.Linear, x: Tensor) -> FrozenLinear | Tensor:
    """What an adapter is added to: a dense layer, or the product of one with a call of its own (4-bit weights)."""
    if type(layer).forward is nn.Linear.forward:
        return FrozenLinear(layer.weight, layer.bias)
    return layer(x)


def base_dtype(layer: nn.Linear) -> torch.dtype:
    """The dtype of a frozen layer's product: of a packed weight the one that it is unpacked to."""
    return layer.weight.dtype if layer.weight.is_floating_point() else layer.compute_dtype


class LoRALinear(nn.Module):
    """y = W0 x + bias + s B A x with a frozen base layer; x [..., in_features] -> y [..., out_features]."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float, context: AdapterContext):
        super().__init__()
        self.base, self.scaling, self.context = base, scaling, context
        sizes = (base.in_features, base.out_features, rank, base.weight.device)
        self.theta, self.phi = MeanPairs(*sizes), MeanPairs(*sizes, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = LowRank(*(self.context.phi_of(factor) for factor in self.phi.mean.factors()))
        return mean_linear(x, frozen_base(self.base, x), mean, self.scaling, self.context.groups)


class GaussianLoRALinear(nn.Module):
    """A projection drawn from the task's posterior; its KL to theta's is recorded in the shared context.

    `index` numbers the layer within the model: noise differs from layer to layer.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        posterior: Posterior,
        settings: PosteriorSettings,
        context: AdapterContext,
        index: int,
        backend: Backend,
    ):
        super().__init__()
        self.base, self.posterior, self.settings, self.context, self.index = base, posterior, settings, context, index
        self.backend: Backend = backend
        sizes = (base.in_features, base.out_features, rank, base.weight.device)
        self.theta, self.phi = GaussianPairs(*sizes), GaussianPairs(*sizes, 1)

    def forward(self, x: Tensor) -> Tensor:
        context, base = self.context, frozen_base(self.base, x)
        phi = GaussianFactors(*(LowRank(*(context.phi_of(f) for f in pair)) for pair in self.phi.factors()))
        if context.names is None:
            return mean_linear(x, base, phi.mean, self.settings.scaling, context.groups)
        outer = context.outer
        projection = posterior_projection(
            self.posterior,
            x,
            base,
            phi,
            self.theta.factors(),
            self.settings,
            context.names,
            self.index,
            context.token_mask,
            terms="divergence" if context.kl else "none" if outer is None else "theta",
            backend=self.backend,
            groups=context.groups,
        )
        sampled, kl = context.kl_estimate == "sample", projection.kl
        named = (self.settings, context.names, self.index, context.token_mask, context.groups)
        if context.kl and sampled:  # in a recomputation too, which must keep the same tensors
            kl = kl + sampling_error(self.posterior, x, phi, self.theta.factors(), *named)
        if context.recorded is not None:  # closed while checkpointing recomputes
            if context.kl:
                context.recorded.kl[self.index] = kl
            if outer is not None:
                found = theta_gradient(
                    self.posterior,
                    x,
                    phi,
                    self.theta.factors(),
                    self.settings,
                    outer.kl,
                    outer.prior,
                    context.token_mask,
                    projection,
                    self.backend,
                    context.groups,
                )
                if sampled:
                    error = sampling_error_by_theta(self.posterior, x, phi, self.theta.factors(), *named)
                    found = _with_error(found, *error, outer.kl)
                context.recorded.theta[self.index] = found
        return projection.y

    def theta_gradient(self, weights: OuterWeights) -> ThetaGradient:
        """Theta's local gradient in the weight posterior: of the factors alone, without a forward pass."""
        factors = (self.phi.factors(), self.theta.factors())
        return theta_gradient("weight", None, *factors, self.settings, *weights, backend=self.backend)


def _with_error(found: ThetaGradient, error: Tensor, gradient: GaussianFactors, weight: float) -> ThetaGradient:
    """Theta's gradient of the closed form, plus that of the sample's error in it."""
    pairs = [
        LowRank(*(own + weight * change for own, change in zip(pair, of_error, strict=True)))
        for pair, of_error in zip(found.gradient, gradient, strict=True)
    ]
    return found._replace(gradient=GaussianFactors(*pairs), kl=found.kl + error)
