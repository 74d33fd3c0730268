"""YAML as users of numbers expect it: YAML 1.2's plain scalars, and no key twice.

PyYAML follows YAML 1.1, which reads `1e-5` as text, `010` as 8, `1:30` as 90 and `no` as false. Tags (`!!set`) are
refused, and so is what could take a reader's memory or time: text, values or nesting beyond any configuration's.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path

import yaml
from yaml.error import MarkedYAMLError

from .errors import ConfigError

_SCALARS = (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)|\.nan", "-+.0123456789"),
)


MOST_CHARACTERS, MOST_VALUES, DEEPEST = 1_000_000, 100_000, 30
_KINDS = ("null", "bool", "int", "float", "str", "seq", "map")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012
    yaml_constructors = {  # noqa: RUF012
        None: yaml.SafeLoader.yaml_constructors[None],  # refuses
        **{
            f"tag:yaml.org,2002:{kind}": yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{kind}"]
            for kind in _KINDS
        },
    }

    def __init__(self, text: str):
        super().__init__(text)
        self.repeated: list[tuple[int, str]] = []

    def fetch_flow_collection_start(self, token_class):
        if self.flow_level >= DEEPEST:  # at once: PyYAML's time grows with the square of the depth
            raise MarkedYAMLError(problem=f"nested deeper than {DEEPEST} levels", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None:
            _check_size(node, {}, 1)
        return node

    def construct_mapping(self, node, deep=False):
        first: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                continue  # PyYAML's own error
            if key in first:
                self.repeated.append((line, f"{key}: written twice, first in line {first[key]}; keep one of them"))
            first.setdefault(key, line)
        return super().construct_mapping(node, deep)


# without PyYAML's other bases: a hexadecimal number may be longer than Python will print
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}  # noqa: RUF012


for _name, _pattern, _first in _SCALARS:
    for _side in (_Loader, _Dumper):  # the dumper quotes text that the loader would take for another type
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _check_size(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many values a node stands for, each alias (`*name`) written out. MarkedYAMLError beyond the bounds.

    `known`: those of nodes seen before; 0 for those that the node lies in.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise MarkedYAMLError(problem="a value that holds itself", problem_mark=node.start_mark)
        return known[id(node)]
    if depth > DEEPEST:
        raise MarkedYAMLError(problem=f"nested deeper than {DEEPEST} levels", problem_mark=node.start_mark)
    known[id(node)], count = 0, 1
    if isinstance(node, yaml.CollectionNode):
        for inner in node.value:
            for one in inner if isinstance(inner, tuple) else (inner,):
                count += _check_size(one, known, depth + 1)
    if count > MOST_VALUES:
        raise MarkedYAMLError(problem=f"stands for more than {MOST_VALUES:,} values", problem_mark=node.start_mark)
    known[id(node)] = count
    return count


def parse(text: str, source: str) -> object:
    """The value that YAML text holds. `source` names the text in errors.

    Raises ConfigError where the text is not YAML or a mapping holds a key twice (with line numbers).
    """
    if len(text) > MOST_CHARACTERS:
        raise ConfigError([f"{source}: {len(text):,} characters: a configuration has {MOST_CHARACTERS:,} at most"])
    return copy.deepcopy(_parsed(text, source))


@lru_cache(maxsize=512)  # a comparison reads the same base and overrides for each of its runs
def _parsed(text: str, source: str) -> object:
    loader = None
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except (ValueError, OverflowError, KeyError, RecursionError) as error:  # of a value that its tag does not fit
        what = "nested too deep" if isinstance(error, RecursionError) else f"{error}"[:200]
        raise ConfigError([f"{source}: not valid YAML ({what}); correct the value"]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(
            [f"{where}: not valid YAML ({what}); check the indentation, colons and quotes there"]
        ) from None
    finally:
        if loader is not None:
            loader.dispose()
    if loader.repeated:
        raise ConfigError(f"{source}:{line}: {what}" for line, what in sorted(set(loader.repeated)))
    return value


def is_number(text: str) -> bool:
    """Whether unquoted text would be read as a number."""
    return any(re.fullmatch(pattern, text) for name, pattern, _ in _SCALARS if name in ("int", "float"))


def read_mapping(path: str | Path) -> dict:
    """The mapping that a YAML file holds; an empty file is an empty mapping. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read ({error}); name a YAML file in UTF-8"]) from None
    value = parse(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError([f"{path}: holds a {type(value).__name__}; write `key: value` lines"])
    return value


def dump(value: object) -> str:
    """YAML text that `parse` reads back as `value`."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
