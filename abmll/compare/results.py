"""From a comparison's folder to tidy frames: every scored example, scores by task, costs and learning curves by run.

`comparison.json` lists the runs. Settings and scores have names: `default` and `plain`, or what was set and done. One
of the form NAME-NUMBER (`beta-1e-8`, `samples-8`, `pruning-0.1`) is a point of a sweep over NAME. A score of the form
NAME-NUMBER-WAY (`active-4-entropy`) is no point of its own: it is one way to do what NAME-NUMBER says.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from abmll.compare.calibration import chance_ece, gaps
from abmll.compare.schema import NUMBER, PLAIN, parse_name
from abmll.config.schema import MethodConfig
from abmll.files import whole_lines
from abmll.methods import METHODS, Frequencies
from abmll.metrics import score
from abmll.score_files import PREDICTIONS, as_predictions
from abmll.summary import finished_facts
from abmll.trained_with import completed
from abmll.uncertainty import uncertainty

INDEX = "comparison.json"
TUNING = "tuning.json"  # beside it, where settings were chosen
DEFAULT, STANDARD = "default", "standard"
RUN = ["task_set", "model", "method", "setting", "seed"]


@dataclass(frozen=True)
class Results:
    """A comparison's results; `run` in the frames is the index of `runs`.

    runs: task_set, model, method, setting, seed, and run_label (the method, and its setting unless default).
    predictions: one row a scored test example, columns as in predictions.parquet, with run and score.
    scores: one row a run, score, steps and task: the columns of `runs`, label (run_label, and the score unless plain),
    the sweep, value and condition of the score's name, every metric of `Scores` and `Uncertainty`, the ECE in excess of
    what chance makes of it (ece_excess), and `GAPS`.
    costs: one row a run. curves: one row an outer step (nll: nats an example) or validation. configs: by run, the
    configuration that it was trained and scored with. skipped: what is not there, and why. choices: what
    `abmll.compare.tuning` wrote down.
    """

    name: str
    baselines: tuple[str, ...]
    runs: pd.DataFrame
    predictions: pd.DataFrame
    scores: pd.DataFrame
    costs: pd.DataFrame
    curves: pd.DataFrame
    configs: dict[int, dict[str, Any]]
    skipped: tuple[str, ...]
    choices: tuple[dict[str, Any], ...] = ()


def load_results(folder: Path, index: Path | None = None) -> Results:
    """Read what is finished of the runs in `folder` that comparison.json in `index` (by default there too) lists.

    ValueError where nothing is, or there is no comparison.
    """
    index = index or folder
    try:
        listed = json.loads((index / INDEX).read_text())
    except OSError as error:
        raise ValueError(f"comparison {index}: no {INDEX} ({error}); name a folder that compare.py wrote") from error
    runs, predictions, costs, curves, configs, skipped = {}, [], [], [], {}, []
    for number, run in enumerate(listed["runs"]):
        place = folder / run["folder"]
        facts = finished_facts(place)
        if facts is None:
            skipped.append(f"{run['folder']}: not finished")
            continue
        for name, where in run["scores"].items():
            if not (place / where / PREDICTIONS).is_file():
                skipped.append(f"{run['folder']}: not scored as {name}")
                continue
            own = _own_predictions(pd.read_parquet(place / where / PREDICTIONS), facts["config"]["method"]["name"])
            predictions.append(own.assign(run=number, score=name))
        lines = _lines(place / "metrics.jsonl")
        runs[number] = {key: run[key] for key in RUN}
        configs[number] = completed(facts["config"])
        method = MethodConfig.model_validate(facts["config"]["method"])
        costs.append({"run": number, **_costs(lines, method, facts["parameters"])})
        summed = method.summed_examples(facts["config"]["tasks"]["batch_size"])
        curves += [{"run": number, **point} for point in _curve(lines, summed)]
    if not predictions:
        raise ValueError(f"comparison {index}: none of {len(listed['runs'])} runs is finished; run compare.py again")
    frame = pd.DataFrame(runs.values(), index=pd.Index(runs, name="run"))
    frame["run_label"] = _extended(frame["method"], frame["setting"], DEFAULT)
    examples = pd.concat(predictions, ignore_index=True)
    return Results(
        name=listed["name"],
        baselines=tuple(listed["baselines"]),
        runs=frame,
        predictions=examples,
        scores=_scores(examples, frame),
        costs=frame.join(pd.DataFrame(costs).set_index("run")),
        curves=pd.DataFrame(curves, columns=["run", "step", "episode", "nll", "accuracy", "ece"]),
        configs=configs,
        skipped=tuple(skipped),
        choices=tuple(json.loads((index / TUNING).read_text())) if (index / TUNING).is_file() else (),
    )


def condition(score_name: str) -> str:
    """What a score was taken under.

    A name without a number is a correction (temperature, TFB), free for anyone to use as samples are: both compete
    under the standard condition. NAME-NUMBER (pruning, steps) changes the problem: it is a condition, under which only
    like is compared with like. The ways NAME-NUMBER-WAY to do it compete under NAME-NUMBER.
    """
    found = re.fullmatch(f"((.+?)-{NUMBER})(?:-.+)?", score_name)
    return STANDARD if found is None or found[2] == "samples" else found[1]


def _extended(label: pd.Series, name: pd.Series, unnamed: str) -> pd.Series:
    """`abmll, beta-1e-8`: a label, and a name unless it is the one that goes without saying."""
    return label.where(name == unnamed, label + ", " + name)


def _scores(examples: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (run, name, steps, task), part in examples.groupby(["run", "score", "steps", "task"], sort=False):
        predictions, (sweep, value) = as_predictions(part), parse_name(name)
        place = {"run": run, "score": name, "sweep": sweep, "value": value, "condition": condition(name)}
        confidence, choice = predictions.options.max(dim=1)
        of_bins = gaps(confidence.numpy(), (choice == predictions.label).numpy())
        metrics = {**asdict(score(predictions)), **asdict(uncertainty(predictions)), **of_bins}
        metrics["ece_excess"] = metrics["ece"] - chance_ece(confidence.numpy())
        rows.append({**place, "steps": steps, "task": task, **metrics})
    scores = runs.join(pd.DataFrame(rows).set_index("run"), how="inner").reset_index()
    scores["label"] = _extended(scores["run_label"], scores["score"], PLAIN)
    return scores


def _own_predictions(examples: pd.DataFrame, method: str) -> pd.DataFrame:
    """On test tasks, by the run's method: the pretrained model that a run scores beside it has runs of its own."""
    pretrained = examples["method"] == "pretrained"
    return examples[(pretrained == (method == "pretrained")) & (examples["split"] == "test")]


