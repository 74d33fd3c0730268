"""What a comparison consists of: its YAML file, and the runs that the file stands for.

    models x task sets x methods x settings x seeds, each with the overrides of all of them, in this order

Where the file has a `tune` section, every method's settings are chosen first, on tasks that are neither training nor
test tasks: see `abmll.compare.tuning`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from abmll.config import Config, ConfigError, load_config, override_texts, resolve_path
from abmll.config.errors import duplicates, show
from abmll.config.files import read_layers
from abmll.config.settings import check_settings, is_folder_name
from abmll.config.task_lists import resolve_task_lists
from abmll.config.yaml_text import parse
from abmll.trained_with import refuse_unread

Overrides = dict[str, Any]  # section.key -> value
Named = dict[str, Overrides]
Cell = tuple[str, str, str]  # model, task set, method
PLAIN = "plain"  # a run's own scores
OF_TEST = "method.test_"  # keys of the adaptation to an unseen task, which no training reads
ONLY = "methods"  # beside overrides: the methods that a setting or a way of scoring is for
SET_BY_US = {"seed": "set the comparison's `seeds`", "output": "set the comparison's `output`"}  # of each run


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
    seeds: list[int] = Field(
        default=[0], min_length=1, description="Of the tries; not the comparison's where a seed makes its own tasks."
    )
    overrides: Overrides = Field(default_factory=dict, description="Of the tries alone, such as fewer episodes.")
    select_by: Literal["nll_options", "nll", "brier", "ece", "accuracy", "macro_f1"] = "nll_options"


class Comparison(BaseModel):
    """A comparison as its file describes it."""

    model_config = ConfigDict(extra="forbid")
    name: str
    config: str = Field(description="The configuration that all runs start from.")
    output: str = Field(description="The comparison's folder.")
    overrides: Overrides = Field(default_factory=dict)
    models: Named = Field(default={"model": {}}, min_length=1)
    task_sets: Named = Field(default={"tasks": {}}, min_length=1)
    methods: Named = Field(min_length=1)
    settings: Named = Field(default={"default": {}}, min_length=1)
    seeds: list[int] = Field(default=[0], min_length=1)
    tune: Tuning | None = None
    scores: Named = Field(default_factory=dict, description="Further ways to score each finished run.")
    baselines: list[str] = Field(default_factory=list, description="The methods that the others are tested against.")

    @field_validator("name")
    @classmethod
    def _folder(cls, value: str) -> str:
        if not is_folder_name(value):
            raise ValueError(f"{value!r}: names a folder; use letters, digits, `-`, `_`, `+` and `.`, 100 at most")
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


def load_comparison(path: str | Path, overrides: tuple[str, ...] = ()) -> Comparison:
    """The comparison that a file describes; `overrides` (section.key=value) apply to all of its runs, behind its own.

    ConfigError with a line for every unknown key, wrong value, method, task or override.
    """
    try:
        found = _with_all_tasks(Comparison.model_validate(_read(path)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {line}" for line in error.problems) from None
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
        raise ConfigError(lines) from None
    problems = [f"{path}: {line}" for line in _problems(found, overrides)]
    if problems:
        raise ConfigError(problems)
    return found


def output_of(overrides: Sequence[str]) -> tuple[str | None, tuple[str, ...]]:
    """The comparison's folder, where the command line names another one than the file, and the other overrides."""
    output, others = None, []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or key.strip() != "output":
            others.append(text)
            continue
        output = parse(value, f"override: {text}")
        if not isinstance(output, str) or not output:
            raise ConfigError([f"override: {text}: {show(output)}: must be text; name the comparison's folder"])
    return output, tuple(others)


