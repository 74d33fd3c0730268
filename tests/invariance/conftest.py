import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))

from forked import forks, start  # noqa: F401
from runs import counts_kept, finished, make_run, one_thread, run  # noqa: F401