def _lines(path: Path) -> list[dict[str, Any]]:
    return whole_lines(path) if path.is_file() else []


def _costs(lines: list[dict[str, Any]], settings: MethodConfig, parameters: int) -> dict[str, float]:
    """Of training alone: validation and scoring are no part of it. Parameters are theta's, and phi has as many."""
    steps = [line for line in lines if "seconds" in line]
    method = METHODS[settings.name](settings)
    episodes = max((line["episode"] for line in steps), default=0)
    return {
        "seconds": sum(line["seconds"] for line in steps),
        "episodes": episodes,
        "inner_steps": episodes * method.config.inner_steps if method.inner_loop else 0,
        "outer_steps": len(steps) * method.updates_per_episode,
        "tokens": round(sum(line["real_tokens_per_second"] * line["seconds"] for line in steps)),
        "peak_memory_bytes": max((line["peak_memory_bytes"] for line in steps), default=np.nan),
        "parameters": 0 if isinstance(method, Frequencies) else parameters,
    }


def _curve(lines: list[dict[str, Any]], summed: int) -> list[dict[str, float]]:
    """NLL an example of the last inner step by outer step, and the validation's accuracy and ECE after adaptation.

    `summed`: the examples that the objective's NLL, which the lines have, is summed over.
    """
    episode = {line["step"]: line["episode"] for line in lines if "seconds" in line}
    points = []
    for line in lines:
        place = {"step": line["step"], "episode": episode.get(line["step"], 0)}
        adapted = [key for key in line if key.startswith("validation_")]
        if adapted:
            found = line[max(adapted, key=lambda key: int(key.split("_")[1]))]
            points.append({**place, "accuracy": found["accuracy"], "ece": found["ece"]})
        elif "nll_last" in line:
            points.append({**place, "nll": line["nll_last"] / summed})
    return points
