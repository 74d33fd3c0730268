"""From a comparison's folder to tidy frames: every scored example, scores by task, costs and learning curves by run.

`comparison.json` lists the runs. A run's scores have names: `plain`, or what was done to get them. NAME-NUMBER
(`samples-8`, `pruning-0.1`) is one point of a sweep over NAME.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open

from abmll.config.schema import MethodConfig
from abmll.methods import METHODS
from abmll.metrics import Predictions, score
from abmll.summary import FACTS, THETA
from abmll.uncertainty import error_auroc, uncertainty

COMPARISON, PREDICTIONS = "comparison.json", "predictions.parquet"
PLAIN, STANDARD = "plain", "standard"
SIGNALS = ("confidence", "variance", "mutual_information")  # of which each may point at errors


@dataclass(frozen=True)
class Comparison:
    """A comparison's results; rows of all frames name their run by its number, the index of `runs`.

    runs: task_set, model, method, seed, label (method and what varies within it), a column for each setting.
    predictions: one row a scored test example, columns as in predictions.parquet, with run and score.
    scores: one row a run, score, steps and task: the columns of `runs` and of `score_columns`, and every metric.
    costs: one row a run. curves: one row an outer step or validation. skipped: what is not there, and why.
    """

    name: str
    baselines: tuple[str, ...]
    settings: tuple[str, ...]
    runs: pd.DataFrame
    predictions: pd.DataFrame
    scores: pd.DataFrame
    costs: pd.DataFrame
    curves: pd.DataFrame
    skipped: tuple[str, ...]


def load_comparison(folder: Path) -> Comparison:
    """Read what is finished. ValueError where nothing is, or the folder holds no comparison."""
    try:
        listed = json.loads((folder / COMPARISON).read_text())
    except OSError as error:
        raise ValueError(
            f"comparison {folder}: no {COMPARISON} ({error}); name a folder that compare.py wrote"
        ) from error
    runs, predictions, costs, curves, skipped = {}, [], [], [], []
    for number, run in enumerate(listed["runs"]):
        place = folder / run["folder"]
        if not (place / "final" / FACTS).is_file():
            skipped.append(f"{run['folder']}: not finished")
            continue
        runs[number] = run
        config = json.loads((place / "final" / FACTS).read_text())["config"]
        for name, where in run["scores"].items():
            if not (place / where / PREDICTIONS).is_file():
                skipped.append(f"{run['folder']}: not scored as {name}")
                continue
            own = _own_predictions(pd.read_parquet(place / where / PREDICTIONS), config["method"]["name"])
            predictions.append(own.assign(run=number, score=name))
        lines = _lines(place / "metrics.jsonl")
        costs.append({"run": number, **_costs(lines, config, place)})
        curves += [{"run": number, **point} for point in _curve(lines)]
    if not predictions:
        raise ValueError(
            f"comparison {folder}: none of its {len(listed['runs'])} runs is finished; run compare.py again"
        )
    keys = tuple(dict.fromkeys(key for run in runs.values() for key in run["setting"]))
    frame, examples = _runs(runs, keys), pd.concat(predictions, ignore_index=True)
    return Comparison(
        name=listed["name"],
        baselines=tuple(listed["baseline_methods"]),
        settings=keys,
        runs=frame,
        predictions=examples,
        scores=_scores(examples, frame),
        costs=frame.join(pd.DataFrame(costs).set_index("run"), how="inner"),
        curves=pd.DataFrame(curves, columns=["run", "step", "episode", "nll", "accuracy", "ece"]),
        skipped=tuple(skipped),
    )


def as_predictions(examples: pd.DataFrame) -> Predictions:
    """Rows of `predictions` as the metrics take them; NaN beyond an example's options becomes 0, a NaN row stays."""
    options = examples[option_columns(examples)].to_numpy(dtype=np.float64)
    diverged = np.isnan(options[:, :1])
    return Predictions(
        options=torch.tensor(np.where(np.isnan(options) & ~diverged, 0.0, options)),
        correct_vocabulary=torch.tensor(examples["correct_vocabulary"].to_numpy(dtype=bool)),
        nll=torch.tensor(examples["nll"].to_numpy(dtype=np.float64)),
        label=torch.tensor(examples["label"].to_numpy(dtype=np.int64)),
    )


def option_columns(examples: pd.DataFrame) -> list[str]:
    return sorted((name for name in examples.columns if re.fullmatch(r"p\d+", name)), key=lambda name: int(name[1:]))


