"""The types that the three sources of tasks share, before and after prompting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from abmll.kernels import Groups


@dataclass(frozen=True, slots=True)
class Example:
    """One multiple-choice question as written: 2 or more distinct options, one of them the output.

    `demonstrations`: other examples that its prompt shows before it, with their answers.
    """

    input: str
    options: tuple[str, ...]
    output: str
    demonstrations: tuple[Example, ...] = ()

    @property
    def label(self) -> int:
        return self.options.index(self.output)

    def asks_as(self, other: Example) -> bool:
        """Whether it is the same question, in whatever order the options stand."""
        return self.input == other.input and sorted(self.options) == sorted(other.options)

    def behind(self, others: Iterable[Example]) -> Example:
        """The same example behind the others as demonstrations, but for those that would tell it its own answer."""
        return replace(self, demonstrations=tuple(other for other in others if not self.asks_as(other)))


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
    left_out: int = 0  # demonstrations that did not fit


@dataclass(frozen=True)
class Batch:
    """S prompts, packed: their T tokens one after another, without padding. Those of a group (an episode) lie together.

    input_ids, position_ids [T] int64, a position counted from its prompt's start; answer_position [S] int64, where in
    [T] each prompt ends, whose logits predict the letter; target [S] int64, the letter's token id; label [S] int64, its
    index; letter_ids [S, C] int64, in every row token ids of the first C letters; option_mask [S, C] bool, true at the
    example's options. `prompts`: the tokens of each prompt; `groups`: those of each group; `group_prompts`: its
    prompts.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    answer_position: torch.Tensor
    target: torch.Tensor
    label: torch.Tensor
    letter_ids: torch.Tensor
    option_mask: torch.Tensor
    prompts: Groups
    groups: Groups
    group_prompts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.prompts.total

    def to(self, device: torch.device | str) -> Batch:
        def move(value):
            if isinstance(value, Groups):
                return Groups(value.sizes, move(value.bounds))
            if not torch.is_tensor(value):
                return value
            on_gpu = torch.device(device).type == "cuda" and value.device.type == "cpu"
            # a copy from pageable memory waits for the GPU
            return (value.pin_memory() if on_gpu else value).to(device, non_blocking=True)

        return Batch(**{name: move(value) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Episode:
    """One task's visit: `support` holds the K inner batches, `query` a fresh batch for the outer step if asked for."""

    index: int
    epoch: int
    task: str
    support: tuple[Batch, ...]
    query: Batch | None

    @property
    def num_tokens(self) -> int:
        return sum(batch.num_tokens for batch in (*self.support, *([self.query] if self.query else [])))
