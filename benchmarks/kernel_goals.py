"""What the fused kernels are held to on an H100, beside what was measured."""

from __future__ import annotations

from typing import NamedTuple

from kernel_cases import DTYPES, LLAMA_Q

from abmll.kernels.fused.weight import scratch_bytes

WAYS = {"replayed": "graph replay", "launched": "launched one by one"}
MEGABYTE = 1e6

# Held to at forward + backward of GOAL_CASE on an H100, by graph replay and launched.
GOAL_CASE = {"shape": LLAMA_Q.name, "rank": 8, "groups": 1, "tokens": 1024, "dtype": "bf16"}


class Goal(NamedTuple):
    """The fused code's time over a rival's is at most `limit`; or, with `faster`, it is at least so many times faster.
    The rival is the first of `rivals` that was measured.
    """

    rivals: tuple[str, ...]
    limit: float
    faster: bool = False
    note: str = ""

    def value(self, times: dict[str, float], rival: str) -> float:
        ratio = times["fused"] / times[rival]
        return 1 / ratio if self.faster else ratio

    def reached(self, value: float) -> bool:
        return value >= self.limit if self.faster else value <= self.limit

    def title(self, rival: str) -> str:
        return f"times faster than `{rival}`{self.note}" if self.faster else f"time over `{rival}`'s{self.note}"


# The harder rivals: `plain` and `compiled` make their noise from 64-bit integers, PEFT without autocast multiplies in
# fp32.
OF_PLAIN_CODE = (Goal(("plain_randn",), 4.0, faster=True), Goal(("compiled_randn",), 1.5, faster=True))
TIME_GOALS = {
    "activation": (
        Goal(("frozen",), 1.5),
        Goal(("frozen",), 1.25, note=" (stretch)"),
        Goal(("peft_autocast", "lora"), 1.0),
        *OF_PLAIN_CODE,
    ),
    "weight": (Goal(("frozen",), 3.5), *OF_PLAIN_CODE),
}
MEMORY_GOAL = 1.0  # MB


def goals_table(rows: list[dict]) -> str:
    """Every goal with the measured numbers, and whether it is reached."""
    case = [row for row in rows if row["mode"] == "both" and all(row[name] == v for name, v in GOAL_CASE.items())]
    where = f"{GOAL_CASE['shape']}, r = {GOAL_CASE['rank']}, {GOAL_CASE['tokens']:,} tokens, {GOAL_CASE['dtype']}"
    if not case:
        return f"Not measured here: forward + backward of {where}."
    device = case[0]["device"]
    by_name = {row["contender"]: row for row in case}
    heading = f"Forward + backward of {where}; {device}"
    if "H100" not in device:
        heading += " (the goals are set for an H100)"
    lines = [f"{heading}.", "", "| goal | limit | " + " | ".join(f"fused, {way}" for way in WAYS.values()) + " |"]
    lines.append("|" + "---|" * (len(WAYS) + 2))
    times = {
        way: {name: row[way]["median_ms"] for name, row in by_name.items() if row[way] is not None} for way in WAYS
    }
    for goal in TIME_GOALS[case[0]["posterior"]]:
        rival = next((name for name in goal.rivals if any(name in found for found in times.values())), goal.rivals[0])
        cells = []
        for found in times.values():
            if rival in found and "fused" in found:
                value = goal.value(found, rival)
                cells.append(f"{value:.2f} {_verdict(goal.reached(value))}")
            else:
                cells.append("not measured")
        bound = "at least" if goal.faster else "at most"
        lines.append(f"| {goal.title(rival)} | {bound} {goal.limit:g} | {' | '.join(cells)} |")
    scratch = _scratch(case[0])
    extra = extra_memory(by_name["fused"]) if "fused" in by_name else None
    cell = "not measured" if extra is None else _memory_cell(extra - scratch / MEGABYTE)
    apart = f", apart from {scratch / MEGABYTE:.0f} MB that all layers share" if scratch else ""
    lines.append(f"| extra peak memory, MB{apart} | under {MEMORY_GOAL:g} |{f' {cell} |' * len(WAYS)}")
    return "\n".join(lines)


def _memory_cell(extra: float) -> str:
    return f"{extra:.2f} {_verdict(extra < MEMORY_GOAL)}"


def _scratch(row: dict) -> int:
    """Bytes of the buffer that the layers share."""
    if row["posterior"] != "weight":
        return 0
    return scratch_bytes(row["N"], row["K"], DTYPES[row["dtype"]])


def _verdict(reached: bool) -> str:
    return "reached" if reached else "NOT reached"


def extra_memory(row: dict) -> float | None:
    """MB; None for the frozen linear itself, and where it or this was not measured."""
    extra = None if row["memory"] is None else row["memory"].get("extra_peak_allocated")
    return None if row["contender"] == "frozen" or extra is None else extra / MEGABYTE
