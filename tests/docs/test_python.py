"""Every Python block of README, CONTRIBUTING and docs runs, one page's after another in one namespace."""

from __future__ import annotations

import pytest
from pages import PAGES, ROOT, blocks
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

WITH_BLOCKS = [page for page in PAGES if any(b.language == "python" for b in blocks(page.read_text(encoding="utf-8")))]
NAMES = [str(page.relative_to(ROOT)) for page in WITH_BLOCKS]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=NAMES)
def test_its_blocks_run(page, sandbox):
    document = Sybil(parsers=[PythonCodeBlockParser()]).parse(page)
    examples = list(document.examples())
    assert len(examples) == sum(block.language == "python" for block in blocks(page.read_text(encoding="utf-8")))
    for example in examples:
        example.evaluate()


def test_the_data_example_writes_a_task(sandbox):
    """`docs/own-data.md`: what its block writes, its commands read."""
    from abmll.tasks.jsonl import load_jsonl_tasks

    document = Sybil(parsers=[PythonCodeBlockParser()]).parse(ROOT / "docs/own-data.md")
    for example in document.examples():
        example.evaluate()
    task = load_jsonl_tasks("data/mine", ["refunds"]).tasks["refunds"]
    assert (len(task.train), len(task.test)) == (12, 4)
    assert task.test[0].options == ("delivery", "refund") and {one.output for one in task.train} == {
        "delivery",
        "refund",
    }
