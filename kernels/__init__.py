"""Posterior projections behind one call: low-rank Gaussian posteriors, their sampling, KL and prior.

Imports torch (and triton) only; knows nothing of the rest of `abmll`.
"""

from abmll.kernels.backends import Backend, Posterior, resolve
from abmll.kernels.noise import NoiseKey, fold_seed, standard_normal
from abmll.kernels.projection import posterior_projection, theta_gradient
from abmll.kernels.reference import (
    GaussianFactors,
    LowRank,
    PosteriorSettings,
    Projection,
    ThetaGradient,
    mean_linear,
)

__all__ = [
    "Backend",
    "GaussianFactors",
    "LowRank",
    "NoiseKey",
    "Posterior",
    "PosteriorSettings",
    "Projection",
    "ThetaGradient",
    "fold_seed",
    "mean_linear",
    "posterior_projection",
    "resolve",
    "standard_normal",
    "theta_gradient",
]
