"""The objective: NLL of the answers, KL to the global posterior, and their weights.

inner: NLL + beta * KL;  outer: NLL + beta * KL + (beta / M) * (-log p(theta)).
Source: Zhang, Snell and Griffiths, equation 2 and algorithm 1. All terms are fp32, in nats.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

# A KL term this many times the NLL steers the step alone; beta was probably not lowered with the learning rates raised.
KL_DOMINATES = 10.0


def answer_nll(logits: Tensor, target: Tensor, reduction: Literal["sum", "mean"]) -> Tensor:
    """Negative log-likelihood of the answer tokens over the whole vocabulary: logits [B, V], target [B] -> scalar.

    beta is calibrated against the sum over examples; `mean` divides by B.
    """
    return cross_entropy(logits.float(), target, reduction=reduction)


def inner_objective(nll: Tensor, kl: Tensor, beta: float) -> Tensor:
    return nll + beta * kl


def kl_dominates(nll: float, weighted_kl: float) -> bool:
    """Whether beta * KL dwarfs the NLL (both in nats, of one batch)."""
    return weighted_kl > KL_DOMINATES * max(nll, 1e-3)


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """L2 norm over a list of tensors, a scalar on their device (no synchronisation)."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
