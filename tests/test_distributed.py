"""What ranks find out about each other before a run starts."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from abmll import distributed
from abmll.config import Refused
from abmll.distributed import Ranks, check_shared, take_gpu


class Threads(Ranks):
    """Ranks that are threads of this process."""

    meeting: threading.Barrier
    items: dict[int, object]

    def gather(self, item):
        self.items[self.rank] = item
        self.barrier()
        items = [self.items[rank] for rank in range(self.world_size)]
        self.barrier()
        return items

    def barrier(self):
        self.meeting.wait(10)


@pytest.fixture
def check(monkeypatch):
    """check_shared on two ranks with their folders; what it raised on each."""

    def check(*folders):
        monkeypatch.setattr(Threads, "meeting", threading.Barrier(2), raising=False)
        monkeypatch.setattr(Threads, "items", {}, raising=False)

        def one(rank: int) -> str:
            try:
                check_shared(folders[rank], Threads(rank, 2, torch.device("cpu")))
            except ValueError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, (0, 1)))

    monkeypatch.setattr(distributed, "VISIBLE", 0.5)
    return check


def test_one_folder_is_shared(check, tmp_path):
    assert check(tmp_path, tmp_path) == ["", ""]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", [True, False])
def test_folders_of_the_same_name_on_two_machines_are_told_apart(check, tmp_path, there):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    if there:  # and holds what an earlier run left
        theirs.mkdir()
        (theirs / ".partial-shared").write_text("another mark")
    found = check(ours, theirs)
    assert found[0] == found[1]
    assert found[0].startswith(f"output: {ours}: rank 1 on ") and found[0].endswith("a folder that all machines share")


def test_a_folder_that_is_seen_late_is_shared(check, tmp_path):
    ours, link = tmp_path / "ours", tmp_path / "link"
    ours.mkdir()

    def appear() -> None:
        time.sleep(0.2)
        link.symlink_to(ours)

    late = threading.Thread(target=appear)
    late.start()
    assert check(ours, link) == ["", ""]
    late.join()


@pytest.mark.parametrize(("visible", "shown", "taken"), [(4, "0,1,2,3", "3"), (4, None, "3"), (1, "3", "0")])
def test_a_rank_takes_its_own_gpu(visible, shown, taken, monkeypatch):
    """All GPUs are visible, or, as SLURM may bind them, the rank's own one; DeepSpeed is told by the environment."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert take_gpu(visible) == int(taken) and os.environ["LOCAL_RANK"] == taken


@pytest.mark.parametrize(("visible", "shown"), [(1, "0,1"), (1, None), (2, None), (1, "")])
def test_more_ranks_than_gpus_are_refused(visible, shown, monkeypatch):
    """As `deepspeed --num_accelerators 2` on a machine with one shows both ranks what would be two."""
    monkeypatch.setenv("LOCAL_RANK", str(visible))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    with pytest.raises(Refused, match=rf"LOCAL_RANK: {visible}: .* --num_gpus {visible},"):
        take_gpu(visible)


def test_what_deepspeed_leaves_in_shared_memory_is_removed(monkeypatch, tmp_path):
    """This rank's own, of this group: others may still be at work."""
    monkeypatch.setattr(distributed, "SHARED_MEMORY", tmp_path)
    for name, value in {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4321", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    prefix = f"deepspeed_allreduce_buffer_{os.getuid()}_10.0.0.7_"
    for name in ("4321_0", "4321_1", "4322_1"):
        (tmp_path / f"{prefix}{name}").touch()
    distributed.stop_ranks()
    assert sorted(path.name.removeprefix(prefix) for path in tmp_path.iterdir()) == ["4321_0", "4322_1"]
    distributed.stop_ranks()  # gone already


def test_old_buffers_of_killed_processes_are_removed(monkeypatch, tmp_path):
    """A young one may be of ranks that are about to open it, and another user's is none of ours."""
    monkeypatch.setattr(distributed, "SHARED_MEMORY", tmp_path)
    own, other = (f"deepspeed_allreduce_buffer_{user}_localhost_" for user in (os.getuid(), os.getuid() + 1))
    for name, minutes in ((f"{own}1_0", 30), (f"{own}2_0", 5), (f"{other}1_0", 30), ("sem.1", 30)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, 2 * (time.time() - 60 * minutes,))
    distributed._remove_old_buffers()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"{own}2_0", f"{other}1_0", "sem.1"])
