"""Ranks as processes of this machine that wait for orders."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .worker import MARK

FOLDER = Path(__file__).resolve().parent.parent
START = (
    "import json, sys; sys.path.insert(0, sys.argv[1]); from scaling_rows.worker import work; "
    "work(*json.loads(sys.argv[2]))"
)


class World:
    """One run on some ranks, each a process with one thread; `facts`: what it says when it is ready."""

    facts: dict[str, Any]

    def __init__(self, ranks: int, config: str, overrides: Sequence[str], tokens: int | None, folder: Path):
        self.ranks = ranks
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._errors = [open(folder / f"errors-{port}-{rank}", "w+") for rank in range(ranks)]  # noqa: SIM115
        self._processes = []
        for rank in range(ranks):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            process = subprocess.Popen(
                [sys.executable, "-c", START, str(FOLDER), json.dumps([config, list(overrides), tokens])],
                env={**os.environ, **{name: str(value) for name, value in places.items()}},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=self._errors[rank],
                text=True,
            )
            self._processes.append(process)

    def order(self, line: str) -> None:
        for process in self._processes:
            process.stdin.write(f"{line}\n")
            process.stdin.flush()

    def answer(self) -> Any:
        """The main rank's next one. RuntimeError, with what it wrote last, where it ended instead."""
        for line in self._processes[0].stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self.stop()
        raise RuntimeError(f"a rank ended before its answer:\n{self._last_words()}")

    def _last_words(self) -> str:
        found = []
        for errors in self._errors:
            errors.seek(0)
            found.append(errors.read()[-2000:])
        return "\n".join(found)

    def stop(self) -> None:
        for process in self._processes:
            if process.stdin and not process.stdin.closed:
                with suppress(OSError):  # it ended before
                    process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
