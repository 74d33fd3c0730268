"""Keep a comparison's rows: what its tables and plots are made of, without weights, logs and paths of the machine.

    python benchmarks/comparison_rows.py runs/compare/cls23-smollm2

writes benchmarks/results/compare/NAME, an ordinary comparison's folder of finished runs (their steps, summaries, scores
and predictions), from which `analyse` makes the tables and plots again, and which another session's runs can join.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from abmll.compare.analysis import analyse
from abmll.compare.command import INDEX
from abmll.provenance import provenance
from abmll.score_files import PREDICTIONS, SCORES

RESULTS = Path(__file__).resolve().parent / "results" / "compare"
# what the analysis reads of a run's configuration, and a reader needs to make the run again
SECTIONS = ("seed", "adapters", "method", "eval")
OF_TASKS = ("batch_size", "max_tokens", "too_long", "demonstrations", "demonstrate")
OF_TRAINER = ("episodes", "epochs", "tasks_per_step", "parallel_episodes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="folder of a comparison")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    index = json.loads((arguments.comparison / INDEX).read_text())
    folder = arguments.results / index["name"]
    for written in keep(arguments.comparison, index, folder, provenance()):
        print(written)


def keep(comparison: Path, index: dict[str, Any], folder: Path, made: dict[str, Any]) -> list[Path]:
    """Copy the finished runs that `folder` has not yet, list them beside those that it has, and analyse all."""
    folder.mkdir(parents=True, exist_ok=True)
    there = folder / INDEX
    runs = {run["folder"]: run for run in json.loads(there.read_text())["runs"]} if there.is_file() else {}
    for run in index["runs"]:
        source, target = comparison / run["folder"], folder / run["folder"]
        summary = source / "final/summary.json"
        if not summary.is_file() or "scores" not in (facts := json.loads(summary.read_text())):
            continue
        known = runs.get(run["folder"], {"scores": {}, "provenance": made})
        scores = {n: place for n, place in run["scores"].items() if (source / place / PREDICTIONS).is_file()}
        kept = {key: value for key, value in run.items() if key != "overrides"}
        runs[run["folder"]] = {**kept, "scores": {**known["scores"], **scores}, "provenance": known["provenance"]}
        (target / "final").mkdir(parents=True, exist_ok=True)
        if (source / "metrics.jsonl").is_file():  # not of a run that trains nothing
            shutil.copyfile(source / "metrics.jsonl", target / "metrics.jsonl")
        (target / "final/summary.json").write_text(json.dumps(without_paths(facts), indent=1) + "\n")
        for place in scores.values():
            (target / place).mkdir(parents=True, exist_ok=True)
            for name in (SCORES, PREDICTIONS):
                shutil.copyfile(source / place / name, target / place / name)
    index = {"name": index["name"], "baselines": index["baselines"], "runs": list(runs.values())}
    there.write_text(json.dumps(index, indent=1) + "\n")
    return analyse(folder)


def without_paths(facts: dict[str, Any]) -> dict[str, Any]:
    """A summary without names of files and folders, and without the scores, which lie beside it."""
    config = facts["config"]
    kept = {section: config[section] for section in SECTIONS}
    kept["tasks"] = {key: config["tasks"][key] for key in OF_TASKS if key in config["tasks"]}
    kept["trainer"] = {key: config["trainer"][key] for key in OF_TRAINER}
    kept["model"] = {key: value for key, value in config["model"].items() if key != "name"}
    return {**{key: value for key, value in facts.items() if key != "scores"}, "config": kept}


if __name__ == "__main__":
    main()
