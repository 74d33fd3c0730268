"""The page of all configuration keys, from the schema: python -m abmll.config.reference_page --write FILE"""

from __future__ import annotations

import argparse
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from abmll.config import yaml_text
from abmll.config.schema import Config

INTRODUCTION = """\
# Configuration

Made from `abmll/config/schema.py` by `python -m abmll.config.reference_page --write docs/configuration.md`; a test
fails where this page is older than the schema.

A run is one YAML file. Every key can be set behind a command as `section.key=value`, where the value is YAML:
`tasks.test=[a, b]`, `eval.every=null` (`null` is YAML's word for nothing). A file may say `base: OTHER.yaml` and hold
only what differs from it. Relative paths are looked for in the working directory, the file's folder and the
repository's folder, in this order, and beside the files it is based on; `output`, a model's folder and a hub task's
`path` and `data_files` in the working directory alone. `~` is the home folder. Unknown keys, wrong types and keys that
do not go together are errors, all of them told at once.
"""
_BOUNDS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}


class Key(NamedTuple):
    """One key of a configuration, `section.key`, and its field in the schema."""

    path: str
    field: FieldInfo


class Section(NamedTuple):
    """A section's path, `` for the top, what it is, and its own keys."""

    path: str
    summary: str
    keys: list[Key]


def sections(model: type[BaseModel] = Config, path: str = "") -> Iterator[Section]:
    """The schema's sections in order, those inside of a section behind it; NAME stands for a name of the user's."""
    own, inner = [], []
    for name, field in model.model_fields.items():
        key = f"{path}.{name}".lstrip(".")
        below = _section_of(field.annotation)
        if below is None or below is not field.annotation:  # a section that may be absent is a key as well
            own.append(Key(key, field))
        if below is not None:
            inner.append((below, f"{key}.NAME" if get_origin(field.annotation) is dict else key))
    yield Section(path, (model.__doc__ or "").strip(), own)
    for below, key in inner:
        yield from sections(below, key)


def page(model: type[BaseModel] = Config) -> str:
    """The Markdown page."""
    parts = [INTRODUCTION]
    for section in sections(model):
        parts.append(f"## {section.path or 'Top level'}\n\n{_paragraph(section.summary)}\n")
        rows = [_row(key) for key in section.keys]
        parts.append("\n".join(["| key | type | default | |", "|---|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _paragraph(docstring: str) -> str:
    return "\n".join(line.strip() for line in docstring.splitlines())


def _row(key: Key) -> str:
    cells = (f"`{key.path}`", _type(key.field), _default(key.field), key.field.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {_number(getattr(bound, name))}"
        for bound in field.metadata
        for kind, (sign, name) in _BOUNDS.items()
        if isinstance(bound, kind)
    ]
    least = ["not empty" for bound in field.metadata if isinstance(bound, MinLen) and bound.min_length == 1]
    return ", ".join([_kind(field.annotation), *bounds, *least])


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(FieldInfo.from_annotation(annotation))
    if origin is Literal:
        return " | ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_kind(part) for part in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_kind(arguments[0])}"
        return f"[{'; '.join(_kind(part) for part in arguments)}]"
    if origin is dict:
        return f"mapping of names to {_kind(arguments[1])}"
    if _section_of(annotation) is not None:
        return "section"
    return {str: "text", int: "whole number", float: "number", bool: "true | false", type(None): "null"}[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, float):
        return f"`{_number(value)}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(str(part) for part in value)}]`"
    return f"`{yaml_text.dump(value).removesuffix('...' + chr(10)).strip()}`"


def _number(value: float) -> str:
    return f"2^{int(value).bit_length() - 1}" if value > 1e15 else f"{value:g}".replace("e-0", "e-")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, may hold, or holds by names."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, metavar="FILE", help="the page's file")
    parser.parse_args().write.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
