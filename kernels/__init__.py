"""Posterior projections behind one call: low-rank Gaussian posteriors, their sampling, KL and prior.

Imports torch (and triton) only; knows nothing of the rest of `abmll`.
"""

from abmll.kernels.noise import NoiseKey, fold_seed, standard_normal
from abmll.kernels.projection import posterior_projection, theta_gradient
from abmll.kernels.reference import GaussianFactors, LowRank, PosteriorSettings, ThetaGradient, mean_linear

__all__ = [
    "GaussianFactors",
    "LowRank",
    "NoiseKey",
    "PosteriorSettings",
    "ThetaGradient",
    "fold_seed",
    "mean_linear",
    "posterior_projection",
    "standard_normal",
    "theta_gradient",
]
