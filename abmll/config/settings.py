"""Mappings of `section.key` to a value: overrides, named groups of them in a YAML file, a whole configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import yaml_text
from .errors import ConfigError, show
from .method_keys import unread_keys

_NAME = re.compile(r"[\w+-][\w.+-]{0,99}")  # serves as a folder's name


def is_folder_name(name: str) -> bool:
    """Whether a name that comes from data may name a folder: no separator, no `..`, nothing that a shell trips over."""
    return _NAME.fullmatch(name) is not None and re.search(r"\w", name) is not None


def override_texts(values: Mapping[str, Any]) -> list[str]:
    """The overrides as a command line has them: `section.key=value`."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]  # JSON is YAML


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A dumped configuration's values by `section.key`."""
    return {
        f"{section}.{key}" if key else section: value
        for section, values in config.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    }


def in_effect(*configs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Configurations' `flat` values without those that none of them reads: runs that differ there are the same."""
    unread = set.intersection(*(_unread(values) for values in configs))
    return [{key: value for key, value in values.items() if key not in unread} for values in configs]


def _unread(values: Mapping[str, Any]) -> set[str]:
    never = {"eval.select_by", "eval.validation_examples"} if values["eval.every"] is None else set()
    return never | unread_keys(values)


def whole_sections(values: Mapping[str, Any]) -> list[str]:
    """What to say of every key that is a section with its keys below: where several layers set it, the last one would
    take the place of the others instead of being put together with them.
    """
    return [
        f"{key}: {show(value)}: would set the whole section; write "
        + ", ".join(f"{key}.{name}: {show(own)}" for name, own in value.items())
        for key, value in values.items()
        if isinstance(value, dict) and value and "." not in str(key)
    ]


def read_settings(path: str | Path) -> dict[str, dict[str, Any]]:
    """{name: {section.key: value}} from a file. ConfigError with a line for everything that is something else."""
    return check_settings(yaml_text.read_mapping(path), str(path))


def check_settings(named: Any, source: str) -> dict[str, dict[str, Any]]:
    """The same of what a file holds. A name with nothing under it has no overrides."""
    if not isinstance(named, dict):
        raise ConfigError([f"{source}: {show(named)}: must be names, each with `section.key: value` lines"])
    problems = []
    for name, values in named.items():
        if not is_folder_name(str(name)):
            problems.append(
                f"{source}: {show(str(name))[1:-1]}: names a folder; use letters, digits, `-`, `_`, `+` and `.`, at "
                "most 100"
            )
        if values is not None and not isinstance(values, dict):
            problems.append(f"{source}: {name}: {show(values)}: must be `section.key: value` lines")
        elif values:
            problems += [f"{source}: {name}: {line}" for line in whole_sections(values)]
    if problems:
        raise ConfigError(problems)
    return {str(name): {str(key): value for key, value in (values or {}).items()} for name, values in named.items()}
