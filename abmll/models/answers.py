"""The forward pass to the answers: logits at one position a prompt, and at no other."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from abmll.tasks.task import Batch

# names under which transformers' configurations scale the logits outside the output embeddings
LOGIT_SCALES = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
    "logits_mup_width_multiplier",
)


def answer_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits over the vocabulary of the token after each prompt: [B, V] fp32.

    The prompts are padded on the right and attention is causal, so that no real token attends to padding. No attention
    mask is passed, which lets transformers build none and take the fast causal path. The output embeddings see
    [B, H] and not [B, T, H]: with a large vocabulary the latter would be the largest tensor of the run.
    """
    return _logits(model, batch.input_ids, batch.answer_position)


def _logits(model: PreTrainedModel, input_ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    rows = torch.arange(len(position), device=position.device)
    logits = model.get_output_embeddings()(hidden[rows, position]).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
def check_supported(model: PreTrainedModel) -> None:
    """ValueError where `answer_logits` would not give the model's own logits. Runs the model on four tokens."""
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
    ours = _logits(model, input_ids, torch.full((1,), 3, device=model.device))
    if (ours - own).abs().max() > 0.05 * own.abs().max():
        raise ValueError(f"{kind} changes its logits behind the output embeddings in an unknown way; choose another")
