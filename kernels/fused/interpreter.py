"""What tests and benchmarks change where the kernels run in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from abmll.kernels.backends import interpreted
from abmll.kernels.fused import configurations, plans


@contextmanager
def large_blocks() -> Iterator[None]:
    """The interpreter's time goes by blocks, not by numbers. They change no noise, and of a sum only the order.

    Without the interpreter nothing changes.
    """
    if not interpreted():
        yield
        return
    tile = {"ROWS": 256, "COLUMNS": 64}
    kernels = {"project": {"ROWS": 256, "DEPTH": 64}, "elementwise": tile, "gradient": {**tile, "SUMMED": 4096}}
    launches = {name: configurations.Launch(blocks, warps=4, stages=1) for name, blocks in kernels.items()}
    plans.forget()
    try:
        with patch.multiple(configurations, **{name: lambda *_, own=own: own for name, own in launches.items()}):
            yield
    finally:
        plans.forget()
