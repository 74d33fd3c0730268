"""A rank that dies or fails ends the others, and nothing else does."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from abmll.watch import FAILURE, Farewell, Watch, _accept, _keep_alive, _listen

HERE = socket.gethostname()

# A rank without a process group: what its peers have to tell goes through files. `pause` stands for a collective that
# does not notice, as on GPUs.
PROGRAM = """
import ctypes, json, os, pathlib, sys, time
from abmll import watch
watch.FAILURE = 2.0
rank, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])

def gather(item):
    (folder / f"{rank}.partial").write_text(json.dumps(item))
    (folder / f"{rank}.partial").rename(folder / f"{rank}.item")
    while len(list(folder.glob("*.item"))) < 3:
        time.sleep(0.01)
    return [json.loads((folder / f"{r}.item").read_text()) for r in range(3)]

seen = watch.start_watch(rank, gather)
print("up", flush=True)
pause = ctypes.CDLL(None).pause
try:
    exec(sys.argv[3])
except Exception as error:
    seen.leave(error)
    seen.close()
    raise
seen.leave(None)
seen.close()
print("done", flush=True)
"""


class ThreeRanks:
    """Their processes, by rank."""

    def __init__(self, folder: Path, body: str):
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(rank), str(folder), body],
                env={"MASTER_ADDR": "localhost"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(3)
        ]
        for process in self.processes:
            assert process.stdout.readline() == "up\n", process.stderr.read()

    def ends(self, *ranks: int, within: float) -> list[tuple[int, str, str]]:
        """Exit status, output and errors of these ranks."""
        deadline, found = time.monotonic() + within, []
        for rank in ranks:
            out, err = self.processes[rank].communicate(timeout=max(0.1, deadline - time.monotonic()))
            found.append((self.processes[rank].returncode, out, err))
        return found


@pytest.fixture
def ranks(tmp_path):
    started = []

    def start(body: str) -> ThreeRanks:
        started.append(ThreeRanks(tmp_path, body))
        return started[0]

    yield start
    for process in started[0].processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_those_that_wait_for_it(ranks, victim):
    three = ranks("pause()")
    three.processes[victim].kill()
    others = [rank for rank in range(3) if rank != victim]
    for rank, (status, out, err) in zip(others, three.ends(*others, within=10), strict=True):
        assert (status, out) == (1, "")
        (line,) = err.splitlines()
        assert line.startswith(f"error (rank {rank}): rank {victim} on {HERE} died (it was killed, ")


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_alone_ends_the_others(ranks, failing):
    three = ranks(f"if rank == {failing}: raise ValueError('only here')\npause()")
    others = [rank for rank in range(3) if rank != failing]
    for status, _, err in three.ends(*others, within=10):
        assert status == 1 and f": rank {failing} on {HERE} failed: ValueError: only here; " in err
    ((status, _, err),) = three.ends(failing, within=10)
    assert status == 1 and "Traceback" in err and "error (rank" not in err


def test_a_rank_that_fails_and_hangs_on_its_way_out_ends_with_its_own_error(ranks):
    three = ranks("if rank == 1: seen.leave(ValueError('only here'))\npause()")
    ((status, _, err),) = three.ends(1, within=10)
    assert status == 1 and err.startswith("ValueError: only here\n")


def test_an_error_that_a_death_caused_comes_with_its_cause(ranks):
    """The collectives of a CPU notice, and say nothing of whom they waited for."""
    three = ranks("time.sleep(1)\nif rank < 2: raise RuntimeError('connection closed')\npause()")
    three.processes[2].kill()
    for status, _, err in three.ends(0, 1, within=10):
        assert status == 1 and f"rank 2 on {HERE} died" in err


def test_an_error_that_all_ranks_have_is_each_ones_own(ranks):
    three = ranks("time.sleep(0.5 * rank)\nraise ValueError('everywhere')")
    for status, _, err in three.ends(0, 1, 2, within=10):
        assert status == 1 and err.endswith("ValueError: everywhere\n") and "error (rank" not in err


def test_ranks_that_finish_one_after_the_other_end_nobody(ranks):
    three = ranks("time.sleep(3 - rank)")
    assert three.ends(0, 1, 2, within=10) == [(0, "done\n", "")] * 3


def test_a_rank_that_stands_still_ends_nobody(ranks):
    three = ranks("time.sleep(1)")
    three.processes[1].send_signal(signal.SIGSTOP)
    assert three.ends(0, 2, within=10) == [(0, "done\n", "")] * 2
    three.processes[1].send_signal(signal.SIGCONT)
    assert three.ends(1, within=10) == [(0, "done\n", "")]


def test_the_end_comes_within_a_minute():
    """Of a failure, and of a machine that is gone: there the kernel's probes decide."""
    assert FAILURE < 45
    with _listen() as listener, socket.create_connection(("localhost", listener.getsockname()[1])) as link:
        _keep_alive(link)
        assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        if not all(hasattr(socket, name) for name in names):
            pytest.skip("this system's socket has other names for its timeouts")
        told = (link.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names)
        idle, interval, count, unconfirmed = told
        assert idle + interval * count < 45 and 0 < unconfirmed < 45_000


def two_ends() -> list[Watch]:
    ours, theirs = socket.socketpair()
    return [Watch(0, ["a", "b"], {1: ours}), Watch(1, ["a", "b"], {0: theirs})]


def test_nothing_is_left_of_a_watch():
    before = threading.active_count()
    for _ in range(20):
        for watch in (ends := two_ends()):
            watch.leave(None)
        for watch in ends:
            watch.close()
    assert threading.active_count() == before


def test_news_come_in_pieces():
    ours, theirs = socket.socketpair()
    watch = Watch(1, ["a", "b", "c"], {0: ours})
    for byte in json.dumps(Farewell(2, "ValueError: ü")).encode() + b"\n":
        theirs.send(bytes([byte]))
    assert watch._heard.wait(5) and watch._news == (2, "ValueError: ü", False)
    watch.close()


def test_strangers_are_sent_away():
    with _listen() as listener:
        address = ("localhost", listener.getsockname()[1])
        for hello in (b"GET / HTTP/1.1\r\n\r\n", b'["guess", 1]\n', b"[]\n", b"7\n"):
            stranger = socket.create_connection(address)
            stranger.sendall(hello)
        rank = socket.create_connection(address)
        rank.sendall(b'["token", 1]\nfarewell')
        links = _accept(listener, 2, "token")
    assert links[1].recv(100) == b"farewell"
    assert links.keys() == {1} and links[1].getpeername()[1] == rank.getsockname()[1]
    assert stranger.recv(1) == b""
    links[1].close()


def test_ranks_that_cannot_connect_say_so(monkeypatch):
    from abmll import watch

    monkeypatch.setattr(watch, "STARTING", 0.2)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(ConnectionError, match=r"rank 0 on \S+: the ranks do not reach each other at localhost:\d+"):
        watch.start_watch(0, lambda item: [item, item])
