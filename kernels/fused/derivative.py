"""What both posteriors' derivatives share: which gradients are asked for, and where autograd wants them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Wanted = tuple[bool, bool, bool]


def check_once() -> None:
    """Raises where a backward pass would be differentiated itself: without it, second derivatives would be zeros."""
    if torch.is_grad_enabled():
        raise ValueError("create_graph: True: the fused kernels have no second derivatives; call `kernels.reference`")


def needs(x: bool, factors: Sequence[bool], dy: Tensor | None, dkl: Tensor | None, dprior: Tensor | None) -> Wanted:
    """Whether a backward pass must make the gradients of x, of phi's factors and of theta's.

    `factors`: which of the four or eight need one. Theta has a part in the sums alone.
    """
    sums = dkl is not None or dprior is not None
    if dy is None and not sums:
        return False, False, False
    return x, any(factors[:4]), sums and any(factors[4:])


def gradients_of_factors(
    da: Tensor | None, db: Tensor | None, factors: Sequence[Tensor], wanted: Wanted
) -> list[Tensor | None]:
    """The factors' gradients, one each, from those of the pairs that were wanted; theta's summed over the groups that
    share it.
    """
    found: list[Tensor | None] = [None] * len(factors)
    _, phi, theta = wanted
    if phi or theta:
        a, b = da.unbind(), db.unbind()
        if phi:
            found[:4] = a[0], b[0], a[1], b[1]
        if theta:
            parts = a[-2], b[-2], a[-1], b[-1]
            found[4:] = [part.sum(dim=0) if part.dim() == 3 else part for part in parts]
    return found
