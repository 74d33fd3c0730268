"""Prompted examples, packed into one batch; batches, side by side in another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from abmll.kernels import Groups
from abmll.tasks.task import Batch, PromptedExample


def collate(examples: Sequence[PromptedExample], letter_ids: Sequence[int]) -> Batch:
    """S examples of one group -> Batch; `letter_ids` are the tokenizer's ids of A, B, C, ..."""
    if not examples:
        raise ValueError("collate: no examples: a batch needs at least one")
    lengths = [len(example.token_ids) for example in examples]
    labels = torch.tensor([example.label for example in examples])
    num_options = torch.tensor([example.num_options for example in examples])
    most = max(example.num_options for example in examples)
    letters = torch.tensor(list(letter_ids[:most]))
    return Batch(
        input_ids=torch.cat([torch.tensor(list(example.token_ids)) for example in examples]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        answer_position=torch.tensor(lengths).cumsum(0) - 1,
        target=letters[labels],
        label=labels,
        letter_ids=letters.repeat(len(examples), 1),
        option_mask=torch.arange(most) < num_options[:, None],
        prompts=Groups.of(lengths, "cpu"),
        groups=Groups.of([sum(lengths)], "cpu"),
        group_prompts=(len(examples),),
    )


def side_by_side(batches: Sequence[Batch]) -> Batch:
    """The batches as groups of one, in their order, on their device; all get the letters of the one with the most."""
    if len(batches) == 1:
        return batches[0]
    device, first_tokens = batches[0].input_ids.device, [0]
    for batch in batches[:-1]:
        first_tokens.append(first_tokens[-1] + batch.num_tokens)
    letters = max((batch.letter_ids[0] for batch in batches), key=len)

    def joined(name: str) -> torch.Tensor:
        return torch.cat([getattr(batch, name) for batch in batches])

    masks = [pad(batch.option_mask, (0, len(letters) - batch.option_mask.shape[1])) for batch in batches]
    return Batch(
        input_ids=joined("input_ids"),
        position_ids=joined("position_ids"),
        answer_position=torch.cat(
            [batch.answer_position + first for batch, first in zip(batches, first_tokens, strict=True)]
        ),
        target=joined("target"),
        label=joined("label"),
        letter_ids=letters.repeat(sum(len(batch.target) for batch in batches), 1),
        option_mask=torch.cat(masks),
        prompts=Groups.of([size for batch in batches for size in batch.prompts.sizes], device),
        groups=Groups.of([size for batch in batches for size in batch.groups.sizes], device),
        group_prompts=tuple(count for batch in batches for count in batch.group_prompts),
    )
