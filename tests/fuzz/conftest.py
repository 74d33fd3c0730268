from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "trainer"), str(Path(__file__).parent)]


@pytest.fixture(autouse=True, scope="module")
def without_waiting_for_the_disk():
    """Thousands of small files; that they reach the disk is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("abmll.files.sync", lambda path: None)
        yield
