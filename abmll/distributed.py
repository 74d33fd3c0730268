"""The ranks of a run: start, device, and the two exchanges that training needs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from abmll.resident import bound_caches

# Ranks meet only at the end of an evaluation, and their tasks differ in size: DeepSpeed's 10 minutes are too short.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process's place. Items are dealt round robin: rank r owns the indices with index % world_size == r."""

    rank: int
    world_size: int
    device: torch.device
    before_exchange: Callable[[], None] = lambda: None  # where the base is sharded, see `abmll.lockstep`

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def owns(self, index: int) -> bool:
        return index % self.world_size == self.rank

    def sum_table(self, table: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over ranks of a small table; every rank gets the result, on the CPU."""
        self.before_exchange()
        table = table.to(self.device)
        dist.all_reduce(table)
        return table.cpu()

    def gather(self, item: Any) -> list[Any]:
        """Every rank's picklable item, in the order of ranks, on every rank."""
        self.before_exchange()
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items

    def from_main(self, item: Any) -> Any:
        """The main rank's picklable item, on every rank."""
        return self.gather(item)[0]

    def barrier(self) -> None:
        self.before_exchange()
        dist.barrier()


_set_here: list[str] = []  # names of environment variables


def local_ranks() -> int:
    """Ranks on this machine, as the launcher tells; one without a launcher."""
    told = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    return int(next((os.environ[name] for name in told if os.environ.get(name)), 1))


def start_ranks() -> Ranks:
    """Join the process group that `deepspeed` or `torchrun` prepared; alone without one (plain `python`)."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in alone.items()})
        _set_here.extend(alone)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        bound_caches()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(
                max(1, (os.cpu_count() or 1) // local_ranks())
            )  # ranks of one machine share its cores
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", timeout=PATIENCE, verbose=False)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def stop_ranks() -> None:
    """Leave the process group, so that the process can join another one."""
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()  # torch's own would leave DeepSpeed with groups that are gone
    deepspeed.comm.comm.cdb = None
    while _set_here:
        os.environ.pop(_set_here.pop(), None)
