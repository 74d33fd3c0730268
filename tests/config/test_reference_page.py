"""docs/configuration.md: every key of the schema, as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from abmll.config.reference_page import page, sections
from abmll.config.schema import Section

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
KEYS = {key.path: key.field for section in sections() for key in section.keys}


def test_the_page_is_that_of_the_schema():
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "the page is older than the schema: python -m abmll.config.reference_page --write docs/configuration.md"
    )


@pytest.mark.parametrize("path", KEYS)
def test_every_key_has_a_description(path):
    assert KEYS[path].description, f"{path}: give its Field in abmll/config/schema.py a description"


def test_every_section_says_what_it_is():
    assert [section.path for section in sections() if not section.summary] == []


class Inner(Section):
    """What is inside."""

    share: float = Field(0.25, gt=0, lt=1, description="Of a | b.")


class Made(Section):
    """A made-up schema."""

    names: tuple[str, ...] | None = Field(None, min_length=1, description="Names.")
    size: Literal["auto"] | Annotated[int, Field(ge=1)] = Field("auto", description="How many.")
    small: float = Field(1e-5, description="A small number.")
    inner: Inner = Inner()
    others: dict[str, Inner] = Field(default_factory=dict, description="More of them.")
    maybe: Inner | None = Field(None, description="One, or none.")


def test_a_schema_by_hand():
    rows = [line for line in page(Made).splitlines() if line.startswith(("| `", "## "))]
    share = "`{}share` | number, > 0, < 1 | `0.25` | Of a \\| b. |"
    assert rows == [
        "## Top level",
        "| `names` | list of text \\| null, not empty | `null` | Names. |",
        "| `size` | `auto` \\| whole number, ≥ 1 | `auto` | How many. |",
        "| `small` | number | `1e-5` | A small number. |",
        "| `others` | mapping of names to section | `{}` | More of them. |",
        "| `maybe` | section \\| null | `null` | One, or none. |",
        "## inner",
        "| " + share.format("inner."),
        "## others.NAME",
        "| " + share.format("others.NAME."),
        "## maybe",
        "| " + share.format("maybe."),
    ]
