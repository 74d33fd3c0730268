"""Does a run that is killed at any moment, again and again, end as the one that was left alone?

    python benchmarks/soak.py --kills 200 --output benchmarks/results/soak_cpu.json

Tiny runs of one and of two ranks (random weights, built-in tasks; CPU), killed at uniformly random moments of their
lives and continued with --resume auto until they finish. A kill is SIGKILL or SIGTERM, of the whole job or of one rank.
Each finished run's theta, scores and lines are compared, bit for bit, with an uninterrupted run's. `lost` counts runs
that could not go on, hung or ended otherwise. Runs are forked from one process that has imported everything and counted
the memory, so that kills hit what a run does; what each rank was doing when it was hit is counted (`phases`).
Needs Linux. Exit status 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# what a rank does, from the outside in: the innermost counts
PHASES = (
    "start",
    "outer step",
    "inner step",
    "step of theta",
    "evaluation",
    "checkpoint",
    "summary",
    "scores",
    "ended",
)
JOINING = 20.0  # seconds for two ranks to find each other, instead of the program's 600
ENDS_WITHIN = 90.0  # seconds, of a rank whose job was hit: the other one died, or it was asked to stop
HANGS_AFTER = 300.0  # seconds, of an attempt that nobody hit
TIMING = ("seconds", "real_tokens_per_second", "padded_tokens_per_second", "peak_memory_bytes")

CONFIG = f"""
model: {{name: "random:tiny", dtype: float32}}
adapters: {{rank: 2}}
method: {{inner_steps: 3, inner_lr: 1e-3, outer_lr: 1e-3, test_lr: 1e-3, beta: 1e-12}}
tasks:
  source: builtin
  batch_size: 2
  builtin: {{train_tasks: 3, test_tasks: 3, train_examples: 8, test_examples: 4}}
trainer:
  tasks_per_step: 2
  checkpoint_every: 2
  activation_checkpointing: false
  deepspeed: {ROOT}/configs/deepspeed/zero2.json
eval: {{every: 4, validation_examples: 2}}
logging: {{progress_bar: false}}
"""


@dataclass
class Attempt:
    """One start of a job: its ranks' processes, and the phase that each is in, which outlives it."""

    pids: list[int]
    phases: mmap.mmap
    ended: dict[int, int] = field(default_factory=dict)  # exit status by rank; a signal's number is negative

    def phase(self, rank: int) -> str:
        return PHASES[self.phases[rank]]

    def wait(self, until: float) -> bool:
        """Whether all ranks end before that moment (of `time.monotonic`)."""
        while len(self.ended) < len(self.pids):
            for rank, pid in enumerate(self.pids):
                if rank not in self.ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    self.ended[rank] = os.waitstatus_to_exitcode(found[1])
            if time.monotonic() > until:
                return False
            time.sleep(0.002)
        return True

    def hit(self, ranks: list[int], number: signal.Signals) -> list[str]:
        """Signal those that still run; what each of them was at."""
        alive = [rank for rank in ranks if rank not in self.ended]
        for rank in alive:
            os.kill(self.pids[rank], number)
        if number == signal.SIGKILL:
            self.wait(time.monotonic() + 1)  # the phase is read when it can no longer change
        return [self.phase(rank) for rank in alive]


