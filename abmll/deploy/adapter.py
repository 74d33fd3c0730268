"""A task's adapter on disk: phi as safetensors and a card as JSON, sealed by a manifest. No file of it can run code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from abmll.config import Config, Refused, config_from
from abmll.deploy.base import Phi
from abmll.deploy.folder import CARD, written_whole
from abmll.files import damage
from abmll.tensor_files import read_tensors, write_tensors

PHI = "adapter.safetensors"
FORMAT = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseCard(_Part):
    """The model that the adapter belongs to."""

    name: str
    revision: str | None
    fingerprint: str = Field(description="See `abmll.models.fingerprint`.")
    prompts: str | None = Field(None, description="See `Prompter.digest`; None: of an older version.")


class RunCard(_Part):
    """The run whose theta it started from."""

    name: str
    step: int
    theta: str = Field(description="SHA-256 of theta's file.")


class AdaptationCard(_Part):
    examples: int
    truncated: int = Field(0, description="Examples of which tasks.max_tokens leaves a part out.")
    steps: int
    batch_size: int
    loss: list[float] = Field(description="NLL an example before each step, in nats, in the whole vocabulary.")


class ShownExample(_Part):
    """A demonstration: part of every prompt of the task."""

    input: str
    options: list[str]
    output: str


class AdapterCard(_Part):
    """All that is needed to use an adapter, and what is known about it."""

    format: Literal[1] = FORMAT
    task: str
    options: list[str] | None = Field(description="None: each question has its own.")
    base: BaseCard
    run: RunCard
    adaptation: AdaptationCard
    demonstrations: list[ShownExample]
    scores: dict[str, dict[str, float | None]] = Field(
        description="cross_validation (`cross_validation.summarise`), and before_adaptation on the same examples "
        "(`abmll.metrics.Scores`); null: not a number."
    )
    config: dict[str, Any] = Field(description="The run's seed, model, adapters, method and prompts.")
    versions: dict[str, str | None]

    @property
    def temperature(self) -> float | None:
        """What cross-validation says that predictions should be cooled or warmed by; None: nothing."""
        return self.scores.get("cross_validation", {}).get("temperature")

    def run_config(self, source: str | Path, overrides: Sequence[str] = ()) -> Config:
        """A configuration that loads the base with fitting adapters. ConfigError where the card's cannot be used."""
        return config_from(self.config, source, overrides, scoring=True)


def kept_config(config: Config) -> dict[str, Any]:
    """What an adapter keeps of a run's configuration: no paths but the model's."""
    kept = config.model_dump(mode="json", include={"seed", "model", "adapters", "method"})
    prompts = {"batch_size", "max_tokens", "too_long", "demonstrations", "demonstrate"}
    tasks = {"source": "builtin", **config.tasks.model_dump(mode="json", include=prompts)}
    return {**kept, "tasks": tasks, "eval": {"batch_size": config.eval.batch_size}}


def save_adapter(folder: Path, phi: Phi, card: AdapterCard) -> None:
    """Whole or not at all. Refused where the folder holds something else than an adapter."""
    with written_whole(folder, CARD) as partial:
        write_adapter(partial, phi, card)


def write_adapter(folder: Path, phi: Phi, card: AdapterCard) -> None:
    """The two files."""
    write_tensors(folder / PHI, phi)
    told = json.dumps(card.model_dump(), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / CARD).write_text(told, encoding="utf-8")


def load_adapter(folder: str | Path) -> tuple[Phi, AdapterCard]:
    """Refused where the folder holds no whole adapter."""
    folder = Path(folder)
    if not (folder / CARD).is_file():
        raise Refused(f"--adapter: {folder}: holds no {CARD}; name a folder that launch/adapt.py wrote")
    problem = damage(folder)
    if problem is not None:
        raise Refused(f"--adapter: {folder}: {problem}; make it again with launch/adapt.py")
    card = read_card(folder / CARD)
    try:
        return read_tensors(folder / PHI)[0], card
    except ValueError as error:
        raise Refused(f"--adapter: {error}; make it again with launch/adapt.py") from error


def read_card(path: Path) -> AdapterCard:
    """Refused where it is not an adapter's card."""
    try:
        return AdapterCard.model_validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise Refused(
            f"--adapter: {path}: {key}: {first['msg']}; make the adapter again with launch/adapt.py"
        ) from error
