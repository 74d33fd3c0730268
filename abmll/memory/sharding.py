"""A sharded base among fake tensors: the real `fully_shard`, over ranks that are not there.

Its hooks run as in a run, so that what is gathered, kept and freed when is PyTorch's own doing. Of the collectives only
the buffers are made. One rank is counted, the first: a tensor whose rows do not divide leaves later ones less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from abmll.memory.storages import GATHERED, StorageCounter, Uncounted
from abmll.models.sharding import shard

# its name before torch 2.12
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@contextmanager
def imagined_ranks(sharding: str, world_size: int) -> Iterator[DeviceMesh | None]:
    """A mesh of so many ranks of which this process is the first and the others are not there; None: no sharding.

    In a run, which has ranks of its own, `world_size` is their number. Enter it outside FakeTensorMode.
    """
    if sharding == "none":
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # makes the backend "fake" known

    if dist.is_initialized():
        group = dist.new_group(list(range(world_size)), backend="fake", use_local_synchronization=True)
        mesh = DeviceMesh.from_group(group, "cpu")
    else:
        group = None
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        mesh = init_device_mesh("cpu", (world_size,))
    try:
        yield mesh
    finally:
        dist.destroy_process_group(group)


def shard_counted(model: PreTrainedModel, mesh: DeviceMesh, counter: StorageCounter | Uncounted) -> None:
    """Shard the model in place; what its units gather is labelled, the parts in transit too."""
    for unit in shard(model, mesh):
        if isinstance(counter, StorageCounter):
            unit.set_custom_all_gather(_LabelledAllGather(counter))
            unit.register_forward_pre_hook(partial(_label, counter, _places(unit)))  # behind the one that gathers


def _places(unit: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where a unit's sharded parameters stand: asked before adapters are put in beside them."""
    found = ((module, name, value) for module in unit.modules() for name, value in module._parameters.items())
    return [(module, name) for module, name, value in found if isinstance(value, DTensor)]


def _label(counter: StorageCounter, places: Sequence[tuple[nn.Module, str]], *_: Any) -> None:
    found = (getattr(module, name) for module, name in places)
    counter.label(GATHERED, (value for value in found if not isinstance(value, DTensor)))


class _LabelledAllGather:
    """PyTorch's own all-gather (`torch.distributed.fsdp`'s `AllGather` protocol), its buffer labelled."""

    def __init__(self, counter: StorageCounter):
        self.counter = counter

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        buffer = torch.empty(*size, dtype=dtype, device=device)
        self.counter.label(GATHERED, [buffer])
        return buffer

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        return _gather(output_tensor, input_tensor, group=group, async_op=async_op)
