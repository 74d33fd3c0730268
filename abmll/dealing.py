"""Which rank takes which item: even in number, and as even in work as can be, so that none waits long for another."""

from __future__ import annotations

from collections.abc import Sequence


def deal(work: Sequence[float], ranks: int) -> list[list[int]]:
    """The items (their numbers, ascending) of each rank: at most ceil(items / ranks) each.

    The largest first, each to the rank with the least work that has room: at most a third more than the best deal's
    (Graham, "Bounds on multiprocessing timing anomalies", 1969, without the bound on numbers). A function of the
    arguments alone, so that all ranks find the same.
    """
    room = -(-len(work) // ranks)
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0.0] * ranks
    for item in sorted(range(len(work)), key=lambda number: (-work[number], number)):
        rank = min((r for r in range(ranks) if len(dealt[r]) < room), key=lambda r: (totals[r], len(dealt[r]), r))
        dealt[rank].append(item)
        totals[rank] += work[item]
    return [sorted(items) for items in dealt]
