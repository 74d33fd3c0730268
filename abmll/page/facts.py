"""What a run's folder says of it. Only the configuration must be there: what else is missing is noted, not an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from abmll.config import Refused
from abmll.config.yaml_text import read_mapping
from abmll.deploy.folder import CARD
from abmll.evaluation import Evaluation
from abmll.files import read_json, whole_lines
from abmll.provenance import PROVENANCE
from abmll.score_files import PREDICTIONS, SCORES, SETTINGS, load_scores
from abmll.summary import FACTS, FINAL, THETA
from abmll.tensor_files import read_tensors


@dataclass(frozen=True)
class OtherScores:
    """Scores of the same theta under other settings: RUN/scores/NAME."""

    name: str
    settings: dict[str, Any]
    evaluations: list[Evaluation]


@dataclass(frozen=True)
class RunFacts:
    """A run as its files tell it.

    steps: metrics.jsonl, a row an outer step. validations: a row a validation and number of adaptation steps, with
    step, episode, steps and the scores. episodes: episodes.jsonl. kl_by_layer: nats, a row an outer step, a column a
    layer; empty where none was recorded. summary: final/summary.json without the configuration and the scores.
    notes: what is not there.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    provenance: dict[str, Any]
    steps: pd.DataFrame
    validations: pd.DataFrame
    episodes: pd.DataFrame
    kl_by_layer: pd.DataFrame
    evaluations: list[Evaluation]
    others: list[OtherScores]
    adapters: list[dict[str, Any]]
    theta: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the configuration by `section.key`."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value


def read_runs(folders: Sequence[str | Path]) -> list[RunFacts]:
    """Each folder's facts, under a name of its own. Refused where one holds no run, or is named twice."""
    places = [Path(folder).resolve() for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise Refused(f"RUN: {place}: is named twice; name each run once")
    return [read_run(place, name) for place, name in zip(places, distinct_names(places), strict=True)]


def distinct_names(places: Sequence[Path]) -> list[str]:
    """As many last parts of the paths as tell them apart, without those that all have in common."""
    if len(places) == 1:
        return [places[0].name]
    for count in range(1, max(len(place.parts) for place in places) + 1):
        parts = [place.parts[-count:] for place in places]
        if len(set(parts)) == len(parts):
            break
    differ = [place for place in range(-count, 0) if len({own[max(place, -len(own))] for own in parts}) > 1]
    return ["/".join(own[place] for place in differ if -place <= len(own)) for own in parts]


def read_run(folder: Path, name: str) -> RunFacts:
    """Refused where the folder holds neither config.yaml nor final/summary.json, or a file in it is damaged."""
    try:
        return _read_run(folder, name)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"RUN: {folder}: cannot be read ({type(error).__name__}: {error}); name another run") from error


def _read_run(folder: Path, name: str) -> RunFacts:
    summary = _json(folder / FINAL / FACTS, {})
    summary.pop("scores", None)
    config, notes = summary.pop("config", None), []
    if config is None and not (folder / "config.yaml").is_file():
        raise Refused(f"RUN: {folder}: holds no config.yaml; name the output folder of a run")
    if not summary:
        notes.append("It is not finished: there is no final/summary.json.")
    lines = _lines(folder / "metrics.jsonl")
    steps = pd.DataFrame([line for line in lines if "seconds" in line]).drop(columns="kl_by_layer", errors="ignore")
    layers = summary.get("layers")
    by_layer = [line["kl_by_layer"] for line in lines if "kl_by_layer" in line]
    kl = pd.DataFrame(by_layer, [line["step"] for line in lines if "kl_by_layer" in line])
    if layers and len(layers) == kl.shape[1]:
        kl.columns = layers
    evaluations = _evaluations(folder, notes)
    theta = folder / FINAL / THETA
    return RunFacts(
        name=name,
        folder=folder,
        config=config or read_mapping(folder / "config.yaml"),
        summary=summary,
        provenance=_json(folder / PROVENANCE, {}),
        steps=steps,
        validations=_validations(lines),
        episodes=pd.DataFrame(_lines(folder / "episodes.jsonl")),
        kl_by_layer=kl,
        evaluations=evaluations,
        others=[_other(path, notes) for path in sorted((folder / "scores").glob("*")) if (path / SCORES).is_file()],
        adapters=[_json(path, {}) for depth in ("*", "*/*") for path in sorted(folder.glob(f"{depth}/{CARD}"))],
        theta=read_tensors(theta)[0] if theta.is_file() else {},
        notes=notes,
    )


def _evaluations(folder: Path, notes: list[str]) -> list[Evaluation]:
    """With their predictions, where these are there too."""
    if not (folder / SCORES).is_file():
        notes.append(f"{folder.name}: no scores: there is no {SCORES}.")
        return []
    if (folder / PREDICTIONS).is_file():
        return load_scores(folder)
    notes.append(f"{folder.name}: no {PREDICTIONS}: no curves of confidence, and no intervals.")
    return [Evaluation.from_json(item) for item in _json(folder / SCORES, [])]


def _other(folder: Path, notes: list[str]) -> OtherScores:
    return OtherScores(folder.name, _json(folder / SETTINGS, {}), _evaluations(folder, notes))


def _validations(lines: Sequence[dict[str, Any]]) -> pd.DataFrame:
    episode = {line["step"]: line["episode"] for line in lines if "seconds" in line}
    rows = [
        {"step": line["step"], "episode": episode.get(line["step"], 0), "steps": int(key.split("_")[1]), **scores}
        for line in lines
        for key, scores in line.items()
        if key.startswith("validation_")
    ]
    return pd.DataFrame(rows)


def _json(path: Path, missing: Any) -> Any:
    return read_json(path) if path.is_file() else missing


def _lines(path: Path) -> list[dict[str, Any]]:
    return whole_lines(path) if path.is_file() else []
