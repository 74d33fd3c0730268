"""The configuration's keys are frozen in options.txt: an option is added on purpose, and never by the way."""

from __future__ import annotations

from pathlib import Path

from abmll.config.reference_page import sections

LISTED = Path(__file__).with_name("options.txt")


def test_the_keys_are_those_that_were_agreed_on():
    there = {key.path for section in sections() for key in section.keys}
    listed = LISTED.read_text().split()
    assert listed == sorted(set(listed)), f"{LISTED.name}: one key a line, in order"
    assert sorted(there - set(listed)) == [], f"new keys: see CONTRIBUTING.md, and add them to {LISTED.name}"
    assert sorted(set(listed) - there) == [], (
        f"keys that are gone: old configurations fail; remove them in {LISTED.name}"
    )
