"""Rows of several groups in one matrix: episodes (or samples) side by side, each with factors and noise of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """How the rows of a matrix [T, K] belong to G groups: the first sizes[0] to group 0, and so on.

    sizes: rows of each group, known to the host, which plans launches by them; bounds: int32 [G + 1] on the matrix's
    device, where each group begins and the last ends, for kernels to read.
    """

    sizes: tuple[int, ...]
    bounds: Tensor

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device | str) -> Groups:
        """ValueError where a group is empty or there is none."""
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes: {tuple(sizes)}: at least one group, and every group has at least one row")
        bounds = torch.tensor(list(accumulate(sizes, initial=0)), dtype=torch.int32, device="cpu")
        if torch.device(device).type == "cuda" and not torch.compiler.is_compiling():  # which has no pinned tensors
            bounds = bounds.pin_memory()  # a copy from pageable memory waits for the GPU
        return cls(tuple(sizes), bounds.to(device, non_blocking=True))

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        return sum(self.sizes)


def rows_of_groups(x: Tensor, factor: Tensor, groups: Groups | None) -> tuple[Tensor, Sequence[int]]:
    """x as [T, K], and the rows of each of the groups that the factor ([r, K], or [G, r, K]) has."""
    rows, number = x.reshape(-1, x.shape[-1]), factor.shape[0] if factor.dim() == 3 else 1
    return rows, groups.sizes if groups is not None else (len(rows) // number,) * number