def _read(path: str | Path) -> dict[str, Any]:
    """What the file says, and of its bases what it does not. `overrides` are put together; all else is one value."""
    data: dict[str, Any] = {}
    for name, layer in reversed(read_layers(path)):
        if isinstance(layer.get("config"), str):  # relative to the file that names it
            layer["config"] = str(resolve_path(layer["config"], name))
        if isinstance(layer.get("overrides"), dict):
            layer["overrides"] = {**data.get("overrides", {}), **layer["overrides"]}
        data |= layer
    return data


def _with_all_tasks(comparison: Comparison) -> Comparison:
    """`tasks.missing: error` unless a file says otherwise: seeds over different tasks would be put into one mean."""
    with suppress(ConfigError):  # told with the runs' own mistakes
        sections = [layer.get("tasks") for _, layer in read_layers(comparison.config)]
        if any(isinstance(section, dict) and "missing" in section for section in sections):
            return comparison
    return comparison.model_copy(update={"overrides": {"tasks.missing": "error", **comparison.overrides}})


def missing_tasks(config: Config, config_path: str, needed: Collection[str] = ()) -> str | None:
    """What a run would look for in vain: the tasks' folder, or tasks in it: where `tasks.missing` is `error` any,
    else those of `needed`.
    """
    if config.tasks.source != "jsonl":
        return None
    folder = resolve_path(config.tasks.folder, config_path)
    if not folder.is_dir():
        return f"tasks.folder: {folder}: no such folder; set tasks.folder to the folder that holds the tasks"
    lists = resolve_task_lists(config.tasks, lambda path: resolve_path(path, config_path))
    names = dict.fromkeys((*lists.train, *lists.test, *(lists.validation if config.eval.every else ())))
    lost = [name for name in names if not (folder / name).is_dir()]
    remedy = "prepare them, take them out of the lists, or set tasks.missing=warn"
    if config.tasks.missing != "error":
        lost = [name for name in lost if name in needed]
        remedy = "prepare them, or take them out of the list"
    if not lost:
        return None
    return f"tasks.folder: {folder}: {len(lost)} listed tasks are not there: {', '.join(lost)}; {remedy}"


def jobs(comparison: Comparison, chosen: Mapping[Cell, Overrides], extra: tuple[str, ...]) -> list[Job]:
    """The runs, in an order in which all methods of one seed come before the next seed.

    `chosen`: each (model, task set, method)'s settings, of a comparison that tunes.
    """
    found = []
    for seed, model, task_set, setting, method in itertools.product(
        comparison.seeds, comparison.models, comparison.task_sets, comparison.settings, comparison.methods
    ):
        if method not in _methods_of(comparison, comparison.settings[setting]):
            continue
        layers = (
            comparison.overrides,
            comparison.models[model],
            comparison.task_sets[task_set],
            comparison.methods[method],
            chosen.get((model, task_set, method), {}),
            without_methods(comparison.settings[setting]),
        )
        folder = f"{model}/{task_set}/{method}/{setting}/seed-{seed}"
        scores = {
            name: without_methods(values)
            for name, values in comparison.scores.items()
            if method in _methods_of(comparison, values)
        }
        found.append(Job(model, task_set, method, setting, seed, folder, (*_texts(layers, seed), *extra), scores))
    return found


def _texts(layers: tuple[Overrides, ...], seed: int) -> tuple[str, ...]:
    merged: Overrides = {}
    for layer in layers:
        merged |= layer
    return (*override_texts(merged), f"seed={seed}")


def without_methods(values: Overrides) -> Overrides:
    return {key: value for key, value in values.items() if key != ONLY}


def _methods_of(comparison: Comparison, values: Overrides) -> list[str]:
    return values.get(ONLY, list(comparison.methods))


def lists_of(tuning: Tuning, method: str) -> dict[str, list[Any]]:
    """A method's values to try, by section.key, or by several joined by + that take one value."""
    return tuning.grid.get(method, tuning.grid.get("all", {}))


