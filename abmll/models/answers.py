"""The forward pass to the answers: logits at one position a prompt, and at no other."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from abmll.kernels import Groups
from abmll.models.packing import is_packed, packed_inputs, padded_inputs
from abmll.tasks.task import Batch

# names under which transformers' configurations scale the logits outside the output embeddings
LOGIT_SCALES = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
    "logits_mup_width_multiplier",
)


@dataclass(frozen=True)
class Rows:
    """A batch as a model's layers see it: its inputs, the rows of each group, which rows count (None: all do), and the
    tokens that answer (None: any may).
    """

    inputs: dict[str, Any]
    answer_position: Tensor  # [S], in all rows one after another
    groups: Groups
    token_mask: Tensor | None
    letter_ids: Tensor | None = None  # [C]

    @classmethod
    def of(cls, model: PreTrainedModel, batch: Batch) -> Rows:
        """Packed, or padded to the longest prompt where the model's attention takes no packed prompts."""
        if is_packed(model):
            inputs = packed_inputs(batch.input_ids, batch.position_ids, batch.prompts)
            return cls(inputs, batch.answer_position, batch.groups, None, batch.letter_ids[0])
        input_ids, mask = padded_inputs(batch.input_ids, batch.prompts)
        count, longest = input_ids.shape
        last = torch.arange(count, device=mask.device) * longest + batch.prompts.bounds.diff() - 1
        groups = Groups.of(rows_of_groups(model, batch), mask.device)
        return cls({"input_ids": input_ids}, last, groups, mask, batch.letter_ids[0])


def rows_of_groups(model: PreTrainedModel, batch: Batch) -> tuple[int, ...]:
    """Rows that the model's layers see of each group, padding included."""
    if is_packed(model):
        return batch.groups.sizes
    return tuple(prompts * max(batch.prompts.sizes) for prompts in batch.group_prompts)


def answer_logits(model: PreTrainedModel, rows: Rows) -> Tensor:
    """Logits over the vocabulary of the token after each prompt: [S, V] fp32.

    No attention mask is passed, which lets transformers build none and take the fast causal path. The output embeddings
    see [S, H] and not [T, H]: with a large vocabulary the latter would be the largest tensor of the run. The letters'
    logits of a 16-bit model are summed and kept in fp32: bf16 has steps of 0.25 at 33, where many tasks' best two
    options would be equal, and the first of them the prediction.
    """
    hidden = model.get_decoder()(**rows.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    head = model.get_output_embeddings()
    with nullcontext() if rows.letter_ids is None else _exact(head, rows.letter_ids):
        logits = head(hidden[rows.answer_position]).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _exact(head: nn.Module, tokens: Tensor) -> RemovableHandle:
    """While this is open a dense 16-bit head's logits are fp32, and those of `tokens` [C] have fp32's accuracy.

    Done in a hook, before those that take a weight spread over ranks apart again.
    """

    def replace(head: nn.Linear, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        if type(head).forward is not nn.Linear.forward or logits.dtype not in (torch.bfloat16, torch.float16):
            return logits
        exact = inputs[0].float() @ head.weight[tokens].float().mT
        exact = exact if head.bias is None else exact + head.bias[tokens].float()
        return logits.float().index_copy_(1, tokens, exact)

    return head.register_forward_hook(replace, prepend=True)


@torch.no_grad()
def check_supported(model: PreTrainedModel) -> None:
    """ValueError where `answer_logits` would not give the model's own logits, or draws random numbers in training.

    Runs the model, which is in evaluation mode, on four tokens.
    """
    kind = f"model.name: a model of type {model.config.model_type!r}"
    for key in LOGIT_SCALES:
        scale = getattr(model.config.get_text_config(), key, None)
        if scale not in (None, 1):
            raise ValueError(f"{kind} scales its logits ({key} = {scale}), not supported here; choose another model")
    if model.get_decoder() is model or model.get_output_embeddings() is None:
        raise ValueError(f"{kind} does not separate a backbone from output embeddings; choose another model")

    input_ids = torch.arange(4, device=model.device)[None]
    own = model(input_ids=input_ids, use_cache=False).logits[:, -1].float()
    if not own.isfinite().all():
        raise ValueError(
            f"model.dtype: {str(model.dtype).removeprefix('torch.')!r}: the model's logits are not finite; set "
            "model.dtype=bfloat16 or float32, or check that the model's file is complete"
        )
    # the names above cannot be complete: what is left shows here, far above the rounding of a 16-bit product
    last = torch.full((1,), 3, device=model.device)
    before = _generator_state(model.device)
    model.train()  # which inner steps run it in
    try:
        ours = answer_logits(model, Rows({"input_ids": input_ids}, last, Groups.of([4], model.device), None))
    finally:
        model.eval()
    if not before.equal(_generator_state(model.device)):
        raise ValueError(
            f"{kind} draws random numbers in training mode (a router's, or a dropout that its configuration hides): no "
            "seed would give a run again, and a layer computed anew for the backward pass would be another; choose "
            "another model"
        )
    if (ours - own).abs().max() > 0.05 * own.abs().max():
        raise ValueError(f"{kind} changes its logits behind the output embeddings in an unknown way; choose another")


def _generator_state(device: torch.device) -> Tensor:
    """Of the generator that a model's own random numbers on this device come from: it changes with each."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