class Job:
    """A run of a number of ranks in a folder, started as often as it takes."""

    def __init__(self, folder: Path, ranks: int, steps: int):
        self.folder, self.ranks = folder, ranks
        self.config, self.log = folder.with_suffix(".yaml"), folder.with_suffix(".log")
        self.overrides = [f"trainer.episodes={2 * steps}"]
        self.config.write_text(f"output: {folder}\n{CONFIG}")

    def start(self) -> Attempt:
        from abmll.ports import free_port

        phases, port, pids = mmap.mmap(-1, self.ranks), free_port(), []
        for rank in range(self.ranks):
            pid = os.fork()
            if pid == 0:
                _child(self, rank, port, phases)
            pids.append(pid)
        return Attempt(pids, phases)

    def result(self) -> dict[str, Any]:
        """What must not depend on kills."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return {
            "theta": (self.folder / "final/theta.safetensors").read_bytes(),
            "scores": (self.folder / "scores.json").read_text(),
            "predictions": (self.folder / "predictions.parquet").read_bytes(),
            "metrics": [{key: value for key, value in line.items() if key not in TIMING} for line in lines],
            "episodes": (self.folder / "episodes.jsonl").read_text(),
            "last checkpoint": max(path.name for path in (self.folder / "checkpoints").iterdir()),
            "partial": sorted(str(path) for path in self.folder.rglob(".partial-*")),
        }


@dataclass
class Soak:
    """Kills, counted, and what they did to the runs."""

    draw: random.Random
    kills: Counter[str] = field(default_factory=Counter)  # by signal and target
    phases: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    lost: list[str] = field(default_factory=list)

    def whole(self, job: Job) -> tuple[float, dict[str, Any]]:
        """An uninterrupted run: the seconds that it lives, and its result."""
        started, attempt = time.monotonic(), job.start()
        if not attempt.wait(started + HANGS_AFTER) or set(attempt.ended.values()) != {0}:
            raise RuntimeError(f"the uninterrupted run failed: {attempt.ended}\n{job.log.read_text()[-3000:]}")
        return time.monotonic() - started, job.result()

    def until_finished(self, job: Job, life: float, most: int) -> float:
        """Start, kill and resume a run until it finishes, unhindered after `most` kills.

        Returns how long a run lives: as `life` was, or as this one did if it was never hit (other work comes and goes).
        """
        kills = 0
        while True:
            attempt, started = job.start(), time.monotonic()
            moment = started + self.draw.uniform(0, life) if kills < most else started + HANGS_AFTER
            if attempt.wait(moment):
                if set(attempt.ended.values()) != {0}:
                    self._lose(job, f"ended by itself with {attempt.ended}", attempt)
                else:
                    self.finished += 1
                return life if kills else time.monotonic() - started
            if kills >= most:
                self._lose(job, f"hung in {attempt.phase(0)}", attempt)
                return life
            kills += 1
            if not self._kill(job, attempt):
                return life

    def _kill(self, job: Job, attempt: Attempt) -> bool:
        """One kill, and the end of all ranks; False where they do not end."""
        number = self.draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        ranks = list(range(job.ranks))
        target = [self.draw.choice(ranks)] if job.ranks > 1 and self.draw.random() < 0.5 else ranks
        what = "job" if target == ranks else "one rank"
        self.kills[f"{number.name} of {'a' if job.ranks == 1 else 'a two-rank'} job" if what == "job" else
                   f"{number.name} of one of two ranks"] += 1  # fmt: skip
        self.phases.update(attempt.hit(target, number))
        if not attempt.wait(time.monotonic() + ENDS_WITHIN):
            self._lose(job, f"did not end after {number.name} of {what}", attempt)
            return False
        self.statuses.update(f"{number.name}: {attempt.ended[rank]}" for rank in ranks)
        return True

    def compare(self, job: Job, expected: dict[str, Any]) -> None:
        found = job.result()
        if other := [key for key in expected if found[key] != expected[key]]:
            self.lost.append(f"{job.folder.name}: other {', '.join(other)} than the uninterrupted run")

    def _lose(self, job: Job, why: str, attempt: Attempt) -> None:
        self.lost.append(f"{job.folder.name}: {why}\n{job.log.read_text(errors='replace')[-3000:]}")
        for rank, pid in enumerate(attempt.pids):
            if rank not in attempt.ended:
                os.kill(pid, signal.SIGKILL)
        attempt.wait(time.monotonic() + 10)


def soak(folder: Path, kills: int, steps: int, ranks: tuple[int, ...], seed: int, say: Callable[[str], None]) -> Soak:
    """Runs of each number of ranks in turn, until there were so many kills; all of them finish."""
    _prepare(folder)
    found, wholes, number = Soak(random.Random(seed)), {}, 0
    for count in ranks:
        wholes[count] = found.whole(Job(folder / f"whole-{count}", count, steps))
        say(f"{count} rank(s): an uninterrupted run of {steps} steps lives {wholes[count][0]:.1f} s")
    while (so_far := found.kills.total()) < kills:
        count = ranks[number % len(ranks)]
        job = Job(folder / f"run-{number:04d}", count, steps)
        life, expected = wholes[count]
        lost = len(found.lost)
        wholes[count] = found.until_finished(job, life, min(8, kills - so_far)), expected
        if len(found.lost) == lost:
            found.compare(job, expected)
        number += 1
        for why in found.lost[lost:]:
            say(f"LOST {why}")
        say(f"{found.kills.total()} kills, {found.finished} runs finished, {len(found.lost)} lost")
    return found


def _prepare(folder: Path) -> None:
    """What every run imports, loads and counts, here and once. Fake tensors alone: threads would not survive a fork."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401, DeepSpeed's engine asks for it: some seconds
    import torch

    from abmll import run
    from abmll.config import load_config
    from abmll.distributed import Ranks
    from abmll.op_lock import load_cpu_operation

    torch.set_num_threads(1)
    load_cpu_operation()
    plan_on = run.plan_on
    if not hasattr(plan_on, "counted"):
        alone = Ranks(0, 1, torch.device("cpu"))
        object.__setattr__(alone, "from_main", lambda item: item)
        plan = plan_on(alone, load_config(Job(folder / "plan", 1, 1).config), {})
        run.plan_on = lambda *_: plan
        run.plan_on.counted = True


