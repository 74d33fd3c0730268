"""Configurations, overrides and the YAML files beside them: a configuration, or ConfigError with lines."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from damage import NASTY, damaged, fuzz, scalars, values
from hypothesis import example, given
from hypothesis import strategies as st

from abmll.compare.load import load_comparison
from abmll.config import Config, ConfigError, load_config, read_settings
from abmll.config.deepspeed import load_deepspeed
from abmll.config.schema import TasksConfig
from abmll.config.task_lists import resolve_task_lists
from abmll.config.yaml_text import MOST_CHARACTERS, parse

ROOT = Path(__file__).parents[2]
TINY = (ROOT / "configs/tiny.yaml").read_bytes()
COMPARISON = (ROOT / "configs/compare/tiny.yaml").read_bytes()
SECTIONS = {name: sorted(getattr(field.annotation, "model_fields", {})) for name, field in Config.model_fields.items()}
KEYS = [f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys] + ["seed", "output"]
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(b)}: &{chr(b)} [{', '.join(10 * ['*' + chr(b - 1)])}]\n" for b in range(ord("b"), ord("k"))
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("config") / "run.yaml"


def written(value: object) -> bytes:
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode(errors="surrogatepass")
    except (ValueError, RecursionError):
        return b"a: 1"


def is_told(error: ConfigError) -> None:
    assert error.problems and all(error.problems) and len(str(error)) < 100_000


@fuzz
@given(
    damaged(TINY)
    | st.binary(max_size=200)
    | values.map(written)
    | st.dictionaries(
        st.sampled_from(sorted(SECTIONS)),
        st.one_of(*(st.dictionaries(st.sampled_from(keys), values, max_size=3) for keys in SECTIONS.values() if keys)),
        max_size=3,
    ).map(written)
)
@example(BOMB.encode())
@example(b"a: &a [*a]")
@example(b"a: &a {b: *a}")
@example(b"seed: !!int x")
@example(b"seed: !!timestamp x")
@example(b"seed: !!bool x")
@example(b"seed: !!float x")
@example(b"seed: " + b"9" * 5000)
@example(b"seed: !!int 0x" + b"f" * 9000)
@example(b"method: {beta: 1" + b"0" * 400 + b"}")
@example(b"a: " + b"[" * 20_000)
@example(b"a: " + b"[" * 200 + b"]" * 200)
@example(b"seed: 1\nseed: 2")
@example(b"seed: \x00")
@example("seed: \ud800".encode(errors="surrogatepass"))
@example(b"? [a, b]\n: c")
@example(b"? {a: b}\n: c")
@example(b"base: run.yaml")
@example(b"base: [")
@example(b"base: " + b"x" * 5000)
@example(b'base: "\\0"')
@example(b"1: 2\n.nan: 3\nnull: 4")
def test_any_file_is_a_configuration_or_an_error(file, data):
    file.write_bytes(data)
    try:
        assert isinstance(load_config(file), Config)
    except ConfigError as error:
        is_told(error)


@fuzz
@given(
    st.lists(
        st.one_of(
            st.text(max_size=30),
            st.tuples(st.sampled_from(KEYS), st.text(max_size=20) | st.sampled_from(NASTY)).map("=".join),
            st.tuples(st.sampled_from(KEYS), scalars).map(lambda pair: f"{pair[0]}={pair[1]}"),
        ),
        max_size=3,
    )
)
@example(["tasks." + "a." * 5000 + "b=1"])
@example(["seed=" + "[" * 5000])
@example(["=", "a=", ".=.", "seed", "tasks.hub.=1", "tasks.hub.x.y.z=1", "seed.a=1", "model=1", "model=null"])
@example(["tasks.hub={x: {path: p, input: i, options: o, label: l, options_pattern: '((((('}}"])
def test_any_overrides_are_a_configuration_or_an_error(overrides):
    try:
        assert isinstance(load_config(ROOT / "configs/tiny.yaml", overrides), Config)
    except ConfigError as error:
        is_told(error)


LISTS, SETTINGS = b"train: [a, b]\ntest: [c]\n", b"one: {eval.samples: 8}\ntwo:\n"
JSON = (ROOT / "configs/deepspeed/zero2.json").read_bytes()


@fuzz
@given(damaged(LISTS) | damaged(SETTINGS) | damaged(COMPARISON) | damaged(JSON) | values.map(written))
@example(b'{"zero_optimization": ' + b"[" * 100_000)
@example(b'{"zero_optimization": ' + b"9" * 5000 + b"}")
@example(b"name: ../../out\nmethods: {a: {}}\nconfig: x\noutput: y")
def test_the_other_files_are_read_or_refused(file, data):
    file.write_bytes(data)
    tasks = TasksConfig(lists=str(file), folder="f")
    for read in (
        load_comparison, read_settings, load_deepspeed, lambda path: resolve_task_lists(tasks, Path),
    ):  # fmt: skip
        try:
            read(file)
        except ValueError as error:
            assert str(error)


def test_an_alias_costs_what_it_stands_for(file):
    """A line a level, ten times the values of the one before: refused without making them."""
    started = time.monotonic()
    with pytest.raises(ConfigError, match="stands for more than 100,000 values"):
        parse(BOMB, "here")
    assert time.monotonic() - started < 5
    with pytest.raises(ConfigError, match="a value that holds itself"):
        parse("a: &a [*a]", "here")
    assert parse("a: &a [1, 2]\nb: *a", "here") == {"a": [1, 2], "b": [1, 2]}


def test_what_is_too_much_is_told(file):
    for text in ("[" * 100 + "]" * 100, "[" * 900_000, "{a: " * 5000, "- " * 40 + "x", "- " * 3000):
        started = time.monotonic()
        with pytest.raises(ConfigError, match="nested"):
            parse(text, "here")
        assert time.monotonic() - started < 5  # of 3,000 brackets in a line PyYAML took five seconds
    with pytest.raises(ConfigError, match=r"1,000,001 characters"):
        parse(" " * (MOST_CHARACTERS + 1), "here")
    with pytest.raises(ConfigError, match=r"here:1: .*tag"):
        parse("a: !!set {b}", "here")
