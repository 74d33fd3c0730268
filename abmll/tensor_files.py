"""Tensors in safetensors files, without pickle: by name, or in nested dicts, lists and tuples beside plain values.

Of the latter the tensors are the file's own; the structure around them is JSON in its header, `{"dict": [[key, value],
...]}`, `{"tuple": [...]}` and `{"tensor": name}` beside JSON's lists, numbers and texts. So keys stay what they were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_STRUCTURE = "structure"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> None:
    """As safetensors, texts in its header. OSError where the disk refuses: safetensors' own call hides it."""
    path.write_bytes(save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, texts))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `write_tensors` wrote, on the CPU. ValueError where the file is something else."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from error


def save_state(path: Path, state: Any) -> None:
    """Write `state`. TypeError where it holds something else than tensors and plain values."""
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_packed(state, tensors), separators=(",", ":"))
    write_tensors(path, tensors, {_STRUCTURE: structure})


def load_state(path: Path) -> Any:
    """What `save_state` wrote, tensors on the CPU. ValueError where the file holds anything else."""
    tensors, texts = read_tensors(path)
    try:
        return _unpacked(json.loads(texts[_STRUCTURE]), tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: holds no state of a rank ({type(error).__name__}: {error})") from error


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().clone()  # one storage for each: safetensors shares none
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_packed(key, tensors), _packed(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_packed(inner, tensors) for inner in value]}
    return [_packed(inner, tensors) for inner in value] if isinstance(value, list) else value


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "tuple":
        return tuple(_unpacked(one, tensors) for one in inner)
    if kind == "dict":
        return {_unpacked(key, tensors): _unpacked(one, tensors) for key, one in inner}
    raise ValueError(f"{kind!r} is no kind of value")
