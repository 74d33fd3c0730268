"""Fake tensors that stand for a run's device: shapes, dtypes and lifetimes, no numbers.

They live on the device `cpu`, whatever they stand for, because a CPU build of PyTorch has no guard for CUDA devices.
What code does differently on a GPU it is told here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from abmll.kernels import closed_form, noise
from abmll.kernels.backends import assume_gpu
from abmll.memory.storages import StorageCounter

CUDA_GRANULARITY = 512  # bytes to which the CUDA allocator rounds


def _first(number: int, chunks: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    return lambda *arguments: islice(chunks(*arguments), number)


@contextmanager
def counted(gpu: bool) -> Iterator[StorageCounter]:
    """All tensors made inside are fake and counted, as on a GPU (or a CPU); yields the counter."""
    with ExitStack() as stack:
        bodies = {}
        # transformers reads one bool back from the device, which fake tensors refuse: no sequences are packed here
        stack.enter_context(patch("transformers.masking_utils.find_packed_sequence_indices", lambda _: None))
        # every stretch of noise takes what the first does, one after the other; every chunk of a projection from the
        # second on, when what the one before made is still there
        stack.enter_context(patch.object(noise, "chunks", _first(1, noise.chunks)))
        stack.enter_context(patch.object(closed_form, "chunks", _first(2, closed_form.chunks)))
        if gpu:
            stack.enter_context(assume_gpu())
            if importlib.util.find_spec("triton") is not None:  # else the kernels cannot run, and plain code is counted
                from abmll.kernels.fused.dry_run import BODIES, dry_launches

                stack.enter_context(dry_launches())
                bodies = BODIES
        counter = StorageCounter(CUDA_GRANULARITY if gpu else 1, bodies)
        stack.enter_context(FakeTensorMode())
        yield stack.enter_context(counter.counting())


def as_on_gpu(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer with the code path that it takes for CUDA parameters: all of them at once."""
    for group in optimizer.param_groups:
        group["foreach"] = True
    return optimizer
