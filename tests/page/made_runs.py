"""Made-up run folders as train.py leaves them, with numbers small enough to check by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from abmll.config.schema import Config
from abmll.evaluation import Evaluation
from abmll.metrics import Predictions, pool, score
from abmll.score_files import save_scores
from abmll.summary import save_summary

LAYERS = [f"model.layers.{block}.self_attn.{module}" for block in (0, 1) for module in ("q_proj", "v_proj")]
# probability of option 0, and the label: 3 of 4 right, and 1 of 2
TASKS = {"first task": ((0.9, 0), (0.8, 0), (0.3, 1), (0.6, 1)), "second task": ((0.75, 0), (0.75, 1))}


def predictions(pairs: Any) -> Predictions:
    options = torch.tensor([[p, 1 - p] for p, _ in pairs], dtype=torch.float64)
    label = torch.tensor([right for _, right in pairs])
    own = options.gather(1, label[:, None])[:, 0]
    unknown = torch.full((len(label),), torch.nan, dtype=torch.float64)
    return Predictions(options, options.argmax(dim=1) == label, -own.log(), label, unknown, unknown.clone())


def evaluation(method: str = "abmll", tasks: Any = None, steps: tuple[int, ...] = (0, 2)) -> Evaluation:
    """The same predictions at every number of steps."""
    found = {name: predictions(pairs) for name, pairs in (tasks or TASKS).items()}
    return Evaluation(
        method,
        "test",
        {k: {name: asdict(score(own)) for name, own in found.items()} for k in steps},
        {k: pool(list(found.values())) for k in steps},
        {k: found for k in steps},
    )


def step_lines(count: int = 4, layers: int = len(LAYERS)) -> list[dict[str, Any]]:
    """An episode of half a second and 50 tokens a step, a validation after every other."""
    lines: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        terms = {"nll_first": 4.0 / step, "nll_last": 2.0 / step, "kl": 10.0 * step, "weighted_kl": 0.1 * step}
        speed = {"real_tokens_per_second": 100.0, "padded_tokens_per_second": 125.0, "seconds": 0.5}
        rest = {"skipped_episodes": step // 4, "peak_memory_bytes": 2**30 + step}
        by_layer = {"kl_by_layer": [float(step * (layer + 1)) for layer in range(layers)]} if layers else {}
        lines.append({"step": step, "episode": step, "epoch": 0, **terms, **speed, **rest, **by_layer})
        if step % 2 == 0:
            scores = {"accuracy": 0.5, "ece": 0.2, "nll": 1.0 / step}
            lines.append({"step": step, "validation_0_steps": scores, "validation_2_steps": scores})
    return lines


def theta(layers: list[str], seed: int = 0) -> dict[str, torch.Tensor]:
    """Factors of rank 2 of layers with 6 inputs and 5 outputs."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"a": (2, 6), "b": (5, 2)}
    return {
        f"{layer}.{kind}.{factor}": torch.randn(shape, generator=random)
        for layer in layers
        for kind in ("mean", "log_variance")
        for factor, shape in shapes.items()
    }


def write_run(
    folder: Path,
    lines: list[dict[str, Any]] | None = None,
    evaluations: list[Evaluation] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    episodes: list[dict[str, Any]] | None = None,
    layers: list[str] = LAYERS,
    **sections: Any,
) -> Path:
    """A finished run of rank 2; `sections` override its configuration's."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {"adapters": {"rank": 2, "log_variance_offset": -8.0}, "method": {"inner_steps": 2, "beta": 1e-4}}
    given |= {"model": {"name": "random:tiny"}, "tasks": {"source": "builtin"}}
    merged = {name: {**given.get(name, {}), **sections.get(name, {})} for name in {**given, **sections}}
    config = Config.model_validate(merged).model_dump(mode="json")
    facts = {"config": config, "parameters": 1234, "layers": layers, "step": 4, "trained_steps": 4, "best": None}
    save_summary(folder / "final", theta(layers) if tensors is None else tensors, {**facts, "scores": []})
    for name, rows in (("metrics", step_lines() if lines is None else lines), ("episodes", episodes or [])):
        if rows:
            (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    save_scores(folder, [evaluation()] if evaluations is None else evaluations)
    return folder