def confidence_and_correct(examples: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The largest option probability [n] and whether it is the right option's [n]."""
    options = as_predictions(examples).options
    confidence, choice = options.max(dim=1)
    return confidence.numpy(), choice.numpy() == examples["label"].to_numpy()


def value_text(value: Any) -> str:
    """A setting's value; `default` where it is not set."""
    if pd.isna(value):
        return "default"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def describe(method: str, setting: dict[str, Any]) -> str:
    """`abmll, beta 1e-12`: a method and those of its settings that are given."""
    parts = [f"{key.rpartition('.')[2]} {value_text(value)}" for key, value in setting.items() if not pd.isna(value)]
    return ", ".join([method, *parts])


def varied(runs: pd.DataFrame, settings: Iterable[str]) -> list[str]:
    """The settings that take more than one value in these runs, of which some may lack it."""
    return [key for key in settings if runs[key].nunique(dropna=False) > 1]


def _runs(runs: dict[int, dict[str, Any]], keys: tuple[str, ...]) -> pd.DataFrame:
    names = ("task_set", "model", "method", "seed")
    rows = [
        {**{name: run[name] for name in names}, **{key: _plain_value(run["setting"].get(key)) for key in keys}}
        for run in runs.values()
    ]
    frame = pd.DataFrame(rows, index=pd.Index(runs, name="run"), columns=[*names, *keys])
    for _, part in frame.groupby(["task_set", "model", "method"]):
        differ = varied(part, keys)
        for number, row in part.iterrows():
            frame.loc[number, "label"] = describe(row["method"], {key: row[key] for key in differ})
    return frame


def _plain_value(value: Any) -> float | str:
    """A setting's value as a number, or as text; NaN where it is not set."""
    if value is None:
        return np.nan
    return value if isinstance(value, int | float) and not isinstance(value, bool) else json.dumps(value).strip('"')


def score_columns(name: str) -> dict[str, Any]:
    """What a score's name says: the sweep it belongs to (`plain` without one), its value there, and its condition.

    Samples and corrections are free for anyone to use, and compete under the standard condition. Other sweeps (pruning,
    support size) change the problem: each of their points is a condition, under which only like is compared with like.
    """
    found = re.fullmatch(r"(.+?)-(\d+(?:\.\d+)?(?:e-?\d+)?)", name)
    family, value = (found[1], float(found[2])) if found else (name, np.nan)
    return {"family": family, "value": value, "condition": name if found and family != "samples" else STANDARD}


def _scores(examples: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (run, name, steps, task), part in examples.groupby(["run", "score", "steps", "task"], sort=False):
        predictions = as_predictions(part)
        confidence, correct = confidence_and_correct(part)
        signals = {"confidence": 1 - confidence, **{key: part[key].to_numpy() for key in SIGNALS[1:]}}
        rows.append(
            {
                "run": run,
                "score": name,
                **score_columns(name),
                "steps": steps,
                "task": task,
                **asdict(score(predictions)),
                **asdict(uncertainty(predictions)),
                **{f"auroc_{key}": error_auroc(signal, correct) for key, signal in signals.items()},
            }
        )
    scores = runs.join(pd.DataFrame(rows).set_index("run"), how="inner").reset_index()
    scores["label"] = np.where(scores["score"] == PLAIN, scores["label"], scores["label"] + ", " + scores["score"])
    return scores


def _own_predictions(examples: pd.DataFrame, method: str) -> pd.DataFrame:
    """On test tasks, by the run's method: the pretrained model that a run scores beside it has runs of its own."""
    pretrained = examples["method"] == "pretrained"
    return examples[(pretrained == (method == "pretrained")) & (examples["split"] == "test")]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _costs(lines: list[dict[str, Any]], config: dict[str, Any], folder: Path) -> dict[str, float]:
    """Of training alone: validation and scoring are no part of it. Parameters are theta's, and phi has as many."""
    steps = [line for line in lines if "seconds" in line]
    method = METHODS[config["method"]["name"]](MethodConfig.model_validate(config["method"]))
    episodes = max((line["episode"] for line in steps), default=0)
    with safe_open(folder / "final" / THETA, "np") as theta:
        parameters = sum(int(np.prod(theta.get_slice(name).get_shape())) for name in theta.keys())  # noqa: SIM118
    return {
        "seconds": sum(line["seconds"] for line in steps),
        "episodes": episodes,
        "inner_steps": episodes * method.config.inner_steps if method.inner_loop else 0,
        "outer_steps": len(steps) * method.updates_per_episode,
        "tokens": round(sum(line["real_tokens_per_second"] * line["seconds"] for line in steps)),
        "peak_memory_bytes": max((line["peak_memory_bytes"] for line in steps), default=np.nan),
        "parameters": parameters,
    }


def _curve(lines: list[dict[str, Any]]) -> list[dict[str, float]]:
    """NLL of the last inner step by outer step, and the validation's accuracy and ECE after adaptation."""
    episode = {line["step"]: line["episode"] for line in lines if "seconds" in line}
    points = []
    for line in lines:
        place = {"step": line["step"], "episode": episode.get(line["step"], 0)}
        adapted = [key for key in line if key.startswith("validation_")]
        if adapted:
            found = line[max(adapted, key=lambda key: int(key.split("_")[1]))]
            points.append({**place, "accuracy": found["accuracy"], "ece": found["ece"]})
        elif "nll_last" in line:
            points.append({**place, "nll": line["nll_last"]})
    return points
