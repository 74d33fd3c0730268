from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import CohereConfig, Gemma2Config, GraniteConfig, PhimoeConfig, Qwen2Config

from abmll.models.answers import Rows, answer_logits, check_supported
from abmll.models.architectures import architecture_config, random_model
from abmll.models.packing import pack_prompts

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.125,
    # the defaults of some types lie beyond this vocabulary
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa"):
    if name == "llama":
        config = architecture_config("tiny")
    else:
        small = {key: value for key, value in SMALL.items() if key != "head_dim" or name == "gemma2"}
        config = {"qwen2": Qwen2Config, "gemma2": Gemma2Config, "cohere": CohereConfig, "granite": GraniteConfig}[name](
            **small
        )
    return random_model(config, torch.device("cpu"), dtype, attention).requires_grad_(False).eval()


def close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    # one bf16 rounding of logits of this size is up to 2^-8 of the largest; a mistake is of order one
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=tolerance * float(theirs.abs().max()))


def logits_of(model, batch):
    return answer_logits(model, Rows.of(model, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("qwen2", "sdpa"), ("qwen2", "eager"), ("gemma2", "eager")],
)
def test_equals_the_models_own_logits(name, dtype, attention, packed, make_batch):
    model, batch = build(name, dtype, attention), make_batch([7, 23, 1, 16])
    check_supported(model)
    if packed:
        assert pack_prompts(model) == (None if attention == "eager" else "prompt")
    ours = logits_of(model, batch)
    model.set_attn_implementation(attention)
    assert ours.shape == (4, model.config.vocab_size) and ours.dtype == torch.float32
    for row, prompt in enumerate(batch.input_ids.split(batch.prompts.sizes)):
        close(ours[row], model(input_ids=prompt[None]).logits[0, -1], dtype)


def test_padding_does_not_change_a_bit(make_batch):
    model, batch = build("llama"), make_batch([7, 23, 16])
    rows = Rows.of(model, batch)
    other = rows.inputs["input_ids"].where(rows.token_mask, 5)
    assert rows.token_mask.sum(dim=1).tolist() == [7, 23, 16] and not torch.equal(other, rows.inputs["input_ids"])
    filled = dataclasses.replace(rows, inputs={"input_ids": other})
    assert torch.equal(answer_logits(model, rows), answer_logits(model, filled))


@pytest.mark.parametrize("packed", [False, True])
def test_no_mask_reaches_attention(make_batch, monkeypatch, packed):
    """The fast path: SDPA is called with is_causal and without a mask."""
    model, seen = build("llama"), []
    assert not packed or pack_prompts(model)
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*arguments, attn_mask=None, is_causal=False, **rest):
        seen.append((attn_mask, is_causal))
        return attend(*arguments, attn_mask=attn_mask, is_causal=is_causal, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    logits_of(model, make_batch([7, 23]))
    assert seen == [(None, True)] * model.config.num_hidden_layers * (2 if packed else 1)


def test_output_embeddings_see_only_the_answers(make_batch):
    model, shapes = build("llama"), []
    model.lm_head.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    logits_of(model, make_batch([7, 23]))
    assert shapes == [(2, model.config.hidden_size)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_letters_are_not_rounded_to_16_bits(dtype, make_batch):
    """So that of two options one is the likelier. The others are as the head gives them; so are its derivatives."""
    model, batch, seen = build("qwen2", dtype), make_batch([7, 23, 16]), []
    model.model.embed_tokens.weight.requires_grad_(True)
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found, letters = logits_of(model, batch), batch.letter_ids[0]
    hidden, weight = seen[0], model.lm_head.weight
    right = hidden.double() @ weight[letters].double().mT
    assert found.dtype == torch.float32 and found.abs().max() > 0.5
    # H products, exact in fp32, and their sum's roundings
    bound = (
        weight.shape[1] * torch.finfo(torch.float32).eps * (hidden.double().abs() @ weight[letters].double().abs().mT)
    )
    assert ((found[:, letters] - right).abs() <= bound).all()
    assert (found[:, letters].to(dtype).float() != found[:, letters]).any()
    rounded = model.lm_head(hidden).float()
    others = torch.ones(found.shape[1], dtype=torch.bool).index_fill_(0, letters, False)
    assert torch.equal(found[:, others], rounded[:, others])
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(found, hidden, upstream)
    expected = upstream.double() @ weight.double()
    assert (gradient - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_checkpointing_gives_the_same_gradients(name, packed, make_batch):
    batch, gradients = make_batch([7, 23, 16]), []
    for checkpointing in (False, True):
        model = build(name)
        assert not packed or pack_prompts(model)
        projections = [layer.self_attn.v_proj.weight for layer in model.model.layers]
        for weight in projections:
            weight.requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        torch.nn.functional.cross_entropy(logits_of(model, batch), batch.target).backward()
        gradients.append([weight.grad for weight in projections])
    for without, with_checkpointing in zip(*gradients, strict=True):
        assert without.abs().max() > 0
        assert torch.equal(with_checkpointing, without)  # the same operations on the same numbers


@pytest.mark.parametrize(("name", "key"), [("cohere", "logit_scale"), ("granite", "logits_scaling")])
def test_scaled_logits_are_refused(name, key):
    model = build(name)
    setattr(model.config, key, 8.0)
    with pytest.raises(ValueError, match=rf"model\.name: .*'{name}' scales its logits \({key} = 8\.0\)"):
        check_supported(model)


def test_a_scale_of_one_is_allowed():
    model = build("granite")
    assert model.config.logits_scaling == 1
    check_supported(model)


def test_unknown_changes_of_the_logits_are_refused(monkeypatch):
    model = build("llama")
    forward = model.forward

    def doubled(*arguments, **named):
        output = forward(*arguments, **named)
        output.logits = 2 * output.logits
        return output

    monkeypatch.setattr(model, "forward", doubled)
    with pytest.raises(ValueError, match=r"model\.name: .*'llama' changes its logits"):
        check_supported(model)


def test_a_model_without_output_embeddings_is_refused(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    with pytest.raises(ValueError, match=r"model\.name: .*does not separate a backbone"):
        check_supported(model)


def test_logits_that_are_not_finite_are_refused():
    model = build("llama", torch.float16)
    model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"model\.dtype: 'float16': .*not finite; set model\.dtype=bfloat16"):
        check_supported(model)


def test_a_model_that_is_random_in_training_is_refused():
    """Phi-MoE's router draws its experts there, whatever its jitter; it stays as it was: in evaluation mode."""
    sizes = {key: value for key, value in SMALL.items() if key != "head_dim"}
    config = PhimoeConfig(**sizes, num_local_experts=4, router_jitter_noise=0.0, input_jitter_noise=0.0)
    model = random_model(config, torch.device("cpu"), torch.float32, "sdpa").requires_grad_(False).eval()
    with pytest.raises(ValueError, match=r"model\.name: .*'phimoe' draws random numbers in training mode"):
        check_supported(model)
    assert not model.training


def test_check_draws_no_random_numbers():
    model, before = build("llama"), torch.get_rng_state()
    check_supported(model)
    assert torch.equal(torch.get_rng_state(), before)
