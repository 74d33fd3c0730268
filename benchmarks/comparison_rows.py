"""Keep a comparison's rows: what its tables and plots are made of, without weights, logs and paths of the machine.

    python benchmarks/comparison_rows.py runs/compare/cls23-smollm2/comparisons/cls23-smollm2

writes benchmarks/results/compare/NAME, an ordinary comparison's folder of finished runs (their steps, summaries, scores
and predictions), from which `analyse` makes the tables and plots again, and which another session's runs can join.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from abmll.compare.analysis import analyse
from abmll.compare.results import INDEX, TUNING
from abmll.files import inside
from abmll.provenance import PROVENANCE, provenance
from abmll.score_files import PREDICTIONS, SCORES
from abmll.summary import FACTS, FINAL, finished_facts

RESULTS = Path(__file__).resolve().parent / "results" / "compare"
# what the analysis reads of a run's configuration, and a reader needs to make the run again
SECTIONS = ("seed", "adapters", "method", "eval")
OF_TASKS = ("train", "test", "batch_size", "max_tokens", "too_long", "demonstrations", "demonstrate")
OF_TRAINER = ("episodes", "epochs", "tasks_per_step", "parallel_episodes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="OUTPUT/comparisons/NAME, where compare.py wrote its report")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    index = json.loads((arguments.comparison / INDEX).read_text())
    folder = inside(arguments.results, index["name"])
    chosen = arguments.comparison / TUNING
    for written in keep(arguments.comparison.resolve().parents[1], index, folder, provenance(), chosen):
        print(written)


def keep(
    comparison: Path, index: dict[str, Any], folder: Path, made: dict[str, Any], chosen: Path | None = None
) -> list[Path]:
    """Copy the finished runs and scores that `folder` has not yet, list them beside those that it has, and analyse all.

    `comparison` holds the runs, `index` is its comparison.json, `chosen` its tuning.json if it has one. Where a run was
    made stands in its own provenance.json; without one, `made` (where the rows are kept) is written down as `kept_by`.
    A kept run stays as it is: ValueError where the one of that name has another configuration now, or is another
    training's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = folder / INDEX
    before = json.loads(there.read_text()) if there.is_file() else {"baselines": [], "runs": []}
    runs = {run["folder"]: run for run in before["runs"]}
    for run in index["runs"]:
        source, target = inside(comparison, run["folder"]), inside(folder, run["folder"])
        facts = finished_facts(source)
        if facts is None:
            continue
        facts = without_paths(facts)
        if run["folder"] in runs:
            check_same(source, facts, target)
            for name, place in runs[run["folder"]]["scores"].items():
                if name in run["scores"]:
                    check_same_predictions(inside(source, place), inside(target, place))
        else:
            keep_run(source, facts, target)
            kept = {key: value for key, value in run.items() if key not in ("overrides", "scores")}
            runs[run["folder"]] = {**kept, "scores": {}, **made_by(source, made)}
        scores = runs[run["folder"]]["scores"]
        for name, place in run["scores"].items():
            if name not in scores and (source / place / PREDICTIONS).is_file():
                keep_scores(inside(source, place), inside(target, place))
                scores[name] = place
    baselines = list(dict.fromkeys([*before["baselines"], *index["baselines"]]))  # a part of a comparison names its own
    index = {"name": index["name"], "baselines": baselines, "runs": list(runs.values())}
    there.write_text(json.dumps(index, indent=1) + "\n")
    if chosen is not None and chosen.is_file():
        shutil.copyfile(chosen, folder / TUNING)
    return analyse(folder)


def keep_run(source: Path, facts: dict[str, Any], target: Path) -> None:
    (target / FINAL).mkdir(parents=True, exist_ok=True)
    if (source / "metrics.jsonl").is_file():  # not of a run that trains nothing
        shutil.copyfile(source / "metrics.jsonl", target / "metrics.jsonl")
    (target / FINAL / FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def keep_scores(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in (SCORES, PREDICTIONS):
        shutil.copyfile(source / name, target / name)


def made_by(source: Path, made: dict[str, Any]) -> dict[str, Any]:
    """Which device, versions and commit made a run; where nobody wrote that down, which kept it."""
    own = source / PROVENANCE
    return {"provenance": json.loads(own.read_text())} if own.is_file() else {"kept_by": made}


def check_same(source: Path, facts: dict[str, Any], target: Path) -> None:
    """ValueError where the run kept in `target` has another configuration, as far as it is kept, or another base."""
    there = json.loads((target / FINAL / FACTS).read_text())
    kept, now = there["config"], json.loads(json.dumps(facts["config"]))
    sizes = [config.get("trainer", {}).get("tasks_per_step") for config in (kept, now)]
    if None in sizes and there.get("trained_steps") == facts.get("trained_steps"):
        for config in (kept, now):  # a run that went on after a kill names what was left to the ranks
            config.get("trainer", {}).pop("tasks_per_step", None)
    bases = [known.get("fingerprint") for known in (there, facts)]
    different = [f"fingerprint: {bases[0]} kept, {bases[1]} now"] if None not in bases and len(set(bases)) > 1 else []
    different += [
        f"{section}: {kept.get(section)} kept, {now.get(section)} now"
        for section in {**kept, **now}
        if kept.get(section) != now.get(section)
    ]
    if different:
        raise ValueError(f"{source}: not the run kept in {target}: {'; '.join(different)}; remove the kept one")


def check_same_predictions(source: Path, target: Path) -> None:
    """ValueError where the kept predictions are of another training, or of another machine's arithmetic: further scores
    would then be held against ones that are not their run's.
    """
    if not (source / PREDICTIONS).is_file():
        return
    if not pd.read_parquet(source / PREDICTIONS).equals(pd.read_parquet(target / PREDICTIONS)):
        raise ValueError(
            f"{source}: not the predictions kept in {target}: of another training; remove the kept run, or keep these "
            "under another name"
        )


def without_paths(facts: dict[str, Any]) -> dict[str, Any]:
    """A summary without places of files, and without the scores' numbers, which lie beside it.

    Of the tasks: the lists of names as they are, and of a file of lists its name. An empty `scores` says: finished.
    """
    config = facts["config"]
    kept = {section: config[section] for section in SECTIONS}
    tasks = config["tasks"]
    kept["tasks"] = {key: tasks[key] for key in OF_TASKS if key in tasks}
    kept["tasks"]["lists"] = tasks["lists"] and Path(tasks["lists"]).name
    kept["trainer"] = {key: config["trainer"][key] for key in OF_TRAINER}
    kept["model"] = {key: value for key, value in config["model"].items() if key != "name"}
    return {**facts, "scores": [], "config": kept}


if __name__ == "__main__":
    main()