def grid_of(tuning: Tuning, method: str) -> list[Overrides]:
    """A method's tries, in the order of its lists."""
    lists = lists_of(tuning, method)
    return [
        {key: value for keys, value in zip(lists, values, strict=True) for key in keys.split("+")}
        for values in itertools.product(*lists.values())
    ]


def tries(comparison: Comparison, extra: tuple[str, ...]) -> dict[Cell, list[Try]]:
    """Each cell's combinations, of the cells that have more than one to try. Those that differ in the adaptation to
    an unseen task alone (`OF_TEST`) share a training: the first one's runs are scored as the others say, too.
    """
    found = {}
    for cell in cells(comparison):
        grid = grid_of(comparison.tune, cell[2])
        of_cell: list[Try] = []
        first: dict[str, int] = {}  # by what is trained, the first try's number
        for number, values in enumerate(grid if len(grid) > 1 else ()):
            own = _runs_of_try(comparison, extra, cell, values, number)
            of_test = {key: value for key, value in values.items() if key.startswith(OF_TEST)}
            trained = repr([item for item in values.items() if item[0] not in of_test])
            if trained in first and not _chooses_theta(comparison, own[0]):
                own, name = of_cell[first[trained]].runs, f"try-{number}"
                for job in own:
                    job.scores[name] = of_test
                of_cell.append(Try(values, own, name))
            else:
                first[trained] = number
                of_cell.append(Try(values, own, PLAIN))
        if of_cell:
            found[cell] = of_cell
    return found


def _chooses_theta(comparison: Comparison, job: Job) -> bool:
    """Whether validations on the way choose the run's theta, so that the adaptation is a part of its training."""
    with suppress(ConfigError):  # told with the other mistakes
        settings = load_config(comparison.config, job.overrides).eval
        return settings.every is not None and settings.select_by is not None
    return True


def _runs_of_try(
    comparison: Comparison, extra: tuple[str, ...], cell: Cell, values: Overrides, number: int
) -> list[Job]:
    tuning = comparison.tune
    plain = comparison.model_copy(update={"settings": {"default": {}}, "seeds": tuning.seeds, "scores": {}})
    validation = {"tasks.test": tuning.tasks} if tuning.tasks else {}
    over = (*override_texts(tuning.overrides), *extra, *override_texts(validation))
    return [
        replace(
            job,
            setting=f"try-{number}",
            folder=f"tuning/{job.model}/{job.task_set}/{job.method}/try-{number}/seed-{job.seed}",
            overrides=(*job.overrides, *over),
            scores={},
            needed=tuple(tuning.tasks),
        )
        for job in jobs(plain, {cell: values}, ())
        if (job.model, job.task_set, job.method) == cell
    ]


def place_of_score(name: str) -> str:
    """Where a run keeps a score, relative to its folder."""
    return "." if name == PLAIN else f"scores/{name}"


def cells(comparison: Comparison) -> list[Cell]:
    return list(itertools.product(comparison.models, comparison.task_sets, comparison.methods))


def _problems(comparison: Comparison, extra: tuple[str, ...]) -> Iterator[str]:
    known = set(comparison.methods)
    for section in ("settings", "scores"):
        for name, values in getattr(comparison, section).items():
            unknown = [method for method in values.get(ONLY, []) if method not in known]
            if unknown:
                yield f"{section}.{name}.{ONLY}: {unknown}: no such methods here; known: {', '.join(sorted(known))}"
    for method in comparison.baselines:
        if method not in known:
            yield f"baselines: {method}: no such method here; known: {', '.join(sorted(known))}"
    for name, values in comparison.scores.items():
        try:
            refuse_unread(override_texts(without_methods(values)))
        except ConfigError as error:  # the runs would be trained first
            yield from (f"scores.{name}: {line}" for line in error.problems)
    if PLAIN in comparison.scores:
        yield f"scores.{PLAIN}: is the name of a run's own scores; take another"
    if twice := duplicates(comparison.seeds):
        yield f"seeds: {twice}: listed twice; list each once"
    yield from _set_by_us(comparison, extra)
    told: dict[str, None] = {}  # in order, each once
    for job in jobs(comparison, {}, extra):
        if job.seed == comparison.seeds[0]:
            for overrides in ((), *(override_texts(values) for values in job.scores.values())):
                told |= dict.fromkeys(_run_problems(comparison, [*job.overrides, *overrides], job.method))
    yield from told
    if comparison.tune:
        yield from _grid_problems(comparison, extra)


