"""Where a run's time and memory go: named phases, and a profile of an outer step or two (`--profile`)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg

from abmll.files import new_partial, publish

# Episodes that are recorded on each rank. In plain PyTorch the noise alone makes hundreds of operators a layer.
EPISODES_ON_GPU, EPISODES_ON_CPU = 2, 1
ROWS = 10
SNAPSHOT_EVENTS = 500_000  # the newest allocations and frees, which a memory snapshot keeps
TRACE, SNAPSHOT, COSTS = "trace.json.gz", "memory_snapshot.pickle", "costs.md"


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A named range in a profiler's trace: a block or, as a decorator, a function.

    It asks for a profiler first: record_function always calls two operators, which cost more and which a
    TorchDispatchMode would see.
    """
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function(name):
            yield
    else:
        yield


def steps_to_record(step: int, num_steps: int, wanted: int, validate_every: int | None) -> range:
    """Outer steps, counted from 0, to record in a run that stands before `step`: the `wanted` ones behind the next.

    The next one warms up; it is recorded if it is the last. A validation ends the recording: its passes over all of
    its tasks would fill the trace.
    """
    start = max(step, min(step + 1, num_steps - 1))
    stop = min(start + wanted, num_steps)
    if validate_every:
        stop = min(stop, (start // validate_every + 1) * validate_every)
    return range(start, stop)


class Profiler:
    """A torch profiler over some outer steps of the training in its `with` block; `step` is called behind each step.

    It writes to `folder`, which is this rank's own, as soon as the last of them is done. From then on, or if there is
    none, `step` only counts.
    """

    def __init__(self, folder: Path, device: torch.device, step: int, steps: range, say: Callable[[str], None]):
        self.folder, self.on_gpu, self.next, self.steps, self.say = folder, device.type == "cuda", step, steps, say
        self.profile: torch.profiler.profile | None = None

    def __enter__(self) -> Profiler:
        if not self.steps:
            self.say("--profile: no outer step is left to profile")
            return self
        cold = ", without one before it to warm up" if self.next == self.steps.start else ""
        self.say(f"profiling {self._steps()}{cold}")
        # on a CPU, shapes would double the memory that the profiler takes, which is the run's own there
        self.profile = torch.profiler.profile(record_shapes=self.on_gpu, profile_memory=True)
        self.profile.prepare_trace()
        self._start_or_finish()
        return self

    def step(self) -> None:
        """An outer step is done."""
        self.next += 1
        self._start_or_finish()

    def __exit__(self, *_: object) -> None:
        if self.profile is not None:  # training ended early: nothing is written
            if self.next < self.steps.start:
                self._start()
            self._stop()

    def _start_or_finish(self) -> None:
        if self.profile is not None and self.next == self.steps.start:
            self._start()
        elif self.profile is not None and self.next == self.steps.stop:
            self._finish()

    def _start(self) -> None:
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS, stacks="python")
        self.profile.start_trace()

    def _stop(self) -> torch.profiler.profile:
        profile, self.profile = self.profile, None
        profile.stop_trace()
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
        return profile

    def _finish(self) -> None:
        self.say("writing the profile, which may take a minute")
        partial = new_partial(self.folder)
        if self.on_gpu:
            torch.cuda.memory._dump_snapshot(str(partial / SNAPSHOT))
        profile = self._stop()
        profile.export_chrome_trace(str(partial / TRACE))
        with _no_garbage_collection():
            tables = cost_tables(profile.key_averages(), self.on_gpu)
        report = f"profile of {self._steps()}\n\n{tables}"
        (partial / COSTS).write_text(report, encoding="utf-8")
        publish(partial, self.folder)
        self.say(f"\n{report}\n{self._where()}")

    def _steps(self) -> str:
        first, last = self.steps.start + 1, self.steps.stop  # as the step lines count
        return f"outer step {first}" if first == last else f"outer steps {first} to {last}"

    def _where(self) -> str:
        lines = [f"trace             {self.folder / TRACE}, to open at https://ui.perfetto.dev"]
        if self.on_gpu:
            lines.append(f"memory snapshot   {self.folder / SNAPSHOT}, to open at https://docs.pytorch.org/memory_viz")
        return "\n".join([*lines, f"these tables      {self.folder / COSTS}"])


class Cost(NamedTuple):
    name: str
    calls: int
    amount: float  # microseconds or bytes


def cost_tables(averages: Sequence[FunctionEventAvg], on_gpu: bool) -> str:
    """Markdown: the phases' wall time, then the ten largest costs in time and in bytes.

    Time is an operator's own, without the operators that it calls; on a GPU it is a kernel's. Bytes are what an
    operator itself allocated, less what it freed, on the GPU if there is one; they say nothing of when that is freed.
    """
    averages = [row for row in averages if row.key != "[memory]"]  # what was freed outside of all operators
    host = [row for row in averages if row.device_type == DeviceType.CPU]
    phases = [row for row in host if row.is_user_annotation]
    operators = [row for row in host if not row.is_user_annotation]
    if on_gpu:
        kernels = [row for row in averages if row.device_type == DeviceType.CUDA and not row.is_user_annotation]
        times = [Cost(row.key, row.count, row.self_device_time_total) for row in kernels]
        memory = [Cost(row.key, row.count, row.self_device_memory_usage) for row in operators]
    else:
        times = [Cost(row.key, row.count, row.self_cpu_time_total) for row in operators]
        times.append(Cost("(Python, between operators)", 0, sum(row.self_cpu_time_total for row in phases)))
        memory = [Cost(row.key, row.count, row.self_cpu_memory_usage) for row in operators]
    spans = [Cost(row.key, row.count, row.cpu_time_total) for row in phases]
    whole = sum(span.amount for span in spans if span.name == "outer step")
    device = "GPU" if on_gpu else "CPU"
    return "\n".join(
        (
            _table("phase: wall time, with all that it holds", "ms", 1e3, spans, whole, len(spans)),
            _table(f"largest costs in {device} time", "ms", 1e3, times, sum(cost.amount for cost in times)),
            _table(f"largest costs in {device} memory", "MB", 1e6, memory, sum(max(c.amount, 0) for c in memory)),
        )
    )


def _table(heading: str, unit: str, scale: float, costs: list[Cost], whole: float, rows: int = ROWS) -> str:
    """The largest first; shares are of `whole`, which is 0 where nothing was recorded."""
    lines = [f"| {heading} | calls | {unit} | share % |", "|---|---:|---:|---:|"]
    for name, calls, amount in sorted(costs, key=lambda cost: -cost.amount)[:rows]:
        share = f"{100 * amount / whole:.1f}" if whole else ""
        short = name if len(name) <= 80 else f"{name[:77]}..."  # a kernel's may have several lines
        lines.append(f"| {short.replace('|', '/')} | {calls or ''} | {amount / scale:,.2f} | {share} |")
    return "\n".join(lines) + "\n"


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """The collector would search a million live events again and again: half of the time that their reading takes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
