"""Collation: right padding, answer positions, letters and options."""

import pytest
import torch

from abmll.tasks.batch import collate, side_by_side
from abmll.tasks.task import PromptedExample

LETTER_IDS = tuple(range(100, 126))


def test_collate():
    batch = collate([PromptedExample((5, 6, 7), 1, 2), PromptedExample((8,), 2, 3)], LETTER_IDS)
    assert batch.input_ids.tolist() == [5, 6, 7, 8]
    assert batch.position_ids.tolist() == [0, 1, 2, 0]
    assert batch.answer_position.tolist() == [2, 3]
    assert (batch.prompts.sizes, batch.groups.sizes, batch.group_prompts) == ((3, 1), (4,), (2,))
    assert batch.target.tolist() == [101, 102]
    assert batch.label.tolist() == [1, 2]
    assert batch.letter_ids.tolist() == [[100, 101, 102], [100, 101, 102]]
    assert batch.option_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.num_tokens == 4
    integers = (batch.input_ids, batch.position_ids, batch.answer_position, batch.target, batch.label, batch.letter_ids)
    assert {tensor.dtype for tensor in integers} == {torch.int64}
    assert batch.option_mask.dtype == torch.bool


def test_collate_keeps_order_and_one_example():
    rows = [PromptedExample((number,) * number, 0, 26) for number in (3, 1, 4)]
    batch = collate(rows, LETTER_IDS)
    assert batch.input_ids[batch.answer_position].tolist() == [3, 1, 4]
    assert collate(rows[:1], LETTER_IDS).letter_ids.shape == (1, 26)
    with pytest.raises(ValueError, match="no examples"):
        collate([], LETTER_IDS)


def test_batches_side_by_side_are_groups_of_one():
    first = collate([PromptedExample((5, 6, 7), 1, 2), PromptedExample((8,), 0, 2)], LETTER_IDS)
    second = collate([PromptedExample((9, 9), 3, 4)], LETTER_IDS)
    batch = side_by_side([first, second, first])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 9, 5, 6, 7, 8]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1, 0, 1, 2, 0]
    assert batch.answer_position.tolist() == [2, 3, 5, 8, 9]
    assert batch.prompts.bounds.tolist() == [0, 3, 4, 6, 9, 10]
    assert batch.groups.bounds.tolist() == [0, 4, 6, 10] and batch.group_prompts == (2, 1, 2)
    assert batch.target.tolist() == [101, 100, 103, 101, 100]
    assert (
        batch.option_mask.tolist() == [[True, True, False, False]] * 2 + [[True] * 4] + [[True, True, False, False]] * 2
    )
    assert batch.letter_ids[2].tolist() == [100, 101, 102, 103]
    assert side_by_side([first]) is first
