"""The command `launch/compare.py`: choose settings, run, score, analyse."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from abmll.compare.analysis import analyse
from abmll.compare.grid import jobs, keys_to_choose, place_of_score
from abmll.compare.load import load_comparison, output_of
from abmll.compare.results import INDEX
from abmll.compare.runner import Outcome, Runner, made
from abmll.compare.schema import PLAIN, Comparison, Job
from abmll.compare.tuning import Choice, choose, chosen_before, write_choices
from abmll.config import Refused
from abmll.files import write_whole
from abmll.score_files import PREDICTIONS
from abmll.summary import finished_facts


def compare(
    path: str, overrides: list[str], launch: Path, workers: int | None, ranks: int, only: str | None = None
) -> int:
    """Runs what is not there yet, and writes tables and plots of what is. Returns the exit status.

    `launch`: the folder of the commands. `only`: "list" prints the runs, "analysis" makes tables and plots alone.
    ConfigError or Refused for a mistake of the user's.
    """
    output, extra = output_of(overrides)
    comparison = load_comparison(path, extra)
    folder = Path(output or comparison.output).resolve()
    _stop_at_signals()
    runner = Runner(comparison.config, folder, launch, workers, ranks)
    if only == "list":
        for job in jobs(comparison, {}, extra):
            print(f"{job.folder:<60} {_state(job, comparison, runner)}")
        return 0
    outcomes: list[Outcome] = []
    if only != "analysis":
        choices, outcomes = _choices(comparison, runner, extra)
        if choices is None:
            _tell_failures(outcomes)
            remedy = "call again for these alone, or take out of tune.grid what cannot be trained"
            print(f"tune: nothing is chosen while tries are missing; {remedy}", file=sys.stderr)
            return 1
        outcomes += _run(comparison, runner, choices, extra)
    failed = _tell_failures(outcomes)  # first: the analysis may have nothing to show
    into = _place_of(comparison, folder)
    if not (into / INDEX).is_file():
        raise Refused(f"output: {into}: holds no {INDEX}; run the comparison first")
    if only == "analysis":  # of what the file says now
        write_whole(into / INDEX, json.dumps(index(comparison, _as_chosen(comparison, runner, into, extra)), indent=1))
    if not _anything_finished(folder, into):
        raise Refused(f"{into}: none of its runs is finished, so there is nothing to analyse; run the comparison again")
    for written in analyse(folder, into):
        print(written)
    return 1 if failed else 0


def _state(job: Job, comparison: Comparison, runner: Runner) -> str:
    try:
        runner.check_there(job, keys_to_choose(comparison, job.method))
    except Refused as error:
        return f"refused: {error}"
    return "finished" if runner.finished(job) else ""


def _as_chosen(comparison: Comparison, runner: Runner, into: Path, extra: tuple[str, ...]) -> list[Job]:
    """The comparison's runs with the settings that were chosen for them. Refused where a folder holds another run."""
    wanted = jobs(comparison, chosen_before(into) if comparison.tune else {}, extra)
    for job in wanted:
        runner.check_there(job, keys_to_choose(comparison, job.method))
    return wanted


def _stop_at_signals() -> None:
    """SIGTERM and a closed terminal are as an interrupt: the runs, which would go on alone, are stopped."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def _tell_failures(outcomes: list[Outcome]) -> bool:
    """A line for each failure, whose log's end was shown when it happened. Whether there are any."""
    failed = [outcome for outcome in outcomes if outcome.problem]
    for outcome in failed:
        print(f"failed: {outcome.job.folder}: {outcome.problem.splitlines()[0].rstrip(':')}", file=sys.stderr)
    return bool(failed)


def _anything_finished(folder: Path, into: Path) -> bool:
    return any(
        finished_facts(folder / run["folder"]) is not None
        and any((folder / run["folder"] / scores / PREDICTIONS).is_file() for scores in run["scores"].values())
        for run in json.loads((into / INDEX).read_text())["runs"]
    )


def _place_of(comparison: Comparison, folder: Path) -> Path:
    return folder / "comparisons" / comparison.name  # runs may serve several comparisons


def _choices(
    comparison: Comparison, runner: Runner, extra: tuple[str, ...]
) -> tuple[list[Choice] | None, list[Outcome]]:
    """Each cell's settings, and what became of the tries; None where one failed."""
    if not comparison.tune:
        return [], []
    for job in jobs(comparison, {}, extra):  # a refusal behind the tries would come late
        runner.check(job, keys_to_choose(comparison, job.method))
    choices, outcomes = choose(comparison, runner, extra, _place_of(comparison, runner.folder))
    if choices is None:
        return None, outcomes
    for choice in choices:
        end = f" (at the end of {', '.join(choice.at_the_end_of)})" if choice.at_the_end_of else ""
        print(f"chosen for {' '.join(choice.cell)}: {choice.chosen}{end}")
    return choices, outcomes


def _run(comparison: Comparison, runner: Runner, choices: list[Choice], extra: tuple[str, ...]) -> list[Outcome]:
    wanted = jobs(comparison, {choice.cell: choice.chosen for choice in choices}, extra)
    into = _place_of(comparison, runner.folder)

    def ready() -> None:  # an index of refused runs would mislead, and so would their choices
        write_whole(made(into) / INDEX, json.dumps(index(comparison, wanted), indent=1))
        write_choices(comparison, choices, into)

    return runner.run(wanted, ready)


def index(comparison: Comparison, wanted: list[Job]) -> dict:
    """What the analysis reads: every run of the comparison, finished or not."""
    runs = [
        {
            **job.facts(),
            "overrides": job.overrides,
            "scores": {name: place_of_score(name) for name in (PLAIN, *job.scores)},
        }
        for job in wanted
    ]
    return {"name": comparison.name, "baselines": comparison.baselines, "runs": runs}
