"""The files of a configuration: where they lie, and the one that a file is based on."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from . import yaml_text
from .errors import ConfigError, show
from .messages import Key
from .schema import Config

Layer = tuple[str, dict]  # a file, and what it says
_NOTHING = object()


def read_layers(path: str | Path) -> list[Layer]:
    """(file, what it says) of the file and of what it is based on, itself first."""
    layers, seen = [], []
    while path is not None:
        try:
            path = _existing_file(path)
        except ConfigError as error:
            where = f"{layers[-1][0]}: base: " if layers else ""
            raise ConfigError(f"{where}{line}" for line in error.problems) from None
        if path.resolve() in seen:
            files = ", ".join(name for name, _ in layers)
            raise ConfigError([f"{layers[-1][0]}: base: {path}: a circle ({files}); remove one of their bases"])
        seen.append(path.resolve())
        data = _with_sections(yaml_text.read_mapping(path))
        base = data.pop("base", None)
        if base is not None and not isinstance(base, str):
            raise ConfigError([f"{path}: base: {show(base)}: must be text; name one YAML file"])
        layers.append((str(path), data))
        path = None if base is None else resolve_path(base, path)
    return layers


def merged(below: dict, above: dict) -> dict:
    """What is above, and of what is below the keys that it does not set. A list is one value."""
    both = [key for key in above if isinstance(above[key], dict) and isinstance(below.get(key), dict)]
    return {**below, **above, **{key: merged(below[key], above[key]) for key in both}}


def file_of(key: Key, layers: list[Layer], path: str | Path) -> str:
    """The file that set a key, or the nearest section around it."""
    for length in range(len(key), 0, -1):
        for name, data in layers:
            inside = data
            for part in key[:length]:
                inside = inside.get(str(part), _NOTHING) if isinstance(inside, dict) else _NOTHING
            if inside is not _NOTHING:
                return name
    return str(path)


def resolve_path(path: str | Path, config_path: str | Path) -> Path:
    """Where a path of a configuration lies, as an absolute path.

    A relative one is looked up from the working directory, from the configuration file's folder, and from the
    project's root (the file's nearest ancestor that holds a setup.py); the first that exists counts. Where none
    exists, the answer is the one in the working directory.
    """
    path = Path(path)
    with suppress(RuntimeError):  # ~ of nobody here
        path = path.expanduser()
    folder = Path(config_path).resolve().parent
    root = next((parent for parent in (folder, *folder.parents) if (parent / "setup.py").is_file()), folder)
    candidates = [start / path for start in (Path.cwd(), folder, root)]
    return next((candidate for candidate in candidates if is_there(candidate)), candidates[0])


def is_there(path: Path) -> bool:
    return _can_be(path.exists)


def _can_be(question: Callable[[], bool]) -> bool:
    """Of a path: False too where no file can have such a name."""
    try:
        return question()
    except (OSError, ValueError):
        return False


def _existing_file(path: str | Path) -> Path:
    path = Path(path)
    if _can_be(path.is_file):
        return path
    if _can_be(path.is_dir):
        found = sorted(entry.name for entry in path.glob("*.yaml"))
        hint = f"it is a folder; name a file in it: {', '.join(found)}" if found else "it is a folder; name a YAML file"
    elif not _can_be(path.parent.is_dir):
        hint = f"there is no folder {path.parent}; check the path (the working directory is {Path.cwd()})"
    else:
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml"))
        similar = difflib.get_close_matches(path.name, names, n=3) or names
        hint = f"in {path.parent} there is {', '.join(similar) or 'no YAML file'}; check the path"
    raise ConfigError([f"{str(path)[:300]}: no such configuration file; {hint[:600]}"])


def _with_sections(data: dict) -> dict:
    """A section's header with nothing under it reads as null; it means the section's defaults (or the base's)."""
    sections = {name for name, field in Config.model_fields.items() if is_section(field.annotation)}
    return {key: {} if value is None and key in sections else value for key, value in data.items()}


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
