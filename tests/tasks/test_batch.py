"""Collation: right padding, answer positions, letters and options."""

import pytest
import torch

from abmll.tasks.batch import collate
from abmll.tasks.task import PromptedExample

LETTER_IDS = tuple(range(100, 126))


def test_collate():
    batch = collate([PromptedExample((5, 6, 7), 1, 2), PromptedExample((8,), 2, 3)], LETTER_IDS)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.token_mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.answer_position.tolist() == [2, 0]
    assert batch.target.tolist() == [101, 102]
    assert batch.label.tolist() == [1, 2]
    assert batch.letter_ids.tolist() == [[100, 101, 102], [100, 101, 102]]
    assert batch.option_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.num_real_tokens == 4
    integers = (batch.input_ids, batch.answer_position, batch.target, batch.label, batch.letter_ids)
    assert {tensor.dtype for tensor in integers} == {torch.int64}
    assert {batch.token_mask.dtype, batch.option_mask.dtype} == {torch.bool}


def test_collate_keeps_order_and_one_example():
    rows = [PromptedExample((number,) * number, 0, 26) for number in (3, 1, 4)]
    assert collate(rows, LETTER_IDS).input_ids[:, 0].tolist() == [3, 1, 4]
    assert collate(rows[:1], LETTER_IDS).letter_ids.shape == (1, 26)
    with pytest.raises(ValueError, match="no examples"):
        collate([], LETTER_IDS)
