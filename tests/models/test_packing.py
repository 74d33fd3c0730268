"""Packed prompts: each attends to itself alone, in every way that attention can be called."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import transformers

from abmll.models import packing
from abmll.models.architectures import architecture_config, random_model
from abmll.models.packing import (
    is_packed,
    pack_prompts,
    packed_inputs,
    prompt_by_prompt,
    register,
    tokens_of,
    told_layout,
    ways_of,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "initializer_range": 0.1,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "llama": None,
    "mistral": transformers.MistralConfig(**SMALL, **HEADS, sliding_window=8),
    "gemma3": transformers.Gemma3TextConfig(**SMALL, **HEADS, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "qwen3": transformers.Qwen3Config(**SMALL, **HEADS, head_dim=16),
    "phi3": transformers.Phi3Config(**SMALL, **HEADS, pad_token_id=0),
    "gpt2": transformers.GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, initializer_range=0.1),
}
LENGTHS = (23, 1, 7, 7, 40)


def model_of(family: str, attention: str = "sdpa"):
    config = FAMILIES[family] or architecture_config("tiny")
    return random_model(config, CPU, torch.float32, attention).eval().requires_grad_(False)


def hidden(model, **inputs):
    return model.get_decoder()(use_cache=False, **inputs).last_hidden_state[0]


@pytest.mark.parametrize("lengths", [LENGTHS, (12, 12, 12)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_beside_others_is_the_prompt_alone(family, lengths):
    """Windows shorter than a prompt included. Another number of rows is another order of sums."""
    model = model_of(family)
    input_ids, positions, prompts = tokens_of(lengths, CPU, 300)
    right = torch.cat([hidden(model, input_ids=prompt[None]) for prompt in input_ids.split(lengths)])
    assert pack_prompts(model) == "prompt"
    found = hidden(model, **packed_inputs(input_ids, positions, prompts))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


def test_a_change_in_one_prompt_moves_no_bit_of_another():
    model = model_of("llama")
    assert pack_prompts(model)
    input_ids, positions, prompts = tokens_of(LENGTHS, CPU, 300)
    before = hidden(model, **packed_inputs(input_ids, positions, prompts)).split(LENGTHS)
    changed = input_ids.clone()
    changed[LENGTHS[0]] += 1
    after = hidden(model, **packed_inputs(changed, positions, prompts)).split(LENGTHS)
    assert [torch.equal(one, other) for one, other in zip(before, after, strict=True)] == [True, False, *[True] * 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_takes_rows_as_any_model_does(family):
    model = model_of(family)
    input_ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(2))
    right = model(input_ids=input_ids).logits
    assert pack_prompts(model)
    torch.testing.assert_close(
        model(input_ids=input_ids).logits, right, rtol=1e-4, atol=1e-5 * float(right.abs().max())
    )


def test_the_ways_that_are_tried():
    assert ways_of("eager", CUDA, torch.bfloat16) == []
    assert ways_of("sdpa", CPU, torch.bfloat16) == ["prompt"]
    assert ways_of("sdpa", CUDA, torch.float32) == ["prompt"]
    assert ways_of("sdpa", CUDA, torch.bfloat16) == ["torch", "prompt"]
    assert ways_of("flash_attention_2", CUDA, torch.bfloat16) == ["fa2", "torch", "prompt"]


def test_second_derivatives_go_prompt_by_prompt(monkeypatch):
    """A GPU's 16-bit way is left for the time being, and comes back, after an error too."""
    model = model_of("llama")
    assert pack_prompts(model) == "prompt"
    with prompt_by_prompt(model):
        assert model.config._attn_implementation == register("prompt")
    model.set_attn_implementation(register("torch"))
    inputs = packed_inputs(*tokens_of(LENGTHS, CPU, 300))
    with pytest.raises(ZeroDivisionError), prompt_by_prompt(model):
        assert hidden(model, **inputs).isfinite().all()  # on a CPU the other way would fail
        raise ZeroDivisionError
    assert model.config._attn_implementation == register("torch")


