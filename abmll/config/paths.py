"""Files and folders that a configuration names, as paths that mean the same from any directory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from .files import is_there, resolve_path
from .schema import Config

_PATHS = {"tasks": ("folder", "lists"), "trainer": ("deepspeed",)}  # keys that name files and folders


def with_absolute_paths(config: Config, config_path: str | Path) -> Config:
    """The configuration with its files and folders resolved, so that it means the same from any directory."""
    found: dict[str, BaseModel] = {}
    for section, named in _named(config).items():
        found[section] = _with(config, section, {key: str(resolve_path(named[key], config_path)) for key in named})
    return with_absolute_model(config.model_copy(update=found))


def with_absolute_model(config: Config) -> Config:
    """The same of the model alone, which a summary and a checkpoint name too."""
    return config.model_copy(update={"model": _with(config, "model", {"name": absolute_model(config.model.name)})})


def absolute_model(name: str) -> str:
    """A model's name; of a folder or file that is there, its absolute path: elsewhere it would be a hub id."""
    path = Path(os.path.expanduser(name))
    local = not name.startswith(("random:", "package:")) and is_there(path)
    return os.path.abspath(path) if local else name


def found_beside_bases(config: Config, path: str | Path, bases: Sequence[str]) -> Config:
    """With what the file at `path` would not find taken from where the files that it is based on find it.

    So the default of trainer.deepspeed is there for every file with a base in this repository.
    """
    found: dict[str, BaseModel] = {}
    for section, named in _named(config).items():
        values: dict[str, str] = {}
        for key, value in named.items():
            places = [resolve_path(value, file) for file in (path, *bases)]
            first = next((place for place in places if is_there(place)), places[0])
            if first != places[0]:
                values[key] = str(first)
        if values:
            found[section] = _with(config, section, values)
    return config.model_copy(update=found) if found else config


def _named(config: Config) -> dict[str, dict[str, str]]:
    """{section: {key: path}} of those that are set."""
    dumped = {section: getattr(config, section).model_dump(include=set(keys)) for section, keys in _PATHS.items()}
    return {section: {key: path for key, path in own.items() if path is not None} for section, own in dumped.items()}


def _with(config: Config, section: str, values: dict[str, str]) -> BaseModel:
    return getattr(config, section).model_copy(update=values)
