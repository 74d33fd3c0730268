"""Machine code to counts: on short pieces of SASS, and on compiled kernels whose arithmetic is known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from abmll.kernels.fused import instructions
from abmll.kernels.fused.instructions import CLASSES, count, loops, parse, reachable, work


def sass(*lines: str) -> str:
    """Lines as cuobjdump prints them, 16 bytes each: the first has address 0."""
    addressed = (f"        /*{16 * place:04x}*/    {line} ;    /* 0x0000 */\n" for place, line in enumerate(lines))
    return "\t\tFunction : some_kernel\n" + "                      /* 0x000fe20000000800 */\n".join(addressed)


def classes(*lines: str) -> dict[str, int]:
    return {kind: number for kind, number in count(sass(*lines, "EXIT")).work.items() if number}


def test_line_is_parsed():
    plain, guarded, uniform, load = parse(
        sass(
            "FFMA.FTZ R0, R1, -R2, 0.5", "@!P0 BRA 0x40", "@UP3 UIADD3 UR4, UR5, 0x1, URZ", "LDG.E R0, desc[UR4][R2.64]"
        )
    )
    assert plain == (0, "FFMA.FTZ", "R0, R1, -R2, 0.5", None, True)
    assert guarded == (16, "BRA", "0x40", 64, True)
    assert uniform.opcode == "UIADD3" and uniform.may_pass
    assert load.operands == "R0, desc[UR4][R2.64]"


@pytest.mark.parametrize(
    ("line", "kind"),
    (
        ("IMAD.WIDE.U32 R2, R0, R1, RZ", "integer"),
        ("LOP3.LUT R0, R1, R2, RZ, 0x3c, !PT", "integer"),
        ("UIADD3 UR4, UR4, 0x1, URZ", "integer"),
        ("SEL R0, R1, R2, P0", "integer"),
        ("FSEL R0, R1, R2, P0", "float"),
        ("F2FP.BF16.F32.PACK_AB R0, R1, R2", "float"),
        ("I2FP.F32.U32 R0, R1", "float"),
        ("HFMA2.BF16_V2 R0, R1, R2, R3", "float"),
        ("MUFU.EX2 R0, R1", "special function"),
        ("HMMA.1688.F32.TF32 R0, R4, R8, R0", "tensor core"),
        ("WARPGROUP.ARRIVE", "tensor core"),
        ("LDSM.16.M88.4 R0, [R1]", "shared memory"),
        ("SHFL.BFLY PT, R0, R1, 0x1, 0x1f", "shared memory"),
        ("LDGSTS.E.BYPASS.128 [R0], [R2.64]", "global memory"),
        ("UTMALDG.2D [UR8], [UR4]", "global memory"),
        ("STL.64 [R1], R2", "global memory"),
        ("MOV R0, R1", "other"),
        ("IMAD.MOV.U32 R0, RZ, RZ, R1", "other"),
        ("IMAD.U32 R0, RZ, RZ, UR4", "other"),
        ("HFMA2.MMA R3, -RZ, RZ, 0, 2.384185791015625e-07", "other"),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "other"),
    ),
)
def test_class(line, kind):
    assert parse(sass(line))[0].kind == kind


def test_opcode_has_one_class():
    listed = " ".join(instructions._OPCODES.values()).split()
    assert len(listed) == len(set(listed))


def test_unknown_opcode_is_named():
    with pytest.raises(ValueError, match=r"FROB\.WIDE"):
        count(sass("FADD R0, R1, R2", "FROB.WIDE R0, R1", "EXIT"))


def test_unknown_opcode_is_named_wherever_it_is():
    with pytest.raises(ValueError, match="FROB"):
        count(sass("HMMA.1688.F32 R4, R5, R6, R4", "@P0 BRA 0x0", "FROB R0, R1", "EXIT"))


def test_line_that_is_not_understood_is_told():
    text = sass("FADD R0, R1, R2", "FMUL R0, R0, R0", "EXIT")
    with pytest.raises(ValueError, match="before 0x0020"):
        parse(text.replace("FMUL", "%odd"))
    with pytest.raises(ValueError, match="no machine code"):
        parse("")


def test_indirect_branch_is_refused():
    with pytest.raises(ValueError, match="BRX at 0x0010"):
        count(sass("MOV R0, R1", "BRX R2 -0x10", "EXIT"))


def test_second_function_is_refused():
    with pytest.raises(ValueError, match="inlined"):
        parse(sass("EXIT") + sass("RET.REL.NODEC R2 0x0"))


@pytest.mark.parametrize(
    ("opcode", "products"),
    (
        ("HMMA.1688.F32.TF32", 16 * 8 * 8),
        ("HMMA.16816.F32.BF16", 16 * 8 * 16),
        ("HGMMA.64x16x8.F32.TF32", 64 * 16 * 8 // 4),
        ("WARPGROUP.DEPBAR.LE", 0),
        ("FFMA", 0),
    ),
)
def test_products_of_a_warp(opcode, products):
    assert parse(sass(f"{opcode} R0, R4, R8, R0"))[0].products == products


def test_unknown_shape_is_named():
    with pytest.raises(ValueError, match=r"HMMA\.ROUND"):
        parse(sass("HMMA.ROUND R0, R4, R8, R0"))[0].products  # noqa: B018


def test_whole_kernel_counts_without_a_loop():
    found = count(
        sass("@P1 EXIT", "LDG.E R0, [R2.64]", "FADD R0, R0, R1", "STG.E [R2.64], R0", "EXIT", "BRA 0x50", "NOP")
    )
    assert found.work == {**dict.fromkeys(CLASSES, 0), "global memory": 2, "float": 1, "other": 2}
    assert (found.total, found.once, found.loop) == (5, 0, False)


def test_code_behind_the_exit_does_not_count():
    # a square root's slow path: called, and returned from
    assert classes("@P0 CALL.REL.NOINC 0x30", "FADD R0, R1, R2", "EXIT", "FMUL R0, R0, R0", "RET.REL.NODEC R2 0x0") == {
        "float": 1,
        "other": 2,
    }


def test_call_without_return_is_a_branch():
    code = parse(sass("MUFU.EX2 R0, R0", "@P0 CALL.REL.NOINC 0x30", "BRA 0x0", "FADD R0, R1, R2", "EXIT"))
    assert reachable(code) == {0, 1, 2, 3, 4}
    assert loops(code) == [{0, 1, 2}]


NEST = (
    "S2R R0, SR_TID.X",
    *("LDG.E R1, [R2.64]", "FADD R3, R3, R1", "@P0 BRA 0x10"),  # 1 to 3: sums something
    "MOV R9, R8",  # 4: head of the outer loop
    *("HMMA.1688.F32 R4, R5, R6, R4", "MUFU.EX2 R7, R4", "@P1 BRA 0x90", "FMUL R7, R7, R7", "@P2 BRA 0x50"),  # 5 to 9
    *("STG.E [R2.64], R7", "@!P3 BRA 0x40"),  # 10, 11
    "EXIT",
)


def test_loops_nest():
    assert sorted(map(sorted, loops(parse(sass(*NEST))))) == [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 9]]


def test_work_is_the_innermost_loop_with_products():
    found = count(sass(*NEST))
    assert {kind: number for kind, number in found.work.items() if number} == {
        "tensor core": 1,
        "special function": 1,
        "float": 1,
        "other": 2,
    }
    assert (found.products, found.once, found.loop) == (16 * 8 * 8, len(NEST) - 5, True)


def test_larger_loop_without_products_is_not_the_work():
    longer = ("LDG.E R1, [R2.64]", *("FADD R3, R3, R1",) * 9, "@P0 BRA 0x0")
    code = parse(sass(*longer, "HMMA.1688.F32 R4, R5, R6, R4", "@P1 BRA 0xb0", "EXIT"))
    assert work(code) == ({11, 12}, True)


def test_products_outside_of_every_loop_make_the_whole_kernel_the_work():
    code = parse(sass("FADD R3, R3, R1", "@P0 BRA 0x0", "HMMA.1688.F32 R4, R5, R6, R4", "EXIT"))
    assert work(code) == ({0, 1, 2, 3}, False)


def test_largest_of_the_innermost_loops_is_the_work_without_products():
    code = parse(sass("FADD R3, R3, R1", "@P0 BRA 0x0", "MUFU.EX2 R0, R0", "FMUL R0, R0, R0", "@P1 BRA 0x20", "EXIT"))
    assert work(code) == ({2, 3, 4}, True)


def test_branches_back_to_one_place_are_one_loop():
    code = parse(sass("FADD R0, R0, R1", "@P0 BRA 0x0", "FMUL R0, R0, R1", "@P1 BRA 0x0", "EXIT"))
    assert loops(code) == [{0, 1, 2, 3}]


def test_block_behind_the_exit_that_goes_back_is_no_loop_around_everything():
    # a rare case put aside by the compiler: 3 leads back to 1, but not all ways to it lead through 1
    code = parse(sass("@P0 BRA 0x30", "FADD R0, R0, R1", "EXIT", "FMUL R0, R0, R1", "BRA 0x10"))
    assert loops(code) == []


def test_divergent_path_is_left_out():
    lines = ("BRA.DIV UR4, 0x30", "FADD R0, R0, R1", "EXIT", "WARPSYNC.COLLECTIVE R2, 0x50", "BRA 0x10")
    assert reachable(parse(sass(*lines))) == {0, 1, 2}


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("counted_kernels.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {(row["kernel"], row["chip"]): row for row in json.loads(done.stdout)}


@pytest.mark.parametrize("chip", (80, 90))
@pytest.mark.parametrize(("kernel", "loop"), (("elementwise_kernel", True), ("straight_kernel", False)))
def test_known_arithmetic_is_counted(compiled, kernel, loop, chip):
    """An element: one fused multiply-add, one exponential, a quarter of a load and of a store of 16 bytes."""
    found = compiled[kernel, chip]
    share = found["share"]
    assert found["loop"] == loop
    assert found["work"]["float"] == share
    assert found["work"]["special function"] == share
    assert found["work"]["global memory"] == 2 * share // 4
    assert found["work"]["tensor core"] == found["work"]["shared memory"] == found["products"] == 0


@pytest.mark.parametrize("chip", (80, 90))
def test_products_of_a_compiled_kernel_are_counted(compiled, chip):
    """The loop that multiplies, and not the larger one that sums before it."""
    found = compiled["product_kernel", chip]
    assert found["loop"]
    assert found["products"] == 32 * 16 * found["share"]  # a warp's; every element is a sum of 16
    assert found["work"]["tensor core"] > 0 and found["work"]["special function"] == 0