def _child(job: Job, rank: int, port: int, phases: mmap.mmap) -> None:
    """A rank's whole life, as launch/train.py has it."""
    status = 1
    try:
        log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.ranks, "LOCAL_SIZE": job.ranks}
        os.environ.update({key: str(value) for key, value in place.items()})
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        import torch

        from abmll import distributed
        from abmll.interrupt import STATUS, Interrupted
        from abmll.run import train

        distributed.JOINING = JOINING
        torch.set_num_threads(1)
        _mark_phases(phases, rank)
        try:
            train(str(job.config), job.overrides, resume=True, overwrite=False)
            status = 0
        except Interrupted as error:
            print(f"SIGTERM: {error}", flush=True)
            status = STATUS
        phases[rank] = PHASES.index("ended")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _mark_phases(phases: mmap.mmap, rank: int) -> None:
    """Every process writes down what it does where the one that kills it reads it."""
    from abmll import run, trainer
    from abmll.engine import ThetaEngine
    from abmll.evaluation import Evaluator
    from abmll.learner import Learner

    def marked(owner: Any, name: str, what: str) -> None:
        function, number = getattr(owner, name), PHASES.index(what)

        @wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            before, phases[rank] = phases[rank], number
            try:
                return function(*arguments, **keywords)
            finally:
                phases[rank] = before

        setattr(owner, name, call)

    marked(trainer.Trainer, "_outer_step", "outer step")
    marked(Learner, "phi_step", "inner step")
    marked(ThetaEngine, "step", "step of theta")
    marked(Evaluator, "evaluate", "evaluation")
    marked(trainer.Trainer, "_save", "checkpoint")
    marked(run, "save_summary", "summary")
    marked(run, "save_scores", "scores")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=24, help="outer steps of a run")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks, in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, signals and targets")
    parser.add_argument("--output", type=Path, help="JSON file for the row")
    arguments = parser.parse_args()
    from abmll.files import write_whole
    from abmll.provenance import provenance

    made, started = provenance(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(
            Path(folder), arguments.kills, arguments.steps, tuple(arguments.ranks), arguments.seed,
            lambda text: print(text, flush=True),
        )  # fmt: skip
    row = {
        "kills": found.kills.total(),
        "by_signal": dict(sorted(found.kills.items())),
        "phases": {name: found.phases[name] for name in PHASES},
        "exit_statuses": dict(sorted(found.statuses.items())),
        "runs_finished": found.finished,
        "lost": len(found.lost),
        "what_was_lost": found.lost,
        "steps": arguments.steps,
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - started),
        "provenance": made,
    }
    text = json.dumps(row, indent=1)
    print(text)
    if arguments.output:
        write_whole(arguments.output, text + "\n")
    return 1 if found.lost else 0


if __name__ == "__main__":
    sys.exit(main())
