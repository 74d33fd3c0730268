"""The ranks of a run: start, device, and the two exchanges that training needs."""

from __future__ import annotations

import faulthandler
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from abmll.config.errors import Refused
from abmll.files import TEMPORARY
from abmll.interrupt import Interrupted
from abmll.op_lock import load_cpu_operation
from abmll.ports import free_port
from abmll.resident import bound_caches
from abmll.slurm import adopt_slurm
from abmll.watch import Watch, start_watch

# Ranks meet only at the end of an evaluation, and their tasks differ in size: DeepSpeed's 10 minutes are too short.
# (Nobody waits so long for a rank that died: see abmll.watch.)
PATIENCE = timedelta(hours=2)
# Seconds for all ranks to find each other: until then nobody sees that one of them died
JOINING, MARGIN = 600.0, 5.0
# Seconds for a file to be seen on another machine: NFS remembers for 30 that a folder was not there.
VISIBLE = 45.0
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Ranks:
    """This process's place. Of items that need no balance (see `abmll.dealing`) rank r owns those with
    index % world_size == r.
    """

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
_watch: Watch | None = None


def local_ranks() -> int:
    """Ranks on this machine, as the launcher tells; one without a launcher."""
    told = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    return int(next((os.environ[name] for name in told if os.environ.get(name)), 1))


def start_ranks() -> Ranks:
    """Join the process group that `deepspeed`, `torchrun` or `srun` prepared; alone without one (plain `python`)."""
    global _watch
    adopt_slurm()
    if "RANK" not in os.environ:
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        os.environ.update({key: str(value) for key, value in alone.items()})
        _set_here.extend(alone)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        device = torch.device("cuda", take_gpu(torch.cuda.device_count()))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        bound_caches()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(
                max(1, (os.cpu_count() or 1) // local_ranks())
            )  # ranks of one machine share its cores
        load_cpu_operation()
        _remove_old_buffers()
    with _joining(JOINING):
        deepspeed.init_distributed("nccl" if on_gpu else "gloo", timeout=PATIENCE, verbose=False)
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), device)
        if ranks.world_size > 1:
            _watch = start_watch(ranks.rank, ranks.gather)
    _remove_buffer()  # all ranks hold it open now: a killed one leaves nothing
    return ranks


@contextmanager
def _joining(seconds: float) -> Iterator[None]:
    """End this process where that takes longer: it waits for a rank that may have died at its start."""

    def end() -> None:
        rank, number = os.environ["RANK"], os.environ["WORLD_SIZE"]
        print(
            f"error (rank {rank}): the {number} ranks did not find each other within {seconds:.0f} s; look at what the "
            "others said, and start all of them again",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    if int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    # DeepSpeed's operation waits for the others' buffers without letting any Python thread run: this one is none
    faulthandler.dump_traceback_later(seconds + MARGIN, exit=True)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def take_gpu(visible: int) -> int:
    """This rank's GPU among those that it sees: SLURM, or a script of the user's, may show each rank its own one only.

    LOCAL_RANK says so too from here on: DeepSpeed takes its device by it, however many there are. Refused where the
    machine has fewer GPUs than ranks.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible == 1 and shown and "," not in shown:
        os.environ["LOCAL_RANK"] = "0"
    rank = int(os.environ["LOCAL_RANK"])
    if rank >= visible:
        raise Refused(
            f"LOCAL_RANK: {rank}: more ranks were started than the {visible} GPU{'s' if visible > 1 else ''} here: "
            f"start one a GPU (deepspeed --num_gpus {visible}, torchrun --nproc-per-node {visible}), or hide the GPUs "
            "for ranks on CPU (CUDA_VISIBLE_DEVICES=)"
        )
    return rank


def stop_ranks(error: BaseException | None = None) -> None:
    """Leave the process group, so that the process can join another one. `error`: what this rank stops for."""
    global _watch
    if _watch:
        _watch.leave(error)
    try:
        if dist.is_initialized():
            deepspeed.comm.destroy_process_group()  # torch's own would leave DeepSpeed with groups that are gone
    finally:
        if _watch:
            _watch.close()  # not before: leaving the group may have to wait for a rank that is no longer there
            _watch = None
    _remove_buffer()
    deepspeed.comm.comm.cdb = None
    while _set_here:
        os.environ.pop(_set_here.pop(), None)


def _remove_buffer() -> None:
    """The 66 MB of shared memory that DeepSpeed's operation for CPU ranks makes for this one, and leaves behind."""
    told = (os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    name = "_".join(map(str, ("deepspeed_allreduce_buffer", os.getuid(), *told)))
    (SHARED_MEMORY / name).unlink(missing_ok=True)


def _remove_old_buffers() -> None:
    """Those of processes that were killed while they joined. Nobody opens one by its name that is as old as this."""
    for path in SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*"):
        with suppress(FileNotFoundError):  # another rank was faster
            if time.time() - path.stat().st_mtime > 2 * JOINING:
                path.unlink()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The process group for as long as a command takes; the other ranks are told if it fails."""
    ranks = start_ranks()
    try:
        yield ranks
    except BaseException as error:
        stop_ranks(None if isinstance(error, Interrupted) else error)  # that one all ranks raise, in agreement
        raise
    stop_ranks()


def check_shared(folder: Path, ranks: Ranks) -> None:
    """ValueError, on all ranks, where one of them does not see what the main one writes to the (existing) folder."""
    if ranks.world_size == 1:
        return
    main_folder, mark = ranks.from_main((str(folder), secrets.token_hex(8)))
    file = folder / f"{TEMPORARY}shared"
    if ranks.is_main:
        file.write_text(mark)
    ranks.barrier()
    seen = ranks.gather((socket.gethostname(), _appears(file, mark)))
    if ranks.is_main:
        file.unlink()
    blind = [f"rank {rank} on {host}" for rank, (host, sees) in enumerate(seen) if not sees]
    if blind:
        raise ValueError(
            f"output: {main_folder}: {', '.join(blind)} cannot read what rank 0 on {seen[0][0]} writes there; name a "
            "folder that all machines share"
        )


def _appears(file: Path, text: str) -> bool:
    deadline = time.monotonic() + VISIBLE
    while not (file.is_file() and file.read_text() == text):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
