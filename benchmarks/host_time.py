"""What the host does for a fused projection while the GPU works: its time by part, and what can be counted of it.

    python benchmarks/host_time.py                                         # prints the table
    python benchmarks/host_time.py --write benchmarks/results/host_time.json
    python benchmarks/host_time.py --report benchmarks/results/host_time.json

Needs no GPU: launches are stubbed out, and library products run on small CPU tensors, in the frozen linear beside it as
well. Times are a thread's own CPU time, contenders in turn, and do not depend on the shapes. Only the part called
`binders` runs Triton's own Python, up to its launcher in C, which is not counted. The counts are of Llama3-8B's Q at
1,024 tokens, on fake tensors. A forward and backward pass to x and to phi's four factors, bf16, rank 8:

    checks      what the call itself does: checks of shapes, dtypes and devices, the choice of a backend
    autograd    graphs made and walked, gradients handed to the parameters, beyond the frozen linear's
    dispatch    PyTorch's dispatcher on the way to the operators' Python bodies
    body        allocations, views and arguments of launches, beyond the frozen linear's products
    binders     Triton's Python a launch
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
from provenance import provenance
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import KernelInterface

from abmll.kernels import (
    FrozenLinear,
    GaussianFactors,
    LowRank,
    NoiseKey,
    PosteriorSettings,
    assume_gpu,
    posterior_projection,
)
from abmll.kernels.fused import activation, launch, weight
from abmll.kernels.fused.dry_run import BODIES, dry_launches

POSTERIORS = ("activation", "weight")
PARTS = ("checks", "autograd", "dispatch", "body", "binders")
SMALL = (8, 16, 16)  # T, K, N: products of no time
COUNTED = (1024, 4096, 4096)
RANK, LAYER = 8, 3
SETTINGS = PosteriorSettings(2.0, -20.0, 1.0, 0.01)
GOAL = 120.0  # us of the four parts without binders


class Inputs:
    """A projection's arguments as an adapted layer has them: phi's factors are parameters, theta's need no gradient."""

    def __init__(self, tokens: int, inputs: int, outputs: int):
        self.x = torch.randn(1, tokens, inputs, dtype=torch.bfloat16, requires_grad=True)
        self.weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
        shapes = ((RANK, inputs), (outputs, RANK)) * 2
        self.phi = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        self.theta = [torch.nn.Parameter(torch.randn(shape), requires_grad=False) for shape in shapes]
        self.mask = torch.ones(1, tokens, dtype=torch.bool)
        self.names = NoiseKey(1, 2).rows(1, "cpu")
        self.dy, self.dkl = torch.randn(1, tokens, outputs, dtype=torch.bfloat16), torch.ones(())

    def call(self, posterior: str) -> tuple[Tensor, Tensor]:
        phi, theta = (GaussianFactors(LowRank(*f[:2]), LowRank(*f[2:])) for f in (self.phi, self.theta))
        base = FrozenLinear(self.weight)
        arguments = (self.x, base, phi, theta, SETTINGS, self.names, LAYER, self.mask)
        return posterior_projection(posterior, *arguments, backend="triton")[:2]

    def step(self, posterior: str) -> None:
        torch.autograd.backward(self.call(posterior), (self.dy, self.dkl))
        self.x.grad = None
        for factor in self.phi:
            factor.grad = None

    def frozen(self) -> Tensor:
        return torch.nn.functional.linear(self.x, self.weight)

    def frozen_step(self) -> None:
        self.frozen().backward(self.dy)
        self.x.grad = None

    def forward_arguments(self, posterior: str) -> tuple:
        mask = (self.mask,) if posterior == "activation" else ()
        named = (SETTINGS, self.names, LAYER, True)
        return (self.x, self.weight, None, None, *mask, [*self.phi, *self.theta], *named)

    def backward_arguments(self, posterior: str) -> tuple:
        """As the inner step's derivative calls it: to x and phi, nobody asked about the prior."""
        tickets = launch.new_tickets(1, self.x.device)
        between = (tickets, self.weight)
        if posterior == "activation":
            p = torch.zeros(1, self.x.shape[1], 4 * RANK)
            between = (p, tickets, self.weight, self.mask)
        flags = (True, True, False)
        factors = [*self.phi, *self.theta]
        return (self.dy, self.dkl, None, self.x, *between, factors, SETTINGS, self.names, LAYER, *flags)


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


class CallCounter(TorchDispatchMode):
    """Counts the operators that PyTorch dispatches, the fused ones' bodies included, and what they allocate."""

    def __init__(self):
        super().__init__()
        self.called: list[OpOverload] = []
        self.allocations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name in BODIES:
            with self:
                return BODIES[name](*args, **(kwargs or {}))
        if func.namespace == "aten":
            self.called.append(func)
        found = func(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        self.allocations += sum(
            tensor.numel() > 0 and id(tensor.untyped_storage()) not in given for tensor in _tensors(found)
        )
        return found


def _tensors(nested: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(nested) if isinstance(leaf, Tensor)]


def count(posterior: str) -> dict[str, object]:
    """Operators, allocations and launches of a forward and backward pass at a real size."""
    launches: list[str] = []

    class Recorder:
        def __init__(self, kernel: KernelInterface):
            self.name = kernel.__name__

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *_, **__: launches.append(self.name)

    kernels = {name: kernel for name, kernel in vars(launch).items() if isinstance(kernel, KernelInterface)}
    for name, kernel in kernels.items():
        setattr(launch, name, Recorder(kernel))
    try:
        with FakeTensorMode(), assume_gpu():
            inputs = Inputs(*COUNTED)
            with CallCounter() as counter:
                inputs.step(posterior)
    finally:
        for name, kernel in kernels.items():
            setattr(launch, name, kernel)
    names = [(func.name().removeprefix("aten::"), func) for func in counter.called]
    return {
        "operators": len(names),
        "allocations": counter.allocations,
        "kernels": launches,
        "library": [n for n, func in names if not func.is_view and n.partition(".")[0] not in WITHOUT_A_KERNEL],
    }


# Names of operators that are no views and run no kernel of their own.
WITHOUT_A_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "reshape", "contiguous", "mT", "promote_types")


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
