"""Made-up comparisons: folders as compare.py leaves them, with predictions drawn from methods of known skill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from abmll.summary import save_summary

OPTIONS = (2, 3, 4)
PARAMETERS = 24  # of every made-up theta
BATCH_SIZE = 4  # of every made-up run


def listed_run(method: str, seed: int = 0, setting: str = "default", scores: Sequence[str] = ("plain",)):
    """A run as comparison.json lists it."""
    return {
        "task_set": "cls-23",
        "model": "random:tiny",
        "method": method,
        "setting": setting,
        "seed": seed,
        "folder": f"runs/{method}/{setting}/seed-{seed}",
        "scores": {name: f"scores/{name}" for name in scores},
    }


def write_comparison(folder: Path, runs: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    listed = {"name": "made up", "baselines": ["pretrained", "lora", "reptile"], "runs": runs}
    (folder / "comparison.json").write_text(json.dumps(listed))


def write_run(
    folder: Path,
    method: str,
    scores: dict[str, pd.DataFrame],
    lines: Sequence[dict[str, Any]] = (),
    inner_steps: int = 5,
    config: dict[str, Any] | None = None,
) -> None:
    """A finished run: its summary, the lines of its steps, and a parquet file for every score folder.

    `config`: sections of its configuration, `method` beside name and inner_steps.
    """
    plain = {"method": {}, "tasks": {"batch_size": BATCH_SIZE}, "eval": {"samples": 0, "prune": {"fraction": 0.0}}}
    config = {**plain, **(config or {})}
    config["method"] = {"name": method, "inner_steps": inner_steps, **config["method"]}
    facts = {"config": config, "parameters": PARAMETERS, "scores": []}
    save_summary(folder / "final", {"a": torch.zeros(2, 8), "b": torch.zeros(8, 1)}, facts)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for place, frame in scores.items():
        (folder / place).mkdir(parents=True)
        frame.to_parquet(folder / place / "predictions.parquet")


def examples_of(
    options: Sequence[Sequence[float]],
    labels: Sequence[int],
    method: str = "abmll",
    task: str = "task",
    steps: int = 5,
    variance: Sequence[float] | None = None,
) -> pd.DataFrame:
    """Rows of predictions.parquet, the vocabulary being the options."""
    count = max(map(len, options))
    probabilities = np.array([[*row, *[np.nan] * (count - len(row))] for row in options], dtype=np.float64)
    own = probabilities[np.arange(len(labels)), list(labels)]
    frame = pd.DataFrame(probabilities, columns=[f"p{number}" for number in range(count)])
    return frame.assign(
        method=method,
        split="test",
        steps=steps,
        task=task,
        example=range(len(labels)),
        label=list(labels),
        nll=-np.log(own),
        correct_vocabulary=np.nanargmax(np.where(np.isnan(probabilities), -1, probabilities), axis=1) == labels,
        variance=np.nan if variance is None else variance,
        mutual_information=np.nan if variance is None else np.array(variance) * 2,
    )


def steps_of(count: int, seconds: float = 2.0, final_nll: float = 1.0, seed: int = 0) -> list[dict[str, Any]]:
    """metrics.jsonl of `count` outer steps of two episodes, with a validation at every fifth."""
    random, lines = np.random.default_rng(seed), []
    for step in range(1, count + 1):
        fall = float(np.exp(-4 * step / count))
        nll = final_nll + fall + random.normal(0, 0.25)
        lines.append(
            {
                "step": step,
                "episode": 2 * step,
                "epoch": 0,
                "nll_last": nll,
                "seconds": seconds,
                "real_tokens_per_second": 100.0,
                "peak_memory_bytes": 10**9 + step,
            }
        )
        if step % 5 == 0:
            accuracy = 0.9 - 0.2 * final_nll - 0.2 * fall + random.normal(0, 0.02)
            adapted = {"accuracy": accuracy, "ece": 0.1 * final_nll + 0.2 * fall}
            lines.append(
                {"step": step, "validation_0_steps": {"accuracy": 0.1, "ece": 0.5}, "validation_5_steps": adapted}
            )
    return lines


def drawn(
    method: str,
    seed: int,
    skill: float,
    steps: int,
    tasks: int = 12,
    n: int = 60,
    sharpness: float = 1.5,
    samples: bool = False,
) -> pd.DataFrame:
    """Predictions of a method with some skill. Tasks differ in difficulty and label frequencies, the same for all
    methods; on every third one nothing is learned but the commonest label."""
    frames = []
    for number in range(tasks):
        task = np.random.default_rng(100 + number)
        count = OPTIONS[number % len(OPTIONS)]
        labels = task.choice(count, size=n, p=task.dirichlet(np.full(count, 3.0)))
        difficulty, noise = task.uniform(0.5, 1.5), task.normal(size=(n, count))
        own = np.random.default_rng([seed, number, *map(ord, method)])
        learned = 0.0 if number % 3 == 0 else skill * difficulty * own.uniform(0.8, 1.2)
        logits = learned * np.eye(count)[labels] + 0.7 * noise + 0.5 * own.normal(size=(n, count))
        if number % 3 == 0:
            logits = 4 * np.eye(count)[[np.bincount(labels).argmax()] * n] + 0.1 * noise
        probabilities = np.exp(sharpness * logits)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        variance = (probabilities * (1 - probabilities)).mean(axis=1) * own.uniform(1e-3, 3e-2, size=n)
        frames.append(
            examples_of(probabilities, labels, method, f"task-{number}", steps, variance if samples else None)
        )
    return pd.concat(frames, ignore_index=True)


def write_full_comparison(
    folder: Path, tasks: int = 12, n: int = 60, seeds: int = 3, betas: Sequence[float] = ()
) -> None:
    """Every kind of row that tables and plots know: sampled and pruned scores, a sweep of beta, an unfinished run."""
    skills = {"pretrained": 0.3, "lora": 1.0, "reptile": 1.2, "abmll": 1.6}
    settings = [(name, "default", skill) for name, skill in skills.items()]
    settings += [("abmll", f"beta-{beta:g}", 1.6 - 0.3 * number) for number, beta in enumerate(betas)]
    runs = []
    for method, setting, skill in settings:
        lost = {"plain": 0.0}  # the share of the skill that a score costs
        if setting == "default":
            each = 1.5 if method == "abmll" else 3.0
            lost |= {f"pruning-{fraction}": each * fraction for fraction in (0.01, 0.1, 0.2, 0.3)}
            if method == "abmll":
                lost["samples-8"] = 0.0
        for seed in range(seeds):
            run = listed_run(method, seed, setting, list(lost))
            runs.append(run)
            scores = {
                f"scores/{score}": pd.concat(
                    drawn(method, seed, kept * skill * (1 - share), steps, tasks, n, samples=score == "samples-8")
                    for steps, kept in ((0, 0.1), (5, 1.0))
                )
                for score, share in lost.items()
            }
            lines = [] if method == "pretrained" else steps_of(50, final_nll=1.2 / skill, seed=seed)
            write_run(folder / run["folder"], method, scores, lines)
    write_comparison(folder, [*runs, listed_run("fomaml")])
