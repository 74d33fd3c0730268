"""SIGTERM ends a run behind its current step: a scheduler that takes the machine away leaves a checkpoint.

The signal only sets a flag. Training looks at it once an outer step, where the ranks agree by the exchange that they
make anyway; an evaluation looks at it between tasks. So a run ends within one outer step (or the tasks that a rank
adapts side by side) and the writing of a checkpoint, and whatever the signal interrupts is never left half done.
"""

from __future__ import annotations

import signal
import threading
from types import TracebackType

STATUS = 128 + signal.SIGTERM  # what a shell reports of a command that this signal ended


class Interrupted(Exception):
    """The run was asked to stop, and did so in good order; the message says where it stands."""


class Interrupt:
    """While it is entered, SIGTERM is noted and does not end the process."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupt:
        # Python calls handlers in its main thread alone; elsewhere nothing is caught
        self._catches = threading.current_thread() is threading.main_thread()
        if self._catches:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        # once noted, the process is on its way out: a launcher's second signal must not cut that short
        if self._catches and not self.asked:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)  # None: not Python's

    def _note(self, *_: object) -> None:
        self.asked = True

    def __call__(self) -> bool:
        return self.asked
