"""The objective: NLL of the answers, KL to the global posterior, and their weights.

inner: NLL + beta * KL;  outer: NLL + beta * KL + (beta / M) * (-log p(theta)).
Source: Zhang, Snell and Griffiths, equation 2 and algorithm 1. All terms are fp32, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

# A KL term this many times the NLL steers the step alone; beta was probably not lowered with the learning rates raised.
KL_DOMINATES = 10.0


def answer_nll(
    logits: Tensor, target: Tensor, reduction: Literal["sum", "mean"], group_prompts: Sequence[int]
) -> Tensor:
    """Negative log-likelihood of the answer tokens over the whole vocabulary: logits [S, V], target [S] -> [G].

    Over each group's own prompts, of which there are `group_prompts`, one group's after another's. beta is calibrated
    against the sum over prompts; `mean` divides by their number.
    """
    of_prompts = cross_entropy(logits.float(), target, reduction="none")
    own = of_prompts.split(list(group_prompts))
    return torch.stack([part.sum() if reduction == "sum" else part.mean() for part in own])


def inner_objective(nll: Tensor, kl: Tensor, beta: float) -> Tensor:
    """Of all groups [G]: the sum, whose derivative in a group's phi is that of the group's own objective.

    Without beta the KL has no part in it: 0 times one that overflowed would be NaN.
    """
    return (nll + beta * kl).sum() if beta else nll.sum()


def kl_dominates(nll: float, weighted_kl: float) -> bool:
    """Whether beta * KL dwarfs the NLL (both in nats, of one batch)."""
    return weighted_kl > KL_DOMINATES * max(nll, 1e-3)


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm of each group's gradients, [G] on their device (no synchronisation), from tensors [G, ...]."""
    of_groups = [part for gradient in gradients for part in gradient.unbind()]
    norms = torch.stack(torch._foreach_norm(of_groups)).view(len(gradients), -1)
    return torch.linalg.vector_norm(norms, dim=0)
