"""How long does it take to get a model for a task of one's own? Seconds to load the base, and to adapt.

    python benchmarks/adaptation.py --run runs/quickstart --tasks data/crossfit --only ag_news --output FILE
    python benchmarks/adaptation.py --run RUN --tasks FOLDER --count 8 --output FILE    # eight tasks over one base

Goals: one task of 16 examples within 60 s on two CPU cores with SmolLM2-135M, loading and cross-validation included;
within 5 s a task where eight share a loaded base on a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from abmll import MetaModel
from abmll.provenance import provenance
from abmll.tasks.labelled import draw, read_labelled, task_files


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="output folder of a finished run")
    parser.add_argument("--tasks", required=True, help="folder of tasks, as launch/adapt.py takes it")
    parser.add_argument("--only", nargs="+", help="names of tasks; default: the first --count of the folder")
    parser.add_argument("--count", type=int, default=1, help="tasks side by side")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)

    files = task_files(arguments.tasks)
    names = arguments.only or list(files)[: arguments.count]
    if unknown := set(names) - set(files):
        parser.error(f"--only: {', '.join(sorted(unknown))}: no such task in {arguments.tasks}")
    model, loading = timed(lambda: MetaModel.load(arguments.run, arguments.overrides))
    seed = model.base.config.seed
    tasks = {name: draw(read_labelled(files[name]), arguments.examples, seed, name) for name in names}
    rows = []
    for folds in dict.fromkeys((arguments.folds, 0)):
        adapted, seconds = timed(lambda folds=folds: model.adapt_all(tasks, folds))
        steps = sum(task.card.adaptation.steps for task in adapted.values())
        rows.append({"folds": folds, "steps": steps, "seconds": seconds, "seconds_a_task": seconds / len(tasks)})
    facts: dict[str, Any] = {
        "model": Path(model.base.config.model.name).name,
        "tasks": names,
        "examples": {name: len(examples) for name, examples in tasks.items()},
        "threads": torch.get_num_threads(),
        "loading_seconds": loading,
        "rows": rows,
        "provenance": provenance(),
    }
    print(report(facts))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(facts, indent=1) + "\n")


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    found = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, round(time.perf_counter() - started, 2)


def report(facts: dict[str, Any]) -> str:
    counts = sorted(set(facts["examples"].values()))
    lines = [
        f"{facts['model']}: loaded in {facts['loading_seconds']:.1f} s; {len(facts['tasks'])} tasks of "
        f"{' or '.join(map(str, counts))} examples, {facts['threads']} threads, {facts['provenance']['device']}"
    ]
    for row in facts["rows"]:
        what = f"cross-validation in {row['folds']} folds" if row["folds"] else "no cross-validation"
        total = facts["loading_seconds"] + row["seconds"]
        lines.append(
            f"{what}: {row['seconds']:.1f} s, {row['seconds_a_task']:.1f} s a task; with loading {total:.1f} s"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
