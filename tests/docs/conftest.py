import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))

from runs import counts_kept, one_thread  # noqa: F401
from sandbox import repository, sandbox, trained  # noqa: F401
