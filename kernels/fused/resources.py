"""Registers, shared memory and instructions of every kernel, as Triton compiles it for sm_80 and sm_90. Needs no GPU.

    python -m abmll.kernels.fused.resources                                # every variant, as a table
    python -m abmll.kernels.fused.resources --only bfloat16:8 --training   # one dtype and rank, what training launches
    python -m abmll.kernels.fused.resources --only bfloat16:8 --training --kernel sample_kernel     # in a few seconds
    python -m abmll.kernels.fused.resources --write benchmarks/results     # this Triton's part of the committed table

`--write` makes kernel_resources_triton-VERSION.json of the Triton that runs it, and kernel_resources.md of all such
files in the folder.

What is compiled is what is launched: the operators run on small CPU tensors while recorders stand in for the kernels,
and Triton's own just-in-time path compiles the recorded launches for a chip that is not there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import KernelInterface

from abmll.kernels import Groups, NoiseKey
from abmll.kernels.fused import activation, configurations, instructions, launch, plans
from abmll.kernels.fused import weight as weight_operators
from abmll.kernels.fused.chips import CHIPS, WARP, warps_held
from abmll.kernels.fused.resource_page import markdown

# Bytes a thread. More than this is registers spilled to memory, not a few scalars.
STACK_LIMIT = 64
CASES = (*(f"bfloat16:{rank}" for rank in (8, 16, 32, 64)), "float16:8", "float32:8")
SETTINGS = [2.0, 2.0, -20.0, 1.0, 0.01]
NAMED = (SETTINGS, NoiseKey(0, 0).rows(1, "cpu"), 5)  # a layer that is neither 1 nor a multiple of 16
UNEQUAL = (48, 32)  # rows of two groups
# Of these every use is listed, of the others what training launches.
IN_FULL = ("bfloat16:8", "bfloat16:16", "float32:8")
# Modules whose kernels are recorded.
LAUNCHERS = (launch,)
# Constants whose product is the elements that a program makes at a time: in one iteration of the kernel's main loop or,
# if it has none, in all. Z's elements, of which an adjoint counts dz's; of the products x's.
TILES = {
    "sample_kernel": ("ROWS", "COLUMNS"),
    "adjoint_kernel": ("ROWS", "COLUMNS"),
    "project_kernel": ("ROWS", "DEPTH"),
    "gradient_kernel": ("ROWS", "COLUMNS"),
}


class Launched(NamedTuple):
    """One launch: constants are the kernel's constexprs, block sizes included; options are the compiler's."""

    kernel: KernelInterface
    arguments: tuple[object, ...]
    constants: dict[str, int | bool]
    options: dict[str, int | bool]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def key(self) -> tuple:
        """Equal for two launches that share their compiled code."""
        kinds = tuple(_kind(argument) for argument in self.arguments)
        return self.name, *sorted(self.constants.items()), *sorted(self.options.items()), kinds


def _kind(argument: object) -> object:
    """What Triton compiles for: a pointer's dtype and alignment, and whether an integer is 1 or a multiple of 16."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return (argument == 1, argument % 16 == 0) if isinstance(argument, int) else type(argument)


