"""The command `launch/compare.py`: choose settings, run, score, analyse."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from abmll.compare.analysis import analyse
from abmll.compare.grid import PLAIN, Comparison, Job, jobs, load_comparison
from abmll.compare.results import INDEX
from abmll.compare.runner import Outcome, Runner
from abmll.compare.tuning import choose
from abmll.config import Refused
from abmll.files import write_whole


def compare(
    path: str, overrides: list[str], launch: Path, workers: int | None, ranks: int, only: str | None = None
) -> int:
    """Runs what is not there yet, and writes tables and plots of what is. Returns the exit status.

    `launch`: the folder of the commands. `only`: "list" prints the runs, "analysis" makes tables and plots alone.
    ConfigError or Refused for a mistake of the user's.
    """
    extra = tuple(overrides)
    comparison = load_comparison(path, extra)
    folder = Path(comparison.output).resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as an interrupt: runs are stopped
    runner = Runner(comparison.config, folder, launch, workers, ranks)
    if only == "list":
        for job in jobs(comparison, {}, extra):
            print(f"{job.folder:<60} {'finished' if runner.finished(job) else ''}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    if only != "analysis":
        outcomes = _run(comparison, runner, extra)
    into = folder / "comparisons" / comparison.name  # runs may serve several comparisons
    if not (into / INDEX).is_file():
        raise Refused(f"output: {into}: holds no {INDEX}; run the comparison first")
    for written in analyse(folder, into):
        print(written)
    failed = [outcome for outcome in outcomes if outcome.problem]
    for outcome in failed:
        print(f"failed: {outcome.job.folder}: {outcome.problem}", file=sys.stderr)
    return 1 if failed else 0


def _run(comparison: Comparison, runner: Runner, extra: tuple[str, ...]) -> list[Outcome]:
    outcomes, chosen = [], {}
    if comparison.tune:
        choices, outcomes = choose(comparison, runner, extra)
        chosen = {choice.cell: choice.chosen for choice in choices}
        for choice in choices:
            end = f" (at the end of {', '.join(choice.at_the_end_of)})" if choice.at_the_end_of else ""
            print(f"chosen for {' '.join(choice.cell)}: {choice.chosen}{end}")
    wanted = jobs(comparison, chosen, extra)
    into = runner.folder / "comparisons" / comparison.name
    into.mkdir(parents=True, exist_ok=True)
    write_whole(into / INDEX, json.dumps(index(comparison, wanted), indent=1))
    return [*outcomes, *runner.run(wanted)]


def index(comparison: Comparison, wanted: list[Job]) -> dict:
    """What the analysis reads: every run of the comparison, finished or not."""
    runs = [
        {**job.facts(), "overrides": job.overrides, "scores": {PLAIN: ".", **{n: f"scores/{n}" for n in job.scores}}}
        for job in wanted
    ]
    return {"name": comparison.name, "baselines": comparison.baselines, "runs": runs}
