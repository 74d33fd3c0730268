"""The operators' bodies without a GPU: every allocation that a run on one makes, and no launch.

For counting memory on fake tensors:

    with FakeTensorMode(), assume_gpu(), dry_launches():
        BODIES["abmll::weight_backward"](dy, dsums, x, ...)     # the operator's own arguments

The results hold nothing: on real tensors they are whatever the memory held.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# the operators' modules fill BODIES
from abmll.kernels.fused import activation, launch, weight  # noqa: F401
from abmll.kernels.fused.operators import BODIES

__all__ = ["BODIES", "dry_launches"]


@contextmanager
def dry_launches() -> Iterator[None]:
    """Within: every launch's arguments are made and nothing runs; library calls that only a GPU has allocate alone."""
    before, launch.dry = launch.dry, True
    try:
        yield
    finally:
        launch.dry = before
