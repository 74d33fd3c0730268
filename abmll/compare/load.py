"""A comparison's file read and checked, before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from abmll.compare.grid import jobs, lists_of, tries, without_methods
from abmll.compare.schema import ONLY, PLAIN, SWEPT_KEYS, Cell, Comparison, Overrides, parse_name, swept_value
from abmll.config import Config, ConfigError, load_config, override_texts, resolve_path
from abmll.config.errors import duplicates, show
from abmll.config.files import read_layers
from abmll.config.messages import Key, describe
from abmll.config.method_keys import unread_keys
from abmll.config.settings import flat, in_effect
from abmll.config.task_lists import resolve_task_lists
from abmll.config.yaml_text import parse
from abmll.trained_with import LOADED, refuse_unread

_UNREAD = f"which reads nothing that differs; take it out, or list the methods that do under `{ONLY}`"
SET_BY_US = {"seed": "set the comparison's `seeds`", "output": "set the comparison's `output`"}  # of each run


def load_comparison(path: str | Path, overrides: tuple[str, ...] = ()) -> Comparison:
    """The comparison that a file describes; `overrides` (section.key=value) apply to all of its runs, behind its own.

    ConfigError with a line for every unknown key, wrong value, method, task or override.
    """
    try:
        found = _with_all_tasks(Comparison.model_validate(_read(path)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {line}" for line in error.problems) from None
    except ValidationError as error:
        told: dict[Key, list[ErrorDetails]] = {}
        for one in error.errors(include_url=False):
            told.setdefault(one["loc"], []).append(one)
        lines = [line for key, errors in told.items() for line in describe(key, errors, Comparison).splitlines()]
        raise ConfigError(f"{path}: {line}" for line in lines) from None
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
            below = data.get("overrides")
            layer["overrides"] = {**(below if isinstance(below, dict) else {}), **layer["overrides"]}
        data |= layer
    return data


def _with_all_tasks(comparison: Comparison) -> Comparison:
    """`tasks.missing: error` unless a file says otherwise: seeds over different tasks would be put into one mean."""
    with suppress(ConfigError):  # told with the runs' own mistakes
        sections = [layer.get("tasks") for _, layer in read_layers(comparison.config)]
        if any(isinstance(section, dict) and "missing" in section for section in sections):
            return comparison
    return comparison.model_copy(update={"overrides": {"tasks.missing": "error", **comparison.overrides}})


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
        if told := _read_before_scoring(values):
            yield f"scores.{name}: {', '.join(told)}: a score is of a trained run, which has its own; make it a setting"
        if shared := _shared_name(name, comparison.settings):
            yield f"scores.{name}: is a point of what the setting {shared} is one of, too; take another name"
    if PLAIN in comparison.scores:
        yield f"scores.{PLAIN}: is the name of a run's own scores; take another"
    if twice := duplicates(comparison.seeds):
        yield f"seeds: {twice}: listed twice; list each once"
    yield from _set_by_us(comparison, extra)
    yield from _made_alike(comparison, extra)
    told: dict[str, None] = {}  # in order, each once
    for job in jobs(comparison, {}, extra):
        if job.seed == comparison.seeds[0]:
            told |= dict.fromkeys(_run_problems(comparison, job.overrides, job.method, "settings", job.setting))
            for name, values in job.scores.items():
                overrides = [*job.overrides, *override_texts(values)]
                told |= dict.fromkeys(_run_problems(comparison, overrides, job.method, "scores", name))
    yield from told
    if not told:
        yield from _without_effect(comparison, extra)
    if comparison.tune:
        yield from _grid_problems(comparison, extra)


def _without_effect(comparison: Comparison, extra: tuple[str, ...]) -> Iterator[str]:
    """Settings and scores whose values a method does not read: its rows would tell of a difference that is none."""
    seen: dict[Cell, dict[str, dict[str, Any]]] = {}
    for job in jobs(comparison, {}, extra):
        if job.seed != comparison.seeds[0]:
            continue
        values = _values(comparison, job.overrides)
        others = seen.setdefault((job.model, job.task_set, job.method), {})
        for other, before in others.items():
            if _same(before, values):
                yield f"settings.{job.setting}: the same as {other} for {job.method}, {_UNREAD}"
        others[job.setting] = values
        for name, overrides in job.scores.items():
            if _same(values, _values(comparison, [*job.overrides, *override_texts(overrides)])):
                yield f"scores.{name}: the same as a run's own scores for {job.method}, {_UNREAD}"


def _values(comparison: Comparison, overrides: Sequence[str]) -> dict[str, Any]:
    """A run's whole configuration by `section.key`."""
    return flat(load_config(comparison.config, overrides).model_dump(mode="json"))