def _set_by_us(comparison: Comparison, extra: tuple[str, ...]) -> Iterator[str]:
    """Keys that would do nothing, or train one seed for all."""
    named = [("overrides", comparison.overrides)]
    for section in ("models", "task_sets", "methods", "settings"):
        named += [(f"{section}.{name}", values) for name, values in getattr(comparison, section).items()]
    if comparison.tune:
        named.append(("tune.overrides", comparison.tune.overrides))
        named += [
            (f"tune.grid.{method}", {key: None for keys in lists for key in keys.split("+")})
            for method, lists in comparison.tune.grid.items()
        ]
    named.append(("override", {text.partition("=")[0].strip(): None for text in extra}))
    for place, values in named:
        for key in values:
            if key in SET_BY_US:
                yield f"{place}: {key}: each run has its own; {SET_BY_US[key]}"


def _run_problems(comparison: Comparison, overrides: list[str], method: str) -> Iterator[str]:
    try:
        config = load_config(comparison.config, overrides)
    except ConfigError as error:
        yield from (f"{method}: {line}" for line in error.problems)
        return
    if comparison.tune:
        yield from _leaks(comparison, config)


def _grid_problems(comparison: Comparison, extra: tuple[str, ...]) -> Iterator[str]:
    tuning, known = comparison.tune, set(comparison.methods)
    for method in tuning.grid:
        if method not in known | {"all"}:
            yield f"tune.grid: {method}: no such method here; known: all, {', '.join(sorted(known))}"
    without = [m for m in comparison.methods if m not in tuning.grid and not lists_of(tuning, m)]  # {}: as it is
    if without:
        yield f"tune.grid: nothing to try for {', '.join(without)}; add them, or `all`"
    told: dict[str, None] = {}
    given = {text.partition("=")[0].strip() for text in extra}
    for method in comparison.methods:
        for key in sorted(given & {key for keys in lists_of(tuning, method) for key in keys.split("+")}):
            told[f"override: {key}: is to be chosen by tune.grid for {method}; take it out of one of the two"] = None
    for (_, _, method), of_cell in tries(comparison, extra).items():
        for one in of_cell:
            try:
                load_config(comparison.config, [*one.runs[0].overrides, *override_texts(one.values), *extra])
            except ConfigError as error:
                told |= dict.fromkeys(f"tune: {method}: {line}" for line in error.problems)
    yield from told


def _leaks(comparison: Comparison, config: Config) -> Iterator[str]:
    """Choosing on a test task would be cheating, and on a training task no test of what is to be found."""
    tuning = comparison.tune
    if config.tasks.source == "builtin":  # a seed's test tasks are its tries' validation tasks
        if tuning.tasks:
            yield "tune.tasks: the builtin source makes its own tasks, of which none can be named; take them out"
        if shared := sorted(set(tuning.seeds) & set(comparison.seeds)):
            yield f"tune.seeds: {shared}: among `seeds`, whose generated tasks are the test tasks; name others"
        return
    if not tuning.tasks:
        yield "tune.tasks: none; name validation tasks that are neither training nor test tasks"
    lists = resolve_task_lists(config.tasks, lambda path: resolve_path(path, comparison.config))
    for role in ("train", "test"):
        shared = sorted(set(tuning.tasks) & set(getattr(lists, role)))
        if shared:
            yield f"tune.tasks: {', '.join(shared)}: among the {role} tasks; name others"
