"""Goals for the kernels of a training step, in machine instructions an element: set from prototypes, held by count."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from typing import NamedTuple

CASE, CHIP = ("bfloat16", 8), "sm_90"


class Goal(NamedTuple):
    """At most so many machine instructions an element, and nothing spilled, in a variant of `resources`."""

    kernel: str
    use: str
    instructions: float


# Named after the first use that launches them; the inner step's sample makes the sums of KL and prior too.
GOALS = (
    Goal("sample_kernel", "inner step", 70),
    Goal("sample_kernel", "outer step", 45),
    Goal("adjoint_kernel", "inner step", 80),
    Goal("adjoint_kernel", "outer step", 70),
    # several episodes in one forward pass cost no more
    Goal("sample_kernel", "unequal groups, inner step", 70),
    Goal("sample_kernel", "unequal groups, outer step", 45),
    Goal("adjoint_kernel", "unequal groups, inner step", 80),
    Goal("adjoint_kernel", "unequal groups, outer step", 70),
)


def found(rows: Iterable[dict], goal: Goal) -> dict | None:
    """What a compiler made of the goal's variant (of the dearest, if there are some), from the rows of its table; None:
    it is not among them.
    """
    names = (*CASE, goal.kernel, goal.use)
    made = [row[CHIP] for row in rows if (row["dtype"], row["rank"], row["kernel"], row["use"]) == names]
    return max(made, key=itemgetter("total"), default=None)


def meets(made: dict, goal: Goal) -> bool:
    """Whether that is within the goal."""
    return made["total"] <= goal.instructions and made["stack"] == 0


def missed(rows: Iterable[dict]) -> list[str]:
    """One line for each goal that the rows of a compiler's table do not meet; a goal without a row is missed too."""
    rows, lines = list(rows), []
    for goal in GOALS:
        what = f"{goal.kernel}, {goal.use}: goal {goal.instructions:g} instructions an element"
        made = found(rows, goal)
        if made is None:
            lines.append(f"{what}: no such variant")
        elif not meets(made, goal):
            lines.append(f"{what} and no stack: found {made['total']:.1f} and {made['stack']} bytes")
    return lines
