"""The one-sample estimate of the KL as the closed form and its sampling error, for whichever backend makes the former.

    log q(z) - log p(z)  =  KL(q || p)  +  1/2 [ (1 - eps^2) (1 - s) + 2 eps sqrt(s) d ],    z = m_q + exp(l_q / 2) eps,
    s = exp(l_q - l_p) the ratio of variances, d = (m_q - m_p) exp(-l_p / 2) the distance in units of p's deviation

elementwise, then summed; the bracket has mean zero. The authors' published code uses this estimate, and differentiates
it through z. The noise is made again from its name, so nothing need be handed over by the projection; on a GPU it and
all that is dense are made once more in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from abmll.kernels.backends import Posterior
from abmll.kernels.groups import Groups, rows_of_groups
from abmll.kernels.noise import NoiseKey, standard_normal
from abmll.kernels.plain import flat, paired, recomputed, split
from abmll.kernels.reference import (
    GaussianFactors,
    PosteriorSettings,
    activation_statistics,
    compute_dtype,
    weight_statistics,
)


def sampling_error(
    posterior: Posterior,
    x: Tensor,
    phi: GaussianFactors,
    theta: GaussianFactors,
    settings: PosteriorSettings,
    key: NoiseKey | Tensor,
    layer: int,
    token_mask: Tensor | None = None,
    groups: Groups | None = None,
) -> Tensor:
    """What the sample named by (key, layer) adds to the KL: a number, or one for each of phi's groups [G], in nats.

    Arguments as in `posterior_projection`; theta's factors may have a group dimension too. Differentiable in x and all
    factors.
    """
    rows, sizes = rows_of_groups(x, phi.mean.a, groups)
    masks = [None] * len(sizes) if token_mask is None else split(token_mask.reshape(-1), sizes)
    thetas = theta.of_groups() if theta.grouped() else [theta] * len(sizes)
    parts = zip(split(rows, sizes), masks, phi.of_groups(), thetas, strict=True)
    found = [
        recomputed(_error, own_x, mask, (posterior, settings, key, layer, group), *flat(own), *flat(other))
        for group, (own_x, mask, own, other) in enumerate(parts)
    ]
    return torch.stack(found) if phi.grouped() else found[0]


def sampling_error_by_theta(
    posterior: Posterior,
    x: Tensor,
    phi: GaussianFactors,
    theta: GaussianFactors,
    *named: Any,
    **more: Any,
) -> tuple[Tensor, GaussianFactors]:
    """`sampling_error` of the same arguments, and its derivative by theta alone, each group's own."""
    number = len(phi.mean.a) if phi.grouped() else None
    # the graph is gone with the call: activation checkpointing around it need not keep, and count, what it saves
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
        leaves = [
            (factor.detach() if number is None else factor.detach().expand(number, *factor.shape)).clone()
            for factor in flat(theta)
        ]
        for leaf in leaves:
            leaf.requires_grad_()
        fixed = GaussianFactors.of_list([factor.detach() for factor in flat(phi)])
        error = sampling_error(posterior, x.detach(), fixed, GaussianFactors.of_list(leaves), *named, **more)
        gradients = torch.autograd.grad(error.sum(), leaves)
    return error.detach(), GaussianFactors.of_list(list(gradients))


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _error(x: Tensor, mask: Tensor | None, names: tuple, *factors: Tensor) -> Tensor:
    """One group's."""
    (posterior, settings, key, layer, group), (phi, theta) = names, paired(factors)
    outputs, dtype = phi.mean.b.shape[0], compute_dtype(x)
    if posterior == "activation":
        noise = standard_normal(len(x), outputs, key, layer, group, x.device)
        statistics = [activation_statistics(x.to(dtype), side, settings) for side in (phi, theta)]
    else:
        noise = standard_normal(outputs, x.shape[-1], key, layer, group, x.device)
        statistics = [weight_statistics(side, settings) for side in (phi, theta)]
    (mean_q, log_variance_q), (mean_p, log_variance_p) = statistics
    noise, gap = noise.to(mean_q.dtype), 0.5 * (log_variance_q - log_variance_p)
    distance = (mean_q - mean_p) * (-0.5 * log_variance_p).exp()
    error = 0.5 * (1.0 - noise.square()) * -torch.expm1(2.0 * gap) + noise * gap.exp() * distance
    return (error if mask is None else error * mask.unsqueeze(-1)).sum()
