"""The call that an adapted layer makes: which posterior, which noise, and (once there are several) which backend."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from abmll.kernels.noise import NoiseKey, standard_normal
from abmll.kernels.reference import (
    GaussianFactors,
    PosteriorSettings,
    ThetaGradient,
    activation_linear,
    activation_theta_gradient,
    weight_linear,
    weight_theta_gradient,
)

Posterior = Literal["activation", "weight"]


def posterior_projection(
    posterior: Posterior,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    phi: GaussianFactors,
    theta: GaussianFactors,
    settings: PosteriorSettings,
    key: NoiseKey,
    layer: int,
    token_mask: Tensor | None = None,
    with_kl: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """A sampled projection y [..., N] of x [..., K] and KL(q_phi || p_theta), a scalar in at least fp32.

    weight [N, K]; factors as in `reference`; token_mask as x without its last dimension. The noise is named by
    (key, layer) alone, so that a recomputed forward pass draws it again. Differentiable in x and all factors. Without
    `with_kl` theta is not read and the KL is None.
    """
    _check(x, weight, phi)
    tokens = x.shape[:-1].numel()
    if posterior == "activation":
        noise = standard_normal(tokens, weight.shape[0], key, layer, device=x.device)
        noise = noise.view(*x.shape[:-1], weight.shape[0])
        return activation_linear(x, weight, bias, phi, theta if with_kl else None, settings, noise, token_mask)
    noise = standard_normal(*weight.shape, key, layer, device=x.device)
    return weight_linear(x, weight, bias, phi, theta if with_kl else None, settings, noise)


def theta_gradient(
    posterior: Posterior,
    x: Tensor,
    phi: GaussianFactors,
    theta: GaussianFactors,
    settings: PosteriorSettings,
    kl_weight: float,
    prior_weight: float,
    token_mask: Tensor | None = None,
) -> ThetaGradient:
    """Theta's whole gradient under `meta_gradient: kl`, from the layer's input and its factors, without a graph."""
    with torch.no_grad():
        if posterior == "activation":
            return activation_theta_gradient(x, phi, theta, settings, token_mask, kl_weight, prior_weight)
        return weight_theta_gradient(phi, theta, settings, kl_weight, prior_weight)


def _check(x: Tensor, weight: Tensor, phi: GaussianFactors) -> None:
    rows, columns = weight.shape
    if x.shape[-1] != columns:
        raise ValueError(f"x: shape {tuple(x.shape)}: the last dimension must be the weight's {columns} columns")
    for name, pair in zip(phi._fields, phi, strict=True):
        if pair.a.shape[-1] != columns or pair.b.shape[-2] != rows or pair.a.shape[-2] != pair.b.shape[-1]:
            raise ValueError(
                f"{name}: a {tuple(pair.a.shape)}, b {tuple(pair.b.shape)}: for a weight {rows} x {columns} they must "
                f"be [r, {columns}] and [{rows}, r]"
            )
