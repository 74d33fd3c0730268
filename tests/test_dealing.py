"""Items dealt to ranks: each once, even in number, and as even in work as a greedy deal gets."""

from __future__ import annotations

import random
from itertools import product

import pytest

from abmll.dealing import deal


def totals(work, dealt):
    return [sum(work[item] for item in items) for items in dealt]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 40])
def test_every_item_once_and_no_rank_with_more_than_its_share(count, ranks):
    draw = random.Random(count)
    work = [draw.randrange(1, 1000) for _ in range(count)]
    dealt = deal(work, ranks)
    assert len(dealt) == ranks and sorted(item for items in dealt for item in items) == list(range(count))
    assert all(items == sorted(items) for items in dealt)
    assert max(map(len, dealt)) <= -(-count // ranks)
    assert count < ranks or min(map(len, dealt)) > 0


def test_lengths_are_balanced():
    """Where round robin leaves one rank with all the long ones."""
    work = [500, 40] * 8
    assert totals(work, deal(work, 2)) == [2160, 2160]
    assert totals(work, [list(range(0, 16, 2)), list(range(1, 16, 2))]) == [4000, 320]


def test_small_deals_are_near_the_best():
    """All ways to deal six items to two ranks, three each: at most a third more than the best (Graham)."""
    draw = random.Random(3)
    for _ in range(200):
        work = [draw.randrange(1, 100) for _ in range(6)]
        best = min(
            max(sum(w for w, rank in zip(work, ranks, strict=True) if rank == r) for r in (0, 1))
            for ranks in product((0, 1), repeat=6)
            if sum(ranks) == 3
        )
        assert max(totals(work, deal(work, 2))) <= 4 / 3 * best


def test_equal_work_goes_round():
    assert deal([1, 1, 1, 1], 2) == [[0, 2], [1, 3]]
