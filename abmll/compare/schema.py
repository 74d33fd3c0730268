"""A comparison as its YAML file describes it, and one run of its grid."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, field_validator

from abmll.config.errors import show
from abmll.config.settings import check_settings, is_folder_name, whole_sections

Overrides = dict[str, Any]  # section.key -> value
Named = dict[str, Overrides]
Cell = tuple[str, str, str]  # model, task set, method
PLAIN = "plain"  # a run's own scores
NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
ONLY = "methods"  # beside overrides: the methods that a setting or a way of scoring is for
# where a sweep's value stands in a configuration, the first that is not null
SWEPT_KEYS = {
    "c": ("adapters.log_variance_offset",),
    "beta": ("method.beta",),
    "inner_lr": ("method.inner_lr",),
    "outer_lr": ("method.outer_lr",),
    "test_lr": ("method.test_lr",),
    "steps": ("method.test_steps", "method.inner_steps"),
    "samples": ("eval.samples",),
    "pruning": ("eval.prune.fraction",),
    "pruning_projections": ("eval.prune.fraction",),
}


def parse_name(name: str) -> tuple[str, float]:
    """The sweep that a setting or a score is a point of, and its value there; the name itself and NaN without one."""
    found = re.fullmatch(f"(.+?)-({NUMBER})", name)
    return (found[1], float(found[2])) if found else (name, math.nan)


def swept_value(config: Mapping[str, Any], sweep: str) -> float:
    """What a configuration has where a sweep of this name sets another value; NaN where that is not known."""
    for key in SWEPT_KEYS.get(sweep, ()):
        value: Any = config
        for name in key.split("."):
            value = (value or {}).get(name)
        if value is not None:
            return float(value)
    return math.nan


def single_keys(values: Overrides) -> Overrides:
    """The same. ValueError where one is a whole section."""
    if lines := whole_sections(values):
        raise ValueError("; ".join(lines))
    return values


Seed = Annotated[int, Strict()]  # true is none
SingleKeys = Annotated[Overrides, AfterValidator(single_keys)]


class Tuning(BaseModel):
    """How settings are chosen: every method tries all combinations of its grid, and the best mean score counts."""

    model_config = ConfigDict(extra="forbid")
    tasks: list[str] = Field(
        default_factory=list,
        description="Validation tasks: neither training nor test tasks. None where the source makes its own by seed.",
    )
    grid: dict[str, dict[str, list[Any]]] = Field(
        min_length=1,
        description="method, or `all` for those not named -> section.key, or several joined by + -> values to try.",
    )
    seeds: list[Seed] = Field(
        default=[0], min_length=1, description="Of the tries; not the comparison's where a seed makes its own tasks."
    )
    overrides: SingleKeys = Field(default_factory=dict, description="Of the tries alone, such as fewer episodes.")
    select_by: Literal["nll_options", "nll", "brier", "ece", "accuracy", "macro_f1"] = "nll_options"

    @field_validator("grid")
    @classmethod
    def _values_of_keys(cls, value: dict[str, dict[str, list[Any]]]) -> dict[str, dict[str, list[Any]]]:
        for method, lists in value.items():
            for keys, values in lists.items():
                if not values:
                    raise ValueError(f"{method}: {keys}: no values to try; name one or more, or take it out")
                for one in values:
                    single_keys({keys: one})
        return value


class Comparison(BaseModel):
    """A comparison as its file describes it."""

    model_config = ConfigDict(extra="forbid")
    name: str
    config: str = Field(description="The configuration that all runs start from.")
    output: str = Field(description="The comparison's folder.")
    overrides: SingleKeys = Field(default_factory=dict)
    models: Named = Field(default={"model": {}}, min_length=1)
    task_sets: Named = Field(default={"tasks": {}}, min_length=1)
    methods: Named = Field(min_length=1)
    settings: Named = Field(default={"default": {}}, min_length=1)
    seeds: list[Seed] = Field(default=[0], min_length=1)
    tune: Tuning | None = None
    scores: Named = Field(default_factory=dict, description="Further ways to score each finished run.")
    baselines: list[str] = Field(default_factory=list, description="The methods that the others are tested against.")

    @field_validator("name")
    @classmethod
    def _folder(cls, value: str) -> str:
        if not is_folder_name(value):
            raise ValueError(f"{value!r}: names a folder; use letters, digits, `-`, `_`, `+` and `.`, 100 at most")
        return value

    @field_validator("settings", "scores")
    @classmethod
    def _lists_of_methods(cls, value: Named) -> Named:
        for name, values in value.items():
            if ONLY in values and not (
                isinstance(values[ONLY], list) and values[ONLY] and all(isinstance(one, str) for one in values[ONLY])
            ):
                raise ValueError(f"{name}: {ONLY}: {show(values[ONLY])}: list one method or more, or leave it out")
        return value

    @field_validator("models", "task_sets", "methods", "settings", "scores", mode="before")
    @classmethod
    def _named(cls, value: Any, info) -> Named:
        return check_settings(value, info.field_name)


@dataclass(frozen=True)
class Job:
    """One run: its place in the grid, its folder within the comparison's, and the overrides that make it."""

    model: str
    task_set: str
    method: str
    setting: str
    seed: int
    folder: str
    overrides: tuple[str, ...]
    scores: Named
    needed: tuple[str, ...] = ()  # tasks that must be there, whatever tasks.missing says

    def facts(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in ("overrides", "scores", "needed")}


@dataclass(frozen=True)
class Try:
    """One combination of a method's grid, the runs (one a seed) that it is scored by, and the name of that score."""

    values: Overrides
    runs: list[Job]
    score: str
