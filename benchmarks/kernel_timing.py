"""Time and memory of one call on a GPU: launched from Python, and replayed from a CUDA graph.

Everything runs on the current stream, which must not be the default one: a graph is captured there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

FLUSHED_BYTES = 256 * 2**20  # several times the largest L2
MINIMUM_RUNS, MAXIMUM_RUNS = 10, 400


class Call(NamedTuple):
    """`run` is measured, on what `prepare` returned just before."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


@cache
def _flushed() -> torch.Tensor:
    return torch.empty(FLUSHED_BYTES // 4, dtype=torch.int32, device="cuda")


def launched(call: Call, seconds: float) -> dict[str, float]:
    """Milliseconds of a call whose kernels are launched one by one, with a cold L2.

    Clearing L2 takes the GPU some 0.1 ms, in which Python launches ahead: launching counts beyond that.
    """
    flushed = _flushed()

    def once() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        state = call.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        start.record()
        call.run(state)
        end.record()
        return start, end

    once()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(3):
        once()
    torch.cuda.synchronize()
    each = (time.perf_counter() - began) / 3
    runs = [once() for _ in range(min(max(int(seconds / each), MINIMUM_RUNS), MAXIMUM_RUNS))]
    torch.cuda.synchronize()
    return summary([start.elapsed_time(end) for start, end in runs])


def replayed(call: Call, seconds: float) -> dict[str, float]:
    """Milliseconds of the call's kernels alone, with a cold L2: a graph is launched at once.

    The call must have run before. Raises RuntimeError where it cannot be captured.
    """
    stream, flushed = torch.cuda.current_stream(), _flushed()
    before, measured = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(before, stream=stream):
        flushed[:1].zero_()  # a graph must hold something
        state = call.prepare()
    with torch.cuda.graph(measured, pool=before.pool(), stream=stream):
        kept = call.run(state)
    found = launched(Call(before.replay, lambda _: measured.replay()), seconds)
    del kept, state
    return found


def memory(call: Call) -> dict[str, int]:
    """Bytes beyond what was there before the call: at its peak, and still held by its results when it has returned."""
    call.run(call.prepare())
    state = call.prepare()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    results = call.run(state)
    torch.cuda.synchronize()
    found = {
        "peak_allocated": torch.cuda.max_memory_allocated() - allocated,
        "peak_reserved": torch.cuda.max_memory_reserved() - reserved,
        "kept": torch.cuda.memory_allocated() - allocated,
    }
    del results
    return found


def summary(times: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    values = {"median_ms": statistics.median(times), "p20_ms": deciles[1], "p80_ms": deciles[7]}
    return {name: float(f"{value:.4g}") for name, value in values.items()} | {"runs": len(times)}
