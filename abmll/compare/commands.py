"""Starts the scripts of launch/ as they are typed, each in a session of its own, waits for them, and stops them.

What a small run takes is mostly its imports. So where a command has one rank and no GPU it is forked from a process
that has made them once for all. Others have interpreters of their own: an import may have woken a GPU's driver, which
does not survive a fork, and ranks are deepspeed's to start.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import connection, reduction
from pathlib import Path
from typing import IO, Any

import torch

from abmll.ports import free_port

IMPORTED = ["abmll.run", "abmll.rescore"]  # by the process that commands are forked from


class Commands:
    """`workers` places, each with its share of the cores, and with GPUs of its own where there are any."""

    def __init__(self, launch: Path, workers: int, ranks: int, gpus: Sequence[str]):
        """`launch`: where the scripts lie; `gpus`: as CUDA_VISIBLE_DEVICES names them."""
        self.launch, self.workers, self.ranks, self.gpus = launch, workers, ranks, gpus
        self.stopped = threading.Event()
        self._running: set[subprocess.Popen | Fork] = set()
        self._starting = threading.Lock()  # nothing is started behind the stop

    def run(self, name: str, arguments: Sequence[str], log: Path, place: int, lock: IO) -> str | None:
        """The script with its output in `log`; the log's end if it fails. It holds the file `lock` open as long as it
        runs, should this process be killed.
        """
        environment = self._environment(place)
        command = [*self._interpreter(), str(self.launch / name), *arguments]
        with log.open("a") as stream:
            stream.write(f"$ {' '.join(command)}\n")
            stream.flush()
            with self._starting:
                if self.stopped.is_set():
                    return "stopped"
                process = (
                    subprocess.Popen(
                        command, env=environment, stdout=stream, stderr=subprocess.STDOUT,
                        start_new_session=True, pass_fds=[lock.fileno()],
                    )
                    if self.gpus or self.ranks > 1
                    else Fork(command[1:], environment, stream, lock)
                )  # fmt: skip
                self._running.add(process)
            try:
                code = process.wait()
            finally:
                self._running.discard(process)
        return None if code == 0 else f"exit status {code}: {log}:\n{_end(log)}"

    def stop(self) -> None:
        """SIGTERM for all that runs, and no more is started."""
        with self._starting:
            self.stopped.set()
        for process in list(self._running):
            with suppress(ProcessLookupError):  # it ended by itself
                try:
                    os.killpg(process.pid, signal.SIGTERM)
                except ProcessLookupError:  # a fork that has no session of its own yet
                    os.kill(process.pid, signal.SIGTERM)

    def _environment(self, place: int) -> dict[str, str]:
        cores, threads = usable_cores(), os.environ.get("OMP_NUM_THREADS")
        environment = {**os.environ, "OMP_NUM_THREADS": threads or str(max(1, cores // self.workers // self.ranks))}
        if self.gpus:
            own = [self.gpus[(place * self.ranks + rank) % len(self.gpus)] for rank in range(self.ranks)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        return environment

    def _interpreter(self) -> list[str]:
        """What comes before the script."""
        if self.ranks == 1:
            return [sys.executable]
        # with a number given, the launcher would forget which GPUs are visible
        number = [] if self.gpus else ["--num_accelerators", str(self.ranks)]
        return [shutil.which("deepspeed") or "deepspeed", *number, "--master_port", str(free_port())]


class Fork:
    """A command of python, `script arguments...`, in a fork of a process that has its imports. As subprocess.Popen."""

    # a status is read once, by whichever thread comes first: multiprocessing looks at all children in starting another
    _one_thread = threading.Lock()

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], output: IO, lock: IO):
        context = multiprocessing.get_context("forkserver")
        arguments = (list(command), dict(environment), _Inherited(output), _Inherited(lock))
        with self._one_thread:
            context.set_forkserver_preload(IMPORTED)
            self._process = context.Process(target=_as_typed, args=arguments)
            try:
                self._process.start()
            except EOFError:
                raise ChildProcessError("the process that commands are forked from died; try again") from None
        self.pid = self._process.pid

    def wait(self) -> int:
        """Its exit status; minus a signal's number if it ended by that."""
        connection.wait([self._process.sentinel])
        with self._one_thread:
            self._process.join()
            return self._process.exitcode


class _Inherited:
    """An open file, of which the child has the descriptor."""

    def __init__(self, file: IO):
        self.descriptor = file.fileno()

    def __reduce__(self) -> tuple[Any, ...]:
        return _detached, (reduction.DupFd(self.descriptor),)


def _detached(duplicate: Any) -> int:
    return duplicate.detach()


def _as_typed(command: list[str], environment: dict[str, str], output: int, lock: int) -> None:
    """In the fork: the script, as in an interpreter of its own with this environment. `lock` stays open."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"].split(",")[0]))  # libgomp reads it when it is loaded
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # as multiprocessing does from Python 3.13 on


def usable_cores() -> int:
    """Those of this process: a scheduler, a container or taskset may have given it fewer than the machine has."""
    if hasattr(os, "process_cpu_count"):  # from Python 3.13
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them, which this process may have been given."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


def _end(log: Path, lines: int = 8) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
