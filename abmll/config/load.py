"""A YAML file and `section.key=value` overrides become a Config, or one error that lists everything wrong with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from abmll.files import write_whole

from . import yaml_text
from .errors import ConfigError, did_you_mean, show
from .files import Layer, file_of, is_section, merged, read_layers
from .messages import Key, describe, dotted, key_of
from .paths import found_beside_bases
from .schema import Config

_SOME_MODEL = {"name": "random:tiny"}  # stands for a model that is not set, so that the rest can be judged


def load_config(path: str | Path, overrides: Sequence[str] = (), scoring: bool = False) -> Config:
    """The run that the file describes, with the overrides applied in order.

    An override is `section.key=value`; its value is YAML, so that `tasks.train=[a, b]` and `eval.every=null` work.
    Values are taken as they are written: `3` is no text and `true` no number; only whole numbers serve as numbers.
    A file may say `base: OTHER.yaml`, and then holds only what differs from it; the other may have a base itself.
    `scoring`: the configuration serves to score tasks, and need not name any to train on.

    Raises ConfigError (a ValueError) with one line for every unknown key, wrong value, malformed override and broken
    rule between keys.
    """
    problems: list[str] = []
    layers: list[Layer] = []
    try:
        layers = read_layers(path)
    except ConfigError as error:
        problems += error.problems
    data: dict = {}
    for _, layer in reversed(layers):
        data = merged(data, layer)
    config = _checked(data, overrides, scoring, problems, lambda key: file_of(key, layers, path))
    return found_beside_bases(config, path, [name for name, _ in layers[1:]])


def config_from(
    saved: Mapping[str, Any], source: str | Path, overrides: Sequence[str] = (), scoring: bool = False
) -> Config:
    """As `load_config`, of what a summary or an adapter keeps: a dumped Config. `source` opens the lines about it."""
    return _checked(copy.deepcopy(dict(saved)), overrides, scoring, [], lambda key: str(source))


def _checked(
    data: dict, overrides: Sequence[str], scoring: bool, problems: list[str], place_of: Callable[[Key], str]
) -> Config:
    """`problems`: what is wrong with the file itself; `place_of` a key: where it was written."""
    readable = not problems
    overridden: list[Key] = []
    for text in overrides:
        try:
            key, value = _parse_override(text)
            _assign(data, key, value, text)
            overridden.append(key)
        except ConfigError as error:
            problems += error.problems

    data.setdefault("model", {})
    data = _as_tuples(data)
    for key, line in _all_problems(data, readable, scoring):
        place = "override" if any(key[: len(part)] == part for part in overridden) else place_of(key)
        problems.append(f"{place}: {line}")
    if problems:
        raise ConfigError(problems)
    return _validated(data, scoring)


def save_config(config: Config, path: str | Path) -> None:
    """Write every key, defaults included, so that `load_config` reads an equal Config back. Makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml_text.dump(config.model_dump(mode="json")))


def _parse_override(text: str) -> tuple[Key, Any]:
    name, equals, value = text.partition("=")
    key = tuple(name.strip().split("."))
    if len(key) > yaml_text.DEEPEST:
        raise ConfigError([f"override: {text[:60]}: names a key of {len(key)} parts; write section.key=value"])
    if not equals or not all(key):
        raise ConfigError([f"override: {text}: is not section.key=value; write for example method.inner_steps=5"])
    if key[0] not in Config.model_fields:
        owners = [f"{section}.{name}" for section, field in Config.model_fields.items() if _has(field.annotation, name)]
        hint = f"did you mean {' or '.join(owners)}?" if owners else did_you_mean(key[0], Config.model_fields)
        raise ConfigError([f"override: {text}: there is no section or key {key[0]}; {hint}"])
    return key, yaml_text.parse(value, f"override: {text}")


def _has(annotation: Any, name: str) -> bool:
    return is_section(annotation) and name in annotation.model_fields


def _assign(data: dict, key: Key, value: Any, text: str) -> None:
    for depth, part in enumerate(key[:-1], start=1):
        inside = data.get(part)
        if inside is None:
            inside = data[part] = {}
        if not isinstance(inside, dict):
            raise ConfigError(
                [f"override: {text}: {dotted(key[:depth])} is {show(inside)}, which has no keys; set it alone"]
            )
        data = inside
    inside = data.get(key[-1])
    # as files are put together: what is not named stays as it was
    data[key[-1]] = merged(inside, value) if isinstance(inside, dict) and isinstance(value, dict) else value


def _as_tuples(value: Any) -> Any:
    """Lists as the tuples that the schema names, and keys as text."""
    if isinstance(value, dict):
        return {str(key): _as_tuples(inner) for key, inner in value.items()}
    return tuple(_as_tuples(inner) for inner in value) if isinstance(value, list) else value


def _all_problems(data: dict, complete: bool, scoring: bool) -> Iterator[tuple[Key, str]]:
    """Every problem as (key, line): those of single keys, and then those between keys that are right in themselves.

    Of an incomplete configuration (its file cannot be read) nothing can be said about what is missing.
    """
    wrong: dict[Key, list[ErrorDetails]] = {}
    for error in _errors(data, scoring):
        if error["type"] != "sections_disagree":
            wrong.setdefault(key_of(error, data), []).append(error)
    for key, errors in wrong.items():
        if complete or errors[0]["type"] != "missing":
            yield key, describe(key, errors)
    if not complete:
        return
    judged = data
    for key in wrong:
        judged = _without(judged, key)
    judged = {**judged, "model": {**_SOME_MODEL, **judged.get("model", {})}}
    for error in _errors(judged, scoring):
        for problem in error.get("ctx", {}).get("problems", ()):
            if not any(_touches(key, tuple(other.split("."))) for key in wrong for other in problem.judged_by):
                yield tuple(problem.key.split(".")), problem.text


def _validated(data: dict, scoring: bool) -> Config:
    return Config.model_validate(data, strict=True, context={"scoring": scoring})


def _errors(data: dict, scoring: bool) -> list[ErrorDetails]:
    try:
        _validated(data, scoring)
    except ValidationError as error:
        return error.errors(include_url=False)
    return []


def _without(data: dict, key: Key) -> dict:
    """A copy without a key. Of a hub task all of it goes, as the rest would miss what the key held."""
    if key[:2] == ("tasks", "hub"):
        key = key[:3]
    if len(key) > 1 and isinstance(data.get(key[0]), dict):
        return {**data, key[0]: _without(data[key[0]], key[1:])}
    return {name: value for name, value in data.items() if name != key[0]}


def _touches(one: Key, other: Key) -> bool:
    """Whether one key lies in the other."""
    length = min(len(one), len(other))
    return one[:length] == other[:length]
