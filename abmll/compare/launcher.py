"""Starts the scripts of launch/ as they are typed, each in its own process group, waits for them, and stops them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch

from abmll.compare.forks import Fork, Forks
from abmll.ports import free_port

# this process's, by OMP_NUM_THREADS: of a command's environment the one variable that imports read and comparisons set
_forks: dict[str, Forks] = {}
_forking = threading.Lock()


class Launcher:
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
            process = self._forked(command[1:], environment, stream, lock)
            with self._starting:
                if self.stopped.is_set():
                    if process is not None:
                        _terminate(process)
                        process.wait()
                    return "stopped"
                if process is None:
                    process = subprocess.Popen(
                        command, env=environment, stdout=stream, stderr=subprocess.STDOUT,
                        start_new_session=True, pass_fds=[lock.fileno()],
                    )  # fmt: skip
                self._running.add(process)
            try:
                code = process.wait()
            finally:
                self._running.discard(process)
        return None if code == 0 else f"exit status {code}: {log}:\n{_end(log)}"

    def stop(self) -> None:
        """SIGTERM for all that runs, and no more is started."""
        self.stopped.set()
        with _forking:  # who waits for imports waits no more
            while _forks:
                _forks.popitem()[1].close()
        with self._starting:
            for process in list(self._running):  # one may end meanwhile
                _terminate(process)

    def _forked(self, command: Sequence[str], environment: Mapping[str, str], output: IO, lock: IO) -> Fork | None:
        """None where the command has to have an interpreter of its own: see `forks`; ranks are deepspeed's to start."""
        if self.gpus or self.ranks > 1 or sys.platform != "linux":
            return None
        with _forking:
            if self.stopped.is_set():
                return None
            threads = environment["OMP_NUM_THREADS"]
            if threads not in _forks or _forks[threads].process.poll() is not None:
                _forks[threads] = Forks(environment)
            forks = _forks[threads]
        return forks.start(command, environment, output, lock)

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


def _terminate(process: subprocess.Popen | Fork) -> None:
    with suppress(ProcessLookupError):  # it ended by itself
        os.killpg(process.pid, signal.SIGTERM)


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
