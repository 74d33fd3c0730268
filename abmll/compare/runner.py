"""Runs jobs as the commands that a user would type, several at a time; finished ones are skipped, others continued."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from abmll.compare.grid import Job
from abmll.config import ConfigError, Refused, load_config, with_absolute_paths
from abmll.config.yaml_text import dump
from abmll.files import write_whole
from abmll.score_files import SCORES


@dataclass(frozen=True)
class Outcome:
    """A job, and what went wrong: the end of its log; None where all is there."""

    job: Job
    problem: str | None


class Runner:
    """`workers` jobs at a time, each with its share of the cores, and a GPU of its own where there are any."""

    def __init__(
        self,
        config: str,
        folder: Path,
        launch: Path,
        workers: int | None = None,
        ranks: int = 1,
        say: Callable[[str], None] = print,
    ):
        """`folder`: the comparison's; `launch`: where train.py and evaluate.py lie."""
        gpus = torch.cuda.device_count()
        self.workers = workers or max(1, gpus // ranks if gpus else (os.cpu_count() or 1) // ranks)
        self.config, self.folder, self.launch, self.ranks, self.say = config, folder, launch, ranks, say
        self._places: queue.Queue[int] = queue.Queue()
        for place in range(self.workers):
            self._places.put(place)
        self._running: set[subprocess.Popen] = set()
        self._stopped = threading.Event()

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """All jobs, in their order as far as they are beside each other. A failed one does not stop the others.

        Refused where a folder holds another run than the job's. Interrupted, it stops the running commands, which
        continue from their last checkpoints when called again.
        """
        for job in jobs:
            self.check(job)
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(self._run, job) for job in jobs]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self._stopped.set()
                for process in list(self._running):
                    os.killpg(process.pid, signal.SIGTERM)
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def check(self, job: Job) -> None:
        """Refused where the job's folder holds a run with another configuration."""
        path = self.folder / job.folder / "config.yaml"
        if not path.exists():
            return
        wanted = with_absolute_paths(load_config(self.config, self._overrides(job)), self.config)
        try:
            there = load_config(path)
        except ConfigError as error:
            raise Refused(f"{path}: {error}; remove the folder") from None
        if there != wanted:
            pairs = zip(_flat(there), _flat(wanted), strict=True)
            different = [f"{key}: {old!r} there, {new!r} now" for (key, old), (_, new) in pairs if old != new]
            raise Refused(f"{path.parent}: holds another run: {'; '.join(different)}; remove it, or set another output")

    def finished(self, job: Job) -> bool:
        """Whether the run and all of its scores are there."""
        scores = self.folder / job.folder / "scores"
        return self._trained(job) and all((scores / name / SCORES).is_file() for name in job.scores)

    def _trained(self, job: Job) -> bool:
        try:
            facts = json.loads((self.folder / job.folder / "final/summary.json").read_text())
        except (OSError, ValueError):
            return False
        return "scores" in facts

    def _run(self, job: Job) -> Outcome:
        if self.finished(job):
            return Outcome(job, None)
        place = self._places.get()
        try:
            began = time.monotonic()
            problem = self._stages(job, place)
            if not self._stopped.is_set():
                took = timedelta(seconds=round(time.monotonic() - began))
                self.say(f"{job.folder}: {'failed' if problem else 'done'} after {took}")
            return Outcome(job, problem)
        finally:
            self._places.put(place)

    def _stages(self, job: Job, place: int) -> str | None:
        folder = self.folder / job.folder
        log = folder / "compare.log"
        folder.mkdir(parents=True, exist_ok=True)
        if not self._trained(job):
            arguments = ["--config", self.config, "--resume", "auto", *self._overrides(job)]
            if problem := self._command("train.py", arguments, log, place):
                return problem
        if job.scores:
            settings = folder / "settings.yaml"
            write_whole(settings, dump(job.scores))
            return self._command("evaluate.py", ["--run", str(folder), "--settings", str(settings)], log, place)
        return None

    def _overrides(self, job: Job) -> list[str]:
        return [*job.overrides, f"output={self.folder / job.folder}", "logging.progress_bar=false"]

    def _command(self, name: str, arguments: list[str], log: Path, place: int) -> str | None:
        """Runs a command with its output in `log`; the log's end if it fails."""
        if self._stopped.is_set():
            return "stopped"
        cores, threads = os.cpu_count() or 1, os.environ.get("OMP_NUM_THREADS")
        environment = {**os.environ, "OMP_NUM_THREADS": threads or str(max(1, cores // self.workers // self.ranks))}
        if gpus := torch.cuda.device_count():
            own = [str((place * self.ranks + rank) % gpus) for rank in range(self.ranks)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        start = [sys.executable]
        if self.ranks > 1:
            port = 29500 + place
            start = [shutil.which("deepspeed") or "deepspeed", "--num_accelerators", str(self.ranks)]
            start += ["--master_port", str(port)]
        command = [*start, str(self.launch / name), *arguments]
        with log.open("a") as stream:
            stream.write(f"$ {' '.join(command)}\n")
            stream.flush()
            process = subprocess.Popen(
                command, env=environment, stdout=stream, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
            try:
                code = process.wait()
            finally:
                self._running.discard(process)
        return None if code == 0 else f"exit status {code}: {log}:\n{_end(log)}"


def _end(log: Path, lines: int = 8) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _flat(config) -> list[tuple[str, object]]:
    sections = config.model_dump()
    return [
        (f"{section}.{key}" if key else section, value)
        for section, values in sections.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    ]
