"""Two real ranks without a launcher, which would end one when the other dies: as on two machines."""

from __future__ import annotations

import signal
import socket
import time

import pytest
import torch
from forked import Command, Start
from runs import Run

from abmll.ports import free_port

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="NCCL takes one rank a GPU; for the CPU set CUDA_VISIBLE_DEVICES="
    ),
]


STARTED = 500  # seconds; the very first start compiles DeepSpeed's operation


@pytest.fixture
def two_ranks(run: Run, start: Start):
    """Start the command on two ranks; `only_second` are the second's own arguments."""
    port = str(free_port())

    def start_both(*arguments: str, only_second: tuple[str, ...] = ()) -> list[Command]:
        started = []
        for rank in (0, 1):
            group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
            group |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            started.append(start(run.command(*arguments, *(only_second if rank else ())), group))
        return started

    return start_both


def trains(run: Run, process: Command) -> None:
    """Wait until steps are made."""
    path, deadline = run.folder / "metrics.jsonl", time.monotonic() + STARTED
    while not path.exists() or path.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.said
        time.sleep(0.05)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_at_once(run, two_ranks, victim):
    """It is stopped first, so that the other waits for it in the average over theta's gradient."""
    processes = two_ranks("trainer.episodes=100000", "trainer.checkpoint_every=1")
    trains(run, processes[0])
    processes[victim].send_signal(signal.SIGSTOP)
    time.sleep(2)
    other = processes[1 - victim]
    assert other.poll() is None  # a slow rank ends nobody
    processes[victim].kill()
    killed = time.monotonic()
    status = other.wait(30)
    print(f"{time.monotonic() - killed:.1f} s")
    assert status not in (0, -signal.SIGKILL)
    assert f"error (rank {1 - victim}): rank {victim} on {socket.gethostname()} died" in other.said


def test_a_mistake_on_one_rank_alone_ends_both(two_ranks):
    first, second = two_ranks(only_second=("trainer.deepspeed=nowhere.json",))
    assert second.wait(STARTED) == 2 and "error (rank 1): trainer.deepspeed: " in second.said
    assert first.wait(STARTED) != 0
    assert f"error (rank 0): rank 1 on {socket.gethostname()} failed: Refused: trainer.deepspeed: " in first.said


def test_divergence_is_told_as_such(two_ranks):
    for process in two_ranks("method.inner_lr=1e30", "trainer.episodes=20", "trainer.max_nonfinite=2"):
        assert process.wait(STARTED) == 1
        assert "error: 2 episodes in a row gave NaN or Inf" in process.said and "error (rank" not in process.said
