"""What the pages name is there: files, links, code names, YAML; and the README is short."""

from __future__ import annotations

import dataclasses
import importlib
import re
from typing import Any

import pytest
from pages import PAGES, ROOT, blocks

from abmll.config.yaml_text import parse

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FOLDERS = ("abmll", "benchmarks", "configs", "docs", "kernels", "launch", "tests", ".ci")
METHOD = ROOT / "docs/method.md"
# `docs/extending.md` writes this file
TO_BE_WRITTEN = {"abmll/methods/mean_reptile.py", "abmll/tasks/NAME.py"}
AFTER_TRAINING = re.compile(r"<!-- after training: begin -->.*<!-- after training: end -->", re.DOTALL)


def text_of(page) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_named_in_it_are_there(page):
    for span in re.findall(r"`([^`\n]+)`", text_of(page)):
        if span.partition("/")[0] in FOLDERS and " " not in span and "/" in span and span not in TO_BE_WRITTEN:
            path = re.sub(r"\b[A-Z]{4,}\b", "*", span)  # NAME stands for any
            assert list(ROOT.glob(path)), span


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_its_yaml_is_yaml(page):
    for block in blocks(text_of(page)):
        if block.language == "yaml":
            assert isinstance(parse(block.text, f"{page}:{block.line}"), dict)


def test_every_page_is_in_both_indexes():
    readme, index = text_of(ROOT / "README.md"), text_of(ROOT / "docs/README.md")
    for page in (ROOT / "docs").glob("*.md"):
        if page.name != "README.md":
            assert f"(docs/{page.name})" in readme and f"({page.name})" in index, page.name


def test_the_readme_is_short_and_begins_with_the_two_lines():
    readme = text_of(ROOT / "README.md")
    assert len(readme.splitlines()) <= 200
    first = next(blocks(readme)).text.splitlines()
    assert len(first) == 2 and first[1].strip() == "pip install -e '.[test]' && pytest -n2 --dist=loadfile"
    assert AFTER_TRAINING.search(readme)
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", readme)
    assert "<svg" in (ROOT / picture).read_text() and 'fill="#ffffff"' in (ROOT / picture).read_text()  # on dark too


def found(path: str) -> Any:
    """What a dotted name means: a module's, a class's attribute, or a field of a schema or a dataclass."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            fields = getattr(value, "model_fields", {})
            if dataclasses.is_dataclass(value):
                fields = {field.name: field for field in dataclasses.fields(value)}
            value = fields[name] if name in fields else getattr(value, name)
        return value
    raise ModuleNotFoundError(path)


SYMBOLS = [line.split("|")[1:4] for line in text_of(METHOD).splitlines() if line.startswith("|") and "`abmll." in line]


@pytest.mark.parametrize("row", SYMBOLS, ids=lambda row: row[0].strip())
def test_every_symbol_has_its_name_in_the_code(row):
    names = re.findall(r"`(abmll\.[\w.]+)`", " ".join(row))
    assert names and all(found(name) is not None for name in names)


def test_the_symbols_of_the_method_are_all_there():
    named = " ".join(row[0] for row in SYMBOLS)
    for symbol in (
        "W0",
        "A, B",
        "theta",
        "phi",
        "alpha",
        "c",
        "eps",
        "KL",
        "-log p(theta)",
        "NLL",
        "beta",
        "M",
        "K",
        "G",
    ):
        assert re.search(rf"(?<!\w){re.escape(symbol)}(?!\w)", named), symbol


def test_keys_named_in_backquotes_exist():
    """`section.key` of a section that the configuration has."""
    from abmll.config.reference_page import sections

    listed = list(sections())
    known = {key.path for section in listed for key in section.keys} | {section.path for section in listed}
    tops = {path.partition(".")[0] for path in known if "." in path}
    for page in PAGES:
        for span in re.findall(r"`([a-z_]+\.[a-z_.]+)(?:[=:][^`]*)?`", text_of(page)):
            if span.partition(".")[0] in tops and not span.endswith((".py", ".md", ".json", ".yaml")):
                assert span in known or span.startswith("tasks.hub."), f"{page.name}: {span}"
