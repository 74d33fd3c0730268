"""An operator's arguments as the launches take them, and their results as the operator gives them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abmll.kernels.fused.launch import Factors, Sums, rows_contiguous


def groups_of(factors: Sequence[Tensor]) -> int:
    """Phi's groups: one where its factors have no dimension for them."""
    return factors[0].shape[0] if factors[0].dim() == 3 else 1


def factors_of(factors: Sequence[Tensor]) -> tuple[Factors, Factors, int]:
    """All pairs' a and b, and the number of groups; from mean a, b, log-variance a, b of phi and of theta (or not)."""
    factors = [factor if factor.is_contiguous() else factor.contiguous() for factor in factors]
    rank = factors[0].shape[-2]
    return Factors(factors[0::2], rank), Factors(factors[1::2], rank), groups_of(factors)


def rows_of(x: Tensor, groups: int) -> Tensor:
    """[G, T, K] of [..., K], rows contiguous."""
    return rows_contiguous(x.reshape(groups, x.shape[:-1].numel() // groups, x.shape[-1]))


def mask_bytes(mask: Tensor | None, groups: int) -> Tensor | None:
    """[G, T] as bytes."""
    if mask is None:
        return None
    return rows_contiguous(mask.reshape(groups, mask.numel() // groups)).view(torch.uint8)


def separate(sums: Sums | None, near: Tensor) -> Sums:
    """The two sums; empty where there are none."""
    return Sums(*(near.new_empty(0, dtype=torch.float32) for _ in range(2))) if sums is None else sums


def like_factors(gradient: Tensor, factor: Tensor) -> Tensor:
    """[pairs, G, ...] without G where phi's factors have none."""
    return gradient if factor.dim() == 3 else gradient.view(gradient.shape[0], *factor.shape)


def number(value: float, near: Tensor) -> Tensor:
    """An fp32 number on the device, without a copy that waits for it."""
    return torch.full((), value, dtype=torch.float32, device=near.device)
