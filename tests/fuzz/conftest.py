"""Properties over generated and damaged files. FUZZ_EXAMPLES=N tries N of them each, at random; the default few are fixed.

An example that takes more than ten seconds fails: nothing that is read may hang.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings

sys.path[:0] = [str(Path(__file__).parents[1] / "trainer"), str(Path(__file__).parent)]

import pytest
from runs import finished, make_run, one_thread, run  # noqa: F401



@pytest.fixture(autouse=True, scope="session")
def without_waiting_for_the_disk():
    """Thousands of small files; that they reach the disk is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("abmll.files.sync", lambda path: None)
        yield


ASKED = os.environ.get("FUZZ_EXAMPLES")
settings.register_profile(
    "fuzz",
    max_examples=int(ASKED or 40),
    derandomize=ASKED is None,
    deadline=timedelta(seconds=10),
    database=None,
    print_blob=True,
    phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if ASKED is None else [])],
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fuzz")
