"""What every contender of the kernel benchmark is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Contender(NamedTuple):
    """`forward` returns y, and for a posterior its KL and -log prior; the first outputs have `cotangents`, and their
    gradients by `sources` are the backward pass. `outer`: the outer step, or the like. `not_captured`: why it has no
    CUDA graph.
    """

    forward: Callable[[], tuple[Tensor, ...]]
    sources: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]
    outer: Callable[[], object] | None = None
    not_captured: str | None = None

    def gradients(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs[: len(self.cotangents)], self.sources, self.cotangents)


class NotRun(Exception):
    """Why a contender has no row."""
