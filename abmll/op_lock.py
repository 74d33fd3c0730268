"""Loading DeepSpeed's operation for CPU ranks, so that a process that is killed meanwhile blocks nobody after it.

torch builds and loads it under a lock *file*, which outlives a killed process: every later start would wait for it, for
ever and without a word. Around that stands a lock of the kernel's here, which ends with its process, and a mark inside
it that only a process which died has left behind.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OURS, TORCHS = "abmll.lock", "lock"


def load_cpu_operation() -> None:
    """DeepSpeed keeps what is loaded, and finds it again when it joins the ranks."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        with loading(Path(_get_build_directory(builder.NAME, verbose=False))):
            builder.load()


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """One process of ours at a time; torch's lock file in `folder` goes first if one of ours died holding it."""
    with (folder / OURS).open("a+") as ours:
        locked = True
        try:
            fcntl.flock(ours, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            locked = False
        if not locked:
            yield
            return
        ours.seek(0)
        if ours.read():
            (folder / TORCHS).unlink(missing_ok=True)
        ours.truncate(0)
        ours.write("loading")
        ours.flush()
        try:
            yield
        finally:
            ours.truncate(0)