class _Recorder:
    def __init__(self, kernel: KernelInterface, launches: list[Launched]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._record

    def _record(self, *arguments: object, **keywords: int | bool) -> None:
        constants = {name: value for name, value in keywords.items() if name in self.kernel.arg_names}
        options = {name: value for name, value in keywords.items() if name not in constants}
        self.launches.append(Launched(self.kernel, arguments, constants, options))


@contextmanager
def as_if_programs(fewest: int) -> Iterator[None]:
    """Small tensors stand for large ones: so many programs are enough, or are not."""
    shipped, configurations.FEWEST_PROGRAMS = configurations.FEWEST_PROGRAMS, fewest
    plans.forget()
    try:
        yield
    finally:
        configurations.FEWEST_PROGRAMS = shipped
        plans.forget()


@contextmanager
def recorded_launches() -> Iterator[list[Launched]]:
    """Within it no kernel runs: launches are listed, and outputs keep whatever their memory held."""
    launches: list[Launched] = []
    kernels = [(m, name, k) for m in LAUNCHERS for name, k in vars(m).items() if isinstance(k, KernelInterface)]
    for module, name, kernel in kernels:
        setattr(module, name, _Recorder(kernel, launches))
    try:
        with as_if_programs(1):
            yield launches
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def _factors(
    rank: int, inputs: int, outputs: int, need_phi: bool = False, need_theta: bool = False, lead: tuple[int, ...] = ()
) -> list[Tensor]:
    """Phi's, with a dimension for groups or without, and theta's, as the operators take them."""
    shapes = ((rank, inputs), (outputs, rank)) * 2
    phi = [torch.zeros(*lead, *shape, requires_grad=need_phi) for shape in shapes]
    return phi + [torch.zeros(shape, requires_grad=need_theta) for shape in shapes]


def _activation_step(
    dtype: torch.dtype,
    rank: int,
    terms: Literal["divergence", "theta", "none"] = "divergence",
    need_x: bool = True,
    need_phi: bool = True,
    need_theta: bool = False,
    mask: bool = False,
    ready: bool = False,
    sizes: tuple[int, int, int] = (80, 128, 96),
    groups: tuple[int, ...] | None = None,
) -> None:
    """One projection of the activation posterior with its derivatives: the calls of `projection` and of autograd.

    sizes: T, K, N. One group and no token mask are a training step's usual arguments; a bias is the library's. `ready`:
    the base product is made elsewhere. `groups`: how many of T are whose.
    """
    tokens, inputs, outputs = sizes
    split = () if groups is None else (groups, Groups.of(groups, "cpu").bounds)
    x = torch.zeros(1, tokens, inputs, dtype=dtype, requires_grad=need_x)
    weight = None if ready else torch.zeros(outputs, inputs, dtype=dtype)
    product = x.new_zeros(1, tokens, outputs) if ready else None
    counted = torch.ones(1, tokens, dtype=torch.bool) if mask else None
    lead = () if groups is None else (len(groups),)
    factors = _factors(rank, inputs, outputs, need_phi, need_theta, lead)[: 4 if terms == "none" else 8]
    named = (*NAMED, terms == "divergence")
    y, p, _, kl, _ = activation.activation_forward(x, weight, None, product, counted, factors, *named, *split)
    if need_x or need_phi or need_theta:
        (y.float().sum() + kl.sum()).backward()
    if terms == "theta":
        with torch.no_grad():
            activation.activation_theta_gradient(x, p, counted, factors, SETTINGS, 1.0, 1.0, *split)


def _activation_theta_alone(dtype: torch.dtype, rank: int) -> None:
    activation.activation_project(torch.zeros(1, 80, 128, dtype=dtype), _factors(rank, 128, 96))


def _weight_step(
    dtype: torch.dtype,
    rank: int,
    terms: Literal["divergence", "none"] = "divergence",
    need_x: bool = True,
    need_phi: bool = True,
    need_theta: bool = False,
    sizes: tuple[int, int, int] = (80, 128, 96),
) -> None:
    """`_activation_step` for the weight posterior."""
    tokens, inputs, outputs = sizes
    x = torch.zeros(1, tokens, inputs, dtype=dtype, requires_grad=need_x)
    weight = torch.zeros(outputs, inputs, dtype=dtype)
    factors = _factors(rank, inputs, outputs, need_phi, need_theta)[: 4 if terms == "none" else 8]
    y, _, kl, _ = weight_operators.weight_forward(x, weight, None, None, factors, *NAMED, terms == "divergence")
    if need_x or need_phi or need_theta:
        (y.float().sum() + kl.sum()).backward()


def _weight_outer_step(dtype: torch.dtype, rank: int) -> None:
    _weight_step(dtype, rank, "none", need_x=False, need_phi=False)
    weight_operators.weight_theta_gradient(_factors(rank, 128, 96), SETTINGS, 1.0, 1.0)


# Who launches kernels. A variant is named after the first of them that launches it.
USES: dict[str, Callable[[torch.dtype, int], None]] = {
    "inner step": _activation_step,
    "inner step, first layer": partial(_activation_step, need_x=False),
    "outer step": partial(_activation_step, terms="theta", need_x=False, need_phi=False),
    "outer step, first order": partial(_activation_step, terms="theta"),
    "outer step alone": _activation_theta_alone,
    "inner step without KL": partial(_activation_step, terms="none"),
    "inner step, few tokens": as_if_programs(2**31)(_activation_step),
    "padded, inner step": partial(_activation_step, mask=True),
    "padded, outer step": partial(_activation_step, terms="theta", need_x=False, need_phi=False, mask=True),
    "all gradients": partial(_activation_step, need_theta=True),
    "odd sizes": partial(_activation_step, sizes=(61, 123, 125)),
    "unequal groups, inner step": partial(_activation_step, groups=UNEQUAL),
    "unequal groups, outer step": partial(
        _activation_step, terms="theta", need_x=False, need_phi=False, groups=UNEQUAL
    ),
    "weight, inner step": _weight_step,
    "weight, inner step, first layer": partial(_weight_step, need_x=False),
    "weight, outer step": _weight_outer_step,
    "weight, outer step, first order": partial(_weight_step, terms="none"),
    "weight, outer step, first order, first layer": partial(_weight_step, terms="none", need_x=False),
    "weight, all gradients": partial(_weight_step, need_theta=True),
    "weight, odd sizes": partial(_weight_step, sizes=(61, 123, 125)),
    "4-bit, inner step": partial(_activation_step, ready=True),
    "4-bit, first order": partial(_activation_step, ready=True, terms="theta"),
}
# What a run with the default settings launches, by posterior.
TRAINING = {
    "activation": ("inner step", "inner step, first layer", "outer step"),
    "weight": ("weight, inner step", "weight, inner step, first layer", "weight, outer step"),
}
TRAINED = tuple(chain.from_iterable(TRAINING.values()))


@dataclass(frozen=True)
class Variant:
    """A launch that some use makes first, for one dtype of x and one rank."""

    use: str
    case: str
    launched: Launched


@cache
def variants(case: str) -> tuple[Variant, ...]:
    """The launches with x's dtype and rank as in "bfloat16:8" that need code of their own."""
    dtype, rank = case.split(":")
    found: dict[tuple, Variant] = {}
    for use, run in USES.items():
        if case not in IN_FULL and use not in TRAINED:
            continue
        with recorded_launches() as launches:
            run(getattr(torch, dtype), int(rank))
        for launched in launches:
            found.setdefault(launched.key, Variant(use, case, launched))
    return tuple(found.values())


class _Absent:
    """A driver that knows which chip to compile for, and has none."""

    def __init__(self, chip: int):
        self.chip = chip

    def get_current_device(self) -> int:
        return self.chip  # Triton keeps compiled code by device: one a chip

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip, 32)


