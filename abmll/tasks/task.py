"""The types that the three sources of tasks share, before and after prompting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Example:
    """One multiple-choice question as written: 2 or more distinct options, one of them the output."""

    input: str
    options: tuple[str, ...]
    output: str

    @property
    def label(self) -> int:
        return self.options.index(self.output)


@dataclass(frozen=True)
class Task:
    """A named task. `train` feeds gradient steps, `validation` picks the best checkpoint, `test` is only scored."""

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class PromptedExample:
    """An example as token ids of the prompt; the answer is the letter with index `label` of `num_options`."""

    token_ids: Sequence[int]  # the prompter makes an array: a tuple of ints takes nine times the memory
    label: int
    num_options: int
    truncated: bool = False  # whether the question lost a part


@dataclass(frozen=True)
class Batch:
    """B prompts, padded on the right to T tokens.

    input_ids [B, T] int64; token_mask [B, T] bool, true at real tokens; answer_position [B] int64, the last real
    token, whose logits predict the letter; target [B] int64, the letter's token id; label [B] int64, its index;
    letter_ids [B, C] int64, token ids of the first C letters; option_mask [B, C] bool, true at the example's options.
    """

    input_ids: torch.Tensor
    token_mask: torch.Tensor
    answer_position: torch.Tensor
    target: torch.Tensor
    label: torch.Tensor
    letter_ids: torch.Tensor
    option_mask: torch.Tensor
    num_real_tokens: int  # kept as an integer so that counting tokens needs no device synchronisation

    def to(self, device: torch.device | str) -> Batch:
        move = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if torch.is_tensor(value)
        }
        return Batch(**{**vars(self), **move})

    def repeat(self, times: int) -> Batch:
        """The whole batch `times` over, one after the other."""
        copies = {
            name: value.repeat(times, *[1] * (value.dim() - 1))
            for name, value in vars(self).items()
            if torch.is_tensor(value)
        }
        return Batch(**copies, num_real_tokens=times * self.num_real_tokens)


@dataclass(frozen=True)
class Episode:
    """One task's visit: `support` holds the K inner batches, `query` a fresh batch for the outer step if asked for."""

    index: int
    epoch: int
    task: str
    support: tuple[Batch, ...]
    query: Batch | None

    def to(self, device: torch.device | str) -> Episode:
        query = None if self.query is None else self.query.to(device)
        return replace(self, support=tuple(batch.to(device) for batch in self.support), query=query)
