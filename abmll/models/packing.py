"""Attention of packed prompts: many prompts' tokens in one row without padding, each attending to its own alone.

The linear layers, which are nearly all of the work, then see real tokens only, whatever the prompts' lengths, and many
episodes side by side cost their own tokens. Transformers' models call attention by a registered name and build no mask
for names that they do not know: so none is built here, and nothing asks the device whether sequences are packed.

Three ways, the first that gives the model's own logits is taken (`pack_prompts` tries them):
    flash-attn's kernel for sequences of several lengths, where model.attention is flash_attention_2
    PyTorch's own (`torch.nn.attention.varlen`), on a GPU in 16 bits
    SDPA, prompt by prompt
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from abmll.kernels import Groups
from abmll.models.sharding import forget_pass

logger = logging.getLogger("abmll.models")

PREFIX = "abmll_packed_"
# of the model's own logits, the largest: far above a 16-bit product's rounding, far below what a wrong mask makes
TOLERANCE = 0.05
TRIED = (4, 9, 1, 6)  # tokens of the prompts that a way is tried on


def _by_prompt(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    prompts: Groups,
    sliding_window: int | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """SDPA: q [1, H, T, D], k and v [1, Hkv, T, D] -> [1, T, H, D]. Prompts of one length go together."""
    longest = max(prompts.sizes)
    if min(prompts.sizes) == longest:
        packed = (t.squeeze(0).unflatten(1, (len(prompts), longest)).transpose(0, 1) for t in (query, key, value))
        mask = _window(longest, sliding_window, query)
        return sdpa_attention_forward(module, *packed, mask, **named)[0].flatten(0, 1).unsqueeze(0), None
    # split and not sliced: a slice's derivative would be a tensor of the whole size for each prompt
    parts = zip(*(tensor.split(prompts.sizes, dim=2) for tensor in (query, key, value)), strict=True)
    found = [
        sdpa_attention_forward(module, *part, _window(part[0].shape[2], sliding_window, query), **named)[0]
        for part in parts
    ]
    return torch.cat(found, dim=1), None


def _window(tokens: int, sliding_window: int | None, near: Tensor) -> Tensor | None:
    """A mask [1, 1, T, T] where a prompt is longer than the window; else None: causal."""
    if sliding_window is None or tokens <= sliding_window:
        return None
    full = torch.ones(tokens, tokens, dtype=torch.bool, device=near.device)
    return full.tril().triu(1 - sliding_window)[None, None]


# q [T, H, D], k and v [T, Hkv, D], bounds of the prompts, the longest, scale, window (-1: none), softcap -> [T, H, D]
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float | None, int, float | None], Tensor]


def _flash_attn(q, k, v, bounds, longest, scale, window, softcap) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q, k, v, bounds, bounds, longest, longest, softmax_scale=scale, causal=True,
        window_size=(window, -1 if window < 0 else 0), softcap=softcap or 0.0,
    )  # fmt: skip


def _torch_varlen(q, k, v, bounds, longest, scale, window, softcap) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if softcap is not None:
        raise ValueError("torch's attention of several lengths has no softcap")
    # an older PyTorch has no such word, and its kernel takes fewer heads of keys without being told
    grouped = q.shape[1] != k.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters
    shared = {"enable_gqa": True} if grouped else {}
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(window, 0), **shared)


def _at_once(kernel: Kernel) -> Callable:
    """Attention by a kernel for sequences of several lengths."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        prompts: Groups,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        rows = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        window = -1 if sliding_window is None else sliding_window - 1
        found = kernel(*rows, prompts.bounds, max(prompts.sizes), scaling, window, softcap)
        return found.unsqueeze(0), None

    return attend


# transformers takes every name with "flash" in it for one of its own
_WAYS: dict[str, Callable] = {
    "fa2": _at_once(_flash_attn),
    "torch": _at_once(_torch_varlen),
    "prompt": _by_prompt,
}
_TOLD = {
    "fa2": "their attention by flash-attn, all at once",
    "torch": "their attention by PyTorch's varlen_attn, all at once",
    "prompt": "their attention one prompt after another",
}
_PADDED = "padded, which is all that this attention takes"


def register(way: str, attend: Callable | None = None) -> str:
    """Transformers' name of a way, made known to it; `attend` replaces the function (for counting memory).

    Called without `prompts` the model still works: every row of its input is a prompt then. It takes no padding.
    """
    name, packed = PREFIX + way, attend or _WAYS[way]

    def attention(module: nn.Module, *tensors: Tensor, prompts: Groups | None = None, **named: Any):
        if prompts is None:
            return _by_row(module, *tensors, **named)
        return packed(module, *tensors, prompts=prompts, **named)

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    return name