def elements(launched: Launched) -> float:
    """Elements that one thread makes at a time, see TILES."""
    if launched.name not in TILES:
        raise ValueError(f"resources.TILES: {launched.name}: the kernel's tile is not stated; add the constants' names")
    tile = prod(launched.constants[name] for name in TILES[launched.name])
    return tile / (WARP * launched.options["num_warps"])


def disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    """What a kernel uses (REG, STACK, ...) and its machine code, by Triton's own copy of NVIDIA's tool."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", path]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = (word.split(":") for line in dump.splitlines() if "REG:" in line for word in line.split())
    return {name: int(value) for name, value in usage}, dump


def measure(case: str, index: int, chip: int) -> dict[str, object]:
    """Compile variants(case)[index] for a chip, and count: what is kept of it in a row of the table."""
    launched = variants(case)[index].launched
    triton.runtime.driver.set_active(_Absent(chip))
    compiled = launched.kernel.warmup(*launched.arguments, grid=(1,), **launched.constants, **launched.options)
    usage, sass = disassemble(compiled.asm["cubin"])
    registers, shared, warps = usage["REG"], compiled.metadata.shared, launched.options["num_warps"]
    counts, share = instructions.count(sass), elements(launched)
    return {
        "registers": registers,
        "stack": usage["STACK"],
        "shared": shared,
        "warps_per_sm": warps_held(chip, warps, registers, shared),
        "total": round(counts.total / share, 3),
        "instructions": {kind: round(number / share, 3) for kind, number in counts.work.items()},
        "products": round(counts.products / WARP / share, 3),
        "once": counts.once,
    }


def describe(variant: Variant) -> dict[str, object]:
    """A row of the table, without what the compiler makes of it."""
    dtype, rank = variant.case.split(":")
    launched = variant.launched
    row = {"dtype": dtype, "rank": int(rank), "kernel": launched.name, "use": variant.use}
    return {**row, "options": launched.options, "constants": launched.constants}


def table(
    cases: Sequence[str] = CASES,
    uses: Collection[str] = tuple(USES),
    kernels: Collection[str] = tuple(TILES),
    jobs: int | None = None,
) -> dict:
    """Compile the kernels' variants named after `uses`, of all cases and for both chips, in `jobs` processes (None: one
    a core). {"triton": version, "ptxas": version, "rows": [...]}; a row: `describe`, and "sm_80", "sm_90": `measure`.
    """
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET: set: the interpreter compiles nothing; unset it")
    work = [
        (case, index)
        for case in cases
        for index, variant in enumerate(variants(case))
        if variant.use in uses and variant.launched.name in kernels
    ]
    rows = [describe(variants(case)[index]) for case, index in work]
    with ProcessPoolExecutor(jobs or len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        measured = [[pool.submit(measure, *item, chip) for chip in CHIPS] for item in work]
        for row, chips in zip(rows, measured, strict=True):
            row |= {f"sm_{chip}": future.result() for chip, future in zip(CHIPS, chips, strict=True)}
    return {"triton": triton.__version__, "ptxas": triton.knobs.nvidia.ptxas.version, "rows": rows}


def file_name(version: str) -> str:
    """Where the table of one Triton lies: "kernel_resources_triton-3.9.json" of "3.9.0"."""
    return f"kernel_resources_triton-{'.'.join(version.split('.')[:2])}.json"


def read_tables(folder: Path) -> list[dict]:
    """The tables of all Tritons in a folder, the newest last."""
    found = [json.loads(path.read_text()) for path in folder.glob("kernel_resources_triton-*.json")]
    return sorted(found, key=lambda table: [int(part) for part in table["triton"].split(".")[:2]])


def write(found: dict, folder: Path) -> None:
    """Replace this Triton's table, and make the page of all that are there."""
    rows = ",\n".join("  " + json.dumps(row) for row in found["rows"])
    head = f'{{"triton": "{found["triton"]}", "ptxas": "{found["ptxas"]}", "rows": [\n'
    (folder / file_name(found["triton"])).write_text(f"{head}{rows}\n]}}\n")
    (folder / "kernel_resources.md").write_text(markdown(read_tables(folder), TRAINED))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, help="dtypes and ranks, bfloat16:8")
    parser.add_argument("--training", action="store_true", help="only what a run with the default settings launches")
    parser.add_argument("--kernel", nargs="+", choices=TILES, default=tuple(TILES), help="only these kernels")
    parser.add_argument("--write", type=Path, help="folder for kernel_resources_triton-VERSION.json and the page")
    parser.add_argument("--jobs", type=int, help="processes; default: one a core")
    arguments = parser.parse_args()
    uses = TRAINED if arguments.training else tuple(USES)
    found = table(arguments.only, uses, arguments.kernel, arguments.jobs)
    if arguments.write:
        write(found, arguments.write)
    else:
        print(markdown([found], TRAINED), end="")


if __name__ == "__main__":
    main()