def test_a_model_that_does_not_pass_on_who_belongs_together_is_left_as_it_was(monkeypatch):
    model = model_of("llama")
    forward = model.model.layers[1].self_attn.forward
    monkeypatch.setattr(
        model.model.layers[1].self_attn, "forward", lambda *a, prompts=None, **named: forward(*a, **named)
    )
    assert pack_prompts(model) is None and not is_packed(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_way_with_other_numbers_is_not_taken(monkeypatch):
    """Such as one that lets prompts see each other."""
    model = model_of("llama")
    monkeypatch.setattr(packing, "ways_of", lambda *_: ["careless", "prompt"])
    whole = packing.sdpa_attention_forward
    monkeypatch.setitem(packing._WAYS, "careless", lambda *tensors, prompts, **named: whole(*tensors, **named))
    assert pack_prompts(model) == "prompt"


def test_a_way_without_a_backward_pass_is_not_taken(monkeypatch):
    """Training would find out in its first step."""

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, found):
            return found.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no backward pass for this head size")

    def attend(*tensors, **named):
        return Forward.apply(packing._by_prompt(*tensors, **named)[0]), None

    monkeypatch.setattr(packing, "ways_of", lambda *_: ["fa2"])
    monkeypatch.setitem(packing._WAYS, "fa2", attend)
    model = model_of("llama")
    monkeypatch.setattr(model, "num_key_value_groups", 2, raising=False)  # of the module that SDPA asks
    before = model.config._attn_implementation
    assert pack_prompts(model) is None and model.config._attn_implementation == before
    assert told_layout(model) == "padded, which is all that this attention takes"


def varlen_in_float64(q, k, v, bounds, scale, window):
    """Attention of [T, H, D] and [T, Hkv, D] prompt by prompt, in plain arithmetic; window: tokens seen, -1 all."""
    found, shared = [], q.shape[1] // k.shape[1]
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        queries, keys, values = (t[start:stop].double().transpose(0, 1) for t in (q, k, v))
        keys, values = (t.repeat_interleave(shared, dim=0) for t in (keys, values))
        scores = queries @ keys.mT * scale
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        hidden = (distance < 0) | ((distance > window) if window >= 0 else torch.tensor(False))
        found.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(found).to(q.dtype)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(
    ("way", "told"),
    [("fa2", "flash-attn"), ("torch", "PyTorch's varlen_attn"), ("torch 2.11", "PyTorch's varlen_attn")],
)
def test_kernels_of_several_lengths_are_called_as_they_say(way, told, family, monkeypatch):
    """Their calls, on stand-ins with their documented arguments: neither kernel runs without a GPU."""
    seen = []

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0,
    ):  # fmt: skip
        assert causal and cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32 and not softcap
        assert window_size[1] in (-1, 0) and max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        seen.append(way)
        return varlen_in_float64(q, k, v, cu_seqlens_q, softmax_scale, window_size[0])

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        assert enable_gqa == (query.shape[1] != key.shape[1]) and window_size[1] == 0  # 0: causal
        assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32 and max_q == max_k == int(cu_seq_q.diff().max())
        seen.append(way)
        return varlen_in_float64(query, key, value, cu_seq_q, scale, window_size[0])

    def varlen_attn_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return varlen_attn(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip

    way, _, old = way.partition(" ")
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn_2_11 if old else varlen_attn)
    monkeypatch.setattr(packing, "ways_of", lambda *_: [way])
    model = model_of(family)
    input_ids, positions, prompts = tokens_of(LENGTHS, CPU, 300)
    right = torch.cat([hidden(model, input_ids=prompt[None]) for prompt in input_ids.split(LENGTHS)])
    assert pack_prompts(model) == way
    found = hidden(model, **packed_inputs(input_ids, positions, prompts))
    assert len(seen) == 2 * model.config.num_hidden_layers + 1  # tried, differentiated, and used
    assert told_layout(model) == f"packed, their attention by {told}, all at once"
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))
