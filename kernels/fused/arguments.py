"""An operator's arguments as the launches take them, and their results as the operator gives them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abmll.kernels.fused.launch import Factors, Stretches, Sums, rows_contiguous


def groups_of(factors: Sequence[Tensor]) -> int:
    """Phi's groups: one where its factors have no dimension for them."""
    return factors[0].shape[0] if factors[0].dim() == 3 else 1


def lead_of(factors: Sequence[Tensor]) -> tuple[int, ...]:
    """(G,) where phi's factors have a dimension for groups: the shape of what each group has of its own."""
    return tuple(factors[0].shape[:-2])


def factors_of(factors: Sequence[Tensor]) -> tuple[Factors, Factors]:
    """All pairs' a and b, from mean a, b, log-variance a, b of phi and of theta (or not)."""
    factors, lead = [factor.contiguous() for factor in factors], lead_of(factors)
    rank = factors[0].shape[-2]
    return Factors(factors[0::2], rank, lead), Factors(factors[1::2], rank, lead)


def stretches_of(x: Tensor, factors: Sequence[Tensor], sizes: Sequence[int] | None, bounds: Tensor | None) -> Stretches:
    """Which rows of x [..., K] are whose."""
    return Stretches.of(x.shape[:-1].numel(), groups_of(factors), sizes, bounds)


def rows_of(x: Tensor) -> Tensor:
    """[..., K] as it is where its rows lie evenly apart in memory, else [T, K]; rows contiguous."""
    shape, strides = x.shape, x.stride()
    for d in range(len(shape) - 2):
        if shape[d] != 1 and strides[d] != shape[d + 1] * strides[d + 1]:
            return rows_contiguous(x.reshape(-1, shape[-1]))
    return rows_contiguous(x)


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """One after another."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def new_sums(wanted: bool, factors: Sequence[Tensor], device: torch.device) -> Sums | None:
    """Each group's, for launches to write to."""
    return Sums.new(lead_of(factors), device) if wanted else None


def separate(sums: Sums | None, near: Tensor) -> Sums:
    """The two sums; empty where there are none."""
    return Sums.new((0,), near.device) if sums is None else sums


def shaped(rows: Tensor, lead: Sequence[int]) -> Tensor:
    """[T, K] as [*lead, K]."""
    return rows if rows.shape[:-1] == lead else rows.view(*lead, rows.shape[-1])


def number(value: float, near: Tensor) -> Tensor:
    """An fp32 number on the device, without a copy that waits for it."""
    return torch.full((), value, dtype=torch.float32, device=near.device)
