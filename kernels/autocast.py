"""What autocast means here: x and the frozen layer take its dtype, and the low-rank arithmetic does not see it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from abmll.kernels.reference import FrozenLinear


def autocast_inputs(x: Tensor, base: FrozenLinear | Tensor) -> tuple[Tensor, FrozenLinear | Tensor]:
    """x and base (a layer, or its product) in the dtype that an autocast around the call asks for."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype == torch.float64:
        return x, base
    dtype = torch.get_autocast_dtype(kind)
    if isinstance(base, Tensor):
        return x.to(dtype), base.to(dtype)
    return x.to(dtype), FrozenLinear(base.weight.to(dtype), None if base.bias is None else base.bias.to(dtype))


def without_autocast(kind: str) -> AbstractContextManager:
    """Within, products on this kind of device run in their operands' dtype; costs nothing where they do anyway."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
