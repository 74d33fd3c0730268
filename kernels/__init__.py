"""Posterior projections behind one call: low-rank Gaussian posteriors, their sampling, KL and prior.

Imports torch (and triton) only; knows nothing of the rest of `abmll`.
"""

from abmll.kernels.backends import Backend, Posterior, assume_gpu, on_gpu, resolve
from abmll.kernels.groups import Groups
from abmll.kernels.noise import NoiseKey, fold_seed, rows_of_keys, standard_normal
from abmll.kernels.projection import mean_linear, posterior_projection, theta_gradient
from abmll.kernels.reference import (
    FrozenLinear,
    GaussianFactors,
    LowRank,
    PosteriorSettings,
    Projection,
    ThetaGradient,
)
from abmll.kernels.sampled import sampling_error, sampling_error_by_theta

__all__ = [
    "Backend",
    "FrozenLinear",
    "GaussianFactors",
    "Groups",
    "LowRank",
    "NoiseKey",
    "Posterior",
    "PosteriorSettings",
    "Projection",
    "ThetaGradient",
    "assume_gpu",
    "fold_seed",
    "mean_linear",
    "on_gpu",
    "posterior_projection",
    "resolve",
    "rows_of_keys",
    "sampling_error",
    "sampling_error_by_theta",
    "standard_normal",
    "theta_gradient",
]
