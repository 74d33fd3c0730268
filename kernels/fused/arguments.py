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
    factors = [factor.contiguous() for factor in factors]
    first = factors[0]
    rank = first.shape[-2]
    return Factors(factors[0::2], rank), Factors(factors[1::2], rank), first.shape[0] if first.dim() == 3 else 1


def rows_of(x: Tensor, groups: int) -> Tensor:
    """[G, T, K] of [..., K], rows contiguous."""
    if x.dim() != 3 or x.shape[0] != groups:
        x = x.reshape(groups, x.shape[:-1].numel() // groups, x.shape[-1])
    return rows_contiguous(x)


def mask_bytes(mask: Tensor | None, groups: int) -> Tensor | None:
    """[G, T] as bytes."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[0] != groups:
        mask = mask.reshape(groups, mask.numel() // groups)
    return rows_contiguous(mask).view(torch.uint8)


def separate(sums: Sums | None, near: Tensor) -> Sums:
    """The two sums; empty where there are none."""
    return Sums(*(near.new_empty(0, dtype=torch.float32) for _ in range(2))) if sums is None else sums


def shaped(rows: Tensor, lead: Sequence[int]) -> Tensor:
    """[G, T, K] as [*lead, K]."""
    return rows if rows.shape[:-1] == lead else rows.view(*lead, rows.shape[-1])


def number(value: float, near: Tensor) -> Tensor:
    """An fp32 number on the device, without a copy that waits for it."""
    return torch.full((), value, dtype=torch.float32, device=near.device)
