"""Runs jobs as the commands that a user would type, several at a time; finished ones are skipped, others continued."""

from __future__ import annotations

import fcntl
import json
import queue
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from abmll.compare.launcher import Launcher, usable_cores, visible_gpus
from abmll.compare.load import missing_tasks
from abmll.compare.schema import Job
from abmll.config import ConfigError, Refused, load_config, override_texts, with_absolute_paths
from abmll.config.errors import show
from abmll.config.settings import flat, in_effect
from abmll.config.yaml_text import dump
from abmll.dealing import tasks_per_step
from abmll.files import write_whole
from abmll.provenance import PROVENANCE, provenance
from abmll.score_files import SCORES, scored_under
from abmll.summary import finished_facts


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
        for option, number in (("--workers", workers), ("--ranks", ranks)):
            if number is not None and number < 1:
                raise Refused(f"{option}: {number}: must be at least 1; leave it out for the default")
        self.gpus = visible_gpus()
        if self.gpus and ranks > len(self.gpus):
            visible = f"{len(self.gpus)} visible GPUs ({','.join(self.gpus)})"
            raise Refused(f"--ranks: {ranks}: each needs a GPU of its own, of {visible}; take at most {len(self.gpus)}")
        self.workers = workers or max(1, (len(self.gpus) or usable_cores()) // ranks)
        self.launcher = Launcher(launch, self.workers, ranks, self.gpus)
        self.config, self.folder, self.say = config, folder, say
        self._places: queue.Queue[int] = queue.Queue()
        for place in range(self.workers):
            self._places.put(place)

    def run(self, jobs: Sequence[Job], ready: Callable[[], None] = lambda: None) -> list[Outcome]:
        """All jobs, in their order as far as they are beside each other. A failed one does not stop the others.
        `ready` is called when nothing was refused, before the first one starts.

        Refused where a folder holds another run than the job's. Interrupted, it stops the running commands, which
        continue from their last checkpoints when called again.
        """
        for job in jobs:
            self.check(job)
        ready()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                futures = [pool.submit(self._run, job) for job in jobs]
                return [future.result() for future in futures]
            except BaseException:
                try:
                    self.launcher.stop()
                finally:
                    pool.shutdown(wait=True, cancel_futures=True)
                raise

    def check(self, job: Job, to_choose: Collection[str] = ()) -> None:
        """Refused where the job's folder holds a run with another configuration, or scores under other overrides, or
        where tasks that it needs are not there. `to_choose`: the keys whose values are not known yet.
        """
        if not self.finished(job):
            for overrides in ((), *(override_texts(values) for values in job.scores.values())):
                if not overrides or any(text.startswith("tasks.") for text in overrides):
                    config = load_config(self.config, [*job.overrides, *overrides])
                    if problem := missing_tasks(config, self.config, job.needed):
                        raise Refused(problem)
        self.check_there(job, to_choose)

    def check_there(self, job: Job, to_choose: Collection[str] = ()) -> None:
        """What of `check` asks about the job's own folder alone."""
        for name, values in job.scores.items():
            scored_under(self.folder / job.folder / "scores" / name, values, {"overrides": []})
        path = self.folder / job.folder / "config.yaml"
        if not path.exists():
            return
        wanted = with_absolute_paths(load_config(self.config, self._overrides(job)), self.config)
        try:
            there = with_absolute_paths(load_config(path), path)  # an older one may name its model from here
        except ConfigError as error:
            raise Refused(f"{path}: {error}; remove the folder") from None
        old, new = in_effect(*(flat(config.model_dump()) for config in (there, wanted)))
        if wanted.tasks.source == "builtin":  # of which none is missing
            old["tasks.missing"] = new["tasks.missing"]
        different = [
            f"{key}: {show(old.get(key))} there, {show(new.get(key))} now"
            for key in dict.fromkeys((*new, *old))
            if key not in to_choose and old.get(key) != new.get(key)
        ]
        if different:
            back = "set tasks.missing back, " if old["tasks.missing"] != new["tasks.missing"] else ""
            remedy = f"{back}remove it, or set another output"
            raise Refused(f"{path.parent}: holds another run: {'; '.join(different)}; {remedy}")

    def finished(self, job: Job) -> bool:
        """Whether the run and all of its scores are there."""
        scores = self.folder / job.folder / "scores"
        return self.trained(job) and all((scores / name / SCORES).is_file() for name in job.scores)

    def trained(self, job: Job) -> bool:
        """Whether the run ended with its own scores."""
        return finished_facts(self.folder / job.folder) is not None

    def _run(self, job: Job) -> Outcome:
        if self.finished(job):
            return Outcome(job, None)
        place = self._places.get()
        try:
            began = time.monotonic()
            try:
                problem = self._stages(job, place)
                if problem is None and not self.finished(job):
                    problem = f"{self.folder / job.folder}: its commands ended, and not all of its scores are there"
            except OSError as error:  # a full disk, a file in the place of a folder: of this run, not of the others
                problem = f"{self.folder / job.folder}: {error}; make it writable, or set another output"
            if not self.launcher.stopped.is_set():
                took = timedelta(seconds=round(time.monotonic() - began))
                self.say(f"{job.folder}: {f'failed after {took}: {problem}' if problem else f'done after {took}'}")
            return Outcome(job, problem)
        finally:
            self._places.put(place)

    def _stages(self, job: Job, place: int) -> str | None:
        folder = self.folder / job.folder
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:  # held by what is started here too, should this process be killed
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return f"{folder}: another process is at work in it; wait for it, or stop it"
            if not self.trained(job):
                if not (folder / PROVENANCE).exists():
                    write_whole(folder / PROVENANCE, json.dumps(provenance()))
                arguments = ["--config", self.config, "--resume", "auto", *self._overrides(job)]
                if problem := self.launcher.run("train.py", arguments, folder / "compare.log", place, lock):
                    return problem
            if not job.scores:
                return None
            settings = folder / "settings.yaml"
            write_whole(settings, dump(job.scores))
            arguments = ["--run", str(folder), "--settings", str(settings)]
            return self.launcher.run("evaluate.py", arguments, folder / "compare.log", place, lock)

    def _overrides(self, job: Job) -> list[str]:
        """The job's, and what is this comparison's. How many episodes an outer step has is said where it would follow
        from the number of ranks: with another number the run would be another one.
        """
        own = [*job.overrides, f"output={self.folder / job.folder}", "logging.progress_bar=false"]
        if self.launcher.ranks > 1:
            trainer = load_config(self.config, job.overrides).trainer
            own.append(f"trainer.tasks_per_step={tasks_per_step(trainer, self.launcher.ranks)}")
        return own


def made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"output: {folder}: cannot be made ({error.strerror}); set another output") from None
    return folder
