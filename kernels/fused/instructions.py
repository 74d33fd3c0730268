"""From a kernel's machine code (SASS of sm_80 and sm_90) to instructions by class. Needs no GPU.

The count is static: what one thread of a warp issues on its way once through a piece of code, both sides of a branch
included. Subroutines, and blocks for warps that have fallen apart (`BRA.DIV`), are slow paths and left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

# By the unit that an instruction keeps busy, as in NVIDIA's "CUDA Binary Utilities", instruction set reference of
# Ampere and Hopper. Integer: address arithmetic, logic, comparisons and selects, on the uniform datapath too. Float:
# conversions from and to floating point too. Shared memory: shuffles too, which pass through it. Global memory: local
# memory too, where spilled registers are. Other: moves, constants, barriers, control.
_OPCODES = {
    "integer": """
        BMSK BREV FLO IABS IADD IADD3 IADD32I IDP IDP4A IMAD IMNMX IMUL IMUL32I ISCADD ISETP LEA LOP LOP3 LOP32I POPC
        SHF SHL SHR VABSDIFF VABSDIFF4 VHMNMX VIADD VIADDMNMX VIMNMX VIMNMX3 PRMT SEL SGXT PLOP3 PSETP P2R R2P I2I I2IP
        UBMSK UBREV UFLO UIADD3 UIMAD UISETP ULEA ULOP ULOP3 ULOP32I UPLOP3 UPOPC UPRMT UPSETP UP2UR UR2UP USEL USGXT
        USHF USHL USHR REDUX CREDUX""",
    "float": """
        FADD FADD32I FCHK FFMA FFMA32I FMNMX FMUL FMUL32I FSEL FSET FSETP FSWZADD HADD2 HADD2_32I HFMA2 HFMA2_32I HMNMX2
        HMUL2 HMUL2_32I HSET2 HSETP2 DADD DFMA DMUL DSETP F2F F2FP F2I F2IP FRND I2F I2FP UF2FP""",
    "special function": "MUFU",
    "tensor core": "HMMA IMMA BMMA DMMA HGMMA IGMMA QGMMA BGMMA WARPGROUP WARPGROUPSET",
    "shared memory": "LDS LDSM STS STSM STAS ATOMS REDAS SHFL MOVM",
    "global memory": """
        LD LDG LDGMC LDGSTS LDL ST STG STL ATOM ATOMG RED REDG UBLKCP UBLKPF UBLKRED UTMALDG UTMASTG UTMAPF UTMAREDG""",
    "other": """
        MOV MOV32I UMOV CS2R S2R S2UR B2R R2B R2UR LDC ULDC LEPC ULEPC UCLEA GETLMEMBASE SETLMEMBASE SETCTAID VOTE VOTEU
        MATCH ELECT BAR DEPBAR LDGDEPBAR SYNCS MEMBAR FENCE ERRBAR CGAERRBAR CCTL CCTLL CCTLT ACQBULK UCGABAR_ARV
        UCGABAR_WAIT UTMACCTL UTMACMDFLUSH USETMAXREG QSPC BMOV BPT BRA BREAK BSSY BSYNC CALL ENDCOLLECTIVE EXIT KILL
        NANOSLEEP NOP PMTRIG PREEXIT RET RPCMOV RTT WARPSYNC YIELD""",
}
CLASSES = tuple(_OPCODES)
_CLASS_OF = {opcode: kind for kind, opcodes in _OPCODES.items() for opcode in opcodes.split()}

_BYTES = 16  # of one instruction
_LINE = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;", re.MULTILINE)
# Moves in the guise of a multiply-add of zeros.
_MOVE = re.compile(r"(IMAD|HFMA2)\b.* -?RZ, -?RZ, ")
# HMMA.16816: rows, columns and depth of one warp's product; HGMMA.64x16x8: of four warps'.
_WARP_SHAPE = re.compile(r"\.(16|8)(8|16)(4|8|16|32|64)\b")
_WARPGROUP_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)\b")


class Instruction(NamedTuple):
    """One line of SASS. target: the address that a branch or call goes to; may_pass: the next line may come next."""

    address: int
    opcode: str
    operands: str
    target: int | None
    may_pass: bool

    @property
    def kind(self) -> str:
        """Its class, one of CLASSES."""
        return "other" if _MOVE.match(f"{self.opcode} {self.operands}") else _CLASS_OF[self.opcode.split(".")[0]]

    @property
    def products(self) -> int:
        """Multiply-adds of one warp on the tensor cores."""
        if self.kind != "tensor core" or self.opcode.startswith("WARPGROUP"):
            return 0
        if shape := _WARPGROUP_SHAPE.search(self.opcode):
            rows, columns, depth = map(int, shape.groups())
            return rows * columns * depth // 4
        if shape := _WARP_SHAPE.search(self.opcode):
            rows, columns, depth = map(int, shape.groups())
            return rows * columns * depth
        raise ValueError(f"instructions: {self.opcode}: no shape known; extend instructions.Instruction.products")


class Counts(NamedTuple):
    """A thread's instructions in one pass through the code that makes a tile, by class, and its warp's multiply-adds
    on the tensor cores there; `once`: instructions outside of it; `loop`: whether that code is a loop's body.
    """

    work: dict[str, int]
    products: int
    once: int
    loop: bool

    @property
    def total(self) -> int:
        return sum(self.work.values())


def count(sass: str) -> Counts:
    """Count one kernel in what `cuobjdump --dump-sass` prints, see `work`."""
    code = parse(sass)
    run = reachable(code)
    addresses, loop = work(code)
    kinds = Counter(code[place].kind for place in addresses)
    return Counts(
        {kind: kinds[kind] for kind in CLASSES},
        sum(code[place].products for place in addresses),
        len(run) - len(addresses),
        loop,
    )


def parse(sass: str) -> list[Instruction]:
    """The instructions of one kernel in the order of their addresses; a ValueError for what cannot be counted."""
    if sass.count("Function :") > 1:
        raise ValueError("instructions: more than one function: tl.jit functions must be inlined")
    code = []
    for address, guard, opcode, operands in _LINE.findall(sass):
        base, target, may_pass = opcode.split(".")[0], None, True
        if int(address, 16) != _BYTES * len(code):
            raise ValueError(f"instructions: a line before 0x{address} was not understood")
        if base in ("BRX", "BRXU", "JMP", "JMX", "JMXU"):
            raise ValueError(f"instructions: {opcode} at 0x{address}: no indirect branch can be followed")
        if base not in _CLASS_OF:
            raise ValueError(f"instructions: {opcode}: unknown opcode; add it to a class of instructions._OPCODES")
        *conditions, goal = operands.split() or [""]
        if base in ("BRA", "CALL") and not opcode.startswith("BRA.DIV"):
            target = int(goal, 16) if goal.startswith("0x") else None
            may_pass = base == "CALL" or bool(guard or conditions)
        elif base in ("EXIT", "RET", "KILL"):
            may_pass = bool(guard)
        code.append(Instruction(int(address, 16), opcode, operands, target, may_pass))
    if not code:
        raise ValueError("instructions: no machine code found")
    return code


def _next(code: Sequence[Instruction]) -> list[list[int]]:
    """By place in the code, the places that may come next."""
    place = {instruction.address: index for index, instruction in enumerate(code)}
    following = [[index + 1] if code[index].may_pass and index + 1 < len(code) else [] for index in range(len(code))]
    calls = []
    for index, instruction in enumerate(code):
        if instruction.target is None:
            continue
        if instruction.opcode.startswith("CALL"):
            calls.append((index, place[instruction.target]))
        else:
            following[index].append(place[instruction.target])
    # ptxas also leaves a loop by a call, from which nothing returns: such a call is a branch
    bodies = {called: _reached(called, following) for _, called in calls}
    returning = {called for called, body in bodies.items() if any(code[p].opcode.startswith("RET") for p in body)}
    for index, called in calls:
        if called not in returning:
            following[index].append(called)
    return following


def _reached(start: int, following: Sequence[Collection[int]], without: int | None = None) -> set[int]:
    found, open_places = {start}, [start]
    while open_places:
        for place in following[open_places.pop()]:
            if place not in found and place != without:
                found.add(place)
                open_places.append(place)
    return found


def reachable(code: Sequence[Instruction]) -> set[int]:
    """Places that a run of the kernel can come to: not the subroutines and the padding behind it."""
    return _reached(0, _next(code))


def loops(code: Sequence[Instruction]) -> list[frozenset[int]]:
    """Places of every natural loop: a branch back to a place through which all ways to the branch lead, and all that
    lies on ways from there to the branch. Branches back to one place are one loop.
    """
    following = _next(code)
    run = _reached(0, following)
    before: list[list[int]] = [[] for _ in code]
    for place in run:
        for after in following[place]:
            before[after].append(place)
    bodies: dict[int, set[int]] = {}
    for place in run:
        for head in following[place]:
            if head <= place and (head in (0, place) or place not in _reached(0, following, without=head)):
                body = {head} if place == head else _reached(place, before, without=head) | {head}
                bodies.setdefault(head, set()).update(body)
    return [frozenset(body) for body in bodies.values()]


def work(code: Sequence[Instruction]) -> tuple[frozenset[int], bool]:
    """Places of the code that makes a tile, and whether it is a loop's body.

    It is a loop with products on tensor cores (any loop, where the kernel has none) inside which there is no other
    such loop, the one with the most instructions; loops inside it count once. Without a loop it is all that is run.
    """

    def products(places: Iterable[int]) -> int:
        return sum(code[place].products for place in places)

    run = reachable(code)
    candidates = [body for body in loops(code) if products(body) or not products(run)]
    innermost = [body for body in candidates if not any(other < body for other in candidates)]
    return (max(innermost, key=len), True) if innermost else (frozenset(run), False)
