"""Kernels with known arithmetic, compiled and counted for both chips: run by `test_instructions` in a process of its
own, where Triton compiles. Prints the counts of each kernel and chip as JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from abmll.kernels.fused import instructions
from abmll.kernels.fused.chips import CHIPS, WARP
from abmll.kernels.fused.resources import disassemble

WARPS = 4
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
TILE = 2048
ROWS, COLUMNS, DEPTH = 64, 32, 16


@triton.jit
def elementwise_kernel(x_ptr, y_ptr, shift, tiles, TILE: tl.constexpr):
    """y = 2 ** (x x + shift)."""
    for tile in range(tiles):
        places = tile * TILE + tl.arange(0, TILE)
        x = tl.load(x_ptr + places)
        tl.store(y_ptr + places, tl.exp2(tl.fma(x, x, shift)))


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """c [tiles ROWS, COLUMNS] = a b, behind a loop that sums the parts of b: more code there must not count."""
    depths = tl.arange(0, DEPTH)
    columns = tl.arange(0, COLUMNS)
    b = tl.zeros((DEPTH, COLUMNS), tl.float32)
    for part in range(tiles):
        b += tl.load(b_ptr + (part * DEPTH + depths[:, None]) * COLUMNS + columns[None, :]).to(tl.float32)
    b = b.to(tl.float16)
    for tile in range(tiles):
        rows = tile * ROWS + tl.arange(0, ROWS)
        a = tl.load(a_ptr + rows[:, None] * DEPTH + depths[None, :])
        tl.store(c_ptr + rows[:, None] * COLUMNS + columns[None, :], tl.dot(a, b))


@triton.jit
def straight_kernel(x_ptr, y_ptr, shift, TILE: tl.constexpr):
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + places)
    tl.store(y_ptr + places, tl.exp2(tl.fma(x, x, shift)))


@dataclass(frozen=True)
class Case:
    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, int]
    elements: int


FLOATS = {"x_ptr": "*fp32", "y_ptr": "*fp32", "shift": "fp32"}
CASES = (
    Case(elementwise_kernel, {**FLOATS, "tiles": "i32"}, {"TILE": TILE}, TILE),
    Case(straight_kernel, FLOATS, {"TILE": TILE}, TILE),
    Case(
        product_kernel,
        {"a_ptr": "*fp16", "b_ptr": "*fp16", "c_ptr": "*fp32", "tiles": "i32"},
        {"ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH},
        ROWS * COLUMNS,
    ),
)


def main() -> None:
    found = []
    for case in CASES:
        signature = {**case.signature, **dict.fromkeys(case.constants, "constexpr")}
        aligned = {
            (place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind[0] == "*"
        }
        source = ASTSource(case.kernel, signature, case.constants, aligned)
        for chip in CHIPS:
            compiled = triton.compile(source, target=GPUTarget("cuda", chip, WARP), options=OPTIONS)
            _, sass = disassemble(compiled.asm["cubin"])
            counts = instructions.count(sass)
            share = case.elements // (WARP * WARPS)
            found.append({"kernel": case.kernel.__name__, "chip": chip, "share": share, **counts._asdict()})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
