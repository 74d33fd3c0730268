"""A command that is forked does what it does in an interpreter of its own."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from abmll.compare.commands import Commands, Fork, usable_cores

# says what a script can see of how it was started, and is killed, fails or waits as it is told
SCRIPT = """
import atexit, fcntl, json, os, signal, sys, time
import torch
print("read by people")
print("and so is this", file=sys.stderr)
atexit.register(print, "at the end")
if __name__ == "__main__":
    seen = {"argv": sys.argv, "environment": dict(os.environ), "threads": torch.get_num_threads(),
            "leads": os.getsid(0) == os.getpid(), "cwd": os.getcwd(),
            "warm": "abmll.run" in sys.modules, "sigint": str(signal.getsignal(signal.SIGINT))}
    with open(sys.argv[1], "w") as file:
        json.dump(seen, file)
    end = sys.argv[2]
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "raises":
        raise RuntimeError("it is broken")
    if end == "waits":
        time.sleep(60)
    sys.exit(int(end))
"""


@pytest.fixture
def script(tmp_path) -> Path:
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


def start(script: Path, *arguments: str, workers: int = 1, own: bool = False) -> tuple[str | None, str]:
    """By a fork, or (`own`) in an interpreter as for a GPU. What it says of the end, and the log."""
    commands = Commands(script, workers, 1, ["0"] if own else [])
    log = script / f"{'own' if own else 'fork'}.log"
    with (script / "lock").open("w") as lock:
        found = commands.run("train.py", arguments, log, 0, lock)
    return found, log.read_text()


@pytest.mark.parametrize("threads", range(1, min(usable_cores(), 2) + 1))
def test_a_fork_sees_what_an_interpreter_of_its_own_sees(threads, script, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    monkeypatch.chdir(script)
    seen, logs = [], []
    for own in (True, False):
        problem, log = start(script, f"seen-{own}.json", "0", own=own)
        assert problem is None, problem
        seen.append(json.loads((script / f"seen-{own}.json").read_text()))
        logs.append(log.splitlines())
    assert [found.pop("warm") for found in seen] == [False, True]
    first, other = seen
    assert first["argv"][0] == other["argv"][0] == str(script / "train.py")
    assert [found.pop("argv")[2:] for found in seen] == [["0"]] * 2
    assert first["environment"].pop("CUDA_VISIBLE_DEVICES") == "0"
    for name in ("LC_CTYPE", "PYTEST_CURRENT_TEST"):  # the interpreter's own; pytest's
        for found in seen:
            found["environment"].pop(name, None)
    other["environment"].pop("CUDA_VISIBLE_DEVICES", None)
    assert first == other and first["threads"] == threads and first["leads"] and first["cwd"] == str(script)
    for log in logs:
        assert log[0].startswith("$ ") and sorted(log[1:]) == ["and so is this", "at the end", "read by people"]


@pytest.mark.parametrize(
    ("end", "status", "said"), [("4", 4, ""), ("raises", 1, "RuntimeError: it is broken"), ("killed", -9, "")]
)
def test_how_it_ended(script, end, status, said):
    for own in (True, False):
        problem, _ = start(script, "seen.json", end, own=own)
        assert problem.startswith(f"exit status {status}: ") and said in problem


def test_many_threads_may_start_and_wait(script):
    """Each gets the status of its own, whichever thread read it."""
    found = {}
    with (script / "lock").open("w") as lock, (script / "log").open("a") as log:

        def go(number: int) -> None:
            command = [str(script / "train.py"), f"{script}/{number}.json", str(number)]
            found[number] = Fork(command, dict(os.environ, OMP_NUM_THREADS="1"), log, lock).wait()

        threads = [threading.Thread(target=go, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {number: number for number in range(12)}


def test_it_holds_the_lock_and_ends_by_the_stop(script):
    commands, ended = Commands(script, 1, 1, []), []
    with (script / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(
            target=lambda: ended.append(
                commands.run("train.py", [f"{script}/seen.json", "waits"], script / "log", 0, lock)
            )
        )
        waiting.start()
        deadline = time.monotonic() + 120
        while not (script / "seen.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with (script / "lock").open("w") as other:  # ours is closed: it is the command's
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        commands.stop()
        waiting.join(30)
        assert ended[0].startswith(f"exit status {-signal.SIGTERM}: ")
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert commands.run("train.py", ["x", "0"], script / "log", 0, other) == "stopped"
