"""What the host does for a fused projection while the GPU works: its time by part, and what can be counted of it.

    python benchmarks/host_time.py                                         # prints the table
    python benchmarks/host_time.py --write benchmarks/results/host_time.json
    python benchmarks/host_time.py --report benchmarks/results/host_time.json

Needs no GPU: launches are stubbed out, and library products run on small CPU tensors, in the frozen linear beside it as
well. Times are a thread's own CPU time, contenders in turn, and hardly depend on the shapes. Only the part called
`binders` runs Triton's own Python, up to its launcher in C, which is not counted. The counts are of Llama3-8B's Q at
1,024 tokens, on fake tensors. A forward and backward pass to x and to phi's four factors, bf16, rank 8:

    checks      what the call itself does: checks of shapes, dtypes and devices, the choice of a backend
    autograd    graphs made and walked, gradients handed to the parameters, beyond the frozen linear's
    dispatch    PyTorch's dispatcher on the way to the operators' Python bodies
    body        allocations, views and arguments of launches, beyond the frozen linear's products
    binders     Triton's Python a launch

Parts are differences of nested calls, each timed in a loop of its own. What such a loop keeps in the caches and a whole
step does not is counted as autograd's. On a busy machine all times grow, the ratio to the frozen linear's less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from host_calls import Inputs, count
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import KernelInterface

from abmll.kernels import assume_gpu
from abmll.kernels.fused import activation, launch, weight
from abmll.kernels.fused.dry_run import BODIES, dry_launches
from abmll.provenance import provenance

POSTERIORS = ("activation", "weight")
PARTS = ("checks", "autograd", "dispatch", "body", "binders")
SMALL = (8, 16, 16)  # T, K, N: products of no time


def operators(posterior: str) -> tuple[Callable, Callable]:
    if posterior == "activation":
        return activation.activation_forward, activation.activation_backward
    return weight.weight_forward, weight.weight_backward


class Time(NamedTuple):
    """Microseconds a call."""

    median: float
    p20: float
    p80: float


def timed(contenders: dict[str, Callable[[], object]], rounds: int, calls: int) -> dict[str, Time]:
    """Each contender `calls` times a round, one after the other, so that a busy machine is busy for all of them."""
    found = defaultdict(list)
    for turn in range(rounds + 2):
        for name, call in contenders.items():
            start = time.thread_time_ns()
            for _ in range(calls):
                call()
            if turn >= 2:  # the first warm up
                found[name].append((time.thread_time_ns() - start) / calls / 1e3)
    return {name: Time(*(statistics.quantiles(values, n=10)[at] for at in (4, 1, 7))) for name, values in found.items()}


class _Absent:
    """A driver of a chip that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class _Compiled:
    """Stands for a compiled kernel, and for the cache that holds one for every key."""

    function, packed_metadata = 0, ()

    def get(self, *_: object) -> _Compiled:
        return self

    def run(self, *_: object) -> None:
        pass

    launch_metadata = run


@contextmanager
def binding_launches() -> Iterator[None]:
    """Within, launches go through all of Triton's Python and end before its launcher. The driver is gone for good."""
    kernels = [kernel for kernel in vars(launch).values() if isinstance(kernel, KernelInterface)]
    before = [kernel.device_caches for kernel in kernels]
    triton.runtime.driver.set_active(_Absent())
    for kernel in kernels:
        kernel.device_caches = {0: (_Compiled(), {}, *kernel.create_binder()[2:])}
    try:
        yield
    finally:
        for kernel, caches in zip(kernels, before, strict=True):
            kernel.device_caches = caches


