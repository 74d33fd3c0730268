"""What theta's DeepSpeed engine takes of a device's memory: the same tensors, in the same order, without the engine.

A test holds it to the engine itself, on one rank, at ZeRO stages 0 and 2. With N ranks a stage above 0 keeps a Nth of
theta's moments; stage 2 keeps a Nth of its gradient beside the bucket that is being reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from abmll.memory.storages import ADAPTERS, ENGINE, STATES, StorageCounter, Uncounted

DEFAULT_BUCKET = 5e8  # DeepSpeed's own, in elements


class CountedEngine:
    """Stands for `abmll.engine.ThetaEngine` among fake tensors: `step` allocates and frees as that does."""

    def __init__(
        self,
        theta: dict[str, nn.Parameter],
        build_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        settings: dict[str, Any],
        world_size: int,
        counter: StorageCounter | Uncounted,
    ):
        zero = settings.get("zero_optimization", {})
        self.theta, self.counter = theta, counter
        self.stage = zero.get("stage", 0)
        size = sum(parameter.numel() for parameter in theta.values())
        self.shard = -(-size // world_size) if self.stage else size
        buckets = 2 if zero.get("overlap_comm") else 1
        self.bucket = buckets * int(zero.get("reduce_bucket_size", DEFAULT_BUCKET)) if self.stage else 0
        parameters: Iterable[nn.Parameter] = theta.values()
        if self.stage:
            parameters = [nn.Parameter(self._flat(world_size)[: self.shard])]  # this rank's part, its own master
        self.optimizer = build_optimizer(parameters)

    def _flat(self, world_size: int) -> Tensor:
        """Theta in one tensor, into which its parameters become views."""
        padding = self.shard * world_size - sum(parameter.numel() for parameter in self.theta.values())
        pieces = [parameter.detach().flatten() for parameter in self.theta.values()]
        flat = torch.cat([*pieces, pieces[0].new_zeros(padding)])
        self.counter.label(ADAPTERS, [flat])
        offset = 0
        for parameter in self.theta.values():
            parameter.data = flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        return flat

    def step(self, gradient: dict[str, Tensor]) -> None:
        handed_over = [1.0 * value for value in gradient.values()]
        if self.stage:
            self._sharded(handed_over)
        else:
            self._whole(handed_over)
        self.counter.label(STATES, (t for state in self.optimizer.state.values() for t in state.values()))

    def _sharded(self, gradients: list[Tensor]) -> None:
        bucket = gradients[0].new_empty(self.bucket)
        self.counter.label(ENGINE, [bucket])
        device = gradients[0].device
        gradients.clear()  # into the bucket, one after the other
        own = torch.empty(self.shard, device=device)
        del bucket
        (master,) = self.optimizer.param_groups[0]["params"]
        master.grad = torch.cat([own])
        del own
        self.optimizer.step()
        master.grad = None

    def _whole(self, gradients: list[Tensor]) -> None:
        flat = torch.cat([gradient.flatten() for gradient in gradients])  # the ranks' average
        del flat
        for parameter, gradient in zip(self.theta.values(), gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        for parameter in self.theta.values():
            parameter.grad = None
