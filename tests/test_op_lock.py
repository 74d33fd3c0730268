"""A process that is killed while it loads DeepSpeed's operation blocks no other; no rank waits for ever for a peer."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

import pytest

from abmll import distributed
from abmll.op_lock import OURS, TORCHS, loading

DIES = f"""
import os, signal, sys
from pathlib import Path
from abmll.op_lock import loading
with loading(Path(sys.argv[1])):
    (Path(sys.argv[1]) / {TORCHS!r}).touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_loader_leaves_no_lock(tmp_path):
    assert subprocess.run([sys.executable, "-c", DIES, str(tmp_path)]).returncode == -signal.SIGKILL
    assert (tmp_path / TORCHS).exists()
    with loading(tmp_path):
        assert not (tmp_path / TORCHS).exists()
        assert (tmp_path / OURS).read_text()  # for the one behind, should this one die too
    assert not (tmp_path / OURS).read_text()


def test_another_programs_lock_is_its_own(tmp_path):
    (tmp_path / TORCHS).touch()
    with pytest.raises(ZeroDivisionError), loading(tmp_path):
        assert (tmp_path / TORCHS).exists()
        raise ZeroDivisionError  # an error is no death
    with loading(tmp_path):
        assert (tmp_path / TORCHS).exists()


@pytest.mark.parametrize("wait", [time.sleep, ctypes.PyDLL(None).sleep], ids=["", "holding Python's lock"])
def test_ranks_that_do_not_meet_end(monkeypatch, wait):
    monkeypatch.setattr(distributed, "MARGIN", 0.5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    started, pid = time.monotonic(), os.fork()
    if pid == 0:
        with distributed._joining(0.3):
            wait(60)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert time.monotonic() - started < 30


def test_ranks_that_meet_are_left_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with distributed._joining(0.2):
        pass
    time.sleep(0.4)
