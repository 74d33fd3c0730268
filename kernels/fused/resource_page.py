"""`resources` as a page: the goals, what training launches under each compiler, and every variant under the newest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import groupby
from operator import itemgetter

from abmll.kernels.fused import goals
from abmll.kernels.fused.chips import CHIPS, Chip
from abmll.kernels.fused.instructions import CLASSES

EXPLANATION = (
    "- *stack*: bytes a thread, registers spilled to memory; *shared*: of a block.",
    "- *instructions*: counted in the machine code (`kernels/fused/instructions.py`), those of the loop that makes a",
    "  program's tiles, by the elements that a thread makes in one iteration; all, of a kernel without such a loop.",
    "  Both sides of a branch count. *once*: a thread's instructions outside of that loop.",
    "- Classes: *integer* has addresses, comparisons and selects; *float* has conversions; *shared memory* has",
    "  shuffles; *other* is moves, constants, barriers and control.",
    "- *products*: multiply-adds on tensor cores an element, with the rank's padding and with work that warps repeat.",
    "- *warps an SM*: held at once, as registers, shared memory and threads allow.",
)
# Columns with a number of each chip, from what `resources.measure` returns.
MEASURES: dict[str, Callable[[dict], float]] = {
    "registers": itemgetter("registers"),
    "stack": itemgetter("stack"),
    "shared KiB": lambda made: made["shared"] / 1024,
    "warps an SM": itemgetter("warps_per_sm"),
    "instructions": itemgetter("total"),
    "once": itemgetter("once"),
    "products": itemgetter("products"),
}


def markdown(tables: Sequence[dict], training: Collection[str]) -> str:
    """tables: one a compiler, the newest last, see `resources.table`; training: the uses of a training step."""
    newest = tables[-1]
    versions = [f"Triton {table['triton']}" for table in tables]
    compilers = " and by ".join(f"Triton {table['triton']} with ptxas {table['ptxas']}" for table in tables)
    lines = [
        "# What each kernel takes of a chip",
        "",
        "Made by `python -m abmll.kernels.fused.resources --write benchmarks/results`, once with each Triton: do not",
        f"edit. Compiled without a GPU by {compilers}; two numbers are",
        "sm_80's / sm_90's. A variant is named after the first use that launches it.",
        "",
        *EXPLANATION,
        *(_limits(chip, limits) for chip, limits in CHIPS.items()),
        "",
        "## Goals",
        "",
        f"{goals.CASE[0]}, rank {goals.CASE[1]}, {goals.CHIP}, instructions an element, and no stack:",
        "",
        *_grid(("kernel", "use", "at most", *versions), _goals(tables)),
        "",
        "## What training launches, under each compiler",
        "",
        "Instructions an element:",
        "",
        *_grid(("dtype", "rank", "kernel", "use", *versions), _totals(tables, training)),
    ]
    for (dtype, rank), group in groupby(newest["rows"], itemgetter("dtype", "rank")):
        rows = sorted(group, key=itemgetter("kernel"))
        lines += ["", f"## {dtype}, rank {rank}, Triton {newest['triton']}", ""]
        lines += _grid(("kernel", "use", "block", "warps", "stages", *MEASURES), map(_resources, rows))
        lines += ["", "Instructions an element by class:", ""]
        lines += _grid(("kernel", "use", *CLASSES), map(_classes, rows))
    return "\n".join(lines) + "\n"


def _limits(chip: int, limits: Chip) -> str:
    shared = f"{limits.shared // 1024} KiB of shared memory, at most {limits.shared_block // 1024} for a block"
    return f"- sm_{chip}: {limits.registers:,} registers, {limits.warps} warps, {limits.blocks} blocks an SM; {shared}."


def _grid(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [f"| {' | '.join(map(str, cells))} |" for cells in (head, ("---",) * len(head), *rows)]


def _chips(row: dict, value: Callable[[dict], float]) -> str:
    return " / ".join(f"{round(value(row[f'sm_{chip}']), 1):g}" for chip in CHIPS)


def _goals(tables: Sequence[dict]) -> list[list[str]]:
    rows = []
    for goal in goals.GOALS:
        cells = [f"`{goal.kernel}`", goal.use, f"{goal.instructions:g}"]
        for table in tables:
            made = goals.found(table["rows"], goal)
            if made is None:
                cells.append("-")
            else:
                cells.append(f"{made['total']:.1f}" + ("" if goals.meets(made, goal) else " (missed)"))
        rows.append(cells)
    return rows


def _totals(tables: Sequence[dict], training: Collection[str]) -> list[list[object]]:
    by_compiler = [{_name(row): row for row in table["rows"] if row["use"] in training} for table in tables]
    every = dict.fromkeys(name for rows in by_compiler[::-1] for name in rows)  # in the newest table's order
    lines = []
    for name in every:
        dtype, rank, kernel, use, _ = name
        totals = [_chips(rows[name], itemgetter("total")) if name in rows else "-" for rows in by_compiler]
        lines.append([dtype, rank, f"`{kernel}`", use, *totals])
    return lines


def _name(row: dict) -> tuple:
    """One use may launch a kernel with two sets of constants."""
    return row["dtype"], row["rank"], row["kernel"], row["use"], str(row["constants"])


def _resources(row: dict) -> list[object]:
    names = ("ROWS", "COLUMNS", "DEPTH")
    block = " x ".join(str(row["constants"][name]) for name in names if name in row["constants"])
    options = row["options"]["num_warps"], row["options"]["num_stages"]
    return [f"`{row['kernel']}`", row["use"], block, *options, *(_chips(row, value) for value in MEASURES.values())]


def _classes(row: dict) -> list[object]:
    return [
        *(f"`{row['kernel']}`", row["use"]),
        *(_chips(row, lambda made, kind=kind: made["instructions"][kind]) for kind in CLASSES),
    ]
