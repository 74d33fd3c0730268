"""Pydantic's errors as lines for the user: where the key is, what its value is, what would be right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails, PydanticUndefined

from . import yaml_text
from .errors import did_you_mean, show
from .schema import Config

Key = tuple[str | int, ...]

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list, [a, b]",
    "list_type": "a list, [a, b]",
    "dict_type": "a mapping (an indented block of `key: value` lines)",
    "model_type": "a mapping (an indented block of `key: value` lines)",
}


def dotted(key: Key) -> str:
    """`tasks.train[2]` for ("tasks", "train", 2)."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".")


def key_of(error: ErrorDetails, data: Any) -> Key:
    """The key in the data that an error is about. Pydantic appends the name of a union's branch to the location."""
    key: Key = ()
    for part in error["loc"]:
        inside = part in data if isinstance(data, dict) else isinstance(part, int) and isinstance(data, tuple)
        if not inside:
            return (*key, part) if error["type"] == "missing" else key
        key, data = (*key, part), data[part]
    return key


def describe(key: Key, errors: list[ErrorDetails], model: type[BaseModel] = Config) -> str:
    """`section.key: value: what is wrong; remedy`, from all the errors (a union gives several) of one key of a file
    that `model` describes.
    """
    first = errors[0]
    if first["type"] == "missing":
        command = f", or add {dotted(key)}=VALUE to the command" if model is Config else ""
        return f"{dotted(key)}: not set: it is required; write it in the file{command}"
    if first["type"] == "value_error":  # a rule of ours, which says what to do
        told = str(first["ctx"]["error"])
        return told if told.startswith(dotted(key)) else f"{dotted(key)}: {told}"
    value = show(first["input"])
    if first["type"] == "extra_forbidden":
        return f"{dotted(key)}: {value}: unknown key; {_unknown(key, model)}"
    wrong = " or ".join(dict.fromkeys(_wrong(error) for error in errors)).replace(" or must be", " or")
    return f"{dotted(key)}: {value}: {wrong}; {_hint(errors) or _default(key, model)}"


def _wrong(error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _EXPECTED:
        return f"must be {_EXPECTED[kind]}"
    if kind == "literal_error":
        return f"must be one of {context['expected']}"
    if kind in ("too_short", "too_long"):
        bound, least = ("at least", "min_length") if kind == "too_short" else ("at most", "max_length")
        return f"must hold {bound} {context[least]} item(s)"
    if kind == "string_too_short":
        return "must not be empty"
    return error["msg"].replace("Input should", "must").replace("Input", "the value")


def _hint(errors: list[ErrorDetails]) -> str:
    """What to write instead, where the value tells it; else nothing."""
    value, kinds = errors[0]["input"], {error["type"] for error in errors}
    if "string_type" in kinds and isinstance(value, bool | int | float):
        return "write it in quotes"
    if "tuple_type" in kinds and isinstance(value, str):
        return f"write [{value}]"
    if kinds & {"int_type", "int_from_float"} and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if kinds & {"int_type", "float_type"} and isinstance(value, str) and yaml_text.is_number(value):
        return f"write it without quotes: {value}"
    if kinds == {"literal_error"}:
        choices = errors[0]["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        hint = did_you_mean(str(value), choices)
        return hint if hint.startswith("did") else ""
    return ""


def _default(key: Key, model: type[BaseModel]) -> str:
    section = _section(key[:-1], model)
    field = section.model_fields.get(str(key[-1])) if section else None
    if field is None or field.is_required():
        return "change it"
    if isinstance(field.default, BaseModel) or field.default is PydanticUndefined:
        return "change it or remove it"
    default = field.default
    if isinstance(default, int) and not isinstance(default, bool):
        default = int(default)  # DeepSpeed's are of a class of its own, which YAML does not know
    text = yaml_text.dump(default).removesuffix("...\n").strip() if not isinstance(default, tuple) else show(default)
    return f"change it, or remove it for the default, {text}"


def _unknown(key: Key, model: type[BaseModel]) -> str:
    section, name = _section(key[:-1], model), str(key[-1])
    owners = [f"{path}.{name}".lstrip(".") for path, other in _sections(model) if name in other.model_fields]
    if owners:
        return f"it belongs elsewhere: write {' or '.join(owners)}"
    return did_you_mean(name, section.model_fields if section else ())


def _section(key: Key, model: type[BaseModel]) -> type[BaseModel] | None:
    """The section that a key names, None where it names something else."""
    parts = list(key)
    while parts:
        field = model.model_fields.get(str(parts.pop(0)))
        if field is None:
            return None
        kind = field.annotation
        if get_origin(kind) is dict:  # a mapping of named sections: the next part is a name
            if not parts:
                return None
            parts.pop(0)
            kind = get_args(kind)[1]
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return None
        model = kind
    return model


def _sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    yield path, model
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _sections(field.annotation, f"{path}.{name}".lstrip("."))
