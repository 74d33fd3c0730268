"""Do learning curves move with the fused kernels' arithmetic? The same run, same noise, by both backends.

    TRITON_INTERPRET=1 python benchmarks/learning_curves.py                  # a tiny random model, in the interpreter
    python benchmarks/learning_curves.py --config configs/quickstart.yaml    # on a machine with a GPU
    python benchmarks/learning_curves.py --report FILE.json                  # the table of a file's rows

Beside a 16-bit model the fused kernels make the factors' gradients from products with 16 leading bits, and the weight
posterior rounds dy^T x to the 8 bits that dy has (see kernels/fused/gaussian.py and weight.py). A row compares the
losses of every step with those of plain PyTorch, beside two yardsticks of the same run: what other noise makes of the
curve, and what a theta makes of it that is shaken at the start by as much as those products are rounded.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch

from abmll.config import load_config
from abmll.distributed import start_ranks, stop_ranks
from abmll.kernels.backends import interpreted
from abmll.kernels.fused.interpreter import large_blocks
from abmll.provenance import provenance
from abmll.run import open_session

ROOT = Path(__file__).resolve().parent.parent
TINY = f"""
model: {{name: "random:tiny", dtype: bfloat16}}
adapters: {{rank: 8, modules: [v_proj]}}
method: {{inner_steps: 5, inner_lr: 3e-3, outer_lr: 3e-3, test_lr: 3e-3, beta: 1e-13}}
tasks:
  source: builtin
  batch_size: 2
  builtin: {{train_tasks: 8, test_tasks: 2, train_examples: 32, test_examples: 4}}
trainer:
  activation_checkpointing: false
  deepspeed: {ROOT}/configs/deepspeed/zero2.json
eval: {{pretrained: false}}
logging: {{progress_bar: false}}
"""
RUNS = ("plain", "fused", "shaken", "other noise")
POSTERIORS = ("activation", "weight")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a run's YAML; default: a tiny random model")
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--posterior", nargs="+", choices=POSTERIORS, default=POSTERIORS)
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    parser.add_argument("--report", type=Path, metavar="FILE", help="only print a file's table")
    arguments = parser.parse_args(argv)
    if arguments.report:
        print(table(json.loads(arguments.report.read_text())["rows"]))
        return
    with tempfile.TemporaryDirectory() as folder:
        config = arguments.config
        if config is None:
            config = str(Path(folder) / "tiny.yaml")
            Path(config).write_text(TINY)
        rows = [row for posterior in arguments.posterior for row in compare(config, posterior, arguments.episodes)]
    print(table(rows))
    if arguments.output:
        made_of = arguments.config or TINY.replace(f"{ROOT}/", "")  # rows name no folder of a machine
        facts = {**provenance(), "interpreter": interpreted(), "config": made_of, "rows": rows}
        arguments.output.write_text(json.dumps(facts, indent=1) + "\n")


def compare(config: str, posterior: str, episodes: int) -> list[dict]:
    """A row for each run but the plain one: how far its losses are from the plain run's."""
    curves = {name: losses(config, posterior, episodes, name) for name in RUNS}
    plain = curves["plain"]
    return [
        {
            "posterior": posterior,
            "run": name,
            "episodes": episodes,
            "mean_difference": sum(map(abs, differences)) / len(differences),
            "largest_difference": max(map(abs, differences)),
            "first_tenth": mean(curve[: max(len(curve) // 10, 1)]),
            "last_tenth": mean(curve[-max(len(curve) // 10, 1) :]),
            "losses": [float(f"{value:.6g}") for value in curve],
        }
        for name, curve in curves.items()
        for differences in [[one - other for one, other in zip(curve, plain, strict=True)]]
    ]


def losses(config: str, posterior: str, episodes: int, name: str) -> list[float]:
    """The NLL of every inner step, an episode's after another's."""
    found: list[float] = []
    with tempfile.TemporaryDirectory() as folder, large_blocks():
        overrides = [
            f"output={folder}/run",
            f"adapters.posterior={posterior}",
            f"adapters.backend={'triton' if name == 'fused' else 'torch'}",
            f"trainer.episodes={episodes}",
            "eval.every=null",
        ]
        ranks = start_ranks()
        try:
            session, _ = open_session(load_config(config, overrides), config, ranks, False, False)
            trainer = session.trainer
            if name == "other noise":
                trainer.noise_seed += 1
            if name == "shaken":
                shake(trainer.learner.adapters)
            step = trainer.learner.phi_step

            def noted(*arguments):
                terms = step(*arguments)
                found.append(float(terms.nll))
                return terms

            with patch.object(trainer.learner, "phi_step", noted):
                trainer.run()
        finally:
            stop_ranks()
    return found


@torch.no_grad()
def shake(adapters) -> None:
    """Theta's factors by up to 2^-16 of them; phi as theta."""
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.theta.values():
        rounding = 2 * torch.rand(parameter.shape, generator=generator) - 1
        parameter.mul_(1 + 2.0**-16 * rounding.to(parameter.device))
    adapters.reset_phi()


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def table(rows: list[dict]) -> str:
    """Differences of the NLL from plain PyTorch's, and how far the curve falls."""
    lines = ["| posterior | run | steps | mean difference of the NLL | largest | NLL, first tenth | last tenth |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for row in rows:
        cells = (row["posterior"], row["run"], len(row["losses"]))
        numbers = (row["mean_difference"], row["largest_difference"], row["first_tenth"], row["last_tenth"])
        lines.append(f"| {' | '.join(map(str, cells))} | {' | '.join(f'{number:.3g}' for number in numbers)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
