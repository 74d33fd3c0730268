"""The operators' arguments as the launches take them, and their results as the operators return them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abmll.kernels.fused.launch import Pairs, rows_contiguous


def pairs_of(factors: Sequence[Tensor]) -> Pairs:
    """Phi's factors with a group dimension, which they may lack, and theta's."""
    if factors[0].dim() == 3:
        return Pairs.of(*factors)
    return Pairs.of(*(factor.unsqueeze(0) for factor in factors[:4]), *factors[4:])


def rows_of(x: Tensor, groups: int) -> Tensor:
    """x [..., K] as [G, T, K], with unit stride along the last."""
    return rows_contiguous(x if x.dim() == 3 and len(x) == groups else x.reshape(groups, -1, x.shape[-1]))


def mask_bytes(mask: Tensor | None, groups: int) -> Tensor | None:
    """[G, T] as bytes."""
    return None if mask is None else rows_contiguous(mask.reshape(groups, -1)).view(torch.uint8)


def like_factors(da: Tensor, db: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """da [pairs, G, r, K] and db [pairs, G, N, r], without a group dimension where phi has none."""
    return (da, db) if factors[0].dim() == 3 else (da.squeeze(1), db.squeeze(1))


def gradients_of_sums(dkl: Tensor | None, dprior: Tensor | None) -> Tensor | None:
    """[2], zero for what is None; None for two."""
    there = dprior if dkl is None else dkl
    if there is None:
        return None
    zero = there.new_zeros(()) if dkl is None or dprior is None else None
    return torch.stack([zero if dkl is None else dkl, zero if dprior is None else dprior])


def separate(sums: Tensor) -> tuple[Tensor, Tensor]:
    """[KL, -log prior] as two numbers in memory of their own; twice nothing if there are none."""
    return (sums[0].clone(), sums[1].clone()) if sums.numel() else (sums, sums.clone())