def _same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    one, other = in_effect(before, now)
    return one == other


def _read_before_scoring(values: Overrides) -> list[str]:
    """Keys that a score would change too late: what was loaded depends on them."""
    return [key for key in values if key.startswith(LOADED)]


def _shared_name(score: str, settings: Collection[str]) -> str | None:
    """The setting with the score's name, or of its sweep: trained with a value and scored with it is not the same."""
    sweep, _ = parse_name(score)  # of a name without a number the name itself
    return next((name for name in settings if name == score or parse_name(name)[0] == sweep not in (name, score)), None)


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


def _made_alike(comparison: Comparison, extra: tuple[str, ...]) -> Iterator[str]:
    """Overrides for all runs of what some of them are there to differ in."""
    for section in ("models", "task_sets", "methods", "settings"):
        named = getattr(comparison, section)
        for key in dict.fromkeys(text.partition("=")[0].strip() for text in extra):
            if len({repr(values.get(key)) for values in named.values()}) > 1:
                setting = [name for name, values in named.items() if key in values]
                yield f"override: {key}: is what {section} differ in ({', '.join(setting)}); change it there"


def _run_problems(
    comparison: Comparison, overrides: Sequence[str], method: str, section: str, name: str
) -> Iterator[str]:
    try:
        config = load_config(comparison.config, overrides)
    except ConfigError as error:
        yield from (f"{method}: {line}" for line in error.problems)
        return
    if section == "scores" and config.tasks.source == "builtin" and config.seed != comparison.seeds[0]:
        yield f"scores.{name}: seed: a run may be trained on what the tasks of another seed are made of; take it out"
    sweep, number = parse_name(name)
    if sweep in SWEPT_KEYS and (value := swept_value(config.model_dump(mode="json"), sweep)) != number:
        keys = " or ".join(SWEPT_KEYS[sweep])
        yield f"{section}.{name}: {method} has {value:g} there ({keys}), and the name says another; change one of them"
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
    listed = {f"tune.grid.{name}: {keys}": values for name, own in tuning.grid.items() for keys, values in own.items()}
    for place, values in {"tune.seeds": tuning.seeds, **listed}.items():
        if twice := duplicates(map(repr, values)):
            told[f"{place}: {', '.join(twice)}: listed twice; list each once"] = None
    given = {"override": {text.partition("=")[0].strip() for text in extra}, "tune.overrides": set(tuning.overrides)}
    for method in comparison.methods:
        tried = {key for keys in lists_of(tuning, method) for key in keys.split("+")}
        for place, keys in given.items():
            for key in sorted(keys & tried):
                told[f"{place}: {key}: is to be chosen by tune.grid for {method}; take it out of one of the two"] = None
    for (_, _, method), of_cell in tries(comparison, extra, least=1).items():
        unread = {key for keys in tuning.grid.get(method, {}) for key in keys.split("+")}
        for one in of_cell:
            overrides = [*one.runs[0].overrides, *override_texts(one.values), *extra]
            try:
                unread &= unread_keys(_values(comparison, overrides))
            except ConfigError as error:
                told |= dict.fromkeys(f"tune: {method}: {line}" for line in error.problems)
                unread = set()
        told |= dict.fromkeys(f"tune.grid.{method}: {key}: {method} does not read it; take it out" for key in unread)
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
