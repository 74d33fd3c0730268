"""Prompted examples, joined into one padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from abmll.tasks.task import Batch, PromptedExample


def collate(examples: Sequence[PromptedExample], letter_ids: Sequence[int]) -> Batch:
    """B examples -> Batch, padded on the right to the longest; `letter_ids` are the tokenizer's ids of A, B, C, ...

    Padding is token 0: under causal attention a token on the right never reaches the answer position.
    """
    if not examples:
        raise ValueError("collate: no examples: a batch needs at least one")
    lengths = torch.tensor([len(example.token_ids) for example in examples])
    labels = torch.tensor([example.label for example in examples])
    num_options = torch.tensor([example.num_options for example in examples])
    longest, most = int(lengths.max()), int(num_options.max())
    input_ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    for row, example in zip(input_ids, examples, strict=True):
        row[: len(example.token_ids)] = torch.tensor(list(example.token_ids))
    letters = torch.tensor(list(letter_ids[:most]))
    return Batch(
        input_ids=input_ids,
        token_mask=torch.arange(longest) < lengths[:, None],
        answer_position=lengths - 1,
        target=letters[labels],
        label=labels,
        letter_ids=letters.repeat(len(examples), 1),
        option_mask=torch.arange(most) < num_options[:, None],
        num_real_tokens=int(lengths.sum()),
    )