def _by_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    sliding_window: int | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    return sdpa_attention_forward(module, query, key, value, _window(query.shape[2], sliding_window, query), **named)


def is_packed(model: PreTrainedModel) -> bool:
    return model.config.get_text_config()._attn_implementation.startswith(PREFIX)


def told_layout(model: PreTrainedModel) -> str:
    """How prompts lie in a batch, and what their attention runs by: one way is much faster than another."""
    way = model.config.get_text_config()._attn_implementation
    return f"packed, {_TOLD[way.removeprefix(PREFIX)]}" if is_packed(model) else _PADDED


def ways_of(attention: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The ways that may serve instead of one of transformers' implementations, the fastest first."""
    if attention == "eager":
        return []
    ways = ["fa2"] if attention == "flash_attention_2" else []
    if device.type == "cuda" and dtype.itemsize == 2:
        ways.append("torch")
    return [*ways, "prompt"]


@contextmanager
def prompt_by_prompt(model: PreTrainedModel) -> Iterator[None]:
    """Packed prompts by SDPA, one after another: the varlen kernels' backward passes have no derivative."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    if before in (PREFIX + "fa2", PREFIX + "torch"):
        model.set_attn_implementation(register("prompt"))
    try:
        yield
    finally:
        if config._attn_implementation != before:
            model.set_attn_implementation(before)


@torch.no_grad()
def pack_prompts(model: PreTrainedModel) -> str | None:
    """Let the model take packed prompts, if it gives its own logits so; returns the way taken, or None.

    Runs the model on a few tokens. Without a way it is left as it was: prompts are then padded.
    """
    before = model.config.get_text_config()._attn_implementation
    batch, right = None, None
    for way in ways_of(before, model.device, model.dtype):
        if batch is None:
            batch = tokens_of(TRIED, model.device, model.config.get_text_config().vocab_size)
            alone = batch[0].split(TRIED)
            right = torch.cat([_hidden(model, input_ids=prompt[None]) for prompt in alone], dim=1)
        try:
            model.set_attn_implementation(register(way))
            found = _hidden(model, **packed_inputs(*batch))
            # NaN fails this as well
            if is_packed(model) and (found - right).abs().max() <= TOLERANCE * right.abs().max():
                if way != "prompt":
                    _differentiate(_WAYS[way], model, batch[2])
                return way
            logger.info("packed prompts, %s: not the model's own numbers", way)
        except Exception as error:  # whatever a model's code does with arguments that it does not expect
            logger.info("packed prompts, %s: %s", way, error)
            forget_pass(model)
        model.set_attn_implementation(before)
    return None


def _differentiate(attend: Callable, model: PreTrainedModel, prompts: Groups) -> None:
    """Raises what a kernel's own backward pass raises, at the model's heads."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    grouped = getattr(config, "num_key_value_heads", None) or heads
    with torch.enable_grad():
        ones = [
            torch.ones(1, count, prompts.total, size, device=model.device, dtype=model.dtype, requires_grad=True)
            for count in (heads, grouped, grouped)
        ]
        attend(model, *ones, None, prompts=prompts, scaling=size**-0.5)[0].sum().backward()


def _hidden(model: PreTrainedModel, **inputs: Any) -> Tensor:
    return model.get_decoder()(use_cache=False, **inputs).last_hidden_state.float()


def tokens_of(lengths: tuple[int, ...], device: torch.device, vocabulary: int) -> tuple[Tensor, Tensor, Groups]:
    """Some tokens, their positions and prompts."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(vocabulary, (sum(lengths),), generator=generator, device="cpu").to(device)
    positions = torch.cat([torch.arange(length, device="cpu") for length in lengths]).to(device)
    return input_ids, positions, Groups.of(lengths, device)


def packed_inputs(input_ids: Tensor, position_ids: Tensor, prompts: Groups) -> dict[str, Any]:
    """What a model's decoder takes: one row of all prompts, and for its attention who belongs together."""
    return {"input_ids": input_ids[None], "position_ids": position_ids[None], "prompts": prompts}


def padded_inputs(input_ids: Tensor, prompts: Groups) -> tuple[Tensor, Tensor]:
    """Input ids [S, L], padded on the right with token 0 to the longest, and where they are real, bool [S, L].

    Under causal attention a token on the right never reaches the answer: no attention mask is needed.
    """
    rows = pad_sequence(input_ids.split(prompts.sizes), batch_first=True)
    lengths = prompts.bounds.diff()
    return rows, torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
