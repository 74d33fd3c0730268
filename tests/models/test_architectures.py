from __future__ import annotations

import pytest
import torch
from torch import nn

from abmll.models.architectures import ARCHITECTURES, architecture_config, byte_tokenizer, random_model
from abmll.models.load import parameter_count


def tiny(dtype: torch.dtype = torch.float32):
    return random_model(architecture_config("tiny"), torch.device("cpu"), dtype, "sdpa")


@pytest.mark.parametrize(
    ("name", "count"),
    # counted by hand: 2 V H (untied) + L (attention + 3 H I + 2 H) + H
    [
        ("tiny", 2 * 512 * 64 + 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64) + 64),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("qwen2-7b", 7_615_616_512),
    ],
)
def test_number_of_parameters(name, count):
    assert parameter_count(architecture_config(name)) == count


def test_rope_and_biases_are_the_true_ones():
    llama, qwen = architecture_config("llama3-8b"), architecture_config("qwen2-7b")
    assert llama.rope_parameters["rope_theta"] == 5e5 and qwen.rope_parameters["rope_theta"] == 1e6
    assert not llama.tie_word_embeddings and not qwen.tie_word_embeddings
    with torch.device("meta"):
        model = random_model(qwen, torch.device("meta"), torch.bfloat16, "sdpa")
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.bias is not None and attention.v_proj.bias is not None and attention.o_proj.bias is None
    assert attention.q_proj.weight.is_meta and attention.q_proj.weight.dtype == torch.bfloat16


def test_weights_repeat_whatever_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = tiny()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = tiny()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_weights_are_random_and_in_the_dtype():
    model = tiny(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert float(module.weight.detach().float().std()) == pytest.approx(0.125, rel=0.1)
    # positions need fp32: in bf16 the rotation's frequencies would be wrong by up to 0.4 %
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("text", ["A", "plain text, twice  spaced\n\n", "Grüße, 世界 🙂", "\x00\x7f"])
def test_bytes_round_trip(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode()) and max(ids) < 256
    assert tokenizer.decode(ids) == text


def test_tokenizer_fits_every_architecture():
    tokenizer = byte_tokenizer()
    ids = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    for name in ARCHITECTURES:
        config = architecture_config(name)
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == ids
        assert len(tokenizer) <= config.vocab_size


def test_chat_template():
    tokenizer = byte_tokenizer()
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.eos_token_id) == 1
    letters = {tuple(tokenizer(letter, add_special_tokens=False).input_ids) for letter in "ABCD"}
    assert len(letters) == 4 and all(len(letter) == 1 for letter in letters)
