"""What flash attention takes of a GPU's memory, for counting where there is none.

Follows PyTorch's own flash attention (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, `mha_fwd` and
`mha_bwd`), which flash-attn's operators share. Forward: the output, and the logarithm of each row's sum; both are kept,
beside q, k and v. Backward: a fp32 accumulator of dq, one number a row, and, where several query heads share a
key-value head, dk and dv of every query head before they are summed. No tensor has tokens x tokens elements.

In fp32 a GPU has no flash attention: its memory-efficient one keeps the same tensors, but takes no shared key-value
heads, for which PyTorch falls back to plain code: there eager code is counted. A sliding window shorter than the prompt
is counted as flash-attn has it, without the mask that SDPA would need.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from abmll.models import packing

_ROWS = 128  # both sides of a tile, to which lengths are rounded up
_WIDTH = 32


class _FlashAttention(torch.autograd.Function):
    """q [B, H, T, D], k and v [B, Hkv, T, D] -> [B, T, H, D]: the allocations alone."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, width = query.shape
        output = query.new_empty(batch, tokens, heads, width)
        sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        batch, heads, tokens, width = query.shape
        rows, columns = -(-tokens // _ROWS) * _ROWS, -(-width // _WIDTH) * _WIDTH
        gradients = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        scratch = [
            query.new_empty(batch, heads, rows, dtype=torch.float32),
            query.new_empty(batch, rows, heads, columns, dtype=torch.float32),
        ]
        if key.shape[1] != heads:
            scratch += [query.new_empty(batch, tokens, heads, width) for _ in (key, value)]
        return gradients


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _FlashAttention.apply(query, key, value), None


def register() -> str:
    """Make it known to transformers, for packed prompts; returns its name."""
    return packing.register("counted", _attention)