def measure(posterior: str, rounds: int, calls: int) -> dict[str, object]:
    """A row: microseconds by part, in all, and of the frozen linear in the same run."""
    inputs, (forward, backward) = Inputs(*SMALL), operators(posterior)
    forward_arguments, backward_arguments = inputs.forward_arguments(posterior), inputs.backward_arguments(posterior)
    forward_body, backward_body = BODIES[forward.name()], BODIES[backward.name()]

    def without_graph(call: Callable, *arguments: object) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return call(*arguments)

        return run

    def bind(kernel: KernelInterface, grid: tuple[int, ...], _: Tensor, *arguments: object, **options: object) -> None:
        kernel[grid](*arguments, **options)

    def binding_step() -> None:
        run, launch._run = launch._run, bind
        try:
            inputs.step(posterior)
        finally:
            launch._run = run

    contenders = {
        "frozen": inputs.frozen_step,
        "step": lambda: inputs.step(posterior),
        "call": lambda: inputs.call(posterior),
        "graph": lambda: forward(*forward_arguments),
        "forward": without_graph(forward, *forward_arguments),
        "forward body": without_graph(forward_body, *forward_arguments),
        "backward": without_graph(backward, *backward_arguments),
        "backward body": without_graph(backward_body, *backward_arguments),
        "product": without_graph(inputs.frozen),
        "gradient": without_graph(torch.matmul, inputs.dy, inputs.weight),
        "nothing": without_graph(lambda: None),
        "binding step": binding_step,
    }
    with assume_gpu(), binding_launches(), dry_launches():
        found = timed(contenders, rounds, calls)
    us = {name: value.median for name, value in found.items()}
    products = us["product"] + us["gradient"] - 2 * us["nothing"]
    parts = {
        "checks": us["call"] - us["graph"],
        "autograd": (us["graph"] - us["forward"] + us["nothing"])
        + (us["step"] - us["call"] - us["backward"] + us["nothing"])
        - (us["frozen"] - products),
        "dispatch": us["forward"] - us["forward body"] + us["backward"] - us["backward body"],
        "body": us["forward body"] + us["backward body"] - 2 * us["nothing"] - products,
        "binders": us["binding step"] - us["step"],
    }
    beyond = us["step"] - us["frozen"]
    spread = {name: list(found[name]) for name in ("frozen", "step", "binding step")}
    totals = {"beyond": beyond, "ratio": beyond / us["frozen"], "frozen": us["frozen"]}
    return {
        "posterior": posterior,
        "parts": parts,
        **totals,
        "median_p20_p80": spread,
        "rounds": rounds,
        "calls": calls,
    }


def table(rows: list[dict]) -> str:
    """By part, in us; then the counts."""
    lines = [f"| posterior | {' | '.join(PARTS)} | beyond, without binders | of the frozen linear | frozen linear |"]
    lines += ["|---" + "|---:" * (len(PARTS) + 3) + "|"]
    for row in rows:
        parts = " | ".join(f"{row['parts'][name]:.0f}" for name in PARTS)
        lines.append(
            f"| {row['posterior']} | {parts} | {row['beyond']:.0f} | {row['ratio']:.1f} x | {row['frozen']:.0f} |"
        )
    lines += [
        "",
        "| posterior | launches | of these the library's | operators | allocations |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        counts = row["counts"]
        library = len(counts["library"])
        cells = (len(counts["kernels"]) + library, library, counts["operators"], counts["allocations"])
        lines.append(f"| {row['posterior']} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="of each contender; default: %(default)s")
    parser.add_argument("--calls", type=int, default=50, help="in a round; default: %(default)s")
    parser.add_argument("--write", type=Path, help="a file for the rows")
    parser.add_argument("--report", type=Path, help="print the table of a file's rows, measure nothing")
    arguments = parser.parse_args()
    if arguments.report:
        print(table(json.loads(arguments.report.read_text())["rows"]))
        return
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET: set: Triton's binders do not run in the interpreter; unset it")
    torch.set_num_threads(1)
    rows = [
        measure(posterior, arguments.rounds, arguments.calls) | {"counts": count(posterior)} for posterior in POSTERIORS
    ]
    if arguments.write:
        arguments.write.write_text(json.dumps({**provenance(), "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
