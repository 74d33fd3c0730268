"""How many episodes an outer step has, and which rank takes which item: even in number, and as even in work as can be,
so that none waits long for another.
"""

from __future__ import annotations

from collections.abc import Sequence

from abmll.config.schema import TrainerConfig


def tasks_per_step(config: TrainerConfig, world_size: int) -> int:
    """Episodes of an outer step over all ranks. ValueError where some ranks would get none."""
    number = config.tasks_per_step or world_size * config.parallel_episodes
    if number < world_size:
        raise ValueError(
            f"trainer.tasks_per_step: {number}: fewer than the {world_size} ranks, some would idle; use at least "
            f"{world_size}, or fewer ranks"
        )
    return number


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
