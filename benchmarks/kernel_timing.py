"""Time and memory of calls on a GPU: launched from Python, and replayed from a CUDA graph.

Everything runs on the current stream, which must not be the default one: a graph is captured there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

FLUSHED_BYTES = 256 * 2**20  # several times the largest L2
MINIMUM_ROUNDS, WARM_UP = 20, 3


class Call(NamedTuple):
    """`run` is measured, on what `prepare` returned just before."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


class Times(NamedTuple):
    """By call: `summary` of its runs; or what it raised."""

    found: dict[str, dict[str, float]]
    errors: dict[str, Exception]


@cache
def _buffer() -> torch.Tensor:
    return torch.zeros(FLUSHED_BYTES // 4, dtype=torch.int32, device="cuda")


def flush(buffer: torch.Tensor) -> None:
    """Fill L2 with lines of `buffer` that are only read: written ones would go to memory during the measured call."""
    buffer.sum()


def timed(call: Call) -> float:
    """Milliseconds of one run that finds the GPU idle and L2 cold.

    Reading the buffer takes the GPU some 0.1 ms, in which Python launches ahead: launching counts beyond that. Every
    run has that much, because the GPU has nothing else to do before: behind a slow call Python could hide more.
    """
    state = call.prepare()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    flush(_buffer())
    start.record()
    results = call.run(state)
    end.record()
    end.synchronize()
    del results
    return start.elapsed_time(end)


def interleaved(
    calls: Mapping[str, Call],
    seconds: float,
    once: Callable[[Call], float] = timed,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Rounds of one run of each call in turn, until `seconds` a call are over: ratios are of the same moment, whatever
    the GPU's clock does. A call that raises leaves the rounds.
    """
    times, errors = {name: [] for name in calls}, {}

    def round_of_all() -> None:
        for name in [name for name in calls if name not in errors]:
            try:
                times[name].append(once(calls[name]))
            except Exception as error:
                errors[name] = error

    for _ in range(WARM_UP):
        round_of_all()
    for of_call in times.values():
        of_call.clear()
    began, rounds = clock(), 0
    while len(errors) < len(calls) and (rounds < MINIMUM_ROUNDS or clock() - began < seconds * len(calls)):
        round_of_all()
        rounds += 1
    return Times({name: summary(times[name]) for name in calls if name not in errors}, errors)


def captured(call: Call) -> Call:
    """The same as two graphs, prepared and run by replays: the kernels' own time, since a graph is launched at once.

    The call must have run before. Raises RuntimeError where it cannot be captured.
    """
    stream, something = torch.cuda.current_stream(), torch.zeros(1, device="cuda")
    before, measured = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(before, stream=stream):
        something.zero_()  # a graph must hold something
        state = call.prepare()
    with torch.cuda.graph(measured, pool=before.pool(), stream=stream):
        results = call.run(state)
    kept = (something, state, results)  # or other tensors would take their memory

    def prepare() -> tuple:
        before.replay()
        return kept

    return Call(prepare, lambda _: measured.replay())


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


def device_works(device: torch.device) -> bool:
    """Whether a GPU still answers: after an illegal access no call of the process does."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def summary(times: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    values = {"median_ms": statistics.median(times), "p20_ms": deciles[1], "p80_ms": deciles[7]}
    return {name: float(f"{value:.4g}") for name, value in values.items()} | {"runs": len(times)}
