"""Commands of one test process, forked from a process that has made their imports, which is most of a small run's time.

Where that cannot be (a GPU, or no Linux) each has an interpreter of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest
import torch
from runs import environment

from abmll.compare.forks import Fork, Forks

Start = Callable[..., "Command"]


class Command:
    """A started command, as subprocess.Popen has it; both of its streams go to one file."""

    def __init__(self, process: subprocess.Popen | Fork, log: Path):
        self.pid, self.log = process.pid, log
        self._status: Future[int] = Future()
        Thread(target=lambda: self._status.set_result(process.wait()), daemon=True).start()

    @property
    def said(self) -> str:
        return self.log.read_text()

    def poll(self) -> int | None:
        return self._status.result() if self._status.done() else None

    def wait(self, timeout: float) -> int:
        """Its exit status, minus a signal's number if it ended by that. TimeoutError after so many seconds."""
        return self._status.result(timeout)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it has ended
            self.send_signal(signal.SIGKILL)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks | None]:
    if torch.cuda.is_available() or sys.platform != "linux":
        yield None
        return
    found = Forks(environment())
    yield found
    found.close()


@pytest.fixture
def start(forks: Forks | None, tmp_path: Path) -> Iterator[Start]:
    """Start a `Run.command`, with variables beside the usual ones."""
    started: list[Command] = []

    def start(command: Sequence[str], variables: Mapping[str, str] | None = None) -> Command:
        log, own = tmp_path / f"command-{len(started)}.log", {**environment(), **(variables or {})}
        with log.open("w") as output:
            if forks is None:
                process = subprocess.Popen(command, env=own, stdout=output, stderr=subprocess.STDOUT)
            else:
                process = forks.start(command[1:], own, output, output)  # `held` is what comparisons lock
        started.append(Command(process, log))
        return started[-1]

    yield start
    for command in started:
        command.kill()
        command.wait(60)
